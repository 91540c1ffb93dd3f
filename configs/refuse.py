"""How settings are refused."""

import difflib
import math
from collections.abc import Iterable


def refuse(condition: bool, message: str) -> None:
    """Raise ValueError(message) where `condition` holds."""
    if condition:
        raise ValueError(message)


def refuse_below(owner: object, least: float, *names: str) -> None:
    """Refuse attributes of `owner` that are set and not finite numbers of at least `least`."""
    for name in names:
        value = getattr(owner, name)
        refuse(value is not None and not least <= value < math.inf, f"{name} must be at least {least}, got {value}")


def refuse_unknown(wanted: Iterable[str], given: Iterable[str], what: str) -> None:
    """Refuse the first given name that is not among the wanted ones, with the nearest that is; `what` has the fields."""
    for name in given:
        if name not in wanted:
            near = difflib.get_close_matches(name, wanted, n=1)
            refuse(True, f"{what} has no field {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
