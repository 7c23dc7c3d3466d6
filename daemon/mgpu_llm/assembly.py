"""From a checked config to what the daemon runs with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mgpu_llm
from mgpu_llm.config import launching
from mgpu_llm.config.endpoint import Listening, endpoint, listening
from mgpu_llm.config.model import model_heads, weights_bytes
from mgpu_llm.config.schema import Config
from mgpu_llm.core.endpoint import Endpoint
from mgpu_llm.core.history import launch_key
from mgpu_llm.core.ladder import Rung
from mgpu_llm.core.launch import Server, argv
from mgpu_llm.core.report import Identity
from mgpu_llm.core.states import Policy


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that the config decides. `uuids` maps the entries of CUDA_VISIBLE_DEVICES to NVML's UUIDs."""

    policy: Policy
    server: Server
    identity: Identity
    endpoint: Endpoint
    listening: Listening
    runtime_dir: Path
    state_dir: Path
    uuids: Mapping[str, str]


def plan(config: Config, uuids: Mapping[str, str] | None, environ: Mapping[str, str]) -> Plan:
    """Put the daemon together. `uuids` are the GPUs in the config's order, None where it wants none.

    Raises FileNotFoundError or PermissionError when the engine's program is not there.
    """
    server = launching.to_server(config, environ)
    base = launching.to_base_launch(config, None if uuids is None else tuple(uuids))
    where = endpoint(config, environ)
    rungs = launching.to_ladder(config, base, model_heads(config, environ))
    gpus = uuids or {}
    keys = tuple(
        launch_key(argv(server, rung.launch), rung.launch.env, [gpus[gpu] for gpu in rung.launch.gpus or ()])
        for rung in rungs
    )
    return Plan(
        policy=_policy(config, rungs, keys, weights_bytes(config, environ)),
        server=server,
        identity=Identity(version=mgpu_llm.__version__, model=config.model.served_name or server.model, url=where.url),
        endpoint=where,
        listening=listening(config),
        runtime_dir=Path(config.daemon.runtime_dir),
        state_dir=Path(config.daemon.state_dir),
        uuids=gpus,
    )


def _policy(config: Config, rungs: tuple[Rung, ...], keys: tuple[str, ...], weights: int | None) -> Policy:
    retries, serving, stop, heartbeat = config.retries, config.serving, config.stop, config.heartbeat
    return Policy(
        rungs=rungs,
        keys=keys,
        patience=launching.to_patience(config),
        learn_factor=heartbeat.learn_factor if heartbeat.learn else None,
        look_at_stacks=heartbeat.stacks,
        weights_bytes=weights,
        attempts=retries.attempts,
        crashes_per_rung=retries.crashes_per_rung,
        backoff_s=retries.backoff,
        backoff_ceiling_s=retries.backoff_ceiling,
        probe_interval_s=serving.probe_interval,
        failed_probes=serving.failed_probes,
        deaths=serving.deaths,
        deaths_window_s=serving.deaths_window,
        stop_grace_s=stop.grace,
        kill_deadline_s=stop.kill_deadline,
    )
