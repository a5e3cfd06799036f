"""Recipes that are no YAML, too large, of another type or unsafe: an error with file and line, in no time."""

import os
import sys
import time

import pytest
import yaml

from trl_ext import cli
from trl_ext.scripts import constrained_ppo, sparse_po
from trl_ext.scripts.recipe.named_code import load_function
from trl_ext.scripts.recipe.overrides import apply_overrides
from trl_ext.scripts.recipe.reading import read_recipe
from trl_ext.scripts.recipe.strict_parser import RecipeError


NESTED = "".join(f"{' ' * depth}a:\n" for depth in range(300))
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
BROKEN = {
    "latin-1": ("# a\nrun_name: café".encode("latin-1"), "line 2, is not UTF-8.*0xe9.*Save it as UTF-8"),
    "utf-16": ("beta: 1\n".encode("utf-16"), "line 1, is UTF-16.*Save it as UTF-8"),
    "utf-32": ("beta: 1\n".encode("utf-32"), "line 1, is UTF-32"),
    "date": (b"beta: 1\nrun_name: 2024-13-45\n", "2024-13-45.*no timestamp.*quote it.*line 2"),
    "integer": (b"beta: 1\nseed: " + b"9" * 5000, r"9999.*\(5002 characters\) is no int.*line 2"),
    "brackets": (b"beta: " + b"[" * 3000 + b"]" * 3000, "nested more than 40 deep.*line 1"),
    "mappings": (NESTED.encode(), "nested more than 40 deep.*line 40"),
    "aliases": (BOMB.encode(), "more than 5,000 values.*line 4"),
    "endless": (b"a: &a [*a]\n", "alias inside of its own anchor.*line 1"),
    "keys": ("".join(f"key_{i}: {i}\n" for i in range(50_000)).encode(), "more than 5,000 values.*line 2500"),
    "large": (b"beta: " + b"1" * 2_000_000, "has 2,000,006 bytes, and a recipe at most 1,000,000"),
    "key": (b"beta: 1\n? [a]\n: 1\n", "a key that is a list.*line 2"),
    "sign": (b"beta: 1\nrun_name: \x07\n", "line 2, has a sign that YAML does not allow"),
    "nothing": (b"seed: !!int ''\n", "is no int"),
    "object": (b"beta: !!python/object/apply:os.getcwd []\n", "could not determine a constructor.*line 1"),
    "merged twice": (b"datasets:\n- {<<: {a: 1}, <<: {b: 1}}\n", "given twice.*line 2"),
    "empty": (b"", "must be a mapping"),
}  # fmt: skip


def recipe_of(folder, text):
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name, tmp_path):
    data, message = BROKEN[name]
    path = recipe_of(tmp_path, data)
    start = time.process_time()
    with pytest.raises(RecipeError, match=f"(?s){message}") as error:
        read_recipe(path)
    assert time.process_time() - start < 3 and path in str(error.value) and len(str(error.value)) < 1000


def test_byte_order_mark_and_merge_keys_are_read(tmp_path):
    assert read_recipe(recipe_of(tmp_path, b"\xef\xbb\xbfbeta: 0.5\n"))[0] == {"beta": 0.5}
    text = "datasets:\n  - &first {path: json, split: train}\n  - {<<: *first, data_files: b}\n"
    recipe, lines = read_recipe(recipe_of(tmp_path, text))
    assert recipe["datasets"][1] == {"path": "json", "split": "train", "data_files": "b"}
    assert lines["datasets",] == 1 and lines["datasets", 1, "data_files"] == 3


