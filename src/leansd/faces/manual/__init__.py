"""The manual of the command line, made from the commands themselves."""

from leansd.faces.manual.composition import compose
from leansd.faces.manual.markdown import write_markdown
from leansd.faces.manual.pages import Page, read_pages
from leansd.faces.manual.roff import write_roff
from leansd.faces.manual.text import write_text

FORMS = {"text": write_text, "markdown": write_markdown, "roff": write_roff}
"""Each makes one text of sections."""

__all__ = ["FORMS", "Page", "compose", "read_pages"]
