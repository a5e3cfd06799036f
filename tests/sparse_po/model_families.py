"""SparsePO on a tiny model of every decoder-only family of transformers, each cell of the table measured.

python -m tests.sparse_po.model_families --write docs/model_families.md

What is measured is kept in model_families.json beside this file, so that a run can stop and go on; `--families`
measures some again. A number is the largest difference from the naive computation: each sequence alone, without
padding, through `model(...).logits`, a log-softmax in float64, and the loss written as its formula.
"""

import argparse
import copy
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.utils import logging

from tests.helpers.sparse_po import make_trainer
from tests.helpers.tiny import WORDS, tiny_tokenizer
from tests.sparse_po.families import family_names, save_tiny_family, tiny_config
from tests.sparse_po.families_page import (
    COLUMNS,
    RESULTS,
    STEPS,
    TOLERANCE,
    Cell,
    read_results,
    render,
    write_results,
)
from trl_ext.sparse_po.activations import ActivationObserver
from trl_ext.sparse_po.reference_pass import decoder_layers
from trl_ext.sparse_po.sparse_po_trainer import SparsePOTrainer


# Settings of the trainer whose difference from the naive computation a column shows
SETTINGS: dict[str, dict[str, Any]] = {
    "learned": {"mask_type": "learned", "independent_masks": True},
    "activation": {"mask_type": "activation"},
    "given": {"mask_type": "given"},
    "share_prompt": {"mask_type": "learned", "share_prompt": True},
    "lora": {"mask_type": "learned"},
}
STEP_OF_CHECKPOINT, PAIRS = 2, 2
WITHOUT_EMBEDDINGS = ("mamba", "mamba2", "falcon_mamba")
_PREPARED: dict[bool, Any] = {}


def weighted_pairs(num_pairs: int = 8) -> Dataset:
    """Pairs longer than the tiny models' windows, with a weight for each token of the completions."""
    generator = torch.Generator().manual_seed(0)

    def words(length: int) -> list[str]:
        return [WORDS[place] for place in torch.randint(3, len(WORDS), (length,), generator=generator).tolist()]

    rows = []
    for place in range(num_pairs):
        row: dict[str, Any] = {"prompt": " ".join(words(5 + place % 4))}
        for side, length in (("chosen", 3 + place % 5), ("rejected", 7 - place % 4)):
            row[side] = " " + " ".join([*words(length), "<eos>"])
            row[f"{side}_token_weights"] = [0.5 * (token % 4) for token in range(length + 1)]
        rows.append(row)
    return Dataset.from_list(rows)


@contextmanager
def prepared_once() -> Iterator[None]:
    """Every family has the same data and tokenizer, and preparing them costs more than a tiny model's training."""
    prepare = SparsePOTrainer._prepare_dataset

    def prepare_once(trainer: Any, data: Any, processing_class: Any, args: Any, name: str) -> Any:
        given = args.mask_type == "given"
        if given not in _PREPARED:
            _PREPARED[given] = prepare(trainer, data, processing_class, args, name)
        return _PREPARED[given]

    SparsePOTrainer._prepare_dataset = prepare_once
    try:
        yield
    finally:
        SparsePOTrainer._prepare_dataset = prepare


def sequences_alone(model: Any, batch: dict[str, torch.Tensor], layers: bool = False) -> tuple[torch.Tensor, Any]:
    """Log-softmax in float64 of each sequence by itself, `(2B, T-1, V)`, zero after it; its layers' states."""
    width = batch["input_ids"].size(1)
    log_probs, states = [], []
    for ids, attended in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[: int(attended.sum())].unsqueeze(0)
        output = model(input_ids=ids, use_cache=False, **({"output_hidden_states": True} if layers else {}))
        row = output.logits[0, :-1].double().log_softmax(-1)
        log_probs.append(F.pad(row, (0, 0, 0, width - 1 - row.size(0))))
        if layers:
            # Of the state-space models the embeddings are not among them, and the last layer is there twice
            kept = output.hidden_states[1:]
            if model.config.model_type in WITHOUT_EMBEDDINGS:
                kept = (*output.hidden_states[:-2], output.hidden_states[-1])
            hidden = torch.stack([state[0, :-1].double() for state in kept])
            states.append(F.pad(hidden, (0, 0, 0, width - 1 - hidden.size(1))))
    return torch.stack(log_probs), torch.stack(states, dim=1) if layers else None


