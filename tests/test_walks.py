"""How many of the package's files a reader goes through to follow one call (docs/architecture.md tells the walks)."""

import pytest
import torch
from datasets import Dataset

from tests.helpers.tiny import WORDS, save_tiny_model, tiny_model, tiny_pairs, tiny_tokenizer
from tests.helpers.walk import walk
from trl_ext import (
    ConstrainedGRPOConfig,
    ConstrainedGRPOTrainer,
    ConstrainedPPOConfig,
    ConstrainedPPOTrainer,
    EPHead,
    SparsePOConfig,
    SparsePOTrainer,
)
from trl_ext.equilibrium import remove_lm_head_guard
from trl_ext.optim import AdamP


COMMON = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def _no_head_was_built():
    """The guard that goes in with the first `EPHead` looks at every module that is registered."""
    remove_lm_head_guard()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_sparse_po_training_step(folder, tmp_path):
    args = SparsePOConfig(str(tmp_path), per_device_train_batch_size=2, max_steps=1, **COMMON)
    trainer = SparsePOTrainer(folder, args=args, train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer())
    found = walk_of_a_step(trainer)
    assert 0 < len(found.files) <= 6, found


def low_ids(completion_ids, **_):
    return [sum(token < 20 for token in ids) / len(ids) for ids in completion_ids]


def walk_of_a_step(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.create_optimizer_and_scheduler(1)
    trainer.current_gradient_accumulation_steps = 1
    return walk(lambda: trainer.training_step(trainer.model, batch, None))


def test_constrained_ppo_rollout_and_loss(folder, tmp_path):
    args = ConstrainedPPOConfig(
        str(tmp_path), method="xi", constraints=[{"reward": "low_ids", "threshold": 0.5}], max_completion_length=6,
        per_device_train_batch_size=4, max_steps=1, dashboard=False, **COMMON,
    )  # fmt: skip
    trainer = ConstrainedPPOTrainer(
        folder, low_ids, args, Dataset.from_dict({"prompt": WORDS[3:11]}), processing_class=tiny_tokenizer()
    )
    found = walk_of_a_step(trainer)
    assert 0 < len(found.files) <= 6, found


def test_constrained_grpo_rollout_and_loss(folder, tmp_path):
    args = ConstrainedGRPOConfig(
        str(tmp_path), constraints=[{"reward": "low_ids", "threshold": 0.5}], max_completion_length=6,
        per_device_train_batch_size=4, num_generations=2, max_steps=1, dashboard=False, **COMMON,
    )  # fmt: skip
    trainer = ConstrainedGRPOTrainer(
        folder, low_ids, args, Dataset.from_dict({"prompt": WORDS[3:11]}), processing_class=tiny_tokenizer()
    )
    found = walk_of_a_step(trainer)
    assert 0 < len(found.files) <= 9, found


def test_adamp_step():
    model = tiny_model()
    optimizer = AdamP(model.parameters(), lr=1e-3)
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    optimizer.step()  # builds the kernel where no test before has
    found = walk(optimizer.step)
    assert 0 < len(found.files) <= 8, found


def test_equilibrium_head():
    head = EPHead(8, [16, 16], 2)
    x = torch.randn(4, 8)
    found = walk(lambda: head(x))
    assert 0 < len(found.files) <= 4, found
