"""Migration of format 1: settings that acted remain, others are dropped, removed ones are refused; hashes do not change."""

import json
from pathlib import Path

import pytest

from configs import format1
from configs.optim import SM3, SOAP, Adam, Extra, Muon, Muown, NorMuon, RuleConfig, Shampoo, SOAPMuon, Steepest, Stiefel
from configs.serialize import config_from_dict, config_to_dict, flatten, record_hash, unflatten

RECORDS = sorted((Path(__file__).resolve().parents[2] / "records").glob("*.jsonl"))


def matrix(**group: object) -> RuleConfig:
    """The config of format 2 that a group of format 1 becomes."""
    return config_from_dict({"optim": {"matrix": group}}).optim.matrix


@pytest.mark.parametrize(("group", "config"), [
    (dict(), Adam()),
    (dict(rule="steepest", lr=1), Muon(lr=1.0)),
    (dict(rule="steepest", norm="spectral"), Muon(unit="spectral")),
    (dict(rule="steepest", norm="spectral", unit="at_least_one", ns="quintic"), Muon(unit="at_least_one", ns="quintic")),
    (dict(rule="steepest", norm="spectral", unit="match_adam"), Muon(unit="match_adam")),
    (dict(rule="steepest", norm="sign", unit="fan_in"), Steepest(norm="sign", unit="fan_in")),
    (dict(rule="steepest", norm="schatten", schatten_p=3, unit="rms"),
     Steepest(norm="schatten", schatten_p=3.0, unit="rms")),
    (dict(rule="normuon", normalise="longer", momentum=0.8), NorMuon(normalise="longer", momentum=0.8)),
    (dict(rule="muown", norm="spectral", unit="match_adam"), Muown(unit="match_adam")),
    (dict(rule="soap_muon", gram_beta=0.9, beta2=0.8), SOAPMuon(gram_beta=0.9, beta2=0.8)),
    (dict(rule="stiefel", dual_steps=6, constraint="stiefel"), Stiefel(dual_steps=6, constraint="stiefel")),
    (dict(clip=1.0, clip_norm="sign", row_floor=0.3, lr_factors=["a=2"]),
     Adam(extra=Extra(clip=1.0, clip_norm="sign", row_floor=0.3, lr_factors=("a=2",)))),
    (dict(constraint="sphere", tangent="dual"), Adam(constraint="sphere", extra=Extra(tangent="dual"))),
], ids=str)
def test_a_group_becomes_the_config_of_its_rule(group, config):
    assert matrix(**group) == config


@pytest.mark.parametrize(("group", "config"), [
    (dict(rule="shampoo", graft="adam", eps=1e-8, momentum=0.9),
     Shampoo(eps=1e-8, momentum=0.9, graft=Adam(eps=1e-8))),
    (dict(rule="sm3", graft="steepest", norm="spectral", momentum=0.8),
     SM3(momentum=0.8, graft=Muon(unit="spectral", momentum=0.8))),
    (dict(rule="soap", graft="steepest", norm="sign"), SOAP(graft=Steepest(norm="sign"))),
], ids=str)
def test_a_graft_reads_the_groups_fields(group, config):
    assert matrix(**group) == config


@pytest.mark.parametrize(("group", "config"), [
    (dict(norm="sign", momentum=0.5, ns="svd"), Adam()),  # Adam read none of them
    (dict(rule="steepest", beta1=0.5, unit="plain", schatten_p=9.0), Muon()),
    (dict(clip_norm="row", tangent="gradient", retraction="geodesic"), Adam()),
    (dict(rule="steepest", norm="frobenius", schatten_p=9.0), Steepest(norm="frobenius")),
], ids=str)
def test_settings_without_effect_are_dropped(group, config):
    assert matrix(**group) == config


@pytest.mark.parametrize(("config", "message"), [
    ({"model": {"full_attention_every": 2}}, "--model.full_attention_every 2 is no longer there; only its default"),
    ({"model": {"loss_chunk_tokens": 64}}, "--model.loss_chunk_tokens 64 is no longer there"),
    ({"optim": {"matrix": {"rule": "normuon", "norm": "row"}}}, "rule normuon with norm row is no longer there"),
    ({"optim": {"matrix": {"rule": "sgd"}}}, "unknown rule 'sgd'"),
    ({"optim": {"matrix": {"momentun": 0.5}}}, "a group has no field 'momentun'; did you mean 'momentum'"),
    ({"optim": {"matrices": {}}}, "optim has no field 'matrices'; did you mean 'matrix'"),
])
def test_removed_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(config)


def test_removed_settings_at_their_default_are_accepted():
    removed = {name: format1.default_value(name) for name in format1.REMOVED}
    assert config_from_dict(unflatten(removed)) == config_from_dict({})


def test_the_defaults_written_out_have_the_hash_of_an_empty_configuration():
    flat = {name: format1.default_value(name) for name in format1.setting_names()}
    assert record_hash(flat) == record_hash({}) and record_hash(flat | {"optim.head.lr": 0.5}) != record_hash({})
    assert record_hash({"optim.matrix.lr": 1}) == record_hash({"optim.matrix.lr": 1.0})
    run = config_from_dict(unflatten(flat))
    assert config_from_dict(config_to_dict(run)) == run


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_records_have_the_hashes_that_they_contain(path):
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert record_hash(record["config"]) == record["summary"]["config_hash"], record["name"]
        assert config_from_dict(unflatten(record["config"])).run.seed == record["summary"]["seed"]


def test_a_record_of_format_2_has_the_hash_of_its_run():
    flat = flatten(config_to_dict(config_from_dict({"optim": {"matrix": {"rule": "soap"}}})))
    assert flat["format"] == 2 and record_hash(flat) != record_hash(flat | {"optim.matrix.gram_beta": 0.5})
