"""Extractors: networks that look at pictures, by name, each from weights whose path is given.

InceptionV3 is torch-fidelity's, LPIPS torchmetrics', CLIP transformers'; nothing is downloaded.
A new one is a function that opens it and an entry in `EXTRACTORS`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image, ImageOps
from torch import Tensor

from leansd.emoji.location import EMBEDDED, model_folder
from leansd.errors import LeansdError
from leansd.evaluation.fidelity import LPIPS_SOURCE, find_lpips_weights, open_lpips
from leansd.evaluation.picture_sets import PictureBytes
from leansd.evaluation.quality import Embedder, clip_score, embed_pictures, embed_prompts, open_clip
from leansd.loading import locate, silent_loading


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of one size.

    Attributes:
        pictures: [n, 3, H, W], 8 bits.
        prompts: None for those that have none.
        others: what they are compared with, [n, 3, H, W], 8 bits.
    """

    pictures: Tensor
    prompts: tuple[str | None, ...]
    others: Tensor | None = None


def batch_samples(
    samples: Sequence[PictureBytes], count: int, size: int | None
) -> Iterator[PictureBatch]:
    """Open pictures and put neighbours of one size together, in their order.

    Args:
        size: what the middle square of every picture is made, in pixels; None leaves them.

    Raises:
        LeansdError: one is no picture, or its partner is of another size.
    """
    opened = (_open_sample(sample, size) for sample in samples)
    for _, group in groupby(opened, key=lambda each: each[0].size):
        alike = list(group)
        for begin in range(0, len(alike), count):
            pictures, prompts, found = zip(*alike[begin : begin + count], strict=True)
            others = [each for each in found if each is not None]
            yield PictureBatch(
                _stack_pictures(pictures), prompts, _stack_pictures(others) if others else None
            )


def open_picture(content: bytes, name: str) -> Image.Image:
    """A picture as it is seen.

    Raises:
        LeansdError: it is none.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LeansdError(f"picture {name} cannot be opened: {error}; mend or remove it") from error


def find_prompt(facts: bytes | None, picture: Image.Image) -> str | None:
    """What a picture was drawn from: as a sidecar says, or else the picture itself."""
    if facts is None:
        text: Any = picture.info.get("prompt")
    else:
        said = facts.decode("utf-8", errors="replace").strip()
        try:
            found: Any = json.loads(said)
        except ValueError:
            found = said
        text = found.get("prompt", found.get("caption")) if isinstance(found, dict) else said
    return text if isinstance(text, str) and text else None


def _open_sample(
    sample: PictureBytes, size: int | None
) -> tuple[Image.Image, str | None, Image.Image | None]:
    """A picture, its prompt and its partner."""
    picture = open_picture(sample.picture, sample.id)
    prompt, other = find_prompt(sample.facts, picture), None
    fitted = _fit_picture(picture, size)
    if sample.other is not None:
        other = _fit_picture(open_picture(sample.other, f"beside {sample.id}"), size)
        if other.size != fitted.size:
            raise LeansdError(
                f"picture {sample.id} is {fitted.size} and its partner {other.size} pixels: give "
                "--resize N to compare both at N x N"
            )
    return fitted, prompt, other


def _fit_picture(picture: Image.Image, size: int | None) -> Image.Image:
    fitted = picture.convert("RGB")
    if size is None:
        return fitted
    return ImageOps.fit(fitted, (size, size), Image.Resampling.BICUBIC)


def _stack_pictures(pictures: Sequence[Image.Image]) -> Tensor:
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


# -- extractors ---------------------------------------------------------------------------------

Extract: TypeAlias = Callable[[PictureBatch], Mapping[str, Tensor]]
"""Pictures to what is seen in them: tensors by name, each [n, ...]."""


@dataclass(frozen=True)
class Extractor:
    """A network that scores are made from.

    Attributes:
        weights: what its weights are and where they come from, in words.
        find: the weights where they are on this machine already.
        open: the network, from its weights, on a device.
        name: what tables call it, by its weights and their fingerprint.
        form: of the path of the weights, a file or a folder.
    """

    weights: str
    find: Callable[[], Path | None]
    open: Callable[[Path, torch.device], Extract]
    name: Callable[[Path, str], str]
    form: str = "file"


def fingerprint_weights(path: Path) -> str:
    """Sixteen hex digits of a file, or of all files of a folder."""
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    whole = sha256()
    for each in files:
        if path.is_dir():
            whole.update(each.name.encode())
        with each.open("rb") as file:
            while block := file.read(2**20):
                whole.update(block)
    return whole.hexdigest()[:16]


def require_weights(name: str, extractor: Extractor, path: Path | None) -> Path:
    """Where an extractor's weights are.

    Raises:
        LeansdError: they are not there.
    """
    if path is None:
        raise LeansdError(
            f"no weights of {name}: it needs {extractor.weights}; give its "
            f"{extractor.form} by --weights {name}=PATH"
        )
    if not path.exists():
        raise LeansdError(f"no weights of {name} at {path}: it needs {extractor.weights}")
    return path


# -- InceptionV3 --------------------------------------------------------------------------------

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SOURCE = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
INCEPTION_DIGEST = "6726825d"
"""The first digits of the file's SHA-256, as its name has them."""


