"""What the configured model needs, from its files, and when nobody can tell."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu_llm.config.need import Known, broken_files, known
from mgpu_llm.core.sharding import Tensor, Weights
from tests.config.loading import config, unprivileged
from tests.support.checkpoints import QWEN_7B, write_file, write_model

BYTES = 15_231_233_024


def told(folder: Path, *args: str) -> Known | str:
    return known(config(f"model.path = '{folder}'\nengine.args = {json.dumps(args)}"), {})


def need(folder: Path, *args: str) -> Known:
    found = told(folder, *args)
    assert isinstance(found, Known)
    return found


def broken(folder: Path, *args: str) -> dict[str, str]:
    found = broken_files(config(f"model.path = '{folder}'\nengine.args = {json.dumps(args)}"), {})
    return {one.file.name: one.why for one in found}


def test_the_weights_of_seven_billion_parameters_lie_on_two_gpus_as_vllm_says(tmp_path: Path) -> None:
    found = need(write_model(tmp_path, QWEN_7B, shards=4))
    assert found.stored_bytes == BYTES
    assert (found.files, found.need.context, found.need.heads) == (4, 32768, 4)
    assert found.need.weights.on(2, 1, found.need.heads) / 2**30 == pytest.approx(7.16, rel=0.03)
    assert 0 <= BYTES - found.need.weights.least < 20_000


def test_of_a_model_in_37_files_only_headers_are_read(tmp_path: Path) -> None:
    found = need(write_model(tmp_path, QWEN_7B, shards=37))
    assert found.files == 37
    assert found.read_bytes < 60_000


def test_without_an_index_every_file_is_read_and_a_tensor_that_two_have_counts_once(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_7B)
    one = need(folder)
    write_file(
        folder / "model-again.safetensors", [Tensor(name="model.norm.weight", dtype="BF16", shape=(3584,), bytes=7168)]
    )
    again = need(folder)
    assert (again.files, again.stored_bytes, again.need) == (2, one.stored_bytes, one.need)


def test_dummy_weights_are_reckoned_from_config_json(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_7B)
    dummy = need(folder, "--load-format", "dummy")
    assert dummy.need == need(folder).need
    assert (dummy.files, dummy.read_bytes) == (0, 0)
    (folder / "config.json").write_text(json.dumps({**QWEN_7B, "model_type": "brand_new"}))
    assert told(folder, "--load-format=dummy") == "without weight files that is known for plain models only"


def test_what_the_arguments_say_of_ranks_graphs_and_context_is_taken_over(tmp_path: Path) -> None:
    found = need(write_model(tmp_path, QWEN_7B), "-pp", "2", "--enforce-eager", "--max-model-len", "8k")
    assert (found.need.pipeline_parallel, found.need.graphs, found.need.context) == (2, False, 8000)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--load-format", "bitsandbytes"], "--load-format has weights loaded otherwise than they are stored"),
        (["--hf-overrides.num_hidden_layers", "2"], "engine.args lay other settings over its config.json"),
        (["--hf-overrides", "{}"], "engine.args lay other settings over its config.json"),
        (["-dp", "2"], "ranks are laid out in a way that is not known here"),
        (["--nnodes", "2"], "ranks are laid out in a way that is not known here"),
        (["--quantization", "fp8"], "engine.args change the weights, or where they are kept"),
        (["--mm-encoder-only"], "engine.args lay other settings over its config.json"),
        (["--cpu-offload-gb=4"], "engine.args change the weights, or where they are kept"),
    ],
)
def test_where_vllm_is_asked_for_something_else_nobody_can_tell(tmp_path: Path, args: list[str], why: str) -> None:
    assert told(write_model(tmp_path, QWEN_7B), *args) == why


def test_another_dtype_makes_the_weights_larger(tmp_path: Path) -> None:
    found = need(write_model(tmp_path, QWEN_7B), "--dtype", "float32")
    assert found.need.weights.least == pytest.approx(2 * BYTES, rel=1e-5)


def test_a_quantised_model_stays_as_it_is_stored_also_where_the_method_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_7B)
    packed = Tensor(name="model.layers.0.mlp.up_proj.qweight", dtype="I32", shape=(8, 8), bytes=256)
    write_file(folder / "model.safetensors", [packed])
    (folder / "config.json").write_text(json.dumps({**QWEN_7B, "quantization_config": {"quant_method": "awq"}}))
    assert need(folder, "-q", "awq").need.weights == Weights(least=256, split=256)
    assert isinstance(told(folder, "-q", "awq", "--cpu-offload-gb", "1"), str)
    (folder / "model.safetensors").unlink()
    write_file(folder / "model.safetensors", [replace(packed, dtype="BF16", bytes=128)])
    assert told(folder) == "its weights are quantised only while they are loaded"
    (folder / "hf_quant_config.json").touch()
    assert told(folder) == "hf_quant_config.json changes how they are kept"


@pytest.mark.parametrize("args", [["--num-gpu-blocks-override", "9"], ["--runner", "pooling"], ["-dcp", "2"]])
def test_another_cache_is_not_known_and_the_weights_still_are(tmp_path: Path, args: list[str]) -> None:
    folder = write_model(tmp_path, QWEN_7B)
    found = need(folder, *args)
    assert found.need.cache is None
    assert BYTES - found.need.weights.least == pytest.approx(152064 * 3584 * 2, rel=1e-3)


def test_a_model_that_computes_embeddings_has_no_certain_cache(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_7B)
    (folder / "modules.json").touch()
    cache = need(folder).need.cache
    assert cache is not None
    assert not cache.certain


def test_a_command_with_options_that_only_vllm_knows_leaves_it_unknown(tmp_path: Path) -> None:
    text = f"model.path = '{write_model(tmp_path, QWEN_7B)}'\nengine.command = "
    module = f"{text}['/usr/bin/python3', '-m', 'vllm.entrypoints.cli.main', 'serve']"
    assert isinstance(known(config(module), {}), Known)
    own = f"{text}['/opt/vllm/bin/vllm', 'serve', '--max-model-len', '512']"
    assert known(config(own), {}) == "engine.command has options of its own"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert list(broken_files(config(own), {})) == []
    assert [one.why for one in broken_files(config(module), {})] == ["it is empty"]


def test_a_model_that_is_not_here_or_says_nothing_is_not_known(tmp_path: Path) -> None:
    assert known(config("model.path = 'org/name'"), {"HF_HOME": str(tmp_path)}) == "it is not on this host yet"
    assert told(tmp_path) == "its config.json does not tell"
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    assert told(tmp_path) == "it has no safetensors files"
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert told(tmp_path) == "it has no safetensors files"


def hub(tmp_path: Path, shards: int = 2) -> Path:
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return write_model(repository / "snapshots" / "abc", QWEN_7B, shards=shards)


def test_a_hub_model_is_known_from_the_local_cache_unless_another_one_is_meant(tmp_path: Path) -> None:
    hub(tmp_path)
    text, environ = "model.path = 'org/name'", {"HF_HUB_CACHE": str(tmp_path)}
    assert isinstance(known(config(text), environ), Known)
    other = "it is another one than the hub's cache has"
    assert known(config(f"{text}\nengine.args = ['--revision', 'v2']"), environ) == other
    assert known(config(f"{text}\nengine.args = ['--download-dir', '/data']"), environ) == other
    assert known(config(f"{text}\nengine.env.VLLM_USE_MODELSCOPE = 'true'"), environ) == other


def test_what_is_missing_of_a_hub_model_is_still_to_be_fetched_and_what_is_cut_off_is_broken(tmp_path: Path) -> None:
    first, second = sorted(hub(tmp_path).glob("*.safetensors"))
    first.unlink()
    os.truncate(second, 100)
    text, environ = "model.path = 'org/name'", {"HF_HUB_CACHE": str(tmp_path)}
    assert [one.file for one in broken_files(config(text), environ)] == [second]
    assert list(broken_files(config(f"{text}\nengine.args = ['--revision', 'v2']"), environ)) == []
    assert known(config(text), environ) == f"its {first.name} is not whole"
    assert list(broken_files(config("model.path = 'org/other'"), environ)) == []


def test_every_file_that_is_not_whole_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    one, two, three, four = sorted(write_model(tmp_path, QWEN_7B, shards=4).glob("*.safetensors"))
    assert broken(tmp_path) == {}
    one.unlink()
    os.truncate(two, 1000)
    three.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert broken(tmp_path) == {
        one.name: "it is not there",
        two.name: "it ends within its header",
        three.name: "it is a pointer of Git LFS, not the file itself",
    }
    assert told(tmp_path) == f"its {one.name} is not whole"
    assert broken(tmp_path, "--load-format", "dummy") == {}
    four.unlink()
    four.mkdir()
    assert broken(tmp_path)[four.name] == "is a directory"


def test_a_folder_that_may_not_be_searched_is_not_known(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", QWEN_7B, shards=2)
    folder.chmod(0o700)
    with unprivileged():
        assert told(folder) == "its config.json does not tell"
        assert broken(folder) == {}


def test_a_file_of_which_nothing_is_loaded_may_be_missing(tmp_path: Path) -> None:
    folder = write_model(tmp_path, QWEN_7B)
    index = {"model.layers.28.mlp.up_proj.weight": "mtp.safetensors", "model.norm.weight": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert broken(folder) == {}


def test_of_mistrals_own_format_nothing_is_called_broken_and_other_kinds_of_files_are_not_looked_at(
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path, QWEN_7B)
    os.truncate(folder / "model.safetensors", 5)
    (folder / "params.json").write_text("{}")
    assert broken(folder) == {}
    (folder / "params.json").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert broken(folder) == {}
    assert told(folder) == "it has no safetensors files"
