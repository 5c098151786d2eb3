"""What taps cost when nothing records: the model as it is, and a copy whose tap calls were cut out of the source."""

import ast
import inspect
import statistics
import sys
import time
import types

import pytest
import torch

from gemma4_impl.model import decoder, moe
from reference.tiny import make_tiny

ROUNDS = 300
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


def _without_taps() -> type:
    modules = {}
    for module in (moe, decoder):
        tree = _CutTaps()
        source = ast.fix_missing_locations(tree.visit(ast.parse(inspect.getsource(module))))
        assert tree.cut
        bare = types.ModuleType(f"{module.__name__}_bare")
        sys.modules[bare.__name__] = bare
        exec(compile(source, bare.__name__, "exec"), bare.__dict__)
        modules[module] = bare
    modules[decoder].Router, modules[decoder].Experts = modules[moe].Router, modules[moe].Experts
    return modules[decoder].Gemma4


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B"])
@pytest.mark.parametrize("size", SIZES)
def test_taps_off(benchmark, tmp_path, size: str, variant: str) -> None:
    """Alternates the two, in turn first, so that both see the same machine; reports the median ratio of a pair."""
    path = make_tiny(variant, tmp_path / variant, overrides=SIZES[size])
    models = {"ours": decoder.Gemma4.from_pretrained(path), "bare": _without_taps().from_pretrained(path)}
    # The same weights at the same addresses: how a small matrix is aligned matters more than a tap.
    models["bare"].load_state_dict(models["ours"].state_dict(), assign=True)
    tokens = torch.randint(107, 512, (1, 16))
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        assert torch.equal(models["ours"](tokens), models["bare"](tokens))

        def alternate() -> None:
            for order in (("ours", "bare"), ("bare", "ours")):
                for name in order:
                    start = time.perf_counter()
                    models[name](tokens)
                    times[name].append(time.perf_counter() - start)

        benchmark.pedantic(alternate, rounds=ROUNDS, warmup_rounds=20)
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["bare"], strict=True))
    benchmark.group = f"taps off, forward of 16 tokens, {size} {variant}"
    benchmark.extra_info["ratio_to_no_taps"] = ratio
    print(f"\n{size} {variant}: with taps off {ratio:.4f} of the time without taps")
