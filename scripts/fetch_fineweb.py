"""Download FineWeb shards, copy them from a mirror, or tokenize documents into shards.

    python -m scripts.fetch_fineweb --shards 9
    python -m scripts.fetch_fineweb --preset track3 -- --train.steps 9000
    python -m scripts.fetch_fineweb --tokenize my_texts --dir data/mine

After an interruption the same command continues where it stopped. Shard 0 is for validation, the others are for training.
With --tokenize, documents are taken in order, each after an end-of-text token. tokenized.json records where each shard
begins in them, so interrupted work gives the same shards as uninterrupted work.
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
from configs.notation import raise_if
from configs.schema import Run
from data.run.folder import write_json
from data.shards import is_shard, read_shard, write_shard
from data.sources import encode_documents
from data.tokenizers import Tokenizer, load_tokenizer
from optim.schedule import Schedule
from scripts import command

HUB_SHARDS, HUB_SHARD_TOKENS = 103, 100_000_000  # training shards of kjj0/fineweb10B-gpt2
MIN_SHARDS = 9  # training shards of the speedrun's first records
HUB_FOLDER = "data/fineweb10B/"
FINEWEB, FINEWEB_SAMPLE = "HuggingFaceFW/fineweb", "sample-10BT"  # the sample from which the hub's shards were made
READERS = {".txt": ("text", {"sample_by": "document"}), ".jsonl": ("json", {}), ".parquet": ("parquet", {})}
"""By file suffix: the builder of the `datasets` library and its options; a .txt file is one document."""
CHUNK_DOCUMENTS = 16  # documents sent to a worker process in one message, since most are short


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """The number of shards and where they come from. Run the same command again to continue after an interruption."""

    shards: int = 9
    """Number of training shards; the validation shard is fetched as well. The hub has 103 of 100 M tokens (200 MB) each."""
    preset: str = ""
    """Instead of --shards: fetch as many as this preset reads before its data repeat. Flags of its run go after `--`."""
    dir: Path = Path(HUB_FOLDER)
    """Folder that receives the shards."""
    dataset: str = "kjj0/fineweb10B-gpt2"
    """Data set on huggingface.co that holds the shards."""
    mirror: str | None = None
    """Copy the shards from this folder (a path or a file:// address) instead; needs no network."""
    tokenize: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """Make the shards instead, from HuggingFaceFW/fineweb, another data set, or a folder of .txt, .jsonl or .parquet."""
    shard_tokens: int = 100_000_000
    """With --tokenize: tokens per shard; the last shard may have fewer."""
    workers: int = os.cpu_count() or 1
    """With --tokenize: number of processes that encode documents."""

    def __post_init__(self) -> None:
        for name in ("shards", "shard_tokens", "workers"):
            raise_if(getattr(self, name) < 1, f"--{name} must be at least 1, got {getattr(self, name)}")
        raise_if(bool(self.mirror and self.tokenize), "--mirror and --tokenize cannot be combined: give one of them")
        raise_if(not (self.mirror or self.tokenize) and self.shards > HUB_SHARDS,
                 f"--shards must be at most {HUB_SHARDS}, the number of training shards on the hub, got {self.shards}")


def fetch_shards(args: Fetch) -> None:
    """Fetch the validation shard and `args.shards` training shards, except those that `args.dir` holds already.

    Raises ValueError if a shard cannot be fetched or is damaged, and OSError if the disk is full or not writable.
    """
    # A shard is written to the staging folder first and renamed once it is complete: a name in args.dir means a whole shard.
    staging = args.dir / ".incoming"
    staging.mkdir(parents=True, exist_ok=True)
    origin = args.mirror or f"huggingface.co/datasets/{args.dataset}"
    names = [shard_name(number) for number in range(args.shards + 1)]
    for number, name in enumerate(names, start=1):
        target = args.dir / name
        if is_shard(target):
            print(f"[{number}/{len(names)}] {name}: already here")
            continue
        print(f"[{number}/{len(names)}] {name}: {'damaged here, ' if target.exists() else ''}fetching from {origin}")
        staged = _copy_shard(args.mirror, name, staging) if args.mirror else _download_shard(args.dataset, name, staging)
        install_shard(staged, target)
    shutil.rmtree(staging)
    gigabytes = sum((args.dir / name).stat().st_size for name in names) / 1e9
    print(f"{args.dir} is complete: 1 validation shard, {args.shards} training shards ({gigabytes:.2f} GB)")


def install_shard(staged: Path, target: Path) -> None:
    """Move a complete shard to its final path. Raises ValueError if it is damaged, after deleting it."""
    try:
        read_shard(staged)
    except ValueError as error:
        staged.unlink()  # else the hub's library would take it for a finished download the next time
        raise ValueError(f"a damaged shard arrived and was deleted; run this again or use another source: {error}") from None
    # Write the data to disk before the rename: after a power cut, a name must not stand for an incomplete shard.
    with staged.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(staged, target)


def _download_shard(dataset: str, name: str, staging: Path) -> Path:
    """Download a shard into `staging` and return its path. An earlier download that was interrupted there is continued."""
    import huggingface_hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # the error below reports a missing network, once
    try:
        return Path(huggingface_hub.hf_hub_download(dataset, name, repo_type="dataset", local_dir=staging))
    except Exception as error:  # the hub's HTTP library changes between versions, and with it the classes that it raises
        raise ValueError(f"cannot download {name} from data set {dataset} ({type(error).__name__}): check the network and "
                         "the name; without a network use --mirror FOLDER or --tokenize FOLDER") from None


def shard_name(number: int) -> str:
    """Return the file name that the speedrun gives to a shard: number 0 is for validation, the others for training."""
    return f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"


def _copy_shard(mirror: str, name: str, staging: Path) -> Path:
    """Copy a shard from a folder into `staging` and return the path of the copy."""
    address = urlsplit(mirror)
    raise_if(address.scheme not in ("", "file"), f"--mirror takes a folder or a file:// address, got {mirror!r}")
    source = Path(unquote(address.path) if address.scheme else mirror) / name
    raise_if(not source.is_file(), f"--mirror: there is no {source}")
    return Path(shutil.copyfile(source, staging / name))


def shards_needed(run: Run) -> int:
    """Return how many FineWeb training shards the run reads at most before its data repeat.

    0 if the run reads other files than the FineWeb shards in their usual folder.
    """
    if run.data.source != "shards" or not all(str(name).startswith(HUB_FOLDER) for name in run.data.train_files):
        return 0
    # The order `documents` cuts long documents and skips what it cuts off: twice the run's tokens are assumed to suffice.
    tokens = Schedule(run).tokens_before(run.train.steps) * (2 if run.data.order == "documents" else 1)
    return min(HUB_SHARDS, max(MIN_SHARDS, math.ceil(tokens / HUB_SHARD_TOKENS)))


# ---- Shards from documents -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Progress:
    """The content of tokenized.json: how far the documents are cut into shards."""

    source: str
    """Data set or folder of the documents."""
    shard_tokens: int
    """Tokens per shard."""
    starts: list[list[int]] = field(default_factory=lambda: [[0, 0]])
    """For shard 0, 1, ...: [document, token within it] of its first token. Until the documents are exhausted, the last entry
    is the start of the shard to write next."""
    exhausted: bool = False
    """True if the documents ended with the last of these shards."""

    @property
    def num_written(self) -> int:
        """Number of shards that are recorded as written."""
        return len(self.starts) if self.exhausted else len(self.starts) - 1

    def save(self, path: Path) -> None:
        """Write the progress to `path` as JSON, atomically."""
        write_json(path, asdict(self))


def tokenize(source: str, folder: Path, *, shards: int, shard_tokens: int, workers: int) -> None:
    """Make those of the shards 0 to `shards` - 1 that are missing in `folder`; fewer if the documents end before.

    All shards after the first missing one are written again. Raises ValueError if the source has no documents, and if the
    folder holds shards of other documents or of another size.
    """
    progress = open_progress(source, folder, shard_tokens)
    # A shard that is on disk but not recorded is made again: the work was killed before it could record the next start.
    missing = [i for i in range(min(shards, len(progress.starts)))
               if i >= progress.num_written or not is_shard(folder / shard_name(i))]
    if missing:
        document, token = progress.starts[missing[0]]
        del progress.starts[missing[0] + 1:]
        progress.exhausted = False
        print(f"{folder}: tokenizing from shard {missing[0]}, which begins at document {document:,}, token {token:,}")
        stream = encode_all(read_documents(source, document), workers)
        write_shards(stream, folder, progress, shards=shards, skip_tokens=token)
    print(f"{folder} is complete: {min(shards, progress.num_written)} shards of at most {shard_tokens:,} tokens"
          f"{'; the documents are exhausted' if progress.exhausted else ''}")


def open_progress(source: str, folder: Path, shard_tokens: int) -> Progress:
    """Return the progress recorded in `folder`, or begin a new one. Raises ValueError if the folder holds other shards."""
    path = folder / "tokenized.json"
    if path.exists():
        progress = Progress(**json.loads(path.read_text()))
        if (progress.source, progress.shard_tokens) != (source, shard_tokens):
            raise ValueError(f"{folder} holds shards of {progress.shard_tokens:,} tokens made from {progress.source}; give "
                             "the same source and --shard_tokens to continue, or choose another --dir")
        return progress
    raise_if(any(folder.glob("fineweb_*.bin")), f"{folder} holds shards not made from {source}; choose another --dir")
    progress = Progress(source, shard_tokens)
    progress.save(path)
    return progress


def write_shards(documents: Iterable[np.ndarray], folder: Path, progress: Progress, *, shards: int,
                 skip_tokens: int) -> None:
    """Write shards until number `shards` - 1 is complete or the documents end, and record each in tokenized.json.

    documents: token arrays; the first is the document in which the last shard of progress.starts begins, and its first
    `skip_tokens` tokens belong to the shard before.
    """
    buffer, filled = np.empty(progress.shard_tokens, dtype=np.uint16), 0
    for document, tokens in enumerate(documents, start=progress.starts[-1][0]):
        used, skip_tokens = skip_tokens, 0
        while used < len(tokens):
            # Copy as much of the document as the shard has room for.
            part = tokens[used:used + len(buffer) - filled]
            buffer[filled:filled + len(part)] = part
            filled, used = filled + len(part), used + len(part)
            # Write a full shard first, then record it: tokenized.json never names a shard that is not on disk.
            if filled == len(buffer):
                write_shard(folder / shard_name(len(progress.starts) - 1), buffer)
                progress.starts.append([document, used])
                progress.save(folder / "tokenized.json")
                filled = 0
                if len(progress.starts) > shards:
                    return
    _write_last_shard(buffer[:filled], folder, progress)


def _write_last_shard(tokens: np.ndarray, folder: Path, progress: Progress) -> None:
    """Write what is left at the end of the documents as a shorter shard. Raises ValueError if there were no documents."""
    if len(tokens):
        write_shard(folder / shard_name(len(progress.starts) - 1), tokens)
    elif len(progress.starts) > 1:
        progress.starts.pop()  # the documents ended exactly with the shard before: there is no shard to write next
    else:
        raise ValueError(f"{progress.source} holds no documents")
    progress.exhausted = True
    progress.save(folder / "tokenized.json")


def encode_all(texts: Iterable[str], workers: int) -> Iterator[np.ndarray]:
    """Encode documents in a pool of `workers` processes; yield each one's tokens, uint16, end-of-text first, in order."""
    # spawn: a forked process would inherit locks that threads of the data set library hold, and could wait forever.
    with get_context("spawn").Pool(workers) as pool:
        encoded = pool.imap(_encode, texts, chunksize=CHUNK_DOCUMENTS)
        yield from tqdm(encoded, unit=" documents", desc="tokenized", disable=None)


@cache
def _gpt2() -> Tokenizer:
    """Return the GPT-2 tokenizer, loaded once per process."""
    return load_tokenizer("gpt2", cache_dir=Path())


def _encode(text: str) -> np.ndarray:
    # errors="replace": JSON may hold lone surrogates, which UTF-8 cannot encode.
    return encode_documents([text.encode(errors="replace")], _gpt2())


def read_documents(source: str, first: int) -> Iterator[str]:
    """Yield the texts of a folder or of a data set on the hub, from document number `first` on.

    Raises ValueError if they cannot be read, or have no column `text`.
    """
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # as in _download_shard
    builder, options = _load_arguments(source)
    try:
        stream = datasets.load_dataset(builder, split="train", streaming=True, **options)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot read data set {source} ({type(error).__name__}): check the network and the name; without "
                         "a network give a folder of .txt, .jsonl or .parquet files") from None
    for record in stream.skip(first):
        if "text" not in record:
            raise ValueError(f"{source} has no column 'text', only {', '.join(record)}")
        yield record["text"]


