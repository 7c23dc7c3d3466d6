"""The preflight that a start would have, asked for by itself: what `mgpud --doctor --probe` adds to the doctor's findings."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from mgpu_llm import startup
from mgpu_llm.adapters.gpus import Gpus, GpusUnobserved
from mgpu_llm.adapters.host.engine_versions import python_of
from mgpu_llm.adapters.preflight import Patience, Preflight
from mgpu_llm.assembly import Plan
from mgpu_llm.config.parse import Loaded
from mgpu_llm.core import launch, transports
from mgpu_llm.core.states import Fail
from mgpu_llm.doctor import probe
from mgpu_llm.doctor.finding import Finding
from mgpu_llm.startup import CannotStartError


async def probed(
    loaded: Loaded | None,
    driver: Gpus,
    environ: Mapping[str, str],
    *,
    force: bool,
    patience: Patience | None = None,
) -> list[Finding]:
    """What the GPUs of the first rung of a start do under the engine's own Python and environment. With `force` also where
    somebody uses them. Takes probe.DEADLINE_S at most; nothing of it is left then. Raises nothing but CancelledError."""
    if loaded is None:
        return [probe.SUBJECT.unknown(probe.NAME, "without a config nobody knows which GPUs to probe, and with what")]
    try:
        plan = await startup.checked(loaded, driver, environ, engine_runs=True)
    except CannotStartError as problem:
        why = f"the config must be right first: {problem.message.partition(chr(10))[0]}"
        return [probe.SUBJECT.unknown(probe.NAME, why, "see the problems above")]
    rung = plan.begins()
    if isinstance(rung, Fail):
        return [
            probe.SUBJECT.unknown(probe.NAME, f"no start would come to them: {rung.message}", "see the problems above")
        ]
    gpus = transports.ranks(plan.policy.ladder, rung)
    if not gpus:
        return [probe.SUBJECT.ok(probe.NAME, "the config uses no GPUs")]
    if not force and (busy := await _busy(plan, driver, gpus)):
        return [busy]
    environment = launch.environment(environ, plan.policy.launch(rung))
    preflight = Preflight(
        python=python_of(plan.server.command, environment),
        memory=None,
        key={},
        deadline_s=probe.DEADLINE_S,
        clock=time.monotonic,
        patience=patience,
    )
    checked = await preflight.check(
        {gpu: plan.uuids[gpu] for gpu in gpus}, environment, transports.asked(plan.policy.ladder, rung)
    )
    return list(probe.findings(checked, gpus))


async def _busy(plan: Plan, driver: Gpus, gpus: Sequence[str]) -> Finding | None:
    try:
        return probe.busy(await driver.read([plan.uuids[gpu] for gpu in gpus]))
    except GpusUnobserved as silence:
        return probe.SUBJECT.unknown(probe.NAME, silence.reason)
