"""Rows that no trainer can read are named by row and column; all others pass, however they are stored."""

import math
import time

import pyarrow as pa
import pytest
from datasets import Dataset, Features, IterableDataset, List, Sequence, Value

from tests.helpers.constrained_ppo import make
from tests.helpers.equilibrium import reward_model
from tests.helpers.sparse_po import make_trainer
from tests.helpers.tiny import save_tiny_model, tiny_tokenizer
from trl_ext import EPRewardConfig, EPRewardTrainer
from trl_ext.constrained_ppo.prompts import check_prompts
from trl_ext.core.dataset_rows import check_rows, checked_stream


PAIRS = {"required": ("chosen", "rejected"), "optional": ("prompt",), "needs_prompt": True}
USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}


def pair(**columns):
    return {"prompt": "a film", "chosen": " good", "rejected": " bad", **columns}


def conversation(**columns):
    return {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "no"}], **columns}


WRONG = [
    ([pair(), pair(chosen=None)], r"Row 1 .*`chosen` is missing \(None\)"),
    ([pair(prompt=None), pair()], r"Row 0 .*`prompt` is missing"),
    ([{"prompt": "a", "chosen": "b"}], "no column 'rejected'; its columns are"),
    ([{"text": "a"}], "no column 'chosen' and 'rejected'"),
    ([], "is empty"),
    ([pair(chosen=3)], "Row 0 .*`chosen` holds a `int`, 3"),
    ([pair(chosen=b"good")], "Row 0 .*`chosen` holds a `bytes`"),
    ([pair(rejected=float("nan"))], "Row 0 .*`rejected` holds a `float`, nan"),
    ([pair(rejected={"text": "a"})], "Row 0 .*`rejected` holds a `dict`"),
    ([pair(prompt=["a", "b"])], "Row 0 .*`prompt` holds a `str`, 'a', in place of message 0"),
    ([pair(prompt=[])], "Row 0 .*`prompt` is an empty list"),
    ([conversation(), conversation(chosen=[])], "Row 1 .*`chosen` is an empty list"),
    ([conversation(), conversation(prompt=None)], "Row 1 .*`prompt` is missing"),
    ([conversation(), conversation(chosen=[{"role": "assistant", "content": None}])], "Row 1 .*0 without `content`"),
    ([conversation(), conversation(chosen=[{"role": None, "content": "x"}])], "Row 1 .*message 0 without a `role`"),
    ([conversation(chosen=[ANSWER, {"role": "", "content": "x"}])], "Row 0 .*message 1 without a `role`"),
    ([conversation(chosen=[{"from": "human", "value": "x"}])], "Row 0 .*message 0 without a `role`"),
    ([conversation(chosen=[{"role": "assistant", "content": 3}])], "Row 0 .*message 0 whose `content` is 3"),
    ([conversation(chosen=[[ANSWER]])], "Row 0 .*`chosen` holds a `list`"),
    ([conversation(prompt="a film")], "Row 0 .*`chosen` holds messages, and `prompt` a text"),
    ([{"chosen": "good", "rejected": "bad"}], "Row 0 .*`chosen` begins otherwise than `rejected`"),
    ([{"chosen": "", "rejected": ""}], "Row 0 .*begins otherwise"),
    ([pair(), pair(prompt="")], "Row 1 .*`prompt` is empty, and the tokenizer makes no token"),
    ([conversation(), conversation(prompt=[{"role": "wizard", "content": "x"}])], "Row 1 .*role 'wizard'.*refuses"),
]  # fmt: skip
RIGHT = [
    [pair(), pair(chosen="x" * 1_000_000)],
    [pair(chosen=""), pair()],
    [conversation(), conversation(prompt=[{"role": "system", "content": "s"}, USER])],
    [{"chosen": "a film good", "rejected": "a film bad"}],
    [{"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "no"}]}],
    [conversation(prompt=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}])],
    [conversation(chosen=[{**ANSWER, "content": None, "tool_calls": [{"name": "f"}]}])],
]


