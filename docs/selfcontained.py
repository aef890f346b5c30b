"""Fails the build of a page that would fetch something from elsewhere when it is opened."""

import re
from typing import Any

from mkdocs.exceptions import PluginError

FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?(?P<src>(?:https?:)?//[^\"'\s>]+)"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect|icon|modulepreload))"
    r"[^>]*\bhref=[\"']?(?P<href>(?:https?:)?//[^\"'\s>]+)"
    r"|@import\s+(?:url\()?[\"']?(?P<style>(?:https?:)?//[^\"'\s)]+)"
)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The page as it is, if it needs nothing but the site itself."""
    for found in FETCHED.finditer(output):
        address = found["src"] or found["href"] or found["style"]
        raise PluginError(f"{page.file.src_uri} would fetch {address}: keep a copy under docs/")
    return output
