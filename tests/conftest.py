import gc
import logging
import os
import random
import sys

import numpy as np
import pytest
import torch
from torch.nn.modules import module as modules

from tests.helpers.accelerate_state import accelerate_state_kept


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("MPLBACKEND", "Agg")

# Set where OpenMP, DeepSpeed and torch's compiler are first loaded, and by pytest in each phase of a test
OTHERS_VARIABLES = ("KMP_", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_", "PYTEST_")

# Files that take more than a few seconds, which `make quick` leaves out
SLOW = (
    "constrained_ppo/test_bandits.py",
    "constrained_ppo/test_constrained_grpo.py",
    "constrained_ppo/test_constrained_ppo_trainer.py",
    "constrained_ppo/test_constraints.py",
    "constrained_ppo/test_critic.py",
    "constrained_ppo/test_dashboard.py",
    "constrained_ppo/test_ensemble.py",
    "constrained_ppo/test_faults.py",
    "constrained_ppo/test_noisy_search.py",
    "constrained_ppo/test_other_means.py",
    "constrained_ppo/test_pretrained_critic.py",
    "constrained_ppo/test_proxy_points.py",
    "constrained_ppo/test_resume.py",
    "constrained_ppo/test_sweep.py",
    "constrained_ppo/test_threshold_search_training.py",
    "constrained_ppo/test_training_control.py",
    "constrained_ppo/test_updates.py",
    "contract/test_parents.py",
    "core/test_checkpointing.py",
    "core/test_dataset_rows.py",
    "core/test_fields.py",
    "core/test_moved.py",
    "core/test_reporters.py",
    "core/test_safe_text.py",
    "equilibrium/test_export.py",
    "equilibrium/test_adapters.py",
    "equilibrium/test_gradient.py",
    "equilibrium/test_process.py",
    "equilibrium/test_training.py",
    "equilibrium/test_value_heads.py",
    "experiments/test_adamp.py",
    "experiments/test_equilibrium_critic.py",
    "experiments/test_equilibrium_minilm.py",
    "experiments/test_equilibrium_smollm2.py",
    "experiments/test_method_comparison.py",
    "experiments/test_smollm2.py",
    "experiments/test_sparse_po_smollm2.py",
    "faults/test_faults.py",
    "fuzz/test_fuzz.py",
    "gpu/test_dry.py",
    "optim/test_deepspeed_cases.py",
    "optim/test_install.py",
    "optim/test_kernels.py",
    "optim/test_compilation.py",
    "optim/test_memory.py",
    "optim/test_official.py",
    "optim/test_training.py",
    "optim/test_trl_scripts.py",
    "pipeline/test_pipeline.py",
    "recipes/test_recipes.py",
    "scripts/test_sample_pairs.py",
    "sparse_po/test_lm_head.py",
    "sparse_po/test_mask_kinds.py",
    "sparse_po/test_model_check.py",
    "sparse_po/test_model_families.py",
    "sparse_po/test_preference_data.py",
    "sparse_po/test_reference.py",
    "sparse_po/test_shared_prompts.py",
    "sparse_po/test_sparse_po_trainer.py",
    "sparse_po/test_wrong_input.py",
    "test_cli.py",
    "test_plan.py",
    "tests/test_notebooks.py",
)


def pytest_collection_finish():
    """A test file's own lines register nothing: the first test of a worker would find it, and no other."""
    names = sys.modules.get("trl_ext.optim.names")
    if names is not None and names._added:
        raise pytest.UsageError("A test file registers optimizers when it is imported; register them in a test.")
    # What the libraries made when they were imported stays; walking it at each collection took a part of every test
    gc.freeze()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.as_posix().endswith(SLOW):
            item.add_marker("slow")


def seed_everything():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def process_state():
    """What tests of one process share, and none of them may leave changed."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    hooks = (name for name in vars(modules) if name.startswith("_global_") and "registration" not in name)
    return {
        **{f"${name}": value for name, value in os.environ.items() if not name.startswith(OTHERS_VARIABLES)},
        "working directory": os.getcwd(),
        "sys.argv": list(sys.argv),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "process group": torch.distributed.is_initialized(),
        "hooks of every module": {name: len(getattr(modules, name) or ()) for name in hooks},
        "log levels": (logging.root.level, logging.root.manager.disable),
        "open figures": pyplot.get_fignums() if pyplot else [],
    }


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """A fixture that several tests share draws the same numbers whichever of them comes first."""
    if fixturedef.scope != "function":
        seed_everything()


@pytest.fixture(autouse=True)
def _same_process_for_every_test():
    """Every test draws the same random numbers, whatever ran before it, and leaves the process as it found it."""
    seed_everything()
    before = process_state()
    with accelerate_state_kept():
        yield
    if "trl_ext.optim" in sys.modules:  # configurations of ours register names of optimizers for the whole process
        from trl_ext.optim import unregister

        unregister()
    after = process_state()
    names = [*before, *(name for name in after if name not in before)]
    changed = {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}
    assert not changed, f"The test left the process changed, as (before, after): {changed}"


@pytest.fixture
def variables_taken_back():
    """For tests of a program that sets environment variables for itself and its children."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
