"""Log queries, figures and field checks."""

from types import SimpleNamespace

import pytest

from trl_ext.core.checks import Range, check_choice, check_value
from trl_ext.core.figures import new_axes, save_figure
from trl_ext.core.log import best_value, last_value, reward_names, series


LOG = [{"step": 1, "loss": 2.0}, {"step": 2, "eval": 1}, {"step": 3, "loss": 0.0, "eval": None}]


def test_log_queries():
    assert series(LOG, "loss") == ([1, 3], [2.0, 0.0])
    assert last_value(LOG, "loss") == 0.0
    assert last_value(LOG, "eval") == 1.0
    assert last_value(LOG, "other") is None and series([], "loss") == ([], [])


def test_best_value_and_names_of_rewards():
    gold = [{"step": s, "gold": value} for s, value in ((1, 0.5), (2, float("nan")), (3, 0.75), (4, 0.75))]
    assert best_value(gold, "gold") == (3, 0.75)
    assert best_value([], "gold") is None and best_value(gold[1:2], "gold") is None
    entries = [{"rewards/old/mean": 1.0}, {"rewards/x/y/mean": 0.0, "rewards/x/y/std": 1.0, "rewards/a/mean": 2.0}, {}]
    assert reward_names(entries) == ["x/y", "a"] and reward_names(entries[2:]) == []


def test_figure_is_written_whole_and_leaves_no_other_file(tmp_path):
    figure, panels = new_axes(1, 2, sharey=True)
    panels[0].plot([0, 1], [1, 2])
    save_figure(figure, tmp_path / "new" / "a.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    assert (tmp_path / "new" / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert not panels[0].spines["top"].get_visible()


def test_failed_figure_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        save_figure(SimpleNamespace(savefig=_fail), path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def _fail(path, format):
    path.write_bytes(b"half")
    raise RuntimeError("disk full")


@pytest.mark.parametrize("value", ["lerned", True, None, 1])
def test_choice(value):
    owner = SimpleNamespace(mask=value)
    with pytest.raises(ValueError, match=r"`mask` must be one of 'learned', 'ones', got .*\. Choose one\."):
        check_choice(owner, "mask", choices=("learned", "ones"), remedy="Choose one.")
    check_choice(SimpleNamespace(mask="ones"), "mask", choices=("learned", "ones"))


@pytest.mark.parametrize("value", [-1, 1, 1.5, float("nan"), float("inf"), "0.5", None, True, [0.5]])
def test_number_out_of_range(value):
    with pytest.raises(ValueError, match="`gamma` must be a number of at least 0 and smaller than 1, got"):
        check_value("gamma", value, float, Range(at_least=0, below=1))


def test_number_in_range():
    check_value("gamma", 0, float, Range(at_least=0, below=1))
    check_value("gamma", None, float | None, Range(above=0))
