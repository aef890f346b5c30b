"""A real Ray cluster of two nodes: whatever goes down, every picture is there once, as it was."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from leansd.bulk.jobs import (
    DRAWING,
    BulkJob,
    ShardTask,
    cut_parts,
    list_missing,
    read_sheet,
    run_job,
)
from leansd.cli import main
from leansd.errors import LeansdError
from leansd.shards import list_shards
from tiny import shallow_unet, tiny_pipeline

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROWS, SHARD = 16, 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a file of prompts."""
    home = tmp_path_factory.mktemp("bulk")
    tiny_pipeline(unet=shallow_unet()).save_pretrained(home / "model")
    rows = [{"id": f"{number:02d}", "prompt": f"thing {number}"} for number in range(ROWS)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture(scope="module")
def job(home: Path) -> BulkJob:
    return BulkJob(str(home / "model"), steps=8, shard=SHARD, threads=1, device="cpu")


@pytest.fixture(scope="module")
def parts(home: Path, job: BulkJob) -> list[ShardTask]:
    return cut_parts(read_sheet(home / "prompts.jsonl").rows, job)


@pytest.fixture(scope="module")
def expected(home: Path, job: BulkJob, parts: list[ShardTask]) -> dict[str, bytes]:
    """Every shard, drawn one after the other in this process."""
    run_job(job, parts, home / "serial")
    return read_shards(home / "serial")


def read_shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in list_shards(folder)}


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A cluster of one node."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    yield cluster
    cluster.shutdown()


@pytest.fixture
def cluster(head: Any) -> Iterator[Any]:
    """The same, with nobody connected before or after."""
    yield head
    ray.shutdown()


def list_workers() -> list[psutil.Process]:
    """The processes that have a model."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if command.startswith("ray::") and "MapWorker" in command:
            found.append(process)
    return found


def draw(
    cluster: Any, job: BulkJob, parts: list[ShardTask], folder: Path, acts: list[Callable[[], None]]
) -> None:
    """Draw on the cluster; after each of the first shards something happens."""
    left = iter(acts)

    def on_part(part: ShardTask) -> None:
        next(left, lambda: None)()

    run_job(job, parts, folder, work=DRAWING.place(cluster.address, 2), on_part=on_part)


def test_a_killed_worker_and_a_lost_node_cost_time_only(
    cluster: Any, job: BulkJob, parts: list[ShardTask], expected: dict[str, bytes], tmp_path: Path
) -> None:
    node = cluster.add_node(num_cpus=1)
    killed: list[int] = []

    def kill() -> None:
        worker = list_workers()[0]
        killed.append(worker.pid)
        worker.send_signal(signal.SIGKILL)

    draw(cluster, job, parts, tmp_path, [kill, lambda: None, lambda: cluster.remove_node(node)])
    assert killed
    assert read_shards(tmp_path) == expected


def test_a_killed_driver_goes_on(
    cluster: Any, home: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=1)
    command = [
        "generate",
        "--prompts", str(home / "prompts.jsonl"), "--model", str(home / "model"),
        "--plan", "full", "--steps", "8", "--shard", str(SHARD), "--threads", "1",
        "--ray", cluster.address, "--out", str(tmp_path / "out"),
        "--device", "cpu",
    ]  # fmt: skip
    first = subprocess.Popen([sys.executable, "-m", "leansd.cli", *command], start_new_session=True)
    deadline = time.monotonic() + 900  # a slow machine is no failure
    while not list_shards(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = len(list_shards(tmp_path / "out"))
    assert 0 < done < len(expected)
    assert main([*command, "--workers", "1"]) == 0
    assert read_shards(tmp_path / "out") == expected


def test_nobody_there_is_said(job: BulkJob, parts: list[ShardTask], tmp_path: Path) -> None:
    with pytest.raises(LeansdError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        run_job(job, parts, tmp_path, work=DRAWING.place("127.0.0.1:1"))
    assert list_missing(parts, tmp_path) == parts
