"""Opening models: what works, and what is told where it does not."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import save_file

import leansd
from leansd.errors import LeansdError
from leansd.loading import as_image_to_image, find_device, load_outline, locate
from tiny import tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_folder_opens_in_float32_on_the_cpu(folder):
    pipe = leansd.load(folder, device="cpu")
    assert isinstance(pipe, StableDiffusionPipeline)
    assert pipe.dtype == torch.float32
    assert leansd.load(str(folder), device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_embedded_model_opens_without_a_word(folder, monkeypatch, capfd):
    monkeypatch.setattr("leansd.emoji.location.model_folder", lambda: folder)
    pipe = leansd.load("emoji", device="cpu")
    pipe("a", num_inference_steps=2, output_type="latent")
    printed = capfd.readouterr()
    assert "it/s" not in printed.err
    assert not printed.out


def test_an_outline_has_shapes_and_no_weights(folder):
    unet = load_outline(folder)
    assert {weight.device.type for weight in unet.parameters()} == {"meta"}
    assert unet.config.block_out_channels == leansd.load(folder).unet.config.block_out_channels


def test_image_to_image_shares_every_part(folder):
    pipe = leansd.load(folder, device="cpu")
    other = as_image_to_image(pipe)
    assert isinstance(other, StableDiffusionImg2ImgPipeline)
    assert other.unet is pipe.unet


@pytest.mark.parametrize("open_model", [leansd.load, load_outline])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("emojii", "no model 'emojii': give 'emoji', a folder"),
        ("", "no model ''"),
        ("missing/folder/deep", "no model 'missing/folder/deep'"),
        ("nobody/nothing", "HF_HUB_OFFLINE keeps the hub out of reach"),
    ],
)
def test_a_missing_model_is_told(open_model, model, said):
    with pytest.raises(LeansdError, match=said):
        open_model(model)


def test_a_folder_that_is_no_model_is_told(tmp_path, copy):
    with pytest.raises(LeansdError, match=r"has no model_index\.json"):
        leansd.load(tmp_path)
    shutil.rmtree(copy / "unet")
    with pytest.raises(LeansdError, match="cannot open the model in"):
        leansd.load(copy)
    with pytest.raises(LeansdError, match="cannot open the model in"):
        load_outline(copy)


def test_damaged_weights_are_told(copy):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(LeansdError, match="cannot open the model in"):
        leansd.load(copy)


def test_pickled_weights_are_refused(tmp_path, copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(LeansdError, match="cannot open the model in"):
        leansd.load(copy)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(LeansdError, match=r"not a \.safetensors file"):
        leansd.load(tmp_path / "model.ckpt")


def test_a_single_file_says_what_it_lacks(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"{}")
    with pytest.raises(LeansdError, match="not a readable"):
        leansd.load(tmp_path / "bad.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(LeansdError, match="give a folder in the diffusers layout"):
        leansd.load(tmp_path / "odd.safetensors")


def test_another_kind_of_network_is_told(copy):
    path = copy / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    with pytest.raises(LeansdError, match="UNet2DModel, not a UNet2DConditionModel"):
        load_outline(copy)


def test_devices_that_are_not_there_are_told():
    assert find_device("cpu").type == "cpu"
    with pytest.raises(LeansdError, match="no device 'gpu': this machine has"):
        find_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(LeansdError, match="no device 'cuda' here"):
            find_device("cuda")


def test_a_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("~/tiny") == folder
