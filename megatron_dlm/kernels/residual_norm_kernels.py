"""The two Triton kernels of kernels/residual_norm.py: the gated branch added to the stream, then its norm.

A row is held as two tiles, so that widths that are no power of two leave few lanes idle (2176 = 2048 + 128).
What all positions of a sample share is read anew for each, from cache, to leave registers free.
Shape legend, as in megatron-core: s sequence, b batch, d hidden size; G groups of positions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(pointer, columns, width, WIDE: tl.constexpr):
    return tl.load(pointer + columns, mask=columns < width, other=0.0).to(WIDE)


@triton.jit
def _gain(weight, scale, columns, width, WIDE: tl.constexpr):
    return _tile(weight, columns, width, WIDE) * (1.0 + _tile(scale, columns, width, WIDE))


@triton.jit
def _stream_of(
    stream, branch, gate, bias, out, columns, width,
    BRANCH: tl.constexpr, BIASED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of the stream behind the branch, which is written to `out`."""
    value = _tile(stream, columns, width, WIDE)
    if BRANCH:
        added = _tile(branch, columns, width, WIDE)
        if BIASED:
            added += _tile(bias, columns, width, WIDE)
        value += _tile(gate, columns, width, WIDE) * added
        tl.store(out + columns, value, mask=columns < width)
    return value


@triton.jit
def _store_normed(y, normed, weight, shift, scale, columns, width, WIDE: tl.constexpr):
    moved = normed * _gain(weight, scale, columns, width, WIDE) + _tile(shift, columns, width, WIDE)
    tl.store(y + columns, moved, mask=columns < width)


