"""AOTInductor packages of prefill and decode, and the session that runs them from Python, or any such two functions.

A package holds code alone. Weights lie beside them once, in `constants.safetensors`, and in memory once: both packages
are given the same tensors, the caches among them."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram

from gemma4_impl.export.folder import Manifest
from gemma4_impl.export.program import Limits, cache_sizes, dtype_name
from gemma4_impl.generation import Sampling
from gemma4_impl.kernels.steps import sampling_state
from gemma4_impl.model.cache import KVCache

if TYPE_CHECKING:
    from torch.export.pt2_archive._package import AOTICompiledModel

CONSTANTS = "constants.safetensors"
OPTIONS = {
    # The wrapper only launches kernels: optimizing it takes minutes and gains nothing.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "coordinate_descent_tuning": False,
}
LAG = 4
"""How many of the last tokens are kept on the device."""

Function = Callable[..., Tensor]


def state_sizes(cache: KVCache, vocab_size: int) -> dict[str, dict[str, Any]]:
    """dtype, shape and bytes of every buffer that the methods share and change, by its name in the programs."""
    sizes = {f"cache.{name}": size for name, size in cache_sizes(cache).items() if name != "rows"}
    for name, dtype, shape in (("state", torch.int64, [2]), ("logits", torch.float32, [1, vocab_size])):
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        sizes[name] = {"dtype": dtype_name(dtype), "shape": shape, "bytes": nbytes}
    return sizes


def new_state(sizes: Mapping[str, Mapping[str, Any]], device: torch.device | str) -> dict[str, Tensor]:
    """Those buffers as a program starts with them: nothing is in the caches."""
    out = {}
    for name, size in sizes.items():
        value = -1 if name.endswith("_positions") else 0
        out[name] = torch.full(size["shape"], value, dtype=getattr(torch, size["dtype"]), device=device)
    return out


def write_packages(
    programs: Mapping[str, ExportedProgram],
    folder: Path,
    device: torch.device | str,
    state: Collection[str],
    options: Mapping[str, Any] | None = None,
) -> None:
    """Compiles programs of `cuda_graph.export_programs` for `device` into `folder`: NAME.pt2 each, and their constants,
    but for those of `state`, which the programs change.

    The programs are moved to the device. Raises ValueError for programs that mean different tensors by one name."""
    constants = shared_constants(programs, device)
    _save({name: tensor for name, tensor in constants.items() if name not in state}, folder / CONSTANTS)
    compile_packages(programs, folder, options)


def compile_packages(
    programs: Mapping[str, ExportedProgram], folder: Path, options: Mapping[str, Any] | None = None
) -> None:
    """Compiles programs for the device that they are on: NAME.pt2 each."""
    options = {"aot_inductor.package_constants_in_so": False, **OPTIONS, **(options or {})}
    for name, program in programs.items():
        path = str(folder / f"{name}.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)


def shared_constants(programs: Mapping[str, ExportedProgram], device: torch.device | str) -> dict[str, Tensor]:
    """Moves programs to a device, where they hold the same tensors; returns these by name."""
    from torch.export.passes import move_to_device_pass

    here: dict[str, Tensor] = {}
    there: dict[str, Tensor] = {}
    moved: dict[tuple, Tensor] = {}
    for program in programs.values():
        for held in (program._state_dict, program._constants):
            for name, tensor in held.items():
                if not isinstance(tensor, Tensor):
                    continue
                known = here.setdefault(name, tensor)
                if _memory(known) != _memory(tensor) and not torch.equal(known, tensor):
                    raise ValueError(f"two programs have different tensors by the name of {name}")
                # Tied weights stay tied.
                if (key := _memory(known)) not in moved:
                    moved[key] = tensor.detach().to(device)
                there[name] = moved[key]
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                held[name] = torch.nn.Parameter(moved[key], requires_grad=False) if is_parameter else moved[key]
        move_to_device_pass(program, str(device))
    return there


def load_packages(folder: Path, state: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Function]:
    """`link_packages` with the constants in `folder`, and with `state`'s own tensors."""
    return link_packages(folder, {**_load(folder / CONSTANTS, device), **state})


def link_packages(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Function]:
    """Name -> package in `folder`, all of which compute with these very tensors.

    Raises ValueError for one that a package needs and that is not there."""
    out: dict[str, Function] = {}
    for path in sorted(folder.glob("*.pt2")):
        # Single-threaded: the other way queries events, which no stream that is being captured allows.
        package: AOTICompiledModel = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        needed = package.get_constant_fqns()
        if absent := sorted(set(needed) - set(tensors)):
            raise ValueError(f"{path}: no tensor is given for {absent[0]}")
        constants = {name: tensors[name] for name in needed}
        package.load_constants(constants, check_full_update=True, user_managed=True)
        out[path.stem] = package
    return out


def open_session(folder: Path, manifest: Manifest) -> "Session":
    """The packages in an exported folder, ready to run. Raises ValueError where there is no NVIDIA GPU."""
    if not torch.cuda.is_available():
        raise ValueError(f"{folder}: a CUDA program needs an NVIDIA GPU, and there is none here")
    state = new_state(manifest.caches, "cuda")
    top_k = manifest.constants.get("get_top_k") or None
    return Session(load_packages(folder, state, "cuda"), state, manifest.limits, top_k)


