import asyncio
import functools
import time

import pytest
import torch

from tests.helpers.constrained_ppo import length, low_ids, make, rollout
from trl_ext import ConstrainedPPOConfig
from trl_ext.constrained_ppo.reward_functions import AsyncRewardFunction, RewardFunction, guarded, note_reward


BATCH = {
    "prompts": ["one", "two", "three", "four", "five"],
    "completions": list("abcde"),
    "completion_ids": [[1], [2, 3], [4], [5], [6]],
    "answer": [1, 2, 3, 4, 5],
    "log_metric": lambda name, value: None,
}


def config(**settings):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "use_cpu": True, "bf16": False, **settings}
    return ConstrainedPPOConfig("unused", method="ppo", **settings)


def call(function, kind, **settings):
    """A guarded call, of the function or of an async one that calls it."""
    if kind is RewardFunction:
        return RewardFunction(function, "judge", **settings)(**BATCH)

    async def asynchronous(**batch):
        await asyncio.sleep(0)
        return function(**batch)

    return asyncio.run(AsyncRewardFunction(asynchronous, "judge", **settings)(**BATCH))


def fails_on_four(prompts, completions, answer, log_metric, **columns):
    log_metric("judge/asked", len(prompts))
    if "four" in prompts:
        raise KeyError("score")
    return answer


@pytest.mark.parametrize("kind", [RewardFunction, AsyncRewardFunction])
def test_an_error_names_reward_and_prompt(kind):
    with pytest.raises(KeyError) as caught:
        call(fails_on_four, kind)
    assert caught.value.__notes__ == ["The reward 'judge' failed on the prompt 'four' (row 3 of its batch)."]


@pytest.mark.parametrize("kind", [RewardFunction, AsyncRewardFunction])
def test_what_fails_twice_is_called_three_times(kind, monkeypatch):
    pauses, calls = [], []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def flaky(prompts, **columns):
        calls.append(len(prompts))
        if len(calls) < 3:
            raise ConnectionError("busy")
        return [0.5] * len(prompts)

    pause = 0.001
    assert call(flaky, kind, retries=2, pause=pause) == [0.5] * 5 and calls == [5, 5, 5]
    assert kind is AsyncRewardFunction or pauses == [pause, 2 * pause]
    calls.clear()
    with pytest.raises(ConnectionError) as caught:
        call(flaky, kind, retries=1, pause=0)
    # No row fails alone any more
    assert "batch of 5 prompts, of which the first is 'one'" in caught.value.__notes__[0]


@pytest.mark.parametrize("kind", [RewardFunction, AsyncRewardFunction])
def test_what_hangs_is_given_up(kind):
    async def hangs(**batch):
        await asyncio.sleep(60)

    if kind is RewardFunction:
        function = RewardFunction(lambda **batch: time.sleep(5), "judge", timeout=0.05)
    else:
        asynchronous = AsyncRewardFunction(hangs, "judge", timeout=0.05)
        function = lambda **batch: asyncio.run(asynchronous(**batch))  # noqa: E731
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="`reward_timeout=0.05`") as caught:
        function(**BATCH)
    assert time.monotonic() - start < 3 and "'judge'" in caught.value.__notes__[0]
    # In time, and its own errors pass through
    assert call(lambda answer, **batch: answer, kind, timeout=30) == [1, 2, 3, 4, 5]
    with pytest.raises(KeyError):
        call(fails_on_four, kind, timeout=30)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([[1.0], [2.0], [1.0], [1.0], [1.0]], "'judge' returned 1 numbers for the completion in row 1, which has 2"),
        ([[1.0], 2.0, [1.0], [1.0], [1.0]], "returned 2.0 for the completion in row 1.*list of 2 numbers"),
        ([[1.0]], "returned 1 lists for 5 completions"),
    ],
)
def test_rewards_of_tokens_that_do_not_fit(output, message):
    with pytest.raises(ValueError, match=message):
        call(lambda **batch: output, RewardFunction, gives_tokens=True)


