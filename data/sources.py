"""Where tokens come from: the embedded corpus, your own text, the speedrun's shards, or chance; one shape for all."""

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from configs.schema import Data
from data.shards import HEADER_BYTES, check_vocabulary, find_files, read_shard, write_shard
from data.tokenizers import Tokenizer, load_tokenizer

GPT2_VOCAB = 50_257
GPT2_END_OF_TEXT = 50_256
HASHED_BYTES = 2**20
RANDOM_TRAIN_TOKENS = 2**22
RANDOM_VAL_TOKENS = 2**20
LEFT_OUT = frozenset({"test", "idlelib", "lib2to3", "site-packages", "dist-packages"})
TRAIN_TENTHS = 9


@dataclass(frozen=True, slots=True)
class Source:
    """Tokens to train on, and the fixed tokens of the referee."""

    name: str
    train: list[np.ndarray]
    """Token arrays, flat, memory-mapped where they come from files."""
    validation: np.ndarray
    """N + 1 tokens: inputs are [:-1], targets [1:]."""
    validation_bytes: int | None
    """Bytes of text in the N targets; None where there is no text, or no tokenizer to tell."""
    tokenizer: Tokenizer | None
    vocab_size: int
    document_start: int | None
    """The token that opens each document."""
    data_hash: str
    """Equal where training tokens, validation tokens and vocabulary are: then losses are comparable."""
    notes: tuple[str, ...] = ()
    """Lines that the user should read."""


def open_source(data: Data, *, cache_dir: Path, seed: int) -> Source:
    """The source that a config describes; `cache_dir` keeps tokenizers and encoded text, `seed` acts on random alone.

    Raises ValueError for missing, damaged or ill-encoded files, and a tokenizer that cannot be had.
    """
    if data.source == "random":
        return _open_random(data, seed)
    if data.source == "shards":
        return _open_shards(data, cache_dir)
    if data.source == "corpus":
        train, validation = split_text(CORPORA[data.corpus]())
        return _open_texts(data, [train], [validation], cache_dir)
    train_texts, val_texts = (read_texts(paths) for paths in _find_both(data))
    return _open_texts(data, *((train_texts, val_texts) if data.val_files else split_documents(train_texts)), cache_dir)


def _find_both(data: Data) -> tuple[list[Path], list[Path]]:
    """The files to train on and those to validate on. Raises ValueError where one is among both."""
    train_paths = find_files(data.train_files, what="--data.train_files")
    val_paths = find_files(data.val_files, what="--data.val_files")
    if both := set(train_paths) & set(val_paths):
        raise ValueError(f"{min(both)} is in both --data.train_files and --data.val_files")
    return train_paths, val_paths


# ---- The corpora that every machine has: the source of Python's standard library, and its language reference --------------
# Losses are comparable only between machines with the same Python: `Source.data_hash` tells them apart.


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


# ---- Text ----------------------------------------------------------------------------------------


def read_texts(paths: Iterable[Path]) -> list[bytes]:
    """The files' bytes, empty files left out. Raises ValueError where one cannot be read or is not UTF-8."""
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
    """(train, validation) documents: the first 90 % and the last 10 % of all bytes; the cut may divide a document."""
    length = len(split_text(b"".join(texts))[0])
    train, validation = clip_documents(texts, length), []
    for text in texts:
        validation.append(text[max(0, length):])
        length -= len(text)
    return train, [text for text in validation if text]


def clip_documents(texts: Iterable[bytes], length: int) -> list[bytes]:
    """Documents from the first on, `length` bytes in all, or less by a divided character."""
    clipped = []
    for text in texts:
        if length > 0 and (part := clip_text(text, length)):
            clipped.append(part)
        length -= len(text)
    return clipped


def _open_texts(data: Data, train: list[bytes], validation: list[bytes], cache_dir: Path) -> Source:
    validation = clip_documents(validation, data.val_bytes)
    for what, texts in (("training", train), ("validation", validation)):
        if not texts:
            raise ValueError(f"no {what} text: --data.source {data.source} found {sum(map(len, train))} training "
                             "bytes; give it longer --data.train_files, or --data.val_files")
    tokenizer = load_tokenizer(data.tokenizer, train_text=b"".join(train), vocab_tokens=data.bpe_vocab_tokens,
                               cache_dir=cache_dir)
    digest = _digest(tokenizer.name.encode(), *_framed(train), b"validation", *_framed(validation))
    train_tokens = _cached_tokens(cache_dir / f"tokens-{digest}-train.bin", train, tokenizer)
    val_tokens = _cached_tokens(cache_dir / f"tokens-{digest}-val.bin", validation, tokenizer)
    return Source(name=f"{data.source}, {tokenizer.name}", train=[train_tokens],
                  validation=val_tokens, validation_bytes=sum(map(len, validation)),
                  tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, document_start=tokenizer.end_of_text,
                  data_hash=digest)


