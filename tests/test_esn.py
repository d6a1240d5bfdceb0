"""exp_esn_genetic: the engine against an explicit loop, exact symmetries, laws of known answer, exact capacities, spectral
radii against eigenvalues, failures that never win, operators that keep their space, one repetition alone and in company, seeds
that judge and never select, every study, networks from strangers, verdicts on made-up numbers, bad input."""
import inspect
import itertools
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import common_v1 as common
import exp_esn_genetic as exp
from conftest import cut

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
ROOT = Path(__file__).resolve().parent.parent
GENOTYPES, TASKS, METHODS = tuple(exp.KINDS), tuple(exp.TASKS), ("ga", "mutation", "random", "er", "dense", "shuffled")
SMALL = dict(n_units=8, population=6, steps=4, washout=20, train=60, test=40, ridge=1e-3, density=.3, compile="off",
             device="cpu", seeds="1000000..1000001", fitness_seeds="0..1", held_out_seeds="2000000..2000001")
SMOKE = "--smoke --runs 2 --compile off --bias-scaling .2 --density .4".split()
g = lambda seed=0: torch.Generator().manual_seed(seed)
randn = lambda *shape, seed=1: torch.randn(*shape, generator=g(seed), dtype=torch.float64)
double = lambda x: torch.as_tensor(x, dtype=torch.float64)
far = lambda a, b: (double(a) - double(b)).abs().max().item()
same = lambda a, b: a.keys() == b.keys() and all(np.array_equal(
    a[k], b[k], equal_nan=np.asarray(a[k]).dtype.kind == "f") for k in a)
flags_of = lambda line: common.cli(exp.Flags, line.split())
small = lambda **more: " ".join(f"--{k.replace('_', '-')} {v}" for k, v in (SMALL | more).items())
top = lambda W: np.abs(np.linalg.eigvals(np.asarray(W, float))).max()


def made(**fields):
    """Flags of a small network."""
    return exp.Flags(**SMALL | dict(n_units=6, population=4, steps=3, ridge=1., density=.5, inputs=2, horizon=3) | fields)


def first(flags, count=3, seed=0):
    return exp.first_genes(flags, count, g(seed))


def bred(genes, loss, flags, generator):
    """The next generation; its first are those that `breed` says."""
    new, elites = exp.breed(genes, loss, flags, generator)
    assert torch.equal(new[:flags.elites], genes[elites]) and len(elites) == flags.elites
    return new


def folder(path, flags):
    flags.argv = []
    path.mkdir(parents=True, exist_ok=True)
    return common.Folder(path, flags)


def searched(path, line):
    """(runs, arrays) of a search, nothing drawn."""
    flags = flags_of(line)
    return exp.search(flags, folder(path, flags))


def matrix(genes, flags):
    """W and W_in (None where it is not evolved) of one genotype [N, columns]."""
    genes, N, w_in = np.asarray(genes, float), flags.n_units, None
    if flags.evolve_w_in:
        size = (flags.input_scaling or exp.TASKS[flags.task].w_in) / (1 if flags.genotype == "continuous" else math.sqrt(3))
        genes, w_in = genes[:, :-1], genes[:, -1] * size  # signs are as strong as uniform numbers
    W = np.array([[genes[(i - j) % N, 0] if flags.genotype == "circulant" else genes[i, j] for j in range(N)]
                  for i in range(N)])
    return W * flags.radius / (math.sqrt(max(1, N * flags.density)) if flags.raw else top(W)), w_in


def plain(W, w_in, bias, u, y, flags):
    """One network on one seed, in float64: what the docstring says. Values [K]."""
    W, w_in, bias, u, y = (np.asarray(x, float) for x in (W, w_in, bias, u, y))
    x, states, end = np.zeros(len(W)), [], flags.washout + flags.train
    for now in u:
        x = (1 - flags.leak) * x + flags.leak * np.tanh(W @ x + w_in * now + bias)
        states.append(x)
    fit, test = np.array(states)[flags.washout:end], np.array(states)[end:]
    a, b, target = fit - fit.mean(0), y[flags.washout:end], y[end:]
    readout = np.linalg.solve(a.T @ a + flags.ridge * np.eye(len(W)), a.T @ (b - b.mean(0)))
    p = (test - fit.mean(0)) @ readout + b.mean(0)
    if flags.task == "memory":
        return np.array([np.corrcoef(p[:, k], target[:, k])[0, 1] ** 2 for k in range(y.shape[1])])
    return np.sqrt(((p - target) ** 2).mean(0)) / target.std(0)


def by_loop(W, w_in, bias, u, y, flags):
    """`plain` of networks W [P, N, N] with W_in [S, N] or [P, S, N]: [P, S, K]."""
    w_in = np.broadcast_to(w_in, (len(W), *np.shape(w_in)[-2:]))
    return np.array([[plain(V, w_in[p, s], bias[s], u[s], y[s], flags) for s in range(len(u))] for p, V in enumerate(W)])


# ---- the engine -----------------------------------------------------------------------------------------------------

