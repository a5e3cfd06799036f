"""Kinds of masks in the table: each against its paper's formula, token by token in float64; weights in the data."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tests.helpers.sparse_po import LOG2, first_batch, losses, make_trainer, perturb
from tests.helpers.tiny import tiny_pairs
from trl_ext.sparse_po import mask_kinds
from trl_ext.sparse_po.given_weights import TokenWeightsCollator, completion_weights, span_weights
from trl_ext.sparse_po.mask_kinds import TokenInputs, kind_weights, register_mask_kind
from trl_ext.sparse_po.sparse_po_config import SparsePOConfig


LENGTHS = (5, 3, 1, 6)


def random_tokens():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.zeros(4, 7, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        predicted[row, 1 : 1 + length] = True
    log_probs = [-3 * torch.rand(4, 7, generator=generator) * predicted for _ in range(2)]
    return TokenInputs(predicted, None, policy_log_probs=log_probs[0], reference_log_probs=log_probs[1])


def test_confidence_is_conf_po():
    tokens = random_tokens()
    found, divergence = kind_weights("confidence", tokens)
    expected = torch.zeros(4, 7, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        probabilities = [math.exp(tokens.policy_log_probs[row, 1 + place].item()) for place in range(length)]
        for place, probability in enumerate(probabilities):
            expected[row, 1 + place] = float(probability < sum(probabilities) / length)
    assert torch.equal(found.double(), expected) and torch.equal(found, divergence)
    assert found[2].sum() == 0 and 0 < found.sum() < sum(LENGTHS)


def test_log_ratio_is_tis_dpo():
    tokens = random_tokens()
    found, _ = kind_weights("log_ratio", tokens)
    expected = torch.zeros(4, 7, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        sign = 1 if row < 2 else -1
        for place in range(1, 1 + length):
            ratio = tokens.policy_log_probs[row, place].item() - tokens.reference_log_probs[row, place].item()
            expected[row, place] = math.exp(sign * min(max(ratio, -0.5), 1.5))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    assert found.max() > 1.4 and found[tokens.predicted].min() < 0.65


@pytest.fixture
def own_kind(monkeypatch):
    monkeypatch.setattr(mask_kinds, "MASK_KINDS", mask_kinds.MASK_KINDS)
    before = dict(mask_kinds.MASK_KINDS)
    yield
    mask_kinds.MASK_KINDS.clear()
    mask_kinds.MASK_KINDS.update(before)


def test_a_kind_of_ones_own(own_kind, tmp_path, tiny_path, tokenizer):
    seen = []

    def uncertain_tokens(tokens):
        seen.append(tokens)
        return tokens.entropy, tokens.divergences

    register_mask_kind("entropy", uncertain_tokens)
    with pytest.raises(ValueError, match="already"):
        register_mask_kind("entropy", uncertain_tokens)
    with pytest.raises(ValueError, match="mask_type.*'entropies'"):
        SparsePOConfig(str(tmp_path), mask_type="entropies", bf16=False)
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, mask_type="entropy", max_steps=2)
    perturb(trainer.model)
    batch = first_batch(trainer)
    weights = trainer.token_masks(batch)
    logits = trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, :-1].double()
    entropy = torch.distributions.Categorical(logits=logits).entropy() * batch["completion_mask"][:, 1:]
    torch.testing.assert_close(weights["reward"].double(), entropy, rtol=1e-5, atol=1e-5)
    assert not weights["reward"].requires_grad and weights["divergence"].max() > 0
    assert not any(t.requires_grad for t in (seen[-1].entropy, seen[-1].policy_log_probs, seen[-1].divergences))
    trainer.train()
    assert trainer.state.log_history[0]["mask/reward/mean"] == pytest.approx(
        (entropy.sum() / batch["completion_mask"][:, 1:].sum()).item(), rel=0.2
    )
    mask_kinds.MASK_KINDS["entropy"] = mask_kinds.MaskKind(lambda tokens: tokens.entropy[:, 1:])
    with pytest.raises(ValueError, match="'entropy' returned shapes.*expected one tensor"):
        trainer.token_masks(batch)


@pytest.mark.parametrize("mask_type", ["confidence", "log_ratio"])
def test_kinds_that_read_the_policy_train(mask_type, tmp_path, tiny_path, tokenizer):
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, mask_type=mask_type, max_steps=2)
    trainer.train()
    assert losses(trainer)[0] == LOG2 != losses(trainer)[1]


def with_weights(weigh, conversational=False, count=6):
    rows = tiny_pairs(count, conversational=conversational).to_list()
    for place, row in enumerate(rows):
        row.update(weigh(place, row))
    return Dataset.from_list(rows)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_a_number_for_each_token(tmp_path, tiny_path, tokenizer):
    """Rewards and divergences apart, through cutting and padding to the loss's terms."""

    def weigh(place, row):
        found = {}
        for side in ("chosen", "rejected"):
            length = len(row[side].split())
            found[f"{side}_token_weights"] = [10 * place + token + 1 for token in range(length)]
            found[f"{side}_divergence_weights"] = [0.5 * token for token in range(length)]
        return found

    data = with_weights(weigh)
    for mode in ("keep_start", "keep_end"):
        trainer = make_trainer(
            tmp_path, tiny_path, tokenizer, data=data, mask_type="given", max_length=7, truncation_mode=mode,
            max_steps=1, per_device_train_batch_size=3,
        )  # fmt: skip
        pairs = [trainer.train_dataset[place] for place in range(3)]
        batch = trainer.data_collator(pairs)
        weights = trainer.token_masks(dict(batch))
        for row, (side, place) in enumerate((side, place) for side in ("chosen", "rejected") for place in range(3)):
            ids = pairs[place]["prompt_ids"] + pairs[place][f"{side}_ids"]
            reward = [0.0] * len(pairs[place]["prompt_ids"]) + data[place][f"{side}_token_weights"]
            divergence = [0.0] * len(pairs[place]["prompt_ids"]) + data[place][f"{side}_divergence_weights"]
            kept = slice(7) if mode == "keep_start" else slice(-7, None)
            # The first token is predicted by none
            for name, expected in (("reward", reward[kept][1:]), ("divergence", divergence[kept][1:])):
                assert weights[name][row, : len(ids[kept]) - 1].tolist() == expected, (mode, side, place, name)
        trainer.train()
    assert losses(trainer) == [LOG2]
    assert trainer.state.log_history[0]["mask/reward/mean"] > 5


