"""`leansd cut`: choose what to take out of a UNet for a budget of its cost."""

from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import typer

from leansd.cli.command import Result, command, option
from leansd.cli.options import Calls, ModelArgument, Opening, keep_default, offer
from leansd.cli.terminal import follow, note
from leansd.files import check_file, stand_beside

if TYPE_CHECKING:
    from leansd.tuning.cutting import Cut

app = typer.Typer(add_completion=False)
CALLS = Calls(count=8)


@dataclass(frozen=True)
class Budget:
    """How much of the cost may be left."""

    budget: float = option(0.8, "Share of the UNet's cost that may be left, as in 0.8.")
    of: str = option(
        "ms",
        "What costs: ms (of a call here), macs or params.",
        autocompletion=offer("ms", "macs", "params"),
    )
    cost: Path | None = option(
        None,
        "Records of leansd profile or leansd anatomy --time, for ms, of this UNet or "
        "of one with its addresses; measured here by default.",
    )

    def read(self) -> dict[str, Any]:
        """Arguments of `leansd.cut`, checked."""
        from leansd.evaluation.records import load_records
        from leansd.evaluation.redundancy import read_cost
        from leansd.tuning.cutting import check_budget

        check_budget(self.budget, self.of)
        cost = read_cost(load_records(self.cost)) if self.cost is not None else None
        return {"budget": self.budget, "of": self.of, "cost": cost}


@command(
    app,
    "cut",
    "leansd cut emoji --budget 0.75 --of macs --out light.yaml",
    "leansd cut emoji --budget 0.8 --of ms --guidance 7.5 --json",
)
def cut_unet(
    model: ModelArgument = "emoji",
    *,
    budget: Budget,
    out: Path = option(
        Path("surgery.yaml"), "File of the surgery; the report lies beside it.", "--out", "-o"
    ),
    calls: Calls = CALLS,
    steps: int = option(30, "Sampler steps of their runs.", min=2),
    moments: int = option(6, "Time steps of each run that count, evenly spread.", min=1),
    tries: int = option(24, "Cuts near the first answer that are measured.", min=0),
    opening: Opening,
) -> Result:
    """Measure what every removal does to the UNet's output, and choose the best cut.

    What goes is a surgery: leansd operate builds the lighter UNet from it, to be trained.
    """
    from leansd.tuning.cutting import CALLS, cut

    # Everything that can be wrong is found before a weight is read.
    out = keep_default(out, Path("surgery.yaml"))
    page = check_file(stand_beside(out, ".html"))
    check_file(out)
    limits = budget.read()
    opening.check_model(model)
    texts = calls.list_prompts(model, list(CALLS))

    pipe = opening.open_with_unet(model)
    scale = calls.find_guidance(pipe, model)
    note(f"cutting on {len(texts)} pictures on {pipe.device}")
    with follow("", 100) as bar:
        found = cut(
            pipe,
            texts,
            **limits,
            steps=steps,
            moments=moments,
            settings={"guidance_scale": scale},
            seed=calls.seed,
            batch=calls.batch,
            tries=tries,
            name=out.stem,
            tell=bar.share,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    found.surgery.save(out)
    settings = {"steps": steps, "seed": calls.seed, "guidance": scale}
    facts = {"model": model, **_list_facts(found), **settings}
    return _give_cut(found, pipe, facts, out, page)


def _give_cut(found: "Cut", pipe: Any, facts: dict[str, Any], out: Path, page: Path) -> Result:

    from leansd.anatomy import dissect
    from leansd.report.nets import report_cut
    from leansd.surgery.preview import preview

    return Result(
        facts=facts,
        shown=[
            found.tabulate(),
            str(preview(pipe.unet, found.surgery)),
            fill(str(found), 80),
        ],
        files=[out],
        pages={page: report_cut(found, dissect(pipe.unet, name=facts["model"]))},
        device=pipe.device,
    )


def _list_facts(found: "Cut") -> dict[str, Any]:
    return {
        "budget": found.budget,
        "of": found.of,
        "cost": found.cost,
        "least_cost": found.least_cost,
        "predicted_error": found.predicted_error,
        "measured_error": found.measured_error,
        "surgery": found.surgery.to_document(),
        "fingerprint": found.surgery.fingerprint,
        "candidates": [
            {
                "addresses": list(each.removal.addresses),
                "error": each.error,
                "saves": each.saves,
                "cut": each.removal in found.removals,
            }
            for each in found.candidates
        ],
    }
