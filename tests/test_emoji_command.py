"""`leansd emoji`: a user's mistake is one line and exit code 2, and leaves nothing behind."""

from pathlib import Path

import pytest

from leansd.cli import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--size", "96"], "no recipe for --size 96: choose from 64, 128"),
        (["train", "--device", "tpu"], "unknown device 'tpu': cpu or cuda"),
        (["train", "--minutes", "1", "--steps", "1"], "--minutes or --steps"),
        (["train", "--minutes", "0"], "above 0"),
        (["train", "--data", "."], "no package"),
        (["grid", "--model", "nowhere"], "no model in nowhere"),
        (["evaluate", "--model", "nowhere"], "no model in nowhere"),
    ],
)
def test_mistake(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    out = [] if arguments[0] == "evaluate" else ["--out", "new"]
    assert main(["emoji", *arguments, *out]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
