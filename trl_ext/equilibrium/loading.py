"""Where a model with an equilibrium head comes from: a backbone, by name or in memory, or an adapter on either.

A backbone in memory stays as it is: [`without_unused_pooler`] takes its pooler out of a copy that shares the weights.
An adapter's folder has the model's `config.json` beside `adapter_config.json`, see [`save_configuration`];
[`load_adapter`] puts the two on the base model that the second one names.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from .configuration import TOKEN_IDS, EPConfig
from .head import EPHead
from .settings import SETTINGS


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
               "trust_remote_code")  # fmt: skip
HEAD_FIELDS = (*SETTINGS, "pooling", "homeostasis_coef")
LABEL_FIELDS = ("num_labels", "id2label", "label2id", "problem_type")
CONFIG_FIELDS = (*HEAD_FIELDS, *LABEL_FIELDS, *TOKEN_IDS)
# What transformers' auto classes and pipelines hand on, of which an `AutoModel` knows nothing
_AUTO_OPTIONS = ("adapter_kwargs", "_from_auto", "_from_pipeline")


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where and how files are found."""
    return {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}


def saved_configuration(source: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A saved `config.json`; empty where there is none."""
    try:
        found, _ = PreTrainedConfig.get_config_dict(source, **hub_options(kwargs))
    except OSError:
        return {}
    return found


def label_settings(source: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """
    Labels and problem of a classifier on a backbone: what is given and, where that leaves it open, what the backbone's
    configuration has, such as that of a classifier's checkpoint.

    Args:
        source (`PreTrainedConfig`):
            Configuration of the backbone.
        given (`dict[str, Any]`):
            Those of `num_labels`, `id2label`, `label2id` and `problem_type` that the user gave.

    Returns:
        `dict[str, Any]`: arguments of [`EPConfig`].

    Raises:
        ValueError: If the numbers of labels given differ from one another.
    """
    found = {name: value for name, value in given.items() if value is not None}
    names, ids, num_labels = (found.get(name) for name in ("id2label", "label2id", "num_labels"))
    sizes = {len(labels) for labels in (names, ids) if labels is not None} | ({num_labels} - {None})
    if len(sizes) > 1:
        raise ValueError(
            f"`num_labels={num_labels}`, `id2label={names}` and `label2id={ids}` differ in the number of labels. Give "
            "one of them, or the same number in all."
        )
    if names is None and ids is not None:
        found["id2label"] = {int(index): label for label, index in ids.items()}
    elif names is not None and ids is None:
        found["label2id"] = {label: int(index) for index, label in names.items()}
    elif not sizes or sizes == {source.num_labels}:
        inherited = {"id2label": source.id2label, "label2id": source.label2id, "problem_type": source.problem_type}
        found = {name: value for name, value in inherited.items() if value is not None} | found
    if found.get("id2label") is not None:
        found.pop("num_labels", None)
    return found


def without_unused_pooler(backbone: PreTrainedModel, pooling: str) -> PreTrainedModel:
    """
    The backbone, or, if it has a pooler that the head does not read, which without a gradient would stop distributed
    training, a copy without it that shares all other modules. The backbone itself stays as it is.

    Args:
        backbone ([`~transformers.PreTrainedModel`]):
            Model without a head.
        pooling (`str`):
            As of [`EPConfig`].

    Returns:
        [`~transformers.PreTrainedModel`]

    Raises:
        ValueError: If `pooling` is `"pooler"` and the backbone has none.
    """
    pooler = getattr(backbone, "pooler", None)
    if pooling == "pooler" and pooler is None:
        raise ValueError(
            f"`pooling='pooler'` needs a backbone with a pooler, which `{type(backbone).__name__}` has not. Use "
            "'first', whose state a pooler reads, or 'mean'."
        )
    if pooling == "pooler" or pooler is None:
        return backbone
    shared = copy.copy(backbone)
    shared._modules = {**backbone._modules, "pooler": None}
    return shared


def backbone_in_memory(model: nn.Module) -> PreTrainedModel:
    """
    The backbone of a model of transformers, without its head; of a `PeftModel`, that of a copy into which the active
    adapter is merged. The model itself stays as it is.

    Args:
        model (`torch.nn.Module`):
            Model.

    Returns:
        [`~transformers.PreTrainedModel`]

    Raises:
        TypeError: If it is no model of transformers.
        ValueError: If an adapter lies on quantized weights, into which it cannot be merged exactly.
    """
    found: Any = model
    if is_peft_model(model):
        if getattr(found.get_base_model(), "is_quantized", False):
            raise ValueError(
                "The backbone is a `PeftModel` on quantized weights, which merging its adapter would round. Give its "
                "base model, `peft_model.get_base_model()` without the adapter, and train the adapter with the head: "
                "`peft_config` of the trainer."
            )
        found = copy.deepcopy(found).merge_and_unload()
    if not isinstance(found, PreTrainedModel):
        raise TypeError(
            f"`backbone` is a `{type(found).__name__}`. Give a model id, a model of transformers, or a `PeftModel` on "
            "one."
        )
    return found.base_model


def place_head(model: Any, backbone: PreTrainedModel) -> None:
    """
    Moves the head to the backbone's device, or, of a backbone that is spread over several devices, to that of its
    last part, and gives the model the `hf_device_map` of both.

    Args:
        model ([`EPModelForSequenceClassification`]):
            Model whose head is new.
        backbone ([`~transformers.PreTrainedModel`]):
            Its backbone, where it shall stay.
    """
    placed: dict[str, Any] | None = getattr(backbone, "hf_device_map", None)
    if placed is None:
        model.score.to(backbone.device)
        return
    accelerators = [device for device in placed.values() if device not in ("cpu", "disk")]
    device = accelerators[-1] if accelerators else "cpu"
    model.score.to(torch.device(device))
    if len(set(placed.values())) > 1:
        # The states come back on the device of the input, which need not be that of the head
        add_hook_to_module(model.score, AlignDevicesHook(execution_device=device, io_same_device=True))
    spread = {f"model.{name}" if name else "model": device for name, device in placed.items()}
    model.hf_device_map = {"": device} if set(placed) == {""} else {**spread, "score": device}


def find_adapter(source: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """
    `adapter_config.json` of an adapter that is not saved together with a whole model; `None` if `source` is none.
    """
    if source is None:
        return None
    options = {name: value for name, value in hub_options(kwargs).items() if name != "trust_remote_code"}
    path = find_adapter_config_file(str(source), **options)
    folder = Path(str(source))
    if path is None or any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return None
    return json.loads(Path(path).read_text(encoding="utf-8"))


def load_adapter(
    model_class: Any,
    source: Any,
    adapter: dict[str, Any],
    config: PreTrainedConfig | None,
    kwargs: dict[str, Any],
) -> Any:
    """
    The model that a saved adapter was trained on, with the adapter in it, for inference.

    Args:
        model_class (`type`):
            [`EPModelForSequenceClassification`].
        source (`str` or `Path`):
            Folder or Hub id of the adapter.
        adapter (`dict[str, Any]`):
            See [`find_adapter`].
        config (`PreTrainedConfig` or `None`):
            Configuration; `None` for the `config.json` beside the adapter, or that of a base model which is an
            [`EPModelForSequenceClassification`].
        kwargs (`dict[str, Any]`):
            Other arguments of `from_pretrained`.

    Returns:
        [`EPModelForSequenceClassification`], and with `output_loading_info` the adapter's loading information.

    Raises:
        ValueError: If the head's settings, the head itself or the name of the base model are saved nowhere.
    """
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"The adapter in {source} names no base model (`base_model_name_or_path`). Load that model with "
            "`EPModelForSequenceClassification`, then `PeftModel.from_pretrained(model, adapter)`."
        )
    where = ("cache_dir", "local_files_only", "proxies", "token", "trust_remote_code")
    found = saved_configuration(base, {name: kwargs[name] for name in where if name in kwargs})
    is_whole = found.get("model_type") == EPConfig.model_type
    settings = _adapter_configuration(source, base, is_whole, config, kwargs)
    options = {name: value for name, value in kwargs.items() if name not in (*HUB_OPTIONS, *_AUTO_OPTIONS)}
    options |= {name: kwargs[name] for name in where if name in kwargs}
    with_info = options.pop("output_loading_info", False)
    for name in [name for name in options if name in CONFIG_FIELDS]:
        setattr(settings, name, options.pop(name))
    if adapter.get("revision") is not None:
        options["revision"] = adapter["revision"]
    if options.get("dtype", "auto") in (None, "auto") and settings.dtype is not None:
        options["dtype"] = settings.dtype
    if found.get("quantization_config") is None:
        # Quantized when it was loaded: so it is again, unless the user says otherwise
        taken = [part.__dict__.pop("quantization_config", None) for part in (settings, settings.text_config)]
        options |= {"quantization_config": taken[0] or taken[1]} if any(taken) else {}
        options |= {"quantization_config": kwargs["quantization_config"]} if "quantization_config" in kwargs else {}
    from peft import load_peft_weights  # an extra

    model = model_class.from_pretrained(base, config=settings, **options)
    location = {name: value for name, value in hub_options(kwargs).items() if name != "trust_remote_code"}
    info = model.load_adapter(str(source), adapter_kwargs=location)
    saved = load_peft_weights(str(source), device="cpu", **location)
    _restore_weights(model, saved)
    lost = [] if isinstance(model.score, EPHead) else _missing_from_head(model, saved)
    if lost or (not is_whole and isinstance(model.score, EPHead)):
        raise ValueError(
            f"The adapter in {source} lacks the head{f' ({lost[0]} and others)' if lost else ''}, which its base "
            f"model {base} does not have either: its rewards would be those of a random head. Train it with "
            "`LoraConfig(task_type='SEQ_CLS', ...)` or `modules_to_save=['score']`."
        )
    model.config.name_or_path = model.name_or_path = str(source)
    if with_info:
        # transformers 5.5 says nothing of what it loaded
        return model, {"missing_keys": set(lost)} if info is None else info.to_dict()
    return model


def _missing_from_head(model: PreTrainedModel, saved: dict[str, torch.Tensor]) -> list[str]:
    """Weights of a head that its adapter trained which the adapter's file does not have."""
    trained = (f"score.{name}" for name, _ in model.score.modules_to_save["default"].named_parameters())
    return sorted(name for name in trained if f"base_model.model.{name}" not in saved)


@torch.no_grad()
def _restore_weights(model: PreTrainedModel, saved: dict[str, torch.Tensor]) -> None:
    """Gives an adapter its weights as trained: transformers rounds them to the base model's dtype, 5.5 skips some."""
    for name, parameter in model.named_parameters():
        key = name.replace(".modules_to_save.default", "").replace(".default", "")
        weight = saved.get(f"base_model.model.{key}") if ".default" in name else None
        if weight is not None:
            parameter.data = weight.to(parameter.device)


def _adapter_configuration(
    source: Any, base: str, is_whole: bool, config: PreTrainedConfig | None, kwargs: dict[str, Any]
) -> EPConfig:
    """A configuration of one's own for an adapter's model: given, beside the adapter, or the base model's."""
    if isinstance(config, EPConfig):
        return copy.deepcopy(config)
    if saved_configuration(source, kwargs).get("model_type") == EPConfig.model_type:
        return EPConfig.from_pretrained(source, **hub_options(kwargs))
    if is_whole:
        return EPConfig.from_pretrained(base)
    raise ValueError(
        f"The adapter in {source} has no `config.json` with the settings of its equilibrium head, and its base model "
        f"{base} has no such head. `EPRewardTrainer` and `EPTrainer` save one; after another trainer, call "
        f"`peft_model.get_base_model().config.save_pretrained({str(source)!r})`, or give `config=EPConfig(...)`."
    )


def save_configuration(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes `config.json` beside an adapter, as transformers does beside a whole model."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
