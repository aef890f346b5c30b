"""`leansd manual`: all commands on one page."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.completions import offer
from leansd.cli.examples import give_examples
from leansd.cli.options import Quiet

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd manual",
        "leansd manual emoji train",
        "leansd manual --to roff --out leansd.1",
    )
)
def show_manual(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="COMMAND", help="Only this command; all of them by default."),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            help="text, markdown, or roff for man.",
            autocompletion=offer("text", "markdown", "roff"),
        ),
    ] = "text",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; the terminal by default.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Show every command with its options and examples, or write that as a file."""
    from difflib import get_close_matches
    from pydoc import pager

    from leansd.cli import PROGRAM, open_program
    from leansd.cli.manpages import FORMS, compose, read_pages
    from leansd.cli.manpages.composition import compose_page
    from leansd.cli.terminal import show_text
    from leansd.errors import LeansdError
    from leansd.files import check_file, write_file

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
        write_file(out, written.encode())
        show_text(f"wrote {out}")
    else:
        pager(written)
