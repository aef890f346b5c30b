"""The redundancy of Stable Diffusion v1 and v2: the committed records and figures.

    python benchmarks/anatomy.py [sd15 sd21-base]          parameters and MACs, seconds
    python benchmarks/anatomy.py --time                    latency too, minutes on a quiet machine
    python benchmarks/anatomy.py --draw                    only the figures, from the records

Records go to `benchmarks/results/anatomy.jsonl`, figures to `docs/images/anatomy`: parameters and
computation by block, latency and parameters by unit. Without `--time` a model keeps the times that
are on record; where there are none its units are drawn with their MACs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from leansd.cli.terminal import hush_libraries
from leansd.evaluation.inner_timing import time_units
from leansd.evaluation.records import Record, load_records, stamp, write_records
from leansd.evaluation.redundancy import list_records, read_spent
from leansd.files import write_file
from leansd.report.figures import encode_png, encode_svg
from leansd.report.nets import draw_blocks, draw_units
from leansd.unets import open_anatomy, open_unet

RESULTS = Path(__file__).parent / "results" / "anatomy.jsonl"
IMAGES = Path(__file__).parents[1] / "docs" / "images" / "anatomy"
TIMED = ("call_time", "unit_time")


def measure(model: str, *, time: bool, batch: int, repeats: int) -> list[Record]:
    """The records of one model."""
    anatomy = open_anatomy(model)
    if not time:
        return list_records(anatomy, None, stamp("meta"))
    unet = open_unet(model)
    with Progress() as progress:
        task = progress.add_task(model, total=repeats + 1)
        times = time_units(
            unet, batch=batch, repeats=repeats, on_call=lambda _: progress.advance(task)
        )
    return list_records(anatomy, times, stamp(unet.device))


def main(
    models: Annotated[list[str] | None, typer.Argument()] = None,
    time: Annotated[bool, typer.Option("--time")] = False,
    draw: Annotated[bool, typer.Option("--draw")] = False,
    batch: int = 2,
    repeats: int = 5,
    results: Path = RESULTS,
    images: Path = IMAGES,
) -> None:
    hush_libraries()
    chosen = models or ["sd15", "sd21-base"]
    kept = load_records(results) if results.exists() else []
    if not draw:
        for model in chosen:
            old = [each for each in kept if each.subject == model and each.metric in TIMED]
            kept = [each for each in kept if each.subject != model]
            kept += measure(model, time=time, batch=batch, repeats=repeats)
            kept += [] if time else old
            write_records(results, kept)
    drawn = [each for each in read_spent(kept) if each.subject in chosen]
    for name, figure in {"blocks": draw_blocks(drawn), "units": draw_units(drawn)}.items():
        print(write_file(images / f"{name}.png", encode_png(figure)))
        print(write_file(images / f"{name}.svg", encode_svg(figure)))


if __name__ == "__main__":
    typer.run(main)
