"""Weights of 4 bits on a CPU that calculates in bfloat16 (AVX512-BF16), in the form that has a gradient."""

from torch import nn


def keep_four_bits_trainable(model: nn.Module) -> None:
    """
    Lets the 4-bit layers of a model keep their weights as they were loaded. On such a CPU bitsandbytes packs them anew
    at the first forward in evaluation mode, as at an evaluation or when a policy samples, for a kernel without a
    gradient, and never unpacks them for training. Does nothing on other devices and to other layers.

    Args:
        model (`torch.nn.Module`):
            Model to be trained, changed in place.

    Raises:
        ValueError: If weights are packed already.
    """
    for name, module in model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"The 4-bit weight of `{name}` is packed for inference on this CPU, which has no gradient: the "
                    "model was run in evaluation mode. Hand over a model that was just loaded, or its name."
                )
