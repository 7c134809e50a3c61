"""The Triton kernels: a tile of logits is made, used and forgotten, except in :func:`slab_kernel`.

A pointer that is None switches its part off when the kernel is compiled. Offsets are 64-bit wherever two
sizes are multiplied. Rows and classes past the end are clamped to the last one, so that loads need no mask
for them; ``valid`` keeps them out of sums and stores. Formulas: :mod:`lossworks.head.core.problem`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton's pointers and tiles have no Python types.

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Row blocks that share a block of C while it is in the L2 cache.
ROW_GROUP = tl.constexpr(8)


class HeadPointers(NamedTuple):
    """A problem as kernels see it; strides are between rows, in elements, and ``features`` are those of C.

    Frozen columns, the classifier's first, are a matrix of their own, or None.
    """

    e: Any
    c: Any
    e_stride: Any
    c_stride: Any
    features: Any
    frozen: Any
    frozen_stride: Any
    frozen_features: Any
    frozen_scale: Any
    targets: Any
    bias: Any
    softcap: Any
    offset: Any


class Scale(NamedTuple):
    """A softmax as kernels see it: τ of each row and which classes take part, or None."""

    temperature: Any
    classes: Any


class Parts(NamedTuple):
    """Coefficients as kernels see them, and the row sums they need."""

    logsumexp: Any
    mean: Any
    softmax: Any
    expected: Any
    target: Any
    constant: Any
    linear: Any
    weights: Any


@triton.jit
def _product(
    z, e_ptr, e_stride, c_ptr, c_stride, features, rows, classes,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return z with the product of some rows and classes added, float32; C may be int8."""
    for start in range(0, features, FEATURES):
        d = start + tl.arange(0, FEATURES)
        inside = d < features
        e = tl.load(e_ptr + rows[:, None] * e_stride + d[None, :], mask=inside[None, :], other=0.0)
        place = c_ptr + classes.to(tl.int64)[None, :] * c_stride + d[:, None]
        c = tl.load(place, mask=inside[:, None], other=0).to(e.dtype)
        if UPCAST:
            e = e.to(tl.float32)
            c = c.to(tl.float32)
        z = tl.dot(e, c, z, input_precision=PRECISION)
    return z


