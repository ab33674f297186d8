"""The benchmark's plain way costs what the package's losses cost, so that both sides compute the same."""

import numpy as np
import pytest
import torch

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.interfaces import HeadRows
from megatron_dlm.models.head import Head
from megatron_dlm.platform.vocab_parallel import VocabShard
from tests.helpers.batches import batch_of, context, vocabulary
from tools.bench.naive import naive_loss

SIZE, MASK = 23, 22


@pytest.mark.parametrize("family", ["ar", "mdlm", "duo", "esolm"])
def test_naive_losses_and_gradients_are_ours(family):
    objective = OBJECTIVES[family]().build(vocabulary(SIZE, MASK))
    tokens = np.random.default_rng(0).integers(0, SIZE - 1, (4, 33))
    _, targets = objective.corrupt(batch_of(tokens, np.arange(4)), context(0, 4))
    vocab = VocabShard.of_rank(vocabulary(SIZE, MASK), 0, None, 1)
    head = Head(8, vocab, None, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    hidden = torch.randn(32, 4, 8, generator=generator)
    found = []
    for plain in (False, True):
        leaf = hidden.clone().requires_grad_()
        head.zero_grad()
        if plain:
            loss = naive_loss(family, leaf, head.weight, head.bias, targets, MASK, targets.token_count)
        else:
            losses = head(leaf, HeadRows.of(targets), objective.loss_and_dlogits, 16)
            loss = losses.loss / targets.token_count
        loss.backward()
        found.append([loss.detach(), leaf.grad, head.weight.grad.clone(), head.bias.grad.clone()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
