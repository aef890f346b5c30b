"""The pages: every piece of Python on them runs, every command on them is one that there is."""

import re
import shlex
from ast import Attribute, Call, ImportFrom, Name, parse, walk
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import pytest
import typer
from PIL import Image

import leansd
from conformance.models import make_pipeline as build
from leansd import loading
from leansd.cli import app
from test_control import make_controlnet, make_pipeline
from tiny import WIDTH, tiny_pipeline, tiny_scheduler, tiny_unet, tiny_xl_unet

ROOT = Path(__file__).parent.parent
MANUAL = ROOT / "docs" / "commands.md"
"""Made of the commands themselves; its examples are tested with them."""
PAGES = (ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {MANUAL}))
ALONE = ("cookbook.md", "export.md", "migration.md", "troubleshooting.md")
"""Pages whose sections stand alone; others are read, and run, from the first line to the last."""
NOT_RUN = "# Not run here: "
"""How a piece of code begins that cannot run in the tests; the reader is told why."""
FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:\$ )?(?:leansd|accelerate .*-m leansd\.cli)\s+(.+)")

PLAIN: dict[str, Any] = {
    "down_block_types": ("DownBlock2D",) * 4,
    "up_block_types": ("UpBlock2D",) * 4,
    "layers_per_block": 1,
}
"""Four blocks, as the pages' addresses have it, of few units: each takes seconds to compile."""
SLIM: dict[str, Any] = {"layers_per_block": 1}
"""All kinds of units, each once a block, where a page names no second layer."""
SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
"""A plan makes a graph for each of its patterns, and each is traced and checked."""


class Fence(NamedTuple):
    """A piece of code or of a shell session."""

    language: str
    code: str

    @property
    def packages(self) -> list[str]:
        """The rivals' packages that it imports."""
        return re.findall(r"^(?:import|from) (DeepCache|tgate|tomesd)", self.code, re.MULTILINE)


class Chapter(NamedTuple):
    """What runs in one namespace: a page, or a section of one."""

    name: str
    fences: tuple[Fence, ...]

    def uses(self, word: str) -> bool:
        return any(re.search(rf"\b{word}\b", fence.code) for fence in self.fences)


def read_fences(text: str) -> Iterator[Fence]:
    for _, language, code in FENCE.findall(text):
        yield Fence(language, dedent(code))


def list_chapters() -> Iterator[Chapter]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        name = str(page.relative_to(ROOT))
        parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:] if page.name in ALONE else [text]
        for part in parts:
            title = f"{name}: {part.splitlines()[0]}" if page.name in ALONE else name
            fences = tuple(each for each in read_fences(part) if each.language == "python")
            if fences:
                yield Chapter(title, fences)


CHAPTERS = tuple(list_chapters())
FENCES = [(chapter.name, fence) for chapter in CHAPTERS for fence in chapter.fences]


@cache
def load_embedded() -> Any:
    return loading.load("emoji")


def build_pipe(chapter: Chapter) -> Any:
    """The pipeline that a page assumes, in small."""
    if chapter.uses("compile"):
        return tiny_pipeline(unet=tiny_unet(**PLAIN))
    if chapter.uses("onnx"):
        return tiny_pipeline(unet=tiny_unet(**SMALL))
    if not any(map(chapter.uses, ("l1", "Surgery", "operate", "DeepCache"))):
        return tiny_pipeline(unet=tiny_unet(**SLIM))
    return tiny_pipeline()


BUILDERS: dict[str, Callable[[Chapter], Any]] = {
    "pipe": build_pipe,
    "xl_pipe": lambda _: build(
        "StableDiffusionXLPipeline",
        tiny_xl_unet(cross_attention_dim=2 * WIDTH),
        tiny_scheduler(),
    ),
    "control_pipe": lambda _: make_pipeline(make_controlnet(make_unet=tiny_unet), tiny_unet),
    "call": lambda _: {"prompt": "a lighthouse", "num_inference_steps": 12},
    "photo": lambda _: Image.new("RGB", (32, 32), "teal"),
    "edges": lambda _: Image.new("RGB", (32, 32), "white"),
    "leansd": lambda _: leansd,
}
"""What pages assume to be there."""


def mark(chapter: Chapter) -> Any:
    is_slow = any(map(chapter.uses, ("emoji", "compile", "onnx", "tune", "profile")))
    marks = pytest.mark.slow if is_slow else ()
    return pytest.param(chapter, marks=marks, id=chapter.name)


