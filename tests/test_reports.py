"""Reports of every kind keep the same promises; their figures and data."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

import leansd
from leansd.drawing import Request
from leansd.evaluation.compare import compare_pair
from leansd.evaluation.records import stamp
from leansd.evaluation.redundancy import list_records, read_spent
from leansd.plans.methods import METHODS
from leansd.plans.plan import Plan
from leansd.plans.presets import preset
from leansd.report.drawings import draw_heat, draw_plan
from leansd.report.figures import (
    embed_svg,
    encode_svg,
    get_colours,
    name_colours,
    open_axes,
    open_figure,
)
from leansd.report.nets import report_anatomy, report_surgery
from leansd.report.page import (
    LOUDER,
    AttachedFile,
    Chart,
    Drawing,
    Listing,
    PictureGrid,
    Prose,
    ReportPage,
    render_page,
    subtract_pictures,
    write_report,
)
from leansd.report.plans import report_pairs, report_plan
from leansd.report.plots import PlotPoint, average_points, plot_tradeoff
from leansd.surgery.edits import Surgery
from leansd.text import Table
from leansd.unets import predict_gain
from pages import parse_page, read_page
from reports import ANATOMY, KINDS, ORIGIN, write_run
from tiny import tiny_pipeline

COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")


@pytest.fixture(scope="module", params=KINDS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ReportPage, Path]:
    """A report of a kind, and the folder of its page."""
    make: Callable[[Path], ReportPage] = KINDS[request.param]
    report = make(tmp_path_factory.mktemp(request.param))
    page = write_report(tmp_path_factory.mktemp("page") / "page.html", report, ORIGIN)
    return report, page.parent


def test_every_report_is_a_page_that_needs_nothing_else(written: tuple[ReportPage, Path]) -> None:
    kind, folder = written
    page, text = read_page(folder / "page.html")
    head = text[: text.index("<section")]
    for said in ("leansd", ORIGIN.facts["torch"], ORIGIN.facts["time"], "<code>leansd"):
        assert said in head
    assert page.words["h1"] == [kind.title]
    assert 20 < len(kind.summary) < 330
    assert kind.summary[0].isupper() or kind.summary[0].isdigit()
    assert kind.summary.endswith((".", ")."))
    assert "None" not in kind.summary
    assert "nan" not in kind.summary
    assert page.tags.index("section") > page.tags.index("p")
    assert len(page.links) == len(kind.attachments) + (
        len(kind.sections) if len(kind.sections) > 2 else 0
    )
    assert all(image["alt"] and image["width"] and image["height"] for image in page.images)
    assert len(page.figures) == len(kind.drawings)
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in page.figures)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_every_figure_follows_the_page_and_is_a_file(written: tuple[ReportPage, Path]) -> None:
    kind, folder = written
    assert len(list(folder.iterdir())) == 1 + 2 * len(kind.drawings)
    for drawing in kind.drawings:
        svg = (folder / f"page-{drawing.name}.svg").read_text()
        ElementTree.fromstring(svg)
        with Image.open(folder / f"page-{drawing.name}.png") as picture:
            assert picture.width > 800
        assert set(COLOUR.findall(svg)) <= set(name_colours()), "every colour has a name"
        assert not COLOUR.search(embed_svg(svg, drawing.name, drawing.alt))


def test_a_figure_is_the_same_again() -> None:
    drawings = [draw_plan(preset("fast", 10), ANATOMY) for _ in range(2)]
    first, second = (encode_svg(each.figure) for each in drawings)
    assert first == second


def test_colours_have_one_name_each_in_light_and_dark() -> None:
    assert len(name_colours()) == len(get_colours())


def contrast(one: str, other: str) -> float:
    """Of two colours, after WCAG."""

    def shine(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05

    shines = shine(one), shine(other)
    return max(shines) / min(shines)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_can_be_told_from_the_page(theme: int) -> None:
    colours = {name: both[theme] for name, both in get_colours().items()}
    for ground in ("card", "paper"):
        assert contrast(colours["ink"], colours[ground]) > 7
        assert contrast(colours["soft"], colours[ground]) > 4.5
        assert contrast(colours["mark"], colours[ground]) > 4.5
        for name in colours:
            if name.startswith("series-"):
                assert contrast(colours[name], colours[ground]) > 3, name


def test_a_page_holds_every_kind_of_section(tmp_path: Path) -> None:
    figure = open_figure(100, 50)
    open_axes(figure, left=10, right=0, top=0, bottom=10)
    report = ReportPage(
        "A & B",
        "A <summary>.",
        "a < b",
        [
            Prose("Words", ["one", "two & three"]),
            Listing("Numbers", Table(("name", "value"), (("<a>", "1.5"),)), ["a note"]),
            Chart("Drawn", [Drawing("dot", figure, 'a "dot"', "caption")]),
            PictureGrid("Seen", ["first"], [("row", "remark", [Image.new("RGB", (4, 4))])]),
            Prose("Words", ["again"]),
        ],
        [AttachedFile("a.json", "{}", "all of it")],
        reload=60,
    )
    page, text = read_page(write_report(tmp_path / "page.html", report, ORIGIN))
    assert "<title>A &amp; B</title>" in text
    assert "two &amp; three" in text
    assert "&lt;a&gt;" in text
    assert '<td class="number">1.5</td>' in text
    assert page.images[0]["alt"] == "first, row"
    assert page.figures[0]["aria-label"] == 'a "dot"'
    assert page.ids == ["at-words", "at-numbers", "at-drawn", "at-seen", "at-words_2"]
    assert '<meta http-equiv="refresh" content="60">' in text
    assert 'download="a.json"' in text


def test_two_drawings_of_one_name_are_refused() -> None:
    drawing = draw_plan(preset("fast", 4), ANATOMY)
    with pytest.raises(ValueError, match="two drawings of one name"):
        ReportPage("", "", "", [Chart("", [drawing, drawing])])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reports_of_half_precision(dtype: torch.dtype) -> None:
    pipe = tiny_pipeline().to(dtype)
    anatomy = leansd.dissect(pipe.unet, name="tiny")
    plan = preset("deepcache", 10)
    request = Request(prompt="a", steps=10)
    drawn = compare_pair(pipe, plan, request.arguments, request.seed)
    pairs = [(request, drawn)]
    records = list_records(anatomy, None, stamp("cpu"))
    seen = leansd.preview(pipe.unet, Surgery("light").drop("dn0.l1", "up3.l1"), latent=8)
    for report in (
        report_plan(plan, anatomy, predict_gain(plan, anatomy)),
        report_pairs(pairs, plan, anatomy),
        report_anatomy(read_spent(records)[0], records),
        report_surgery(seen, "tiny"),
    ):
        text = render_page(report, ORIGIN)
        assert "not counted" not in text
        assert "nan" not in report.summary


def test_what_could_not_be_counted_fails_no_report() -> None:
    units = tuple(replace(unit, macs=0) for unit in ANATOMY)
    anatomy = replace(ANATOMY, units=units, macs=0, uncounted="not counted, because of a test")
    plan = preset("deepcache", 10)
    plain = report_plan(plan, anatomy, predict_gain(plan, anatomy))
    assert plain.summary.endswith("not counted, because of a test.")
    records = list_records(anatomy, None, stamp("cpu"))
    spent = report_anatomy(read_spent(records)[0], records)
    assert "not counted" in spent.summary
    for report in (plain, spent):
        render_page(report, ORIGIN)


# -- figures -----------------------------------------------------------------------------------


def measure_cells(drawing: Drawing, colour: str) -> float:
    """Area of all cells of a colour, in units x steps."""
    (axes, *_) = drawing.figure.axes
    total = 0.0
    for patch in axes.patches:
        if patch.get_facecolor()[:3] != tuple(int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)):
            continue
        corners = patch.get_path().vertices.reshape(-1, 5, 2)
        for cell in corners:
            total += (cell[1, 0] - cell[0, 0] + 0.08) * (cell[2, 1] - cell[1, 1]) / 0.86
    return total


def test_a_plan_drawing_covers_every_unit_and_step() -> None:
    plan = preset("turbo", 10)
    drawing = draw_plan(plan, ANATOMY)
    areas = [measure_cells(drawing, colour) for colour in name_colours()]
    assert sum(areas) == pytest.approx(46 * 10)
    assert f"{len(plan.keys)} of 10 steps" in drawing.alt


def test_a_method_that_is_added_to_the_table_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = replace(METHODS["reuse"], mark="T", label="toy", colour="#abcdef", dark="#123456")
    monkeypatch.setitem(METHODS, "toy", toy)
    plan = Plan.every(2, cut="up2.up", steps=6, how="toy")
    text = render_page(report_plan(plan, ANATOMY, 1.0), ORIGIN)
    assert "--toy: #abcdef" in text
    assert "--toy: #123456" in text
    assert "fill: var(--toy)" in text
    assert ">toy</text>" in text


def test_a_heat_map_is_stronger_for_more() -> None:
    rows = {"a": {1: 0.01, 2: 0.1}, "b": {1: 1.0, 2: 0.0}}
    drawing = draw_heat(rows, "Drift", name="drift")
    strengths = {patch.get_alpha() for patch in drawing.figure.axes[0].patches}
    assert {min(strengths), max(strengths)} == {1 / 12, 1.0}
    assert drawing.alt == "Drift: from 0.01 to 1, most at b."


def test_names_in_a_plot_do_not_cover_each_other() -> None:
    points = [PlotPoint(name, 2.0, 30.0 + i * 0.1, (1.9, 2.1)) for i, name in enumerate("abcd")]
    (axes,) = plot_tradeoff(points, x_name="x", y_name="y").figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4
    pairs = [(one, other) for n, one in enumerate(boxes) for other in boxes[:n]]
    assert not any(one.overlaps(other) for one, other in pairs)


def test_long_curves_are_averaged_and_keep_their_mean() -> None:
    points = [(float(n), float(n % 7)) for n in range(700)]
    fewer = average_points(points, 100)
    assert len(fewer) == 100
    assert fewer[-1][0] == 699
    assert sum(y for _, y in fewer) / 100 == pytest.approx(3.0)
    assert average_points(points, 700) is points


def test_a_difference_is_grey_where_there_is_none_and_amplified_elsewhere() -> None:
    one, other = (Image.new("RGB", (2, 2), (100, 100, shade)) for shade in (110, 100))
    assert subtract_pictures(one, one).getpixel((0, 0)) == (128, 128, 128)
    assert subtract_pictures(one, other).getpixel((1, 1)) == (128, 128, 128 + 10 * LOUDER)
    assert subtract_pictures(other, one, 100).getpixel((1, 1)) == (128, 128, 0)


def test_large_pictures_are_made_smaller_and_small_ones_kept() -> None:
    grid = PictureGrid(
        "Seen", ["a", "b"], [("", "", [Image.new("RGB", (8, 8)), Image.new("RGB", (900, 600))])]
    )
    text = render_page(ReportPage("t", "s", "m", [grid]), ORIGIN)
    small, large = parse_page(text).images
    assert str(small["src"]).startswith("data:image/png")
    assert str(large["src"]).startswith("data:image/webp")
    assert (large["width"], large["height"]) == ("900", "600")


# -- trainings ---------------------------------------------------------------------------------


def test_a_log_says_how_far_a_run_came(tmp_path: Path) -> None:
    course = write_run(tmp_path)
    assert course.state == "stopped"
    assert course.starts == {"warm": 0, "whole": 300}
    first, second = course.list_values("output")
    assert (first[0][0], first[-1][0], second[0][0], second[-1][0]) == (10, 300, 310, 750)
    assert len(course.list_values("features")) == 1
    assert course.stages[1].psnr[400] == 20
    assert list(course.stages[0].grids) == [100, 200, 300]
    assert course.stages[1].losses == ["output", "features", "loss"]
    assert course.write_rows().count("\n") == 75


def test_the_page_of_a_training_under_way_opens_itself_again(tmp_path: Path) -> None:
    text = render_page(KINDS["training_under_way"](tmp_path), ORIGIN)
    assert "http-equiv" in text
    assert "is under way after 450 of 600 steps of stage 2 of 2" in text
