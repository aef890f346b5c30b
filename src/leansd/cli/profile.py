"""`leansd profile`: what everything costs on this machine, and what plans gain of it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from leansd.cli.command import OnlyJson, Result, argument, command, option
from leansd.cli.options import DeviceOptions, Opening, OwnGuidance, SizeOption, complete_shape
from leansd.cli.terminal import follow, note
from leansd.evaluation.prompt_sets import choose_guidance
from leansd.files import check_folder

if TYPE_CHECKING:
    from leansd.evaluation.prediction import Profiled
    from leansd.evaluation.profile import Probe
    from leansd.evaluation.records import Record

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Runs:
    """What is drawn to be timed."""

    batch: int = option(1, "Pictures drawn at once.", min=1)
    size: SizeOption = None
    repeats: int = option(5, "Timed rounds.", min=1)
    steps: int = option(30, "Steps of the runs that are split.", min=2)
    check: int = option(6, "Steps of the held-out runs in each round; 0 for none.", min=0)
    guidance: OwnGuidance = None
    vae: str | None = option(
        None, "What another autoencoder would gain: its folder, or tiny for TAESD's shape."
    )
    attend: list[str] | None = option(
        None, "Self-attentions to time by GRI and in full as well, as dn0.*.attn; repeatable."
    )


@command(
    app,
    "profile",
    "leansd profile emoji --repeats 10 --out profile",
    "leansd profile sd15 --size 512 --repeats 1 --check 0 --json",
    json=OnlyJson,
    keeps=True,
)
def profile_model(
    model: str = argument(
        "emoji",
        "emoji, a model folder, a .safetensors file, a hub id, or sd15 or sd21-base "
        "for a pipeline of that size with random weights.",
        autocompletion=complete_shape,
    ),
    *,
    out: Path = option(Path("profile"), "Folder for the report and the records."),
    runs: Runs,
    place: DeviceOptions,
) -> Result:
    """Time every unit, whole UNet calls and the pipeline's stages; predict what plans gain.

    The last line on standard output is one JSON object.
    """
    from leansd.drawing import parse_size
    from leansd.report.measurements import report_profile

    # Everything that can be wrong is found before a weight is read.
    check_folder(out)
    size = parse_size(runs.size) if runs.size else None
    pipe, autoencoder = _open(model, runs.vae, place)
    profiled = _measure(model, pipe, runs, size, autoencoder)
    records = _list_records(profiled, model)
    return Result(
        facts={"model": model, **_list_facts(profiled)},
        shown=_show(profiled),
        pages={out / "report.html": report_profile(profiled, records)},
        records={out / "records.jsonl": records},
        device=pipe.device,
    )


def _measure(
    model: str, pipe: Any, runs: Runs, size: tuple[int, int] | None, autoencoder: Any
) -> "Profiled":

    from leansd.evaluation.prediction import OtherVae, Profiled, check_predictions, hold_out
    from leansd.evaluation.profile import prepare_probe, time_decoder
    from leansd.evaluation.records import stamp
    from leansd.runtime.samplers import name_sampler

    guidance = choose_guidance(model, runs.guidance)
    warming = f"warming up {model} on {pipe.device}"
    with follow(warming) as bar:
        probe = prepare_probe(
            pipe,
            call={} if guidance is None else {"guidance_scale": guidance},
            pictures=runs.batch,
            size=size,
            subject=model,
            attend=runs.attend or (),
            on_unit=lambda at, share: bar.share(f"{warming}: {at}", share),
        )
        held_out = partial(hold_out, guided=probe.is_guided, sampler=name_sampler(pipe))
        plans = held_out(probe.anatomy, runs.check) if runs.check else {}
        cost, predictions = check_predictions(
            probe, plans, rounds=runs.repeats, on_progress=bar.share
        )
        other = None
        if runs.vae is not None:
            decode = time_decoder(probe, autoencoder, rounds=runs.repeats)
            other = OtherVae(runs.vae, decode, is_trained=runs.vae != "tiny")
    return Profiled(
        cost=cost,
        anatomy=_dissect(pipe, probe, model),
        steps=runs.steps,
        predictions=predictions,
        repeats=runs.repeats,
        circumstances=stamp(pipe.device),
        sampler=name_sampler(pipe),
        vae=other,
    )


def _list_records(profiled: "Profiled", model: str) -> "list[Record]":
    from leansd.evaluation.prediction import list_prediction_records

    cost, facts = profiled.cost, profiled.circumstances
    (width, height), pictures = cost.size, cost.pictures
    shared = {"subject": model, "pictures": pictures, "width": width, "height": height}
    predicted = list_prediction_records(profiled.predictions, {**facts, **shared})
    return [*cost.list_records(facts), *predicted]


def _open(model: str, vae: str | None, place: DeviceOptions) -> tuple[Any, Any]:
    """The pipeline, and another autoencoder where one is asked for."""
    from leansd.anatomy.builtin import BUILTIN
    from leansd.evaluation.random_pipelines import build_stand_in, build_tiny_vae, check_stand_in
    from leansd.loading import check_vae, load_vae

    if model in BUILTIN:
        check_stand_in(model)
        place.check()
    else:
        Opening(place.device, place.dtype).check_model(model)
    other = load_vae(vae) if vae is not None and vae != "tiny" else None
    note(f"opening {model}")
    if model in BUILTIN:
        pipe: Any = build_stand_in(model, device=place.device)
        if place.precision is not None:
            pipe.to(place.precision)
        pipe.set_progress_bar_config(disable=True)
    else:
        pipe = Opening(place.device, place.dtype).open_with_unet(model)
    if vae == "tiny":
        return pipe, build_tiny_vae(pipe)
    if other is not None:
        check_vae(pipe, other)
        moved: Any = other
        moved.to(device=pipe.device, dtype=pipe.dtype)
    return pipe, other


def _dissect(pipe: Any, probe: "Probe", model: str) -> Any:
    from leansd.anatomy import dissect

    (width, height), factor = probe.size, pipe.vae_scale_factor
    return dissect(
        pipe.unet,
        latent=(height // factor, width // factor),
        tokens=pipe.tokenizer.model_max_length,
        name=model,
    )


def _show(profiled: "Profiled") -> list[Any]:
    from leansd.evaluation.prediction import (
        find_worst,
        tabulate_blocks,
        tabulate_gains,
        tabulate_predictions,
        tabulate_split,
    )
    from leansd.report.measurements import name_vae

    shown: list[Any] = [table(profiled) for table in (tabulate_blocks, tabulate_split)]
    shown.append(tabulate_gains(profiled))
    if profiled.vae is not None:
        shown.append(name_vae(profiled))
    if profiled.predictions:
        shown.append(tabulate_predictions(profiled.predictions))
        worst = find_worst(profiled.predictions)
        shown.append(f"largest error of a predicted speed-up: {worst:.1%}")
    return shown


def _list_facts(profiled: "Profiled") -> dict[str, Any]:
    cost, other = profiled.cost, profiled.vae
    return {
        "pictures": cost.pictures,
        "size": list(cost.size),
        "repeats": profiled.repeats,
        "steps": profiled.steps,
        "device": profiled.circumstances["device"],
        "guided": cost.is_guided,
        "full_call": cost.full_call,
        "overhead_per_run": cost.overhead_per_run,
        "per_step": cost.per_step,
        "call_overhead": dict(cost.fixed),
        "units": {at: dict(times) for at, times in cost.units.items()},
        "split": profiled.split(profiled.full),
        "gains": [
            {
                "plan": gain.plan.name,
                "fingerprint": gain.plan.fingerprint,
                "unet": gain.unet,
                "run": gain.run,
                "run_with_vae": gain.run_with_vae,
            }
            for gain in profiled.gains
        ],
        "predictions": [
            {
                "plan": each.plan.name,
                "fingerprint": each.plan.fingerprint,
                "predicted": each.predicted,
                "measured": each.measured.median,
                "predicted_speedup": each.predicted_speedup,
                "speedup": each.measured_speedup.median,
                "speedup_low": each.measured_speedup.low,
                "speedup_high": each.measured_speedup.high,
            }
            for each in profiled.predictions
        ],
        "vae": None if other is None else {"name": other.name, "decode": other.decode},
    }
