"""What taps cost when nothing records: the model as it is, and a copy whose tap calls were cut out of the source."""

import ast
import inspect
import sys
import time
import types

import pytest
import torch

from gemma4_impl.model import decoder, moe
from reference.tiny import make_tiny

ROUNDS = 60


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
def test_taps_off(benchmark, tmp_path, variant: str) -> None:
    """Alternates the two, so that both see the same machine, and reports the ratio of the fastest forwards."""
    torch.set_num_threads(1)
    path = make_tiny(variant, tmp_path / variant)
    models = {"ours": decoder.Gemma4.from_pretrained(path), "bare": _without_taps().from_pretrained(path)}
    tokens = torch.randint(107, 512, (1, 16))
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        assert torch.equal(models["ours"](tokens), models["bare"](tokens))

        def alternate() -> None:
            for name, model in models.items():
                start = time.perf_counter()
                model(tokens)
                times[name].append(time.perf_counter() - start)

        benchmark.pedantic(alternate, rounds=ROUNDS, warmup_rounds=5, iterations=5)
    ratio = min(times["ours"]) / min(times["bare"])
    benchmark.group = f"taps off, forward of 16 tokens, tiny {variant}"
    benchmark.extra_info.update(ratio_to_no_taps=ratio, taps=len(models["ours"].config.layers))
    print(f"\n{variant}: with taps off {ratio:.4f} of the time without taps")
