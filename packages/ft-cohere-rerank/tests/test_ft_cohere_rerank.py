import importlib.metadata
import subprocess
import sys

import pytest

import ft_cohere_rerank


def test_version_is_the_distributions_version() -> None:
    assert ft_cohere_rerank.__version__ == importlib.metadata.version("ft-cohere-rerank")


@pytest.mark.parametrize("name", ft_cohere_rerank.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(ft_cohere_rerank, name).__name__ == name


def test_neither_torch_nor_a_client_is_imported_before_it_is_needed() -> None:
    script = (
        "import sys, ft_cohere_rerank as pack; assert 'cohere' not in sys.modules;"
        "[getattr(pack, name) for name in pack.__all__];"
        "pack.CohereRerankerFinetuneEngine(api_key='k')._service; import cohere;"
        "heavy = {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
