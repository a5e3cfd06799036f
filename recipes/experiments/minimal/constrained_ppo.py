"""
Constrained PPO (https://huggingface.co/papers/2310.04373, xi-PPO) in plain torch, as the home of its equations.

B responses of T tokens have K rewards each. Of the K+1 streams with a value head and an advantage of their own, the
last is the KL. `tests/constrained_ppo/test_minimal.py` holds all of it equal to `ConstrainedPPOTrainer` on one batch.

python -m recipes.experiments.minimal.constrained_ppo
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Settings:
    """Thresholds of the K rewards, and the trainer's settings under the trainer's names and defaults."""

    thresholds: torch.Tensor
    gamma: float = 0.99
    gae_lambda: float = 0.95
    kl_coef: float = 0.2
    epsilon: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.5
    kl_vf_coef: float = 0.2
    multiplier_learning_rate: float = 0.1
    multiplier_momentum: float = 0.1
    multiplier_proportional: float = 10.0


@dataclass
class Dual:
    """The multipliers `l`, `(K,)`, and their momentum."""

    multipliers: torch.Tensor
    momentum: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.momentum = torch.zeros_like(self.multipliers)

    def step(self, mean_rewards, s):
        """One dual step for each rollout; returns the weights `w`, `(K,)`, in (-1, 1)."""
        violation = s.thresholds - mean_rewards
        self.momentum = s.multiplier_momentum * self.momentum + violation
        self.multipliers = self.multipliers + s.multiplier_learning_rate * self.momentum
        return torch.tanh(self.multipliers + s.multiplier_proportional * violation)


def score(policy, heads, batch):
    """Log-probabilities `(B, T)` of the response tokens, and values `(B, T, K+1)` of the states before them."""
    states = policy.base_model(batch["ids"], attention_mask=batch["attention"]).last_hidden_state
    length = batch["mask"].size(1)
    states = states[:, -length - 1 : -1]
    log_probs = policy.lm_head(states).log_softmax(-1)
    chosen = batch["ids"][:, -length:].unsqueeze(-1)
    return log_probs.gather(-1, chosen).squeeze(-1), heads(states)


def gae(rewards, values, mask, s):
    """Advantages and returns of one stream, all `(B, T)`."""
    advantages, next_value, next_advantage = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + s.gamma * next_value - values[:, t]
        # Past the end of a response, value and advantage are zero
        next_advantage = (delta + s.gamma * s.gae_lambda * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def whiten(stream, mask):
    """Mean zero and deviation one over the tokens of a rollout; a stream without spread says nothing."""
    mean = (stream * mask).sum() / mask.sum()
    deviation = (((stream - mean) * mask).square().sum() / mask.sum()).sqrt()
    return (stream - mean) * mask / deviation if deviation > 1e-6 * mean.abs() else torch.zeros_like(stream)


def mix(advantages, weights, mask):
    """Equation (4.4): `(K - sum_i w_i) A_KL + sum_i w_i A_i`, of whitened streams."""
    *rewards, kl = [whiten(stream, mask) for stream in advantages]
    mixed = (len(weights) - weights.sum()) * kl
    return mixed + sum(weight * stream for weight, stream in zip(weights, rewards, strict=True))


@torch.no_grad()
def estimate(policy, reference, heads, batch, dual, s):
    """What stays fixed during the updates on a rollout; takes the dual step."""
    mask, rewards = batch["mask"], batch["rewards"]
    log_probs, values = score(policy, heads, batch)
    reference_log_probs, _ = score(reference, heads, batch)
    # The KL is a reward of every token, the others come with the last token of a response
    is_last = torch.arange(mask.size(1)) == mask.sum(1, keepdim=True) - 1
    streams = [torch.where(is_last, reward.unsqueeze(1), 0.0) for reward in rewards.unbind(1)]
    streams.append(-s.kl_coef * (log_probs - reference_log_probs) * mask)
    estimates = [gae(r, v, mask, s) for r, v in zip(streams, values.unbind(-1), strict=True)]
    weights = dual.step(rewards.mean(0), s)
    return {
        "log_probs": log_probs,
        "values": values,
        "returns": torch.stack([returns for _, returns in estimates], -1),
        "advantages": mix([advantages for advantages, _ in estimates], weights, mask),
    }


def loss_of(policy, heads, batch, fixed, s):
    """Clipped policy loss and clipped value losses, means over the tokens of the rollout."""
    mask = batch["mask"]
    log_probs, values = score(policy, heads, batch)
    ratio = (log_probs - fixed["log_probs"]).exp()
    gain = torch.minimum(ratio * fixed["advantages"], ratio.clamp(1 - s.epsilon, 1 + s.epsilon) * fixed["advantages"])
    moved = (values - fixed["values"]).clamp(-s.cliprange_value, s.cliprange_value)
    error = torch.maximum((values - fixed["returns"]).square(), (fixed["values"] + moved - fixed["returns"]).square())
    coefs = torch.tensor([s.vf_coef] * (values.size(-1) - 1) + [s.kl_vf_coef])
    return ((0.5 * error @ coefs - gain) * mask).sum() / mask.sum()


def main(num_rollouts=60):
    """Brings the share of low token ids of a small random policy from 0.5 to 0.7."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=None, eos_token_id=None, **sizes))
    reference, heads = copy.deepcopy(policy), nn.Linear(32, 2)
    nn.init.zeros_(heads.weight)
    optimizer = torch.optim.AdamW([*policy.parameters(), *heads.parameters()], 2e-3)
    s, dual = Settings(torch.tensor([0.7])), Dual(torch.zeros(1))
    for rollout in range(num_rollouts):
        prompts = torch.randint(64, (32, 4))
        ids = policy.generate(prompts, do_sample=True, min_new_tokens=8, max_new_tokens=8, top_k=0, use_cache=True)
        rewards = (ids[:, 4:] < 32).float().mean(1, keepdim=True)
        batch = {"ids": ids, "attention": torch.ones_like(ids), "mask": torch.ones(32, 8), "rewards": rewards}
        fixed = estimate(policy, reference, heads, batch, dual, s)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(policy, heads, batch, fixed, s).backward()
            optimizer.step()
        print(f"{rollout:3d}  reward {rewards.mean():.3f}  multiplier {dual.multipliers.item():+.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
