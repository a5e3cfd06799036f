"""Trainers, batches and head inputs for SparsePO's tests."""

import torch
from trl import DPOConfig, DPOTrainer

from tests.helpers.tiny import tiny_pairs
from trl_ext.sparse_po.lm_head.paired_log_probs import paired_log_probs
from trl_ext.sparse_po.reference_pass import standardize
from trl_ext.sparse_po.sparse_po_config import SparsePOConfig
from trl_ext.sparse_po.sparse_po_trainer import SparsePOTrainer


# The loss of a policy that equals its reference, as float32 has it
LOG2 = -torch.nn.functional.logsigmoid(torch.zeros(())).item()
COMMON = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "beta": 0.5,
}


def make_trainer(folder, path, tokenizer, *, dpo=False, data=None, trainer_arguments=None, **settings):
    config_class, trainer_class = (DPOConfig, DPOTrainer) if dpo else (SparsePOConfig, SparsePOTrainer)
    settings = {**COMMON, **settings}
    return trainer_class(
        model=path,
        args=config_class(output_dir=str(folder), **settings),
        train_dataset=tiny_pairs() if data is None else data,
        processing_class=tokenizer,
        **(trainer_arguments or {}),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def perturb(model, scale=0.05):
    """Moves the policy away from the reference, so that log-ratios and divergences are not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token_masks" not in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def gradients(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and "token_masks" not in name
    }


def anisotropic_states(seed, num_layers=4, num_tokens=128, hidden_size=64):
    """States as language models have them: one direction shared by all tokens outweighs what tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    common = 4.0 * torch.randn(num_layers, 1, hidden_size, generator=generator)
    return standardize(common + torch.randn(num_layers, num_tokens, hidden_size, generator=generator))


def head_inputs(num_tokens=11, hidden=6, ref_hidden=4, vocab=37, bias=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        draw(num_tokens, hidden).requires_grad_(),
        draw(vocab, hidden).requires_grad_(),
        draw(vocab).requires_grad_() if bias else None,
        draw(num_tokens, ref_hidden),
        draw(vocab, ref_hidden),
        draw(vocab) if bias else None,
        torch.randint(0, vocab, (num_tokens,), generator=generator),
    ]


def paired(tensors, transforms=((1.0, None), (1.0, None)), **options):
    policy_hidden, policy_weight, policy_bias, ref_hidden, ref_weight, ref_bias, labels = tensors
    return paired_log_probs(
        policy_hidden, policy_weight, ref_hidden, ref_weight, labels, policy_bias=policy_bias, ref_bias=ref_bias,
        policy_logit_scale=transforms[0][0], policy_softcap=transforms[0][1], ref_logit_scale=transforms[1][0],
        ref_softcap=transforms[1][1], **options,
    )  # fmt: skip


PLAIN = ((1.0, None), (1.0, None))
TRANSFORMS = [PLAIN, ((0.5, None), (2.0, None)), ((1.0, 3.0), (1.0, 2.0)), ((0.7, 4.0), (1.0, None))]
