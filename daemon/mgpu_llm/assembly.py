"""From a checked config to what the daemon runs with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import mgpu_llm
from mgpu_llm.config import launching, model
from mgpu_llm.config.context import context_length
from mgpu_llm.config.endpoint import Listening, endpoint, listening
from mgpu_llm.config.fitting import Fitting
from mgpu_llm.config.ladder import areas, to_ladder
from mgpu_llm.config.schema import Config
from mgpu_llm.core import unusable
from mgpu_llm.core.endpoint import Endpoint
from mgpu_llm.core.history import launch_key
from mgpu_llm.core.ladder import BASE, Nvlink, Rung
from mgpu_llm.core.launch import Server, argv
from mgpu_llm.core.preflight import When
from mgpu_llm.core.report import Identity
from mgpu_llm.core.states import Fail, Policy, Run
from mgpu_llm.host import Found, Versions


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that the config decides. `uuids` maps the entries of CUDA_VISIBLE_DEVICES to NVML's UUIDs, spares included, and
    `parts` those of divided GPUs to those of their MIG slices. Lost GPUs are in neither: the config's are in `out`, by entry,
    each with why, and the others of this host in `lost`.
    `driver_told`: the GPUs are what the driver says of them, and not only what the config calls them. `fitting` is whether the
    model fits them, None where nobody can tell, and `held_bytes` what is used of each now and what it has. `versions` are known
    of a plan to be run."""

    policy: Policy
    server: Server
    identity: Identity
    endpoint: Endpoint
    listening: Listening
    runtime_dir: Path
    state_dir: Path
    uuids: Mapping[str, str]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    driver_told: bool = True
    fitting: Fitting | None = None
    held_bytes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    versions: Versions = field(default_factory=Versions)
    out: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)

    def begins(self) -> Rung | Fail:
        """The first rung where none is remembered: the base, or as near to it as the GPUs that are left allow. Fail where they
        do not suffice."""
        return unusable.around(Run(out=self.out), BASE, self.policy)


def plan(
    config: Config,
    found: Found,
    command: tuple[str, ...],
    environ: Mapping[str, str],
    fitted: Fitting | None = None,
) -> Plan:
    """Put the daemon together. `command` is the engine's up to the model, `environ` what it inherits, and `fitted` whether the
    model fits the GPUs, None where nobody can tell."""
    server = launching.to_server(config, command)
    where = endpoint(config, environ)
    named = {**(found.uuids or {}), **found.spares}
    uuids = {entry: uuid for entry, uuid in named.items() if entry not in found.out}
    ladder = to_ladder(
        config,
        launching.to_base_launch(config, None if found.uuids is None else tuple(found.uuids)),
        model.model_heads(config, environ),
        need=None if fitted is None else fitted.need,
        gpu_bytes=found.memory_bytes,
        context=context_length(config, environ),
        # What keeps NVLink may not help, which costs a whole load where no check of the GPUs says so before it.
        nvlink=Nvlink.NONE if When(config.preflight.mode) is When.OFF else found.nvlink,
        spares=tuple(found.spares),
    )
    policy = Policy(
        ladder=ladder,
        preflight=When(config.preflight.mode),
        preflight_s=config.preflight.deadline,
        kill_deadline_s=config.stop.kill_deadline,
    )
    return Plan(
        policy=replace(
            settled(policy, config),
            server=server,
            uuids=uuids,
            weights_bytes=model.weights_bytes(config, environ),
        ),
        server=server,
        identity=Identity(version=mgpu_llm.__version__, model=config.model.served_name or server.model, url=where.url),
        endpoint=where,
        listening=listening(config),
        runtime_dir=Path(config.daemon.runtime_dir),
        state_dir=Path(config.daemon.state_dir),
        uuids=uuids,
        parts=found.parts,
        fitting=fitted,
        held_bytes=found.held_bytes,
        out=found.out,
        lost=found.lost,
    )


def key(plan: Plan, config: Config, versions: Versions, environ: Mapping[str, str]) -> dict[str, str]:
    """What a rung that serves depends on, each part as an operator calls it; "" is what nobody can tell."""
    fingerprint, base = model.fingerprint(config, environ), plan.policy.ladder.base
    # Model and GPUs are parts of their own: a change of one of them shall be told once.
    nameless = replace(plan.server, model="")
    # Own rungs by what they do: one that was edited under its name is another.
    changed = [(rung.name, rung.over(base)) for rung in plan.policy.ladder.own or ()]
    own = [word for name, launch in changed for word in (name, launch_key(argv(nameless, launch), launch.env, ()))]
    return {
        "model": fingerprint.path,
        "model size": "" if fingerprint.bytes is None else str(fingerprint.bytes),
        "model config": fingerprint.config_sha256,
        "GPUs": ", ".join(plan.uuids.values()),
        "driver": versions.driver,
        "vLLM": versions.vllm,
        "NCCL": versions.nccl,
        "settings": launch_key((*argv(nameless, base), *own), base.env, ()),
    }


def settled(policy: Policy, config: Config) -> Policy:
    """The policy with what of the config can change while the daemon runs (`config.reloading`)."""
    retries, serving, heartbeat = config.retries, config.serving, config.heartbeat
    return replace(
        policy,
        ladder=replace(policy.ladder, areas=areas(config)),
        up_after=config.ladder.retry_up_after,
        patience=launching.to_patience(config),
        learn_factor=heartbeat.learn_factor if heartbeat.learn else None,
        look_at_stacks=heartbeat.stacks,
        attempts=retries.attempts,
        tries_per_cause=retries.per_cause,
        crashes_per_rung=retries.crashes_per_rung,
        backoff_s=retries.backoff,
        backoff_ceiling_s=retries.backoff_ceiling,
        backoff_jitter=retries.jitter,
        probe_interval_s=serving.probe_interval,
        failed_probes=serving.failed_probes,
        deaths=serving.deaths,
        deaths_window_s=serving.deaths_window,
        stop_grace_s=config.stop.grace,
    )