def _load_arguments(source: str) -> tuple[str, dict]:
    """Return the first argument and the options of datasets.load_dataset for a folder or a data set's name.

    Raises ValueError if a folder holds no readable file, or files of more than one kind.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source, {"name": FINEWEB_SAMPLE} if source == FINEWEB else {}
    files = sorted(str(path) for path in folder.rglob("*") if path.suffix in READERS)
    suffixes = {Path(name).suffix for name in files}
    raise_if(len(suffixes) != 1, f"{source} must hold files of one kind of {', '.join(READERS)}, but it holds "
                                 f"{', '.join(sorted(suffixes)) or 'none'}")
    builder, options = READERS[suffixes.pop()]
    return builder, {"data_files": files} | options


def main(args: Fetch, flags: list[str]) -> None:
    """Fetch or tokenize. Raises ValueError with one line for the user also if the network is missing or the disk is full."""
    if flags and not args.preset:
        raise ValueError(f"flags of a run, such as {flags[0]}, need --preset")
    if args.preset:
        count = shards_needed(parse_row(args.preset, flags))
        if not count:
            print(f"{args.preset} reads no shards from {HUB_FOLDER}: nothing to fetch")
            return
        args = replace(args, shards=count)
    try:
        if args.tokenize:
            tokenize(args.tokenize, args.dir, shards=args.shards + 1, shard_tokens=args.shard_tokens, workers=args.workers)
        else:
            fetch_shards(args)
    except OSError as error:
        raise ValueError(str(error)) from None
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to continue")
        raise SystemExit(130) from None


if __name__ == "__main__":
    command(main, Fetch, __doc__, flags=True)
