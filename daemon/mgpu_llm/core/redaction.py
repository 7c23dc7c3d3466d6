"""What must not leave the host: tokens, keys and passwords, taken out of whatever is kept of a failed attempt.

Two ways together: values that are known to be secret, by the name of their variable or option, wherever they are found; and
what looks like a secret, whoever printed it. Every pattern is linear in the text: an engine may print anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from mgpu_llm.core.launch import SECRET

HIDDEN: Final = "..."
#: A shorter value would be found in innocent words, such as the "true" of a variable that only sounds secret.
SHORTEST: Final = 6
#: Values with these names are secret too, beside those of `launch.SECRET`.
_MORE_NAMES: Final = re.compile(r"[\w-]*(?:passwd|passphrase|credentials?|private[-_]key|authorization)", re.IGNORECASE)
#: The names above where they stand in a text, with what separates them from their value. From one start in each word only.
_NAME: Final = (
    r"[\w-]{0,64}?(?:api[-_]?key|token|secret|password|secret[-_]access[-_]key|passwd|passphrase|credentials?"
    r"|private[-_]key|signature)"
)
#: Written so that its first letter is searched for: one that ignored the case of that would be tried everywhere.
_ASSIGNED: Final = re.compile(
    r"(?P<name>[aAtTsSpPcC](?i:(?<=a)pi[-_]?key|(?<=t)oken|(?<=s)ecret(?:[-_]access[-_]key)?|(?<=s)ignature|(?<=p)assword"
    r"|(?<=p)asswd|(?<=p)assphrase|(?<=p)rivate[-_]key|(?<=c)redentials?)\\*[\"']?\s{0,8}[=:]\s{0,8})"
    r"(?:\[[^\]\n]{0,16384}\]?|\\*\"[^\"\n]{0,16384}\"?|\\*'[^'\n]{0,16384}'?|[^\s,;&\"')}\]]{1,16384})"
)
_OPTION: Final = re.compile(
    rf"(?P<name>(?<![\w-])--?{_NAME}[\"',]{{0,3}}\s{{1,8}}[\"']?)(?!-)[^\s\"',]+", re.IGNORECASE
)
_HEADER: Final = re.compile(
    r"(?P<name>(?<!\w)(?:proxy-)?authorization\\*[\"']?\s{0,8}[=:,]\s{0,8}\\*[\"']?)(?:\w{1,32}\s{1,8})?[^\s\"',]+",
    re.IGNORECASE,
)
_SCHEME: Final = re.compile(
    r"(?P<name>(?<!\w)(?:bearer\s{1,8}|basic\s{1,8}(?=[\w+/]{0,64}(?-i:[A-Z\d=]))))[\w.~+/=-]{8,}", re.IGNORECASE
)
_USER_OF_URL: Final = re.compile(r"(?P<name>://)[^\s/?#\"'<>]{1,512}(?=@)")
#: Hugging Face, OpenAI and those who took its form, GitHub, GitLab, NVIDIA, Slack, AWS, Google, JSON web tokens.
_TOKEN: Final = re.compile(
    r"(?<![\w-])(?P<name>hf_(?=[A-Za-z0-9]{10})|sk-(?=[\w-]{6})|gh[pousr]_|github_pat_|glpat-|nvapi-|xox[abprs]-|AKIA|ASIA|AIza"
    r"|eyJ(?=[\w-]{10}))[\w.-]{6,}"
)
#: What holds none of these, in small letters, has nothing for the patterns. Most lines of an engine have none.
_HINTS: Final = (
    "@", "api-key", "api_key", "apikey", "secret", "pass", "credential", "private", "signature", "authorization", "bearer",
    "basic",
)  # fmt: skip
_TOKEN_BEGINS: Final = re.compile(r"hf_|sk-|gh[pousr]_|github_pat_|glpat-|nvapi-|xox|AKIA|ASIA|AIza|eyJ")
#: That one is common in the lines of an engine: "tokens", "max_num_batched_tokens=8192", "tokenizer".
_TOKEN_NAMED: Final = re.compile(r"token(?:\\*[\"']?\s{0,8}[=:]|[\"',]{0,3}\s)")
_PATTERNS: Final = (_HEADER, _SCHEME, _USER_OF_URL, _OPTION, _ASSIGNED, _TOKEN)


def is_secret(name: str) -> bool:
    """Whether what a variable or an option of this name holds is secret."""
    return SECRET.fullmatch(name) is not None or _MORE_NAMES.fullmatch(name) is not None


def secrets_of(environment: Mapping[str, str], argv: Sequence[str]) -> frozenset[str]:
    """The secret values in an environment and a command line: of secret names, and the passwords of URLs."""
    found = {value for name, value in environment.items() if is_secret(name)}
    hiding = False
    for word in argv:
        option, _, value = word.partition("=")
        if word.startswith("-"):
            hiding = is_secret(option)
            found |= {value} if hiding else set()
        elif hiding:
            found.add(word)
    for text in (*environment.values(), *argv):
        if (user := re.search(r"://(.{1,512})@", text)) is not None:
            found |= {user[1], user[1].partition(":")[2]}
    lines = {line.strip() for value in found for line in (value, *value.splitlines())}
    return frozenset(line for line in lines if len(line) >= SHORTEST)


class Redactor:
    """Takes these secrets, and whatever looks like one, out of texts."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        forms = {form for secret in secrets for form in _forms(secret)}
        # The longest first: one secret may begin as another does.
        self._forms = tuple(sorted(forms, key=lambda form: (-len(form), form)))
        words = [re.escape(form) for form in self._forms]
        self._known = re.compile("|".join(words)) if words else None

    def text(self, text: str) -> str:
        """The text without secrets; it has as many lines as before."""
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        for pattern in _PATTERNS:
            text = pattern.sub(rf"\g<name>{HIDDEN}", text)
        return text

    def line(self, text: str) -> str:
        """As `text`, in a microsecond or two where there is nothing to hide."""
        # A progress bar's blocks would make each of the searches several times as slow.
        plain = text.encode("ascii", "replace").decode("ascii")
        small = plain.lower()
        for hint in _HINTS:
            if hint in small:
                return self.text(text)
        if _TOKEN_BEGINS.search(plain) or ("token" in small and _TOKEN_NAMED.search(small)):
            return self.text(text)
        for form in self._forms:
            if form in text:
                return self.text(text)
        return text

    def tree(self, value: Any) -> Any:
        """A JSON document without secrets: in its texts, and where a key says that its value is one."""
        match value:
            case str():
                return self.text(value)
            case Mapping():
                return {
                    self.text(str(key)): HIDDEN if isinstance(held, str) and is_secret(str(key)) else self.tree(held)
                    for key, held in value.items()
                }
            case list() | tuple():
                return [self.tree(held) for held in value]
            case _:
                return value


def argv(words: Sequence[str]) -> list[str]:
    """A command line without the values of secret options, word by word."""
    told, hiding = list[str](), False
    for word in words:
        option, _, value = word.partition("=")
        if word.startswith("-"):
            hiding = is_secret(option)
            told.append(f"{option}={HIDDEN}" if hiding and value else word)
        else:
            told.append(HIDDEN if hiding else word)
    return told


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables without the values of the secret ones."""
    return {name: HIDDEN if is_secret(name) else value for name, value in sorted(variables.items())}


def _forms(secret: str) -> set[str]:
    """How it may be printed: as it is, in a URL, in JSON, by Python's repr."""
    return {secret, quote(secret, safe=""), quote(secret), json.dumps(secret)[1:-1], repr(secret)[1:-1]}
