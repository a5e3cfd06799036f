import itertools
from contextlib import nullcontext

import pytest
import torch
import trl
from packaging.version import Version
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from tests import glossary
from tests.helpers.compiling import compiled_training, slow_to_compile
from tests.helpers.sparse_po import LOG2, first_batch, gradients, losses, make_trainer, perturb
from tests.helpers.tiny import FAMILIES, qlora_arguments, save_tiny_model, tiny_model, tiny_pairs
from trl_ext.sparse_po.loss import sparse_po_loss
from trl_ext.sparse_po.policy_forward import MaskedCausalLMOutput
from trl_ext.sparse_po.sparse_po_config import SparsePOConfig
from trl_ext.sparse_po.sparse_po_trainer import SparsePOTrainer, token_metrics


ONES = {"mask_type": "ones", "divergence_coef": 0.0}


@pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16") and not torch.cuda.is_available(),
    reason="DPOTrainer of TRL 1.15 scores with a Triton kernel only",
)
@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"loss_type": ["hinge"]},
        {"loss_type": ["ipo"]},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
        {"loss_type": ["nca_pair"]},
        {"loss_type": ["bco_pair"]},
        {"loss_type": ["sppo_hard"]},
        {"loss_type": ["aot_unpaired"]},
        {"loss_type": ["apo_zero", "apo_down"], "loss_weights": [0.5, 0.5]},
        {"loss_type": ["discopop"]},
        {"loss_type": ["sigmoid_norm"]},
        {"ld_alpha": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},  # RPO
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "ld_alpha": 0.5},  # MPO
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid", "sft"]},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    ],
    ids=lambda loss: "-".join(map(str, loss.values())) or "sigmoid",
)
def test_ones_without_divergence_is_dpo(loss, tmp_path, tiny_path, tokenizer):
    found = []
    for dpo in (True, False):
        trainer = make_trainer(tmp_path, tiny_path, tokenizer, dpo=dpo, **loss, **({} if dpo else ONES))
        perturb(trainer.model)
        value = trainer.compute_loss(trainer.model, first_batch(trainer))
        value.backward()
        found.append(
            (value.detach(), gradients(trainer.model), {k: v[-1] for k, v in trainer._metrics["train"].items()})
        )
    (dpo_loss, dpo_gradients, dpo_metrics), (our_loss, our_gradients, our_metrics) = found
    torch.testing.assert_close(our_loss, dpo_loss, rtol=2e-6, atol=1e-6)
    assert our_gradients.keys() == dpo_gradients.keys()
    for name, gradient in dpo_gradients.items():
        # discopop divides the logits by its temperature of 0.05, sppo_hard squares them and f-divergences take
        # exponentials, and so of rounding
        amplified = loss.get("loss_type") in (["discopop"], ["sppo_hard"]) or "f_divergence_type" in loss
        tolerance = 1e-4 if amplified else 2e-6
        assert (our_gradients[name] - gradient).abs().max() <= tolerance * max(1.0, gradient.abs().max()), name
    for name in dpo_metrics:
        assert our_metrics[name] == pytest.approx(dpo_metrics[name], rel=1e-4, abs=1e-5), name


