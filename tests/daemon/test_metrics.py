"""The metrics of daemons that live, and what alerts, dashboard and documentation say of them."""

from __future__ import annotations

import os
import signal
import socket
import time
import tomllib
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, fact, until
from tests.support.fake_engine import COMMAND
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.monitoring import exprs, label_values_in, metrics_in, needs_promtool, promtool
from tests.support.toy_setup import ROOT, free_port

GIB = 1 << 30
#: An engine of which every attempt but the first takes its time.
SLOW_AGAIN = 'case "$MGPU_LLM_ENGINE" in *:1:*) ;; *) export FAKE_ENGINE="load_s=30" ;; esac; exec "$0" "$@"'
#: Of Prometheus itself, about each target.
OWN = frozenset({"up"})

Page = dict[tuple[str, frozenset[tuple[str, str]]], float]


def address_of(life: Life) -> str:
    listen: str = tomllib.loads(life.setup.config_file.read_text())["metrics"]["listen"]
    return listen


def page_of(life: Life) -> str:
    life.wait_log("metrics.serving")
    url = f"http://{address_of(life)}/metrics"
    with urllib.request.urlopen(url, timeout=LIMIT_S) as answer:
        text: str = answer.read().decode()
    return text


def scraped(text: str) -> Page:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def value(page: Page, name: str, **labels: str) -> float:
    return page[f"mgpu_llm_{name}", frozenset(labels.items())]


def when(life: Life, what: str, at_least: float = 0.0) -> str:
    """The first page on which this metric has such a value."""
    pages = list[str]()

    def shows() -> bool:
        pages.append(page_of(life))
        return any(name == f"mgpu_llm_{what}" and now >= at_least for (name, _), now in scraped(pages[-1]).items())

    until(f"{what} on the page", shows, life.log)
    return pages[-1]


class Lives(NamedTuple):
    """They run side by side from the beginning of the module."""

    loading: Life
    degraded: Life
    dying: Life
    crowded: Life


@pytest.fixture(scope="module")
def lives(begin_for_module: Begin, tmp_path_factory: pytest.TempPathFactory, library: Path) -> Lives:
    nvml = FakeNvml(tmp_path_factory.mktemp("driver"), library)
    nvml.set([FakeGpu(), FakeGpu(used_bytes=3 * GIB)])
    on_gpus = {"gpus.use": [0, 1], "gpus.tensor_parallel": None, "gpus.shared": True, "preflight.mode": "off"}
    here = [{"metrics.listen": f"127.0.0.1:{free_port()}"} for _ in range(3)]
    lives = (
        begin_for_module("hang-weights", {**on_gpus, **here[0], "patience.weights": 600}, nvml.environment()),
        begin_for_module("oom unless utilisation<=0.85", {**on_gpus, **here[1]}, nvml.environment()),
        begin_for_module("", {**here[2], "engine.command": ["/bin/sh", "-c", SLOW_AGAIN, *COMMAND, "serve"]}),
    )
    lives[0].wait_log("metrics.serving")
    return Lives(*lives, crowded=begin_for_module(settings=here[0]))


@pytest.fixture(scope="module")
def pages(lives: Lives) -> dict[str, str]:
    """The text of a page of each life, in the middle of what it is there for."""
    when(lives.loading, "phase_progress_ratio")
    when(lives.loading, "gpu_memory_used_bytes")
    os.kill(lives.dying.ready()["pid"], signal.SIGKILL)
    lives.degraded.ready()
    when(lives.degraded, "ready_total", 1.0)
    return {
        "loading": when(lives.loading, "gpu_memory_used_bytes"),
        "degraded": when(lives.degraded, "gpu_memory_used_bytes"),
        "dying": when(lives.dying, "load_left_seconds"),
    }


def test_a_load_tells_its_phase_how_far_it_is_and_the_memory_of_its_gpus(pages: dict[str, str]) -> None:
    page = scraped(pages["loading"])
    assert value(page, "state", state="starting") == value(page, "phase", phase="weights") == 1.0
    assert value(page, "state", state="ready") == value(page, "phase", phase="boot") == 0.0
    assert value(page, "phase_progress_ratio") == 0.25
    assert value(page, "patience_seconds") == 600.0
    assert 0.0 < value(page, "load_elapsed_seconds") < LIMIT_S
    used = {
        dict(labels)["gpu"]: now for (name, labels), now in page.items() if name == "mgpu_llm_gpu_memory_used_bytes"
    }
    assert sorted(used) == ["0", "1"]
    assert used["1"] == 3 * GIB
    assert value(page, "gpu_out", gpu="0") == value(page, "gpu_out", gpu="1") == 0.0
    assert value(page, "ready_total") == 0.0


