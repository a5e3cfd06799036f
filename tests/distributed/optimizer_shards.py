"""Trains a small model under every wrapper and compares it with one process; started by the tests."""

import argparse
import functools
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import adamp
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

import trl_ext.optim.shards
from recipes.experiments.minimal.muon import Muon
from tests.helpers import deepspeed_on_cpu  # noqa: F401
from trl_ext.core.parameter_groups import decay_groups
from trl_ext.optim import SGDP, AdamH, AdamO, AdamP


OPTIONS = {"lr": 1e-2, "weight_decay": 0.05, "wd_ratio": 0.1}
NUM_STEPS = 12
# What else runs under the wrappers; one process makes each with the equations
DECAY = {"weight_decay": 0.05}
OTHERS = {
    "adamo": functools.partial(AdamO, lr=1e-2, radial_ratio=0.5, **DECAY),
    "rows_adamo": functools.partial(AdamO, lr=1e-2, radial_ratio=0.5, projection="channel", **DECAY),
    "adamh": functools.partial(AdamH, lr=2e-2, adam_ratio=0.5, **DECAY),
    "rows_adamh": functools.partial(AdamH, lr=2e-2, adam_ratio=0.5, projection="channel", **DECAY),
    "muon": Muon,
}


class Toy(nn.Module):
    """Generic weights, one that is scale-invariant as a whole, two that are in each row, one of four dimensions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(11, 13)
        self.layer = nn.Parameter(torch.randn(13, 13) / 4)
        self.rows = nn.Parameter(torch.randn(10, 13) / 4)
        self.kernel = nn.Parameter(torch.randn(6, 5, 2, 1))
        self.scale = nn.Parameter(torch.ones(6))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = nn.functional.normalize(x @ self.layer.T, dim=-1, eps=0) * 3
        x = torch.tanh(x @ nn.functional.normalize(self.rows, dim=1, eps=0).T)
        kernel = nn.functional.normalize(self.kernel.flatten(1), dim=1, eps=0)
        return self.last(x @ kernel.T * self.scale)


def make_model():
    torch.manual_seed(0)
    return Toy()


def batch(step, rank, world_size):
    generator = torch.Generator().manual_seed(100 + step)
    x, y = torch.randn(12, 11, generator=generator), torch.randn(12, 3, generator=generator)
    return x.chunk(world_size)[rank], y.chunk(world_size)[rank]


def loss_of(model, step, rank=0, world_size=1, dtype=torch.float32):
    x, y = batch(step, rank, world_size)
    return (model(x.to(dtype)) - y.to(dtype)).square().mean()


def groups(model, num_groups):
    """One group, two by weight decay, or matrices, kernels and vectors apart, in an order that is not the model's."""
    if num_groups == 2:
        return decay_groups(model, OPTIONS["weight_decay"])
    named = {name.removeprefix("_fsdp_wrapped_module."): param for name, param in model.named_parameters()}
    if num_groups == 1:
        return list(named.values())
    matrices = [p for n, p in named.items() if n in ("layer", "rows", "last.weight")]
    others = [p for n, p in named.items() if n in ("first.weight", "kernel")]
    vectors = [p for n, p in named.items() if n in ("scale", "first.bias", "last.bias")]
    return [
        {"params": others, "lr": 5e-3}, {"params": matrices}, {"params": vectors, "weight_decay": 0.0},
    ]  # fmt: skip


def alone(cls, num_groups, num_steps=NUM_STEPS, dtype=torch.float32, **options):
    model = make_model().to(dtype)
    optimizer = cls(groups(model, num_groups), **{**OPTIONS, **options})
    for step in range(num_steps):
        optimizer.zero_grad()
        loss_of(model, step, dtype=dtype).backward()
        optimizer.step()
    return dict(model.named_parameters())


def other_alone(optimizer_of):
    model = make_model()
    optimizer = optimizer_of(model.parameters())
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return dict(model.named_parameters())


def alone_in_bf16(world_size, reduced=torch.bfloat16, cls=adamp.AdamP, options=OPTIONS):
    """float32 weights, and the mean of the gradients that a bfloat16 copy has on each process's batch."""
    weights, copy = make_model(), make_model().to(torch.bfloat16)
    optimizer = cls(weights.parameters(), **options)
    for step in range(NUM_STEPS):
        grads = []
        for rank in range(world_size):
            copy.zero_grad()
            loss_of(copy, step, rank, world_size, torch.bfloat16).backward()
            grads.append([param.grad.to(reduced) / world_size for param in copy.parameters()])
        for param, *parts in zip(weights.parameters(), *grads, strict=True):
            param.grad = sum(parts).float()
        optimizer.step()
        for param, target in zip(weights.parameters(), copy.parameters(), strict=True):
            target.data.copy_(param.data)
    return dict(weights.named_parameters())


