"""Killed, interrupted, out of disk, damaged, badly asked, on several processes: nothing is lost, nothing comes out different.

Every script is killed (SIGKILL) while it draws, steps, writes and plots, and must end with the same arrays as a run that
nobody killed. By default one moment each; the long form: FAULTS=20 python -m pytest -m slow -s (half an hour)."""
import ctypes
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import common
from conftest import alike, arrays_of, stopped

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("FAULTS", 1))  # moments for each script
STUDY = {"addition": "--study digit --snapshots 2", "ngram_superposition": "--study dynamics", "iteration_head": "--study base",
         "layernorm_landscape": "--study landscape", "gpt2_paths": "--study train-mini", "esn_genetic": "--study evolve"}
MOMENTS = "drawing", "stepping", "writing", "plotting"

# A child that counts the calls of what it does and kills itself in the N-th of one kind; without a kind it reports the counts.
CHILD = """
import importlib, json, os, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import common
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_polite_end_saves_draws_and_says_how_to_go_on(number, tmp_path):
    line = ["--smoke", "--steps", "200000", "--compile", "off", "--out", str(tmp_path / "r")]
    process = subprocess.Popen([sys.executable, "exp_addition.py", *line], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (tmp_path / "r/script.py").exists() and time.time() < deadline:
        time.sleep(.1)
    time.sleep(2)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "go on with: python exp_addition.py --smoke --steps 200000" in said
    assert (tmp_path / "r/checkpoint.pt").exists() and list((tmp_path / "r").glob("*.png"))


def no_long_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # bytes: the scripts fit, the checkpoint does not


def no_privilege():
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: else root writes where nobody may


@pytest.mark.parametrize("before, mode", [(no_long_files, 0o755), (no_privilege, 0o555)], ids=["full disk", "read-only folder"])
def test_what_cannot_be_written_leaves_what_was_there(before, mode, tmp_path):
    """A run is stopped, can't go on where nothing can be written, and goes on afterwards as if nothing had been."""
    exp, path = importlib.import_module("exp_addition"), tmp_path / "r"
    line = ["--smoke", "--d-model", "64", "--compile", "off", "--save-every", "0"]
    assert exp.main([*line, "--out", str(tmp_path / "whole")]) == 0
    with stopped(lambda step: step >= 10):
        assert exp.main([*line, "--out", str(path)]) == 130
    read = lambda: {p.name: p.read_bytes() for p in path.iterdir() if p.name not in ("checksums.json", "config.json")}
    kept = read()
    path.chmod(mode)
    full = subprocess.run([sys.executable, "exp_addition.py", *line, "--resume", "--out", str(path)], cwd=ROOT,
                          capture_output=True, text=True, preexec_fn=before)
    path.chmod(0o755)
    assert full.returncode == 2 and full.stderr.count("\n") == 1 and "cannot write" in full.stderr, full.stderr
    assert read() == kept and common.Folder(path, None).read("checkpoint.pt") == kept["checkpoint.pt"]
    assert exp.main([*line, "--resume", "--out", str(path)]) == 0 and alike(path, tmp_path / "whole")


