"""The numbers of short seeded runs of every method, bit by bit, to compare two versions of the package.

`python -m tests.helpers.same_numbers record FILE.json` trains each case on the CPU with one thread and writes what it
logged, trained and saved; `python -m tests.helpers.same_numbers compare A.json B.json` prints the entries that differ
and exits with 1 if there are any. `--only REGEX` takes the cases (`record`) or entries (`compare`) that it matches.

Floats stand as hexadecimal, tensors as a hash of dtype, shape and bytes; what measures time is left out. Only public
names of `trl_ext` are imported, so that the file can be copied into an older version. Record both files on one
machine: another processor rounds otherwise.
"""
# ruff: noqa: T201

import os


if __name__ == "__main__":  # Read when torch and the hub's client are imported
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MKL_CBWR="COMPATIBLE", DS_ACCELERATOR="cpu")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")

import argparse
import contextlib
import hashlib
import io
import json
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

import trl_ext
from trl_ext import optim


Entries = dict[str, Any]

UNSTABLE_KEY = re.compile(r"runtime|per_second|step_time|(^|[/_])time($|[/_])|timestamp|elapsed|seconds|version$")
# Their names are recorded and not their contents: pickled classes, prose, and what no method of ours writes
OPAQUE = re.compile(r"training_args\.bin|README\.md|tokenizer.*\.json|special_tokens_map\.json|chat_template\.jinja")
LONG = 64  # Numbers of a list from which on it is hashed as a whole

WORDS = (
    "red green blue grey small large round flat stone river hill cloud runs falls turns rests near under above "
    "beside slowly quickly never always one two three many"
).split()
SPECIAL = ["<pad>", "<eos>", "<unk>"]
SHAPE = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 96,
}  # fmt: skip
# `gelu` and `tanh` of some kernels depend on a tensor's alignment; these families have neither
FAMILIES = {"llama": {}, "qwen3": {"tie_word_embeddings": True}}


# What is recorded


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return digest(str(tensor.dtype).encode(), str(tuple(tensor.shape)).encode(), data)


def flatten(value: Any, name: str = "") -> Entries:
    """Every leaf of nested dicts and lists under its path, exactly."""
    if isinstance(value, dict):
        stable = {str(key): item for key, item in value.items() if not UNSTABLE_KEY.search(str(key))}
        found = {f"{name}/keys".removeprefix("/"): sorted(stable)}
        return found | {path: leaf for key, item in stable.items() for path, leaf in flatten_under(name, key, item)}
    if isinstance(value, list | tuple | set | frozenset):
        if all(isinstance(item, str) for item in value):
            return {name: sorted(value)}  # Some stem from sets, whose order is by chance
        items = sorted(value) if isinstance(value, set | frozenset) else value
        if len(items) >= LONG and all(isinstance(item, int | float) for item in items):
            return {name: digest(repr(items).encode())}
        return {path: leaf for index, item in enumerate(items) for path, leaf in flatten_under(name, index, item)}
    if isinstance(value, torch.Tensor):
        return {name: tensor_digest(value)}
    if isinstance(value, np.ndarray | np.generic):
        return {name: digest(str(value.dtype).encode(), str(value.shape).encode(), value.tobytes())}
    if isinstance(value, float):
        return {name: value.hex()}
    if value is None or isinstance(value, bool | int | str):
        return {name: value}
    if isinstance(value, torch.dtype):
        return {name: str(value)}
    raise TypeError(f"`{name}` is a `{type(value).__name__}`, which has no exact form here. Add one to `flatten`.")


def flatten_under(name: str, key: str | int, value: Any) -> Iterable[tuple[str, Any]]:
    return flatten(value, f"{name}/{key}".removeprefix("/")).items()


def file_contents(path: Path) -> Entries:
    """The numbers that a file holds, or nothing for one that is known by its name only."""
    if OPAQUE.fullmatch(path.name):
        return {}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return flatten({"metadata": file.metadata(), "tensors": tensors})
    if path.suffix in (".pt", ".pth", ".bin"):
        return flatten(torch.load(path, map_location="cpu", weights_only=False), "content")
    if path.suffix == ".json":
        return flatten(json.loads(path.read_text()), "content")
    return {}


