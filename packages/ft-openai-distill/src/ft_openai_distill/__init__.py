"""Distil the LLM of a LlamaIndex app into a cheaper student, hosted or your own.

Nothing is here yet: the recording handler and the engines are being built.
"""

__version__ = "0.1.0"
