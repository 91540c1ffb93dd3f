"""The optimizers' settings: frozen, documented, own fields only; invalid values are refused; rules can be switched."""

import ast
import dataclasses
import inspect
import math
from pathlib import Path

import pytest

from configs import optim as configs
from configs.optim import (
    AGD,
    PSGD,
    RULES,
    SM3,
    SOAP,
    Adam,
    Dion,
    Extra,
    Graft,
    Muon,
    Muon2,
    Muown,
    NorMuon,
    Prodigy,
    RuleConfig,
    Shampoo,
    Steepest,
    Stiefel,
    summary,
    switch_rule,
)
from configs.schema import Run, with_settings
from configs.serialize import config_from_dict, config_to_dict
from optim import adam, groups, muon
from optim.zoo import soap

OWN = {name: {f.name for f in dataclasses.fields(config)} - {f.name for f in dataclasses.fields(RuleConfig)}
       for name, config in RULES.items()}


# ---- Fields -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [*RULES.values(), Extra, Graft])
def test_configurations_are_frozen_values(cls):
    config = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    with pytest.raises(TypeError):
        cls("by position")
    assert config == cls() and hash(config) == hash(cls())


def test_fields_are_documented():
    """A string under each field is its help text."""
    for node in ast.parse(Path(configs.__file__).read_text()).body:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and field.target.id != "rule":
                    assert isinstance(after, ast.Expr) or "ClassVar" in ast.unparse(field.annotation), field.target.id


def test_each_rule_has_only_its_own_fields():
    assert OWN["adam"] == {"beta1", "beta2", "eps"} and OWN["agd"] == set() and OWN["swan"] == {"whiten_steps"}
    assert OWN["muon"] == {"momentum", "averaging", "nesterov", "averages", "momentum_fast", "kernel", "kernel_from",
                           "ns", "ns_steps", "equilibrate", "unit"}
    assert OWN["steepest"] - OWN["muon"] == {"norm", "schatten_p"} and not OWN["muon"] - OWN["steepest"]
    assert not OWN["adam"] & OWN["muon"]


@pytest.mark.parametrize("rule", RULES)
def test_every_field_of_a_rule_is_read_by_it(rule):
    """By its file, the code that it extends or uses, or the averages of optim/muon.py; momentum comes from the schedule."""
    used = {"muown": (adam.Adam,), "soap_muon": (soap.update_eigenbases,)}.get(rule, ())
    classes = groups.rule_class(RULES[rule]).__mro__[:-1] + used
    averages = (muon.average_gradient, muon.averages_at, muon.mean_of_averages, muon.init_average)
    source = "".join(map(inspect.getsource, (*classes, inspect.getmodule(classes[0]), *averages)))
    assert [name for name in OWN[rule] - {"momentum"} if f"config.{name}" not in source] == []


