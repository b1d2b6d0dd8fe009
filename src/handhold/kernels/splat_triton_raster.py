"""Triton kernels of the per-tile stage: lists of Gaussians per tile, alpha compositing, gradients to slots.

A program draws one tile of TX x TY pixels, the pixels being its vector, and walks the tile's Gaussians in depth order
(Kerbl et al. 2023). Each (Gaussian, tile) pair has a slot of its own in Gaussian order: the backward pass writes its
sums there and a second kernel adds up each Gaussian's run of slots: no atomics, and every sum has one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEAR = tl.constexpr(0.01)  # metres
ALPHA_MAX = tl.constexpr(0.999)
STOP = tl.constexpr(1e-4)


@triton.jit
def _count_below(sorted_values, limit, length, steps, valid):
    """Number of sorted values < limit, per lane; `steps` halvings of an interval of `length`."""
    lo = limit.to(tl.int32) * 0
    hi = lo + length
    while steps > 0:  # not range(): the interpreter cannot count to a run-time number with numpy >= 2.4
        mid = lo + (hi - lo) // 2  # their sum may pass 2^31
        open = valid & (lo < hi)
        right = open & (tl.load(sorted_values + mid, open, 0).to(tl.int64) < limit)
        hi = tl.where(open & ~right, mid, hi)
        lo = tl.where(right, mid + 1, lo)
        steps -= 1
    return lo


@triton.jit
def _least_on_edge(p, lo, hi, a, b, c):
    """Least of (a p^2 + c q^2) / 2 + b p q for q in [lo, hi]."""
    q = tl.minimum(tl.maximum(-b * p / c, lo), hi)
    return p * (0.5 * a * p + b * q) + 0.5 * c * q * q


@triton.jit
def _reaches(row, used, tile_x, tile_y, TX: tl.constexpr, TY: tl.constexpr):
    """Whether the ellipse sigma <= ln(255 opacity) meets the rectangle of the tile's pixel centres."""
    a, b, c = tl.load(row + 2, used, 1.0), tl.load(row + 3, used, 0.0), tl.load(row + 4, used, 1.0)
    x0 = tile_x.to(tl.float32) * TX + 0.5 - tl.load(row, used, 0.0)
    y0 = tile_y.to(tl.float32) * TY + 0.5 - tl.load(row + 1, used, 0.0)
    x1, y1 = x0 + (TX - 1), y0 + (TY - 1)
    nearest_x, nearest_y = tl.minimum(tl.maximum(0.0, x0), x1), tl.minimum(tl.maximum(0.0, y0), y1)
    # sigma is convex: from a centre outside, the nearest point lies on an edge that faces it.
    on_x, on_y = _least_on_edge(nearest_x, y0, y1, a, b, c), _least_on_edge(nearest_y, x0, x1, c, b, a)
    least = tl.minimum(tl.where(nearest_x != 0, on_x, float("inf")), tl.where(nearest_y != 0, on_y, float("inf")))
    least = tl.where((nearest_x == 0) & (nearest_y == 0), 0.0, least)
    return ~(least > tl.load(row + 6, used, 0.0) * 1.0001 + 1e-4)  # rounding may only let too much through


