"""Pictures show the numbers they are given."""

from dataclasses import dataclass

import numpy as np
import pytest

from megatron_dlm.telemetry.plots import plot_by_time, plot_lengths, plot_loss, plot_pareto
from megatron_dlm.telemetry.writers import JsonLinesWriter

pyplot = pytest.importorskip("matplotlib.pyplot")


@dataclass
class Drawn:
    """The axes of the one picture drawn."""

    axes: object

    def line(self, label):
        (found,) = [line for line in self.axes.lines if line.get_label() == label]
        return found.get_xydata().tolist()


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Call a plotting function, and keep its figure."""
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)

    def call(plot, *arguments, **keywords):
        plot(*arguments, tmp_path / "picture.png", **keywords)
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        (figure,) = figures
        return Drawn(figure.axes[0])

    yield call
    monkeypatch.undo()
    pyplot.close("all")


def test_bars_are_the_bands_with_their_intervals(draw):
    bands = [(0.0, 0.5, 3.0, 0.25), (0.5, 1.0, 1.0, 0.125)]
    axes = draw(plot_by_time, bands, title="t").axes
    assert [(p.get_x(), p.get_width(), p.get_height()) for p in axes.patches] == [(0, 0.5, 3), (0.5, 0.5, 1)]
    (whiskers,) = [c for c in axes.collections if len(c.get_segments()) == 2]
    ends = [segment[:, 1].tolist() for segment in whiskers.get_segments()]
    assert ends == [[2.75, 3.25], [0.875, 1.125]]
    (mean,) = [line for line in axes.lines if "nats/token" in str(line.get_label())]
    assert set(mean.get_ydata()) == {2.0}


def test_losses_are_drawn_over_their_steps(draw, tmp_path):
    writer = JsonLinesWriter(tmp_path, 0)
    for step, nats in ((1, 5.0), (2, 4.0), (4, 3.0)):
        writer.write("train", step, {"nats_per_token": nats})
    writer.write("validation", 4, {"nats_per_token": 3.5})
    writer.close()
    drawn = draw(plot_loss, tmp_path, title="t", unigram_entropy=6.0)
    assert drawn.line("train") == [[1, 5], [2, 4], [4, 3]] and drawn.line("validation") == [[4, 3.5]]
    assert np.all(np.array(drawn.line("unigram entropy"))[:, 1] == 6.0)


def test_quality_is_drawn_against_speed(draw):
    series, published = {"ours": [(100.0, 30.0), (200.0, 40.0)]}, {"theirs": [(50.0, 20.0)]}
    drawn = draw(plot_pareto, series, published, frontier=[(200.0, 40.0)])
    assert drawn.line("ours") == [[100, 30], [200, 40]] and drawn.line("theirs, published") == [[50, 20]]
    assert drawn.line("frontier") == [[200, 40]]


def test_lengths_are_a_histogram(draw):
    axes = draw(plot_lengths, [(1, 2, 7), (2, 4, 3)], title="t").axes
    assert [(p.get_x(), p.get_width(), p.get_height()) for p in axes.patches] == [(1, 1, 7), (2, 2, 3)]
