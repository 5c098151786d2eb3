"""MLX programs made node by node, with the exporter's own serializer."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gemma4_impl.export.mlx.bindings import BACKEND, import_mlx_backend
from gemma4_impl.export.replay.machine import Machine
from gemma4_impl.export.replay.pte import Call, Pte
from gemma4_impl.export.replay.session import to_mlx, to_torch

import_mlx_backend()
OP_NODE_FIELDS = import_module(f"{BACKEND}._generated_inspector").OP_NODE_FIELDS
scalar_type = import_module(f"{BACKEND}.builder.op_helpers").torch_dtype_to_scalar_type
schema = import_module(f"{BACKEND}.serialization.mlx_graph_schema")
serialize_mlx_graph = import_module(f"{BACKEND}.serialization.mlx_graph_serialize").serialize_mlx_graph
Tid, Vid = schema.Tid, schema.Vid


def make(kind: str, **fields: Any) -> Any:
    """A node, its numbers wrapped as the schema has them."""
    wraps = {
        "int_or_vid": schema.IntOrVid,
        "float_or_vid": schema.FloatOrVid,
        "int_or_vid_or_tid": schema.IntOrVidOrTid,
        "vid_or_tid": schema.VidOrTid,
    }

    def wrapped(value: Any, type_: str) -> Any:
        if type_.endswith("_list"):
            return [wrapped(item, type_.removesuffix("_list")) for item in value]
        if type_ not in wraps or value is None:
            return value
        if isinstance(value, Vid):
            return wraps[type_].from_vid(value)
        return wraps[type_].from_tid(value) if isinstance(value, Tid) else wraps[type_].from_literal(value)

    types = {name: type_ for name, _, type_ in OP_NODE_FIELDS[kind]}
    return getattr(schema, kind)(**{name: wrapped(value, types[name]) for name, value in fields.items()})


def graph(
    *chains: list[Any],
    constants: list[Tensor] = (),
    inputs: list[Tensor] = (),
    outputs: int = 1,
    buffers: list[Tensor] = (),
    temps: int = 0,
    values: int = 0,
    init: int = -1,
) -> Any:
    """A graph whose tensor slots are, in this order, constants (`c0`, `c1`, ...), inputs, outputs, buffers, temps."""

    def meta(tensor: Tensor) -> Any:
        return schema.TensorMeta([schema.ShapeDim(size) for size in tensor.shape], scalar_type(tensor.dtype))

    def slots(start: int, count: int) -> list[Any]:
        return [schema.SlotVariant(idx=i, slot_type=0) for i in range(start, start + count)]

    first_out = len(constants) + len(inputs)
    any_meta = meta(torch.zeros(1))
    return schema.MLXGraph(
        instruction_chains=[schema.InstructionChain([schema.Instruction(node) for node in chain]) for chain in chains],
        version="1",
        num_constant_tensors=len(constants),
        num_input_tensors=len(inputs),
        num_output_tensors=outputs,
        num_mutable_buffer_tensors=len(buffers),
        num_temp_tensors=temps,
        num_values=values,
        init_chain_idx=init,
        input_map=slots(len(constants), len(inputs)),
        output_map=slots(first_out, outputs),
        mutable_buffer_map=slots(first_out + outputs, len(buffers)),
        named_slots=[
            schema.NamedSlot(name=f"c{i}", slot=schema.SlotVariant(idx=i, slot_type=0)) for i in range(len(constants))
        ],
        tensor_meta=[
            *(meta(t) for t in (*constants, *inputs)),
            *[any_meta] * outputs,
            *(meta(t) for t in buffers),
        ],
    )


def pte(program: Any, constants: list[Tensor] = ()) -> Pte:
    """The graph, or its payload, as the method `forward` of an open program."""
    payload = program if isinstance(program, bytes) else serialize_mlx_graph(program)
    counts = (3, 1) if isinstance(program, bytes) else (program.num_input_tensors, program.num_output_tensors)
    inputs, outputs = list(range(counts[0])), list(range(counts[0], sum(counts)))
    data = {f"c{i}": memoryview(bytes(t.reshape(-1).view(torch.uint8).numpy())) for i, t in enumerate(constants)}
    return Pte({"forward": Call(payload, [*inputs, *outputs], inputs, outputs)}, {}, {}, data)


def run_node(kind: str, **fields: Any) -> Tensor | list[Tensor]:
    """What one node gives for tensors in the places of its slots; `outs` is the number of its outputs."""
    inputs: list[Tensor] = []
    outs = fields.pop("outs", 0)

    def slot(value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(item, Tensor) for item in value):
            return [slot(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        inputs.append(value)
        return Tid(len(inputs) - 1)

    fields = {name: slot(value) for name, value in fields.items()}
    places = [Tid(len(inputs) + i) for i in range(outs or 1)]
    node = make(kind, **fields, **({"outs": places} if outs else {"out": places[0]}))
    program = graph([node], inputs=inputs, outputs=len(places))
    results, _ = Machine(pte(program)).run([to_mlx(value) for value in inputs])
    results = [to_torch(value) for value in results]
    return results if outs else results[0]
