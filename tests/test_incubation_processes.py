"""Two processes that share a batch are one process with all of it."""

import os
import socket
from pathlib import Path

import pytest
import torch

from leansd.incubation import training_run
from leansd.incubation.trainer import ValidationHook
from leansd.incubation.training_run import NET, run_stages
from leansd.loading import load_unet
from processes import start
from test_incubation import LIGHT, make_run, write_recipe


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def take_part(folder: Path, rank: int, port: int, stops_after: int | None) -> None:
    """One of two processes, as `accelerate launch --cpu` starts them."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    run = make_run(folder, write_recipe(LIGHT, batch=1))

    def stop(step: int) -> None:
        if step == stops_after:
            os._exit(7)

    training_run.make_validation = lambda *_: ValidationHook(1, stop)
    run_stages(run)
    os._exit(0)


def launch(folder: Path, *, stops_after: int | None = None) -> list[int | None]:
    port = find_port()
    processes = [start(take_part, folder, rank, port, stops_after) for rank in (0, 1)]
    processes[0].join(200)
    processes[1].join(20)
    for process in processes:
        process.kill()
    return [process.exitcode for process in processes]


def read_weights(folder: Path) -> torch.Tensor:
    net = load_unet(folder / NET, device="cpu", dtype=torch.float32)
    return torch.cat([each.flatten() for each in net.state_dict().values()])


@pytest.mark.slow
def test_two_processes_equal_one_and_resume(tmp_path: Path) -> None:
    run_stages(make_run(tmp_path / "one", write_recipe(LIGHT, batch=2)))
    assert launch(tmp_path / "two") == [0, 0]
    one, two = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    moved = (one - read_start()).abs().mean()
    assert moved > 1e-4
    assert (one - two).abs().mean() < moved / 1000  # sums are made in another order
    killed = tmp_path / "killed"
    assert launch(killed, stops_after=2)[0] == 7
    assert (killed / "light/checkpoints/step-00000002/position-1.json").exists()
    assert launch(killed) == [0, 0]
    assert torch.equal(read_weights(killed), two)


def read_start() -> torch.Tensor:
    """The student's weights before its first step."""
    from leansd.incubation.step import StageNet, make_student

    stage = write_recipe(LIGHT).stages[0]
    student = make_student(stage, {"teacher": StageNet(make_run(Path()).pipe.unet)})
    return torch.cat([each.flatten() for each in student.unet.state_dict().values()])
