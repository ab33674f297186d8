"""Exports in the hands of users of transformers, accelerate and peft; what these save comes back."""

import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache

import pytest
from tokenizers import Tokenizer

from megatron_dlm.families.registry import OBJECTIVES
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT
from tests.helpers.runs import arguments_for
from tests.helpers.transformers_environments import PEFT, environment_with
from tools.tiny import sentences

SLOW = pytest.mark.slow
STEPS = 4


@pytest.fixture(scope="module")
def exported(command, corpus, tmp_path_factory):
    """An export of a family, trained for a few steps."""

    @lru_cache
    def export(family):
        directory = tmp_path_factory.mktemp(family)
        command(*arguments_for(corpus, directory / "run", recipe=f"examples/{family}/tiny.py", steps=STEPS))
        command("export", directory / "run" / "checkpoints" / f"step-{STEPS:08d}", directory / "folder")
        return directory / "folder"

    return export


def use(folder, out, python=sys.executable):
    """Run the program that uses a folder, from elsewhere and without this checkout on the path."""
    program = ROOT / "tests" / "helpers" / "transformers_user.py"
    environment = os.environ | {"HF_MODULES_CACHE": str(out / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    out.mkdir()
    finished = subprocess.run(
        [str(python), "-B", str(program), str(folder), str(out)],
        capture_output=True,
        text=True,
        cwd=out,
        stdin=subprocess.DEVNULL,
        env=environment,
        timeout=HANG_SECONDS,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@SLOW
def test_an_autoregressive_export_is_a_causal_language_model(exported, command, tmp_path):
    assert "ar: all as expected" in use(exported("ar"), tmp_path / "out")
    comes_back(command, tmp_path / "out" / "again", tmp_path)


@SLOW
def test_a_tokenizer_without_a_mask_token_gets_it_in_the_export(command, corpus, tmp_path, read_json):
    """As the paper's, of 32,000 ids: the export has one more, and scores shards of the tokenizer before."""
    given = tmp_path / "tokenizer"
    given.mkdir()
    library = Tokenizer.from_file(str(corpus.tokenizer / "tokenizer.json"))
    description = json.loads(library.to_str())
    # Its mask becomes a common token.
    (mask,) = (token for token in description["added_tokens"] if token["content"] == "[MASK]")
    mask["content"] = "<other>"
    description["model"]["vocab"]["<other>"] = description["model"]["vocab"].pop("[MASK]")
    (given / "tokenizer.json").write_text(json.dumps(description))
    config = json.loads((corpus.tokenizer / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (given / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "a.txt").write_text("\n".join(sentences(200, seed=3)))
    command("index", "--input", tmp_path / "a.txt", "--output", tmp_path / "data", "--tokenizer", given)
    data = ("--data.train", tmp_path / "data", "--data.validation", tmp_path / "data")
    command(*arguments_for(corpus, tmp_path / "run", *data, steps=2))
    folder = tmp_path / "folder"
    command("export", tmp_path / "run" / "checkpoints" / "step-00000002", folder)
    model, size = read_json(folder / "config.json"), library.get_vocab_size()
    assert (model["vocab_size"], model["mask_token_id"]) == (size + 1, size)
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokens.get_vocab_size() == size + 1 and tokens.id_to_token(size) == "[MASK]"
    command("sample", folder, "--num-samples", 1)
    command("evaluate", "nll", folder, "--num-sequences", 8, "--num-times", 4)
    command("import", folder, tmp_path / "imported")
    # A tokenizer of another size, or none of the model's, in the folder.
    shutil.copyfile(corpus.tokenizer / "tokenizer.json", folder / "tokenizer.json")
    refused = command("sample", folder, check=False)
    assert refused.returncode == 2 and "tokenizer.json: not the file that was verified" in refused.stderr
    (folder / "export_report.json").unlink()
    refused = command("sample", folder, check=False)
    assert refused.returncode == 2 and "is not the one the model was trained with" in refused.stderr


@SLOW
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", PEFT)
@pytest.mark.parametrize("family", OBJECTIVES)
def test_every_family_in_every_version(exported, command, tmp_path, family, version, record_property):
    said = use(exported(family), tmp_path / "out", environment_with(version))
    assert f"{family}: all as expected" in said and "without" not in said
    for name in ("again", "merged"):
        comes_back(command, tmp_path / "out" / name, tmp_path)
    record_property("table: transformers", (family, version))


def comes_back(command, folder, scratch):
    """By sampling and importing it; without the run's record, a recipe has to say how it was trained."""
    command("sample", folder, "--num-samples", 1, "--length", 8)
    command("import", folder, scratch / f"imported-{folder.name}")
    bare = scratch / f"bare-{folder.name}"
    shutil.copytree(folder, bare)
    record = bare / "megatron_dlm_run.json"
    recipe = scratch / f"{folder.name}.json"
    record.rename(recipe)
    (bare / "export_report.json").unlink()
    command("sample", bare, "--num-samples", 1, "--length", 8)
    refused = command("import", bare, scratch / "x", check=False)
    assert refused.returncode == 2 and "has no megatron_dlm_run.json" in refused.stderr
    command("import", bare, scratch / f"imported-bare-{folder.name}", "--recipe", recipe)
