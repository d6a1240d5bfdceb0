"""common.py: flags, runs, random streams, optimisers, the fused loop, the run folder, stopping and resuming, claims."""
import base64
import csv
import dataclasses
import errno
import hashlib
import importlib
import io
import itertools
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

import common
from common import Stop, flag
from exp_addition import Flags, main, sample, start, step_of

ROOT = Path(common.__file__).parent
BASE = "--smoke --compile off --digit 0".split()
SWEEP = "--sweep d_model=4,8 --steps 40 --evals 6".split()  # two groups, each trained in pieces of 1, 2, 3, 10 and 24 steps


@dataclasses.dataclass
class F(common.Flags):
    d_model: int = flag(32, "width", low=1, high=4096)
    n_heads: int = flag(4, "heads", low=1)
    lr: float = flag(1e-3, "learning rate", low=0, number=True)
    mlp: bool = flag(True, "have the MLP")
    law: Literal["uniform", "zipf"] = flag("uniform", "law of 100% of the data")

    per_study: ClassVar[dict] = {"deep": dict(d_model=64, steps=7, sweep=["lr=1,2", "mlp=0,1"]), "smoke": dict(steps=5)}

    def check(self):
        if self.d_model % self.n_heads:
            raise Stop(f"--d-model {self.d_model} must be divisible by --n-heads {self.n_heads}")


def cli(line=""):
    return common.cli(F, line.split())


def run(path, *flags):
    return main([*BASE, "--out", str(path), *flags])


def error(capsys, path, *flags):
    """The one line of a command that must fail."""
    capsys.readouterr()
    assert run(path, *flags) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("exp_addition.py: ")
    return err


def crash(*_, **__):
    raise RuntimeError("crash\nsecond line")


def in_piece(monkeypatch, calls, act):
    """Call act() at the start of that piece of training; returns the list of all pieces' lengths."""
    real, pieces = common.Fused.__call__, []

    def call(self, data):
        pieces.append(len(data))
        if len(pieces) == calls:
            act()
        return real(self, data)
    monkeypatch.setattr(common.Fused, "__call__", call)
    return pieces


def bits(x):
    """Nested dicts of arrays or tensors, comparable to the last bit."""
    if isinstance(x, dict):
        return {k: bits(v) for k, v in x.items()}
    x = np.asarray(x)
    return str(x.dtype), x.shape, hashlib.sha256(x.tobytes()).hexdigest()


def summary(path, **options):
    return json.loads((path / "summary.json").read_text(), **options)


def results(path):
    """All that the runs of a folder have found, comparable to the last bit."""
    found = {p.relative_to(path): bits(common.read_npz(p, p)) for p in path.rglob("*.npz")}
    for p in path.rglob("checkpoint.pt"):
        found[p.relative_to(path)] = bits({k: common.load_checkpoint(p)[k] for k in ("params", "optimiser", "snapshots")})
    return found, json.dumps(summary(path)["runs"])


def crashed(path, piece, *flags):
    """A run whose process dies in that piece of training."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        in_piece(patch, piece, crash)
        run(path, "--save-every", "0", *flags)


def saved_bytes(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Run folders to look at: one finished, and a sweep over shapes."""
    at = tmp_path_factory.mktemp("made")
    assert run(at / "finished") == run(at / "sweep", *SWEEP) == 0
    return at


@pytest.fixture
def done(made, tmp_path):
    """A copy of the finished run, to spoil."""
    return shutil.copytree(made / "finished", tmp_path / "done")


@pytest.fixture(autouse=True)
def unrendered(monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: file.write(b"picture"))


# ---- Flags ----------------------------------------------------------------------------------------------------------

def test_flags_are_read():
    f = cli("--steps 1e4 --d_model 64 --no-mlp --law zipf --lr 3e-3 --save_every=2")
    assert (f.steps, f.d_model, f.mlp, f.law, f.lr, f.save_every) == (10000, 64, False, "zipf", 3e-3, 2.)
    assert type(f.steps) is int and type(f.save_every) is float and cli("--no-mlp --mlp").mlp and cli("--plot_only").plot_only
    assert cli("--d-model 64") == cli("--d_model 64") != cli()


def test_the_command_line_wins_over_smoke_over_the_study():
    assert [cli(s).steps for s in ("", "--study deep", "--study deep --smoke", "--smoke --steps 9")] == [1000, 7, 5, 9]
    assert cli("--study deep --smoke").d_model == 64 and cli("--study deep").sweep == ["lr=1,2", "mlp=0,1"]
    assert cli("--study deep --lr 3").sweep == ["mlp=0,1"]  # a fixed field leaves the study's sweep
    assert cli("--study deep --sweep n_heads=1,2").sweep == ["n_heads=1,2"]


