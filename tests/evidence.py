"""Make the evidence again, all of it in about nine hours: python tests/evidence.py [WORD ...]

Runs the commands of figures/NAME.md that have a time, and puts what comes out where it belongs: the times, the
ledgers and their counts (those of default commands also into README.md), and the figures that the pages show.
With words: only the commands and pages that hold one of them. A finished run is not made again; delete runs/ first.
What the findings say about the numbers is written by hand: read `git diff` beside it. The speed table of README.md
is printed by tests/bench.py.
"""
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common


def replace(path, pattern, new):
    """Replace the one place of a file that a pattern matches."""
    text, count = re.subn(pattern, lambda _: new, path.read_text())
    assert count == 1, f"{path}: {count} places match {pattern}"
    path.write_text(text)


def make(command, page):
    """Run a command; its time, ledger and figures go into its page."""
    print("python", command, flush=True)
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"python {command} ended with {done.returncode}: finish it (--resume), or delete its run")
    path, seconds = re.findall(r"(runs/\S+)  \((\d*)", done.stdout)[-1]
    run = ROOT / path
    if seconds:  # it was not finished already
        time = f"{seconds} s" if int(seconds) < 150 else f"{int(seconds) / 60:.0f} min"
        replace(page, rf"(?<=`python {re.escape(command)}` \| )[^|]*(?= \|)", time)
    ledger = common.read(run / "claims.md").decode()
    title, runs, *counts = re.match(r"### (.*): (\d+) runs; (\d+) holds, (\d+) FALSE, (\d+) open", ledger).groups()
    replace(page, rf"### {title}: .*\n\n(\|.*\n)+", ledger)
    if "--study" not in command:
        row = " | ".join([f"| {title} ({runs} runs)", *counts])
        replace(ROOT / "README.md", rf"(?m)^\| {title} \(.*$", f"{row} |")
    for figure in run.glob("*.png"):
        shown = page.parent / f"{page.stem}_{figure.name}"
        if shown.exists():
            shutil.copy(figure, shown)


if __name__ == "__main__":
    for page in sorted((ROOT / "figures").glob("*.md")):
        for command in re.findall(r"(?m)^\| `python (exp_.*?)` \| \d", page.read_text()):
            if not sys.argv[1:] or any(word in f"{page.stem} {command} " for word in sys.argv[1:]):
                make(command, page)
