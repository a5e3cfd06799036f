"""Compares the Triton kernels with the paths in torch, in Triton's interpreter; started by a test."""

import sys

import torch

from tests.helpers.optim import copy_of, local_of
from trl_ext.optim import AdamP
from trl_ext.optim.kernels import triton
from trl_ext.optim.weights import Weight, layer_dots


def updated(local, by_rows, kernels):
    copied = copy_of(local)
    # The paths in torch
    copied.group = {**local.group, "foreach": True}
    weight = Weight(copied, local.shards[0], by_rows=by_rows)
    optimizer = AdamP([torch.nn.Parameter(torch.ones(1))])
    tested = kernels.test_dots(weight) if kernels else layer_dots(weight)
    tested[0] = tested[0].abs()
    kernels.measure(weight) if kernels else optimizer._measure(weight)
    dots = weight.dots.clone()
    dots[0] = dots[0].abs()
    coefficient, scale = torch.linspace(-0.5, 0.5, weight.dots.size(1)), torch.tensor(0.9)
    kernels.apply(weight, scale, coefficient) if kernels else optimizer._apply_in_blocks(weight, scale, coefficient)
    return tested, dots, copied.flat, *copied.moments


def main() -> None:
    triton.BLOCK_SIZE = 16
    shapes = [((9, 7), 5, 40), ((9, 7), 0, None), ((2, 500), 3, 900), ((3, 2, 2), 1, 2)]
    cases = [({}, shape, 5) for shape in shapes]
    cases += [
        ({"nesterov": True}, shapes[0], 5),
        ({"maximize": True}, shapes[0], 5),
        ({}, shapes[0], torch.tensor(5.0)),
    ]
    num_checked = 0
    for options, (shape, offset, numel), step in cases:
        for by_rows in (False, True):
            local = local_of(shape, offset, numel, **options)
            local.step = step
            expected = updated(local, by_rows, None)
            for found, wanted in zip(updated(local, by_rows, triton), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
                num_checked += 1
    sys.stdout.write(f"{num_checked}\n")


if __name__ == "__main__":
    main()