@triton.jit
def _uncapped(
    head, rows, classes,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, FEATURES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return z of a tile before the softcap and the target's offset, float32."""
    z = tl.zeros((ROWS, CLASSES), tl.float32)
    own_e = head.e
    if head.frozen is not None:
        z = _product(
            z, head.e, head.e_stride, head.frozen, head.frozen_stride, head.frozen_features, rows, classes,
            FEATURES, PRECISION, UPCAST,
        )  # fmt: skip
        if head.frozen_scale is not None:
            z *= tl.load(head.frozen_scale + classes)[None, :]
        own_e += head.frozen_features
    z = _product(
        z, own_e, head.e_stride, head.c, head.c_stride, head.features, rows, classes,
        FEATURES, PRECISION, UPCAST,
    )  # fmt: skip
    if head.bias is not None:
        z += tl.load(head.bias + classes).to(tl.float32)[None, :]
    return z


@triton.jit
def _capped(head, z):
    """Return the logits after the softcap, if there is one."""
    if head.softcap is not None:
        # tanh by exp: libdevice's exists neither on every target nor in the interpreter.
        z = head.softcap * (2.0 / (1.0 + tl.exp(z * (-2.0 / head.softcap))) - 1.0)
    return z


@triton.jit
def _hits(head, rows, classes, valid):
    """Return where a tile holds its rows' targets; a clamped column past the end never does."""
    y = tl.load(head.targets + rows).to(tl.int32)
    return (classes[None, :] == y[:, None]) & valid[None, :]


@triton.jit
def _shifted(head, z, hit, rows):
    """Return the logits with the target's offset."""
    if head.offset is not None:
        z = tl.where(hit, z + tl.load(head.offset + rows)[:, None], z)
    return z


@triton.jit
def _slope(head, z):
    """Return the derivative of the softcap at logits before it, 1/cosh²: of capped ones all digits cancel."""
    decay = tl.exp(tl.abs(z) * (-2.0 / head.softcap))
    rise = 2.0 / (1.0 + decay)
    return decay * rise * rise


@triton.jit
def _inverse_temperature(scale, rows):
    """Return 1/τ of each row as a column, or 1."""
    if scale.temperature is not None:
        return (1.0 / tl.load(scale.temperature + rows))[:, None]
    else:  # noqa: RET505 - Triton compiles one branch only if both are written
        return 1.0


@triton.jit
def _taking_part(scale, classes, valid):
    """Return which columns count in the softmax."""
    if scale.classes is not None:
        valid = valid & (tl.load(scale.classes + classes) != 0)
    return valid


@triton.jit
def row_sums_kernel(  # noqa: PLR0915 - every sum of the walk stays in registers
    head, scale, other, parts_ptr, N, V, splits,
    EXPECTED: tl.constexpr, SUMS: tl.constexpr, PREDICTED: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, FEATURES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write each row's maximum, Σ exp, target's logit (or 0), Σ exp·z, Σ z and Σ z² over a split's classes.

    The largest logit and the bits of its class, int32, come last. Row blocks run fastest, so that programs at
    work at the same time read the same classes. ``parts`` is (8, splits, N); what is not asked for is left as
    it is. With a head ``other``, Σ exp·z takes z from it.
    """
    row_blocks = tl.cdiv(N, ROWS)
    split = tl.program_id(0) // row_blocks
    lanes = ((tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    rows = tl.minimum(lanes, N - 1)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    target = tl.zeros((ROWS,), tl.float32)
    expected = tl.zeros((ROWS,), tl.float32)
    plain = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    predicted = tl.zeros((ROWS,), tl.int32)
    walk = tl.cdiv(tl.cdiv(V, CLASSES), splits)
    # Only the loop over features is pipelined: two stages of this one would not fit the registers.
    for tile in tl.range(split * walk, tl.minimum(split * walk + walk, tl.cdiv(V, CLASSES)), num_stages=1):
        columns = tile * CLASSES + tl.arange(0, CLASSES)
        valid = columns < V
        classes = tl.minimum(columns, V - 1)
        z = _uncapped(head, rows, classes, ROWS, CLASSES, FEATURES, PRECISION, UPCAST)
        hit = _hits(head, rows, classes, valid)
        z = _shifted(head, _capped(head, z), hit, rows)
        target += tl.sum(tl.where(hit, z, 0.0), 1)
        if SUMS:
            real = tl.where(valid[None, :], z, 0.0)
            plain += tl.sum(real, 1)
            squares += tl.sum(real * real, 1)
        if PREDICTED:
            top, place = tl.max(tl.where(valid[None, :], z, float("-inf")), 1, return_indices=True)
            predicted = tl.where(top > best, tile * CLASSES + place, predicted)
            best = tl.maximum(best, top)
        counted = _taking_part(scale, classes, valid)[None, :]
        scaled = tl.where(counted, z * _inverse_temperature(scale, rows), float("-inf"))
        new = tl.maximum(largest, tl.max(scaled, 1))
        # Where no class has taken part yet all are −inf, and −inf − (−inf) would be NaN.
        shift = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp(scaled - shift[:, None])
        decay = tl.exp(largest - shift)
        total = total * decay + tl.sum(weights, 1)
        largest = new
        if EXPECTED:
            if other is not None:
                z = _uncapped(other, rows, classes, ROWS, CLASSES, FEATURES, PRECISION, UPCAST)
                z = _shifted(other, _capped(other, z), _hits(other, rows, classes, valid), rows)
            # Of a class without any probability 0·(−∞) would be no number.
            expected = expected * decay + tl.sum(tl.where(weights > 0, weights * z, 0.0), 1)
    part = parts_ptr + split.to(tl.int64) * N + lanes
    step = tl.cast(splits, tl.int64) * N
    tl.store(part, largest, mask=lanes < N)
    tl.store(part + step, total, mask=lanes < N)
    tl.store(part + 2 * step, target, mask=lanes < N)
    if EXPECTED:
        tl.store(part + 3 * step, expected, mask=lanes < N)
    if SUMS:
        tl.store(part + 4 * step, plain, mask=lanes < N)
        tl.store(part + 5 * step, squares, mask=lanes < N)
    if PREDICTED:
        tl.store(part + 6 * step, best, mask=lanes < N)
        tl.store(part + 7 * step, predicted.to(tl.float32, bitcast=True), mask=lanes < N)


@triton.jit
def _coefficient(pointer, lanes, N):
    """Return one number a row as a column, 0 past the last row, so that those rows' gradients are 0."""
    return tl.load(pointer + lanes, mask=lanes < N, other=0.0)[:, None]


@triton.jit
def _gradient(head, scale, parts, z, lanes, rows, classes, valid, N):
    """Return ∂L/∂z of a tile of uncapped logits, without the softcap's slope; 0 outside the problem."""
    hit = _hits(head, rows, classes, valid)
    z = _shifted(head, _capped(head, z), hit, rows)
    inverse = _inverse_temperature(scale, rows)
    p = tl.exp(z * inverse - tl.load(parts.logsumexp + rows)[:, None])
    p = tl.where(_taking_part(scale, classes, valid)[None, :], p, 0.0)
    g = tl.zeros_like(z)
    if parts.softmax is not None:
        g += _coefficient(parts.softmax, lanes, N) * p
    if parts.expected is not None:
        centred = z - tl.load(parts.mean + rows)[:, None]
        g += _coefficient(parts.expected, lanes, N) * p * (1.0 + centred * inverse)
    if parts.target is not None:
        g += tl.where(hit, _coefficient(parts.target, lanes, N), 0.0)
    if parts.constant is not None:
        constant = _coefficient(parts.constant, lanes, N)
        if parts.weights is not None:
            constant = constant * tl.load(parts.weights + classes)[None, :]
        g += constant
    if parts.linear is not None:
        g += _coefficient(parts.linear, lanes, N) * z
    return tl.where(valid[None, :], g, 0.0)


@triton.jit
def _place(N, V, ROWS: tl.constexpr, CLASSES: tl.constexpr):
    """Return the rows and columns of this program's tile, which may reach past the end."""
    row_blocks = tl.cdiv(N, ROWS)
    class_blocks = tl.cdiv(V, CLASSES)
    program = tl.program_id(0)
    row_block, class_block = tl.swizzle2d(
        program // class_blocks, program % class_blocks, row_blocks, class_blocks, ROW_GROUP
    )
    lanes = (row_block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    return lanes, class_block * CLASSES + tl.arange(0, CLASSES)


@triton.jit
def slab_kernel(
    head, scale, parts, other, slab_ptr, N, first, width, pitch,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, FEATURES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write ∂L/∂z of all rows and of ``width`` classes from ``first`` on, in the slab's dtype.

    With a head ``other``, the logits z in ∂z are that head's: the softcap's slope is taken there.
    """
    lanes, columns = _place(N, width, ROWS, CLASSES)
    rows = tl.minimum(lanes, N - 1)
    valid = columns < width
    classes = first + tl.minimum(columns, width - 1)
    z = _uncapped(head, rows, classes, ROWS, CLASSES, FEATURES, PRECISION, UPCAST)
    g = _gradient(head, scale, parts, z, lanes, rows, classes, valid, N)
    if other is not None:
        if other.softcap is not None:
            z = _uncapped(other, rows, classes, ROWS, CLASSES, FEATURES, PRECISION, UPCAST)
            g *= _slope(other, z)
    elif head.softcap is not None:
        g *= _slope(head, z)
    place = slab_ptr + rows[:, None] * pitch + columns[None, :]
    tl.store(place, g.to(slab_ptr.dtype.element_ty), mask=(lanes < N)[:, None] & valid[None, :])


@triton.jit
def row_gradients_kernel(
    slab_ptr, c_ptr, de_ptr, N, width, features, pitch, c_stride, de_stride,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, FEATURES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add a slab's part of g·C to ∂E, a row's classes always in the same order, whatever rows there are.

    A library's product chooses its order by the number of rows.
    """
    row_blocks = tl.cdiv(N, ROWS)
    lanes = ((tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    rows = tl.minimum(lanes, N - 1)
    d = (tl.program_id(0) // row_blocks) * FEATURES + tl.arange(0, FEATURES)
    inside = d < features
    de = tl.zeros((ROWS, FEATURES), tl.float32)
    for start in range(0, width, CLASSES):
        columns = start + tl.arange(0, CLASSES)
        valid = columns < width
        g = tl.load(slab_ptr + rows[:, None] * pitch + columns[None, :], mask=valid[None, :], other=0.0)
        place = c_ptr + columns.to(tl.int64)[:, None] * c_stride + d[None, :]
        c = tl.load(place, mask=valid[:, None] & inside[None, :], other=0.0)
        if UPCAST:
            g = g.to(tl.float32)
            c = c.to(tl.float32)
        de = tl.dot(g, c, de, input_precision=PRECISION)
    place = de_ptr + rows[:, None] * de_stride + d[None, :]
    mask = (lanes < N)[:, None] & inside[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + de, mask=mask)


@triton.jit
def fused_kernel(
    head, scale, parts, order_ptr, de_ptr, dc_ptr, db_ptr, row_mass_ptr, class_mass_ptr, eps, N, V,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, FEATURES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add a tile's part to the gradients, unless every entry of it is small.

    A dropped tile's Σ|g| off the target, by row and by class, goes to the two masses if they are given.
    """
    lanes, columns = _place(N, V, ROWS, CLASSES)
    rows = tl.minimum(lanes, N - 1)
    valid = columns < V
    classes = tl.minimum(columns, V - 1)
    if order_ptr is not None:
        classes = tl.load(order_ptr + classes)
    z = _uncapped(head, rows, classes, ROWS, CLASSES, FEATURES, PRECISION, UPCAST)
    g = _gradient(head, scale, parts, z, lanes, rows, classes, valid, N)
    # |g| < ε·|a| is |p − onehot| < ε where the target's coefficient is −a, whatever the loss's scale. Where
    # it is another one, as in label smoothing, a target whose gradient isn't small is kept.
    least = eps * tl.abs(_coefficient(parts.softmax, lanes, N))
    kept = tl.max(((tl.abs(g) >= least) & (g != 0.0)).to(tl.int32)) > 0
    if head.softcap is not None:
        g *= _slope(head, z)
    if db_ptr is not None:
        # Without masses what is dropped is lost to the bias, too, as published.
        counted = valid & (kept | (row_mass_ptr is not None))
        tl.atomic_add(db_ptr + classes, tl.sum(g, 0), mask=counted, sem="relaxed")
    if kept:
        _add_products(
            head, g.to(head.e.dtype.element_ty), de_ptr, dc_ptr, lanes, rows, classes, valid, N,
            FEATURES, PRECISION, UPCAST,
        )  # fmt: skip
    elif row_mass_ptr is not None:
        mass = tl.where(_hits(head, rows, classes, valid), 0.0, tl.abs(g))
        tl.atomic_add(row_mass_ptr + rows, tl.sum(mass, 1), mask=lanes < N, sem="relaxed")
        tl.atomic_add(class_mass_ptr + classes, tl.sum(mass, 0), mask=valid, sem="relaxed")


@triton.jit
def _add_products(
    head, g, de_ptr, dc_ptr, lanes, rows, classes, valid, N,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add g·C to ∂E and gᵀ·E to ∂C, feature block by feature block."""
    if UPCAST:
        g = g.to(tl.float32)
    D = head.features
    for start in range(0, D, FEATURES):
        d = (start + tl.arange(0, FEATURES))[None, :]
        if de_ptr is not None:
            c = tl.load(head.c + classes.to(tl.int64)[:, None] * head.c_stride + d, mask=d < D, other=0.0)
            if UPCAST:
                c = c.to(tl.float32)
            de = tl.dot(g, c, input_precision=PRECISION).to(de_ptr.dtype.element_ty)
            place = de_ptr + rows[:, None] * D + d
            tl.atomic_add(place, de, mask=(lanes < N)[:, None] & (d < D), sem="relaxed")
        if dc_ptr is not None:
            e = tl.load(head.e + rows[:, None] * head.e_stride + d, mask=d < D, other=0.0)
            if UPCAST:
                e = e.to(tl.float32)
            dc = tl.dot(tl.trans(g), e, input_precision=PRECISION).to(dc_ptr.dtype.element_ty)
            place = dc_ptr + classes.to(tl.int64)[:, None] * D + d
            tl.atomic_add(place, dc, mask=valid[:, None] & (d < D), sem="relaxed")
