"""How a run ends that cannot begin or was told to end: its error, its exit status, and how `trl-ext` learns of it."""

# EX_TEMPFAIL of sysexits.h: the run is not over, start it again
REQUEUE_STATUS = 75
# Set by `trl-ext`: a file in which the run leaves its status, which launchers do not hand on
STATUS_FILE_VARIABLE = "TRL_EXT_STATUS_FILE"


class RunError(ValueError):
    """A run that cannot begin or go on as asked, with what to do; commands end with its message alone."""
