# ruff: noqa: RUF001 (the data has typographic quotes)
"""Dialogue: data, rewards and the evaluation score."""

import json

import pytest

from recipes.experiments.constrained_ppo_dailydialog.daily_dialog import (
    Dialogue,
    clean,
    read_dialogues,
    replies,
    split_dialogues,
)
from recipes.experiments.constrained_ppo_dailydialog.evaluation import evaluation_score, lexical_metrics, ranges_of
from recipes.experiments.constrained_ppo_dailydialog.intent import IntentClassifier, train_intent_classifier
from recipes.experiments.constrained_ppo_dailydialog.prepare import train_policy
from recipes.experiments.constrained_ppo_dailydialog.rewards import CLASSIFIER_VARIABLE, intent_match, meteor


def dialogues(num_dialogues=40):
    """Questions are answered, requests accepted: intents that a bag of words can tell."""
    made = []
    for number in range(num_dialogues):
        thing = ("tea", "cake", "wine", "soup")[number % 4]
        made.append(
            Dialogue(
                (f"do you like {thing} ?", f"yes , i like {thing} .", f"please bring the {thing} .", "ok , i will ."),
                (1, 0, 2, 3),
            )
        )
    return made


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a_human.txt").write_text(
        "Do you like tea ? __eou__ I ’ m fond of it . __eou__\t1\t2 1\t0 0\n"
        "Bring it , please . __eou__ OK , I ’ ll . __eou__ Thanks ! __eou__\t1\t3 4 1\t0 0 0\n"
    )
    (tmp_path / "b_text_en.txt").write_text("Do you like tea ? __eou__ I ’ m fond of it . __eou__\nHi . __eou__\n")
    (tmp_path / "b_action.txt").write_text("2 1\n1 1\n")
    return tmp_path


def test_files_are_read_each_dialogue_once(files, caplog):
    found = read_dialogues(files)
    assert found == [
        Dialogue(("do you like tea ?", "i'm fond of it ."), (1, 0)),
        Dialogue(("bring it , please .", "ok , i'll .", "thanks !"), (2, 3, 0)),
    ]
    assert "1 dialogues" in caplog.text and "left out" in caplog.text


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="XDailyDialog"):
        read_dialogues(tmp_path)
    (tmp_path / "a_human.txt").write_text("Hi . __eou__\t1\t7\t0\n")
    with pytest.raises(ValueError, match="one dialogue act from 1 to 4"):
        read_dialogues(tmp_path)


def test_replies_follow_their_context(files):
    rows = replies(read_dialogues(files), num_context=1).to_list()
    assert len(rows) == 3
    row = next(row for row in rows if row["reference"] == "thanks !")
    assert row == {"prompt": "ok , i'll .</s>", "last": "ok , i'll .", "reference": "thanks !", "intent": 0}
    longer = replies(read_dialogues(files)).to_list()
    assert next(row for row in longer if row["intent"] == 0 and row["last"] == "ok , i'll .")["prompt"] == (
        "bring it , please .</s>ok , i'll .</s>"
    )
    # The words of "bring it , please ." and "ok , i'll ." are 5 and 4: together too many, and of the first alone too
    short = replies(read_dialogues(files), num_words=4).to_list()
    assert [row["prompt"] for row in short] == ["ok , i'll .</s>"]
    assert clean("It ’ s 5 o'clock ... isn ' t it ?") == "it's 5 o'clock . . . isn't it ?"


def test_splits_share_no_dialogue():
    parts = split_dialogues([Dialogue((str(i), "b"), (0, 0)) for i in range(50)])
    assert [len(part) for part in parts] == [40, 5, 5]
    assert len({dialogue for part in parts for dialogue in part}) == 50


