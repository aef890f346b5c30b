"""Commands as data: what each takes and gives, read off the Typer app."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any

from leansd.cli.examples import read_examples


@dataclass(frozen=True)
class Parameter:
    """An argument or option as it is typed, and what it says."""

    typed: str
    text: str


@dataclass(frozen=True)
class Page:
    """A command."""

    name: str
    usage: str
    paragraphs: tuple[str, ...]
    arguments: tuple[Parameter, ...]
    options: tuple[Parameter, ...]
    examples: tuple[str, ...]
    is_group: bool
    """Whether sub-commands follow it."""


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
        arguments=tuple(_describe(each, _type_argument(each)) for each in arguments),
        options=tuple(_describe(each, _type_option(each)) for each in options),
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
    if option.is_flag:
        return names
    return f"{names} {option.metavar or option.name.upper()}"


def _describe(parameter: Any, typed: str) -> Parameter:
    text = " ".join((parameter.help or "").split())
    default = _show_default(parameter)
    remarks = [
        *(["Required."] if parameter.required else []),
        *([f"Default: {default}."] if default else []),
    ]
    return Parameter(typed, " ".join([text, *remarks]))


def _show_default(parameter: Any) -> str:
    """The default where it says something: flags are off, and no value is no news."""
    default = parameter.default
    if default is None or default is False or default == "" or callable(default):
        return ""
    return parameter.opts[0] if default is True else str(default)
