"""Time and memory of one optimizer step against torch's fused AdamW.

Each optimizer steps in turn with fused AdamW on the same tensors and running averages, in one process, and the minimum
of the process's CPU time counts, so ratios hold where absolute times drift. timm and pytorch_optimizer are measured
where they are installed.

python -m tests.benchmarks.optimizers --model gpt2
"""

import argparse
import gc
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import adamp
import torch

from trl_ext.optim import SGDP, AdamP
from trl_ext.optim.step import ProjectedOptimizer


def gpt2_shapes() -> list[tuple[int, ...]]:
    """GPT-2 small: 148 tensors, 124 million parameters."""
    block = [
        (768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,), (768, 3072), (3072,), (3072, 768),
        (768,),
    ]  # fmt: skip
    return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]


def llama_1b_shapes(num_layers: int = 16) -> list[tuple[int, ...]]:
    """Llama 3.2 1B: 146 tensors, 1.24 billion parameters with 16 layers."""
    block = [
        (2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192), (2048,),
        (2048,),
    ]  # fmt: skip
    return [(128256, 2048), *block * num_layers, (2048,)]


def lora_shapes(rank: int = 8, num_layers: int = 16) -> list[tuple[int, ...]]:
    """LoRA on all seven projections of Llama 3.2 1B's layers: 224 tensors of 5.6 million parameters at rank 8."""
    projections = [shape for shape in llama_1b_shapes(1)[1:-1] if len(shape) == 2]
    return [shape for rows, columns in projections * num_layers for shape in ((rank, columns), (rows, rank))]


# Shapes whose rows are short
NARROW: dict[str, list[tuple[int, ...]]] = {
    "LoRA r=8": lora_shapes(8), "LoRA r=16": lora_shapes(16), "LoRA r=32": lora_shapes(32),
    "(524288, 8)": [(524288, 8)], "(131072, 24)": [(131072, 24)], "(65536, 48)": [(65536, 48)],
    "(65536, 1, 3, 3)": [(65536, 1, 3, 3)], "(4194304, 1)": [(4194304, 1)], "(262144, 3)": [(262144, 3)],
    "(49152, 16)": [(49152, 16)], "(32768, 1, 5, 5)": [(32768, 1, 5, 5)], "(32768, 3, 3, 3)": [(32768, 3, 3, 3)],
    "(16384, 1, 7, 7)": [(16384, 1, 7, 7)], "(8192, 100)": [(8192, 100)],
}  # fmt: skip


# Orthogonal to no weight, to each weight as a whole, to each of its rows
GRADIENTS = ("generic", "orthogonal", "rows")


class Uncompiled(AdamP):
    """[`AdamP`] where there is no C compiler."""

    CPU_KERNELS = None


def builders(projected: bool) -> dict[str, Callable[[list], torch.optim.Optimizer]]:
    """`projected`: the level is also named to the optimizer that can be told."""
    common = {"lr": 1e-8, "weight_decay": 0.01}  # So small that weights stay orthogonal
    found = {
        "torch AdamW foreach": lambda p: torch.optim.AdamW(p, **common, foreach=True),
        "AdamP": lambda p: AdamP(p, **common),
        "AdamP, no C compiler": lambda p: Uncompiled(p, **common),
        "AdamP, foreach": lambda p: AdamP(p, **common, foreach=True),
        "AdamP, capturable": lambda p: AdamP(p, **common, capturable=True),
        "AdamP, reference": lambda p: AdamP(p, **common, foreach=False, fused=False),
        "adamp 0.3.0 (official)": lambda p: adamp.AdamP(p, **common),
    }
    if projected:
        named = {**common, "projection": "layer"}
        found["AdamP, layer view named"] = lambda p: AdamP(p, **named)
        found["AdamP, layer view named, no C compiler"] = lambda p: Uncompiled(p, **named)
    if importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision"):
        from timm.optim import AdamP as TimmAdamP

        found["timm"] = lambda p: TimmAdamP(p, **common)
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer import AdamP as PytorchOptimizerAdamP

        found["pytorch_optimizer"] = lambda p: PytorchOptimizerAdamP(p, **common, foreach=False)
        found["pytorch_optimizer, foreach"] = lambda p: PytorchOptimizerAdamP(p, **common, foreach=True)
    return found


