"""The model computes the formulas of its docstrings, looks at no future token and no padding, and its cache changes
nothing."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import nanorl.gpt
import nanorl.prefixes
from nanorl.data import pad
from nanorl.gpt import (
    GPT,
    PRESETS,
    GPTConfig,
    KVCache,
    ScalarGPT,
    apply_rope,
    attention,
    decoding_attention,
    fused_attention,
    llama3_frequencies,
    rope_angles,
)

quick = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32)
every_position = pytest.mark.parametrize("positions", ["rope", "learned", "none"])
exact = {"rtol": 0, "atol": 1e-12}      # float64, numbers of order one, sums of a few dozen terms


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> None:
    """Weights of order 1/sqrt(fan in), gains and embeddings of order 1: nothing is close to uniform or to linear."""
    generator = seeded(seed)
    for name, p in module.named_parameters():
        p.normal_(std=1.0 if p.ndim == 1 or "embedding" in name else p.shape[1] ** -0.5, generator=generator)


SHAPE = {"vocab_size": 13, "context": 32, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2}


def tiny(seed: int = 0, **changes) -> GPT:
    """Two layers of grouped-query attention in float64."""
    model = GPT(GPTConfig(**SHAPE | changes)).double()
    randomise(model, seed)
    return model


def ids(*shape: int, seed: int, vocab_size: int = 13) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=seeded(seed))


def normal(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def assert_one_sentence(error: pytest.ExceptionInfo, *mentions: object) -> None:
    """A person reads it in one line, and it names the value that is wrong."""
    text = str(error.value)
    assert "\n" not in text and 20 < len(text) < 300, text
    for mention in mentions:
        assert str(mention) in text, text


# ---- Attention ----


@st.composite
def attention_inputs(draw):
    """q, k, v and a mask with at least one key for every query, or None (causal); kv heads divide heads."""
    kv_heads, group, batch, S, D = (draw(st.integers(1, n)) for n in (2, 3, 2, 7, 5))
    causal, generator = draw(st.booleans()), seeded(draw(seeds))
    T = S if causal else draw(st.integers(1, 7))
    scale = draw(st.sampled_from([0.1, 1.0, 30.0]))             # 30: softmax saturates, some weights underflow
    q = scale * normal(batch, kv_heads * group, T, D, generator=generator)
    k, v = (normal(batch, kv_heads, S, D, generator=generator) for _ in range(2))
    mask = None
    if not causal:
        rows = draw(st.sampled_from([1, batch]))
        mask = torch.rand(rows, 1, T, S, generator=generator) < 0.5
        mask.scatter_(-1, torch.randint(S, (rows, 1, T, 1), generator=generator), True)
    return q, k, v, mask


def visible_keys(q, k, mask):
    """[B or 1, 1, T, S] True where a query may look: the mask itself, or 0..t."""
    return mask if mask is not None else (torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None])[None, None]


@given(attention_inputs())
@quick
def test_attention_is_a_convex_combination_of_the_visible_values(inputs):
    """Identity matrices as values show the weights: never negative, sum 1, zero where the mask is; and out = W v."""
    q, k, v, mask = inputs
    identity = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:2], -1, -1)
    weights = attention(q, k, identity, mask)                                               # [B, H, T, S]
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **exact)
    assert (weights.masked_fill(visible_keys(q, k, mask), 0.0) == 0).all()
    repeated = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    torch.testing.assert_close(attention(q, k, v, mask), weights @ repeated, **exact)


@given(attention_inputs())
@quick
def test_attention_weights_are_the_softmax_of_scaled_dot_products(inputs):
    """One query at a time, in plain Python: w_s is proportional to exp(<q, k_s> / sqrt(D)), over the visible keys s."""
    q, k, v, mask = inputs
    visible, group = visible_keys(q, k, mask).expand(len(q), -1, -1, -1), q.shape[1] // k.shape[1]
    out = attention(q, k, v, mask)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = k[b, h // group], v[b, h // group]
            for t in range(q.shape[2]):
                seen = visible[b, 0, t].nonzero().squeeze(-1).tolist()
                scores = [float(q[b, h, t] @ keys[s]) / math.sqrt(q.shape[-1]) for s in seen]
                w = [math.exp(score - max(scores)) for score in scores]
                expected = sum(x / sum(w) * values[s] for x, s in zip(w, seen, strict=True))
                torch.testing.assert_close(out[b, h, t], expected, **exact)


@given(attention_inputs())
@quick
def test_fused_attention_is_attention(inputs):
    torch.testing.assert_close(fused_attention(*inputs), attention(*inputs), **exact)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_where_bfloat16_learns_on_a_cpu_attention_is_float32s_rounded_once(masked, autocast):
    """Values and gradients, with shared key heads, autocast or not: to the bit those of float32, rounded."""
    leaves = [torch.randn(2, H, 9, 8, generator=seeded(H), dtype=torch.bfloat16).requires_grad_() for H in (4, 2, 2)]
    wide = [x.detach().float().requires_grad_() for x in leaves]
    hidden = torch.rand(2, 1, 9, 9, generator=seeded(1)) < 0.3
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf) if masked else None
    expected = fused_attention(*wide, mask)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = fused_attention(*leaves, mask if mask is None else mask.bfloat16())
    assert torch.equal(found, expected.bfloat16())
    g = torch.randn(expected.shape, generator=seeded(2)).bfloat16()
    for ours, theirs in zip(torch.autograd.grad(found, leaves, g), torch.autograd.grad(expected, wide, g.float()), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


@given(attention_inputs())
@quick
def test_decoding_attention_is_attention_of_one_query(inputs):
    """With 0 or -inf added to the scores in place of the mask."""
    q, k, v, mask = inputs
    visible, q = visible_keys(q, k, mask)[:, :, -1:], q[:, :, -1:]
    added = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(decoding_attention(q, k, v, added), attention(q, k, v, visible), **exact)


@given(attention_inputs())
@quick
def test_grouped_query_heads_are_repeated_heads(inputs):
    """H / Hkv neighbouring query heads share one key head: the same as writing that key head down H / Hkv times."""
    q, k, v, mask = inputs
    k2, v2 = (x[:, [h * x.shape[1] // q.shape[1] for h in range(q.shape[1])]] for x in (k, v))
    for function in (attention, fused_attention):
        torch.testing.assert_close(function(q, k, v, mask), function(q, k2, v2, mask), **exact)


@given(attention_inputs(), seeds)
@quick
def test_attention_without_positions_and_mask_is_permutation_equivariant(inputs, seed):
    """Shuffled queries give shuffled outputs; shuffled keys, each with its value, change nothing."""
    q, k, v, _ = inputs
    nothing_hidden = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
    out = attention(q, k, v, nothing_hidden)
    queries, keys = (torch.randperm(n, generator=seeded(seed)) for n in (q.shape[2], k.shape[2]))
    torch.testing.assert_close(attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], nothing_hidden),
                               out[:, :, queries], **exact)


@pytest.mark.parametrize("head_dim", [4, 16, 64, 256])
def test_scores_of_unit_variance_inputs_have_unit_variance(head_dim):
    """Var(q.k) = D for independent coordinates of variance one; dividing by sqrt(D) takes it back to 1 at any width.

    Scores are read off the weights, log w_s = score_s - lse. 200 queries x 500 keys: the estimate is good to 10 %.
    """
    generator = seeded(head_dim)
    q, k = (normal(1, 1, n, head_dim, generator=generator) for n in (200, 500))
    weights = attention(q, k, torch.eye(500, dtype=torch.float64)[None, None], torch.ones(200, 500, dtype=torch.bool))
    assert abs(float(weights.log().var(-1).mean()) - 1) < 0.1
    assert abs(float((q[0, 0] @ k[0, 0].T).var()) / head_dim - 1) < 0.1


# ---- Rotary positions: angles are float32, so equalities hold to float32's last digits ----

rope_cases = (st.sampled_from([2, 4, 8, 16]), st.integers(0, 60), st.integers(0, 60), seeds)


def rotate(x, m, base=10_000.0, scaling=None):
    """R_m x, for x [..., D]."""
    return apply_rope(x, *rope_angles(torch.tensor(m), x.shape[-1], base, scaling))


@given(*rope_cases)
@quick
def test_rope_multiplies_by_a_complex_unit(D, m, _, seed):
    """With z_i = x_i + i x_{i+D/2}: z_i -> z_i e^{i m theta_i}, theta_i = 10000^(-2i/D)."""
    x = normal(1, 2, 1, D, generator=seeded(seed))
    angles = torch.tensor([m * 10_000 ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotate(x, m), torch.cat((z.real, z.imag), -1), rtol=0, atol=3e-5)


@given(*rope_cases)
@quick
def test_rope_keeps_norms_and_turns_nothing_at_position_zero(D, m, _, seed):
    x = normal(1, 2, 1, D, generator=seeded(seed))
    torch.testing.assert_close(rotate(x, m).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(rotate(x, 0), x)


@given(*rope_cases)
@quick
def test_rope_scores_depend_on_the_distance_only(D, m, n, seed):
    """<R_m q, R_n k> = <R_{m+s} q, R_{n+s} k>."""
    q, k = (normal(1, 2, 1, D, generator=seeded(seed + i)) for i in range(2))
    scores = [(rotate(q, m + s) * rotate(k, n + s)).sum(-1) for s in (0, 17)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=2e-4)


@given(*rope_cases)
@quick
def test_rope_turns_add_up(D, m, n, seed):
    """R_m R_n = R_{m+n}."""
    x = normal(1, 2, 1, D, generator=seeded(seed))
    torch.testing.assert_close(rotate(rotate(x, m), n), rotate(x, m + n), rtol=0, atol=5e-5)


def test_rope_keeps_the_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert rotate(torch.ones(1, 1, 1, 4, dtype=dtype), 3).dtype == dtype


@given(st.floats(1e-6, 1.0), st.floats(1.5, 40.0), st.floats(0.5, 2.0), st.floats(2.5, 8.0), st.integers(16, 8192))
@quick
def test_llama3_slows_down_long_waves_and_blends_in_between(theta, factor, low, high, trained):
    """By how often a wave turns within the context that was trained on first."""
    turns = trained * theta / (2 * math.pi)
    if turns >= high:
        expected = theta
    elif turns <= low:
        expected = theta / factor
    else:
        expected = theta / factor + (theta - theta / factor) * (turns - low) / (high - low)
    found = llama3_frequencies(torch.tensor(theta, dtype=torch.float64), factor, low, high, trained)
    torch.testing.assert_close(float(found), expected, rtol=1e-12, atol=0)


# ---- The model is its formula ----


def plain_hidden(model: GPT, tokens: list[int]) -> torch.Tensor:
    """The forward pass of one sequence again, from the weights alone: one head and one position at a time."""
    config, D = model.config, model.config.head_dim

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * gain

    def project(linear, h, x):
        rows = slice(h * D, (h + 1) * D)
        return x @ linear.weight[rows].T + (linear.bias[rows] if config.qkv_bias else 0.0)

    x = model.embedding.weight[tokens]
    if config.positions == "learned":
        x = x + model.position_embedding.weight[: len(tokens)]
    for block in model.blocks:
        a, y = block.attention, norm(x, block.attention_norm.weight)
        heads = []
        for h in range(config.heads):
            g = h * config.kv_heads // config.heads
            q, k, v = project(a.q, h, y), project(a.k, g, y), project(a.v, g, y)
            if config.qk_norm:
                q, k = norm(q, a.q_norm.weight), norm(k, a.k_norm.weight)
            if config.positions == "rope":
                how = config.rope_base, config.rope_scaling
                q, k = (torch.stack([rotate(row, t, *how) for t, row in enumerate(z)]) for z in (q, k))
            heads.append(torch.stack([torch.softmax(q[t] @ k[: t + 1].T / D**0.5, -1) @ v[: t + 1]
                                      for t in range(len(tokens))]))
        x = x + torch.cat(heads, -1) @ a.out.weight.T
        y, m = norm(x, block.mlp_norm.weight), block.mlp
        gate = y @ m.gate.weight.T
        x = x + (gate / (1 + (-gate).exp()) * (y @ m.up.weight.T)) @ m.down.weight.T
    return norm(x, model.norm.weight)


FAMILIES = {"llama": {"norm_eps": 1e-2, "rope_scaling": (8.0, 1.0, 4.0, 16)}, "qwen2": {"qkv_bias": True, "rope_base": 100.0},
            "qwen3": {"qk_norm": True, "head_dim": 6}, "qwen3, heads wider than the model": {"qk_norm": True, "head_dim": 10}}


@every_position
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("changes", [{}, *FAMILIES.values()], ids=["plain", *FAMILIES])
def test_the_forward_pass_is_its_formula(positions, kv_heads, changes):
    """Against `plain_hidden`, which shares no layer, no kernel and no batching with the model."""
    model = tiny(positions=positions, kv_heads=kv_heads, **changes)
    tokens = ids(2, 9, seed=1)
    hidden = model.hidden(tokens)
    for row, expected in zip(hidden, tokens.tolist(), strict=True):
        torch.testing.assert_close(row, plain_hidden(model, expected), **exact)
    torch.testing.assert_close(model(tokens), hidden @ model.head.weight.T, **exact)


def test_the_model_uses_the_attention_that_is_written_out(monkeypatch):
    """The written-out and the fused kernel give one model, values and gradients."""
    model, tokens, results = tiny(), ids(2, 9, seed=1), []
    for function in (attention, fused_attention):
        monkeypatch.setattr(nanorl.gpt, "fused_attention", function)
        loss = model(tokens).logsumexp(-1).sum()
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@every_position
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_later_token_changes_nothing_before_it(positions, dtype):
    """Another token at t leaves hidden[:, :t] bit for bit, and does change hidden[:, t]."""
    model, tokens = tiny(positions=positions).to(dtype), ids(2, 11, seed=2)
    before = model.hidden(tokens)
    for t in range(11):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 13
        after = model.hidden(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t] - before[:, t]).abs().amax(-1).min() > 1e-3


def test_one_causal_layer_without_positions_reads_a_set():
    """A query attends to a set of earlier tokens, so their order does not matter to it, and with positions it does.

    One layer only: in the second, a token has already been marked by how much it saw, and the causal mask has given
    the order away.
    """
    tokens, shuffled = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[4, 1, 5, 3, 2, 6]])

    @torch.no_grad()
    def difference(**changes):
        model = tiny(**changes)
        return float((model.hidden(tokens)[:, -1] - model.hidden(shuffled)[:, -1]).abs().max())

    assert difference(positions="none", layers=1) < 1e-12
    assert difference(positions="none", layers=2) > 1e-3
    assert difference(positions="rope", layers=1) > 1e-3
    assert difference(positions="learned", layers=1) > 1e-3


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys():
    """RMSNorm(c x) = RMSNorm(x): multiplying the query and key projections by 50 changes nothing, up to norm's eps."""
    tokens = ids(2, 9, seed=3)
    for qk_norm in (True, False):
        model = tiny(qk_norm=qk_norm)
        with torch.no_grad():
            before = model.hidden(tokens)
            for block in model.blocks:
                block.attention.q.weight *= 50
                block.attention.k.weight *= 50
            difference = float((model.hidden(tokens) - before).abs().max())
        assert difference < 1e-3 if qk_norm else difference > 0.1


