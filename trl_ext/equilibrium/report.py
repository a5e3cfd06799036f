"""What is shown of an equilibrium head: its part of the model card, and its gradient against the exact one."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .._upstream import gathered_state_dict
from ..core.figures import COLORS, MARKERS, new_axes, save_figure
from ..core.files import warn_of_failure
from ..core.model_card import settings_table, write_method_card
from ..core.reporters import is_last_log, report_image, report_table
from ..core.safe_text import as_string
from .configuration import EPConfig
from .head import EPHead
from .modeling import active_head, equilibrium_model, pooled_states
from .settings import SETTINGS


CITATION = """@inproceedings{laborieux2024improving,
    title     = {Improving equilibrium propagation without weight symmetry through {J}acobian homeostasis},
    author    = {Laborieux, Axel and Zenke, Friedemann},
    booktitle = {International Conference on Learning Representations},
    year      = {2024},
    url       = {https://openreview.net/forum?id=kUveo5k1GF}
}"""
_ESTIMATOR_FIELDS = {"holomorphic": ("num_points", "rotated", "radius"), "symmetric": ("radius",),
                     "one_sided": ("radius",)}  # fmt: skip
_METRICS = ("ep/", "accuracy")
_QUICK_START = re.compile(r"(## Quick start\n\n)```python\n.*?```\n", re.DOTALL)


def usage(model_id: str, is_reward: bool) -> str:
    """Python that loads a model or an adapter, of a Hub id or folder, and prints a text's reward or class."""
    what, raw = ("rewarder", ', function_to_apply="none"') if is_reward else ("classifier", "")
    shown = '[0]["score"]' if is_reward else "[0]"
    return (
        "```python\nfrom transformers import AutoTokenizer, pipeline\n"
        "from trl_ext import EPModelForSequenceClassification\n\n"
        f"model = EPModelForSequenceClassification.from_pretrained({as_string(model_id)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({as_string(model_id)})\n"
        f'{what} = pipeline("text-classification", model=model, tokenizer=tokenizer{raw})\n'
        f'print({what}("The capital of France is Paris."){shown})\n```'
    )


def _loading_section(is_adapter: bool) -> str:
    """What loads the model or the adapter, and what happens to a user without this package."""
    if is_adapter:
        return (
            "This is an adapter: the low-rank weights and the head, which relaxes to a fixed point. Load it with the "
            "code of this card: `EPModelForSequenceClassification.from_pretrained` reads the head's settings from the "
            "`config.json` beside the adapter and the base model's name from `adapter_config.json`.\n\n"
            "**Give trainers and pipelines that model, not the adapter's name on the Hub.** Under its name "
            "transformers, with `trl_ext` or without, loads the base model with a linear head of random weights, and "
            "only warns of it. The name of a local folder is enough after "
            "`trl_ext.equilibrium.register_auto_classes()`, which that code's import has called."
        )
    return (
        "The head relaxes to a fixed point, so the model loads with `trl_ext` only. Without it transformers stops "
        f'with "model type `{EPConfig.model_type}` but Transformers does not recognize this architecture": install '
        "`trl_ext`, not a newer transformers.\n\n"
        "transformers' auto classes and pipelines, and reward models given by name, know it after "
        "`trl_ext.equilibrium.register_auto_classes()`, which that code's import has called."
    )


def method_section(config: EPConfig, log_history: list[dict[str, Any]], is_adapter: bool = False) -> str:
    """
    Markdown of the method's section: estimator, points, radius, asymmetry, homeostasis, of the log's last entry that
    has them the head's metrics, and how the model, or the adapter, is loaded.
    """
    unused = {name for names in _ESTIMATOR_FIELDS.values() for name in names}
    unused -= set(_ESTIMATOR_FIELDS.get(config.estimator, ()))
    if config.feedback == "symmetric":
        unused |= {"feedback_angle", "correction"}
    settings: dict[str, object] = {name: getattr(config, name) for name in SETTINGS if name not in unused}
    if config.pooling is not None:
        settings["pooling"] = config.pooling
    if config.feedback == "asymmetric":
        settings["homeostasis_coef"] = config.homeostasis_coef
    parts = ["### Equilibrium-propagation head", settings_table(settings)]
    final = next((entry for entry in reversed(log_history) if "ep/free_residual" in entry), None)
    if final is not None:
        shown: dict[str, object] = {name: value for name, value in final.items() if name.startswith(_METRICS)}
        table = settings_table(shown).replace("setting", "metric", 1)
        parts += [f"At step {final.get('step', '?')} of training:", table]
    return "\n\n".join([*parts, _loading_section(is_adapter)])


def write_card(
    folder: str | Path,
    model_id: str,
    base_model: str,
    section: str,
    is_reward: bool,
    token: str | None = None,
    known: dict[str, Any] | None = None,
) -> None:
    """
    Completes the `README.md` that a trainer left in a folder with [`method_section`] and code that loads the model,
    in place of that under "Quick start". Where the model came from, `base_model`, is not named if it is a folder;
    `token`, the run's `hub_token`, never is. `known` is [`known_of`] the trainer.
    """
    path, code = Path(folder) / "README.md", usage(model_id, is_reward)
    content, replaced = _QUICK_START.subn(lambda found: f"{found[1]}{code}\n", path.read_text(encoding="utf-8"))
    path.write_text(content, encoding="utf-8")
    named = base_model if base_model and not Path(base_model).is_dir() else None
    section = section if replaced else f"{section}\n\n{code}"
    write_method_card(folder, model_id=model_id, base_model=named, method_section=section, token=token, known=known)


def gathered_asymmetry(head: EPHead) -> dict[str, float]:
    """[`EPHead.asymmetry`] of a head with asymmetric feedback, maybe sharded. All processes must call it."""
    with torch.random.fork_rng(devices=[]):
        whole = EPHead(head.in_features, head.hidden_features, head.out_features, feedback="asymmetric")
    whole.load_state_dict(gathered_state_dict(head), strict=False)  # without the cap's buffers
    return whole.asymmetry()


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

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._measure(state.global_step)
        if is_last_log(logs) and state.is_world_process_zero:
            self._write(args)
            self._report(Path(args.output_dir) / "alignment.png", state.global_step)

    on_train_begin = on_log

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state.global_step)
        if state.is_world_process_zero:
            self._write(args)

    def _report(self, picture: Path, step: int) -> None:
        report_image(self.trainer, "alignment", picture, step)
        layers = range(1, 1 + len(self.history[-1]["cosines"]))
        columns = ["step", *(f"cosine of layer {layer}" for layer in layers), "angle of the weights in degrees"]
        rows = [[entry["step"], *entry["cosines"], entry["weight_angle"]] for entry in self.history]
        report_table(self.trainer, "alignment_of_layers", columns, rows, step)

    def _write(self, args: Any) -> None:
        folder = Path(args.output_dir)
        with warn_of_failure("The report of the head's alignment could not be written"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "alignment.json").write_text(json.dumps(self.history, indent=1))
            draw_alignment({"": self.history}, folder / "alignment.png")

    def _measure(self, step: int) -> None:
        if self.history and self.history[-1]["step"] == step:
            return
        model, head = equilibrium_model(self.trainer.model), active_head(self.trainer.model)
        dataset = self.trainer.eval_dataset
        examples = [dataset[i] for i in range(min(self.num_examples, len(dataset)))]
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
    """Draws cosines and weight angle through training into a PNG, from each run's [`EPAlignmentCallback.history`]."""
    figure, (left, right) = new_axes(1, 2, width=5, height=4.2, dpi=140)
    for index, (name, history) in enumerate(histories.items()):
        steps, color = [entry["step"] for entry in history], COLORS[index % len(COLORS)]
        marker: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "markevery": 0.15, "markersize": 5}
        for layer, cosines in enumerate(zip(*(entry["cosines"] for entry in history), strict=True), start=1):
            style = ("-", "--", ":", "-.")[(layer - 1) % 4]
            label = f"{name}, layer {layer}" if name else f"layer {layer}"
            left.plot(steps, cosines, linestyle=style, color=color, label=label, **marker)
        right.plot(steps, [entry["weight_angle"] for entry in history], color=color, label=name or None, **marker)
    left.set(ylim=(None, 1.05), xlabel="step", ylabel="cosine to the exact errors")
    left.set_title("Estimated error vectors", loc="left", fontsize=11)
    right.set(ylim=(0, 100), xlabel="step", ylabel="angle (degrees)")
    right.set_title("Angle between forward and feedback weights", loc="left", fontsize=11)
    left.legend(frameon=False, fontsize=9)
    if any(histories):
        right.legend(frameon=False, fontsize=9)
    save_figure(figure, path)
