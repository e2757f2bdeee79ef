"""What holds of every network that `shrink` has cut."""

import copy
from itertools import pairwise

import pytest
import torch

import parasparse as ps
from parasparse.shrink.parts import selected
from tests.shrink.test_shrink import CASES, assert_same, built, pruned

SMALL = [name for name in CASES if name not in ("resnet18", "mobilenet")]


@pytest.mark.parametrize("name", SMALL)
def test_what_stays_is_bit_for_bit_what_it_was(name):
    model, example, _ = built(name)
    ps.squash(pruned(model, example))  # units whose constants are 0, so that nothing is folded
    dense = copy.deepcopy(model)
    kinds = [type(module) for module in model.modules()]
    ties = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    plan = ps.plan_shrink(model, example)
    ps.shrink(model, example)
    rows = {row.name: row for row in plan.rows}
    for one, tensor in dense.state_dict().items():
        row = next((rows[n] for n in rows if ties.get(n, n) == ties.get(one, one)), None)
        want = tensor if row is None else selected(tensor, row)
        assert torch.equal(model.state_dict()[one], want)
    assert [type(module) for module in model.modules()] == kinds
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == ties


@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_left_to_remove(name):
    model, example, _ = built(name)
    pruned(model, example)
    plan = ps.plan_shrink(model, example)
    ps.shrink(model, example)
    assert not ps.plan_shrink(model, example).rows
    fresh = ps.shrink(built(name, seed=1)[0], plan)
    assert not ps.plan_shrink(fresh, example).rows


@pytest.mark.parametrize("name", SMALL)
def test_a_checkpoint_loads_strictly_into_a_fresh_model_that_a_plan_has_cut(name):
    model, example, others = built(name)
    pruned(model, example)
    plan = ps.Shrinkage.from_json(ps.plan_shrink(model, example).to_json())
    ps.shrink(model, example)
    fresh = ps.shrink(built(name, seed=1)[0], plan)
    fresh.load_state_dict(model.state_dict())
    assert_same(fresh, model, example, others)


@pytest.mark.parametrize("name", SMALL)
def test_more_units_that_are_masked_never_give_a_larger_network(name):
    model, example, _ = built(name)
    units = ps.coupled(model, example)
    reached = {n for n, p in model.named_parameters() if units.reaches(n, model, p)}
    scores = {n: torch.rand(p.shape) for n, p in model.named_parameters() if n in reached}
    widths = []
    for share in (0.2, 0.4, 0.6, 0.8):
        small = ps.sparsify(copy.deepcopy(model), units.jointly(scores, share))
        if ps.plan_shrink(small, example).rows:
            ps.shrink(small, example)
        widths.append([p.numel() for p in small.parameters() if p.is_floating_point()])
    for more, fewer in pairwise(widths):
        assert all(a >= b for a, b in zip(more, fewer, strict=True))
    assert sum(widths[0]) > sum(widths[-1])
