"""The cost model: its arithmetic, its fit, its records, and the command that makes one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import leansd
from leansd.cli import main
from leansd.errors import LeansdError
from leansd.evaluation.cost import (
    CostModel,
    Observed,
    fit_overheads,
    get_batch,
    list_entered,
    scale_calls,
    solve_nonnegative,
)
from leansd.evaluation.inner_timing import time_run
from leansd.evaluation.prediction import check_predictions, hold_out
from leansd.evaluation.profile import make_arguments, make_probing_plan, prepare_probe, profile
from leansd.evaluation.random_pipelines import build_tiny_vae
from leansd.evaluation.records import Record, load_records, stamp
from leansd.loading import as_image_to_image, load_vae, set_vae
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Program
from leansd.plans.methods import METHODS
from leansd.plans.plan import Plan
from leansd.plans.resolve import PlanContext, resolve_plan
from pages import read_page
from tiny import shallow_unet, tiny_pipeline, tiny_unet, tiny_vae

ANATOMY = leansd.dissect(tiny_unet())
MEBIBYTE = 2**20


def make_cost(**changes) -> CostModel:
    """Round numbers: a unit 1, its parts 1/8, half of it 3/4, a block's own 1/2, and so on."""
    rows = (*ANATOMY.units, *ANATOMY.parts)
    fields = {
        "subject": "made up",
        "pictures": 1,
        "size": (32, 32),
        "units": {
            unit.at: {"whole": 0.125, "half": 0.0625}
            if unit.at.count(".") > 2
            else {"whole": 1.0, "half": 0.75}
            for unit in rows
        },
        "blocks": {at: {"whole": 0.5, "half": 0.25} for at in ANATOMY.blocks},
        "output_bytes": {unit.at: MEBIBYTE for unit in rows},
        "fixed": {"whole": 2.0, "half": 1.5, "none": 0.25},
        "per_byte": 0.25 / MEBIBYTE,
        "text": 3.0,
        "decode": 5.0,
        "other": 7.0,
        "per_step": 0.5,
    }
    return CostModel(**(fields | changes))


def compile_(plan: Plan, *, guided: bool = True) -> Program:
    return compile_plan(plan, ANATOMY, guided=guided)


# -- arithmetic ----------------------------------------------------------------------------------


def test_a_full_call_is_all_units_all_blocks_and_the_fixed_part():
    cost = make_cost()
    call = compile_(Plan.full(2)).calls[1]
    assert cost.predict_call(call) == 46 * 1.0 + 9 * 0.5 + 2.0 == cost.full_call


def test_a_cut_pays_for_what_runs_and_what_it_recalls():
    cost = make_cost()
    key, cut = compile_(Plan.every(2, cut="up3.l1", steps=2)).calls
    assert cut.pattern.computed == {"stem", "up3.l2.res", "up3.l2.attn", "head"}
    assert list_entered(cut) == {"up3"}
    recalled = 2 * 0.25  # read and written
    assert cost.predict_call(cut) == 4 * 1.0 + 0.5 + 2.0 + recalled
    assert cost.predict_call(key) == cost.full_call + 2 * 0.25


@pytest.mark.parametrize(("how", "tensors"), [("reuse", 2), ("residual", 2), ("forecast", 2)])
@pytest.mark.parametrize("guidance", ["compute", "inherit"])
def test_whole_steps_cost_a_fixed_part_of_their_own_and_a_copy(how, tensors, guidance):
    """The UNet is not entered, so it does not matter for how much of a batch."""
    cost = make_cost()
    plan = Plan.full(2).inherit("head", at=1, how=how).guide(guidance, at=1)
    whole_step = compile_(plan).calls[1]
    assert list_entered(whole_step) == set()
    lanes = 0.5 if guidance == "inherit" else 1
    assert cost.predict_call(whole_step) == 0.25 + lanes * tensors * 0.25


