"""What every script and every study must do: run end to end, alone as in company, cut as whole, forked as original, on a device
that is no CPU; and refuse what it can't do in one line."""
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

import common
from conftest import ROOT, alike, arrays_of, interrupted, run

SCRIPTS = ["exp_addition"]
STUDIES = [(name, study) for name in SCRIPTS for study in importlib.import_module(name).STUDIES]
IDS = [f"{name[4:]}-{common.study_name(study.__name__)}" for name, study in STUDIES]
QUICK = "--smoke --compile off --save-every 0 --steps 230"


@pytest.fixture(params=SCRIPTS)
def exp(request):
    return importlib.import_module(request.param)


@pytest.mark.parametrize("name, study", STUDIES, ids=IDS)
def test_a_study_runs_and_draws_all_its_figures(name, study, tmp_path, capsys):
    exp, line = importlib.import_module(name), f"--smoke --study {common.study_name(study.__name__)}"
    assert run(exp, line, tmp_path / "r") == 0
    for figure in common.figures_of(study):
        (tmp_path / "r" / f"{figure}.png").unlink()
    assert run(exp, f"{line} --plot-only", tmp_path / "r") == 0
    assert {p.stem for p in (tmp_path / "r").glob("*.png")} == {*common.figures_of(study)}
    said = capsys.readouterr().out
    assert "not judged" in said or not (tmp_path / "r/summary.json").exists()


