"""What tests share. The ordinary ones run on the CPU everywhere; test_cuda.py sees a card (-m cuda)."""
import contextlib
import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

if not any("cuda" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest

import common

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = """exp_addition exp_esn_genetic exp_gpt2_paths exp_iteration_head exp_layernorm_landscape
exp_ngram_superposition""".split()  # not a user's forks
LEARN = [name for name in SCRIPTS if name != "exp_esn_genetic"]  # by gradients, with common.train
TRAINS = {name: "--steps 24 --evals 6 --block 2 --snapshots" for name in LEARN}
TRAINS["exp_esn_genetic"] = "--steps 4"
TRAINS["exp_layernorm_landscape"] += " --block 30"
TRAINS["exp_gpt2_paths"] += " --study train-mini"  # its default study looks at one model
HOLDS = {"holds": True, "FALSE": False, "open": None}
STUDIES = [(name, study) for name in SCRIPTS for study in importlib.import_module(name).STUDIES]


def pytest_sessionstart(session):
    """`python -m pytest` uses two cores: a second process takes what is marked slow."""
    if not session.config.invocation_params.args:
        session.config.option.markexpr = "not slow"
        session.beside = subprocess.Popen([sys.executable, "-m", "pytest", "-m", "slow"],
                                          stdout=subprocess.PIPE, text=True)


def pytest_sessionfinish(session):
    if beside := getattr(session, "beside", None):
        print(f"\nThose marked slow:\n{beside.communicate()[0]}")
        session.exitstatus = session.exitstatus or beside.returncode


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Models that a test trains or fetches are its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=SCRIPTS)
def exp(request):
    return importlib.import_module(request.param)


def arrays_of(path):
    """Every number that a run leaves, by file."""
    found = {file.relative_to(path): np.load(file) for file in sorted(path.rglob("*.npz"))}
    return {f"{name} {k}": v for name, arrays in found.items() for k, v in arrays.items()}


def alike(a, b):
    """Whether two run folders hold the same bits."""
    x, y = arrays_of(a), arrays_of(b)
    return x.keys() == y.keys() and all(x[k].tobytes() == y[k].tobytes() for k in x)


def run(exp, line, path=None):
    """The exit status of a command line of a script."""
    words = line.split() if isinstance(line, str) else line
    return common.main(exp.Flags, exp.STUDIES, [*words, *(["--out", str(path)] if path else [])])


def python(*words, environment=(), cwd=ROOT, **more):
    """A finished process of this interpreter, in the project's folder; environment: None unsets."""
    variables = {k: v for k, v in (os.environ | dict(environment)).items() if v is not None}
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env=variables, **more)


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
    return {claim["id"]: HOLDS[claim["verdict"]] for claim in found}


def ledger(script, study):
    """{id: verdict} of a study in figures/; its heading (of a default study README) has their counts."""
    text = "# \n".join(path.read_text() for path in (ROOT / "figures").glob("*.md"))
    title = f"{script[4:]}, {common.study_name(study.__name__)}"
    heading, section = re.search(rf"### {title}: (.*)\n((?:\n|\|.*\n)+)", text).groups()
    rows = dict(re.findall(r"(?m)^\| (\S+) \| .* \| (\w+) \|$", section))
    found = {id: verdict for id, verdict in rows.items() if id not in ("claim", "---")}
    counts = [[*found.values()].count(verdict) for verdict in HOLDS]
    assert "{} holds, {} FALSE, {} open".format(*counts) in heading
    if study in [exp.STUDIES[0] for exp in map(importlib.import_module, SCRIPTS)]:
        row = "| {} ({} runs) | {} | {} | {} |".format(title, heading.split()[0], *counts)
        assert row in (ROOT / "README.md").read_text()
    return found


@contextlib.contextmanager
def interrupted(after):
    """Ctrl-C after so many readings of the logs, or generations."""
    calls = itertools.count(1)

    def counted(real):
        def call(*args):
            if next(calls) == after:
                os.kill(os.getpid(), 2)
            return real(*args)
        return call
    esn = importlib.import_module("exp_esn_genetic")
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (common.Program, "__call__"), (esn, "step"):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield
