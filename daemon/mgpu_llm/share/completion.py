"""Completion for shells, as click makes it: the scripts ask the program itself what may follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import click
from click.shell_completion import get_completion_class

#: Where a shell looks below share/ for the completion of a program.
PLACES: Final = {
    "bash": "bash-completion/completions/{}",
    "zsh": "zsh/site-functions/_{}",
    "fish": "fish/vendor_completions.d/{}.fish",
}


def scripts(programs: Mapping[str, click.Command]) -> Iterator[tuple[str, str]]:
    """Places below share/ and what belongs there, for each program and shell."""
    for program, command in programs.items():
        for shell, place in PLACES.items():
            made = get_completion_class(shell)
            if made is None:
                raise LookupError(f"click knows no completion for {shell}")
            # The variable by which the program knows that it is asked; click looks for one of this name.
            asked = f"_{program.upper()}_COMPLETE"
            # click's own source() would look for bash first, to warn of an old one; who builds this needs none.
            text = made.source_template % made(command, {}, program, asked).source_vars()
            yield place.format(program), text
