"""Evaluation: many calls from fixed seeds, fidelity to references, quality of sets, resumption."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

import leansd
from leansd import LeansdError, Plan
from leansd.cli import main
from leansd.evaluation.compare import Case
from leansd.evaluation.evaluation import FIDELITY, evaluate_cases, list_cases, make_reference
from leansd.evaluation.extractors import find_embedder
from leansd.evaluation.fidelity import CEILING, explain_missing_lpips, open_lpips
from leansd.evaluation.prompt_sets import read_prompts
from leansd.evaluation.quality import (
    OTHER_SEEDS,
    clip_score,
    embed_pictures,
    embed_prompts,
    frechet_distance,
    measure_gaussian,
    open_clip,
    rank_prompts,
)
from leansd.evaluation.records import load_records
from leansd.evaluation.runs import CallSet, run_calls
from leansd.runtime.samplers import make_scheduler
from pages import read_page
from tiny import WIDTH, shallow_unet, tiny_pipeline, tiny_tokenizer

PROMPTS = ["a red apple", "pizza", "a cat"]
STEPS = 4
TURBO = leansd.preset("turbo", STEPS, sampler="ddim")


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(unet=shallow_unet())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP in the layout of transformers."""
    folder = tmp_path_factory.mktemp("clips") / "random"
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2}
    text = {**tower, "vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(unet=shallow_unet()).save_pretrained(folder)
    return folder


def find_value(records, plan, metric, reference=None):
    """The mean of a metric; its record holds no `picture`."""
    (found,) = (
        r
        for r in records
        if (r.plan, r.metric) == (plan, metric)
        and not hasattr(r, "picture")
        and getattr(r, "reference", None) == reference
    )
    return found


# -- trajectories ------------------------------------------------------------------------------


def test_a_run_is_the_pipeline_itself_from_consecutive_seeds(pipe):
    finals = run_calls(pipe, CallSet(PROMPTS, seed=5, batch=1), STEPS)
    for place, prompt in enumerate(PROMPTS):
        options = {
            "num_inference_steps": STEPS,
            "generator": torch.Generator("cpu").manual_seed(5 + place),
        }
        latents = pipe(prompt, output_type="latent", **options).images[0]
        assert torch.equal(finals.latents[place], latents)
    assert finals.pictures.shape == (3, 3, 32, 32)
    assert finals.pictures.min() >= 0
    assert finals.pictures.max() <= 1
    assert len(finals.seconds) == 3


@pytest.mark.parametrize("plan", [None, TURBO], ids=["full", "turbo"])
def test_results_do_not_depend_on_the_batch_but_for_rounding(pipe, plan):
    alone = run_calls(pipe, CallSet(PROMPTS, batch=1), STEPS, plan)
    together = run_calls(pipe, CallSet(PROMPTS, batch=8), STEPS, plan)
    assert len(together.seconds) == 1
    torch.testing.assert_close(together.latents, alone.latents, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(together.pictures, alone.pictures, atol=2e-3, rtol=0)


def test_like_calls_run_together_and_others_alone():
    embeds = torch.zeros(1, 77, WIDTH)
    calls = [
        "a",
        {"prompt": "b"},
        {"prompt": "c", "negative_prompt": "d"},
        {"prompt_embeds": embeds},
        {"prompt_embeds": embeds},
        {"prompt_embeds": torch.zeros(1, 70, WIDTH)},
        {"prompt": "e", "guidance_scale": 3.0},
        {"prompt": "e", "guidance_scale": 3.0},
        *"fghi",
    ]
    parts = [(part.start, part.stop) for part in CallSet(calls, batch=3).parts]
    assert parts == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7), (7, 8), (8, 11), (11, 12)]


def test_calls_may_be_arguments(pipe):
    embeds = [pipe.encode_prompt(p, "cpu", 1, False)[0] for p in PROMPTS]
    none = pipe.encode_prompt("", "cpu", 1, False)[0]
    calls = [{"prompt_embeds": e, "negative_prompt_embeds": none} for e in embeds]
    by_embeds = run_calls(pipe, CallSet(calls, settings={"guidance_scale": 3.0}), STEPS)
    by_prompt = run_calls(pipe, CallSet(PROMPTS, settings={"guidance_scale": 3.0}), STEPS)
    assert len(by_embeds.seconds) == 1
    torch.testing.assert_close(by_embeds.latents, by_prompt.latents, atol=1e-4, rtol=1e-3)


