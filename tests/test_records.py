"""Records, tables and output files."""

import json

import pytest

from leansd.errors import LeansdError
from leansd.evaluation.records import (
    Record,
    load_records,
    put_records,
    stamp,
    write_records,
)
from leansd.files import check_file, check_folder, write_file
from leansd.text import Table


def make_record(**changes):
    fields = {
        "subject": "emoji",
        "plan": "balanced",
        "fingerprint": "0123456789ab",
        "metric": "psnr",
        "value": 31.5,
        "unit": "dB",
        "seed": 0,
        **stamp(),
    }
    return Record(**(fields | changes))


def test_a_record_is_one_flat_line_and_comes_back_equal(tmp_path):
    record = make_record(steps=30, sampler="ddim", guidance=7.5, prompts=6)
    fields = json.loads(record.line())
    assert "\n" not in record.line()
    assert all(not isinstance(value, dict | list) for value in fields.values())
    assert fields["steps"] == 30
    assert fields["torch"]
    assert fields["python"]
    path = write_records(tmp_path / "deep" / "records.jsonl", [record])
    assert load_records(path) == [record]


def test_records_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        make_record().value = 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value):
    with pytest.raises(ValueError, match="finite"):
        make_record(value=value)
    with pytest.raises(ValueError, match="finite"):
        make_record(low=value)


def test_a_case_field_is_a_plain_value():
    with pytest.raises(ValueError, match="prompts"):
        make_record(prompts=["a", "b"])


@pytest.mark.parametrize("line", ["{", "[1]", '{"subject": "emoji"}', "null"])
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text(f"{make_record().line()}\n\n{line}\n")
    with pytest.raises(LeansdError, match=r"line 3 is not a record"):
        load_records(path)
    with pytest.raises(LeansdError, match="line 3"):
        put_records(path, [make_record()], lambda record: record.metric)
    assert path.read_text().endswith(f"{line}\n")


def test_missing_and_binary_files_are_told(tmp_path):
    with pytest.raises(LeansdError, match="does not exist"):
        load_records(tmp_path / "none.jsonl")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LeansdError, match="cannot read"):
        load_records(tmp_path / "bytes")


def test_a_table_is_aligned_text_and_markdown():
    table = Table(("name", "value"), (("a|b", "1.5"), ("long name", "12.0")))
    assert str(table).splitlines() == ["name       value", "a|b          1.5", "long name   12.0"]
    assert table.markdown().splitlines()[1:3] == ["| --- | ---: |", "| a\\|b | 1.5 |"]
    with pytest.raises(ValueError, match="3 cells"):
        Table(("a", "b"), (("1", "2", "3"),))


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_file(tmp_path / "new" / "file.txt", "old")
    monkeypatch.setattr("os.replace", _refuse)
    with pytest.raises(LeansdError, match="cannot write"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in path.parent.iterdir()] == ["file.txt"]


def test_checking_creates_nothing(tmp_path):
    assert check_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(LeansdError, match="is not a folder"):
        check_folder(tmp_path / "file" / "out")
    with pytest.raises(LeansdError, match="it is a folder"):
        check_file(tmp_path)


def _refuse(*_):
    raise OSError(28, "No space left on device")
