"""Output files: names made from a user's words, and nothing written over what others wrote."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from errno import ENOSPC
from pathlib import Path

import pytest
from safetensors import SafetensorError

from leansd.errors import OutputError
from leansd.files import (
    find_free,
    name_file,
    name_files,
    number_files,
    stand_beside,
    write_file,
    write_new,
    writing,
)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("a red apple", "a-red-apple"),
        ("猫", "猫"),
        ("Ünïcode – naïve", "Ünïcode-naïve"),
        ("हिन्दी में", "हिन्दी-में"),  # its vowels are marks
        ("u\u0308ber", "über"),  # composed
        ("../../etc/passwd", "etc-passwd"),
        ("a/b\\c:d*e?f\0g", "a-b-c-d-e-f-g"),
        ("..", "picture"),
        ("🍎", "picture"),
        ("", "picture"),
        ("con", "con-"),
        ("LPT1", "LPT1-"),
        ("v1.5", "v1-5"),
        ("\ud800", "picture"),
    ],
)
def test_a_name_keeps_letters_of_any_script_and_stays_in_its_folder(words: str, name: str) -> None:
    assert name_file(words) == name


@pytest.mark.parametrize("letter", ["a", "猫", "é"])
def test_long_words_with_one_beginning_have_different_names(letter: str, tmp_path: Path) -> None:
    names = {name_file(letter * 300 + end) for end in ("", " one", " two")}
    assert len(names) == 3
    for name in names:
        assert len(name.encode()) <= 120
        (tmp_path / f"{name}.balanced.seed0.png").write_bytes(b"")


def test_names_of_a_set_differ_where_case_does_not_count() -> None:
    names = name_files(["v1.5", "v1-5", "A", "a", "a", "A-2"])
    assert names == ["v1-5", "v1-5-2", "A", "a-2", "a-3", "A-2-2"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "A.PNG").write_bytes(b"theirs")
    path = tmp_path / "a.png"
    assert find_free(path) == tmp_path / "a-2.png"
    first = write_new(path, b"one")
    assert (first, write_new(first, b"one")) == (tmp_path / "a-2.png", first)  # the same: once
    assert write_new(path, b"two") == tmp_path / "a-3.png"
    contents = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    assert contents == {"A.PNG": b"theirs", "a-2.png": b"one", "a-3.png": b"two"}


def test_files_that_belong_together_have_one_number(tmp_path: Path) -> None:
    paths = [tmp_path / "report.html", tmp_path / "records.jsonl"]
    assert number_files(paths) == dict(zip(paths, paths, strict=True))
    (tmp_path / "Report.html").write_bytes(b"")
    (tmp_path / "records-2.jsonl").write_bytes(b"")
    assert list(number_files(paths).values()) == [
        tmp_path / "report-3.html",
        tmp_path / "records-3.jsonl",
    ]


def test_what_lies_beside_a_file_belongs_to_it_alone() -> None:
    assert stand_beside("plan.json", ".html") == Path("plan.html")
    assert stand_beside("runs/v1.5", ".front.json") == Path("runs/v1.5.front.json")
    assert stand_beside("runs/v1.6.json", ".html") == Path("runs/v1.6.html")


def test_weights_that_cannot_be_written_leave_what_was_there(tmp_path: Path) -> None:
    """They come by a library that has errors of its own."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "old").write_bytes(b"old")

    def save(draft: Path) -> None:
        draft.mkdir()
        (draft / "half").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with (
        pytest.raises(OutputError, match=r"cannot write .*net: .*No space left"),
        writing(tmp_path / "net") as draft,
    ):
        save(draft)
    with pytest.raises(KeyError), writing(tmp_path / "net"):
        raise KeyError("a mistake of ours")
    assert [each.name for each in tmp_path.rglob("*")] == ["net", "old"]


@pytest.mark.parametrize(
    ("kind", "before"),
    [("file", "nothing"), ("file", "file"), ("file", "folder"), ("folder", "folder")],
)
def test_two_that_write_one_file_leave_a_whole_one(kind: str, before: str, tmp_path: Path) -> None:
    path = tmp_path / "net"
    fill(path, before, "old")
    with writing(path) as one:
        fill(one, kind, "one")
        with writing(path) as other:
            fill(other, kind, "other")
        assert read(path) == {"other"}
    assert read(path) == {"one"}
    assert [*tmp_path.iterdir()] == [path]


def test_many_that_write_one_folder_at_once(tmp_path: Path) -> None:
    path = tmp_path / "net"

    def write(number: int) -> None:
        for turn in range(20):
            with writing(path) as draft:
                fill(draft, "folder", f"{number}, {turn}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    assert len(read(path)) == 1
    assert [*tmp_path.iterdir()] == [path]


def test_what_a_killed_writer_left_is_taken_away_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "net"
    code = (
        "import os, sys; from leansd.files import writing\n"
        f"with writing({str(path)!r}) as draft:\n draft.mkdir(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    (killed,) = tmp_path.iterdir()
    theirs = tmp_path / killed.name.replace(killed.name.split("-")[1], str(os.getppid()))
    theirs.mkdir()
    with writing(path) as draft:
        fill(draft, "file", "new")
    assert {*tmp_path.iterdir()} == {path, theirs}


def test_the_thousandth_file_of_a_folder_is_written_like_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To list a folder for every file of it takes ever longer: 15 ms each at 20,000."""
    listed: list[Path] = []
    glob = Path.glob
    monkeypatch.setattr(
        Path, "glob", lambda path, *names: listed.append(path) or glob(path, *names)
    )
    for number in range(3):
        write_file(tmp_path / f"{number}.txt", "small")
        with writing(tmp_path / f"{number}.bin") as draft:
            draft.write_text("big")
    assert listed == [tmp_path]


def fill(path: Path, kind: str, words: str) -> None:
    if kind == "file":
        path.write_text(words)
    elif kind == "folder":
        path.mkdir()
        for name in "ab":
            (path / name).write_text(words)


def read(path: Path) -> set[str]:
    return {each.read_text() for each in ([path] if path.is_file() else path.iterdir())}


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(tmp_path / "a.png", b"old")

    def fail(self: Path, content: bytes) -> int:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fail)
    for write in (write_file, write_new):
        with pytest.raises(OutputError, match=r"cannot write .*a\.png: No space left on device"):
            write(path, b"new")
    assert {each: each.read_bytes() for each in tmp_path.iterdir()} == {path: b"old"}
