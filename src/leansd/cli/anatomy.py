"""`leansd anatomy`: where a UNet keeps its weights and spends its time."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from leansd.cli.command import Result, argument, command, option
from leansd.cli.options import DeviceOptions, complete_shape
from leansd.cli.terminal import follow, note
from leansd.files import check_folder
from leansd.plans.anatomy import Anatomy

if TYPE_CHECKING:
    from leansd.evaluation.inner_timing import UnitTimes

app = typer.Typer(add_completion=False)


@command(
    app,
    "anatomy",
    "leansd anatomy",
    "leansd anatomy sd15 --latent 64",
    "leansd anatomy emoji --time --out anatomy --json",
    keeps=True,
)
def show_anatomy(
    model: str = argument(
        "emoji",
        "emoji, a model folder, a .safetensors file, a hub id, or the bare shape of "
        "sd15, sd21-base or sdxl.",
        autocompletion=complete_shape,
    ),
    *,
    latent: int | None = option(None, "Side of the latents; the model's own by default.", min=1),
    tokens: int = option(77, "Text tokens.", min=1),
    time: bool = option(False, "Measure the latency of every unit here.", "--time"),
    batch: int = option(2, "With --time: samples a call; 2 is a guided picture.", min=1),
    repeats: int = option(3, "With --time: timed calls.", min=1),
    out: Path | None = option(None, "Folder for the records, the figures and a page."),
    place: DeviceOptions,
) -> Result:
    """Show a UNet as a tree of blocks, layers and units, with parameters and MACs.

    With --time every unit is timed in full calls on random inputs; a bare shape gets random
    weights. With --out: parameters and computation by block, latency and parameters by unit.
    """
    from leansd.evaluation.records import stamp
    from leansd.evaluation.redundancy import list_records, read_spent, tabulate_spent
    from leansd.report.nets import report_anatomy, summarise_anatomy
    from leansd.unets import open_anatomy

    if out is not None:
        check_folder(out)
    place.check()
    anatomy = open_anatomy(model, latent=latent, tokens=tokens)
    times = _time(model, place, batch, latent, tokens, repeats) if time else None
    device = place.find_device() if time else "meta"
    records = list_records(anatomy, times, stamp(device))
    (spent,) = read_spent(records)
    return Result(
        facts={"model": model, **_list_facts(anatomy, times)},
        shown=[
            str(anatomy),
            *([tabulate_spent(spent)] if time else []),
            *([summarise_anatomy(spent)] if out is not None else []),
        ],
        records={out / "records.jsonl": records} if out is not None else {},
        pages={out / "report.html": report_anatomy(spent, records)} if out is not None else {},
        device=device,
    )


def _list_facts(anatomy: Anatomy, times: "UnitTimes | None") -> dict[str, Any]:
    return {
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
    }


def _time(
    model: str, place: DeviceOptions, batch: int, latent: int | None, tokens: int, repeats: int
) -> "UnitTimes":
    """Times units here; the first call warms up and says how long it will take."""
    from leansd.evaluation.inner_timing import time_units
    from leansd.unets import open_unet

    note(f"opening {model} on {place.find_device()}")
    unet = open_unet(model, device=place.device, dtype=place.precision)
    with follow("warming up", repeats + 1) as bar:
        is_warm = False

        def on_call(seconds: float) -> None:
            nonlocal is_warm
            if not is_warm:
                bar.say(f"{seconds:.1f} s a call, about {seconds * repeats:.0f} s to go")
                is_warm = True
            bar.advance("timing")

        return time_units(
            unet, batch=batch, latent=latent, tokens=tokens, repeats=repeats, on_call=on_call
        )
