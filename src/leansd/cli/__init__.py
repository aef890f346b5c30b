"""The command line: one module a command, imported only when the command is called.

`leansd --help` therefore imports neither torch nor diffusers.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from leansd.cli.command import (
    DONE,
    FAILED,
    GIVEN,
    MISTAKE,
    PROGRAM,
    STOPPED,
    complain,
    explain_failure,
    give_examples,
)
from leansd.cli.terminal import keep_silent
from leansd.errors import LeansdError, OutputError
from leansd.version import __version__

COMMANDS = {
    "demo": "Draw prompts in full and with every preset, and compare.",
    "generate": "Draw pictures from prompts, with a plan.",
    "anatomy": "Show a UNet as a tree of units with what each takes.",
    "profile": "Measure what every unit costs here; predict what plans gain.",
    "tune": "Find the plans that lose least at every speed, here.",
    "cut": "Choose what to take out of a UNet for a budget of its cost.",
    "plan": "Show, draw or save a plan.",
    "incubate": "Distil a lighter UNet from a pipeline, as a recipe says.",
    "operate": "Cut a UNet, or assemble one from several.",
    "evaluate": "Measure how true and how good the pictures of plans are.",
    "bench": "Measure ours against every rival in turns.",
    "export": "Write a net for stock diffusers or ONNX Runtime.",
    "ui": "Open a page: draw side by side, edit plans, tune, look back.",
    "manual": "Show every command with its options and examples.",
}
"""Each name is also a module of this package that holds a Typer `app`; a summary has 60 letters."""

# The base of Typer's usage errors, whether it brings its own copy of click or not.
_UsageError: Any = typer.BadParameter.__mro__[1]


class LazyGroup(TyperGroup):
    """Knows every command by name and summary, and imports the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, summary in COMMANDS.items():
            if find_spec(f"{__name__}.{name}") is not None:
                self.commands[name] = TyperCommand(name, help=summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and name in self.commands:
            command = self.open_command(name)
        return name, command, rest

    def open_command(self, name: str) -> Any:
        """The whole of a command, its module imported."""
        module = import_module(f"{__name__}.{name}")
        # Plain text: Typer's tables cut words at 80 columns, and take rich to import.
        module.app.rich_markup_mode = None
        command = typer.main.get_command(module.app)
        command.name = name
        return command


app = typer.Typer(cls=LazyGroup, rich_markup_mode=None)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"leansd {__version__}")
        raise typer.Exit()


@app.callback(
    epilog=give_examples(
        "leansd demo",
        "leansd generate 'a red apple' --plan balanced --out pictures",
        "leansd plan fast",
        after=[
            "leansd COMMAND --help says more of each; leansd manual has it all.",
            "Exit codes: 0 done, 1 failed on the way, 2 wrongly asked, 130 stopped.",
        ],
    )
)
def _describe(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Lean Stable Diffusion: the same pictures from the same UNet in less time."""


def open_program() -> Any:
    """The whole command line, as `main` runs it."""
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; what went wrong is one line on stderr."""
    # Read when transformers is first imported; it would remark on optional packages.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    keep_silent(False)
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    GIVEN.set(given)
    try:
        result = open_program()(given, prog_name=PROGRAM, standalone_mode=False)
        # A reader that has gone is noticed here, not when Python ends.
        sys.stdout.flush()
    except LeansdError as error:
        return complain(str(error), FAILED if isinstance(error, OutputError) else MISTAKE)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group by itself, as leansd by itself
            print(error.format_message())
            return DONE
        # An option without its value does not know whose it is.
        asked = " ".join([PROGRAM, *(word for word in given[:1] if word in COMMANDS)])
        where = error.ctx.command_path if getattr(error, "ctx", None) else asked
        return complain(f"{error.format_message().rstrip('.')} (see {where} --help)", MISTAKE)
    except (KeyboardInterrupt, typer.Abort):
        return complain("stopped", STOPPED)
    except BrokenPipeError:
        # Whoever read has gone, as `head` does: nothing is left to say, nor anybody to hear it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        told = explain_failure(error)
        if told is None:
            raise
        return complain(told, FAILED)
    if result == STOPPED:
        return complain("stopped", STOPPED)
    return result if isinstance(result, int) else DONE
