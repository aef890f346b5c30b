"""A Ray cluster: reaching one, and sharing it out among actors that hold a model each."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

from leansd.errors import LeansdError


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
