"""Every node type that the replay knows, against PyTorch's definition of it."""

import math

import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("executorch")

import mlx.core as mx
import torch
import torch.nn.functional as F
from replay_graphs import Tid, Vid, graph, make, pte, run_node
from torch import Tensor

from gemma4_impl.export.replay.arithmetic import BINARY, REDUCTIONS, SELECTIONS, UNARY
from gemma4_impl.export.replay.machine import Machine
from gemma4_impl.export.replay.nodes import OPS
from gemma4_impl.export.replay.session import to_torch

INTS = torch.tensor([[3, -1, 2], [0, 5, -4]])
SCALAR_TYPES = {torch.float32: 6, torch.int32: 3, torch.bfloat16: 15, torch.bool: 11}
COVERED = set()
"""Node types that a test has run."""


def floats(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(kind: str, **fields) -> Tensor | list[Tensor]:
    COVERED.add(kind)
    return run_node(kind, **fields)


def close(got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    """Within a few roundings of the dtype, of the largest element."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if not want.dtype.is_floating_point:
        assert torch.equal(got, want)
        return
    if tolerance is None:
        tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[want.dtype]
    assert torch.equal(got.isnan(), want.isnan())
    finite = ~want.isinf()
    assert torch.equal(got[~finite], want[~finite])
    got, want = got[finite].double().nan_to_num(0), want[finite].double().nan_to_num(0)
    if want.numel():
        assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


TORCH_UNARY = {
    "BitwiseInvert": torch.bitwise_not,
    "LogicalNot": torch.logical_not,
    "Neg": torch.neg,
    "Silu": F.silu,
}
ABOVE_ONE = {"Arccosh", "Log", "Log10", "Log2", "Rsqrt", "Sqrt"}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    function = TORCH_UNARY.get(name) or getattr(torch, name.lower())
    x = {"BitwiseInvert": INTS, "LogicalNot": INTS > 0}.get(name, floats(2, 5).tanh() * 0.9)
    if name in ABOVE_ONE:
        x = x + 2
    close(run(f"{name}Node", x=x), function(x))


TORCH_BINARY = {
    "Add": torch.add,
    "Divide": torch.div,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterEqual": torch.ge,
    "Less": torch.lt,
    "LessEqual": torch.le,
    "NotEqual": torch.ne,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "LogicalAnd": torch.logical_and,
    "LogicalOr": torch.logical_or,
}


@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    function = TORCH_BINARY.get(name) or getattr(torch, name.lower())
    a, b = floats(2, 3), floats(3, seed=1)
    if name.startswith("Bitwise"):
        a, b = INTS, torch.tensor([6, 3, 1])
    elif name.startswith("Logical"):
        a, b = INTS > 0, torch.tensor([True, False, True])
    elif "qual" in name:
        b = a[0]
    close(run(f"{name}Node", a=a, b=b), function(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_division_and_power(dtype):
    a, b = (INTS.to(dtype), torch.tensor([2, -3, 4]).to(dtype))
    close(run("FloorDivideNode", a=a, b=b), torch.floor_divide(a, b))
    close(run("RemainderNode", a=a, b=b), torch.remainder(a, b))
    close(run("PowerNode", a=a.abs() + 1, b=b.abs()), torch.pow(a.abs() + 1, b.abs()))


@pytest.mark.parametrize(
    ("kind", "a", "b"),
    [("FloorDivideNode", 1, 0), ("RemainderNode", 1, 0), ("FloorDivideNode", -(1 << 31), -1), ("PowerNode", 2, -1)],
)
def test_integers_that_would_end_the_process_are_refused(kind, a, b):
    with pytest.raises(ValueError, match=rf"instruction 0 \({kind}\): .*integer"):
        run(kind, a=torch.tensor([a], dtype=torch.int32), b=torch.tensor([b], dtype=torch.int32))


TORCH_REDUCTIONS = {"LogSumExp": torch.logsumexp, "Max": torch.amax, "Min": torch.amin, "Mean": torch.mean}


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("name", [*REDUCTIONS, *SELECTIONS])
def test_reductions(name, keepdims):
    x = floats(2, 3, 4) if name not in ("All", "Any") else floats(2, 3, 4) > -1
    function = TORCH_REDUCTIONS.get(name) or getattr(torch, name.lower())
    got = run(f"{name}Node", x=x, axes=[-1], keepdims=keepdims)
    if name == "Median":
        ordered = x.sort(-1).values[..., 1:3].mean(-1, keepdim=keepdims)
        close(got, ordered)
    else:
        close(got, function(x, -1, keepdim=keepdims))
        close(run(f"{name}Node", x=x, axes=[], keepdims=False), function(x.flatten(), 0))


def test_spread():
    x = floats(3, 5)
    close(run("VarNode", x=x, axes=[1], keepdims=True, ddof=1), x.var(1, keepdim=True))
    close(run("StdNode", x=x, axes=[1], keepdims=False, ddof=0), x.std(1, correction=0))


def test_order():
    x = floats(3, 7)
    close(run("SortNode", x=x, axis=-1), x.sort(-1).values)
    close(run("ArgsortNode", x=x, axis=0), x.argsort(0).to(torch.uint32))
    close(run("ArgmaxNode", x=x, axis=1, keepdims=True), x.argmax(1, keepdim=True).to(torch.uint32))
    close(run("ArgminNode", x=x, axis=0, keepdims=False), x.argmin(0).to(torch.uint32))
    largest = x.topk(3).values.sort().values
    close(run("PartitionNode", x=x, kth=4, axis=1)[:, 4:].sort().values, largest)
    close(x.gather(1, run("ArgPartitionNode", x=x, kth=-3, axis=1)[:, 4:].long()).sort().values, largest)
    close(run("CumsumNode", x=x, axis=1, reverse=False, inclusive=True), x.cumsum(1))
    close(run("CumsumNode", x=x, axis=1, reverse=True, inclusive=False), x.flip(1).cumsum(1).flip(1) - x, 2e-6)
    with pytest.raises(ValueError, match="kth = 7 of 7"):
        run("PartitionNode", x=x, kth=7, axis=1)


def test_shapes():
    x = floats(2, 3, 4)
    close(run("IdCopyNode", x=x), x)
    close(run("ContiguousNode", x=x), x)
    close(run("ExpandDimsNode", x=x, axis=-2), x.unsqueeze(-2))
    close(run("ReshapeNode", x=x, shape=[4, -1]), x.reshape(4, -1))
    close(run("TransposeNode", x=x, perm=[1, 2, 0]), x.permute(1, 2, 0))
    close(run("SqueezeNode", x=x[:1], dims=[0]), x[0])
    close(run("SqueezeNode", x=x[:1, :, :1], dims=[]), x[0, :, 0])
    close(run("BroadcastToNode", x=x[:, :1], shape=[5, -1, 3, 4]), x[:, :1].expand(5, 2, 3, 4))
    close(run("TileNode", x=x, reps=[2, 1, 3]), x.repeat(2, 1, 3))
    close(run("RepeatNode", x=x, repeats=3, axis=1), x.repeat_interleave(3, 1))
    close(run("ConcatenateNode", tensors=[x, x[:, :1]], axis=1), torch.cat([x, x[:, :1]], 1))
    close(run("StackNode", tensors=[x, -x], axis=1), torch.stack([x, -x], 1))
    close(run("TrilNode", x=x, k=-1), x.tril(-1))
    close(run("TriuNode", x=x, k=1), x.triu(1))
    close(run("FlipNode", x=x, axes=[0, -1]), x.flip(0, -1))
    close(run("RollNode", x=x, shift=[1, -2], axes=[0, 2]), x.roll((1, -2), (0, 2)))
    close(run("PadNode", x=x, pad_width=[0, 0, 1, 2, 0, 1], mode="constant", constant_value=-2.0), pad(x))
    close(run("PadNode", x=x, pad_width=[0, 0, 0, 0, 1, 2], mode="edge"), F.pad(x, (1, 2), mode="replicate"))
    close(run("AsStridedNode", x=x, shape=[2, 3], strides=[3, 2], offset=4), x.as_strided((2, 3), (3, 2), 4))
    for dtype, code in SCALAR_TYPES.items():
        close(run("AsTypeNode", x=x, scalar_type=code), x.to(dtype))
    # MLX ends the process for a number of more than 32 bits.
    with pytest.raises(ValueError, match=r"strides = \[1099511627776\]: must be from 0 to 2147483647"):
        run("AsStridedNode", x=x, shape=[0], strides=[1 << 40])
    with pytest.raises(ValueError, match="a view up to element 24 of 24"):
        run("AsStridedNode", x=x, shape=[2, 3], strides=[12, 4], offset=4)


def pad(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1, 1, 2), value=-2.0)


def test_new_arrays():
    x = floats(2, 3)
    close(run("ARangeNode", start=3, stop=11, step=4, scalar_type=6), torch.arange(3, 11, 4, dtype=torch.float32))
    close(run("ARangeNode", start=3, stop=0, step=-1), torch.arange(3, 0, -1, dtype=torch.int32))
    close(run("FullNode", shape=[2, 0, 3], v=-math.inf, scalar_type=6), torch.full((2, 0, 3), -math.inf))
    close(run("FullNode", shape=[], v=7, scalar_type=3), torch.tensor(7, dtype=torch.int32))
    close(run("FullLikeNode", x=x, v=0.5), torch.full_like(x, 0.5))
    close(run("FullLikeNode", x=x, v=1.0, scalar_type=11), torch.ones_like(x, dtype=torch.bool))
    close(run("TriNode", n=3, m=4, k=1, scalar_type=6), torch.ones(3, 4).tril(1))


def test_split():
    x = floats(2, 7)
    for got, want in zip(run("SplitNode", x=x, sizes=[3], axis=1, outs=3), x.split(3, 1), strict=True):
        close(got, want)
    for got, want in zip(run("SplitNode", x=x, sizes=[2, 5], axis=-1, outs=2), x.split([2, 5], 1), strict=True):
        close(got, want)
    with pytest.raises(ValueError, match=r"\(SplitNode\): 4 parts for 3 slots"):
        run("SplitNode", x=x, sizes=[2], axis=1, outs=3)


def test_slices():
    x = floats(2, 9, 3)
    for start, stop, step in ((2, 5, 1), (0, 1 << 62, 2), (-4, -1, 1), (7, 3, 1), (1, 9, 3), (5, 1, -2), (8, -10, -1)):
        places = list(range(9))[start:stop:step]
        close(run("SliceNode", x=x, axis=1, start=start, stop=stop, step=step), x[:, places])
        want, update = x.clone(), floats(2, len(places), 3, seed=3)
        want[:, places] = update
        close(run("SliceUpdateNode", dst=x, update=update, axis=1, start=start, stop=stop, step=step), want)
    with pytest.raises(ValueError, match=r"an update of shape \(2, 4, 3\) for places of shape \(2, 3, 3\)"):
        run("SliceUpdateNode", dst=x, update=x[:, :4], axis=1, start=6, stop=10)


def test_indexing():
    x = floats(4, 5, 6)
    index = torch.tensor([[3, -1], [0, 2]])
    close(run("TakeNode", x=x, index=index, axis=0), x[index])
    close(run("TakeNode", x=x, index=index[1].to(torch.uint32), axis=1), x[:, index[1]])
    close(run("TakeNode", x=x, index=-2, axis=1), x[:, -2])
    along = torch.tensor([[[4, -5, 0, 1, 2, 3]]]).expand(4, 1, 6)
    close(run("TakeAlongAxisNode", x=x, indices=along, axis=1), x.take_along_dim(along % 5, 1))
    rows, cols = torch.tensor([[0], [3]]), torch.tensor([1, -1, 2])
    got = run("GatherNode", x=x, indices=[rows, cols], axes=[0, 2], slice_sizes=[1, 5, 1])
    close(got, x[rows, :, cols].reshape(2, 3, 1, 5, 1))
    places, update = torch.tensor([4, 0]), floats(4, 2, 6, seed=1)
    close(run("IndexCopyNode", dst=x, update=update, indices=places, axis=1), x.index_copy(1, places, update))
    places = torch.tensor([[1, 0, 1], [3, 3, 3]])
    close(
        run("ScatterAddNode", x=x[0], indices=places, updates=floats(2, 3, seed=2), axis=0),
        x[0].scatter_add(0, places, floats(2, 3, seed=2)),
    )


@pytest.mark.parametrize("wrong", [4, -5])
def test_indices_out_of_range_are_refused(wrong):
    """MLX itself reads and writes wherever they point."""
    x, one = floats(4, 3), torch.tensor([0, wrong])
    for kind, fields in {
        "TakeNode": {"x": x, "index": one, "axis": 0},
        "TakeAlongAxisNode": {"x": x, "indices": one[:, None], "axis": 0},
        "GatherNode": {"x": x, "indices": [one], "axes": [0], "slice_sizes": [1, 3]},
        "IndexCopyNode": {"dst": x, "update": x[:2], "indices": one, "axis": 0},
        "ScatterAddNode": {"x": x, "indices": one[:, None], "updates": x[:2, :1], "axis": 0},
        "GatherMmNode": {"a": x[:2, None], "b": floats(4, 3, 2), "rhs_indices": one},
    }.items():
        with pytest.raises(ValueError, match=rf"instruction 0 \({kind}\): an index outside -4 .. 3"):
            run(kind, **fields)
    with pytest.raises(ValueError, match=f"index {wrong} of 4"):
        run("TakeNode", x=x, index=wrong, axis=0)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype):
    x = floats(3, 8, dtype=dtype)
    close(run("GeluNode", x=x, approximate="tanh"), F.gelu(x, approximate="tanh"))
    close(run("GeluNode", x=x, approximate="none"), F.gelu(x))
    close(run("SoftmaxNode", x=x, axis=-1, precise=True), x.softmax(-1))
    close(run("ClipNode", x=x, a_min=torch.tensor(-0.5, dtype=dtype)), x.clamp(min=-0.5))
    close(run("ClipNode", x=x, a_min=torch.tensor(-1, dtype=dtype), a_max=torch.tensor(1, dtype=dtype)), x.clamp(-1, 1))
    close(run("WhereNode", condition=x > 0, x=x, y=torch.zeros((), dtype=dtype)), x.relu())
    close(run("RoundNode", x=x * 3, decimals=0), (x * 3).round())
    with pytest.raises(ValueError, match="approximate = 'erf'"):
        run("GeluNode", x=x, approximate="erf")


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_products(dtype):
    x, w, b = floats(2, 3, 8, dtype=dtype), floats(8, dtype=dtype, seed=1), floats(8, dtype=dtype, seed=2)
    close(run("RMSNormNode", x=x, weight=w, eps=1e-2), F.rms_norm(x, (8,), w, 1e-2))
    close(run("RMSNormNode", x=x, eps=1e-2), F.rms_norm(x, (8,), None, 1e-2))
    close(run("LayerNormNode", x=x, weight=w, bias=b, eps=1e-2), F.layer_norm(x, (8,), w, b, 1e-2))
    matrix = floats(8, 5, dtype=dtype, seed=3)
    close(run("AddmmNode", mat1=x, mat2=matrix, alpha=1.0, beta=1.0), x @ matrix)
    want = (0.5 * b[:5].float() + 2 * (x.float() @ matrix.float())).to(dtype)
    close(run("AddmmNode", mat1=x, mat2=matrix, bias=b[:5], alpha=2.0, beta=0.5), want)
    close(run("AddmmNode", mat1=x, mat2=matrix, alpha=2.0, beta=1.0), (x @ matrix) * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(dtype):
    """Against the exporter's definition of mlx.rope; in bfloat16 both round cos and sin."""
    x = floats(1, 2, 5, 12, dtype=dtype)
    wavelengths = torch.tensor([1.0, 3.0, 90.0, math.inf])
    for fields in ({}, {"base": 100.0, "scale": 0.5}, {"freqs": wavelengths}, {"traditional": True}):
        want = torch.ops.mlx.rope(x, 8, 7, **{"base": 500000.0, **fields})
        for offset in (torch.tensor(7), torch.tensor([7])):
            close(run("RopeNode", x=x, dims=8, offset=offset, **fields), want)
    with pytest.raises(ValueError, match="dims = 14 of 12"):
        run("RopeNode", x=x, dims=14, offset=torch.tensor(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype):
    q, k, v = (
        floats(1, heads, length, 8, dtype=dtype, seed=i) for i, (heads, length) in enumerate(((4, 3), (2, 7), (2, 7)))
    )
    causal = torch.ones(3, 7, dtype=torch.bool).tril(4)
    window = causal & ~torch.ones(3, 7, dtype=torch.bool).tril(1)

    def want(mask: Tensor | None) -> Tensor:
        k_, v_ = (x.float().repeat_interleave(2, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q.float(), k_, v_, mask, scale=0.7).to(dtype)

    close(run("SdpaNode", q=q, k=k, v=v, scale=0.7), want(None))
    close(run("SdpaNode", q=q, k=k, v=v, scale=0.7, causal=True), want(causal))
    close(run("SdpaNode", q=q, k=k, v=v, scale=0.7, mask=window), want(window))
    additive = torch.where(window, 0.0, -math.inf).to(dtype)
    close(run("SdpaNode", q=q, k=k, v=v, scale=0.7, mask=additive), want(window))
    with pytest.raises(ValueError, match="causal, with 7 queries and 3 keys"):
        run("SdpaNode", q=k, k=q[:, :2], v=q[:, :2], scale=1.0, causal=True)


def quantized(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Packed codes, scales and biases as MLX has them, and the matrix that they stand for."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    scales, biases = floats(rows, columns // group, dtype=dtype), floats(rows, columns // group, dtype=dtype, seed=1)
    per_word = 32 // bits
    words = (codes.reshape(rows, -1, per_word) << (torch.arange(per_word) * bits)).sum(-1)
    wide = [x.float().repeat_interleave(group, 1) for x in (scales, biases)]
    return words.to(torch.uint32), scales, biases, codes * wide[0] + wide[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32), (8, 128)])
def test_quantized(bits, group, dtype):
    words, scales, biases, dense = quantized(6, 128, bits, group, dtype)
    fields = {"scales": scales, "biases": biases, "group_size": group, "bits": bits, "mode": "affine"}
    close(run("DequantizeNode", w=words, **fields), dense.to(dtype))
    close(run("DequantizeNode", w=words, **fields, dtype=6), dense, 1e-5 if dtype == torch.float32 else 2e-2)
    x = floats(3, 128, dtype=dtype, seed=5)
    want = (x.float() @ dense.T).to(dtype)
    close(
        run("QuantizedMatmulNode", x=x, w=words, **fields, transpose=True),
        want,
        4e-6 if dtype == torch.float32 else None,
    )
    with pytest.raises(ValueError, match="QuantizedMatmulNode"):
        run("QuantizedMatmulNode", x=x[:, :64], w=words, **fields, transpose=True)


def test_experts():
    """Stacked weights, the chosen ones gathered."""
    x, weights, chosen = floats(4, 1, 64), floats(3, 64, 5, seed=1), torch.tensor([2, 0, 0, 1])
    want = torch.einsum("nmk,nkf->nmf", x, weights[chosen])
    close(run("GatherMmNode", a=x, b=weights, rhs_indices=chosen), want, 1e-5)
    close(
        run("GatherMmNode", a=x, b=weights, rhs_indices=chosen.sort().values, sorted_indices=True),
        torch.einsum("nmk,nkf->nmf", x, weights[chosen.sort().values]),
        1e-5,
    )
    for dtype in (torch.bfloat16, torch.float16):
        half, stack = x.to(dtype), weights.to(dtype)
        want = torch.einsum("nmk,nkf->nmf", half.float(), stack[chosen].float()).to(dtype)
        close(run("GatherMmNode", a=half, b=stack, rhs_indices=chosen), want)
    stacks = [quantized(5, 64, 4, 32, torch.float32) for _ in range(3)]
    words, scales, biases, dense = (
        torch.stack([s[i] * (e + 1 if i else 1) for e, s in enumerate(stacks)]) for i in range(4)
    )
    got = run(
        "GatherQmmNode", x=x, w=words, scales=scales, biases=biases, rhs_indices=chosen, mode="affine",
        transpose=True, group_size=32, bits=4,
    )  # fmt: skip
    close(got, torch.einsum("nmk,nfk->nmf", x, dense[chosen]), 1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims):
    """Channels last, where torch has them first."""
    convolve, groups = ((F.conv1d, 2), (F.conv2d, 2), (F.conv3d, 1))[dims - 1]
    x, w = floats(2, 4, *[7] * dims), floats(6, 4 // groups, *[3] * dims, seed=1)
    suffixes = {1: [""], 2: ["_h", "_w"], 3: ["_d", "_h", "_w"]}[dims]
    fields = {
        f"{name}{s}": value for s in suffixes for name, value in {"stride": 2, "padding": 1, "dilation": 2}.items()
    }
    got = run(f"Conv{dims}DNode", x=x.movedim(1, -1), w=w.movedim(1, -1), groups=groups, **fields)
    close(got.movedim(-1, 1), convolve(x, w, stride=2, padding=1, dilation=2, groups=groups), 1e-5)
    with pytest.raises(ValueError, match="stride = "):
        run(f"Conv{dims}DNode", x=x, w=w, **{f"stride{s}": 0 for s in suffixes})


INTEGERS = {"AddInt": 7 + -3, "SubtractInt": 7 - -3, "MultiplyInt": -21, "FloorDivideInt": -3, "ModInt": -2}


def integer(*nodes, inputs=(), values=4) -> int:
    """The number that a program leaves in its value slot 0."""
    out = Tid(len(inputs))
    program = graph(
        [*nodes, make("FullNode", shape=[], v=Vid(0), scalar_type=6, out=out)], inputs=inputs, values=values
    )
    machine = Machine(pte(program))
    return int(to_torch(machine.run([mx.array(x.numpy()) for x in inputs])[0][0]))


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name):
    COVERED.add(f"{name}Node")
    node = make(f"{name}Node", a=7, b=Vid(1), out=Vid(0))
    x = torch.tensor([[-3]])
    assert integer(make("ItemIntNode", x=Tid(0), out=Vid(1)), node, inputs=[x]) == INTEGERS[name]


def test_sizes_and_items():
    COVERED.update({"SymSizeNode", "ItemIntNode"})
    assert integer(make("SymSizeNode", a=Tid(0), dim=-1, out=Vid(0)), inputs=[floats(2, 5)]) == 5
    with pytest.raises(
        ValueError, match=r"instruction 0 \(ItemIntNode\): an array of shape \(2, 5\) is not one number"
    ):
        integer(make("ItemIntNode", x=Tid(0), out=Vid(0)), inputs=[floats(2, 5)])
    with pytest.raises(ValueError, match=r"instruction 0 \(ModIntNode\): .*zero"):
        integer(make("ModIntNode", a=1, b=0, out=Vid(0)))
    with pytest.raises(ValueError, match=r"instruction 1 \(MultiplyIntNode\): .* does not fit 64 bits"):
        integer(
            make("MultiplyIntNode", a=1 << 40, b=1, out=Vid(0)), make("MultiplyIntNode", a=Vid(0), b=Vid(0), out=Vid(0))
        )


def test_every_node_type_was_run():
    """Of those above; If and Noop are the machine's own."""
    assert set(OPS) - COVERED == set()
