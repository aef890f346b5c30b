"""GRI attention against full attention, in turns: one shallow self-attention, or a whole UNet.

    python benchmarks/gri.py [--latent 64 --latent 96 --latent 128] [--rounds 10] [--unet]

Sizes are those of Stable Diffusion 1.5, weights are random, the batch is a guided one of two.
Full attention is PyTorch's fused one. Records go to `benchmarks/results/gri.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from leansd.anatomy.builtin import BUILTIN
from leansd.anatomy.inputs import make_inputs
from leansd.anatomy.reading import read_anatomy
from leansd.cli.terminal import hush_libraries
from leansd.evaluation.records import Record, load_records, stamp, write_records
from leansd.evaluation.timing import compare_timings, time_cases
from leansd.surgery.parts.gri import MODES

RESULTS = Path(__file__).parent / "results" / "gri.jsonl"
HEADS, WIDTH = 8, 40
BATCH = 2
FULL = "full"
SHALLOW = ("dn0.*.sa", "up3.*.sa")


def make_attention_cases(latent: int, device: str, dtype: torch.dtype) -> Mapping[str, Any]:
    """One self-attention of the shallowest level, on maps [2, latent * latent, 320]."""
    torch.manual_seed(0)
    attention = Attention(HEADS * WIDTH, heads=HEADS, dim_head=WIDTH).eval().to(device, dtype)
    tokens = torch.randn(BATCH, latent * latent, HEADS * WIDTH, device=device, dtype=dtype)
    return dict(_list_cases([attention], lambda: attention(tokens)))


def make_unet_cases(latent: int, device: str, dtype: torch.dtype) -> Mapping[str, Any]:
    """A whole UNet, full or with GRI in its five shallowest self-attentions."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**BUILTIN["sd15"]).eval().to(device, dtype)
    anatomy = read_anatomy(unet)
    paths = [unit.path for pattern in SHALLOW for unit in anatomy.select(pattern)]
    attentions = [unet.get_submodule(path) for path in paths]
    inputs = make_inputs(unet, size=(latent, latent), batch=BATCH, device=device, dtype=dtype)
    return dict(_list_cases(attentions, lambda: unet(**inputs)))


def _list_cases(
    attentions: list[Any], run: Callable[[], Any]
) -> Iterator[tuple[str, Callable[[int], None]]]:
    """`run` with full attention and with every reading of GRI."""
    processors = {FULL: AttnProcessor2_0, **{f"gri {name}": MODES[name] for name in MODES}}
    for name, make in processors.items():

        def case(_: int, make: Callable[[], Any] = make) -> None:
            for attention in attentions:
                attention.set_processor(make())
            run()

        yield name, case


def main(
    latent: Annotated[list[int] | None, typer.Option(help="Sides of the latents.")] = None,
    rounds: int = 10,
    unet: Annotated[bool, typer.Option("--unet", help="A whole UNet.")] = False,
    device: str = "",
    results: Path = RESULTS,
) -> None:
    hush_libraries()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    make_cases = make_unet_cases if unet else make_attention_cases
    for side in latent or ([64] if unet else [64, 96, 128]):
        # A call of a whole UNet takes minutes, beside which what only its first does is nothing.
        timings = time_cases(
            make_cases(side, device, dtype), rounds=rounds, warmup=0 if unet else 1, device=device
        )
        shared: dict[str, Any] = {
            **stamp(device),
            "subject": "sd15" if unet else f"self-attention, {HEADS} heads of {WIDTH}",
            "dtype": str(dtype).removeprefix("torch."),
            "batch": BATCH,
            "latent": side,
            "rounds": rounds,
        }
        records: list[Record] = []
        for name, timing in timings.items():
            gain = compare_timings(timings[FULL], timing)
            print(f"{shared['subject']}, {side} x {side}, {name}: {timing.median:.4f} s, {gain}")
            records += [
                Record(**shared, plan=name, metric="seconds", value=timing.median, unit="s"),
                Record(
                    **shared, plan=name, metric="speedup", value=gain.median, unit="x",
                    low=gain.low, high=gain.high,
                ),
            ]  # fmt: skip
        kept = load_records(results) if results.exists() else []
        write_records(results, [*kept, *records])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
