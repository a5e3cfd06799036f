"""Tokens that end a response: those of tokenizer and model, or the user's in `generation_kwargs`.

TRL hands `generation_kwargs` to the engine and trims responses by its own list of tokens; the two have to agree, or
what the engine padded a finished response with is trained on.
"""

from collections.abc import Sequence
from typing import Any


def stop_token_ids(generation_kwargs: dict[str, Any] | None = None, defaults: Sequence[int] = ()) -> list[int]:
    """
    The tokens by which responses are trimmed.

    Args:
        generation_kwargs (`dict`, *optional*, defaults to `None`):
            `eos_token_id` ends responses in place of `defaults`; vLLM's `stop_token_ids` do beside them, or alone with
            `ignore_eos`.
        defaults (`Sequence[int]`, *optional*, defaults to `()`):
            End-of-sequence tokens of tokenizer and model.

    Returns:
        `list[int]`
    """
    given = generation_kwargs or {}
    if given.get("eos_token_id") is not None:
        return _as_list(given["eos_token_id"])
    kept = [] if given.get("ignore_eos") else list(defaults)
    return [*kept, *(token for token in _as_list(given.get("stop_token_ids") or []) if token not in kept)]


def check_stop_tokens(generation_kwargs: dict[str, Any] | None, uses_vllm: bool) -> None:
    """Refuses stop tokens that are no ids, and those that the engine does not know."""
    for name in ("eos_token_id", "stop_token_ids"):
        given = (generation_kwargs or {}).get(name)
        if given is None:
            continue
        ids = _as_list(given)
        if not ids or any(not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in ids):
            raise ValueError(
                f"`generation_kwargs={{{name!r}: {given!r}}}` must be a token id or a list of them: "
                "`tokenizer.convert_tokens_to_ids(token)` gives one."
            )
        engine, known = ("vLLM", "stop_token_ids") if uses_vllm else ("transformers", "eos_token_id")
        if name != known:
            raise ValueError(
                f"`generation_kwargs={{{name!r}: {given!r}}}` is not known to {engine}, which generates. Use "
                f"`generation_kwargs={{{known!r}: {given!r}}}`."
            )


def _as_list(given: Any) -> list[int]:
    return list(given) if isinstance(given, (list, tuple)) else [given]