def test_a_service_on_a_rung_tells_the_rung_and_what_it_took(pages: dict[str, str], lives: Lives) -> None:
    page = scraped(pages["degraded"])
    assert value(page, "state", state="ready") == value(page, "degraded") == 1.0
    assert value(page, "rung_info", rung="utilisation-0.85") == 1.0
    assert value(page, "attempts_total", outcome="crashed", cause="cuda-out-of-memory") == 1.0
    assert (value(page, "engine_starts_total"), value(page, "ready_total")) == (2.0, 1.0)
    assert value(page, "time_to_ready_seconds") > value(page, "load_seconds") > 0.0
    [ready] = lives.degraded.told("engine.ready")
    assert value(page, "load_seconds") == pytest.approx(float(fact(ready, "after_s")), abs=0.06)
    assert value(page, "model_info", model="toy", url=lives.degraded.setup.url) == 1.0
    [started] = lives.degraded.told("daemon.started")
    assert value(page, "build_info", version=fact(started, "version")) == 1.0


def test_a_death_is_counted_and_the_next_load_says_how_long_it_will_take(pages: dict[str, str]) -> None:
    page = scraped(pages["dying"])
    assert value(page, "state", state="starting") == 1.0
    assert (value(page, "engine_deaths_total"), value(page, "ready_total")) == (1.0, 1.0)
    assert value(page, "attempts_total", outcome="died", cause="died-while-serving") == 1.0
    assert 0.0 <= value(page, "load_left_seconds") <= value(page, "load_seconds")
    assert value(page, "degraded") == 0.0


def test_a_port_that_is_taken_is_one_warning_and_the_model_is_served(lives: Lives) -> None:
    lives.crowded.ready()
    lives.crowded.wait_log("metrics.unavailable")
    [line] = lives.crowded.told("metrics.unavailable")
    assert fact(line, "why") == f"mgpud (pid {lives.loading.process.pid}) has the port"
    assert fact(line, "advice") == 'set metrics.listen to another address, or to \\"off\\"'
    assert lives.crowded.status()["state"] == "ready"


def test_clients_that_never_finish_a_request_hold_up_neither_the_daemon_nor_its_metrics(lives: Lives) -> None:
    life = lives.degraded
    life.ready()
    port = int(address_of(life).rpartition(":")[2])
    with ExitStack() as stack:
        for number in range(300):
            rude = stack.enter_context(socket.create_connection(("127.0.0.1", port), LIMIT_S))
            rude.sendall(b"GET /metrics HTTP/1.1\r\n"[: number % 20])
        begun = time.monotonic()
        assert life.status()["state"] == "ready"
        assert value(scraped(page_of(life)), "state", state="ready") == 1.0
        assert time.monotonic() - begun < 4.0  # within what mgpuctl waits
        files = list(Path(f"/proc/{life.process.pid}/fd").iterdir())
        assert len(files) < 300
    assert not life.told("library.message")


def test_all_that_is_on_a_page_is_in_the_documentation(pages: dict[str, str]) -> None:
    documented = (ROOT / "docs/metrics.md").read_text()
    for name in {name for text in pages.values() for name, _ in scraped(text)}:
        assert f"`{name}`" in documented or name.startswith(("process_", "python_info")), name


def test_every_metric_and_label_that_alerts_and_dashboard_ask_for_is_on_a_real_page(pages: dict[str, str]) -> None:
    keys = {key for text in pages.values() for key in scraped(text)}
    there = {name for name, _ in keys} | OWN
    for where, expr in exprs():
        assert metrics_in(expr) <= there, where
        for name, label, wanted in label_values_in(expr):
            assert wanted <= {dict(labels)[label] for metric, labels in keys if metric == name}, where


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_pages(pages: dict[str, str]) -> None:
    for text in pages.values():
        assert promtool("check", "metrics", given=text) == ""
