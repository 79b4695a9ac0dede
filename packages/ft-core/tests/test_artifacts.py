"""The folder that every engine saves."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ft_core.artifacts import (
    MANIFEST,
    Manifest,
    check_output_folder,
    library_versions,
    model_card,
    read_manifest,
    saving,
)
from ft_core.errors import ArtifactError

KIND = "sentence-transformer"


def manifest(**changes):
    return Manifest(**{"kind": KIND, "base_model": "org/model", **changes})


def save(folder, text="weights", **changes):
    with saving(folder, manifest(**changes)) as partial:
        (partial / "model.safetensors").write_text(text)


def names(folder):
    return sorted(os.listdir(folder))


def test_a_saved_folder_reads_back(tmp_path):
    folder = tmp_path / "runs" / "out"
    save(folder, data={"train": "00ff"}, settings={"epochs": 3}, metrics={"ndcg@10": [0.6, 0.7]})
    assert names(folder) == ["README.md", MANIFEST, "model.safetensors"]
    read = read_manifest(folder, KIND)
    assert (read.base_model, read.data, read.settings) == (
        "org/model",
        {"train": "00ff"},
        {"epochs": 3},
    )
    assert read.metrics == {"ndcg@10": [0.6, 0.7]}
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nbase_model: "org/model"\n')
    assert "| `epochs` |" in card or "| epochs | `3` |" in card


def test_a_card_of_the_engines_own_is_kept(tmp_path):
    with saving(tmp_path / "out", manifest()) as partial:
        (partial / "README.md").write_text("own")
    assert (tmp_path / "out" / "README.md").read_text() == "own"


def test_settings_of_any_type_are_saved(tmp_path):
    settings = {
        "path": Path("a") / "b",
        "rate": np.float32(0.5),
        "layers": np.arange(2),
        "type": float,
        "infinite": float("inf"),
    }
    save(
        tmp_path / "out", settings=settings, metrics={"loss": np.float64(0.25), "bad": float("nan")}
    )
    read = read_manifest(tmp_path / "out", KIND)
    assert read.settings["path"] == str(Path("a") / "b")
    assert read.settings["rate"] == 0.5
    assert read.settings["layers"] == [0, 1]
    assert read.metrics["loss"] == 0.25
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["kind"] == KIND
    assert "`0.5`" in model_card(read)


def test_saving_again_replaces_our_folder_whole(tmp_path):
    save(tmp_path / "out", "one")
    (tmp_path / "out" / "old-shard").write_text("")
    save(tmp_path / "out", "two")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "two"
    assert "old-shard" not in names(tmp_path / "out")


def test_an_error_while_saving_leaves_the_last_good_folder(tmp_path):
    save(tmp_path / "out", "one")

    def failing():
        with saving(tmp_path / "out", manifest()) as partial:
            (partial / "model.safetensors").write_text("tw")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert (tmp_path / "out" / "model.safetensors").read_text() == "one"
    assert names(tmp_path) == ["out"]


def test_what_is_not_ours_is_never_replaced(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_text("cat")
    with pytest.raises(ArtifactError, match=r"photos: holds files that no fine-tuning pack saved"):
        check_output_folder(folder, KIND)
    with pytest.raises(ArtifactError, match="name an empty or new folder"):
        save(folder)
    assert names(folder) == ["cat.jpg"]
    save(tmp_path / "adapter", kind="adapter")
    with pytest.raises(ArtifactError, match="adapter: holds a adapter, not a sentence"):
        save(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["new", "a/b/c", "empty", "out"])
def test_good_places_are_accepted(tmp_path, name):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "out")
    check_output_folder(tmp_path / name, KIND)
    save(tmp_path / name)
    assert read_manifest(str(tmp_path / name), KIND).kind == KIND


def test_bad_places_are_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file: is a file"):
        check_output_folder(tmp_path / "file", KIND)
    with pytest.raises(
        ArtifactError, match=r"cannot be made, since .*file is not a writable folder"
    ):
        check_output_folder(tmp_path / "file" / "sub" / "out", KIND)
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "inner")
    for place in (".", "..", tmp_path / "work", "/"):
        with pytest.raises(ArtifactError, match="is or holds the current folder"):
            check_output_folder(place, KIND)
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ArtifactError, match="locked is not a writable folder"):
            check_output_folder(tmp_path / "locked" / "out", KIND)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; the folder is damaged"),
        ('{"kind": "sentence', "ends in the middle"),
        ("[]", "Input should be a valid dictionary"),
        ('{"kind": "sentence-transformer"}', "base_model: Field required"),
        ('{"kind": "x", "base_model": "y", "colour": 1}', "colour: Extra inputs are not permitted"),
        ('{"kind": "x", "base_model": "y", "format": 2}', "format 2 is newer"),
        ('{"kind": "x", "base_model": "y"}', "holds a x, not a sentence-transformer"),
    ],
)
def test_a_damaged_manifest_is_one_clear_error(tmp_path, text, message):
    save(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError) as caught:
        read_manifest(tmp_path / "out", KIND)
    assert str(tmp_path / "out") in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_missing_or_not_ours_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere: no such folder; train first"):
        read_manifest(tmp_path / "nowhere", KIND)
    with pytest.raises(ArtifactError, match=r"has no ft\.json"):
        read_manifest(tmp_path, KIND)


def test_a_folder_moved_aside_by_a_kill_is_found(tmp_path):
    save(tmp_path / "out", "one")
    os.rename(tmp_path / "out", tmp_path / ".out.replaced")
    assert read_manifest(tmp_path / "out", KIND).kind == KIND
    assert names(tmp_path) == ["out"]


def test_versions_are_of_what_is_installed():
    versions = library_versions(["numpy", "no-such-distribution"])
    assert versions["numpy"] == np.__version__
    assert set(versions) == {"python", "numpy"}
