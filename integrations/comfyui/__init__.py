"""Lean Stable Diffusion for ComfyUI: plans that skip whole steps, tuned for your model and sampler.

Nothing here imports ComfyUI before ComfyUI asks for the nodes.
"""

from typing import Any


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the nodes."""
    from .nodes import LeanExtension

    return LeanExtension()