@pytest.fixture(scope="module")
def parser():
    return constrained_ppo.make_parser()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reward_funcs: myrewards.f", r"line 2 must be of type list\[str\].*Write `reward_funcs: \[myrewards.f\]`"),
        ("reward_funcs: 3", "`reward_funcs: 3`.*line 2 must be of type.*a list of texts"),
        ("reward_funcs: {a: 1}", "line 2 must be of type"),
        ("reward_funcs: [[a]]", "line 2 must be of type"),
        ("constraints: {reward: a}", "line 2 must be of type.*a list of mappings"),
        ("constraints: [a]", r"`constraints\[0\]` in .*, line 2 must be a mapping, got 'a'"),
        ("reward_weights: 0.5", "line 2 must be of type"),
        ("generation_kwargs: [1]", "line 2 must be of type"),
        ("run_name: !!binary aGk=", "line 2 must be of type str"),
        ("datasets: {path: json}", "line 2 must be of type"),
        ("datasets: [{path: [a]}]", "line 2 must be of type"),
        ("vf_coef: auto", "`vf_coef: 'auto'`.*line 2 must be of type"),
        ("gama: 0.9", "`gama`.*line 2; did you mean `gamma`"),
        ("env: {A: null}", "`env.A`.*line 2, has no value.*Write `A: \"\"`"),
        ("env: {A: yes}", "`env.A`.*line 2, is read by YAML as True. Quote"),
        ("env: {A: [1]}", "`env.A`.*must be a text or a number"),
        ("env: {A-B: 1}", "`env.A-B`.*no name of a variable"),
        ('env: {A: "x\\0"}', "no environment variable can hold"),
        ('env: {A: "\\ud800"}', "no environment variable can hold"),
        ("env: {LD_PRELOAD: /tmp/evil.so}", "`env.LD_PRELOAD`.*line 2, decides what code"),
        ("env: {PYTHONPATH: /tmp}", "PYTHONPATH.*decides what code.*Set PYTHONPATH in the shell"),
        ("env: {DYLD_INSERT_LIBRARIES: a}", "decides what code"),
        ("env: {PATH: a}", "decides what code"),
        ("env: {TRL_EXT_HUB_KERNELS: a}", "decides what code"),
        ("env: {LOCAL_KERNELS: a}", "decides what code"),
    ],
)  # fmt: skip
def test_wrong_types_and_environments(text, message, parser, tmp_path):
    with pytest.raises(RecipeError, match=message):
        parser.check(["--config", recipe_of(tmp_path, f"# recipe\n{text}\n"), "--trust_recipe_code"])


def test_many_unknown_keys_are_not_all_listed(parser, tmp_path):
    text = "".join(f"key_{index}: 1\n" for index in range(2000))
    start = time.process_time()
    with pytest.raises(RecipeError, match="and 1980 more"):
        parser.check(["--config", recipe_of(tmp_path, text)])
    assert time.process_time() - start < 3


@pytest.mark.usefixtures("variables_taken_back")
def test_one_text_is_a_list_where_trl_says_so(tmp_path):
    path = recipe_of(tmp_path, "use_cpu: true\nbf16: false\noutput_dir: out\nloss_type: ipo\nreport_to: none\n")
    training = sparse_po.make_parser().parse_args_and_config(["--config", path])[1]
    assert training.loss_type == ["ipo"] and training.report_to == []


@pytest.mark.parametrize(("stated", "arguments"), [("false", []), ("true", ["--bf16", "False"])])
@pytest.mark.usefixtures("variables_taken_back")
def test_the_recipes_precision_wins_over_the_launchers(stated, arguments, tmp_path):
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `ddp.yaml` and the like set it
    path = recipe_of(tmp_path, f"use_cpu: true\noutput_dir: out\nbf16: {stated}\n")
    training = sparse_po.make_parser().parse_args_and_config(["--config", path, *arguments])[1]
    assert training.bf16 is False and training.mixed_precision == "no"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.parametrize(("given", "read"), [("all", "all"), ("true", "all"), ('"no"', "no")])
def test_a_text_beside_a_flag_is_read(given, read, tmp_path):
    """transformers' own parser takes a field of both types for a flag."""
    text = f"include_num_input_tokens_seen: {given}\noutput_dir: out\nuse_cpu: true\nbf16: false\n"
    training = sparse_po.make_parser().parse_args_and_config(["--config", recipe_of(tmp_path, text)])[1]
    assert training.include_num_input_tokens_seen == read


