"""What taps cost when nothing records: the model as it is, and a copy whose tap calls were cut out of the source."""

import ast
import inspect
import itertools
import statistics
import sys
import time
import types

import pytest
import torch

from gemma4_impl.model import decoder, moe
from reference.tiny import make_tiny

SIZES = {
    "tiny": {},
    "small": {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64, "global_head_dim": 128},
}


class _CutTaps(ast.NodeTransformer):
    """`taps.tap(prefix, name, value)` -> value; `taps.route(prefix, index)` -> index; `taps.at(...)` is dropped."""

    cut = 0

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if self._called(node.value) == "at":
            self.cut += 1
            return None
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if self._called(node) in ("tap", "route"):
            self.cut += 1
            return node.args[-1]
        return node

    @staticmethod
    def _called(node: ast.AST) -> str | None:
        function = getattr(node, "func", None)
        owner = getattr(function, "value", None)
        return function.attr if isinstance(owner, ast.Name) and owner.id == "taps" else None


def _rebuilt(cut: bool) -> type:
    """The model class, compiled from its source again, with or without its tap calls."""
    modules = {}
    for module in (moe, decoder):
        tree, cutter = ast.parse(inspect.getsource(module)), _CutTaps()
        if cut:
            tree = ast.fix_missing_locations(cutter.visit(tree))
            assert cutter.cut
        copy = types.ModuleType(f"{module.__name__}_{'bare' if cut else 'copy'}")
        sys.modules[copy.__name__] = copy
        exec(compile(tree, copy.__name__, "exec"), copy.__dict__)
        modules[module] = copy
    modules[decoder].Router, modules[decoder].Experts = modules[moe].Router, modules[moe].Experts
    return modules[decoder].Gemma4


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B"])
@pytest.mark.parametrize("size", SIZES)
def test_taps_off(benchmark, tmp_path, size: str, variant: str) -> None:
    """Times the model, a copy without taps, and as a control one with them, in every order."""
    path = make_tiny(variant, tmp_path / variant, overrides=SIZES[size])
    classes = {"ours": decoder.Gemma4, "copy": _rebuilt(cut=False), "bare": _rebuilt(cut=True)}
    models = {name: cls.from_pretrained(path) for name, cls in classes.items()}
    for model in models.values():
        # The same weights at the same addresses: how a small matrix is aligned matters more than a tap.
        model.load_state_dict(models["ours"].state_dict(), assign=True)
    tokens = torch.randint(107, 512, (1, 16))
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        assert torch.equal(models["ours"](tokens), models["bare"](tokens))

        def alternate() -> None:
            for order in itertools.permutations(models):
                for name in order:
                    start = time.perf_counter()
                    models[name](tokens)
                    times[name].append(time.perf_counter() - start)

        benchmark.pedantic(alternate, rounds=12 if size == "tiny" else 3, warmup_rounds=1)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["bare"], strict=True))
        for name in ("ours", "copy")
    }
    benchmark.group = f"taps off, forward of 16 tokens, {size} {variant}"
    benchmark.extra_info.update({f"{name}_to_bare": ratio for name, ratio in ratios.items()})
    print(f"\n{size} {variant}: with taps off {ratios['ours']:.4f} of the time without; control {ratios['copy']:.4f}")
