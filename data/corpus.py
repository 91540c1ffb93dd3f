"""The corpora that every machine has: the source code of Python's standard library, and its language reference.

Losses are comparable only between machines with the same Python: `Source.data_hash` tells them apart.
"""

import sysconfig
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

LEFT_OUT = frozenset({"test", "idlelib", "lib2to3", "site-packages", "dist-packages"})
TRAIN_TENTHS = 9


def corpus_files() -> list[Path]:
    """The .py files of this interpreter's standard library, sorted by path, without `LEFT_OUT` folders.

    Raises ValueError where the interpreter ships without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    by_name = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    files = [by_name[name] for name in sorted(by_name) if LEFT_OUT.isdisjoint(name.split("/"))]
    if not files:
        raise ValueError(f"this Python ships no .py sources under {root}; use another Python, or --data.source text")
    return files


def corpus_bytes() -> bytes:
    """The corpus: its files' bytes, one after another (11,308,408 bytes in Python 3.11.7)."""
    return b"".join(path.read_bytes() for path in corpus_files())


def prose_bytes() -> bytes:
    """English: all topics of the language reference that `help()` shows, by name (465,126 bytes in Python 3.11.7).

    Raises ValueError where the interpreter ships without them.
    """
    try:
        topics = import_module("pydoc_data.topics").topics
    except ImportError:
        raise ValueError("this Python ships no pydoc_data/topics.py; use another Python, or --data.corpus code") from None
    return "".join(topics[name] for name in sorted(topics)).encode()


CORPORA: dict[str, Callable[[], bytes]] = {"code": corpus_bytes, "prose": prose_bytes}


def clip_text(text: bytes, length: int) -> bytes:
    """The first `length` bytes of a UTF-8 text, less the bytes of a character that the cut would divide."""
    while 0 < length < len(text) and text[length] & 0b1100_0000 == 0b1000_0000:  # a continuation byte
        length -= 1
    return text[:length]


def split_text(text: bytes) -> tuple[bytes, bytes]:
    """(train, validation): the first 90 % and the last 10 % of a UTF-8 text, cut between characters."""
    train = clip_text(text, len(text) * TRAIN_TENTHS // 10)
    return train, text[len(train):]
