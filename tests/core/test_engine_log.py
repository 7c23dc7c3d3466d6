"""Lines as five versions of vLLM print them, and what they say about the load."""

from __future__ import annotations

import pytest

from mgpu_llm.core.effects import Level
from mgpu_llm.core.engine_log import Facts, Line, Phase, facts, is_chatter, names_an_error, parse, wording
from mgpu_llm.core.status import Count


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param(
            "INFO 04-17 13:28:27 [api_server.py:1034] vLLM API server version 0.8.4",
            Line(process="", level=Level.INFO, message="vLLM API server version 0.8.4"),
            id="0.8.4 API server, no prefix",
        ),
        pytest.param(
            "(VllmWorker rank=1 pid=4242) WARNING 04-17 13:28:40 [custom_all_reduce.py:144] Custom allreduce is disabled",
            Line(process="VllmWorker", level=Level.WARNING, message="Custom allreduce is disabled"),
            id="0.8.4 worker",
        ),
        pytest.param(
            "(VllmWorkerProcess pid=4242) ERROR 04-17 13:28:40 [x.py:1] ValueError: no",
            Line(process="VllmWorkerProcess", level=Level.ERROR, message="ValueError: no"),
            id="0.8.4 V0 worker",
        ),
        pytest.param(
            "(EngineCore_DP0 pid=77) INFO 09-30 01:37:24 [core.py:77] Initializing a V1 LLM engine (v0.11.0) with config: x",
            Line(
                process="EngineCore_DP0",
                level=Level.INFO,
                message="Initializing a V1 LLM engine (v0.11.0) with config: x",
            ),
            id="0.11 engine core",
        ),
        pytest.param(
            "(Worker_TP0 pid=78) DEBUG 09-30 01:37:24 [distributed/.../parallel_state.py:1029] world_size=2 rank=0",
            Line(process="Worker_TP0", level=Level.DEBUG, message="world_size=2 rank=0"),
            id="0.11 debug line with a path",
        ),
        pytest.param(
            "(Worker_PP1_TP0 pid=78) INFO 01-02 03:04:05 [pynccl.py:111] vLLM is using nccl==2.27.5",
            Line(process="Worker_PP1_TP0", level=Level.INFO, message="vLLM is using nccl==2.27.5"),
            id="0.20 worker after distributed init",
        ),
        pytest.param(
            "(APIServer pid=702) INFO:     Application startup complete.",
            Line(process="APIServer", level=Level.INFO, message="Application startup complete."),
            id="0.26 uvicorn line with a prefix",
        ),
        pytest.param(
            "(VllmWorker-0 pid=5126) WARNING 11-22 10:34:16 [vllm.py:725] Model Runner V2 requires Triton",
            Line(process="VllmWorker-0", level=Level.WARNING, message="Model Runner V2 requires Triton"),
            id="0.32 worker before it has a name",
        ),
        pytest.param(
            "INFO:     Application startup complete.",
            Line(process="", level=Level.INFO, message="Application startup complete."),
            id="0.33 uvicorn line, bare",
        ),
        pytest.param(
            "(Worker_TP0 pid=1512) ",
            Line(process="Worker_TP0", level=Level.INFO, message=""),
            id="the blank line before a bar",
        ),
        pytest.param(
            "host:702:801 [0] NCCL INFO Bootstrap: Using eth0",
            Line(process="", level=Level.INFO, message="host:702:801 [0] NCCL INFO Bootstrap: Using eth0"),
            id="NCCL's own line",
        ),
        pytest.param(
            "AssertionError: Not enough allowed NUMA nodes",
            Line(process="", level=Level.ERROR, message="AssertionError: Not enough allowed NUMA nodes"),
            id="the end of a bare traceback",
        ),
        pytest.param(
            "vllm serve: error: unrecognized arguments: --x",
            Line(process="", level=Level.ERROR, message="vllm serve: error: unrecognized arguments: --x"),
            id="a usage error",
        ),
        pytest.param("INFO", Line(process="", level=Level.INFO, message="INFO"), id="a word that is no level"),
        pytest.param("", Line(process="", level=Level.INFO, message=""), id="nothing"),
    ],
)
def test_a_line_is_taken_apart_whatever_version_printed_it(text: str, line: Line) -> None:
    assert parse(text) == line


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
def test_every_level_of_the_engine_has_one_of_ours(level: str) -> None:
    ours = {"DEBUG": "debug", "INFO": "info", "WARNING": "warning", "ERROR": "error", "CRITICAL": "error"}
    assert parse(f"(Worker pid=1) {level} 11-22 10:00:00 [a.py:1] text").level == ours[level]


