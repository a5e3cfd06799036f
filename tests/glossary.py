"""
docs/glossary.md, made from the sources: every setting with what its class says of it, and every logged key.

python -m tests.glossary
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "glossary.md"
START, END = "<!-- made by tests/glossary.py -->", "<!-- end -->"

# Title: file below trl_ext and class. Fields of a class are its own, not those it inherits
SETTINGS: dict[str, tuple[str, str]] = {
    "Every run": ("core/run_arguments.py", "RunArguments"),
    "SparsePO": ("sparse_po/sparse_po_config.py", "SparsePOConfig"),
    "Constrained PPO": ("constrained_ppo/constrained_ppo_config.py", "ConstrainedPPOConfig"),
    "Constrained GRPO": ("constrained_ppo/constrained_grpo.py", "ConstrainedGRPOConfig"),
    "A constraint": ("constrained_ppo/constraints.py", "Constraint"),
    "Threshold search": ("constrained_ppo/threshold_search/config.py", "ThresholdSearchConfig"),
    "Equilibrium head": ("equilibrium/settings.py", "HeadSettings"),
    "Model with an equilibrium head": ("equilibrium/configuration.py", "EPConfig"),
    "Trainers of an equilibrium head": ("equilibrium/training.py", "EPTrainingArguments"),
    "AdamP": ("optim/adamp.py", "AdamP"),
    "SGDP": ("optim/sgdp.py", "SGDP"),
    "AdamO": ("optim/adamo.py", "AdamO"),
    "AdamH": ("optim/adamh.py", "AdamH"),
    "Recipes of `sparse-po`": ("scripts/sparse_po.py", "SparsePOScriptArguments"),
    "Recipes of `constrained-ppo` and `constrained-grpo`": (
        "scripts/constrained_ppo.py",
        "ConstrainedPPOScriptArguments",
    ),
    "Recipes of `equilibrium-reward` and `equilibrium-classifier`": (
        "scripts/recipe/equilibrium_arguments.py",
        "EPHeadArguments",
    ),
    "Recipes of `equilibrium-classifier`": ("scripts/equilibrium_classifier.py", "EPClassifierScriptArguments"),
    "Recipes of TRL's commands": ("scripts/trl_scripts.py", "OptimizerScriptArguments"),
    "Pipelines": ("pipeline/definition.py", "PipelineArguments"),
    "A stage of a pipeline": ("pipeline/definition.py", "Stage"),
}
# Title: key, with <placeholders>, and its meaning. In evaluation each has the prefix `eval_`
LOGGED: dict[str, dict[str, str]] = {
    "SparsePO": {
        "kl/chosen": "KL(reference \\|\\| policy) of the chosen responses, summed over a response, in nats",
        "kl/rejected": "the same of the rejected responses",
        "logps/chosen": "log-probability of the chosen responses under the policy, summed over a response",
        "logps/rejected": "the same of the rejected responses",
        "mask/reward/mean": "mean weight of the log-ratios over response tokens",
        "mask/divergence/mean": "mean weight of the divergences over response tokens",
        "mask/reward/sparsity_chosen": "share of the chosen responses' tokens whose log-ratio weighs zero",
        "mask/reward/sparsity_rejected": "the same of the rejected responses",
        "mask/divergence/sparsity_chosen": "share of the chosen responses' tokens whose divergence weighs zero",
        "mask/divergence/sparsity_rejected": "the same of the rejected responses",
        "mask/dead_sequences": "share of responses in which a mask is zero on every token",
    },
    "Constrained PPO and GRPO: divergence": {
        "kl/per_token": "divergence of the policy from the reference for each token of the rollout, in nats",
        "kl/per_response": "the same, summed over a response",
        "kl/coef": "coefficient of the KL, `kl_coef` or what it has adapted to",
        "kl/loss_coef": "without a critic: of the KL in the loss, as the multipliers weigh it",
        "kl/update": "divergence of the policy from the one that generated, for each token, in nats",
        "skipped_updates": "share of updates that `early_stop_kl` skipped",
        "average/kl": "mean of `kl/per_response` over all rollouts so far",
    },
    "Constrained PPO and GRPO: constraints": {
        "violation/<reward>": "distance from the threshold in the reward's units; positive asks for more weight",
        "relative_violation/<reward>": "the same as a share of the threshold, of the spread where that is near zero",
        "filtered_violation/<reward>": "the violation in spreads, after the filter, as the dual step sees it",
        "spread/<reward>": "the standard deviation over responses that violations are divided by",
        "threshold/<reward>": "the threshold as it is now",
        "multiplier/<reward>": "the multiplier before squashing and damping",
        "weight/<reward>": "the weight of the reward's advantages in the mixture",
        "weight/objective": "the weight of the objective's advantages in the mixture",
        "saturation/<reward>": "1 where the weight is at a bound of its squashing, or the multiplier at its own",
        "oscillation/<reward>": "share of the last 20 rollouts at which the violation had turned its sign",
        "average/<reward>": "mean of the reward over all rollouts so far",
        "score_spread/<reward>": "standard deviation that the reward is divided by, with `use_score_scaling`",
        "disagreement/<ensemble>": "standard deviation over an ensemble's members, mean over the rollout",
        "disagreement_deviations/<ensemble>": "how many spreads that lies above the start",
        "gold": "the gold metric on the evaluation data, logged as `eval_gold`",
    },
    "Constrained PPO: critic and policy": {
        "critic/<stream>/loss": "value loss of a reward's head, or of `kl`",
        "critic/<stream>/value": "mean value over tokens",
        "critic/<stream>/return": "mean return over tokens",
        "critic/<stream>/return_std": "standard deviation of the returns over tokens",
        "critic/<stream>/explained_variance": "share of the returns' variance that the values at generation explain",
        "critic/grad_norm": "gradient norm of the critic, with `critic_max_grad_norm`",
        "advantage/mean": "mean over tokens of the advantage that the policy follows",
        "advantage/std": "its standard deviation",
        "ratio/mean": "probability of a token by that at generation, mean over tokens",
        "ratio/max": "the largest of these",
        "ratio/min": "the smallest of these",
    },
    "Threshold search": {
        "search/gold": "gold metric of the thresholds that were measured",
        "search/best_gold": "the best so far",
        "search/reached": "1 where the rewards were at the thresholds",
        "search/cached": "1 where an earlier measurement nearby was used",
        "search/gold_evaluations": "evaluations of the gold metric so far",
        "search/proposals": "thresholds proposed so far",
        "search/threshold/<reward>": "the threshold that was measured",
        "search/best_threshold/<reward>": "the best so far",
    },
    "Equilibrium head": {
        "ep/free_sweeps": "sweeps until the last row of a batch had converged, free",
        "ep/nudged_sweeps": "the same for the gradient",
        "ep/free_residual": "largest change in the last sweep that was checked, free",
        "ep/nudged_residual": "the same for the gradient",
        "ep/num_unconverged": "rows so far that did not converge within `max_steps`",
        "ep/homeostasis_loss": "the homeostasis objective, unweighted",
        "ep/symmetry": "size of the Jacobian's symmetric part by that of both parts; 1 is symmetric",
        "ep/weight_angle": "mean angle in degrees between forward and transposed feedback weights",
    },
    "AdamP and SGDP, with `log_optimizer_report`": {
        "optimizer/projected/share": "share of steps that were projected, mean over the weights",
        "optimizer/projected/weights": "number of weights that were projected on more than half of their steps",
        "optimizer/projected/weight_norm": "mean norm of these weights",
        "optimizer/projected/effective_step_size": "mean angle that a step turns them by, in radians",
        "optimizer/other/weight_norm": "mean norm of the other weights",
        "optimizer/other/effective_step_size": "mean angle that a step turns them by, in radians",
    },
    "TRL's preference and reward trainers": {
        "rewards/chosen": "mean reward of the chosen responses; in SparsePO $\\beta(U + cD)$",
        "rewards/rejected": "the same of the rejected responses",
        "rewards/margins": "chosen minus rejected",
        "rewards/accuracies": "share of pairs with a positive margin",
        "logits/chosen": "mean logit over the tokens of the chosen responses and the vocabulary",
        "logits/rejected": "the same of the rejected responses",
        "mean_token_accuracy": "share of chosen tokens that are the policy's most probable",
        "aux_loss": "load-balancing loss of a mixture of experts",
        "accuracy": "reward models: share of pairs with a positive margin",
        "margin": "reward models: mean margin",
        "mean_reward": "reward models: mean over a batch",
        "max_reward": "reward models: largest in a batch",
        "min_reward": "reward models: smallest in a batch",
    },
    "TRL's policy trainers": {
        "reward": "mean of the rewards weighted by `reward_weights`",
        "reward_std": "its standard deviation",
        "rewards/<reward>/mean": "mean of a reward",
        "rewards/<reward>/std": "its standard deviation",
        "frac_reward_zero_std": "share of prompts whose completions have equal rewards",
        "completions/mean_length": "tokens of a completion; likewise `min_length` and `max_length`",
        "completions/min_length": "the shortest",
        "completions/max_length": "the longest",
        "completions/mean_terminated_length": "tokens of a completion with an end; likewise the next two",
        "completions/min_terminated_length": "the shortest",
        "completions/max_terminated_length": "the longest",
        "completions/clipped_ratio": "share of completions without an end",
        "clip_ratio/region_mean": "share of tokens whose ratio is clipped",
        "clip_ratio/low_mean": "share clipped from below",
        "clip_ratio/low_min": "the smallest such share of a process",
        "clip_ratio/high_mean": "share clipped from above",
        "clip_ratio/high_max": "the largest such share of a process",
        "sampling/sampling_logp_difference/mean": "vLLM: difference of a token's log-probability from training's",
        "sampling/sampling_logp_difference/max": "the largest of these",
        "sampling/importance_sampling_ratio/mean": "vLLM: ratio that corrects for it; likewise the next two",
        "sampling/importance_sampling_ratio/min": "the smallest of these",
        "sampling/importance_sampling_ratio/max": "the largest of these",
        "kl": "GRPO's k3 estimate of the KL, for each token in nats, with `beta`",
        "cispo_clip_ratio": "share of tokens clipped by `loss_type='cispo'`",
        "step_time": "seconds of a step",
    },
    "every trainer": {
        "loss": "training loss, mean since the last entry",
        "grad_norm": "norm of the gradient before it is clipped",
        "learning_rate": "learning rate of the first parameter group",
        "epoch": "passes through the data so far",
        "step": "optimizer steps so far",
        "num_tokens": "tokens so far, in millions where a progress bar shows it",
        "entropy": "mean entropy of the policy's next-token distribution, in nats",
        "runtime": "seconds of the evaluation, as `eval_runtime`",
        "samples_per_second": "examples in a second, as `eval_samples_per_second`",
        "steps_per_second": "batches in a second, as `eval_steps_per_second`",
        "train_runtime": "at the end: seconds of the training",
        "train_samples_per_second": "at the end: examples in a second",
        "train_steps_per_second": "at the end: steps in a second",
        "train_loss": "at the end: mean loss of all steps",
        "total_flos": "at the end: transformers' estimate of the floating-point operations",
    },
}
_ENTRY = re.compile(r"^([\w*, ]+) \((.*)\):$")
Row = tuple[str, str, str]  # type, default, text
_DEFAULT = re.compile(r"(?:^|, )\*optional\*(?:, defaults to (.*))?$")


def documented(docstring: str) -> dict[str, Row]:
    """What the docstring of a class says of its arguments: name to type, default and text."""
    found: dict[str, Row] = {}
    inside, names, depth = False, [""], 0
    for line in docstring.splitlines():
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text in ("Args:", "Parameters:"):
            inside, depth, names = True, indent, []
        elif not inside or not text:
            continue
        elif indent <= depth:
            inside = False
        elif indent == depth + 4:
            entry = _ENTRY.match(text)
            names = entry[1].split(", ") if entry else []
            if entry:
                optional = _DEFAULT.search(entry[2])
                default = "required" if optional is None else optional[1] or "`None`"
                found |= {name: (_DEFAULT.sub("", entry[2]), default, "") for name in names}
        else:
            found |= {name: (*found[name][:2], f"{found[name][2]} {text}".strip()) for name in names}
    return found


def settings(file: str, name: str) -> tuple[dict[str, Row], dict[str, str | None]]:
    """What a class's docstring says of its settings, and the settings that its code has with their defaults."""
    tree = ast.parse((ROOT / "trl_ext" / file).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    said = documented(ast.get_docstring(classes[name]) or "")
    # Two configurations share the fields of a base
    code = _in_code(classes["_HeadTrainingArguments" if name == "EPTrainingArguments" else name])
    for key, default in code.items():
        if default in ("[]", "{}") and key in said and said[key][1] == "`None`":
            said[key] = (said[key][0], f"`{default}`", said[key][2])
    return {key: row for key, row in said.items() if key not in ("params", "head_*")}, code


def _in_code(node: ast.ClassDef) -> dict[str, str | None]:
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is not None:
        spec = init.args
        defaults = [None] * (len(spec.args) - len(spec.defaults)) + spec.defaults + spec.kw_defaults
        pairs = zip([*spec.args, *spec.kwonlyargs], defaults, strict=True)
        found = {argument.arg: None if default is None else ast.unparse(default) for argument, default in pairs}
        return {key: value for key, value in found.items() if key not in ("self", "params")}
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    named = {ast.unparse(n.target): n.value for n in fields if "ClassVar" not in ast.unparse(n.annotation)}
    return {key: _default(value) for key, value in named.items() if not key.startswith("_")}


def _default(value: ast.expr | None) -> str | None:
    """Source of a field's default."""
    if isinstance(value, ast.Call):
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        factory = given.get("default_factory")
        if isinstance(factory, ast.Name):
            return {"list": "[]", "dict": "{}"}[factory.id]
        value = factory.body if isinstance(factory, ast.Lambda) else given.get("default")
    return None if value is None else ast.unparse(value)


def settings_table(file: str, name: str) -> list[str]:
    """The lines of a class's table."""
    said, _ = settings(file, name)
    if name == "EPConfig":  # The head's have a table of their own
        said = {key: row for key, row in said.items() if key not in settings(*SETTINGS["Equilibrium head"])[0]}
    lines = ["| setting | type | default | |", "|---|---|---|---|"]
    for key, row in said.items():
        lines.append("| " + " | ".join(_cell(cell) for cell in (f"`{key}`", *row)) + " |")
    return lines


def _cell(text: str) -> str:
    """Text of a docstring as a cell: no link that only code resolves, no bar that ends the cell."""
    text = re.sub(r"\[(`[^`]+`)\](?:\((?!http)[^)]*\))?", lambda match: match[1].replace("~", ""), text)
    text = re.sub(r"(?<![(<\w])(https?://[^\s),]+)", r"<\1>", text)
    return text.replace("|", "\\|")


def table() -> str:
    """All of the page that is made."""
    lines = [START, "", "## Settings", ""]
    for title, (file, name) in SETTINGS.items():
        lines += [f"### {title}", "", f"`{name}`, in [`{file}`](../trl_ext/{file}).", ""]
        lines += [*settings_table(file, name), ""]
    lines += ["## Logged keys", ""]
    for title, keys in LOGGED.items():
        lines += [f"### Logged: {title}", "", "| key | meaning |", "|---|---|"]
        lines += [f"| `{key}` | {meaning} |" for key, meaning in keys.items()]
        lines.append("")
    return "\n".join([*lines, END])


def page() -> str:
    """The page with today's tables."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    return before + table() + rest.split(END)[1]


def _pattern(key: str) -> str:
    return "".join(".+" if part.startswith("<") else re.escape(part) for part in re.split(r"(<[a-z]+>)", key))


_KEYS = {key: re.compile(f"(?:eval_(?:.+_)?)?(?:{_pattern(key)})") for keys in LOGGED.values() for key in keys}


def unknown(history: Iterable[Mapping[str, object]]) -> set[str]:
    """
    Keys of a trainer's log that the glossary does not have.

    Args:
        history (`Iterable[Mapping[str, object]]`):
            Entries of a `log_history`.

    Returns:
        `set[str]`
    """
    found = {key for entry in history for key in entry}
    return {key for key in found if not any(pattern.fullmatch(key) for pattern in _KEYS.values())}


def keys_in_source() -> Iterator[tuple[str, str]]:
    """Every string of the package that has the form of a logged key, `<>` for what is filled in, with its place."""
    form = re.compile(r"[a-z_<>]+(?:/[a-z_<>]+)+")
    for path in sorted((ROOT / "trl_ext").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts: set[int] = set()
        for node in ast.walk(tree):
            text = ""
            if isinstance(node, ast.JoinedStr):
                parts |= {id(value) for value in node.values}
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "<>" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                text = node.value
            if form.fullmatch(text) and "</" not in text:  # else an end tag of HTML
                yield text, f"{path.relative_to(ROOT)}:{node.lineno}"


def is_known(text: str) -> bool:
    """Whether some logged key has the form of a string of the source."""
    text = text.removeprefix("eval_")
    pattern = re.compile("".join(".+" if part == "<>" else re.escape(part) for part in re.split("(<>)", text)))
    return any(pattern.fullmatch(key) for key in _KEYS)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
