"""What the equilibrium-propagation head adds to a model card."""

from pathlib import Path
from typing import Any

from ..core.model_card import settings_table, write_method_card
from .configuration import HEAD_FIELDS, EPConfig


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


def method_section(config: EPConfig, log_history: list[dict[str, Any]], model_id: str) -> str:
    """
    Markdown of the method's section: estimator, points, radius, asymmetry, homeostasis and final residuals.

    Args:
        config ([`EPConfig`]):
            Configuration of the model.
        log_history (`list[dict]`):
            The trainer's log; the last entry with the head's metrics is shown.
        model_id (`str`):
            Hub id or folder of the model.

    Returns:
        `str`
    """
    unused = {name for names in _ESTIMATOR_FIELDS.values() for name in names}
    unused -= set(_ESTIMATOR_FIELDS.get(config.estimator, ()))
    if config.feedback == "symmetric":
        unused |= {"feedback_angle", "correction"}
    settings: dict[str, object] = {name: getattr(config, name) for name in HEAD_FIELDS if name not in unused}
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
    parts.append(
        "The head relaxes to a fixed point, so the model loads with `trl_ext` only.\n\n"
        "```python\nimport trl_ext\nfrom transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        f'model = AutoModelForSequenceClassification.from_pretrained("{model_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{model_id}")\n```'
    )
    return "\n\n".join(parts)


def write_card(folder: str | Path, model_id: str, base_model: str, section: str) -> None:
    """
    Completes the `README.md` that a trainer left in a folder, so that its example loads `trl_ext` first.

    Args:
        folder (`str` or `Path`):
            Folder with the card.
        model_id (`str`):
            Hub id or folder of the model.
        base_model (`str`):
            Where the model came from; a folder is not named.
        section (`str`):
            Markdown of the method ([`method_section`]).
    """
    path = Path(folder) / "README.md"
    example = "from transformers import pipeline\n"
    path.write_text(path.read_text(encoding="utf-8").replace(example, f"import trl_ext\n{example}"), encoding="utf-8")
    named = base_model if base_model and not Path(base_model).is_dir() else None
    write_method_card(folder, model_id=model_id, base_model=named, method_section=section)
