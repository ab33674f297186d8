"""Triton's kernels against their PyTorch twins in float64; on a CPU through Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_dlm.diffusion.cross_entropy import cross_entropy_and_dlogits
from megatron_dlm.diffusion.uniform_divergence import uniform_divergence_and_dlogits
from megatron_dlm.interfaces import RowTargets, Vocabulary
from megatron_dlm.models.attention import rotary_table, rotate_plainly
from megatron_dlm.platform.vocab_parallel import VocabShard

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest error, relative to the largest value."""


@pytest.fixture(params=DTYPES, ids=["fp64", "fp32", "bf16"])
def dtype(request):
    return request.param


def close(ours, expected, dtype):
    scale = expected.abs().amax().item()
    error = (ours.double() - expected.double()).abs().amax().item()
    assert error <= DTYPES[dtype] * max(scale, 1e-6), f"{error} of {scale}"


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE)


def shard(size, mask, start, stop, *, fused):
    vocabulary = Vocabulary(size=size, mask_token_id=mask, eos_token_id=0, bos_token_id=1)
    return VocabShard(vocabulary=vocabulary, start=start, stop=stop, group=None, fused=fused)


def targets(rows, size, mask, alpha):
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(0, size - 1, (rows,), generator=generator)
    clean += clean >= mask
    noisy = torch.randint(0, size, (rows,), generator=generator)
    noisy[::3] = clean[::3]
    noisy[1] = mask
    ones = torch.ones(rows, dtype=torch.float64)
    return RowTargets(
        **{
            name: value.to(DEVICE)
            for name, value in {
                "clean_R": clean,
                "noisy_R": noisy,
                "alpha_R": alpha * ones,
                "weight_R": ones,
                "bound_weight_R": ones,
            }.items()
        }
    )


@pytest.mark.parametrize("mask", [3, 69])
@pytest.mark.parametrize("width", [70, 73])
def test_cross_entropy(dtype, mask, width):
    """Narrow rows and those with padding; the mask token first and last."""
    rows = targets(9, 70, mask, 0.5)
    logits = random(9, width, scale=4.0).to(dtype)
    expected = cross_entropy_and_dlogits(
        logits.double(), rows.clean_R, shard(70, mask, 0, width, fused=False)
    )
    ours = cross_entropy_and_dlogits(logits.clone(), rows.clean_R, shard(70, mask, 0, width, fused=True))
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    assert ours[1].dtype == dtype
    close(ours[0], expected[0], dtype)
    close(ours[1], expected[1], dtype)
    assert not ours[1][:, mask].any()
    assert not ours[1][:, 70:].any()


def test_rows_longer_than_a_block(dtype, monkeypatch):
    from megatron_dlm.kernels import row_softmax

    monkeypatch.setattr(row_softmax, "LARGEST_BLOCK", 64)
    rows = targets(5, 1001, 1000, 0.7)
    logits = random(5, 1001, scale=6.0).to(dtype)
    logits[0] -= 500.0
    for twin, arguments in (
        (cross_entropy_and_dlogits, (rows.clean_R,)),
        (uniform_divergence_and_dlogits, (rows,)),
    ):
        states = (1001,) if twin is uniform_divergence_and_dlogits else ()
        expected = twin(logits.double(), *arguments, shard(1001, 1000, 0, 1001, fused=False), *states)
        ours = twin(logits.clone(), *arguments, shard(1001, 1000, 0, 1001, fused=True), *states)
        close(ours[0], expected[0], dtype)
        close(ours[1], expected[1], dtype)


@pytest.mark.parametrize("alpha", [0.999, 0.5, 0.001, 0.0])
@pytest.mark.parametrize("mask", [3, 69])
def test_uniform_divergence(dtype, alpha, mask):
    rows = targets(12, 70, mask, alpha)
    logits = random(12, 72, scale=3.0).to(dtype)
    plain, fused = (shard(70, mask, 0, 72, fused=fused) for fused in (False, True))
    expected = uniform_divergence_and_dlogits(logits.double(), rows, plain, 70)
    ours = uniform_divergence_and_dlogits(logits.clone(), rows, fused, 70)
    close(ours[0], expected[0], dtype)
    close(ours[1], expected[1], dtype)


def test_small_logarithms_do_not_vanish():
    """Of 30,000 improbable ids each adds ln(1 + 1e-9): nothing, if 1 + 1e-9 were rounded in float32."""
    size = 30_000
    rows = targets(2, size, size - 1, 1e-5)
    logits = random(2, size, scale=0.1)
    vocab = [shard(size, size - 1, 0, size, fused=fused) for fused in (False, True)]
    expected = uniform_divergence_and_dlogits(logits.clone(), rows, vocab[0], size)
    ours = uniform_divergence_and_dlogits(logits.float(), rows, vocab[1], size)
    # The divergence is a difference of such sums: 1e-5 of the sum, not of the difference.
    assert (ours[0].double() - expected[0]).abs().max() < 1e-5 * size * 1e-5
    close(ours[1], expected[1], torch.float32)


