"""The nodes, in ComfyUI's own terms."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io, ui

from leansd.errors import LeansdError
from leansd.plans.plan import Plan
from leansd.plans.presets import PRESETS, SPEED_PRESETS

from .choosing import Mismatch, PlanChoice, name_sampler, set_options
from .hosting import SamplerHost, TuneWish, show_latents, tune_sampler
from .library import (
    AUTO,
    TUNED,
    PlanLibrary,
    Purpose,
    digest_checkpoint,
    digest_values,
    list_choices,
)
from .playing import KEY, PlanOnModel, RunReport
from .sampling import (
    Request,
    draw,
    draw_front,
    measure_psnr,
    measure_ssim,
    open_progress,
    show_pictures,
    take_one,
    thin_out,
)

CATEGORY = "model_patches/lean"
PlanType = io.Custom("LEAN_PLAN")
MISMATCHES: tuple[Mismatch, ...] = ("stretch", "compute in full")
OFFERED = ("full", *SPEED_PRESETS)


def open_library() -> PlanLibrary:
    """The user's plans: `leansd` in ComfyUI's folder of the default user."""
    return PlanLibrary(Path(folder_paths.get_user_directory()) / "default" / "leansd")


def find_report(model: Any) -> RunReport:
    """What the last run of a model did.

    Raises:
        LeansdError: no plan is on it, or nothing was drawn with it.
    """
    lean = model.get_attachment(KEY)
    if not isinstance(lean, PlanOnModel):
        raise LeansdError("there is no plan on this model: put Lean Plan before the sampler")
    if lean.last is None:
        raise LeansdError("nothing was drawn with this model yet: connect the sampler's latents")
    return lean.last


def give(node: Any, *outputs: Any, text: str) -> io.NodeOutput:
    """A node's outputs, and a text on it: of other packs' nodes ComfyUI's page shows none."""
    # Not imported: where there is no page, as in scripts, the server's modules are not at hand.
    page = getattr(sys.modules.get("server"), "PromptServer", None)
    server = getattr(page, "instance", None)
    if server is not None and node.hidden is not None:
        server.send_progress_text(text, node.hidden.unique_id)
    return io.NodeOutput(*outputs, ui=ui.PreviewText(text))


def list_sampling_inputs() -> list[Any]:
    """What Lean Compare and Lean Tune are given, as the node SamplerCustom is."""
    return [
        io.Model.Input("model"),
        io.Conditioning.Input("positive"),
        io.Conditioning.Input("negative"),
        io.Sampler.Input("sampler"),
        io.Sigmas.Input("sigmas"),
        io.Latent.Input("latent_image"),
        io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1),
    ]


class LeanPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LeanPlan",
            display_name="Lean Plan",
            category=CATEGORY,
            description="Faster sampling: at some steps the model's output is forecast instead of "
            "computed, by a plan that was tuned. One node between checkpoint and sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model, with LoRAs and other patches on it."),
                io.Combo.Input(
                    "plan", options=list_choices(open_library(), OFFERED), default="balanced",
                    tooltip="quality about 1.5x, balanced 2x, fast 2.5x, turbo 3x; auto: what Lean "
                    "Tune found for this model, sampler, sigmas and cfg; or a file of yours.",
                ),
                io.Combo.Input(
                    "other_steps", options=list(MISMATCHES), default="stretch",
                    tooltip="What to do where the plan was made for another number of steps.",
                ),
                PlanType.Input("plan_input", optional=True, tooltip="A plan from another node."),
            ],
            outputs=[io.Model.Output(tooltip="The model, whose runs follow the plan.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, plan: str, other_steps: Mismatch, plan_input: Plan | None = None
    ) -> io.NodeOutput:
        library = open_library()
        source: str | Plan = plan_input or plan
        if isinstance(source, str) and source not in (AUTO, *OFFERED):
            source = Plan.load(library.find_path(source))
        digest = digest_checkpoint(model) if source == AUTO else ""
        choice = PlanChoice(source, other_steps, digest, library)
        return io.NodeOutput(PlanOnModel(choice).attach(model))


class LeanDeepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LeanDeepCache",
            display_name="Lean DeepCache",
            category=CATEGORY,
            description="DeepCache's schedule: between full steps only the model's outer blocks "
            "run. For UNets (SD 1.x, SDXL); Lean Plan's own plans are nearer at the same speed.",
            inputs=[
                io.Model.Input("model", tooltip="The model, with LoRAs and other patches on it."),
                io.Int.Input(
                    "interval", default=3, min=1, max=50,
                    tooltip="Every so many steps the whole model runs.",
                ),
                io.Int.Input(
                    "branch", default=0, min=0, max=11,
                    tooltip="How many more layers, from the outside in, run at every step.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, whose runs follow the schedule.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, interval: int, branch: int) -> io.NodeOutput:
        chosen = set_options(PRESETS["deepcache"], interval=interval, branch=branch)
        return io.NodeOutput(PlanOnModel(PlanChoice(chosen)).attach(model))


class LoadLeanPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = open_library().list_files()
        return io.Schema(
            node_id="LoadLeanPlan",
            display_name="Load Lean Plan",
            category=CATEGORY,
            description="A plan from your folder of plans, user/default/leansd in ComfyUI.",
            inputs=[io.Combo.Input("file", options=files, tooltip="A plan file.")],
            outputs=[PlanType.Output(display_name="plan"), io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        plan = Plan.load(open_library().find_path(file))
        return io.NodeOutput(plan, str(plan))

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        path = open_library().find_path(file)
        return f"{path} {path.stat().st_mtime_ns if path.exists() else 0}"


class SaveLeanPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveLeanPlan",
            display_name="Save Lean Plan",
            category=CATEGORY,
            description="Keeps a plan in your folder of plans; it is a small text to share.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                PlanType.Input("plan"),
                io.String.Input("name", default="my-plan", tooltip="Of the file."),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, plan: Plan, name: str) -> io.NodeOutput:
        path = open_library().save(name, plan.rename(name))
        return give(cls, text=f"saved {path}\n{plan}")


class LeanReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LeanReport",
            display_name="Lean Report",
            category=CATEGORY,
            description="What a run did: calls computed and forecast, speed-up expected and "
            "measured, and what the plan could not follow and why.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,
            inputs=[
                io.Model.Input("model", tooltip="From Lean Plan."),
                io.Latent.Input("latent", tooltip="From the sampler, so that it comes first."),
            ],
            outputs=[io.Latent.Output(), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, model: Any, latent: Any) -> io.NodeOutput:
        text = str(find_report(model))
        return give(cls, latent, text, text=text)


class LeanCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LeanCompare",
            display_name="Lean Compare",
            category=CATEGORY,
            description="The same seed three times: in full, by the plan, and with as many steps "
            "as the plan's time has room for. Says how near either is to the full run.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *list_sampling_inputs(),
                io.Vae.Input("vae"),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True),
            ],
            outputs=[
                io.Image.Output(display_name="full, plan, few steps"),
                io.Image.Output(display_name="before and after"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, sampler: Any, sigmas: torch.Tensor,
        latent_image: Any, cfg: float, vae: Any, seed: int,
    ) -> io.NodeOutput:  # fmt: skip
        request = Request(positive, negative, sampler, sigmas, cfg, latent_image)
        plain = PlanOnModel(PlanChoice("full")).attach(model)
        full = vae.decode(draw(plain, request, seed))
        whole = find_report(plain)
        lean = vae.decode(draw(model, request, seed))
        report = find_report(model)
        steps = max(round((len(sigmas) - 1) / report.gain), 1)
        few = vae.decode(draw(plain, request, seed, thin_out(sigmas, steps)))
        lines = [
            str(report),
            f"against the full run ({whole.seconds:.2f} s):",
            *(
                f"{name}: {measure_psnr(each, full):.1f} dB, SSIM {measure_ssim(each, full):.4f}, "
                f"{seconds:.2f} s"
                for name, each, seconds in (
                    ("this plan", lean, report.seconds),
                    (f"plain {steps} steps", few, find_report(plain).seconds),
                )
            ),
        ]
        beside = torch.cat([full, lean, few], dim=2)
        text = "\n".join(lines)
        return give(cls, torch.cat([full, lean, few]), beside, text, text=text)


class LeanTune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LeanTune",
            display_name="Lean Tune",
            category=CATEGORY,
            description="Finds a plan for this model, sampler, sigmas and cfg, by running it: full "
            "runs first, then plans fitted to them. It takes as long as 30 to 80 pictures, can be "
            "stopped and goes on where it was. Lean Plan set to auto finds the plan again.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *list_sampling_inputs(),
                io.Float.Input(
                    "speed", default=2.0, min=1.1, max=6.0, step=0.1,
                    tooltip="How many times faster sampling is to be.",
                ),
                io.Float.Input(
                    "least_db", default=0.0, min=0.0, max=80.0, step=0.5,
                    tooltip="Above 0: the fastest plan that stays as near to the full run, in dB.",
                ),
                io.Int.Input(
                    "seeds", default=6, min=4, max=64,
                    tooltip="Runs that plans are fitted to, two thirds, and judged on, one third.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**31, tooltip="The first of them."),
                io.Int.Input(
                    "tries", default=4, min=0, max=32,
                    tooltip="Other places of computed steps to try; more is slower and better.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="With it dB are of pictures."),
            ],
            outputs=[
                PlanType.Output(display_name="plan"),
                io.Image.Output(display_name="front"),
                io.String.Output(display_name="report"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, sampler: Any, sigmas: torch.Tensor,
        latent_image: Any, cfg: float, speed: float, least_db: float, seeds: int, seed: int,
        tries: int, vae: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        library, digest = open_library(), digest_checkpoint(model)
        request = Request(positive, negative, sampler, sigmas, cfg, take_one(latent_image))
        host = SamplerHost(
            model, sampler, sigmas, cfg,
            lambda tapped, own, laid_out: draw(tapped, request, own, laid_out),
            digest=digest, thin_out=thin_out,
            request=digest_values([positive, negative, request.latent, model.patches]),
            decode=show_latents if vae is None else lambda each: show_pictures(vae, each),
        )  # fmt: skip
        name = name_sampler(sampler)
        purpose = Purpose(digest, name, tuple(float(each) for each in sigmas.tolist()), cfg)
        journal = (library.folder / TUNED / purpose.file_name).with_suffix(".jsonl")
        wish = TuneWish(speed, least_db, seeds, tries, seed)
        plan, front = tune_sampler(host, wish, journal, open_progress())
        path = library.save_tuned(purpose, plan)
        text = f"{front.tabulate()}\nsaved for auto: {path.name}\n{plan}"
        return give(cls, plan, draw_front(front), text, text=text)


class LeanEmbeddedModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LeanEmbeddedModel",
            display_name="Lean Embedded Model",
            category=f"{CATEGORY}/demo",
            description="A tiny Stable Diffusion that draws emoji, from the leansd "
            "package, to try the nodes without a download. Give it an empty latent image of 128 x "
            "128 and a prompt such as: a red apple, noto style.",
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from .embedded import EmbeddedDecoder, EmbeddedText, load_model

        return io.NodeOutput(load_model(), EmbeddedText(), EmbeddedDecoder())


class LeanExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LeanPlan, LeanDeepCache, LeanTune, LoadLeanPlan, SaveLeanPlan, LeanReport, LeanCompare,
            LeanEmbeddedModel,
        ]  # fmt: skip