@pytest.mark.parametrize("name, study", STUDIES, ids=IDS)
def test_a_fork_by_each_study_runs(name, study, tmp_path):
    """The rooms have walls: a study with its core runs without the others."""
    shutil.copy(ROOT / "common.py", tmp_path)
    command = [sys.executable, "common.py", "fork", str(ROOT / f"{name}.py"), "exp_mine.py", common.study_name(study.__name__)]
    subprocess.run(command, cwd=tmp_path, check=True)
    others = {s.__name__ for n, s in STUDIES if n == name} - {study.__name__}
    assert not others & set(common.Source((tmp_path / "exp_mine.py").read_text()).nodes)
    done = subprocess.run([sys.executable, "exp_mine.py", "--smoke", "--out", "fork"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if study is importlib.import_module(name).STUDIES[0]:
        assert run(importlib.import_module(name), "--smoke", tmp_path / "original") == 0
        assert alike(tmp_path / "fork", tmp_path / "original")
        assert len((tmp_path / "exp_mine.py").read_text().splitlines()) <= 550


def test_runs_are_alike_alone_and_in_company(exp, tmp_path):
    assert run(exp, f"{QUICK} --runs 3", tmp_path / "many") == 0
    assert run(exp, f"{QUICK} --runs 1 --seed 2", tmp_path / "one") == 0
    many, one = arrays_of(tmp_path / "many"), arrays_of(tmp_path / "one")
    for k in [k for k in many if k.startswith("metrics.npz") and "step" not in k]:
        assert np.array_equal(many[k][:, 2::3], one[k], equal_nan=True), k


def test_an_interrupted_run_draws_marks_and_resumes_with_the_same_bits(exp, tmp_path, capsys):
    line = f"{QUICK} --block 2 --snapshots 3"
    assert run(exp, line, tmp_path / "whole") == 0
    with interrupted(after=5):
        assert run(exp, line, tmp_path / "cut") == 130
    said = capsys.readouterr().out
    assert "go on with: python exp_" in said and "not judged" in said and list((tmp_path / "cut").glob("*.png"))
    rows = common.decode("x.json", (tmp_path / "cut/summary.json").read_bytes())["runs"]
    assert not all(r["finished"] for r in rows) and not any(r["diverged"] for r in rows)
    assert run(exp, line, tmp_path / "cut") == 2 and "--resume" in capsys.readouterr().err
    assert run(exp, f"{line} --resume", tmp_path / "cut") == 0
    assert alike(tmp_path / "whole", tmp_path / "cut") and not list((tmp_path / "cut").glob("block*"))


def test_compiled_is_eager(exp, tmp_path):
    """To rounding; and one compiled run is alike in two folders."""
    line = "--smoke --runs 1 --steps 12 --block 1"
    assert run(exp, f"{line} --compile off", tmp_path / "eager") == 0
    assert run(exp, f"{line} --compile on", tmp_path / "compiled") == 0
    assert common.load(tmp_path / "compiled").flags.steps == 12
    if not shutil.which("g++"):
        return
    decided = common.decode("x.json", (tmp_path / "compiled/config.json").read_bytes())["compiled"]
    assert all(d["compiled"] for d in decided), decided
    a, b = (np.load(tmp_path / name / "metrics.npz")["loss"] for name in ("eager", "compiled"))
    np.testing.assert_allclose(a[:3], b[:3], rtol=1e-5)
    np.testing.assert_allclose(a, b, rtol=1e-2)


@pytest.mark.parametrize("line, words", [
    ("--lrr 1", "unknown flag --lrr; did you mean --lr?"), ("--steps x", "--steps: 'x' is not a whole number"),
    ("--steps 0", "at least 1"), ("--resume True", "True belongs to no flag"), ("--smoke=1", "--smoke takes no value"),
    ("--lr nan", "finite"), ("--study nonsense", "--study"), ("--sweep seed=1,2", "not a field to sweep"),
    ("--sweep lr=1 lr=2", "each field once"), ("--figures nonsense", "draws"), ("--plot-only", "no run to draw"),
    ("--out /dev/null/x", "cannot write"), ("--name ../x", "one folder"), ("--seed -1", "from 0 to"), ("--lr", "takes one value")])
def test_bad_flags_are_one_line_and_nothing_is_written(exp, line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(exp, line) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help_shows_the_question_the_studies_and_every_flag(exp, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        run(exp, "--help")
    said = capsys.readouterr().out
    assert exp.__doc__.splitlines()[0] in "\n".join(said.splitlines()[:5])
    assert all(common.study_name(s.__name__) in "\n".join(said.splitlines()[:40]) for s in exp.STUDIES)
    assert all(f"--{n.replace('_', '-')}" in said or f"--no-{n}" in said for n in common.fields_of(exp.Flags))


def test_documented_commands_parse(exp):
    text = exp.__doc__ + (ROOT / "README.md").read_text()
    commands = re.findall(rf"(?m)^\s*(?:\S+/)?python3? {exp.__name__}\.py(.*?)(?:\s{{2,}}.*|\s+#.*)?$", text)
    assert len(commands) >= 3
    for command in commands:
        common.cli(exp.Flags, exp.STUDIES, shlex.split(command))


FAKE = """
import importlib, sys
import torch
import torch._dynamo.backends.common as backends
import common
from torch._subclasses.fake_tensor import FakeTensorMode
torch.utils.backend_registration._setup_privateuseone_for_python_backend("gpu")
common.device = lambda flags: torch.device("gpu", 0)
plant = {plant}

def look(graph, inputs):
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        for x in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.ndim:
                raise SystemExit(f"on the CPU: {{node.format_node()}}")
        words = [a for a in node.args if a is True]
        if "index_put" in str(node.target) and words or "scatter_add" in str(node.target):
            raise SystemExit(f"an atomic add: {{node.format_node()}}")
    return graph.forward

exp = importlib.import_module({script!r})
flags = common.cli(exp.Flags, exp.STUDIES, {line!r}.split())
seen = []

class Traced(common.Program):
    def __init__(self, step, state, number, logs, at):
        planted = lambda s, n: (lambda out: (out[0], {{k: v + torch.zeros(3).sum() * 0 + torch.arange(1.)[0] for k, v in out[1].items()}}))(step(s, n))
        super().__init__(planted if plant else step, state, number, logs, at)

def decide(program, flags, folder, blocks):
    program.once()  # eagerly
    backend = backends.aot_autograd(fw_compiler=look, keep_inference_input_mutations=True)
    torch._dynamo.reset()
    torch.compile(program.update, backend=backend, fullgraph=True, dynamic=False)(
        program.state, program.number, program.rows, program.row)
    seen.append("step")

def train_block(program, folder, state, number, flags, evaluate, stops):
    program.load(state, number)
    if evaluate:
        with torch.no_grad():
            found = torch.vmap(evaluate)(program.state["params"], program.number)
        assert all(x.device.type == "gpu" for x in found.values())
        seen.append("evaluate")
    raise SystemExit("traced " + " ".join(seen))

common.Program, common.decide, common.train_block = Traced, decide, train_block
import tempfile
with FakeTensorMode(allow_non_fake_inputs=True):
    flags.room.compute(flags, common.Folder(tempfile.mkdtemp(), flags))
"""


@pytest.mark.parametrize("name, study, plant", [(n, s, False) for n, s in STUDIES] + [(*STUDIES[0], True)],
                         ids=[*IDS, "negative control"])
def test_nothing_of_a_step_is_on_the_cpu(name, study, plant):
    """The step and the evaluation on a device that has no kernels; the control plants a CPU tensor."""
    code = FAKE.format(script=name, line=f"--smoke --study {common.study_name(study.__name__)}", plant=plant)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if "common.train" not in str(common.Source((ROOT / f"{name}.py").read_text())) and not done.stderr and not plant:
        return  # a study that trains nothing
    said = done.stderr.strip().splitlines()[-1]
    assert ("traced step" in said) != plant, done.stderr[-3000:]
