"""Options that several commands share, one declaration each, and what a shell offers for them.

Those that travel together are one: a command takes a dataclass of options as one parameter (see
`leansd.cli.command`), and the dataclass does with them what every command would.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leansd.cli.command import option
from leansd.cli.terminal import hush_libraries, note, warn
from leansd.emoji.location import EMBEDDED
from leansd.errors import LeansdError
from leansd.evaluation.prompt_sets import find_guidance, read_prompts
from leansd.files import find_free
from leansd.plans.anatomy import WHOLE
from leansd.plans.plan import Plan
from leansd.plans.presets import PRESETS
from leansd.plans.resolve import PlanContext, Resolved, resolve_plan

if TYPE_CHECKING:
    import torch


# -- what a shell offers ---------------------------------------------------------------------------
# What a shell offers for the value of an option: names that are known without importing torch.
#
# A shell that finds none of them fitting offers files, so a plan's or a model's path completes too.

Completer = Callable[[str], Iterable[str]]

MODELS = ("emoji",)
SHAPES = ("sd15", "sd21-base", "sdxl")
"""Names of `leansd.anatomy.builtin`, repeated since that needs torch."""
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
"""Names of `leansd.runtime.samplers`, repeated since that needs diffusers."""
DEVICES = ("cpu", "cuda", "mps")
DTYPES = ("float32", "float16", "bfloat16")


def offer(*names: str) -> Completer:
    """A completer of fixed names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def complete_plan(incomplete: str) -> list[tuple[str, str]]:
    """Presets with what they do."""
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


# -- options ---------------------------------------------------------------------------------------

_MODELS = "emoji (embedded), a model folder, a .safetensors file or a hub id."


ModelArgument = Annotated[str, typer.Argument(help=_MODELS, autocompletion=complete_model)]
ModelOption = Annotated[str, typer.Option(help=_MODELS, autocompletion=complete_model)]
GuidanceOption = Annotated[
    float | None,
    typer.Option(help="Guidance scale; 4 for emoji, the pipeline's own for other models."),
]
OwnGuidance = Annotated[
    float | None, typer.Option(help="Guidance scale; the model's own by default.")
]
SizeOption = Annotated[
    str | None, typer.Option(help="512, or width first 768x512; the model's own by default.")
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, mps; the GPU where there is one by default.",
        autocompletion=complete_device,
    ),
]
SamplerOption = Annotated[
    str | None,
    typer.Option(
        help="ddim, dpm++2m, euler, heun, unipc ...; the model's own by default.",
        autocompletion=complete_sampler,
    ),
]
Fit = Annotated[
    bool, typer.Option("--fit", help="Stretch a plan file to --steps if it is for others.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Follow presets also where few steps gain nothing.")
]
ConvergedSteps = Annotated[
    int, typer.Option(min=2, help="Steps of the converged run, same sampler.")
]
SeedsForSpread = Annotated[
    int, typer.Option(min=0, help="Further sets of the full run, to tell chance from effect.")
]
Clip = Annotated[Path | None, typer.Option(help="Folder of a CLIP for the quality of sets.")]
ReportFile = Annotated[
    Path | None, typer.Option("--report", help="Write an HTML page, its figures beside it.")
]
NetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--net", metavar="NAME=FOLDER", help="A UNet that the plan switches to; repeat it."
    ),
]


@dataclass(frozen=True)
class DeviceOptions:
    """Where a model runs, and in what precision."""

    device: Device = None
    dtype: str | None = option(
        None,
        "float32, float16 or bfloat16; float16 on a GPU and float32 elsewhere by default.",
        autocompletion=complete_dtype,
    )

    def check(self) -> None:
        """Refuses what is not there, before a weight is read."""
        hush_libraries()
        where = self.find_device()
        if self.dtype is not None and self.dtype not in DTYPES:
            raise LeansdError(f"no dtype {self.dtype!r}: give {', '.join(DTYPES)}")
        if where.type == "cpu" and self.dtype not in (None, "float32"):
            note(f"{self.dtype} on a CPU saves memory, not time: float32 is the faster there")

    def find_device(self) -> "torch.device":
        """The device that is meant, if it is there."""
        from leansd.loading import find_device

        return find_device(self.device)

    @property
    def precision(self) -> "torch.dtype | None":
        """None for what suits the device."""
        import torch

        return getattr(torch, self.dtype) if self.dtype is not None else None


@dataclass(frozen=True)
class Opening(DeviceOptions):
    """How a pipeline is opened."""

    sampler: SamplerOption = None

    def check_model(self, model: str) -> None:
        """Refuses a model, device or sampler that is not there, before a weight is read."""
        from leansd.loading import locate
        from leansd.runtime.samplers import check_sampler

        if self.sampler is not None:
            check_sampler(self.sampler)
        self.check()
        locate(model)

    def open(self, model: str) -> Any:
        """The pipeline with its sampler, and without bars of its own."""
        from leansd.loading import load

        return self._set_up(load(model, device=self.device, dtype=self.precision))

    def open_with_unet(self, model: str) -> Any:
        """An open pipeline with a UNet: a transformer as the denoiser is refused."""
        from leansd.loading import load_with_unet

        return self._set_up(load_with_unet(model, device=self.device, dtype=self.precision))

    def _set_up(self, pipe: Any) -> Any:
        from leansd.runtime.samplers import set_sampler

        if self.sampler is not None:
            set_sampler(pipe, self.sampler)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@dataclass(frozen=True)
