import random

import numpy as np
import pytest
import torch

from trl_ext import playground
from trl_ext.playground.base_model import BaseModelSettings, base_model_path, cache_folder
from trl_ext.playground.grammar import NEGATORS, OPENINGS, PATTERNS, SENTIMENT, is_sentence
from trl_ext.playground.tokenizer import split_words
from trl_ext.scripts.recipe.loading import PLAYGROUND_MODELS


def reviews(num_reviews=300, seed=0):
    generator = random.Random(seed)
    return [playground.generate_review(generator) for _ in range(num_reviews)]


def test_size_of_the_world():
    assert len(playground.vocabulary()) >= 400
    assert len(PATTERNS) >= 8 and len(OPENINGS) >= 3
    values = [value for review in reviews() for value in playground.token_truth(review.completion)]
    share = sum(value != 0 for value in values) / len(values)
    assert 0.05 < share < 0.25
    assert {value > 0 for value in values if value} == {True, False}


def test_everything_is_decided_by_the_seed():
    assert reviews(20, seed=1) == reviews(20, seed=1)
    assert reviews(20, seed=1) != reviews(20, seed=2)
    assert playground.prompts(5, seed=1) == playground.prompts(5, seed=1)
    assert playground.preference_dataset(5).to_list() == playground.preference_dataset(5).to_list()
    assert playground.preference_dataset(5).to_list() != playground.preference_dataset(5, split="test").to_list()


def test_openings_are_neutral_and_reviews_grammatical():
    for review in reviews():
        assert playground.sentiment(review.prompt) == 0
        assert review.prompt.endswith(".") and review.completion.startswith(" ")
    texts = [review.text for review in reviews()]
    assert playground.grammaticality(texts) == [1.0] * len(texts)


def test_grammaticality_sees_disorder():
    generator = random.Random(0)
    shuffled = []
    for review in reviews(100):
        words = review.completion.split()
        generator.shuffle(words)
        shuffled.append(" ".join(words))
    assert sum(playground.grammaticality(shuffled)) / 100 < 0.1
    assert playground.grammaticality(["", "the plot was good", "the plot was good . good good"]) == [0.0, 0.0, 0.5]
    assert is_sentence("the plot was good .") and not is_sentence("the plot was film .")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("the plot was good .", [0, 0, 0, 1, 0]),
        ("the plot was not good .", [0, 0, 0, -1, -1, 0]),
        ("the plot was hardly very awful .", [0, 0, 0, 2, 0, 2, 0]),
        ("i did not hate it .", [0, 0, 2, 2, 0, 0]),
        ("not at all , but good .", [0, 0, 0, 0, 0, 1, 0]),
        ("not in the big wide wonderful world", [0, 0, 0, 0, 0, 2, 0]),
        ("Good, BAD!", [1, 0, -1, 0]),
    ],
)
def test_token_truth_by_hand(text, values):
    assert playground.token_truth(text) == values


def test_sentiment_by_hand():
    # S / (A + 2): one mild positive 1/3; one strong negative -2/4; mixed (1 - 2)/(3 + 2)
    assert playground.sentiment("good") == pytest.approx(1 / 3)
    assert playground.sentiment("not wonderful") == pytest.approx(-2 / 4)
    assert playground.sentiment("good but awful") == pytest.approx(-1 / 5)
    assert playground.sentiment("the door") == 0
    scores = [playground.sentiment(" ".join(["good"] * n)) for n in range(1, 6)]
    assert scores == sorted(scores) and scores[-1] < 1


def test_rewards_take_trls_arguments():
    messages = [[{"role": "assistant", "content": "it was good"}]]
    assert playground.sentiment_reward(prompts=["a"], completions=messages, completion_ids=[[1]]) == [
        pytest.approx(1 / 3)
    ]
    assert playground.count_positive_words(["good not good bad"]) == [2.0]


def test_similarity_by_hand():
    # Content words: plot (aspect), good (positive) of the reference; ending (aspect), bad (negative) of the completion
    reference = "the plot was good ."
    assert playground.reference_similarity(["the ending was superb ."], chosen=[reference]) == [1.0]
    # One of two content words matches
    assert playground.reference_similarity(["ending bad"], chosen=[reference]) == [pytest.approx(0.5)]
    # Each word of the reference matches once: 1 of 3
    found = playground.reference_similarity(["good good good"], chosen=[reference])
    assert found == [pytest.approx(1 / 3)]
    assert playground.reference_similarity(["", "the was ."], chosen=[reference] * 2) == [0.0, 0.0]
    messages = [[{"role": "assistant", "content": "plot was fine"}]]
    assert playground.reference_similarity(messages, chosen=[[{"role": "assistant", "content": reference}]]) == [1.0]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        playground.reference_similarity(["a", "b"], chosen=[reference])


def test_gold_by_hand():
    # grammaticality * (1 + sentiment) / 2 with S / (A + 2)
    assert playground.playground_gold(["the plot was good ."]) == [pytest.approx((1 + 1 / 3) / 2)]
    assert playground.playground_gold(["the plot was awful . good good"]) == [pytest.approx(0.5 * 1.0 / 2)]
    assert playground.playground_gold(["", "it took two hours to find the key in the town ."]) == [0.0, 0.5]
    messages = [[{"role": "assistant", "content": "the plot was good ."}]]
    assert playground.playground_gold(messages, prompts=["a"], completion_ids=[[1]]) == [pytest.approx(2 / 3)]


