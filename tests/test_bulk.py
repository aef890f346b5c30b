"""Pictures by the thousand: rows in, shards out, once each, the same bytes whoever draws them."""

import json
import os
from collections.abc import Iterator, Sequence
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from leansd.bulk.jobs import (
    FILE,
    Drawer,
    Job,
    Part,
    Shard,
    claim_folder,
    cut_parts,
    list_missing,
    run_job,
)
from leansd.bulk.rows import read_sheet
from leansd.cli import main
from leansd.errors import LeansdError
from leansd.shards import list_shards, read_shard
from tiny import shallow_unet, tiny_pipeline


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(unet=shallow_unet()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    rows = [{"id": f"{number:02d}", "prompt": f"thing {number}"} for number in range(7)]
    rows[2] |= {"negative_prompt": "blue"}
    rows[3] |= {"init_image": "red.png", "strength": 0.5}
    rows[5] |= {"seed": 0}
    rows[6] |= {"seed": 0, "prompt": "thing 5", "license": "mine"}
    return write_rows(tmp_path / "prompts.jsonl", rows)


def read_pictures(folder: Path) -> dict[str, bytes]:
    return {
        drawn.id: drawn.picture.tobytes()
        for shard in list_shards(folder)
        for drawn in read_shard(shard)
    }


def run(model: str, prompts: Path, out: Path, *options: str) -> int:
    common = ["--model", model, "--plan", "full", "--steps", "2", "--threads", "1"]
    return main(["generate", "--prompts", str(prompts), "--out", str(out), *common, *options])


def test_every_row_becomes_a_picture(
    model: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(model, prompts, out, "--shard", "3", "--batch", "2") == 0
    assert [path.name for path in list_shards(out)] == [
        f"shard-{number:06d}.tar" for number in range(3)
    ]
    drawn = [each for shard in list_shards(out) for each in read_shard(shard)]
    assert [each.id for each in drawn] == [f"{number:02d}" for number in range(7)]
    assert [each.facts["seed"] for each in drawn] == [0, 1, 2, 3, 4, 0, 0]
    assert drawn[1].facts["prompt"] == "thing 1"
    assert drawn[5].picture.tobytes() == drawn[6].picture.tobytes()
    assert len({each.picture.tobytes() for each in drawn}) == 6
    # Once more: nothing is left to do, and nothing is touched.
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(model, prompts, out, "--shard", "3", "--batch", "2") == 0
    # Another job has no business there.
    assert run(model, prompts, out, "--shard", "3", "--batch", "2", "--seed", "5") == 2
    assert "holds the pictures of another job" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_stopped_job_goes_on(model: str, prompts: Path, tmp_path: Path) -> None:
    job = Job(model, steps=2, batch=2, shard=2, threads=1, home=str(tmp_path), device="cpu")
    parts = cut_parts(read_sheet(prompts).rows, job)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_job(job, parts, whole)

    def die(job: Job, parts: Sequence[Part]) -> Iterator[tuple[Part, Shard]]:
        drawer = Drawer(job)
        for part in (parts[2], parts[0]):
            yield part, drawer.draw(part)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, parts, broken, work=die)
    assert [part.number for part in list_missing(parts, broken)] == [1, 3]
    run_job(job, list_missing(parts, broken), broken)
    for path in list_shards(whole):
        assert path.read_bytes() == (broken / path.name).read_bytes()
    assert read_pictures(whole).keys() == read_pictures(broken).keys()


def test_a_full_disk_leaves_whole_shards(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("emoji", steps=2, shard=2)
    parts = cut_parts(read_sheet(prompts).rows, job)
    out = tmp_path / "out"

    def draw(job: Job, parts: Sequence[Part]) -> Iterator[tuple[Part, Shard]]:
        return ((part, Shard(part.name.encode(), {})) for part in parts)

    honest = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        if len(list_shards(out)) < 2:
            return honest(path, content)
        honest(path, content[:3])
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        with pytest.raises(LeansdError, match=r"No space left.*the same command goes on"):
            run_job(job, parts, out, work=draw)
    assert sorted(out.iterdir()) == list_shards(out)
    run_job(job, list_missing(parts, out), out, work=draw)
    assert [path.read_bytes() for path in list_shards(out)] == [p.name.encode() for p in parts]


def test_malformed_rows_are_told_by_their_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": "a", "prompt": "one"},
        "{no json",
        {"id": "b"},
        {"id": "../c", "prompt": "two"},
        {"id": "a", "prompt": "three"},
        {"id": "d", "prompt": "four", "init_image": "nowhere.png"},
        {"id": "e", "prompt": "five", "strength": 0.5},
        "",
        {"id": "f", "prompt": "six", "seed": -1},
        {"id": "g", "prompt": "seven"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    sheet = read_sheet(path)
    assert [(row.number, row.id) for row in sheet.rows] == [(0, "a"), (9, "g")]
    told = {flaw.line: flaw.reason for flaw in sheet.flaws}
    assert list(told) == [2, 3, 4, 5, 6, 7, 9]
    assert "no JSON" in told[2]
    assert "prompt" in told[3]
    assert "id" in told[4]
    assert "line 1" in told[5]
    assert "nowhere.png" in told[6]
    assert run(model, path, tmp_path / "strict", "--strict") == 2
    assert "line 2" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()
    assert run(model, path, tmp_path / "out", "--json") == 0
    said = capsys.readouterr()
    assert "2 more rows passed over" in said.err
    facts = json.loads(said.out.splitlines()[-1])
    assert (facts["pictures"], facts["drawn"], len(facts["flaws"])) == (2, 2, 7)


def test_parquet_is_read_too(prompts: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = pyarrow.table({key: [row.get(key) for row in rows] for key in keys})
    parquet.write_table(table, tmp_path / "prompts.parquet")
    assert read_sheet(tmp_path / "prompts.parquet").rows == read_sheet(prompts).rows


def test_what_is_wrong_is_said_before_anything_is_drawn(
    model: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    for arguments, said in (
        (["generate"], "give prompts, or a file"),
        (["generate", "a", "--prompts", str(prompts)], "one of the two"),
        (["generate", "--prompts", str(empty), "--model", model], "it is empty"),
        (["generate", "--prompts", str(tmp_path / "a.docx"), "--model", model], ".jsonl or .csv"),
        (["generate", "--prompts", str(tmp_path / "no.jsonl"), "--model", model], "cannot read"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    claim_folder(tmp_path / "job", Job("emoji", steps=2))
    claim_folder(tmp_path / "job", Job("emoji", steps=2, device="cuda"))
    with pytest.raises(LeansdError, match="another job"):
        claim_folder(tmp_path / "job", Job("emoji", steps=3))
    (tmp_path / "job" / FILE).write_text("{")
    with pytest.raises(LeansdError, match="cannot be read"):
        claim_folder(tmp_path / "job", Job("emoji", steps=2))
    with pytest.raises(LeansdError, match="holds no job"):
        claim_folder(tmp_path, Job("emoji", steps=2))


def test_a_damaged_shard_is_told(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(b"not a tar")
    with pytest.raises(LeansdError, match="is damaged"):
        list(read_shard(path))
