"""What was trained, put into the package: the model, and the lighter UNets beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

from leansd.errors import LeansdError
from leansd.files import writing
from leansd.loading import load_unet
from leansd.surgery.checkpoints import save_delta
from models.emoji.card import TEMPLATES

BESIDE = ("vgg", "light", "lean")
"""Folders of the package's model that no training of the model writes."""
NETS = {"light": "assembled-0", "lean": "lean-0"}
"""The lighter UNets, and the runs of `benchmarks/incubation.py` whose nets they are."""


def publish_model(model: Path, package: Path) -> None:
    """Put a run's model in the place of the package's.

    What lies beside the weights stays until it is made again (see `publish_nets`).
    """
    if not (model / "README.md").is_file():
        raise LeansdError(f"no card in {model}: run `python -m models.emoji evaluate` first")
    with writing(package) as part:
        shutil.copytree(model, part)
        for name in BESIDE:
            if (package / name).is_dir():
                shutil.copytree(package / name, part / name)


def publish_nets(runs: Path, package: Path) -> list[Path]:
    """Write the own tensors of every lighter UNet that `runs` has, in half precision."""
    model = load_unet(package, device="cpu").half()
    written: list[Path] = []
    for name, run in NETS.items():
        net = runs / run / "net"
        if not net.is_dir():
            continue
        folder = package / name
        save_delta(load_unet(net, device="cpu").half(), model, folder)
        shutil.copyfile(TEMPLATES / f"{name}.md", folder / "README.md")
        written.append(folder)
    if not written:
        raise LeansdError(f"no nets in {runs}: `python benchmarks/incubation.py` trains them")
    return written
