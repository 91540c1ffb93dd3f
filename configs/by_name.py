"""Numbers for some tensors by name: `mlp.down=4` is 4 for every tensor with mlp.down in its dotted name, whole words."""

import math
from collections.abc import Iterable, Mapping

from configs.refuse import refuse


def parse_by_name(words: tuple[str, ...]) -> dict[str, float]:
    """Number by name. Raises ValueError, quoting the offending word."""
    found = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        refuse(not name or not 0 < number < math.inf,
               f"numbers by name are NAME=NUMBER, positive, say mlp.down=4; got {word!r}")
        found[name] = number
    return found


def is_named(key: str, name: str) -> bool:
    """Whether the words of `key` stand in a dotted name: mlp.down in blocks.0.mlp.down.weight."""
    return f".{key}." in f".{name}."


def number_of(name: str, numbers: Mapping[str, float], default: float) -> float:
    """The number of a tensor: that of the last key that names it."""
    return ([default] + [number for key, number in numbers.items() if is_named(key, name)])[-1]


def strays(numbers: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """Keys that name no tensor."""
    every = list(names)
    return [key for key in numbers if not any(is_named(key, name) for name in every)]
