import pytest
import torch

from tests.helpers.sparse_po import anisotropic_states
from trl_ext.sparse_po.masks import ActivationTokenMask, LearnedTokenMask, TokenMasks, rescale_to_unit
from trl_ext.sparse_po.reference_pass import ReferenceStates, standardize


def test_learned_mask_equals_the_formula():
    torch.manual_seed(0)
    states = torch.randn(3, 40, 5, dtype=torch.float64)
    mask = LearnedTokenMask(3, 5)
    for parameter in mask.parameters():
        torch.nn.init.normal_(parameter)
    mask.norm_bias.data *= 0.2
    mask.layer_bias.data *= 0.2
    mask.mixer_weight.data = torch.tensor([1.0, -1.0, 0.5])
    total = torch.zeros(40, dtype=torch.float64)
    for layer in range(3):
        norm = torch.nn.functional.layer_norm(
            states[layer], (5,), mask.norm_weight.double(), mask.norm_bias.double(), eps=1e-5
        )
        score = norm @ mask.layer_weight[layer].double() + mask.layer_bias[layer].double()
        total += mask.mixer_weight[layer].double() * score.clamp_min(0)
    weights = mask(standardize(states))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), total.clamp_min(0), rtol=1e-5, atol=1e-6)
    assert (weights == 0).any() and (weights > 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_arithmetic_is_float32(dtype):
    mask = LearnedTokenMask(2, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = mask(standardize(torch.randn(2, 4, 8, dtype=dtype)))
    assert weights.dtype == torch.float32
    weights.sum().backward()
    assert all(parameter.grad is not None for parameter in mask.parameters())


def test_rate_of_dead_masks():
    """The paper's initialisation gives all-zero masks on some seeds; ours on none, and starts near one."""
    dead = {"paper": 0, "positive": 0}
    means = []
    for seed in range(200):
        states = anisotropic_states(seed)
        for init in dead:
            weights = LearnedTokenMask(4, 64, init, torch.Generator().manual_seed(10_000 + seed))(states)
            dead[init] += int((weights == 0).all())
            if init == "positive":
                means.append(weights.mean().item())
    assert dead["positive"] == 0
    assert dead["paper"] >= 10
    assert 0.9 < sum(means) / len(means) < 1.2


def test_mask_ignores_the_token_it_weights():
    states = anisotropic_states(0)
    mask = LearnedTokenMask(4, 64)
    changed = states.clone()
    changed[:, 5] = 0
    different = (mask(states) != mask(changed)).nonzero().flatten().tolist()
    assert different == [5]


def test_activation_mask_by_hand():
    completion = torch.tensor([[False, True, True, True], [False, True, True, False]])
    values = torch.tensor([[9.0, 1.0, 2.0, 3.0], [-5.0, 4.0, 0.0, 7.0]])
    expected = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(rescale_to_unit(values, completion), expected)
    # a z-norm before the min-max, as the paper has it, changes nothing
    torch.testing.assert_close(rescale_to_unit((values - 3) / 7, completion), expected)
    maps = {"mlp": [values, -values], "logits": [values]}
    half = completion.float() * 0.5
    torch.testing.assert_close(ActivationTokenMask()(maps, completion), (half + expected) / 2)


def test_constant_activations_leave_weights_of_one():
    completion = torch.tensor([[False, True, False], [True, True, True]])
    torch.testing.assert_close(rescale_to_unit(torch.full((2, 3), 2.0), completion), completion.float())


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["common"]),
        ({"independent": True}, ["reward", "divergence"]),
        ({"independent": True, "mask_reward": False}, ["divergence"]),
        ({"mask_divergence": False}, ["common"]),
        ({"mask_type": "activation"}, []),
        ({"mask_type": "ones"}, []),
    ],
)
def test_only_used_masks_are_built(settings, names):
    masks = TokenMasks(2, 8, **settings)
    assert list(masks.learned) == names
    predicted = torch.tensor([[False, True, True], [True, False, False]])
    states = ReferenceStates(
        hidden=torch.randn(3, 8), layer_states=torch.randn(2, 3, 8), activation_maps={"mlp": [predicted * 0.25]}
    )
    reward_mask, divergence_mask = masks(states, predicted)
    for mask in (reward_mask, divergence_mask):
        assert mask.shape == predicted.shape and mask.dtype == torch.float32
        assert torch.count_nonzero(mask[~predicted]) == 0
    if not settings.get("mask_reward", True) or settings.get("mask_type") == "ones":
        torch.testing.assert_close(reward_mask, predicted.float())
    if settings.get("mask_divergence") is False:
        torch.testing.assert_close(divergence_mask, predicted.float())
    if settings == {}:
        assert reward_mask is divergence_mask and masks.is_common


@pytest.mark.parametrize(
    ("arguments", "message"), [((0, 8), "num_layers"), ((2, 0), "hidden_size"), ((2, 8, "zero"), "mask_init")]
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearnedTokenMask(*arguments)