def test_a_correction_reads_what_its_forecast_is_made_from():
    cost = make_cost()
    plan = Plan.full(4).inherit("head", at=2, how="forecast").correct({3: 0.5})
    last = compile_(plan).calls[3]
    assert cost.count_bytes(last) == 3 * MEBIBYTE


def test_half_a_batch_has_times_of_its_own():
    cost = make_cost()
    first, half = compile_(Plan.full(2).guide("inherit", at=1)).calls
    assert half.is_half
    assert cost.predict_call(half) == 46 * 0.75 + 9 * 0.25 + 1.5
    assert cost.predict_call(first) == cost.full_call


def test_lanes_copy_half_the_bytes_each():
    cost = make_cost()
    plan = Plan.full(3).inherit("up3.l1", at=[1, 2]).guide("inherit", at=2)
    first, both, half = compile_(plan).calls
    assert cost.count_bytes(first) == 2 * MEBIBYTE  # two lanes of half a MiB, read and written
    assert cost.count_bytes(both) == 2 * MEBIBYTE
    assert cost.count_bytes(half) == MEBIBYTE


@pytest.mark.parametrize("how", ["residual", "toy"])
def test_forecasts_read_two_outputs_and_residuals_read_their_input(how, monkeypatch):
    monkeypatch.setitem(METHODS, "toy", METHODS["residual"])
    cost = make_cost()
    *_, forecast = compile_(Plan.full(3).inherit("up3.l1", at=2, how="forecast")).calls
    assert cost.count_bytes(forecast) == 3 * MEBIBYTE
    first, residual = compile_(Plan.full(2).inherit("dn0.l1.attn", at=1, how=how)).calls
    assert cost.count_bytes(first) == 3 * MEBIBYTE
    assert "dn0" in list_entered(residual)
    whole = compile_(Plan.full(2).inherit("mid", at=1, how=how)).calls[1]
    assert "mid" in list_entered(whole), "all of it inherits, each unit with its own input"


def test_a_part_that_inherits_is_taken_off_its_unit():
    cost = make_cost(per_byte=0.0)
    call = compile_(Plan.full(2).inherit("up3.*.ca", at=1)).calls[1]
    assert len(call.pattern.parts) == 3
    assert cost.predict_call(call) == cost.full_call - 3 * 0.125


def test_runs_and_speedups_add_up():
    cost = make_cost(per_byte=0.0)
    program = compile_(Plan.every(2, cut="head", steps=4))
    unet = 2 * cost.full_call + 2 * 0.25
    assert cost.overhead_per_run == 15.0
    assert cost.predict_unet(program.calls) == unet
    assert cost.predict_run(program) == 15.0 + 4 * 0.5 + unet
    assert cost.predict_full_run(4) == 17.0 + 4 * cost.full_call
    assert cost.predict_speedup(program) == cost.predict_full_run(4) / cost.predict_run(program)
    assert cost.predict_unet_speedup(program) == 4 * cost.full_call / unet
    assert cost.predict_speedup(compile_(Plan.full(4))) == 1.0
    twice = scale_calls(cost, 2.0)
    assert twice.predict_unet(program.calls) == 2 * unet
    assert twice.overhead_per_run == 15.0


def test_what_was_not_measured_is_told():
    cost = make_cost(fixed={"whole": 2.0})
    half = compile_(Plan.full(2).guide("drop", at=1)).calls[1]
    with pytest.raises(LeansdError, match="profiled without guidance"):
        cost.predict_call(half)
    with pytest.raises(LeansdError, match=r"cost of .* was not measured"):
        make_cost(units={}).predict_call(half)
    whole_step = compile_(Plan.full(2).inherit("head", at=1)).calls[1]
    with pytest.raises(LeansdError, match=r"computes nothing: .* profile the model again"):
        cost.predict_call(whole_step)


# -- fit -----------------------------------------------------------------------------------------


