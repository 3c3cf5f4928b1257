"""python -m nanorl.view: the page shows the numbers of the files, and no text of a model becomes markup or script.

What the page computes runs in node, where there is one; the page itself in a real browser (browser.py).
"""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from browser import needs_browser

from nanorl import view
from nanorl.plot import PANELS
from nanorl.run import read_lines

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs node on the PATH")

HOSTILE = ["<img src=x onerror=hacked()>", "</script><script>hacked()</script>", "<!--<script>", "]]>", "&lt;b&gt;", "{{data}}",
           "javascript:hacked()", "\u202e\u2066 sdrawkcab", "a\u2028b\u2029c", "\ud800 alone \udfff", "\0\x1b[31m", "a\nb\tc",
           "\u200b\ufeff", "'\"`${hacked()}", "x" * 100_000, "", " "]


def answer(text="Answer: x", tokens=None, reward=1.0, labels=("right", "direct"), passes=1, **more):
    """A kept answer, with numbers that differ from token to token."""
    tokens = [*text, "<|end|>"] if tokens is None else tokens
    n = len(tokens)

    def numbers(scale, start=0.0):
        return [round(start + scale * (i + 1) * (-1) ** i, 6) for i in range(n)]

    one = {"logp": numbers(0.01, -2), "entropy": numbers(0.001, 1), "ratio": numbers(0.002, 1),
           "advantage": [reward - 0.5] * n, "weight": [0.001] * n, "mask": [True] * n, "gradient": numbers(-0.0001),
           "held": [False] * n}
    return {"text": text, "reward": reward, "parts": {}, "labels": list(labels), "finished": True, "ids": list(range(n)),
            "tokens": tokens, "sampled": numbers(0.011, -2), "before": numbers(0.012, -2),
            "passes": [{"update": k, **one} for k in range(passes)], "after": numbers(0.014, -2)} | more


def group(step=0, number=0, prompt="Say 1.", answers=None, **more):
    return {"step": step, "group": number, "prompt": prompt, "prompt_ids": list(range(len(prompt))), "prompt_tokens": [*prompt],
            "metrics": {}, "answers": answers or [answer(), answer("Answer: y", reward=0.0, labels=("wrong", "direct"))]} | more