def test_another_scheduler_is_for_the_run_only(pipe):
    own = pipe.scheduler
    other = run_calls(pipe, CallSet(PROMPTS[:1]), STEPS, scheduler=make_scheduler(pipe, "euler"))
    assert pipe.scheduler is own
    assert not torch.allclose(other.latents, run_calls(pipe, CallSet(PROMPTS[:1]), STEPS).latents)


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ([], "at least one prompt"),
        ([{"prompt": "a", "num_inference_steps": 3}], "cannot set num_inference_steps"),
        ([{"prompt": "a", "generator": None}], "cannot set generator"),
        ([{"prompt_embeds": torch.zeros(2, 77, WIDTH)}], "a first dimension of 1"),
        (["a", {"prompt": "b", "height": 48, "width": 48}], "several sizes"),
    ],
)
def test_calls_that_cannot_be_run_are_told(pipe, calls, said):
    with pytest.raises(LeansdError, match=said):
        run_calls(pipe, CallSet(calls, settings={"guidance_scale": 1.0}), 1)


# -- fidelity and quality ----------------------------------------------------------------------


def test_a_plan_that_computes_everything_has_no_error(pipe):
    records = leansd.evaluate(
        pipe, [Plan.full(STEPS), TURBO], PROMPTS, steps=STEPS, converged_steps=8
    )
    assert find_value(records, "full plan", "psnr", "full").value == CEILING
    assert find_value(records, "full plan", "ssim", "full").value == 1
    assert find_value(records, "full plan", "latent_error", "full").value == 0
    assert find_value(records, "turbo", "latent_error", "full").value > 0
    assert find_value(records, "turbo", "predicted_speedup").value > 1
    # Equal pictures are equally far from what they approximate.
    for metric in ("psnr", "ssim", "latent_error"):
        own, plan = (
            find_value(records, name, metric, "converged") for name in ("full", "full plan")
        )
        assert own.value == plan.value
        assert own.reference_steps == 8
    values = [r for r in records if hasattr(r, "picture") and r.metric == "latent_error"]
    assert len(values) == len(PROMPTS) * (1 + 2 + 2)
    assert {(r.picture, r.seed) for r in values} == {(0, 1000), (1, 1001), (2, 1002)}


def test_a_mean_has_the_standard_error_of_its_values(pipe):
    records = leansd.evaluate(pipe, TURBO, PROMPTS, steps=STEPS, references=["full"])
    values = [r.value for r in records if r.metric == "ssim" and hasattr(r, "picture")]
    mean = find_value(records, "turbo", "ssim", "full")
    assert mean.value == pytest.approx(sum(values) / 3)
    assert mean.standard_error == pytest.approx(np.std(values, ddof=1) / 3**0.5)


def measure(one, two):
    return frechet_distance(measure_gaussian(one), measure_gaussian(two))


def test_frechet_distance_is_its_definition():
    scipy = pytest.importorskip("scipy.linalg")
    generator = torch.manual_seed(0)
    one = torch.randn(40, 5, generator=generator)
    two = torch.randn(30, 5, generator=generator) * 2 + 1
    a, b = one.double().T.cov(), two.double().T.cov()
    root = torch.as_tensor(scipy.sqrtm((a @ b).numpy()).real)
    shift = (one.double().mean(0) - two.double().mean(0)).square().sum()
    expected = shift + a.trace() + b.trace() - 2 * root.trace()
    assert measure(one, two) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("count", [3, 40])
def test_frechet_distance_of_equal_sets_is_zero(count):
    some = torch.randn(count, 8, generator=torch.manual_seed(0))
    assert measure(some, some.flip(0)) == pytest.approx(0, abs=1e-9)
    assert measure(some, some + 1) == pytest.approx(8, rel=1e-5)
    with pytest.raises(LeansdError, match="at least 2"):
        measure(some, some[:1])


def test_retrieval_ranks_a_prompt_among_the_choices():
    choices, pictures = torch.eye(3), torch.eye(3)[[0, 1, 2, 0]]
    assert rank_prompts(pictures, choices, [0, 1, 2, 1]).tolist() == [0, 0, 0, 1]
    assert clip_score(pictures, choices[[0, 1, 2, 1]]).tolist() == [100, 100, 100, 0]


def test_quality_of_sets_has_the_spread_of_the_full_run(pipe, clip_folder):
    embedder = open_clip(clip_folder)
    records = leansd.evaluate(
        pipe, Plan.full(STEPS), PROMPTS, steps=STEPS, references=["full"], embedder=embedder,
        spread_sets=2,
    )  # fmt: skip
    for name in ("full", "full plan"):
        assert find_value(records, name, "frechet", "full").value == pytest.approx(0, abs=1e-6)
        assert find_value(records, name, "frechet", OTHER_SEEDS).value > 0
    score = find_value(records, "full", "clip_score")
    sets = [run_calls(pipe, CallSet(PROMPTS, seed=1000 + 3 * n), STEPS).pictures for n in range(3)]
    prompts = embed_prompts(embedder, PROMPTS)
    means = []
    for pictures in sets:
        seen = embed_pictures(embedder, pictures.mul(255).round().byte())
        means.append(clip_score(seen.vectors, prompts).mean())
    assert score.value == pytest.approx(means[0].item(), rel=1e-5)
    assert score.seed_spread == pytest.approx(torch.stack(means).std().item(), rel=1e-3)
    assert score.clip == "random"
    assert score.choices == 3


