"""Curves: positions, approaches, values at and between the knots, and errors that quote the offending word."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.notation import evaluate_curve, parse_curve

quick = settings(max_examples=100, deadline=None, derandomize=True)


def at(text: str, step: float, total: int = 100) -> float:
    return evaluate_curve(parse_curve(text), step, total)


# ---- Closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0.3", "0=0.3", "50%=0.3", "-1=0.3", " 7=0.3 "])
def test_one_knot_is_a_constant(text):
    assert {at(text, step) for step in (0, 1, 50, 99, 100, 1000)} == {0.3}


@pytest.mark.parametrize(("text", "knots"), [
    ("250=1e-2", [(250, 0.01, "line")]), ("40%=2", [(80, 2, "line")]),
    ("0=0 cos -50=1 hold 100%=3", [(0, 0, "line"), (150, 1, "cos"), (200, 3, "hold")]),
])
def test_notation(text, knots):
    assert [(knot.step(200), knot.value, knot.approach) for knot in parse_curve(text)] == knots


def test_lines_between_knots():
    text = "10=1 20=3 60%=3 100%=1"
    assert [at(text, step) for step in (0, 10, 15, 20, 40, 60, 80, 100)] == pytest.approx([1, 1, 2, 3, 3, 3, 2, 1])


def test_positions_from_the_end():
    assert [at("0=1 -50=1 100%=0", step) for step in (0, 49, 50, 75, 100)] == pytest.approx([1, 1, 1, 0.5, 0])
    assert at("0=1 -50=1 100%=0", 150, 200) == 1 and at("0=1 -50=1 100%=0", 175, 200) == pytest.approx(0.5)


def test_hold_jumps_at_the_knot():
    assert [at("0=1 hold 10=5 hold 20=2", step) for step in (0, 9, 9.99, 10, 19, 20, 99)] == [1, 1, 1, 5, 5, 2, 2]


@pytest.mark.parametrize("total", [100, 200, 300, 1000, 3250])
def test_hold_jumps_at_a_whole_share(total):
    """If p % of the run is a whole step, the value changes at that step and not one later."""
    whole = [percent for percent in range(1, 101) if percent * total % 100 == 0]
    late = [percent for percent in whole if at(f"0=1 hold {percent}%=2", percent * total // 100, total) != 2]
    early = [percent for percent in whole if at(f"0=1 hold {percent}%=2", percent * total // 100 - 1, total) != 1]
    assert (late, early) == ([], [])


def test_cosine_is_half_a_cosine():
    for step in (0, 1, 25, 50, 75, 99, 100):
        assert at("0=3 cos 100=1", step) == pytest.approx(2 + math.cos(math.pi * step / 100), abs=1e-12)


def test_an_approach_belongs_to_one_knot():
    assert at("0=0 cos 50=1 100=0", 75) == pytest.approx(0.5)
    assert at("0=0 cos 50=1 100=0", 10) == pytest.approx((1 - math.cos(math.pi / 5)) / 2)


def test_nanogpts_warmup_and_cosine():
    """nanoGPT's get_lr with lr 1, minimum 0.1, 250 warm-up steps counted from 0, decay over 1000 steps."""

    def get_lr(step: int) -> float:
        if step < 250:
            return step / 250
        share = (step - 250) / (1000 - 250)
        return 0.1 + 0.5 * (1 + math.cos(math.pi * share)) * 0.9

    for step in range(0, 1001, 10):
        assert at("0=0 250=1 cos 100%=0.1", step, 1000) == pytest.approx(get_lr(step), abs=1e-12)


def test_track3s_constant_and_linear_decay():
    for step in (0, 974, 975, 976, 2000, 3249):
        share = step / 3250
        expected = 1 if share < 0.3 else (1 - share) / 0.7
        assert at("0=1 30%=1 100%=0", step, 3250) == pytest.approx(expected, abs=1e-12)


