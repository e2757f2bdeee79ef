import copy
import math

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.counts import num_kept


def build():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )


def train(model, optimizer, lottery, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 1, 5, 5)).square().mean().backward()
        optimizer.step()
        lottery.step()


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(".mask")}


@pytest.mark.parametrize("rewind_step", [0, 3])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_each_round_prunes_what_was_trained_and_rewinds_everything_else(rewind_step, scope):
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    lottery = ps.LotteryTicket(
        model, {"*": ps.Prune(0.9, scope=scope)}, optimizer, rounds=4, rewind_step=rewind_step
    )
    assert all(mask.all() for _, mask in ps.named_masks(model))
    train(model, optimizer, lottery, rewind_step)
    first, state = state_of(model), copy.deepcopy(optimizer.state_dict())
    parameters = list(model.parameters())
    before = {name: mask.clone() for name, mask in ps.named_masks(model)}
    for number in range(1, 5):
        train(model, optimizer, lottery, 4)
        trained = {name: ps.stored(model, name).detach().clone() for name in before}
        lottery.prune()
        masks = {name: mask.clone() for name, mask in ps.named_masks(model)}
        sparsity = 1 - 0.1 ** (number / 4)
        if scope == "global":
            kept = sum(int(mask.sum()) for mask in masks.values())
            assert kept == num_kept(36 + 180, sparsity)
        for name, mask in masks.items():
            assert not (mask & ~before[name]).any()  # once dropped is dropped
            if scope == "local":
                assert int(mask.sum()) == num_kept(mask.numel(), sparsity)
                gone = before[name] & ~mask
                assert trained[name][gone].abs().max() <= trained[name][mask].abs().min()
        before = masks
        assert all(torch.equal(value, first[key]) for key, value in state_of(model).items())
        assert all(one is two for one, two in zip(parameters, model.parameters(), strict=True))
        found = optimizer.state_dict()
        for one, two in zip(*map(torch.utils._pytree.tree_leaves, (found, state)), strict=True):
            assert torch.equal(one, two) if torch.is_tensor(one) else one == two
        assert (lottery.round, lottery.steps) == (number, rewind_step)
    assert [update.step for update in lottery.history] == [rewind_step + 4] * 4
    with pytest.raises(RuntimeError, match="all 4 rounds have ended, and the model holds"):
        lottery.prune()


def test_a_ticket_is_the_state_of_the_model_and_loads_into_a_dense_one():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lottery = ps.LotteryTicket(model, 0.8, optimizer, rounds=1)
    train(model, optimizer, lottery, 3)
    lottery.prune()
    other = build()
    ps.load_state_dict(other, copy.deepcopy(model.state_dict()))
    x = torch.randn(2, 1, 5, 5)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_any_score_and_pattern_will_do():
    model = build()
    lottery = ps.LotteryTicket(
        model,
        {
            "0.weight": ps.Prune(0.5, pattern=ps.patterns.channel(0)),
            "4.weight": ps.Prune(0.75, score=lambda tensor, name: tensor),
        },
        rounds=2,
    )
    lottery.prune()
    first = ps.mask_of(model, "0.weight").clone()
    lottery.prune()
    mask = ps.mask_of(model, "0.weight")
    assert mask.flatten(1).any(1).equal(mask.flatten(1).all(1))
    assert int(mask.flatten(1).any(1).sum()) == 2
    assert not (mask & ~first).any()
    weight = ps.stored(model, "4.weight")
    kept = ps.mask_of(model, "4.weight")
    assert weight[kept].min() >= weight[~kept].max()


def test_it_goes_on_where_it_was_left():
    def run(rounds, state=None):
        torch.manual_seed(0)
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        lottery = ps.LotteryTicket(model, 0.8, optimizer, rounds=3, rewind_step=2)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            lottery.load_state_dict(state["lottery"])
        for number in rounds:
            torch.manual_seed(number)
            train(model, optimizer, lottery, 4)
            lottery.prune()
        return {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "lottery": lottery.state_dict(),
        }  # fmt: skip

    whole = run(range(3))
    rest = run(range(1, 3), copy.deepcopy(run(range(1))))
    for one, two in zip(*map(torch.utils._pytree.tree_leaves, (whole, rest)), strict=True):
        assert torch.equal(one, two) if torch.is_tensor(one) else one == two


