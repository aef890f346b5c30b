"""How well a trained model draws what it is asked for, as a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from leansd.report.drawings import Bar, draw_bars
from leansd.report.sections import (
    Attachment,
    Chart,
    Drawing,
    Listing,
    Prose,
    Report,
)
from leansd.text import Table

SETS = {"train": "captions it was trained on", "held_out": "captions it never saw"}


def make_report(result: Mapping[str, Any], subject: str) -> Report:
    """Pictures beside real ones, by how often a CLIP finds their captions.

    Args:
        result: of `leansd.emoji.evaluation.evaluate_model`.
    """
    unseen = result["held_out"]
    drawn, real = unseen["generated"]["top1"], unseen["real"]["top1"]
    psnr = result["vae_psnr"]
    return Report(
        title=f"How well {subject} draws",
        summary=(
            f"Of captions that the model never saw, its pictures are matched to the right one "
            f"among {result['choices']} in {drawn:.0%} of all cases, real pictures in {real:.0%}."
        ),
        measured=f"{unseen['count']} pictures each of seen and unseen captions, drawn by {subject} "
        f"in {result['steps']} steps at guidance {result['guidance']:g}",
        sections=[
            Chart("Captions found", [_draw(result)]),
            Listing(
                "Drawn and real pictures",
                _tabulate(result),
                [
                    f"First: the caption is the likeliest of {result['choices']}; five: it is "
                    "among the five likeliest.",
                    "FID: Fréchet distance to the real pictures it was trained on; real pictures "
                    f"that it never saw are {result['frechet_real_held_out_to_real_train']:.2f} "
                    "away.",
                ],
            ),
            Prose(
                "Of the autoencoder",
                [
                    "Unseen pictures that are encoded and decoded again are "
                    f"{psnr['held_out_mean']:.1f} dB close to what they were, "
                    f"{psnr['held_out_worst']:.1f} dB at the worst.",
                ],
            ),
        ],
        attachments=[Attachment("evaluation.json", json.dumps(result, indent=1), "all numbers")],
    )


def _draw(result: Mapping[str, Any]) -> Drawing:
    bars = [
        Bar(
            name.replace("_", " "),
            (result[name]["generated"]["top1"], result[name]["real"]["top1"]),
            f"{result[name]['generated']['top1']:.0%}, {result[name]['real']['top1']:.0%}",
        )
        for name in SETS
    ]
    alt = "; ".join(f"{bar.name}: drawn and real {bar.remark}" for bar in bars)
    return draw_bars(bars, names=("drawn", "real"), alt=f"{alt}.", name="captions")


def _tabulate(result: Mapping[str, Any]) -> Table:
    rows = [
        (
            f"{kind}: {words}",
            f"{found['top1']:.1%}",
            f"{found['top5']:.1%}",
            f"{found['clip_score']:.1f}",
            f"{result[name]['frechet_to_real_train']:.2f}" if kind == "drawn" else "–",
        )
        for name, words in SETS.items()
        for kind, found in (
            ("drawn", result[name]["generated"]),
            ("real", result[name]["real"]),
        )
    ]
    return Table(("pictures", "first", "five", "CLIP score", "FID"), tuple(rows))
