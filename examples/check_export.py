"""Load an exported folder with transformers alone, compare it with the trained model, generate text.

Imports nothing of megatron_dlm: what a user of the export has.

    python examples/check_export.py FOLDER [--tolerance 1e-5] [--length 64]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer


def main() -> int:
    """Compare and generate; returns 1 where the export differs from the trained model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference")
    parser.add_argument("--length", type=int, default=64, help="tokens to generate")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    folder: Path = arguments.folder

    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.eval()
    if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        print(f"{folder}: tensors missing, unused or of another shape: {info}", file=sys.stderr)
        return 1

    check = load_file(folder / "check.safetensors")
    trained = json.loads((folder / "check.json").read_text(encoding="utf-8"))["nats_per_token"]
    noise = {name: check[name] for name in ("sigma", "position_ids", "visible_mask") if name in check}
    exported = model.bound(check["input_ids"], check["target_ids"], check["weights"], **noise)
    first = {name: value if name == "visible_mask" else value[:1] for name, value in noise.items()}
    with torch.no_grad():
        logits = model(check["input_ids"][:1], **first).logits[:, : check["logits"].shape[1]]
    visible = torch.isfinite(logits)
    logit_difference = float((logits - check["logits"])[visible].abs().max() / check["logits"].abs().max())
    difference = abs(exported - trained) / trained
    print(f"NELBO on fixed noise: trained {trained:.6f}, exported {exported:.6f} nats/token")
    print(f"relative difference: NELBO {difference:.1e}, logits {logit_difference:.1e}")

    text = tokenizer.decode(model.generate(max_length=arguments.length)[0], skip_special_tokens=True)
    print(f"generated: {text!r}")
    if arguments.output is not None:
        result = {
            "trained_nats_per_token": trained,
            "exported_nats_per_token": exported,
            "relative_difference": difference,
            "logit_difference": logit_difference,
            "generated": text,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(max(difference, logit_difference) > arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