CASES = [dict(genotype=genotype, task=task, leak=(1., .3)[i % 2], bias_scaling=(0., .5)[i // 2 % 2], evolve_w_in=i % 3 == 0,
              raw=i % 5 == 1) for i, (genotype, task) in enumerate(itertools.product(GENOTYPES, TASKS))]


@pytest.mark.parametrize("fields", CASES, ids=lambda f: f"{f['genotype']}-{f['task']}")
def test_batched_is_one_by_one_is_a_loop(fields):
    """States in float32, so to a tolerance, which is tight where the ridge is large."""
    for ridge, least in ((10., 3e-5), (.01, 5e-4)):
        flags, seeds = made(ridge=ridge, **fields), (3, 4)
        genes = first(flags)
        values, radius = exp.scored(genes, flags, seeds)
        w_in, bias, u, y = exp.data(flags, seeds)
        assert values.dtype == torch.float64 and values.shape == (3, 2, y.shape[2])
        for p, one in enumerate(genes):
            W, own = matrix(one, flags)
            expected = by_loop([W], w_in if own is None else np.tile(own, (1, 2, 1)), bias, u, y, flags)
            assert far(values[p], expected[0]) < least
            assert radius[p].item() == pytest.approx(top(W) if flags.raw else top(matrix(one, replace(flags, raw=True))[0])
                                                     * math.sqrt(6 * .5) / .9, rel=1e-4)
            for s, seed in enumerate(seeds):
                assert far(exp.scored(genes[p:p + 1], flags, (seed,))[0], values[p:p + 1, s:s + 1]) < least


@pytest.mark.parametrize("task", ["memory", "narma10"])
def test_blocks_of_time_and_of_networks_change_nothing(monkeypatch, task):
    flags = made(task=task, leak=.7, bias_scaling=.2, ridge=.1, washout=23, train=61, test=45)
    W, _, _ = exp.networks(first(flags, 5), flags)
    rest = exp.data(flags, (0, 1))
    expected = by_loop(W.numpy(), *rest, flags)
    for block, together in itertools.product((1, 7, 61, 10_000), (0, 36, 80, 10_000)):
        monkeypatch.setattr(exp, "BLOCK", block)
        monkeypatch.setattr(exp, "TOGETHER", together)
        assert far(exp.evaluate(W, *rest, flags), expected) < 1e-4, (block, together)
    own = torch.stack([rest[0], 2 * rest[0], rest[0].flip(0), rest[0], -rest[0]])  # a W_in for every network
    assert far(exp.evaluate(W, own, *rest[1:], flags), by_loop(W.numpy(), own, *rest[1:], flags)) < 1e-4


def test_a_readout_in_float64_survives_a_tiny_ridge():
    flags = made(n_units=30, washout=50, train=200, test=100, ridge=1e-8, density=.1)
    values, _ = exp.scored(first(flags, 20), flags, range(4))
    assert values.isfinite().all() and (values >= 0).all() and (values <= 1).all()


@pytest.mark.parametrize("leak", [1., .3, 0.])
def test_a_step_is_tanh(leak):
    """advance works on (x + 1) / 2; several steps, from any state, which becomes the last one."""
    W, w_in, bias, u, x = randn(2, 5, 5), randn(3, 5, seed=2), randn(3, 5, seed=3), randn(7, 3, seed=4), randn(2, 3, 5).tanh()
    drive = 2 * (w_in * u[:, None, :, None] + bias) - 2 * W.sum(2)[:, None]
    y, out = ((x + 1) / 2).float(), torch.empty(7, 2, 3, 5)
    exp.advance(y, (4 * W.mT).float().contiguous(), drive.float(), leak, out)
    for t in range(7):
        x = (1 - leak) * x + leak * torch.tanh(x @ W.mT + u[t][:, None] * w_in + bias)
        assert far(2 * out[t] - 1, x) < 3e-6
    assert torch.equal(y, out[-1]) or leak == 0


def test_moments_are_scores():
    """Squared correlation, 0 of a constant; NRMSE by the spread of the test targets."""
    p, y = randn(1, 2, 50, 3), 5 + randn(2, 50, 3, seed=2)
    p[0, 1, :, 1] = 4.
    moments = torch.stack([p.mean(2), (p * p).mean(2), (p * y[None]).mean(2)]).transpose(1, 2)
    memory, nrmse = (exp.scores_of(moments, y, made(task=task)) for task in ("memory", "narma10"))
    for s, k in itertools.product(range(2), range(3)):
        a, b = p[0, s, :, k].numpy(), y[s, :, k].numpy()
        assert memory[0, s, k].item() == pytest.approx(0 if (s, k) == (1, 1) else np.corrcoef(a, b)[0, 1] ** 2, abs=1e-12)
        assert nrmse[0, s, k].item() == pytest.approx(np.sqrt(((a - b) ** 2).mean()) / b.std())
    assert torch.equal(exp.score(memory, made()), memory.sum(2))
    assert torch.equal(exp.score(memory, made(task="lorenz")), memory.mean(2))
    lost = exp.scores_of(moments * math.nan, y, made())
    assert lost.isnan().all() and exp.loss_of(7., made()) == -1. and exp.loss_of(7., made(task="lorenz")) == 7.


# ---- symmetries -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", TASKS)
def test_names_and_signs_of_neurons_do_not_matter(task):
    flags = made(task=task, bias_scaling=.4, leak=.6, ridge=.1)
    W, _, _ = exp.networks(first(flags), flags)
    w_in, bias, u, y = exp.data(flags, (0, 1))
    values, order, signs = exp.evaluate(W, w_in, bias, u, y, flags), torch.randperm(6, generator=g()), torch.tensor(
        [1., -1, -1, 1, -1, 1])
    relabelled = exp.evaluate(W[:, order][:, :, order], w_in[:, order], bias[:, order], u, y, flags)
    turned = exp.evaluate(W * signs[:, None] * signs, w_in * signs, bias * signs, u, y, flags)
    assert far(relabelled, values) < 1e-4 and far(turned, values) < 1e-4
    assert far(exp.evaluate(W[:, order][:, :, order], w_in, bias, u, y, flags), values) > 1e-3
    assert far(exp.evaluate(W * signs[:, None] * signs, w_in, bias, u, y, flags), values) > 1e-3


@pytest.mark.parametrize("c", [2., .3, 50.])
def test_the_scale_of_W_matters_only_where_it_is_raw(c):
    scores = lambda c, **more: exp.scored(c * first(made(**more)), made(**more), (0, 1))[0]
    assert far(scores(c, genotype="continuous"), scores(1, genotype="continuous")) < 1e-5
    assert far(scores(c, raw=True), scores(1, raw=True)) > 1e-3
    W = randn(3, 6, 6).float()
    at = lambda W: exp.rescaled(W, exp.spectral_radius(W), .7)
    assert far(at(c * W), at(W)) < 1e-6 and at(W).dtype == torch.float32
    assert [top(V) for V in at(c * W)] == pytest.approx([.7] * 3, rel=1e-4)


# ---- laws -----------------------------------------------------------------------------------------------------------

def test_narma10_of_a_constant():
    y = exp.narma10_of(torch.full((1, 3000), .2, dtype=torch.float64))
    assert y[0, -1].item() == pytest.approx(.28768943743823394, abs=1e-14)


def test_narma10_is_its_recurrence():
    u = exp.noise((0, 1, 2), 60, 0, .5)
    for row, found in zip(u.tolist(), exp.narma10_of(u).tolist()):
        y = [0.] * 10
        for t in range(9, 60):
            y.append(.3 * y[t] + .05 * y[t] * sum(y[t - i] for i in range(10)) + 1.5 * row[t - 9] * row[t] + .1)
        assert found == pytest.approx(y[1:], abs=1e-13) and len(found) == 60
    flags = made(task="narma10")
    x, y = exp.narma10(flags, (0, 1, 2), 60)
    assert torch.equal(y[..., 0], exp.narma10_of(x)) and torch.equal(x, u.float().double())  # y[t+1] at t
    assert 0 <= exp.noise(range(20), 500, 0, .5).min() < .01 and .49 < exp.noise(range(20), 500, 0, .5).max() < .5


def test_sequences_that_diverge_are_drawn_again(monkeypatch):
    u = torch.full((2, 300), .5, dtype=torch.float64)
    y = exp.narma10_of(torch.stack([u[0], u[0] / 5]))
    lost = y[0].isnan()
    assert lost[-1] and not lost[:10].any() and lost[lost.int().argmax():].all() and not y[1].isnan().any()
    assert (y[0][~lost].abs() < 10).all()
    real, far_on = exp.noise, 2 ** 39
    flags, seeds = made(task="narma10"), range(400)
    drawn = exp.narma10_of(real(seeds, 1000, 0, .5).float().double()).isnan().any(1)
    assert 0 < drawn.sum() < 40  # they happen
    bad = drawn.nonzero()[0, 0].item()
    x, y = exp.narma10(flags, (0, bad), 1000)
    assert y.isfinite().all() and torch.equal(x[1], real((bad + far_on,), 1000, 0, .5)[0].float().double())
    assert torch.equal(x[:1], exp.narma10(flags, (0,), 1000)[0]) and torch.equal(y[..., 0], exp.narma10_of(x))
    monkeypatch.setattr(exp, "noise", lambda seeds, T, low, high: torch.cat([  # seed 5: thrice
        u[:1, :T] if seed in (5, 5 + far_on) else real((seed,), T, low, high) for seed in seeds]))
    x, y = exp.narma10(flags, (4, 5, 6), 300)
    expected = real((4, 5 + 2 * far_on, 6), 300, 0, .5).float().double()
    assert torch.equal(x, expected) and torch.equal(y[..., 0], exp.narma10_of(expected)) and y.isfinite().all()


def test_memory_targets_are_earlier_inputs():
    u, y = exp.memory(made(delays=9), (0, 7), 50)
    assert y.shape == (2, 50, 9) and exp.memory(made(), (0,), 50)[1].shape == (1, 50, 12)  # 2 N
    for k in range(1, 10):
        assert torch.equal(y[:, k:, k - 1], u[:, :-k])
    assert torch.equal(y[:, 0, :8], y[:, 1, 1:]) and torch.equal(u, u.float().double())  # also before the first input
    u, _ = exp.memory(made(), range(20), 2000)
    assert u.min() < -.79 and u.max() > .79 and u.abs().max() < .8 and u.var().item() == pytest.approx(.64 / 3, rel=.02)


def test_mackey_glass():
    """Its fixed point; half the inner step; Heun's method at a tenth of it."""
    assert far(exp.mackey_glass_of(np.ones(1), 50), 1.) < 1e-12
    start = np.array([.5, 1.2, .9])
    x = exp.mackey_glass_of(start, 60)
    assert x.shape == (3, 60) and 1e-12 < far(x, exp.mackey_glass_of(start, 60, inner=.05)) < 1e-4
    h, lag, f = .01, 1700, lambda x, late: .2 * late / (1 + late ** 10) - .1 * x
    rows = [start] * (lag + 1)
    for i in range(lag, lag + 6000):
        k = f(rows[i], rows[i - lag])
        rows.append(rows[i] + h / 2 * (k + f(rows[i] + h * k, rows[i - lag + 1])))
    assert far(x, np.array(rows)[lag + 100::100].T) < 1e-4
    for ahead in (84, 3):
        u, y = exp.mackey_glass(made(horizon=0 if ahead == 84 else ahead), (0, 1), 200)
        assert torch.equal(y[:, :-ahead, 0], u[:, ahead:]) and y.shape == (2, 200, 1) and far(u[0], u[1]) > .01
    late = exp.mackey_glass_of(exp.noise((0, 1), 1, .6, 1.4)[:, 0].numpy(), 700)[:, 500:] - 1
    assert far(u, late) < 1e-6


def test_lorenz():
    """Its fixed point; the midpoint rule at a twentieth of the inner step."""
    at = math.sqrt(72)
    assert far(exp.lorenz_of(np.array([[at, at, 27], [-at, -at, 27]]), 20), torch.tensor([[at, at, 27], [-at, -at, 27]])[
        :, None]) < 1e-6
    start = np.array([[1., 2, 20], [-5, 3, 30]])
    f = lambda s: np.stack([10 * (s[:, 1] - s[:, 0]), s[:, 0] * (28 - s[:, 2]) - s[:, 1],
                            s[:, 0] * s[:, 1] - 8 / 3 * s[:, 2]], 1)
    s, rows = start, []
    for _ in range(2000):
        s = s + 5e-4 * f(s + 2.5e-4 * f(s))
        rows.append(s)
    found = exp.lorenz_of(start, 20)
    assert found.shape == (2, 20, 3) and far(found, np.array(rows)[99::100].transpose(1, 0, 2)) < 2e-3
    for ahead in (8, 3):
        u, y = exp.lorenz(made(horizon=0 if ahead == 8 else ahead), (0, 1), 100)
        assert torch.equal(y[:, :-ahead, 0], u[:, ahead:]) and y.shape == (2, 100, 1) and u.abs().max() < 1.2
    late = exp.lorenz_of(exp.noise((0, 1), 3, -8, 8) + torch.tensor([0., 0, 25]), 600)[:, 500:, 0] / 20
    assert far(u, late) < 1e-6


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_draws_the_same_alone_and_in_company(task):
    flags = made(task=task, bias_scaling=.1)
    together, alone = exp.data(flags, (3, 9, 4)), exp.data(flags, (9,))
    assert all(torch.equal(a[1], b[0]) for a, b in zip(together, alone))
    w_in, bias, u, y = together
    assert all(far(x[0], x[1]) > .01 for x in together) and w_in.shape == bias.shape == (3, 6) and u.shape == (3, 120)
    size = exp.TASKS[task].w_in
    many = exp.data(replace(flags, n_units=200), range(9))
    assert all(.99 < x.abs().max() / limit <= 1 for x, limit in zip(many, (size, .1)))
    assert abs(many[0].mean()) < size / 20 and far(many[0] / size, many[1] / .1) > .1
    scaled, other = exp.data(replace(flags, input_scaling=3 * size), (3, 9, 4)), exp.data(replace(flags, seed=1), (3, 9, 4))
    assert far(scaled[0], 3 * w_in) < 1e-6 and torch.equal(scaled[2], u) and torch.equal(other[0], w_in)


def test_a_fixed_W_in_is_that_of_the_repetition():
    fixed = lambda seed, seeds=(3, 9): exp.data(made(w_in="fixed", seed=seed), seeds)
    w_in, _, u, _ = fixed(0)
    assert torch.equal(w_in[0], w_in[1]) and far(u[0], u[1]) > .1 and torch.equal(u, exp.data(made(), (3, 9))[2])
    assert torch.equal(fixed(0, (5,))[0][0], w_in[0]) and far(fixed(1)[0], w_in) > .01


def test_sets_of_seeds():
    at = lambda which, generation=0, **fields: exp.seeds_of(exp.Flags(**fields), which, generation)
    assert [at("fitness_seeds", seed=s) for s in (0, 1, 5)] == [range(4), range(4, 8), range(20, 24)]
    assert [at("held_out_seeds", seed=s) for s in (0, 2)] == [range(2_000_000, 2_000_008), range(2_000_016, 2_000_024)]
    assert {at("seeds", t, seed=s, fresh=f) for t in (0, 5) for s in (0, 9) for f in (0, 1)} == {range(1_000_000, 1_000_032)}
    assert at("fitness_seeds", 7) == range(4) and at("seeds", seeds="17") == range(17, 18)
    fresh = [at("fitness_seeds", t, seed=s, fresh=True, steps=10) for s in range(4) for t in range(10)]
    assert sorted(e for seeds in fresh for e in seeds) == [*range(160)]  # each once
    assert at("held_out_seeds", 3, seed=1, fresh=True) == at("held_out_seeds", seed=1)
    for s in range(100):
        sets = [set(at(which, seed=s)) for which in exp.SETS]
        assert not any(a & b for a, b in itertools.combinations(sets, 2))


# ---- exact ----------------------------------------------------------------------------------------------------------

def test_linear_capacity_of_a_ring_and_of_a_chain():
    """N - 1 + r^2N of a ring, whatever drives it; of a chain from its head one for every delay below N."""
    for N, r in ((20, .9), (7, .5)):
        for seed in range(3):
            w_in = randn(N, seed=seed) if seed else np.eye(N)[3]
            assert exp.linear_capacity(exp.cycle(N, r), w_in, 200).sum() == pytest.approx(N - 1 + r ** (2 * N), abs=1e-3)
    assert exp.linear_capacity(exp.cycle(20, .9), np.eye(20)[0], 200).sum() == pytest.approx(19.0148, abs=1e-4)
    for r in (.9, .5):
        assert far(exp.linear_capacity(exp.delay_line(9, r), np.eye(9)[0], 14), [1.] * 8 + [0.] * 6) < 1e-9
    assert far(exp.linear_capacity(exp.delay_line(9, .9), np.eye(9)[6], 4), [1., 1, 0, 0]) < 1e-9
    ring, chain = exp.cycle(4, .5).numpy(), exp.delay_line(4, .5).numpy()
    assert ring.tolist() == (np.eye(4)[[3, 0, 1, 2]] / 2).tolist() and chain.tolist() == (np.eye(4, k=-1) / 2).tolist()
    for W, w_in in ((0 * ring, np.ones(4)), (ring, np.zeros(4))):
        assert (exp.linear_capacity(W, w_in, 5) == 0).all()
    assert np.isnan(exp.linear_capacity(2 * ring, np.ones(4), 5)).all()


@pytest.mark.parametrize("noise", [0., 1e-4, .1])
def test_linear_capacity_by_its_covariance(noise):
    for seed in range(3):
        W = .8 * randn(5, 5, seed=seed).numpy() / top(randn(5, 5, seed=seed))
        c, columns = randn(5, seed=9 + seed).numpy(), []
        for _ in range(300):
            columns.append(c)
            c = W @ c
        C = np.stack(columns, 1)
        cov = .64 / 3 * C @ C.T
        w = np.linalg.solve(cov + noise * np.eye(5), .64 / 3 * C)
        power = (w * (cov @ w)).sum(0)
        expected = (w * C * .64 / 3).sum(0) ** 2 / (power * .64 / 3)
        found = exp.linear_capacity(W, columns[0], 150, noise)
        assert far(found[:20], expected[1:21]) < 1e-6 and (noise or 4 <= found.sum() <= 5)
        assert noise or found.sum() + expected[0] == pytest.approx(5, abs=1e-4)  # with delay 0: N


def test_measured_capacity_is_the_linear_one_where_inputs_are_tiny():
    """Ring and random networks at 1e-3 to 1e-2 of their inputs, long series; the ridge is its noise."""
    flags = made(n_units=10, washout=200, train=6000, test=6000, input_scaling=.01, ridge=1e-6, delays=40, density=.3)
    W = torch.cat([exp.cycle(10, .9)[None], exp.networks(first(flags, 2), flags)[0]])
    for ridge in (1e-6, .02):
        at = replace(flags, ridge=ridge)
        w_in, *rest = exp.data(at, (0, 1))
        values = exp.evaluate(W, w_in, *rest, at)
        known = np.array([[exp.linear_capacity(V, w, 40, ridge / 6000) for w in w_in] for V in W])
        assert far(values, known) < .06 and far(values.sum(2), known.sum(2)) < .25 and (values.sum(2) < 10 + 40 / 6000).all()
        if ridge < .01:
            assert far(values[0].sum(1), 9 + .9 ** 20) < .2 and (known[0].sum(1) > 9.1).all()
        else:
            assert (known.sum(2) < 8.5).all()  # a penalty that counts
    tiny = replace(flags, input_scaling=1e-3, ridge=1e-8)
    assert far(exp.evaluate(W[:1], *exp.data(tiny, (0, 1)), tiny).sum(2), 9 + .9 ** 20) < .2


def test_no_capacity_exceeds_n():
    flags = made(n_units=5, washout=50, train=2000, test=2000, ridge=1e-8, input_scaling=.5, delays=30, bias_scaling=.3)
    assert exp.scored(first(flags, 20), flags, (0, 1))[0].sum(2).max() < 5 + 30 / 2000


def test_the_linear_floor():
    """.39 to .41 of NARMA10; nothing where the target is a sum of inputs; by numpy's least squares."""
    flags = exp.Flags(task="narma10", train=1000, test=1000)
    _, _, u, y = exp.data(flags, range(8))
    floor = exp.linear_floor(u, y, flags)
    assert floor.shape == (8,) and .37 < floor.mean() < .42
    past = np.stack([np.r_[np.zeros(k), u[0, :len(u[0]) - k].double().numpy()] for k in range(41)] + [np.ones(2200)], 1)
    target = y[0, :, 0].numpy()
    fit = np.linalg.lstsq(past[200:1200], target[200:1200], rcond=None)[0]
    p = past[1200:] @ fit
    assert floor[0].item() == pytest.approx(np.sqrt(((p - target[1200:]) ** 2).mean()) / target[1200:].std(), rel=1e-4)
    flags = exp.Flags(delays=5)
    _, _, u, y = exp.data(flags, (0,))
    assert exp.linear_floor(u, y, flags).max() < 1e-6 and exp.linear_floor(u, y, flags, lags=4).max() > .1


def test_references_are_ring_chain_and_random_networks():
    for task in ("memory", "narma10"):
        flags = made(task=task, radius=.7, genotype="circulant", raw=True, evolve_w_in=True)
        found, (w_in, bias, u, y) = exp.references(flags), exp.data(flags, range(1_000_000, 1_000_002))
        assert found["reference"].shape == (4, 2) and found["set_final"].tolist() == [1_000_000, 1_000_001]
        for i, weights in enumerate([.7 * np.eye(6)[[5, *range(5)]], .7 * np.eye(6, k=-1)]):
            values = by_loop([weights], w_in, bias, u, y, flags)[0]
            assert far(found["reference"][i], values.sum(1) if task == "memory" else values.mean(1)) < 1e-4
            assert far(found["reference_by_target"][i], values.mean(0)) < 1e-4
        assert found["reference"].isfinite().all() and found["floor"].isnan().all() == (task == "memory")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp, "evaluate", lambda W, *rest, real=exp.evaluate: (seen.append(W), real(W, *rest))[1])
        exp.references(made(n_units=30, density=.2, radius=.7, genotype="circulant", raw=True, evolve_w_in=True))
    assert [len(W) for W in seen] == [1, 1, exp.DRAWS, exp.DRAWS]
    assert [(W != 0).float().mean().item() for W in seen[2:]] == pytest.approx([.2, 1], abs=.03)
    assert [top(W) for W in (*seen[2], *seen[3])] == pytest.approx([.7] * 2 * exp.DRAWS, rel=1e-4)


