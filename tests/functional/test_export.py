"""Exports prove themselves, come back bit for bit, and what is no export is refused."""

import json
import os
import shutil
import struct
import subprocess
import sys
from functools import lru_cache, partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dlm.conversion.to_hugging_face import new_folder
from megatron_dlm.interfaces import InputError
from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT
from tests.helpers.processes import TRAINER, run
from tests.helpers.runs import arguments_for, finish, finish_ranks, start_interpreter
from tests.helpers.selection import quick
from tests.helpers.transformers_environments import environment_with

SLOW = pytest.mark.slow
STEPS = 4
TENSOR_AND_PIPELINE = [
    *("--parallel.tensor-model-parallel-size", "2"),
    *("--parallel.pipeline-model-parallel-size", "2"),
    *("--parallel.pad-vocabulary-to", "128"),
]
VARIANTS = {
    "mdlm": [],
    "ar": [],
    "duo": ["--training.precision", "bf16"],
    "esolm": [],
    "esolm-two-parts": ["--objective.alpha-0", "0.5", "--objective.batch-split", "0.5"],
    "block-diffusion": ["--objective.block-size", "8"],
}
FAMILIES = ["mdlm", *(pytest.param(name, marks=SLOW) for name in VARIANTS if name != "mdlm")]


@pytest.fixture(scope="module")
def checkpoint_of(corpus, tmp_path_factory):
    """A checkpoint of a family, trained for a few steps on 2 tensor x 2 pipeline parallel processes."""

    @lru_cache
    def train(name):
        directory = tmp_path_factory.mktemp(name)
        recipe = f"examples/{name.removesuffix('-two-parts')}/tiny.py"
        more = [*TENSOR_AND_PIPELINE, *VARIANTS[name]]
        code, output = finish_ranks(arguments_for(corpus, directory, *more, recipe=recipe, steps=STEPS), 4)
        assert code == 0, output
        return directory / "checkpoints" / f"step-{STEPS:08d}"

    return train


@pytest.fixture(scope="module")
def mdlm_export(command, checkpoint_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "folder"
    command("export", checkpoint_of("mdlm"), folder)
    return folder


def verify(folder, python=sys.executable, **environment):
    """The folder's own comparison, from elsewhere and without this checkout on the path."""
    words = [str(python), "-I", "-B", str(folder / "verify_megatron_dlm.py")]
    environment = os.environ | {"HF_MODULES_CACHE": str(folder.parent / "modules")} | environment
    return subprocess.run(
        words, capture_output=True, text=True, cwd=folder.parent, env=environment, timeout=HANG_SECONDS
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_proves_itself(command, checkpoint_of, tmp_path, read_json, record_property, name):
    folder = tmp_path / "folder"
    out = command("export", checkpoint_of(name), os.path.relpath(folder, ROOT)).stdout
    report = read_json(folder / "export_report.json")
    assert report["passed"] and "bound on fixed noise" in out
    assert report["nats_per_token"]["relative_difference"] <= 1e-5
    assert report["logits"]["relative_difference"] <= 1e-5
    trace = report["greedy_trace"]
    assert trace["equal_tokens"] == trace["compared_tokens"] > 0
    assert {"model.safetensors", "config.json", "modeling_megatron_dlm.py"} <= report["sha256"].keys()
    card = (folder / "README.md").read_text()
    assert (
        f"{STEPS} training steps" in card and f"{report['nats_per_token']['trained']:.4f} nats/token" in card
    )
    again = verify(folder)
    assert again.returncode == 0, again.stderr
    row = (name, *(f"{report[k]['relative_difference']:.1e}" for k in ("nats_per_token", "logits")))
    record_property("table: exports", (*row, f"{trace['equal_tokens']} of {trace['compared_tokens']}"))


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=SLOW), pytest.param("fp16", marks=SLOW)])
def test_low_precision_exports_state_their_tolerance(command, checkpoint_of, tmp_path, read_json, dtype):
    folder = tmp_path / "folder"
    command("export", checkpoint_of("mdlm"), folder, "--dtype", dtype)
    report = read_json(folder / "export_report.json")
    assert report["tolerance"] == {"bf16": 2e-2, "fp16": 5e-3}[dtype]
    weights = load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{'b' * (dtype[0] == 'b')}float16"}


