"""nanorl beside transformers and TRL, in the same run: python -m benchmarks --peers

Both do the same work on the same shapes in float32, in turn: answers to as many prompts of the same length, of which none
stops early, and steps of GRPO on them, generation included, with random rewards, beta 0 and one update in micro-batches of
the same size. The models of transformers and TRL are Llamas, which is nanorl's architecture.

    python -m benchmarks.peers      docs/figures/peers.png, from the results that are kept
"""

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import peak_memory, race
from benchmarks.memory import MODELS
from nanorl import run
from nanorl.batches import micro_batches
from nanorl.gpt import GPT, GPTConfig
from nanorl.ops import token_weights, zscore
from nanorl.plot import pyplot, save
from nanorl.sample import generate, token_log_probs
from train_grpo import objective

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURE = ROOT / "benchmarks/results/peers.json", ROOT / "docs/figures/peers.png"


class Work(NamedTuple):
    """So many prompts of this length, answers to each and tokens of an answer; trained on so many rows at a time, or none."""

    name: str
    config: GPTConfig
    prompts: int
    group: int
    prompt: int
    new: int
    rows: int = 0

    def __str__(self) -> str:
        what = f"GRPO step, {self.prompts} x {self.group} answers" if self.rows else f"generate, batch {self.prompts}"
        return f"{self.name}, {what}, {self.prompt} + {self.new} tokens"


def works(smoke: bool) -> list[Work]:
    if smoke:
        tiny = GPTConfig(32, layers=1, width=16, heads=2)
        return [Work("tiny", tiny, 4, 1, 5, 3), Work("tiny", tiny, 2, 2, 5, 3, rows=2)]
    toys = {V: (f"V={V}", GPTConfig(V)) for V in (256, 4096)}
    smol = "SmolLM2-135M", MODELS["SmolLM2-135M"]
    return [*(Work(*toys[V], batch, 1, 12, 32) for V in toys for batch in (64, 256)),
            *(Work(*toys[V], 32, 8, prompt, 32, rows=64) for V, prompt in ((256, 12), (4096, 12), (256, 64))),
            Work(*smol, 16, 1, 64, 48), Work(*smol, 8, 8, 64, 48, rows=8)]


def llama_of(config: GPTConfig) -> torch.nn.Module:
    """transformers' Llama of the same shape, without a token that stops."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context, tie_word_embeddings=config.tie_embeddings, rms_norm_eps=config.norm_eps,
        bos_token_id=None, eos_token_id=None))


def prompts_of(work: Work) -> Tensor:
    return torch.randint(work.config.vocab_size, (work.prompts, work.prompt), generator=run.generator(0, "prompts"))


def generation(work: Work, compile: bool) -> dict[str, Callable[[], object]]:
    prompts, model, llama = prompts_of(work), GPT(work.config, run.generator(0, "benchmark")), llama_of(work.config).eval()
    sampling = {"max_new_tokens": work.new, "stop_ids": set()}
    candidates = {
        "transformers": lambda: llama.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=work.new,
                                               do_sample=True, top_k=0),
        "nanorl": lambda: generate(model, prompts.tolist(), **sampling)}
    if compile:
        candidates["nanorl, compiled"] = lambda: generate(model, prompts.tolist(), compile=True, **sampling)
    return candidates


def our_step(work: Work) -> Callable[[], None]:
    """A step of train_grpo.py, with the weights of TRL's default loss."""
    model, prompts = GPT(work.config, run.generator(0, "benchmark")), prompts_of(work)
    optimizer = run.Optimizers(model, "adamw", 1e-4)

    def step() -> None:
        rollout = generate(model, prompts.tolist(), max_new_tokens=work.new, stop_ids=set(), samples_per_prompt=work.group)
        adv = zscore(torch.rand(work.prompts, work.group)).view(-1, 1)
        weights = token_weights(rollout.mask, rollout.prompt_index, "token_mean")
        for rows, _ in micro_batches(rollout, work.rows):
            logp, _ = token_log_probs(model, rollout.tokens[rows], rollout.mask[rows])
            objective(logp, logp.detach(), adv[rows], rollout.mask[rows], weights[rows])[0].backward()
        optimizer.step(1e-4, 1.0)

    return step


