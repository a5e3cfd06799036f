"""Encoders as backbones: which state the head reads, and what is saved."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.helpers.equilibrium import IDS
from tests.helpers.tiny import WORDS, save_tiny_model, tiny_model, tiny_pairs, tiny_tokenizer
from trl_ext import EPConfig, EPModelForSequenceClassification, EPRewardConfig, EPRewardTrainer
from trl_ext.equilibrium.modeling import default_pooling, pooled_states


RIGHT = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0], [11, 12, 0, 0, 0]])
MASK = (RIGHT != 0).long()
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "vocab_size": len(WORDS), "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
OWN = {"modernbert": SPECIAL, "albert": {"embedding_size": 16}}
FAMILIES = ["bert", "modernbert", "roberta", "distilbert", "albert", "electra", "deberta-v2"]


def encoder_config(family, **settings):
    return AutoConfig.for_model(family, **{**SIZES, **OWN.get(family, {}), **settings})


def classifier(family, pooling=None, num_labels=3, **settings):
    torch.manual_seed(0)
    backbone = AutoModel.from_config(encoder_config(family, **settings))
    return EPModelForSequenceClassification.from_backbone(
        backbone, num_labels=num_labels, hidden_features=[8, 8], pooling=pooling
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_train_and_are_saved_bit_equal(family, tmp_path):
    # The backbone's mode is the model's; with dropout no two forwards would be equal
    model = classifier(family).eval()
    assert model.pooling == "first" and getattr(model.model, "pooler", None) is None
    output = model(RIGHT, attention_mask=MASK, labels=torch.tensor([0, 2, 1]))
    states = model.model(RIGHT, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(output.logits, model.score(states[:, 0]))
    output.loss.backward()
    for name, parameter in model.named_parameters():
        # DDP stops where a parameter has none
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.score.input_weight.grad.norm() > 0 and model.get_input_embeddings().weight.grad.norm() > 0

    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is EPModelForSequenceClassification and not any(info.values())
    assert loaded.pooling == "first" and loaded.config.text_config.model_type == family
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # To rounding: loaded weights lie elsewhere in memory, and on some machines kernels add by alignment
    torch.testing.assert_close(loaded(RIGHT, attention_mask=MASK).logits, output.logits)


def test_pooler_is_that_of_berts_classifier(tmp_path):
    torch.manual_seed(1)
    reference = AutoModelForSequenceClassification.from_config(encoder_config("bert", num_labels=3)).eval()
    reference.save_pretrained(tmp_path)
    model = EPModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, pooling="pooler")
    model.score, head = reference.classifier, model.score
    torch.testing.assert_close(
        model(RIGHT, attention_mask=MASK).logits, reference(RIGHT, attention_mask=MASK).logits, rtol=1e-5, atol=1e-6
    )
    model.score = head
    model.save_pretrained(tmp_path / "saved")
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()) and loaded.pooling == "pooler"
    assert torch.equal(loaded.model.pooler.dense.weight, reference.bert.pooler.dense.weight)
    torch.testing.assert_close(loaded(RIGHT, attention_mask=MASK).logits, model(RIGHT, attention_mask=MASK).logits)


@pytest.mark.parametrize(("classifier_pooling", "pooling"), [("cls", "first"), ("mean", "mean")])
def test_modernbert_pools_as_its_configuration_says(classifier_pooling, pooling, tmp_path):
    torch.manual_seed(1)
    config = encoder_config("modernbert", num_labels=3, classifier_pooling=classifier_pooling)
    reference = AutoModelForSequenceClassification.from_config(config).eval()
    reference.save_pretrained(tmp_path)
    model = EPModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert model.pooling == pooling
    model.score = nn.Sequential(reference.head, reference.drop, reference.classifier)
    torch.testing.assert_close(
        model(RIGHT, attention_mask=MASK).logits, reference(RIGHT, attention_mask=MASK).logits, rtol=1e-4, atol=1e-5
    )


def test_states_of_either_padding():
    hidden = torch.arange(30.0).view(3, 5, 2)
    outputs = BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden[:, 0] + 0.5)
    mask = (IDS != 0).long()  # padded on neither side, the right, the left
    first = torch.stack([hidden[0, 0], hidden[1, 0], hidden[2, 2]])
    mean = torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0), hidden[2, 2:].mean(0)])
    for given in ({"attention_mask": mask}, {"input_ids": IDS, "pad_token_id": 0}):
        assert torch.equal(pooled_states(outputs, "first", **given), first)
        torch.testing.assert_close(pooled_states(outputs, "mean", **given), mean)
    last = torch.stack([hidden[0, 4], hidden[1, 2], hidden[2, 4]])
    assert torch.equal(pooled_states(outputs, "last", IDS, mask, 0), last)
    assert torch.equal(pooled_states(outputs, "pooler", IDS, mask, 0), hidden[:, 0] + 0.5)
    assert torch.equal(pooled_states(outputs, "first"), hidden[:, 0])  # nothing says that there is padding
    torch.testing.assert_close(pooled_states(outputs, "mean"), hidden.mean(1))


def test_defaults_and_decoders(tmp_path):
    assert default_pooling(encoder_config("bert", is_decoder=True)) == "last"
    for family in ("llama", "gpt2", "gemma2", "mixtral"):
        assert default_pooling(tiny_model(family).config) == "last"
    folder = save_tiny_model(tmp_path)
    model = EPModelForSequenceClassification.from_pretrained(folder, num_labels=1, hidden_features=[8], pooling="mean")
    states = model.model(IDS, attention_mask=(IDS != 0).long()).last_hidden_state
    expected = torch.stack([states[0].mean(0), states[1, :3].mean(0), states[2, 2:].mean(0)])
    torch.testing.assert_close(model(IDS, attention_mask=(IDS != 0).long()).logits, model.score(expected))


def test_reward_model_on_an_encoder(tmp_path):
    model = classifier("bert", num_labels=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = EPRewardConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, logging_steps=1,
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = EPRewardTrainer(model, arguments, train_dataset=tiny_pairs(8), processing_class=tiny_tokenizer())
    trainer.train()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert set(still) <= {"score.readout_bias"}, still  # it cancels in every pair


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EPConfig(text_config=encoder_config("bert"), pooling="max"), "pooling.*'max'"),
        (lambda: classifier("electra", pooling="pooler"), "pooling='pooler'.*ElectraModel.*'first'"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
