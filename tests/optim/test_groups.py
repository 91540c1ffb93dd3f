"""Groups: an exact cover in a fixed order, strays by name, and a table of what acts."""

import dataclasses

import pytest
import torch

from configs.groups import Group, Optim
from optim.groups import build_groups, group_table
from optim.norms import Spectral
from optim.rules.adam import Adam
from optim.rules.average import Average
from optim.rules.steepest import Steepest

PARAMS = {"head.weight": torch.zeros(7, 4), "b.weight": torch.zeros(4, 4), "wte.weight": torch.zeros(7, 4),
          "a.weight": torch.zeros(4, 12)}
ROLES = {"wte.weight": "embed", "a.weight": "matrix", "b.weight": "matrix", "head.weight": "head"}


def table(**groups: Group) -> dict[str, str]:
    """Lines of the printed table by role."""
    optim = dataclasses.replace(Optim(), **groups)
    return {line.split()[0]: line for line in group_table(build_groups(PARAMS, ROLES, optim)).splitlines()}


def test_every_parameter_is_in_one_group():
    groups = build_groups(PARAMS, ROLES, Optim())
    assert [g.role for g in groups] == ["matrix", "embed", "head"]
    assert [list(g.params) for g in groups] == [["b.weight", "a.weight"], ["wte.weight"], ["head.weight"]]
    assert all(g.params[name] is PARAMS[name] for g in groups for name in g.params)


def test_a_group_has_its_configurations_rule():
    matrix = Group(rule="steepest", norm="spectral", ns="svd", nesterov=False, averaging="heavy_ball")
    embed = Group(beta1=0.1, beta2=0.2, eps=0.3)
    groups = build_groups(PARAMS, ROLES, Optim(matrix=matrix, embed=embed))
    assert groups[0].rule == Steepest(Spectral("plain", "svd", 5), Average("heavy_ball", False))
    assert groups[0].config is matrix
    assert groups[1].rule == Adam(0.1, 0.2, 0.3) and groups[1].config is embed


def test_strays_are_listed():
    roles = {name: role for name, role in ROLES.items() if name != "a.weight"} | {"ghost": "matrix"}
    with pytest.raises(ValueError, match=r"strays: \['a.weight', 'ghost'\], unknown roles: \[\]"):
        build_groups(PARAMS, roles, Optim())


def test_unknown_roles_are_listed_beside_the_known():
    with pytest.raises(ValueError, match=r"unknown roles: \['b.weight: matrices'\], known roles: \['matrix', 'embed'"):
        build_groups(PARAMS, ROLES | {"b.weight": "matrices"}, Optim())


def test_no_parameters_no_groups():
    assert build_groups({}, {}, Optim()) == []


def test_table_counts_and_lists_the_rules_settings():
    lines = table(embed=Group(lr=0.25, weight_decay=0.5, decay="cautious"))
    assert lines["matrix"].split()[1:5] == ["2", "64", "steepest", "0.03"] and "norm=rms_operator" in lines["matrix"]
    assert lines["embed"].split()[1:5] == ["1", "28", "adam", "0.25"] and "0.5 cautious" in lines["embed"]
    assert "beta1=0.8 beta2=0.95 eps=1e-10" in lines["embed"]
    assert "none" in lines["head"]


@pytest.mark.parametrize(("rule", "idle"), [("adam", ["momentum", "norm", "ns"]), ("steepest", ["beta1", "eps"])])
def test_table_leaves_out_what_the_rule_does_not_read(rule, idle):
    line = table(matrix=Group(rule=rule))["matrix"]
    assert not [name for name in idle if f" {name}=" in line]


@pytest.mark.parametrize(("group", "idle"), [
    (Group(rule="steepest", norm="sign"), {"schatten_p", "ns", "ns_steps"}),
    (Group(rule="steepest", norm="rms_operator"), {"unit"}),
    (Group(rule="steepest", norm="spectral", ns="svd"), {"ns_steps"}),
    (Group(rule="steepest", averaging="none"), {"momentum", "nesterov"}),
], ids=["sign", "rms_operator", "svd", "no_average"])
def test_table_leaves_out_what_other_settings_make_idle(group, idle):
    printed = {word.partition("=")[0] for word in table(matrix=group)["matrix"].split() if "=" in word}
    assert not printed & idle


# ---- Numbers by name -----------------------------------------------------------------------------------------------------


def kinds(**changes: object) -> dict[str, tuple]:
    optim = dataclasses.replace(Optim(), matrix=Group(rule="steepest", **changes))
    return {name: tuple(kind) for name, kind in build_groups(PARAMS, ROLES, optim)[0].kinds.items()}


def test_factors_and_blocks_are_by_name():
    assert kinds() == {"b.weight": (-1, 1, 1), "a.weight": (-1, 1, 1)}
    assert kinds(lr_factors=("weight=3", "a=0.5"), blocks=("b=2",)) == {"b.weight": (-1, 2, 3), "a.weight": (-1, 1, 0.5)}


@pytest.mark.parametrize(("changes", "message"), [
    ({"lr_factors": ("c=2",)}, r"matrix.lr_factors: no tensor of the role has \['c'\] in its name; they are b.weight"),
    ({"lr_factors": ("eight=2",)}, "no tensor"),  # whole words
    ({"blocks": ("head=2",)}, "matrix.blocks: no tensor"),
    ({"blocks": ("a=3",)}, "3 does not divide the 4 rows of a.weight"),
    ({"blocks": ("a=2",), "norm": "row"}, "blocks has no effect on rule steepest, as it is configured: it updates each row"),
])
def test_names_that_are_not_there_and_blocks_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        kinds(**changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"lr_factors": ("mlp.down",)}, "'mlp.down'"), ({"lr_factors": ("=2",)}, "'=2'"),
    ({"lr_factors": ("a=-1",)}, "positive"), ({"lr_factors": ("a=nan",)}, "positive"),
    ({"blocks": ("a=1.5",)}, "whole numbers, got a=1.5"), ({"blocks": ("a=2",), "constraint": "sphere"}, "cut the vectors")])
def test_numbers_by_name_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        Group(**changes)
