"""The folder of an adapter: what comes back, and what is refused."""

import collections
import importlib.metadata
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import PrivateAttr
from safetensors.torch import load_file, save_file
from torch import nn

from ft_adapter.adapters import BaseAdapter, LinearLayer, LowRankLayer, ResidualNN, TwoLayerNN
from ft_adapter.saved import (
    KIND,
    PROBE_TEXT,
    Base,
    base_of,
    check_base,
    load_adapter,
    name_of,
    save_adapter,
)
from ft_core.artifacts import MANIFEST, Manifest, read_manifest
from ft_core.errors import ArgumentError, ArtifactError

FILES = ["README.md", "adapter.json", "adapter.safetensors", MANIFEST]


class Scale(BaseAdapter):
    """An adapter of a user, with its configuration."""

    def __init__(self, in_features, start=1.0):
        super().__init__()
        self.in_features = in_features
        self.start = start
        self.factor = nn.Parameter(torch.full((in_features,), start))
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, embed):
        return embed * self.factor

    def get_config_dict(self):
        return {"in_features": self.in_features, "start": self.start}


class Plain(nn.Module):
    """A module of a user that knows nothing of adapters."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, embed):
        return self.inner(embed)


class Model(BaseEmbedding):
    """Gives each text the same vector: enough to be told apart by."""

    _vector: object = PrivateAttr()
    _texts: list = PrivateAttr(default_factory=list)

    def __init__(self, vector, name="org/model"):
        super().__init__(model_name=name)
        self._vector = vector

    def _get_query_embedding(self, query):
        self._texts.append(query)
        if isinstance(self._vector, Exception):
            raise self._vector
        return self._vector

    def _get_text_embedding(self, text):
        raise AssertionError("the probe is embedded as a query")

    async def _aget_query_embedding(self, query):
        return self._get_query_embedding(query)


def noisy(adapter, seed=0):
    """Return the adapter with weights that differ from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return adapter


def names(folder):
    return sorted(os.listdir(folder))


def same_output(left, right, width=6):
    embed = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return torch.equal(left.eval()(embed), right(embed))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BUILT_IN = [
    LinearLayer(6, 6),
    LinearLayer(6, 4, bias=True),
    LowRankLayer(6, rank=2),
    LowRankLayer(6, rank=6, bias=True),
    ResidualNN(6, 9, activation_fn_str="tanh", dropout=0.5),
    TwoLayerNN(6, 9, 4, activation_fn_str="leaky_relu"),
    TwoLayerNN(6, 9, 6, bias=True, activation_fn_str="sigmoid", add_residual=True),
]


@pytest.mark.parametrize("adapter", BUILT_IN, ids=lambda adapter: type(adapter).__name__)
def test_an_adapter_of_the_pack_comes_back_by_itself(adapter, tmp_path):
    noisy(adapter).train()
    save_adapter(tmp_path / "runs" / "a", adapter)
    assert names(tmp_path / "runs" / "a") == FILES
    saved = load_adapter(str(tmp_path / "runs" / "a"))
    assert type(saved.adapter) is type(adapter)
    assert saved.adapter.get_config_dict() == adapter.get_config_dict()
    assert not saved.adapter.training
    assert same_output(adapter, saved.adapter)
    assert (saved.sides, saved.base, saved.identity, saved.legacy) == ("query", None, False, False)
    assert saved.folder == tmp_path / "runs" / "a"


def test_everything_about_the_training_comes_back(tmp_path):
    base = base_of(Model([]), np.array([0.1, 0.25, -3e-9], dtype=np.float32))
    manifest = Manifest(kind=KIND, base_model="org/model", settings={"epochs": 4})
    save_adapter(
        tmp_path / "a", LinearLayer(3, 3), sides="both", base=base, manifest=manifest, identity=True
    )
    saved = load_adapter(tmp_path / "a")
    assert (saved.sides, saved.identity) == ("both", True)
    assert saved.base == base == Base("org/model", 3, base.probe, PROBE_TEXT)
    assert saved.base.probe == [float(np.float32(0.1)), 0.25, float(np.float32(-3e-9))]
    assert read_manifest(tmp_path / "a", KIND).settings == {"epochs": 4}


