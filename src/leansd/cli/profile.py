"""`leansd profile`: what everything costs on this machine, and what plans gain of it."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.completions import complete_shape
from leansd.cli.examples import give_examples
from leansd.cli.options import Batch, OnlyJson, OwnGuidance, Quiet, Size, TimingDevice

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd profile emoji --repeats 10 --out profile",
        "leansd profile sd15 --size 512 --repeats 1 --check 0 --json",
    )
)
def profile_model(
    model: Annotated[
        str,
        typer.Argument(
            help="emoji, a model folder, a .safetensors file, a hub id, or sd15 or sd21-base for "
            "a pipeline of that size with random weights.",
            autocompletion=complete_shape,
        ),
    ] = "emoji",
    out: Annotated[Path, typer.Option(help="Folder for the report and the records.")] = Path(
        "profile"
    ),
    batch: Batch = 1,
    size: Size = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    steps: Annotated[int, typer.Option(min=2, help="Steps of the runs that are split.")] = 30,
    check: Annotated[
        int, typer.Option(min=0, help="Steps of the held-out runs in each round; 0 for none.")
    ] = 6,
    guidance: OwnGuidance = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="What another autoencoder would gain: its folder, or tiny for TAESD's shape."
        ),
    ] = None,
    attend: Annotated[
        list[str] | None,
        typer.Option(
            help="Self-attentions to time by GRI and in full as well, as dn0.*.attn; repeatable."
        ),
    ] = None,
    device: TimingDevice = None,
    as_json: OnlyJson = False,
    quiet: Quiet = False,
) -> None:
    """Time every unit, whole UNet calls and the pipeline's stages; predict what plans gain.

    The last line on standard output is one JSON object.
    """
    from leansd.anatomy import dissect
    from leansd.anatomy.builtin import BUILTIN
    from leansd.cli.invocation import quote_command
    from leansd.cli.terminal import (
        hush_libraries,
        note,
        open_progress,
        show_json,
        show_table,
        show_text,
    )
    from leansd.drawing import parse_size
    from leansd.evaluation.prediction import (
        check_predictions,
        find_worst,
        hold_out,
        list_prediction_records,
    )
    from leansd.evaluation.profile import prepare_probe, time_decoder
    from leansd.evaluation.records import stamp, write_records
    from leansd.faces.costs import (
        OtherVae,
        Profiled,
        tabulate_blocks,
        tabulate_gains,
        tabulate_predictions,
        tabulate_split,
    )
    from leansd.faces.stand_ins import build_stand_in, build_tiny_vae, check_stand_in
    from leansd.files import check_folder
    from leansd.loading import check_vae, find_device, load, load_vae, locate
    from leansd.report import Origin, write_report
    from leansd.report.measurements import name_vae, report_profile
    from leansd.runtime.samplers import name_sampler

    # Everything that can be wrong is found before a weight is read.
    check_folder(out)
    pixels = parse_size(size) if size else None
    find_device(device)
    if model in BUILTIN:
        check_stand_in(model)
    else:
        locate(model)
    autoencoder = load_vae(vae) if vae is not None and vae != "tiny" else None
    hush_libraries()

    pipe = build_stand_in(model, device=device) if model in BUILTIN else load(model, device=device)
    pipe.set_progress_bar_config(disable=True)
    if vae == "tiny":
        autoencoder = build_tiny_vae(pipe)
    elif autoencoder is not None:
        check_vae(pipe, autoencoder)
        autoencoder.to(device=pipe.device, dtype=pipe.dtype)
    note(f"warming up {model} on {pipe.device}")
    call = {} if guidance is None else {"guidance_scale": guidance}
    probe = prepare_probe(
        pipe, call=call, pictures=batch, size=pixels, subject=model, attend=attend or ()
    )
    plans = hold_out(probe.anatomy, check, guided=probe.is_guided) if check else {}
    with open_progress() as progress:
        bar = progress.add_task("profiling", total=repeats * (1 + len(plans)))
        cost, predictions = check_predictions(
            probe,
            plans,
            rounds=repeats,
            on_run=lambda name: progress.update(bar, advance=1, description=name),
        )
    other = None
    if vae is not None and autoencoder is not None:
        decode = time_decoder(probe, autoencoder, rounds=repeats)
        other = OtherVae(vae, decode, is_trained=vae != "tiny")
    width, height = probe.size
    factor = pipe.vae_scale_factor
    circumstances = stamp(pipe.device)
    profiled = Profiled(
        cost=cost,
        anatomy=dissect(
            pipe.unet,
            latent=(height // factor, width // factor),
            tokens=pipe.tokenizer.model_max_length,
            name=model,
        ),
        steps=steps,
        predictions=predictions,
        repeats=repeats,
        circumstances=circumstances,
        vae=other,
        sampler=name_sampler(pipe),
    )
    shared = {
        **circumstances,
        "subject": model,
        "pictures": batch,
        "width": width,
        "height": height,
    }
    records = [
        *cost.list_records(circumstances),
        *list_prediction_records(predictions, shared),
    ]
    origin = Origin(quote_command(), circumstances)
    files = [
        write_report(out / "report.html", report_profile(profiled, records), origin),
        write_records(out / "records.jsonl", records),
    ]
    if not as_json:
        for table in (tabulate_blocks, tabulate_split, tabulate_gains):
            show_table(table(profiled))
        if other is not None:
            show_text(name_vae(profiled))
        if predictions:
            show_table(tabulate_predictions(predictions))
            show_text(f"largest error of a predicted speed-up: {find_worst(predictions):.1%}")
        show_text("wrote " + ", ".join(map(str, files)))
    show_json(
        {
            "command": "profile",
            "model": model,
            "device": circumstances["device"],
            "pictures": batch,
            "size": [width, height],
            "guided": cost.is_guided,
            "repeats": repeats,
            "steps": steps,
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
                for each in predictions
            ],
            "vae": None if other is None else {"name": other.name, "decode": other.decode},
            "files": [str(path) for path in files],
        }
    )
