"""The manual of the command line, made from the commands themselves."""

from leansd.cli.manpages.composition import compose
from leansd.cli.manpages.markdown import write_markdown
from leansd.cli.manpages.pages import Page, read_pages
from leansd.cli.manpages.roff import write_roff
from leansd.cli.manpages.text import write_text

FORMS = {"text": write_text, "markdown": write_markdown, "roff": write_roff}
"""Each makes one text of sections."""

__all__ = ["FORMS", "Page", "compose", "read_pages"]
