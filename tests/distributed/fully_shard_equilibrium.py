"""FSDP2 over gloo: gradients, homeostasis included, are those of the whole model; started by a test."""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from trl_ext import EPModelForSequenceClassification
from trl_ext.equilibrium.report import gathered_asymmetry


def sharded(model, **options):
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model.score, **options)
    return fully_shard(model, **options)


def step(model, ids, labels):
    output = model(ids, attention_mask=torch.ones_like(ids), labels=labels)
    output.loss.backward()
    return output


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    whole = EPModelForSequenceClassification.from_pretrained(
        sys.argv[1], num_labels=3, hidden_features=[8, 8, 8], feedback="asymmetric", feedback_angle=60.0,
        homeostasis_coef=5.0, spectral_cap=0.6, tolerance=1e-6,
    ).train()  # fmt: skip
    ids, labels = torch.randint(3, 30, (4, 6)), torch.tensor([0, 1, 2, 0])
    mine = slice(2 * rank, 2 * rank + 2)
    model = sharded(whole)
    asymmetry = gathered_asymmetry(model.score)
    assert asymmetry == whole.score.asymmetry(), asymmetry
    expected, found = step(whole, ids, labels), step(model, ids[mine], labels[mine])
    torch.testing.assert_close(found.homeostasis_loss, expected.homeostasis_loss)
    for (name, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert type(one.grad).__name__ == "DTensor", name
        torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-3, atol=1e-5)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (whole, model)]
    for optimizer in optimizers:
        optimizer.step()
    for (_, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.full_tensor(), other, rtol=1e-3, atol=2e-3)

    half = sharded(whole, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    for each in (whole, half):
        each.zero_grad()
    step(whole, ids, labels)
    assert step(half, ids[mine], labels[mine]).loss.isfinite()
    for (name, one), other in zip(half.named_parameters(), whole.parameters(), strict=True):
        similarity = torch.nn.functional.cosine_similarity(one.grad.full_tensor().flatten(), other.grad.flatten(), 0)
        assert similarity > 0.95, (name, similarity)
    sys.stdout.write(f"rank {rank} agrees\n")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
