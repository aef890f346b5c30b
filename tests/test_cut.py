"""Cuts: what can go, what it costs the output, what is chosen; the command."""

import json
import random
from collections import Counter

import pytest
import torch

import leansd
from leansd.anatomy.builtin import open_builtin
from leansd.anatomy.counting import dissect
from leansd.cli import main
from leansd.errors import LeansdError
from leansd.evaluation.inner_timing import time_units
from leansd.evaluation.records import stamp
from leansd.evaluation.redundancy import list_records, read_cost
from leansd.evaluation.runs import CallSet
from leansd.loading import as_image_to_image
from leansd.surgery.apply import BASE
from leansd.surgery.blueprint import Source, lay_out_surgery
from leansd.tuning.cutting import (
    Study,
    cut,
    guide_batch,
    keep_calls,
    list_prices,
    make_surgery,
    measure_error,
    study_removals,
)
from leansd.tuning.host import tap
from leansd.tuning.removals import Removal, Removals, choose_item, list_removals
from pages import read_page
from tiny import tiny_pipeline, tiny_unet, tiny_xl_unet

SMALL = {
    "layers_per_block": (2, 1),
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""Two levels: few removals, each a fraction of a second."""


def read_removals(unet) -> tuple[Removals, dict]:
    sources = {BASE: Source.read(BASE, unet)}
    found = list_removals(
        sources[BASE].anatomy, lambda gone: lay_out_surgery(sources, make_surgery([Removal(gone)]))
    )
    return found, sources


# -- what can go -------------------------------------------------------------------------------


def test_what_can_go_of_stable_diffusion():
    names = {each.name for each in read_removals(open_builtin("sd15"))[0]}
    pairs = {f"dn{level}.l1 + up{3 - level}.l1" for level in range(4)}
    assert pairs <= names  # BK-SDM's
    assert {"mid", "mid.l0.attn + mid.l1", "dn2.down + dn3 + up0"} <= names
    assert {"dn0.l0 + up3.l2", "dn2.l1 + up1.l0"} <= names
    assert "dn1.l0 + up2.l1" not in names  # the next takes 640 channels and would get 320
    assert sum(name.endswith(".attn") for name in names) == 16
    # A transformer has one block: that is the transformer, only its parts go by themselves.
    assert sum(".t0." in name for name in names) == 16 * 3
    assert not any(name.endswith(".t0") for name in names)


def test_what_can_go_of_sdxl():
    removals, _ = read_removals(tiny_xl_unet())
    names = {each.name for each in removals}
    assert {"dn2.l1.attn", "dn2.l1.attn.t0", "dn2.l1.attn.t1"} <= names


def find_blocks(addresses):
    """How many parts of each transformer block are gone."""
    return Counter(at.rpartition(".")[0] for at in addresses if at[-3:] in (".sa", ".ca", ".ff"))


@pytest.mark.parametrize("make", [tiny_unet, tiny_xl_unet, lambda: open_builtin("sd15")])
def test_every_choice_is_a_legal_surgery(make):
    removals, sources = read_removals(make())
    every = {each.name: each for each in removals}
    for seed in range(2):
        draw = random.Random(seed)
        items = {
            each: choose_item(each.name, draw.random(), draw.randint(1, 100)) for each in removals
        }
        front = removals.solve(items.__getitem__)
        for choice in front[:: max(1, len(front) // 25)] + front[-1:]:
            taken = [every[name] for name in choice.names]
            lay_out_surgery(sources, make_surgery(taken))
            addresses = [at for each in taken for at in each.addresses]
            assert all(gone < 3 for gone in find_blocks(addresses).values())
            assert not any(
                Removal((one,)).takes(other)
                for one in addresses
                for other in addresses
                if one != other
            )


@pytest.mark.parametrize("of", ["macs", "params"])
def test_what_is_saved_is_what_a_preview_counts(of):
    unet = tiny_unet(**SMALL)
    anatomy = leansd.dissect(unet, latent=8)
    prices = list_prices(unet, anatomy, of)
    for gone in [("dn0.l1", "up1.l1"), ("mid",), ("up1.l2.attn",)]:
        after = leansd.preview(unet, make_surgery([Removal(gone)]), latent=8).after
        assert prices.price(Removal(gone), anatomy) == prices.whole - getattr(after, of)


def test_a_part_of_a_transformer_block_saves_what_it_computes():
    unet = tiny_unet(**SMALL)
    prices = list_prices(unet, leansd.dissect(unet, latent=8), "macs")
    for at in ("up1.l2.attn.t0.sa", "dn0.l0.attn.t0.ff"):
        removal = Removal((at,), inside=True)
        after = leansd.preview(unet, make_surgery([removal]), latent=8).after
        assert prices.price(removal, leansd.dissect(unet, latent=8)) == prices.whole - after.macs


# -- errors ------------------------------------------------------------------------------------


def test_kept_calls_hold_what_the_scheduler_was_given():
    pipe = tiny_pipeline(unet=tiny_unet(**SMALL))
    with tap(pipe.scheduler) as runs:
        kept = keep_calls(
            pipe, CallSet(["a cat", "a dog"], settings={"guidance_scale": 3.0}), 4, moments=2
        )
    assert [call.step for call in kept] == [1, 3]
    for call in kept:
        assert call.guidance == 3.0
        torch.testing.assert_close(call.output, runs[0][call.step].output)
    assert measure_error(pipe.unet, kept) == 0
    assert "forward" not in vars(pipe.unet)


@pytest.mark.parametrize(("strength", "expected"), [(0.75, [4, 6, 8]), (0.2, [8, 9])])
def test_image_to_image_is_measured_on_the_steps_that_it_takes(strength, expected):
    pipe = as_image_to_image(tiny_pipeline(unet=tiny_unet(**SMALL)))
    calls = [{"prompt": "a cat", "image": torch.rand(1, 3, 32, 32)}]
    kept = keep_calls(pipe, CallSet(calls, settings={"strength": strength}), 10, moments=3)
    start = 10 - int(10 * strength)
    assert [call.step for call in kept] == expected
    assert all(start <= call.step < 10 for call in kept)


def test_without_guidance_the_output_is_the_output():
    pipe = tiny_pipeline(unet=tiny_unet(**SMALL))
    kept = keep_calls(pipe, CallSet(["a cat"], settings={"guidance_scale": 1.0}), 2, moments=1)
    assert kept[0].guidance is None
    assert kept[0].output.shape[0] == 1
    noise = torch.randn(2, 4, 8, 8)
    assert torch.equal(guide_batch(noise, None), noise)
    assert torch.equal(guide_batch(noise, 1.0), noise[:1] + (noise[1:] - noise[:1]))


def test_a_unet_that_follows_a_plan_is_refused():
    pipe = tiny_pipeline(unet=tiny_unet(**SMALL))
    with leansd.inherit(pipe, leansd.Plan.full(2)), pytest.raises(LeansdError, match="release"):
        keep_calls(pipe, CallSet(["a cat"]), 2)


# -- cuts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study() -> Study:
    pipe = tiny_pipeline(unet=tiny_unet(**SMALL))
    return study_removals(
        pipe.unet,
        keep_calls(
            pipe, CallSet(["a cat", "a dog"], settings={"guidance_scale": 3.0}), 4, moments=2
        ),
        "macs",
    )


def test_a_cut_keeps_its_budget_and_can_be_operated(study):
    before = {name: tensor.clone() for name, tensor in study.unet.state_dict().items()}
    found = study.choose(0.8, tries=3)
    plan = leansd.preview(study.unet, found.surgery, latent=8)
    assert plan.after.macs / plan.before.macs == pytest.approx(found.cost)
    assert found.cost <= 0.8
    student, _ = leansd.operate(study.unet, found.surgery)
    assert measure_error(student, study.kept) == pytest.approx(found.measured_error)
    errors = {each.removal: each.error for each in found.candidates}
    assert sum(errors[each] for each in found.removals) == pytest.approx(found.predicted_error)
    assert all(torch.equal(before[name], study.unet.state_dict()[name]) for name in before)


def test_more_tries_are_never_worse(study):
    assert study.choose(0.75, tries=4).measured_error <= study.choose(0.75, tries=0).measured_error


def test_the_front_falls_in_cost_and_rises_in_error(study):
    front = study.choose(0.9, tries=0).front
    assert front[0] == (1.0, 0.0)
    assert list(front) == sorted(front, key=lambda point: (-point[0], point[1]))
    assert [error for _, error in front] == sorted(error for _, error in front)


def test_what_is_out_of_reach_is_told(study):
    least = study.choose(0.9, tries=0).least_cost
    with pytest.raises(LeansdError, match=rf"the least .* MACs is {least:.3f}"):
        study.choose(least - 0.01)


def test_times_come_from_a_profile_or_are_taken(study):
    times = {at: {"whole": 0.5, "half": 0.3} for at in study.anatomy.by_address}
    cost = leansd.CostModel("tiny", 1, (32, 32), times, {}, fixed={"whole": 1.0})
    prices = list_prices(study.unet, study.anatomy, "ms", cost)
    assert prices.price(Removal(("mid.l0.attn",)), study.anatomy) == 0.5
    assert prices.whole == 1.0 + 0.5 * len(study.anatomy)
    assert set(list_prices(study.unet, study.anatomy, "ms").by_address) == set(times)
    with pytest.raises(LeansdError, match="has no time of stem"):
        list_prices(study.unet, study.anatomy, "ms", leansd.CostModel("x", 1, (8, 8), {}, {}))


def test_times_may_be_those_of_another_unet_with_the_same_addresses(study):
    other = tiny_unet(**SMALL | {"block_out_channels": (64, 64)})
    times = time_units(other, latent=8, repeats=1)
    records = list_records(dissect(other, name="wide"), times, stamp("cpu"))
    prices = list_prices(study.unet, study.anatomy, "ms", read_cost(records))
    assert prices.by_address == times.medians
    assert prices.whole == pytest.approx(times.call.median)
    more = [record.model_copy(update={"subject": "wider"}) for record in records]
    with pytest.raises(LeansdError, match="times of wide, wider; give a file"):
        read_cost([*records, *more])
    with pytest.raises(LeansdError, match="0 profiles"):
        read_cost([record for record in records if "time" not in record.metric])


@pytest.mark.parametrize(
    ("budget", "of", "says"), [(1.2, "ms", "cuts nothing"), (0.8, "s", "no budget of 's'")]
)
def test_what_is_no_budget_is_refused(budget, of, says):
    with pytest.raises(LeansdError, match=says):
        cut(None, budget=budget, of=of)


# -- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small"
    tiny_pipeline(unet=tiny_unet(**SMALL)).save_pretrained(path)
    return str(path)


@pytest.mark.slow
def test_cut_writes_surgery_and_report(model, tmp_path, capsys):
    out = tmp_path / "new" / "light.yaml"
    arguments = [
        "cut", model, "--budget", 0.85, "--of", "macs", "--steps", 4, "--moments", 1,
        "--count", 2, "--tries", 1, "-o", out, "--json",
    ]  # fmt: skip
    assert main([str(each) for each in arguments]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    surgery = leansd.Surgery.load(out)
    assert surgery.name == "light"
    assert surgery.fingerprint == facts["fingerprint"]
    assert facts["least_cost"] < facts["cost"] <= 0.85
    assert any(each["cut"] for each in facts["candidates"])
    _, page = read_page(out.with_suffix(".html"))
    for title in ("What goes", "Error over cost", "Everything that can go"):
        assert title in page


def test_cut_tells_what_is_wrong_before_it_runs(model, tmp_path, capsys):
    def fails(*arguments):
        assert main([str(each) for each in ("cut", model, *arguments)]) == 2
        return capsys.readouterr().err

    assert "give the share" in fails("--budget", 80)
    assert "there are ms, macs, params" in fails("--of", "time")
    assert "no records at" in fails("--cost", tmp_path / "none.jsonl")
    assert "no sampler" in fails("--sampler", "eulr")
    assert "is a folder" in fails("-o", tmp_path)
