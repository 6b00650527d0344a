"""The Triton kernels of the device stores; importing this module imports Triton.

Gradients stand in one table of 64-bit words, made for every pass:
``[address of each parameter's gradient | address, size, first block of each head's gradient]``. Address 0: no
gradient. Address -1: of another kind (dtype, alignment), which another launch reads. Whatever changes between steps
is a runtime argument, and vectors are passed whole with an index, so that a kernel compiles once a dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _values(
    address, offset, size, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, POLICY: tl.constexpr = ""
):
    """A block of the gradient from `offset` on, zeros from `size` on and where there is no gradient."""
    pointer = address.to(tl.pointer_type(KIND))
    if ALIGNED:
        # Loads are scalar unless the address is known to be a multiple of 16 bytes, and under a mask of any size.
        pointer = tl.multiple_of(pointer, 16)
    inside = tl.multiple_of(offset, BLOCK) + tl.arange(0, BLOCK)
    size = tl.where(address != 0, size, 0)
    if offset + BLOCK <= size:
        values = tl.load(pointer + inside, eviction_policy=POLICY)
    else:
        values = tl.load(pointer + inside, mask=inside < size, other=0.0)
    return values


@triton.jit
def _narrow(values, DTYPE: tl.constexpr):
    """The values in the dtype. The interpreter knows no way from float64 to bfloat16, and truncates on the other."""
    if DTYPE == tl.bfloat16:
        values = values.to(tl.float32)
    return values.to(DTYPE)


@triton.jit
def _padded(size):
    """Where the next parameter starts: up to there a row holds zeros, and whole vectors can be read and written."""
    return tl.multiple_of((size + 63) // 64 * 64, 64)


@triton.jit
def _head_of(block, firsts, heads):
    """Which head the block belongs to: the last one whose first block is not after it."""
    found = tl.zeros((), tl.int32)
    for begin in range(0, heads, 64):
        at = begin + tl.arange(0, 64)
        first = tl.load(firsts + at, mask=at < heads, other=1 << 40)
        found += tl.sum((first <= block).to(tl.int32))
    return found - 1


@triton.jit
def _total(partials, count, BLOCK: tl.constexpr):
    """The sum of `count` numbers in double precision, always in the same order."""
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(partials + at, mask=at < count, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _verdict(square, task, usable, given, healthy, taken, refuses):
    """Whether the pass counts, written to `taken`; one that does not ends the batch under `refuses`."""
    well = tl.load(healthy) != 0
    ok = (square < float("inf")) & tl.load(usable + task).to(tl.int1) & tl.load(given).to(tl.int1) & well
    tl.store(taken, ok)
    tl.store(healthy, ((ok | (refuses == 0)) & well).to(tl.int32))
    return ok


@triton.jit(do_not_specialize=["task", "spare", "length", "parameters", "heads", "blocks"])
def average_kernel(
    table, owner, offsets, starts, sizes, shares, rows, slots, keep, gain, partials,
    task, spare, length, parameters, heads, blocks,
    ROWS: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """spare row <- keep_t * row_t + gain_t * gradient, and one sum of squares a block; without ROWS the sums alone.

    Squares are those of the values as stored. Blocks from `blocks` on are the heads': 0, or inf if one is not finite.
    """
    block = tl.program_id(0)
    if block < blocks:
        parameter = tl.load(owner + block)
        address = tl.load(table + parameter)
        if address != -1:
            offset = tl.load(offsets + block)
            size = tl.load(sizes + parameter)
            # A sum reads the gradient again, rows do not.
            new = _values(address, offset, size, KIND, ALIGNED, BLOCK, "evict_first" if ROWS else "").to(WIDE)
            if ROWS:
                inside = tl.multiple_of(offset, BLOCK) + tl.arange(0, BLOCK)
                start = tl.load(starts + parameter)
                source = tl.multiple_of(tl.load(slots + task).to(tl.int64) * length + start, 64)
                target = tl.multiple_of(tl.load(slots + spare).to(tl.int64) * length + start, 64)
                beta = tl.load(keep + task).to(WIDE)
                # A fresh average does not look at what its row holds.
                seen = tl.where(beta != 0, _padded(size), 0)
                old = tl.load(rows + source + inside, mask=inside < seen, other=0.0).to(WIDE)
                stored = _narrow(beta * old + tl.load(gain + task).to(WIDE) * new, rows.dtype.element_ty)
                tl.store(rows + target + inside, stored, mask=inside < _padded(size))
                new = stored.to(WIDE)
            tl.store(partials + block, tl.sum(new * new) * tl.load(shares + parameter))
    else:
        firsts = table + parameters + 2 * heads
        head = _head_of(block - blocks, firsts, heads)
        address = tl.load(table + parameters + head)
        if address != -1:
            offset = (block - blocks - tl.load(firsts + head)) * BLOCK
            size = tl.load(table + parameters + heads + head)
            found = _values(address, offset, size, KIND, ALIGNED, BLOCK)
            if KIND != tl.float64:
                found = found.to(tl.float32)
            strange = tl.sum((tl.abs(found) < float("inf")).to(tl.int32)) < BLOCK
            tl.store(partials + block, tl.where(strange, float("inf"), 0.0))


@triton.jit(do_not_specialize=["count"])
def total_kernel(partials, out, count, BLOCK: tl.constexpr):
    """out[0] <- the sum of the partial squares."""
    tl.store(out, _total(partials, count, BLOCK))


@triton.jit(do_not_specialize=["task", "spare", "count", "refuses"])
def accept_kernel(
    partials, usable, given, healthy, taken, squares, slots, spare, task, count, refuses, BLOCK: tl.constexpr
):
    """Where the pass counts, the spare row and the task's change places, and squares[task] is ||ema_t||^2."""
    square = _total(partials, count, BLOCK)
    ok = _verdict(square, task, usable, given, healthy, taken, refuses)
    old, new = tl.load(slots + task), tl.load(slots + spare)
    tl.store(slots + task, tl.where(ok, new, old))
    tl.store(slots + spare, tl.where(ok, old, new))
    tl.store(squares + task, tl.where(ok, square, float("nan")))


