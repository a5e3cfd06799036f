"""
Triton kernels of a step over the table of table.py, whatever the number of tensors:

1. [`measure_kernel`]: moments, dot products, and AdamW's step (or SGD's) where no projection is expected;
2. [`decide_kernel`]: where to project, from the dot products of each weight;
3. [`apply_kernel`]: the projected update, and what the first kernel expected wrongly; the rest is skipped.

They execute the equations of adamp.py, sgdp.py and projection.py; tests/optim/plan_cases.py holds both equal.
"""

import triton
import triton.language as tl

from . import table
from .table import Column


# Raised with what a column, an option or an argument means, so that no kernel of the Hub from before is taken for this
VERSION = 1
INTERFACE = ("VERSION", "Column", "OPTIONS", "LEVELS", "DTYPES", "measure_kernel", "decide_kernel", "apply_kernel")
OPTIONS, LEVELS, DTYPES = table.NUM_OPTIONS, table.LEVELS, table.DTYPES


def _columns(names: str) -> list[tl.constexpr]:
    return [tl.constexpr(int(Column[name])) for name in names.split()]


# Columns of the table, of which an item is one row
WEIGHT, GRAD, FIRST, SECOND = _columns("WEIGHT GRAD FIRST SECOND")
STEP, LR, GROUP, LEVEL = _columns("STEP LR GROUP LEVEL")
FIRST_CHUNK, NUM_CHUNKS, NUM_HEAD, NUM_TAIL = _columns("FIRST_CHUNK NUM_CHUNKS NUM_HEAD NUM_TAIL")
NUM_PARTS, ROW_SIZE, NUM_ROWS, ROW_VALUES = _columns("NUM_PARTS ROW_SIZE NUM_ROWS ROW_VALUES")
SUMS, NUM_CUT, HEAD_CUT, TAIL_CUT = _columns("SUMS NUM_CUT HEAD_CUT TAIL_CUT")
NUMEL, COUNTS, WIDTH, SEED = _columns("NUMEL COUNTS WIDTH SEED")
NUM_COLUMNS = tl.constexpr(len(Column))
# Of the group_options of a group
NUM_OPTIONS = tl.constexpr(table.NUM_OPTIONS)
# Of a chunk (item, start, size, 2 * row + whether its rows are whole), and of its dot products and failing rows
CHUNK_COLUMNS, NUM_SUMS = tl.constexpr(4), tl.constexpr(5)
# Values of LEVEL; TEST and below are not known to be projected
TEST, CHANNEL, LAYER = (tl.constexpr(table.LEVELS[level]) for level in ("test", "channel", "layer"))
# Values of a mode: what the last kernel has to do, plus WAITS where the weight is still the old one
AT_LAYER, AT_CHANNEL, WAITS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)


@triton.jit
def _minus_expm1(x):
    """`1 - exp(x)` for `x` up to 0, exact for small ones too."""
    series = 1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * series)))
    return tl.where(x > -0.5, series, 1 - tl.exp(x))


@triton.jit
def _options(item, group_options, num_ahead, ADAM: tl.constexpr):
    """Of an item's group, with the bias corrections of the step `num_ahead` of the one counted."""
    row = group_options + tl.load(item + GROUP) * NUM_OPTIONS
    lr, pointer = tl.load(row), tl.load(item + LR)
    if pointer != 0:
        lr = tl.load(pointer.to(tl.pointer_type(tl.float32)))
    decay, ratio = lr * tl.load(row + 1), tl.load(row + 2)
    beta1, rest1, beta2, rest2 = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    eps, sign, nesterov = tl.load(row + 7), tl.load(row + 9), tl.load(row + 10) != 0
    inverse1, inverse_root2 = tl.full((), 1.0, tl.float32), tl.full((), 1.0, tl.float32)
    rounds, seed = tl.load(row + 14) != 0, tl.load(item + SEED)
    if ADAM:
        count = tl.load(tl.load(item + STEP).to(tl.pointer_type(tl.float32))) + num_ahead
        inverse1 = 1 / _minus_expm1(count * tl.load(row + 11))
        inverse_root2 = 1 / tl.sqrt(_minus_expm1(count * tl.load(row + 12)))
        # New at each step; a count in float32 is exact where two of them differ
        seed += count.to(tl.int64) << 32
    return lr, decay, ratio, beta1, rest1, beta2, rest2, eps, sign, nesterov, inverse1, inverse_root2, rounds, seed


