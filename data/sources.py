"""Sources of tokens: Python's own files, your own text, or the speedrun's shards; all of them become a `Source`."""

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from configs.schema import Data
from data.shards import HEADER_BYTES, check_vocabulary, find_files, matches, read_shard, write_shard
from data.tokenizers import Tokenizer, load_tokenizer, prefix_tokens

GPT2_VOCAB = 50_257
GPT2_END_OF_TEXT = 50_256
BYTE_VOCAB = 257  # 256 bytes and end-of-text
HASHED_BYTES = 2**20
"""Bytes at each end of a shard that enter its hash: hashing whole shards of 200 MB would delay every start."""
EXCLUDED_FOLDERS = frozenset({"test", "idlelib", "lib2to3", "site-packages", "dist-packages"})
"""Folders outside the corpus: some distributions of Python leave them out, others install packages there."""
TRAIN_TENTHS = 9


@dataclass(frozen=True, slots=True)
class Source:
    """Tokens to train on, and fixed tokens to validate on."""

    name: str
    """Name that the plan prints: kind of source and tokenizer."""
    train: list[np.ndarray]
    """Training tokens: flat uint16 arrays, memory-mapped from files."""
    validation: np.ndarray
    """Validation tokens (N + 1,): inputs are [:-1], targets [1:]."""
    validation_bytes: int | None
    """Number of bytes of text that the N targets encode; None without a tokenizer."""
    tokenizer: Tokenizer | None
    """Tokenizer of the tokens; None if it cannot be loaded, then there are no bits per byte and no samples."""
    vocab_size: int
    """Number of different tokens."""
    document_start: int | None
    """Token that begins each document."""
    data_hash: str
    """Hash of training tokens, validation tokens and vocabulary: losses of runs with equal hashes can be compared."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, printed with the plan."""
    is_planned: bool = False
    """True if the files are missing: there are no tokens, and the run can only be planned."""

    def prefixes(self) -> list[int] | None:
        """Return for each token the longest proper prefix that is a token too, or -1; None without a tokenizer."""
        if self.is_planned:
            return [-1] * self.vocab_size
        return prefix_tokens(self.tokenizer.pieces) if self.tokenizer else None


def open_source(data: Data, *, cache_dir: Path, plan_for: str | None = None) -> Source:
    """Open the source that a config describes; tokenizers and encoded text are cached in `cache_dir`.

    Raises ValueError for missing or damaged files, text that is not UTF-8, and a tokenizer that cannot be loaded. With
    `plan_for`, the name of a preset, missing files are no error: the result is a `planned_source`.
    """
    missing = [pattern for pattern in (*data.train_files, *data.val_files) if not matches(pattern)]
    if missing and plan_for is not None:
        return planned_source(data, missing, preset=plan_for)
    if data.source == "shards":
        return _open_shards(data, cache_dir)
    if data.source == "corpus":
        train, validation = split_text(CORPORA[data.corpus]())
        return _open_texts(data, [train], [validation], cache_dir)
    train_texts, val_texts = (read_texts(paths) for paths in _find_train_and_val_files(data))
    # Without validation files the last tenth of the training text is held out.
    return _open_texts(data, *((train_texts, val_texts) if data.val_files else split_documents(train_texts)), cache_dir)


def vocabulary(data: Data) -> int:
    """Return the vocabulary size of a source's tokenizer, without opening the source."""
    if data.source == "shards":
        return GPT2_VOCAB
    return {"bpe": data.bpe_vocab_tokens + 1, "bytes": BYTE_VOCAB, "gpt2": GPT2_VOCAB}[data.tokenizer]


def planned_source(data: Data, missing: Sequence[str], *, preset: str) -> Source:
    """Return a source without tokens, enough to plan a run of `preset`; its note names the `missing` files and the command
    that fetches them."""
    fetch = f"; fetch them: python -m scripts.fetch_fineweb --preset {preset}" if data.source == "shards" else ""
    size, nothing = vocabulary(data), np.empty(0, dtype=np.uint16)
    return Source(name=f"{data.source}, {data.tokenizer}", train=[], validation=nothing, validation_bytes=None,
                  tokenizer=None, vocab_size=size, document_start=size - 1, data_hash="unknown",
                  notes=(f"no training before these files are here: {', '.join(missing)}{fetch}",), is_planned=True)


