"""Looking at pictures on a Ray cluster: files are read where this runs, and seen by a pool.

Ray Data streams parts from the reader to the actors, starts actors anew where a worker or a node
goes down, and has looked at again what was lost with them. Only this process reads pictures and
keeps what was seen, so no file system has to be shared, but for the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from leansd.cluster import connect, lay_out_pool, require_success
from leansd.errors import LeansdError
from leansd.evaluation.extraction import (
    ExtractedFeatures,
    Extraction,
    ExtractionConfig,
    ExtractionTask,
    RunExtraction,
)
from leansd.evaluation.picture_sets import PictureBytes, read_part

READERS = 2
"""Processes that read pictures where this runs."""


class ExtractionWorker:
    """Has the networks, and looks at parts."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = ExtractionConfig(**config)
        self._extraction: Extraction | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        (number,), (mistake,) = batch["number"], batch["mistake"]
        content = b""
        try:
            content = b"" if mistake else self._extract(batch)
        except LeansdError as error:
            mistake = str(error)
        return {"number": [int(number)], "content": [content], "mistake": [str(mistake)]}

    def _extract(self, batch: Mapping[str, Any]) -> bytes:
        """What is seen in a part, as the bytes of safetensors."""
        # Not opened before: Ray would start an actor that cannot be made again and again.
        self._extraction = self._extraction or Extraction(self._config)
        columns = (list(batch[name][0]) for name in ("id", "picture", "facts", "other"))
        samples = [PictureBytes(*row) for row in zip(*columns, strict=True)]
        seen = self._extraction.extract(samples, list(batch["extractors"][0]))
        flat = {
            f"{extractor} {name}": values.contiguous()
            for extractor, kinds in seen.items()
            for name, values in kinds.items()
        }
        return save(flat)


def extract_on_ray(
    config: ExtractionConfig,
    tasks: Sequence[ExtractionTask],
    *,
    address: str,
    workers: int | None = None,
) -> Iterator[tuple[ExtractionTask, ExtractedFeatures]]:
    """Parts as the pool finishes them.

    Args:
        address: of a cluster, or `local` for one on this machine.
        workers: actors; by default one for each GPU, or where there is none for as many
            processors as each has threads.

    Raises:
        LeansdError: Ray is not installed or cannot be reached, or a picture or weights cannot be
            read.
    """
    ray = connect(address)
    threads = config.threads or 1
    pool = lay_out_pool(ray, threads=threads, workers=workers, most=len(tasks))
    config = replace(config, threads=0 if pool["num_gpus"] else threads)
    by_number = dict(enumerate(tasks))
    rows = [
        {
            "number": number,
            "extractors": list(task.extractors),
            "entries": json.dumps([asdict(entry) for entry in task.part.entries]),
        }
        for number, task in by_number.items()
    ]
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    seen = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map(read_part, num_cpus=0, concurrency=READERS, scheduling_strategy=here)
        .map_batches(ExtractionWorker, fn_constructor_args=(asdict(config),), batch_size=1, **pool)
    )
    for row in seen.iter_rows():
        require_success(row)
        yield by_number[int(row["number"])], _unflatten(load(bytes(row["content"])))


def run_on_ray(address: str, *, workers: int | None = None) -> RunExtraction:
    """`extract_on_ray` for `fill_features`."""
    return partial(extract_on_ray, address=address, workers=workers)


def _unflatten(flat: Mapping[str, Tensor]) -> ExtractedFeatures:
    seen: dict[str, dict[str, Tensor]] = {}
    for key, values in flat.items():
        extractor, name = key.split(" ")
        seen.setdefault(extractor, {})[name] = values
    return seen
