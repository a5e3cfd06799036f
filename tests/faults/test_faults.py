"""The short form of `make faults`: a kill, a damaged file, a full disk and a second run."""

import tempfile
from pathlib import Path

import pytest

from tests.helpers.launching import fork_server


pytestmark = pytest.mark.distributed
HARNESS = str(Path(__file__).with_name("__main__.py"))
SHORT = ["--commands", "sparse-po", "--chains", "1", "--kills", "1", "--files", "1", "--disks", "1"]


def test_no_fault_changes_a_result_or_ends_in_a_traceback():
    with tempfile.TemporaryDirectory() as folder:
        faults = ["--faults", "kill", "damage", "disk", "two"]
        status, printed, errors = fork_server().run([HARNESS, *SHORT, *faults], [{}], folder)
    # 1 where a fault came to anything but the same result or a clear refusal, or where none was tried
    assert status == 0, printed + errors[-4000:]
