"""What breaks in TRL's losses of DPO, by TRL alone: python experiments/trl_dpo_alone.py"""
from collections import defaultdict
from types import SimpleNamespace as NS
import torch
from trl import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

ARGS = NS(**{name: x.default for name, x in DPOConfig.__dataclass_fields__.items()})
ALONE = NS(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
def gradient(loss_type, chosen, rejected, parts=1, lengths=None):
    """dL/dlogp of the first tokens; the reference has log-prob 0 (the chosen one of an earlier pair 40 less each)."""
    first = torch.tensor([chosen, rejected], requires_grad=True)       # [2, N]
    lengths = torch.tensor([lengths or [1] * len(chosen), [1] * len(chosen)])
    for r in torch.arange(len(chosen)).chunk(parts):        # as micro-batches
        mask = (torch.arange(5) <= lengths[:, r].flatten()[:, None]).long() * (torch.arange(5) > 0)
        logp, zeros = torch.nn.functional.pad(first[:, r].flatten()[:, None], (0, 3)), torch.zeros(mask[:, 1:].shape)
        t = NS(args=ARGS, loss_types=[loss_type], loss_weights=[1.0], beta=0.1, label_smoothing=0.0, ld_alpha=None, _tp_size=1,
               f_divergence_type="reverse_kl", use_weighting=False, precompute_ref_logps=True, aux_loss_enabled=False,
               model=NS(training=True), accelerator=ALONE, _metrics={"train": defaultdict(list)}, _total_train_tokens=0)
        outputs = NS(log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        inputs = dict(input_ids=mask, attention_mask=mask, completion_mask=mask,
                      ref_chosen_logps=40.0 * (r - len(chosen) + 1), ref_rejected_logps=torch.zeros(len(r)))
        (DPOTrainer._compute_loss(t, lambda outputs=outputs, **o: outputs, inputs, False) / parts).backward()
    return first.grad.tolist()

for loss, margin in (("discopop", ([0.0], [0.0])), ("apo_down", ([-50.0], [20.0]))):
    print(f"{loss}, log-ratios {margin}:", gradient(loss, *margin))
for n in (1, 2):
    print(f"as {n} micro-batches:", *((loss, gradient(loss, [20.0, -20.0], [10.0, 30.0], n, [1, 3])[0])
                                      for loss in ("aot", "aot_unpaired", "sft")))
