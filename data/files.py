"""Whole files or none: what stands under a name is always complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path`, durably, once the block ends without error.

    Folders on the way are made. `shared`: the path is this process's own, so that several may fill one cache at once;
    else a later attempt overwrites what a kill left. Raises ValueError where the file cannot be written.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial" if shared else f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _sync(aside)
        os.replace(aside, path)
        if os.name == "posix":  # elsewhere a directory cannot be opened, and need not be
            _sync(path.parent)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until the file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
