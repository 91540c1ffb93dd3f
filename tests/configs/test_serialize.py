"""Configurations to JSON and back, dotted names, and the hash."""

import json
from dataclasses import replace

import pytest

import configs.serialize
from configs.optim import Adam, Muon, NorMuon, Optim
from configs.presets import PRESETS
from configs.schema import Data, Identity, Log, Model, Run, Schedule, Train
from configs.serialize import config_from_dict, config_hash, config_to_dict, flatten, record_hash, unflatten

RICH = Run(
    preset="rich",
    run=Identity(name="a", target_loss_nats=3.28, stop_at_target=True),
    data=Data(source="shards", tokenizer="gpt2", train_files=("a.bin", "b*.bin"), val_files=("c.bin",)),
    model=Model(mlp_dim=300, window_tokens=64),
    optim=Optim(matrix=Muon(lr=1, unit="match_adam", graft=Adam(eps=1e-8))),
    schedule=Schedule(momentum="0=0.85 300=0.95"),
    log=Log(wandb_tags=("x", "y")),
)


@pytest.mark.parametrize("run", [Run(), RICH])
def test_a_configuration_survives_json(run):
    config = json.loads(json.dumps(config_to_dict(run)))
    restored = config_from_dict(config)
    assert config == config_to_dict(run)  # so that a checkpoint's settings compare with a run's
    assert restored == run and config_hash(restored) == config_hash(run)
    assert isinstance(restored.data.train_files, tuple) and isinstance(restored.log.wandb_tags, tuple)
    assert next(iter(config.items())) == ("format", 2) and config["optim"]["matrix"]["rule"] == "muon"


def test_a_field_that_is_missing_in_the_file_takes_its_default():
    config = config_to_dict(Run(preset="old"))
    del config["model"]["smear"], config["log"], config["optim"]["matrix"]["nesterov"]
    assert config_from_dict(config) == Run(preset="old")


def test_a_new_field_does_not_change_the_hash(monkeypatch):
    """A field at its default does not count."""
    run = PRESETS["tiny"]()
    original = configs.serialize.config_to_dict
    before = config_hash(run)
    monkeypatch.setattr(configs.serialize, "config_to_dict", lambda run: original(run) | {"new": {"technique": False}})
    monkeypatch.setattr(configs.serialize, "config_from_dict", lambda config: run)
    assert config_hash(run) == before


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c["optim"]["matrix"].update(learning_rate=1.0), "optim.matrix has no field 'learning_rate'"),
    (lambda c: c["train"].update(stepz=1), "train has no field 'stepz'; did you mean 'steps'"),
    (lambda c: c.update(data=3), "data must be an object, got 3"),
    (lambda c: c["model"].update(dim="128"), "model.dim must be int, got '128'"),
    (lambda c: c["model"].update(dim=True), "model.dim must be int, got True"),
    (lambda c: c["model"].update(mlp_dim=1.5), r"model.mlp_dim must be int \| None, got 1.5"),
    (lambda c: c["run"].update(device="tpu"), "run.device must be .*'cuda'.*, got 'tpu'"),
    (lambda c: c["log"].update(wandb_tags=[1]), r"log.wandb_tags must be .*, got \[1\]"),
    (lambda c: c["train"].update(steps=0), "steps must be at least 1"),
    (lambda c: c.update(format=3), "has format 3; this code reads 1 and 2"),
    (lambda c: c["optim"]["matrix"].update(rule="muonn"), "optim.matrix: unknown rule 'muonn'; did you mean 'muon'"),
    (lambda c: c["optim"]["matrix"].pop("rule"), "optim.matrix: unknown rule None"),
    (lambda c: c["optim"]["matrix"].update(rule="adam"), "optim.matrix has no field"),
    (lambda c: c["optim"].update(matrix={"rule": "none"}), "optim.matrix: unknown rule 'none'"),
])
def test_an_invalid_configuration_is_refused(change, message):
    config = config_to_dict(Run())
    change(config)
    with pytest.raises(ValueError, match=message):
        config_from_dict(config)


def test_flatten():
    assert flatten({"a": 1, "b": {"c": {"d": (2,)}, "e": None}}) == {"a": 1, "b.c.d": (2,), "b.e": None}
    nested = config_to_dict(RICH)
    assert flatten(nested)["optim.matrix.graft.eps"] == 1e-8 and unflatten(flatten(nested)) == nested


@pytest.mark.parametrize("other", [
    Run(preset="other", log=Log(every_steps=3, wandb="offline"), train=Train(warmup_steps=0)),
    Run(run=Identity(name="x", dir="y", device="cpu", compile="on", resume=True, checkpoint_every_steps=9)),
    Run(run=Identity(dry_run=True, target_loss_nats=3.0)),
    Run(model=Model(rotary_base=1024)),
])
def test_settings_that_change_no_loss_do_not_change_the_hash(other):
    assert config_hash(other) == config_hash(Run())


@pytest.mark.parametrize("other", [
    Run(run=Identity(seed=2)), Run(model=Model(dim=192)), Run(optim=Optim(matrix=NorMuon(lr=0.03))),
    Run(optim=Optim(matrix=Muon(lr=0.03, graft=Adam()))), Run(optim=Optim(head=Adam(lr=0.021))),
    Run(run=Identity(target_loss_nats=3.0, stop_at_target=True)), Run(train=Train(steps=281)), RICH,
])
def test_experiments_have_different_hashes(other):
    assert config_hash(other) != config_hash(Run()) and len(config_hash(other)) == 16
    assert config_hash(other) == record_hash(flatten(config_to_dict(other)))


def test_a_target_that_ends_the_run_changes_the_hash():
    assert config_hash(RICH) != config_hash(replace(RICH, run=replace(RICH.run, target_loss_nats=3.3)))
