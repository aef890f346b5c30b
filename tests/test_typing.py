"""What a user's type checker sees of the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import leansd

USER = """
from pathlib import Path
import leansd
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

def draw(pipe: StableDiffusionPipeline, unet: UNet2DConditionModel) -> None:
    plan = leansd.Plan.every(3, cut="up2.up", steps=30).inherit("mid", at=[4, 5])
    with leansd.inherit(pipe, plan) as run:
        pass
    reveal_type(run.report())
    reveal_type(leansd.load_unet(Path("net")))
    student, lineage = leansd.operate(unet, leansd.Surgery("thin").drop("dn0.l1"))
    reveal_type(student)
    reveal_type(lineage.pairs())
    reveal_type(leansd.dissect(unet).params)
    reveal_type(leansd.Front.load("front.json").at(speedup=2.0))
    leansd.inherit(pipe, 3)
"""


@pytest.mark.slow
def test_public_names_have_types(tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    names = [f"reveal_type(leansd.{name})\n" for name in leansd.__all__]
    (tmp_path / "user.py").write_text(USER + "".join(names))
    # The package is told of as a user's checker finds it: by the interpreter's path.
    source = Path(leansd.__file__).parents[1]
    # diffusers does not declare the names that its own documentation imports.
    config = {"extraPaths": [str(source)], "reportPrivateImportUsage": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run([*command, "user.py"], cwd=tmp_path, capture_output=True, text=True)
    told = json.loads(done.stdout)["generalDiagnostics"]
    revealed = [each["message"] for each in told if each["severity"] == "information"]
    assert len(revealed) == len(leansd.__all__) + 6
    vague = [each for each in revealed if "Unknown" in each or each.endswith('is "Any"')]
    assert not vague
    (wrong,) = (each for each in told if each["severity"] == "error")
    assert "Literal[3]" in wrong["message"], "only the plan that is none is an error"
