"""The C++ runner: the tokens that Python computes, the distributions that its sampler defines, and what it refuses."""

import ctypes
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from configs import hub, random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.export import xnnpack
from gemma4_impl.export.program import Settings
from gemma4_impl.generation import Sampling
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.model.sampler import allowed
from gemma4_impl.runner import build as building
from gemma4_impl.runner import find_runner, generate

_MISSING = [
    *(["executorch"] if importlib.util.find_spec("executorch") is None else []),
    *(["cmake"] if shutil.which("cmake") is None else []),
    *(["a C++ compiler"] if not any(map(shutil.which, ("c++", "g++", "clang++"))) else []),
]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason=f"needs {' and '.join(_MISSING)}")
if not _MISSING:
    import toy_programs as toys
    from executorch.exir.schema import BackendDelegate, BackendDelegateDataReference, DataLocation, Double, ScalarType
    from toy_programs import BOS, EOS, NEVER, C, S, V

TABLE = None if _MISSING else toys.make_table()


@pytest.fixture(scope="session")
def runner() -> Path:
    """The program, built or brought up to date where `make runner` builds it."""
    return building.build()


@pytest.fixture(scope="module")
def programs() -> dict[str, bytes]:
    toy, quantized = toys.Toy(TABLE), toys.Quantized(TABLE)
    prefill, temperature = toys.prefill(toy), torch.zeros(1)
    both = {"prefill": prefill, "decode": toys.decode(toy)}
    return {
        "toy": toys.lower(both),
        "quantized": toys.lower({"prefill": toys.prefill(quantized), "decode": toys.decode(quantized)}),
        "unshared": toys.lower(both, shared=False),
        "one method": toys.lower({"forward": toys.forward(toys.OneMethod(TABLE))}),
        "draws": toys.lower({"prefill": prefill, "decode": toys.decode(toys.Draws(TABLE), temperature)}, get_top_k=1),
    }


