"""Data of incubation: the same samples in the same order whatever happens on the way."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from conformance.models import make_pipeline, xl_unet
from leansd import files
from leansd.errors import LeansdError
from leansd.incubation.data.batches import Conditioning, PairedSource, RandomLatents, join
from leansd.incubation.data.encoding import PictureEncoder, TextEncoder, read_picture
from leansd.incubation.data.kinds import (
    CachedData,
    DataContext,
    Dataset,
    FillReporter,
    open_source,
    read_options,
)
from leansd.incubation.data.sample_cache import Cache, CachedSource, Chances, Latents, SampleOrder
from leansd.incubation.data.samples import Flaw, Sample, digest, list_folder, list_tars
from leansd.incubation.recipe import DataConfig
from tiny import tiny_pipeline, tiny_scheduler, tiny_vae

SIDE = 16


def make_picture(tone: int, *, width: int = 20, height: int = 24, form: str = "PNG") -> bytes:
    """A picture whose left half is darker than its right one."""
    image = Image.new("RGB", (width, height), (tone, 40, 80))
    image.paste((255 - tone, 200, 90), (width // 2, 0, width, height))
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(home: Path, shards: int = 3, samples: int = 4) -> Path:
    """Tars as img2dataset writes them."""
    for shard in range(shards):
        files: dict[str, bytes] = {}
        for row in range(samples):
            key = f"{shard:05d}{row:04d}"
            files[f"{key}.jpg"] = make_picture(20 * row + 7 * shard, form="JPEG")
            files[f"{key}.txt"] = f"thing {shard} {row}".encode()
            files[f"{key}.json"] = json.dumps(
                {"original_width": 64, "original_height": 48}
            ).encode()
        write_tar(home / f"{shard:05d}.tar", files)
    (home / "00000_stats.json").write_text("{}")
    return home


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, list["Made"]]:
    """A cache of three shards of made-up latents, which needs no networks."""
    cache = Cache(tmp_path_factory.mktemp("cache"), {}, torch.float32, rows=3)
    shards = [Made(f"made-{number}", 5 + number) for number in range(3)]
    fill(cache, shards)
    return cache, shards


def fill(cache: Cache, shards: Any, encoder: Any = None, texts: Any = None, **ranks: int) -> None:
    Dataset(cache, shards, encoder or Making(), texts or Wording()).fill(**ranks)


class Made:
    """A shard of numbers."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.identity, self.reads = name, count, digest({"n": count}), 0

    def read(self) -> Iterator[Sample | Flaw]:
        self.reads += 1
        for row in range(self.count):
            yield Sample(f"{self.name}-{row}", (f"{self.name} {row}", f"{row}"), row)


class Making:
    """Latents whose values tell what they are of: the mirrored ones are negative."""

    batch = 2

    def describe(self) -> dict[str, Any]:
        return {}

    def encode(self, samples: list[Sample]) -> list[Latents | Flaw]:
        made: list[Latents | Flaw] = []
        for sample in samples:
            mean = torch.full((1, 4, 2, 2), 1.0 + sample.content)
            mean = torch.stack([mean[0], -mean[0]])
            sizes = torch.tensor([1001.0, 2, 3, 4, 5, 6])
            made.append(Latents(mean, torch.full_like(mean, 0.01), {"time_ids": sizes}))
        return made


class Wording:
    """Conditioning that follows from the caption's letters."""

    def encode(self, captions: list[str]) -> Conditioning:
        text = torch.tensor([[[float(sum(map(ord, each)))] * 3] * 2 for each in captions])
        return Conditioning(text, {"text_embeds": text[:, 0]})

    def encode_empty(self) -> Conditioning:
        return Conditioning(torch.zeros(1, 2, 3), {"text_embeds": torch.zeros(1, 3)})


def equal(one: Any, other: Any) -> bool:
    return (
        one.keys == other.keys
        and torch.equal(one.latents, other.latents)
        and torch.equal(one.text, other.text)
        and all(torch.equal(one.added[name], other.added[name]) for name in one.added)
    )


MIXED = Chances(empty=0.3, other=0.3, window=7)


