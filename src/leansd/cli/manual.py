"""`leansd manual`: all commands on one page, made from the commands themselves.

Typer's and click's own writers do not serve: they know neither commands that are imported late nor
sections that all commands share, and give one man page for each command.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import cleandoc
from pathlib import Path
from pydoc import pager
from textwrap import fill
from typing import Any

import typer

from leansd.cli.command import PROGRAM, Result, argument, command, option, read_examples
from leansd.cli.options import offer
from leansd.errors import LeansdError
from leansd.files import check_file, write_file

app = typer.Typer(add_completion=False)

OUTPUT = (
    "Results go to standard output; progress and notes go to standard error, and progress only to "
    "a terminal. --quiet leaves both out: results, warnings and errors remain.",
    "--json ends standard output with one line that holds one JSON object. demo and profile always "
    "end so, and --json leaves out what comes before it.",
)
EXIT_CODES = (
    ("0", "Done."),
    (
        "1",
        "Something went wrong on the way: no memory or disk left, a file not to be written, a "
        "picture that shows nothing.",
    ),
    (
        "2",
        "The command or what it was given is wrong: an option, a number, a name or a file. One "
        "line on standard error says what, and what would be right; nothing was written.",
    ),
    ("130", "Stopped by Ctrl-C. What can be resumed says so in its own help."),
)
ENVIRONMENT = (
    ("NO_COLOR", "Set to anything: no colours."),
    ("COLUMNS", "Width of help and tables; the terminal's own by default."),
    ("HF_HUB_OFFLINE", "Set to 1: models by hub id are taken from the local cache only."),
    ("HF_HOME", "Where models by hub id are kept; ~/.cache/huggingface by default."),
)
COMPLETION = (
    "leansd --install-completion teaches the shell that runs it (bash, zsh, fish, PowerShell) the "
    "commands, their options, and the names of presets, samplers, surgeries and models.",
)

Terms = tuple[tuple[str, str], ...]
"""What is explained, each with its explanation."""


@dataclass(frozen=True)
class Page:
    """A command, read off the Typer app."""

    name: str
    usage: str
    paragraphs: tuple[str, ...]
    arguments: Terms
    options: Terms
    examples: tuple[str, ...]
    is_group: bool
    """Whether sub-commands follow it."""


@dataclass(frozen=True)
class ManualSection:
    """A heading of `level` 1 to 3 and, in this order, what stands below it."""

    title: str
    level: int
    code: tuple[str, ...] = ()
    paragraphs: tuple[str, ...] = ()
    terms: Terms = ()


@command(
    app,
    "manual",
    "leansd manual",
    "leansd manual generate",
    "leansd manual --to roff --out leansd.1",
    json=None,
)
def show_manual(
    words: list[str] | None = argument(
        None, "Only this command; all of them by default.", metavar="COMMAND"
    ),
    to: str = option(
        "text", "text, markdown, or roff for man.", autocompletion=offer("text", "markdown", "roff")
    ),
    out: Path | None = option(None, "File to write; the terminal by default.", "--out", "-o"),
) -> Result | None:
    """Show every command with its options and examples, or write that as a file."""

    from leansd.cli import open_program

    if to not in FORMS:
        raise LeansdError(f"no form {to!r}: give {', '.join(FORMS)}")
    if out is not None:
        check_file(out)
    pages = {page.name: page for page in read_pages(open_program(), PROGRAM)}
    sections = list(compose(pages.values()))
    if words:
        name = " ".join([PROGRAM, *words])
        if name not in pages:
            near = get_close_matches(name, pages, n=1)
            raise LeansdError(
                f"no command {name!r}; "
                + (f"did you mean {near[0]!r}?" if near else "leansd --help lists them")
            )
        inside = [page for at, page in pages.items() if f"{at} ".startswith(f"{name} ")]
        sections = [section for page in inside for section in compose_page(page)]
    written = FORMS[to](sections)
    if out is not None:
        return Result({}, files=[write_file(out, written)])
    pager(written)
    return None


# -- commands as data --------------------------------------------------------------------------


def read_pages(command: Any, name: str) -> Iterator[Page]:
    """A command's page, then those of its sub-commands."""
    inner: dict[str, Any] = getattr(command, "commands", {})
    known = [each for each in command.params if not getattr(each, "hidden", False)]
    arguments = [each for each in known if each.param_type_name == "argument"]
    options = [each for each in known if each.param_type_name == "option"]
    words = [name, *(["COMMAND ..."] if inner else ["[OPTIONS]"] if options else [])]
    paragraphs = cleandoc(command.help or "").split("\n\n")
    yield Page(
        name=name,
        usage=" ".join([*words, *map(_type_argument, arguments)]),
        paragraphs=tuple(" ".join(each.split()) for each in paragraphs if each),
        arguments=tuple((_type_argument(each), _describe(each)) for each in arguments),
        options=tuple((_type_option(each), _describe(each)) for each in options),
        examples=read_examples(command.epilog),
        is_group=bool(inner),
    )
    for word in inner:
        # A group that imports its commands late opens them by name.
        open_command = getattr(command, "open_command", inner.__getitem__)
        yield from read_pages(open_command(word), f"{name} {word}")


