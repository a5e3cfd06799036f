"""The companion rule, on the example of its own docstring."""

import copy
import inspect
import re
import textwrap

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from tests.helpers.tiny import WORDS, tiny_model, tiny_tokenizer
from trl_ext.core.companion import Companion, CompanionMixin, base_policy
from trl_ext.core.recorder import extend_forward


def example_source() -> str:
    block = re.search(r"```python\n(.*?)```", inspect.getdoc(CompanionMixin), re.DOTALL)[1]
    return textwrap.dedent(block)


@pytest.fixture(scope="module")
def example():
    namespace = {}
    exec(compile(example_source(), "the docstring's example", "exec"), namespace)
    return namespace["LengthSFTTrainer"]


def make_trainer(example, folder, steps=4, **kwargs):
    rows = [{"text": " ".join(WORDS[3 + (7 * row + place) % 30] for place in range(4 + row % 5))} for row in range(16)]
    args = SFTConfig(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3, report_to="none", seed=1,
        save_steps=2, logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(3)
    return example(
        kwargs.pop("model", None) or tiny_model(), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(), **kwargs,
    )  # fmt: skip


def test_example_is_short():
    assert len(example_source().strip().splitlines()) <= 36


def test_companion_trains_in_its_own_last_group_and_stands_beside_the_policy(example, tmp_path):
    trainer = make_trainer(example, tmp_path)
    trainer.companion.learning_rate = 0.05
    before = trainer.companion.module.weight.detach().clone()
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert [p for _, p in trainer.companion.own_parameters(trainer.model)] == groups[-1]["params"]
    assert groups[-1]["initial_lr"] == 0.05 and groups[0]["initial_lr"] == 1e-3
    assert not torch.equal(before, trainer.companion.module.weight)

    trainer.save_model(str(tmp_path / "final"))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    plain = tiny_model().state_dict()
    assert trainer.model.state_dict().keys() == plain.keys()
    trainer.model.load_state_dict(plain)
    trainer.accelerator.save_model(trainer.model, tmp_path / "by_accelerate")
    assert load_file(tmp_path / "by_accelerate" / "model.safetensors").keys() == plain.keys()
    kept = load_file(tmp_path / "final" / "length_head.safetensors")
    assert torch.equal(kept["weight"], trainer.companion.module.weight)


def test_resumed_run_equals_the_uninterrupted_one(example, tmp_path):
    whole = make_trainer(example, tmp_path / "whole")
    whole.train()
    again = make_trainer(example, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    first, second = dict(whole.model.named_parameters()), dict(again.model.named_parameters())
    assert first.keys() == second.keys() and any("length_head" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("fault", ["missing", "other shape"])
def test_checkpoint_of_another_run_is_refused_before_anything_changes(example, tmp_path, fault):
    make_trainer(example, tmp_path, steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    if fault == "missing":
        (checkpoint / "length_head.safetensors").unlink()
    else:
        Companion("length_head", nn.Linear(3, 1), "length_head.safetensors", "").save(checkpoint, write=True)
    trainer = make_trainer(example, tmp_path / "new")
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match="length heads"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


# peft 0.18 looks for the configuration of a model that has no folder
@pytest.mark.filterwarnings("ignore:Could not find a config file in")
def test_lora_leaves_the_companion_whole_and_trainable(example, tmp_path):
    trainer = make_trainer(example, tmp_path, steps=2, peft_config=LoraConfig(target_modules=["q_proj"]))
    before = trainer.companion.module.weight.detach().clone()
    trainer.train()
    assert trainer.companion.module is base_policy(trainer.model).length_head
    assert not torch.equal(before, trainer.companion.module.weight)
    trainer.save_model(str(tmp_path / "final"))
    assert not any("length_head" in name for name in load_file(tmp_path / "final" / "adapter_model.safetensors"))
    assert (tmp_path / "final" / "length_head.safetensors").is_file()


def test_calls_without_the_new_keyword_are_unchanged(example, tmp_path):
    model = tiny_model()
    ids = torch.tensor([[4, 5, 6]])
    plain = model(input_ids=ids).logits
    trainer = make_trainer(example, tmp_path, model=model)
    assert torch.equal(plain, trainer.model(input_ids=ids).logits)


def test_extension_sees_the_forward_that_was():
    model = nn.Linear(2, 2)
    extend_forward(model, lambda forward, x, double=False: forward(x) * (2 if double else 1))
    x = torch.ones(1, 2)
    assert torch.equal(model(x, double=True), 2 * model(x))


def test_optimizer_block_of_deepspeed_is_refused(example, tmp_path):
    trainer = make_trainer(example, tmp_path)
    trainer.is_deepspeed_enabled = True
    plugin = type("Plugin", (), {"deepspeed_config": {"optimizer": {}}})()
    trainer.accelerator.state.deepspeed_plugins = {"default": plugin}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin, raising=False)
        with pytest.raises(ValueError, match="`optimizer` block, which would train the length heads"):
            trainer.attach_companion(trainer.companion, trainer.forward)
