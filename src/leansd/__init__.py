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
    from leansd.exporting import export, load_onnx
    from leansd.loading import load
    from leansd.measuring.cost import CostModel
    from leansd.measuring.evaluation import evaluate
    from leansd.measuring.profile import profile
    from leansd.plans import Anatomy, Plan, preset
    from leansd.runtime import Report, inherit, inherit_, release_
    from leansd.tuning import Front, tune

# Where each public name lives; it is imported when it is first asked for, so that
# `import leansd` costs nothing and plans never pull in torch.
_HOMES = {
    "Front": "leansd.tuning",
    "Anatomy": "leansd.plans",
    "CostModel": "leansd.measuring.cost",
    "Plan": "leansd.plans",
    "Report": "leansd.runtime",
    "count_macs": "leansd.anatomy",
    "dissect": "leansd.anatomy",
    "evaluate": "leansd.measuring.evaluation",
    "export": "leansd.exporting",
    "inherit": "leansd.runtime",
    "inherit_": "leansd.runtime",
    "load": "leansd.loading",
    "load_onnx": "leansd.exporting",
    "preset": "leansd.plans",
    "profile": "leansd.measuring.profile",
    "release_": "leansd.runtime",
    "tune": "leansd.tuning",
}

__all__ = [
    "Anatomy",
    "CostModel",
    "Front",
    "LeansdError",
    "Plan",
    "Report",
    "__version__",
    "count_macs",
    "dissect",
    "evaluate",
    "export",
    "inherit",
    "inherit_",
    "load",
    "load_onnx",
    "preset",
    "profile",
    "release_",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'leansd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
