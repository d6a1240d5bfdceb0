"""What every script and every study must do: run end to end, alone as in company, cut as whole, forked
as original, on a device that is no CPU; and refuse what it can't do in one line."""
import importlib
import re
import shlex
import shutil
import sys

import numpy as np
import pytest

import common
from conftest import (LEARN, ROOT, STUDIES, TRAINS, alike, arrays_of, interrupted, judged, ledger,
                      python, run)

IDS = [f"{name[4:]}-{common.study_name(study.__name__)}" for name, study in STUDIES]
QUICK = "--smoke --compile off --save-every 0"
LONGEST = {"exp_gpt2_paths": 750, "exp_esn_genetic": 600}  # lines of a fork with the first study


NEED_ALL_POINTS = "Dynamics Skips Capacity Ranking Rates Score".split()  # their claims; tested elsewhere


def forked(name, study, folder):
    """The module of a fork with one study."""
    common.fork(ROOT / f"{name}.py", folder / "exp_mine.py", common.study_name(study.__name__))
    sys.modules.pop("exp_mine", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return importlib.import_module("exp_mine")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of claims about runs that did not learn
@pytest.mark.parametrize("name, study", STUDIES, ids=IDS)
def test_a_fork_by_each_study_runs_and_draws_all_its_figures(name, study, tmp_path, capsys):
    """The rooms have walls: a study with its core runs without the others. Its ledger has its claims."""
    fork, path = forked(name, study, tmp_path), tmp_path / "r"
    others = {s.__name__ for n, s in STUDIES if n == name} - {study.__name__}
    assert not others & vars(fork).keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "figures_of", lambda room: {})  # they are drawn below
        assert run(fork, "--smoke --compile off", path) == 0
    assert run(fork, "--smoke --plot-only", path) == 0
    figures = {p.stem for p in path.iterdir() if p.suffix in (".png", ".gif")}
    assert figures == common.figures_of(study).keys()
    assert "not judged" in capsys.readouterr().out
    if study.__name__ not in NEED_ALL_POINTS:
        claimed = judged(fork.STUDIES[0], common.read(path / "arrays.npz"))
        assert [*claimed] == [*ledger(name, study)]


def test_a_fork_has_the_bits_of_the_original(exp, tmp_path):
    name, study = exp.__name__, exp.STUDIES[0]
    assert run(forked(name, study, tmp_path), "--smoke", tmp_path / "fork") == 0
    assert run(exp, "--smoke", tmp_path / "original") == 0
    mine, theirs = arrays_of(tmp_path / "fork"), arrays_of(tmp_path / "original")
    assert all(x.tobytes() == theirs[k].tobytes() for k, x in mine.items())
    texts = (ROOT / f"{name}.py").read_text(), (tmp_path / "exp_mine.py").read_text()
    flags = [common.Source(text).members.keys() for text in texts]
    assert {k.split()[-1] for k in theirs.keys() - mine.keys()} <= flags[0] - flags[1]
    assert len(texts[1].splitlines()) <= LONGEST.get(name, 550)


