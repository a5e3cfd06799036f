"""What a recipe puts on a GPU: its models, and the bytes that its method keeps in a step."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .architecture import Architecture, measure
from .memory import Part, Work


# Bytes of one logit while the LM head runs tile by tile: it, its softmax and its gradient
_TILE_BYTES = 3 * 4
_PAIRS = ("sparse_po", "dpo", "reward", "equilibrium_reward", "kto")
_COMPLETIONS = ("constrained_ppo", "constrained_grpo", "grpo", "rloo")
_CLASSIFIERS = ("reward", "equilibrium_reward", "equilibrium_classifier")
_LENGTH = 1024
# Values that an optimizer keeps for a weight, and bytes of each where they are not the weight's
_MOMENTS = {"sgd": (0, None), "sgdp": (1, None), "adafactor": (0, None), "lion": (1, None)}


@dataclass(frozen=True)
class Plan:
    """
    A recipe on paper.

    Attributes:
        parts (`list[Part]`): Models.
        work (`Work`): A step.
        batch (`int`): Sequences of a micro-step on each GPU.
        length (`int`): Tokens of each.
        notes (`list[str]`): What was assumed.
    """

    parts: list[Part]
    work: Work
    batch: int
    length: int
    notes: list[str]


def plan_of(args: Any, script: str, load_config: Callable[[str], Any], prompt_length: int = 512) -> Plan:
    """
    The plan of a recipe.

    Args:
        args (`argparse.Namespace`):
            Checked arguments of a training command.
        script (`str`):
            Last name of the script's module, such as `"sparse_po"`.
        load_config (`Callable`):
            The configuration of a model of this name; it may raise `OSError`.
        prompt_length (`int`, *optional*, defaults to `512`):
            Tokens of a prompt, where completions are generated.

    Returns:
        `Plan`
    """
    config = load_config(args.model_name_or_path)
    notes: list[str] = []
    mixed = bool(args.fp16) or args.bf16 is not False
    loaded = _dtype(args.dtype, config)
    computes = torch.bfloat16 if mixed or loaded.itemsize == 2 else torch.float32
    batch, length = _shape(args, script, prompt_length)
    sizes = measure(config, computes, batch, length, _peft_config(args))
    weight_bytes = 0.5 if args.load_in_4bit else 1 if args.load_in_8bit else loaded.itemsize
    head = (
        0 if getattr(config.get_text_config(), "tie_word_embeddings", False) else sizes.vocab_size * sizes.hidden_size
    )
    without_head = head if script in _CLASSIFIERS else 0
    parts = _policy(args, sizes, weight_bytes, without_head)
    if _has_reference(args, script):
        base = parts[0]
        parts.append(Part("reference", base.parameters, 0, base.weight_bytes, base.outside, base.layer))
    kept = 0
    if script == "sparse_po":
        masks, kept = _masks(args, sizes, batch * length)
        parts += masks
    parts += _heads(args, script, sizes, head)
    parts += _reward_models(args, load_config, notes)
    tile = 0
    if script not in _CLASSIFIERS:
        tile = _TILE_BYTES * min(batch * length, 4096) * min(sizes.vocab_size, 32768)
    moments, moment_bytes = _moments(str(getattr(args.optim, "value", args.optim)), notes)
    activations = sizes.activations(batch, length, bool(args.gradient_checkpointing))
    if any(part.name == "critic" for part in parts):  # it goes forward before the policy goes back
        activations *= 2
    # The hidden states, with their gradients, that go from backbone to head
    activations += 2 * batch * length * sizes.hidden_size * sizes.element_bytes + tile
    work = Work(
        activations=activations, method=kept, generation=_generation(args, script, sizes, batch, length, notes),
        moments=moments, moment_bytes=moment_bytes, accumulation=args.gradient_accumulation_steps, mixed=mixed,
    )  # fmt: skip
    return Plan(parts, work, batch, length, notes)


def _dtype(name: Any, config: Any) -> torch.dtype:
    stated = getattr(config, "dtype", None) if name in (None, "auto") else getattr(torch, str(name), None)
    return stated if isinstance(stated, torch.dtype) else torch.float32


def _shape(args: Any, script: str, prompt_length: int) -> tuple[int, int]:
    """Sequences of a micro-step, and tokens of each."""
    batch = args.per_device_train_batch_size
    if script in _COMPLETIONS:
        return batch, prompt_length + (args.max_completion_length or 256)
    return batch * (2 if script in _PAIRS else 1), args.max_length or _LENGTH


def _peft_config(args: Any) -> Any:
    if not args.use_peft:
        return None
    from trl import get_peft_config

    return get_peft_config(args)


def _policy(args: Any, sizes: Architecture, weight_bytes: float, without: int) -> list[Part]:
    """The policy, with its adapters apart: PEFT keeps them in float32."""
    total, outside = sizes.parameters - without, max(sizes.outside - without, 0)
    if not args.use_peft:
        return [Part("policy", total, total, int(weight_bytes), outside, sizes.layer, gathers=2)]
    frozen = total - sizes.trained
    adapters = Part("adapters", sizes.trained, sizes.trained, 4, 0, sizes.trained // sizes.num_layers, gathers=2)
    return [Part("policy", frozen, 0, weight_bytes, outside, sizes.layer, gathers=2), adapters]


def _has_reference(args: Any, script: str) -> bool:
    if script in ("sparse_po", "dpo", "kto"):
        return not args.use_peft  # else it is the policy with its adapters off
    coefficient = getattr(args, "kl_coef", None) if script.startswith("constrained") else getattr(args, "beta", 0)
    return script in _COMPLETIONS and not args.use_peft and coefficient != 0


def _masks(args: Any, sizes: Architecture, tokens: int) -> tuple[list[Part], int]:
    """Masks, and the bytes of the reference's states that they and the KL read, if every token were of a response."""
    element, width = sizes.element_bytes, sizes.hidden_size
    states = tokens * width * element  # the reference's last ones
    if args.mask_type == "activation":
        return [], states + 5 * sizes.num_layers * tokens * 4
    if args.mask_type != "learned":
        return [], states
    count = 2 if args.independent_masks else 1
    # Each mask multiplies float32 states, and keeps them for its gradient
    copies = count * 4 if element != 4 else 0
    parameters = count * (2 * width + sizes.num_layers * (width + 2))
    masks = Part("masks", parameters, parameters, 4, shardable=False)
    return [masks], states + sizes.num_layers * tokens * width * (element + copies)


