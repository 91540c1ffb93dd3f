"""The ablation table: one row, one experiment. Rows go through the same parser as the command line."""

from typing import NamedTuple

from configs.cli import parse_row
from configs.schema import Run


class Row(NamedTuple):
    """An experiment: its name, the preset it starts from, and what it changes there."""

    name: str
    base: str
    flags: str


ROWS = (
    Row("quintic", "bytes", "--optim.matrix.ns quintic"),
    Row("svd", "bytes", "--optim.matrix.ns svd"),
    Row("no_nesterov", "bytes", "--optim.matrix.no_nesterov"),
    Row("no_momentum", "bytes", "--optim.matrix.averaging none"),
    Row("signum", "bytes", "--optim.matrix.norm sign --optim.matrix.lr 0.001"),
    Row("normalised_sgd", "bytes", "--optim.matrix.norm frobenius --optim.matrix.lr 0.1"),
    Row("spectral_unit", "bytes", "--optim.matrix.norm spectral"),
    Row("row_embedding", "bytes", "--optim.embed.rule steepest --optim.embed.norm row --optim.embed.lr 0.1"),
    Row("no_qk_norm", "tiny", "--model.no_qk_norm"),
    Row("softcap", "tiny", "--model.softcap tanh"),
    Row("no_x0_skip", "bytes", "--model.no_x0_skip"),
    Row("no_smear", "tiny", "--model.no_smear"),
    Row("no_value_embeds", "tiny", "--model.value_embeds 0"),
    Row("no_bigram", "tiny", "--model.bigram_buckets 0"),
    Row("gelu", "tiny", "--model.activation gelu"),
    Row("random_init_projections", "tiny", "--model.no_zero_init_projections"),
)


def row_named(name: str) -> Run:
    """The complete run of a row. Raises ValueError for an unknown name or a row that does not parse."""
    rows = {row.name: row for row in ROWS}
    if name not in rows:
        raise ValueError(f"unknown ablation {name!r}; rows: {', '.join(rows)}")
    return parse_row(rows[name].base, rows[name].flags.split())
