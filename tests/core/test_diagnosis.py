"""One cause at a time: the words that name it, words like them that must not, and which cause wins."""

from __future__ import annotations

import pytest

from mgpu_llm.core import diagnosis
from mgpu_llm.core.diagnosis import Clue, Diagnosis, look, of_death, of_exit, of_spawn, of_stall
from mgpu_llm.core.engine_log import Phase, parse
from mgpu_llm.core.remedies import DEFAULT_ORDER, Want
from mgpu_llm.core.stall import Stalled
from tests.core.world import BAD_FLAG, NOT_FREE, OUT_OF_MEMORY
from tests.support import recordings


def clue_of(*texts: str) -> Clue:
    clue = Clue()
    for text in texts:
        clue = look(clue, parse(text))
    return clue


def found(*texts: str) -> Diagnosis:
    return of_exit(1, Phase.WEIGHTS, clue_of(*texts), retries=1)


MATCHES = {
    "gpu-not-free": [
        NOT_FREE,
        "ValueError: Free memory on device (10.2/79.11 GiB) on startup is less than desired GPU memory utilization "
        "(0.9, 71.2 GiB).",
    ],
    "no-kv-memory": [
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "ValueError: To serve at least one request with the models's max seq len (32768), 7.00 GiB KV cache is needed, which is "
        "larger than the available KV cache memory (3.10 GiB).",
    ],
    "cuda-out-of-memory": [
        OUT_OF_MEMORY,
        "RuntimeError: CUDA error: out of memory",
        "torch.cuda.OutOfMemoryError: allocation failed",
    ],
    "port-in-use": [
        "OSError: [Errno 98] Address already in use",
        "(APIServer pid=702) ERROR:    [Errno 98] error while attempting to bind on address ('0.0.0.0', 8000)",
    ],
    "bad-arguments": [
        BAD_FLAG,
        "api_server.py: error: argument --port: invalid int value: 'x'",
        "vllm serve: error: ambiguous option: --max could match --max-model-len, --max-num-seqs",
        "vllm serve: error: the following arguments are required: --x",
    ],
    "model-not-found": [
        "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/x/y/z'",
        "OSError: no/such is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'",
        "(EngineCore pid=9) ERROR 11-22 10:00:00 [core.py:1] Repository Not Found for url: https://huggingface.co/api/models/no/such.",
        "(APIServer pid=702) huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1-6)",
        "ValueError: Invalid repository ID or local directory specified: '/models/none'.",
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder",
        "RuntimeError: Cannot find any model weights with `/models/empty`",
    ],
    "model-files-damaged": [
        "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer",
        "_pickle.UnpicklingError: invalid load key, 'v'.",
        "RuntimeError: Weight files referenced in index but missing on disk: model-00002-of-00004.safetensors",
    ],
    "model-refused": [
        "(APIServer pid=702)   Value error, Total number of attention heads (28) must be divisible by tensor parallel size (3).",
        "  Value error, User-specified max_model_len (99999) is greater than the derived max_model_len",
        "ValueError: User-specified max_model_len (99999) is greater than the derived max_model_len",
        "ValueError: Model architectures ['NewForCausalLM'] are not supported for now.",
        "(EngineCore pid=9) ERROR 11-22 10:00:00 [core.py:1] Please pass the argument `trust_remote_code=True` to allow custom "
        "code to be run.",
        "ValueError: The repository /models/own contains custom code which must be executed to correctly load the model.",
        "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0.",
    ],
    "driver": [
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).",
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        "RuntimeError: CUDA error: CUDA driver version is insufficient for CUDA runtime version",
    ],
}
#: Lines of healthy starts, and lines that only resemble a cause.
QUIET = {
    "gpu-not-free": [
        "(Worker_TP0 pid=1512) INFO 11-22 10:21:38 [gpu_worker.py:857] Free memory on device (138.34/139.8 GiB) on startup. "
        "Desired GPU memory utilization is (0.9, 125.82 GiB)."
    ],
    "no-kv-memory": ["INFO 11-22 10:21:31 [gpu_worker.py:560] Available KV cache memory: 117.78 GiB"],
    "cuda-out-of-memory": [
        "WARNING 02-22 19:54:23 [arg_utils.py:1161] The model has a long context length (131072). This may cause OOM errors "
        "during the initial memory profiling phase",
        "(Worker_TP0 pid=9) WARNING 11-22 10:00:00 [x.py:1] CUDA out of memory while profiling, trying a smaller batch",
        "(Worker_TP0 pid=9) INFO 11-22 10:00:00 [x.py:1] caught CUDA out of memory, retrying",
        "CUDA out of memory",
    ],
    "port-in-use": ["WARNING 11-22 10:00:00 [x.py:1] fd limit errors like `OSError: [Errno 24] Too many open files`"],
    "bad-arguments": ["INFO 11-22 10:00:00 [x.py:1] non-default args: {'arguments': 'unrecognized'}"],
    "model-not-found": [
        "ERROR 09-30 01:37:24 [config.py:133] Error retrieving safetensors: Repo id must be in the form 'repo_name' or "
        "'namespace/repo_name': '/models/m7b'. Use `repo_type` argument if needed., retrying 1 of 2",
        "ERROR 09-30 01:37:26 [config.py:131] Error retrieving file list: Repo id must be in the form 'repo_name'",
    ],
    "model-files-damaged": ["INFO 11-22 10:00:00 [x.py:1] Loading safetensors checkpoint shards:   0% Completed | 0/4"],
    "model-refused": [
        "INFO 11-22 10:00:00 [core.py:116] Initializing a V1 LLM engine (v0.26.0) with config: model='/m', "
        "tokenizer_revision=None, trust_remote_code=True, dtype=torch.bfloat16",
        "INFO 11-22 10:00:00 [x.py:1] Resolved architecture: Qwen2ForCausalLM",
    ],
    "driver": ["INFO 11-22 10:00:00 [pynccl.py:113] vLLM is using nccl==2.28.9"],
}


