"""How the embedded model is made: data, resuming, the judge, the card, and bad input."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from models.emoji import __main__ as command
from models.emoji import flow
from models.emoji import recipe as recipes
from models.emoji.assembly import load_pipeline, save_model
from models.emoji.card import write_card
from models.emoji.data import (
    CONCEPTS,
    STYLES,
    Concept,
    Pair,
    Pictures,
    Split,
    install_packages,
    read_concepts,
    read_icons,
    split_pairs,
    write_captions,
)
from models.emoji.evaluation import measure_frechet
from models.emoji.judge import Judge, JudgeLearner, load_judge, rank_names
from models.emoji.muon import make_optimizer, orthogonalize
from models.emoji.recipe import Recipe
from models.emoji.stages import load_state, save_json, train_stage

import leansd
from leansd.emoji.prompts import GRID_PROMPTS
from leansd.errors import LeansdError
from leansd.evaluation.records import load_records

TINY = Recipe(
    size=16,
    vae_channels=(8, 8, 8),
    vae_crop=8,
    vae_batch=2,
    vae_steps=4,
    vae_freeze_at=2,
    words=300,
    text_width=32,
    text_layers=1,
    text_batch=4,
    text_steps=3,
    channels=(8, 8, 8, 8),
    heads=(1, 1, 1, 1),
    unet_batch=4,
)
NAMES = ("red-apple", "dog", "moon")


def toy_pictures(size: int = 16) -> Pictures:
    """Each concept has a colour; the first and the last pair are held out."""
    concepts = sorted(Concept(name, "things", ("round",)) for name in NAMES)
    pairs = tuple(Pair(concept, style) for concept in concepts for style in sorted(STYLES))
    pixels = torch.full((len(pairs), 3, size, size), 255, dtype=torch.uint8)
    for row in range(len(pairs)):
        pixels[row, row // len(STYLES), 2:-2, 2:-2] = 40
    noise = torch.randint(255, (2, 3, size, size), generator=torch.Generator().manual_seed(0))
    split = Split(pairs[1:-1], (pairs[0], pairs[-1]))
    return Pictures(split, pixels[1:-1], pixels[[0, -1]], noise.byte())


@pytest.fixture(scope="module")
def toys() -> Iterator[Pictures]:
    pictures = toy_pictures()
    torch.manual_seed(1)
    sentences = torch.nn.functional.normalize(torch.randn(len(NAMES), 384), dim=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "read_pictures", lambda *_: pictures)
        patch.setattr(recipes, "embed_sentences", lambda _: sentences)
        yield pictures


@pytest.fixture(scope="module")
def first_step(toys: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, which tests begin from in a folder of their own."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    recipes.train_model(TINY, folder, steps=1)
    return folder


@pytest.fixture
def begun(first_step: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first_step, tmp_path / "run"))


def test_concepts_are_sorted_within_their_groups_and_named_once() -> None:
    names = [name for name, _ in read_concepts()]
    assert 450 <= len(names) == len(set(names))
    groups = CONCEPTS.read_text().split("\n\n")[1:]
    assert all(group.split()[-1] for group in groups)


def test_about_a_tenth_is_held_out_and_no_concept_in_all_styles() -> None:
    concepts = [Concept(name) for name, _ in read_concepts()]
    split = split_pairs(concepts)
    share = len(split.held_out) / len(split.held_out + split.train)
    assert 0.07 < share < 0.13
    assert len({pair.concept for pair in split.held_out}) == len(split.held_out)
    # By the name alone: other concepts change nothing.
    fewer = split_pairs(concepts[::2])
    assert set(fewer.held_out) == {p for p in split.held_out if p.concept in set(concepts[::2])}


def test_captions_begin_with_the_plain_one() -> None:
    pair = Pair(Concept("ear-of-corn", "food", ("maize",)), "noto")
    assert write_captions(pair) == [
        "an ear of corn, noto style",
        "ear of corn, noto style",
        "an emoji of an ear of corn, noto style",
        "an ear of corn, maize, noto style",
    ]


def test_the_grid_asks_for_what_the_vocabulary_has() -> None:
    concepts = [Concept(name) for name, _ in read_concepts()]
    known = {write_captions(Pair(concept, style))[0] for concept in concepts for style in STYLES}
    assert len(set(GRID_PROMPTS)) == 36
    assert set(GRID_PROMPTS) <= known


def test_icons_are_read_with_their_aliases_and_sizes(tmp_path: Path) -> None:
    folder = tmp_path / STYLES["noto"][0]
    folder.mkdir(parents=True)
    icons = {"dog": {"body": "<path/>"}, "moon": {"body": "<g/>", "width": 64}}
    aliases = {"hound": {"parent": "dog"}, "turned": {"parent": "dog", "rotate": 1}}
    content = {"icons": icons, "aliases": aliases, "width": 32, "height": 32}
    (folder / "icons.json").write_text(json.dumps(content))
    found = read_icons(tmp_path, "noto")
    assert sorted(found) == ["dog", "hound", "moon"]
    assert found["hound"] == found["dog"]
    assert 'viewBox="0 0 64 32"' in found["moon"]


def test_missing_packages_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.emoji.data import find_modules

    with pytest.raises(LeansdError, match=r"no package @iconify-json/noto, .* in .*node_modules"):
        find_modules(tmp_path, tmp_path)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(LeansdError, match=r"install Node\.js"):
        install_packages(tmp_path)


def test_training_goes_on_as_if_it_had_never_stopped(toys: Pictures, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipes.train_model(TINY, whole, steps=6)
    recipes.train_model(TINY, parts, until="vae")
    recipes.train_model(TINY, parts, steps=2)
    recipes.train_model(TINY, parts, steps=6)
    for stage in recipes.STAGES:
        one, two = (load_state(out / stage / "state.pt") for out in (whole, parts))
        assert one["step"] == two["step"]
        for mine, theirs in zip(_tensors(one["learner"]), _tensors(two["learner"]), strict=True):
            assert torch.equal(mine, theirs)
    assert not (whole / "pid").exists()


def test_a_stage_that_is_cut_off_goes_on_bit_equal(toys: Pictures, tmp_path: Path) -> None:
    def learner() -> object:
        torch.manual_seed(0)
        own = recipes.build_autoencoder(TINY.vae_channels, 16)
        return recipes.AutoencoderLearner(
            own, toys.train, toys.train, crop=8, batch=2, rate=1e-3, steps=6, freeze_at=3, seed=1
        )

    train_stage(learner(), tmp_path / "whole", 6, log_every=1)
    for stop in (1, 4, None):
        train_stage(learner(), tmp_path / "cut", 6, log_every=1, stop_after=stop)
    one, two = (load_state(tmp_path / name / "state.pt") for name in ("whole", "cut"))
    for mine, theirs in zip(_tensors(one["learner"]), _tensors(two["learner"]), strict=True):
        assert torch.equal(mine, theirs)
    logs = [(tmp_path / name / "losses.jsonl").read_text() for name in ("whole", "cut")]
    steps = [[json.loads(line)["step"] for line in log.splitlines()] for log in logs]
    assert steps[0] == steps[1] == [1, 2, 3, 4, 5, 6]


def test_the_decay_is_a_branch_and_the_model_is_its_average(toys: Pictures, begun: Path) -> None:
    recipes.train_model(TINY, begun, steps=3)
    trunk = (begun / "unet" / "state.pt").read_bytes()
    recipes.decay_model(TINY, begun, 2)
    assert (begun / "unet" / "state.pt").read_bytes() == trunk
    assert load_state(begun / "unet-decayed" / "state.pt")["step"] == 5
    pipe = recipes.load_run(begun, TINY)
    image = pipe("a dog, noto style", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 16, 16)
    assert {"vae", "text", "unet", "unet-decayed"} == set(
        recipes.describe_run(begun, TINY)["stages"]
    )


def test_the_flow_model_trains_on_what_its_pipeline_feeds_it_and_opens(
    toys: Pictures, begun: Path, tmp_path: Path
) -> None:
    pipe = flow.build_flow_pipeline(recipes.load_run(begun, TINY))
    untrained = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    flow.train_flow(pipe, toys, tmp_path / "flow", 3)
    trained = pipe.transformer.state_dict()
    assert any(not torch.equal(untrained[name], value) for name, value in trained.items())

    flow.save_flow(pipe, tmp_path / "saved")
    opened = leansd.load(tmp_path / "saved", device="cpu")
    assert isinstance(opened, StableDiffusion3Pipeline)
    fed: dict[str, torch.Tensor] = {}
    opened.transformer.register_forward_pre_hook(
        lambda _, args, inputs: fed.update(inputs), with_kwargs=True
    )
    caption = write_captions(toys.split.train[0])[0]
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": flow.BLANKS}
    image = opened(caption, output_type="pt", **call).images
    assert image.shape == (1, 3, 16, 16)
    lessons = recipes.load_latents(tmp_path / "flow" / "latents.pt")
    shown = torch.cat([fed["encoder_hidden_states"], fed["pooled_projections"][:, None]], 1)
    assert torch.allclose(shown[0], lessons.texts[0], atol=1e-5)
    drawn = flow.draw_flows(lessons, 4, 0, 0)
    assert drawn[1].shape[1:] == fed["encoder_hidden_states"].shape[1:]
    assert drawn[2].shape[1:] == fed["pooled_projections"].shape[1:]


def test_the_eyes_are_those_of_the_text_tower_and_go_with_the_model(
    toys: Pictures, begun: Path, tmp_path: Path
) -> None:
    from models.emoji.eyes import clip_score

    from leansd.emoji.clip import load_clip

    with pytest.raises(LeansdError, match="no trained text tower yet"):
        recipes.train_eyes(TINY, tmp_path / "none", 1)
    recipes.train_eyes(TINY, begun, 2)
    pipe = recipes.load_run(begun, TINY)
    size = save_model(pipe, tmp_path / "model", recipes.load_eyes(TINY, begun))
    assert 0 < size < 40
    clip, tokenizer = load_clip(tmp_path / "model")
    text = pipe.text_encoder.state_dict()
    for name, value in clip.text_model.state_dict().items():
        own = text[name] if name in text else text[f"text_model.{name}"]
        assert torch.equal(value, own.half().float())
    pixels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert len(clip_score(clip, tokenizer, pixels, ["a dog", "a moon"])) == 2


def test_whitened_latents_have_unit_variance_and_decode_the_same(toys: Pictures) -> None:
    from models.emoji.autoencoder import encode_pixels, measure_psnr, whiten_latents

    torch.manual_seed(0)
    vae = recipes.build_autoencoder(TINY.vae_channels, 16).eval()
    before = measure_psnr(vae, toys.train)
    whiten_latents(vae, toys.train)
    flat = encode_pixels(vae, toys.train).movedim(1, 0).flatten(1)
    assert torch.allclose(flat.mean(1), torch.zeros(4), atol=1e-3)
    assert torch.allclose(torch.cov(flat), torch.eye(4), atol=1e-2)
    assert measure_psnr(vae, toys.train) == pytest.approx(before, abs=1e-2)


def test_another_recipe_a_broken_checkpoint_and_a_second_process_are_one_line(
    toys: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipes.train_model(TINY, tmp_path, until="vae")
    other = dataclasses.replace(TINY, channels=(16, 16, 16, 16), text_steps=9)
    with pytest.raises(LeansdError, match="another recipe: channels differ"):
        recipes.train_model(other, tmp_path)
    (tmp_path / "pid").write_text(str(os.getppid()))
    with pytest.raises(LeansdError, match="is being trained by process"):
        recipes.train_model(TINY, tmp_path)
    (tmp_path / "pid").unlink()
    (tmp_path / "vae" / "state.pt").write_bytes(b"cut off")
    with pytest.raises(LeansdError, match="cannot read checkpoint"):
        recipes.train_model(TINY, tmp_path)
    monkeypatch.setattr("sys.argv", ["emoji", "grid", "--out", str(tmp_path / "nowhere")])
    assert command.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("sys.argv", ["emoji", "train", "--recipe", "third"])
    assert command.main() == 2
    assert "choose from emoji, second" in capsys.readouterr().err


def test_a_full_disk_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.emoji.stages import save_state

    path = tmp_path / "state.pt"
    save_state({"step": 1}, path)

    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(LeansdError, match=r"the old one is whole.*No space left"):
        save_state({"step": 2}, path)
    monkeypatch.undo()
    assert load_state(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_judge_learns_toys_and_is_loaded_as_it_was(tmp_path: Path) -> None:
    pictures = toy_pictures(32)
    names = recipes.name_pairs(pictures.split.train)
    torch.manual_seed(0)
    learner = JudgeLearner(
        Judge(sorted(set(names))), pictures.train, names, batch=7, rate=3e-3, steps=30, seed=0
    )
    train_stage(learner, tmp_path, 30)
    judge = load_judge(tmp_path / "state.pt")
    assert rank_names(judge, pictures.train, names) == [0] * len(names)
    with pytest.raises(LeansdError, match="the judge knows no cat"):
        rank_names(judge, pictures.train[:1], ["cat"])
    with pytest.raises(LeansdError, match="no judge in"):
        load_judge(tmp_path / "none.pt")


def test_the_commands_lead_from_a_run_to_a_card(
    toys: Pictures, begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("models.emoji.data.read_pictures", lambda *_: toys)
    names = recipes.name_pairs(toys.split.train)
    monkeypatch.setattr("models.emoji.data.read_unseen_style", lambda *_: (toys.train, names))
    monkeypatch.setitem(recipes.RECIPES, "emoji", TINY)

    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["emoji", *words, "--out", str(begun)])
        return command.main()

    assert run("evaluate") == 2
    assert "`python -m models.emoji assemble` writes one" in capsys.readouterr().err
    for words in ("train --steps 2", "eyes --steps 2", "assemble", "judge --steps 2"):
        assert run(*words.split()) == 0
    assert run("evaluate", "--steps", "2", "--count", "4") == 0
    result = json.loads((begun / "model" / "evaluation.json").read_text())
    assert (result["train"]["count"], result["held_out"]["count"]) == (4, 2)
    assert len(result["losses"]["held_out"]) == 10
    assert result["judge"]["style"] == "emojione"
    assert result["train"]["retrieval"]["choices"] == 4
    records = begun / "judged.jsonl"
    monkeypatch.setattr(leansd, "load", lambda *_, **__: load_pipeline(begun / "model"))
    assert run("plans", "--steps", "10", "--count", "3", "--results", str(records)) == 0
    cells = {(each.plan, each.metric): each for each in load_records(records)}
    assert (cells["full", "lost"].value, cells["full", "won"].value) == (0, 0)
    turbo = cells["turbo", "top1"].model_extra
    assert turbo is not None
    assert 0 < turbo["calls"] < 10
    assert (f"{turbo['calls']} steps", "top1") in cells
    assert cells["full", "frechet"].value > 0
    assert (
        run("plans", "--steps", "10", "--count", "3", "--plans", "fast", "--results", str(records))
        == 0
    )
    assert {each.plan for each in load_records(records)} - {"full"} == {"fast", "3 steps"}
    for name in ("README.md", "grid.png", "neighbours.png", "clip/model.safetensors"):
        assert (begun / "model" / name).is_file()


def test_muon_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    moved = orthogonalize(torch.randn(2, 12, 40), rounds=6)
    values = torch.linalg.svdvals(moved)
    assert 0.6 < values.min() < values.max() < 1.3
    layer = torch.nn.Linear(4, 4)
    optimizer = make_optimizer(layer, 0.1)
    before = layer.weight.detach().clone()
    layer(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    assert "momentum" in optimizer.state[layer.weight]


def test_the_frechet_distance_is_that_of_gaussians_in_the_judges_features() -> None:
    judge: Any = SimpleNamespace(look=lambda pixels: pixels.mean((2, 3))[:, :2])
    torch.manual_seed(0)
    one, other = (torch.randint(0, most, (40, 3, 64, 64), dtype=torch.uint8) for most in (256, 200))
    (mean, spread), (other_mean, other_spread) = (
        (seen.mean(0), torch.cov(seen.T))
        for seen in (judge.look(each / 255).double() for each in (one, other))
    )
    overlap = torch.linalg.eigvals(spread @ other_spread).sqrt().real.sum()
    apart = (mean - other_mean).square().sum()
    expected = apart + spread.trace() + other_spread.trace() - 2 * overlap
    assert measure_frechet(judge, one, other) == pytest.approx(float(expected), rel=1e-4)
    assert measure_frechet(judge, one, one) == pytest.approx(0, abs=1e-8)


def test_the_card_is_written_from_what_was_measured(tmp_path: Path) -> None:
    shares = {"top1": 0.5, "top5": 0.8, "by_style": dict.fromkeys(STYLES, 0.5)}
    drawn = {"count": 4, "generated": shares, "real": shares, "of_ceiling": 1.0, "frechet": 2.0}
    evaluation = {
        "date": "2026-01-01T00:00:00",
        "versions": {"torch": "2"},
        "seed": 0,
        "steps": 30,
        "guidance": 7.5,
        "scheduler": "DPMSolverMultistepScheduler",
        "pictures": {"train": 9, "held_out": 1, "concepts": 3},
        "grid_held_out": [GRID_PROMPTS[0]],
        "vae_psnr": {"mean": 26.5, "median": 26.0, "worst": 20.0},
        "frechet_real": 1.0,
        "losses": {"train": [0.5] * 10, "held_out": [0.6] * 10},
        "train": drawn,
        "held_out": drawn,
        "judge": {"style": "emojione", "count": 2, "top1": 0.4, "top5": 0.6},
    }
    with pytest.raises(LeansdError, match=r"models\.emoji evaluate"):
        write_card(tmp_path)
    save_json(evaluation, tmp_path / "evaluation.json")
    stage = {"steps": 10, "minutes": 1.0, "samples": 320}
    training = {
        "recipe": dataclasses.asdict(TINY),
        "stages": dict.fromkeys(("vae", "text", "unet"), stage),
    }
    save_json(training, tmp_path / "training.json")
    text = write_card(tmp_path).read_text()
    assert "26.5 dB" in text
    assert "`emojione`, it names 40.0 % right" in text
    assert "CC-BY 4.0" in text
    assert "Apache-2.0" in text
    assert "{{" not in text


def _tensors(state: object) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        return [t for value in state.values() for t in _tensors(value)]
    if isinstance(state, list):
        return [t for value in state for t in _tensors(value)]
    return []
