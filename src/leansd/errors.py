"""The one error that a user's mistake raises."""


class LeansdError(ValueError):
    """A mistake that the user can mend.

    The message is one line that names what is wrong and what would be right. The command line
    prints it and exits with code 2; a script sees an ordinary `ValueError`.
    """


class OutputError(LeansdError):
    """A file cannot be written: the disk is full, or the folder may not be written to."""
