"""The machine and the rates it reaches: what the other sections' times are to be held against."""

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import time

import torch

from .measuring import Record, time_in_turn


PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "datasets", "peft", "numpy", "pyarrow")


def run(record: Record, device: torch.device, dry: bool) -> None:
    facts = {"device": platform.processor() or platform.machine(), "python": sys.version.split()[0]}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["memory, GiB"] = f"{properties.total_memory / 2**30:.1f}"
        facts["multiprocessors"] = str(properties.multi_processor_count)
        facts["cuda"] = str(torch.version.cuda)
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
            facts["driver, clocks"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "missing"
    for name, value in facts.items():
        record.row("facts", fact=name, value=value)

    size = 2**20 if dry else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 128 if dry else 8192
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    steps = {"copy": lambda: target.copy_(source), "clone": source.clone, "product": lambda: left @ right}
    times = time_in_turn(steps, 10, device)
    for name in ("copy", "clone"):
        record.row("rates", of=f"{name} of {size >> 20} MiB", value=2 * size / times[name].device / 1e9, unit="TB/s")
    rate = 2 * side**3 / times["product"].device / 1e9
    record.row("rates", of=f"bf16 product of side {side}", value=rate, unit="TFLOP/s")
    small, count = torch.zeros(1, device=device), 10 if dry else 1000
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        small.add_(1.0)
    record.row("rates", of="launch of a small kernel", value=1e6 * (time.perf_counter() - start) / count, unit="us")
