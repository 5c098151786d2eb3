"""The Triton kernels of attention; triton.py launches them.

Scores are kept in units of log2, so that exp2 serves as the exponential."""

import triton
import triton.language as tl

_FAR = tl.constexpr(2**31 - 1)
# A kernel for every size, not another for those that 16 divides; that matters for the strides of what is loaded.
_SIZES = ("GROUP", "B", "N", "T", "S", "window", "splits", "qp_b", "kp_b", "ends_b")


@triton.jit
def _narrow(a, b, c, d, e, f, x):
    """Sizes as int32 and a number as float32: AOTInductor may hand them in as int64 and float64, which would spread."""
    return (
        tl.cast(a, tl.int32),
        tl.cast(b, tl.int32),
        tl.cast(c, tl.int32),
        tl.cast(d, tl.int32),
        tl.cast(e, tl.int32),
        tl.cast(f, tl.int32),
        tl.cast(x, tl.float32),
    )


@triton.jit(do_not_specialize=_SIZES)
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, q_positions_ptr, k_positions_ptr, ends_ptr, q_b, q_n, q_t, q_h, k_b, k_k, k_s, k_h,
    v_b, v_k, v_s, v_h, out_b, out_n, out_t, out_h, qp_b, qp_t, kp_b, kp_s, ends_b, ends_t, GROUP, B, N, T, S,
    window, scale, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    V_PARTS: tl.constexpr, HAS_Q_POSITIONS: tl.constexpr, HAS_K_POSITIONS: tl.constexpr, HAS_ENDS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    GROUP, B, N, T, S, window, scale = _narrow(GROUP, B, N, T, S, window, scale)
    # The last queries have the most keys: they go first. Heads of a group run side by side and share K and V in L2.
    program = tl.program_id(0)
    part = program % V_PARTS
    n = program // V_PARTS % N
    b = (program // (V_PARTS * N) % B).to(tl.int64)
    block = tl.cdiv(T, BLOCK_M) - 1 - program // (V_PARTS * N * B)
    BLOCK_V: tl.constexpr = BLOCK_H // V_PARTS

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if HAS_Q_POSITIONS:
        at = tl.load(q_positions_ptr + b * qp_b + rows.to(tl.int64) * qp_t, rows < T, -1).to(tl.int32)
    else:
        at = tl.where(rows < T, S - T + rows, -1)
    until = at
    if HAS_ENDS:
        until = tl.load(ends_ptr + b * ends_b + rows.to(tl.int64) * ends_t, rows < T, -1)
        until = tl.where(at >= 0, tl.minimum(until, _FAR - 1).to(tl.int32), -1)
    after = tl.where(window > 0, at - window, -1)

    # Which keys some query sees: positions first .. last.
    last = tl.max(until, 0)
    first = tl.maximum(tl.min(tl.where(at >= 0, after, _FAR - 1), 0) + 1, 0)

    h = tl.arange(0, BLOCK_H)
    h_v = part * BLOCK_V + tl.arange(0, BLOCK_V)
    q_ptrs = q_ptr + b * q_b + n.to(tl.int64) * q_n + rows[:, None].to(tl.int64) * q_t + h[None, :] * q_h
    q = tl.load(q_ptrs, (rows[:, None] < T) & (h[None, :] < H), 0.0)
    k_base = k_ptr + b * k_b + (n // GROUP).to(tl.int64) * k_k
    v_base = v_ptr + b * v_b + (n // GROUP).to(tl.int64) * v_k
    kp_base = k_positions_ptr + b * kp_b if HAS_K_POSITIONS else k_positions_ptr

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if HAS_K_POSITIONS:
        start, count = _range(kp_base, kp_s, S, first, last)
        acc, m, norm = _attend(
            acc, m, norm, q, k_base, v_base, kp_base, k_s, k_h, v_s, v_h, kp_s, h, h_v, until, after, first, last,
            start, start + count, 0, 0, start + count, S, scale, H, BLOCK_N, True, True, WIDE, PRECISION,
        )  # fmt: skip
    else:
        # Every query sees all of the tiles from `whole` to `partial`, which need no mask.
        stop = tl.minimum(last + 1, S)
        start = first // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.maximum(tl.max(after, 0) + 1, 0), BLOCK_N) * BLOCK_N
        partial = tl.minimum(tl.min(tl.where(at >= 0, until, _FAR - 1), 0) + 1, stop) // BLOCK_N * BLOCK_N
        whole = tl.maximum(tl.minimum(whole, stop), start)
        partial = tl.maximum(partial, whole)
        acc, m, norm = _attend(
            acc, m, norm, q, k_base, v_base, kp_base, k_s, k_h, v_s, v_h, kp_s, h, h_v, until, after, first, last,
            whole, partial, 0, 0, stop, S, scale, H, BLOCK_N, False, False, WIDE, PRECISION,
        )  # fmt: skip
        # The tiles before them and those after, in one loop.
        before = tl.cdiv(whole - start, BLOCK_N) * BLOCK_N
        acc, m, norm = _attend(
            acc, m, norm, q, k_base, v_base, kp_base, k_s, k_h, v_s, v_h, kp_s, h, h_v, until, after, first, last,
            partial - before, stop, partial, partial - before - start, stop,
            S, scale, H, BLOCK_N, False, True, WIDE, PRECISION,
        )  # fmt: skip

    seen = (norm > 0) & (at >= 0)
    acc = tl.where(seen[:, None], acc / tl.where(seen, norm, 1.0)[:, None], 0.0)
    out_ptrs = out_ptr + b * out_b + n.to(tl.int64) * out_n + rows[:, None].to(tl.int64) * out_t + h_v[None, :] * out_h
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), (rows[:, None] < T) & (h_v[None, :] < H))


@triton.jit
def _attend(
    acc, m, norm, q, k_base, v_base, kp_base, k_s, k_h, v_s, v_h, kp_s, h, h_v, until, after, first, last,
    start, end, turn, jump, stop, S, scale,
    H: tl.constexpr, BLOCK_N: tl.constexpr, POSITIONS: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the tiles from start to end to the sums; those before `turn` are `jump` keys further back.

    Keys from `stop` on are none. With POSITIONS, indices from S on begin again at 0."""
    i = tl.arange(0, BLOCK_N)
    for at in range(start, end, BLOCK_N):
        s = at
        if MASKED and not POSITIONS:
            s = tl.where(at < turn, at - jump, at)
        key = s + i
        position = key
        seen = (key >= first) & (key < stop)
        if POSITIONS:
            slot = tl.where(key >= S, key - S, key).to(tl.int64)
            position = tl.load(kp_base + slot * kp_s, key < stop, -1).to(tl.int32)
            seen = (position >= first) & (position <= last)
            k_ptrs = k_base + slot[:, None] * k_s + h[None, :] * k_h
            v_ptrs = v_base + slot[:, None] * v_s + h_v[None, :] * v_h
        else:
            row = i.to(tl.int64) if WIDE else i
            k_ptrs = k_base + tl.cast(s, tl.int64) * k_s + (row[:, None] * k_s + h[None, :] * k_h)
            v_ptrs = v_base + tl.cast(s, tl.int64) * v_s + (row[:, None] * v_s + h_v[None, :] * v_h)
        if MASKED:
            k = tl.load(k_ptrs, seen[:, None] & (h[None, :] < H), 0.0)
            v = tl.load(v_ptrs, seen[:, None] & (h_v[None, :] < H), 0.0)
        elif h.shape[0] != H:
            k = tl.load(k_ptrs, h[None, :] < H, 0.0)
            v = tl.load(v_ptrs, h_v[None, :] < H, 0.0)
        else:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            visible = seen[None, :] & (position[None, :] <= until[:, None]) & (position[None, :] > after[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1) * scale)
        top = m_new
        if MASKED:
            top = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores * scale - top[:, None])
        correction = tl.exp2(m - top)
        norm = norm * correction + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
        m = m_new
    return acc, m, norm


@triton.jit
def _range(positions, stride, S, first, last):
    """The smallest stretch of key indices (start, count) that holds all positions first .. last; it may run over the
    end and go on at 0, as in a ring."""
    SCAN: tl.constexpr = 1024
    total, low, high, low_gap, high_gap = 0, S, -1, S, -1
    for s in range(0, S, SCAN):
        i = s + tl.arange(0, SCAN)
        position = tl.load(positions + i.to(tl.int64) * stride, i < S, -1)
        seen = (position >= first) & (position <= last)
        gap = (i < S) & (seen == 0)
        total += tl.sum(seen.to(tl.int32), 0)
        low = tl.minimum(low, tl.min(tl.where(seen, i, S), 0))
        high = tl.maximum(high, tl.max(tl.where(seen, i, -1), 0))
        low_gap = tl.minimum(low_gap, tl.min(tl.where(gap, i, S), 0))
        high_gap = tl.maximum(high_gap, tl.max(tl.where(gap, i, -1), 0))
    wrapped = (total < S) & (low_gap + S - 1 - high_gap == total)
    start = tl.where(wrapped, high_gap + 1, low)
    return start, tl.where(wrapped, total, tl.maximum(high + 1 - low, 0))


@triton.jit(do_not_specialize=_SIZES)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, workspace_ptr, length_ptr, q_positions_ptr, k_positions_ptr, q_b, q_n, q_t, q_h, k_b, k_k,
    k_s, k_h, v_b, v_k, v_s, v_h, length_b, qp_b, qp_t, kp_b, kp_s, scale, GROUP, T, S, window, splits,
    H: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_K_POSITIONS: tl.constexpr,
    EARLY: tl.constexpr, HAS_Q_POSITIONS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    GROUP, splits, _, T, S, window, scale = _narrow(GROUP, splits, 1, T, S, window, scale)
    split, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    # Row r is query r % T of the group's head r // T.
    r, h, i = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    n = (head * GROUP + r // T).to(tl.int64)
    q_ptrs = q_ptr + b * q_b + n[:, None] * q_n + (r % T)[:, None] * q_t + h[None, :] * q_h
    q = tl.load(q_ptrs, (r[:, None] < GROUP * T) & (h[None, :] < H), 0.0)
    length = tl.load(length_ptr + b * length_b) if HAS_LENGTH else S
    start, count, share = _share(length, T, S, window, splits, BLOCK_N, HAS_K_POSITIONS)
    stop = tl.minimum(split * share + share, count)
    if split * share < stop:
        if HAS_Q_POSITIONS:
            at = tl.load(q_positions_ptr + b * qp_b + (r % T).to(tl.int64) * qp_t, r < GROUP * T, -1).to(tl.int32)
        else:
            at = tl.where(r < GROUP * T, length - T + r % T, -1)
        after = tl.where(window > 0, at - window, -1)
        last = tl.max(at, 0)
        first = tl.maximum(tl.min(tl.where(at >= 0, after, _FAR - 1), 0) + 1, 0)
        # Slots up to the newest hold positions of this lap of the ring, the others of the one before.
        newest = (length - 1) % S
        lap = length - 1 - newest
        row = i.to(tl.int64) if WIDE else i
        k_base = k_ptr + b * k_b + head.to(tl.int64) * k_k
        v_base = v_ptr + b * v_b + head.to(tl.int64) * v_k
        k_offsets = row[:, None] * k_s + h[None, :] * k_h
        v_offsets = row[:, None] * v_s + h[None, :] * v_h

        m = tl.full([BLOCK_R], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        tiles = tl.cdiv(S, BLOCK_N)
        for t in range(split * share, stop):
            tile = start + t
            tile = tl.where(tile >= tiles, tile - tiles, tile) * BLOCK_N
            slot = tile + i
            if HAS_K_POSITIONS:
                position = tl.load(k_positions_ptr + b * kp_b + slot.to(tl.int64) * kp_s, slot < S, -1).to(tl.int32)
            else:
                position = tl.where(slot < S, lap + tl.where(slot > newest, slot - S, slot), -1)
            seen = (position >= first) & (position <= last)
            mask = seen[:, None]
            if H != BLOCK_H:
                mask = mask & (h[None, :] < H)
            k = tl.load(k_base + tile.to(tl.int64) * k_s + k_offsets, mask, 0.0)
            v = tl.load(v_base + tile.to(tl.int64) * v_s + v_offsets, mask, 0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            visible = seen[None, :] & (position[None, :] <= at[:, None]) & (position[None, :] > after[:, None])
            scores = tl.where(visible, scores * scale, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, 1))
            top = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(scores - top[:, None])
            correction = tl.exp2(m - top)
            norm = norm * correction + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
            m = m_new

        row = ((b * tl.num_programs(1) + head) * splits + split) * (GROUP * T) + r
        rows = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * splits * (GROUP * T)
        sums = workspace_ptr + row[:, None] * H + h[None, :]
        tl.store(sums, acc, (r[:, None] < GROUP * T) & (h[None, :] < H))
        tl.store(workspace_ptr + rows * H + row, m, r < GROUP * T)
        tl.store(workspace_ptr + rows * (H + 1) + row, norm, r < GROUP * T)


@triton.jit
def _share(length, T, S, window, splits, BLOCK_N: tl.constexpr, HAS_K_POSITIONS: tl.constexpr):
    """Of the tiles of slots: the first and how many to read, going round the ring, and how many each split takes."""
    tiles = tl.cdiv(S, BLOCK_N)
    if HAS_K_POSITIONS:
        start = 0
        count = tiles
    else:
        # A ring of S slots has lost what came before its last S positions.
        first = tl.where(window > 0, tl.maximum(length - T - window + 1, 0), 0)
        first = tl.maximum(first, length - S) % S
        newest = (length - 1) % S
        start = first // BLOCK_N
        count = newest // BLOCK_N - start + 1 + tl.where(first > newest, tiles, 0)
        count = tl.where(length > 0, tl.minimum(count, tiles), 0)
    return start, count, tl.cdiv(count, splits)


@triton.jit(do_not_specialize=_SIZES)
def combine_kernel(
    workspace_ptr, out_ptr, length_ptr, out_b, out_n, out_t, out_h, length_b, GROUP, T, S, window, splits,
    H: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LENGTH: tl.constexpr,
    HAS_K_POSITIONS: tl.constexpr, EARLY: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    GROUP, splits, _, T, S, window, _ = _narrow(GROUP, splits, 1, T, S, window, 1.0)
    r, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) // PARTS
    h = tl.program_id(1) % PARTS * BLOCK_H + tl.arange(0, BLOCK_H)
    length = tl.load(length_ptr + b * length_b) if HAS_LENGTH else S
    _, count, share = _share(length, T, S, window, splits, BLOCK_N, HAS_K_POSITIONS)
    used = tl.cdiv(count, tl.maximum(share, 1))
    heads = tl.num_programs(1) // PARTS
    rows = tl.num_programs(2).to(tl.int64) * heads * splits * (GROUP * T)
    if EARLY:
        tl.extra.cuda.gdc_wait()

    m = float("-inf")
    norm = 0.0
    acc = tl.zeros([BLOCK_H], tl.float32)
    for s in range(0, used, BLOCK_S):
        split = s + tl.arange(0, BLOCK_S)
        row = ((b * heads + head) * splits + split) * (GROUP * T) + r
        tops = tl.load(workspace_ptr + rows * H + row, split < used, float("-inf"))
        norms = tl.load(workspace_ptr + rows * (H + 1) + row, split < used, 0.0)
        sums = workspace_ptr + row[:, None] * H + h[None, :]
        sums = tl.load(sums, (split[:, None] < used) & (h[None, :] < H), 0.0)
        m_new = tl.maximum(m, tl.max(tops, 0))
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        weights = tl.exp2(tops - top)
        correction = tl.exp2(m - top)
        norm = norm * correction + tl.sum(norms * weights, 0)
        acc = acc * correction + tl.sum(sums * weights[:, None], 0)
        m = m_new
    acc = tl.where(norm > 0, acc / tl.where(norm > 0, norm, 1.0), 0.0)
    n, t = (head * GROUP + r // T).to(tl.int64), r % T
    out_ptrs = out_ptr + b * out_b + n * out_n + t * out_t + h * out_h
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), h < H)
