"""Presets, ablation rows and entries have the settings and hashes that they had in format 1."""

import json
import shlex
from pathlib import Path

import pytest

from configs import format1
from configs.ablations import find_row, leave_one_out_rows
from configs.cli import parse_row
from configs.entries import find_entry
from configs.presets import PRESETS
from configs.schema import with_settings
from configs.serialize import config_from_dict, config_to_dict, record_hash, unflatten

GOLDEN = Path(__file__).parent.parent / "golden"
SETTINGS = json.loads((GOLDEN / "settings_format1.json").read_text())
HASHES = json.loads((GOLDEN / "config_hashes_format1.json").read_text())["hashes"]
REMOVED = {"row/unet"}  # rows of format 1 whose technique no longer exists
USED = {f"preset/{name}": settings for name, settings in SETTINGS["presets"].items()} | {
    name: {key: value for key, value in SETTINGS["presets"][run["preset"]].items() if key not in run["unset"]} | run["set"]
    for name, run in SETTINGS["runs"].items() if name not in REMOVED}
"""For each run of format 1, by name: its settings by dotted name; of an optimizer only those that its rule read."""
EXACT = {"rounding": "remainder", "state_dtype": "float32"}
LATER = {"preset/speedrun": {"model.embed_dtype": "bfloat16", "model.head_dtype": "bfloat16"} | {
    f"optim.{role}.{name}": value for role in ("embed", "head") for name, value in EXACT.items()}}
"""Settings that presets have been given since."""


def run_named(name):
    """The run of that name in format 2: KIND/PRESET, KIND/ROW or KIND/ENTRY."""
    kind, *path = name.split("/")
    if kind == "off":
        row = next(row for row in leave_one_out_rows(PRESETS[path[0]]()) if row.name == path[1])
        return parse_row(row.base, shlex.split(row.flags))
    if kind == "entry":
        return parse_row("bench_cpu", shlex.split(find_entry(path[0]).flags))
    if kind == "preset":
        return PRESETS[path[0]]()
    row = find_row(path[0])
    return parse_row(row.base, row.flags.split())


def acting(run):
    """The run with default momentum if averaging is off: it has no effect then, and USED does not contain it."""
    if getattr(run.optim.matrix, "averaging", "") == "none":
        return with_settings(run, {"optim.matrix.momentum": 0.95, "optim.matrix.nesterov": True})
    return run


@pytest.mark.parametrize("name", USED)
def test_a_run_has_the_settings_of_format_1(name):
    run = with_settings(config_from_dict(unflatten(USED[name])), LATER.get(name, {}))
    assert acting(run) == acting(run_named(name))


@pytest.mark.parametrize("name", [name for name in SETTINGS["runs"] if name.startswith("entry/")])
def test_an_entry_has_the_search_space_of_format_1(name):
    assert list(find_entry(name.split("/")[1]).space) == SETTINGS["runs"][name]["space"]


# Runs that keep the rule of their preset. In others, format 1 hashed settings of the old rule, which USED does not contain.
SAME_RULE = [f"preset/{name}" for name in SETTINGS["presets"]] + [
    name for name, run in SETTINGS["runs"].items()
    if name in USED and ".rule" not in run["flags"] and "averaging none" not in run["flags"]]


@pytest.mark.parametrize("name", SAME_RULE)
def test_hashes_of_format_1_do_not_change(name):
    assert record_hash(USED[name]) == HASHES[name]


def test_a_removed_setting_is_refused_unless_it_has_its_default():
    nested = unflatten(USED["preset/tiny"])
    assert "loss_chunk_tokens" not in config_to_dict(config_from_dict(nested))["model"]
    with pytest.raises(ValueError, match="--model.loss_chunk_tokens 512 is no longer there"):
        config_from_dict(nested | {"model": nested["model"] | {"loss_chunk_tokens": 512}})


def test_matrix_rules_with_another_norm_are_refused():
    group = format1.load_defaults()["group"] | {"rule": "normuon", "norm": "sign"}
    with pytest.raises(ValueError, match="rule normuon with norm sign"):
        format1.migrate_group(group)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="format 7; this code reads 1 and 2"):
        config_from_dict(config_to_dict(PRESETS["tiny"]()) | {"format": 7})