def test_an_unstated_precision_is_the_launchers(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert sparse_po.make_parser().check(["--config", recipe_of(tmp_path, "beta: 0.1\n")]) == {}


LENGTH = {"reward": "length", "threshold": 200}


@pytest.fixture
def hints(parser):
    return parser._field_types()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--constraints", '[{"reward": "length", "threshold": 200}]'], [LENGTH]),
        (["--constraints={reward: length, threshold: 200}"], [LENGTH]),
        (["--constraints", "{reward: length, threshold: 200}", "{reward: b}"], [LENGTH, {"reward": "b"}]),
        (["--constraints.0.threshold", "0.5"], [{"reward": "a", "threshold": 0.5}]),
        (["--constraints.0.threshold=1e-3"], [{"reward": "a", "threshold": 1e-3}]),
        (["--constraints.1.reward", "b", "--constraints.1.threshold", "2"],
         [{"reward": "a", "threshold": 1}, {"reward": "b", "threshold": 2}]),
    ],
)  # fmt: skip
def test_nested_fields_of_the_command_line(arguments, found, hints):
    recipe, rest = {"constraints": [{"reward": "a", "threshold": 1}]}, [*arguments, "--seed", "3"]
    apply_overrides(recipe, rest, hints)
    assert recipe == {"constraints": found} and rest == ["--seed", "3"]


def test_other_nested_fields_and_data_files(hints):
    recipe: dict = {"datasets": [{"path": "json", "data_files": "a"}], "env": {"A": "1"}}
    apply_overrides(recipe, ["--data_files", "b.jsonl", "--env.B", "2", "--search.tolerance", "0.1"], hints)
    assert recipe == {
        "datasets": [{"path": "json", "data_files": "b.jsonl"}],
        "env": {"A": "1", "B": 2},
        "search": {"tolerance": 0.1},
    }  # fmt: skip
    arguments = ["--dataset_name", "mine"]
    apply_overrides(recipe, arguments, hints)
    assert "datasets" not in recipe and arguments == ["--dataset_name", "mine"]
    apply_overrides(recipe, ["--data_files=c.csv"], hints)
    assert recipe["datasets"] == [{"path": "csv", "data_files": "c.csv"}]


def test_a_file_takes_the_place_of_a_data_set_of_the_hub(hints, tmp_path):
    """A file that is not there is one of the data set's own, on the Hub."""
    (tmp_path / "reviews.jsonl.gz").touch()
    here = str(tmp_path / "reviews.jsonl.gz")
    for files, path in ((here, "json"), ("plain/train.parquet", "stanfordnlp/imdb")):
        recipe: dict = {"datasets": [{"path": "stanfordnlp/imdb", "columns": ["text"]}]}
        apply_overrides(recipe, ["--data_files", files], hints)
        assert recipe["datasets"] == [{"path": path, "columns": ["text"], "data_files": files}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--constraints"], "needs a value"),
        (["--constraints", "[{"], "neither JSON nor YAML"),
        (["--constraints.3.reward", "b"], "`constraints` has 1 entries.*'3' is none.*or 1 for a new one"),
        (["--constraints.x.reward", "b"], "'x' is none"),
        (["--constraints.0.threshold.x", "b"], "`constraints.0.threshold` is 1, which has no parts"),
        (["--data_files", "b.xls.gz"], "must end in one of"),
    ],
)
def test_wrong_nested_fields(arguments, message, hints):
    with pytest.raises(RecipeError, match=message):
        apply_overrides({"constraints": [{"reward": "a", "threshold": 1}]}, arguments, hints)


def test_constraints_of_the_command_line_reach_the_configuration(tmp_path):
    text = "use_cpu: true\nbf16: false\nmethod: xi\nreward_funcs: [trl_ext.playground.sentiment_reward]\n"
    arguments = ["--config", recipe_of(tmp_path, f"{text}output_dir: {tmp_path}\n"), "--constraints"]
    arguments += ['[{"reward": "sentiment_reward", "threshold": 1}]', "--constraints.0.threshold", "0.5"]
    training = constrained_ppo.make_parser().parse_args_and_config(arguments)[1]
    assert training.constraints == [{"reward": "sentiment_reward", "threshold": 0.5, "kind": "=="}]
    with pytest.raises(RecipeError, match="`gamma` must be a number"):
        constrained_ppo.make_parser().parse_args_and_config([*arguments, "--gamma", "2"])