@pytest.fixture(scope="module")
def folders(programs, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runner")
    return {name: toys.save(root / name.replace(" ", "-"), data) for name, data in programs.items()}


@pytest.fixture
def toy(runner, folders) -> Path:
    return folders["toy"]


def run(runner: Path, *arguments: object, prompt: str = "", **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [runner, *map(str, arguments)], input=prompt, capture_output=True, text=True, timeout=60, **options
    )


def assert_refused(result: subprocess.CompletedProcess, why: str, code: int = 2) -> None:
    """One line on stderr."""
    assert result.returncode == code, result
    assert re.fullmatch(r"gemma4-runner: error: [^\n]+\n", result.stderr), result.stderr
    assert re.search(why, result.stderr), result.stderr


@pytest.fixture(scope="module")
def lowered(tmp_path_factory) -> tuple[Gemma4, Path]:
    """A model with a sliding and a full layer, whose continuations depend on all that it has seen, and its program."""
    layers = {
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
        "num_kv_shared_layers": 0,
        "num_key_value_heads": 1,
    }
    dense = {"enable_moe_block": False, "hidden_size_per_layer_input": 0, "tie_word_embeddings": False}
    model = random_model(TextConfig.from_dict(hub(**layers, **dense)), torch.float32)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(0.1)
    folder = tmp_path_factory.mktemp("lowered")
    xnnpack.lower(model, Settings(64, 6, torch.float32)).write(folder)
    return model, folder


@torch.no_grad()
def continued(model: Gemma4, prompt: list[int], count: int) -> list[int]:
    """Greedily, in one prefill and then token by token."""
    cache, tokens, new = model.make_cache(1, 64, 64), torch.tensor([prompt]), []
    for _ in range(count):
        positions = torch.arange(cache.lengths[0], cache.lengths[0] + tokens.shape[1])[None]
        new.append(int(model(tokens, positions, cache, "last")[0, -1].argmax()))
        if new[-1] in model.config.eos_token_id:
            break
        tokens = torch.tensor([new[-1:]])
    return new


def test_same_tokens_as_python(runner, lowered):
    """Chunks of 6 and remainders of one and more; decode over 8 windows. The two best logits always differ by 0.03 or
    more, a thousand times what float32 rounds."""
    model, folder = lowered
    ids = torch.randint(4, 64, (21,), generator=torch.Generator().manual_seed(11)).tolist()
    for length in (2, 7, 9, 22):
        prompt = [2, *ids][:length]
        result = generate(folder, prompt, 42)
        assert list(result.tokens) == continued(model, prompt, 42)
        assert len({*result.tokens}) > 12
        assert generate(folder, prompt, 42).tokens == result.tokens


PROMPTS = st.lists(st.integers(0, V - 1), max_size=3 * C + 1).map(lambda ids: [BOS, *ids])


@pytest.mark.parametrize("kind", ["toy", "one method", "quantized"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=PROMPTS, count=st.integers(1, 60))
def test_any_prompt(runner, folders, kind, prompt, count):
    """Chunks of up to C and a remainder of one: every token once, in its place."""
    result = generate(folders[kind], prompt, count)
    want = toys.greedy(TABLE if kind != "quantized" else toys.Quantized(TABLE).table, prompt, count)
    assert list(result.tokens) == want
    assert result.stop_reason == ("eos" if want[-1] in EOS else "length")
    assert result.prompt_tokens == len(prompt)


def endless(programs: dict[str, bytes], folder: Path, **changes: object) -> Path:
    """The toy with an end token that it never draws."""
    data = toys.edited(programs["toy"], toys.set_constant("get_eos_ids", NEVER, NEVER))
    for old, new in changes.get("replace", ()):
        assert data.count(old) == 1
        data = data.replace(old, new)
    return toys.save(folder, data)


def test_the_context_ends_it(runner, programs, tmp_path):
    """The last token is not fed back: it needs no room."""
    folder = endless(programs, tmp_path / "endless")
    for room in (0, 1, 2):
        result = generate(folder, [BOS] * (S - room), 10)
        assert (len(result.tokens), result.stop_reason, result.prompt_tokens) == (room + 1, "length", S - room)
    assert_refused(
        run(runner, folder, "--tokens", "-", prompt=",".join(["2"] * (S + 1))), f"{S + 1} tokens .* holds {S};"
    )


@pytest.mark.parametrize("end", EOS)
def test_every_end_token_ends_it(toy, end):
    prompt = next(p for p in ([BOS, a, b] for a in range(V) for b in range(V)) if toys.greedy(TABLE, p, 99)[-1] == end)
    result = generate(toy, prompt, 1000)
    assert (result.tokens[-1], result.stop_reason) == (end, "eos")
    assert end not in result.tokens[:-1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, None), (0.6, 3, None), (1.7, None, 0.8), (1.3, 5, 0.7)]
)
def test_frequencies(runner, programs, tmp_path, temperature, top_k, top_p):
    """What is drawn is spread as the sampler of the model defines it, and nothing else is ever drawn."""
    folder = endless(programs, tmp_path / "endless")
    logits = TABLE.double()
    kept = allowed(logits, temperature, top_k, top_p)
    probs = torch.softmax((logits / temperature).masked_fill(~kept, -math.inf), dim=-1)
    counts = torch.zeros(V, V, dtype=torch.float64)
    for seed in range(3):
        tokens = generate(folder, [BOS], S, Sampling(temperature, top_k, top_p, seed)).tokens
        total = BOS
        for token in tokens:
            counts[total % V, token] += 1
            total += token
    assert counts.sum() == 3 * S
    assert not counts[probs == 0].any()
    expected = counts.sum(dim=1, keepdim=True) * probs
    statistic = ((counts - expected) ** 2 / expected)[probs > 0].sum()
    freedom = ((probs > 0).sum(dim=1) - 1)[counts.sum(dim=1) > 0].sum()
    assert chi2.sf(float(statistic), int(freedom)) > 1e-3


def test_seeds(runner, programs, tmp_path):
    folder = endless(programs, tmp_path / "endless")
    drawn = [generate(folder, [BOS], 50, Sampling(1.0, seed=seed)).tokens for seed in (1, 1, 2, 2**64 - 1, None, None)]
    assert drawn[0] == drawn[1]
    assert len({*drawn}) == 5


def test_nan_and_infinity(runner, programs, tmp_path):
    """A NaN has no distribution, nor have -inf alone; +inf is always drawn. The first draw is from row BOS."""
    row = TABLE[BOS]
    old = row.numpy().tobytes()

    def folder(name: str, values: torch.Tensor) -> Path:
        return endless(programs, tmp_path / name, replace=[(old, values.numpy().tobytes())])

    nan, infinite = row.clone(), row.clone()
    nan[3], infinite[4] = math.nan, math.inf
    for name, values, why in (("nan", nan, "are NaN"), ("none", torch.full((V,), -math.inf), "all logits are -inf")):
        broken = folder(name, values)
        for temperature in ("0", "1"):
            result = run(runner, broken, "--tokens", BOS, "--temperature", temperature)
            assert_refused(result, f"no next token after 0 new ones: .*{why}", code=1)
        with pytest.raises(RuntimeError, match="no next token after 0 new ones"):
            generate(broken, [BOS])
    for sampling in (Sampling(0.0), Sampling(1.0), Sampling(2.0, 3, 0.9)):
        assert generate(folder(str(sampling), infinite), [BOS], 1, sampling).tokens == (4,)


