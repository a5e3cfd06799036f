"""The short form of `python -m tests.faults.two_hosts`: SparsePO under DDP, and one host that dies."""

import tempfile
from pathlib import Path

import pytest

from tests.faults.two_hosts import why_not
from tests.helpers.launching import fork_server


pytestmark = pytest.mark.distributed
HARNESS = str(Path(__file__).with_name("two_hosts.py"))


def test_two_hosts_train_as_one_process_and_one_that_dies_is_started_again():
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    options = ["--commands", "sparse-po", "--configs", "ddp", "--parts", "both", "dies"]
    with tempfile.TemporaryDirectory() as folder:
        status, printed, errors = fork_server().run([HARNESS, *options], [{}], folder)
    assert status == 0, printed + errors[-6000:]
    assert printed.count("sparse-po, ddp: ") == 3, printed
