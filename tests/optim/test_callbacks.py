"""What a trainer is told of its optimizer: the check before the first step, and the report."""

import json

import pytest
import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests import glossary
from tests.helpers.optim import TRAINING, text_data
from tests.helpers.tiny import save_tiny_model, tiny_tokenizer
from trl_ext.optim import AdamP, OptimizerCheckCallback, OptimizerReportCallback
from trl_ext.optim.callbacks import report_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_another_optimizer_than_asked_for_is_refused_before_the_first_step(model, registered, tmp_path):
    args = SFTConfig(str(tmp_path), optim="adamp", **TRAINING)
    trainer = SFTTrainer(
        model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer(),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"SGD instead of AdamP \(AcceleratedOptimizer -> SGD\).*Remove"):
        trainer.train()
    assert trainer.state.global_step == 0
    args = SFTConfig(str(tmp_path), **TRAINING)
    trainer = SFTTrainer(model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer())
    trainer.add_callback(OptimizerCheckCallback(AdamP))
    with pytest.raises(RuntimeError, match="AdamW instead of AdamP"):
        trainer.train()


def test_check_leaves_other_trainers_alone(model, registered, tmp_path):
    args = SFTConfig(str(tmp_path), **TRAINING)
    trainer = SFTTrainer(model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer())
    trainer.train()
    assert trainer.state.global_step == 2


def test_report_is_logged_before_reporters_see_the_log(registered, tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    model = save_tiny_model(tmp_path / "model", "qwen3")
    args = SFTConfig(str(tmp_path), optim="adamp", optim_args="projection=auto", **TRAINING)
    trainer = SFTTrainer(
        model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer(), callbacks=[Reporter()]
    )
    OptimizerReportCallback.attach(trainer)
    trainer.train()
    logs = [entry for entry in seen if "loss" in entry]
    assert len(logs) == 2
    for entry, kept in zip(logs, [e for e in trainer.state.log_history if "loss" in e], strict=True):
        assert entry["optimizer/projected/weights"] == 4.0  # queries and keys of two layers
        assert entry["optimizer/projected/share"] == pytest.approx(4 / 16)
        assert 0 < entry["optimizer/projected/effective_step_size"] < 1
        assert entry["optimizer/other/weight_norm"] > 0
        assert kept["optimizer/projected/share"] == entry["optimizer/projected/share"]
    assert glossary.unknown(trainer.state.log_history) == set()
    report = json.loads((tmp_path / "optimizer_report.json").read_text())
    assert report["model.layers.1.self_attn.k_proj.weight"]["channel"] == 1.0


def test_report_of_another_optimizer_is_empty(model, tmp_path):
    args = SFTConfig(str(tmp_path), **TRAINING)
    trainer = SFTTrainer(model, args=args, train_dataset=text_data(), processing_class=tiny_tokenizer())
    OptimizerReportCallback.attach(trainer)
    trainer.train()
    assert not any("optimizer/projected/share" in entry for entry in trainer.state.log_history)
    assert not (tmp_path / "optimizer_report.json").exists()


def test_report_metrics_by_hand():
    report = {
        "often": {"steps": 4, "channel": 0.25, "layer": 0.5, "weight_norm": 2.0, "effective_step_size": 0.1},
        "rarely": {"steps": 4, "channel": 0.0, "layer": 0.25, "weight_norm": 4.0, "effective_step_size": 0.3},
        "zero": {"steps": 4, "channel": 0.0, "layer": 0.0, "weight_norm": 0.0, "effective_step_size": float("nan")},
    }
    assert report_metrics(report) == {
        "optimizer/projected/share": pytest.approx(1 / 3),
        "optimizer/projected/weights": 1.0,
        "optimizer/projected/weight_norm": 2.0,
        "optimizer/projected/effective_step_size": 0.1,
        "optimizer/other/weight_norm": 4.0,
        "optimizer/other/effective_step_size": 0.3,
    }
    assert report_metrics({}) == {}
