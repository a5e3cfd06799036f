"""What bash completes, asked of bash."""

import contextlib
import io
import shutil
import subprocess

import pytest

from trl_ext import cli


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["completion"]) == 0
    path = tmp_path_factory.mktemp("completion") / "trl-ext.bash"
    path.write_text(out.getvalue())
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("trl-ext spa", ["sparse-po"]),
        ("trl-ext sparse-po --mask_l", ["--mask_learning_rate", "--mask_l1_reward", "--mask_l1_divergence"]),
        ("trl-ext sparse-po --mask_init p", ["positive", "paper"]),
        ("trl-ext constrained-ppo --accelerate_config zero", ["zero1", "zero2", "zero3"]),
        ("trl-ext dpo --config sparse_po/play", ["sparse_po/playground"]),
        ("trl-ext recipes sh", ["show"]),
        ("trl-ext grpo --dry", ["--dry_run"]),
        ("trl-ext sparse-po --gae", []),
    ],
)
def test_bash_completes(words, found, script):
    ask = f"source {script}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _trl_ext"
    ask += '; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == found
