"""common.py: random numbers, the optimiser, runs and flags, the run folder, claims, finished runs."""
import dataclasses
import itertools
import json
import types
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import exp_addition as exp
from common import Stop, flag
from conftest import python, run

M = 2 ** 32 - 1


# ---- random numbers -----------------------------------------------------------------------------------

def mix(x):
    """The mixer in numpy's unsigned integers."""
    x = x.astype(np.uint64)
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x21f0aaad)) & np.uint64(M)
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x735a2d97)) & np.uint64(M)
    return x ^ (x >> np.uint64(15))


def reference(seed, stream, step, count):
    """What hashes(key(seed, stream, step), count) must be."""
    words = []
    for constant in 0x3C6EF372, 0x1F83D9AB:
        word = mix(np.array([(seed & M) ^ constant]))
        for part in seed >> 32, stream, step:
            word = mix(word ^ np.uint64(part))
        words.append(word)
    return mix(mix(np.arange(count, dtype=np.uint64) ^ words[0]) ^ words[1])


def keys(seeds, steps, stream=0):
    both = torch.vmap(lambda s, t: torch.stack(common.key(s, stream, t)))
    return both(torch.as_tensor(seeds), torch.as_tensor(steps))


@pytest.mark.parametrize("seed, stream, step",
                         [(0, 0, 0), (7, 3, 12345), (2 ** 62, 1, 2 ** 31), (2 ** 40 + 5, 0, 99)])
def test_hashes_are_numpys(seed, stream, step):
    found = common.hashes(common.key(torch.tensor(seed), stream, torch.tensor(step)), 1000)
    assert np.array_equal(found.numpy().astype(np.uint64), reference(seed, stream, step, 1000))


def test_compiled_random_numbers_are_eager_ones():
    def draw(seed, step):
        key = common.key(seed, 2, step)
        return common.integers(key, 100, 7, 50), common.uniform(key, 30)
    seeds, steps = torch.arange(8) * 2 ** 58, torch.arange(8) * 1001
    eager = torch.vmap(draw)(seeds, steps)
    compiled = torch.compile(torch.vmap(draw), backend="aot_eager")(seeds, steps)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled))
    assert eager[1].dtype == torch.float32 and eager[1].min() >= 0 and eager[1].max() < 1


def test_no_key_repeats_among_a_million():
    seeds = torch.tensor([*range(500), *(2 ** 62 - s for s in range(500))]).repeat_interleave(1000)
    found = keys(seeds, torch.arange(1000).repeat(1000))
    assert len(torch.unique(found[:, 0] * 2 ** 31 + found[:, 1] % 2 ** 31)) == 10 ** 6


@pytest.mark.parametrize("axis", ["index", "step", "seed"])
def test_pairs_and_triples_of_digits_are_uniform(axis):
    count = 200_000
    if axis == "index":
        digits = common.integers(common.key(torch.tensor(1), 0, torch.tensor(2)), 10, count)
    else:
        n = torch.arange(count)
        key = keys(n if axis == "seed" else 0 * n, n if axis == "step" else 0 * n)
        digits = torch.vmap(lambda k: common.integers([k[0], k[1]], 10, 1))(key)[:, 0]
    for width in 1, 2, 3:
        words = sum(digits[i:count - width + i + 1] * 10 ** i for i in range(width))
        seen = torch.bincount(words, minlength=10 ** width).double()
        mean = len(words) / 10 ** width
        chi2 = float(((seen - mean) ** 2 / mean).sum())
        assert abs(chi2 - 10 ** width) < 6 * (2 * 10 ** width) ** .5 * width, (width, chi2)


def test_generators_differ_and_are_the_same_in_every_process():
    draw = lambda *key: tuple(torch.rand(4, generator=common.generator(*key)).tolist())
    assert len({draw(*key) for key in itertools.product((0, 1, 11), ("init", "eval"))}) == 6
    code = "import common, torch; print(torch.rand(4, generator=common.generator(1, 'init')).tolist())"
    assert tuple(json.loads(python("-c", code).stdout)) == draw(1, "init")


# ---- optimiser, flags, runs ---------------------------------------------------------------------------

def test_adamw_is_torchs():
    """With rates of its own in each of two runs."""
    rates = [[.1, .1, .9, .999, 1e-8], [.01, 0., 0., .9, 1e-3]]
    first = torch.randn(2, 8, generator=common.generator(0, "init")).double()
    grad = lambda x, t: torch.sin(x + t) + .1 * x
    params, state = {"w": first}, common.stack([common.adam_init({"w": first[0]})] * 2)
    for t in range(20):
        given = params, {"w": grad(params["w"], t)}, state
        params, state = torch.vmap(common.adamw)(*given, *torch.tensor(rates, dtype=torch.float64).T)
    for (lr, decay, *betas, eps), x, found in zip(rates, first, params["w"]):
        optimiser = torch.optim.AdamW([x], lr, betas, eps, decay)
        for t in range(20):
            x.grad = grad(x, t)
            optimiser.step()
        assert torch.allclose(found, x, rtol=0, atol=1e-10)


