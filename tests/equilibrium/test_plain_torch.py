"""The page on the head in plain PyTorch, run as it stands in a process of its own; and the picture of a relaxation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trl_ext
from trl_ext import EPHead
from trl_ext.equilibrium.activations import ACTIVATIONS
from trl_ext.equilibrium.network import LayeredNetwork
from trl_ext.equilibrium.relaxation import free_relaxation, residual_curve


PAGE = Path(trl_ext.__file__).parents[1] / "docs" / "equilibrium_plain_torch.md"
CHECK = """
import sys
assert not {"transformers", "trl", "accelerate", "peft", "datasets"} & set(sys.modules)
"""


def test_the_page_runs_with_torch_alone(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join([blocks[0], CHECK, blocks[1]])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    first, metrics, cosines = done.stdout.splitlines()
    accuracy, angle = re.fullmatch(r"accuracy ([\d.]+), (\d+) degrees", first).groups()
    assert float(accuracy) > 0.95 and int(angle) < 25
    assert "ep/free_sweeps" in metrics and min(float(value) for value in re.findall(r"\d\.\d+", cosines)) > 0.9
    assert (tmp_path / "relaxation.png").read_bytes().startswith(b"\x89PNG")


def test_residuals_are_those_that_the_relaxation_stops_by():
    """The first two sweeps are plain, against a loop over rows; all are the relaxation's own."""
    torch.manual_seed(0)
    forward, backward = [torch.randn(3, 2).double() / 3], [torch.randn(2, 3).double() / 3]
    drive, bias = torch.randn(4, 2).double(), torch.randn(3).double()
    network = LayeredNetwork(forward, backward, ACTIVATIONS["tanh"])
    found = residual_curve(network, drive, [bias], 40)
    for row in range(4):
        second = torch.tanh(forward[0] @ torch.tanh(drive[row]) + bias)
        for sweep in range(2):
            new = torch.tanh(forward[0] @ torch.tanh(drive[row] + backward[0] @ second) + bias)
            assert found[sweep, row].item() == pytest.approx((new - second).abs().max().item(), abs=1e-12)
            second = new
    relaxation = free_relaxation(network, drive, [bias], tolerance=1e-6, max_steps=40)
    checked = found[1::2].cummin(dim=0).values  # a row that was found within the tolerance stays so
    first = int((checked.amax(dim=1) <= 1e-6).nonzero()[0])
    assert relaxation.sweeps == 2 * (first + 1) and 4 <= relaxation.sweeps < 40


def test_the_picture_says_which_rows_wait(tmp_path):
    head = EPHead(4, [8, 8], 1, feedback="asymmetric", feedback_angle=90.0, spectral_cap=None)
    figure = head.plot(torch.randn(2, 3, 4), tmp_path / "relaxation.png", num_sweeps=40)
    assert figure.axes[0].get_title(loc="left") == "0 of 6 rows above the tolerance after 40 sweeps"
    assert len(figure.axes[0].lines[1].get_xdata()) == 40 and (tmp_path / "relaxation.png").is_file()
    with torch.no_grad():
        head.forward_weight_1.copy_(-30 * torch.eye(8))
        head.backward_weight_1.copy_(30 * torch.eye(8))  # turns activities round: no fixed point is stable
    axes = head.plot(torch.randn(6, 4)).axes[0]
    assert axes.lines[1].get_ydata()[-1] > 0.1
    assert axes.get_title(loc="left") == "6 of 6 rows above the tolerance after 100 sweeps"
