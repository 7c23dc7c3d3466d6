"""The config under which mgpud runs the real vLLM on this machine's CPU with a toy checkpoint, tensor parallel 2."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINE_PYTHON = ROOT / ".engine/bin/python"
CHECKPOINT = ROOT / "build/toy-model"

#: Small: a context that a small KV cache holds.
SMALL_ARGS = (
    "--max-model-len", "256",
    "--max-num-seqs", "4",
    "--kv-cache-memory-bytes", "16M",
)  # fmt: skip
#: And quick: nothing compiled, no graphs.
ENGINE_ARGS = ("--enforce-eager", *SMALL_ARGS)
ENGINE_ENV: Mapping[str, str] = {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Where a trial daemon keeps its files, and where its engine listens."""

    folder: Path
    port: int = field(default_factory=free_port)

    @property
    def config_file(self) -> Path:
        return self.folder / "mgpu-llm.toml"

    @property
    def runtime_dir(self) -> Path:
        return self.folder / "run"

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    @property
    def socket(self) -> Path:
        return self.runtime_dir / "control.sock"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Setup(Trial):
    """A trial of the real vLLM. `env` and `args` are added to the engine's. Where it is not `eager` its compiler is off all the
    same (TORCH_COMPILE_DISABLE): it starts as soon."""

    env: Mapping[str, str] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    eager: bool = True
    tensor_parallel: int = 2

    def write(self) -> Path:
        """Write the config file and return its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(self.toml(self.runtime_dir), encoding="utf-8")
        return self.config_file

    def toml(self, runtime_dir: Path) -> str:
        env = "\n".join(f"{name} = {json.dumps(value)}" for name, value in {**ENGINE_ENV, **self.env}.items())
        return f"""\
[model]
path = {json.dumps(str(CHECKPOINT))}
served_name = "toy"

[engine]
python = {json.dumps(str(ENGINE_PYTHON))}
port = {self.port}
args = {json.dumps([*(ENGINE_ARGS if self.eager else SMALL_ARGS), *self.args])}

[engine.env]
{env}

[gpus]
use = "none"
tensor_parallel = {self.tensor_parallel}

[metrics]
listen = "off"

[daemon]
runtime_dir = {json.dumps(str(runtime_dir))}
state_dir = {json.dumps(str(self.state_dir))}
"""


def make_checkpoint() -> Path:
    """Write the toy checkpoint unless it is there."""
    script = ROOT / "tests/support/toy_model.py"
    subprocess.run([sys.executable, str(script), str(CHECKPOINT)], check=True, stdout=subprocess.DEVNULL)
    return CHECKPOINT
