"""What a wheel and an sdist must hold, and what they must not.

python .ci/contents.py WHEEL SDIST
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

PARTS = ("unet", "vae", "text_encoder", "clip", "vgg", "light", "lean")
WANTED = (
    "leansd/py.typed",
    "leansd/plans/presets/tuned.json",
    "leansd/emoji/model/README.md",
    "leansd/emoji/model/light/config.json",
    "leansd/emoji/model/model_index.json",
    "leansd/emoji/model/tokenizer/vocab.json",
    "leansd/cards/templates/net.md",
    "leansd/report/templates/page.html.j2",
    "leansd/incubation/recipes/smoke.yaml",
    "leansd/incubation/recipes/sd15-asdm.yaml",
)
SOURCE = (
    "pyproject.toml", "README.md", "LICENSE", "NOTICE", "CHANGELOG.md", "CITATION.cff",
    "CONTRIBUTING.md", "Makefile", "constraints.txt", "tests/conftest.py", "docs/cookbook.md",
    "benchmarks/tables.py", "notebooks/tour.ipynb",
)  # fmt: skip


def check_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in WANTED if name not in names]
    missing += [
        part
        for part in PARTS
        if not any(
            name.startswith(f"leansd/emoji/model/{part}/") and name.endswith(".safetensors")
            for name in names
        )
    ]
    licences = [name for name in names if ".dist-info/licenses/" in name]
    missing += [
        each for each in ("LICENSE", "NOTICE") if not any(each in name for name in licences)
    ]
    assert not missing, f"{wheel.name} lacks {', '.join(missing)}"
    # The manual for `man` lies where an installer puts it beside the environment's bin.
    own = [name for name in names if ".data/data/share/man/" not in name]
    tops = {name.split("/")[0] for name in own}
    strange = [top for top in tops if top != "leansd" and not top.endswith(".dist-info")]
    strange += [name for name in names if "test" in Path(name).stem.split("_")]
    strange += [name for name in names if name.endswith((".pyc", ".part", ".partial"))]
    assert not strange, f"{wheel.name} holds {', '.join(sorted(strange))}"
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {len(names)} files")


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in SOURCE if name not in names]
    assert not missing, f"{sdist.name} lacks {', '.join(missing)}"
    print(f"{sdist.name}: {sdist.stat().st_size / 2**20:.1f} MiB, {len(names)} files")


if __name__ == "__main__":
    check_wheel(Path(sys.argv[1]))
    check_sdist(Path(sys.argv[2]))
