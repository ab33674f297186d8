"""How many bytes of text each token id stands for."""

from __future__ import annotations

import json
import re

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.tokenizers.encoders import LoadedTokenizer
from megatron_dlm.data.tokenizers.tokenizer_files import BYTES

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def bytes_of_tokens(loaded: LoadedTokenizer) -> NDArray[np.int64] | None:
    """UTF-8 bytes that each id adds to a text, where they do not depend on the ids around it.

    Args:
        loaded: the tokenizer.

    Returns:
        int64 [vocabulary], 0 for special tokens; None if the tokenizer has no such table. At the edges of a
        document, where some tokenizers drop a space, the sum may be off.
    """
    vocabulary = loaded.vocabulary
    table = np.zeros(vocabulary.size, dtype=np.int64)
    special = {vocabulary.eos_token_id, vocabulary.bos_token_id, vocabulary.mask_token_id}
    if loaded.library == BYTES:
        table[:256] = 1
    elif loaded.library == "tokenizers":
        description = json.loads(loaded.tokenizer.to_str())
        kinds = json.dumps(description["decoder"])
        special |= {token["id"] for token in description["added_tokens"] if token["special"]}
        names = loaded.tokenizer.get_vocab(with_added_tokens=True)
        if '"ByteLevel"' in kinds:
            # One character a byte, but for added tokens, which are text.
            added = {token["id"] for token in description["added_tokens"]}
            for name, token_id in names.items():
                table[token_id] = len(name.encode()) if token_id in added else len(name)
        elif '"ByteFallback"' in kinds or '"Metaspace"' in kinds:
            for name, token_id in names.items():
                table[token_id] = _bytes_of_piece(name)
        else:
            return None
    elif loaded.library == "sentencepiece":
        model = loaded.tokenizer
        for token_id in range(loaded.size):
            is_text = not (model.is_control(token_id) or model.is_unknown(token_id))
            table[token_id] = _bytes_of_piece(model.id_to_piece(token_id)) if is_text else 0
    else:
        return None
    table[[token_id for token_id in special if token_id < len(table)]] = 0
    return table


def _bytes_of_piece(piece: str) -> int:
    return 1 if _BYTE.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())