@pytest.mark.parametrize("line, words", [
    ("--lrr 1", "unknown flag --lrr; did you mean --lr?"), ("--d-mod 8", "unknown flag --d-mod"), ("extra", "extra"),
    ("--steps 1.5", "--steps: '1.5' is not a whole number"), ("--steps 1e400", "whole number"), ("--lr", "--lr"),
    ("--lr fast", "--lr: 'fast'"), ("--lr nan", "finite"), ("--lr inf", "finite"), ("--lr=-1", "--lr -1.0 must be at least 0"),
    ("--seed -1", "--seed -1 must be at least 0"), ("--d-model 5000", "at most 4096"), ("--law zip", "did you mean zipf?"),
    ("--d-model 30", "--d-model 30 must be divisible by --n-heads 4"), ("--mlp=false", "--mlp"), ("--sweep law=a", "'a'"),
    ("--sweep lr", "field=v1,v2"), ("--sweep lr=", "field=v1,v2"), ("--sweep lr=1,x", "'x'"), ("--sweep lr=1,", "''"),
    ("--sweep lrr=1", "did you mean lr?"), ("--sweep lr=1,-1", "-1"), ("--sweep lr=1 lr=2", "twice"),
    ("--sweep d_model=16,30", "--d-model 30 must be divisible"), ("--sweep seed=1,2", "not a field to sweep"),
    ("--sweep device=cpu", "not a field to sweep"), ("--sweep mlp=maybe", "'maybe'"), ("--sweep d_model=8,5000", "4096")])
def test_bad_flags_are_one_line(line, words):
    with pytest.raises(Stop) as stop:
        cli(line)
    assert words in str(stop.value) and "\n" not in str(stop.value)


def test_a_bad_flag_exits_2_and_writes_nothing(tmp_path, capsys):
    for line, words in ("--lr abc", "'abc'"), ("--figures nonsense", "--figures"), ("--plot-only", "no run to draw"):
        assert words in error(capsys, tmp_path / "run", *line.split())
    assert not list(tmp_path.iterdir())
    assert "--batch" in error(capsys, tmp_path / "run", "--batch", "1e13")  # out of memory: which flag to lower


