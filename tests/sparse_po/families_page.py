"""docs/model_families.md, written from what model_families.py measured and keeps in model_families.json."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).with_name("model_families.json")
MEASURED_WITH = ("torch", "transformers", "trl", "peft")
STEPS = 4
# Nats; of gradients, relative to the largest
TOLERANCE = {"tokens": 1e-5, "weights": 1e-5, "loss": 1e-5, "gradients": 1e-4}
COLUMNS = {
    "learned": "learned masks",
    "activation": "activation masks",
    "given": "given weights",
    "share_prompt": "`share_prompt`",
    "lora": "LoRA",
    "reload": "save, plain reload",
    "resume": "resume",
}
LEFT_OUT = {
    "decoders of encoder-decoders": (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper "
        "musicgen musicgen_melody moshi"
    ),
    "models of more than text, whose text model is in the table or a family's there": (
        "dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified git got_ocr2 llama4 mllama "
        "moss_transcribe_diarize phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp"
    ),
    "models that read the states of another model": "gemma4_assistant gemma4_unified_assistant",
    "models of bytes in patches": "blt",
    "encoders, for which BERT stands": (
        "bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod"
    ),
}

Cell = dict[str, Any]

HEADER = """\
# Model families

Made by `python -m tests.sparse_po.model_families --write docs/model_families.md`; no cell is written by hand.

{count} rows, each a tiny model with random weights of one decoder-only family of transformers {transformers}: its own
configuration with small sizes and one layer of every kind that it has. TRL {trl}, PEFT {peft}, torch {torch}, float32
on a CPU; trained weights and lower precision are not measured here.

## In short

"""
LEGEND = """
- **A number**: the column holds. It is the largest difference from the naive computation over the log-probabilities of
  policy and reference, their divergences, the mask weights, the loss (nats), and the gradients (relative to the
  largest), after {steps} steps of training. Naive is each sequence alone, without padding, through
  `model(...).logits`, a log-softmax in float64 and the loss as its formula. Learned masks are computed from
  `hidden_states`; given weights are the data's; activation masks are those of the sequence alone with another last
  token, which no weight may depend on. Bounds: {tolerance}.
- **equal**: to the last bit. A saved policy loads by `AutoModelForCausalLM.from_pretrained` with no name missing or
  left over and gives the same logits. Training resumed in the middle ends with the same weights, masks and losses.
- **refused**: before training starts, with the error that the number leads to.
"""


def render(results: dict[str, Any]) -> str:
    """The page."""
    rows = dict(sorted(results["families"].items()))
    errors: dict[str, list[str]] = {}
    for name, row in rows.items():
        for cell in row["cells"].values():
            if "error" in cell:
                errors.setdefault(_kind_of_error(cell["error"]), []).append(name)
    numbers = {kind: place for place, kind in enumerate(errors, start=1)}
    tolerance = ", ".join(f"{bound:g} {name}" for name, bound in TOLERANCE.items())
    lines = [
        HEADER.format(count=len(rows), **results["versions"]).strip("\n"), "", *_summary(rows),
        LEGEND.format(steps=STEPS, tolerance=tolerance).rstrip("\n"), "", "## Table", "",
        _table_row(["family", "layers", *COLUMNS.values()]), _table_row(["---"] * (len(COLUMNS) + 2)),
    ]  # fmt: skip
    for name, row in rows.items():
        cells = [_cell_text(row["cells"][column], numbers) for column in COLUMNS]
        lines.append(_table_row([name, ", ".join(row["traits"]), *cells]))
    lines += ["", "## Errors", ""]
    for kind, names in errors.items():
        quoted = next(c["error"] for c in _cells(rows) if "error" in c and _kind_of_error(c["error"]) == kind)
        lines += [f"{numbers[kind]}. {', '.join(dict.fromkeys(names))}:", f"   `{quoted.replace('`', '')}`"]
    lines += ["", "## What activation masks read", "", *_activations(rows), "", "## Not in the table", ""]
    lines += [f"- {reason}: {', '.join(names.split())}" for reason, names in LEFT_OUT.items()]
    return "\n".join(lines) + "\n"


def _cells(rows: dict[str, Any]) -> list[Cell]:
    return [cell for row in rows.values() for cell in row["cells"].values()]


def _kind_of_error(error: str) -> str:
    """An error without the names and numbers that differ between families."""
    text = re.sub(r"\S+ \([\w-]+\)|\b\w+(ForCausalLM|LMHeadModel|LMHead|Model|ForConditionalGeneration)\b", "*", error)
    return re.sub(r"\d[\d.e+-]*", "*", text)


def _table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell_text(cell: Cell, numbers: dict[str, int]) -> str:
    if "error" in cell:
        return f"{cell['state']} [{numbers[_kind_of_error(cell['error'])]}]"
    largest = max(cell["differences"].values())
    text = "equal" if cell["state"] == "holds" and largest == 0 else f"{largest:.0e}"
    return text if cell["state"] == "holds" else f"**differs**, {text}"


def _summary(rows: dict[str, Any]) -> list[str]:
    states = ("holds", "refused", "differs", "fails")
    lines = [_table_row(["", *states]), _table_row(["---"] * (len(states) + 1))]
    for column, title in COLUMNS.items():
        found = [row["cells"][column]["state"] for row in rows.values()]
        lines.append(_table_row([title, *(str(found.count(state)) for state in states)]))
    return lines


def _activations(rows: dict[str, Any]) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row["activations"]:
            groups = (f"{group}: {', '.join(names)}" for group, names in row["activations"].items() if names)
            kinds.setdefault("; ".join(groups), []).append(name)
    return [f"- {', '.join(names)}\n    - {what}" for what, names in kinds.items()]


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """What was measured with the versions that are installed, by row."""
    versions = {package: version(package).split("+")[0] for package in MEASURED_WITH}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = kept.get("families", {}) if kept.get("versions") == versions else {}
    return {"versions": versions, "families": rows}


def write_results(results: dict[str, Any], path: Path = RESULTS) -> None:
    """Keeps what was measured, families in the order of the alphabet."""
    ordered = {**results, "families": dict(sorted(results["families"].items()))}
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