# ---- spectral radius ------------------------------------------------------------------------------------------------

turned = lambda a, r=1.: r * double([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
block = lambda *parts: torch.block_diag(*parts).double()
NILPOTENT = {"zero": torch.zeros(4, 4), "chain": exp.delay_line(50, .9), "two": torch.tensor([[1., 1], [-1, -1]]),
             "triangular": torch.triu(randn(9, 9), 1), "permuted": torch.triu(randn(9, 9), 1)[p := torch.randperm(
                 9, generator=g())][:, p]}
OTHERS = {"rotation": (block(turned(.7, 2.), turned(2., .5), torch.eye(3)), 2.),
          "rotation alone": (turned(1.234), 1.), "jordan": (torch.eye(5) * .8 + torch.diag(torch.ones(4), 1), .8),
          "far from normal": (torch.eye(50).double() / 1000 + torch.diag(torch.ones(49), 1), 1e-3),
          "ring": (exp.cycle(50, .9), .9), "minus": (-torch.eye(3), 1.), "pair": (torch.tensor([[0., 4], [1, 0]]), 2.),
          "tiny": (1e-30 * turned(1.), 1e-30), "huge": (1e30 * turned(1.), 1e30), "one": (torch.ones(7, 7), 7.)}


@pytest.mark.parametrize("name", OTHERS)
def test_spectral_radii_by_hand(name):
    W, expected = OTHERS[name]
    assert exp.spectral_radius(W[None].double()).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", NILPOTENT)
def test_a_network_without_cycles_has_radius_0_exactly(name):
    assert exp.spectral_radius(NILPOTENT[name][None]).item() == 0
    W = NILPOTENT[name][None].float()
    assert torch.equal(exp.rescaled(W, exp.spectral_radius(W), .5), W * .5)  # it has no scale of its own


def test_spectral_radii_are_those_of_eigvals():
    for N in (2, 5, 30):
        sign = lambda p: torch.randint(-1, 2, (20, N, N), generator=g(N)) * (torch.rand(20, N, N, generator=g(1)) < p)
        for W in (randn(20, N, N), sign(1.), sign(.3), randn(20, N, N).abs(), randn(20, N, N) - randn(20, N, N).mT):
            found = exp.spectral_radius(W)
            known = torch.linalg.eigvals(W.double()).abs().amax(1)
            away = found > 0  # eigvals is not exact where there are no cycles
            assert far(found[away] / known[away], 1.) < 1e-4 and (known[~away] < .05).all()
            assert far(found, torch.cat([exp.spectral_radius(V[None]) for V in W])) < 1e-12
    lost = exp.spectral_radius(torch.stack([torch.eye(3), torch.full((3, 3), math.nan)]))
    assert lost[0] == 1 and lost[1].isnan()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fields", [dict(radius=0.), dict(radius=0., raw=True), dict(density=0.), dict(density=0., raw=True),
                                    dict(radius=0., task="narma10"), dict(density=0., task="lorenz", leak=.2)], ids=str)
def test_networks_without_recurrence_are_finite(fields):
    """Zero weights, radius 0, a chain: finite, scored as the loop does, and flagged."""
    flags = made(**fields)
    genes = first(flags)
    values, radius = exp.scored(genes, flags, (0, 1))
    assert far(values, by_loop(np.zeros((3, 6, 6)), *exp.data(flags, (0, 1)), flags)) < 1e-5
    assert (radius == 0).all() == ("density" in fields or flags.raw)
    chain = exp.delay_line(6, 1.)[None]
    values, radius = exp.scored(chain, replace(flags, radius=.5, raw=False), (0, 1))
    assert radius == 0 and far(values, by_loop(chain.numpy() / 2, *exp.data(flags, (0, 1)), flags)) < 1e-5
    state = {"params": {"genes": torch.cat([genes, chain]), "loss": torch.full((4,), math.nan).double()}, "t": torch.tensor(0)}
    _, logs = exp.step_of([flags])(state, torch.tensor(1), {"run": torch.tensor(0)})
    assert logs["acyclic"] == (4 if (radius := exp.networks(genes, flags)[2] == 0).all() else 1 + radius.sum())
    assert logs["failed"] == 0 and logs["fitness"].isfinite().all()


# ---- failures -------------------------------------------------------------------------------------------------------

def test_a_singular_gram_matrix_without_a_ridge_is_flagged_and_never_wins():
    """Neurons that are never moved: their states are 0 at every time."""
    flags = made(task="narma10", evolve_w_in=True, ridge=0.)
    genes = first(flags, 4)
    genes[2] = 0.
    values, _ = exp.scored(genes, flags, (0, 1))
    assert values[2].isnan().all() and values[[0, 1, 3]].isfinite().all()
    state = {"params": {"genes": genes, "loss": torch.full((4,), math.nan).double()}, "t": torch.tensor(0)}
    new, logs = exp.step_of([flags])(state, torch.tensor(1), {"run": torch.tensor(0)})
    assert logs["failed"] == 1 and logs["fitness"].isnan().tolist() == [False, False, True, False]
    assert logs["loss"] == logs["fitness"][[0, 1, 3]].min() and exp.best_of(new["params"])[0].any()
    assert exp.scored(genes, replace(flags, ridge=1.), (0, 1))[0].isfinite().all()
    memory = exp.scored(genes, replace(flags, task="memory", ridge=1.), (0, 1))[0]
    assert memory[2].max() < 1e-12 and memory[0].max() > .01  # a constant remembers nothing


def test_a_matrix_without_a_cholesky_factor_is_flagged_and_its_neighbours_are_not():
    """Indefinite: what is left of its factor is finite, and solves into finite nonsense."""
    gram = 4 * torch.stack([torch.eye(2), torch.tensor([[1., 2], [2, 1]])])[None].double()
    cross, y = torch.tensor([[[0., 3], [0, 1]]] * 2).double()[None], torch.ones(1, 4, 1).double()
    readout, intercept = exp.ridge(gram.clone(), cross.clone(), y, made(ridge=2.))
    assert readout[0, 0, :, 0].tolist() == pytest.approx([3 / 6, 1 / 6]) and intercept[0, 0].item() == 1
    assert readout[0, 1].isnan().all() and intercept[0, 1].isnan().all()


def test_one_failed_seed_fails_the_network(monkeypatch):
    values = torch.rand(4, 2, 3, generator=g()).double()
    values[1, 1, 2] = math.nan
    monkeypatch.setattr(exp, "scored", lambda genes, flags, seeds: (values, torch.ones(4)))
    state = {"params": {"genes": first(made(), 4), "loss": torch.full((4,), math.nan).double()}, "t": torch.tensor(0)}
    new, logs = exp.step_of([made()])(state, torch.tensor(1), {"run": torch.tensor(0)})
    assert logs["failed"] == 1 and logs["fitness"].isnan().tolist() == [False, True, False, False]
    assert far(logs["fitness"][[0, 2, 3]], values[[0, 2, 3]].sum(2).mean(1)) < 1e-12
    assert far(new["params"]["loss"][[0, 2, 3]], 6 - logs["fitness"][[0, 2, 3]]) < 1e-12
    assert logs["loss"] == 6 - logs["fitness"].nan_to_num(0).max() and new["t"] == 1
    assert torch.equal(new["params"]["genes"], state["params"]["genes"])  # the first generation is what was drawn


