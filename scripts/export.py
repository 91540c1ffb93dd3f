"""Export a trained model's weights to one file: `python -m scripts.export runs/tiny tiny.safetensors`.

The file holds the weights alone, without optimizer state. Its metadata hold the configuration as JSON, the vocabulary size
and the token that begins a document, so scripts.lab.models.load_exported can build the model again from this file.
scripts.sample accepts such a file in place of a run folder.
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
    """The run to export and the file to write."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder."""
    target: Annotated[Path, tyro.conf.Positional]
    """The file to write; its name ends in .safetensors."""


def export(folder: Path, target: Path) -> int:
    """Write a run's weights to `target` and return the number of parameters.

    The weights are those of the run's last validation, in the dtype in which the model stores them. Raises ValueError if
    `load_trained` does, if `target` does not end in .safetensors, and if it cannot be written.
    """
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors, as in {target.with_suffix('.safetensors')}")
    run, source, model = load_trained(folder)
    # safetensors metadata are strings only: numbers, and None where a source has no document start, go in as JSON.
    metadata = {"format": "pt", "config": json.dumps(config_to_dict(run)), "vocab_size": str(source.vocab_size),
                "document_start": json.dumps(source.document_start)}
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    with atomic_write(target) as partial_path:
        save_file(weights, partial_path, metadata=metadata)
    return sum(tensor.numel() for tensor in weights.values())


def main(args: Arguments) -> None:
    """Export the weights and print the number of parameters."""
    print(f"{args.target}: {export(args.folder, args.target):,} parameters")


if __name__ == "__main__":
    command(main, Arguments, __doc__)
