"""The example runs under torchrun, and goes on with another number of processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "fsdp_sparse_training.py"


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(EXAMPLE), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_it_trains_saves_goes_on_and_exports(tmp_path):
    out = tmp_path / "out"
    assert "step 20: loss" in torchrun(2, "--steps", 20, "--out", out)
    told = torchrun(1, "--steps", 40, "--out", out, "--resume")
    assert "step 40: loss" in told
    assert "4 updates of the masks" in told  # the first two are remembered
    dense = torch.load(out / "dense.pt")
    assert not any("parametrizations" in key for key in dense)
    assert (dense["blocks.0.linear1.weight"] == 0).float().mean() > 0.75
    assert dense["head.weight"].count_nonzero() == dense["head.weight"].numel()