def folder_contents(folder: Path) -> Entries:
    """Names of all files below a folder, and the contents of those that hold numbers."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "trl_ext_checkpoint.json")
    found: Entries = {"files": [path.relative_to(folder).as_posix() for path in files]}
    for path in files:
        found |= under(path.relative_to(folder).as_posix(), file_contents(path))
    return found


def under(name: str, entries: Entries) -> Entries:
    return {f"{name}/{key}": value for key, value in entries.items()}


def trained(trainer: Any) -> Entries:
    weights, buffers = dict(trainer.model.named_parameters()), dict(trainer.model.named_buffers())
    return flatten({"log": trainer.state.log_history, "weights": weights, "buffers": buffers})


# What is trained on


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[2]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, eos_token=eos, unk_token=unk)


def save_model(family: str) -> str:
    """Saves a seeded model and its tokenizer, once in a run, and returns the folder."""
    if not Path(family).exists():
        set_seed(11)
        config = AutoConfig.for_model(
            family, vocab_size=len(SPECIAL + WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=None,
            **SHAPE, **FAMILIES[family],
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(family)
        tokenizer().save_pretrained(family)
    return family


def words(start: int, length: int) -> str:
    return " ".join(WORDS[(start + 5 * index + index * index) % len(WORDS)] for index in range(length))


def pairs(count: int) -> Dataset:
    rows = [
        {
            "prompt": words(row, 2 + row % 3),
            "chosen": f" {words(3 * row + 1, 3 + row % 4)} <eos>",
            "rejected": f" {words(7 * row + 2, 4 + row % 3)} <eos>",
        }
        for row in range(count)
    ]
    return Dataset.from_list(rows)


def prompts(count: int) -> Dataset:
    return Dataset.from_list([{"prompt": words(3 * row, 2 + row % 3)} for row in range(count)])


def texts(count: int) -> Dataset:
    return Dataset.from_list([{"text": f"{words(row, 5 + row % 4)} <eos>"} for row in range(count)])


def classified(count: int) -> Dataset:
    rows = tokenizer()([words(row, 3 + row % 4) for row in range(count)])["input_ids"]
    return Dataset.from_list(
        [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": row % 3} for row, ids in enumerate(rows)]
    )


TRAINING = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4, "learning_rate": 5e-3, "weight_decay": 0.05, "max_grad_norm": 1.0, "seed": 5,
    "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
NO_CHECKPOINTING = {"gradient_checkpointing": False}


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **settings)


def run(build: Callable[[str], Any], folder: str, resume: bool = True) -> Entries:
    """A run, its checkpoints and, with `resume`, the run that goes on from the first of them."""
    set_seed(3)
    trainer = build(f"{folder}/whole")
    trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    found = under("whole", trained(trainer))
    trainer.save_model(f"{folder}/whole/final")
    found |= under("saved", folder_contents(Path(folder, "whole")))
    if resume:
        set_seed(4)
        resumed = build(f"{folder}/resumed")
        resumed.train(resume_from_checkpoint=f"{folder}/whole/checkpoint-{trainer.args.save_steps}")
        found |= under("resumed", trained(resumed))
    return found


# SparsePO


def sparse_po(
    folder: str,
    family: str = "llama",
    peft: bool = False,
    resume: bool = True,
    evaluate: bool = False,
    **settings: Any,
) -> Entries:
    trainers = []

    def build(output: str) -> trl_ext.SparsePOTrainer:
        args = trl_ext.SparsePOConfig(output, **{**TRAINING, **NO_CHECKPOINTING, "beta": 0.3, **settings})
        trainers.append(
            trl_ext.SparsePOTrainer(
                save_model(family),
                args=args,
                train_dataset=pairs(16),
                eval_dataset=pairs(6) if evaluate else None,
                processing_class=tokenizer(),
                peft_config=lora() if peft else None,
            )
        )
        return trainers[-1]

    found = run(build, folder, resume)
    with torch.no_grad():
        batch = next(iter(trainers[0].get_train_dataloader()))
        return found | under("token_masks", flatten(trainers[0].token_masks(batch)))


def sparse_po_tensors(folder: str) -> Entries:
    """The objective and the paired head as plain functions, with their gradients."""
    set_seed(1)
    terms = [torch.randn(6, 9), torch.rand(6, 9), torch.rand(6, 9), torch.rand(6, 9)]
    found: Entries = {}
    for name, options in {
        "common": {"l1_reward": 0.1, "common_mask": True},
        "independent": {"l1_reward": 0.1, "l1_divergence": 0.2, "divergence_coef": 0.7},
        "detached": {"detach_chosen_divergence": True},
    }.items():
        leaves = [term.clone().requires_grad_() for term in terms]
        loss = trl_ext.sparse_po_loss(*leaves, 0.4, **options)
        loss.backward()
        found |= under(f"loss/{name}", flatten([loss, *(leaf.grad for leaf in leaves)], "tensors"))
    states = [torch.randn(13, 8), torch.randn(21, 8), torch.randn(13, 10), torch.randn(21, 10)]
    labels = torch.randint(0, 21, (13,))
    for name, options in {
        "plain": {},
        "tiles": {"token_tile": 5, "vocab_tile": 8},
        "softcap": {"policy_softcap": 4.0, "ref_softcap": 5.0, "policy_logit_scale": 0.5},
        "bias": {"policy_bias": torch.randn(21), "ref_bias": torch.randn(21)},
        "float64": {},
    }.items():
        dtype = torch.float64 if name == "float64" else torch.float32
        hidden, weight, ref_hidden, ref_weight = (state.to(dtype) for state in states)
        hidden.requires_grad_()
        weight = weight.clone().requires_grad_()
        outputs = trl_ext.paired_log_probs(hidden, weight, ref_hidden, ref_weight, labels, **options)
        sum((index + 1) * output.sum() for index, output in enumerate(outputs)).backward()
        found |= under(f"head/{name}", flatten([*outputs, hidden.grad, weight.grad], "tensors"))
        hidden.grad = None
    return found


# Constrained PPO


def early_words(completion_ids: Iterable[list[int]], **columns: Any) -> list[float]:
    """Share of the first half of the vocabulary."""
    half = len(SPECIAL + WORDS) // 2
    return [sum(index < half for index in ids) / max(1, len(ids)) for ids in completion_ids]


def length(completion_ids: Iterable[list[int]], **columns: Any) -> list[float]:
    return [len(ids) / 6 for ids in completion_ids]


def gold(completion_ids: Iterable[list[int]], **columns: Any) -> list[float]:
    """Highest where early words are half of a response."""
    return [1 - (share - 0.5) ** 2 for share in early_words(completion_ids)]


def ppo(
    folder: str, method: str, peft: bool = False, evaluate: bool = False, resume: bool = True, **settings: Any
) -> Entries:
    settings = {
        "per_device_train_batch_size": 6, "max_completion_length": 6, "critic_learning_rate": 2e-2, "method": method,
        "constraints": [] if method == "ppo" else GIVEN, "calibration_samples": 0, "dashboard": False, **settings,
    }  # fmt: skip
    trainers = []

    def build(output: str) -> trl_ext.ConstrainedPPOTrainer:
        arguments = {"eval_dataset": prompts(8), "gold_reward": gold} if evaluate else {}
        trainers.append(
            trl_ext.ConstrainedPPOTrainer(
                save_model("llama"),
                reward_funcs=[early_words, length],
                train_dataset=prompts(48),
                args=trl_ext.ConstrainedPPOConfig(output, **{**TRAINING, **NO_CHECKPOINTING, **settings}),
                processing_class=tokenizer(),
                peft_config=lora() if peft else None,
                **arguments,
            )
        )
        return trainers[-1]

    found = run(build, folder, resume)
    for name, trainer in zip(("whole", "resumed"), trainers, strict=False):
        if trainer.multipliers is not None:
            multipliers = trainer.multipliers
            state = [multipliers.state_dict(), multipliers.values(), multipliers.weights()]
            found |= under(f"multipliers/{name}", flatten(state, "state"))
    return found


GIVEN = [{"reward": "early_words", "threshold": 0.6}, {"reward": "length", "threshold": 0.7}]
CALIBRATED = {
    "calibration_samples": 12,
    "constraints": [{"reward": "early_words", "quantile": 0.8}, {"reward": "length", "relative_gain": 0.02}],
}
EQUILIBRIUM_CRITIC = {"critic_head": "equilibrium", "critic_hidden_features": [8, 6]}
ASYMMETRIC_CRITIC = {
    **EQUILIBRIUM_CRITIC, "critic_feedback": "asymmetric", "critic_feedback_angle": 50.0,
    "critic_homeostasis_coef": 0.1,
}  # fmt: skip
SEARCH = {"max_gold_evaluations": 5, "steps_per_threshold": 2, "rollout_window": 1, "initial_range": 0.3}


# Optimizers


class SmallNetwork(nn.Module):
    """Weights that are scale-invariant, by rows and as a whole, and weights that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.hidden = nn.Linear(30, 10, bias=False)
        self.layer_norm = nn.LayerNorm(10)
        self.out = nn.Linear(10, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.conv(inputs))).flatten(1)
        return self.out(torch.relu(self.layer_norm(self.hidden(features))))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
    dtype, losses = next(model.parameters()).dtype, []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(8, 3, 7, generator=generator).to(dtype)
        targets = torch.randn(8, 4, generator=generator).to(dtype)
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def optimizer_steps(
    folder: str,
    cls: type[torch.optim.Optimizer],
    dtype: torch.dtype = torch.float32,
    named: bool = False,
    **options: Any,
) -> Entries:
    """Steps, a new optimizer that takes the state over, and steps again."""
    set_seed(2)
    model = SmallNetwork().to(dtype)

    def build() -> Any:
        parameters = list(model.named_parameters()) if named else list(model.parameters())
        return cls(parameters, **{"lr": 2e-2, "weight_decay": 0.1, **options})

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # That compiled kernels are missing is a warning
        first = build()
        losses = steps(model, first, range(5))
        reports = [first.report()]
        second = build()
        second.load_state_dict(first.state_dict())
        losses += steps(model, second, range(5, 10))
        reports.append(second.report())
    return flatten(
        {"losses": losses, "reports": reports, "model": model.state_dict(), "optimizer": second.state_dict()}
    )


