"""Settings of feedback weights that heads, models and trainers share, checked in one place."""

from typing import Literal, get_args


FeedbackName = Literal["symmetric", "asymmetric"]


def check_feedback(feedback: str, feedback_angle: float, prefix: str = "") -> None:
    """
    Refuses feedback weights that cannot be built.

    Args:
        feedback (`str`):
            `"symmetric"` or `"asymmetric"`.
        feedback_angle (`float`):
            Degrees between feedback weights and the transposed forward ones at the start.
        prefix (`str`, *optional*, defaults to `""`):
            What the names of the two settings begin with where the user gave them.

    Raises:
        ValueError: If `feedback` is neither, the angle is not from 0 to 180, or it is not 0 with symmetric feedback.
    """
    names = list(get_args(FeedbackName))
    if feedback not in names:
        raise ValueError(f"`{prefix}feedback` must be one of {names}, got {feedback!r}.")
    if not 0 <= feedback_angle <= 180:
        raise ValueError(f"`{prefix}feedback_angle` must be from 0 to 180 degrees, got {feedback_angle}.")
    if feedback == "symmetric" and feedback_angle != 0:
        raise ValueError(
            f"`{prefix}feedback_angle` is {feedback_angle} but `{prefix}feedback` is 'symmetric', which has an angle "
            f"of 0 throughout. Set `{prefix}feedback='asymmetric'`."
        )


def check_homeostasis(homeostasis_coef: float, feedback: str, prefix: str = "") -> None:
    """
    Refuses a weight of the homeostasis objective that cannot be used.

    Args:
        homeostasis_coef (`float`):
            Weight.
        feedback (`str`):
            `"symmetric"` or `"asymmetric"`.
        prefix (`str`, *optional*, defaults to `""`):
            As in [`check_feedback`].

    Raises:
        ValueError: If it is negative or not finite, or above 0 with symmetric feedback.
    """
    if not 0 <= homeostasis_coef < float("inf"):
        raise ValueError(
            f"`{prefix}homeostasis_coef` must not be negative and must be finite, got {homeostasis_coef}. Set it to 0 "
            "to go without."
        )
    if homeostasis_coef > 0 and feedback == "symmetric":
        raise ValueError(
            f"`{prefix}homeostasis_coef={homeostasis_coef}` has nothing to do where `{prefix}feedback='symmetric'`. "
            f"Leave it at 0, or use `{prefix}feedback='asymmetric'`."
        )