@triton.jit
def _store_weight(to, value, place, mask, settings, W: tl.constexpr, ROUNDS: tl.constexpr):
    """Stores a tile, rounded to the nearest or at random; `place` in the item numbers the random numbers."""
    if ROUNDS and W == tl.bfloat16:  # noqa: SIM102, SIM300
        if settings[12]:
            # bfloat16 is the upper half of float32: a number added to the lower half carries over with the right odds
            bits = value.to(tl.uint32, bitcast=True) + (tl.randint(settings[13], place.to(tl.uint32)) & 0xFFFF)
            rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
            value = tl.where(tl.abs(value) < float("inf"), rounded, value)
    tl.store(to, value.to(W), mask=mask)


@triton.jit
def _update(g, first, second, settings, ADAM: tl.constexpr):
    _, _, _, beta1, rest1, _, _, eps, _, nesterov, inverse1, inverse_root2, _, _ = settings
    if ADAM:
        momentum = tl.where(nesterov, beta1 * first + rest1 * g, first)
        found = momentum * inverse1 / (tl.sqrt(second) * inverse_root2 + eps)
    else:
        found = tl.where(nesterov, g + beta1 * first, first)
    return found


@triton.jit
def _advance(
    at,
    start,
    place,
    valid,
    moves,
    settings,
    W: tl.constexpr,
    M: tl.constexpr,
    ADAM: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Updates the moments of a tile, and weights where it `moves`. Returns old weight, gradient and update."""
    weight, grad, exp_avg, exp_avg_sq = at
    lr, decay, _, beta1, rest1, beta2, rest2, _, sign, _, _, _, _, _ = settings
    w = tl.load(weight + place, mask=valid, other=0.0).to(tl.float32)
    g = sign * tl.load(grad + place, mask=valid, other=0.0).to(tl.float32)
    first = tl.load(exp_avg + place, mask=valid, other=0.0).to(tl.float32)
    first = (beta1 * first + rest1 * g).to(M)
    tl.store(exp_avg + place, first, mask=valid)
    # As it is stored, since the last kernel makes the update again
    first = first.to(tl.float32)
    second = first
    if ADAM:
        second = tl.load(exp_avg_sq + place, mask=valid, other=0.0).to(tl.float32)
        second = (beta2 * second + rest2 * g * g).to(M)
        tl.store(exp_avg_sq + place, second, mask=valid)
        second = second.to(tl.float32)
    u = tl.where(valid, _update(g, first, second, settings, ADAM), 0.0)
    _store_weight(weight + place, w - (decay * w + lr * u), start + place, moves, settings, W, ROUNDS)
    return w, g, u


@triton.jit
def _passes(gw, gg, ww, size, delta, eps):
    limit = delta / tl.sqrt(size.to(tl.float32))
    return tl.abs(gw) < tl.maximum(tl.sqrt(gg), eps) * tl.maximum(tl.sqrt(ww), eps) * limit


@triton.jit
def _radial(uw, ww, eps):
    norm = tl.sqrt(ww) + eps
    return uw / (norm * norm)


@triton.jit
def _is_aligned(at, start, row_size, W: tl.constexpr, G: tl.constexpr, M: tl.constexpr):
    """Whether rows begin where the widest loads may."""
    weight, grad, exp_avg, exp_avg_sq = at
    pointers = weight.to(tl.int64) | grad.to(tl.int64) | exp_avg.to(tl.int64) | exp_avg_sq.to(tl.int64)
    return ((pointers & 15) == 0) & (((start | row_size) & 7) == 0)


@triton.jit
def _pointers(item, W: tl.constexpr, G: tl.constexpr, M: tl.constexpr):
    weight = tl.load(item + WEIGHT).to(tl.pointer_type(W))
    grad = tl.load(item + GRAD).to(tl.pointer_type(G))
    exp_avg = tl.load(item + FIRST).to(tl.pointer_type(M))
    exp_avg_sq = tl.load(item + SECOND).to(tl.pointer_type(M))
    return weight, grad, exp_avg, exp_avg_sq


@triton.jit
def _moved(at, start, ALIGNED: tl.constexpr):
    weight, grad, exp_avg, exp_avg_sq = at
    weight, grad, exp_avg, exp_avg_sq = weight + start, grad + start, exp_avg + start, exp_avg_sq + start
    if ALIGNED:
        weight, grad = tl.multiple_of(weight, 16), tl.multiple_of(grad, 16)
        exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)
    return weight, grad, exp_avg, exp_avg_sq


@triton.jit
def _measure_rows(
    at, start, num_rows, row_size, out, is_whole, at_once, settings, delta, W: tl.constexpr, M: tl.constexpr,
    ADAM: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Rows one after the other, or a part of one. Returns four dot products and how many whole rows fail."""
    at, eps = _moved(at, start, ALIGNED), settings[7]
    limit = tl.where(at_once, row_size, 0)
    if ALIGNED:  # So that the compiler sees it
        row_size, limit = row_size // 8 * 8, limit // 8 * 8
    total_gw, total_gg, total_ww, total_uw, failing = 0.0, 0.0, 0.0, 0.0, 0.0
    for row in range(0, num_rows):
        gw, gg = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        ww, uw = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for column in range(0, row_size, BLOCK):
            columns = column + tl.arange(0, BLOCK)
            place = row * row_size + columns
            w, g, u = _advance(at, start, place, columns < row_size, columns < limit, settings, W, M, ADAM, ROUNDS)
            gw += g * w
            gg += g * g
            ww += w * w
            uw += u * w
        row_gw, row_gg = tl.sum(gw, axis=0), tl.sum(gg, axis=0)
        row_ww, row_uw = tl.sum(ww, axis=0), tl.sum(uw, axis=0)
        total_gw += row_gw
        total_gg += row_gg
        total_ww += row_ww
        total_uw += row_uw
        passing = _passes(row_gw, row_gg, row_ww, row_size, delta, eps)
        failing += tl.where(is_whole & (passing == 0), 1.0, 0.0)
        tl.store(out + row, _radial(row_uw, row_ww, eps), mask=is_whole)
    return total_gw, total_gg, total_ww, total_uw, failing


@triton.jit
def _measure_narrow_rows(
    at, start, num_rows, row_size, out, at_once, settings, delta, W: tl.constexpr, M: tl.constexpr,
    ADAM: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, WIDTH_OF_ROW: tl.constexpr,
):  # fmt: skip
    """As [`_measure_rows`], with whole rows of at most `WIDTH_OF_ROW` elements side by side."""
    at, eps = _moved(at, start, False), settings[7]
    limit = tl.where(at_once, row_size, 0)
    HEIGHT: tl.constexpr = BLOCK // WIDTH_OF_ROW
    columns = tl.arange(0, WIDTH_OF_ROW)[None, :]
    total_gw, total_gg = tl.zeros((HEIGHT,), tl.float32), tl.zeros((HEIGHT,), tl.float32)
    total_ww, total_uw = tl.zeros((HEIGHT,), tl.float32), tl.zeros((HEIGHT,), tl.float32)
    failing = tl.zeros((HEIGHT,), tl.float32)
    for first_row in range(0, num_rows, HEIGHT):
        rows = first_row + tl.arange(0, HEIGHT)
        is_row = rows < num_rows
        valid, moves = is_row[:, None] & (columns < row_size), is_row[:, None] & (columns < limit)
        w, g, u = _advance(at, start, rows[:, None] * row_size + columns, valid, moves, settings, W, M, ADAM, ROUNDS)
        gw, gg = tl.sum(g * w, axis=1), tl.sum(g * g, axis=1)
        ww, uw = tl.sum(w * w, axis=1), tl.sum(u * w, axis=1)
        total_gw += gw
        total_gg += gg
        total_ww += ww
        total_uw += uw
        passing = _passes(gw, gg, ww, row_size, delta, eps)
        failing += tl.where(is_row & (passing == 0), 1.0, 0.0)
        tl.store(out + rows, _radial(uw, ww, eps), mask=is_row)
    return (
        tl.sum(total_gw, axis=0), tl.sum(total_gg, axis=0), tl.sum(total_ww, axis=0), tl.sum(total_uw, axis=0),
        tl.sum(failing, axis=0),
    )  # fmt: skip


@triton.jit
def _store_sums(out, found):
    gw, gg, ww, uw, failing = found
    tl.store(out, gw)
    tl.store(out + 1, gg)
    tl.store(out + 2, ww)
    tl.store(out + 3, uw)
    tl.store(out + 4, failing)


@triton.jit
def _waits(item, was_projected, decay, rounds):
    """Whether the first kernel leaves a weight for the last: a decay by half or random rounding can't be undone."""
    level = tl.load(item + LEVEL)
    return (level > TEST) | ((level == TEST) & ((was_projected != 0) | (decay > 0.5) | rounds))


@triton.jit(do_not_specialize=["first_chunk", "last_chunk"])
def measure_kernel(
    items, group_options, chunks, was_projected, row_values, sums, is_anything_left, first_chunk, last_chunk,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ADAM: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moments, dot products, and the step of what is not expected to be projected."""
    if tl.program_id(0) == 0:
        tl.store(is_anything_left, 0)
    for chunk in range(first_chunk + tl.program_id(0), last_chunk, tl.num_programs(0)):
        record = chunks + chunk * CHUNK_COLUMNS
        index, start, size = tl.load(record), tl.load(record + 1), tl.load(record + 2).to(tl.int32)
        place = tl.load(record + 3)
        item = items + index * NUM_COLUMNS
        if tl.load(item + GRAD) != 0:
            is_whole, at = (place & 1) != 0, _pointers(item, W, G, M)
            settings = _options(item, group_options, 1, ADAM)
            delta = tl.load(group_options + tl.load(item + GROUP) * NUM_OPTIONS + 8)
            at_once = _waits(item, tl.load(was_projected + index), settings[1], settings[12]) == 0
            row_size = tl.where(is_whole, tl.load(item + ROW_SIZE), size).to(tl.int32)
            num_rows = size // row_size
            width = tl.where(is_whole, tl.load(item + WIDTH), 0)
            out, to = row_values + tl.load(item + ROW_VALUES) + (place >> 1), sums + chunk * NUM_SUMS
            if width == 0:
                if _is_aligned(at, start, row_size, W, G, M):
                    _store_sums(to, _measure_rows(
                        at, start, num_rows, row_size, out, is_whole, at_once, settings, delta, W, M, ADAM, ROUNDS,
                        BLOCK, True,
                    ))  # fmt: skip
                else:
                    _store_sums(to, _measure_rows(
                        at, start, num_rows, row_size, out, is_whole, at_once, settings, delta, W, M, ADAM, ROUNDS,
                        BLOCK, False,
                    ))  # fmt: skip
            elif width == 4:
                _store_sums(to, _measure_narrow_rows(
                    at, start, num_rows, row_size, out, at_once, settings, delta, W, M, ADAM, ROUNDS, BLOCK, 4
                ))  # fmt: skip
            elif width == 16:
                _store_sums(to, _measure_narrow_rows(
                    at, start, num_rows, row_size, out, at_once, settings, delta, W, M, ADAM, ROUNDS, BLOCK, 16
                ))  # fmt: skip
            elif width == 64:
                _store_sums(to, _measure_narrow_rows(
                    at, start, num_rows, row_size, out, at_once, settings, delta, W, M, ADAM, ROUNDS, BLOCK, 64
                ))  # fmt: skip
            else:
                _store_sums(to, _measure_narrow_rows(
                    at, start, num_rows, row_size, out, at_once, settings, delta, W, M, ADAM, ROUNDS, BLOCK, 256
                ))  # fmt: skip


@triton.jit
def _chunk_sums(sums, first, last, BLOCK: tl.constexpr):
    """Four dot products of some chunks, and their failing rows."""
    gw, gg = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    ww, uw = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    failing = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        places = start + tl.arange(0, BLOCK)
        valid, at = places < last, sums + places * NUM_SUMS
        gw += tl.load(at, mask=valid, other=0.0)
        gg += tl.load(at + 1, mask=valid, other=0.0)
        ww += tl.load(at + 2, mask=valid, other=0.0)
        uw += tl.load(at + 3, mask=valid, other=0.0)
        failing += tl.load(at + 4, mask=valid, other=0.0)
    return (
        tl.sum(gw, axis=0), tl.sum(gg, axis=0), tl.sum(ww, axis=0), tl.sum(uw, axis=0), tl.sum(failing, axis=0)
    )  # fmt: skip


@triton.jit
def _split_rows(
    item, row_values, sums, first, num_rows, first_row, delta, eps, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """Whole rows of several chunks each: writes their radial coefficients, and returns how many fail."""
    num_parts, row_size = tl.load(item + NUM_PARTS).to(tl.int32), tl.load(item + ROW_SIZE)
    out = row_values + tl.load(item + ROW_VALUES) + first_row
    failing = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        gw, gg = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        ww, uw = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        for part in range(0, num_parts, PARTS):
            parts = part + tl.arange(0, PARTS)[None, :]
            valid = (rows < num_rows)[:, None] & (parts < num_parts)
            at = sums + (first + rows[:, None] * num_parts + parts) * NUM_SUMS
            gw += tl.sum(tl.load(at, mask=valid, other=0.0), axis=1)
            gg += tl.sum(tl.load(at + 1, mask=valid, other=0.0), axis=1)
            ww += tl.sum(tl.load(at + 2, mask=valid, other=0.0), axis=1)
            uw += tl.sum(tl.load(at + 3, mask=valid, other=0.0), axis=1)
        passing = _passes(gw, gg, ww, row_size, delta, eps)
        failing += tl.where((rows < num_rows) & (passing == 0), 1.0, 0.0)
        tl.store(out + rows, _radial(uw, ww, eps), mask=rows < num_rows)
    return tl.sum(failing, axis=0)


@triton.jit
def _sum_item(item, row_values, sums, totals, delta, eps, BLOCK, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """What is added up over processes, laid out as `Weight.sums`: totals, failing rows, rows that borders cut."""
    is_active = tl.load(item + GRAD) != 0
    first, num_chunks = tl.load(item + FIRST_CHUNK).to(tl.int32), tl.load(item + NUM_CHUNKS).to(tl.int32)
    last = first + tl.where(is_active, num_chunks, 0)
    gw, gg, ww, uw, failing = _chunk_sums(sums, first, last, BLOCK)
    num_head, num_tail = tl.load(item + NUM_HEAD).to(tl.int32), tl.load(item + NUM_TAIL).to(tl.int32)
    num_parts = tl.load(item + NUM_PARTS).to(tl.int32)
    if is_active & (num_parts > 0):
        num_rows, first_row = (num_chunks - num_head - num_tail) // num_parts, (num_head > 0).to(tl.int32)
        failing += _split_rows(item, row_values, sums, first + num_head, num_rows, first_row, delta, eps, ROWS, PARTS)
    num_cut = tl.load(item + NUM_CUT).to(tl.int32)
    if num_cut > 0:
        head_cut, tail_cut = tl.load(item + HEAD_CUT).to(tl.int32), tl.load(item + TAIL_CUT).to(tl.int32)
        head = _chunk_sums(sums, first, tl.minimum(first + num_head, last), BLOCK)
        tail = _chunk_sums(sums, tl.maximum(last - num_tail, first), last, BLOCK)
        for start in range(0, num_cut, BLOCK):
            cuts = start + tl.arange(0, BLOCK)
            to = totals + 5 + cuts
            for column in tl.static_range(4):
                value = tl.where(cuts == head_cut, head[column], tl.where(cuts == tail_cut, tail[column], 0.0))
                tl.store(to + column * num_cut, value, mask=cuts < num_cut)
    return gw, gg, ww, uw, failing


@triton.jit
def _failing_cut_rows(item, row_values, totals, delta, eps, BLOCK: tl.constexpr):
    """How many of the rows that borders cut fail; writes the radial coefficients of those that are here."""
    num_cut, row_size = tl.load(item + NUM_CUT).to(tl.int32), tl.load(item + ROW_SIZE)
    head_cut, tail_cut = tl.load(item + HEAD_CUT).to(tl.int32), tl.load(item + TAIL_CUT).to(tl.int32)
    out = row_values + tl.load(item + ROW_VALUES)
    failing = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_cut, BLOCK):
        cuts = start + tl.arange(0, BLOCK)
        valid, at = cuts < num_cut, totals + 5 + cuts
        gw, gg = tl.load(at, mask=valid, other=0.0), tl.load(at + num_cut, mask=valid, other=0.0)
        ww = tl.load(at + 2 * num_cut, mask=valid, other=0.0)
        uw = tl.load(at + 3 * num_cut, mask=valid, other=0.0)
        failing += tl.where(valid & (_passes(gw, gg, ww, row_size, delta, eps) == 0), 1.0, 0.0)
        rows = tl.where(cuts == head_cut, 0, tl.load(item + NUM_ROWS) - 1)
        tl.store(out + rows, _radial(uw, ww, eps), mask=valid & ((cuts == head_cut) | (cuts == tail_cut)))
    return tl.sum(failing, axis=0)


@triton.jit
def _decide_item(
    item, index, found, decay, rounds, delta, eps, was_projected, modes, layer_values, row_values, totals, counts,
    is_anything_left, BLOCK: tl.constexpr,
):  # fmt: skip
    gw, gg, ww, uw, failing = found
    level, is_active = tl.load(item + LEVEL), tl.load(item + GRAD) != 0
    failing += _failing_cut_rows(item, row_values, totals, delta, eps, BLOCK)
    is_channel = (level == CHANNEL) | ((level == TEST) & (failing == 0))
    passing = _passes(gw, gg, ww, tl.load(item + NUMEL), delta, eps)
    is_layer = (level == LAYER) | ((level == TEST) & (failing != 0) & passing)
    mode = tl.where(is_channel, AT_CHANNEL, tl.where(is_layer, AT_LAYER, 0))
    waits = _waits(item, tl.load(was_projected + index), decay, rounds)
    tl.store(modes + index, mode + tl.where(waits, WAITS, 0), mask=is_active)
    tl.store(modes + index, 0, mask=is_active == 0)
    tl.store(was_projected + index, (mode != 0).to(tl.int32), mask=is_active)
    tl.store(is_anything_left, 1, mask=is_active & ((mode != 0) | waits))
    tl.store(layer_values + index, _radial(uw, ww, eps))
    count = counts + 2 * index
    tl.store(count, tl.load(count) + is_channel.to(tl.float32), mask=is_active)
    tl.store(count + 1, tl.load(count + 1) + is_layer.to(tl.float32), mask=is_active)


@triton.jit
def decide_kernel(
    items, group_options, was_projected, modes, layer_values, row_values, sums, totals, counts, is_anything_left,
    SUM: tl.constexpr, DECIDE: tl.constexpr, ADAM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One program for each item: `SUM` adds up what is here, `DECIDE` decides, and counts the step."""
    index = tl.program_id(0)
    item = items + index * NUM_COLUMNS
    row = group_options + tl.load(item + GROUP) * NUM_OPTIONS
    eps, delta, level = tl.load(row + 7), tl.load(row + 8), tl.load(item + LEVEL)
    if level > 0:
        to = totals + tl.load(item + SUMS)
        if SUM:
            found = _sum_item(item, row_values, sums, to, delta, eps, BLOCK, ROWS, PARTS)
            if not DECIDE:
                _store_sums(to, found)
        else:
            found = tl.load(to), tl.load(to + 1), tl.load(to + 2), tl.load(to + 3), tl.load(to + 4)
        if DECIDE:
            settings = _options(item, group_options, 1, False)
            _decide_item(
                item, index, found, settings[1], settings[12], delta, eps, was_projected, modes, layer_values,
                row_values, to, counts, is_anything_left, BLOCK,
            )  # fmt: skip
    if ADAM and DECIDE:
        is_counted = (tl.load(item + GRAD) != 0) & (tl.load(item + COUNTS) != 0)
        count = tl.load(item + STEP).to(tl.pointer_type(tl.float32))
        tl.store(count, tl.load(count) + 1, mask=is_counted)


@triton.jit
def _apply_chunk(
    at, start, size, row_size, mode, values, layer_value, settings, projects_momentum, W: tl.constexpr,
    M: tl.constexpr, ADAM: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    weight, grad, exp_avg, exp_avg_sq = _moved(at, start, ALIGNED)
    lr, decay, ratio, _, _, _, _, _, sign, nesterov, _, _, _, _ = settings
    if ALIGNED:
        size = size // 8 * 8
    is_channel, is_layer = (mode & AT_CHANNEL) != 0, (mode & AT_LAYER) != 0
    less = decay * tl.where(is_channel | is_layer, ratio, 1.0)
    # Where the gradient, each row's value and the momentum are wanted
    grad_end, value_end = tl.where(nesterov, size, 0), tl.where(is_channel, size, 0)
    momentum_end = tl.where(projects_momentum, size, 0)
    for first_place in range(0, size, BLOCK):
        place = first_place + tl.arange(0, BLOCK)
        valid = place < size
        w = tl.load(weight + place, mask=valid, other=0.0).to(tl.float32)
        g = sign * tl.load(grad + place, mask=place < grad_end, other=0.0).to(tl.float32)
        first = tl.load(exp_avg + place, mask=valid, other=0.0).to(tl.float32)
        second = first
        if ADAM:
            second = tl.load(exp_avg_sq + place, mask=valid, other=0.0).to(tl.float32)
        u = _update(g, first, second, settings, ADAM)
        # The weight before the step that the first kernel took; rounding it gives back bfloat16 as it was
        before = (w + (decay * w + lr * u) / (1 - decay)).to(W).to(tl.float32)
        w = tl.where((mode & WAITS) != 0, w, before)
        radial = tl.load(values + place // row_size, mask=place < value_end, other=0.0)
        radial = tl.where(is_layer, layer_value, radial)
        _store_weight(
            weight + place, w - (less * w + lr * (u - radial * w)), start + place, valid, settings, W, ROUNDS
        )
        if not ADAM:
            tl.store(exp_avg + place, (first - radial * w).to(M), mask=place < momentum_end)


@triton.jit(do_not_specialize=["first_chunk", "last_chunk"])
def apply_kernel(
    items, group_options, chunks, modes, layer_values, row_values, is_anything_left, first_chunk, last_chunk,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ADAM: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decay and update of the items that the decision left something to do for."""
    if tl.load(is_anything_left) != 0:
        for chunk in range(first_chunk + tl.program_id(0), last_chunk, tl.num_programs(0)):
            record = chunks + chunk * CHUNK_COLUMNS
            index = tl.load(record)
            mode = tl.load(modes + index)
            if mode != 0:
                start, size, place = tl.load(record + 1), tl.load(record + 2).to(tl.int32), tl.load(record + 3)
                item = items + index * NUM_COLUMNS
                at, settings = _pointers(item, W, G, M), _options(item, group_options, 0, ADAM)
                row = group_options + tl.load(item + GROUP) * NUM_OPTIONS
                projects_momentum = (tl.load(row + 13) != 0) & ((mode & (AT_LAYER | AT_CHANNEL)) != 0)
                row_size = tl.where((place & 1) != 0, tl.load(item + ROW_SIZE), size).to(tl.int32)
                values = row_values + tl.load(item + ROW_VALUES) + (place >> 1)
                layer_value = tl.load(layer_values + index)
                if _is_aligned(at, start, size, W, G, M):
                    _apply_chunk(
                        at, start, size, row_size, mode, values, layer_value, settings, projects_momentum, W, M, ADAM,
                        ROUNDS, BLOCK, True,
                    )  # fmt: skip
                else:
                    _apply_chunk(
                        at, start, size, row_size, mode, values, layer_value, settings, projects_momentum, W, M, ADAM,
                        ROUNDS, BLOCK, False,
                    )  # fmt: skip
