import itertools
import math

import pytest
import torch

from trl_ext.sparse_po.loss import mask_l1_penalty, sparse_po_loss, sparse_po_terms


def reference_loss(log_ratios, divergences, reward_mask, divergence_mask, beta, coef, detach, l1_u, l1_d, common):
    """The formula, token by token, in float64."""
    num_pairs = len(log_ratios) // 2
    total = 0.0
    for pair in range(num_pairs):
        sums = []
        for row in (pair, pair + num_pairs):
            reward = divergence = 0.0
            for t in range(log_ratios.shape[1]):
                token_divergence = divergences[row, t]
                if detach and row < num_pairs:
                    token_divergence = token_divergence.detach()
                reward = reward + reward_mask[row, t] * log_ratios[row, t]
                divergence = divergence + divergence_mask[row, t] * token_divergence
            sums.append((reward, divergence))
        (reward_chosen, divergence_chosen), (reward_rejected, divergence_rejected) = sums
        margin = reward_chosen - reward_rejected
        delta = coef * (divergence_rejected - divergence_chosen)
        total = total + torch.log1p(torch.exp(-beta * (margin - delta)))
        for row in (pair, pair + num_pairs):
            half = 0.5 if common else 1.0
            total = total + half * l1_u * reward_mask[row].abs().sum()
            total = total + half * l1_d * divergence_mask[row].abs().sum()
    return total / num_pairs


def random_batch(seed=0, rows=6, length=5):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, length, generator=generator, dtype=torch.float64) for _ in range(4)]
    log_ratios, divergences, reward_mask, divergence_mask = tensors
    return [x.requires_grad_() for x in (log_ratios, divergences.abs(), reward_mask.relu(), divergence_mask.relu())]


@pytest.mark.parametrize(
    ("coef", "detach", "l1", "common"),
    list(itertools.product([0.0, 0.5, 1.0], [False, True], [(0.0, 0.0), (0.01, 0.03)], [False, True])),
)
def test_loss_and_gradients_equal_the_formula(coef, detach, l1, common):
    ours, theirs = random_batch(), random_batch()
    loss = sparse_po_loss(
        *ours,
        0.3,
        divergence_coef=coef,
        detach_chosen_divergence=detach,
        l1_reward=l1[0],
        l1_divergence=l1[1],
        common_mask=common,
    )
    expected = reference_loss(*theirs, 0.3, coef, detach, *l1, common)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    expected.backward()
    for x, y in zip(ours, theirs, strict=True):
        gradient = torch.zeros_like(y) if y.grad is None else y.grad
        torch.testing.assert_close(x.grad, gradient, rtol=1e-10, atol=1e-12)


def test_hand_calculation():
    # One pair of two tokens: U_w = 1*2 + 0*1 = 2, U_l = 0.5*(-1) = -0.5, D_w = 0.1, D_l = 0.3
    log_ratios = torch.tensor([[2.0, 1.0], [-1.0, 0.0]])
    divergences = torch.tensor([[0.1, 0.2], [0.3, 0.0]])
    reward_mask = torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    divergence_mask = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = sparse_po_loss(log_ratios, divergences, reward_mask, divergence_mask, 0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5 * (2.5 - 0.2))), rel=1e-6)


def test_special_cases():
    log_ratios, divergences, _, _ = (x.detach() for x in random_batch(1))
    ones = torch.ones_like(log_ratios)
    chosen, rejected = log_ratios.sum(1).chunk(2)
    kl_chosen, kl_rejected = divergences.sum(1).chunk(2)
    softplus = torch.nn.functional.softplus
    dpo = sparse_po_loss(log_ratios, divergences, ones, ones, 0.1, divergence_coef=0.0)
    torch.testing.assert_close(dpo, softplus(-0.1 * (chosen - rejected)).mean())
    tdpo1 = sparse_po_loss(log_ratios, divergences, ones, ones, 0.1)
    torch.testing.assert_close(tdpo1, softplus(-0.1 * (chosen - rejected - (kl_rejected - kl_chosen))).mean())
    tdpo2 = sparse_po_loss(
        log_ratios, divergences, ones, ones, 0.1, divergence_coef=0.5, detach_chosen_divergence=True
    )
    torch.testing.assert_close(tdpo2, softplus(-0.1 * (chosen - rejected - 0.5 * (kl_rejected - kl_chosen))).mean())
    zeros = torch.zeros_like(ones)
    assert sparse_po_loss(log_ratios, divergences, zeros, zeros, 0.1).item() == pytest.approx(math.log(2), abs=1e-12)


def test_detach_stops_the_chosen_divergence_only():
    log_ratios, divergences, reward_mask, divergence_mask = random_batch(2)
    sparse_po_terms(log_ratios, divergences, reward_mask, divergence_mask, 1.0, True).sum().backward()
    assert torch.count_nonzero(divergences.grad[:3]) == 0
    torch.testing.assert_close(divergences.grad[3:], divergence_mask.detach()[3:])


def test_common_mask_halves_the_penalty():
    mask = torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    assert mask_l1_penalty(mask, mask, 0.1, 0.1).item() == pytest.approx(0.7)
    assert mask_l1_penalty(mask, mask, 0.1, 0.1, common_mask=True).item() == pytest.approx(0.35)


@pytest.mark.parametrize("shapes", [[(2, 3), (2, 3), (2, 4), (2, 3)], [(3, 2)] * 4, [(4,)] * 4])
def test_wrong_shapes(shapes):
    with pytest.raises(ValueError, match=r"\(2B, T-1\)"):
        sparse_po_loss(*(torch.zeros(shape) for shape in shapes), 0.1)