@pytest.mark.parametrize("method", METHODS[:-1])
def test_nan_never_wins(method):
    flags = made(method=method, population=6, tournament=5, edits=0, crossover="none", elites=2)
    genes = first(flags, 6)
    loss = torch.tensor([math.nan, 3, math.nan, 2, math.inf, math.nan], dtype=torch.float64)
    assert torch.equal(exp.best_of({"genes": genes, "loss": loss}), genes[3:4])
    for seed in range(20):
        children = bred(genes, loss, flags, g(seed))
        assert torch.equal(children[:2], genes[[3, 1]])
        if method in ("ga", "mutation"):
            assert all(torch.equal(child, genes[3]) or torch.equal(child, genes[1]) for child in children)
    lost = torch.full((6,), math.nan).double()
    assert bred(genes, lost, flags, g()).shape == genes.shape and len(exp.best_of({"genes": genes, "loss": lost})) == 1


def test_the_best_of_some_numbers():
    nan = math.nan
    x = np.array([[[1, nan, 3], [nan, nan, nan]], [[1, nan, 3], [2, 1, np.inf]]])
    assert np.array_equal(exp.best(x, np.array([1., -1])), [[3, nan], [1, 1]], equal_nan=True)
    assert np.array_equal(exp.best(x[0], np.array([-1., 1])), [1, nan], equal_nan=True)


@pytest.mark.parametrize("study", [s for s in exp.STUDIES if s != "score"])
def test_a_search_in_which_everything_fails_ends(tmp_path, study, monkeypatch):
    """Without input and ridge no readout exists: marked, no warning, no verdict."""
    monkeypatch.setattr(exp, "evaluate", lambda W, w_in, bias, u, y, flags: torch.full(
        (len(W), len(u), y.shape[2]), math.nan, dtype=torch.float64))
    assert exp.main(["--smoke", "--study", study, "--out", str(tmp_path / "r"), "--figures", next(iter(exp.STUDIES[study][2]))
                     ]) == 0
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert all(run["diverged"] for run in summary["runs"]) and not any(c["holds"] is False for c in summary["claims"])


# ---- operators ------------------------------------------------------------------------------------------------------

def in_space(genes, flags):
    """Whether genotypes belong to the space."""
    W = genes[..., :flags.columns - flags.evolve_w_in]
    if flags.genotype == "indegree":
        assert ((W != 0).sum(2) == flags.inputs).all()
    if flags.genotype == "continuous":
        return bool((genes.abs() <= 1).all())
    return bool(torch.isin(genes, torch.tensor([0., 1.] if flags.genotype == "mask" else [-1., 0, 1])).all())


@pytest.mark.parametrize("evolved", [False, True])
@pytest.mark.parametrize("genotype", GENOTYPES)
def test_operators_keep_the_space(genotype, evolved):
    for kind in ("mixed", *exp.KINDS[genotype]):
        flags = made(genotype=genotype, evolve_w_in=evolved, n_units=8, inputs=3, mutation=kind, sigma=2., density=.3)
        genes = first(flags, 40)
        assert genes.shape == (40, 8, (1 if genotype == "circulant" else 8) + evolved) and in_space(genes, flags)
        assert not evolved or (genes[..., -1] != 0).all()
        if genotype != "indegree":
            assert (genes[..., :flags.columns - evolved] != 0).float().mean().item() == pytest.approx(.3, abs=.1)
        if genotype != "mask":
            assert .35 < (genes[genes != 0] > 0).float().mean() < .65
        for _ in range(3):
            before = genes.clone()
            genes = exp.mutate(genes, flags, g())
            assert in_space(genes, flags) and genes.shape == before.shape and not torch.equal(genes, before)
        for crossover in ("row", "none") if genotype == "indegree" else ("row", "column", "block", "uniform", "none"):
            at = replace(flags, crossover=crossover)
            at.check()
            assert in_space(exp.cross(genes, genes.flip(0), at, g()), at)
        W, w_in, _ = exp.networks(genes, flags)
        assert W.shape == (40, 8, 8) and (w_in is not None) == evolved
        if genotype == "circulant":
            assert torch.equal(W.roll((1, 1), (1, 2)), W)


def test_values_of_first_genes():
    values = first(made(genotype="continuous", n_units=30, density=1.), 5)
    assert values.abs().mean().item() == pytest.approx(.5, abs=.02) and abs(values.mean()) < .05
    er, dense = (first(made(method=m, n_units=30, density=.2, genotype="circulant"), 20) for m in ("er", "dense"))
    assert er.shape == dense.shape == (20, 30, 30) and (dense != 0).all() and dense.std().item() == pytest.approx(1, abs=.05)
    assert (er != 0).float().mean().item() == pytest.approx(.2, abs=.02)
    inputs = first(made(genotype="indegree", n_units=10, inputs=4), 200) != 0
    assert (inputs.sum(2) == 4).all() and far(inputs.float().mean((0, 1)), .4) < .06
    assert not torch.equal(first(made(), 2)[0], first(made(), 2)[1])
    assert set(first(made(method="er", evolve_w_in=True), 9)[..., -1].flatten().tolist()) == {-1., 1.}


@pytest.mark.parametrize("task", ["memory", "lorenz"])
def test_many_seeds_are_taken_a_few_at_a_time(monkeypatch, task):
    """Which ones together changes nothing, with W_in of the seeds, of a network, or of both."""
    flags, seeds = made(task=task, bias_scaling=.1), range(5, 10)
    W = exp.networks(first(flags), flags)[0]
    w_in, *rest = exp.data(flags, seeds)
    mine, both = .1 * randn(3, 6).float(), .1 * randn(3, 5, 6).float()
    whole = [exp.evaluate(W, x, *rest, flags) for x in (w_in, mine[:, None], both)]
    real = exp.slices(flags, seeds)
    assert [e for few in real for e in few] == [*seeds] and len(real) == 1
    huge = exp.slices(made(task=task, n_units=500, train=100_000), range(50))
    assert [e for few in huge for e in few] == [*range(50)] and len(huge) == (50 if task == "memory" else 1)
    monkeypatch.setattr(exp, "slices", lambda flags, seeds: [seeds[:2], seeds[2:4], seeds[4:]])
    for own, expected in zip((None, mine, both), whole):
        assert far(exp.on_seeds(W, own, flags, seeds), expected) < 1e-5


def changed(kind, edits=3, N=20, M=400, **fields):
    """(parents, children) [M, N, ..] by one kind of edit."""
    flags = made(**dict(n_units=N, mutation=kind, edits=edits, density=.3) | fields)
    genes = first(flags, 1).expand(M, -1, -1)
    return genes, exp.mutate(genes, flags, g(7))


@pytest.mark.parametrize("edits", [1, 3])
@pytest.mark.parametrize("kind, each", [("toggle", 1), ("flip", 1), ("rewire", 2), ("gauss", 1)])
def test_a_child_has_one_edit_more_or_less(kind, each, edits):
    a, b = changed(kind, edits, genotype="continuous" if kind == "gauss" else "ternary")
    count = (a != b).flatten(1).sum(1)
    assert count.max() == each * (edits + 1)  # two edits may meet, so the least is not sharp
    share = [(count == each * n).float().mean().item() for n in (edits - 1, edits, edits + 1)]
    assert all(.22 < s < .45 for s in share), share
    if kind == "flip":
        assert torch.equal(a.abs(), b.abs())


@pytest.mark.parametrize("method", ["toggle", "flip", "rewire", "mixed"])
def test_no_edits_change_nothing(method):
    a, b = changed(method, 0)
    assert torch.equal(a, b)


@pytest.mark.parametrize("genotype", GENOTYPES)
def test_a_rewired_weight_keeps_its_value(genotype):
    """So the density stays exactly; W and W_in exchange nothing, and with indegree a neuron none with another."""
    flags = made(genotype=genotype, mutation="rewire", n_units=12, evolve_w_in=True, edits=4, inputs=4)
    genes = first(flags, 200)
    genes[:, ::2, -1] = 0.  # room in W_in
    children = exp.mutate(genes, flags, g())
    parts = lambda x: [x[..., :-1].flatten(1), x[..., -1]] if genotype != "indegree" else [*x[..., :-1].unbind(1)]
    for a, b in zip(parts(genes), parts(children)):
        assert torch.equal(a.sort(1).values, b.sort(1).values) and not torch.equal(a, b)


@pytest.mark.parametrize("genotype", ["mask", "ternary", "continuous", "circulant"])
@pytest.mark.parametrize("density", [.1, .5, .9])
def test_the_density_does_not_drift(genotype, density):
    """As many weights appear as vanish; also with W_in in the genotype, and of both signs."""
    for evolved in (False, True):
        flags = made(genotype=genotype, mutation="toggle", n_units=24, density=density, evolve_w_in=evolved)
        genes = first(flags, 1).expand(3000, -1, -1)
        if genotype == "circulant" and not 3 < (genes[0, :, 0] != 0).sum() < 21:
            continue  # nothing left to add or to take
        children = exp.mutate(genes, flags, g(3))
        change = ((children != 0).flatten(1).sum(1) - (genes != 0).flatten(1).sum(1)).float()
        if not evolved:  # a full W_in can only lose
            assert abs(change.mean()) < .12 and change.std() > 1
        W = lambda x: (x[..., :flags.columns - evolved] != 0).flatten(1).sum(1).float()
        assert abs((W(children) - W(genes)).mean()) < .12
        born = children[(genes == 0) & (children != 0)]
        assert genotype == "mask" or .45 < (born > 0).float().mean() < .55
        if genotype == "continuous":
            assert born.abs().mean().item() == pytest.approx(.5, abs=.03)


def test_noise_on_a_weight():
    a, b = changed("gauss", 1, genotype="continuous", sigma=.05, M=2000)
    moved = (b - a)[(a != b) & (a.abs() < .8)]
    assert moved.std().item() == pytest.approx(.05, rel=.1) and abs(moved.mean()) < .005 and (a[a != b] != 0).all()
    a, b = changed("gauss", 3, genotype="continuous", sigma=5.)
    assert b.abs().max() == 1 and ((b == 1).any() and (b == -1).any())
    a, b = changed("gauss", 3, genotype="continuous", sigma=0.)
    assert torch.equal(a, b)


def test_every_weight_and_every_place_has_its_turn():
    for kind in ("toggle", "flip", "rewire"):
        a, b = changed(kind, 3, N=8, M=4000)
        moved, there = (a != b).float().mean(0), a[0] != 0
        assert moved[there].min() > .5 * moved[there].mean() and moved[there].max() < 1.5 * moved[there].mean()
        if kind != "flip":
            assert moved[~there].min() > .5 * moved[~there].mean() and moved[~there].max() < 1.5 * moved[~there].mean()
    a, b = changed("mixed", 1, N=20, M=3000)
    more = (b != 0).flatten(1).sum(1) - (a != 0).flatten(1).sum(1)
    kinds = {"flip": ((a == -b) & (a != 0)).flatten(1).any(1), "appears": more > 0, "vanishes": more < 0}
    one = {k: v.float().mean().item() for k, v in kinds.items()}
    assert .2 < one["flip"] < .4 and .1 < one["appears"] < .25 and .1 < one["vanishes"] < .25


def test_an_empty_genotype_can_grow_and_a_full_one_shrink():
    flags = made(mutation="toggle", n_units=5)
    for value in (0., 1.):
        for kind in ("toggle", "flip", "rewire", "mixed"):
            children = exp.mutate(torch.full((50, 5, 5), value), replace(flags, mutation=kind), g())
            assert in_space(children, flags)
            assert (children != value).any() == (kind in ("toggle", "mixed") or kind == "flip" and value == 1)


