"""Configurations of format 1, from old run folders, checkpoints and records: their hash, and their migration to format 2.

In format 1 each role had one group with the fields of all rules, of which a rule read some. format1.json is a frozen copy of
its field names and defaults, so that old files keep their meaning and hash whatever the schema becomes. This file changes
only where format 2 does.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from configs.notation import check_field_names, raise_if
from configs.optim import RULES, Extra, Graft, RuleConfig

MATRIX_RULES = ("normuon", "muon2", "muown", "soap_muon")  # they accepted any norm; format 2 has the spectral norm only
UNITS = {"plain": "spectral", "at_least_one": "at_least_one", "match_adam": "match_adam"}  # units of norm spectral, today
REMOVED = ("model.full_attention_every", "model.loss_chunk_tokens")  # settings that format 2 no longer has


@cache
def load_defaults() -> dict[str, Any]:
    """Return format1.json: defaults of `run` by dotted name, of a `group`, and of each of the `roles` where it differs."""
    return json.loads((Path(__file__).parent / "format1.json").read_text(encoding="utf-8"))


def default_value(name: str) -> Any:
    """Return the default of a setting by dotted name. Raises KeyError for an unknown one."""
    if name.startswith("optim."):
        _, role, field = name.split(".")
        return load_defaults()["roles"][role].get(field, load_defaults()["group"][field])
    return load_defaults()["run"][name]


def setting_names() -> list[str]:
    """Return all dotted names of format 1."""
    defaults = load_defaults()
    return [*defaults["run"], *(f"optim.{role}.{field}" for role in defaults["roles"] for field in defaults["group"])]


def read_value(name: str, value: Any) -> Any:
    """Return a setting's value as format 1 read it: a whole number in a field of floats is a float.

    The hash depends on it: 1 and 1.0 are different JSON texts.
    """
    in_group = name.startswith("optim.")
    is_float = name.split(".")[-1] in load_defaults()["group_floats"] if in_group else name in load_defaults()["floats"]
    return float(value) if is_float and isinstance(value, int) and not isinstance(value, bool) else value


def changed_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, by dotted name, that differ from their default. Raises ValueError for an unknown name."""
    check_field_names(setting_names(), flat, "the configuration")
    values = {name: read_value(name, value) for name, value in flat.items()}
    return {name: value for name, value in values.items() if value != default_value(name)}


def migrate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration of format 1 as nested dicts of format 2; settings that had no effect in format 1 are left out.

    Raises ValueError for a removed setting that differs from its default.
    """
    new = {section: dict(value) if isinstance(value, Mapping) else value for section, value in config.items()}
    for name in REMOVED:
        section, field = name.split(".")
        default = default_value(name)
        value = new.get(section, {}).pop(field, default)
        raise_if(value != default, f"--{name} {value} is no longer there; only its default {default} can be read")
    if "optim" in new:
        new["optim"] = {role: migrate_group(load_defaults()["group"] | group) for role, group in new["optim"].items()}
    return {"format": 2} | new


def migrate_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a role's group of format 1 as its rule's name and the fields of that rule's class."""
    group = dict(group)
    check_field_names(tuple(load_defaults()["group"]), group, "a group")
    # The rule: steepest descent under the spectral norm is rule muon in format 2.
    rule, norm = group.pop("rule"), group["norm"]
    spectral = norm in ("spectral", "rms_operator")
    raise_if(rule in MATRIX_RULES and not spectral, f"rule {rule} with norm {norm} is no longer there; rms_operator is")
    if rule == "steepest" and spectral:
        rule = "muon"
    # Settings that had no effect without clip or constraint sphere are dropped: format 2 refuses them there.
    extra = {f.name: group[f.name] for f in fields(Extra) if f.name in group}  # not those that are newer than format 1
    if not extra["clip"]:
        del extra["clip_norm"]
    if group["constraint"] != "sphere":
        del extra["retraction"], extra["tangent"]
    graft = group.pop("graft")
    base = {f.name: group[f.name] for f in fields(RuleConfig) if f.name in group}
    return {"rule": rule} | base | own_fields(rule, group) | {"graft": migrate_graft(graft, group), "extra": extra}


def migrate_graft(graft: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a graft of format 1 as a rule of its own. In format 1 it read the fields of the group that it belonged to."""
    if not graft:
        return {"rule": Graft.rule}
    rule = "muon" if graft == "steepest" and group["norm"] in ("spectral", "rms_operator") else graft
    return {"rule": rule} | own_fields(rule, group)


def own_fields(rule: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's values for the fields that the rule's class adds to those of every rule."""
    raise_if(rule not in RULES, f"unknown rule {rule!r}")
    names = {f.name for f in fields(RULES[rule])} - {f.name for f in fields(RuleConfig)}
    values = {name: group[name] for name in names & group.keys()}
    if "unit" in names and "norm" not in names:  # Muon and its subclasses: the two spectral norms became units
        values["unit"] = "rms_operator" if group["norm"] == "rms_operator" else UNITS[group["unit"]]
    if "schatten_p" in names and group["norm"] != "schatten":
        del values["schatten_p"]
    return values
