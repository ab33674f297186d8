"""Key-value cache of a causal model. B sequences, M cached tokens, N tokens fed at a time."""

import torch


class LayerCache:
    """Keys and values of one layer, in a buffer that grows as needed."""

    def __init__(self, cache):
        self._cache = cache
        self._keys = self._values = None

    def with_past(self, k, v):
        """Cached and new keys and values, [B, heads, M + N, head_dim] each."""
        length, needed = self._cache.length, self._cache.length + k.shape[2]
        if self._keys is None or self._keys.shape[2] < needed:
            self._keys, self._values = (
                self._grown(old, new, length, max(needed, 2 * length))
                for old, new in ((self._keys, k), (self._values, v))
            )
        self._keys[:, :, length:needed], self._values[:, :, length:needed] = k, v
        return self._keys[:, :, :needed], self._values[:, :, :needed]

    @staticmethod
    def _grown(old, new, length, size):
        memory = new.new_empty(*new.shape[:2], size, new.shape[3])
        if old is not None:
            memory[:, :, :length] = old[:, :, :length]
        return memory

    def select(self, rows):
        """Keep some of the sequences."""
        if self._keys is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]


class KeyValueCache:
    """Keys and values of all layers; tokens that are not kept are overwritten by the next call."""

    def __init__(self, model, batch_size):
        self._model = model
        self._layers = [LayerCache(self) for _ in model.blocks]
        self.length = 0
        self._valid = torch.empty(batch_size, 0, dtype=torch.bool, device=model.device)

    def layer(self, index):
        """Keys and values of one layer."""
        return self._layers[index]

    def hidden(self, ids, positions, valid, kept, rows):
        """Hidden states [R, hidden] of the tokens at `rows`; attention is causal, cached tokens included.

        Args:
            ids: int64 [B, N] token ids.
            positions: int64 [B, N] positions in the text.
            valid: bool [B, N], False at padding.
            kept: bool [B, N], True at tokens to keep in the cache; they precede all others of their sequence.
            rows: bool [B, N], True where hidden states are returned.
        """
        mask = self._mask(valid)
        hidden = self._model.hidden(ids, position_ids=positions, visible_mask=mask, cache=self)
        columns = int(kept.sum(1).max())
        self.length += columns
        self._valid = torch.cat([self._valid, kept[:, :columns]], dim=1)
        return hidden[rows]

    def _mask(self, valid):
        count = valid.shape[1]
        padded = not (bool(valid.all()) and bool(self._valid.all()))
        if count == 1 and not padded:
            return None
        backwards = torch.ones(count, count, dtype=torch.bool, device=valid.device).tril()
        if not padded:
            past = backwards.new_ones(count, self.length)
            return torch.cat([past, backwards], dim=1)
        # Padding looks at itself: a row of nothing would be no number.
        itself = torch.eye(count, dtype=torch.bool, device=valid.device)
        new = (backwards & valid[:, None, :]) | itself
        past = self._valid[:, None, :].expand(-1, count, -1)
        return torch.cat([past, new], dim=2)[:, None]

    def select(self, rows):
        """Keep some of the sequences."""
        self._valid = self._valid[rows]
        for layer in self._layers:
            layer.select(rows)