@dataclasses.dataclass
class Flags(common.Flags):
    d_model: int = flag(32, "width", low=1, high=4096)
    lr: float = flag(1e-3, "learning rate", low=0, number=True)
    mlp: bool = flag(True, "have the MLP")
    text: str = flag("", "any text")

    def check(self):
        if self.d_model % 2:
            raise Stop("--d-model must be even")


class One(common.Study):
    """Which?"""
    defaults = dict(steps=7, sweep=["lr=1,2"])
    smoke = dict(steps=5)

    def compute(flags, folder):
        return dict(x=[flags.d_model, flags.lr, flags.mlp, flags.text, flags.runs, flags.seed,
                       flags.steps, flags.sweep])

    def draw_x(arrays, flags):
        return None


STUDIES = [One]


def cli(line=""):
    return common.cli(Flags, STUDIES, line.split())


def test_flags_are_read():
    f = cli("--steps 1e4 --d_model 64 --no-mlp --lr=3e-3")
    assert (f.steps, f.d_model, f.mlp, f.lr) == (10000, 64, False, 3e-3) and type(f.steps) is int
    assert cli("--no-mlp --mlp").mlp
    assert common.plain_flags(cli("--d-model 64")) == common.plain_flags(cli("--d_model 64"))
    assert [cli(s).steps for s in ("", "--smoke", "--smoke --steps 9")] == [7, 5, 9]
    assert type(cli("--lr 3").lr) is float and cli("--sweep d_model=2,4").sweep == ["d_model=2,4"]
    assert [r.lr for r, in common.groups_of_runs(cli("--lr 3"))] == [3]
    assert common.cli(Flags, STUDIES, ["--text", "--foo_bar baz"]).text == "--foo_bar baz"
    replaced = dataclasses.replace(cli("--seed 3"), runs=2)
    assert [*replaced.given] == ["study", "seed"] and replaced.room is One


def test_folders_are_named_by_the_flags_that_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(common, "NOW", types.SimpleNamespace(compiled=[], seconds={}))

    def path(*line):
        with common.opened(common.cli(Flags, STUDIES, line), Path(__file__)) as path:
            return str(path)
    assert path() == "runs/test_common/one"
    assert path("--d-model", "64", "--force") == "runs/test_common/one_d_model=64"
    assert path("--name", "mine") == "runs/test_common/mine"
    assert path("--out", "~/x") == str(tmp_path / "x")
    assert len(Path(path("--text", "é/" + "x" * 500)).name.encode()) < 100


def test_runs_of_one_shape_are_one_group():
    flags = common.cli(exp.Flags, exp.STUDIES,
                       "--digit 0 --seed 5 --runs 8 --sweep weight_decay=0,0.25,1 d_model=16,32".split())
    groups = common.groups_of_runs(flags)
    assert [{r.d_model for r in g} for g in groups] == [{16}, {32}]
    expected = list(itertools.product([0, .25, 1], range(5, 13)))
    assert all([(r.weight_decay, r.seed) for r in g] == expected for g in groups)
    assert common.numbers(groups[0])["seed"].tolist() == [*range(5, 13)] * 3
    sweep = common.cli(exp.Flags, exp.STUDIES, "--study sweep --runs 1 --digit 1".split())
    # a flag on the command line keeps its value
    assert {r.digit for g in common.groups_of_runs(sweep) for r in g} == {1}


def test_marks():
    assert common.marks(1000, 7) == [0, 1, 4, 16, 63, 251, 1000] and common.marks(3, 99) == [0, 1, 2, 3]


def test_blocks_follow_from_shapes_alone():
    sizes = {}
    for d in 2, 16, 64, 128:
        flags = exp.Flags(d_model=d, n_heads=2, device="cpu")
        sizes[d] = common.block_size(flags, exp.start(flags)["params"], {}, 0)
    assert sizes == {2: 16, 16: 4, 64: 1, 128: 1}
    assert common.block_size(flags, exp.start(flags)["params"], {}, 2 ** 20) == 256


# ---- the run folder -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "r"
    assert run(exp, "--smoke --compile off --snapshots", path) == 0
    return path


def test_files_of_a_run(finished):
    names = "config.json metrics.npz arrays.npz snapshots.npz summary.csv summary.json checkpoint.pt"
    for name in names.split():
        common.read(finished / name)
    saved, metrics = common.read(finished / "checkpoint.pt"), common.read(finished / "metrics.npz")
    assert saved["step"].tolist() == [20] * 4 and saved["params"]["W_E"].shape == (4, 12, 8)
    assert saved["number"]["digit"].tolist() == [0, 0, 1, 1]
    assert metrics["loss"].shape == (20, 4) and metrics["step"].tolist() == [*range(1, 21)]
    assert common.read(finished / "snapshots.npz")["W_E"].shape == (3, 4, 12, 8)
    assert {"compiling", "evaluating",
            "stepping"} <= common.read(finished / "config.json")["seconds"].keys()
    first = (finished / "summary.csv").read_text().splitlines()[0]
    assert first.startswith("seed,digit,finished,diverged,loss,grad_norm,eval_loss,eval_accuracy")


