"""`megatron-dlm evaluate perplexity`: files of texts, processes, WikiText itself."""

import json

import pytest

from tests.helpers.paths import DATA
from tests.helpers.runs import finish_ranks
from tools import tiny

WIKITEXT = DATA / "wikitext-2" / "valid.txt"


@pytest.fixture(scope="module")
def checkpoint(uninterrupted):
    return uninterrupted[0] / "checkpoints" / "step-00000014"


def test_files_strides_and_processes(checkpoint, tmp_path, read_json):
    texts = list(tiny.sentences(3, seed=4))
    (tmp_path / "one.txt").write_text("\n \n".join(texts))
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"page": text}) + "\n" for text in texts))
    words = ["evaluate", "perplexity", checkpoint, "--text", tmp_path / "one.txt", tmp_path / "more.jsonl"]
    words += ["--json-key", "page", "--num-times", 4, "--max-copies", 8, "--output", tmp_path / "found.json"]
    found = []
    for processes, stride in ((1, 8), (2, 8), (1, None)):
        code, said = finish_ranks([*words, *(["--stride", stride] if stride else [])], processes)
        assert code == 0 and said.count("a word;") == 1, said
        found.append(read_json(tmp_path / "found.json"))
    one, two, aside = found
    assert two["nats"] == pytest.approx(one["nats"], rel=1e-6)
    assert one["texts"] == 4 and one["words"] == 2 * sum(len(text.split()) for text in texts)
    assert aside["tokens"] == one["tokens"] and aside["windows"] < one["windows"]
    assert one["protocol"]["low"] < one["protocol"]["nats_per_token"] < one["protocol"]["high"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--text", "none.txt"], "text: none.txt: "),
        (["--text", "README.md"], "README.md"),
        (["--text", "{here}", "--stride", 33], "stride: 33 is outside [1, 32], for windows of 32 tokens"),
        (["--text", "{here}", "--limit", 0], "limit: 0 is below 1"),
        (["--text", "{empty}"], "text: no text with a token"),
        (["--text", "wiki.txt.gz"], "text: wiki.txt.gz: a text that is one file is read uncompressed"),
    ],
)
def test_bad_input_is_one_line(command, checkpoint, tmp_path, words, says):
    (tmp_path / "here.txt").write_text("the model")
    (tmp_path / "empty.txt").write_text("")
    places = {"here": tmp_path / "here.txt", "empty": tmp_path / "empty.txt"}
    words = [word.format(**places) if isinstance(word, str) else word for word in words]
    finished = command("evaluate", "perplexity", checkpoint, *words, check=False)
    assert finished.returncode == 2 and says in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.slow
@pytest.mark.skipif(not WIKITEXT.is_file(), reason=f"no {WIKITEXT}")
def test_wikitext_by_word_and_byte(command, checkpoint, tmp_path, read_json):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install megatron-dlm[harness]")
    words = ["--text", WIKITEXT, "--detokenize", "wikitext", "--num-times", 1, "--max-copies", 1]
    command("evaluate", "perplexity", checkpoint, *words, "--output", tmp_path / "found.json")
    found = read_json(tmp_path / "found.json")
    assert found["texts"] == 1 and found["num_bytes"] == WIKITEXT.stat().st_size
    assert found["words"] == len(WIKITEXT.read_text().split())
    assert found["tokens"] > found["words"] and 1 < found["per_token"] < found["per_word"]
