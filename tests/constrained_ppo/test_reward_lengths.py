"""Texts longer than a reward model's positions lose their beginning, and are counted."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from trl_ext.constrained_ppo.reward_functions import guarded
from trl_ext.constrained_ppo.reward_lengths import positions_of


def reward_model(family="gpt2", **sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=40, num_labels=1, pad_token_id=0, **sizes)
    return AutoModelForSequenceClassification.from_config(config).eval()


GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ARGS = SimpleNamespace(token_rewards=[], reward_timeout=None, reward_retries=0, reward_retry_seconds=1.0)


def batch(lengths):
    """Tokens 1 to 39 in a row for each length, padded on the right."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(length) % 39 + 1
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@torch.no_grad()
def test_the_last_tokens_are_read_and_the_loss_is_counted(caplog):
    model = reward_model(**GPT2)
    texts = batch([3, 8, 9, 14])
    with pytest.raises((IndexError, RuntimeError)):
        model(**texts)
    expected = [float(model(torch.arange(max(0, n - 8), n)[None] + 1).logits) for n in (3, 8, 9, 14)]
    assert guarded([model], ["helpful"], ARGS) == [model]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        assert model(**texts).logits[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
        (message,) = caplog.messages
        assert "helpful has 8 positions, and 2 of 4 texts" in message and "up to 14 tokens" in message
        model(**batch([8, 3]))
        for _ in range(4):  # to 10 texts: the second message
            model(**texts)
    assert len(caplog.messages) == 2 and "10 of 22 texts" in caplog.messages[1]
    assert len(set(expected)) == 4


@torch.no_grad()
def test_families_that_count_positions_from_behind_the_padding():
    model = reward_model("roberta", max_position_embeddings=10, **BERT)
    assert positions_of(model) == 9  # padding is token 0
    guarded([model], ["r"], ARGS)
    full = model(**batch([9])).logits
    assert model(**batch([12])).logits.shape == full.shape


def test_models_without_a_limit_are_left_alone():
    model = torch.nn.Linear(2, 2)
    assert positions_of(model) is None
    assert guarded([model], ["m"], ARGS) == [model] and not model._forward_pre_hooks
    twice = reward_model(**GPT2)
    guarded([twice, twice], ["a", "b"], ARGS)
    assert len(twice._forward_pre_hooks) == 1
