import importlib.metadata

import ft_crossencoder


def test_version_is_the_distributions_version() -> None:
    assert ft_crossencoder.__version__ == importlib.metadata.version("ft-crossencoder")
