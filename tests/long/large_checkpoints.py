"""The command line on a folder of two shards of 512 MiB, as real processes.

    python -m tests.long.large_checkpoints [FOLDER]

Too large for the suite: peak memory, Ctrl-C and kill -9 halfway, a full disk (a small tmpfs, where
this may be mounted), and that what comes out is what Python makes of the same tensors.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import parasparse as ps

SHARDS, TENSORS, SIDE = 2, 8, 4096  # 64 MiB a tensor
RULE = ("--rule", "layer*=0.9", "--scope", "global")
PEAK = """
import sys
from parasparse.cli.main import main
assert main(sys.argv[1:]) == 0
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10)
"""


def make(folder):
    torch.manual_seed(0)
    weight_map = {}
    folder.mkdir()
    for number in range(SHARDS):
        name = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        shard = {f"layer{number}.{i}.weight": torch.randn(SIDE, SIDE) for i in range(TENSORS)}
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def command(*arguments):
    return [sys.executable, "-m", "parasparse", *map(str, arguments)]


def peak(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, arguments)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def check_memory(folder, source):
    save_file({"a.weight": torch.ones(2, 2)}, folder / "small.safetensors")
    bare, largest = peak("inspect", folder / "small.safetensors"), SIDE * SIDE * 4
    for out in ("out", "out.safetensors", "out.pt"):
        used = (peak("prune", source, folder / out, *RULE, "--force") - bare) / largest
        print(f"prune into {out}: a peak of {used:.2f} tensors above the bare process")
        assert used < 4, used
    for one, two in [("out", "out.safetensors"), ("out", "out.pt")]:
        subprocess.run(command("diff", folder / one, folder / two), check=True)


def check_result(folder, source):
    files = sorted(source.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    masks = ps.Prune(0.9, scope="global")(tensors)
    for name, tensor in load_file(folder / "out.safetensors").items():
        assert torch.equal(tensor, torch.where(masks[name], tensors[name], 0.0)), name
    print("the tensors are those that Python makes")


def check_interruption(folder, source):
    for number in (signal.SIGINT, signal.SIGKILL):
        out = folder / "interrupted"
        out.mkdir()
        (out / "old.safetensors").write_text("old")
        process = subprocess.Popen(
            command("prune", source, out, *RULE, "--force"),
            # A shell has what it starts in the background ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while not list(folder.glob("interrupted.*.tmp")):
            time.sleep(0.01)
            assert process.poll() is None
        time.sleep(0.5)
        process.send_signal(number)
        code = process.wait(60)
        assert code == (130 if number == signal.SIGINT else -signal.SIGKILL), code
        assert [file.name for file in out.iterdir()] == ["old.safetensors"]
        print(f"{number.name}: code {code}, the old folder is whole")
        for left in [out, *folder.glob("interrupted.*.tmp")]:
            shutil.rmtree(left)


def check_full_disk(folder, source):
    small = folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", os.fspath(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        print("a full disk: not tried, as no tmpfs can be mounted here")
        return
    try:
        for out in ("out", "out.safetensors", "out.pt"):
            done = subprocess.run(
                command("prune", source, small / out, *RULE), capture_output=True, text=True
            )
            print(f"a full disk: code {done.returncode}, {done.stderr.strip()}")
            assert done.returncode == 1
            assert "Traceback" not in done.stderr
            assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", os.fspath(small)], check=True)


def run(folder):
    source = folder / "in"
    make(source)
    check_memory(folder, source)
    check_result(folder, source)
    check_interruption(folder, source)
    check_full_disk(folder, source)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as place:
        run(Path(place))
