"""Tables and pictures of a run in the local stores of TensorBoard and trackio, and what wandb is handed."""

import json
import sqlite3
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.helpers.sparse_po import make_trainer
from tests.helpers.tiny import save_tiny_model, tiny_tokenizer
from trl_ext.core.reporters import is_last_log, markdown_table, report_image, report_table
from trl_ext.optim import OptimizerReportCallback
from trl_ext.sparse_po.report import TokenMaskCallback


def test_a_run_leaves_masks_and_the_optimizer_in_tensorboard_and_trackio(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # its folder is read as it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trainer = make_trainer(
        tmp_path / "out", save_tiny_model(tmp_path / "base"), tiny_tokenizer(), max_steps=1, logging_steps=1,
        report_to=["tensorboard", "trackio"], optim="adamp",
        trackio_space_id=None,  # on disk: transformers 5.5 would log to a Space
    )  # fmt: skip
    trainer.add_callback(TokenMaskCallback(trainer, num_pairs=1))
    OptimizerReportCallback.attach(trainer)
    trainer.train()
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    store = EventAccumulator(str(folder))
    store.Reload()
    tags = store.Tags()
    # Callbacks of ours end after TensorBoard's, which closes its writer
    assert "token_masks" in tags["images"] and store.Images("token_masks")[0].height > 100
    tables = {tag.split("/")[0] for tag in tags["tensors"]}
    assert {"token_weights", "optimizer_report"} <= tables
    tensors = {tag.split("/")[0]: store.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
    assert "| chosen 1 |" in tensors["token_weights"] and "[" in tensors["token_weights"]
    assert "self_attn.q_proj.weight |" in tensors["optimizer_report"]
    with sqlite3.connect(tmp_path / "trackio" / "huggingface.db") as connection:
        logged = {}
        for (row,) in connection.execute("SELECT metrics FROM metrics"):
            logged |= json.loads(row)
    picture = logged["token_masks"]
    assert picture["_type"] == "trackio.image" and (tmp_path / "trackio" / "media" / picture["file_path"]).is_file()
    assert "[" in logged["token_weights"]["_value"][0]["tokens with their weights"]
    weights = {row["weight"] for row in logged["optimizer_report"]["_value"]}
    assert "model.layers.0.self_attn.q_proj.weight" in weights and logged["train/loss"] > 0


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_reporters_get_tables_and_pictures(name, tmp_path, monkeypatch):
    logged = []
    module = ModuleType(name)
    module.log = logged.append
    module.Table = lambda **kwargs: ("table", kwargs)
    module.Image = lambda path: ("image", path)
    monkeypatch.setitem(sys.modules, name, module)
    trainer = SimpleNamespace(
        args=SimpleNamespace(report_to=[name]), is_world_process_zero=lambda: True,
        callback_handler=SimpleNamespace(callbacks=[]),
    )  # fmt: skip
    report_image(trainer, "dashboard", tmp_path / "a.png", 7)
    report_table(trainer, "constraints", ("reward", "value"), [("length", 0.5)], 7)
    (image, table) = logged
    assert image == {"dashboard": ("image", str(tmp_path / "a.png")), "train/global_step": 7}
    kind, given = table["constraints"]
    rows = given["data"] if name == "wandb" else given["dataframe"].to_numpy().tolist()
    columns = given["columns"] if name == "wandb" else list(given["dataframe"].columns)
    assert (kind, columns, rows) == ("table", ["reward", "value"], [["length", 0.5]])
    # Another process, and a run that reports elsewhere, say nothing; a reporter's fault ends no training
    module.log = lambda values: 1 / 0
    report_image(trainer, "dashboard", tmp_path / "a.png", 7)
    trainer.args.report_to = ["none"]
    report_image(trainer, "dashboard", tmp_path / "a.png", 7)
    trainer.is_world_process_zero = lambda: False
    report_table(trainer, "constraints", ("reward",), [("a",)], 7)
    assert len(logged) == 2


def test_tables_in_markdown_and_the_last_log():
    assert markdown_table(("a", "b"), [("x|y", 0.123456)]) == "| a | b |\n| --- | --- |\n| x\\|y | 0.1235 |"
    assert is_last_log({"train_runtime": 1.0}) and not is_last_log({"loss": 1.0}) and not is_last_log(None)
