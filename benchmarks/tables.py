"""Write the tables of README.md and some pages of docs from the committed records.

Nothing in them is typed by hand.

python benchmarks/tables.py           rewrite the tables
python benchmarks/tables.py --check   fail if they are not what the records say
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from tabulation import fleets, incubated, nets, plans

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- table: (?P<name>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

TABLES: dict[str, Callable[[], str]] = {
    "cuts": nets.tabulate_cuts,
    "headline": plans.tabulate_headline,
    "presets": plans.tabulate_presets,
    "bench": plans.tabulate_bench,
    "gpu": plans.tabulate_gpu,
    "overhead": plans.tabulate_overhead,
    "gri": nets.tabulate_gri,
    "assembly": nets.tabulate_assembly,
    "incubation": incubated.tabulate_incubation,
    "goals": incubated.tabulate_goals,
    "ingredients": incubated.tabulate_ingredients,
    "lighter": incubated.tabulate_lighter,
    "joint": plans.tabulate_joint,
    "few-calls": plans.tabulate_few_calls,
    "modes": nets.tabulate_modes,
    "prediction": plans.tabulate_prediction,
    "surgeries": nets.tabulate_surgeries,
    "bulk": fleets.tabulate_bulk,
    "host": fleets.tabulate_host,
    "scale": fleets.tabulate_scale,
    "steady": fleets.tabulate_steady,
    "imports": plans.tabulate_imports,
}


def fill(page: str) -> str:
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found['name']]()}\n{found[3]}", page)


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