def test_which_functions_are_guarded():
    async def asynchronous(**batch):
        return [1.0]

    rewards, names = [low_ids, torch.nn.Linear(1, 1), asynchronous], ["low_ids", "model", "asynchronous"]
    kinds = [type(reward) for reward in guarded(rewards, names, config())]
    assert kinds == [type(low_ids), torch.nn.Linear, AsyncRewardFunction]
    args = config(reward_timeout=1.0)
    assert type(guarded(rewards, names, args)[0]) is RewardFunction
    args = config(token_rewards=["model"])
    with pytest.raises(ValueError, match=r"`token_rewards=\['model'\]` names \['model'\].*asynchronous"):
        guarded(rewards, names, args)


def test_functions_from_one_factory_are_told_apart():
    def factory(bad):
        def scored(prompts, **columns):
            if bad in prompts:
                raise RuntimeError("no score")
            return [1.0] * len(prompts)

        return scored

    rewards = [factory("never"), functools.partial(factory("two"))]
    assert rewards[0](**BATCH) == [1.0] * 5
    with pytest.raises(RuntimeError) as caught:
        rewards[1](**BATCH)
    note_reward(caught.value, rewards, ["first", "second"], BATCH)
    assert caught.value.__notes__ == ["The reward 'second' failed on the prompt 'two' (row 1 of its batch)."]


def each_token(completion_ids, **columns):
    """Token by token, in every form that a function may return."""
    values = [[0.1 * (index % 7) for index in ids] for ids in completion_ids]
    return [torch.tensor(values[0]), *values[1:]]


async def each_token_later(completion_ids, **columns):
    return each_token(completion_ids)


@pytest.mark.parametrize("reward", [each_token, each_token_later])
def test_rewards_of_tokens_reach_the_critic_and_constraints_their_sum(reward, tmp_path, path):
    name = reward.__name__
    trainer = make(
        tmp_path, path, rewards=[length, reward], token_rewards=[name], gamma=1.0, gae_lambda=1.0, method="xi",
        constraints=[{"reward": name, "threshold": 1.0}],
    )  # fmt: skip
    with torch.no_grad():
        trainer.model.lm_head.weight[1] *= 4  # ends early about as often as not
    batch = rollout(trainer)
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    assert (mask == 0).any()
    earned = 0.1 * (ids % 7) * mask
    torch.testing.assert_close(trainer.rollout.rewards[:, 1], earned.sum(dim=1))
    # Without values and discount a return is what is still to be earned
    to_come = earned.flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(batch["state_returns"][..., 1], to_come)
    torch.testing.assert_close(batch["state_returns"][..., 0], mask.sum(1, keepdim=True) / 8 * mask)
    observed = trainer.multipliers.state_dict()["observed"][-1]
    assert observed == pytest.approx([float(earned.sum(dim=1).mean())])


def test_errors_in_training_name_reward_and_prompt(tmp_path, path):
    def broken(prompts, **columns):
        return [1 / (prompt != "a book") for prompt in prompts]

    def silent(prompts, **columns):
        return [None if prompt == "a book" else 1.0 for prompt in prompts]

    trainer = make(tmp_path, path, rewards=[low_ids, broken])
    with pytest.raises(ZeroDivisionError) as caught:
        rollout(trainer)
    assert caught.value.__notes__ == ["The reward 'broken' failed on the prompt 'a book' (row 1 of its batch)."]
    trainer.reward_funcs = [low_ids, silent]
    with pytest.raises(ValueError, match=r"\['broken'\].*row 1 of the rollout, whose prompt is 'a book'"):
        rollout(trainer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_timeout": 0}, "`reward_timeout` must be a number greater than 0, got 0"),
        ({"reward_retries": 1.5}, "`reward_retries` must be a whole number of at least 0, got 1.5"),
        ({"reward_retry_seconds": -1}, "`reward_retry_seconds`.*got -1"),
        ({"token_rewards": "length"}, "`token_rewards` must be a list of texts, got 'length'"),
        ({"critic_lambda": 1.5}, "`critic_lambda`.*got 1.5"),
        ({"adaptive_lambda_alpha": 0.0}, "`adaptive_lambda_alpha`.*greater than 0"),
        ({"ensemble_alarm": "ring"}, "`ensemble_alarm` must be one of 'warn', 'stop', got 'ring'"),
        ({"critic_warmup_steps": -1}, "`critic_warmup_steps`.*got -1"),
        ({"critic_warmup_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau"}, "`critic_warmup_steps=1` holds"),
        ({"critic_score_reward": "length"}, "`critic_score_reward='length'` needs `critic='separate'`"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
