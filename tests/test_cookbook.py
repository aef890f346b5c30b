"""Every snippet of the cookbook runs."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conformance.models import make_pipeline as build
from test_control import make_controlnet, make_pipeline
from tiny import WIDTH, tiny_pipeline, tiny_scheduler, tiny_unet, tiny_xl_unet

PAGE = Path(__file__).parent.parent / "docs" / "cookbook.md"
PLAIN: dict[str, Any] = {
    "down_block_types": ("DownBlock2D",) * 4,
    "up_block_types": ("UpBlock2D",) * 4,
    "layers_per_block": 1,
}
"""Four blocks, as the page's addresses have it, of few units: each takes seconds to compile."""
SNIPPETS = re.findall(r"## (.+?)\n(?:.*?)```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page assumes to be there."""
    monkeypatch.chdir(tmp_path)
    import leansd

    return {
        "leansd": leansd,
        "pipe": tiny_pipeline(),
        "photo": Image.new("RGB", (32, 32), "teal"),
        "edges": Image.new("RGB", (32, 32), "white"),
    }


@pytest.mark.parametrize(("title", "code"), SNIPPETS, ids=[title for title, _ in SNIPPETS])
def test_snippet_runs(title: str, code: str, names: dict[str, Any]) -> None:
    if "compile=" in code:
        names["pipe"] = tiny_pipeline(unet=tiny_unet(**PLAIN))
    if "xl_pipe" in code:
        unet = tiny_xl_unet(cross_attention_dim=2 * WIDTH)
        names["xl_pipe"] = build("StableDiffusionXLPipeline", unet, tiny_scheduler())
    if "control_pipe" in code:
        names["control_pipe"] = make_pipeline(make_controlnet())
    exec(compile(code, f"{PAGE.name}: {title}", "exec"), names)


def test_page_has_what_users_ask_for() -> None:
    titles = " ".join(title for title, _ in SNIPPETS)
    for topic in ("Text to image", "SDXL", "ControlNet", "Image to image", "LoRA", "threads"):
        assert topic in titles