def test_meteor_is_each_samples_own():
    # All 4 words match in one chunk: fmean 1, penalty 0.5 * (1/4)^3
    own = meteor(["i like the tea", "no"], reference=["i like the tea", "i like the tea"])
    assert own == [pytest.approx(1 - 0.5 / 64), 0.0]
    # The official code's running score would differ with the order
    assert meteor(["no", "i like the tea"], reference=["i like the tea"] * 2) == own[::-1]
    # Stems match: "liked" and "like"
    assert meteor(["liked"], reference=["like"]) == [pytest.approx(0.5)]
    assert meteor([""], reference=["like"]) == [0.0]


def test_intents_are_told_and_rewarded(tmp_path, monkeypatch):
    classifier, measured = train_intent_classifier(dialogues(), dialogues(8), inverse_penalty=1.0)
    assert measured["accuracy"] == 1.0 and measured["majority"] == pytest.approx(1 / 3)
    classifier.save(tmp_path)
    loaded = IntentClassifier.load(tmp_path)
    last, said = ["do you like tea ?"] * 3, ["yes , i like wine .", "please bring the tea .", ""]
    assert loaded.predict(last, said) == classifier.predict(last, said)
    monkeypatch.setenv(CLASSIFIER_VARIABLE, str(tmp_path))
    assert intent_match(said[:2], last=last[:2], intent=[0, 0]) == [1.0, 0.0]
    monkeypatch.delenv(CLASSIFIER_VARIABLE)
    with pytest.raises(ValueError, match="TRL_EXT_INTENT_CLASSIFIER.*is not set"):
        intent_match(said, last=last, intent=[0, 0, 0])
    with pytest.raises(FileNotFoundError, match="constrained_ppo_dailydialog.prepare"):
        IntentClassifier.load(tmp_path / "nowhere")


def test_lexical_metrics_by_hand():
    texts = ["the tea is good .", "the tea is hot , thanks"]
    same = lexical_metrics(texts, texts)
    assert same["sacrebleu"] == pytest.approx(1) and same["rouge2"] == 1 and same["bleu"] == pytest.approx(1)
    # Trigrams: (the tea is) twice, (tea is good), (is good .), (tea is hot), (is hot ,), (hot , thanks) once
    assert same["unique_3"] == 5
    # Without punctuation: (the tea is), (tea is good), (tea is hot), (is hot thanks)
    assert same["vocabulary_3"] == 4
    assert same["longest"] == 5
    other = lexical_metrics(["no", "no"], texts)
    assert other["rouge2"] == 0 and other["bleu"] == 0 and other["unique_3"] == 0 and other["longest"] == 1
    with pytest.raises(ValueError, match="one length"):
        lexical_metrics(["a"], [])


def test_score_is_the_papers():
    low = dict.fromkeys(("sacrebleu", "rouge2", "bleu", "unique_3", "vocabulary_3", "longest"), 0.0)
    high = {name: value + 2.0 for name, value in low.items()}
    ranges = json.loads(json.dumps(ranges_of([low, high])))
    assert evaluation_score(low, ranges) == 0 and evaluation_score(high, ranges) == 1
    # Half of (1 + 0 + 0) / 3 and half of (0.5 + 0 + 0) / 3
    assert evaluation_score({**low, "bleu": 2.0, "longest": 1.0}, ranges) == pytest.approx(1 / 6 + 0.5 / 6)
    flat = {**ranges, "bleu": [1.0, 1.0]}
    assert evaluation_score({**low, "bleu": 1.0}, flat) == 0


def test_policy_learns_to_reply(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = train_policy(
        dialogues(), tmp_path, steps=60, hidden_size=32, num_layers=1, batch_size=8, length=32, learning_rate=1e-2,
        held_out=dialogues(8),
    )  # fmt: skip
    assert facts["held_out_loss"] < 1.0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompt = replies(dialogues(1))[0]["prompt"]
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    assert (ids["input_ids"] == tokenizer.eos_token_id).sum() == prompt.count("</s>")
    reply = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].size(1) :]
    assert tokenizer.eos_token_id in reply
