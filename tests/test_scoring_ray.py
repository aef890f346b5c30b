"""Scoring on a real Ray cluster of two nodes: the numbers of one process, whatever goes down."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leansd.errors import LeansdError
from leansd.evaluation.extraction import EXTRACTION, ExtractionConfig, Features
from leansd.evaluation.picture_sets import ExtractionTask
from leansd.evaluation.scoring import carry_out, plan_scoring
from leansd.shards import list_shards
from test_bulk_ray import cluster, head, list_workers  # noqa: F401
from test_scoring import write_shards

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
METRICS = ("tiny-frechet", "tiny-clip", "tiny-precision")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and others to hold them against."""
    home = tmp_path_factory.mktemp("scoring")
    write_shards(home / "drawn", range(24), shard=4)
    write_shards(home / "reference", range(100, 116), shard=4)
    return home


def score(home: Path, folder: Path, **options: Any) -> dict[str, float]:
    scoring = plan_scoring(
        home / "drawn", home / "reference", METRICS, {},
        config=ExtractionConfig(batch=3, threads=1, device="cpu"), keep=folder, cache=folder,
    )  # fmt: skip
    return {record.metric: record.value for record in carry_out(scoring, **options).records}


def count_calls(monkeypatch: pytest.MonkeyPatch, acts: list[Callable[[], None]]) -> list[int]:
    """The parts that come back; after each of the first something happens."""
    parts: list[int] = []
    left = iter(acts)
    honest = Features.keep

    def keep(self: Features, task: ExtractionTask, *rest: Any) -> None:
        honest(self, task, *rest)
        parts.append(task.part.number)
        next(left, lambda: None)()

    monkeypatch.setattr(Features, "keep", keep)
    return parts


def test_a_killed_worker_and_a_lost_node_change_no_number(
    cluster: Any,  # noqa: F811
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = score(home, tmp_path / "here")
    node = cluster.add_node(num_cpus=1)
    killed: list[int] = []

    def kill() -> None:
        worker = list_workers()[0]
        killed.append(worker.pid)
        worker.send_signal(signal.SIGKILL)

    parts = count_calls(monkeypatch, [kill, lambda: None, lambda: cluster.remove_node(node)])
    work = EXTRACTION.place(cluster.address, 2)
    assert score(home, tmp_path / "there", work=work) == pytest.approx(expected, abs=1e-6, rel=1e-6)
    assert killed
    assert sorted(parts) == sorted([*range(6), *range(4)])
    # What a worker says of a user's mistake is said here.
    damaged = list_shards(home / "drawn")[2]
    damaged.write_bytes(damaged.read_bytes().replace(b"IHDR", b"JUNK"))
    with pytest.raises(LeansdError, match=r"^picture \d+ cannot be opened"):
        score(home, tmp_path / "damaged", work=EXTRACTION.place(cluster.address, 1))
