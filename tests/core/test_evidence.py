"""What a verdict says was seen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import progress
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.events import GpusSampled, GpusUnobserved
from mgpu_llm.core.progress import Progress, begin
from mgpu_llm.core.signals import NOISE_FLOOR
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S, Circumstances, Stalled, judge
from mgpu_llm.core.states import Ready
from tests.core.world import (
    fed,
    gpu,
    loading,
    serving,
    worker,
)

GPUS = Circumstances(has_gpus=True)


def _stalled(heart: Progress) -> Stalled:
    verdict = judge(replace(heart, quiet_s=1000.0), DEFAULT_PATIENCE_S, GPUS)
    assert isinstance(verdict, Stalled)
    return verdict


@pytest.mark.parametrize(("utilisation", "spinning"), [(100, True), (95, True), (94, False), (0, False)])
def test_a_gpu_at_full_utilisation_without_progress_spins(utilisation: int, spinning: bool) -> None:
    heart = progress.after_gpus(
        begin(0.0), GpusSampled(at=1.0, attempt=1, gpus=(gpu(utilisation_percent=utilisation),))
    )
    verdict = _stalled(heart)
    assert verdict.spinning is spinning
    assert f"GPU 0 (GPU-a): 2.00 GB used, utilisation {utilisation} %, 125 W" in verdict.evidence


def test_without_gpu_utilisation_a_busy_process_decides_who_spins() -> None:
    dim = GpusSampled(at=1.0, attempt=1, gpus=(replace(gpu(utilisation_percent=None), power_mw=None),))
    burning = progress.after_gpus(fed(worker(cpu_s=1.0), worker(cpu_s=2.0)), dim)
    assert _stalled(burning).spinning is True
    assert "GPU 0 (GPU-a): 2.00 GB used, utilisation unknown" in _stalled(burning).evidence
    resting = progress.after_gpus(fed(worker(cpu_s=1.0), worker(cpu_s=1.1)), dim)
    assert _stalled(resting).spinning is False


@pytest.mark.parametrize(
    ("utilisation", "share", "spinning"),
    [(0, 1.0, True), (0, 0.5, True), (94, 0.49, False), (95, 0.0, True), (None, 0.5, True), (None, 0.49, False)],
)
def test_either_a_full_gpu_or_half_a_core_is_spinning(utilisation: int | None, share: float, spinning: bool) -> None:
    burning = fed(worker(cpu_s=0.0), worker(cpu_s=share))
    looked = GpusSampled(
        at=1.0, attempt=1, gpus=(gpu(utilisation_percent=utilisation), gpu("GPU-b", utilisation_percent=0))
    )
    assert _stalled(progress.after_gpus(burning, looked)).spinning is spinning


def test_a_process_that_worked_before_the_quiet_and_rests_in_it_does_not_spin() -> None:
    worked = fed(
        worker(cpu_s=0.0, rss_bytes=1 << 30), worker(cpu_s=4.0, rss_bytes=2 << 30), worker(cpu_s=4.1, rss_bytes=2 << 30)
    )
    assert _stalled(worked).spinning is False
    assert not any("burns" in seen for seen in _stalled(worked).evidence)


def test_where_nobody_looked_it_is_unknown_who_spins() -> None:
    assert _stalled(begin(0.0)).spinning is None
    assert _stalled(begin(0.0)).evidence == ("the engine never printed a line",)


def test_a_process_that_waits_in_the_kernel_is_named() -> None:
    evidence = _stalled(fed(worker(71, state="D"))).evidence
    assert "waiting in the kernel (state D): 71 (VLLM::Worker_TP)" in evidence


def test_a_busy_compiler_is_not_blamed() -> None:
    evidence = _stalled(fed(worker(7, name="ptxas", cpu_s=1.0), worker(7, name="ptxas", cpu_s=2.0))).evidence
    assert not any("burns" in seen for seen in evidence)


def test_every_signal_with_a_noise_floor_is_one_that_is_measured() -> None:
    heart = progress.after_gpus(fed(worker(), worker()), GpusSampled(at=9.0, attempt=1, gpus=(gpu(),)))
    assert {signal.split(" ")[0] for signal in heart.marks} == set(NOISE_FLOOR)


def test_a_serving_engine_still_shows_its_gpus_and_processes_and_is_not_judged() -> None:
    world = serving()
    for _ in range(400):
        world.at += 2.0
        world.look(worker(5))
    world.send(GpusUnobserved(at=world.at, attempt=1, reason="gone"))
    assert isinstance(world.state, Ready)
    assert {pid for pid, _ in world.state.progress.processes} == {5}
    assert world.state.progress.gpus_unobserved == "gone"


def test_a_stall_after_an_error_names_the_error() -> None:
    world = loading().say("(Worker pid=1) ERROR 11-22 10:28:14 [x.py:1] RuntimeError: the peer went away")
    world.watch(60.0)
    found: Diagnosis = world.last_diagnosis
    assert found.cause == "nccl-p2p"
    assert 'error before: "RuntimeError: the peer went away"' in found.evidence