def test_tied_embeddings_are_one_matrix_with_both_gradients():
    """The head is the embedding: one parameter, whose gradient is the sum of what the two would have had apart."""
    tied, apart = tiny(tie_embeddings=True), tiny()
    assert tied.head.weight is tied.embedding.weight
    assert tied.num_parameters() == apart.num_parameters() - 13 * 16
    apart.load_state_dict(tied.state_dict())
    tokens = ids(2, 9, seed=4)
    for model in (tied, apart):
        model(tokens).logsumexp(-1).sum().backward()
    both = apart.embedding.weight.grad + apart.head.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both, **exact)


def test_only_tokens_that_occur_move_their_embedding():
    model, tokens = tiny(), torch.tensor([[1, 5, 5, 2], [7, 1, 0, 2]])
    model(tokens).logsumexp(-1).sum().backward()
    moved = model.embedding.weight.grad.abs().amax(-1) > 0
    assert moved.nonzero().squeeze(-1).tolist() == sorted(set(tokens.flatten().tolist()))


# ---- Fresh models ----


@pytest.mark.parametrize("preset", ["nano", "micro"])
def test_a_fresh_model_knows_nothing(preset):
    """Its loss is log V, up to the little that logits of std 0.02 sqrt(width) cost: half their variance."""
    vocab_size = 512
    model, tokens = GPT(GPTConfig(vocab_size, **PRESETS[preset]), seeded(0)), ids(2, 64, seed=5, vocab_size=vocab_size)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert abs(loss - math.log(vocab_size)) < 0.02**2 * model.config.width / 2 + 0.1


