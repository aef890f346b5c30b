"""Settings of every test: no hub, one thread.

What runs no tests itself, as pytest-xdist's first process, imports nothing for them.
"""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
gc.disable()  # until all is imported: nothing of that is garbage


HOLDERS = (
    "bulk.jobs",
    "evaluation.bench",
    "exporting.exporter",
    "incubation.training_run",
    "ui.studio",
)
"""What imports, between them, all that a test puts a double in the place of. A module that is
imported first while a double is there would keep it."""


def pytest_collection_finish() -> None:
    import torch

    for name in HOLDERS:
        import_module(f"leansd.{name}")

    # Tiny models gain nothing from more, and suffer where other work shares the machine.
    torch.set_num_threads(1)
    # pytest listens to loggers that do not propagate, and so PyTorch's tracer, which writes to a
    # log of its own only if anybody listens, would write down all it does.
    trace = logging.getLogger("torch.__trace")
    trace.handlers.clear()
    trace.propagate = True
    # Modules stay to the end; to look through them for garbage again and again takes long.
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # seldom: pipelines are thousands of objects without a cycle
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # for libraries that count what is left at the very end


@pytest.fixture(autouse=True)
def _watches_end() -> Iterator[None]:
    """What a test watches, it watches alone."""
    yield
    if "watching" in sys.modules:
        sys.modules["watching"].forget_watches()


@pytest.fixture(scope="session", params=["sd", "sdxl"])
def any_unet(request: pytest.FixtureRequest) -> Any:
    """A random UNet of the SD 1.x and of the SDXL topology; tests leave it as they found it."""
    from tiny import tiny_unet, tiny_xl_unet

    return tiny_unet() if request.param == "sd" else tiny_xl_unet()
