"""The training step of the official code of equilibrium propagation without weight symmetry, from a checkout of it.

https://github.com/Laborieux-Axel/generalized-holo-ep at 8c27831, with jax 0.10.2, flax 0.12.8 and optax 0.2.8. Its
`models/utils.py` does not parse, so the optimizer and the state of the training are set up here as they are there. Its
network, dynamics and training step (`models/vfs.py`, `models/dyn.py`, `utils/funcs.py`) are imported unchanged, after
three names have been supplied that they import and that the step does not use:
- `jax.device_put_replicated`, which jax no longer has;
- `dalify` and `ff_exc_fb_inh` of `utils/funcs.py`, which are defined nowhere.
"""

import functools
import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch


FREE_STEPS, NUDGED_STEPS, NUM_POINTS, RADIUS = 150, 20, 2, 0.05
LEARNING_RATE, MOMENTUM = 0.01, 0.9
PATHS = {
    "input_weight": ("in-l1", "kernel"),
    "input_bias": ("in-l1", "bias"),
    "forward_weight_1": ("l1-l2", "kernel"),
    "backward_weight_1": ("l2-l1", "kernel"),
    "bias_2": ("l1-l2", "bias"),
    "forward_weight_2": ("l2-out", "kernel"),
    "backward_weight_2": ("out-l2", "kernel"),
    "bias_3": ("l2-out", "bias"),
    "readout_weight": ("readout", "Dense_0", "kernel"),
    "readout_bias": ("readout", "Dense_0", "bias"),
}
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class OfficialCode:
    """
    The official perceptron, 784-256-256-10 with sigmoid units, cross-entropy and a linear read-out.

    Args:
        directory (`Path`):
            Checkout of the official code.
        jacobian_metric (`bool`, *optional*, defaults to `True`):
            Whether a step measures the symmetry of the Jacobian of ten samples, as the official step does.
    """

    def __init__(self, directory: Path, jacobian_metric: bool = True):
        dynamics, fields, self.functions = import_official(directory)
        architecture = json.loads((directory / "arch" / "mlp_2-256.json").read_text())
        shapes = {name: tuple(shape) for name, shape in architecture["shapes"].items()}
        field = fields.mlp_discrete_vf(
            shapes=shapes,
            sizes={name: math.prod(shape) for name, shape in shapes.items()},
            connections=architecture["connections"],
            loss="xent",
            act=self.functions.get_activation("sigmoid"),
        )
        self.model = dynamics.DiscreteDynamics(vf=field, seed=0, jac_safe=jacobian_metric)
        self.jax, self.optax = importlib.import_module("jax"), importlib.import_module("optax")
        # One for all states, or each would compile the step again
        self.optimizer = self.optax.chain(self.optax.add_decayed_weights(0.0), self.optax.sgd(LEARNING_RATE, MOMENTUM))

    def initial_weights(self, angle: float) -> dict[str, torch.Tensor]:
        """Its fresh weights, the feedback at an angle in degrees, under the names of an asymmetric `EPHead`."""
        freeze = importlib.import_module("flax.core.frozen_dict").freeze
        parameters = self.model.init_params(self.jax.numpy.ones((1, 784)), self.jax.numpy.zeros((1, 10)))
        return as_head_parameters(self.functions.rotate(freeze(parameters), alpha=angle))

    def initial_state(self, weights: dict[str, torch.Tensor]) -> Any:
        """State of the training before the first step, from the weights of an asymmetric `EPHead`."""
        layers: dict[str, Any] = {}
        for name, (*path, leaf) in PATHS.items():
            node = functools.reduce(lambda node, key: node.setdefault(key, {}), path, layers)
            node[leaf] = self.jax.numpy.array(weights[name].numpy().T)
        return train_state_class().create(
            apply_fn=self.model.fwd,
            params={"params": layers},
            tx=self.optimizer,
            last_steady=None,
            key=self.jax.random.PRNGKey(0),
        )

    def step(self, state: Any, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
        """A call that makes one training step from `state` and returns the next state and the metrics."""
        one_hot = torch.nn.functional.one_hot(labels, 10).float()
        batch = tuple(self.jax.numpy.asarray(tensor.numpy()) for tensor in (images, one_hot))
        counts = (FREE_STEPS, NUDGED_STEPS, NUM_POINTS)
        return lambda: self.jax.block_until_ready(self.model.batch_train_step(state, batch, counts, RADIUS, "hep_vf"))

    def gradient(self, next_state: Any) -> dict[str, torch.Tensor]:
        """Gradient of the first step, which is what the momentum then holds, under the names of `EPHead`."""
        return as_head_parameters(self.optax.tree_utils.tree_get(next_state.opt_state, "trace"))


@functools.cache
def import_official(directory: Path) -> tuple[Any, Any, Any]:
    """The modules `models.dyn`, `models.vfs` and `utils.funcs` of a checkout, on one thread."""
    # Read by XLA when it starts: the flags bound its matrix products, and NPROC the pool that runs its operations
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
    os.environ.setdefault("NPROC", "1")
    jax: Any = importlib.import_module("jax")
    if not hasattr(jax, "device_put_replicated"):
        jax.device_put_replicated = None
    sys.path.insert(0, str(directory))
    functions: Any = importlib.import_module("utils.funcs")
    functions.dalify = functions.ff_exc_fb_inh = None
    return importlib.import_module("models.dyn"), importlib.import_module("models.vfs"), functions


@functools.cache
def train_state_class() -> Any:
    """Flax's state of a training with the two fields that the official step reads and writes."""
    base: Any = importlib.import_module("flax.training.train_state").TrainState
    return type("TrainState", (base,), {"__annotations__": {"last_steady": Any, "key": Any}})


def as_head_parameters(tree: Any) -> dict[str, torch.Tensor]:
    """Parameters or gradients of the official perceptron under the names of an asymmetric `EPHead`."""
    leaves = {
        name: functools.reduce(lambda node, key: node[key], path, tree["params"]) for name, path in PATHS.items()
    }
    return {name: torch.from_numpy(numpy.array(leaf.T)) for name, leaf in leaves.items()}
