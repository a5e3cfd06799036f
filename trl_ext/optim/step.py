"""
One step of AdamP or SGDP, on whole weights or shards:

1. resolve: read where each weight lies in what the group holds ([`read_shards`], at a tensor's first step);
2. measure: update the moments, and take the dot products of gradient, weight and update;
3. exchange: add them up over processes for the weights that shard borders cut ([`Exchange`]);
4. apply: decide whether and at which level a weight is scale-invariant, and apply decay and the projected update.

A plan does it for many tensors together, over one table of weights (kernels/table.py): on a GPU by the kernels of
kernels/triton.py, on a CPU by the compiled passes of kernels/cpu.py, which also take single weights that threads or
processes share.
Elsewhere it is done in blocks of torch operations around the update that a subclass writes; what is surely not
projected goes through torch's fused kernels.
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .heads import by_heads, view_by_heads
from .kernels import cpu
from .kernels import plan as plans
from .kernels.plan import CutWeight, Plan
from .kernels.rounding import RoundingNoise, copy_rounded_
from .options import check_options, check_param, check_state, level_of
from .projection import LEVELS, is_scale_invariant, threshold
from .resume import take_over
from .shards import GROUP_KEY, Exchange, Layouts, RowPieces, Shard, exchange_key, groups_of
from .weights import (
    Block,
    LocalTensor,
    ProjectionCounts,
    Scratch,
    Weight,
    has_order_of,
    is_flat,
    is_plain,
    layer_dots,
    local_part,
    local_tensor,
    memory,
    plain_blocks,
    read_answers,
    shared_scratch,
)


# Largest update kept between the pass that measures it and the one that applies it; larger ones are computed anew
MAX_KEPT_UPDATE = 2**26


class Place(NamedTuple):
    """A parameter, its group, and its place there."""

    param: torch.Tensor
    group: dict[str, Any]
    number: int


class ProjectedOptimizer(torch.optim.Optimizer):
    """Base of [`AdamP`] and [`SGDP`]: torch.optim's conventions, shards, and the decision where to project."""

    # Options that checkpoints of other implementations lack, with the values that stand for their behaviour
    OPTIONS: dict[str, Any] = {
        "foreach": None,
        "fused": None,
        "maximize": False,
        "capturable": False,
        "differentiable": False,
        "projection": None,
        "state_dtype": None,
        "stochastic_rounding": False,
        "on_unknown_shards": "raise",
    }
    # Names of the running averages in a parameter's state
    MOMENTS: tuple[str, ...] = ()
    # Module of compiled passes on a CPU (kernels/cpu.py), or `None`
    CPU_KERNELS: Any = None
    # What a weight is worked on as
    WEIGHT: type[Weight] = Weight

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        check_options(type(self).__name__, defaults)
        self._prepare()
        super().__init__(params, defaults)

    def _prepare(self) -> None:
        self._layouts = Layouts()
        # On other devices than a CPU its own, whose memory a CUDA graph may have captured
        self._scratch, self._own_scratch = Scratch(), Scratch()
        self._constants: dict[tuple[Any, ...], torch.Tensor] = {}
        self._noise = RoundingNoise()
        self._plans: list[Plan | cpu.Plan] = []
        # What the plans were made from, and what is not in them
        self._planned_params: list[torch.Tensor] = []
        self._outside: list[Place] = []
        # Weights that the last step projected: no more than a guess at which way is the faster one
        self._projected: set[tuple[int, int]] = set()
        self.projection_counts = ProjectionCounts()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer` does, after a check of its options."""
        check_options(type(self).__name__, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        self.param_groups[-1][GROUP_KEY] = self._layouts.new_key()
        self._layouts.remember(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_layouts"):  # Unpickled
            self._prepare()
        for place, group in enumerate(self.param_groups):
            for option, value in self.OPTIONS.items():
                group.setdefault(option, value)
            if group.setdefault(GROUP_KEY, place) not in self._layouts:
                self._layouts.remember(group)
            for param in group["params"]:
                self._settle_step(param, group)

    def _settle_step(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        """Holds the step count as the group's options want it, whoever saved it."""
        step = self.state[param].get("step") if param in self.state else None
        if step is None:
            return
        if group["capturable"]:
            self.state[param]["step"] = torch.as_tensor(step, dtype=torch.float32, device=param.device)
        elif isinstance(step, torch.Tensor):
            self.state[param]["step"] = int(step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Loads a state, also one of the official package's or of torch's AdamW or SGD; running averages keep what
        `state_dtype` asks for. Options come from the checkpoint, as in torch; those that it changes are warned of.

        Raises:
            ValueError: If the state lacks the running averages.
        """
        keys = [group.get(GROUP_KEY) for group in self.param_groups]
        dtypes = [group.get("state_dtype") for group in self.param_groups]
        loaded: dict[str, Any] = {}

        def after_all_hooks(_: torch.optim.Optimizer, found: dict[str, Any]) -> dict[str, Any]:
            needed = [name for name in self.defaults if name not in self.OPTIONS]
            loaded.update(take_over(found, self.param_groups, needed, self.MOMENTS, type(self).__name__))
            return loaded

        hook = self.register_load_state_dict_pre_hook(after_all_hooks)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        state_dict = loaded
        for group, key, dtype, saved in zip(self.param_groups, keys, dtypes, state_dict["param_groups"], strict=True):
            group[GROUP_KEY], group["state_dtype"] = key, dtype
            for param, saved_key in zip(group["params"], saved["params"], strict=True):
                for name in self.MOMENTS:
                    value = state_dict["state"].get(saved_key, {}).get(name)
                    # torch casts floating-point state to the parameter's dtype
                    if dtype is not None and value is not None:
                        self.state[param][name] = value.to(device=param.device, dtype=dtype)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """
        Takes one step and returns the loss of `closure`, or `None`.

        Raises:
            RuntimeError: If a gradient is sparse, a parameter is complex, or a parameter changed its shape.
            UnknownShardsError: If the layout of a shard can't be read.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._take_step()
        return loss

    def report(self) -> dict[str, dict[str, Any]]:
        """
        What the projection does, weight by weight. Reads the host and, where weights are cut, all processes must call
        it.

        Returns:
            `dict[str, dict]`: for each weight of at least two dimensions, under its name where the optimizer was given
            named parameters and under `group.index` otherwise: `"steps"`, and `"channel"` and `"layer"`, the share of
            steps that were projected at each level; `"weight_norm"`; and `"effective_step_size"`, the learning rate
            times the norm of the update's tangential part over the weight's norm: the angle, in radians, that a
            step at the current state turns the weight by.
        """
        found = {}
        with torch.no_grad():
            weights = self._stepped_weights()
            totals = self._report_totals(weights)
        for weight, total in zip(weights, totals, strict=True):
            squared_norm, update_squared, radial, steps, channel, layer = total.tolist()
            group, index = weight.local.group, weight.shard.index
            name = weight.shard.name or f"{group[GROUP_KEY]}.{index}"
            norm, num_steps = squared_norm**0.5, round(steps)
            tangential = max(update_squared - radial**2 / squared_norm, 0.0) ** 0.5 if norm else 0.0
            found[name] = {
                "steps": num_steps,
                "channel": channel / max(num_steps, 1),
                "layer": layer / max(num_steps, 1),
                "weight_norm": norm,
                "effective_step_size": self._turn(weight, norm, update_squared, tangential) if norm else float("nan"),
            }
        return found

    def _turn(self, weight: Weight, norm: float, update_squared: float, tangential: float) -> float:
        """Angle that a step turns a weight by, from the norms of weight, update and the update's tangential part."""
        return float(self._plain_lr(weight.local.group)) * tangential / norm

    def _stepped_weights(self) -> list[Weight]:
        """The weights of at least two dimensions that steps were taken on, in the order of the first step."""
        groups = {group[GROUP_KEY]: group for group in self.param_groups}
        found = []
        for param, shards, key in self._layouts.current():
            if key not in groups:
                continue
            state = self.state.get(param, {})
            moments = [memory(state[name]) for name in self.MOMENTS if name in state]
            local = LocalTensor(param, groups[key], shards, memory(param), None, tuple(moments), state.get("step", 0))
            # Other processes may have stepped on a weight that this one holds nothing of
            shards = [shard for shard in shards if len(shard.shape) > 1 and (moments or not shard.numel)]
            found += [Weight(local, shard, by_rows=False) for shard in shards]
        return found

    def _report_totals(self, weights: Sequence[Weight]) -> list[torch.Tensor]:
        """Of each whole weight `<w, w>`, `<u, u>`, `<u, w>` and its counts, shape `(6,)`."""
        totals: list[torch.Tensor] = []
        shared: dict[tuple[int, ...], list[int]] = {}
        for place, weight in enumerate(weights):
            # Every holder of a cut weight counts its steps
            group = weight.shard.process_group
            sizes = map(torch.distributed.get_world_size, groups_of(group) if weight.shard.borders else ())
            num_holders = math.prod(sizes)
            counts = torch.tensor(self.projection_counts.counts(weight.key)) / num_holders
            totals.append(torch.cat([self._report_dots(weight), counts.double()]))
            if group is not None:
                shared.setdefault(exchange_key(group), []).append(place)
        for places in shared.values():
            group = weights[places[0]].shard.process_group
            summed = Exchange([totals[place] for place in places], group).results()
            for place, total in zip(places, summed, strict=True):
                totals[place] = total
        return totals

    def _report_dots(self, weight: Weight) -> torch.Tensor:
        """`<w, w>`, `<u, u>` and `<u, w>` over the part of a weight that is here, shape `(3,)`, on the CPU."""
        local, start = weight.local, weight.shard.start
        total = torch.zeros(3, dtype=torch.float64, device=local.flat.device)
        for block in plain_blocks(local, start, start + weight.shard.numel):
            # Minus the update that the present moments stand for, before projection and learning rate
            update = torch.empty_like(block.flat, dtype=local.compute_dtype)
            self._displace_again(block, update)
            value = block.flat.to(local.compute_dtype)
            total += torch.stack([torch.dot(value, value), torch.dot(update, update), torch.dot(update, value)])
        return total.cpu()

    # ------------------------------------------------------------------ one step

    def _take_step(self) -> None:
        # Resolve
        self._scratch = shared_scratch()
        self._layouts.renew_names(self.param_groups)
        tensors, single = self._local_tensors(self._places_outside_plans())
        for plan in self._plans:
            plan.update()
        self._single_tensor_steps(single)
        if any(group["stochastic_rounding"] for group in self.param_groups):
            self._noise.restart(tensors)
        candidates = self._candidates(list(self._weights(tensors)))
        self._prepare_measuring(candidates)
        # Measure; a weight that is wholly here is applied at once, while it is in the cache
        for plan in self._plans:
            plan.measure()
        for weight in candidates:
            self._measure(weight)
            if not weight.shard.borders:
                self._apply_whole(weight)
        # Exchange, while what no candidate covers is updated
        cut_weights = [cut for plan in self._plans for cut in plan.cut_weights]
        exchanges = self._exchanges([*cut_weights, *(weight for weight in candidates if weight.shard.borders)])
        self._step_without_projection(self._ranges_between(tensors, candidates))
        # Apply
        for weights, exchange in exchanges:
            for cut, sums in zip(weights, exchange.results(), strict=True):
                if isinstance(cut, Weight):
                    self._apply_sums(cut, sums)
                else:
                    cut.sums().copy_(sums)
        for plan in self._plans:
            plan.apply()

    # ------------------------------------------------------------------ resolve

    def _places_outside_plans(self) -> list[Place]:
        """Brings the plans up to date, and returns what is not in them."""
        params = [param for group in self.param_groups for param in group["params"]]
        is_known = len(params) == len(self._planned_params) and all(map(operator.is_, params, self._planned_params))
        if not (is_known and self._plans and self._plans_are_current()):
            self._make_plans()
            self._planned_params = params if self._plans else []
        return self._outside

    def _plans_are_current(self) -> bool:
        return (
            all(plan.fits(self.param_groups) and plan.watch.is_current(self.state) for plan in self._plans)
            and not any(self._is_planned(place) for place in self._outside)
        )  # fmt: skip

    def _is_planned(self, place: Place) -> bool:
        param, group, _ = place
        kernels = self.CPU_KERNELS if param.device.type == "cpu" else plans
        if param.device.type in plans.DEVICE_TYPES:  # A CPU too, in Triton's interpreter
            kernels = plans
        if kernels is None or not kernels.takes(param, group, self.state.get(param, {}), self.MOMENTS):
            return False
        shards = self._shards(place)
        if any(isinstance(shard, RowPieces) for shard in shards):
            return False
        return kernels is plans or cpu.takes_shards(group, shards)

    def _shards(self, place: Place) -> list[Shard]:
        """The weights in a tensor, those whose heads are scale-invariant with heads for rows."""
        param, group, number = place
        shards = self._layouts.read(param, number, group)
        return [view_by_heads(shard, group) for shard in shards] if group["projection"] else shards

    def _make_plans(self) -> None:
        by_device: dict[torch.device, list[LocalTensor]] = {}
        self._outside = []
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                place = Place(param, group, index)
                if not self._is_planned(place):
                    self._outside.append(place)
                    continue
                shards = self._shards(place)
                check_param(type(self).__name__, param)
                local = self._local_tensor(param, group, shards, flatten=True)
                by_device.setdefault(local.flat.device, []).append(local)
        self._plans = []
        for device, tensors in by_device.items():
            states = [self.state[local.param] for local in tensors]
            plan_class = Plan if device.type in plans.DEVICE_TYPES else cpu.Plan
            self._plans.append(plan_class(tensors, states, self.param_groups, self.MOMENTS, self.projection_counts))
            self._plans[-1].watch.is_current(self.state)

    def _local_tensors(self, places: Sequence[Place]) -> tuple[list[LocalTensor], list[LocalTensor]]:
        """Tensors outside the plans at this step, and those of them that the single-tensor path takes."""
        found: list[LocalTensor] = []
        single: list[LocalTensor] = []
        for place in places:
            param, group, _ = place
            shards = self._shards(place)
            if param.grad is None:
                if any(shard.borders for shard in shards):  # The other processes wait for this one
                    found.append(LocalTensor(param, group, shards, memory(param), None, (), 0))
                continue
            check_param(type(self).__name__, param)
            is_single = len(shards) == 1 and not shards[0].borders and self._is_single(param, group)
            if group["differentiable"] and not is_single:
                raise RuntimeError(f"{type(self).__name__}: `differentiable` does not work on shards.")
            local = self._local_tensor(param, group, shards, not is_single)
            if "step" in self.state[param]:
                self.state[param]["step"] += 1
                local.step = self.state[param]["step"]
            (single if is_single else found).append(local)
        return found, single

    def _is_single(self, param: torch.Tensor, group: dict[str, Any]) -> bool:
        if group["capturable"]:
            if not is_flat(param):
                raise RuntimeError(
                    f"{type(self).__name__}: `capturable` needs weights whose rows follow each other in memory, got "
                    f"shape {tuple(param.shape)} with strides {param.stride()}. Make it contiguous."
                )
            return False
        if group["differentiable"] or (group["foreach"] is False and group["fused"] is False):
            return True
        tensors = (param, param.grad, *(self.state.get(param, {}).get(name) for name in self.MOMENTS))
        if not all(is_plain(local_tensor(tensor)) for tensor in tensors if tensor is not None):
            return True
        return self._has_low_precision_state(param, group) or not is_flat(param)

    def _has_low_precision_state(self, param: torch.Tensor, group: dict[str, Any]) -> bool:
        """Whether the arithmetic is that of the parameter's own half precision, as the official package's is."""
        dtype = group["state_dtype"] or param.dtype
        return dtype not in (torch.float32, torch.float64) and not group["stochastic_rounding"]

    def _local_tensor(
        self, param: torch.Tensor, group: dict[str, Any], shards: list[Shard], flatten: bool
    ) -> LocalTensor:
        state, grad = self.state[param], param.grad
        assert grad is not None
        self._initialise(state, param, group)
        for name in self.MOMENTS:
            check_state(type(self).__name__, param, state[name])
            if flatten and not has_order_of(state[name], param):
                state[name] = torch.empty_like(param, dtype=state[name].dtype).copy_(state[name])
        moments = [local_part(state[name]) for name in self.MOMENTS]
        flat, grad = local_part(param), local_part(grad)
        if flatten:
            if not has_order_of(grad, flat):
                grad = torch.empty_like(flat, dtype=grad.dtype).copy_(grad)
            flat, grad = memory(flat), memory(grad)
            moments = [memory(moment) for moment in moments]
        return LocalTensor(param, group, shards, flat, grad, tuple(moments), state.get("step", 0))

    def _weights(self, tensors: Iterable[LocalTensor]) -> Iterable[Weight]:
        """The weights whose update may be projected."""
        for local in tensors:
            for shard in local.shards:
                projection = self._level_of(local.group, shard.name)
                if len(shard.shape) < 2 or shard.whole_numel == 0 or projection == "none":
                    continue
                if shard.borders or (shard.numel and local.grad is not None):
                    weight = self.WEIGHT(local, shard, None if projection == "test" else projection)
                    if weight.numel and self.CPU_KERNELS is not None and local.flat.device.type == "cpu":
                        weight.kernels = self.CPU_KERNELS if self.CPU_KERNELS.is_usable(local) else None
                    yield weight

    def _level_of(self, group: dict[str, Any], name: str | None) -> str:
        """Level at which a weight of some name is known to be scale-invariant, `"test"` or `"none"`."""
        return level_of(group, name)

    # ------------------------------------------------------------------ measure

    def _prepare_measuring(self, weights: Sequence[Weight]) -> None:
        """What must be known of the weights before their moments are updated."""
        return

    def _candidates(self, weights: Sequence[Weight]) -> list[Weight]:
        """The weights that may pass at some level, found with one read of the host."""
        tested = [
            weight
            for weight in weights
            if weight.level is None
            and not weight.local.group["capturable"]
            and not weight.kernels  # They test while they measure
        ]
        answers = read_answers([answer for weight in tested for answer in self._quick_test(weight)])
        failed = set()
        for weight, row_pass, whole_passes in zip(tested, answers[::2], answers[1::2], strict=True):
            weight.by_rows = row_pass
            if not (row_pass or whole_passes or weight.shard.borders):
                self.projection_counts.add(weight.key)
                failed.add(id(weight))
            elif not (row_pass or weight.shard.borders):
                weight.level = "layer"
        return [weight for weight in weights if id(weight) not in failed]

    def _quick_test(self, weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether the first rows pass at the channel level, and the whole weight at the layer level, if it is here."""
        yes = self._constant(True, torch.bool, weight.local.flat.device)
        alive = weight.probe()
        if weight.shard.borders:
            return yes if alive is None else alive, yes
        group = weight.local.group
        dots = layer_dots(weight)
        eps, limit = group["eps"], threshold(group["delta"], weight.numel)
        weight.squared_norm = dots[2]
        norms = dots[1:].sqrt().clamp_(min=eps)
        return yes if alive is None else alive, dots[0].abs() < norms[0] * norms[1] * limit

    def _measure(self, weight: Weight) -> None:
        """First pass: the moments, and the dot products of gradient, weight and update."""
        if weight.kernels is None:
            self._measure_in_blocks(weight)
            return
        kernels, is_tested = weight.kernels, weight.level is None and not weight.shard.borders
        # Most weights are not projected: they are tested first, and take AdamW's step at once
        if is_tested and weight.key not in self._projected and kernels.test(weight) is None:
            kernels.step(weight)
            weight.is_done = True
            return
        kernels.measure(weight)

    def _measure_in_blocks(self, weight: Weight) -> None:
        weight.allocate_dots()
        if not weight.numel:
            return
        local = weight.local
        keep = weight.numel <= MAX_KEPT_UPDATE and not weight.shard.borders
        kept = self._scratch_tensor(weight.numel if keep else min(weight.numel, local.block_size), local)
        parts = []
        for block in weight.blocks():
            first = block.start - weight.shard.start if keep else 0
            displacement = kept[first : first + block.stop - block.start]
            self._displace(block, displacement)
            if weight.has_few_dots:
                parts.append(torch.dot(displacement, block.flat.to(displacement.dtype)))
            else:
                weight.add_dots(block, displacement)
        if parts:
            weight.add_layer_dots(parts)
        weight.displacement = kept if keep else None

    # ------------------------------------------------------------------ exchange and apply

    def _exchanges(self, weights: Sequence[Weight | CutWeight]) -> list[tuple[list[Weight | CutWeight], Exchange]]:
        """Starts one all-reduce for each process group among cut weights, in the same order on each process."""
        params = (param for group in self.param_groups for param in group["params"]) if self._plans and weights else ()
        order = {id(param): place for place, param in enumerate(params)}
        by_group: dict[tuple[int, ...], list[Weight | CutWeight]] = {}
        for weight in sorted(weights, key=lambda weight: order.get(id(weight.param), 0)):
            by_group.setdefault(exchange_key(weight.shard.process_group), []).append(weight)
        exchanges = []
        for members in by_group.values():
            members = plans.side_by_side(members) if self._plans else members
            exchanges.append(
                (members, Exchange([weight.sums() for weight in members], members[0].shard.process_group))
            )
        return exchanges

    def _apply_whole(self, weight: Weight) -> None:
        """Second pass over a weight that is wholly here."""
        if weight.is_done:
            self.projection_counts.add(weight.key)
            return
        if weight.level is None and weight.kernels:
            weight.level = weight.kernels.find_level(weight)
            if weight.level is None:
                self._projected.discard(weight.key)
                self.projection_counts.add(weight.key)
                weight.kernels.apply(weight, self._keep(weight.local, 1.0), torch.zeros(1))
                return
            self._projected.add(weight.key)
        self._apply_sums(weight, weight.sums())
        weight.displacement = None

    def _apply_sums(self, weight: Weight, sums: torch.Tensor) -> None:
        """Second pass with what [`Weight.sums`] adds up to over processes."""
        self._apply(weight, *weight.choose(*weight.split_sums(sums)))

    def _apply(self, weight: Weight, coefficient: torch.Tensor, channel: torch.Tensor, layer: torch.Tensor) -> None:
        """Second pass: weight decay and the projected update."""
        self.projection_counts.add(weight.key, channel, layer)
        if not weight.numel:
            return
        local, group = weight.local, weight.local.group
        like = weight.dots.new_empty(())
        keep = [self._keep(local, ratio) for ratio in (group["wd_ratio"], 1.0)]
        keep = [torch.full_like(like, share) if isinstance(share, float) else share for share in keep]
        scale = torch.where(channel | layer, keep[0], keep[1])
        if weight.kernels is None:
            self._apply_in_blocks(weight, scale, coefficient)
        else:
            weight.kernels.apply(weight, scale, coefficient)

    def _apply_in_blocks(self, weight: Weight, scale: torch.Tensor, coefficient: torch.Tensor) -> None:
        """Scales a weight and adds its projected displacement, with one coefficient or one for each row."""
        local, scratch = weight.local, weight.displacement
        if scratch is None:
            scratch = self._scratch_tensor(min(weight.numel, local.block_size), local)
        for block in weight.blocks():
            size = block.stop - block.start
            if weight.displacement is None:
                displacement = scratch[:size]
                self._displace_again(block, displacement)
            else:
                first = block.start - weight.shard.start
                displacement = scratch[first : first + size]
            rows = slice(block.row, block.row + block.num_rows) if coefficient.numel() > 1 else slice(None)
            self._project(block, displacement, coefficient[rows])
            self._add(block, displacement, scale)

    def _project(self, block: Block, displacement: torch.Tensor, coefficient: torch.Tensor) -> None:
        """Takes the radial part out of a block's displacement, and of its moments where the method does."""
        shape = (coefficient.numel(), -1)
        weight, per_row = block.flat.to(displacement.dtype).view(shape), coefficient.unsqueeze(1)
        displacement.view(shape).addcmul_(weight, per_row)
        self._project_moments(block, weight, per_row)

    def _add(self, block: Block, displacement: torch.Tensor, scale: torch.Tensor | float) -> None:
        """Scales a block and adds the displacement times the learning rate."""
        group = block.local.group
        lr, flat = self._plain_lr(group), block.flat
        value = flat if flat.dtype == displacement.dtype else flat.to(displacement.dtype)
        if isinstance(scale, torch.Tensor) or scale != 1:
            value.mul_(scale)
        if isinstance(lr, torch.Tensor):
            value.add_(displacement.mul_(lr))
        else:
            value.add_(displacement, alpha=lr)
        if value is not flat:
            copy_rounded_(flat, value, group["stochastic_rounding"], self._noise.on(flat.device))

    def _keep(self, local: LocalTensor, ratio: float) -> Any:
        """The share of a weight that weight decay leaves."""
        return 1 - self._decay(local.group) * ratio

    def _ranges_between(
        self, tensors: Sequence[LocalTensor], candidates: Sequence[Weight]
    ) -> list[tuple[LocalTensor, int, int]]:
        """What no candidate covers: weights that don't pass, biases and padding."""
        taken: dict[int, list[tuple[int, int]]] = {}
        for weight in candidates:
            if weight.numel:
                taken.setdefault(id(weight.local), []).append((weight.shard.start, weight.shard.start + weight.numel))
        ranges = []
        for local in tensors:
            if local.grad is None:
                continue
            holes = [*sorted(taken.get(id(local), [])), (local.flat.numel(), local.flat.numel())]
            position = 0
            for start, stop in holes:
                if start > position:
                    ranges.append((local, position, start))
                position = stop
        return ranges

    def _step_without_projection(self, ranges: Sequence[tuple[LocalTensor, int, int]]) -> None:
        rest = self._step_in_stock_kernels(ranges)
        for local, start, stop in rest:
            scale = self._keep(local, 1.0)
            scratch = self._scratch_tensor(min(stop - start, local.block_size), local)
            for block in plain_blocks(local, start, stop):
                displacement = scratch[: block.stop - block.start]
                self._displace(block, displacement)
                self._add(block, displacement, scale)

    def _single_tensor_steps(self, tensors: Sequence[LocalTensor]) -> None:
        """The reference. Half precision is tested for all tensors together, so that the host is read once."""
        levels: dict[int, str | None] = {}
        tested: list[tuple[LocalTensor, str, torch.Tensor]] = []
        for local in tensors:
            group = local.group
            name = local.shards[0].name if local.shards else None
            projection = self._level_of(group, name) if local.shards else "none"
            if projection != "test" or local.param.ndim < 2 or local.param.numel() == 0:
                levels[id(local)] = projection if projection in LEVELS and local.param.ndim > 1 else None
            elif is_plain(local.flat) and not (group["foreach"] is False and group["fused"] is False):
                assert local.grad is not None
                for level in LEVELS:
                    answer = is_scale_invariant(local.flat, local.grad, level, group["delta"], group["eps"])
                    tested.append((local, level, answer))
        answers = read_answers([answer for _, _, answer in tested])
        for (local, level, _), passing in zip(tested, answers, strict=True):
            if levels.get(id(local)) is None:
                levels[id(local)] = level if passing else None
        for local in tensors:
            hit = self._single_tensor(by_heads(local), levels.get(id(local), "test"))
            if local.param.ndim > 1 and local.shards:
                key = (local.group[GROUP_KEY], local.shards[0].index)
                self.projection_counts.add_known(key, hit)

    def _scratch_tensor(self, numel: int, local: LocalTensor) -> torch.Tensor:
        scratch = self._scratch if local.flat.device.type == "cpu" else self._own_scratch
        return scratch.take(numel, local.compute_dtype, local.flat.device)

    def _constant(self, value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key = (value, dtype, device)
        if key not in self._constants:
            self._constants[key] = torch.full((), value, dtype=dtype, device=device)
        return self._constants[key]

    # ------------------------------------------------------------------ what a subclass fills in

    def _initialise(self, state: dict[str, Any], param: torch.Tensor, group: dict[str, Any]) -> None:
        """Creates a parameter's state where it is missing."""
        for name in self.MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=group["state_dtype"], memory_format=torch.preserve_format)

    def _plain_lr(self, group: dict[str, Any]) -> Any:
        """Learning rate of what is not projected."""
        return group["lr"]

    def _decay(self, group: dict[str, Any]) -> Any:
        """What weight decay takes off a weight, as a share of it."""
        raise NotImplementedError

    def _displace(self, block: Block, out: torch.Tensor) -> None:
        """Updates a block's moments and writes minus the update, to be scaled by the learning rate."""
        raise NotImplementedError

    def _displace_again(self, block: Block, out: torch.Tensor) -> None:
        """Writes what [`_displace`] wrote, from moments that are already updated."""
        raise NotImplementedError

    def _project_moments(self, block: Block, weight: torch.Tensor, coefficient: torch.Tensor) -> None:
        """Projects the stored moments, where the method does. Weight `(R, C)`, coefficient `(R, 1)`."""
        return

    def _step_in_stock_kernels(
        self, ranges: Sequence[tuple[LocalTensor, int, int]]
    ) -> Sequence[tuple[LocalTensor, int, int]]:
        """Updates what torch's fused kernels can, and returns the rest."""
        return ranges

    def _single_tensor(self, local: LocalTensor, level: str | None) -> str | None:
        """The reference on one tensor, at a given level, or `"test"`. Returns the level that was projected at."""
        raise NotImplementedError
