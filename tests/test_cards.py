"""Every net that is written has a card, and what it says can be done."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import leansd
from leansd.cards import UNKNOWN, Card, Licence, Training, find_licence, render_card, write_card
from leansd.cli.operate import operate_into
from leansd.surgery.edits import Surgery
from tiny import shallow_unet, tiny_pipeline

OPENRAIL = "---\nlicense: creativeml-openrail-m\n---\n# a model\n"
THIN = Surgery("thin").drop("dn0.l1", "up0.l1")
LIGHT = Surgery("light").drop("dn0.attn", "mid.l0.attn")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("somewhere") / "tiny-model"
    tiny_pipeline(unet=shallow_unet(layers_per_block=2)).save_pretrained(folder)
    (folder / "README.md").write_text(OPENRAIL)
    return folder


def read(folder: Path) -> tuple[str, dict[str, Any]]:
    card = ModelCard.load(folder / "README.md")
    return card.content, card.data.to_dict()


def run_snippets(text: str, paths: dict[str, Path]) -> list[dict[str, Any]]:
    """Run a card's Python with its stand-ins for paths replaced; gives what each block left."""
    left: list[dict[str, Any]] = []
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for stand_in, path in paths.items():
            code = code.replace(stand_in, str(path))
        names: dict[str, Any] = {}
        exec(
            compile(code.replace('"a red apple"', '"a", num_inference_steps=1'), "card", "exec"),
            names,
        )
        left.append(names)
    return left


def test_a_cut_net_has_a_card_whose_snippets_run(model: Path, tmp_path: Path) -> None:
    written = operate_into(tmp_path / "net", {"original": str(model)}, THIN, whole=False)
    assert tmp_path / "net" / "README.md" in written
    text, data = read(tmp_path / "net")
    assert data["license"] == "creativeml-openrail-m"
    assert data["library_name"] == "diffusers"
    assert "thin: a lighter UNet of tiny-model" in text
    assert "`drop dn0.l1 up0.l1`" in text
    assert "draws worse than tiny-model" in text
    assert str(model.parent) not in text
    assert str(tmp_path) not in text
    places = {"path/to/this/folder": tmp_path / "net", "path/to/tiny-model": model}
    with_leansd, stock = run_snippets(text, places)
    assert with_leansd["pipe"].unet.config.layers_per_block == 1
    assert stock["unet"].config.layers_per_block == 1


def test_a_whole_model_has_one_card_above_its_parts(model: Path, tmp_path: Path) -> None:
    surgery = Surgery("bare").drop("mid.l0.attn")
    operate_into(tmp_path / "whole", {"original": str(model)}, surgery, whole=True)
    text, _ = read(tmp_path / "whole")
    assert "import leansd  # diffusers finds" in text
    (names,) = run_snippets(text, {"path/to/this/folder": tmp_path / "whole"})
    assert isinstance(names["pipe"].unet, leansd.LightUNet2DConditionModel)


def test_an_export_inherits_the_licence_of_a_cut_net(model: Path, tmp_path: Path) -> None:
    operate_into(tmp_path / "net", {"original": str(model)}, THIN, whole=False)
    leansd.export(tmp_path / "net", tmp_path / "plain", to="diffusers")
    text, data = read(tmp_path / "plain")
    assert data["license"] == "creativeml-openrail-m"
    assert "plain for stock diffusers" in text
    leansd.export(shallow_unet(), tmp_path / "unnamed", to="diffusers")
    text, data = read(tmp_path / "unnamed")
    assert data["license"] == "unknown"
    assert "No licence was found" in text


def test_licences_of_several_nets_are_all_named(model: Path) -> None:
    unet = shallow_unet()
    card = Card("mixed", {"original": str(model), "light": "emoji"})
    text = render_card(card, unet)
    data = ModelCard(text).data.to_dict()
    assert (data["license"], "see" in data["license_name"]) == ("other", True)
    assert "| `original` | tiny-model | creativeml-openrail-m |" in text
    assert "| `light` | emoji | weights-apache-2.0-see-data-attribution |" in text


def test_hub_ids_become_base_models() -> None:
    training = Training("one", "bk of teacher", "end-to-end", 10, 4, 5e-5, {"output": 0.5}, 0.25)
    card = Card("light", {"teacher": "owner/model"}, trainings=[training], data="pictures")
    text = render_card(card, shallow_unet(), before=shallow_unet(layers_per_block=2))
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == ["owner/model"]
    assert "distilled" in data["tags"]
    assert 'leansd.load("owner/model")' in text
    assert "| one | bk of teacher | end-to-end | 10 | 4 | 5e-05 | output x 0.5 | 0.25 |" in text
    assert "|  | owner/model | this net |" in text


@pytest.mark.parametrize(
    "text", ["# no metadata\n", "---\nlicense: [\n---\n", "---\ntags: [a]\n---\n"]
)
def test_cards_without_a_licence(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert find_licence(tmp_path) == UNKNOWN


def test_where_a_licence_is_found(model: Path, tmp_path: Path) -> None:
    assert find_licence(model) == find_licence(model / "unet") == Licence("creativeml-openrail-m")
    assert find_licence("emoji").license == "other"
    assert find_licence("owner/not-there") == UNKNOWN
    assert find_licence(tmp_path / "nothing") == UNKNOWN


def test_a_card_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    with pytest.raises(leansd.LeansdError, match=r"cannot write .*README.md"):
        write_card(tmp_path, Card("light", {"original": "emoji"}), shallow_unet())
