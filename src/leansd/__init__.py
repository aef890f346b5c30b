"""leansd: lean Stable Diffusion. The same pictures from the same UNet in less time.

import leansd
with leansd.inherit(pipe, "balanced") as run:
    image = pipe("a red apple").images[0]
print(run.report())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from leansd.errors import LeansdError
from leansd.version import __version__

if TYPE_CHECKING:
    from leansd.anatomy import count_macs, dissect
    from leansd.evaluation.cost import CostModel
    from leansd.evaluation.evaluation import evaluate
    from leansd.evaluation.profile import profile
    from leansd.evaluation.scoring import score
    from leansd.exporting import export, load_onnx
    from leansd.loading import load, load_unet
    from leansd.plans import Anatomy, Plan, preset
    from leansd.runtime import Report, inherit, inherit_, release_
    from leansd.surgery.apply import operate
    from leansd.surgery.edits import Surgery
    from leansd.surgery.light_unet import LightUNet2DConditionModel
    from leansd.surgery.lineage import Lineage
    from leansd.surgery.preview import preview
    from leansd.tuning import Cut, Front, cut, tune

# Where each public name lives; it is imported when it is first asked for, so that
# `import leansd` costs nothing and plans never pull in torch.
_HOMES = {
    "Cut": "leansd.tuning",
    "Front": "leansd.tuning",
    "Anatomy": "leansd.plans",
    "CostModel": "leansd.evaluation.cost",
    "LightUNet2DConditionModel": "leansd.surgery.light_unet",
    "Lineage": "leansd.surgery.lineage",
    "Plan": "leansd.plans",
    "Report": "leansd.runtime",
    "Surgery": "leansd.surgery.edits",
    "count_macs": "leansd.anatomy",
    "cut": "leansd.tuning",
    "dissect": "leansd.anatomy",
    "evaluate": "leansd.evaluation.evaluation",
    "export": "leansd.exporting",
    "inherit": "leansd.runtime",
    "inherit_": "leansd.runtime",
    "load": "leansd.loading",
    "load_onnx": "leansd.exporting",
    "load_unet": "leansd.loading",
    "operate": "leansd.surgery.apply",
    "preset": "leansd.plans",
    "preview": "leansd.surgery.preview",
    "profile": "leansd.evaluation.profile",
    "release_": "leansd.runtime",
    "score": "leansd.evaluation.scoring",
    "tune": "leansd.tuning",
}

__all__ = [
    "Anatomy",
    "CostModel",
    "Cut",
    "Front",
    "LeansdError",
    "LightUNet2DConditionModel",
    "Lineage",
    "Plan",
    "Report",
    "Surgery",
    "__version__",
    "count_macs",
    "cut",
    "dissect",
    "evaluate",
    "export",
    "inherit",
    "inherit_",
    "load",
    "load_onnx",
    "load_unet",
    "operate",
    "preset",
    "preview",
    "profile",
    "release_",
    "score",
    "tune",
]


# diffusers asks the module of a saved pipeline's part, which for a `LightUNet2DConditionModel` is
# this one, for the base class that says how to open it.
_BASES = {"ModelMixin": "diffusers"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name) or _BASES.get(name)
    if home is None:
        raise AttributeError(f"module 'leansd' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