def test_help_shows_every_flag_and_default(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        cli("--help")
    text = re.sub(r"\s", "", capsys.readouterr().out)
    for f in dataclasses.fields(F):
        default = "" if f.default is dataclasses.MISSING else f.default
        assert f"--{f.name.replace('_', '-')}" in text and re.sub(r"\s", "", f"{f.metadata['help']}[{default}]") in text


def test_names_are_the_changed_flags():
    name = lambda line: common.shorthand(cli(line))
    lines = ["", "--study deep", "--d-model 64 --force --out x", "--lr 3e-3", "--lr .25", "--no-mlp", "--smoke"]
    assert [name(s) for s in lines] == ["default", "deep", "d_model64", "lr3e-3", "lr0.25", "no_mlp", "smoke"]
    long = name("--sweep lr=" + ",".join(map(str, range(100))))
    assert len(long) < 100 and long != name("--sweep lr=" + ",".join(map(str, range(101))))


# ---- Runs and random streams ----------------------------------------------------------------------------------------

def test_48_runs_of_the_design():
    line = "--digit 0 --seed 5 --runs 8 --sweep weight_decay=0,0.25,1 d_model=16,32"
    groups = common.groups_of_runs(common.cli(Flags, line.split()))
    assert [{r.d_model for r in g} for g in groups] == [{16}, {32}]
    for g in groups:
        assert [(r.weight_decay, r.seed) for r in g] == list(itertools.product([0, .25, 1], range(5, 13)))
        assert common.numbers(g)["weight_decay"].tolist() == [0] * 8 + [.25] * 8 + [1] * 8
    ints, = common.groups_of_runs(cli(), [dict(lr=0), dict(lr=.25)])  # an int where the field is a float
    assert common.numbers(ints)["lr"].tolist() == [0, .25]


def test_random_streams_differ_and_are_the_same_in_every_process():
    draw = lambda *key: tuple(torch.rand(4, generator=common.generator(*key)).tolist())
    assert len({draw(*key) for key in itertools.product((0, 1, 11), ("init", "train"), (0, 1, 11))}) == 18
    code = "import common, torch; print(torch.rand(4, generator=common.generator(1, 'train', 1)).tolist())"
    other = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert tuple(json.loads(other)) == draw(1, "train", 1) == draw(1, "train", 1)


def test_marks_segments_and_smooth():
    assert common.marks(1000, 7) == [0, 1, 4, 16, 63, 251, 1000] and common.marks(3, 99) == [0, 1, 2, 3]
    assert common.marks(9, 0) == [] and common.segments(250, 250) == []
    assert common.segments(0, 250, {30, 250}) == [(0, 30), (30, 100), (100, 200), (200, 250)]
    assert common.segments(120, 250, {30}) == [(120, 200), (200, 250)]
    assert common.smooth(np.arange(5.), 2).tolist() == [0, .5, 1.5, 2.5, 3.5]
    assert common.smooth(np.float32([1e3] * 50 + [1e-6] * 50), 10)[-1] == pytest.approx(1e-6, rel=.01)


# ---- Optimisers and the fused loop ----------------------------------------------------------------------------------

@pytest.mark.parametrize("ours, begin, theirs, names", [
    (common.sgd, common.sgd_init, torch.optim.SGD, ["lr"]),
    (common.sgd, common.sgd_init, torch.optim.SGD, ["lr", "momentum", "weight_decay"]),
    (common.adamw, common.adam_init, torch.optim.Adam, ["lr", "beta1", "beta2", "eps"]),
    (common.adamw, common.adam_init, torch.optim.AdamW, ["lr", "weight_decay", "beta1", "beta2", "eps"])])
def test_optimisers_are_those_of_torch(ours, begin, theirs, names):
    values = dict(lr=[.1, .01, .3], momentum=[0., .9, .5], weight_decay=[0., .1, 1.], eps=[1e-8, 1e-3, 1e-12],
                  beta1=[.9, .5, 0.], beta2=[.999, .98, .9])
    g = torch.Generator().manual_seed(0)
    first = {k: torch.randn(3, *shape, generator=g, dtype=torch.float64) for k, shape in dict(w=(4, 2), b=(5,), c=()).items()}
    grads = lambda p, t: {k: torch.sin(x + t) + .1 * x for k, x in p.items()}
    hyper = {n: torch.tensor(values[n], dtype=torch.float64) for n in names}
    fresh = begin(common.run_of(first, 0))
    params, state = first, common.stack([fresh] * 3)
    for t in range(20):
        params, state = torch.vmap(lambda p, g, s, h: ours(p, g, s, **h))(params, grads(params, t), state, hyper)
    for r in range(3):
        options, expected = {n: values[n][r] for n in names}, {k: x[r].clone() for k, x in first.items()}
        betas = {"betas": (options["beta1"], options["beta2"])} if "beta1" in options else {}
        optimiser = theirs(expected.values(), **betas, **{k: v for k, v in options.items() if "beta" not in k})
        alone, alone_state = common.run_of(first, r), fresh
        for t in range(20):
            alone, alone_state = ours(alone, grads(alone, t), alone_state, **options)  # plain floats, no vmap
            for k, x in grads(expected, t).items():
                expected[k].grad = x
            optimiser.step()
        for k, x in expected.items():
            assert torch.allclose(params[k][r], x, rtol=0, atol=1e-10) and torch.allclose(alone[k], x, rtol=0, atol=1e-10)
            assert not torch.allclose(x, first[k][r], atol=.01)


@pytest.mark.parametrize("d_model, n_heads, block", [(2, 2, 16), (16, 4, 4), (64, 2, 1)])
def test_batched_is_alone_bit_for_bit(d_model, n_heads, block):
    def fused(runs):
        data = torch.stack([sample(r, common.generator(r.seed, "train"), 4, r.batch) for r in runs], 1)
        f = common.Fused(step_of(runs[0]), common.stack(start(r) for r in runs), common.numbers(runs), data[0], runs[0], 4)
        return f, f(data)
    flags = common.cli(Flags, [*BASE, "--d-model", str(d_model), "--n-heads", str(n_heads), "--runs", "3"])
    runs, = common.groups_of_runs(flags, [dict(lr=.01), dict(lr=.1)])
    f, logs = fused(runs)
    assert f.size == block and logs["loss"].shape == (4, 6) and len(logs["loss"][-1].unique()) == 6
    for part in slice(5, 6), slice(2, 5):
        g, part_logs = fused(runs[part])
        assert bits(g.state()) == bits(common.run_of(f.state(), part))
        assert bits(part_logs) == bits(common.run_of(logs, (slice(None), part)))


def least_squares(R, compile, steps=5, turn=dict):
    """R runs of a step that compiles in seconds, and data for 5 steps. turn changes the order of the returned state."""
    def step(state, x, number):
        grads, loss = torch.func.grad_and_value(lambda p: ((x @ p["w"] + p["b"] - x.sum(1)) ** 2).mean())(state["params"])
        params, optimiser = common.adamw(state["params"], grads, state, number["lr"])
        return turn({"params": turn(params), **optimiser}), {"loss": loss}
    g = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(3, 8, generator=g)[:R], "b": torch.randn(3, generator=g)[:R]}
    state = {"params": params, **common.stack([common.adam_init(common.run_of(params, 0))] * R)}
    data = torch.randn(5, 3, 32, 8, generator=g)[:, :R]
    return common.Fused(step, state, {"lr": torch.tensor([.1, .2, .3])[:R]}, data[0], cli(f"--compile {compile}"), steps), data


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_is_eager_to_tolerance_and_alone_bit_for_bit():
    (eager, data), (many, _), (one, _) = least_squares(3, "off"), least_squares(3, "on"), least_squares(1, "on")
    assert many.compiled and many.compile_seconds > 0 and not eager.compiled
    logs, alone = many(data), one(data[:, :1])
    assert torch.allclose(eager(data)["loss"], logs["loss"], rtol=1e-5)
    assert torch.allclose(eager.state()["params"]["w"], many.state()["params"]["w"], atol=1e-5)
    assert bits((many.state()["params"]["w"])[:1]) == bits(one.state()["params"]["w"])
    assert bits(logs["loss"][:, :1]) == bits(alone["loss"])