def test_the_fit_finds_the_overheads_that_calls_were_made_with():
    true = make_cost()
    calls = compile_(make_probing_plan(ANATOMY, guided=True)).calls
    observed = []
    for call in calls:
        seconds = true.predict_call(call)
        units = seconds - true.predict_joins(call) - true.per_byte * true.count_bytes(call)
        units -= true.fixed[get_batch(call)]
        observed.append(Observed(call, seconds, seconds - units))
    fitted = fit_overheads(replace(true, fixed={}, per_byte=0.0), observed)
    assert fitted.fixed == pytest.approx(true.fixed)
    assert fitted.per_byte == pytest.approx(true.per_byte)


def test_least_squares_give_nothing_below_zero():
    matrix = np.array([[1.0, 0.0], [1.0, 1.0]])
    assert solve_nonnegative(matrix, np.array([2.0, 5.0])) == pytest.approx([2, 3])
    solution = solve_nonnegative(matrix, np.array([2.0, 1.0]))
    assert solution == pytest.approx([1.5, 0])
    assert solve_nonnegative(matrix, np.array([-1.0, -1.0])).tolist() == [0, 0]


@pytest.mark.parametrize("guided", [True, False])
def test_the_probing_run_times_every_unit_block_and_batch_by_itself(any_unet, guided):
    anatomy = leansd.dissect(any_unet)
    plan = make_probing_plan(anatomy, guided=guided)
    first, *_, last = compile_plan(plan, anatomy, guided=guided).calls
    assert first.is_full
    assert not first.keeps
    assert not last.keeps
    assert last.pattern.computed == set(anatomy.addresses)
    assert last.is_half == guided
    batches = {get_batch(call) for call in compile_plan(plan, anatomy, guided=guided).calls[1:]}
    assert batches == {"whole", "none"} | ({"half"} if guided else set())
    probing = {each.fingerprint for each in hold_out(anatomy, 8, guided=guided).values()}
    assert plan.fingerprint not in probing


@pytest.mark.parametrize("sampler", ["", "ddim", "deis"])
def test_held_out_presets_are_what_their_names_mean(sampler):
    held_out = hold_out(ANATOMY, 6, guided=False, sampler=sampler)
    for name in ("balanced", "turbo"):
        meant = resolve_plan(name, PlanContext(6, sampler, anatomy=ANATOMY), force=True).plan
        assert held_out[name].fingerprint == meant.fingerprint


# -- records -------------------------------------------------------------------------------------


def test_a_model_comes_back_from_its_records(tmp_path):
    cost = make_cost(text=0.1 + 0.2, peak_bytes={"stem": 3})
    records = cost.list_records(stamp())
    lines = [Record.model_validate_json(record.line()) for record in records]
    other = Record(**stamp(), subject="x", plan="fast", metric="psnr", value=1.0, unit="dB")
    assert CostModel.from_records([*lines, other]) == cost


def test_records_that_are_no_profile_are_told():
    records = make_cost().list_records(stamp())
    with pytest.raises(LeansdError, match="hold 0 profiles"):
        CostModel.from_records([])
    with pytest.raises(LeansdError, match="hold 2 profiles"):
        CostModel.from_records([*records, *make_cost(subject="b").list_records(stamp())])
    with pytest.raises(LeansdError, match="no record of decode_time"):
        CostModel.from_records([each for each in records if each.metric != "decode_time"])


# -- measuring -----------------------------------------------------------------------------------


