"""The example workflows as pictures that ComfyUI opens: each shows its nodes, and carries them.

    python integrations/comfyui/examples/draw.py

Writes a PNG beside every JSON. Drop either onto ComfyUI's page.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

HERE = Path(__file__).parent
KEY = "workflow"
"""Of the text chunk that ComfyUI's page reads."""
MARGIN, TITLE, ROW, SCALE = 24, 22, 16, 0.6


def draw_workflow(workflow: dict[str, Any]) -> Image.Image:
    """A picture of a workflow's nodes and links, where its page has them."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    left = min(node["pos"][0] for node in nodes.values())
    top = min(node["pos"][1] for node in nodes.values())
    boxes = {number: _place(node, left, top) for number, node in nodes.items()}
    width = max(box[2] for box in boxes.values()) + MARGIN
    height = max(box[3] for box in boxes.values()) + MARGIN
    picture = Image.new("RGB", (width, height), "#202020")
    brush = ImageDraw.Draw(picture)
    for _, source, output, target, entry, _ in workflow["links"]:
        begin = boxes[source][2], boxes[source][1] + TITLE + ROW * output + ROW // 2
        end = boxes[target][0], boxes[target][1] + TITLE + ROW * entry + ROW // 2
        middle = (begin[0] + end[0]) // 2
        brush.line([begin, (middle, begin[1]), (middle, end[1]), end], fill="#9a9a5a", width=2)
    for number, node in nodes.items():
        box = boxes[number]
        brush.rounded_rectangle(box, 6, fill="#353535", outline="#707070")
        brush.text((box[0] + 8, box[1] + 5), node["type"], fill="#ffffff")
        for row, each in enumerate(node["inputs"]):
            brush.text((box[0] + 8, box[1] + TITLE + ROW * row), each["name"], fill="#b0b0b0")
    return picture


def _place(node: dict[str, Any], left: float, top: float) -> tuple[int, int, int, int]:
    x, y = (node["pos"][0] - left) * SCALE + MARGIN, (node["pos"][1] - top) * SCALE + MARGIN
    rows = max(len(node["inputs"]), len(node["outputs"]), 1)
    least = TITLE + ROW * rows + 4
    return (
        round(x), round(y), round(x + node["size"][0] * SCALE),
        round(y + max(node["size"][1] * SCALE, least)),
    )  # fmt: skip


def write_picture(path: Path) -> Path:
    """The picture of a workflow file, written beside it."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    told = PngInfo()
    told.add_text(KEY, json.dumps(workflow))
    target = path.with_suffix(".png")
    draw_workflow(workflow).save(target, pnginfo=told, optimize=True)
    return target


if __name__ == "__main__":
    for each in sorted(HERE.glob("*.json")):
        print(write_picture(each))
