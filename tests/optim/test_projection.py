"""The projection's equations against what the default step runs on dot products."""

import pytest
import torch

from trl_ext.optim.projection import (
    LEVELS,
    as_rows,
    find_level,
    is_scale_invariant,
    passes,
    project_,
    radial_coefficient,
)


DELTA, EPS = 0.1, 1e-8


def dots_of(grad, weight, update, level):
    """`<g, w>`, `<g, g>`, `<w, w>` and `<u, w>` of each row, shape `(4, R)`."""
    g, w, u = (as_rows(tensor, level) for tensor in (grad, weight, update))
    return torch.stack([(g * w).sum(1), (g * g).sum(1), (w * w).sum(1), (u * w).sum(1)])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2, 2)])
def test_dot_products_make_the_projection(level, shape):
    generator = torch.Generator().manual_seed(0)
    weight, grad, update = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    dots = dots_of(grad, weight, update, level)
    expected = project_(update.clone(), weight, level, EPS)
    rows = as_rows(update, level) - radial_coefficient(dots, EPS).unsqueeze(1) * as_rows(weight, level)
    torch.testing.assert_close(rows.view(shape), expected)
    # Nothing radial is left
    left = (as_rows(expected, level) * as_rows(weight, level)).sum(1)
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-7)


@pytest.mark.parametrize("level", LEVELS)
def test_dot_products_make_the_test(level):
    """Gradients at angles around the threshold, both answers among them."""
    generator, answers = torch.Generator().manual_seed(0), []
    for share in (0.0, 0.01, 0.03, 0.1, 0.3):
        weight, grad = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        rows, flat = as_rows(grad, level), as_rows(weight, level)
        grad = rows - flat * ((rows * flat).sum(1) / flat.square().sum(1)).unsqueeze(1)
        grad = (grad + share * flat).view(6, 5)
        dots = dots_of(grad, weight, weight, level)
        answer = bool(is_scale_invariant(weight, grad, level, DELTA, EPS))
        assert answer == bool(passes(dots, flat.size(1), DELTA, EPS).all())
        answers.append(answer)
    assert True in answers and False in answers


def test_levels_are_tried_from_rows_to_the_whole():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert find_level(weight, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), DELTA, EPS) == "channel"
    assert find_level(weight, torch.tensor([[1.0, 0.0], [0.0, -1.0]]), DELTA, EPS) == "layer"
    assert find_level(weight, weight, DELTA, EPS) is None
    assert find_level(weight[0], torch.zeros(2), DELTA, EPS) is None
