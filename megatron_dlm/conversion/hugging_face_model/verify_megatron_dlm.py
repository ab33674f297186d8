"""Compare an exported folder, loaded by transformers alone, with recorded outputs of the trained model.

Usage: python verify_megatron_dlm.py [FOLDER]. Needs torch and transformers. Checks that the files match the
report, that every tensor is loaded and none is left over or newly initialized, and that NELBO, logits and a
trace of greedy sampling equal the trained model's.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

REPORT = "export_report.json"
HASHED_NAMES = ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
HASHED_NAMES += ("check.json", "megatron_dlm_run.json")
HASHED_SUFFIXES = (".py", ".safetensors")


class Difference(Exception):
    """The folder differs from the trained model."""


def main():
    """Compare and report; exit code 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("--write-report", action="store_true", help=f"write {REPORT} into the folder")
    arguments = parser.parse_args()
    try:
        report = compare(arguments.folder)
    except Difference as difference:
        print(f"{arguments.folder}: {difference}", file=sys.stderr)
        return 1
    if arguments.write_report:
        text = json.dumps(report, indent=2) + "\n"
        (arguments.folder / REPORT).write_text(text, encoding="utf-8")
    bound, trace = report["nats_per_token"], report["greedy_trace"]
    print(f"tensors: {report['tensors']['count']} read, each as in its file")
    print(
        f"bound on fixed noise: trained {bound['trained']:.6f}, exported {bound['exported']:.6f} nats/token"
    )
    print(f"relative difference: bound {bound['relative_difference']:.1e}, ", end="")
    print(f"logits {report['logits']['relative_difference']:.1e}; at most {report['tolerance']:.0e}")
    print(f"greedy trace: {trace['equal_tokens']} of {trace['compared_tokens']} tokens equal")
    return 0


def compare(folder):
    """Report of the comparison; raises `Difference` if the folder differs from the trained model."""
    hashes = hashes_of(folder)
    compare_hashes(folder, hashes)
    record = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    check = load_file(folder / "check.safetensors")
    model = load(folder)
    tolerance = record["tolerance"]
    compare_tokenizer(folder, model.config, record["tokenizer"])
    report = {
        "passed": True,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "family": model.config.family,
        "dtype": record["dtype"],
        "tolerance": tolerance,
        "tensors": compare_tensors(folder, model),
        "nats_per_token": compare_bound(model, check, record["nats_per_token"], tolerance),
        "logits": compare_logits(model, check, tolerance),
        "greedy_trace": compare_trace(model, check["trace"], record["trace"], record["dtype"], tolerance),
        "sha256": hashes,
    }
    if "megatron_dlm" in sys.modules or "megatron" in sys.modules:
        raise Difference("the folder's code has imported the trainer")
    return report


def hashes_of(folder):
    """SHA-256 of every file that decides what the model is; a model card may change."""
    return {
        path.name: sha256(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.suffix in HASHED_SUFFIXES or path.name in HASHED_NAMES)
    }


def sha256(path):
    """Hexadecimal SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def compare_hashes(folder, hashes):
    """Check that the files are those the report was written for, if there is a report."""
    if (folder / REPORT).is_file():
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if report.get("saved_again"):
            return
        expected = report["sha256"]
        for name in sorted(expected.keys() | hashes.keys()):
            if expected.get(name) != hashes.get(name):
                raise Difference(f"{name}: not the file that was verified")


def load(folder):
    """The model as a user loads it."""
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    try:
        model, info = AutoModel.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True, **{name: "auto"}
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise Difference(f"does not load: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise Difference(f"{kind.replace('_', ' ')}: {sorted(map(str, info[kind]))}")
    return model.eval()


def compare_tensors(folder, model):
    """Check that each tensor of the model equals, bit for bit, the tensor stored in a weight file."""
    state, seen = model.state_dict(), set()
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                if name not in state or not torch.equal(state[name].cpu(), tensor):
                    raise Difference(f"tensor {name}: not as in {path.name}")
                seen.add(name)
    if seen != state.keys():
        raise Difference(f"tensors in no file: {sorted(state.keys() - seen)}")
    return {"count": len(seen), "parameters": sum(tensor.numel() for tensor in state.values())}


def compare_tokenizer(folder, config, record):
    """Check that transformers' tokenizer gives the training's ids, and that the model has all of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if len(tokenizer) > config.vocab_size:
        raise Difference(f"tokenizer: {len(tokenizer)} tokens, and the model has {config.vocab_size} ids")
    for name in ("mask", "eos", "bos", "pad"):
        found, expected = (getattr(where, f"{name}_token_id", None) for where in (tokenizer, config))
        if found is None or found != expected:
            raise Difference(f"tokenizer: {name} token {found}, the model's {expected}")
    if not record["texts"]:
        raise Difference("tokenizer: no text to compare")
    for text, ids in zip(record["texts"], record["ids"], strict=True):
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            raise Difference(f"tokenizer: other ids than in the training for {text[:60]!r}")


