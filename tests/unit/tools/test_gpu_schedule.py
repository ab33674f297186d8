"""Pieces of a benchmark run in order, as far as their time allows, and each once."""

from tools.bench.gpu_schedule import Piece, measured, run_missing


def test_what_fits_is_measured_and_the_rest_is_said(tmp_path, capsys):
    begun = []

    def piece(name, seconds):
        return Piece(name, lambda deadline: begun.append(name) or {"value": len(begun)}, seconds=seconds)

    pieces = [piece("short", 1), piece("long", 25), piece("also short", 1)]
    output = tmp_path / "lines.jsonl"
    run_missing(pieces, output, time_limit=20)
    assert begun == ["short", "also short"] and list(measured(output)) == begun
    assert "long: skipped: takes up to 25 s, and " in capsys.readouterr().err
    run_missing(pieces, output, time_limit=200)
    assert begun == ["short", "also short", "long"]


def test_a_piece_that_fails_costs_no_other(tmp_path):
    def fail(deadline):
        raise ValueError("no such kernel")

    output = tmp_path / "lines.jsonl"
    run_missing([Piece("bad", fail), Piece("good", lambda deadline: {"value": 1})], output, time_limit=100)
    lines = measured(output)
    assert lines["bad"]["error"] == "ValueError: no such kernel" and lines["good"]["value"] == 1