def test_the_residual_stream_of_a_fresh_model_does_not_grow_with_depth():
    """Each of 2 layers sublayers adds 1/(2 layers) of a variance: before the last norm, the size is that at any depth.
    (Without that factor, 32 layers would make it five times as large.)"""
    sizes = []
    for layers in (1, 4, 32):
        model = GPT(GPTConfig(64, layers=layers, width=64), seeded(0))
        model.norm.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].square().mean().sqrt().item()))
        model(ids(4, 32, seed=5, vocab_size=64))
    assert max(sizes) / min(sizes) < 1.1


def test_a_generator_decides_every_weight():
    """Whatever the global state of torch: two models of one seed are equal, two seeds differ in every matrix."""
    models = []
    for state, seed in ((0, 7), (1, 7), (1, 8)):
        torch.manual_seed(state)
        models.append(dict(GPT(tiny().config, seeded(seed)).named_parameters()))
    for name, p in models[0].items():
        assert torch.equal(p, models[1][name])
        assert p.ndim == 1 or not torch.equal(p, models[2][name])


@pytest.mark.parametrize(("preset", "vocab_size", "millions", "tolerance"),
                         [("micro", 512, 5, 0.05), ("mini", 512, 26, 0.05), ("gpt2", 50257 + 5, 124, 0.02)])
