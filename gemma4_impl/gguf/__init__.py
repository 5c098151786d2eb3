"""GGUF: block formats to tensors, metadata to config and tokenizer, all read from the mapped file."""
