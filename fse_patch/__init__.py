"""Fuse the shared expert into the routed experts' kernel, in released vLLM and SGLang, from outside."""

__version__ = "0.1.0"