def write_run(folder, groups=(), lines=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    lines = lines or [{"step": k, "rollout/reward": k / 10, "train/entropy": 1 / (k + 1)} for k in range(5)]
    for name, records in (("metrics.jsonl", lines), ("rollouts.jsonl", groups)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text(json.dumps({"out": str(folder), "algo": "grpo"} | config))
    return folder


def seen(*runs, out):
    view.main([*map(str, runs), "--out", str(out)])
    return out


class Elements(HTMLParser):
    """The elements of a page as a browser takes them apart, and the text of each script."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.comments, self.scripts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, attributes))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.scripts and self.tags[-1][0] == "script" and not self.scripts[-1]:
            self.scripts[-1] = data

    def handle_comment(self, data):
        self.comments.append(data)


def data_of(page):
    return json.loads(Elements(page.read_text()).scripts[0])


def hostile_groups():
    """Every field that holds a text holds these, one after the other."""
    return [group(number=k, prompt=text, prompt_tokens=[text], answers=[
        answer(text, [text, "x"], labels=[text or "empty"], parts={text: 1.0}), answer("y", ["y"])], metrics={text: 2.0})
        for k, text in enumerate(HOSTILE)]


def hostile_run(folder):
    return write_run(folder, hostile_groups(), algo=HOSTILE[0])


# ---- the file ----


def test_the_page_holds_the_lines_of_the_files(tmp_path):
    one = write_run(tmp_path / "one", [group(), group(3, 7)])
    lines = [{"step": 0, "eval/length": None}, {"step": 1, "train/loss": 1e-9}]
    two = write_run(tmp_path / "two", [group(3)], lines, algo="dapo")
    found = data_of(seen(one, two, out=tmp_path / "page.html"))
    assert found["panels"] == PANELS and [run["name"] for run in found["runs"]] == [str(one), str(two)]
    for folder, run in zip((one, two), found["runs"], strict=True):
        assert run["groups"] == read_lines(folder / "rollouts.jsonl")
        lines = read_lines(folder / "metrics.jsonl")
        assert run["steps"] == [line["step"] for line in lines]
        assert run["metrics"] == {name: [line.get(name) for line in lines] for line in lines for name in line if name != "step"}
    assert found["runs"][1]["config"]["algo"] == "dapo"


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("name", ["grpo-full", "ppo", "dpo", "group", "pretrain"])
def test_real_runs_are_shown(name, tmp_path, capsys):
    found = data_of(seen(name, out=tmp_path / "page.html"))
    assert bool(found["runs"][0]["groups"]) == (name != "pretrain")
    assert "page.html" in capsys.readouterr().out


def test_no_text_becomes_markup(tmp_path):
    """The elements of a page with hostile texts are those of a page with harmless ones, and the texts come out as they were."""
    harmless, hostile = write_run(tmp_path / "a", [group()]), hostile_run(tmp_path / "<script>hacked()<")
    pages = [seen(folder, out=tmp_path / f"{k}.html") for k, folder in enumerate((harmless, hostile))]
    a, b = (Elements(page.read_text()) for page in pages)
    assert a.tags == b.tags and a.comments == b.comments == [] and a.scripts[1] == b.scripts[1]
    assert "<" not in b.scripts[0] and b.scripts[0].isascii()
    assert [g["prompt"] for g in data_of(pages[1])["runs"][0]["groups"]] == HOSTILE


def test_the_page_runs_its_own_script_alone_and_never_parses_text(tmp_path):
    page = seen(write_run(tmp_path / "run", [group()]), out=tmp_path / "page.html").read_text()
    script = Elements(page).scripts[1]
    [policy] = [dict(a)["content"] for tag, a in Elements(page).tags if tag == "meta" and dict(a).get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|DOMParser|srcdoc", script)


@pytest.mark.parametrize(("line", "says"), [
    ('{"step": 0}', "line 1: not a group"), (json.dumps(group(answers=[{}])), "line 1: not a group"),
    (json.dumps(group() | {"metrics": {"margin": math.nan}}), "nan or inf"), ('{"step": 0, "gro', ""), ("[]", "line 1")])
def test_a_file_that_is_not_of_a_run_is_one_sentence(line, says, tmp_path, capsys):
    """A line that a kill has torn is none."""
    folder = write_run(tmp_path / "run")
    (folder / "rollouts.jsonl").write_text(line + "\n" * bool(says))
    if not says:
        assert data_of(seen(folder, out=tmp_path / "page.html"))["runs"][0]["groups"] == []
        return
    with pytest.raises(SystemExit) as exit:
        view.main([str(folder)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and says in error and not (folder / "view.html").exists()


@pytest.mark.parametrize("runs", [["nothing"], ["a", "b", "c"]])
def test_runs_that_cannot_be_shown_are_one_sentence(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        view.main(runs)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and "expected" in error


# ---- what the page computes, in node ----


def in_node(expression, *arguments):
    """The value of nanorl.something(...arguments) of the page's script."""
    script = Elements(view.TEMPLATE.read_text()).scripts[1]
    program = f"{script}\nconst args = {json.dumps(arguments)};\nconsole.log(JSON.stringify([({expression})(...args)]));"
    result = subprocess.run([NODE, "-"], input=program, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)[0]


@needs_node
def test_the_filters_find_what_they_say():
    right, wrong = answer("Answer: x"), answer("5+5=10. Answer: y", reward=0.0, labels=("wrong", "worked"))
    cut = answer("5+5", reward=-0.5, labels=("wrong",), finished=False)
    groups = [group(number=0, answers=[cut, wrong]), group(number=1, prompt="Other?", answers=[wrong, right])]

    def shown(kind="", text="", order="best"):
        found = in_node("(...a) => nanorl.filtered(...a)", groups, kind, text, order)
        return [(g["group"], [a["text"] for a in g["shown"]]) for g in found]

    assert shown() == [(1, [right["text"], wrong["text"]]), (0, [wrong["text"], cut["text"]])]
    assert shown(order="worst") == [(0, [cut["text"], wrong["text"]]), (1, [wrong["text"], right["text"]])]
    assert shown(order="sampled") == [(0, [cut["text"], wrong["text"]]), (1, [wrong["text"], right["text"]])]
    assert shown("right") == [(1, [right["text"]])] and shown("truncated") == [(0, [cut["text"]])]
    assert shown("worked") == [(1, [wrong["text"]]), (0, [wrong["text"]])]
    assert shown(text="OTHER") == [(1, [right["text"], wrong["text"]])] and shown("wrong", "=10") == shown("worked")
    assert in_node("(g) => nanorl.allLabels(g)", groups) == ["right", "wrong", "truncated", "worked", "direct"]


@needs_node
def test_equal_answers_are_folded_where_they_were_trained_on_alike():
    x, y = answer(passes=2), answer(passes=2, ids=[7] * 10)
    x["passes"][1] |= {"advantage": list(range(10))}
    other_update, other_reward, other_advantage = (json.loads(json.dumps(x)) for _ in range(3))
    other_update["passes"][1]["update"], other_reward["reward"] = 5, 0.5
    other_advantage["passes"][1]["advantage"].reverse()

    def times(answers, k):
        return [n for _, n in in_node("(...a) => nanorl.folded(...a)", answers, k)]

    assert times([x, y, x, other_reward, x], 0) == [3, 1, 1] and times([], 0) == []
    assert times([x, other_update], 1) == times([x, other_advantage], 1) == [1, 1] and times([x, other_update], 0) == [2]


@needs_node
def test_what_the_update_did_with_a_token():
    one = {"gradient": [-1.0, 2.0, 0.0, 0.0, 0.5], "held": [False, False, True, False, False],
           "mask": [True, True, True, True, False]}
    assert in_node("(p) => [0, 1, 2, 3, 4].map((i) => nanorl.fate(p, i))", one) == ["up", "down", "held", "none", "read"]
    assert in_node("() => nanorl.fate(null, 0)") == "read"
    assert in_node("(p) => nanorl.fate(p, 1)", {"gradient": [0.0, 1.0]}) == "down", "pairs have no mask: all is trained"


@needs_node
def test_colours_are_of_the_numbers_in_the_file():
    a = answer(passes=2)
    a["passes"][1] = a["passes"][1] | {"mask": [False] + [True] * (len(a["ids"]) - 1)}
    colours = in_node("(a, p) => Object.fromEntries(Object.entries(nanorl.COLOURS).map(([name, c]) => "
                      "[name, a.ids.map((_, i) => c.of(a, nanorl.passOf(a, p), i))]))", a, 1)
    one = a["passes"][1]
    assert colours["gradient"] == [None, *(-x for x in one["gradient"][1:])]
    assert colours["advantage"] == [None, *one["advantage"][1:]] and colours["entropy"] == [None, *one["entropy"][1:]]
    assert colours["ratio"][1:] == pytest.approx([math.log(x) for x in one["ratio"][1:]])
    assert colours["logp"] == [-x for x in a["before"]]
    assert colours["change"] == [y - x for x, y in zip(a["before"], a["after"], strict=True)]
    full, last, none = in_node("""(a, b) => [nanorl.fullColour([{shown: [a]}], nanorl.COLOURS.gradient.of, 0),
                                  nanorl.passOf(a, 5), nanorl.passOf(b, 0)]""", a, answer(passes=0))
    assert full == max(map(abs, one["gradient"])) and last["update"] == 1 and none is None


@needs_node
def test_a_text_is_shown_with_codes_for_what_cannot_be_seen():
    """Joined again, the pieces are the text; a long one ends in how much is left out."""
    texts = sorted(HOSTILE, key=len)
    *found, long = in_node("(texts) => texts.map((t) => nanorl.pieces(t))", texts)
    for text, pieces in zip(texts, found, strict=False):
        whole = "".join(p["text"].replace("⏎\n", "\n") if "text" in p else chr(int(p["code"][2:], 16)) for p in pieces)
        readable = "".join(p.get("text", "") for p in pieces)
        assert whole == text and not re.search("[\u2028\u2029\u202a-\u202e\u2066-\u2069\u200b\ufeff\0\x1b\t]", readable)
    assert long == [{"text": "x" * 500}, {"code": "and 99,500 more characters"}]


@needs_node
def test_a_thinned_curve_keeps_its_extremes_and_its_order():
    ys = [None if i % 7 == 3 else math.sin(i / 30) + (i == 4321) * 9 - (i == 777) * 9 for i in range(10_000)]
    points = in_node("(x, y) => nanorl.thinned(x, y)", list(range(10_000)), ys)
    assert len(points) <= 800 and [4321, ys[4321]] in points and [777, ys[777]] in points
    assert points == sorted(points) and all(ys[x] == y for x, y in points)
    assert in_node("(x, y) => nanorl.thinned(x, y)", [0, 1, 2], [5, None, 6]) == [[0, 5], [2, 6]]


@needs_node
def test_small_things():
    format, near, differ, panels = in_node("""(flags, panels, metrics) => [
        [1e-7, -0.5, null, 0].map((x) => nanorl.format(x)),
        [[14, 16].map((x) => nanorl.nearest([0, 10, 20], x)), nanorl.nearest([], 3)],
        nanorl.differences(flags.map((config) => ({config}))), nanorl.panelsOf(panels, [{metrics}])]""",
        [{"out": 1, "lr": 1}, {"out": 2, "lr": 1, "n": 3}], PANELS, {"rollout/reward": [0, 1], "train/kl": [0, 0, None]})
    assert format == ["1e−7", "−0.5", "–", "0"] and near == [[1, 2], 0]
    assert differ == ["n – / 3"] and panels == [["accuracy", PANELS["accuracy"]]]


# ---- the page, in a browser ----


@pytest.fixture
def opened(browser, tmp_path):
    """opened(runs) opens their page. Whatever a test does to it: it asks nobody for anything, and the console stays empty."""
    pages = []

    def open_page(*runs, **look):
        pages.append(seen(*runs, out=tmp_path / "page.html").as_uri())
        browser.open(pages[-1])
        browser.look(**look)
        return browser

    yield open_page
    assert set(browser.requests) <= {*pages, "data:,"} and browser.complaints == []
    assert browser.run("() => typeof hacked") == "undefined"


def choose(page, id, value):
    page.run("""(id, value) => { const x = document.getElementById(id); x.value = value;
                x.dispatchEvent(new Event('input', {bubbles: true})); }""", id, value)


def answers_shown(page):
    """[[the tokens of an answer, as they are written]] from top to bottom."""
    return page.run("""() => [...document.querySelectorAll('.answer')].map(
                       a => [...a.querySelectorAll('.token')].map(t => t.textContent))""")


def numbers_shown(page):
    return page.run("""() => Object.fromEntries([...document.querySelectorAll('#numbers dd')]
                       .map(x => [x.dataset.name, x.textContent]))""")


GROUPS = [group(0, 3, answers=[answer("Answer: x"), answer("5+5=10. Answer: y", reward=0.0, labels=("wrong", "worked")),
                               answer("5+5", reward=0.0, labels=("wrong",), finished=False)]),
          group(0, 5, "Say 2."),
          group(4, 1, "Say 3.", [answer("y", reward=0.0, labels=("wrong",), passes=2), answer("x", passes=2)])]


@needs_browser
@pytest.mark.slow
def test_the_numbers_of_every_token_are_those_of_the_file(opened, tmp_path):
    page = opened(write_run(tmp_path / "run", GROUPS))
    page.keys("step", "Home")
    choose(page, "order", "sampled")
    shown = answers_shown(page)
    kept = [a for g in GROUPS[:2] for a in g["answers"]]
    assert shown == [a["tokens"] for a in kept]
    for n, a in enumerate(kept):
        for i in range(len(a["ids"])):
            page.run("""(n, i) => document.querySelectorAll('.answer')[n].querySelectorAll('.token')[i]
                        .dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))""", n, i)
            one, text = a["passes"][0], numbers_shown(page)
            found = {name: float(value.replace("−", "-")) for name, value in text.items()}
            assert found.pop("change") == pytest.approx(a["after"][i] - a["before"][i], rel=1e-5, abs=1e-9)
            assert found == {"id": a["ids"][i], "logp, sampled": a["sampled"][i], "logp before": a["before"][i],
                             "logp in update": one["logp"][i], "entropy": one["entropy"][i], "ratio": one["ratio"][i],
                             "advantage": one["advantage"][i], "weight": one["weight"][i], "dL/dlogp": one["gradient"][i],
                             "logp after": a["after"][i]}
            says = page.texts()["says"]
            assert f"({i + 1} of {len(a['ids'])})" in says and ("up" if one["gradient"][i] < 0 else "down") in says


@needs_browser
@pytest.mark.slow
def test_the_slider_moves_curves_numbers_and_groups(opened, tmp_path):
    lines = [{"step": k, "rollout/reward": k / 10, "train/entropy": 1 / (k + 1)} for k in range(5)]
    page = opened(write_run(tmp_path / "run", GROUPS, lines))
    for key, step in (("End", 4), ("ArrowLeft", 0), ("ArrowRight", 4), ("Home", 0)):
        page.keys("step", key)
        assert page.texts()["step-value"] == str(step)
        shown = page.run("""() => [...document.querySelectorAll('output[data-metric]')].map(
                            o => [o.dataset.metric, o.textContent])""")
        assert dict(shown) == {"rollout/reward": f"{step / 10:g}", "train/entropy": f"{1 / (step + 1):g}"}
        assert len(answers_shown(page)) == sum(len(g["answers"]) for g in GROUPS if g["step"] == step)
        assert page.run("() => !document.getElementById('pass-label').hidden") == (step == 4)
    box = page.box("#plots svg")
    page.mouse("mousePressed", box["x"] + 0.95 * box["width"], box["y"] + box["height"] / 2)
    page.mouse("mouseReleased", box["x"] + 0.95 * box["width"], box["y"] + box["height"] / 2)
    assert page.texts()["step-value"] == "4"


@needs_browser
@pytest.mark.slow
def test_filters_and_order(opened, tmp_path):
    page = opened(write_run(tmp_path / "run", GROUPS))
    page.keys("step", "Home")

    def texts():
        return ["".join(tokens).removesuffix("<|end|>") for tokens in answers_shown(page)]

    assert texts() == ["Answer: x", "Answer: y", "Answer: x", "5+5=10. Answer: y", "5+5"]       # group 5 has the better mean
    for kind, found in (("right", ["Answer: x", "Answer: x"]), ("wrong", ["Answer: y", "5+5=10. Answer: y", "5+5"]),
                        ("truncated", ["5+5"]), ("worked", ["5+5=10. Answer: y"]), ("", texts())):
        choose(page, "kind", kind)
        assert texts() == found and page.texts()["count"] == f"{len(found)} of 5 answers of this step."
    choose(page, "order", "worst")
    assert texts() == ["5+5=10. Answer: y", "5+5", "Answer: x", "Answer: y", "Answer: x"]
    page.run("() => document.getElementById('text').focus()")
    page.send("Input.insertText", text="SAY 2")
    assert texts() == ["Answer: y", "Answer: x"]
    page.send("Input.insertText", text="<")
    assert texts() == []


@needs_browser
@pytest.mark.slow
def test_the_keyboard_reaches_every_token(opened, tmp_path):
    """One stop of Tab leads to the tokens; arrows walk from answer to answer, and the numbers follow."""
    page = opened(write_run(tmp_path / "run", GROUPS))
    page.keys("step", "Home")
    page.keys("text", "Tab")

    def place():
        return page.run("""() => { const answers = [...document.querySelectorAll('.answer')], t = document.activeElement;
            const n = answers.findIndex(a => a.contains(t));
            return n < 0 ? null : [n, [...answers[n].querySelectorAll('.token')].indexOf(t)]; }""")

    assert place() == [0, 0]
    for key, times, there in (("ArrowRight", 3, [0, 3]), ("ArrowDown", 2, [2, 3]), ("ArrowDown", 2, [4, 3]),
                              ("ArrowDown", 1, [4, 3]), ("ArrowUp", 1, [3, 3]), ("End", 1, [3, 17]), ("ArrowRight", 1, [4, 0]),
                              ("ArrowLeft", 1, [3, 17]), ("Home", 1, [3, 0])):
        page.press(key, times)
        assert place() == there, key
        assert numbers_shown(page)["id"] == str(there[1])
    page.press("Tab")
    assert place() is None


@needs_browser
@pytest.mark.slow
def test_read_held_and_trained_tokens_are_told_apart_without_colour(opened, tmp_path):
    one = answer("abcd", ["a", "b", "c", "d"])
    one["passes"][0] |= {"mask": [True, True, True, False], "held": [False, True, False, False],
                         "gradient": [-1.0, 0.0, 0.0, 0.5]}
    page = opened(write_run(tmp_path / "run", [group(0, 0, answers=[one, answer("left out", passes=0)])]))
    assert page.run("() => [...document.querySelectorAll('.answer .token')].slice(0, 4).map(t => t.className)") == [
        "token up plus", "token held", "token none", "token read"]
    looks = page.run("""() => [...document.querySelectorAll('#runs .token')].map(t => getComputedStyle(t))
                        .map(s => [s.fontStyle, s.textDecorationLine, s.outlineStyle])""")
    prompt, answered, out = looks[:6], looks[6:10], looks[10:]
    read = ["italic", "underline", "none"]
    assert set(map(tuple, prompt + out)) == {tuple(read)} and answered[3] == read and answered[1][2] == "dashed"
    assert answered[0][:2] == answered[2][:2] == ["normal", "none"]


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1400])
def test_it_can_be_read_by_day_and_night_on_a_phone_and_beside_another_run(scheme, width, opened, tmp_path):
    """Nothing is wider than the window, and text stands out from full colour: at least 4.5 to 1."""
    one, two = write_run(tmp_path / "one", GROUPS), write_run(tmp_path / "two", [group(0, 0), *hostile_groups()], algo="dapo")
    page = opened(one, two, scheme=scheme, width=width)
    page.keys("step", "Home")
    for colour in page.run("() => [...document.getElementById('colour').options].map(o => o.value)"):
        choose(page, "colour", colour)
        assert page.run("() => document.documentElement.scrollWidth") <= width, colour
        assert min(page.run("""() => [...document.querySelectorAll('.answer .token:not(.read)')].map(t => {
            const parse = c => c.match(/[\\d.]+/g).map(Number);
            const [panel, back, ink] = [getComputedStyle(t.closest('section')), getComputedStyle(t), getComputedStyle(t)]
                .map((s, i) => parse(i === 2 ? s.color : s.backgroundColor));
            const alpha = back[3] ?? 1, mixed = [0, 1, 2].map(i => alpha * back[i] + (1 - alpha) * panel[i]);
            const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => sum + w * (c[i] / 255 <= 0.04045
                ? c[i] / 255 / 12.92 : ((c[i] / 255 + 0.055) / 1.055) ** 2.4), 0);
            const [a, b] = [light(ink), light(mixed)];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); })""")) >= 4.5, colour
    tops = page.run("() => [...document.querySelectorAll('.run')].map(r => r.getBoundingClientRect().top)")
    assert (tops[0] == tops[1]) == (width > 1000), "side by side where there is room"
    page.keys("step", "End")
    assert "No groups were kept at step 4" in page.texts()["runs"]


