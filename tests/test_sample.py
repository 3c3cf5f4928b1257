"""The engine samples from the softmax it claims, row by row, and the scorer gives its tokens the same probability."""

import copy
import math
import random
import shutil
from itertools import accumulate, product
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nanorl import decode, sample
from nanorl.batches import add_metrics
from nanorl.data import pad
from nanorl.decode import draw, sampling_logits, top_k_filter, top_p_filter, uniforms
from nanorl.gpt import GPT, PRESETS, GPTConfig, KVCache
from nanorl.ops import kl_divergence, log_softmax
from nanorl.sample import generate, token_log_probs

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32)
temperatures = st.sampled_from([0.3, 0.7, 1.0, 2.0])
INF = math.inf
V = 7
STOPS = {2, 5}      # of seven ids, so that many rows finish early; id 0, which pads, is an ordinary token


def tiny(seed: int = 0, dtype=torch.float64, **changes) -> GPT:
    """One or two layers whose next-token distributions are far from uniform."""
    config = {"vocab_size": V, "context": 24, "layers": 2, "width": 16, "heads": 2} | changes
    model, generator = GPT(GPTConfig(**config)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=1.0 if p.ndim == 1 or "embedding" in name else p.shape[1] ** -0.5, generator=generator)
    return model.to(dtype)


def random_logits(*shape: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_one_sentence(error: pytest.ExceptionInfo, *mentions: object) -> None:
    text = str(error.value)
    assert "\n" not in text and 20 < len(text) < 300, text
    for mention in mentions:
        assert str(mention) in text, text


# The law, in plain Python.


def law(logits: list[float], temperature: float, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """Next-token probabilities: temperature, then top-k, then top-p, renormalised after each."""
    top = max(logits)
    p = [math.exp((z - top) / temperature) for z in logits]
    if top_k:
        threshold = sorted(p, reverse=True)[min(top_k, len(p)) - 1]
        p = [x if x >= threshold else 0.0 for x in p]
    p = [x / math.fsum(p) for x in p]
    if top_p < 1:
        kept, mass = set(), 0.0
        for i in sorted(range(len(p)), key=lambda i: -p[i]):
            kept.add(i)
            mass += p[i]
            if mass >= top_p:
                break
        p = [x if i in kept else 0.0 for i, x in enumerate(p)]
    return [x / math.fsum(p) for x in p]


def boundaries(p: list[float]) -> list[tuple[float, float]]:
    """The stretch of u that belongs to each token: [sum of p before it, that and its own)."""
    ends = list(accumulate(p))
    return list(zip([0.0, *ends[:-1]], ends, strict=True))


# ---- From logits to a token ----


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, V, V + 5])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
@settings(max_examples=8, deadline=None)
@given(seed=seeds)
def test_each_token_owns_a_stretch_of_u_as_long_as_its_probability(temperature, top_k, top_p, seed):
    """U just inside both ends of a token's stretch draws that token, so the measure of u that draws it is its
    probability. And draw's logp is the log of that probability."""
    z = random_logits(V, seed=seed)
    p = law(z.tolist(), temperature, top_k, top_p)
    logits = sampling_logits(z[None], temperature, top_k, top_p)
    for token, (start, end) in enumerate(boundaries(p)):
        if p[token] == 0:
            assert logits[0, token] == -INF
            continue
        u = torch.tensor([start + 1e-9, (start + end) / 2, end - 1e-9], dtype=torch.float64)
        if p[token] < 1e-8:
            continue
        drawn, logp = draw(logits.expand(3, -1), u)
        assert drawn.tolist() == [token] * 3
        torch.testing.assert_close(logp.exp(), torch.full_like(logp, p[token]), rtol=1e-10, atol=0)


@given(seeds)
@quick
def test_draw_is_the_inverse_cdf(seed):
    """On a grid of u, against a search through the cumulative probabilities from the left; it never goes backwards."""
    z = random_logits(V, seed=seed)
    p, grid = law(z.tolist(), 1.0), [(2 * i + 1) / 2000 for i in range(1000)]
    expected = [next(i for i, (_, end) in enumerate(boundaries(p)) if u < end) for u in grid]
    drawn, _ = draw(z.expand(1000, -1), torch.tensor(grid, dtype=torch.float64))
    assert drawn.tolist() == expected == sorted(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=seeds, size=st.sampled_from([1, 2, 7, 5000]), kept=st.sampled_from([1, 2, 5000]))
@quick
def test_a_token_of_probability_zero_is_never_drawn(dtype, seed, size, kept):
    """Neither by u = 0, nor by the u next to 1, nor by one that sits on a boundary of the cumulative sum; zero by a
    filter (-inf) or by underflow (a logit 10,000 below)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(size, generator=generator)[: max(0, size - kept)]
    z = random_logits(size, seed=seed).to(dtype)
    z[hidden] = -INF if seed % 2 else -1e4
    cdf = torch.softmax(z, -1).cumsum(-1)
    ends = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    u = torch.cat((ends, cdf[torch.randint(size, (20,), generator=generator)].double())).clamp(max=1 - 2.0**-53)
    for given_u in (u, u.float().clamp(max=1 - 2.0**-24)):
        drawn, logp = draw(z.expand(len(u), -1), given_u)
        assert (z[drawn] > -1e3).all() and logp.isfinite().all()


@given(seeds)
@quick
def test_a_cumulative_sum_that_rises_where_nothing_is_draws_nothing_there(seed):
    """As on a GPU, which adds in pieces: between two tokens of probability 0, rounding may lift the sum."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.where(torch.rand(4, 9, generator=generator) < 0.6, -INF, torch.randn(4, 9, generator=generator))
    z[:, 3] = 0.0

    def lifted(p):
        return p.cumsum(-1) + 0.05 * torch.arange(1, 10)

    with patch.object(decode, "cumulative_sum", lifted):
        for u in torch.rand(20, 4, generator=generator):
            drawn, logp = draw(z, u)
            assert (z.gather(-1, drawn[:, None]) > -INF).all() and logp.isfinite().all()


