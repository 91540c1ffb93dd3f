"""Skips between layers: `3>6` adds what layer 3 wrote to what layer 6 reads; `unet` pairs the first with the last."""

from configs.refuse import refuse


def parse_skips(words: tuple[str, ...], layers: int) -> tuple[tuple[int, int], ...]:
    """(source, target) of every skip. Raises ValueError, quoting the offending word."""
    pairs: list[tuple[int, int]] = []
    for word in words:
        if word == "unet":  # the first half's outputs, taken back in reverse order by the second half (speedrun, Nov 2024)
            pairs += [(i, layers - 1 - i) for i in range(layers // 2)]
            continue
        source, _, target = word.partition(">")
        refuse(not (source.isdigit() and target.isdigit()), f"a skip is SOURCE>TARGET, say 3>6, or unet; got {word!r}")
        refuse(not int(source) < int(target) < layers,
               f"a skip goes from a layer to a later one of {layers} (numbered from 0), got {word!r}")
        pairs.append((int(source), int(target)))
    return tuple(pairs)
