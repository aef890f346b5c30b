"""Work in tasks, here or on a Ray cluster, whatever the tasks are.

On Ray a pool of workers opens the job, each once, and tasks are streamed through it. Ray Data
starts workers anew where one or its node goes down, and does again what was lost with them. What
tasks find comes back to the driver, which alone writes, so no file system has to be shared.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from leansd.errors import LeansdError, OutputError, read_cause

Job = TypeVar("Job")
Task = TypeVar("Task")
Found = TypeVar("Found")
RunTasks: TypeAlias = Callable[[Job, Sequence[Task]], Iterable[tuple[Task, Found]]]
"""Does the tasks of a job, in any order."""
READERS = 2
"""Processes that read for tasks where the driver runs."""


@dataclass(frozen=True)
class TaskKind(Generic[Job, Task, Found]):
    """How tasks of one kind are done; both functions are found by name on other machines.

    Attributes:
        open: opens what a job needs, such as networks; what it gives does one task.
        read: what a task needs of this machine's files.
    """

    open: Callable[[Job], Callable[[Any], Found]]
    read: Callable[[Task], Any] | None = None

    def place(self, ray: str | None, workers: int | None = None) -> RunTasks[Job, Task, Found]:
        """Who does them: a Ray cluster at this address (`local` for one here), or this process.

        Args:
            workers: at once on the cluster; by default one for each GPU, or where there is none
                for as many processors as the job has threads.
        """
        if ray is None:
            return self.run_here
        return partial(self.run_on_ray, address=ray, workers=workers)

    def run_here(self, job: Job, tasks: Sequence[Task]) -> Iterator[tuple[Task, Found]]:
        """One task after the other, in this process."""
        do = self.open(job)
        for task in tasks:
            yield task, do(task if self.read is None else self.read(task))

    def run_on_ray(
        self, job: Any, tasks: Sequence[Task], *, address: str, workers: int | None = None
    ) -> Iterator[tuple[Task, Found]]:
        """Tasks as the pool finishes them.

        Args:
            job: a dataclass with `threads`, those of a worker without a GPU.

        Raises:
            LeansdError: Ray is not installed or cannot be reached, or a task cannot be done.
        """
        ray = connect(address)
        threads = job.threads or 1
        pool = lay_out_pool(ray, threads=threads, workers=workers, most=len(tasks))
        job = replace(job, threads=0 if pool["num_gpus"] else threads)
        rows = ray.data.from_items(
            [
                {"number": at, "parcel": Parcel(task), "mistake": ""}
                for at, task in enumerate(tasks)
            ],
            override_num_blocks=len(tasks),
        )
        if self.read is not None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

            here = OnNode(ray.get_runtime_context().get_node_id(), soft=False)
            rows = rows.map(
                read_rows(self.read), num_cpus=0, concurrency=READERS, scheduling_strategy=here
            )
        found = rows.map_batches(
            TaskWorker, fn_constructor_args=(self.open, Parcel(job)), batch_size=1, **pool
        )
        for row in found.iter_rows():
            # Raised here: Ray itself would lose the reason.
            if row["mistake"]:
                raise LeansdError(str(row["mistake"]))
            yield tasks[int(row["number"])], row["parcel"].content


@dataclass(frozen=True)
class Parcel:
    """Any object in a column of Ray's, which takes tuples and mappings apart."""

    content: Any


def read_rows(read: Callable[[Any], Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function that reads what tasks need, row by row, or notes what is wrong."""

    def read_row(row: Mapping[str, Any]) -> dict[str, Any]:
        content, mistake = None, ""
        try:
            content = read(row["parcel"].content)
        except LeansdError as error:
            mistake = str(error)
        return {**row, "parcel": Parcel(content), "mistake": mistake}

    return read_row


class TaskWorker:
    """Opens a job and does tasks, or notes what is wrong."""

    def __init__(self, open_job: Callable[[Any], Callable[[Any], Any]], job: Parcel) -> None:
        self._open, self._job = open_job, job.content
        self._do: Callable[[Any], Any] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        (number,), (parcel,), (mistake,) = (batch[name] for name in ("number", "parcel", "mistake"))
        found = None
        try:
            if not mistake:
                # Not opened before: Ray would start an actor that cannot be made again and again.
                self._do = self._do or self._open(self._job)
                found = self._do(parcel.content)
        except LeansdError as error:
            mistake = str(error)
        return {"number": [int(number)], "parcel": [Parcel(found)], "mistake": [str(mistake)]}


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
    except Exception as error:  # Ray raises its bare class where a node does not come up in time
        raise LeansdError(
            f"no Ray cluster answers at {address}: {read_cause(error)}; start one with "
            "`ray start --head`, or give --ray local"
        ) from error
    return ray


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at `HOST:PORT`: Ray itself would try for minutes."""
    host, sign, port = address.rsplit("/", 1)[-1].rpartition(":")
    if sign and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()
