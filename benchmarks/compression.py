"""General-purpose compressors on the text of the preset `tiny`: bits per byte to compare its validation loss with.

    python -m benchmarks.compression [--repeats 3]

C(x) is the compressed size of a text x in bytes, t the training text, v the validation text and |v| its size in bytes:

    alone                     8 C(v) / |v|
    after the training text   8 (C(t + v) - C(t)) / |v|

The second is the fair comparison with a trained model, because the compressor has read t before v. Writes compression.json
and compression.md. Needs `pip install pyppmd zstandard`, which the project itself does not.
"""

import json
import lzma
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import tyro

from benchmarks import HERE, write_result
from configs.cli import fail
from configs.presets import tiny
from data.run.folder import write_text
from data.sources import Source, open_source
from scripts.lab.records import markdown

Compress = Callable[[bytes], bytes]
PACKAGES = ("pyppmd", "zstandard")


def compressors() -> dict[str, Compress]:
    """Return the compressors by name, each on one thread. Exit with status 2 if a package is missing."""
    try:
        import pyppmd
        import zstandard
    except ImportError as error:
        fail(f"the package {error.name} is not installed: pip install {' '.join(PACKAGES)}")
    # A match can only be found within the dictionary (xz: 64 MiB) or the window (zstd: 2**27 bytes); both hold t + v, 11 MB.
    zstd = zstandard.ZstdCompressionParameters.from_level(22, window_log=27, enable_ldm=True)

    def ppmd(order: int, variant: str) -> Compress:
        # PPMd drops its model when its memory is full. 1 GiB is enough: 768 MiB gives the same sizes, 512 MiB larger ones.
        return lambda text: pyppmd.compress(text, max_order=order, mem_size=2**30, variant=variant)

    return {"xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
            "zstd level 22, long window": lambda text: zstandard.ZstdCompressor(compression_params=zstd).compress(text),
            "PPMd H, order 16": ppmd(16, "H"), "PPMd I, order 16": ppmd(16, "I"), "PPMd H, order 64": ppmd(64, "H")}


def decode_texts(source: Source) -> tuple[bytes, bytes]:
    """Return the training and the validation text. Decoding the model's own tokens ensures that the bytes are the same."""
    return source.tokenizer.decode(source.train[0]), source.tokenizer.decode(source.validation)


def measure(compress: Compress, train: bytes, validation: bytes, *, repeats: int) -> dict[str, object]:
    """Return the compressed sizes in bytes, both figures in bits per byte, and the seconds of each C(t + v)."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        both_bytes = len(compress(train + validation))
        seconds.append(time.perf_counter() - began)
    train_bytes, alone_bytes = len(compress(train)), len(compress(validation))
    return {"train_and_validation_bytes": both_bytes, "train_bytes": train_bytes, "validation_bytes": alone_bytes,
            "bits_per_byte_alone": 8 * alone_bytes / len(validation),
            "bits_per_byte_after_train": 8 * (both_bytes - train_bytes) / len(validation), "seconds": seconds}


def page(result: dict) -> str:
    """Return the text of compression.md."""
    rows = [(name, f"{row['bits_per_byte_alone']:.4f}", f"{row['bits_per_byte_after_train']:.4f}",
             f"{statistics.mean(row['seconds']):.1f} ± {statistics.stdev(row['seconds']):.1f}")
            for name, row in result["compressors"].items()]
    head = ("compressor", "alone", "after the training text", "seconds of C(t + v)")
    return PREFACE.format(**result, **result["environment"]) + "\n".join(markdown(head, rows)) + "\n"


PREFACE = """# Compressors on the text of `tiny`

Bits per byte of the validation text v, where C(x) is the compressed size of x in bytes and t the training text:

- **alone**: 8 C(v) / |v|
- **after the training text**: 8 (C(t + v) - C(t)) / |v|. This is the figure to compare with a model's `val/bits_per_byte`.
  A model is fixed when it is validated; a compressor goes on learning within v.

`python -m benchmarks.compression` makes this page. The texts are those of the preset `tiny`: t has {train_bytes:,} bytes and
v {validation_bytes:,} bytes of the standard library of Python {python} (data hash {data_hash}). Sizes do not vary between
runs. Seconds are mean ± standard deviation of n = {repeats}, on one thread of a machine with {cores} cores ({cpu}). Its load
average before was {load_average:.1f}: beside other work (more than about 0.5) the seconds are approximate.

PPMd H is the variant of 7z archives. PPMd I, the variant of zip archives, has at most order 16.

"""


def main(repeats: int = 3) -> None:
    """Measure all compressors and write both files. `repeats` is the number of timings of each, at least 2."""
    source = open_source(tiny().data, cache_dir=HERE.parent / ".cache")
    train, validation = decode_texts(source)
    rows, load_average = {}, os.getloadavg()[0]
    for name, compress in compressors().items():
        rows[name] = measure(compress, train, validation, repeats=repeats)
        print(f"{name:>26}: {rows[name]['bits_per_byte_after_train']:.4f} bits per byte after the training text", flush=True)
    write_result("compression", "compression", data_hash=source.data_hash, train_bytes=len(train),
                 validation_bytes=len(validation), repeats=repeats, load_average=load_average,
                 versions={name: version(name) for name in PACKAGES}, compressors=rows)
    write_text(HERE / "compression.md", page(json.loads((HERE / "compression.json").read_text())))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