@pytest.mark.parametrize("chapter", [mark(chapter) for chapter in CHAPTERS])
def test_python_runs(chapter: Chapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if chapter.uses("onnx"):
        pytest.importorskip("onnxruntime")
    if chapter.uses("emoji"):
        monkeypatch.setattr(leansd, "load", {"emoji": load_embedded()}.__getitem__)
    names = {name: make(chapter) for name, make in BUILDERS.items() if chapter.uses(name)}
    missing: list[str] = []
    for number, fence in enumerate(chapter.fences, 1):
        absent = [package for package in fence.packages if find_spec(package) is None]
        missing += absent
        if absent or fence.code.startswith(NOT_RUN):
            continue
        if fence.packages:
            # What the packages patch stays patched.
            names["pipe"] = build_pipe(chapter)
        exec(compile(fence.code, f"{chapter.name}, block {number}", "exec"), names)
        if fence.packages:
            names["pipe"] = build_pipe(chapter)
    if chapter.uses("emoji"):
        leansd.release_(load_embedded())
    if missing:
        pytest.skip(f"all run but what needs {missing[0]}")


@pytest.mark.parametrize(
    "code",
    [fence.code for _, fence in FENCES if fence.code.startswith(NOT_RUN)],
    ids=[name for name, fence in FENCES if fence.code.startswith(NOT_RUN)],
)
def test_python_that_cannot_run_names_what_is_there(code: str) -> None:
    reason = code.splitlines()[0].removeprefix(NOT_RUN)
    assert reason.startswith("needs ")
    for node in walk(parse(code)):
        if isinstance(node, ImportFrom) and (node.module or "").split(".")[0] == "leansd":
            module = import_module(str(node.module))
            assert all(hasattr(module, each.name) for each in node.names)
        if isinstance(node, Attribute) and isinstance(node.value, Name):
            assert node.value.id != "leansd" or node.attr in leansd.__all__
        name = get_public(node.func) if isinstance(node, Call) else ""
        if isinstance(node, Call) and name:
            taken = signature(getattr(leansd, name)).parameters
            if not any(each.kind is Parameter.VAR_KEYWORD for each in taken.values()):
                assert {each.arg for each in node.keywords} <= set(taken)


def get_public(function: Any) -> str:
    """What is called, if it is a name of `leansd` itself."""
    value = function.value if isinstance(function, Attribute) else None
    return function.attr if isinstance(value, Name) and value.id == "leansd" else ""


def test_the_cookbook_has_what_users_ask_for() -> None:
    titles = " ".join(chapter.name for chapter in CHAPTERS if "cookbook" in chapter.name)
    for topic in ("Text to image", "SDXL", "ControlNet", "Image to image", "LoRA", "threads"):
        assert topic in titles


def list_commands() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every command line of this package that a page shows, and the page."""
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for fence in read_fences(page.read_text(encoding="utf-8")):
            if fence.language not in ("", "sh", "bash", "console"):
                continue
            for line in fence.code.replace("\\\n", " ").splitlines():
                found = COMMAND.match(line)
                if found:
                    words = shlex.split(found[1], comments=True)
                    yield str(page.relative_to(ROOT)), tuple(words)


COMMANDS = sorted(set(list_commands()))


def test_every_command_of_a_page_is_one() -> None:
    assert len(COMMANDS) > 30
    for page, words in COMMANDS:
        command: Any = typer.main.get_command(app)
        context = command.context_class(command, info_name="leansd")
        rest = list(words)
        while hasattr(command, "resolve_command") and rest:
            name, command, rest = command.resolve_command(context, rest)
            context = command.context_class(command, parent=context, info_name=name)
        given, rest, _ = command.make_parser(context).parse_args(rest)
        assert not rest, (page, words)
        for parameter in command.params:
            if parameter.name in given:
                parameter.process_value(context, given[parameter.name])


REFERENCE = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))


def test_the_reference_has_every_public_name_and_nothing_else() -> None:
    named = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
    assert {f"leansd.{name}" for name in leansd.__all__} - {"leansd.__version__"} <= set(named)
    for name in named:
        home, _, last = name.rpartition(".")
        if find_spec(home) and not hasattr(import_module(home), last):
            import_module(name)


def test_surgery_files_are_read(tmp_path: Path) -> None:
    fences = read_fences((ROOT / "docs" / "surgery.md").read_text(encoding="utf-8"))
    (block,) = (fence.code for fence in fences if fence.language == "yaml")
    (tmp_path / "light.yaml").write_text(block)
    surgery = leansd.Surgery.load(tmp_path / "light.yaml")
    tiny = leansd.operate(tiny_pipeline().unet, "bk-tiny")[0]
    nets = {"original": tiny_pipeline().unet, "tiny": tiny}
    assert len(surgery.edits) == 3
    config: Any = leansd.operate(nets, surgery)[0].config
    assert config.layers_per_block[0] == 1


def test_what_a_page_would_fetch_is_refused() -> None:
    pytest.importorskip("mkdocs")
    from mkdocs.exceptions import PluginError

    from loops import load_script

    check = load_script(ROOT / "docs" / "selfcontained.py").on_post_page
    page = type("Page", (), {"file": type("File", (), {"src_uri": "index.md"})})
    plain = '<a href="https://arxiv.org"><img src="images/a.png"><script src="a.js"></script>'
    assert check(plain, page) == plain
    for fetched in (
        '<script src="https://unpkg.com/a.js">',
        '<link rel="stylesheet" href="//fonts.example/a.css">',
        '<img alt="" src="https://img.example/a.png">',
        "<style>@import url(https://a.example/a.css)</style>",
    ):
        with pytest.raises(PluginError, match=r"index\.md would fetch"):
            check(plain + fetched, page)
