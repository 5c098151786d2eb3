"""torch.export, strict, of the vision tower and projector: any number of patches up to the image processor's most."""

import pytest
import torch
from drawn_images import noise
from torch.export import Dim, ExportedProgram
from vision_reference import ours

from gemma4_impl.vision.encoder import Vision
from gemma4_impl.vision.processing import ImageProcessor


@torch.no_grad()
def export(model: Vision, processor: ImageProcessor, images: int) -> ExportedProgram:
    """For this many images at once, of 2 to `max_soft_tokens` soft tokens."""
    pooled = Dim("pooled", min=2, max=processor.max_soft_tokens)
    patches = processor.pooling_kernel_size**2 * pooled
    example = processor([noise("RGB", 30, 20, 0)] * images)
    shapes = {name: {1: patches} for name in ("pixel_values", "positions")}
    return torch.export.export(model, (example.pixel_values, example.positions), dynamic_shapes=shapes, strict=True)


CASES = [("E2B", torch.float32), ("26B-A4B", torch.bfloat16), ("31B", torch.float32)]


@pytest.mark.parametrize(("variant", "dtype"), CASES, ids=str)
def test_the_program_computes_what_the_model_does(variant, dtype, tiny_images):
    path = tiny_images(variant)
    model, processor = ours(path, dtype), ImageProcessor.from_pretrained(path)
    program = export(model, processor, 2).module()
    sizes = [((30, 30), (31, 31)), ((300, 2), (2, 300)), ((90, 20), (20, 85)), ((200, 7), (7, 190))]
    lengths = set()
    for i, pair in enumerate(sizes):
        images = processor([noise("RGB", *size, i) for size in pair])
        for batch in (images, images.trimmed()):
            lengths.add(batch.positions.shape[1])
            with torch.no_grad():
                got, want = program(batch.pixel_values, batch.positions), model(batch.pixel_values, batch.positions)
            # The same operations in the same order.
            assert torch.equal(got, want)
    assert processor.max_patches in lengths
    assert len(lengths) >= 4
    # Neither more patches than that, nor a part of a square.
    for change in (processor.pooling_kernel_size**2, -1):
        changed = [torch.nn.functional.pad(t, (0, 0, 0, change)) for t in (images.pixel_values, images.positions)]
        with pytest.raises(AssertionError, match="Guard failed"):
            program(*changed)
