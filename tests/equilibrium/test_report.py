"""The course of the gradient's quality through training."""

import json

import pytest
import torch

from tests.helpers.equilibrium import ASYMMETRIC, reward_model, trainer_of
from tests.helpers.tiny import save_tiny_model
from trl_ext import EPAlignmentCallback, EPRewardTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def train(folder, output, **settings):
    trainer = trainer_of(EPRewardTrainer, folder, output, reward_model(folder, **settings), max_steps=2)
    callback = EPAlignmentCallback(trainer, num_examples=4)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def test_it_measures_at_the_start_and_at_every_log_and_leaves_training_alone(folder, tmp_path):
    plain = trainer_of(EPRewardTrainer, folder, tmp_path / "plain", reward_model(folder, **ASYMMETRIC), max_steps=2)
    plain.train()
    trainer, callback = train(folder, tmp_path / "seen", **ASYMMETRIC)
    assert [entry["step"] for entry in callback.history] == [0, 1, 2]
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name
    first = callback.history[0]
    assert first["weight_angle"] == pytest.approx(90, abs=1e-3) and len(first["cosines"]) == 2
    assert min(first["cosines"]) < 0.97
    assert json.loads((tmp_path / "seen" / "alignment.json").read_text()) == callback.history
    assert (tmp_path / "seen" / "alignment.png").stat().st_size > 5000


@pytest.mark.parametrize("settings", [{}, {**ASYMMETRIC, "correction": "asymep"}], ids=["symmetric", "asymep"])
def test_the_cosine_of_an_exact_estimator_is_one(settings, folder, tmp_path):
    _, callback = train(folder, tmp_path, **settings)
    for entry in callback.history:
        assert entry["cosines"] == pytest.approx([1.0, 1.0], abs=1e-4)


def test_wrong_input(folder, tmp_path):
    trainer = trainer_of(EPRewardTrainer, folder, tmp_path)
    with pytest.raises(ValueError, match="num_examples.*0"):
        EPAlignmentCallback(trainer, 0)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="eval_dataset"):
        EPAlignmentCallback(trainer)
    trainer.is_fsdp_enabled = True
    trainer.eval_dataset = trainer.train_dataset
    with pytest.raises(ValueError, match="ZeRO-3 and FSDP"):
        EPAlignmentCallback(trainer)