@pytest.mark.parametrize("kind", ["row", "column", "block", "uniform", "none"])
def test_what_a_child_takes_from_its_second_parent(kind):
    a, b = torch.zeros(600, 6, 7), torch.ones(600, 6, 7)
    taken = exp.cross(a, b, made(crossover=kind), g()) == 1
    rows, columns, share = taken.any(2), taken.any(1), taken.float().mean()
    if kind == "none":
        assert not taken.any()
        return
    assert .05 < taken.float().mean(0).min() and len({str(x.tolist()) for x in taken}) > 30  # every gene, in many ways
    if kind == "block":  # a rectangle of half of the genes, round the edges
        assert torch.equal(taken, rows[:, :, None] & columns[:, None]) and .4 < share < .6
        for x in (rows, columns):
            assert ((x != x.roll(1, 1)).sum(1) == 2).all() and len(set(x.sum(1).tolist())) == 1
    else:
        assert share.item() == pytest.approx(.5, abs=.03)
        assert torch.equal(taken, taken[:, :, :1].expand_as(taken)) == (kind == "row")
        assert torch.equal(taken, taken[:, :1].expand_as(taken)) == (kind == "column")


def test_parents_are_the_best_of_a_tournament_without_repetition():
    """Of 3 of 6: 10, 6, 3 and 1 of 20 times, never the last two; the second parent as the first."""
    genes = torch.arange(6.)[:, None, None].expand(6, 4, 4) + 1
    loss = torch.tensor([30., 10, 60, 20, 50, 40]).double()
    ranks = torch.tensor([2, 0, 5, 1, 4, 3])

    def share(**fields):
        flags = made(**dict(n_units=4, population=6, elites=1, edits=0, crossover="none") | fields)
        seen = torch.stack([bred(genes, loss, flags, g(s))[flags.elites:] for s in range(300)])
        ranked = ranks[seen.long() - 1]
        return torch.bincount(ranked.flatten(), minlength=6) / ranked.numel(), ranked
    assert far(share()[0], torch.tensor([10, 6, 3, 1, 0, 0]) / 20) < .06 and (share()[0][4:] == 0).all()
    assert share(tournament=6)[0][0] == 1 and far(share(tournament=1)[0], torch.full((6,), 1 / 6)) < .05
    assert far(share(tournament=2)[0], torch.tensor([5., 4, 3, 2, 1, 0]) / 15) < .06
    assert far(share(crossover="row")[0], torch.tensor([10, 6, 3, 1, 0, 0]) / 20) < .06
    both = share(crossover="uniform")[1].flatten(2)
    assert (both.amin(2) < both.amax(2)).float().mean() > .4  # two parents


@pytest.mark.parametrize("method", METHODS)
def test_elites_survive_and_children_come_from_where_they_should(method):
    flags = made(method=method, population=8, elites=3, n_units=10)
    genes = first(flags, 8)
    loss = torch.tensor([5., 3, 8, 1, 7, 2, 6, 4]).double()
    new = bred(genes, loss, flags, g())
    assert new.shape == genes.shape and torch.equal(new, bred(genes, loss, flags, g()))
    if method == "shuffled":
        kept = torch.stack([bred(genes, loss, flags, g(s))[0] for s in range(60)])
        assert len({str(x.tolist()) for x in kept}) == 8  # any of them
        return
    assert torch.equal(new[:3], genes[[3, 5, 1]])
    if method in ("random", "er", "dense"):
        assert torch.equal(new[3:], exp.first_genes(flags, 5, g())) and not torch.equal(new[3:], bred(
            genes, loss, flags, g(1))[3:])
    if method == "mutation":
        assert ((new[3:] != genes[3]).flatten(1).sum(1) <= 8).all() and not torch.equal(new[3], new[4])
        assert (bred(genes, loss, replace(flags, edits=0), g())[3:] == genes[3]).all()
    if method == "ga":
        near = (new[3:, None] != genes[None]).any(3).sum(2).min(1).values
        assert near.max() > 1  # rows of another
        one = bred(genes[[3] * 8], loss, flags, g())
        assert ((one[3:] != genes[3]).flatten(1).sum(1) <= 8).all()


# ---- the search -----------------------------------------------------------------------------------------------------

def counted(monkeypatch):
    """What `scored` is asked: (networks, first seed, number of seeds)."""
    seen = []
    monkeypatch.setattr(exp, "scored", lambda genes, flags, seeds, real=exp.scored: (
        seen.append((len(genes), seeds[0], len(seeds))), real(genes, flags, seeds))[1])
    return seen


def test_all_searches_see_as_many_evaluations(tmp_path, monkeypatch):
    """Elites are counted, though on the same seeds they are not scored again."""
    seen = counted(monkeypatch)
    for method in METHODS:
        seen.clear()
        runs, arrays = searched(tmp_path / method, small(method=method, runs=2))
        fitness = [(P, S) for P, seed, S in seen if seed < 1_000_000]
        assert fitness == [(6, 2)] * 2 + [(4, 2)] * 6 and arrays["evaluations"].tolist() == [4 * 6 * 2] * 2
        assert arrays["fitness"].shape == (2, 4, 6) and [s for _, s, _ in seen if s < 9] == [0, 2] * 4
    flags = exp.Flags(study="seed-problem", task="narma10", steps=30)
    flags.given = set()
    assert {run.steps * run.population * len(exp.seeds_of(run, "fitness_seeds"))
            for group in common.groups_of_runs(flags) for run in group} == {30 * 20 * 4}
    runs, arrays = searched(tmp_path / "seeds", "--smoke --study seed-problem --runs 2")
    assert set(arrays["evaluations"].tolist()) == {2 * 4 * 4} and {len(exp.seeds_of(r, "fitness_seeds")) for r in runs} == {
        1, 2, 4, 8}
    assert [np.isfinite(row).any(1).sum() for row in arrays["fitness"]] == [8, 8, 4, 4, 2, 2, 1, 1]


