"""Locks on GPUs, taken by real processes: who gets them, what stands in their way, and what a hostile folder does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from mgpu_llm.adapters import gpu_locks
from mgpu_llm.adapters.gpu_locks import HeldError, Holder, SpoiltError, held, holders, path_of

GPU, OTHER = "GPU-a0000000-0000-4000-8000-000000000000", "GPU-b0000000-0000-4000-8000-000000000000"
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user too")

#: Takes the locks that it is told, says "held" or who holds them, and waits until its stdin ends. It waits for a go first: so
#: many can be let loose at once.
TAKER = """
import os, sys
from pathlib import Path
from mgpu_llm.adapters.gpu_locks import HeldError, Holder, held
folders, uuids, shared, uid, umask = sys.argv[1:6]
os.umask(int(umask, 8))
if int(uid): os.setgid(int(uid)); os.setuid(int(uid))
me = Holder(pid=os.getpid(), user=f"u{uid}", config=f"/etc/{os.getpid()}.toml", shared=shared == "shared")
print("up", flush=True)
sys.stdin.readline()
try:
    with held([Path(f) for f in folders.split(",")], uuids.split(","), me) as unusable:
        print("held", *unusable, flush=True)
        sys.stdin.readline()
except HeldError as error:
    print(error.uuid, *(holder.pid for holder in error.holders), flush=True)
    sys.stdin.readline()
