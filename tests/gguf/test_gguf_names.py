"""GGUF names: one for each tensor of every released model, both ways, and the same as gguf-py's."""

import re

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma4_impl.config import VARIANTS
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.names import GGUF_ROPE_FREQS, from_gguf, from_hf, held_by_gguf, to_gguf, to_hf

# The converter writes these itself; gguf-py's map does not have them.
NOT_IN_THE_MAP = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}


def names_of(variant: str) -> list[str]:
    """Every tensor a checkpoint may hold: also the unused projections of layers that share others' keys."""
    config = VARIANTS[variant]
    with torch.device("meta"):
        names = list(Gemma4(config).state_dict())
    for layer in config.layers:
        if layer.kv_shared:
            names += [f"layers.{layer.index}.self_attn.{part}.weight" for part in ("k_proj", "v_proj", "k_norm")]
    return names


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_ways_agree(variant):
    names = names_of(variant)
    theirs = [to_gguf(name) for name in names]
    assert [from_gguf(name) for name in theirs] == names
    assert [held_by_gguf(name) for name in theirs] == [(name,) for name in names]
    assert len(set(theirs)) == len(names)
    assert all(len(name.encode()) < 64 for name in theirs), "what ggml can hold"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_names_are_gguf_pys(variant):
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, VARIANTS[variant].num_hidden_layers)
    for name in names_of(variant):
        layer, leaf = re.fullmatch(r"(layers\.\d+\.)?(.*)", name).groups()
        if leaf in NOT_IN_THE_MAP:
            assert to_gguf(name) == f"blk.{layer.split('.')[1]}.{NOT_IN_THE_MAP[leaf]}"
            continue
        stem = to_hf(name).removesuffix(".weight")
        assert to_gguf(name) == known.get_name(stem) + ".weight", name


def test_every_tensor_of_the_architecture_is_known():
    """gguf-py's list of what a Gemma 4 file may hold."""
    for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GEMMA4]:
        name = gguf.TENSOR_NAMES[kind].format(bid=3) + ".weight"
        assert held_by_gguf(name) or name == GGUF_ROPE_FREQS, name


def test_parts_and_joined_tensors():
    for name in ("blk.3.ffn_gate_exps.weight", "blk.3.ffn_up_exps.weight"):
        assert held_by_gguf(name) == ("layers.3.experts.gate_up_proj",)
        assert from_gguf(name) is None
    parts = tuple(f"layers.3.self_attn.{part}_proj.weight" for part in "qkv")
    assert held_by_gguf("blk.3.attn_qkv.weight") == parts
    assert from_gguf("blk.3.attn_qkv.weight") is None


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "blk",
            "blk.",
            "blk.3",
            "blk.3.",
            "blk.x.attn_q.weight",
            "blk.-1.attn_q.weight",
            "blk..attn_q.weight",
        ),
        *("blk.03.attn_q.weight", "blk.00.attn_q.weight", "blk.\u0663.attn_q.weight", "blk.3 .attn_q.weight"),
        *("blk.3.attn_q", "blk.3.attn_q.bias", "blk.3.attn_q.scale", "blk.3.token_embd.weight", "attn_q.weight"),
        *(
            "rope_freqs.weight",
            "token_embd",
            "layers.3.self_attn.q_proj.weight",
            "v.blk.0.attn_q.weight",
            "mm.0.weight",
        ),
    ],
)
def test_names_that_gemma_does_not_have(name):
    assert from_gguf(name) is None
    assert held_by_gguf(name) == ()


@pytest.mark.parametrize(
    "name", ["", "layers", "layers.x.layer_scalar", "layers.01.layer_scalar", "layers.1", "blk.1.x", "bias"]
)
def test_names_that_are_not_canonical(name):
    with pytest.raises(ValueError, match="is no tensor of Gemma 4's text model"):
        to_gguf(name)


PIECES = st.sampled_from(
    ["blk", ".", "3", "0", "attn_q", "weight", "ffn_up_exps", "layers", "token_embd", "scale", "\n"]
)


@given(st.text(max_size=30) | st.lists(PIECES, max_size=8).map("".join))
def test_any_name(name):
    ours = from_gguf(name)
    if ours is not None:
        assert to_gguf(ours) == name
        assert from_hf(to_hf(ours)) == ours
        assert held_by_gguf(name) == (ours,)