# ---- Invalid values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "fields", "message"), [
    (Adam, dict(lr=-0.1), "lr must be at least 0, got -0.1"),
    (Adam, dict(lr=math.nan), "lr must be at least 0, got nan"),
    (Adam, dict(lr=math.inf), "lr must lie .* got inf"),
    (Adam, dict(weight_decay=-1.0), "weight_decay must be at least 0"),
    (Adam, dict(eps=-1.0), "eps must"), (Adam, dict(beta1=-0.1), "beta1 must lie"),
    (Adam, dict(beta2=1.0), r"beta2 must lie in \[0, 1\), got 1"), (Adam, dict(update_every=0), "update_every must"),
    (Muon, dict(ns_steps=0), "ns_steps must be at least 1, got 0"), (Muon, dict(momentum=1.0), "momentum must"),
    (Muon, dict(averages=0), "averages must"), (Muon, dict(ns="cubic"), "unknown ns 'cubic'"),
    (Muon, dict(averages=3, averaging="heavy_ball"), "averages 3 belong to averaging ema, got heavy_ball"),
    (SM3, dict(averages=2, averaging="none"), "belong to averaging ema"),
    (Muon, dict(kernel=("0.9=1", "0.5=1"), averages=2), "kernel replaces averages, of averaging ema; got averages 2"),
    (Muon, dict(kernel=("0.9=1",), averaging="heavy_ball"), "got averages 1, averaging heavy_ball"),
    (Muon, dict(kernel=("1.5=1",)), r"kernel must lie in \(0, 1\), got 1.5"),
    (Muon, dict(kernel_from=-1), "kernel_from must"),
    (Muon, dict(kernel=("fast=1",)), "expected MOMENTUM=WEIGHT with two numbers, such as 0.85=0.44, got 'fast=1'"),
    (Muon, dict(kernel=("0.5",)), "got '0.5'"), (Muon, dict(kernel=("0.5=-1",)), "got '0.5=-1'"),
    (Dion, dict(rank_frac=0.0), r"rank_frac must lie in \(0, 1\], got 0"), (Dion, dict(rank_frac=1.5), "rank_frac"),
    (PSGD, dict(factor_lr=1.5), r"factor_lr must lie in \(0, 1\], got 1.5"),
    (PSGD, dict(step_rms=0.0), "step_rms must be positive, got 0"),
    (Prodigy, dict(distance_start=0.0), "distance_start must"),
    (Shampoo, dict(gram_beta=1.5), r"gram_beta must lie in \[0, 1\]"), (Shampoo, dict(exponent=0.5), "exponent must"),
    (Steepest, dict(norm="row", unit="rms"), "unit rms belongs to norm frobenius or schatten, got norm row"),
    (Steepest, dict(unit="match_adam"), "unit match_adam belongs to norm spectral, got norm rms_operator"),
    (Steepest, dict(norm="spectral", unit="fan_in"), "belongs to norm row or column or sign, got norm spectral"),
    (Steepest, dict(norm="schatten", schatten_p=0.5), "schatten_p must"),
    (Steepest, dict(norm="schatten", schatten_p=math.inf), "schatten_p must .*inf"),
    (Steepest, dict(norm="sign", equilibrate=True), "equilibrate belongs to norm spectral or rms_operator, got norm sign"),
    (Stiefel, dict(constraint="sphere"), "rule stiefel sets constraint stiefel itself, got constraint sphere"),
    (Extra, dict(clip=-1.0), "clip must"), (Extra, dict(clip=math.inf), "clip must lie"),
    (Extra, dict(clip_norm="sign"), "clip_norm sign has no effect without clip"),
    (Extra, dict(radial_brake=1.5), r"radial_brake must lie in \[0, 1\], got 1.5"),
    (Extra, dict(row_floor=-0.1), "row_floor must"),
    (Adam, dict(update_every=2, extra=Extra(update_every_from=("9=4",))), "value before, 2, and step 9 one of 4"),
    (Adam, dict(update_every=2, extra=Extra(update_every_from=("12=3",))), "3 must be a multiple of the value before, 2"),
    (Extra, dict(update_every_from=("x=2",)), "whole numbers STEP=VALUE, got 'x=2'"),
    (Extra, dict(average_blend=1.5), r"average_blend must lie in \[0, 1\], got 1.5"),
    (Extra, dict(blocks=("a=1.5",)), "whole numbers, got a=1.5"), (Extra, dict(lr_factors=("a",)), "got 'a'"),
    (Adam, dict(constraint="hyperball", extra=Extra(radial_brake=0.5)), "no effect under constraint hyperball"),
    (Adam, dict(constraint="sphere", extra=Extra(blocks=("a=2",))), "cut the vectors"),
    (Adam, dict(extra=Extra(tangent="dual")), "belong to constraint sphere, got constraint none"),
    (Adam, dict(graft=Adam(eps=1e-3)), "graft must be another rule than adam"),
    (Prodigy, dict(graft=Adam()), "rule prodigy sets its own length: it cannot be grafted"),
    (AGD, dict(graft=Adam()), "cannot be grafted"), (Muown, dict(graft=Adam()), "cannot be grafted"),
    (Muon, dict(graft=PSGD()), "rule psgd gives no length to graft"), (Muon, dict(graft=Stiefel()), "gives no length"),
    (Muon, dict(graft=Adam(lr=0.5)), "graft.lr has no effect"),
    (Muon, dict(graft=Adam(graft=Shampoo())), "graft.*has no effect"),
], ids=lambda x: str(x)[:60])
def test_impossible_values_are_refused(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)


@pytest.mark.parametrize("config", [
    Adam(lr=0.0, beta1=0.0), Muon(momentum=0.0, averages=2), Steepest(norm="spectral", unit="match_adam"),
    Dion(rank_frac=1.0), Shampoo(gram_beta=1.0, exponent=-1.0), Stiefel(constraint="stiefel"), Muon(graft=Adam(eps=1e-8)),
    SOAP(graft=NorMuon(beta2=0.5)), Adam(extra=Extra(clip=1.0, clip_norm="spectral", radial_brake=1.0)),
    Adam(constraint="sphere", extra=Extra(tangent="dual", retraction="geodesic"))], ids=str)
def test_values_at_the_limits_survive_json(config):
    run = with_settings(Run(), {"optim.matrix": config})
    assert config_from_dict(config_to_dict(run)) == run


# ---- Switching ----------------------------------------------------------------------------------------------------------


def test_a_switched_rule_keeps_the_shared_fields():
    old = Muon(lr=0.5, weight_decay=0.1, momentum=0.8, ns="quintic", extra=Extra(row_floor=0.3))
    assert switch_rule(old, "muon2") == Muon2(lr=0.5, weight_decay=0.1, momentum=0.8, ns="quintic", extra=old.extra)
    assert switch_rule(old, "adam") == Adam(lr=0.5, weight_decay=0.1, extra=old.extra)
    assert switch_rule(switch_rule(old, "adam"), "muon") == Muon(lr=0.5, weight_decay=0.1, extra=old.extra)
    assert switch_rule(Graft(), "adam") == Adam()


def test_a_unit_that_the_other_rule_does_not_have_is_reset():
    assert switch_rule(Muon(unit="spectral"), "steepest").unit == "plain"
    assert switch_rule(Steepest(norm="sign", unit="fan_in"), "muon").unit == "rms_operator"
    assert switch_rule(Muon(unit="spectral"), "normuon").unit == "spectral"


def test_an_unknown_rule_gets_the_nearest():
    with pytest.raises(ValueError, match="unknown rule 'normun'; did you mean 'normuon'?"):
        switch_rule(Muon(), "normun")


def test_a_summary_has_the_own_fields_and_all_that_differ_from_their_default():
    assert summary(Adam(lr=3.0)) == "beta1=0.8 beta2=0.95 eps=1e-10"
    extra = Extra(row_floor=0.3)
    assert summary(AGD(update_every=2, constraint="radial", extra=extra)) == "constraint=radial update_every=2 row_floor=0.3"
    assert summary(Muon(graft=Adam())).endswith("unit=rms_operator graft=adam")
