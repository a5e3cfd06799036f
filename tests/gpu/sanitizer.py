"""A small step of the optimizers and of the paired head under compute-sanitizer."""

import os
import re
import shutil
import subprocess
import sys

import torch

from .measuring import Record


TABLE = "compute-sanitizer"
# Torch's caching allocator would hide accesses beyond a tensor, inside the block that it was cut from
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}


def small_steps() -> None:
    """What is run under the sanitizer."""
    from .kernels import GRADIENTS, OPTIMIZERS, HeadCase, head_errors, optimizer_difference

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("AdamP", "AdamP, named channel", "SGDP"):
        assert name in OPTIMIZERS
        for shape in ((33, 17), (5, 1031)):
            for kind in GRADIENTS:
                assert optimizer_difference(name, shape, kind, "offset", torch.float32, device, {}).agrees(
                    torch.float32
                )
    for dtype in (torch.float32, torch.bfloat16):
        assert max(head_errors(HeadCase(5, 32, 1501, dtype), device).values()) < 2e-2
    sys.stdout.write("steps agree\n")


def run(record: Record, device: torch.device, dry: bool) -> None:
    tool = shutil.which("compute-sanitizer")
    if device.type != "cuda":
        small_steps()
        record.row(TABLE, tool="none on a CPU", returncode=0, errors="-", steps="agree")
        return
    if tool is None:
        record.row(TABLE, tool="none", error="compute-sanitizer is not on PATH")
        return
    command = [tool, "--tool", "memcheck", "--print-limit", "20", sys.executable, "-m", "tests.gpu.sanitizer"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    text = done.stdout + done.stderr
    sys.stdout.write(text[-6000:])
    found = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    record.row(
        TABLE, tool="memcheck", returncode=done.returncode, errors=found[-1] if found else "-",
        steps="agree" if "steps agree" in text else "failed",
    )  # fmt: skip


if __name__ == "__main__":
    small_steps()