def test_it_ends_the_line_of_ids_before_an_error(runner, programs, tmp_path):
    first = int(TABLE[BOS].argmax())
    old = TABLE[(BOS + first) % V].numpy().tobytes()
    folder = endless(programs, tmp_path / "nan", replace=[(old, torch.full((V,), math.nan).numpy().tobytes())])
    result = run(runner, folder, "--tokens", BOS, "--temperature", 0)
    assert result.stdout == f"{first}\n"
    assert_refused(result, "no next token after 1 new ones: the logits are NaN", code=1)


def test_a_program_that_draws(runner, folders):
    """The first token comes from prefill's logits, with the program's own top-k (here 1); then it draws them itself."""
    folder, prompt = folders["draws"], [BOS, 3, 5]
    want = toys.greedy(TABLE, prompt, 20)
    assert len(want) > 2
    assert list(generate(folder, prompt, 20).tokens) == want
    first, second = generate(folder, prompt, 2, Sampling(0.5, top_k=1)).tokens
    assert (first, second) == (want[0], want[1] - 1)
    for options in (("--top-k", 2), ("--top-p", 0.5), ("--seed", 1)):
        assert_refused(run(runner, folder, "--tokens", "2,3", *options), "draws its tokens by itself, with top-k 1")
    assert generate(folder, prompt, 1, Sampling(1.0, top_k=1)).tokens == (want[0],)


BAD_PROGRAMS: dict[str, tuple[Callable, str]] = {} if _MISSING else {
    "no decode": (lambda p: p.pop("decode"), "has no method decode; it has .*prefill"),
    "no prefill": (lambda p: p.pop("prefill"), "has no method prefill; it has decode"),
    "no constant": (lambda p: p.pop("get_vocab_size"), "has no constant get_vocab_size"),
    "no end tokens": (lambda p: p["get_eos_ids"].outputs.clear(), "get_eos_ids is empty"),
    "two lengths": (lambda p: p["get_max_seq_len"].outputs.append(0), "get_max_seq_len has 2 values, not one"),
    "constant with inputs": (lambda p: p["get_bos_id"].inputs.append(0), "get_bos_id is no constant: it takes inputs"),
    "fraction": (lambda p: setattr(p["get_bos_id"].values[0], "val", Double(2.5)), "get_bos_id is no integer"),
    "chunk": (toys.set_constant("get_max_prefill_chunk", 6), r"prefill: tokens is Long \[1, 4\], not Long \[1, 6\]"),
    "chunk of all": (toys.set_constant("get_max_prefill_chunk", S + 1), f"must be from 1 to {S}"),
    "no context": (toys.set_constant("get_max_seq_len", 0), "get_max_seq_len is 0, but must be from 1"),
    "vocabulary": (toys.set_constant("get_vocab_size", 9), r"Float \[1, 1, 8\], not the logits of get_vocab_size = 9"),
    "end token": (toys.set_constant("get_eos_ids", 1, 8), "get_eos_ids has 8, outside the vocabulary of 8"),
    "bos": (toys.set_constant("get_bos_id", -1), "get_bos_id is -1, but must be from 0 to 7"),
    "no cache": (toys.set_constant("use_kv_cache", 0), "use_kv_cache is 0"),
    "one input": (lambda p: p["decode"].inputs.pop(), "decode takes 1 inputs, not tokens, positions"),
    "input kind": (lambda p: setattr(value(p, "inputs", 1), "val", Double(0.0)), "decode: positions is no tensor"),
    "input type": (
        lambda p: setattr(value(p, "inputs", 0).val, "scalar_type", ScalarType.INT),
        r"decode: tokens is Int \[1, 1\], not Long \[1, 1\]",
    ),
    "two outputs": (lambda p: p["decode"].outputs.append(0), "decode returns 2 values, not one"),
    "output type": (
        lambda p: setattr(value(p, "outputs", 0).val, "scalar_type", ScalarType.DOUBLE),
        "decode returns Double .*, not the logits",
    ),
    "token without temperature": (
        lambda p: p["decode"].outputs.__setitem__(0, p["decode"].inputs[0]),
        "decode takes 2 inputs, not tokens, positions, temperature",
    ),
    "caches": (lambda p: p["decode"].non_const_buffer_sizes.pop(), "prefill and decode do not share their caches"),
    "operator": (
        lambda p: setattr(p["decode"].operators[0], "name", "aten::nothing"),
        "decode cannot be loaded .*aten::nothing",
    ),
    "backend": (
        lambda p: p["prefill"].delegates.append(
            BackendDelegate("CudaBackend", BackendDelegateDataReference(DataLocation.INLINE, 0), [])
        ),
        "prefill needs the backend CudaBackend, which this runner does not have",
    ),
}  # fmt: skip


