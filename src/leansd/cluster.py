"""Work in tasks, here or on a Ray cluster: reaching one, and sharing it out among actors."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from leansd.errors import LeansdError, OutputError

Job = TypeVar("Job")
Task = TypeVar("Task")
Found = TypeVar("Found")
RunTasks: TypeAlias = Callable[[Job, Sequence[Task]], Iterable[tuple[Task, Found]]]
"""Does the tasks of a job, in any order."""


def finish_tasks(
    run: RunTasks[Job, Task, Found],
    job: Job,
    tasks: Sequence[Task],
    keep: Callable[[Task, Found], None],
    on_task: Callable[[Task], None],
    kept: str,
) -> None:
    """Do the tasks that are given, and keep what each finds as it comes.

    Args:
        kept: what is kept, in a word or two for messages.

    Raises:
        LeansdError: a task cannot be done, or nothing can be kept; what is there stays.
    """
    for task, found in run(job, tasks) if tasks else ():
        try:
            keep(task, found)
        except OutputError as error:
            raise OutputError(
                f"{error}; {kept} that are there are whole, and the same command goes on"
            ) from error
        on_task(task)


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
    """Raises here what a worker says of a user's mistake: Ray itself would lose the reason.

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
        _knock(address)
        # `local` is Ray's own word: without it a cluster that happens to run here would be taken.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LeansdError(
            f"no Ray cluster answers at {address}: {first}; start one with `ray start --head`, or "
            "give --ray local"
        ) from error
    return ray


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at `HOST:PORT`: Ray itself would try for minutes."""
    host, sign, port = address.rsplit("/", 1)[-1].rpartition(":")
    if sign and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()
