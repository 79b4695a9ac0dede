"""Fine-tune a model that you own to write SQL for your database in a LlamaIndex app.

Nothing is here yet: the engine and the safe query engine are being built.
"""

__version__ = "0.1.0"
