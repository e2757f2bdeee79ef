"""`reconstruct` brings the outputs of blocks nearer to the dense ones, under their masks."""

import copy
from functools import partial

import pytest
import torch

import parasparse as ps
from tests.oneshot.block_models import MODELS, batches, masks_of

# No gradient goes through blocks that write into what they have read.
TRAINED = [kind for kind in MODELS if kind not in ("repeats", "writing")]


def pruned(kind):
    torch.manual_seed(0)
    dense = MODELS[kind]().train()
    return ps.prune_blocks(copy.deepcopy(dense), batches(), ps.Prune(0.7)), dense


@pytest.mark.parametrize("kind", TRAINED)
def test_outputs_come_nearer_and_masks_stay(kind):
    model, dense = pruned(kind)
    masks, before = masks_of(copy.deepcopy(model)), copy.deepcopy(model)
    kept = copy.deepcopy(dense.state_dict())
    errors = []
    ps.reconstruct(model, dense, batches(), steps=30, progress=lambda *told: errors.append(told))
    assert all(after < before for _, before, after in errors)
    with torch.no_grad():
        near, far = (
            sum(float((each(x.clone()) - dense(x.clone())).square().sum()) for x in batches())
            for each in (model, before)
        )
    assert near < far
    assert all(torch.equal(mask, masks[name]) for name, mask in ps.named_masks(model))
    assert all(torch.equal(kept[name], value) for name, value in dense.state_dict().items())
    assert all(p.grad is None for p in (*model.parameters(), *dense.parameters()))
    assert model.training
    assert dense.training


def test_only_parameters_of_blocks_that_require_gradients_change():
    model, dense = pruned("chain")
    for parameter in model.layers[1].norm.parameters():
        parameter.requires_grad = False
    before = copy.deepcopy(model.state_dict())
    ps.reconstruct(model, dense, batches(), blocks="layers.1", steps=5)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed
    assert all(name.startswith("layers.1.") and "norm" not in name for name in changed)


def test_a_block_whose_error_does_not_fall_stays_as_it_was():
    model, dense = pruned("chain")
    before = copy.deepcopy(model.state_dict())
    far = partial(torch.optim.SGD, lr=1e3)
    ps.reconstruct(model, dense, batches(), steps=2, optimizer=far)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_error_leaves_the_block_as_it_was():
    model, dense = pruned("writing")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ps.reconstruct(model, dense, batches(), steps=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


WRONG = {
    "itself": (lambda model, dense: (model, model, batches()), "another model"),
    "other blocks": (
        lambda model, dense: (model, MODELS["two_stacks"](), batches()), "must call the blocks",
    ),
    "a block called twice": (
        lambda model, dense: (pruned("repeats")[0], pruned("repeats")[1], batches()), "called once",
    ),
    "no batches": (lambda model, dense: (model, dense, []), "at least one batch"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_call_is_an_error(kind):
    arguments, text = WRONG[kind]
    with pytest.raises(ValueError, match=text):
        ps.reconstruct(*arguments(*pruned("chain")))
