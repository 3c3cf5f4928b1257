"""Randomness, device, precision, compiling."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import nn

from nanorl.errors import UserError
from nanorl.gpt import GPT
from nanorl.run import ranks
from nanorl.run.flags import DeviceConfig, RunConfig


def derive(seed: int, *purpose: str | int) -> int:
    """A seed of its own for every purpose: the first 63 bits of sha256(seed/purpose)."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, *purpose))


def find_device(name: str) -> torch.device:
    """The device of this name, or the best there is for "auto"; UserError where there is none.

    On CUDA this also lets float32 products be TF32, and turns cuDNN's attention off: PyTorch would choose it first on an H100
    or later, and it makes a new plan for every shape of eager decoding.
    """
    available = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    if name == "auto":
        name = available[0]
    if name not in available:
        raise UserError(f"--device {name}: PyTorch finds no such device here; expected one of {', '.join(available)}")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def pick_device(cfg: RunConfig) -> torch.device:
    """The device to train on, deterministic if the flags ask for it; under torchrun, this process's own."""
    device = find_device(cfg.device)
    ranks.join(device)
    if device.type == "cuda":
        if cfg.deterministic:       # without it, products of matrices are not
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(cfg.deterministic)
        if cfg.resume and not cfg.deterministic:
            print("Resuming on CUDA without --deterministic: the run goes on, but not bit for bit.")
    return device


def uses_bfloat16(device: torch.device, dtype: str) -> bool:
    """By default on GPUs that compute in it, and do not only emulate it."""
    return dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda"
                                   and torch.cuda.is_bf16_supported(including_emulation=False))


def autocast(device: torch.device, dtype: str):
    """Matrix products in `dtype`, weights in float32: updates of 1e-6 of a weight would vanish in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(device, dtype))


def round_frozen(model: nn.Module, dtype: str) -> None:
    """Where matrix products are in bfloat16, hold the matrices that are constants in it, too: the same products in half the
    memory. Embeddings enter no product; they are held so only where that loses nothing, as in a model published in bfloat16."""
    for module in model.modules():
        if isinstance(module, GPT) and uses_bfloat16(module.embedding.weight.device, dtype):
            tied = module.embedding.weight
            for part in module.modules():
                if isinstance(part, nn.Linear | nn.Embedding) and not part.weight.requires_grad:
                    rounded = nn.Parameter(part.weight.bfloat16(), requires_grad=False)
                    if (part.weight is not tied and isinstance(part, nn.Linear)) or torch.equal(rounded.float(), part.weight):
                        torch.utils.swap_tensors(part.weight, rounded)      # in all models that share it


@contextlib.contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Inside, matrix products are float32's: neither autocast to bfloat16 nor, on CUDA, rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def wants_compile(cfg: DeviceConfig, device: torch.device) -> bool:
    """By default on CUDA, where there is Triton: the compiler writes its kernels in it."""
    return device.type == "cuda" and find_spec("triton") is not None if cfg.compile is None else cfg.compile


def compile_models(cfg: RunConfig, device: torch.device, *models: GPT | None) -> bool:
    """Compile these models for training, and have their activations recomputed, where `cfg` asks for it. Skips None.

    Returns whether it asks for compiling: sampling compiles steps of its own.
    """
    compiled = wants_compile(cfg, device)
    for model in filter(None, models):
        model.recompute = cfg.recompute
        if compiled:
            compile_for_training(model)
    return compiled


def compile_for_training(model: GPT) -> None:
    """Compile the transformer block, once for all layers and for all shapes, and the log-probs of its tokens."""
    model.compiled = True
    for block in model.blocks:
        block.compile(dynamic=True)


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}    # dense bfloat16


def peak_flops(device: torch.device) -> float | None:
    """The floating-point ceiling of a GPU that we know, for model FLOPs utilisation (MFU)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)