def test_without_an_engine_the_folder_has_a_manifest_of_its_own(tmp_path):
    save_adapter(tmp_path / "a", LinearLayer(2, 2))
    manifest = read_manifest(tmp_path / "a", KIND)
    assert manifest.base_model == "unknown"
    assert manifest.settings == {"class": "LinearLayer", "sides": "query"}
    assert manifest.versions["torch"] == importlib.metadata.version("torch")
    save_adapter(tmp_path / "b", LinearLayer(2, 2), base=Base("org/model", 2, [1.0, 0.0]))
    assert read_manifest(tmp_path / "b", KIND).base_model == "org/model"


def test_save_and_load_of_the_adapter_itself(tmp_path):
    adapter = noisy(LowRankLayer(6, 2))
    adapter.save(tmp_path / "a")
    assert same_output(adapter, LowRankLayer.load(tmp_path / "a"))
    assert same_output(adapter, BaseAdapter.load(tmp_path / "a"))
    with pytest.raises(ArtifactError, match="holds a LowRankLayer, not a LinearLayer"):
        LinearLayer.load(tmp_path / "a")


def test_weights_that_share_memory_or_lie_crosswise_are_saved(tmp_path):
    adapter = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    adapter[0].weight = nn.Parameter(torch.randn(6, 6).T)
    adapter[1].weight = adapter[0].weight
    save_adapter(tmp_path / "a", adapter)
    fresh = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    loaded = load_adapter(tmp_path / "a", adapter=fresh).adapter
    assert torch.equal(loaded[0].weight, adapter[0].weight)
    assert torch.equal(loaded[1].weight, adapter[0].weight)


def test_half_precision_weights_come_back_for_single_precision_embeddings(tmp_path):
    adapter = noisy(LinearLayer(6, 6)).half()
    save_adapter(tmp_path / "a", adapter)
    loaded = load_adapter(tmp_path / "a").adapter
    assert loaded.linear.weight.dtype == torch.float32
    assert torch.equal(loaded.linear.weight.half(), adapter.linear.weight)


# A class that is not of the pack


def test_a_custom_adapter_comes_back_with_its_class(tmp_path):
    adapter = noisy(Scale(6, start=2.0))
    save_adapter(tmp_path / "a", adapter)
    saved = load_adapter(tmp_path / "a", Scale)
    assert same_output(adapter, saved.adapter)
    assert saved.adapter.start == 2.0
    assert int(saved.adapter.seen) == 3
    assert same_output(adapter, Scale.load(tmp_path / "a"))


def test_a_custom_class_is_asked_for_and_never_imported(tmp_path):
    save_adapter(tmp_path / "a", Scale(6))
    with pytest.raises(ArtifactError, match=r"holds a Scale, .* pass adapter_cls=Scale"):
        load_adapter(tmp_path / "a")
    edit(tmp_path / "a" / "adapter.json", **{"class": "antigravity.Anything"})
    with pytest.raises(ArtifactError, match="no class of this pack"):
        load_adapter(tmp_path / "a")
    assert "antigravity" not in sys.modules


def test_another_class_than_the_saved_one_is_refused(tmp_path):
    save_adapter(tmp_path / "a", Scale(6))
    with pytest.raises(ArtifactError, match="holds a Scale, not a LinearLayer"):
        load_adapter(tmp_path / "a", LinearLayer)
    with pytest.raises(ArtifactError, match="holds a Scale, not a Plain"):
        load_adapter(tmp_path / "a", adapter=Plain(6))


def test_a_class_that_borrows_a_name_of_the_pack_is_not_taken_for_it(tmp_path):
    own = type("LinearLayer", (Scale,), {})
    save_adapter(tmp_path / "a", noisy(own(6)))
    with pytest.raises(ArtifactError, match=r"pass adapter_cls=LinearLayer"):
        load_adapter(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"LinearLayer, not a LinearLayer"):
        load_adapter(tmp_path / "a", LinearLayer)
    assert type(load_adapter(tmp_path / "a", own).adapter) is own


def test_a_plain_module_comes_back_into_an_instance_of_its_shape(tmp_path):
    adapter = noisy(Plain(6))
    save_adapter(tmp_path / "a", adapter)
    assert json.loads((tmp_path / "a" / "adapter.json").read_text())["config"] is None
    fresh = Plain(6)
    before = fresh.inner.weight.clone()
    assert same_output(adapter, load_adapter(tmp_path / "a", adapter=fresh).adapter)
    assert torch.equal(fresh.inner.weight, before)