@pytest.mark.parametrize(
    ("rules", "keywords", "text"),
    [
        (0.5, {"rounds": 0}, "`rounds` must be at least 1"),
        (0.5, {"rewind_step": -1}, "`rewind_step` at least 0"),
        (ps.Gate(), {}, "must have a sparsity"),
        ({"nowhere": 0.5}, {}, "must each reach a tensor"),
        (0.5, {"optimizer": torch.optim.SGD(build().parameters())}, "hold the parameters"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(rules, keywords, text):
    model = build()
    with pytest.raises(ValueError, match=text):
        ps.LotteryTicket(model, rules, **{"rounds": 2, **keywords})
    assert not ps.is_sparse(model)


def test_a_failed_round_changes_nothing_and_one_too_early_is_refused():
    model = build()
    lottery = ps.LotteryTicket(model, 0.5, rounds=2, rewind_step=2)
    with pytest.raises(RuntimeError, match=r"must be called after step 2, .* been called 0 times"):
        lottery.prune()
    lottery.step()
    lottery.step()
    with torch.no_grad():
        ps.stored(model, "4.weight")[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        lottery.prune()
    assert lottery.round == 0
    assert all(mask.all() for _, mask in ps.named_masks(model))


@pytest.mark.filterwarnings("ignore:no entry is left")
@pytest.mark.parametrize(
    "pattern", [ps.patterns.channel(0, norm=2), ps.patterns.block((2, 3), norm=math.inf)], ids=str
)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_patterns_with_a_norm_go_on_too(pattern, scope):
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))
    rules = {"*": ps.Prune(0.75, pattern=pattern, scope=scope)}
    lottery = ps.LotteryTicket(model, rules, rounds=3)
    before = {name: mask.clone() for name, mask in ps.named_masks(model)}
    for _ in range(3):
        lottery.prune()
        masks = {name: mask.clone() for name, mask in ps.named_masks(model)}
        assert not any((mask & ~before[name]).any() for name, mask in masks.items())
        before = masks


def test_masks_that_were_taken_off_are_missed():
    model = build()
    lottery = ps.LotteryTicket(model, 0.5, rounds=2)
    lottery.prune()
    ps.squash(model, "4.weight")
    with pytest.raises(RuntimeError, match='must stay on its model; those of "4.weight"'):
        lottery.prune()
    assert (lottery.round, len(lottery.history)) == (1, 1)


def test_a_state_that_does_not_fit_is_refused():
    one, two = build(), build()
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    lottery = ps.LotteryTicket(one, 0.5, optimizer, rounds=3)
    for _ in range(3):
        lottery.prune()
    without = ps.LotteryTicket(two, 0.5, rounds=3)
    with pytest.raises(ValueError, match="with an optimizer if this controller has one"):
        without.load_state_dict(lottery.state_dict())
    with pytest.raises(ValueError, match="with an optimizer if this controller has one"):
        lottery.load_state_dict(without.state_dict())
    model = build()
    other = torch.optim.SGD(model.parameters(), 0.1)
    shorter = ps.LotteryTicket(model, 0.5, other, rounds=2)
    with pytest.raises(ValueError, match="from at most 2 rounds.*from round 3"):
        shorter.load_state_dict(lottery.state_dict())
    model = build()
    sparser = ps.LotteryTicket(model, 0.9, torch.optim.SGD(model.parameters(), 0.1), rounds=3)
    with pytest.raises(ValueError, match="have ended, at sparsities of .*0.5.* Give it more"):
        sparser.load_state_dict(lottery.state_dict())
    assert without.round == shorter.round == sparser.round == 0
