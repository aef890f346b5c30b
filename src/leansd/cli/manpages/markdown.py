"""The manual as a page of the documentation."""

import re
from collections.abc import Iterable

from leansd.cli.manpages.sections import Section

TITLE = (
    "# Command line\n\n"
    "<!-- Written by `make manual` from the commands themselves: change their help, not this. -->"
)


def write_markdown(sections: Iterable[Section]) -> str:
    """Markdown: a heading a command, a list of what it takes, its examples to copy."""
    return "\n\n".join([TITLE, *map(_write_section, sections)]) + "\n"


def _write_section(section: Section) -> str:
    heads = {1: f"## {section.title}", 2: f"### {section.title}", 3: f"**{section.title}**"}
    code = "\n".join(["```sh", *section.code, "```"]) if section.code else ""
    terms = "\n".join(f"- `{term}`: {_escape(text)}" for term, text in section.terms)
    paragraphs = map(_escape, section.paragraphs)
    return "\n\n".join(each for each in (heads[section.level], code, *paragraphs, terms) if each)


def _escape(text: str) -> str:
    marked = re.sub(r"([\\`*_\[\]])", r"\\\1", text)
    return marked.replace("<", "&lt;").replace(">", "&gt;")
