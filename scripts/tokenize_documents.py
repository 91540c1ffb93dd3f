"""Shards of GPT-2 tokens made from documents, each opened by end-of-text; shard 0 is for validation.

Documents are taken in their order, so that shards are the same however often the work was interrupted. Where each
shard begins stands in tokenized.json beside them.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.files import replacing
from data.shards import is_shard, write_shard
from data.sources import encode_documents
from data.tokenizers import Tokenizer, load_tokenizer

FINEWEB, FINEWEB_SAMPLE = "HuggingFaceFW/fineweb", "sample-10BT"
READERS = {".txt": ("text", {"sample_by": "document"}), ".jsonl": ("json", {}), ".parquet": ("parquet", {})}
CHUNK_DOCUMENTS = 16


def shard_name(number: int) -> str:
    """The speedrun's file names: shard 0 validates, the others train."""
    return f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"


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
        with replacing(path) as aside:
            aside.write_text(json.dumps(asdict(self)))


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
        with tqdm(unit="tok", unit_scale=True, desc="tokenized", disable=None) as bar:
            stream = encode_all(read_documents(source, document), workers)
            write_shards(counted(stream, bar), folder, progress, shards=shards, skip_tokens=token)
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


def counted(documents: Iterable[np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    """The same documents; the bar shows their tokens."""
    for tokens in documents:
        bar.update(len(tokens))
        yield tokens


def encode_all(texts: Iterable[str], workers: int) -> Iterator[np.ndarray]:
    """Each document's tokens, end-of-text first, in order, encoded by a pool of processes."""
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_encode, texts, chunksize=CHUNK_DOCUMENTS)


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
