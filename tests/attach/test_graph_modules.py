"""Graph modules with masks at their root, whose class torch edits and which torch rebuilds."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import parasparse as ps

X = torch.randn(2, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.randn(4, 4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.scale * (x @ self.weight)) @ self.table


def traced():
    return torch.fx.symbolic_trace(Net())


def exported():
    return torch.export.export(Net(), (X,)).module()


RULES = {
    "masks": {"weight": 0.5, "layer.weight": 0.5},
    "buffer": {"table": 0.5},
    "gate": {"weight": ps.Gate(init=1.0)},
}
over_graphs = pytest.mark.parametrize("build", [traced, exported], ids=lambda b: b.__name__)
over_rules = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)


COPIES = {  # torch cannot pickle an exported module, masked or not
    "deepcopy": (traced, copy.deepcopy),
    "twice": (traced, lambda graph: copy.deepcopy(copy.deepcopy(graph))),
    "pickle": (traced, lambda graph: pickle.loads(pickle.dumps(graph))),
    "deepcopy of exported": (exported, copy.deepcopy),
}


@over_rules
@pytest.mark.parametrize(("build", "make"), COPIES.values(), ids=COPIES)
def test_copies_have_masks_and_a_life_of_their_own(build, rules, make):
    dense = build()
    order = [name for name, _ in dense.named_parameters()]
    graph = ps.sparsify(dense, rules)
    expected = graph(X)
    twin = make(graph)
    assert torch.equal(twin(X), expected)
    assert torch.equal(graph(X), expected)
    for name, mask in ps.named_masks(graph):
        assert torch.equal(ps.mask_of(twin, name), mask)
        assert ps.stored(twin, name) is not ps.stored(graph, name)
    assert twin.state_dict().keys() == graph.state_dict().keys()
    twin.recompile()
    twin(X).sum().backward()
    twin.load_state_dict(ps.dense_state_dict(graph))
    torch.testing.assert_close(twin(X), expected)
    ps.squash(twin)
    twin.recompile()
    torch.testing.assert_close(twin(X), expected)
    assert sorted(name for name, _ in twin.named_parameters()) == sorted(order)
    assert ps.is_sparse(graph)
    assert torch.equal(graph(X), expected)
    assert [name for name, _ in ps.squash(graph).named_parameters()] == order


@over_graphs
@over_rules
def test_a_recompiled_graph_still_masks(build, rules):
    graph = ps.sparsify(build(), rules)
    expected = graph(X)
    graph.recompile()
    graph.graph = graph.graph
    assert torch.equal(graph(X), expected)
    assert torch.equal(ps.squash(graph)(X), expected)
    graph.recompile()
    assert torch.equal(graph(X), expected)


def test_a_changed_graph_runs():
    graph = ps.sparsify(traced(), {"weight": 0.5})
    expected = graph(X)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    with graph.graph.inserting_before(output):
        output.args = (graph.graph.call_function(torch.neg, output.args),)
    graph.recompile()
    assert torch.equal(graph(X), -expected)
    assert torch.equal(copy.deepcopy(graph)(X), -expected)


def test_a_shallow_copy_shares_tensors_and_masks():
    graph = ps.sparsify(traced(), {"weight": 0.5})
    twin = copy.copy(graph)
    expected = graph(X)
    assert torch.equal(twin(X), expected)
    assert ps.stored(twin, "weight") is ps.stored(graph, "weight")
    ps.unsparsify(twin)
    assert not ps.is_sparse(twin)
    assert torch.equal(graph(X), expected)


def test_other_parametrizations_below_the_mask_are_copied():
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.weight

    graph = parametrizations.weight_norm(torch.fx.symbolic_trace(Normalized()))
    ps.sparsify(graph, {"weight": 0.5})
    expected = graph(X)
    twin = copy.deepcopy(graph)
    assert torch.equal(twin(X), expected)
    assert torch.equal(ps.squash(twin)(X), expected)
    assert torch.equal(graph(X), expected)


def test_a_copy_that_fails_leaves_the_module_as_it_was():
    class NoCopy:
        def __deepcopy__(self, memo):
            raise OSError("no copy")

    graph = ps.sparsify(traced(), {"weight": 0.5})
    expected, keys = graph(X), list(graph.state_dict())
    graph.meta["held"] = NoCopy()
    with pytest.raises(OSError, match="no copy"):
        copy.deepcopy(graph)
    assert torch.equal(graph(X), expected)
    assert list(graph.state_dict()) == keys
    assert ps.is_sparse(graph)


def test_submodules_that_hold_masks_are_not_deleted_as_unused():
    graph = ps.sparsify(traced(), {"weight": 0.5})
    expected = graph(X)
    with pytest.raises(RuntimeError, match="holds masks"):
        graph.delete_all_unused_submodules()
    assert torch.equal(graph(X), expected)
    ps.squash(graph).delete_all_unused_submodules()
    assert torch.equal(graph(X), expected)