def test_draw_from_one_token_is_certain():
    drawn, logp = draw(torch.zeros(3, 1), torch.tensor([0.0, 0.5, 1 - 2.0**-24]))
    assert drawn.tolist() == [0, 0, 0] and logp.tolist() == [0, 0, 0]


@given(seeds, st.integers(1, V + 3))
@quick
def test_top_k_keeps_the_k_largest(seed, k):
    """S1.9: min(k, V) tokens without ties, none of them below a dropped one, their logits (so their odds) untouched;
    what the cut costs is KL(cut || whole) = -log(kept mass)."""
    z = random_logits(2, V, seed=seed)
    cut = top_k_filter(z, k)
    kept = cut > -INF
    assert (kept.sum(-1) == min(k, V)).all()
    assert torch.equal(cut[kept], z[kept])
    assert (z.masked_fill(~kept, INF).amin(-1) > z.masked_fill(kept, -INF).amax(-1)).all()
    mass = (log_softmax(z).exp() * kept).sum(-1)
    torch.testing.assert_close(kl_divergence(cut, z), -mass.log(), rtol=0, atol=1e-12)
    if k == 1:
        assert torch.equal(kept.nonzero()[:, 1], z.argmax(-1))
    if k >= V:
        assert torch.equal(cut, z) and torch.equal(top_k_filter(z, 0), z)


def test_top_k_keeps_ties_with_the_kth():
    z = torch.tensor([[1.0, 3.0, 1.0, 0.0, 1.0]])
    assert (top_k_filter(z, 2) > -INF).tolist() == [[True, True, True, False, True]]
    assert (top_k_filter(z, 1) > -INF).tolist() == [[False, True, False, False, False]]


@given(seeds, st.floats(0.01, 0.99), st.floats(0.01, 0.99))
@quick
def test_top_p_keeps_the_smallest_nucleus(seed, p, q):
    """S1.10: at least one token; the kept mass reaches p and without its least likely token it does not; none of the
    kept is less likely than a dropped one; a smaller p keeps a subset; the odds stay and KL = -log(kept mass)."""
    z = random_logits(2, V, seed=seed)
    probability, cut = log_softmax(z).exp(), top_p_filter(z, p)
    kept = cut > -INF
    mass, least = (probability * kept).sum(-1), probability.masked_fill(~kept, INF).amin(-1)
    assert kept.any(-1).all()
    assert (mass >= p - 1e-12).all() and (mass - least < p + 1e-12).all()
    assert (least > probability.masked_fill(kept, 0.0).amax(-1)).all()
    assert torch.equal(cut[kept], z[kept])
    torch.testing.assert_close(kl_divergence(cut, z), -mass.log(), rtol=0, atol=1e-12)
    narrow, wide = (top_p_filter(z, x) > -INF for x in sorted((p, q)))
    assert (wide | ~narrow).all()


def test_top_p_edges():
    """p = 1 is off, to the last bit; a p below every probability keeps the most likely token, the first of a tie."""
    z = random_logits(3, V, seed=0)
    assert torch.equal(top_p_filter(z, 1.0), z)
    assert (top_p_filter(torch.zeros(1, 4), 1e-9) > -INF).tolist() == [[True, False, False, False]]
    assert (top_p_filter(torch.zeros(1, 4), 0.3) > -INF).tolist() == [[True, True, False, False]]


def test_top_p_is_taken_of_what_top_k_left():
    """Probabilities .4 .3 .2 .1: after top-k 3 they are .44 .33 .22, so p = 0.75 keeps two, and before it three."""
    z = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert (sampling_logits(z, 1.0, top_k=3, top_p=0.75) > -INF).sum() == 2
    assert (sampling_logits(z, 1.0, top_k=0, top_p=0.75) > -INF).sum() == 3


def test_half_precision_logits_are_sampled_in_float32():
    assert sampling_logits(torch.zeros(1, V, dtype=torch.bfloat16), 0.7).dtype == torch.float32
    assert sampling_logits(torch.zeros(1, V, dtype=torch.float64), 0.7).dtype == torch.float64


# ---- Uniforms ----


@given(st.integers(0, 2**63 - 1), st.integers(1, 5), st.integers(1, 9), st.integers(0, 3), st.integers(0, 9))
@quick
def test_a_uniform_depends_on_seed_row_and_position_only(seed, rows, count, more_rows, more):
    """Asking for more rows or positions, or only for later rows, changes none of the old ones."""
    u = uniforms(seed, rows, count)
    assert u.shape == (rows, count) and (u >= 0).all() and (u < 1).all()
    assert torch.equal(uniforms(seed, rows + more_rows, count + more)[:rows, :count], u)
    assert torch.equal(uniforms(seed, 1, count, first=rows - 1), u[-1:])


