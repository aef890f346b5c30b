"""What all commands share: help with examples, quiet runs, JSON, exit codes, completion, a manual.

Every test walks the app itself, so a new command is held to the same.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.core import TyperCommand

from leansd.cli import PROGRAM, main, open_program, options, terminal
from leansd.cli.manual import FORMS, Page, compose, read_pages
from leansd.cli.terminal import fold_grid, wrap_text
from leansd.plans.presets import PRESETS
from leansd.plans.presets import preset as build_preset
from leansd.runtime.samplers import SAMPLERS
from leansd.surgery.presets import PRESETS as SURGERIES
from leansd.unets import open_anatomy
from tiny import tiny_pipeline

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {page.name: page for page in read_pages(open_program(), PROGRAM)}
GIVES_NO_FACTS = {"leansd manual", "leansd ui"}
WIDTH = 80


def run_python(code: str, **environment: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    return done.stdout


def name_page(name: str) -> str:
    return name.replace(" ", "-")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(path)
    return str(path)


# -- help --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screens() -> dict[str, str]:
    """Every help screen at 80 columns, from one process that must not have imported torch."""
    asked = {name: [*name.split()[1:], "--help"] for name in PAGES}
    code = f"""
import contextlib, io, json, sys
from leansd.cli import main
screens = {{}}
for name, arguments in {asked!r}.items():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(arguments) == 0, name
    screens[name] = out.getvalue()
