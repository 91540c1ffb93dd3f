"""A configuration as JSON gives it back, and its hash: nested dicts, dotted names, 16 hexadecimal digits."""

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

# What leaves the losses as they are, up to the rounding of the device: names, folders, machine, what is written down.
HASH_IGNORES = frozenset({"format", "preset", "run.name", "run.dir", "run.resume", "run.device", "run.compile",
                          "run.dry_run", "run.checkpoint_every_steps", "train.warmup_steps"})


def config_to_dict(run: Run) -> dict[str, Any]:
    """The configuration as nested dicts, in the order of the schema, and as JSON gives it back: tuples are lists.

    First the number of the format; of every optimizer its rule's name, then the fields of its class.
    """
    return {"format": FORMAT} | strict_json(_nested(run))


def _nested(value: Any) -> Any:
    if not is_dataclass(value):
        return value
    rule = {"rule": value.rule} if isinstance(value, Graft) else {}
    return rule | {f.name: _nested(getattr(value, f.name)) for f in fields(value)}


def config_from_dict(config: Mapping[str, Any]) -> Run:
    """The inverse of `config_to_dict`, lists become tuples again and whole numbers floats; older formats are migrated.

    A missing field takes its default: an older version wrote the file, and new techniques are off by default. Raises
    ValueError naming an unknown or ill-typed field, and for all that the schema itself refuses.
    """
    number = config.get("format", 1)
    raise_if(number not in (1, FORMAT), f"the configuration has format {number!r}; this code reads 1 and {FORMAT}")
    config = format1.migrate(config) if number == 1 else config
    return _restore(Run, {name: value for name, value in config.items() if name != "format"}, "")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names: {"optim": {"lr": 1}} becomes {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`: {"optim.lr": 1} becomes {"optim": {"lr": 1}}."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, field = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[field] = value
    return nested


def config_hash(run: Run) -> str:
    """16 hexadecimal digits over every field that the losses depend on; runs of one hash are one experiment and seed.

    Left out: HASH_IGNORES, all of `log`, the target loss unless the run ends there, and what is at its default, so that
    the hash outlives fields that later versions add. An optimizer's defaults are those of its class.
    """
    classes = {f.name: type(getattr(run.optim, f.name)) for f in fields(run.optim)}
    plain = Run(optim=type(run.optim)(**{role: rule() for role, rule in classes.items()}))
    flat, defaults = flatten(config_to_dict(run)), flatten(config_to_dict(plain))
    # 1 and 1.0 in a field of floats are the same number, but not the same text.
    return hash_settings({name: int(value) if isinstance(value, float) and value.is_integer() else value
                          for name, value in flat.items()
                          if value != defaults.get(name) or (name.endswith(".rule") and name.count(".") == 2)})


def record_hash(flat: Mapping[str, Any]) -> str:
    """`config_hash` of a configuration by dotted names, by the format that it was written in."""
    if flat.get("format", 1) == 1:
        return hash_settings(format1.settings_off_default(flat))
    return config_hash(config_from_dict(unflatten(flat)))


def hash_settings(settings: Mapping[str, Any]) -> str:
    """The hash of settings off their defaults, of which those that leave the losses as they are do not count."""
    ends_at_target = settings.get("run.stop_at_target", False)
    ignored = HASH_IGNORES if ends_at_target else HASH_IGNORES | {"run.target_loss_nats"}
    counted = {name: value for name, value in settings.items() if name not in ignored and not name.startswith("log.")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


def strict_json(value: Any) -> Any:
    """The same value as JSON gives it back: lists for tuples, and None for every float that JSON cannot write."""
    if isinstance(value, Mapping):
        return {key: strict_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _restore(hint: Any, value: Any, where: str) -> Any:
    """The value that a field of type `hint` had before it was written as JSON; `where` is its dotted name."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where or 'the configuration'} must be an object, got {value!r}")
        if issubclass(hint, Graft):
            hint, value = _class_of_rule(hint, value, where), {key: inner for key, inner in value.items() if key != "rule"}
        check_field_names(tuple(f.name for f in fields(hint)), value, where or "the configuration")
        hints = get_type_hints(hint)
        return hint(**{key: _restore(hints[key], value[key], f"{where}.{key}".lstrip(".")) for key in value})
    for option in get_args(hint) if isinstance(hint, UnionType) else (hint,):
        if _fits(option, value):
            return tuple(value) if get_origin(option) is tuple else float(value) if option is float else value
    kind = hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")
    raise ValueError(f"{where} must be {kind}, got {value!r}")


def _class_of_rule(hint: type[Graft], value: Mapping[str, Any], where: str) -> type[Graft]:
    """The class that a rule's name stands for; `none` is a graft's alone."""
    name, classes = value.get("rule"), RULES if issubclass(hint, RuleConfig) else RULES | {Graft.rule: Graft}
    raise_if(name not in classes, f"{where}: unknown rule {name!r}{nearest(str(name), list(RULES))}")
    return classes[name]


def _fits(option: Any, value: Any) -> bool:
    if get_origin(option) is Literal:
        return value in get_args(option)
    if get_origin(option) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(item, get_args(option)[0]) for item in value)
    if option in (int, float):
        return isinstance(value, int | option) and not isinstance(value, bool)
    return isinstance(value, option)
