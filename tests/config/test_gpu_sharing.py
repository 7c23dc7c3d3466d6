"""[gpus] shared and lock_dirs: whether other instances may use the GPUs, and where the locks are."""

from __future__ import annotations

import pytest

from tests.config.loading import config, problems


def test_gpus_are_not_shared_and_locked_where_every_instance_comes_unless_it_is_said_otherwise() -> None:
    untold = config("").gpus
    assert (untold.shared, untold.lock_dirs) == (False, ("/run/lock", "/dev/shm"))
    told = config('gpus = { shared = true, lock_dirs = ["/srv/locks"] }').gpus
    assert (told.shared, told.lock_dirs) == (True, ("/srv/locks",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('gpus.shared = "yes"', 'gpus.shared: found "yes" (string), expected true or false; write true'),
        ("gpus.lock_dirs = []", "gpus.lock_dirs: found [] (array), expected one absolute path at least"),
        (
            'gpus.lock_dirs = "/run"',
            'gpus.lock_dirs: found "/run" (string), expected an array of absolute paths; write ["/run"]',
        ),
        ('gpus.lock_dirs = ["run"]', 'gpus.lock_dirs[0]: found "run" (string), expected an absolute path'),
    ],
)
def test_what_they_may_not_be_is_said(text: str, said: str) -> None:
    assert [line.partition(": ")[2] for line in problems(text)] == [said]