def test_presets_are_as_large_as_they_say(preset, vocab_size, millions, tolerance):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size, **PRESETS[preset]))
    assert abs(model.num_parameters() / (millions * 1e6) - 1) < tolerance


def test_nano_has_less_than_a_million_parameters():
    with torch.device("meta"):
        assert GPT(GPTConfig(512, **PRESETS["nano"])).num_parameters() < 1_000_000


@every_position
@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1}, {"tie_embeddings": True}, *FAMILIES.values()])
def test_flops_per_token_count_the_matrix_products(positions, changes):
    """Against PyTorch's counter over one forward and backward, exactly: it sees all T^2 scores, we half of them.

    The counter knows the products with weights and those of attention, nothing else; lookups are no products.
    """
    T, B = 24, 2
    model = tiny(positions=positions, **changes).float()
    other_half = 6 * model.config.layers * model.config.heads * model.config.head_dim * T
    with pytest.MonkeyPatch.context() as patch:                 # the counter does not know the fused kernel on a CPU
        patch.setattr(nanorl.gpt, "fused_attention", attention)
        with FlopCounterMode(display=False) as counter:
            model(ids(B, T, seed=6)).sum().backward()
    assert counter.get_total_flops() == B * T * (model.training_flops_per_token(T) + other_half)


# ---- The cache ----