def _find_train_and_val_files(data: Data) -> tuple[list[Path], list[Path]]:
    """Return training and validation files. Raises ValueError if a file is in both lists."""
    train_paths = find_files(data.train_files, flag="--data.train_files")
    val_paths = find_files(data.val_files, flag="--data.val_files")
    if both := set(train_paths) & set(val_paths):
        raise ValueError(f"{min(both)} is in both --data.train_files and --data.val_files")
    return train_paths, val_paths


# ---- Corpora that every machine has: the source of Python's standard library, and its language reference ------------------
# Losses can only be compared between machines with the same Python version: `Source.data_hash` differs otherwise.


def corpus_files() -> list[Path]:
    """Return the .py files of this interpreter's standard library, sorted by path, without EXCLUDED_FOLDERS.

    Raises ValueError if the interpreter has no source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    # Sorted by the posix form of the relative path, so that the corpus is the same on every system.
    by_name = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    files = [by_name[name] for name in sorted(by_name) if EXCLUDED_FOLDERS.isdisjoint(name.split("/"))]
    if not files:
        raise ValueError(f"this Python ships no .py sources under {root}; use another Python, or --data.source text")
    return files


def corpus_bytes() -> bytes:
    """Return the corpus "code": all `corpus_files`, one after another (11,308,408 bytes in Python 3.11.7)."""
    return b"".join(path.read_bytes() for path in corpus_files())


def prose_bytes() -> bytes:
    """Return the corpus "prose": the language reference that `help()` shows, in English (465,126 bytes in Python 3.11.7).

    The topics are sorted by name. Raises ValueError if the interpreter has none.
    """
    try:
        topics = import_module("pydoc_data.topics").topics
    except ImportError:
        raise ValueError("this Python ships no pydoc_data/topics.py; use another Python, or --data.corpus code") from None
    return "".join(topics[name] for name in sorted(topics)).encode()


CORPORA: dict[str, Callable[[], bytes]] = {"code": corpus_bytes, "prose": prose_bytes}


def clip_text(text: bytes, length: int) -> bytes:
    """Return the first `length` bytes of a UTF-8 text, or up to 3 fewer, so that no character is divided."""
    while 0 < length < len(text) and text[length] & 0b1100_0000 == 0b1000_0000:  # a continuation byte
        length -= 1
    return text[:length]


def split_text(text: bytes) -> tuple[bytes, bytes]:
    """Return (train, validation): the first 90 % and the last 10 % of a UTF-8 text, cut between characters."""
    train = clip_text(text, len(text) * TRAIN_TENTHS // 10)
    return train, text[len(train):]


# ---- Text ----------------------------------------------------------------------------------------


def read_texts(paths: Iterable[Path]) -> list[bytes]:
    """Return the bytes of every file that is not empty. Raises ValueError if one cannot be read or is not UTF-8."""
    texts = []
    for path in paths:
        try:
            texts.append(path.read_bytes())
            texts[-1].decode()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; "
                             "convert it, or leave it out of --data.train_files and --data.val_files") from None
    return [text for text in texts if text]


def split_documents(texts: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Return (train, validation) documents: the first 90 % and the last 10 % of all bytes; one document may be divided."""
    length = len(split_text(b"".join(texts))[0])
    train, validation = clip_documents(texts, length), []
    for text in texts:
        validation.append(text[max(0, length):])
        length -= len(text)
    return train, [text for text in validation if text]


def clip_documents(texts: Iterable[bytes], length: int) -> list[bytes]:
    """Return the first documents, `length` bytes in all; the last one is clipped between characters."""
    clipped = []
    for text in texts:
        if length > 0 and (part := clip_text(text, length)):
            clipped.append(part)
        length -= len(text)
    return clipped


