"""The glossary is that of the sources, and has whatever they log."""

import ast

import pytest

from tests import glossary


# Of the form of a logged key, and none: what is kept before it is logged, folders, recipes, data, levels, wandb's axis
NO_KEYS = {
    "mask/<>/sparsity",
    "mask/<>/sum",
    "outputs/demo",
    "outputs/pairs",
    "outputs/pipeline",
    "outputs/proxy_points",
    "outputs/sweep",
    "recipes/<>/<>",
    "pipeline/playground",
    "sparse_po/playground",
    "equilibrium/playground_reward",
    "constrained_ppo/helpful_harmless",
    "stanfordnlp/imdb",
    "head/<>",
    "train/global_step",
}
# Defaults that code takes from a name
NAMED = {"_KL_COEF": "0.2", "AUTO": "'auto'", "GRPOConfig.disable_dropout": "False"}


def test_the_page_is_up_to_date():
    """Otherwise: python -m tests.glossary."""
    assert glossary.PAGE.read_text(encoding="utf-8") == glossary.page()


@pytest.mark.parametrize(("file", "name"), glossary.SETTINGS.values(), ids=lambda value: value.split("/")[-1])
def test_every_setting_is_described_with_its_default(file, name):
    said, code = glossary.settings(file, name)
    assert code and set(code) <= set(said)
    for key, default in code.items():
        kind, stated, text = said[key]
        assert text.endswith((".", ")")) and (kind or "see" in text), key
        if default is not None and stated not in ("`None`", "required"):
            value = ast.literal_eval(NAMED.get(default, default))
            said_value = ast.literal_eval(stated.strip("`"))
            assert said_value == (list(value) if isinstance(said_value, list) else value), key


def test_every_class_of_settings_is_there():
    """What users configure: exported configurations, and what recipes add to them."""
    named = {name for _, name in glossary.SETTINGS.values()}
    found = set()
    for path in sorted((glossary.ROOT / "trl_ext").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Arguments", "Settings")):
                found.add(node.name)
    # Of one field that its heirs describe; bases without fields; a model of the playground
    others = {"TokenizerArguments", "_HeadTrainingArguments", "EPRewardConfig", "BaseModelSettings"}
    assert {name for name in found - named - others if not name.startswith("_")} == set()


def test_every_key_of_the_source_is_there():
    unknown = {text: place for text, place in glossary.keys_in_source() if not glossary.is_known(text)}
    assert set(unknown) == NO_KEYS, unknown
    assert sum(1 for text, _ in glossary.keys_in_source() if glossary.is_known(text)) > 70


def test_keys_of_a_log():
    known = [{"loss": 1.0, "eval_rewards/low_ids/mean": 0.1, "eval_first_gold": 0.2, "critic/kl/loss": 0.3}]
    assert glossary.unknown(known) == set()
    assert glossary.unknown([*known, {"mask/reward/median": 0.0}]) == {"mask/reward/median"}
