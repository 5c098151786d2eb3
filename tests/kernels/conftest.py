"""Puts this folder on the path, so that every kernel test can import `kernel_checks`."""
