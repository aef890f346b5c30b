"""Pages, read strictly: what they would fetch, and whether they are well made."""

import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br", "hr", "link", "input", "col", "wbr", "source"}
BLOCKS = {"p", "h1", "h2", "dt", "dd", "li", "figcaption", "th", "td"}
NOT_IN_P = {"p", "div", "ul", "ol", "dl", "table", "section", "figure", "h1", "h2", "nav"}


class Page(HTMLParser):
    """What a page holds; elements close in order, ids are unique, attributes come once."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.figures: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.words: dict[str, list[str]] = {}
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"an attribute of {tag} comes twice"
        given = dict(attrs)
        assert not [name for name in names if name.startswith("on")], "no handlers"
        assert not ("p" in self.open and tag in NOT_IN_P), f"{tag} in a paragraph"
        self.tags.append(tag)
        for name in ("src", "srcset", "poster", "data", "xlink:href", "action"):
            if given.get(name):
                self.fetched.append(str(given[name]))
        if given.get("href"):
            (self.links if tag == "a" else self.fetched).append(str(given["href"]))
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag == "img":
            self.images.append(given)
        if tag == "svg":
            self.figures.append(given)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open or tag in VOID, f"<{tag}/> outside of a drawing"
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.words.setdefault(self.open[-1], []).append(data)


def parse_page(text: str) -> Page:
    """Read a page, and see that it fetches nothing and is well made."""
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert text.startswith("<!DOCTYPE html>")
    assert len(set(page.ids)) == len(page.ids), "ids are unique"
    anchors = {link for link in (*page.links, *page.fetched) if link.startswith("#")}
    assert {link[1:] for link in anchors} <= set(page.ids), "every link within leads somewhere"
    elsewhere = [link for link in (*page.links, *page.fetched) if not link.startswith("#")]
    assert all(link.startswith("data:") for link in elsewhere), "nothing is fetched"
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"url\(|@import|javascript:", text)
    assert page.tags.count("h1") == 1
    return page


def read_page(path: Path) -> tuple[Page, str]:
    """A page of a file, and its text."""
    text = path.read_text()
    return parse_page(text), text
