"""What must not be printed: keys, tokens and passwords, by the names of options and by what values look like."""

from __future__ import annotations

import re
from typing import Final

from mgpu_llm.xinference.command import OPTIONS
from mgpu_llm.xinference.tables import options

_NAME: Final = re.compile(r"passw|secret|credential|auth|api[-_]?key|(?:^|[-_])key|token(?!i[sz]|s)", re.IGNORECASE)
_VALUE: Final = re.compile(
    r"""://[^/\s]*@"""  # https://user:password@host
    r"""|(?:api[-_]?key|access[-_]?key|secret|passwd|password|token)["']?\s*[:=]"""
    r"""|\b(?:hf_|sk-|xi-|ghp_|eyJ)[\w-]{12,}""",
    re.IGNORECASE,
)
_RANDOM: Final = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w.+=-]{12,}")
#: Options that are known to hold one; all others that are known hold none, whatever "token" is in their name.
_HOLD: Final = ("api-key", "hf_token")


def hides(name: str, value: str) -> bool:
    """Whether an option or variable of that name and value may hold a secret."""
    if name in _HOLD or _VALUE.search(value):
        return True
    return name not in OPTIONS and name not in options() and _NAME.search(name) is not None


def hides_word(word: str) -> bool:
    """Whether a word may be a secret of which nobody knows what it belongs to."""
    return _VALUE.search(word) is not None or _RANDOM.fullmatch(word) is not None
