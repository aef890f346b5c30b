"""A job on a Ray cluster: a pool of actors, each with the model, that shards are streamed through.

Ray Data starts actors anew where a worker or a node goes down, and draws again what was lost with
them. Shards come back to the driver, which alone writes, so no file system has to be shared.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from leansd.bulk.drawing import Drawer
from leansd.bulk.jobs import Job, Part
from leansd.bulk.rows import Row
from leansd.bulk.running import Work
from leansd.errors import LeansdError


class Worker:
    """Has a job's model, and draws shards."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._drawer = Drawer(Job(**job))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        (number,), (rows,) = batch["number"], batch["rows"]
        part = Part(int(number), tuple(Row.model_validate_json(row) for row in rows.splitlines()))
        try:
            content, mistake = self._drawer.draw(part), ""
        except LeansdError as error:
            content, mistake = b"", str(error)
        return {"number": [part.number], "content": [content], "mistake": [mistake]}


def draw_on_ray(
    job: Job, parts: Sequence[Part], *, address: str, workers: int | None = None
) -> Iterator[tuple[Part, bytes]]:
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
    items = [
        {"number": part.number, "rows": "\n".join(row.model_dump_json() for row in part.rows)}
        for part in parts
    ]
    drawn = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Worker,
        fn_constructor_args=({**asdict(job), "threads": 0 if pool["num_gpus"] else threads},),
        batch_size=1,
        **pool,
    )
    for row in drawn.iter_rows():
        require_success(row)
        yield by_number[int(row["number"])], bytes(row["content"])


def lay_out_pool(ray: Any, *, threads: int, workers: int | None, most: int) -> dict[str, int]:
    """How many actors, and what each takes of the cluster: a GPU, or as many processors.

    Args:
        threads: of an actor without a GPU.
        most: what there is for them to do.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    cpus = int(ray.cluster_resources().get("CPU", 1))
    pool = workers or gpus or max(1, cpus // threads)
    return {
        "concurrency": min(pool, most),
        "num_gpus": 1 if gpus else 0,
        "num_cpus": 0 if gpus else threads,
    }


def require_success(row: Mapping[str, Any]) -> None:
    """What a worker says of a user's mistake, said here: Ray itself would lose the reason.

    Raises:
        LeansdError: the worker's own.
    """
    if row["mistake"]:
        raise LeansdError(str(row["mistake"]))


def connect(address: str) -> Any:
    """Ray, connected to a cluster.

    Raises:
        LeansdError: it is not installed, or nobody answers.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise LeansdError(
            "Ray is not installed: install leansd[ray], or leave --ray out"
        ) from error
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        knock(address)
        # `local` is Ray's own word: without it a cluster that happens to run here would be taken.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LeansdError(
            f"no Ray cluster answers at {address}: {first}; start one with `ray start --head`, or "
            "give --ray local"
        ) from error
    return ray


def knock(address: str) -> None:
    """Whether anybody listens at `HOST:PORT`: Ray itself would try for minutes.

    Raises:
        OSError: nobody does.
    """
    host, sign, port = address.rsplit("/", 1)[-1].rpartition(":")
    if sign and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()


def work_on_ray(address: str, *, workers: int | None = None) -> Work:
    """`draw_on_ray` for `run_job`."""
    return partial(draw_on_ray, address=address, workers=workers)
