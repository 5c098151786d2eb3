"""The attention operators: what torch.library demands of them, torch.export and torch.compile."""

import pytest
import torch
from kernel_checks import normal
from torch import Tensor, nn
from torch.library import opcheck

from gemma4_impl.kernels.sdpa import naive, operators
from gemma4_impl.kernels.sdpa.dispatch import sdpa

Q, K, V = normal(2, 4, 5, 16, seed=1), normal(2, 2, 9, 16, seed=2), normal(2, 2, 9, 16, seed=3)
LENGTH = torch.tensor([9, 14], dtype=torch.int32)
POSITIONS = naive.known_positions(Q, K, LENGTH)
PREFILL, DECODE = torch.ops.gemma4.sdpa_prefill.default, torch.ops.gemma4.sdpa_decode.default


class Both(nn.Module):
    """Operators and the projections around them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, length: Tensor, at: Tensor, keys: Tensor) -> Tensor:
        out = operators.sdpa_prefill(self.inner(q), k, v, at, keys, at, 4, 0.5)
        out = out + operators.sdpa_prefill(q, k, v) + operators.sdpa_decode(q, k, v, length)
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (PREFILL, (Q, K, V)),
        (PREFILL, (Q, K, V, *POSITIONS, POSITIONS[0] + 2, 4, 0.5)),
        (PREFILL, (Q.transpose(1, 2).contiguous().transpose(1, 2), K, V, None, None, None, 3)),
        (DECODE, (Q, K, V, LENGTH)),
        (DECODE, (Q.bfloat16(), K.bfloat16(), V.bfloat16(), LENGTH, POSITIONS[1], 6, 0.25)),
    ],
)
def test_opcheck(op, args) -> None:
    opcheck(op, args)


def test_values() -> None:
    at, keys = POSITIONS
    truth = naive.sdpa(Q, K, V, at, keys, ends=at + 2, window=4, scale=0.5)
    assert torch.equal(PREFILL(Q, K, V, at, keys, at + 2, 4, 0.5), truth)
    assert torch.equal(DECODE(Q, K, V, LENGTH), naive.sdpa(Q, K, V, at, keys))


def test_export_keeps_them_whole() -> None:
    """On any machine, with dynamic lengths; the exported program computes the same."""
    model = Both().requires_grad_(False)
    inputs = (Q, K, V, LENGTH, *POSITIONS)
    T, S = torch.export.Dim("T", min=2, max=64), torch.export.Dim("S", min=2, max=64)
    shapes = ({2: T}, {2: S}, {2: S}, None, {1: T}, {1: S})
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    for exported in (program, program.run_decompositions()):
        names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        assert names.count("gemma4.sdpa_prefill.default") == 2
        assert names.count("gemma4.sdpa_decode.default") == 1
    longer = (normal(2, 4, 7, 16, seed=4), *(normal(2, 2, 20, 16, seed=seed) for seed in (5, 6)), LENGTH)
    longer = (*longer, *naive.known_positions(longer[0], longer[1], LENGTH))
    torch.testing.assert_close(program.module()(*longer), model(*longer))


def test_compile() -> None:
    model = Both().requires_grad_(False)
    inputs = (Q, K, V, LENGTH, *POSITIONS)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs), model(*inputs))


@pytest.mark.parametrize("arguments", [{}, {"length": LENGTH, "window": 4}, {"ends": POSITIONS[0] + 1, "scale": 0.5}])
def test_the_dispatcher_becomes_an_operator(arguments: dict) -> None:
    class Dispatched(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa(q, k, v, **arguments)

    program = torch.export.export(Dispatched(), (Q, K, V))
    assert any("gemma4.sdpa_" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(Q, K, V), sdpa(Q, K, V, **arguments))
    compiled = torch.compile(Dispatched(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(Q, K, V), sdpa(Q, K, V, **arguments))
