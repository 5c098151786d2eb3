"""Images: pixels to patches (processing.py), patches to soft tokens (encoder.py), and the sizes of both (config.py)."""
