"""What a batch may hold: ids of the model, and padding, which nothing attends to."""

import torch


def visible_of(attention_mask, x, visible_mask, causal):
    """The attention mask of a batch with padding.

    Args:
        attention_mask: [B, L] of integers or booleans, 0 at padding.
        x: [B, L, ...], what the network reads.
        visible_mask: bool [..., L, L] that holds besides; None: the family's own pattern.
        causal: whether that pattern is causal.

    Returns:
        bool [B, 1, L, L], True where a row attends to a column; `visible_mask` if nothing is padding.
    """
    if attention_mask.shape != x.shape[:2]:
        raise ValueError(f"attention_mask: {tuple(attention_mask.shape)} instead of {tuple(x.shape[:2])}")
    if torch.is_floating_point(attention_mask):
        raise ValueError(f"attention_mask: {attention_mask.dtype} instead of integers or booleans")
    kept = attention_mask.bool()
    if bool(kept.all()):
        return visible_mask
    if not bool(kept.any(1).all()):
        row = int((~kept.any(1)).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} is all padding")
    length = kept.shape[1]
    visible = kept[:, None, None, :].expand(-1, 1, length, length)
    if visible_mask is not None:
        visible = visible & visible_mask
    elif causal:
        visible = visible & torch.ones(length, length, dtype=torch.bool, device=kept.device).tril()
    # Padding looks at itself: a row of nothing would be no number.
    return visible | torch.eye(length, dtype=torch.bool, device=kept.device)


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