def test_uniforms_never_repeat():
    """Neighbouring seeds (large ones too), rows and positions: 24 bits each, so that 3,000 of them rarely meet."""
    u = torch.cat([uniforms(base + s, 10, 20) for base in (0, 2**53, 2**63 - 10) for s in range(5)])
    assert u.shape == (150, 20) and len(u.unique(dim=0)) == 150 and u.unique().numel() > 2990
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.std() - 12**-0.5) < 0.02


# ---- The engine ----


@st.composite
def requests(draw_):
    """Ragged prompts, several samples each, and how to sample; the prompts may hold stop and padding ids."""
    prompts = draw_(st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=6), min_size=1, max_size=5))
    return prompts, {"max_new_tokens": draw_(st.integers(1, 8)), "temperature": draw_(temperatures), "stop_ids": STOPS,
                     "samples_per_prompt": draw_(st.integers(1, 4)), "seed": draw_(seeds)}


models = st.tuples(st.integers(0, 5), st.sampled_from(["rope", "learned", "none"]), st.sampled_from([1, 2])).map(
    lambda x: {"seed": x[0], "positions": x[1], "kv_heads": x[2]})
truncations = st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.8}])


# With this, `compile=True` is without the compiler: the step runs as it is, in the memory that stays between calls.
fixed_slots = patch.object(torch, "compile", lambda step, **_: step)


def patient(turns: int):
    """Ask after every so many tokens whether rows have finished, as is done on a GPU after eight."""
    return patch.dict(sample.CHECK_EVERY, cpu=turns)


# How the engine runs: rows at a time, fixed slots or shrinking ones, and after how many tokens it looks.
engines = st.tuples(st.none() | st.integers(1, 12), st.booleans(), st.sampled_from([1, 1, 2, 5]))


@given(models, requests(), truncations, st.sampled_from([torch.float64, torch.float32]), engines)
@settings(max_examples=150, deadline=None)
def test_every_token_is_drawn_by_its_own_uniform_from_the_plain_law(model, request, truncation, dtype, engine):
    """The engine against its definition, one row at a time: row b's n-th token is where uniforms(seed)[b, n] falls into
    the cumulative law of a plain forward over that row alone, and logp is the log of that law.

    So neither the cache nor the batch, ragged prompts, finished neighbours or a wait for a slot matter, up to draws within
    1e-5 of a boundary in float32 and 1e-9 in float64. Truncated laws are compared in float64, where rounding never decides
    who is in the nucleus.
    """
    dtype, (slots, compile, turns) = torch.float64 if truncation else dtype, engine
    (prompts, how), model = request, tiny(**model, dtype=dtype)
    with fixed_slots, patient(turns):
        out = generate(model, prompts, **how, **truncation, slots=slots, compile=compile)
    slack = 1e-5 if dtype == torch.float32 else 1e-9
    u = uniforms(how["seed"], len(out.tokens), how["max_new_tokens"]).double()
    for row, length in enumerate(out.lengths.tolist()):
        start = int(out.prompt_lengths[row])
        logits = model(out.tokens[row : row + 1, :length])[0].double().tolist()
        for at in range(start, length):
            p, token = law(logits[at - 1], how["temperature"], **truncation), int(out.tokens[row, at])
            low, high = boundaries(p)[token]
            assert low - slack <= u[row, at - start] <= high + slack
            assert abs(out.logp[row, at - 1].item() - math.log(p[token])) < 1e-5


@given(models, requests(), st.sampled_from([torch.float64, torch.float32]))
@quick
def test_the_scorer_agrees_with_the_engine(model, request, dtype):
    """Token_log_probs of the same tokens, at that temperature, are the engine's logp, so that the ratio is 1: up
    to 1e-5 in the logits, which a temperature below 1 magnifies."""
    (prompts, how), model = request, tiny(**model, dtype=dtype)
    out = generate(model, prompts, **how)
    logp, _ = token_log_probs(model, out.tokens, out.mask, temperature=how["temperature"])
    torch.testing.assert_close(logp.float(), out.logp, rtol=0, atol=1e-5 / min(how["temperature"], 1.0))


@given(models, requests(), truncations)
@quick
def test_a_row_does_not_depend_on_the_rows_beside_it(model, request, truncation):
    """Later rows added or gone, or a later cut, leave a row's tokens as they are. (Float64 puts near-ties, where
    rounding could decide, out of reach.)"""
    (prompts, how), model = request, tiny(**model)
    how |= truncation
    out, G = generate(model, prompts, **how), how["samples_per_prompt"]

    def responses(out, rows):
        return [(out.responses()[row], bool(out.finished[row])) for row in range(rows)]

    alone = generate(model, prompts[:1], **how)
    beside = generate(model, [*prompts, *prompts, [1, 2, 3, 4, 5, 6]], **how)
    assert responses(alone, G) == responses(out, G)
    assert responses(beside, len(out.tokens)) == responses(out, len(out.tokens))

    longer = generate(model, prompts, **how | {"max_new_tokens": how["max_new_tokens"] + 5})
    for row, (response, finished) in enumerate(responses(out, len(out.tokens))):
        assert longer.responses()[row][: len(response)] == response
        assert not finished or longer.responses()[row] == response


