"""`leansd incubate` on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from leansd.cli import main
from leansd.loading import load_unet
from pages import read_page
from tiny import shallow_unet, tiny_pipeline

RECIPE = """
model: {model}
data: {{kind: random, prompts: [a, b]}}
trainer: {{batch: 1, ema: 0.9}}
validation: {{prompts: [a], every: 1, steps: 1, guidance: 1.0}}
stages:
  - name: light
    surgery: {{name: light, edits: [{{drop: [dn0.l1, up0.l1]}}]}}
    train: "*"
    steps: 1
    losses: {{output: {{}}, vgg: {{options: {{weights: random, stages: [0]}}}}}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(unet=shallow_unet(layers_per_block=2)).save_pretrained(folder / "model")
    path = folder / "light.yaml"
    path.write_text(RECIPE.format(model=folder / "model"))
    return path


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    code = main(["incubate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_recipe_becomes_a_net(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("torchvision")
    out = tmp_path / "run"
    code, said, noted = run(capsys, recipe, "stages.light.steps=2", "--out", out, "--json")
    assert code == 0, noted
    assert json.loads(said.splitlines()[-1])["net"] == str(out / "net")
    assert "light 2/2 loss" in noted
    assert load_unet(out / "net", device="cpu").config.layers_per_block == 1
    card = (out / "net" / "README.md").read_text()
    assert "| light | light of teacher | end-to-end | 2 | 1 | 5e-05 | output, vgg |" in card
    assert str(recipe.parent) not in card
    with Image.open(out / "light/validation/step-00000002.png") as grid:
        assert grid.size == (32, 64)  # the teacher's picture above the student's
    page, text = read_page(out / "report.html")
    assert "The network is trained" in text
    assert len(page.images) == 3  # original, trained, difference
    assert "dB close to the original" in text
    assert "http-equiv" not in text
    code, _, noted = run(capsys, recipe, "stages.light.steps=2", "--out", out)
    assert code == 2
    assert "--resume" in noted
    assert run(capsys, recipe, "stages.light.steps=2", "--out", out, "--resume")[0] == 0


def test_a_stopped_run_leaves_a_page(
    recipe: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("leansd.incubation.training_run.keep_net", stop)
    losses = "stages.light.losses.vgg.weight=0"
    code, _, _ = run(capsys, recipe, losses, "stages.light.steps=1", "--out", tmp_path / "run")
    assert code == 130
    assert "is stopped after 1 of 1 steps" in read_page(tmp_path / "run" / "report.html")[1]


def test_a_dry_run_writes_nothing_but_a_page(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "estimate.html"
    code, said, noted = run(capsys, recipe, "--dry-run", "--json", "--report", page)
    assert code == 0, noted
    fields = json.loads(said.splitlines()[-1])
    assert fields["stages"][0]["samples"] == 1
    assert fields["stages"][0]["hours"] > 0
    assert all(each.name.startswith(page.stem) for each in tmp_path.iterdir())  # and its figures
    assert "would take about" in read_page(page)[1]


def test_what_is_wrong_is_said_in_a_line(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    for arguments, said in (
        ((recipe,), "give --out"),
        ((tmp_path / "none.yaml", "--dry-run"), "cannot read the recipe"),
        (
            ("smokey", "--dry-run"),
            "emoji-lean, emoji-leaner, emoji-leanest, sd15-asdm, sd15-bk, sd15-lean, smoke",
        ),
        ((recipe, "data.kind=rando", "--out", tmp_path / "a"), "did you mean random"),
        ((recipe, "data.prompt=a", "--out", tmp_path / "b"), "no option 'prompt'"),
    ):
        code, _, noted = run(capsys, *arguments)
        assert (code, noted.count("\n")) == (2, 1)
        assert said in noted
