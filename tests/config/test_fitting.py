"""Whether the model fits the GPUs, as an operator is told it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu_llm.config.checks import check
from mgpu_llm.config.fitting import Fitting, fitting, larger, lines, remarks
from mgpu_llm.config.problem import render
from mgpu_llm.core.fit import GIB
from mgpu_llm.core.ladder import Heads
from tests.config.loading import config, loaded
from tests.support.checkpoints import QWEN_7B, QWEN_72B, write_model

H100 = 85_520_809_984
H200 = 150_754_820_096


def text(folder: Path, more: str = "") -> str:
    return f"engine.command = ['/bin/true']\ndaemon.runtime_dir = '{folder}'\nmodel.path = '{folder}'\n{more}"


def problems(folder: Path, more: str = "", gpus: int = 2, gpu: int = H100) -> list[str]:
    fitted = fitting(config(text(folder, more)), {}, [gpu] * gpus)
    found = check(loaded(text(folder, more)), {}, gpu_count=gpus, fitted=fitted, engine_runs=True)
    return render(found).splitlines()


def base(folder: Path, more: str = "", gpus: int = 2, gpu: int = H100) -> Fitting:
    found = fitting(config(text(folder, more)), {}, [gpu] * gpus)
    assert found is not None
    return found


def test_a_model_that_certainly_does_not_fit_is_a_problem_with_its_numbers_and_the_smallest_change(
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path, QWEN_72B)
    assert problems(folder, gpus=1) == [
        "a.toml: gpus.use: the model does not fit: it needs at least 135.4 GiB of weights and 10.0 GiB of cache for "
        "32768 tokens on its one GPU, and 0.9 of 79.6 GiB is 71.7 GiB; use 4 GPUs (gpus.use, gpus.tensor_parallel = 4)"
    ]
    assert problems(folder, gpus=4) == []


def test_a_context_that_needs_more_cache_than_there_can_be_is_one_too(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_72B)
    (problem,) = problems(folder)
    assert problem == (
        "a.toml: gpus.use: the model does not fit: it needs at least 67.7 GiB of weights and 5.0 GiB of cache for "
        "32768 tokens on each of its 2 GPUs, and 0.9 of 79.6 GiB is 71.7 GiB; "
        "set gpus.memory_utilisation = 0.94 or use 4 GPUs (gpus.use, gpus.tensor_parallel = 4)"
    )
    assert problems(folder, "engine.args = ['--max-model-len', '8192']") == []
    assert problems(folder, "engine.args = ['--max-model-len', 'auto']") == []


def test_what_is_tight_by_the_estimate_is_no_problem_but_a_remark(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_72B)
    tight = "engine.args = ['--max-model-len', '22000']"
    assert problems(folder, tight) == []
    (remark,) = remarks(base(folder, tight), {})
    assert remark.startswith("it may be tight: about ")
    assert "are left for the cache, and it needs 3.4 GiB for one request" in remark
    high = "gpus = { memory_utilisation = 0.98, utilisation_ceiling = 0.98 }"
    (remark,) = remarks(base(write_model(tmp_path / "7b", QWEN_7B), high), {})
    assert remark == "it may be tight: about 2.0 GiB are needed outside of utilisation 0.98, which leaves 1.6 GiB"


def test_what_fits_well_is_no_remark_and_what_does_not_fit_is_a_problem_instead(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_72B)
    assert list(remarks(base(folder, gpu=H200), {"0": (GIB, H200), "1": (GIB, H200)})) == []
    assert list(remarks(base(folder, gpus=1), {})) == []


def test_what_others_hold_of_a_gpu_is_a_remark_where_vllm_would_not_start_beside_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_7B)
    held = {"0": (10 * GIB, H200), "1": (30 * GIB, H200), "2": (90 * GIB, H200)}
    assert list(remarks(base(folder, gpu=H200), held)) == [
        "others hold 30.0 GiB of GPU 1: 109.6 GiB are free, and vLLM does not start with less than 125.6 GiB "
        "(utilisation 0.9)"
    ]


def test_the_estimate_says_what_is_needed_and_how_many_tokens_there_will_be_room_for(tmp_path: Path) -> None:
    found = base(write_model(tmp_path, QWEN_7B, shards=4), "engine.args = ['--max-model-len', '4096']")
    weights, room, tokens = lines(found)
    assert weights.startswith("about 7.1 GiB of weights on each of its 2 GPUs (14.2 GiB in 4 files; ")
    assert weights.endswith(" bytes of them were read)")
    assert room == "about 63.3 GiB of 79.2 GiB left for the cache at utilisation 0.9, 0.9 GiB for the work itself"
    assert tokens == "room for about 2368848 tokens; one request of 4096 needs 0.1 GiB"


def test_the_estimate_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_7B)
    dummy = lines(base(folder, "engine.args = ['--load-format', 'dummy', '--max-model-len', 'auto']", gpus=1))
    assert dummy[0] == "about 14.2 GiB of weights on its one GPU (by its config.json)"
    assert dummy[2].endswith(" tokens; vLLM chooses the context")
    assert len(lines(base(folder, "engine.args = ['--num-gpu-blocks-override', '9']"))) == 2
    windows = {**QWEN_7B, "use_sliding_window": True, "sliding_window": 4096}
    (folder / "config.json").write_text(json.dumps(windows))
    assert lines(base(folder))[2].startswith("one request of 32768 needs ")
    changed = base(folder, "engine.args = ['-q', 'fp8']")
    assert lines(changed) == (
        "whether the model fits cannot be told beforehand: engine.args change the weights, or where they are kept",
    )
    assert (changed.need, changed.fit) == (None, None)
    assert list(remarks(changed, {})) == []


def test_where_something_is_not_known_nothing_is_a_problem(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_72B)
    assert problems(folder, "gpus.use = 'none'", gpus=1) == []
    assert check(loaded(text(folder)), {}, engine_runs=True) == ()
    assert problems(folder, "engine.args = ['-q', 'fp8']", gpus=1) == []


def test_the_smallest_of_the_gpus_that_vllm_takes_decides_and_others_do_not(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_7B)
    settings = config(text(folder, "gpus = { use = [0, 1, 2], tensor_parallel = 2 }"))
    mixed = fitting(settings, {}, [H200, H100, 8 * GIB])
    assert mixed is not None
    assert mixed.gpu_bytes == H100


@pytest.mark.parametrize("args", [["-pp", "2"], ["--enable-expert-parallel"]])
def test_where_ranks_may_have_unequal_parts_the_largest_gpu_decides(tmp_path: Path, args: list[str]) -> None:
    folder = write_model(tmp_path, QWEN_7B)
    ranks = 1 if "-pp" in args else 2
    settings = config(text(folder, f"gpus.tensor_parallel = {ranks}\nengine.args = {json.dumps(args)}"))
    mixed = fitting(settings, {}, [8 * GIB, H100])
    assert mixed is not None
    assert mixed.gpu_bytes == H100


def test_a_cut_off_download_is_a_problem_that_names_the_file_and_no_other_is_told(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_72B, shards=3)
    file = folder / "model-00002-of-00003.safetensors"
    os.truncate(file, 1_000_000)
    (problem,) = problems(folder, gpus=1)
    assert problem.startswith(
        f'a.toml: model.path: cannot read the weights "{file}": it is cut off: it has 1000000 bytes, and its header says '
    )
    assert problem.endswith("; fetch the model anew")


def test_a_config_with_other_problems_is_not_weighed(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_72B)
    (problem,) = problems(folder, "gpus.tensor_parallel = 2", gpus=1)
    assert "2 ranks for 1 GPUs" in problem


def test_a_model_without_a_cache_may_fill_the_whole_gpu(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_72B)
    (problem,) = problems(folder, "engine.args = ['--runner', 'pooling']", gpus=1)
    assert problem.startswith(
        "a.toml: gpus.use: the model does not fit: it needs at least 133.1 GiB of weights on its one GPU, and there are "
        "79.6 GiB; use "
    )


def test_where_the_context_is_vllms_choice_a_block_of_cache_is_needed(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_72B)
    (problem,) = problems(folder, "engine.args = ['--max-model-len=-1']", gpus=1)
    assert "135.4 GiB of weights and 0.0049 GiB of cache for a block on its one GPU, and 0.9 of 79.6 GiB" in problem


def test_more_ranks_are_proposed_only_where_they_split_the_heads() -> None:
    assert larger(2, Heads(attention=28, key_value=4)) == (4, 28)
    assert larger(3, Heads()) == (4, 8, 16, 32, 64)


def test_a_model_whose_fit_is_unknown_is_told_as_such(tmp_path: Path) -> None:
    unknown = replace(base(write_model(tmp_path, QWEN_7B)), known="it is not on this host yet")
    assert lines(unknown) == ("whether the model fits cannot be told beforehand: it is not on this host yet",)


def test_of_a_gpu_that_does_not_tell_its_size_nobody_says_that_the_model_does_not_fit(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_72B)
    assert fitting(config(text(folder)), {}, [H100, 0]) is None
    assert problems(folder, gpu=0) == []
