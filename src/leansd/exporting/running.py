"""An exported UNet in the place of a pipeline's own, following its plan."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from leansd.errors import LeansdError
from leansd.exporting.folder import PLAN, read_table
from leansd.exporting.graphs import list_given, name_feature
from leansd.exporting.sessions import Session, require_packages
from leansd.exporting.tracing import ADDED, AXES, NOISE
from leansd.loading import load_outline
from leansd.plans.anatomy import HEAD
from leansd.plans.liveness import GUIDANCE, Kept
from leansd.plans.plan import Plan
from leansd.runtime.attachment import Attachment
from leansd.runtime.engine import Engine, run_step
from leansd.runtime.guidance import wrap_output
from leansd.runtime.passes import Pass
from leansd.runtime.report import Report, start_lap


def load_onnx(
    folder: str | Path, pipe: Any | None = None, *, providers: Sequence[str] | None = None
) -> OnnxUNet:
    """An exported UNet, to be put in a pipeline: `pipe.unet = leansd.load_onnx(folder, pipe)`.

    Args:
        folder: what `leansd.export(..., to="onnx")` wrote.
        pipe: the pipeline that will call it, whose scheduler lays out the runs; without one, a run
            starts where the time step rises.
        providers: execution providers of ONNX Runtime; all it has by default.

    Raises:
        LeansdError: the folder holds no export, or ONNX Runtime is missing or cannot open it.
    """
    require_packages()
    home = Path(folder).expanduser()
    table = read_table(home)
    plan = Plan.load(home / PLAN) if (home / PLAN).is_file() else None
    sessions = {entry.given: Session(home / entry.file, providers) for entry in table.graphs}
    return OnnxUNet(load_outline(home), sessions, plan, pipe)


class OnnxUNet:
    """A UNet run by ONNX Runtime, called as pipelines call a `UNet2DConditionModel`."""

    def __init__(
        self,
        outline: UNet2DConditionModel,
        sessions: Mapping[tuple[str, ...], Session],
        plan: Plan | None = None,
        pipe: Any | None = None,
    ) -> None:
        self.config = outline.config
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.plan = plan
        width = outline.config.projection_class_embeddings_input_dim
        # SDXL's pipelines ask the module itself for the width of their added conditions.
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        self._sessions = sessions
        self._attachment = Attachment(outline, pipe, plan) if plan is not None else None
        self._engine = Engine(outline)
        self._engine.release()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The UNet's output for `sample` [B, C, H, W], as its own forward returns it.

        Raises:
            LeansdError: an argument is given that the graphs do not take, such as the residuals of
                a ControlNet, or the plan is for another number of steps.
        """
        attachment = self._attachment
        arguments = _bind(*args, **kwargs)
        sample, timestep = arguments["sample"], arguments["timestep"]
        step = None
        if attachment is not None:
            step = attachment.begin(self._engine, sample, timestep)
        if attachment is None or step is None:
            return self._run_whole(**arguments)
        attachment.note_size(sample, arguments["encoder_hidden_states"])
        end_lap = start_lap(sample.device)
        try:
            assert isinstance(step, Pass)
            output = run_step(step, partial(self._run_graph, step), **arguments)
        except BaseException:
            attachment.abort()
            raise
        attachment.end(step, end_lap())
        return output

    def report(self) -> Report:
        """What the last run did, kept and gained.

        Raises:
            LeansdError: it was exported without a plan, or nothing has run yet.
        """
        if self._attachment is None:
            raise LeansdError("exported without a plan: every call computes everything")
        return self._attachment.report()

    def _reset_stateful_cache(self) -> None:
        """What pipelines call at the end of a call: keep nothing."""
        if self._attachment is not None and self._attachment.pipe is not None:
            self._attachment.abort()

    def _run_whole(self, **arguments: Any) -> Any:
        (noise,) = self._sessions[()].run(_flatten(arguments), [NOISE])
        return wrap_output(noise.to(arguments["sample"].dtype), (), arguments)

    def _run_graph(self, step: Pass, **arguments: Any) -> Any:
        """What the UNet's forward returns in this call; what the call keeps goes to the store."""
        given = {
            name_feature((at, what)): step.make(at, "reuse") if what == "change" else step.give(at)
            for at, what in list_given(step.call.pattern)
        }
        keeps = [kept for at in step.call.keeps if at != GUIDANCE for kept in step.list_keeps(at)]
        inside = dict.fromkeys(_name(kept) for kept in keeps if kept.unit != HEAD)
        session = self._sessions[tuple(given)]
        noise, *made = session.run(_flatten(arguments) | given, [NOISE, *inside])
        noise = noise.to(arguments["sample"].dtype)
        made = dict(zip(inside, made, strict=True))
        # The UNet's own output is no feature of the graph, and nor is what it adds to the latents.
        made |= {HEAD: noise, f"{HEAD}.change": noise - step.latents}
        for kept in keeps:
            step.branch.store.keep(kept, step.pick(made[_name(kept)], kept.lane))
        return wrap_output(noise, (), arguments)


def _name(kept: Kept) -> str:
    return name_feature((kept.unit, kept.what))


SIGNATURE = inspect.signature(UNet2DConditionModel.forward)


def _bind(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, those left out that are None.

    Raises:
        LeansdError: one is given that no graph takes.
    """
    given = dict(SIGNATURE.bind(None, *args, **kwargs).arguments)
    arguments = {name: each for name, each in given.items() if name != "self" and each is not None}
    added = arguments.get("added_cond_kwargs") or {}
    known = (*AXES, "added_cond_kwargs", "return_dict")
    refused = [name for name, each in arguments.items() if name not in known and each != {}]
    refused += [name for name, each in added.items() if name not in ADDED and each is not None]
    if refused:
        raise LeansdError(
            f"an exported UNet takes no {refused[0]}: use the pipeline with its own UNet for that"
        )
    return {name: arguments[name] for name in known if name in arguments}


def _flatten(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Arguments of the UNet as inputs of a graph.

    Raises:
        LeansdError: the time steps of a batch differ.
    """
    times = torch.as_tensor(arguments["timestep"], dtype=torch.float32).flatten()
    if (times != times[0]).any():
        raise LeansdError("an exported UNet takes one time step for the whole batch")
    return {
        "sample": arguments["sample"],
        "timestep": times[0],
        "encoder_hidden_states": arguments["encoder_hidden_states"],
        **(arguments.get("added_cond_kwargs") or {}),
    }
