"""Threads on one shared UNet, each with its own pipeline, scheduler, plan and step count."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import leansd
from conformance.cases import build_controlnet
from conformance.models import draw_picture, make_pipeline, small_unet
from conformance.reference import is_plain
from conformance.samplers import SAMPLERS, Sampler
from leansd.plans import Plan
from tiny import tiny_tokenizer

ROUNDS = 2


class Server(NamedTuple):
    """One user's pipeline with what it is asked to draw."""

    pipe: Any
    plan: Plan | None
    arguments: dict[str, Any]

    def draw(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return self.pipe(generator=generator, output_type="latent", **self.arguments).images

    def draw_by_plan(self) -> torch.Tensor:
        if self.plan is None:
            return self.draw()
        with leansd.inherit(self.pipe, self.plan):
            return self.draw()


def share_models(base: Any, sampler: Sampler) -> Any:
    """Another pipeline around the same models; a tokenizer serves one thread at a time."""
    own = {"scheduler": sampler.make(), "tokenizer": tiny_tokenizer()}
    pipe = type(base)(**(base.components | own), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_servers() -> list[Server]:
    """Eight, of different samplers, plans, step counts and batches; the last two without a plan."""
    base = make_pipeline("StableDiffusionPipeline", small_unet(), SAMPLERS["ddim"].make())
    names = ("ddim", "heun", "euler-a", "pndm", "dpm++-2m-karras", "unipc", "ddim", "lcm")
    servers = []
    for number, name in enumerate(names):
        steps = 4 + number % 5
        pipe = share_models(base, SAMPLERS[name])
        plans = (
            Plan.every(2 + number % 3, cut="up1.l1", steps=steps),
            Plan.every(2, cut="up0", steps=steps, how="forecast"),
            Plan.every(3, cut="*.attn", steps=steps, how="residual"),
        )
        prompt = ["a cat", "a dog"][: 1 + number % 2]
        arguments = {"prompt": prompt, "num_inference_steps": steps}
        if number % 4 == 3:
            arguments["guidance_scale"] = 1.0
        servers.append(Server(pipe, plans[number % 3] if number < 6 else None, arguments))
    return servers


def run_at_once(jobs: Sequence[Callable[[], torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Every job in a thread of its own, started together, `ROUNDS` times over."""
    barrier = threading.Barrier(len(jobs), timeout=60)
    results: list[list[torch.Tensor]] = [[] for _ in jobs]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(ROUNDS):
                barrier.wait()
                results[number].append(jobs[number]())
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return results


def assert_same(results: list[list[torch.Tensor]], expected: list[torch.Tensor]) -> None:
    for number, (rounds, latents) in enumerate(zip(results, expected, strict=True)):
        assert len(rounds) == ROUNDS
        assert all(torch.equal(each, latents) for each in rounds), f"thread {number}"


def test_eight_threads_draw_what_they_draw_in_turn() -> None:
    servers = open_servers()
    unet = servers[0].pipe.unet
    plain = [server.draw() for server in servers]
    expected = [server.draw_by_plan() for server in servers]
    assert [torch.equal(*pair) for pair in zip(plain, expected, strict=True)] == (
        [server.plan is None for server in servers]
    )
    assert_same(run_at_once([server.draw_by_plan for server in servers]), expected)
    assert is_plain(unet)
    assert [torch.equal(*pair) for pair in zip(map(Server.draw, servers), plain, strict=True)] == (
        [True] * len(servers)
    )


def test_threads_beside_one_that_is_attached_for_good() -> None:
    """A server's standing `inherit_` serves its own pipeline, in whatever thread that runs."""
    servers = open_servers()
    expected = [server.draw_by_plan() for server in servers]
    standing, others = servers[0], servers[1:]
    leansd.inherit_(standing.pipe, standing.plan)
    try:
        jobs = [standing.draw, *(server.draw_by_plan for server in others)]
        assert_same(run_at_once(jobs), expected)
        assert torch.equal(standing.draw(), expected[0])
    finally:
        leansd.release_(standing.pipe)
    assert is_plain(standing.pipe.unet)


def open_controlled_servers() -> list[Server]:
    """Three of the same course and shape, other hints, on one UNet and one ControlNet."""
    base = build_controlnet(SAMPLERS["ddim"].make())
    plan = Plan.every(2, cut="mid", steps=6).inherit("dn1", at=5)
    servers = []
    for number in range(3):
        pipe = share_models(base, SAMPLERS["ddim"])
        arguments = {"prompt": "a cat", "image": draw_picture(number), "num_inference_steps": 6}
        servers.append(Server(pipe, plan, arguments))
    return servers


def test_threads_share_a_controlnet() -> None:
    servers = open_controlled_servers()
    plain = [server.draw() for server in servers]
    expected = [server.draw_by_plan() for server in servers]
    assert_same(run_at_once([server.draw_by_plan for server in servers]), expected)
    assert "forward" not in vars(servers[0].pipe.controlnet)
    assert all(torch.equal(*pair) for pair in zip(map(Server.draw, servers), plain, strict=True))


def test_pipelines_attached_side_by_side_share_a_controlnet() -> None:
    """In one thread, used in turns, left in the order in which they were attached."""
    servers = open_controlled_servers()
    expected = [server.draw_by_plan() for server in servers]
    for server in servers:
        leansd.inherit_(server.pipe, server.plan)
    results = [server.draw() for server in servers]
    for server in servers:
        leansd.release_(server.pipe)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    assert is_plain(servers[0].pipe.unet)
    assert "forward" not in vars(servers[0].pipe.controlnet)


def test_attaching_and_leaving_beside_a_running_thread() -> None:
    """The UNet is hooked and released many times while another thread is in the midst of it."""
    busy, other = open_servers()[-1], open_servers()[0]
    unet = busy.pipe.unet
    other.pipe.register_modules(unet=unet)
    expected = busy.draw()
    done = threading.Event()

    def attach_and_leave() -> torch.Tensor:
        while not done.is_set():
            with leansd.inherit(other.pipe, "deepcache"):
                pass
        return expected

    def draw() -> torch.Tensor:
        try:
            return torch.stack([busy.draw() for _ in range(2)])
        finally:
            done.set()

    def once(job: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def work() -> torch.Tensor:
            done.clear()
            return job()

        return work

    results = run_at_once([once(draw), once(attach_and_leave)])
    assert all(torch.equal(each, torch.stack([expected] * 2)) for each in results[0])
    assert is_plain(unet)
