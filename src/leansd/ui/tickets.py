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

PAUSE = 0.1
"""Seconds between two messages that are handed on: a page cannot show more."""


class Stopped(Exception):
    """The work was stopped by who asked for it."""


@dataclass(eq=False)
class Ticket:
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
def stopping(unet: Any, ticket: Ticket) -> Iterator[None]:
    """Inside, every call of a UNet asks whether to go on: for work that has no steps of its own."""
    handle = unet.register_forward_pre_hook(lambda module, given: ticket.check())
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Done(Generic[Result]):
    """The last that is told of work: what came of it."""

    result: Result


def follow(
    work: Callable[[Callable[[Message], None]], Result],
) -> Iterator[Message | Done[Result]]:
    """Do `work` in a thread of its own and hand on what it tells, at last its result.

    Where it tells more than a page can show, only the latest message is handed on. What the work
    raises is raised here. Left early, the work goes on to its end: a `Ticket` stops it.
    """
    told: queue.SimpleQueue[Message | Done[Result] | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            told.put(Done(work(told.put)))
        except BaseException as error:  # handed over to who waits
            told.put(error)

    threading.Thread(target=run, name="leansd-work", daemon=True).start()
    while True:
        for message in _take_latest(told):
            if isinstance(message, BaseException):
                raise message
            yield message
            if isinstance(message, Done):
                return
        time.sleep(PAUSE)


def _take_latest(told: queue.SimpleQueue[Any]) -> list[Any]:
    """The latest message, and what ends the work if that came."""
    messages = [told.get()]
    while not told.empty():
        messages.append(told.get())
    ends = [each for each in messages if isinstance(each, (Done, BaseException))]
    others = [each for each in messages if not isinstance(each, (Done, BaseException))]
    return [*others[-1:], *ends]


@dataclass
class Desk:
    """The tickets that are out: one a session, and no more than a limit at once."""

    limit: int
    _tickets: dict[str, Ticket] = field(default_factory=dict[str, Ticket])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def issue(self, session: str) -> Ticket:
        """A ticket for the next piece of work of a session.

        Raises:
            LeansdError: too many are waiting, or the session's last one is not done.
        """
        with self._lock:
            if session in self._tickets:
                raise LeansdError("your last run is not over: stop it, or wait for it")
            if len(self._tickets) >= self.limit:
                raise LeansdError(
                    f"{self.limit} runs are waiting or running, and that is the limit: try again "
                    "when one is over"
                )
            ticket = self._tickets[session] = Ticket()
            return ticket

    def find(self, session: str) -> Ticket:
        """The session's ticket; one that is stopped where it was closed meanwhile."""
        with self._lock:
            ticket = self._tickets.get(session)
        if ticket is None:
            ticket = Ticket()
            ticket.stop()
        return ticket

    def stop(self, session: str) -> bool:
        """Stop the session's work at its next step; False where there is none."""
        with self._lock:
            ticket = self._tickets.get(session)
        if ticket is not None:
            ticket.stop()
        return ticket is not None

    def close(self, session: str) -> None:
        """The session's work is over."""
        with self._lock:
            ticket = self._tickets.pop(session, None)
        if ticket is not None:
            ticket.stop()

    @property
    def waiting(self) -> int:
        """Tickets that are out."""
        return len(self._tickets)
