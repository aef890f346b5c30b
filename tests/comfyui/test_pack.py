"""What ComfyUI and its manager read of the pack, and a user's folder of plans."""

import ast
import json
import tomllib
from pathlib import Path

import pytest
from integrations.comfyui.choosing import PlanChoice
from integrations.comfyui.examples import draw as examples
from integrations.comfyui.library import AUTO, PlanLibrary, Purpose
from PIL import Image

from comfyui.double import lay_out
from comfyui.test_playing import PLAN, STEPS, draw
from leansd.errors import LeansdError
from leansd.plans import Plan

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
NODES = ast.parse((PACK / "nodes.py").read_text())
STOCK = {
    "CLIPTextEncode", "CheckpointLoaderSimple", "EmptyLatentImage", "KSampler", "KSamplerSelect",
    "BasicScheduler", "VAEDecode", "SaveImage", "PreviewImage",
}  # fmt: skip


OWN = {node.name for node in NODES.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("path", sorted(PACK.glob("examples/*.json")), ids=lambda path: path.stem)
def test_workflows_are_whole(path: Path) -> None:
    told = json.loads(path.read_text())
    nodes = {node["id"]: node for node in told["nodes"]}
    kinds = {node["type"] for node in nodes.values()}
    own = kinds - STOCK
    assert {"LeanPlan", "LeanReport", "LeanCompare"} <= own <= OWN
    for number, source, output, target, entry, kind in told["links"]:
        given = nodes[source]["outputs"][output]
        taken = nodes[target]["inputs"][entry]
        assert number in given["links"]
        assert taken["link"] == number
        assert given["type"] == taken["type"] == kind
    assert told["last_link_id"] == len(told["links"])


@pytest.mark.parametrize("path", sorted(PACK.glob("examples/*.json")), ids=lambda path: path.stem)
def test_pictures_carry_their_workflows(path: Path, tmp_path: Path) -> None:
    """What ComfyUI's page reads from a picture that is dropped on it, and what the script draws."""
    told = json.loads(path.read_text())
    with Image.open(path.with_suffix(".png")) as picture:
        assert json.loads(picture.text["workflow"]) == told  # pyright: ignore[reportAttributeAccessIssue]
        shown = picture.convert("RGB").tobytes()
    copied = tmp_path / path.name
    copied.write_text(path.read_text())
    with Image.open(examples.write_picture(copied)) as again:
        assert json.loads(again.text["workflow"]) == told  # pyright: ignore[reportAttributeAccessIssue]
    assert len(set(shown)) > 3  # it shows something


def test_the_registrys_rules_are_kept() -> None:
    told = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert "comfyui" not in told["project"]["name"].lower()
    assert {"name", "version", "license", "dependencies"} <= told["project"].keys()
    assert {"DisplayName", "requires-comfyui"} <= told["tool"]["comfy"].keys()
    for path in PACK.glob("*.py"):
        names = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
        assert not names & {"eval", "exec", "os.system", "subprocess.run", "subprocess.check_call"}


@pytest.mark.parametrize("name", ["playing", "choosing", "blocks", "library", "__init__"])
def test_the_engine_of_the_pack_imports_nothing_of_comfyui(name: str) -> None:
    for node in ast.parse((PACK / f"{name}.py").read_text()).body:
        imported = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            imported = [node.module or ""]
        assert not any(each.split(".")[0] in ("comfy", "comfy_api", "nodes") for each in imported)


def test_the_check_says_that_it_did_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from integrations.comfyui import check

    monkeypatch.setattr("sys.argv", ["check.py", "--comfyui", str(tmp_path)])
    assert check.main() == 2
    assert "NOT RUN" in capsys.readouterr().out


# -- a user's folder of plans ----------------------------------------------------------------------


def test_plans_are_kept_by_name(tmp_path: Path) -> None:
    library = PlanLibrary(tmp_path / "plans")
    assert library.list_files() == []
    path = library.save("mine", PLAN)
    assert library.list_files() == ["mine.json"] == [path.name]
    assert Plan.load(library.find_path("mine.json")) == PLAN
    for name in ("../mine.json", "/etc/mine", "a/b", "..", ""):
        with pytest.raises(LeansdError, match="no file name"):
            library.save(name, PLAN)


def test_auto_finds_what_was_tuned_for_just_this(tmp_path: Path) -> None:
    library = PlanLibrary(tmp_path)
    choice = PlanChoice(AUTO, model="0123456789abcdef", library=library)
    _, report, _ = draw(choice)
    assert "nothing was tuned for this model" in str(report)
    assert report.plan == "balanced"

    sigmas = tuple(lay_out(STEPS).tolist())
    purpose = Purpose("0123456789abcdef", "euler", sigmas, 4.0)
    library.save_tuned(purpose, PLAN.rename("tuned 2x"))
    _, report, _ = draw(choice)
    assert report.plan == "tuned 2x"
    for other in (
        PlanChoice(AUTO, model="ffff", library=library),
        PlanChoice(AUTO, model="0123456789abcdef"),
    ):
        assert draw(other)[1].plan == "balanced"
    assert draw(choice, cfg=7.0)[1].plan == "balanced"
    library.folder.joinpath("tuned", purpose.file_name).write_text("{")
    assert draw(choice)[1].plan == "balanced"
