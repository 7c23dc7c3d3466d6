"""Every kind of bad input, with the line an operator reads."""

from __future__ import annotations

import pytest

from tests.config.loading import config, loaded, problems

USE = 'expected "all", "none", a list of indices or of UUIDs'
TABLES = (
    "expected one of model, engine, gpus, preflight, patience, heartbeat, serving, retries, stop, records, incidents, "
    "metrics, daemon, ladder"
)
ENGINE = "expected one of command, python, host, port, args, env"
LADDER = "expected one of may_change, pin, remember, retry_up_after, rungs"
AREAS = '"transports", "utilisation", "gpus", "graph-capture", "context-length", "dtype"'
SPARES = "expected a list of indices or of UUIDs"
DURATION = "expected seconds from 0.1 to 86400 (a day)"
FRACTION = "expected a fraction above 0 and up to 1"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("port = 1", f"port: found an unknown key, {TABLES}; did you mean engine.port?"),
        ("[gpu]", f"gpu: found an unknown key, {TABLES}; did you mean gpus?"),
        ("[xyzzy]", f"xyzzy: found an unknown key, {TABLES}"),
        (
            "model.port = 1",
            "model.port: found an unknown key, expected one of path, served_name; did you mean engine.port?",
        ),
        ("engine.prot = 1", f"engine.prot: found an unknown key, {ENGINE}; did you mean engine.port?"),
        (
            "engine.gpu_memory_utilization = 0.8",
            f"engine.gpu_memory_utilization: found an unknown key, {ENGINE}; did you mean gpus.memory_utilisation?",
        ),
        (
            'engine.NCCL_DEBUG = "INFO"',
            f"engine.NCCL_DEBUG: found an unknown key, {ENGINE}; variables of the engine go into [engine.env]",
        ),
        (
            "engine.max-model-len = 1",
            f"engine.max-model-len: found an unknown key, {ENGINE}; options of vLLM go into engine.args",
        ),
        ("stop.xyzzy = 1", "stop.xyzzy: found an unknown key, expected one of grace, kill_deadline"),
        (
            '[[ladder.rungs]]\nname = "a"\ngpu = 1\nargs = ["-x"]',
            "ladder.rungs[0].gpu: found an unknown key, expected one of name, env, args, utilisation, gpus; "
            "did you mean ladder.rungs[0].gpus?",
        ),
        (
            "ladder.may-change = []",
            f"ladder.may-change: found an unknown key, {LADDER}; did you mean ladder.may_change?",
        ),
        ("ladder.pinned = []", f"ladder.pinned: found an unknown key, {LADDER}; did you mean ladder.pin?"),
        (
            "[ladder]\nname = 'a'",
            f"ladder.name: found an unknown key, {LADDER}; rungs are written as [[ladder.rungs]]",
        ),
        (
            "[[ladder.rungs]]\nname = 'a'\ngpus = 1\nremember = true",
            "ladder.rungs[0].remember: found an unknown key, expected one of name, env, args, utilisation, gpus; "
            "did you mean ladder.remember?",
        ),
    ],
)
def test_an_unknown_key_says_what_is_known_and_what_may_be_meant(text: str, line: str) -> None:
    assert problems(text) == [f"a.toml: {line}"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("engine = 5", "engine: found 5 (integer), expected a table; write [engine]"),
        ("[[engine]]\nport = 1", "engine: found [{...}] (array), expected a table; write [engine]"),
        ("[[ladder]]\nname = 'a'", "ladder: found [{...}] (array), expected a table; write [[ladder.rungs]]"),
        ("ladder = []", "ladder: found [] (array), expected a table; write ladder.rungs = []"),
        ("ladder = true", "ladder: found true (boolean), expected a table; write [ladder]"),
        (
            "[ladder.rungs]\nname = 'a'\ngpus = 1",
            "ladder.rungs: found a table, expected an array of tables; write [[ladder.rungs]]",
        ),
        ("ladder.rungs = 5", "ladder.rungs: found 5 (integer), expected an array of tables"),
        ("ladder.rungs = [5]", "ladder.rungs[0]: found 5 (integer), expected a table"),
        ("ladder.pin = ['gpu']", f'ladder.pin[0]: found "gpu" (string), expected one of {AREAS}; write "gpus"'),
        (
            "ladder.may_change = ['dtype', 'context_length']",
            f'ladder.may_change[1]: found "context_length" (string), expected one of {AREAS}; write "context-length"',
        ),
        (
            "ladder.may_change = 'dtype'",
            f'ladder.may_change: found "dtype" (string), expected an array of some of {AREAS}; write ["dtype"]',
        ),
        ("ladder.remember = 'no'", 'ladder.remember: found "no" (string), expected true or false; write false'),
        (
            'engine.port = "8000"',
            'engine.port: found "8000" (string), expected an integer from 1 to 65535; write 8000',
        ),
        ("engine.port = 8000.0", "engine.port: found 8000.0 (float), expected an integer from 1 to 65535; write 8000"),
        ("engine.port = true", "engine.port: found true (boolean), expected an integer from 1 to 65535"),
        ("engine.port = 07:32:00", "engine.port: found 07:32:00 (date or time), expected an integer from 1 to 65535"),
        ("engine.port = [8000]", "engine.port: found [8000] (array), expected an integer from 1 to 65535; write 8000"),
        ("engine.port = {}", "engine.port: found a table, expected an integer from 1 to 65535"),
        (
            'engine.command = "/opt/bin/vllm serve"',
            'engine.command: found "/opt/bin/vllm serve" (string), expected an array of strings such as '
            '["vllm", "serve"]; write ["/opt/bin/vllm serve"]',
        ),
        (
            'engine.args = "--enforce-eager --seed 1"',
            'engine.args: found "--enforce-eager --seed 1" (string), expected an array of strings, one for each '
            'argument; write ["--enforce-eager", "--seed", "1"]',
        ),
        (
            'engine.args = "--x \'a"',
            'engine.args: found "--x \'a" (string), expected an array of strings, one for each argument',
        ),
        (
            'engine.args = ["--seed", 1]',
            'engine.args[1]: found 1 (integer), expected a string; write "1"',
        ),
        (
            'engine.args = ["--seed 1"]',
            'engine.args[0]: found "--seed 1" (string), expected one argument per string; '
            'write "--seed" and its value as two strings',
        ),
        (
            'engine.args = ["a\\u0000b"]',
            'engine.args[0]: found "a\\u0000b" (string), expected text without zero bytes, which no command line '
            "can carry",
        ),
        ("engine.env.A = 1", 'engine.env.A: found 1 (integer), expected a string; write "1"'),
        ("engine.env.A = true", 'engine.env.A: found true (boolean), expected a string; write "1"'),
        (
            'engine.env."A B" = "1"',
            'engine.env."A B": found "1" (string), expected a variable\'s name of letters, digits and _',
        ),
        ('engine.env = ["A=1"]', 'engine.env: found ["A=1"] (array), expected a table of strings'),
        ("patience.boot = '60s'", f'patience.boot: found "60s" (string), {DURATION}; write 60'),
        ("patience.boot = '1.5 s'", f'patience.boot: found "1.5 s" (string), {DURATION}; write 1.5'),
        ("patience.boot = true", f"patience.boot: found true (boolean), {DURATION}"),
        ("gpus.memory_utilisation = 90", f"gpus.memory_utilisation: found 90 (integer), {FRACTION}; write 0.9"),
        ("gpus.memory_utilisation = '90%'", f'gpus.memory_utilisation: found "90%" (string), {FRACTION}; write 0.9'),
        (
            "gpus.tensor_parallel = '4'",
            'gpus.tensor_parallel: found "4" (string), expected "auto" or an integer from 1 to 1024; write 4',
        ),
        (
            "daemon.log_level = 'Warn'",
            'daemon.log_level: found "Warn" (string), expected "debug", "info", "warning" or "error"; write "warning"',
        ),
        ("model.path = 5", 'model.path: found 5 (integer), expected a string: a folder or a hub id; write "5"'),
    ],
)
def test_a_wrong_type_is_told_in_the_words_of_toml_with_the_right_way_to_write_it(text: str, line: str) -> None:
    assert problems(text) == [f"a.toml: {line}"]