def test_a_profile_predicts_every_kind_of_call_and_leaves_the_pipeline_as_it_was():
    pipe = tiny_pipeline()
    runs = []
    cost = leansd.profile(pipe, repeats=1, subject="tiny", on_run=lambda: runs.append(1))
    anatomy = leansd.dissect(pipe.unet)
    assert runs == [1]
    assert (cost.subject, cost.pictures, cost.size) == ("tiny", 1, (32, 32))
    assert set(cost.units) == {unit.at for unit in (*anatomy.units, *anatomy.parts)}
    assert all(set(times) == {"whole", "half"} for times in cost.units.values())
    assert all(set(times) == {"whole", "half"} for times in cost.blocks.values())
    assert cost.output_bytes["head"] == 2 * 4 * 8 * 8 * 4
    assert min(cost.text, cost.decode, cost.per_step) > 0
    plan = leansd.preset("tgate", 6).inherit("up3.l1", at=5, how="forecast")
    program = compile_plan(plan, anatomy)
    full, *_, last = map(cost.predict_call, program.calls)
    assert 0 < last < full
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_a_profile_without_guidance_knows_no_halves():
    cost = profile(tiny_pipeline(), repeats=1, call={"guidance_scale": 1.0}, pictures=2)
    assert not cost.is_guided
    assert set(cost.fixed) == {"whole", "none"}
    assert cost.output_bytes["head"] == 2 * 4 * 8 * 8 * 4


def test_image_to_image_is_profiled_with_all_its_steps():
    pipe = as_image_to_image(tiny_pipeline(unet=shallow_unet()))
    call = {"prompt": "a boat", "image": torch.rand(1, 3, 32, 32), "strength": 0.3}
    cost = leansd.profile(pipe, call=call, pictures=2, repeats=1)
    assert set(cost.units) >= {unit.at for unit in leansd.dissect(pipe.unet)}
    assert cost.predict_full_run(3) > cost.predict_full_run(2) > 0


def test_a_timed_run_draws_what_the_pipeline_draws():
    pipe = tiny_pipeline()
    outputs = []
    plan = leansd.preset("balanced", 6, sampler="ddim")
    call = make_arguments(pipe, {"output_type": "latent"}, 1, None) | {"num_inference_steps": 6}

    def take(pipe, step, timestep, tensors):
        outputs.append(tensors["latents"])
        return tensors

    for timed in (None, leansd.dissect(pipe.unet)):
        seed = torch.Generator().manual_seed(0)
        more = {"generator": seed, "callback_on_step_end": take}
        run = time_run(pipe, plan, call | more, anatomy=timed)
    assert torch.equal(outputs[5], outputs[11])
    assert len(run.calls) == 6
    assert set(run.calls[2].inside) >= set(run.program.calls[2].pattern.active)
    assert run.decode == 0


def test_what_cannot_be_profiled_is_told():
    pipe = tiny_pipeline()
    with pytest.raises(LeansdError, match="0 repeats"):
        profile(pipe, repeats=0)
    with pytest.raises(LeansdError, match="0 pictures"):
        profile(pipe, pictures=0)
    with leansd.inherit(pipe, "fast"), pytest.raises(LeansdError, match="already attached"):
        profile(pipe, repeats=1)


# -- autoencoders --------------------------------------------------------------------------------


def test_another_autoencoder_decodes_in_the_models_place(tmp_path):
    tiny_vae(seed=1).save_pretrained(tmp_path / "vae")
    pipe = tiny_pipeline()
    latents = torch.randn(1, 4, 8, 8)
    set_vae(pipe, load_vae(tmp_path / "vae"))
    assert torch.equal(pipe.vae.decode(latents).sample, tiny_vae(seed=1).decode(latents).sample)