def test_fresh_seeds_select_in_every_generation(tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    searched(tmp_path / "f", small(method="ga", runs=2) + " --fresh")
    assert [(P, s) for P, s, _ in seen if s < 1_000_000] == [(6, s) for s in (0, 8, 2, 10, 4, 12, 6, 14)]  # elites, too
    assert {s for _, s, _ in seen if s >= 1_000_000} == {2_000_000, 2_000_002}


def test_the_same_seed_gives_the_same_curve(tmp_path):
    one, again, other = (searched(tmp_path / str(i), small(method="ga", seed=seed, runs=1))[1]
                         for i, seed in enumerate((3, 3, 4)))
    assert same(one, again) and not np.array_equal(one["fitness"][0, 0], other["fitness"][0, 0])
    assert not np.array_equal(one["W"], other["W"]) and not np.array_equal(one["set_fitness"], other["set_fitness"])
    assert np.array_equal(one["W_in"], other["W_in"])  # of the final seeds


@pytest.mark.parametrize("more", ["--method ga", "--method ga --w-in fixed --genotype continuous --fresh",
                                  "--method mutation --evolve-w-in --task narma10", "--method random --genotype indegree"])
def test_a_repetition_alone_is_the_one_in_company(tmp_path, more):
    _, company = searched(tmp_path / "company", f"{small(runs=3)} {more}")
    for r in (0, 2):
        _, alone = searched(tmp_path / str(r), f"{small(seed=r, runs=1)} {more}")
        assert same(alone, {k: v[r:r + 1] for k, v in company.items()})


@pytest.mark.parametrize("more", ["--runs 2 --method ga --fresh", "--study continuous --method ga --runs 1"])
def test_two_halves_are_a_whole(tmp_path, more):
    assert cut(exp.main, f"{small()} {more} --figures capacity".split(), lambda step: step == 2, tmp_path) == (True, 2)


@pytest.mark.parametrize("more", ["", "--task narma10", "--method mutation --evolve-w-in", "--method random --elites 1"])
def test_the_best_never_falls_on_the_same_seeds(tmp_path, more):
    more = more if "--method" in more else f"--method ga {more}"
    runs, arrays = searched(tmp_path / "r", f"{small(steps=8, runs=2)} {more}")
    curve = exp.best(arrays["fitness"], np.full(2, runs[0].better)) * runs[0].better
    assert (np.diff(curve) >= 0).all() and (curve[:, -1] > curve[:, 0] + 1e-3).any()
    loss = common.read_npz(tmp_path / "r" / "metrics.npz", "")["loss"].T
    assert loss == pytest.approx((8 if runs[0].better > 0 else 0) - curve)


@pytest.fixture(scope="module")
def evolved(tmp_path_factory):
    """Searches for memory with selection and on shuffled scores, six repetitions."""
    line = ("--n-units 10 --population 12 --steps 25 --runs 6 --washout 50 --train 150 --test 100 --ridge 1e-4 --density .15 "
            "--fitness-seeds 0..1 --held-out-seeds 2000000..2000007 --seeds 1000000..1000007 --device cpu --method")
    return {m: searched(tmp_path_factory.mktemp(m) / "r", f"{line} {m}")[1] for m in ("ga", "shuffled")}


def test_evolution_learns_and_shuffled_scores_do_not(evolved):
    """On seeds that nothing was selected on, all repetitions; the control rises by less than a third of that."""
    rise = {m: exp.rise(a, "held_out", method=m) for m, a in evolved.items()}
    assert (rise["ga"] > 0).all() and rise["ga"].mean() > 1
    assert rise["shuffled"].mean() < rise["ga"].mean() / 3
    assert evolved["ga"]["final"].mean() > evolved["shuffled"]["final"].mean() + 1
    assert (exp.luck(evolved["ga"]) > exp.luck(evolved["shuffled"]).mean()).sum() >= 4


@pytest.mark.parametrize("method", ["ga", "mutation"])
def test_nothing_is_selected_on_seeds_that_judge(tmp_path, monkeypatch, method):
    """Whatever held-out seeds say, the populations stay the same bits."""
    flags = flags_of(small(method=method, runs=2))
    runs, = common.groups_of_runs(flags)
    honest = exp.train(runs, folder(tmp_path / "a", flags))

    def garbage(genes, flags, seeds, real=exp.scored):
        values, radius = real(genes, flags, seeds)
        return (torch.rand_like(values) if seeds[0] >= 1_000_000 else values), radius
    monkeypatch.setattr(exp, "scored", garbage)
    misled = exp.train(runs, folder(tmp_path / "b", flags))
    assert same(honest[0]["params"], misled[0]["params"]) and np.array_equal(honest[1]["fitness"], misled[1]["fitness"])
    assert not np.array_equal(honest[1]["eval_held_out"], misled[1]["eval_held_out"])


def test_what_is_logged_of_a_generation(tmp_path):
    flags = flags_of(small(method="ga", runs=2, steps=3))
    runs, = common.groups_of_runs(flags)
    final, metrics, _ = exp.train(runs, folder(tmp_path / "a", flags))
    for r, run in enumerate(runs):
        genes = final["params"]["genes"][r]
        values, _ = exp.scored(genes, run, exp.seeds_of(run, "fitness_seeds"))
        assert far(values.sum(2).mean(1), metrics["fitness"][-1, r]) < 1e-6
        winner = genes[values.sum(2).mean(1).argmax()][None]
        held, radius = exp.scored(winner, run, exp.seeds_of(run, "held_out_seeds"))
        assert metrics["eval_held_out"][-1, r] == pytest.approx(held.sum(2).mean().item(), rel=1e-5)
        assert metrics["eval_best_radius"][-1, r] == pytest.approx(radius.item())
        assert metrics["eval_mean_density"][-1, r] == pytest.approx((genes != 0).float().mean().item())
    assert metrics["eval_step"].tolist() == [1, 2, 3] and metrics["failed"].tolist() == [[0, 0]] * 3


# ---- studies --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, arrays) of the smoke run of a study, once."""
    known = {}

    def of(study):
        if study not in known:
            out = tmp_path_factory.mktemp(study) / "r"
            assert exp.main([*SMOKE, "--study", study, "--out", str(out)]) == 0
            known[study] = out, dict(np.load(out / "arrays.npz"))
        return known[study]
    return of


SEARCHES = [study for study in exp.STUDIES if study != "score"]


@pytest.mark.parametrize("study", SEARCHES)
def test_smoke(ran, study, capsys):
    out, a = ran(study)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["claims"] and all(c["holds"] is not False and c["source"] for c in summary["claims"])
    assert len(summary["runs"]) == len(a["seed"]) and all(math.isfinite(row["loss"]) for row in summary["runs"])
    figures = exp.STUDIES[study][2]
    drawn = {p.stem: p for p in out.glob("*.png")}
    assert drawn and set(drawn) <= set(figures) and set(figures) - set(drawn) <= {"capacity"}
    assert all(p.stat().st_size > 1000 for p in drawn.values())
    first = next(iter(figures))
    drawn[first].unlink()
    line = [*SMOKE, "--study", study, "--out", str(out)]
    assert exp.main([*line, "--plot-only", "--figures", first]) == 0 and drawn[first].exists()
    assert json.loads((out / "summary.json").read_text()) == summary
    assert exp.main(line) == 0 and "finished already" in capsys.readouterr().out


@pytest.mark.parametrize("study", SEARCHES)
def test_arrays_are_what_the_docstring_promises(ran, study):
    """Shapes; and an outsider's recomputation from W, W_in and the seeds, in numpy, of scores and of what else is said."""
    _, a = ran(study)
    R, G, P, S, N = len(a["seed"]), a["fitness"].shape[1], 4, 2, 8
    shapes = dict(fitness=(R, G, P), failed=(R, G), acyclic=(R, G), held_out=(R, G), best_radius=(R, G), final=(R, S),
                  mean_density=(R, G), W=(R, N, N), W_in=(R, S, N), radius_before=(R,), evaluations=(R,), loss=(R,),
                  bias=(R, S, N), unselected=(R,), permuted=(R,), reference=(4, S), floor=(S,), set_final=(S,)) | {
        "radius": dict(rescaled=(R,), radius_only=(R,)),
        "tasks": dict(transfer=(R, 4), transfer_unselected=(R, 4))}.get(study, {})
    assert {k: a[k].shape for k in shapes} == shapes and a["set_final"].tolist() == [1_000_000, 1_000_001]
    assert len(a["set_fitness"]) == len(a["set_held_out"]) == R and set(exp.COLUMNS) <= a.keys()
    flags = flags_of(f"--smoke --study {study} --runs 2 --bias-scaling .2 --density .4")
    runs = [run for group in common.groups_of_runs(flags) for run in group]
    for r, run in enumerate(runs):
        seeds = a["set_final"].tolist()
        w_in, bias, u, y = exp.data(run, seeds)
        assert all(a[f][r] == getattr(run, f) for f in ("method", "genotype", "task", "raw", "seed", "crossover", "mutation"))
        assert run.evolve_w_in or np.array_equal(a["W_in"][r], w_in)
        values = by_loop(a["W"][r][None], a["W_in"][r], bias, u, y, run)[0]
        score = values.sum(1) if run.task == "memory" else values.mean(1)
        assert a["final"][r] == pytest.approx(score, rel=.03, abs=.02)  # a small ridge: the states' rounding counts
        K = values.shape[1]
        assert a["by_target"][r][:K] == pytest.approx(values.mean(0), abs=.05) and np.isnan(a["by_target"][r][K:]).all()
        assert a["loss"][r] == pytest.approx(8 - a["final"][r].mean() if run.task == "memory" else a["final"][r].mean())
        assert run.raw or top(a["W"][r]) == pytest.approx(.9, rel=1e-3) or a["radius_before"][r] == 0
        assert not run.raw or top(a["W"][r]) == pytest.approx(a["radius_before"][r], rel=1e-3)
        assert a["best_radius"][r][np.isfinite(a["best_radius"][r])][-1] == pytest.approx(a["radius_before"][r])
        assert np.array_equal(a["bias"][r], bias)

        def on(W, task=run.task, w_in=None):
            at = replace(run, task=task)
            drawn, *rest = exp.data(at, seeds)
            values = exp.evaluate(torch.tensor(np.asarray(W)), drawn if w_in is None else torch.tensor(w_in), *rest, at)
            return exp.score(values, at).mean(1).numpy()
        own_W_in = a["W_in"][r] if run.evolve_w_in else None
        any_W, any_own, _ = exp.unselected(run)
        assert a["unselected"][r] == pytest.approx(on(any_W, w_in=None if any_own is None else any_own.numpy()[
            :, None].repeat(2, 1)).mean(), rel=1e-4)
        elsewhere = exp.permuted(torch.tensor(a["W"][r]), run)
        assert a["permuted"][r] == pytest.approx(on(elsewhere, w_in=own_W_in).mean(), rel=1e-4)
        own = top(a["W"][r]) if a["radius_before"][r] else 0.
        at_radius = lambda W, radius: np.stack([V * np.float32(radius / top(V) if top(V) > .05 else radius) for V in W])
        if study == "radius" and run.raw:
            assert a["rescaled"][r] == pytest.approx(on(at_radius(a["W"][r][None], .9))[0], rel=1e-3)
            assert a["radius_only"][r] == pytest.approx(on(at_radius(any_W.numpy(), own)).mean(), rel=1e-3)
        elif study == "radius":
            assert a["rescaled"][r] == pytest.approx(a["final"][r].mean()) and a["radius_only"][r] == a["unselected"][r]
        if study == "tasks":
            assert a["transfer_unselected"][r] == pytest.approx([on(any_W, task).mean() for task in TASKS], rel=1e-4)
            for j, task in enumerate(TASKS):
                at = replace(run, task=task)
                values = by_loop(a["W"][r][None], *exp.data(at, seeds), at)[0]
                assert a["transfer"][r][j] == pytest.approx((values.sum(1) if j == 0 else values.mean(1)).mean(), rel=.03)


def test_networks_that_nothing_selected():
    """Drawn as random search draws them, not with the search's own numbers; a champion's weights at other places."""
    flags = made(n_units=20, seed=3, density=.2)
    for method, like in (("ga", "random"), ("er", "er")):
        W, own, radius = exp.unselected(replace(flags, method=method))
        genes = exp.first_genes(replace(flags, method=like), exp.DRAWS, common.generator(3, "unselected"))
        assert torch.equal(W, exp.networks(genes, replace(flags, method=like))[0]) and own is None and len(radius) == exp.DRAWS
    assert exp.unselected(replace(flags, evolve_w_in=True))[1].shape == (exp.DRAWS, 20)
    W = exp.unselected(flags)[0][0]
    other = exp.permuted(W, flags)
    assert [top(V) for V in other] == pytest.approx([top(W)] * 4, rel=1e-4) and far(other[0], other[1]) > .01
    for V in other:
        scale = V.abs().max() / W.abs().max()
        assert far(V.flatten().sort().values, scale * W.flatten().sort().values) < 1e-5 and far(V, scale * W) > .01
    assert torch.equal(other, exp.permuted(W, flags)) and far(other, exp.permuted(W, replace(flags, seed=4))) > .01


def test_the_weights_of_a_chain_are_found_at_other_places():
    other = exp.permuted(exp.delay_line(8, .9), made(n_units=8))
    assert ((other != 0).sum((1, 2)) == 7).all()


def test_sweeps_run(tmp_path):
    for i, sweep in enumerate(("n_units=6,8 density=.2,.5", "task=memory,lorenz raw=true,false",
                               "leak=.3,1 genotype=mask,indegree")):
        out = tmp_path / str(i)
        line = f"--smoke --method ga --compile off --out {out} --figures evolution capacity --sweep {sweep}"
        assert exp.main(line.split()) == 0
        a = dict(np.load(out / "arrays.npz"))
        assert len(a["seed"]) == 4 and np.isfinite(a["loss"]).all() and (out / "evolution.png").exists()
        assert len(set(exp.labels_of(a))) == 4
        claims = json.loads((out / "summary.json").read_text())["claims"]
        assert {c["id"] for c in claims} <= {"equal-evaluations", "at-most-n"}


def test_a_champion_is_that_of_the_best_genetic_search():
    a = {"task": np.array(["narma10"] * 3), "method": np.array(["random", "ga", "ga"]), "n_units": np.array([2, 3, 2]),
         "fitness": np.array([[[.1, .2]], [[.5, .6]], [[np.nan, .4]]]), "W": np.arange(27.).reshape(3, 3, 3),
         "W_in": np.ones((3, 2, 3))}
    W, w_in, r = exp.champion(a)
    assert r == 2 and W.tolist() == [[18, 19], [21, 22]] and w_in.shape == (2, 2)
    assert exp.champion(a | {"method": np.array(["er"] * 3)})[2] == 0
    assert exp.champion(a | {"task": np.array(["memory"] * 3)})[2] == 1


def test_phases_find_a_ring():
    order = torch.randperm(12, generator=g()).numpy()
    found = exp.phases(exp.cycle(12, .9).numpy()[np.ix_(order, order)])
    steps = np.diff(order[found]) % 12
    assert len(set(steps.tolist())) == 1 and steps[0] in (1, 5, 7, 11)


# ---- a network from a file ------------------------------------------------------------------------------------------

W3 = torch.randn(3, 5, 5, generator=g()).numpy() / 4


def scored_file(tmp_path, arrays, seeds="0..1", more="", name="r"):
    file = tmp_path / f"{name}.npz"
    np.savez(file, **arrays)
    line = f"--smoke --study score --weights {file} --seeds {seeds} --ridge .1 --out {tmp_path / name} {more}"
    assert exp.main(line.split()) == 0
    return dict(np.load(tmp_path / name / "arrays.npz")), replace(flags_of(line), n_units=5)


@pytest.mark.parametrize("task", ["memory", "narma10"])
def test_the_score_of_a_file_is_that_of_its_W(tmp_path, task, capsys):
    """As it is, not rescaled; W_in of one vector, per network, per seed; else that of the seeds, and it says so."""
    r = np.random.default_rng(0)
    one, each, all_ = (r.uniform(-.3, .3, shape) for shape in ((5,), (3, 5), (3, 2, 5)))
    foreign = {"W": W3, "W_in": all_, "set_final": np.array([7, 8])}
    cases = {"drawn": ({"W": W3}, None), "single": ({"W": W3[1]}, None), "one": ({"W": W3, "W_in": one}, one[None, None]),
             "each": ({"W": W3, "W_in": each}, each[:, None]), "seeds": ({"W": W3, "W_in": all_}, all_),
             "own": (foreign | {"set_final": np.array([0, 1])}, all_), "foreign": (foreign, None),
             "count": ({"W": W3, "W_in": r.uniform(-1, 1, (3, 4, 5))}, None),
             "task": (foreign | {"set_final": np.array([0, 1]), "task": np.array(["lorenz"] * 3)}, None),
             "alike": (foreign | {"W_in": np.repeat(each[:, None], 4, 1)}, each[:, None])}
    for name, (arrays, w_in) in cases.items():
        a, flags = scored_file(tmp_path, arrays, more=f"--task {task} --leak .8 --bias-scaling .1", name=name)
        said = "its W_in belong to other seeds or another task; here they are drawn from 0..1" in capsys.readouterr().out
        assert said == (name in ("foreign", "count", "task")), name
        W, (drawn, bias, u, y) = arrays["W"].reshape(-1, 5, 5), exp.data(flags, (0, 1))
        w_in = np.broadcast_to(drawn if w_in is None else w_in, (len(W), 2, 5)).copy()
        values = by_loop(W, w_in, bias, u, y, flags)
        assert far(a["final"], values.sum(2) if task == "memory" else values.mean(2)) < 1e-3, name
        assert far(a["by_target"], values.mean(1)) < 1e-3 and far(a["W_in"], w_in) < 1e-6 and far(a["W"], W) < 1e-6
        assert far(a["spectral_radius"], [top(V) for V in W]) < 1e-5 and a["reference"].shape == (4, 2)
        assert a["loss"] == pytest.approx(5 - a["final"].mean(1) if task == "memory" else a["final"].mean(1))
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert [run["network"] for run in summary["runs"]] == [*range(len(W))] and summary["claims"] == []
        assert [run["final"] for run in summary["runs"]] == pytest.approx(a["final"].mean(1))
        assert (tmp_path / name / "scores.png").exists()
    assert flags.weights.endswith("alike.npz")


def test_a_file_is_scored_as_it_was_made_or_contradicted_by_hand(tmp_path, capsys):
    for field, value in dict(leak=.5, bias_scaling=.3, ridge=.2, washout=20, train=61, test=41).items():
        np.savez(file := tmp_path / "x.npz", **{"W": W3, field: np.array([value] * 3)})
        line = f"--smoke --study score --weights {file} --seeds 0..1 --figures scores --out {tmp_path / field}"
        flag = "--" + field.replace("_", "-")
        assert exp.main(line.split()) == 2 and f"was made with {flag} {value}: give that flag" in capsys.readouterr().err
        assert all(exp.main([*line.split(), flag, str(x), "--force"]) == 0 for x in (value, value * 2))
        capsys.readouterr()


def test_what_a_search_saves_is_scored_alike(ran, tmp_path, capsys):
    """On its own final seeds to the bit; on others with their W_in."""
    out, a = ran("w-in")
    line = f"--smoke --study score --weights {out / 'arrays.npz'} --bias-scaling .2 --figures scores --out"
    assert exp.main([*line.split(), str(tmp_path / "r")]) == 0
    b = np.load(tmp_path / "r" / "arrays.npz")
    assert np.array_equal(b["W_in"], a["W_in"]) and b["final"] == pytest.approx(a["final"], rel=1e-3)
    assert "drawn" not in capsys.readouterr().out
    assert exp.main([*line.split(), str(tmp_path / "s"), "--seeds", "5..6"]) == 0 and "drawn" in capsys.readouterr().out


ones = np.ones((3, 3))
BAD = {"missing": None, "text": b"W = 1", "npy": "npy", "cut": "cut"} | {name: {"W": W} for name, W in {
    "pickled": np.array([{}, None], object), "flat": np.ones(9), "oblong": np.ones((3, 4)), "four": ones[None, None],
    "one neuron": np.ones((1, 1)), "none": np.ones((0, 3, 3)), "nan": np.where(np.eye(3) > 0, np.nan, 1), "inf": ones * np.inf,
    "text W": np.array([["a", "b"]] * 2), "bool": np.eye(3) > 0, "complex": np.eye(3) * 1j, "large": ones * 1e300}.items()} | {
    f"W_in {name}": {"W": ones, "W_in": w_in} for name, w_in in {
        "long": np.ones(4), "many": np.ones((2, 3)), "nan": np.full(3, np.nan), "text": np.array(["a"] * 3), "0-d": np.ones(()),
        "four": np.ones((1, 1, 1, 3)), "of no seed": np.ones((1, 0, 3)), "nan by seed": np.full((1, 2, 3), np.nan),
        "text by seed": np.full((1, 2, 3), "a"), "object": np.array([{}] * 3, object)}.items()} | {"no W": {"V": ones}}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(tmp_path, capsys, name):
    file, content = tmp_path / "x.npz", BAD[name]
    if isinstance(content, dict):
        np.savez(file, **content)
    elif content == "npy":
        np.save(open(file, "wb"), np.ones((3, 3)))
    elif content == "cut":
        np.savez(file, W=W3)
        file.write_bytes(file.read_bytes()[:-40])
    elif content:
        file.write_bytes(content)
    line = f"--smoke --study score --weights {file} --seeds 0..1 --out {tmp_path / 'r'}"
    assert exp.main(line.split()) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "x.npz" in error and not (tmp_path / "r" / "arrays.npz").exists()


# ---- verdicts -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, t", [(3, 4.3027), (5, 2.7764), (10, 2.2622), (30, 2.0452), (2, 12.7062)])
def test_quantiles_of_student(n, t):
    assert exp.student(n) == pytest.approx(t, abs=1e-3)


def test_intervals():
    x = np.array([1., 2, 4, 4, 9])
    mean, half = exp.interval(x)
    assert mean == 4 and half == pytest.approx(2.7764 * math.sqrt(38 / 4) / math.sqrt(5), rel=1e-3)
    assert exp.interval(x[:1]) == (1, math.inf) and exp.interval(x[:0])[1] == math.inf and math.isnan(exp.interval(x[:0])[0])


def test_decided():
    said = {}
    tell = exp.decided(lambda id, statement, source, expected, measured, agree: said.update({id: (agree, measured, expected)}))
    spread = np.array([-1., 1, 0, .5, -.5])
    for id, x in dict(yes=2 + spread, no=-2 + spread, open=.5 + spread, few=2 + spread[:4], lost=np.r_[2 + spread[:4], np.nan],
                      more=np.r_[2 + spread, np.nan], none=spread[:0], same=np.zeros(5)).items():
        tell(id, "", "", "gain", x)
    assert {k: v[0] for k, v in said.items()} == dict(yes=True, no=False, open=None, few=None, lost=None, more=True, none=None,
                                                      same=None)
    half = 2.7764 * np.std(spread, ddof=1) / math.sqrt(5)
    assert said["yes"][1].startswith(f"+2 [+{2 - half:.3g}, +{2 + half:.3g}]") and "5 repetitions" in said["more"][1]
    assert type(said["yes"][0]) is bool and said["yes"][2] == "gain: above 0"


def test_measures_of_curves_by_hand():
    nan = math.nan
    fitness = np.array([[[1., 2], [3, nan], [5, 4]], [[1, 2], [3, 4], [nan, nan]],
                        [[9, 8], [7, nan], [6, 5]], [[9, 8], [8, 7], [7, 9]]])
    a = {"task": np.array(["memory", "memory", "lorenz", "lorenz"]), "seed": np.array([1, 0, 1, 0]), "fitness": fitness,
         "held_out": np.array([[1., 1, 2], [1, 5, nan], [4, 3, 1], [4, 4, 6]]), "extra": np.array([1., 2, 3, 4]),
         "final": np.array([[4., 5], [4, 3], [7, 8], [3, 4]]), "method": np.array(["ga", "ga", "random", "random"])}
    assert exp.direction(a).tolist() == [1, 1, -1, -1] and exp.last(a, "held_out").tolist() == [2, 5, 1, 6]
    assert exp.last(a, "fitness").tolist() == [[5, 4], [3, 4], [6, 5], [7, 9]]
    assert exp.luck(a).tolist() == [.5, .5, 2.5, -3.5]
    assert exp.rise(a, "fitness", method="ga").tolist() == [2, 3] and exp.rise(a, "fitness", method="random").tolist() == [1, 3]
    assert [exp.rise(a, "held_out", method=m).tolist() for m in ("ga", "random")] == [[4, 1], [-2, 3]]
    methods = dict(method="ga"), dict(method="random")
    gain = lambda key, task: exp.gain(a | {"task": np.array([task] * 4)}, key, *methods).tolist()
    assert gain("final", "memory") == [0, -3] and gain("final", "lorenz") == [0, 3]  # by seed
    assert gain("extra", "memory") == [-2, -2] and gain("extra", "lorenz") == [2, 2]
    assert gain("luck", "memory") == [.5 - 5.5, .5 + 1.5] and gain("luck", "lorenz") == [.5 + 3.5, .5 - 2.5]
    c = {"seed": np.arange(2), "task": np.array(["memory", "memory"]), "transfer_unselected": np.array(
        [[4., .5, 1, 1], [5, .5, 1, 1]]), "transfer": np.array([[5., .4, 1, 2], [4, .6, 1, 1]])}
    assert exp.relative(c, "memory", "memory") == pytest.approx([.25, -.2])
    assert exp.relative(c, "memory", "narma10") == pytest.approx([.2, -.2])
    assert exp.relative(c, "memory", "lorenz") == pytest.approx([-1, 0])
    assert exp.wired(a | {"permuted": np.array([1., 2, 3, 4])}, method="ga").tolist() == [1.5, 3.5]


# Of every configuration what it gains (in the better direction) over a base: final, held-out at the end, fitness at the end; of
# every claim the mean that follows.
BASE, SPREAD = 20., .5
by = lambda table, *names: lambda run: dict(final=table[" ".join(str(getattr(run, n)) for n in names)])
MADE_UP = {
    "evolve": (lambda run: by(dict(ga=16, mutation=1, random=2, er=4, dense=8), "method")(run) | (
        dict(held_out=3, fitness=8, unselected=.5, permuted=5) if run.method == "ga" else dict(
            held_out=9, fitness=7, unselected=6, permuted=7)),
        {"beats-random": 14, "beats-mutation": 15, "beats-er": 12, "beats-dense": 8, "beats-ring": 16, "beats-chain": 16,
         "beats-unselected": 15.5, "wiring-ga": 11, "wiring-random": -5, "gain-is-real": 3, "mostly-luck": 1}),
    "seed-problem": (lambda run: (n := int(run.fitness_seeds[3:]) + 1) and dict(
        final=n, held_out={1: -3, 8: -5}.get(n, 9), fitness={1: 2, 8: 4}.get(n, 9)),
        {"not-stable": 3, "luck-1": 4, "luck-8": 7, "more-seeds-less-luck": 5, "seeds-2-better": 1, "seeds-4-better": 3,
         "seeds-8-better": 7}),
    "spaces": (by({"ternary ga": 1, "ternary random": 2, "indegree ga": 4, "indegree random": 8, "circulant ga": 16,
                   "circulant random": 13}, "genotype", "method"),
               {"indegree-better": 3, "indegree-space-alone": 7, "indegree-search": -4, "circulant-better": 15,
                "circulant-space-alone": 12, "circulant-search": 3}),
    "operators": (lambda run: by({"row mixed ga": 1, "none mixed ga": 2, "column mixed ga": 4, "block mixed ga": 8,
                                  "uniform mixed ga": 16, "row toggle ga": 3, "row flip ga": 5, "row rewire ga": 7,
                                  "row mixed shuffled": 11}, "crossover", "mutation", "method")(run) | dict(
        held_out=2 if run.method == "shuffled" else 6 if (run.crossover, run.mutation) == ("row", "mixed") else 9),
        {"row-beats-none": -1, "row-beats-column": -3, "row-beats-block": -7, "row-beats-uniform": -15,
         "mixed-beats-toggle": -2, "mixed-beats-flip": -4, "mixed-beats-rewire": -6, "selection-matters": 4,
         "control-gains": 2}),
    "radius": (lambda run: dict(zip(("final", "rescaled", "radius_only", "unselected", "permuted"), {
        "True ga": (4, 1, 2, .5, 9), "False ga": (16, 9, 9, .25, 3)}.get(f"{run.raw} {run.method}", (11, 7, 5, 3, 2)))),
        {"raw-better": -12, "radius-helps": 3, "radius-most": -.25, "wiring-fixed": 13, "wiring-raw": -5}),
    "w-in": (by({"False redrawn ga": 1, "False redrawn random": 2, "False fixed ga": 4, "False fixed random": 8,
                 "True redrawn ga": 16, "True redrawn random": 5}, "evolve_w_in", "w_in", "method"),
             {"fixed-better": 3, "evolved-better": 12, "evolved-beats-random": 11}),
    "continuous": (by({"ternary ga": 1, "ternary random": 2, "continuous ga": 4, "continuous random": 8, "mask ga": 16,
                       "mask random": 5}, "genotype", "method"),
                   {"continuous-better-ga": 3, "continuous-better-random": 6, "signs-matter": -15}),
    "tasks": (lambda run: dict(final=0), {f"{a}-on-{b}": (4 * i + j - 5.5) / (20 + j)
                                          for i, a in enumerate(TASKS) for j, b in enumerate(TASKS)})}
OFFSET = {"beats-ring": -.1, "beats-chain": -.2, "not-stable": SPREAD}


def planted(study, factors, **fields):
    """(arrays, flags) of a study whose gains are those of MADE_UP, times a factor in each repetition."""
    flags = exp.Flags(study=study, **dict(exp.Flags.per_study[study], runs=len(factors)) | fields)
    flags.given, flags.finished = set(), True
    runs = [run for group in common.groups_of_runs(flags) for run in group]
    rows = []
    for run in runs:
        s, better, gains = factors[run.seed], exp.Flags(task=run.task).better, MADE_UP[study][0](run)
        gains = dict.fromkeys(("final", "held_out", "fitness", "unselected", "permuted"), 0) | gains
        at = {k: BASE + better * s * v for k, v in gains.items()}
        if study == "tasks":
            i, j = TASKS.index(run.task), np.arange(4)
            at |= {"transfer_unselected": 20. + j, "transfer": 20 + j + np.array([1, -1, -1, -1]) * s * (4 * i + j - 5.5)}
        worse = BASE - better
        at |= {"final": at["final"] + np.array([-SPREAD, SPREAD]), "held_out": np.array([BASE, 3., at["held_out"], np.nan]),
               "fitness": np.array([[worse, BASE], [4, 5], [at["fitness"], np.nan], [np.nan, np.nan]]), "loss": 1.,
               "by_target": np.ones(3), "evaluations": 7, "failed": np.zeros(3)}
        rows.append(at | {f: getattr(run, f) for f in exp.COLUMNS if f not in at})
    reference = BASE + np.array([.1, .2, .3, .4])[:, None] + np.array([-1, 1])
    return common.stacked(rows) | {"reference": reference}, flags


def verdicts(study, factors, change=lambda a: a, **fields):
    arrays, flags = planted(study, factors)
    for k, v in fields.items():
        setattr(flags, k, v)
    return {c["id"]: (c["holds"], c["measured"]) for c in exp.STUDIES[study][1](change(arrays), flags)}


ALWAYS = {"equal-evaluations", "at-most-n"}
holds = lambda claims: {k: v[0] for k, v in claims.items() if k not in ALWAYS}


@pytest.mark.parametrize("study", MADE_UP)
def test_judges_say_true_false_and_open(study):
    """Of numbers that they do not know; with fewer than five repetitions, in a smoke run or cut short: open."""
    expected, r = MADE_UP[study][1], np.array([1., 1.1, .9, 1.05, .95])
    for factors in (r, -r, np.r_[r, 1.]):
        claims = verdicts(study, factors)
        mean = {k: np.mean(factors) * v + OFFSET.get(k, 0) for k, v in expected.items()}
        assert holds(claims) == {k: v > 0 for k, v in mean.items()}
        for k, v in mean.items():
            assert float(re.match(r"[-+][\d.e+-]+", claims[k][1])[0]) == pytest.approx(v, rel=.01), k
    open_ = dict.fromkeys(expected)
    assert holds(verdicts(study, np.array([40., -41, 40, -40, 1]))) == open_ and holds(verdicts(study, r[:4])) == open_
    assert holds(verdicts(study, r, steps=28)) == open_
    for fields in (dict(smoke=True), dict(n_units=49), dict(finished=False), dict(ridge=1e-7), dict(sweep=["leak=1,.5"]),
                   dict(runs=6)):
        assert holds(verdicts(study, r, **fields)) == {}


def test_what_is_claimed_of_every_search():
    r = np.ones(5)
    assert {k: v for k, (v, _) in verdicts("evolve", r).items() if k in ALWAYS} == dict.fromkeys(ALWAYS, True)
    other = verdicts("evolve", r, lambda a: a | {"evaluations": np.r_[a["evaluations"][:-1], 8], "failed": a["failed"] + 1})
    assert other["equal-evaluations"] == (False, "7, 8; 75 networks failed")
    above = lambda by: lambda a: a | {"final": np.full_like(a["final"], 50 + by)}
    assert verdicts("evolve", r, above(.0029))["at-most-n"][0] is True  # 3 delays / 1000 steps
    assert verdicts("evolve", r, above(.0031))["at-most-n"][0] is False
    assert "at-most-n" not in verdicts("seed-problem", r, above(.0031))
    lost = verdicts("evolve", r, lambda a: above(9.)(a) | {"loss": a["loss"] * np.nan})
    assert "at-most-n" not in lost


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, words", [
    ("--population 1", "--population 1 must be at least 2"), ("--tournament 21", "--tournament 21 of a --population of 20"),
    ("--tournament 0", "--tournament 0 must be at least 1"), ("--elites 20", "--elites 20 of a --population of 20"),
    ("--elites 0", "--elites 0 must be at least 1"), ("--population 3 --elites 3", "--elites 3 of a --population of 3"),
    ("--n-units 1", "--n-units 1 must be at least 2"), ("--genotype indegree --inputs 51", "--inputs 51"),
    ("--genotype indegree --inputs 0", "--inputs 0 must be at least 1"), ("--radius -.1", "--radius -0.1 must be at least 0"),
    ("--radius inf", "'inf' is not a finite number"), ("--ridge -1", "--ridge -1.0 must be at least 0"),
    ("--ridge nan", "'nan' is not a finite number"), ("--leak 1.1", "--leak 1.1 must be"), ("--leak -1", "--leak -1.0 must be"),
    ("--density 1.5", "--density 1.5 must be"), ("--sigma -1 --genotype continuous", "--sigma -1.0 must be"),
    ("--train 199", "--train 199 and --test 1000 must not be shorter than --washout 200"), ("--test 150", "--test 150"),
    ("--washout 1001", "--washout 1001"), ("--washout -1", "--washout -1 must be"), ("--edits -1", "--edits -1 must be"),
    ("--delays -1", "--delays -1 must be"), ("--steps 0", "--steps 0 must be"), ("--train 1 --washout 0", "--train 1 must be"),
    ("--held-out-seeds 3..5", "--fitness-seeds and --held-out-seeds share the seed 3"),
    ("--seeds 0..5", "--fitness-seeds and --seeds share the seed 0"),
    ("--seeds 2000007", "--held-out-seeds and --seeds share the seed 2000007"),
    ("--seed 250000", "--fitness-seeds and --seeds share the seed 1000000 (repetition with --seed 250000)"),
    ("--seed 249999 --runs 2", "share the seed 1000000 (repetition with --seed 250000)"),
    ("--fresh --held-out-seeds 119..120", "share the seed 119"), ("--fresh --seed 2 --seeds 240", "share the seed 240"),
    ("--seeds 5..3", "--seeds 5..3: write FIRST..LAST"), ("--seeds a..b", "--seeds a..b"), ("--seeds 5..", "--seeds 5.."),
    ("--fitness-seeds -1..3", "--fitness-seeds"), ("--fitness-seeds 1,2", "--fitness-seeds 1,2"),
    ("--seeds ..4", "--seeds ..4"), ("--fitness-seeds 1...3", "--fitness-seeds"), ("--seeds 1.5", "--seeds 1.5"),
    ("--seeds 0..20000", "at most 10,000 seeds"),
    ("--seed 4611686018427387904", "all below 2^39"), ("--seeds 549755813888", "all below 2^39"),
    ("--task memry", "--task: 'memry' is not one of memory, narma10, mackey-glass, lorenz; did you mean memory?"),
    ("--task narma", "did you mean narma10?"), ("--sweep task=memory,narma", "narma"),
    ("--genotype ternery", "did you mean ternary?"), ("--method gaa", "did you mean ga?"),
    ("--study evolv", "did you mean evolve?"),
    ("--mutation gauss", "--mutation gauss leaves the space of --genotype ternary: it has mixed, toggle, flip, rewire"),
    ("--mutation flip --genotype mask", "leaves the space"), ("--mutation toggle --genotype indegree", "leaves the space"),
    ("--mutation flip --genotype continuous", "leaves the space"),
    ("--sweep genotype=mask,ternary mutation=flip", "leaves"),
    *((f"--genotype indegree --crossover {kind}", f"--crossover {kind} changes the number of inputs")
      for kind in ("column", "block", "uniform")),
    ("--inputs 4", "--inputs has no part in this --study evolve"), ("--sigma .1", "--sigma has no part"),
    ("--task lorenz --delays 5", "--delays has no part"), ("--horizon 5", "--horizon has no part"),
    ("--study radius --evolve-w-in", "--evolve-w-in has no part"), ("--study tasks --evolve-w-in", "--evolve-w-in has no part"),
    ("--weights x.npz", "--weights is for --study score alone"), ("--study score", "needs --weights"),
    *((f"--study score --weights x.npz {flag}", f"{flag.split()[0]} has no part in this --study score") for flag in (
        "--population 5", "--n-units 5", "--genotype mask", "--method ga", "--raw", "--runs 2", "--w-in fixed", "--steps 3",
        "--evolve-w-in", "--fitness-seeds 5", "--seed 5", "--sweep leak=1,.5")),
    ("--sweep seeds=1..2,3..4", "--sweep"), ("--sweep population=5,6", "same seeds and with as many"),
    ("--sweep steps=5,6", "--sweep"), ("--sweep elites=1,2", "--sweep"), ("--sweep fresh=true,false", "--sweep"),
    ("--evolve-w-in --w-in fixed", "W_in is a genotype or it is not"), ("--study seed-problem --fitness-seeds 0..3", "no part"),
    *((f"--method {line}", f"{line.split()[1]} has no part in this --study evolve") for line in (
        "random --edits 2", "er --crossover none", "mutation --tournament 2", "dense --mutation flip")),
    ("--sweep fitness_seeds=0..1,0..3", "searches are compared"), ("--sweep fitness-seeds=0..1,0..3", "searches are compared"),
    ("--sweep tournament=2,50", "--tournament 50 of a --population"),
    ("--figures champions", "--figures champions"),
    ("--lr 1", "unknown flag --lr")])
