import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_ext.constrained_ppo.advantages import (
    adaptive_lambda,
    gae,
    merged_moments,
    mix_advantages,
    reward_streams,
    token_moments,
    whiten,
)


def loop_gae(rewards, values, mask, gamma, gae_lambda):
    """One response at a time, over the list of its tokens, as the equations stand."""
    advantages = torch.zeros_like(values)
    for row in range(len(rewards)):
        tokens = [t for t in range(values.shape[1]) if mask[row, t]]
        for start, t in enumerate(tokens):
            total = 0.0
            for k, u in enumerate(tokens[start:]):
                following = values[row, tokens[start + k + 1]] if start + k + 1 < len(tokens) else 0.0
                delta = rewards[row, u] + gamma * following - values[row, u]
                total += (gamma * gae_lambda) ** k * delta
            advantages[row, t] = total
    return advantages


def batch(seed=0, streams=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 7) if streams is None else (streams, 4, 7)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]])
    return values, mask


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 0.5)])
def test_gae_equals_the_sums(gamma, gae_lambda):
    (rewards, mask), (values, _) = batch(0), batch(1)
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    expected = loop_gae(rewards, values, mask, gamma, gae_lambda)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, (expected + values) * mask, rtol=1e-12, atol=1e-12)


def test_gae_by_hand():
    # Two tokens, reward 1 at the end, values 0.5 and 0.2: delta_2 = 0.8, delta_1 = 0 + 0.9 * 0.2 - 0.5 = -0.32
    advantages, returns = gae(
        torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.2, 9.0]]), torch.tensor([[1, 1, 0]]), 0.9, 0.5
    )
    torch.testing.assert_close(advantages, torch.tensor([[-0.32 + 0.45 * 0.8, 0.8, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.5 - 0.32 + 0.36, 1.0, 0.0]]))


def test_gae_of_streams_is_gae_of_each_and_without_gradient():
    (rewards, mask), values = batch(0), batch(1)[0].requires_grad_()
    both = [gae(scale * rewards, values, mask, 0.99, 0.95)[0] for scale in (1.0, 2.0)]
    assert not both[0].requires_grad
    assert not torch.equal(both[0], both[1])


def step_gae(rewards, values, mask, gamma, gae_lambda):
    """Token by token from the end, as the recursion stands."""
    found, inside = [], mask.bool()
    next_value, next_advantage = torch.zeros_like(values[..., 0]), torch.zeros_like(values[..., 0])
    for t in reversed(range(mask.size(1))):
        advantage = rewards[..., t] + gamma * next_value - values[..., t] + gamma * gae_lambda * next_advantage
        next_value = torch.where(inside[:, t], values[..., t], next_value)
        next_advantage = torch.where(inside[:, t], advantage, next_advantage)
        found.append(advantage)
    advantages = torch.stack(found[::-1], dim=-1).masked_fill(~inside, 0.0)
    return advantages, (advantages + values).masked_fill(~inside, 0.0)


def long_batch(length, streams=3, rows=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    rewards, values = torch.randn(2, streams, rows, length, generator=generator, dtype=dtype)
    mask = torch.rand(rows, length, generator=generator) < 0.8
    mask[0, length * 3 // 4 :] = False
    return rewards, values, mask


@pytest.mark.parametrize(
    ("length", "gamma", "gae_lambda"),
    [(8192, 1.0, 1.0), (8192, 0.99, 0.9), (1000, 0.5, 1.0), (1000, 1.0, 0.0), (1000, 0.0, 1.0)],
)
def test_scan_equals_the_recursion_over_long_responses(length, gamma, gae_lambda):
    """At 8,192 tokens powers of 0.89 underflow, and their reciprocals overflow."""
    rewards, values, mask = long_batch(length)
    expected = step_gae(rewards.double(), values.double(), mask, gamma, gae_lambda)
    for found, exact in zip(gae(rewards, values, mask, gamma, gae_lambda), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13, 64])
def test_scan_of_every_length_and_lambda_of_each_response(length):
    rewards, values, mask = long_batch(length, dtype=torch.float64)
    lambdas = torch.tensor([0.3, 0.9], dtype=torch.float64)
    found = gae(rewards, values, mask, 0.97, lambdas, 1.0)
    expected, (_, returns) = (
        step_gae(rewards, values, mask, 0.97, lambdas)[0],
        step_gae(rewards, values, mask, 0.97, 1),
    )
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], returns, rtol=1e-12, atol=1e-12)
    # With a lambda of 1 the returns are discounted sums of rewards, whatever the values
    torch.testing.assert_close(gae(rewards, 0 * values, mask, 0.97, 1.0)[1], returns, rtol=1e-12, atol=1e-12)


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_number_of_launches_grows_with_the_logarithm():
    counts = []
    for length in (64, 512, 4096):
        with Launches() as launches:
            gae(*long_batch(length), 0.99, 0.95)
        counts.append(launches.count)
    assert counts[2] < 250
    # Three doublings each
    assert counts[2] - counts[1] == counts[1] - counts[0] <= 3 * 12


