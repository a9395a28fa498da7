# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels behind ``fused.py``. Imported only where they are launched: importing this file imports Triton.

Scores are kept in base 2: ``scale`` comes multiplied by log2(e). ``WIDEN`` is for Triton's interpreter, which multiplies the bit
patterns of bfloat16 as if they were integers; a product of two such numbers is exact in float32."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
BOOL_MASK = tl.constexpr(1)
FLOAT_MASK = tl.constexpr(2)
# other lengths, words or heads are no reason to compile again
_SIZES = ["heads", "queries", "keys", "groups", "selector_b", "mask_b", "mask_h", "mask_q"]


@triton.jit
def _scores(
    query,  # [BM, BD] of one head
    key,  # pointer to [Tk, DIM] of one head
    key_stride,
    mask,  # pointer to [Tq, Tk] of one head
    mask_q,
    mask_k,
    at,  # [BM] queries
    to,  # [BN] keys
    queries,
    keys,
    scale,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Masked scores [BM, BN] of a block of queries and keys, −inf where a key is not seen."""
    inner = tl.arange(0, BD)
    turned = tl.load(
        key + to.to(tl.int64)[None, :] * key_stride + inner[:, None],
        mask=(to[None, :] < keys) & (inner[:, None] < DIM),
        other=0.0,
    )
    if WIDEN:
        query, turned = query.to(tl.float32), turned.to(tl.float32)
    scores = tl.dot(query, turned, input_precision=PRECISION).to(tl.float32) * scale
    seen = (to[None, :] < keys) & (at[:, None] < queries)
    if MASK != 0:
        place = mask + at.to(tl.int64)[:, None] * mask_q + to.to(tl.int64)[None, :] * mask_k
        if MASK == BOOL_MASK:
            seen = seen & (tl.load(place, mask=seen, other=0) != 0)
        else:
            scores += tl.load(place, mask=seen, other=0.0).to(tl.float32) * LOG2_E
    if CAUSAL:
        seen = seen & (to[None, :] <= at[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit(do_not_specialize=_SIZES)
def pool(
    query,
    key,
    value,
    output,
    selector,
    mask,
    pooled,
    normaliser,
    extremes,
    query_b,
    query_h,
    query_t,
    key_b,
    key_h,
    key_t,
    value_b,
    value_h,
    value_t,
    output_b,
    output_h,
    output_t,
    selector_b,
    mask_b,
    mask_h,
    mask_q,
    mask_k,
    heads,
    queries,
    keys,
    groups,
    scale,
    weight,
    REPEAT: tl.constexpr,
    HEADS: tl.constexpr,
    POOL: tl.constexpr,
    NORMALISER: tl.constexpr,
    CHECK: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BG: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attention pooled over groups of keys, summed over ``HEADS`` heads with one weight; the normaliser of every row; the
    largest error of the check column and the largest output.

    One program: ``BM`` queries of ``HEADS`` heads of one row. ``pooled`` [batch, parts, Tq, groups], ``normaliser`` [batch,
    heads, Tq] (log2 of the sum of powers), ``extremes`` [2]; contiguous, float32.
    """
    row = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    inner = tl.arange(0, BD)
    group = tl.arange(0, BG)
    exists = at < queries
    there = at.to(tl.int64)
    total = tl.zeros([BM, BG], tl.float32)
    worst = tl.zeros([BM], tl.float32)
    largest = tl.zeros([BM], tl.float32)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tl.program_id(0) + 1) * BM)
    for local in range(HEADS):
        head = (part * HEADS + local).to(tl.int64)
        if head < heads:
            of_query = query + row * query_b + head * query_h
            of_key = key + row * key_b + (head // REPEAT) * key_h
            of_value = value + row * value_b + (head // REPEAT) * value_h
            block = tl.load(
                of_query + there[:, None] * query_t + inner[None, :],
                mask=exists[:, None] & (inner[None, :] < DIM),
                other=0.0,
            )
            top = tl.full([BM], float("-inf"), tl.float32)
            mass = tl.zeros([BM], tl.float32)
            sums = tl.zeros([BM, BG], tl.float32)
            column = tl.zeros([BM], tl.float32)
            for start in range(0, end, BN):
                to = start + tl.arange(0, BN)
                scores = _scores(
                    block,
                    of_key,
                    key_t,
                    mask + row * mask_b + head * mask_h,
                    mask_q,
                    mask_k,
                    at,
                    to,
                    queries,
                    keys,
                    scale,
                    MASK,
                    CAUSAL,
                    DIM,
                    BD,
                    PRECISION,
                    WIDEN,
                )
                raised = tl.maximum(top, tl.max(scores, 1))
                # a row that has seen no key so far
                base = tl.where(raised == float("-inf"), 0.0, raised)
                powers = tl.exp2(scores - base[:, None])
                shrink = tl.exp2(top - base)
                mass = mass * shrink + tl.sum(powers, 1)
                if POOL:
                    columns = tl.load(
                        selector + row * selector_b + to.to(tl.int64)[:, None] * groups + group[None, :],
                        mask=(to[:, None] < keys) & (group[None, :] < groups),
                        other=0.0,
                    )
                    sums = sums * shrink[:, None] + tl.dot(powers, columns, input_precision="ieee")
                if CHECK:
                    values = tl.load(of_value + to.to(tl.int64) * value_t, mask=to < keys, other=0.0).to(tl.float32)
                    column = column * shrink + tl.sum(powers * values[None, :], 1)
                top = raised
            # 0 for a row without a key, as SDPA has it; NaN stays
            share = tl.where(mass == 0.0, 0.0, 1.0 / tl.where(mass == 0.0, 1.0, mass))
            if POOL:
                total += sums * (share * weight)[:, None]
            if NORMALISER:
                # +inf makes every power of an empty row 0
                level = tl.where(mass == 0.0, float("inf"), top + tl.log2(tl.where(mass == 0.0, 1.0, mass)))
                tl.store(normaliser + (row * heads + head) * queries + there, level, mask=exists)
            if CHECK:
                theirs = tl.load(output + row * output_b + head * output_h + there * output_t, mask=exists, other=0.0)
                theirs = theirs.to(tl.float32)
                # what the model itself made non-finite does not count
                counts = exists & (tl.abs(theirs) < float("inf"))
                error = tl.abs(column * share - theirs)
                error = tl.where(error == error, error, float("inf"))
                worst = tl.maximum(worst, tl.where(counts, error, 0.0))
                largest = tl.maximum(largest, tl.where(counts, tl.abs(theirs), 0.0))
    if POOL:
        parts = tl.num_programs(1)
        place = pooled + ((row * parts + part) * queries + there[:, None]) * groups + group[None, :]
        tl.store(place, total, mask=exists[:, None] & (group[None, :] < groups))
    if CHECK:
        tl.atomic_max(extremes, tl.max(worst, 0))
        tl.atomic_max(extremes + 1, tl.max(largest, 0))


@triton.jit(do_not_specialize=[name for name in _SIZES if name not in ("groups", "selector_b")])
def receive(
    query,
    key,
    mask,
    normaliser,
    received,
    query_b,
    query_h,
    query_t,
    key_b,
    key_h,
    key_t,
    mask_b,
    mask_h,
    mask_q,
    mask_k,
    heads,
    queries,
    keys,
    scale,
    weight,
    REPEAT: tl.constexpr,
    HEADS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Sums over queries of every key's column, over ``HEADS`` heads with one weight, from the normalisers of the rows.

    One program: ``BN`` keys of ``HEADS`` heads of one row. ``received`` [batch, parts, Tk] float32.
    """
    row = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    to = tl.program_id(0) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BD)
    total = tl.zeros([BN], tl.float32)
    begin = 0
    if CAUSAL:
        begin = (tl.program_id(0) * BN // BM) * BM
    for local in range(HEADS):
        head = (part * HEADS + local).to(tl.int64)
        if head < heads:
            of_query = query + row * query_b + head * query_h
            of_key = key + row * key_b + (head // REPEAT) * key_h
            for start in range(begin, queries, BM):
                at = start + tl.arange(0, BM)
                exists = at < queries
                block = tl.load(
                    of_query + at.to(tl.int64)[:, None] * query_t + inner[None, :],
                    mask=exists[:, None] & (inner[None, :] < DIM),
                    other=0.0,
                )
                level = tl.load(normaliser + (row * heads + head) * queries + at, mask=exists, other=float("inf"))
                scores = _scores(
                    block,
                    of_key,
                    key_t,
                    mask + row * mask_b + head * mask_h,
                    mask_q,
                    mask_k,
                    at,
                    to,
                    queries,
                    keys,
                    scale,
                    MASK,
                    CAUSAL,
                    DIM,
                    BD,
                    PRECISION,
                    WIDEN,
                )
                total += tl.sum(tl.exp2(scores - level[:, None]), 0)
    parts = tl.num_programs(1)
    tl.store(received + (row * parts + part) * keys + to, total * weight, mask=to < keys)
