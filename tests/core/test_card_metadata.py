"""Metadata of model cards: what is known of data, licence and results, and nothing else."""

from types import SimpleNamespace

from huggingface_hub import ModelCard

from trl_ext.core.card_metadata import completed_metadata, hub_datasets, license_of, results_of


def test_data_sets_of_the_hub_are_named_and_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    sources = {
        "hf://datasets/trl-lib/tldr-preference@abc/data/train-0.parquet": None,
        "hf://datasets/trl-lib/tldr-preference@abc/data/train-1.parquet": None,
        "/home/me/pairs.jsonl": None,
    }
    dataset = SimpleNamespace(info=SimpleNamespace(download_checksums=sources))
    names = ["trl-lib/tldr-preference", "stanfordnlp/imdb", "playground", "data/mine", None]
    assert hub_datasets(dataset, names) == ["trl-lib/tldr-preference", "stanfordnlp/imdb"]
    assert hub_datasets(SimpleNamespace()) == []


def test_the_licence_is_the_base_models_own(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: gemma\nlicense_link: https://x.org\ntags: [a]\n---\n\ntext")
    assert license_of(str(tmp_path)) == {
        "license": "other", "license_name": "gemma", "license_link": "https://x.org",
    }  # fmt: skip
    card.write_text("no metadata")
    assert license_of(str(tmp_path)) == {}
    assert license_of(str(tmp_path / "nowhere")) == license_of(None) == license_of("owner/not-cached") == {}


def test_results_are_those_of_the_last_evaluation():
    history = [{"eval_loss": 2.0, "step": 1}, {"eval_loss": 1.0, "eval_rewards/accuracies": 0.75}, {"loss": 0.1}]
    assert results_of(history) == {"eval_rewards/accuracies": 0.75, "eval_loss": 1.0}
    assert results_of([{"eval_loss": float("nan")}, {"loss": 1.0}]) == results_of([]) == {}


def test_metadata_is_completed_and_survives_a_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\ntext")
    metadata = {"licence": "license", "model_name": "mine", "base_model": "org/base", "datasets": None}
    history = [{"eval_accuracy": 0.5, "eval_loss": 0.25}]
    data = completed_metadata(metadata, ["org/data"], str(tmp_path), history)
    found = ModelCard(f"---\n{data.to_yaml()}\n---\n\ntext").data
    assert (found.license, found.datasets, found.base_model) == ("mit", ["org/data"], "org/base")
    assert "licence" not in found.to_dict()
    assert {(one.metric_type, one.metric_value, one.dataset_type) for one in found.eval_results} == {
        ("accuracy", 0.5, "org/data"), ("loss", 0.25, "org/data"),
    }  # fmt: skip
    # What the card has stays, and what nobody knows is not there
    stated = {"license": "apache-2.0", "datasets": ["a/b"], "model_name": "m"}
    assert completed_metadata(stated, ["c/d"], str(tmp_path)).to_dict() == stated
