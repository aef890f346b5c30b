"""The demo on a tiny model."""

import json

import pytest
import torch
from PIL import Image

from leansd.cli import main
from leansd.evaluation.records import load_records
from leansd.plans.presets import SPEED_PRESETS
from pages import read_page
from tiny import tiny_pipeline


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with everything the demo wrote, and the folder of the model."""
    home = tmp_path_factory.mktemp("demo")
    tiny_pipeline().save_pretrained(home / "model")
    return home


@pytest.mark.slow
def test_the_demo_compares_every_preset(demo, capsys, monkeypatch):
    monkeypatch.setattr("leansd.cli.options.hush_libraries", lambda: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = demo / "out"
    code = main(
        ["demo", "--model", str(demo / "model"), "--steps", "6", "--out", str(out), "--force",
         "--prompts", "a <b>red</b> apple", "--prompts", "pizza"]
    )  # fmt: skip
    torch.set_num_threads(threads)
    assert code == 0
    lines = capsys.readouterr().out.strip().splitlines()
    facts = json.loads(lines[-1])
    names = [row["name"] for row in facts["plans"]]
    assert names == ["full", *SPEED_PRESETS, "fewer steps"]
    assert all(name in "".join(lines[:-1]) for name in names)
    full, *others = facts["plans"]
    assert full["speedup"] == 1
    assert full["psnr"] is None
    assert all(10 < row["psnr"] <= 100 and row["speedup"] > 0 for row in others)
    assert all(row["predicted_speedup"] > 1 for row in others)
    assert all(row["bytes_kept"] > 0 for row in others if row["fingerprint"])
    figures = ["front", *(f"plan-{name}" for name in SPEED_PRESETS)]
    assert {path.name for path in out.iterdir()} == {
        "grid.png",
        "records.jsonl",
        "report.html",
        *(f"report-{name}.{form}" for name in figures for form in ("png", "svg")),
    }

    page, text = read_page(out / "report.html")
    assert len(page.images) == 2 * (6 + 5)  # and what differs from the full run
    assert all(image["alt"] for image in page.images)
    assert "a &lt;b&gt;red&lt;/b&gt; apple" in text
    assert text.count("<svg") == 1 + len(SPEED_PRESETS)
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 2 * 128
    records = load_records(out / "records.jsonl")
    assert {record.metric for record in records} == {
        "seconds", "speedup", "predicted_speedup", "bytes_kept", "psnr", "ssim",
    }  # fmt: skip
    assert {record.plan for record in records} == set(names)


def test_few_steps_run_in_full_unless_forced(demo, capsys):
    shared = ["demo", "--model", str(demo / "model"), "--steps", "3", "--prompts", "pizza"]
    assert main([*shared, "--out", str(demo / "few")]) == 0
    printed = capsys.readouterr()
    names = [row["name"] for row in json.loads(printed.out.splitlines()[-1])["plans"]]
    assert names == ["full", "fewer steps"]
    assert printed.err.count("--force") == len(SPEED_PRESETS)
    _, text = read_page(demo / "few" / "report.html")
    assert "In few steps every plan means the full run" in text


def test_the_demo_tells_what_is_wrong_before_it_draws(demo, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (["--out", tmp_path / "file" / "out"], "is not a folder"),
        (["--model", "none", "--out", tmp_path / "out"], "no model 'none'"),
        (["--sampler", "none", "--out", tmp_path / "out"], "no sampler 'none'"),
        (["--steps", "1", "--out", tmp_path / "out"], "--steps"),
    ):
        assert main(["demo", *map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert said in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
