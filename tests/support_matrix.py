"""
The table of docs/support_matrix.md, made from the tests' names: what a cell claims, a test of that name shows. A
cell is a test, or a [`Refusal`] with the test that expects it.

python -m tests.support_matrix
"""

import ast
import functools
from pathlib import Path
from typing import NamedTuple


class Refusal(NamedTuple):
    """A combination that raises an error before training; the test that expects it."""

    test: str


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support_matrix.md"
START, END = "<!-- made by tests/support_matrix.py -->", "<!-- end -->"
METHODS = ("SparsePO", "constrained PPO", "GRPO without critic", "AdamP family", "equilibrium head")

SPARSE_PO, PPO = "sparse_po/test_sparse_po_trainer", "constrained_ppo/test_constrained_ppo_trainer"
GRPO, SHARDS = "constrained_ppo/test_constrained_grpo", "distributed/test_optimizer_shards"
EP = "equilibrium/test_training"
_SPARSE_PO_ON_TWO = "distributed/test_two_processes::test_two_processes_equal_one"
_PPO_ON_TWO = "distributed/test_constrained_ppo::test_two_processes_equal_one"
_GRPO_ON_TWO = "distributed/test_constrained_ppo::test_without_a_critic_two_processes_equal_one"
_EP_ON_TWO = "distributed/test_equilibrium::test_two_processes_equal_one"
_SHARDED = f"{SHARDS}::test_equals_one_process"
# By which all stages that save are resumed too
_SPARSE_PO_RESUMED, _PPO_RESUMED = f"{_SPARSE_PO_ON_TWO}_and_resume", f"{_PPO_ON_TWO}_and_resume"
_PPO_OTHER_MEANS = "constrained_ppo/test_other_means::test_same_training_by_other_means"
_SPARSE_PO_OTHER_MEANS = f"{SPARSE_PO}::test_same_training_by_other_means"
_OPTIMIZER_RUN = "optim/test_training::test_equals_the_run_with_the_authors_package"
_QLORA = "constrained_ppo/test_other_means::test_qlora"
_VLLM = "constrained_ppo/test_other_means::test_vllm_samples_from_the_policys_weights"
# SparsePO's, with AdamP's averages
_RECUT = "distributed/test_two_processes::test_a_checkpoint_under_zero_is_taken_up_by_another_number_of_processes"
_NO_ENGINE = Refusal("test_cli::test_an_engine_is_refused_where_nothing_is_generated")

