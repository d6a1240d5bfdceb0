"""What only a card can tell: python -m pytest -m cuda. Skipped where there is none."""
import importlib

import numpy as np
import pytest
import torch

import common
from conftest import STUDIES, alike, arrays_of, interrupted, run

pytestmark = [pytest.mark.cuda,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CARD = "--smoke --device cuda --save-every 0 --steps 230"


def programs(exp, line, tmp, dtype=torch.float32):
    """The program of a command line's first block, on the CPU and on the card, with the same state."""
    flags = common.cli(exp.Flags, exp.STUDIES, line.split())
    common.NOW.__init__(seconds={"compiling": 0, "run_steps": 0})
    made = {}

    def decide(program, *_):
        made[program.row.device.type] = program
        raise StopIteration
    for where in "cpu", "cuda":
        flags.device = where
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
            patch.setattr(common, "decide", decide)
            flags.room.compute(flags, tmp)
    for program in made.values():
        cast = lambda x: x.to(dtype) if x.dtype == torch.float32 else x
        for name in "state", "number", "rows":
            setattr(program, name, common.tree_map(cast, getattr(program, name)))
    return made["cpu"], made["cuda"]


@pytest.mark.parametrize("name, study", STUDIES, ids=str)
def test_a_study_runs_compiled(name, study, tmp_path):
    exp = importlib.import_module(name)
    assert run(exp, f"--smoke --device cuda --compile on --study {common.study_name(study.__name__)}",
               tmp_path / "r") == 0
    assert all(compiled for compiled, *_ in common.read(tmp_path / "r/config.json")["compiled"])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_three_steps_are_the_cpus(exp, dtype, tolerance, tmp_path):
    cpu, card = programs(exp, "--smoke", tmp_path, dtype)
    a, b = cpu(3), card(3)
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=tolerance, atol=tolerance)


def test_captured_is_compiled_bit_for_bit(exp, tmp_path):
    _, card = programs(exp, "--smoke", tmp_path)
    kept = common.to("cuda", card.state)
    card.compile()
    captured, state = card(50), common.to("cuda", card.state)
    common.fill(card.state, kept)
    del card.once  # compiled, not captured
    compiled = card(50)
    assert all(torch.equal(captured[k], compiled[k]) for k in captured)
    assert all(torch.equal(a, b) for a, b in zip(state["params"].values(),
                                                 card.state["params"].values()))


def test_a_read_is_so_many_graph_launches_and_nothing_waits(exp, tmp_path):
    _, card = programs(exp, "--smoke", tmp_path)
    card.compile()
    card(10)
    card.row.zero_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile() as seen:
            for _ in range(20):
                card.once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    calls = {e.key: e.count for e in seen.key_averages()}
    assert calls.get("cudaGraphLaunch") == 20 and "cudaLaunchKernel" not in calls


@pytest.mark.parametrize("runs", [1, 5, 64])
def test_bits_do_not_depend_on_company_or_cuts(exp, runs, tmp_path):
    for name in "a", "b":
        assert run(exp, f"{CARD} --runs {runs}", tmp_path / name) == 0
    assert alike(tmp_path / "a", tmp_path / "b")
    with interrupted(after=3):
        assert run(exp, f"{CARD} --runs {runs}", tmp_path / "cut") == 130
    assert run(exp, f"{CARD} --runs {runs} --resume", tmp_path / "cut") == 0
    assert alike(tmp_path / "a", tmp_path / "cut")
    assert run(exp, f"{CARD} --runs 1 --seed {runs - 1}", tmp_path / "last") == 0
    many, one = (arrays_of(tmp_path / n) for n in ("a", "last"))
    for k in [k for k in many if k.endswith("metrics.npz loss")]:
        assert np.array_equal(many[k][:, runs - 1::runs], one[k]), k


@pytest.mark.parametrize("compiled", [False, True])
def test_random_numbers_are_the_cpus(compiled):
    def draw(seed, step):
        key = common.key(seed, 1, step)
        return common.integers(key, 100, 1000), common.uniform(key, 1000)
    f = torch.vmap(draw)
    seeds, steps = torch.arange(1000) * 2 ** 51, torch.arange(1000)
    card = (torch.compile(f) if compiled else f)(seeds.cuda(), steps.cuda())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(f(seeds, steps), card))


def test_small_losses_are_exact():
    exp = importlib.import_module("exp_addition")
    logits = torch.tensor([[0., 60., -5.], [0., 69., 0.]], device="cuda")
    expected = torch.tensor([8.75651e-27, 2 * 1.08064e-30], device="cuda")
    torch.testing.assert_close(exp.nll(logits, torch.tensor([1, 1], device="cuda")), expected, rtol=1e-2,
                               atol=0)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_memory_is_at_most_a_quarter_over_the_plan(tmp_path):
    exp = importlib.import_module("exp_addition")
    _, card = programs(exp, "--smoke --block 64 --runs 64", tmp_path)
    one = common.run_of(card.state, 0), common.run_of(card.number, 0)
    step = exp.step_of(common.cli(exp.Flags, exp.STUDIES, ["--smoke"]))
    planned = 64 * common.first_step(step, *one, torch.device("cuda"))[0]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    card(1)
    assert torch.cuda.max_memory_allocated() - before <= 1.25 * planned


def test_too_little_memory_ends_in_one_line(tmp_path, capsys):
    assert run(importlib.import_module("exp_addition"), "--smoke --device cuda --batch 1e9",
               tmp_path / "r") == 2
    assert "out of memory" in capsys.readouterr().err
