"""AdamP on one weight of more than 2^31 elements, on sampled rows, against float64."""

import torch

from trl_ext.optim import AdamP

from .kernels import BETA1, BETA2, DECAY, DELTA, EPS, LR, WD_RATIO
from .measuring import Record


TABLE = "more than 2^31 elements: largest error of a weight over the largest change of one, on sampled rows"
CHUNK = 512


def expected_rows(weight: torch.Tensor, grad: torch.Tensor, coefficient: torch.Tensor | None) -> torch.Tensor:
    """Rows after the first step from zero moments. `coefficient`, `(R, 1)`, is what the projection takes off."""
    first, second = (1 - BETA1) * grad, (1 - BETA2) * grad.square()
    update = first / (1 - BETA1) / ((second / (1 - BETA2)).sqrt() + EPS)
    if coefficient is None:
        return weight * (1 - LR * DECAY) - LR * update
    return weight * (1 - LR * DECAY * WD_RATIO) - LR * (update - coefficient * weight)


def layer_coefficient(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """`<u, w> / (|w| + eps)^2` of the whole weight, in chunks of rows."""
    products = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for start in range(0, weight.size(0), CHUNK):
        rows, others = weight[start : start + CHUNK].double(), grad[start : start + CHUNK].double()
        update = others / (others.abs() + EPS)
        products += torch.stack([(update * rows).sum(), rows.square().sum()])
    return (products[0] / (products[1].sqrt() + EPS).square()).view(1, 1)


def row_coefficient(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    update = grad / (grad.abs() + EPS)
    return (update * weight).sum(1, keepdim=True) / (weight.norm(dim=1, keepdim=True) + EPS).square()


def run(record: Record, device: torch.device, dry: bool) -> None:
    shape = (61, 67) if dry else (46349, 46351)
    needed = 4 * 4 * shape[0] * shape[1] + 4 * 2**30
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        record.row(TABLE, shape=str(shape), error=f"needs {needed / 2**30:.0f} GiB of free memory")
        return
    rows = torch.tensor([0, 1, shape[0] // 3, shape[0] // 2, shape[0] - 2, shape[0] - 1], device=device)
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, device=device))
    param.grad = torch.randn(shape, device=device)
    state: dict = {}
    for projection in ("none", "channel", "layer", None):
        with record.attempt(TABLE, shape=str(shape), projection=str(projection)):
            weight, grad = param.detach()[rows].double(), param.grad[rows].double()
            whole = projection == "layer"
            coefficient = layer_coefficient(param.detach(), param.grad) if whole else row_coefficient(weight, grad)
            # A threshold of zero, which nothing passes: the test runs, and the plain kernel after it
            options = {"lr": LR, "weight_decay": DECAY, "delta": 0.0 if projection is None else DELTA}
            optimizer = AdamP([param], **options, wd_ratio=WD_RATIO, eps=EPS, projection=projection)
            if state:  # The same memory, since two sets of moments do not fit
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name].zero_()
                optimizer.state[param] = {"step": 0, **state}
            optimizer.step()
            state = {name: optimizer.state[param][name] for name in ("exp_avg", "exp_avg_sq")}
            is_projected = projection in ("channel", "layer")
            expected = expected_rows(weight, grad, coefficient if is_projected else None)
            error = (param.detach()[rows].double() - expected).abs().max() / (expected - weight).abs().max()
            record.row(
                TABLE, shape=str(shape), elements=param.numel(), projection=str(projection), error=float(error),
                agrees="yes" if float(error) < 1e-4 else "NO",
            )  # fmt: skip
            del optimizer
