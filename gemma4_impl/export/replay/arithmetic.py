"""What each node of an MLX program does, in `mlx.core`: element by element, reductions, products, norms, attention."""

import math
from collections.abc import Callable

import mlx.core as mx

from gemma4_impl.errors import short
from gemma4_impl.export.replay.nodes import Guard, at_least, axis_of, define, op

# Element by element

UNARY = {
    "Abs": mx.abs,
    "Arccos": mx.arccos,
    "Arccosh": mx.arccosh,
    "Arcsin": mx.arcsin,
    "Arcsinh": mx.arcsinh,
    "Arctan": mx.arctan,
    "Arctanh": mx.arctanh,
    "BitwiseInvert": mx.bitwise_invert,
    "Ceil": mx.ceil,
    "Cos": mx.cos,
    "Cosh": mx.cosh,
    "Erf": mx.erf,
    "Exp": mx.exp,
    "Expm1": mx.expm1,
    "Floor": mx.floor,
    "Log": mx.log,
    "Log10": mx.log10,
    "Log1p": mx.log1p,
    "Log2": mx.log2,
    "LogicalNot": mx.logical_not,
    "Neg": mx.negative,
    "Reciprocal": mx.reciprocal,
    "Rsqrt": mx.rsqrt,
    "Sigmoid": mx.sigmoid,
    "Sign": mx.sign,
    "Silu": lambda x: x * mx.sigmoid(x),
    "Sin": mx.sin,
    "Sinh": mx.sinh,
    "Sqrt": mx.sqrt,
    "Square": mx.square,
    "Tan": mx.tan,
    "Tanh": mx.tanh,
    "Trunc": mx.trunc,
}
BINARY = {
    "Add": mx.add,
    "Atan2": mx.arctan2,
    "BitwiseAnd": mx.bitwise_and,
    "BitwiseOr": mx.bitwise_or,
    "BitwiseXor": mx.bitwise_xor,
    "Divide": mx.divide,
    "Equal": mx.equal,
    "Greater": mx.greater,
    "GreaterEqual": mx.greater_equal,
    "Less": mx.less,
    "LessEqual": mx.less_equal,
    "LogAddExp": mx.logaddexp,
    "LogicalAnd": mx.logical_and,
    "LogicalOr": mx.logical_or,
    "Maximum": mx.maximum,
    "Minimum": mx.minimum,
    "Multiply": mx.multiply,
    "NotEqual": mx.not_equal,
    "Subtract": mx.subtract,
}
for name, function in UNARY.items():
    define(f"{name}Node", function, "x")


def _binary(run: Callable) -> Callable:
    def checked(guard: Guard, a: mx.array, b: mx.array) -> mx.array:
        if a.shape != b.shape:
            guard.fits(math.prod(mx.broadcast_shapes(a.shape, b.shape)) * max(a.dtype.size, b.dtype.size))
        return run(guard, a, b)

    return checked


for name, function in BINARY.items():
    define(f"{name}Node", _binary(lambda guard, a, b, run=function: run(a, b)), "a b", guarded=True)


def _quotient(run: Callable) -> Callable:
    """Division of integers by 0, or of the least one by -1, ends the process."""

    def checked(guard: Guard, a: mx.array, b: mx.array) -> mx.array:
        dtype = mx.result_type(a, b)
        if not mx.issubdtype(dtype, mx.integer):
            return run(a, b)
        b = b.astype(dtype)
        bad = b == 0
        if mx.issubdtype(dtype, mx.signedinteger):
            bad = mx.logical_or(bad, mx.logical_and(b == -1, a.astype(dtype) == mx.iinfo(dtype).min))
        guard.require(mx.logical_not(bad), "integer division by 0, or out of range")
        return run(a, mx.where(bad, mx.array(1, dtype), b))

    return checked


define("FloorDivideNode", _binary(_quotient(mx.floor_divide)), "a b", guarded=True)
define("RemainderNode", _binary(_quotient(mx.remainder)), "a b", guarded=True)


@op("PowerNode", "a b", guarded=True)
@_binary
def power(guard: Guard, a: mx.array, b: mx.array) -> mx.array:
    """An integer to the power of a negative one never ends."""
    if mx.issubdtype(mx.result_type(a, b), mx.signedinteger):
        guard.require(b >= 0, "an integer to a negative power")
        b = mx.maximum(b, mx.array(0, b.dtype))
    return mx.power(a, b)


@op("WhereNode", "condition x y", guarded=True)
def where(guard: Guard, condition: mx.array, x: mx.array, y: mx.array) -> mx.array:
    shape = mx.broadcast_shapes(condition.shape, x.shape, y.shape)
    guard.fits(math.prod(shape) * max(x.dtype.size, y.dtype.size))
    return mx.where(condition, x, y)


@op("ClipNode", "x a_min? a_max?")
def clip(x: mx.array, a_min: mx.array | None, a_max: mx.array | None) -> mx.array:
    return mx.clip(x, a_min, a_max)


