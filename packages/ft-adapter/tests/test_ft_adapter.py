import importlib.metadata

import ft_adapter


def test_version_is_the_distributions_version() -> None:
    assert ft_adapter.__version__ == importlib.metadata.version("ft-adapter")
