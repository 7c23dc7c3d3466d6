"""A supervisor for vLLM that notices a stalled multi-GPU load, ends it cleanly and retries with settings that work."""

__version__ = "0.1.0"
