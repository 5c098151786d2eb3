"""The Triton attention kernels compile for a Hopper GPU where there is none, and fit its shared memory."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton", reason="needs the package triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gemma4_impl.kernels.sdpa import triton as launch  # noqa: E402
from gemma4_impl.kernels.sdpa.triton_kernels import combine_kernel, decode_kernel, prefill_kernel  # noqa: E402

SHARED = 232_448
POINTERS = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("q_positions_ptr", "k_positions_ptr", "ends_ptr"), "*i64"),
    "workspace_ptr": "*fp32",
    "length_ptr": "*i32",
}
CONTIGUOUS = dict.fromkeys(("q_h", "k_h", "v_h", "out_h", "length_b"), 1)
NO_POSITIONS = dict.fromkeys(("q_positions_ptr", "k_positions_ptr", "ends_ptr"))
WITH_POSITIONS = dict.fromkeys(("qp_t", "kp_s", "ends_t"), 1)


def compiled(kernel, constants: dict, num_warps: int, num_stages: int, size: str, number: str):
    """`size` and `number` are the types of integers and of the scale; strides are multiples of 16."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: POINTERS.get(name) or (number if name == "scale" else size) for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if name not in constants and (name in POINTERS or name[-2:-1] == "_")]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.fixture(autouse=True)
def hopper(monkeypatch) -> None:
    monkeypatch.setattr(launch, "_shared_memory", lambda device: SHARED)


# As a launch passes them, and as AOTInductor does.
ARGUMENTS = pytest.mark.parametrize(("size", "number"), [("i32", "fp32"), ("i64", "fp64")])


@ARGUMENTS
@pytest.mark.parametrize(("H", "positions"), [(256, True), (512, False), (512, True)])
def test_prefill(H: int, positions: bool, size: str, number: str) -> None:
    c = launch.prefill_config(H, torch.bfloat16, torch.device("cuda"), positions)
    constants = {
        **CONTIGUOUS,
        **(WITH_POSITIONS if positions else NO_POSITIONS),
        **dict.fromkeys(("HAS_Q_POSITIONS", "HAS_K_POSITIONS", "HAS_ENDS"), positions),
        **{"H": H, "BLOCK_H": H, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "V_PARTS": c.v_parts},
        **{"WIDE": False, "PRECISION": "tf32"},
    }
    assert compiled(prefill_kernel, constants, c.num_warps, c.num_stages, size, number).metadata.shared <= SHARED


@ARGUMENTS
@pytest.mark.parametrize(("H", "rows", "positions"), [(512, 8, False), (512, 64, False), (256, 2, True)])
def test_decode(H: int, rows: int, positions: bool, size: str, number: str) -> None:
    c = launch.decode_config(rows, H, torch.bfloat16, torch.device("cuda"))
    constants = {
        **CONTIGUOUS,
        **(WITH_POSITIONS if positions else NO_POSITIONS),
        **{"HAS_Q_POSITIONS": False, "HAS_K_POSITIONS": positions, "HAS_LENGTH": True, "EARLY": number == "fp32"},
        **{"H": H, "BLOCK_H": H, "BLOCK_N": c.block_n, "BLOCK_R": max(16, rows), "BLOCK_S": 32},
        **{"WIDE": False, "PRECISION": "tf32"},
    }
    assert compiled(decode_kernel, constants, c.num_warps, c.num_stages, size, number).metadata.shared <= SHARED
    assert compiled(combine_kernel, constants | {"BLOCK_H": 128}, 4, 2, size, number).metadata.shared <= SHARED