adamp, sgdp = partial(optimizer_steps, cls=optim.AdamP), partial(optimizer_steps, cls=optim.SGDP, momentum=0.9)
REFERENCE = {"foreach": False, "fused": False}
NAMED_VIEWS = {"named": True, "projection": {"conv": "channel", "hidden": "layer"}}
BOTH_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "default": {}, "reference": REFERENCE, "foreach": {"foreach": True}, "fused": {"fused": True},
    "named": {"named": True}, "views": NAMED_VIEWS, "views-reference": {**NAMED_VIEWS, **REFERENCE},
    "nesterov": {"nesterov": True}, "nesterov-reference": {"nesterov": True, **REFERENCE},
    "maximize": {"maximize": True, "lr": 1e-4}, "capturable": {"capturable": True, "lr": torch.tensor(2e-2)},
    "layer": {"projection": "layer"}, "channel": {"projection": "channel"}, "no-projection": {"projection": "none"},
    "large-delta": {"delta": 1.0, "wd_ratio": 0.3},
    "float64": {"dtype": torch.float64}, "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16-state32": {"dtype": torch.bfloat16, "state_dtype": torch.float32},
    "bfloat16-stochastic": {"dtype": torch.bfloat16, "state_dtype": torch.float32, "stochastic_rounding": True},
    "float32-state64": {"state_dtype": torch.float64}, "float32-state16": {"state_dtype": torch.bfloat16},
}  # fmt: skip