def test_of_knots_out_of_order_the_first_segment_decides():
    """A warm-up of 250 steps in a run of 100 steps lasts to the end."""
    assert [at("0=0 250=1 30%=1 100%=0", step) for step in (0, 50, 100)] == [0, 0.2, 0.4]
    assert at("0=0 250=1 30%=1 100%=0", 260, 300) == pytest.approx(1 - 170 / 210)


# ---- Properties ----------------------------------------------------------------------------------

values = st.floats(-10, 10).map(lambda x: round(x, 4))
ascending = st.lists(st.tuples(st.integers(0, 300), values, st.sampled_from(["", "cos ", "hold "])), min_size=1,
                     max_size=6, unique_by=lambda knot: knot[0]).map(sorted)


def notation(knots: list[tuple[int, float, str]]) -> str:
    return " ".join(f"{approach}{step}={value}" for step, value, approach in knots)


@quick
@given(ascending)
def test_the_curve_has_the_exact_value_at_a_knot(knots):
    for step, value, _ in knots:
        assert at(notation(knots), step, 300) == value


@quick
@given(st.lists(st.tuples(st.integers(0, 100), values, st.sampled_from(["", "cos ", "hold "])), min_size=1, max_size=6,
                unique_by=lambda knot: knot[0]).map(sorted), st.integers(1, 50))
def test_the_curve_has_the_value_at_a_knot_in_percent(knots, hundreds):
    """At whole shares of the run, within rounding; at a `hold` knot the jump has happened."""
    text = " ".join(f"{approach}{share}%={value}" for share, value, approach in knots)
    for share, value, _ in knots:
        assert at(text, share * hundreds, 100 * hundreds) == pytest.approx(value, abs=1e-9)


positions = st.one_of(st.integers(0, 400).map(str), st.integers(1, 400).map(lambda n: f"-{n}"),
                      st.floats(0, 100).map(lambda share: f"{share:.3f}%"))
in_any_order = st.lists(st.tuples(st.sampled_from(["", "cos ", "hold "]), positions, values), min_size=1, max_size=6)


@quick
@given(in_any_order, st.floats(0, 300), st.integers(1, 300))
def test_values_stay_between_the_knots(knots, step, total):
    """Knots in any order cause neither a division by zero nor an overshoot."""
    text = " ".join(f"{approach}{position}={value}" for approach, position, value in knots)
    heights = [value for _, _, value in knots]
    assert min(heights) - 1e-9 <= at(text, step, total) <= max(heights) + 1e-9


@quick
@given(ascending, st.integers(0, 299))
def test_lines_and_cosines_do_not_jump(knots, step):
    """Without `hold`, the slope is at most pi / 2 times the steepest mean slope between neighbouring knots."""
    smooth = [(at_step, value, approach.replace("hold", "cos")) for at_step, value, approach in knots]
    slopes = [abs(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(smooth, smooth[1:], strict=False)]
    change = abs(at(notation(smooth), step + 0.01, 300) - at(notation(smooth), step, 300))
    assert change <= 0.01 * math.pi / 2 * max(slopes, default=0) + 1e-9


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "word"), [
    ("0=1 40=", "40="), ("0=1 =3", "=3"), ("0=1 fast 3=2", "fast"), ("0=1 30%", "30%"), ("0=1 1=2=3", "1=2=3"),
    ("0=1,5=2", "0=1,5=2"), ("0=1 120%=2", "120%=2"), ("0=1 -5%=2", "-5%=2"), ("0=nan", "0=nan"), ("0=inf", "0=inf"),
    ("0=1 nan%=2", "nan%=2"), ("quick", "quick"), ("0=1 nan=2", "nan=2"), ("0=1 inf=2", "inf=2"),
    ("0=1 -inf=2", "-inf=2"),
])
def test_errors_quote_the_offending_word(text, word):
    with pytest.raises(ValueError) as caught:
        parse_curve(text)
    assert word in str(caught.value) and repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["", "  ", "0=1 cos", "hold", "0=1 5=2 hold"])
def test_a_curve_ends_with_a_knot(text):
    with pytest.raises(ValueError, match="must end with a knot|cannot read"):
        parse_curve(text)
