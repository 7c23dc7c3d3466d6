"""What was heard, as an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mgpu_llm.adapters.preflight.program import Message
from mgpu_llm.adapters.preflight.trial import Trial
from mgpu_llm.core.preflight import Checked, Transport

#: A copy that has not come back after that long, while NCCL has got through on the same GPUs, does not come back.
COPY_S = 5.0


@dataclass(kw_only=True)
class Copies:
    """What has become of the copies from each GPU to each, one after the other; GPUs are indices."""

    done: bool = False
    wrong: dict[tuple[int, int], bool] = field(default_factory=dict)
    under_way: tuple[int, int, float] | None = None

    def hear(self, message: Message, at: float) -> None:
        what = message.get("is")
        if what == "copying":
            self.under_way = (int(message["source"]), int(message["target"]), at)
        elif what == "copied":
            self.under_way = None
            if not message["right"]:
                self.wrong[int(message["source"]), int(message["target"])] = bool(message["direct"])
        elif what in ("passed", "failed", "died", "killed"):
            # Whatever it failed of is not held against a pair: it may be memory, and NCCL's ranks say it better.
            self.done, self.under_way = True, None

    def found(self, entries: Sequence[str], at: float, *, late: bool) -> dict[tuple[str, str], str]:
        """By pair what is wrong with it; with `late`, also that a copy is overdue."""
        directly = ", which the driver calls direct,"
        told = {
            (entries[source], entries[target]): f"a copy{directly if direct else ''} does not arrive as it was sent"
            for (source, target), direct in self.wrong.items()
        }
        if late and self.under_way is not None and at - self.under_way[2] >= COPY_S:
            source, target, since = self.under_way
            told[entries[source], entries[target]] = f"a copy has not come back after {at - since:.0f} s"
        return told


def of_gpus(own: Trial, entries: Sequence[str]) -> Checked:
    """Where the launch's own ranks have come through alone, or have failed before anything was between them."""
    gpus = {entries[device]: why for device, why in own.broken_gpus().items()}
    if gpus or (own.alone() and not own.failures):
        return Checked(gpus=gpus)
    return Checked(unobserved=own.why() or "not found out")


def of_nothing(why: str, own: Trial | None, entries: Sequence[str]) -> Checked:
    """Where it was broken off; a GPU that had failed until then is still told."""
    gpus = {} if own is None else {entries[device]: text for device, text in own.broken_gpus().items()}
    return Checked(gpus=gpus, unobserved="" if gpus else why)


def of_all(
    trials: Sequence[Trial],
    best: Trial | None,
    hung: Mapping[str, float],
    pairs: Mapping[tuple[str, str], str],
) -> Checked:
    """`hung` are the transports that do not come back, and for how long they have not."""
    errors = {trial.error() for trial in trials}
    if len(trials) > 1 and len(errors) == 1 and "" not in errors:
        # Whatever that is, it does not lie between the GPUs: an engine hears it too, and says it better than "none works".
        return Checked(unobserved=trials[0].why())
    return Checked(transports=tuple(_transport(trial, best, hung) for trial in trials), pairs=pairs)


def _transport(trial: Trial, best: Trial | None, hung: Mapping[str, float]) -> Transport:
    if trial.passed:
        # What small tensors pass and the large ones of the measurement do not is of no use to an engine.
        return Transport(
            name=trial.name,
            works=not trial.broken(),
            gib_per_s=min(trial.gib_per_s, default=None),
            took_s=(trial.passed_at or 0.0) - (trial.words_at or 0.0),
            detail=trial.why(),
        )
    if trial.name in hung:
        after_s = hung[trial.name]
        other = f"{best.name} passed within {best.took_s:.1f} s" if best else "and no other came back either"
        detail = f"an all-reduce had not come back after {after_s:.1f} s; {other}"
        return Transport(name=trial.name, works=False, took_s=after_s, detail=detail)
    works = False if trial.broken() else None
    return Transport(name=trial.name, works=works, detail=trial.why() or "not found out")
