"""What a shell offers for the value of an option: names that are known without importing torch.

A shell that finds none of them fitting offers files, so a plan's or a model's path completes too.
"""

from collections.abc import Callable, Iterable

Completer = Callable[[str], Iterable[str]]

MODELS = ("emoji",)
SHAPES = ("sd15", "sd21-base", "sdxl")
"""Of `leansd.anatomy.builtin`, which needs torch."""
SAMPLERS = (
    "ddim",
    "ddpm",
    "pndm",
    "lms",
    "euler",
    "euler-a",
    "heun",
    "kdpm2",
    "dpm++2m",
    "dpm++2m-karras",
    "dpm++sde",
    "unipc",
    "deis",
    "flow-euler",
    "flow-heun",
    "flow-dpm++2m",
    "flow-unipc",
)
"""Of `leansd.runtime.samplers`, which needs diffusers."""
DEVICES = ("cpu", "cuda", "mps")
DTYPES = ("float32", "float16", "bfloat16")


def offer(*names: str) -> Completer:
    """A completer of fixed names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def complete_plan(incomplete: str) -> list[tuple[str, str]]:
    """Presets with what they do."""
    from leansd.plans.presets import PRESETS

    return [(p.name, p.summary) for p in PRESETS.values() if p.name.startswith(incomplete)]


def complete_surgery(incomplete: str) -> list[tuple[str, str]]:
    """Named surgeries with what they do."""
    from leansd.surgery.presets import PRESETS

    return [(name, p.summary) for name, p in PRESETS.items() if name.startswith(incomplete)]


complete_model = offer(*MODELS)
complete_shape = offer(*MODELS, *SHAPES)
complete_sampler = offer(*SAMPLERS)
complete_device = offer(*DEVICES)
complete_dtype = offer(*DTYPES)