@pytest.mark.parametrize(
    ("written", "rest"),
    [
        ('"2,3"', f'found "2,3" (string), {USE}; write [2, 3]'),
        ("2", f"found 2 (integer), {USE}; write [2]"),
        ('"GPU-ab12"', f'found "GPU-ab12" (string), {USE}; write ["GPU-ab12"]'),
        ('"GPU-ab, GPU-cd"', f'found "GPU-ab, GPU-cd" (string), {USE}; write ["GPU-ab", "GPU-cd"]'),
        ('["2", "3"]', f'found ["2", "3"] (array), {USE}; write [2, 3]'),
        ('"All"', f'found "All" (string), {USE}; write "all"'),
        ('["all"]', f'found ["all"] (array), {USE}; write "all"'),
        ("[]", f'found [] (array), {USE}; write "none" to run without GPUs'),
        ("[true]", f"found [true] (array), {USE}"),
        ("[-1]", f"found [-1] (array), {USE}"),
        ('["MIG-GPU-ab/1/0"]', f'found ["MIG-GPU-ab/1/0"] (array), {USE}'),
        (
            '["MIG-ab", "MIG-cd"]',
            'found ["MIG-ab", "MIG-cd"] (array), expected whole GPUs, or one MIG slice by itself; '
            "CUDA shows an engine one MIG slice and nothing beside it",
        ),
        (
            '[0, "MIG-ab"]',
            'found [0, "MIG-ab"] (array), expected whole GPUs, or one MIG slice by itself; '
            "CUDA shows an engine one MIG slice and nothing beside it",
        ),
        ("[2, 3, 2]", "found [2, 3, 2] (array), expected each GPU once; 2 is there more than once"),
        (
            '["GPU-a", "GPU-a"]',
            'found ["GPU-a", "GPU-a"] (array), expected each GPU once; GPU-a is there more than once',
        ),
    ],
)
def test_gpus_that_are_not_a_choice_say_how_to_choose(written: str, rest: str) -> None:
    assert problems(f"gpus.use = {written}") == [f"a.toml: gpus.use: {rest}"]


