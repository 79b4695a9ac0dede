"""Embedding models by a short name: what a bad name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from ft_adapter.models import load_embed_model
from ft_core.errors import ArgumentError


def test_openai_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ArgumentError, match="embed-model: openai:text-embedding-3-small needs a"):
        load_embed_model("openai:text-embedding-3-small")


def test_an_unknown_model_of_openai_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(ArgumentError, match="embed-model: openai:nothing: ") as raised:
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
        with pytest.raises(ArgumentError, match=r"embed-model: .*cannot be loaded") as raised:
            load_embed_model(name)
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)
        assert "openai:MODEL" in str(raised.value)  # what would do
