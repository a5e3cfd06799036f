"""Where a model comes from: labels, tokens and devices of a backbone, and one in memory that stays as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tests.helpers.equilibrium import IDS, MASK
from tests.helpers.tiny import save_tiny_model, tiny_model
from trl_ext import EPConfig, EPModelForSequenceClassification


NAMES = {0: "bad", 1: "fine", 2: "good"}
NUMBERS = {"bad": 0, "fine": 1, "good": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def load(source, **settings):
    return EPModelForSequenceClassification.from_pretrained(source, hidden_features=[8, 8], **settings)


def labels_of(config):
    return config.num_labels, config.id2label, config.label2id, config.problem_type


def test_labels_of_a_handed_config_and_of_a_classifiers_checkpoint(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder, id2label=NAMES, label2id=NUMBERS, problem_type="regression")
    reference = LlamaForSequenceClassification(config)
    expected = (3, NAMES, NUMBERS, "regression")
    reference.save_pretrained(tmp_path / "classifier")
    models = [
        load(folder, config=config),
        load(tmp_path / "classifier"),
        load(tmp_path / "classifier", num_labels=3),
        EPModelForSequenceClassification.from_backbone(reference, hidden_features=[8]),
        load(folder, config=EPConfig(text_config=config, id2label=NAMES, label2id=NUMBERS, problem_type="regression")),
    ]
    for model in models:
        assert labels_of(model.config) == expected and model(IDS, attention_mask=MASK).logits.shape == (3, 3)
    models[1].save_pretrained(tmp_path / "saved")
    assert labels_of(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").config) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_labels": 5}, (5, {i: f"LABEL_{i}" for i in range(5)}, {f"LABEL_{i}": i for i in range(5)}, None)),
        ({"id2label": {0: "a", 1: "b"}}, (2, {0: "a", 1: "b"}, {"a": 0, "b": 1}, None)),
        ({"label2id": {"a": 0}}, (1, {0: "a"}, {"a": 0}, None)),
        ({"problem_type": None}, (3, NAMES, NUMBERS, "regression")),
        ({"problem_type": "multi_label_classification"}, (3, NAMES, NUMBERS, "multi_label_classification")),
    ],
)
def test_what_is_given_comes_before_the_checkpoints_labels(given, expected, folder):
    config = AutoConfig.from_pretrained(folder, id2label=NAMES, label2id=NUMBERS, problem_type="regression")
    assert labels_of(load(folder, config=config, **given).config) == expected


def test_numbers_of_labels_that_differ(folder):
    with pytest.raises(ValueError, match="num_labels=2.*id2label.*the same number"):
        load(folder, num_labels=2, id2label=NAMES)


def test_a_configuration_with_a_head_on_a_checkpoint_without_one(folder, tmp_path):
    """Of a family whose weights are not named as the model's own: they would be new, which only a log says."""
    save_tiny_model(tmp_path, "gpt2")
    text_config = AutoConfig.from_pretrained(tmp_path)
    config = EPConfig(text_config=text_config, num_labels=1, hidden_features=[4], pooling="mean")
    for source in (config, config.save_pretrained(tmp_path / "own") or str(tmp_path / "own")):
        model = EPModelForSequenceClassification.from_pretrained(tmp_path, config=source)
        assert model.config.hidden_features == [4] and model.pooling == "mean" and model.config.num_labels == 1
        assert torch.equal(model.model.wte.weight, AutoModel.from_pretrained(tmp_path).wte.weight)


def test_a_backbones_saved_configuration_is_read_as_that_of_a_head_on_it(tmp_path):
    """As PEFT does with every model that it saves, to see whether its vocabulary has grown."""
    save_tiny_model(tmp_path, "gpt2")
    AutoConfig.from_pretrained(tmp_path, id2label=NAMES, label2id=NUMBERS).save_pretrained(tmp_path)
    config = EPConfig.from_pretrained(tmp_path, hidden_features=[4])
    assert config.text_config.model_type == "gpt2" and config.hidden_features == [4]
    assert config.vocab_size == config.text_config.vocab_size and config.id2label == NAMES


