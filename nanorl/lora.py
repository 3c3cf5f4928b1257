"""LoRA: leave every matrix of the blocks as it is, and train a small one beside it.            (Hu et al. 2021, eq. 3)

    y = W x + (alpha / R) B A x             W [out, in] is a constant; A [R, in] and B [out, R] are trained

Gradients and the optimizer's moments exist of A and B only: R (in + out) numbers where full training has in * out. A starts at
random and B at 0, so that nothing has changed yet. Embeddings, norms and the output head stay as they are.

W is not copied. `adapt` makes a second model on the tensors of the first, which remains what it was: the policy with its
adapters switched off, and so the reference of a KL term, at no cost. `merged` is a model with W + (alpha / R) B A in place of
W, for sampling and for export: as fast as if there were no adapters.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanorl.gpt import GPT


class LoRALinear(nn.Linear):
    """A linear layer, its weights frozen, and the adapters A and B beside it."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None):
        out_features, in_features = linear.weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        a = torch.randn(rank, in_features, generator=generator, dtype=linear.weight.dtype) / in_features**0.5
        self.a = nn.Parameter(a.to(linear.weight.device))
        self.b = nn.Parameter(linear.weight.new_zeros(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(self.scale * F.linear(x, self.a), self.b)


def _share(model: GPT, inside: Callable[[GPT], nn.Module], change: Callable[[nn.Linear], nn.Linear]) -> GPT:
    """A second model on the same tensors, but for the linear layers inside this part of it, which `change` makes anew."""
    second = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    for parent in list(inside(second).modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, change(layer))
    return second


def adapt(base: GPT, rank: int, alpha: float, generator: torch.Generator | None = None) -> GPT:
    """`base` with adapters of this rank, which are all that it trains. It shares the weights of `base`, now constants."""
    base.requires_grad_(False)
    model = _share(base, lambda model: model.blocks, lambda layer: LoRALinear(layer, rank, alpha, generator))
    # As if embeddings were trained: else the first block, whose input has no gradient, would be compiled apart from the others.
    model.embedding.register_forward_hook(lambda _, tokens, x: x.requires_grad_(torch.is_grad_enabled()))
    return model


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def has_adapters(model: nn.Module) -> bool:
    return any(isinstance(layer, LoRALinear) for layer in linear_layers(model))


@torch.no_grad()
def merged_weight(layer: nn.Linear) -> Tensor:
    """W + (alpha / R) B A; of a layer without adapters, W itself."""
    if not isinstance(layer, LoRALinear):
        return layer.weight
    with torch.autocast(layer.weight.device.type, enabled=False):       # it would round B A to bfloat16
        return torch.addmm(layer.weight.to(layer.a.dtype), layer.b, layer.a, alpha=layer.scale)


def is_merged(model: GPT, dtype: torch.dtype | None = None) -> bool:
    """Whether `merged` would change nothing."""
    return not has_adapters(model) and dtype in (None, model.head.weight.dtype)


def merged(model: GPT, dtype: torch.dtype | None = None) -> GPT:
    """The model with its adapters merged and, given a dtype, all matrices but the embeddings in it. The rest is shared."""
    if is_merged(model, dtype):
        return model

    def merge(layer: nn.Linear) -> nn.Linear:
        weight = merged_weight(layer).to(dtype=dtype)
        if weight is layer.weight:
            return layer
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        return plain

    return _share(model, lambda model: model, merge)
