"""From which level on lines are told."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

import structlog

LEVELS: Final[Mapping[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def tell_from(level: str) -> None:
    """Tell what is of this level, or graver: debug, info, warning or error (KeyError otherwise: the config has checked it).
    Libraries are heard from warning on."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]))
    logging.getLogger().setLevel(max(LEVELS[level], logging.WARNING))
