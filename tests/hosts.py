"""Doubles of other programs, for what is put into them (`integrations/`)."""

import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def open_in_host(path: Path, doubles: Mapping[str, Mapping[str, Any]]) -> Iterator[Any]:
    """A file, or a package by its `__init__.py`, opened as a host opens it.

    Args:
        doubles: what the host's modules hold, as long as this lasts.
    """
    name = path.parent.name if path.stem == "__init__" else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.MonkeyPatch.context() as patch:
        for module, content in doubles.items():
            double = types.ModuleType(module)
            vars(double).update(content)
            patch.setitem(sys.modules, module, double)
        opened = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, name, opened)
        try:
            spec.loader.exec_module(opened)
            yield opened
        finally:
            for part in [each for each in sys.modules if each.startswith(f"{name}.")]:
                del sys.modules[part]
