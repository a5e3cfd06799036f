"""How the processes of a run end together."""

from types import SimpleNamespace

import pytest

from trl_ext.core import agreement


@pytest.mark.parametrize(("processes", "expected"), [(1, ["ended"]), (2, ["ended", "slept"])])
def test_threads_of_a_group_get_the_interpreter_before_the_model_goes(processes, expected, monkeypatch):
    done = []
    monkeypatch.setattr(agreement.time, "sleep", lambda seconds: done.append("slept") if seconds > 0 else None)
    accelerator = SimpleNamespace(num_processes=processes, end_training=lambda: done.append("ended"))
    agreement.end_processes(SimpleNamespace(accelerator=accelerator))
    assert done == expected
