"""Builds the C++ runner, and prints where it is."""

import argparse
import sys
from pathlib import Path

from gemma4_impl.runner.build import BUILD_DIR, PRESETS, BuildError, build


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gemma4_impl.runner", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--build-dir", type=Path, help="[default: build/runner, with the preset's name]")
    parser.add_argument("--executorch-dir", type=Path, help="share/cmake of an ExecuTorch package built from source")
    options = parser.parse_args()
    suffix = "" if options.preset == "default" else f"-{options.preset}"
    folder = options.build_dir or BUILD_DIR.with_name(BUILD_DIR.name + suffix)
    try:
        print(build(folder, options.preset, options.executorch_dir))
    except BuildError as error:
        print(f"runner: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
