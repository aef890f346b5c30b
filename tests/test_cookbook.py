"""Every snippet of the cookbook runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from test_control import make_pipeline, tiny_controlnet
from tiny import WIDTH, tiny_pipeline, tiny_tokenizer, tiny_xl_unet

PAGE = Path(__file__).parent.parent / "docs" / "cookbook.md"
SNIPPETS = re.findall(r"## (.+?)\n(?:.*?)```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def tiny_xl_pipeline() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=100, hidden_size=WIDTH // 2, intermediate_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=WIDTH,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    parts = tiny_pipeline().components
    pipe = StableDiffusionXLPipeline(
        vae=parts["vae"],
        text_encoder=CLIPTextModel(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_xl_unet(),
        scheduler=parts["scheduler"],
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
    if "xl_pipe" in code:
        names["xl_pipe"] = tiny_xl_pipeline()
    if "control_pipe" in code:
        names["control_pipe"] = make_pipeline(tiny_controlnet())
    exec(compile(code, f"{PAGE.name}: {title}", "exec"), names)


def test_page_has_what_users_ask_for() -> None:
    titles = " ".join(title for title, _ in SNIPPETS)
    for topic in ("Text to image", "SDXL", "ControlNet", "Image to image", "LoRA", "threads"):
        assert topic in titles
