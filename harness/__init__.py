"""Measures what a GGUF quantization costs: perplexity, size and CPU speed against its reference."""

__version__ = "0.1.0"
