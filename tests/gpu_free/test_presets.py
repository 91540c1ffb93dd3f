"""Presets compile for a pretended GPU, each pass in one graph, within budgets.json: small ones by -m gpu_free, whole ones
by -m gpu_free_whole."""

import json

import pytest

from tests.gpu_free.budgets import FILE, SMALL, WHOLE, Case, figures, overruns, passes
from tests.gpu_free.pretend import LIMITS as DEVICE_LIMITS
from tests.gpu_free.pretend import missing

BUDGETS = json.loads(FILE.read_text()) if FILE.exists() else {}
CASES = [*(pytest.param(name, case, marks=pytest.mark.gpu_free, id=name) for name, case in SMALL.items()),
         *(pytest.param(f"whole {name}", case, marks=pytest.mark.gpu_free_whole, id=f"whole {name}")
           for name, case in WHOLE.items())]


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_preset_compiles_into_one_graph_a_pass_within_its_budget(name: str, case: Case):
    record = case.measure()
    assert graph_errors(record) == []
    assert kernel_errors(record, DEVICE_LIMITS[case.capability][0]) == []
    for title, part in passes(name, record).items():
        assert title in BUDGETS, f"no budget for {title}: record it by python -m tests.gpu_free.budgets {name!r}"
        assert overruns(title, part, BUDGETS[title]) == []


def graph_errors(record: dict) -> list[str]:
    """Return a line for each pass that is more than one graph (two with a backward pass), or that compiles anew when the
    schedule's values, the number of the step or the length of a sampled text change."""
    errors = []
    for stage in record["stages"]:
        for kind, expected in (("training", 2), ("validation", 1), ("sampling", 0)):
            if kind in stage and (graphs := stage[kind]["graphs"]) != expected:
                errors.append(f"step {stage['first_step']}, {kind}: {graphs} graphs instead of {expected}")
        if again := stage.get("training", {}).get("graphs_again"):
            errors.append(f"step {stage['first_step']}: {again} graphs more at the stage's last step")
    for world, steps in record["update"].items():
        for step in steps:
            if step["graphs"] > step["banks"]:
                errors.append(f"update on {world} ranks: {step['graphs']} graphs for {step['banks']} banks")
            if step["graphs_again"]:
                errors.append(f"update on {world} ranks: {step['graphs_again']} graphs more at a later step")
    return errors


def kernel_errors(record: dict, limit: int) -> list[str]:
    """Return a line for each kernel that needs more shared memory than a thread block may have, or of ours in float64."""
    entries = [entry for part in passes("", record).values() for kind in ("forward", "backward", "inference") if kind in part
               for group in ("triton", "own") for entry in part[kind][group]]
    return [f"{entry['name']}: {entry['shared_bytes']} bytes of shared memory, the device has {limit}"
            for entry in entries if (entry["shared_bytes"] or 0) > limit] + [
            f"{entry['name']} takes {', '.join(entry['float64_arguments'])} in float64 and computes in it"
            for entry in entries if entry["float64_arguments"]]


# ---- The checks themselves, without compiling ----------------------------------------------------------------------------


def tally(*kernels: tuple[str, float]) -> dict:
    entries = [{"name": name, "count": 1, "bytes": gb * 1e9, "shared_bytes": 9, "float64_arguments": []}
               for name, gb in kernels]
    return {"bytes": sum(gb for _, gb in kernels) * 1e9, "kernel_launches": len(kernels), "triton": entries, "own": []}


def test_a_budget_that_is_exceeded_names_the_kernel_that_grew():
    before = {"peak_bytes": 1e9, "forward": tally(("norm_3", 1.0), ("loss_7", 2.0)), "backward": tally(("norm_1", 1.0))}
    after = before | {"forward": tally(("norm_2", 1.0), ("loss_9", 2.5), ("copy_1", 0.1))}
    assert overruns("here", before, figures(before)) == []
    gigabytes, launches = overruns("here", after, figures(before))
    assert gigabytes.startswith("here: 4.6 gigabytes, the budget is 4.0. Grown: loss +0.500 GB; copy +0.100 GB")
    assert launches.startswith("here: 4 launches, the budget is 3.")


def test_more_graphs_than_one_a_pass_are_errors():
    stage = {"first_step": 5, "training": {"graphs": 3, "graphs_again": 1}, "validation": {"graphs": 1},
             "sampling": {"graphs": 4}}
    update = {"8": [{"graphs": 2, "graphs_again": 0, "banks": 1}]}
    assert graph_errors({"stages": [stage], "update": update}) == [
        "step 5, training: 3 graphs instead of 2", "step 5, sampling: 4 graphs instead of 0",
        "step 5: 1 graphs more at the stage's last step", "update on 8 ranks: 2 graphs for 1 banks"]


def test_a_kernel_with_too_much_shared_memory_or_in_float64_is_an_error():
    graph = tally(("loss", 1), ("norm", 1))
    record = {"stages": [{"first_step": 0, "training": {"forward": graph}}], "update": {}}
    assert kernel_errors(record, 9) == []
    graph["triton"][1]["float64_arguments"] = ["scale"]
    assert kernel_errors(record, 8) == ["loss: 9 bytes of shared memory, the device has 8",
                                        "norm: 9 bytes of shared memory, the device has 8",
                                        "norm takes scale in float64 and computes in it"]
