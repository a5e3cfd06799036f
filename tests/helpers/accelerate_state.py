"""What accelerate keeps for the process, which every trainer reads and every `TrainingArguments` may empty."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def accelerate_state_kept() -> Iterator[None]:
    """
    Fills accelerate's state again where it is empty at the end: transformers empties it for training arguments, and
    those that no trainer is made of leave it so under the trainers made before.
    """
    accelerate = sys.modules.get("accelerate.state")
    before = dict(accelerate.AcceleratorState._shared_state) if accelerate else {}
    yield
    if before and not accelerate.AcceleratorState._shared_state:
        accelerate.AcceleratorState._shared_state.update(before)
