"""Fine-tune the reranker of a LlamaIndex app on its own data.

Nothing is here yet: the cross-encoder engine and the reranker are being built.
"""

__version__ = "0.1.0"
