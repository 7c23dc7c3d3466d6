"""How a command may be written, what never gets out of it, and that no command is too odd."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu_llm.ctl.main import VERBS
from mgpu_llm.xinference import document
from mgpu_llm.xinference.importing import imported
from mgpu_llm.xinference.words import NotALaunchError
from tests.ctl.daemons import DEADLINE_S, command, environment, mgpuctl
from tests.ctl.launches import QWEN, SEED, config, lost, problems, remarks, toml

KEY = "s3cr3t-0123456789abcdef"


@pytest.mark.parametrize(
    "text",
    [
        f"$ {SEED}",
        f"# {SEED}",
        f"user@host:~$ {SEED}",
        f"(base) [user@host dir]$ {SEED}",
        f"  {SEED}  \n",
        f"sudo -E {SEED}",
        f"nohup {SEED} > xinference.log 2>&1 &",
        SEED.replace(" --gpu-idx", " \\\n    --gpu-idx"),
        SEED.replace(" --gpu-idx", " \\  \r\n> --gpu-idx"),
        SEED.replace("2,3", "'2,3'").replace("72", '"72"'),
        SEED.replace("gpu_memory_utilization 0.95", "gpu-memory-utilization=0.95"),
        SEED.replace("--model-name", "—model-name").replace("--gpu-idx", "–gpu-idx"),
        SEED.replace(" ", "\u00a0"),
        SEED.replace("--model-engine", "-en").replace("--model-name", "-n").replace("--size-in-billions ", "-s"),
        f"{SEED} \\",
    ],
)
def test_every_way_of_writing_the_command_gives_the_same_config(text: str) -> None:
    assert config(text) == config(SEED)
    assert lost(text) == []


def test_words_that_the_shell_has_taken_apart_are_the_same_as_one_text() -> None:
    assert imported(SEED.split()) == imported([SEED])
    assert imported(["$", "CUDA_VISIBLE_DEVICES=2,3", *QWEN.split()]) == imported([f"CUDA_VISIBLE_DEVICES=2,3 {QWEN}"])


def test_other_commands_around_the_launch_are_named() -> None:
    text = f"export NCCL_DEBUG=INFO && docker exec -it xinference {SEED} | tee log"
    assert config(text)["engine"]["env"] == {"NCCL_DEBUG": "INFO"}
    assert lost(text) == ["'docker'", "'tee'"]


def test_variables_that_vllm_reads_are_carried_over_and_others_named() -> None:
    text = f"NCCL_P2P_DISABLE=1 HF_HOME=/hf LD_LIBRARY_PATH=$X XINFERENCE_MODEL_SRC=modelscope EDITOR=vi {QWEN}"
    assert config(text)["engine"]["env"] == {"NCCL_P2P_DISABLE": "1", "HF_HOME": "/hf"}
    assert lost(text) == ["EDITOR", "LD_LIBRARY_PATH", "XINFERENCE_MODEL_SRC"]
    assert any("the ladder tries this by itself" in line for line in remarks(text))


@pytest.mark.parametrize(
    "text",
    [
        f"{QWEN} --api-key {KEY}",
        f"{QWEN} -ak {KEY}",
        f"{QWEN} -ak={KEY}",
        f"{QWEN} -ak{KEY}",
        f"{QWEN} --api_key={KEY}",
        f"{QWEN} --hf_token {KEY}",
        f"{QWEN} --unknown_password {KEY}",
        f"{QWEN} -e http://user:{KEY}@host:9997",
        f"{QWEN} --model-path https://user:{KEY}@host/x",
        f'{QWEN} --model_loader_extra_config \'{{"s3_secret": "{KEY}"}}\'',
        f"{QWEN} 'api_key={KEY}'",
        f"HF_TOKEN={KEY} {QWEN}",
        f"https_proxy=http://u:{KEY}@proxy {QWEN}",
        f"curl -H 'Authorization: token: {KEY}'; {QWEN}",
        f"{QWEN}; login --token={KEY}",
        f"xinference login --username me --password {KEY} && {QWEN}",
        f"{QWEN} --api key {KEY}",
        f"PGPASSWORD={KEY} {QWEN}",
        f"EDITOR={KEY} {QWEN}",
        f"{QWEN} --authtoken {KEY}",
        f"xinference login --password {KEY}",
        f"API_KEY={KEY} vllm serve x",
        f"{QWEN} --api-key '{KEY}",
    ],
)
def test_a_secret_is_never_printed(tmp_path: Path, text: str) -> None:
    done = mgpuctl(tmp_path / "no-daemon", "import-xinference", text)
    assert done.returncode in (0, 2)
    assert KEY not in done.stdout + done.stderr
    assert done.returncode == 2 or "not carried over: " in done.stderr


def test_a_key_for_the_api_has_its_place_named() -> None:
    text = toml(f"{QWEN} --api-key {KEY}")
    assert "/etc/mgpu-llm/conf.d/" in text
    assert '#     VLLM_API_KEY = "..."' in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("xinference-local --host 0.0.0.0", "'xinference-local' starts a server of Xinference's"),
        ("xinference register -f model.json", "'xinference register' loads no model"),
        ("xinference -e http://h:1 list", "'xinference list' loads no model"),
        ("xinference", "it has no verb"),
        ("vllm serve Qwen/Qwen3-8B", "there is no `xinference` in it"),
        ("", "there is no `xinference` in it"),
        ("xinference launch -n 'x", "no closing quotation"),
        ("xinference launch -n", "its option -n has no value"),
        ("xinference launch --model-name --gpu-idx 2", "its option --model-name has no value"),
        ("xinference launch -n bge-m3 -t embedding", "a model of the type 'embedding'"),
        ("xinference launch -n \udc80", "it is not UTF-8"),
    ],
)
def test_anything_but_a_launch_of_an_llm_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    done = mgpuctl(tmp_path / "no-daemon", "import-xinference", text)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mgpuctl: cannot import the command: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_config_is_on_stdout_and_the_remarks_on_stderr(tmp_path: Path) -> None:
    done = mgpuctl(tmp_path / "no-daemon", "import-xinference", "--", *f"{SEED} --replica 2".split())
    assert done.returncode == 0
    assert done.stdout == toml(f"{SEED} --replica 2") + "\n"
    assert done.stderr.splitlines() == remarks(f"{SEED} --replica 2")


def test_what_a_terminal_cannot_show_is_written_with_escapes(tmp_path: Path) -> None:
    text = f"{QWEN} --model-path /模型/q"
    done = mgpuctl(tmp_path / "no-daemon", "import-xinference", text, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert 'path = "/\\u6a21\\u578b/q"' in done.stdout
    assert problems(done.stdout) == []
    assert 'path = "/模型/q"' in toml(text)


def test_mgpud_itself_finds_nothing_wrong_but_the_model(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "host.toml").write_text('engine.command = ["/bin/sh"]\n')
    (tmp_path / "mgpu-llm.toml").write_text(toml(f"{SEED} -mp /no/such/model"))
    done = subprocess.run(
        [sys.executable, "-m", "mgpu_llm", "--check", "--config", str(tmp_path / "mgpu-llm.toml")],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    lines = (done.stdout + done.stderr).splitlines()
    said = [line for line in lines if "gpus.use" not in line and not line.startswith("cannot list the GPUs")]
    assert ["model.path" in line for line in said] == [True], said


def test_no_other_verb_pays_for_this_one() -> None:
    script = "import sys, mgpu_llm.ctl.main, mgpu_llm.ctl.status; print('mgpu_llm.xinference' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert "import-xinference" in VERBS
    assert command("--help")


GROUPS = (
    ("--gpu-idx", "2,3"),
    ("--n-gpu", "2"),
    ("--replica", "2"),
    ("--model-uid", "chat"),
    ("-f", "gptq"),
    ("-q", "Int4"),
    ("--gpu_memory_utilization", "0.95"),
    ("--max-model-len", "8192"),
    ("--enforce_eager",),
    ("--enable_prefix_caching", "False"),
    ("--tensor_parallel_size", "2"),
    ("--pipeline-parallel-size", "2"),
    ("--lora-modules", "a", "/a"),
    ("-lm", "b", "/b"),
    ("--api-key", KEY),
    ("--trust-remote-code", "false"),
    ("--frobnicate", "1"),
    ("--endpoint", "http://h:9997"),
    ("--seed", "-1"),
)


@given(st.lists(st.sampled_from(GROUPS), unique=True), st.randoms(use_true_random=False))
def test_any_order_of_the_options_gives_the_same_config(groups: list[tuple[str, ...]], random: object) -> None:
    all_groups = [("-en", "vllm"), ("-n", "qwen2.5-instruct"), ("-s", "72"), *groups]
    first = imported(["xinference", "launch", *(word for group in all_groups for word in group)])
    random.shuffle(all_groups)  # type: ignore[attr-defined]
    second = imported(["xinference", "launch", *(word for group in all_groups for word in group)])
    assert document.toml(first) == document.toml(second)
    assert document.remarks(first) == document.remarks(second)
    assert problems(document.toml(first)) == []


NAMES = st.sampled_from(
    (
        "-n",
        "-s",
        "-f",
        "-q",
        "-u",
        "-e",
        "-r",
        "-lm",
        "-mp",
        "--gpu-idx",
        "--n-gpu",
        "--model_path",
        "--seed",
        "--dtype",
        "--x",
    )
) | st.sampled_from(
    (
        "--gpu_memory_utilization",
        "--tensor_parallel_size",
        "--data_parallel_size",
        "--enforce_eager",
        "--trust-remote-code",
    )
)
VALUES = st.text(max_size=12) | st.sampled_from(
    ("0", "1", "2", "1e3", "nan", "-1", "None", "True", "a=b", "qwen2.5", "7")
)


@given(
    st.lists(st.tuples(NAMES, VALUES), max_size=8),
    st.dictionaries(st.sampled_from(("HF_HOME", "CUDA_VISIBLE_DEVICES")), VALUES),
)
def test_no_values_raise_and_whatever_is_printed_loads(pairs: list[tuple[str, str]], env: dict[str, str]) -> None:
    before = [f"{name}={value}" for name, value in env.items()]
    words = [*before, "xinference", "launch", *(word for pair in pairs for word in pair)]
    try:
        findings = imported(words)
    except NotALaunchError:
        return
    for text in (document.toml(findings), document.toml(findings, ascii_only=True)):
        assert problems(text) == []
    assert all(isinstance(line, str) for line in document.remarks(findings))


@given(st.text(alphabet=st.sampled_from("xinference launch -n'\"\\\n$;>&|=#—2"), max_size=60) | st.text(max_size=40))
def test_no_text_raises_anything_else(text: str) -> None:
    for whole in (text, f"{QWEN} {text}", f"{text} {QWEN}"):
        try:
            document.remarks(imported([whole]))
        except NotALaunchError:
            continue