@needs_browser
@pytest.mark.slow
def test_hostile_texts_are_only_text(opened, tmp_path):
    page = opened(hostile_run(tmp_path / "run"))
    choose(page, "order", "sampled")
    assert len(answers_shown(page)) == 2 * 12, "a button brings the other groups"
    page.run("() => document.querySelector('#runs > div > button').click()")
    texts = [tokens[0] for tokens in answers_shown(page)[::2]]
    assert len(texts) == len(HOSTILE)
    for text, shown in zip(HOSTILE, texts, strict=True):
        if text.isascii() and text.isprintable() and len(text) < 500:
            assert shown == text
    assert page.run("() => document.querySelectorAll('main img, main script, main iframe, main b b').length") == 0
    for i in range(len(HOSTILE)):
        page.run("i => document.querySelectorAll('.answer .token')[i].focus()", i)
    page.keys("text", "Tab")


@needs_browser
@pytest.mark.slow
def test_ten_thousand_steps_and_five_hundred_groups_open_in_two_seconds(opened, tmp_path):
    """Of a run of GRPO: eight answers of 35 tokens to a group."""
    lines = [{"step": k, **{f"train/{name}": math.sin(k / 99 + n) for n, name in enumerate("abcdefghijklmnopqrst")},
              "rollout/reward": k / 1e4, "train/entropy": 1 / (k + 1), "train/kl": k / 1e6} for k in range(10_000)]
    eight = [answer("5+5=10, 8+9+1=18, 2+4+1=07. Answer: 780"[:34], reward=float(k > 3), ids=[k] * 35) for k in range(8)]
    page = opened(write_run(tmp_path / "run", [group(40 * (k // 2), k % 2, answers=eight) for k in range(500)], lines))
    took = page.run("() => performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert took < 2000, f"{took:.0f} ms"
    assert len(answers_shown(page)) == 16
