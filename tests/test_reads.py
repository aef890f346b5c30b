"""What reads a value of a tensor at every step, and so would wait for a GPU at every step.

Simulated tensors have no values, so what needs some (tuning, training, profiles) runs here on real
ones, and who asks for a value is counted: as often in a long run as in a short one.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import leansd
from leansd.evaluation.inner_timing import time_run
from leansd.evaluation.runs import run_calls
from leansd.incubation.recipe import Recipe
from leansd.incubation.training_run import incubate
from leansd.plans import Plan
from leansd.tuning.scheduler_hook import tap
from loops import Reads
from tiny import shallow_unet, tiny_pipeline

ON_THE_PROCESSOR = {"watch._are_same", "noise.draw_noise"}
"""Equal copies count as the same where there is no device to wait for; noise is drawn there."""
SHORT, LONG = 6, 12


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline(unet=shallow_unet())


def count(run: Callable[[int], Any], steps: int) -> Counter[str]:
    with Reads() as reads:
        run(steps)
    return Counter({place: n for place, n in reads.places.items() if place not in ON_THE_PROCESSOR})


def make_plans(steps: int) -> dict[str, Plan]:
    keys = [0, 1, *range(3, steps, 3)]
    whole = Plan.between(keys, cut="head", steps=steps, how="forecast")
    return {
        "full": Plan.full(steps),
        "reuse": Plan.every(2, cut="up0.l0", steps=steps),
        "whole": whole.correct(dict.fromkeys(keys[2:], (0.4, 0.2))),
        "guidance": Plan.full(steps).guide("inherit", at=range(2, steps, 2)),
    }


@pytest.mark.parametrize("name", ["full", "reuse", "whole", "guidance"])
def test_a_longer_run_reads_no_more(pipe: Any, name: str) -> None:
    def run(steps: int) -> None:
        with leansd.inherit(pipe, make_plans(steps)[name]):
            pipe("a", num_inference_steps=steps, output_type="latent")

    few = count(run, SHORT)
    assert few == count(run, LONG)
    assert sum(few.values()) <= 4, few  # the time steps, the two halves, whether all are numbers


def test_what_a_tuning_sees_of_a_run_is_read_when_it_is_over(pipe: Any) -> None:
    def run(steps: int) -> None:
        with tap(pipe.scheduler):
            run_calls(pipe, ["a"], steps, make_plans(steps)["reuse"])

    assert count(run, SHORT) == count(run, LONG)


def test_a_profile_reads_nothing_at_a_step(pipe: Any) -> None:
    anatomy = leansd.dissect(pipe.unet)

    def run(steps: int) -> None:
        call = {"prompt": "a", "num_inference_steps": steps}
        time_run(pipe, make_plans(steps)["reuse"], call, anatomy=anatomy)

    assert count(run, SHORT) == count(run, LONG)


def test_a_step_of_training_waits_for_its_losses_and_its_norm(tmp_path: Path) -> None:
    recipe = {
        "name": "light",
        "data": {"kind": "random", "prompts": ["a", "b"]},
        "trainer": {"batch": 1},
        "stages": [
            {
                "name": "light",
                "surgery": {"name": "light", "edits": [{"drop": ["dn0.l1", "up0.l1"]}]},
                "train": "*",
                "losses": {"output": {}},
            }
        ],
    }

    def run(steps: int) -> None:
        recipe["stages"][0]["steps"] = steps  # type: ignore[index]
        given = Recipe.model_validate(recipe)
        incubate(
            given, tmp_path / str(steps), pipe=tiny_pipeline(unet=shallow_unet(layers_per_block=2))
        )

    few, many = count(run, 2), count(run, 5)
    assert many - few == {"trainer.take_step": 2 * 3}
