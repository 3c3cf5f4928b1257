"""Common claims about these algorithms, measured.

    python -m experiments                   all files of claims, and the table in experiments/README.md
    python -m experiments dpo variance      some of them
    python -m experiments --smoke           everything once and tiny, to see that it runs; nothing is kept
    python -m experiments --draw            only the figures and the table, from the findings that are kept

python -m experiments.variance runs a single file, without writing the table. Some claims and figures are about the models in
runs/sft and runs/grpo, which are made first if they are missing.
"""

import argparse
import importlib
from types import ModuleType

from experiments import figures
from experiments.findings import Finding, conclude, kept, title
from experiments.runs import ROOT
from nanorl.errors import UserError, user_errors_as_sentences
from nanorl.run import write_atomically

FILES = ("variance", "clipping", "exploration", "leash", "kl", "modes", "dpo", "groups", "power", "voting", "scaling",
         "staleness", "collapse", "foundations")
PREFACE = """# Common claims, measured

Claims that are often repeated about these algorithms, each with an experiment small enough to run while you wait. A claim is
*confirmed*, *refuted*, or *holds when ...*. The verdict is computed from the numbers, and each file names a line whose change
reverses one. `python -m experiments` measures all claims and writes this page, `python -m experiments.dpo` measures those of
one file, and `--draw` measures nothing and only redraws. The numbers behind the page are in [results](results). The trained
models were made by `train_pretrain.py --steps 900` and `train_sft.py --steps 300 --lr 2e-3`.

"""


def modules() -> dict[str, ModuleType]:
    return {name: importlib.import_module(f"experiments.{name}") for name in FILES}


def verdict(finding: Finding) -> str:
    """The verdict in Markdown, on two lines if it depends on conditions."""
    if finding.verdict in ("confirmed", "refuted"):
        return f"**{finding.verdict}**"
    yes, no = ("; ".join(name for name, held in finding.held.items() if held == wanted) for wanted in (True, False))
    return f"**holds when** {yes}<br>**not when** {no}"


def page() -> str:
    """experiments/README.md, from the findings that are kept."""
    parts = [PREFACE]
    for name, module in modules().items():
        cells = ([x.replace("|", "\\|") for x in (f.claim, f.says, verdict(f), f.because)] for f in kept(module).values())
        rows = "\n".join(f"| {' | '.join(row)} |" for row in cells)
        parts.append(f"## {title(module)}\n\n[{name}.py]({name}.py): `python -m experiments.{name}`\n\n"
                     f"| | the claim | verdict | because |\n|---|---|---|---|\n{rows}\n\n"
                     f"![{title(module)}](../docs/figures/{name}.png)\n\n")
    return "".join(parts).rstrip() + "\n"


@user_errors_as_sentences
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="file", help=f"which of them (default: all): {', '.join(FILES)}")
    parser.add_argument("--smoke", action="store_true", help="everything once and tiny; nothing is kept")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    for name in args.files:
        if name not in FILES:
            raise UserError(f"{name!r} is not a file of claims; expected some of {', '.join(FILES)}")
    for name, module in modules().items():
        if name in args.files or not args.files:
            conclude(module, args.smoke, args.draw)
    if not args.smoke:
        if not args.files:
            figures.draw_all()
        write_atomically(ROOT / "experiments/README.md", lambda f: f.write(page().encode()))


if __name__ == "__main__":
    main()
