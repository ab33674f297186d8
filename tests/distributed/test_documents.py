"""Documents packed into one block give what each gives by itself."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers import weights
from tests.helpers.distributed import run_distributed
from tests.helpers.layouts import toy_model
from tools import tiny

LENGTHS = (9, 1, 14, 8)


def packed_and_single(state, config):
    """Logits of a block of documents, and of each document as a sample of its own."""
    from megatron_dlm.interfaces import ModelInputs
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.session import Session

    session = Session(config, open_data(config.data), state)
    size = session.data.vocabulary.size
    weights.set_weights(session.denoiser, state, weights.random_state(config.model, size))
    tokens = torch.randint(size, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    packed = ModelInputs(
        token_ids_BL=tokens,
        position_ids_BL=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        sigma_B=torch.zeros(1),
        document_ids_BL=torch.repeat_interleave(torch.tensor(LENGTHS))[None],
    )
    with torch.no_grad():
        together = session.denoiser.logits(packed)
        alone = [
            session.denoiser.logits(
                ModelInputs(
                    token_ids_BL=part,
                    position_ids_BL=torch.arange(part.shape[1])[None],
                    sigma_B=torch.zeros(1),
                )
            )
            for part in tokens.split(LENGTHS, dim=1)
        ]
        one_text = session.denoiser.logits(replace(packed, document_ids_BL=None))
    return together.numpy(), torch.cat(alone, dim=1).numpy(), one_text.numpy()


def one_token(state, config):
    """A sample cut to one token, as a rare step of `ssl_ratio` has it."""
    from megatron_dlm.interfaces import ModelInputs
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.session import Session

    session = Session(config, open_data(config.data), state)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    inputs = ModelInputs(token_ids_BL=ids, position_ids_BL=ids, sigma_B=torch.zeros(1), document_ids_BL=ids)
    return session.denoiser.logits(inputs).shape


def test_a_sample_of_one_token_has_a_mask_too(corpus):
    config = tiny.run_config(corpus, corpus.directory / "unused", MDLMConfig())
    assert run_distributed(one_token, 1, config) == [torch.Size([1, 1, 301])]


@pytest.mark.parametrize("objective", [ARConfig(), MDLMConfig()], ids=lambda config: config.name)
@pytest.mark.parametrize("tensor", [1, 2])
def test_packed_documents_equal_single_ones(corpus, objective, tensor):
    parallel = ParallelConfig(tensor_model_parallel_size=tensor)
    config = tiny.run_config(corpus, corpus.directory / "unused", objective)
    config = replace(config, model=toy_model(), parallel=parallel)
    for together, alone, one_text in run_distributed(packed_and_single, tensor, config, parallel=parallel):
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)
        assert one_text != pytest.approx(alone, rel=1e-2, abs=1e-2)


def packed_against_masked(state, causal):
    """Attention by edges, through a core that goes over the documents, and by the dense mask."""
    import torch.nn.functional as F

    from megatron_dlm.interfaces import AttentionPattern
    from megatron_dlm.models.packed_documents import attend_within
    from megatron_dlm.models.visibility import document_edges, pattern_mask, within_documents

    ids = torch.tensor([[0, 0, 0, 1, 1, 4], [2, 2, 2, 2, 2, 2], [0, 1, 1, 1, 3, 3]])
    edges = document_edges(ids)
    assert edges.dtype == torch.int32 and edges.tolist() == [0, 3, 5, 6, 12, 13, 16, 18]
    assert document_edges(torch.tensor([[0, 1, 0]])) is None
    query, key, value = torch.randn(3, 6, 3, 2, 4, dtype=torch.float64)

    def core(query, key, value, mask, packed_seq_params):
        assert mask is None and packed_seq_params.qkv_format == "thd" and packed_seq_params.max_seqlen_q == 6
        outs = []
        for start, stop in pairwise(edges):
            q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
            outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(0, 1).flatten(1))
        return torch.cat(outs)

    pattern = AttentionPattern.CAUSAL if causal else AttentionPattern.BIDIRECTIONAL
    mask = within_documents(pattern_mask(pattern, 6), ids).dense()
    heads_first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).permute(2, 0, 1, 3).flatten(2)
    found = attend_within(edges, core, query, key, value)
    return float((found - expected).abs().max())


@pytest.mark.parametrize("causal", [True, False])
def test_edges_of_documents_say_what_the_mask_does(causal):
    assert run_distributed(packed_against_masked, 1, causal)[0] < 1e-12