@given(models, requests(), st.lists(st.integers(1, 12), min_size=4, max_size=4), st.booleans())
@quick
def test_a_prompt_with_a_limit_of_its_own_gets_the_first_tokens_of_its_answer(model, request, limits, compile):
    """Each row is that of a common limit, cut at its own; where the limits differ, the longest prompts may fill the context."""
    (prompts, how), model = request, tiny(**model)
    limits = [min(limits[p % 4], model.config.context - len(prompt)) for p, prompt in enumerate(prompts)]
    with fixed_slots:
        out = generate(model, prompts, **how | {"max_new_tokens": limits}, compile=compile)
    for p, limit in enumerate(limits):
        alone = generate(model, prompts[: p + 1], **how | {"max_new_tokens": max(1, 24 - max(map(len, prompts)))})
        for row in range(p * how["samples_per_prompt"], (p + 1) * how["samples_per_prompt"]):
            said, start = alone.tokens[row, alone.prompt_lengths[row] : alone.lengths[row]].tolist(), out.prompt_lengths[row]
            assert out.tokens[row, start : out.lengths[row]].tolist()[: len(said)] == said[:limit]
            assert out.lengths[row] - start <= limit and (bool(out.finished[row]) or out.lengths[row] - start == limit)


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    return float(((counts - counts.sum() * p).square() / (counts.sum() * p)).sum())


def test_samples_of_one_prompt_are_independent_draws():
    """Pitfall 36: over 4,000 samples, the first two tokens of each prompt have their exact joint law, by chi-square
    (48 degrees of freedom, 99.9 % below 84.0; the seed is fixed, so this cannot flicker)."""
    model, prompts, G = tiny(3), [[1], [4, 6, 0]], 4000
    out = generate(model, prompts, max_new_tokens=2, temperature=2.0, stop_ids=set(), samples_per_prompt=G, seed=5)
    for n, prompt in enumerate(prompts):
        rows, at = slice(n * G, (n + 1) * G), len(prompt)
        first = torch.softmax(model(torch.tensor([prompt]))[0, -1] / 2, -1)
        second = torch.softmax(model(torch.tensor([[*prompt, a] for a in range(V)]))[:, -1] / 2, -1)
        joint = (first[:, None] * second).flatten().detach()
        counts = torch.bincount(out.tokens[rows, at] * V + out.tokens[rows, at + 1], minlength=V * V)
        assert chi_square(counts, joint) < 84.0
        assert chi_square(counts.view(V, V).sum(-1), first.detach()) < 22.5         # 6 degrees of freedom