def trainer_settings(work: Work) -> dict:
    """TRL's fastest: no activation is computed twice, nothing is logged, saved or evaluated, and the optimizer is fused."""
    return {"per_device_train_batch_size": work.rows, "gradient_accumulation_steps": work.prompts * work.group // work.rows,
            "num_generations": work.group, "max_completion_length": work.new, "beta": 0.0, "num_iterations": 1,
            "learning_rate": 1e-4, "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "gradient_checkpointing": False,
            "bf16": False, "use_cpu": True, "logging_strategy": "no", "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True}


def trl_steps(work: Work, steps: int, after: Callable[[], object]) -> list[float]:
    """Seconds of each step of TRL's GRPOTrainer, generation included; `after` is called after each."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    V, seconds, reward = work.config.vocab_size, [], random.Random(0)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)} | {"<end>": V}, unk_token="<end>"))   # never sampled
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    prompts = [" ".join(map(str, row)) for row in prompts_of(work).tolist()]

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **options) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *args, **options) -> None:
            seconds.append(time.perf_counter() - self.begun)
            after()

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            llama_of(work.config), lambda completions, **others: [reward.random() for _ in completions],
            GRPOConfig(folder, max_steps=steps, **trainer_settings(work)),
            Dataset(InMemoryTable.from_pydict({"prompt": prompts}), fingerprint="prompts"),     # not to be computed
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>"),
            callbacks=[Clock()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return seconds


def raced_steps(work: Work, steps: int) -> dict[str, list[float]]:
    """Seconds of so many steps of both, in turn."""
    step, ours = our_step(work), []

    def timed() -> None:
        begun = time.perf_counter()
        step()
        ours.append(time.perf_counter() - begun)

    return {"TRL": trl_steps(work, steps, timed), "nanorl": ours}


def memory_of_steps(who: str, smoke: bool) -> int | None:
    """Bytes of the last model and its first two steps, of which the second begins with the optimizer's moments.

    Two prompts are enough: what is in memory at a time are the rows of a micro-batch.
    """
    import trl.trainer.grpo_trainer  # noqa: F401       libraries do not count

    work = works(smoke)[-1]._replace(prompts=2)

    def two_steps() -> None:
        step = our_step(work)
        step()
        step()

    return peak_memory(two_steps if who == "nanorl" else lambda: trl_steps(work, 2, lambda: None), torch.device("cpu"))


def check_installed() -> None:
    if not find_spec("trl"):
        raise run.UserError('--peers: needs transformers and TRL, which are not installed; pip install -e ".[peers]"')


def race_all(smoke: bool, seconds: float, compile: bool) -> Iterator[tuple[str, int, dict[str, list[float]]]]:
    """Each piece of work, its answer tokens, and the seconds of each candidate in every round."""
    print(f"float32, transformers {version('transformers')}, TRL {version('trl')}")
    for work in works(smoke):
        large = work.config.width > 128
        if work.rows:
            print(f"TRL: {trainer_settings(work)}")
            times = raced_steps(work, 2 if large or smoke else 7)
            times = times if large else {who: steps[1:] for who, steps in times.items()}       # the first is to warm up
        else:
            times = race(generation(work, compile and large), torch.device("cpu"), 0.0 if smoke else seconds)
        yield str(work), work.prompts * work.group * work.new, times


def draw(results: Path = RESULTS, path: Path = FIGURE) -> None:
    """How many times as fast as the other library, for each piece of work."""
    rows = [row for row in json.loads(results.read_text(encoding="utf-8"))["rows"] if row["ratio"]]
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(rows) + 1), layout="constrained")
    names = [row["work"] + (" (compiled)" if "compiled" in row["who"] else "") for row in rows]
    bars = axes.barh(names, [row["ratio"] for row in rows])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("how many times as long the other library takes")
    save(figure, path)


if __name__ == "__main__":
    draw()
