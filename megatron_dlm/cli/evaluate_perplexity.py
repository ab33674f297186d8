"""`megatron-dlm evaluate perplexity MODEL --text FILE ...`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from megatron_dlm.cli.arguments import ModelArgument, bad_values, check_new_file, parse_with_model
from megatron_dlm.evaluation.conditional import ConditionalConfig
from megatron_dlm.interfaces import InputError

WHOLE_FILES = (".txt", ".tokens", ".raw")


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(ModelArgument):
    """Zero-shot perplexity of local texts, in windows of the model's length that slide over each text.

    A text's tokens are each scored once, given those before them in their window: exactly for AR, by the
    conditional bound for diffusion. Perplexities of words and bits per byte do not depend on the tokenizer.
    Under torchrun, srun or mpirun the processes share the windows; the result stays the same.
    """

    text: tuple[Path, ...]
    """Files to score. .txt, .raw and .tokens: each one text, as WikiText is distributed; .jsonl, .json and
    .parquet, also .gz or .zst: a text for each record."""
    json_key: str = "text"
    """Member of a JSON line, or column, that holds the text."""
    stride: int | None = None
    """Tokens that a window scores, the first window of a text apart; those before them in the window are
    given. None: windows side by side, which is fastest and gives the highest perplexity."""
    detokenize: Literal["no", "wikitext"] = "no"
    """wikitext: let the model read WikiText in usual spelling ("1,000" for "1 @,@ 000"), as lm-eval does it.
    Words and bytes are counted in the text as given."""
    limit: int | None = None
    """Score only this many texts, from the first on; None: all."""
    conditional: tyro.conf.OmitArgPrefixes[ConditionalConfig] = ConditionalConfig()
    tokenizer: Path | None = None
    """Directory of the model's tokenizer; None: the one in the exported folder, or the one that the training
    data of a checkpoint was indexed with."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the loaded weights."""
    device: str | None = None
    """Device to run on, for example cpu or cuda:0; None: a GPU if there is one."""
    output: Path | None = None
    """JSON file to write with the result; None: only print it."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit: {self.limit} is below 1")
        if not self.text:
            raise InputError("text: no file given")
        check_new_file("output", self.output)


def run(arguments: list[str]) -> int:
    """Parse, score, report; returns the exit code."""
    config = parse_with_model(PerplexityConfig, arguments, verb="evaluate perplexity")
    texts = _texts(config)[: config.limit]
    from tqdm import tqdm

    from megatron_dlm.evaluation.loaded_model import open_model
    from megatron_dlm.evaluation.perplexity import perplexity_of, wikitext_as_plain

    loaded = open_model(config.model, tokenizer=config.tokenizer, dtype=config.dtype, device=config.device)
    as_read = wikitext_as_plain if config.detokenize == "wikitext" else str
    with (
        bad_values(),
        loaded.peers.together(),
        tqdm(desc="windows", disable=None if loaded.peers.is_first else True) as bar,
    ):

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        found = perplexity_of(texts, as_read, loaded, config.conditional, config.stride, progress)
    if not loaded.peers.is_first:
        return 0
    from megatron_dlm.cli.evaluate_nll import show_mean

    print(
        f"{config.model}: perplexity {found.per_token:.2f} a token, {found.per_word:.2f} a word; "
        f"{show_mean(found.protocol)} nats/token, {found.bits_per_byte:.4f} bits/byte; "
        f"{found.texts:,} texts, {found.windows:,} windows, {found.tokens:,} tokens, {found.words:,} words, "
        f"{found.copies} copies each"
    )
    if config.output is not None:
        from megatron_dlm.platform.files import write_json

        derived = {name: getattr(found, name) for name in ("per_token", "per_word", "bits_per_byte")}
        write_json(config.output, asdict(found) | derived | {"stride": config.stride})
    return 0


def _texts(config: PerplexityConfig) -> Sequence[str]:
    """All texts of the files, in order."""
    from megatron_dlm.data.preprocessing.document_readers import read_texts

    texts: list[str] = []
    for path in config.text:
        if path.suffix in (".gz", ".zst") and path.with_suffix("").suffix in WHOLE_FILES:
            raise InputError(f"text: {path}: a text that is one file is read uncompressed")
        if path.suffix not in WHOLE_FILES:
            texts += read_texts([path], config.json_key)
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"text: {path}: {error}") from error
    return texts