@pytest.fixture(scope="module")
def tokenizer():
    found = tiny_tokenizer()
    found.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'wizard' %}{{ raise_exception('no wizards') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    return found


def stored(rows):
    """The rows as a dataset, with the columns of the first where there is none."""
    return Dataset.from_list(rows) if rows else Dataset.from_list([pair()]).select([])


@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize(("rows", "message"), WRONG, ids=lambda value: "")
def test_wrong_rows(rows, message, stream, tokenizer):
    def read():
        dataset = IterableDataset.from_generator(lambda: iter(rows)) if stream else stored(rows)
        for _ in checked_stream(dataset, "train", tokenizer=tokenizer, **PAIRS):
            pass

    with pytest.raises(ValueError, match=message):
        read()


@pytest.mark.parametrize("rows", RIGHT, ids=lambda value: "")
def test_right_rows(rows, tokenizer):
    dataset = Dataset.from_list(rows)
    assert check_rows(dataset, "train", tokenizer=tokenizer, **PAIRS) is dataset
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert list(checked_stream(stream, "train", tokenizer=tokenizer, **PAIRS)) == rows


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("messages", [False, True])
def test_bytes_that_arrow_takes_for_a_text(row, messages, tokenizer):
    """What a file declares a text; reading it fails."""
    texts = pa.array([b"\x80" if index == row else b"good" for index in range(3)]).view(pa.string())
    if messages:
        structs = pa.StructArray.from_arrays([pa.array(["assistant"] * 3), texts], ["role", "content"])
        texts = pa.ListArray.from_arrays([0, 1, 2, 3], structs)
    rows = Dataset.from_list([conversation() if messages else pair()] * 3).data.table
    dataset = Dataset(rows.set_column(rows.column_names.index("chosen"), "chosen", texts))
    with pytest.raises(ValueError, match=f"Row {row} .*`chosen` holds bytes that are no text in UTF-8"):
        check_rows(dataset, "train", tokenizer=tokenizer, **PAIRS)
    with pytest.raises(ValueError, match="Row 0 .*`rejected` holds bytes that are no text in UTF-8"):
        check_rows(Dataset.from_list([pair(rejected=["", b"\x80"])]), "train", tokenizer=tokenizer, **PAIRS)


def test_rows_of_a_view_have_the_views_numbers():
    dataset = Dataset.from_list([pair(chosen=None), pair(), pair(), pair(rejected=None)])
    check_rows(dataset.select([1, 2]), "train", **PAIRS)
    with pytest.raises(ValueError, match="Row 1 of the train dataset: `rejected`"):
        check_rows(dataset.select([2, 3]), "train", **PAIRS)


def test_other_types_and_no_dataset():
    large = Features({"prompt": Value("large_string")})
    check_prompts(Dataset.from_list([{"prompt": "a"}], features=large), "train")
    with pytest.raises(TypeError, match="train dataset must be a `datasets.Dataset`.*got `list`.*from_list"):
        check_prompts([{"prompt": "a"}], "train")
    with pytest.raises(ValueError, match="eval 'hard' dataset has no column 'prompt'"):
        check_prompts({"easy": Dataset.from_list([{"prompt": "a"}]), "hard": Dataset.from_list([{"p": "a"}])}, "eval")
    nested = Features({"prompt": List(Sequence(Value("string")))})
    with pytest.raises(ValueError, match="`prompt` holds a `list`"):
        check_prompts(Dataset.from_list([{"prompt": [["a"]]}], features=nested), "train")


def test_large_data_is_judged_without_its_rows_in_python():
    dataset = Dataset.from_dict({"prompt": [[USER, ANSWER]] * 200_000})
    start = time.process_time()
    check_prompts(dataset, "train")
    assert time.process_time() - start < 1.5  # 200,000 Python conversations take over 5 s


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def reward_trainer(output, folder, data):
    args = EPRewardConfig(str(output), use_cpu=True, bf16=False, report_to="none")
    return EPRewardTrainer(reward_model(folder), args, train_dataset=data, processing_class=tiny_tokenizer())


TRAINERS = {
    "sparse_po": lambda output, folder, data: make_trainer(output, folder, tiny_tokenizer(), data=data),
    "equilibrium": reward_trainer,
    "constrained_ppo": lambda output, folder, data: make(output, folder, train_dataset=data),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_trainers_name_row_and_column(kind, folder, tmp_path):
    column = "prompt" if kind == "constrained_ppo" else "rejected"
    rows = [pair(prompt="the film"), pair()]
    for wrong, message in (
        ([*rows, pair(**{column: None})], f"Row 2 of the train dataset: `{column}` is missing"),
        ([{"text": "the film"}], "train dataset has no column '(prompt|chosen)"),
        ([pair(**{column: b"the film"})], f"Row 0 of the train dataset: `{column}` holds a `bytes`"),
        ([], "train dataset is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            TRAINERS[kind](tmp_path, folder, stored(wrong))
    with pytest.raises(TypeError, match="train.dataset`? must be a `(datasets.)?Dataset`"):
        TRAINERS[kind](tmp_path, folder, rows)


def test_a_completion_of_a_million_characters_trains_as_trls_does(folder, tmp_path):
    rows = [{"prompt": "the film", "chosen": f" good {'x' * 1_000_000}", "rejected": " bad"}]
    trainer = make_trainer(
        tmp_path, folder, tiny_tokenizer(), data=Dataset.from_list(rows), max_length=16, max_steps=1
    )
    loss = trainer.train().training_loss
    # Policy and reference are the same before the first step, whatever the texts
    assert trainer.state.global_step == 1 and loss == pytest.approx(math.log(2), abs=1e-6)
