"""A model that was saved without its tokenizer is refused, in a recipe before the model is loaded."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.helpers.tiny import FAMILIES, WORDS, save_tiny_model, tiny_tokenizer
from trl_ext.core.tokenizer_check import check_tokenizer
from trl_ext.scripts.recipe.strict_parser import RecipeError
from trl_ext.scripts.recipe.tokenizer import TokenizerArguments, load_tokenizer


MODEL_ARGS = SimpleNamespace(model_revision="main")


def config_of(rows):
    return AutoConfig.for_model("llama", **FAMILIES["llama"], vocab_size=rows)


@pytest.mark.parametrize("rows", [len(WORDS), len(WORDS) + 7, 9 * len(WORDS)])
def test_padded_and_extended_vocabularies_pass(rows):
    check_tokenizer(tiny_tokenizer(), config_of(rows))
    check_tokenizer(SimpleNamespace(tokenizer=tiny_tokenizer()), config_of(rows))


def test_a_tokenizer_of_another_size_of_world_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=rf"has {len(tokenizer)} tokens where the model has 50257.*tokenizer_name_or"):
        check_tokenizer(tokenizer, config_of(50257))


def test_recipe_names_the_tokenizer_that_the_model_lacks(tmp_path):
    own = save_tiny_model(tmp_path / "own")
    config = config_of(50257)
    config.save_pretrained(tmp_path / "bare")
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(RecipeError, match="tokenizer_name_or_path"):
        load_tokenizer(str(tmp_path / "bare"), MODEL_ARGS, SimpleNamespace(), TokenizerArguments())
    found = load_tokenizer(own, MODEL_ARGS, SimpleNamespace(), TokenizerArguments(), padding_side="left")
    assert found.padding_side == "left" and len(found) == len(AutoTokenizer.from_pretrained(own))
    config_of(9 * len(WORDS)).save_pretrained(tmp_path / "larger")
    named = load_tokenizer(str(tmp_path / "larger"), MODEL_ARGS, SimpleNamespace(), TokenizerArguments(own))
    assert named.get_vocab() == found.get_vocab()
