"""Every recipe parses strictly, and runs two steps on a tiny model."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification

import trl_ext
from recipes.experiments.constrained_ppo_dailydialog.intent import IntentClassifier
from tests.helpers.tiny import FAMILIES, WORDS, save_tiny_model, tiny_pairs, tiny_tokenizer
from trl_ext.cli import TRAINING_COMMANDS
from trl_ext.scripts.recipe.strict_parser import load_recipe


ROOT = Path(trl_ext.__file__).parents[1]
# A pipeline is no recipe, but several; tests/pipeline checks those
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "pipeline")


def ids(path):
    return str(path.relative_to(ROOT / "recipes").with_suffix(""))


def module_of(path):
    """The module that the command in a recipe's header runs."""
    command = path.read_text().split("# Run:")[1].split()
    return command[2] if command[0] == "python" else TRAINING_COMMANDS[command[1]]


def script_of(path):
    return importlib.import_module(module_of(path))


# The others are experiments
TRAINING = [path for path in RECIPES if module_of(path) in TRAINING_COMMANDS.values()]


def make_parser(path):
    return script_of(path).make_parser()


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_recipe_parses(path):
    parser = make_parser(path)
    parser.check(["--config", str(path)])
    fields = {name for dataclass in parser.dataclass_types for name in dataclass.__dataclass_fields__}
    assert load_recipe(path).keys() <= fields | {"env"}


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_recipe_has_its_header(path):
    header = path.read_text().split("\n\n")[0]
    for part in ("Run:", "Hardware:"):
        assert part in header, part
    assert "Expected:" in header or "minute" in header
    assert str(path.relative_to(ROOT)) in header


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_misspelt_key_is_refused(path, tmp_path):
    recipe = load_recipe(path)
    dataclasses = make_parser(path).dataclass_types
    has_rate = any("learning_rate" in dataclass.__dataclass_fields__ for dataclass in dataclasses)
    name = "learning_rate" if has_rate else max(recipe, key=len)
    misspelt = name[:2] + name[3:]
    recipe[misspelt] = recipe.pop(name, 1.0)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=rf"`{misspelt}`.*wrong.yaml.*did you mean `(\w*_)?{name}`"):
        make_parser(path).check(["--config", str(wrong), "--trust_recipe_code"])


def tiny_reward_model(folder, seed):
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **FAMILIES["llama"], vocab_size=len(WORDS), num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def stand_ins(path, recipe, tmp_path):
    """What a recipe names beside the policy, in small; returns the data's rows too."""
    rows = tiny_pairs(12).to_list()
    if path.name == "dailydialog.yaml":
        IntentClassifier(["good", "bad"], np.eye(3, 4)).save(tmp_path / "classifier")
        recipe["env"] = {name: str(tmp_path / "classifier") for name in recipe["env"]}
        columns = {"last": "the film", "reference": "a good film", "intent": 1}
        rows = [{"prompt": row["prompt"], **columns} for row in rows]
    if path.name == "maths_length.yaml":  # the first needs a package that reads answers
        recipe["reward_funcs"] = ["trl_ext.playground.sentiment_reward", recipe["reward_funcs"][1]]
    models = [name for name in recipe.get("reward_funcs", ()) if "/" in name]
    if models:
        small = {name: tiny_reward_model(tmp_path / f"reward_{i}", i) for i, name in enumerate(models)}
        recipe["reward_funcs"] = [small.get(name, name) for name in recipe["reward_funcs"]]
    return rows


@pytest.mark.usefixtures("variables_taken_back")
@pytest.mark.parametrize("path", TRAINING, ids=ids)
def test_recipe_runs_two_steps(path, tmp_path):
    model = save_tiny_model(tmp_path / "model")
    recipe = load_recipe(path)
    method = module_of(path).split(".")[-1]
    for key in (
        "datasets",
        "dataset_name",
        "test_split_size",
        "model_name_or_path",
        "tokenizer_name_or_path",
        "dataset_test_split",
        "attn_implementation",
        "deepspeed",
        "use_vllm",
        "vllm_mode",
        "vllm_gpu_memory_utilization",
    ):
        recipe.pop(key, None)
    if "layers" in str(recipe.get("lora_target_modules")):  # by numbers that the tiny model does not have
        recipe["lora_target_modules"] = ["q_proj", "v_proj"]
    if recipe.get("optim_args") == "projection=auto":
        model = save_tiny_model(tmp_path / "model", "qwen3")
    data = tmp_path / "data.jsonl"
    rows = stand_ins(path, recipe, tmp_path)
    if method == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    if method == "equilibrium_classifier":
        rows = [{"text": row["chosen"], "label": index % 2} for index, row in enumerate(rows)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe |= {
        "model_name_or_path": model,
        "datasets": [{"path": "json", "data_files": str(data)}],
        "test_split_size": 0.34,
        "output_dir": str(tmp_path / "out"),
        "dtype": "float32",
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
    }
    recipe |= {
        "sparse_po": {"max_length": 64, "show_token_masks": 1},
        "constrained_ppo": {"max_completion_length": 6, "per_device_eval_batch_size": 2},
        "constrained_grpo": {"max_completion_length": 6, "per_device_eval_batch_size": 2, "num_generations": 2},
        "equilibrium_reward": {"max_length": 64, "head_hidden_features": [8, 8]},
        "equilibrium_classifier": {"max_length": 64, "head_hidden_features": [8, 8]},
    }.get(method, {"max_length": 64})
    overridden = tmp_path / "recipe.yaml"
    overridden.write_text(yaml.safe_dump(recipe))
    script = script_of(path)
    script.main(*script.make_parser().parse_args_and_config(["--config", str(overridden), "--trust_recipe_code"]))
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    if method == "sparse_po":
        assert (tmp_path / "out" / "token_masks" / "step_2.png").stat().st_size > 1000
    elif method == "constrained_ppo":
        assert (tmp_path / "out" / "critic.safetensors").is_file()
    elif method == "constrained_grpo":
        assert (tmp_path / "out" / "multipliers.json").is_file()
    elif method.startswith("equilibrium"):
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["hidden_features"] == [8, 8] and config["feedback"] == recipe["head_feedback"]
        assert config["homeostasis_coef"] == recipe.get("homeostasis_coef", 0.0)
    if recipe.get("log_optimizer_report"):
        assert any("optimizer/projected/share" in entry for entry in state["log_history"])
    assert (tmp_path / "out" / "README.md").is_file()