def test_sft_term_is_not_masked(tmp_path, tiny_path, tokenizer):
    """Beside a masked loss: the mean over the chosen tokens of plain log-probabilities, from whole logits."""
    values = []
    for loss_type in (["sigmoid"], ["sigmoid", "sft"]):
        settings = {"loss_type": loss_type, "loss_weights": [2.0, 0.25][: len(loss_type)]}
        trainer = make_trainer(tmp_path, tiny_path, tokenizer, mask_type="activation", **settings)
        perturb(trainer.model)
        batch = first_batch(trainer)
        values.append(trainer.compute_loss(trainer.model, batch))
    chosen = batch["completion_mask"][:4, 1:].bool()
    logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:4, :-1]
    labels = batch["input_ids"][:4, 1:].masked_fill(~chosen, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(values[1] - values[0], 0.25 * expected, rtol=1e-5, atol=1e-6)


MASKS = [
    {},
    {"independent_masks": True},
    {"mask_reward": False},
    {"mask_divergence": False},
    {"mask_type": "activation"},
    {"mask_type": "ones"},
    {"mask_type": "ones", "divergence_coef": 0.5, "detach_chosen_divergence": True},
    {"independent_masks": True, "mask_l1_reward": 0.01, "mask_l1_divergence": 0.02},
    {"mask_l1_reward": 0.01, "mask_l1_divergence": 0.02},
]


@pytest.mark.parametrize("masks", MASKS, ids=lambda masks: "-".join(map(str, masks)) or "common")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_trainer_loss_equals_the_formula(family, masks, tmp_path, tokenizer):
    """The trainer's loss and its gradients against full logits in float64 of separate models."""
    path = save_tiny_model(
        tmp_path / "model", family, **({"final_logit_softcapping": 5.0} if family == "gemma2" else {})
    )
    trainer = make_trainer(tmp_path, path, tokenizer, **masks)
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    ours = gradients(trainer.model)

    policy = tiny_model(family).double()
    policy.load_state_dict(trainer.model.state_dict(), strict=False)
    reference = tiny_model(family).double()
    reference.load_state_dict(trainer.ref_model.state_dict())
    weights = trainer.token_masks(batch)
    labels = batch["input_ids"][:, 1:]
    completion = batch["completion_mask"][:, 1:]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = policy(**inputs).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        reference_logits = reference(**inputs).logits[:, :-1].log_softmax(-1)
    gathered = (logits - reference_logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * completion
    divergences = (reference_logits.exp() * (reference_logits - logits)).sum(-1) * completion
    args = trainer.args
    expected = sparse_po_loss(
        gathered,
        divergences,
        weights["reward"].double(),
        weights["divergence"].double(),
        args.beta,
        divergence_coef=args.divergence_coef,
        detach_chosen_divergence=args.detach_chosen_divergence,
        l1_reward=args.mask_l1_reward,
        l1_divergence=args.mask_l1_divergence,
        common_mask=args.mask_type == "learned" and not args.independent_masks,
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(ours[name].double(), gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("family", "mask_type"), list(itertools.product(FAMILIES, ["learned", "activation"])))
def test_trains_every_family(family, mask_type, tmp_path, tokenizer):
    path = save_tiny_model(tmp_path / "model", family)
    trainer = make_trainer(tmp_path, path, tokenizer, mask_type=mask_type, max_steps=3)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    unchanged = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    assert not unchanged
    history = trainer.state.log_history[0]
    for key in (
        "rewards/accuracies", "logps/chosen", "kl/chosen", "kl/rejected", "mask/reward/mean", "mask/divergence/mean",
        "mask/reward/sparsity_chosen", "mask/reward/sparsity_rejected", "mask/divergence/sparsity_chosen",
        "mask/divergence/sparsity_rejected", "mask/dead_sequences",
    ):  # fmt: skip
        assert key in history
    assert ("aux_loss" in history) == (family == "mixtral")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])  # eager only
def test_activation_mask_is_the_same_under_every_attention_kernel(family, tmp_path, tokenizer):
    path = save_tiny_model(tmp_path / "model", family)
    found = []
    for attention in ("eager", "sdpa"):
        trainer = make_trainer(
            tmp_path, path, tokenizer, mask_type="activation", model_init_kwargs={"attn_implementation": attention}
        )
        found.append(trainer.token_masks(first_batch(trainer))["reward"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    completion = first_batch(trainer)["completion_mask"][:, 1:].bool()
    assert torch.count_nonzero(found[0][~completion]) == 0
    assert found[0].max() <= 1 and found[0].min() >= 0 and found[0][completion].std() > 0.01


def test_what_fired_is_logged_once(tmp_path, tiny_path, tokenizer, monkeypatch):
    from trl_ext.sparse_po import activations

    lines = []
    type(activations.logger).info_once.cache_clear()
    monkeypatch.setattr(activations.logger, "info", lines.append)
    make_trainer(tmp_path, tiny_path, tokenizer, mask_type="activation", max_steps=2).train()
    assert len(lines) == 1
    for part in ("mlp: input", "attention.query", "attention.key", "attention.value", "final norm", "mean logit"):
        assert part in lines[0]


def test_logits_on_request(tmp_path, tiny_path, tokenizer):
    """TRL's `return_outputs` asks the model a second time, for plain logits, and the loss is the first call's."""
    trainer = make_trainer(tmp_path, tiny_path, tokenizer)
    batch = first_batch(trainer)
    with pytest.warns(FutureWarning, match="return_outputs"):
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    plain = trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask")})
    assert torch.equal(loss, trainer.compute_loss(trainer.model, batch))
    assert torch.equal(outputs.logits, plain.logits)
    assert not trainer.model._forward_hooks and not trainer.precompute_ref_logps


def test_metrics_by_hand():
    completion = torch.tensor([[True, True, False], [True, True, True]])
    per_token = {
        "policy_log_probs": torch.tensor([[-1.0, -2.0, 0.0], [-3.0, -1.0, -1.0]]),
        "divergences": torch.tensor([[0.5, 0.25, 0.0], [1.0, 0.0, 0.0]]),
        "reward_mask": torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]),
        "divergence_mask": torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),
    }
    found = token_metrics(MaskedCausalLMOutput(**per_token), completion)
    expected = {
        "logps/chosen": -3.0, "logps/rejected": -5.0, "kl/chosen": 0.75, "kl/rejected": 1.0,
        "mask/reward/mean": 1.0, "mask/reward/sparsity_chosen": 1 / 2, "mask/reward/sparsity_rejected": 2 / 3,
        "mask/divergence/mean": 2 / 5, "mask/divergence/sparsity_chosen": 0.0,
        "mask/divergence/sparsity_rejected": 1.0, "mask/dead_sequences": 1 / 2,
    }  # fmt: skip
    assert found == pytest.approx(expected)


