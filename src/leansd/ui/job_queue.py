"""Work that a page waits for: it tells as it goes, and stops at the next step when asked to."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from leansd.errors import LeansdError

Message = TypeVar("Message")
Result = TypeVar("Result")

PAUSE = 0.25
"""Seconds between two messages that are handed on: a page cannot show more."""


class Stopped(Exception):
    """The work was stopped by who asked for it."""


@dataclass(eq=False)
class Job:
    """One piece of work from when it is asked for: it may be stopped while it still waits."""

    _stop: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """Let the work end at its next step."""
        self._stop.set()

    @property
    def is_stopped(self) -> bool:
        return self._stop.is_set()

    def check(self) -> None:
        """Called at every step of the work.

        Raises:
            Stopped: it is to end here.
        """
        if self.is_stopped:
            raise Stopped

    @contextmanager
    def watching(self, unet: Any) -> Iterator[None]:
        """Inside, every call of a UNet asks whether to go on."""
        handle = unet.register_forward_pre_hook(lambda module, given: self.check())
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class Done(Generic[Result]):
    """The last message of work: its result."""

    result: Result


def follow(
    work: Callable[[Callable[[Message], None]], Result],
) -> Iterator[Message | Done[Result]]:
    """Do `work` in a thread of its own and hand on what it tells, at last its result.

    Where it tells more than a page can show, only the latest message is handed on. What the work
    raises is raised here. Left early, the work goes on to its end: a `Job` stops it.
    """
    told: queue.SimpleQueue[Message | Done[Result] | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            told.put(Done(work(told.put)))
        except BaseException as error:  # raised again by who waits
            told.put(error)

    threading.Thread(target=run, name="leansd-work", daemon=True).start()
    while True:
        messages = [told.get()]
        while not told.empty():
            messages.append(told.get())
        *others, last = messages
        if isinstance(last, BaseException):
            raise last
        if isinstance(last, Done) and others:
            yield others[-1]  # type: ignore[misc]
        yield last
        if isinstance(last, Done):
            return
        time.sleep(PAUSE)


@dataclass
class JobQueue:
    """The jobs of all sessions, at most `limit` of them, one a session."""

    limit: int
    _jobs: dict[str, Job] = field(default_factory=dict[str, Job])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, session: str) -> Job:
        """A job for the next piece of work of a session.

        Raises:
            LeansdError: too many are waiting, or the session's last one is not done.
        """
        with self._lock:
            if session in self._jobs:
                raise LeansdError("your last run is not over: stop it, or wait for it")
            if len(self._jobs) >= self.limit:
                raise LeansdError(
                    f"{self.limit} runs are waiting or running, and that is the limit: try again "
                    "when one is over"
                )
            job = self._jobs[session] = Job()
            return job

    def find(self, session: str) -> Job:
        """The session's job; one that is stopped where it was closed meanwhile."""
        job = self._jobs.get(session)
        if job is None:
            job = Job()
            job.stop()
        return job

    def stop(self, session: str) -> bool:
        """Stop the session's work at its next step; False where there is none."""
        job = self._jobs.get(session)
        if job is not None:
            job.stop()
        return job is not None

    def close(self, session: str) -> None:
        """The session's work is over, or nobody waits for it any more."""
        with self._lock:
            job = self._jobs.pop(session, None)
        if job is not None:
            job.stop()

    @property
    def waiting(self) -> int:
        """Jobs that wait or run."""
        return len(self._jobs)
