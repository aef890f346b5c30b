"""What the named surgeries leave of Stable Diffusion's UNets: counted, no weights needed.

    python benchmarks/surgeries.py

Records of `leansd.preview` go to `benchmarks/results/surgeries.jsonl`; `benchmarks/tables.py` makes
the table of `docs/surgery.md` from them. All is exact, and the same on every machine.
"""

from __future__ import annotations

from pathlib import Path

import leansd
from leansd.anatomy.builtin import open_builtin
from leansd.evaluation.records import Record, stamp, write_records
from leansd.surgery.presets import PRESETS

RESULTS = Path(__file__).parent / "results" / "surgeries.jsonl"


def count(name: str, model: str) -> list[Record]:
    """Parameters and multiply-accumulates before and after one surgery."""
    seen = leansd.preview({model: open_builtin(model)}, name)
    values = {
        "params": (seen.before.params, seen.after.params),
        "macs": (seen.before.macs, seen.after.macs),
        "units": (len(seen.before) - 2, len(seen.after) - 2),
    }
    return [
        Record(
            **stamp("meta"),
            subject=model,
            plan=name,
            fingerprint=PRESETS[name].surgery.fingerprint,
            metric=metric,
            value=after,
            unit="",
            before=before,
            latent=seen.after.size[0] if seen.after.size else None,
            edits=", ".join(str(edit) for edit in PRESETS[name].surgery.edits),
        )
        for metric, (before, after) in values.items()
    ]


def main() -> None:
    records: list[Record] = []
    for name, preset in PRESETS.items():
        for model in preset.models:
            records += count(name, model)
            print(f"{name} of {model}", flush=True)
    write_records(RESULTS, records)


if __name__ == "__main__":
    main()
