"""FineWeb shards on disk: `python -m scripts.fetch_fineweb --shards 9`; from the hub, a mirror, or your documents.

    python -m scripts.fetch_fineweb --preset track3 -- --train.steps 9000

Own documents are taken in their order, each opened by end-of-text, so that shards are the same however often the work was
interrupted; shard 0 is for validation. Where each shard begins stands in tokenized.json beside them.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

import numpy as np
import tyro
from tqdm import tqdm

from configs.cli import parse_row
from configs.schema import Run
from data.run.folder import write_json
from data.shards import is_shard, read_shard, write_shard
from data.sources import encode_documents
from data.tokenizers import Tokenizer, load_tokenizer
from optim.schedule import Schedule
from scripts import command

HUB_SHARDS, HUB_SHARD_TOKENS = 103, 100_000_000
FEWEST = 9  # the training shards of the speedrun's first records
HUB_FOLDER = "data/fineweb10B/"
FINEWEB, FINEWEB_SAMPLE = "HuggingFaceFW/fineweb", "sample-10BT"
READERS = {".txt": ("text", {"sample_by": "document"}), ".jsonl": ("json", {}), ".parquet": ("parquet", {})}
CHUNK_DOCUMENTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """How many shards, and from where. Run it again after an interruption: it goes on where it was."""

    shards: int = 9
    """Training shards; the validation shard comes beside them. The hub has 103, of 100 M tokens (200 MB) each."""
    preset: str = ""
    """Instead of --shards: as many as this preset reads before its data repeats. Flags of its run stand after `--`."""
    dir: Path = Path(HUB_FOLDER)
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
    staging = args.dir / ".incoming"
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


def shard_name(number: int) -> str:
    """The speedrun's file names: shard 0 validates, the others train."""
    return f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"


def _copy(mirror: str, name: str, staging: Path) -> Path:
    """The shard from a folder, in `staging`."""
    address = urlsplit(mirror)
    if address.scheme not in ("", "file"):
        raise ValueError(f"--mirror takes a folder or a file:// address, got {mirror!r}")
    source = Path(unquote(address.path) if address.scheme else mirror) / name
    if not source.is_file():
        raise ValueError(f"--mirror: there is no {source}")
    print(f"{name}: from {source.parent}")
    return Path(shutil.copyfile(source, staging / name))


def shards_read(run: Run) -> int:
    """FineWeb shards that the run reads, at most, before its data repeats; 0 where it does not read them from their folder.

    Orders that clip documents skip part of the stream: twice the run's tokens are taken to be enough.
    """
    if run.data.source != "shards" or not all(str(name).startswith(HUB_FOLDER) for name in run.data.train_files):
        return 0
    tokens = Schedule(run).tokens_before(run.train.steps) * (2 if run.data.order == "documents" else 1)
    return min(HUB_SHARDS, max(FEWEST, math.ceil(tokens / HUB_SHARD_TOKENS)))


# ---- One's own documents --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Progress:
    """What tokenized.json holds."""

    source: str
    shard_tokens: int
    starts: list[list[int]] = field(default_factory=lambda: [[0, 0]])
    """Where shard 0, 1, ... begins: (document, token within it)."""
    exhausted: bool = False
    """The documents ended with the last of these shards."""

    def save(self, path: Path) -> None:
        """Write it, all or nothing."""
        write_json(path, asdict(self))


def tokenize(source: str, folder: Path, *, shards: int, shard_tokens: int, workers: int) -> None:
    """Make the missing ones of the first `shards` shards, fewer where the documents end before.

    Raises ValueError for a source without documents, and a folder that holds other shards.
    """
    progress = open_progress(source, folder, shard_tokens)
    first = next((i for i in range(len(progress.starts)) if not is_shard(folder / shard_name(i))), len(progress.starts))
    if first < min(shards, len(progress.starts)):
        document, token = progress.starts[first]
        del progress.starts[first + 1:]
        progress.exhausted = False
        stream = encode_all(read_documents(source, document), workers)
        write_shards(stream, folder, progress, shards=shards, skip_tokens=token)
    made = len(progress.starts) - (not progress.exhausted)
    print(f"{folder}: {min(shards, made)} shards{', all that the documents fill' if progress.exhausted else ''}")


