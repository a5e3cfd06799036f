import copy
import inspect
import warnings

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.helpers.equilibrium_reference import network_of
from trl_ext import EPHead
from trl_ext.equilibrium.activations import ACTIVATIONS
from trl_ext.equilibrium.gradient import Estimator, error_vectors
from trl_ext.equilibrium.input_norm import update_statistics
from trl_ext.equilibrium.network import LayeredNetwork, contraction_bound
from trl_ext.equilibrium.relaxation import EquilibriumError


def make_head(**settings):
    torch.manual_seed(0)
    return EPHead(6, [12, 10], 2, **settings)


def backward(head, hidden):
    head.zero_grad()
    hidden.grad = None
    head(hidden).square().sum().backward()
    return {"hidden": hidden.grad.clone(), **{n: p.grad.clone() for n, p in head.named_parameters()}}


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_signature():
    parameters = inspect.signature(EPHead).parameters
    keywords = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert [name for name in parameters if name not in keywords] == ["in_features", "hidden_features", "out_features"]
    assert keywords == {
        "feedback": "symmetric", "feedback_angle": 0.0, "activation": "tanh", "estimator": "holomorphic",
        "num_points": 2, "rotated": True, "radius": 1e-3, "correction": "none", "tolerance": 1e-4, "max_steps": 100,
        "spectral_cap": "auto", "input_norm": "none", "on_oscillation": "raise",
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
def test_shapes(shape):
    head = make_head()
    assert head(torch.randn(*shape, 6)).shape == (*shape, 2)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "dsilu"])