@pytest.mark.parametrize("length", [48, 1024])
def test_scan_is_not_slower_than_the_recursion(length):
    batch = long_batch(length, streams=4, rows=16)
    seconds = {}
    for function in (gae, step_gae):
        times = []
        for _ in range(3):
            start = time.process_time()
            function(*batch, 0.99, 0.95)
            times.append(time.process_time() - start)
        seconds[function] = min(times)
    assert seconds[gae] < seconds[step_gae]


def test_lambda_of_a_length():
    mask = torch.zeros(4, 400)
    for row, length in enumerate((400, 40, 20, 0)):
        mask[row, :length] = 1
    torch.testing.assert_close(adaptive_lambda(mask, 0.05), torch.tensor([0.95, 0.5, 0.0, 0.0]))
    # The weights of the errors that follow sum to the share of the response: sum of lambda^t is alpha * length
    assert sum(0.95**t for t in range(2000)) == pytest.approx(0.05 * 400)
    with pytest.raises(ValueError, match="`alpha` must be greater than 0, got -1"):
        adaptive_lambda(mask, -1)


def test_token_rewards_stand_at_their_tokens_and_add_up():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]])
    rewards = torch.tensor([[2.0, 1.0], [5.0, 5.0]])
    earned = torch.tensor([[0.5, 0.25, 9.0, 0.75], [1.0, 1.0, 1.0, 1.0]])
    found = reward_streams(rewards, torch.zeros(2, 4), mask, {1: earned})
    assert found[0].tolist() == [[0, 0, 0, 2], [0, 0, 0, 0]]
    # 0.5 and 0.25 where they were earned; of the response's reward of 1, what is missing comes last
    assert found[1].tolist() == [[0.5, 0.25, 0, 0.25], [0, 0, 0, 0]]


def test_moments_of_parts_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    values = 1000 + torch.randn(2, 6, 9, generator=generator)  # a large mean beside the spread
    mask = torch.rand(6, 9, generator=generator) < 0.7
    mask[4:] = False  # a process without tokens
    parts = [slice(0, 3), slice(3, 4), slice(4, 6)]
    moments = torch.stack([token_moments(values[:, part], mask[part]) for part in parts])
    mean, variance = merged_moments(moments, torch.stack([mask[part].sum() for part in parts]))
    kept = values.double()[:, mask]
    torch.testing.assert_close(mean.double(), kept.mean(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), kept.var(dim=1, unbiased=False), rtol=1e-3, atol=0)


def test_whitening():
    values, mask = batch(0)
    white = whiten(values, mask)
    kept = white[mask.bool()]
    assert kept.mean().abs() < 1e-12 and kept.std(unbiased=False) == pytest.approx(1, abs=1e-6)
    assert torch.count_nonzero(white[~mask.bool()]) == 0
    torch.testing.assert_close(whiten(3 * values + 5, mask), white, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6, -3.3])
def test_stream_without_spread_is_zero(constant):
    _, mask = batch()
    white = whiten(torch.full((4, 7), constant), mask)
    assert torch.count_nonzero(white) == 0


@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("whiten_streams", [True, False])
def test_mixture_equals_4_4(streams, whiten_streams):
    (rewards, mask), (kl, _) = batch(0, streams), batch(1)
    weights = torch.tensor([0.3, -0.5, 0.9], dtype=torch.float64)[:streams]
    mixed = mix_advantages(kl, rewards, weights, mask, whiten_streams)
    if whiten_streams:
        kl, rewards = whiten(kl, mask), torch.stack([whiten(stream, mask) for stream in rewards])
    expected = (streams - sum(weights)) * kl + sum(w * a for w, a in zip(weights, rewards, strict=True))
    torch.testing.assert_close(mixed, expected * mask, rtol=1e-12, atol=1e-12)


def test_whitening_cancels_the_kl_coefficient():
    (rewards, mask), (kl, _) = batch(0, 2), batch(1)
    weights = torch.tensor([0.5, 0.5])
    mixed = [mix_advantages(coefficient * kl, rewards, weights, mask) for coefficient in (0.2, 5.0)]
    torch.testing.assert_close(mixed[0], mixed[1], rtol=1e-6, atol=1e-6)
    raw = [mix_advantages(c * kl, rewards, weights, mask, whiten_streams=False) for c in (0.2, 5.0)]
    assert (raw[0] - raw[1]).abs().max() > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3), 1, 1), r"\(2, 4\)"),
        (lambda: gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), 1.1, 1), "gamma.*1.1"),
        (lambda: gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), 1, -1), "gae_lambda.*-1"),
        (lambda: gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), 1, 1, 2), "critic_lambda.*2"),
        (
            lambda: mix_advantages(torch.zeros(2, 3), torch.zeros(2, 2, 3), torch.zeros(3), torch.ones(2, 3)),
            r"\(3,\) and \(2, 2, 3\)",
        ),
        (
            lambda: mix_advantages(torch.zeros(2, 4), torch.zeros(2, 2, 3), torch.zeros(2), torch.ones(2, 3)),
            r"\(2, 4\)",
        ),
    ],
)
def test_wrong_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
