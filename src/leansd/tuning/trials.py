"""Trials: plans run and fitted on the calls that they are tuned on, and the journal of them.

A tuning takes long, so everything that it measures is one line of a file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from leansd.errors import OutputError
from leansd.evaluation.cost import CostModel
from leansd.evaluation.fidelity import psnr
from leansd.evaluation.fingerprints import fingerprint_case
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.runs import PipelineCall, RunOutputs
from leansd.plans.anatomy import HEAD
from leansd.plans.methods import METHODS, weigh
from leansd.plans.plan import Plan
from leansd.plans.row import OWN, How
from leansd.text import encode_json
from leansd.tuning.error_model import CORRECTION_HOWS, Calibration
from leansd.tuning.host import Host, Seen, Steer, Step


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
                # What is written next must not stick to a line that a killed tuning has begun.
                with journal.path.open("a", encoding="utf-8") as file:
                    file.write("\n")
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


# -- fitting ---------------------------------------------------------------------------------------
# Corrections fitted on real runs: at each key step on the way, then all of a plan together.
#
# The error model proposes; what a plan really does, the UNet's answers to changed latents included,
# only a run can tell. One run fits and tries a plan at once: at every key step the correction is
# chosen that brings the latents nearest to where the full run's are, and the run goes on with it.
#
# Then all corrections are fitted together, to where the full run's latents end. For that the last
# latents' derivative by every correction is needed: a run for each. But a plan that forecasts the
# UNet's whole output can be followed from the scheduler's side alone, where forecasts are
# combinations of the key steps' outputs; so before the step whose correction is moved, nothing has
# to be computed again.


class KnownOutputs:
    """The computed outputs of one run and where they lie in log-SNR; or the pictures they show."""

    def __init__(self, plan: Plan, calibration: Calibration) -> None:
        self._places = calibration.log_snr.tolist()
        weights = calibration.denoising
        self._weights = [(0.0, 1.0)] * len(self._places)
        if weights is not None and _keeps_pictures(plan):
            self._weights = [(own, lead) for own, lead in weights.tolist()]
        self._known: list[tuple[float, torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forget them: another run begins."""
        self._known.clear()

    def note(self, index: int, sample: torch.Tensor, output: torch.Tensor) -> None:
        """Keep the output of a call, or the picture that it shows of its sample."""
        own, lead = self._weights[index]
        self._known.append((self._places[index], own * sample + lead * output))

    def forecast(self, index: int, sample: torch.Tensor, how: How) -> torch.Tensor:
        """The output [B, C, H, W] by the polynomial through what is kept last."""
        known, place = self._known[-METHODS[how].depth :], self._places[index]
        points = [here for here, _ in known]
        made = torch.stack([weigh(place, here, points) * each for here, each in known]).sum(0)
        own, lead = self._weights[index]
        return (made - own * sample) / lead

    def list_forecast_errors(
        self, index: int, sample: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """What the forecasts that corrections are by were wrong by, [2, B, C, H, W]."""
        hows = CORRECTION_HOWS
        return torch.stack([output - self.forecast(index, sample, how) for how in hows])


def _keeps_pictures(plan: Plan) -> bool:
    hows = {row.inherit[HEAD] for row in plan.rows if HEAD in row.inherit}
    return any(METHODS[how].of == "denoised" for how in hows)


def move_on(
    output: torch.Tensor, correct: tuple[float, float], forecast_errors: torch.Tensor
) -> torch.Tensor:
    """The corrected output [B, C, H, W], by forecast_errors [2, B, C, H, W]."""
    line, last = correct
    return output + line * forecast_errors[0] + last * forecast_errors[1]


LIMIT = 3.0
"""Corrections beyond this are noise fitted to few calls."""
DAMPING = 1e-4
"""Tells the parts of a correction apart where they are nearly the same."""


def try_plan(plan: Plan, bench: TrialRunner, calibration: Calibration) -> Trial:
    """Run a plan, fitting its corrections to the full run of the same step count on the way.

    Each run goes on with the corrections that suit it best; the plan gets those of all runs.
    """
    corrected, memory = list_corrected(plan), KnownOutputs(plan, calibration)
    # By key step, the normal equations of all runs: [2, 2] and [2].
    sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def steer(run: int, index: int, seen: Seen, step: Step) -> torch.Tensor:
        row = calibration.start + index
        if index == 0:
            memory.clear()
        elif not plan.rows[row].is_key:
            return seen.output
        output = seen.output
        if row in corrected and len(memory):
            forecast_errors = memory.list_forecast_errors(index, seen.sample, seen.output)
            plain = step(seen.output)
            goal = calibration.runs[run][index].previous
            moved = [step(seen.output + each) for each in forecast_errors]
            # Read at once: the one wait of a step that is corrected.
            changes = (torch.stack([*moved, goal]) - plain).flatten(1).cpu().double()
            gains, missing = changes[:-1], changes[-1]
            normal, target = gains @ gains.T, gains @ missing
            output = move_on(seen.output, _solve(normal, target), forecast_errors)
            before = sums.get(row, (0.0, 0.0))
            sums[row] = (before[0] + normal, before[1] + target)
        memory.note(index, seen.sample, seen.output)
        return output

    finals = bench.run(plan.steps, plan, steer)
    weights = {step: _solve(*each) for step, each in sums.items()}
    return Trial(plan.correct(weights), bench.score(finals))


def list_corrected(plan: Plan) -> set[int]:
    """The key steps that come right after a forecast of the UNet's output and run both lanes."""
    pairs = enumerate(zip(plan.rows, plan.rows[1:], strict=False), start=1)
    return {
        step
        for step, (before, row) in pairs
        if HEAD in before.inherit and row.is_key and row.guidance == "compute"
    }


def _solve(normal: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Line and last of least squares, slightly damped, and within the limit."""
    damped = normal + DAMPING * normal.trace() * torch.eye(2).to(normal)
    line, last = torch.linalg.solve(damped, target).clamp(-LIMIT, LIMIT).tolist()
    return round(line, 4), round(last, 4)


NUDGE = 0.1
"""How far a correction is moved to see what it does."""
DAMPINGS = (0.01, 0.1, 1.0)
SLOPE_CALLS = 4
"""Derivatives are taken on so many calls; all decide whether they led anywhere."""

Outputs: TypeAlias = Mapping[int, torch.Tensor]
"""Guided outputs [B, C, H, W] of one run by key step, before correction."""


def polish(trial: Trial, bench: TrialRunner, calibration: Calibration) -> Trial:
    """One step of Levenberg and Marquardt; the best of a few dampings, if it is better at all.

    Args:
        calibration: of the plan's step count.
    """
    rows = trial.plan.rows
    corrections = {step: row.correction for step, row in enumerate(rows) if any(row.correction)}
    if not corrections or bench.goals is None:
        return trial
    few = replace(bench, calls=bench.calls[:SLOPE_CALLS])
    base, past = replay(trial.plan, few, calibration)
    columns: list[torch.Tensor] = []
    for step, old in corrections.items():
        for moved in (old._replace(line=old.line + NUDGE), old._replace(last=old.last + NUDGE)):
            nudged = trial.plan.correct({step: moved})
            ended, _ = replay(nudged, few, calibration, since=step, past=past)
            columns.append((ended - base) / NUDGE)
    slopes = torch.stack(columns, dim=1)
    normal = slopes.T @ slopes
    goal = bench.goals.latents[: len(few.calls)].double().flatten()
    missing = slopes.T @ (goal - base)
    best = trial
    for damping in DAMPINGS:
        damped = normal + damping * torch.diag(normal.diagonal())
        change = torch.linalg.solve(damped, missing).reshape(-1, 2).tolist()
        moved = {
            step: (round(old.line + line, 4), round(old.last + last, 4))
            for (step, old), (line, last) in zip(corrections.items(), change, strict=True)
        }
        plan = trial.plan.correct(moved)
        other = Trial(plan, bench.score(bench.run(plan.steps, plan)))
        best = max(best, other, key=lambda each: each.psnr)
    return best


def replay(
    plan: Plan,
    bench: TrialRunner,
    calibration: Calibration,
    *,
    since: int = 0,
    past: Sequence[Outputs] = (),
) -> tuple[torch.Tensor, Sequence[Outputs]]:
    """The last latents of all calls, flat, and the outputs of every run of the pipeline.

    Args:
        plan: one that inherits nothing but the head, by polynomials.
        since: the first step that is computed anew.
        past: the outputs of every run before that.
    """
    keys = {0, *(key for key in plan.keys if key >= since)}
    keys.update(*(_list_sources(plan, key) for key in keys))
    memory = KnownOutputs(plan, calibration)
    outputs: list[dict[int, torch.Tensor]] = []

    def steer(run: int, index: int, seen: Seen, step: Step) -> torch.Tensor:
        at = calibration.start + index
        row = plan.rows[at]
        if index == 0:
            memory.clear()
            outputs.append({})
        elif not row.is_key:
            return memory.forecast(index, seen.sample, row.inherit[HEAD])
        # Some steps before are computed only for what guidance is forecast from.
        output = past[run][at] if at < since else seen.output
        corrected = output
        if any(row.correction) and len(memory):
            forecast_errors = memory.list_forecast_errors(index, seen.sample, output)
            corrected = move_on(output, row.correction, forecast_errors)
        outputs[run][at] = output
        memory.note(index, seen.sample, output)
        return corrected

    finals = bench.run(plan.steps, _keep_keys(plan, keys), steer)
    return finals.latents.double().flatten(), outputs


def _list_sources(plan: Plan, key: int) -> list[int]:
    """The key steps that the guidance of a key step is forecast from."""
    if plan.rows[key].guidance == "compute":
        return []
    return [each for each in plan.keys if each < key and plan.rows[each].guidance == "compute"][-2:]


def _keep_keys(plan: Plan, keys: Collection[int]) -> Plan:
    """What a plan computes at some of its key steps, and nothing else of it."""
    bare = Plan.between(keys, cut=HEAD, steps=plan.steps)
    for step in keys:
        row = plan.rows[step]
        bare = bare.switch(row.net, at=step).guide(row.guidance, at=step)
        for at, by in row.attend.items():
            bare = bare.attend(at, by=by, at=step)
    return bare