def test_layer_states_are_hidden_states(tmp_path, tiny_path, tokenizer):
    from trl_ext.sparse_po.reference_pass import standardize

    trainer = make_trainer(tmp_path, tiny_path, tokenizer)
    batch = first_batch(trainer)
    states = trainer._reference_input(batch).states
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    hidden = tiny_model()(**inputs, output_hidden_states=True).hidden_states[1:]
    completion = batch["completion_mask"][:, 1:].bool()
    expected = torch.stack([standardize(h[:, :-1][completion]) for h in hidden])
    torch.testing.assert_close(states.layer_states, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.hidden, hidden[-1][:, :-1][completion], rtol=1e-4, atol=1e-5)


def test_masks_have_their_own_groups(tmp_path, tiny_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tiny_path, tokenizer, mask_learning_rate=0.5, mask_weight_decay=0.3, weight_decay=0.1
    )
    optimizer = trainer.create_optimizer()
    mask_groups = [group for group in optimizer.param_groups if group.get("token_masks")]
    assert [group["weight_decay"] for group in mask_groups] == [0.3, 0.0]
    assert all(group["lr"] == 0.5 for group in mask_groups)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters})
    assert {id(p) for p in parameters} == {id(p) for p in trainer.model.parameters()}
    assert {id(p) for g in mask_groups for p in g["params"]} == {id(p) for p in trainer.masks.parameters()}
    assert sum(len(g["params"]) for g in trainer.create_optimizer().param_groups) == len(parameters)


def test_own_optimizer_trains_the_masks_too(tmp_path, tiny_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(
        tmp_path, model, tokenizer, max_steps=2, trainer_arguments={"optimizers": (optimizer, None)}
    )
    perturb(trainer.model)
    before = [p.detach().clone() for p in trainer.masks.parameters()]
    trainer.train()
    assert all(not torch.equal(p, q) for p, q in zip(trainer.masks.parameters(), before, strict=True))
    assert {group["initial_lr"] for group in optimizer.param_groups} == {0.1}  # not `args.learning_rate`


def test_own_optimizer_and_scheduler(tmp_path, tiny_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
    trainer = make_trainer(
        tmp_path, model, tokenizer, max_steps=3, trainer_arguments={"optimizers": (optimizer, scheduler)}
    )
    trainer.train()
    assert [entry["learning_rate"] for entry in trainer.state.log_history[:3]] == pytest.approx([0.0, 0.025, 0.05])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.075] * 3)


