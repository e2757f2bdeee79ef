"""Plans applied to other models, and plans that are damaged."""

import json

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.shrink.test_refusals import digest, images, network


def test_a_model_without_values_is_cut_by_a_plan():
    model = network()
    plan = ps.plan_shrink(model, images())
    small = ps.shrink(model, images())
    on_meta = ps.shrink(network(0).to("meta"), plan)
    assert {n: t.shape for n, t in on_meta.state_dict().items()} == {
        n: t.shape for n, t in small.state_dict().items()
    }


def test_plans_of_other_models_are_refused():
    plan = ps.plan_shrink(network(), images())
    model = network(0)
    before = digest(model)
    wider = nn.Sequential(*network(0)[:3], nn.Conv2d(8, 5, 3), *network(0)[4:])
    with pytest.raises(ValueError, match=r"must have the shape .* Build the model"):
        ps.shrink(wider, plan)
    with pytest.raises(ValueError, match="which the model does not have"):
        ps.shrink(nn.Linear(2, 2), plan)
    model[3].out_channels = 7
    with pytest.raises(ValueError, match="must be 6; it is 7"):
        ps.shrink(model, plan)
    model[3].out_channels = 6
    assert digest(model) == before


def test_a_plan_is_no_example_of_inputs():
    plan = ps.plan_shrink(network(), images())
    with pytest.raises(TypeError, match="got a plan"):
        ps.plan_shrink(network(), plan)


@pytest.mark.parametrize("text", ["", "[]", "{}", None])
def test_text_that_is_no_plan_is_refused(text):
    why = "it has no 'rows'" if text == "{}" else ""
    with pytest.raises(ValueError, match=f"must be a plan written by `to_json`; {why}"):
        ps.Shrinkage.from_json(text)


DAMAGES = {
    "out of range": {"kept": {"0": [0, 1, 2, 99]}},
    "negative": {"kept": {"0": [-1, 0, 1, 2]}},
    "twice": {"kept": {"0": [0, 0, 1, 2]}},
    "in another order": {"kept": {"0": [3, 2, 1, 0]}},
    "no such dimension": {"kept": {"5": [0, 1, 2, 3]}},
    "too few": {"kept": {"0": [0, 1]}},
    "another shape": {"new_shape": [3, 5]},
    "no scale": {"scale": 0.0},
    "not a number": {"scale": float("nan")},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_plan_that_contradicts_itself_is_refused(name):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    ps.sparsify(model, {"0": ps.Prune(0.5, pattern=ps.patterns.channel(0))})
    content = json.loads(ps.plan_shrink(model, torch.randn(2, 5)).to_json())
    content["rows"][0] |= DAMAGES[name]
    with pytest.raises(ValueError, match="damaged"):
        ps.Shrinkage.from_json(json.dumps(content))
