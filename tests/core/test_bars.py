"""Progress bars as vLLM and the hub draw them: what each counts, and when it is progress."""

from __future__ import annotations

import pytest

from mgpu_llm.core import progress
from mgpu_llm.core.engine_log import Facts, Phase, facts
from mgpu_llm.core.events import LineRead
from mgpu_llm.core.progress import MOST_WORDINGS, Progress, begin
from mgpu_llm.core.states import Killing, Starting
from mgpu_llm.core.status import Count
from tests.core.looks import CONFIRMED_S
from tests.core.world import loading


def bar(what: str, done: int, total: int) -> str:
    """A bar as tqdm draws it, always of the same words but for its numbers."""
    return f"{what}: {100 * done // total:3d}%|####      | {done}/{total} [00:10<00:19,  1.20s/it]"


def after(*texts: str, heart: Progress | None = None) -> Progress:
    """The heartbeat after these lines, a second apart, the first at 1."""
    heart = heart or begin(0.0)
    for number, text in enumerate(texts, start=1):
        heart = progress.after_line(heart, LineRead(at=float(number), attempt=1, text=text))
    return heart


@pytest.mark.parametrize(
    ("message", "what", "done"),
    [
        (
            "Loading safetensors checkpoint shards:  38% Completed | 3/8 [00:01<00:02,  1.87it/s]",
            "Loading safetensors checkpoint shards",
            3,
        ),
        (
            "Loading pt checkpoint shards: 100% Completed | 2/2 [00:00<00:00,  1.87it/s]",
            "Loading pt checkpoint shards",
            2,
        ),
        (
            "Loading safetensors using Runai Model Streamer:  10% Completed | 12/120 [00:09<00:27]",
            "Loading safetensors using Runai Model Streamer",
            12,
        ),
        (
            "Capturing CUDA graphs (PIECEWISE):   4%|▍         | 2/51 [00:00<00:02, 18.56it/s]",
            "Capturing CUDA graphs (PIECEWISE)",
            2,
        ),
        (
            "Capturing CUDA graphs (decode, FULL): 100%|██████████| 35/35 [00:03<00:00, 10.77it/s]",
            "Capturing CUDA graphs (decode, FULL)",
            35,
        ),
        ("DeepGEMM warmup:  10%|█  | 3/30", "DeepGEMM warmup", 3),
        ("DeepGEMM warmup:  34%|███▍      | 720/2112 [00:10<00:19, 70.21it/s]", "DeepGEMM warmup", 720),
        (
            "DeepGemm(fp8_gemm_nt) warmup (W=torch.Size([4096, 7168])):   5%|▌ | 9/180 [00:00<00:05]",
            "DeepGemm(fp#_gemm_nt) warmup (W=torch.Size([#, #]))",
            9,
        ),
        ("Compiling CuTeDSL kernels:  50%|█████     | 2/4 [00:20<00:20, 10.1s/it]", "Compiling CuTeDSL kernels", 2),
        (
            "JIT kernel warmup (120 compile keys):   1%|          | 1/120 [00:01<02:00,  1.01s/it]",
            "JIT kernel warmup (# compile keys)",
            1,
        ),
        (
            "[AutoTuner]: Tuning trtllm::fused_moe:  12%|█▎        | 2/16 [00:03<00:24,  1.7s/it]",
            "[AutoTuner]: Tuning trtllm::fused_moe",
            2,
        ),
        ("Fetching 12 files:  25%|██▌       | 3/12 [00:01<00:03,  2.87it/s]", "Fetching # files", 3),
        ("100%|██████████| 3/3 [00:00<00:00, 11.1it/s]", "", 3),
    ],
)
def test_a_bar_of_items_tells_what_it_counts_and_how_many_are_done(message: str, what: str, done: int) -> None:
    assert facts(message).bar == (what, done)


@pytest.mark.parametrize(
    ("message", "what", "percent"),
    [
        (
            "model-00001-of-00004.safetensors:  12%|█▏        | 472M/3.95G [00:10<01:14, 46.8MB/s]",
            "model-#-of-#.safetensors %",
            12,
        ),
        ("tokenizer.json:   0%|          | 0.00/7.03M [00:00<?, ?B/s]", "tokenizer.json %", 0),
        (
            "Downloading (incomplete total...):  40%|####      | 1.9G/4.9G [00:10<00:20]",
            "Downloading (incomplete total...) %",
            40,
        ),
        ("Prefetching checkpoint files: 40% (4/10)", "Prefetching checkpoint files %", 40),
        ("Prefetching checkpoint files: 100% (10/10)", "Prefetching checkpoint files %", 100),
    ],
)
def test_a_bar_of_bytes_or_of_percent_alone_is_counted_in_percent(message: str, what: str, percent: int) -> None:
    assert facts(message).bar == (what, percent)


