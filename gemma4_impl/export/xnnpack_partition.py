"""Which operations XNNPACK is given: those that it computes as PyTorch does."""

from executorch.backends.xnnpack.partition.config import gemm_configs as gemm
from executorch.backends.xnnpack.partition.config import generic_node_configs as node
from executorch.backends.xnnpack.partition.config import quant_affine_configs as affine
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.backend.backend_details import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from torch._ops import OpOverload
from torch.export import ExportedProgram

# Not GeluConfig: XNNPACK's GELU is the exact one and takes no notice of approximate="tanh".
CONFIGS = [
    gemm.LinearConfig,
    node.AddConfig,
    node.BMMConfig,
    node.CatConfig,
    node.CosConfig,
    node.DivConfig,
    node.MulConfig,
    node.PermuteConfig,
    node.ReciprocalSquareRootConfig,
    node.SinConfig,
    node.SoftmaxConfig,
    node.SubConfig,
    node.TanhConfig,
    node.ViewCopyConfig,
    affine.QuantizeAffineConfig,
    affine.DeQuantizeAffineConfig,
    affine.ChooseQParamsAffineConfig,
]


class Partitioner(XnnpackPartitioner):
    """XNNPACK's own, for `CONFIGS`, in less time: 17 passes over every partition become the one that this model needs,
    and a decomposition that would tell supported operations of a kind from others is left out."""

    def __init__(self) -> None:
        super().__init__(configs=CONFIGS)
        self.delegation_spec = DelegationSpec(
            self.delegation_spec.backend_id, [CompileSpec("dqlinear_partitioner", b"")]
        )

    def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[OpOverload], None]:
        return super().ops_to_not_decompose(ep)[0], None