def test_import_gives_back_every_bit_at_any_layout(command, corpus, checkpoint_of, mdlm_export, tmp_path):
    """Through several small files; a run at tensor parallel size 2 begins where the exported one ended."""
    few = tmp_path / "few"
    command("export", checkpoint_of("mdlm"), few, "--max-shard-size", "100KB", "--no-verify")
    assert len(list(few.glob("model-*.safetensors"))) > 3 and (few / "model.safetensors.index.json").is_file()
    out = command("import", few, tmp_path / "run").stdout
    back = tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}"
    assert str(back) in out
    command("export", back, tmp_path / "again", "--no-verify")
    first, second = (mdlm_export / "model.safetensors", tmp_path / "again" / "model.safetensors")
    assert first.read_bytes() == second.read_bytes()
    bounds = {}
    for name, source in (("folder", mdlm_export), ("imported", back)):
        more = ["--checkpoint.initialize-from", source, "--parallel.tensor-model-parallel-size", 2]
        code, output = finish_ranks(arguments_for(corpus, tmp_path / name, *more, steps=1), 2)
        assert code == 0, output
        bounds[name] = [
            e["nats_per_token"] for e in read_metrics(tmp_path / name) if e["kind"] == "validation"
        ]
    trained = checkpoint_of("mdlm").parents[1]
    last = [e["nats_per_token"] for e in read_metrics(trained) if e["kind"] == "validation"][-1]
    assert bounds["folder"][0] == bounds["imported"][0] == pytest.approx(last, rel=1e-6)
    resumed = command(*arguments_for(corpus, tmp_path / "run", steps=9), check=False)
    assert resumed.returncode == 2 and "holds imported weights, no optimizer" in resumed.stderr


def test_a_new_folder_leaves_others_files_alone(tmp_path):
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a.tmp" / "mine").touch()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a.tmp"]
    with new_folder(tmp_path / "a") as folder:
        (folder / "whole").touch()
    assert (tmp_path / "a" / "whole").exists() and (tmp_path / "a.tmp" / "mine").exists()
    with new_folder(tmp_path / "b" / "c"):
        pass
    for path, words in ((tmp_path / "a", "exists already"), (ROOT / "setup.py" / "c", "is not a directory")):
        with pytest.raises(InputError, match=words), new_folder(path):
            pass


