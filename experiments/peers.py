"""What nanorl's checks say of TRL's losses of GRPO and DPO.

    python -m experiments.peers             checks them all, and writes docs/peers.md; needs pip install -e ".[peers]"

The losses are TRL's own `_compute_loss`, called on random log-probs instead of a model's. What breaks is derived again
without nanorl, by trl_grpo_alone.py and trl_dpo_alone.py.
"""

from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace as Namespace

import torch
from torch import Tensor

from experiments.runs import ROOT
from nanorl.checks import BrokenObjective, Report, check_objective, check_preference_objective
from nanorl.checks.cases import numbers
from nanorl.run import write_atomically

ACCELERATOR = Namespace(num_processes=1, device="cpu", sync_gradients=True, reduce=lambda x, reduction: x, gather=lambda x: x,
                        gather_for_metrics=lambda x: x)
TOKENS = 64                 # in a step of GRPO, of which a micro-batch is a part


def defaults(config: type) -> dict:
    """The default of every option of a trainer."""
    return {name: option.default for name, option in config.__dataclass_fields__.items()}


def grpo_loss(loss_type: str, level: str = "token", beta: float = 0.0, epsilon_high: float = 0.2, entropy_coef: float = 0.0,
              parts: int = 1) -> Callable:
    """TRL's loss of a micro-batch of GRPO, of which a step has so many; all other numbers are its defaults."""
    from trl import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    args = Namespace(**defaults(GRPOConfig) | {"steps_per_generation": parts})

    def loss(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, *, ref_logp: Tensor, entropy: Tensor) -> Tensor:
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        trainer = Namespace(
            args=args, loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_low=args.epsilon,
            epsilon_high=epsilon_high, entropy_coef=entropy_coef, _entropy_bonus_enabled=entropy_coef != 0,
            use_adaptive_entropy=False, max_completion_length=16, current_gradient_accumulation_steps=parts,
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
            model=Namespace(training=True), accelerator=ACCELERATOR, _metrics=defaultdict(lambda: defaultdict(list)),
            get_gamma_weights=GRPOTrainer.get_gamma_weights,
            _get_per_token_logps_and_entropies=lambda *args, **options: (logp, entropy, None))
        inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
                  "completion_mask": mask.long(), "advantages": adv, "old_per_token_logps": old_logp,
                  "ref_per_token_logps": ref_logp, "num_items_in_batch": torch.tensor(TOKENS)}
        return GRPOTrainer._compute_loss(trainer, None, inputs)

    return loss


def dpo_loss(loss_type: str, beta: float = 0.1, label_smoothing: float = 0.0) -> Callable:
    """TRL's loss of a batch of pairs. A response's log-prob is that of its first token, and its other tokens have 0."""
    from trl import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    args = Namespace(**defaults(DPOConfig))

    def loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, chosen_length: Tensor,
             rejected_length: Tensor) -> Tensor:
        lengths = torch.cat([chosen_length, rejected_length])
        columns = torch.arange(1 + int(lengths.max()))
        mask = ((columns > 0) & (columns <= lengths[:, None])).long()               # a prompt of one token
        logp = torch.nn.functional.pad(torch.cat([chosen, rejected])[:, None], (0, len(columns) - 2))
        zeros = torch.zeros_like(logp).detach()
        outputs = Namespace(log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        trainer = Namespace(
            args=args, loss_types=[loss_type], loss_weights=[1.0], beta=beta, label_smoothing=label_smoothing, ld_alpha=None,
            f_divergence_type="reverse_kl", use_weighting=False, precompute_ref_logps=True, aux_loss_enabled=False,
            model=Namespace(training=True), accelerator=ACCELERATOR, _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0, _tp_size=1)
        inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "ref_chosen_logps": ref_chosen,
                  "ref_rejected_logps": ref_rejected}
        return DPOTrainer._compute_loss(trainer, lambda **options: outputs, inputs, return_outputs=False)

    return loss


