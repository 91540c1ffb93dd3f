"""Every row of the ablation table is a run that differs from its base."""

import pytest

from configs.ablations import ROWS, row_named
from configs.presets import PRESETS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_change_their_base(row):
    assert row_named(row.name) != PRESETS[row.base]()


def test_names_are_unique():
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_an_unknown_row_is_named():
    with pytest.raises(ValueError, match="unknown ablation 'nothing'; rows: quintic"):
        row_named("nothing")
