"""A node for InvokeAI: Denoise by a Lean Plan, which is its own Denoise with one field more."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from invokeai.app.invocations.denoise_latents import (  # pyright: ignore[reportMissingImports]
    DenoiseLatentsInvocation,
)
from invokeai.backend.stable_diffusion.extension_callback_type import (  # pyright: ignore
    ExtensionCallbackType,
)
from invokeai.backend.stable_diffusion.extensions.base import (  # pyright: ignore
    ExtensionBase,
    callback,
)
from invokeai.invocation_api import InputField, invocation  # pyright: ignore

from .following import DenoisingRun, follow_pipeline


class LeanPlanExt(ExtensionBase):
    """An extension of the modular denoising: attached while a UNet is patched."""

    def __init__(self, plan: str) -> None:
        super().__init__()
        self.run = DenoisingRun(plan)

    @callback(ExtensionCallbackType.SETUP)
    def begin(self, ctx: Any) -> None:
        self.run.begin(ctx)

    @contextmanager
    def patch_unet(self, unet: Any, original_weights: Any) -> Iterator[None]:
        with self.run.follow(unet):
            yield


@invocation(
    "lean_denoise_latents",
    title="Denoise by a Lean Plan - SD1.5, SDXL",
    tags=["latents", "denoise", "txt2img", "img2img", "plan", "faster"],
    category="latents",
    version="1.0.0",
)
class LeanDenoiseInvocation(DenoiseLatentsInvocation):
    """Denoises by a plan: some UNet calls are made from those before."""

    plan: str = InputField(
        default="balanced",
        description="quality, balanced, fast or turbo, or the path of a plan file",
    )

    def create_pipeline(self, unet: Any, scheduler: Any) -> Any:
        """The pipeline of the usual denoising."""
        pipe = super().create_pipeline(unet, scheduler)
        follow_pipeline(pipe, self.plan, self.steps)
        return pipe

    def parse_controlnet_field(self, exit_stack: Any, context: Any, control: Any, ext: Any) -> None:
        """The modular denoising takes its extensions here."""
        super().parse_controlnet_field(exit_stack, context, control, ext)
        ext.add_extension(LeanPlanExt(self.plan))
