"""Random networks under random masks: what is cut computes what the masked network did."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import parasparse as ps
from tests.shrink.random_graphs import masked_graph, other_inputs


def assert_same_results(small, masked, x):
    with torch.no_grad():
        want = masked(x)
        if not bool(want.isfinite().all()):
            return
        scale = float(want.abs().max()) if want.numel() else 1.0
        torch.testing.assert_close(small(x), want, rtol=0, atol=1e-9 * max(scale, 1e-3))


@settings(max_examples=settings.default.max_examples // 3, derandomize=True, database=None)
@given(st.data(), st.integers(1, 8))
def test_random_networks_shrink_and_nothing_is_left_to_remove(data, depth):
    model, example = masked_graph(lambda options: data.draw(st.sampled_from(options)), depth)
    plan = ps.plan_shrink(model, example)
    assert all(row.reason for row in plan.kept_back)
    assert ps.Shrinkage.from_json(plan.to_json()) == plan
    if not plan.rows:
        return
    masked = copy.deepcopy(model)
    ps.shrink(model, example, check=False)
    for x in (example, *other_inputs(masked, example)):
        assert_same_results(model, masked, x)
    # One channel of a tensor in which all are dead, or one constant that stands for others, changes
    # what is known of the next layers. With fewer groups, a convolution may lose other channels.
    if any("must stay" in r.reason or "stands for" in r.reason for r in plan.kept_back):
        return
    if not any(row.name == "groups" for row in plan.attributes):
        assert not ps.plan_shrink(model, example).rows
