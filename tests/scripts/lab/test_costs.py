"""The cost model's rules, in closed form."""

import pytest

from scripts.lab.costs import (
    MACHINES,
    Assumptions,
    Attention,
    Product,
    Update,
    Work,
    device_ms,
    exposed_ms,
    predict,
    product_rate,
    visible_tokens,
)
from scripts.lab.workload import join_tallies

H100, PLAIN = MACHINES["h100"], Assumptions(product_ramp_us=0.0, gap_us=0.0, collective_us=0.0)
BANDWIDTH = H100.memory_bandwidth * PLAIN.memory_frac
IDLE = Update(Work(0.0, 0, 0))


def test_a_kernel_runs_at_the_slower_of_its_two_rates():
    large, thin = Product(1e12, 1e9, "bfloat16"), Product(1e9, 1e9, "bfloat16")
    assert device_ms(Work(0, 0, 0, (large,)), H100, PLAIN)[0] == pytest.approx(1e15 / (H100.flops * PLAIN.product_frac))
    assert device_ms(Work(0, 0, 0, (thin,)), H100, PLAIN)[0] == pytest.approx(1e12 / BANDWIDTH)
    short = Attention("fa3", 1e9, 1e9)
    assert device_ms(Work(0, 0, 0, (), (short,)), H100, PLAIN)[1] == pytest.approx(1e12 / BANDWIDTH)
    assert device_ms(Work(1e9, 0, 0), H100, PLAIN)[2] == pytest.approx(1e12 / BANDWIDTH)


def test_fp8_is_faster_only_where_there_is_a_unit_for_it():
    assert product_rate("float8_e4m3fn", H100, PLAIN) > 1.5 * product_rate("bfloat16", H100, PLAIN)
    assert product_rate("float8_e4m3fn", MACHINES["a100"], PLAIN) == product_rate("bfloat16", MACHINES["a100"], PLAIN)
    assert product_rate("float32", H100, PLAIN) == product_rate("bfloat16", H100, PLAIN) / 2


def test_passes_multiply_and_updates_average():
    """Adam at every second step counts half; a pass counts as often as it runs, with its added gradients."""
    updates = [IDLE, Update(Work(2 * BANDWIDTH, 0, 0))]
    prediction = predict(Work(BANDWIDTH, 0, 0), updates, H100, passes=3, gpus=1, assume=PLAIN)
    assert prediction.memory_ms == pytest.approx(3000) and prediction.update_ms == pytest.approx(1000)
    assert prediction.step_ms == pytest.approx(4000)


def test_the_host_counts_only_where_the_device_would_idle():
    busy, lazy = Work(BANDWIDTH / 1e3, 100, 10), Work(0.0, 100, 10)  # 1 ms of the device; 0.4 + 0.1 ms of the host
    assert predict(busy, [IDLE], H100, passes=1, gpus=1, assume=PLAIN).host_ms == 0
    assert predict(lazy, [IDLE], H100, passes=2, gpus=1, assume=PLAIN).host_ms == pytest.approx(1.0)
    # The pass's spare 0.5 ms hide the update's 0.5 ms of launches, unless the host has waited for the device.
    update = Update(lazy)
    assert predict(busy, [update], H100, passes=1, gpus=1, assume=PLAIN).host_ms == pytest.approx(0.0)
    waiting = Update(lazy._replace(waits=True))
    assert predict(busy, [waiting], H100, passes=1, gpus=1, assume=PLAIN).host_ms == pytest.approx(0.5)


def test_the_update_hides_all_collectives_but_the_first_and_the_last():
    rate = H100.node_bandwidth * PLAIN.network_frac * 8 / 7
    sent = [("reduce_scatter", rate), ("reduce_scatter", rate), ("all_gather", rate)]  # a second each
    assert exposed_ms(sent, 0.0, H100, 8, PLAIN) == pytest.approx(3000)
    assert exposed_ms(sent, 400.0, H100, 8, PLAIN) == pytest.approx(2600)
    assert exposed_ms(sent, 9999.0, H100, 8, PLAIN) == pytest.approx(2000)
    assert exposed_ms(sent, 0.0, H100, 1, PLAIN) == exposed_ms([], 0.0, H100, 8, PLAIN) == 0
    assert exposed_ms([("all_reduce", rate)] * 2, 0.0, H100, 8, PLAIN) == pytest.approx(4000)
    assert exposed_ms(sent, 0.0, H100, 16, PLAIN) > 8 * exposed_ms(sent, 0.0, H100, 8, PLAIN)  # between nodes


def test_tokens_within_a_window_and_a_document():
    assert visible_tokens(None, 1000, None, PLAIN) == 500
    assert visible_tokens(100, 1000, None, PLAIN) == (100**2 / 2 + 900 * 100) / 1000
    # Documents of one length: half of it. Documents of FineWeb: shorter ones weigh less, as they have fewer tokens.
    equal = Assumptions(document_tokens=400.000001, median_document_tokens=400)
    assert visible_tokens(None, 16_384, 2048, equal) == pytest.approx(200, rel=1e-3)
    short, long = (visible_tokens(None, 16_384, cap, PLAIN) for cap in (896, 2048))
    assert 690 / 2 * 0.8 < short < long < 1024
    assert visible_tokens(128, 16_384, 896, PLAIN) < 128


def test_tallies_are_split_by_class():
    tally = {"bytes": 100, "other_bytes": 10, "launches": 5, "own": [{"name": "loss", "count": 1, "bytes": 40}], "other": [],
             "products": [{"flops": 7, "bytes": 3, "dtype": "bfloat16", "count": 2}],
             "attention": [{"kernel": "varlen", "backward": True, "batch": 1, "heads": 2, "tokens": 8, "head_dim": 4,
                            "count": 1, "bytes": 30}]}
    eager = {"bytes": 0, "other_bytes": 6, "launches": 3, "own": [], "products": [], "attention": [],
             "other": [{"name": "nonzero", "count": 3, "bytes": 6}]}
    work = join_tallies([tally], eager, keys=10.0)
    assert (work.memory_bytes, work.launches, work.eager, work.waits) == (100 + 10 + 6 - 30, 5, 3, True)
    assert work.products == (Product(7, 3, "bfloat16", 2),)
    assert work.attention == (Attention("fa3", 4 * 64 * 10.0 * 2.5, 30),)
    assert not join_tallies([tally], None).waits


def test_products_within_our_kernels_have_the_dtype_of_their_neighbours():
    tally = {"bytes": 100, "other_bytes": 0, "launches": 2, "own": [{"name": "relu2_tiles", "count": 2, "bytes": 60}],
             "other": [], "attention": [],
             "products": [{"flops": 1, "bytes": 1, "dtype": "bfloat16", "count": 1, "m": 8, "n": 99, "k": 4},
                          {"flops": 1, "bytes": 1, "dtype": "float8_e4m3fn", "count": 1, "m": 8, "n": 4, "k": 16}]}
    work = join_tallies([tally], None, mlp=(8, 4, 16))
    assert work.products[-1] == Product(2 * 2 * 8 * 4 * 16, 60, "float8_e4m3fn", 2) and work.memory_bytes == 40
    assert len(join_tallies([tally], None).products) == 2


def test_scaled_work_has_as_many_launches():
    work = Work(3.0, 5, 3, (Product(7, 3, "bfloat16", 2),), (Attention("fa3", 2.0, 30),))
    double = work.scaled(2)
    assert (double.memory_bytes, double.flops, double.launches) == (2 * work.memory_bytes, 2 * work.flops, work.launches)
