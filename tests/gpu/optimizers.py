"""A step of AdamP over one of torch's fused AdamW on the weights of three models."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.benchmarks.optimizers import gpt2_shapes, llama_1b_shapes, share_state
from trl_ext.optim import AdamP, scale_invariant_weights
from trl_ext.optim.kernels import plan

from .measuring import Record, count_calls, peak_mib, release, time_in_turn


COMMON = {"lr": 1e-8, "weight_decay": 0.01}  # So small that weights stay orthogonal to their gradients
QWEN3_0_6B = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64, "tie_word_embeddings": True,
}  # fmt: skip
Named = list[tuple[str, torch.nn.Parameter]]
SPEED = "AdamP over fused AdamW"
CALLS = "calls of one step"


def qwen3_shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen3, without its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def lists(dry: bool) -> dict[str, tuple[dict[str, tuple[int, ...]], Any]]:
    """For each model its named shapes, and the option `projection` of whoever names the scale-invariant weights."""
    qwen3 = Qwen3Config(**(TINY if dry else QWEN3_0_6B))
    gpt2 = [(50, 16), *[(16,), (16, 48), (48,)] * 2] if dry else gpt2_shapes()
    llama = [(64, 16), *[(16, 16), (24, 16), (16,)] * 2] if dry else llama_1b_shapes()
    found = {"GPT-2 small": gpt2, "Qwen3-0.6B": None, "Llama 3.2 1B": llama}
    return {
        name: (qwen3_shapes(qwen3), scale_invariant_weights(qwen3))
        if shapes is None
        else ({str(place): shape for place, shape in enumerate(shapes)}, "none")
        for name, shapes in found.items()
    }


def make_params(shapes: dict[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> Named:
    torch.manual_seed(0)
    named = [(n, torch.nn.Parameter(torch.randn(s, device=device).mul_(0.02).to(dtype))) for n, s in shapes.items()]
    for _, param in named:
        param.grad = torch.empty_like(param)
    return named


@torch.no_grad()
def set_gradients(named: Named, orthogonal: bool) -> None:
    """Gradients that are orthogonal to their weights, so that each passes the test, or at a cosine that never does."""
    for _, param in named:
        grad = torch.randn(param.shape, device=param.device)
        if param.ndim > 1:
            weight = param.float()
            for _ in range(2):  # The second turn takes off what the first left by rounding
                grad -= weight * ((grad * weight).sum() / weight.square().sum())
            if not orthogonal:
                grad += weight
        assert param.grad is not None
        param.grad.copy_(grad.mul_(1e-3))


def captured(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Replays a CUDA graph of a step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


class Comparison:
    """
    AdamP against fused AdamW on one list of weights, both with the same running averages.

    Args:
        record (`Record`):
            Where the rows go.
        name (`str`):
            Of the list.
        named (`list[tuple[str, torch.nn.Parameter]]`):
            Weights with gradients.
        rounds (`int`):
            Steps that are timed.
    """

    def __init__(self, record: Record, name: str, named: Named, rounds: int):
        self.record, self.name, self.named, self.rounds = record, name, named, rounds
        self.params = [param for _, param in named]
        self.device = self.params[0].device
        self.base = torch.optim.AdamW(self.params, **COMMON, fused=True)
        self.base.step()

    def run(self, case: str, graph: bool, **options: Any) -> None:
        names = {"list": self.name, "case": case, "mode": "graph" if graph else "eager"}
        with self.record.attempt(SPEED, **names):
            base, own = self.base, AdamP(self.named, **COMMON, **options, capturable=graph)
            if graph:
                base = torch.optim.AdamW(self.params, **COMMON, fused=True, capturable=True)
                share_state(base, self.base)
            share_state(own, self.base)
            own.step()
            steps: dict[str, Callable[[], Any]] = {"adamw": base.step, "adamp": own.step}
            if graph and self.device.type == "cuda":
                steps = {"adamw": captured(base), "adamp": captured(own)}
            times = time_in_turn(steps, self.rounds, self.device)
            adamw, adamp = times["adamw"], times["adamp"]
            counted = [] if graph else list(own.report().values())
            projected = sum(row["layer"] + row["channel"] for row in counted)
            self.record.row(
                SPEED, **names, adamw_ms=adamw.device, adamp_ms=adamp.device, ratio=adamp.device / adamw.device,
                adamw_host_ms=adamw.host, adamp_host_ms=adamp.host,
                projected="-" if graph else f"{projected:.0f} of {len(counted)}",
            )  # fmt: skip
            if not graph and (self.device.type == "cuda" or case == "generic"):
                for optimizer, step in (("AdamW", base.step), ("AdamP", own.step)):
                    self.record.row(CALLS, list=self.name, case=case, optimizer=optimizer, **count_calls(step))
                added = peak_mib(own.step)
                self.record.row("memory that a step adds", list=self.name, case=case, adamp_mib=added)


# Elements at a time, warps, registers of a thread (0: as many as it takes), programs of a processor
SETTINGS = [
    (1024, 8, 80, 6), (1024, 8, 64, 8), (1024, 8, 0, 4), (1024, 4, 0, 6), (1024, 4, 128, 8), (512, 4, 0, 8),
    (512, 4, 80, 12), (2048, 8, 0, 4),
]  # fmt: skip


def compare_settings(record: Record, comparison: Comparison, settings: list[tuple[int, int, int, int]]) -> None:
    """Graph replays of a step in the kernels' possible settings."""
    for orthogonal in (False, True):
        set_gradients(comparison.named, orthogonal)
        for block, warps, registers, programs in settings:
            names = {"list": comparison.name, "projected": str(orthogonal), "block": block, "warps": warps}
            names |= {"registers": registers, "programs": programs}
            sizes = {"BLOCK": block, "NUM_WARPS": warps, "MAX_REGISTERS": registers, "NUM_PROGRAMS": programs}
            with record.attempt("settings", **names), mock.patch.multiple(plan, **sizes):
                own = AdamP(comparison.named, **COMMON, capturable=True)
                share_state(own, comparison.base)
                own.step()
                step = captured(own) if comparison.device.type == "cuda" else own.step
                times = time_in_turn({"own": step}, comparison.rounds, comparison.device)
                record.row("settings", **names, adamp_ms=times["own"].device)


def run(record: Record, device: torch.device, dry: bool) -> None:
    rounds = 2 if dry else 20
    for name, (shapes, known) in lists(dry).items():
        comparison = Comparison(record, name, make_params(shapes, device, torch.float32), rounds)
        for orthogonal in (False, True):
            set_gradients(comparison.named, orthogonal)
            for graph in (False, True):
                if orthogonal:
                    comparison.run("projected", graph)
                    comparison.run("projected, named", graph, projection="layer")
                else:
                    comparison.run("generic", graph)
                    comparison.run("named", graph, projection=known)
        if not dry and device.type == "cuda":
            comparison.run("generic, no kernels of its own", False, foreach=True)
        if name == "GPT-2 small":
            compare_settings(record, comparison, SETTINGS[:1] if dry else SETTINGS)
        del comparison
        release()
    shapes, _ = lists(dry)["GPT-2 small"]
    comparison = Comparison(record, "GPT-2 small, bf16", make_params(shapes, device, torch.bfloat16), rounds)
    set_gradients(comparison.named, False)
    comparison.run("generic", False)
    comparison.run("generic", True)
