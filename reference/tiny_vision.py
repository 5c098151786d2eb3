"""The vision towers of the tiny multimodal checkpoints, one for each released variant."""

import transformers

# In each, hidden, intermediate, heads * head_dim, values a patch and positions all differ; the positions hold a row of
# as many soft tokens as an image may have.
VISION: dict[str, dict[str, int]] = {
    "E2B": {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "position_embedding_size": 216,
    },
    "E4B": {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "patch_size": 5,
        "pooling_kernel_size": 3,
        "position_embedding_size": 212,
    },
    "26B-A4B": {
        "hidden_size": 44,
        "intermediate_size": 60,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 12,
        "patch_size": 6,
        "pooling_kernel_size": 3,
        "position_embedding_size": 220,
    },
    "31B": {
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 150,
    },
}
"""Keyword arguments of `Gemma4VisionConfig`, by variant."""

MAX_SOFT_TOKENS = 70
"""The most that an image takes up: of the numbers that transformers allows, the smallest."""


def vision_config(variant: str) -> transformers.Gemma4VisionConfig:
    """As released: clipped linears in the small models, standardised soft tokens in the large ones."""
    small = variant.startswith("E")
    return transformers.Gemma4VisionConfig(**VISION[variant], use_clipped_linears=small, standardize=not small)


def processor_config(variant: str) -> dict[str, object]:
    """The content of `processor_config.json`."""
    sizes = {key: VISION[variant][key] for key in ("patch_size", "pooling_kernel_size")}
    processor = {
        "image_processor_type": "Gemma4ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "max_soft_tokens": MAX_SOFT_TOKENS,
        **sizes,
    }
    return {"processor_class": "Gemma4Processor", "image_processor": processor}
