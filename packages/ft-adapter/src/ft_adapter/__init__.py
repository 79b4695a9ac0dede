"""Adapters that improve any embedding model of a LlamaIndex app without re-indexing.

Nothing is here yet: the adapter engine and the adapted retriever are being built.
"""

__version__ = "0.1.0"
