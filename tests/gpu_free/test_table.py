"""The table of compiled steps: sums of graphs, beside what was counted before."""

from benchmarks.compiled_step import HEAD, rows, rows_beside, shortened


def tally(kernels: int, gigabytes: float) -> dict:
    return {"kernel_launches": kernels, "bytes": gigabytes * 1e9, "product_bytes": 2e9, "other_bytes": 0,
            "product_flops": 1e12, "triton": list(range(20))}


def record(gigabytes: float) -> dict:
    training = {"graphs": 2, "peak_bytes": 3e9, "forward": tally(5, gigabytes), "backward": tally(7, 1.5)}
    update = {"step": 1, "graphs": 1, "peak_bytes": 1e9, "inference": tally(3, 0.25)}
    return {"stages": [{"first_step": 4, "pass_tokens": 64, "training": training}], "update": {"8": [update]}}


def test_the_printed_table_has_each_kind_of_graph_and_their_sum():
    forward, backward, total, *_ = rows("p", record(1))
    assert forward == ("p", "training, step 4: forward", 64, "", 5, "1.00", "2.00", "0.00", "1.00", "")
    assert backward[1] == "training, step 4: backward"
    assert total == ("p", "training, step 4: all", 64, 2, 12, "2.50", "4.00", "0.00", "2.00", "3.00")


def test_the_saved_table_stands_beside_what_was_before():
    training, update = rows_beside("p", record(1), {**record(9), "update": {}})
    assert training == ("p", "training, step 4", 64, 2, 12, "2.50", "4.00", "0.00", "2.00", "3.00", "12", "10.50",
                        "3.00")
    assert update == ("p", "update 1, 8 ranks", "", 1, 3, "0.25", "2.00", "0.00", "1.00", "1.00", "", "", "")
    assert {len(row) for row in rows_beside("p", record(1), None)} == {len(HEAD) + 3}


def test_what_took_several_passes_before_is_counted_for_as_many_tokens():
    now = record(1)
    now["stages"][0]["pass_tokens"] = 192
    training, _ = rows_beside("p", now, {**record(9), "update": {}})
    assert training[2] == 192 and training[10:] == ("36", "31.50", "3.00")


def test_only_the_largest_kernels_are_saved():
    assert shortened(record(1))["stages"][0]["training"]["forward"]["triton"] == list(range(12))
