"""`StreamWriter` against the safetensors library: the same tensors, whatever their order, sizes and pieces."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from gemma4_impl.quant.container import CODES, StreamWriter, nbytes

specs = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.tuples(st.sampled_from(list(CODES)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    max_size=6,
)


def content(spec, seed: int) -> torch.Tensor:
    """Any bits, but for bool, which has two values."""
    generator = torch.Generator().manual_seed(seed)
    dtype, shape = spec
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randint(0, 256, (nbytes(spec),), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


@settings(max_examples=150, deadline=None)
@given(specs, st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3), st.data())
def test_the_library_reads_what_was_written(specs, metadata, data):
    tensors = {name: content(spec, i) for i, (name, spec) in enumerate(specs.items())}
    pieces = []
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        cuts = sorted(data.draw(st.lists(st.integers(0, len(flat)), max_size=3)))
        pieces.append([(name, flat[a:b]) for a, b in zip([0, *cuts], [*cuts, len(flat)], strict=True)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        with StreamWriter(path, specs, metadata) as writer:
            while any(pieces):
                # Pieces of one tensor stay in order, those of different tensors are mixed.
                queue = data.draw(st.sampled_from([queue for queue in pieces if queue]))
                writer.write(*queue.pop(0))
        read = load_file(path)
        with safe_open(path, "pt") as handle:
            assert (handle.metadata() or {}) == metadata
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert read[name].flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()


def test_every_tensor_is_aligned(tmp_path):
    specs = {"a": (torch.int8, (3,)), "b": (torch.float32, (1,)), "c": (torch.bfloat16, (1,)), "d": (torch.int64, (1,))}
    path = tmp_path / "a.safetensors"
    with StreamWriter(path, specs, {"odd": "é"}) as writer:
        for name, (dtype, shape) in specs.items():
            writer.write(name, torch.ones(shape, dtype=dtype))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, (dtype, _) in specs.items():
        assert (8 + length + header[name]["data_offsets"][0]) % dtype.itemsize == 0


def test_views_are_written_as_they_are_seen(tmp_path):
    x = torch.arange(12, dtype=torch.float32).view(3, 4)
    with StreamWriter(tmp_path / "a", {"x": (torch.float32, (4, 3))}, {}) as writer:
        writer.write("x", x.mT)
    assert torch.equal(load_file(tmp_path / "a")["x"], x.mT)


def test_what_does_not_fit(tmp_path):
    specs = {"x": (torch.float32, (4,))}
    with pytest.raises(ValueError, match="x: 20 bytes"), StreamWriter(tmp_path / "a", specs, {}) as writer:
        writer.write("x", torch.ones(5))
    with (
        pytest.raises(ValueError, match=r"x: 16 bytes of torch\.int32"),
        StreamWriter(tmp_path / "a", specs, {}) as writer,
    ):
        writer.write("x", torch.ones(4, dtype=torch.int32))
    with (
        pytest.raises(ValueError, match="x was not written to its end"),
        StreamWriter(tmp_path / "a", specs, {}) as writer,
    ):
        writer.write("x", torch.ones(3))


def test_an_error_within_is_the_one_that_is_raised(tmp_path):
    with pytest.raises(KeyError), StreamWriter(tmp_path / "a", {"x": (torch.float32, (4,))}, {}):
        raise KeyError
    with pytest.raises(SafetensorError):  # and the file is not taken for a complete one
        load_file(tmp_path / "a")