@SLOW
def test_weights_go_to_the_reference_s_file_and_back(command, corpus, checkpoint_of, tmp_path):
    """A run that starts from the exported .ckpt, at another layout, begins where the exported one ended."""
    file = tmp_path / "weights.ckpt"
    convert = partial(run, "tools/convert_checkpoint.py")
    places = ["--load-dir", checkpoint_of("mdlm"), "--save-dir", file]
    convert("--loader", "megatron", "--saver", "reference", *places)
    again = command("export", checkpoint_of("mdlm"), file, check=False)
    assert again.returncode == 2 and "exists already" in again.stderr
    command(*arguments_for(corpus, tmp_path / "run", "--checkpoint.initialize-from", file, steps=1))
    bounds = [
        [entry["nats_per_token"] for entry in read_metrics(run) if entry["kind"] == "validation"]
        for run in (checkpoint_of("mdlm").parents[1], tmp_path / "run")
    ]
    assert bounds[1][0] == pytest.approx(bounds[0][-1], rel=1e-6)
    recipe = tmp_path / "run.json"
    shutil.copyfile(checkpoint_of("mdlm") / "run.json", recipe)
    more = ["--recipe", recipe, "--tokenizer", corpus.tokenizer]
    command("import", file, tmp_path / "imported", *more)
    command("export", tmp_path / "imported" / "checkpoints" / "step-00000000", tmp_path / "b.ckpt")
    # Tensors alone: names in the archive are those of the file.
    states = [torch.load(f, weights_only=True)["state_dict"] for f in (file, tmp_path / "b.ckpt")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    missing = arguments_for(corpus, tmp_path / "other", "--checkpoint.initialize-from", "no.ckpt", steps=1)
    finished = command(*missing, check=False)
    assert finished.returncode == 2 and "checkpoint.initialize_from: no.ckpt: no such file" in finished.stderr
    both = convert("--loader", "megatron", "--saver", "megatron", *places, check=False)
    assert both.returncode == 2 and "just one of them must be megatron" in both.stderr


@SLOW
@pytest.mark.parametrize("version", ["4.51", "4.57"])
def test_older_transformers_load_it_too(checkpoint_of, command, tmp_path, version):
    """In a virtual environment of its own."""
    python = environment_with(version)
    for name in ("mdlm", "ar", "duo", "esolm"):
        folder = tmp_path / name
        command("export", checkpoint_of(name), folder)
        finished = verify(folder, python)
        assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_a_file_may_begin_as_a_pickle_or_an_archive_does(broken, tmp_path, start):
    """With its header's length: 128 modulo 256, as one file in 32 has it, or 0x4b50."""
    from megatron_dlm.conversion.import_weights import read_folder

    file, expected = broken / "model.safetensors", weights_of(broken)
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    modulus, wanted = 256 ** len(start), int.from_bytes(start, "little")
    longer = length + (wanted - length) % modulus
    file.write_bytes(
        struct.pack("<Q", longer) + content[8 : 8 + length].ljust(longer) + content[8 + length :]
    )
    assert file.read_bytes().startswith(start)
    (broken / "export_report.json").unlink()
    found = read_folder(broken).weights.state
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- what is not the trained model, or no export


@pytest.fixture
def broken(mdlm_export, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(mdlm_export, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def weights_of(folder):
    """Copies: the file itself may be written over."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def change_weights(folder, change, *, keep_report=False):
    state = weights_of(folder)
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if not keep_report:
        (folder / "export_report.json").unlink()


@pytest.mark.slow
def test_the_comparison_finds_other_weights(broken):
    def disturb(state):
        state["blocks.0.adaLN_modulation.bias"] += 0.5
        state["blocks.0.attn_qkv.weight"][:32] = 0

    change_weights(broken, disturb, keep_report=True)
    finished = verify(broken)
    assert finished.returncode == 1 and "model.safetensors: not the file that was verified" in finished.stderr
    (broken / "export_report.json").unlink()
    finished = verify(broken)
    assert finished.returncode == 1 and "bound" in finished.stderr
    state = weights_of(broken)
    del state["blocks.0.norm1.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    finished = verify(broken)
    assert finished.returncode == 1 and "norm1" in finished.stderr


@pytest.mark.slow
def test_an_export_that_is_not_the_trained_model_is_not_written(checkpoint_of, tmp_path):
    """Samplers of the export that go another way: the trace differs and nothing is left."""
    patched = tmp_path / "patched"
    patched.mkdir()
    (patched / "sitecustomize.py").write_text(
        "import megatron_dlm.conversion.remote_code as code\n"
        "original = code.remote_code\n"
        "def changed(family):\n"
        "    files = original(family)\n"
        "    old = 'np.searchsorted(revealed_by_T, uniform_n,'\n"
        "    assert old in files['sampling_decoding_plan.py']\n"
        "    new = old.replace('uniform_n', '1 - uniform_n')\n"
        "    files['sampling_decoding_plan.py'] = files['sampling_decoding_plan.py'].replace(old, new)\n"
        "    return files\n"
        "code.remote_code = changed\n"
    )
    words = (*TRAINER, "export", checkpoint_of("mdlm"), tmp_path / "folder")
    code, output = finish(start_interpreter(*words, PYTHONPATH=f"{patched}:{ROOT}"))
    assert code == 1 and "greedy sampling: other tokens than the trained model's" in output, output
    assert [p.name for p in tmp_path.iterdir()] == ["patched"]


NOTHING_COMPARED = {
    # What to change in the recorded trace, bound or logits, and the complaint.
    "greedy trace": (
        lambda record, check: record["trace"].update(margins=[None] * len(record["trace"]["margins"])),
        "no step decides a token",
    ),
    "bound": (lambda record, check: record.update(nats_per_token=0.0), "there is nothing to compare"),
    "logits": (
        lambda record, check: check.update(logits=check["logits"][:, :0].contiguous()),
        "there is nothing to compare",
    ),
}


@pytest.mark.parametrize("name", quick(NOTHING_COMPARED, "bound"))
def test_a_proof_that_compares_nothing_fails(broken, name):
    change, message = NOTHING_COMPARED[name]
    record, check = json.loads((broken / "check.json").read_text()), load_file(broken / "check.safetensors")
    check = {key: tensor.clone() for key, tensor in check.items()}
    change(record, check)
    (broken / "check.json").write_text(json.dumps(record))
    save_file(check, broken / "check.safetensors")
    (broken / "export_report.json").unlink()
    finished = verify(broken)
    assert finished.returncode == 1 and message in finished.stderr, finished.stdout + finished.stderr


def spoil(name, text=None):
    def apply(folder):
        path = folder / name
        if text is None:
            path.unlink()
        else:
            path.write_bytes(text)

    return apply


def without_tensor(state):
    del state["blocks.1.mlp.0.weight"]


def with_a_tensor(state):
    state["blocks.9.mlp.0.weight"] = state["blocks.1.mlp.0.weight"].clone()


def of_another_shape(state):
    state["blocks.1.mlp.0.bias"] = state["blocks.1.mlp.0.bias"][:-1].clone()


def of_integers(state):
    state["blocks.1.mlp.0.bias"] = state["blocks.1.mlp.0.bias"].int()


def as_pickle(folder):
    import torch

    torch.save(weights_of(folder), folder / "model.safetensors")
    (folder / "export_report.json").unlink()


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_points_away(folder):
    names = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    weights = dict.fromkeys(names, "../model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def symbolic_link(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")


def huge_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def overlapping(folder):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


def other_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "export_report.json").unlink()


HOSTILE = {
    "no config": (spoil("config.json"), "has no config.json"),
    "config no JSON": (spoil("config.json", b"{"), "config.json: unreadable"),
    "another model": (
        spoil("config.json", b'{"model_type": "gpt2"}'),
        "model_type 'gpt2' is not 'megatron_dlm'",
    ),
    "missing tensor": (lambda f: change_weights(f, without_tensor), "lacks tensor blocks.1.mlp.0.weight"),
    "extra tensor": (lambda f: change_weights(f, with_a_tensor), "has an unknown tensor blocks.9"),
    "other shape": (
        lambda f: change_weights(f, of_another_shape),
        "tensor blocks.1.mlp.0.bias has shape (63,)",
    ),
    "integers": (lambda f: change_weights(f, of_integers), "tensor blocks.1.mlp.0.bias is I32"),
    "pickle posing as weights": (as_pickle, "model.safetensors: a pickle under another name"),
    "pickle": (only_a_pickle, "pytorch_model.bin is a pickle, which is not read"),
    "index points away": (index_points_away, "points at '../model.safetensors', not at a file in it"),
    "symbolic link": (symbolic_link, "model.safetensors: a symbolic link"),
    "huge header": (huge_header, "model.safetensors: unreadable"),
    "overlapping tensors": (overlapping, "model.safetensors: unreadable"),
    "other vocabulary": (other_vocabulary, "vocab_size 300 differs from 301"),
    "altered code": (
        spoil("modeling_megatron_dlm.py", b"print('hello')"),
        "modeling_megatron_dlm.py: not the file",
    ),
    "new code": (spoil("another.py", b"print('hello')"), "another.py: not the file that was verified"),
    "altered weights": (
        lambda f: change_weights(f, lambda s: s["output_layer.linear.bias"].add_(1), keep_report=True),
        "model.safetensors: not the file that was verified",
    ),
    "no folder": (shutil.rmtree, "has no config.json"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_folders_are_refused(broken, tmp_path, kind, monkeypatch):
    """By import, in this process: no network, no code of the folder, nothing half-written."""
    import socket

    from megatron_dlm.conversion.import_weights import import_weights, read_folder
    from megatron_dlm.interfaces import InputError

    def refuse(*arguments):
        raise AssertionError("a socket was opened")

    apply, words = HOSTILE[kind]
    apply(broken)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(InputError) as raised:
        import_weights(read_folder(broken), tmp_path / "out")
    assert words in str(raised.value) and str(broken) in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["missing tensor", "altered code", "other vocabulary", "pickle"])
def test_training_does_not_start_from_a_broken_folder(command, corpus, broken, tmp_path, kind):
    apply, words = HOSTILE[kind]
    apply(broken)
    more = ["--checkpoint.initialize-from", broken]
    finished = command(*arguments_for(corpus, tmp_path / "run", *more, steps=1), check=False)
    if kind == "pickle":
        words = "has no model.safetensors; pytorch_model.bin is a pickle"
    assert finished.returncode == 2 and f"checkpoint.initialize_from: {broken}" in finished.stderr
    assert words in finished.stderr and not (tmp_path / "run").exists()


def test_an_existing_target_is_kept(command, checkpoint_of, mdlm_export):
    before = (mdlm_export / "README.md").read_text()
    for words in (
        ["export", checkpoint_of("mdlm"), mdlm_export],
        ["import", mdlm_export, mdlm_export.parent],
    ):
        finished = command(*words, check=False)
        assert finished.returncode == 2 and "exists already" in finished.stderr
    assert (mdlm_export / "README.md").read_text() == before


def test_another_tokenizer_is_refused(command, checkpoint_of, tmp_path):
    from megatron_dlm.data.tokenizers.tokenizer import train_tokenizer
    from tools.tiny import sentences

    train_tokenizer(sentences(100, seed=9), 290, tmp_path / "tok")
    words = ["export", checkpoint_of("mdlm"), tmp_path / "f", "--tokenizer", tmp_path / "tok"]
    finished = command(*words, check=False)
    assert finished.returncode == 2 and "is not the one the model was trained with" in finished.stderr


def test_no_shape_that_a_user_sees_has_the_padding(command, checkpoint_of, mdlm_export):
    inspected = command("checkpoint", "inspect", checkpoint_of("mdlm")).stdout
    for name in ("head.weight", "optimizer.state.exp_avg.embedding.weight"):
        assert f"  {name}  float32 [301, 32], with padding [512, 32]\n" in inspected
    shapes = {name: tensor.shape for name, tensor in weights_of(mdlm_export).items()}
    assert shapes["vocab_embed.embedding"] == shapes["output_layer.linear.weight"] == (301, 32)


def test_a_published_folder_is_imported_by_its_names(command, corpus, checkpoint_of, tmp_path):
    """Weights under the names of the paper in a .bin file, beside a tokenizer; exported as any other then."""
    folder, recipe = tmp_path / "published", tmp_path / "run.json"
    shutil.copytree(corpus.tokenizer, folder)
    shutil.copyfile(checkpoint_of("mdlm") / "run.json", recipe)
    command("export", checkpoint_of("mdlm"), tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "mdlm"}))
    command("import", folder, tmp_path / "imported", "--recipe", recipe)
    command("export", tmp_path / "imported", tmp_path / "b.ckpt")
    again = torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"]
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    for more, words in (
        ((), f"recipe: {folder} is no folder of `megatron-dlm export`"),
        (("--recipe", recipe, "--mask-token", "nothing"), "mask_token"),
    ):
        finished = command("import", folder, tmp_path / "other", *more, check=False)
        assert finished.returncode == 2 and words in finished.stderr, finished.stderr
        assert not (tmp_path / "other").exists()
