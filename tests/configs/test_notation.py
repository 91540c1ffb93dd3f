"""Notations of settings: valid ones are parsed, invalid ones raise an error that quotes the offending word."""

import pytest

from configs.notation import TABLE_NAMES, check_table, number_of, parse_by_name, parse_table, unmatched_keys


@pytest.mark.parametrize(("text", "safety", "triples"), [
    ("2,-1.5,0.5", 1, ((2, -1.5, 0.5),)),
    ("3,-2e0,.5; 2, -1.5, .5", 1, ((3, -2, 0.5), (2, -1.5, 0.5))),
    ("safety=1.02;2,-1.5,0.5", 1.02, ((2, -1.5, 0.5),)),
])
def test_valid_tables_are_parsed(text, safety, triples):
    assert parse_table(text) == (safety, triples)
    check_table(text)


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_table_names_are_accepted(name):
    check_table(name)


@pytest.mark.parametrize(("text", "message"), [
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
def test_invalid_tables_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        check_table(text)


def test_a_tensor_gets_the_number_of_the_last_key_in_its_name():
    numbers = parse_by_name(("mlp=2", "mlp.down=.5"))
    names = {"blocks.0.mlp.down.weight": 0.5, "blocks.0.mlp.up.weight": 2, "blocks.0.mlps.up": 1, "down": 1}
    assert {name: number_of(name, numbers, 1) for name in names} == names
    assert unmatched_keys(numbers, ["blocks.0.mlp.up"]) == ["mlp.down"]


@pytest.mark.parametrize("word", ["mlp.down", "=2", "a=-1", "a=0", "a=nan", "a=inf", "a=two"])
def test_invalid_numbers_by_name_are_refused(word):
    with pytest.raises(ValueError, match=f"positive number, such as mlp.down=4, got '{word}'"):
        parse_by_name((word,))
