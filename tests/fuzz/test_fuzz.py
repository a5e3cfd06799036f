"""Random recipes, configurations, constraints, rows and token weights: a clear error or sense, and never a hang.

`make fuzz` runs 20,000 cases, `make test` a small fixed set of them. The number is `TRL_EXT_FUZZ_CASES`.
"""

import dataclasses
import json
import math
import os
import time
from contextlib import contextmanager
from functools import cache
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from datasets import Dataset
from trl import ModelConfig, ScriptArguments
from trl.data_utils import extract_prompt, is_conversational

from tests.helpers.fields import OWN, own_fields
from tests.helpers.tiny import tiny_tokenizer
from trl_ext import ConstrainedGRPOConfig, ConstrainedPPOConfig, EPConfig, EPRewardConfig, SparsePOConfig
from trl_ext.core.dataset_rows import check_rows
from trl_ext.scripts import constrained_ppo, sparse_po
from trl_ext.scripts.recipe.packaged import packaged_recipes
from trl_ext.scripts.recipe.strict_parser import RecipeError
from trl_ext.sparse_po.given_weights import completion_weights


hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies

CASES = int(os.environ.get("TRL_EXT_FUZZ_CASES", "0"))
# Longest that one case may take, in seconds
LONGEST = 5.0


def cases(share, fixed):
    """A share of the cases of `make fuzz`, each run's own, or a few that are always the same."""
    return hypothesis.settings(
        max_examples=max(1, round(CASES * share)) if CASES else fixed,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink] if CASES else [hypothesis.Phase.generate],
    )


@contextmanager
def refusals(*kinds, naming=()):
    """Lets through errors of these kinds whose message has one of the words, and nothing that takes long."""
    start, message = time.process_time(), None
    try:
        yield
    except kinds as error:
        message = f"{type(error).__name__}: {error}"
    assert message is None or not naming or any(word in message for word in naming), (message[:300], naming)
    assert time.process_time() - start < LONGEST


NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2, 0.5, 1e-3, 1e308, 10**400, math.inf, -math.inf])
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["", "no", "1e-3", "nan", "auto", "[/x]", "{", "{}", "\x00"]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.binary(max_size=4))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)

RECIPES = [yaml.safe_load(path.read_text()) for path in packaged_recipes().values() if "constrained" in str(path)]
READ = (ScriptArguments, constrained_ppo.ConstrainedPPOScriptArguments, ConstrainedPPOConfig, ModelConfig)
KEYS = [*sorted({field.name for cls in READ for field in dataclasses.fields(cls) if field.init}), "env", "gama", "<<"]
YAML_PIECES = [
    "a: ", "- ", "\n", "  ", "{", "}", "[", "]", "&a ", "*a", "<<: ", "!!int ", "!!binary ", "'", '"', "|\n", "? ",
    ": ", "#", "---\n", "%YAML 9\n", "\t", "2024-13-45", "0o9", ".nan", "~", "é", "\x07",
]  # fmt: skip


@cache
def parsers():
    """A command's parser each: made in a test, for it registers names of optimizers for the whole process."""
    return {"sparse_po": sparse_po.make_parser(), "constrained_ppo": constrained_ppo.make_parser()}


def check_recipe(data, folder):
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    for parser in parsers().values():
        with refusals(RecipeError, naming=("recipe", "command line")):
            parser.check(["--config", str(path), "--trust_recipe_code"])


@cases(0.1, 15)
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-16"))))
def test_bytes(data, tmp_path_factory):
    check_recipe(data, tmp_path_factory.getbasetemp())


@cases(0.1, 15)
@given(pieces=st.lists(st.sampled_from([*YAML_PIECES, *KEYS[:40]]), max_size=30))
def test_yaml(pieces, tmp_path_factory):
    check_recipe("".join(pieces).encode(), tmp_path_factory.getbasetemp())


@cases(0.15, 15)
@given(recipe=st.sampled_from(RECIPES), key=st.sampled_from(KEYS), value=VALUES)
def test_recipes_with_one_value_changed(recipe, key, value, tmp_path_factory):
    text = yaml.safe_dump({**recipe, key: value}, allow_unicode=True)
    check_recipe(text.encode("utf-8", "surrogatepass"), tmp_path_factory.getbasetemp())


CLASSES = [SparsePOConfig, ConstrainedPPOConfig, ConstrainedGRPOConfig, EPRewardConfig, EPConfig, *list(OWN)[6:]]
FIELDS = [(cls, name) for cls in CLASSES for name in own_fields(cls)]


