"""The speedrun's .bin format: 256 int32 (magic, version, token count, zeros), then the tokens as uint16.

All numbers are little-endian. Format: K. Jordan et al., modded-nanogpt (2024), after A. Karpathy, llm.c (2024).
"""

import difflib
import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.files import atomic_write

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
TOKEN_LIMIT = 2 ** (8 * TOKEN_BYTES)
SCAN_TOKENS = 2**22


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write tokens (any integers, flat) as one shard, all or nothing. Raises ValueError for a token outside uint16."""
    tokens = np.asarray(tokens)
    misfits = np.flatnonzero((tokens < 0) | (tokens >= TOKEN_LIMIT))
    if len(misfits):
        at = misfits[0]
        raise ValueError(f"token {tokens[at]} at position {at} does not fit {path}: shards hold 0 to {TOKEN_LIMIT - 1}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with atomic_write(Path(path), shared=True) as aside, aside.open("wb") as file:
        header.tofile(file)
        tokens.astype("<u2").tofile(file)


def read_shard(path: str | Path, *, vocab_size: int | None = None) -> np.ndarray:
    """The tokens of a shard, a read-only memory map of uint16; with `vocab_size` all of them are checked against it.

    Raises ValueError, naming file and field, if the file is missing or not a whole and valid shard.
    """
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(_count_tokens(Path(path)),))
    if vocab_size is not None:
        check_vocabulary(tokens, vocab_size, what=str(path))
    return tokens


def _count_tokens(path: Path) -> int:
    """The token count of a shard's header, once header and file size agree."""
    try:
        header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), path.stat().st_size
    except OSError as error:
        raise ValueError(f"cannot read shard {path}: {error.strerror}") from None
    if len(header) < HEADER_INTS:
        raise ValueError(f"{path}: header is truncated: {size} bytes, a shard starts with {HEADER_BYTES}")
    magic, version, count = (int(x) for x in header[:3])
    if magic != MAGIC:
        raise ValueError(f"{path}: magic number is {magic}, a shard has {MAGIC}; is this a token file?")
    if version != VERSION:
        raise ValueError(f"{path}: version is {version}, only {VERSION} is known")
    if count < 1 or size != HEADER_BYTES + TOKEN_BYTES * count:
        raise ValueError(f"{path}: token count is {count:,}, but the file has {size - HEADER_BYTES:,} bytes of tokens, "
                         f"{TOKEN_BYTES} each: truncated or damaged; delete it and fetch it again")
    return count


def is_shard(path: str | Path) -> bool:
    """Whether a whole shard is there."""
    try:
        return _count_tokens(Path(path)) > 0
    except ValueError:
        return False


def check_vocabulary(tokens: np.ndarray, vocab_size: int, *, what: str) -> None:
    """Raise ValueError with the first token that is not in the vocabulary, `what` naming the file."""
    for start in range(0, len(tokens), SCAN_TOKENS):
        part = tokens[start:start + SCAN_TOKENS]
        if part.max() >= vocab_size:
            at = int(np.argmax(part >= vocab_size))
            raise ValueError(f"{what}: token {part[at]} at position {start + at} is outside the vocabulary of "
                             f"{vocab_size}")


def find_files(patterns: Sequence[str], *, what: str) -> list[Path]:
    """All files that match the patterns, each once, sorted by path; `what` names the flag that gave them.

    Raises ValueError for a pattern without a match, with the nearest name that exists.
    """
    paths: set[str] = set()
    for pattern in patterns:
        matches = [name for name in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(name)]
        if not matches:
            raise ValueError(f"{what}: no file matches {pattern!r}{_advice(pattern)}")
        paths.update(matches)
    return [Path(name) for name in sorted(paths)]


def _advice(pattern: str) -> str:
    """What the user probably wants instead of a pattern that matches nothing."""
    if "fineweb" in pattern:
        return "; fetch the shards first: python -m scripts.fetch_fineweb --shards 9"
    folder = Path(pattern).expanduser().parent
    while not folder.is_dir():
        pattern, folder = str(folder), folder.parent
    close = difflib.get_close_matches(Path(pattern).name, sorted(os.listdir(folder)), n=1)
    return f"; did you mean {str(folder / close[0])!r}?" if close else ""
