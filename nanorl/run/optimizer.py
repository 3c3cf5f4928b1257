"""The optimizers of a run, stepped as one, and its learning-rate schedule."""

import torch
from torch import nn

from nanorl.run import ranks
from nanorl.run.checkpoint import check_finite


def _sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Over all processes, one tensor at a time: of all together, a copy would be as large as the model. A process that had no
    rows adds zeros."""
    if ranks.count() > 1:
        for p in parameters:
            p.grad = ranks.summed(torch.zeros_like(p) if p.grad is None else p.grad)


class Optimizers:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest, stepped as one.

    Weight decay is decoupled and not applied to the gains of RMSNorm. Muon's orthogonal update is scaled to the size that
    AdamW's has in a long run, 0.2 lr, so one learning rate serves both there. AdamW's first updates are of size lr, so in a
    short run Muon wants several times the rate.
    """

    def __init__(self, model: nn.Module, kind: str, lr: float, weight_decay: float = 0.0):
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gains = [p for _, p in self.named if p.ndim < 2]
        matrices = [p for name, p in self.named if p.ndim == 2 and kind == "muon" and "blocks" in name]
        taken = {id(p) for p in gains + matrices}
        rest = [p for _, p in self.named if id(p) not in taken]
        fused = rest[0].device.type in ("cpu", "cuda")
        groups = [{"params": rest, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
        self.optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)]
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay,
                                                    adjust_lr_fn="match_rms_adamw"))

    def step(self, lr: float, grad_clip: float) -> torch.Tensor:
        """Clip the gradients' total norm, take one step, clear them. Returns the norm before clipping.

        A gradient of exactly zero takes no step: there is nothing to learn, but momentum would still move the weights.
        FloatingPointError when the gradient is not finite; no weight has changed then.
        """
        parameters = [p for _, p in self.named]
        _sum_gradients(parameters)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not norm.isfinite():
            check_finite({f"the gradient of {name}": p.grad for name, p in self.named})
            raise FloatingPointError("the norm of the gradient is too large for float32")
        if norm == 0:
            return norm
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> list:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def schedule(step: int, steps: int, warmup: float = 0.0, decay: float = 0.0) -> float:
    """A trapezoid: the learning rate rises over the first share `warmup` of the steps and falls to 0 over the last
    share `decay`. Returns the factor, in (0, 1]."""
    rise = (step + 1) / (warmup * steps) if warmup * steps >= 1 else 1.0
    fall = (steps - step) / (decay * steps) if decay * steps >= 1 else 1.0
    return min(1.0, rise, fall)
