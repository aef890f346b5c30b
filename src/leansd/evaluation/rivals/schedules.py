"""Rivals that have no package for diffusers' UNets: their methods as plans of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leansd.evaluation.contest import Contestant, Grounds, send_plan
from leansd.evaluation.rivals.rival import Rival, Send
from leansd.plans.presets import preset

Options = Sequence[Mapping[str, Any]]


def send_presets(name: str, label: str, long: Options, short: Options) -> Send:
    """A preset with one set of options a contestant; `label` is formatted with the options."""

    def send(grounds: Grounds) -> list[Contestant]:
        contest, blocks = grounds.contest, grounds.anatomy.up_blocks
        return [
            send_plan(
                grounds,
                preset(name, contest.steps, blocks=blocks, **options),
                label.format(**options),
                name,
            )
            for options in (long if contest.is_long else short)
        ]

    return send


def _list_spectrum(hows: Sequence[str], growths: Sequence[float]) -> Options:
    return [{"growth": growth, "how": how} for growth in growths for how in hows]


EASYCACHE = Rival(
    "easycache",
    "EasyCache's reuse of whole steps, as a plan",
    send_presets(
        "easycache",
        "easycache {threshold}",
        [{"threshold": threshold} for threshold in (0.02, 0.05, 0.1, 0.2)],
        [{"threshold": threshold} for threshold in (0.05, 0.1)],
    ),
    preset="easycache",
)
SPECTRUM = Rival(
    "spectrum",
    "Spectrum's forecast, as a plan",
    send_presets(
        "spectrum",
        "{how} {growth}",
        _list_spectrum(("chebyshev", "chebyshev-line"), (0, 0.25, 0.75)),
        _list_spectrum(("chebyshev-line",), (0, 0.75)),
    ),
    preset="spectrum",
)
CUTOFF = Rival(
    "guidance-cutoff",
    "no guidance in the last part of the run, as a plan: the callback of diffusers keeps one "
    "prompt of a batch",
    send_presets(
        "guidance-cutoff",
        "cutoff {share}",
        [{"share": share} for share in (0.2, 0.4, 0.6)],
        [],
    ),
    preset="guidance-cutoff",
)