@pytest.mark.parametrize(
    ("message", "phase"),
    [
        ("vLLM API server version 0.8.4", Phase.BOOT),
        ("non-default args: {'model': '/models/m7b', 'tensor_parallel_size': 2}", Phase.BOOT),
        ("Initializing a V0 LLM engine (v0.8.4) with config: model='/models/m7b'", Phase.BOOT),
        ("Initializing a V1 LLM engine (v0.26.0) with config: model='/models/m7b'", Phase.BOOT),
        (
            "world_size=2 rank=0 local_rank=0 distributed_init_method=tcp://127.0.0.1:1 backend=nccl",
            Phase.DISTRIBUTED_INIT,
        ),
        ("vLLM is using nccl==2.21.5", Phase.DISTRIBUTED_INIT),
        ("rank 1 in world size 2 is assigned as DP rank 0, PP rank 0, TP rank 1", Phase.WEIGHTS),
        ("Starting to load model Qwen/Qwen2-7B...", Phase.WEIGHTS),
        ("Loading model from scratch...", Phase.WEIGHTS),
        ("Model loading took 7.1600 GiB and 4.705559 seconds", Phase.COMPILE),
        ("Model loading took 7.16 GiB memory and 4.705559 seconds", Phase.COMPILE),
        ("Using cache directory: /x/torch_compile_cache/a/rank_0_0 for vLLM's torch.compile", Phase.COMPILE),
        ("[backbone] Using cache directory: /x for vLLM's torch.compile", Phase.COMPILE),
        ("Dynamo bytecode transform time: 6.62 s", Phase.COMPILE),
        ("Warming up model for the compilation...", Phase.COMPILE),
        ("Available KV cache memory: 117.78 GiB", Phase.KV_CACHE),
        ("GPU KV cache size: 4,410,656 tokens", Phase.WARM_UP),
        (
            "CPU KV cache size: 1,048,576 tokens, Maximum concurrency for 512 tokens per request: 2048.00x",
            Phase.WARM_UP,
        ),
        ("Capturing cudagraphs for decoding. This may lead to unexpected consequences", Phase.WARM_UP),
        ("DeepGemm(fp8_gemm_nt) warmup (W=torch.Size([1, 2])):  10%", Phase.WARM_UP),
        ("JIT kernel warmup starting.", Phase.WARM_UP),
        ("Running FlashInfer autotune with 8192 tokens", Phase.WARM_UP),
        ("Compiling CuTeDSL kernels:  0%", Phase.WARM_UP),
        ("init engine (profile, create kv cache, warmup model) took 35.25 seconds", Phase.API),
        ("init engine (profile, create kv cache, warmup model) took 54.73 s (compilation: 25.02 s)", Phase.API),
        ("Starting vLLM API server on http://0.0.0.0:8000", Phase.API),
        ("Starting vLLM API server 0 on http://0.0.0.0:8000", Phase.API),
        ("Starting vLLM server on http://0.0.0.0:8000", Phase.API),
    ],
)
def test_a_message_tells_the_phase_that_it_begins(message: str, phase: Phase) -> None:
    assert facts(message) == Facts(phase=phase)


@pytest.mark.parametrize(
    "message", ["Application startup complete.", "Uvicorn running on http://0.0.0.0:8000 (Press CTRL+C)"]
)
def test_the_server_says_that_it_serves(message: str) -> None:
    assert facts(message) == Facts(phase=Phase.API, serving=True)


@pytest.mark.parametrize(
    ("message", "done", "total"),
    [
        ("Loading safetensors checkpoint shards:  38% Completed | 3/8 [00:01<00:02,  1.87it/s]", 3, 8),
        ("Loading safetensors checkpoint shards:   0% Completed | 0/4 [00:00<?, ?it/s]", 0, 4),
        ("Loading pt checkpoint shards: 100% Completed | 2/2 [00:00<00:00,  1.87it/s]", 2, 2),
        ("Loading np_cache checkpoint shards:  50% Completed | 1/2 [00:00<00:00,  1.87it/s]", 1, 2),
        ("Multi-thread loading shards:  25% Completed | 40/160 [00:09<00:27,  4.4it/s]", 40, 160),
        ("Loading safetensors using Runai Model Streamer:  10% Completed | 12/120 [00:09<00:27]", 12, 120),
    ],
)
def test_a_bar_of_shards_is_counted(message: str, done: int, total: int) -> None:
    said = facts(message)
    assert (said.phase, said.shards, said.graphs) == (Phase.WEIGHTS, Count(done=done, total=total), None)
    assert said.bar == (message.partition(":")[0], done)


