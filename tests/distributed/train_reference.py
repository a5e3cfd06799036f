"""One step of constrained PPO on a model that was changed in memory; started by a test in several processes."""

import argparse

from tests.helpers.launched import finish  # First: it spares DeepSpeed a compilation


# isort: split
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from transformers import AutoModelForCausalLM

from tests.helpers.constrained_ppo import low_ids, prompts
from tests.helpers.tiny import tiny_tokenizer
from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer
from trl_ext._upstream import gathered_state_dict


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    # The configuration first: ZeRO-3 cuts the model up as it is loaded
    args = ConstrainedPPOConfig(
        options.output, method="ppo", per_device_train_batch_size=4, max_completion_length=6, max_steps=1,
        logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
        dashboard=False, critic="separate", save_strategy="no",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(options.model)
    parameters = list(model.parameters())
    is_cut = all(hasattr(parameter, "ds_id") for parameter in parameters)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), GatheredParameters(parameters, modifier_rank=0):
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    trainer = ConstrainedPPOTrainer(
        model, reward_funcs=[low_ids], args=args, train_dataset=prompts(), processing_class=tiny_tokenizer()
    )
    policy, critic = (gathered_state_dict(part) for part in (trainer.policy.base_model, trainer.critic.backbone))
    difference = max((critic[name] - policy[name]).abs().max().item() for name in critic)
    trainer.train()
    found = {"is_cut": is_cut, "divergence": trainer.state.log_history[0]["kl/per_response"], "difference": difference}
    finish(trainer, options.output, found)


if __name__ == "__main__":
    main()