def make_params(shapes, device: str, gradients: str) -> list[torch.nn.Parameter]:
    """Weights with a gradient that is orthogonal to each as a whole, to each of its rows, or to none."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        weight, grad = (torch.randn(shape, generator=generator) for _ in range(2))
        if len(shape) > 1:
            rows = [tensor.view(shape[0] if gradients == "rows" else 1, -1) for tensor in (weight, grad)]
            cosine = (rows[0] * rows[1]).sum(1, keepdim=True) / rows[0].square().sum(1, keepdim=True)
            # A cosine of 0, or one that does not pass by chance
            rows[1].addcmul_(rows[0], cosine - (1e-2 if gradients == "generic" else 0), value=-1)
        params.append(torch.nn.Parameter(weight.mul_(0.02).to(device)))
        params[-1].grad = grad.mul_(1e-3).to(device)
    return params


def share_state(optimizer: torch.optim.Optimizer, base: torch.optim.Optimizer) -> None:
    """Hands over the running averages, since two sets of them do not fit small machines."""
    for group in optimizer.param_groups:
        counts_on_device = isinstance(optimizer, torch.optim.AdamW) or group.get("capturable")
        for param in group["params"]:
            moments = {name: base.state[param][name] for name in ("exp_avg", "exp_avg_sq")}
            step = base.state[param]["step"]
            optimizer.state[param] = {"step": step.clone() if counts_on_device else int(step), **moments}


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def held_by(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state and of work memory kept between steps."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    tensors += list(optimizer._scratch.tensors.values()) if isinstance(optimizer, ProjectedOptimizer) else []
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(shapes, device: str, gradients: str, rounds: int, only: list[str]) -> list[str]:
    params = make_params(shapes, device, gradients)
    base = torch.optim.AdamW(params, lr=1e-8, weight_decay=0.01, fused=True)
    base.step()
    lines = []
    for name, build in builders(gradients == "orthogonal").items():
        if only and name not in only:
            continue
        pair = [base, build(params)]
        share_state(pair[1], base)
        best = [float("inf"), float("inf")]
        for turn in range(rounds + 2):
            for place, optimizer in enumerate(pair):
                start = clock(device)
                optimizer.step()
                seconds = clock(device) - start
                if turn > 1:
                    best[place] = min(best[place], seconds)
        added = (held_by(pair[1]) - held_by(base)) / 2**20
        hits = ""
        if isinstance(pair[1], AdamP):
            report = pair[1].report().values()
            hits = f"{sum(row['layer'] + row['channel'] for row in report):.0f} of {len(report)}"
        lines.append(
            f"| {name} | {1e3 * best[0]:.0f} | {1e3 * best[1]:.0f} | {best[1] / best[0]:.2f} | {added:.0f} | {hits} |"
        )
        print(lines[-1], flush=True)
        del pair
        gc.collect()
    return lines


def compare_sgd(shapes, device: str, gradients: str, rounds: int) -> str:
    """SGDP and the official one against torch's fused SGD, all with momentum."""
    params = make_params(shapes, device, gradients)
    options = {"lr": 1e-9, "momentum": 0.9}
    optimizers = {
        "torch SGD fused": torch.optim.SGD(params, **options, fused=True),
        "SGDP": SGDP(params, **options),
        "official SGDP": adamp.SGDP(params, **options),
    }
    best = dict.fromkeys(optimizers, float("inf"))
    for turn in range(rounds + 2):
        for name, optimizer in optimizers.items():
            start = clock(device)
            optimizer.step()
            if turn > 1:
                best[name] = min(best[name], clock(device) - start)
    return "; ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in best.items())


def narrow_rows(device: str, rounds: int, names: list[str]) -> str:
    """AdamP with and without its kernels on shapes with short rows, as multiples of fused AdamW."""
    lines = ["| shapes | gradients | fused AdamW, ms | AdamP | AdamP, no C compiler |", "|---|---|---|---|---|"]
    for name, shapes in ((name, NARROW[name]) for name in names):
        for gradients in GRADIENTS:
            if gradients == "rows" and shapes[0][-1] == 1:
                continue  # A single number is orthogonal to none
            rows = measure(shapes, device, gradients, rounds, ["AdamP", "AdamP, no C compiler"])
            cells = [[cell.strip() for cell in row.split("|")] for row in rows]
            lines.append(f"| {name} | {gradients} | {cells[0][2]} | {cells[0][4]} | {cells[1][4]} |")
    return "\n".join(lines)


