"""Plans at run time: hooks around a UNet, the step that is known, features kept and inherited."""

from leansd.runtime.attachment import Attachment, inherit, inherit_, release_
from leansd.runtime.hooks import ForwardHooks
from leansd.runtime.report import Report

__all__ = ["Attachment", "ForwardHooks", "Report", "inherit", "inherit_", "release_"]
