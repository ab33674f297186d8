"""FlexAttention under block tables: values and gradients of dense masks, and its speed beside them."""

import time

import pytest
import torch
import torch.nn.functional as F

from megatron_dlm.models.block_table import pack_table
from megatron_dlm.models.visibility import visibility
from tests.helpers.devices import DEVICE, HAS_CUDA
from tests.helpers.masked_batches import inputs_of

NAMES = ("block diffusion", "sequential, documents", "causal, documents")
"""Of masks; each is compiled, which takes seconds. All tables are compared with their masks on a CPU."""


def masks_of(name):
    config, inputs, _ = inputs_of(name)
    mask = visibility(inputs, config.attention)
    return mask.dense().to(DEVICE), pack_table(mask).to(DEVICE)


def attended(function, leaves, gradient):
    """Output and gradients of query, key and value, float32."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    out.backward(gradient.to(out.dtype))
    return [tensor.float() for tensor in (out.detach(), *(leaf.grad for leaf in leaves))]


@pytest.fixture
def nothing_compiled():
    """torch.compile gives up where one function has been compiled for too many shapes."""
    import torch._dynamo

    from megatron_dlm.models import flex_attention

    flex_attention._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.skipif(not HAS_CUDA, reason="FlexAttention has no gradient on a CPU")
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_dense_masks(name):
    """bf16 against float32 with the dense mask: no farther than dense bf16 is, give or take its rounding."""
    from megatron_dlm.models.flex_attention import attend_by_table

    dense, table = masks_of(name)
    generator = torch.Generator().manual_seed(0)
    *leaves, gradient = torch.randn(4, len(dense), 2, dense.shape[2], 64, generator=generator).to(DEVICE)
    low = [leaf.bfloat16() for leaf in leaves]
    exact = attended(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense),
        [leaf.float() for leaf in low],
        gradient,
    )
    usual = attended(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense), low, gradient)
    found = attended(lambda q, k, v: attend_by_table(q, k, v, table), low, gradient)
    for ours, theirs, expected in zip(found, usual, exact, strict=True):
        bound = 2.0 * (theirs - expected).norm() + 1e-3 * expected.norm()
        assert (ours - expected).norm() <= bound


def milliseconds(function, leaves, gradient):
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        attended(function, leaves, gradient)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times[2:])


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.skipif(not HAS_CUDA, reason="FlexAttention has no gradient on a CPU")
def test_speed_against_dense_masks(capsys):
    """Block diffusion at 2 x 2,048 positions, forward and backward; the ratio is printed, not judged."""
    from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
    from megatron_dlm.families.documents import corrupt
    from megatron_dlm.models.flex_attention import attend_by_table
    from tests.helpers.batches import context
    from tests.helpers.masked_batches import VOCABULARY, batch_of

    config = BlockDiffusionConfig(block_size=16)
    batch = batch_of(2048, 0, size=2)
    inputs, _ = corrupt(config.build(VOCABULARY), batch, context(0, 2))
    mask = visibility(inputs, config.attention)
    dense, table = mask.dense().to(DEVICE), pack_table(mask).to(DEVICE)
    *leaves, gradient = torch.randn(4, 2, 17, 4096, 128, device=DEVICE, dtype=torch.bfloat16)
    by_table = milliseconds(lambda q, k, v: attend_by_table(q, k, v, table), leaves, gradient)
    by_mask = milliseconds(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense), leaves, gradient
    )
    assert by_table > 0 and by_mask > 0
    with capsys.disabled():
        print(
            f"\nblock diffusion, 4,096 positions: {by_table:.2f} ms by table, {by_mask:.2f} ms by dense mask,"
        )
        print(f"{by_mask / by_table:.2f}x as fast")
