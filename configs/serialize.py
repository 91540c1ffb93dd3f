"""Configurations as JSON and back, and the hash that identifies an experiment.

A Run becomes nested dicts ({"optim": {"matrix": {"rule": "muon", "lr": 0.02}}}) or one dict of dotted names
({"optim.matrix.lr": 0.02}), with values as JSON gives them back. Files of format 1 are migrated (configs/format1.py).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from configs import format1
from configs.notation import check_field_names, nearest, raise_if
from configs.optim import RULES, Graft, RuleConfig
from configs.schema import Run

FORMAT = 2

# Settings that change no loss, up to the rounding of the device: the hash leaves them out. So do all of `log`.
HASH_IGNORES = frozenset({"format", "preset", "run.name", "run.dir", "run.resume", "run.device", "run.compile",
                          "run.dry_run", "run.checkpoint_every_steps", "run.final_checkpoint", "train.warmup_steps"})


def config_to_dict(run: Run) -> dict[str, Any]:
    """Return the run as nested dicts in the order of the schema, with values as JSON gives them back: tuples are lists.

    The number of the format comes first; each optimizer begins with the name of its rule.
    """
    return {"format": FORMAT} | strict_json(_nested(run))


def _nested(value: Any) -> Any:
    """Return a dataclass as nested dicts, and any other value as it is."""
    if not is_dataclass(value):
        return value
    # The rule is a class variable, so that `fields` does not list it; without it the class could not be restored.
    rule = {"rule": value.rule} if isinstance(value, Graft) else {}
    return rule | {f.name: _nested(getattr(value, f.name)) for f in fields(value)}


def config_from_dict(config: Mapping[str, Any]) -> Run:
    """Restore a run from nested dicts: the inverse of `config_to_dict`. Format 1 is migrated first.

    A missing field takes its default: an older version wrote the file, and new techniques are off by default. Raises
    ValueError for an unknown field, a value of another type, and settings that the schema refuses.
    """
    version = config.get("format", 1)  # files of format 1 have no number
    raise_if(version not in (1, FORMAT), f"the configuration has format {version!r}; this code reads 1 and {FORMAT}")
    config = format1.migrate(config) if version == 1 else config
    return _restore(Run, {name: value for name, value in config.items() if name != "format"}, "")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict of dotted names: {"optim": {"lr": 1}} becomes {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts from dotted names, the inverse of `flatten`: {"optim.lr": 1} becomes {"optim": {"lr": 1}}."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, field = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[field] = value
    return nested


def config_hash(run: Run) -> str:
    """Return 16 hexadecimal digits of SHA-256 over the settings that the losses depend on, seed included.

    Left out are HASH_IGNORES, all of `log`, the target loss unless the run ends there, and settings at their default, so
    that the hash stays the same when later versions add fields. An optimizer's defaults are those of its class.
    """
    # The same rules at their own defaults: only what differs from them counts, and the names of the roles' rules.
    plain = Run(optim=type(run.optim)(**{role.name: type(getattr(run.optim, role.name))() for role in fields(run.optim)}))
    flat, defaults = flatten(config_to_dict(run)), flatten(config_to_dict(plain))
    changed = {name: value for name, value in flat.items()
               if value != defaults.get(name) or (name.endswith(".rule") and name.count(".") == 2)}
    # 1 and 1.0 in a field of floats are the same number, but not the same JSON text.
    return hash_settings({name: int(value) if isinstance(value, float) and value.is_integer() else value
                          for name, value in changed.items()})


def record_hash(flat: Mapping[str, Any]) -> str:
    """Return the hash of a record's configuration, by dotted names, as the version that wrote it computed it."""
    # Format 1 is hashed as it is, not after its migration: the result must be the hash that the record holds.
    if flat.get("format", 1) == 1:
        return hash_settings(format1.changed_settings(flat))
    return config_hash(config_from_dict(unflatten(flat)))


def hash_settings(settings: Mapping[str, Any]) -> str:
    """Return the hash of settings that differ from their defaults, without those that change no loss."""
    ends_at_target = settings.get("run.stop_at_target", False)
    ignored = HASH_IGNORES if ends_at_target else HASH_IGNORES | {"run.target_loss_nats"}
    counted = {name: value for name, value in settings.items() if name not in ignored and not name.startswith("log.")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


def strict_json(value: Any) -> Any:
    """Return `value` as JSON gives it back: lists for tuples, and None for inf and nan, which strict JSON cannot write.

    A named tuple becomes a dict of its fields.
    """
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: strict_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _restore(hint: Any, value: Any, name: str) -> Any:
    """Return the value of a field of type `hint` from its JSON `value`; `name` is its dotted name, for messages."""
    if is_dataclass(hint):
        return _restore_dataclass(hint, value, name)
    for option in get_args(hint) if isinstance(hint, UnionType) else (hint,):
        if _has_type(option, value):
            # JSON has no tuples, and some programs write 1.0 as 1.
            if get_origin(option) is tuple:
                return tuple(value)
            return float(value) if option is float else value
    kind = hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")
    raise ValueError(f"{name} must be {kind}, got {value!r}")


def _restore_dataclass(hint: type, value: Any, name: str) -> Any:
    """Build the dataclass `hint`, or the class of the rule that `value` names, from a JSON object."""
    raise_if(not isinstance(value, Mapping), f"{name or 'the configuration'} must be an object, got {value!r}")
    if issubclass(hint, Graft):
        hint, value = _class_of_rule(hint, value, name), {key: inner for key, inner in value.items() if key != "rule"}
    check_field_names(tuple(f.name for f in fields(hint)), value, name or "the configuration")
    hints = get_type_hints(hint)
    return hint(**{key: _restore(hints[key], value[key], f"{name}.{key}".lstrip(".")) for key in value})


def _class_of_rule(hint: type[Graft], value: Mapping[str, Any], name: str) -> type[Graft]:
    """Return the class of the rule that `value` names; only a graft may be `none`."""
    rule, classes = value.get("rule"), RULES if issubclass(hint, RuleConfig) else RULES | {Graft.rule: Graft}
    raise_if(rule not in classes, f"{name}: unknown rule {rule!r}{nearest(str(rule), list(RULES))}")
    return classes[rule]


def _has_type(option: Any, value: Any) -> bool:
    """True if a JSON value fits the type `option`; bool is not a number here, although Python's bool is an int."""
    if get_origin(option) is Literal:
        return value in get_args(option)
    if get_origin(option) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(item, get_args(option)[0]) for item in value)
    if option in (int, float):
        return isinstance(value, int | option) and not isinstance(value, bool)
    return isinstance(value, option)