SMALL = "--smoke --digits 1 --d-model 4 --runs 1 --compile off".split()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run folder with a checkpoint, metrics and a summary."""
    path = tmp_path_factory.mktemp("damage") / "r"
    exp = importlib.import_module("exp_addition")
    assert exp.main([*SMALL, "--out", str(path)]) == 0
    return path


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.npz", "config.json", "summary.json"])
def test_every_damage_is_refused_in_one_line(name, small_run, tmp_path, capsys):
    path, pick = tmp_path / "r", random.Random(name)
    shutil.copytree(small_run, path)
    data = (path / name).read_bytes()
    folder = common.Folder(path, None)
    some = range(len(data)) if "FAULTS" in os.environ else {0, 1, len(data) - 1, *pick.choices(range(len(data)), k=100)}
    cuts = (data[:n] for n in some)
    places = pick.choices(range(len(data)), k=500)
    flips = (data[:at] + bytes([data[at] ^ pick.randrange(1, 256)]) + data[at + 1:] for at in places)
    for bad in itertools.chain(cuts, flips):
        (path / name).write_bytes(bad)
        with pytest.raises(common.Stop, match="damaged or foreign"):
            folder.read(name)
        if name == "checkpoint.pt":  # a stranger's file, which has no checksum: never a traceback, never code
            try:
                common.load_checkpoint(path / name)
            except common.Stop as stop:
                assert "\n" not in str(stop)
        elif name == "metrics.npz":
            try:
                common.read_npz(path / name, name)
            except common.Stop as stop:
                assert "\n" not in str(stop)
    print(name, f"{len(some)} cuts, 500 flips: all refused")
    exp = importlib.import_module("exp_addition")
    for flags in (["--resume"], ["--plot-only"], []):
        if name == "config.json":
            assert exp.main([*SMALL, *flags, "--out", str(path)]) == 2
            assert capsys.readouterr().err.count("\n") == 1


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


ADDITION = ["exp_addition.py", "--smoke", "--digit", "0", "--d-model", "4", "--steps", "30", "--compile", "off", "--block", "2"]


SEARCH = ["exp_esn_genetic.py", "--smoke", "--figures", "capacity", "--runs", "1"]


@pytest.mark.parametrize("line", [
    [*ADDITION, "--runs", "5"], [*ADDITION, "--runs", "1"], SEARCH,
    [*SEARCH, "--method", "ga", "--n-units", "200"]],  # four networks of this size are four kernels: the ranks share them
    ids=["5 runs", "1 run", "5 searches", "1 search"])
def test_two_ranks_are_one_process_bit_for_bit(line, tmp_path):
    one, two = ([*line, "--out", str(tmp_path / name)] for name in ("one", "two"))
    assert subprocess.run([sys.executable, *one], cwd=ROOT, capture_output=True).returncode == 0
    said = subprocess.run(torchrun(2, two), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr[-2000:]
    assert said.stdout.count(str(tmp_path / "two")) == 1  # one rank prints
    assert alike(tmp_path / "one", tmp_path / "two") and not list((tmp_path / "two").rglob("part*/"))
    a, b = (json.loads((tmp_path / name / "summary.json").read_text())["runs"] for name in ("one", "two"))
    assert a == b


@pytest.mark.parametrize("dies, restarts", [(1, 0), (0, 1)])
def test_a_rank_that_dies_is_named_and_the_run_goes_on(dies, restarts, tmp_path):
    """With one process, or by torchrun itself."""
    line = [*ADDITION, "--runs", "5", "--save-every", "0"]
    line[line.index("--steps") + 1] = "300"
    path = tmp_path / "r"
    job = subprocess.Popen(torchrun(2, [*line, "--out", str(path)], "--max-restarts", str(restarts)), cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (path / f"part{dies}/checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(.1)
    victim = next(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and is_rank(p, dies, str(path)))
    os.kill(victim, signal.SIGKILL)
    said = job.communicate(timeout=60)[1]
    assert f"rank {dies} died; the same command with --resume goes on" in said and (job.returncode == 0) == bool(restarts), said
    if not restarts:
        again = subprocess.run([sys.executable, *line, "--out", str(path), "--resume"], cwd=ROOT, capture_output=True)
        assert again.returncode == 0, again.stderr[-2000:]
    one = subprocess.run([sys.executable, *line, "--out", str(tmp_path / "one")], cwd=ROOT, capture_output=True)
    assert one.returncode == 0 and alike(path, tmp_path / "one")


def is_rank(process, rank, path):
    try:
        environment = (process / "environ").read_bytes().split(b"\0")
        return f"RANK={rank}".encode() in environment and path.encode() in (process / "cmdline").read_bytes() and \
            b"torch.distributed.run" not in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_more_runs_than_memory_holds_are_cut_into_parts(tmp_path, monkeypatch, capsys):
    exp = importlib.import_module("exp_addition")
    line = [*ADDITION[1:], "--runs", "9"]
    assert exp.main([*line, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(common, "MEMORY", 1)
    assert exp.main([*line, "--out", str(tmp_path / "parts")]) == 0
    assert "9 runs, 5 parts of 2 runs" in capsys.readouterr().out
    assert alike(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (common.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] and all((whole["params"][k] == parts["params"][k]).all() for k in whole["params"])


def test_parts_resume(tmp_path, monkeypatch, capsys):
    exp = importlib.import_module("exp_addition")
    line = [*ADDITION[1:], "--runs", "5", "--save-every", "0"]
    assert exp.main([*line, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(common, "MEMORY", 1)
    count, write = itertools.count(), common.Folder.checkpoint

    def stop_in_the_second_part(folder, *arguments, **more):
        if folder.path.name == "part1" and not next(count):
            os.kill(os.getpid(), signal.SIGINT)
        return write(folder, *arguments, **more)
    with monkeypatch.context() as patch:
        patch.setattr(common.Folder, "checkpoint", stop_in_the_second_part)
        assert exp.main([*line, "--out", str(tmp_path / "parts")]) == 130
    assert common.tools(["claims", str(tmp_path / "parts")]) == 2 and "before it had results" in capsys.readouterr().err
    monkeypatch.setattr(common, "MEMORY", 2 ** 30)  # the parts stay what they were
    assert exp.main([*line, "--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert alike(tmp_path / "whole", tmp_path / "parts")
