"""The usage code of the libraries we come from, with `sparsify` in place of their layer classes."""

import numpy as np
import pytest
import torch
from torch import nn

import parasparse as ps


def test_the_readme_of_cplxmodules_masked_layers():
    lin = ps.sparsify(nn.Linear(23, 32, bias=True), {"weight": ps.Fixed(None)})
    masking = lin.parametrizations.weight[0]
    raw = ps.stored(lin, "weight").detach().clone()  # stored non sparse weight
    assert raw.shape == (32, 23)
    for shape in ((32, 23), (1, 23), (32, 1)):
        mask = torch.randint(2, shape)
        masking.mask = mask
        assert torch.equal(lin.weight, raw * mask)  # weight_masked
        assert masking.mask_(mask) is masking
    assert torch.equal(ps.stored(lin, "weight"), raw)

    masking.mask = None
    with pytest.raises(RuntimeError, match="has no sparsity mask"):
        lin(torch.randn(1, 23))
    masking.mask = torch.tensor(1.0)  # effectively disables masking
    assert torch.equal(lin.weight, raw)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(4, 3),
        lambda: nn.Conv1d(4, 3, 2),
        lambda: nn.Conv2d(4, 3, 2),
        lambda: nn.Conv3d(4, 3, 2),
        lambda: nn.Bilinear(4, 5, 3),
        lambda: nn.Linear(4, 3, dtype=torch.cfloat),
        lambda: nn.Conv1d(4, 3, 2, dtype=torch.cfloat),
        lambda: nn.Conv2d(4, 3, 2, dtype=torch.cfloat),
        lambda: nn.Conv3d(4, 3, 2, dtype=torch.cfloat),
    ],
)
def test_every_layer_that_cplxmodule_masks_swaps_masks_and_round_trips(layer):
    model = ps.sparsify(layer(), 0.5)
    masks = {name: mask.clone() for name, mask in ps.named_masks(model)}
    ps.deploy_masks(model, {"mask": torch.tensor(1.0)})
    assert torch.equal(model.weight, ps.stored(model, "weight"))
    ps.deploy_masks(model, state_dict=masks)
    assert torch.equal(ps.mask_of(model, "weight"), masks["weight"])


def test_relevance_masks_are_deployed_binarised_and_fine_tuned():
    """The workflow of nn.relevance: thresholded masks, real-valued, made 0 and 1, deployed."""
    source = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    masks = {"0": torch.rand(5, 4) * (torch.rand(5, 4) < 0.5), "2.mask": torch.rand(2, 5)}
    state, binary = ps.binarize_masks(source.state_dict(), masks)
    model = ps.sparsify(
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), {"*": ps.Fixed(None)}
    )
    model.load_state_dict(state)
    ps.deploy_masks(model, binary)
    x = torch.randn(3, 4)
    wanted = nn.functional.linear(x, source[0].weight * masks["0"], source[0].bias).relu()
    wanted = nn.functional.linear(wanted, source[2].weight * masks["2.mask"], source[2].bias)
    torch.testing.assert_close(model(x), wanted)
    assert all(mask.dtype == torch.bool for _, mask in ps.named_masks(model))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # np.array(grad)
def test_how_to_use_this_of_customized_linear():
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1], [1, 0, 1]])
    model = ps.sparsify(nn.Linear(4, 3, bias=False), {"weight": ps.Fixed(mask, layout="in_out")})
    batch = 8
    x = torch.randn(batch, mask.size()[0])
    y = torch.randn(batch, mask.size()[1])
    first = ps.stored(model, "weight").detach().clone()
    learning_rate = 0.1
    losses = []
    for _ in range(3):
        y_pred = model(x)
        loss = (y_pred - y).abs().mean()
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for param in model.parameters():
                param -= learning_rate * param.grad
                if np.array(param.grad).size == np.array(mask).size:
                    # 0 where there is no connection: the gradient, and the weight in effect
                    assert not param.grad.t()[mask == 0].any()
                    assert not model.weight.t()[mask == 0].any()
                    # Differs from the original: what is stored there keeps its value
                    assert torch.equal(param.t()[mask == 0], first.t()[mask == 0])
                    assert not torch.equal(param.t()[mask == 1], first.t()[mask == 1])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list], ids=["numpy", "tensor", "list"])
def test_given_connections_work_in_a_sequential_with_adam_and_inputs_of_any_rank(kind):
    mask = kind([[1, 0, 1], [0, 1, 0], [1, 0, 1], [1, 0, 1]])
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    ps.sparsify(model, {"2.weight": ps.Fixed(mask, layout="in_out")})
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 6, 5)).pow(2).mean().backward()
        optimizer.step()
    assert not model[2].weight.t()[torch.as_tensor(mask) == 0].any()
    assert model[2].weight.t()[torch.as_tensor(mask) == 1].all()
