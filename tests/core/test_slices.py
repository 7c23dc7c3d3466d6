"""What can run on a MIG slice."""

from __future__ import annotations

import pytest

from mgpu_llm.core.ladder import BASE, Ladder
from mgpu_llm.core.launch import Launch, environment
from mgpu_llm.core.slices import is_slice, least_vllm, too_old

SLICE, OTHER = "MIG-377e0049-554c-540b-93c6-d0976f8426cb", "MIG-f39aa248-6f1b-5769-b119-8d650bb34b27"


def test_a_slice_is_told_from_a_whole_gpu_by_its_name() -> None:
    assert [is_slice(name) for name in (SLICE, "GPU-377e", "0", 0)] == [True, False, False, False]


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("0.8.5", True),
        ("0.23.0", True),
        ("0.23.1.dev7+g1a2b", True),
        ("0.24.0", False),
        ("0.24.0rc1", False),
        ("0.32.0", False),
        ("1.0", False),
        ("", False),
        ("dev", False),
    ],
)
def test_a_vllm_that_makes_a_number_of_each_gpus_name_is_too_old(version: str, old: bool) -> None:
    assert too_old(version) is old


def test_what_is_new_enough_is_said() -> None:
    assert least_vllm() == "vLLM 0.24 or later, which understands UUIDs in CUDA_VISIBLE_DEVICES"


def test_the_name_of_a_rung_with_slices_is_understood_again_and_gives_the_engine_that_slice() -> None:
    ladder = Ladder(base=Launch(gpus=(SLICE,), tensor_parallel=1, utilisation=0.9), spares=(OTHER,))
    rung = ladder.rung(f"eager+gpus-{OTHER}+utilisation-0.85")
    assert rung.name == f"eager+gpus-{OTHER}+utilisation-0.85"
    assert environment({}, ladder.launch(rung))["CUDA_VISIBLE_DEVICES"] == OTHER
    assert environment({}, ladder.launch(BASE))["CUDA_VISIBLE_DEVICES"] == SLICE
