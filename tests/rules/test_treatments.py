import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import parasparse as ps
from parasparse.counts import num_kept


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.filterwarnings("ignore:no entry is left")
@given(st.floats(0, 1))
def test_local_pruning_counts_in_every_tensor(sparsity):
    model = ps.sparsify(net(), sparsity)
    assert [int(m.sum()) for _, m in ps.named_masks(model)] == [
        num_kept(n, sparsity) for n in (128, 64)
    ]


@pytest.mark.filterwarnings("ignore:no entry is left")
@given(st.floats(0, 1), st.integers(0, 2**31))
def test_global_pruning_keeps_the_budget_and_the_order_over_the_group(sparsity, seed):
    torch.manual_seed(seed)
    model = ps.sparsify(net(), ps.Prune(sparsity, scope="global"))
    masks = torch.cat([m.flatten() for _, m in ps.named_masks(model)])
    values = torch.cat(
        [ps.stored(model, n).detach().abs().flatten() for n, _ in ps.named_masks(model)]
    )
    assert int(masks.sum()) == num_kept(192, sparsity)
    if 0 < masks.sum() < 192:
        assert values[masks].min() >= values[~masks].max()


@pytest.mark.filterwarnings("ignore:no entry is left")
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_global_pruning_agrees_with_torch_prune(sparsity):
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randperm(parameter.numel()).view(parameter.shape) + torch.rand(())
            )
    ps.sparsify(model, ps.Prune(sparsity, scope="global"))
    found = [mask.clone() for _, mask in ps.named_masks(model)]
    ps.unsparsify(model)
    layers = [(model[0], "weight"), (model[2], "weight")]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=round(192 * sparsity))
    for mask, (layer, _) in zip(found, layers, strict=True):
        assert torch.equal(mask, layer.weight_mask.bool())


def test_a_group_is_what_one_rule_reaches():
    model = ps.sparsify(net(), {"0": ps.Prune(0.5, scope="global"), "2": 0.25})
    assert [int(m.sum()) for _, m in ps.named_masks(model)] == [64, 48]


def test_resparsifying_ranks_the_stored_weights_and_targets_are_absolute():
    model, fresh = nn.Linear(10, 10), nn.Linear(10, 10)
    fresh.load_state_dict(model.state_dict())
    ps.sparsify(model, ps.Prune(0.9, score=ps.scores.random))
    ps.sparsify(model, 0.5)  # what the first mask dropped comes back where it is large
    ps.sparsify(fresh, 0.5)
    assert torch.equal(ps.mask_of(model, "weight"), ps.mask_of(fresh, "weight"))


def test_resparsifying_keeps_the_mask_module_and_its_buffer():
    model = ps.sparsify(nn.Linear(10, 10), 0.9)
    module, buffer = model.parametrizations.weight[0], ps.mask_of(model, "weight")
    ps.sparsify(model, 0.2)
    assert model.parametrizations.weight[0] is module
    assert ps.mask_of(model, "weight") is buffer
    assert int(buffer.sum()) == 80


def test_zeros_keeps_what_is_not_zero_now_in_effect():
    model = net()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    ps.sparsify(model, "zeros")
    assert ps.mask_of(model, "0.weight").float().mean() == 0.5
    assert ps.mask_of(model, "2.weight").all()
    ps.sparsify(model, 0.75)
    ps.sparsify(model, {"2": "zeros"})  # what its mask drops is 0 now
    assert ps.mask_of(model, "2.weight").float().mean() == 0.25


def test_scores_patterns_distributions_and_treatments_may_be_any_callable():
    def by_column(tensor, name):
        return torch.arange(tensor.shape[1]).expand(tensor.shape)

    def first(scores, sparsity):
        return scores >= scores.max() * sparsity

    def shares(shapes, sparsity):
        return {name: sparsity if len(shape) == 2 else 0.0 for name, shape in shapes.items()}

    rule = ps.Prune(0.5, score=by_column, pattern=first, distribution=shares)
    model = ps.sparsify(net(), rule)
    assert ps.mask_of(model, "2.weight")[0].tolist() == [False] * 8 + [True] * 8
    ps.sparsify(model, {"*": lambda tensors: {n: t > 0 for n, t in tensors.items()}})
    assert torch.equal(ps.mask_of(model, "0.weight"), ps.stored(model, "0.weight") > 0)


