"""What two looks at the engine's stacks say, and who waits for what."""

from __future__ import annotations

import pytest

from mgpu_llm.core.events import Stack, StacksTaken
from mgpu_llm.core.stacks import SHOWN_STACKS, lock_waiters, shown, standing_still, storage_waiters
from tests.core.looks import stack

BUSY = "WorkerProc.worker_busy_loop (v1/executor/multiproc_executor.py:1041)"
MAIN = "WorkerProc.worker_main (v1/executor/multiproc_executor.py:902)"


def look(*stacks: Stack) -> StacksTaken:
    return StacksTaken(at=1.0, attempt=1, stacks=stacks)


def compared(before: tuple[str, ...], now: tuple[str, ...]) -> bool | None:
    return standing_still(look(stack(7, *before)), look(stack(7, *now)))


# -- two looks -------------------------------------------------------------------------------------------------------


def test_a_thread_that_is_where_it_was_stands_still() -> None:
    assert compared(("synchronize (cuda/streams.py:105)", MAIN), ("synchronize (cuda/streams.py:105)", MAIN)) is True


@pytest.mark.parametrize(
    "now",
    [
        ("record (cuda/streams.py:9)", MAIN),
        ("synchronize (cuda/streams.py:106)", MAIN),
        ("synchronize (cuda/streams.py:105)", "lower (torch/_inductor/graph.py:1)", MAIN),
        (MAIN,),
    ],
    ids=["another function", "another line", "called from elsewhere", "returned"],
)
def test_a_thread_that_is_elsewhere_moves(now: tuple[str, ...]) -> None:
    assert compared(("synchronize (cuda/streams.py:105)", MAIN), now) is False


@pytest.mark.parametrize(
    ("loop", "in_it", "later_in_it"),
    [
        ("MessageQueue.acquire_read (device_communicators/shm_broadcast.py:864)", ("sched_yield (os.py:1)",), ()),
        ("acquire_read (shm_broadcast.py:864)", ("poll (zmq/sugar/poll.py:106)", "wait (shm_broadcast.py:2)"), ("x (y.py:1)",)),
        ("MessageQueue.acquire_write (device_communicators/shm_broadcast.py:700)", (), ("time (a.py:9)",)),
        ("wait_for_engine_startup (v1/engine/utils.py:1398)", ("Poller.poll (zmq/sugar/poll.py:106)",), ("is_alive (p.py:1)",)),
        ("MPClient.monitor_engine_liveness (v1/engine/core_client.py:9)", ("select (selectors.py:415)",), ()),
        ("BaseFileLock._poll_until_acquired (filelock/_api.py:335)", ("_acquire (filelock/_unix.py:42)",), ()),
        ("TMonitor.run (tqdm/_monitor.py:69)", ("wait (threading.py:622)",), ("get_instances (tqdm/_monitor.py:60)",)),
    ],
)  # fmt: skip
def test_what_a_waiting_loop_does_and_at_which_line_is_no_movement(
    loop: str, in_it: tuple[str, ...], later_in_it: tuple[str, ...]
) -> None:
    name, line = loop.rsplit(":", 1)
    for elsewhere in (loop, f"{name}:{int(line.rstrip(')')) + 1})"):
        assert compared((*in_it, loop, MAIN), (*later_in_it, elsewhere, MAIN)) is True
    assert compared((*in_it, loop, MAIN), (*in_it, loop, "other (x.py:1)")) is False


@pytest.mark.parametrize(
    ("asleep", "later"),
    [
        (("Condition.wait (threading.py:320)", "Event.wait (threading.py:622)"), ("Event.wait (threading.py:619)",)),
        (("_PollLikeSelector.select (selectors.py:415)", "wait (connection.py:947)"), ("wait (connection.py:946)",)),
        (("Poller.poll (zmq/sugar/poll.py:106)",), ()),
        (("Queue.get (queue.py:171)",), ("wait (threading.py:320)", "Queue.get (queue.py:171)")),
        (("Connection._recv (multiprocessing/connection.py:395)",), ()),
    ],
)
def test_whoever_sleeps_and_is_caught_on_its_way_in_or_out_stands_still(
    asleep: tuple[str, ...], later: tuple[str, ...]
) -> None:
    assert compared((*asleep, "waits (x.py:5)", MAIN), (*later, "waits (x.py:5)", MAIN)) is True
    assert compared((*asleep, "waits (x.py:5)", MAIN), (*asleep, "waits (x.py:6)", MAIN)) is False


def test_whoever_does_nothing_but_sleep_is_compared_by_where_it_sleeps() -> None:
    assert compared(("wait (threading.py:320)",), ("wait (threading.py:320)",)) is True
    assert compared(("wait (threading.py:320)",), ("poll (zmq/sugar/poll.py:106)",)) is False


