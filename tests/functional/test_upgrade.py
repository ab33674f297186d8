"""What the version before families had folders has written: shards, checkpoints, an export.

tests/data/upgrade.tar.xz holds a shard with its tokenizer, a checkpoint of each family at step 2, an export;
`expected.json` in it has what that version said next: losses of steps 3 to 5, and the bound of the export.
"""

import json
import shutil
import tarfile

import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.paths import ROOT
from tests.helpers.runs import finish, start_interpreter

PACKED = ROOT / "tests" / "data" / "upgrade.tar.xz"
FAMILIES = ("ar", "mdlm", "duo", "esolm", "block-diffusion")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    directory = tmp_path_factory.mktemp("upgrade")
    with tarfile.open(PACKED) as packed:
        # Python before 3.11.4 has no filters; the archive is our own.
        packed.extractall(directory, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_as_it_would_have(command, old, read_json, tmp_path, family):
    """The same noise, and losses but for the last bits of another machine."""
    shutil.copytree(old / family, tmp_path / "run")
    record = tmp_path / "run" / "checkpoints" / "step-00000002" / "run.json"
    data = ("--data.train", old / "train", "--data.validation", old / "validation")
    command("train", record, "--directory", tmp_path / "run", *data, "--training.num-steps", 5)
    expected = read_json(old / "expected.json")["losses"][family]
    found = {
        str(entry["step"]): entry for entry in read_metrics(tmp_path / "run") if entry["kind"] == "train"
    }
    assert found.keys() == expected.keys() == {"3", "4", "5"}
    for step, values in expected.items():
        assert found[step]["fingerprint"] == values.pop("fingerprint")
        assert {name: found[step][name] for name in values} == pytest.approx(values, rel=1e-6)


def test_an_export_is_scored_sampled_and_started_from(command, old, read_json, tmp_path):
    sizes = ("--num-sequences", 4, "--num-times", 4)
    command(
        "evaluate", "nll", old / "export", "--data", old / "validation", *sizes, "--output", tmp_path / "nll"
    )
    found = read_json(tmp_path / "nll")["complete"]["nats_per_token"]
    assert found == pytest.approx(read_json(old / "expected.json")["nll"], rel=1e-6)
    command("sample", old / "export", "--num-steps", 3, "--output", tmp_path / "texts.jsonl")
    assert json.loads((tmp_path / "texts.jsonl").read_text().splitlines()[0])["token_ids"]
    command("import", old / "export", tmp_path / "back")
    assert (tmp_path / "back" / "checkpoints" / "step-00000002").is_dir()


def test_an_export_still_proves_itself(old, tmp_path):
    """By its own code, which nothing here has changed."""
    verify = start_interpreter("-I", "-B", old / "export" / "verify_megatron_dlm.py", HF_HOME=str(tmp_path))
    code, output = finish(verify)
    assert code == 0 and "tokens equal" in output, output
