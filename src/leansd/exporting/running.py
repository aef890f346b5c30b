"""An exported UNet in the place of a pipeline's own, following its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from leansd.core.devices import start_stopwatch
from leansd.errors import LeansdError
from leansd.exporting.folder import PLAN, read_table
from leansd.exporting.graphs import (
    ADDED,
    AXES,
    NOISE,
    Session,
    list_given,
    name_feature,
    require_packages,
)
from leansd.loading import load_outline
from leansd.plans.anatomy import HEAD
from leansd.plans.liveness import GUIDANCE, Kept
from leansd.plans.plan import Plan
from leansd.runtime.call import UNetArguments, UNetCall
from leansd.runtime.guidance import run_step, wrap_output
from leansd.runtime.report import Report
from leansd.runtime.run import Follower


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
        width = outline.config.get("projection_class_embeddings_input_dim")
        # SDXL's pipelines ask the module itself for the width of their added conditions.
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        self._sessions = sessions
        self._follower = Follower(outline, pipe, plan) if plan is not None else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The UNet's output for `sample` [B, C, H, W], as its own forward returns it.

        Raises:
            LeansdError: an argument is given that the graphs do not take, such as the residuals of
                a ControlNet, or the plan is for another number of steps.
        """
        follower, arguments = self._follower, _bind(*args, **kwargs)
        step = follower.start_call(arguments) if follower is not None else None
        if follower is None or step is None:
            return self._run_whole(arguments)
        ((own, _),) = step.split(arguments.sample)
        stop = start_stopwatch(arguments.sample.device)
        try:
            output = run_step(step, arguments, partial(self._run_graph, own))
        except BaseException:
            follower.abort()
            raise
        follower.end_call(step, output[0], stop())
        return output

    def report(self) -> Report:
        """What the last run did, kept and gained.

        Raises:
            LeansdError: it was exported without a plan, or nothing has run yet.
        """
        if self._follower is None:
            raise LeansdError("exported without a plan: every call computes everything")
        return self._follower.report()

    def _reset_stateful_cache(self) -> None:
        """What pipelines call at the end of a call: keep nothing."""
        if self._follower is not None and self._follower.pipe is not None:
            self._follower.end_run()

    def _run_whole(self, arguments: UNetArguments) -> Any:
        (noise,) = self._sessions[()].run(_flatten(arguments.named), [NOISE])
        return wrap_output(noise.to(arguments.sample.dtype), arguments)

    def _run_graph(self, step: UNetCall, *args: Any, **kwargs: Any) -> Any:
        """What the UNet's forward returns in this call; what the call keeps goes to the cache."""
        arguments = UNetArguments.bind(args, kwargs)
        given = {
            name_feature(each): step.fill_lanes(each[0]) for each in list_given(step.call.pattern)
        }
        keeps = [kept for at in step.call.keeps if at != GUIDANCE for kept in step.list_keeps(at)]
        inside = dict.fromkeys(_name(kept) for kept in keeps if kept.unit != HEAD)
        session = self._sessions[tuple(given)]
        noise, *made = session.run(_flatten(arguments.named) | given, [NOISE, *inside])
        noise = noise.to(arguments.sample.dtype)
        made = dict(zip(inside, made, strict=True))
        # The UNet's own output is no feature of the graph, and nor is what it adds to the latents.
        made |= {HEAD: noise, f"{HEAD}.change": noise - step.latents}
        for kept in keeps:
            step.branch.cache.keep(kept, step.pick(made[_name(kept)], kept.lane))
        return wrap_output(noise, arguments)


def _name(kept: Kept) -> str:
    return name_feature((kept.unit, kept.what))


def _bind(*args: Any, **kwargs: Any) -> UNetArguments:
    """The arguments of a call, without those that are None.

    Raises:
        LeansdError: one is given that no graph takes.
    """
    given = UNetArguments.bind(args, kwargs).named
    arguments = {name: each for name, each in given.items() if each is not None}
    added = arguments.get("added_cond_kwargs") or {}
    known = (*AXES, "added_cond_kwargs", "return_dict")
    refused = [name for name, each in arguments.items() if name not in known and each != {}]
    refused += [name for name, each in added.items() if name not in ADDED and each is not None]
    if refused:
        raise LeansdError(
            f"an exported UNet takes no {refused[0]}: use the pipeline with its own UNet for that"
        )
    return UNetArguments({name: arguments[name] for name in known if name in arguments})


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
