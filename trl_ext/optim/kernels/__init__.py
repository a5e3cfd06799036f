"""
Back ends of a step. On a CPU, cpu.py (C) holds AdamP's passes over one weight: `measure` updates the moments and
writes the dot products, `apply` makes decay and the projected update from them. On a GPU, plan.py keeps a table of all
tensors that the three kernels of triton.py work on at once. What neither takes, step.py does in blocks of torch
operations, and stock.py hands what is not projected to torch's own fused kernels.
"""
