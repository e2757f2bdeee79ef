"""How much memory weights and masks take in each process under FSDP2: 1, 2 and 4 processes.

    python -m benchmarks.sharding

A model of 200 M float32 parameters. Bytes are those of the tensors that the first process holds,
and the growth of its resident memory since before the model was made.
"""

from __future__ import annotations

import gc
import os
import socket
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import parasparse as ps
from benchmarks.timing import write_content

WIDTH, LAYERS = 3200, 20


def local_bytes(tensors: list[Tensor]) -> int:
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(part.nbytes for part in parts)


def resident() -> int:
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line
    )
    return int(line.split()[1]) * 1024


def measure(rank: int, world: int, port: int, shard: bool, found: object) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(nn.Linear(8, 8), mesh=mesh)  # what is loaded at first use
    before = resident()
    model = nn.Sequential()
    for _ in range(LAYERS):  # layer by layer, so that no process ever holds all of it
        layer = ps.sparsify(nn.Linear(WIDTH, WIDTH, bias=False), 0.9)
        model.append(fully_shard(ps.distributed.shard_masks(layer) if shard else layer, mesh=mesh))
    gc.collect()
    masks = [mask for _, mask in ps.named_masks(model) if mask is not None]
    weights = [p for p in model.parameters() if p.dtype != torch.bool]
    row = {
        "processes": world,
        "masks": "sharded" if shard else "whole",
        "weights_MB": round(local_bytes(weights) / 1e6, 1),
        "masks_MB": round(local_bytes(masks) / 1e6, 1),
        "resident_MB": round((resident() - before) / 1e6, 1),
    }
    if rank == 0:
        found.put(row)  # type: ignore[attr-defined]
    dist.barrier()
    os._exit(0)


def main() -> None:
    rows = []
    for world in (1, 2, 4):
        for shard in (False, True):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            found = mp.get_context("spawn").SimpleQueue()
            mp.spawn(measure, args=(world, port, shard, found), nprocs=world)
            rows.append(found.get())
            print(rows[-1])
    write_content("sharding", {"rows": rows})


if __name__ == "__main__":
    main()
