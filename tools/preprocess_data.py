"""Index a corpus with the command line of Megatron-LM's tools/preprocess_data.py.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus --workers 8 --append-eod
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer

Writes OUTPUT-PREFIX_KEY_document.bin and .idx with the same bytes, and a manifest beside them. One
difference: text that spells a special token is encoded as plain text, unless --special-tokens-in-text is
given. GPT2BPETokenizer takes --vocab-file and --merge-file, and writes them as OUTPUT-PREFIX_tokenizer, which
models are exported with. The same as `megatron-dlm index --megatron-names`, which has more options; flags
that are not supported are named.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_dlm.cli.index import index
from megatron_dlm.cli.main import run_and_exit, with_home
from megatron_dlm.data.preprocessing.index import IndexConfig
from megatron_dlm.data.tokenizers.tokenizer import write_gpt2_tokenizer
from megatron_dlm.interfaces import InputError

GPT2 = "GPT2BPETokenizer"
TOKENIZERS = (
    *("HuggingFaceTokenizer", GPT2),
    *("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "TikTokenizer"),
)
"""Tokenizers that give the same ids and ends of documents here as in megatron-core 0.16."""
INSTEAD = {
    "NullTokenizer": "write ids with megatron-core's builder, and take them by `megatron-dlm index --adopt`"
}
"""What to do in place of tokenizers that are not supported."""
WITHOUT_EFFECT = {
    "--partitions": "how Megatron-LM cuts its input; the documents keep their order without it",
    "--log-interval": "documents between Megatron-LM's reports; here they come every two seconds",
    "--make-vocab-size-divisible-by": "padding of a model's vocabulary, which no shard knows",
    "--vocab-extra-ids": "ids that no text gives",
    "--workers-to-check": "of --find-optimal-num-workers",
    "--max-documents": "of --find-optimal-num-workers",
}


def parse() -> IndexConfig:
    """The arguments of Megatron-LM's tool as ours."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", required=True, help="JSON lines, or a glob of such files")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="members that hold text (text)")
    parser.add_argument("--output-prefix", type=Path, required=True, help="path without _KEY_document")
    parser.add_argument("--tokenizer-type", required=True, help=f"one of {', '.join(TOKENIZERS)}")
    parser.add_argument(
        "--tokenizer-model", type=Path, help="directory, hub name in the cache, .model or .json file"
    )
    parser.add_argument("--vocab-file", type=Path, help=f"vocab.json of {GPT2}")
    parser.add_argument("--merge-file", type=Path, help=f"merges.txt of {GPT2}")
    parser.add_argument(
        "--find-optimal-num-workers", action="store_true", help="accepted, without effect: --workers decides"
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end token")
    parser.add_argument("--workers", type=int, required=True, help="processes that encode")
    parser.add_argument("--keep-sequential-samples", action="store_true", help="holds in any case")
    parser.add_argument("--special-tokens-in-text", action="store_true", help="text may spell special tokens")
    for flag, why in WITHOUT_EFFECT.items():
        parser.add_argument(flag, type=int, nargs="+", help=f"accepted, without effect: {why}")
    arguments, unknown = parser.parse_known_args(with_home(sys.argv[1:]))
    if unknown:
        raise InputError(f"{unknown[0]}: not supported; --help lists what is")
    if arguments.tokenizer_type not in TOKENIZERS:
        instead = INSTEAD.get(arguments.tokenizer_type, f"it is not one of {', '.join(TOKENIZERS)}")
        raise InputError(f"--tokenizer-type: {arguments.tokenizer_type} is not supported: {instead}")
    tokenizer = arguments.tokenizer_model
    if arguments.tokenizer_type == GPT2:
        if arguments.vocab_file is None or arguments.merge_file is None:
            raise InputError(f"--tokenizer-type: {GPT2} needs --vocab-file and --merge-file")
        prefix = arguments.output_prefix
        tokenizer = prefix.with_name(f"{prefix.name}_tokenizer")
        write_gpt2_tokenizer(arguments.vocab_file, arguments.merge_file, tokenizer)
    if tokenizer is None:
        raise InputError(f"--tokenizer-model: {arguments.tokenizer_type} needs it")
    return IndexConfig(
        input=(arguments.input,),
        output=arguments.output_prefix,
        tokenizer=tokenizer,
        json_keys=tuple(arguments.json_keys),
        append_eos=arguments.append_eod,
        workers=arguments.workers,
        special_tokens_as_text=not arguments.special_tokens_in_text,
        megatron_names=True,
    )


if __name__ == "__main__":
    run_and_exit("preprocess_data", lambda: index(parse()))
