"""Other processes for tests: clean ones, in which nothing has computed yet."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_incubation", "leansd.report.incubating"])


def start(work: Callable[..., None], *args: Any) -> BaseProcess:
    """Begin a function of a module in a process of one thread, as tests are run in."""
    with pytest.MonkeyPatch.context() as patch:
        # The server itself does not look where pytest found the tests' modules, and says nothing:
        # every process would import them, and PyTorch, anew.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    process = SERVER.Process(target=work_alone, args=(work, args))
    process.start()
    return process


def work_alone(work: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    work(*args)


def die() -> None:
    """End as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_moving(number: int) -> None:
    """End before the so many-th file is moved to its place from now on."""
    left, move = [number], os.replace

    def replace(*args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            die()
        move(*args)

    os.replace = replace  # type: ignore[assignment]


def run_until_dead(work: Callable[..., None], *args: Any) -> None:
    """Run what kills itself."""
    process = start(work, *args)
    process.join(280)
    assert process.exitcode == -signal.SIGKILL
