"""docs/playground.html: what it shows is what nanorl computes, and everybody can read it and move it.

In a real browser (browser.py).
"""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from browser import Browser, needs_browser
from torch import Tensor

from nanorl.ops import clipped_away, clipped_surrogate, entropy_from_logits, kl_k1, kl_k2, kl_k3, log_softmax
from nanorl.decode import sampling_logits, top_k_filter, top_p_filter

PAGE = (Path(__file__).parent.parent / "docs" / "playground.html").as_uri()

pytestmark = [pytest.mark.slow, needs_browser]      # ten seconds

TOKENS = range(6)
OKABE_ITO = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"}


@pytest.fixture
def page(browser):
    """The page, freshly opened. Whatever a test does to it: it asks nobody for anything, and the console stays empty."""
    browser.open(PAGE)
    yield browser
    assert set(browser.requests) <= {PAGE, "data:,"} and browser.complaints == []


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def agree(shown: dict[str, str], expected: dict[str, float | Tensor]):
    """Every number is written with its sign, to within half of its last digit."""
    for id, value in expected.items():
        digits = len(shown[id].partition(".")[2])
        assert number(shown[id]) == pytest.approx(float(value), rel=0, abs=0.5 * 10**-digits + 1e-9), id
        assert not re.fullmatch(r"−[0.]+|.*-.*", shown[id]), f"{id}: {shown[id]!r}"