def test_every_parameter_learns(activation):
    head = make_head(feedback="asymmetric", feedback_angle=45.0, activation=activation, spectral_cap=0.9)
    hidden, target = torch.randn(64, 6), torch.randn(64, 2)
    head.homeostasis_loss()
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-2)
    losses = []
    for _ in range(40):
        loss = (head(hidden) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert all(not torch.equal(before[name], parameter) for name, parameter in head.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_relax_in_float32(dtype):
    head = make_head(tolerance=1e-6)
    hidden = torch.randn(8, 6).to(dtype).requires_grad_()
    half = copy.deepcopy(head).to(dtype)
    output, gradients = half(hidden), backward(half, hidden)
    assert output.dtype == dtype and all(gradient.dtype == dtype for gradient in gradients.values())
    whole = copy.deepcopy(half).float()
    full_hidden = hidden.detach().float().requires_grad_()
    exact = backward(whole, full_hidden)
    # Nothing is lost but in rounding what comes in and out
    assert torch.equal(output, whole(full_hidden).to(dtype))
    resolution = torch.finfo(dtype).eps
    for name in exact:
        error = (gradients[name].float() - exact[name]).norm() / exact[name].norm()
        assert error < 4 * resolution, name
    # The state itself is held to the tolerance, far below what the dtype resolves
    assert half.statistics.free_residual <= 1e-6 and half.statistics.num_unconverged == 0


def test_autocast_changes_nothing_inside():
    head, hidden = make_head(), torch.randn(8, 6, requires_grad=True)
    plain = backward(head, hidden)
    hidden.grad = None
    head.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(hidden)
    assert output.dtype == torch.float32
    output.square().sum().backward()
    assert_same(plain, {"hidden": hidden.grad, **{n: p.grad for n, p in head.named_parameters()}}, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    head, hidden = make_head(spectral_cap=0.9), torch.randn(8, 6, requires_grad=True)
    plain = backward(head, hidden)
    head.zero_grad()
    hidden.grad = None
    checkpoint(head, hidden, use_reentrant=use_reentrant).square().sum().backward()
    assert_same(
        plain, {"hidden": hidden.grad, **{n: p.grad for n, p in head.named_parameters()}}, rtol=1e-5, atol=1e-6
    )


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        head = make_head(feedback="asymmetric", feedback_angle=20.0)
        hidden = torch.randn(8, 6, requires_grad=True)
        plain = backward(copy.deepcopy(head), hidden)
        parallel = torch.nn.parallel.DistributedDataParallel(head)
        hidden.grad = None
        # Raises if a parameter's hook was not called by the backward pass before
        for _ in range(2):
            parallel.zero_grad()
            hidden.grad = None
            parallel(hidden).square().sum().backward()
        assert_same(plain, {"hidden": hidden.grad, **{n: p.grad for n, p in head.named_parameters()}})
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_model_runs_the_head_eagerly():
    head, hidden = make_head(), torch.randn(8, 6, requires_grad=True)
    plain = backward(head, hidden)
    compiled = torch.compile(head, backend="eager")
    hidden.grad = None
    head.zero_grad()
    compiled(hidden).square().sum().backward()
    assert_same(plain, {"hidden": hidden.grad, **{n: p.grad for n, p in head.named_parameters()}})


def saved_bytes(head, hidden):
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = head(hidden).sum()
    loss.backward()
    return sum(sizes.values())


def test_memory_does_not_depend_on_the_number_of_steps():
    hidden = torch.randn(256, 6)
    few, many = make_head(max_steps=3, tolerance=1e-7), make_head(max_steps=90, tolerance=1e-7)
    with pytest.warns(UserWarning, match="did not converge"):
        small = saved_bytes(few, hidden)
    assert many(hidden) is not None and many.statistics.free_sweeps > 8 > few.statistics.free_sweeps
    assert saved_bytes(many, hidden) == small
    # One state, the input and the parameters
    parameters = sum(parameter.numel() for parameter in many.parameters())
    assert small <= 4 * (256 * (6 + 12 + 10) + parameters)


def test_second_derivative_is_refused():
    head, hidden = make_head(), torch.randn(8, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(head(hidden).square().sum(), hidden, create_graph=True)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="no second derivative.*gradient penalty"):
        gradient.square().sum().backward()


def test_overflowed_gradient_reaches_the_loss_scaler():
    head, hidden = make_head(), torch.randn(4, 6, requires_grad=True)
    for bad in (float("inf"), float("nan")):
        head.zero_grad()
        hidden.grad = None
        gradient = torch.ones(4, 2)
        gradient[1, 0] = bad
        head(hidden).backward(gradient)
        assert not head.forward_weight_1.grad.isfinite().any() and not hidden.grad[1].isfinite().any()
        assert hidden.grad[[0, 2, 3]].isfinite().all()


def test_frozen_parts_get_no_gradient():
    head, hidden = make_head(), torch.randn(4, 6)
    head.forward_weight_1.requires_grad_(False)
    head(hidden).sum().backward()
    assert head.forward_weight_1.grad is None and head.bias_2.grad.abs().sum() > 0
    head.requires_grad_(False)
    assert not head(hidden).requires_grad


def test_only_a_biased_gradient_for_the_backbone_is_warned_of():
    def run(hidden_needs_gradient, homeostasis=False, **settings):
        head = make_head(**settings)
        hidden = torch.randn(4, 6, requires_grad=hidden_needs_gradient)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                loss = head(hidden).sum()
                if homeostasis:
                    loss = loss + head.homeostasis_loss()
                loss.backward()
        return [str(warning.message) for warning in caught if "EPHead" in str(warning.message)]

    asymmetric = {"feedback": "asymmetric", "feedback_angle": 90.0}
    biased = run(True, **asymmetric)
    assert len(biased) == 1 and "biased by the asymmetry" in biased[0] and "asymep" in biased[0]
    assert run(False, **asymmetric) == []
    assert run(True, homeostasis=True, **asymmetric) == []
    assert run(True, correction="asymep", **asymmetric) == []
    assert run(True, estimator="exact", **asymmetric) == []
    assert run(True) == []


def test_statistics():
    head = make_head(tolerance=1e-5)
    assert set(head.metrics()) == {
        "ep/free_sweeps", "ep/free_residual", "ep/nudged_sweeps", "ep/nudged_residual", "ep/num_unconverged",
    }  # fmt: skip
    head(torch.randn(8, 6)).sum().backward()
    metrics = head.metrics()
    assert metrics["ep/free_sweeps"] >= 2 and metrics["ep/nudged_sweeps"] >= 2
    assert 0 < metrics["ep/free_residual"] <= 1e-5 and 0 < metrics["ep/nudged_residual"] <= 1e-5


def test_alignment():
    head = make_head(feedback="asymmetric", feedback_angle=60.0)
    hidden = torch.randn(2, 4, 6)
    biased = head.alignment(hidden)
    assert len(biased) == 2 and biased[0] < 0.95
    gradient = torch.zeros(2, 4, 2)
    gradient[0, 1, 0] = 3.0
    single = head.alignment(hidden[0, 1:2], gradient[0, 1:2])
    assert head.alignment(hidden, gradient) == pytest.approx(single, abs=1e-3)
    head.correction = "asymep"
    assert head.alignment(hidden) == pytest.approx([1.0, 1.0], abs=1e-5)


def test_weights_are_reproducible_and_saved():
    one, other = EPHead(6, [12, 10], 2), EPHead(6, [12, 10], 2)
    for head in (one, other):
        head.reset_parameters(torch.Generator().manual_seed(3))
    hidden = torch.randn(3, 6)
    assert torch.equal(one(hidden), other(hidden))
    fresh = EPHead(6, [12, 10], 2)
    fresh.load_state_dict(copy.deepcopy(one).state_dict())
    assert torch.equal(fresh(hidden), one(hidden))
    assert set(one.initial_parameters()) == set(one.state_dict())


WIDTHS = [[64, 64], [64, 256], [16, 512], [48, 16, 48], [32, 64, 16, 32], [32] * 5, [16, 24, 32, 24, 16, 8]]


@pytest.mark.parametrize("angle", [None, 30.0, 90.0])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_fresh_weights_contract_at_any_depth_width_and_angle(widths, angle):
    torch.manual_seed(0)
    feedback = {} if angle is None else {"feedback": "asymmetric", "feedback_angle": angle}
    head = EPHead(32, widths, 1, **feedback)
    network = network_of(head)
    bound = contraction_bound(len(widths), network.activation)
    norms = network.spectral_norms()
    assert head.cap() == pytest.approx(0.98 * bound) and max(norms) <= 0.95 * bound * (1 + 1e-5)
    for weight in network.forward_weights:  # no signal is lost in any direction
        assert torch.linalg.svdvals(weight).min() == pytest.approx(0.95 * bound, rel=1e-5)
    assert torch.linalg.matrix_norm(network.weight_matrix(), 2) < 1
    head(torch.randn(32, 32)).sum().backward()
    assert head.statistics.num_unconverged == 0 and head.statistics.free_sweeps < 60
    if angle is not None:
        assert head.asymmetry()["ep/weight_angle"] == pytest.approx(angle, abs=0.1)


def test_an_angle_that_a_single_number_cannot_have():
    EPHead(4, [1, 1], 1, feedback="asymmetric", feedback_angle=180.0)
    with pytest.raises(ValueError, match="`feedback_angle` is 90.0 between two layers of one unit"):
        EPHead(4, [1, 1], 1, feedback="asymmetric", feedback_angle=90.0)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_drawn_in_float32_under_any_default_dtype(default):
    torch.manual_seed(0)
    expected = EPHead(4, [6, 6], 1, feedback="asymmetric", feedback_angle=45.0).state_dict()
    torch.set_default_dtype(default)
    try:
        torch.manual_seed(0)
        head = EPHead(4, [6, 6], 1, feedback="asymmetric", feedback_angle=45.0)
    finally:
        torch.set_default_dtype(torch.float32)
    kept = torch.promote_types(default, torch.float32)
    for name, tensor in head.state_dict().items():
        assert tensor.dtype == kept and torch.equal(tensor.float(), expected[name])


def test_a_row_does_not_depend_on_the_others_of_its_batch():
    torch.manual_seed(0)
    head = EPHead(16, [32, 32, 32], 2, tolerance=1e-4).eval()
    # Strong inputs saturate and settle in few sweeps, weak ones take many
    hidden = torch.randn(256, 16) * torch.logspace(-1, 1.5, 256).unsqueeze(1)
    with torch.no_grad():
        alone, sweeps = [], set()
        for row in hidden[::8]:
            alone.append(head(row))
            sweeps.add(head.statistics.free_sweeps)
        together = head(hidden)
    assert min(sweeps) < head.statistics.free_sweeps / 2
    assert (together[::8] - torch.stack(alone)).abs().max() < 1e-6 < head.tolerance / 10


def rotating(strength, **settings):
    """A head of two layers of two units that turns around where both are unsaturated."""
    head = EPHead(1, [2, 2], 1, feedback="asymmetric", feedback_angle=180.0, spectral_cap=None, **settings)
    with torch.no_grad():
        head.forward_weight_1.copy_(strength * torch.eye(2))
        head.backward_weight_1.copy_(-strength * torch.eye(2))
        head.input_weight.fill_(1.0)
        head.bias_2.fill_(0.01)
    return head


@pytest.mark.parametrize("estimator", ["holomorphic", "tangent"])
def test_an_oscillating_row_warns_where_the_user_says_so(estimator):
    hidden = torch.tensor([[9.0], [0.1], [0.15]])
    with pytest.raises(RuntimeError, match="2 of 3 samples .* oscillate.*`on_oscillation='warn'`"):
        rotating(3.0, max_steps=40)(hidden)
    head = rotating(3.0, max_steps=40, on_oscillation="warn", estimator=estimator)
    with pytest.warns(UserWarning, match="2 row.s. oscillate or diverge in the free relaxation"):
        output = head(hidden)
    assert output.isfinite().all() and head.statistics.num_unconverged == 2
    output.sum().backward()
    mixed = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    head.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        head(hidden)
    head(hidden[:1]).sum().backward()
    alone = {name: parameter.grad for name, parameter in head.named_parameters()}
    alone["readout_bias"], mixed["readout_bias"] = 3 * alone["readout_bias"], mixed["readout_bias"]
    for name in alone.keys() - {"readout_weight"}:
        torch.testing.assert_close(mixed[name], alone[name])


@pytest.mark.parametrize("estimator", ["tangent", "exact"])
def test_a_response_without_a_limit_is_zero_where_the_user_says_so(estimator):
    torch.manual_seed(0)
    weights = [[3 * torch.randn(8, 8)], [3 * torch.randn(8, 8)]]
    network = LayeredNetwork(*weights, ACTIVATIONS["tanh"])
    # The first sample is saturated, the second at the steepest slope
    activities = torch.tensor([[0.99999], [0.0]]).expand(2, 8)
    constants = [network.activation.constants(activities, None)] * 2
    nudge = torch.nn.functional.normalize(torch.randn(2, 8), dim=1)
    with pytest.raises(EquilibriumError):
        error_vectors(network, constants, nudge, Estimator(estimator), 1e-4, 40)
    errors = error_vectors(network, constants, nudge, Estimator(estimator), 1e-4, 40, raises=False)
    assert errors.relaxations[0].failed.tolist() == [False, True]
    first = [(activity[:1], slope[:1]) for activity, slope in constants]
    alone = error_vectors(network, first, nudge[:1], Estimator(estimator), 1e-4, 40)
    for layer, expected in zip(errors.layers, alone.layers, strict=True):
        assert not layer[1].any()
        torch.testing.assert_close(layer[:1], expected)


@pytest.mark.parametrize("widths", [[9], [12, 10], [12, 8, 10]])
def test_fixed_steps_end_where_relaxation_does(widths):
    torch.manual_seed(0)
    head = EPHead(6, widths, 2, tolerance=1e-7, spectral_cap=0.5, input_norm="standardize")
    head(torch.randn(30, 6) + 2)
    hidden = torch.randn(5, 6)
    expected = head.eval()(hidden)
    with head.fixed_steps(int(head.statistics.free_sweeps)):
        assert not head(hidden).requires_grad
        torch.testing.assert_close(head(hidden), expected.detach(), rtol=0, atol=1e-6)
        mapped = torch.vmap(head)(hidden.view(5, 1, 6)).view(5, 2)
        torch.testing.assert_close(mapped, expected.detach(), rtol=0, atol=1e-6)
    with head.fixed_steps(1):
        assert not torch.allclose(head(hidden), expected) or len(widths) == 1
    with pytest.raises(ValueError, match=r"`num_steps` must be positive integers, got \[0\]"), head.fixed_steps(0):
        pass
    with pytest.raises(RuntimeError, match="training mode. Call `eval"), head.train().fixed_steps(3):
        pass


def test_input_norm_takes_off_what_rows_have_in_common():
    torch.manual_seed(0)
    offset, scale = 5 * torch.randn(6), torch.linspace(0.1, 10, 6)
    batches = offset + scale * torch.randn(12, 64, 6)
    heads = {name: make_head(input_norm=name) for name in ("none", "center", "standardize")}
    assert not [name for name in heads["none"].state_dict() if "input_norm" in name]
    for batch in batches:
        for head in heads.values():
            head(batch)
    weights = torch.tensor([max(1 / (k + 1), 0.1) for k in range(12)])
    mean, variance = torch.zeros(6), torch.ones(6)
    for weight, batch in zip(weights, batches, strict=True):
        mean, variance = mean.lerp(batch.mean(0), weight), variance.lerp(batch.var(0, correction=0), weight)
    head = heads["standardize"]
    torch.testing.assert_close(head.input_norm_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.input_norm_variance, variance, rtol=1e-3, atol=1e-5)
    assert head.input_norm_batches == 12
    plain = heads["none"].eval()
    rows = batches[0]
    torch.testing.assert_close(
        head.eval()(rows), plain((rows - mean) / (variance + 1e-5).sqrt()), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(heads["center"].eval()(rows), plain(rows - mean), rtol=1e-3, atol=1e-3)
    before = copy.deepcopy(head.state_dict())
    head(rows)  # evaluation leaves the statistics alone, and so does a forward without a gradient
    with torch.no_grad():
        head.train()(rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    # In training the statistics are constants of the gradient, and a row's result that of evaluation
    hidden = rows.clone().requires_grad_()
    output = head(hidden)
    torch.testing.assert_close(output, head.eval()(rows))
    (gradient,) = torch.autograd.grad(output[0].sum(), hidden)
    assert gradient[0].any() and not gradient[1:].any()
    twin = make_head(input_norm="standardize")
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin.eval()(rows), head(rows))
    assert head.alignment(rows) == pytest.approx([1.0, 1.0], abs=1e-4)


def test_a_bad_row_leaves_the_running_statistics_alone():
    head = make_head(input_norm="center")
    rows = torch.randn(4, 6)
    rows[2, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite in 1 row"):
        head(rows)
    assert not head.input_norm_mean.any() and head.input_norm_batches == 0
    update_statistics(head.input_norm_mean, None, head.input_norm_batches, rows[:0])
    assert head.input_norm_batches == 0


def test_whole_numbers_of_numpy():
    head = EPHead(np.int64(6), [np.int64(12), np.int32(10)], np.int64(2), max_steps=np.int64(50))
    assert head.settings()["hidden_features"] == [12, 10] and type(head.settings()["in_features"]) is int
    assert EPHead(6, np.int64(9), 2).hidden_features == [9]
    assert head(torch.randn(3, 6)).shape == (3, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_features": 0}, "`in_features` must be positive integers, got \\[0\\]"),
        ({"hidden_features": [8, 0]}, "`hidden_features` must be positive integers, got \\[8, 0\\]"),
        ({"hidden_features": []}, "`hidden_features`"),
        ({"out_features": 0}, "`out_features`"),
        ({"activation": "relu"}, "got 'relu'.*complex-differentiable"),
        ({"feedback": "tied"}, "`feedback` must be one of .*got 'tied'"),
        ({"estimator": "cauchy"}, "`estimator` must be one of .*got 'cauchy'"),
        ({"correction": "dyadic"}, "`correction` must be one of .*got 'dyadic'"),
        ({"radius": 0.0}, "`radius` must be a number greater than 0, got 0.0.*default"),
        ({"radius": float("nan")}, "`radius` must be a number greater than 0, got nan"),
        ({"tolerance": 0.0}, "`tolerance` must be a number greater than 0"),
        ({"num_points": 0}, "`num_points` must be a whole number of at least 1, got 0"),
        ({"max_steps": 0}, "`max_steps` must be a whole number of at least 1, got 0"),
        ({"feedback_angle": 30.0}, "`feedback_angle` is 30.0 but `feedback` is 'symmetric'"),
        ({"feedback": "asymmetric", "feedback_angle": 200.0}, "of at most 180, got 200.0.*degrees"),
        ({"spectral_cap": 0.0}, "`spectral_cap` must be a number greater than 0, got 0.0.*'auto'.*None"),
        ({"spectral_cap": "safe"}, "`spectral_cap` must be a number greater than 0, got 'safe'.*'auto'.*None"),
        ({"input_norm": "batch"}, "`input_norm` must be one of 'none', 'center', 'standardize', got 'batch'"),
        ({"on_oscillation": "ignore"}, "`on_oscillation` must be one of 'raise', 'warn', got 'ignore'"),
        ({"hidden_features": [8, True]}, "`hidden_features` must be positive integers"),
    ],
)
def test_wrong_arguments(settings, message):
    arguments = {"in_features": 6, "hidden_features": [8, 8], "out_features": 1, **settings}
    with pytest.raises(ValueError, match=message):
        EPHead(**arguments)


def test_real_estimators_do_not_name_complex_points():
    with pytest.raises(ValueError, match="got 'relu'") as error:
        EPHead(6, [8, 8], 1, activation="relu", estimator="symmetric")
    assert "complex" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_input_that_is_not_finite_names_the_row(value):
    head, hidden = make_head(), torch.randn(4, 3, 6)
    hidden[2, 1, 5] = value
    with pytest.raises(ValueError, match=r"1 row\(s\), the first at index \(2, 1\) of a batch of shape \(4, 3\)"):
        head(hidden)
    with pytest.raises(ValueError, match="the first at index 1 of a batch"):
        head(hidden[2])
    head.input_weight.data[0, 0] = value
    with pytest.raises(ValueError, match="`input_weight` or `input_bias` of EPHead is not finite"):
        head(torch.randn(2, 6))


def test_input_of_the_wrong_kind():
    with pytest.raises(ValueError, match=r"`in_features` = 6, got torch.float32 of shape \(3, 5\)"):
        make_head()(torch.randn(3, 5))
    with pytest.raises(ValueError, match="floating input .* got torch.int64"):
        make_head()(torch.ones(3, 6, dtype=torch.long))


@pytest.mark.parametrize("name", ["forward_weight_1", "bias_2", "readout_weight", "input_weight"])
def test_a_weight_changed_before_the_backward_pass(name):
    head = make_head()
    output = head(torch.randn(3, 6, requires_grad=True))
    getattr(head, name).data.mul_(1.01)  # as torch does not see it: no error
    output.sum().backward()
    output = head(torch.randn(3, 6, requires_grad=True))
    with torch.no_grad():
        getattr(head, name).add_(0.1)
    with pytest.raises(RuntimeError, match=f"`{name}` of EPHead was changed.*after the backward pass"):
        output.sum().backward()


def test_a_change_that_the_backward_pass_does_not_read():
    """Such as that of the mean reward."""
    for name in ("readout_bias", "input_bias", "input_weight"):
        head = make_head()
        output = head(torch.randn(3, 6))
        with torch.no_grad():
            getattr(head, name).add_(0.1)
        output.sum().backward()
        assert head.readout_weight.grad.any()