@pytest.mark.parametrize(
    "name", ["polls", "waiter", "acquire_reader", "Pool.receive", "await_it", "runner_select_best", "getattr"]
)
def test_a_function_that_only_sounds_like_waiting_is_work(name: str) -> None:
    assert compared((f"{name} (x.py:5)", MAIN), (f"{name} (x.py:6)", MAIN)) is False
    assert compared(("a (x.py:1)", f"{name} (x.py:5)"), ("b (x.py:2)", f"{name} (x.py:5)")) is False


def test_a_sleep_further_out_hides_no_work() -> None:
    assert (
        compared(("a (x.py:1)", "Event.wait (threading.py:622)"), ("b (x.py:1)", "Event.wait (threading.py:622)"))
        is False
    )


def test_a_worker_compiles_inside_its_busy_loop_and_waits_there_for_the_next_call() -> None:
    compiling = (
        "proxy_call (fx/experimental/proxy_tensor.py:1196)",
        "compile_or_warm_up_model (v1/worker/gpu_worker.py:8)",
    )
    further = ("codegen (torch/_inductor/scheduler.py:77)", "compile_or_warm_up_model (v1/worker/gpu_worker.py:8)")
    read = ("MessageQueue.acquire_read (shm_broadcast.py:864)", "MessageQueue.dequeue (shm_broadcast.py:901)")
    waiting = ("Poller.poll (zmq/sugar/poll.py:106)", "SpinCondition.wait (shm_broadcast.py:210)", *read)
    assert compared((*compiling, BUSY, MAIN), (*further, BUSY, MAIN)) is False
    assert compared((*waiting, BUSY, MAIN), (*read, BUSY, MAIN)) is True
    assert compared((*compiling, BUSY, MAIN), (*waiting, BUSY, MAIN)) is False


def test_one_thread_that_moves_is_enough() -> None:
    before = look(stack(1, "a (x.py:1)"), stack(2, "a (x.py:1)"))
    assert standing_still(before, look(stack(1, "a (x.py:1)"), stack(2, "b (x.py:1)"))) is False


def test_threads_are_told_apart_by_process_and_number() -> None:
    one, other = stack(1, "a (x.py:1)", thread=5), stack(2, "b (x.py:1)", thread=5)
    assert standing_still(look(one, other), look(other, one)) is True


def test_a_thread_that_only_one_look_has_is_not_compared() -> None:
    still, new, gone = stack(1, "a (x.py:1)"), stack(2, "b (x.py:1)"), stack(3, "c (x.py:1)")
    assert standing_still(look(still, gone), look(still, new)) is True


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (look(), look()),
        (look(stack(1, "a (x.py:1)")), look()),
        (look(stack(1, "a (x.py:1)")), look(stack(2, "a (x.py:1)"))),
        (look(stack(1, frames=())), look(stack(1, frames=()))),
        (look(stack(1, "a (x.py:1)")), look(stack(1, frames=()))),
    ],
    ids=["nobody", "nobody any more", "others", "no Python", "no Python any more"],
)
def test_where_no_thread_was_seen_twice_nothing_can_be_said(first: StacksTaken, second: StacksTaken) -> None:
    assert standing_still(first, second) is None


def test_only_where_a_thread_stands_in_python_is_compared() -> None:
    before = stack(1, "a (x.py:1)", state="R", waits_in="", name="MainThread")
    now = stack(1, "a (x.py:1)", state="S", waits_in="futex_wait_queue", name="renamed")
    assert standing_still(look(before), look(now)) is True


# -- who waits for what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames",
    [
        ("BaseFileLock.acquire (filelock/_api.py:335)",),
        ("acquire (site-packages/filelock/_api.py:335)",),
        ("UnixFileLock._acquire (filelock/_unix.py:42)", "BaseFileLock.acquire (filelock/_api.py:335)"),
        ("FileBaton.wait (torch/utils/file_baton.py:42)", "_jit_compile (torch/utils/cpp_extension.py:1)"),
        ("wait (utils/file_baton.py)",),
        ("sleep (x.py:1)", "f (x.py:2)", "g (x.py:3)", "BaseFileLock.acquire (filelock/_api.py:335)"),
    ],
)
def test_who_waits_for_a_lock_file_is_known_by_its_innermost_frames(frames: tuple[str, ...]) -> None:
    waiter = stack(1, *frames)
    assert lock_waiters([waiter, stack(2)]) == (waiter,)