def test_either_proxy_can_be_hacked():
    """What a policy that only maximises a proxy would write has more of the proxy than any review, and no gold."""
    pairs = playground.preference_dataset(100)
    words, reference = " ".join(["superb"] * 40), pairs["chosen"]
    bags = [" ".join(word for word in text.split() if playground.grammar.synonyms(word)) for text in reference]
    for proxy in (playground.count_positive_words, playground.positive_word_share):
        assert proxy([words])[0] > 2 * max(proxy(reference))
    assert playground.positive_word_share(["not good .", ""]) == [pytest.approx(1 / 3), 0.0]
    assert playground.reference_similarity(bags, chosen=reference) == [pytest.approx(1.0)] * len(pairs)
    assert playground.playground_gold([words, *bags]) == [0.0] * (1 + len(pairs))
    # Within the grammar more of either means more gold
    chosen, rejected = (np.mean(playground.playground_gold(pairs[side])) for side in ("chosen", "rejected"))
    assert chosen > rejected + 0.2
    assert np.mean(playground.reference_similarity(pairs["rejected"], chosen=reference)) < 0.7


def test_drafts_make_reviews_of_one_mind():
    def strength(num_drafts):
        generator = random.Random(0)
        texts = [playground.generate_review(generator, num_drafts=num_drafts).completion for _ in range(200)]
        assert playground.grammaticality(texts) == [1.0] * 200
        return np.mean(np.abs(playground.sentiment_reward(texts)))

    assert strength(4) > strength(1) + 0.1
    assert reviews(20) == reviews(20)


def test_tokenizer_round_trip_and_alignment():
    tokenizer = playground.build_tokenizer()
    for review in reviews(100):
        ids = tokenizer(review.text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == review.text
        assert len(ids) == len(split_words(review.text)) == len(playground.token_truth(review.text))
        prompt = tokenizer(review.prompt)["input_ids"]
        assert ids[: len(prompt)] == prompt
    chat = [{"role": "user", "content": "we saw the film ."}, {"role": "assistant", "content": "the plot was good ."}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "we saw the film . the plot was good .<eos>"


@pytest.mark.parametrize("conversational", [False, True])
def test_pairs(conversational):
    data = playground.preference_dataset(50, conversational=conversational)
    for row in data:
        chosen, rejected = (playground.sentiment_reward([row[side]])[0] for side in ("chosen", "rejected"))
        assert chosen - rejected >= 0.3
    splits = playground.load_playground_dataset(30, 10)
    assert len(splits["train"]) == 30 and len(splits["test"]) == 10
    assert not {row["chosen"] for row in splits["train"]} & {row["chosen"] for row in splits["test"]}


def test_base_model_is_trained_once(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = BaseModelSettings(
        steps=2, batch_size=4, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2
    )
    path = base_model_path(tmp_path, show_progress=False, settings=settings)
    assert AutoModelForCausalLM.from_pretrained(path).config.vocab_size == len(AutoTokenizer.from_pretrained(path))
    modified = (path / "model.safetensors").stat().st_mtime_ns
    assert base_model_path(tmp_path, show_progress=False, settings=settings) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == modified
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir() and entry != path]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "trl_ext" / "playground"


def test_key_changes_with_what_decides_the_model(monkeypatch):
    keys = {BaseModelSettings().key(), BaseModelSettings(seed=1).key(), BaseModelSettings(steps=7).key()}
    monkeypatch.setitem(SENTIMENT, "new", 1.0)
    assert BaseModelSettings().key() in keys
    monkeypatch.setattr("trl_ext.playground.grammar.PATTERNS", (("the {aspect} was {adjective} .", 1.0),))
    keys.add(BaseModelSettings().key())
    assert len(keys) == 4


def test_base_model_depends_on_its_seed_alone(tmp_path):
    """Neither on the random numbers of the process, which it leaves as they were, nor on the number of threads."""

    def seed_all(seed):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_all(3)
    expected, threads = drawn(), torch.get_num_threads()
    settings = BaseModelSettings(steps=2, batch_size=16, hidden_size=64, intermediate_size=128, num_layers=1)
    found = []
    for seed, number in ((3, 1), (4, 2), (5, 3)):
        seed_all(seed)
        torch.set_num_threads(number)
        try:
            path = base_model_path(tmp_path / str(seed), show_progress=False, settings=settings)
            assert torch.get_num_threads() == number and (seed != 3 or drawn() == expected)
        finally:
            torch.set_num_threads(threads)
        found.append((path / "model.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: playground.preference_dataset(0), "`num_pairs`.*0"),
        (lambda: playground.prompts(-1), "`num_prompts`.*-1"),
        (lambda: playground.resolve("playgroun"), "playgroun.*'playground'"),
        (lambda: BaseModelSettings(steps=0), "`steps`.*0"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_recipes_know_every_base_model():
    assert set(playground.MODELS) == set(PLAYGROUND_MODELS)
    assert playground.MODELS["playground-small"] == BaseModelSettings.of_one_mind()


def test_negators_are_no_sentiment_words():
    assert not set(NEGATORS) & set(SENTIMENT)
