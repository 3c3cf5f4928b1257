"""Pretrained models as checkpoints of nanorl, and models of nanorl as directories that others load."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from nanorl.errors import UserError
from nanorl.files import parse_object
from nanorl.gpt import GPT
from nanorl.interop.config import read_config, write_config
from nanorl.interop.safetensors import write_safetensors
from nanorl.interop.smollm2 import open_gguf, read_gguf
from nanorl.interop.tokenizers import read_gguf_tokenizer, read_tokenizer, write_tokenizer
from nanorl.interop.weights import name_in_file, read_tensors, weights_of
from nanorl.tokenizer import Tokenizer


def is_pretrained(path: Path) -> bool:
    """Whether this is the directory of a pretrained model, or the name smollm2."""
    config = path / "config.json"
    named = str(path) == "smollm2" and not path.exists()
    return named or (config.is_file() and b'"model_type"' in config.read_bytes())


def read_pretrained(path: Path) -> dict[str, Any]:
    """A pretrained model as the checkpoint of a run before its first step. Its tensors are views of the files where possible.

    The embedding and the head lose the rows after the last token, which only fill up a matrix: an id without a token must have
    no probability, when answers are sampled as when they are scored.
    """
    where = f"{path / 'config.json'}"
    if gguf := str(path) == "smollm2":
        print("smollm2: SmolLM2-135M-Instruct, its weights dequantised from 4 bits.", file=sys.stderr)
        reader = open_gguf()
        (config, tensors), tokenizer = read_gguf(reader), read_gguf_tokenizer(reader, "smollm2")
        gpt = read_config(config, where)
    else:
        gpt = read_config(parse_object((path / "config.json").read_bytes(), where, "an object with a model_type"), where)
        tensors, tokenizer = read_tensors(path), read_tokenizer(path)
    weights = weights_of(gpt, tensors, str(path), gguf)
    tokens, size = len(tokenizer.ranks) + len(tokenizer.special), tokenizer.vocab_size
    if not tokens == size <= gpt.vocab_size:
        raise UserError(f"{path}: {tokens} tokens with ids below {size}, and a model of {gpt.vocab_size}; expected a token for "
                        "every id up to the last, and a row of the model for every token")
    for name in ("embedding.weight", "head.weight"):
        weights[name] = weights[name][:size]
    return {"step": 0, "config": {}, "gpt": asdict(replace(gpt, vocab_size=size)), "tokenizer": tokenizer.state_dict(),
            "model": weights, "optimizer": [], "state": {}}


def load_pretrained(path_or_name: str | Path, device: torch.device | str = "cpu",
                    dtype: torch.dtype | None = None) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a directory with config.json, safetensors and tokenizer.json, or of the name smollm2."""
    from nanorl.run.checkpoint import load_checkpoint, model_from, tokenizer_from  # which itself needs this module
    checkpoint = load_checkpoint(path_or_name, "policy")
    return model_from(checkpoint, torch.device(device), dtype), tokenizer_from(checkpoint)


def write_pretrained(model: GPT, tokenizer: Tokenizer, directory: Path, dtype: torch.dtype) -> None:
    """Write a directory that transformers loads, its weights in this dtype. config.json, which makes it one, comes last."""
    config = write_config(model.config, str(dtype).removeprefix("torch."))
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory}: is there already, and is not an empty directory; expected a new one")
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(tokenizer, directory)
    weights = {name_in_file(name): x for name, x in model.state_dict().items()
               if not (model.config.tie_embeddings and name == "head.weight")}
    write_safetensors(directory / "model.safetensors", weights, dtype)
    for name, content in (("generation_config.json", ids), ("config.json", config | ids)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
