"""Reports: what a command found, as data; and the page that shows it and needs nothing else.

`page` has what a report is made of, and writes it. `plans`, `measurements`, `nets` and
`training` make reports of results, from the figures of `drawings` and `plots`.
"""

from leansd.report.page import (
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
    render_page,
    write_report,
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