class Fitting:
    """How a plan is fitted to the runs that follow it."""

    fit: Fit = False
    force: bool = option(
        False,
        "Follow a preset also where few steps gain nothing, and a plan file also "
        "where it was not tuned for.",
        "--force",
    )

    @property
    def nets(self) -> dict[str, str]:
        """Folders of UNets by the names that plans call them by."""
        return {}

    def outline(
        self,
        plan: Plan | str,
        model: str,
        *,
        steps: int | None = None,
        sampler: str | None = None,
    ) -> tuple[Resolved, PlanContext]:
        """The plan that is meant for runs of a model, as far as is known without its weights.

        Raises:
            LeansdError: there is none, it does not suit the model, or it was tuned for another
                sampler and `--force` is not given.
        """
        from leansd.loading import has_transformer
        from leansd.unets import open_anatomy, outline_runs

        anatomy = WHOLE if has_transformer(model) else open_anatomy(model)
        nets = {name: open_anatomy(folder) for name, folder in self.nets.items()}
        context = outline_runs(model, anatomy, steps, sampler=sampler, nets=nets)
        return self._resolve(plan, context), context

    def settle(
        self,
        plan: Plan | str,
        pipe: Any,
        context: PlanContext,
        guidance: float,
        strength: float = 1.0,
    ) -> Plan:
        """The plan for the runs of an open pipeline, with what must be said of it told.

        Raises:
            LeansdError: it was tuned for another UNet and `--force` is not given.
        """
        from leansd.runtime.context import describe_runs

        known = describe_runs(pipe, replace(context, guidance=guidance, strength=strength))
        return tell_notes(self._resolve(plan, known))

    def _resolve(self, plan: Plan | str, context: PlanContext) -> Resolved:
        resolved = resolve_plan(plan, context, fit=self.fit, force=self.force)
        if not self.force:
            resolved.require_tuned()
        return resolved


@dataclass(frozen=True)
class Following(Fitting):
    """How a plan is fitted to its runs, where it may switch to other UNets."""

    net: NetsOption = None

    @property
    def nets(self) -> dict[str, str]:
        """Folders of UNets by the names that plans call them by."""
        return read_pairs("--net", self.net or (), "FOLDER, light=runs/asdm/net")


def tell_notes(resolved: Resolved) -> Plan:
    """Warns of what must be said of a plan, and gives the plan."""
    for each in resolved.notes:
        warn(each)
        warnings.filterwarnings("ignore", re.escape(each))  # its runs would say it again
    return resolved.plan


def read_pairs(typed: str, given: Sequence[str], form: str) -> dict[str, str]:
    """What `--net NAME=FOLDER` and its like say, by name.

    Raises:
        LeansdError: one is not of this form, or a name comes twice.
    """
    nets: dict[str, str] = {}
    for each in given:
        name, sign, path = each.partition("=")
        if not (name and sign and path):
            raise LeansdError(f"{typed} {each} names nothing; give NAME={form}")
        if name in nets:
            raise LeansdError(f"{typed} {each}: {name} is given twice")
        nets[name] = path
    return nets


@dataclass(frozen=True)
class Calls:
    """A set of pictures: what they are of, and how they are drawn."""

    prompts: Path | None = option(None, "Text file, a prompt a line; some are built in.")
    count: int | None = option(None, "Pictures; prompts are taken in turns.", min=1)
    guidance: GuidanceOption = None
    seed: int = option(0, "Picture i has seed SEED + i.", min=0)
    batch: int = option(8, "Pictures drawn at once.", min=1)

    def list_prompts(self, model: str, own: Sequence[str]) -> list[str]:
        """So many prompts, those of the file or the embedded model's, in turns.

        Raises:
            LeansdError: there are none for this model.
        """
        if self.prompts is None and model != EMBEDDED and not own:
            raise LeansdError(f"no prompts for {model}: give --prompts FILE, one prompt a line")
        texts = list(own) if self.prompts is None else read_prompts(self.prompts)
        count = self.count or len(texts)
        return [texts[place % len(texts)] for place in range(count)]

    def find_guidance(self, pipe: Any, model: str) -> float:
        """The guidance scale of the calls."""
        return find_guidance(pipe, model, self.guidance)


def keep_default(path: Path, default: Path) -> Path:
    """The path; where it is only the default and something lies there, the next free name."""
    return find_free(path) if path == default else path


def open_nets(pipe: Any, folders: Mapping[str, str]) -> dict[str, Any]:
    """The UNets in folders, opened beside a pipeline's own."""
    from leansd.loading import load_unet

    return {name: load_unet(folder, beside=pipe.unet) for name, folder in folders.items()}