def test_a_plain_step_may_do_what_no_graph_can():
    def step(state, seed, number):
        seen.append(int(number["run"]))
        g = torch.Generator().manual_seed(int(seed))
        state["params"]["w"] += torch.rand(3, generator=g)  # in place, from its own generator
        return {"params": dict(state["params"])}, {"loss": state["params"]["w"].max() if seed % 2 else torch.tensor(0.)}
    seen, state = [], {"params": {"w": torch.zeros(3, 3)}}
    f = common.Fused(step, state, {"run": torch.arange(3)}, torch.arange(3), cli("--compile on"), 5, plain=True)
    logs = f(torch.arange(6).view(2, 3))
    assert not f.compiled and f.size == 1 and seen == [0, 0, 1, 1, 2, 2] and logs["loss"].shape == (2, 3)
    expected = sum(torch.rand(3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 4))
    assert torch.equal(f.state()["params"]["w"][1], expected) and not state["params"]["w"].any()


def test_trials_move_nothing_states_are_copies_and_update_by_name(monkeypatch):
    (f, data), (untried, _) = least_squares(3, "auto"), least_squares(3, "off", turn=lambda d: dict(reversed(d.items())))
    kept = f.state()
    before = bits(kept)
    assert not f.compiled and "eager would take" in f.why and before == bits(untried.state())
    f(data), untried(data)
    assert before == bits(kept) != bits(f.state()) == bits(untried.state())
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    assert least_squares(3, "auto", steps=10 ** 9)[0].compiled


def test_a_failing_compiler_leaves_eager_with_a_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "compile", crash)
    (f, data), (eager, _) = least_squares(3, "on"), least_squares(3, "off")
    assert not f.compiled and "crash" in f.why and "\n" not in f.why and bits(f(data)) == bits(eager(data))
    capsys.readouterr()
    assert run(tmp_path, "--compile", "on") == 0 and "crash" in capsys.readouterr().out  # one line says which and why
    decision, = json.loads((tmp_path / "config.json").read_text())["compiled"]
    assert not decision["compiled"] and "crash" in decision["why"]


# ---- The run folder -------------------------------------------------------------------------------------------------

def test_files_of_a_run(made):
    path = made / "finished"
    sums = json.loads((path / "checksums.json").read_text())
    assert {p.name for p in path.iterdir()} - {"checksums.json", ".lock"} == set(sums) >= set(
        "config.json metrics.npz arrays.npz summary.csv summary.json checkpoint.pt script.py common.py".split())
    assert all(hashlib.sha256((path / n).read_bytes()).hexdigest() == np.ravel(s)[-1] for n, s in sums.items())
    config, metrics = json.loads((path / "config.json").read_text()), common.read_npz(path / "metrics.npz", "metrics.npz")
    assert config["flags"].keys() == {f.name for f in dataclasses.fields(Flags)} and config["finished"]
    assert config["argv"] == [*BASE, "--out", str(path)] and config["compiled"][0]["why"] == "--compile off"
    assert metrics["step"].tolist() == list(range(1, 21)) and metrics["loss"].shape == (20, 2)
    assert [(r["seed"], r["diverged"]) for r in summary(path)["runs"]] == [(0, False), (1, False)]
    assert [(r["seed"], r.get("d_model")) for r in summary(made / "sweep")["runs"]] == [(0, 4), (1, 4), (0, 8), (1, 8)]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    def full(source, target, replace=os.replace):
        if Path(target).name in broken:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)
    monkeypatch.setattr(os, "replace", full)
    folder, broken = common.Folder(tmp_path, None), []
    folder.write("a", b"old")
    for name in "a", "a", "checksums.json":
        broken[:] = [name]
        with pytest.raises(Stop, match="No space left"):
            folder.write("a", b"new")
        assert common.Folder(tmp_path, None).read("a") == b"old"