def _open_texts(data: Data, train: list[bytes], validation: list[bytes], cache_dir: Path) -> Source:
    # Text: clipped for validation, and not empty.
    validation = clip_documents(validation, data.val_bytes)
    for purpose, texts in (("training", train), ("validation", validation)):
        if not texts:
            raise ValueError(f"no {purpose} text: --data.source {data.source} has {sum(map(len, train)):,} bytes of "
                             "training text; give it longer --data.train_files, or --data.val_files")
    # Tokenizer: trained on the training text alone.
    tokenizer = load_tokenizer(data.tokenizer, train_text=b"".join(train), vocab_tokens=data.bpe_vocab_tokens,
                               cache_dir=cache_dir)
    # Tokens: from the cache, whose file names hold the hash of text and tokenizer, so that nothing old is ever read.
    digest = _digest(tokenizer.name.encode(), *_length_prefixed(train), b"validation", *_length_prefixed(validation))
    train_tokens = _cached_tokens(cache_dir / f"tokens-{digest}-train.bin", train, tokenizer)
    val_tokens = _cached_tokens(cache_dir / f"tokens-{digest}-val.bin", validation, tokenizer)
    return Source(name=f"{data.source}, {tokenizer.name}", train=[train_tokens],
                  validation=val_tokens, validation_bytes=sum(map(len, validation)),
                  tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, document_start=tokenizer.end_of_text,
                  data_hash=digest)


def _length_prefixed(texts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield each text after its length: the hash of ["ab", "c"] must differ from that of ["a", "bc"]."""
    for text in texts:
        yield b"%d:" % len(text)
        yield text


def encode_documents(texts: Iterable[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """Return the tokens of all documents, uint16 (n,), with an end-of-text token before each document."""
    end_of_text = np.array([tokenizer.end_of_text], dtype=np.uint16)
    return np.concatenate([part for text in texts for part in (end_of_text, tokenizer.encode(text))])


def _cached_tokens(path: Path, texts: list[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """Return the tokens of the documents from the shard at `path`, which is written if it is missing or damaged."""
    if path.exists():
        try:
            return read_shard(path, vocab_size=tokenizer.vocab_size)
        except ValueError:
            path.unlink(missing_ok=True)
    write_shard(path, encode_documents(texts, tokenizer))
    return read_shard(path)


# ---- Shards ---------------------------------------------------------------------------------------------------------------


def _open_shards(data: Data, cache_dir: Path) -> Source:
    train_paths, val_paths = _find_train_and_val_files(data)
    train = [read_shard(path) for path in train_paths]
    validation, notes = _first_tokens(val_paths, data.val_tokens)
    # The run needs no tokenizer to train on shards, so a machine without network loses bits per byte and no more.
    try:
        tokenizer = load_tokenizer("gpt2", cache_dir=cache_dir)
        val_bytes = int(tokenizer.token_bytes()[validation[1:]].sum())
    except ValueError as error:
        tokenizer = val_bytes = None
        notes.append(f"no bits per byte and no samples: {error}")
    digest = _digest(*map(_fingerprint, train_paths), b"validation:%d" % len(validation), *map(_fingerprint, val_paths))
    return Source(name="shards, gpt2", train=train, validation=validation, validation_bytes=val_bytes,
                  tokenizer=tokenizer, vocab_size=GPT2_VOCAB, document_start=GPT2_END_OF_TEXT, data_hash=digest,
                  notes=tuple(notes))


def _first_tokens(paths: Sequence[Path], val_tokens: int) -> tuple[np.ndarray, list[str]]:
    """Return the first val_tokens + 1 tokens of the shards and no note, or all their tokens and a note if they have fewer.

    Raises ValueError for a token outside GPT-2's vocabulary, or fewer than 2 tokens.
    """
    parts, missing = [], val_tokens + 1
    for path in paths:
        part = read_shard(path)[:missing]
        check_vocabulary(part, GPT2_VOCAB, file_name=str(path))
        parts.append(part)
        missing -= len(part)
        if not missing:
            break
    tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)  # one part stays memory-mapped
    if len(tokens) < 2:
        raise ValueError(f"--data.val_files hold {len(tokens)} token; a prediction needs 2")
    note = f"validation has {len(tokens) - 1:,} tokens instead of {val_tokens:,}: --data.val_files hold no more"
    return tokens, [note] if missing else []


def _fingerprint(path: Path) -> bytes:
    """Return a shard's name, size, header, and HASHED_BYTES from both ends of its tokens."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES + HASHED_BYTES)
        file.seek(max(0, size - HASHED_BYTES))
        return b"\0".join((path.name.encode(), b"%d" % size, head, file.read()))


def _digest(*parts: bytes) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the parts, one after another."""
    digest = hashlib.sha256()
    for part in parts:  # one by one: a joined copy of all texts could be as large as the memory
        digest.update(part)
    return digest.hexdigest()[:16]