def test_without_prompts_pictures_are_only_compared_with_pictures(pipe, clip_folder):
    embeds = [pipe.encode_prompt(p, "cpu", 1, False)[0] for p in PROMPTS]
    records = leansd.evaluate(
        pipe, TURBO, [{"prompt_embeds": e} for e in embeds], steps=STEPS, references=["full"],
        embedder=open_clip(clip_folder), settings={"guidance_scale": 1.0},
    )  # fmt: skip
    assert find_value(records, "turbo", "frechet", "full").value >= 0
    assert not any(r.metric in ("clip_score", "retrieval") for r in records)


def test_lpips_from_a_file_of_weights(tmp_path):
    alexnet = pytest.importorskip("torchvision").models.alexnet
    with pytest.raises(LeansdError, match=r"no LPIPS weights at .*get them from https://"):
        open_lpips(tmp_path / "alexnet.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(LeansdError, match="does not hold"):
        open_lpips(tmp_path / "other.pth")
    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    lpips = open_lpips(tmp_path / "alexnet.pth")
    some = torch.rand(2, 3, 64, 64)
    assert lpips(some, some).tolist() == [0, 0]
    assert bool((lpips(some, some.flip(0)) > 0).all())
    # The weights of the file are those that are used.
    torch.manual_seed(1)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "other.pth")
    other = open_lpips(tmp_path / "other.pth")
    assert not torch.equal(other(some, some.flip(0)), lpips(some, some.flip(0)))


def test_presets_that_mean_the_full_run_are_measured_once(pipe):
    with pytest.warns(UserWarning, match="4 steps change too much"):
        cases = list_cases(pipe, ["turbo", "fast"], STEPS)
    assert [case.name for case in cases] == ["full", "full plan"]


# -- resumption --------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run where it is."""


@pytest.fixture
def go(pipe):
    """Run a small evaluation; gives the lines of its records without the time, and its work."""

    def call(keep, *, stop_at=None, batch=2, target=pipe):
        work = []

        def on_progress(far):
            work.append((far.done, far.total))
            if stop_at is not None and far.done >= stop_at:
                raise Killed

        evaluation = evaluate_cases(
            target,
            list_cases(target, [TURBO], STEPS),
            CallSet(PROMPTS, 1000, batch),
            subject="tiny",
            keep=keep,
            on_progress=on_progress,
            judging=replace(
                FIDELITY,
                references=[make_reference(name, STEPS, 8) for name in ("full", "converged")],
            ),
        )
        both = (*evaluation.records, *evaluation.values)
        return [r.model_copy(update={"time": ""}).line() for r in both], work

    return call


