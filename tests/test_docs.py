"""Commands and code of README, docs and recipes are what the project has."""

import ast
import importlib
import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest

import trl_ext
from trl_ext import cli
from trl_ext.plan.command import make_parser as plan_parser
from trl_ext.scripts.recipe.packaged import find_packaged, header_of


ROOT = Path(trl_ext.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(language):
    found = []
    for page in PAGES:
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL):
            found.append(pytest.param(block, id=f"{page.stem}-{len(found)}"))
    return found


def check_command(words, capsys):
    if words[:1] == ["make"]:
        assert words[1] in TARGETS
    elif words[:1] == ["trl-ext"] and words[1] in cli.TRAINING_COMMANDS:
        module = cli.TRAINING_COMMANDS[words[1]]
        if {"--print_config", "--dry_run"} & set(words):
            assert cli.main(words[1:]) == 0
            return
        command = cli.launch_command(module, words[2:])
        importlib.import_module(module).make_parser().check(command[command.index(module) + 1 :])
    elif words[:2] == ["trl-ext", "proxy-points"] or words[2:3] == ["trl_ext.scripts.proxy_points"]:
        options = words[2:] if words[0] == "trl-ext" else words[3:]
        importlib.import_module("trl_ext.scripts.proxy_points").make_parser().parse_args(options)
    elif words[:2] == ["trl-ext", "data"]:
        importlib.import_module("trl_ext.scripts.hub_data").make_parser().parse_args(words[2:])
    elif words[:2] == ["trl-ext", "plan"]:
        # The command itself wants the model's config.json; tests/test_plan.py runs it
        options, rest = plan_parser(list(cli.TRAINING_COMMANDS)).parse_known_args(words[2:])
        recipe = find_packaged(options.config)
        module = cli.TRAINING_COMMANDS[header_of(recipe).command.split()[1]]
        importlib.import_module(module).make_parser().check(["--config", options.config, *rest])
    elif words[:2] == ["trl-ext", "sweep"]:
        importlib.import_module("trl_ext.scripts.sweep").make_parser().parse_known_args(words[2:])
    elif words[:2] == ["trl-ext", "sample-pairs"]:
        importlib.import_module("trl_ext.scripts.sample_pairs").make_parser().parse_args(words[2:])
    elif words[:2] == ["trl-ext", "pipeline"]:
        assert cli.main([*words[1:], *(["--dry_run"] if "--dry_run" not in words else [])]) == 0
    elif words[:1] == ["trl-ext"]:
        assert cli.main(words[1:]) == 0
        assert capsys.readouterr().out
    elif words[:2] == ["accelerate", "launch"]:
        assert Path(words[words.index("--config_file") + 1]).is_file()
        module = words[words.index("-m") + 1]
        importlib.import_module(module).make_parser().check(words[words.index("-m") + 2 :])
    elif words[:1] == ["torchrun"]:
        importlib.import_module(words[words.index("-m") + 1])
    elif words[:2] == ["python", "-m"]:
        module = importlib.import_module(words[2])
        if hasattr(module, "make_parser"):
            parser = module.make_parser()
            (parser.check if hasattr(parser, "check") else parser.parse_args)(words[3:])
    else:
        assert words[:2] == ["pip", "install"], words


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands(block, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    assert lines
    for line in lines:
        check_command(shlex.split(line), capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_table_has_an_empty_line_before_and_after_it(page):
    """What follows a row at once is a row of the table in the site, a picture too."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for line, following in itertools.pairwise(text.splitlines()):
        if line.startswith("|") != following.startswith("|"):
            assert not (line and following), (line, following)


def test_modules_that_make_runs():
    modules = re.findall(r" -m (tests\.[a-z_.]+)", (ROOT / "Makefile").read_text())
    assert len(modules) == 10
    assert all(importlib.util.find_spec(name) for name in modules)


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda recipe: f"{recipe.parent.name}-{recipe.stem}"
)
def test_commands_in_the_header_of_a_recipe(recipe, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    header = recipe.read_text().split("# Run:")[1].split("# Hardware:")[0]
    header = re.sub(r"\n#", "\n", header.replace("\\\n#", " "))
    lines = [line.strip().removeprefix("or: ") for line in header.splitlines()]
    commands = [line for line in lines if line.startswith(("trl-ext ", "accelerate ", "python "))]
    assert commands and all(str(recipe.relative_to(ROOT)) in command for command in commands)
    for command in commands:
        check_command(shlex.split(command), capsys)


# A test runs all of it, so that its blocks may go on from one another
RUN_WHOLE = (ROOT / "docs" / "equilibrium_plain_torch.md").read_text()
# Trainers and tools that are no dependency, not even of the tests
OTHERS = ("axolotl", "kernels", "llamafactory", "swift")


@pytest.mark.parametrize("block", blocks("python"))
def test_code_compiles_and_its_imports_exist(block):
    tree = ast.parse(block)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imports or block in RUN_WHOLE
    for node in imports:
        if node.module.split(".")[0] in OTHERS:
            continue
        module = importlib.import_module(node.module)
        for name in node.names:
            assert hasattr(module, name.name), name.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    assert all((page.parent / target).exists() for target in targets), targets


def test_every_field_and_metric_is_explained():
    from trl import DPOConfig, GRPOConfig

    text = (ROOT / "docs" / "sparse_po.md").read_text() + (ROOT / "recipes" / "sparse_po" / "README.md").read_text()
    text += "".join(path.read_text() for path in (ROOT / "recipes" / "sparse_po").glob("*.yaml"))
    own = set(trl_ext.SparsePOConfig.__dataclass_fields__) - set(DPOConfig.__dataclass_fields__)
    assert {name for name in own if name not in text} <= {"mask_reward", "mask_divergence"}
    assert all(name in trl_ext.SparsePOConfig.__doc__ for name in own)
    own = set(trl_ext.ConstrainedPPOConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__)
    assert own and all(name in trl_ext.ConstrainedPPOConfig.__doc__ for name in own)


def test_every_setting_and_metric_of_proxy_points_and_search_is_explained():
    from trl_ext.constrained_ppo.threshold_search.config import ThresholdSearchConfig
    from trl_ext.scripts.proxy_points import make_parser

    text = (ROOT / "docs" / "proxy_points_and_search.md").read_text()
    for name in ThresholdSearchConfig.__dataclass_fields__:
        assert f"`{name}`" in text and f"{name} (`" in str(ThresholdSearchConfig.__doc__), name
    options = [option for action in make_parser()._actions for option in action.option_strings if option != "-h"]
    assert {option for option in options if f"`{option}`" not in text} == {"--help"}
    source = (ROOT / "trl_ext" / "constrained_ppo" / "threshold_search" / "callback.py").read_text()
    keys = set(re.findall(r'"(search/[a-z_]+)(?:/\{name\})?"', source))
    assert len(keys) == 8 and all(f"`{key}" in text for key in keys)


def test_files_and_functions_that_the_architecture_names_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([a-z_/]+\.py)(?::(\w+))?`", text)
    assert len(named) > 30
    for file, name in named:
        path = next((p for p in (ROOT / "trl_ext" / file, ROOT / file) if p.is_file()), None)
        assert path, file
        nodes = list(ast.walk(ast.parse(path.read_text())))
        found = {node.name for node in nodes if hasattr(node, "name")}
        found |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        assert not name or name in found, (file, name)
