"""UNets read into addresses, and what each unit of them costs."""

from leansd.anatomy.counting import Ledger, count_macs, dissect
from leansd.anatomy.inputs import make_inputs
from leansd.anatomy.reading import read_anatomy

__all__ = ["Ledger", "count_macs", "dissect", "make_inputs", "read_anatomy"]
