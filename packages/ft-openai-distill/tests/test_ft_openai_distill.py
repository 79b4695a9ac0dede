import importlib.metadata

import ft_openai_distill


def test_version_is_the_distributions_version() -> None:
    assert ft_openai_distill.__version__ == importlib.metadata.version("ft-openai-distill")
