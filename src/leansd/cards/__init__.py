"""The card of a net that surgery or incubation made, as a README.md beside its weights.

All that is in it follows from the net, its lineage and its recipe, so that the same run writes the
same card, on every machine. The licence is that of the models whose weights are in it, as their
own cards say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from diffusers import UNet2DConditionModel
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from jinja2 import Environment, PackageLoader, StrictUndefined
from yaml import YAMLError

from leansd.anatomy import dissect
from leansd.emoji.location import EMBEDDED
from leansd.errors import LeansdError
from leansd.files import write_file
from leansd.loading import is_unet_folder, locate
from leansd.surgery.light_unet import LightUNet2DConditionModel
from leansd.surgery.lineage import Lineage
from leansd.version import __version__

Form = Literal["unet", "pipeline", "plain", "onnx"]
"""A UNet by itself or in a whole model, and the exports to stock diffusers and to ONNX."""
TITLES: Mapping[Form, str] = {
    "unet": "{name}: a lighter UNet of {base}",
    "pipeline": "{name}: {base} with a lighter UNet",
    "plain": "{name} for stock diffusers",
    "onnx": "{name} for ONNX Runtime",
}
FILE = "README.md"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Names of folders that say nothing without the folder that they are in.
_PARTS = ("net", "unet")


@dataclass(frozen=True)
class Training:
    """A stage that a net was distilled in."""

    stage: str
    surgery: str
    """What made its student, of which nets."""
    mode: str
    steps: int
    batch: int
    """Samples that a process took in a step."""
    learning_rate: float
    losses: Mapping[str, float]
    """Weight of each."""
    last: float | None = None
    """The mean of the loss over the last steps that were logged."""


@dataclass(frozen=True)
class Card:
    """What a card says that the net itself does not."""

    name: str
    nets: Mapping[str, str]
    """Models that weights come from, by the names that the lineage has for them; the first is the
    one that was operated on, and the teacher where there is one."""
    form: Form = "unet"
    edits: Sequence[str] = ()
    lineage: Lineage | None = None
    trainings: Sequence[Training] = ()
    untouched: int = 0
    """Units that are the teacher's still, bit for bit, after training."""
    data: str = ""
    """What it was trained on."""
    losses: Sequence[str] = ()
    """What it does otherwise than the net it is an export of, a sentence each."""


class Size(NamedTuple):
    """What a UNet holds and computes."""

    params: int
    macs: int
    """For one sample at `latent`."""
    units: int
    latent: tuple[int, int]


def write_card(
    folder: Path, card: Card, unet: UNet2DConditionModel, before: UNet2DConditionModel | None = None
) -> Path:
    """Write `folder/README.md`, with metadata that the Hub reads.

    Args:
        unet: the net that the card is of; the meta device will do.
        before: the net that it comes from, to compare with.

    Raises:
        LeansdError: it cannot be written.
    """
    return write_file(folder / FILE, render_card(card, unet, before))


def render_card(
    card: Card, unet: UNet2DConditionModel, before: UNet2DConditionModel | None = None
) -> str:
    """The text of a card."""
    licences = {name: find_licence(model) for name, model in card.nets.items()}
    different = set(licences.values())
    inherited = different.pop() if len(different) == 1 else SEVERAL if different else UNKNOWN
    models = [model for model in card.nets.values() if is_hub_id(model)]
    data = ModelCardData(
        **asdict(inherited),
        library_name="onnx" if card.form == "onnx" else "diffusers",
        pipeline_tag="text-to-image",
        base_model=models or None,
        tags=["stable-diffusion", "unet", "leansd", *(["distilled"] if card.trainings else [])],
    )
    environment = Environment(
        loader=PackageLoader("leansd.cards", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    first = next(iter(card.nets.values()), "")
    return environment.get_template("net.md").render(
        metadata=data.to_yaml(),
        card=card,
        title=TITLES[card.form].format(name=card.name, base=name_model(first) or "another net"),
        kind=type(unet).__name__,
        is_light=isinstance(unet, LightUNet2DConditionModel),
        base=name_model(first) or "the net it was made of",
        address=find_address(first),
        is_embedded=first == EMBEDDED,
        nets=[(name, name_model(model), licences[name]) for name, model in card.nets.items()],
        inherited=inherited,
        after=measure_size(unet),
        before=measure_size(before) if before is not None else None,
        origins=count_origins(card.lineage) if card.lineage is not None else [],
        version=__version__,
    )


def measure_size(unet: UNet2DConditionModel) -> Size:
    """Parameters, and multiply-accumulates at the UNet's own sample size."""
    anatomy = dissect(unet)
    return Size(anatomy.params, anatomy.macs, len(anatomy) - 2, anatomy.size or (0, 0))


def count_origins(lineage: Lineage) -> list[tuple[str, int, int]]:
    """For each net: how many units came from it, and how many of those are not what they were."""
    came = Counter(lineage.origins[at].net for at in lineage.units)
    changed = Counter(lineage.origins[at].net for at in lineage.units if at in lineage.changed)
    return [(net, came[net], changed[net]) for net in lineage.nets if came[net]]


def is_hub_id(model: str) -> bool:
    """Whether a model is on the Hub, for all that its name says."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def find_address(model: str) -> str:
    """What to write for a pipeline in an example."""
    if model == EMBEDDED or is_hub_id(model):
        return model
    if not model or is_unet_folder(model):
        return "path/to/the/whole/model"
    return f"path/to/{name_model(model)}"


def name_model(model: str) -> str:
    """A model as strangers may know it: no path of this machine."""
    if model == EMBEDDED or is_hub_id(model):
        return model
    path = Path(model)
    return "/".join(path.parts[-2:]) if path.name in _PARTS else path.name


@dataclass(frozen=True)
class Licence:
    """A licence in the words of the Hub's metadata."""

    license: str = "unknown"
    """The Hub's identifier: `apache-2.0`, `creativeml-openrail-m`, `other`."""
    license_name: str | None = None
    """What `other` is called."""
    license_link: str | None = None

    def __str__(self) -> str:
        return self.license_name or self.license


UNKNOWN = Licence()
SEVERAL = Licence("other", "several-see-where-it-comes-from")


def find_licence(model: str | Path) -> Licence:
    """The licence that a model's card names; `UNKNOWN` where there is no card or it names none.

    Args:
        model: `emoji`, the folder of a model or of a UNet, or a hub id, whose card is read from the
            cache where the hub is out of reach.
    """
    file = _find_card(model)
    if file is None:
        return UNKNOWN
    try:
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):
        return UNKNOWN
    named = data.get("license")
    if isinstance(named, list):
        named = named[0] if len(named) == 1 else "other"
    if not named:
        return UNKNOWN
    return Licence(str(named), data.get("license_name"), data.get("license_link"))


def _find_card(model: str | Path) -> Path | None:
    path = Path(model).expanduser()
    if str(model) != EMBEDDED and path.is_dir():
        # That of a whole model stands above its UNet's folder.
        homes = (path, path.parent) if path.name == "unet" else (path,)
        return next((home / FILE for home in homes if (home / FILE).is_file()), None)
    try:
        where = locate(model)
        if isinstance(where, Path):
            return where / FILE if (where / FILE).is_file() else None
        return Path(hf_hub_download(where, FILE))
    except (LeansdError, OSError, ValueError):
        return None
