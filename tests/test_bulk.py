"""Pictures by the thousand: rows in, shards out, once each, the same bytes whoever draws them."""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import leansd
from leansd.bulk import jobs
from leansd.bulk.jobs import (
    FILE,
    BulkJob,
    Drawer,
    DrawnShard,
    ShardTask,
    claim_folder,
    cut_parts,
    list_missing,
    read_sheet,
    run_job,
)
from leansd.cli import main
from leansd.errors import LeansdError
from leansd.plans.plan import Tuned
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
    job = BulkJob(model, steps=2, batch=2, shard=2, threads=1, home=str(tmp_path), device="cpu")
    parts = cut_parts(read_sheet(prompts).rows, job)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_job(job, parts, whole)

    def die(job: BulkJob, parts: Sequence[ShardTask]) -> Iterator[tuple[ShardTask, DrawnShard]]:
        drawer = Drawer(job)
        for part in (parts[2], parts[0]):
            yield part, drawer(part)
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
    job = BulkJob("emoji", steps=2, shard=2)
    parts = cut_parts(read_sheet(prompts).rows, job)
    out = tmp_path / "out"

    def draw(job: BulkJob, parts: Sequence[ShardTask]) -> Iterator[tuple[ShardTask, DrawnShard]]:
        return ((part, DrawnShard(part.name.encode(), {})) for part in parts)

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
    assert told[4].startswith("id: give at most 200 letters")
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
    claim_folder(tmp_path / "job", BulkJob("emoji", steps=2))
    claim_folder(tmp_path / "job", BulkJob("emoji", steps=2, device="cuda"))
    with pytest.raises(LeansdError, match="another job"):
        claim_folder(tmp_path / "job", BulkJob("emoji", steps=3))
    (tmp_path / "job" / FILE).write_text("{")
    with pytest.raises(LeansdError, match="cannot be read"):
        claim_folder(tmp_path / "job", BulkJob("emoji", steps=2))
    with pytest.raises(LeansdError, match="holds no job"):
        claim_folder(tmp_path, BulkJob("emoji", steps=2))


