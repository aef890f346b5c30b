"""The recipe `smoke`: every stage and loss on the embedded model, killed and resumed."""

from pathlib import Path

import pytest

from leansd.cli import main
from processes import die_before_moving, run_until_dead

STEPS = {"light": 2, "apart": 1, "equipped": 2, "whole": 1}
"""Of each stage, fewer than the recipe has."""
COMMAND = [
    "incubate", "smoke", *(f"stages.{name}.steps={steps}" for name, steps in STEPS.items()),
    "trainer.checkpoint_every=1",
]  # fmt: skip


def work_until_dead(out: Path, moves: int) -> None:
    die_before_moving(moves)
    main([*COMMAND, "--out", str(out), "--resume"])


@pytest.mark.slow
def test_smoke_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    assert main([*COMMAND, "--out", str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    run_until_dead(work_until_dead, killed, 4)
    run_until_dead(work_until_dead, killed, 5)
    assert main([*COMMAND, "--out", str(killed), "--resume"]) == 0
    assert {path.name for path in killed.iterdir()} >= STEPS.keys()
    for file in sorted((tmp_path / "whole/net").iterdir()):
        assert file.read_bytes() == (killed / "net" / file.name).read_bytes(), file.name
