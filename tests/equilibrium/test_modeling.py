"""The classifier in transformers' form: saving, loading, pooling, losses, and where the head may stand."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    pipeline,
)

from tests.helpers.equilibrium import IDS, MASK
from tests.helpers.tiny import save_tiny_model, tiny_model, tiny_tokenizer
from trl_ext import EPConfig, EPHead, EPModelForSequenceClassification


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def classifier(folder, **settings):
    settings = {"num_labels": 3, "hidden_features": [8, 8], **settings}
    return EPModelForSequenceClassification.from_pretrained(folder, **settings)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_backbone_is_taken_over_and_saving_is_bit_equal(family, tmp_path):
    path = save_tiny_model(tmp_path / "base", family)
    model = classifier(path, feedback="asymmetric", feedback_angle=40.0, spectral_cap=0.9)
    backbone = AutoModelForCausalLM.from_pretrained(path).base_model.eval()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name
    states = backbone(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(model.model(IDS, attention_mask=MASK).last_hidden_state, states)

    model.save_pretrained(tmp_path / "saved")
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(loaded) is EPModelForSequenceClassification and not any(info.values())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # To rounding: loaded weights lie elsewhere in memory, and on some machines kernels add by alignment
    torch.testing.assert_close(loaded(IDS, attention_mask=MASK).logits, model(IDS, attention_mask=MASK).logits)
    assert loaded.config.head_settings() == model.config.head_settings()
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()


def test_head_is_initialised_as_the_head_says_and_loaded_parts_are_kept(folder, tmp_path):
    head = classifier(folder, hidden_features=[64, 64]).score
    assert isinstance(head, EPHead) and head.forward_weight_1.norm().item() == pytest.approx(0.95 * 8)
    model = classifier(folder)
    model.save_pretrained(tmp_path)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert other.score.readout_weight.shape == (5, 8) and other.score.readout_weight.norm() > 0.5
    assert torch.equal(other.score.forward_weight_1, model.score.forward_weight_1)


def test_auto_class_builds_from_a_configuration(folder):
    config = EPConfig(text_config=AutoConfig.from_pretrained(folder), num_labels=1, hidden_features=[8])
    model = AutoModelForSequenceClassification.from_config(config)
    assert type(model) is EPModelForSequenceClassification
    assert config.get_text_config() is config.text_config and config.get_text_config().pad_token_id == 0


def test_pools_as_transformers_does(folder):
    reference = LlamaForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    model = classifier(folder)
    model.score = reference.score
    for inputs in (
        {"input_ids": IDS, "attention_mask": MASK},
        {"input_ids": IDS[:1]},
        {"inputs_embeds": reference.model.embed_tokens(IDS), "attention_mask": MASK},
    ):
        # Not bit for bit: the score of a few rows adds in another order than that of all tokens
        torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits, rtol=1e-5, atol=1e-6)
    for each in (model, reference):
        each.config.get_text_config().pad_token_id = None
        with pytest.raises(ValueError, match="padding token"):
            each(IDS)
    torch.testing.assert_close(model(IDS[:1]).logits, reference(IDS[:1]).logits, rtol=1e-5, atol=1e-6)


def test_only_the_pooled_rows_relax(folder, monkeypatch):
    seen = []
    original = EPHead.forward
    monkeypatch.setattr(
        EPHead, "forward", lambda self, hidden, **kw: seen.append(hidden.shape) or original(self, hidden, **kw)
    )
    classifier(folder)(IDS, attention_mask=MASK)
    assert seen == [(3, 32)]


def test_outputs(folder):
    model = classifier(folder)
    output = model(IDS, attention_mask=MASK, output_hidden_states=True)
    assert len(output.hidden_states) == 3 and output.loss is None and output.homeostasis_loss is None
    as_tuple = model(IDS, attention_mask=MASK, return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)


@pytest.mark.parametrize(
    ("num_labels", "labels", "reference"),
    [
        (3, torch.tensor([0, 2, 1]), nn.CrossEntropyLoss()),
        (1, torch.tensor([0.5, -1.0, 2.0]), lambda logits, labels: nn.MSELoss()(logits.squeeze(), labels)),
        (2, torch.tensor([[0.3, -1.2], [2.0, 0.1], [-0.7, 0.9]]), nn.MSELoss()),
        (2, torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), nn.BCEWithLogitsLoss()),
    ],
    ids=["classes", "regression", "regression of two", "several labels"],
)
def test_losses(folder, num_labels, labels, reference):
    problem_type = "regression" if reference.__class__ is nn.MSELoss else None
    model = classifier(folder, num_labels=num_labels, problem_type=problem_type)
    output = model(IDS, attention_mask=MASK, labels=labels)
    torch.testing.assert_close(output.loss, reference(output.logits, labels))
    output.loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters())


def test_homeostasis_is_part_of_the_loss_in_training_only(folder):
    settings = {"feedback": "asymmetric", "feedback_angle": 90.0, "homeostasis_coef": 3.0}
    model = classifier(folder, **settings)
    labels = torch.tensor([0, 2, 1])
    assert model(IDS, labels=labels).homeostasis_loss is None
    plain = model(IDS, labels=labels).loss
    model.train()
    output = model(IDS, labels=labels)
    torch.testing.assert_close(output.homeostasis_loss, model.score.homeostasis_loss().reshape(1))
    torch.testing.assert_close(output.loss, plain + 3.0 * output.homeostasis_loss.squeeze())


def test_head_stays_in_float32_in_a_half_precision_model(folder, tmp_path):
    model = classifier(folder, dtype=torch.bfloat16)
    assert model.dtype == model.model.dtype == torch.bfloat16 and model.score.input_weight.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    assert loaded.model.dtype == torch.bfloat16 and loaded.score.readout_weight.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    output, expected = (
        loaded(IDS, attention_mask=MASK, labels=torch.tensor([0, 1, 2])),
        model(IDS, attention_mask=MASK),
    )
    assert output.logits.dtype == torch.float32
    resolution = torch.finfo(torch.bfloat16).eps  # that of the states which the head reads
    torch.testing.assert_close(output.logits, expected.logits, rtol=resolution, atol=resolution)
    output.loss.backward()
    assert loaded.model.embed_tokens.weight.grad.dtype == torch.bfloat16


def test_autocast_and_gradient_checkpointing_leave_the_gradient(folder):
    labels = torch.tensor([0, 2, 1])

    def gradients(checkpointing=False, autocast=False):
        torch.manual_seed(0)
        model = classifier(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(IDS, attention_mask=MASK, labels=labels, use_cache=False)
        output.loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients()
    for checkpointing in ("reentrant", "not reentrant"):
        for name, gradient in gradients(checkpointing).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    autocast = gradients(autocast=True)
    for name, gradient in expected.items():
        # What autocast rounds is the backbone; the head alone is bit for bit the same
        assert nn.functional.cosine_similarity(gradient.flatten(), autocast[name].flatten(), dim=0) > 0.98, name


def test_pipeline_and_push_to_hub(folder, tmp_path, monkeypatch):
    uploads = {}

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})

    # Where the module looks for it differs with the version
    monkeypatch.setattr("transformers.utils.hub.hf_api", Api, raising=False)
    monkeypatch.setattr("transformers.utils.hub.create_repo", Api().create_repo, raising=False)
    monkeypatch.setattr(
        EPModelForSequenceClassification,
        "_upload_modified_files",
        lambda self, working_dir, repo_id, *args, **kw: uploads.update(
            {repo_id: sorted(map(str, __import__("os").listdir(working_dir)))}
        ),
    )
    model = classifier(folder, num_labels=2)
    model.push_to_hub("user/model")
    assert {"config.json", "model.safetensors"} <= set(uploads["user/model"])
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(tiny_tokenizer())
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    inputs = tiny_tokenizer()("the film was good", return_tensors="pt", return_token_type_ids=False)
    probability = model(**inputs).logits.softmax(-1).max().item()
    assert classify("the film was good")[0]["score"] == pytest.approx(probability, abs=1e-6)


def of_config(config):
    return EPModelForSequenceClassification(config)


def t5():
    return EPConfig(text_config=AutoConfig.for_model("t5", d_model=8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: EPConfig(), ValueError, "`text_config` is missing"),
        (lambda f: classifier(f, homeostasis_coef=-1.0, feedback="asymmetric"), ValueError, "homeostasis_coef.*-1"),
        (lambda f: classifier(f, homeostasis_coef=1.0), ValueError, "homeostasis_coef=1.0.*feedback='asymmetric'"),
        (lambda f: classifier(f, hidden_features=[0, 8]), ValueError, "hidden_features.*0"),
        (lambda f: classifier(f, radius=0.0), ValueError, "radius.*0.0"),
        (lambda f: of_config(AutoConfig.from_pretrained(f)), TypeError, "EPConfig.*LlamaConfig"),
        (
            lambda f: EPModelForSequenceClassification.from_backbone(tiny_model(), hidden=8),
            ValueError,
            r"\['hidden'\].*hidden_features",
        ),
        (lambda f: of_config(t5()), ValueError, "t5.*encoder and a decoder"),
    ],
)
def test_wrong_input(call, error, message, folder):
    with pytest.raises(error, match=message):
        call(folder)


def test_no_configuration_is_built_without_a_backbone_to_save_one():
    """transformers before 5.20 builds a class's defaults to save what differs, unless told that there are none."""
    assert EPConfig.has_no_defaults_at_init
