"""What all commands share: options declared once, results shown once, one line for a failure.

A command is a function that returns what it found, a `Result`. What is printed, the `--json` line,
pages, records and exit codes are made of it here.
"""

import inspect
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from leansd.cli.terminal import PlanText, fit, keep_silent, show, show_json
from leansd.files import number_files, write_file
from leansd.text import Table

if TYPE_CHECKING:
    from leansd.evaluation.records import Record
    from leansd.report.page import ReportPage

PROGRAM = "leansd"

DONE = 0
FAILED = 1
MISTAKE = 2
STOPPED = 130

GIVEN: ContextVar[Sequence[str]] = ContextVar("given", default=())
"""The words behind `leansd` of the command under way."""


@dataclass(frozen=True)
class Result:
    """What a command found."""

    facts: Mapping[str, Any]
    """For `--json`; the command's name and the files are added."""
    shown: Sequence[Table | PlanText | str] = ()
    """What is printed, in this order."""
    records: Mapping[Path, "Sequence[Record]"] = field(default_factory=dict)
    """Files of records to write."""
    pages: "Mapping[Path, ReportPage]" = field(default_factory=dict)
    """Pages to write."""
    content: Mapping[Path, bytes] = field(default_factory=dict)
    """Other files to write."""
    device: Any = "meta"
    """Where it ran, for the head of pages; nothing ran on `meta`."""
    files: Sequence[Path] = ()
    """What the command itself has written."""
    wrote: str = ""
    """Instead of a list of all files."""
    failure: str = ""
    """What went wrong though there are results; the exit code is then 1."""


Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
OnlyJson = Annotated[
    bool, typer.Option("--json", help="Only the JSON line on standard output, no table.")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=keep_silent,
        expose_value=False,
        help="No progress, no notes: only results, warnings and errors.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write over what an earlier run left in the folder.")
]
Command = Callable[..., "Result | None"]


def command(
    app: typer.Typer,
    name: str,
    *examples: str,
    json: Any = Json,
    keeps: bool = False,
    **settings: Any,
) -> Callable[[Command], Command]:
    """Makes a command of a function that returns what it found.

    A parameter that is a dataclass stands for all its fields, each an option; a default instance
    may have other defaults than the class. `--quiet` and `--json` are added.

    Args:
        name: as it is typed behind `leansd`.
        examples: commands that run as they stand.
        json: the option for JSON: `Json`, `OnlyJson`, or None for a command without facts.
        keeps: whether pages and records have names of ours in a folder of the user's: they go
            beside what an earlier run left there, `report-2.html`, unless `--overwrite` is given.
    """

    def declare(function: Command) -> Command:
        given, groups = _expand(function)
        if json is not None:
            given.append(_make_option("as_json", json, False))
        if keeps:
            given.append(_make_option("overwrite", Overwrite, False))
        given.append(_make_option("quiet", Quiet, False))

        @wraps(function)
        def run(**values: Any) -> int:
            as_json = values.pop("as_json", False)
            values.pop("quiet", None)
            beside = keeps and not values.pop("overwrite")
            for at, kind in groups.items():
                values[at] = kind(**{each.name: values.pop(each.name) for each in fields(kind)})
            result = function(**values)
            if result is None:
                return DONE
            if beside:
                result = _put_beside(result)
            return _present(name, result, as_json, json is OnlyJson)

        run.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in given}
        app.command(name.split()[-1], epilog=give_examples(*examples), **settings)(run)
        return function

    return declare


def option(default: Any, help: str, *names: str, **settings: Any) -> Any:
    """An option of a command or of a dataclass of options; `...` for one that must be given."""
    return _declare(default, typer.Option(*names, help=help, **settings))


def argument(default: Any, help: str, **settings: Any) -> Any:
    """An argument of a command."""
    return _declare(default, typer.Argument(help=help, **settings))


def _declare(default: Any, how: Any) -> Any:
    return field(default=inspect.Parameter.empty if default is ... else default, metadata={1: how})


def _expand(function: Command) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """The parameters of a command, dataclasses replaced by their fields; and the dataclasses."""
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for at, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        kind: Any = hints[at]
        if not is_dataclass(kind):
            parameters.append(_make_option(at, kind, default, default))
            continue
        groups[at] = kind
        inner = get_type_hints(kind, include_extras=True)
        group: Any = kind
        example = group() if default is parameter.empty else default
        for each in fields(kind):
            own = getattr(example, each.name)
            parameters.append(_make_option(each.name, inner[each.name], own, each))
    return parameters, groups


def _make_option(name: str, kind: Any, default: Any, declared: Any = None) -> inspect.Parameter:
    """A parameter as Typer reads it."""
    how = getattr(declared, "metadata", {}).get(1)
    if how is not None:
        kind = Annotated[kind, how]
        default = default.default if default is declared else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _present(name: str, result: Result, as_json: bool, always_json: bool) -> int:
    """Writes and prints a result, and gives the exit code."""
    files = [*result.files, *_write(result)]
    if not (always_json and as_json):
        for each in result.shown:
            show(each)
        if files or result.wrote:
            show(f"wrote {result.wrote or ', '.join(map(str, files))}")
    if as_json or always_json:
        written = {} if "files" in result.facts else {"files": [str(path) for path in files]}
        show_json({"command": name, **result.facts, **written})
    return complain(result.failure, FAILED) if result.failure else DONE


def _put_beside(result: Result) -> Result:
    """The result with the next names that are free for all its pages and records."""
    groups = {name: getattr(result, name) for name in ("pages", "records", "content")}
    free = number_files([path for group in groups.values() for path in group])
    return replace(
        result,
        **{name: {free[at]: each for at, each in group.items()} for name, group in groups.items()},
    )


def _write(result: Result) -> list[Path]:
    others: list[Path] = []
    if result.content:
        others = [write_file(path, content) for path, content in result.content.items()]
    if not result.pages and not result.records:
        return others
    from leansd.evaluation.records import stamp, write_records
    from leansd.report.page import Provenance, write_report

    origin = Provenance(quote_command(), stamp(result.device))
    pages = [write_report(path, page, origin) for path, page in result.pages.items()]
    return [
        *others,
        *pages,
        *(write_records(path, rows) for path, rows in result.records.items()),
    ]


def quote_command() -> str:
    """The whole line, quoted for a shell, as reports say it."""
    return shlex.join([PROGRAM, *GIVEN.get()])


# -- examples ----------------------------------------------------------------------------------

HEAD = "Examples:"
MARGIN = "  "


def give_examples(*commands: str, after: Sequence[str] = ()) -> str:
    """The epilog of a command, of lines that start with `leansd`; `after` is more text."""
    # The mark keeps a help screen from running the lines together.
    paragraphs = ["\n".join(["\b", HEAD, *(f"{MARGIN}{each}" for each in commands)]), *after]
    return "\n\n".join(paragraphs)


def read_examples(epilog: str | None) -> tuple[str, ...]:
    """The commands of an epilog."""
    lines = (epilog or "").splitlines()
    return tuple(line.strip() for line in lines if line.startswith(f"{MARGIN}leansd "))


# -- failures ----------------------------------------------------------------------------------

MEMORY = "draw fewer at once (--batch), smaller (--size), or on another --device"


def complain(message: str, code: int) -> int:
    """Says on standard error, in one line, what is wrong; gives the code back."""
    print(fit(f"{PROGRAM}: {' '.join(message.split())}", sys.stderr), file=sys.stderr)
    return code


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
