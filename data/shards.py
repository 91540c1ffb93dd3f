"""Shards: token files in the speedrun's .bin format.

    bytes 0 to 1023   header of 256 int32: magic number 20240520, version 1, number of tokens, then zeros
    bytes from 1024   the tokens, uint16 each

All numbers are little-endian. Format: K. Jordan et al., modded-nanogpt (2024), after A. Karpathy, llm.c (2024).
"""

import difflib
import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs.notation import raise_if
from data.files import atomic_write

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
TOKEN_LIMIT = 2 ** (8 * TOKEN_BYTES)
SCAN_TOKENS = 2**22
"""Tokens that are checked at once: 8 MB, so that the temporary array of a whole shard never lies in memory."""


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write tokens, a flat array of any integer type, as one shard, complete or not at all.

    Raises ValueError for a token that is no uint16, or if the file cannot be written.
    """
    tokens = np.asarray(tokens)
    misfits = np.flatnonzero((tokens < 0) | (tokens >= TOKEN_LIMIT))
    if len(misfits):
        at = misfits[0]
        raise ValueError(f"token {tokens[at]} at position {at} does not fit {path}: shards hold 0 to {TOKEN_LIMIT - 1}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with atomic_write(Path(path), shared=True) as temporary_path, temporary_path.open("wb") as file:
        header.tofile(file)
        tokens.astype("<u2").tofile(file)


def read_shard(path: str | Path, *, vocab_size: int | None = None) -> np.ndarray:
    """Return the tokens of a shard as a read-only memory map, uint16 (n,).

    With `vocab_size` all tokens are read and checked against it. Raises ValueError, naming file and field, if the file is
    missing, incomplete or no shard.
    """
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(_count_tokens(Path(path)),))
    if vocab_size is not None:
        check_vocabulary(tokens, vocab_size, file_name=str(path))
    return tokens


def _count_tokens(path: Path) -> int:
    """Return the token count of a shard's header. Raises ValueError unless header and file size agree."""
    try:
        header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), path.stat().st_size
    except OSError as error:
        raise ValueError(f"cannot read shard {path}: {error.strerror}") from None
    raise_if(len(header) < HEADER_INTS, f"{path}: header is truncated: {size} bytes, a shard starts with {HEADER_BYTES}")
    magic, version, count = (int(x) for x in header[:3])
    raise_if(magic != MAGIC, f"{path}: magic number is {magic}, a shard has {MAGIC}; is this a token file?")
    raise_if(version != VERSION, f"{path}: version is {version}, only {VERSION} is known")
    # The exact size: a download that was cut looks like a shard in all but its length.
    raise_if(count < 1 or size != HEADER_BYTES + TOKEN_BYTES * count,
             f"{path}: token count is {count:,}, but the file has {size - HEADER_BYTES:,} bytes of tokens, "
             f"{TOKEN_BYTES} each: truncated or damaged; delete it and fetch it again")
    return count


def is_shard(path: str | Path) -> bool:
    """True if the file exists and is a complete shard."""
    try:
        return _count_tokens(Path(path)) > 0
    except ValueError:
        return False


def check_vocabulary(tokens: np.ndarray, vocab_size: int, *, file_name: str) -> None:
    """Raise ValueError if a token (n,) is not below `vocab_size`, with its position and `file_name`."""
    for start in range(0, len(tokens), SCAN_TOKENS):
        part = tokens[start:start + SCAN_TOKENS]
        if part.max() >= vocab_size:
            at = int(np.argmax(part >= vocab_size))
            raise ValueError(f"{file_name}: token {part[at]} at position {start + at} is outside the vocabulary of "
                             f"{vocab_size}")


def find_files(patterns: Sequence[str], *, flag: str) -> list[Path]:
    """Return all files that match the glob patterns, each once, sorted by path.

    Raises ValueError for a pattern without a match; it names the `flag` that gave the pattern, and the nearest name that
    exists.
    """
    paths: set[str] = set()
    for pattern in patterns:
        names = matches(pattern)
        if not names:
            raise ValueError(f"{flag}: no file matches {pattern!r}{_suggestion(pattern)}")
        paths.update(names)
    return [Path(name) for name in sorted(paths)]


def matches(pattern: str) -> list[str]:
    """Return the paths of the files that match a glob pattern."""
    return [name for name in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(name)]


def _suggestion(pattern: str) -> str:
    """Return what the user probably wants instead of a pattern that matches nothing; empty if nothing is near."""
    if "fineweb" in pattern:
        return "; fetch the shards first: python -m scripts.fetch_fineweb --shards 9"
    # Up to the first folder that exists, so that a mistake in a folder's name is recognised too.
    folder = Path(pattern).expanduser().parent
    while not folder.is_dir():
        pattern, folder = str(folder), folder.parent
    close = difflib.get_close_matches(Path(pattern).name, sorted(os.listdir(folder)), n=1)
    return f"; did you mean {str(folder / close[0])!r}?" if close else ""
