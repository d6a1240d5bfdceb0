"""Killed, interrupted, out of disk, damaged, badly asked, on several processes, in strange surroundings:
nothing is lost, nothing comes out different, and no traceback. FAULTS=20 python -m pytest -m slow -s is
the long form."""
import ctypes
import datetime
import functools
import importlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest

import common
from conftest import ROOT, SCRIPTS, TRAINS, alike, interrupted, python, run

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("FAULTS", 1))  # moments for each script
exp = importlib.import_module("exp_addition")
TINY = "--smoke --digit 0 --d-model 4 --compile off --steps 60 --evals 6 --save-every 0".split()

# A child that counts the calls of what it does, and reports them or kills itself in one of them.
CHILD = """
import importlib, json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import common
from matplotlib.figure import Figure
calls = dict(stepping=0, writing=0, drawing=0)

def counted(kind, f):
    def g(*args, **more):
        calls[kind] += 1
        if (kind, calls[kind]) == {at!r}:
            print("killed while", kind, calls[kind], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **more)
    return g
script = importlib.import_module({script!r})
loop = (script, "step") if hasattr(script, "step") else (common.Program, "__call__")
kinds = ("stepping", *loop), ("writing", Path, "replace"), ("drawing", Figure, "savefig")
for kind, owner, name in kinds:
    setattr(owner, name, counted(kind, getattr(owner, name)))
status = common.main(script.Flags, script.STUDIES, {line!r})
print("calls", json.dumps(calls), flush=True)
sys.exit(status)
"""


def child(script, line, path, at=None):
    line = [*line.split(), "--out", str(path)]
    code = CHILD.format(root=str(ROOT), at=at, script=script, line=line)
    return python("-c", code)


@pytest.mark.parametrize("script", SCRIPTS if KILLS > 1 else SCRIPTS[:2])
def test_killed_and_resumed_is_what_it_would_have_been(script, tmp_path):
    line = f"--smoke --compile off --save-every 0 {TRAINS[script]}"
    done = child(script, line, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.rsplit("calls ", 1)[1])
    for i in range(3 * KILLS):
        kind, path = [*counts][i % 3], tmp_path / str(i)
        at = (kind, random.Random(i).randrange(1, counts[kind] + 1))
        killed = child(script, line, path, at)
        assert killed.returncode == -signal.SIGKILL and "killed while" in killed.stdout, killed.stderr
        assert run(importlib.import_module(script), f"{line} --resume", path) == 0, at
        assert alike(path, tmp_path / "whole"), at


def wait_for(path):
    """Until a file is there, two minutes at most."""
    deadline = time.time() + 120
    while not path.exists() and time.time() < deadline:
        time.sleep(.1)