@triton.jit(do_not_specialize=["count", "capacity", "steps", "n_tiles", "tiles_x"])
def emit(
    order, ends, box, record, slot_tile, slot_owner, count, capacity, steps, n_tiles, tiles_x,
    ROW: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr, DISK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile and owner of each slot, Gaussians in depth order.

    A slot past the last one, or of a tile in the box that the ellipse misses, gets tile n_tiles: it is sorted to the
    end and never drawn.
    """
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = j < capacity
    rank = _count_below(ends, j + 1, count, steps, valid)
    used = valid & (rank < count)
    n = tl.load(order + rank, used, 0)
    first = tl.load(ends + rank - 1, used & (rank > 0), 0)
    x0, y0, x1 = tl.load(box + 4 * n, used, 0), tl.load(box + 4 * n + 1, used, 0), tl.load(box + 4 * n + 2, used, 1)
    local, across = (j - first).to(tl.int32), tl.maximum(x1 - x0, 1)
    tile_x, tile_y = x0 + local % across, y0 + local // across
    drawn = used
    if not DISK:
        drawn = used & _reaches(record + n * ROW, used, tile_x, tile_y, TX, TY)
    tile = tl.where(drawn, tile_y * tiles_x + tile_x, n_tiles)
    tl.store(slot_tile + j, tile.to(slot_tile.dtype.element_ty), valid)
    tl.store(slot_owner + j, n.to(tl.int32), valid)


@triton.jit(do_not_specialize=["capacity", "steps", "n_tiles"])
def gather(
    sorted_tile, slot, slot_owner, record, drawn, owner, start, capacity, steps, n_tiles,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Records in drawing order, so that the raster loops read straight on; and where each tile's begin."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_tile = i <= n_tiles
    tl.store(start + i, _count_below(sorted_tile, i, capacity, steps, is_tile), is_tile)
    valid = i < capacity
    n = tl.load(slot_owner + tl.load(slot + i, valid, 0), valid, 0).to(tl.int64)
    tl.store(owner + i, n.to(tl.int32), valid)
    column = tl.arange(0, ROW)
    valid = valid & (tl.load(sorted_tile + i, valid, 0).to(tl.int32) < n_tiles)
    row = tl.load(record + n[:, None] * ROW + column[None, :], valid[:, None], 0.0)
    tl.store(drawn + i[:, None] * ROW + column[None, :], row, valid[:, None])


@triton.jit
def _read(row, here, FIELDS: tl.constexpr):
    """The first FIELDS floats of a record; where it is not `here`, one that reaches no pixel (ln(255 opacity) = -1)."""
    fields = (tl.load(row, here, 0.0),)
    for i in tl.static_range(1, FIELDS):
        fields = fields + (tl.load(row + i, here, -1.0 if i == 6 else 0.0),)
    return fields


@triton.jit
def _part(fields, first: tl.constexpr, N: tl.constexpr):
    out = ()
    for i in tl.static_range(N):
        out = out + (fields[first + i],)
    return out


@triton.jit
def _zeros(like, N: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (like * 0.0,)
    return out


@triton.jit
def _meet(r, dx, dy, at: tl.constexpr):
    """Whether the pixel's ray meets the disk rather than its low-pass filter; sigma, u, v, camera z, 1 / cz."""
    inv = 1.0 / (r[2] + r[3] * dx + r[4] * dy)
    u, v, z = (r[at] * dx + r[at + 1] * dy) * inv, (r[at + 2] * dx + r[at + 3] * dy) * inv, r[at + 4] * inv
    near, flat = u * u + v * v, 2.0 * (dx * dx + dy * dy)
    met = (z >= NEAR) & (near <= flat)  # false where cz is 0
    return met, 0.5 * tl.where(met, near, flat), u, v, z, inv


@triton.jit
def _evaluate(r, dx, dy, F: tl.constexpr, DISK: tl.constexpr):
    """sigma, where alpha = opacity exp(-sigma), and the camera z that is seen."""
    if DISK:
        met, sigma, u, v, z, inv = _meet(r, dx, dy, 12 + F)
        z = tl.where(met, z, r[7])
    else:
        sigma = dx * (0.5 * r[2] * dx + r[3] * dy) + 0.5 * r[4] * dy * dy
        z = r[7]
    return sigma, z


@triton.jit
def _put(row, column, at: tl.constexpr, x):
    return tl.where(column == at, tl.sum(x), row)


@triton.jit
def _accumulate(acc, w, z, r, F: tl.constexpr, IDS: tl.constexpr):
    """acc + w * [rgb, depth, features, one-hot body] of record r."""
    out = (acc[0] + w * r[8], acc[1] + w * r[9], acc[2] + w * r[10], acc[3] + w * z)
    for i in tl.static_range(F):
        out = out + (acc[4 + i] + w * r[12 + i],)
    for i in tl.static_range(IDS):
        out = out + (acc[4 + F + i] + tl.where(r[11] == i, w, 0.0),)
    return out


@triton.jit
def _pixels(tile, tiles_x, width, height, TX: tl.constexpr, TY: tl.constexpr):
    p = tl.arange(0, TX * TY)
    px, py = (tile % tiles_x) * TX + p % TX, (tile // tiles_x) * TY + p // TX
    inside = (px < width) & (py < height)
    return px.to(tl.float32) + 0.5, py.to(tl.float32) + 0.5, inside, py.to(tl.int64) * width + px


@triton.jit(do_not_specialize=["count", "capacity", "tiles_x"])
def raster_forward(
    drawn, owner, start, ends, out, alpha, final_T, last, median, count, capacity, width, height, tiles_x,
    F: tl.constexpr, IDS: tl.constexpr, ROW: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr, UNROLL: tl.constexpr,
    DISK: tl.constexpr,
):  # fmt: skip
    """Images, and for the way back final_T (H,W) and last (H,W): the rank of the last Gaussian drawn.

    When there were more intersections than `capacity` the image is NaN, not silently incomplete.
    """
    CHANNELS: tl.constexpr = 4 + F + IDS
    FIELDS: tl.constexpr = 12 + F + (5 if DISK else 0)
    tile = tl.program_id(0)
    x, y, inside, pixel = _pixels(tile, tiles_x, width, height, TX, TY)
    s, e = tl.load(start + tile), tl.load(start + tile + 1)
    T = x * 0.0 + 1.0
    acc = _zeros(x, CHANNELS)
    alive = inside
    rank_last = (x * 0.0).to(tl.int32)
    rank_half = rank_last
    k = s
    going = e - s
    while going > 0:
        g = ()
        for u in tl.static_range(UNROLL):  # all loads first: one wait for memory instead of UNROLL
            g = g + _read(drawn + (k + u).to(tl.int64) * ROW, k + u < e, FIELDS)
        for u in tl.static_range(UNROLL):
            r = _part(g, u * FIELDS, FIELDS)
            dx, dy = x - r[0], y - r[1]
            sigma, z = _evaluate(r, dx, dy, F, DISK)
            hit = alive & (sigma >= 0) & (sigma <= r[6])
            a = tl.minimum(r[5] * tl.exp(-sigma), ALPHA_MAX)
            after = T * (1.0 - a)
            stop = hit & (after <= STOP)  # the Gaussian that would bring T to 1e-4 is not drawn, nor any behind it
            alive = alive & ~stop
            hit = hit & ~stop
            acc = _accumulate(acc, tl.where(hit, a * T, 0.0), z, r, F, IDS)
            rank_last = tl.where(hit, k + u - s + 1, rank_last)
            rank_half = tl.where(hit & (T > 0.5) & (after <= 0.5), k + u - s + 1, rank_half)
            T = tl.where(hit, after, T)
        k += UNROLL
        going = tl.where(k < e, tl.max(alive.to(tl.int32)), 0)
    complete = tl.load(ends + count - 1) <= capacity
    for c in tl.static_range(CHANNELS):
        tl.store(out + pixel * CHANNELS + c, tl.where(complete, acc[c], float("nan")), inside)
    tl.store(alpha + pixel, tl.where(complete, 1.0 - T, float("nan")), inside)
    tl.store(final_T + pixel, T, inside)
    tl.store(last + pixel, rank_last, inside)
    half = inside & (rank_half > 0)
    tl.store(median + pixel, tl.load(owner + (s + rank_half - 1).to(tl.int64), half, -1), inside)


@triton.jit
def _load_pixel(v_out, pixel, inside, CHANNELS: tl.constexpr):
    v = ()
    for c in tl.static_range(CHANNELS):
        v = v + (tl.load(v_out + pixel * CHANNELS + c, inside, 0.0),)
    return v


@triton.jit
def _disk_sums(row, column, r, dx, dy, q, vz, F: tl.constexpr):
    """Gradients, by -q = dL/dsigma and vz = dL/dz, of nu, nv, cz (each also times dx and dy), z D, and x, y, depth."""
    met, sigma, u, v, z, inv = _meet(r, dx, dy, 12 + F)
    inv, u, v, z = tl.where(met, inv, 0.0), tl.where(met, u, 0.0), tl.where(met, v, 0.0), tl.where(met, z, 0.0)
    zm = tl.where(met, vz, 0.0)
    nu, nv = -q * u * inv, -q * v * inv
    cz = -(nu * u + nv * v + zm * z * inv)
    row = _put(row, column, 4, nu)
    row = _put(row, column, 5, nu * dx)
    row = _put(row, column, 6, nu * dy)
    row = _put(row, column, 7, nv)
    row = _put(row, column, 8, nv * dx)
    row = _put(row, column, 9, nv * dy)
    row = _put(row, column, 10, cz)
    row = _put(row, column, 11, cz * dx)
    row = _put(row, column, 12, cz * dy)
    row = _put(row, column, 13, zm * inv)
    filtered = tl.where(met, 0.0, 2.0 * q)  # the filter's sigma is dx^2 + dy^2, and dx = pixel - x
    row = _put(row, column, 14, filtered * dx)
    row = _put(row, column, 15, filtered * dy)
    return _put(row, column, 16, vz - zm)


@triton.jit(do_not_specialize=["tiles_x"])
def raster_backward(
    drawn, slot, start, v_out, v_alpha, final_T, last, slots, width, height, tiles_x,
    F: tl.constexpr, IDS: tl.constexpr, ROW: tl.constexpr, SLOT: tl.constexpr,
    TX: tl.constexpr, TY: tl.constexpr, UNROLL: tl.constexpr, DISK: tl.constexpr,
):  # fmt: skip
    """Back to front; adds nothing, writes one row of slots (capacity,SLOT, zero before) per Gaussian that was drawn.

    Columns: dL/d rgb; dL/d opacity = sum q, q = exp(-sigma) dL/d alpha; then sums of q dx, q dy, q dx^2, q dx dy,
    q dy^2 and dL/d depth, or those of `_disk_sums`; then features.
    """
    CHANNELS: tl.constexpr = 4 + F + IDS
    FIELDS: tl.constexpr = 12 + F + (5 if DISK else 0)
    tile = tl.program_id(0)
    x, y, inside, pixel = _pixels(tile, tiles_x, width, height, TX, TY)
    s = tl.load(start + tile)
    V = _load_pixel(v_out, pixel, inside, CHANNELS)
    T = tl.load(final_T + pixel, inside, 1.0)
    rank_last = tl.load(last + pixel, inside, 0)
    behind = -T * tl.load(v_alpha + pixel, inside, 0.0)  # of what lies behind: weight * (its channels . dL/dchannels)
    column = tl.arange(0, SLOT)
    k = s + tl.max(rank_last) - 1
    while k >= s:
        g = ()
        for u in tl.static_range(UNROLL):
            g = g + _read(drawn + (k - u).to(tl.int64) * ROW, k - u >= s, FIELDS)
        for u in tl.static_range(UNROLL):
            r = _part(g, u * FIELDS, FIELDS)
            dx, dy = x - r[0], y - r[1]
            sigma, z = _evaluate(r, dx, dy, F, DISK)
            hit = (rank_last >= k - u - s + 1) & (sigma >= 0) & (sigma <= r[6])
            if tl.max(hit.to(tl.int32)) > 0:
                visible = tl.exp(-sigma)
                raw = r[5] * visible
                a = tl.where(hit, tl.minimum(raw, ALPHA_MAX), 0.0)
                inv = 1.0 / (1.0 - a)
                T = T * inv
                w = a * T
                dot = V[0] * r[8] + V[1] * r[9] + V[2] * r[10] + V[3] * z
                for i in tl.static_range(F):
                    dot += V[4 + i] * r[12 + i]
                for i in tl.static_range(IDS):
                    dot += tl.where(r[11] == i, V[4 + F + i], 0.0)
                q = tl.where(hit & (raw <= ALPHA_MAX), visible * (T * dot - inv * behind), 0.0)
                behind += w * dot
                row = _put(tl.zeros((SLOT,), tl.float32), column, 0, w * V[0])
                row = _put(row, column, 1, w * V[1])
                row = _put(row, column, 2, w * V[2])
                row = _put(row, column, 3, q)
                if DISK:
                    row = _disk_sums(row, column, r, dx, dy, r[5] * q, w * V[3], F)
                else:
                    qx, qy = q * dx, q * dy
                    row = _put(row, column, 4, qx)
                    row = _put(row, column, 5, qy)
                    row = _put(row, column, 6, qx * dx)
                    row = _put(row, column, 7, qx * dy)
                    row = _put(row, column, 8, qy * dy)
                    row = _put(row, column, 9, w * V[3])
                for i in tl.static_range(F):
                    row = _put(row, column, (17 if DISK else 10) + i, w * V[4 + i])
                tl.store(slots + tl.load(slot + k - u) * SLOT + column, row)
        k -= UNROLL


@triton.jit
def _slot_rows(slots, j, e, column, i, SLOT: tl.constexpr):
    return tl.load(slots + (j + i[:, None]) * SLOT + column[None, :], j + i[:, None] < e, 0.0)


@triton.jit(do_not_specialize=["count", "capacity"])
def slot_sum(order, ends, slots, sums, count, capacity, SLOT: tl.constexpr, ROWS: tl.constexpr, MANY: tl.constexpr):
    """Each Gaussian's slots are one run of rows: sums (N,SLOT). MANY Gaussians a program, to wait once for memory."""
    column, i = tl.arange(0, SLOT), tl.arange(0, ROWS)
    begin, end, total = (), (), ()
    for u in tl.static_range(MANY):
        rank = tl.program_id(0) * MANY + u
        j = tl.minimum(tl.load(ends + rank - 1, (rank > 0) & (rank < count), 0), capacity)
        e = tl.minimum(tl.load(ends + rank, rank < count, 0), capacity)
        begin, end = begin + (j,), end + (e,)
        total = total + (_slot_rows(slots, j, e, column, i, SLOT),)
    for u in tl.static_range(MANY):
        rank = tl.program_id(0) * MANY + u
        j, rows = begin[u] + ROWS, total[u]
        while j < end[u]:
            rows += _slot_rows(slots, j, end[u], column, i, SLOT)
            j += ROWS
        row = sums + tl.load(order + rank, rank < count, 0) * SLOT + column
        tl.store(row, tl.sum(rows, 0), (rank < count) & (column >= 0))
