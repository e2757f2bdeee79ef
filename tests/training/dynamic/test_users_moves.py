"""Dynamic sparsity with functions of one's own."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.helpers.training import build, dense_twin, masks_of, sgd, total, train

SPEC = importlib.util.spec_from_file_location(
    "sparse_learning_moves", Path(__file__).parents[3] / "examples" / "sparse_learning_moves.py"
)
sparse_learning_moves = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sparse_learning_moves)


def test_the_tutorials_functions_run_unchanged():
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    dst = ps.DynamicSparsity(
        model,
        0.8,
        optimizer,
        prune=sparse_learning_moves.magnitude_variance_pruning,
        redistribution=sparse_learning_moves.variance_redistribution,
        prune_rate=0.3,
    )
    for _ in range(20):
        train(model, optimizer, dst, 5)
        before = masks_of(model)
        variance = {
            n: optimizer.state[ps.stored(model, n)]["exp_avg_sq"].sqrt()[m].mean()
            for n, m in before.items()
        }
        dst.at_end_of_epoch()
        after = masks_of(model)
        assert total(after) == dst.baseline_nonzero
        most = max(variance, key=variance.get)
        assert after[most].float().mean() >= min(before[most].float().mean(), 0.7)
    assert dst.steps == 100
    assert len(dst.history) == 20


def test_functions_of_ones_own_see_what_they_are_promised():
    model = build()
    optimizer = sgd(model)
    seen = []

    def redistribution(masking, name, weight, mask):
        assert weight is ps.stored(model, name)
        assert not weight[mask == 0].any()
        assert mask.dtype == torch.float32
        momentum = masking.optimizer.state[weight]["momentum_buffer"]
        assert momentum is masking.get_momentum_for_weight(weight)
        assert momentum[mask == 0].any()
        assert masking.name2nonzeros[name] + masking.name2zeros[name] == mask.numel()
        return len(seen) + 1

    def prune(masking, mask, weight, name):
        assert mask.dtype == torch.float32
        assert sum(masking.name2variance.values()) == pytest.approx(1)
        assert masking.name2prune_rate[name] == masking.prune_rate == 0.25
        first = mask.flatten().nonzero()[0]
        mask.view(-1)[first] = 0.0
        return mask

    def growth(masking, name, new_mask, total_regrowth, weight):
        seen.append((name, total_regrowth))
        assert new_mask.dtype == torch.bool
        assert type(total_regrowth) is int
        assert masking.total_removed == 3
        assert masking.name2removed[name] == 1
        assert masking.total_nonzero == masking.baseline_nonzero == dst.baseline_nonzero
        assert masking.total_zero == 12 * 30 + 30 * 20 + 20 * 5 - dst.baseline_nonzero
        (inside,) = masking.modules
        names = [n for n, _ in inside.named_parameters() if n in masking.masks]
        assert names == ["0.weight", "2.weight", "3.weight"]
        assert inside.training
        free = (~new_mask).flatten().nonzero().flatten()[:total_regrowth]
        new_mask.view(-1)[free] = True
        return new_mask

    dst = ps.DynamicSparsity(
        model,
        0.8,
        optimizer,
        prune=prune,
        growth=growth,
        redistribution=redistribution,
        prune_rate=0.25,
    )
    train(model, optimizer, dst)
    dst.update()
    assert sum(number for _, number in seen) == 3
    assert total(masks_of(model)) == dst.baseline_nonzero


def test_what_growth_falls_short_of_is_made_up_for_later():
    model = build()
    optimizer = sgd(model)
    lazy = [True]

    @ps.moves.needs("weights")
    def growth(masking, name, new_mask, total_regrowth, weight):
        number = total_regrowth // 2 if lazy[0] else total_regrowth
        return ps.moves.random_growth(masking, name, new_mask, number, weight)

    for redistribution in ("magnitude", "none"):
        model = build()
        optimizer, lazy[0] = sgd(model), True
        dst = ps.DynamicSparsity(
            model, 0.8, optimizer, growth=growth, redistribution=redistribution, every=1
        )
        train(model, optimizer, dst)
        short = dst.baseline_nonzero - total(masks_of(model))
        assert dst.history[-1].missing == short > 0
        lazy[0] = False
        train(model, optimizer, dst)
        assert dst.history[-1].missing == 0
        assert total(masks_of(model)) == dst.baseline_nonzero


def test_an_emptied_layer_asks_no_function_of_ones_own_for_a_mean_of_nothing():
    model = build()
    optimizer = torch.optim.Adam(model.parameters())
    dst = ps.DynamicSparsity(
        model, 0.8, optimizer, prune=sparse_learning_moves.magnitude_variance_pruning,
        redistribution=sparse_learning_moves.variance_redistribution, prune_rate=0.3,
    )  # fmt: skip
    train(model, optimizer, dst, 3)
    ps.deploy_masks(model, {"3.weight": torch.zeros(5, 20)})
    dst.update()
    assert dst.history[-1].missing == 0
    assert int(ps.mask_of(model, "3.weight").sum()) >= 1  # it gets the first one


def test_functions_of_ones_own_go_with_an_optimizer_without_state():
    model = build()
    optimizer = sgd(model, momentum=0.0)

    def importance(masking, name, weight, mask):
        return weight.abs().mean()  # a tensor with a graph, as long as nobody says otherwise

    dst = ps.DynamicSparsity(
        model, 0.8, optimizer, growth="random", redistribution=importance, every=5
    )
    train(model, optimizer, dst, 10)
    assert len(dst.history) == 2


def test_importance_below_zero_is_none():
    model = build()
    optimizer = sgd(model)

    def signed(masking, name, weight, mask):  # the tutorial's first example
        momentum = masking.optimizer.state[weight]["momentum_buffer"]
        found[name] = momentum[mask.bool()].sum().item()
        return found[name]

    found = {}
    dst = ps.DynamicSparsity(model, 0.8, optimizer, redistribution=signed, growth="random")
    for _ in range(5):
        train(model, optimizer, dst)
        dst.update()
        assert total(masks_of(model)) == dst.baseline_nonzero
    assert min(found.values()) < 0


def test_a_layer_that_is_nearly_full_loses_less_if_it_is_important():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    optimizer = sgd(model)
    seen = {}

    @ps.moves.needs("weights")
    def importance(masking, name, weight, mask):
        return {"0.weight": 5.0, "1.weight": 0.0, "2.weight": 1.0}[name]

    @ps.moves.needs("weights")
    def prune(masking, mask, weight, name):
        seen[name] = masking.name2prune_rate[name]
        return ps.moves.magnitude_prune(masking, mask, weight, name)

    rules = {"0.weight": 0.1, "1.weight": 0.1, "2.weight": 0.5}
    dst = ps.DynamicSparsity(
        model, rules, optimizer, prune=prune, growth="random", redistribution=importance,
        prune_rate=0.4,
    )  # fmt: skip
    dst.update()
    assert seen == {"0.weight": pytest.approx(0.1), "1.weight": 0.4, "2.weight": 0.4}


def test_functions_for_all_layers_may_have_defaults_and_owe_what_was_missing():
    model = build()
    optimizer = sgd(model)
    asked = []

    @ps.moves.needs("weights")
    def prune(masking, threshold=0.05, *, verbose=False):
        removed = 0
        for module in masking.modules:
            for name, weight in module.named_parameters():
                if name in masking.masks:
                    mask = masking.masks[name]
                    removed += int(mask.sum())
                    mask[:] = mask & (weight.abs() > threshold)
                    removed -= int(mask.sum())
        return removed

    @ps.moves.needs("weights")
    def growth(masking, total_regrowth, least=1):
        asked.append((masking.total_removed, total_regrowth))
        left = total_regrowth // 2 if len(asked) == 1 else total_regrowth
        for mask in masking.masks.values():
            free = (~mask).flatten().nonzero().flatten()[:left]
            mask.view(-1)[free] = True
            left -= len(free)
        return sum(int(mask.sum()) for mask in masking.masks.values())

    dst = ps.DynamicSparsity(
        model, 0.8, optimizer, prune=functools.partial(prune, threshold=0.1), growth=growth,
        redistribution="nonzero",
    )  # fmt: skip
    dst.update()
    missing = dst.history[0].missing
    assert asked[0][0] == asked[0][1] > missing > 0
    assert total(masks_of(model)) == dst.baseline_nonzero - missing
    dst.update()
    assert asked[1][1] == asked[1][0] + missing
    assert total(masks_of(model)) == dst.baseline_nonzero


def test_a_failed_update_asks_for_the_dense_gradient_again():
    model = build()
    optimizer = sgd(model)
    fails = [True]

    @ps.moves.needs("gradient")
    def growth(masking, name, new_mask, total_regrowth, weight):
        if fails[0]:
            raise KeyError(name)
        seen[name] = masking.get_gradient_for_weight(weight).clone()
        return ps.moves.gradient_growth(masking, name, new_mask, total_regrowth, weight)

    seen = {}
    dst = ps.DynamicSparsity(model, 0.8, optimizer, growth=growth, redistribution="none", every=2)
    train(model, optimizer, dst)
    with pytest.raises(KeyError) as error:
        train(model, optimizer, dst)
    assert 'while growth was called for "0.weight"' in error.value.__notes__
    fails[0] = False
    optimizer.zero_grad()
    x = torch.randn(8, 12)
    dense = dense_twin(model)
    for net in (model, dense):
        net(x).square().mean().backward()
    optimizer.step()
    dst.step()
    assert dst.steps == 2
    for name, grad in seen.items():
        torch.testing.assert_close(grad, dict(dense.named_parameters())[name].grad)


def test_what_a_move_did_not_ask_for_it_does_not_get():
    model = build()
    optimizer = sgd(model)

    def growth(masking, name, new_mask, total_regrowth, weight):
        return ps.moves.gradient_growth(masking, name, new_mask, total_regrowth, weight)

    dst = ps.DynamicSparsity(model, 0.8, optimizer, growth=growth, redistribution="none")
    train(model, optimizer, dst)
    with pytest.raises(RuntimeError, match="decorate the function that reads it"):
        dst.update()

    def copied(masking, name, weight, mask):
        return masking.get_momentum_for_weight(weight.data)

    dst = ps.DynamicSparsity(model, 0.8, optimizer, redistribution=copied)
    train(model, optimizer, dst)
    with pytest.raises(ValueError, match="must be one of `masking.weights`"):
        dst.update()
    with pytest.raises(ValueError, match='`what` must be from "weights", .*got "momentm"'):
        ps.moves.needs("momentm")
    with pytest.raises(TypeError, match="`optimizer` must be a torch optimizer; got None"):
        ps.DynamicSparsity(build(), 0.8, None)
