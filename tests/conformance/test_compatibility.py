"""The page that says what works with what agrees with what does."""

import diffusers
import pytest
from diffusers import UNet2DConditionModel

from conformance.compatibility import (
    EQUAL,
    KINDS,
    OTHER_BLOCKS,
    PAGE,
    is_readable,
    list_pipelines,
    read_page,
    try_pipeline,
    write_page,
)

QUICK = ("StableDiffusionPipeline", "StableDiffusionPAGPipeline", "StableDiffusionXLPipeline")
"""One of every kind of batch; the others are slow together."""
TOLD = read_page(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in KINDS]
)
def test_a_pipeline_does_what_the_page_says(name: str) -> None:
    assert try_pipeline(KINDS[name]) == TOLD[name]


def test_the_page_is_made_of_the_tables() -> None:
    assert PAGE.read_text(encoding="utf-8") == write_page(TOLD), "run make compatibility"
    assert TOLD.keys() == KINDS.keys()
    assert all(row["full plan"] == EQUAL for row in TOLD.values())


def test_what_is_refused_is_no_unet_of_this_kind() -> None:
    every = list_pipelines()
    assert KINDS.keys() <= every.keys()
    assert OTHER_BLOCKS.keys() < every.keys()
    for name, unet in every.items():
        if not is_readable(name, unet) and name not in OTHER_BLOCKS:
            kinds = [getattr(diffusers, each, None) for each in unet.split(" | ")]
            assert any(kind is None or not issubclass(kind, UNet2DConditionModel) for kind in kinds)
