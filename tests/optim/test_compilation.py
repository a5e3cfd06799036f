"""The compiled library in the cache folder: what is loaded, what is built again, and what is said."""

import logging
import os
import shutil
import sys

import pytest

from trl_ext.optim.kernels import compilation


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Builds in a folder of its own, by a compiler that only copies what the real one made once."""
    if compilation.compiled_library() is None:
        pytest.skip("no C compiler")
    made = tmp_path / "made.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    calls = tmp_path / "calls"
    script = tmp_path / "own cc.py"
    script.write_text(
        "import pathlib, shutil, subprocess, sys\n"
        "if '--version' in sys.argv:\n    print('own'), sys.exit()\n"
        f"made, calls = pathlib.Path({str(made)!r}), pathlib.Path({str(calls)!r})\n"
        "calls.write_text((calls.read_text() if calls.exists() else '') + 'x')\n"
        "target = sys.argv[sys.argv.index('-o') + 1]\n"
        f"made.exists() or subprocess.run([{compiler!r}, *[a if a != target else str(made) for a in sys.argv[1:]]])\n"
        "shutil.copy(made, target)\n"
    )
    monkeypatch.setenv("CC", f'{sys.executable} "{script}"')  # Several words, as of `ccache gcc`
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def build():
        compilation._build.cache_clear()
        loaded = compilation._build()
        assert not isinstance(loaded, str), loaded
        assert loaded.adamp_step and loaded.adamp_update_weights
        return len(calls.read_text()), tmp_path / "cache" / "trl_ext" / "kernels"

    yield build
    compilation._build.cache_clear()


def test_only_what_was_written_is_loaded(built, caplog):
    with caplog.at_level(logging.INFO):
        count, folder = built()
        assert count == 1 and "compiled into" in caplog.text
        assert built()[0] == 1 and f"from {folder}" in caplog.text
    (found,) = folder.glob("*.so")
    right = found.read_bytes()
    for number, wrong in enumerate((b"", right[: len(right) // 2], right[:-1] + b"x"), start=2):
        found.unlink()  # The file that is loaded stays as it is
        found.write_bytes(wrong)
        found.chmod(0o700)
        assert built()[0] == number
        assert found.read_bytes() == right
    (checksum,) = folder.glob("*.sha256")
    checksum.write_bytes(b"\xff\xfe")
    assert built()[0] == 5
    assert sorted(path.suffix for path in folder.iterdir()) == [".sha256", ".so"]


def test_files_of_others_are_not_loaded(built, caplog):
    _, folder = built()
    (found,) = folder.glob("*.so")
    found.chmod(0o722)  # Anybody may have written it
    assert built()[0] == 2
    if os.getuid() == 0:
        os.chown(found, 12345, 12345)
        assert built()[0] == 3 and found.stat().st_uid == 0
    folder.chmod(0o777)
    with caplog.at_level(logging.INFO):
        assert built()[0] >= 3
    assert "compiled for this process alone" in caplog.text and "others can write to it" in caplog.text


def test_the_reason_for_torchs_kernels_is_said(monkeypatch, caplog):
    monkeypatch.setenv("CC", "/nonexistent/cc")
    compilation._build.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert "/nonexistent/cc" in compilation._build()
    finally:
        compilation._build.cache_clear()
    assert "torch's own kernels, since" in caplog.text
