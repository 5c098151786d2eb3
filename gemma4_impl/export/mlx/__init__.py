"""Export to ExecuTorch's MLX backend."""
