"""The wording of common errors."""

import pytest

from parasparse.counts import check_sparsity
from parasparse.text import listed, nearest, needs


def test_eight_names_are_listed_and_the_others_counted():
    assert listed([]) == ""
    assert listed("abcdefgh") == '"a", "b", "c", "d", "e", "f", "g", "h"'
    assert listed("abcdefghi") == f"{listed('abcdefgh')} and 1 more"
    assert listed("abcd", most=2) == '"a", "b" and 2 more'


def test_the_three_nearest_names_are_told_if_any_is_like_it():
    assert nearest("wieght", ["bias", "weight"]) == ' (nearest: "weight")'
    assert nearest("abcd", ["abxy", "axyz"]) == ' (nearest: "abxy")'  # half alike
    assert nearest("conv1", [f"conv{n}" for n in range(2, 7)]).count("conv") == 3
    assert nearest("weight", ["bias"]) == nearest("weight", []) == ""


def test_a_missing_library_is_told_with_the_commands_that_install_it():
    assert needs("`plot`", "matplotlib", "plot") == (
        '`plot` needs matplotlib: run `pip install "parasparse[plot]"`, or '
        '`pip install ".[plot]"` in a checkout.'
    )


def test_what_is_no_number_is_told_with_its_type():
    with pytest.raises(TypeError, match="`share` must be a number.*got 'half' of type str"):
        check_sparsity("half", "share")
