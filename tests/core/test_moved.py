"""Old names of what moved to recipes/experiments: they work with a warning, and say where to look without a clone."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

from trl_ext.core.moved import moved
from trl_ext.scripts.constrained_ppo import load_reward
from trl_ext.scripts.recipe.strict_parser import RecipeError


MOVED = {
    "overoptimization": "constrained_ppo_playground.run",
    "dialog_comparison": "constrained_ppo_dailydialog.run",
    "prepare_dialog": "constrained_ppo_dailydialog.prepare",
    "optimizer_language_models": "adamp_language_models.run",
    "scale_invariance": "adamp_scale_invariance.run",
    "sentiment_frontier": "sparse_po_sentiment.run",
}


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_old_scripts_are_the_new_ones(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, f"trl_ext.scripts.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"has moved to `recipes.experiments.{new}`"):
        module = importlib.import_module(f"trl_ext.scripts.{old}")
    assert module.__name__ == f"recipes.experiments.{new}"
    assert callable(module.main) and callable(module.make_parser)


def test_old_command_runs_with_its_old_recipe(tmp_path):
    """From any folder; the recipe is read, since its refusal of one key is all that stops the command."""
    command = [sys.executable, "-m", "trl_ext.scripts.overoptimization"]
    command += ["--config", "recipes/constrained_ppo/overoptimization.yaml", "--num_promts", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "DeprecationWarning: This has moved to `recipes.experiments.constrained_ppo_playground.run`" in done.stderr
    assert "`num_promts` in the command line; did you mean `num_prompts`" in done.stderr
    assert "Traceback" not in done.stderr


def test_rewards_of_published_recipes(monkeypatch):
    from recipes.experiments.constrained_ppo_dailydialog import rewards

    monkeypatch.delitem(sys.modules, "trl_ext.dialog.rewards", raising=False)
    with pytest.warns(DeprecationWarning, match="has moved"):
        assert load_reward("trl_ext.dialog.rewards.meteor") is rewards.meteor
    assert load_reward("trl_ext.dialog.rewards.intent_match") is rewards.intent_match


def test_without_a_clone_the_error_says_where_to_look(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "`recipes.experiments.adamp_scale_invariance.run`.*not in the installed package.*Clone it"
    with pytest.raises(SystemExit, match=message):
        moved("__main__", "adamp_scale_invariance.run")
    monkeypatch.delitem(sys.modules, "trl_ext.dialog.rewards", raising=False)
    # Not taken for the name of a model on the hub
    with pytest.raises(RecipeError, match="constrained_ppo_dailydialog.rewards"):
        load_reward("trl_ext.dialog.rewards.meteor")
