import importlib.metadata

import ft_judge


def test_version_is_the_distributions_version() -> None:
    assert ft_judge.__version__ == importlib.metadata.version("ft-judge")
