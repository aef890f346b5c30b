"""Commands on a model whose denoiser is a transformer, from its folder as users have it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import leansd
from leansd.cli import main
from leansd.evaluation.records import get_field, load_records
from tiny import TOKENS, tiny_tokenizer
from tiny_transformers import SIDE, WIDTH, make_vae


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 without its third text encoder, in a folder."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=100, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1,
        projection_dim=WIDTH,
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=SIDE, patch_size=1, in_channels=4, out_channels=4, num_layers=1,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=WIDTH,
        joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=SIDE,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=make_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=CLIPTextModelWithProjection(text), tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text), tokenizer_2=tiny_tokenizer(),
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "sd3"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line; gives exit code, standard output and standard error."""

    def call(*words: Any) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_generate_draws_by_a_plan_and_says_what_ran(run: Any, model: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for plan in ("balanced", "full"):
        code, out, err = run(
            "generate", "a pear", "--model", model, "--plan", plan, "--steps", 12,
            "--out", tmp_path / plan, "--json",
        )  # fmt: skip
        assert code == 0, err
        (found[plan],) = json.loads(out.splitlines()[-1])["pictures"]
        assert ("balanced is not tuned for" in " ".join(err.split())) == (plan == "balanced")
    assert found["full"]["computed"] == 12
    assert found["balanced"]["computed"] + found["balanced"]["inherited"] == 12
    assert found["balanced"]["computed"] < 12
    told = run(
        "generate", "a pear", "--model", model, "--steps", 12, "--out", tmp_path, "--compare"
    )  # fmt: skip
    assert told[0] == 0, told[2]
    assert "a pear" in (tmp_path / "report.html").read_text()
    pictures = [Image.open(each["path"]).tobytes() for each in found.values()]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("generate", "a pear", "--plan", "deepcache", "--steps", 12), "is for UNets"),
        (("generate", "--prompts", "rows.txt"), "--prompts is for UNets"),
        (("profile",), "without a UNet2DConditionModel"),
        (("tune", "--calls", 40), "--calls is for UNets"),
        (("tune", "--drift", "drift.jsonl"), "--drift is for UNets"),
        (("generate", "a pear", "--sampler", "ddim"), "choose from flow-euler, flow-heun"),
        (
            ("bench", "--quick", "--sampler", "dpm++2m"),
            "Pipeline predicts a flow",
        ),
    ],
)
def test_what_is_for_unets_is_refused_by_one_sentence(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.txt").write_text("a pear\n")
    given = ("--model", model) if words[0] in ("generate", "bench") else (model,)
    code, out, err = run(*words, *given)
    assert (code, out) == (2, "")
    *notes, sentence = err.splitlines()
    assert why in sentence
    assert notes in ([], [f"opening {model}"])


def test_what_is_tuned_is_evaluated_and_held_against_rivals(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a pear\na plum\na quince\na medlar\n")
    shared = ("--prompts", "prompts.txt", "--guidance", 3)
    code, out, err = run(
        "tune", model, "--steps", 8, "--tries", 0, "--speeds", "2", "--out", "plan.json",
        "--json", *shared,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["sampler"] == "flow-euler"
    assert "The chosen plan" in Path("plan.html").read_text()
    # How fast a call was decides which plan it is.
    assert leansd.Plan.load("plan.json").steps <= 8
    plan = leansd.Plan.full(8, name="own").inherit("head", at=[3, 5, 7], how="forecast")
    plan.save("own.json")

    code, out, err = run(
        "evaluate", model, "--plan", "own.json", "--plan", "full", "--rival", "flow-dpm++2m:4",
        "--steps", 8, "--converged-steps", 12, "--json", *shared,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    values = {(each["plan"], each["metric"], each.get("reference")): each["value"]
              for each in found["results"]}  # fmt: skip
    assert values["full plan", "psnr", "full"] > 99
    assert values["own", "predicted_speedup", None] == 8 / 5

    code, out, err = run(
        "bench", "--model", model, "--quick", "--steps", 8, "--plans", "own.json",
        "--converged-steps", 12, "--out", "bench.jsonl", "--json", *shared,
    )  # fmt: skip
    assert code == 0, err
    (contest,) = json.loads(out.splitlines()[-1])["contests"]
    assert contest["sampler"] == "flow-euler"
    records = load_records(Path("bench.jsonl"))
    families = {each.get("family") for each in map(vars, records)} | {
        get_field(r, "family") for r in records
    }
    assert {"ours", "fewer", "samplers", "spectrum"} <= families
    assert any("is for UNets" in each for each in contest["left_out"])