@triton.jit
def add_and_norm(
    stream, branch, gate, bias, weight, shift, scale, out, y, means, deviations,
    batch, width, gate_stride, shift_stride, scale_stride, epsilon,
    BRANCH: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Add the branch to the stream at one position, and normalise; gives both and the norm's statistics."""
    row = tl.program_id(0).to(tl.int64)
    sample = row % batch
    stream += row * width
    branch += row * width
    out += row * width
    y += row * width
    gate += sample * gate_stride
    shift += sample * shift_stride
    scale += sample * scale_stride
    main_columns = tl.arange(0, MAIN)
    main = _stream_of(stream, branch, gate, bias, out, main_columns, width, BRANCH, BIASED, WIDE)
    total = tl.sum(main, axis=0)
    if TAIL > 0:
        tail_columns = MAIN + tl.arange(0, TAIL)
        tail = _stream_of(stream, branch, gate, bias, out, tail_columns, width, BRANCH, BIASED, WIDE)
        total += tl.sum(tail, axis=0)
    if NORM:
        mean = total / width
        main = tl.where(main_columns < width, main - mean, 0.0)
        square = tl.sum(main * main, axis=0)
        if TAIL > 0:
            tail = tl.where(tail_columns < width, tail - mean, 0.0)
            square += tl.sum(tail * tail, axis=0)
        inverse = 1.0 / tl.sqrt(square / width + epsilon)
        _store_normed(y, main * inverse, weight, shift, scale, main_columns, width, WIDE)
        if TAIL > 0:
            _store_normed(y, tail * inverse, weight, shift, scale, tail_columns, width, WIDE)
        tl.store(means + row, mean)
        tl.store(deviations + row, inverse)


@triton.jit
def _read(
    dout, dy, x, branch, start, columns, inside,
    BRANCH: tl.constexpr, NORM: tl.constexpr, STREAM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of what one position brings: gradients by the stream and by y, stream, branch."""
    nothing = tl.zeros(columns.shape, WIDE)
    by_stream, by_y, value, added = nothing, nothing, nothing, nothing
    if STREAM:
        by_stream = tl.load(dout + start + columns, mask=inside, other=0.0)
    if NORM:
        by_y = tl.load(dy + start + columns, mask=inside, other=0.0)
        value = tl.load(x + start + columns, mask=inside, other=0.0)
    if BRANCH:
        added = tl.load(branch + start + columns, mask=inside, other=0.0)
    return by_stream, by_y, value, added


@triton.jit
def _write(
    dx, dbranch, gate, bias, start, total, added, columns, width,
    BRANCH: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile's gradients of stream and branch; returns what it adds to the gate's."""
    if NORM:
        tl.store(dx + start + columns, total, mask=columns < width)
    gated = total
    if BRANCH:
        added = added.to(WIDE)
        if BIASED:
            added += _tile(bias, columns, width, WIDE)
        gated = total * added
        tl.store(dbranch + start + columns, total * _tile(gate, columns, width, WIDE), mask=columns < width)
    return gated


@triton.jit
def _keep(
    place, gates, plain, shifts, scales, columns, width,
    BRANCH: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A tile of a program's sums."""
    inside = columns < width
    if BRANCH:
        tl.store(place + columns, gates, mask=inside)
    if BIASED:
        tl.store(place + width + columns, plain, mask=inside)
    if NORM:
        tl.store(place + 2 * width + columns, shifts, mask=inside)
        tl.store(place + 3 * width + columns, scales, mask=inside)


@triton.jit
def add_and_norm_gradient(
    dout, dy, x, branch, gate, bias, weight, scale, means, deviations, dx, dbranch, sums,
    length, batch, width, gate_stride, scale_stride,
    BRANCH: tl.constexpr, BIASED: tl.constexpr, NORM: tl.constexpr, STREAM: tl.constexpr, WIDE: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Positions of one sample: gradients of stream and branch, and sums [G, b, 4, d] for all others."""
    sample, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = tl.num_programs(1)
    gate += sample * gate_stride
    scale += sample * scale_stride
    # Names end in m for the main tile and in t for the tail.
    columns_m = tl.arange(0, MAIN)
    inside_m = columns_m < width
    zero_m = tl.zeros([MAIN], WIDE)
    gates_m, plain_m, shifts_m, scales_m = zero_m, zero_m, zero_m, zero_m
    if TAIL > 0:
        columns_t = MAIN + tl.arange(0, TAIL)
        inside_t = columns_t < width
        zero_t = tl.zeros([TAIL], WIDE)
        gates_t, plain_t, shifts_t, scales_t = zero_t, zero_t, zero_t, zero_t
    for position in range(group, length, groups):
        row = position * batch + sample
        start = row * width
        stream_m, dy_m, x_m, branch_m = _read(
            dout, dy, x, branch, start, columns_m, inside_m, BRANCH, NORM, STREAM, WIDE
        )
        if TAIL > 0:
            stream_t, dy_t, x_t, branch_t = _read(
                dout, dy, x, branch, start, columns_t, inside_t, BRANCH, NORM, STREAM, WIDE
            )
        total_m = stream_m.to(WIDE)
        if TAIL > 0:
            total_t = stream_t.to(WIDE)
        if NORM:
            mean, inverse = tl.load(means + row), tl.load(deviations + row)
            normed_m = tl.where(inside_m, (x_m.to(WIDE) - mean) * inverse, 0.0)
            inner_m = dy_m.to(WIDE)
            shifts_m += inner_m
            scales_m += inner_m * normed_m
            inner_m *= _gain(weight, scale, columns_m, width, WIDE)
            level = tl.sum(inner_m, axis=0)
            along = tl.sum(inner_m * normed_m, axis=0)
            if TAIL > 0:
                normed_t = tl.where(inside_t, (x_t.to(WIDE) - mean) * inverse, 0.0)
                inner_t = dy_t.to(WIDE)
                shifts_t += inner_t
                scales_t += inner_t * normed_t
                inner_t *= _gain(weight, scale, columns_t, width, WIDE)
                level += tl.sum(inner_t, axis=0)
                along += tl.sum(inner_t * normed_t, axis=0)
                total_t += inverse * (inner_t - level / width - normed_t * (along / width))
            total_m += inverse * (inner_m - level / width - normed_m * (along / width))
        gated_m = _write(
            dx, dbranch, gate, bias, start, total_m, branch_m, columns_m, width, BRANCH, BIASED, NORM, WIDE
        )
        gates_m += gated_m
        plain_m += total_m
        if TAIL > 0:
            gated_t = _write(
                dx,
                dbranch,
                gate,
                bias,
                start,
                total_t,
                branch_t,
                columns_t,
                width,
                BRANCH,
                BIASED,
                NORM,
                WIDE,
            )
            gates_t += gated_t
            plain_t += total_t
    place = sums + (group * batch + sample) * 4 * width
    _keep(place, gates_m, plain_m, shifts_m, scales_m, columns_m, width, BRANCH, BIASED, NORM)
    if TAIL > 0:
        _keep(place, gates_t, plain_t, shifts_t, scales_t, columns_t, width, BRANCH, BIASED, NORM)
