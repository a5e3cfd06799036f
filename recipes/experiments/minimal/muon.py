"""Muon (https://kellerjordan.github.io/posts/muon) on `ShardedMatrices`: one file, exact under ZeRO, FSDP and TP."""

import torch

from trl_ext.optim import ShardedMatrices


def orthogonalized(matrix, num_steps=5):
    """Nearest orthogonal matrix by the quintic Newton-Schulz iteration, from the whole matrix."""
    x = matrix.flatten(1) / (matrix.norm() + 1e-7)
    x = x.T if x.size(0) > x.size(1) else x
    for _ in range(num_steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if x.shape != matrix.flatten(1).shape else x
    return x.reshape(matrix.shape) * max(1, x.size(0) / x.size(1)) ** 0.5


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, SGD with momentum for all else."""

    def __init__(self, params, lr=0.02, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.matrices = ShardedMatrices(self)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                    momentum.lerp_(param.grad.to(momentum.dtype), 1 - group["momentum"])
        for matrix in self.matrices.read():
            update = self.matrices.gather(matrix, self.state[matrix.param].get("momentum"))
            matrix.part(matrix.param).sub_(matrix.cut(orthogonalized(update)), alpha=matrix.group["lr"])
        for stretch in self.matrices.rest():
            momentum = stretch.part(self.state[stretch.param]["momentum"])
            stretch.part(stretch.param).sub_(momentum, alpha=stretch.group["lr"])
