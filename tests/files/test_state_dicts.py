"""Which state dict of a torch file is read."""

import pytest
import torch

from parasparse.files.checkpoint import CheckpointError
from parasparse.files.state_dicts import at, beside, names_beside, state_dict_place

MATRIX, VECTOR = torch.ones(2, 2), torch.ones(2)
STATE = {"w": MATRIX, "b": VECTOR}
OPTIMIZER = {"state": {"w": STATE}, "param_groups": []}

# content, key, the place of the state dict, those that are passed over
CHOICES = {
    "a state dict": (STATE, None, (), []),
    "its names have dots": ({"a.w": MATRIX, "model": STATE}, None, (), ["model"]),
    "one that has numbers, tensors and a dict": ({**STATE, "extra": {"x": VECTOR}}, None, (), []),
    "matrices beside": ({**STATE, "extra": {"x": MATRIX}}, None, (), ["extra"]),
    "a usual key": ({"model": STATE, "epoch": 1}, None, ("model",), []),
    "vectors": ({"model": {"b": VECTOR}, "rng": {"s": VECTOR}}, None, ("model",), []),
    "another key": ({"generator": STATE, "best": VECTOR[0]}, None, ("generator",), []),
    "a key inside another": ({"ema": {"module": STATE, "n": 1}}, None, ("ema", "module"), []),
    "a usual one and another": ({"ema": STATE, "model": STATE}, None, ("model",), ["ema"]),
    "chosen": ({"ema": STATE, "model": STATE}, "ema", ("ema",), []),
    "chosen inside": ({"model": STATE, "e": {"m": STATE}}, "e.m", ("e", "m"), []),
    "chosen beside names with dots": ({"a.w": MATRIX, "e": STATE}, "e", ("e",), []),
    "an optimizer": ({"net": STATE, "optimizer": OPTIMIZER}, None, ("net",), []),
    "masks": ({"net": STATE, "masks": {"w": MATRIX > 0}}, None, ("net",), []),
}


@pytest.mark.parametrize(("content", "key", "place", "others"), CHOICES.values(), ids=CHOICES)
def test_the_state_dict_is_the_only_one_the_usual_one_or_the_chosen_one(
    content, key, place, others
):
    assert state_dict_place(content, "a.pt", key) == (place, others)
    assert isinstance(at(content, place), dict)


REFUSED = {
    "two": ({"g": STATE, "d": STATE}, None, 'several state dicts: "g", "d". Choose one with --key'),
    "two usual": ({"model": STATE, "net": STATE}, None, "several"),
    "unknown": ({"g": STATE, "d": STATE}, "e", 'must be one of "g", "d"'),
    "of an optimizer": ({"g": STATE, "o": OPTIMIZER}, "o.state.w", 'must be one of "g"'),
    "nothing to choose": (STATE, "model", "must be left out"),
    "none": ({"epoch": 1}, None, "must hold a state dict"),
    "a list": ([STATE], None, "holds list"),
}


@pytest.mark.parametrize(("content", "key", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_chosen_is_refused(content, key, message):
    with pytest.raises(CheckpointError, match=message):
        state_dict_place(content, "a.pt", key)


def test_the_rest_is_everything_but_the_state_dict():
    content = {"ema": {"module": STATE, "n": 3}, "only": {"it": STATE}, "epoch": 1}
    assert beside(content, ()) == {}
    assert beside(content, ("epoch",)).keys() == {"ema", "only"}
    assert beside(content, ("ema", "module"))["ema"] == {"n": 3}
    assert "only" not in beside(content, ("only", "it"))
    assert names_beside(content, ("ema", "module")) == ["only", "epoch", "ema.n"]
    assert names_beside(content, ()) == []
