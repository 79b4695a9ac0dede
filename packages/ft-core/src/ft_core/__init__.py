"""What the fine-tuning packs for LlamaIndex share.

Importing this package loads nothing heavy: each public name lives in the module that a
newcomer would look for it in (`ft_core.datasets`, `ft_core.metrics`, `ft_core.evaluation`,
`ft_core.generation`, `ft_core.mining`, `ft_core.report`), and those import torch,
transformers or an API client only where one is first used.
"""

__version__ = "0.1.0"
