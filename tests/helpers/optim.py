"""What the optimizers' tests share: gradients of every kind, parts of weights in flat tensors, training settings."""

import ctypes

import torch
from transformers import TrainingArguments

from tests.helpers.tiny import tiny_pairs
from trl_ext.optim import AdamP
from trl_ext.optim.kernels import cpu, table
from trl_ext.optim.kernels.compilation import compiled_library
from trl_ext.optim.shards import Shard
from trl_ext.optim.weights import LocalTensor


TRAINING = {
    "max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "per_device_train_batch_size": 2, "logging_steps": 1, "weight_decay": 0.1, "learning_rate": 1e-3,
}  # fmt: skip


def tensors(dtype=torch.float32):
    """One of each kind: name, shape and how its loss depends on it."""
    torch.manual_seed(0)
    shapes = {
        "vector": (7,), "matrix": (6, 5), "row_invariant": (6, 5), "layer_invariant": (6, 5), "kernel": (4, 3, 2, 2),
        "kernel_invariant": (4, 3, 2, 2), "zero_grad": (3, 4), "zero_weight": (3, 4), "tiny_grad": (3, 4),
    }  # fmt: skip
    params = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    params["zero_weight"].zero_()
    return params


def gradients(params, step):
    """Gradients that are exactly orthogonal to the weight, in rows or as a whole, where the name says so."""
    generator = torch.Generator().manual_seed(1000 + step)
    grads = {}
    for name, param in params.items():
        grad = torch.randn(param.shape, generator=generator)
        weight = param.detach().float()
        if name in ("row_invariant", "kernel_invariant"):
            rows, flat = grad.reshape(len(grad), -1), weight.reshape(len(weight), -1)
            rows -= flat * (rows * flat).sum(1, keepdim=True) / flat.square().sum(1, keepdim=True)
            grad = rows.view(param.shape)
        elif name == "layer_invariant":
            grad -= weight * (grad * weight).sum() / weight.square().sum()
        elif name == "zero_grad":
            grad.zero_()
        elif name == "tiny_grad":
            grad *= 1e-9
        grads[name] = grad.to(param.dtype)
    return grads


def run(make, steps=50, dtype=torch.float32):
    params = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in tensors(dtype).items()}
    optimizer = make(params.values())
    for step in range(steps):
        for name, grad in gradients(params, step).items():
            params[name].grad = grad
        optimizer.step()
    return params, optimizer


def assert_equal(found, expected):
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def assert_close(found, expected, atol=1e-6):
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-6, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def params_of(*shapes, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, **options)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def local_of(shape, offset=0, numel=None, **options):
    """Part of a weight in the middle of a flat tensor."""
    generator = torch.Generator().manual_seed(0)
    numel = torch.Size(shape).numel() if numel is None else numel
    flat, grad, exp_avg = (torch.randn(numel + 7, generator=generator) for _ in range(3))
    exp_avg_sq = torch.rand(numel + 7, generator=generator)
    group = {**AdamP([torch.nn.Parameter(torch.ones(1))], fused=True, **options).param_groups[0]}
    shard = Shard(0, shape, 3, offset, numel)
    return LocalTensor(flat, group, [shard], flat, grad, (exp_avg, exp_avg_sq), 5)


def copy_of(local):
    return LocalTensor(
        local.param, local.group, local.shards, local.flat.clone(), local.grad,
        tuple(moment.clone() for moment in local.moments), local.step,
    )  # fmt: skip


def update_in_c(local, was_projected=0, **columns):
    """The step of the kernels in C on a table of one weight, with some columns changed: result, hits and flag."""
    shard, step = local.shards[0], torch.tensor([float(local.step)])
    row = table.item_row(local, table.Item(shard.start, shard.numel, shard, "test"))
    row[table.Column.STEP] = step.data_ptr()
    for name, value in columns.items():
        row[table.Column[name]] = value
    items, options = torch.from_numpy(row), torch.tensor(table.options_row(local.group), dtype=torch.float64)
    flag, hits, num_rows = torch.tensor([was_projected], dtype=torch.int32), torch.zeros(2), shard.num_rows
    coefficients = torch.zeros(num_rows)
    found = compiled_library().adamp_update_weights(
        cpu._at(items, 0), *map(ctypes.c_int64, (0, 1)), cpu._at(options, 0), ctypes.c_int64(1), cpu._at(flag, 0),
        cpu._at(coefficients, 0), ctypes.c_int64(num_rows), cpu._at(hits, 0),
    )  # fmt: skip
    return found, hits.tolist(), int(flag)


def arguments(tmp_path, **settings):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)


def text_data():
    return tiny_pairs(8).select_columns(["chosen"]).rename_column("chosen", "text")