def value(plans: dict, kind: str, index: int) -> object:
    decode = plans["decode"]
    return decode.values[getattr(decode, kind)[index]]


@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_programs_that_are_refused(runner, programs, tmp_path, name):
    change, why = BAD_PROGRAMS[name]
    folder = toys.save(tmp_path / "bad", toys.edited(programs["toy"], change))
    assert_refused(run(runner, folder, "--tokens", "2,3"), re.escape(str(folder / "model.pte")) + ": .*" + why)
    with pytest.raises(ValueError, match=why):
        generate(folder, [2, 3])


def test_an_edit_alone_refuses_nothing(runner, programs, tmp_path):
    folder = toys.save(tmp_path / "same", toys.edited(programs["toy"], lambda plans: None))
    assert list(generate(folder, [BOS, 3], 20).tokens) == toys.greedy(TABLE, [BOS, 3], 20)


def test_caches_that_are_not_shared(runner, folders):
    assert_refused(run(runner, folders["unshared"], "--tokens", "2,3"), "prefill and decode do not share their caches")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files(runner, programs, tmp_path, data):
    """Cut off anywhere, or anything else."""
    whole = programs["toy"]
    damaged = data.draw(st.one_of(st.integers(0, len(whole) - 1).map(lambda n: whole[:n]), st.binary(max_size=200)))
    folder = tmp_path / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "model.pte").write_bytes(damaged)
    assert_refused(run(runner, folder, "--tokens", "2,3"), "model.pte: is no ExecuTorch program|cannot be loaded")


def test_a_damaged_data_file(runner, programs, tmp_path):
    folder = toys.save(tmp_path / "data", programs["toy"])
    (folder / "weights.ptd").write_bytes(b"nothing of use" * 10)
    assert_refused(run(runner, folder, "--tokens", "2,3"), "model.pte: is no ExecuTorch program that .*can read")


def test_folders(runner, tmp_path):
    assert_refused(run(runner, tmp_path / "nowhere", "--tokens", "2"), "nowhere: no such folder")
    assert_refused(run(runner, tmp_path, "--tokens", "2"), "has no model.pte")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--tokens", "2,8"], "token id 8 is outside the program's vocabulary of 8"),
        (["--tokens", "2,-1"], "token id -1 is outside"),
        (["--tokens", "2,x"], "'x' is no token id"),
        (["--tokens", "2,"], "'' is no token id"),
        (["--tokens", "99999999999999999999"], "is no token id"),
        (["--tokens", ""], "does not begin with the beginning-of-sequence token 2; give --bos add"),
        (["--tokens", "", "--bos", "any"], "the prompt is empty"),
        (["--tokens", "3,2"], "does not begin with the beginning-of-sequence token"),
        (["--tokens", "2", "--bos", "no"], "--bos = 'no': must be require, add or any"),
        (["--tokens", "2", "--temperature", "-1"], "--temperature = '-1': must be a number >= 0"),
        (["--tokens", "2", "--temperature", "nan"], "--temperature = 'nan'"),
        (["--tokens", "2", "--temperature", "1x"], "--temperature = '1x'"),
        (["--tokens", "2", "--top-k", "-1"], "--top-k = '-1': must be an integer >= 0"),
        (["--tokens", "2", "--top-p", "0"], r"--top-p = '0': must be in \(0, 1\]"),
        (["--tokens", "2", "--top-p", "nan"], "--top-p = 'nan'"),
        (["--tokens", "2", "--max-new-tokens", "0"], "--max-new-tokens = '0': must be an integer >= 1"),
        (["--tokens", "2", "--seed", "-1"], "--seed = '-1': must be an integer >= 0"),
        (["--tokens", "2", "--fast"], "--fast: no such option"),
        (["--tokens"], "--tokens: needs a value"),
        (["--json"], "no --tokens given"),
        (["other", "--tokens", "2"], "'other': there is one folder already"),
    ],
)
def test_command_lines_that_are_refused(runner, toy, arguments, why):
    assert_refused(run(runner, toy, *arguments), why)