"""


class Taker:
    def __init__(
        self, stack: ExitStack, *folders: Path, uuids: str = GPU, shared: bool = False, uid: int = 0, umask: str = "022"
    ) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        argv = [",".join(map(str, folders)), uuids, "shared" if shared else "alone", str(uid), umask]
        self.process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", TAKER, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
            )
        )
        stack.callback(self.process.kill)
        assert self._line() == "up"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        return self._line()

    def take(self) -> str:
        self.go()
        return self.answer()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def me(*, shared: bool = False) -> Holder:
    return Holder(pid=os.getpid(), user="me", config="/etc/me.toml", runtime_dir="/run/me", shared=shared)


def test_a_gpu_has_one_holder_who_is_named_and_the_lock_dies_with_it_by_sigkill(tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = Taker(stack, tmp_path)
        assert first.take() == "held"
        with pytest.raises(HeldError) as raised, held([tmp_path], [OTHER, GPU], me()):
            raise AssertionError("two hold it")
        pid = first.process.pid
        assert raised.value.holders == (Holder(pid=pid, user="u0", config=f"/etc/{pid}.toml"),)
        assert raised.value.uuid == GPU
        with held([tmp_path], [OTHER], me()):  # what could be had was let go of again
            pass
        first.process.kill()
        first.process.wait()
        with held([tmp_path], [GPU], me()):
            assert holders([tmp_path], GPU) == (me(),)
        assert holders([tmp_path], GPU) == ()
        assert list(tmp_path.iterdir()) == [], "nothing is left of a lock that was let go of"


def test_a_gpu_is_shared_by_all_who_say_so_and_by_nobody_else(tmp_path: Path) -> None:
    with ExitStack() as stack:
        one, two = (Taker(stack, tmp_path, shared=True) for _ in range(2))
        alone = Taker(stack, tmp_path)
        assert (one.take(), two.take()) == ("held", "held")
        both = sorted((one.process.pid, two.process.pid))
        assert alone.take() == f"{GPU} {both[0]} {both[1]}"
        assert {holder.user for holder in holders([tmp_path], GPU)} == {"u0"}
    with held([tmp_path], [GPU], me()), pytest.raises(HeldError), held([tmp_path], [GPU], me(shared=True)):
        raise AssertionError("shared with one who does not share")


def test_of_many_who_start_at_once_exactly_one_gets_all_its_gpus(tmp_path: Path) -> None:
    with ExitStack() as stack:
        orders = [f"{GPU},{OTHER}", f"{OTHER},{GPU}"] * 4
        takers = [Taker(stack, tmp_path, uuids=order) for order in orders]
        for taker in takers:
            taker.go()
        answers = [taker.answer() for taker in takers]
        assert answers.count("held") == 1
        (winner,) = (taker for taker, answer in zip(takers, answers, strict=True) if answer == "held")
        assert {answer for answer in answers if answer != "held"} <= {f"{GPU} {winner.process.pid}"}


@needs_root
def test_users_meet_at_one_lock_in_a_folder_like_run_lock_whatever_the_umask_of_who_made_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    for parent in [*tmp_path.parents][:3]:
        parent.chmod(parent.stat().st_mode | 0o111)
    with ExitStack() as stack:
        first = Taker(stack, tmp_path, umask="077")
        assert first.take() == "held"
        assert path_of(tmp_path, GPU).stat().st_mode & 0o777 == 0o666
        assert Taker(stack, tmp_path, uid=NOBODY).take() == f"{GPU} {first.process.pid}"
        first.process.kill()
        first.process.wait()
        theirs = Taker(stack, tmp_path, uid=NOBODY)
        assert theirs.take() == "held"
        assert Taker(stack, tmp_path).take() == f"{GPU} {theirs.process.pid}"


@needs_root
def test_who_cannot_use_the_first_folder_meets_the_others_in_the_second(tmp_path: Path) -> None:
    roots, everybody = tmp_path / "a", tmp_path / "b"
    roots.mkdir(mode=0o755)
    everybody.mkdir()
    everybody.chmod(0o1777)
    for parent in [tmp_path, *tmp_path.parents][:4]:
        parent.chmod(parent.stat().st_mode | 0o111)
    with ExitStack() as stack:
        theirs = Taker(stack, roots, everybody, uid=NOBODY)
        assert theirs.take() == f"held {roots}"
        assert Taker(stack, roots, everybody).take() == f"{GPU} {theirs.process.pid}"
        theirs.process.kill()
        theirs.process.wait()
        ours = Taker(stack, roots, everybody)
        assert ours.take() == "held"
        # Made by us, the file of the first folder can be locked by all.
        assert Taker(stack, roots, everybody, uid=NOBODY).take() == f"{GPU} {ours.process.pid}"


def test_a_folder_that_is_not_there_is_told_and_done_without(tmp_path: Path) -> None:
    missing, file = tmp_path / "missing", tmp_path / "file"
    file.touch()
    with held([missing, file], [GPU], me()) as unusable:
        assert unusable == {str(missing): "no such file or directory", str(file): "not a directory"}
    assert holders([missing, file], GPU) == ()


def test_what_stands_where_the_lock_belongs_is_named_and_touched_by_nobody(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    path = path_of(tmp_path, GPU)
    hostile: list[tuple[Callable[[], object], str]] = [
        (path.mkdir, "is no lock file (is a directory)"),
        (lambda: path.symlink_to(precious), "is no lock file (too many levels of symbolic links)"),
        (lambda: path.symlink_to(tmp_path / "nowhere"), "is no lock file (too many levels of symbolic links)"),
        (lambda: os.mkfifo(path), "is no lock file (not a regular file)"),
    ]
    for make, why in hostile:
        make()
        with pytest.raises(SpoiltError) as raised, held([tmp_path], [GPU], me()):
            raise AssertionError("held something else")
        assert raised.value.why == f"'{path}' {why}; remove it"
        assert holders([tmp_path], GPU) == ()
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    assert precious.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@needs_root
def test_a_lock_file_that_another_user_closed_to_us_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    for parent in [*tmp_path.parents][:3]:
        parent.chmod(parent.stat().st_mode | 0o111)
    path = path_of(tmp_path, GPU)
    path.touch()
    path.chmod(0o600)
    code = f"""
import os
from pathlib import Path
from mgpu_llm.adapters.gpu_locks import Holder, SpoiltError, held
os.setgid({NOBODY}); os.setuid({NOBODY})
try:
    with held([Path({str(tmp_path)!r})], [{GPU!r}], Holder(pid=1)): print("held")
except SpoiltError as error: print(error.why)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == f"this user may not open '{path}'; remove it\n", done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00\xff garbage",
        "[1]\n{}\n",
        '{"pid": "71"}\n{"pid": true}\n',
        "[" * 100_000,
        json.dumps({"pid": 71, "user": "mallory", "config": 7, "runtime_dir": "\x1b[2J"}),
    ],
)
def test_garbage_in_a_lock_file_neither_holds_a_gpu_nor_names_anybody_else(tmp_path: Path, text: str) -> None:
    path = path_of(tmp_path, GPU)
    path.write_text(text)
    assert holders([tmp_path], GPU) == ()
    with ExitStack() as stack:
        first = Taker(stack, tmp_path)
        assert first.take() == "held"
        path.write_text(text)
        assert [holder.pid for holder in holders([tmp_path], GPU)] == [first.process.pid]
        with pytest.raises(HeldError) as raised, held([tmp_path], [GPU], me()):
            raise AssertionError("two hold it")
        assert raised.value.holders == (Holder(pid=first.process.pid),)
        assert str(raised.value.holders[0]) == f"pid {first.process.pid}"


