"""Scores of sets: known answers, equality with the field's packages, what is kept, what is told."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import leansd
from leansd import LeansdError
from leansd.cli import main
from leansd.evaluation import extraction
from leansd.evaluation.extraction import Features, load_statistics, save_statistics
from leansd.evaluation.extractors import PictureBatch, open_alexnet
from leansd.evaluation.picture_sets import ExtractionTask, PictureSet, list_pictures
from leansd.evaluation.quality import (
    Gaussian,
    fold_gaussian,
    frechet_distance,
    measure_gaussian,
    merge_gaussians,
    open_clip,
)
from leansd.evaluation.records import load_records
from leansd.evaluation.set_metrics import (
    METRICS,
    measure_precision_and_recall,
    measure_radii,
)
from leansd.shards import DrawnPicture, name_shard, pack_shard
from pages import read_page
from test_evaluate import clip_folder  # noqa: F401


def make_picture(seed: int, side: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_shards(folder: Path, seeds: Sequence[int], shard: int = 3, side: int = 32) -> Path:
    """Shards as the generating half writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, begin in enumerate(range(0, len(seeds), shard)):
        drawn = [
            DrawnPicture(
                f"{begin + place:03d}", make_picture(seed, side), {"prompt": f"thing {seed}"}
            )
            for place, seed in enumerate(seeds[begin : begin + shard])
        ]
        (folder / name_shard(number)).write_bytes(pack_shard(drawn))
    return folder


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "drawn", range(8))


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "reference", range(100, 110))


def measure(*arguments: Any, tmp_path: Path, **options: Any) -> dict[str, float]:
    records = leansd.score(*arguments, cache=tmp_path / "cache", device="cpu", **options)
    return {record.metric: record.value for record in records}


# -- known answers -----------------------------------------------------------------------------


def test_the_distance_of_gaussians_is_its_closed_form() -> None:
    generator = torch.manual_seed(0)
    one, two = (torch.rand(6, generator=generator).double() + 0.1 for _ in range(2))
    shift = torch.randn(6, generator=generator).double()
    ours = Gaussian(9, torch.zeros(6).double(), torch.diag(one.square()))
    theirs = Gaussian(9, shift, torch.diag(two.square()))
    expected = shift.square().sum() + (one - two).square().sum()
    assert frechet_distance(ours, theirs) == pytest.approx(expected.item(), rel=1e-12)
    assert frechet_distance(ours, ours) == pytest.approx(0, abs=1e-12)
    # Turned together, they are as far apart.
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q
    turned = [
        Gaussian(each.count, turn @ each.mean, turn @ each.covariance @ turn.T)
        for each in (ours, theirs)
    ]
    assert frechet_distance(*turned) == pytest.approx(expected.item(), rel=1e-9)
    with pytest.raises(LeansdError, match="width 6 cannot be compared with statistics of width 5"):
        frechet_distance(ours, measure_gaussian(torch.randn(9, 5)))


class Halves(torch.nn.Module):
    """Features of a picture: as many means of it as torchmetrics is told."""

    num_features = 6

    def forward(self, pictures: Tensor) -> Tensor:
        halves = torch.nn.functional.adaptive_avg_pool2d(pictures.float(), (2, 1))
        return halves.flatten(1)


