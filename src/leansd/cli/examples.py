"""Examples at the end of every help screen: commands that run as they stand."""

from collections.abc import Sequence

HEAD = "Examples:"
MARGIN = "  "


def give_examples(*commands: str, after: Sequence[str] = ()) -> str:
    """The epilog of a command, of lines that start with `leansd`; `after` is more text."""
    # The mark keeps a help screen from running the lines together.
    paragraphs = ["\n".join(["\b", HEAD, *(f"{MARGIN}{command}" for command in commands)]), *after]
    return "\n\n".join(paragraphs)


def read_examples(epilog: str | None) -> tuple[str, ...]:
    """The commands of an epilog."""
    lines = (epilog or "").splitlines()
    return tuple(line.strip() for line in lines if line.startswith(f"{MARGIN}leansd "))