def test_a_stopped_evaluation_goes_on_and_gives_the_same_bytes(go, tmp_path):
    whole, work = go(tmp_path / "whole")
    total = 3 * (STEPS + 8 + STEPS)
    assert work[-1] == (total, total)
    for stop_at in (1, total // 2):
        keep = tmp_path / str(stop_at)
        with pytest.raises(Killed):
            go(keep, stop_at=stop_at)
        resumed, left = go(keep)
        assert resumed == whole
        assert left[-1][0] == left[-1][1]
        assert left[-1][1] == total if stop_at < STEPS else left[-1][1] < total
    assert go(keep) == (whole, [])
    assert whole == go(None)[0]


def test_a_file_that_cannot_be_read_is_drawn_again(go, tmp_path):
    whole, _ = go(tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 9
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[-1].unlink()
    assert go(tmp_path)[0] == whole


def test_what_was_kept_of_another_model_is_not_used(go, tmp_path):
    whole, work = go(tmp_path)
    other = tiny_pipeline(seed=1, unet=shallow_unet(1))
    changed, again = go(tmp_path, target=other)
    assert changed != whole
    assert again[-1] == work[-1]


# -- mistakes ----------------------------------------------------------------------------------


def test_mistakes_are_told(pipe, tmp_path):
    with pytest.raises(LeansdError, match="no preset 'balancd'; did you mean balanced"):
        leansd.evaluate(pipe, "balancd", PROMPTS)
    with pytest.raises(LeansdError, match="at least 2"):
        leansd.evaluate(pipe, "balanced", ["one"])
    with pytest.raises(LeansdError, match="no reference 'none'"):
        leansd.evaluate(pipe, "balanced", PROMPTS, references=["none"])
    with pytest.raises(LeansdError, match="converged run of 20 steps against runs of 30"):
        leansd.evaluate(pipe, "balanced", PROMPTS, converged_steps=20)
    with pytest.raises(LeansdError, match="two cases are called 'turbo'"):
        leansd.evaluate(pipe, TURBO, PROMPTS, steps=STEPS, references=[Case("turbo", 9)])
    with pytest.raises(LeansdError, match="no CLIP in"):
        open_clip(tmp_path)


# -- the command -------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr("leansd.cli.options.hush_libraries", lambda: None)

    def call(*arguments):
        code = main(["evaluate", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_the_command_writes_report_records_and_values(run, model_folder, clip_folder, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("# two\na <b>red</b> apple\n\npizza\n")
    arguments = (
        model_folder, "--plan", "turbo", "--plan", "full", "--prompts", prompts, "--count", 3,
        "--steps", STEPS, "--reference", "full", "--reference", "euler:6", "--rival", "unipc:2",
        "--seeds-for-spread", 1, "--clip", clip_folder, "--out", out, "--json", "--force",
    )  # fmt: skip
    code, printed, _ = run(*arguments)
    assert code == 0
    facts = json.loads(printed.splitlines()[-1])
    assert facts["plans"] == ["full", "turbo", "full plan", "unipc:2"]
    assert facts["references"] == ["full", "euler:6"]
    assert facts["clip"] == "random"
    assert facts["lpips"] or explain_missing_lpips() in printed
    assert all(word in printed for word in ("Against euler:6", "CLIP score", "latent error"))
    records = load_records(out / "records.jsonl")
    assert find_value(records, "full plan", "psnr", "full").value == CEILING
    assert find_value(records, "unipc:2", "predicted_speedup").value == 2
    assert find_value(records, "unipc:2", "ssim", "euler:6").sampler == "unipc"
    values = load_records(out / "values.jsonl")
    assert {r.picture for r in values} == {0, 1, 2}
    page, text = read_page(out / "report.html")
    assert "a &lt;b&gt;red&lt;/b&gt; apple" in text
    # full, turbo, full plan, unipc:2 and the reference; a difference to full for all but the first
    assert len(page.images) == 3 * (5 + 4)
    # The same again runs nothing and says the same.
    code, again, _ = run(*arguments)
    # What the first run left stays: the second writes beside it.
    assert json.loads(again.splitlines()[-1]) | {"files": facts["files"]} == facts


def test_the_embedded_model_has_prompts_and_a_clip_of_its_own(run, tmp_path):
    code, printed, _ = run(
        "--plan", "fast", "--steps", STEPS, "--count", 2, "--reference", "full",
        "--seeds-for-spread", 0, "--out", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert "seen by tiny CLIP" in printed
    embedder = find_embedder("emoji")
    assert embedder is not None
    assert embedder.side == 64


def test_without_a_clip_the_command_says_so(run, model_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    code, printed, _ = run(
        model_folder, "--plan", "turbo", "--prompts", prompts, "--count", 2, "--steps", STEPS,
        "--reference", "full", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert "give one by --clip" in printed
    assert "FID" not in printed


def test_the_command_tells_what_is_wrong_before_it_draws(run, model_folder, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("only one\nonly one\n")
    out = ["--out", tmp_path / "out"]
    for arguments, said in (
        ([], "--plan"),
        (["--plan", "balancd"], "no preset 'balancd'"),
        (["--plan", "fast", "--prompts", few], "too few prompts"),
        (["--plan", "fast", "--prompts", tmp_path / "none"], "cannot read prompts"),
        (["--plan", "fast", "--count", 1], "--count"),
        (["--plan", "fast", "--reference", "convergd"], "not a sampler with its steps"),
        (["--plan", "fast", "--reference", "eluer:9"], "did you mean euler"),
        (["--plan", "fast", "--rival", "euler:0"], "not a sampler with its steps"),
        (["--plan", "fast", "--converged-steps", 20], "needs more"),
        (["--plan", "fast", "--sampler", "euler-a"], "draws noise at every step"),
        (["--plan", "fast", "--clip", tmp_path], "no CLIP in"),
        (["--plan", "fast", "--lpips", tmp_path / "none"], "no LPIPS weights at"),
        ([model_folder, "--plan", "fast"], "give --prompts FILE"),
    ):
        code, printed, told = run(*arguments, *out)
        assert (code, printed) == (2, "")
        assert said in told
        assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["few.txt"]


def test_a_file_of_prompts_may_come_from_windows_and_have_remarks(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n# of last week\r\n  a dog \r\n")
    assert read_prompts(file) == ["a cat", "a dog"]