@contextmanager
def counted_all_reduces(calls):
    """Records the size of each all-reduce that an optimizer starts."""
    original = torch.distributed.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        if sys._getframe(1).f_code.co_filename == trl_ext.optim.shards.__file__:
            calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    torch.distributed.all_reduce = all_reduce
    try:
        yield
    finally:
        torch.distributed.all_reduce = original


def difference(found, expected):
    return max(float((found[name].float() - expected[name].float()).abs().max()) for name in expected)


def zero_config(stage, bf16=False, **zero):
    config = {
        "train_micro_batch_size_per_gpu": 12 // dist.get_world_size(), "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **zero}, "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # 1.0 by default
    }  # fmt: skip
    if bf16:
        config["bf16"] = {"enabled": True}
    if bf16 == "BF16_Optimizer":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def gathered(module):
    found = {}
    for name, param in module.named_parameters():
        if param.dtype == torch.bfloat16:
            found[name] = safe_get_full_fp32_param(param)
        elif hasattr(param, "ds_id"):
            with deepspeed.zero.GatheredParameters([param]):
                found[name] = param.data.clone()
        else:
            found[name] = param.data.clone()
    return found


def chain_of(optimizer):
    chain = []
    while optimizer is not None:
        chain.append(type(optimizer).__name__)
        optimizer = getattr(optimizer, "optimizer", None)
    return chain


def engine_of(config, optimizer_of, num_groups):
    model = make_model()
    optimizer = optimizer_of(groups(model, num_groups))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], optimizer


def train_engine(engine, first, last, dtype=torch.float32):
    for step in range(first, last):
        engine.backward(loss_of(engine, step, dist.get_rank(), dist.get_world_size(), dtype))
        engine.step()


