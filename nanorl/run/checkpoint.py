"""Checkpoints: one file with the model, optimizer and state of a run, as tensors and builtins, and the models read from it.

What a resumed run reads, and what it cuts off, is in directory.py.
"""

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nanorl.errors import UserError
from nanorl.gpt import GPT, GPTConfig, ScalarGPT
from nanorl.interop.pretrained import is_pretrained, read_pretrained
from nanorl.lora import adapt, merged
from nanorl.tokenizer import Tokenizer

Kind = Literal["policy", "reward model"]       # of model that a checkpoint holds
FORMAT = 1      # raised when a checkpoint's meaning changes
CHECKPOINT_FIELDS = {"step": int, "config": dict, "gpt": dict, "tokenizer": dict, "model": dict, "optimizer": list,
                     "state": dict}
ADAPTER_FIELDS = {"rank": int, "alpha": float, "base": str, "sha256": str}      # "lora", of a policy that has adapters


def check_finite(x: Any, name: str = "") -> None:
    """FloatingPointError names the first tensor or number, in nested dicts and lists, that holds nan or inf."""
    if isinstance(x, dict | list | tuple):
        for key, part in x.items() if isinstance(x, dict) else enumerate(x):
            check_finite(part, f"{name}.{key}".lstrip("."))
    elif isinstance(x, torch.Tensor) and x.is_floating_point() and not x.isfinite().all():
        raise FloatingPointError(f"{name} holds {'nan' if x.isnan().any() else 'inf'}")
    elif isinstance(x, float) and not math.isfinite(x):
        raise FloatingPointError(f"{name} is {x}")


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """A kill at any moment leaves the old file or the new one, never a part: temporary file, sync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:               # a full disk: do not fill it with half a file
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":              # elsewhere a directory cannot be synced
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a dict of CHECKPOINT_FIELDS; FloatingPointError, before any file is touched, where it holds nan or inf."""
    check_finite({name: checkpoint[name] for name in ("model", "optimizer", "state")})

    def write(f: Any) -> None:
        try:
            torch.save(checkpoint | {"format": FORMAT}, f)
        except RuntimeError as e:       # torch hides what the disk said in an error of its own
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None

    write_atomically(path, write)