def test_random_scores_take_a_generator_by_partial():
    def masks():
        generator = torch.Generator().manual_seed(3)
        score = functools.partial(ps.scores.random, generator=generator)
        model = ps.sparsify(net(), ps.Prune(0.5, score=score))
        return [mask for _, mask in ps.named_masks(model)]

    assert all(torch.equal(a, b) for a, b in zip(masks(), masks(), strict=True))


def test_a_pattern_that_brings_its_sparsity_is_used_alone():
    model = ps.sparsify(net(), {"*": ps.Prune(pattern=ps.patterns.n_of_m(2, 4))})
    for name, mask in ps.named_masks(model):
        assert (mask.view(-1, 4).sum(1) == 2).all()
        scores = ps.stored(model, name).detach().abs().view(-1, 4)
        assert torch.equal(
            scores.masked_fill(~mask.view(-1, 4), 0).sum(1), scores.topk(2).values.sum(1)
        )


def test_a_callable_may_return_modules_that_mask():
    class Half(nn.Module):
        def forward(self, tensor):
            return torch.where(tensor > 0, tensor, 0)

    model = nn.Linear(4, 4)
    dense = model.weight.detach().clone()
    ps.sparsify(model, {"weight": lambda tensors: {n: Half() for n in tensors}})
    assert torch.equal(model.weight, dense.clamp(min=0))
    ps.binarize(model)
    assert torch.equal(ps.mask_of(model, "weight"), dense > 0)
    assert torch.equal(ps.squash(model).weight, dense.clamp(min=0))


def test_live_masks_of_the_model_can_be_swapped_and_transposed():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ps.sparsify(model, ps.Prune(0.5, score=ps.scores.random))
    live = dict(ps.named_masks(model))
    before = {name: mask.clone() for name, mask in live.items()}
    swapped = {"0.weight": live["1.weight"], "1.weight": live["0.weight"].t()}
    ps.sparsify(model, swapped)
    assert torch.equal(ps.mask_of(model, "0.weight"), before["1.weight"])
    assert torch.equal(ps.mask_of(model, "1.weight"), before["0.weight"].t())
    ps.deploy_masks(model, {"0": live["1.weight"].t(), "1": live["0.weight"]})
    assert torch.equal(ps.mask_of(model, "0.weight"), before["0.weight"])
    assert torch.equal(ps.mask_of(model, "1.weight"), before["1.weight"])


def test_scores_that_carry_gradients_leave_none_behind():
    model = nn.Linear(4, 4)
    ps.sparsify(model, ps.Prune(0.5, score=lambda t, n: model.weight * 2))
    assert not ps.mask_of(model, "weight").requires_grad
    assert int(ps.mask_of(model, "weight").sum()) == 8


def test_plan_says_what_sparsify_does_and_changes_nothing():
    model = net()
    before, values = repr(model), {k: v.clone() for k, v in model.state_dict().items()}
    rows = ps.plan(model, {"0": ps.Prune(0.9), "2.weight": ps.Gate(init=1.0), "0.bias": [1] * 16})
    assert [(r.name, r.shape, r.rule, r.kept) for r in rows] == [
        ("0.weight", (16, 8), "0", 13),
        ("2.weight", (4, 16), "2.weight", None),
        ("0.bias", (16,), "0.bias", 16),
    ]
    assert repr(model) == before
    assert all(torch.equal(values[k], v) for k, v in model.state_dict().items())
    text = repr(rows)
    assert "0.weight" in text
    assert "Gate(init=1.0)" in text
    assert "at 0x" not in text


@pytest.mark.parametrize(
    "treatment",
    [np.float32(0.5), np.float64(0.5), ps.Fixed(torch.ones(16, 8)), ps.Fixed([[1] * 8] * 16)],
    ids=["float32", "float64", "tensor", "list"],
)
def test_plan_shows_every_treatment_on_one_line(treatment):
    rows = ps.plan(net(), {"0": treatment})
    assert "\n" not in rows[0].treatment
    assert len(rows[0].treatment) < 60
    assert len(repr(rows).splitlines()) == 4  # with the tensors left dense


