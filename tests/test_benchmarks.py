"""The tables of the README are what the committed records say."""

import sys
from pathlib import Path

import pytest

from loops import load_script

TABLES = Path(__file__).parent.parent / "benchmarks" / "tables.py"


def test_tables_are_generated_from_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(TABLES), "--check"])
    load_script(TABLES).main()


def test_other_tables_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- table: gpu -->\nby hand\n<!-- end of table -->\n")
    script = load_script(TABLES)
    monkeypatch.setattr(script, "PAGES", (page,))
    monkeypatch.setattr(sys, "argv", [str(TABLES), "--check"])
    with pytest.raises(SystemExit, match=r"README\.md is not what the records say"):
        script.main()
