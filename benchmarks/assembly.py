"""What assembly gains: thinned UNets with cheap attention against the full one, in turns.

    python benchmarks/assembly.py [--latent 64] [--rounds 5] [--only asdm-1222 --only gri]

UNets of Stable Diffusion 1.5's size with random weights, which is all that time depends on, and a
guided batch of two. Every net runs once a round, so that ratios are paired. Records, with the
multiply-accumulates of each, go to `benchmarks/results/assembly.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel

import leansd
from leansd.anatomy.builtin import BUILTIN
from leansd.anatomy.counting import count_macs
from leansd.anatomy.inputs import make_inputs
from leansd.cli.terminal import hush_libraries
from leansd.evaluation.records import Record, put_records, stamp
from leansd.evaluation.timing import compare_timings, time_cases
from leansd.surgery.checkpoints import share_weights
from leansd.surgery.edits import Surgery
from leansd.surgery.presets import find_surgery

RESULTS = Path(__file__).parent / "results" / "assembly.jsonl"
FULL = "full"
BATCH = 2
ATTENTIONS = ("dn0.*.attn", "up3.*.attn")
FEED_FORWARDS = ("dn0.*.ff", "up3.*.ff")
RESNETS = ("up3.*.res",)
THINNED = ("asdm-1222", "asdm-1122", "asdm-1112")
OTHERS = ("bk-base", "lean", "leaner", "leanest")


def list_surgeries() -> dict[str, Surgery]:
    """Each thinning as it is, with GRI at the shallowest level, and cheapened further; beside them
    BK-SDM's and ours."""
    surgeries = {name: find_surgery(name) for name in OTHERS}
    for base in (Surgery(FULL), *map(find_surgery, THINNED)):
        gri = base.replace(*ATTENTIONS, by="gri")
        prefix = "" if base.name == FULL else f"{base.name} + "
        cheapened = {
            base.name: base,
            f"{prefix}gri": gri,
            f"{prefix}gri + narrow-ff": gri.replace(*FEED_FORWARDS, by="narrow-ff", share=0.5),
            f"{prefix}gri + condconv": gri.replace(*RESNETS, by="condconv", donors="up3"),
        }
        surgeries |= cheapened
    del surgeries[FULL]
    return surgeries


def main(
    latent: int = 64,
    rounds: int = 5,
    model: str = "sd15",
    device: str = "",
    only: Annotated[list[str] | None, typer.Option(help="Names of surgeries.")] = None,
    results: Path = RESULTS,
) -> None:
    hush_libraries()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    torch.manual_seed(0)
    teacher = UNet2DConditionModel(**BUILTIN[model]).eval().to(device, dtype)
    nets = {FULL: teacher}
    surgeries = list_surgeries()
    for name in only or surgeries:
        nets[name], _ = leansd.operate(teacher, surgeries[name])
        share_weights(nets[name], teacher)
    inputs = make_inputs(teacher, size=(latent, latent), batch=BATCH, device=device, dtype=dtype)
    cases = {name: partial(_run, net, inputs) for name, net in nets.items()}
    timings = time_cases(cases, rounds=rounds, device=device)
    shared: dict[str, Any] = {
        **stamp(device),
        "subject": model,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": BATCH,
        "latent": latent,
        "rounds": rounds,
    }
    records: list[Record] = []
    for name, net in nets.items():
        gain = compare_timings(timings[FULL], timings[name])
        macs = count_macs(net, latent=latent).total / 1e9
        params = sum(parameter.numel() for parameter in net.parameters()) / 1e6
        seconds = timings[name].median
        print(f"{name}: {seconds:.3f} s, {gain}, {macs:.1f} GMAC, {params:.1f} M parameters")
        fields = {**shared, "plan": name}
        if name in surgeries:
            fields["fingerprint"] = surgeries[name].fingerprint
        records += [
            Record(**fields, metric="seconds", value=seconds, unit="s"),
            Record(
                **fields, metric="speedup", value=gain.median, unit="x", low=gain.low,
                high=gain.high,
            ),
            Record(**fields, metric="macs", value=macs, unit="GMAC"),
            Record(**fields, metric="params", value=params, unit="M"),
        ]  # fmt: skip
    # A run of some nets leaves the others' records; every speed-up is over the full net of its run.
    put_records(results, records, lambda record: record.plan)


def _run(net: UNet2DConditionModel, inputs: Mapping[str, Any], turn: int) -> None:
    net(**inputs)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
