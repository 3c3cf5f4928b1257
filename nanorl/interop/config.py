"""config.json of the families llama, qwen2 and qwen3, to a GPTConfig and back. What is not understood is refused."""

from typing import Any

from nanorl.errors import UserError
from nanorl.gpt import GPTConfig

FAMILIES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}       # what a model_type says of the block

# Our field: its name in config.json, its type, and what it is where config.json has none (... is refused, None is derived).
FIELDS = {"vocab_size": ("vocab_size", int, ...), "context": ("max_position_embeddings", int, ...),
          "layers": ("num_hidden_layers", int, ...), "width": ("hidden_size", int, ...),
          "heads": ("num_attention_heads", int, ...), "kv_heads": ("num_key_value_heads", int, None),
          "head_dim": ("head_dim", int, None), "mlp_width": ("intermediate_size", int, ...),
          "norm_eps": ("rms_norm_eps", float, ...), "tie_embeddings": ("tie_word_embeddings", bool, False)}
LLAMA3 = {"factor": float, "low_freq_factor": float, "high_freq_factor": float, "original_max_position_embeddings": int}

# What these may say, if anything: all else would change what the model computes.
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
        "quantization_config": None, "rope_interleaved": False, "partial_rotary_factor": 1.0}
MOST = {"max_position_embeddings": 2**20}       # positions have a table; anything else is checked with the weights' shapes


def read_config(config: dict[str, Any], where: str) -> GPTConfig:
    """The GPTConfig of a config.json, both spellings; `where` it is, for errors."""
    family = config.get("model_type")
    if family not in [*FAMILIES]:
        raise UserError(f"{where}: model_type is {family!r:.60}; expected one of {', '.join(FAMILIES)}")
    # transformers 5 writes rope_parameters; earlier ones rope_theta, and rope_scaling where there is any
    rope = {"rope_theta": config.get("rope_theta")}
    for spelling in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(spelling) or {}, dict):
            raise UserError(f"{where}: {spelling} is {config[spelling]!r:.60}; expected an object")
        rope |= config.get(spelling) or {}
    for key, value in ONLY.items():
        for said in (config.get(key), rope.get(key)):
            if said is not None and said != value:
                raise UserError(f"{where}: {key} is {said!r:.60}; expected {value!r}: nothing else is understood")
    layers = config.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise UserError(f"{where}: layer_types is {layers!r:.60}; expected full_attention: nothing else is understood")
    fields = {ours: _value(config, *theirs, where) for ours, theirs in FIELDS.items()}
    if fields["head_dim"] is None and family == "qwen3":
        fields["head_dim"] = 128
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "llama3":
        fields["rope_scaling"] = tuple(_value(rope, name, kind, ..., where) for name, kind in LLAMA3.items())
        if not fields["rope_scaling"][1] < fields["rope_scaling"][2]:
            raise UserError(f"{where}: low_freq_factor is {fields['rope_scaling'][1]}; expected less than high_freq_factor")
    elif kind != "default":
        raise UserError(f"{where}: rope_type is {kind!r:.60}; expected default or llama3: nothing else is understood")
    try:
        return GPTConfig(**fields, rope_base=_value(rope, "rope_theta", float, 10_000.0, where), **FAMILIES[family])
    except ValueError as e:
        raise UserError(f"{where}: {e}") from None


def _value(config: dict[str, Any], name: str, kind: type, default: Any, where: str) -> Any:
    """What config.json says under this name: a bool, or a positive number; else the default."""
    value = default if config.get(name) is None else config[name]
    if value is ...:
        raise UserError(f"{where}: no {name}; expected a number")
    if value is None or (kind is bool and type(value) is bool):
        return value
    most = MOST.get(name, 2**31)
    if kind is bool or type(value) not in (int, kind) or not 0 < value <= most:
        expected = "true or false" if kind is bool else f"a number above 0, of at most {most}"
        raise UserError(f"{where}: {name} is {value!r:.60}; expected {expected}")
    return kind(value)


def write_config(gpt: GPTConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model, in the spelling that every reader knows. Exact: `read_config` gives `gpt` back."""
    says = {flag: True for flag in ("qkv_bias", "qk_norm") if getattr(gpt, flag)}
    family = next((name for name, block in FAMILIES.items() if block == says), None)
    if gpt.positions != "rope" or family is None:
        raise UserError(f"a model with positions={gpt.positions}, qk_norm={gpt.qk_norm} and qkv_bias={gpt.qkv_bias} is of none "
                        f"of the families {', '.join(FAMILIES)}; expected rotary positions, and at most one of the two")
    scaling = gpt.rope_scaling and {"rope_type": "llama3"} | dict(zip(LLAMA3, gpt.rope_scaling, strict=True))
    return {"architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family, "hidden_act": "silu",
            **{theirs: getattr(gpt, ours) for ours, (theirs, _, _) in FIELDS.items()},
            "rope_theta": gpt.rope_base, "rope_scaling": scaling, "attention_bias": False, "torch_dtype": dtype}
