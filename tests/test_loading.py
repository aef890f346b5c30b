"""Opening models: what works, and what is told where it does not."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import save_file

import leansd
from leansd.errors import LeansdError
from leansd.loading import as_image_to_image, find_device, load_outline, load_vae, locate
from tiny import tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_folder_is_meant_by_its_index(folder):
    assert locate(folder / "model_index.json") == folder


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


@pytest.mark.parametrize("open_model", [leansd.load, leansd.load_unet, load_outline])
@pytest.mark.parametrize("given", [torch.nn.Identity(), None], ids=["net", "nothing"])
def test_what_is_no_name_of_a_model_is_told_by_its_kind(open_model, given):
    with pytest.raises(LeansdError, match=f"file; this is a {type(given).__name__}$"):
        open_model(given)


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
    with pytest.raises(LeansdError, match="has no folder unet"):
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
    with pytest.raises(LeansdError, match="may run code when it is opened"):
        leansd.load(copy)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(LeansdError, match=r"not a \.safetensors file"):
        leansd.load(tmp_path / "model.ckpt")


def test_a_single_file_says_what_it_lacks(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"{}")
    with pytest.raises(LeansdError, match="not a readable"):
        leansd.load(tmp_path / "bad.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(LeansdError, match="or a folder in the diffusers layout"):
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


def rename_weights(folder, part, ending):
    for file in (folder / part).glob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ending)))


PARTS_WITH_WEIGHTS = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize("parts", [PARTS_WITH_WEIGHTS, ("unet",), ("vae", "text_encoder")])
def test_half_precision_weights_alone_open(copy, parts):
    expected = leansd.load(copy, device="cpu").unet.state_dict()
    for part in parts:
        rename_weights(copy, part, ".fp16.safetensors")
    for opened in (leansd.load(copy, device="cpu").unet, leansd.load_unet(copy, device="cpu")):
        assert all(torch.equal(each, expected[name]) for name, each in opened.state_dict().items())


def test_an_autoencoder_in_half_precision_alone_opens(copy):
    expected = load_vae(copy).state_dict()
    rename_weights(copy, "vae", ".fp16.safetensors")
    opened = load_vae(copy).state_dict()
    assert all(torch.equal(each, expected[name]) for name, each in opened.items())
    rename_weights(copy, "vae", ".bin")
    with pytest.raises(
        LeansdError, match=r"the weights of the autoencoder in .* are only there as"
    ):
        load_vae(copy)


def write_pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n")


def make_lora(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    tensors = {"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(1)}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")


def make_bare_unet(folder):
    shutil.copytree(folder / "unet", folder / "net")
    for each in list(folder.iterdir()):
        if each.name != "net":
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    for each in (folder / "net").iterdir():
        each.rename(folder / each.name)


# What people have in a folder: how it comes about from a whole one, and the sentence.
FOLDERS = {
    "only .bin": (
        lambda copy: rename_weights(copy, "unet", ".bin"),
        "the weights of the unet in .* are only there as diffusion_pytorch_model.bin, which may run"
        " code when it is opened: if you trust it, convert it with diffusers",
    ),
    "only .bin of a part of transformers": (
        lambda copy: rename_weights(copy, "text_encoder", ".bin"),
        "the weights of the text_encoder in .* are only there as model.bin",
    ),
    "no weights": (
        lambda copy: rename_weights(copy, "vae", ".safetensors.part"),
        "no weights of the vae in .*: there is no .safetensors file",
    ),
    "pointers of LFS": (
        lambda copy: write_pointer(copy / "unet" / "diffusion_pytorch_model.safetensors"),
        "is a pointer of Git LFS, not weights: run `git lfs pull`",
    ),
    "no scheduler": (
        lambda copy: shutil.rmtree(copy / "scheduler"),
        "has no scheduler/scheduler_config.json: copy it from the model",
    ),
    "no tokenizer": (
        lambda copy: shutil.rmtree(copy / "tokenizer"),
        "has no folder tokenizer, which its model_index.json names",
    ),
    "damaged index": (
        lambda copy: (copy / "model_index.json").write_text("{"),
        "model_index.json is damaged: it is not JSON",
    ),
    "damaged configuration": (
        lambda copy: (copy / "unet" / "config.json").write_text("{"),
        "unet/config.json is damaged: it is not JSON",
    ),
    "variants that differ": (
        lambda copy: (
            rename_weights(copy, "unet", ".fp16.safetensors"),
            rename_weights(copy, "vae", ".ema.safetensors"),
        ),
        "weights of no common variant: unet fp16, vae ema",
    ),
    "a LoRA": (make_lora, "is a LoRA, not a model: open the model that it is for"),
    "a bare UNet": (
        make_bare_unet,
        r"is a UNet by itself \(UNet2DConditionModel\), not a model: give the model that it is for",
    ),
    "a hub cache": (
        lambda copy: (
            (copy / "model_index.json").unlink(),
            (copy / "models--owner--name").mkdir(),
        ),
        "is a hub cache: give one of the models in it",
    ),
    "a hub cache's repository without a model": (
        lambda copy: (copy / "snapshots").mkdir(),
        "is a hub cache without a whole model: fetch copy again",
    ),
    "a lone file": (
        lambda copy: (
            (copy / "model_index.json").unlink(),
            save_file({"a": torch.zeros(1)}, copy / "model.safetensors"),
        ),
        "has no model_index.json: give the file in it, .*model.safetensors",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_is_wrong_with_a_folder_is_one_sentence(copy, case, capfd, caplog):
    spoil, sentence = FOLDERS[case]
    spoil(copy)
    with pytest.raises(LeansdError, match=sentence) as told:
        leansd.load(copy, device="cpu")
    assert "\n" not in str(told.value)
    printed = capfd.readouterr()
    assert (printed.out, printed.err, caplog.text) == ("", "", "")


def test_parts_of_a_model_say_whose_they_are(copy):
    with pytest.raises(LeansdError, match=r"is a model's UNet: give the whole model, .*copy"):
        leansd.load(copy / "unet")
    with pytest.raises(LeansdError, match="is the part AutoencoderTiny of a model: give"):
        leansd.load(copy / "vae")


def test_the_root_of_a_cached_repository_opens(copy, tmp_path):
    root = tmp_path / "models--owner--name"
    for name in ("old", "new"):
        shutil.copytree(copy, root / "snapshots" / name)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("old")
    assert locate(root) == root / "snapshots" / "old"
    unet = leansd.load_unet(root, device="cpu")
    assert torch.equal(leansd.load(root, device="cpu").unet.conv_in.weight, unet.conv_in.weight)


def test_a_safety_checker_that_is_not_there_is_left_out(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="names safety_checker and feature_extractor and has none"):
        pipe = leansd.load(copy, device="cpu")
    assert pipe.safety_checker is None


# Single files that are not a whole model, by the name of one of their tensors.
FILES = {
    "lora_unet_down_blocks_0.lora_down.weight": "is a LoRA, not a model",
    "unet.down_blocks.0.attentions.0.to_q.lora_A.weight": "is a LoRA, not a model",
    "down_blocks.0.resnets.0.conv1.weight": "is a UNet by itself, not a whole model",
    "decoder.conv_in.weight": "is an autoencoder by itself",
    "text_model.embeddings.position_ids": "is a text encoder by itself",
    "control_model.input_blocks.0.0.weight": "is a ControlNet",
    "double_blocks.0.img_attn.norm.key_norm.scale": "is a Flux transformer, which has no UNet",
    "model.diffusion_model.joint_blocks.0.x": "is a Stable Diffusion 3 transformer",
    "emb_params": "is a textual inversion",
    "weight": r"holds no Stable Diffusion checkpoint \(its first tensor is weight\)",
    "model.diffusion_model.time_embed.0.weight": "come from the hub, so where there is no network",
}


@pytest.mark.parametrize("name", FILES)
def test_what_a_single_file_is_instead_is_told(tmp_path, name, capfd, caplog):
    save_file({name: torch.zeros(1)}, tmp_path / "file.safetensors")
    with pytest.raises(LeansdError, match=FILES[name]) as told:
        leansd.load(tmp_path / "file.safetensors")
    assert "\n" not in str(told.value)
    printed = capfd.readouterr()
    assert (printed.out, printed.err, caplog.text) == ("", "", "")


def test_a_file_that_is_a_pointer_is_told(tmp_path):
    write_pointer(tmp_path / "model.safetensors")
    with pytest.raises(LeansdError, match="run `git lfs pull`"):
        leansd.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("device", ["xpu", "npu", "mps", "cuda", "cuda:7"])
def test_accelerators_that_are_not_there_are_told(device, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(LeansdError, match=f"no device '{device}'.*: this machine has cpu"):
        find_device(device)


def test_a_gpu_of_too_high_a_number_is_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert find_device("cuda") == torch.device("cuda")
    with pytest.raises(LeansdError, match=r"no device 'cuda:1' here: this machine has 1 GPU"):
        find_device("cuda:1")


@pytest.mark.parametrize(
    "asked", [{"dtype": torch.float16}, {"device": "meta"}, {"device": "meta", "dtype": torch.half}]
)
def test_beside_another_unet_nothing_that_is_asked_for_is_ignored(folder, asked):
    beside = leansd.load_unet(folder, device="cpu", dtype=torch.float32)
    same = leansd.load_unet(folder, beside=beside, device="cpu", dtype=torch.float32)
    assert same.conv_in.weight.data_ptr() == beside.conv_in.weight.data_ptr()
    with pytest.raises(LeansdError, match=r"beside is on cpu in torch.float32.*leave device and"):
        leansd.load_unet(folder, beside=beside, **asked)
