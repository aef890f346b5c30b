"""Write the tables of README.md and some pages of docs from the committed records.

Nothing in them is typed by hand.

python benchmarks/tables.py           rewrite the tables
python benchmarks/tables.py --check   fail if they are not what the records say
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tabulation import contests, fleets, incubated, nets, plans
from tabulation.cells import RESULTS

from leansd.emoji.location import model_folder
from leansd.evaluation.records import load_records
from leansd.loading import EMBEDDED

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "integrations" / "comfyui" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
BLOCK = re.compile(r"(<!-- table: (?P<name>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

TABLES: dict[str, tuple[Callable[[], str], str]] = {
    "cuts": (nets.tabulate_cuts, "cuts"),
    "headline": (plans.tabulate_headline, "presets"),
    "presets": (plans.tabulate_presets, "presets"),
    "judged": (nets.tabulate_judged, ""),
    "tuned": (plans.tabulate_tuned, ""),
    "elsewhere": (plans.tabulate_elsewhere, "untuned"),
    "untuned": (plans.tabulate_untuned, "untuned"),
    "second": (contests.tabulate_second, "second"),
    "bench": (contests.tabulate_bench, "bench"),
    "flow": (contests.tabulate_flow, "flow"),
    "comfyui": (plans.tabulate_comfyui, "comfyui"),
    "gpu": (plans.tabulate_gpu, "gpu"),
    "overhead": (plans.tabulate_overhead, "overhead"),
    "gri": (nets.tabulate_gri, "gri"),
    "assembly": (nets.tabulate_assembly, "assembly"),
    "incubation": (incubated.tabulate_incubation, "incubation"),
    "goals": (incubated.tabulate_goals, "incubation"),
    "ingredients": (incubated.tabulate_ingredients, "incubation"),
    "lighter": (incubated.tabulate_lighter, "incubation"),
    "judged-plans": (plans.tabulate_judged_plans, "judged-plans"),
    "joint": (plans.tabulate_joint, "joint"),
    "few-calls": (plans.tabulate_few_calls, "few-calls"),
    "modes": (nets.tabulate_modes, "modes"),
    "prediction": (plans.tabulate_prediction, "prediction"),
    "surgeries": (nets.tabulate_surgeries, "surgeries"),
    "bulk": (fleets.tabulate_bulk, "bulk"),
    "host": (fleets.tabulate_host, "scale"),
    "scale": (fleets.tabulate_scale, "scale"),
    "steady": (fleets.tabulate_steady, "scale"),
    "imports": (plans.tabulate_imports, "imports"),
}
"""What writes each table, and the records that it reads; none where it reads the model's card."""
PREDECESSOR = (
    "*Measured on the bundled model's predecessor (64 px); `make evidence` measures it anew.*\n\n"
)


def fill(page: str) -> str:
    return BLOCK.sub(lambda found: f"{found[1]}{make(found['name'])}\n{found[3]}", page)


def make(name: str) -> str:
    """A table, which says so where its records are older than the bundled model."""
    tabulate, records = TABLES[name]
    return (PREDECESSOR if is_outdated(records) else "") + tabulate()


@cache
def is_outdated(name: str) -> bool:
    """Whether records of the bundled model are older than its weights."""
    path = RESULTS / f"{name}.jsonl"
    trained = json.loads((model_folder() / "evaluation.json").read_text())["date"]
    return path.exists() and any(
        each.subject.startswith(EMBEDDED) and each.time < trained for each in load_records(path)
    )


def main() -> None:
    for path in PAGES:
        old = path.read_text(encoding="utf-8")
        new = fill(old)
        if "--check" in sys.argv[1:]:
            if new != old:
                sys.exit(f"{path.name} is not what the records say: run benchmarks/tables.py")
        else:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