@pytest.mark.filterwarnings("ignore")
def test_fid_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.manual_seed(0)
    real, fake = (
        torch.randint(0, high, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
        for high in (256, 200)
    )
    metric = FrechetInceptionDistance(feature=Halves(), input_img_size=(3, 8, 8))
    metric.set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours, theirs = (fold_gaussian(Halves()(each).split(7)) for each in (fake, real))
    assert frechet_distance(ours, theirs) == pytest.approx(metric.compute().item(), rel=1e-5)
    sets = [measure_gaussian(Halves()(each)) for each in (fake, real)]
    assert frechet_distance(ours, theirs) == pytest.approx(frechet_distance(*sets), rel=1e-9)


def test_it_does_not_matter_how_a_set_is_cut() -> None:
    # Far from the middle, where differences of large sums would lose most digits.
    features = torch.randn(50, 7, generator=torch.manual_seed(0)).double() + 1e4
    whole = measure_gaussian(features)
    for sizes in ([50], [1] * 50, [3, 20, 1, 26], [49, 1]):
        merged = fold_gaussian(features.split(sizes))
        assert merged.count == 50
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    one, two = (measure_gaussian(part) for part in features.split([20, 30]))
    there, back = merge_gaussians(one, two), merge_gaussians(two, one)
    torch.testing.assert_close(there.covariance, back.covariance, rtol=1e-9, atol=1e-9)
    with pytest.raises(LeansdError, match="at least 2"):
        frechet_distance(whole, fold_gaussian([features[:1]]))


def test_the_inception_score_is_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity")
    logits = torch.randn(23, 5, generator=torch.manual_seed(0)).double()
    seen = Features(Path(), PictureSet(Path(), ()), {})
    monkeypatch.setattr(Features, "read", lambda self, *_: logits.split(4))
    (found,) = METRICS["is"].score(seen, None)
    scores = []
    shuffled = logits[np.random.RandomState(2020).permutation(23)]
    for place in range(10):
        own = shuffled[23 * place // 10 : 23 * (place + 1) // 10].softmax(1)
        scores.append((own * (own / own.mean(0)).log()).sum(1).mean().exp())
    expected = torch.stack(scores)
    assert found.value == pytest.approx(expected.mean().item(), rel=1e-12)
    assert found.spread["split_deviation"] == pytest.approx(
        expected.std(correction=0).item(), rel=1e-9
    )


def test_precision_and_recall_of_constructed_sets() -> None:
    line = torch.arange(10.0)[:, None]
    assert measure_precision_and_recall(line, line) == (1, 1)
    assert measure_precision_and_recall(line, line + 100) == (0, 0)
    # All on a part of the reference: true, but covering that part only.
    wide = torch.arange(20.0)[:, None]
    assert measure_precision_and_recall(line[:5] / 10, wide, neighbours=1) == (1, 1 / 20)
    # Half of them far away.
    half = torch.cat([line, line + 100])
    assert measure_precision_and_recall(half, line, neighbours=1) == (0.5, 1)
    # The edge counts: a neighbour as far as the radius is within.
    radii = measure_radii(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), 2)
    assert radii.tolist() == [9, 4, 9, 36]
    with pytest.raises(LeansdError, match="more than 3 pictures"):
        measure_precision_and_recall(line[:3], line)


def test_distances_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.manual_seed(0)
    ours, theirs = (torch.randn(30, 4, generator=generator) for _ in range(2))
    whole = measure_precision_and_recall(ours, theirs)
    assert 0 < whole[0] < 1
    monkeypatch.setattr("leansd.evaluation.set_metrics.PART", 7)
    assert measure_precision_and_recall(ours, theirs) == whole


# -- pictures ----------------------------------------------------------------------------------


def test_shards_and_folders_of_the_same_pictures_score_alike(tmp_path: Path, drawn: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    for place in range(8):
        said = PngInfo()
        said.add_text("prompt", f"thing {place}")
        picture = make_picture(place)
        picture.save(loose / f"{place:03d}.png", pnginfo=said if place < 4 else None)
        if place in (4, 5):
            (loose / f"{place:03d}.txt").write_text(f"thing {place}\n")
        if place > 5:
            (loose / f"{place:03d}.json").write_text(json.dumps({"caption": f"thing {place}"}))
    packed = measure(drawn, tmp_path=tmp_path, metrics=["tiny-clip"])
    assert measure(loose, tmp_path=tmp_path, metrics=["tiny-clip"]) == pytest.approx(packed)


def test_pictures_of_all_sizes_and_kinds_are_seen(tmp_path: Path) -> None:
    folder = tmp_path / "mixed" / "deep"
    folder.mkdir(parents=True)
    make_picture(0, 20).save(folder / "a.jpg")
    make_picture(1, 40).convert("L").save(folder / "b.png")
    make_picture(2, 40).convert("RGBA").save(folder.parent / "c.webp")
    (folder / "notes.md").write_text("no picture")
    found = list_pictures(tmp_path / "mixed")
    assert [entry.id for entry in found.entries] == ["c", "deep/a", "deep/b"]
    for size in (None, 24):
        measured = measure(
            tmp_path / "mixed", tmp_path / "mixed", tmp_path=tmp_path, size=size,
            metrics=["tiny-frechet"],
        )  # fmt: skip
        assert measured["frechet_tiny_clip"] == pytest.approx(0, abs=1e-6)


def test_what_is_wrong_with_pictures_is_said(tmp_path: Path, drawn: Path) -> None:
    with pytest.raises(LeansdError, match="no folder of pictures"):
        list_pictures(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LeansdError, match="no pictures in"):
        list_pictures(tmp_path / "empty")
    twice = write_shards(tmp_path / "twice", range(3))
    (twice / "shard-000001.tar").write_bytes((twice / "shard-000000.tar").read_bytes())
    with pytest.raises(LeansdError, match=r"2 pictures of .* are called"):
        list_pictures(twice)
    whole = (drawn / "shard-000001.tar").read_bytes()
    for content, said in ((b"no tar", "is damaged"), (whole[:1500], "cut off|damaged")):
        (drawn / "shard-000001.tar").write_bytes(content)
        with pytest.raises(LeansdError, match=said):
            measure(drawn, tmp_path=tmp_path, metrics=["tiny-clip"])
    (drawn / "shard-000001.tar").unlink()
    assert list_pictures(drawn).gaps == ("shard-000001.tar",)
    with tarfile.open(drawn / "shard-000001.tar", "w") as tar:
        member = tarfile.TarInfo("x.png")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"none"))
    with pytest.raises(LeansdError, match="picture x cannot be opened"):
        measure(drawn, tmp_path=tmp_path, metrics=["tiny-clip"])
    silent = tmp_path / "silent"
    silent.mkdir()
    make_picture(0).save(silent / "a.png")
    with pytest.raises(LeansdError, match="1 of 1 pictures have no prompt, a for one"):
        measure(silent, tmp_path=tmp_path, metrics=["tiny-clip"])


