"""The Gemma 4 text decoder in PyTorch: `decoder.py` reads top to bottom."""
