"""Whether a tokenizer is the model's: transformers builds an empty one for a model that is published without."""

from typing import Any


# A tokenizer that shares a model's vocabulary has at least this part of its rows; padding to a multiple takes a few
SMALLEST_SHARE = 0.1


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """
    Refuses a tokenizer that is far smaller than the model's vocabulary, with which every text is read as empty or as
    unknown tokens.

    Args:
        tokenizer (`~transformers.PreTrainedTokenizerBase` or `~transformers.ProcessorMixin`):
            What makes token ids of texts.
        model (`~transformers.PreTrainedModel` or `~transformers.PreTrainedConfig`):
            The model that reads them, or its configuration.

    Raises:
        ValueError: If the tokenizer has less than a tenth of the model's tokens.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    config = getattr(model, "config", model)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is None or not hasattr(tokenizer, "__len__") or len(tokenizer) >= SMALLEST_SHARE * rows:
        return
    name = getattr(config, "_name_or_path", "") or "the model"
    raise ValueError(
        f"The tokenizer has {len(tokenizer)} tokens where {name} has {rows}: the model was saved without its own, "
        "and texts would be read as nothing. Name the right one: `tokenizer_name_or_path` in a recipe, "
        "`processing_class=AutoTokenizer.from_pretrained(...)` in Python."
    )
