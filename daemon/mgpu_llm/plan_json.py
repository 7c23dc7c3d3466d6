"""What would be tried against a cause, as one JSON document: for `mgpud --plan` and for the control socket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mgpu_llm.core import launch as launches
from mgpu_llm.core import planning, redaction
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.planning import Plan, Planned
from mgpu_llm.core.redaction import Redactor, secrets_of
from mgpu_llm.core.states import Policy


def plan_to_json(policy: Policy, cause: str, out: Mapping[str, str]) -> dict[str, Any]:
    """{"cause": str, "plans": [{"cause", "summary", "wants": [str], "status": int, "rungs": [...], "outs": [...]}]}: a plan for
    each way in which the cause may show, which ends with the exit status. `out` are GPUs that must not be used, as in Run. Raises
    ValueError for an unknown cause.

    A rung is {"name", "tries": int, "changes": [str], "cost", "argv": [str], "env": {str: str}}: `env` is what is set for the
    engine on top of what it inherits; in rungs other than the base only what differs from the base's. Secrets are "..." in
    both. An out is {"what", "why", "forbidden": bool}.
    """
    plans = planning.plans(policy, cause, out)
    launches_of = [policy.launch(planned.rung) for plan in plans for planned in plan.rungs]
    secrets = frozenset[str]().union(*(secrets_of(launch.env, launch.args) for launch in launches_of))
    document: dict[str, Any] = Redactor(secrets).tree(
        {"cause": cause, "plans": [_plan(policy, plan) for plan in plans]}
    )
    return document


def _plan(policy: Policy, plan: Plan) -> dict[str, Any]:
    return {
        "cause": plan.cause,
        "summary": plan.summary,
        "wants": [want.value for want in plan.wants],
        "status": plan.status,
        "rungs": [_rung(policy, planned) for planned in plan.rungs],
        "outs": [{"what": out.what, "why": out.why, "forbidden": out.forbidden} for out in plan.outs],
    }


def _rung(policy: Policy, planned: Planned) -> dict[str, Any]:
    base, launch = policy.ladder.base, policy.launch(planned.rung)
    argv = () if policy.server is None else launches.argv(policy.server, launch)
    return {
        "name": planned.rung.name,
        "tries": planned.tries,
        "changes": list(launches.differences(base, launch)),
        "cost": planned.rung.cost,
        "argv": redaction.argv(argv),
        "env": _env(launch, base if planned.rung.remedies else None),
    }


def _env(launch: Launch, base: Launch | None) -> dict[str, str]:
    """Of the base itself all of it, for there is nothing that it could differ from."""
    before = launches.environment({}, base) if base is not None else {}
    env = launches.environment({}, launch)
    return redaction.environment({name: value for name, value in env.items() if before.get(name) != value})