@pytest.mark.parametrize(
    ("message", "done", "total"),
    [
        ("Capturing CUDA graphs (PIECEWISE):   4%|▍         | 2/51 [00:00<00:02, 18.56it/s]", 2, 51),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|██████████| 67/67 [00:05<00:00]", 67, 67),
        ("Capturing CUDA graph shapes:  31%|███▏      | 11/35 [00:06<00:13,  1.74it/s]", 11, 35),
    ],
)
def test_a_bar_of_graphs_is_counted(message: str, done: int, total: int) -> None:
    said = facts(message)
    assert (said.phase, said.shards, said.graphs) == (Phase.WARM_UP, None, Count(done=done, total=total))
    assert said.bar == (message.partition(":")[0], done)


@pytest.mark.parametrize(
    "message",
    [
        "",
        "Resolved architecture: Qwen2ForCausalLM",
        "Loading weights took 2.89 seconds",
        "Route: /health, Methods: GET",
        "Loading safetensors checkpoint shards",
        "Waiting for application startup.",
    ],
)
def test_other_messages_establish_nothing(message: str) -> None:
    assert facts(message) == Facts()


def test_phases_are_named_as_in_the_config() -> None:
    assert [phase.label for phase in Phase] == [
        "boot", "distributed-init", "weights", "compile", "kv-cache", "warm-up", "api"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        "No available shared memory broadcast block found in 60 seconds.",
        "Waiting for 1 local, 0 remote core engine proc(s) to start.",
        "Waiting for WorkerProc to startup...",
        "Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 0.0 tokens/s",
        '127.0.0.1:58828 - "GET /metrics HTTP/1.1" 200 OK',
        '127.0.0.1:58828 - "GET /ping?x=1 HTTP/1.1" 200 OK',
    ],
)
def test_lines_that_tick_on_while_nothing_moves_are_chatter(message: str) -> None:
    assert is_chatter(message)


@pytest.mark.parametrize(
    "message",
    [
        "Loading safetensors checkpoint shards:  38% Completed | 3/8",
        "Route: /health, Methods: GET",
        "Waiting for application startup.",
        '127.0.0.1:1 - "POST /v1/completions HTTP/1.1" 200 OK',
        "",
    ],
)
def test_lines_of_work_are_not_chatter(message: str) -> None:
    assert not is_chatter(message)


def test_numbers_and_addresses_do_not_make_a_new_wording() -> None:
    assert wording("rank 1 at 0x7fAB waits 30 s") == wording("rank 2 at 0x11 waits 60 s")
    assert wording("rank 1 waits") != wording("rank 1 works")


@pytest.mark.parametrize(
    "message",
    [
        "ValueError: Free memory on device cuda:1",
        "torch.OutOfMemoryError: CUDA out of memory.",
        "torch.distributed.DistBackendError: NCCL error in: x.cpp:1",
        "AssertionError",
        "Exception: WorkerProc initialization failed",
        "  RuntimeError: indented",
        "Value error, User-specified max_model_len (99999) is greater than the derived max_model_len (2048)",
        "  Assertion failed, world size",
        "vllm: error: argument --port: invalid int value: 'x'",
        "vllm serve: error: unrecognized arguments: --x",
        "api_server.py: error: unrecognized arguments: --x",
    ],
)
def test_a_line_that_names_an_exception_or_a_usage_error_names_an_error(message: str) -> None:
    assert names_an_error(message)


@pytest.mark.parametrize(
    "message",
    [
        "",
        "Traceback (most recent call last):",
        '  File "core.py", line 1',
        "    raise RuntimeError(",
        "EngineCore failed to start.",
        "This can cause fd limit errors like `OSError: [Errno 24] Too many open files`.",
        "talk of a Value error, and then nothing",
        "Error retrieving safetensors: Repo id must be in the form",
    ],
)
def test_the_traceback_around_an_error_and_talk_about_errors_do_not_name_one(message: str) -> None:
    assert not names_an_error(message)


@pytest.mark.parametrize(
    "message",
    [
        f"Loading safetensors checkpoint shards: 0% Completed | 1/{'9' * 5000}",
        f"Capturing CUDA graphs: 0%| | {'9' * 5000}/4",
        "Capturing CUDA graph" * 100 + "1" * 6000,
    ],
)
def test_a_count_of_thousands_of_digits_is_none(message: str) -> None:
    assert facts(message).shards is None
    assert facts(message).graphs is None
