"""How matrices are orthogonalised, as one short string: a table's name, or the table itself.

An inline table is a row of odd quintics p(x) = a x + b x^3 + c x^5, one a step: `a,b,c;a,b,c;...`, the last of which
repeats. It may begin with `safety=1.02;`: inputs then have Frobenius norm 1 / 1.02, otherwise 1.
"""

import difflib
import math

Triple = tuple[float, float, float]
NAMES = ("quintic", "polar_express", "convergent", "dion", "radii", "svd")
GRAMMAR = "an inline table is 'a,b,c;a,b,c;...', after 'safety=S;' with S >= 1 where inputs have norm 1/S"


def check_ns(text: str) -> None:
    """Raise ValueError, naming the nearest right choice, where `text` is neither a table's name nor an inline table."""
    if text in NAMES:
        return
    if "," in text or ";" in text:
        parse_table(text)
        return
    close = difflib.get_close_matches(text, NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"choices: {', '.join(NAMES)}"
    raise ValueError(f"unknown ns {text!r}; {hint}; {GRAMMAR}")


def parse_table(text: str) -> tuple[float, tuple[Triple, ...]]:
    """Safety factor and triples of an inline table. Raises ValueError, quoting the offending part."""
    head, _, rest = text.partition(";")
    given = head.strip().startswith("safety=")
    safety = _numbers(head.strip().removeprefix("safety="), 1, text)[0] if given else 1.0
    if safety < 1:
        raise ValueError(f"safety must be at least 1, got {safety:g} in {text!r}")
    parts = (rest if given else text).split(";")
    return safety, tuple(_numbers(part, 3, text) for part in parts)


def _numbers(part: str, count: int, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in part.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"cannot read {part!r} in ns {text!r}: {GRAMMAR}")
    return numbers
