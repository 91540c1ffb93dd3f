"""A trained model's weights alone, as one file: `python -m scripts.export runs/tiny tiny.safetensors`.

The file's metadata hold the configuration as JSON, the vocabulary's size and the token that opens documents, so that the
model can be built again: scripts.lab.models.load_exported does, and scripts.sample takes such a file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from safetensors.torch import save_file

from configs.serialize import config_to_dict
from data.files import atomic_write
from scripts import command
from scripts.lab.models import load_trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What to export, and where to."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run's folder."""
    target: Annotated[Path, tyro.conf.Positional]
    """The file to write, .safetensors."""


def export(folder: Path, target: Path) -> int:
    """Write the weights that a run's last validation judged, in their own types; their number.

    Raises ValueError as `load_trained`, and for a target of another kind or that cannot be written.
    """
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors")
    run, source, model = load_trained(folder)
    metadata = {"format": "pt", "config": json.dumps(config_to_dict(run)), "vocab_size": str(source.vocab_size),
                "document_start": json.dumps(source.document_start)}
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    with atomic_write(target) as aside:
        save_file(weights, aside, metadata=metadata)
    return sum(tensor.numel() for tensor in weights.values())


def main(args: Arguments) -> None:
    """Export and say how much."""
    print(f"{args.target}: {export(args.folder, args.target):,} parameters")


if __name__ == "__main__":
    command(main, Arguments, __doc__)