@pytest.mark.parametrize(
    "frames",
    [
        ("Lock.acquire (threading.py:1)",),
        ("f (torch/distributed/_api.py:3)",),
        ("wait (threading.py:3)",),
        ("a (x.py:1)", "b (x.py:1)", "c (x.py:1)", "d (x.py:1)", "BaseFileLock.acquire (filelock/_api.py:335)"),
        ("f (my_filelock_tools.py:3)",),
    ],
    ids=["a lock in memory", "another _api.py", "another wait", "work under a lock", "another module"],
)
def test_who_only_resembles_a_waiter_for_a_lock_file_is_none(frames: tuple[str, ...]) -> None:
    assert lock_waiters([stack(1, *frames)]) == ()


@pytest.mark.parametrize(
    "waits_in",
    ["folio_wait_bit_common", "wait_on_page_bit", "io_schedule", "blk_mq_get_tag", "bio_wait", "nvme_wait", "nfs_wait_bit",
     "rpc_wait_bit_killable", "smb2_wait", "cifs_wait", "fuse_simple_request", "request_wait_answer", "ceph_get_caps",
     "lustre_x", "ll_file_read", "cl_sync_io_wait", "p9_client_rpc", "gpfs_x", "xfs_file_read_iter", "ext4_file_read_iter",
     "btrfs_read", "jbd2_log_wait_commit", "filemap_fault"],
)  # fmt: skip
def test_who_sleeps_in_a_disk_or_a_network_file_system_waits_for_storage(waits_in: str) -> None:
    assert storage_waiters([stack(1, waits_in=waits_in)]) == (stack(1, waits_in=waits_in),)


def test_who_sleeps_without_being_interruptible_waits_for_storage() -> None:
    assert storage_waiters([stack(1, state="D"), stack(2, state="S")]) == (stack(1, state="D"),)


READING = (
    "UntypedStorage.__getitem__ (torch/storage.py:471)",
    "safetensors_weights_iterator (model_loader/weight_utils.py:1212)",
)


@pytest.mark.parametrize(
    "waits_in",
    ["pipe_read", "anon_pipe_read", "fifo_open", "wait_for_partner", "sk_wait_data", "tcp_recvmsg", "unix_stream"],
)
def test_a_pipe_or_a_socket_is_storage_to_whoever_reads_the_model_from_it_and_to_nobody_else(waits_in: str) -> None:
    assert storage_waiters([stack(1, *READING, waits_in=waits_in)])
    assert storage_waiters([stack(1, waits_in=waits_in)]) == ()


@pytest.mark.parametrize(
    "waits_in", ["", "futex_wait_queue", "do_epoll_wait", "ep_poll", "poll_schedule_timeout.constprop.0", "hrtimer_nanosleep",
                 "__do_sys_pause", "do_wait"]
)  # fmt: skip
def test_who_waits_for_something_else_or_for_nothing_known_does_not_wait_for_storage(waits_in: str) -> None:
    assert storage_waiters([stack(1, *READING, waits_in=waits_in)]) == ()


# -- for people ------------------------------------------------------------------------------------------------------


def test_each_process_is_shown_by_its_main_thread_with_its_innermost_frames() -> None:
    deep = tuple(f"f{number} (x.py:{number})" for number in range(9))
    seen = shown(
        [stack(1, *deep, waits_in="futex_wait_queue"), stack(1, thread=8), stack(2, frames=(), process="python")]
    )
    assert seen == (
        "VLLM::Worker_TP (1) stands in f0 (x.py:0) < f1 (x.py:1) < f2 (x.py:2) < f3 (x.py:3), in the kernel: futex_wait_queue",
        "python (2) stands in no Python frames",
    )


def test_of_many_places_the_rest_is_counted() -> None:
    def elsewhere(count: int) -> tuple[str, ...]:
        return shown(stack(pid, f"f{pid} (x.py:1)") for pid in range(1, count + 1))

    assert len(elsewhere(SHOWN_STACKS)) == SHOWN_STACKS
    assert elsewhere(SHOWN_STACKS + 7)[-1] == "and 7 more"
    assert shown([]) == ()


def test_those_that_compute_are_shown_first_those_in_one_place_together_and_pythons_helper_not_at_all() -> None:
    helper = stack(3, "main (multiprocessing/resource_tracker.py:227)", process="python")
    server = stack(2, "poll (zmq/sugar/poll.py:106)", process="python")
    assert shown([helper, server, stack(8), stack(7)]) == (
        "VLLM::Worker_TP (7, 8) stand in synchronize (torch/cuda/streams.py:105) < __init__ (device_communicators/pynccl.py:143)",
        "python (2) stands in poll (zmq/sugar/poll.py:106)",
    )