@pytest.mark.parametrize(
    ("gpus", "rest"),
    [
        (
            "spares = [4]",
            'gpus.use = "all" leaves none beside it; write into gpus.use which GPUs to use, or remove the spares',
        ),
        (
            "use = 'none', spares = [4]",
            'gpus.use = "none" leaves none beside it; write into gpus.use which GPUs to use, or remove the spares',
        ),
        (
            "use = [2, 3], spares = [4, 3, 2]",
            "found [4, 3, 2] (array), expected GPUs that are not in gpus.use; remove 3, 2",
        ),
        ("use = [2], spares = 4", f"found 4 (integer), {SPARES}; write [4]"),
        ("use = [2], spares = 'all'", f'found "all" (string), {SPARES}'),
        ("use = [2], spares = [4, 4]", "found [4, 4] (array), expected each GPU once; 4 is there more than once"),
        (
            "use = [2, 3], spares = ['MIG-1']",
            'found ["MIG-1"] (array), expected whole GPUs, as in gpus.use; '
            "CUDA shows an engine one MIG slice and nothing beside it",
        ),
    ],
)
def test_spares_that_cannot_stand_in_say_why(gpus: str, rest: str) -> None:
    assert problems(f"gpus = {{ {gpus} }}") == [f"a.toml: gpus.spares: {rest}"]


def test_spares_by_index_or_uuid_are_taken() -> None:
    assert config("gpus = { use = [2, 3], spares = [4, 'GPU-77'] }").gpus.spares == (4, "GPU-77")


