"""Plans at run time: weaving into a UNet, telling the step, keeping features, inheriting them."""

from leansd.runtime.attachment import Attachment
from leansd.runtime.inheritance import inherit, inherit_, release_
from leansd.runtime.report import Report
from leansd.runtime.weave import Weave

__all__ = ["Attachment", "Report", "Weave", "inherit", "inherit_", "release_"]