@pytest.mark.parametrize(
    "message",
    [
        "",
        "GPU KV cache usage: 0.0%, Prefix cache hit rate: 0.0%",
        "Maximum concurrency for 4,096 tokens per request: 1076.82x",
        "12it [00:10,  1.20it/s]",
        "use 90% (0.9) of it",
        "a | b | 3/8",
        "memory: 50% free",
        "x" * 200 + ": 38%|####      | 3/8",
    ],
)
def test_what_only_resembles_a_bar_is_none(message: str) -> None:
    assert facts(message).bar is None


def test_a_bar_of_thousands_of_digits_is_none() -> None:
    assert facts(f"x: 5%|#| {'9' * 5000}/{'9' * 5001}").bar == ("x %", 5)
    assert facts(f"x: {'9' * 5000}% (1/2)") == Facts()


def test_bars_that_say_in_which_phase_the_load_is_begin_it() -> None:
    assert facts("DeepGEMM warmup:  10%|█  | 3/30").phase is Phase.WARM_UP
    assert facts("Fetching 12 files:  25%|██▌       | 3/12 [00:01<00:03]").phase is None


# -- what is progress ------------------------------------------------------------------------------------------------


def test_a_bar_is_progress_whenever_it_goes_beyond_its_furthest_point_and_not_where_it_stands() -> None:
    heart = after(bar("x", 1, 9), bar("x", 1, 9), bar("x", 2, 9), bar("x", 2, 9), bar("x", 1, 9), bar("x", 2, 9))
    assert heart.moved == {"log": 1.0, "bar": 3.0}
    assert heart.bars == {"x": 2}


def test_a_bar_that_begins_at_nothing_is_progress_once() -> None:
    assert after(bar("x", 0, 9), bar("x", 0, 9)).moved == {"log": 1.0, "bar": 1.0}


def test_two_bars_have_each_their_own_furthest_point() -> None:
    heart = after(bar("x", 8, 9), bar("y", 1, 9), bar("y", 2, 9))
    assert heart.moved["bar"] == 3.0
    assert heart.bars == {"x": 8, "y": 2}


@pytest.mark.parametrize(
    "text",
    [
        "Loading safetensors checkpoint shards:  38% Completed | {done}/8 [00:01<00:02,  1.87it/s]",
        "Capturing CUDA graphs (PIECEWISE):   4%|####      | {done}/8 [00:00<00:02, 18.56it/s]",
        "DeepGEMM warmup:   4%|####      | {done}/8 [00:00<00:02, 18.56it/s]",
        "Fetching 8 files:   4%|####      | {done}/8 [00:00<00:02, 18.56it/s]",
        "Prefetching checkpoint files: {done}% (1/10)",
    ],
)
def test_a_bar_that_starts_over_for_ever_is_no_progress(text: str) -> None:
    world = loading().say(*(text.format(done=done) for done in range(9)))
    assert isinstance(world.state, Starting)
    patience_s = world.policy.patience[world.state.progress.phase]
    begun = world.at

    def starts_over(passed_s: float) -> None:
        world.look().say(text.format(done=int(passed_s * 2) % 9))

    world.watch(200.0, starts_over)
    assert isinstance(world.state, Killing)
    assert world.at - begun == pytest.approx(patience_s + CONFIRMED_S, abs=1.0)


def test_a_bar_that_starts_over_is_shown_as_it_stands() -> None:
    shards = [f"Loading safetensors checkpoint shards:  38% Completed | {done}/8 [00:01<00:02]" for done in (8, 0)]
    graphs = [f"Capturing CUDA graphs (PIECEWISE):   4%|#    | {done}/51 [00:00<00:02]" for done in (51, 1)]
    heart = after(*shards, *graphs)
    assert (heart.shards, heart.graphs) == (Count(done=0, total=8), Count(done=1, total=51))
    assert heart.moved["bar"] == 3.0


@pytest.mark.parametrize("what", ["Loading safetensors checkpoint shards", "DeepGEMM warmup", "Fetching 900 files"])
def test_a_bar_that_goes_on_keeps_a_load_alive_although_nothing_else_moves(what: str) -> None:
    world = loading().say(bar(what, 0, 900))
    world.watch(120.0, lambda passed_s: world.look().say(bar(what, int(passed_s / 5), 900)))
    assert isinstance(world.state, Starting)
    assert world.state.suspicion is None


def test_an_engine_that_floods_ever_new_bars_stops_being_believed() -> None:
    def name(number: int) -> str:
        return "".join(chr(97 + int(digit)) for digit in str(number))

    heart = after(*(bar(name(number), 1, 9) for number in range(MOST_WORDINGS + 50)))
    assert len(heart.bars) == MOST_WORDINGS
    assert heart.moved["bar"] == MOST_WORDINGS
    known = progress.after_line(heart, LineRead(at=1e6, attempt=1, text=bar(name(7), 2, 9)))
    assert known.moved["bar"] == 1e6, "one that is known may still go on"
