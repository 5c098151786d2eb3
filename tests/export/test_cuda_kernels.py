"""What a compiler for CUDA makes of our operators, without a GPU: on fake tensors, by a Triton that runs nothing."""

import os

import pytest
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton", reason="needs the package triton")

from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gemma4_impl.kernels import cuda  # noqa: E402
from gemma4_impl.kernels.int4_linear import operators as linears  # noqa: E402
from gemma4_impl.kernels.int4_linear.triton import codes_of_unit, config, dequantize_kernel, matvec_kernel  # noqa: E402
from gemma4_impl.kernels.sdpa import operators as attention  # noqa: E402
from gemma4_impl.kernels.sdpa import triton as sdpa  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)


class Compiler:
    """A Triton driver without a device."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch):
    """An H100 to whoever asks."""
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(sdpa, "_shared_memory", lambda device: 232_448)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Compiler())
    yield
    triton.runtime.driver._active = before


def expanded(operator, *args) -> tuple[Graph, list[str]]:
    """What AOTInductor takes in for a call, and the Triton kernels in it by name."""
    tensors = [a for a in args if isinstance(a, Tensor)]

    def call(*tensors: Tensor) -> Tensor:
        left = iter(tensors)
        return operator(*(next(left) if isinstance(a, Tensor) else a for a in args))

    with enable_python_dispatcher():
        graph = make_fx(dispatch_functionalize(call))(*tensors).graph
    wrapped = [n for n in graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_functional]
    return graph, [kernel_side_table.get_kernel(n.kwargs["kernel_idx"]).fn.__name__ for n in wrapped]


def mutated(graph: Graph) -> list[list[str]]:
    """Of each kernel, the tensors that Triton's own analysis finds written."""
    wrapped = [n for n in graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_functional]
    return [list(n.kwargs["tensors_to_clone"]) for n in wrapped]


def weight(bits: int, *shape: int, group: int = 32) -> tuple[Tensor, Tensor]:
    *lead, K = shape
    codes = torch.empty(*lead, K * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8, device="cuda")
    return codes, torch.empty(*lead, K // group, dtype=torch.bfloat16, device="cuda")


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def test_one_row_is_one_kernel(hopper) -> None:
    with FakeTensorMode():
        codes, scale = weight(4, 21504, 5376)
        graph, kernels = expanded(linears.quantized_linear, tensor(1, 1, 5376), codes, scale, None, 4, 8)
    assert kernels == ["matvec_kernel"]
    assert mutated(graph) == [["out_ptr"]]
    assert not any("gemma4" in str(node.target) or "mm" in str(node.target) for node in graph.nodes)


def test_several_rows_are_dequantized_first(hopper) -> None:
    with FakeTensorMode():
        codes, scale = weight(4, 21504, 5376)
        graph, kernels = expanded(linears.quantized_linear, tensor(1, 7, 5376), codes, scale, scale, 4, 0)
    assert kernels == ["dequantize_kernel"]
    assert mutated(graph) == [["out_ptr"]]
    assert [str(n.target) for n in graph.nodes if "mm" in str(n.target)] == ["aten.mm.default"]


def test_experts(hopper) -> None:
    with FakeTensorMode():
        codes, scale = weight(8, 128, 704, 2816)
        index = tensor(8, dtype=torch.int64)
        graph, kernels = expanded(linears.quantized_experts, tensor(1, 2816), codes, scale, None, 8, 0, index)
        _, dense = expanded(linears.dequantize, codes, scale, None, 8, 0, torch.bfloat16)
    assert (kernels, dense) == (["matvec_kernel"], ["dequantize_kernel"])
    assert mutated(graph) == [["out_ptr"]]


def test_decode_is_split_and_combined(hopper) -> None:
    """Over as many parts as fill the GPU, whatever the length is: that the kernel reads on the device."""
    with FakeTensorMode():
        q, k = tensor(1, 32, 1, 512), tensor(1, 4, 32_769, 512).narrow(2, 0, 32_768)
        length = tensor(1, dtype=torch.int32)
        graph, kernels = expanded(attention.sdpa_decode, q, k, k, length, None, None, 1.0)
    assert kernels == ["decode_kernel", "combine_kernel"]
    assert mutated(graph) == [["workspace_ptr"], ["out_ptr"]]
    first = next(n for n in graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_functional)
    assert first.kwargs["grid"] == [(132 // 4, 4, 1)]
    assert not any("gemma4" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("ring", [False, True])
def test_prefill_is_one_kernel(ring: bool, hopper) -> None:
    with FakeTensorMode():
        q, k = tensor(1, 32, 100, 256), tensor(1, 16, 3072, 256).narrow(2, 0, 3071)
        at, stored = tensor(1, 100, dtype=torch.int64), tensor(1, 3071, dtype=torch.int64) if ring else None
        graph, kernels = expanded(attention.sdpa_prefill, q, k, k, at, stored, None, 1024 if ring else None, 1.0)
    assert kernels == ["prefill_kernel"]
    assert mutated(graph) == [["out_ptr"]]


@pytest.mark.parametrize(
    ("bits", "group", "zero", "experts"), [(4, 32, True, False), (8, 5376, False, False), (4, 128, False, True)]
)
def test_linears_compile_for_hopper(bits: int, group: int, zero: bool, experts: bool) -> None:
    """At the sizes of the 31B: without spilling more shared memory than a block has."""
    pointers = {"x_ptr": "*bf16", "scale_ptr": "*bf16", "out_ptr": "*bf16", "codes_ptr": "*u8" if bits == 4 else "*i8"}
    codes = codes_of_unit(bits, group)
    block_n, block_u, warps = config(21504, 5376 // codes)
    shared = {"GROUP": group, "BITS": bits, "OFFSET": 8, "ZERO": zero, "zero_ptr": None, "experts_ptr": None}
    pointers |= {"zero_ptr": "*bf16"} if zero else {}
    pointers |= {"experts_ptr": "*i64"} if experts else {}
    sizes = {
        "N": 21504,
        "K": 5376,
        "X_STRIDE": 0,
        "EXPERTS": experts,
        "LOG_CODES": codes.bit_length() - 1,
        "BLOCK_N": block_n,
        "BLOCK_U": block_u,
    }
    for kernel, constants in ((matvec_kernel, sizes), (dequantize_kernel, {"SIZE": 21504 * 5376, "BLOCK": 4096})):
        constants = {name: value for name, value in (shared | constants).items() if name in kernel.arg_names}
        constants = {name: value for name, value in constants.items() if name not in pointers}
        source = ASTSource(
            fn=kernel,
            signature={name: "constexpr" if name in constants else pointers[name] for name in kernel.arg_names},
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in pointers if n in kernel.arg_names},
        )
        compiled = triton.compile(source, target=HOPPER, options={"num_warps": warps if kernel is matvec_kernel else 4})
        assert compiled.metadata.shared <= 48 << 10
        assert "ld.global" in compiled.asm["ptx"]
        # Codes are multiplied as subnormal numbers, which must not be flushed to zero.
        assert ".ftz" not in compiled.asm["ptx"]
