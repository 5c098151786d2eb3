"""CUDA C++ kernels: compiled by NVRTC for the GPU at hand, kept on disk, launched on torch's current stream."""

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

_HEADER = Path(__file__).with_name("common.cuh")


class TensorMap:
    """A TMA descriptor of a tensor, handed to a kernel as a `__grid_constant__ const CUtensorMap`.

    Args:
        box: the part of it that one copy moves, innermost dimension last, as in `tensor.shape`.
        swizzle: 0, 32, 64 or 128 bytes.
    Keeps no reference to the tensor. Raises ValueError for strides that TMA cannot take: the innermost must be 1, the
    others multiples of 16 bytes."""

    def __init__(self, tensor: Tensor, box: Sequence[int], swizzle: int = 128):
        driver = _driver()
        itemsize, strides = tensor.element_size(), tensor.stride()
        if strides[-1] != 1 or any(s * itemsize % 16 for s in strides[:-1]) or tensor.data_ptr() % 16:
            raise ValueError(f"strides {strides} of {tensor.dtype} are not what TMA can copy")
        kinds = driver.CUtensorMapDataType
        kind = {
            torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            torch.float32: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            torch.uint8: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        }[tensor.dtype]
        swizzles = driver.CUtensorMapSwizzle
        pattern = {
            0: swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
            32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
            64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
            128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
        }[swizzle]
        rank = tensor.dim()
        self._map = _checked(
            driver.cuTensorMapEncodeTiled(
                kind,
                rank,
                tensor.data_ptr(),
                [driver.cuuint64_t(n) for n in reversed(tensor.shape)],
                [driver.cuuint64_t(s * itemsize) for s in reversed(strides[:-1])],
                [driver.cuuint32_t(n) for n in reversed(box)],
                [driver.cuuint32_t(1)] * rank,
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                pattern,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        )
        self.address = self._map.getPtr()


Argument = Tensor | TensorMap | int | float | None | ctypes._SimpleCData
"""A tensor is passed as its pointer, None as a null one, an int as int32, a float as float32."""


class Kernel:
    """A function of a loaded module."""

    def __init__(self, handle: object, name: str):
        self.handle, self.name = handle, name
        self._shared = 0

    def __call__(
        self,
        grid: int | tuple[int, ...],
        block: int,
        args: Sequence[Argument],
        *,
        shared: int = 0,
        cluster: int = 1,
        overlap: bool = False,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """Launches `grid` blocks of `block` threads, with `shared` bytes of dynamic shared memory, on `stream`, by
        default the current one; a CUDA graph can capture it.

        Args:
            cluster: blocks along x that can reach each other's shared memory.
            overlap: programmatic dependent launch: the kernel may start before the one ahead of it in the stream has
                ended, and waits for it itself (`grid_wait` in common.cuh) before it reads what that one writes.
        Raises RuntimeError if the driver refuses."""
        driver = _driver()
        if shared > self._shared:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self.handle, attribute, shared))
            # Kernels that divide the L1 alike can share a multiprocessor; others wait until it is empty.
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _checked(driver.cuFuncSetAttribute(self.handle, attribute, 100))
            if cluster > 8:
                wide = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
                _checked(driver.cuFuncSetAttribute(self.handle, wide, 1))
            self._shared = shared
        config = driver.CUlaunchConfig()
        sizes = (grid,) if isinstance(grid, int) else grid
        config.gridDimX, config.gridDimY, config.gridDimZ = (*sizes, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared
        config.hStream = (stream or torch.cuda.current_stream()).cuda_stream
        attributes = []
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
            attributes.append(attribute)
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        held = [_packed(arg) for arg in args]
        addresses = (ctypes.c_void_p * len(held))(*(h if isinstance(h, int) else ctypes.addressof(h) for h in held))
        _checked(driver.cuLaunchKernelEx(config, self.handle, ctypes.addressof(addresses), 0))

    def attribute(self, name: str) -> int:
        """A `CU_FUNC_ATTRIBUTE_...` of the compiled function: NUM_REGS, LOCAL_SIZE_BYTES, SHARED_SIZE_BYTES."""
        driver = _driver()
        return _checked(
            driver.cuFuncGetAttribute(getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}"), self.handle)
        )


def kernel(source: Path, name: str, defines: Mapping[str, int | str] | None = None) -> Kernel:
    """The function `name` (extern "C") of the CUDA C++ file `source`, which sees common.cuh and `defines` as macros.

    Compiled once for each GPU architecture, and kept in `cache_folder()`. Raises RuntimeError with the compiler's own
    messages, ImportError without the package cuda-bindings."""
    return _kernel(source, name, tuple(sorted((defines or {}).items())), torch.cuda.current_device())


def cache_folder() -> Path:
    """Where compiled kernels are kept: $GEMMA4_CACHE, or `gemma4` in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("GEMMA4_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma4"


@functools.cache
def available(device: int = 0) -> bool:
    """Whether these kernels run here: an NVIDIA GPU of compute capability 9.0 (Hopper), and cuda-bindings."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    try:
        _driver()
    except ImportError:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kernel(source: Path, name: str, defines: tuple, device: int) -> Kernel:
    module = _module(source, defines, device)
    return Kernel(_checked(_driver().cuModuleGetFunction(module, name.encode())), name)


@functools.cache
def _module(source: Path, defines: tuple, device: int) -> object:
    torch.cuda.init()
    torch.zeros(1, device=f"cuda:{device}")  # makes torch's context the current one
    major, minor = torch.cuda.get_device_capability(device)
    return _checked(_driver().cuModuleLoadData(compiled(source, dict(defines), f"sm_{major}{minor}a")))


def compiled(source: Path, defines: Mapping[str, int | str], arch: str) -> bytes:
    """The machine code (cubin) of `source` for `arch`, from the cache or by NVRTC."""
    from cuda.bindings import nvrtc

    text, header = source.read_bytes(), _HEADER.read_bytes()
    options = [
        f"--gpu-architecture={arch}",
        "--std=c++17",
        "--use_fast_math",
        "--extra-device-vectorization",
        *(f"--define-macro={key}={value}" for key, value in sorted(defines.items())),
    ]
    version = "{}.{}".format(*_checked(nvrtc.nvrtcVersion()))
    key = hashlib.sha256(b"\0".join([text, header, version.encode(), *(o.encode() for o in options)])).hexdigest()
    path = cache_folder() / "cuda" / f"{source.stem}-{key[:24]}.cubin"
    if path.is_file():
        return path.read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(text, source.name.encode(), 1, [header], [_HEADER.name.encode()]))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{source.name} does not compile for {arch}: {log.decode(errors='replace').strip()}")
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    _keep(path, cubin)
    return cubin


def _keep(path: Path, data: bytes) -> None:
    """A cache that cannot be written costs time only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError:
        pass


def _packed(arg: Argument) -> ctypes._SimpleCData | int:
    if isinstance(arg, Tensor):
        return ctypes.c_uint64(arg.data_ptr())
    if isinstance(arg, TensorMap):
        return arg.address
    if arg is None:
        return ctypes.c_uint64(0)
    if isinstance(arg, bool | int):
        return ctypes.c_int32(arg)
    return ctypes.c_float(arg) if isinstance(arg, float) else arg


@functools.cache
def _driver() -> ModuleType:
    from cuda.bindings import driver

    return driver


def _checked(result: tuple) -> object:
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
