"""Tests of Triton kernels on the CPU, collected where Triton interprets; `test_interpreted.py` sees to that."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]
