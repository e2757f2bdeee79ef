"""What does the command line cost on a checkpoint of 1 GB, in time and memory?

    python -m benchmarks.checkpoints [FOLDER]

Time: against reading and writing the file with safetensors alone and one pass of `abs` over it.
Memory: the peak of a process, over that of one that looks at a small file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.timing import compare, show, write
from parasparse.cli.main import main

TENSORS, SIDE = 16, 4096  # 64 MiB each, 1 GiB
RULES = ("--rule", "*=0.9", "--force")
PEAK = """
import sys
from parasparse.cli.main import main
assert main(sys.argv[1:]) == 0
status = open("/proc/self/status").read()  # ru_maxrss would be that of the parent, if it had more
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def make(folder: Path) -> None:
    torch.manual_seed(0)
    for number in range(2):  # two shards, for the memory of a folder
        shard = {f"{number}.{i}.weight": torch.randn(SIDE, SIDE) for i in range(TENSORS // 2)}
        (folder / "sharded").mkdir(exist_ok=True)
        save_file(shard, folder / "sharded" / f"{number}.safetensors", {"format": "pt"})
    weight_map = {
        f"{number}.{i}.weight": f"{number}.safetensors"
        for number in range(2) for i in range(TENSORS // 2)
    }  # fmt: skip
    index = folder / "sharded" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    quiet("prune", folder / "sharded", folder / "in.safetensors", "--rule", "*=0.0", "--force")
    torch.save(load_file(folder / "in.safetensors"), folder / "in.pt")
    save_file({"small.weight": torch.ones(4, 4)}, folder / "small.safetensors")


def quiet(*arguments: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "parasparse", *map(str, arguments)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def alone(folder: Path, *, on_disk: bool) -> None:
    """What nothing that reads, looks at and writes every weight can do without."""
    state = load_file(folder / "in.safetensors")
    for tensor in state.values():
        tensor.abs()
    save_file(state, folder / "alone.safetensors", {"format": "pt"})
    if on_disk:
        with open(folder / "alone.safetensors", "rb") as file:
            os.fsync(file.fileno())


def command(*arguments: object) -> None:
    if main([str(argument) for argument in arguments]):
        raise RuntimeError(arguments)


def peak(*arguments: object) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, arguments)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def memory(folder: Path) -> dict[str, float]:
    """Return the peaks in units of the largest tensor, above that of a process with none."""
    bare = peak("inspect", folder / "small.safetensors")
    runs = {
        f"{command} {kind}": (command, folder / source, folder / out, *options)
        for kind, source, out in [
            ("file", "in.safetensors", "out.safetensors"), ("folder", "sharded", "out"),
            ("torch", "in.pt", "out.pt"),
        ]
        for command, options in [
            ("prune", RULES), ("prune --scope global", (*RULES, "--scope", "global")),
        ]
    }  # fmt: skip
    runs = {name: (given[0].split()[0], *given[1:]) for name, given in runs.items()}
    runs["pack"] = ("pack", folder / "out.safetensors", folder / "p.safetensors", "--force")
    runs["unpack"] = ("unpack", folder / "p.safetensors", folder / "u.safetensors", "--force")
    runs["inspect"] = ("inspect", folder / "in.safetensors")
    runs["diff"] = ("diff", folder / "in.safetensors", folder / "in.safetensors")
    largest = SIDE * SIDE * 4
    found = {name: (peak(*given) - bare) / largest for name, given in runs.items()}
    for name, times in found.items():
        print(f"  {name:<34}{times:6.2f} of the largest tensor ({largest / 2**20:.0f} MiB)")
    return found


def run(folder: Path) -> None:
    make(folder)
    source, out = folder / "in.safetensors", folder / "out.safetensors"
    everywhere = ("prune", source, out, *RULES, "--scope", "global")
    timings = compare(
        {
            "safetensors + abs": lambda: alone(folder, on_disk=False),
            "and on disk": lambda: alone(folder, on_disk=True),
            "prune": lambda: command("prune", source, out, *RULES),
            "prune --scope global": lambda: command(*everywhere),
            "inspect": lambda: command("inspect", source, "--json"),
        },
        repeats=5, warm_up=1, before=os.sync,
    )  # fmt: skip
    show("1 GiB of float32", timings)
    print("Peak memory")
    write("checkpoints", {"1 GiB of float32": timings}, memory=memory(folder))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as place:
        run(Path(place))
