"""Adapters to what our implementation is compared with."""

import logging
import os

# JAX would take three quarters of a GPU's memory as soon as it starts, and PyTorch needs some of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# transformers imports torchao where it is installed, which warns of its GPU libraries and of torch's ways; neither is
# used here, and both would end up in what a user reads.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
