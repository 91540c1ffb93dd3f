"""Schedules: pure functions of the step whose portions are whole sequences."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.presets import PRESETS
from configs.schema import Data, Model, Run, Schedule, Train
from optim.schedule import (
    MAX_SHAPES,
    Values,
    graph_key,
    is_due,
    is_validation_step,
    loss_weights,
    training_shapes,
    validation_shapes,
)
from optim.schedule import Schedule as Planned


def planned(*, steps=100, batch=4096, sequence=128, window=None, **curves) -> Planned:
    return Planned(Run(data=Data(sequence_tokens=sequence), model=Model(window_tokens=window),
                       schedule=Schedule(**curves), train=Train(steps=steps, batch_tokens=batch)))


def test_without_curves_all_is_as_configured():
    schedule = planned(lr="1", window=64)
    assert {schedule.values(step) for step in range(100)} == {Values(1.0, 1.0, None, 4096, 128, 64)}


def test_default_lr_holds_and_falls():
    schedule = planned(steps=280)
    assert [schedule.values(step).lr for step in (0, 111, 112)] == [1, 1, 1]
    assert schedule.values(196).lr == pytest.approx(0.55)
    assert schedule.values(279).lr == pytest.approx(0.1 + 0.9 / 168)


def test_no_window_stays_no_window():
    assert planned().values(50).window_tokens is None


def test_every_curve_acts_on_its_own_value():
    """Six curves have six different values, so that none is mistaken for another."""
    curves = {"lr": "0.5", "weight_decay": "0.25", "momentum": "0.9", "batch_tokens": "2", "sequence_tokens": "0.75",
              "window_tokens": "0.375"}
    assert planned(window=64, **curves).values(7) == Values(0.5, 0.25, 0.9, 8160, 96, 24)


def test_momentum_is_a_value_and_not_a_factor():
    schedule = planned(momentum="0=0.85 20%=0.95")
    assert schedule.values(0).momentum == 0.85
    assert schedule.values(10).momentum == pytest.approx(0.9)
    assert schedule.values(99).momentum == pytest.approx(0.95)


def test_batches_grow_by_whole_sequences():
    """The batch grows from 4 sequences to 8 at 40 % of 10 steps, rounded to whole sequences."""
    schedule = planned(steps=10, batch=8 * 16, sequence=16, batch_tokens="0=0.5 40%=1")
    assert [schedule.values(step).batch_tokens // 16 for step in range(6)] == [4, 5, 6, 7, 8, 8]
    assert [schedule.values(step).batch_tokens % 16 for step in range(6)] == [0] * 6


@pytest.mark.parametrize(("reach", "weights"), [(0.0, ()), (-1.0, ()), (0.5, (0.25,)), (1.0, (0.5,)), (1.5, (0.5, 0.1)),
                                                (2.0, (0.5, 0.2)), (99.0, (0.5, 0.2))])
def test_further_tokens_act_as_far_as_the_reach_goes(reach, weights):
    values = planned().values(0)._replace(mtp=reach, prefix_loss=0.5)
    assert loss_weights(values, Model(mtp_weights=(0.5, 0.2), prefix_loss=0.25)) == (pytest.approx(weights), 0.125)
    assert loss_weights(values, Model()) == ((), 0.0)


def test_the_speedrun_has_four_graphs():
    """Two further tokens in stage 1, one in stage 2; the prefix loss in both."""
    run = PRESETS["speedrun"]()
    keys = list(dict.fromkeys(graph_key(Planned(run).values(step), run.model) for step in range(run.train.steps)))
    assert [(key.batch_tokens // 131_072, key.mtp_terms, key.prefix_loss) for key in keys] == [
        (1, 2, True), (2, 1, True), (3, 0, False), (3, 0, False)]


curves = st.lists(st.tuples(st.integers(0, 60), st.floats(0, 3)), min_size=1, max_size=4).map(
    lambda knots: " ".join(f"{at}={value!r}" for at, value in sorted(knots)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(curves, curves, st.integers(1, 40), st.integers(1, 30))
def test_portions_are_whole_sequences_near_what_was_asked(batch_curve, sequence_curve, sequence, rows):
    schedule = planned(steps=60, batch=rows * sequence, sequence=sequence, batch_tokens=batch_curve,
                       sequence_tokens=sequence_curve)
    expected = planned(steps=60, lr=batch_curve)
    for step in range(0, 60, 7):
        batch, length, _ = schedule.portions(step)
        assert length >= 1 and batch >= length and batch % length == 0
        assert batch == length or abs(batch - rows * sequence * expected.values(step).lr) <= length / 2 + 1e-6
        assert schedule.values(step)[3:5] == (batch, length)


def test_tokens_before_counts_every_step():
    schedule = planned(steps=10, batch=8 * 16, sequence=16, batch_tokens="0=0.5 40%=1")
    assert [schedule.tokens_before(step) for step in (0, 1, 2, 4, 6, 10)] == [0, 64, 144, 352, 608, 1120]


def test_values_do_not_depend_on_what_was_asked_before():
    """A resumed run gets the values of an uninterrupted one."""
    text = "0=0 hold 13%=1 cos -5=0.1"
    forward = [planned(lr=text, batch_tokens=text).values(step) for step in range(100)]
    schedule = planned(lr=text, batch_tokens=text)
    assert [schedule.values(step) for step in reversed(range(100))] == forward[::-1]
    assert len(set(forward)) > 50


def test_values_are_plain_numbers():
    values = planned(window=64, momentum="0.9").values(3)
    assert json.loads(json.dumps(values)) == list(values)
    assert [type(x) for x in values] == [float, float, float, int, int, int, type(None), float, float, type(None)]


def test_curves_that_no_step_reaches_are_left_out():
    """A curve longer than the run keeps its slope: 250 steps of warm-up in a run of 100 end at 0.396."""
    run = dataclasses.replace(Run(), schedule=Schedule(lr="0=0 250=1"), train=Train(steps=100))
    assert Planned(run).values(99).lr == pytest.approx(0.396)


# ---- Events -------------------------------------------------------------------------------------


def test_events_are_due_at_every_multiple_of_their_period_and_never_without_one():
    assert [step for step in range(1, 10) if is_due(step, 3)] == [3, 6, 9]
    assert not any(is_due(step, 0) for step in range(1, 10))


@pytest.mark.parametrize(("settings", "steps"), [
    (dict(steps=20, val_every_steps=6), [6, 12, 18, 20]), (dict(steps=20, val_every_steps=0), [20]),
    (dict(steps=20, val_every_steps=8, final_val_every_steps=1), [8, 16, 18, 19, 20]),
    (dict(steps=20, val_every_steps=0, final_val_every_steps=2), [18, 20])])
def test_validations_are_more_frequent_in_the_last_tenth_and_include_the_last_step(settings, steps):
    train = Train(**settings)
    assert [step for step in range(1, 21) if is_validation_step(train, step)] == steps


# ---- Graphs of a compiled run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_has_more_shapes_than_can_be_compiled(name):
    run = PRESETS[name]()
    assert len(training_shapes(run, limited=True)) <= MAX_SHAPES and len(validation_shapes(run)) <= MAX_SHAPES + 1


def test_speedrun_has_a_shape_for_each_stage_and_validates_the_last_one_with_a_longer_window():
    run = PRESETS["speedrun"]()
    assert [(v.batch_tokens, *v.windows.values()) for v in training_shapes(run)] == [
        (131_072, 128, 384), (262_144, 384, 896), (393_216, 640, 1408), (393_216, 768, 1664)]
    assert [tuple(v.windows.values()) for v in validation_shapes(run)] == [(128, 384), (384, 896), (640, 1408), (768, 2560)]
    assert Planned(run).validation_values(1284).long_window_tokens == 1664
    assert run.data.val_sequence_tokens == 262_144


def test_medium_keeps_to_its_straight_lines_in_steps_of_128():
    run = PRESETS["medium"]()
    for step in range(0, run.train.steps, 7):
        values, share = Planned(run).values(step), step / run.train.steps
        assert values.window_tokens % 128 == values.long_window_tokens % 128 == 0
        assert abs(values.window_tokens - (384 + 768 * share)) <= 128
        assert abs(values.long_window_tokens - (384 + 2560 * share)) <= 2.2 * 128


def test_a_schedule_of_many_shapes_is_refused_with_their_number_and_the_curve():
    run = Run(model=Model(window_tokens=64), schedule=Schedule(window_tokens="0=1 100%=2"), train=Train(steps=300))
    assert len(training_shapes(run)) == 65
    with pytest.raises(ValueError, match="65 shapes.*at most 8.*--schedule.window_tokens in jumps.*hold.*--run.compile off"):
        training_shapes(run, limited=True)
