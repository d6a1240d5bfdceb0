"""Does a genetic algorithm find a better reservoir, or only a luckier seed or a better spectral radius?

Law: an echo state network x[t] = (1 - a) x[t-1] + a tanh(W x[t-1] + W_in u[t] + b), read by ridge regression, driven by noise
or by a chaotic system. Tasks: memory (recall u[t-k]; capacity: sum over k >= 1 of squared correlations, at most N), NARMA10,
Mackey-Glass, Lorenz (NRMSE: RMSE / std of the target). A seed draws W_in and the input sequence. The fitness seeds select;
held-out seeds are read in every generation, the final ones once, and neither selects anything. Exact: capacities of linear
networks, the linear floor of NARMA10. Matrices act as W x here: a row of W holds the incoming weights of a neuron.

    python exp_esn_genetic.py                              2.5 min on one core: is evolving W better than as many random ones?
    python exp_esn_genetic.py --study radius               2 min: how much of a gain is spectral radius?
    python exp_esn_genetic.py --study score --weights runs/esn_genetic/evolve/arrays.npz --task narma10 --seeds 100..199

Studies: `evolve` (default): `evolution` (by generation, final scores, luck), `champion` (W, eigenvalues, degrees), `graph`,
`capacity` (by delay); `seed-problem`, `spaces`, `operators`, `radius`, `w-in`, `continuous`, `tasks`: what the number of
seeds, the space, the operators, a free radius, W_in, real weights and the task change, each paired over repetitions
(`configurations`, and `shares`, `transfer`); `score`: the W of a file. arrays.npz holds what `compute_*` name.

Claims come from research notes on a genetic algorithm for W (French; headings). Capacity: Jaeger 2001; ring and chain:
Rodan & Tino 2011; NARMA10: Atiya & Parlos 2000; Mackey & Glass 1977; Lorenz 1963.
"""
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch

import common_v1 as common
from common_v1 import by_seed, flag

# ---- Flags ----------------------------------------------------------------------------------------------------------

KINDS = {  # edits that stay in the space; "mixed" takes any of them
    "mask": ("toggle", "rewire"), "ternary": ("toggle", "flip", "rewire"), "continuous": ("toggle", "gauss", "rewire"),
    "circulant": ("toggle", "flip", "rewire"), "indegree": ("flip", "rewire")}
SETS = "fitness_seeds", "held_out_seeds", "seeds"


@dataclass
class Flags(common.Flags):
    study: Literal["evolve", "seed-problem", "spaces", "operators", "radius", "w-in", "continuous", "tasks", "score"] = flag(
        "evolve", "which question to ask")
    task: str = flag("memory", "what the network must do: memory, narma10, mackey-glass, lorenz")
    method: Literal["ga", "mutation", "random", "er", "dense", "shuffled"] = flag("ga", "search: genetic, mutation only "
        "(1+lambda), random; Gaussian weights, sparse (er) or dense, at random; genetic on shuffled scores")
    genotype: Literal["mask", "ternary", "continuous", "circulant", "indegree"] = flag("ternary", "weights in {0, 1}, "
        "{-1, 0, 1} or [-1, 1]; N ternary genes, every row the same but turned; --inputs signed inputs a neuron")
    n_units: int = flag(50, "N, neurons", low=2)
    population: int = flag(20, "P, networks a generation", low=2)
    steps: int = flag(30, "generations", low=1)
    elites: int = flag(2, "best networks that are kept (and scored again with --fresh)", low=1)
    tournament: int = flag(3, "networks of which the best becomes a parent", low=1)
    crossover: Literal["row", "column", "block", "uniform", "none"] = flag("row", "what a child may take from its second "
        "parent: rows (a neuron's incoming weights), columns, a block of both, single genes, nothing")
    mutation: Literal["mixed", "toggle", "flip", "rewire", "gauss"] = flag("mixed", "kind of edit (mixed: all of the space)")
    edits: int = flag(3, "edits a child, one more or one less (0: none)", low=0)
    sigma: float = flag(.3, "gauss: standard deviation of an edit", low=0)
    density: float = flag(.1, "share of weights that are not 0 at the start", low=0, high=1)
    inputs: int = flag(5, "indegree: inputs a neuron", low=1)
    evolve_w_in: bool = flag(False, "W_in is a column of the genotype (signs: as large as uniform ones are on average)")
    w_in: Literal["redrawn", "fixed"] = flag("redrawn", "W_in is drawn for every seed, or once a repetition")
    fresh: bool = flag(False, "new fitness seeds in every generation")
    fitness_seeds: str = flag("0..3", "first repetition; the next one takes the next so many")
    held_out_seeds: str = flag("2000000..2000007", "the same for the curve that selects nothing")
    seeds: str = flag("1000000..1000031", "final seeds, the same for all repetitions")
    radius: float = flag(.9, "spectral radius that every W is rescaled to (0: all weights vanish)", low=0)
    raw: bool = flag(False, "no rescaling: genes times --radius / sqrt(N --density), which gives ternary ones about --radius")
    leak: float = flag(1., "a, share of a state that is renewed", low=0, high=1)
    input_scaling: float = flag(0., "largest |W_in|, which is uniform (0: the task's own)", low=0)
    bias_scaling: float = flag(0., "largest |b|", low=0)
    ridge: float = flag(1e-8, "penalty of squared readout weights, added to a sum over --train steps", low=0)
    washout: int = flag(200, "time steps before the readout is fitted", low=0)
    train: int = flag(1000, "time steps that it is fitted to", low=2)
    test: int = flag(1000, "time steps that it is scored on", low=2)
    delays: int = flag(0, "memory: delays 1 .. (0: 2 N)", low=0)
    horizon: int = flag(0, "mackey-glass, lorenz: samples ahead (0: 84 and 8)", low=0)
    weights: str = flag("", "score: npz file with W [N, N] or [M, N, N], and perhaps W_in [N], [M, N] or [M, seeds, N]")

    per_study: ClassVar[dict] = {
        **{study: dict(runs=5) for study in ("evolve", "spaces", "operators", "radius", "w-in", "continuous", "tasks")},
        "seed-problem": dict(runs=5, task="narma10"),
        "smoke": dict(n_units=8, population=4, steps=2, runs=1, washout=30, train=60, test=40, seeds="1000000..1000001",
                      fitness_seeds="0..1", held_out_seeds="2000000..2000001", horizon=3, inputs=2)}

    def check(self):
        P, N = self.population, self.n_units
        try:
            common.parse(self.task, Literal[tuple(TASKS)])
        except common.Stop as stop:
            raise common.Stop(f"--task: {stop}") from None
        for name, most in (("tournament", P), ("elites", P - 1)):
            if getattr(self, name) > most:
                raise common.Stop(f"--{name} {getattr(self, name)} of a --population of {P}: at most {most}")
        if self.genotype == "indegree" and self.inputs > N:
            raise common.Stop(f"--inputs {self.inputs}: a neuron has no more than the --n-units {N} neurons to listen to")
        if self.evolve_w_in and self.w_in == "fixed":
            raise common.Stop("--evolve-w-in and --w-in fixed: W_in is a genotype or it is not")
        if min(self.train, self.test) < self.washout:
            raise common.Stop(f"--train {self.train} and --test {self.test} must not be shorter than --washout {self.washout}")
        kinds = "mixed", *KINDS[self.genotype]
        if self.mutation not in kinds:
            raise common.Stop(f"--mutation {self.mutation} leaves the space of --genotype {self.genotype}: "
                              f"it has {', '.join(kinds)}")
        if self.genotype == "indegree" and self.crossover not in ("row", "none"):
            raise common.Stop(f"--crossover {self.crossover} changes the number of inputs: --genotype indegree has row, none")
        known = {name: set(seeds_of(self, name)) for name in SETS}
        if self.fresh:
            known["fitness_seeds"] = {e for t in range(self.steps) for e in seeds_of(self, "fitness_seeds", t)}
        for a, b in itertools.combinations(SETS, 2):
            both = known[a] & known[b]
            if both and self.study != "score":
                raise common.Stop(f"--{a.replace('_', '-')} and --{b.replace('_', '-')} share the seed {min(both)} (repetition "
                                  f"with --seed {self.seed}): what selects must not judge")

    def points(self):
        own = points_of(self)
        self.refuse_useless(own)
        return [] if self.sweep else own

    def refuse_useless(self, own):
        """Stop where a flag was given that nothing in these configurations reads."""
        swept = {text.split("=")[0].replace("-", "_"): text.partition("=")[2].split(",") for text in self.sweep}
        given, score = getattr(self, "given", set()), self.study == "score"
        takes = lambda field: {*swept.get(field, ()), *(str(getattr(self, field) if field in given else p.get(
            field, getattr(self, field))) for p in own or [{}])}
        if score != bool(self.weights):
            raise common.Stop("--study score needs --weights FILE.npz" if score else "--weights is for --study score alone")
        useless = {f for f, (field, values) in ONLY.items() if not takes(field) & values}
        if score:  # the network is given: what it does counts, not how it was found
            of_the_task = {"task", "seeds", "weights", "radius", "density", "leak", "ridge", *DRAWN[2:]}
            useless = {*COLUMNS, "runs", "sweep"} - of_the_task
        if self.study in ("radius", "tasks"):  # champions are looked at with the W_in of the seeds
            useless.add("evolve_w_in")
        if self.study == "seed-problem":
            useless.add("fitness_seeds")
            if self.steps % 2:
                raise common.Stop(f"--steps {self.steps}: eight seeds have half as many generations; take an even number")
        if useless & given:
            raise common.Stop(f"--{min(useless & given).replace('_', '-')} has no part in this --study {self.study}")
        if score and not self.plot_only:
            weights_of(self, say=lambda text: None)  # a bad file is refused before anything is written
        if swept.keys() & {*SETS, "weights", "steps", "population", "elites", "fresh"}:
            raise common.Stop(f"--sweep {' '.join(self.sweep)}: searches are compared on the same seeds and with as many "
                              "evaluations; use --name and a second run")

    @property
    def gaussian(self):
        """Whether W is no genotype but drawn with Gaussian weights."""
        return self.method in ("er", "dense")

    @property
    def columns(self):
        """Genes of a neuron."""
        return (1 if self.genotype == "circulant" and not self.gaussian else self.n_units) + self.evolve_w_in

    @property
    def better(self):
        """The sign of a better score."""
        return 1 if TASKS[self.task].capacity else -1


BREEDS = "ga", "shuffled", "mutation"
ONLY = {"inputs": ("genotype", {"indegree"}), "sigma": ("genotype", {"continuous"}), "delays": ("task", {"memory"}),
        "horizon": ("task", {"mackey-glass", "lorenz"}), "crossover": ("method", {*BREEDS[:2]}),
        "tournament": ("method", {*BREEDS[:2]}), "mutation": ("method", {*BREEDS}), "edits": ("method", {*BREEDS})}
