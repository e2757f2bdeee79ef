"""What pruning costs: how often blocks run, and what is in memory meanwhile."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import parasparse as ps
from tests.oneshot.block_models import Chain, Wanda, batches


class Live:
    """The bytes of storages that are alive, at their most."""

    def __init__(self):
        self.storages, self.peak = {}, 0

    def add(self, values):
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                self.see(value.untyped_storage())

    def see(self, storage):
        known = self.storages.get(storage._cdata)
        if known is None or known[0].expired():
            self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            alive = {key: of for key, of in self.storages.items() if not of[0].expired()}
            self.storages = alive
            self.peak = max(self.peak, sum(size for _, size in alive.values()))


class Counted(TorchDispatchMode):
    """Counts what operations return."""

    def __init__(self):
        super().__init__()
        self.live = Live()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        self.live.add(found)
        return found


def test_a_solve_takes_one_copy_of_the_gram_matrix():
    size = 1100  # with more than 1024 inputs, no lower bound is computed
    layers = nn.ModuleList([nn.Linear(64, 8), nn.Linear(size, 8)])
    with torch.no_grad(), ps.scores.collect(layers, grams=True) as statistics:
        x, y = torch.randn(600, size), torch.randn(600, 64)
        for layer in layers:
            layer(x if layer.in_features == size else y)
    weights = {f"{n}.weight": layer.weight.detach() for n, layer in enumerate(layers)}
    gram = statistics.gram("1.weight").nbytes
    rule = ps.OneShot(0.5, statistics, update="obs", history=[])
    with Counted() as counted:
        rule(weights)
    assert 2 * gram <= counted.live.peak < 2.4 * gram


@pytest.mark.parametrize("recompute", [True, False])
def test_one_set_of_activations_waits(recompute):
    model, live = Chain(), Live()
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: live.add((args, out)))
    inputs = [torch.randn(64, 6) for _ in range(20)]
    ps.prune_blocks(model, inputs, ps.OneShot(0.5), recompute=recompute)
    one = 64 * 8 * 4
    assert 20 * one <= live.peak <= 20 * one + 20 * inputs[0].nbytes + 8 * one


@pytest.mark.parametrize(("recompute", "times"), [(True, 2), (False, 1)])
def test_blocks_run_once_to_be_pruned_and_once_more_to_go_on(recompute, times):
    model, runs = Chain(), []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, args, out: runs.append(layer))
    ps.prune_blocks(model, batches(5), Wanda(0.5), recompute=recompute)
    # The first batch has run once more, to count calls.
    assert [runs.count(layer) for layer in model.layers] == [5 * times + 1] * 3


class Experts(nn.Module):
    """A layer, and a stack of two matrices."""

    def __init__(self):
        super().__init__()
        self.layer, self.stack = nn.Linear(8, 8), nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        x = self.layer(x)
        return x @ self.stack[0] + x @ self.stack[1]


OWN = {
    "layers": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
    "stacks": lambda: nn.Sequential(Experts(), Experts()),
    "stacks inside": lambda: nn.Sequential(*(nn.Sequential(Experts()) for _ in range(2))),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", OWN)
def test_the_first_block_is_the_same_whether_it_runs_once_or_twice(kind, masked):
    found = []
    for recompute in (True, False):
        torch.manual_seed(0)
        model, reports = OWN[kind](), []
        if masked:
            ps.sparsify(model, {"*": 0.25})
        inputs = [torch.randn(12, 8) for _ in range(3)]
        options = {"recompute": recompute, "progress": reports.append}
        ps.prune_blocks(model, inputs, {"*": ps.OneShot(0.5)}, blocks="0", **options)
        assert not reports[0].by_magnitude
        found.append(model.state_dict())
    assert all(map(torch.equal, found[0].values(), found[1].values()))


def test_masks_are_applied_once_for_all_batches():
    model, weights = Chain(), []
    layer = model.layers[1].up
    ps.prune_blocks(model, batches(5), Wanda(0.5))
    layer.register_forward_hook(lambda layer, args, out: weights.append(layer.weight))
    ps.prune_blocks(model, batches(5), Wanda(0.5))
    assert len({id(weight) for weight in weights[-5:]}) == 1
    assert layer.weight is not layer.weight
