"""Text that nobody here has written: pretraining on the sources of Python's standard library.

    python -m experiments.real_text         gathers the text, trains a tokenizer and a model, compares: ten minutes

Claim: on held-out text, over the same tokens, the model needs fewer bits per byte than counting, which gets the first token
for nothing. The opponents are a unigram and a bigram model with add-k smoothing,

    p(b) = (n(b) + k) / (N + k V)               p(b | a) = (n(a b) + k) / (n(a) + k V)

each with the k that is best on the last twentieth of the training text, counted on the rest; then all of it is counted.
"""

import argparse
import hashlib
import sys
import sysconfig
from pathlib import Path

import numpy as np

import train_pretrain
from nanorl import run
from nanorl.data import split_text
from nanorl.files import read_text
from nanorl.read_log import read_metrics

MEGABYTES = 4
FLAGS = "--vocab-size 2048 --length 128 --batch 32 --steps 2000 --eval-every 500"
SMOOTHING = [10.0**e for e in np.arange(-5, 1.5, 0.5)]


def gather(path: Path, megabytes: float) -> int:
    """The sources of this Python's standard library, no tests, in the order of the hashes of their names: which files are
    held out is then a matter of chance. Returns how many there are."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = [p.relative_to(library) for p in library.rglob("*.py")]
    names = [n for n in names if not {"test", "tests", "site-packages", "dist-packages"}.intersection(n.parts)]
    texts, size = [], 0
    for name in sorted(names, key=lambda n: hashlib.sha256(n.as_posix().encode()).digest()):
        if size >= megabytes * 1e6:
            break
        content = (library / name).read_bytes().decode(errors="replace").replace("\0", "")
        texts.append(f"# {name.as_posix()}\n{content.strip()}\n")
        size += len(texts[-1].encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(texts))
    return len(texts)


def unigram_bits(train: np.ndarray, test: np.ndarray, V: int, k: float) -> float:
    """-sum_t log2 p(test_t), all but the first token: that one has nothing before it.       ids [N], [M] -> bits"""
    counts = np.bincount(train, minlength=V)
    return float(-np.log2((counts[test[1:]] + k) / (len(train) + k * V)).sum())


def bigram_bits(train: np.ndarray, test: np.ndarray, V: int, k: float) -> float:
    """-sum_t log2 p(test_t | test_t-1), all but the first token.       ids [N], [M] -> bits"""
    pairs, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    wanted = test[:-1] * V + test[1:]
    at = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    both = np.where(pairs[at] == wanted, counts[at], 0)
    first = np.bincount(train[:-1], minlength=V)[test[:-1]]
    return float(-np.log2((both + k) / (first + k * V)).sum())


def tuned(bits, train: np.ndarray, test: np.ndarray, V: int) -> tuple[float, float]:
    """The smoothing that is best on the last twentieth of the training tokens, and the bits of the test with it."""
    first, last = split_text(train)
    k = min(SMOOTHING, key=lambda k: bits(first, last, V, k))
    return k, bits(train, test, V, k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/real_text"), help="directory of text and run")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="how much text to gather")
    parser.add_argument("--flags", default=FLAGS, help="of train_pretrain.py")
    args = parser.parse_args()
    text, folder = args.out / "stdlib.txt", args.out / "run"
    if not (folder / "config.json").exists():
        files = gather(text, args.megabytes)
        print(f"{text}: {files} files of the library of Python {sys.version.split()[0]}, {text.stat().st_size / 1e6:.1f} MB")
        train_pretrain.main(run.parse(train_pretrain.Config, ["--text", str(text), "--out", str(folder), *args.flags.split()]))

    last = read_metrics(folder)[-1]
    if "eval/bits_per_byte" not in last:
        raise SystemExit(f"{folder} is not finished; continue it with python train_pretrain.py --out {folder} --resume")
    tokenizer = run.tokenizer_from(run.load_checkpoint(folder))
    train, test = (np.array(tokenizer.encode(part)) for part in split_text(read_text(text)))
    size, V = tokenizer.num_bytes(test.tolist()), tokenizer.vocab_size
    print(f"\n{len(train):,} tokens to train on, {len(test):,} held out, {size / len(test):.2f} bytes each\n")
    print("| held-out text | bits per byte |\n|---|---|")
    for name, bits in (("unigram", unigram_bits), ("bigram", bigram_bits)):
        k, total = tuned(bits, train, test, V)
        print(f"| {name}, add-{k:.2g} | {total / size:.3f} |")
    print(f"| this model | {last['eval/bits_per_byte']:.3f} |")
    print(f"\nWhat it writes:\n\n{run.read_lines(folder / 'samples.jsonl')[-1]['text']}")


if __name__ == "__main__":
    main()
