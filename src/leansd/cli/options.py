"""Options that several commands share: one declaration each, so that they read alike everywhere."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.completions import complete_device, complete_model, complete_sampler
from leansd.cli.silence import keep_silent

_MODELS = "emoji (embedded), a model folder, a .safetensors file or a hub id."
_SAMPLERS = "ddim, dpm++2m, euler, heun, unipc ...; the model's own by default."

ModelArgument = Annotated[str, typer.Argument(help=_MODELS, autocompletion=complete_model)]
ModelOption = Annotated[str, typer.Option(help=_MODELS, autocompletion=complete_model)]
Sampler = Annotated[str | None, typer.Option(help=_SAMPLERS, autocompletion=complete_sampler)]
Guidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale; 4 for emoji, the pipeline's own for other models."),
]
OwnGuidance = Annotated[
    float | None, typer.Option(help="Guidance scale; the pipeline's own by default.")
]
Nets = Annotated[
    list[str] | None,
    typer.Option(
        "--net", metavar="NAME=FOLDER", help="A UNet that the plan switches to; repeat it."
    ),
]
PromptFile = Annotated[
    Path | None, typer.Option(help="Text file, a prompt a line; some are built in.")
]
Count = Annotated[int, typer.Option(min=2, help="Pictures; prompts are taken in turns.")]
Seed = Annotated[int, typer.Option(min=0, help="Picture i has seed SEED + i.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")]
Size = Annotated[
    str | None, typer.Option(help="512, or width first 768x512; the model's own by default.")
]
Fit = Annotated[
    bool, typer.Option("--fit", help="Stretch a plan file to --steps if it is for others.")
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Follow a preset also where few steps gain nothing, and a plan file also where it "
        "was not tuned for.",
    ),
]
ConvergedSteps = Annotated[
    int, typer.Option(min=2, help="Steps of the converged run, same sampler.")
]
SeedsForSpread = Annotated[
    int, typer.Option(min=0, help="Further sets of the full run, to tell chance from effect.")
]
Clip = Annotated[Path | None, typer.Option(help="Folder of a CLIP for the quality of sets.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, mps; the GPU where there is one by default.",
        autocompletion=complete_device,
    ),
]
TimingDevice = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda; the GPU where there is one by default.", autocompletion=complete_device
    ),
]
ReportFile = Annotated[
    Path | None, typer.Option("--report", help="Write an HTML page, its figures beside it.")
]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
OnlyJson = Annotated[
    bool, typer.Option("--json", help="Only the JSON line on standard output, no table.")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=keep_silent,
        expose_value=False,
        help="No progress, no notes: only results, warnings and errors.",
    ),
]
"""Every command takes it; it says so to `silence`, and the command itself need not look."""
