"""
Steps of the Triton kernels, in Triton's interpreter, against the equations in float64; started by a test.

python -m tests.optim.plan_cases [--all]
"""

import sys
import time
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch

from tests.helpers.gradients import gradient_of
from trl_ext.optim import SGDP, AdamP
from trl_ext.optim.kernels import plan as plans
from trl_ext.optim.kernels import table
from trl_ext.optim.kernels import triton as kernels
from trl_ext.optim.kernels.table import Column
from trl_ext.optim.shards import _overlap
from trl_ext.optim.weights import LocalTensor


# Biases, narrow and wide rows, rows that are not divisible by 16, long rows that are cut in parts
SHAPES = [(7,), (6, 5), (40, 1), (1, 40), (5, 3, 2, 2), (5, 64), (3, 70), (2, 600), (3, 8), (1, 1), (2, 200)]
# One of each kind: what an option changes does not depend on the size
FEW = [(7,), (6, 5), (5, 3, 2, 2), (3, 70), (2, 300)]
# Gradients, step by step: what the last step expects of the next is right, at another level, or nothing
TWICE = ("layer", "layer", "channel", "channel", "generic")
CHANGES = ("layer", "channel", "channel", "generic")


@contextmanager
def interpreted():
    """Sends tensors on a CPU through the kernels, with chunks so small that every way of cutting is taken."""
    sizes = {"DEVICE_TYPES": {"cpu"}, "CHUNK": 128, "MAX_ROW": 256, "SPLIT_ROWS": 2, "SPLIT_PARTS": 4, "SUM_BLOCK": 8}
    with mock.patch.multiple(plans, **sizes):
        yield


class Launches:
    """Counts calls of the kernels."""

    def __init__(self):
        self.count = 0

    @contextmanager
    def counted(self):
        def counting(kernel):
            class Counting:
                def __getitem__(_, grid):
                    def launch(*args, **kwargs):
                        self.count += 1
                        return kernel[grid](*args, **kwargs)

                    return launch

            return Counting()

        names = ("measure_kernel", "decide_kernel", "apply_kernel")
        with mock.patch.multiple(kernels, **{name: counting(getattr(kernels, name)) for name in names}):
            yield self