def test_a_notebook_opens_a_run(finished):
    made = common.load(finished)
    logits = exp.forward(common.run_of(made.params, 0), torch.zeros(1, 12, dtype=torch.int64),
                         made.flags.n_heads)
    assert logits.shape == (1, 12, 12) and made.arrays["loss"].shape == (20, 4)


def test_a_file_is_accepted_after_kills_between_its_checksum_and_itself(tmp_path, monkeypatch):
    common.write(tmp_path / "a.json", [1])
    real = Path.replace

    def killed(temporary, target):
        if target.name == "a.json":
            raise KeyboardInterrupt
        return real(temporary, target)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        for i in range(3):
            with pytest.raises(KeyboardInterrupt):
                common.write(tmp_path / "a.json", [2 + i])
    assert common.read(tmp_path / "a.json") == [1]
    common.write(tmp_path / "a.json", [9])
    assert common.read(tmp_path / "a.json") == [9]


def test_a_finished_run_says_so_and_other_flags_are_refused(finished, capsys):
    assert run(exp, "--smoke --compile off --snapshots", finished) == 0
    assert "finished already" in capsys.readouterr().out
    assert run(exp, "--smoke --lr .1 --snapshots", finished) == 2
    assert "lr 0.001 -> 0.1" in capsys.readouterr().err


def test_a_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    assert run(exp, "--smoke --force", tmp_path) == 2 and "no run folder" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "mine"


def test_a_diverged_run_is_marked_and_its_neighbour_untouched(tmp_path, capsys):
    line = "--smoke --compile off --digit 0 --runs 1 --sweep lr=1e-3,1e30 --steps 40"
    assert run(exp, line, tmp_path / "r") == 0 and "1 of 2 runs diverged" in capsys.readouterr().out
    assert run(exp, "--smoke --compile off --digit 0 --runs 1 --steps 40 --lr 1e-3",
               tmp_path / "one") == 0
    two, one = (np.load(tmp_path / name / "metrics.npz")["loss"] for name in ("r", "one"))
    assert np.array_equal(two[:, :1], one) and np.isnan(two[-1, 1])


# ---- claims and finished runs -------------------------------------------------------------------------

@pytest.mark.parametrize("measured, bound, verdict", [
    ([1, 2, 3, 9], (0, 5), "holds"), ([1, 9, 9, 9], (0, 5), "FALSE"), ([1, 1, 9, 9], (0, 5), "open"),
    ([1, 2], (0, 5), "open"), ([1, 2, 3, nan], (0, 5), "holds"), ([1, 2, nan, nan], (0, 5), "open"),
    ([inf] * 3, (inf, inf), "holds"), ((1.5, 1.4, 1.6), (1.3, 1.7), "holds"), (9, (0, 5), "FALSE"),
    ((1.7, 1.6, 1.8), (1.3, 1.7), "open"), ((2, 1.9, 2.1), (1.3, 1.7), "FALSE"), (5, (0, 5), "holds")])
def test_runs_intervals_and_numbers_have_verdicts(measured, bound, verdict):
    assert common.judge("id", "text", "source", measured, "in", bound)["verdict"] == verdict


def test_a_verdict_says_what_was_expected_and_measured():
    words = common.judge("id", "text", "source", [1, inf, nan], "<", 5)
    assert words["expected"] == "< 5" and "never" in words["measured"]
    assert "2 of 3 runs" in words["measured"]
    for relation, verdict in ("<", "holds"), (">", "FALSE"), ("is", "FALSE"):
        assert common.judge("", "", "", .9, relation, 2)["verdict"] == verdict


def test_claims_are_judged_for_the_studys_own_settings_alone(capsys):
    common.NOW.asked = False
    flags = common.cli(exp.Flags, exp.STUDIES, ["--study", "theory"])
    arrays = {k: np.asarray(v) for k, v in exp.Theory.compute(flags, None).items()}
    assert [c["verdict"] for c in common.judged(flags, arrays)] == ["FALSE"]  # .6881 is not log 2
    other = common.cli(exp.Flags, exp.STUDIES, ["--study", "theory", "--base", "7"])
    assert common.judged(other, arrays) == [] and "--base" in capsys.readouterr().out
    common.NOW.asked = True
    assert common.judged(flags, arrays) == []


def test_tools_on_finished_runs(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert run(exp, "--study theory", tmp_path / "t") == 0
    common.compare(str(finished), str(finished))
    common.claims(str(tmp_path / "t"))
    common.report(str(finished), str(tmp_path / "t"))
    said, page = capsys.readouterr().out, (tmp_path / "runs/report.html").read_text()
    assert (tmp_path / "runs/compare.png").exists() and "| tens-at-log2 |" in said
    assert "0 holds, 1 FALSE, 0 open" in said
    assert page.count("<img") == 4 and "tens-at-log2" in page and "<script" not in page
    wrong = {"nonsense": "compare RUN", "claims nowhere": "No such file",
             "fork exp_addition.py exp_b.py nonsense": "the studies of"}
    for line, words in wrong.items():
        done = python("common.py", *line.split())
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, line
