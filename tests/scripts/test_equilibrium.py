"""The scripts: data of several kinds, adapters, and what is refused before anything is loaded."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, EvalPrediction

from tests.helpers.tiny import save_tiny_model, tiny_pairs
from trl_ext import EPModelForSequenceClassification
from trl_ext.scripts import equilibrium_classifier, equilibrium_reward
from trl_ext.scripts.recipe.strict_parser import RecipeError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def run(script, folder, tmp_path, rows, **settings):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model_name_or_path": folder, "datasets": [{"path": "json", "data_files": str(data)}], "test_split_size": 0.25,
        "output_dir": str(tmp_path / "out"), "head_hidden_features": [8, 8], "max_steps": 2, "use_cpu": True,
        "bf16": False, "report_to": "none", "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 2,
        "logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 4, **settings,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    script.main(*script.make_parser().parse_args_and_config(["--config", str(path)]))
    return AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def texts(labels):
    return [
        {"text": row["chosen"], "label": label} for row, label in zip(tiny_pairs(len(labels)), labels, strict=True)
    ]


@pytest.mark.parametrize(
    ("labels", "settings", "problem_type"),
    [
        ([0, 1, 2, 1] * 3, {"num_labels": 3}, "single_label_classification"),
        ([1, 4, 10] * 4, {"num_labels": 1, "problem_type": "regression", "pooling": "mean"}, "regression"),
        ([[1.0, 0.0], [1.0, 1.0]] * 6, {"num_labels": 2}, "multi_label_classification"),
    ],
    ids=["classes", "numbers", "several labels"],
)
def test_classifier_of_each_kind(labels, settings, problem_type, folder, tmp_path, capsys):
    model = run(equilibrium_classifier, folder, tmp_path, texts(labels), **settings)
    assert model.config.problem_type == problem_type and model.config.num_labels == settings["num_labels"]
    assert model.pooling == settings.get("pooling", "last")
    printed = {"single_label_classification": "Confusion matrix", "multi_label_classification": "Confusion of each"}
    output = capsys.readouterr().out
    assert ("Confusion" in output) == (problem_type in printed) and printed.get(problem_type, "") in output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "### Equilibrium-propagation head" in card and ("| `pooling` | mean |" in card) == ("pooling" in settings)


def test_the_heads_first_weights_are_the_seeds(folder, tmp_path):
    """Whatever the process drew before: runs of a demo follow one another in one process."""
    found = []
    for state, seed in ((1, 42), (2, 42), (1, 43)):
        torch.manual_seed(state)
        settings = {"seed": seed, "learning_rate": 0.0, "max_steps": 1, "eval_strategy": "no"}
        found.append(run(equilibrium_reward, folder, tmp_path, list(tiny_pairs(8)), **settings).score.input_weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_frozen_backbone_and_dtype(folder, tmp_path):
    before = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model = run(equilibrium_reward, folder, tmp_path, list(tiny_pairs(12)), freeze_backbone=True, learning_rate=0.01)
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name


def test_lora(folder, tmp_path):
    loaded = run(
        equilibrium_classifier, folder, tmp_path, texts([0, 1] * 6), use_peft=True,
        lora_target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    assert not (tmp_path / "out" / "model.safetensors").exists()  # an adapter is saved, not a model
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("q_proj.lora_B" in name and tensor.abs().sum() > 0 for name, tensor in saved.items())
    assert {name.split(".score.")[1] for name in saved if ".score." in name} >= {"input_weight", "readout_weight"}
    assert type(loaded) is EPModelForSequenceClassification and loaded.config.hidden_features == [8, 8]


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        (equilibrium_reward, {"head_radius": 0.0}, r"`head_radius`.*0\.0"),
        (equilibrium_reward, {"head_hidden_features": [0, 8]}, "`head_hidden_features`.*0"),
        (equilibrium_reward, {"head_feedback_angle": 30.0}, "`head_feedback_angle`.*`head_feedback` is 'symmetric'"),
        (equilibrium_reward, {"head_feedbak": "symmetric"}, "head_feedbak.*did you mean `head_feedback`"),
        (equilibrium_reward, {"head_feedback": "random"}, "head_feedback.*random.*symmetric"),
        (equilibrium_reward, {"pooling": "max"}, "pooling.*max.*first"),
        (equilibrium_reward, {"homeostasis_coef": 1.0}, "`homeostasis_coef=1.0`.*`head_feedback='asymmetric'`"),
        (equilibrium_classifier, {"label_column": "stars"}, "label_column: stars.*'label', 'text'"),
    ],
)
def test_refused_before_the_model_is_loaded(script, settings, message, tmp_path):
    rows = texts([0, 1] * 4) if script is equilibrium_classifier else list(tiny_pairs(8))
    model = "no/such-model"
    if "label_column" in settings:
        model = save_tiny_model(tmp_path / "model")
    with pytest.raises(RecipeError, match=message):
        run(script, model, tmp_path, rows, **settings)


def test_scores_by_hand():
    logits = np.array([[2.0, 1.0], [0.0, 1.0]])
    score = equilibrium_classifier.score
    assert score(EvalPrediction(logits, np.array([0, 0]))) == {"accuracy": 0.5}
    assert score(EvalPrediction(logits - 0.5, np.array([[1.0, 0.0], [0.0, 1.0]]))) == {"accuracy": 0.75}
    assert score(EvalPrediction(np.array([[1.0], [3.0]]), np.array([1.5, 3.0]))) == {"mean_squared_error": 0.125}


def test_confusion_by_hand(capsys):
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    counts = equilibrium_classifier.confusion_matrix(logits, np.array([0, 0, 1, 2]))
    assert counts.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 1]]
    table = equilibrium_classifier.confusion_table(counts, ["bad", "fine", "good"])
    assert [list(column.cells) for column in table.columns] == [
        ["bad", "fine", "good"], ["1", "1", "0"], ["1", "0", "0"], ["0", "0", "1"], ["0.500", "0.000", "1.000"]
    ]  # fmt: skip
    labels = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    counts = equilibrium_classifier.confusion_matrix(np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]]), labels)
    assert counts.tolist() == [[[1, 0], [1, 1]], [[1, 1], [0, 1]]]
    table = equilibrium_classifier.confusion_table(counts, ["a", "b"])
    assert [column.header for column in table.columns][1] == "true negative"
    assert list(table.columns[-1].cells) == ["0.500", "1.000"]


def test_names_of_classes_come_from_the_data(folder, tmp_path, monkeypatch, capsys):
    from datasets import ClassLabel

    from trl_ext.scripts.recipe import loading

    load = loading.load_datasets
    named = ClassLabel(names=["dull", "great"])
    monkeypatch.setattr(loading, "load_datasets", lambda *args: load(*args).cast_column("label", named))
    model = run(equilibrium_classifier, folder, tmp_path, texts([0, 1] * 6))
    assert model.config.id2label == {0: "dull", 1: "great"} and model.config.label2id == {"dull": 0, "great": 1}
    assert "great" in capsys.readouterr().out
