"""Compute a cross-encoder in ONNX Runtime: PyTorch exports it, nothing else is needed."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ft_core.errors import ArgumentError, FTError, first_line
from ft_core.extras import import_extra
from ft_crossencoder.scoring import window

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

EXTRA = "ft-crossencoder[onnx]"
"""What pip installs for it."""

# Short and of two lengths: dimensions of the same size, or of size 1, the exporter takes for fixed.
_TRACED = [("one two", "three four five six"), ("seven", "eight nine")]
# What the export is compared on: a lone pair without padding, and long ones with it.
_COMPARED = [
    [("one", "two")],
    [("one two", "three four " * 120), ("five", "six"), ("seven", "eight " * 20)],
]
_TOLERANCE = 1e-3  # of a logit: far above rounding, far below what a wrong graph does


class OnnxEncoder(nn.Module):
    """What a `CrossEncoder` has inside in place of the PyTorch model; computes on the CPU.

    Args:
        config: the model's; sentence-transformers reads it.
        path: the graph, which gives `logits`; it is read once and may then go.
    """

    def __init__(self, config: Any, path: Path) -> None:
        super().__init__()
        self.config = config
        self.device = torch.device("cpu")
        runtime = import_extra("onnxruntime", EXTRA)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        providers = ["CPUExecutionProvider"]
        self._session = runtime.InferenceSession(path, options, providers=providers)
        self._inputs = [item.name for item in self._session.get_inputs()]

    def forward(self, **features: Any) -> dict[str, Tensor]:
        """Return the logits of a batch of token ids; what the model does not take is ignored."""
        feed = {name: features[name].numpy() for name in self._inputs}
        return {"logits": torch.from_numpy(self._session.run(["logits"], feed)[0])}

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxEncoder:
        return self  # never changes, and answers many threads

    def __getstate__(self) -> dict[str, Any]:
        raise FTError(
            'a model in ONNX Runtime cannot be pickled; make the reranker with backend="onnx" in '
            "the process that uses it"
        )


def in_onnx(model: CrossEncoder, *, quantize: bool = False) -> Any:
    """Return a copy of a cross-encoder that computes in ONNX Runtime, on the CPU.

    It is exported in 32 bits and then compared with the original: an exporter can fix a choice
    that the model makes by the size of its input.

    Args:
        model: left as it is; of the weights, the copy has none.
        quantize: 8-bit weights in the linear layers.

    Raises:
        ArgumentError: PyTorch cannot export the model, or what it exports scores differently.
        MissingExtraError: the extra `onnx` is not installed.
    """
    inner = model[0]
    if getattr(inner, "transformer_task", None) != "sequence-classification":
        raise _refused(model, "is no encoder with a classification head")
    # ONNX Runtime reads a file into its own memory, so that none is left on the disk.
    with TemporaryDirectory(prefix="ft-onnx-", ignore_cleanup_errors=True) as folder, _quiet():
        path = Path(folder) / "model.onnx"
        try:
            encoder = _on_cpu(inner.model)
            _export(encoder, _features(model, _TRACED), path)
            result = OnnxEncoder(encoder.config, path)
            same = all(_agree(encoder, result, _features(model, pairs)) for pairs in _COMPARED)
            if quantize:
                result = OnnxEncoder(encoder.config, _quantized(path))
        except Exception as error:  # the exporter, the converter and the runtime have one each
            raise _refused(model, f"cannot be exported to ONNX: {first_line(error)}") from error
    if not same:
        raise _refused(model, "gives other scores in ONNX Runtime than in PyTorch")
    return copy.deepcopy(model, {id(inner.model): result})


def _on_cpu(encoder: Any) -> Any:
    """Return the model to export: this one, or a copy where it is elsewhere or shorter."""
    if (encoder.device.type, encoder.dtype) != ("cpu", torch.float32):
        encoder = copy.deepcopy(encoder).to("cpu", torch.float32)
    return encoder.eval()


def _features(model: CrossEncoder, pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Return the tensors that the model is given for pairs."""
    cut = {"text": {"max_length": window(model, None), "truncation": True}}
    features = model.preprocess(pairs, processing_kwargs=cut)
    taken = model[0].model_forward_params  # None is all
    return {
        name: value
        for name, value in features.items()
        if isinstance(value, Tensor) and (taken is None or name in taken)
    }


def _agree(encoder: Any, exported: OnnxEncoder, features: dict[str, Tensor]) -> bool:
    with torch.inference_mode():
        wanted = encoder(**features).logits.numpy()
        got = exported(**features)["logits"].numpy()
    # A score that is not finite is for the scorer to report, which names the pair.
    return wanted.shape == got.shape and np.allclose(
        got, wanted, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True
    )


def _refused(model: CrossEncoder, reason: str) -> ArgumentError:
    name = type(model.model).__name__
    return ArgumentError("backend", f'{name} {reason}; use backend="torch"')


def _export(encoder: Any, example: dict[str, Tensor], path: Path) -> None:
    either = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}  # the batch, the tokens
    with torch.no_grad():
        program = torch.onnx.export(
            encoder,
            kwargs=example,
            dynamo=True,
            dynamic_shapes=dict.fromkeys(example, either),
            input_names=list(example),
            output_names=["logits"],
            verbose=False,
        )
    program.save(path)  # beyond protobuf's 2 GB, the weights go to a second file beside it


def _quantized(path: Path) -> Path:
    """Write the graph with 8-bit weights beside it, and return the new path."""
    onnx = import_extra("onnx", EXTRA)
    tools = import_extra("onnxruntime.quantization", EXTRA)
    graph = onnx.load(path, load_external_data=False)
    # The exporter turns weights round and leaves their old shapes noted, which fail a check.
    del graph.graph.value_info[:]
    # Else it asks for a preparation that this graph has had, through the app's own root logger.
    graph.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    onnx.save(graph, path)
    target = path.with_name("quantized.onnx")
    tools.quantize_dynamic(
        path,
        target,
        op_types_to_quantize=["MatMul"],  # with constant weights; the embeddings stay exact
        weight_type=tools.QuantType.QInt8,
        per_channel=True,
        reduce_range=True,  # 7 bits: the sums of 8 overflow on a CPU without VNNI
    )
    return target


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on packages and graphs to itself; errors are raised anyway."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