def test_a_recipe_from_elsewhere_needs_trust(tmp_path, monkeypatch, parser):
    path = recipe_of(tmp_path, "reward_funcs: [myrewards.length, trl_ext.playground.sentiment_reward]\n")
    with pytest.raises(RecipeError, match="line 1, lies outside.*the module myrewards .*--trust_recipe_code"):
        parser.check(["--config", path])
    parser.check(["--config", path, "--trust_recipe_code"])
    assert parser.named_code == ["the module myrewards (reward_funcs)"]
    parser.check([f"--config={path}", "--trust_recipe_code=true"])
    monkeypatch.chdir(tmp_path)
    parser.check(["--config", path])
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    code = recipe_of(tmp_path, "trust_remote_code: true\n")
    with pytest.raises(RecipeError, match="code from the model's repository"):
        parser.check(["--config", code])
    parser.check(["--config", recipe_of(tmp_path, "reward_funcs: [owner/model]\n")])


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "our_rewards.py").write_text("def length(**batch):\n    return []\n")
    (tmp_path / "needs_more.py").write_text("import not_installed_here\n")
    (tmp_path / "broken_rewards.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("our_rewards", "needs_more", "broken_rewards"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("our_reward.length", "no module 'our_reward'; did you mean 'our_rewards'.*owner/name"),
        ("our_rewards.lenght", "no function 'lenght'; did you mean 'length'"),
        ("needs_more.f", "imports 'not_installed_here', which is not installed"),
        ("broken_rewards.f", "cannot be imported: SyntaxError"),
        ("trl_ext.playgroun.f", "no module 'trl_ext.playgroun'; did you mean 'trl_ext.playground'"),
    ],
)
def test_rewards_that_cannot_be_loaded_say_why(name, message, modules):
    with pytest.raises(RecipeError, match=f"`reward_funcs: {name}`.*{message}"):
        constrained_ppo.load_reward(name)


def test_what_is_imported_is_said_before(modules, capsys):
    assert load_function("our_rewards.length", "gold_reward")() == []
    assert "`gold_reward: our_rewards.length`: importing the module our_rewards." in capsys.readouterr().err
    assert constrained_ppo.load_reward("owner/model.v2") == "owner/model.v2"
    assert constrained_ppo.load_reward("gpt2") == "gpt2"


def test_unknown_commands_get_a_suggestion(capsys):
    assert cli.main(["constrained_pp"]) == 2
    assert "Did you mean `constrained-ppo`?" in capsys.readouterr().err


def test_the_command_says_what_will_be_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run_launcher", lambda *arguments: 0)
    settings = {"reward_funcs": ["myrewards.length"], "model_name_or_path": "x", "dataset_name": "x"}
    path = recipe_of(tmp_path, yaml.safe_dump(settings))
    assert cli.main(["constrained-ppo", "--config", path]) == 2
    assert "--trust_recipe_code" in capsys.readouterr().err
    assert cli.main(["constrained-ppo", "--config", path, "--trust_recipe_code"]) == 0
    assert "This run imports the module myrewards (reward_funcs)." in capsys.readouterr().err


def test_the_command_takes_what_the_script_takes(tmp_path, monkeypatch):
    """Parts of lists, and TRL's own configurations, which have no `save_on_signal`."""
    monkeypatch.setattr(cli, "run_launcher", lambda *arguments: 0)
    loaded = "model_name_or_path: x\ndataset_name: x\n"
    constrained = "reward_funcs: [x/reward]\nconstraints: [{reward: a, threshold: 1}]\n"
    path = recipe_of(tmp_path, loaded + constrained)
    assert cli.main(["constrained-ppo", "--config", path, "--constraints.0.threshold", "2"]) == 0
    assert cli.main(["sft", "--config", recipe_of(tmp_path, loaded + "seed: 1\n")]) == 0
