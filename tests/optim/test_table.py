"""
The table of a step: C and Python agree on its columns (for Triton see plan_cases.py), and both plans make equal rows.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.optim import params_of
from trl_ext.optim import AdamP
from trl_ext.optim.kernels import compilation, plan, table
from trl_ext.optim.kernels.table import Column


HEADER = Path(compilation.__file__).with_name("table.h").read_text()


def fields(structure):
    """Names of a structure's fields in C."""
    (body,) = re.findall(r"typedef struct \{([^}]*)\} " + structure + ";", HEADER)
    body = re.sub(r"/\*.*?\*/", "", body)
    return re.findall(r"(\w+)\s*[,;]", body)


def test_an_item_in_c_has_the_columns_of_the_table():
    assert [name.upper() for name in fields("Item")] == [column.name for column in Column]
    assert list(Column) == list(range(len(Column)))


def test_a_group_in_c_has_the_options_of_the_table():
    options = {"lr": 1.5, "weight_decay": 2.5, "wd_ratio": 0.3, "eps": 1e-5, "delta": 0.7, "nesterov": True}
    group = AdamP(params_of((2, 2)), betas=(0.8, 0.95), maximize=True, **options).param_groups[0]
    expected = {
        **options, "beta1": 0.8, "rest1": 1 - 0.8, "beta2": 0.95, "rest2": 1 - 0.95, "sign": -1.0, "nesterov": 1.0,
        "log_beta1": np.log(0.8), "log_beta2": np.log(0.95), "projects_momentum": 0.0, "stochastic_rounding": 0.0,
        "unused": 0.0,
    }  # fmt: skip
    assert table.options_row(group) == pytest.approx([expected[name] for name in fields("Group")], rel=1e-15)
    assert len(expected) == table.NUM_OPTIONS


def test_levels_in_c_are_numbered_as_in_the_table():
    (names,) = re.findall(r"enum \{ (NONE[^}]*) \}", HEADER)
    assert {name.lower(): number for number, name in enumerate(names.split(", "))} == table.LEVELS


def test_both_plans_make_the_same_rows(monkeypatch):
    """On a CPU for C and, in its guise as a device, for Triton."""
    if compilation.compiled_library() is None:
        pytest.skip("no C compiler")
    params = params_of((6, 5), (4, 3, 2, 2), (3, 70))
    params[2].data, params[2].grad = params[2].data.bfloat16(), params[2].grad.bfloat16()
    optimizer = AdamP(params, state_dtype=torch.float32, projection="channel", weight_decay=0.1)
    optimizer.step()
    (in_c,) = optimizer._plans
    monkeypatch.setattr(plan, "DEVICE_TYPES", {"cpu"})
    tensors = [optimizer._local_tensor(param, optimizer.param_groups[0], optimizer._shards(place), True)
               for param, place in zip(params, _places(optimizer), strict=True)]  # fmt: skip
    states = [optimizer.state[param] for param in params]
    on_device = plan.Plan(tensors, states, optimizer.param_groups, AdamP.MOMENTS, optimizer.projection_counts)
    own = {Column.STEP, *range(Column.FIRST_CHUNK, Column.NUM_PARTS + 1), Column.NUM_ROWS, Column.ROW_VALUES,
           Column.SUMS, Column.WIDTH}  # fmt: skip
    shared = [column for column in Column if column not in own]
    assert np.array_equal(in_c._items[:, shared], on_device._items[:, shared])
    # Weights of one dtype follow each other
    assert in_c._items[:, Column.SIZE].tolist() == [210, 30, 48] and (in_c._items[:, Column.LEVEL] == 2).all()
    assert in_c._items[:, Column.DTYPE].tolist() == [1, 0, 0]
    assert in_c._items[:, Column.GRAD].tolist() == [params[place].grad.data_ptr() for place in (2, 0, 1)]


def _places(optimizer):
    from trl_ext.optim.step import Place

    group = optimizer.param_groups[0]
    return [Place(param, group, number) for number, param in enumerate(group["params"])]
