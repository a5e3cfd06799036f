"""Which pairs say something, judged by what the model sees of them."""

import logging

import pytest
from datasets import Dataset, IterableDataset

from tests.helpers.sparse_po import make_trainer
from tests.helpers.tiny import tiny_pairs, tiny_tokenizer
from trl_ext.sparse_po.preference_data import drop_pairs_without_signal, pair_fault, pairs_without_signal


LONG = list(range(10, 20))


@pytest.mark.parametrize(
    ("pair", "max_length", "keep_end", "fault"),
    [
        (([5], [1, 2], [1, 3]), None, False, None),
        (([5], [1, 2], [1, 2]), None, False, "`chosen` equals `rejected`"),
        (([5], [1, 2], []), None, False, "`rejected` has no token"),
        (([5], [], [1]), None, False, "`chosen` has no token"),
        (([5], [1, 2], [9]), None, False, None),  # only the end token, against text
        (([5], [*LONG, 1], [*LONG, 2]), 11, False, "`chosen` equals `rejected` within `max_length`"),
        (([5], [*LONG, 1], [*LONG, 2]), 12, False, None),
        (([5], [*LONG, 1], LONG), 11, False, "`chosen` equals `rejected` within `max_length`"),
        (([5], [1, *LONG], [2, *LONG]), 10, True, "`chosen` equals `rejected` within `max_length`"),
        (([5], [1, *LONG], [2, *LONG]), 11, True, None),
        (([5, 6], [7, 8], [6, 7, 8]), 3, True, None),  # the same tokens, one more of them a completion's
    ],
)
def test_pair_fault(pair, max_length, keep_end, fault):
    assert pair_fault(*pair, max_length, keep_end) == fault
    rows = [([1], [2], [3]), pair, ([1], [2, 3], [3, 2])]
    data = Dataset.from_list(
        [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in rows]
    )
    assert pairs_without_signal(data, max_length, keep_end) == ({} if fault is None else {1: fault})
    shuffled = data.select([1, 2, 0])
    assert pairs_without_signal(shuffled, max_length, keep_end) == ({} if fault is None else {0: fault})


def pairs_with_faults(conversational=False):
    rows = tiny_pairs(8, conversational=conversational).to_list()
    for row in (2, 5):
        rows[row]["rejected"] = rows[row]["chosen"]
    return rows


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "say nothing" in record.getMessage()]


@pytest.mark.parametrize("conversational", [False, True], ids=["plain", "conversational"])
def test_equal_pairs_are_left_out_with_one_warning(conversational, tmp_path, tiny_path, tokenizer, caplog):
    data = Dataset.from_list(pairs_with_faults(conversational))
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, data=data)
    assert len(trainer.train_dataset) == 6
    assert len(warnings_of(caplog)) == 1
    assert "2 of 8 pairs of the train dataset" in warnings_of(caplog)[0] and "strict_pairs" in warnings_of(caplog)[0]


def test_strict_pairs_name_the_row_of_the_users_data(tmp_path, tiny_path, tokenizer):
    rows = pairs_with_faults()
    rows[0]["prompt"] = " ".join(["the"] * 30)  # dropped by TRL before
    with pytest.raises(ValueError, match=r"2 pairs of the train dataset.*row 2: `chosen` equals.*strict_pairs=False"):
        make_trainer(tmp_path, tiny_path, tokenizer, data=Dataset.from_list(rows), strict_pairs=True, max_length=20)
    clean = Dataset.from_list([row for place, row in enumerate(rows) if place not in (2, 5)])
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, data=clean, strict_pairs=True, max_length=20)
    assert len(trainer.train_dataset) == 5 and "pair_row" not in trainer.train_dataset.column_names


def test_pairs_judged_by_tokens(tmp_path, tiny_path, caplog):
    """Texts that look empty and have tokens, in a template of reasoning models."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.get('reasoning_content', '') + ' ' + m['content'] + ' ' }}{% endfor %}"
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )

    def answer(**message):
        return [{"role": "assistant", "content": "", "reasoning_content": "", **message}]

    pairs = [
        (answer(reasoning_content="the film"), answer(reasoning_content="a book")),
        (answer(content="good"), answer()),  # the end token alone
        (answer(content="  "), answer(content="good")),
        (answer(content=" good"), answer(content="good ")),  # no difference in tokens
    ]
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "the meal was"}], "chosen": c, "rejected": r} for c, r in pairs]
    )
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, data=data, per_device_train_batch_size=3, max_steps=1)
    assert len(trainer.train_dataset) == 3 and len(warnings_of(caplog)) == 1
    assert [len(row["rejected_ids"]) for row in trainer.train_dataset] == [3, 1, 2]
    trainer.train()


def test_nothing_left_and_iterable_data(tokenizer, caplog):
    def rows():
        for completion in ([2], [3], [4]):
            yield {"prompt_ids": [1], "chosen_ids": completion, "rejected_ids": [3]}

    with pytest.raises(ValueError, match="No pair of the eval dataset says anything.*in 1 `chosen` equals"):
        drop_pairs_without_signal(Dataset.from_list(list(rows())[1:2]), "eval", None)
    data = IterableDataset.from_generator(rows)
    assert [row["chosen_ids"] for row in drop_pairs_without_signal(data, "train", None)] == [[2], [4]]
    strict = drop_pairs_without_signal(data, "train", None, strict=True)
    with pytest.raises(ValueError, match="train dataset.*row 1: `chosen` equals"):
        list(strict)
    assert not warnings_of(caplog) and caplog.handler.level <= logging.WARNING
