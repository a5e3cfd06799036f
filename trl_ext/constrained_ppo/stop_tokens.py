"""Tokens that end a response beside the tokenizer's own."""

from collections.abc import Sequence
from typing import Any


def stop_token_ids(args: Any, defaults: Sequence[int]) -> list[int]:
    """
    Tokens that end a response: `eos_token_id` of `generation_kwargs` in place of the tokenizer's and the model's, or,
    for vLLM, `stop_token_ids` beside them.
    """
    given = args.generation_kwargs or {}
    if given.get("eos_token_id") is not None:
        ids = given["eos_token_id"]
        return list(ids) if isinstance(ids, (list, tuple)) else [ids]
    extra = given.get("stop_token_ids") or []
    kept = [] if given.get("ignore_eos") else defaults
    return [*kept, *(one for one in (extra if isinstance(extra, (list, tuple)) else [extra]) if one not in kept)]


def check_stop_tokens(args: Any) -> None:
    """Refuses stop tokens in `generation_kwargs` that are no token ids, or that the engine would not read."""
    for name in ("eos_token_id", "stop_token_ids"):
        given = (args.generation_kwargs or {}).get(name)
        ids = given if isinstance(given, (list, tuple)) else [given]
        wrong = [one for one in ids if not isinstance(one, int) or isinstance(one, bool) or one < 0]
        if given is not None and (wrong or not ids):
            raise ValueError(
                f"`generation_kwargs={{{name!r}: {given!r}}}` must be a token id or a list of them: "
                "`tokenizer.convert_tokens_to_ids(token)` gives one."
            )
        fits = name == ("stop_token_ids" if args.use_vllm else "eos_token_id")
        if given is not None and not fits:
            engine, other = ("vLLM", "stop_token_ids") if args.use_vllm else ("transformers", "eos_token_id")
            raise ValueError(
                f"`generation_kwargs={{{name!r}: {given!r}}}` is not known to {engine}, which generates. Use "
                f"`generation_kwargs={{{other!r}: {given!r}}}`."
            )
