"""Importing is cheap: what gets imported is checked here, the time by `benchmarks/imports.py`."""

import json
import subprocess
import sys

import pytest

LIST = "import json, sys; print(json.dumps(sorted(name.split('.')[0] for name in sys.modules)))"


def list_packages(statement: str) -> set[str]:
    """The packages outside the standard library that a statement imports, in a new process."""

    def run(code: str) -> set[str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return set(json.loads(done.stdout.splitlines()[-1]))

    # What the interpreter's own site imports, an editable install for one, is not ours.
    return run(f"{statement}\n{LIST}") - run(LIST) - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "statement",
    [
        "import leansd",
        "import leansd; leansd.LeansdError; leansd.__version__; dir(leansd)",
        "import leansd.plans",
        "import leansd; leansd.Plan.every(3, cut='up2.up', steps=30).inherit('mid', at=[4])",
        "import leansd; leansd.preset('deepcache', 30); leansd.preset('balanced', 30)",
        "import leansd; leansd.preset('balanced', 30, sampler='ddim')",
        "import leansd; leansd.Plan.from_dict(leansd.preset('fast', 20).to_dict()).draw()",
        "import leansd.plans.grid, leansd.plans.compile, leansd.plans.resolve",
    ],
)
def test_plans_need_the_standard_library_only(statement: str) -> None:
    assert list_packages(statement) == {"leansd"}


def test_help_and_version_need_no_torch() -> None:
    for arguments in (["--help"], ["--version"], ["generate", "--help"]):
        statement = f"from leansd.cli import main; main({arguments})"
        assert not list_packages(statement) & {"torch", "numpy", "diffusers", "transformers"}