def test_every_cause_has_words_that_name_it_and_words_that_do_not() -> None:
    causes = {row.reported_as for row in diagnosis.TABLE}
    assert set(MATCHES) == set(QUIET)
    assert set(MATCHES) <= causes


@pytest.mark.parametrize(("cause", "text"), [(cause, text) for cause, texts in MATCHES.items() for text in texts])
def test_the_words_of_a_cause_name_it(cause: str, text: str) -> None:
    diagnosed = found(text)
    assert diagnosed.cause == cause
    assert diagnosed.advice
    assert "{" not in diagnosed.summary
    assert diagnosed.outcome == ("refused" if Want.STOP in diagnosed.wants else "crashed")
    assert parse(text).message.strip()[:80] in diagnosed.evidence[0]


@pytest.mark.parametrize("text", [text for texts in QUIET.values() for text in texts])
def test_words_that_only_resemble_a_cause_name_none(text: str) -> None:
    assert clue_of(text) == Clue()


@pytest.mark.parametrize("name", [name for name in recordings.names() if name in recordings.expected()])
def test_no_line_of_a_recorded_start_names_a_cause_unless_it_failed_of_it(name: str) -> None:
    expected = recordings.expected()[name]
    # What is no cause of the engine's own words is how it ended, or where it stood still.
    unnamed = ("engine-exited", "worker-vanished")
    named = expected.cause if expected.outcome == "crashed" and expected.cause not in unnamed else ""
    assert clue_of(*recordings.load(name).lines).cause == named


def test_unknown_errors_are_told_in_the_engines_own_words_and_may_be_cured_by_any_rung() -> None:
    diagnosed = found("(Worker pid=1) ERROR 11-22 10:00:00 [x.py:1] ZeroDivisionError: division by zero")
    assert diagnosed.cause == "engine-exited"
    assert diagnosed.summary == "the engine ended in weights with exit code 1: ZeroDivisionError: division by zero"
    assert diagnosed.wants == (Want.PLAIN_RETRY, *DEFAULT_ORDER)
    assert not diagnosed.hopeless