def accumulation(loss_type: str, **options) -> str | None:
    """What changes if two answers of 1 token and two of 3 are two micro-batches for TRL, not one batch; None if nothing."""
    mask, row = torch.arange(3) < torch.tensor([1, 1, 3, 3])[:, None], torch.ones(4, 3).double()

    def gradients(parts: int) -> Tensor:
        leaves = [(-row).requires_grad_(), row.clone().requires_grad_()]
        for some in torch.arange(4).chunk(parts):
            logp, entropy = (x[some] for x in leaves)
            grpo_loss(loss_type, parts=parts, **options)(logp, logp.detach(), row[some, 0], mask[some], ref_logp=logp.detach(),
                                                         entropy=entropy).backward()
        return torch.cat([x.grad[::2, 0] for x in leaves if x.grad is not None])

    one, two = gradients(1), gradients(2)
    name = "dL/dentropy" if options.get("entropy_coef") else "dL/dlogp"
    return None if torch.allclose(one, two) else (
        f"of two answers with 1 token and two with 3, A = 1, {name} of the first tokens is {numbers(one[-2:])} in one batch, "
        f"and {numbers(two[-2:])} where each two are a micro-batch")


CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
GRPO = [*((loss, level, {}) for loss in (*CLIPPED, "sapo") for level in ("token", "sequence")),
        *(("cispo", level, options) for options in ({}, {"epsilon_high": 5.0}) for level in ("token", "sequence")),
        ("vespo", "token", {}), ("dapo", "token", {"entropy_coef": 0.01}), ("grpo", "token", {"entropy_coef": 0.01})]
