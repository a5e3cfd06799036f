"""How the processes of a run end together."""

from types import SimpleNamespace
from unittest import mock

import pytest

from trl_ext.core import agreement
from trl_ext.scripts.recipe import loading


@pytest.mark.parametrize(("processes", "expected"), [(1, ["ended"]), (2, ["ended", "slept"])])
def test_threads_of_a_group_get_the_interpreter_before_the_model_goes(processes, expected, monkeypatch):
    done = []
    monkeypatch.setattr(agreement.time, "sleep", lambda seconds: done.append("slept") if seconds > 0 else None)
    accelerator = SimpleNamespace(num_processes=processes, end_training=lambda: done.append("ended"))
    agreement.end_processes(SimpleNamespace(accelerator=accelerator))
    assert done == expected


def test_a_command_ends_them_when_all_is_saved(monkeypatch):
    done = []
    trainer = mock.MagicMock()
    trainer.args.push_to_hub = False
    trainer.save_state.side_effect = lambda: done.append("saved")
    monkeypatch.setattr(loading, "end_processes", lambda ended: done.append(ended))
    loading.train_and_save(trainer, None, "Model", "data")
    assert done == ["saved", trainer]
