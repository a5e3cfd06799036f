"""What the trainers take, they take as their parents: by position, without `args`, with `model_init`."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import DataCollatorWithPadding

from tests.helpers.equilibrium import ASYMMETRIC, COMMON, reward_model
from tests.helpers.tiny import save_tiny_model, tiny_pairs, tiny_tokenizer
from trl_ext import EPRewardConfig, EPRewardTrainer, EPTrainer, EPTrainingArguments
from trl_ext.equilibrium.modeling import EPModelForSequenceClassification


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def texts():
    return Dataset.from_list([{"input_ids": [3, 4, 5 + label], "labels": label} for label in (0, 1) * 4])


def test_classifier(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = EPTrainingArguments(str(tmp_path / "out"), homeostasis_coef=5.0, **{**COMMON, "max_steps": 1})

    def model_init():
        torch.manual_seed(0)
        return EPModelForSequenceClassification.from_pretrained(
            folder, num_labels=2, hidden_features=[8, 8], **ASYMMETRIC
        )

    collator = DataCollatorWithPadding(tiny_tokenizer())
    built = EPTrainer(None, args, collator, texts(), None, tiny_tokenizer(), model_init)
    assert built.data_collator is collator and built.model.config.homeostasis_coef == 5.0
    built.train()  # builds the model again
    assert built.model.config.homeostasis_coef == 5.0
    assert built.state.log_history[0]["ep/homeostasis_loss"] > 0
    plain = EPTrainer(model_init())
    assert isinstance(plain.args, EPTrainingArguments) and plain.args.output_dir == "tmp_trainer"
    with pytest.raises(RuntimeError, match="`model` or `model_init`"):
        EPTrainer(args=args)
    with pytest.raises(ValueError, match="homeostasis_coef=5.0.*feedback='symmetric'"):
        EPTrainer(None, args, model_init=lambda: reward_model(folder))


def test_reward_model(folder, tmp_path):
    args = EPRewardConfig(str(tmp_path), gradient_checkpointing=False, **{**COMMON, "max_steps": 1})
    trainer = EPRewardTrainer(reward_model(folder), args, None, tiny_pairs(8), tiny_pairs(4), tiny_tokenizer())
    assert len(trainer.eval_dataset) == 4
    adapters = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="task_type=CAUSAL_LM.*`task_type='SEQ_CLS'`"):
        EPRewardTrainer(reward_model(folder), args, None, tiny_pairs(8), peft_config=adapters)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
