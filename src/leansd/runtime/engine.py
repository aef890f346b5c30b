"""The engine: woven around one UNet, it makes every call follow the plan of whoever calls.

A UNet call is placed by an attachment's clock, becomes a `Pass`, and the units ask that pass what
to do. Whatever is unexpected (another batch, size, dtype or device, a call out of order) makes a
call a full one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.reading import read_anatomy
from leansd.plans.address import get_layer
from leansd.plans.anatomy import HEAD, Anatomy
from leansd.plans.row import Attend
from leansd.runtime.graphs import Graphs, Slot, freeze
from leansd.runtime.guidance import (
    complete,
    exchange,
    keep_difference,
    run_apart,
    take_conditional,
    wrap_output,
)
from leansd.runtime.nets import select_residuals
from leansd.runtime.outlines import Outlines
from leansd.runtime.passes import Pass, Step
from leansd.runtime.report import start_lap
from leansd.runtime.weave import EndOfCall, Weave, exchange_forward
from leansd.surgery.parts.gri import attend, call_at_size, find_processor

if TYPE_CHECKING:
    from leansd.runtime.attachment import Attachment

UNET = "unet"
LOCK = threading.Lock()
"""Held while UNets are woven, and taken off again."""


class Link(NamedTuple):
    """Where a woven module hangs, so that another one in its place is noticed."""

    children: Mapping[str, torch.nn.Module | None]
    """Those of the module above it, by name."""
    name: str
    child: torch.nn.Module | None


class Engine:
    """Woven around one UNet while anything is attached to it."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        self.anatomy: Anatomy = read_anatomy(unet)
        self._channels = self.anatomy[HEAD].channels[1]
        self.attachments: tuple[Attachment, ...] = ()
        self.guests: tuple[Attachment, ...] = ()
        """Attachments of other UNets whose plans run this one at some steps."""
        self.outlines = Outlines(unet, self.anatomy)
        self._active = threading.local()
        self._traced = Slot()
        self._graphs: dict[object, Graphs] = {}
        self._blocks = _list_block_outputs(self.anatomy)
        self._paths = self._list_paths()
        self._links = self._list_links()
        self._end_of_call = EndOfCall(unet, self._end_call)
        # Last: from here on other threads come in.
        self.weave = Weave(self._list_modules(), self._around)

    def release(self) -> None:
        """Take everything off the UNet."""
        self._end_of_call.release()
        self.weave.release()

    def resume(self) -> bool:
        """Weave once more after a release; False where the UNet is not what it was."""
        if read_anatomy(self.unet).fingerprint != self.anatomy.fingerprint:
            return False
        if not self.weave.resume(self._list_modules()):
            return False
        self._links = self._list_links()
        self._end_of_call = EndOfCall(self.unet, self._end_call)
        return True

    def _list_paths(self) -> dict[str, str]:
        """By name, the paths of the modules to weave; that of the UNet itself is empty."""
        paths = {UNET: ""}
        paths.update((block, path) for block, (path, _, _) in self._blocks.items())
        paths.update((unit.at, unit.path) for unit in (*self.anatomy.units, *self.anatomy.parts))
        return paths

    def _list_modules(self) -> dict[str, torch.nn.Module]:
        return {name: self.unet.get_submodule(path) for name, path in self._paths.items()}

    def _list_links(self) -> list[Link]:
        links: list[Link] = []
        for path in filter(None, self._paths.values()):
            parent, _, name = path.rpartition(".")
            children = self.unet.get_submodule(parent)._modules
            links.append(Link(children, name, children.get(name)))
        return links

    def _mend(self) -> None:
        """Weave what has been put in the place of woven modules: peft wraps and unwraps layers."""
        if all(children.get(name) is child for children, name, child in self._links):
            return
        with LOCK:
            if self.attachments or self.guests:  # not released meanwhile
                self.weave.renew(self._list_modules())
                self._links = self._list_links()

    def pick_latents(self, sample: torch.Tensor) -> torch.Tensor:
        """The channels [B, C, H, W] of the UNet's input that its output stands for.

        Masks and other pictures follow them.
        """
        return sample[:, : self._channels]

    def _around(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name == UNET:
            return self._run_unet(forward, *args, **kwargs)
        step: Step | None = getattr(self._find_slot(), "step", None)
        if step is None:
            return forward(*args, **kwargs)
        if name in self._blocks:
            return self._run_block(step, name, forward, *args, **kwargs)
        by = step.call.attend.get(name)
        if by is not None:
            forward = self._gate(name, by, forward)
        return step.run_unit(name, forward, *args, **kwargs)

    def _gate(self, name: str, by: Attend, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a self-attention that attends otherwise in this call."""
        attention: Any = self.unet.get_submodule(self._paths[name])
        processor = find_processor(attention, by)
        if processor is None:
            return forward
        return exchange_forward(forward, functools.partial(attend, attention, processor))

    def _run_unet(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        guest: tuple[Attachment, Step] | None = vars(self._active).pop("guest", None)
        if guest is not None:
            return self._follow(*guest, forward, *args, **kwargs)
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        attachment = find_attachment(self.attachments, timestep)
        self._active.last = attachment
        self._mend()
        step = attachment.begin(self, sample, timestep) if attachment is not None else None
        if attachment is None or step is None:
            return forward(*args, **kwargs)
        text = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
        attachment.note_size(sample, text)
        host = attachment.find_host(step.call.net)
        run = self._follow if host is None else host.receive
        end_lap = start_lap(sample.device)
        try:
            output = run(attachment, step, forward, *args, **kwargs)
        except BaseException:
            attachment.abort()
            raise
        attachment.end(step, end_lap())
        return output

    def receive(
        self,
        attachment: Attachment,
        step: Step,
        instead: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A call of this UNet `instead` of the one that a pipeline has called."""
        self._mend()
        self._active.guest = attachment, step
        kwargs = select_residuals(kwargs, attachment.unet, self.unet)
        try:
            # The module, not its forward: what is hooked to it, offloading for one, comes along.
            return self.unet(*args, **kwargs)
        finally:
            vars(self._active).pop("guest", None)

    def _follow(
        self,
        attachment: Attachment,
        step: Step,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """One call of this UNet, compiled where that is asked for and possible."""
        sample = args[0] if args else kwargs["sample"]
        step.writable = self._has_freeu() or _adds_in_place(kwargs)
        if not isinstance(step, Pass):
            return self.run_lanes(step, forward, *args, **kwargs)
        if not (step.shapes or step.records):
            step.shapes.update(self.outlines.make_shapes(sample))
        graphs = self._find_graphs(attachment)
        if graphs is not None and graphs.take(step, sample):
            return graphs.run(step, forward, *args, **kwargs)
        return self.run_lanes(step, forward, *args, **kwargs)

    def _end_call(self) -> None:
        """A pipeline call is over in this thread, also one that was interrupted: keep nothing."""
        last: Attachment | None = getattr(self._active, "last", None)
        self._active.last = None
        if last is not None and last.pipe is not None:
            last.abort()

    def run_lanes(self, step: Step, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The UNet's forward for the lanes that run, with its units following `step`."""
        slot = self._find_slot()
        slot.step = step
        run: Callable[..., Any] = run_step
        if step.call.attend:
            # A gate to GRI has to know what feature map its tokens are.
            height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
            run = functools.partial(call_at_size, (height, width), run_step)
        try:
            return run(step, forward, *args, **kwargs)
        finally:
            slot.step = None

    def _find_slot(self) -> Any:
        """Where units find their pass: one place a thread, or that of the call being traced."""
        return self._traced if torch.compiler.is_dynamo_compiling() else self._active

    def _find_graphs(self, attachment: Attachment) -> Graphs | None:
        """The graphs of all attachments that compile with the same options."""
        options = attachment.compile_options
        if options is None:
            return None
        key = freeze(options)
        if key not in self._graphs:
            with LOCK:
                self._graphs.setdefault(key, Graphs(self, options))
        return self._graphs[key]

    def _has_freeu(self) -> bool:
        """Whether FreeU is on: its up blocks multiply what comes in in place."""
        return any(getattr(block, "b1", None) is not None for block in self.unet.up_blocks)

    def _run_block(
        self, step: Step, block: str, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A block with nothing to compute returns at once: it would join skips for nobody."""
        _, units, outputs = self._blocks[block]
        if step.skips(units) and kwargs.get("additional_residuals") is None:
            given = tuple(step.give(at) for at in outputs)
            return (given[-1], given) if block.startswith("dn") else given[-1]
        return forward(*args, **kwargs)


def find_attachment(attachments: Sequence[Attachment], timestep: Any) -> Attachment | None:
    """Whose call this is: by the scheduler that the time step is a view of, else by thread."""
    for attachment in attachments:
        if attachment.get_clock().owns(timestep):
            return attachment
    if _is_view(timestep):
        # Part of another scheduler's course, so no attached pipeline's.
        attachments = [each for each in attachments if each.pipe is None]
    here = threading.get_ident()
    mine = [each for each in attachments if each.thread == here]
    loose = mine or [each for each in attachments if each.thread is None]
    return loose[-1] if len(loose) == 1 else None


def _adds_in_place(kwargs: dict[str, Any]) -> bool:
    """Whether the UNet's forward will add a T2I-Adapter's features in place."""
    if kwargs.get("down_intrablock_additional_residuals") is not None:
        return True
    return (
        kwargs.get("down_block_additional_residuals") is not None
        and kwargs.get("mid_block_additional_residual") is None
    )


def _is_view(timestep: Any) -> bool:
    """Whether a time step is an element of a longer tensor."""
    if not isinstance(timestep, torch.Tensor):
        return False
    return timestep.untyped_storage().nbytes() > timestep.element_size()


def run_step(step: Step, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the UNet gives, or would give, for the whole batch, with `forward` for what runs."""
    output = _run_forward(step, forward, *args, **kwargs)
    corrects = any(call.corrects for call in step.calls)
    return exchange(output, step.correct(output[0])) if corrects else output


def _run_forward(step: Step, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The same, not yet corrected."""
    if step.skips_unet:
        forward = functools.partial(_give_output, step)
    if isinstance(step, Pass) and step.apart is not None:
        return run_apart(step, forward, *args, **kwargs)
    if step.call.is_half:
        batch = (args[0] if args else kwargs["sample"]).shape[0]
        args, kwargs = take_conditional(args, batch), take_conditional(kwargs, batch)
        return complete(step, forward(*args, **kwargs))
    output = forward(*args, **kwargs)
    keep_difference(step, output[0])
    return output


def _give_output(step: Step, *args: Any, **kwargs: Any) -> Any:
    """What the UNet's forward would return, made from what is kept alone."""
    return wrap_output(step.give(HEAD), args, kwargs)


def _list_block_outputs(
    anatomy: Anatomy,
) -> dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """For every block, its module path, its units and those whose outputs the block returns.

    A down block returns what each of its layers and its downsampler gave, for the skips; a mid or
    up block what its last unit gave.
    """
    table: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {}
    for block in anatomy.blocks:
        units = anatomy.select(block).addresses
        ends = {get_layer(at): at for at in units}
        outputs = tuple(ends.values()) if block.startswith("dn") else units[-1:]
        path = anatomy[units[0]].path.rsplit(".", 2)[0]
        table[block] = (path, units, outputs)
    return table
