"""Spaces: parsing, the law of the draws, and flags that come back as the values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.cli import parse_row
from configs.serialize import config_to_dict, flatten
from scripts.lab.spaces import Range, draw, flags_of, parse_grid, parse_range

LR = Range("optim.matrix.lr", 0.001, 0.1, "log")
MOMENTUM = Range("optim.matrix.momentum", 0.8, 0.999, "one_minus")
GAIN = Range("model.init_gain", 0.0, 2.0, "linear")


def test_a_range_is_read():
    assert parse_range("optim.matrix.lr=0.001:0.1:log") == LR
    assert parse_range("model.init_gain=0:2") == GAIN


@pytest.mark.parametrize("text, reason", [
    ("optim.matrix.lr", "NAME=LOW:HIGH:SCALE"),
    ("optim.matrix.lr=1", "NAME=LOW:HIGH:SCALE"),
    ("optim.matrix.lr=1:2:log:3", "NAME=LOW:HIGH:SCALE"),
    ("optim.matrix.lr=a:2:log", "could not convert"),
    ("optim.matrix.lr=2:1:log", "must rise from LOW to HIGH"),
    ("optim.matrix.lr=nan:1:log", "must rise from LOW to HIGH"),
    ("optim.matrix.lr=0:1:log", "LOW above 0"),
    ("optim.matrix.momentum=0:1:one_minus", "HIGH below 1"),
    ("optim.matrix.lr=1:2:logg", "did you mean 'log'"),
    ("optim.matrx.lr=1:2:log", "did you mean 'optim.matrix.lr'"),
])
def test_a_bad_range_says_why(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_range(text)


def test_a_grid_is_read():
    assert parse_grid("optim.matrix.lr=0.01, 0.02") == ("optim.matrix.lr", ("0.01", "0.02"))
    assert parse_grid("schedule.lr=1,0=1 100%=0") == ("schedule.lr", ("1", "0=1 100%=0"))


@pytest.mark.parametrize("text", ["optim.matrix.lr", "optim.matrix.lr=", "optim.matrix.lr=1,,2", "optim.matrix.lr=1,1",
                                  "optim.lr=1"])
def test_a_bad_grid_is_refused(text):
    with pytest.raises(ValueError):
        parse_grid(text)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.booleans())
def test_fewer_draws_are_the_first_of_more(count, more, seed, quasi):
    few = draw([LR, MOMENTUM], count, seed=seed, quasi=quasi)
    assert few == draw([LR, MOMENTUM], count + more, seed=seed, quasi=quasi)[:count]


@pytest.mark.parametrize("quasi", [False, True])
def test_seeds_differ(quasi):
    assert draw([LR], 3, seed=1, quasi=quasi) != draw([LR], 3, seed=2, quasi=quasi)


@given(st.floats(0, 1), st.floats(0, 1))
def test_values_lie_within_and_rise(a, b):
    low, high = sorted((a, b))
    for one in (LR, MOMENTUM, GAIN):
        assert one.low <= one.at(low) <= one.at(high) <= one.high


def test_half_way_is_the_scales_own_mean():
    assert LR.at(0.5) == pytest.approx(0.01)
    assert 1 - MOMENTUM.at(0.5) == pytest.approx(math.sqrt(0.2 * 0.001), rel=1e-3)
    assert GAIN.at(0.5) == 1.0


@pytest.mark.parametrize("quasi", [False, True])
def test_draws_are_uniform_in_the_scale(quasi):
    points = draw([LR, MOMENTUM], 2000, seed=3, quasi=quasi)
    shares = np.array([[math.log(p[LR.name] / LR.low) / math.log(100),
                        math.log((1 - p[MOMENTUM.name]) / 0.2) / math.log(0.001 / 0.2)] for p in points])
    for column in shares.T:
        counts = np.histogram(column, bins=10, range=(0, 1))[0]
        assert (abs(counts - 200) < (15 if quasi else 70)).all()


def test_no_draws_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        draw([LR], 0, seed=1, quasi=False)


@given(st.integers(0, 50))
def test_flags_come_back_as_the_values(seed):
    values = draw([LR, MOMENTUM, GAIN], 1, seed=seed, quasi=False)[0]
    config = flatten(config_to_dict(parse_row("bytes", flags_of(values))))
    assert {name: config[name] for name in values} == values


def test_switches_have_no_value():
    flags = flags_of({"model.smear": "false", "model.x0_skip": True, "model.layers": 3})
    assert flags == ("--model.no_smear", "--model.x0_skip", "--model.layers", "3")
