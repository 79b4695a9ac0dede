import importlib.metadata

import ft_text2sql


def test_version_is_the_distributions_version() -> None:
    assert ft_text2sql.__version__ == importlib.metadata.version("ft-text2sql")
