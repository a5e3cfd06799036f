"""What AdamP and SGDP share: the step, whole or sharded, around an update that a subclass takes."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .exchange import exchange_all
from .hyperparameters import check_hyperparameters, check_param, check_state
from .known_views import known_view
from .memory import has_order_of, is_flat, local_part, memory
from .projection import is_scale_invariant, threshold
from .report import ProjectionCounts, report
from .rounding import RoundingNoise, copy_rounded_
from .shards import Original, Shard, UnknownShardsError, read_shards
from .weight import Block, LocalTensor, Weight, layer_dots, plain_blocks


# Private key of a group; the index of a group is not stable, since wrappers drop and split groups
GROUP_KEY = "projection_group"
# Largest update kept between the pass that measures it and the one that applies it; larger ones are computed anew
MAX_KEPT_UPDATE = 2**26


class Layout(NamedTuple):
    """A tensor that was stepped on, where its weights lie in it, and its group."""

    reference: weakref.ref
    shards: list[Shard]
    group_key: int


class ProjectedOptimizer(torch.optim.Optimizer):
    """
    Base of [`AdamP`] and [`SGDP`]: torch.optim's conventions, shards, and the decision where to project.

    A step reads the host at most once, for all tensors together: weights that pass in no view, most of them, then go
    through one fused kernel. The others take two passes: their moments and dot products, and the projected update.
    Weights that shard borders cut always do, with one all-reduce of their dot products in between.
    """

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

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        check_hyperparameters(type(self).__name__, defaults)
        self._prepare()
        super().__init__(params, defaults)

    def _prepare(self) -> None:
        self._originals: dict[int, list[Original]] = {}
        self._layouts: dict[int, Layout] = {}
        self._scratch: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self._constants: dict[tuple[Any, ...], torch.Tensor] = {}
        self._step_tensors: dict[torch.device, tuple[int, torch.Tensor]] = {}
        self._noise = RoundingNoise()
        self.projection_counts = ProjectionCounts()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer` does, after a check of its options."""
        check_hyperparameters(type(self).__name__, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._remember(self.param_groups[-1], max(self._originals, default=-1) + 1)

    def _remember(self, group: dict[str, Any], key: int) -> None:
        group[GROUP_KEY] = key
        self._originals[key] = [Original.of(param) for param in group["params"]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_originals"):  # Unpickled
            self._prepare()
        for place, group in enumerate(self.param_groups):
            for option, value in self.OPTIONS.items():
                group.setdefault(option, value)
            if group.setdefault(GROUP_KEY, place) not in self._originals:
                self._remember(group, group[GROUP_KEY])
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
        Loads a state, also one that the official package saved. Running averages keep the dtype that `state_dtype`
        asks for.
        """
        keys = [group.get(GROUP_KEY) for group in self.param_groups]
        dtypes = [group.get("state_dtype") for group in self.param_groups]
        super().load_state_dict(state_dict)
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
        Takes one step.

        Args:
            closure (`Callable`, *optional*):
                Evaluates the model anew and returns the loss.

        Returns:
            The closure's loss, or `None`.

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
            steps that were projected in each view; `"weight_norm"`; and `"effective_step_size"`, the learning rate
            times the norm of the update's tangential part over the weight's norm: the angle, in radians, that a
            step at the current state turns the weight by.
        """
        with torch.no_grad():
            return report(self, self.projection_counts)

    def stepped_weights(self) -> list[Weight]:
        """The weights of at least two dimensions that steps were taken on, in the order of the first step."""
        groups = {group[GROUP_KEY]: group for group in self.param_groups}
        found = []
        for reference, shards, key in self._layouts.values():
            param = reference()
            if param is None or key not in groups:
                continue
            state = self.state.get(param, {})
            moments = [memory(state[name]) for name in self.MOMENTS if name in state]
            local = LocalTensor(param, groups[key], shards, memory(param), None, tuple(moments), state.get("step", 0))
            # Other processes may have stepped on a weight that this one holds nothing of
            shards = [shard for shard in shards if len(shard.shape) > 1 and (moments or not shard.numel)]
            found += [Weight(local, shard, by_rows=False) for shard in shards]
        return found

    # ------------------------------------------------------------------ one step

    def _take_step(self) -> None:
        locals_, single = self._local_tensors()
        self._single_tensor_steps(single)
        self._noise.restart(locals_)
        candidates = self._candidates(list(self._weights(locals_)))
        for weight in candidates:
            self._measure(weight)
            if not weight.shard.borders:
                self._finish(weight)
        exchanges = exchange_all([weight for weight in candidates if weight.shard.borders])
        self._plain(self._plain_ranges(locals_, candidates))
        for exchange in exchanges:
            for weight, *dots in exchange.results():
                self._apply(weight, *weight.choose(*dots))

    def _local_tensors(self) -> tuple[list[LocalTensor], list[LocalTensor]]:
        """The groups' tensors, and those of them that the single-tensor path takes."""
        found: list[LocalTensor] = []
        single: list[LocalTensor] = []
        for group in self.param_groups:
            for place, param in enumerate(group["params"]):
                shards = self._shards(param, place, group)
                if param.grad is None:
                    if any(shard.borders for shard in shards):  # The other processes wait for this one
                        found.append(LocalTensor(param, group, shards, memory(param), None, (), 0))
                    continue
                check_param(type(self).__name__, param)
                is_single = len(shards) == 1 and not shards[0].borders and self._is_single(param, group)
                if group["differentiable"] and not is_single:
                    raise RuntimeError(f"{type(self).__name__}: `differentiable` does not work on shards.")
                (single if is_single else found).append(self._local_tensor(param, group, shards, not is_single))
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

    def update_of(self, block: Block) -> torch.Tensor:
        """Minus the update that the present moments stand for, before projection and learning rate."""
        out = torch.empty_like(block.flat, dtype=block.local.compute_dtype)
        self._displace_again(block, out)
        return out

    def _shards(self, param: torch.Tensor, place: int, group: dict[str, Any]) -> list[Shard]:
        """The tensor's layout, read at its first step."""
        known = self._layouts.get(id(param))
        if known is not None and known.reference() is param:
            return known.shards
        key = group[GROUP_KEY]
        try:
            shards = read_shards(param, place, len(group["params"]), self._originals[key])
        except UnknownShardsError:
            if group["on_unknown_shards"] == "raise":
                raise
            shards = []
        self._layouts = {name: layout for name, layout in self._layouts.items() if layout.reference() is not None}
        self._layouts[id(param)] = Layout(weakref.ref(param), shards, key)
        return shards

    def _weights(self, locals_: Iterable[LocalTensor]) -> Iterable[Weight]:
        """The weights whose update may be projected."""
        for local in locals_:
            for shard in local.shards:
                view = known_view(local.group, shard.index)
                if len(shard.shape) < 2 or shard.num_rows * shard.row_size == 0 or view == "none":
                    continue
                if shard.borders or (shard.numel and local.grad is not None):
                    yield Weight(local, shard, None if view == "test" else view)

    def _candidates(self, weights: Sequence[Weight]) -> list[Weight]:
        """The weights that may pass in some view, found with one read of the host."""
        tested = [weight for weight in weights if weight.view is None and not weight.local.group["capturable"]]
        found: list[torch.Tensor] = []
        for weight in tested:
            alive, passing = self._quick_test(weight)
            found += [alive, passing]
        answers = iter(_read(found))
        candidates = []
        for weight in weights:
            if weight.view is None and not weight.local.group["capturable"]:
                weight.by_rows, passes = next(answers), next(answers)
                if not (weight.by_rows or passes or weight.shard.borders):
                    self.projection_counts.add(weight)
                    continue
                if not (weight.by_rows or weight.shard.borders):
                    weight.view = "layer"
            candidates.append(weight)
        return candidates

    def _quick_test(self, weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether the first rows pass in the channel view, and the whole weight in the layer view, if it is here."""
        yes = self._constant(True, torch.bool, weight.local.flat.device)
        alive = weight.probe()
        if weight.shard.borders:
            return yes if alive is None else alive, yes
        dots, group = self._test_dots(weight), weight.local.group
        eps, limit = group["eps"], threshold(group["delta"], weight.numel)
        weight.squared_norm = dots[2]
        norms = dots[1:].sqrt().clamp_(min=eps)
        return yes if alive is None else alive, dots[0].abs() < norms[0] * norms[1] * limit

    def _test_dots(self, weight: Weight) -> torch.Tensor:
        """`<g, w>`, `<g, g>`, `<w, w>`, shape `(3,)`."""
        return layer_dots(weight)

    def _measure(self, weight: Weight) -> None:
        """First pass: the moments, and the dot products of gradient, weight and update."""
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
            if weight.view == "layer":
                parts.append(torch.dot(displacement, block.flat.to(displacement.dtype)))
            else:
                weight.add_dots(block, displacement)
        if parts:
            weight.add_layer_dots(parts)
        weight.displacement = kept if keep else None

    def _finish(self, weight: Weight) -> None:
        """Second pass over a weight that is wholly here."""
        self._apply(weight, *weight.choose(weight.totals(), weight.num_failing_rows(), weight.cut_row_dots()))
        weight.displacement = None

    def _apply(self, weight: Weight, coefficient: torch.Tensor, channel: torch.Tensor, layer: torch.Tensor) -> None:
        """Second pass: weight decay and the projected update."""
        self.projection_counts.add(weight, channel, layer)
        if not weight.numel:
            return
        local, group = weight.local, weight.local.group
        like = weight.dots.new_empty(())
        keep = [self._keep(local, ratio) for ratio in (group["wd_ratio"], 1.0)]
        keep = [torch.full_like(like, share) if isinstance(share, float) else share for share in keep]
        self._apply_blocks(weight, torch.where(channel | layer, keep[0], keep[1]), coefficient)

    def _apply_blocks(self, weight: Weight, scale: torch.Tensor, coefficient: torch.Tensor) -> None:
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
        lr, flat = group["lr"], block.flat
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

    def _plain_ranges(
        self, locals_: Sequence[LocalTensor], candidates: Sequence[Weight]
    ) -> list[tuple[LocalTensor, int, int]]:
        """What no candidate covers: weights that don't pass, biases and padding."""
        taken: dict[int, list[tuple[int, int]]] = {}
        for weight in candidates:
            if weight.numel:
                taken.setdefault(id(weight.local), []).append((weight.shard.start, weight.shard.start + weight.numel))
        ranges = []
        for local in locals_:
            if local.grad is None:
                continue
            holes = sorted(taken.get(id(local), [])) + [(local.flat.numel(), local.flat.numel())]
            position = 0
            for start, stop in holes:
                if start > position:
                    ranges.append((local, position, start))
                position = stop
        return ranges

    def _plain(self, ranges: Sequence[tuple[LocalTensor, int, int]]) -> None:
        """Updates ranges of tensors without projection."""
        rest = self._plain_in_one_kernel(ranges)
        for local, start, stop in rest:
            scale = self._keep(local, 1.0)
            scratch = self._scratch_tensor(min(stop - start, local.block_size), local)
            for block in plain_blocks(local, start, stop):
                displacement = scratch[: block.stop - block.start]
                self._displace(block, displacement)
                self._add(block, displacement, scale)

    def _single_tensor_steps(self, tensors: Sequence[LocalTensor]) -> None:
        """The reference. Half precision is tested for all tensors together, so that the host is read once."""
        views: dict[int, str | None] = {}
        tested: list[tuple[LocalTensor, str, torch.Tensor]] = []
        for local in tensors:
            known = known_view(local.group, local.shards[0].index if local.shards else 0)
            if known != "test" or local.param.ndim < 2 or local.param.numel() == 0:
                views[id(local)] = known if known in ("channel", "layer") and local.param.ndim > 1 else None
            elif not (local.group["foreach"] is False and local.group["fused"] is False):
                delta, eps = local.group["delta"], local.group["eps"]
                for view in ("channel", "layer"):
                    assert local.grad is not None
                    tested.append((local, view, is_scale_invariant(local.flat, local.grad, view, delta, eps)))
        answers = _read([answer for _, _, answer in tested])
        for (local, view, _), answer in zip(tested, answers, strict=True):
            if views.get(id(local)) is None:
                views[id(local)] = view if answer else None
        for local in tensors:
            hit = self._single_tensor(local, views.get(id(local), "test"))
            if local.param.ndim > 1 and local.shards:
                self.projection_counts.add_known(local, local.shards[0], hit)

    def _scratch_tensor(self, numel: int, local: LocalTensor) -> torch.Tensor:
        """Memory kept from step to step, since fresh memory is page-faulted on a CPU."""
        key = (local.flat.device, local.compute_dtype)
        if key not in self._scratch or self._scratch[key].numel() < numel:
            self._scratch[key] = torch.empty(numel, dtype=key[1], device=key[0])
        return self._scratch[key][:numel]

    def _constant(self, value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key = (value, dtype, device)
        if key not in self._constants:
            self._constants[key] = torch.full((), value, dtype=dtype, device=device)
        return self._constants[key]

    # ------------------------------------------------------------------ what a subclass fills in

    def _initialise(self, state: dict[str, Any], param: torch.Tensor, group: dict[str, Any]) -> None:
        """Creates a parameter's state where it is missing, and counts the step."""
        for name in self.MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=group["state_dtype"], memory_format=torch.preserve_format)

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
        return None

    def _plain_in_one_kernel(
        self, ranges: Sequence[tuple[LocalTensor, int, int]]
    ) -> Sequence[tuple[LocalTensor, int, int]]:
        """Updates what a stock kernel can, and returns the rest."""
        return ranges

    def _single_tensor(self, local: LocalTensor, view: str | None) -> str | None:
        """The reference on one tensor, in a given view, or `"test"`. Returns the view that was projected on."""
        raise NotImplementedError


def _read(answers: Sequence[torch.Tensor]) -> list[bool]:
    """Brings booleans of shape `()` to the host: once, or once for each device that has some."""
    found: dict[int, bool] = {}
    for device in {answer.device for answer in answers}:
        places = [place for place, answer in enumerate(answers) if answer.device == device]
        found |= zip(places, torch.stack([answers[place] for place in places]).tolist(), strict=True)
    return [found[place] for place in range(len(answers))]
