"""What the all-reduce of sharded AdamP adds to its step under DeepSpeed's ZeRO, on the tensors of GPT-2 small.

torchrun --standalone --nproc_per_node 2 -m tests.benchmarks.optimizer_exchange --stage 2
"""

import argparse
import os
import sys
import time

import deepspeed
import deepspeed.comm.torch
import torch
from torch import nn

from tests.benchmarks.optimizers import gpt2_shapes
from trl_ext.optim import AdamP
from trl_ext.optim.shards import Exchange


sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


class Weights(nn.Module):
    """A loss that is linear in every weight, so that the time goes to the optimizer."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.02) for shape in gpt2_shapes()])

    def forward(self):
        return sum(weight.sum() for weight in self.weights)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    seconds = {"step": [0.0, 0.0], "exchange": [0.0, 0.0]}

    def timed(name, function):
        def call(*args, **kwargs):
            wall, cpu = time.perf_counter(), time.process_time()
            result = function(*args, **kwargs)
            seconds[name][0] += time.perf_counter() - wall
            seconds[name][1] += time.process_time() - cpu
            return result

        return call

    model = Weights()
    optimizer = AdamP(model.parameters(), lr=1e-6, weight_decay=0.01)
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": options.stage},
    }  # fmt: skip
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    optimizer._exchanges = timed("exchange", optimizer._exchanges)
    Exchange.results = timed("exchange", Exchange.results)
    optimizer._take_step = timed("step", optimizer._take_step)
    rows = []
    for turn in range(options.rounds + 2):
        for found in seconds.values():
            found[:] = [0.0, 0.0]
        engine.backward(engine())
        engine.step()
        if turn > 1:
            rows.append([seconds["exchange"][kind] / seconds["step"][kind] for kind in (0, 1)])
            rows[-1] += [1e3 * seconds["step"][1], 1e3 * seconds["exchange"][1]]
    best = [min(row[column] for row in rows) for column in range(4)]
    if torch.distributed.get_rank() == 0:
        print(
            f"ZeRO-{options.stage}, {torch.distributed.get_world_size()} processes: step {best[2]:.0f} ms of CPU, "
            f"exchange {best[3]:.2f} ms; least of {options.rounds}: {best[1]:.2%} of CPU, {best[0]:.2%} of wall time",
            flush=True,
        )
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
