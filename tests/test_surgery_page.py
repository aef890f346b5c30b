"""The page on surgery runs, block by block, and its files are read."""

import re
from pathlib import Path
from typing import Any

import pytest

import leansd
from tiny import tiny_pipeline

PAGE = Path(__file__).parent.parent / "docs" / "surgery.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"pipe": tiny_pipeline()}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 8
    for number, code in enumerate(blocks, 1):
        exec(compile(code, f"{PAGE.name}: block {number}", "exec"), names)
    assert list(names["assembled"].config.layers_per_block) == [1, 2, 2, 2]


def test_the_file_is_a_surgery(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "light.yaml").write_text(block)
    surgery = leansd.Surgery.load(tmp_path / "light.yaml")
    tiny = leansd.operate(tiny_pipeline().unet, "bk-tiny")[0]
    nets = {"original": tiny_pipeline().unet, "tiny": tiny}
    assert len(surgery.edits) == 3
    assert leansd.operate(nets, surgery)[0].config.layers_per_block[0] == 1
