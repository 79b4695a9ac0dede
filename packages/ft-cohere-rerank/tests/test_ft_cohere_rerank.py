import importlib.metadata

import ft_cohere_rerank


def test_version_is_the_distributions_version() -> None:
    assert ft_cohere_rerank.__version__ == importlib.metadata.version("ft-cohere-rerank")
