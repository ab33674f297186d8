"""Sweeps of samplers: speed, a judge's perplexity, entropy; resumed, drawn, with published points behind."""

import csv
import math

import pytest
import torch

from megatron_dlm.evaluation.judge import Judge, hugging_face_judge
from megatron_dlm.evaluation.sample_quality import frontier, unigram_entropy
from megatron_dlm.interfaces import InputError
from tests.helpers.runs import arguments_for, finish_ranks

STEPS = 3


@pytest.fixture(scope="module")
def models(command, corpus, tmp_path_factory):
    """Checkpoints of MDLM and AR."""
    directory = tmp_path_factory.mktemp("pareto")
    for family in ("mdlm", "ar"):
        words = arguments_for(corpus, directory / family, recipe=f"examples/{family}/tiny.py", steps=STEPS)
        command(*words)
    return {family: directory / family / "checkpoints" / f"step-{STEPS:08d}" for family in ("mdlm", "ar")}


@pytest.fixture(scope="module")
def gpt2(corpus, tmp_path_factory):
    """A local Hugging Face judge with random weights and the corpus' tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=301, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(corpus.tokenizer).save_pretrained(folder)
    return folder


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_is_measured_once_and_drawn(command, models, gpt2, tmp_path):
    words = [
        "evaluate",
        "pareto",
        models["mdlm"],
        models["ar"],
        "--judge",
        gpt2,
        "--output",
        tmp_path / "out",
    ]
    words += ["--num-samples", 3, "--batch-sizes", 2, "--length", 16]
    points = tmp_path / "published.csv"
    points.write_text("family,throughput_tok_per_s,gen_ppl\nMDLM,35.6,100\nMDLM,79.0,110\n")
    first = command(*words, "--num-steps", 2, 4, "--temperatures", 1, 0.5, "--reference", points)
    rows = rows_of(tmp_path / "out" / "pareto.csv")
    assert [row["family"] for row in rows] == ["mdlm"] * 4 + ["ar"] * 2
    assert {row["num_steps"] for row in rows} == {"2", "4", ""}
    for row in rows:
        assert float(row["tokens_per_second"]) > 0 and 1 < float(row["generative_perplexity"]) < 1e6
        assert 0 < float(row["unigram_entropy"]) <= math.log(16) + 1e-9
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "6 combinations" in first.stdout and "*" in first.stdout
    # Again, with more: what is there stays as it was measured.
    command(*words, "--num-steps", 2, 4, 8, "--temperatures", 1, 0.5)
    again = rows_of(tmp_path / "out" / "pareto.csv")
    assert again[:6] == rows and [row["num_steps"] for row in again[6:]] == ["8", "8"]
    # Weights of other precision are another model, and not on the same frontier.
    other = command(*words, "--num-steps", 2, "--dtype", "bf16")
    assert len(rows_of(tmp_path / "out" / "pareto.csv")) == 10 and "2 combinations" in other.stdout


@pytest.mark.slow
def test_an_ar_model_of_this_package_judges(command, models, tmp_path):
    words = ["evaluate", "pareto", models["mdlm"], "--output", tmp_path / "out", "--num-samples", 2]
    words += ["--num-steps", 4, "--samplers", "confidence", "block-autoregressive"]
    command(*words, "--judge", models["ar"])
    rows = rows_of(tmp_path / "out" / "pareto.csv")
    assert [row["sampler"] for row in rows] == ["confidence", "block-autoregressive"]
    assert {row["batch_size"] for row in rows} == {"2"}
    finished = command(*words, "--judge", models["mdlm"], check=False)
    assert (
        finished.returncode == 2
        and "mdlm is no judge; take a model that predicts next tokens" in finished.stderr
    )


def test_every_sampler_of_a_family_is_measured_with_its_own_settings(command, models, gpt2, tmp_path):
    words = ["evaluate", "pareto", models["mdlm"], "--judge", gpt2, "--output", tmp_path, "--num-samples", 2]
    words += ["--samplers", "ancestral", "psi", "remasking", "confidence"]
    words += ["--length", 16, "--num-steps", 6, 8]
    words += ["--kappas", 0.2, 0.8, "--remasking", "cap", "loop", "--remasking-strengths", 0.1]
    command(*words, "--thresholds", 0.5)
    rows = rows_of(tmp_path / "pareto.csv")
    variants = ["", "kappa 0.2", "kappa 0.8", "cap 0.1", "loop 0.1", ""]
    expected = [(variant, steps) for variant in variants for steps in "68"] + [("threshold 0.5", "")]
    assert [(row["variant"], row["num_steps"]) for row in rows] == expected
    assert len({row["generative_perplexity"] for row in rows}) > 8


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--judge", "no"], "judge: no: has no config.json"),
        (["--num-steps", 4, 5, "--samplers", "block"], "num_steps: 5 does not divide 32 tokens"),
        (["--length", 1], "length: 1 is below 2"),
        (["--reference", "no.csv"], "reference: no.csv: not a table"),
        (["--num-samples", 0], "num_samples: 0 is below 1"),
        (["--samplers", "psi", "--kappas", 1.5], "kappa: 1.5 is outside [0, 1]"),
        (["--samplers", "confidence", "--thresholds", 0], "threshold: 0.0 is outside (0, 1]"),
        (["--temperatures", -1], "temperature: -1.0 is not 0"),
    ],
)
def test_bad_input_ends_in_one_line(command, models, gpt2, tmp_path, more, words):
    judge = [] if "--judge" in more else ["--judge", gpt2]
    finished = command(
        "evaluate", "pareto", models["mdlm"], "--output", tmp_path / "out", *judge, *more, check=False
    )
    assert finished.returncode == 2 and words in finished.stderr, finished.stderr
    assert not (tmp_path / "out").exists()


def test_a_judge_s_perplexity_is_that_of_its_tokens(caplog):
    table = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).log()
    judge = Judge(lambda ids: table[ids], lambda text: [int(c) for c in text], 4)
    expected = -(math.log(0.25) + math.log(0.8) + math.log(0.5)) / 3
    assert judge.perplexity(["011", "00", "2"]) == pytest.approx(math.exp(expected))
    # Longer than the judge can read: cut.
    assert judge.perplexity(["011112222"]) == judge.perplexity(["0111"])
    assert "judge: 1 of 1 texts judged by their first 4 tokens" in caplog.text
    assert judge.perplexity([""]) == math.inf
    assert "judge: 1 of 1 texts have no two tokens" in caplog.text


def test_a_judge_that_would_run_code_is_refused(gpt2, tmp_path):
    import shutil

    folder = tmp_path / "judge"
    shutil.copytree(gpt2, folder)
    weights = torch.zeros(1)
    (folder / "model.safetensors").unlink()
    torch.save({"a": weights}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="judge"):
        hugging_face_judge(folder, torch.device("cpu"))


def test_entropy_and_frontier():
    assert unigram_entropy([[1, 1, 1, 1]]) == 0.0
    assert unigram_entropy([[1, 2, 3, 4], [1, 1, 2, 2]]) == pytest.approx((math.log(4) + math.log(2)) / 2)
    points = [(10.0, 5.0), (20.0, 6.0), (15.0, 7.0), (5.0, 5.0), (30.0, 9.0)]
    assert frontier(points) == [4, 1, 0]


def test_processes_share_the_texts_and_the_judge(models, gpt2, tmp_path):
    words = ["evaluate", "pareto", models["mdlm"], "--judge", gpt2, "--num-steps", 2, 4, "--num-samples", 5]
    words += ["--batch-sizes", 2, "--length", 16]
    for count in (1, 2):
        code, said = finish_ranks([*words, "--output", tmp_path / str(count)], count)
        assert code == 0 and said.count("2 combinations, ") == 1, said
    timed = ("tokens_per_second", "seconds")
    alone, together = (rows_of(tmp_path / str(count) / "pareto.csv") for count in (1, 2))
    for rows in (alone, together):
        for row in rows:
            assert all(float(row.pop(name)) > 0 for name in timed)
    assert alone == together and len(alone) == 2