def test_saved_policy_is_a_plain_model(tmp_path, tiny_path, tokenizer):
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, max_steps=2, independent_masks=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, trainer.model.get_parameter(name), rtol=0, atol=0)
    saved = load_file(tmp_path / "saved" / "token_masks.safetensors")
    assert saved.keys() == dict(trainer.masks.learned.named_parameters()).keys()
    for name, parameter in trainer.masks.learned.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [{}, {"independent_masks": True, "mask_learning_rate": 0.1}, {"peft": True}, {"family": "mixtral"}],
    ids=lambda settings: "-".join(settings) or "common",
)
def test_resumed_equals_uninterrupted(settings, tmp_path, tiny_path, tokenizer):
    settings = dict(settings)
    if "family" in settings:
        tiny_path = save_tiny_model(tmp_path / "model", settings.pop("family"))
    arguments = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])} if settings.pop("peft", False) else {}
    settings |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "trainer_arguments": arguments}
    uninterrupted = make_trainer(tmp_path / "a", tiny_path, tokenizer, **settings)
    uninterrupted.train()
    resumed = make_trainer(tmp_path / "b", tiny_path, tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(resumed) == losses(uninterrupted)
    for (name, p), (_, q) in zip(
        resumed.model.named_parameters(), uninterrupted.model.named_parameters(), strict=True
    ):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_load_best_model_restores_it_and_its_masks(family, tmp_path, tokenizer):
    path = save_tiny_model(tmp_path / "model", family)
    trainer = make_trainer(
        tmp_path, path, tokenizer, max_steps=4, learning_rate=1.0, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, mask_learning_rate=0.1,
        trainer_arguments={"eval_dataset": tiny_pairs(8, seed=1)},
    )  # fmt: skip

    class SecondIsBest(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = abs(state.global_step - 2)

    trainer.add_callback(SecondIsBest())
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    saved = load_file(f"{best}/token_masks.safetensors")
    for name, parameter in trainer.masks.learned.named_parameters():
        assert torch.equal(parameter, saved[name]), name
    for name, tensor in AutoModelForCausalLM.from_pretrained(best).state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True},
        pytest.param({"torch_compile": True, "share_prompt": True}, marks=slow_to_compile),
    ],
    ids=["accumulation", "checkpointing", "reentrant", "compiled", "compiled-shared"],
)
def test_same_training_by_other_means(settings, tmp_path, tiny_path, tokenizer):
    plain = make_trainer(tmp_path / "a", tiny_path, tokenizer, max_steps=3)
    plain.train()
    with compiled_training() if "torch_compile" in settings else nullcontext({}) as compiling:
        settings = {**{name: settings[name] for name in settings if name != "torch_compile"}, **compiling}
        other = make_trainer(tmp_path / "b", tiny_path, tokenizer, max_steps=3, **settings)
        other.train()
    assert losses(other) == pytest.approx(losses(plain), abs=2e-4)
    for p, q in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=2e-3)


def test_lora_trains_masks_against_the_disabled_adapter(tmp_path, tiny_path, tokenizer):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, max_steps=3, trainer_arguments={"peft_config": config})
    batch = first_batch(trainer)
    full = make_trainer(tmp_path, tiny_path, tokenizer)
    torch.testing.assert_close(
        trainer._reference_input(batch).states.hidden, full._reference_input(batch).states.hidden, rtol=1e-5, atol=1e-6
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        trained = "lora_" in name or "token_masks" in name
        assert torch.equal(parameter, before[name]) != trained, name
    assert trainer.state.log_history[0]["kl/chosen"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    assert not any("token_masks" in name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors"))


def test_qlora(tmp_path, tokenizer):
    pytest.importorskip("bitsandbytes")
    path = save_tiny_model(tmp_path / "model", hidden_size=64)
    trainer = make_trainer(tmp_path, path, tokenizer, max_steps=3, bf16=True, trainer_arguments=qlora_arguments())
    assert trainer.model.is_loaded_in_4bit
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert {name.split(".")[-1] for name in before} >= {"layer_weight", "weight"}
    assert all(p.dtype == torch.float32 for p in trainer.masks.parameters())
    assert all(not torch.equal(trainer.model.get_parameter(name), old) for name, old in before.items())
    assert trainer.state.log_history[0]["kl/chosen"] == 0 and losses(trainer)[0] == LOG2 != losses(trainer)[2]


# Said by peft 0.18
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
def test_ref_adapter_and_trained_head(tmp_path, tiny_path, tokenizer):
    from peft import get_peft_model

    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path), config)
    trainer = make_trainer(tmp_path, model, tokenizer, max_steps=2)
    batch = first_batch(trainer)
    trainer.compute_loss(trainer.model, batch)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["kl/chosen"] == 0  # the "ref" adapter starts as a copy
    trainer.train()
    head = trainer.model.get_base_model().get_output_embeddings()
    assert trainer._reference_input(batch).head is head.modules_to_save["ref"]
    assert trainer.state.log_history[1]["kl/chosen"] > 0


def test_separate_reference_model_of_another_size(tmp_path, tiny_path, tokenizer):
    reference = tiny_model("llama", seed=3, hidden_size=48, num_hidden_layers=3)
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, max_steps=2, trainer_arguments={"ref_model": reference})
    assert trainer.masks.learned["common"].layer_weight.shape == (3, 48)
    trainer.train()
    assert trainer.state.log_history[0]["kl/chosen"] > 0


