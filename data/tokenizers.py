"""Tokenizers: a small BPE trained on the training text, raw bytes, or GPT-2's. The last token is always end-of-text."""

import base64
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data.files import atomic_write
from data.shards import TOKEN_LIMIT

BYTE_VALUES = 256
# Text is cut by this pattern before pairs are merged, so no token crosses a cut: OpenAI's cl100k_base (tiktoken, 2022).
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
           r"|\s+(?!\S)|\s+")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Vocabulary with end-of-text as its last token, and the encoding of text into its tokens."""

    name: str
    """Name with all that changes the tokens: of a BPE its size, and the hash of its training text."""
    pieces: tuple[bytes, ...]
    """Bytes of every token; empty for end-of-text."""
    encode_text: Callable[[str], np.ndarray]
    """Function from text to its tokens (n,), of any integer type."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, end-of-text included."""
        return len(self.pieces)

    @property
    def end_of_text(self) -> int:
        """Token that stands before each document."""
        return len(self.pieces) - 1

    def encode(self, text: bytes | str) -> np.ndarray:
        """Return the tokens of a UTF-8 text, uint16 (n,), without end-of-text."""
        return self.encode_text(text.decode() if isinstance(text, bytes) else text).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the tokens; end-of-text has none. Raises ValueError for a token outside the vocabulary."""
        ids = [int(i) for i in ids]
        if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token {unknown[0]} is outside the vocabulary of {self.vocab_size}")
        return b"".join(self.pieces[i] for i in ids)

    def token_bytes(self) -> np.ndarray:
        """Return the length in bytes of every token, int64 (vocab_size,)."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)


def prefix_tokens(vocabulary: Sequence[bytes]) -> list[int]:
    """Return for each token the number of the longest other token that its bytes begin with, or -1.

    In sorted order every prefix stands before its extensions, so one pass with a stack of open prefixes is enough.
    """
    prefix_of, open_prefixes = [-1] * len(vocabulary), []
    for text, token in sorted((text, token) for token, text in enumerate(vocabulary)):
        # Close the prefixes that this text does not extend; an equal text is no proper prefix.
        while open_prefixes and not (text.startswith(open_prefixes[-1][0]) and text != open_prefixes[-1][0]):
            open_prefixes.pop()
        prefix_of[token] = open_prefixes[-1][1] if open_prefixes else -1
        if text:
            open_prefixes.append((text, token))
    return prefix_of


def load_tokenizer(kind: Literal["bpe", "bytes", "gpt2"], *, train_text: bytes = b"", vocab_tokens: int = 1024,
                   cache_dir: Path) -> Tokenizer:
    """Return the tokenizer of a kind.

    A bpe is trained on `train_text` (UTF-8) until it has `vocab_tokens` tokens, end-of-text not counted; `cache_dir` keeps
    it. The other kinds ignore these arguments. Raises ValueError if a BPE cannot have so many tokens, or if gpt2 is not in
    tiktoken's cache and cannot be downloaded.
    """
    if kind == "bytes":
        pieces = tuple(bytes([value]) for value in range(BYTE_VALUES))
        return Tokenizer("bytes", (*pieces, b""), lambda text: np.frombuffer(text.encode(), dtype=np.uint8))
    return _load_gpt2() if kind == "gpt2" else _load_bpe(train_text, vocab_tokens, cache_dir)


def _load_gpt2() -> Tokenizer:
    import requests
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (requests.RequestException, OSError) as error:
        raise ValueError(f"the GPT-2 vocabulary cannot be downloaded ({type(error).__name__}): run once online, or set "
                         "TIKTOKEN_CACHE_DIR to a folder that holds it") from None
    pieces = (encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token))
    return Tokenizer("gpt2", (*pieces, b""), _encoder(encoding))


def _load_bpe(text: bytes, vocab_tokens: int, cache_dir: Path) -> Tokenizer:
    """Return the BPE trained on `text`, from the cache if it is there; a short text has fewer pairs to merge than asked."""
    import tiktoken

    if not BYTE_VALUES <= vocab_tokens < TOKEN_LIMIT:
        raise ValueError(f"a BPE has {BYTE_VALUES} tokens (the bytes) to {TOKEN_LIMIT - 1}, got {vocab_tokens}")
    # The cache's file is named after all that decides the merges.
    key = hashlib.sha256(b"\0".join((PATTERN.encode(), str(vocab_tokens).encode(), text))).hexdigest()[:16]
    path = cache_dir / f"bpe-{key}.txt"
    pieces = _read_pieces(path)
    if pieces is None:
        pieces = _train_pieces(text.decode(), vocab_tokens)
        _write_pieces(path, pieces)
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    encoding = tiktoken.Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(f"bpe-{len(pieces)}-{key}", (*pieces, b""), _encoder(encoding))


def _train_pieces(text: str, vocab_tokens: int) -> list[bytes]:
    """Train a byte-pair encoding (Gage 1994; Sennrich et al. 2016, arXiv 1508.07909); return its pieces in merge order."""
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator([text], vocab_size=vocab_tokens, pattern=PATTERN)
    ranks = trainer.get_mergeable_ranks()
    return [bytes(piece) for piece, _ in sorted(ranks, key=lambda item: item[1])]


def _encoder(encoding: object) -> Callable[[str], np.ndarray]:
    """Return the encoding function; text that looks like a special token, as <|endoftext|>, is encoded as plain text."""
    return lambda text: encoding.encode_to_numpy(text, disallowed_special=())


def _write_pieces(path: Path, pieces: Sequence[bytes]) -> None:
    """Write one base64 line per piece, after a line with the SHA-256 of all that follows."""
    body = b"\n".join(base64.b64encode(piece) for piece in pieces)
    with atomic_write(path, shared=True) as temporary_path:
        temporary_path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _read_pieces(path: Path) -> list[bytes] | None:
    """Return the pieces that `_write_pieces` wrote; None if the file is missing or damaged."""
    if not path.exists():
        return None
    digest, _, body = path.read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    return [base64.b64decode(line) for line in body.split(b"\n")]