@pytest.mark.parametrize("name, flags", [("arrays.npz", ["--plot-only"]), ("config.json", []), ("script.py", [])])
def test_a_changed_byte_is_refused_by_name(made, done, capsys, name, flags):
    data = bytearray((done / name).read_bytes())
    data[len(data) // 2] ^= 1
    (done / name).write_bytes(data)
    assert f"{name} is damaged" in error(capsys, done, *flags)
    (done / "checksums.json").write_text("{")
    assert "checksums.json is damaged" in error(capsys, done, *flags)
    assert run(done, "--force") == 0 and results(done) == results(made / "finished")  # what the message promises


def test_bad_npz_files_are_refused():
    good, pickled, npy = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez_compressed(good, a=np.arange(2000)), np.savez(pickled, a=np.array([{}])), np.save(npy, np.arange(3))
    good = good.getvalue()
    bad = [pickled.getvalue(), npy.getvalue(), good[:-30], b"", b"PK", pickle.dumps({})]
    bad += [good[:i] + bytes([good[i] ^ 0x55]) + good[i + 1:] for i in range(150, len(good) - 150, 50)]
    assert len(common.read_npz(io.BytesIO(good), "good.npz")["a"]) == 2000 and len(bad) > 20
    for data in bad:
        with pytest.raises(Stop, match="bad.npz"):
            common.read_npz(io.BytesIO(data), "bad.npz")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bad_checkpoints_are_refused_and_never_executed(made, tmp_path):
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, (str(tmp_path / "executed"),))})()
    good = (made / "finished/checkpoint.pt").read_bytes()
    saved = common.load_checkpoint("good.pt", good)
    changed = {"params": {}}, {"params": {"a": 3}}, {"params": evil}, {"step": "1"}, {"optimiser": None}
    for data in (b"", b"text", good[:len(good) // 2], good[:-1], pickle.dumps(evil), saved_bytes([1]), saved_bytes({}),
                 *(saved_bytes(saved | c) for c in changed)):
        (tmp_path / "bad.pt").write_bytes(data)
        with pytest.raises(Stop, match="bad.pt"):
            common.load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists()


def test_an_unfinished_run_needs_resume_and_its_own_checkpoint(made, tmp_path, capsys):
    crashed(tmp_path, 2)
    assert "--resume" in error(capsys, tmp_path)
    replace = lambda data: common.Folder(tmp_path, None).write("checkpoint.pt", saved_bytes(data))
    saved = common.load_checkpoint(tmp_path / "checkpoint.pt")
    name, p = next(iter(saved["params"].items()))
    for params in saved["params"] | {name: p[:1]}, saved["params"] | {"more": p}, {"more": p}:
        replace(saved | {"params": params})
        assert re.search(f"checkpoint.pt is of another shape: params.({name}|more)", error(capsys, tmp_path, "--resume"))
    replace(saved)
    assert run(tmp_path, "--resume") == 0 and results(tmp_path) == results(made / "finished")


def test_a_second_process_is_refused(made, done, capsys):
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # it holds the lock until its stdin is closed
    with subprocess.Popen([sys.executable, "-c", code, done / ".lock"], **pipes) as holder:
        holder.stdout.readline()
        assert "another process" in error(capsys, done, "--force")
    assert results(done) == results(made / "finished") and run(done) == 0


def test_a_finished_run_says_so_and_is_what_it_was(made, done, monkeypatch, capsys):
    monkeypatch.setattr(common, "Fused", crash)
    for flags in [], ["--resume"], ["--compile", "auto", "--save-every", "7"]:
        assert run(done, *flags) == 0 and "finished already" in capsys.readouterr().out
    assert "another configuration: lr 0.001 -> 0.5;" in error(capsys, done, "--lr", "0.5", "--save-every", "7")
    for name in "script.py", "common.py":
        common.Folder(done, None).write(name, b"older")
        assert re.search(f"{name}.* changed .*--force.*--name", error(capsys, done))
    assert results(done) == results(made / "finished")


@pytest.mark.parametrize("files", [["thesis.tex"], ["config.json", "model.bin"], [".lock", "thesis.tex"]])
def test_a_foreign_folder_is_left_alone(tmp_path, capsys, files):
    for name in files:
        (tmp_path / name).write_text("{}")
    for force in [], ["--force"]:
        assert str(tmp_path) in error(capsys, tmp_path, *force)
        assert [(tmp_path / name).read_text() for name in files] == ["{}"] * len(files)


def test_force_starts_again_inside_the_folder_only(made, done, tmp_path, monkeypatch):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious").touch()
    (done / "link").symlink_to(tmp_path / "outside")
    pieces = in_piece(monkeypatch, 0, None)
    assert run(done, "--force", "--lr", "0.1") == 0 and sum(pieces) == 20 and (tmp_path / "outside/precious").exists()
    assert results(done) != results(made / "finished") and not (done / "link").exists()


def test_plot_only_redraws_and_trains_nothing(made, done, monkeypatch, capsys):
    pictures = set(done.glob("*.png"))
    assert pictures and all(p.read_bytes()[:4] == b"\x89PNG" and not p.unlink() for p in pictures)
    monkeypatch.setattr(common, "Fused", crash)
    assert run(done, "--plot-only") == 0 and set(done.glob("*.png")) == pictures
    assert results(done) == results(made / "finished")
    assert "--force" in error(capsys, done, "--plot-only", "--force")
    assert results(done) == results(made / "finished")


# ---- Stopping and resuming ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("piece, step", [(3, 6), (4, 20)])  # killed in the middle of a chunk, and at its end
def test_20_steps_and_20_are_40_bit_for_bit(tmp_path, monkeypatch, capsys, piece, step):
    flags = "--steps 40 --evals 4 --snapshots 4 --resume".split()
    monkeypatch.setattr(common, "CHUNK", 20)
    assert run(tmp_path / "whole", *flags) == 0 and "starting afresh" in capsys.readouterr().out
    crashed(tmp_path / "parts", piece, *flags)
    assert common.load_checkpoint(tmp_path / "parts/checkpoint.pt")["step"] == step
    pieces = in_piece(monkeypatch, 0, None)
    assert run(tmp_path / "parts", *flags) == 0 and sum(pieces) == 40 - step
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


@pytest.mark.parametrize("first, then, compilations", [("on", "off", 2), ("off", "on", 0)])
def test_resume_keeps_the_decision_to_compile(tmp_path, monkeypatch, first, then, compilations):
    built = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: built.append(f) or f)
    crashed(tmp_path, 2, "--compile", first)
    assert run(tmp_path, "--resume", "--compile", then) == 0 and len(built) == compilations


