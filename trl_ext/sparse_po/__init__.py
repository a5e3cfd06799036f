"""SparsePO (https://huggingface.co/papers/2410.05102): preference optimisation with token masks."""