def _framed(texts: Iterable[bytes]) -> Iterator[bytes]:
    """The texts, each after its length, so that no two lists of texts are the same bytes."""
    for text in texts:
        yield b"%d:" % len(text)
        yield text


def encode_documents(texts: Iterable[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """All documents' tokens, uint16 (n,), each document opened by end-of-text."""
    opening = np.array([tokenizer.end_of_text], dtype=np.uint16)
    return np.concatenate([part for text in texts for part in (opening, tokenizer.encode(text))])


def _cached_tokens(path: Path, texts: list[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """The documents' tokens, from the shard at `path`, which is written where it is missing or damaged."""
    if path.exists():
        try:
            return read_shard(path, vocab_size=tokenizer.vocab_size)
        except ValueError:
            path.unlink(missing_ok=True)
    write_shard(path, encode_documents(texts, tokenizer))
    return read_shard(path)


# ---- Shards and chance ---------------------------------------------------------------------------


def _open_shards(data: Data, cache_dir: Path) -> Source:
    train_paths, val_paths = _find_both(data)
    train = [read_shard(path) for path in train_paths]
    validation, notes = _first_tokens(val_paths, data.val_tokens)
    try:
        tokenizer = load_tokenizer("gpt2", cache_dir=cache_dir)
        val_bytes = int(tokenizer.token_bytes()[validation[1:]].sum())
    except ValueError as error:
        tokenizer = val_bytes = None
        notes.append(f"no bits per byte and no samples: {error}")
    digest = _digest(*map(_fingerprint, train_paths), b"validation:%d" % len(validation), *map(_fingerprint, val_paths))
    return Source(name=f"{len(train)} shards", train=train, validation=validation, validation_bytes=val_bytes,
                  tokenizer=tokenizer, vocab_size=GPT2_VOCAB, document_start=GPT2_END_OF_TEXT, data_hash=digest,
                  notes=tuple(notes))


def _first_tokens(paths: Sequence[Path], val_tokens: int) -> tuple[np.ndarray, list[str]]:
    """The shards' first val_tokens + 1 tokens; fewer, and a note, where there are no more."""
    parts, missing = [], val_tokens + 1
    for path in paths:
        part = read_shard(path)[:missing]
        check_vocabulary(part, GPT2_VOCAB, what=str(path))
        parts.append(part)
        missing -= len(part)
        if not missing:
            break
    tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if len(tokens) < 2:
        raise ValueError(f"--data.val_files hold {len(tokens)} token; a prediction needs 2")
    note = f"validation has {len(tokens) - 1:,} tokens, all that --data.val_files hold, not {val_tokens:,}"
    return tokens, [note] if missing else []


def _fingerprint(path: Path) -> bytes:
    """A shard's name, size, header and ends: what tells it from others without reading it all."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES + HASHED_BYTES)
        file.seek(max(0, size - HASHED_BYTES))
        return b"\0".join((path.name.encode(), b"%d" % size, head, file.read()))


def _open_random(data: Data, seed: int) -> Source:
    """Uniform tokens of GPT-2's vocabulary: nothing to learn, the right shapes for timing."""
    generator = np.random.default_rng(seed)
    val_tokens = min(data.val_tokens, RANDOM_VAL_TOKENS)
    train, validation = (generator.integers(GPT2_VOCAB, size=size, dtype=np.uint16)
                         for size in (RANDOM_TRAIN_TOKENS, val_tokens + 1))
    note = f"validation has {val_tokens:,} random tokens, not {data.val_tokens:,}"
    return Source(name="random tokens", train=[train], validation=validation, validation_bytes=None, tokenizer=None,
                  vocab_size=GPT2_VOCAB, document_start=None, data_hash=_digest(train.tobytes(), validation.tobytes()),
                  notes=(note,) if val_tokens < data.val_tokens else ())


def _digest(*parts: bytes) -> str:
    """16 hexadecimal digits of the sha256 of the parts, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
