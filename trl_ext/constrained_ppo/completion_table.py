"""TRL's table of completions in the terminal, with columns of any name."""

from trl import GRPOTrainer

from .._upstream import completion_columns_named
from ..core.safe_text import for_terminal


class CompletionTableMixin(GRPOTrainer):
    """
    Base of [`ConstrainedPPOTrainer`], before TRL's: a reward whose name reads like markup, such as `[/x]`, stands in
    the table of `log_completions` under that name. The table that TRL saves, and what trackers get, have it as it is.
    """

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        with completion_columns_named(for_terminal):
            super().log(logs, start_time)
