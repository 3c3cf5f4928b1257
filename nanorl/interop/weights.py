"""The tensors of a pretrained model: their names in its files, and in a GPT. One table serves both directions."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from nanorl.errors import UserError
from nanorl.files import parse_object
from nanorl.gpt import GPT, GPTConfig
from nanorl.interop.safetensors import read_safetensors

# Our module: its name in safetensors, and in GGUF. Those of a block follow their block's prefix.
MODULES = {"embedding": ("model.embed_tokens", "token_embd"), "norm": ("model.norm", "output_norm"),
           "head": ("lm_head", "output")}
BLOCK = {"attention_norm": ("input_layernorm", "attn_norm"), "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
         "attention.q": ("self_attn.q_proj", "attn_q"), "attention.k": ("self_attn.k_proj", "attn_k"),
         "attention.v": ("self_attn.v_proj", "attn_v"), "attention.out": ("self_attn.o_proj", "attn_output"),
         "attention.q_norm": ("self_attn.q_norm", "attn_q_norm"), "attention.k_norm": ("self_attn.k_norm", "attn_k_norm"),
         "mlp.gate": ("mlp.gate_proj", "ffn_gate"), "mlp.up": ("mlp.up_proj", "ffn_up"),
         "mlp.down": ("mlp.down_proj", "ffn_down")}


def name_in_file(name: str, gguf: bool = False) -> str:
    """blocks.3.attention.q.weight  ->  model.layers.3.self_attn.q_proj.weight, or blk.3.attn_q.weight"""
    module, kind = name.rsplit(".", 1)
    _, layer, part = module.split(".", 2) if module.startswith("blocks.") else ("", "", "")
    if module not in MODULES and part not in BLOCK:
        raise UserError(f"{name}: no Llama or Qwen has such a parameter; a changed nanorl/gpt.py has no name in their files")
    return f"{('model.layers', 'blk')[gguf]}.{layer}.{BLOCK[part][gguf]}.{kind}" if part else f"{MODULES[module][gguf]}.{kind}"


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the files that model.safetensors.index.json names."""
    index, whole = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not index.is_file():
        if not whole.is_file():
            raise UserError(f"{directory}: neither model.safetensors nor its index is there; expected one (a pickle, such as "
                            "pytorch_model.bin, can run code and is not read)")
        return read_safetensors(whole)
    where = parse_object(index.read_bytes(), str(index), "an object with a weight_map").get("weight_map")
    files = where.values() if isinstance(where, dict) else [None]
    if not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise UserError(f"{index}: expected a weight_map from the name of each tensor to the name of a file in {directory}")
    tensors = {}
    for file in sorted(set(files)):
        for name, x in read_safetensors(directory / file).items():
            if where.get(name) != file:
                raise UserError(f"{directory / file}: {name!r:.80} is in it; by {index.name} it is in {where.get(name)}")
            tensors[name] = x
    if missing := where.keys() - tensors.keys():
        raise UserError(f"{index}: the files lack {_some(missing)}")
    return tensors


def weights_of(gpt: GPTConfig, tensors: dict[str, Tensor], where: str, gguf: bool = False) -> dict[str, Tensor]:
    """The state of a GPT, made of these tensors: exactly those that it has, of its shapes, all finite."""
    if gpt.layers > len(tensors):               # before a model of a billion layers is made
        raise UserError(f"{where}: {gpt.layers} layers, but {len(tensors)} tensors; expected several in each layer")
    try:
        with torch.device("meta"):              # shapes without memory
            shapes = {name: x.shape for name, x in GPT(gpt).state_dict().items()}
    except (RuntimeError, OverflowError) as e:
        raise UserError(f"{where}: no memory holds a model of these shapes ({str(e).splitlines()[0]})") from None
    names = {name: name_in_file(name, gguf) for name in shapes}
    if gpt.tie_embeddings:
        embedding, head = names["embedding.weight"], names["head.weight"]
        if head in tensors and embedding in tensors:        # some files have both, and alike
            tensors = dict(tensors)
            if (x := tensors.pop(head)).dtype != tensors[embedding].dtype or not torch.equal(x, tensors[embedding]):
                raise UserError(f"{where}: {head} is not {embedding}, though config.json ties them; expected one matrix")
        names["head.weight"] = embedding
    for what, odd in (("lack", set(names.values()) - tensors.keys()), ("also hold", tensors.keys() - set(names.values()))):
        if odd:
            raise UserError(f"{where}: the weights {what} {_some(odd)}; expected exactly the tensors of such a model")
    for ours, name in names.items():
        x = tensors[name]
        if x.shape != shapes[ours] or not x.is_floating_point():
            raise UserError(f"{where}: {name} is {x.dtype} of shape {tuple(x.shape)}; expected numbers of shape "
                            f"{tuple(shapes[ours])}")
        if not all(map(math.isfinite, torch.stack(x.aminmax()).tolist())):
            raise UserError(f"{where}: {name} holds nan or inf")
    return {ours: tensors[name] for ours, name in names.items()}


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first!r:.80}" + (f" and {len(others)} more" if others else "")
