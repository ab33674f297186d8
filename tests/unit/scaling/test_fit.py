"""fit.json, and what the command prints and refuses."""

import csv
import json
import math

import pytest

from megatron_dlm.cli.scaling_fit import run
from megatron_dlm.interfaces import InputError
from megatron_dlm.scaling.points import PUBLISHED, published_points

FAMILIES = ["ar", "mdlm", "duo", "esolm"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "fit.json"
    assert run(["published", "--output", str(path), "--replicates", "100"]) == 0
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_the_record_has_every_fit_with_its_intervals(fitted):
    assert [row["family"] for row in fitted["optima"]] == [name for name in FAMILIES for _ in range(5)]
    assert [row["family"] for row in fitted["laws"]] == [name for name in FAMILIES for _ in range(3)]
    assert [row["method"] for row in fitted["joint"]] == ["projection", "huber"] * 4
    assert [row["family"] for row in fitted["ratios"]] == [name for name in FAMILIES[1:] for _ in range(5)]
    assert fitted["source"] == "published" and fitted["remarks"] == []
    rows = fitted["optima"] + fitted["laws"] + fitted["joint"][::2] + fitted["ratios"]
    for row in rows:
        for name, interval in row["intervals"].items():
            # An interval of a coefficient may be open where C = 1 FLOP is far away.
            if interval is not None:
                low, high = interval
                assert low <= high and math.isfinite(high), (row, name)
    for row in fitted["optima"]:
        low, high = row["intervals"]["parameters"]
        assert low < row["parameters"] < high and row["curvature"] > 0


def test_the_joint_form_has_its_optimum_and_the_parabola_s_bias(fitted):
    for row in fitted["joint"][::2]:
        assert [each["budget_flops"] for each in row["optima"]] == [6e18, 1e19, 3e19, 6e19, 1e20]
        for each in row["optima"]:
            assert 0.8 < each["parabola_parameters_ratio"] < 1.2
            assert abs(each["parabola_nats_difference"]) < 0.01


def test_equal_seeds_give_equal_intervals_and_others_do_not(tmp_path):
    def intervals(seed):
        path = tmp_path / f"{seed}.json"
        run(["published", "--output", str(path), "--replicates", "100", "--seed", str(seed)])
        record = json.loads(path.read_text())
        return [row["intervals"] for row in record["optima"] + record["joint"][::2]]

    assert intervals(1) == intervals(1) != intervals(2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["published", "--replicates", "99"], "replicates: 99 is below 100"),
        (["published", "--output", "nowhere/fit.json"], "output: nowhere: no such directory"),
        (["published", "--reference", "gpt"], "reference: 'gpt' is not one of ar, mdlm, duo, esolm"),
        (["published", "--effect", "1"], r"effect: 1.0 is outside \(0, 1\)"),
        (["none.csv"], "No such file"),
    ],
)
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        run(words)


def test_the_published_points_go_by_their_name_and_by_their_file(capsys):
    run(["published", "--replicates", "100"])
    by_name = capsys.readouterr().out
    run([str(PUBLISHED), "--replicates", "100"])
    assert capsys.readouterr().out.splitlines()[1:] == by_name.splitlines()[1:]


def test_runs_of_equal_seeds_are_compared_in_pairs(tmp_path, capsys):
    table, record = tmp_path / "points.csv", tmp_path / "fit.json"
    points = [point for family in published_points() for point in rows_of(family) if family.family != "ar"]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, points[0])
        writer.writeheader()
        writer.writerows(points)
    run([str(table), "--output", str(record), "--replicates", "100", "--effect", "0.5"])
    assert "tells 50%" in capsys.readouterr().out
    found = json.loads(record.read_text())["paired_ratios"]
    names = [(each["family"], each["reference"]) for each in found]
    assert set(names) == {("duo", "mdlm"), ("esolm", "mdlm"), ("esolm", "duo")} and len(names) == 3 * 6
    assert all(each["ratio"] > 1 and each["nats_difference"] > 0 for each in found)


def rows_of(points):
    """Rows of a table, of one seed."""
    columns = ("budget_flops", "parameters", "tokens", "nats_per_token")
    values = zip(*(getattr(points, name) for name in columns), strict=True)
    return [{"family": points.family, "seed": 1, **dict(zip(columns, each, strict=True))} for each in values]
