"""A picture server: pipelines that share one model, each following the plan in its own thread.

pip install leansd fastapi uvicorn prometheus-client
python integrations/fastapi/server.py --model emoji --plan balanced --workers 2

curl localhost:8000/pictures --json '{"prompt": "a red apple"}' --output apple.png
curl localhost:8000/health
curl localhost:8000/metrics
"""

from __future__ import annotations

import asyncio
import copy
import io
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI, HTTPException, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field

import leansd
from leansd.core.devices import seed_generator
from leansd.errors import LeansdError
from leansd.evaluation.prompt_sets import choose_guidance

BUSY_SECONDS = 2
"""After how long a client who was sent away may ask again."""


class PictureRequest(BaseModel):
    """What a client asks for."""

    prompt: str = Field(min_length=1, max_length=2000)
    negative_prompt: str = Field("", max_length=2000)
    steps: int = Field(30, ge=1, le=150)
    guidance: float | None = Field(None, ge=0, le=30)
    seed: int = Field(0, ge=0, lt=2**63)


@dataclass(frozen=True)
class Picture:
    """What was drawn for one request."""

    png: bytes
    seconds: float
    fingerprint: str
    """Of the plan that the run followed."""
    calls: int
    """UNet calls of the run."""
    full_calls: int
    """Of these, those that computed the whole UNet."""


class Metrics:
    """What Prometheus reads, of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self.registry}
        self.pictures = Counter("leansd_pictures", "Pictures drawn.", **known)
        self.refused = Counter("leansd_refused", "Requests refused.", ["why"], **known)
        self.calls = Counter("leansd_unet_calls", "UNet calls.", ["kind"], **known)
        self.seconds = Histogram("leansd_picture_seconds", "Seconds a picture.", **known)
        self.waiting = Gauge("leansd_waiting", "Requests waiting or drawn now.", **known)


class PipelinePool:
    """Pipelines around one model, attached to one plan; each serves one thread at a time."""

    def __init__(
        self, pipe: Any, plan: leansd.Plan | str, workers: int, guidance: float | None = None
    ) -> None:
        self.plan, self.guidance = plan, guidance
        self.pipes = [pipe, *(share_pipeline(pipe) for _ in range(workers - 1))]
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="draw")
        self._free: SimpleQueue[tuple[Any, Any]] = SimpleQueue()

    def open(self) -> None:
        """Attach every pipeline to the plan."""
        for pipe in self.pipes:
            self._free.put((pipe, leansd.inherit_(pipe, self.plan)))

    def close(self) -> None:
        """Finish what is being drawn and leave the model as it was."""
        self.threads.shutdown()
        for pipe in self.pipes:
            leansd.release_(pipe)

    def draw(self, request: PictureRequest) -> Picture:
        """Draw one picture, in one of the pool's threads."""
        pipe, run = self._free.get()
        try:
            guidance = self.guidance if request.guidance is None else request.guidance
            options = {} if guidance is None else {"guidance_scale": guidance}
            start = time.perf_counter()
            drawn = pipe(
                request.prompt,
                negative_prompt=request.negative_prompt or None,
                num_inference_steps=request.steps,
                # Of the CPU, so that a seed means one picture on every device.
                generator=seed_generator(request.seed),
                **options,
            )
            seconds = time.perf_counter() - start
            report = run.report()
            file = io.BytesIO()
            drawn.images[0].save(file, format="PNG")
            followed = report.plan.fingerprint
            return Picture(file.getvalue(), seconds, followed, report.calls, report.full_calls)
        finally:
            self._free.put((pipe, run))


def share_pipeline(pipe: Any) -> Any:
    """Another pipeline around the same networks, with what a thread needs for itself."""
    own = {
        name: copy.deepcopy(part)
        for name, part in pipe.components.items()
        if name == "scheduler" or name.startswith("tokenizer")
    }
    options = {"requires_safety_checker": False} if "safety_checker" in pipe.components else {}
    other = type(pipe)(**{**pipe.components, **own}, **options)
    other.set_progress_bar_config(disable=True)
    return other


def create_app(
    pipe: Any,
    plan: leansd.Plan | str = "balanced",
    *,
    workers: int = 1,
    waiting: int = 16,
    guidance: float | None = None,
) -> FastAPI:
    """A server that draws with `pipe` under `plan`.

    Args:
        workers: how many pictures are drawn at the same time.
        waiting: how many requests there may be; further ones get status 503 at once.
        guidance: the scale of requests that name none; the pipeline's own by default.
    """
    pool, metrics = PipelinePool(pipe, plan, workers, guidance), Metrics()
    name = str(getattr(plan, "name", plan))
    metrics.waiting.set(0)
    present = 0

    @asynccontextmanager
    async def serve(_: FastAPI) -> AsyncIterator[None]:
        pool.open()
        yield
        pool.close()

    app = FastAPI(title="leansd", version=leansd.__version__, lifespan=serve)

    @app.post("/pictures", response_class=Response)
    async def draw_picture(request: PictureRequest) -> Response:
        nonlocal present
        if present >= waiting:
            metrics.refused.labels("busy").inc()
            again = {"Retry-After": str(BUSY_SECONDS)}
            raise HTTPException(503, "the server is busy; ask again later", headers=again)
        present += 1
        metrics.waiting.set(present)
        try:
            loop = asyncio.get_running_loop()
            made = await loop.run_in_executor(pool.threads, pool.draw, request)
        except (LeansdError, ValueError) as error:
            metrics.refused.labels("wrong").inc()
            raise HTTPException(422, str(error)) from error
        finally:
            present -= 1
            metrics.waiting.set(present)
        metrics.pictures.inc()
        metrics.seconds.observe(made.seconds)
        metrics.calls.labels("full").inc(made.full_calls)
        metrics.calls.labels("inherited").inc(made.calls - made.full_calls)
        headers = {
            "X-Plan": name,
            "X-Plan-Fingerprint": made.fingerprint,
            "X-Seconds": f"{made.seconds:.3f}",
            "X-UNet-Calls": f"{made.full_calls} of {made.calls}",
        }
        return Response(made.png, media_type="image/png", headers=headers)

    @app.get("/health")
    async def tell_health() -> dict[str, Any]:
        return {"status": "ok", "plan": name, "workers": workers, "waiting": present}

    @app.get("/metrics", response_class=Response)
    async def tell_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    return app


def main(
    model: Annotated[str, typer.Option(help="What leansd.load opens.")] = "emoji",
    plan: Annotated[str, typer.Option(help="A preset, or the path of a plan.")] = "balanced",
    workers: Annotated[int, typer.Option(min=1, help="Pictures at the same time.")] = 1,
    waiting: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 16,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Serve pictures until stopped."""
    try:
        app = create_app(
            leansd.load(model),
            plan,
            workers=workers,
            waiting=waiting,
            guidance=choose_guidance(model),
        )
    except LeansdError as error:
        raise SystemExit(f"error: {error}") from None
    uvicorn.run(app, host=host, port=port)


if __name__ == "__main__":
    typer.run(main)