@pytest.mark.parametrize("written", ['"all"', '"none"', "[2, 3]", '["GPU-5e0c", "GPU-77"]', '[0, "GPU-77"]'])
def test_gpus_by_word_index_or_uuid_are_taken(written: str) -> None:
    assert problems(f"gpus.use = {written}") == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("engine.port = 65536", "engine.port: found 65536 (integer), expected an integer from 1 to 65535"),
        ("patience.api = inf", f"patience.api: found inf (float), {DURATION}"),
        ("patience.api = nan", f"patience.api: found nan (float), {DURATION}"),
        ("patience.api = 0", f"patience.api: found 0 (integer), {DURATION}"),
        ("patience.api = 1e6", f"patience.api: found 1000000.0 (float), {DURATION}"),
        ("gpus.memory_utilisation = 0", f"gpus.memory_utilisation: found 0 (integer), {FRACTION}"),
        ("gpus.memory_utilisation = 1.01", f"gpus.memory_utilisation: found 1.01 (float), {FRACTION}"),
        (
            "gpus.utilisation_step = 0",
            "gpus.utilisation_step: found 0 (integer), expected a fraction from 0.01 to below 1",
        ),
        ("serving.deaths = 0", "serving.deaths: found 0 (integer), expected an integer from 1 to 1000"),
        (
            "serving.deaths_window = 0",
            "serving.deaths_window: found 0 (integer), expected seconds from 1 to 604800 (a week)",
        ),
        ("retries.backoff = -1", "retries.backoff: found -1 (integer), expected seconds from 0 to 86400 (a day)"),
        ("daemon.runtime_dir = 'run'", 'daemon.runtime_dir: found "run" (string), expected an absolute path'),
        (
            f"daemon.runtime_dir = '/{'x' * 94}'",
            f'daemon.runtime_dir: found "/{"x" * 70}... (string), expected a path of at most 94 bytes, so that its '
            "control socket can have a name",
        ),
        (
            "model.path = '--help'",
            'model.path: found "--help" (string), expected text that neither begins with "-" nor has blanks around it',
        ),
        (
            "model.path = ' /m'",
            'model.path: found " /m" (string), expected text that neither begins with "-" nor has blanks around it; '
            'write "/m"',
        ),
        (
            'model.served_name = "a\\nb"',
            'model.served_name: found "a\\u000ab" (string), expected text without control characters',
        ),
        ('engine.command = ["", "x"]', 'engine.command: found ["", "x"] (array), expected a program first'),
        (
            'engine = { command = ["vllm"], python = "/p" }',
            "engine.python: engine.command says how vLLM is called already; keep one of them",
        ),
        (
            "gpus = { memory_utilisation = 0.5, utilisation_floor = 0.6 }",
            "gpus.utilisation_floor: found 0.6 (float), expected at most gpus.memory_utilisation, which is 0.5",
        ),
        (
            "gpus = { memory_utilisation = 0.9, utilisation_ceiling = 0.8 }",
            "gpus.utilisation_ceiling: found 0.8 (float), expected at least gpus.memory_utilisation, which is 0.9",
        ),
        ("retries.per_cause = 0", "retries.per_cause: found 0 (integer), expected an integer from 1 to 100"),
        ("retries.jitter = 1.5", "retries.jitter: found 1.5 (float), expected a fraction from 0 to 1"),
        ("ladder.retry_up_after = -1", "ladder.retry_up_after: found -1 (integer), expected an integer from 0 to 1000"),
        (
            "ladder = { may_change = ['dtype', 'gpus', 'dtype'], pin = ['dtype'] }",
            "ladder.may_change: ladder.pin has dtype too; keep it in one of them",
        ),
        (
            "retries.backoff = 100",
            "retries.backoff_ceiling: found the default 60.0, expected at least retries.backoff, which is 100",
        ),
    ],
)
def test_a_value_that_makes_no_sense_says_the_bounds(text: str, line: str) -> None:
    assert problems(text) == [f"a.toml: {line}"]


