"""The smallest model that a trainer trains, for tests of what lies around the training."""

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from trl_ext.core.checkpointing import WholeCheckpointsMixin
from trl_ext.core.run_arguments import RunArguments


DATA = [{"x": torch.tensor([float(index), 1.0]), "y": torch.tensor(0.1 * index)} for index in range(12)]


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 1)

    def forward(self, x, y):
        return {"loss": (self.line(x).squeeze(-1) - y + 0.01 * torch.randn(len(y))).square().mean()}


class LineTrainer(WholeCheckpointsMixin, Trainer):
    pass


def make(folder, run=None, callbacks=(), **settings):
    torch.manual_seed(3)
    args = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="steps",
        **{"save_steps": 1, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.01, **settings},
    )  # fmt: skip
    trainer = LineTrainer(Line(), args, train_dataset=DATA, eval_dataset=DATA, callbacks=list(callbacks))
    trainer.run_arguments = run or RunArguments()
    return trainer
