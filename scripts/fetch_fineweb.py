"""FineWeb shards on disk: `python -m scripts.fetch_fineweb --shards 9`; from the hub, a mirror, or your documents."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

import tyro
from tqdm import tqdm

from configs.cli import fail
from data.shards import is_shard, read_shard
from scripts.tokenize_documents import shard_name, tokenize

HUB_SHARDS = 103
STAGING = ".incoming"
COPY_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """How many shards, and from where. Run it again after an interruption: it goes on where it was."""

    shards: int = 9
    """Training shards; the validation shard comes beside them. The hub has 103, of 100 M tokens (200 MB) each."""
    dir: Path = Path("data/fineweb10B")
    """Folder to fill."""
    dataset: str = "kjj0/fineweb10B-gpt2"
    """Data set on huggingface.co that holds the shards."""
    mirror: str | None = None
    """Copy from this folder (a path or a file:// address) and ask no network."""
    tokenize: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """Make the shards instead: of HuggingFaceFW/fineweb, another data set, or a folder of .txt, .jsonl or .parquet."""
    shard_tokens: int = 100_000_000
    """With tokenize: tokens in a shard; the last may have fewer."""
    workers: int = os.cpu_count() or 1
    """With tokenize: processes."""

    def __post_init__(self) -> None:
        for name in ("shards", "shard_tokens", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.mirror and self.tokenize:
            raise ValueError("--mirror and --tokenize exclude each other")
        if not (self.mirror or self.tokenize) and self.shards > HUB_SHARDS:
            raise ValueError(f"--shards must be at most {HUB_SHARDS}, all that the hub has, got {self.shards}")


def fetch(args: Fetch) -> None:
    """Bring the missing shards. A file takes its name once it is whole: header, token count and size agree.

    Raises ValueError where a shard cannot be had or is damaged, OSError where the disk does not play along.
    """
    staging = args.dir / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    for name in map(shard_name, range(args.shards + 1)):
        if is_shard(args.dir / name):
            print(f"{name}: already here")
            continue
        arrived = _copy(args.mirror, name, staging) if args.mirror else _download(args.dataset, name, staging)
        accept(arrived, args.dir / name)
    shutil.rmtree(staging)
    print(f"{args.dir}: 1 validation shard, {args.shards} training shards")


def accept(arrived: Path, target: Path) -> None:
    """Give a whole shard its final name; remove one that is not, and raise ValueError."""
    try:
        read_shard(arrived)
    except ValueError as error:
        arrived.unlink()
        raise ValueError(f"not a whole shard, removed; run again to fetch it anew: {error}") from None
    with arrived.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(arrived, target)


def _download(dataset: str, name: str, staging: Path) -> Path:
    """The shard from the hub, in `staging`; what an earlier attempt left there is continued."""
    import huggingface_hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # of a missing network we tell once
    print(f"{name}: from huggingface.co/datasets/{dataset}")
    try:
        return Path(huggingface_hub.hf_hub_download(dataset, name, repo_type="dataset", local_dir=staging))
    except Exception as error:  # the hub's HTTP library, and with it what it raises, changes between versions
        raise ValueError(f"cannot fetch {name} of {dataset} ({type(error).__name__}): is huggingface.co reachable, and "
                         "the name right? Without a network: --mirror FOLDER, or --tokenize FOLDER") from None


def _copy(mirror: str, name: str, staging: Path) -> Path:
    """The shard from a folder, in `staging`; what an earlier attempt left there is continued."""
    address = urlsplit(mirror)
    if address.scheme not in ("", "file"):
        raise ValueError(f"--mirror takes a folder or a file:// address, got {mirror!r}")
    source, part = Path(unquote(address.path) if address.scheme else mirror) / name, staging / f"{name}.part"
    if not source.is_file():
        raise ValueError(f"--mirror: there is no {source}")
    total, done = source.stat().st_size, part.stat().st_size if part.exists() else 0
    with (source.open("rb") as reader, part.open("ab") as writer,
          tqdm(desc=name, total=total, initial=done, unit="B", unit_scale=True, disable=None) as bar):
        reader.seek(done)
        while block := reader.read(COPY_BYTES):
            writer.write(block)
            bar.update(len(block))
    return part


def main() -> None:
    """Parse the command line; a mistake or a missing network is one line and status 2."""
    try:
        args = tyro.cli(Fetch, prog="python -m scripts.fetch_fineweb", use_underscores=True)
        if args.tokenize:
            tokenize(args.tokenize, args.dir, shards=args.shards + 1, shard_tokens=args.shard_tokens,
                     workers=args.workers)
        else:
            fetch(args)
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
