"""Findings as a mgpu-llm.toml, and as lines for its reader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mgpu_llm.xinference.findings import Argument, Finding, Key, Left, Remark, Same, Secret, Value, Variable

_HEAD = (
    "# From an `xinference launch` of Xinference 1.4.1, by mgpuctl import-xinference.",
    "# What is not here is at mgpu-llm's defaults.",
)
_CONF_D = (
    "# vLLM reads it from a file such as /etc/mgpu-llm/conf.d/secrets.toml (owner root:mgpu-llm, mode 0640):",
    "#     [engine.env]",
)


def toml(findings: Iterable[Finding], *, ascii_only: bool = False) -> str:
    """The config, without a line end after its last line. `ascii_only`: with escapes for everything else."""
    found = tuple(findings)
    lines = [*_HEAD]
    for table in ("model", "engine", "gpus"):
        keys = [finding for finding in found if isinstance(finding, Key) and finding.table == table]
        body = [line for key in keys for line in _key(key, ascii_only)]
        body += _arguments(found, ascii_only) if table == "engine" else []
        lines += ["", f"[{table}]", *body] if body else []
        lines += _environment(found, ascii_only) if table == "engine" else []
    lines += _same([finding.what for finding in found if isinstance(finding, Same)])
    lines += _secrets([finding for finding in found if isinstance(finding, Secret)])
    return "\n".join(lines)


def remarks(findings: Iterable[Finding]) -> list[str]:
    """What could not be carried over, then what should be known; one line each."""
    found = tuple(findings)
    lines = [f"not carried over: {it.what}: {it.why}" for it in found if isinstance(it, Left)]
    lines += [f"not carried over: {it.what}: {_hidden(it)}" for it in found if isinstance(it, Secret)]
    return lines + [f"remark: {it.about}: {it.text}" for it in found if isinstance(it, Remark)]


def _hidden(secret: Secret) -> str:
    if secret.name:
        return f"it is secret; write {secret.name} into [engine.env] of a file of conf.d that only the service may read"
    return "it is or holds a secret, and secrets are never printed"


def _key(key: Key, ascii_only: bool) -> Iterator[str]:
    yield from (f"# {_comment(line)}" for line in key.why)
    yield f"{key.name} = {value_text(key.value, ascii_only=ascii_only)}"


def _arguments(found: Sequence[Finding], ascii_only: bool) -> Iterator[str]:
    arguments = sorted((it for it in found if isinstance(it, Argument)), key=lambda it: it.words)
    if not arguments:
        return
    yield "args = ["
    for argument in arguments:
        words = ", ".join(value_text(word, ascii_only=ascii_only) for word in argument.words)
        yield f"    {words},  # {_comment(argument.why)}"
    yield "]"


def _environment(found: Sequence[Finding], ascii_only: bool) -> Iterator[str]:
    variables = [it for it in found if isinstance(it, Variable)]
    if not variables:
        return
    yield from ("", "[engine.env]")
    for variable in variables:
        yield f"{variable.name} = {value_text(variable.value, ascii_only=ascii_only)}  # {_comment(variable.why)}"


def _same(whats: Sequence[str]) -> list[str]:
    return ["", "# Asked for, and so already: " + _comment("; ".join(sorted(whats)))] if whats else []


def _secrets(secrets: Sequence[Secret]) -> list[str]:
    if not secrets:
        return []
    of = _comment(f"# Secret, and not printed: {', '.join(sorted({secret.what for secret in secrets}))}")
    named = sorted({secret.name for secret in secrets if secret.name})
    return ["", of, *((*_CONF_D, *(f'#     {name} = "..."' for name in named)) if named else ())]


def _comment(text: str) -> str:
    """One line, which is all that a comment can be."""
    return "".join(char if char.isprintable() else " " if char in "\t\n" else _escape(char) for char in text)


def value_text(value: Value, *, ascii_only: bool = False) -> str:
    """A value as TOML 1.0 has it."""
    match value:
        case str() if '"' in value and "'" not in value and value.isprintable() and (value.isascii() or not ascii_only):
            return f"'{value}'"  # JSON stays readable
        case str():
            return f'"{"".join(_in_quotes(char, ascii_only) for char in value)}"'
        case tuple():
            return f"[{', '.join(value_text(item, ascii_only=ascii_only) for item in value)}]"
        case float() if value == round(value, 2):
            return f"{value:.2f}"
        case _:
            return str(value)


def _in_quotes(char: str, ascii_only: bool) -> str:
    if char in '"\\':
        return f"\\{char}"
    return char if char.isprintable() and (char.isascii() or not ascii_only) else _escape(char)


def _escape(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
