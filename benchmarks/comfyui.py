"""Plans tuned in ComfyUI's own samplers, and what they and their rivals give there.

    python benchmarks/comfyui.py tune --comfyui PATH       writes integrations/comfyui/presets.json
    python benchmarks/comfyui.py measure --comfyui PATH    writes results/comfyui.jsonl

With the embedded model in ComfyUI's UNet; dB are of pictures to the full run of the same seed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACK = ROOT / "integrations" / "comfyui"
RESULTS = ROOT / "benchmarks" / "results" / "comfyui.jsonl"
SAMPLERS = ("euler", "dpmpp_2m", "dpmpp_2m_sde", "euler_ancestral")
SCHEDULERS = ("normal", "karras")
STEPS = 20
CFG = 4.0
SPEEDS = {"quality": 1.5, "balanced": 2.0, "fast": 2.5}
SEEDS = 16
PICTURES = 4
SHIFT = 700
"""Seeds that are measured on lie so far from those that were tuned on."""
CACHES = {"EasyCache": "EasyCacheNode", "LazyCache": "LazyCacheNode"}
"""ComfyUI's own, by their nodes: each at the threshold that gives it as many calls as ours."""
MOST, HALVINGS = 1.5, 8
"""The highest threshold, and how often the range is halved in search of one."""


Make = Callable[[], Any]


class Bench:
    def __init__(self, path: Path) -> None:
        sys.path.insert(0, str(PACK))
        import check

        self.here = check.Checkout(path)
        from leansd.emoji.prompts import GRID_PROMPTS

        encode = self.here.clip.encode_from_tokens_scheduled
        self.prompts = [encode(self.here.clip.tokenize(each)) for each in GRID_PROMPTS]
        self.hosting = importlib.import_module("comfyui.hosting")

    def draw(self, model: Any, sampler: str, seed: int, sigmas: Any) -> Any:
        """One picture; what it is of goes by the seed."""
        request = self.here.ask(
            sampler, sigmas,
            positive=self.prompts[seed % len(self.prompts)], cfg=CFG,
            latent={"samples": self.here.torch.zeros(1, 4, 16, 16)},
        )  # fmt: skip
        return self.here.sampling.draw(model, request, seed)

    def tune(self, sampler: str, scheduler: str) -> dict[str, Any]:
        sigmas = self.here.lay_out(scheduler, STEPS)
        host = self.hosting.SamplerHost(
            self.here.model, self.here.samplers.sampler_object(sampler), sigmas, CFG,
            lambda model, seed, sigmas: self.draw(model, sampler, seed, sigmas),
            digest="", thin_out=self.here.sampling.thin_out,
            decode=lambda each: self.here.sampling.show_pictures(self.here.vae, each),
        )  # fmt: skip
        wish = self.hosting.TuneWish(seeds=SEEDS, tries=0)
        front = self.hosting.find_front(
            host, wish, tuple(SPEEDS.values()), None,
            lambda text, share: print(f"{sampler} {scheduler} {share:4.0%} {text}", flush=True),
        )  # fmt: skip
        plans = {
            name: self.hosting.find_fastest(front, speed).rename(name).to_dict()
            for name, speed in SPEEDS.items()
        }
        for plan in plans.values():
            plan.pop("tuned")  # the table says so, and it is for any weights
        told = [round(float(each), 5) for each in sigmas.tolist()]
        return {"sampler": sampler, "scheduler": scheduler, "sigmas": told, "plans": plans}

    # -- measuring ---------------------------------------------------------------------------

    def list_rivals(self, sampler: str, scheduler: str) -> Iterator[tuple[str, Make, Any]]:
        """(name, what makes the model, sigmas) of everything that is measured."""
        from leansd.plans.plan import Plan

        here, full = self.here, self.here.lay_out(scheduler, STEPS)
        for name in SPEEDS:
            yield name, partial(self.attach, name), full
        for steps in (7, 8, 9, 10, 11, 13, 14):
            yield f"{steps} steps", partial(self.attach, "full"), here.lay_out(scheduler, steps)
        for name in SPEEDS:
            # As in its own packs for ComfyUI: of the model's whole output.
            keys = find_spectrum(int(self.count(self.attach(name), sampler, full)))
            plan = Plan.between(keys, cut="head", steps=STEPS, how="chebyshev-line")
            yield f"Spectrum as {name}", partial(self.attach, plan), full
        for cache in CACHES:
            for name in SPEEDS:
                yield f"{cache} as {name}", partial(self.match, cache, name, sampler, full), full

    def attach(self, plan: Any) -> Any:
        """A model that follows a plan."""
        choice = self.here.choosing.PlanChoice(plan)
        return self.here.playing.PlanOnModel(choice).attach(self.here.model)

    def match(self, cache: str, plan: str, sampler: str, sigmas: Any) -> Any:
        """A model with one of the caches, of as many calls as a plan."""
        wanted = self.count(self.attach(plan), sampler, sigmas)
        return self.put_cache(cache, self.find_threshold(cache, sampler, sigmas, wanted))

    def put_cache(self, name: str, threshold: float) -> Any:
        """A model with one of ComfyUI's own caches, as its node sets it."""
        caches = importlib.import_module("comfy_extras.nodes_easycache")
        node = getattr(caches, CACHES[name])
        return node.execute(self.here.model, threshold, 0.15, 0.95, False).args[0]

    def find_threshold(self, cache: str, sampler: str, sigmas: Any, wanted: float) -> float:
        """The lowest threshold at which a cache makes no more calls than `wanted`, on one picture
        that is not measured on."""
        low, high = 0.0, MOST
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            made = self.count(self.put_cache(cache, middle), sampler, sigmas, apart=is_apart(cache))
            low, high = (middle, high) if made > wanted else (low, middle)
        return high

    def count(self, model: Any, sampler: str, sigmas: Any, *, apart: bool = False) -> float:
        """Model calls of one run."""
        return self.draw_counted(model, sampler, SHIFT - 1, sigmas, apart=apart)[1]

    def draw_counted(
        self, model: Any, sampler: str, seed: int, sigmas: Any, *, apart: bool
    ) -> tuple[Any, float]:
        """(latents, model calls) of one run; `apart` with its conditionings one by one."""
        calls = CallCounter(model)
        with self.here.with_little_memory(lambda _: apart):
            drawn = self.draw(calls.model, sampler, seed, sigmas)
        return drawn, calls.count / (1 + apart)

    def measure(self, sampler: str, scheduler: str, only: str = "") -> list[Any]:
        from leansd.evaluation.records import Record, stamp

        here, records = self.here, []
        sigmas, circumstances = here.lay_out(scheduler, STEPS), stamp()
        seeds = range(SHIFT, SHIFT + PICTURES)
        full = [self.draw(here.model, sampler, seed, sigmas) for seed in seeds]
        for name, make, own in self.list_rivals(sampler, scheduler):
            if only and only not in name:
                continue
            model = make()
            counted, values = [], []
            for seed, picture in zip(seeds, full, strict=True):
                drawn, made = self.draw_counted(model, sampler, seed, own, apart=is_apart(name))
                values.append(here.measure(drawn, picture))
                counted.append(made)
            for metric, numbers, unit in (("psnr", values, "dB"), ("model_calls", counted, "")):
                records.append(
                    Record(
                        **circumstances, subject="emoji in ComfyUI", plan=name, metric=metric,
                        value=sum(numbers) / len(numbers), unit=unit, sampler=sampler,
                        scheduler=scheduler, steps=STEPS, guidance=CFG, pictures=PICTURES,
                        low=min(numbers),
                    )
                )  # fmt: skip
            print(f"{sampler} {scheduler} {name}: {records[-1].value:g} calls, "
                  f"{records[-2].value:.1f} dB", flush=True)  # fmt: skip
        return records


