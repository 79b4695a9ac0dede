"""Fine-tune, teach from and record Cohere's reranker in a LlamaIndex app.

Nothing is here yet: the hosted engine and the teacher are being built.
"""

__version__ = "0.1.0"
