"""What a SparsePO run shows of itself: its section of the model card, and what the masks weight on a few pairs."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainerCallback

from ..core.files import warn_of_failure
from ..core.model_card import settings_table
from ..core.reporters import is_last_log, report_image, report_table
from ..core.safe_text import as_string
from .masks import TOKEN_MASKS_FILE
from .sparse_po_config import SparsePOConfig


if TYPE_CHECKING:
    from ..core.token_colors import WeightedText

CITATION = """@inproceedings{christopoulou-etal-2025-sparsepo,
    title     = {{SparsePO}: Controlling Preference Alignment of {LLM}s via Sparse Token Masks},
    author    = {Christopoulou, Fenia and Cardenas, Ronald and Lampouras, Gerasimos and Bou Ammar, Haitham and
                 Wang, Jun},
    booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2025},
    year      = {2025},
    pages     = {25477--25503},
    url       = {https://aclanthology.org/2025.findings-emnlp.1389/}
}"""
# Prefixes of the logged metrics that the card shows
_METRICS = ("rewards/accuracies", "kl/chosen", "kl/rejected", "mask/")


def method_section(config: SparsePOConfig, log_history: list[dict[str, Any]], model_id: str) -> str:
    """Markdown of the method's section, with the last entry of the log that has mask metrics."""
    names = ["beta", "mask_type", "divergence_coef", "detach_chosen_divergence"]
    if config.mask_type != "ones":
        names += ["mask_reward", "mask_divergence"]
    if config.mask_type == "learned":
        names += ["independent_masks", "mask_init", "mask_learning_rate", "mask_weight_decay", "mask_l1_reward",
                  "mask_l1_divergence"]  # fmt: skip
    settings: dict[str, object] = {name: getattr(config, name) for name in names}
    if settings.get("mask_learning_rate", 0) is None:
        settings["mask_learning_rate"] = f"{config.learning_rate:.4g} (the policy's)"
    parts = ["### Token masks", settings_table(settings)]
    final = next((entry for entry in reversed(log_history) if "mask/reward/mean" in entry), None)
    if final is not None:
        shown = {name: value for name, value in final.items() if name.startswith(_METRICS)}
        parts += [
            f"At step {final.get('step', '?')} of training:",
            settings_table(shown).replace("setting", "metric", 1),
        ]
    parts.append(_loading(config, model_id))
    return "\n\n".join(parts)


def _loading(config: SparsePOConfig, model_id: str) -> str:
    masks = (
        f" The masks are kept beside it in `{TOKEN_MASKS_FILE}`, and serve only to resume or to study the training."
        if config.mask_type == "learned"
        else ""
    )
    return (
        f"The masks act in training only, so the model loads without `trl_ext`.{masks}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({as_string(model_id)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({as_string(model_id)})\n```"
    )


class TokenMaskCallback(TrainerCallback):
    """
    After every evaluation and at the end of training, shows a few pairs with each response token coloured by its
    weight: a table on the terminal, and `token_masks/step_<n>.html` and `.png` in the output folder. On
    a terminal without colours, and in a log file, the table has each weight as a number.

    Args:
        trainer ([`SparsePOTrainer`]):
            Trainer that the callback is added to.
        num_pairs (`int`, *optional*, defaults to `3`):
            Number of pairs, the first ones of the evaluation data (of the training data where there is none).
        output_dir (`str` or `Path`, *optional*):
            Folder for the files. Defaults to `token_masks` in the trainer's output folder.
        console ([`~rich.console.Console`], *optional*):
            Console to print on.

    Raises:
        ValueError: If `num_pairs` is below 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        num_pairs: int = 3,
        output_dir: str | Path | None = None,
        console: Console | None = None,
    ):
        if num_pairs < 1:
            raise ValueError(f"`num_pairs` must be at least 1, got {num_pairs}.")
        self.trainer = trainer
        self.num_pairs = num_pairs
        self.output_dir = Path(output_dir) if output_dir else Path(trainer.args.output_dir) / "token_masks"
        self.console = console or Console()
        self._last_step = -1

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if is_last_log(logs):
            self._show(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state.global_step)

    def _show(self, step: int) -> None:
        # Not at the head of the module, which a trainer loads for its card: with the colours comes matplotlib
        from ..core.token_colors import save_png, to_html

        if step == self._last_step:
            return
        self._last_step = step
        # All processes compute, since sharded masks are gathered
        pairs = self.weighted_pairs()
        if not self.trainer.is_world_process_zero():
            return
        heading = f"SparsePO token masks at step {step}"
        texts = [text for pair in pairs for text in pair]
        with warn_of_failure("The token masks could not be shown"):
            self.output_dir.mkdir(parents=True, exist_ok=True)
            (self.output_dir / f"step_{step}.html").write_text(to_html(texts, heading), encoding="utf-8")
            save_png(texts, heading, self.output_dir / f"step_{step}.png")
            self._print(texts, heading)
            self._report(texts, step)

    def _report(self, texts: "list[WeightedText]", step: int) -> None:
        from ..core.token_colors import to_numbers

        report_image(self.trainer, "token_masks", self.output_dir / f"step_{step}.png", step)
        rows = [(text.title, to_numbers(text).plain) for text in texts]
        report_table(self.trainer, "token_weights", ("response", "tokens with their weights"), rows, step)

    def _print(self, texts: "list[WeightedText]", heading: str) -> None:
        from ..core.token_colors import highest_weight, shortened, to_numbers, to_rich

        highest, in_colour = highest_weight(texts), self.console.color_system is not None
        how = f"darkest = {highest:.3f}" if in_colour else "the weight behind each token"
        table = Table(title=f"{heading} ({how})", show_lines=True, expand=True)
        table.add_column("", no_wrap=True)
        table.add_column("response", ratio=1)
        for text in texts:
            table.add_row(text.title, to_rich(shortened(text), highest) if in_colour else to_numbers(shortened(text)))
        self.console.print(table)

    @torch.no_grad()
    def weighted_pairs(self) -> list[list["WeightedText"]]:
        """
        The pairs with their weights.

        Returns:
            `list[list[WeightedText]]`: for each pair, chosen and rejected, once for each mask where the masks differ.
        """
        trainer = self.trainer
        dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        examples = [{name: row[name] for name in columns} for row in islice(iter(dataset), self.num_pairs)]
        inputs = trainer.data_collator(examples)
        weights = {name: mask.cpu() for name, mask in trainer.token_masks(inputs).items()}
        common = torch.equal(weights["reward"], weights["divergence"])
        return [
            [
                self._weighted_text(inputs, weights[name], row + offset, f"{side} {row + 1}{suffix}")
                for offset, side in ((0, "chosen"), (len(examples), "rejected"))
                for name, suffix in (
                    (("reward", ""),) if common else (("reward", ", reward mask"), ("divergence", ", divergence mask"))
                )
            ]
            for row in range(len(examples))
        ]

    def _weighted_text(self, inputs: dict[str, Any], mask: torch.Tensor, row: int, title: str) -> "WeightedText":
        from ..core.token_colors import WeightedText, token_pieces

        length = int(inputs["attention_mask"][row].sum())
        ids = inputs["input_ids"][row, :length].tolist()
        scored = inputs["completion_mask"][row, 1:length].bool()
        weights = [float("nan"), *mask[row, : length - 1].masked_fill(~scored, torch.nan).tolist()]
        return WeightedText(title, token_pieces(self.trainer.processing_class, ids), weights)