def test_a_user_forks_and_runs(tmp_path):
    shutil.copy(ROOT / "common.py", tmp_path)
    fork = "common.py", "fork", ROOT / "exp_addition.py", "exp_mine.py"
    for line in fork, ("exp_mine.py", "--smoke"):
        done = python(*line, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/mine/digit_smoke=True/curves.png").exists()


def test_runs_have_the_same_bits_alone_in_company_and_interrupted(exp, tmp_path, capsys):
    """Ctrl-C draws what there is, marks it, and says how to go on."""
    line = f"{QUICK} {TRAINS[exp.__name__]}"
    assert run(exp, f"{line} --runs 1 --seed 2", tmp_path / "one") == 0
    line += " --runs 3"
    assert run(exp, line, tmp_path / "whole") == 0
    many, one = arrays_of(tmp_path / "whole"), arrays_of(tmp_path / "one")
    for k in [k for k in many if "metrics.npz" in k and "step" not in k]:
        assert np.array_equal(many[k][:, 2::3], one[k], equal_nan=True), k
    with interrupted(after=8):  # in the second block
        assert run(exp, line, tmp_path / "cut") == 130
    said = capsys.readouterr().out
    assert "go on with: python exp_" in said and "not judged" in said
    assert list((tmp_path / "cut").glob("*.png"))
    rows = common.read(tmp_path / "cut/summary.json")["runs"]
    assert not all(r["finished"] for r in rows) and not any(r["diverged"] for r in rows)
    assert run(exp, line, tmp_path / "cut") == 2 and "--resume" in capsys.readouterr().err
    assert run(exp, f"{line} --resume", tmp_path / "cut") == 0
    assert alike(tmp_path / "whole", tmp_path / "cut")
    assert exp.__name__ not in LEARN or not list((tmp_path / "cut").glob("block*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARN)
def test_compiled_is_eager(name, tmp_path):
    """To rounding."""
    exp, line = importlib.import_module(name), f"--smoke {TRAINS[name]} --runs 1 --block 1"
    assert run(exp, f"{line} --compile off", tmp_path / "eager") == 0
    assert run(exp, f"{line} --compile on", tmp_path / "compiled") == 0
    if not shutil.which("g++"):
        return
    decided = common.read(tmp_path / "compiled/config.json")["compiled"]
    assert all(compiled for compiled, *_ in decided), decided
    a, b = (arrays_of(tmp_path / name) for name in ("eager", "compiled"))
    for k in [k for k in a if k.endswith("metrics.npz loss")]:
        np.testing.assert_allclose(a[k][:3], b[k][:3], rtol=1e-5)
        np.testing.assert_allclose(a[k], b[k], rtol=1e-2)


BAD = """
--lrr 1: unknown flag --lrr; did you mean --
--steps x: 'x' is not int from 1
--steps 0: from 1
--steps 1e-3: not int
--FLOAT nan: not float
--FLOAT 1e999: not float
--resume True: no flag takes True
--smoke=1: ignored explicit argument
--FLOAT: expected one argument
--study nonsense: choose from
--device nonsense: choose from
--device cuda: sees none
--sweep seed=1,2: not a field to sweep
--sweep FLOAT=1 FLOAT=2: each field once
--sweep FLOAT=.1,.2 --FLOAT .3: each field once
--sweep FLOAT: is not float
--sweep FLOAT=1,x: 'x' is not float
--figures nonsense: draws
--plot-only: cannot read
--out /dev/null/x: cannot read or write
--name ../x: one folder
--seed -1: from 0
"""


@pytest.mark.parametrize("line, words", [row.split(": ") for row in BAD.strip().splitlines()])
def test_bad_flags_are_one_line_and_nothing_is_written(exp, line, words, refused):
    assert words in refused(exp, line.replace("FLOAT", "lr" if exp.__name__ in LEARN else "leak"))


def test_help_shows_the_question_the_studies_and_every_flag(exp, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        run(exp, "--help")
    said = capsys.readouterr().out
    assert exp.__doc__.splitlines()[0] in "\n".join(said.splitlines()[:5])
    assert all(common.study_name(s.__name__) in "\n".join(said.splitlines()[:40]) for s in exp.STUDIES)
    assert all(common.option(n) in said or f"--no-{n}" in said for n in common.fields_of(exp.Flags))


def test_documented_commands_parse(exp):
    text = exp.__doc__ + (ROOT / "README.md").read_text()
    commands = re.findall(rf"(?m)^\s*(?:\S+/)?python3? {exp.__name__}\.py(.*?)(?:\s{{2,}}.*|\s+#.*)?$",
                          text)
    assert len(commands) >= 3
    for command in commands:
        try:
            common.cli(exp.Flags, exp.STUDIES, shlex.split(command))
        except common.Stop as stop:  # it reads what an earlier command writes
            assert "No such file" in str(stop)


FAKE = """
import importlib
import tempfile
from pathlib import Path
import torch
import common
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
torch.utils.backend_registration._setup_privateuseone_for_python_backend("gpu")
common.device = lambda flags: torch.device("gpu", 0)
real_group, real_first, seen = common.train_group, common.first_step, set()

class Done(Exception):
    pass

class Look(TorchDispatchMode):
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {{}})
        for x in tree_leaves([args, kwargs, out]):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.ndim:
                raise SystemExit(f"on the CPU: {{f}}")
        adds = "scatter_add" in str(f) or "index_put" in str(f) and any(a is True for a in args)
        if adds and out.is_floating_point():  # integers are the same in any order
            raise SystemExit(f"an atomic add: {{f}}")
        return out

# each kind of step once, whatever studies share it
def group(runs, folder, start, step_of, evaluate_of, constants):
    def real(run):  # what occurs in a law can't be found in fake numbers
        with unset_fake_temporarily():
            return constants(run)
    numbers = real(runs[0]) if constants else {{}}
    key = step_of.__code__, evaluate_of and evaluate_of.__code__, *start(runs[0])["params"], *numbers
    if key in seen:
        raise Done
    seen.add(key)

    def planted(flags):
        own = step_of(flags)
        def step(state, number):
            new, logs = own(state, number)
            return new, {{k: x + torch.arange(1.)[0] for k, x in logs.items()}}
        return step
    real_group(runs, folder, start, planted if {plant} else step_of, evaluate_of, constants and real)

def train(groups, folder, start, step_of, evaluate_of=None, constants=None):
    for runs in groups:
        try:
            group(runs, folder, start, step_of, evaluate_of, constants)
        except Done:
            pass
    raise Done

def first(step, state, number, at):  # a fake single number keeps its value, and computes with it
    fresh = lambda x: torch.zeros(x.shape, dtype=x.dtype)
    return real_first(step, common.tree_map(fresh, state), common.tree_map(fresh, number), at)

def train_block(program, path, state, number, flags, evaluate):
    common.fill(program.state, state)
    with Look():
        program.once()
        if evaluate:
            with torch.no_grad():
                torch.vmap(evaluate)(program.state["params"], program.number)
    print("looked at", flags.study)
    raise Done

common.train, common.first_step, common.train_block = train, first, train_block
common.decide = lambda *_: None
common.NOW.__init__(seconds={{"compiling": 0, "run_steps": 0}})
for exp in map(importlib.import_module, {scripts!r}):
    for study in exp.STUDIES:
        line = ["--smoke", "--study", common.study_name(study.__name__)]
        flags = common.cli(exp.Flags, exp.STUDIES, line)
        flags.block = flags.block and 2  # a fake tensor of one number computes with it
        with FakeTensorMode(allow_non_fake_inputs=True):
            try:
                study.compute(flags, Path(tempfile.mkdtemp()))
            except Done:
                pass
if not {plant}:
    import exp_esn_genetic as esn
    sizes = dict(room=esn.Tasks, n_units=6, washout=200, fit=450, test=200, compile="off", leak=.5)
    with FakeTensorMode(), torch.no_grad():
        at = lambda *shape, dtype=torch.float32: torch.empty(shape, device="gpu", dtype=dtype)
        inputs = at(3, 6, 6), at(3, 2, 6), at(2, 850).double(), at(2, 850, 4).double()
        with Look():
            assert esn.read_out(*inputs, esn.Flags(**sizes)).device.type == "gpu"
        print("looked at reservoirs")
"""


@pytest.mark.slow
@pytest.mark.parametrize("scripts, plant", [(LEARN, False), (LEARN[:1], True)])
def test_nothing_of_a_step_is_on_the_cpu(scripts, plant):
    """Every study's step and evaluation on a device without kernels; the control plants a CPU tensor."""
    code = FAKE.format(scripts=scripts, plant=plant)
    done = python("-c", code)
    assert (done.returncode == 0) != plant, done.stderr[-3000:]
    assert ("on the CPU" in done.stderr) == plant
    assert plant or "looked at reservoirs" in done.stdout and "Traceback" not in done.stderr
