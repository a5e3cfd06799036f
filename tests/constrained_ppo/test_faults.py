"""What a user of another trainer gets wrong without noticing: stop tokens, references, dropout, copies of adapters."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers.constrained_ppo import XI, length, low_ids, make, prompts, rollout
from tests.helpers.tiny import WORDS, tiny_model, tiny_tokenizer
from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer, critic_from_pretrained
from trl_ext.constrained_ppo.constrained_ppo_config import gold_dataset, stop_token_ids
from trl_ext.constrained_ppo.prompts import random_rows, stream_position
from trl_ext.constrained_ppo.reference import divergence_warning, frozen_copy
from trl_ext.core.dropout import disable_dropout, stated_probabilities


STOP = 7


def perturbed(model, size=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def likely(model, token, times=6.0):
    with torch.no_grad():
        model.lm_head.weight[token] *= times
    return model


# Stop tokens


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, path):
    """A trainer whose responses end at token 7, and one rollout of it."""
    trainer = make(
        tmp_path_factory.mktemp("stopped"), likely(AutoModelForCausalLM.from_pretrained(path), STOP, 4.0),
        generation_kwargs={"eos_token_id": STOP}, missing_eos_penalty=2.0, per_device_train_batch_size=32,
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, trainer._generate_and_score_completions(list(prompts(32)))


def test_nothing_after_a_stop_token_of_the_users_counts(stopped):
    trainer, batch = stopped
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    ended = ((ids == STOP) & mask).any(dim=1)
    assert 4 < ended.sum() < 32
    for row, keep in zip(ids, mask, strict=True):
        kept = row[keep].tolist()
        assert STOP not in kept[:-1] and (kept[-1] == STOP or len(kept) == 8)
    # The tokenizer's own end-of-sequence token, id 1, is a token like others
    assert ((ids == 1) & mask).any()
    outside = ~mask
    assert outside.any()
    for name in ("divergence", "mask"):
        assert not trainer.rollout.__dict__[name][outside].any()
    for name in ("advantages", "returns"):
        assert not trainer.rollout.__dict__[name][:, outside].any()
    assert not batch["advantages"][outside].any() and batch["num_items_in_batch"] == mask.sum()


def test_rewards_penalty_and_statistics_see_the_users_stop_token(stopped):
    trainer, batch = stopped
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    lengths, ended = mask.sum(dim=1), ((ids == STOP) & mask).any(dim=1)
    torch.testing.assert_close(trainer.rollout.rewards[:, 1], lengths / 8)
    trained = trainer._trained_rewards(trainer.rollout, batch)
    torch.testing.assert_close(trainer.rollout.rewards - trained, 2.0 * (~ended).float().unsqueeze(1).expand(-1, 2))
    (clipped,) = trainer._metrics["train"]["completions/clipped_ratio"]
    # TRL also takes a response that ends in a sampled padding token as finished
    cut = [row[keep][-1] not in (STOP, 0) for row, keep in zip(ids, mask, strict=True)]
    assert clipped == pytest.approx(sum(cut) / 32)


@pytest.mark.parametrize(
    ("generation_kwargs", "found"),
    [
        (None, [1, 5]),
        ({"top_k": 3}, [1, 5]),
        ({"eos_token_id": 42}, [42]),
        ({"eos_token_id": [42, 1]}, [42, 1]),
        ({"stop_token_ids": [42, 5]}, [1, 5, 42]),
        ({"stop_token_ids": [42], "ignore_eos": True}, [42]),
    ],
)
def test_stop_token_ids(generation_kwargs, found, tmp_path):
    uses_vllm = "stop_token_ids" in (generation_kwargs or {})
    args = ConstrainedPPOConfig(
        str(tmp_path), method="ppo", use_cpu=True, bf16=False, use_vllm=uses_vllm, generation_kwargs=generation_kwargs
    )
    assert stop_token_ids(args, [1, 5]) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_kwargs": {"eos_token_id": "<eos>"}}, "'<eos>'.*convert_tokens_to_ids"),
        ({"generation_kwargs": {"eos_token_id": []}}, "must be a token id or a list"),
        ({"generation_kwargs": {"stop_token_ids": [4]}}, "not known to transformers.*'eos_token_id': \\[4\\]"),
        ({"generation_kwargs": {"eos_token_id": 4}, "use_vllm": True}, "not known to vLLM.*'stop_token_ids': 4"),
        ({"use_score_norm": True}, "`use_score_norm=True` needs `use_score_scaling=True`"),
        ({"score_clip": 0.0}, "`score_clip`.*0.0"),
        ({"cliprange_value_unit": "returns"}, "`cliprange_value_unit`.*'spread'.*'returns'"),
        ({"critic_max_grad_norm": 1.0, "max_grad_norm": 0.0}, "`critic_max_grad_norm=1.0`.*`max_grad_norm=0.0`"),
    ],
)
def test_wrong_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ConstrainedPPOConfig(str(tmp_path), method="ppo", use_cpu=True, bf16=False, **settings)


# The reference


def kl_at_start(trainer):
    rollout(trainer)
    return trainer._metrics["train"]["kl/per_response"][-1]


def test_a_model_trained_in_memory_starts_at_its_reference(tmp_path, path):
    model = perturbed(AutoModelForCausalLM.from_pretrained(path))
    trainer = make(tmp_path, model)
    assert abs(kl_at_start(trainer)) < 1e-4
    assert trainer.ref_model is not trainer.model and not trainer.ref_model.training
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.ref_model.state_dict().items())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), trainer.ref_model.parameters(), strict=False))


def test_a_model_by_name_or_without_one_and_with_an_adapter(tmp_path, path):
    assert abs(kl_at_start(make(tmp_path, path))) < 1e-4
    model = tiny_model()
    assert not model.config._name_or_path
    assert abs(kl_at_start(make(tmp_path, model))) < 1e-4
    changed = perturbed(AutoModelForCausalLM.from_pretrained(path))
    trainer = make(tmp_path, changed, trainer_arguments={"peft_config": LoraConfig(target_modules=["q_proj"])})
    assert trainer.ref_model is None and abs(kl_at_start(trainer)) < 1e-4


@pytest.mark.parametrize("kind", ["path", "model"])
def test_reference_of_the_users(kind, tmp_path, path):
    model = perturbed(AutoModelForCausalLM.from_pretrained(path))
    reference = path if kind == "path" else AutoModelForCausalLM.from_pretrained(path)
    trainer = make(tmp_path, model, trainer_arguments={"ref_model": reference})
    plain = AutoModelForCausalLM.from_pretrained(path)
    for name, parameter in plain.named_parameters():
        assert torch.equal(trainer.ref_model.get_parameter(name), parameter)
    assert kl_at_start(trainer) > 0.1


def test_a_copy_is_no_view_of_a_model_that_trainers_have_widened(tmp_path, path):
    """TRL's fused head and ours are closures over the model that they were put into."""
    first = make(tmp_path, path)
    model = first.model
    copied = frozen_copy(model)
    assert not hasattr(copied, "value_heads")
    ids = torch.tensor([[4, 9, 3, 2, 1]])
    with torch.no_grad():
        before = copied(input_ids=ids).logits
        perturbed(model, 1.0)
        assert torch.equal(copied(input_ids=ids).logits, before)
    # A second trainer on the model that a first one has trained
    assert abs(kl_at_start(make(tmp_path, model))) < 1e-4