def load_checkpoint(path: str | Path, what: Kind | None = None, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The checkpoint of a run's directory, a checkpoint file, or what a pretrained model (nanorl/interop) is as a checkpoint.
    Tensors and builtins only: no code is ever run.

    UserError when there is none, when it is damaged, or when `what` is given and it holds something else. `above`: checkpoints
    whose adapters this one is the base of, which it cannot be itself.
    """
    path = Path(path)
    if str(path.resolve()) in above:
        raise UserError(f"{path}: its adapters are, in the end, their own base; expected one that was there before them")
    try:
        file = path / "ckpt.pt" if path.is_dir() else path
        there, pretrained = file.exists(), is_pretrained(path)
        if there == pretrained:
            found = "both a run (ckpt.pt) and" if there else "neither a run (ckpt.pt) nor"
            raise UserError(f"{path}: {found} a pretrained model (config.json with a model_type); expected one of them, or the "
                            "name smollm2")
        checkpoint, holds = (read_pretrained(path), "policy") if pretrained else _load_sound(file)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if what not in (None, holds):
        script = {"policy": "train_sft.py", "reward model": "train_reward.py"}[what]
        raise UserError(f"{path}: holds a {holds}; expected a {what}, as {script} makes it")
    return checkpoint | {"path": str(path), "above": (*above, str(path.resolve()))}


def _load_sound(path: Path) -> tuple[dict[str, Any], Kind]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint, _check_sound(checkpoint)
    except Exception as e:              # whatever torch.load raises on a damaged or foreign file
        why = (str(e) or "empty file").splitlines()[0][:200]
        raise UserError(f"{path}: not a sound checkpoint ({why})") from None


def _check_sound(checkpoint: Any) -> Kind:
    """What a checkpoint holds. An exception says what does not fit: another format, a field that is missing, weights that are
    not finite or not of the shapes that the configuration asks for, or a tokenizer of another size."""
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if found != FORMAT:
        raise UserError(f"expected nanorl's format {FORMAT}, found {found!s:.40}")
    adapters = checkpoint.get("lora", {})
    for part, fields in ((checkpoint, CHECKPOINT_FIELDS), (adapters, ADAPTER_FIELDS if adapters else {})):
        for name, kind in fields.items():
            if not isinstance(part.get(name), kind):
                raise UserError(f"its {name!r} is {part.get(name)!r:.40}, expected a {kind.__name__}")
    for flag in ("task", "data", "verifier"):       # what other commands read of its flags
        if not isinstance(checkpoint["config"].get(flag), str | None):
            raise UserError(f"its --{flag} is {checkpoint['config'][flag]!r:.40}, expected a text")
    check_finite(checkpoint["model"] | adapters)
    shape = checkpoint["gpt"]           # what weights do not bound: a model of a billion layers, a table of angles
    if not (shape.get("layers", 1) <= len(checkpoint["model"]) and 1 <= shape.get("context", 1) <= 2**20):
        raise UserError(f"its {len(checkpoint['model'])} weights are of {shape.get('layers')} layers, its context is "
                        f"{shape.get('context')}; expected several weights a layer, and a context of at most {2**20}")
    model = _shapes(checkpoint)
    wanted, found = ({name: tuple(x.shape) for name, x in weights.items()}
                     for weights in (trained_state(model), checkpoint["model"]))
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            raise UserError(f"its {name} has the shape {found.get(name)}, its configuration wants {wanted.get(name)}")
    tokenizer = Tokenizer.from_state(checkpoint["tokenizer"])
    tokenizer.render("")                # its template may need special tokens that it lacks
    if (size := tokenizer.vocab_size) != model.config.vocab_size:
        raise UserError(f"a tokenizer of {size} tokens beside a model of {model.config.vocab_size}")
    return "reward model" if isinstance(model, ScalarGPT) else "policy"


def _shapes(checkpoint: dict[str, Any]) -> GPT | ScalarGPT:
    """A model like that of a checkpoint on the meta device: its shapes, without memory."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**checkpoint["gpt"]))
        if "lora" in checkpoint:
            model = adapt(model, checkpoint["lora"]["rank"], checkpoint["lora"]["alpha"])
        return ScalarGPT(model) if "scalar.weight" in checkpoint["model"] else model


def model_from(checkpoint: dict[str, Any], device: torch.device, dtype: torch.dtype | None = None) -> GPT | ScalarGPT:
    """The policy or the reward model of a checkpoint, with a copy of its weights in this dtype (None: PyTorch's default).

    Adapters are merged into what they adapt.
    """
    if "lora" in checkpoint:
        return merged(adapted_from(checkpoint, device)[0]).requires_grad_().to(dtype=dtype)
    model = _shapes(checkpoint).to(dtype=dtype).to_empty(device=device)
    (model.trunk if isinstance(model, ScalarGPT) else model).complete()
    model.load_state_dict(checkpoint["model"])
    return model.to(device)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Of a model's state, what is trained: everything, or its adapters."""
    return {name: x.detach() for name, x in model.state_dict(keep_vars=True).items() if x.requires_grad}


def digest(model: nn.Module) -> str:
    """The sha256 of a model's weights and their names."""
    found = hashlib.sha256()
    for name, x in model.state_dict().items():
        found.update(name.encode())
        found.update(x.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def adapted_from(checkpoint: dict[str, Any], device: torch.device) -> tuple[GPT, GPT]:
    """The policy of a checkpoint that holds adapters, and what they adapt: UserError where that is not what it was."""
    lora = checkpoint["lora"]
    base = model_from(load_checkpoint(lora["base"], "policy", checkpoint["above"]), device)
    if base.config != GPTConfig(**checkpoint["gpt"]) or digest(base) != lora["sha256"]:
        raise UserError(f"{checkpoint['path']}: its adapters belong to other weights than those of {lora['base']}; expected "
                        "the ones that they were trained beside")
    policy = adapt(base, lora["rank"], lora["alpha"])
    policy.load_state_dict(checkpoint["model"], strict=False)
    policy.lora = lora
    return policy, base


def tokenizer_from(checkpoint: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_state(checkpoint["tokenizer"])


def load_frozen(path: str, what: Kind, tokenizer: Tokenizer, device: torch.device) -> GPT | ScalarGPT:
    """The model of another run, whose weights are constants here. It must read the same token ids as the policy."""
    checkpoint = load_checkpoint(path, what)
    if checkpoint["tokenizer"] != tokenizer.state_dict():
        raise UserError(f"{path}: made with another tokenizer than the policy's; expected a run from the same pretraining")
    return model_from(checkpoint, device).requires_grad_(False)
