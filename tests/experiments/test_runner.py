"""What the experiments share."""

from recipes.experiments.runner import FinishedRuns, markdown_table


def test_finished_runs_are_found_again(tmp_path):
    finished = FinishedRuns(tmp_path / "out")
    assert not finished.has(method="a")
    finished.add({"method": "a", "seed": 0, "curve": [0.1]})
    finished.add({"method": "a", "seed": 1, "curve": [0.2]})
    again = FinishedRuns(tmp_path / "out")
    assert again.rows == finished.rows and len(again.path.read_text().splitlines()) == 2
    assert again.has(method="a", seed=1) and not again.has(method="a", seed=2) and not again.has(other="a")
    again.rows[0]["curve"] = []
    again.rewrite()
    assert FinishedRuns(tmp_path / "out").rows == [{"method": "a", "seed": 0, "curve": []}, finished.rows[1]]


def test_table():
    assert markdown_table(["a", "b"], [["1", ""], ["2", "3"]]) == "| a | b |\n|---|---|\n| 1 |  |\n| 2 | 3 |"