@st.composite
def cached_runs(draw):
    """Prompts of ragged lengths, then steps of one token; between them rows are begun anew or dropped."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    steps = draw(st.lists(st.sampled_from(["", "keep", "put", "junk"]), max_size=8))
    return lengths, steps, draw(seeds)


def fill_with_junk(cache: KVCache) -> None:
    """Large finite numbers wherever a row has no token, the padding of its prompt included."""
    for x in (*cache.keys, *cache.values):
        x.copy_(torch.where(cache.mask[:, 0, 0, :, None].isinf()[:, None], 1e3 * torch.randn(x.shape, dtype=x.dtype), x))


def read(model: GPT, prompts: list[list[int]]) -> tuple[KVCache, torch.Tensor]:
    """A cache that has read these prompts, and what the model made of them."""
    tokens, lengths = pad(prompts, pad_id=12)
    cache = KVCache(model.config, *tokens.shape, dtype=torch.float64)
    hidden = model.hidden(tokens, cache)
    cache.length = lengths
    return cache, hidden


@every_position
@given(run=cached_runs())
@quick
def test_one_token_at_a_time_through_the_cache_is_the_plain_forward(positions, run):
    """Hidden states do not tell whether a sequence came whole or token by token, alone or beside longer rows, with rows
    dropped or begun anew on the way, in memory that is clean or full of junk, in which columns are used again and again."""
    lengths, steps, seed = run
    model, generator = tiny(seed % 5, positions=positions), seeded(seed)
    sequences = [ids(n + len(steps), seed=seed + 1 + i).tolist() for i, n in enumerate(lengths)]
    plain = [model.hidden(torch.tensor([s]))[0] for s in sequences]
    with torch.no_grad():
        prompts, hidden = read(model, [s[:n] for s, n in zip(sequences, lengths, strict=True)])
        for row, n in enumerate(lengths):
            torch.testing.assert_close(hidden[row, :n], plain[row][:n], **exact)

        width = max(lengths)
        cache = KVCache(model.config, len(lengths), width + len(steps), dtype=torch.float64)
        fill_with_junk(cache)
        cache.put(torch.arange(len(lengths)), prompts)
        alive = list(range(len(lengths)))                       # which sequence each row of the cache holds
        for turn, event in enumerate(steps):
            if event == "put":                                  # two rows begin with a prompt that was read elsewhere
                new = int(torch.randint(len(lengths), (1,), generator=generator))
                rows = torch.tensor([0, len(alive) - 1]).unique()
                cache.put(rows, read(model, [sequences[new][: lengths[new]]])[0])
                for row in rows.tolist():
                    alive[row] = new
            if event == "keep":
                kept = torch.rand(len(alive), generator=generator) < 0.6
                kept[int(torch.randint(len(alive), (1,), generator=generator))] = True
                cache.keep(kept.nonzero().squeeze(-1))
                alive = [row for row, stays in zip(alive, kept.tolist(), strict=True) if stays]
            if event == "junk":
                fill_with_junk(cache)
            starts = cache.length.tolist()
            tokens = torch.tensor([[sequences[row][at]] for row, at in zip(alive, starts, strict=True)])
            cache.column = slice(width + turn, width + turn + 1)
            cache.visible = width + turn + 1
            hidden = model.hidden(tokens, cache)
            for row, at, h in zip(alive, starts, hidden, strict=True):
                torch.testing.assert_close(h[0], plain[row][at], **exact)
            cache.length += 1


def test_a_compiled_decoding_step_attends_by_weighted_sums():
    """A compiled step of one token, and nothing else; its hidden states are those of the plain forward."""
    model, tokens, kernels = tiny(), ids(3, 6, seed=1), []

    def backend(graph, inputs):
        kernels.append("scaled_dot_product" in graph.code)
        return graph.forward

    compiled = torch.compile(model.hidden, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        plain, cache = model.hidden(tokens), KVCache(model.config, 3, 6, dtype=torch.float64)
        torch.testing.assert_close(compiled(tokens[:, :4], cache), plain[:, :4], **exact)
        assert kernels.pop()
        cache.mask[..., :4] = 0.0
        cache.length += 4
        cache.column = torch.tensor([4])
        cache.visible = 5
        torch.testing.assert_close(compiled(tokens[:, 4:5], cache), plain[:, 4:5], **exact)
        assert not kernels.pop()
        torch.testing.assert_close(compiled(tokens[:, :1]), plain[:, :1], **exact)          # a sequence of one token
        assert kernels == [True]


# ---- Prefixes that are read once ----


@st.composite
def batches(draw):
    """Rows that begin with one of a few prompts, in any order, and any positions of interest after it; none in some rows."""
    prompts = draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4))
    rows = draw(st.lists(st.tuples(st.sampled_from(prompts), st.lists(st.integers(0, 12), min_size=1, max_size=6)),
                         min_size=1, max_size=8))
    tokens, lengths = pad([prompt + answer for prompt, answer in rows])
    starts = torch.tensor([len(prompt) for prompt, _ in rows])[:, None]
    at, chosen = torch.arange(tokens.shape[1]), torch.rand(tokens.shape, generator=seeded(draw(seeds))) < 0.7
    return tokens, chosen & (at >= starts - draw(st.integers(0, 1))) & (at < lengths[:, None])


@every_position
@given(shape=st.sampled_from([{}, {"kv_heads": 1, "qk_norm": True}]), batch=batches(), seed=st.integers(0, 5),
       recompute=st.booleans())
@quick
def test_a_prefix_that_is_read_once_changes_neither_values_nor_gradients(positions, shape, batch, seed, recompute):
    """hidden_at is hidden(tokens)[where], whichever rows share which prefix, and the gradients are the same."""
    (tokens, where), model = batch, tiny(seed, positions=positions, **shape)
    model.recompute = recompute
    weights = torch.randn(int(where.sum()), model.config.width, generator=seeded(seed), dtype=torch.float64)
    found, gradients = [], []
    for share_below in (0.0, 9.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nanorl.prefixes, "SHARE_BELOW", share_below)
            hidden, places = model.hidden_at(tokens, where)
        assert torch.equal(places, where.flatten().nonzero().squeeze(-1))
        found.append(hidden)
        gradients.append(torch.autograd.grad((weights * hidden).sum(), list(model.blocks.parameters())))
    torch.testing.assert_close(found[0], model.hidden(tokens)[where], **exact)
    torch.testing.assert_close(found[1], found[0], **exact)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_samples_of_one_prompt_read_it_once():
    """Two prompts of seven tokens with three answers of two each: 2 x 6 tokens and 6 x 2, where whole rows would be 6 x 8."""
    model, prompts = tiny(), ids(2, 7, seed=1)
    tokens = torch.cat((prompts.repeat_interleave(3, dim=0), ids(6, 2, seed=2)), dim=1)
    where = (torch.arange(9) >= 6).expand(6, 9) & (torch.arange(9) < 8)
    with mock.patch.object(model, "_blocks", wraps=model._blocks) as blocks:
        model.hidden_at(tokens, where)
    assert blocks.call_args.args[0].shape == (1, 24)


@every_position
def test_padding_on_the_right_changes_no_real_position(positions):
    """Rows alone, or beside longer ones, with any padding id."""
    model = tiny(positions=positions)
    sequences = [ids(n, seed=n).tolist() for n in (1, 4, 9, 6)]
    for pad_id in (0, 5, 12):
        tokens, lengths = pad(sequences, pad_id)
        hidden = model.hidden(tokens)
        for row, sequence, n in zip(hidden, sequences, lengths.tolist(), strict=True):
            torch.testing.assert_close(row[:n], model.hidden(torch.tensor([sequence]))[0], **exact)


# ---- The scalar head ----


def test_scalar_scores_do_not_depend_on_padding():
    """A reward, read at the row's last token, is the same alone and beside longer rows (pitfall 18)."""
    model = ScalarGPT(tiny()).double()
    randomise(model, 9)
    sequences = [ids(n, seed=n).tolist() for n in (1, 4, 9, 6)]
    alone = torch.stack([model(torch.tensor([s]))[0, -1] for s in sequences])
    assert alone.std() > 0.1
    for pad_id in (0, 12):
        tokens, lengths = pad(sequences, pad_id)
        torch.testing.assert_close(model(tokens)[torch.arange(4), lengths - 1], alone, **exact)
        assert torch.equal(model.at_end(tokens, lengths), model(tokens)[torch.arange(4), lengths - 1])


