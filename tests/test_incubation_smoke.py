"""`recipes/smoke.yaml`: every stage and loss on the embedded model, killed and resumed."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from leansd.faces.cli import main

RECIPE = Path(__file__).parents[1] / "recipes" / "smoke.yaml"


def run_until_dead(out: Path, moves: int) -> None:
    """In a process that kills itself before its so many-th file is moved to its place."""
    left, move = [moves], os.replace

    def replace(*args: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        move(*args)  # type: ignore[arg-type]

    def work() -> None:
        os.replace = replace  # type: ignore[assignment]
        main(["incubate", str(RECIPE), "--out", str(out), "--resume"])

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(280)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_smoke_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    assert main(["incubate", str(RECIPE), "--out", str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    run_until_dead(killed, 3)
    run_until_dead(killed, 4)
    assert main(["incubate", str(RECIPE), "--out", str(killed), "--resume"]) == 0
    for file in sorted((tmp_path / "whole/net").iterdir()):
        assert file.read_bytes() == (killed / "net" / file.name).read_bytes(), file.name
