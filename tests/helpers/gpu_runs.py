"""Training runs on a GPU, or where there is none the rehearsal on a CPU."""

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.devices import DEVICE

DEVICE_WORDS = ("--parallel.device", DEVICE)


def curve(directory):
    """Noise fingerprint and loss of each step."""
    entries = read_metrics(directory)
    return [(entry["fingerprint"], entry["loss"]) for entry in entries if entry["kind"] == "train"]
