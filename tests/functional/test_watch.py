"""`watch` in a terminal, in a pipe, and on what is no run."""

import json
import os
import subprocess
import sys
import time

from tests.helpers.hang import HANG_SECONDS
from tests.helpers.processes import TRAINER


def test_a_finished_run_is_shown_once_in_a_pipe(command, uninterrupted):
    directory, _ = uninterrupted
    text = command("watch", str(directory)).stdout
    assert "nats_per_token" in text and "finished" in text and "\x1b" not in text
    refused = command("watch", str(directory), "--metric", "los", check=False)
    assert refused.returncode == 2 and "--metric: 'los' is not one of" in refused.stderr
    refused = command("watch", str(directory.parent / "none"), check=False)
    assert refused.returncode == 2 and "no such directory" in refused.stderr


def test_a_terminal_follows_until_the_run_has_ended(tmp_path):
    import pyte

    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"config": {"training": {"num_steps": 2}}}))
    metrics = run / "metrics.jsonl"

    def write(step):
        line = {"kind": "train", "step": step, "nats_per_token": 3.0, "eta_seconds": 5.0, "time": time.time()}
        with metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    write(1)
    parent, child = os.openpty()
    environment = os.environ | {"COLUMNS": "100", "LINES": "30", "TERM": "xterm"}
    words = [sys.executable, *TRAINER, "watch", str(run), "--every", "0.2"]
    watching = subprocess.Popen(words, stdout=child, stderr=child, stdin=child, env=environment)
    os.close(child)
    screen = pyte.Screen(100, 30)
    stream = pyte.ByteStream(screen)

    def until(text, seconds=HANG_SECONDS):
        deadline = time.monotonic() + seconds
        while text not in "".join(screen.display):
            assert time.monotonic() < deadline, "\n".join(screen.display)
            try:
                stream.feed(os.read(parent, 4096))
            except OSError:
                break
        assert text in "".join(screen.display), "\n".join(screen.display)

    until("1 of 2")
    until("ETA 0:00:05")
    write(2)
    until("finished")
    assert watching.wait(30) == 0
