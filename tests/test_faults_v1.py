"""The scripts of the first edition, killed, badly asked, on several processes: nothing is lost, nothing comes out different.

Every script is killed (SIGKILL) while it draws, steps, writes and plots, and must end with the same arrays as a run that
nobody killed. By default one moment each; the long form: FAULTS=20 python -m pytest -m slow -s (half an hour)."""
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import common_v1 as common
from conftest import alike, arrays_of

# three frozen scripts: their faults are the long form's, FAULTS=1 or more
pytestmark = [pytest.mark.slow, pytest.mark.skipif("FAULTS" not in os.environ, reason="the first edition, unchanged")]
ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("FAULTS", 1))  # moments for each script
STUDY = {"esn_genetic": "--study evolve"}
MOMENTS = "drawing", "stepping", "writing", "plotting"

# A child that counts the calls of what it does and kills itself in the N-th of one kind; without a kind it reports the counts.
CHILD = """
import importlib, json, os, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import common_v1 as common
calls = dict.fromkeys({moments!r}, 0)

def counted(kind, f):
    def g(*args, **more):
        calls[kind] += 1
        if (kind, calls[kind]) == {at!r}:
            print("killed while", kind, calls[kind], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **more)
    return g
places = (common, "draw_all"), (common.Fused, "__call__"), (os, "replace"), (common, "save_figure")
for kind, (owner, name) in zip({moments!r}, places):
    setattr(owner, name, counted(kind, getattr(owner, name)))
script = importlib.import_module({script!r})
status = script.main({line!r})
print("calls", json.dumps(calls), flush=True)
sys.exit(status)
"""


def child(script, line, at=None):
    code = CHILD.format(root=str(ROOT), at=at, moments=MOMENTS, script=f"exp_{script}", line=line)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


def line_of(script, path):
    return [*STUDY[script].split(), *"--smoke --steps 6 --runs 2 --compile off --save-every 0 --out".split(), str(path)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By script: what a run leaves that nobody killed, and how often it does what."""
    known = {}

    def of(script):
        if script not in known:
            path = tmp_path_factory.mktemp("whole") / script
            done = child(script, line_of(script, path))
            assert done.returncode == 0, done.stderr[-2000:]
            known[script] = arrays_of(path), json.loads(done.stdout.rsplit("calls ", 1)[1])
        return known[script]
    return of


@pytest.mark.parametrize("script", STUDY)
def test_killed_and_resumed_is_what_it_would_have_been(script, whole, tmp_path):
    expected, counts = whole(script)
    assert all(counts.values()), counts
    pick, seen = random.Random(script), []
    for kill in range(KILLS):
        kind = MOMENTS[(kill + list(STUDY).index(script)) % len(MOMENTS)]  # other kinds first for other scripts
        path, at = tmp_path / str(kill), (kind, pick.randrange(1, counts[kind] + 1))
        killed = child(script, line_of(script, path), at)
        assert killed.returncode == -signal.SIGKILL and "killed while" in killed.stdout, killed.stderr[-2000:]
        seen.append(killed.stdout.rsplit("killed while ", 1)[1].strip())
        again = child(script, [*line_of(script, path), "--resume"])
        assert again.returncode == 0, (seen, again.stderr[-2000:])
        found = arrays_of(path)
        assert found.keys() == expected.keys(), seen
        assert [k for k in found if not np.array_equal(found[k], expected[k], equal_nan=found[k].dtype.kind == "f")] == [], seen
    print(script, counts, seen)


PIECES = ["--steps", "--runs", "--seed", "--sweep", "--study", "--name", "--device", "--compile", "--threads", "--block",
          "--save-every", "--snapshots", "--figures", "--resume", "--force", "--plot-only", "--no-smoke", "0", "-1", "1e3", "7",
          "x", "", "nan", "1e999", "é", "seed=1,2", "lr=.1,.2", "d_model=", "=3", "=", "--", "-", "--lrr", "auto", "on", "a b",
          "../x", "99999999999999999999", "3", "2", "--help"]


@pytest.mark.parametrize("script", STUDY)
def test_random_command_lines(script, tmp_path, monkeypatch, capsys):
    """Flags are read and checked, folders made and refused; no study runs."""
    exp, pick, ended = importlib.import_module(f"exp_{script}"), random.Random(script), {0: 0, 2: 0}
    monkeypatch.chdir(tmp_path)
    fields = [f"--{f.replace('_', '-')}" for f in exp.Flags.__dataclass_fields__]
    pieces = PIECES + fields + list(exp.STUDIES)
    empty = {study: (lambda flags, folder: {}, lambda arrays, flags: [], {}) for study in exp.STUDIES}
    for i in range(500 if "FAULTS" in os.environ else 100):
        line = [pick.choice(pieces) for _ in range(pick.randrange(1, 7))]
        if i % 2:  # half of them begin well
            line = ["--study", pick.choice(list(exp.STUDIES)), *line]
        try:
            status = common.main(exp.Flags, empty, line)
        except SystemExit as end:  # --help
            status = end.code
        said = capsys.readouterr()
        assert status in (0, 2) and (status == 0 or said.err.count("\n") == 1), (line, status, said.err)
        ended[status] += 1
    print(script, ended)
    assert ended[0] and ended[2], ended


# ---- several processes ----------------------------------------------------------------------------------------------

def torchrun(ranks, line, *more):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port), *more,
            *line]


SEARCH = ["exp_esn_genetic.py", "--smoke", "--figures", "capacity", "--runs", "1"]


@pytest.mark.parametrize("line", [
    SEARCH,
    [*SEARCH, "--method", "ga", "--n-units", "200"]],  # four networks of this size are four kernels: the ranks share them
    ids=["5 searches", "1 search"])
def test_two_ranks_are_one_process_bit_for_bit(line, tmp_path):
    one, two = ([*line, "--out", str(tmp_path / name)] for name in ("one", "two"))
    assert subprocess.run([sys.executable, *one], cwd=ROOT, capture_output=True).returncode == 0
    said = subprocess.run(torchrun(2, two), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr[-2000:]
    assert said.stdout.count(str(tmp_path / "two")) == 1  # one rank prints
    assert alike(tmp_path / "one", tmp_path / "two") and not list((tmp_path / "two").rglob("part*/"))
    a, b = (json.loads((tmp_path / name / "summary.json").read_text())["runs"] for name in ("one", "two"))
    assert a == b
