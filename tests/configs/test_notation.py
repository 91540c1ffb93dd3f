"""The small notations of settings: what is read, and how mistakes are named."""

import pytest

from configs.notation import TABLE_NAMES, check_table, number_of, parse_by_name, parse_table, unmatched_keys


@pytest.mark.parametrize(("text", "safety", "triples"), [
    ("2,-1.5,0.5", 1, ((2, -1.5, 0.5),)),
    ("3,-2e0,.5; 2, -1.5, .5", 1, ((3, -2, 0.5), (2, -1.5, 0.5))),
    ("safety=1.02;2,-1.5,0.5", 1.02, ((2, -1.5, 0.5),)),
])
def test_tables_that_are_read(text, safety, triples):
    assert parse_table(text) == (safety, triples)
    check_table(text)


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_names_are_taken(name):
    check_table(name)


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
def test_tables_that_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        check_table(text)


def test_numbers_go_to_tensors_that_have_the_key_as_whole_words_the_last_key_winning():
    numbers = parse_by_name(("mlp=2", "mlp.down=.5"))
    names = {"blocks.0.mlp.down.weight": 0.5, "blocks.0.mlp.up.weight": 2, "blocks.0.mlps.up": 1, "down": 1}
    assert {name: number_of(name, numbers, 1) for name in names} == names
    assert unmatched_keys(numbers, ["blocks.0.mlp.up"]) == ["mlp.down"]


@pytest.mark.parametrize("word", ["mlp.down", "=2", "a=-1", "a=0", "a=nan", "a=inf", "a=two"])
def test_numbers_by_name_that_are_refused(word):
    with pytest.raises(ValueError, match=f"positive, say mlp.down=4; got '{word}'"):
        parse_by_name((word,))
