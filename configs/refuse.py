"""How settings are refused."""

import math


def refuse(condition: bool, message: str) -> None:
    """Raise ValueError(message) where `condition` holds."""
    if condition:
        raise ValueError(message)


def refuse_below(owner: object, least: float, *names: str) -> None:
    """Refuse attributes of `owner` that are set and not finite numbers of at least `least`."""
    for name in names:
        value = getattr(owner, name)
        refuse(value is not None and not least <= value < math.inf, f"{name} must be at least {least}, got {value}")
