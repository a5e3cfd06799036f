"""
Back ends of a step. cpu.py (C) and triton.py hold AdamP's passes over one weight: `measure` updates the moments and
writes the dot products, `apply` makes decay and the projected update from them. What they do not take, step.py does in
blocks of torch operations, and stock.py hands what is not projected to torch's own fused kernels.
"""
