"""What tests share. The ordinary tests run on the CPU everywhere; test_cuda.py alone sees a card (pytest -m cuda)."""
import contextlib
import importlib
import os
import re
import sys
from pathlib import Path

if not any("cuda" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest

import common
import common_v1

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["exp_addition", "exp_gpt2_paths", "exp_iteration_head", "exp_layernorm_landscape",
           "exp_ngram_superposition"]  # those that stand on the new common.py
TRAINS = dict.fromkeys(SCRIPTS, "") | {"exp_gpt2_paths": "--study train-mini"}  # its default study looks at one model
STUDIES = [(name, study) for name in SCRIPTS for study in importlib.import_module(name).STUDIES]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Models that a test trains or fetches are its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=SCRIPTS)
def exp(request):
    return importlib.import_module(request.param)


def arrays_of(path):
    """Every number that a run leaves, by file."""
    return {f"{file.relative_to(path)} {k}": v for file in sorted(path.rglob("*.npz")) for k, v in np.load(file).items()}


def alike(a, b):
    """Whether two run folders hold the same bits."""
    x, y = arrays_of(a), arrays_of(b)
    return x.keys() == y.keys() and all(np.array_equal(x[k], y[k], equal_nan=x[k].dtype.kind == "f") for k in x)


def run(exp, line, path=None):
    """The exit status of a command line of a script."""
    words = line.split() if isinstance(line, str) else line
    return common.main(exp.Flags, exp.STUDIES, [*words, *(["--out", str(path)] if path else [])])


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(script, line): the one line with which a command line ends that writes nothing."""
    def ends(exp, line):
        monkeypatch.chdir(tmp_path)
        assert run(exp, line) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not list(tmp_path.iterdir())
        return error
    return ends


def judged(study, arrays):
    """{id: holds} of a study's claims on arrays."""
    found = []
    study.claims(arrays, lambda *words: found.append(common.judge(*words)))
    return {claim["id"]: claim["holds"] for claim in found}


def ledger(experiment, study, is_default=False):
    """{id: verdict} of a study in figures/, whose heading (and, of a default study, README) has the counts of the verdicts."""
    text = "# \n".join(path.read_text() for path in (ROOT / "figures").glob("*.md") if path.name != "ledger.md")
    heading, section = re.search(rf"### {experiment}, {study}: (.*)\n((?:\n|\|.*\n)+)", text).groups()
    rows = dict(re.findall(r"(?m)^\| (\S+) \| .* \| (\w+) \|$", section))
    found = {id: verdict for id, verdict in rows.items() if id not in ("claim", "---")}
    counts = [[*found.values()].count(verdict) for verdict in ("holds", "FALSE", "open")]
    assert "{} holds, {} FALSE, {} open".format(*counts) in heading
    if is_default:
        row = "| {}, {} ({} runs) | {} | {} | {} |".format(experiment, study, heading.split()[0], *counts)
        assert row in (ROOT / "README.md").read_text()
    return found


@contextlib.contextmanager
def interrupted(after):
    """Ctrl-C after so many readings of the logs."""
    real, calls = common.Program.__call__, []

    def call(self, steps):
        calls.append(steps)
        if len(calls) == after:
            os.kill(os.getpid(), 2)
        return real(self, steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Program, "__call__", call)
        yield calls


# ---- the first edition, until its last script has moved --------------------------------------------------------------

@contextlib.contextmanager
def stopped(when):
    """Ctrl-C just before the first checkpoint of which when(step) is true."""
    checkpoint = common_v1.Folder.checkpoint

    def asked(self, fused, step, *rest, **more):
        self.stop["asked"] |= when(step)
        return checkpoint(self, fused, step, *rest, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common_v1.Folder, "checkpoint", asked)
        yield


def cut(main, line, when, path):
    """Whether a run that is stopped and resumed leaves the same bits as one in one piece; with the steps of its first part."""
    whole, halves = (path / name for name in ("whole", "cut"))
    assert main([*line, "--out", str(whole)]) == 0
    with stopped(when):
        assert main([*line, "--out", str(halves)]) == 130
    first = len(np.load(next(halves.rglob("metrics.npz")))["loss"])
    assert main([*line, "--out", str(halves), "--resume"]) == 0
    return alike(whole, halves), first
