"""The journal of a tuning: every plan that was tried, so that a stopped one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leansd.measuring.keeping import fingerprint_case
from leansd.plans.document import PlanDocument, make_document, make_plan
from leansd.plans.plan import Plan
from leansd.tuning.refinement import Trial


@dataclass
class Journal:
    """Every plan that was tried, with its score, in a file a line each."""

    path: Path | None
    case: str
    known: dict[str, Trial] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path | None, facts: Mapping[str, Any]) -> Journal:
        """Read what a stopped tuning of the same case has left; lines of others are passed over."""
        journal = cls(Path(path) if path is not None else None, fingerprint_case(facts))
        if journal.path is not None and journal.path.exists():
            for line in journal.path.read_text(encoding="utf-8").splitlines():
                journal._read(line)
        return journal

    def _read(self, line: str) -> None:
        # The last line of a tuning that was killed while writing is no JSON.
        with suppress(ValueError, KeyError):
            row = json.loads(line)
            if row["case"] == self.case:
                plan = make_plan(PlanDocument.model_validate(row["plan"]))
                self.known[row["key"]] = Trial(plan, row["psnr"])

    def find(self, plan: Plan, stage: str = "tried") -> Trial | None:
        return self.known.get(f"{plan.fingerprint} {stage}")

    def note(self, plan: Plan, trial: Trial, stage: str = "tried") -> None:
        key = f"{plan.fingerprint} {stage}"
        self.known[key] = trial
        if self.path is None:
            return
        row = {
            "case": self.case,
            "key": key,
            "psnr": trial.psnr,
            "plan": make_document(trial.plan).model_dump(exclude_defaults=True),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