Cell = str | Refusal
# Feature: for each method a test
CELLS: dict[str, tuple[Cell, Cell, Cell, Cell, Cell]] = {
    "one process": (
        f"{SPARSE_PO}::test_trainer_loss_equals_the_formula",
        f"{PPO}::test_rollout_and_loss_equal_the_formulas",
        f"{GRPO}::test_without_constraints_equals_grpo_bit_for_bit",
        "optim/test_trl_scripts::test_every_script_trains_with_adamp",
        f"{EP}::test_trls_own_reward_trainer_trains_every_part",
    ),
    "DDP, two processes": (_SPARSE_PO_RESUMED, _PPO_RESUMED, _GRPO_ON_TWO, _SHARDED, _EP_ON_TWO),
    "ZeRO-1": (_SPARSE_PO_ON_TWO, _PPO_ON_TWO, _GRPO_ON_TWO, _SHARDED, _EP_ON_TWO),
    "ZeRO-2": (_SPARSE_PO_RESUMED, _PPO_RESUMED, _GRPO_ON_TWO, _SHARDED, _EP_ON_TWO),
    "ZeRO-3": (_SPARSE_PO_RESUMED, _PPO_RESUMED, _GRPO_ON_TWO, _SHARDED, _EP_ON_TWO),
    "optimizer offloaded": (_SPARSE_PO_ON_TWO, _PPO_ON_TWO, _GRPO_ON_TWO, _SHARDED, _EP_ON_TWO),
    "FSDP2, `fully_shard`": (_SPARSE_PO_ON_TWO, _PPO_ON_TWO, _GRPO_ON_TWO, _SHARDED, _EP_ON_TWO),
    "LoRA": (
        f"{SPARSE_PO}::test_lora_trains_masks_against_the_disabled_adapter",
        "constrained_ppo/test_resume::test_with_lora",
        "constrained_ppo/test_other_means::test_without_a_critic_and_with_lora", _OPTIMIZER_RUN,
        f"{EP}::test_lora_with_the_head_among_modules_to_save",
    ),
    "QLoRA": (
        f"{SPARSE_PO}::test_qlora", _QLORA, _QLORA, _OPTIMIZER_RUN,
        "equilibrium/test_precision::test_reward_trainer_with_qlora",
    ),
    "gradient checkpointing": (
        _SPARSE_PO_OTHER_MEANS, _PPO_OTHER_MEANS, _PPO_OTHER_MEANS, _OPTIMIZER_RUN,
        "equilibrium/test_modeling::test_autocast_and_gradient_checkpointing_leave_the_gradient",
    ),
    "bf16": (
        f"{SPARSE_PO}::test_bfloat16", _PPO_OTHER_MEANS, _PPO_OTHER_MEANS, _SHARDED,
        f"{EP}::test_bf16_mixed_precision_and_weights",
    ),
    "torch.compile": (
        _SPARSE_PO_OTHER_MEANS, _PPO_OTHER_MEANS, _PPO_OTHER_MEANS, _OPTIMIZER_RUN,
        "equilibrium/test_head::test_compiled_model_runs_the_head_eagerly",
    ),
    "vLLM": (_NO_ENGINE, _VLLM, _VLLM, _VLLM, _NO_ENGINE),
    "resume, bit for bit": (
        f"{SPARSE_PO}::test_resumed_equals_uninterrupted",
        "constrained_ppo/test_resume::test_resumed_equals_uninterrupted",
        f"{GRPO}::test_resumed_equals_uninterrupted",
        "optim/test_install::test_resumed_run_equals_the_uninterrupted_one",
        f"{EP}::test_resumed_run_equals_the_uninterrupted_one",
    ),
    "resume on another number of processes": (
        _SPARSE_PO_RESUMED, "distributed/test_checkpoints::test_an_open_rollout_never_leaves_a_process_waiting",
        _GRPO_ON_TWO, _SHARDED, _EP_ON_TWO,
    ),
    "the same under ZeRO-2 and ZeRO-3": (
        _RECUT, _PPO_RESUMED, _GRPO_ON_TWO, _RECUT,
        "distributed/test_equilibrium::test_a_checkpoint_is_taken_up_by_another_number_of_processes",
    ),
    "evaluation": (
        f"{SPARSE_PO}::test_conversational_data_and_evaluation", f"{PPO}::test_evaluation_leaves_the_multipliers",
        f"{GRPO}::test_a_run_under_constraints_shows_and_keeps_what_one_with_a_critic_does", _OPTIMIZER_RUN,
        f"{EP}::test_ours_equals_trls_without_homeostasis_and_has_the_metrics",
    ),
    "model card": (
        "test_model_card::test_card_of_a_saved_model", "constrained_ppo/test_report::test_card_of_a_constrained_run",
        f"{GRPO}::test_a_run_under_constraints_shows_and_keeps_what_one_with_a_critic_does",
        "optim/test_trl_scripts::test_the_real_command", f"{EP}::test_model_card",
    ),
}  # fmt: skip


def table() -> str:
    """
    The table in Markdown.

    Raises:
        LookupError: If a cell names a test that does not exist.
    """
    lines = [f"| | {' | '.join(METHODS)} |", f"|{'---|' * (len(METHODS) + 1)}"]
    lines += [f"| {feature} | {' | '.join(map(_shown, cells))} |" for feature, cells in CELLS.items()]
    return "\n".join(lines)


def _shown(cell: Cell) -> str:
    test = cell.test if isinstance(cell, Refusal) else cell
    file, _, name = test.partition("::")
    if name not in _tests_of(file):
        raise LookupError(f"tests/{file}.py has no test {name or 'without a name'}")
    link = f"[{name.removeprefix('test_').replace('_', ' ')}](../tests/{file}.py)"
    return f"refused: {link}" if isinstance(cell, Refusal) else link


@functools.cache
def _tests_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def page() -> str:
    """The page with the table of today."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