# flags that mean something for some values of another one only
COLUMNS = [f.name for f in fields(Flags) if f.name not in {g.name for g in fields(common.Flags)}] + ["seed", "steps"]


def seeds_of(flags, which, generation=0):
    """The seeds of one set, a range: of the repetition with seed s the s-th stretch of that length; with --fresh every
    generation has its own; the final ones are the same for all."""
    text, name = getattr(flags, which), which.replace("_", "-")
    low, dots, high = text.partition("..")
    if not low.isdecimal() or not (high or low).isdecimal() or bool(dots) != bool(high) or int(high or low) < int(low):
        raise common.Stop(f"--{name} {text}: write FIRST..LAST, such as 0..3")
    first, count = int(low), int(high or low) - int(low) + 1
    stretch = {"seeds": 0, "fitness_seeds": flags.seed * flags.steps + generation if flags.fresh else flags.seed}
    first += stretch.get(which, flags.seed) * count
    if count > 10_000 or first + count > 2 ** 39:
        raise common.Stop(f"--{name} {text} with --seed {flags.seed}: at most 10,000 seeds, all below 2^39")
    return range(first, first + count)


# ---- Data law -------------------------------------------------------------------------------------------------------

def noise(seeds, T, low, high):
    """Independent uniform numbers, [S, T] in float64, each row from its own seed."""
    rows = [torch.rand(T, generator=common.generator(seed, "data"), dtype=torch.float64) for seed in seeds]
    return low + (high - low) * torch.stack(rows)


def delays_of(flags):
    """The longest delay."""
    return flags.delays or 2 * flags.n_units


def memory(flags, seeds, T):
    """u ~ U[-.8, .8]; targets u[t-k], k = 1 .. delays."""
    K = delays_of(flags)
    u = noise(seeds, T + K, -.8, .8).float().double()  # what the network sees, in float32
    return u[:, K:], u.unfold(1, K + 1, 1)[..., :-1].flip(2)


def narma10_of(u):
    """y[t+1] = .3 y[t] + .05 y[t] sum_{i=0..9} y[t-i] + 1.5 u[t-9] u[t] + .1, from u [S, T]: y[1] .. y[T]. About 1 % of the
    sequences with u ~ U[0, .5] diverge: NaN from there on."""
    y = torch.zeros(len(u), u.shape[1] + 1, dtype=torch.float64)
    for t in range(9, u.shape[1]):
        y[:, t + 1] = .3 * y[:, t] + .05 * y[:, t] * y[:, t - 9:t + 1].sum(1) + 1.5 * u[:, t - 9] * u[:, t] + .1
        y[:, t + 1] = torch.where(y[:, t + 1].abs() < 10, y[:, t + 1], math.nan)
    return y[:, 1:]


def narma10(flags, seeds, T):
    """u ~ U[0, .5], predict y[t+1] at t; a sequence that diverges is drawn again, 2^39 seeds further."""
    u = noise(seeds, T, 0, .5).float().double()
    y = narma10_of(u)
    while (lost := y.isnan().any(1)).any():
        u[lost] = noise([seed + 2 ** 39 for seed, gone in zip(seeds, lost) if gone], T, 0, .5).float().double()
        y, seeds = narma10_of(u), [seed + 2 ** 39 * bool(gone) for seed, gone in zip(seeds, lost)]
    return u, y[..., None]


def mackey_glass_of(start, T, tau=17., inner=.1):
    """x' = .2 x(t-tau) / (1 + x(t-tau)^10) - .1 x by Runge-Kutta of fourth order (of second at the kink that a constant history
    has at its end), from histories start [S]: x at times 1 .. T. Between two steps x(t-tau) is a cubic through four."""
    every, lag, h = round(1 / inner), round(tau / inner), inner
    x = np.empty((T * every + lag + 2, len(start)))
    x[:lag + 2] = start  # one more than the history, for the cubic
    f = lambda x, late: .2 * late / (1 + late ** 10) - .1 * x
    for i in range(lag + 1, len(x) - 1):
        a, b = x[i - lag], x[i - lag + 1]
        middle = (9 * (a + b) - x[i - lag - 1] - x[i - lag + 2]) / 16
        k1 = f(x[i], a)
        k2 = f(x[i] + h / 2 * k1, middle)
        k3 = f(x[i] + h / 2 * k2, middle)
        k4 = f(x[i] + h * k3, b)
        x[i + 1] = x[i] + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return torch.from_numpy(x[lag + 1 + every::every][:T].T.copy())


def mackey_glass(flags, seeds, T):
    """u = x - 1 of Mackey-Glass 17 sampled once a time unit; predict it 84 samples ahead. Starts differ, 500 samples are
    dropped."""
    ahead, start = flags.horizon or 84, noise(seeds, 1, .6, 1.4)[:, 0].numpy()
    x = mackey_glass_of(start, 500 + T + ahead)[:, 500:].float().double() - 1
    return x[:, :T], x[:, ahead:, None]


def lorenz_of(start, T, dt=.05, inner=.01):
    """The Lorenz system (10, 28, 8/3) from start [S, 3] by Runge-Kutta of fourth order: [S, T, 3] at dt, 2 dt, .."""
    f = lambda s: np.stack([10 * (s[1] - s[0]), s[0] * (28 - s[2]) - s[1], s[0] * s[1] - 8 / 3 * s[2]])
    s, rows = np.asarray(start).T, []
    for _ in range(T * round(dt / inner)):
        k1 = f(s)
        k2 = f(s + inner / 2 * k1)
        k3 = f(s + inner / 2 * k2)
        k4 = f(s + inner * k3)
        s = s + inner / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        rows.append(s)
    return torch.from_numpy(np.stack(rows[round(dt / inner) - 1::round(dt / inner)], 0).transpose(2, 0, 1).copy())


def lorenz(flags, seeds, T):
    """u = x / 20 of the Lorenz system sampled every .05; predict it 8 samples (.4 time units) ahead; 500 samples are
    dropped."""
    ahead = flags.horizon or 8
    x = lorenz_of(noise(seeds, 3, -8, 8) + torch.tensor([0., 0., 25.]), 500 + T + ahead)[:, 500:, 0].float().double() / 20
    return x[:, :T], x[:, ahead:, None]


class Task(NamedTuple):
    law: Callable     # (flags, seeds, T) -> u [S, T], y [S, T, K] in float64
    w_in: float       # largest |W_in|, unless --input-scaling
    capacity: bool = False  # scored by the sum of squared correlations, or else by NRMSE


TASKS = {"memory": Task(memory, .1, capacity=True), "narma10": Task(narma10, .3), "mackey-glass": Task(mackey_glass, 1.),
         "lorenz": Task(lorenz, 1.)}
DRAWN = "task", "n_units", "input_scaling", "bias_scaling", "washout", "train", "test", "delays", "horizon"  # of data