def test_activations_that_are_computed_again_give_the_same_gradient_and_are_not_kept():
    """To the bit, and each block runs a second time; without a gradient there is nothing to compute again."""
    model, tokens, runs, kept = tiny(), ids(2, 9, seed=3), [], []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients = []
    for model.recompute in (False, True):
        runs.clear()
        model.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = model(tokens).square().sum()
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert len(runs) == (4 if model.recompute else 2)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2
    runs.clear()
    with torch.no_grad():
        model(tokens)
    assert len(runs) == 2


def test_a_fresh_scalar_head_says_nothing_and_can_learn():
    model, tokens = ScalarGPT(tiny()).double(), ids(2, 9, seed=7)
    scores = model(tokens)
    assert scores.shape == (2, 9) and (scores == 0).all()
    scores.sum().backward()
    assert model.scalar.weight.grad.abs().min() > 0 and model.scalar.bias.grad.item() == 18


# ---- Mistakes ----


@pytest.mark.parametrize(("changes", "mention"), [
    ({"width": 18}, "width=18"),
    ({"heads": 3}, "heads=3"),
    ({"kv_heads": 3}, "kv_heads=3"),
    ({"kv_heads": 8}, "kv_heads=8"),
    ({"width": 12, "heads": 4}, "3"),                           # a head of width 3 has no pairs to turn
    ({"head_dim": 5}, "head_dim=5"), ({"head_dim": 0}, "head_dim=0"),
    ({"positions": "alibi"}, "alibi"),
    ({"heads": 0}, "heads=0"),
    ({"layers": -1}, "layers=-1"),
    ({"vocab_size": 0}, "vocab_size=0"),
])
def test_an_impossible_shape_is_refused_in_one_sentence(changes, mention):
    with pytest.raises(ValueError) as error:
        GPTConfig(**SHAPE | changes)
    assert_one_sentence(error, mention)


def test_odd_heads_are_fine_without_rotary_positions():
    assert tiny(width=12, heads=4, positions="learned")(ids(1, 5, seed=8)).shape == (1, 5, 13)


@every_position
def test_a_sequence_beyond_the_context_is_refused_in_one_sentence(positions):
    """Exactly `context` tokens fit."""
    model = tiny(positions=positions, context=8)
    assert model(ids(1, 8, seed=9)).shape == (1, 8, 13)
    with pytest.raises(ValueError) as error:
        model(ids(1, 9, seed=9))
    assert_one_sentence(error, 9, 8)


def test_a_reward_is_float32_under_autocast():
    """In bfloat16, whose steps near 1 are 1/128, many of these would be equal."""
    model, tokens = ScalarGPT(tiny().float()), ids(64, 9, seed=7)
    with torch.no_grad():
        model.scalar.weight.normal_(generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            hidden, rewards = model.trunk.hidden(tokens), model.at_end(tokens, torch.full((64,), 9))
        assert rewards.dtype == torch.float32 and torch.equal(rewards, model.scalar(hidden)[:, -1, 0])
    assert len(rewards.unique()) > len(rewards.bfloat16().unique())
