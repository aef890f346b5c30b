"""Serving the page: on this machine only by default, and asking nobody else for anything."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Base, Default
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leansd.errors import LeansdError
from leansd.plans.grid import get_states
from leansd.report.figures import declare_colours
from leansd.ui.handlers import Handlers, connect
from leansd.ui.job_queue import JobQueue
from leansd.ui.page import ASSETS, CLOSE_LISTS, lay_out
from leansd.ui.studio import Studio

MOST_UPLOADED = "1mb"
"""The largest plan file; nothing else is uploaded."""
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]

POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "connect-src 'self'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
"""What browsers may fetch: only from the server that the page came from."""

# What gradio's own template would fetch, or prepare to, from other servers.
_FOREIGN = re.compile(
    rb"""<link[^>]*?(?:https?:)?//(?:fonts\.|cdn)[^>]*>"""
    rb"""|<script[^>]*?src=["'](?:https?:)?//[^>]*>\s*</script>"""
)


@dataclass(frozen=True)
class Door:
    """Where the page is reached."""

    host: str = "127.0.0.1"
    port: int | None = None
    """The first free one from 7860 on by default."""
    share: bool = False
    """Whether gradio's tunnel makes it public."""


def make_theme() -> Base:
    """Calm, with the fonts that the visitor's machine has."""
    return Default(
        primary_hue="blue",
        neutral_hue="gray",
        radius_size="md",
        font=FONTS,
        font_mono=MONO,
    ).set(button_primary_background_fill="*primary_600", block_label_text_size="*text_sm")


@contextmanager
def serving(studio: Studio, door: Door, *, limit: int) -> Iterator[str]:
    """Serve the page from a thread of its own inside a `with` block; gives its address.

    Args:
        limit: how many runs may wait or run at once; one runs at a time.
    """
    folders = studio.folders
    for folder in (folders.plans, folders.history):
        folder.mkdir(parents=True, exist_ok=True)
    # What is uploaded and shown passes through a folder that goes when the page does.
    scratch = Path(tempfile.mkdtemp(prefix="leansd-ui-")).resolve()
    known = {name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "GRADIO_CACHE_DIR")}
    os.environ |= dict.fromkeys(known, str(scratch))
    parts = lay_out(folders.list_models())
    blocks: gr.Blocks = parts.blocks
    with blocks:
        connect(parts, Handlers(studio, JobQueue(limit), parts))
    shown = [folders.plans, folders.history]
    # Shared, gradio's own page fetches its files from gradio's server.
    guards = [] if door.share else [Middleware(Guard)]
    try:
        # Chains of handlers stand in the queue for a moment as well, hence the room.
        blocks.queue(max_size=4 * limit + 16, default_concurrency_limit=4)
        _, local, shared = blocks.launch(
            server_name=door.host,
            server_port=door.port,
            share=door.share,
            prevent_thread_lock=True,
            quiet=True,
            inbrowser=False,
            show_error=True,
            ssr_mode=False,
            max_file_size=MOST_UPLOADED,
            allowed_paths=[str(folder) for folder in shown],
            theme=make_theme(),
            css=read_style(),
            js=CLOSE_LISTS,
            footer_links=[],
            run_history=False,
            app_kwargs={
                "middleware": [Middleware(Fence, folders=[*shown, scratch]), *guards],
                "docs_url": None,
                "redoc_url": None,
                "openapi_url": None,
            },
        )
        yield shared or local
    except OSError as error:
        raise LeansdError(
            f"cannot listen on {door.host}{f':{door.port}' if door.port else ''}: {error}; give "
            "another --port or --host"
        ) from error
    finally:
        blocks.close(verbose=False)
        shutil.rmtree(scratch, ignore_errors=True)
        for name, value in known.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Fence:
    """Hands out files from some folders only, links followed, and passes no request on."""

    def __init__(self, app: ASGIApp, folders: Sequence[Path]) -> None:
        self.app = app
        self.folders = [folder.resolve() for folder in folders]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.allows(scope["path"]):
            await PlainTextResponse("not among the folders of this page", 403)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def allows(self, path: str) -> bool:
        """Whether what a request asks for may be handed out."""
        if "/proxy=" in path:
            return False
        found = _FILE.search(path)
        if found is None:
            return True
        try:
            file = Path(found[1]).resolve()
        except (OSError, ValueError):  # as with a zero byte in it
            return False
        return any(file.is_relative_to(folder) for folder in self.folders)


_FILE = re.compile(r"/file(?:=|/)(.*)", re.DOTALL)


class Guard:
    """Takes what would be fetched elsewhere out of pages, and tells browsers to fetch nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def pass_on(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
                if _is_page(message):
                    start = message
                    return
            elif start is not None and message["type"] == "http.response.body":
                body += message.get("body", b"")
                if message.get("more_body"):
                    return
                page = _FOREIGN.sub(b"", body)
                await send(_resize(start, len(page)))
                message = {**message, "body": page}
            await send(message)

        await self.app(scope, receive, pass_on)


_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def _is_page(message: Any) -> bool:
    headers = {name.lower(): value for name, value in message["headers"]}
    plain = b"content-encoding" not in headers
    return plain and headers.get(b"content-type", b"").startswith(b"text/html")


def _resize(start: Any, length: int) -> Message:
    kept = [each for each in start["headers"] if each[0].lower() != b"content-length"]
    return {**start, "headers": [*kept, (b"content-length", str(length).encode())]}


def read_style() -> str:
    """The page's style, in the colours of the reports and of the states of cells."""
    own = (ASSETS / "page.css").read_text(encoding="utf-8")
    states = "\n".join(
        f"i.{name}, td.cell.{name} {{ background: var(--{name}); }}" for name in get_states()
    )
    return (
        f":root {{ {declare_colours('light')} }}\n.dark {{ {declare_colours('dark')} }}\n{own}\n"
        f"{states}"
    )
