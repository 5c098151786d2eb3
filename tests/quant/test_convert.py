"""To torchao's tensors and back: bit for bit where that is promised, and how far off elsewhere."""

import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("torchao", reason="needs torchao (the quant extra)")
from torchao.quantization import Int4Tensor, IntxUnpackedToInt8Tensor
from torchao.quantization.quant_primitives import MappingType

from gemma4_impl.quant.convert import from_torchao, int4_to_intx, quantize_to_torchao, to_torchao
from gemma4_impl.quant.quantize import SCALE_DTYPES, quantize
from gemma4_impl.quant.recipe import QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor

INT4 = [QuantConfig(4, 32), QuantConfig(4, 32, False), QuantConfig(4, None), QuantConfig(4, 16, False, "hqq")]
INT8 = [QuantConfig(8, None), QuantConfig(8, 32), QuantConfig(8, 32, True, "mse")]
dtypes = st.sampled_from(SCALE_DTYPES)


@st.composite
def tensors(draw: st.DrawFn, bits: int, zero: bool, offset: int | None = None) -> QuantizedTensor:
    """Any codes, scales of any size (both signs, 0 among them), and zeros."""
    shape = (*draw(st.sampled_from([(), (3,)])), draw(st.integers(1, 4)), draw(st.sampled_from([2, 32, 96])))
    group = draw(st.sampled_from([size for size in (2, 16, 32, 96) if shape[-1] % size == 0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(dtypes)
    groups = (*shape[:-1], shape[-1] // group)
    size = 2.0 ** torch.randint(-10, 10, groups, generator=generator)
    scale = (torch.randn(groups, generator=generator) * size).to(dtype)
    if bits == 4:
        qdata = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.uint8)
    else:
        qdata = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    zeros = (torch.randn(groups, generator=generator) * size).to(dtype) if zero else None
    return QuantizedTensor(qdata, scale, zeros, bits, (8 if bits == 4 else 0) if offset is None else offset)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    if (a.zero is None) != (b.zero is None) or (a.bits, a.offset, a.scale.dtype) != (b.bits, b.offset, b.scale.dtype):
        return False
    pairs = [(a.qdata, b.qdata), (a.scale, b.scale)] + ([(a.zero, b.zero)] if a.zero is not None else [])
    return all(torch.equal(x, y) for x, y in pairs)


def float32(t: IntxUnpackedToInt8Tensor) -> Tensor:
    return t.to(torch.float32).dequantize()


def largest_term(q: QuantizedTensor) -> Tensor:
    """The larger of the value and of its zero, element by element, in float64."""
    value = q.dequantize(torch.float64)
    zero = torch.zeros_like(q.scale) if q.zero is None else q.zero
    return torch.maximum(value.abs(), zero.double().abs().repeat_interleave(q.group_size, dim=-1))


class TestInt4:
    @settings(deadline=None)
    @given(st.booleans().flatmap(lambda zero: tensors(4, zero)))
    def test_round_trip(self, q: QuantizedTensor) -> None:
        t = to_torchao(q)
        assert isinstance(t, Int4Tensor)
        assert (t.shape, t.dtype) == (q.shape, q.scale.dtype)
        assert same(from_torchao(t), q)

    @settings(deadline=None)
    @given(st.booleans().flatmap(lambda zero: tensors(4, zero)))
    def test_means_what_torchao_means(self, q: QuantizedTensor) -> None:
        """Signed nibbles, even k low; scale and zero_point [.., K / G, N]; the zero point is added."""
        t = to_torchao(q)
        assert t.qdata.dtype == torch.int8
        assert list(t.block_size) == [1] * (q.qdata.dim() - 1) + [q.group_size]
        assert t.scale.shape == t.zero_point.shape == (*q.shape[:-2], q.shape[-1] // q.group_size, q.shape[-2])
        assert all(part.is_contiguous() for part in (t.qdata, t.scale, t.zero_point))
        # An arithmetic shift of an int8 keeps the sign.
        low, high = (t.qdata << 4) >> 4, t.qdata >> 4
        codes = torch.stack((low, high), -1).flatten(-2).float()
        scale, zero = (part.float().mT.repeat_interleave(q.group_size, -1) for part in (t.scale, t.zero_point))
        assert torch.equal(codes * scale + zero, q.dequantize())

    @settings(deadline=None)
    @given(st.integers(0, 15).flatmap(lambda offset: tensors(4, True, offset)))
    def test_other_offsets_move_into_the_zero(self, q: QuantizedTensor) -> None:
        q = QuantizedTensor(q.qdata, q.scale.float(), q.zero.float(), 4, q.offset)
        back = from_torchao(to_torchao(q))
        assert back.offset == 8
        # The new zero is scale * (8 - offset) + zero, each operation rounded to float32.
        error = (back.dequantize(torch.float64) - q.dequantize(torch.float64)).abs()
        terms = 8 * q.scale.double().abs() + q.zero.double().abs()
        assert (error <= terms.repeat_interleave(q.group_size, -1) * 2**-22).all()

    def test_dtype(self) -> None:
        q = quantize(torch.randn(4, 64), QuantConfig(4, 32, False))
        t = to_torchao(q, torch.bfloat16)
        assert t.dtype == t.scale.dtype == t.zero_point.dtype == torch.bfloat16
        assert torch.equal(from_torchao(t).scale, q.scale.bfloat16())
        assert torch.equal(from_torchao(t).codes(), q.codes())


class TestInt8:
    @settings(deadline=None)
    @given(st.integers(-128, 127).flatmap(lambda offset: tensors(8, False, offset)))
    def test_round_trip(self, q: QuantizedTensor) -> None:
        t = to_torchao(q)
        assert isinstance(t, IntxUnpackedToInt8Tensor)
        assert (t.shape, t.dtype, t.zero_point.dtype) == (q.shape, q.scale.dtype, torch.int8)
        assert same(from_torchao(t), q)

    @settings(deadline=None)
    @given(st.sampled_from([0, -128, 16]).flatmap(lambda offset: tensors(8, False, offset)))
    def test_dequantizes_as_torchao_does(self, q: QuantizedTensor) -> None:
        """Bit for bit, in float32 and, without an offset that bfloat16 would round, in the scales' own dtype."""
        t = to_torchao(q)
        assert torch.equal(float32(t), q.dequantize())
        if q.offset == 0:
            assert torch.equal(t.dequantize(), q.dequantize(q.scale.dtype))

    @settings(deadline=None)
    @given(st.sampled_from([0, 16]).flatmap(lambda offset: tensors(8, True, offset)))
    def test_zero(self, q: QuantizedTensor) -> None:
        """Becomes a float zero point; by how much that is off, and what it comes back as."""
        assume(bool((q.scale != 0).all()))  # see test_zero_without_a_scale
        t = to_torchao(q)
        assert t.zero_point.dtype == torch.float32
        scale = q.scale.double().abs().repeat_interleave(q.group_size, -1)
        allowed = (largest_term(q) + scale * q.offset) * 2**-22
        assert ((float32(t).double() - q.dequantize(torch.float64)).abs() <= allowed).all()
        assert ((from_torchao(t).dequantize(torch.float64) - q.dequantize(torch.float64)).abs() <= allowed).all()

    @settings(deadline=None)
    @given(st.sampled_from([torch.int4, torch.int8]), st.booleans(), st.sampled_from([torch.float16, torch.bfloat16]))
    def test_torchaos_own(self, target: torch.dtype, symmetric: bool, dtype: torch.dtype) -> None:
        """Quantized by torchao, with a zero point for each group: equal to torchao's dequantized values."""
        w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).add_(0 if symmetric else 0.7).to(dtype)
        mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
        t = IntxUnpackedToInt8Tensor.from_hp(w, (1, 32), target, mapping_type=mapping)
        q = from_torchao(t)
        assert q.bits == (4 if target == torch.int4 else 8)
        assert (q.zero is None) == symmetric
        assert torch.equal(q.dequantize(), float32(t))


class TestInt4ToIntx:
    @settings(deadline=None)
    @given(tensors(4, False))
    def test_symmetric_is_lossless(self, q: QuantizedTensor) -> None:
        t = int4_to_intx(to_torchao(q))
        assert (t.target_dtype, t.zero_point.dtype, t.dtype) == (torch.int4, torch.int8, q.scale.dtype)
        assert torch.equal(t.qdata, q.codes().to(torch.int8) - 8)
        assert torch.equal(t.scale, q.scale)
        assert not t.zero_point.any()
        assert torch.equal(float32(t), q.dequantize())
        assert torch.equal(t.dequantize(), q.dequantize(q.scale.dtype))
        assert same(from_torchao(t), q)

    @settings(deadline=None)
    @given(tensors(4, True))
    def test_with_a_zero(self, q: QuantizedTensor) -> None:
        """Codes and scales stay; values are off by rounding in float32."""
        t = int4_to_intx(to_torchao(q))
        assert torch.equal(t.qdata, q.codes().to(torch.int8) - 8)
        assert torch.equal(t.scale, q.scale)
        assert ((float32(t).double() - q.dequantize(torch.float64)).abs() <= largest_term(q) * 2**-22).all()

    def test_zero_without_a_scale(self) -> None:
        q = QuantizedTensor(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, 1), torch.ones(1, 1), 4, 8)
        with pytest.raises(ValueError, match="zero divided by its scale is not finite"):
            int4_to_intx(to_torchao(q))


class TestQuantize:
    @pytest.mark.parametrize("config", INT4 + INT8, ids=str)
    @pytest.mark.parametrize("shape", [(8, 64), (3, 8, 64)])
    def test_is_both_steps(self, config: QuantConfig, shape: tuple[int, ...]) -> None:
        w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        q, t = quantize(w, config), quantize_to_torchao(w, config)
        assert isinstance(t, Int4Tensor if config.bits == 4 else IntxUnpackedToInt8Tensor)
        assert (t.shape, t.dtype) == (w.shape, torch.bfloat16)
        assert same(from_torchao(t), q)

    def test_names_the_tensor(self) -> None:
        with pytest.raises(ValueError, match=r"^a\.weight: holds NaN"):
            quantize_to_torchao(torch.full((2, 32), torch.nan), INT4[0], name="a.weight")

    @pytest.mark.parametrize("config", INT8, ids=str)
    def test_linear(self, config: QuantConfig) -> None:
        """torchao runs what we made."""
        w, x = torch.randn(8, 64), torch.randn(5, 64)
        t = quantize_to_torchao(w, config)
        assert torch.equal(
            torch.nn.functional.linear(x, t), torch.nn.functional.linear(x, quantize(w, config).dequantize())
        )

    def test_torchao_saves_it(self) -> None:
        from torchao.prototype.safetensors.safetensors_support import (
            flatten_tensor_state_dict,
            unflatten_tensor_state_dict,
        )

        state = {f"{i}.weight": quantize_to_torchao(torch.randn(3, 8, 64), c) for i, c in enumerate(INT4 + INT8)}
        loaded, left = unflatten_tensor_state_dict(*flatten_tensor_state_dict(state))
        assert not left
        assert all(same(from_torchao(loaded[name]), from_torchao(t)) for name, t in state.items())


class TestRefused:
    def test_other_classes(self) -> None:
        for convert in (from_torchao, int4_to_intx):
            with pytest.raises(ValueError, match="is a Tensor; expected an Int4Tensor"):
                convert(torch.zeros(2, 2))
        with pytest.raises(ValueError, match="is a IntxUnpackedToInt8Tensor; expected an Int4Tensor"):
            int4_to_intx(quantize_to_torchao(torch.randn(2, 32), INT8[0]))

    def test_activations(self) -> None:
        t = quantize_to_torchao(torch.randn(2, 32), INT4[0])
        t.act_pre_scale = torch.ones(32)
        with pytest.raises(ValueError, match="activations"):
            from_torchao(t)
        t = quantize_to_torchao(torch.randn(2, 32), INT8[0])
        t.activation_quantization = "int8_asym_per_token"
        with pytest.raises(ValueError, match="activations"):
            from_torchao(t)

    def test_other_codes_and_groups(self) -> None:
        w = torch.randn(4, 32)
        with pytest.raises(ValueError, match=r"holds torch\.int3 codes; expected int4 or int8"):
            from_torchao(IntxUnpackedToInt8Tensor.from_hp(w, (1, 32), torch.int3))
        with pytest.raises(ValueError, match=r"block_size \[2, 16\]: only groups along a row"):
            from_torchao(IntxUnpackedToInt8Tensor.from_hp(w, (2, 16), torch.int4))


def test_without_torchao() -> None:
    """The module imports; only a conversion needs torchao, and says where to get it."""
    code = """
import sys, torch
sys.modules["torchao"] = None
from gemma4_impl.quant import convert
from gemma4_impl.quant.recipe import QuantConfig
try:
    convert.quantize_to_torchao(torch.ones(2, 32), QuantConfig(4, 32))
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("torchao is needed for this: pip install 'gemma4-parity[quant]'")
