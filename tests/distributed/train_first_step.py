"""Takes the first step in mixed precision with every kind of mask, and writes where it stood."""

import argparse

from tests.helpers.launched import finish
from tests.helpers.tiny import tiny_pairs, tiny_tokenizer
from trl_ext.sparse_po.sparse_po_config import SparsePOConfig
from trl_ext.sparse_po.sparse_po_trainer import SparsePOTrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    found = {}
    for mask_type in ("activation", "ones", "learned"):
        args = SparsePOConfig(
            options.output, mask_type=mask_type, bf16=True, use_cpu=True, max_steps=1, per_device_train_batch_size=2,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = SparsePOTrainer(
            options.model, args=args, train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer()
        )
        trainer.train()
        history = trainer.state.log_history[0]
        found[mask_type] = [history[name] for name in ("loss", "kl/chosen", "kl/rejected", "rewards/margins")]
    finish(trainer, options.output, found)


if __name__ == "__main__":
    main()
