"""Groups: an exact cover in a fixed order, their rules, and a table of their settings."""

import dataclasses

import pytest
import torch

from configs.optim import RULES, Adam, Extra, Muon, Optim, RuleConfig, Steepest
from data.run.plan import format_groups
from optim import adam, muon
from optim.groups import build_groups, build_rule
from optim.norms import Spectral

PARAMS = {"head.weight": torch.zeros(7, 4), "b.weight": torch.zeros(4, 4), "wte.weight": torch.zeros(7, 4),
          "a.weight": torch.zeros(4, 12)}
ROLES = {"wte.weight": "embed", "a.weight": "matrix", "b.weight": "matrix", "head.weight": "head"}


def table(**roles: RuleConfig) -> dict[str, str]:
    """Lines of the printed table by role, and the settings of the roles' rules as one text by "settings"."""
    optim = dataclasses.replace(Optim(), **roles)
    groups_text, settings = format_groups(build_groups(PARAMS, ROLES, optim)).split("\n\n")
    return {line.split()[0]: line for line in groups_text.splitlines()} | {"settings": " ".join(settings.split())}


def test_every_parameter_is_in_one_group():
    built = build_groups(PARAMS, ROLES, Optim())
    assert [g.role for g in built] == ["matrix", "embed", "head"]
    assert [list(g.params) for g in built] == [["b.weight", "a.weight"], ["wte.weight"], ["head.weight"]]
    assert all(g.params[name] is PARAMS[name] for g in built for name in g.params)


def test_a_group_has_its_configurations_rule():
    matrix, embed = Muon(ns="svd", unit="spectral"), Adam(beta1=0.1, graft=Muon())
    first, second, _ = build_groups(PARAMS, ROLES, Optim(matrix=matrix, embed=embed))
    assert type(first.rule) is muon.Muon and first.rule.config is first.config is matrix
    assert first.rule.norm == Spectral("spectral", "svd", 5)
    assert (type(second.rule.direction_rule), type(second.rule.length_rule)) == (adam.Adam, muon.Muon)
    assert second.rule.direction_rule.config is embed


def test_every_configuration_has_its_rule():
    assert {name: build_rule(config()).config for name, config in RULES.items()} == {
        name: config() for name, config in RULES.items()}


def test_what_is_not_covered_is_listed():
    roles = {name: role for name, role in ROLES.items() if name != "a.weight"} | {"ghost": "matrix"}
    with pytest.raises(ValueError, match=r"not covered: \['a.weight', 'ghost'\], unknown roles: \[\]"):
        build_groups(PARAMS, roles, Optim())


def test_unknown_roles_are_listed_beside_the_known():
    with pytest.raises(ValueError, match=r"unknown roles: \['b.weight: matrices'\], known roles: \['matrix', 'embed'"):
        build_groups(PARAMS, ROLES | {"b.weight": "matrices"}, Optim())


def test_no_parameters_no_groups():
    assert build_groups({}, {}, Optim()) == []


def test_table_counts_and_lists_the_rules_settings():
    lines = table(embed=Adam(lr=0.25, weight_decay=0.5, decay="cautious"),
                  head=Adam(update_every=2, extra=Extra(row_floor=0.3)))
    assert lines["matrix"].split()[1:5] == ["2", "64", "muon", "0.03"] and "unit=rms_operator" in lines["settings"]
    assert lines["embed"].split()[1:5] == ["1", "28", "adam", "0.25"] and "0.5 cautious" in lines["embed"]
    assert "adam for embed: beta1=0.8 beta2=0.95 eps=1e-10 adam for head:" in lines["settings"]
    assert "none" in lines["head"] and lines["settings"].endswith("update_every=2 row_floor=0.3")


# ---- Numbers by name -----------------------------------------------------------------------------------------------------


def specs(config: RuleConfig) -> dict[str, tuple]:
    optim = dataclasses.replace(Optim(), matrix=config)
    return {name: tuple(spec) for name, spec in build_groups(PARAMS, ROLES, optim)[0].specs.items()}


def test_factors_and_blocks_are_by_name():
    assert specs(Muon()) == {"b.weight": (-1, 1, 1), "a.weight": (-1, 1, 1)}
    extra = Extra(lr_factors=("weight=3", "a=0.5"), blocks=("b=2",))
    assert specs(Muon(extra=extra)) == {"b.weight": (-1, 2, 3), "a.weight": (-1, 1, 0.5)}


@pytest.mark.parametrize(("extra", "message"), [
    (Extra(lr_factors=("c=2",)), r"extra.lr_factors: no tensor of the role has \['c'\] in its name; they are b.weight"),
    (Extra(lr_factors=("eight=2",)), "no tensor"),  # whole words
    (Extra(blocks=("head=2",)), "matrix.extra.blocks: no tensor"),
    (Extra(blocks=("a=3",)), "3 does not divide the 4 rows of a.weight")])
def test_names_that_are_not_there_and_blocks_that_cannot_be(extra, message):
    with pytest.raises(ValueError, match=message):
        specs(Muon(extra=extra))


def test_blocks_and_sparse_rows_of_rules_that_cannot_have_them():
    with pytest.raises(ValueError, match="extra.blocks has no effect on rule steepest.*updates each row alone"):
        specs(Steepest(norm="row", extra=Extra(blocks=("a=2",))))
    with pytest.raises(ValueError, match=r"optim.matrix.extra.sparse_rows: rule muon.*whole matrices"):
        specs(Muon(extra=Extra(sparse_rows=True)))
    sparse, dense = (build_groups(PARAMS, ROLES, Optim(head=Adam(extra=Extra(sparse_rows=on))))[2] for on in (True, False))
    assert (sparse.scope, dense.scope) == ("row", "element")
