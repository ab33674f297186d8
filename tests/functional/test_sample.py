"""`megatron-dlm sample`: the same texts from a checkpoint and its export, gaps, traces in a real browser."""

import json
import re
import shutil
import subprocess

import pytest

from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT
from tests.helpers.runs import arguments_for, finish_ranks

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STEPS = 3


@pytest.fixture(scope="module")
def models(command, corpus, tmp_path_factory):
    """A checkpoint and its export."""
    directory = tmp_path_factory.mktemp("sample")
    for words in (
        arguments_for(corpus, directory / "run", steps=STEPS),
        ["export", directory / "run" / "checkpoints" / f"step-{STEPS:08d}", directory / "hf", "--no-verify"],
    ):
        command(*words)
    return directory / "run" / "checkpoints" / f"step-{STEPS:08d}", directory / "hf"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_checkpoint_and_export_give_the_same_texts_in_any_batch(command, models, tmp_path):
    options = ["--num-samples", 3, "--num-steps", 6, "--prompt", "the model", "--seed", 7]
    for index, (model, batch) in enumerate(zip(models, (3, 2), strict=True)):
        finished = command(
            "sample", model, *options, "--batch-size", batch, "--output", tmp_path / f"{index}.jsonl"
        )
        assert "3/3 texts" in finished.stderr and "tokens/s" in finished.stderr
    first, second = (lines_of(tmp_path / f"{index}.jsonl") for index in (0, 1))
    assert first == second and len(first) == 3
    assert all(line["text"].startswith("the model") and len(line["token_ids"]) == 32 for line in first)
    assert len({line["text"] for line in first}) == 3


def test_processes_share_the_texts(models, tmp_path):
    """3 processes, of which the last has nothing to do in the second round."""
    words = ["sample", models[1], "--num-samples", 5, "--num-steps", 4, "--batch-size", 1]
    for count in (1, 3):
        code, said = finish_ranks([*words, "--output", tmp_path / f"{count}.jsonl"], count)
        assert code == 0 and said.count("5/5 texts") == 1, said
    assert len(lines_of(tmp_path / "1.jsonl")) == 5
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "3.jsonl").read_bytes()


def test_gaps_are_filled(command, models, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        json.dumps({"parts": ["the model ", 4, " reads ", 3, "tokens"]})
        + "\n"
        + json.dumps({"prompt": "import"})
        + "\n"
    )
    words = ["--prompts", prompts, "--num-samples", 2, "--sampler", "confidence", "--num-steps", 3]
    command("sample", models[1], *words, "--output", tmp_path / "out.jsonl")
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["number"] for line in lines] == [0, 1, 2, 3]
    assert all(re.match(r"the model .* reads .*tokens", line["text"], re.DOTALL) for line in lines[:2])
    assert all(line["text"].startswith("import") for line in lines[2:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sampler", "block", "--num-steps", 5], "num_steps: 5 does not divide 32 tokens"),
        (["--top-p", 1.5], "top_p: 1.5 is outside (0, 1]"),
        (["--greedy-tail"], "greedy_tail: not used by sampler ancestral of mdlm"),
        (["--prompt", "the model " * 20], "tokens exceed the length 32"),
        (["--prompts", "no.jsonl"], "prompts: no.jsonl"),
        (["--output", "no/where.jsonl"], "output: no: no such directory"),
        (["--num-samples", 0], "num_samples: 0 is below 1"),
        (["--tokenizer", "no"], "tokenizer: no: no such directory"),
    ],
)
def test_bad_settings_end_in_one_line(command, models, options, words):
    finished = command("sample", models[1], *options, check=False)
    assert finished.returncode == 2 and finished.stdout == ""
    assert words in finished.stderr and finished.stderr.count("\n") == 1


def test_what_is_no_model_is_refused(command, tmp_path):
    finished = command("sample", tmp_path, check=False)
    expected = "neither a run, a checkpoint (step-NNNNNNNN) nor an exported folder"
    assert finished.returncode == 2 and expected in finished.stderr


@pytest.fixture(scope="module")
def trace(command, models, tmp_path_factory):
    """A page of text that would break out of its script, if text could."""
    page = tmp_path_factory.mktemp("trace") / "trace.html"
    words = ["sample", models[1], "--num-samples", 2, "--num-steps", 8, "--trace", page]
    words += ["--prompt", "</script><b>"]
    command(*words)
    return page


def test_a_trace_is_one_file_that_needs_nothing_else(trace):
    text = trace.read_text()
    assert not re.search(r"(src|href)=|https?://|@import", text)
    assert text.count("</script>") == 2


def browse(page, place, *options):
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    finished = subprocess.run(
        [*words, *options, f"file://{page}#{place}"], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: tools/install_browser.sh")
def test_a_browser_plays_the_trace(trace):
    before = browse(trace, "step=0", "--dump-dom")
    middle = browse(trace, "step=4", "--dump-dom")
    after = browse(trace, "step=99&sample=1", "--dump-dom")
    # The last steps are left out where they reveal nothing.
    shown = [re.search(r'id="count">(\d+) / (\d+)<', page).groups() for page in (before, middle, after)]
    last = shown[0][1]
    assert shown == [("0", last), ("4", last), (last, last)] and 5 <= int(last) <= 9
    masks = [len(re.findall(r'class="token mask', page)) for page in (before, middle, after)]
    assert masks[0] > masks[1] > masks[2] == 0
    assert "&lt;" in before and "<b>" not in before.partition("<body>")[2]
    # Left alone it plays to the end.
    assert f'id="count">{last} / {last}<' in browse(trace, "", "--dump-dom")
    screenshot = ROOT / "build" / "trace.png"
    screenshot.parent.mkdir(exist_ok=True)
    browse(trace, "step=4", f"--screenshot={screenshot}", "--window-size=1000,500")
    assert screenshot.read_bytes().startswith(b"\x89PNG") and screenshot.stat().st_size > 5000
