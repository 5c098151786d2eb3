"""The profile of a step: parts, bytes, floor; and that it leaves the session as it was."""

import pytest
import torch
from click.testing import CliRunner
from engine_models import NAMES, small, tokens

from gemma4_impl.cli import cli
from gemma4_impl.engine import Session, random_model
from gemma4_impl.engine.profile import GAPS, Part, Profile, profile
from gemma4_impl.engine.step import PARTS
from gemma4_impl.generate import cache_bytes


@pytest.mark.parametrize("variant", NAMES)
def test_parts_make_up_the_whole_and_the_session_goes_on(variant):
    model = random_model(small(variant), dtype=torch.float32)
    session, other = Session(model, 1, 64), Session(model, 1, 64)
    for one in (session, other):
        one.start(one.prefill(tokens(20))[None])
    result = profile(session)
    parts = {part.name: part for part in result.parts}
    expected = set(PARTS) if variant == "26B-A4B" else set(PARTS) - {"small steps"}
    assert set(parts) == expected
    assert all(part.seconds > 0 for part in parts.values())
    assert 0.5 * result.whole.seconds < sum(part.seconds for part in parts.values()) < 1.5 * result.whole.seconds
    assert result.context == 21
    assert parts["attention"].nbytes == cache_bytes(model.config, model.dtype, 21)
    assert parts["linears"].nbytes + parts["head"].nbytes == model.nbytes_read
    assert result.whole.nbytes == model.nbytes_read + parts["attention"].nbytes
    assert list(session.decode(6)) == list(other.decode(6))


def test_a_full_session_can_be_profiled():
    session = Session(random_model(small("31B")), 1, 24)
    session.start(session.prefill(tokens(20))[None])
    assert len(list(session.decode(4))) == 4
    assert profile(session).whole.seconds > 0


def test_the_table():
    whole = Part("all", 1e-3, 2_000_000)
    made = Profile(9, 1, (Part("linears", 6e-4, 1_500_000), Part("sampling", 1e-4, 0)), whole, 4e9)
    assert made.gaps == pytest.approx(3e-4)
    lines = made.lines()
    assert "copy 4 GB/s" in lines[0]
    linears, sampling, gaps, total = lines[2:]
    assert linears.split() == ["linears", "600.0", "60.0%", "1.5", "375.0", "62.5%"]
    assert sampling.split() == ["sampling", "100.0", "10.0%"]
    assert gaps.startswith(GAPS)
    assert gaps.split()[-2:] == ["300.0", "30.0%"]
    assert total.split() == ["all", "1000.0", "100.0%", "2.0", "500.0", "50.0%"]


def test_from_the_command_line(tiny):
    args = ["generate", str(tiny("31B")), "--prompt", "hi", "--max-new-tokens", "4", "--device", "cpu"]
    plain = CliRunner().invoke(cli, [*args, "--temperature", "0"])
    shown = CliRunner().invoke(cli, [*args, "--temperature", "0", "--profile"])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == plain.stdout
    lines = shown.stderr.splitlines()
    assert lines[0].startswith("a token after ")
    assert [line.split()[0] for line in lines[2:-1]] == [
        "embedding",
        "linears",
        "attention",
        "head",
        "sampling",
        "between",
        "all",
    ]
    assert lines[-1].startswith("gemma4: prompt ")


def test_only_with_torch(tiny):
    args = ["generate", str(tiny("31B")), "--prompt", "hi", "--backend", "jax", "--profile"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2
    assert "--profile needs --backend torch" in result.stderr