def compare(optimizer_class, dtype=torch.float32, steps=5, tolerance=2e-5, shapes=SHAPES, kinds=TWICE, **options):
    """Some steps in both; gradients pass at the levels `kinds`, or at none."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    ours, exact = ([torch.nn.Parameter(start.to(kind)) for start in starts] for kind in (dtype, torch.float64))
    common = {"lr": 1e-2, "weight_decay": 0.1, **({"momentum": 0.9} if optimizer_class is SGDP else {})}
    reference_options = {name: value for name, value in options.items() if name != "state_dtype"}
    second = {"lr": 2e-2, "weight_decay": 0.0, "delta": 0.2}  # Of a second group
    groups = [[{"params": ps[::2]}, {"params": ps[1::2], **second}] for ps in (ours, exact)]
    optimizer = optimizer_class(groups[0], **{**common, **options})
    reference = optimizer_class(groups[1], **{**common, **reference_options}, foreach=False, fused=False)
    for step in range(steps):
        kind = kinds[step]
        for number, (param, other) in enumerate(zip(ours, exact, strict=True)):
            grad = gradient_of(kind, other, generator).to(dtype)
            is_missing = step == 3 and number % 5 == 1  # As an expert that no token chose
            param.grad, other.grad = (None, None) if is_missing else (grad, grad.double())
        with interpreted(), Launches().counted() as launches:
            optimizer.step()
        reference.step()
        assert launches.count == 3, launches.count
        if step == 2:  # A schedule, for both
            for group in [*optimizer.param_groups, *reference.param_groups]:
                group["lr"] *= 0.5
        with torch.no_grad():
            for start, param, other in zip(starts, ours, exact, strict=True):
                error, change = (param - other).abs().max(), (other - start).abs().max()
                limit = tolerance * change + (step + 2) * torch.finfo(dtype).eps * other.abs().max()
                assert error <= limit, (tuple(start.shape), step, kind, float(error), float(limit))
                if dtype == torch.bfloat16:
                    other.copy_(param)  # Rounding would decide between levels
    return optimizer, reference, ours, exact


def check_reports(optimizer, reference):
    found, expected = optimizer.report(), reference.report()
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        for key in ("steps", "channel", "layer"):
            assert found[name][key] == row[key], (name, key, found[name], row)


def sharded_plans(weights, num_processes, **options):
    """A plan for each of some processes, which hold equal pieces of all weights one after the other."""
    sizes = [weight.numel() for weight in weights]
    starts, piece = [sum(sizes[:place]) for place in range(len(sizes))], -(-sum(sizes) // num_processes)
    everything = torch.cat(
        [*(weight.flatten() for weight in weights), torch.zeros(piece * num_processes - sum(sizes))]
    )
    found = []
    for rank in range(num_processes):
        param = torch.nn.Parameter(everything[rank * piece : (rank + 1) * piece].clone())
        param.grad = torch.zeros_like(param)
        optimizer = AdamP([param], **options)
        group, state = optimizer.param_groups[0], {"step": 0}
        shards = [
            _overlap(place, tuple(weight.shape), starts[place], piece, rank, "processes")
            for place, weight in enumerate(weights)
        ]
        state |= {name: torch.zeros_like(param.detach()) for name in AdamP.MOMENTS}
        moments = tuple(state[name] for name in AdamP.MOMENTS)
        local = LocalTensor(param, group, shards, param.detach(), param.grad, moments, 0)
        found.append(plans.Plan([local], [state], optimizer.param_groups, AdamP.MOMENTS, optimizer.projection_counts))
    return found


def compare_shards(num_processes, steps=3, **options):
    """Pieces that begin and end in the middle of rows, one weight on three processes, against whole weights."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in [(6, 5), (7,), (3, 8), (2, 600), (9, 30)]]
    exact = [torch.nn.Parameter(start.double()) for start in starts]
    common = {"lr": 1e-2, "weight_decay": 0.1, **options}
    reference = AdamP(exact, **common, foreach=False, fused=False)
    with interpreted():
        processes = sharded_plans(starts, num_processes, **common)
        assert processes[0].cut_weights
        for step in range(steps):
            for weight in exact:
                weight.grad = gradient_of(("layer", "channel", "generic")[step], weight, generator).float().double()
            grads = torch.cat([weight.grad.flatten() for weight in exact]).float()
            for rank, plan in enumerate(processes):
                entry = plan.entries[0]
                piece = grads[rank * entry.param.numel() : (rank + 1) * entry.param.numel()]
                entry.param.grad.zero_()[: len(piece)] = piece
                assert plan.watch.is_current({entry.param: plan.watch.states[0]})
                plan.update()
                plan.measure()
            cuts = [plans.side_by_side(plan.cut_weights) for plan in processes]
            assert all(len(joined) == 1 for joined in cuts)
            totals = torch.stack([joined.sums() for (joined,) in cuts]).sum(0)
            for plan, (joined,) in zip(processes, cuts, strict=True):
                joined.sums().copy_(totals)
                plan.apply()
            reference.step()
            found = torch.cat([plan.entries[0].param.detach() for plan in processes])
            expected = torch.cat([weight.detach().flatten() for weight in exact])
            torch.testing.assert_close(found[: len(expected)].double(), expected, rtol=1e-6, atol=1e-6)
    for plan in processes:
        for place, weight in enumerate(starts):
            if weight.ndim > 1 and (0, place) in plan.counts.hits:
                steps_and_hits = reference.projection_counts.counts((0, place))
                assert plan.counts.counts((0, place)) == steps_and_hits, (place, steps_and_hits)


def check_rounding(shape, num_steps=4, **options):
    """Updates of a tenth of a unit in the last place count on average, whatever torch's generator says."""
    once = []
    for seed, steps in ((0, num_steps), (1, 1)):
        torch.manual_seed(seed)
        params = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for _ in range(2)]
        settings = {"lr": 2**-8 / 10, "state_dtype": torch.float32, "stochastic_rounding": True, **options}
        optimizer = AdamP(params, **settings)
        for step in range(steps):
            before = [param.detach().clone() for param in params]
            for param in params:
                param.grad = torch.ones_like(param)
            with interpreted(), Launches().counted() as launches:
                optimizer.step()
            assert launches.count == 3, launches.count
            sizes = [float((old - param.detach()).abs().max()) for old, param in zip(before, params, strict=True)]
            assert all(0 < size <= 2**-8 for size in sizes), sizes
            if step == 0:
                once.append([param.detach().clone() for param in params])
        if seed == 0:
            # Of 2 x 600 x 4 updates one in ten moves a weight: 480, and 21 more or less by chance
            moved = 1 - float(torch.stack([param.detach().float() for param in params]).mean())
            assert abs(moved / (num_steps * 2**-8 / 10) - 1) < 0.15, moved
            assert not torch.equal(*params)
    assert all(torch.equal(*pair) for pair in zip(*once, strict=True))


