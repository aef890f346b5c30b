"""The manual as it is read at a terminal."""

from collections.abc import Iterable, Iterator
from textwrap import fill

from leansd.cli.manpages.sections import Section

WIDTH = 80
STEP = 4


def write_text(sections: Iterable[Section]) -> str:
    """Plain text of at most 80 columns, laid out like a man page."""
    return "\n\n".join("\n\n".join(_write_section(each)) for each in sections) + "\n"


def _write_section(section: Section) -> Iterator[str]:
    """The parts of a section, with an empty line between each."""
    title = section.title.upper() if section.level == 1 else section.title
    above, margin = (" " * STEP * level for level in (section.level - 1, section.level))
    head = above + title
    code = "\n".join(margin + line for line in section.code)
    terms = "\n".join(
        f"{margin}{term}\n{_fill(text, margin + ' ' * STEP)}" for term, text in section.terms
    )
    paragraphs = (_fill(each, margin) for each in section.paragraphs)
    # A heading stands on what follows it.
    first, *others = [each for each in (code, *paragraphs, terms) if each] or [""]
    yield f"{head}\n{first}".rstrip()
    yield from others


def _fill(text: str, margin: str) -> str:
    # Options and addresses stay whole.
    return fill(
        text,
        WIDTH,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