def test_an_autoencoder_of_another_kind_is_refused(tmp_path):
    with pytest.raises(LeansdError, match="8 times the side, the model's own 4 channels to 4"):
        build_tiny_vae(tiny_pipeline())
    with pytest.raises(LeansdError, match="no autoencoder in"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(LeansdError, match="holds a VQModel"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(LeansdError, match="no weights of the autoencoder"):
        load_vae(tmp_path)


def test_progress_is_told_from_the_first_unit_of_the_warm_up_on():
    """Warming up a large model takes minutes on a CPU: every unit run is a sign of life."""
    pipe, told = tiny_pipeline(), []
    probe = prepare_probe(pipe, on_unit=lambda at, share: told.append((at, share)))
    assert [at for at, _ in told] == [unit.at for unit in probe.anatomy.units]
    assert [share for _, share in told] == sorted(share for _, share in told)
    assert told[-1][1] == 1
    calls = []
    plans = {"full": Plan.full(3, name="full")}
    check_predictions(
        probe, plans, rounds=2, on_progress=lambda name, share: calls.append((name, share))
    )
    first, second = ["probing"] * probe.plan.steps, ["full"] * 3
    assert [name for name, _ in calls] == [*first, *second, *second, *first]
    assert [share for _, share in calls] == [n / len(calls) for n in range(1, len(calls) + 1)]


# -- the command ---------------------------------------------------------------------------------


def test_the_command_writes_report_and_records(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("leansd.cli.options.hush_libraries", lambda: None)
    tiny_vae(seed=1).save_pretrained(tmp_path / "vae")
    tiny_pipeline().save_pretrained(tmp_path / "model")
    model, out = str(tmp_path / "model"), tmp_path / "out"
    code = main(
        ["profile", model, "--repeats", "1", "--check", "4", "--steps", "10", "--batch", "2",
         "--vae", str(tmp_path / "vae"), "--out", str(out)]
    )  # fmt: skip
    assert code == 0
    *lines, last = capsys.readouterr().out.strip().splitlines()
    facts = json.loads(last)
    assert max(len(line) for line in lines if not line.startswith(("VAE ", "wrote "))) <= 80
    assert facts["pictures"] == 2
    assert len(facts["predictions"]) == 7
    assert facts["predictions"][0]["speedup"] == 1
    assert all(row["run_with_vae"] > 0 for row in facts["gains"])
    assert facts["vae"]["decode"] > 0
    _, text = read_page(out / "report.html")
    assert "Predicted against measured" in text
    assert text.count("<svg") == 2
    cost = CostModel.from_records(load_records(out / "records.jsonl"))
    assert cost.full_call == facts["full_call"]


def test_the_command_profiles_the_embedded_model(capsys, tmp_path):
    arguments = ["profile", "--repeats", "1", "--check", "0", "--out", str(tmp_path), "--json"]
    assert main(arguments) == 0
    (line,) = capsys.readouterr().out.strip().splitlines()
    facts = json.loads(line)
    assert facts["model"] == "emoji"
    assert facts["predictions"] == []
    assert {gain["plan"] for gain in facts["gains"]} >= {"full", "balanced", "deepcache"}
    assert facts["gains"][0]["run"] == pytest.approx(1)


def test_generate_decodes_with_another_autoencoder(capsys, tmp_path):
    vae = tmp_path / "vae"
    tiny_vae(seed=1).save_pretrained(vae)
    tiny_pipeline().save_pretrained(tmp_path / "model")
    shared = ["generate", "a", "--model", str(tmp_path / "model"), "--steps", "2"]
    assert main([*shared, "--plan", "full", "--out", str(tmp_path / "own")]) == 0
    assert main([*shared, "--plan", "full", "--out", str(tmp_path / "o"), "--vae", str(vae)]) == 0
    pictures = []
    for folder in ("own", "o"):
        with Image.open(tmp_path / folder / "a.full.seed0.png") as image:
            pictures.append((image.tobytes(), image.text.get("vae")))
    assert pictures[0][0] != pictures[1][0]
    assert [vae for _, vae in pictures] == [None, str(vae)]


def test_the_command_tells_what_is_wrong_before_it_runs(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (["none"], "no model 'none'"),
        (["sdxl"], "no random pipeline 'sdxl'"),
        (["--repeats", "0"], "--repeats"),
        (["--size", "100x50"], "multiples of 8"),
        (["--device", "gpu"], "no device 'gpu'"),
        (["--vae", str(tmp_path / "none")], "no autoencoder in"),
        (["--out", str(tmp_path / "file" / "out")], "is not a folder"),
    ):
        assert main(["profile", "--out", str(tmp_path / "out"), *arguments]) == 2
        printed = capsys.readouterr()
        assert said in printed.err, arguments
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