def test_ctrl_c_stops_a_sweep_in_its_first_group_and_it_resumes(made, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        pieces = in_piece(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run(tmp_path / "run", *SWEEP, "--resume") == 130 and pieces == [1, 2]
    assert "starting afresh" in capsys.readouterr().out
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    common.Folder(tmp_path / "old", None).write("common.py", b"older")
    assert "common.py changed" in error(capsys, tmp_path / "old", *SWEEP, "--resume")
    assert run(tmp_path / "run", *SWEEP, "--resume") == 0 and results(tmp_path / "run") == results(made / "sweep")


def test_ctrl_c_prints_the_command_that_resumes(tmp_path):
    path, flags = tmp_path / "with space", ["--steps", "150", "--save-every", "0"]
    process = subprocess.Popen([sys.executable, "exp_addition.py", *BASE, *flags, "--out", str(path)], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (path / "checkpoint.pt").exists():
        time.sleep(.01)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and common.load_checkpoint(path / "checkpoint.pt")["step"] < 150
    assert not json.loads((path / "config.json").read_text())["finished"] and list(path.glob("*.png"))
    python, script, *argv = shlex.split(re.search("go on with: (.*)", out)[1])
    assert script == "exp_addition.py" and main(argv) == 0 and run(tmp_path / "whole", *flags) == 0
    assert results(path) == results(tmp_path / "whole")


def test_a_diverged_run_is_marked_and_its_neighbour_untouched(made, tmp_path, capsys):
    assert run(tmp_path, "--sweep", "lr=1e30,1e-3") == 0 and "2 of 4 runs diverged" in capsys.readouterr().out
    loss, alone = (common.read_npz(p / "metrics.npz", p)["loss"] for p in (tmp_path, made / "finished"))
    assert np.isnan(loss[-1, :2]).all() and bits(loss[:, 2:]) == bits(alone)
    rows = summary(tmp_path, parse_constant=crash)["runs"]  # bare NaN is no JSON
    assert [(r["lr"], r["diverged"]) for r in rows] == [(1e30, True)] * 2 + [(1e-3, False)] * 2


# ---- Claims and comparison ------------------------------------------------------------------------------------------

def test_verdicts():
    assert [common.vote(x) for x in ([1, 1, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0], [1, 1])] == [True, False, None, None]
    assert common.spread([3., 1., 2.]) == "2 [1, 3], 3 seeds" and "no value" in common.spread([np.inf])
    assert common.spread([1., np.nan, 3.]) == "2 [1, 3], 3 seeds, 1 without a value"
    assert [common.claim(*"abcde", holds)["holds"] for holds in (np.float64(1) > 0, np.False_, None)] == [True, False, None]


def test_compare_prints_the_flags_that_differ_and_draws_a_metric(made, tmp_path, monkeypatch, capsys):
    drawn, band = [], common.band
    monkeypatch.setattr(common, "band", lambda ax, x, y, *rest: (drawn.append((*rest, y.shape)), band(ax, x, y, *rest)))
    paths, picture = [str(made / "finished"), str(made / "sweep")], tmp_path / "new" / "c.png"
    assert common.tools(["compare", *paths, "--out", str(picture)]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:-1]}
    assert rows["steps"] == ["20", "40"] and rows["all"] == ["runs", "2", "4"] and "loss" in rows and "batch" not in rows
    labels = [label for label, *_ in drawn]
    assert len(set(labels)) == len(labels) and all(any(v in x for x in labels) for v in ("finished", "d_model=4", "d_model=8"))
    assert sum(shape[1] for *_, shape in drawn) == 6 and picture.read_bytes() == b"picture"
    assert common.tools(["compare", *paths, "--metric", "lss", "--out", str(tmp_path / "no.png")]) == 0
    assert "lss is not one number a run and step of" in capsys.readouterr().out and not (tmp_path / "no.png").exists()


def test_a_curve_is_that_of_its_configuration(made):
    rows = json.loads((made / "sweep" / "summary.json").read_text())["runs"]
    found = list(common.histories(made / "sweep", "eval_loss"))
    ends = {f"d_model={row['d_model']}": row["loss"] for row in rows}
    assert sorted(name for name, *_ in found) == sorted(ends)
    for name, steps, y in found:
        assert steps[0] == 0 and ends[name] in y[-1]


@pytest.mark.parametrize("line", ["", "compare", "claims", "claims /nope", "report /nope", "reprot", "compare --lrr 1 a"])
def test_tools_that_are_asked_badly(line, capsys):
    assert common.tools(line.split()) == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_report_is_one_page_that_needs_nothing_else(made, done, tmp_path, monkeypatch, capsys):
    statement = "<script>alert('a')</script> & {runs}"
    folder = common.Folder(done, None)
    folder.write_json("summary.json", folder.read_json("summary.json") | {"claims": [
        common.claim(name, statement, "notes", "1", "2", holds) for name, holds in (("a", True), ("b", False), ("c", None))]})
    folder.write("curves.png", b"picture")
    page = tmp_path / "sub" / "report.html"
    common.report([done, made / "sweep"], page)
    text = page.read_text()
    assert "2 runs, " in capsys.readouterr().out and "<script>alert" not in text and text.count("&lt;script&gt;alert") == 3
    assert text.count("{runs}") == 3  # text that looks like a place of the page's stays text
    for verdict in ("holds", "FALSE", "open"):
        assert f'data-verdict="{verdict}" data-script="exp_addition.py"' in text and f'<option value="{verdict}">' in text
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", text) and "http" not in text
    assert base64.b64encode(b"picture").decode() in text and "python exp_addition.py" in text
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.Stop, match="no finished run"):
        common.report([])
    shutil.copytree(made / "finished", tmp_path / "runs" / "a" / "b")
    shutil.copytree(done, tmp_path / "runs" / "a" / "c")
    (tmp_path / "runs" / "a" / "c" / "curves.png").write_bytes(b"other")
    common.report([])  # one of two is damaged
    assert "left out: " in capsys.readouterr().out and "left out: runs/a/c/curves.png is damaged" in Path(
        "runs/report.html").read_text()


@pytest.mark.parametrize("change", [dict(claims=[{}]), dict(claims=3), dict(runs=[[]]), dict(runs=[{}]), dict(wall_seconds="x"),
                                    dict(claims=[dict.fromkeys(("id", "statement", "source", "expected", "measured"), "") | {
                                        "holds": []}])])
def test_tools_refuse_a_strangers_summary(done, change, tmp_path, capsys):
    folder = common.Folder(done, None)
    folder.write_json("summary.json", folder.read_json("summary.json") | change)
    for tool in ("compare", "claims", "report"):
        out = ["--out", str(tmp_path / "x.png")] if tool != "claims" else []
        assert common.tools([tool, str(done), *out]) == 2 and "no run of this project" in capsys.readouterr().err


def test_every_row_of_the_summary_names_every_swept_field(tmp_path):
    """Also in a group whose value is the flag's own."""
    flags = Flags(sweep=[], d_model=4)
    flags.argv = []
    folder = common.Folder(tmp_path, flags)
    for d, sub in ((4, "a"), (8, "b")):
        folder.scratch(sub).result([dataclasses.replace(flags, d_model=d)], {"loss": np.zeros((1, 1))}, {"loss": [0.]})
    folder.finish()
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["d_model"] for row in rows] == ["4", "8"]
    assert list(rows[0]) == ["seed", "d_model", "diverged", "loss"]  # settings first, though the first group had none
    assert [row["d_model"] for row in json.loads((tmp_path / "summary.json").read_text())["runs"]] == [4, 8]


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "/tmp/x"])
def test_a_name_stays_in_its_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*BASE, "--name", name]) == 2
    assert "must be the name of one folder" in capsys.readouterr().err and not list(tmp_path.rglob("*"))


