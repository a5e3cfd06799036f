"""
The table of docs/support_matrix.md, made from the tests' names: what a cell claims, a test of that name shows.

python -m tests.support_matrix
"""

import ast
import functools
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support_matrix.md"
START, END = "<!-- made by tests/support_matrix.py -->", "<!-- end -->"
METHODS = ("SparsePO", "constrained PPO", "GRPO without critic", "AdamP family", "equilibrium head")
# Cells that are no test
UNTESTED, NONE = "untested", "-"
GPU = "[once on a GPU](results/gpu.md)"

SPARSE_PO, PPO = "sparse_po/test_sparse_po_trainer", "constrained_ppo/test_constrained_ppo_trainer"
GRPO, SHARDS = "constrained_ppo/test_constrained_grpo", "distributed/test_optimizer_shards"
EP = "equilibrium/test_training"
_TWO = "test_two_processes_equal_one_and_resume"
_SHARDED = f"{SHARDS}::test_equals_one_process"
_TWO_SPARSE_PO, _TWO_PPO = f"distributed/test_two_processes::{_TWO}", f"distributed/test_constrained_ppo::{_TWO}"
_TWO_EP = "distributed/test_equilibrium::test_two_processes_equal_one"

# Feature: for each method a test, or one of the words above
CELLS: dict[str, tuple[str, str, str, str, str]] = {
    "one process": (
        f"{SPARSE_PO}::test_trainer_loss_equals_the_formula",
        f"{PPO}::test_rollout_and_loss_equal_the_formulas",
        f"{GRPO}::test_without_constraints_equals_grpo_bit_for_bit",
        "optim/test_trl_scripts::test_every_script_trains_with_adamp",
        f"{EP}::test_trls_own_reward_trainer_trains_every_part",
    ),
    "DDP, two processes": (
        _TWO_SPARSE_PO, _TWO_PPO, "distributed/test_constrained_ppo::test_without_a_critic_two_processes_equal_one",
        _SHARDED, _TWO_EP,
    ),
    "ZeRO-1": (UNTESTED, UNTESTED, UNTESTED, _SHARDED, _TWO_EP),
    "ZeRO-2": (_TWO_SPARSE_PO, _TWO_PPO, UNTESTED, _SHARDED, _TWO_EP),
    "ZeRO-3": (_TWO_SPARSE_PO, _TWO_PPO, UNTESTED, _SHARDED, _TWO_EP),
    "optimizer offloaded": (UNTESTED, UNTESTED, UNTESTED, _SHARDED, UNTESTED),
    "FSDP2, `fully_shard`": (
        "sparse_po/test_lm_head::test_fsdp2_over_two_processes",
        "constrained_ppo/test_critic::test_fsdp2_over_two_processes", UNTESTED, _SHARDED,
        "distributed/test_equilibrium::test_fsdp2",
    ),
    "LoRA": (
        f"{SPARSE_PO}::test_lora_trains_masks_against_the_disabled_adapter",
        "constrained_ppo/test_resume::test_with_lora", UNTESTED, UNTESTED,
        f"{EP}::test_lora_with_the_head_among_modules_to_save",
    ),
    "QLoRA": (
        f"{SPARSE_PO}::test_qlora", UNTESTED, UNTESTED, NONE,
        "equilibrium/test_precision::test_reward_trainer_with_qlora",
    ),
    "gradient checkpointing": (
        f"{SPARSE_PO}::test_same_training_by_other_means", f"{PPO}::test_trains", UNTESTED, NONE,
        "equilibrium/test_modeling::test_autocast_and_gradient_checkpointing_leave_the_gradient",
    ),
    "bf16": (
        f"{SPARSE_PO}::test_bfloat16", GPU, UNTESTED, _SHARDED, f"{EP}::test_bf16_mixed_precision_and_weights",
    ),
    "torch.compile": (
        UNTESTED, UNTESTED, UNTESTED, UNTESTED, "equilibrium/test_head::test_compiled_model_runs_the_head_eagerly",
    ),
    "vLLM": (NONE, f"{PPO}::test_only_policy_weights_go_to_vllm", UNTESTED, NONE, NONE),
    "resume, bit for bit": (
        f"{SPARSE_PO}::test_resumed_equals_uninterrupted",
        "constrained_ppo/test_resume::test_resumed_equals_uninterrupted",
        f"{GRPO}::test_resumed_equals_uninterrupted",
        "optim/test_install::test_resumed_run_equals_the_uninterrupted_one",
        f"{EP}::test_resumed_run_equals_the_uninterrupted_one",
    ),
    "resume on another number of processes": (
        UNTESTED, "distributed/test_checkpoints::test_an_open_rollout_never_leaves_a_process_waiting", UNTESTED,
        _SHARDED, UNTESTED,
    ),
    "the same under ZeRO-2 and ZeRO-3": (
        "distributed/test_two_processes::"
        "test_a_checkpoint_under_zero_is_taken_up_by_another_number_of_processes", _TWO_PPO, UNTESTED, UNTESTED,
        UNTESTED,
    ),
    "evaluation": (
        f"{SPARSE_PO}::test_conversational_data_and_evaluation", f"{PPO}::test_evaluation_leaves_the_multipliers",
        f"{GRPO}::test_a_run_under_constraints_shows_and_keeps_what_one_with_a_critic_does", NONE,
        f"{EP}::test_ours_equals_trls_without_homeostasis_and_has_the_metrics",
    ),
    "model card": (
        "test_model_card::test_card_of_a_saved_model", "constrained_ppo/test_report::test_card_of_a_constrained_run",
        f"{GRPO}::test_a_run_under_constraints_shows_and_keeps_what_one_with_a_critic_does", NONE,
        f"{EP}::test_model_card",
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


def _shown(cell: str) -> str:
    if "::" not in cell:
        return cell
    file, name = cell.split("::")
    if name not in _tests_of(file):
        raise LookupError(f"tests/{file}.py has no test {name}")
    return f"[{name.removeprefix('test_').replace('_', ' ')}](../tests/{file}.py)"


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