def test_bos(toy):
    want = toys.greedy(TABLE, [BOS, 3, 4], 20)
    for prompt, bos in (([3, 4], "add"), ([BOS, 3, 4], "add"), ([BOS, 3, 4], "require"), ([BOS, 3, 4], "any")):
        assert list(generate(toy, prompt, 20, bos=bos).tokens) == want
    assert list(generate(toy, [3, 4], 20, bos="any").tokens) == toys.greedy(TABLE, [3, 4], 20)
    with pytest.raises(ValueError, match=r"^the prompt does not begin with"):
        generate(toy, [3, 4])


def test_output(runner, toy):
    """Ids on stdout, then with --json what was measured, else on stderr."""
    want = ",".join(map(str, toys.greedy(TABLE, [BOS, 3, 5], 20)))
    options = ("--tokens", "2,3,5", "--temperature", 0)
    plain, report = run(runner, toy, *options), run(runner, toy, *options, "--json")
    assert plain.stdout == f"{want}\n"
    assert re.fullmatch(
        r"loaded in .* s; first token after .* s \(3 tokens, .*\); then \d+ tokens, .*/s\n", plain.stderr
    )
    ids, line = report.stdout.splitlines()
    values = json.loads(line)
    assert (ids, report.stderr) == (want, "")
    assert (values["prompt_tokens"], values["new_tokens"], values["stop_reason"]) == (3, want.count(",") + 1, "eos")
    assert all(0 < values[f"{what}_seconds"] < 60 for what in ("load", "prefill", "decode"))
    assert re.match(r"gemma4-runner for ExecuTorch [\d.]+.*XnnpackBackend", run(runner, "--version").stdout)
    assert "--max-new-tokens" in run(runner, "--help").stdout


def test_ids_come_one_by_one(toy):
    streamed = []
    assert list(generate(toy, [BOS, 3, 5], 20, stream=streamed.append).tokens) == streamed


def _forbid_locking() -> None:
    """No memory may be locked, whoever runs this: root has a capability that the limit does not bind (IPC_LOCK, 14)."""
    ctypes.CDLL(None).prctl(24, 14)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_locked_memory(runner, toy):
    options = (toy, "--tokens", "2,3,5", "--temperature", 0, "--mlock", "--json")
    refused = run(runner, *options, preexec_fn=_forbid_locking)
    assert refused.returncode == 0
    assert refused.stderr.startswith("gemma4-runner: note: the system does not let the weights be locked")
    assert json.loads(refused.stdout.splitlines()[1])["locked"] is False
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] > 1 << 20 or os.geteuid() == 0:
        locked = run(runner, *options)
        assert json.loads(locked.stdout.splitlines()[1])["locked"] is True
        assert locked.stdout.splitlines()[0] == refused.stdout.splitlines()[0]


def test_a_runner_that_is_not_there_or_dies(toy, tmp_path, monkeypatch):
    dies = tmp_path / "dies"
    dies.write_text("#!/bin/sh\necho 3,4\nkill -SEGV $$\n")
    dies.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"^gemma4-runner was ended by SIGSEGV$"):
        generate(toy, [BOS], runner=dies)
    monkeypatch.setenv("GEMMA4_RUNNER", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"none: not built yet; run `make runner`"):
        find_runner()


def test_what_building_needs(tmp_path, monkeypatch):
    with pytest.raises(building.BuildError, match="has no mlx backend; build ExecuTorch from source"):
        building.build(tmp_path / "mlx", "mlx")
    with pytest.raises(building.BuildError, match="cmake cannot configure the runner: "):
        building.build(tmp_path / "empty", package=tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(building.BuildError, match=r"^cmake is not installed"):
        building.build(tmp_path / "none")
    (tmp_path / "bin" / "cmake").symlink_to(sys.executable)
    with pytest.raises(building.BuildError, match=r"^there is no C\+\+ compiler"):
        building.build(tmp_path / "none")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(building.BuildError, match=r"^executorch is not installed"):
        building.build(tmp_path / "none")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            "[1/2] x\n/usr/bin/ld: a.o: undefined reference to `f()'\ncollect2: error",
            "not fit together .*: .*reference",
        ),
        ("r: /lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found", "do not fit together"),
        ("[1/2] x\na.cpp:3:1: error: expected ';'\n1 error", r"^a.cpp:3:1: error: expected ';'$"),
        ("r: error while loading shared libraries: libexecutorch.so", "^r: error while loading"),
        ("", "^it says nothing$"),
    ],
)
def test_explanations(output, line):
    assert re.search(line, building.explain(output))
