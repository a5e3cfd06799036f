"""Python reward functions that may fail, hang, or say what each token earned.

TRL calls a reward function once a batch and takes a number for each completion. [`guarded`] stands between the two: it
limits the time of a call, tries again, and hands TRL the sums of what tokens earned. Whatever a function raises is
raised as it is, with a note that names the reward and the prompt ([`note_failure`]).
"""

import asyncio
import contextvars
import functools
import logging
import math
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch
from torch import nn

from .._upstream import is_async_callable
from .reward_lengths import keep_within_positions


logger = logging.getLogger(__name__)
# Characters of a prompt that an error shows
_SHOWN = 200


def guarded(rewards: Sequence[Any], names: Sequence[str], args: Any) -> list[Any]:
    """
    The rewards with what `reward_timeout`, `reward_retries` and `token_rewards` ask for.

    Args:
        rewards (`Sequence`):
            Reward functions and models, as [`~trl.GRPOTrainer`] keeps them.
        names (`Sequence[str]`):
            Their names.
        args (`Any`):
            Configuration.

    Returns:
        `list`: for each a [`RewardFunction`], or the reward itself where nothing is asked of it: models, and functions
        without a setting that speaks of them.

    Raises:
        ValueError: If `token_rewards` names no reward, or a model.
    """
    functions = {name for name, reward in zip(names, rewards, strict=True) if not isinstance(reward, nn.Module)}
    unknown = sorted(set(args.token_rewards) - functions)
    if unknown:
        raise ValueError(
            f"`token_rewards={args.token_rewards}` names {unknown}, and the reward functions are {sorted(functions)}. "
            "Name functions that return a list of numbers, one a token, for each completion."
        )
    every = args.reward_timeout is not None or args.reward_retries > 0
    found = []
    for name, reward in zip(names, rewards, strict=True):
        # Async ones too: an error from the event loop says nothing of whose it is
        asked = every or name in args.token_rewards or is_async_callable(reward)
        if isinstance(reward, nn.Module):
            keep_within_positions(reward, name)
        if name not in functions or not asked:
            found.append(reward)
            continue
        kind = AsyncRewardFunction if is_async_callable(reward) else RewardFunction
        found.append(
            kind(
                reward,
                name,
                args.reward_timeout,
                args.reward_retries,
                args.reward_retry_seconds,
                name in args.token_rewards,
            )
        )
    return found


