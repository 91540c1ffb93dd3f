"""Atomic writing: under its name a file is always complete, or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without error, it replaces `path` and is safely on disk.

    Missing parent folders are created. With `shared` the temporary name holds the process id, so that several processes
    may write the same cache file at once; without it a later write overwrites the temporary file of a killed process.
    Raises ValueError if the file cannot be written.
    """
    temporary_path = path.with_name(f"{path.name}.{os.getpid()}.partial" if shared else f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary_path
        # Contents first, then the name: after a power cut the name must never point to a file that is not on disk.
        _sync(temporary_path)
        os.replace(temporary_path, path)
        if os.name == "posix":  # elsewhere a directory cannot be opened, and need not be
            _sync(path.parent)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary_path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until the file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
