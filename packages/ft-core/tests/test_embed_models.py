"""Embedding models by a short name: what a good name gives, and what a bad one says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from model_assets import HashingEmbedding

from ft_core.embed_models import load_embed_model
from ft_core.errors import ArgumentError, MissingExtraError


@pytest.mark.parametrize("spec", ["", " ", "openai:", "openai-like: "])
def test_a_name_is_needed(spec: str) -> None:
    with pytest.raises(ArgumentError, match="names no model; give openai:MODEL"):
        load_embed_model(spec)


def test_openai_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ArgumentError, match=r"^--embed-model: openai:text-embedding-3-small need"):
        load_embed_model("openai:text-embedding-3-small")


def test_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert load_embed_model("openai:text-embedding-3-small").model_name == "text-embedding-3-small"
    with pytest.raises(ArgumentError, match="openai-like:nothing@URL") as raised:
        load_embed_model("openai:nothing")
    assert "sk-secret" not in str(raised.value)


@pytest.mark.parametrize(
    "spec", ["openai-like:bge", "openai-like:bge@host", "openai-like:@http://h"]
)
def test_a_server_needs_a_model_and_a_url(spec: str) -> None:
    with pytest.raises(ArgumentError, match="has no URL; write openai-like:MODEL@URL"):
        load_embed_model(spec)


def test_a_server_gets_model_url_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    model = load_embed_model("openai-like:org/bge@m3@http://localhost:1/v1")
    assert model.model_name == "org/bge@m3"
    assert model.api_base == "http://localhost:1/v1"
    assert model.api_key == "sk-other"


def test_a_folder_that_is_no_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text("no json")
    for name in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(ArgumentError, match=r"^--embed-model: .*cannot be loaded") as raised:
            load_embed_model(name)
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)
        assert "openai:MODEL" in str(raised.value)  # what would do


def test_a_pack_may_load_what_is_local_itself() -> None:
    model = HashingEmbedding()
    assert load_embed_model("some/model", load_local=lambda name: {"some/model": model}[name])

    def refuse(name: str) -> HashingEmbedding:
        try:
            raise RuntimeError("the weights are cut off")
        except RuntimeError as error:
            raise ArgumentError("model_id", f"{name!r} is bad; pass embed_model") from error

    with pytest.raises(ArgumentError, match=r"^--retriever: 'a/b' .*: the weights are cut off; gi"):
        load_embed_model("a/b", option="--retriever", load_local=refuse)
    with pytest.raises(ArgumentError, match=r"^--retriever: openai-like:bge has no URL"):
        load_embed_model("openai-like:bge", option="--retriever", load_local=refuse)


@pytest.mark.parametrize(
    ("spec", "module", "extra"),
    [
        ("openai:text-embedding-3-small", "openai", "openai"),
        ("openai-like:bge@http://h", "openai_like", "openai"),
        ("some/model", "huggingface", "huggingface"),
    ],
)
def test_a_missing_class_names_the_pip_command(
    spec: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    full = f"llama_index.embeddings.{module}"
    for name in [name for name in sys.modules if name == full or name.startswith(f"{full}.")]:
        monkeypatch.delitem(sys.modules, name)

    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == full:  # what `pip uninstall` leaves
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    own = f"llama-index-embeddings-{module.replace('_', '-')}"
    for pack, requirement in ((None, own), ("ft-example", f"ft-example[{extra}]")):
        with pytest.raises(MissingExtraError) as raised:
            load_embed_model(spec, pack=pack)
        assert f"pip install '{requirement}'" in str(raised.value)