# "absolute": a loss of each response by itself, without a margin.
DPO = {"sigmoid": {"loss": "dpo", "beta": 0.1}, "ipo": {"loss": "ipo", "beta": 0.1}, "sigmoid_norm": {}, "hinge": {},
       "robust": {}, "exo_pair": {}, "discopop": {}, "aot": {},
       **{loss: {"absolute": True}
          for loss in ("aot_unpaired", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sft")}}
SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3}
# Whether TRL's documentation says so, and when it matters.
MATTERS = {
    ("cispo", "weighted_score"): (
        "partly: that 5.0 is recommended",
        "Always, if `epsilon_high` is left out: it is then 0.2, and for this loss it is the cap of the ratio itself. Nearly "
        "every ratio is above it, so that the weight is 0.2 for all tokens: policy gradient without importance sampling, a "
        "fifth as large as a KL or an entropy term expects (c is relative to it). Set `epsilon_high=5.0`."),
    ("bnpo", "accumulation"): (
        "yes", "With `gradient_accumulation_steps` above 1 and answers of different lengths: a token counts more where those "
               "beside it are short. `dapo` counts the tokens of the whole step."),
    ("entropy_coef", "micro_batches"): (
        "in the code", "Only with `entropy_coef`, several micro-batches and answers of different lengths: the bonus is a mean "
                       "over the tokens of each micro-batch, so that no share of the step makes loss and bonus add up."),
    ("discopop", "upwards"): (
        "no; the paper's formula", "At the start of training, where all margins are 0: from -0.12 to 0.07, beta times the "
                                   "margin, the loss makes the chosen response less likely, and -0.12 is a local minimum."),
    ("apo_down", "upwards"): (
        "yes", "It is what the loss is for: where chosen responses are worse than the model's own, both become less likely."),
    ("sft", "upwards"): ("yes", "It is no loss of pairs: the rejected response is not used. It is to be added to another."),
    ("sft", "micro_batches"): (
        "no", "With several micro-batches: it is a mean over the tokens of each, not over pairs, so that a token counts more "
              "where those beside it are few; the other DPO losses are means over pairs."),
    ("aot", "micro_batches"): (
        "in part: that larger batches help",
        "It sorts the margins of a micro-batch, and so depends on its size: with `per_device_train_batch_size=1` it is "
        "`sigmoid`, and accumulating gradients does not bring the sorting back."),
}
MATTERS["entropy_coef", "accumulation"] = MATTERS["entropy_coef", "micro_batches"]
MATTERS["aot_unpaired", "micro_batches"] = MATTERS["aot", "micro_batches"]


def checked(check: Callable, *args, **options) -> Report:
    try:
        return check(*args, **options)
    except BrokenObjective as e:
        return e.report


def grpo_report(loss_type: str, level: str, options: dict, examples: int) -> Report:
    """With a KL term; what does not add up as TRL accumulates it is broken, too."""
    how = {"ratio": level, "clip": (0.2, 0.2)} if loss_type in CLIPPED else {"ratio": level}
    if loss_type in ("cispo", "vespo"):         # VESPO's weight is that of an answer, whatever the level
        how = {"detached_weight": True, "ratio": "sequence" if loss_type == "vespo" else level}
    report = checked(check_objective, grpo_loss(loss_type, level, beta=0.1, **options), aggregates="own", adv_shape="B",
                     examples=examples, **how)
    found = accumulation(loss_type, **options)
    (report.held if found is None else report.broken)["accumulation"] = found or "micro-batches as TRL accumulates them"
    return report


def dpo_report(loss_type: str, examples: int) -> Report:
    loss = dpo_loss(loss_type, label_smoothing=SMOOTHING.get(loss_type, 0.0))
    return checked(check_preference_objective, loss, examples=examples, **DPO[loss_type])


PREFACE = """# TRL's losses, checked

`python -m experiments.peers` (with `pip install -e ".[peers]"`) calls TRL's own `_compute_loss` with random log-probs and
checks it as [checks.md](checks.md) describes; this page is its output, for TRL {version} and its defaults. Most of what TRL
computes is what it says. Each line of the last table is derived again without nanorl, by `experiments/trl_grpo_alone.py` and
`experiments/trl_dpo_alone.py`; its third column says whether TRL documents it.

## GRPO

The step has 64 tokens, `max_completion_length` is 16, and the KL term is that of `beta=0.1`, which TRL multiplies by the
importance ratio. `hold` counts the invariants that hold. One more is added: micro-batches, accumulated as TRL accumulates
them, have the gradient of one batch.

| loss | ratio | hold | token weights | the expected gradient of the KL term is that of | broken |
|---|---|--:|---|---|---|
"""
PAIRS = """
With the ratio of a sequence, the KL term mixes two divergences, in equal parts where answers have two tokens; where they have
n, that of whole answers has a share of 1 / n. TRL's documentation says that the term is unbiased only with the ratio of tokens.
VESPO's weight is one number for an answer, and may be larger than its ratio. CISPO's is one, too, with the ratio of a
sequence; less is then checked of it, and that it is 0.2 / 64 without `epsilon_high` shows in the fourth column alone.

## DPO

With `beta=0.1`. A loss of a margin depends on the difference of both log-ratios alone; the others judge each response by
itself, so that exchanging the two, or adding a constant to both, may change them.

| loss | of | hold | log-probs are | broken |
|---|---|--:|---|---|
"""
BROKEN = """
## What is broken, and when it matters

| loss | what | documented? | the smallest counterexample found | when it matters |
|---|---|---|---|---|
"""


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def note(report: Report, start: str) -> str:
    """The rest of the note that begins so, if there is one."""
    return next((x.removeprefix(start) for x in report.notes if x.startswith(start)), "")


def page(examples: int = 50) -> str:
    grpo, dpo, broken = "", "", {}
    for loss, level, options in GRPO:
        report = grpo_report(loss, level, options, examples)
        name = ", ".join([loss, *(f"{key}={value}" for key, value in options.items())])
        kl = note(report, "KL term: its expected gradient is ").split(" times that of ")
        kl = " and ".join(x.rsplit(" plus ", 1)[0] for x in kl[1:])
        grpo += row(name, level, len(report.held), note(report, "weights: "), kl, ", ".join(report.broken))
        for what, found in report.broken.items():
            broken.setdefault(("entropy_coef" if "entropy_coef" in options else loss, what), found)
    for loss, options in DPO.items():
        report = dpo_report(loss, examples)
        dpo += row(loss, "each response" if "absolute" in options else "a margin", len(report.held),
                   note(report, "log-probs are "), ", ".join(report.broken))
        broken |= {(loss, what): found for what, found in report.broken.items()}
    lines = (row(loss, what, MATTERS[loss, what][0], found, MATTERS[loss, what][1]) for (loss, what), found in broken.items())
    return PREFACE.replace("{version}", version("trl")) + grpo + PAIRS + dpo + BROKEN + "".join(lines)


def main() -> None:
    text = page()
    write_atomically(ROOT / "docs/peers.md", lambda f: f.write(text.encode()))


if __name__ == "__main__":
    main()
