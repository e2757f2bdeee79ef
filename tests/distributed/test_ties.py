"""Ties among tensors of which each process holds a part."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import parasparse as ps


def only_the_names_of_one_tensor_are_masked(rank):
    mesh = init_device_mesh("cpu", (2,))
    a, b = (distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]) for _ in range(2))
    state = {"a": a, "alias": a.detach(), "b": b}
    new, _ = ps.binarize_masks(state, {"a": torch.zeros(4, 2)})
    assert {name: float(t.full_tensor().sum()) for name, t in new.items()} == {
        "a": 0, "alias": 0, "b": 8,
    }  # fmt: skip


def test_binarize_masks_tells_ties_of_dtensors(run):
    run(2, only_the_names_of_one_tensor_are_masked)
