"""The tokenizer of a recipe, which a model on the Hub may come without."""

from dataclasses import dataclass, field
from typing import Any

from ...core.checks import Range


TOKENIZER_RANGES = {"tokenizer_name_or_path": Range(empty=False)}


@dataclass
class TokenizerArguments:
    """
    Where the tokenizer is, for models that are saved without one.

    Args:
        tokenizer_name_or_path (`str`, *optional*):
            Name or folder of the tokenizer. Defaults to the model's own.
    """

    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Name or folder of the tokenizer; the model's own by default."}
    )


def load_tokenizer(
    name: str, model_args: Any, training_args: Any, tokenizer_args: TokenizerArguments, **options: Any
) -> Any:
    """
    The tokenizer of a recipe, compared with the model's vocabulary before the model itself is loaded.

    Args:
        name (`str`):
            Name or folder of the model.
        model_args (`~trl.ModelConfig`):
            Revision of the model, which holds for a tokenizer beside it.
        training_args (`~transformers.TrainingArguments`):
            Whether code of the Hub is trusted.
        tokenizer_args ([`TokenizerArguments`]):
            Where the tokenizer is.
        **options:
            Keywords of `AutoTokenizer.from_pretrained`.

    Returns:
        `~transformers.PreTrainedTokenizerBase`

    Raises:
        RecipeError: If it has less than a tenth of the model's tokens.
    """
    from transformers import AutoConfig, AutoTokenizer

    from ...core.tokenizer_check import check_tokenizer
    from .reading import RecipeError

    trust = getattr(training_args, "trust_remote_code", False)
    of_model = {"revision": model_args.model_revision, "trust_remote_code": trust}
    own = tokenizer_args.tokenizer_name_or_path
    of_tokenizer = {"trust_remote_code": trust} if own else of_model
    tokenizer = AutoTokenizer.from_pretrained(own or name, **of_tokenizer, **options)
    try:
        check_tokenizer(tokenizer, AutoConfig.from_pretrained(name, **of_model))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return tokenizer
