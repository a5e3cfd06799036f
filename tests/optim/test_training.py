"""A whole run with AdamP is the run with the authors' package, by whatever means the model is trained."""

from contextlib import nullcontext

import adamp
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests.helpers.accelerate_state import accelerate_state_kept
from tests.helpers.compiling import compiled_training, slow_to_compile
from tests.helpers.optim import TRAINING, text_data
from tests.helpers.tiny import save_tiny_model, tiny_tokenizer
from trl_ext.core.four_bits import keep_four_bits_trainable
from trl_ext.optim import AdamP
from trl_ext.optim.callbacks import bottom_optimizer


OPTIONS = {"delta": 0.5, "wd_ratio": 0.1}
ADAPTER = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", hidden_size=64)


@pytest.mark.parametrize(
    "means", ["evaluated", "lora", "qlora", "checkpointing", pytest.param("compiled", marks=slow_to_compile)]
)
def test_equals_the_run_with_the_authors_package(means, registered, model, tmp_path):
    settings, arguments = {"gradient_checkpointing": means == "checkpointing"}, {}
    if means in ("lora", "qlora"):
        arguments = dict(ADAPTER)
    if means == "qlora":
        pytest.importorskip("bitsandbytes")
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)

    def trained(folder, **more):
        given = {name: more.pop(name) for name in ("optimizer_cls_and_kwargs",) if name in more}
        training = {**TRAINING, "max_steps": 4, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 2}
        trainer = SFTTrainer(
            model, args=SFTConfig(str(tmp_path / folder), **training, **settings, **more),
            train_dataset=text_data(), eval_dataset=text_data(), processing_class=tiny_tokenizer(),
            **arguments, **given,
        )  # fmt: skip
        keep_four_bits_trainable(trainer.model)  # which it evaluates in between
        trainer.train()
        return trainer

    theirs = adamp.AdamP, {"lr": 1e-2, "weight_decay": 0.1, **OPTIONS}
    expected = trained("theirs", optimizer_cls_and_kwargs=theirs)
    with compiled_training() if means == "compiled" else nullcontext({}) as compiling:
        found = trained("ours", optim="adamp", optim_args="delta=0.5,wd_ratio=0.1", **compiling)
    optimizer = bottom_optimizer(found.optimizer)
    assert type(optimizer) is AdamP and type(bottom_optimizer(expected.optimizer)) is adamp.AdamP
    assert sum(row["layer"] + row["channel"] > 0 for row in optimizer.report().values()) > 0
    for key in ("loss", "eval_loss"):
        here, there = ([e[key] for e in trainer.state.log_history if key in e] for trainer in (found, expected))
        assert len(there) == (4 if key == "loss" else 2) and here == pytest.approx(there, abs=1e-5), key
    for (name, one), other in zip(found.model.named_parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_a_run_under_compile_leaves_other_trainers_their_state():
    accelerator = Accelerator(cpu=True)
    before = dict(AcceleratorState._shared_state)
    with pytest.raises(AssertionError, match="nothing was compiled"), compiled_training():
        assert not AcceleratorState._shared_state
    assert AcceleratorState._shared_state == before and accelerator.process_index == 0


def test_arguments_without_a_trainer_leave_other_trainers_their_state(tmp_path):
    accelerator = Accelerator(cpu=True)
    before = dict(AcceleratorState._shared_state)
    with accelerate_state_kept():
        assert TrainingArguments(tmp_path, use_cpu=True).device.type == "cpu"
        assert not AcceleratorState._shared_state
    assert AcceleratorState._shared_state == before and accelerator.process_index == 0