def deepspeed_mode(output, config, num_groups=1, checkpoint=False, optimizer_of=None, dtype=torch.float32):
    optimizer_of = optimizer_of or (lambda params: AdamP(params, **OPTIONS))
    engine, optimizer = engine_of(config, optimizer_of, num_groups)
    calls = []
    with counted_all_reduces(calls):
        train_engine(engine, 0, NUM_STEPS // 2, dtype)
        if checkpoint:
            engine.save_checkpoint(str(output), tag="half")
            engine, optimizer = engine_of(config, optimizer_of, num_groups)
            engine.load_checkpoint(str(output), tag="half")
        train_engine(engine, NUM_STEPS // 2, NUM_STEPS, dtype)
    return gathered(engine.module), {
        "chain": chain_of(engine.optimizer),
        "calls": calls,
        "report": report_of(optimizer),
    }


def report_of(optimizer):
    return optimizer.report() if hasattr(optimizer, "report") else {}


def torch_mode(wrap, gather, num_groups=1, optimizer_of=None, num_batches=None, dtype=torch.float32):
    """`wrap(model)` returns the wrapped model, `gather(model)` its whole parameters."""
    num_batches = num_batches or dist.get_world_size()
    model = wrap(make_model().to(dtype))
    optimizer = (optimizer_of or (lambda params: AdamP(params, **OPTIONS)))(groups(model, num_groups))
    calls = []
    with counted_all_reduces(calls):
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            # Processes that cut one layer between them see the same batch
            own = dist.get_rank() * num_batches // dist.get_world_size()
            loss_of(model, step, own, num_batches, dtype).backward()
            optimizer.step()
    kinds = sorted({type(p).__name__ + str(p.ndim) for group in optimizer.param_groups for p in group["params"]})
    return gather(model), {"chain": [type(model).__name__, *kinds], "calls": calls, "report": report_of(optimizer)}


def universal_mode(folder):
    """Continues a ZeRO checkpoint of another number of processes."""
    if dist.get_rank() == 0:
        from deepspeed.checkpoint import ds_to_universal

        arguments = argparse.Namespace(
            input_folder=str(folder / "half"), output_folder=str(folder / "universal"), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        )  # fmt: skip
        ds_to_universal.main(arguments)
        (folder / "latest_universal").write_text("universal")
    dist.barrier()
    config = zero_config(2)
    config["checkpoint"] = {"load_universal": True}
    engine, optimizer = engine_of(config, lambda params: AdamP(params, **OPTIONS), 1)
    engine.load_checkpoint(str(folder), tag="universal")
    train_engine(engine, NUM_STEPS // 2, NUM_STEPS)
    return gathered(engine.module), {"chain": chain_of(engine.optimizer), "calls": [], "report": optimizer.report()}


def checkpoint_mode(folder, mesh, first, last):
    """FSDP2 through torch's distributed checkpoint: trains from `first`, loaded unless 0, to `last`, saved."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    wrap, gather = fsdp2(mesh)
    model = wrap(make_model())
    optimizer = AdamP(model.parameters(), **OPTIONS)
    if first:
        weights, states = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": states}
        checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank(), dist.get_world_size()).backward()
        optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    if not first:
        checkpoint.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    return gather(model), {"chain": [type(model).__name__], "calls": [], "report": optimizer.report()}


def fsdp2(mesh):
    from torch.distributed.fsdp import fully_shard

    def wrap(model):
        return fully_shard(model, mesh=mesh)

    return wrap, lambda model: {name: p.full_tensor() for name, p in model.named_parameters()}


def fsdp1(**options):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    def gather(model):
        with FSDP.summon_full_params(model):
            return {n.removeprefix("_fsdp_wrapped_module."): p.detach().clone() for n, p in model.named_parameters()}

    return lambda model: FSDP(model, device_id=torch.device("cpu"), **options), gather


def tensor_parallel(mesh, layers, data_mesh=None):
    """Cuts the first layer by its outputs and the last by its inputs; FSDP2 over it with `data_mesh`."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {
        "first": ColwiseParallel(output_layouts=Replicate()), "last": RowwiseParallel(input_layouts=Replicate()),
    }  # fmt: skip

    def wrap(model):
        parallelize_module(model, mesh, {name: plan[name] for name in layers})
        return model if data_mesh is None else fully_shard(model, mesh=data_mesh)

    def gather(model):
        return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}

    return wrap, gather


@functools.cache
def reference_of(kind):
    if kind in OTHERS:
        return other_alone(functools.partial(OTHERS[kind], **({} if kind == "muon" else {"fused": False})))
    make = {
        "decay": lambda: alone(adamp.AdamP, 2), "groups": lambda: alone(adamp.AdamP, 3),
        "bf16": lambda: alone_in_bf16(dist.get_world_size()),
        "in_bf16": lambda: alone(adamp.AdamP, 1, dtype=torch.bfloat16),
        "bf16_optimizer": lambda: alone_in_bf16(dist.get_world_size(), torch.float32),
        "half": lambda: alone(adamp.AdamP, 1, NUM_STEPS // 2), "one": lambda: alone(adamp.AdamP, 1),
        "sgdp": lambda: alone(adamp.SGDP, 1, momentum=0.9),
    }  # fmt: skip
    return make[kind]()


def other_of(mode):
    """The name in [`OTHERS`] that a mode ends with, if it is not AdamP's or SGDP's."""
    return max((name for name in OTHERS if mode.endswith(name)), key=len, default=None)


def reference(mode):
    """What one process makes of it with the authors' package."""
    endings = {
        "decay": "decay", "groups": "groups", "sgdp": "sgdp", "in_bf16": "in_bf16", "bf16": "bf16",
        "bf16_optimizer": "bf16_optimizer",
        "save": "half",
    }  # fmt: skip
    other = other_of(mode)
    if other is not None:
        return reference_of(other)
    kind = next((kind for ending, kind in endings.items() if mode.endswith(ending)), "one")
    return reference_of(kind)


def run_modes(output, modes):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    world_size = dist.get_world_size()
    fused = functools.partial(AdamP, **OPTIONS, fused=True)
    mesh = init_device_mesh("cpu", (world_size,))
    names = ("data", "tensor")
    one = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=names)
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=names) if world_size == 4 else None
    sgd = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.05}

    def over_both():
        return tensor_parallel(both["tensor"], ["first", "last"], both["data"])

    available = {
        "ddp": lambda: torch_mode(DistributedDataParallel, lambda m: dict(m.module.named_parameters())),
        "fsdp2": lambda: torch_mode(*fsdp2(mesh)),
        "fsdp2_in_bf16": lambda: torch_mode(*fsdp2(mesh), dtype=torch.bfloat16),
        "fsdp2_groups": lambda: torch_mode(*fsdp2(mesh), num_groups=3),
        "fsdp2_sgdp": lambda: torch_mode(*fsdp2(mesh), optimizer_of=lambda p: SGDP(p, **sgd, project_momentum=True)),
        "tensor_parallel": lambda: torch_mode(*tensor_parallel(mesh, ["first"]), num_batches=1),
        "fsdp2_tensor_parallel_of_one": lambda: torch_mode(*tensor_parallel(one["tensor"], ["last"], one["data"])),
        "row_parallel": lambda: torch_mode(*tensor_parallel(mesh, ["first", "last"]), num_batches=1),
        "fsdp2_over_tensor_parallel": lambda: torch_mode(*over_both(), num_batches=2),
        "hsdp": lambda: torch_mode(*fsdp2(both)),
        "fsdp1": lambda: torch_mode(*fsdp1(use_orig_params=True)),
        "fsdp1_groups": lambda: torch_mode(*fsdp1(use_orig_params=True), num_groups=3),
        "fsdp1_flat": lambda: torch_mode(*fsdp1(use_orig_params=False)),
        "zero1": lambda: deepspeed_mode(output / "zero1", zero_config(1), checkpoint=True),
        "zero2": lambda: deepspeed_mode(output / "zero2", zero_config(2), checkpoint=True),
        "zero3": lambda: deepspeed_mode(output / "zero3", zero_config(3), checkpoint=True),
        "zero2_fused": lambda: deepspeed_mode(output, zero_config(2), optimizer_of=fused),
        "zero3_fused": lambda: deepspeed_mode(output, zero_config(3), optimizer_of=fused),
        "zero2_decay": lambda: deepspeed_mode(output, zero_config(2), num_groups=2),
        "zero3_decay": lambda: deepspeed_mode(output, zero_config(3), num_groups=2),
        "zero2_groups": lambda: deepspeed_mode(output, zero_config(2), num_groups=3),
        "zero3_groups": lambda: deepspeed_mode(output, zero_config(3), num_groups=3),
        "zero1_round_robin": lambda: deepspeed_mode(output, zero_config(1, round_robin_gradients=True)),
        "zero2_round_robin_groups": lambda: deepspeed_mode(
            output, zero_config(2, round_robin_gradients=True), num_groups=3
        ),
        "zero2_alignment": lambda: deepspeed_mode(output, zero_config(2, parameter_alignment=True)),
        "zero2_alignment_round_robin": lambda: deepspeed_mode(
            output, zero_config(2, parameter_alignment=True, round_robin_gradients=True)
        ),
        "zero3_small_sub_group": lambda: deepspeed_mode(
            output, zero_config(3, sub_group_size=60, stage3_param_persistence_threshold=0)
        ),
        "zero2_offload": lambda: deepspeed_mode(output, zero_config(2, offload_optimizer={"device": "cpu"})),
        "zero3_offload": lambda: deepspeed_mode(
            output, zero_config(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
        ),
        "zero2_bf16": lambda: deepspeed_mode(output, zero_config(2, bf16=True), dtype=torch.bfloat16),
        "zero3_bf16": lambda: deepspeed_mode(output, zero_config(3, bf16=True), dtype=torch.bfloat16),
        "bf16_optimizer": lambda: deepspeed_mode(output, zero_config(1, bf16="BF16_Optimizer"), dtype=torch.bfloat16),
        "zero2_universal": lambda: universal_mode(output / "zero2"),
        "fsdp2_save": lambda: checkpoint_mode(output / "fsdp2", mesh, 0, NUM_STEPS // 2),
        "fsdp2_load": lambda: checkpoint_mode(output / "fsdp2", mesh, NUM_STEPS // 2, NUM_STEPS),
        "zero2_sgdp": lambda: deepspeed_mode(
            output, zero_config(2), optimizer_of=lambda p: SGDP(p, **sgd, project_momentum=True)
        ),
        "zero3_sgdp": lambda: deepspeed_mode(
            output, zero_config(3), optimizer_of=lambda p: SGDP(p, **sgd, project_momentum=True)
        ),
    }  # fmt: skip
    wrapped = {
        "zero1": functools.partial(deepspeed_mode, output, zero_config(1)),
        "zero2": functools.partial(deepspeed_mode, output, zero_config(2)),
        "zero3": functools.partial(deepspeed_mode, output, zero_config(3)),
        "fsdp1": functools.partial(torch_mode, *fsdp1(use_orig_params=True)),
        "fsdp2": functools.partial(torch_mode, *fsdp2(mesh)),
        "hsdp": functools.partial(torch_mode, *fsdp2(both)),
        "tensor_parallel": functools.partial(torch_mode, *tensor_parallel(mesh, ["first"]), num_batches=1),
        "row_parallel": functools.partial(torch_mode, *tensor_parallel(mesh, ["first", "last"]), num_batches=1),
        "fsdp2_over_tensor_parallel": lambda **options: torch_mode(*over_both(), num_batches=2, **options),
    }  # fmt: skip
    for name, make in OTHERS.items():
        available |= {f"{key}_{name}": functools.partial(mode, optimizer_of=make) for key, mode in wrapped.items()}
    results = {}
    for mode in modes:
        found, facts = available[mode]()
        if dist.get_rank() == 0:  # Which alone writes them
            results[mode] = {**facts, "difference": difference(found, reference(mode))}
    return results


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", required=True)
    parser.add_argument("--modes", nargs="+", required=True)
    options = parser.parse_args()
    deepspeed.init_distributed("gloo")
    output = Path(options.output)
    results = run_modes(output, options.modes)
    if dist.get_rank() == 0:
        (output / "found.json").write_text(json.dumps({"world_size": dist.get_world_size(), "modes": results}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