def test_gates_train_and_harden_and_fold_their_scale():
    model = ps.sparsify(net(), {"*": ps.Gate(init=-0.5)})
    x = torch.randn(3, 8)
    dense = ps.squash(__import__("copy").deepcopy(model))
    torch.testing.assert_close(model(x), dense(x))
    model(x).sum().backward()
    gate = model[0].parametrizations.weight[0]
    assert gate.logits.grad.abs().sum() > 0
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ps.SoftMask):
                module.logits.normal_()
                module.hard = True
    expected = model(x)
    masks = {name: mask != 0 for name, mask in ps.named_masks(model)}
    ps.binarize(model)
    torch.testing.assert_close(model(x), expected)
    for name, mask in ps.named_masks(model):
        assert mask.dtype == torch.bool
        assert torch.equal(mask, masks[name])
    torch.testing.assert_close(ps.squash(model)(x), expected)


def test_a_gate_on_a_buffer_leaves_it_a_buffer():
    model = nn.BatchNorm1d(4)
    ps.sparsify(model, {"running_mean": ps.Gate()})
    ps.squash(model)
    assert list(model._buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert set(dict(model.named_parameters())) == {"weight", "bias"}


def test_gates_of_ties_and_pairs_are_shared():
    from tests.helpers.cases import PairLinear, Tied

    tied = ps.sparsify(Tied(), {"head.weight": ps.Gate()})
    assert len([p for n, p in tied.named_parameters() if "logits" in n]) == 1
    pair = ps.sparsify(PairLinear(), ps.Gate())
    assert [p.dtype for n, p in pair.named_parameters() if "logits" in n] == [torch.float32]
    pair(torch.randn(2, 6)).sum().backward()


def test_binarize_folds_real_masks_and_keeps_what_dropped_entries_store():
    model = nn.Linear(3, 1)
    stored = model.weight.detach().clone()
    ps.sparsify(model, {"weight": [[0.5, 0.0, -2.0]]})
    expected = model.weight.detach().clone()
    ps.binarize(model)
    assert ps.mask_of(model, "weight").tolist() == [[True, False, True]]
    assert torch.equal(model.weight, expected)
    assert ps.stored(model, "weight")[0, 1] == stored[0, 1]


def test_the_threshold_of_binarize_is_that_of_the_logits():
    model = ps.sparsify(nn.Linear(3, 1), {"weight": ps.Gate()})
    with torch.no_grad():
        model.parametrizations.weight[0].logits.copy_(torch.tensor([[-1.0, 0.5, 2.0]]))
    ps.binarize(model, threshold=1.0)
    assert ps.mask_of(model, "weight").tolist() == [[False, False, True]]


def test_an_entrywise_score_is_called_with_pieces_and_gives_the_same_masks():
    shapes = []

    def signed(tensor, name):
        shapes.append(tensor.shape)
        return tensor + (1.0 if name == "b" else 0.0)

    tensors = {"a": torch.randn(300, 7), "b": torch.randn(5, 4, 3)}
    expected = ps.Prune(0.6, score=signed, scope="global")(tensors)
    assert shapes == [t.shape for t in tensors.values()]
    shapes.clear()
    masks = ps.Prune(0.6, score=ps.scores.entrywise(signed), scope="global")(tensors)
    assert all(len(shape) == 1 for shape in shapes)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())


def test_an_entrywise_score_is_checked_as_others_are():
    @ps.scores.entrywise
    def pooled(tensor, name):
        return tensor.sum()

    with pytest.raises(ValueError, match="must return a real tensor of shape"):
        ps.Prune(0.5, score=pooled)({"a": torch.ones(4)})
    tensors = {"a": torch.ones(4), "b": torch.tensor([1.0, float("nan")])}
    with pytest.raises(ValueError, match="got 1 NaN of 2") as caught:
        ps.Prune(0.5, scope="global")(tensors)
    assert caught.value.__notes__ == ['while pruning "b"']
