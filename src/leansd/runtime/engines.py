"""All engines that there are: which UNets are woven, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from diffusers import UNet2DConditionModel

from leansd.errors import LeansdError
from leansd.runtime.engine import LOCK, Engine

if TYPE_CHECKING:
    from leansd.runtime.attachment import Attachment

_ENGINES: WeakValueDictionary[int, Engine] = WeakValueDictionary()
"""By the id of the UNet, which the engine keeps alive."""
KEEPSAKE = "_leansd_engine"
"""Where a UNet keeps the engine that has compiled it."""


def attach(attachment: Attachment) -> Engine:
    """Weave the UNet, if it is not woven yet, and let the attachment's calls follow its plan.

    So are the others that its plan runs.

    Raises:
        LeansdError: the same pipeline is attached already.
    """
    with LOCK:
        engine = _find_engine(attachment.unet, attachment)
        for other in engine.attachments:
            if other.pipe is attachment.pipe and _share_thread(other, attachment):
                raise LeansdError(
                    f"already attached: it follows plan {other.source.name}; leave that `with` "
                    "block first, or call leansd.release_"
                )
        engine.attachments += (attachment,)
        for name, unet in attachment.company.unets.items():
            attachment.hosts[name] = host = _find_engine(unet, attachment)
            host.guests += (attachment,)
        return engine


def _find_engine(unet: UNet2DConditionModel, attachment: Attachment) -> Engine:
    """The engine that is woven around a UNet; a new one, where there is none."""
    engine = _ENGINES.get(id(unet))
    if engine is None:
        engine = _ENGINES[id(unet)] = _revive(unet) or Engine(unet)
    if attachment.compile_options is not None:
        setattr(unet, KEEPSAKE, Keepsake(engine))
    return engine


def detach(attachment: Attachment) -> None:
    """Undo `attach`; after the last one the UNets are as they were before the first."""
    with LOCK:
        for unet in (attachment.unet, *attachment.company.unets.values()):
            engine = _ENGINES.get(id(unet))
            if engine is None:
                continue
            engine.attachments = _leave_out(engine.attachments, attachment)
            engine.guests = _leave_out(engine.guests, attachment)
            if not (engine.attachments or engine.guests):
                engine.release()
                del _ENGINES[id(unet)]
        attachment.hosts.clear()


def _leave_out(attachments: Sequence[Attachment], one: Attachment) -> tuple[Attachment, ...]:
    return tuple(each for each in attachments if each is not one)


class Keepsake:
    """Keeps an engine, and so its graphs, for as long as its UNet lives; a copy keeps none."""

    def __init__(self, engine: Engine | None = None) -> None:
        self.engine = engine

    def __deepcopy__(self, memo: dict[int, Any]) -> Keepsake:
        return Keepsake()

    def __reduce__(self) -> tuple[type[Keepsake], tuple[()]]:
        return Keepsake, ()


def _revive(unet: UNet2DConditionModel) -> Engine | None:
    """The engine that a UNet keeps, woven again, unless its modules have changed."""
    engine = getattr(unet, KEEPSAKE, Keepsake()).engine
    if engine is None or engine.unet is not unet:
        return None
    return engine if engine.resume() else None


def list_attachments(unet: UNet2DConditionModel) -> tuple[Attachment, ...]:
    engine = _ENGINES.get(id(unet))
    return engine.attachments if engine is not None else ()


def _share_thread(one: Attachment, other: Attachment) -> bool:
    """Whether both would answer in some thread; a pipeline serves one thread at a time."""
    return one.pipe is not None or None in (one.thread, other.thread) or one.thread == other.thread
