"""Trains SparsePO on a tiny model and writes what happened; started by the tests in one or several processes."""

import argparse
import json
from pathlib import Path

from peft import LoraConfig

from tests.helpers.launched import finish, shard_fully
from tests.helpers.tiny import tiny_pairs, tiny_tokenizer
from trl_ext.sparse_po.sparse_po_config import SparsePOConfig
from trl_ext.sparse_po.sparse_po_trainer import SparsePOTrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--resume")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--settings", default="{}")
    parser.add_argument("--fully_shard", action="store_true")
    options = parser.parse_args()
    trainer = SparsePOTrainer(
        options.model,
        args=SparsePOConfig(
            output_dir=options.output,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            beta=0.5,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            **{"max_steps": 4, **json.loads(options.settings)},
        ),
        train_dataset=tiny_pairs(16),
        eval_dataset=tiny_pairs(8, seed=3),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]) if options.lora else None,
    )
    if options.fully_shard:
        shard_fully(trainer)
        trainer.args.save_strategy = "no"  # accelerate gathers what is saved, where it has sharded it
    trainer.train(resume_from_checkpoint={"true": True}.get(options.resume, options.resume))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    weights = trainer.token_masks(batch)
    if not options.fully_shard:
        trainer.save_model(str(Path(options.output) / "final"))
    history = trainer.state.log_history
    found = {
        "losses": [e["loss"] for e in history if "loss" in e],
        "eval_losses": [e["eval_loss"] for e in history if "eval_loss" in e],
        "mask_means": [e["mask/reward/mean"] for e in history if "mask/reward/mean" in e],
        "weights": weights["divergence"].tolist(),
    }
    finish(trainer, options.output, found)


if __name__ == "__main__":
    main()