@pytest.mark.parametrize("conversational", [False, True], ids=["plain", "conversational"])
def test_spans_of_characters(conversational, tmp_path, tiny_path, tokenizer):
    def weigh(place, row):
        found = {}
        for side in ("chosen", "rejected"):
            text = row[side][0]["content"] if conversational else row[side]
            word = text.split()[1]
            start = text.index(word, len(text.split()[0]))
            found[f"{side}_token_weights"] = (
                [[start, start + len(word), 0.25]] if place != 2 else [[0, len(text), 0.0]]
            )
        return found

    data = with_weights(weigh, conversational)
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, data=data, mask_type="given")
    for place, pair in enumerate(trainer.train_dataset):
        for side in ("chosen", "rejected"):
            num_words = len(pair[f"{side}_ids"]) - 1  # and the end token
            expected = (
                [1.0, 0.25] + [1.0] * (num_words - 1) if place != 2 else [0.0] * num_words + [float(conversational)]
            )
            assert pair[f"{side}_reward_mask"] == pair[f"{side}_divergence_mask"] == expected, (place, side)


def test_span_weights():
    offsets = [(0, 3), (3, 8), (8, 9), (9, 9)]
    assert span_weights([[0, 4, 2.0], [8, 9, 0.0]], offsets, 9) == [2.0, 2.0, 0.0, 1.0]
    assert span_weights([[0, 9, 0.0], [3, 8, 5.0]], offsets, 9) == [0.0, 5.0, 0.0, 1.0]
    for span, message in (
        ([3, 3, 1.0], "does not lie in the text, which has 9"),
        ([0, 10, 1.0], "does not lie"),
        ([0.5, 2, 1.0], "does not lie"),
        ([1, 2], "no span"),
        ([float("nan"), 2, 1.0], "does not lie"),
        ([0, float("inf"), 1.0], "does not lie"),
        ([None, "2", 1.0], "does not lie"),
        ([0, 10**5000, 1.0], "does not lie"),
    ):
        with pytest.raises(ValueError, match=message):
            span_weights([span], offsets, 9)
    with pytest.raises(ValueError, match=r"no token meets the span \[4, 6, 1.0\]"):
        span_weights([[4, 6, 1.0]], [(0, 4), (6, 9)], 9)


@pytest.mark.parametrize("weights", [False, 3, "ab", {"a": 1.0}])
def test_token_weights_that_are_no_list(weights):
    with pytest.raises(ValueError, match="is no list"):
        completion_weights({"chosen_ids": [1, 2]}, "chosen", weights, None)


@pytest.mark.parametrize("number", [10**400, -(10**400), 10**5000, math.inf, None, "1", [], [[1]]], ids=lambda _: "")
def test_token_weights_that_are_no_weights(number):
    with pytest.raises(ValueError, match="is no (weight|span)"):
        completion_weights({"chosen_ids": [1, 2]}, "chosen", [number, 1.0], None)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "there are 1 weights, and the completion has [0-9]+ tokens"),
        ("negative", "-1.0 is no weight"),
        ("nan", "nan is no weight"),
        (None, "there are no weights"),
    ],
)
def test_weights_that_do_not_fit_name_their_row(weights, message, tmp_path, tiny_path, tokenizer):
    def weigh(place, row):
        found = {f"{side}_token_weights": [1.0] * len(row[side].split()) for side in ("chosen", "rejected")}
        if place == 4:
            wrong = {"negative": -1.0, "nan": math.nan}.get(str(weights))
            rest = found["rejected_token_weights"][1:]
            found["rejected_token_weights"] = weights if wrong is None else [*rest, wrong]
        if place == 0:
            row["prompt"] = " ".join(["the"] * 30)  # TRL drops it
        return found

    with pytest.raises(ValueError, match=f"Row 4 of the train dataset, `rejected_token_weights`: {message}"):
        make_trainer(tmp_path, tiny_path, tokenizer, data=with_weights(weigh), mask_type="given", max_length=20)


def test_given_without_weights(tmp_path, tiny_path, tokenizer):
    with pytest.raises(ValueError, match="'chosen_token_weights' and 'rejected_token_weights' of the train dataset"):
        make_trainer(tmp_path, tiny_path, tokenizer, mask_type="given")
    with pytest.raises(ValueError, match="`data_collator` is a `SimpleNamespace`"):
        TokenWeightsCollator(SimpleNamespace())
