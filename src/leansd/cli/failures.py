"""What goes wrong while a command runs, in one line each, and what to do about it."""

MEMORY = "draw fewer at once (--batch), smaller (--size), or on another --device"


def explain_failure(error: Exception) -> str | None:
    """One line for what a machine or a file system did; None for what only a developer can mend."""
    text = str(error)
    # By name: torch is not imported for the sake of its errors.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {MEMORY}"
    if isinstance(error, RuntimeError) and "not enough memory" in text:
        return f"out of memory: {MEMORY}"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror.lower()}{where}"
    return None
