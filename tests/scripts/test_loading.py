"""Data that a recipe names: what is held out."""

from types import SimpleNamespace

import numpy as np
import trl
import yaml
from datasets import Dataset

from trl_ext.scripts import sft, sparse_po, trl_scripts
from trl_ext.scripts.recipe.loading import load_datasets


def test_every_process_and_every_run_holds_out_the_same_rows(tmp_path, monkeypatch):
    """NumPy's generator, from which `test_split_size` draws, starts anew in each process; so does a resumed run."""
    Dataset.from_list([{"text": str(number)} for number in range(64)]).to_json(tmp_path / "data.jsonl")
    recipe = tmp_path / "recipe.yaml"
    settings = {"datasets": [{"path": "json", "data_files": str(tmp_path / "data.jsonl")}], "test_split_size": 0.25}
    settings |= {
        "output_dir": str(tmp_path / "out"),
        "model_name_or_path": "some/model",
        "use_cpu": True,
        "bf16": False,
    }
    recipe.write_text(yaml.safe_dump(settings))
    held_out = []

    def keep(dataset):
        held_out.append(sorted(dataset["test"]["text"]))
        assert len(dataset["train"]) == 48

    def ours(seed):
        script_args, _, _, dataset_args, *_ = sparse_po.make_parser().parse_args_and_config(["--config", str(recipe)])
        np.random.seed(seed)
        keep(load_datasets(script_args, dataset_args))
        assert np.random.randint(10**6) == np.random.RandomState(seed).randint(10**6)

    def theirs(seed):
        arguments = sft.make_parser().parse_args_and_config(["--config", str(recipe), "--seed", str(seed)])
        np.random.seed(seed)
        with monkeypatch.context() as patch:
            script = SimpleNamespace(main=lambda *args: keep(trl.get_dataset(args[3])))
            patch.setattr(trl_scripts, "_of_trl", lambda name: script)
            sft.main(*arguments)

    for seed in (0, 1):
        ours(seed)
        theirs(seed)
    assert len(held_out) == 4 and held_out.count(held_out[0]) == 4