def slices(flags, seeds):
    """The seeds, few enough at a time for their targets to take 64 MB."""
    K = delays_of(flags) if TASKS[flags.task].capacity else 1
    few = max(1, 2 ** 23 // ((flags.washout + flags.train + flags.test) * K))
    return [seeds[i:i + few] for i in range(0, len(seeds), few)]


def data(flags, seeds):
    """Of every seed: W_in [S, N], b [S, N], u [S, T] in float32, targets y [S, T, K] in float64."""
    settings = tuple((f, getattr(flags, f)) for f in DRAWN)
    return drawn(tuple(seeds), settings, flags.seed if flags.w_in == "fixed" else None)


def drawn_weights(flags, seeds):
    """W_in and b [S, N] of any number of seeds."""
    return [torch.cat(x) for x in zip(*(data(flags, few)[:2] for few in slices(flags, seeds)))]


@functools.lru_cache(16)
def drawn(seeds, settings, repetition):
    flags = Flags(**dict(settings))
    u, y = TASKS[flags.task].law(flags, list(seeds), flags.washout + flags.train + flags.test)
    uniform = lambda stream, seed: 2 * torch.rand(flags.n_units, generator=common.generator(seed, stream)) - 1
    w_in = [uniform("w_in", seed) if repetition is None else uniform("w_in/fixed", repetition) for seed in seeds]
    bias = torch.stack([uniform("bias", seed) for seed in seeds]) * flags.bias_scaling
    return torch.stack(w_in) * size_of_w_in(flags), bias, u.float(), y


def size_of_w_in(flags):
    """Largest |W_in|."""
    return flags.input_scaling or TASKS[flags.task].w_in


def linear_floor(u, y, flags, lags=40):
    """NRMSE [S] of the best linear reading of u[t] .. u[t-lags], fitted and tested where the network is: what a reservoir that
    computes nothing reaches."""
    past = torch.nn.functional.pad(u.double(), (lags, 0)).unfold(1, lags + 1, 1)
    past = torch.cat([past, torch.ones_like(past[..., :1])], 2)
    a, b = flags.washout, flags.washout + flags.train
    fit = torch.linalg.lstsq(past[:, a:b], y[:, a:b]).solution
    return ((past[:, b:] @ fit - y[:, b:]).pow(2).mean(1).sqrt() / y[:, b:].std(1, correction=0)).mean(1)


# ---- Model ----------------------------------------------------------------------------------------------------------

def first_genes(flags, count, generator):
    """Random genotypes [count, N, columns] of the space (er, dense: Gaussian weights); the column of W_in, the last, is
    full."""
    shape = count, flags.n_units, flags.columns
    rand = lambda *size: torch.rand(*(size or shape), generator=generator)
    sign = lambda: torch.where(rand() < .5, -1., 1.)
    if flags.gaussian:
        value = torch.randn(shape, generator=generator)
    else:
        value = new_value(flags, rand(), sign())
    there = rand() < (1. if flags.method == "dense" else flags.density)
    if flags.genotype == "indegree" and not flags.gaussian:
        there = torch.zeros(shape).scatter_(2, rand(count, flags.n_units, flags.n_units).topk(flags.inputs).indices, 1) > 0
    if flags.evolve_w_in:
        there[..., -1] = True
        if flags.gaussian:
            value[..., -1] = sign()[..., -1]
    return value * there


def new_value(flags, uniform, sign):
    """A weight of the genotype's alphabet that is not 0."""
    return {"mask": torch.ones_like(sign), "continuous": sign * uniform}.get(flags.genotype, sign)


def spectral_radius(W, squarings=20):
    """Largest |eigenvalue| of W [P, N, N], as |W^m|^(1/m) with m = 2^20, the matrix scaled by a power of 2 after each squaring,
    so that networks without cycles give exactly 0. Complex pairs, on which power iteration fails, do no harm; the relative
    error is about 1e-6. Powers of matrices that are far from normal can underflow: they are looked up among the eigenvalues,
    where less than 1e-4 of the largest weight counts as 0. NaN stays NaN."""
    power, log2 = W.double(), torch.zeros(W.shape[:-2], dtype=torch.float64)
    largest = lambda W: torch.linalg.vector_norm(W, math.inf, (-2, -1))
    for k in range(squarings + 1):
        power = power @ power if k else power
        shift = torch.frexp(largest(power)).exponent.double()
        power, log2 = power * torch.exp2(-shift)[..., None, None], log2 + shift * .5 ** k
    radius = torch.where(largest(power) == 0, 0., torch.exp2(log2 + torch.log2(largest(power)) * .5 ** squarings))
    for p in (radius == 0).nonzero()[:, 0]:
        reached = W[p] != 0
        for _ in range(len(reached).bit_length()):
            reached = reached | ((reached.float() @ reached.float()) > 0)
        if reached.diagonal().any():  # a cycle
            found = torch.linalg.eigvals(W[p].double()).abs().max()
            radius[p] = found if found > 1e-4 * W[p].abs().max() else 0.
    return radius


def networks(genes, flags):
    """W [P, N, N], W_in [P, N] or None, and the spectral radius [P] before rescaling, of genotypes. A W of radius 0 has no
    scale of its own: its weights are its genes times --radius."""
    N, W, w_in = flags.n_units, genes, None
    if flags.evolve_w_in:
        alike = 1. if flags.genotype == "continuous" and not flags.gaussian else 3 ** -.5  # as strong as uniform numbers
        W, w_in = genes[..., :-1], genes[..., -1] * size_of_w_in(flags) * alike
    if flags.genotype == "circulant" and not flags.gaussian:
        W = W[:, (torch.arange(N)[:, None] - torch.arange(N)) % N, 0]  # W[i, j] = gene i - j
    if flags.raw:
        W = W * flags.radius / math.sqrt(max(1., N * flags.density))
    radius = spectral_radius(W)
    return W if flags.raw else rescaled(W, radius, flags.radius), w_in, radius


def rescaled(W, own, radius):
    """W [P, N, N] of spectral radius own [P] with another one; where it is 0, W times `radius`."""
    return (W * (radius / torch.where(own > 0, own, 1.))[:, None, None]).float()


def advance(y, A, drive, leak, out):
    """Time steps out [n, c, S, N] of y = (x + 1) / 2 from y [c, S, N], which becomes the last one. tanh z = 2 sigmoid(2 z) - 1,
    and sigmoid is four times faster; so A = 4 W' and drive = 2 (W_in u + b) - 2 W 1 [n, c, S, N] give y[t] = (1 - a) y[t-1] +
    a sigmoid(y[t-1] A + drive[t]). (In float32 x is exact to 6e-8, not to its last digit: signals of 1e-6 drown.)"""
    old = y
    for t in range(len(out)):
        new = torch.baddbmm(drive[t], old, A, out=out[t]).sigmoid_()
        old = new if leak == 1 else new.mul_(leak).add_(old, alpha=1 - leak)
    y.copy_(old)


def recorded(f):
    """f as a CUDA graph on the memory that it works on; None where it can't be recorded."""
    try:
        f()  # libraries initialise outside of the recording
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            f()
        return graph.replay
    except RuntimeError as error:
        print(f"no CUDA graph ({str(error).splitlines()[0]}): one kernel after the other")


TOGETHER = 2 ** 16  # weights of networks that share a kernel on a CPU (measured: they stay in the second-level cache)
BLOCK = 200         # time steps at most between two additions to the Gram matrix


@torch.no_grad()
def evaluate(W, w_in, bias, u, y, flags):
    """Networks W [P, N, N] with W_in [S, N] or [P, S, N], bias [S, N], inputs u [S, T], targets y [S, T, K]: by target the
    squared correlation (memory) or NRMSE on the last --test steps, [P, S, K] in float64, NaN where the ridge regression
    failed."""
    at, (P, N, _), S = common.device(flags), W.shape, len(u)
    together = TOGETHER // N ** 2 if at.type == "cpu" else 2 ** 28 // (S * BLOCK * (N + y.shape[2]))
    bias, u, y = bias.to(at), u.to(at), y.to(at)
    parts = list(zip(W.split(max(1, together)), w_in.expand(P, S, N).split(max(1, together))))
    return torch.cat(common.divided(lambda part: read_out(part[0].to(at), part[1].to(at), bias, u, y, flags).cpu(), parts))


def read_out(W, w_in, bias, u, y, flags):
    """`evaluate` of networks that fit into one kernel. Readout: minimise sum (y - b - w x)^2 + ridge |w|^2, b free, on centred
    Gram matrices in float64, which grow block by block with time and not with T."""
    (c, N, _), (S, T, K), at = W.shape, y.shape, W.device
    double, fit, end = dict(dtype=torch.float64, device=at), flags.washout, flags.washout + flags.train
    block = max(1, min(BLOCK, 2 * TOGETHER // (c * N))) if at.type == "cpu" else BLOCK
    A, shift = (4 * W.transpose(1, 2)).contiguous(), 2 * (bias - W.sum(2)[:, None])  # [c, S, N]
    state, x = torch.full((c, S, N), .5, device=at), torch.empty(block, c, N, **double)
    drive, out = torch.empty(2, block, c, S, N, device=at)  # buffers: fresh memory costs as much as the arithmetic
    targets = torch.cat([torch.ones(S, T, 1, **double), y], 2).transpose(1, 2)  # with the constant, [S, 1 + K, T]
    gram, cross = torch.zeros(S, c, N, N, **double), torch.zeros(S, 1 + K, c * N, **double)
    sums, readout, graph = torch.zeros(3, S, c, K, **double), None, None
    if at.type == "cuda" and flags.compile != "off":
        graph = recorded(lambda: advance(state, A, drive, flags.leak, out))
        state.fill_(.5)
    cuts = sorted({*range(0, fit, block), *range(fit, end, block), *range(end, T, block), T})
    for a, b in zip(cuts, cuts[1:]):
        torch.mul(2 * u[:, a:b].T[:, None, :, None], w_in, out=drive[:b - a]).add_(shift)
        if graph and b - a == block:
            graph()
        else:
            advance(state, A, drive[:b - a], flags.leak, out[:b - a])
        if b > end and readout is None:
            readout, intercept = ridge(gram, cross.view(S, 1 + K, c, N).permute(0, 2, 3, 1), y[:, fit:end], flags)
        for s in range(S if b > fit else 0):  # seed by seed: what is multiplied stays in the cache
            now = x[:b - a].copy_(out[:b - a, :, s]).mul_(2).sub_(1)
            if b <= end:
                gram[s].baddbmm_(now.permute(1, 2, 0), now.transpose(0, 1))
                cross[s].addmm_(targets[s, :, a:b], now.view(b - a, c * N))
            else:
                p = torch.baddbmm(intercept[s], now.transpose(0, 1), readout[s])
                sums[:, s] += torch.stack([p.sum(1), p.square().sum(1), p.mul_(y[s, a:b]).sum(1)])
    return scores_of(sums / flags.test, y[:, end:], flags)


def ridge(gram, cross, y, flags):
    """Readout [S, c, N, K] and intercept [S, c, 1, K] from sums of x x' [S, c, N, N] and of x, x y [S, c, N, 1 + K] over the
    targets y [S, n, K]; NaN where the centred Gram matrix with the penalty has no Cholesky factor."""
    n, mean, level = y.shape[1], cross[..., :1] / y.shape[1], y.mean(1)[:, None, None]
    centred = gram - n * mean * mean.transpose(2, 3)
    centred.diagonal(dim1=2, dim2=3).add_(flags.ridge)
    factor, info = torch.linalg.cholesky_ex(centred)
    readout = torch.cholesky_solve(cross[..., 1:] - n * mean * level, factor)
    readout[info > 0] = math.nan
    return readout, level - (readout * mean).sum(2, keepdim=True)


def scores_of(moments, y, flags):
    """[c, S, K] from the readouts' p, p^2 and p y [3, S, c, K], means over time, and targets y [S, T, K]: squared correlation
    of p and y, 0 where p is constant (memory), or sqrt(mean (p - y)^2) / std y."""
    p, pp, py = moments.transpose(1, 2)
    level, power = y.mean(1), (y * y).mean(1)
    spread = power - level ** 2
    if TASKS[flags.task].capacity:
        moving = pp - p * p
        r2 = (py - p * level) ** 2 / (moving * spread)
        return torch.where(moving <= 1e-20 * spread, 0., r2).where(pp.isfinite(), math.nan)
    return ((pp - 2 * py + power).clamp(min=0) / spread).sqrt()


def score(values, flags):
    """One number a network and seed, [.., S]: capacity, or mean NRMSE over targets, from [.., S, K]."""
    return values.sum(-1) if TASKS[flags.task].capacity else values.mean(-1)


def on_seeds(W, own, flags, seeds):
    """Values [P, S, K] of W [P, N, N] on seeds, with W_in of its own [P, N] or [P, S, N], or None: that of each seed."""
    done, values = 0, []
    for few in slices(flags, seeds):
        w_in, *rest = data(flags, few)
        if own is not None:
            w_in = own[:, None] if own.dim() == 2 else own[:, done:done + len(few)]
        values.append(evaluate(W, w_in, *rest, flags))
        done += len(few)
    return torch.cat(values, 1)


def scored(genes, flags, seeds):
    """Values [P, S, K] of genotypes on seeds, and their spectral radii [P] before rescaling."""
    W, own, radius = networks(genes, flags)
    return on_seeds(W, own, flags, seeds), radius


# ---- Measures -------------------------------------------------------------------------------------------------------

def linear_capacity(W, w_in, K, noise=0., u_var=.64 / 3):
    """Capacity [K] by delay 1 .. K of the linear network x[t] = W x[t-1] + w_in u[t], exact for endless data: x = sum_j W^j
    w_in u[t-j], so Sigma = var u sum_j c_j c_j' with c_j = W^j w_in, and the readout (Sigma + noise)^-1 var u c_k. With noise
    -> 0 the sum over k >= 0 is the rank, at most N (Jaeger 2001). noise: ridge / --train. NaN where the series does not
    converge."""
    W, c, columns = np.asarray(W, float), np.asarray(w_in, float), []
    while len(columns) <= K or (np.abs(c).max() > 1e-9 * np.abs(columns[0]).max() and len(columns) < 40 * len(W)):
        columns.append(c)
        c = W @ c
    if not np.isfinite(c).all() or np.abs(c).max() > 1e-3 * max(np.abs(columns[0]).max(), 1e-300):
        return np.full(K, math.nan)
    C = np.stack(columns, 1) * math.sqrt(u_var)
    U, sizes, V = np.linalg.svd(C, full_matrices=False)
    keep = sizes > 1e-13 * sizes[0]
    U, sizes, V = U[:, keep], sizes[keep], V[keep, 1:K + 1]
    shrunk = sizes ** 2 / (sizes ** 2 + noise)  # readout k: V_k sizes / (sizes^2 + noise) in the basis U
    along, power = (shrunk[:, None] * V * V).sum(0), (shrunk[:, None] ** 2 * V * V).sum(0)
    return np.divide(along ** 2, power, out=np.zeros(K), where=power > 0)


def cycle(N, weight):
    """W [N, N] of a ring (simple cycle reservoir)."""
    return torch.roll(torch.eye(N), 1, 0) * weight


def delay_line(N, weight):
    """W [N, N] of a chain (delay line reservoir); its spectral radius is 0."""
    return cycle(N, weight).tril()


REFERENCES = "ring", "chain", "random sparse, mean", "random dense, mean"  # nothing selected
DRAWS = 8  # networks that such a mean is over


def references(flags):
    """Scores [4, S] on the final seeds, and their means by target [4, K], of ring, chain, random sparse and dense Gaussian
    networks at the same spectral radius; and the NRMSE [S] of the best linear reading of the inputs."""
    N, generator, seeds = flags.n_units, common.generator(0, "reference"), seeds_of(flags, "seeds")
    kinds = [cycle(N, flags.radius)[None], delay_line(N, flags.radius)[None]]
    for method in ("er", "dense"):
        own = replace(flags, method=method, genotype="ternary", evolve_w_in=False, raw=False)
        kinds.append(networks(first_genes(own, DRAWS, generator), own)[0])
    values = [on_seeds(W, None, flags, seeds).mean(0) for W in kinds]
    floor = torch.full((len(seeds),), math.nan)
    if not TASKS[flags.task].capacity:
        floor = torch.cat([linear_floor(*data(flags, few)[2:], flags) for few in slices(flags, seeds)])
    return {"reference": torch.stack([score(v, flags) for v in values]),
            "reference_by_target": torch.stack([v.mean(0) for v in values]), "floor": floor, "set_final": np.array(seeds)}


def unselected(flags):
    """DRAWS networks as random search draws them from the same space: W [DRAWS, N, N], W_in of their own or None, radii."""
    method = flags.method if flags.gaussian else "random"
    return networks(first_genes(replace(flags, method=method), DRAWS, common.generator(flags.seed, "unselected")), flags)


def permuted(W, flags, count=4):
    """W [count, N, N]: the weights of W [N, N] at random other places, at the same spectral radius (unless it is 0). The same
    density, signs and sizes; only the wiring is lost."""
    generator = common.generator(flags.seed, "permuted")
    shuffled = torch.stack([W.flatten()[torch.randperm(W.numel(), generator=generator)].view_as(W) for _ in range(count)])
    radius = spectral_radius(W[None]).item()
    return rescaled(shuffled, spectral_radius(shuffled), radius) if radius else shuffled


def final_score(W, own, flags):
    """[P] mean scores on the final seeds of W [P, N, N]."""
    return score(on_seeds(W, own, flags, seeds_of(flags, "seeds")), flags).mean(1)


def phases(W):
    """Order [N] of the neurons by the angle that they have in the eigenvector of the largest complex eigenvalue: along a ring
    it is the ring."""
    values, vectors = np.linalg.eig(np.asarray(W, float))
    value = np.where(np.abs(values.imag) > 1e-9, np.abs(values), -1).argmax()
    return np.argsort(np.angle(vectors[:, value]) % (2 * np.pi), kind="stable")


@functools.lru_cache
def student(n, level=.95):
    """Two-sided quantile of Student's t with n - 1 degrees of freedom: its density summed up, and a power law beyond 1000."""
    step = 1 / 2000
    t = (np.arange(2_000_000) + .5) * step
    density = (1 + t ** 2 / (n - 1)) ** (-n / 2)
    beyond = (n - 1) ** (n / 2 - 1) * 1000. ** (1 - n)
    return np.interp(level, np.cumsum(density) * step / (density.sum() * step + beyond), t + step / 2)


def interval(x):
    """Mean of x [n] and half the width of its 95 % confidence interval; infinite below two values."""
    if len(x) < 2:
        return (x[0] if len(x) else math.nan), math.inf
    return np.mean(x), student(len(x)) * np.std(x, ddof=1) / math.sqrt(len(x))


def direction(arrays):
    """[R] the sign of a better score."""
    return np.array([1. if TASKS[task].capacity else -1. for task in arrays["task"]])


def best(x, sign):
    """The best of x [R, .., P] over its last axis, where sign [R] says what is better; NaN never wins."""
    sign = np.reshape(sign, (-1, *[1] * (x.ndim - 1)))
    top = np.where(np.isfinite(x), sign * x, -np.inf).max(-1)
    return np.where(np.isfinite(top), sign[..., 0] * top, np.nan)


def mean(x):
    """The mean over the last axis of what is finite; NaN where nothing is."""
    count = np.isfinite(x).sum(-1)
    return np.divide(np.where(np.isfinite(x), x, 0).sum(-1), count, out=np.full(count.shape, np.nan), where=count > 0)


def last(arrays, key):
    """arrays[key] [R, G, ..] in the last generation of each run; runs of fewer generations end in NaN."""
    x = arrays[key]
    known = np.isfinite(x).reshape(*x.shape[:2], -1).any(2)
    return x[np.arange(len(x)), x.shape[1] - 1 - known[:, ::-1].argmax(1)]


def luck(arrays):
    """[R] fitness of the champion minus its final score, in the better direction."""
    return direction(arrays) * (best(last(arrays, "fitness"), direction(arrays)) - arrays["final"].mean(1))


# ---- Train ----------------------------------------------------------------------------------------------------------

def choose(mask, generator):
    """A random True entry of each row of mask [M, E], and whether there is one."""
    return (torch.rand(mask.shape, generator=generator) * mask).argmax(1), mask.any(1)


def mutate(genes, flags, generator):
    """Children [M, N, columns] after edits - 1 .. edits + 1 edits each. toggle: a weight vanishes or, as often, one appears;
    flip: a sign; rewire: a weight moves; gauss: noise on a weight, clipped to [-1, 1]. W and W_in exchange nothing."""
    M, N, C = genes.shape
    flat, rows, e = genes.flatten(1).clone(), torch.arange(N).repeat_interleave(C), torch.arange(N * C)
    of_w_in = (e % C == C - 1) & flags.evolve_w_in
    kinds = KINDS[flags.genotype] if flags.mutation == "mixed" else (flags.mutation,)
    rand = lambda: torch.rand(M, generator=generator)
    count = torch.randint(max(flags.edits - 1, 0), flags.edits + 2, (M,), generator=generator) * (flags.edits > 0)
    for edit in range(flags.edits + 1):
        old, exists = choose(flat != 0, generator)  # a weight and, in the same part, a place for another one
        near = of_w_in == of_w_in[old][:, None]
        if flags.genotype == "indegree":
            near &= rows == rows[old][:, None]
        empty, room = choose((flat == 0) & near, generator)
        kind = torch.randint(len(kinds), (M,), generator=generator)
        toggle, flip, rewire, gauss = (torch.tensor([k == name for k in kinds])[kind] & (edit < count)
                                       for name in ("toggle", "flip", "rewire", "gauss"))
        appears = rand() < .5
        sign, noise = torch.where(rand() < .5, -1., 1.), flags.sigma * torch.randn(M, generator=generator)
        value, new = flat[torch.arange(M), old], new_value(flags, rand(), sign)
        kept = torch.where(flip, -value, torch.where(gauss, (value + noise).clamp(-1, 1), value))
        kept[(toggle & ~appears) | (rewire & room)] = 0.
        born = torch.where(toggle & appears, new, torch.where(rewire & exists, value, 0.))
        flat[torch.arange(M), old] = torch.where(exists, kept, value)
        flat[torch.arange(M)[room], empty[room]] = born[room]
    return flat.view(M, N, C)


def cross(a, b, flags, generator):
    """Children of parents a, b [M, N, columns]: half of the rows, columns, single genes, or a block come from b."""
    M, N, C = a.shape
    rand = lambda *shape: torch.rand(*shape, generator=generator)
    if flags.crossover == "block":  # of half of the genes, round the edges
        inside = lambda n: (torch.arange(n) - torch.randint(n, (M, 1), generator=generator)) % n < n * .5 ** .5
        taken = inside(N)[:, :, None] & inside(C)[:, None]
    else:
        shape = {"row": (M, N, 1), "column": (M, 1, C), "uniform": (M, N, C)}.get(flags.crossover, (M, 1, 1))
        taken = rand(*shape) < (.5 if flags.crossover != "none" else 0.)
    return torch.where(taken, b, a)


def breed(genes, loss, flags, generator):
    """The next generation, elites first, and which networks they were. A loss that is NaN is the worst."""
    P, loss = len(genes), loss.nan_to_num(math.inf, math.inf)
    if flags.method == "shuffled":
        loss = loss[torch.randperm(P, generator=generator)]
    order = loss.argsort(stable=True)
    M, elites = P - flags.elites, order[:flags.elites]
    if flags.method not in BREEDS:
        children = first_genes(flags, M, generator)
    elif flags.method == "mutation":
        children = mutate(genes[order[:1]].expand(M, -1, -1), flags, generator)
    else:
        drawn = torch.rand(M, 2, P, generator=generator).topk(flags.tournament).indices
        parents = drawn.gather(2, loss[drawn].argmin(2, keepdim=True))[..., 0]
        children = mutate(cross(genes[parents[:, 0]], genes[parents[:, 1]], flags, generator), flags, generator)
    return torch.cat([genes[elites], children]), elites


def loss_of(fitness, flags):
    """What is minimised, from fitness (or fitness, from it): the capacity that N leaves, or the NRMSE."""
    return flags.n_units - fitness if TASKS[flags.task].capacity else fitness


def step_of(runs):
    """One generation of ONE repetition: the population and its losses -> the next one and its losses."""
    def step(state, seed, number):
        flags, t, params = runs[int(number["run"])], int(state["t"]), {k: v.cpu() for k, v in state["params"].items()}
        generator, genes, known = torch.Generator().manual_seed(int(seed)), params["genes"], params["loss"][:0]
        if t:
            genes, elites = breed(genes, params["loss"], flags, generator)
            if not flags.fresh:  # the same seeds: the same scores
                known = params["loss"][elites]
        values, radius = scored(genes[len(known):], flags, seeds_of(flags, "fitness_seeds", t))
        loss = torch.cat([known, loss_of(score(values, flags).mean(-1), flags)])  # NaN where one seed failed
        logs = {"loss": loss.nan_to_num(math.inf).min(), "fitness": loss_of(loss, flags),
                "failed": values.isnan().any(2).any(1).sum(), "acyclic": (radius == 0).sum()}
        return {"params": {"genes": genes, "loss": loss}, "t": state["t"] + 1}, logs
    return step


def best_of(params):
    """The genotype [1, N, columns] of the lowest loss."""
    return params["genes"][params["loss"].nan_to_num(math.inf).argmin()][None]


def train(runs, folder):
    """Search with several repetitions; a step is a generation. Returns (final state, metrics, snapshots)."""
    flags = runs[0]
    first = [first_genes(run, run.population, common.generator(run.seed, "init")) for run in runs]
    unknown = torch.full((flags.population,), math.nan, dtype=torch.float64)
    state = common.stack({"params": {"genes": genes, "loss": unknown}, "t": torch.tensor(0)} for genes in first)

    def draw(r, chunk):  # a seed for each generation
        return torch.randint(2 ** 62, (common.CHUNK,), generator=common.generator(runs[r].seed, "train", chunk))

    known = {}  # of each run: its last best, and what held-out seeds say of it

    def evaluate(r, params):
        best = best_of(params)
        if r not in known or not torch.equal(known[r][0], best):
            values, radius = scored(best, runs[r], seeds_of(runs[r], "held_out_seeds"))
            known[r] = best, {"held_out": score(values, flags).mean(), "best_radius": radius[0]}
        genes = params["genes"][..., :flags.columns - flags.evolve_w_in]
        return known[r][1] | {"mean_density": (genes != 0).double().mean()}
    return common.train(runs, folder, state, {"run": torch.arange(len(runs))}, step_of(runs), draw, evaluate,
                        eval_at=range(1, flags.steps + 1), label=f"{flags.method} {flags.genotype}", plain=True)


# ---- Figures --------------------------------------------------------------------------------------------------------

NAMES = {"ga": "genetic", "mutation": "mutation only", "random": "random search", "er": "best random sparse",
         "dense": "best random dense", "shuffled": "shuffled scores"}
WORDS = {"method": NAMES.get, "mutation": "{} edits".format, "genotype": str, "task": str, "w_in": "{} W_in".format,
         "crossover": lambda kind: f"{'no' if kind == 'none' else kind} cross-over",
         "raw": {True: "raw", False: "rescaled"}.get, "evolve_w_in": {True: "evolved W_in", False: ""}.get,
         "fitness_seeds": lambda text: seeds_in_words(text)}
UNSEEN = "held-out seeds: nothing is selected on them"


def unit(task):
    return "memory capacity (delays)" if TASKS[task].capacity else f"NRMSE, {task}"


def labels_of(arrays):
    """What tells the configuration of each run from the others, in words [R]."""
    varied = [f for f in COLUMNS if f not in ("seed", "steps") and len(np.unique(arrays[f])) > 1]
    word = lambda f, value: WORDS[f](value) if f in WORDS else f"{f.replace('_', ' ')} {value}"
    rows = [", ".join(filter(None, [word(f, arrays[f][r].item()) for f in varied])) for r in range(len(arrays["seed"]))]
    return np.array([row.replace("evolved W_in, redrawn W_in", "evolved W_in") or "this search" for row in rows])


def seeds_in_words(text):
    count = len(seeds_of(Flags(fitness_seeds=text), "fitness_seeds"))
    return f"{count} seed{'s' * (count > 1)}"


def in_order(labels):
    return list(dict.fromkeys(labels))


def curve(ax, arrays, key, mask, label, colour):
    """The curve of some runs by evaluations, over repetitions."""
    if not mask.any():
        return
    x = arrays["fitness" if key in ("best", "mean") else key][mask]
    y = best(x, direction(arrays)[mask]) if key == "best" else mean(x) if key == "mean" else x
    y = y[:, np.isfinite(y).any(0)]
    if not y.size:
        return
    cost = arrays["population"][mask][0] * np.isfinite(arrays["set_fitness"][mask][0].astype(float)).sum()
    common.band(ax, (np.arange(y.shape[1]) + 1) * cost, y.T, label, colour)


def dots(ax, values, labels, colours, xlabel):
    """Each repetition a dot, the mean with its 95 % interval beside them; a row for each label."""
    names = in_order(labels)
    for i, name in enumerate(names):
        x = values[labels == name]
        x = x[np.isfinite(x)]
        ax.plot(x, np.full(len(x), i) + .14, "o", ms=3.5, alpha=.5, color=colours[name])
        if len(x) > 1:
            mean, half = interval(x)
            ax.errorbar(mean, i - .14, xerr=half, fmt="s", ms=4, capsize=3, color=colours[name])
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set(ylim=(len(names) - .5, -.7), xlabel=xlabel)


def alike(arrays):
    """Whether all runs have the same networks without search beside them."""
    return all(len(np.unique(arrays[f])) == 1 for f in (*DRAWN, "radius", "leak", "ridge", "w_in", "seeds") if f in arrays)


def known_scores(arrays):
    """{name: score} of what needs no search; {} where it is not the same for all runs."""
    names = (*REFERENCES, "best linear reading")
    found = {name: x.mean() for name, x in zip(names, (*arrays["reference"], arrays["floor"]))} if alike(arrays) else {}
    return {name: x for name, x in found.items() if np.isfinite(x)}


def lines_of(ax, arrays, reach=.5):
    """What needs no search, as dashed vertical lines where they lie near (within `reach` axes), in words where far off."""
    low, high = ax.get_xlim()
    room = reach * (high - low)
    near = {name: x for name, x in known_scores(arrays).items() if low - room < x < high + room}
    for i, (name, x) in enumerate(near.items()):
        ax.axvline(x, color="grey", ls="--", lw=.8)
        ax.annotate(name, (x, 1 - .45 * (i % 2)), xycoords=("data", "axes fraction"), fontsize=6, color="grey", rotation=90,
                    ha="right", va="top")
    far_off(ax, {name: x for name, x in known_scores(arrays).items() if name not in near})


def far_off(ax, scores):
    """A line of text about what lies beyond the axes."""
    if scores:
        ax.annotate("beyond these axes: " + ", ".join(f"{name} {x:.3g}" for name, x in scores.items()), (1, 0),
                    xycoords="axes fraction", fontsize=6, color="grey", ha="right", va="bottom")


def colours_of(names):
    return dict(zip(names, itertools.cycle([*common.COLOURS, "#999999", "#882255"])))


def draw_configurations(arrays, flags):
    """Final scores, luck, and the curves of every configuration; of different tasks only gains can be compared."""
    labels, same = labels_of(arrays), len(np.unique(arrays["task"])) == 1
    colours, final = colours_of(in_order(labels)), arrays["final"].mean(1)
    figure, axes = common.panels(4 if same else 1, f"{flags.study}: champions on seeds that nothing was selected on", flags)
    if not same:
        plain = arrays["unselected"]
        dots(axes[0], 100 * direction(arrays) * (final - plain) / np.abs(plain), labels, colours,
             "gain over networks of the same space that nothing selected, %")
        return figure
    words = unit(str(arrays["task"][0]))
    dots(axes[0], final, labels, colours, f"{words}, final seeds")
    lines_of(axes[0], arrays)
    axes[0].set_title("champions: dots are repetitions, squares their mean with its 95 % interval", fontsize=8)
    dots(axes[1], luck(arrays), labels, colours, "fitness minus final score, in the better direction")
    axes[1].axvline(0, color="grey", lw=.8)
    axes[1].set_title("luck: what fitness promised and other seeds do not keep", fontsize=8)
    for ax, key, title in zip(axes[2:], ("best", "held_out"), ("best fitness, on the seeds that select", UNSEEN)):
        for name in in_order(labels):
            curve(ax, arrays, key, labels == name, name, colours[name])
        ax.set(xlabel="network evaluations", ylabel=words)
        ax.set_title(title, fontsize=8)
    shared_range(axes[2:])
    legend(axes[3], fontsize=5.5, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def legend(ax, **style):
    if ax.get_legend_handles_labels()[0]:  # not where every run failed
        ax.legend(**style)


def shared_range(axes):
    low, high = zip(*(ax.get_ylim() for ax in axes))
    for ax in axes:
        ax.set_ylim(min(low), max(high))


def draw_evolution(arrays, flags):
    labels = labels_of(arrays)
    if not common.as_designed(flags) or set(labels) != {NAMES[m] for m in METHODS}:
        return draw_configurations(arrays, flags)
    names, words = in_order(labels), unit(flags.task)
    colours = colours_of(names)
    figure, axes = common.panels(4, "does evolving the topology beat luck?", flags)
    curve(axes[0], arrays, "best", arrays["method"] == "ga", "genetic, best", colours[NAMES["ga"]])
    curve(axes[0], arrays, "mean", arrays["method"] == "ga", "genetic, population's mean", "grey")
    for method in ("mutation", "random"):
        curve(axes[0], arrays, "best", arrays["method"] == method, f"{NAMES[method]}, best", colours[NAMES[method]])
    axes[0].set_title("fitness: the seeds that select", fontsize=9)
    for method in ("ga", "mutation", "random"):
        curve(axes[1], arrays, "held_out", arrays["method"] == method, NAMES[method], colours[NAMES[method]])
    axes[1].set_title(f"the best, on {UNSEEN}", fontsize=9)
    shared_range(axes[:2])
    for ax in axes[:2]:
        ax.set(xlabel="network evaluations", ylabel=words)
        legend(ax, fontsize=6)
        low, high = ax.get_ylim()
        inside = {name: x for name, x in known_scores(arrays).items() if low < x < high}
        for name, x in inside.items():
            common.shelf(ax, x, name, side="left")
    far_off(axes[1], {name: x for name, x in known_scores(arrays).items() if name not in inside})
    dots(axes[2], arrays["final"].mean(1), labels, colours, f"{words}, {arrays['final'].shape[1]} final seeds")
    lines_of(axes[2], arrays, math.inf)
    axes[2].set_title("champions, and what needs no search (dashed)", fontsize=9)
    fitness, final = best(last(arrays, "fitness"), direction(arrays)), arrays["final"].mean(1)
    for name in names:
        axes[3].plot(fitness[labels == name], final[labels == name], "o", ms=4, color=colours[name], label=name)
    ends = [min(fitness.min(), final.min()), max(fitness.max(), final.max())]
    axes[3].plot(ends, ends, color="grey", lw=.8, ls="--", label="no luck")
    axes[3].set(xlabel="fitness of the champion", ylabel="its score on final seeds")
    axes[3].set_title("luck: how far below the dashed line" if flags.better > 0 else "luck: how far above the dashed line",
                      fontsize=9)
    axes[3].legend(fontsize=6)
    return figure


def champion(arrays):
    """W [N, N], W_in [S, N] and the run of the genetic search (else of any) whose champion has the best fitness."""
    fitness = direction(arrays) * best(last(arrays, "fitness"), direction(arrays))
    mine = np.flatnonzero(arrays["method"] == "ga") if (arrays["method"] == "ga").any() else np.arange(len(fitness))
    r = mine[np.nan_to_num(fitness[mine], nan=-np.inf).argmax()]
    N = arrays["n_units"][r]
    return arrays["W"][r, :N, :N], arrays["W_in"][r, :, :N], r


def draw_champion(arrays, flags):
    W, _, r = champion(arrays)
    N, order = len(W), phases(W)
    words = f"the champion of highest fitness ({labels_of(arrays)[r]}, seed {arrays['seed'][r]})"
    figure, axes = common.panels(4, words, flags)
    common.image(axes[0], W, "W as it evolved", figure, "from neuron", "to neuron", bar=False)
    common.image(axes[1], W[np.ix_(order, order)], "W in the order of its leading complex eigenvector's phases", figure,
                 "from neuron", "to neuron")
    values, angle = np.linalg.eigvals(W), np.linspace(0, 2 * np.pi, 200)
    radius = abs(values).max()
    ring = radius * np.exp(2j * np.pi * np.arange(N) / N)
    axes[2].plot(np.cos(angle), np.sin(angle), color="grey", lw=.8, label="unit circle")
    axes[2].plot(values.real, values.imag, "o", ms=3, color=common.COLOURS[0], label=f"eigenvalues, radius {radius:.3g}")
    axes[2].plot(ring.real, ring.imag, ".", ms=2, color=common.COLOURS[1], label="a ring's")
    axes[2].set(xlabel="real part", ylabel="imaginary part", aspect="equal")
    axes[2].set_title("eigenvalues", fontsize=9)
    axes[2].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    degrees = [(W != 0).sum(1), (W != 0).sum(0)]
    k, p = np.arange(min(np.max(degrees), N - 1) + 2), (W != 0).mean()
    axes[3].hist(degrees, bins=k - .5, label=["inputs", "outputs"], color=common.COLOURS[:2])
    axes[3].plot(k, [N * math.comb(N, i) * p ** i * (1 - p) ** (N - i) for i in k.tolist()], "k--", lw=.8,
                 label=f"binomial, density {p:.2g}")
    axes[3].set(xlabel="degree", ylabel="neurons")
    axes[3].set_title("degrees", fontsize=9)
    axes[3].legend(fontsize=6)
    return figure


def draw_graph(arrays, flags):
    """Neurons on a circle in the order of `phases`; a ring would be the circle itself."""
    W, _, _ = champion(arrays)
    N, near = len(W), len(W) // 10
    shown = {"the champion of highest fitness": W,
             "a random network of its density": np.random.default_rng(0).permutation(W.ravel()).reshape(N, N)}
    figure, axes = common.panels(2, "who listens to whom: neurons in the order of the leading eigenvector's phases", flags)
    for ax, (title, W) in zip(axes, shown.items()):
        place = phases(W).argsort()
        at = np.exp(2j * np.pi * place / N)
        to, source = np.nonzero(W)
        t = np.linspace(0, 1, 12)
        for i, j in zip(to, source):  # a curve bent towards the centre
            line = (1 - t) ** 2 * at[j] + 1.2 * t * (1 - t) * (at[i] + at[j]) / 2 + t ** 2 * at[i]
            ax.plot(line.real, line.imag, lw=.6, alpha=.5, color=common.COLOURS[int(W[i, j] < 0)])
        ax.plot(at.real, at.imag, "o", ms=4, color="black")
        ahead = ((place[to] - place[source]) % N <= near).mean() if len(to) else math.nan
        ax.set_title(f"{title}: {len(to)} connections,\n{ahead:.0%} go at most {near} places onwards "
                     f"(chance {(near + 1) / N:.0%})", fontsize=8)
        ax.set_axis_off()
        ax.set_aspect("equal")
    for sign, colour in zip(("positive", "negative"), common.COLOURS):
        axes[0].plot([], [], color=colour, label=sign)
    axes[0].legend(fontsize=7, loc="lower left")
    return figure


def draw_capacity(arrays, flags):
    """By delay: champions, networks that nothing selected, and the exact limit of the champion's linear network."""
    if not alike(arrays) or not TASKS[str(arrays["task"][0])].capacity:
        return None
    labels, (W, w_in, r) = labels_of(arrays), champion(arrays)
    figure, axes = common.panels(2, "which delays are remembered?", flags)
    K, N = arrays["by_target"].shape[1], len(W)
    delay, measured = np.arange(1, K + 1), arrays["by_target"]
    for name, colour in colours_of(in_order(labels)).items():
        common.band(axes[0], delay, measured[labels == name].T, name, colour)
    for name, values, style in zip(REFERENCES, arrays["reference_by_target"], ("-", "--", "-.", ":")):
        axes[0].plot(delay, values, color="grey", ls=style, lw=1, label=f"{name}, no search")
    axes[1].plot(delay, measured[r], color=common.COLOURS[0], label=f"champion, measured: {measured[r].sum():.1f}")
    leak = arrays["leak"][r]
    linear, same = (1 - leak) * np.eye(N) + leak * W, arrays["ridge"][r] / arrays["train"][r]
    for noise, style, name in ((same, "--", "with the same ridge"), (0., ":", "no ridge, endless data")):
        known = np.mean([linear_capacity(linear, leak * w, K, noise) for w in w_in], 0)
        axes[1].plot(delay, known, ls=style, color="black", label=f"its linear network, exact, {name}: {known.sum():.1f}")
    for ax in axes:
        ax.set(xlabel="delay k", ylabel="squared correlation with u[t-k]", ylim=(0, 1.03), xlim=(0, min(K, 1.3 * N)))
        common.shelf(ax, 1 / flags.test, f"chance, finite samples: {1 / flags.test:.2g}", side="left")
    axes[0].legend(fontsize=6)
    axes[1].legend(fontsize=6, loc="lower left", bbox_to_anchor=(0, .05))
    return figure


def draw_shares(arrays, flags):
    """Raw search: how much of its gain a random network with the champion's radius has, and what is left without it."""
    if not (arrays["raw"] & (arrays["method"] == "ga")).any():
        return None
    figure, axes = common.panels(2, "raw weights: topology or spectral radius?", flags)
    mine, fixed = arrays["raw"] & (arrays["method"] == "ga"), ~arrays["raw"] & (arrays["method"] == "ga")
    rows = {"first networks, not selected": arrays["unselected"][mine],
            "the same with the champion's radius": arrays["radius_only"][mine],
            "the champion's weights at other places": arrays["permuted"][mine],
            f"champion rescaled to {flags.radius:g}": arrays["rescaled"][mine], "champion": arrays["final"][mine].mean(1),
            f"champion of the search at {flags.radius:g}": arrays["final"][fixed].mean(1)}
    labels = np.concatenate([[name] * len(x) for name, x in rows.items()])
    dots(axes[0], np.concatenate(list(rows.values())), labels, colours_of(list(rows)), f"{unit(flags.task)}, final seeds")
    for method, colour in zip(("ga", "random"), common.COLOURS):
        curve(axes[1], arrays, "best_radius", arrays["raw"] & (arrays["method"] == method), f"raw, {NAMES[method]}", colour)
    common.shelf(axes[1], flags.radius, "what the others are rescaled to")
    axes[1].set(xlabel="network evaluations", ylabel="spectral radius of the best")
    axes[1].legend(fontsize=6)
    return figure


def draw_transfer(arrays, flags):
    """Champions of one task on the others."""
    tasks = [t for t in TASKS if t in arrays["task"]]
    gain = 100 * np.array([[interval(relative(arrays, a, b)) for b in TASKS] for a in tasks])
    figure, axes = common.panels(1, "a champion of one task on another: gain over networks that nothing selected", flags,
                                 size=(6.5, 4.5))
    top = np.abs(np.nan_to_num(gain[..., 0])).max() or 1
    common.image(axes[0], gain[..., 0], "in % of their score, final seeds, mean of the repetitions and 95 % interval", figure,
                 "scored on", "evolved on", (-top, top))
    for i, j in np.ndindex(gain.shape[:2]):
        axes[0].text(j, i, "{:+.1f}\n± {:.1f}".format(*gain[i, j]), ha="center", va="center", fontsize=8,
                     color="white" if abs(gain[i, j, 0]) > .6 * top else "black")
    axes[0].set_xticks(range(len(TASKS)), list(TASKS))
    axes[0].set_yticks(range(len(tasks)), tasks)
    return figure


def draw_score(arrays, flags):
    figure, axes = common.panels(1, f"the networks of {Path(flags.weights).name} on seeds {flags.seeds}", flags, size=(7, 4.5))
    names = np.concatenate([[f"network {m}"] * len(x) for m, x in enumerate(arrays["final"])])
    dots(axes[0], arrays["final"].ravel(), names, colours_of(in_order(names)), unit(flags.task))
    lines_of(axes[0], arrays)
    return figure


# ---- Main -----------------------------------------------------------------------------------------------------------

NOTES, OURS = "research notes on a genetic algorithm for the topology of an ESN", "this project"
METHODS = "ga", "mutation", "random", "er", "dense"


def points_of(flags):
    """The configurations of a study, as dicts of fields."""
    both = [dict(method=m) for m in ("ga", "random")]
    ga, spaces = dict(crossover="row", mutation="mixed", method="ga"), ("ternary", "indegree", "circulant")
    w_in = [dict(evolve_w_in=e, w_in=w) for e, w in ((False, "redrawn"), (False, "fixed"), (True, "redrawn"))]
    return {
        "evolve": [dict(method=m) for m in METHODS],
        "seed-problem": [dict(fitness_seeds=f"0..{n - 1}", steps=max(1, flags.steps * 4 // n)) for n in (1, 2, 4, 8)],
        "spaces": [dict(genotype=g) | m for g in spaces for m in both],
        "operators": [ga | dict(crossover=c) for c in ("row", "column", "block", "uniform", "none")] + [
            ga | dict(mutation=m) for m in ("toggle", "flip", "rewire")] + [ga | dict(method="shuffled")],
        "radius": [dict(raw=raw) | m for raw in (False, True) for m in both],
        "w-in": [w | m for w in w_in for m in both],
        "continuous": [dict(genotype=g) | m for g in ("ternary", "continuous", "mask") for m in both],
        "tasks": [dict(task=task) for task in TASKS],
    }.get(flags.study, [])


SPACE = ("genotype", "density", "inputs", "evolve_w_in", "w_in", "raw", "radius", "leak", "ridge", "seed", "seeds", *DRAWN)


def champions(runs, final, metrics, known):
    """What a group of runs leaves, [R, ..] each. known: scores of networks that nothing selected, by what they depend on."""
    rows = []
    for r, run in enumerate(runs):
        winner = best_of(common.run_of(final["params"], r))
        (W, own, radius), sets = networks(winner, run), {which: seeds_of(run, which) for which in SETS}
        values, wiring = on_seeds(W, own, run, sets["seeds"])[0], permuted(W[0], run)
        w_in, bias = drawn_weights(run, sets["seeds"])
        space = run.method * run.gaussian, *(getattr(run, f) for f in SPACE)
        if space not in known:
            known[space] = final_score(*unselected(run)[:2], run).mean()
        rows.append({"W": W[0], "W_in": w_in if own is None else own.expand_as(w_in), "bias": bias, "radius_before": radius[0],
                     "final": score(values, run), "by_target": values.mean(0), "unselected": known[space],
                     "permuted": final_score(wiring, None if own is None else own.expand(len(wiring), -1), run).mean(),
                     "evaluations": len(metrics["fitness"]) * run.population * len(sets["fitness_seeds"]),
                     "set_fitness": np.array(sets["fitness_seeds"]), "set_held_out": np.array(sets["held_out_seeds"])})
    return common.stacked(rows) | {k: metrics[k].swapaxes(0, 1) for k in ("fitness", "failed", "acyclic")} | {
        k: metrics[f"eval_{k}"].T for k in ("held_out", "best_radius", "mean_density")}


def search(flags, folder):
    """(runs, their arrays) of every configuration of the study."""
    groups, parts, done, known = common.groups_of_runs(flags), [], [], {}
    for i, runs in enumerate(groups):
        sub, sign = folder.sub(i, len(groups)), runs[0].better
        final, metrics, snapshots = train(runs, sub)
        found = champions(runs, final, metrics, known)
        ends = {"fitness": best(found["fitness"][:, -1], np.full(len(runs), sign)), "final": found["final"].mean(1),
                "evaluations": found["evaluations"]} | {k: found[k][:, -1] for k in ("held_out", "mean_density", "best_radius")}
        found["loss"] = loss_of(ends["final"], runs[0])
        sub.result(runs, metrics, {"loss": found["loss"]} | ends, snapshots)
        parts.append(found | {f: np.array([getattr(run, f) for run in runs]) for f in COLUMNS})
        done += runs
        if folder.interrupted:
            break
    return done, {k: common.padded([p[k] for p in parts]) for k in parts[0]}


def compute_search(flags, folder):
    """With one entry a run (a repetition of one configuration): its flags; fitness [R, G, P] of every generation (mean over
    its fitness seeds of capacity or NRMSE), failed, acyclic [R, G]: networks whose ridge regression failed, or of radius 0,
    among those scored anew; of the generation's best held_out [R, G] and best_radius [R, G], before rescaling; mean_density
    [R, G] of the population; of the champion, the best of the last generation: final [R, S] on the final seeds, by_target
    [R, K]: capacity by delay or NRMSE, W [R, N, N], W_in, bias [R, S, N], radius_before [R]; mean final scores [R] permuted: of
    its weights at other places, unselected: of networks of its space that nothing selected; set_fitness, set_held_out
    [R, ..]: its seeds; evaluations [R]: networks times seeds, elites counted though their scores are known; loss [R]: what the
    final score leaves of N, or the NRMSE. And what `references` names, for the first run."""
    runs, arrays = search(flags, folder)
    return arrays | references(runs[0])


def champion_of(arrays, r):
    """W [1, N, N] of the champion of run r, as `evaluate` takes it."""
    N = arrays["n_units"][r]
    return torch.from_numpy(arrays["W"][r, :N, :N]).float()[None]


def compute_radius(flags, folder):
    """`compute_search`, and as means over the final seeds [R]: rescaled: the champion at --radius; radius_only: networks that
    nothing selected at the champion's radius."""
    runs, arrays = search(flags, folder)
    more = {"rescaled": [], "radius_only": []}
    for r, run in enumerate(runs):
        W, (any_W, _, any_radius) = champion_of(arrays, r), unselected(run)
        radius = spectral_radius(W)
        alone, other = rescaled(any_W, any_radius, radius), rescaled(W, radius, run.radius)
        more["radius_only"].append(final_score(alone, None, run).mean().item() if run.raw else arrays["unselected"][r])
        more["rescaled"].append(final_score(other, None, run).item() if run.raw else arrays["final"][r].mean())
    return arrays | references(runs[0]) | {k: np.array(v) for k, v in more.items()}


def compute_tasks(flags, folder):
    """`compute_search`, and mean scores on the final seeds of every task [R, 4]: transfer: of the champion,
    transfer_unselected: of networks that nothing selected."""
    runs, arrays = search(flags, folder)
    on = lambda W, run: [final_score(W, None, replace(run, task=task)).mean().item() for task in TASKS]
    space = lambda run: (run.method * run.gaussian, *(getattr(run, f) for f in SPACE if f != "task"))
    first = {space(run): run for run in runs}  # the same networks whatever task selected
    known = {key: on(unselected(run)[0], run) for key, run in first.items()}
    return arrays | references(runs[0]) | {
        "transfer": np.array([on(champion_of(arrays, r), run) for r, run in enumerate(runs)]),
        "transfer_unselected": np.array([known[space(run)] for run in runs])}


def compute_score(flags, folder):
    """final [M, S] and by_target [M, K] of the networks W [M, N, N] of a file, as they are, on the final seeds, W_in [M, S, N];
    spectral_radius [M]; loss [M]; what `references` names."""
    W, own = weights_of(flags)
    flags = replace(flags, n_units=W.shape[1])
    seeds = seeds_of(flags, "seeds")
    values, radius = on_seeds(W, own, flags, seeds), spectral_radius(W)
    if own is None:
        own = drawn_weights(flags, seeds)[0].expand(len(W), -1, -1)
    final = score(values, flags)
    loss = loss_of(final.mean(1), flags)
    ends = {"loss": loss, "final": final.mean(1), "std": final.std(1, correction=0), "spectral_radius": radius}
    folder.result([flags] * len(W), {"loss": loss[None]}, ends | {"network": np.arange(len(W))})
    return references(flags) | {"final": final, "by_target": values.mean(1), "W": W, "W_in": own, "spectral_radius": radius,
                                "loss": loss}


def finite_numbers(x):
    return x.dtype.kind in "fiu" and bool((np.abs(x) < 1e30).all())


def weights_of(flags, say=print):
    """W [M, N, N] and W_in [M, S, N] or None of the file --weights. A W_in for every seed counts only where it belongs to the
    task and the seeds that are asked for; a file that names another leak, ridge, .. must be contradicted by hand."""
    name, seeds = flags.weights, np.array(seeds_of(flags, "seeds"))
    arrays = common.read_npz(name, name)
    W, w_in = arrays.get("W", np.zeros(0)), arrays.get("W_in")
    if W.ndim not in (2, 3) or W.shape[-1] != W.shape[-2] or W.shape[-1] < 2 or not W.size or not finite_numbers(W):
        raise common.Stop(f"{name}: W must be finite numbers [N, N] or [M, N, N], N at least 2")
    W = W.reshape(-1, *W.shape[-2:]).astype(np.float32)
    (M, N, _), S = W.shape, len(seeds)
    for field in ("leak", "bias_scaling", "ridge", "washout", "train", "test"):
        made = np.unique(arrays.get(field, getattr(flags, field)))
        if field not in getattr(flags, "given", set()) and (len(made) != 1 or made[0] != getattr(flags, field)):
            made = ", ".join(map(str, made[:5]))
            raise common.Stop(f"{name} was made with --{field.replace('_', '-')} {made}: give that flag")
    if w_in is not None and not (finite_numbers(w_in) and (w_in.shape in ((N,), (M, N)) or w_in.ndim == 3 and (
            w_in.shape[0], w_in.shape[2]) == (M, N) and w_in.size)):
        raise common.Stop(f"{name}: W_in must be finite numbers [{N}], [{M}, {N}] or [{M}, seeds, {N}]")
    if w_in is not None and w_in.ndim == 3 and (w_in == w_in[:, :1]).all():
        w_in = w_in[:, 0]  # the same for every seed
    if w_in is not None and w_in.ndim == 3:
        same = np.array_equal(arrays["set_final"], seeds) if "set_final" in arrays else w_in.shape[1] == S
        if not same or set(np.unique(arrays.get("task", flags.task))) != {flags.task}:
            say(f"{name}: its W_in belong to other seeds or another task; here they are drawn from {flags.seeds}")
            w_in = None
    if w_in is not None and w_in.ndim < 3:
        w_in = np.broadcast_to(w_in.reshape(-1, 1, N), (M, S, N))
    return torch.from_numpy(W), None if w_in is None else torch.from_numpy(w_in.astype(np.float32))


def gain(arrays, key, a, b):
    """[n] by repetition: how much better runs with the settings a are than those with b."""
    x = {"final": lambda: arrays["final"].mean(1), "luck": lambda: luck(arrays)}.get(key, lambda: arrays[key])()
    sign = direction(arrays)[common.pick(arrays, **a)][0] if key != "luck" else 1.
    return sign * (by_seed(arrays, x, **a) - by_seed(arrays, x, **b))


def rise(arrays, key, **settings):
    """[n] by repetition: how much better the best of the last generation is than that of the first."""
    x = best(arrays["fitness"], direction(arrays)) if key == "fitness" else arrays["held_out"]
    return by_seed(arrays, direction(arrays) * (last({"x": x}, "x") - x[:, 0]), **settings)


def wired(arrays, **settings):
    """[n] final score of the champions minus that of their weights at other places."""
    return by_seed(arrays, arrays["final"].mean(1) - arrays["permuted"], **settings)


def relative(arrays, task, scored_on):
    """[n] gain of the champions of a task on another one, as a share of the score of networks that nothing selected."""
    j, mine = list(TASKS).index(scored_on), common.pick(arrays, task=task)
    plain = arrays["transfer_unselected"][mine, j]
    return (1 if TASKS[scored_on].capacity else -1) * (arrays["transfer"][mine, j] - plain) / np.abs(plain)


def decided(say):
    """tell(id, statement, source, expected, x): a claim that the mean of x, one number a repetition, is above 0. It holds, or
    is false, where its 95 % interval (Student's t) lies on one side of 0; open with fewer than five repetitions. All
    repetitions share their final seeds; of sixty such claims two or three come out wrong by chance."""
    def tell(id, statement, source, expected, x):
        x = x[np.isfinite(x)]
        mean, half = interval(x)
        measured = f"{mean:+.3g} [{mean - half:+.3g}, {mean + half:+.3g}], mean and 95 % interval of {len(x)} repetitions"
        decided = len(x) >= 5 and abs(mean) > half
        say(id, statement, source, f"{expected}: above 0", measured, bool(mean > 0) if decided else None)
    return tell


def always(arrays, say, flags):
    """Claims of every search."""
    counts = np.unique(arrays["evaluations"])
    say("equal-evaluations", "all searches saw as many evaluations (networks times seeds, elites counted)", OURS, "one number",
        f"{', '.join(map(str, counts))}; {int(np.nansum(arrays['failed']))} networks failed", len(counts) == 1, True)
    bias = arrays["by_target"].shape[1] / arrays["test"]
    excess = (arrays["final"].mean(1) - arrays["n_units"] - bias)[(direction(arrays) > 0) & np.isfinite(arrays["loss"])]
    if len(excess):
        say("at-most-n", "no capacity exceeds N (Jaeger 2001), but for the bias of finite samples, delays / test steps at most",
            OURS, "at most 0", f"largest excess {excess.max():.3g}", bool(excess.max() <= 1e-9), True)


judged = functools.partial(common.judged, always=always, columns=COLUMNS)
TOPOLOGY = f'{NOTES}: "genetic algorithm to find the topology of W in an ESN"'


@judged
def judge_evolve(arrays, say, flags):
    tell, ga = decided(say), dict(method="ga")
    for method, words in (("random", "random search in the same space"), ("mutation", "mutation of the best alone (1+lambda)"),
                          ("er", "the best of as many random sparse networks"),
                          ("dense", "the best of as many random dense networks")):
        tell(f"beats-{method}", f"the genetic search finds better networks than {words}", TOPOLOGY, "gain on final seeds",
             gain(arrays, "final", ga, dict(method=method)))
    final = by_seed(arrays, arrays["final"].mean(1), **ga)
    for i, words in enumerate(("a ring (simple cycle reservoir)", "a chain (delay line reservoir)")):
        tell(f"beats-{REFERENCES[i]}", f"the genetic search finds better networks than {words}, which needs no search",
             TOPOLOGY,
             "gain on final seeds", flags.better * (final - arrays["reference"][i].mean()))
    tell("beats-unselected", "the genetic search finds better networks than its space has on average", TOPOLOGY,
         "gain on final seeds", flags.better * (final - by_seed(arrays, "unselected", **ga)))
    for method in ("ga", "random"):
        tell(f"wiring-{method}",
             f"the champion of {'the genetic' if method == 'ga' else 'random'} search is its wiring: with the "
             "same weights at random other places (and the same radius) it is worse", OURS, "loss on final seeds",
             flags.better * wired(arrays, method=method))
    held, fitness = rise(arrays, "held_out", **ga), rise(arrays, "fitness", **ga)
    tell("gain-is-real", "the search improves what other seeds see", TOPOLOGY, "rise of the best on held-out seeds", held)
    tell("mostly-luck", "more than half of the rise in fitness is luck: other seeds do not see it", OURS,
         "half of the rise in fitness minus the rise on held-out seeds", fitness / 2 - held)


@judged
def judge_seeds(arrays, say, flags):
    tell, of = decided(say), lambda n: dict(fitness_seeds=f"0..{n - 1}")
    source = f'{NOTES}: "score not stable: seed problem"'
    spread = by_seed(arrays, arrays["final"].std(1), **of(1))
    tell("not-stable", "the score of one network varies more between seeds than all that the search gains", source,
         "standard deviation over final seeds minus rise on held-out seeds, one fitness seed",
         spread - rise(arrays, "held_out", **of(1)))
    for n in (1, 8):
        tell(f"luck-{n}", f"with {n} fitness seed{'s' * (n > 1)} more than half of the rise in fitness is luck", source,
             "half of the rise in fitness minus the rise on held-out seeds",
             rise(arrays, "fitness", **of(n)) / 2 - rise(arrays, "held_out", **of(n)))
    tell("more-seeds-less-luck", "with more seeds the champion's fitness promises less that it does not keep", source,
         "luck with 1 seed minus luck with 8", gain(arrays, "luck", of(1), of(8)))
    for n in (2, 4, 8):
        tell(f"seeds-{n}-better", f"{n} fitness seeds find better networks than one, with as many evaluations", source,
             "gain on final seeds", gain(arrays, "final", of(n), of(1)))


@judged
def judge_spaces(arrays, say, flags):
    tell, of = decided(say), lambda g, m="ga": dict(genotype=g, method=m)
    source = f'{NOTES}: "first experiment: reducing the search space"'
    for g, words in (("indegree", f"{flags.inputs} inputs a neuron"), ("circulant", "circulant matrices")):
        tell(f"{g}-better", f"reducing the space to {words} finds better networks", source, "gain on final seeds",
             gain(arrays, "final", of(g), of("ternary")))
        tell(f"{g}-space-alone", f"random search among {words} is better than evolution in the full space: credit the space",
             OURS,
             "gain on final seeds", gain(arrays, "final", of(g, "random"), of("ternary")))
        tell(f"{g}-search", f"among {words} evolution is better than random search", source, "gain on final seeds",
             gain(arrays, "final", of(g), of(g, "random")))


@judged
def judge_operators(arrays, say, flags):
    tell, source = decided(say), f'{NOTES}: "choice of the mutation and cross-over functions"'
    own = dict(crossover="row", mutation="mixed", method="ga")
    for c in ("none", "column", "block", "uniform"):
        tell(f"row-beats-{c}", f"exchanging rows is better than {'no cross-over' if c == 'none' else f'{c} cross-over'}",
             source,
             "gain on final seeds", gain(arrays, "final", own, own | dict(crossover=c)))
    for m in ("toggle", "flip", "rewire"):
        tell(f"mixed-beats-{m}", f"mixed edits are better than {m} alone", source, "gain on final seeds",
             gain(arrays, "final", own, own | dict(mutation=m)))
    shuffled = rise(arrays, "held_out", **own | dict(method="shuffled"))
    tell("selection-matters", "selection is what gains: on shuffled scores the best rises less on held-out seeds", OURS,
         "rise with selection minus rise without", rise(arrays, "held_out", **own) - shuffled)
    tell("control-gains", "the control (shuffled scores) gains as well", OURS, "rise on held-out seeds without selection",
         shuffled)


@judged
def judge_radius(arrays, say, flags):
    tell, raw, fixed = decided(say), dict(raw=True, method="ga"), dict(raw=False, method="ga")
    source = f'{NOTES}: "spectral radius depends on the matrix: rescale? we want to test the topology, it would be a pity if ' \
             'a better result came from a better spectral radius"'
    tell("raw-better", "raw weights find better networks than rescaled ones", source, "gain on final seeds",
         gain(arrays, "final", raw, fixed))
    of = lambda key: by_seed(arrays, arrays[key].mean(1) if key == "final" else arrays[key], **raw)
    tell("radius-helps", "the champion of a raw search is worse when it is rescaled: part of its result is spectral radius",
         source,
         "final score minus that after rescaling", flags.better * (of("final") - of("rescaled")))
    total, radius = flags.better * (of("final") - of("unselected")), flags.better * (of("radius_only") - of("unselected"))
    tell("radius-most",
         "more than half of a raw search's gain is spectral radius: unselected networks with the champion's radius "
         "have it as well", source, "their gain minus half of the champion's", radius - total / 2)
    for name, settings in (("fixed", fixed), ("raw", raw)):
        tell(f"wiring-{name}",
             f"the champion of the {'rescaled' if name == 'fixed' else 'raw'} search is topology: with the same "
             "weights at random other places and the same radius it is worse", source, "loss on final seeds",
             flags.better * wired(arrays, **settings))


@judged
def judge_w_in(arrays, say, flags):
    tell, source = decided(say), f'{NOTES}: "criticism and possible improvements: W_in?"'
    of = lambda evolved, w_in, m="ga": dict(evolve_w_in=evolved, w_in=w_in, method=m)
    redrawn, fixed, evolved = of(False, "redrawn"), of(False, "fixed"), of(True, "redrawn")
    tell("fixed-better", "a W that evolves for one fixed W_in is better (with it) than one that must serve every W_in", source,
         "gain on final seeds", gain(arrays, "final", fixed, redrawn))
    tell("evolved-better", "evolving W_in as well is better than one fixed W_in", source, "gain on final seeds",
         gain(arrays, "final", evolved, fixed))
    tell("evolved-beats-random", "with W_in in the genotype evolution is better than random search", source,
         "gain on final seeds",
         gain(arrays, "final", evolved, evolved | dict(method="random")))


@judged
def judge_continuous(arrays, say, flags):
    tell, source = decided(say), f'{NOTES}: "continuous values [-1, 1]"'
    of = lambda g, m="ga": dict(genotype=g, method=m)
    for m, words in (("ga", "evolution finds"), ("random", "random search finds")):
        tell(f"continuous-better-{m}", f"{words} better networks among real weights than among signs", source,
             "gain on final seeds",
             gain(arrays, "final", of("continuous", m), of("ternary", m)))
    tell("signs-matter", "networks with both signs are better than those with positive weights alone", OURS,
         "gain on final seeds",
         gain(arrays, "final", of("ternary"), of("mask")))


@judged
def judge_tasks(arrays, say, flags):
    tell = decided(say)
    for a in TASKS:
        for b in TASKS:
            words = "the task that it was selected for" if a == b else b
            tell(f"{a}-on-{b}", f"a champion of {a} is better than unselected networks on {words}", OURS, "gain in their score",
                 relative(arrays, a, b))


SEARCH = {"configurations": draw_configurations, "capacity": draw_capacity}
STUDIES = {
    "evolve": (compute_search, judge_evolve, {"evolution": draw_evolution, "champion": draw_champion, "graph": draw_graph,
                                              "capacity": draw_capacity}),
    "seed-problem": (compute_search, judge_seeds, SEARCH),
    "spaces": (compute_search, judge_spaces, SEARCH | {"champion": draw_champion}),
    "operators": (compute_search, judge_operators, SEARCH),
    "radius": (compute_radius, judge_radius, SEARCH | {"shares": draw_shares}),
    "w-in": (compute_search, judge_w_in, SEARCH),
    "continuous": (compute_search, judge_continuous, SEARCH),
    "tasks": (compute_tasks, judge_tasks, {"transfer": draw_transfer, "configurations": draw_configurations}),
    "score": (compute_score, lambda arrays, flags: [], {"scores": draw_score}),
}


def main(argv=None):
    return common.main(Flags, STUDIES, argv)


if __name__ == "__main__":
    raise SystemExit(main())
