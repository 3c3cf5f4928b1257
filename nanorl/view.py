"""See every token of a rollout: one page with the learning curves of one or two runs and the groups that they have kept.

    python -m nanorl.view runs/grpo [runs/other] [--out FILE]

The page is a single HTML file that opens from disk and asks the network for nothing. Its data are those of metrics.jsonl and
rollouts.jsonl (nanorl/view_data.py says what is in there). Texts of a model are data: the page never parses them as markup, and
its policy lets no script run but its own, which it knows by its hash.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanorl.errors import UserError, user_errors_as_sentences
from nanorl.read_log import read_log
from nanorl.plot import PANELS
from nanorl.run import parse, read_lines

TEMPLATE = Path(__file__).with_suffix(".html")
# The fields that the page reads, and their kinds
GROUP = {"group": int, "prompt": str, "prompt_tokens": list, "metrics": dict, "answers": list}
ANSWER = {"text": str, "parts": dict, "labels": list, "finished": bool, "ids": list, "tokens": list, "sampled": list,
          "before": list, "passes": list, "after": list}


@dataclass(frozen=True, kw_only=True)
class Config:
    runs: tuple[str, ...]    # directories of one run, or of two to see side by side
    out: str = ""            # the HTML file to write (default: view.html in the directory of the first run)


def _has(record: Any, fields: dict[str, type]) -> bool:
    return isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in fields.items())


def read_run(folder: Path) -> dict[str, Any]:
    """What the page shows of a run: its flags, its metrics as columns, and its groups."""
    log, path = read_log(folder), folder / "rollouts.jsonl"
    groups = read_lines(path)
    for number, group in enumerate(groups, start=1):
        if not (_has(group, GROUP) and all(_has(answer, ANSWER) for answer in group["answers"])):
            raise UserError(f"{path}, line {number}: not a group as this version keeps it; expected what a run has written")
    names = sorted({name for line in log.lines for name in line} - {"step"})
    return {"name": str(folder), "config": log.flags, "steps": [line["step"] for line in log.lines],
            "metrics": {name: [line.get(name) for line in log.lines] for name in names}, "groups": groups}


def page(runs: list[Path]) -> str:
    """The HTML file of these runs."""
    try:
        data = json.dumps({"panels": PANELS, "runs": [read_run(run) for run in runs]}, allow_nan=False, separators=(",", ":"))
    except ValueError as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{', '.join(map(str, runs))}: a number is nan or inf ({e}); expected null in its place") from None
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # In JSON, "<" can only stand inside of a string. Escaped, no text can end the script element that holds the data.
    return template.replace("{{hash}}", f"sha256-{digest}").replace("{{data}}", data.replace("<", "\\u003c"))


@user_errors_as_sentences
def main(argv: list[str] | None = None) -> None:
    cfg = parse(Config, argv)
    if len(cfg.runs) > 2:
        raise UserError(f"{' '.join(cfg.runs)}: {len(cfg.runs)} runs; expected one, or two to see side by side")
    runs = [Path(run) for run in cfg.runs]
    out = Path(cfg.out) if cfg.out else runs[0] / "view.html"
    try:
        text = page(runs)
        out.write_text(text, encoding="utf-8")
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror})") from None
    print(f"Wrote {out} ({len(text) / 1e6:.1f} MB). Open it in a browser.")


if __name__ == "__main__":
    main()
