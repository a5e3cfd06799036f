import io
import json

import pytest
from rich.console import Console

from trl_ext import demo
from trl_ext.demo import constrained_ppo as demo_constrained_ppo
from trl_ext.demo.constrained_ppo import PROXIES, Point, comparison_table, constrained_ppo_part


@pytest.mark.usefixtures("variables_taken_back")
def test_second_part_of_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(demo_constrained_ppo.SETTINGS, "per_device_train_batch_size", 8)
    monkeypatch.setitem(demo_constrained_ppo.SETTINGS, "per_device_eval_batch_size", 8)
    monkeypatch.setitem(demo_constrained_ppo.SETTINGS, "max_completion_length", 16)
    monkeypatch.setattr(demo_constrained_ppo, "NUM_VALIDATION_PROMPTS", 8)
    arguments = ["--output_dir", str(tmp_path), "--parts", "constrained_ppo", "--max_steps", "3", "--workers", "1"]
    assert demo.main(arguments) == 0
    text = capsys.readouterr().out
    folder = tmp_path / "constrained_ppo"
    assert "dashboard.png" in text and text.count("Two proxies and the gold metric") == 1
    assert (folder / "xi" / "dashboard.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "grpo" / "dashboard.png").exists()
    assert "overoptimization.png" in text
    assert (folder / "overoptimization.png").read_bytes().startswith(b"\x89PNG")
    base, peak, end, constrained = json.loads((folder / "results.json").read_text())
    assert (base["step"], base["divergence"], end["step"], constrained["step"]) == (0, 0.0, 3, 3)
    # Both runs start from the same model and validation prompts
    assert peak["gold"] >= max(base["gold"], end["gold"])
    card = (folder / "xi" / "README.md").read_text()
    for name, value in zip(PROXIES, peak["proxies"], strict=True):
        assert f"== {value:.4g}" in next(line for line in card.splitlines() if line.startswith(f"| `{name}` |"))


def test_one_run_of_each_method(tmp_path, monkeypatch):
    """The thresholds are the proxies where the gold metric was highest, whatever it was at the end."""
    runs = []

    def train(folder, num_steps, **settings):
        runs.append((folder.name, settings))
        return folder.name

    course = {
        "grpo": [(0, (1.0, 0.5), 0.4, 0.0), (8, (4.0, 0.45), 0.6, 9.0), (16, (9.0, 0.4), 0.1, 99.0)],
        "xi": [(0, (1.0, 0.5), 0.4, 0.0), (16, (4.1, 0.44), 0.55, 8.0)],
    }
    monkeypatch.setattr(demo_constrained_ppo, "_train", train)
    monkeypatch.setattr(
        demo_constrained_ppo, "_measured", lambda trainer, name: [Point(name, *row) for row in course[trainer]]
    )
    console = Console(file=io.StringIO(), width=100)
    part = constrained_ppo_part(tmp_path, console)
    points = part.show([task.function(*task.arguments) for task in part.tasks])
    assert [name for name, _ in runs] == ["grpo", "xi"]
    assert runs[1][1]["constraints"] == [
        {"reward": "positive_word_share", "threshold": 4.0}, {"reward": "reference_similarity", "threshold": 0.45}
    ]  # fmt: skip
    assert [point.step for point in points] == [0, 8, 16, 16] and points[3].gold == 0.55
    row = next(line for line in console.file.getvalue().splitlines() if "constrained GRPO" in line)
    assert row.replace("│", " ").split()[-5:] == ["16", "4.100", "0.440", "0.550", "8.0"]
    assert comparison_table(points).row_count == 4


def test_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--parts", "sparsepo"])
    assert "sparse_po" in capsys.readouterr().err