def find_inception() -> Path | None:
    """The weights where torch-fidelity and torchmetrics keep them."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return path if path.is_file() else None


def open_inception(weights: Path, device: torch.device) -> Extract:
    """Pooled features [n, 2048] and logits without their bias [n, 1008].

    Pictures are resized to 299 x 299 as TensorFlow 1 did it, by torch-fidelity.

    Raises:
        LeansdError: torch-fidelity is not installed, or the file holds something else.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise LeansdError(
            "FID, IS, precision and recall need torch-fidelity: install leansd[metrics]"
        ) from error
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        # torch-fidelity would unpickle whatever the file holds: it gets what was read safely.
        plain = io.BytesIO()
        torch.save(dict(state), plain)
        plain.seek(0)
        net = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=plain,
        )
    except Exception as error:  # whatever a file that is something else brings about
        raise LeansdError(
            f"{weights} does not hold torch-fidelity's InceptionV3: get it from {INCEPTION_SOURCE}"
        ) from error
    net = net.to(device).eval()

    @torch.no_grad()
    def extract(batch: PictureBatch) -> dict[str, Tensor]:
        pooled, logits = net(batch.pictures.to(device))
        return {"pooled": pooled.cpu(), "logits": logits.cpu()}

    return extract


def name_inception(weights: Path, fingerprint: str) -> str:
    """The field's network by its name, another by its file's."""
    return (
        "InceptionV3"
        if fingerprint.startswith(INCEPTION_DIGEST)
        else f"InceptionV3 of {weights.name}"
    )


# -- CLIP ---------------------------------------------------------------------------------------

USUAL_CLIP = "openai/clip-vit-base-patch16"


def find_clip() -> Path | None:
    """The usual CLIP, where the hub's cache on this machine has it."""
    found = try_to_load_from_cache(USUAL_CLIP, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def open_clip_extractor(
    open_folder: Callable[[Path], Embedder], folder: Path, device: torch.device
) -> Extract:
    """Pooled features [n, width] of pictures, and their scores [n]: NaN without a prompt."""
    with silent_loading():
        embedder = open_folder(folder)
    embedder.clip.to(device)

    def extract(batch: PictureBatch) -> dict[str, Tensor]:
        seen = embed_pictures(embedder, batch.pictures)
        places = [place for place, prompt in enumerate(batch.prompts) if prompt is not None]
        scores = torch.full((len(seen.vectors),), torch.nan)
        if places:
            vectors = embed_prompts(embedder, [str(batch.prompts[place]) for place in places])
            scores[places] = clip_score(seen.vectors[places], vectors)
        return {"pooled": seen.features, "scores": scores}

    return extract


# -- the CLIP that the embedded model carries ---------------------------------------------------

TINY_CLIP_NAME = "tiny CLIP"


def open_own_clip(folder: Path, name: str) -> Embedder:
    """The CLIP in a model's folder, as the embedded model has one."""
    from leansd.emoji.clip import load_clip, normalize_floats, tokenize

    own, tokenizer = load_clip(folder)
    side: Any = own.vision_model.config.image_size
    return Embedder(name, own, side, normalize_floats, lambda prompts: tokenize(tokenizer, prompts))


def find_embedder(model: str | Path, clip: str | Path | None = None) -> Embedder | None:
    """The CLIP in the folder `clip`, or else the model's own; None where there is neither."""
    if clip is not None:
        return open_clip(clip)
    folder = locate(model)
    if not (isinstance(folder, Path) and (folder / "clip" / "config.json").is_file()):
        return None
    with silent_loading():
        return open_own_clip(
            folder, TINY_CLIP_NAME if str(model) == EMBEDDED else f"CLIP of {folder.name}"
        )


# -- LPIPS --------------------------------------------------------------------------------------


def open_alexnet(weights: Path, device: torch.device) -> Extract:
    """The distance of each picture to its partner, [n]."""
    lpips = open_lpips(weights, device)

    def extract(batch: PictureBatch) -> dict[str, Tensor]:
        if batch.others is None:
            raise LeansdError("LPIPS compares pictures with others: give --reference FOLDER")
        return {"distances": lpips(batch.pictures.float() / 255, batch.others.float() / 255)}

    return extract


EXTRACTORS: dict[str, Extractor] = {
    "inception": Extractor(
        f"torch-fidelity's InceptionV3 ({INCEPTION_SOURCE})",
        find_inception,
        open_inception,
        name_inception,
    ),
    "clip": Extractor(
        f"a CLIPModel of transformers with its tokenizer, such as a copy of https://hf.co/{USUAL_CLIP}",
        find_clip,
        partial(open_clip_extractor, open_clip),
        lambda folder, _: (
            folder.resolve().name if folder.parent.name != "snapshots" else USUAL_CLIP
        ),
        form="folder",
    ),
    "lpips": Extractor(
        f"torchvision's AlexNet ({LPIPS_SOURCE}); its heads come with torchmetrics",
        find_lpips_weights,
        open_alexnet,
        lambda _, __: "AlexNet",
    ),
    "tiny-clip": Extractor(
        "the embedded model",
        lambda: model_folder() / "clip",
        partial(open_clip_extractor, lambda folder: open_own_clip(folder.parent, TINY_CLIP_NAME)),
        lambda _, __: TINY_CLIP_NAME,
        form="folder",
    ),
}
