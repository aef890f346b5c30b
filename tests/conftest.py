"""Settings of every test: no hub, one thread."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from tiny import tiny_unet, tiny_xl_unet

# Tiny models gain nothing from more, and suffer where other work shares the machine.
torch.set_num_threads(1)

# pytest listens to loggers that do not propagate, and so PyTorch's tracer, which writes to a log of
# its own only if anybody listens, would write down all it does.
trace = logging.getLogger("torch.__trace")
trace.handlers.clear()
trace.propagate = True


@pytest.fixture(scope="session", params=["sd", "sdxl"])
def any_unet(request: pytest.FixtureRequest) -> torch.nn.Module:
    """A random UNet of the SD 1.x and of the SDXL topology; tests leave it as they found it."""
    return tiny_unet() if request.param == "sd" else tiny_xl_unet()