@given(models, requests())
@quick
def test_the_mask_covers_the_response_and_its_stop_token(model, request):
    """One True for each sampled token, its stop token included. Finished means that one stop token came, as the
    last; unfinished, that none came in max_new_tokens. Stop and padding ids inside a prompt count for nothing."""
    (prompts, how), model = request, tiny(**model)
    out, G = generate(model, prompts, **how), how["samples_per_prompt"]
    assert out.prompt_index.tolist() == [n for n in range(len(prompts)) for _ in range(G)]
    assert out.tokens.shape[1] == out.lengths.max() and out.mask.shape == out.logp.shape
    assert (out.logp[~out.mask] == 0).all() and (out.logp[out.mask] < 0).all()
    assert torch.equal(out.mask.sum(-1), out.lengths - out.prompt_lengths)
    for row, tokens in enumerate(out.tokens.tolist()):
        prompt, length = prompts[row // G], int(out.lengths[row])
        assert tokens[: len(prompt)] == prompt and out.prompt_lengths[row] == len(prompt)
        assert out.mask[row].nonzero().squeeze(-1).tolist() == list(range(len(prompt) - 1, length - 1))
        sampled = tokens[len(prompt) : length]
        if out.finished[row]:
            assert sampled[-1] in STOPS and not STOPS & set(sampled[:-1])
            assert out.responses()[row] == sampled[:-1]
        else:
            assert len(sampled) == how["max_new_tokens"] and not STOPS & set(sampled)
            assert out.responses()[row] == sampled


def test_without_stop_ids_every_answer_is_cut():
    out = generate(tiny(), [[1], [2, 3]], max_new_tokens=5, stop_ids=set())
    assert not out.finished.any() and (out.lengths - out.prompt_lengths == 5).all()


@given(models, requests(), seeds)
@quick
def test_what_lies_behind_a_row_means_nothing(model, request, seed):
    """Any ids in the padding, stop ids among them, leave responses and scores as they are."""
    (prompts, how), model = request, tiny(**model)
    out = generate(model, prompts, **how)
    before, _ = token_log_probs(model, out.tokens, out.mask, temperature=how["temperature"])
    responses = out.responses()
    behind = torch.arange(out.tokens.shape[1]) >= out.lengths[:, None]
    junk = torch.randint(V, out.tokens.shape, generator=torch.Generator().manual_seed(seed))
    out.tokens = torch.where(behind, junk, out.tokens)
    after, _ = token_log_probs(model, out.tokens, out.mask, temperature=how["temperature"])
    assert torch.equal(after, before)
    assert out.responses() == responses


# ---- Greedy ----


@given(models, requests())
@quick
def test_greedy_is_the_argmax_the_limit_of_temperature_and_top_1(model, request):
    """T = 0 takes the most likely token of a plain forward, with logp 0; T -> 0 and top-k 1 give the same tokens."""
    (prompts, how), model = request, tiny(**model)
    greedy = generate(model, prompts, **how | {"temperature": 0.0})
    for row, length in enumerate(greedy.lengths.tolist()):
        best = model(greedy.tokens[row : row + 1, : length - 1])[0].argmax(-1)
        start = int(greedy.prompt_lengths[row])
        assert best[start - 1 :].tolist() == greedy.tokens[row, start:length].tolist()
    assert (greedy.logp == 0).all()
    for same in ({"temperature": 1e-7}, {"top_k": 1}, {"top_p": 1e-9}):
        out = generate(model, prompts, **how | same)
        assert torch.equal(out.tokens, greedy.tokens) and torch.equal(out.lengths, greedy.lengths)
        torch.testing.assert_close(out.logp, greedy.logp, rtol=0, atol=1e-6)


def test_greedy_takes_the_lowest_id_of_a_tie():
    model = tiny()
    with torch.no_grad():
        model.head.weight.zero_()
    out = generate(model, [[3], [1, 2]], max_new_tokens=4, temperature=0.0, stop_ids={6})
    assert [out.responses()[row] for row in range(2)] == [[0, 0, 0, 0]] * 2


# ---- The engine leaves no trace ----


def test_generate_changes_nothing_outside():
    """Prompts, every global random state, the model's mode and parameters; and nothing in a rollout holds a graph."""
    model, prompts = tiny(), [[1, 2], [3]]
    model.train()
    model.norm.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    out = generate(model, prompts, max_new_tokens=5, stop_ids=STOPS, samples_per_prompt=3)
    assert prompts == [[1, 2], [3]] and model.training
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert not out.logp.requires_grad and torch.is_grad_enabled()


def same_rollout(a, b, atol: float = 0.0) -> None:
    for name in ("tokens", "lengths", "finished", "prompt_lengths", "prompt_index"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=atol)


# A prompt that has to wait, and is longer than all that the slots have held before.
longer_later = [[1], [1, 2, 3, 4, 3, 6]], {"stop_ids": set(), "samples_per_prompt": 2}


@given(models, requests(), st.integers(1, 12), st.booleans(), seeds)
@example({"seed": 0}, longer_later, 2, False, 2)
@quick
def test_rows_wait_for_slots(model, request, slots, compile, seed):
    """Never more rows at a time than slots, or than one prompt has; and the answers are those of all at once."""
    (prompts, how), model = request, tiny(**model)
    at_most = max(slots // how["samples_per_prompt"], 1) * how["samples_per_prompt"]
    how["max_new_tokens"] = [1 + (seed + 5 * p) % 11 for p in range(len(prompts))]
    whole = generate(model, prompts, **how)
    with fixed_slots, patch.object(model, "hidden", wraps=model.hidden) as hidden:
        parts = generate(model, prompts, **how, slots=slots, compile=compile)
    assert max(len(call.args[0]) for call in hidden.call_args_list) <= at_most
    same_rollout(parts, whole, atol=1e-6)


@given(models, requests(), st.integers(1, 12), seeds)
@example({"seed": 0}, longer_later, 2, 2)
@quick
def test_a_cache_that_grows_as_it_fills_up_is_one_that_was_large_enough(model, request, slots, seed):
    """To the bit, rows that wait for a slot or are dropped included; and it never holds more than the answers have needed."""
    (prompts, how), model = request, tiny(**model)
    how["max_new_tokens"] = [1 + (seed + 5 * p) % 11 for p in range(len(prompts))]
    whole = generate(model, prompts, **how, slots=slots)
    with patch.object(decode, "GROWTH", 2), patch.object(KVCache, "grow", autospec=True, side_effect=KVCache.grow) as grow:
        parts = generate(model, prompts, **how, slots=slots)
        assert sum(call.args[1] for call in grow.call_args_list) <= max(0, max(how["max_new_tokens"]) - 2)
        grow.reset_mock()
        generate(model, prompts, **how | {"stop_ids": set(range(V))})
        assert not grow.called
    assert torch.equal(parts.tokens, whole.tokens) and torch.equal(parts.logp, whole.logp)


common_prefixes = st.tuples(st.integers(0, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4))


@given(models, common_prefixes, seeds)
@quick
def test_what_all_prompts_begin_with_is_read_once(model, prompts, seed):
    """The same keys and values as of each prompt by itself, prompts that are equal or end within the prefix included; and the
    model sees a prefix once, where it is long enough, and of each prompt what comes after it."""
    (common, rests, at_least), model = prompts, tiny(**model)
    ids = torch.randint(V, (1 + len(rests), 6), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens, lengths = pad([ids[0][:common] + rest[:n] for rest, n in zip(ids[1:], rests, strict=True)])
    with torch.no_grad(), patch.object(decode, "SHARED_AT_LEAST", at_least), \
            patch.object(model, "hidden", wraps=model.hidden) as hidden:
        cache = decode.read_prompts(model, tokens, torch.float64)
    for row, length in enumerate(lengths.tolist()):
        alone = KVCache(model.config, 1, length, dtype=torch.float64)
        model.hidden(tokens[row : row + 1, :length], alone)
        for ours, theirs in zip(cache.keys + cache.values, alone.keys + alone.values, strict=True):
            torch.testing.assert_close(ours[row, :, :length], theirs[0], rtol=0, atol=1e-12)
    (P, T), equal = tokens.shape, [*(tokens == tokens[0]).all(0).tolist(), False].index(False)
    prefix = min(T - 1, equal) if P > 1 else 0
    shared = prefix if prefix >= at_least else 0
    assert sum(call.args[0].numel() for call in hidden.call_args_list) == shared + P * (T - shared)


@given(models, requests(), st.integers(1, 6), st.booleans())
@quick
def test_a_prefix_that_is_read_once_changes_no_answer(model, request, common, compile):
    (prompts, how), model = request, tiny(**model)
    prompts, how["samples_per_prompt"] = [[1, 0, 4, 2, 6, 3][:common] + prompt for prompt in prompts], 2
    plain = generate(model, prompts, **how)
    with fixed_slots, patch.object(decode, "SHARED_AT_LEAST", 1):
        same_rollout(generate(model, prompts, **how, slots=6, compile=compile), plain, atol=1e-6)


@given(models, requests())
@quick
def test_prompts_may_be_read_a_few_at_a_time(model, request):
    """And logits drawn from a few rows at a time: never more of either than that."""
    (prompts, how), model = request, tiny(**model)
    whole, rows = generate(model, prompts, **how), []
    model.head.register_forward_hook(lambda head, args, logits: rows.append(len(logits)))
    with patch.object(decode, "READ_AT_ONCE", 1), patch.object(decode, "rows_of_logits", lambda V: 2), \
            patch.object(model, "hidden", wraps=model.hidden) as hidden:
        parts = generate(model, prompts, **how)
    assert max(rows) <= 2 and all(len(tokens) == 1 for (tokens, cache), _ in hidden.call_args_list if not cache.visible)
    same_rollout(parts, whole, atol=1e-6)


@pytest.mark.parametrize("compile", [False, True])
def test_one_long_answer_does_not_hold_the_others(compile):
    """In two slots, an answer of eight tokens beside seven of one: the seven take turns in the other slot."""
    model, prompts = tiny(), [[1]] * 8
    with fixed_slots, patch.object(decode.Slots, "step", autospec=True, side_effect=decode.Slots.step) as step:
        generate(model, prompts, max_new_tokens=[8, *[1] * 7], stop_ids=set(), slots=2, compile=compile)
    assert step.call_count == 8


@given(models, requests(), truncations)
@quick
def test_fixed_slots_give_the_tokens_of_shrinking_ones(model, request, truncation):
    """Decoding in memory of a fixed shape, finished rows included, is decoding with finished rows dropped."""
    (prompts, how), model = request, tiny(**model)
    with fixed_slots:
        for seed in range(2):                                   # the second call meets the memory of the first
            how |= truncation | {"seed": seed}
            same_rollout(generate(model, prompts, **how, compile=True), generate(model, prompts, **how), atol=1e-6)


@pytest.mark.parametrize("compile", [False, True])
def test_new_weights_are_a_fresh_engine(compile):
    """After an update in place, as an optimizer makes it, nothing of the old weights or keys is served."""
    model, prompts = tiny(), [[1, 2], [3]]
    how = {"max_new_tokens": 8, "stop_ids": STOPS, "samples_per_prompt": 4, "compile": compile}
    with fixed_slots:
        old = generate(model, prompts, **how)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
        new, fresh = generate(model, prompts, **how), generate(copy.deepcopy(model), prompts, **how)
    same_rollout(new, fresh)
    assert [new.responses()[row] for row in range(8)] != [old.responses()[row] for row in range(8)]


def test_nothing_of_a_failed_call_is_left_in_fixed_slots():
    """After a call that met a nan, the same model with sound weights samples as if that had not been."""
    model, how = tiny(), {"max_new_tokens": 4, "stop_ids": STOPS, "compile": True}
    with fixed_slots:
        sound = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            model.blocks[0].attention.v.weight.fill_(math.nan)
        with pytest.raises(FloatingPointError):
            generate(model, [[1, 2, 3]], **how)
        model.load_state_dict(sound)
        same_rollout(generate(model, [[1, 2, 3]], **how), generate(tiny(), [[1, 2, 3]], **how))


def test_a_row_that_goes_on_after_its_end_leaves_nothing_to_the_next():
    """The stop token's embedding is inf: what its row decodes when it is done is nan, and must not reach who takes its slot."""
    model = tiny()
    with torch.no_grad():
        model.embedding.weight[5] = math.inf
    how = {"max_new_tokens": 12, "stop_ids": {5}, "seed": 1}
    prompts = [[1], [2], [3], [4], [1, 2], [3, 4], [6], [2, 6], [4, 1], [3, 3]]
    with fixed_slots:
        for compile in (False, True):
            same_rollout(generate(model, prompts, **how, slots=3, compile=compile), generate(model, prompts, **how), atol=1e-6)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_row_that_is_done_does_not_run_out_of_the_context(positions):
    """It fills the context, and its slot goes on for as long as its neighbour's answer takes."""
    model, prompts = tiny(context=8, positions=positions), [[1, 2, 3, 4, 5, 6], [1]]
    with fixed_slots:
        out = generate(model, prompts, max_new_tokens=[2, 7], stop_ids=set(), compile=True)
    assert out.lengths.tolist() == [8, 8]
    same_rollout(out, generate(model, prompts, max_new_tokens=[2, 7], stop_ids=set()), atol=1e-6)


def test_only_the_last_shapes_are_kept_for_compiled_steps():
    model = tiny()
    with fixed_slots:
        for rows in (1, 2, 3, 1, 4, 5, 6):
            generate(model, [[1]] * rows, max_new_tokens=3, stop_ids=STOPS, compile=True)
    assert [shape[0] for shape in decode._compiled[model].steps] == [1, 4, 5, 6]


def test_fixed_slots_follow_the_dtype():
    """One model, first in float32 and then under autocast, as a script that samples in both would have it. There the matrices
    are cast once for a call, not for every token, and anew after an update; embeddings and norms stay as they are."""
    model, how = tiny(dtype=torch.float32, tie_embeddings=True), {"max_new_tokens": 4, "stop_ids": STOPS}
    with fixed_slots:
        generate(model, [[1, 2], [3]], **how, compile=True)
        for change in (0.0, 0.3):
            with torch.no_grad():
                for p in model.parameters():
                    p += change * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            with torch.autocast("cpu", torch.bfloat16):
                compiled = generate(model, [[1, 2], [3]], **how, compile=True)
                same_rollout(compiled, generate(model, [[1, 2], [3]], **how), atol=1e-5)
            for name, p in decode._compiled[model].cast.named_parameters():
                assert (p.dtype == torch.bfloat16) == (p.ndim == 2 and name != "embedding.weight"), name


def test_slots_that_are_too_large_are_not_kept():
    model = tiny()
    with fixed_slots, patch.object(decode, "KEPT_BYTES", 100):
        generate(model, [[1]], max_new_tokens=3, stop_ids=STOPS, compile=True)
    assert not decode._compiled[model].steps


@pytest.mark.slow      # half a minute, nearly all of it the C++ compiler's
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_decoding_gives_the_eager_tokens():
    """The compiled step reads the weights anew."""
    model, prompts = tiny(dtype=torch.float32, layers=1, kv_heads=1), [[1, 2, 3], [4]]
    for change in (0.0, 0.3):
        with torch.no_grad():
            for p in model.parameters():
                p += change * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        for seed in range(3):
            how = {"max_new_tokens": 6, "stop_ids": STOPS, "samples_per_prompt": 4, "seed": seed}
            same_rollout(generate(model, prompts, **how, compile=True), generate(model, prompts, **how), atol=1e-5)


# ---- What a step costs ----


class Operators(TorchDispatchMode):
    """Counts what a GPU would be given to do, views left out, and where the host would wait for it."""

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1])
        self.waits += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select")
        self.count += not func.is_view and name != "_unsafe_view"
        return func(*args, **(kwargs or {}))


def one_kernel(x, shape, weight, eps):
    """RMSNorm as one operator, which it is on a GPU."""
    return torch.layer_norm(x, shape, weight)


def counted(work) -> Operators:
    with patch("torch.nn.functional.rms_norm", one_kernel), Operators() as operators:
        work()
    return operators


def nano(V: int = 256) -> GPT:
    return GPT(GPTConfig(V, **PRESETS["nano"]))


def test_a_token_costs_few_operators_and_no_wait():
    """Of the nano preset, decoded eagerly, rows of different lengths that end at different times, asked about at the end."""
    def cost(tokens: int) -> Operators:
        with patient(tokens):
            return counted(lambda: generate(nano(), [[1, 2, 3], [4, 5]], max_new_tokens=tokens, stop_ids={5}, seed=3,
                                            samples_per_prompt=2))

    few, many = cost(10), cost(11)
    assert 50 < many.count - few.count <= 130 and many.waits == few.waits
    assert counted(lambda: torch.ones(3)[torch.ones(3, dtype=torch.bool)]).waits == 1


def test_a_micro_batch_waits_for_the_device_at_most_once():
    """To see which prompts are alike and which positions are asked for; that copy cannot be seen on a CPU, but no other wait
    is there, forward or backward, with metrics added up."""
    model, tokens = nano(), torch.randint(256, (2, 12)).repeat_interleave(4, dim=0)
    tokens[:, 8:] = torch.randint(256, (8, 4))
    mask, totals = (torch.arange(11) >= 7).expand(8, 11), {"train/kl_max": torch.tensor(0.1)}

    def work():
        logp, entropy = token_log_probs(model, tokens, mask)
        (logp + entropy).sum().backward()
        add_metrics(totals, {"train/kl_max": logp.detach().max(), "train/entropy": entropy.detach().sum()})

    assert counted(work).waits == 0


# ---- The scorer ----


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_log_probs_are_the_eager_ones():
    """Of some tokens, of others, and without gradients: the same values, and the same slope of both in the weights."""
    model, generator = tiny(dtype=torch.float32), torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (5, 9), generator=generator)
    for chosen in (0.3, 0.8):
        mask, found = torch.rand(5, 8, generator=generator) < chosen, []
        for model.compiled in (False, True):
            logp, entropy = token_log_probs(model, tokens, mask, temperature=0.7)
            with torch.no_grad():
                torch.testing.assert_close(token_log_probs(model, tokens, mask, temperature=0.7), (logp, entropy))
            found.append((logp, entropy, *torch.autograd.grad((logp - 2 * entropy).square().sum(), model.parameters())))
        for eager, compiled in zip(*found, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@given(models, temperatures, seeds)
@quick
def test_scores_are_shifted_by_one_and_scaled_by_temperature(model, temperature, seed):
    """Logp[:, t] = log_softmax(logits[:, t] / T)[tokens[:, t+1]], and the entropy is that of the same law.
    A temperature is a scale of the logits."""
    model, tokens = tiny(**model), torch.randint(V, (3, 8), generator=torch.Generator().manual_seed(seed))
    logp, entropy = token_log_probs(model, tokens, temperature=temperature)
    log_law = torch.log_softmax(model(tokens)[:, :-1] / temperature, -1)
    torch.testing.assert_close(logp, log_law.gather(-1, tokens[:, 1:, None]).squeeze(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, -(log_law.exp() * log_law).sum(-1), rtol=0, atol=1e-12)
    with torch.no_grad():
        model.head.weight /= temperature
    torch.testing.assert_close(token_log_probs(model, tokens)[0], logp, rtol=0, atol=1e-12)


@given(st.integers(0, 20), temperatures)
@quick
def test_the_probabilities_of_all_sequences_sum_to_one(seed, temperature):
    """Every continuation of one token by three of V = 3; a mask that begins later sums over the rest only."""
    model = tiny(seed, vocab_size=3)
    tokens = torch.tensor([[1, *rest] for rest in product(range(3), repeat=3)])
    logp, _ = token_log_probs(model, tokens, temperature=temperature)
    torch.testing.assert_close(logp.sum(-1).exp().sum().item(), 1.0, rtol=0, atol=1e-12)
    mask = torch.tensor([False, True, True]).expand(27, 3)
    logp, _ = token_log_probs(model, tokens, mask, temperature=temperature)
    torch.testing.assert_close(logp.sum(-1).exp().sum().item(), 3.0, rtol=0, atol=1e-12)


@given(seeds, st.sampled_from([0.0, 0.3, 0.7, 1.0]))
@quick
def test_a_mask_picks_scores_and_their_gradient(seed, share):
    """Masked positions are exactly 0, the others as without a mask; so is the gradient of any weighted sum of them.
    An empty mask gives zeros and a zero gradient."""
    model, generator = tiny(), torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (3, 8), generator=generator)
    mask = torch.rand(3, 7, generator=generator) < share
    weights = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    masked, whole = torch.stack(token_log_probs(model, tokens, mask)), torch.stack(token_log_probs(model, tokens))
    assert (masked[:, ~mask] == 0).all()
    torch.testing.assert_close(masked[:, mask], whole[:, mask], rtol=0, atol=1e-12)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad((weights * masked).sum(), parameters),
                    torch.autograd.grad((weights * whole * mask).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(st.integers(0, 5), requests(), st.booleans())
@quick
def test_bfloat16_scores_stay_near_float32_and_near_the_engine(seed, request, qk_norm):
    """Pitfall 14. bfloat16 keeps 8 bits and the logits here reach 5. From the logits on everything is float32, so
    engine and scorer differ by a logit or two that was rounded the other way, 2^-6 / 0.7 of a nat each; both are
    within 0.2 nats of a float32 forward (0.08 is the most that was seen)."""
    prompts, how = request
    how["temperature"] = max(how["temperature"], 0.7)
    model = tiny(seed, torch.float32, qk_norm=qk_norm)
    with torch.autocast("cpu", torch.bfloat16):
        out = generate(model, prompts, **how)
        logp, entropy = token_log_probs(model, out.tokens, out.mask, temperature=how["temperature"])
    plain, plain_entropy = token_log_probs(model, out.tokens, out.mask, temperature=how["temperature"])
    assert logp.dtype == entropy.dtype == out.logp.dtype == torch.float32
    assert (logp - out.logp).abs().max() < 0.1
    assert (logp - plain).abs().max() < 0.2 and (entropy - plain_entropy).abs().max() < 0.2


# ---- Mistakes ----


@pytest.mark.parametrize(("prompts", "changes", "mention"), [
    ([], {}, "prompt"),
    ([[1], []], {}, "prompt"),
    ([[1]], {"temperature": -0.5}, "temperature=-0.5"),
    ([[1]], {"top_k": -1}, "top_k=-1"),
    ([[1]], {"top_p": 0.0}, "top_p=0.0"),
    ([[1]], {"top_p": 1.5}, "top_p=1.5"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ([[1]], {"samples_per_prompt": 0}, "samples_per_prompt=0"),
    ([[1], [1] * 20], {"max_new_tokens": 5}, "24"),             # 25 tokens, and the context is 24
    ([[1], [1] * 20], {"max_new_tokens": [9, 5]}, "20 tokens and max_new_tokens=5"),
    ([[1], [2]], {"max_new_tokens": [9]}, "1 limits for 2 prompts"),
    ([[1]], {"temperature": math.nan}, "temperature=nan"),
])
def test_an_impossible_request_is_refused_in_one_sentence(prompts, changes, mention):
    with pytest.raises(ValueError) as error:
        generate(tiny(), prompts, **{"max_new_tokens": 4, "stop_ids": STOPS} | changes)
    assert_one_sentence(error, mention)


def test_a_request_may_fill_the_context_to_the_last_token():
    out = generate(tiny(), [[1], [1] * 20], max_new_tokens=4, stop_ids=set())
    assert out.lengths.tolist() == [5, 24]
    torch.testing.assert_close(token_log_probs(tiny(), out.tokens, out.mask)[0].float(), out.logp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_the_scorer_refuses_a_point_mass(temperature):
    with pytest.raises(ValueError) as error:
        token_log_probs(tiny(), torch.tensor([[1, 2, 3]]), temperature=temperature)
    assert_one_sentence(error, f"temperature={temperature}")


def test_a_lone_token_has_no_score():
    """A sequence of one token predicts nothing, and scoring it is no error."""
    logp, entropy = token_log_probs(tiny(), pad([[1], [2]])[0])
    assert logp.shape == entropy.shape == (2, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_an_error_greedy_or_not(temperature, bad):
    """And no token is drawn from beyond the vocabulary."""
    model = tiny()
    with torch.no_grad():
        model.head.weight[3] = bad
    with pytest.raises(FloatingPointError, match="a logit of the policy"):
        generate(model, [[1, 2]] * 8, max_new_tokens=6, temperature=temperature, stop_ids=STOPS)
