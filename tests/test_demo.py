"""The demo on a tiny model, and the reports it is made of."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from leansd.faces.cli import main
from leansd.faces.report import Chart, Grid, Listing, Prose, write_page
from leansd.faces.report.drawings import Point, draw_plan, plot_tradeoff
from leansd.faces.report.sections import Drawing
from leansd.measuring.records import load_records
from leansd.measuring.tables import Table
from leansd.plans.presets import HOUSE, preset
from tiny import tiny_pipeline, tiny_unet


class Links(HTMLParser):
    """Collects what a page would fetch, and checks that elements close in order."""

    VOID = ("meta", "img", "rect", "circle", "line", "link", "br")

    def __init__(self):
        super().__init__()
        self.fetched, self.open, self.images = [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.fetched += [given[name] for name in ("src", "href") if name in given]
        if tag == "img":
            self.images.append(given)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def read_page(path):
    page, text = Links(), path.read_text()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith("data:image/png;base64,") for link in page.fetched)
    assert not re.search(r"url\(|@import|<script", text)
    return page, text


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with everything the demo wrote, and the folder of the model."""
    home = tmp_path_factory.mktemp("demo")
    tiny_pipeline().save_pretrained(home / "model")
    return home


def test_the_demo_compares_every_preset(demo, capsys, monkeypatch):
    monkeypatch.setattr("leansd.faces.cli.terminal.hush_libraries", lambda: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = demo / "out"
    code = main(
        ["demo", "--model", str(demo / "model"), "--steps", "6", "--out", str(out),
         "--prompts", "a <b>red</b> apple", "--prompts", "pizza"]
    )  # fmt: skip
    torch.set_num_threads(threads)
    assert code == 0
    lines = capsys.readouterr().out.strip().splitlines()
    facts = json.loads(lines[-1])
    names = [row["name"] for row in facts["plans"]]
    assert names == ["full", *HOUSE, "fewer steps"]
    assert all(name in "".join(lines[:-1]) for name in names)
    full, *others = facts["plans"]
    assert full["speedup"] == 1
    assert full["psnr"] is None
    assert all(10 < row["psnr"] <= 100 and row["speedup"] > 0 for row in others)
    assert all(row["predicted_speedup"] > 1 for row in others)
    assert all(row["bytes_kept"] > 0 for row in others if row["fingerprint"])
    assert sorted(path.name for path in out.iterdir()) == [
        "grid.png",
        "records.jsonl",
        "report.html",
    ]

    page, text = read_page(out / "report.html")
    assert len(page.images) == 2 * 6
    assert all(image["alt"] for image in page.images)
    assert "a &lt;b&gt;red&lt;/b&gt; apple" in text
    assert text.count("<svg") == 1 + len(HOUSE)
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 2 * 128
    records = load_records(out / "records.jsonl")
    assert {record.metric for record in records} == {
        "seconds", "speedup", "predicted_speedup", "bytes_kept", "psnr", "ssim",
    }  # fmt: skip
    assert {record.plan for record in records} == set(names)


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


def test_a_page_holds_every_kind_of_section(tmp_path):
    table = Table(("name", "value"), (("<a>", "1.5"),))
    path = write_page(
        tmp_path / "page.html",
        title="A & B",
        lead="lead",
        sections=[
            Prose("Words", ["one", "two & three"]),
            Listing("Numbers", table, ["a note"]),
            Chart("Drawn", [Drawing('<svg viewBox="0 0 1 1"></svg>', "a dot", "caption")]),
            Grid("Seen", ["first"], [("row", "remark", [Image.new("RGB", (4, 4))])]),
        ],
    )
    page, text = read_page(path)
    assert "<title>A &amp; B</title>" in text
    assert "two &amp; three" in text
    assert "&lt;a&gt;" in text
    assert '<td class="number">1.5</td>' in text
    assert page.images[0]["alt"] == "first, row"


def test_a_plan_drawing_covers_every_unit_and_step():
    from leansd import dissect

    plan = preset("turbo", 10)
    drawing = draw_plan(plan, dissect(tiny_unet()))
    areas = [
        float(width) + 0.8 for width in re.findall(r'width="([\d.]+)" height="5\.6"', drawing.svg)
    ]
    assert sum(areas) == pytest.approx(46 * 360, rel=0.001)
    assert f"{len(plan.keys)} of 10 steps" in drawing.alt


def test_names_in_a_plot_do_not_cover_each_other():
    points = [Point(name, 2.0, 30.0 + i * 0.1, 1.9, 2.1) for i, name in enumerate("abcd")]
    svg = plot_tradeoff(points, x_name="x", y_name="y", alt="").svg
    places = re.findall(r'y="([\d.]+)"[^>]*font-size="13"', svg)
    assert len(places) == 4
    assert len({round(float(y) / 14) for y in places}) == 4
