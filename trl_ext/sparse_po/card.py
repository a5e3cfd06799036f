"""What SparsePO adds to a model card."""

from typing import Any

from ..core.model_card import settings_table
from .mask_checkpoint import TOKEN_MASKS_FILE
from .sparse_po_config import SparsePOConfig


CITATION = """@inproceedings{christopoulou-etal-2025-sparsepo,
    title     = {{SparsePO}: Controlling Preference Alignment of {LLM}s via Sparse Token Masks},
    author    = {Christopoulou, Fenia and Cardenas, Ronald and Lampouras, Gerasimos and Bou Ammar, Haitham and
                 Wang, Jun},
    booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2025},
    year      = {2025},
    pages     = {25477--25503},
    url       = {https://aclanthology.org/2025.findings-emnlp.1389/}
}"""
_METRICS = ("rewards/accuracies", "kl/chosen", "kl/rejected", "mask/")


def method_section(config: SparsePOConfig, log_history: list[dict[str, Any]], model_id: str) -> str:
    """
    Markdown of the method's section.

    Args:
        config ([`SparsePOConfig`]):
            Configuration of the run.
        log_history (`list[dict]`):
            The trainer's log; the last entry with mask metrics is shown.
        model_id (`str`):
            Hub id or folder of the model.

    Returns:
        `str`
    """
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
        f'model = AutoModelForCausalLM.from_pretrained("{model_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{model_id}")\n```'
    )
