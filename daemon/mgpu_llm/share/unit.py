"""The page of the unit: its own comments, each with the settings that follow."""

from __future__ import annotations

import re

from mgpu_llm.config.descriptions import reflowed
from mgpu_llm.share.roff import Page

ABOUT = """\
`mgpu-llm.service` runs mgpud(8) with /etc/mgpu-llm/mgpu-llm.toml. `mgpu-llm@NAME.service` is made of it, and runs one of several
instances: with /etc/mgpu-llm/NAME.toml, in /run/mgpu-llm@NAME and /var/lib/mgpu-llm@NAME.

What follows is the unit as it was installed. `systemctl edit mgpu-llm` changes it."""


def page(unit: str, version: str) -> Page:
    """`unit` is the text of the unit's file."""
    made = Page("mgpu-llm.service", 8, version, "the units of mgpu-llm")
    made.section("SYNOPSIS")
    made.as_it_is(["mgpu-llm.service", "mgpu-llm@.service"])
    made.section("DESCRIPTION")
    made.text(re.sub(r"(?<!\n)\n(?!\n)", " ", ABOUT))
    comment, settings = list[str](), list[str]()
    for line in [*unit.splitlines(), ""]:
        if (comment or settings) and (not line or line.startswith("[") or (line.startswith("#") and settings)):
            made.text(reflowed(comment))
            if settings:
                made.as_it_is(settings)
            comment, settings = [], []
        if line.startswith("["):
            made.section(line)
        elif line.startswith("#"):
            comment.append(line.removeprefix("#").removeprefix(" "))
        elif line:
            settings.append(line)
    return made
