"""The architecture as a test: layers import downwards only."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import leansd

ROOT = Path(leansd.__file__).parent
# Lowest first; a package may import what is in its own row's package or in a row above this one.
LAYERS = (
    ("errors", "version"),
    ("files", "text", "shards", "cluster"),
    ("plans",),
    ("core",),
    ("anatomy",),
    ("surgery",),
    ("runtime",),
    ("drawing", "hosting"),
    ("emoji",),
    ("model_files",),
    ("loading",),
    ("unets",),
    ("evaluation",),
    ("tuning",),
    ("cards",),
    ("incubation",),
    ("bulk",),
    ("exporting",),
    ("report",),
    ("ui",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
READERS = ("torch.load", "pickle.load", "pickle.loads")


@cache
def read_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def list_imports(path: Path) -> Iterator[str]:
    """The parts of leansd that a file imports, those inside functions included."""
    for node in ast.walk(read_tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "leansd":
                yield name.split(".")[1]


def get_part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_layers_import_downwards_only() -> None:
    for path in FILES:
        part = get_part(path)
        for imported in list_imports(path):
            below = imported == part or LEVEL[imported] < LEVEL[part]
            assert below, f"{path} imports {imported}"


def name_module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_module(path): path for path in FILES}


def list_modules_imported(path: Path) -> set[str]:
    """The modules of leansd that a file imports, lazily, for types or by a string included."""
    found: set[str] = set()
    by_string = "import_module(" in path.read_text()
    for node in ast.walk(read_tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and by_string:
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys()
            if not inner <= MODULES.keys():
                found.add(node.module)
    return found & MODULES.keys()


def test_no_module_imports_itself_by_a_detour() -> None:
    """Take away modules that import nothing that is left, until none is left: else, a circle."""
    left = {name: list_modules_imported(path) - {name} for name, path in MODULES.items()}
    while free := {name for name, imported in left.items() if not imported & left.keys()}:
        left = {name: imported for name, imported in left.items() if name not in free}
    assert not left


def test_every_part_has_a_layer() -> None:
    assert {get_part(path) for path in FILES} == set(LEVEL)


def test_the_page_on_the_architecture_names_what_is_there() -> None:
    page = (ROOT.parents[1] / "docs" / "architecture.md").read_text()
    layers = page.split("## Layers")[1].split("```")[1]
    assert all(re.search(rf"\b{part}\b", layers) for part in LEVEL if part not in LAYERS[0])
    code = [*re.findall(r"```\n(.*?)```", page, re.DOTALL), *re.findall(r"`([^`\n]+)`", page)]
    told = {name for each in code for name in re.findall(r"\b[A-Z][a-z]+(?:[A-Z]\w*)*\b", each)}
    known = {
        name
        for path in FILES
        for node in ast.walk(read_tree(path))
        for name in (getattr(node, "name", None), getattr(node, "id", None))
    }
    assert told - known == {"Ray", "ResNet", "Runtime", "Transformer"}, "these are no names of ours"


def test_files_read_in_one_sitting() -> None:
    assert [path for path in FILES if len(path.read_text().splitlines()) > 600] == []
    vague = {"utils", "helpers", "manager", "common", "misc"}
    assert [path for path in FILES if path.stem in vague] == []


def test_no_public_function_is_hidden_by_a_module_of_its_name() -> None:
    modules = {path.stem for path in ROOT.glob("*.py")} | {
        p.name for p in ROOT.iterdir() if p.is_dir()
    }
    assert not modules & set(leansd.__all__)


def test_nothing_unpickles() -> None:
    for path in FILES:
        for node in ast.walk(read_tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                assert {each.name for each in node.names} <= {"Pickler", "dumps"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in READERS:
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", path


def test_every_public_name_is_there() -> None:
    for name in leansd.__all__:
        assert getattr(leansd, name) is not None
    assert set(leansd.__all__) <= set(dir(leansd))


def list_public_types(path: Path) -> Iterator[str]:
    """Classes and type aliases of a module that others may import; type variables are its own."""
    for node in read_tree(path).body:
        match node:
            case ast.ClassDef(name=name):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name), annotation=ast.Name(id="TypeAlias")):
                yield name
            case _:
                pass


def test_a_class_has_its_name_for_itself() -> None:
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for name in list_public_types(path):
            if not name.startswith("_"):
                homes.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_a_module_has_its_name_for_itself() -> None:
    """But for commands and reports, which are called after what they are of, and `__init__`."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        if get_part(path) not in ("cli", "report") and path.stem != "__init__":
            homes.setdefault(path.stem, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_functions_of_commands_fit_a_screen() -> None:
    for path in (ROOT / "cli").glob("*.py"):
        for node in ast.walk(read_tree(path)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 61, node.name


# The first are the interface of scripts; a command's parameters are its own options and groups.
MANY = {"tune", "evaluate", "cut", "score", "evaluate_plans", "bench", "generate_pictures"}


def test_options_that_travel_together_are_one_object() -> None:
    found: set[str] = set()
    for path in FILES:
        for node in ast.walk(read_tree(path)):
            if isinstance(node, ast.FunctionDef):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([each for each in taken if each.arg not in ("self", "cls")]) > 8:
                    found.add(node.name)
    assert found == MANY


def test_random_numbers_and_whole_files_come_from_one_place() -> None:
    """But for the checkpoints of several processes, which all of them write."""
    made: dict[str, set[str]] = {"torch.Generator": set(), "os.replace": set()}
    root = ROOT.parents[1]
    for path in [*FILES, *(root / "models").rglob("*.py"), *(root / "integrations").rglob("*.py")]:
        for node in ast.walk(read_tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in made:
                made[ast.unparse(node.func)].add(path.name)
    assert made["torch.Generator"] == {"devices.py"}
    assert made["os.replace"] == {"files.py", "training_state.py"}
