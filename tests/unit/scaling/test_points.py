"""Tables with what cannot be fitted are refused, and the message names the rows."""

import numpy as np
import pytest

from megatron_dlm.cli.scaling_fit import FitArguments, fit_table
from megatron_dlm.interfaces import InputError
from megatron_dlm.scaling.points import read_points

HEADER = "family,budget_flops,parameters,tokens,nats_per_token"
ROWS = [
    f"{family},{budget:g},{size:g},{budget / (6 * size):g},{loss + (np.log(size / best)) ** 2 / 5:.6f}"
    for family, first in (("ar", 3.0), ("mdlm", 3.4))
    for budget, loss, best in ((1e15, first, 1e6), (4e15, first - 0.2, 2e6), (16e15, first - 0.35, 4e6))
    for size in (5e5, 1e6, 2e6, 4e6, 8e6)
]


def table(tmp_path, rows, header=HEADER):
    path = tmp_path / "points.csv"
    path.write_text("\n".join([header, *rows, ""]))
    return path


def changed(index, column, value):
    cells = ROWS[index].split(",")
    cells[HEADER.split(",").index(column)] = value
    return [*ROWS[:index], ",".join(cells), *ROWS[index + 1 :]]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (ROWS, HEADER.replace("tokens", "token_count"), "row 1 has no column tokens, nats_per_token; it has"),
        ([], HEADER, "has no rows"),
        (changed(3, "nats_per_token", "-1"), HEADER, "row 5: nats_per_token: '-1' is not a number above 0"),
        (changed(0, "nats_per_token", "nan"), HEADER, "row 2: nats_per_token: 'nan' is not a number above 0"),
        (changed(0, "parameters", ""), HEADER, "row 2: parameters: '' is not a number above 0"),
        (changed(1, "family", " "), HEADER, "row 3: family is empty"),
        (
            [f"{row},{'ab' if n < 3 else 'cd'}" for n, row in enumerate(ROWS)],
            f"{HEADER},train_sha256",
            "train_sha256: runs on different training data cannot be compared: row 2 ab, row 5 cd",
        ),
    ],
)
def test_bad_tables_are_refused_by_row(tmp_path, rows, header, message):
    path = table(tmp_path, rows, header.replace("token_count,nats_per_token", "count,nats"))
    with pytest.raises(InputError) as error:
        read_points(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_points(tmp_path / "none.csv")


def fitted(tmp_path, rows, reference=None):
    arguments = FitArguments(table=table(tmp_path, rows), reference=reference, replicates=100, seed=0)
    return fit_table(arguments)


def test_a_reference_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="reference: 'duo' is not one of ar, mdlm"):
        fitted(tmp_path, ROWS, "duo")


def test_one_point_a_budget_is_said_and_fits_nothing(tmp_path):
    rows = [row for row in ROWS if row.split(",")[2] == "1e+06" and row.startswith("ar")]
    with pytest.raises(InputError, match=r"ar at 1e\+15 FLOPs: 1 size \(row 2\), a parabola needs 3"):
        fitted(tmp_path, rows)


def test_a_parabola_that_opens_downwards_is_left_out_of_the_laws(tmp_path):
    rows = changed(1, "nats_per_token", "4.0")
    rows[2] = rows[2].rsplit(",", 1)[0] + ",4.0"
    fit = fitted(tmp_path, rows)
    downwards = next(each for each in fit.remarks if "opens downwards" in each)
    assert "ar at 1e+15 FLOPs" in downwards and "rows 2, 3, 4, 5, 6" in downwards
    assert [each.budget_flops for each in fit.families[0].isoflop.usable] == [4e15, 16e15]


def test_a_vertex_outside_its_points_is_left_out_of_the_laws(tmp_path):
    rows = [row for row in ROWS if not (row.startswith("mdlm,1.6e+16") and float(row.split(",")[2]) > 3e6)]
    fit = fitted(tmp_path, rows)
    outside = next(each for each in fit.remarks if "lies outside its points" in each)
    assert "mdlm at 1.6e+16 FLOPs" in outside and "rows 27, 28, 29" in outside
    assert len(fit.families[1].isoflop.usable) == 2
    # Exact parabolas: the law through the two others is that of all three.
    assert fit.families[1].laws[0].exponent_S[0] == pytest.approx(0.5, abs=1e-3)


def test_families_that_never_meet_are_compared_by_extrapolation_and_it_says_so(tmp_path):
    rows = [row.replace("mdlm", "duo") for row in ROWS]
    for index, row in enumerate(rows):
        if row.startswith("duo"):
            cells = row.split(",")
            rows[index] = ",".join([*cells[:-1], str(float(cells[-1]) + 3)])
    fit = fitted(tmp_path, rows)
    assert fit.ratios and all("which this family never meets" in each.remark for each in fit.ratios)


def test_the_reference_comes_first_and_may_be_chosen(tmp_path):
    ratios = fitted(tmp_path, ROWS, "mdlm").ratios
    assert {(each.family, each.reference) for each in ratios} == {("ar", "mdlm")}
    assert all(each.ratio.value < 1 for each in ratios)