class RewardFunction:
    """
    A reward function with a limit on its time, retries, and a number for each token if it gives that.

    Args:
        function (`Callable`):
            Reward function.
        name (`str`):
            Its name in errors.
        timeout (`float`, *optional*):
            Seconds that a call may take. Python cannot end the call: it goes on, unheard, in a thread of its own.
        retries (`int`, *optional*, defaults to `0`):
            Calls after one that failed or took too long.
        pause (`float`, *optional*, defaults to `1.0`):
            Seconds before the first retry, doubled before each further one.
        gives_tokens (`bool`, *optional*, defaults to `False`):
            Whether it returns, for each completion, a list with a number for each of its tokens.

    Attributes:
        token_rewards (`list[list[float]]` or `None`): What each token of the last batch earned.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        timeout: float | None = None,
        retries: int = 0,
        pause: float = 1.0,
        gives_tokens: bool = False,
    ):
        self.function, self.name, self.__name__ = function, name, name
        self.timeout, self.retries, self.pause, self.gives_tokens = timeout, retries, pause, gives_tokens
        self.token_rewards: list[list[float]] | None = None

    def __call__(self, **batch: Any) -> list[Any]:
        for attempt in range(self.retries + 1):
            try:
                output = self._once(batch)
                break
            except Exception as error:
                if attempt == self.retries:
                    note_failure(error, self.name, batch, self._failing_row(error, batch))
                    raise
                time.sleep(self._warn(error, attempt))
        return self._numbers(output, batch)

    def _once(self, batch: dict[str, Any]) -> Any:
        if self.timeout is None:
            return self.function(**batch)
        return call_within(self.timeout, functools.partial(self.function, **batch))

    def _warn(self, error: Exception, attempt: int) -> float:
        """Says that a call failed and gives the seconds to the next."""
        pause = self.pause * 2**attempt
        logger.warning(
            f"The reward {self.name!r} failed with {_stated(error)}; call {attempt + 2} of {self.retries + 1} comes "
            f"in {pause:g} s."
        )
        return pause

    def _failing_row(self, error: Exception, batch: dict[str, Any]) -> int | None:
        search = failing_row(error, len(batch["prompts"]))
        try:
            part = next(search)
            while True:
                part = search.send(self._error_of(rows_of(batch, part)))
        except StopIteration as found:
            return found.value

    def _error_of(self, batch: dict[str, Any]) -> Exception | None:
        try:
            self._once(batch)
        except Exception as error:
            return error
        return None

    def _numbers(self, output: Any, batch: dict[str, Any]) -> list[Any]:
        """One number for each completion, the sum over its tokens where those have their own."""
        if not self.gives_tokens:
            return output
        ids = batch["completion_ids"]
        if len(output) != len(ids):
            raise ValueError(
                f"The reward {self.name!r} returned {len(output)} lists for {len(ids)} completions. Return one for "
                "every completion."
            )
        self.token_rewards = [
            self._tokens(values, len(own), row) for row, (values, own) in enumerate(zip(output, ids, strict=True))
        ]
        return [math.fsum(values) for values in self.token_rewards]

    def _tokens(self, values: Any, count: int, row: int) -> list[float]:
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, list | tuple):
            raise ValueError(
                f"The reward {self.name!r} returned {values!r} for the completion in row {row}, and `token_rewards` "
                f"says that it gives a number for each token. Return a list of {count} numbers, or leave it out there."
            )
        if len(values) != count:
            raise ValueError(
                f"The reward {self.name!r} returned {len(values)} numbers for the completion in row {row}, which has "
                f"{count} tokens. Return one for each of its `completion_ids`."
            )
        return [math.nan if value is None else float(value) for value in values]


class AsyncRewardFunction(RewardFunction):
    """A [`RewardFunction`] for an async one, which a limit on its time cancels."""

    async def __call__(self, **batch: Any) -> list[Any]:  # type: ignore[override]
        for attempt in range(self.retries + 1):
            try:
                output = await self._once_async(batch)
                break
            except Exception as error:
                if attempt == self.retries:
                    note_failure(error, self.name, batch, await self._failing_row_async(error, batch))
                    raise
                await asyncio.sleep(self._warn(error, attempt))
        return self._numbers(output, batch)

    async def _once_async(self, batch: dict[str, Any]) -> Any:
        try:
            return await asyncio.wait_for(self.function(**batch), self.timeout)
        except TimeoutError as error:
            if error.args or self.timeout is None:  # the function's own
                raise
            raise _too_long(self.timeout) from error

    async def _failing_row_async(self, error: Exception, batch: dict[str, Any]) -> int | None:
        search = failing_row(error, len(batch["prompts"]))
        try:
            part = next(search)
            while True:
                part = search.send(await self._error_of_async(rows_of(batch, part)))
        except StopIteration as found:
            return found.value

    async def _error_of_async(self, batch: dict[str, Any]) -> Exception | None:
        try:
            await self._once_async(batch)
        except Exception as error:
            return error
        return None


def call_within(seconds: float, call: Callable[[], Any]) -> Any:
    """
    What a call returns or raises.

    Args:
        seconds (`float`):
            Time that it may take.
        call (`Callable`):
            Called in a thread of its own, which an endless call keeps, but which keeps no program from ending.

    Returns:
        `Any`: what the call returned.

    Raises:
        TimeoutError: If it takes longer.
    """
    future: Future[Any] = Future()
    context = contextvars.copy_context()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            future.set_result(context.run(call))
        except BaseException as error:  # a thread must not swallow what its call raised
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError as error:
        if future.done():  # the call's own
            raise
        raise _too_long(seconds) from error


def _too_long(seconds: float) -> TimeoutError:
    return TimeoutError(f"The call took longer than `reward_timeout={seconds:g}` seconds.")


def rows_of(batch: dict[str, Any], rows: range) -> dict[str, Any]:
    """Those rows of a batch of reward arguments; what they log is dropped."""
    count = len(batch["prompts"])
    part = {
        name: [value[row] for row in rows] if isinstance(value, list) and len(value) == count else value
        for name, value in batch.items()
    }
    # Both take a name and a value, which go into a dictionary that nobody keeps
    return part | {name: {}.__setitem__ for name in ("log_extra", "log_metric") if name in batch}


def failing_row(error: Exception, count: int) -> Generator[range, Exception | None, int | None]:
    """
    Searches by halves for the row of a batch that alone raises what the batch raised.

    Args:
        error (`Exception`):
            What the batch raised. A call that took too long is not searched for.
        count (`int`):
            Rows of the batch.

    Yields:
        `range`: rows to call the function on, and to send what it raised, or `None`.

    Returns:
        `int` or `None`: the row; `None` where no row alone fails so.
    """
    if isinstance(error, TimeoutError) or count == 0:
        return None
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if (yield range(low, middle)) is not None else (middle, high)
    found = yield range(low, high)
    return low if type(found) is type(error) else None


def note_failure(error: Exception, name: str, batch: dict[str, Any], row: int | None) -> None:
    """
    Adds to an error of a reward function which reward it was and on what prompt.

    Args:
        error (`Exception`):
            Error, to which a note is added.
        name (`str`):
            Name of the reward.
        batch (`dict[str, Any]`):
            What it was called with.
        row (`int`, or `None`):
            Row that failed, or `None` if it is not known.
    """
    prompts = batch["prompts"]
    if row is None:
        first = f", of which the first is {_shown(prompts[0])}" if prompts else ""
        error.add_note(f"The reward {name!r} failed on a batch of {len(prompts)} prompts{first}.")
    else:
        error.add_note(f"The reward {name!r} failed on the prompt {_shown(prompts[row])} (row {row} of its batch).")


def note_reward(error: Exception, rewards: Sequence[Any], names: Sequence[str], batch: dict[str, Any]) -> None:
    """
    [`note_failure`] for an error that came through TRL, from the reward function that its traceback goes through.

    Args:
        error (`Exception`):
            What `_calculate_rewards` raised.
        rewards (`Sequence`):
            Reward functions and models.
        names (`Sequence[str]`):
            Their names.
        batch (`dict[str, Any]`):
            What they were called with.
    """
    own = [
        (name, reward, _code_of(reward))
        for name, reward in zip(names, rewards, strict=True)
        if not isinstance(reward, nn.Module | RewardFunction)  # which note it themselves
    ]
    failed: list[tuple[str, Any]] = []
    trace = error.__traceback__
    while trace is not None and not failed:
        failed = [(name, reward) for name, reward, code in own if code is trace.tb_frame.f_code]
        trace = trace.tb_next
    # Functions from one factory have the same code; the one that fails again is meant
    for name, reward in failed:
        row = RewardFunction(reward, name)._failing_row(error, batch)
        if row is not None:
            note_failure(error, name, batch, row)
            return
    if failed:
        note_failure(error, " or ".join(name for name, _ in failed), batch, None)


def _code_of(function: Any) -> Any:
    """The code that a call of a function or of an object runs."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)


def _shown(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _stated(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def token_reward_tensors(values: dict[int, list[list[float]]], mask: torch.Tensor) -> dict[int, torch.Tensor]:
    """
    What tokens earned, beside their mask.

    Args:
        values (`dict[int, list[list[float]]]`):
            A number for each token of each completion, by the index of the reward.
        mask (`torch.Tensor` of shape `(B, T)`):
            Response tokens; completions begin at its first column.

    Returns:
        `dict[int, torch.Tensor]`: `(B, T)`, float32, zero behind a completion.
    """
    width = mask.size(1)
    return {
        index: torch.tensor([row[:width] + [0.0] * (width - len(row)) for row in rows], device=mask.device)
        for index, rows in values.items()
    }


def check_reward_functions(args: Any) -> None:
    """Refuses settings of reward functions and their ensembles that cannot be used."""
    names = args.token_rewards
    if names and (args.use_score_scaling or args.score_clip is not None):
        setting = "use_score_scaling" if args.use_score_scaling else "score_clip"
        raise ValueError(
            f"`{setting}` acts on the reward of a whole response, and `token_rewards={names}` come with their tokens. "
            "Leave out one of them."
        )
