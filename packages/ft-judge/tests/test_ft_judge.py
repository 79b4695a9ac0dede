import importlib.metadata
import subprocess
import sys

import pytest

import ft_judge


def test_version_is_the_distributions_version() -> None:
    assert ft_judge.__version__ == importlib.metadata.version("ft-judge")


@pytest.mark.parametrize("name", ft_judge.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(ft_judge, name).__name__ == name


def test_importing_the_pack_loads_nothing_heavy() -> None:
    code = (
        "import sys, ft_judge; from ft_judge import JudgeDataset, read_verdicts;"
        "heavy = {'torch', 'transformers', 'openai', 'sqlglot', 'matplotlib', 'jinja2'};"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    path = [entry for entry in sys.path if entry]
    code = f"import sys; sys.path[:0] = {path!r}; {code}"
    subprocess.run([sys.executable, "-c", code], check=True)
