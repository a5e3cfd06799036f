import copy
import inspect
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trl_ext import EPHead


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
        "spectral_cap": None,
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


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_fresh_weights_converge_at_any_depth(depth):
    torch.manual_seed(0)
    head = EPHead(32, [128] * depth, 1)
    head(torch.randn(32, 32)).sum().backward()
    assert head.statistics.num_unconverged == 0 and head.statistics.free_sweeps < 60


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
        ({"spectral_cap": 0.0}, "`spectral_cap` must be a number greater than 0, got 0.0.*None"),
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
