"""
Registers, stack and spilled memory of every Triton kernel, compiled for an H100 or H200 (sm_90) by the assembler that
Triton carries; no GPU is needed. Spills are what makes a kernel slow without a word: with one, the exit status is 1.

python -m tests.benchmarks.kernel_registers
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trl_ext.optim.kernels import plan
from trl_ext.optim.kernels import triton as optimizer_kernels
from trl_ext.sparse_po.lm_head import triton_kernels as head_kernels


TARGET = GPUTarget("cuda", 90, 32)
# Types of the arguments that are not pointers to float32
TYPES = {
    "items": "*i64", "chunks": "*i64", "was_projected": "*i32", "modes": "*i32", "is_anything_left": "*i32",
    "first_chunk": "i32", "last_chunk": "i32", "labels": "*i64", "first_column": "i32", "num_columns": "i32",
    **dict.fromkeys(("policy_scale", "policy_softcap", "ref_scale", "ref_softcap"), "fp32"),
}  # fmt: skip
HEAD_TILES = ("policy", "ref", "policy_bias", "ref_bias")
NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def compiled_kernel(kernel: Any, num_warps: int, tiles: str = "*fp32", **constants: Any) -> Any:
    """Compiles a kernel, with memory and widths of tiles that 16 bytes divide; `tiles` is the type of the head's."""
    types = {name: tiles if name in HEAD_TILES else TYPES.get(name, "*fp32") for name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    divisible = [name for name, kind in signature.items() if kind.startswith("*") or name == "num_columns"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    return triton.compile(source, target=TARGET, options={"num_warps": num_warps})


def resources(compiled: Any) -> dict[str, int]:
    """Registers of a thread and bytes of stack and of spilled memory."""
    reader = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = subprocess.run([reader, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}
    return {name: found[name] for name in ("reg", "stack", "local")}


def cases() -> list[tuple[str, Any, int, dict[str, Any]]]:
    """Name, kernel, warps and constants of every kernel, as they are launched."""
    found: list[tuple[str, Any, int, dict[str, Any]]] = []
    for rule, dtypes in (
        ("AdamP, float32", (torch.float32, torch.float32)),
        ("AdamP, bfloat16", (torch.bfloat16, torch.bfloat16)),
        ("AdamP, bfloat16 with float32 state", (torch.bfloat16, torch.float32)),
        ("AdamP, bfloat16 with float32 state, random rounding", (torch.bfloat16, torch.float32)),
        ("SGDP, float32", (torch.float32, torch.float32)),
    ):
        weight, state = (NAMES[dtype] for dtype in dtypes)
        is_adam = rule.startswith("AdamP")
        rounds = rule.endswith("random rounding")
        constants = {"W": weight, "G": weight, "M": state, "ADAM": is_adam, "ROUNDS": rounds, "BLOCK": plan.BLOCK}
        found.append((f"{rule}: measure", optimizer_kernels.measure_kernel, plan.NUM_WARPS, constants))
        found.append((f"{rule}: apply", optimizer_kernels.apply_kernel, plan.NUM_WARPS, constants))
    sizes = {"BLOCK": plan.SUM_BLOCK, "ROWS": plan.SPLIT_ROWS, "PARTS": plan.SPLIT_PARTS}
    decided = {"SUM": True, "DECIDE": True, "ADAM": True, **sizes}
    found.append(("AdamP: decide", optimizer_kernels.decide_kernel, 8, decided))
    for dtype in ("bfloat16", "float32"):
        tiles = {"tiles": {"bfloat16": "*bf16", "float32": "*fp32"}[dtype], "BLOCK": head_kernels.BLOCK_SIZE}
        for capped in (False, True):
            name = f"paired head, {dtype}{', bias and soft-capping' if capped else ''}"
            made = dict.fromkeys(("POLICY_BIAS", "REF_BIAS", "POLICY_SOFTCAP", "REF_SOFTCAP"), capped) | tiles
            found.append((f"{name}: fold", head_kernels._fold_kernel, head_kernels.NUM_WARPS, made))
            gradient = head_kernels._logit_gradient_kernel
            found.append((f"{name}: gradient", gradient, head_kernels.NUM_WARPS, {"HAS_KL": True, **made}))
    return found


def main() -> int:
    num_spilled = 0
    print("| kernel | registers | stack, bytes | spilled, bytes |\n|---|---|---|---|")
    for name, kernel, num_warps, constants in cases():
        used = resources(compiled_kernel(kernel, num_warps, **constants))
        print(f"| {name} | {used['reg']} | {used['stack']} | {used['local']} |", flush=True)
        num_spilled += used["local"]
    return int(num_spilled > 0)


if __name__ == "__main__":
    raise SystemExit(main())
