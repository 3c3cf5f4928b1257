"""The claims: a verdict follows from what was measured, changes when a named line is changed, and is on the page."""

import importlib.util
import json
import re

import pytest

from experiments import findings
from experiments.__main__ import FILES, main, modules, page
from experiments.findings import Finding

MODULES = modules()
CHANGES = [(name, *change) for name, module in MODULES.items() for change in
           re.findall(r"Change\s+`([^`]+)`\s+to\s+`([^`]+)`:\s+(C\d+)\s+(is\s+\w+|holds\s+only\s+when[^.]*)\.", module.__doc__)]
QUICK = ("C1", "C6")            # whose changed lines are tried at every run; the others take minutes


def finding(**held):
    return Finding("C0", "Snow is white.", {name.replace("_", " "): x for name, x in held.items()}, "it was seen", [])


def test_a_verdict_follows_from_where_a_claim_held():
    assert finding(it_is_fresh=True, it_is_old=True).verdict == "confirmed"
    assert finding(it_is_fresh=False, it_is_old=False).verdict == "refuted"
    assert finding(it_is_fresh=True, it_is_old=False, it_is_wet=False).verdict == (
        "holds when it is fresh; not when it is old or it is wet")


def test_every_claim_is_measured_in_one_file():
    claims = [claim.__name__ for module in MODULES.values() for claim in module.CLAIMS]
    assert sorted(claims, key=lambda name: int(name[1:])) == [f"c{n}" for n in range(1, 41)]


@pytest.mark.parametrize("name", FILES)
def test_what_is_kept_has_every_claim_of_its_file_with_its_verdict(name):
    kept = json.loads((findings.RESULTS / f"{name}.json").read_text())["findings"]
    assert [x["claim"].lower() for x in kept] == [claim.__name__ for claim in MODULES[name].CLAIMS]
    assert [x["verdict"] for x in kept] == [x.verdict for x in findings.kept(MODULES[name]).values()]
    assert all(x["because"] and x["rows"] and x["held"] for x in kept)


def test_the_page_is_what_was_kept():
    assert (findings.ROOT / "experiments/README.md").read_text() == page()


def test_each_claim_is_one_row_of_four_cells():
    """Also where a sentence has a bar in it, as in KL(p || q)."""
    rows = [line for line in page().splitlines() if line.startswith("| C")]
    assert len(rows) == 40 and all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


@pytest.mark.parametrize("name", FILES)
def test_a_file_states_each_claim_and_draws_its_figure(name, tmp_path):
    module = MODULES[name]
    assert all(re.search(rf"^{claim.__name__.upper()}\b", module.__doc__, re.M) for claim in module.CLAIMS)
    pytest.importorskip("matplotlib")
    module.draw(findings.kept(module), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def changed(name, old, new):
    """The module of a file of claims in which one line is another; the line is there once, below the docstring."""
    source = (findings.ROOT / f"experiments/{name}.py").read_text()
    docstring, code = source.split('"""', 2)[1:]
    assert code.count(old) == 1, f"{old!r} is {code.count(old)} times in the code of {name}.py"
    module = importlib.util.module_from_spec(MODULES[name].__spec__)
    exec(compile(f'"""{docstring}"""' + code.replace(old, new), name, "exec"), module.__dict__)
    return module


def test_every_file_names_a_line_to_change():
    assert {name for name, *_ in CHANGES} == set(FILES)
    for name, old, new, _, _ in CHANGES:
        changed(name, old, new)


@pytest.mark.parametrize(("name", "old", "new", "claim", "verdict"), [
    pytest.param(*change, id=change[3], marks=[] if change[3] in QUICK else pytest.mark.slow) for change in CHANGES])
def test_the_named_change_changes_the_verdict(name, old, new, claim, verdict):
    before = findings.kept(MODULES[name])[claim].verdict
    after = getattr(changed(name, old, new), claim.lower())(False).verdict
    expected = re.sub(r"^(is |holds only when )", "", " ".join(verdict.split()))
    assert after != before
    assert after == expected if expected in ("confirmed", "refuted") else after.startswith(f"holds when {expected}; not when")


def test_an_unknown_file_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["varience"])
    assert exit.value.code == 2 and "'varience' is not a file of claims" in capsys.readouterr().err


@pytest.mark.slow
def test_the_smoke_runs_every_claim_and_keeps_nothing(capsys):
    before = {path: path.read_bytes() for folder in (findings.RESULTS, findings.FIGURES) for path in folder.iterdir()}
    main(["--smoke"])
    said = capsys.readouterr().out
    assert all(re.search(rf"^C{n}\. ", said, re.M) for n in range(1, 39))
    assert before == {path: path.read_bytes() for folder in (findings.RESULTS, findings.FIGURES) for path in folder.iterdir()}
