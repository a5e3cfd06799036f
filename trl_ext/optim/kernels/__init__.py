"""
Back ends of a step over one table of weights (table.py). On a CPU, the kernels in C (cpu.py, adamp.c) take the step of
all whole weights in one call, and the passes of single ones: `measure` updates the moments and writes the dot
products, `apply` makes decay and the projected update from them. On a GPU, the three kernels of triton.py take that of
all tensors at once (plan.py). What neither takes, step.py does in blocks of torch operations, and stock.py hands what
is not projected to torch's own fused kernels.
"""