@pytest.mark.parametrize("start", [0.5, 0.97])
def test_a_utilisation_beyond_the_default_floor_or_ceiling_is_no_mistake(start: float) -> None:
    assert problems(f"gpus.memory_utilisation = {start}") == []


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("gpus = 1", "ladder.rungs[0].name: found nothing, expected a name of at most 40 of a-z, 0-9 and -"),
        (
            "name = 'P2P off'\ngpus = 1",
            'ladder.rungs[0].name: found "P2P off" (string), expected a name of at most 40 of a-z, 0-9 and -',
        ),
        (
            "name = 'base'\ngpus = 1",
            'ladder.rungs[0].name: found "base" (string), expected another name: "base" is the config without any rung',
        ),
        (
            "name = 'a+b'\ngpus = 1",
            'ladder.rungs[0].name: found "a+b" (string), expected a name of at most 40 of a-z, 0-9 and -',
        ),
        ("name = 'a'", "ladder.rungs[0]: changes nothing; give it env, args, utilisation or gpus, or remove it"),
        ("name = 'a'\ngpus = 0", "ladder.rungs[0].gpus: found 0 (integer), expected an integer from 1 to 1024"),
        ("name = 'a'\nutilisation = 2", f"ladder.rungs[0].utilisation: found 2 (integer), {FRACTION}; write 0.02"),
        ("name = 'a'\nenv = 'X=1'", 'ladder.rungs[0].env: found "X=1" (string), expected a table of strings'),
    ],
)
def test_a_rung_that_cannot_be_one_says_why(entry: str, line: str) -> None:
    assert problems(f"[[ladder.rungs]]\n{entry}") == [f"a.toml: {line}"]


def test_two_rungs_of_one_name_are_refused() -> None:
    rungs = "{ name = 'a', gpus = 1 }, { name = 'b', gpus = 1 }, { name = 'a', gpus = 2 }"
    assert problems(f"ladder.rungs = [{rungs}]") == [
        'a.toml: ladder.rungs: two rungs are named "a"; give each rung a name of its own'
    ]


def test_what_is_wrong_with_a_rung_leaves_the_rest_of_the_ladder() -> None:
    bad = loaded("ladder = { retry_up_after = 3, pin = ['gpus'], rungs = [{ name = 'a' }] }")
    assert [problem.key for problem in bad.problems] == ["ladder.rungs[0]"]
    told = bad.config.ladder
    assert (told.retry_up_after, told.pin, told.rungs) == (3, ("gpus",), None)


def test_all_problems_come_at_once_by_key_and_what_is_right_is_kept() -> None:
    bad = loaded("""
        [model]
        path = "/m"
        prot = 5
        [engine]
        port = "x"
        host = "::1"
        env = { A = 1, B = 2 }
        command = ["a"]
        python = "b"
        [gpus]
        use = [0, 0]
        tensor_parallel = 2
        [[ladder.rungs]]
        name = "a"
    """)
    assert [problem.key for problem in bad.problems] == [
        "engine.env.A",
        "engine.env.B",
        "engine.port",
        "engine.python",
        "gpus.use",
        "ladder.rungs[0]",
        "model.prot",
    ]
    assert bad.config.model.path == "/m"
    assert (bad.config.engine.host, bad.config.engine.port, bad.config.engine.env) == ("::1", 8000, {})
    assert (bad.config.gpus.use, bad.config.gpus.tensor_parallel) == ("all", 2)
    assert bad.config.ladder.rungs is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('engine.args = ["--api-key", 77]', "engine.args[1]: found an integer (hidden), expected a string"),
        (
            'engine.args = "--api-key 77"',
            "engine.args: found a string (hidden), expected an array of strings, one for each argument",
        ),
        (
            'engine.args = ["--api-key 77"]',
            "engine.args[0]: found a string (hidden), expected one argument per string; "
            'write "--api-key" and its value as two strings',
        ),
        ("engine.env.API_KEY = { a = 77 }", "engine.env.API_KEY: found a table (hidden), expected a string"),
        ("engine.env.HF_TOKEN = 77", "engine.env.HF_TOKEN: found an integer (hidden), expected a string"),
        ("engine.env.VLLM_API_KEY = 77.0", "engine.env.VLLM_API_KEY: found a float (hidden), expected a string"),
    ],
)
def test_a_secret_is_not_shown_in_a_problem(text: str, line: str) -> None:
    assert problems(text) == [f"a.toml: {line}"]