@op("GeluNode", "x approximate")
def gelu(x: mx.array, approximate: str) -> mx.array:
    if approximate == "none":
        return x * (1 + mx.erf(x * (1 / math.sqrt(2)))) / 2
    if approximate == "tanh":
        return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(f"approximate = {short(approximate)}")


define("RoundNode", mx.round, "x decimals")

# Reductions

REDUCTIONS = {
    "All": mx.all,
    "Any": mx.any,
    "LogSumExp": mx.logsumexp,
    "Mean": mx.mean,
    "Prod": mx.prod,
    "Sum": mx.sum,
}
SELECTIONS = {"Max": mx.max, "Median": mx.median, "Min": mx.min}


def _axes(x: mx.array, axes: list[int]) -> list[int]:
    """No axes: all of them."""
    return [axis_of(x, axis) for axis in axes] or list(range(x.ndim))


for name, function in REDUCTIONS.items():
    define(f"{name}Node", lambda x, axes, keep, run=function: run(x, _axes(x, axes), keep), "x axes keepdims")


def _nonempty(x: mx.array) -> mx.array:
    if not x.size:
        raise ValueError("an empty array has no such element")
    return x


for name, function in SELECTIONS.items():
    define(
        f"{name}Node",
        lambda x, axes, keep, run=function: run(_nonempty(x), axis=_axes(x, axes), keepdims=keep),
        "x axes keepdims",
    )
define("ArgmaxNode", lambda x, axis, keep: mx.argmax(_nonempty(x), axis_of(x, axis), keep), "x axis keepdims")
define("ArgminNode", lambda x, axis, keep: mx.argmin(_nonempty(x), axis_of(x, axis), keep), "x axis keepdims")
define("VarNode", lambda x, axes, keep, ddof: mx.var(x, _axes(x, axes), keep, ddof), "x axes keepdims ddof")
define("StdNode", lambda x, axes, keep, ddof: mx.std(x, _axes(x, axes), keep, ddof), "x axes keepdims ddof")
define(
    "CumsumNode",
    lambda x, axis, reverse, inclusive: mx.cumsum(x, axis_of(x, axis), reverse=reverse, inclusive=inclusive),
    "x axis reverse inclusive",
)
define("SoftmaxNode", lambda x, axis, precise: mx.softmax(x, axis_of(x, axis), precise=precise), "x axis precise")

# Products