def test_a_plain_module_without_an_instance_says_what_to_pass(tmp_path):
    save_adapter(tmp_path / "a", Plain(6))
    with pytest.raises(ArtifactError, match=r"pass adapter=Plain\(...\)"):
        load_adapter(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"no get_config_dict; pass adapter="):
        load_adapter(tmp_path / "a", Plain)
    with pytest.raises(ArtifactError, match=r"weights do not fit: .*size mismatch"):
        load_adapter(tmp_path / "a", adapter=Plain(7))


def test_a_class_without_arguments_needs_no_configuration(tmp_path):
    class Fixed(Plain):
        def __init__(self):
            super().__init__(6)

    adapter = noisy(Fixed())
    save_adapter(tmp_path / "a", adapter)
    assert same_output(adapter, load_adapter(tmp_path / "a", Fixed).adapter)


def test_a_class_or_instance_that_is_no_module_is_named(tmp_path):
    save_adapter(tmp_path / "a", LinearLayer(2, 2))
    with pytest.raises(ArgumentError, match="adapter_cls: is a class"):
        load_adapter(tmp_path / "a", dict)
    with pytest.raises(ArgumentError, match="adapter_cls: is a class"):
        load_adapter(tmp_path / "a", LinearLayer(2, 2))
    with pytest.raises(ArgumentError, match="adapter: is an instance"):
        load_adapter(tmp_path / "a", adapter=LinearLayer)
    with pytest.raises(ArgumentError, match="one of the two"):
        load_adapter(tmp_path / "a", LinearLayer, adapter=LinearLayer(2, 2))


# What cannot be saved leaves what was there


class OddState(LinearLayer):
    def get_extra_state(self):
        return {"not": "a tensor"}


def odd_config(config):
    adapter = LinearLayer(2, 2)
    adapter.get_config_dict = lambda: config
    return adapter


def broken_config():
    adapter = LinearLayer(2, 2)
    adapter.get_config_dict = lambda: 1 / 0
    return adapter


