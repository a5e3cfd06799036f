"""Adapters of reward models: what is saved beside them, what loads them, and the code in their model cards."""

import contextlib
import io
import re
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.equilibrium import ASYMMETRIC, COMMON, IDS, MASK, reward_model, trainer_of
from tests.helpers.tiny import save_tiny_model, tiny_pairs, tiny_tokenizer
from trl_ext import EPConfig, EPModelForSequenceClassification, EPRewardTrainer
from trl_ext.equilibrium.modeling import active_head


TEXT = "The capital of France is Paris."  # of TRL's own model cards
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=64)


def lora(**settings):
    return LoraConfig(**{"task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"], **settings})


def four_bits():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=["full", "lora", "qlora"])
def trained(request, base, tmp_path_factory):
    """A trained reward model's folder, and the model."""
    folder = tmp_path_factory.mktemp(request.param) / "ep-reward"
    settings = {"quantization_config": four_bits()} if request.param == "qlora" else {}
    model = reward_model(base, feedback="asymmetric", feedback_angle=30.0, **settings)
    trainer = trainer_of(EPRewardTrainer, base, folder, model, None if request.param == "full" else lora())
    trainer.train()
    trainer.save_model(str(folder))
    trainer.create_model_card()
    return request.param, folder, trainer.model.eval()


@torch.no_grad()
def rewards(model, **inputs):
    return model(**(inputs or INPUTS)).logits


def tolerance(kind):
    """In four bits a product is one of bf16."""
    size = torch.finfo(torch.bfloat16).eps if kind == "qlora" else 1e-5
    return {"rtol": size, "atol": size}


def test_the_cards_code_gives_the_trained_rewards(trained, monkeypatch):
    kind, folder, model = trained
    monkeypatch.chdir(folder.parent)  # a folder elsewhere is named by its last part alone
    card = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 1 and f'"{folder.name}"' in blocks[0] and str(folder) not in card
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(blocks[0], {})
    inputs = tiny_tokenizer()(TEXT, return_tensors="pt", return_token_type_ids=False)
    assert TEXT in blocks[0]
    expected = rewards(model, **inputs).item()
    torch.testing.assert_close(float(printed.getvalue()), expected, **tolerance(kind))
    assert ("This is an adapter" in card) == (kind != "full")
    assert ("does not recognize this architecture" in card) == (kind == "full")


def test_every_way_of_loading_gives_the_trained_rewards(trained, tmp_path):
    kind, folder, model = trained
    expected = rewards(model)
    assert EPConfig.from_pretrained(folder).head_settings() == model.config.head_settings()
    assert kind == "full" or not (folder / "model.safetensors").exists()
    own = EPModelForSequenceClassification.from_pretrained(folder)
    auto = AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=1)
    piped = pipeline("text-classification", model=str(folder), device="cpu").model
    grpo = GRPOTrainer(
        save_tiny_model(tmp_path / "policy"), [str(folder)],
        GRPOConfig(output_dir=str(tmp_path / "g"), num_generations=2, gradient_checkpointing=False, **COMMON),
        tiny_pairs(8).select_columns("prompt"), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    assert grpo.reward_func_names == ["ep-reward"]
    for loaded in (own, auto, piped, grpo.reward_funcs[0]):
        assert type(loaded) is EPModelForSequenceClassification and not loaded.training
        torch.testing.assert_close(rewards(loaded), expected, **tolerance(kind))
        assert torch.equal(active_head(loaded).readout_weight, active_head(model).readout_weight)
    if kind != "full" and Version(version("peft")) < Version(MIN_PEFT_VERSION):
        with pytest.raises(ValueError, match=f"use a version >= {MIN_PEFT_VERSION}"):  # transformers 5.24's own
            own.save_pretrained(tmp_path / "again")
        return
    # What was loaded is saved as it came
    own.save_pretrained(tmp_path / "again")
    again = EPModelForSequenceClassification.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(rewards(again), expected, **tolerance(kind))


def test_an_adapter_on_a_saved_model(base, tmp_path):
    whole = reward_model(base, **ASYMMETRIC)
    whole.save_pretrained(tmp_path / "whole")
    model = get_peft_model(
        EPModelForSequenceClassification.from_pretrained(tmp_path / "whole"),
        lora(init_lora_weights=False, task_type=None),
    )
    model.save_pretrained(tmp_path / "adapter")  # PEFT alone: no configuration, and the head is the base model's
    loaded, info = EPModelForSequenceClassification.from_pretrained(tmp_path / "adapter", output_loading_info=True)
    torch.testing.assert_close(rewards(loaded), rewards(model.eval()))
    assert not torch.allclose(rewards(loaded), rewards(whole)) and not info["missing_keys"]


def test_a_half_precision_base(base, tmp_path):
    model = get_peft_model(reward_model(base, dtype=torch.bfloat16), lora(init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    model.get_base_model().config.save_pretrained(tmp_path)
    loaded = EPModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    assert active_head(loaded).input_weight.dtype == torch.float32
    torch.testing.assert_close(rewards(loaded), rewards(model))


# peft 0.18 looks for the configuration of a model that has no folder
@pytest.mark.filterwarnings("ignore:Could not find a config file in")
def test_what_cannot_be_loaded_says_what_is_missing(base, tmp_path):
    model = get_peft_model(reward_model(base), lora())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"no `config.json`.*save_pretrained.*config=EPConfig"):
        EPModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    config = model.get_base_model().config
    loaded = EPModelForSequenceClassification.from_pretrained(tmp_path / "adapter", config=config)
    torch.testing.assert_close(rewards(loaded), rewards(model.eval()))
    headless = get_peft_model(reward_model(base), lora(task_type=None))
    headless.save_pretrained(tmp_path / "headless")
    config.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"lacks the head.*random head.*modules_to_save"):
        EPModelForSequenceClassification.from_pretrained(tmp_path / "headless")
    headless.peft_config["default"].base_model_name_or_path = ""
    headless.save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match=r"names no base model.*PeftModel\.from_pretrained"):
        EPModelForSequenceClassification.from_pretrained(tmp_path / "nameless")