def naive_learned_weights(mask: Any, states: torch.Tensor) -> torch.Tensor:
    """ReLU(sum_l c_l ReLU(w_l . LN(h_l) + b_l)) of states `(L, 2B, T-1, H)`."""
    normed = F.layer_norm(states, states.shape[-1:], mask.norm_weight.double(), mask.norm_bias.double(), eps=1e-5)
    scores = torch.einsum("lnth,lh->lnt", normed, mask.layer_weight.double())
    scores = F.relu(scores + mask.layer_bias.double()[:, None, None])
    return F.relu(torch.einsum("lnt,l->nt", scores, mask.mixer_weight.double()))


def activation_weights_alone(trainer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Activation masks of each sequence by itself, whose last token is another: no weight may depend on it."""
    found = torch.zeros(batch["input_ids"].size(0), batch["input_ids"].size(1) - 1, dtype=torch.float64)
    for row in range(found.size(0)):
        length = int(batch["attention_mask"][row].sum())
        alone = {name: values[row, :length].repeat(2, 1) for name, values in batch.items()}
        alone["input_ids"][:, -1] = 3
        found[row, : length - 1] = trainer.token_masks(alone)["reward"][0].double()
    return found


def given_weights(data: Dataset, completion: torch.Tensor) -> torch.Tensor:
    """The weights of the data's first pairs at the tokens of their completions, `(2B, T-1)` float64."""
    found = torch.zeros(completion.shape, dtype=torch.float64)
    columns = ((side, place) for side in ("chosen", "rejected") for place in range(PAIRS))
    for row, (side, place) in enumerate(columns):
        found[row, completion[row]] = torch.tensor(data[place][f"{side}_token_weights"], dtype=torch.float64)
    return found


class NaiveModels:
    """Policy and reference as plain models, without trainer, beside one."""

    def __init__(self, reference: Any, trainer: Any, lora: LoraConfig | None = None):
        self.reference, self.policy = reference, copy.deepcopy(reference)
        if lora is not None:
            self.policy = get_peft_model(self.policy, lora).eval()
        self.policy.load_state_dict(trainer.model.state_dict())
        self.masks = copy.deepcopy(trainer.masks)

    def weights(self, trainer: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of rewards and divergences, `(2B, T-1)` float64."""
        if trainer.args.mask_type == "given":
            weights = given_weights(trainer.train_dataset, batch["completion_mask"][:, 1:].bool())
            return weights, weights
        if trainer.args.mask_type == "activation":
            weights = activation_weights_alone(trainer, batch)
            return weights, weights
        with torch.no_grad():
            states = sequences_alone(self.reference, batch, layers=True)[1]
        weights = {name: naive_learned_weights(mask, states) for name, mask in self.masks.learned.items()}
        return weights.get("reward", weights.get("common")), weights.get("divergence", weights.get("common"))

    def loss(self, trainer: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, with gradient, and what it is made of, token by token."""
        completion = batch["completion_mask"][:, 1:].bool()
        labels = batch["input_ids"][:, 1:].unsqueeze(-1)
        log_probs, _ = sequences_alone(self.policy, batch)
        with torch.no_grad():
            ref_log_probs, _ = sequences_alone(self.reference, batch)
        policy, reference = (x.gather(-1, labels).squeeze(-1) * completion for x in (log_probs, ref_log_probs))
        divergences = (ref_log_probs.exp() * (ref_log_probs - log_probs)).sum(-1) * completion
        reward_mask, divergence_mask = (x * completion for x in self.weights(trainer, batch))
        sums = (reward_mask * (policy - reference) + divergence_mask * divergences).sum(1)
        chosen, rejected = sums.chunk(2)
        loss = -torch.log(torch.sigmoid(trainer.args.beta * (chosen - rejected))).mean()
        if trainer.aux_loss_enabled:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            balance = self.policy(**inputs, output_router_logits=True).aux_loss
            loss = loss + trainer.router_aux_loss_coef * (0.0 if balance is None else balance)  # dense layers only
        tokens = {"policy_log_probs": policy, "reference_log_probs": reference, "divergences": divergences}
        return loss, tokens | {"reward_mask": reward_mask, "divergence_mask": divergence_mask}


def differences(trainer: Any, naive: NaiveModels) -> dict[str, float]:
    """Largest differences between a trainer's step and the naive computation."""
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(PAIRS)])
    trainer.model.train()
    trainer.model.zero_grad()
    seen: list[Any] = []
    hook = trainer.model.register_forward_hook(lambda _model, _inputs, output: seen.append(output))
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
    hook.remove()
    loss.backward()
    expected_loss, expected = naive.loss(trainer, batch)
    expected_loss.backward()
    found = {name: getattr(seen[-1], name).detach().double() - value.detach() for name, value in expected.items()}
    largest = {name: value.abs().max().item() for name, value in found.items()}
    ours = dict(trainer.model.named_parameters())
    masks = {f"token_masks.{name}": parameter for name, parameter in naive.masks.named_parameters()}
    theirs = {**dict(naive.policy.named_parameters()), **masks}
    gradients = [
        (_gradient(ours[_wrapped(name, ours)]), _gradient(parameter))
        for name, parameter in theirs.items()
        if parameter.requires_grad
    ]
    scale = max(expected.abs().max().item() for _, expected in gradients)
    return {
        "tokens": max(largest[name] for name in ("policy_log_probs", "reference_log_probs", "divergences")),
        "weights": max(largest["reward_mask"], largest["divergence_mask"]),
        "loss": abs(loss.item() - expected_loss.item()),
        "gradients": max((x - y).abs().max().item() for x, y in gradients) / scale,
    }


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _wrapped(name: str, names: Any) -> str:
    """A mask's name in a model that PEFT wraps."""
    return name if name in names else f"base_model.model.{name}"


