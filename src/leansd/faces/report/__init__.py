"""Reports: sections as data, written as one page that needs nothing else."""

from leansd.faces.report.page import write_page
from leansd.faces.report.sections import Chart, Grid, Listing, Prose, Section

__all__ = ["Chart", "Grid", "Listing", "Prose", "Section", "write_page"]
