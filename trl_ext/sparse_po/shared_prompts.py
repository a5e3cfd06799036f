"""Pairs that share their prompt: one row of the backbone for prompt, chosen and rejected answer, in place of two.

    two rows    x1 x2 x3 c1 c2          one row     x1 x2 x3 c1 c2 r1
                x1 x2 x3 r1             position     0  1  2  3  4  3
                                        branch       0  0  0  1  1  2

A token sees the tokens of branch 0 and of its own branch, as far as the model's own mask lets it at their positions:
causal masks and sliding windows are functions of positions and follow. The states are those of two rows, up to
rounding. [`check_shared_prompts`] refuses models for which they are not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .._upstream import attention_masks_changed_by


# Largest difference of a token's state from that of two rows, relative to the state: float32; TensorFloat-32; 16 bits
TOLERANCES = (1e-4, 2e-3, 0.1)
# Windows up to this many tokens are probed at their length, whatever imposes them
LONGEST_PROBED_WINDOW = 512


@dataclass
class PackedPairs:
    """
    A batch of pairs, one row each: what the two rows have in common at their start, the rest of the chosen row, the
    rest of the rejected row.

    Attributes:
        input_ids (`torch.Tensor` of shape `(B, S)`, int64):
            Tokens.
        attention_mask (`torch.Tensor` of shape `(B, S)`):
            One for tokens, zero for padding, in the dtype of the batch's own.
        position_ids (`torch.Tensor` of shape `(B, S)`, int64):
            Column of each token in its row of the batch.
        branch (`torch.Tensor` of shape `(B, S)`, int64):
            0 for what both rows have, 1 for the chosen row's rest and padding, 2 for the rejected row's rest.
        slots (`torch.Tensor` of shape `(2B, T)`, int64):
            For each place of the batch, its column in the pair's row; 0 for padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    branch: torch.Tensor
    slots: torch.Tensor

    def inputs(self) -> dict[str, torch.Tensor]:
        """What the backbone is called with."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """From `(B, S, ...)` to `(2B, T, ...)`, arbitrary at padding, with gradient."""
        slots = self.slots.to(values.device)
        return values[self._pairs(slots).expand_as(slots), slots]

    def unpack_flat(self, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Each from `(B * S, E)`, or `(B, S, E)`, to `(2B * T, E)`, as a mixture of experts keeps them."""
        shape = self.input_ids.shape
        return tuple(self.unpack(value.reshape(*shape, -1)).flatten(0, 1) for value in values)

    def predicting(self, hidden: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """From `(B, S, H)` to the states `(N, H)` of the places of `predicted`, `(2B, T-1)` bool, row by row."""
        predicted = predicted.to(hidden.device)
        slots = self.slots.to(hidden.device)[:, :-1]
        return hidden[self._pairs(slots).expand_as(slots)[predicted], slots[predicted]]

    def _pairs(self, slots: torch.Tensor) -> torch.Tensor:
        num_rows = slots.size(0)
        return (torch.arange(num_rows, device=slots.device) % (num_rows // 2)).unsqueeze(1)


def pack_pairs(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> PackedPairs:
    """
    Packs a batch of pairs. Rows whose prompts differ, cut from the left for instance, share what they can: nothing, at
    worst.

    Args:
        input_ids (`torch.Tensor` of shape `(2B, T)`, int64):
            Chosen rows, then rejected rows.
        attention_mask (`torch.Tensor` of shape `(2B, T)`):
            Zero for padding, on either side.

    Returns:
        [`PackedPairs`]
    """
    num_pairs = input_ids.size(0) // 2
    tokens = attention_mask.bool()
    (chosen, rejected), (chosen_tokens, rejected_tokens) = input_ids.chunk(2), tokens.chunk(2)
    same = (chosen == rejected) & chosen_tokens & rejected_tokens
    shared = same.long().cumprod(dim=1).bool()  # (B, T)
    own = tokens & ~shared.repeat(2, 1)  # (2B, T)
    sizes = own.sum(dim=1)
    starts = shared.sum(dim=1).repeat(2)
    starts[num_pairs:] += sizes[:num_pairs]
    columns = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
    slots = torch.where(own, starts.unsqueeze(1) + own.long().cumsum(dim=1) - 1, columns)
    slots = slots.masked_fill(~tokens, 0)
    length = int((starts + sizes)[num_pairs:].max())

    places = slots + length * (torch.arange(2 * num_pairs, device=slots.device) % num_pairs).unsqueeze(1)

    def packed(values: torch.Tensor, padding: int) -> torch.Tensor:
        row = values.new_full((num_pairs * length,), padding)
        row[places[tokens]] = values[tokens]
        return row.view(num_pairs, length)

    branches = own.long()
    branches[num_pairs:] *= 2
    positions = packed(columns, -1)
    # Padding stands where the row's first token does, and sees it: a row of a mask without a token gives NaN
    positions = torch.where(positions < 0, positions[:, :1], positions)
    return PackedPairs(packed(input_ids, 0), packed(attention_mask, 0), positions, packed(branches, 1), slots)


@contextmanager
def branches_apart(model: PreTrainedModel, packed: PackedPairs | None) -> Iterator[None]:
    """
    While the context lasts, the attention masks that the model makes let a packed token see what it sees in a row of
    its own.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that is about to run on `packed.inputs()`.
        packed ([`PackedPairs`] or `None`):
            Pairs; without them nothing changes.
    """
    if packed is None:
        yield
        return
    positions, branch = packed.position_ids, packed.branch

    def change(mask_function: Callable[..., Any]) -> Callable[..., Any]:
        def at_positions(row: Any, head: Any, query: Any, key: Any) -> Any:
            key_branch = branch[row, key]
            visible = (key_branch == 0) | (key_branch == branch[row, query])
            return visible & mask_function(row, head, positions[row, query], positions[row, key])

        return at_positions

    with attention_masks_changed_by(model.config.get_text_config()._attn_implementation, change):
        yield


def probe_pairs(model: PreTrainedModel, vocab_size: int) -> dict[str, torch.Tensor]:
    """
    A batch of two pairs of unequal lengths as the collator makes it, drawn without random numbers, longer than the
    windows that the model's config names where those are short.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        vocab_size (`int`):
            Its tokens.
    """
    windows = [
        value
        for name, value in vars(model.config.get_text_config()).items()
        if "window" in name and type(value) is int and 0 < value <= LONGEST_PROBED_WINDOW
    ]
    answer = max(windows, default=0) + 5
    lengths = [(6, answer, 4), (3, 2, answer)]  # prompt, chosen, rejected
    rows = [(prompt, sizes[side]) for side in (0, 1) for prompt, *sizes in lengths]
    ids = torch.zeros(4, 6 + answer, dtype=torch.long)
    attention_mask, completion_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, size) in enumerate(rows):
        ids[row, :prompt] = torch.arange(prompt) + 11 * (row % 2)
        ids[row, prompt : prompt + size] = 7 * torch.arange(size) + 3 * row + 1
        attention_mask[row, : prompt + size] = 1
        completion_mask[row, prompt : prompt + size] = 1
    inputs = {"input_ids": ids % vocab_size, "attention_mask": attention_mask, "completion_mask": completion_mask}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def check_shared_prompts(model: PreTrainedModel, states: Callable[[bool], torch.Tensor]) -> None:
    """
    Refuses a model whose states on packed pairs are not those on two rows.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, for messages.
        states (`Callable`):
            From whether to pack to the final states of some pairs, `(N, H)`.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    expected = states(False)
    try:
        found = states(True)
    except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(_refusal(model, f"it cannot run on packed pairs ({error})")) from error
    if expected.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(expected.device.type):
        tolerance = TOLERANCES[2]
    else:
        tolerance = TOLERANCES[int(expected.is_cuda and torch.backends.cuda.matmul.allow_tf32)]
    expected, found = expected.float(), found.float()
    norms = expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    difference = ((found - expected).norm(dim=-1) / norms).max().item()
    if expected.isfinite().all() and not difference <= tolerance:
        raise ValueError(_refusal(model, f"on some pairs a state differs by {difference:.2g} of its size"))


def _refusal(model: PreTrainedModel, found: str) -> str:
    config = model.config
    return (
        f"`share_prompt=True` does not work with {type(model).__name__} ({config.model_type}) and "
        f"`attn_implementation={config.get_text_config()._attn_implementation!r}`: {found}. It needs attention that "
        "takes a mask ('sdpa' or 'eager') and positions, in every layer. Set `share_prompt=False`, or load the model "
        "with `attn_implementation='sdpa'` if that is another."
    )
