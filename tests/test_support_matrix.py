"""The table of the support matrix is that of the tests' names."""

import re

import pytest

from tests import support_matrix


def test_the_page_is_up_to_date():
    """Otherwise: python -m tests.support_matrix."""
    assert support_matrix.PAGE.read_text(encoding="utf-8") == support_matrix.page()
    cells = [cell for row in support_matrix.table().splitlines()[2:] for cell in row.strip("| ").split(" | ")[1:]]
    assert len(cells) == len(support_matrix.CELLS) * len(support_matrix.METHODS)
    for cell in cells:  # Nothing is untested, and no dash leaves a reader guessing
        assert re.fullmatch(r"(refused: )?\[[^]]+\]\(\.\./tests/\w+(/\w+)*\.py\)", cell), cell


def test_a_cell_without_its_test_is_refused(monkeypatch):
    for cell, named in (
        ("test_cli::test_that_nobody_wrote", "test_that_nobody_wrote"),
        ("test_cli", "without a name"),
    ):
        monkeypatch.setitem(support_matrix.CELLS, "one process", (cell,) * 5)
        with pytest.raises(LookupError, match=f"tests/test_cli.py has no test {named}"):
            support_matrix.table()