def test_references_that_do_not_fit(tmp_path, path):
    model = AutoModelForCausalLM.from_pretrained(path)
    lora = LoraConfig(target_modules=["q_proj"])
    for arguments, settings, error, message in (
        ({"ref_model": 3}, {}, TypeError, "`ref_model` must be a model.*got `int`"),
        ({"ref_model": path, "peft_config": lora}, {}, ValueError, "adapter off. Leave `ref_model` out"),
        ({"ref_model": path}, {"kl_coef": 0.0}, ValueError, "`kl_coef=0` computes no divergence"),
        ({"ref_model": tiny_model(vocab_size=20)}, {}, ValueError, "vocabulary of 20 tokens and the policy one of 36"),
    ):
        with pytest.raises(error, match=message):
            make(tmp_path, model, trainer_arguments=arguments, **settings)


def test_divergences_that_cannot_be_are_named():
    noise = torch.linspace(-1, 1, 64)
    assert divergence_warning(noise, True) is None and divergence_warning(noise + 3, False) is None
    assert divergence_warning(torch.full((64,), -1e-6), True) is None
    assert "never negative" in divergence_warning(noise - 1.8, False)
    assert "before the first step" in divergence_warning(noise + 3, True)
    assert divergence_warning(torch.tensor([-5.0]), True) is None
