"""Trials: plans run on the calls that they are tuned on, and the journal that remembers them.

A tuning takes long, so everything that it measures is one line of a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from leansd.errors import OutputError
from leansd.evaluation.cost import CostModel
from leansd.evaluation.fidelity import psnr
from leansd.evaluation.fingerprints import fingerprint_case
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.runs import PipelineCall, RunOutputs
from leansd.plans.plan import Plan
from leansd.plans.row import OWN
from leansd.text import encode_json
from leansd.tuning.host import Host
from leansd.tuning.scheduler_hook import Steer


@dataclass(frozen=True)
class Trial:
    """A plan as it did on the calls that it was fitted on."""

    plan: Plan
    psnr: float
    """Mean over the calls, in dB, against the full run of the step count that was asked for."""


@dataclass(frozen=True)
class TrialRunner:
    """Where plans are tried: a host, its calls and what their pictures should be."""

    host: Host
    calls: Sequence[PipelineCall]
    seed: int
    goals: RunOutputs | None = None
    """What the full run ends with."""

    def run(self, steps: int, plan: Plan | None = None, steer: Steer | None = None) -> RunOutputs:
        """Run the calls, with the plan or without, steered or not."""
        return self.host.draw(self.calls, steps, plan, seed=self.seed, steer=steer)[0]

    def score(self, finals: RunOutputs) -> float:
        """Mean over the calls, in dB; a picture that is no numbers (NaN) is seen black."""
        assert self.goals is not None
        return float(psnr(finals.pictures.nan_to_num(), self.goals.pictures).mean())


@dataclass
class Journal:
    """Every plan that was tried, with its score, in a file a line each."""

    path: Path | None
    case: str
    known: dict[str, Trial] = field(default_factory=dict[str, Trial])
    cost: CostModel | None = None
    values: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Whatever else was noted, the latest of each."""

    @classmethod
    def open(cls, path: str | Path | None, facts: Mapping[str, Any]) -> Journal:
        """Read what a stopped tuning of the same case has left; lines of others are passed over."""
        journal = cls(Path(path) if path is not None else None, fingerprint_case(facts))
        if journal.path is not None and journal.path.exists():
            text = journal.path.read_text(encoding="utf-8")
            for line in text.splitlines():
                journal._read(line)
            if text and not text.endswith("\n"):
                journal._end_line()
        return journal

    def _read(self, line: str) -> None:
        # The last line of a tuning that was killed while writing is no JSON.
        with suppress(ValueError, KeyError):
            row = json.loads(line)
            if row["case"] != self.case:
                return
            if "value" in row:
                self.values[row["key"]] = row["value"]
            elif "cost" in row:
                cost = CostModel.from_records(map(Record.model_validate, row["cost"]))
                self._take_cost(cost, row.get("net", OWN))
            else:
                plan = Plan.from_dict(row["plan"])
                self.known[row["key"]] = Trial(plan, row["psnr"])

    def find(self, plan: Plan, stage: str = "tried") -> Trial | None:
        return self.known.get(f"{plan.fingerprint} {stage}")

    def note(self, plan: Plan, trial: Trial, stage: str = "tried") -> None:
        key = f"{plan.fingerprint} {stage}"
        self.known[key] = trial
        self._write({"key": key, "psnr": trial.psnr, "plan": trial.plan.to_dict()})

    def find_value(self, key: str) -> dict[str, Any] | None:
        return self.values.get(key)

    def note_value(self, key: str, value: dict[str, Any]) -> None:
        """Note plain values, in the place of those of the same key."""
        self.values[key] = value
        self._write({"key": key, "value": value})

    def note_cost(self, cost: CostModel, device: Any, net: str = OWN) -> None:
        """Note what a UNet costs: the pipeline's own first, then the others."""
        self._take_cost(cost, net)
        records = cost.list_records(stamp(device))
        kept = [record.model_dump(exclude_none=True) for record in records]
        self._write({"cost": kept, "net": net})

    def _take_cost(self, cost: CostModel, net: str) -> None:
        if net == OWN:
            self.cost = cost
        elif self.cost is not None:
            self.cost = replace(self.cost, nets={**self.cost.nets, net: cost})

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(encode_json({"case": self.case, **row}) + "\n")
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror or error}; what is in it stays, and "
                "the same tuning goes on from there"
            ) from error

    def _end_line(self) -> None:
        """What is written next must not stick to a line that a killed tuning has begun."""
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n")