def norm_twin(stream, weight, shift, scale):
    return torch.addcmul(shift, F.layer_norm(stream, stream.shape[-1:], weight, None, 1e-5), 1.0 + scale)


def gate_twin(stream, gate, branch, bias=None):
    return torch.addcmul(stream, gate, branch if bias is None else branch + bias)


def compare(twin, kernel, values, kinds, dtype, used=(True, True)):
    """Results and gradients of both; `used` says which of two results have a gradient."""
    results = []
    for function, types in ((twin, [torch.float64] * len(values)), (kernel, kinds)):
        leaves = [v.detach().to(k, copy=True).requires_grad_() for v, k in zip(values, types, strict=True)]
        found = function(*leaves)
        outs = found if isinstance(found, tuple) else (found,)
        upstream = [random(*out.shape, seed=9 + i).to(out.dtype) for i, out in enumerate(outs)]
        parts = [(o, u) for o, u, is_used in zip(outs, upstream, used, strict=False) if is_used]
        torch.autograd.backward(*map(list, zip(*parts, strict=True)))
        results.append([*outs, *(leaf.grad for leaf in leaves)])
    for mine, theirs, kind in zip(results[1], results[0], [None] * len(outs) + kinds, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert kind is None or mine.dtype == kind
            close(mine, theirs, dtype)
    return results[1]


# A width of one tile, of two, and of two whose second is not filled; positions more and fewer than programs.
SHAPES = [(7, 3, 32), (1, 2, 24), (21, 1, 43)]
SHAPES_AND_USE = [(*shape, (True, True)) for shape in SHAPES]
SHAPES_AND_USE += [(*SHAPES[2], used) for used in ((False, True), (True, False))]
"""Also where only one of two results has a gradient."""


@pytest.fixture
def few_programs(monkeypatch):
    from megatron_dlm.kernels import residual_norm

    monkeypatch.setattr(residual_norm, "programs_of", lambda device, warps: 8)


@pytest.mark.parametrize("length, batch, width, used", SHAPES_AND_USE)
def test_modulated_norm(dtype, length, batch, width, used, few_programs):
    """The stream is given on, and what comes back by it is added to the norm's own gradient."""
    from megatron_dlm.kernels.residual_norm import modulated_norm

    stream = torch.float64 if dtype == torch.float64 else torch.float32
    values = [random(length, batch, width, seed=1) + 0.5, random(width, seed=2)]
    values += [random(batch, width, seed=3), random(batch, width, seed=4)]
    found = compare(
        lambda x, *rest: (x, norm_twin(x, *rest)),
        lambda *leaves: modulated_norm(*leaves, epsilon=1e-5, dtype=dtype),
        values,
        [stream] * 4,
        dtype,
        used,
    )
    assert found[1].dtype == dtype


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("length, batch, width", SHAPES)
def test_gated_residual(dtype, length, batch, width, biased, few_programs):
    from megatron_dlm.kernels.residual_norm import gated_residual

    stream = torch.float64 if dtype == torch.float64 else torch.float32
    values = [random(length, batch, width, seed=1), random(batch, width, seed=2)]
    values += [random(length, batch, width, seed=3).to(dtype), random(width, seed=4).to(dtype)]
    count = 4 if biased else 3
    kernel = gated_residual if biased else lambda *leaves: gated_residual(*leaves, bias=None)
    compare(gate_twin, kernel, values[:count], [stream, stream, dtype, dtype][:count], dtype)


@pytest.mark.parametrize("length, batch, width, used", SHAPES_AND_USE)
def test_gated_residual_and_norm_in_one(dtype, length, batch, width, used, few_programs):
    from megatron_dlm.kernels.residual_norm import gated_residual_norm

    stream = torch.float64 if dtype == torch.float64 else torch.float32

    def twin(stream, gate, branch, *norm):
        out = gate_twin(stream, gate, branch)
        return out, norm_twin(out, *norm)

    values = [random(length, batch, width, seed=1), random(batch, width, seed=2)]
    values += [random(length, batch, width, seed=3).to(dtype), random(width, seed=4) + 1.0]
    values += [random(batch, width, seed=5), random(batch, width, seed=6)]
    compare(
        twin,
        lambda *leaves: gated_residual_norm(*leaves, epsilon=1e-5, dtype=dtype),
        values,
        [stream, stream, dtype, *[stream] * 3],
        dtype,
        used,
    )


def test_parts_of_a_modulation_are_read_where_they_lie(few_programs):
    """Gate, shift and scale as columns of one tensor, which no copy is made of."""
    from megatron_dlm.kernels import residual_norm

    modulation = random(3, 6 * 40, seed=1).float().requires_grad_()
    stream, branch = random(5, 3, 40, seed=2).float(), random(5, 3, 40, seed=3).float()
    weight = random(40, seed=4).float()
    gradients = []
    for copied in (False, True):
        _, _, gate, shift, scale, _ = modulation.chunk(6, dim=-1)
        parts = [part.contiguous() if copied else part for part in (gate, shift, scale)]
        out, y = residual_norm.gated_residual_norm(
            stream, parts[0], branch, weight, *parts[1:], epsilon=1e-5, dtype=torch.float32
        )
        gradients.append(torch.autograd.grad((out * y).sum(), modulation)[0])
        again = residual_norm.normed_again(out, weight, *parts[1:], epsilon=1e-5, dtype=torch.float32)
        assert torch.equal(again, y)
    assert torch.equal(*gradients)


def test_lanes_of_the_published_widths():
    from megatron_dlm.kernels.block_sizes import tiles_of

    found = {width: tiles_of(width) for width in (768, 1792, 2048, 2176)}
    assert found == {768: (512, 256), 1792: (2048, 0), 2048: (2048, 0), 2176: (2048, 128)}
    for width in range(1, 5000, 7):
        main, tail = tiles_of(width)
        assert main + tail >= width and (main + tail < 1.34 * width or width < 4)


@pytest.mark.parametrize("length, width", [(7, 70), (1, 64), (40, 9)])
def test_biased_gelu(dtype, length, width, monkeypatch):
    """Several blocks of columns, more rows than programs; values where the function is flat."""
    from megatron_dlm.kernels import biased_gelu as module

    monkeypatch.setattr(module, "LARGEST_BLOCK", 32)
    monkeypatch.setattr(module, "programs_of", lambda device, warps: 8)
    values = [random(length, 3, width, seed=1, scale=2.0).to(dtype), random(width, seed=2).to(dtype)]
    values[0][0, 0, :4] = torch.tensor([-30.0, 30.0, 0.0, -3.0])
    upstream = random(length, 3, width, seed=3)

    def twin(x, bias):
        return F.gelu(x + bias, approximate="tanh")

    results = []
    for function, kind in ((twin, torch.float64), (module.biased_gelu, dtype)):
        leaves = [value.detach().to(kind, copy=True).requires_grad_() for value in values]
        out = function(*leaves)
        out.backward(upstream.to(kind))
        results.append([out, *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert mine.dtype == dtype
        close(mine, theirs, dtype)


@pytest.mark.parametrize("samples", [1, 3])
def test_rotary_with_an_order_of_each_sample(dtype, samples):
    """The query comes as a view of the projection, as megatron-core cuts it."""
    from megatron_dlm.kernels.rotary import rotate

    length, batch, heads, channels = 6, 3, 5, 8
    positions = torch.stack([torch.randperm(20)[:length] for _ in range(samples)])
    table = rotary_table(positions, channels).to(DEVICE)
    whole = random(length, batch, heads, 3 * channels).to(dtype)
    upstream = random(length, batch, heads, channels, seed=1)
    results = []
    for function, kind in ((rotate_plainly, torch.float64), (rotate, dtype)):
        leaf = whole.detach().to(kind, copy=True).requires_grad_()
        out = function(leaf[..., channels : 2 * channels], table.double() if kind == torch.float64 else table)
        out.backward(upstream.to(kind))
        results.append([out, leaf.grad])
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert mine.dtype == dtype
        close(mine, theirs, dtype)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("capability", [pytest.param(80, marks=SLOW), 90, pytest.param(100, marks=SLOW)])
def test_all_kernels_compile_for_gpus_that_are_not_here(capability, tmp_path, record_property):
    """In a process of its own: here they are made for the interpreter. Nothing spills from registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.helpers.compile_kernels", "--capability", str(capability)],
        cwd=Path(__file__).parents[3],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    rows = [line.split() for line in finished.stdout.splitlines()]
    files = (Path(__file__).parents[3] / "megatron_dlm" / "kernels").glob("*.py")
    entry_points = {
        (path.stem.removesuffix("_kernels"), name)
        for path in files
        for name in re.findall(r"(\w+)\[\(", path.read_text())
    }
    found = [row[0].partition(":")[0].split(".") for row in rows]
    assert {(module.removesuffix("_kernels"), name) for module, name in found} == entry_points
    for name, registers, stack in rows:
        assert int(stack) == 0, name
        assert int(registers) < 255, name
        record_property("table: kernels", (name, f"sm_{capability}", registers, stack))
