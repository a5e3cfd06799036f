"""The recipes of the package: found by name, copied, and carried by the wheel."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trl_ext
from trl_ext import cli
from trl_ext.scripts import sparse_po
from trl_ext.scripts.recipe.packaged import find_packaged, header_of, packaged_recipes
from trl_ext.scripts.recipe.strict_parser import RecipeError, load_recipe


ROOT = Path(trl_ext.__file__).parents[1]


def test_names_commands_hardware_and_titles(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(packaged_recipes())
    entry = lines.index("sparse_po/playground")
    title = "SparsePO with a common learned mask on the playground: a small world where the truth is known"
    assert " ".join(line.strip() for line in lines[entry + 1 : entry + 3]) == title
    assert lines[entry + 3].strip() == "trl-ext sparse-po, 2 CPU cores"
    assert max(map(len, lines)) <= 80 and not any("experiments" in line for line in lines)
    assert all(all(header_of(path)) for path in packaged_recipes().values())


def test_show(capsys):
    assert cli.main(["recipes", "show", "sparse_po/playground"]) == 0
    assert capsys.readouterr().out == packaged_recipes()["sparse_po/playground"].read_text()
    assert cli.main(["recipes", "show", "sparse_po/playgruond"]) == 2
    assert "Did you mean `sparse_po/playground`?" in capsys.readouterr().err
    assert cli.main(["recipes", "show"]) == 2
    assert "takes the name of a recipe" in capsys.readouterr().err


def test_links_of_the_package_page():
    package_page = runpy.run_path(str(ROOT / "setup.py"))["package_page"]
    text = "[a](docs/a.md), [b](https://b.org/b) and [c](#c)"
    assert package_page(text, None) == "a, [b](https://b.org/b) and [c](#c)"
    assert package_page(text, "https://x.org/y/").startswith("[a](https://x.org/y/blob/main/docs/a.md), [b](https://b")


@pytest.mark.parametrize("end", ["", ".yaml"])
@pytest.mark.parametrize("start", ["", "recipes/"])
def test_config_finds_a_packaged_recipe(start, end, tmp_path, monkeypatch):
    name = f"{start}sparse_po/playground{end}"
    monkeypatch.chdir(tmp_path)
    assert sparse_po.make_parser().check(["--config", name]) == {}
    assert load_recipe(name)["dataset_name"] == "playground"
    # A file of that name goes first
    (tmp_path / "sparse_po").mkdir()
    (tmp_path / "sparse_po" / "playground").write_text("beta: 0.5")
    assert load_recipe("sparse_po/playground") == {"beta": 0.5}


def test_a_packaged_deepspeed_config_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(load_recipe("optim/dpo_gemma3_zero3_offload")["deepspeed"]).is_file()


@pytest.mark.parametrize("name", ["sparse_po/nothing", "../trl_ext/cli.py", "sparse_po", ""])
def test_other_names_are_none(name):
    assert find_packaged(name) is None
    with pytest.raises(RecipeError, match="is not a file.*trl-ext recipes"):
        load_recipe(name)


def test_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "copy", "optim/dpo_gemma3_zero3_offload", "mine"]) == 0
    copies = [Path("mine/dpo_gemma3_zero3_offload.yaml"), Path("mine/deepspeed_zero3_offload.json")]
    assert capsys.readouterr().out.splitlines() == [f"Written: {path}" for path in copies]
    original = ROOT / "recipes" / "optim" / "dpo_gemma3_zero3_offload.yaml"
    assert load_recipe(copies[0]) == {**load_recipe(original), "deepspeed": str(copies[1])}
    assert copies[1].read_text() == original.with_name(copies[1].name).read_text()
    assert "--config mine/dpo_gemma3_zero3_offload.yaml" in copies[0].read_text()
    assert cli.main(["recipes", "copy", "optim/dpo_gemma3_zero3_offload", "mine"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["recipes", "copy", "sparse_po/playground"]) == 0
    assert load_recipe("playground.yaml") == load_recipe("sparse_po/playground")


@pytest.mark.parametrize(
    ("arguments", "message"), [(["nothing"], "nothing is not a recipe"), ([], "the name of a recipe")]
)
def test_wrong_copies_are_refused(arguments, message, capsys):
    assert cli.main(["recipes", "copy", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_wheel_carries_the_recipes_and_no_experiment(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("trl_ext", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, cwd=source, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with zipfile.ZipFile(source / done.stdout.splitlines()[-1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
        wheel.extractall(site)
    recipes = {f"trl_ext/{path.relative_to(ROOT).as_posix()}" for path in packaged_recipes().values()}
    beside = {f"trl_ext/recipes/{name}" for name in ("launch.slurm", "optim/deepspeed_zero3_offload.json")}
    files = (path for path in (ROOT / "trl_ext").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert names == recipes | beside | {path.relative_to(ROOT).as_posix() for path in files}
    assert "Project-URL: SparsePO, https://huggingface.co/papers/2410.05102" in metadata
    assert "# trl_ext" in metadata and re.findall(r"\]\((?!https:)[^)]*\)", metadata) == []
    command = [sys.executable, "-m", "trl_ext.cli", "recipes"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    listed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    names = [line for line in listed.stdout.splitlines() if not line.startswith(" ")]
    assert names == list(packaged_recipes())
