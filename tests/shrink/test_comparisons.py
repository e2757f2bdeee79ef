"""What a program decides by comparing sizes stays: the sizes follow, or the channels stay."""

import copy
import math
from functools import lru_cache

import pytest
import torch

import parasparse as ps
from tests.shrink.test_rules import Between, example, zeroed


def checked(condition):
    """A function that does not run unless `condition` holds."""

    def f(self, x):
        if not condition(self, x):
            raise ValueError("another size")
        return x.relu()

    return f


DECIDES = {
    "equal": lambda self, x: 2 * x if x.shape[-1] == 8 else x,
    "on the right": lambda self, x: 2 * x if 8 == x.size(-1) else x,  # noqa: SIM300
    "not equal": lambda self, x: 2 * x if x.shape[-1] != 6 else x,
    "greater": lambda self, x: 2 * x if x.shape[-1] > 6 else x,
    "than a float": lambda self, x: 2 * x if x.shape[-1] <= 6.5 else x,
    "in a chain": lambda self, x: 2 * x if 7 < x.shape[-1] < 9 else x,
    "remainder": lambda self, x: x if x.shape[-1] % 4 else 2 * x,
    "bits": lambda self, x: 2 * x if x.shape[-1] & 2 == 0 else x,
    "divmod": lambda self, x: 2 * x if divmod(x.shape[-1], 4)[0] == 2 else x,
    "shift": lambda self, x: 2 * x if x.shape[-1] >> 3 else x,
    "maximum": lambda self, x: max(x.shape[-1], 7) * x,
    "among others": lambda self, x: 2 * x if x.shape[-1] in (4, 8) else x,
    "shape": lambda self, x: 2 * x if x.shape[1:] == (4, 8) else x,
    "weight": lambda self, x: 2 * x if len(self.one.weight) == 8 else x,
    "attribute of a layer": lambda self, x: 2 * x if self.one.out_features == 8 else x,
    "attribute": lambda self, x: (2 * x if self.width > 6 else x).view(-1, 4, self.width),
    "required": checked(lambda self, x: x.shape[-1] == 8),
}


@pytest.mark.parametrize("f", DECIDES.values(), ids=DECIDES)
def test_channels_stay_whose_number_decides(f):
    model = zeroed(Between(f, width=8), 0, 1)
    plan = ps.plan_shrink(model, example())
    assert not plan.rows
    assert all("compar" in row.reason or "number" in row.reason for row in plan.kept_back)


SAME = {
    "attribute": checked(lambda self, x: x.shape[-1] == self.width),
    "shape": checked(lambda self, x: x.shape == (len(x), 4, self.width)),
    "attribute of a layer": checked(lambda self, x: x.size(-1) == self.one.out_features),
    "other tensor": checked(lambda self, x: x.shape == x.relu().shape),
    "other size": lambda self, x: 2 * x if x.shape[-1] == 5 else x,
    "at least": checked(lambda self, x: x.shape[-1] > 1),
    "even": checked(lambda self, x: x.shape[-1] % 2 == 0),
    "infinite": checked(lambda self, x: x.shape[-1] < math.inf),
    "nothing": checked(lambda self, x: x.shape[-1] is not None and x.shape[-1] != "8"),
    "places": lambda self, x: 2 * x if x.shape[1] == 4 else x,
    "in a layer": lambda self, x: torch.layer_norm(x.mT, (4,)).mT,
}


@pytest.mark.parametrize("f", SAME.values(), ids=SAME)
def test_channels_go_if_all_comparisons_stay_as_they_are(f):
    model, x = zeroed(Between(f, width=8), 0, 1), example()
    want = model(x)
    ps.shrink(model, x)
    assert model.one.out_features == 6
    torch.testing.assert_close(model(x), want)


def test_coupled_offers_no_channels_whose_number_is_asked_for():
    units = ps.coupled(Between(DECIDES["required"]), example().float())
    assert repr(units) == "coupled(0 units in 0 tensors)"


@pytest.mark.parametrize("name", ["greater", "not equal", "in a chain"])
def test_coupled_offers_channels_some_of_which_can_go(name):
    """`if size > 6` lets one of eight channels go, but not two."""
    units = ps.coupled(Between(DECIDES[name]), example().float())
    assert repr(units) == "coupled(8 units in 3 tensors)"


def test_channels_go_until_a_comparison_decides_otherwise():
    one, two = (zeroed(Between(DECIDES["greater"]), *range(number)) for number in (1, 2))
    assert ps.plan_shrink(one, example()).rows[0].new_shape == (7, 5)
    assert not ps.plan_shrink(two, example()).rows


def test_an_attribute_cannot_follow_two_sizes():
    f = checked(lambda self, x: x.view(8, self.width).shape and len(self.other) == self.width)
    model = Between(f, width=8, other=torch.nn.Parameter(torch.randn(8)))
    model.three = torch.nn.Linear(5, 3)
    model.forward = lambda x: Between.forward(model, x) + model.three(x) * model.other.norm()
    plan = ps.plan_shrink(zeroed(model, 0, 1), example())
    assert not plan.rows
    assert all("cannot follow" in row.reason for row in plan.kept_back)


@lru_cache
def half(number):
    return number * 0.5


@lru_cache
def large(number):
    return number > 6


@lru_cache
def divided(number, parts):
    return number // parts


REMEMBERED = {
    "number": lambda self, x: x * half(x.shape[-1]),
    "comparison": lambda self, x: 2 * x if large(x.shape[-1]) else x,
    "size": lambda self, x: x.view(*x.shape[:2], 2, divided(self.width, 2)).flatten(2).tanh(),
    "size of others": lambda self, x: x.view(*x.shape[:2], 2, divided(self.wide, 2)).flatten(2),
}


def test_sizes_that_a_program_has_remembered_are_numbers_for_the_next_run():
    """A cache keeps the sizes of a run, which are equal to those of the next one."""
    for _ in range(3):
        for f in REMEMBERED.values():
            model, x = zeroed(Between(f, width=8), 0, 4), example()
            model.wide = model.__dict__.pop("width") if f is REMEMBERED["size of others"] else 0
            small = copy.deepcopy(model)
            ps.shrink(small, ps.plan_shrink(model, x))
            torch.testing.assert_close(small(x), model(x))