def makes_sense(value, hint, infinite):
    """Whether an accepted value is of the field's type, and of numbers finite; not by the code that is tested."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None:
        return NoneType in members or hint is not bool
    if get_origin(hint) is Literal or any(get_origin(member) is Literal for member in members):
        choices = [choice for member in members for choice in get_args(member)]
        return any(type(value) is type(choice) and value == choice for choice in choices)
    if isinstance(value, bool):
        return bool in members or not {int, float} & set(members)
    if isinstance(value, (int, float)) and {int, float} & set(members):
        return infinite or (abs(value) < 1.8e308 and value == value)
    return True


@cases(0.25, 60)
@given(field=st.sampled_from(FIELDS), value=VALUES)
def test_configurations(field, value, tmp_path_factory):
    cls, name = field
    settings_of = {**OWN[cls], name: value}
    if hasattr(cls, "output_dir"):
        settings_of.setdefault("output_dir", str(tmp_path_factory.getbasetemp()))
    from huggingface_hub.errors import StrictDataclassFieldValidationError

    with refusals(ValueError, TypeError, StrictDataclassFieldValidationError, naming=(name, "constraint")):
        built = cls(**settings_of)
        hint = get_type_hints(cls, localns={"torch": torch})[name]  # which transformers imports for checkers alone
        assert makes_sense(getattr(built, name), hint, name == "multiplier_max"), (cls.__name__, name, value)


@pytest.fixture(scope="module")
def constrained(tmp_path_factory):
    return ConstrainedPPOConfig(str(tmp_path_factory.getbasetemp()), **OWN[ConstrainedPPOConfig])


CONSTRAINT_KEYS = ["reward", "threshold", "kind", "quantile", "relative_gain", "probability", "per_prompt",
                   "tolerance", "spread", "treshold", ""]  # fmt: skip
CONSTRAINT_VALUES = st.one_of(VALUES, st.sampled_from(["a", ">=", "<=", "==", "per_prompt", 0.5, 0.05, True]))


@cases(0.15, 60)
@given(st.lists(st.dictionaries(st.sampled_from(CONSTRAINT_KEYS), CONSTRAINT_VALUES, min_size=1), max_size=3))
def test_constraints(constrained, entries):
    constrained.constraints = entries
    with refusals(ValueError, naming=("onstraint",)):
        for one in constrained.parsed_constraints():
            stated = [one.threshold, one.quantile, one.relative_gain]
            assert sum(number is not None and abs(number) < 1.8e308 for number in stated) == 1
            assert one.kind in (">=", "<=", "==") and isinstance(one.reward, (str, int))


MESSAGE = st.fixed_dictionaries({}, optional={
    "role": st.one_of(SCALARS, st.sampled_from(["user", "assistant", "system", "wizard"])),
    "content": st.one_of(SCALARS, TEXTS),
})  # fmt: skip
COLUMN = st.one_of(TEXTS, SCALARS, st.lists(st.one_of(MESSAGE, SCALARS), max_size=2), VALUES)
ROW = st.fixed_dictionaries({}, optional=dict.fromkeys(("prompt", "chosen", "rejected", "other"), COLUMN))
TOKENIZER = tiny_tokenizer()


@cases(0.125, 40)
@given(rows=st.lists(ROW, max_size=3))
def test_rows(rows):
    try:
        dataset = Dataset.from_list(rows)
    except Exception:
        hypothesis.reject()
    naming = ("Row ", "is empty", "no column")
    with refusals(ValueError, naming=naming):
        options = {"required": ("chosen", "rejected"), "optional": ("prompt",)}
        check_rows(dataset, "train", tokenizer=TOKENIZER, needs_prompt=True, **options)
        for row in dataset:  # as TRL tokenises them
            row = row if "prompt" in row else {**row, **extract_prompt(row)}
            for side in ("chosen", "rejected"):
                whole = row["prompt"] + row[side]
                if is_conversational(row):
                    TOKENIZER.apply_chat_template(whole, tokenize=False)
                else:
                    assert isinstance(whole, str) and TOKENIZER(whole + "<eos>")["input_ids"]


PAIR = {
    "prompt": "the film",
    "chosen": " was good",
    "prompt_ids": [3, 5],
    "chosen_ids": TOKENIZER(" was good")["input_ids"],
}
WEIGHTS = st.one_of(
    VALUES,
    st.lists(NUMBERS, max_size=4),
    st.lists(st.lists(NUMBERS, max_size=4), max_size=3),
    st.lists(st.tuples(st.integers(-1, 10), st.integers(-1, 10), st.floats(0, 2)).map(list), max_size=3),
)


@cases(0.125, 40)
@given(weights=WEIGHTS)
def test_token_weights(weights):
    with refusals(ValueError):
        found = completion_weights(PAIR, "chosen", weights, TOKENIZER)
        assert len(found) == len(PAIR["chosen_ids"])
        assert all(isinstance(weight, float) and 0 <= weight < math.inf for weight in found)
        json.dumps(found, allow_nan=False)
