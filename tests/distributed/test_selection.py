"""The highest of scores that processes hold parts of: what one process finds, ties included."""

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import parasparse as ps
from parasparse.patterns.selection.kth import highest
from parasparse.sharding.dtensors import count_nonzero
from tests.patterns.selection.test_kth import brute

DTYPES = [torch.half, torch.bfloat16, torch.float, torch.double, torch.int32, torch.int64]


def spread(tensors, placements, mesh):
    return [
        distribute_tensor(t, mesh, p, src_data_rank=None)
        for t, p in zip(tensors, placements, strict=True)
    ]


def same(found, expected):
    for one, two in zip(found, expected, strict=True):
        one = one.full_tensor() if isinstance(one, DTensor) else one
        assert torch.equal(one, two)


def finds_what_sorting_finds(rank, dtype):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    for levels in (1, 3, 2000):
        scores = [
            torch.randint(-levels, levels, shape, generator=generator).to(dtype)
            for shape in ((7, 5), (1, 3), (6, 4, 2), (4, 6), (3,))
        ]
        if dtype.is_floating_point:
            scores[0][0, 0], scores[0][1, 1], scores[2][0, 0, 0] = math.inf, -math.inf, -0.0
        every = sum(score.numel() for score in scores)
        layouts = [[Shard(0)], [Shard(0)], [Shard(1)], [Replicate()], None]
        held = spread(scores[:4], layouts[:4], mesh) + scores[4:]  # the last is plain
        for kept in (0, 1, every // 3, every - 1, every):
            same(highest(held, kept), brute(scores, kept))


def finds_it_where_two_meshes_shard(rank):
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    generator = torch.Generator().manual_seed(0)
    layouts = [
        [Shard(0), Shard(1)],
        [Shard(0), Shard(0)],
        [_StridedShard(0, split_factor=2), Shard(0)],  # fully_shard over parallelize_module
        [Replicate(), Shard(0)],
    ]
    for levels in (1, 4, 1000):
        scores = [
            torch.randint(-levels, levels, (8, 6), generator=generator).float() for _ in layouts
        ]
        held = spread(scores, layouts, mesh)
        for kept in (1, 50, 96, 191):
            same(highest(held, kept), brute(scores, kept))


def nan_on_one_process_is_refused_on_all(rank):
    mesh = init_device_mesh("cpu", (2,))
    scores = torch.ones(4, 2)
    scores[3, 1] = math.nan  # held by the second alone
    (held,) = spread([scores], [[Shard(0)]], mesh)
    for choose in (lambda: highest([held], 3), lambda: ps.Prune(0.5)({"w": held})):
        with pytest.raises(ValueError, match="got 1 NaN of 8"):
            choose()


def patterns_and_scores_choose_as_one_process_does(rank):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=generator) for n, s in (("a", (12, 8)), ("b", (7, 16)))}
    layouts = {"a": [Shard(0)], "b": [Shard(0)]}
    held = {n: spread([t], [layouts[n]], mesh)[0] for n, t in tensors.items()}
    patterns = ps.patterns
    for prune in (
        ps.Prune(0.7),
        ps.Prune(0.7, scope="global"),
        ps.Prune(0.7, scope="global", max_sparsity=0.71),
        ps.Prune(0.99, max_sparsity=0.995),
        ps.Prune(0.7, distribution=ps.distributions.erk),
        ps.Prune(0.7, score=ps.scores.lamp, scope="global"),
        ps.Prune(pattern=patterns.n_of_m(2, 4)),
        ps.Prune(pattern=patterns.n_of_m(1, 4, dim=0, remainder="pad")),
        ps.Prune(0.5, pattern=patterns.channel(0)),
        ps.Prune(0.5, pattern=patterns.channel(1), scope="global"),
        ps.Prune(0.5, pattern=patterns.channel(1), scope="global", max_sparsity=0.51),
        ps.Prune(0.5, pattern=patterns.block((2, 4))),
        ps.Prune(0.99, pattern=patterns.block((16, 8)), max_sparsity=0.995),
        ps.Prune(0.5, pattern=patterns.chain(patterns.channel(0), patterns.n_of_m(2, 4))),
        ps.Prune(pattern=patterns.nearly_diagonal(3)),
        ps.Prune(0.5, score=ps.scores.zeros_first(ps.scores.magnitude)),
    ):
        masks = prune(held)
        assert all(isinstance(mask, DTensor) for mask in masks.values())
        same(masks.values(), prune(tensors).values())


def counts_are_of_the_whole(rank):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    values = torch.arange(15.0).view(5, 3)
    for placement in (Shard(0), Replicate()):
        (held,) = spread([values], [[placement]], mesh)
        assert count_nonzero(held > 4) == 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("processes", [2, 3])
def test_the_highest_of_all_processes(run, processes, dtype):
    run(processes, finds_what_sorting_finds, dtype)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    "job", [patterns_and_scores_choose_as_one_process_does, counts_are_of_the_whole]
)
def test_parts(run, processes, job):
    run(processes, job)


def test_two_meshes(run):
    run(4, finds_it_where_two_meshes_shard)


def test_nan(run):
    run(2, nan_on_one_process_is_refused_on_all)