def test_where_the_kernel_does_not_name_the_holder_its_own_words_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        first = Taker(stack, tmp_path)
        assert first.take() == "held"
        monkeypatch.setattr(gpu_locks, "PROC_LOCKS", tmp_path / "missing")
        with pytest.raises(HeldError) as raised, held([tmp_path], [GPU], me()):
            raise AssertionError("two hold it")
        assert [holder.pid for holder in raised.value.holders] == [first.process.pid]
        path_of(tmp_path, GPU).write_text("")
        with pytest.raises(HeldError) as raised, held([tmp_path], [GPU], me()):
            raise AssertionError("two hold it")
        assert str(raised.value.holders[0]) == "nobody can tell which"


def test_a_mig_slice_of_the_old_naming_has_a_lock_of_its_own(tmp_path: Path) -> None:
    slices = ["MIG-GPU-a0000000-0000-4000-8000-000000000000/1/0", "MIG-GPU-a0000000-0000-4000-8000-000000000000/2/0"]
    with held([tmp_path], slices[:1], me()), held([tmp_path], slices[1:], me()):
        assert len(list(tmp_path.iterdir())) == 2


def test_whoever_has_a_slice_keeps_out_who_wants_its_gpu_whole_and_the_other_way_round(tmp_path: Path) -> None:
    one, two = "MIG-a", "MIG-b"
    with ExitStack() as stack:
        with held([tmp_path], [one], me(), partly=[GPU]):
            assert Taker(stack, tmp_path).take() == f"{GPU} {os.getpid()}"
            assert Taker(stack, tmp_path, uuids=one).take() == f"{one} {os.getpid()}"
            assert Taker(stack, tmp_path, uuids=two).take() == "held"
            assert {holder.pid for holder in holders([tmp_path], GPU)} == {os.getpid()}
            with held([tmp_path], [], Holder(pid=1), partly=[GPU]):
                assert [holder.shared for holder in holders([tmp_path], GPU)] == [False]
        whole = Taker(stack, tmp_path)
        assert whole.take() == "held"
        with pytest.raises(HeldError) as raised, held([tmp_path], [one], me(), partly=[GPU]):
            raise AssertionError("it is held whole")
        assert (raised.value.uuid, [holder.pid for holder in raised.value.holders]) == (GPU, [whole.process.pid])


#: Takes and lets go of a lock again and again, and tells how often it had it, and how often somebody else had it too.
AGAIN_AND_AGAIN = """
import os, sys
from pathlib import Path
from mgpu_llm.adapters.gpu_locks import HeldError, Holder, SpoiltError, held
folder, gpu, had, both = Path(sys.argv[1]), sys.argv[2], 0, 0
for _ in range(300):
    try:
        with held([folder], [gpu], Holder(pid=os.getpid())):
            had += 1
            try: os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            except FileExistsError: both += 1
            else: os.unlink(folder / "inside")
    except HeldError: pass
print(had, both)
"""


def test_locks_whose_files_come_and_go_are_never_held_by_two(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    argv = [sys.executable, "-c", AGAIN_AND_AGAIN, str(tmp_path), GPU]
    with ExitStack() as stack:
        all_of_them = [
            stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env)) for _ in range(4)
        ]
        answers = [process.communicate(timeout=60)[0].split() for process in all_of_them]
    assert [both for _, both in answers] == ["0"] * 4
    assert all(int(had) > 0 for had, _ in answers)
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_shared_lock_stays_for_those_who_still_hold_it(tmp_path: Path) -> None:
    with ExitStack() as stack:
        other = Taker(stack, tmp_path, shared=True)
        assert other.take() == "held"
        with held([tmp_path], [GPU], me(shared=True)):
            pass
        assert [holder.pid for holder in holders([tmp_path], GPU)] == [other.process.pid]
        assert Taker(stack, tmp_path).take() == f"{GPU} {other.process.pid}"
