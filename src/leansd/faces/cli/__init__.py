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

from leansd.errors import LeansdError
from leansd.version import __version__

COMMANDS = {
    "demo": "Draw the same prompts in full and with every preset plan, and compare.",
    "generate": "Draw pictures from prompts, with a plan.",
    "anatomy": "Show a UNet as a tree of units with parameters and multiply-accumulates.",
    "profile": "Measure what every unit and stage costs here; predict what plans gain.",
    "tune": "Find the plans that lose least at every speed, for one model, sampler and machine.",
    "cut": "Choose what to take out of a UNet for a budget of its cost.",
    "plan": "Show, draw or save a plan.",
    "incubate": "Distil a lighter UNet from a pipeline, in stages, as a recipe says.",
    "operate": "Cut a UNet, or assemble one from several; write it, or only say what is left.",
    "evaluate": "Measure plans against the full and the converged run, and the quality of sets.",
    "bench": "Measure ours against every rival in turns: time, fidelity, quality; resumable.",
    "export": "Write a net, with a plan's graphs, for stock diffusers or ONNX Runtime.",
    "ui": "A page in the browser: draw side by side, edit plans, tune, look back.",
    "emoji": "The embedded model: train it, measure it.",
}
"""Each name is also a module of this package that holds a Typer `app`."""

STOPPED = 130
MISTAKE = 2

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
        if name in self.commands:
            module = import_module(f"{__name__}.{name}")
            command = typer.main.get_command(module.app)
        return name, command, rest


app = typer.Typer(cls=LazyGroup, rich_markup_mode="rich", add_completion=False)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"leansd {__version__}")
        raise typer.Exit()


@app.callback(epilog="Example: leansd generate 'a red apple' --plan balanced --out pictures")
def _describe(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """Lean Stable Diffusion: the same pictures from the same UNet in less time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a user's mistake is one line on stderr."""
    # Read when transformers is first imported; it would remark on optional packages.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        result = typer.main.get_command(app)(given, prog_name="leansd", standalone_mode=False)
    except LeansdError as error:
        return _complain(str(error), MISTAKE)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # rich has shown the help already
            print(error.format_message(), end="")
            return MISTAKE
        where = error.ctx.command_path if getattr(error, "ctx", None) else "leansd"
        return _complain(f"{error.format_message().rstrip('.')} (see {where} --help)", MISTAKE)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("stopped", STOPPED)
    if result == STOPPED:
        return _complain("stopped", STOPPED)
    return result if isinstance(result, int) else 0


def _complain(message: str, code: int) -> int:
    print(f"leansd: {' '.join(message.split())}", file=sys.stderr)
    return code
