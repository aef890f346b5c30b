"""The manual as `man` reads it."""

from collections.abc import Iterable

from leansd.cli.manpages.sections import Section

HEAD = '.TH LEANSD 1 "" "leansd" "User Commands"\n.nh\n.ad l'


def write_roff(sections: Iterable[Section]) -> str:
    """A man page of section 1."""
    return "\n".join([HEAD, *(line for each in sections for line in _write_section(each))]) + "\n"


def _write_section(section: Section) -> list[str]:
    title = _escape(section.title)
    lines = {
        1: [f".SH {title.upper()}"],
        2: [f'.SS "{title}"'],
        3: [".PP", f"\\fI{title}\\fR"],
    }[section.level]
    if section.code:
        lines += [".PP", ".RS 4", ".EX", *map(_escape, section.code), ".EE", ".RE"]
    for paragraph in section.paragraphs:
        lines += [".PP", _escape(paragraph)]
    for term, text in section.terms:
        lines += [".TP", f"\\fB{_escape(term)}\\fR", _escape(text)]
    return lines


def _escape(text: str) -> str:
    plain = text.replace("\\", "\\e").replace("-", "\\-")
    # A dot or a quote that starts a line would be an instruction.
    return f"\\&{plain}" if plain.startswith((".", "'")) else plain
