"""The notation of `ns`: what is read, and how mistakes are named."""

import pytest

from configs.groups import Group
from configs.notation import NAMES, check_ns, parse_table


@pytest.mark.parametrize(("text", "safety", "triples"), [
    ("2,-1.5,0.5", 1, ((2, -1.5, 0.5),)),
    ("3,-2e0,.5; 2, -1.5, .5", 1, ((3, -2, 0.5), (2, -1.5, 0.5))),
    ("safety=1.02;2,-1.5,0.5", 1.02, ((2, -1.5, 0.5),)),
])
def test_what_is_read(text, safety, triples):
    assert parse_table(text) == (safety, triples)
    assert Group(ns=text).ns == text


@pytest.mark.parametrize("name", NAMES)
def test_names_are_taken(name):
    check_ns(name)


@pytest.mark.parametrize(("text", "said"), [
    ("polarexpress", "did you mean 'polar_express'"),
    ("zzz", "choices: quintic, polar_express"),
    ("", "unknown ns ''"),
    ("2,-1.5", "cannot read '2,-1.5'"),
    ("2,-1.5,.5;", "cannot read ''"),
    ("2,-1.5,.5,1", "cannot read '2,-1.5,.5,1'"),
    ("2,-1.5,half", "cannot read '2,-1.5,half'"),
    ("2,-1.5,nan", "cannot read '2,-1.5,nan'"),
    ("2,-1.5,inf", "cannot read"),
    ("safety=0.9;2,-1.5,.5", "safety must be at least 1, got 0.9"),
    ("safety=much;2,-1.5,.5", "cannot read 'much'"),
    ("safety=1.02;", "cannot read ''"),
])
def test_what_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        Group(ns=text)
