"""The served example: real HTTP, several clients at once, one shared model."""

import io
import json
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import uvicorn
from integrations.fastapi import server
from PIL import Image

import leansd
from conformance.reference import is_plain
from leansd.plans.presets import PRESETS, SPEED_PRESETS
from leansd.plans.resolve import PlanContext, resolve_plan
from leansd.runtime.context import describe_runs
from leansd.runtime.samplers import set_sampler
from tiny import tiny_pipeline

PLAN = "balanced"
STEPS = 10


@contextmanager
def serve(app: Any) -> Iterator[str]:
    """The address of an app that listens on a free port."""
    served = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=served.run)
    thread.start()
    while not served.started:
        time.sleep(0.01)
    port = served.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        served.should_exit = True
        thread.join()


def ask(url: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def read_metrics(url: str) -> dict[str, float]:
    """Metrics by name and labels."""
    lines = ask(f"{url}/metrics")[2].decode().splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    }


def draw(pipe: Any, seed: int) -> bytes:
    """The picture that a client is to get, as raw pixels."""
    generator = torch.Generator().manual_seed(seed)
    image = pipe(f"a cat {seed}", num_inference_steps=STEPS, generator=generator).images[0]
    return image.tobytes()


def test_clients_at_once_get_what_each_would_get_alone() -> None:
    pipe = tiny_pipeline()
    with leansd.inherit(pipe, PLAN):
        expected = [draw(pipe, seed) for seed in range(4)]
    plain = draw(pipe, 0)
    with serve(server.create_app(pipe, PLAN, workers=2)) as url:
        wishes = [{"prompt": f"a cat {seed}", "steps": STEPS, "seed": seed} for seed in range(4)]
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda wish: ask(f"{url}/pictures", wish), wishes))
        got = [Image.open(io.BytesIO(png)).tobytes() for _, _, png in answers]
        metrics = read_metrics(url)
        health = json.loads(ask(f"{url}/health")[2])
    assert got == expected
    assert got[0] != plain
    assert all(status == 200 and headers["x-plan"] == PLAN for status, headers, _ in answers)
    followed = leansd.preset(PLAN, STEPS, sampler="ddim").fingerprint
    assert all(headers["x-plan-fingerprint"] == followed for _, headers, _ in answers)
    assert metrics["leansd_pictures_total"] == 4
    full, inherited = (
        metrics[f'leansd_unet_calls_total{{kind="{kind}"}}'] for kind in ("full", "inherited")
    )
    assert full + inherited == 4 * STEPS
    assert inherited > 0
    assert health == {"status": "ok", "plan": PLAN, "workers": 2, "waiting": 0}
    # Stopping the server leaves the model as it was.
    assert is_plain(pipe.unet)
    assert draw(pipe, 0) == plain


OTHERS = [
    name for name in PRESETS if name not in SPEED_PRESETS and not leansd.preset(name, 20).nets
]


@pytest.mark.parametrize(
    "names", [list(SPEED_PRESETS), pytest.param(OTHERS, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++2m", "deis"])
def test_a_preset_is_the_plan_that_it_is_everywhere(
    monkeypatch: pytest.MonkeyPatch, sampler: str, names: list[str]
) -> None:
    """However many steps a client asks for; of every run one step is drawn."""
    pipe: Any = tiny_pipeline()
    set_sampler(pipe, sampler)
    counted = leansd.dissect(pipe.unet)
    monkeypatch.setattr("leansd.runtime.report.dissect", lambda *_, **__: counted)
    text = torch.zeros(2, 7, pipe.unet.config.cross_attention_dim)

    def draw_step(self: Any, prompt: str, *, num_inference_steps: int, **_: Any) -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        with torch.no_grad():
            self.unet(torch.zeros(2, 4, 4, 4), self.scheduler.timesteps[0], text)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    monkeypatch.setattr(type(pipe), "__call__", draw_step)
    wish = {"prompt": "a cat"}
    for name in names:
        pool = server.PipelinePool(pipe, name, workers=1)
        pool.open()
        for steps in (8, 20, 30, 50):
            expected = resolve_plan(name, describe_runs(pipe, PlanContext(steps)))
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", UserWarning)
                made = pool.draw(server.PictureRequest.model_validate(wish | {"steps": steps}))
            assert made.fingerprint == expected.plan.fingerprint, (name, steps)
            assert [str(each.message) for each in told] == list(expected.notes)
        pool.close()


def test_a_client_beyond_the_limit_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()

    def draw_slowly(pool: Any, request: Any) -> server.Picture:
        begun.set()
        go.wait(60)
        return server.Picture(b"", 0.0, "", 1, 1)

    monkeypatch.setattr(server.PipelinePool, "draw", draw_slowly)
    with (
        serve(server.create_app(tiny_pipeline(), PLAN, waiting=1)) as url,
        ThreadPoolExecutor(1) as clients,
    ):
        first = clients.submit(ask, f"{url}/pictures", {"prompt": "a cat"})
        begun.wait(60)
        status, headers, _ = ask(f"{url}/pictures", {"prompt": "a dog"})
        go.set()
        assert first.result()[0] == 200
        assert status == 503
        assert headers["retry-after"] == str(server.BUSY_SECONDS)
        assert read_metrics(url)['leansd_refused_total{why="busy"}'] == 1


def test_a_plan_of_another_step_count_is_told_in_one_sentence() -> None:
    plan = leansd.Plan.every(2, cut="head", steps=STEPS)
    with serve(server.create_app(tiny_pipeline(), plan)) as url:
        status, _, body = ask(f"{url}/pictures", {"prompt": "a cat", "steps": STEPS + 2})
        assert status == 422
        assert f"is for {STEPS} steps, this run has {STEPS + 2}" in json.loads(body)["detail"]
        assert ask(f"{url}/pictures", {"prompt": "a cat", "steps": STEPS})[0] == 200


def test_wrong_wishes_are_told_and_the_server_goes_on() -> None:
    with serve(server.create_app(tiny_pipeline(), PLAN)) as url:
        for wish in ({}, {"prompt": ""}, {"steps": 0}, {"seed": -1}):
            assert ask(f"{url}/pictures", {"prompt": "a cat"} | wish if wish else {})[0] == 422
        assert ask(f"{url}/pictures", {"prompt": "a cat", "steps": STEPS})[0] == 200