heavy = {{"torch", "diffusers", "transformers", "numpy", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
print(json.dumps(screens))
"""
    return json.loads(run_python(code, COLUMNS=str(WIDTH), NO_COLOR="1"))


@pytest.mark.parametrize("page", PAGES.values(), ids=lambda page: name_page(page.name))
def test_help_fits_the_screen_and_says_all(page: Page, screens: dict[str, str]) -> None:
    screen = screens[page.name]
    assert all(len(line) <= WIDTH for line in screen.splitlines())
    assert "…" not in screen
    words = screen.lower()
    for typed, text in (*page.arguments, *page.options):
        assert text, f"{typed} says nothing"
        assert typed.split()[0].strip(",[].").lower() in words
    assert not page.is_group or not re.search(r"[\w:,']\.\.\.$", screen, re.MULTILINE), (
        "a cut summary"
    )
    for example in page.examples:
        # As one line, so that it can be copied.
        assert any(line.strip() == example for line in screen.splitlines())


@pytest.mark.parametrize("page", PAGES.values(), ids=lambda page: name_page(page.name))
def test_every_example_parses(page: Page, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    parsed: list[dict[str, Any]] = []

    def keep(_: TyperCommand, context: Any) -> None:
        parsed.append(context.params)

    monkeypatch.setattr(TyperCommand, "invoke", keep)
    assert page.examples, f"{page.name} --help lacks an example: epilog=give_examples(...)"
    assert all(example.startswith(page.name) for example in page.examples)
    for example in page.examples:
        assert main(shlex.split(example)[1:]) == 0, capsys.readouterr().err
    assert len(parsed) == len(page.examples)
    known = {"plan": PRESETS, "plans": PRESETS, "sampler": SAMPLERS, "surgery": SURGERIES}
    for name, names in known.items():
        for values in (parameters.get(name) for parameters in parsed):
            for value in [values] if isinstance(values, str) else values or []:
                assert value in names, f"there is no {name} {value}"


def test_every_command_can_be_quiet_and_gives_its_facts_as_json() -> None:
    for page in PAGES.values():
        typed = {word for at, _ in page.options for word in at.replace(",", "").split()}
        if not page.is_group:
            assert {"--quiet", "-q"} <= typed, page.name
            assert "--json" in typed or page.name in GIVES_NO_FACTS, page.name


def test_no_color_is_no_color() -> None:
    code = "from leansd.cli.terminal import open_console; open_console().print('[red]text')"
    coloured = re.compile(r"\x1b\[[\d;]*3\d")
    assert coloured.search(run_python(code, FORCE_COLOR="1", TERM="xterm-256color"))
    plain = run_python(code, FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1")
    assert not coloured.search(plain)


# -- what commands say -------------------------------------------------------------------------


def test_presets_are_listed_without_torch() -> None:
    code = """
import sys
from leansd.cli import main
assert main(["plan", "--json"]) == main(["operate", "--json"]) == 0
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
"""
    listed = [json.loads(line) for line in run_python(code).splitlines() if line.startswith("{")]
    assert [set(each["presets"]) for each in listed] == [set(PRESETS), set(SURGERIES)]


def test_quiet_leaves_results_and_warnings(model: str, tmp_path: Path, capsys: Any) -> None:
    command = ["generate", "apple", "--model", model, "--out", str(tmp_path)]
    command += ["--plan", "fast", "--steps", "1"]
    assert main([*command, "-q"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("1 steps change too much each")
    assert said.err.count("\n") == 1
    assert said.out.endswith(f"wrote {tmp_path / 'apple.full.seed0.png'}\n")
    assert terminal.is_silent()
    assert main(["plan"]) == 0
    assert not terminal.is_silent()


class Stub:
    """Stands in for what takes hours."""

    train = held_out = ()

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self


def test_long_lines_break_between_words_under_where_they_began() -> None:
    line = "renamed     up1.l0 to up0.l0, up1.l2 to up0.l1"
    assert wrap_text(line, 30) == ("renamed     up1.l0 to up0.l0,\n            up1.l2 to up0.l1")
    assert wrap_text(f"short\n\n  {line}", 80) == f"short\n\n  {line}"
    path = "/".join(["folder"] * 9)
    assert wrap_text(f"wrote {path}", 20) == f"wrote\n{path}"


@pytest.mark.parametrize("steps", [30, 100])
def test_grids_of_many_steps_fold(steps: int) -> None:
    anatomy = open_anatomy("emoji")
    grid = build_preset("fast", steps).draw(anatomy)
    folded = fold_grid(grid, steps, WIDTH)
    assert (folded == grid) == (steps == 30)
    rows = [line for line in folded.splitlines() if line.startswith("up3.l2.res")]
    assert all(len(row) <= WIDTH for row in rows)
    (whole,) = (line for line in grid.splitlines() if line.startswith("up3.l2.res"))
    label = len(whole) - steps
    assert whole == whole[:label] + "".join(row[label:] for row in rows)


# -- exit codes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "out/a.png"), "no space left on device: out/a.png"),
        (MemoryError(), "out of memory: draw fewer at once (--batch)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory: draw fewer"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory"),
    ],
)
def test_what_goes_wrong_on_the_way_is_exit_code_1_and_one_line(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("leansd.unets.open_anatomy", fail)
    assert main(["anatomy", "sd15"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"leansd: {told}")
    assert said.err.count("\n") == 1


def test_what_only_a_developer_can_mend_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        return 1 / 0

    monkeypatch.setattr("leansd.unets.open_anatomy", fail)
    with pytest.raises(ZeroDivisionError):
        main(["anatomy", "sd15"])


def test_a_reader_that_goes_is_no_traceback() -> None:
    command = f"{sys.executable} -m leansd.cli manual | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (len(done.stdout), done.stderr) == (1, "")


# -- completion --------------------------------------------------------------------------------


def complete(line: str) -> list[str]:
    """What bash is offered for the last word of a line, by a process without torch."""
    code = """
import sys
from leansd.cli import main
try:
    main()
except SystemExit:
    pass
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
"""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return run_python(code, _LEANSD_COMPLETE="complete_bash", **asked).split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("leansd ge", ["generate"]),
        ("leansd generate apple --sa", ["--sampler"]),
        ("leansd generate apple --plan bal", ["balanced"]),
        ("leansd tune --sampler eul", ["euler", "euler-a"]),
        ("leansd operate bk-t", ["bk-tiny"]),
        ("leansd anatomy sd2", ["sd21-base"]),
        ("leansd plan nothing-such", []),  # then the shell offers files
    ],
)
def test_shells_complete_names(line: str, offered: list[str]) -> None:
    assert complete(line) == offered


def test_completions_know_what_there_is() -> None:
    from leansd.anatomy.builtin import BUILTIN

    assert set(options.SAMPLERS) == set(SAMPLERS)
    assert set(options.SHAPES) == set(BUILTIN)


# -- the manual --------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "file"), [("markdown", "commands.md"), ("roff", "leansd.1")])
def test_the_manual_is_up_to_date(form: str, file: str) -> None:
    written = FORMS[form](compose(PAGES.values()))
    assert (DOCS / file).read_text(encoding="utf-8") == written, "run make manual"


def test_the_manual_at_a_terminal() -> None:
    lines = run_python("from leansd.cli import main; main(['manual'])").splitlines()
    assert max(map(len, lines)) <= WIDTH
    for page in PAGES.values():
        for example in page.examples:
            assert any(line.strip() == example for line in lines)


def test_the_manual_of_one_command(capsys: Any) -> None:
    assert main(["manual", "anatomy"]) == 0
    said = capsys.readouterr().out
    assert "leansd anatomy" in said
    assert "leansd generate" not in said
    assert main(["manual", "anatomi"]) == 2
    assert "did you mean 'leansd anatomy'?" in capsys.readouterr().err
    assert main(["manual", "--to", "tex"]) == 2
    assert "give text, markdown, roff" in capsys.readouterr().err
