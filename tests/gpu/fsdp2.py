"""AdamP under FSDP2 in one process, prepared by accelerate, against AdamP on the whole model."""

import copy
import os
import socket
from collections.abc import Callable
from unittest import mock

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Qwen3Config

from trl_ext.optim import SGDP, AdamP

from .measuring import Record, count_calls, time_in_turn


TABLE = "FSDP2 over the whole model"
SMALL = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "tie_word_embeddings": True,
}  # fmt: skip
STEPS = 4


def environment() -> dict[str, str]:
    """What `accelerate launch --use_fsdp --fsdp_version 2 --num_processes 1` sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
    }  # fmt: skip


def make_accelerator() -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(fsdp_plugin=plugin, mixed_precision="no")
    assert accelerator.is_fsdp2, accelerator.distributed_type
    return accelerator


def shard_on_cpu(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
    """What accelerate does, by torch alone: accelerate has FSDP on accelerators only."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    group = optimizer.param_groups[0]
    return model, type(optimizer)(model.named_parameters(), lr=group["lr"], weight_decay=group["weight_decay"])


def run(record: Record, device: torch.device, dry: bool) -> None:
    with mock.patch.dict(os.environ, environment()):
        if device.type == "cuda":
            compare(record, device, dry, make_accelerator().prepare)
        else:
            torch.distributed.init_process_group("gloo")
            compare(record, device, dry, shard_on_cpu)
        torch.distributed.destroy_process_group()


def compare(record: Record, device: torch.device, dry: bool, shard: Callable[..., tuple]) -> None:
    """Some steps of the whole and of the sharded model."""
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(Qwen3Config(**(TINY if dry else SMALL)), dtype=torch.float32)
    ids = torch.randint(0, 64, (4, 16)).to(device)
    for optimizer_class in (AdamP,) if dry else (AdamP, SGDP):
        one, other = copy.deepcopy(whole).to(device), copy.deepcopy(whole).to(device)
        options = {"lr": 1e-3, "weight_decay": 0.1}
        plain = optimizer_class(list(one.named_parameters()), **options)
        sharded, wrapped = shard(other, optimizer_class(list(other.named_parameters()), **options))
        for _ in range(STEPS):
            for model, optimizer in ((one, plain), (sharded, wrapped)):
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
        start = dict(whole.named_parameters())
        errors, changes, kinds = [], [], set()
        for (name, alone), part in zip(one.named_parameters(), sharded.parameters(), strict=True):
            kinds.add(type(part.data).__name__ if not hasattr(part, "full_tensor") else "DTensor")
            full = part.full_tensor() if hasattr(part, "full_tensor") else part
            errors.append(float((full - alone).abs().max()))
            changes.append(float((alone - start[name].to(device)).abs().max()))
        inner = getattr(wrapped, "optimizer", wrapped)
        projected = sum(row["layer"] + row["channel"] > 0 for row in inner.report().values())
        times = time_in_turn({"plain": plain.step, "sharded": wrapped.step}, 2 if dry else 10, device)
        record.row(
            TABLE, optimizer=optimizer_class.__name__, parameters=" ".join(sorted(kinds)), steps=STEPS,
            error=max(errors), change=max(changes), projected=projected,
            agrees="yes" if max(errors) < 1e-3 * max(changes) and kinds == {"DTensor"} else "NO",
            plain_ms=times["plain"].device, sharded_ms=times["sharded"].device, **count_calls(wrapped.step),
        )  # fmt: skip