def test_bad_flags_are_one_line(tmp_path, capsys, monkeypatch, line, words):
    monkeypatch.setattr(common, "folder_path", lambda flags: pytest.fail("not refused"))
    assert exp.main([*line.split(), "--out", str(out := tmp_path / "r")]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1 and not out.exists()


@pytest.mark.parametrize("line", [
    "--population 2 --tournament 2 --elites 1", "--genotype indegree --inputs 5 --crossover none --mutation flip",
    "--n-units 2",
    "--genotype continuous --sigma .1 --mutation gauss", "--task lorenz --horizon 5", "--washout 1000", "--ridge 0 --radius 0",
    "--fresh --held-out-seeds 1000..1007", "--study spaces --inputs 4", "--study continuous --sigma .5",
    "--study tasks --horizon 9", "--study tasks --delays 9", "--sweep genotype=continuous,mask --sigma .1",
    "--study operators --mutation flip", "--study score --weights x.npz --seeds 0..3 --radius .5"])
def test_good_flags_are_taken(line, monkeypatch):
    monkeypatch.setattr(exp, "weights_of", lambda flags, say: None)
    flags = flags_of(line)
    assert flags.study and common.groups_of_runs(flags)


def test_every_documented_command_parses(monkeypatch):
    monkeypatch.setattr(exp, "weights_of", lambda flags, say: None)  # of a run that is not there
    text = (ROOT / "README.md").read_text() + inspect.getdoc(exp)
    commands = re.findall(r"^\s*(?:\.venv/bin/)?python3? (exp_esn_genetic\.py.*?)(?:\s{2,}.*|\s*#.*|\s*)$", text, re.M)
    assert len(commands) >= 3 and all(common.cli(exp.Flags, shlex.split(command)[1:]) for command in commands)
