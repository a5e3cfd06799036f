"""Slow references in float64, written from the equations on the whole weight matrix."""

import torch

from trl_ext.equilibrium.activations import ACTIVATIONS
from trl_ext.equilibrium.network import LayeredNetwork


PHI = {
    "tanh": torch.tanh,
    "sigmoid": lambda u: 1 / (1 + torch.exp(2 - 4 * u)),
    "dsilu": lambda u: 0.5 * u / (1 + torch.exp(-u)) + (1 - 0.5 * u) / (1 + torch.exp(2 - u)),
}


def whole_matrix(head):
    _, forward, backward = head.recurrent_parameters()
    widths = head.hidden_features
    matrix = torch.zeros(sum(widths), sum(widths), dtype=forward[0].dtype)
    start = 0
    for layer, weight in enumerate(forward):
        middle = start + widths[layer]
        end = middle + widths[layer + 1]
        matrix[middle:end, start:middle] = weight
        matrix[start:middle, middle:end] = backward[layer] if backward else weight.T
        start = middle
    return matrix


def fixed_point(head, hidden, nudge=None, matrix=None, steps=600):
    """Damped synchronous iteration of all neurons; `nudge`, complex or not, is added to the last layer's current."""
    matrix = whole_matrix(head) if matrix is None else matrix
    matrix = matrix if nudge is None else matrix.to(nudge.dtype)
    biases, _, _ = head.recurrent_parameters()
    first = hidden @ head.input_weight.T + head.input_bias
    drive = torch.cat([first, *(bias.expand(len(hidden), -1) for bias in biases)], dim=1)
    if nudge is not None:
        silent = torch.zeros(len(hidden), sum(head.hidden_features[:-1]), dtype=nudge.dtype)
        drive = drive + torch.cat([silent, nudge], dim=1)
    phi = PHI[head.activation]
    u = torch.zeros_like(drive)
    for _ in range(steps):
        u = 0.5 * u + 0.5 * (phi(u) @ matrix.T + drive)
    return u


def read_out(head, u):
    top = PHI[head.activation](u)[:, -head.hidden_features[-1] :]
    return top @ head.readout_weight.T + head.readout_bias


def implicit_error(head, u, cotangent, transpose=True):
    """`(D^-1 - W^T)^-1 n`, or `(D^-1 - W)^-1 n`, by a dense solve for each row."""
    matrix = whole_matrix(head)
    u = u.detach().requires_grad_()
    (slope,) = torch.autograd.grad(PHI[head.activation](u).sum(), u)
    full = torch.zeros_like(u)
    full[:, -head.hidden_features[-1] :] = cotangent
    rows = [
        torch.linalg.solve(torch.diag(1 / d) - (matrix.T if transpose else matrix), n)
        for d, n in zip(slope, full, strict=True)
    ]
    return torch.stack(rows).detach()


def network_of(head):
    _, forward, backward = head.recurrent_parameters()
    backward = list(backward) or [weight.T for weight in forward]
    return LayeredNetwork([w.detach() for w in forward], [w.detach() for w in backward], ACTIVATIONS[head.activation])
