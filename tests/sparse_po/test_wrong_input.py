"""Each wrong input raises before any step, with the field, the value and the remedy; nothing saved is lost."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from trl import DPOConfig

from tests.helpers.sparse_po import COMMON, LOG2, losses, make_trainer
from tests.helpers.tiny import tiny_model, tiny_pairs
from trl_ext.core.checkpoint import MANIFEST_FILE
from trl_ext.sparse_po.sparse_po_config import SparsePOConfig
from trl_ext.sparse_po.sparse_po_trainer import SparsePOTrainer


def replaced(row, **values):
    rows = tiny_pairs(6).to_list()
    rows[row].update(values)
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_type": "dense"}, "mask_type.*'dense'"),
        ({"mask_init": "ones"}, "mask_init"),
        ({"beta": -0.1}, "`beta`.*-0.1"),
        ({"mask_weight_decay": -0.1}, "mask_weight_decay.*-0.1"),
        ({"mask_l1_reward": float("nan")}, "mask_l1_reward.*nan"),
        ({"mask_learning_rate": -1.0}, "mask_learning_rate.*-1.0"),
        ({"divergence_coef": -1.0}, "divergence_coef"),
        ({"mask_type": "ones", "independent_masks": True}, "independent_masks.*learned"),
        ({"mask_type": "activation", "mask_l1_reward": 0.1}, "mask_l1_reward.*learned"),
        ({"mask_reward": False, "mask_divergence": False}, "mask_type='ones'"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=False"),
        ({"padding_free": True}, "padding_free=False"),
        ({"use_weighting": True}, "use_weighting=False"),
        ({"use_liger_kernel": True}, "use_kernels"),
        ({"loss_type": ["sft"]}, "'sft'.*sigmoid.*SFTTrainer"),
        ({"loss_type": ["aot"]}, "'aot'.*sigmoid"),
        ({"strict_pairs": True, "drop_invalid_pairs": True}, "strict_pairs=True.*drop_invalid_pairs=True"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type.*reverse_kl"),
        ({"f_divergence_type": "forward_kl", "mask_type": "ones"}, "forward_kl.*divergence_coef=0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SparsePOConfig(output_dir=str(tmp_path), **{**COMMON, **settings})


def test_plain_dpo_config(tmp_path, tiny_path, tokenizer):
    with pytest.raises(TypeError, match="SparsePOConfig"):
        SparsePOTrainer(
            tiny_path, args=DPOConfig(str(tmp_path), **COMMON), train_dataset=tiny_pairs(), processing_class=tokenizer
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: tiny_pairs().remove_columns("chosen"), "'chosen'"),
        (lambda: tiny_pairs().rename_column("rejected", "refused"), "'rejected'.*refused"),
        (lambda: replaced(4, chosen=None), "Row 4 .*`chosen` is missing"),
        (lambda: tiny_pairs(1).select([]), "train dataset is empty"),
    ],
    ids=["no-chosen", "no-rejected", "none", "empty"],
)  # fmt: skip
def test_data(data, message, tmp_path, tiny_path, tokenizer):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_path, tokenizer, data=data(), max_steps=1)


def test_prompts_longer_than_max_length(tmp_path, tiny_path, tokenizer, caplog):
    with pytest.raises(ValueError, match="16 of 16 prompts.*max_length=2.*Raise `max_length`"):
        make_trainer(tmp_path, tiny_path, tokenizer, max_length=2)
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, max_length=4)
    assert 0 < len(trainer.train_dataset) < 16
    assert any("were dropped" in record.getMessage() for record in caplog.records)


def test_encoder_decoder(tmp_path, tokenizer):
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        make_trainer(tmp_path, T5ForConditionalGeneration(config), tokenizer)


def test_vocabulary_mismatch(tmp_path, tiny_path, tokenizer):
    reference = tiny_model(vocab_size=99)
    with pytest.raises(ValueError, match="99.*one vocabulary"):
        make_trainer(tmp_path, tiny_path, tokenizer, trainer_arguments={"ref_model": reference})


def test_resized_embeddings_without_a_reference(tmp_path, tiny_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.resize_token_embeddings(64)
    with pytest.raises(ValueError, match=r"64 tokens and its reference model of 36.*copy.deepcopy\(model\)"):
        make_trainer(tmp_path, model, tokenizer)
    reference = {"ref_model": copy.deepcopy(model)}  # the model is as it was
    trainer = make_trainer(tmp_path, model, tokenizer, max_steps=1, trainer_arguments=reference)
    trainer.train()
    assert losses(trainer) == [LOG2]


def test_model_from_nowhere(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"ref_model=copy.deepcopy\(model\)"):
        make_trainer(tmp_path, tiny_model(), tokenizer)


def test_trained_biases(tmp_path, tiny_path, tokenizer):
    config = LoraConfig(target_modules=["q_proj"], bias="all")
    with pytest.raises(ValueError, match="bias='all'.*bias='none'"):
        make_trainer(tmp_path, tiny_path, tokenizer, trainer_arguments={"peft_config": config})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path), config)
    with pytest.raises(ValueError, match=r"model.peft_config\['default'\].*bias='all'"):
        make_trainer(tmp_path, model, tokenizer)


def test_prompt_learning(tmp_path, tiny_path, tokenizer):
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="prompt learning.*LoraConfig"):
        make_trainer(tmp_path, tiny_path, tokenizer, trainer_arguments={"peft_config": config})


def test_vision_dataset(tmp_path, tiny_path, tokenizer):
    data = tiny_pairs(2).add_column("images", [[], []])
    with pytest.raises(ValueError, match="vision-language"):
        make_trainer(tmp_path, tiny_path, tokenizer, data=data)


def test_activation_mask_without_activations(tmp_path, tiny_path, tokenizer, monkeypatch):
    from trl_ext.sparse_po import activations

    monkeypatch.setattr(activations, "MLP_NAMES", ())
    monkeypatch.setattr(activations, "OUT_PROJECTION_NAMES", ())
    with pytest.raises(ValueError, match="'mlp'.*LlamaForCausalLM.*mask_type='learned'"):
        make_trainer(tmp_path, tiny_path, tokenizer, mask_type="activation", max_steps=1)


def test_nan_stops_and_keeps_the_last_checkpoint(tmp_path, tiny_path, tokenizer):
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, max_steps=5, save_strategy="steps", save_steps=2)
    compute_loss = trainer.compute_loss
    seen = []

    def poisoned(model, inputs, *args, **kwargs):
        seen.append(1)
        if len(seen) == 4:
            with torch.no_grad():
                model.get_output_embeddings().weight[5] = torch.nan
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = poisoned
    with pytest.raises(FloatingPointError, match="step 4.*checkpoint.*learning_rate"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "token_masks.safetensors").is_file()
    again = make_trainer(tmp_path, tiny_path, tokenizer, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(losses(again)) == 3


def test_checkpoint_without_masks(tmp_path, tiny_path, tokenizer):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, tiny_path, tokenizer, **settings, mask_type="ones").train()
    trainer = make_trainer(tmp_path / "b", tiny_path, tokenizer, **settings)
    with pytest.raises(ValueError, match="`mask_type` is 'learned' here and was 'ones'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (tmp_path / "checkpoint-1" / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match="token_masks.safetensors.*resume_from_checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_checkpoint_of_other_masks(tmp_path, tiny_path, tokenizer):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, tiny_path, tokenizer, **settings).train()
    other = make_trainer(tmp_path, tiny_path, tokenizer, **settings, independent_masks=True)
    with pytest.raises(ValueError, match="`independent_masks` is True here and was False"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (tmp_path / "checkpoint-1" / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match="independent_masks=False.*independent_masks=True"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    reference = tiny_model(seed=4, hidden_size=48)
    larger = make_trainer(tmp_path, tiny_path, tokenizer, **settings, trainer_arguments={"ref_model": reference})
    with pytest.raises(ValueError, match=r"other learned masks.*\(2, 32\) against \(2, 48\)"):
        larger.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_deepspeed_config_with_an_optimizer(tmp_path, tiny_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tiny_path, tokenizer)
    plugin = SimpleNamespace(deepspeed_config={"optimizer": {"type": "AdamW"}})
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(trainer.accelerator, "state", SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match="`optimizer` block.*learned masks.*Remove the block"):
        trainer._attach_masks()


def test_dead_masks_warn_once(tmp_path, tiny_path, tokenizer, caplog):
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, max_steps=3, mask_learning_rate=0.0)
    with torch.no_grad():
        trainer.masks.learned["common"].mixer_weight.fill_(-1.0)
    trainer.train()
    assert trainer.state.log_history[0]["mask/dead_sequences"] == 1.0
    assert losses(trainer)[0] == LOG2
    assert sum("token mask is zero" in record.getMessage() for record in caplog.records) == 1