class Family:
    """
    The cells of one row.

    Args:
        name (`str`): Row of the table.
        folder (`str`): Empty folder.
    """

    def __init__(self, name: str, folder: str):
        self.folder = Path(folder)
        self.path = save_tiny_family(name, str(self.folder / "model"))
        self.tokenizer, self.data = tiny_tokenizer(), weighted_pairs()
        self.plain = AutoModelForCausalLM.from_pretrained(self.path).eval()
        self.trained: dict[str, torch.Tensor] = {}

    def trainer(self, column: str, **settings: Any) -> Any:
        arguments = {"peft_config": self.lora()} if column == "lora" else {}
        with prepared_once():
            trainer = make_trainer(
                self.folder / "runs", self.path, self.tokenizer, data=self.data, trainer_arguments=arguments,
                per_device_train_batch_size=PAIRS, max_steps=STEPS, **SETTINGS[column], **settings,
            )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        return trainer

    @staticmethod
    def lora() -> LoraConfig:
        return LoraConfig(r=4, target_modules="all-linear")

    def measure(self) -> dict[str, Cell]:
        """Every cell. One trainer is trained, measured, saved and resumed; the others start where it ended."""
        cells = {}
        trained = None
        for column in (column for column in COLUMNS if column in SETTINGS):
            try:
                trainer = self.trainer(column, save_strategy="steps", save_steps=STEP_OF_CHECKPOINT)
            except Exception as error:
                cells[column] = _refusal(error)
                continue
            if trained is None and column != "lora":
                trained = column
                cells |= self._trained_cells(column, trainer)
            else:
                cells[column] = _attempt(self._compare, column, trainer)
        if trained is None:
            cells |= dict.fromkeys(("reload", "resume"), cells["learned"])
        return {column: cells[column] for column in COLUMNS}

    def reads(self) -> dict[str, list[str]]:
        """What an activation mask reads, by group."""
        ids = torch.arange(3, 11).view(2, -1)
        observer = ActivationObserver(self.plain, decoder_layers(self.plain), torch.ones(2, 3, dtype=torch.bool))
        with torch.no_grad(), observer:
            self.plain.base_model(input_ids=ids, use_cache=False)
        return {group: sorted(names) for group, names in observer.sources.items()}

    def _trained_cells(self, column: str, trainer: Any) -> dict[str, Cell]:
        failure = _attempt(lambda: trainer.train() and {})
        if failure:
            return dict.fromkeys((column, "reload", "resume"), failure)
        self.trained = copy.deepcopy(trainer.model.state_dict())
        masks = copy.deepcopy(trainer.masks.state_dict())
        return {
            column: _attempt(self._compare, column, trainer),
            "reload": _attempt(self._reload, trainer),
            "resume": _attempt(self._resume, column, masks, _losses(trainer)),
        }

    def _compare(self, column: str, trainer: Any) -> Cell:
        lora = self.lora() if column == "lora" else None
        if lora is not None:
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif self.trained:
            trainer.model.load_state_dict(self.trained)
        found = differences(trainer, NaiveModels(self.plain, trainer, lora))
        holds = all(found[name] <= TOLERANCE[name] for name in found)  # NaN does not hold
        return {"state": "holds" if holds else "differs", "differences": found}

    def _reload(self, trainer: Any) -> Cell:
        folder = str(self.folder / "saved")
        trainer.save_model(folder)
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        other = sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])})
        ids = torch.arange(3, 15).unsqueeze(0)
        with torch.no_grad():
            logits = [m.eval()(input_ids=ids, use_cache=False).logits for m in (model, trainer.model)]
        difference = (logits[0] - logits[1]).abs().max().item()
        holds = difference == 0 and not other and type(model) is type(trainer.model)
        return {"state": "holds" if holds else "differs", "differences": {"tokens": difference}, "names": other[:3]}

    def _resume(self, column: str, masks: dict[str, torch.Tensor], losses: list[float]) -> Cell:
        resumed = self.trainer(column, overwrite=True)
        resumed.train(resume_from_checkpoint=str(self.folder / "runs" / f"checkpoint-{STEP_OF_CHECKPOINT}"))
        pairs = [*_both(resumed.model.state_dict(), self.trained), *_both(resumed.masks.state_dict(), masks)]
        difference = max((a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel())
        holds = all(torch.equal(a, b) for a, b in pairs) and _losses(resumed) == losses
        return {"state": "holds" if holds else "differs", "differences": {"weights": difference}}


def _both(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    assert found.keys() == expected.keys()
    return [(found[name], expected[name]) for name in expected]


def _losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _attempt(measure: Callable[..., Cell], *arguments: Any) -> Cell:
    try:
        return measure(*arguments)
    except Exception as error:
        return _refusal(error)


def _refusal(error: Exception) -> Cell:
    """A refusal where an error is meant for users: raised as such by this package or by PEFT. Else a failure."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    meant = isinstance(error, ValueError | NotImplementedError) and re.search(r"/(trl_ext|trl|peft)/", raised_in)
    return {"state": "refused" if meant else "fails", "error": _message(error)}


def _message(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {re.sub(r'/[^ ]*/', '', text)}"


def traits(name: str) -> list[str]:
    """What a row's tiny model has, read off its configuration."""
    config = tiny_config(name).get_text_config()
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    found = [kind.replace("_attention", "").replace("_", " ") for kind in kinds if len(kinds) > 1]
    if not kinds and getattr(config, "sliding_window", None):
        found.append("sliding")
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any((getattr(config, key, None) or 0) > 1 for key in experts):
        found.append("experts")
    return [*found, "tied" if config.tie_word_embeddings else "untied"]


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        family = Family(name, folder)
        cells = family.measure()
        reads = family.reads() if cells["activation"]["state"] != "refused" else {}
    return {"traits": traits(name), "cells": cells, "activations": reads}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measures SparsePO on tiny models of the families of transformers.")
    parser.add_argument("--families", nargs="+", default=[], metavar="FAMILY", help="measure these, again if need be")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further family after so long")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where what is measured is kept")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="where to write the page")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    logging.set_verbosity_error()
    logger = getLogger(__name__)
    disable_progress_bars()
    logging.disable_progress_bar()
    results, start = read_results(options.results), time.monotonic()
    wanted = options.families or [name for name in family_names() if name not in results["families"]]
    for name in wanted:
        if time.monotonic() - start > options.seconds:
            break
        try:
            row = measure(name)
        except Exception as error:
            logger.warning(f"{name} is not measured, since no tiny model of it could be built. {_message(error)}")
            continue
        results["families"][name] = row
        write_results(results, options.results)
        states = " ".join(f"{column}:{cell['state']}" for column, cell in row["cells"].items())
        logger.warning(f"{name} ({time.monotonic() - start:.0f} s) {states}")
    if options.write is not None:
        options.write.write_text(render(results), encoding="utf-8")


if __name__ == "__main__":
    main()
