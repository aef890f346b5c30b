"""What is drawn where the user asks for nothing else, and prompts from files."""

from pathlib import Path

from leansd.errors import LeansdError

PROMPTS = (
    "a red apple, noto style",
    "a red heart, twemoji style",
    "a smiling face with sunglasses, twemoji style",
    "a cat face, twemoji style",
    "a cactus, noto style",
    "a grinning face, twemoji style",
    "a basketball, noto style",
    "a pizza, twemoji style",
)

GUIDANCE = 4.0
"""Guidance scale for the embedded model; the pipeline's default makes its colours hard."""


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a text file, one a line; blank lines and lines that begin with # do not count.

    Raises:
        LeansdError: the file is not there or not text, or has fewer than 2 different prompts.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise LeansdError(f"cannot read prompts from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LeansdError(f"{path} is not a file of prompts: it is not text") from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if len(set(prompts)) < 2:
        raise LeansdError(
            f"too few prompts in {path}: a set needs 2 different ones at least, one a line"
        )
    return prompts