def check_adamp(options, shapes=FEW, steps=4, kinds=CHANGES):
    optimizer, reference, *_ = compare(AdamP, shapes=shapes, steps=steps, kinds=kinds, **options)
    if options != {"capturable": True} and options != {"projection": "none"}:
        check_reports(optimizer, reference)


def check_sgdp(options, shapes=FEW, steps=4, kinds=CHANGES):
    check_reports(*compare(SGDP, shapes=shapes, steps=steps, kinds=kinds, **options)[:2])


def check_bfloat16(state_dtype, steps=4, kinds=CHANGES):
    compare(AdamP, torch.bfloat16, state_dtype=state_dtype, tolerance=0.05, shapes=FEW, steps=steps, kinds=kinds)


def check_columns():
    """The kernels name columns and levels as the table does."""
    for column in list(Column)[: Column.SEED + 1]:
        assert getattr(kernels, column.name).value == column, column
    for level, number in table.LEVELS.items():
        assert level == "none" or getattr(kernels, level.upper()).value == number, level
    assert kernels.NUM_COLUMNS.value == len(Column) and kernels.NUM_OPTIONS.value == table.NUM_OPTIONS


def few_cases():
    """Every branch of the kernels, options that do not meet taken together."""
    yield partial(check_columns)
    heavy = {"weight_decay": 60.0}  # Takes off more than half, so that no step can be taken back
    yield partial(check_adamp, {}, SHAPES, 5, TWICE)
    for options in ({"nesterov": True, "maximize": True}, {"capturable": True}, heavy):
        yield partial(check_adamp, options)
    for level in ("layer", "channel", "none"):  # Nothing is tested, so that gradients make no difference
        yield partial(check_adamp, {"projection": level}, steps=2)
    for options in ({}, {"nesterov": True, "project_momentum": True}, {"dampening": 0.5, "maximize": True}):
        yield partial(check_sgdp, options)
    for dtype in (torch.bfloat16, torch.float32):
        yield partial(check_bfloat16, dtype)
    # A bias, a weight that is tested, one that is known
    for shape, options in (((300,), {}), ((15, 20), {}), ((15, 20), {"projection": "none"})):
        yield partial(check_rounding, shape, **options)
    yield partial(compare_shards, 7)
    for level in ("channel", "layer"):
        yield partial(compare_shards, 3, 2, projection=level)


def all_cases():
    """Every option alone, on more gradients and larger tensors; twice as long."""
    options = [{"nesterov": True}, {"maximize": True}, {"capturable": True}, {"weight_decay": 60.0}]
    options += [{"projection": level} for level in ("layer", "channel", "none")]
    yield partial(check_adamp, {}, SHAPES, 5, TWICE)
    for some in options:
        yield partial(check_adamp, some, FEW, 5, TWICE)
    yield partial(check_sgdp, {}, SHAPES, 5, TWICE)
    for some in ({"nesterov": True}, {"project_momentum": True}, {"dampening": 0.5, "maximize": True}):
        yield partial(check_sgdp, some, FEW, 5, TWICE)
    for dtype in (torch.bfloat16, torch.float32):
        yield partial(check_bfloat16, dtype, 5, TWICE)
    for shape, some in (((700,), {}), ((30, 20), {}), ((30, 20), {"projection": "none"})):
        yield partial(check_rounding, shape, **some)
    for num_processes, some in ((3, {}), (7, {}), (3, {"projection": "channel"}), (3, {"projection": "layer"})):
        yield partial(compare_shards, num_processes, **some)


def main() -> None:
    cases = list(all_cases() if "--all" in sys.argv[1:] else few_cases())
    for check in cases:
        start = time.process_time()
        check()
        seconds = time.process_time() - start
        sys.stderr.write(f"{check.func.__name__} {check.args} {check.keywords}: {seconds:.1f} s\n")
    sys.stdout.write(f"{len(cases)}\n")


if __name__ == "__main__":
    main()
