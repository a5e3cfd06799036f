"""The playground's tokenizer: one token for each word and sign of the grammar."""

import re

from transformers import PreTrainedTokenizerFast

from .grammar import vocabulary


PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% else %} {% endif %}"
)


def split_words(text: str) -> list[str]:
    """Lower-case words and signs of a text, as the tokenizer splits it; special tokens are left out."""
    for token in (PAD, EOS, UNK):
        text = text.replace(token, " ")
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """
    Builds the tokenizer.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: word-level, lower-casing, with padding, end and unknown tokens and a
        chat template that joins the messages.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace

    ids = {word: index for index, word in enumerate((PAD, EOS, UNK, *vocabulary()))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNK))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
