import pytest
import torch

from trl_ext.constrained_ppo.advantages import gae, mix_advantages, whiten


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
