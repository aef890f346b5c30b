"""A job on a Ray cluster: a pool of actors, each with the model, that shards are streamed through.

Ray Data starts actors anew where a worker or a node goes down, and draws again what was lost with
them. Shards come back to the driver, which alone writes, so no file system has to be shared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from leansd.bulk.jobs import BulkJob, Drawer, DrawnShard, PictureTask, ShardTask, Work
from leansd.bulk.rows import PromptRow
from leansd.cluster import connect, lay_out_pool, require_success
from leansd.errors import LeansdError


class DrawingWorker:
    """Has a job's model, and draws shards."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._job = BulkJob(**job)
        self._drawer: Drawer | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        (number,), (items,) = batch["number"], batch["items"]
        read = json.loads(items)
        part = ShardTask(
            int(number),
            tuple(
                PictureTask(PromptRow.model_validate(row), seed, name) for row, seed, name in read
            ),
        )
        shard, mistake = DrawnShard(b"", {}), ""
        try:
            # Not opened before: Ray would start an actor that cannot be made again and again.
            self._drawer = self._drawer or Drawer(self._job)
            shard = self._drawer.draw(part)
        except LeansdError as error:
            mistake = str(error)
        return {
            "number": [part.number],
            "content": [shard.content],
            "faults": [json.dumps(shard.faults)],
            "mistake": [mistake],
        }


def draw_on_ray(
    job: BulkJob, parts: Sequence[ShardTask], *, address: str, workers: int | None = None
) -> Iterator[tuple[ShardTask, DrawnShard]]:
    """Shards as the pool finishes them.

    Args:
        address: of a cluster, or `local` for one on this machine.
        workers: actors; by default one for each GPU, or where there is none for as many
            processors as the job has threads.

    Raises:
        LeansdError: Ray is not installed or cannot be reached.
    """
    ray = connect(address)
    threads = job.threads or 1
    pool = lay_out_pool(ray, threads=threads, workers=workers, most=len(parts))
    by_number = {part.number: part for part in parts}
    tasks = [
        {
            "number": part.number,
            "items": json.dumps([(row.model_dump(), *rest) for row, *rest in part.items]),
        }
        for part in parts
    ]
    drawn = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        DrawingWorker,
        fn_constructor_args=({**asdict(job), "threads": 0 if pool["num_gpus"] else threads},),
        batch_size=1,
        **pool,
    )
    for row in drawn.iter_rows():
        require_success(row)
        yield (
            by_number[int(row["number"])],
            DrawnShard(bytes(row["content"]), json.loads(str(row["faults"]))),
        )


def work_on_ray(address: str, *, workers: int | None = None) -> Work:
    """`draw_on_ray` for `run_job`."""
    return partial(draw_on_ray, address=address, workers=workers)