def find_spectrum(calls: int) -> tuple[int, ...]:
    """Key steps by Spectrum's rule that are so many, its knobs as near to its own as can be."""
    from leansd.plans.presets import preset

    knobs = itertools.product((5, 4, 3, 2), (2, 3, 1, 4), (0.75, 0.25, 0, 1.5, 3))
    for warm_up, window, growth in knobs:
        plan = preset("spectrum", STEPS, warm_up=warm_up, window=window, growth=growth)
        if len(plan.keys) == calls:
            return plan.keys
    raise ValueError(f"Spectrum has no {calls} calls in {STEPS} steps")


def is_apart(name: str) -> bool:
    """Whether conditionings come apart: EasyCache of 0.3.64 mixes up those of one batch, and so it
    is done justice."""
    return name.startswith("EasyCache")


class CallCounter:
    """A model whose calls are counted where they run: inside of every wrapper."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        self.model = model.clone()
        self.model.add_wrapper_with_key("diffusion_model", "count", self._run)

    def _run(self, executor: Any, *args: Any, **options: Any) -> Any:
        self.count += 1
        return executor(*args, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("tune", "measure"))
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--samplers", nargs="*", default=SAMPLERS)
    parser.add_argument("--schedulers", nargs="*", default=SCHEDULERS)
    parser.add_argument("--only", default="", help="measure what has this in its name")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of records")
    options = parser.parse_args()
    bench = Bench(options.comfyui.resolve())
    from leansd.evaluation.records import put_records

    with bench.here.torch.inference_mode():
        for sampler in options.samplers:
            for scheduler in options.schedulers:
                if options.what == "measure":
                    place = lambda each: (each.sampler, each.scheduler, each.plan, each.metric)  # noqa: E731
                    put_records(options.out, bench.measure(sampler, scheduler, options.only), place)
                else:
                    put_row(bench.tune(sampler, scheduler))


def put_row(row: dict[str, Any]) -> None:
    path = PACK / "presets.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    key = lambda each: (each["sampler"], each["scheduler"], len(each["sigmas"]))  # noqa: E731
    rows = sorted([*(each for each in rows if key(each) != key(row)), row], key=key)
    lines = ",\n".join(json.dumps(each) for each in rows)
    path.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