def sft(folder: str, resume: bool = True, family: str = "qwen3", **settings: Any) -> Entries:
    optim.register()

    def build(output: str) -> SFTTrainer:
        args = SFTConfig(output, **{**TRAINING, **NO_CHECKPOINTING, **settings})
        return SFTTrainer(
            save_model(family), args=args, train_dataset=texts(16), processing_class=tokenizer(),
            callbacks=[optim.OptimizerReportCallback()],
        )  # fmt: skip

    return run(build, folder, resume)


def factory(folder: str) -> Entries:
    """An optimizer made from a model, with names known from its architecture."""
    set_seed(6)
    model = AutoModelForCausalLM.from_pretrained(save_model("qwen3"))
    optimizer = optim.optimizer_factory("adamp", lr=1e-2, weight_decay=0.1, projection="auto")(model)
    ids = torch.randint(3, len(SPECIAL + WORDS), (3, 12))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    content = {"losses": losses, "weights": model.state_dict(), "optimizer": optimizer.state_dict()}
    views = optim.scale_invariant_weights(model.config)
    return flatten(content | {"report": optimizer.report(), "views": views})


# Equilibrium propagation

HEADS: dict[str, dict[str, Any]] = {
    "default": {},
    "four-points": {"num_points": 4, "radius": 0.1},
    "unrotated": {"num_points": 4, "rotated": False, "radius": 0.05},
    **{name: {"estimator": name} for name in ("symmetric", "one_sided", "tangent", "exact")},
    "dsilu": {"activation": "dsilu"},
    "sigmoid": {"activation": "sigmoid"},
    "cap": {"spectral_cap": 0.4},
    "asymmetric": {"feedback": "asymmetric", "feedback_angle": 60.0},
    "asymmetric-cap": {"feedback": "asymmetric", "feedback_angle": 60.0, "spectral_cap": 0.4},
    "asymep": {"feedback": "asymmetric", "feedback_angle": 60.0, "correction": "asymep"},
    "asymep-exact": {"feedback": "asymmetric", "feedback_angle": 60.0, "estimator": "exact", "correction": "asymep"},
    "few-steps": {"max_steps": 3},
}