def open_progress(source: str, folder: Path, shard_tokens: int) -> Progress:
    """The progress that `folder` holds, or a new one. Raises ValueError where its shards are not of this work."""
    path = folder / "tokenized.json"
    if path.exists():
        progress = Progress(**json.loads(path.read_text()))
        if (progress.source, progress.shard_tokens) != (source, shard_tokens):
            raise ValueError(f"{folder} holds shards of {progress.shard_tokens} tokens made from {progress.source}; "
                             "go on with these, or choose another --dir")
        return progress
    if any(folder.glob("fineweb_*.bin")):
        raise ValueError(f"{folder} holds shards that were not made from {source}; choose another --dir")
    progress = Progress(source, shard_tokens)
    progress.save(path)
    return progress


def write_shards(documents: Iterable[np.ndarray], folder: Path, progress: Progress, *, shards: int,
                 skip_tokens: int) -> None:
    """Fill shards up to number `shards` - 1, from the document where the last of progress.starts lies."""
    shard, filled = np.empty(progress.shard_tokens, dtype=np.uint16), 0
    for document, tokens in enumerate(documents, start=progress.starts[-1][0]):
        used, skip_tokens = skip_tokens, 0
        while used < len(tokens):
            part = tokens[used:used + len(shard) - filled]
            shard[filled:filled + len(part)] = part
            filled, used = filled + len(part), used + len(part)
            if filled == len(shard):
                write_shard(folder / shard_name(len(progress.starts) - 1), shard)
                progress.starts.append([document, used])
                progress.save(folder / "tokenized.json")
                filled = 0
                if len(progress.starts) > shards:
                    return
    _finish(shard[:filled], folder, progress)


def _finish(rest: np.ndarray, folder: Path, progress: Progress) -> None:
    """The documents have ended: write the last, partial shard. Raises ValueError if there was nothing at all."""
    if len(rest):
        write_shard(folder / shard_name(len(progress.starts) - 1), rest)
    elif len(progress.starts) > 1:
        progress.starts.pop()
    else:
        raise ValueError(f"{progress.source} holds no documents")
    progress.exhausted = True
    progress.save(folder / "tokenized.json")


def encode_all(texts: Iterable[str], workers: int) -> Iterator[np.ndarray]:
    """Each document's tokens, end-of-text first, in order, encoded by a pool of processes."""
    with get_context("spawn").Pool(workers) as pool:
        encoded = pool.imap(_encode, texts, chunksize=CHUNK_DOCUMENTS)
        yield from tqdm(encoded, unit=" documents", desc="tokenized", disable=None)


@cache
def _gpt2() -> Tokenizer:
    """One tokenizer per process."""
    return load_tokenizer("gpt2", cache_dir=Path())


def _encode(text: str) -> np.ndarray:
    return encode_documents([text.encode(errors="replace")], _gpt2())


def read_documents(source: str, first: int) -> Iterator[str]:
    """The texts of a folder or of a data set on the hub, from document `first` on.

    Raises ValueError where they cannot be had, or have no column `text`.
    """
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # of a missing network we tell once
    kind, options = _reader(source)
    try:
        stream = datasets.load_dataset(kind, split="train", streaming=True, **options)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot read {source} ({type(error).__name__}): is huggingface.co reachable, and the name "
                         "right? Without a network, name a folder of .txt, .jsonl or .parquet files") from None
    for record in stream.skip(first):
        if "text" not in record:
            raise ValueError(f"{source} has no column 'text', only {', '.join(record)}")
        yield record["text"]


def _reader(source: str) -> tuple[str, dict]:
    """The arguments of datasets.load_dataset."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source, {"name": FINEWEB_SAMPLE} if source == FINEWEB else {}
    files = sorted(str(path) for path in folder.rglob("*") if path.suffix in READERS)
    suffixes = {Path(name).suffix for name in files}
    if len(suffixes) != 1:
        raise ValueError(f"{source} must hold files of one kind of {', '.join(READERS)}, found "
                         f"{', '.join(sorted(suffixes)) or 'none'}")
    kind, options = READERS[suffixes.pop()]
    return kind, {"data_files": files} | options


def main(args: Fetch, flags: list[str]) -> None:
    """Fetch or tokenize; a missing network or a full disk is one line."""
    if flags and not args.preset:
        raise ValueError(f"flags of a run, such as {flags[0]}, need --preset")
    if args.preset:
        count = shards_read(parse_row(args.preset, flags))
        if not count:
            print(f"{args.preset} reads no shards from {HUB_FOLDER}: nothing to fetch")
            return
        args = replace(args, shards=count)
    try:
        if args.tokenize:
            tokenize(args.tokenize, args.dir, shards=args.shards + 1, shard_tokens=args.shard_tokens, workers=args.workers)
        else:
            fetch(args)
    except OSError as error:
        raise ValueError(str(error)) from None
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on")
        raise SystemExit(130) from None


if __name__ == "__main__":
    command(main, Fetch, __doc__, flags=True)
