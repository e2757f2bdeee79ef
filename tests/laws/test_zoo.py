"""The checks that `make test-zoo` runs on hundreds of models, on a few of them."""

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.long.zoo import checks


@pytest.mark.filterwarnings("ignore")  # transformers' own, of configurations
@pytest.mark.parametrize(("kind", "given"), [("vit", ["pixel_values"]), ("mamba", ["input_ids"])])
def test_a_model_type_keeps_the_laws(kind, given):
    pytest.importorskip("transformers.initialization", reason="needs transformers 5")
    from tests.long import zoo_transformers

    found = {}
    zoo_transformers.check(kind, found)
    assert found["held"]
    assert found["inputs"] == given
    assert found["moved"]
    assert found["reached"] > 0.99
    assert not found["silent"] + found["dense_products"] + found["reached_unmultiplied"]


class Odd(nn.Module):
    """Multiplies with a table of positions, and adds a matrix."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(8, 8))
        self.added = nn.Parameter(torch.randn(8, 8))
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x @ self.pos_embed.t().contiguous()) + self.added


def test_the_use_of_a_tensor_is_compared_with_the_rule():
    model, x = Odd(), torch.randn(8, 8)
    found = checks.products(model, lambda module: [module(x)], ps.plan(model, 0.5))
    assert found == {
        "dense_products": ["pos_embed (position)"],
        "reached_unmultiplied": ["added"],
    }


def test_a_model_that_cannot_be_run_keeps_the_other_laws():
    assert checks.laws(Odd(), None)["outputs"] == 0
