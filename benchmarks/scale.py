"""From 1 to 1,000 GPUs: pictures per second and euro, and what saturates first.

    python benchmarks/scale.py [--seconds 0.617] [--euro 2.0] [--speedup 1.0]

A calculation, not a measurement: no GPU took part. What the host does for a picture (packing a
shard, writing it, opening it to be scored) is measured here, as processor seconds, which other work
on the machine does not lengthen; what a GPU takes, and what everything costs, are inputs with their
sources below. Records go to `benchmarks/results/scale.jsonl`; those that are calculated say so.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image

from leansd.evaluation.extractors import batch_samples
from leansd.evaluation.picture_sets import list_pictures
from leansd.evaluation.records import Record, stamp, write_records
from leansd.files import write_file
from leansd.shards import DrawnPicture, name_shard, pack_shard

RESULTS = Path(__file__).parent / "results" / "scale.jsonl"
GPUS = (1, 10, 100, 1000)
SIDE = 512
SEEN = 16  # pictures that the host's work is measured on


@dataclass(frozen=True)
class Inputs:
    """What is taken as given: put your own."""

    pictures: int = 30_000
    """The field's COCO-30K protocol."""
    shard: int = 256
    """Rows of a shard, `leansd generate`'s default."""
    seconds: float = 30 / (3.04 * 16)
    """Of a GPU for a picture: SD 1.5, 512 px, 30 steps in batches of 16. Not measured by us: from
    3.04 steps per second of such a batch on an A100, float16, PyTorch 2.0 without compiling, as
    the documentation of diffusers has it (optimization/torch2.0, May 2023)."""
    speedup: float = 1.0
    """Of a plan over the full run."""
    euro: float = 2.0
    """An hour of such a GPU. An assumption."""
    start: float = 60.0
    """Seconds until a worker draws, but for reading weights. An assumption."""
    weights: float = 2.1
    """GB of a pipeline in float16: 1.07 billion parameters."""
    store: float = 5.0
    """GB per second that all workers together read weights at. An assumption."""
    picture: float = 0.45
    """MB of a PNG of 512 px, from 0.3 (flat) to 0.6 (detailed). An assumption."""
    line: float = 1.25
    """GB per second into the driver, which alone writes: 10 Gbit/s. An assumption."""


@dataclass(frozen=True)
class Outcome:
    """What a fleet does with a job; times in seconds.

    Attributes:
        load: until all draw.
        pack: of what the workers' processors do while their GPUs wait, making PNGs.
        draw: of the workers, in whole shards, packing included.
        ideal: the same, if work could be cut at will.
        send: of what is drawn, to the driver.
        write: of the driver's processor.
    """

    load: float
    pack: float
    draw: float
    ideal: float
    send: float
    write: float

    @property
    def total(self) -> float:
        return self.load + max(self.draw, self.send, self.write)

    @property
    def limit(self) -> str:
        """What the job waits for most, besides drawing at full width."""
        waits = {
            "start": self.load,
            "packing PNGs": self.pack,
            "too few shards": self.draw - self.ideal,
            "network": self.send - self.draw,
            "driver": self.write - self.draw,
        }
        most = max(waits, key=lambda name: waits[name])
        return most if waits[most] > 0.02 * self.total else "nothing"


def fit_shard(inputs: Inputs, gpus: int) -> int:
    """Rows of a shard: as many as leave four shards to a GPU, in whole batches of 16."""
    return max(16, min(inputs.shard, inputs.pictures // (4 * gpus) // 16 * 16))


def predict(inputs: Inputs, gpus: int, packing: float, driver: float) -> Outcome:
    """Seconds of a whole job.

    Args:
        packing: processor seconds of a worker for a picture; its GPU waits meanwhile.
        driver: processor seconds of the driver for a picture.
    """
    shards = math.ceil(inputs.pictures / inputs.shard)
    turns = math.ceil(shards / gpus)
    each = inputs.seconds / inputs.speedup + packing
    return Outcome(
        load=inputs.start + gpus * inputs.weights / inputs.store,
        pack=inputs.pictures * packing / gpus,
        draw=turns * inputs.shard * each,
        ideal=inputs.pictures * each / gpus,
        send=inputs.pictures * inputs.picture / 1000 / inputs.line,
        write=inputs.pictures * driver,
    )


def make_picture(seed: int) -> Image.Image:
    """Something between flat and noise, as photographs are."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grain = random.normal(0, 4, (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))


def measure_host() -> Iterator[tuple[str, float]]:
    """Processor seconds a picture of everything that is not the GPU's, and MB of a picture."""
    drawn = [DrawnPicture(f"{n:05d}", make_picture(n), {"prompt": "a thing"}) for n in range(SEEN)]
    with tempfile.TemporaryDirectory() as folder:
        content, packing = clock(lambda: pack_shard(drawn))
        path = Path(folder) / name_shard(0)
        yield "a worker packs a shard", packing
        # A view of what came through Ray is made bytes, and these are written.
        _, writing = clock(lambda: write_file(path, bytes(memoryview(content))))
        yield "the driver writes it", writing
        samples, reading = clock(lambda: [each.read() for each in list_pictures(folder).entries])
        yield "the driver reads it to be scored", reading
        _, opening = clock(lambda: list(batch_samples(samples, 16, None)))
        yield "a worker opens it to be scored", opening
        yield "MB", len(content) / SEEN / 1e6


def clock(work: Callable[[], Any]) -> tuple[Any, float]:
    """What work gives, and the processor seconds of a picture: the least of three."""
    least = math.inf
    given = None
    for _ in range(3):
        start = time.process_time()
        given = work()
        least = min(least, time.process_time() - start)
    return given, least / SEEN


def main(
    seconds: float = Inputs.seconds, euro: float = Inputs.euro, speedup: float = Inputs.speedup
) -> None:
    inputs = Inputs(seconds=seconds, euro=euro, speedup=speedup)
    common: dict[str, Any] = {**stamp("cpu"), "subject": "SD 1.5, 512 px"}
    records: list[Record] = []
    host = dict(measure_host())
    for name, value in host.items():
        metric, unit = ("picture_size", "MB") if name == "MB" else ("processor_seconds", "s")
        facts: dict[str, Any] = {**common, "plan": name, "calculated": False}
        records.append(Record(**facts, metric=metric, value=value, unit=unit))
    packing, driver = host["a worker packs a shard"], host["the driver writes it"]
    for gpus in GPUS:
        for shard in dict.fromkeys((inputs.shard, fit_shard(inputs, gpus))):
            given = replace(inputs, shard=shard)
            outcome = predict(given, gpus, packing, driver)
            facts = {
                **common, **asdict(given), "plan": f"{gpus} GPUs", "gpus": gpus,
                "limit": outcome.limit, "calculated": True,
            }  # fmt: skip
            cost = gpus * outcome.total / 3600 * inputs.euro
            rate = gpus / (inputs.seconds / inputs.speedup + packing)
            for metric, value, unit in (
                ("job_seconds", outcome.total, "s"),
                ("pictures_a_second", inputs.pictures / outcome.total, "1/s"),
                ("pictures_a_euro", inputs.pictures / cost, "1/€"),
                ("seconds_to_start", outcome.load, "s"),
                ("steady_pictures_a_second", rate, "1/s"),
                ("steady_line", rate * inputs.picture / 1000 / inputs.line, ""),
                ("steady_driver", rate * driver, ""),
            ):
                records.append(Record(**facts, metric=metric, value=value, unit=unit))
    write_records(RESULTS, records)


if __name__ == "__main__":
    typer.run(main)
