"""Trains under DeepSpeed with one setting after the other and writes what each ended with; started by a test."""

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tests.helpers import deepspeed_on_cpu  # noqa: F401
from tests.helpers.tiny import save_tiny_model, tiny_model, tiny_pairs, tiny_tokenizer
from trl_ext.optim import AdamP, OptimizerMixin, optimizer_factory, register
from trl_ext.optim.callbacks import optimizer_chain


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


class MixedDPOTrainer(OptimizerMixin, DPOTrainer):
    pass


def config(stage: int, zero: dict, **top) -> dict:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage, **zero},
        **top,
    }


def settings(folder: str, deepspeed: dict, **options) -> dict:
    return {
        "output_dir": folder, "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none",
        "deepspeed": deepspeed, "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 2,
        "logging_steps": 1, **options,
    }  # fmt: skip


def sft(folder: str, deepspeed: dict, trainer_options: dict | None = None, **options) -> SFTTrainer:
    model = tiny_model()
    trainer_options = dict(trainer_options or {})
    if trainer_options.pop("own_optimizer", False):
        trainer_options["optimizers"] = (AdamP(model.parameters(), lr=1e-3), None)
    return SFTTrainer(
        model,
        args=SFTConfig(**settings(folder, deepspeed, **options)),
        train_dataset=tiny_pairs(4).select_columns(["chosen"]).rename_column("chosen", "text"),
        processing_class=tiny_tokenizer(),
        **trainer_options,
    )


def dpo(folder: str, deepspeed: dict) -> MixedDPOTrainer:
    args = DPOConfig(**settings(folder, deepspeed))
    return MixedDPOTrainer(
        save_tiny_model(Path(folder) / "model"), args=args, train_dataset=tiny_pairs(4),
        processing_class=tiny_tokenizer(), optimizer_cls_and_kwargs=optimizer_factory("adamp", args),
    )  # fmt: skip


def ended(build) -> str:
    AcceleratorState._reset_state(reset_partial_state=False)
    trainer = build()
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    return " -> ".join(type(wrapper).__name__ for wrapper in optimizer_chain(trainer.optimizer))


def main() -> None:
    folder = sys.argv[1]
    block = {"optimizer": {"type": "Adam", "params": {"lr": "auto", "torch_adam": True}}}
    through = {"zero_force_ds_cpu_optimizer": False}
    register()
    cases = {
        "offload": lambda: sft(folder, config(2, OFFLOAD), optim="adamp"),
        "offload_mixin": lambda: dpo(folder, config(2, OFFLOAD)),
        "optimizers": lambda: sft(folder, config(2, {}), {"own_optimizer": True}),
        "block": lambda: sft(folder, config(1, {}, **block), optim="adamp"),
        "through_zero2": lambda: sft(folder, config(2, OFFLOAD, **through), optim="adamp"),
        "through_zero3": lambda: sft(folder, config(3, OFFLOAD, **through), optim="adamp"),
        "through_mixin": lambda: dpo(folder, config(2, OFFLOAD, **through)),
    }
    found = {name: ended(build) for name, build in cases.items()}
    (Path(folder) / "found.json").write_text(json.dumps(found, indent=1))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
