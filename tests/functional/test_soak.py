"""A long run takes no more memory, files, threads or processes than a short one, and leaves nothing."""

import os
import time

import psutil
import pytest

from tests.helpers.runs import arguments_for, finish, rank_process, start, wait_for_step

STEPS, SETTLED = 3000, 1000


def usage(launcher, rank):
    own = rank_process(launcher, rank)
    return {
        "memory": own.memory_info().rss,
        "files": own.num_fds(),
        "threads": own.num_threads(),
        "children": len(own.children(recursive=True)),
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_grows_and_nothing_stays(corpus, tmp_path):
    before = set(os.listdir("/dev/shm"))
    directory = tmp_path / "run"
    more = ["--checkpoint.save-every", 25, "--checkpoint.keep-last", 2, "--checkpoint.async-save"]
    more += ["--training.check-replicas-every", 50, "--evaluation.every", 100, "--telemetry.log-every", 20]
    process = start([*arguments_for(corpus, directory, steps=STEPS), *map(str, more)], processes=2)
    wait_for_step(process, directory, SETTLED)
    first = [usage(process, rank) for rank in range(2)]
    wait_for_step(process, directory, STEPS - 20)
    last = [usage(process, rank) for rank in range(2)]
    code, output = finish(process)
    assert code == 0, output
    for earlier, after in zip(first, last, strict=True):
        assert after["memory"] < 1.01 * earlier["memory"], (first, last)
        # A save may be under way at either look.
        assert after["files"] <= earlier["files"] + 3 and after["threads"] <= earlier["threads"], (
            first,
            last,
        )
        assert after["children"] <= 1
    assert len(list((directory / "checkpoints").iterdir())) == 2
    time.sleep(1)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(directory) in (p.info["cmdline"] or [])]
    assert left == [] and set(os.listdir("/dev/shm")) <= before