def noise_of(check):
    """Arguments of `forward` that are kept with the batch."""
    return {name: check[name] for name in ("sigma", "position_ids", "visible_mask") if name in check}


def compare_bound(model, check, trained, tolerance):
    """Compare the NELBO at the recorded noise with the trained model's."""
    if not trained > 0:
        raise Difference(f"bound of the trained model: {trained} nats/token; there is nothing to compare")
    exported = model.bound(check["input_ids"], check["target_ids"], check["weights"], **noise_of(check))
    difference = abs(exported - trained) / trained
    if not difference <= tolerance:
        raise Difference(f"bound {exported:.6f} nats/token, trained {trained:.6f}")
    return {"trained": trained, "exported": exported, "relative_difference": difference}


def compare_logits(model, check, tolerance):
    """Compare logits of the first sequence with the trained model's."""
    expected = check["logits"]
    noise = {name: value if name == "visible_mask" else value[:1] for name, value in noise_of(check).items()}
    with torch.no_grad():
        logits = model(check["input_ids"][:1], **noise).logits[:, : expected.shape[1]]
    visible = torch.isfinite(logits)
    if not visible.any():
        raise Difference("logits: none is finite; there is nothing to compare")
    scale = expected[visible].abs().max()
    difference = float((logits - expected)[visible].abs().max() / scale)
    if not difference <= tolerance:
        raise Difference(f"logits differ by {difference:.1e} of the largest, {float(scale):.3g}")
    return {"relative_difference": difference, "compared": int(visible.sum())}


def compare_trace(model, expected, record, dtype, tolerance):
    """Compare tokens after every step of greedy sampling, up to a near tie between two ids.

    At fp32 all tokens must be equal; at lower precision, where one early token changes all later ones, only
    the share of equal tokens is reported. Steps without predictions are not counted; at least one step must
    have predictions.
    """
    states = []
    model.generate(
        record["prompt"],
        max_length=record["length"],
        seed=record["seed"],
        on_step=lambda step, ids: states.append(ids.cpu().clone()),
        **record["settings"],
    )
    found = torch.stack(states)
    if found.shape != expected.shape:
        raise Difference(f"sampling took {len(found)} steps, trained {len(expected)}")
    compared = len(expected)
    if dtype == "fp32":
        for step in range(len(expected)):
            other = found[step] != expected[step]
            if not other.any():
                continue
            margin, mask = record["margins"][step], model.config.mask_token_id
            # Which positions are revealed does not depend on any prediction.
            elsewhere = ((found[step] == mask) != (expected[step] == mask)).any()
            if elsewhere or margin is None or margin > 10 * tolerance:
                raise Difference(f"greedy sampling: other tokens than the trained model's in step {step}")
            compared = step
            break
    decided = [step for step in range(compared) if record["margins"][step] is not None]
    if not decided:
        raise Difference("greedy sampling: no step decides a token that could be compared")
    equal = int((found[decided] == expected[decided]).sum())
    return {"steps": compared, "compared_tokens": expected[decided].numel(), "equal_tokens": equal}


if __name__ == "__main__":
    sys.exit(main())
