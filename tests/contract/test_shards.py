"""The attributes of DeepSpeed, FSDP and torch that sharded AdamP reads, and what it relies on in them."""

import inspect

import pytest
import torch


deepspeed = pytest.importorskip("deepspeed")


def source(thing) -> str:
    return inspect.getsource(thing)


def test_zero12_cuts_one_buffer_in_equal_pieces():
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import mixed_precision_linkage

    assert "lp_param._dp_group = dp_group" in source(mixed_precision_linkage)
    text = source(DeepSpeedZeroOptimizer)
    for line in (
        "param_group['params'] = [self.single_partition_of_fp32_groups[i]]",
        "self.optimizer.param_groups = [original_param_groups[group_no]]",
        "self._link_all_hp_params()",
    ):
        assert line in text, line
    text = source(BF16_Optimizer)
    for line in (
        "param_group['params'] = [self.fp32_groups_flat_partition[i]]",
        "partition_size = self.bf16_groups_flat[i].numel() // real_dp_world_size",
    ):
        assert line in text, line


def test_zero3_lists_the_parameters_of_a_sub_group():
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    text = source(DeepSpeedZeroOptimizer_Stage3)
    for line in (
        "p._z3_optimizer = self",
        "self.fp16_groups",
        "fp32_param = self.fp32_partitioned_groups_flat[sub_group_id]",
        "self.optimizer.param_groups[param_group_id]['params'] = [fp32_param]",
    ):
        assert line in text, line
    text = source(Init)
    for line in ("param.ds_process_group =", "param.partition_numel ="):
        assert line in text, line
    assert "param.ds_shape = param.shape" in text


def test_fsdp1_describes_its_flat_parameter():
    from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle

    annotations = FlatParameter.__annotations__
    for name in ("_shapes", "_numels_with_padding", "_is_padding_mask", "_sharded_size", "_params"):
        assert name in annotations, name
    assert "_set_fsdp_flattened(param)" in source(FlatParameter)
    text = source(FlatParamHandle)
    for line in ("self.process_group = process_group", "self.rank = ", "def uses_sharded_strategy"):
        assert line in text, line


def test_fsdp2_shards_as_chunk_does():
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert {"placements", "device_mesh", "to_local"} <= set(dir(DTensor))
    assert Shard(0).dim == 0 and type(Shard(0)) is Shard and not isinstance(Shard(0), Replicate)
    assert "torch.chunk" in source(Shard)


def test_fused_kernel_of_torch():
    """Two steps: minus the update from zero weights, and the decay as a share of the weight."""
    names = [argument.name for argument in torch.ops.aten._fused_adamw_.default._schema.arguments]
    assert names[:14] == [
        "self", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps", "lr", "beta1", "beta2",
        "weight_decay", "eps", "amsgrad", "maximize", "grad_scale",
    ]  # fmt: skip
    assert "tensor_lr" in torch.ops.aten._fused_adamw_.overloads()
    grad, step = torch.randn(9), torch.tensor(3.0)
    first, second = torch.randn(9), torch.rand(9)
    expected_first, expected_second = 0.9 * first + 0.1 * grad, 0.99 * second + 0.01 * grad.square()
    denominator = expected_second.sqrt() / (1 - 0.99**3) ** 0.5 + 1e-3
    weight = torch.zeros(9)
    torch._fused_adamw_(
        [weight], [grad], [first], [second], [], [step], lr=1.0, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-3,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    torch.testing.assert_close(weight, -expected_first / denominator / (1 - 0.9**3))
    torch.testing.assert_close((first, second), (expected_first, expected_second))
    assert float(step) == 3


def test_optimizer_state_is_cast_to_the_parameter():
    """Which `load_state_dict` undoes for `state_dtype`."""
    text = source(torch.optim.Optimizer._process_value_according_to_param_policy)
    assert "value.to(dtype=param.dtype, device=param.device)" in text
    assert 'new_group["params"] = group["params"]' in source(torch.optim.Optimizer.load_state_dict)