def test_a_stream_goes_on_from_its_state_bit_for_bit(shelf: tuple[Cache, list[Made]]) -> None:
    source = CachedSource(*shelf, MIXED)
    whole = source.open(batch=4, seed=3)
    for _ in range(3):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    rest = CachedSource(*shelf, MIXED).open(batch=4, seed=3, state=state)
    for _ in range(8):  # over the epoch's end, which is in the middle of a batch
        assert equal(next(rest), next(whole))
    assert len(json.dumps(state)) < 200


def make_random() -> RandomLatents:
    text = Conditioning(torch.arange(3.0)[:, None, None])
    return RandomLatents((4, 2, 2), text, Conditioning(torch.full((1, 1, 1), -1.0)))


@pytest.mark.parametrize("world", [2, 3])
def test_the_global_order_does_not_depend_on_the_world(
    shelf: tuple[Cache, list[Made]], world: int
) -> None:
    cached = CachedSource(*shelf, MIXED)
    for source in (cached, make_random(), PairedSource(cached)):
        one = source.open(batch=2 * world, seed=1)
        ranks = [source.open(batch=2, seed=1, rank=rank, world=world) for rank in range(world)]
        for _ in range(3):
            assert equal(next(one), join([next(rank) for rank in ranks]))
        assert [rank.state() for rank in ranks] == [one.state()] * world
        assert equal(next(one), next(source.open(batch=2 * world, seed=1, state=ranks[0].state())))


def test_an_epoch_has_every_sample_once_and_the_next_another_order(
    shelf: tuple[Cache, list[Made]],
) -> None:
    source = CachedSource(*shelf, Chances(window=7))
    stream = source.open(batch=1, seed=0)
    epochs = [[next(stream).keys[0] for _ in range(len(source))] for _ in range(2)]
    assert len(set(epochs[0])) == len(source) == 18
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    other = source.open(batch=18, seed=1)
    assert list(next(other).keys) != epochs[0]


def test_samples_are_shuffled_across_the_shards_of_a_window() -> None:
    order = SampleOrder([10] * 8, seed=0, window=20)
    spots = [order.find(place) for place in range(80)]
    assert sorted(spots) == [(shard, row) for shard in range(8) for row in range(10)]
    for begin in range(0, 80, 20):
        assert len({shard for shard, _ in spots[begin : begin + 20]}) == 2
    assert [shard for shard, _ in spots[:20]] != sorted(shard for shard, _ in spots[:20])
    assert SampleOrder([10] * 8, seed=0, window=20).find(47) == spots[47]


def test_latents_are_drawn_anew_each_epoch(shelf: tuple[Cache, list[Made]]) -> None:
    source = CachedSource(*shelf, Chances(window=7))
    stream = source.open(batch=len(source), seed=0)
    epochs = [next(stream) for _ in range(12)]
    rows = [each.latents[each.keys.index("made-1-2")] for each in epochs]
    assert len({row.flatten()[0].item() for row in rows}) == 12
    for row in rows:  # mean 3 or, mirrored, -3, and a standard deviation of 0.01
        assert (row.abs() - 3).abs().max() < 0.06
        assert row.std() > 1e-4
    assert {bool(row.mean() > 0) for row in rows} == {True, False}


def test_prompts_are_empty_or_others_as_often_as_asked(shelf: tuple[Cache, list[Made]]) -> None:
    def count(**chances: float) -> tuple[float, float]:
        batch = next(CachedSource(*shelf, Chances(window=99, **chances)).open(batch=300, seed=0))
        empty = batch.text.flatten(1).eq(0).all(1)
        assert torch.equal(empty, batch.added["text_embeds"].eq(0).all(1))
        own = torch.zeros(300, dtype=torch.bool)
        for row, key in enumerate(batch.keys):
            name, number = key.rsplit("-", 1)
            sums = [sum(map(ord, caption)) for caption in (f"{name} {number}", number)]
            own[row] = batch.text[row, 0, 0].item() in sums
        assert batch.added["time_ids"].tolist() == [[1001.0, 2, 3, 4, 5, 6]] * 300
        return empty.float().mean().item(), (~own & ~empty).float().mean().item()

    assert count(empty=0.0) == (0, 0)
    empty, other = count(empty=0.25, other=0.5)
    assert abs(empty - 0.25) < 0.08
    assert 0.15 < other < 0.4  # some of the others' captions are like their own
    assert count(empty=1.0)[0] == 1


