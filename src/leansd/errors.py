"""The one error that a user's mistake raises, and what is told of those of libraries."""


class LeansdError(ValueError):
    """A mistake that the user can mend.

    The message is one line that names what is wrong and what would be right. The command line
    prints it and exits with code 2; a script sees an ordinary `ValueError`.
    """


class OutputError(LeansdError):
    """A file cannot be written: the disk is full, or the folder may not be written to."""


def read_cause(error: Exception) -> str:
    """The first line of a library's message, which may run over many; its class without one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
