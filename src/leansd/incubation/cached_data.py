"""`drawn`, `folder` and `shards`: data that are encoded once, into a cache, and read from there."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError

from leansd.errors import LeansdError
from leansd.incubation.batches import Source
from leansd.incubation.data import settings as kinds
from leansd.incubation.data.filling import Telling
from leansd.incubation.recipe import DataSettings
from leansd.incubation.sources import DataSetting

CACHE = "cache"


def open_source(data: DataSettings, setting: DataSetting) -> Source:
    """Encode what is not in the cache yet, each process its share, and open it.

    Raises:
        LeansdError: there are no data, or an option is none; the message names it.
    """
    try:
        wanted: kinds.DataSettings = TypeAdapter(kinds.DataSettings).validate_python(
            {"kind": data.kind, **data.options}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        raise LeansdError(f"data.{place}: {first['msg']}") from None
    dataset = kinds.prepare_data(wanted, setting.pipe, setting.folder / CACHE)
    dataset.fill(rank=setting.rank, world=setting.world, report=Telling(setting.note))
    setting.wait()
    return dataset.open()
