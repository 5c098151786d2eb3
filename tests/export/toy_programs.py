"""Programs of a few operators that look like an exported model: what the runner must get right, or refuse, shows."""

from collections.abc import Callable
from pathlib import Path

import executorch.kernels.quantized  # noqa: F401  (the operator of `Quantized`)
import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.schema import ExecutionPlan, Int
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

V, S, C = 8, 1000, 4
BOS, EOS, NEVER = 2, (1, 6), 7
SCALE = 0.05
CONSTANTS = {
    "get_max_seq_len": S,
    "get_max_prefill_chunk": C,
    "get_vocab_size": V,
    "get_bos_id": BOS,
    "get_eos_ids": list(EOS),
    "use_kv_cache": 1,
}


def make_table() -> Tensor:
    """Logits [V, V] of all that may be drawn; NEVER's are -inf."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(185))
    table[:, NEVER] = -torch.inf
    return table


class Toy(nn.Module):
    """The logits are a row of `table`: that of the sum of all tokens so far, modulo V. A cache keeps tokens at their
    positions, so one that is lost, doubled or put elsewhere changes what comes next."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("seen", torch.zeros(S, dtype=torch.long))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.seen[positions[0]] = tokens[0]
        return nn.functional.embedding((self.seen.sum() % V).reshape(1, 1), self.table)


class OneMethod(Toy):
    """A Toy that gets the first position only, and returns [1, V]."""

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        return super().forward(tokens, (input_pos + torch.arange(tokens.shape[1]))[None])[0]


class Draws(Toy):
    """A Toy that draws the token itself: the largest logit's, and at a temperature of 0.5 the one before it."""

    def forward(self, tokens: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
        token = super().forward(tokens, positions)[:, 0].argmax(-1)
        return torch.where(temperature == 0.5, token - 1, token)


class Quantized(Toy):
    """A Toy whose table is int8, of the largest numbers that fit; only the quantized kernels can read it."""

    def __init__(self, table: Tensor):
        super().__init__(table)
        self.register_buffer("table", (table.clamp(-4, 4) / SCALE).round().to(torch.int8))
        self.register_buffer("scales", torch.full((V,), SCALE))
        self.register_buffer("zeros", torch.zeros(V))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.seen[positions[0]] = tokens[0]
        index = (self.seen.sum() % V).reshape(1, 1)
        read = torch.ops.quantized_decomposed.embedding_byte
        return read(self.table, self.scales, self.zeros, -128, 127, index)


def greedy(table: Tensor, prompt: list[int], count: int) -> list[int]:
    """What `Toy` continues with: up to `count` ids, or to the first of EOS."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(table[sum(tokens) % V].argmax()))
        if tokens[-1] in EOS:
            break
    return tokens[len(prompt) :]


def prefill(toy: Toy) -> ExportedProgram:
    length = {1: Dim("length", min=2, max=C)}
    return export(toy, (torch.zeros(1, 3, dtype=torch.long), torch.arange(3)[None]), dynamic_shapes=(length, length))


def decode(toy: nn.Module, *more: Tensor) -> ExportedProgram:
    return export(toy, (torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), *more))


def forward(module: OneMethod) -> ExportedProgram:
    inputs = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    return export(module, inputs, dynamic_shapes=({1: Dim("length", min=1, max=C)}, None))


def lower(methods: dict[str, ExportedProgram], shared: bool = True, **constants: object) -> bytes:
    """model.pte; `shared` is whether its methods share their caches."""
    edge = to_edge(
        methods,
        constant_methods=CONSTANTS | constants,
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    planning = MemoryPlanningPass(share_mutable_buffers=shared)
    return bytes(edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer)


def edited(data: bytes, change: Callable[[dict[str, ExecutionPlan]], object]) -> bytes:
    """A program with its methods changed: `change` gets them by name, in a dict from which it may also remove them."""
    file = deserialize_pte_binary(data)
    plans = {plan.name: plan for plan in file.program.execution_plan}
    change(plans)
    file.program.execution_plan = list(plans.values())
    return bytes(serialize_pte_binary(file))


def set_constant(name: str, *numbers: int) -> Callable[[dict[str, ExecutionPlan]], None]:
    """An edit: the constant's numbers, as many as it had."""

    def change(plans: dict[str, ExecutionPlan]) -> None:
        for value, number in zip(plans[name].values, numbers, strict=True):
            value.val = Int(number)

    return change


def save(folder: Path, data: bytes) -> Path:
    folder.mkdir()
    (folder / "model.pte").write_bytes(data)
    return folder