def _heads(args: Any, script: str, sizes: Architecture, head: int) -> list[Part]:
    """The critic of a policy, which has no head of the vocabulary, or the head of a classifier."""
    if script in _CLASSIFIERS:
        size = _head_size(
            sizes.hidden_size, args.head_hidden_features, getattr(args, "num_labels", None) or 1, args.head_feedback
        )
        return [Part("head", size, size, 4, shardable=False)]
    critic = getattr(args, "critic", "none") if script.startswith("constrained") else "none"
    if critic == "none":
        return []
    rewards = 1 + len(args.reward_funcs)
    widths = args.critic_hidden_features if args.critic_head == "equilibrium" else None
    heads = rewards * _head_size(sizes.hidden_size, widths, 1, args.critic_feedback)
    parts = [Part("value heads", heads, heads, 4, shardable=False)]
    if critic == "separate":
        total = sizes.parameters - head
        trained = sizes.trained if args.use_peft else total
        parts.append(Part("critic", total, trained, 4, max(sizes.outside - head, 0), sizes.layer, gathers=2))
    return parts


def _head_size(width: int, hidden: Any, outputs: int, feedback: Any) -> int:
    """Parameters of a linear head, or of an equilibrium head, where input and readout have no feedback."""
    widths = [width, *(hidden if isinstance(hidden, (list, tuple)) else [hidden] if hidden else []), outputs]
    forward = [a * b for a, b in itertools.pairwise(widths)]
    backward = sum(forward[1:-1]) if feedback == "asymmetric" else 0
    return sum(forward) + backward + sum(widths[1:])


def _reward_models(args: Any, load_config: Callable[[str], Any], notes: list[str]) -> list[Part]:
    parts = []
    for name in getattr(args, "reward_funcs", None) or []:
        if re.fullmatch(r"\w+(\.\w+)+", str(name)):  # a function by its dotted path
            continue
        try:
            config = load_config(name)
        except OSError:
            notes.append(f"The reward model {name} is not counted: its config.json is not on this machine.")
            continue
        dtype = _dtype("auto", config)
        sizes = measure(config, dtype, 1, 8)
        parts.append(Part("reward model", sizes.parameters, 0, dtype.itemsize, shardable=False))
    return parts


def _moments(optim: str, notes: list[str]) -> tuple[int, int | None]:
    if "8bit" in optim:
        return 2, 1
    found = next((value for name, value in _MOMENTS.items() if optim == name or optim.startswith(f"{name}_")), None)
    if found is None and not re.match(r"adam", optim):
        notes.append(f"`optim: {optim}` is counted as one that keeps two values for each weight.")
    return found or (2, None)


def _generation(args: Any, script: str, sizes: Architecture, batch: int, length: int, notes: list[str]) -> int:
    """Bytes of the cache while a rollout is generated."""
    if script not in _COMPLETIONS:
        return 0
    if getattr(args, "use_vllm", False):
        share = getattr(args, "vllm_gpu_memory_utilization", 0)
        notes.append(f"vLLM is not counted: it takes a share of {share:g} of a GPU where it shares one.")
        return 0
    rollout = batch * (getattr(args, "steps_per_generation", None) or args.gradient_accumulation_steps)
    notes.append(f"Prompts of {length - (args.max_completion_length or 256)} tokens (`--prompt_length`).")
    return math.prod((rollout, length, sizes.num_layers, sizes.cache_width, sizes.element_bytes))