@pytest.mark.parametrize(
    ("adapter", "arguments", "error"),
    [
        (noisy(LinearLayer(2, 2)), {"sides": "documents"}, "sides: is 'query' or 'both'"),
        (OddState(2, 2), {}, "is no tensor"),
        (nn.LazyLinear(2), {}, "is no tensor"),
        (odd_config({"a": object()}), {}, "more than JSON values"),
        (odd_config({"a": float("nan")}), {}, "more than JSON values"),
        (odd_config([1]), {}, "returns no dict"),
        (LinearLayer(2, 2), {"base": Base("m", 3, [1.0] * 3)}, "dimension 2, and 'm' gives 3"),
        (LinearLayer(2, 2), {"manifest": Manifest(kind="x", base_model="m")}, "manifest: is of"),
    ],
)
def test_what_cannot_be_saved_leaves_the_old_folder(adapter, arguments, error, tmp_path):
    old = noisy(LinearLayer(6, 6))
    save_adapter(tmp_path / "a", old)
    with pytest.raises(ArgumentError, match=error):
        save_adapter(tmp_path / "a", adapter, **arguments)
    assert names(tmp_path) == ["a"]
    assert same_output(old, load_adapter(tmp_path / "a").adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(value, tmp_path):
    adapter = LinearLayer(6, 6)
    with torch.no_grad():
        adapter.linear.weight[1, 2] = value
    with pytest.raises(ArgumentError, match=r"'linear.weight' is not finite"):
        save_adapter(tmp_path / "a", adapter)
    assert names(tmp_path) == []


def test_the_adapters_own_error_passes_and_leaves_the_old_folder(tmp_path):
    old = noisy(LinearLayer(6, 6))
    save_adapter(tmp_path / "a", old)
    with pytest.raises(ZeroDivisionError):
        save_adapter(tmp_path / "a", broken_config())
    assert same_output(old, load_adapter(tmp_path / "a").adapter)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits the size of files by POSIX means")
def test_a_full_disk_leaves_the_old_folder(tmp_path):
    old = noisy(LinearLayer(6, 6))
    save_adapter(tmp_path / "a", old)
    # The limit on a file's size stands in for the full disk: 300 x 300 floats do not fit.
    script = """
import resource, signal, sys
from ft_adapter.adapters import LinearLayer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
LinearLayer(300, 300).save(sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert names(tmp_path) == ["a"]
    assert same_output(old, load_adapter(tmp_path / "a").adapter)


def test_a_new_adapter_replaces_the_old_one_whole(tmp_path):
    save_adapter(tmp_path / "a", ResidualNN(6, 3))
    new = noisy(LinearLayer(6, 6))
    save_adapter(tmp_path / "a", new)
    assert names(tmp_path / "a") == FILES
    assert same_output(new, load_adapter(tmp_path / "a").adapter)


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_whoever_may_read_the_header_may_read_the_weights(tmp_path):
    save_adapter(tmp_path / "a", LinearLayer(2, 2))
    modes = {name: (tmp_path / "a" / name).stat().st_mode for name in FILES}
    assert len(set(modes.values())) == 1, modes


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    write_legacy(tmp_path / "old", LinearLayer(6, 6))
    (tmp_path / "file").write_text("mine")
    other = tmp_path / "other"
    save_adapter(other, LinearLayer(6, 6))
    edit(other / MANIFEST, kind="sentence-transformer")
    for name, error in [
        ("old", "no fine-tuning pack saved"),
        ("file", "is a file"),
        ("other", "holds a sentence-transformer, not a embedding-adapter"),
    ]:
        with pytest.raises(ArtifactError, match=error):
            save_adapter(tmp_path / name, LinearLayer(6, 6))
    assert names(tmp_path / "old") == ["config.json", "pytorch_model.bin"]


# Folders that are missing, foreign or damaged


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder"):
        load_adapter(tmp_path / "none")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=f"has no {MANIFEST}"):
        load_adapter(tmp_path / "notes")
    save_adapter(tmp_path / "a", LinearLayer(2, 2))
    edit(tmp_path / "a" / MANIFEST, kind="sentence-transformer")
    with pytest.raises(ArtifactError, match="holds a sentence-transformer"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_a_missing_or_cut_file_is_named(name, tmp_path):
    save_adapter(tmp_path / "a", LinearLayer(6, 6), base=Base("m", 6, [1.0] * 6))
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=f"{name}: .*damaged"):
        load_adapter(tmp_path / "a")
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match=f"{name}: .*damaged"):
        load_adapter(tmp_path / "a")
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{name}: no such file"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"sides": "left"}, "sides: "),
        ({"identity": "yes"}, "identity: "),
        ({"class": 3}, "class: "),
        ({"later": 1}, "later: .*newer release"),
        ({"base": {"name": "m"}}, "base.dimension: "),
        (
            {"base": {"name": "m", "dimension": 6, "probe_text": "t", "probe_vector": [1.0]}},
            "base: 1 numbers in a vector of dimension 6",
        ),
        (
            {"base": {"name": "m", "dimension": 1, "probe_text": "t", "probe_vector": [np.nan]}},
            "base.probe_vector.0: ",
        ),
        ({"config": {"in_features": 6}}, "does not make a LinearLayer: .*out_features"),
        ({"config": {"in_features": 6, "out_features": 6, "colour": 1}}, "make .*colour"),
        ({"config": {"in_features": "6", "out_features": 6}}, "does not make a LinearLayer"),
        ({"config": {"in_features": 6, "out_features": -6}}, "does not make a LinearLayer"),
        ({"config": {"in_features": 5, "out_features": 6}}, "do not fit: .*size mismatch"),
        ({"config": {"in_features": 6, "out_features": 6, "bias": True}}, "do not fit: .*Missing"),
        ({"class": "LowRankLayer", "config": {"in_features": 6}}, "make a LowRankLayer: rank"),
    ],
)
def test_a_header_that_does_not_fit_names_the_folder_and_the_field(changes, error, tmp_path):
    save_adapter(tmp_path / "a", LinearLayer(6, 6))
    edit(tmp_path / "a" / "adapter.json", **changes)
    with pytest.raises(ArtifactError, match=error) as caught:
        load_adapter(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


def test_saved_weights_that_are_not_finite_are_refused(tmp_path):
    save_adapter(tmp_path / "a", LinearLayer(6, 6))
    path = tmp_path / "a" / "adapter.safetensors"
    weights = load_file(path)
    weights["linear.weight"][0, 0] = float("nan")
    save_file(weights, path)
    with pytest.raises(ArtifactError, match=r"a: 'linear.weight' is not finite"):
        load_adapter(tmp_path / "a")


# The predecessor's folders


def write_legacy(folder, adapter, **config):
    """Write what the predecessor's `save` wrote: its arguments, and a pickled state dict."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**adapter.get_config_dict(), **config}))
    torch.save(adapter.state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "adapter",
    [
        LinearLayer(6, 6),
        LinearLayer(6, 6, bias=True),
        TwoLayerNN(6, 9, 6, add_residual=True),
        TwoLayerNN(6, 9, 6, activation_fn_str="tanh", bias=True),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
@pytest.mark.parametrize("named", [False, True])
def test_a_folder_of_the_predecessor_loads(adapter, named, tmp_path):
    write_legacy(tmp_path / "a", noisy(adapter))
    saved = load_adapter(tmp_path / "a", type(adapter) if named else None)
    assert type(saved.adapter) is type(adapter)
    assert same_output(adapter, saved.adapter)
    assert (saved.legacy, saved.sides, saved.base, saved.identity) == (True, "query", None, False)
    assert not saved.adapter.training


def test_a_custom_adapter_of_the_predecessor_loads_with_its_class(tmp_path):
    adapter = noisy(Scale(6))
    write_legacy(tmp_path / "a", adapter)
    with pytest.raises(ArtifactError, match="pass adapter_cls="):
        load_adapter(tmp_path / "a")
    assert same_output(adapter, load_adapter(tmp_path / "a", Scale).adapter)
    assert same_output(adapter, load_adapter(tmp_path / "a", adapter=Scale(6)).adapter)


def test_a_folder_of_the_predecessor_that_does_not_fit(tmp_path):
    write_legacy(tmp_path / "keys", LinearLayer(6, 6), dropout=0.1)
    with pytest.raises(ArtifactError, match=r"does not make a LinearLayer: .*dropout"):
        load_adapter(tmp_path / "keys")
    write_legacy(tmp_path / "shape", LinearLayer(6, 6), in_features=5)
    with pytest.raises(ArtifactError, match="size mismatch"):
        load_adapter(tmp_path / "shape")
    write_legacy(tmp_path / "class", LinearLayer(6, 6))
    with pytest.raises(ArtifactError, match="does not make a TwoLayerNN"):
        load_adapter(tmp_path / "class", TwoLayerNN)
    write_legacy(tmp_path / "nan", LinearLayer(6, 6))
    torch.save({"linear.weight": torch.full((6, 6), np.nan)}, tmp_path / "nan/pytorch_model.bin")
    with pytest.raises(ArtifactError, match="is not finite"):
        load_adapter(tmp_path / "nan")
    write_legacy(tmp_path / "json", LinearLayer(6, 6))
    (tmp_path / "json" / "config.json").write_text('{"in_features": 6,')
    with pytest.raises(ArtifactError, match=r"config.json: line 1.*truncated"):
        load_adapter(tmp_path / "json")
    (tmp_path / "json" / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match="no JSON object"):
        load_adapter(tmp_path / "json")


@pytest.mark.parametrize("found", [[torch.zeros(2)], {"linear.weight": 3}, {4: torch.zeros(2)}])
def test_a_legacy_file_with_something_else_than_weights_is_refused(found, tmp_path):
    write_legacy(tmp_path / "a", LinearLayer(6, 6))
    torch.save(found, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"pytorch_model.bin: refused: holds other things"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", b"garbage", "cut"])
def test_a_damaged_legacy_file_is_named(content, tmp_path):
    write_legacy(tmp_path / "a", LinearLayer(60, 60))
    path = tmp_path / "a" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:5000] if content == "cut" else content)
    with pytest.raises(ArtifactError, match=r"pytorch_model.bin: (refused|cannot be read)"):
        load_adapter(tmp_path / "a")


class Payload:
    """Unpickled without care, it runs a shell command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_a_command_is_refused_and_runs_nothing(zipped, tmp_path):
    trace = tmp_path / "trace"
    content = collections.OrderedDict(
        [("linear.weight", torch.eye(6)), ("extra", Payload(f"echo ran > {trace}"))]
    )
    write_legacy(tmp_path / "a", LinearLayer(6, 6))
    path = tmp_path / "a" / "pytorch_model.bin"
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    for adapter_cls in (None, LinearLayer):
        with pytest.raises(ArtifactError, match=r"pytorch_model.bin: refused, and nothing"):
            load_adapter(tmp_path / "a", adapter_cls)
    assert not trace.exists()
    # The payload is a real one: read without care, it does run.
    if zipped:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert trace.exists()


def test_pickles_beside_a_manifest_are_not_read(tmp_path):
    adapter = noisy(LinearLayer(6, 6))
    save_adapter(tmp_path / "a", adapter)
    write_legacy(tmp_path / "old", LinearLayer(6, 6))
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(tmp_path / "old" / name, tmp_path / "a" / name)
    saved = load_adapter(tmp_path / "a")
    assert same_output(adapter, saved.adapter)
    assert not saved.legacy


# The base model


def trained_for(tmp_path, vector, name="org/model"):
    model = Model(vector, name)
    base = base_of(model, model.get_query_embedding(PROBE_TEXT))
    save_adapter(tmp_path / "a", LinearLayer(len(vector), len(vector)), base=base)
    return load_adapter(tmp_path / "a")


def test_the_base_model_is_recognised_by_one_embedding(tmp_path):
    saved = trained_for(tmp_path, [0.6, 0.8, 0.0])
    model = Model(np.array([0.6, 0.8, 0.01], dtype=np.float16).tolist())
    check_base(saved, model)
    assert model._texts == [PROBE_TEXT]


def test_the_probe_of_the_folder_is_the_one_that_is_compared(tmp_path):
    base = Base("org/model", 2, [1.0, 0.0], probe_text="an older sentence")
    save_adapter(tmp_path / "a", LinearLayer(2, 2), base=base)
    model = Model([2.0, 0.0])
    check_base(load_adapter(tmp_path / "a"), model)
    assert model._texts == ["an older sentence"]


def test_the_same_vectors_under_another_name_are_a_note_in_the_log(tmp_path, caplog):
    saved = trained_for(tmp_path, [0.6, 0.8])
    with caplog.at_level(logging.INFO, logger="ft_adapter.saved"):
        check_base(saved, Model([0.6, 0.8], name="copy"))
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "'org/model'; 'copy' gives the same vectors" in record.getMessage()


@pytest.mark.parametrize(
    ("vector", "name", "error"),
    [
        ([0.6, 0.8, 0.0], "other", "dimension 2 by 'org/model', and 'other' gives 3"),
        ([0.8, 0.6], "other", r"'other' is another model \(cosine 0.960 .*pass 'org/model'"),
        ([0.8, 0.6], "org/model", r"behind the name 'org/model' has changed.*\(cosine 0.960"),
        ([-0.6, -0.8], "org/model", "cosine -1.000"),
        ([0.0, 0.0], "org/model", "cosine 0.000"),
    ],
)
def test_another_base_model_is_refused(vector, name, error, tmp_path):
    saved = trained_for(tmp_path, [0.6, 0.8])
    with pytest.raises(ArtifactError, match=error) as caught:
        check_base(saved, Model(vector, name))
    assert str(tmp_path / "a") in str(caught.value)


def test_a_model_that_knows_no_word_of_the_probe_is_still_itself(tmp_path):
    saved = trained_for(tmp_path, [0.0, 0.0])
    check_base(saved, Model([0.0, 0.0]))
    with pytest.raises(ArtifactError, match="has changed"):
        check_base(saved, Model([1.0, 0.0]))


def test_without_a_recorded_base_the_dimension_is_compared(tmp_path):
    write_legacy(tmp_path / "a", LinearLayer(2, 2))
    saved = load_adapter(tmp_path / "a")
    check_base(saved, Model([0.1, 0.2]))
    with pytest.raises(ArtifactError, match="for vectors of dimension 2, and 'org/model' gives 3"):
        check_base(saved, Model([0.1, 0.2, 0.3]))


def test_an_adapter_that_knows_no_dimension_costs_no_embedding(tmp_path):
    save_adapter(tmp_path / "a", Plain(6))
    model = Model([0.1])
    check_base(load_adapter(tmp_path / "a", adapter=Plain(6)), model)
    assert model._texts == []


@pytest.mark.parametrize("vector", [[], [np.nan, 1.0], [np.inf, 1.0], [[1.0, 2.0]], ["a"]])
def test_a_model_that_gives_no_vector_is_named(vector, tmp_path):
    saved = trained_for(tmp_path, [0.6, 0.8])
    with pytest.raises(ArgumentError, match="embed_model: 'org/model' gave no list of finite"):
        base_of(Model(vector), vector)
    # LlamaIndex's own events refuse some of them first.
    with pytest.raises(ArgumentError, match=r"embed_model: 'org/model' (gave|failed)"):
        check_base(saved, Model(vector))


def test_a_model_that_fails_is_named(tmp_path):
    saved = trained_for(tmp_path, [0.6, 0.8])
    with pytest.raises(ArgumentError, match=r"'org/model' failed .*: no credit left") as caught:
        check_base(saved, Model(RuntimeError("no credit left")))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_model_without_a_name_goes_by_its_class():
    assert name_of(Model([1.0])) == "org/model"
    assert name_of(Model([1.0], name="unknown")) == "Model"
    assert name_of(object()) == "object"
