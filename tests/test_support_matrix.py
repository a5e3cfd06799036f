"""The table of the support matrix is that of the tests' names."""

import pytest

from tests import support_matrix


def test_the_page_is_up_to_date():
    """Otherwise: python -m tests.support_matrix."""
    assert support_matrix.PAGE.read_text(encoding="utf-8") == support_matrix.page()
    assert support_matrix.table().count("](../tests/") > 50


def test_a_cell_without_its_test_is_refused(monkeypatch):
    cells = ("test_cli::test_that_nobody_wrote", *[support_matrix.NONE] * 4)
    monkeypatch.setitem(support_matrix.CELLS, "one process", cells)
    with pytest.raises(LookupError, match="tests/test_cli.py has no test test_that_nobody_wrote"):
        support_matrix.table()
