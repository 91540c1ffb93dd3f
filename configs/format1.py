"""Configurations of format 1, which old run folders, checkpoints and records hold: their hash, and their form today.

In format 1 every role had one `Group` with the fields of all rules; which of them acted, the rule decided. format1.json is a
frozen copy of its names and defaults. Frozen too is this file: what format 1 meant does not change any more.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from configs.notation import check_field_names, raise_if
from configs.optim import RULES, Extra, Graft, RuleConfig

MATRIX_RULES = ("normuon", "muon2", "muown", "soap_muon")  # whose norm was the spectral one, in a unit
UNITS = {"plain": "spectral", "at_least_one": "at_least_one", "match_adam": "match_adam"}
REMOVED = ("model.full_attention_every", "model.loss_chunk_tokens")  # settings that the schema lacks today


@cache
def frozen() -> dict[str, Any]:
    """Names and defaults of format 1: of the run by dotted name, of a group, and of each role's group where it differs."""
    return json.loads((Path(__file__).parent / "format1.json").read_text(encoding="utf-8"))


def default(name: str) -> Any:
    """The default of a setting by dotted name. Raises KeyError for an unknown one."""
    if name.startswith("optim."):
        _, role, field = name.split(".")
        return frozen()["roles"][role].get(field, frozen()["group"][field])
    return frozen()["run"][name]


def known_names() -> list[str]:
    """All dotted names of format 1."""
    groups = [f"optim.{role}.{field}" for role in frozen()["roles"] for field in frozen()["group"]]
    return [*frozen()["run"], *groups]


def normal(name: str, value: Any) -> Any:
    """The value as format 1 read it: a whole number in a field of floats is a float."""
    is_float = name.split(".")[-1] in frozen()["group_floats"] if name.startswith("optim.") else name in frozen()["floats"]
    return float(value) if is_float and isinstance(value, int) and not isinstance(value, bool) else value


def settings_off_default(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration, by dotted name, that are off their default. Raises ValueError for an unknown one."""
    check_field_names(known_names(), flat, "the configuration")
    return {name: normal(name, value) for name, value in flat.items() if normal(name, value) != default(name)}


def migrate(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of format 1 as nested dicts in today's format, 2. Raises ValueError for a setting off its default that
    is no longer there. Settings that did not act in format 1 are left out."""
    new = {section: dict(value) if isinstance(value, Mapping) else value for section, value in config.items()}
    for name in REMOVED:
        section, field = name.split(".")
        value = new.get(section, {}).pop(field, default(name))
        gone = value != default(name)
        raise_if(gone, f"--{name} {value} is no longer there; only its default {default(name)} can be read")
    if "optim" in new:
        new["optim"] = {role: migrate_group(frozen()["group"] | group) for role, group in new["optim"].items()}
    return {"format": 2} | new


def migrate_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """One role's group as the fields of its rule's class, with the rule's name."""
    group = dict(group)
    check_field_names(tuple(frozen()["group"]), group, "a group")
    rule, norm = group.pop("rule"), group["norm"]
    spectral = norm in ("spectral", "rms_operator")
    raise_if(rule in MATRIX_RULES and not spectral, f"rule {rule} with norm {norm} is no longer there; rms_operator is")
    if rule == "steepest" and spectral:
        rule = "muon"
    extra = {f.name: group[f.name] for f in fields(Extra)}
    if not extra["clip"]:
        del extra["clip_norm"]
    if group["constraint"] != "sphere":
        del extra["retraction"], extra["tangent"]
    base = {f.name: group[f.name] for f in fields(RuleConfig) if f.name not in ("graft", "extra")}
    graft = group.pop("graft")
    return {"rule": rule} | base | own_fields(rule, group) | {"graft": migrate_graft(graft, group), "extra": extra}


def migrate_graft(graft: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """A graft read the same group's fields."""
    if not graft:
        return {"rule": Graft.rule}
    rule = "muon" if graft == "steepest" and group["norm"] in ("spectral", "rms_operator") else graft
    return {"rule": rule} | own_fields(rule, group)


def own_fields(rule: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """The values of what the rule's class has beside the fields of all rules."""
    raise_if(rule not in RULES, f"unknown rule {rule!r}")
    names = {f.name for f in fields(RULES[rule])} - {f.name for f in fields(RuleConfig)}
    values = {name: group[name] for name in names}
    if "unit" in names and "norm" not in names:
        values["unit"] = "rms_operator" if group["norm"] == "rms_operator" else UNITS[group["unit"]]
    if "schatten_p" in names and group["norm"] != "schatten":
        del values["schatten_p"]
    return values