def _type_argument(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[].")
    name += "..." if argument.nargs != 1 else ""
    return name if argument.required else f"[{name}]"


def _type_option(option: Any) -> str:
    names = ", ".join(sorted([*option.opts, *option.secondary_opts], key=lambda o: -len(o)))
    if option.secondary_opts:
        names = ", ".join([*option.opts, *option.secondary_opts])
    return names if option.is_flag else f"{names} {option.metavar or option.name.upper()}"


def _describe(parameter: Any) -> str:
    """A parameter's help, and its default where that says something: not a flag off."""
    text, default = " ".join((parameter.help or "").split()), parameter.default
    remarks = ["Required."] if parameter.required else []
    if default is True:
        remarks.append(f"Default: {parameter.opts[0]}.")
    elif default is not None and default is not False and default != "" and not callable(default):
        remarks.append(f"Default: {default}.")
    return " ".join([text, *remarks])


def compose(pages: Iterable[Page]) -> Iterator[ManualSection]:
    """The sections of the manual; the first page is the program itself."""
    whole, *commands = pages
    yield ManualSection("Name", 1, paragraphs=(f"{whole.name} - {whole.paragraphs[0]}",))
    yield ManualSection("Synopsis", 1, code=(whole.usage,))
    yield ManualSection("Options", 1, terms=whole.options)
    yield ManualSection("Examples", 1, code=whole.examples)
    yield ManualSection("Output", 1, paragraphs=OUTPUT)
    yield ManualSection("Exit codes", 1, terms=EXIT_CODES)
    yield ManualSection("Environment", 1, terms=ENVIRONMENT)
    yield ManualSection("Completion", 1, paragraphs=COMPLETION)
    yield ManualSection("Commands", 1)
    for page in commands:
        yield from compose_page(page)


def compose_page(page: Page) -> Iterator[ManualSection]:
    """The sections of one command."""
    yield ManualSection(page.name, 2, code=(page.usage,), paragraphs=page.paragraphs)
    if page.arguments:
        yield ManualSection("Arguments", 3, terms=page.arguments)
    if page.options:
        yield ManualSection("Options", 3, terms=page.options)
    yield ManualSection("Examples", 3, code=page.examples)


# -- a terminal, a page of the documentation, `man` --------------------------------------------

WIDTH, STEP = 80, 4
MARKDOWN = (
    "# Command line\n\n"
    "<!-- Written by `make manual` from the commands themselves: change their help, not this. -->"
)
ROFF = '.TH LEANSD 1 "" "leansd" "User Commands"\n.nh\n.ad l'


def write_text(sections: Iterable[ManualSection]) -> str:
    """Plain text of at most 80 columns, laid out like a man page."""
    return "\n\n".join(_lay_out(each) for each in sections) + "\n"


def _lay_out(section: ManualSection) -> str:
    title = section.title.upper() if section.level == 1 else section.title
    above, margin = (" " * STEP * level for level in (section.level - 1, section.level))

    def wrap(text: str, margin: str = margin) -> str:
        # Options and addresses stay whole.
        return fill(
            text,
            WIDTH,
            initial_indent=margin,
            subsequent_indent=margin,
            break_long_words=False,
            break_on_hyphens=False,
        )

    code = "\n".join(margin + line for line in section.code)
    terms = "\n".join(
        f"{margin}{term}\n{wrap(text, margin + ' ' * STEP)}" for term, text in section.terms
    )
    parts = [each for each in (code, *map(wrap, section.paragraphs), terms) if each]
    # A heading stands on what follows it.
    return "\n".join([above + title, "\n\n".join(parts)]).rstrip()


def write_markdown(sections: Iterable[ManualSection]) -> str:
    """Markdown: a heading a command, a list of what it takes, its examples to copy."""
    return "\n\n".join([MARKDOWN, *map(_mark_up, sections)]) + "\n"


def _mark_up(section: ManualSection) -> str:
    def escape(text: str) -> str:
        marked = re.sub(r"([\\`*_\[\]])", r"\\\1", text)
        return marked.replace("<", "&lt;").replace(">", "&gt;")

    heads = {1: f"## {section.title}", 2: f"### {section.title}", 3: f"**{section.title}**"}
    code = "\n".join(["```sh", *section.code, "```"]) if section.code else ""
    terms = "\n".join(f"- `{term}`: {escape(text)}" for term, text in section.terms)
    parts = (heads[section.level], code, *map(escape, section.paragraphs), terms)
    return "\n\n".join(each for each in parts if each)


def write_roff(sections: Iterable[ManualSection]) -> str:
    """A man page of section 1."""
    return "\n".join([ROFF, *(line for each in sections for line in _set_roff(each))]) + "\n"


def _set_roff(section: ManualSection) -> list[str]:
    def escape(text: str) -> str:
        plain = text.replace("\\", "\\e").replace("-", "\\-")
        # A dot or a quote that starts a line would be an instruction.
        return f"\\&{plain}" if plain.startswith((".", "'")) else plain

    title = escape(section.title)
    heads = {
        1: [f".SH {title.upper()}"],
        2: [f'.SS "{title}"'],
        3: [".PP", f"\\fI{title}\\fR"],
    }
    lines = heads[section.level]
    if section.code:
        lines += [".PP", ".RS 4", ".EX", *map(escape, section.code), ".EE", ".RE"]
    for paragraph in section.paragraphs:
        lines += [".PP", escape(paragraph)]
    for term, text in section.terms:
        lines += [".TP", f"\\fB{escape(term)}\\fR", escape(text)]
    return lines


FORMS = {"text": write_text, "markdown": write_markdown, "roff": write_roff}
"""Each makes one text of sections."""
