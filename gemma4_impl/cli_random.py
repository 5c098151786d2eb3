"""`gemma4 random-checkpoint`: a checkpoint of a released size with random weights: no download."""

from pathlib import Path

import click

from gemma4_impl.cli import cli, resolve_device
from gemma4_impl.cli_quantize import bar, parse_size, size_text, terminable


@cli.command("random-checkpoint")
@click.option("--variant", required=True, help="E2B, E4B, 26B-A4B or 31B.")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder to write; new.")
@click.option("--recipe", default="default", help="As of `gemma4 quantize`; 'dense' writes bfloat16.")
@click.option("--device", default="cpu", help="Where the weights are drawn: cpu, cuda.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Same seed and kind of device, same weights.")
@click.option("--shard-size", default="5GB", help="Largest weight file, such as 500MB or 2GiB.")
def random_command(variant: str, out: Path, recipe: str, device: str, seed: int, shard_size: str) -> None:
    """Write a checkpoint of the real size with random weights.

    It loads and runs like a real one, as fast and in as much memory; what it says means nothing.
    """
    shard_bytes = parse_size(shard_size)

    from gemma4_impl.engine.random import find_variant
    from gemma4_impl.engine.random_checkpoint import random_checkpoint

    name, target = find_variant(variant), resolve_device(device)
    with terminable(), bar("drawing") as progress:
        written = random_checkpoint(
            name, out, None if recipe == "dense" else recipe, target, seed, shard_bytes, progress
        )
    click.echo(f"{out}: {name}, {size_text(written)}")
