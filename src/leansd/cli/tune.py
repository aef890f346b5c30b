"""`leansd tune`: the plans that lose least, for every speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import typer

from leansd.cli.command import Result, command, option
from leansd.cli.options import (
    Calls,
    ModelArgument,
    NetsOption,
    Opening,
    keep_default,
    open_nets,
    read_pairs,
)
from leansd.cli.terminal import follow, note
from leansd.emoji.location import EMBEDDED
from leansd.emoji.prompts import GRID_PROMPTS
from leansd.errors import LeansdError
from leansd.evaluation.picture_sets import PICTURES
from leansd.evaluation.prompt_sets import choose_prompts, read_generic, read_prompts
from leansd.files import check_file, stand_beside

if TYPE_CHECKING:
    from leansd.evaluation.records import Record
    from leansd.tuning.front import Front, Point

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Goal:
    """Which plan of the front is chosen."""

    speedup: float | None = option(None, "Choose the best plan that is so many times faster.")
    psnr: float | None = option(None, "Choose the fastest plan of so many dB to the full run.")
    ms: float | None = option(None, "Choose the best plan of so many milliseconds a call.")

    def check(self) -> dict[str, float]:
        """The one goal by its name; 2 times faster by default.

        Raises:
            LeansdError: there are several, or it cannot be reached by any plan.
        """
        given = {"speedup": self.speedup, "psnr": self.psnr, "ms": self.ms}
        goal = {name: value for name, value in given.items() if value is not None}
        if len(goal) > 1:
            raise LeansdError("give one goal: --speedup, --psnr or --ms")
        if min(goal.values(), default=1) <= 0:
            raise LeansdError("a goal is a positive number")
        if goal.get("speedup", 2.0) <= 1:
            raise LeansdError(f"{self.speedup:g} times as fast is no gain: give a speed-up above 1")
        return goal or {"speedup": 2.0}


@dataclass(frozen=True)
class Search:
    """How long and where plans are sought."""

    tries: int = option(6, "Moves of key steps that are tried for each speed.", min=0)
    speeds: str | None = option(None, "Speed-ups of the front, as in 1.5,2,3.")
    attend: list[str] | None = option(
        None, "Self-attentions that may go by GRI, as in dn0.*.attn; repeat it."
    )
    net: NetsOption = None
    mixes: int = option(
        0,
        "Fit mixes of plans with few UNet calls on so many more full runs; 200 to 320 make good "
        "ones, 0 fits none.",
        "--calls",
        min=0,
    )

    def list_mix_calls(self, calls: Calls, model: str, init: Path | None) -> list[str]:
        """The prompts that mixes are fitted on: the user's in turns, or such as are built in.

        Raises:
            LeansdError: there are too few, or the runs start from pictures.
        """
        from leansd.tuning.mixing import choose_mix_calls

        given = None if calls.prompts is None else read_prompts(calls.prompts)
        own = given or (None if model == EMBEDDED else read_generic())
        prompts = choose_prompts(model, self.mixes, own)
        choose_mix_calls(prompts, prompts)
        if prompts and init is not None:
            raise LeansdError("--calls fits mixes of runs from noise; leave it out with --init")
        return prompts

    def read(self, goal: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, str]]:
        """Arguments of `leansd.tune`, checked, and the folders of nets by name."""
        from leansd.tuning.tuner import SPEEDS

        speeds = _parse_speeds(self.speeds) if self.speeds is not None else SPEEDS
        folders = read_pairs("--net", self.net or (), "FOLDER, light=runs/asdm/net")
        found = {"tries": self.tries, "speeds": speeds, "attend": self.attend or ()}
        return found | {name: goal.get(name) for name in ("speedup", "ms")}, folders


@dataclass(frozen=True)
class Files:
    """What is written, and where."""

    out: Path = option(
        Path("plan.json"), "File of the chosen plan; all else lies beside it.", "--out", "-o"
    )
    front: Path | None = option(None, "File of the whole front; OUT.front.json by default.")
    journal: Path | None = option(
        None, "What resumes a stopped tuning; OUT.journal.jsonl by default."
    )
    drift: Path | None = option(None, "File of records of what changes from step to step.")

    def check(self) -> tuple[Path, Path, Path, Path]:
        """Plan, front, journal and page; raises LeansdError where a file cannot be written."""
        journal = self.journal or stand_beside(self.out, ".journal.jsonl")
        out = keep_default(self.out, Path("plan.json"))
        front = self.front or stand_beside(out, ".front.json")
        page = stand_beside(out, ".html")
        for path in (out, front, journal, page, self.drift):
            if path is not None:
                check_file(path)
        return out, front, journal, page

    def measure_drift(self, bar: Any, *calls: Any, **settings: Any) -> "list[Record]":
        """What changes from step to step, where a file for it is given."""
        from leansd.tuning.drift import measure_drift

        if self.drift is None:
            return []
        bar.share("measuring drift", 1)
        return measure_drift(*calls, **settings)


@dataclass(frozen=True)
class Start:
    """Pictures to start from: plans for image-to-image."""

    init: Path | None = option(
        None, "Tune image-to-image, from this picture or from those in this folder in turns."
    )
    strength: float = option(0.8, "With --init: how much is redrawn, above 0 and up to 1.")

    def open(self, steps: int) -> list[Any]:
        """The pictures; raises LeansdError where one cannot be read or no step is left."""
        from leansd.drawing import check_strength, open_picture

        if self.init is None:
            return []
        if not 0 < self.strength <= 1:
            raise LeansdError(f"strength {self.strength:g} lies outside (0, 1]")
        check_strength(self.strength, steps)
        if not self.init.is_dir():
            return [open_picture(self.init)]
        paths = sorted(path for path in self.init.iterdir() if path.suffix.lower() in PICTURES)
        if not paths:
            raise LeansdError(f"no pictures in {self.init}: give a folder of PNG, JPEG or WebP")
        return [open_picture(path) for path in paths]

    def place(
        self, pipe: Any, prompts: Sequence[str], pictures: Sequence[Any], drawn: Calls, model: str
    ) -> tuple[Any, list[Any], dict[str, Any]]:
        """The pipeline, its calls, and how all of them are drawn."""
        from PIL import ImageOps

        from leansd.drawing import default_size
        from leansd.evaluation.fidelity import as_batch
        from leansd.loading import as_image_to_image

        settings: dict[str, Any] = {"guidance_scale": drawn.find_guidance(pipe, model)}
        how = {"settings": settings, "seed": drawn.seed, "batch": drawn.batch}
        if not pictures:
            return pipe, list(prompts), how
        settings["strength"] = self.strength
        fitted = [as_batch([ImageOps.fit(each, default_size(pipe))]) for each in pictures]
        calls = [
            {"prompt": prompt, "image": fitted[turn % len(fitted)]}
            for turn, prompt in enumerate(prompts)
        ]
        return as_image_to_image(pipe), calls, how


@command(
    app,
    "tune",
    "leansd tune emoji --speedup 2.5 --sampler ddim --out ddim.json",
    "leansd tune emoji --psnr 40 --steps 20 --drift drift.jsonl",
)
def tune_plans(
    model: ModelArgument = "emoji",
    *,
    goal: Goal,
    files: Files,
    steps: int = option(30, "Sampler steps of the full run.", min=4),
    calls: Calls,
    start: Start,
    search: Search,
    opening: Opening,
) -> Result:
    """Tune plans on some calls, check them on others, and save the whole front.

    One of --speedup, --psnr and --ms says which plan is written to OUT; 2 times faster by default.
    Stopped, the same command goes on where it was.
    """
    from leansd.evaluation.runs import CallSet
    from leansd.report.plans import report_tuning
    from leansd.runtime.context import dissect_denoiser
    from leansd.runtime.samplers import name_sampler
    from leansd.tuning.host import require_tunable
    from leansd.tuning.tuner import tune

    # Everything that can be wrong is found before a weight is read.
    out, front, journal, page = files.check()
    sought, folders = search.read(wanted := goal.check())
    _check_model(opening, model, search, files)
    prompts = _list_prompts(calls, model)
    further = search.list_mix_calls(calls, model, start.init)
    pictures = start.open(steps)
    pipe = opening.open(model)
    require_tunable(pipe.scheduler, steps)
    pipe, asked, drawn = start.place(pipe, prompts, pictures, calls, model)
    note(f"tuning on {len(asked)} pictures on {pipe.device}; every third decides, the rest tune")
    with follow("", 100) as bar:
        found = tune(
            pipe,
            asked,
            steps=steps,
            **drawn,
            **sought,
            mixes=further,
            nets=open_nets(pipe, folders),
            sampler=name_sampler(pipe),
            journal=journal,
            tell=bar.share,
        )
        found.save(front)
        drifts = files.measure_drift(bar, pipe, CallSet(asked[:4], **drawn), steps, subject=model)
    chosen = found.find(**wanted)
    chosen.plan.save(out)
    return Result(
        facts={"model": model, "goal": wanted, **_list_facts(found, chosen, drawn)},
        shown=_show(found, chosen),
        files=[out, front],
        pages={page: report_tuning(found, chosen, dissect_denoiser(pipe, model), drifts)},
        records={files.drift: drifts} if files.drift is not None else {},
        device=pipe.device,
    )


def _check_model(opening: Opening, model: str, search: Search, files: Files) -> None:
    """Refuses what there is not, and what reaches into a UNet where a transformer denoises."""
    from leansd.loading import has_transformer
    from leansd.runtime.samplers import check_sampler, require_convergence

    if opening.sampler is not None:
        require_convergence(check_sampler(opening.sampler))
    opening.check_model(model)
    given = {
        "--attend": search.attend,
        "--net": search.net,
        "--calls": search.mixes,
        "--drift": files.drift,
    }
    for name, value in given.items():
        if value and has_transformer(model):
            raise LeansdError(f"{name} is for UNets, and in {model} a transformer denoises")


def _show(found: "Front", chosen: "Point") -> list[Any]:

    from leansd.report.plans import describe_choice, tabulate_front

    return [
        tabulate_front(found, chosen),
        "or: the best of the other kind, fewer steps or tuned, that is as fast",
        fill(describe_choice(found, chosen), 80),
    ]


def _list_prompts(calls: Calls, model: str) -> list[str]:
    """All of a file's prompts, or 24 that are built in; enough to tune on some of them."""
    from leansd.tuning.tuner import split_calls

    count = calls.count or (24 if calls.prompts is None else None)
    own = GRID_PROMPTS if model == EMBEDDED else read_generic()
    prompts = replace(calls, count=count).list_prompts(model, own)
    split_calls(prompts, None)
    return prompts


def _list_facts(found: "Front", chosen: "Point", drawn: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seed": drawn["seed"],
        "guidance": drawn["settings"]["guidance_scale"],
        "sampler": found.sampler,
        "steps": found.steps,
        "plan": chosen.plan.name,
        "fingerprint": chosen.plan.fingerprint,
        "fewer_steps_win": chosen.is_plain,
        "front": [
            {
                "plan": point.plan.name,
                "fingerprint": point.plan.fingerprint,
                "speedup": round(point.speedup, 4),
                "ms": round(point.milliseconds, 2),
                "psnr": round(point.psnr, 4),
                "steps": point.plan.steps,
                "keys": list(point.plan.keys),
            }
            for point in found.points
        ],
    }


def _parse_speeds(text: str) -> list[float]:
    """`1.5,2,3` as numbers above 1."""
    try:
        speeds = [float(part) for part in text.split(",")]
    except ValueError:
        speeds = [0.0]
    if not all(1 < speed < 100 for speed in speeds):
        raise LeansdError(f"{text!r} are no speed-ups: give numbers above 1, as in 1.5,2,3")
    return speeds