@triton.jit(do_not_specialize=["task", "count", "refuses"])
def scale_kernel(
    partials, usable, given, healthy, taken, squares, scales, unit, factors, power,
    task, count, refuses, BLOCK: tl.constexpr,
):  # fmt: skip
    """scales[task] <- factor_t * (unit / ||g_t||)**power, 0 where the pass does not count.

    `unit` is the norm of the batch's first task that counts: that task's scale is factor_t itself.
    """
    square = _total(partials, count, BLOCK)
    ok = _verdict(square, task, usable, given, healthy, taken, refuses)
    tl.store(squares + task, tl.where(ok, square, float("nan")))
    counts = ok & (square > 0)
    norm = tl.sqrt(tl.where(counts, square, 1.0))
    known = tl.load(unit)
    known = tl.where((known == 0) & counts, norm, known)
    tl.store(unit, known)
    exponent = tl.load(power)
    ratio = tl.where(counts, known / norm, 1.0)
    # Exact at the power of the method; at a ratio of 1 the other branch is exact too.
    scale = tl.where(exponent == 1, ratio, tl.exp2(exponent * tl.log2(ratio)))
    tl.store(scales + task, tl.where(counts, scale * tl.load(factors + task), 0.0))


@triton.jit(do_not_specialize=["task", "fresh"])
def add_kernel(
    table, owner, offsets, starts, sizes, total, scales, task, fresh,
    KIND: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total += scales[task] * gradient, skipped where the scale is 0; `fresh` memory holds nothing yet."""
    block = tl.program_id(0)
    parameter = tl.load(owner + block)
    address = tl.load(table + parameter)
    scale = tl.load(scales + task).to(WIDE)
    if (address != -1) & ((fresh != 0) | ((scale != 0) & (address != 0))):
        offset = tl.load(offsets + block)
        size = tl.load(sizes + parameter)
        gradient = _values(address, offset, tl.where(scale != 0, size, 0), KIND, ALIGNED, BLOCK).to(WIDE)
        inside = tl.multiple_of(offset, BLOCK) + tl.arange(0, BLOCK)
        place = total + tl.multiple_of(tl.load(starts + parameter), 64) + inside
        old = tl.load(place, mask=inside < tl.where(fresh == 0, _padded(size), 0), other=0.0)
        tl.store(place, old + scale * gradient, mask=inside < _padded(size))


@triton.jit(do_not_specialize=["tasks", "length"])
def sum_kernel(rows, slots, weights, out, tasks, length, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """out <- sum_t w_t * row_t in the order of the tasks; a row of weight 0 is not read."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    end = _padded(length)
    total = tl.zeros((BLOCK,), WIDE)
    for task in range(0, tasks):
        weight = tl.load(weights + task).to(WIDE)
        row = tl.multiple_of(tl.load(slots + task).to(tl.int64) * length, 64)
        inside = at < tl.multiple_of(tl.where(weight != 0, end, 0), 64)
        total += weight * tl.load(rows + row + at, mask=inside, other=0.0).to(WIDE)
    tl.store(out + at, _narrow(total, out.dtype.element_ty), mask=at < end)


INTERPRETED = not isinstance(sum_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 runs the kernels on a CPU. A block costs milliseconds there, whatever its size."""

# Elements a block, and numbers that one step of `_total` takes.
BLOCK = 1 << 12 if INTERPRETED else 1 << 10
SUM_BLOCK = 1 << 12 if INTERPRETED else 1 << 11
TOTAL_BLOCK = 1 << 8 if INTERPRETED else 1 << 11
