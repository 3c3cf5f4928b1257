"""What breaks in TRL's losses of GRPO, by TRL alone: python experiments/trl_grpo_alone.py"""
from collections import defaultdict
from types import SimpleNamespace as NS
import torch
from trl import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

ARGS = NS(**{name: x.default for name, x in GRPOConfig.__dataclass_fields__.items()} | {"steps_per_generation": 1})

def gradient(loss_type, ratios, lengths, parts=1, coef=0.0):
    """dL/dlogp and dL/dentropy of answers with A = 1, split into equal micro-batches, as TRL accumulates them."""
    logp, h = (torch.zeros(len(lengths), max(lengths), requires_grad=True) for _ in "ab")
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    old, ARGS.steps_per_generation = -torch.tensor(ratios).log()[:, None].expand_as(logp), parts
    for r in torch.arange(len(lengths)).chunk(parts):
        t = NS(args=ARGS, loss_type=loss_type, importance_sampling_level="token", beta=0.0, epsilon_low=0.2, epsilon_high=0.2,
               entropy_coef=coef, _entropy_bonus_enabled=coef > 0, use_adaptive_entropy=False, max_completion_length=4,
               current_gradient_accumulation_steps=parts, aux_loss_enabled=False, top_entropy_quantile=1.0, use_vllm=False,
               off_policy_mask_threshold=None, model=NS(training=True), _metrics=defaultdict(lambda: defaultdict(list)),
               _get_per_token_logps_and_entropies=lambda *a, r=r, **o: (logp[r], h[r], None),
               accelerator=NS(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x, sync_gradients=True))
        inputs = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), mask[r])
        inputs |= dict(advantages=torch.ones(len(r)), old_per_token_logps=old[r], num_items_in_batch=mask.sum())
        GRPOTrainer._compute_loss(t, None, inputs).backward()
    return logp.grad[:, 0].tolist(), [] if h.grad is None else h.grad[:, 0].tolist()

print("cispo, default epsilon_high, ratios .5, 1, 2:", gradient("cispo", [0.5, 1, 2], [1, 1, 1])[0], "unlike -1/6, -1/3, -2/3")
for n in (1, 2):
    print(f"answers of 1 and 3 tokens as {n} micro-batches: bnpo", gradient("bnpo", [1.0, 1.0], [1, 3], n)[0],
          "entropy", gradient("dapo", [1.0, 1.0], [1, 3], n, 0.1)[1])