def test_a_damaged_shard_is_told(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(b"not a tar")
    with pytest.raises(LeansdError, match="is damaged"):
        list(read_shard(path))


def test_every_option_of_generate_holds_for_rows(
    model: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = tmp_path / "vae"
    tiny_pipeline(unet=shallow_unet(), seed=1).vae.save_pretrained(vae)
    shared = ["--negative", "ugly", "--count", "2", "--init", str(tmp_path / "red.png")]
    shared += ["--strength", "0.5", "--seed", "10"]
    assert run(model, prompts, tmp_path / "out", *shared) == 0
    drawn = [each for path in list_shards(tmp_path / "out") for each in read_shard(path)]
    assert [each.id for each in drawn[:4]] == ["00-0", "00-1", "01-0", "01-1"]
    assert [each.facts["seed"] for each in drawn[:4]] == [10, 11, 12, 13]
    told = {each.id: each.facts["negative_prompt"] for each in drawn}
    assert (told["00-0"], told["02-1"]) == ("ugly", "blue")
    assert run(model, prompts, tmp_path / "plain", "--seed", "10") == 0
    assert run(model, prompts, tmp_path / "vae-out", "--seed", "10", "--vae", str(vae)) == 0
    plain, other = read_pictures(tmp_path / "plain"), read_pictures(tmp_path / "vae-out")
    assert all(plain[key] != other[key] for key in plain)
    assert {each.picture.tobytes() for each in drawn}.isdisjoint(plain.values())
    # Where rows start from a picture, no step may be left over.
    capsys.readouterr()
    assert run(model, prompts, tmp_path / "none", *shared[4:], "--strength", "0.1") == 2
    assert "leaves no step" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_rows_follow_the_rules_for_plans(
    model: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["generate", "--prompts", str(prompts), "--model", model, "--threads", "1"]
    few = [*shared, "--steps", "4", "--plan", "guidance-cutoff"]
    assert main([*few, "--out", str(tmp_path / "few")]) == 0
    assert "4 steps change too much each" in capsys.readouterr().err
    (shard,) = list_shards(tmp_path / "few")
    assert {each.facts["plan"] for each in read_shard(shard)} == {"full"}
    assert main([*few, "--force", "--out", str(tmp_path / "forced")]) == 0
    (shard,) = list_shards(tmp_path / "forced")
    assert {each.facts["plan"] for each in read_shard(shard)} == {"guidance-cutoff"}
    plan = leansd.Plan.between([0, 1, 3], cut="head", steps=4, how="forecast", name="tuned")
    replace(plan, tuned=Tuned("ddim", "another", 7.5)).save(tmp_path / "plan.json")
    capsys.readouterr()
    tuned = [*shared, "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "tuned")]
    assert main(tuned) == 2
    assert "a UNet with other weights" in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()
    assert main([*tuned, "--force"]) == 0


def test_ids_stay_apart_whatever_they_are(model: str, tmp_path: Path) -> None:
    ids = ["v1.5", "v1.6", "v1-5", "A", "a", "x" * 200, "x" * 199 + "y", "éa"]
    rows = [{"id": each, "prompt": f"thing {place}"} for place, each in enumerate(ids)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert run(model, path, tmp_path / "out") == 0
    (shard,) = list_shards(tmp_path / "out")
    assert [each.id for each in read_shard(shard)] == ids
    with tarfile.open(shard) as tar:
        names = tar.getnames()
    # webdataset ends a sample's key at its first dot.
    keys = [name.split(".")[0].casefold() for name in names]
    assert len(set(keys)) == len(ids)
    assert all(len(name.encode()) < 200 for name in names)
    assert names[:2] == ["v1-5.png", "v1-5.json"]


TABLES = {
    "rows.csv": 'id,prompt,seed,negative_prompt\r\na,"one, two",3,\r\n\r\nb,three,,blue\r\n',
    "rows.jsonl": '{"id": "a", "prompt": "one, two", "seed": 3}\r\n\r\n'
    '{"id": "b", "prompt": "three", "negative_prompt": "blue"}\r\n',
    "rows.txt": "one, two\r\n\r\n# a remark\r\nthree\r\n",
}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", TABLES)
def test_files_come_as_people_have_them(name: str, mark: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((mark + TABLES[name]).encode())
    sheet = read_sheet(tmp_path / name)
    assert [row.prompt for row in sheet.rows] == ["one, two", "three"]
    assert not sheet.flaws
    if not name.endswith(".txt"):
        assert [row.id for row in sheet.rows] == ["a", "b"]
        assert [row.seed for row in sheet.rows] == [3, None]
        assert [row.negative_prompt for row in sheet.rows] == [None, "blue"]


def test_ids_may_be_numbers(tmp_path: Path) -> None:
    rows = [{"id": each, "prompt": "one"} for each in (7, "7", 0, -1, True, 1.5)]
    sheet = read_sheet(write_rows(tmp_path / "rows.jsonl", rows))
    assert [row.id for row in sheet.rows] == ["7", "0"]
    assert [flaw.line for flaw in sheet.flaws] == [2, 4, 5, 6]


def test_keys_that_are_not_used_are_told_with_their_line(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "one", "license": "mine"},
        {"id": "b", "prompt": "two", "license": "mine", "Negative": "blue"},
        {"id": "c", "prompt": "three", "negativ_prompt": "blue"},
        {"id": "d", "text": "four"},
        {"id": "e/f", "prompt": "five"},
        {"id": "..", "prompt": "six"},
    ]
    sheet = read_sheet(write_rows(tmp_path / "rows.jsonl", rows))
    assert [row.id for row in sheet.rows] == ["a"]
    assert "line 1: license is not used" in str(sheet.remarks[0])
    assert [flaw.line for flaw in sheet.flaws] == [2, 3, 4, 5, 6]
    for flaw in sheet.flaws[:2]:
        assert "did you mean negative_prompt?" in flaw.reason
    assert "did you mean prompt?" in sheet.flaws[2].reason
    csv = tmp_path / "rows.csv"
    csv.write_text("id,prompt,seed\na,one,x\nb,two,2\nc,three,1,more\n")
    told = {flaw.line: flaw.reason for flaw in read_sheet(csv).flaws}
    assert told == {2: "seed: 'x' is not a number", 4: "more cells than columns"}
    latin = tmp_path / "latin.txt"
    latin.write_bytes("one\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(LeansdError, match=r"latin\.txt, line 2 is not UTF-8"):
        read_sheet(latin)


def test_rows_that_show_nothing_are_told_and_left_out(
    model: str,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = jobs.paint_together

    def paint(*arguments: Any, **options: Any) -> Any:
        drawn = honest(*arguments, **options)
        for request, each in zip(arguments[1], drawn, strict=True):
            each.fault = "it is black" if request.prompt == "thing 1" else ""
        return drawn

    monkeypatch.setattr(jobs, "paint_together", paint)
    assert run(model, prompts, tmp_path / "out", "--json") == 1
    said = capsys.readouterr()
    assert "1 of 7 pictures show nothing; row 01: it is black" in said.err
    assert json.loads(said.out.splitlines()[-1])["faults"] == {"01": "it is black"}
    assert len(read_pictures(tmp_path / "out")) == 6