def test_a_polite_end_saves_draws_and_says_how_to_go_on(tmp_path):
    line = ["--smoke", "--steps", "200000", "--compile", "off", "--out", str(tmp_path / "r")]
    process = subprocess.Popen([sys.executable, "exp_addition.py", *line], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    wait_for(tmp_path / "r/compiled.json")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert "go on with: python exp_addition.py --smoke --steps 200000" in said
    assert list((tmp_path / "r").rglob("checkpoint.pt")) and list((tmp_path / "r").glob("*.png"))


def test_ctrl_c_while_compiling_decides_nothing(tmp_path, monkeypatch, capsys):
    """It reaches the compiler, too; the resumed run compiles."""
    def interrupted_compiler(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("the compiler was interrupted")
    with monkeypatch.context() as patch:
        patch.setattr(common.torch, "compile", interrupted_compiler)
        assert run(exp, "--smoke --compile on", tmp_path / "r") == 130
    compiled = []
    monkeypatch.setattr(common.Program, "compile", lambda self: compiled.append(1) or "")
    assert run(exp, "--smoke --compile on --resume", tmp_path / "r") == 0 and compiled


def test_a_failing_compiler_leaves_eager_with_a_reason(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no\nway")
    monkeypatch.setattr(common.torch, "compile", fails)
    assert run(exp, "--smoke --compile on", tmp_path / "r") == 0
    assert "eager (compiling failed: RuntimeError: no)" in capsys.readouterr().out


def no_long_files():
    # bytes: the scripts fit, the checkpoint does not
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))


def no_privilege():
    # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: else root writes where nobody may
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


@pytest.mark.parametrize("before, mode", [(no_long_files, 0o755), (no_privilege, 0o555)],
                         ids=["full disk", "read-only folder"])
def test_what_cannot_be_written_leaves_what_was_there(before, mode, tmp_path):
    path, line = tmp_path / "r", [*TINY, "--runs", "1", "--d-model", "64"]
    assert run(exp, line, tmp_path / "whole") == 0
    with interrupted(after=3):
        assert run(exp, line, path) == 130
    kept = {p: p.read_bytes() for p in path.rglob("*.pt")}
    for p in (path, *path.glob("block*")):
        p.chmod(mode)
    full = python("exp_addition.py", *line, "--resume", "--out", path, preexec_fn=before)
    for p in (path, *path.glob("block*")):
        p.chmod(0o755)
    assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
    assert "cannot read or write" in full.stderr, full.stderr
    assert {p: p.read_bytes() for p in path.rglob("*.pt")} == kept
    assert run(exp, [*line, "--resume"], path) == 0 and alike(path, tmp_path / "whole")


def test_every_damage_is_refused_in_one_line(tmp_path, capsys):
    line, pick = "--smoke --digits 1 --d-model 4 --runs 1 --compile off", random.Random(0)
    assert run(exp, line, tmp_path) == 0
    for name in "checkpoint.pt", "metrics.npz", "summary.json", "config.json":
        data = (tmp_path / name).read_bytes()
        places = pick.choices(range(len(data)), k=50)
        bad = [data[:n] for n in (range(len(data)) if KILLS > 1 else [0, 1, len(data) - 1, *places])]
        for at in pick.choices(range(len(data)), k=200):
            bad.append(data[:at] + bytes([data[at] ^ pick.randrange(1, 256)]) + data[at + 1:])
        for content in bad:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(common.Stop, match="damaged or foreign"):
                common.read(tmp_path / name)
            try:  # a stranger's file, which has no checksum: never a traceback, never code
                common.decode(name, content)
            except common.Stop as stop:
                assert "\n" not in str(stop)
    assert run(exp, f"{line} --plot-only", tmp_path) == 2 and capsys.readouterr().err.count("\n") == 1


PIECES = ["", "a b", *"""--steps --runs --seed --sweep --study --name --device --compile --threads
--block --save-every --snapshots --figures --resume --force --plot-only --no-smoke 0 -1 1e3 7 x nan é
1e999 seed=1,2 lr=.1,.2 d_model= =3 = -- - --lrr auto on ../x 99999999999999999999 3 2 --help""".split()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_random_command_lines(script, tmp_path, monkeypatch, capsys):
    """Flags are read and checked, folders made and refused; no study runs."""
    exp, pick, ended = importlib.import_module(script), random.Random(script), {0: 0, 2: 0}
    monkeypatch.chdir(tmp_path)
    names = [common.study_name(s.__name__) for s in exp.STUDIES]
    for study in exp.STUDIES:
        monkeypatch.setattr(study, "compute", lambda flags, folder: {})
        for name in common.figures_of(study):
            monkeypatch.setattr(study, f"draw_{name}", lambda arrays, flags: None)
        monkeypatch.setattr(study, "claims", lambda arrays, say: None)
    monkeypatch.setattr(common, "fields_read", lambda room: {*common.fields_of(exp.Flags)})
    pieces = PIECES + [common.option(f) for f in common.fields_of(exp.Flags)] + names
    for i in range(500 if KILLS > 1 else 100):
        line = [pick.choice(pieces) for _ in range(pick.randrange(1, 7))]
        line = ["--study", pick.choice(names), *line] if i % 2 else line  # half of them begin well
        try:
            status = common.main(exp.Flags, exp.STUDIES, line)
        except SystemExit as end:  # --help
            status = end.code
        said = capsys.readouterr()
        assert status in (0, 2) and (status == 0 or said.err.count("\n") == 1), (line, status, said.err)
        ended[status] += 1
    assert ended[0] and ended[2], ended


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


# ---- surroundings -------------------------------------------------------------------------------------

def quick(path, **environment):
    done = python("exp_addition.py", "--study", "theory", "--out", path, environment=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("environment", [
    dict(HOME="/proc/nowhere", XDG_CACHE_HOME=None), dict(XDG_CACHE_HOME="relative"),
    dict(XDG_CACHE_HOME="/tmp/a space")], ids=str)
def test_the_compilers_cache_finds_a_place(environment, tmp_path):
    code = """import common, os
place = os.environ['TORCHINDUCTOR_CACHE_DIR']
print(place * os.path.isdir(place))"""
    done = python("-c", code, cwd=tmp_path, environment=environment | {
        "TORCHINDUCTOR_CACHE_DIR": None, "PYTHONPATH": ROOT})
    place = done.stdout.strip()
    assert os.path.isabs(place) and " " not in place and not list(tmp_path.rglob("small-networks"))


def test_a_notebooks_backend_and_a_strange_matplotlibrc(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: nothing\n")
    quick(tmp_path / "r", MPLBACKEND="module://matplotlib_inline.backend_inline",
          MATPLOTLIBRC=str(tmp_path / "matplotlibrc"))
    assert (tmp_path / "r/floors.png").exists()


def test_output_that_is_ascii_closed_or_ends(tmp_path):
    quick(tmp_path / "ascii", PYTHONIOENCODING="ascii", LC_ALL="C")
    for name, tail in ("closed", "2>&-"), ("both", ">&- 2>&-"), ("pipe", "| head -1"):
        line = f"{sys.executable} exp_addition.py --study theory --out {tmp_path / name} {tail}"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=ROOT, capture_output=True,
                              text=True, timeout=120)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (name, done)
        assert "Exception" not in done.stderr, (name, done)
        assert (tmp_path / name / "summary.json").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    import fcntl

    def no_locks(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert run(exp, "--study theory", tmp_path / "r") == 0
    assert "can't be locked" in capsys.readouterr().out


def test_a_second_process_is_refused(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    flags = common.cli(exp.Flags, exp.STUDIES, ["--study", "theory", "--out", str(tmp_path / "r")])
    with common.opened(flags, ROOT / "exp_addition.py"):
        assert run(exp, "--study theory", tmp_path / "r") == 2
    assert "another process works" in capsys.readouterr().err


def test_processes_that_never_come_are_not_waited_for(tmp_path, monkeypatch, capsys):
    lonely = dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    for name, value in lonely.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(common, "WORLD", 2)
    waits = functools.partial(common.rendezvous, timeout=datetime.timedelta(seconds=1))
    monkeypatch.setattr(common, "rendezvous", lambda url, timeout: waits(url))
    assert run(exp, "--study theory", tmp_path / "lonely") == 2
    error = capsys.readouterr().err
    assert "a process did not come" in error and error.count("\n") == 1


def test_a_lonely_WORLD_SIZE_means_nothing(tmp_path):
    quick(tmp_path / "r", WORLD_SIZE="2")  # torchrun sets more


def test_input_is_checked_under_python_O(tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    for line in ["--digit", "9"], ["--study", "anatomy", "--checkpoint", str(tmp_path / "bad.pt")]:
        done = python("-O", "exp_addition.py", *line, "--out", tmp_path / "r")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done


# ---- several processes --------------------------------------------------------------------------------

def torchrun(line, script="exp_addition"):
    words = "-m torch.distributed.run --nproc-per-node 2 --master-port".split()
    return [*words, free_port(), f"{script}.py", *line]


@pytest.mark.parametrize("script, line", [("exp_addition", [*TINY, "--runs", "5", "--block", "2"]),
                                          ("exp_esn_genetic", ["--smoke", "--runs", "2"])])
def test_two_processes_are_one_bit_for_bit(script, line, tmp_path):
    assert run(importlib.import_module(script), line, tmp_path / "one") == 0
    said = python(*torchrun([*line, "--out", tmp_path / "two"], script))
    assert said.returncode == 0, said.stderr[-2000:]
    assert said.stdout.count(str(tmp_path / "two")) == 1  # nothing is said twice
    assert alike(tmp_path / "one", tmp_path / "two")


def test_processes_that_die_leave_a_run_that_goes_on(tmp_path):
    """First one, then the other, that would else be waited for by torchrun half a minute."""
    line = [*TINY, "--runs", "3", "--block", "2", "--steps", "300"]
    words = torchrun([*line, "--out", str(tmp_path / "r")])
    job = subprocess.Popen([sys.executable, *words], cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "r/block1/checkpoint.pt")
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout
    for process in reversed(children.split()):
        subprocess.run(["kill", "-KILL", process])
        time.sleep(1)
    assert job.communicate(timeout=120) and job.returncode != 0
    assert run(exp, [*line, "--resume"], tmp_path / "r") == run(exp, line, tmp_path / "one") == 0
    assert alike(tmp_path / "r", tmp_path / "one")
