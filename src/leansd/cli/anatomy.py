"""`leansd anatomy`: where a UNet keeps its weights and spends its time."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.completions import complete_device, complete_shape
from leansd.cli.examples import give_examples
from leansd.cli.options import Quiet

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd anatomy",
        "leansd anatomy sd15 --latent 64",
        "leansd anatomy emoji --time --out anatomy --json",
    )
)
def show_anatomy(
    model: Annotated[
        str,
        typer.Argument(
            help="emoji, a model folder, a .safetensors file, a hub id, or the bare shape of "
            "sd15, sd21-base or sdxl.",
            autocompletion=complete_shape,
        ),
    ] = "emoji",
    latent: Annotated[
        int | None, typer.Option(min=1, help="Side of the latents; the model's own by default.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Text tokens.")] = 77,
    time: Annotated[
        bool, typer.Option("--time", help="Measure the latency of every unit here.")
    ] = False,
    batch: Annotated[
        int, typer.Option(min=1, help="With --time: samples a call; 2 is a guided picture.")
    ] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="With --time: timed calls.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the records, the figures and a page.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="With --time: cpu, cuda; the GPU by default.", autocompletion=complete_device
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one line of JSON holding every row.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Show a UNet as a tree of blocks, layers and units, with parameters and MACs.

    With --time every unit is timed in full calls on random inputs; a bare shape gets random
    weights. With --out: parameters and computation by block, latency and parameters by unit.
    """
    from dataclasses import asdict

    from leansd.cli.invocation import quote_command
    from leansd.cli.terminal import (
        hush_libraries,
        note,
        open_progress,
        show_json,
        show_table,
        show_text,
    )
    from leansd.evaluation.records import stamp, write_records
    from leansd.evaluation.units import time_units
    from leansd.faces.outlines import open_anatomy, open_unet
    from leansd.faces.redundancy import list_records, read_spent, tabulate_spent
    from leansd.files import check_folder
    from leansd.loading import find_device
    from leansd.report import Origin, write_report
    from leansd.report.nets import report_anatomy, summarise_anatomy

    if out is not None:
        check_folder(out)
    where = find_device(device)
    hush_libraries()
    anatomy = open_anatomy(model, latent=latent, tokens=tokens)
    show_text(str(anatomy))

    times = None
    if time:
        note(f"opening {model} on {where}")
        unet = open_unet(model, device=device)
        with open_progress() as progress:
            bar = progress.add_task("warming up", total=repeats + 1)

            def follow(seconds: float) -> None:
                if progress.tasks[bar].completed == 0:
                    expected = f"{seconds:.1f} s a call, about {seconds * repeats:.0f} s to go"
                    progress.console.print(expected)
                progress.update(bar, advance=1, description="timing")

            times = time_units(
                unet, batch=batch, latent=latent, tokens=tokens, repeats=repeats, on_call=follow
            )
    circumstances = stamp(where if time else "meta")
    records = list_records(anatomy, times, circumstances)
    (spent,) = read_spent(records)
    if times is not None:
        show_table(tabulate_spent(spent))
    files: list[Path] = []
    if out is not None:
        files = [
            write_records(out / "records.jsonl", records),
            write_report(
                out / "report.html",
                report_anatomy(spent, records),
                Origin(quote_command(), circumstances),
            ),
        ]
        show_text(summarise_anatomy(spent))
        show_text("wrote " + ", ".join(map(str, files)))
    if as_json:
        show_json(
            {
                "command": "anatomy",
                "model": model,
                "units": len(anatomy.units) - 2,
                "ends": 2,
                "params": anatomy.params,
                "macs": anatomy.macs,
                "latent": anatomy.size,
                "tokens": anatomy.tokens,
                "fingerprint": anatomy.fingerprint,
                "rows": [asdict(unit) for unit in anatomy],
                "batch": times.batch if times is not None else None,
                "call_time": times.call.median if times is not None else None,
                "unit_times": times.medians if times is not None else None,
                "files": [str(path) for path in files],
            }
        )