def test_a_share_that_changes_leaves_everything_else_alone(
    shelf: tuple[Cache, list[Made]],
) -> None:
    plain, mixed = (
        next(CachedSource(*shelf, chances).open(batch=9, seed=0))
        for chances in (Chances(empty=0, window=7), MIXED)
    )
    assert plain.keys == mixed.keys
    assert torch.equal(plain.latents, mixed.latents)
    assert not torch.equal(plain.text, mixed.text)


def test_a_state_of_other_data_or_another_seed_is_refused(
    shelf: tuple[Cache, list[Made]],
) -> None:
    cache, shards = shelf
    state = CachedSource(cache, shards).open(batch=1, seed=0).state()
    with pytest.raises(LeansdError, match="source"):
        CachedSource(cache, shards[:2]).open(batch=1, seed=0, state=state)
    with pytest.raises(LeansdError, match="seed was 0 and is 5"):
        CachedSource(cache, shards).open(batch=1, seed=5, state=state)
    with pytest.raises(LeansdError, match="rank 2 of 2"):
        CachedSource(cache, shards).open(batch=1, seed=0, rank=2, world=2)


# Filling


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_stopped_filling_goes_on_to_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [Made("a", 7), Made("b", 4)]
    whole = Cache(tmp_path / "whole", {}, rows=3)
    fill(whole, shards)
    shards = [Made("a", 7), Made("b", 4)]
    stopped = Cache(tmp_path / "stopped", {}, rows=3)
    written: list[Path] = []
    write = Path.write_bytes

    def run_out(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) < 4:
            return write(path, content)
        write(path, content[: len(content) // 2])
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", run_out)
    with pytest.raises(LeansdError, match=r"No space left.*make room"):
        fill(stopped, shards)
    kept = read_files(stopped.folder)
    assert stopped.find(shards[0]) is None
    with pytest.raises(LeansdError, match="shard a is not in"):
        CachedSource(stopped, shards)
    monkeypatch.undo()
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    name = f".{files._HOST}-{killed.pid}-{0:08x}{files.PARTIAL}"
    draft = stopped.locate_part(shards[0], 1).with_name(name)
    draft.write_bytes(b"of a writer that was killed")
    files._SWEPT.clear()  # as in the process that comes after it
    fill(stopped, shards)
    assert read_files(stopped.folder) == read_files(whole.folder)
    assert kept.items() <= read_files(whole.folder).items()
    reads = shards[0].reads
    fill(stopped, shards)
    assert shards[0].reads == reads


def test_processes_share_the_work_of_filling(tmp_path: Path) -> None:
    shards = [Made(name, 4) for name in "abc"]
    caches = [Cache(tmp_path / name, {}) for name in ("one", "two")]
    fill(caches[0], shards)
    for rank in range(2):
        fill(caches[1], shards, rank=rank, world=2)
    assert [shard.reads for shard in shards] == [2, 2, 2]
    assert read_files(caches[0].folder) == read_files(caches[1].folder)


def test_a_damaged_part_is_made_anew_and_never_read(tmp_path: Path) -> None:
    cache, shards = Cache(tmp_path, {}, rows=3), [Made("a", 7)]
    fill(cache, shards)
    before = read_files(cache.folder)
    path = cache.locate_part(shards[0], 1)
    source = CachedSource(cache, shards)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LeansdError, match=r"00001\.safetensors.*remove it"):
        next(source.open(batch=7, seed=0))
    fill(cache, shards)
    assert read_files(cache.folder) == before


def test_a_cache_of_others_is_refused(tmp_path: Path) -> None:
    cache = Cache(tmp_path, {"vae": "one"})
    assert Cache(tmp_path, {"vae": "two"}).folder != cache.folder
    assert Cache(tmp_path, {"vae": "one"}, torch.float32).folder != cache.folder
    card = cache.folder / "cache.json"
    for content, why in (("{}", "tells of other networks"), ("{", "cannot be read")):
        card.write_text(content)
        with pytest.raises(LeansdError, match=why):
            Cache(tmp_path, {"vae": "one"})
    card.unlink()
    (cache.folder / "a").mkdir()
    (cache.folder / "a" / "00000.safetensors").touch()
    with pytest.raises(LeansdError, match=r"no cache\.json"):
        Cache(tmp_path, {"vae": "one"})


# Shards and folders


def test_corrupt_samples_are_counted_and_left_out_the_same_ones_every_time(
    tmp_path: Path, pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_picture(60)
    write_tar(
        tmp_path / "data" / "0.tar",
        {
            "a.png": good,
            "a.txt": b"fine",
            "cut.png": good[:60],
            "cut.txt": b"a cut picture",
            "odd.png": b"no picture",
            "odd.txt": b"a text",
            "mute.png": good,
            "mute.txt": b" \n",
            "latin.png": good,
            "latin.txt": b"caf\xe9",
            "broken.png": good,
            "broken.json": b"{",
            "text.txt": b"no picture",
            "json.webp": good,
            "json.json": json.dumps({"caption": "from the JSON"}).encode(),
        },
    )
    shards = list_tars(tmp_path / "data")
    for _ in range(2):
        found = list(shards[0].read())
        assert [each.key for each in found if isinstance(each, Flaw)] == [
            *("mute", "latin", "broken", "text")
        ]
    cache = Cache(tmp_path / "cache", {})
    with caplog.at_level("INFO"):
        fill(cache, shards, PictureEncoder(pipe, SIDE), TextEncoder(pipe))
    assert "6 of 8 samples are left out" in caplog.text
    assert "cut is left out: unreadable picture" in caplog.text
    assert " at 0x" not in caplog.text  # an address differs in every process, a cache does not
    source = CachedSource(cache, shards)
    assert (len(source), source.flaws) == (2, 6)
    assert set(next(source.open(batch=2, seed=0)).keys) == {"a", "json"}


def test_rows_whose_names_have_dots_are_samples_of_their_own(tmp_path: Path) -> None:
    picture = make_picture(60)
    files: dict[str, bytes] = {}
    for name in ("v1.5", "v1.6", "日本 #/一"):
        files |= {f"{name}.png": picture, f"{name}.txt": name.encode()}
    files |= {"whole.seg.png": picture, "whole.png": picture, "whole.txt": b"one of two pictures"}
    write_tar(tmp_path / "0.tar", files)
    found = list(list_tars(tmp_path)[0].read())
    assert [each.key for each in found] == ["v1.5", "v1.6", "日本 #/一", "whole"]
    assert not any(isinstance(each, Flaw) for each in found)


def test_a_range_names_shards_as_webdataset_does(tmp_path: Path) -> None:
    data = write_shards(tmp_path, shards=3, samples=1)
    names = [each.facts["tar"] for each in list_tars(data / "{00000..00001}.tar")]
    assert names == ["00000.tar", "00001.tar"]
    with pytest.raises(LeansdError, match=r"no tar shard .*00003\.tar"):
        list_tars(data / "{00000..00003}.tar")


def test_a_shard_may_have_as_long_a_name_as_a_file(tmp_path: Path) -> None:
    cache, shard = Cache(tmp_path, {}), Made("é" * 125, 3)
    fill(cache, [shard])
    assert len(CachedSource(cache, [shard])) == 3


@pytest.mark.parametrize("cut", [700, 2048, -1024, -10240])
def test_a_shard_that_was_cut_off_is_a_clear_stop(tmp_path: Path, cut: int) -> None:
    path = write_shards(tmp_path, shards=1) / "00000.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path.write_bytes(content[: end if cut == -1024 else cut])
    with pytest.raises(LeansdError, match=r"00000\.tar.*download it anew"):
        list(list_tars(tmp_path)[0].read())


def test_another_tar_is_added_to_the_cache_and_a_changed_one_made_anew(
    tmp_path: Path, pipe: Any
) -> None:
    data = write_shards(tmp_path / "data", shards=2, samples=2)
    cache = Cache(tmp_path / "cache", {})
    encoder, texts = PictureEncoder(pipe, SIDE), TextEncoder(pipe)
    fill(cache, list_tars(data), encoder, texts)
    write_tar(data / "00001.tar", {"x.png": make_picture(3), "x.txt": b"x" * 12000})
    write_tar(data / "00002.tar", {"y.png": make_picture(9), "y.txt": b"y"})
    shards = list_tars(str(data / "*.tar"))
    assert [cache.find(shard) is None for shard in shards] == [False, True, True]
    fill(cache, shards, encoder, texts)
    keys = next(CachedSource(cache, shards).open(batch=4, seed=0)).keys
    assert set(keys) == {"000000000", "000000001", "x", "y"}


def test_folders_with_metadata_and_with_texts_beside(tmp_path: Path) -> None:
    for name in ("with/one.png", "with/deep/two.png", "beside/one.png", "beside/deep/two.PNG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(make_picture(10))
    rows = [
        {"file_name": "deep/two.png", "text": ["two", "a pair"]},
        {"file_name": "one.png", "text": "one"},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "one.png"},
        {"text": "nameless"},
    ]
    lines = "\n".join(map(json.dumps, rows)) + "\n[1]\n"
    (tmp_path / "with" / "metadata.jsonl").write_text(lines)
    (tmp_path / "beside" / "one.txt").write_text("one\n")
    (tmp_path / "beside" / "deep" / "two.txt").write_text("two")
    (tmp_path / "beside" / "mute.jpg").touch()
    found = [each for shard in list_folder(tmp_path / "with", rows=2) for each in shard.read()]
    assert [(s.key, s.captions) for s in found if isinstance(s, Sample)] == [
        ("deep/two.png", ("two", "a pair")),
        ("one.png", ("one",)),
    ]
    assert [each.key for each in found if isinstance(each, Flaw)] == [
        *("gone.png", "one.png", "metadata.jsonl:5", "metadata.jsonl:6")
    ]
    (shard,) = list_folder(tmp_path / "beside")
    keys = [each.key for each in shard.read()]
    assert keys == ["deep/two.PNG", "mute.jpg", "one.png"]
    before = shard.identity
    (tmp_path / "beside" / "one.txt").write_text("eno\n")
    assert list_folder(tmp_path / "beside")[0].identity != before


def test_where_there_are_no_data_it_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(LeansdError, match="no tar shards"):
        list_tars(tmp_path)
    with pytest.raises(LeansdError, match=r"metadata.jsonl .file_name and text"):
        list_folder(tmp_path)
    (tmp_path / "a.png").write_bytes(make_picture(1))
    with pytest.raises(LeansdError, match=r"a\.png, no caption"):
        list_folder(tmp_path)


# Encoding


def test_pictures_are_scaled_and_cut_in_the_middle() -> None:
    sample = Sample("a", ("a",), make_picture(10, width=40, height=20))
    read = read_picture(sample, 10)
    assert not isinstance(read, Flaw)
    pixels, time_ids = read
    assert pixels.shape == (3, 10, 10)
    assert pixels[0, 5, 0] < 60 < pixels[0, 5, -1]  # the edge between the halves is in the middle
    assert time_ids.tolist() == [20, 40, 0, 5, 10, 10]
    read = read_picture(replace(sample, size=(480, 960)), 10)
    assert not isinstance(read, Flaw)
    assert read[1].tolist() == [480, 960, 0, 5, 10, 10]


def test_transparency_is_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(buffer, "PNG")
    read = read_picture(Sample("a", ("a",), buffer.getvalue()), 8)
    assert not isinstance(read, Flaw)
    assert read[0].eq(255).all()


def prepare(pipe: Any, folder: Path, **settings: Any) -> Dataset:
    settings = {"resolution": SIDE, "batch": 2, **settings}
    options = read_options(DataConfig(**settings))
    assert isinstance(options, CachedData)
    return options.prepare(pipe, folder)


def test_what_is_cached_is_what_the_networks_make(tmp_path: Path, pipe: Any) -> None:
    data = write_shards(tmp_path / "data", shards=1, samples=2)
    options = {"kind": "shards", "path": str(data), "flip": True, "precision": "float32"}
    dataset = prepare(pipe, tmp_path / "cache", **options, empty=0)
    dataset.fill()
    batch = next(dataset.open().open(batch=24, seed=0))
    assert not batch.added
    pixels = {}
    for sample in list_tars(data)[0].read():
        assert isinstance(sample, Sample)
        read = read_picture(sample, SIDE)
        assert not isinstance(read, Flaw)
        pixels[sample.key] = read[0][None] / 127.5 - 1
    views = set()
    with torch.no_grad():
        for key, latents, text in zip(batch.keys, batch.latents, batch.text, strict=True):
            wanted = [pipe.vae.encode(p).latents[0] for p in (pixels[key], pixels[key].flip(-1))]
            close = [torch.allclose(latents, each, atol=1e-5) for each in wanted]
            views.add((key, *close))
            caption = f"thing 0 {int(key)}"
            own = pipe.encode_prompt([caption], "cpu", 1, False)[0][0]
            torch.testing.assert_close(text, own, atol=1e-5, rtol=1e-5)
    assert len(views) == 4
    assert all(sum(close) == 1 for _, *close in views)


def test_another_network_resolution_or_flip_has_a_cache_of_its_own(
    tmp_path: Path, pipe: Any
) -> None:
    data = write_shards(tmp_path / "data", shards=1, samples=1)
    options = {"kind": "shards", "path": str(data)}
    folders = {
        prepare(pipe, tmp_path / "cache", **(options | changes)).cache.folder
        for changes in ({}, {"resolution": 32}, {"flip": True}, {"precision": "float32"})
    }
    for parts in ({"vae": tiny_vae(1)}, {"text_encoder": tiny_pipeline(1).text_encoder}):
        other = tiny_pipeline(**parts)
        folders.add(prepare(other, tmp_path / "cache", **options).cache.folder)
    assert len(folders) == 6
    same = prepare(tiny_pipeline(unet=pipe.unet), tmp_path / "cache", **options, batch=5, empty=0)
    assert same.cache.folder in folders


def test_drawn_latents_are_drawn_once_and_more_are_added(tmp_path: Path, pipe: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\na cat\na bird\n")
    options = {"kind": "drawn", "prompts": str(prompts), "steps": 2, "sampler": "ddim"}
    dataset = prepare(pipe, tmp_path / "cache", **options, other=0.5)
    told = []
    dataset.fill(on_progress=lambda *far: told.append(far))
    assert [samples for _, _, _, samples, _ in told] == [3]
    source = dataset.open()
    assert len(source) == 3
    kept = read_files(dataset.cache.folder)
    more = prepare(pipe, tmp_path / "cache", **options, each=2)
    more.fill()
    assert len(more.open()) == 6
    assert kept.items() <= read_files(dataset.cache.folder).items()
    batch = next(more.open().open(batch=6, seed=0))
    assert batch.latents.flatten(1).unique(dim=0).shape[0] == 6
    again = next(more.open().open(batch=12, seed=0)).latents
    assert torch.equal(again[:6], batch.latents)
    other = prepare(pipe, tmp_path / "cache", **(options | {"steps": 3}))
    assert other.cache.folder != more.cache.folder


def test_drawn_latents_have_one_cache_in_every_process(tmp_path: Path, pipe: Any) -> None:
    options = {"kind": "drawn", "prompts": ["a cat"], "sampler": "dpm++2m"}
    folders: set[Path] = set()
    for turn in (1, -1):  # diffusers' notes come from a set: their order is that of the process
        dataset = prepare(pipe, tmp_path, **options)
        config = dict(dataset.encoder.scheduler.config)  # pyright: ignore[reportAttributeAccessIssue]
        notes = sorted(config["_use_default_values"], reverse=turn < 0)
        dataset.encoder.scheduler._internal_dict = FrozenDict(  # pyright: ignore[reportAttributeAccessIssue]
            config | {"_use_default_values": notes}
        )
        facts = dataset.encoder.describe() | dataset.texts.describe()
        folders.add(Cache(tmp_path, facts).folder)
    assert len(folders) == 1


def test_every_kind_opens_as_a_recipe_names_it(tmp_path: Path, pipe: Any) -> None:
    write_shards(tmp_path / "tars", shards=1, samples=2)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(make_picture(5))
    (tmp_path / "pictures" / "a.txt").write_text("a thing")
    setting = DataContext(pipe, tmp_path / "run")
    for kind, options, count in (
        ("shards", {"path": str(tmp_path / "tars")}, 2),
        ("folder", {"path": str(tmp_path / "pictures")}, 1),
        ("drawn", {"prompts": ["a cat", "a dog"], "steps": 1}, 2),
    ):
        data = DataConfig(kind=kind, **options)
        source = open_source(data, setting)
        batch = next(source.open(batch=3, seed=0))
        assert len(set(batch.keys)) == count
        assert batch.latents.shape == (3, 4, 8, 8)  # the UNet's own size
        assert batch.latents.dtype == batch.text.dtype == torch.float32
        assert (tmp_path / "run" / "cache").is_dir()
        assert source.fingerprint == open_source(data, setting).fingerprint
    with pytest.raises(LeansdError, match="no option 'emtpy'; did you mean empty"):
        open_source(DataConfig(kind="shards", path="x", emtpy=0.1), setting)  # pyright: ignore[reportCallIssue]
    with pytest.raises(LeansdError, match=r"data\.empty: "):
        open_source(DataConfig(kind="drawn", prompts=["a"], empty=1.5), setting)  # pyright: ignore[reportCallIssue]


def test_a_source_without_a_usable_sample_is_refused(tmp_path: Path, pipe: Any) -> None:
    write_tar(tmp_path / "0.tar", {"a.png": b"nothing", "a.txt": b"a"})
    dataset = prepare(pipe, tmp_path / "cache", kind="shards", path=str(tmp_path / "*.tar"))
    dataset.fill()
    with pytest.raises(LeansdError, match="1 are left out"):
        dataset.open()


@pytest.fixture(scope="module")
def xl_pipe() -> Any:
    return make_pipeline("StableDiffusionXLPipeline", xl_unet(), tiny_scheduler())


def test_further_conditions_of_xl_pass_through(tmp_path: Path, xl_pipe: Any) -> None:
    data = write_shards(tmp_path / "data", shards=1, samples=2)
    dataset = prepare(
        xl_pipe, tmp_path / "cache", kind="shards", path=str(data), precision="float32", empty=0.5
    )
    dataset.fill()
    batch = next(dataset.open().open(batch=16, seed=0))
    assert batch.added["time_ids"].tolist() == [[48, 64, 1, 0, SIDE, SIDE]] * 16
    empty = batch.text.flatten(1).eq(0).all(1)  # the pipeline has zeros for an empty prompt
    assert empty.any()
    assert not empty.all()
    assert torch.equal(batch.added["text_embeds"].eq(0).all(1), empty)
    row = int(empty.logical_not().nonzero()[0])
    text, _, pooled, _ = xl_pipe.encode_prompt(
        f"thing 0 {int(batch.keys[row])}", do_classifier_free_guidance=False
    )
    torch.testing.assert_close(batch.text[row], text[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.added["text_embeds"][row], pooled[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        noise = xl_pipe.unet(
            batch.latents, 10, batch.text, added_cond_kwargs=dict(batch.added)
        ).sample
    assert noise.isfinite().all()


def test_xl_latents_are_drawn_with_the_sizes_of_the_pipeline(tmp_path: Path, xl_pipe: Any) -> None:
    dataset = prepare(
        xl_pipe, tmp_path, kind="drawn", prompts=["a cat"], steps=1, sampler="ddim", empty=0
    )
    dataset.fill()
    batch = next(dataset.open().open(batch=1, seed=0))
    assert batch.added["time_ids"].tolist() == [[SIDE, SIDE, 0, 0, SIDE, SIDE]]
    assert set(batch.added) == {"text_embeds", "time_ids"}


def test_progress_has_a_rate_and_what_is_left() -> None:
    said: list[str] = []
    times = iter([0.0, 10.0, 20.0, 60.0])
    tell = FillReporter(said.append, lambda: next(times))
    for done, samples in ((4, 400), (4, 450), (6, 600)):
        tell("00006", done, 8, samples, 3)
    assert said == [
        "00006: 6 of 8 shards, 600 samples in the cache, 3 left out, 4.0 samples/s, 50 s left"
    ]
