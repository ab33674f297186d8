"""The report of a fit is one page with its pictures, in a real browser too; a sweep finds the best rate."""

import base64
import re
import shutil
import subprocess

import numpy as np
import pytest

from megatron_dlm.scaling.collect import read_results
from megatron_dlm.scaling.lr_sweep import best_rates
from megatron_dlm.scaling.pictures import draw_rates
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT
from tests.helpers.scaling_results import results_of_sweep

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PUBLISHED = ROOT / "megatron_dlm" / "scaling" / "published_points.csv"


@pytest.fixture(scope="module")
def report(command, tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    words = [PUBLISHED, "--output", output, "--published", "--replicates", 100, "--title", "A <study>"]
    assert "report.html, fit.json, isoflop.png" in command("scaling", "report", *words).stdout
    return output


def test_the_page_needs_no_other_file(report):
    page = (report / "report.html").read_text()
    assert "<h1>A &lt;study&gt;</h1>" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 5
    for name, data in zip(("isoflop", "optima", "ratios", "residuals", "joint"), pictures, strict=True):
        assert base64.b64decode(data) == (report / f"{name}.png").read_bytes()
    for table in ("IsoFLOP optima", "power laws of the optima", "joint form", "FLOPs at equal loss"):
        assert f"<h2>{table}" in page
    assert page.count("<td>mdlm</td>") >= 5 + 3 + 1 + 5 + 5


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_a_browser_shows_it(report, tmp_path):
    screenshot = tmp_path / "report.png"
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,3000"]
    subprocess.run(
        [BROWSER, *words, f"--screenshot={screenshot}", (report / "report.html").as_uri()],
        check=True,
        capture_output=True,
        timeout=HANG_SECONDS,
    )
    from matplotlib.image import imread

    seen = imread(screenshot)[..., :3]
    # Curves in the first family's blue, and not a blank page.
    blue = np.abs(seen - np.array([0x00, 0x72, 0xB2]) / 255).max(axis=-1) < 0.05
    assert blue.sum() > 500 and seen.std() > 0.05


def test_the_best_rate_of_a_sweep_and_its_power_are_found(tmp_path):
    """Losses that are parabolas in ln(rate) around a rate that falls with the root of N."""
    results = results_of_sweep(sizes=(10_000, 40_000, 160_000), best=lambda n: 0.3 * n**-0.5)
    (found,) = best_rates(results, replicates=100, seed=0)
    for optimum in found.fit.optima:
        assert optimum.parameters_S[0] == pytest.approx(0.3 * optimum.budget_flops**-0.5)
    assert found.exponent.value == pytest.approx(-0.5)
    draw_rates([found], tmp_path / "lr.png")
    assert (tmp_path / "lr.png").stat().st_size > 10_000
    # A best rate below those tried is none.
    cut = [each for each in results if each.parameters != 40_000 or each.lr > 1.1 * 0.3 * 40_000**-0.5]
    (found,) = best_rates(cut, replicates=100, seed=0)
    assert [bool(optimum.remark) for optimum in found.fit.optima] == [False, True, False]


@pytest.mark.slow
def test_a_sweep_is_one_command_that_goes_on(command, corpus, tmp_path):
    recipe, train, validation = tmp_path / "mdlm.py", str(corpus.train), str(corpus.validation)
    recipe.write_text(
        "from dataclasses import replace\n"
        "from megatron_dlm.data.loading.data_config import DataConfig\n"
        "from megatron_dlm.families.mdlm.objective import MDLMConfig\n"
        "from megatron_dlm.run.config import EvaluationConfig\n"
        "from megatron_dlm.run.presets import tiny_run\n"
        "def recipe():\n"
        f"    data = DataConfig(train=({train!r},), validation={validation!r}, seq_length=32)\n"
        "    evaluation = EvaluationConfig(every=1000, num_batches=2, batch_size=8)\n"
        "    return replace(tiny_run(MDLMConfig(), num_steps=100), data=data, evaluation=evaluation)\n"
    )
    words = ["scaling", "lr-sweep", recipe, "--output", tmp_path / "sweep", "--budget", "4e8", "--jobs", 2]
    words += ["--sizes", "1x16x1", "1x24x1", "--lrs", "1e-3", "4e-3", "1.6e-2", "--least-warmup-steps", 2]
    told = command(*words, "--count", "actual").stdout
    assert "6/6" in told and "best learning rate by size" in told and "lr.png" in told
    assert len(read_results(tmp_path / "sweep" / "points.csv")) == 6
    assert "6 of 6 runs are done" in command(*words, "--count", "actual").stdout
    other = command(*words, "--count", "published", check=False)
    assert other.returncode == 2 and "is of another sweep" in other.stderr