# ---- README ---------------------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text()


def test_the_readmes_fork_is_a_fork(tmp_path):
    """Its five steps, with --smoke: a copy, one line, a run, and a comparison with the original."""
    steps = re.search(r"## Forking a script\n(.*?)\n## ", README, re.S)[1]
    copy, smoke, run, compare = re.findall(r"^\d\. `(.*)`$", steps, re.M)
    law, (_, source, target) = re.search(r'^ {8}("\w+": .*)$', steps, re.M)[1], copy.split()
    assert run == smoke.replace(" --smoke", "")
    for name in ("common.py", source):
        shutil.copy(ROOT / name, tmp_path)
    text = (tmp_path / source).read_text()
    (tmp_path / target).write_text(re.sub(r"(?<=\nTASKS = {)(.*)", lambda m: f"{m[0]}\n    {law}", text, count=1))
    original = f"python {source} --smoke --name base"
    for line in (original, f"{smoke} --compile off --name base_taskmaximum", f"{compare} --out c.png"):
        done = subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert re.search(r"task +polynomial +maximum", done.stdout) and (tmp_path / "c.png").exists()


def test_the_readmes_tools_and_torchruns_are_asked_well(monkeypatch):
    asked = []
    for name in ("compare", "ledger", "report"):
        monkeypatch.setattr(common, name, lambda **given: asked.append(given))
    tools = re.findall(r"^(?: {4}|\d\. `)python common\.py (.*?)`?(?:  +#.*)?$", README, re.M)
    assert len(tools) >= 4 and [common.tools(line.split()) for line in tools] == [0] * len(tools) and len(asked) == len(tools)
    launched = re.findall(r"^ {4}torchrun .*?(exp_\w+)\.py (.*?)(?:  +#.*)?$", README, re.M)
    assert len(launched) >= 2 and all(common.cli(importlib.import_module(m).Flags, line.split()) for m, line in launched)


def test_the_readme_counts_what_the_ledger_says():
    ledger = (ROOT / "figures" / "ledger.md").read_text()
    said = re.findall(r"^### (.*): (.*) runs; (.*) hold, (.*) false, (.*) open$", ledger, re.M)
    assert len(said) == 6 and all(f"| {a} ({n} runs) | {b} | {c} | {d} |\n" in README for a, n, b, c, d in said)
    for part in ledger.split("\n### ")[1:]:
        counts = [part.count(f"| {verdict} |\n") for verdict in common.VERDICTS.values()]
        assert "; {} hold, {} false, {} open\n".format(*counts) in part


@pytest.mark.parametrize("script", sorted(p.stem for p in ROOT.glob("exp_*.py")))
def test_the_readme_says_what_each_figure_answers(script):
    table = re.search(rf"^\| `{script}\.py` \| \|\n(.*?)\n\n", README, re.M | re.S)[1]
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines())))
    assert named == {name for _, _, figures in importlib.import_module(script).STUDIES.values() for name in figures}
