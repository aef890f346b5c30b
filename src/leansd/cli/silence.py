"""Whether the command that runs says what it is doing, or only what came of it."""

_silent = False


def keep_silent(asked: bool) -> bool:
    """What `--quiet` does; every command that has the option says so anew."""
    global _silent
    _silent = asked
    return asked


def is_silent() -> bool:
    """Whether progress and notes are left out."""
    return _silent
