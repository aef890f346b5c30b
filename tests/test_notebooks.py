"""The notebooks run, and what is committed with them is what they show."""

import re
from pathlib import Path
from typing import Any

import pytest

from loops import load_script

HERE = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
LIMIT = 300_000
"""Bytes of a notebook with its pictures."""


def read(path: Path) -> Any:
    return pytest.importorskip("nbformat").read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path: Path) -> None:
    pytest.importorskip("nbformat").validate(notebook := read(path))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [each for cell in cells for each in cell.outputs]
    assert {each.output_type for each in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [each.text for each in outputs if each.get("name") == "stderr"]
    assert any("image/png" in each.get("data", ()) for each in outputs)
    assert path.stat().st_size < LIMIT


SHORTER = {
    r"^STEPS = \d+": "STEPS = 2",
    r"^(prompts = \[\"[^\"]*\").*\]": r"\1]",
    r"num_inference_steps=\d+, guidance": "num_inference_steps=2, guidance",
}
"""What a notebook's cells say more of than it takes to see that they run."""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script, kept = load_script(HERE / "execute.py"), read(path)
    asked = read(path)
    for cell in asked.cells:
        for wordy, short in SHORTER.items():
            cell.source = re.sub(wordy, short, cell.source, flags=re.MULTILINE)
    assert asked != kept
    monkeypatch.setattr(script.nbformat, "read", lambda *_, **__: asked)
    ran = script.execute(path)
    shown = [[each.output_type for each in cell.get("outputs", ())] for cell in ran.cells]
    assert shown == [[each.output_type for each in cell.get("outputs", ())] for cell in kept.cells]