def test_readers_do_not_wait_for_torch() -> None:
    code = "import sys, leansd.evaluation.picture_sets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- what is kept ------------------------------------------------------------------------------


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures are looked at from now on, batch by batch."""
    looked: list[int] = []
    honest = extraction.batch_samples

    def show(*arguments: Any) -> Any:
        for shown in honest(*arguments):
            looked.append(len(shown.pictures))
            yield shown

    monkeypatch.setattr(extraction, "batch_samples", show)
    return looked


def test_nothing_is_looked_at_twice_and_nothing_stale_is_used(
    tmp_path: Path, drawn: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = count_looks(monkeypatch)
    names = ["tiny-frechet", "tiny-clip", "tiny-precision"]
    first = measure(drawn, reference, tmp_path=tmp_path, metrics=["tiny-frechet"])
    assert sum(looked) == 18
    again = measure(drawn, reference, tmp_path=tmp_path, metrics=names)
    assert sum(looked) == 18
    assert again["frechet_tiny_clip"] == first["frechet_tiny_clip"]
    # A shard that changes is looked at again, and no other.
    other = write_shards(tmp_path / "other", range(50, 53))
    os.replace(other / "shard-000000.tar", reference / "shard-000002.tar")
    with pytest.raises(LeansdError, match="are called 000"):
        list_pictures(reference)
    (reference / "shard-000000.tar").unlink()
    changed = measure(drawn, reference, tmp_path=tmp_path, metrics=["tiny-frechet"])
    assert sum(looked) == 21
    assert changed != first
    # Pictures made another size first are other pictures.
    measure(drawn, reference, tmp_path=tmp_path, metrics=["tiny-frechet"], size=16)
    assert sum(looked) == 21 + 8 + 7


def test_a_stopped_scoring_goes_on(
    tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(drawn, tmp_path=tmp_path / "a", metrics=["tiny-clip"])
    honest = Features.keep
    puts: list[int] = []

    def keep(self: Features, task: ExtractionTask, *rest: Any) -> None:
        if len(puts) == 2:
            raise KeyboardInterrupt
        puts.append(task.part.number)
        honest(self, task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Features, "keep", keep)
        with pytest.raises(KeyboardInterrupt):
            measure(drawn, tmp_path=tmp_path / "b", metrics=["tiny-clip"])
    looked = count_looks(monkeypatch)
    assert measure(drawn, tmp_path=tmp_path / "b", metrics=["tiny-clip"]) == whole
    assert puts == [0, 1]
    assert sum(looked) == 2


def test_statistics_stand_in_for_the_pictures(
    tmp_path: Path, drawn: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(drawn, reference, tmp_path=tmp_path, metrics=["tiny-frechet"])
    (path,) = (
        path for path in (tmp_path / "cache").glob("*.safetensors")
        if path.stat().st_size and _is_gaussian_of(path, 10)
    )  # fmt: skip
    assert measure(drawn, path, tmp_path=tmp_path, metrics=["tiny-frechet"]) == expected
    with pytest.raises(LeansdError, match="another network or resize"):
        measure(drawn, path, tmp_path=tmp_path, metrics=["tiny-frechet"], size=16)
    with pytest.raises(LeansdError, match="has only statistics"):
        measure(drawn, path, tmp_path=tmp_path, metrics=["tiny-precision"])
    kept = load_statistics(path).gaussian
    arrays = tmp_path / "stats.npz"
    np.savez(arrays, mu=kept.mean.numpy(), sigma=kept.covariance.numpy())
    by_arrays = measure(drawn, arrays, tmp_path=tmp_path, metrics=["tiny-frechet"])
    assert by_arrays == pytest.approx(expected, rel=1e-9)
    for name, content, said in (
        ("a.npz", b"junk", "no statistics that can be read"),
        ("a.safetensors", b"junk", "no statistics that can be read"),
        ("a.csv", b"junk", "give a folder of pictures, or a file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LeansdError, match=said):
            measure(drawn, tmp_path / name, tmp_path=tmp_path, metrics=["tiny-frechet"])
    with pytest.raises(LeansdError, match="neither folder nor file"):
        measure(drawn, tmp_path / "no.npz", tmp_path=tmp_path, metrics=["tiny-frechet"])


def _is_gaussian_of(path: Path, count: int) -> bool:
    try:
        return load_statistics(path).gaussian.count == count
    except LeansdError:
        return False


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    gaussian = measure_gaussian(torch.randn(9, 4))
    kept = load_statistics(save_statistics(tmp_path / "a.safetensors", gaussian, "mark"))
    assert torch.equal(kept.gaussian.covariance, gaussian.covariance)
    assert (kept.gaussian.count, kept.mark) == (9, "mark")


# -- the command -------------------------------------------------------------------------------


def test_the_command_scores_a_folder(
    tmp_path: Path, drawn: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [
        "evaluate", "--pictures", str(drawn), "--reference", str(reference), "--out", str(out),
        "--cache", str(tmp_path / "cache"), "--device", "cpu", "--json",
        "--metrics", "tiny-frechet,tiny-clip,tiny-precision",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    facts = json.loads(printed.splitlines()[-1])
    assert [each["metric"] for each in facts["results"]] == [
        "frechet_tiny_clip", "clip_score_tiny_clip", "precision_tiny_clip", "recall_tiny_clip",
    ]  # fmt: skip
    assert all(each["extractor"] == "tiny CLIP" for each in facts["results"])
    assert "FID" not in printed
    records = load_records(out / "records.jsonl")
    values = load_records(out / "values.jsonl")
    assert len(values) == 8
    score = records[1]
    assert score.value == pytest.approx(sum(each.value for each in values) / 8)
    assert [each.picture for each in values] == [f"{place:03d}" for place in range(8)]
    _, page = read_page(out / "report.html")
    for word in ("Best by CLIP score (tiny CLIP)", "Worst by", "thing 3", "1904.06991"):
        assert word in page


def test_without_weights_the_tiny_clip_judges_and_says_what_is_missing(
    tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("leansd.evaluation.extractors.try_to_load_from_cache", lambda *_: None)
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["evaluate", "--pictures", str(drawn), *out]) == 0
    printed = capsys.readouterr().out
    assert "CLIP score (tiny CLIP)" in printed
    assert all(f"--weights {name}=PATH" in printed for name in ("inception", "clip", "lpips"))
    for options, said in (
        ([], "give --plan to measure plans, or --pictures"),
        (["--pictures", str(drawn), "--plan", "fast"], "give --plan to measure plans, or"),
        (["--pictures", str(drawn), "--metrics", "tiny-frechet"], "give --reference FOLDER or ST"),
        (["--pictures", str(drawn), "--weights", "clip"], "give NAME=PATH"),
        (["--pictures", str(drawn), "--reference", "a", "--reference", "b"], "--reference once"),
        (["--pictures", str(drawn), "--device", "abacus"], "no device"),
    ):
        assert main(["evaluate", *out, *options]) == 2
        assert said in capsys.readouterr().err


# -- the field's weights -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's InceptionV3, in a file as its own."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Blank(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
            return None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    net = Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)
    path = tmp_path_factory.mktemp("weights") / "random-inception.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_scores_are_those_of_its_features(tmp_path: Path, inception: Path) -> None:
    from leansd.evaluation.extractors import open_inception

    drawn = write_shards(tmp_path / "drawn", range(5))
    reference = write_shards(tmp_path / "reference", range(100, 104))
    records = leansd.score(
        drawn, reference, ["fid", "is", "precision"], weights={"inception": inception},
        cache=tmp_path / "cache", device="cpu", batch=4,
    )  # fmt: skip
    found = {record.metric: record for record in records}
    assert list(found) == ["fid", "inception_score", "precision", "recall"]
    assert {r.extractor for r in records} == {"InceptionV3 of random-inception.pth"}
    assert (found["fid"].reference, found["fid"].reference_pictures) == ("reference", 4)
    look = open_inception(inception, torch.device("cpu"))
    ours, theirs = (
        look(
            PictureBatch(
                torch.stack([as_pixels(make_picture(s)) for s in seeds]), (None,) * len(seeds)
            )
        )
        for seeds in (range(5), range(100, 104))
    )
    assert ours["pooled"].shape == (5, 2048)
    assert ours["logits"].shape == (5, 1008)
    sets = [measure_gaussian(each["pooled"]) for each in (ours, theirs)]
    expected = frechet_distance(*sets)
    assert found["fid"].value == pytest.approx(expected, rel=1e-4)
    from torch_fidelity.metric_isc import isc_features_to_metric

    expected = isc_features_to_metric(ours["logits"], 5)["inception_score_mean"]
    assert found["inception_score"].value == pytest.approx(expected, rel=1e-4)


def as_pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torchvision's AlexNet."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    state = torchvision.models.alexnet().state_dict()
    # Without the classifier, which nothing reads and most of the file is.
    torch.save({name: state[name] for name in state if name.startswith("features")}, path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_lpips_compares_pictures_of_the_same_id(tmp_path: Path, alexnet: Path) -> None:
    ours = write_shards(tmp_path / "ours", [0, 1, 2], side=64)
    theirs = write_shards(tmp_path / "theirs", [0, 1, 9, 4], shard=2, side=64)
    options: dict[str, Any] = {"metrics": ["lpips"], "weights": {"lpips": alexnet}}
    assert measure(ours, ours, tmp_path=tmp_path, **options) == {"lpips": 0}
    measured = measure(ours, theirs, tmp_path=tmp_path, **options)
    own = as_pixels(make_picture(2, 64))[None]
    third, fourth = (
        PictureBatch(own, (None,), as_pixels(make_picture(seed, 64))[None]) for seed in (9, 2)
    )
    look = open_alexnet(alexnet, torch.device("cpu"))
    assert measured["lpips"] == pytest.approx(look(third)["distances"].item() / 3, rel=1e-5)
    assert look(fourth)["distances"].item() == 0
    with pytest.raises(LeansdError, match=r"1 of 4 pictures of .* have no partner"):
        measure(theirs, ours, tmp_path=tmp_path, **options)
    small = write_shards(tmp_path / "small", range(4), side=48)
    with pytest.raises(LeansdError, match="give --resize N"):
        measure(ours, small, tmp_path=tmp_path, **options)
    assert measure(ours, small, tmp_path=tmp_path, size=64, **options)["lpips"] > 0


@pytest.mark.filterwarnings("ignore")
def test_a_clip_score_is_that_of_transformers(
    tmp_path: Path,
    clip_folder: Path,  # noqa: F811
    drawn: Path,
) -> None:
    from transformers import CLIPModel

    options: dict[str, Any] = {"metrics": ["clip"], "weights": {"clip": clip_folder}}
    records = leansd.score(drawn, cache=tmp_path / "cache", device="cpu", **options)
    (record,) = records
    assert record.extractor == clip_folder.name
    embedder = open_clip(clip_folder)
    net = CLIPModel.from_pretrained(clip_folder)
    pixels = torch.stack([as_pixels(make_picture(place)) for place in range(8)]).float() / 255
    with torch.no_grad():
        said = net(
            input_ids=embedder.tokenize([f"thing {place}" for place in range(8)]),
            pixel_values=embedder.normalize(pixels),
        )
    expected = said.logits_per_image.diag() / net.logit_scale.exp()
    assert record.value == pytest.approx(100 * expected.mean().item(), rel=1e-4)


def test_missing_weights_say_which_where_from_and_which_option(
    tmp_path: Path, drawn: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("leansd.evaluation.extractors.try_to_load_from_cache", lambda *_: None)
    for name, said in (
        ("fid", r"no weights of inception: .*https://\S+6726825d.pth.* --weights inception=PATH"),
        ("lpips", r"no weights of lpips: .*https://\S+alexnet\S+ .*--weights lpips=PATH"),
    ):
        with pytest.raises(LeansdError, match=said):
            measure(drawn, reference, tmp_path=tmp_path, metrics=[name])
    with pytest.raises(LeansdError, match="no weights of inception at"):
        measure(drawn, tmp_path=tmp_path, metrics=["is"], weights={"inception": tmp_path / "no"})
    junk = tmp_path / "junk.pth"
    junk.write_bytes(b"junk")
    pytest.importorskip("torch_fidelity")
    with pytest.raises(LeansdError, match="does not hold torch-fidelity's InceptionV3: get it"):
        measure(drawn, tmp_path=tmp_path, metrics=["is"], weights={"inception": junk})
    with pytest.raises(LeansdError, match="no metric 'fud': there are fid, is"):
        measure(drawn, tmp_path=tmp_path, metrics=["fud"])
    with pytest.raises(LeansdError, match="no extractor 'vgg'"):
        measure(drawn, tmp_path=tmp_path, metrics=["is"], weights={"vgg": junk})


def test_every_metric_has_an_extractor_and_says_what_it_means() -> None:
    from leansd.evaluation.extractors import EXTRACTORS

    for name, metric in METRICS.items():
        assert metric.extractor in EXTRACTORS
        assert "tiny CLIP" in metric.meaning if name.startswith("tiny-") else metric.meaning
    assert set(EXTRACTORS) == {metric.extractor for metric in METRICS.values()}