def test_loading_info(folder):
    model, info = load(folder, output_loading_info=True)
    _, backbone = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is EPModelForSequenceClassification and not backbone["missing_keys"]
    assert set(info["missing_keys"]) == {f"score.{name}" for name in model.score.state_dict()}
    assert info["unexpected_keys"] == backbone["unexpected_keys"] and info.keys() == backbone.keys()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_and_sizes_of_the_backbone(family, tmp_path):
    """`model.config.pad_token_id = ...` is how classification scripts say it; GPT-2 names its sizes otherwise."""
    source = save_tiny_model(tmp_path / "base", family)
    model = load(source, num_labels=1)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"model\.config\.pad_token_id"):
        model(IDS)
    model.config.pad_token_id = 0
    assert model.config.get_text_config().pad_token_id == 0 and model.config.eos_token_id == 1
    expected = model(IDS, attention_mask=MASK).logits
    config = AutoConfig.from_pretrained(source)
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(model.config, name) == getattr(config, name), name
    model.save_pretrained(tmp_path / "saved")
    for loaded in (
        load(tmp_path / "saved", pad_token_id=5),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", pad_token_id=5),
        load(source, pad_token_id=5),
        EPModelForSequenceClassification.from_backbone(tiny_model(family), pad_token_id=5),
    ):
        assert loaded.config.pad_token_id == loaded.config.get_text_config().pad_token_id == 5
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert loaded.config.pad_token_id == 0 and loaded.config.eos_token_id == 1
    torch.testing.assert_close(loaded(IDS, attention_mask=MASK).logits, expected)


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", vocab_size=36, pad_token_id=0, max_position_embeddings=64, **sizes)
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("build", [bert, tiny_model], ids=["with a pooler", "without"])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_memory_stays_as_it_was(build, training):
    source = build().eval()
    expected = source(IDS, attention_mask=MASK).logits
    source.train(training)
    modes = {name: module.training for name, module in source.named_modules()}
    settings = source.config.to_dict()
    model = EPModelForSequenceClassification.from_backbone(source, num_labels=3, hidden_features=[8, 8])
    assert model.training == model.score.training == training
    model.config.pad_token_id = 7
    assert {name: module.training for name, module in source.named_modules()} == modes
    assert source.config.to_dict() == settings
    torch.testing.assert_close(source.eval()(IDS, attention_mask=MASK).logits, expected)
    shared = {id(parameter) for parameter in source.parameters()}
    assert {id(parameter) for parameter in model.model.parameters()} <= shared
    # And the new one trains every weight that it has
    model.config.pad_token_id = 0
    model(IDS, attention_mask=MASK, labels=torch.tensor([0, 2, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_adapted_model_as_backbone(folder, tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    states = adapted.get_base_model().model(IDS, attention_mask=MASK).last_hidden_state
    names = set(adapted.state_dict())
    model = EPModelForSequenceClassification.from_backbone(adapted, num_labels=1, hidden_features=[8, 8])
    torch.testing.assert_close(model.model(IDS, attention_mask=MASK).last_hidden_state, states)
    assert set(adapted.state_dict()) == names and not any("lora" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    torch.testing.assert_close(loaded(IDS, attention_mask=MASK).logits, model(IDS, attention_mask=MASK).logits)
    with pytest.raises(TypeError, match="`Linear`.*PeftModel"):
        EPModelForSequenceClassification.from_backbone(torch.nn.Linear(2, 2))


def test_a_backbone_on_several_devices(folder, tmp_path):
    placed = {"embed_tokens": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu", "rotary_emb": "cpu"}
    torch.manual_seed(0)
    model = load(folder, num_labels=3, device_map=placed, offload_folder=str(tmp_path))
    assert model.hf_device_map == {**{f"model.{name}": device for name, device in placed.items()}, "score": "cpu"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    whole = load(folder, num_labels=3)
    whole.score.load_state_dict(model.score.state_dict())
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    torch.testing.assert_close(model(**inputs).logits, whole(**inputs).logits)
    model(**inputs, labels=torch.tensor([0, 2, 1])).loss.backward()
    assert model.score.input_weight.grad.any()
    assert load(folder, device_map="cpu").device.type == "cpu"


def test_a_config_of_the_backbones_own_class_is_still_refused():
    with pytest.raises(TypeError, match="EPConfig.*LlamaConfig"):
        EPModelForSequenceClassification(LlamaConfig())
