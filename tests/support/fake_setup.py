"""The config under which mgpud runs the fake engine: a load of a third of a second, short pauses, a long patience.

A test of a stall shortens the patience of the phase that it is about, so that a slow machine upsets no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.fake_engine import COMMAND
from tests.support.toy_setup import Trial

#: What config.json says where a test says nothing else: tensor parallel 2 and 1 fit.
MODEL: Final[Mapping[str, object]] = {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2}
PHASES: Final = ("boot", "distributed_init", "weights", "compile", "kv_cache", "warm_up", "api")
SETTINGS: Final[Mapping[str, object]] = {
    "model.served_name": "toy",
    "engine.command": [*COMMAND, "serve"],
    "gpus.use": "none",
    "gpus.tensor_parallel": 2,
    **{f"patience.{phase}": 30 for phase in PHASES},
    "serving.probe_interval": 0.3,
    "retries.backoff": 0.2,
    "retries.backoff_ceiling": 1,
    "retries.jitter": 0,
    "stop.grace": 15,
    "stop.kill_deadline": 15,
    "metrics.listen": "off",
}


@dataclass(frozen=True, kw_only=True)
class FakeSetup(Trial):
    """A trial of the fake engine; `scenario` is what that does (see fake_engine_scenario).

    `settings` are laid over SETTINGS by dotted key, a None takes a key out; `tables` is TOML that follows them.
    """

    scenario: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    tables: str = ""

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def memory(self) -> list[Path]:
        """What engines of this setup have in shared memory."""
        return list(Path("/dev/shm").glob(f"psm_fake{self.port}_*"))

    def write(self) -> Path:
        """Write model and config, and return the config's path."""
        self.model.mkdir(parents=True, exist_ok=True)
        (self.model / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
        self.config_file.write_text(self.toml(), encoding="utf-8")
        return self.config_file

    def toml(self) -> str:
        own = {
            "model.path": str(self.model),
            "engine.port": self.port,
            "engine.env.FAKE_ENGINE": f"load_s=0.3; {self.scenario}",
            "gpus.lock_dirs": [str(self.folder)],
            "daemon.runtime_dir": str(self.runtime_dir),
            "daemon.state_dir": str(self.state_dir),
        }
        # A number, a string or an array of them is written in TOML as in JSON.
        lines = [
            f"{key} = {json.dumps(value)}\n"
            for key, value in {**SETTINGS, **own, **self.settings}.items()
            if value is not None
        ]
        return "".join(lines) + self.tables
