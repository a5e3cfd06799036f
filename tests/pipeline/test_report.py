"""The page: whole, self-contained, and nothing of data or recipes read as markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from trl_ext import cli
from trl_ext.core.figures import new_axes, save_figure
from trl_ext.pipeline.definition import read_pipeline
from trl_ext.pipeline.findings import MAX_PICTURES, ordered_keys, read_findings
from trl_ext.pipeline.progress import Marker, Progress
from trl_ext.pipeline.report import write_report


NASTY = '<script>alert("1")</script><img src=http://example.com/x onerror=alert(1)>'


class Tags(HTMLParser):
    """Tags and attributes of a page, and whether what is opened is closed."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_a_very_secret_token")
    settings = {"run_name": f"{NASTY} hf_a_very_secret_token", "hub_token": "another_secret"}
    stages = {
        "sft": {"command": "sft", "config": "optim/sft_playground", "settings": settings},
        "pairs": {"command": "sample-pairs", "options": {"model": "${stages.sft.output_dir}",
                  "dataset_name": "playground", "reward": "trl_ext.playground.sentiment_reward"}},
        "last": {"command": "sparse-po", "config": "sparse_po/playground"},
    }  # fmt: skip
    Path("pipe.yaml").write_text(
        f"# {NASTY}\n" + yaml.safe_dump({"output_dir": "out", "stages": stages}, sort_keys=False)
    )
    pipeline = read_pipeline(["--config", "pipe.yaml"], cli.TRAINING_COMMANDS)
    progress = Progress(pipeline)
    for stage, done in zip(pipeline.stages[:2], (True, False), strict=True):
        progress.write(stage, Marker({}, done=done, seconds=75.0, command=["trl-ext", stage.command, NASTY]))
    progress.recipe_path(pipeline.stages[0]).write_text(yaml.safe_dump(pipeline.recipe(pipeline.stages[0])))
    log = [{"step": step, "loss": 1.0 / step, f"rewards/{NASTY}$/mean": 0.5} for step in (1, 2, 3)]
    folder = pipeline.folder("sft")
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    save_figure(new_axes()[0], folder / "dashboard <b>.png")
    pairs = pipeline.folder("pairs")
    pairs.mkdir()
    row = {"prompt": NASTY, "chosen": [{"role": "assistant", "content": NASTY}], "rejected": "x\x00\x1b[31m"}
    (pairs / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (pairs / "summary.json").write_text(json.dumps({"pairs": 1, "chosen_reward": 0.5, "reward": NASTY}))
    return write_report(pipeline, progress, {"sft"}).read_text()


def test_nothing_is_markup_and_nothing_is_fetched(page):
    tags = Tags(page)
    assert tags.open == []
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(tags.names)
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    sources = [value for name, value in tags.attributes if name in ("src", "href", "srcset", "data")]
    assert sources and all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    assert "url(" not in page and "@import" not in page
    policy = next(value for name, value in tags.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and "script-src" not in policy
    # In heading, title, settings, number, command, example and reward
    assert page.count("&lt;script&gt;") >= 7 and "\x1b" not in page and "\x00" not in page


def test_no_secret_is_on_the_page(page):
    assert "hf_a_very_secret_token" not in page and "another_secret" not in page


def test_what_a_reader_looks_for_is_there(page):
    assert page.count("data:image/png") == 3  # two curves and the dashboard
    assert "1 of 3 stages done, 2 min 30 s in all" in page
    assert "done now" in page and "not finished" in page and "not begun" in page
    assert "prefers-color-scheme:dark" in page and 'name="viewport"' in page
    assert re.search(r"<h3>Last training steps logged</h3><dl>.*<dt>loss</dt><dd>0.3333</dd>", page)
    assert "<dt>pairs</dt><dd>1</dd>" in page
    assert re.search(
        r"<td><a href=\"#pairs\">pairs</a></td><td>sample-pairs</td><td><a href=\"#sft\">sft</a></td>", page
    )
    assert "trl-ext pipeline --config pipe.yaml" in page


def test_findings_of_an_empty_or_full_folder(tmp_path):
    found = read_findings(tmp_path / "nowhere")
    assert (found.numbers, found.curves, found.pictures, found.examples) == ([], [], [], [])
    (tmp_path / "trainer_state.json").write_text("{")  # cut off
    for number in range(MAX_PICTURES + 2):
        (tmp_path / f"{number}.png").write_bytes(b"\x89PNG")
    (tmp_path / "token_masks").mkdir()
    for step in (2, 10, 9):
        (tmp_path / "token_masks" / f"step_{step}.png").write_bytes(b"\x89PNG")
    found = read_findings(tmp_path)
    assert len(found.pictures) == MAX_PICTURES and found.left_out == 3


def test_proxy_points_are_found(tmp_path):
    (tmp_path / "proxy_points").mkdir()
    summary = {"rewards": ["a", "b"], "num_runs": 3, "notes": ["WARNING: the edge"], "joint": {"point": [0.1, 0.2]}}
    (tmp_path / "proxy_points" / "proxy_points.json").write_text(json.dumps(summary))
    found = read_findings(tmp_path)
    assert found.numbers == [("proxy point of a", 0.1), ("proxy point of b", 0.2), ("runs", 3)]
    assert found.notes == ["WARNING: the edge"]
    alone = {**summary, "joint": None, "independent": {"a": {"point": [1]}, "b": {"point": [2]}}}
    (tmp_path / "proxy_points" / "proxy_points.json").write_text(json.dumps(alone))
    assert read_findings(tmp_path).numbers[:2] == [("proxy point of a", 1), ("proxy point of b", 2)]


def test_numbers_say_what_they_are_of(tmp_path):
    """A run's mean, its last steps and an evaluation are three losses, each with another share of the objective."""
    history = [
        {"step": 10, "loss": 9.3, "ep/homeostasis_loss": 0.9}, {"step": 20, "loss": 0.6, "ep/homeostasis_loss": 0.01},
        {"step": 20, "eval_loss": 0.7}, {"step": 20, "train_loss": 4.95},
    ]  # fmt: skip
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    found = read_findings(tmp_path)
    assert found.logged == {
        "Last evaluation": [("eval_loss", 0.7)],
        "Last training steps logged": [("loss", 0.6), ("ep/homeostasis_loss", 0.01)],
        "Mean over all training steps": [("train_loss", 4.95)],
    }
    assert found.notes[0].startswith("The homeostasis objective is in eval_loss, loss, train_loss: homeostasis_coef")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 1.0}]}))
    assert read_findings(tmp_path).notes == []


def test_gold_comes_before_the_loss():
    history = [{"step": 1, "loss": 1.0, "grad_norm": 1.0, "rewards/a/mean": 1.0}, {"step": 1, "eval_gold": 0.5}]
    assert ordered_keys(history) == ["eval_gold", "rewards/a/mean", "loss"]