def f64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def derivative(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The numbers that are shown
# ---------------------------------------------------------------------------------------------------------------------


def check_softmax(page: Browser):
    shown, set_to = page.texts(), page.settings()
    logits = f64([[set_to[f"logit-{i}"] for i in TOKENS]])
    temperature, top_k, top_p = set_to["temperature"], int(set_to["top-k"]), set_to["top-p"]
    scaled, after_k = sampling_logits(logits, temperature), sampling_logits(logits, temperature, top_k)
    after_p = sampling_logits(logits, temperature, top_k, top_p)
    p, sampled = log_softmax(scaled).exp()[0], log_softmax(after_p).exp()[0]
    columns = {"z": logits[0], "p": p, "logp": log_softmax(scaled)[0], "sampled": sampled}
    agree(shown, {f"{name}-{i}": column[i] for name, column in columns.items() for i in TOKENS})
    assert all(len(shown[f"{name}-{i}"].partition(".")[2]) >= 4 for name in ("p", "logp", "sampled") for i in TOKENS)
    for prefix, distribution in (("", scaled), ("sampled-", after_p)):
        H = entropy_from_logits(distribution)
        agree(shown, {f"{prefix}entropy-nats": H, f"{prefix}entropy-bits": H / math.log(2), f"{prefix}choices": H.exp()})
    for i in TOKENS:
        in_k, in_p = after_k[0, i] > -torch.inf, after_p[0, i] > -torch.inf
        assert shown[f"kept-k-{i}"] == ("kept" if in_k else "cut"), i
        assert shown[f"kept-p-{i}"] == ("kept" if in_p else "cut" if in_k else "–"), i
    agree(shown, {f"logit-{i}-value": logits[0, i] for i in TOKENS} | {"temperature-value": temperature})
    for id, value, off in (("top-k", top_k, 0), ("top-p", top_p, 1)):
        assert shown[f"{id}-value"] == "off" if value == off else number(shown[f"{id}-value"]) == value
    said = re.fullmatch(r"(\S+) of 6 tokens can be .* probability (\S+); .* among (\S+) equally .*",
                        shown["softmax-says"]).groups()
    choices = entropy_from_logits(after_p).exp()
    agree(dict(enumerate(said)), dict(enumerate(((after_p > -torch.inf).sum(), sampled.max(), choices))))
    bars = page.run("""() => ['bar', 'sampled-bar'].map(name => [0, 1, 2, 3, 4, 5].map(i => {
        const bar = document.getElementById(`${name}-${i}`), track = bar.parentElement;
        return bar.getBoundingClientRect().width / track.clientWidth; }))""")
    torch.testing.assert_close(f64(bars), torch.stack((p, sampled)), rtol=0, atol=2e-3)


def check_surrogate(page: Browser):
    shown, set_to = page.texts(), page.settings()
    rho, adv, low, high = f64([[set_to["ratio"]]]), f64([[set_to["adv"]]]), set_to["clip-low"], set_to["clip-high"]
    gradient = derivative(lambda logp: clipped_surrogate(logp, torch.zeros_like(logp), adv, low, high), rho.log())
    agree(shown, {"ratio-value": rho, "clip-low-value": low, "clip-high-value": high, "log-ratio": rho.log(),
                  "unclipped": rho * adv, "surrogate": clipped_surrogate(rho.log(), torch.zeros_like(rho), adv, low, high),
                  "surrogate-gradient": gradient})
    says = shown["surrogate-says"]
    assert f"from {1 - low:.2f} to {1 + high:.2f}" in says
    assert ("has no gradient" in says) == (gradient == 0) and ("has a gradient" in says) == (gradient != 0), says
    assert gradient == 0 or ("raises" if gradient > 0 else "lowers") in says, says
    assert ("has left" in says) == (not 1 - low <= rho <= 1 + high), says


def check_kl(page: Browser):
    shown, r = page.texts(), f64([page.settings()["r"]])
    agree(shown, {"r-value": r})
    for name, f in (("k1", kl_k1), ("k2", kl_k2), ("k3", kl_k3)):
        logp = f64([-3.0])
        agree(shown, {name: f(logp, logp + r), f"{name}-gradient": derivative(lambda x, f=f, o=logp + r: f(x, o), logp)})
    said = re.fullmatch(r".* gives the token (\S+) times .* k1\s=\s(\S+), k2\s=\s(\S+), k3\s=\s(\S+)\.",
                        shown["kl-says"]).groups()
    agree(dict(enumerate(said)), dict(enumerate((r.exp(), *(f(torch.zeros_like(r), r) for f in (kl_k1, kl_k2, kl_k3))))))


def test_probabilities_follow_the_keys(page):
    check_softmax(page)
    for id, key, times, value in (
            ("logit-0", "ArrowRight", 7, 2.7), ("logit-5", "ArrowLeft", 4, -2.4), ("temperature", "ArrowRight", 7, 1.35),
            ("top-k", "ArrowRight", 2, 2),              # two tokens tie for the second place: three stay
            ("top-p", "ArrowLeft", 30, 0.7), ("top-k", "End", 1, 6), ("top-p", "ArrowLeft", 30, 0.4),
            ("top-p", "Home", 1, 0.01), ("top-p", "End", 1, 1), ("temperature", "Home", 1, 0.2), ("logit-3", "End", 1, 5),
            ("logit-4", "Home", 1, -5), ("temperature", "End", 1, 3), ("top-p", "PageDown", 1, 0.9), ("top-k", "Home", 1, 0)):
        page.keys(id, key, times)
        assert page.settings()[id] == pytest.approx(value, abs=0.011 if key.startswith("Page") else 1e-12), id
        check_softmax(page)
        if (id, value) == ("top-k", 2):
            assert [page.texts()[f"kept-k-{i}"] for i in TOKENS] == ["kept"] * 3 + ["cut"] * 3


def test_the_surrogate_follows_the_keys(page):
    check_surrogate(page)
    for id, key, times in (
            ("ratio", "ArrowRight", 13), ("adv-plus", "ArrowRight", 1), ("ratio", "ArrowLeft", 46),
            ("clip-low", "ArrowRight", 17), ("clip-low", "Home", 1), ("adv-minus", "ArrowLeft", 1),
            ("clip-high", "ArrowRight", 8), ("ratio", "End", 1), ("clip-high", "PageUp", 3), ("clip-high", "End", 1),
            ("adv-plus", "ArrowRight", 1), ("ratio", "Home", 1)):
        page.keys(id, key, times)
        check_surrogate(page)


def test_the_three_estimates_follow_the_keys(page):
    check_kl(page)
    for key, times in (("ArrowRight", 3), ("ArrowLeft", 13), ("ArrowLeft", 9), ("Home", 1), ("PageUp", 3), ("End", 1)):
        page.keys("r", key, times)
        check_kl(page)
    page.keys("r", "Home")
    page.press("ArrowRight", 40)
    assert [page.texts()[k] for k in ("r-value", "k1", "k2", "k3")] == ["0.00", "0.0000", "0.0000", "0.0000"]
    check_kl(page)


@pytest.mark.parametrize(("id", "check"), [("logit-1", check_softmax), ("temperature", check_softmax), ("top-k", check_softmax),
                                           ("top-p", check_softmax), ("ratio", check_surrogate), ("clip-low", check_surrogate),
                                           ("clip-high", check_surrogate), ("r", check_kl)])
def test_numbers_follow_the_mouse_while_it_drags(page, id, check):
    values = []

    def look():
        values.append(page.settings()[id])
        check(page)

    page.drag(id, [0.31, 0.52, 0.77, 0.93], look)
    assert values == sorted(set(values)), "each move to the right is a larger value"


def test_reset_brings_the_first_settings_back(page):
    before, shown = page.settings(), page.texts()
    for id in before:
        page.keys("adv-plus" if id == "adv" else id, "ArrowLeft" if id == "top-p" else "ArrowRight", 3)
        page.press("Enter")                             # submits nothing
    assert all(value != before[id] for id, value in page.settings().items())
    for i, key in enumerate((" ", "Enter", " ")):
        page.run("i => document.querySelectorAll('button')[i].focus()", i)
        page.press(key)
    assert page.settings() == before and page.texts() == shown


# ---------------------------------------------------------------------------------------------------------------------
# The curves that are drawn
# ---------------------------------------------------------------------------------------------------------------------


def drawn(page: Browser, id: str) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """({curve: its unbroken pieces, [N, 2] in the units of the axes}, {curve: its point}), read back through the ticks."""
    figure = page.run("""id => {
        const all = (selector, f) => [...document.getElementById(id).querySelectorAll(selector)].map(f);
        const at = (x, names) => names.map(name => Number(x.getAttribute(name)));
        return {x: all('.x-tick', t => [...at(t, ['x']), t.textContent]),
                y: all('.y-tick', t => [...at(t, ['y']), t.textContent]),
                curves: all('.curve', c => [c.classList[1], c.getAttribute('d')]),
                points: all('.point', c => [c.classList[1], at(c, ['cx', 'cy'])])}; }""", id)
    page_xy, unit_xy = [], []
    for axis, shift in (("x", 0), ("y", -4)):           # a label's baseline is 4 below its tick
        ticks = [(place + shift, number(text)) for place, text in figure[axis]]
        steps = {(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(ticks)}
        assert len(ticks) > 2 and max(steps) == pytest.approx(min(steps)), "the ticks stand on one straight scale"
        assert (max(steps) > 0) == (axis == "x"), "to the right and up is more"
        page_xy.append(ticks[0][0])
        unit_xy.append((ticks[0][1], max(steps)))
    place, (start, step) = f64(page_xy), f64(unit_xy).T

    def units(xy):
        return (f64(xy) - place) * step + start

    curves = {name: [units([[float(v) for v in point.split()] for point in piece.split("L")]) for piece in d.split("M")[1:]]
              for name, d in figure["curves"]}
    return curves, {name: units(xy) for name, xy in figure["points"]}


@pytest.mark.parametrize("adv", [1.0, -1.0])
def test_the_curves_of_the_surrogate_are_the_functions(page, adv):
    page.keys("clip-low", "ArrowRight", 13)
    page.keys("clip-high", "ArrowRight", 37)
    page.keys("ratio", "ArrowRight", 111)
    if adv < 0:
        page.keys("adv-plus", "ArrowRight")
    set_to = page.settings()
    low, high = set_to["clip-low"], set_to["clip-high"]

    def value(rho):
        return clipped_surrogate(rho.log(), torch.zeros_like(rho), torch.full_like(rho, adv), low, high)

    def gradient(rho):
        return derivative(lambda logp: value(logp.exp()), rho.log())

    for id, f, pieces in (("surrogate-plot", value, 1), ("gradient-plot", gradient, 2)):
        curves, points = drawn(page, id)
        assert len(curves["one"]) == pieces and len(curves["two"]) == 1
        edges = f64([1 - low, 1 + high])
        for name, function in (("one", f), ("two", lambda rho: rho * adv)):
            rho, height = torch.cat(curves[name]).T
            assert rho[0] == 0 and rho[-1] == pytest.approx(3) and len(rho) > 200 and (rho.diff() > 0).all()
            inside = (rho > 0) & ((rho[:, None] - edges).abs() > 1e-3).all(-1)        # the gradient jumps at an edge
            torch.testing.assert_close(height[inside], function(rho[inside]), rtol=0, atol=1e-3)
        now = f64([set_to["ratio"]])
        torch.testing.assert_close(points["one"], torch.cat((now, f(now))), rtol=0, atol=1e-3)


def test_the_curves_of_the_estimates_are_the_functions(page):
    page.keys("r", "ArrowRight", 17)
    now = f64([page.settings()["r"]])
    curves, points = drawn(page, "kl-plot")
    for name, f in (("one", kl_k1), ("two", kl_k2), ("three", kl_k3)):
        [xy] = curves[name]
        r, height = xy.T
        assert r[0] == pytest.approx(-2) and r[-1] == pytest.approx(2) and len(r) > 100
        torch.testing.assert_close(height, f(torch.zeros_like(r), r), rtol=0, atol=1e-3)
        torch.testing.assert_close(points[name], torch.cat((now, f(torch.zeros_like(now), now))), rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The functions behind them: window.nanorl
# ---------------------------------------------------------------------------------------------------------------------


def in_page(page: Browser, name: str, rows: list[list]) -> Tensor:
    """nanorl.name(*row) for each row."""
    return f64([[float(x) for x in y] if isinstance(y, list) else float(y)
                for y in page.run(f"rows => rows.map(row => nanorl.{name}(...row))", rows)])


def random_logits() -> list[Tensor]:
    """Rows of 1 to 40 logits, small, large, of 10^4, with ties, with -inf."""
    g = torch.Generator().manual_seed(0)
    rows = [scale * torch.randn(n, generator=g, dtype=torch.float64)
            for n in (1, 2, 3, 6, 40) for scale in (1e-3, 1.0, 30.0) for _ in range(10)]
    rows += [torch.randint(-3, 3, (n,), generator=g).double() for n in (4, 8, 16) for _ in range(10)]
    rows += [row + offset for row in rows[::7] for offset in (1e4, -1e4)]
    rows += [f64(row) for row in ([1e4, 0.0], [1e4, 1e4, -1e4], [-1e4, -1e4], [0.0, -math.inf, 1.0], [-math.inf, 5.0],
                                  [0.0] * 2, [0.0] * 4, [0.0] * 8, [7.0] * 3)]
    return rows


def test_log_probabilities_and_entropies_are_those_of_ops(page):
    for row in random_logits():
        z = row.tolist()
        for name, want in (("logSoftmax", log_softmax(row)), ("softmax", log_softmax(row).exp()),
                           ("entropyFromLogits", entropy_from_logits(row))):
            torch.testing.assert_close(in_page(page, name, [[z]])[0], want, rtol=1e-12, atol=1e-14)


def test_the_filters_are_those_of_sample(page):
    """Bit for bit: they copy logits or make them -inf. k from off to beyond the row, p from next to nothing to off, and the
    p that is reached exactly: half of the tokens, all equally likely."""
    tied = exact = 0
    for row in random_logits():
        z, ks, ps = row.tolist(), (0, 1, 2, 3, len(row), 99), (1e-9, 0.1, 0.25, 0.5, 0.75, 0.9, 1 - 1e-9, 1.0)
        want = torch.stack([top_k_filter(row[None], k)[0] for k in ks])
        assert torch.equal(in_page(page, "topKFilter", [[z, k] for k in ks]), want)
        tied += int(((want > -torch.inf).sum(-1)[1:4] > f64([1, 2, 3])).sum())
        want = torch.stack([top_p_filter(row[None], p)[0] for p in ps])
        assert torch.equal(in_page(page, "topPFilter", [[z, p] for p in ps]), want)
        assert (want[0] > -torch.inf).sum() == 1
        exact += int(len(set(z)) == 1 and len(z) > 1 and (want[3] > -torch.inf).sum() == len(z) / 2)
    assert tied > 10 and exact >= 3, "the edges were there"


def test_the_order_is_temperature_then_top_k_then_top_p(page):
    for row in random_logits():
        cases = [(t, k, p) for t in (0.1, 0.7, 1.0, 3.0) for k in (0, 2, 3) for p in (0.3, 0.8, 1.0)]
        want = torch.stack([sampling_logits(row[None], *case)[0] for case in cases])
        found = in_page(page, "samplingLogits", [[row.tolist(), *case] for case in cases])
        found, want = (x - x.amax(-1, keepdim=True) for x in (found, want))         # the sampler shifts them before it divides
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-9)
    assert torch.equal(in_page(page, "samplingLogits", [[[1.0, 2.0], 0.5]])[0], f64([2.0, 4.0])), "both filters are off"


@pytest.mark.parametrize("adv", [1.0, -1.0, 0.37, -2.5])
def test_the_surrogate_and_its_gradient_are_those_of_autograd(page, adv):
    """Also where rho, between 1/2 and 2, is the band's edge itself: 1 + (rho - 1) is rho there, without rounding."""
    logp = torch.linspace(-3, 3, 241, dtype=torch.float64)
    rho = logp.exp()
    bands = [(torch.full_like(rho, low), torch.full_like(rho, high))
             for low in (0.0, 0.1, 0.2, 0.9) for high in (0.0, 0.28, 3.0)]
    bands += [((1 - rho).clamp(0, 0.5), (rho - 1).clamp(0, 1))]
    for low, high in bands:
        a = torch.full_like(rho, adv)
        arguments = torch.stack((rho, a, low, high), dim=-1).tolist()

        def value(x, a=a, low=low, high=high):
            return clipped_surrogate(x, torch.zeros_like(x), a, low, high)

        for name, want in (("clippedSurrogate", value(logp)), ("clippedSurrogateGradient", derivative(value, logp))):
            torch.testing.assert_close(in_page(page, name, arguments), want, rtol=1e-12, atol=0)
        away = page.run("rows => rows.map(row => nanorl.clippedAway(...row)).map(({low, high}) => [low, high])", arguments)
        assert torch.equal(torch.tensor(away).T, torch.stack(clipped_away(rho, a, low, high)))


def test_the_estimates_and_their_gradients_are_those_of_autograd(page):
    """k3 near r = 0 is the test of expm1: e^r - 1 - r would be off by 1e-16, which for r = 1e-6 is a part in 5000."""
    g = torch.Generator().manual_seed(1)
    size = 10.0 ** (torch.rand(400, generator=g, dtype=torch.float64) * 8 - 7)
    other = size * torch.randn(400, generator=g, dtype=torch.float64).sign()
    for logp in (torch.zeros_like(other), 3 * torch.randn(400, generator=g, dtype=torch.float64)):
        pairs = torch.stack((logp, other), dim=-1).tolist()
        for name, f in (("K1", kl_k1), ("K2", kl_k2), ("K3", kl_k3)):
            want, rounding = f(logp, other), 4 * torch.finfo(torch.float64).eps * (other - logp).abs()
            got = in_page(page, f"kl{name}", pairs)
            assert ((got - want).abs() <= 1e-12 * want.abs() + (rounding if name == "K3" else 0)).all(), name
            gradient = derivative(lambda x, f=f, other=other: f(x, other), logp)
            torch.testing.assert_close(in_page(page, f"kl{name}Gradient", pairs), gradient, rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------------------------------------------------------------
# Everybody can read it and move it
# ---------------------------------------------------------------------------------------------------------------------


def test_every_control_is_reached_by_tab_in_order_and_shows_its_focus(page):
    controls = page.run("""() => [...document.querySelectorAll('input, button, a, [tabindex]')]
        .filter(x => x.type !== 'radio' || x.checked).map(x => x.id || x.textContent)""")
    reached = []
    for _ in controls:
        page.press("Tab")
        name, style, width, color, background = page.run("""() => {
            const x = document.activeElement, s = getComputedStyle(x), behind = getComputedStyle(x.closest('section'));
            return [x.id || x.textContent, s.outlineStyle, parseFloat(s.outlineWidth), s.outlineColor,
                    behind.backgroundColor]; }""")
        reached.append(name)
        assert style == "solid" and width >= 2 and contrast(color, background) >= 3, name
    assert reached == controls and len(controls) == 6 + 3 + 1 + 4 + 1 + 1 + 1


def test_every_control_has_a_label_and_every_id_is_one_elements(page):
    assert page.run("() => [...document.querySelectorAll('input')].every(x => x.labels[0]?.innerText.trim())")
    assert page.run("() => [...document.querySelectorAll('output[for]')].every(x => document.getElementById(x.htmlFor[0]))")
    assert page.run("() => document.querySelectorAll('[role=status]').length") == 3
    ids = page.run("() => [...document.querySelectorAll('[id]')].map(x => x.id)")
    assert len(ids) == len(set(ids))


def channels(color: str) -> list[float]:
    """[red, green, blue, alpha] of "rgb(..)" or "rgba(..)", alpha in [0, 1]."""
    values = [float(x) for x in re.findall(r"[\d.]+", color)]
    return values if len(values) == 4 else [*values, 1.0]


def luminance(color: str) -> float:
    """Relative luminance.                                                                  (WCAG 2.2)"""
    *rgb, alpha = channels(color)
    assert alpha == 1, color
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (c / 255 for c in rgb)]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_measure_of_contrast_is_the_known_one():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)", "rgba(255, 255, 255, 1)") == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_and_all_curves_stand_out(page, scheme):
    page.look(scheme)
    page.keys("top-k", "ArrowRight", 2)             # some rows of the table are cut
    background = """x => { for (; x; x = x.parentElement) { const color = getComputedStyle(x).backgroundColor;
        if (color !== 'rgba(0, 0, 0, 0)') return color; } return 'none'; }"""
    texts = page.run(f"""() => {{
        const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), background = {background};
        while (walker.nextNode()) {{
            const x = walker.currentNode.parentElement, style = getComputedStyle(x);
            if (!walker.currentNode.textContent.trim() || !x.getClientRects().length) continue;
            found.push([walker.currentNode.textContent, x.closest('svg') ? style.fill : style.color, background(x)]);
        }}
        return found; }}""")
    assert len(texts) > 200
    for text, color, behind in texts:
        assert contrast(color, behind) >= 4.5, (text, color, behind)
    assert page.run("() => [...document.querySelectorAll('*')].every(x => getComputedStyle(x).opacity === '1')")

    shapes = page.run(f"""() => {{ const background = {background};
        return [...document.querySelectorAll('.curve, .bars i')].map(x => [
            x.closest('svg') ? getComputedStyle(x).stroke : getComputedStyle(x).backgroundColor,
            background(x.parentElement), x.closest('svg')?.querySelector('.band')]
            .map((y, i) => i === 2 ? y && getComputedStyle(y).fill : y)); }}""")
    assert len(shapes) == 12 + 4 + 3 + 2 + 3
    for color, *behinds in shapes:
        assert "#{:02x}{:02x}{:02x}".format(*map(int, channels(color)[:3])) in OKABE_ITO, color
        assert all(contrast(color, behind) >= 3 for behind in behinds if behind), (color, behinds)
    dark = luminance(page.run("() => getComputedStyle(document.body).backgroundColor")) < 0.1
    assert dark == (scheme == "dark")


@pytest.mark.parametrize("width", [360, 500, 700, 1000])
def test_nothing_sticks_out_at_any_width(page, width):
    """Also with the longest numbers, those of the lowest temperature."""
    page.look(width=width)
    for id, key in (("temperature", "Home"), ("logit-0", "End"), ("logit-1", "Home"), ("r", "Home"),
                    ("adv-plus", "ArrowRight")):
        page.keys(id, key)
    assert page.texts()["logp-1"] == "−50.0000"
    scroll, inner = page.run("() => [document.documentElement.scrollWidth, innerWidth]")
    assert scroll <= inner == width
    assert page.run("""() => [...document.querySelectorAll('section')].flatMap(section => {
        const {left, right} = section.getBoundingClientRect();
        return [...section.querySelectorAll('*')].map(x => [x.tagName, x.id, x.getBoundingClientRect()])
            .filter(([, , box]) => box.width && (box.left < left - 0.5 || box.right > right + 0.5)); })""") == []
    assert page.run("""() => [...document.querySelectorAll('td, th, output, label')]
        .filter(x => x.scrollWidth > x.clientWidth + 1 && x.clientWidth).map(x => x.textContent)""") == []


def test_a_phone_shows_the_page_at_its_own_width(page):
    """A phone would lay the page out 980 pixels wide and shrink it, had the page not said otherwise."""
    page.send("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert page.run("() => [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
