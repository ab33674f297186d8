"""What a batch may hold: ids of the model, and padding, which nothing attends to."""

import torch


def visible_of(attention_mask, x, visible_mask, causal, past=0):
    """The attention mask of a batch with padding.

    Args:
        attention_mask: [B, M + L] of integers or booleans, 0 at padding, M being the cached tokens.
        x: [B, L, ...], what the network reads.
        visible_mask: bool [..., L, M + L] that holds besides; None: the family's own pattern.
        causal: whether that pattern is causal.
        past: M.

    Returns:
        bool [B, 1, L, M + L], True where a row attends to a column; `visible_mask` if nothing is padding.
    """
    length = x.shape[1]
    if attention_mask.shape != (x.shape[0], past + length):
        raise ValueError(
            f"attention_mask: {tuple(attention_mask.shape)} instead of {(x.shape[0], past + length)}"
        )
    if torch.is_floating_point(attention_mask):
        raise ValueError(f"attention_mask: {attention_mask.dtype} instead of integers or booleans")
    kept = attention_mask.bool()
    if bool(kept.all()):
        return visible_mask
    if not bool(kept.any(1).all()):
        row = int((~kept.any(1)).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} is all padding")
    if visible_mask is None and causal:
        visible_mask = causal_mask(x, past)
    visible = kept[:, None, None, :].expand(-1, 1, length, past + length)
    if visible_mask is not None:
        visible = visible & visible_mask
    # Padding looks at itself: a row of nothing would be no number.
    places = torch.arange(past + length, device=kept.device)
    return visible | (places == places[past:, None])


def causal_mask(x, past):
    """Mask [L, M + L], True where a token of `x` attends to one before it (M are cached) or itself."""
    places = torch.arange(past + x.shape[1], device=x.device)
    return places <= places[past:, None]


def check_length(length, config):
    """Refuse more tokens than the model was trained on."""
    if length > config.max_position_embeddings:
        raise ValueError(
            f"input_ids: {length} tokens, and the model was trained on {config.max_position_embeddings}"
        )


def check_ids(input_ids, config):
    """Refuse ids that the model does not have, before a device reports them in its own way."""
    if input_ids is None or torch.compiler.is_compiling():
        return
    if bool(((input_ids < 0) | (input_ids >= config.vocab_size)).any()):
        raise ValueError(
            f"input_ids: a token is outside [0, {config.vocab_size}); is the tokenizer that of the model?"
        )


def positions_of(attention_mask, x):
    """Place of each token in its text, int64 [B or 1, L], padding on the left not counted."""
    if attention_mask is None:
        return torch.arange(x.shape[1], device=x.device)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