def test_an_engine_that_ends_without_a_word_is_diagnosed_all_the_same() -> None:
    assert found().summary == "the engine ended in weights with exit code 1"
    assert found().evidence == ()


def test_the_first_root_cause_stands_and_what_follows_it_is_its_consequence() -> None:
    texts = (NOT_FREE, OUT_OF_MEMORY, "OSError: [Errno 98] Address already in use")
    assert found(*texts).cause == "gpu-not-free"


def test_a_named_cause_wins_over_an_error_that_came_before_it() -> None:
    clue = clue_of("KeyError: 'x'", NOT_FREE)
    assert clue.cause == "gpu-not-free"
    assert clue.error == "KeyError: 'x'"


def test_an_error_after_the_named_cause_is_not_lost_where_none_was_known() -> None:
    clue = look(Clue(cause="driver", line="x"), parse("KeyError: 'later'"))
    assert clue == Clue(cause="driver", line="x", error="KeyError: 'later'")


def test_lines_that_only_pass_an_error_on_are_never_the_cause() -> None:
    clue = clue_of(
        "Exception: WorkerProc initialization failed due to an exception in a background process.",
        "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    )
    assert (clue.cause, clue.line, clue.error) == ("", "", "")
    assert clue_of(clue.cascade, NOT_FREE).cause == "gpu-not-free"


def test_a_line_of_level_error_names_a_cause_but_is_no_error_of_its_own() -> None:
    traceback = '(Worker pid=9) ERROR 11-22 10:00:00 [x.py:1]   File "/opt/vllm/worker.py", line 1, in load'
    assert clue_of(traceback) == Clue()
    said = "(Worker pid=9) ERROR 11-22 10:00:00 [x.py:1] the allocator reports: CUDA out of memory"
    expected = "the allocator reports: CUDA out of memory"
    assert clue_of(traceback, said) == Clue(cause="cuda-out-of-memory", line=expected, process="Worker", error=expected)


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING"])
def test_what_the_engine_survives_with_a_warning_does_not_hide_the_cause_that_ends_it(level: str) -> None:
    survived = f"(Worker pid=9) {level} 11-22 10:00:00 [x.py:1] CUDA out of memory, falling back"
    assert clue_of(survived) == Clue()
    assert found(survived, NOT_FREE).cause == "gpu-not-free"


def test_the_recorded_refusal_is_diagnosed_by_its_assertion_and_not_by_the_cascade_after_it() -> None:
    diagnosed = found(*recordings.load("cpu-tp2-omp-error").lines)
    assert diagnosed.cause == "engine-exited"
    assert "AssertionError: Not enough allowed NUMA nodes to bind threads of 2 local CPUWorkers" in diagnosed.summary


def test_the_recorded_loss_of_a_gpu_is_diagnosed_with_its_figures() -> None:
    diagnosed = found(*recordings.load("h200-tp2-gpu-taken").lines)
    assert diagnosed.summary == "GPU memory is not free: 107.83 of 139.8 GiB, less than utilisation 0.9 asks for"
    assert diagnosed.wants == (Want.PLAIN_RETRY, Want.PLAIN_RETRY, Want.OTHER_GPU, Want.MEMORY_LOWER, Want.FEWER_GPUS)
    assert diagnosed.figures == {"free": 107.83, "total": 139.8, "asked": 0.9, "device": 1.0}
    assert diagnosed.rank == 1


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(("spinning", "words"), [(True, ", while something spins"), (False, ""), (None, "")])
def test_a_stall_is_named_after_its_phase_and_says_whether_something_spins(
    phase: Phase, spinning: bool | None, words: str
) -> None:
    stalled = Stalled(phase=phase, idle_s=15.2, patience_s=15.0, spinning=spinning, evidence=("seen",))
    diagnosed = of_stall(stalled, Clue())
    assert diagnosed.cause == f"stalled-in-{phase.label}"
    assert diagnosed.outcome == "stalled"
    assert diagnosed.summary == f"stalled in {phase.label}: nothing moved for 15 s{words}"
    assert diagnosed.advice
    assert diagnosed.evidence == ("seen",)
    assert set(diagnosed.wants) >= {Want.TRANSPORT, Want.FEWER_GPUS}
    assert (Want.MEMORY_LOWER in diagnosed.wants) == (phase is not Phase.DISTRIBUTED_INIT), "there is none in use yet"
    assert not diagnosed.hopeless


SILENCE = Stalled(phase=Phase.COMPILE, idle_s=30.0, patience_s=30.0, spinning=None, evidence=("seen",))


def test_a_cause_that_the_engine_named_explains_the_silence_after_it() -> None:
    assert of_stall(SILENCE, clue_of(NOT_FREE)) == found(NOT_FREE)
    assert of_stall(SILENCE, clue_of(NOT_FREE)).cause == "gpu-not-free"


@pytest.mark.parametrize("cause", [cause for cause, texts in MATCHES.items() if found(texts[0]).hopeless])
def test_a_silence_after_a_hopeless_cause_is_a_stall_that_names_the_error_and_may_be_cured(cause: str) -> None:
    text = MATCHES[cause][0]
    diagnosed = of_stall(SILENCE, clue_of(text))
    assert diagnosed.cause == "stalled-in-compile"
    assert diagnosed.outcome == "stalled"
    assert set(diagnosed.wants) >= set(DEFAULT_ORDER)
    assert diagnosed.evidence == ("seen", f'error before: "{parse(text).message.strip()}"')


def test_a_death_without_an_error_says_what_was_seen_and_may_be_cured_by_any_rung() -> None:
    diagnosed = of_death("3 health probes in a row failed", Clue())
    assert diagnosed.cause == "died-while-serving"
    assert diagnosed.summary == "3 health probes in a row failed"
    assert diagnosed.evidence == ()
    assert diagnosed.outcome == "died"
    assert diagnosed.wants == DEFAULT_ORDER
    assert "Xid" in diagnosed.advice


def test_a_death_of_a_named_cause_has_its_advice_and_its_cures() -> None:
    diagnosed = of_death("it ended", clue_of(OUT_OF_MEMORY))
    assert (diagnosed.cause, diagnosed.outcome, diagnosed.hopeless) == ("cuda-out-of-memory", "died", False)
    assert diagnosed.wants == (Want.MEMORY_LOWER,)
    assert diagnosed.advice == of_exit(1, Phase.COMPILE, clue_of(OUT_OF_MEMORY), retries=1).advice
    assert diagnosed.summary.startswith("it ended: torch.OutOfMemoryError: CUDA out of memory")
    assert diagnosed.evidence == (f'error: "{parse(OUT_OF_MEMORY).message}"',)


def test_a_death_of_a_cause_without_cures_is_hopeless_no_more_and_any_rung_may_help() -> None:
    diagnosed = of_death("it ended", clue_of("RuntimeError: CUDA error: no kernel image is available for execution"))
    assert (diagnosed.cause, diagnosed.wants, diagnosed.hopeless) == ("driver", DEFAULT_ORDER, False)


@pytest.mark.parametrize(("hopeless", "retries"), [(True, 0), (False, 2)])
def test_an_engine_that_never_came_to_be_is_not_cured_by_a_rung(hopeless: bool, retries: int) -> None:
    diagnosed = of_spawn("cannot spawn '/x': no such file", hopeless=hopeless)
    assert diagnosed.wants.count(Want.PLAIN_RETRY) == retries
    assert set(diagnosed.wants) <= {Want.PLAIN_RETRY, Want.STOP}
    assert diagnosed.hopeless is hopeless


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit code 0"), (137, "exit code 137"), (-9, "signal 9 (SIGKILL)"), (-250, "signal 250")],
)
def test_the_end_of_a_process_is_told_in_words(status: int, words: str) -> None:
    assert diagnosis.describe_status(status) == words
