"""Reports: what a command found, as data; and the page that shows it and needs nothing else.

`sections` is what a report is made of, `page` writes it. `plans`, `measurements`, `nets` and
`training` make reports of results, from the figures of `drawings` and `plots`.
"""

from leansd.report.page import render_page, write_report
from leansd.report.sections import (
    AttachedFile,
    Chart,
    Drawing,
    Listing,
    PictureGrid,
    Prose,
    Provenance,
    ReportPage,
    Section,
    attach_records,
)

__all__ = [
    "AttachedFile",
    "Chart",
    "Drawing",
    "Listing",
    "PictureGrid",
    "Prose",
    "Provenance",
    "ReportPage",
    "Section",
    "attach_records",
    "render_page",
    "write_report",
]
