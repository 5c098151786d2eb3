"""Adapters to what our implementation is compared with."""

import logging

# transformers imports torchao where it is installed, which warns of its GPU libraries and of torch's ways; neither is
# used here, and both would end up in what a user reads.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
