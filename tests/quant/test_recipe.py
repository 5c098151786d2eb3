"""Recipes: what each built-in one gives for every tensor of the released sizes, what matches, what is refused."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gemma4_impl.config import VARIANTS
from gemma4_impl.model.decoder import Gemma4, ScaledEmbedding
from gemma4_impl.model.moe import Experts, Router
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import (
    METHODS,
    RECIPES,
    QuantConfig,
    QuantRecipe,
    QuantRule,
    RecipeError,
    load_recipe,
    plan,
    untied_shapes,
)

INT4, INT8 = QuantConfig(4, 32), QuantConfig(8, None)
HQQ = QuantConfig(4, 32, symmetric=False, method="hqq")
COMPACT = QuantConfig(4, 64, symmetric=False, method="mse")
EVERYWHERE = {"default": INT4, "sensitive": HQQ, "compact": COMPACT}
# The first and last eighth of the layers, rounded up.
EDGES = {"E2B": 5, "E4B": 6, "26B-A4B": 4, "31B": 8}


def one_rule(config: QuantConfig | None, pattern: str = "*", layers: str | None = None) -> QuantRecipe:
    return QuantRecipe("mine", (QuantRule(pattern, config, layers),))


def weights_of(model: nn.Module, *kinds: type[nn.Module]) -> set[str]:
    """Names of the parameters of all modules of these classes, but for what a router holds."""
    routers = {name for name, module in model.named_modules() if isinstance(module, Router)}
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {
        f"{name}.{leaf}"
        for name, module in modules.items()
        if not any(name.startswith(router) for router in routers)
        for leaf, _ in module.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor(variant: str, recipe: str) -> None:
    """Against the modules themselves: linears and experts in 4 bits, the head too; embeddings in 8; nothing else."""
    with torch.device("meta"):
        model = Gemma4(VARIANTS[variant])
    depth, edge = VARIANTS[variant].num_hidden_layers, EDGES[variant]
    embeddings = weights_of(model, ScaledEmbedding)
    expected = dict.fromkeys(model.state_dict(), None) | dict.fromkeys(embeddings, INT8)
    expected |= dict.fromkeys(weights_of(model, nn.Linear, Experts) | {"lm_head.weight"}, EVERYWHERE[recipe])
    if recipe == "sensitive":
        for name in expected:
            layer = re.match(r"layers\.(\d+)\..*\.(k_proj|v_proj|down_proj)", name)
            if layer and not edge <= int(layer[1]) < depth - edge:
                expected[name] = INT8
    assert plan(RECIPES[recipe], VARIANTS[variant]) == expected


# (tensors in 4 bits, in 8 bits, kept), and bytes with scales and kept tensors of 16 bits.
SUMMARY = {
    ("E2B", "default"): (277, 2, 262, 4_035_287_622),
    ("E2B", "sensitive"): (257, 22, 262, 4_232_645_190),
    ("E2B", "compact"): (277, 2, 262, 4_035_287_622),
    ("E4B", "default"): (344, 2, 320, 6_104_012_884),
    ("E4B", "sensitive"): (320, 26, 320, 6_519_177_300),
    ("E4B", "compact"): (344, 2, 320, 6_104_012_884),
    ("26B-A4B", "default"): (266, 1, 391, 14_948_915_260),
    ("26B-A4B", "sensitive"): (235, 32, 391, 17_341_605_948),
    ("26B-A4B", "compact"): (266, 1, 391, 14_948_915_260),
    ("31B", "default"): (411, 1, 421, 18_678_981_240),
    ("31B", "sensitive"): (366, 46, 421, 21_518_594_680),
    ("31B", "compact"): (411, 1, 421, 18_678_981_240),
}


@pytest.mark.parametrize(("variant", "recipe"), SUMMARY)
def test_summary(variant: str, recipe: str) -> None:
    shapes = untied_shapes(VARIANTS[variant])
    configs = plan(RECIPES[recipe], VARIANTS[variant])
    counts = Counter(config and config.bits for config in configs.values())
    size = sum(c.nbytes(shapes[name]) if c else 2 * math.prod(shapes[name]) for name, c in configs.items())
    assert (counts[4], counts[8], counts[None], size) == SUMMARY[variant, recipe]


SPOTS = [
    ("E2B", "default", "embed_tokens_per_layer.weight", INT8),
    ("E2B", "default", "per_layer_model_projection.weight", INT4),
    ("E2B", "default", "layers.34.per_layer_projection.weight", INT4),
    ("E2B", "default", "layers.0.per_layer_input_gate.weight", INT4),
    ("E2B", "default", "per_layer_projection_norm.weight", None),
    ("E2B", "sensitive", "layers.4.self_attn.v_proj.weight", INT8),
    ("E2B", "sensitive", "layers.5.self_attn.v_proj.weight", HQQ),
    ("E2B", "sensitive", "layers.29.mlp.down_proj.weight", HQQ),
    ("E2B", "sensitive", "layers.30.mlp.down_proj.weight", INT8),
    ("31B", "default", "lm_head.weight", INT4),
    ("31B", "default", "layers.0.layer_scalar", None),
    ("31B", "sensitive", "layers.5.self_attn.k_proj.weight", INT8),
    ("31B", "sensitive", "layers.5.self_attn.q_proj.weight", HQQ),
    ("26B-A4B", "default", "layers.3.experts.gate_up_proj", INT4),
    ("26B-A4B", "sensitive", "layers.3.experts.down_proj", INT8),
    ("26B-A4B", "sensitive", "layers.4.experts.down_proj", HQQ),
    ("26B-A4B", "compact", "layers.29.experts.down_proj", COMPACT),
    ("26B-A4B", "default", "layers.0.router.proj.weight", None),
    ("26B-A4B", "default", "layers.0.router.per_expert_scale", None),
]


@pytest.mark.parametrize(("variant", "recipe", "name", "expected"), SPOTS)
def test_spots(variant: str, recipe: str, name: str, expected: QuantConfig | None) -> None:
    shape = untied_shapes(VARIANTS[variant])[name]
    assert RECIPES[recipe].config_for(name, shape, VARIANTS[variant]) == expected


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, None), (8, 16), (4, None)])
def test_nbytes(bits: int, group_size: int | None, symmetric: bool) -> None:
    config = QuantConfig(bits, group_size, symmetric)
    weight = torch.randn(3, 8, 64)
    assert config.nbytes(weight.shape, 4) == quantize(weight, config).nbytes
    assert config.nbytes(weight.shape) == quantize(weight.bfloat16(), config).nbytes


class TestRules:
    E2B = VARIANTS["E2B"]

    def test_first_match_wins(self) -> None:
        rules = (QuantRule("*.v_proj.weight", INT8, "0"), QuantRule("*_proj.weight", None), QuantRule("*", INT4))
        recipe = QuantRecipe("mine", rules)
        for name, expected in {
            "layers.0.self_attn.v_proj.weight": INT8,
            "layers.1.self_attn.v_proj.weight": None,
            "lm_head.weight": INT4,
        }.items():
            assert recipe.config_for(name, (64, 64), self.E2B) == expected

    def test_pattern_is_for_the_whole_name(self) -> None:
        assert QuantRule("embed_tokens.weight", INT8).matches("embed_tokens.weight", 1)
        assert not QuantRule("embed_tokens", INT8).matches("embed_tokens.weight", 1)
        assert not QuantRule("q_proj.weight", INT8).matches("layers.0.self_attn.q_proj.weight", 1)
        assert not QuantRule("Embed_tokens.weight", INT8).matches("embed_tokens.weight", 1)

    def test_layers_leave_out_what_is_in_none(self) -> None:
        assert not QuantRule("*", INT4, "0:").matches("lm_head.weight", 35)

    @settings(deadline=None)
    @given(st.integers(1, 70), st.data())
    def test_layers_are_slices(self, depth: int, data: st.DataObject) -> None:
        bound = st.none() | st.integers(-80, 80)
        start, stop, step = data.draw(bound), data.draw(bound), data.draw(st.none() | st.integers(1, 9))
        spec = ":".join("" if part is None else str(part) for part in (start, stop, step))
        rule = QuantRule("*", INT4, f" {spec} , {spec}")
        expected = set(range(depth)[start:stop:step])
        names = [f"layers.{i}.mlp.up_proj.weight" for i in range(depth)]
        if not expected:
            with pytest.raises(ValueError, match=f"none of the model's {depth} layers"):
                rule.matches(names[0], depth)
        else:
            assert {i for i, name in enumerate(names) if rule.matches(name, depth)} == expected

    @settings(deadline=None)
    @given(st.integers(1, 70), st.integers(-80, 80))
    def test_layers_are_indices(self, depth: int, index: int) -> None:
        rule = QuantRule("*", INT4, str(index))
        names = [f"layers.{i}.mlp.up_proj.weight" for i in range(depth)]
        if -depth <= index < depth:
            assert [i for i, name in enumerate(names) if rule.matches(name, depth)] == [range(depth)[index]]
        else:
            with pytest.raises(ValueError, match=f"the model has {depth} layers, and no layer {index}"):
                rule.matches(names[0], depth)

    @settings(deadline=None)
    @given(st.integers(1, 200))
    def test_edge_is_an_eighth_on_either_side(self, depth: int) -> None:
        rule = QuantRule("*", INT4, "edge")
        chosen = {i for i in range(depth) if rule.matches(f"layers.{i}.mlp.up_proj.weight", depth)}
        assert chosen == {depth - 1 - i for i in chosen}
        first = {i for i in chosen if 2 * i < depth}
        assert first == set(range(len(first)))
        assert depth / 8 <= len(first) < depth / 8 + 1

    def test_union_of_layers(self) -> None:
        rule = QuantRule("*", INT4, "edge, 10, -12:-10")
        chosen = [i for i in range(35) if rule.matches(f"layers.{i}.x", 35)]
        assert chosen == [0, 1, 2, 3, 4, 10, 23, 24, 30, 31, 32, 33, 34]


class TestRefused:
    E2B, MOE = VARIANTS["E2B"], VARIANTS["26B-A4B"]

    def test_no_rule(self) -> None:
        recipe = QuantRecipe("mine", RECIPES["default"].rules[:-1])
        with pytest.raises(
            RecipeError, match=r"'mine': no rule matches lm_head\.weight; add one with pattern = 'lm_he"
        ):
            plan(recipe, self.E2B)
        recipe = QuantRecipe("mine", (RECIPES["default"].rules[0], QuantRule("*_proj.weight", INT4, ":34")))
        with pytest.raises(RecipeError, match=r"no rule matches per_layer_model_projection\.weight"):
            plan(recipe, self.E2B)
        with pytest.raises(
            RecipeError, match=r"matches layers\.34\.self_attn\.q_proj\.weight; .* '\*\.self_attn\.q_proj"
        ):
            recipe.config_for("layers.34.self_attn.q_proj.weight", (2048, 1536), self.E2B)

    @pytest.mark.parametrize(
        "name",
        [
            "norm.weight",
            "layers.0.input_layernorm.weight",
            "layers.0.layer_scalar",
            "layers.0.self_attn.q_norm.weight",
            "layers.0.router.proj.weight",
            "layers.0.router.scale",
            "layers.0.router.per_expert_scale",
        ],
    )
    def test_rule_for_what_stays(self, name: str) -> None:
        shape = untied_shapes(self.MOE)[name]
        with pytest.raises(RecipeError, match=rf"rule 1 \({name!r}\) would quantize {re.escape(name)}: norms, scalars"):
            one_rule(INT8, name).config_for(name, shape, self.MOE)
        assert one_rule(None, name).config_for(name, shape, self.MOE) is None
        assert one_rule(INT8, "lm_head.weight").config_for(name, shape, self.MOE) is None

    def test_everything_in_one_rule(self) -> None:
        with pytest.raises(RecipeError, match=r"rule 1 \('\*'\) would quantize layers\.0\.layer_scalar"):
            one_rule(INT8).config_for("layers.0.layer_scalar", (1,), self.MOE)

    def test_group_size(self) -> None:
        recipe = QuantRecipe("mine", (RECIPES["default"].rules[0], QuantRule("*_proj*", QuantConfig(4, 128))))
        message = (
            r"'mine': rule 2 \('\*_proj\*'\): layers\.0\.mlp\.down_proj\.weight has rows of 2112 weights, which groups "
            r"of 128 do not divide; group_size may be 16, 32, 64, 'axis'"
        )
        with pytest.raises(RecipeError, match=message):
            plan(recipe, self.MOE)
        with pytest.raises(RecipeError, match="rows of 33 weights, an odd number; keep it"):
            one_rule(QuantConfig(4, None)).config_for("lm_head.weight", (8, 33), self.MOE)

    def test_layers_that_are_not_there(self) -> None:
        recipe = QuantRecipe("mine", (*RECIPES["default"].rules[:1], QuantRule("*.q_proj.weight", INT4, "60")))
        with pytest.raises(
            RecipeError, match=r"'mine': rule 2: layers = '60': the model has 30 layers, and no layer 60"
        ):
            plan(recipe, self.MOE)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((3, 32), "bits = 3: must be 4 or 8"),
            ((True, 32), "bits = True"),
            ((4.0, 32), "bits = 4.0"),
            ((4, 0), "group_size = 0: must be an even number"),
            ((4, 33), "group_size = 33"),
            ((4, -32), "group_size = -32"),
            ((4, "32"), "group_size = '32'"),
            ((4, 32, 1), "symmetric = 1: must be true or false"),
            ((4, 32, True, "awq"), f"method = 'awq': must be one of {', '.join(METHODS)}"),
            ((4, 32, True, None), "method = None"),
            ((4, 32, True, "hqq"), "needs symmetric = false"),
        ],
    )
    def test_config(self, arguments: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            QuantConfig(*arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("", INT4), "pattern = ''"),
            ((7, INT4), "pattern = 7"),
            (("*" * 201, INT4), "at most 200 characters"),
            (("*", {"bits": 4}), "config = {'bits': 4}: must be a QuantConfig"),
            (("*", QuantConfig(8, None, symmetric=False)), "8 bits are symmetric in a checkpoint"),
            (("*", INT4, ""), "layers = ''"),
            (("*", INT4, 3), "layers = 3"),
            (("*", INT4, "first"), "layers = 'first': expected indices, slices or edge"),
            (("*", INT4, "1,,2"), "layers = '1,,2'"),
            (("*", INT4, "0:4:0"), "layers = '0:4:0'"),
            (("*", INT4, "4:0:-1"), "layers = '4:0:-1'"),
            (("*", INT4, "9" * 30), "layers = "),
        ],
    )
    def test_rule(self, arguments: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            QuantRule(*arguments)

    def test_pattern_that_would_backtrack(self) -> None:
        assert not QuantRule("*a" * 100, INT4).matches("a" * 99 + "b", 1)


configs = st.builds(
    QuantConfig,
    bits=st.sampled_from([4, 8]),
    group_size=st.none() | st.integers(1, 512).map(lambda n: 2 * n),
    method=st.sampled_from(["min_max", "mse"]),
) | st.builds(
    QuantConfig, bits=st.just(4), group_size=st.just(64), symmetric=st.just(False), method=st.sampled_from(METHODS)
)
rules = st.builds(
    QuantRule,
    pattern=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    config=st.none() | configs,
    layers=st.none() | st.sampled_from(["edge", "0", "-3:", "1:9:2, edge"]),
)
recipes = st.builds(
    QuantRecipe, st.text(st.characters(codec="utf-8"), min_size=1), st.lists(rules, min_size=1).map(tuple)
)

TOML = """
name = "mine"
[[rules]]
pattern = "embed_tokens*.weight"
config = { bits = 8, group_size = "axis" }
[[rules]]
pattern = "*.v_proj.weight"
layers = "edge"
config = "keep"
[[rules]]
pattern = "*_proj*"
config = { bits = 4, group_size = 64, symmetric = false, method = "hqq" }
"""


class TestFiles:
    @settings(deadline=None)
    @given(recipes)
    def test_dict_and_back(self, recipe: QuantRecipe) -> None:
        assert QuantRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe

    def test_toml_and_json(self, tmp_path: Path) -> None:
        expected = QuantRecipe(
            "mine",
            (
                QuantRule("embed_tokens*.weight", QuantConfig(8, None)),
                QuantRule("*.v_proj.weight", None, "edge"),
                QuantRule("*_proj*", QuantConfig(4, 64, False, "hqq")),
            ),
        )
        (tmp_path / "a.toml").write_text(TOML)
        (tmp_path / "a.json").write_text(json.dumps(expected.to_dict()))
        assert load_recipe(tmp_path / "a.toml") == load_recipe(str(tmp_path / "a.json")) == expected

    @pytest.mark.parametrize("name", RECIPES)
    def test_built_in(self, name: str) -> None:
        assert load_recipe(name) is RECIPES[name]
        assert RECIPES[name].name == name

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("name = ", "nom = "), "unknown key 'nom'; known: name, rules"),
            (('name = "mine"', ""), "name is missing"),
            (('"mine"', "7"), "name = 7: must be a text"),
            (("[[rules]]", "[rules]"), "not valid TOML"),
            (("pattern", "patern"), "rule 1: unknown key 'patern'; known: config, layers, pattern"),
            (('config = "keep"', ""), "rule 2: config is missing"),
            (
                ('"keep"', '"int4"'),
                "rule 2: config: expected a table with bits, group_size, method, symmetric, got 'int4'",
            ),
            (("bits = 8", "bit = 8"), "rule 1: config: unknown key 'bit'"),
            (("bits = 8", "bits = 5"), "rule 1: bits = 5: must be 4 or 8"),
            (("group_size = 64, ", ""), "rule 3: config: group_size is missing"),
            (("64", "'row'"), "rule 3: group_size = 'row': must be an even number"),
            (("false", "true"), "rule 3: method = 'hqq' optimises a scale and a zero"),
            (('"edge"', '"edges"'), "rule 2: layers = 'edges': expected indices"),
            (('"edge"', "[0, 1]"), "rule 2: layers = [0, 1]: expected indices"),
            (('"*.v_proj.weight"', "[]"), "rule 2: pattern = []: must be a glob"),
            (("name", "\0"), "not valid TOML"),
        ],
    )
    def test_malformed(self, tmp_path: Path, change: tuple[str, str], message: str) -> None:
        path = tmp_path / "a.toml"
        path.write_text(TOML.replace(*change))
        with pytest.raises(RecipeError) as error:
            load_recipe(path)
        assert str(error.value).startswith(f"{path}: ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[]", "expected a table with name, rules, got []"),
            ('{"name": "a", "rules": []}', "at least one rule"),
            ('{"name": "a", "rules": {}}', "must be a list"),
            ('{"name": "a", "rules": [1]}', "rule 1: expected a table"),
            ('{"name": "a", "rules": [{"pattern": "*", "config": null}]}', "rule 1: config: expected a table"),
            ('{"name": "a", "rules": [{"pattern": "*", "config": {"bits": 4, "group_size": null}}]}', "write 'axis'"),
            ("[" * 100_000, "not valid JSON"),
            ("", "not valid JSON"),
        ],
    )
    def test_malformed_json(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "a.json"
        path.write_text(text)
        with pytest.raises(RecipeError, match=re.escape(str(path))) as error:
            load_recipe(path)
        assert message in str(error.value)

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"defualt: no such recipe file, and none .* default, sensitive, comp"
        ):
            load_recipe("defualt")
        (tmp_path / "a.yaml").touch()
        with pytest.raises(RecipeError, match=r"ends in \.toml or \.json"):
            load_recipe(tmp_path / "a.yaml")
        (tmp_path / "a.toml").write_bytes(b"\xff")
        with pytest.raises(RecipeError, match="not valid TOML"):
            load_recipe(tmp_path / "a.toml")
        with (tmp_path / "big.json").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(RecipeError, match="not a recipe"):
            load_recipe(tmp_path / "big.json")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recipe_in_the_docs_fits(variant: str, tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs" / "quantization.md"
    (tmp_path / "mine.toml").write_text(docs.read_text().partition("```toml\n")[2].partition("```")[0])
    planned = plan(load_recipe(str(tmp_path / "mine.toml")), VARIANTS[variant])
    assert planned["lm_head.weight"] is None
    assert planned["layers.0.mlp.down_proj.weight"] == QuantConfig(8, 32)
    assert planned["layers.7.mlp.gate_proj.weight"] == QuantConfig(4, 64, False, "hqq")
