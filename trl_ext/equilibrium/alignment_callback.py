"""Follows how well a head's estimated gradient agrees with the exact one, through training."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .head_access import active_head, equilibrium_model
from .pooling import pooled_states


class EPAlignmentCallback(TrainerCallback):
    """
    At the start, at every log and at the end of training, measures on a few evaluation rows the cosine between the
    head's estimated and exact error vectors, layer by layer, and the asymmetry of its weights. Writes `alignment.json`
    and `alignment.png` into the output folder.

    Args:
        trainer ([`~trl.RewardTrainer`] or [`~transformers.Trainer`]):
            Trainer of an [`EPModelForSequenceClassification`], with evaluation data.
        num_examples (`int`, *optional*, defaults to `32`):
            Examples, the first ones of the evaluation data.

    Attributes:
        history (`list[dict]`):
            One entry for each measurement, with `step`, `cosines` (`list[float]`, one for each layer), `symmetry` and
            `weight_angle` (degrees).

    Raises:
        ValueError: If `num_examples` is below 1, there is no evaluation data, or weights are sharded (ZeRO-3, FSDP).
    """

    def __init__(self, trainer: Any, num_examples: int = 32):
        if num_examples < 1:
            raise ValueError(f"`num_examples` must be at least 1, got {num_examples}.")
        if trainer.eval_dataset is None:
            raise ValueError("`EPAlignmentCallback` measures on evaluation data. Give the trainer an `eval_dataset`.")
        if trainer.is_fsdp_enabled or getattr(trainer.args.deepspeed_plugin, "zero_stage", 0) == 3:
            raise ValueError(
                "`EPAlignmentCallback` reads the head's weights, which ZeRO-3 and FSDP shard. Use ZeRO-2."
            )
        self.trainer = trainer
        self.num_examples = num_examples
        self.history: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state.global_step)
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "alignment.json").write_text(json.dumps(self.history, indent=1))
        draw_alignment({"": self.history}, folder / "alignment.png")

    def _measure(self, step: int) -> None:
        if self.history and self.history[-1]["step"] == step:
            return
        model, head = equilibrium_model(self.trainer.model), active_head(self.trainer.model)
        examples = [
            self.trainer.eval_dataset[i] for i in range(min(self.num_examples, len(self.trainer.eval_dataset)))
        ]
        batch = {name: tensor.to(model.device) for name, tensor in self.trainer.data_collator(examples).items()}
        training = model.training
        with torch.no_grad():
            outputs = model.eval().model(batch["input_ids"], attention_mask=batch["attention_mask"])
        pad_token_id = model.config.get_text_config().pad_token_id
        pooled = pooled_states(outputs, model.pooling, batch["input_ids"], batch["attention_mask"], pad_token_id)
        asymmetry = head.asymmetry()
        self.history.append({
            "step": step,
            "cosines": head.alignment(pooled.float()),
            "symmetry": asymmetry["ep/symmetry"],
            "weight_angle": asymmetry["ep/weight_angle"],
        })  # fmt: skip
        model.train(training)


def draw_alignment(histories: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """
    Draws cosines and the weight angle through training, of one or several runs.

    Args:
        histories (`dict[str, list[dict]]`):
            [`EPAlignmentCallback.history`] by the name of the run.
        path (`str` or `Path`):
            PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for index, (name, history) in enumerate(histories.items()):
        steps, color = [entry["step"] for entry in history], f"C{index}"
        for layer, cosines in enumerate(zip(*(entry["cosines"] for entry in history), strict=True), start=1):
            style = ("-", "--", ":", "-.")[(layer - 1) % 4]
            left.plot(steps, cosines, style, color=color, label=f"{name} layer {layer}".strip())
        right.plot(steps, [entry["weight_angle"] for entry in history], color=color, label=name or None)
    left.set(ylim=(-0.3, 1.05), xlabel="step", ylabel="cosine")
    left.set_title("Estimated against exact error vectors", loc="left", fontsize=11)
    right.set(ylim=(0, 100), xlabel="step", ylabel="degrees")
    right.set_title("Angle between forward and feedback weights", loc="left", fontsize=11)
    left.legend(frameon=False, fontsize=8)
    if any(histories):
        right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
