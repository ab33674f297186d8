"""The planner's memory of a rank against what runs on four CPU processes take."""

import pytest

from tools.bench import peak_memory


def test_there_are_layouts_enough():
    assert len(peak_memory.LAYOUTS) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("layout", peak_memory.LAYOUTS)
def test_measured_peaks_are_predicted(corpus, layout, record_property):
    predicted, measured = peak_memory.compare(corpus, layout)
    mib = f"{predicted.total / 2**20:.1f}", f"{measured / 2**20:.1f}", f"{predicted.total / measured:.3f}"
    record_property("table: planned memory", (layout, *mib))
    assert predicted.total == pytest.approx(measured, rel=0.1)