def half_precision(shapes: list[tuple[int, ...]], device: str, rounds: int) -> str:
    """bfloat16 weights with float32 running averages, with and without stochastic rounding, in milliseconds."""
    params = [torch.nn.Parameter(param.detach().bfloat16()) for param in make_params(shapes, device, "generic")]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    lines = ["| optimizer | ms |", "|---|---|"]
    base = torch.optim.AdamW(params, lr=1e-8, fused=True)
    optimizers: dict[str, torch.optim.Optimizer] = {"torch AdamW fused, bfloat16 state": base}
    for rounding in (False, True):
        for name, cls in (("AdamP", AdamP), ("AdamP, no C compiler", Uncompiled)):
            optimizer = cls(params, lr=1e-8, state_dtype=torch.float32, stochastic_rounding=rounding)
            optimizers[f"{name}{', stochastic rounding' if rounding else ''}"] = optimizer
    for name, optimizer in optimizers.items():
        best = float("inf")
        for turn in range(rounds + 1):
            start = clock(device)
            optimizer.step()
            best = min(best, clock(device) - start) if turn else best
        optimizer.state.clear()
        lines.append(f"| {name} | {1e3 * best:.0f} |")
    return "\n".join(lines)


def compiled_passes(device: str, rounds: int) -> list[str]:
    """The two passes of a projected update by `torch.compile`, as multiples of fused AdamW on the same weights."""
    lr, eps, beta1, beta2 = 1e-8, 1e-8, 0.9, 0.999
    shape, count = (768, 3072), 12
    sets = [[torch.rand(shape, device=device) * 0.01 for _ in range(4)] for _ in range(count)]
    step = torch.ones((), device=device)

    def update(exp_avg, exp_avg_sq):
        return exp_avg / (exp_avg_sq.sqrt() + eps)

    @torch.compile
    def measure(weight, grad, exp_avg, exp_avg_sq):
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        products = (grad * weight, grad * grad, weight * weight, update(exp_avg, exp_avg_sq) * weight)
        return [product.sum(1) for product in products]

    @torch.compile
    def apply(weight, grad, exp_avg, exp_avg_sq, coefficient):
        weight.mul_(1 - lr * 0.01).sub_(lr * (update(exp_avg, exp_avg_sq) - coefficient * weight))

    def adamw(weight, grad, exp_avg, exp_avg_sq):
        torch._fused_adamw_(
            [weight], [grad], [exp_avg], [exp_avg_sq], [], [step], lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.01,
            eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    coefficient = torch.zeros((), device=device)
    runs = {"adamw": adamw, "first pass": measure, "second pass": lambda *tensors: apply(*tensors, coefficient)}
    best = dict.fromkeys(runs, float("inf"))
    with torch.no_grad():
        for turn in range(rounds + 2):
            for name, run in runs.items():
                start = clock(device)
                for tensors in sets:
                    run(*tensors)
                if turn > 1:
                    best[name] = min(best[name], clock(device) - start)
    return [
        f"| `torch.compile`: {name} | {best[name] / best['adamw']:.2f} |" for name in ("first pass", "second pass")
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--num_layers", type=int, default=16, help="of the Llama list; fewer where memory is short")
    parser.add_argument("--gradients", choices=GRADIENTS, nargs="+", default=["generic", "orthogonal"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="names of the optimizers to measure")
    parser.add_argument("--compile", action="store_true", help="measures passes made by torch.compile instead")
    parser.add_argument("--sgd", action="store_true", help="measures SGDP instead")
    parser.add_argument("--narrow", nargs="*", choices=NARROW, help="measures shapes with short rows instead")
    parser.add_argument("--bf16", action="store_true", help="measures bfloat16 weights with float32 state instead")
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.compile:
        print("\n".join(compiled_passes(device, options.rounds)))
        return
    if options.narrow is not None:
        print(narrow_rows(device, options.rounds, options.narrow or list(NARROW)))
        return
    shapes = gpt2_shapes() if options.model == "gpt2" else llama_1b_shapes(options.num_layers)
    if options.bf16:
        print(half_precision(shapes, device, options.rounds))
        return
    if options.sgd:
        for gradients in options.gradients:
            print(f"{gradients}: {compare_sgd(shapes, device, gradients, options.rounds)}")
        return
    machine = (
        torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()}), {options.threads} thread"
    )
    malloc = "memory kept by malloc" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "default malloc"
    text = (
        f"{options.model}: {len(shapes)} tensors, {sum(torch.Size(s).numel() for s in shapes) / 1e6:.0f} million "
        f"parameters, float32; {machine}; {malloc}; best of {options.rounds} rounds.\n"
    )
    for gradients in options.gradients:
        text += (
            f"\n{gradients.capitalize()} gradients\n\n"
            "| optimizer | fused AdamW, ms | this, ms | ratio | MiB more than AdamW | weights projected |\n"
            "|---|---|---|---|---|---|\n"
        )
        lines = measure(shapes, device, gradients, options.rounds, options.only)
        text += "\n".join(lines) + "\n"
    text += f"\nThe largest tensor takes {4 * max(torch.Size(shape).numel() for shape in shapes) / 2**20:.0f} MiB.\n"
    print(text)
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(text)


if __name__ == "__main__":
    main()
