"""The recipes of the playground by the commands of their headers, on their own data: one step of an untrained model.

`python -m tests.recipes.as_written` runs them as they stand, to the end.
"""

import os
import re
from functools import partial
from importlib import import_module

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.recipes.as_written import RECIPES, ROOT, command_of, said_to_be_run
from trl_ext import cli, playground


# One for each command; the others with TRL_EXT_ALL_CASES=1
USUAL = (
    "optim/sft_playground", "sparse_po/playground", "constrained_ppo/playground", "constrained_ppo/grpo_playground",
    "equilibrium/playground_reward",
)  # fmt: skip
TRIED = RECIPES if os.environ.get("TRL_EXT_ALL_CASES") == "1" else USUAL


def test_they_are_those_that_we_ran():
    """Every recipe that a table says we ran is here, but those whose data is no playground and pipelines, which
    `make demo` runs; one for each command.
    """
    said = {path for path in said_to_be_run() if "playground" in path.read_text() and path.parent.name != "pipeline"}
    assert said and said <= set(RECIPES.values()) and len(RECIPES) >= 8
    assert {command_of(path)[0] for path in RECIPES.values()} == {command_of(RECIPES[name])[0] for name in USUAL}


def test_a_real_model_that_we_ran_says_how_its_seeds_differ():
    said = {path for path in said_to_be_run() if "model_name_or_path: HuggingFaceTB/SmolLM2" in path.read_text()}
    assert len(said) == 4 and len({path.parent for path in said}) == 4  # one of each method
    for path in said:
        expected = path.read_text().partition("# Expected: ")[2].partition("\n#\n")[0]
        assert re.search(r"seeds? 42.*: [\d.]+", expected, re.DOTALL), path
        assert "minutes on one core" in expected, path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model in the place of the playground's, which takes a minute to train."""
    folder, tokenizer = tmp_path_factory.mktemp("playground") / "base", playground.build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.usefixtures("variables_taken_back")
@pytest.mark.parametrize("name", TRIED)
def test_the_command_of_the_header(name, base, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(playground, "resolve", lambda name: base)
    monkeypatch.setattr(playground, "load_playground_dataset", partial(playground.load_playground_dataset, 64, 8))
    command, *arguments = command_of(RECIPES[name])
    script = import_module(cli.TRAINING_COMMANDS[command])
    less = ["--max_steps", "1", "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]
    if command.startswith("constrained"):
        less += ["--max_completion_length", "4"]
    script.main(*script.make_parser().parse_args_and_config([*arguments, *less]))
    card = (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "config.json").is_file() and "model_name_or_path: playground" in card