def test_sync_ref_model(tmp_path, tiny_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tiny_path, tokenizer, max_steps=2, sync_ref_model=True, ref_model_sync_steps=2,
        ref_model_mixup_alpha=1.0,
    )  # fmt: skip
    trainer.train()
    for name, parameter in trainer.ref_model.named_parameters():
        torch.testing.assert_close(parameter, trainer.model.get_parameter(name), rtol=0, atol=0)


def test_bfloat16(tmp_path, tiny_path, tokenizer):
    reference = make_trainer(tmp_path, tiny_path, tokenizer, max_steps=2)
    reference.train()
    mixed = make_trainer(tmp_path, tiny_path, tokenizer, max_steps=2, bf16=True)
    mixed.train()
    pure = make_trainer(tmp_path, tiny_path, tokenizer, max_steps=2, model_init_kwargs={"dtype": "bfloat16"})
    pure.train()
    assert next(pure.masks.parameters()).dtype == torch.float32
    for trainer in (mixed, pure):
        assert losses(trainer)[0] == losses(reference)[0] == LOG2
        assert losses(trainer)[1] == pytest.approx(losses(reference)[1], abs=0.05)


def test_conversational_data_and_evaluation(tmp_path, tiny_path, tokenizer):
    data = tiny_pairs(8, conversational=True)
    trainer = make_trainer(
        tmp_path,
        tiny_path,
        tokenizer,
        data=data,
        max_steps=1,
        trainer_arguments={"eval_dataset": tiny_pairs(4, seed=2)},
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0 and "eval_mask/reward/mean" in metrics and metrics["eval_kl/chosen"] >= 0
    assert glossary.unknown(trainer.state.log_history) == set()
    again = trainer.evaluate(tiny_pairs(4, seed=2))
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_token_masks_shapes_and_rng(tmp_path, tiny_path, tokenizer):
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, independent_masks=True)
    batch = next(iter(trainer.get_train_dataloader()))
    weights = trainer.token_masks(batch)
    rows, length = batch["input_ids"].shape
    outside = batch["completion_mask"][:, 1:] == 0
    assert set(weights) == {"reward", "divergence"}
    for mask in weights.values():
        assert mask.shape == (rows, length - 1) and mask.dtype == torch.float32 and not mask.requires_grad
        assert torch.count_nonzero(mask[outside]) == 0 and mask[~outside].mean() > 0.5
    assert not torch.equal(weights["reward"], weights["divergence"])


def test_max_length_truncates_completions(tmp_path, tiny_path, tokenizer):
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, max_length=6, max_steps=1)
    assert first_batch(trainer)["input_ids"].shape[1] == 6
    trainer.train()
    assert losses(trainer)[0] > 0


def test_default_config_name(tiny_path, tokenizer, tmp_path, monkeypatch):
    from trl_ext.sparse_po import sparse_po_trainer

    class CpuConfig(SparsePOConfig):
        def __init__(self, output_dir):
            super().__init__(output_dir, use_cpu=True, bf16=False)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sparse_po_trainer, "SparsePOConfig", CpuConfig)
    trainer = SparsePOTrainer(tiny_path, train_dataset=tiny_pairs(4), processing_class=tokenizer)
    assert trainer.args.output_dir.endswith("-SparsePO") and isinstance(trainer.args, SparsePOConfig)
