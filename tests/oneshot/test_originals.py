"""What the original SparseGPT made of one layer, recorded from its repository (147d215).

The layer has two inputs that are always 0, and saw 240 inputs of 192 numbers, in 6 sequences. The
original computes in float32, so its weights are 2e-5 from those in float64.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.patterns import n_of_m

RECORDED = np.load(Path(__file__).with_name("layer.npz"))
CASES = {
    "50": {"sparsity": 0.5},
    "70": {"sparsity": 0.7},
    "60_block32": {"sparsity": 0.6, "block": 32},
    "2of4": {"pattern": n_of_m(2, 4)},
    "4of8": {"pattern": n_of_m(4, 8)},
    "1of4_block64_damp10": {"pattern": n_of_m(1, 4), "block": 64, "damping": 0.1},
}


@pytest.fixture(scope="module")
def layer():
    layer = nn.Linear(192, 24, bias=False)
    layer.load_state_dict({"weight": torch.from_numpy(RECORDED["weight"])})
    with torch.no_grad(), ps.scores.collect(layer, grams=True) as statistics:
        for x in torch.from_numpy(RECORDED["inputs"]):
            layer(x)
    return layer, statistics


def original_damping(statistics, share):
    """Return the damping of the original, which counts the 1 on the diagonal of dead inputs too.

    It does so after scaling by 2 / sequences, so how much this adds depends on the unit of inputs.
    """
    diagonal = statistics.gram("weight").diagonal() * 2 / len(RECORDED["inputs"])
    return share * (1 + float((diagonal == 0).sum() / diagonal.sum()))


@pytest.mark.parametrize("case", CASES)
def test_obs_finds_the_masks_and_weights_of_the_original(layer, case):
    layer, statistics = layer
    history, arguments = [], {"damping": 0.01, **CASES[case]}
    arguments["damping"] = original_damping(statistics, arguments["damping"])
    prune = ps.OneShot(
        statistics=statistics, scope="tensor", update="obs", history=history, **arguments
    )
    found = prune({"weight": layer.weight})["weight"]
    expected = torch.from_numpy(RECORDED[f"sparsegpt_{case}"])
    alive = statistics.gram("weight").diagonal() > 0
    differ = (found.mask != (expected != 0))[:, alive]
    if "of" in case:
        assert not differ.any()
    else:
        # The original drops one entry more or less than asked for in each block of columns, and
        # others may follow.
        assert differ.sum() <= 4 * -(-192 // prune.block)
        assert found.mask.sum() == 24 * 192 - round(24 * 192 * prune.sparsity)
    rows = ~differ.any(1)
    assert rows.sum() >= 18
    torch.testing.assert_close(
        found.weights[rows][:, alive], expected[rows][:, alive], rtol=0, atol=2e-5
    )
    assert history[0].dead_inputs == 2
    assert history[0].samples == 240


def test_the_same_layer_by_other_updates(layer):
    """Least squares on the original's mask is better, and choosing both together better still."""
    layer, statistics = layer
    errors = {}
    for update in ("none", "obs", "least_squares", "admm"):
        history = []
        ps.OneShot(0.5, statistics, update=update, history=history)({"weight": layer.weight})
        errors[update] = history[0].error
    assert errors["none"] > errors["obs"] > errors["least_squares"] > errors["admm"]
