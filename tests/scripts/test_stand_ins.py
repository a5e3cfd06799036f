"""Stand-ins of configuration classes are their classes: fields, types, defaults, choices and help of every command."""

import importlib
import subprocess
import sys

import pytest

from trl_ext.cli import TRAINING_COMMANDS
from trl_ext.core.checks import described
from trl_ext.optim.names import _OPTIMIZERS
from trl_ext.scripts.recipe import stand_ins
from trl_ext.scripts.recipe.stand_ins import CLASSES, OWN_OPTIMIZERS, light_parser


def options(parser):
    """What the parser takes, as values that do not depend on which class stands behind them."""
    return [
        (
            action.option_strings,
            action.dest,
            getattr(action.default, "value", action.default),
            # Names of optimizers are registered in any order
            None if action.choices is None else sorted(getattr(choice, "value", choice) for choice in action.choices),
            getattr(action.type, "__name__", None),
            action.nargs,
            action.const,
            action.required,
            action.help,
        )
        for action in parser._actions
    ]


def test_every_command_has_stand_ins():
    assert {f"trl_ext.scripts.{name}" for name in CLASSES} == set(TRAINING_COMMANDS.values())
    assert set(_OPTIMIZERS) == set(OWN_OPTIMIZERS)


@pytest.mark.parametrize("module", TRAINING_COMMANDS.values())
def test_stand_ins_equal_their_classes(module):
    light, real = light_parser(module), importlib.import_module(module).make_parser()
    assert light is not None
    for a, b in zip(options(light), options(real), strict=True):
        # transformers knows no type of it with an accelerate that is older than it wants
        assert a == b or (a[1] == "parallelism_config" and b[4] == "Any" and a[:4] + a[5:] == b[:4] + b[5:])
    hints = [{name: described(hint) for name, hint in parser._field_types().items()} for parser in (light, real)]
    assert list(hints[0]) == list(hints[1])
    differing = {name for name in hints[0] if hints[0][name] != hints[1][name]}
    assert differing <= {"optim", "parallelism_config"}  # names that are ours, and as above


def test_source_that_cannot_be_read_leaves_the_scripts_own_parser(monkeypatch):
    monkeypatch.setitem(CLASSES, "sparse_po", (("trl", "NoSuchClass"),))
    assert light_parser("trl_ext.scripts.sparse_po") is None
    assert light_parser("trl_ext.scripts.nothing") is None


def test_of_two_assignments_in_a_class_the_last_holds(tmp_path, monkeypatch):
    folder = tmp_path / "made_for_stand_ins"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from dataclasses import dataclass, field\nfrom typing import Literal\nimport nothing_of_the_kind\n"
        "NAMES = ('a', 'b')\n@dataclass\nclass Settings:\n    start = 1\n    if nothing_of_the_kind:\n"
        "        start = 2\n    size: int = field(default=start, metadata={'help': f'{NAMES[1]}'})\n"
        "    kind: Literal['x', 'y'] | None = None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made = stand_ins._Module("made_for_stand_ins")["Settings"]
    size = made.__dataclass_fields__["size"]
    assert (made().size, made().kind, size.metadata["help"]) == (2, None, "b")
    assert made.__annotations__["kind"].__args__[0].__args__ == ("x", "y")


LIGHT = """
import sys
from trl_ext import cli
assert cli.main(["sparse-po", "--help"]) == 0
assert cli.main(["constrained-ppo", "--config", "constrained_ppo/playground", "--gama", "1"]) == 2
assert cli.main(["dpo", "--config", "nowhere.yaml"]) == 2
assert cli.main(["sparse-po"]) == 2
assert cli.main(["sparse-po", "--config", "sparse_po/playground", "--dry_run"]) == 0
assert cli.main(["sparse-po", "--config", "sparse_po/playground", "--print_config"]) == 0
print("torch" in sys.modules)
"""


def test_refusals_help_and_previews_come_before_torch(tmp_path):
    """An import of torch takes 3 seconds of processor time; the answers here together take less."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    for text in ("did you mean `gamma`", "nowhere.yaml` is not a file", "`model_name_or_path` is missing"):
        assert text in done.stderr
