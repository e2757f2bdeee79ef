import copy
import math
import pickle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from parasparse.schedules import (
    Constant,
    Cosine,
    Cubic,
    Every,
    Exponential,
    Linear,
    OneCycle,
    as_every,
)

RAMPS = [Linear, Cubic, Cosine, Exponential, OneCycle]
ramp = pytest.mark.parametrize("ramp", RAMPS, ids=lambda ramp: ramp.__name__)
steps = st.integers(-100, 100)
values = st.floats(0.01, 100)


@ramp
@given(values, values, steps, st.integers(1, 100), steps)
def test_ends_are_exact_and_what_is_outside_stays(ramp, initial, final, start, length, step):
    schedule = ramp(initial, final, start=start, stop=start + length)
    assert schedule(start) == initial
    assert schedule(start + length) == final
    value = schedule(step)
    if step <= start:
        assert value == initial
    elif step >= start + length:
        assert value == final
    else:
        slack = 1e-9 * max(initial, final)
        assert min(initial, final) - slack <= value <= max(initial, final) + slack


@ramp
@given(values, values, st.integers(2, 100))
def test_they_go_one_way(ramp, initial, final, stop):
    every = [ramp(initial, final, stop=stop)(step) for step in range(stop + 1)]
    ordered = sorted(every, reverse=initial > final)
    assert every == pytest.approx(ordered, rel=1e-9)


@given(st.floats(-10, 10), st.floats(-10, 10), st.integers(1, 50), st.integers(0, 50))
def test_they_are_the_formulas_of_their_papers(initial, final, stop, step):
    t = min(step, stop) / stop
    arguments = (initial, final)
    assert Linear(*arguments, stop=stop)(step) == pytest.approx(initial + (final - initial) * t)
    # Zhu & Gupta, equation 1
    assert Cubic(*arguments, stop=stop)(step) == pytest.approx(
        final + (initial - final) * (1 - t) ** 3
    )
    # torch's CosineAnnealingLR, closed form, up to T_max
    assert Cosine(*arguments, stop=stop)(step) == pytest.approx(
        final + (initial - final) * (1 + math.cos(math.pi * t)) / 2
    )
    high, low = abs(initial) + 1, abs(final) + 1
    assert Exponential(high, low, stop=stop)(step) == pytest.approx(high ** (1 - t) * low**t)
    # Hubens et al., equation 2, which misses its ends by less than a hundredth of the way
    theirs = initial + (final - initial) * (1 + math.exp(-14 + 5)) / (1 + math.exp(-14 * t + 5))
    ours = OneCycle(*arguments, stop=stop)(step)
    assert abs(ours - theirs) <= 0.01 * abs(final - initial) + 1e-12
    first, here, last = (1 / (1 + math.exp(-14 * p + 5)) for p in (0, t, 1))
    assert ours == pytest.approx(initial + (final - initial) * (here - first) / (last - first))


@given(st.integers(1, 20), steps, st.none() | st.integers(0, 100), steps)
@example(n=3, start=2, length=0, step=2)
def test_every_counts_from_its_start_to_its_stop(n, start, length, step):
    stop = None if length is None else start + length
    counted = Every(n, start=start, stop=stop)(step)
    last = step + 1 if stop is None else stop + 1
    assert counted == (step in range(start, last, n))


def test_every_may_be_given_as_a_number_or_a_function():
    def own(step):
        return step == 4

    assert as_every(own) is own
    assert as_every(3) == as_every(np.int64(3)) == Every(3)
    assert [step for step in range(-3, 7) if as_every(3)(step)] == [0, 3, 6]
    for value in (True, 2.0, "3", None):
        with pytest.raises(TypeError, match="`every` must be a whole number of steps"):
            as_every(value)
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        as_every(0)


@pytest.mark.parametrize(
    "schedule",
    [Constant(0.5), Every(3, stop=9), *(ramp(1.0, 2.0, start=3, stop=9) for ramp in RAMPS)],
    ids=repr,
)
def test_they_print_compare_copy_and_pickle(schedule):
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert repr(other) == repr(schedule)
        assert [other(step) for step in range(12)] == [schedule(step) for step in range(12)]
    assert eval(repr(schedule)) == schedule


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Constant(math.nan), "`value` must be a finite number; got nan"),
        (lambda: Linear(0.0, 1.0, stop=0), "`stop` must be after `start`, 0; got 0"),
        (lambda: Cubic(0.0, 1.0, start=5, stop=4), "5; got 4"),
        (lambda: Cosine(math.inf, 1.0, stop=4), "`initial` must be a finite number"),
        (lambda: OneCycle(0.0, math.nan, stop=4), "`final` must be a finite number"),
        (lambda: Exponential(0.0, 1.0, stop=4), "must be above 0; got 0.0 and 1.0"),
        (lambda: Exponential(1.0, 0.0, stop=4), "must be above 0; got 1.0 and 0.0"),
        (lambda: Every(0), "`n` must be at least 1; got 0"),
        (lambda: Every(2, start=3, stop=2), "`stop` must not be before `start`"),
    ],
)
def test_bad_numbers_are_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()
