"""Make every file in data/ again, byte for byte:  python data/make.py

    text.txt               what the base model reads: stories and sums, with a blank line between documents
    stories_heldout.txt    stories that are not in text.txt, to measure what a later stage forgets
    <task>.jsonl           demonstrations, {"prompt", "response"}, at the task's default difficulty
    preferences.jsonl      pairs of stories and what a reader chose, {"prompt", "chosen", "rejected"}

Only training prompts are in the demonstrations; of the preferences, one in ten is held out by its prompt's hash.
Another difficulty:  python data/make.py --task addition-4 --out FILE
"""

import argparse
import json
import os
import sys
from pathlib import Path
from random import Random

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

from nanorl.tasks import TASKS, Stories, Task, make_task, story  # noqa: E402

TEXT_BYTES, STORY_SHARE = 2_500_000, 0.35
WORKED_SHARE = 2 / 3  # of the sums in the text; the demonstrations have their own, lower one
DEMONSTRATIONS, HELDOUT_STORIES, PREFERENCES = 4_000, 200, 4_000


def sums(task: Task, rng: Random) -> str:
    """A document of three to six training problems, one a line, each with its response."""
    lines = []
    for _ in range(rng.randint(3, 6)):
        problem = task.problem(rng, "train")
        respond = task.work if rng.random() < WORKED_SHARE else task.direct
        lines.append(f"{problem.prompt} {respond(problem, rng)}")
    return "\n".join(lines)


def text() -> str:
    rng, task = Random("text"), make_task("addition")
    documents = []
    for share, write in (STORY_SHARE, story), (1 - STORY_SHARE, lambda rng: sums(task, rng)):
        size = 0
        while size < share * TEXT_BYTES:
            documents.append(write(rng))
            size += len(documents[-1]) + 2  # and a blank line
    rng.shuffle(documents)
    return "\n\n".join(documents) + "\n"


def heldout_stories(text: str) -> str:
    rng, seen, stories = Random("stories_heldout"), set(text.split("\n\n")), {}
    while len(stories) < HELDOUT_STORIES:
        if (new := story(rng)) not in seen:
            stories[new] = None
    return "\n\n".join(stories) + "\n"


def lines(records: list[dict[str, str]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def demonstrations(task: Task) -> str:
    return lines(task.demonstrations(DEMONSTRATIONS))


def preferences() -> str:
    records, identical = Stories().preferences(PREFERENCES)
    print(f"preferences.jsonl: {len(records)} pairs; {identical} more were the same text twice and are left out.")
    return lines(records)


def files() -> dict[str, str]:
    """Everything that a bare `python data/make.py` writes, by name."""
    pretraining = text()
    return {"text.txt": pretraining, "stories_heldout.txt": heldout_stories(pretraining),
            **{f"{name}.jsonl": demonstrations(make_task(name)) for name, task in TASKS.items()
               if task.verifiable and task.max_actions == 1},
            "preferences.jsonl": preferences()}


def write(path: Path, content: str) -> None:
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(content, encoding="utf-8", newline="\n")
    os.replace(tmp, path)  # a killed run leaves the old file or the new one, never half


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{message}\n")
    parser.add_argument("--task", help=f"write demonstrations of this task only: {', '.join(TASKS)}")
    parser.add_argument("--out", type=Path, help="the file to write them to")
    args = parser.parse_args(argv)
    if (args.task is None) != (args.out is None):
        parser.error("--task and --out: one requires the other")
    try:
        if args.task is not None:
            write(args.out, demonstrations(make_task(args.task, needs_verifier=False)))
        else:
            for name, content in files().items():
                write(DATA / name, content)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
