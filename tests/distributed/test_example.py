"""The example runs as torchrun starts it, and goes on with another number of processes."""

import os
import runpy
import socket
import sys
from pathlib import Path

import torch

from tests.helpers.processes import Program

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "fsdp_sparse_training.py"


def started_by_torchrun(rank, number, port, arguments):
    """Run the example with the variables that torchrun sets."""
    torch.set_num_threads(1)
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""}  # the example would take NCCL
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": str(rank)}
    sys.argv = [str(EXAMPLE), *arguments]
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def torchrun(folder, number, *arguments):
    """Return what the first process prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = []
    for rank in range(number):
        (place := folder / f"{number}-{rank}").mkdir()
        arguments = [str(argument) for argument in arguments]
        programs.append(Program(place, started_by_torchrun, rank, number, port, arguments))
    ended = [program.finished() for program in programs]
    assert all(code == 0 for code, *_ in ended), ended
    return ended[0][1]


def test_it_trains_saves_goes_on_and_exports(tmp_path):
    out = tmp_path / "out"
    assert "step 20: loss" in torchrun(tmp_path, 2, "--steps", 20, "--out", out)
    told = torchrun(tmp_path, 1, "--steps", 40, "--out", out, "--resume")
    assert "step 40: loss" in told
    assert "4 updates of the masks" in told  # the first two are remembered
    dense = torch.load(out / "dense.pt")
    assert not any("parametrizations" in key for key in dense)
    assert (dense["blocks.0.linear1.weight"] == 0).float().mean() > 0.75
    assert dense["head.weight"].count_nonzero() == dense["head.weight"].numel()
