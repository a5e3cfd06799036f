"""The notebooks of the documentation run, cell by cell, say what they say and show what they have stored."""

import json
import math
import re

import pytest

from tests import notebooks


def run(name):
    """Runs a notebook; what its cells leave. What they show is what is stored, but for the last digits of numbers."""
    path = notebooks.FOLDER / name
    found, names = notebooks.run(path)
    stored = json.loads(path.read_text())
    for new, old in zip(found["cells"], stored["cells"], strict=True):
        if old["cell_type"] == "code":
            assert old["execution_count"] == new["execution_count"], "run python -m tests.notebooks"
            same_outputs(new["outputs"], old["outputs"])
    return names


def same_outputs(found, stored):
    assert [output["output_type"] for output in found] == [output["output_type"] for output in stored]
    for new, old in zip(found, stored, strict=True):
        assert new.get("data", {}).keys() == old.get("data", {}).keys()
        (words, numbers), (old_words, old_numbers) = map(words_and_numbers, (text_of(new), text_of(old)))
        assert words == old_words and numbers == pytest.approx(old_numbers, rel=0.02, abs=2e-3)


def text_of(output):
    return "".join(output.get("text") or output["data"]["text/plain"])


def words_and_numbers(text):
    pattern = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    return re.sub(pattern, "#", text), [float(number) for number in re.findall(pattern, text)]


def test_every_notebook_is_run():
    assert {path.name for path in notebooks.FOLDER.iterdir()} == {"sparse_po.ipynb", "multipliers.ipynb"}


@pytest.mark.parametrize("name", ["sparse_po.ipynb", "multipliers.ipynb"])
def test_a_reader_sees_what_the_cells_show(name):
    """Numbers, lines of text that fit a page, a picture; no path of a machine."""
    cells = json.loads((notebooks.FOLDER / name).read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    shown = "".join(map(text_of, outputs))
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1 and re.search(r"0\.\d", shown)
    assert not re.search(r"(^|[\s'\"])/\w+/|\w:\\\\", shown) and max(map(len, shown.splitlines())) < 160


def test_a_changed_output_is_seen():
    stored = [{"output_type": "stream", "name": "stdout", "text": ["loss 0.693\n"]}]
    same_outputs([{"output_type": "stream", "name": "stdout", "text": ["loss 0.6931\n"]}], stored)
    for text in ("loss 0.5\n", "kl 0.693\n", "loss 0.693 1\n"):
        with pytest.raises(AssertionError):
            same_outputs([{"output_type": "stream", "name": "stdout", "text": [text]}], stored)


def test_sparse_po():
    found = run("sparse_po.ipynb")
    first, *_, last = found["history"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and first["kl/chosen"] == pytest.approx(0, abs=1e-5)
    assert last["kl/chosen"] > 0 and all(0.3 < entry["mask/reward/mean"] < 3 for entry in found["history"])
    assert len(found["weighted"]) > 10


def test_multipliers():
    found = run("multipliers.ipynb")
    integral, default = found["found"]["integral alone"], found["found"]["default"]
    assert default["reached"] < 0.5 * integral["reached"]
    for ended in (integral, default):
        assert ended["mean"] == pytest.approx(found["THRESHOLD"], abs=0.05)
    assert integral["weight"] == pytest.approx(found["low"], rel=0.25)
