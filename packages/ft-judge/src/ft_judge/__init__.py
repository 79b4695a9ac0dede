"""Fine-tune the judge that evaluates a LlamaIndex app.

Nothing is here yet: the verdict handler and the judge engines are being built.
"""

__version__ = "0.1.0"
