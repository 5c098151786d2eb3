"""The parity engine: is a candidate the same model as the reference?"""

PATHS = ("full", "chunked", "decode", "generate", "left_padded", "right_padded")
"""full: one forward, no cache. chunked: ragged chunks through the cache. decode: token by token. generate: `prefill`
of the first half, as `gemma4 generate` runs it, then token by token. *_padded: the sequence and a prefix of it as one
batch, padded on that side, in ragged chunks."""
