"""Stages one after the other: what is checked, skipped, resumed, deleted, and how a failure ends."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from tests.helpers.tiny import save_tiny_model
from trl_ext import cli
from trl_ext.core.run_folder import RunLock
from trl_ext.pipeline import command as pipeline_command
from trl_ext.pipeline.definition import option_words, read_pipeline, references
from trl_ext.pipeline.progress import Progress, content_hash


POLICY = "${stages.sft.output_dir}"
SFT = {"command": "sft", "config": "optim/sft_playground", "settings": {"max_steps": 2}}
SPARSE = {"command": "sparse-po", "config": "sparse_po/playground", "settings": {"model_name_or_path": POLICY}}
PAIRS = {"model": POLICY, "dataset_name": "playground", "reward": "trl_ext.playground.sentiment_reward"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(stages, **keys):
    Path("pipe.yaml").write_text(
        "# A pipeline\n\n" + yaml.safe_dump({"output_dir": "out", "stages": stages, **keys}, sort_keys=False)
    )


class Commands:
    """Stands for `trl-ext`: writes down what is launched, and leaves behind what a training would."""

    def __init__(self, *statuses):
        self.statuses, self.lines, self.recipes, self.environments = list(statuses), [], [], []

    def __call__(self, words):
        self.lines.append(words)
        self.environments.append(dict(os.environ))
        recipe = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
        self.recipes.append(recipe)
        status = self.statuses.pop(0) if self.statuses else 0
        folder = Path(recipe["output_dir"])
        (folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        if status == 0:
            log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        return status


def run(commands, *arguments):
    return pipeline_command.main(["--config", "pipe.yaml", *arguments], cli.TRAINING_COMMANDS, commands)


def test_stages_run_in_order_and_what_is_done_is_skipped(here, capsys):
    write({"sft": SFT, "preference": SPARSE}, env={"WANDB_PROJECT": "mine"})
    commands = Commands()
    assert run(commands) == 0
    assert [line[0] for line in commands.lines] == ["sft", "sparse-po"]
    assert [recipe["output_dir"] for recipe in commands.recipes] == ["out/sft", "out/preference"]
    assert commands.recipes[0]["max_steps"] == 2 and commands.recipes[0]["optim"] == "adamp"
    assert commands.recipes[1]["model_name_or_path"] == "out/sft" and commands.recipes[1]["mask_type"] == "learned"
    assert not any("--resume_from_checkpoint" in line for line in commands.lines)
    assert commands.environments[0]["WANDB_PROJECT"] == "mine" and "WANDB_PROJECT" not in os.environ
    assert Path("out/report.html").is_file() and not Path("out/.trl_ext_lock.json").exists()
    again = Commands()
    assert run(again) == 0 and again.lines == []
    assert "Stage 2 of 2: preference (sparse-po) is done: out/preference" in capsys.readouterr().out


def test_a_failed_stage_ends_the_pipeline_with_its_status_and_is_resumed(here, capsys):
    write({"sft": SFT, "preference": SPARSE})
    assert run(Commands(0, 75)) == 75
    said = capsys.readouterr().out
    assert "The stage `preference` ended with status 75." in said and "the same command goes on from here" in said
    assert not Path("out/report.html").exists()  # a signal has ended it, and nobody waits
    assert run(Commands(3)) == 3
    assert "not finished" in Path("out/report.html").read_text()
    commands = Commands()
    assert run(commands) == 0
    assert [line[0] for line in commands.lines] == ["sparse-po"]  # the first is done
    assert commands.lines[0][-2:] == ["--resume_from_checkpoint", "true"]
    marker = json.loads(Path("out/stages/preference.json").read_text())
    assert marker["done"] and marker["command"][:3] == ["trl-ext", "sparse-po", "--config"]


def test_a_kill_within_a_stage_is_no_end_of_it(here):
    write({"sft": SFT})

    def killed(words):
        Commands()(words)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed)
    assert not Path("out/.trl_ext_lock.json").exists()
    commands = Commands()
    assert run(commands) == 0 and commands.lines[0][-2:] == ["--resume_from_checkpoint", "true"]


def test_a_changed_stage_and_what_was_made_from_it_are_done_again_when_asked(here):
    write({"sft": SFT, "preference": SPARSE})
    assert run(Commands()) == 0
    first = json.loads(Path("out/stages/sft.json").read_text())["run"]
    changed = ["--stages.sft.settings.max_steps", "3"]
    with pytest.raises(ValueError, match=r"`sft` has a folder, out/sft.*other inputs \(max_steps\).*`--overwrite`"):
        run(Commands(), *changed)
    assert Path("out/sft/trainer_state.json").is_file()  # nothing is deleted unasked
    commands = Commands()
    assert run(commands, *changed, "--overwrite") == 0
    assert [line[0] for line in commands.lines] == ["sft", "sparse-po"]
    assert not any("--resume_from_checkpoint" in line for line in commands.lines)  # of another run
    assert json.loads(Path("out/stages/sft.json").read_text())["run"] != first
    # Only the second one changes
    commands = Commands()
    assert run(commands, *changed, "--stages.preference.settings.beta", "0.1", "--overwrite") == 0
    assert [line[0] for line in commands.lines] == ["sparse-po"]


def test_a_folder_that_no_marker_knows_is_left_alone(here):
    write({"sft": SFT})
    Path("out/sft").mkdir(parents=True)
    Path("out/sft/model.safetensors").write_bytes(b"dear")
    with pytest.raises(ValueError, match=r"out/sft, and no marker says from which recipe"):
        run(Commands())
    assert Path("out/sft/model.safetensors").is_file()


def test_files_and_reward_code_are_inputs(here):
    Path("mine").mkdir()
    Path("mine/rewards.py").write_text("def length(completions, **columns):\n    return [0.0 for _ in completions]\n")
    Path("data.jsonl").write_text('{"prompt": "a"}\n')
    settings = {
        "datasets": [{"path": "json", "data_files": "data.jsonl"}],
        "reward_funcs": ["mine.rewards.length"],
        "reward_weights": None,
        "constraints": [{"reward": "length", "threshold": 1}],
    }
    recipe = {"command": "constrained-grpo", "config": "constrained_ppo/grpo_playground"}
    write({"policy": {**recipe, "settings": settings}})
    assert run(Commands()) == 0
    assert "dataset_name" not in yaml.safe_load(Path("out/stages/policy.yaml").read_text())  # `datasets` in its place

    def state():
        pipeline = read_pipeline(["--config", "pipe.yaml"], cli.TRAINING_COMMANDS)
        progress = Progress(pipeline)
        return progress.state(pipeline.stages[0]), progress.changed(pipeline.stages[0])

    assert state() == ("done", [])
    Path("data.jsonl").write_text('{"prompt": "b"}\n')
    assert state() == ("outdated", ["content of data.jsonl"])
    Path("data.jsonl").write_text('{"prompt": "a"}\n')
    assert state() == ("done", [])
    Path("mine/rewards.py").write_text("def length(completions, **columns):\n    return [1.0 for _ in completions]\n")
    assert state() == ("outdated", ["code of mine.rewards"])


def test_hash_of_a_folder_sees_what_changes(tmp_path):
    (tmp_path / "a").write_text("1")
    before = content_hash(tmp_path)
    assert content_hash(tmp_path) == before
    (tmp_path / "b").write_text("2")
    assert content_hash(tmp_path) != before


def test_proxy_points_of_a_sweep_become_the_constraints_of_a_policy(here, monkeypatch):
    constraints = [{"reward": "length", "threshold": 0.25, "kind": "=="}]

    def sweep(words, environment, patience):
        assert words[1:4] == ["-m", "trl_ext.cli", "sweep"] and patience is None
        assert words[words.index("--reward_weights") + 1 :][:2] == ["1,0", "0.5,0.5"]
        recipe = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
        assert recipe["method"] == "ppo" and "output_dir" not in recipe
        folder = Path(words[words.index("--output_dir") + 1]) / "proxy_points"
        folder.mkdir(parents=True)
        (folder / "constraints.yaml").write_text(yaml.safe_dump({"constraints": constraints}))
        return 0

    monkeypatch.setattr(pipeline_command, "run_launcher", sweep)
    rewards = ["trl_ext.playground.sentiment_reward", "trl_ext.playground.grammaticality"]
    stages = {
        "sweep": {"command": "sweep", "config": "constrained_ppo/ppo", "settings": {"reward_funcs": rewards},
                  "options": {"reward_weights": [[1, 0], [0.5, 0.5]]}},
        "policy": {"command": "constrained-grpo", "config": "constrained_ppo/grpo_playground",
                   "settings": {"constraints": "${stages.sweep.constraints}"}},
    }  # fmt: skip
    write(stages)
    commands = Commands()
    assert run(commands) == 0
    assert commands.recipes[0]["constraints"] == constraints


def policy_of(value):
    return {**SPARSE, "settings": {"model_name_or_path": value}}


def sft_with(**settings):
    return {"sft": {**SFT, "settings": settings}}


def pairs_with(**options):
    return {"sft": SFT, "pairs": {"command": "sample-pairs", "options": options}}


STEPZ = r"`max_stepz` in the recipe pipe.yaml \(stage sft\), line \d+; did you mean `max_steps`"
WRONG = [
    ({}, "`stages` is missing"),
    ({"sft": {**SFT, "setings": {}}}, r"`setings` of `stages.sft`.*line \d+, is unknown; did you mean `settings`"),
    ({"sft": {**SFT, "command": "stf"}}, "`command: stf`.*did you mean `sft`"),
    ({"a b": SFT}, "`stages.a b`.*cannot be the name of a stage"),
    ({"sft": 3}, "`stages.sft`.*must map keys to values, got 3"),
    (sft_with(max_stepz=2), STEPZ),
    (sft_with(max_steps="two"), r"`max_steps: 'two'`.*\(stage sft\), line \d+.*whole number"),
    (sft_with(output_dir="x"), "`stages.sft.settings.output_dir`.*is the pipeline's"),
    ({"sft": {**SFT, "config": "optim/sft_playgroun"}}, "optim/sft_playgroun` is not a file"),
    ({"sft": {**SFT, "num_processes": 0}}, "`stages.sft.num_processes` must be a whole number of at least 1"),
    ({"sft": {**SFT, "options": {"seed": 1}}}, "`stages.sft.options`.*Move them below `settings`"),
    ({"sft": {"command": "sft", "settings": {"model_name_or_path": "m"}}}, "`stages.sft`.*No data"),
    ({"preference": SPARSE, "sft": SFT}, "takes something from `sft`, which is no earlier stage.*none"),
    ({"sft": SFT, "p": policy_of("${stages.stf.output_dir}")}, "model_name_or_path`.*`stf`.*did you mean `sft`"),
    ({"sft": SFT, "p": policy_of("${stages.sft.pairs}")}, "takes `pairs` from `sft`.*`sft` gives output_dir"),
    ({"sft": SFT, "p": policy_of("${sft}")}, r"has `\$\{sft\}`. Write"),
    (pairs_with(**PAIRS, num_sample=2), "`stages.pairs.options.num_sample`.*did you mean `num_samples`"),
    (pairs_with(model=POLICY), "required: --reward"),
    ({"sft": SFT, "pairs": {"command": "sample-pairs", "config": "x", "options": PAIRS}}, "takes none"),
]


@pytest.mark.parametrize(
    ("stages", "arguments", "message"),
    [
        *((stages, (), message) for stages, message in WRONG),
        ({"sft": SFT}, ("--until", "stf"), "`until: stf` is no stage; did you mean `sft`"),
        ({"sft": SFT}, ("--outputdir", "x"), "`outputdir`.*did you mean `output_dir`"),
        ({"sft": SFT}, ("--stages.sft.settings.max_stepz", "3"), "`max_stepz`.*did you mean `max_steps`"),
    ],
)
def test_wrong_pipelines_are_refused_before_anything_runs(stages, arguments, message, here):
    write(stages)
    commands = Commands()
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        run(commands, *arguments)
    assert commands.lines == [] and not Path("out").exists()


def test_code_of_a_pipeline_from_elsewhere_needs_trust(here, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "pipe.yaml"
    settings = {"reward_funcs": ["mine.length"], "constraints": None}
    stages = {
        "policy": {"command": "constrained-grpo", "config": "constrained_ppo/grpo_playground", "settings": settings}
    }
    elsewhere.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    with pytest.raises(ValueError, match=r"mine \(reward_funcs\).*--trust_recipe_code"):
        read_pipeline(["--config", str(elsewhere)], cli.TRAINING_COMMANDS)
    stages = {"sft": SFT, "pairs": {"command": "sample-pairs", "options": {**PAIRS, "reward": "mine.length"}}}
    elsewhere.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    with pytest.raises(ValueError, match=r"--trust_recipe_code"):
        read_pipeline(["--config", str(elsewhere)], cli.TRAINING_COMMANDS)
    read_pipeline(["--config", str(elsewhere), "--trust_recipe_code"], cli.TRAINING_COMMANDS)


def test_two_at_a_time_are_refused(here):
    write({"sft": SFT})
    lock = RunLock(Path("out"))
    lock.acquire()
    try:
        with pytest.raises(ValueError, match="written to by another run"):
            run(Commands())
    finally:
        lock.release()


def test_the_lock_of_a_dead_pipeline_is_taken_over(here, monkeypatch, caplog):
    from accelerate.state import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})  # a pipeline trains nothing itself
    write({"sft": SFT})
    lock = RunLock(Path("out"))
    lock.acquire()
    lock.path.write_text(json.dumps({**json.loads(lock.path.read_text()), "started": 1.0}))
    assert run(Commands()) == 0
    assert "ended without giving out free" in caplog.text and not lock.path.exists()
    lock.release()


def test_dry_run_and_help(here, capsys):
    write({"sft": SFT, "preference": SPARSE})
    commands = Commands()
    assert run(commands, "--dry_run") == 0
    assert commands.lines == [] and not Path("out").exists()
    said = capsys.readouterr().out
    assert said.count("to run") == 2 and "optim/sft_playground" in said
    assert "\n            sparse-po; " in said and "; reads sft\n" in said and max(map(len, said.splitlines())) <= 80
    assert run(commands, "--until", "sft") == 0 and run(commands, "--dry_run") == 0
    said = capsys.readouterr().out
    assert "done" in said and said.count("to run") == 1
    assert cli.main(["pipeline", "--help"]) == 0
    assert "--overwrite" in capsys.readouterr().out
    assert cli.main(["pipeline"]) == 2 and "`--config` is missing" in capsys.readouterr().err


def test_words_and_references_by_hand():
    options = {"reward_weights": [[1, 0], [0.5, 0.5]], "kl_coefs": [0.1, 0.2], "flag": True, "off": False}
    assert option_words(options) == [
        "--reward_weights", "1,0", "0.5,0.5", "--kl_coefs", "0.1", "0.2", "--flag",
    ]  # fmt: skip
    assert references({"a": ["x${stages.one.output_dir}/y${stages.two.pairs}"], "b": 1, "c": "${other}"}) == [
        ("one", "output_dir"), ("two", "pairs"), ("other", ""),
    ]  # fmt: skip


def test_the_pipeline_of_the_documentation_is_accepted(here):
    page = (Path(cli.__file__).parents[1] / "docs" / "pipeline.md").read_text()
    Path("pipe.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    stages = read_pipeline(["--config", "pipe.yaml"], cli.TRAINING_COMMANDS).stages
    assert [stage.accelerate_config for stage in stages] == ["zero2", None, "zero2"]


def test_the_pipelines_of_the_package_are_accepted(here):
    pipeline = read_pipeline(["--config", "pipeline/playground"], cli.TRAINING_COMMANDS)
    assert [stage.command for stage in pipeline.stages] == [
        "sft", "equilibrium-reward", "sweep", "constrained-grpo", "sample-pairs", "sparse-po",
    ]  # fmt: skip
    assert pipeline.stages[-1].reads() == ["policy", "pairs"]
    assert pipeline.recipe(pipeline.stages[3], now=False)["optim"] == "adamp"
    pipeline = read_pipeline(["--config", "pipeline/qwen3_one_gpu"], cli.TRAINING_COMMANDS)
    assert "dataset_name" not in pipeline.recipe(pipeline.stages[-1])


@pytest.mark.usefixtures("variables_taken_back")
def test_two_real_stages(here, monkeypatch):
    """A training, and pairs sampled from what it has left, each by the command's own code."""
    from trl_ext.scripts import sample_pairs, sft

    model = save_tiny_model(here / "model")
    rows = [{"prompt": "the film", "completion": " was good"}, {"prompt": "a book", "completion": " is dull"}]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model_name_or_path": model, "datasets": [{"path": "json", "data_files": "data.jsonl"}],
                "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "max_length": 16,
                "save_strategy": "steps", "save_steps": 2}  # fmt: skip
    options = {"model": POLICY, "data_files": "data.jsonl", "reward": "trl_ext.playground.count_positive_words",
               "num_samples": 16, "max_completion_length": 64}  # fmt: skip
    write({"sft": {**SFT, "settings": settings}, "pairs": {"command": "sample-pairs", "options": options}})
    parser = sft.make_parser()

    def train(words):
        sft.main(*parser.parse_args_and_config(words[1:]))
        return 0

    monkeypatch.setattr(
        pipeline_command, "run_launcher", lambda words, environment, patience: sample_pairs.main(words[4:])
    )
    assert run(train) == 0
    pairs = [json.loads(line) for line in Path("out/pairs/pairs.jsonl").read_text().splitlines()]
    assert pairs and all(pair.keys() == {"prompt", "chosen", "rejected"} for pair in pairs)
    page = Path("out/report.html").read_text()
    assert "<dt>loss</dt>" in page and "done now" in page
    assert pairs[0]["chosen"].strip()[:20] in page