def head(
    folder: str, hidden: int | list[int] = (10, 8, 6), dtype: torch.dtype = torch.float32, **options: Any
) -> Entries:
    """Two steps of a head on its own."""
    set_seed(8)
    module = trl_ext.EPHead(12, hidden if isinstance(hidden, int) else list(hidden), 2, **options)
    if dtype == torch.float64:
        module = module.to(dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    found: Entries = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A head of few steps does not converge, and says so
        for number in range(2):
            inputs = torch.randn(7, 12).to(dtype).requires_grad_()
            outputs = module(inputs)
            loss = outputs.square().mean() + module.homeostasis_loss()
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
            content = {"outputs": outputs, "loss": loss, "inputs": inputs.grad, "gradients": gradients}
            found |= under(f"step-{number}", flatten(content | {"metrics": module.metrics()}))
            optimizer.step()
            optimizer.zero_grad()
    return found | flatten({"weights": module.state_dict()})


def ep_model(num_labels: int, **settings: Any) -> trl_ext.EPModelForSequenceClassification:
    return trl_ext.EPModelForSequenceClassification.from_pretrained(
        save_model("llama"), num_labels=num_labels, hidden_features=[8, 6], **settings
    )


def ep_reward(
    folder: str, head: dict[str, Any], peft: bool = False, resume: bool = True, align: bool = False, **settings: Any
) -> Entries:
    def build(output: str) -> trl_ext.EPRewardTrainer:
        trainer = trl_ext.EPRewardTrainer(
            ep_model(1, **head), args=trl_ext.EPRewardConfig(output, **{**TRAINING, **NO_CHECKPOINTING, **settings}),
            train_dataset=pairs(16), eval_dataset=pairs(6), processing_class=tokenizer(),
            peft_config=lora(task_type="SEQ_CLS", modules_to_save=["score"]) if peft else None,
        )  # fmt: skip
        if align:
            trainer.add_callback(trl_ext.EPAlignmentCallback(trainer, num_examples=4))
        return trainer

    return run(build, folder, resume)


def ep_classifier(folder: str, head: dict[str, Any], resume: bool = True, **settings: Any) -> Entries:
    def build(output: str) -> trl_ext.EPTrainer:
        return trl_ext.EPTrainer(
            ep_model(3, **head), trl_ext.EPTrainingArguments(output, **{**TRAINING, **settings}),
            train_dataset=classified(16), eval_dataset=classified(6), processing_class=tokenizer(),
        )  # fmt: skip

    return run(build, folder, resume)


ASYMMETRIC = {"feedback": "asymmetric", "feedback_angle": 60.0}

CASES: dict[str, Callable[[str], Entries]] = {
    "sparse_po/tensors": sparse_po_tensors,
    "sparse_po/common": partial(sparse_po, evaluate=True),
    "sparse_po/independent": partial(
        sparse_po, independent_masks=True, mask_l1_reward=0.01, mask_l1_divergence=0.02, mask_learning_rate=2e-2
    ),
    "sparse_po/reward-only-paper-init": partial(sparse_po, mask_divergence=False, mask_init="paper", resume=False),
    "sparse_po/activation": partial(sparse_po, mask_type="activation", family="qwen3"),
    "sparse_po/ones": partial(sparse_po, mask_type="ones", resume=False),
    "sparse_po/tdpo2": partial(
        sparse_po, mask_type="ones", divergence_coef=0.5, detach_chosen_divergence=True, resume=False
    ),
    "sparse_po/lora": partial(sparse_po, peft=True, independent_masks=True),
    "sparse_po/lora-activation": partial(sparse_po, peft=True, mask_type="activation", resume=False),
    "sparse_po/adamp": partial(sparse_po, optim="adamp", optim_args="delta=0.2"),
    "sparse_po/accumulation": partial(
        sparse_po, gradient_accumulation_steps=2, gradient_checkpointing=True, family="qwen3", resume=False
    ),
    "constrained_ppo/ppo": partial(ppo, method="ppo", kl_target=0.01, num_iterations=2),
    "constrained_ppo/mu": partial(ppo, method="mu", dashboard=True, num_generations=1),
    "constrained_ppo/xi": partial(ppo, method="xi", num_iterations=2, save_steps=3),
    "constrained_ppo/xi-calibrated": partial(ppo, method="xi", **CALIBRATED),
    "constrained_ppo/xi-separate": partial(ppo, method="xi", critic="separate"),
    "constrained_ppo/xi-equilibrium": partial(ppo, method="xi", **EQUILIBRIUM_CRITIC),
    "constrained_ppo/mu-equilibrium-separate": partial(ppo, method="mu", critic="separate", **ASYMMETRIC_CRITIC),
    "constrained_ppo/sat": partial(ppo, method="sat"),
    "constrained_ppo/sat-sample": partial(ppo, method="sat", sat_target="sample", critic="separate", resume=False),
    "constrained_ppo/all": partial(
        ppo, method="all", multiplier_update="minibatch", num_iterations=2, multiplier_derivative=0.5
    ),
    "constrained_ppo/ppo-lag": partial(
        ppo, method="ppo-lag", multiplier_ema=0.5, early_stop_kl=1e-4, num_iterations=2, resume=False,
        kl_estimator="k3", missing_eos_penalty=0.1, constraints=[{"kind": "<=", **constraint} for constraint in GIVEN],
    ),
    "constrained_ppo/groups": partial(
        ppo, method="xi", num_generations=2, vf_coef=[0.3, 0.6], multiplier_window=2, resume=False,
        multiplier_squash_gradient=True, multiplier_max=0.5,
    ),
    "constrained_ppo/lora": partial(ppo, peft=True, method="mu", critic_detach=True),
    "constrained_ppo/adamp": partial(ppo, method="xi", optim="adamp", gradient_accumulation_steps=2, resume=False),
    "constrained_ppo/search": partial(ppo, method="xi", evaluate=True, search=SEARCH, max_steps=9),
    "constrained_ppo/gold": partial(
        ppo, method="mu", evaluate=True, eval_strategy="steps", eval_steps=2, gold_patience=3,
        resume=False,
    ),
    **{f"adamp/{name}": partial(adamp, **options) for name, options in BOTH_OPTIMIZERS.items()},
    **{f"sgdp/{name}": partial(sgdp, **options) for name, options in BOTH_OPTIMIZERS.items()},
    "sgdp/no-momentum": partial(sgdp, momentum=0.0),
    "sgdp/project-momentum": partial(sgdp, dampening=0.1, project_momentum=True),
    "optim/factory": factory,
    "optim/sft-adamp": partial(sft, optim="adamp", optim_args="projection=auto"),
    "optim/sft-sgdp": partial(sft, optim="sgdp", optim_args="momentum=0.9,nesterov=true", family="llama"),
    **{f"head/{name}": partial(head, **options) for name, options in HEADS.items()},
    "head/one-layer": partial(head, hidden=9),
    "head/float64": partial(head, dtype=torch.float64),
    "head/bfloat16": partial(head, dtype=torch.bfloat16),
    "ep_reward/symmetric": partial(ep_reward, head={}, align=True),
    "ep_reward/asymmetric": partial(ep_reward, head=ASYMMETRIC, homeostasis_coef=0.5, head_learning_rate=2e-2),
    "ep_reward/asymep": partial(
        ep_reward, head={**ASYMMETRIC, "correction": "asymep", "pooling": "mean"}, align=True, resume=False
    ),
    **{
        f"ep_reward/{name}": partial(ep_reward, head={"estimator": name}, resume=False)
        for name in ("one_sided", "tangent", "exact")
    },
    "ep_reward/lora": partial(ep_reward, head={**ASYMMETRIC, "homeostasis_coef": 0.2}, peft=True),
    "ep_classifier/symmetric": partial(ep_classifier, head={"pooling": "mean"}),
    "ep_classifier/asymmetric": partial(
        ep_classifier, head={**ASYMMETRIC, "spectral_cap": 0.5}, homeostasis_coef=0.5, head_learning_rate=2e-2
    ),
    "ep_classifier/estimator": partial(ep_classifier, head={"estimator": "symmetric"}, resume=False),
}  # fmt: skip


def record(only: str = "") -> Entries:
    """Runs the cases whose name `only` matches, in a temporary folder, and returns what they left."""
    found: Entries = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Paths stand in what is saved: relative ones are the same in each run
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            for name, case in CASES.items():
                if not re.search(only, name):
                    continue
                start = time.perf_counter()
                try:
                    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
                        entries = under(name, case(folder=f"runs/{name}"))
                except Exception as error:
                    error.add_note(f"in the case {name!r}")
                    raise
                found |= entries
                print(f"{name}: {len(entries)} entries, {time.perf_counter() - start:.1f} s", file=sys.stderr)
    finally:
        torch.set_num_threads(threads)
    return found


def compare(first: Entries, second: Entries) -> list[str]:
    """One line for each entry that differs or stands on one side only."""
    lines = [f"only in the first: {name}" for name in first if name not in second]
    lines += [f"only in the second: {name}" for name in second if name not in first]
    for name in first:
        if name in second and first[name] != second[name]:
            lines.append(f"differs: {name}: {first[name]} | {second[name]}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.same_numbers", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="run the cases and write their numbers")
    recorder.add_argument("file", type=Path)
    comparer = commands.add_parser("compare", help="print which entries of two files differ")
    comparer.add_argument("first", type=Path)
    comparer.add_argument("second", type=Path)
    for command in (recorder, comparer):
        command.add_argument("--only", default="", metavar="REGEX")
    args = parser.parse_args(arguments)
    if args.command == "record":
        disable_progress_bars()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        found = record(args.only)
        if not found:
            parser.error(f"`--only {args.only}` matches no case; they are {', '.join(CASES)}")
        args.file.write_text(json.dumps(found, indent=0))
        print(f"{len(found)} entries in {args.file}")
        return 0
    sides = [
        {name: value for name, value in json.loads(path.read_text()).items() if re.search(args.only, name)}
        for path in (args.first, args.second)
    ]
    if not any(sides):
        parser.error(f"there is nothing to compare: `--only {args.only}` matches no entry")
    lines = compare(*sides)
    print(*lines, f"{len(lines)} of {len(sides[0])} entries differ, or are on one side only", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