def _wide(*arrays: mx.array | int | None) -> list[mx.array | int | None]:
    """16-bit floats in float32, on the CPU: MLX's fused operations accumulate in the type that they are given there
    (its quantized product of 4096 bfloat16 is 7 % off), but in float32 with Metal."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return list(arrays)
    half = (mx.bfloat16, mx.float16)
    return [a.astype(mx.float32) if isinstance(a, mx.array) and a.dtype in half else a for a in arrays]


@op("AddmmNode", "mat1 mat2 bias? alpha beta", guarded=True)
def addmm(guard: Guard, mat1: mx.array, mat2: mx.array, bias: mx.array | None, alpha: float, beta: float) -> mx.array:
    """beta * bias + alpha * mat1 @ mat2."""
    _matmul_fits(guard, mat1, mat2)
    if bias is not None:
        return mx.addmm(bias, mat1, mat2, alpha, beta)
    out = mat1 @ mat2
    return out if alpha == 1 else out * alpha


def _matmul_fits(guard: Guard, a: mx.array, b: mx.array) -> None:
    if a.ndim > 1 and b.ndim > 1:
        batch = mx.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        guard.fits(math.prod((*batch, a.shape[-2], b.shape[-1])) * a.dtype.size)


@op("QuantizedMatmulNode", "x w scales biases? group_size bits mode transpose")
def quantized_matmul(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str,
    transpose: bool,
) -> mx.array:
    wide = _wide(x, w, scales, biases)
    return mx.quantized_matmul(*wide, transpose, group_size, bits, mode).astype(x.dtype)


@op("DequantizeNode", "w scales biases? group_size bits mode global_scale? dtype?")
def dequantize(
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str,
    global_scale: mx.array | None,
    dtype: mx.Dtype | None,
) -> mx.array:
    return mx.dequantize(w, scales, biases, group_size, bits, mode, global_scale, dtype)


def _matrices(guard: Guard, x: mx.array, indices: mx.array | None) -> mx.array | None:
    """Indices into x [..., M, K] as a flat batch of matrices."""
    return None if indices is None else guard.index(indices, math.prod(x.shape[:-2])).astype(mx.uint32)


@op("GatherMmNode", "a b lhs_indices? rhs_indices? sorted_indices sorted_indices_flag?", guarded=True)
def gather_mm(
    guard: Guard,
    a: mx.array,
    b: mx.array,
    lhs_indices: mx.array | None,
    rhs_indices: mx.array | None,
    sorted_indices: bool,
    sorted_indices_flag: int | None,
) -> mx.array:
    """The flag, which is known only in a run, wins."""
    lhs, rhs = _matrices(guard, a, lhs_indices), _matrices(guard, b, rhs_indices)
    ordered = bool(sorted_indices if sorted_indices_flag is None else sorted_indices_flag)
    return mx.gather_mm(*_wide(a, b), lhs, rhs, sorted_indices=ordered).astype(a.dtype)  # float32 is all a CPU has


@op(
    "GatherQmmNode",
    "x w scales mode biases? lhs_indices? rhs_indices? transpose group_size bits sorted_indices sorted_indices_flag?",
    guarded=True,
)
def gather_qmm(
    guard: Guard,
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    mode: str,
    biases: mx.array | None,
    lhs_indices: mx.array | None,
    rhs_indices: mx.array | None,
    transpose: bool,
    group_size: int,
    bits: int,
    sorted_indices: bool,
    sorted_indices_flag: int | None,
) -> mx.array:
    lhs, rhs = _matrices(guard, x, lhs_indices), _matrices(guard, w, rhs_indices)
    ordered = bool(sorted_indices if sorted_indices_flag is None else sorted_indices_flag)
    out = mx.gather_qmm(
        *_wide(x, w, scales, biases), lhs, rhs, transpose, group_size, bits, mode, sorted_indices=ordered
    )
    return out.astype(x.dtype)


def _conv(dims: int) -> None:
    axes = {1: [""], 2: ["_h", "_w"], 3: ["_d", "_h", "_w"]}[dims]
    names = [f"{what}{axis}" for what in ("stride", "padding", "dilation") for axis in axes]

    def conv(x: mx.array, w: mx.array, *settings: int) -> mx.array:
        """x [B, ..., C_in] with w [C_out, ..., C_in / groups] -> [B, ..., C_out]."""
        *parts, groups = settings
        stride, padding, dilation = (parts[i * dims : (i + 1) * dims] for i in range(3))
        at_least(1, stride=stride, dilation=dilation, groups=groups)
        at_least(0, padding=padding)
        if x.ndim != dims + 2 or w.ndim != dims + 2 or not x.size or not w.size:
            raise ValueError(f"arrays of shape {x.shape} and {w.shape}")
        sizes = zip(x.shape[1:-1], padding, w.shape[1:-1], dilation, strict=True)
        if any(size + 2 * p < d * (k - 1) + 1 for size, p, k, d in sizes):
            raise ValueError(f"a window of shape {w.shape} is larger than the array {x.shape}")
        return mx.conv_general(x, w, stride, padding, dilation, groups=groups)

    define(f"Conv{dims}DNode", conv, " ".join(["x w", *names, "groups"]))


for dims in (1, 2, 3):
    _conv(dims)

# Norms, rotary embedding, attention

define("RMSNormNode", mx.fast.rms_norm, "x weight? eps")
define("LayerNormNode", mx.fast.layer_norm, "x weight? bias? eps")


@op("RopeNode", "x dims offset freqs? traditional base scale")
def rope(
    x: mx.array,
    dims: int,
    offset: mx.array | int,
    freqs: mx.array | None,
    traditional: bool,
    base: float,
    scale: float,
) -> mx.array:
    """x [B, ..., T, H], rotated for positions from `offset`, one or [B]. `freqs` [dims / 2] are wavelengths / 2 pi,
    which then stand for `base`; infinite ones do not turn."""
    if not 0 < dims <= x.shape[-1] or dims % 2:
        raise ValueError(f"dims = {dims} of {x.shape[-1]}")
    if freqs is not None and freqs.shape != (dims // 2,):
        raise ValueError(f"freqs of shape {freqs.shape}, dims = {dims}")
    if isinstance(offset, mx.array) and offset.shape not in ((), (1,), x.shape[:1]):
        raise ValueError(f"offset of shape {offset.shape} for an array of shape {x.shape}")
    (wide,) = _wide(x)
    base = base if freqs is None else None
    out = mx.fast.rope(wide, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs)
    return out.astype(x.dtype)


@op("SdpaNode", "q k v scale mask? causal", guarded=True)
def sdpa(
    guard: Guard, q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None, causal: bool
) -> mx.array:
    """q [B, N, T, H], k and v [B, K, S, H] -> [B, N, T, H]. Causal: the last query sees all S keys, the one before it
    one less, and so on."""
    if causal and mask is not None:
        raise ValueError("both causal and with a mask")
    if {x.ndim for x in (q, k, v)} != {4} or k.shape[:3] != v.shape[:3] or 0 in (*q.shape, *k.shape):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}")
    if causal and k.shape[2] < q.shape[2]:
        raise ValueError(f"causal, with {q.shape[2]} queries and {k.shape[2]} keys")
    guard.fits(math.prod(q.shape[:3]) * k.shape[2] * 4)
    mask = "causal" if causal else mask
    *wide, mask = _wide(q, k, v, mask)
    return mx.fast.scaled_dot_product_attention(*wide, scale=scale, mask=mask).astype(q.dtype)