class Session:
    """Runs `prefill` and `decode`, which share the tensors of `state`, from position 0 on."""

    taps = False

    def __init__(
        self,
        functions: Mapping[str, Function],
        state: Mapping[str, Tensor],
        limits: Limits,
        top_k: int | None = None,
    ):
        """`top_k` is what `decode` was exported with."""
        self.functions, self.state, self.limits, self.top_k = functions, state, limits, top_k
        self.device = device = state["state"].device
        self.length = 0
        """Tokens fed so far, those of steps that run ahead among them."""
        self._on_gpu = device.type == "cuda"
        self._token, self._position = (torch.zeros(1, 1, dtype=torch.long, device=device) for _ in range(2))
        self._temperature = torch.zeros(1, device=device)
        self._count = torch.zeros(1, dtype=torch.long, device=device)
        self._history = torch.zeros(LAG, dtype=torch.long, device=device)
        self._drawn = torch.zeros(LAG, dtype=torch.long, pin_memory=self._on_gpu)
        self._events = [torch.cuda.Event() for _ in range(LAG)] if self._on_gpu else []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._launched, self._started = 0, False

    def reset(self) -> None:
        """Forgets what is in the caches."""
        self.length, self._started = 0, False
        for name, buffer in self.state.items():
            if name.endswith("_positions"):
                buffer.fill_(-1)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, position: int) -> Tensor:
        """tokens int64 [1, T], the first of them at `position`, where the session ends -> the last one's float32 logits
        [1, V]: one token by `decode`, more by `prefill`. Raises ValueError for what does not fit."""
        T = self.limits.check_chunk(tokens, position, self.length)
        tokens = tokens.to(self.device)
        positions = torch.arange(position, position + T, device=self.device)[None]
        if T == 1:
            self.functions["decode"](tokens, positions, torch.zeros(1, device=self.device))
            logits = self.state["logits"].clone()
        else:
            logits = self.functions["prefill"](tokens, positions)[:, 0].float()
        self.length, self._started = self.length + T, False
        return logits

    @torch.inference_mode()
    def start(self, token: int, sampling: Sampling | None = None) -> None:
        """Goes on with `token`, the next to be fed; those after it are drawn on the device, greedily without
        `sampling`. Raises ValueError for filters that the program was not exported with."""
        sampling = sampling or Sampling(temperature=0)
        if sampling.temperature > 0 and (sampling.top_k != self.top_k or sampling.top_p not in (None, 1)):
            raise ValueError(
                f"the program draws with top_k = {self.top_k} and without top_p; export it anew for others"
            )
        if not 0 <= token < self.limits.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.limits.vocab_size}")
        seed = sampling.generator("cpu").initial_seed()
        self.state["state"].copy_(sampling_state(seed, self.device))
        self._token.fill_(token)
        self._position.fill_(self.length)
        self._temperature.fill_(sampling.temperature)
        self._count.zero_()
        self._launched, self._started = 0, True
        if self._on_gpu and self._graph is None:
            self._graph = self._captured()

    @torch.inference_mode()
    def decode(self, steps: int) -> Iterator[int]:
        """The next `steps` tokens; on a GPU each is one replay of a CUDA graph, and the next has begun when a token
        comes out. Raises ValueError before `start`, for more steps than there is room for, and for a token that cannot
        be drawn, because logits are NaN."""
        if not self._started:
            raise ValueError("a session decodes from the token that `start` was given")
        if self.length + steps > self.limits.max_seq_len:
            raise ValueError(f"{steps} more tokens do not fit the program (max_seq_len = {self.limits.max_seq_len})")
        first, ahead = self._launched, int(self._on_gpu)
        for i in range(first, first + steps):
            while self._launched < min(i + 1 + ahead, first + steps):
                self._launch()
            if self._on_gpu:
                self._events[i % LAG].synchronize()
            if (token := int(self._drawn[i % LAG])) < 0:
                raise ValueError("no token can be drawn: the logits are NaN")
            yield token

    def _launch(self) -> None:
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
            self._events[self._launched % LAG].record()
        self._launched += 1
        self.length += 1

    def _step(self) -> None:
        """One token on; all that moves is on the device."""
        drawn = self.functions["decode"](self._token, self._position, self._temperature)
        self._token.copy_(drawn.clamp(min=0)[None])
        self._position += 1
        self._history.index_copy_(0, self._count % LAG, drawn)
        self._count += 1
        self._drawn.copy_(self._history, non_blocking=True)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A graph of one step. It runs twice before; what that moves is put back, and the caches' slot is written again
        by the first replay."""
        moving = (self._token, self._position, self._count, self._history, self.state["state"])
        kept = [(tensor, tensor.clone()) for tensor in moving]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
                for tensor, value in kept:
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph


def _memory(tensor: Tensor) -> tuple:
    """What tensors that are one have in common."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Each tensor once; other names for it go into the metadata."""
    first: dict[tuple, str] = {}
    aliases, stored = {}, {}
    for name, tensor in tensors.items():
        if tensor.numel() and _memory(tensor) in first:
            aliases[name] = first[_memory(tensor)]
        else:
            first[_memory(tensor)] = name
            stored[name] = tensor.detach().contiguous().cpu()
    save_file(stored, path, metadata={"aliases": json.dumps(aliases)})


def _load(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        aliases = json.loads(file.metadata()["aliases"])
    return tensors | {name: tensors[of] for name, of in aliases.items()}
