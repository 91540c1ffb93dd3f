"""Tokens of a pass from the free memory: one GPU of 16 to 192 GB, by the exact sizes of weights, gradients and state."""

import math

import pytest
import torch

from configs.presets import PRESETS
from data.run.memory import fit_passes, free_bytes
from optim.schedule import training_shapes
from scripts.lab.models import meta_model
from scripts.lab.workload import measure_sizes

CONTEXT_BYTES = 0.6e9  # of CUDA and its libraries


@pytest.fixture(scope="module")
def state_bytes():
    sizes, _, _ = measure_sizes(PRESETS["speedrun_1gpu"]())
    return sum(bank.entries * (2 * bank.weight_bytes + bank.state_bytes) for bank in sizes.banks)


def fitted(preset: str, free: float, *, world_size: int = 1) -> tuple[int, str]:
    run = PRESETS[preset]()
    run, note = fit_passes(run, training_shapes(run), world_size=world_size, free=free,
                           activation_bytes=meta_model(run, max_tokens=16_384).activation_bytes)
    return run.train.micro_tokens, note


@pytest.mark.parametrize(("gigabytes", "micro_tokens"), [
    (25.4, 16_384), (34, 32_768), (48, 32_768), (85, 65_536), (150, 131_072), (192, 131_072), (288, 393_216)])
def test_speedrun_on_one_gpu_takes_what_fits(gigabytes, micro_tokens, state_bytes):
    free = gigabytes * 1e9 - CONTEXT_BYTES - state_bytes
    chosen, note = fitted("speedrun_1gpu", free)
    assert chosen == micro_tokens
    assert note == f"passes of at most {micro_tokens:,} tokens, as many as fit: weights, gradients and state leave " \
                   f"{free / 1e9:.1f} GB"


def test_a_gpu_that_is_too_small_is_refused_and_the_smaller_preset_fits_it(state_bytes):
    free = 17.1e9 - CONTEXT_BYTES - state_bytes
    with pytest.raises(ValueError, match=r"16,384 tokens stores about 8.3 GB.*speedrun_consumer fits 16 GB"):
        fitted("speedrun_1gpu", free)
    assert PRESETS["speedrun_consumer"]().train.micro_tokens <= fitted("speedrun_consumer", free)[0]


def test_the_estimate_is_that_of_the_compiled_graphs():
    model = meta_model(PRESETS["speedrun"](), max_tokens=16_384)
    assert model.activation_bytes(16_384) == pytest.approx(8.3e9, rel=0.02)
    assert model.activation_bytes(49_152) == pytest.approx(25e9, rel=0.02)


def test_ranks_divide_the_batch_and_without_a_gpu_nothing_is_measured():
    assert fitted("speedrun_1gpu", 1e12, world_size=8)[0] == 49_152
    assert free_bytes(torch.device("cpu")) == math.inf
    assert fitted("speedrun_1gpu", math.inf) == (65_536, "passes of at most 65,536 tokens")
