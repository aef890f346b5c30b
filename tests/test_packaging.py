"""What a release consists of besides the code; `.ci/smoke` builds and tries it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import leansd
from leansd.incubation.recipe import BUNDLED, load_recipe
from loops import load_script

ROOT = Path(__file__).parent.parent
DEVELOPING = {"bench", "dev", "docs", "test"}
"""Extras that are not for users."""
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def list_requirements(project: dict[str, Any]) -> list[Requirement]:
    extras = project["optional-dependencies"].values()
    return [Requirement(each) for group in (project["dependencies"], *extras) for each in group]


def test_extras_that_extras_name_exist(project: dict[str, Any]) -> None:
    extras = set(project["optional-dependencies"])
    for each in list_requirements(project):
        if each.name == "leansd":
            assert each.extras <= extras


def test_all_has_every_extra_for_users(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == set(extras) - DEVELOPING - {"all"}


def test_what_is_tested_with_is_pinned(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    pinned = {pin.name.lower().replace("_", "-") for pin in pins}
    wanted = {each.name.lower() for each in list_requirements(project) if "==" not in str(each)}
    assert wanted - {"leansd", "pre-commit"} <= pinned  # no test runs the latter


def test_versions_agree() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", leansd.__version__)
    headings = re.findall(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0][0] == leansd.__version__
    for _, date in headings:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d|unreleased", date)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == leansd.__version__


def test_the_changelog_has_the_kinds_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= KINDS


def test_the_citation_names_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    papers = {each["doi"].rpartition("arXiv.")[2] for each in citation["references"]}
    assert papers == {"2406.00210", "2312.15516"}


def test_what_a_wheel_must_hold_is_in_the_tree() -> None:
    contents = load_script(ROOT / ".ci" / "contents.py")
    for name in contents.WANTED:
        assert (Path(leansd.__file__).parent.parent / name).is_file(), name
    for name in contents.SOURCE:
        assert (ROOT / name).is_file(), name


RECIPES = [path for path in sorted(BUNDLED.glob("*.yaml")) if not path.stem.endswith("base")]
"""But for those that others are differences to."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_bundled_recipes_are_found_by_name(path: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert recipe == load_recipe(f"recipes/{path.name}") == load_recipe(path)
