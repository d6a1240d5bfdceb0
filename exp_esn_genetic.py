"""Does a genetic algorithm find a better reservoir, or only a luckier seed or a better spectral radius?

Law: an echo state network x[t] = (1 - a) x[t-1] + a tanh(W x[t-1] + W_in u[t]), read by ridge
regression. Tasks: memory (recall u[t-k]; capacity: sum of squared correlations, at most N), NARMA10,
Mackey-Glass, Lorenz (NRMSE). A seed draws W_in and the input. Fitness seeds select; held-out seeds are
read in every generation, final ones once, and neither selects anything. W acts as W x: a row holds the
incoming weights of a neuron.

    python exp_esn_genetic.py                     2.5 min: is evolving W better than as many random ones?
    python exp_esn_genetic.py --study radius      2.5 min: how much of a gain is spectral radius?
    python exp_esn_genetic.py --study score --weights runs/esn_genetic/evolve/arrays.npz --task narma10

Claims quote research notes on a genetic algorithm for W (French). Capacity: Jaeger 2001; ring, chain:
Rodan & Tino 2011; NARMA10: Atiya & Parlos 2000; Mackey & Glass 1977; Lorenz 1963."""
import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from torch import nan
from tqdm import tqdm

import common
from common import flag

# ==== Flags ==========================================================================================
KINDS = {  # edits that stay in the space; "mixed" takes any of them
    "mask": ("toggle", "rewire"), "ternary": ("toggle", "flip", "rewire"),
    "continuous": ("toggle", "gauss", "rewire"), "gaussian": ("toggle", "rewire"),
    "circulant": ("toggle", "flip", "rewire"), "indegree": ("flip", "rewire")}


@dataclass
class Flags(common.Flags):
    task: Literal["memory", "narma10", "mackey-glass", "lorenz"] = flag("memory", "what it must do")
    method: Literal["ga", "mutation", "random", "shuffled"] = flag("ga", "search: genetic; mutation of "
        "the best alone (1+lambda); random; genetic on shuffled scores")
    genotype: Literal["mask", "ternary", "continuous", "gaussian", "circulant", "indegree"] = flag(
        "ternary", "weights in {0, 1}, {-1, 0, 1}, [-1, 1] or normal; N ternary genes, every row the "
        "same but turned; --inputs signed inputs a neuron")
    n_units: int = flag(50, "N, neurons", 2)
    population: int = flag(20, "P, networks a generation", 2)
    steps: int = flag(30, "generations", 1)
    elites: int = flag(2, "best networks that are kept", 1)
    tournament: int = flag(3, "networks of which the best becomes a parent", 1)
    crossover: Literal["row", "column", "block", "uniform", "none"] = flag("row", "what a child may "
        "take from its second parent: rows (incoming weights), columns, a block, single genes, nothing")
    mutation: Literal["mixed", "toggle", "flip", "rewire", "gauss"] = flag("mixed", "kind of edit")
    edits: int = flag(3, "edits a child, one more or one less (0: none)", 0)
    sigma: float = flag(.3, "gauss: standard deviation of an edit", 0)
    density: float = flag(.1, "share of weights that are not 0 at the start", 0, 1)
    inputs: int = flag(5, "indegree: inputs a neuron", 1)
    w_in: Literal["redrawn", "fixed", "evolved"] = flag("redrawn", "W_in is drawn for every seed, once "
        "a repetition, or is a column of the genotype")
    fitness_seeds: int = flag(4, "seeds that select", 1, 10_000)
    held_out_seeds: int = flag(8, "seeds that are read in every generation", 1, 10_000)
    final_seeds: int = flag(32, "seeds that judge, the same for all", 1, 10_000)
    radius: float = flag(.9, "spectral radius that every W is rescaled to (0: all weights vanish)", 0)
    raw: bool = flag(False, "no rescaling: genes times --radius / sqrt(N --density)")
    leak: float = flag(1., "a, share of a state that is renewed", 0, 1)
    input_scaling: float = flag(0., "largest |W_in|, which is uniform (0: the task's own)", 0)
    ridge: float = flag(1e-8, "penalty of squared readout weights, added to a sum over --fit", 0)
    washout: int = flag(200, "time steps before the readout is fitted", 0)
    fit: int = flag(1000, "time steps that it is fitted to", 2)
    test: int = flag(1000, "time steps that it is scored on", 2)
    lag: int = flag(0, "memory: longest delay (0: 2 N); forecasts: samples ahead (0: the task's own)", 0)
    weights: str = flag("", "score: npz file with W [N, N] or [M, N, N], and perhaps W_in [M, N]")

    def check(self):
        if self.task not in self.room.tasks:
            raise common.Stop(f"--study {self.study} knows --task {', '.join(self.room.tasks)} alone")
        if self.elites >= self.population or self.tournament > self.population:
            raise common.Stop("--elites must be below, --tournament at most --population")
        if self.inputs > self.n_units and self.genotype == "indegree":
            raise common.Stop("--inputs must be at most --n-units")
        if self.crossover not in ("row", "none") and self.genotype in ("indegree", "circulant"):
            raise common.Stop(f"--genotype {self.genotype} has --crossover row or none")
        if self.mutation not in ("mixed", *KINDS[self.genotype]):
            raise common.Stop(f"--genotype {self.genotype} has no --mutation {self.mutation}")

    @property
    def better(self):
        """The sign of a better score: a capacity is large, an error small."""
        return 1 if self.task == "memory" else -1

# ==== Data law =======================================================================================
def noise(seeds, T, low, high):
    """Independent uniform numbers [S, T] in float64, each row from its own seed."""
    draw = lambda seed: torch.rand(T, generator=common.generator(seed, "data"), dtype=torch.float64)
    return low + (high - low) * torch.stack([draw(seed) for seed in seeds])


@lru_cache(16)
def memory(seeds, T, lag):
    """u ~ U[-.8, .8]; targets u[t-k], k = 1 .. lag."""
    u = noise(seeds, T + lag, -.8, .8).float().double()  # what the network sees, in float32
    return u[:, lag:], u.unfold(1, lag + 1, 1)[..., :-1].flip(2)


def seeds_of(flags, which):
    """The seeds of a set, as names: of the final one the same for all, else of the repetition."""
    own = "" if which == "final" else f"{flags.seed}/"
    return tuple(f"{which}/{own}{i}" for i in range(getattr(flags, f"{which}_seeds")))


def data(flags, seeds):
    """Of every seed: W_in [S, N] in float32, u [S, T] and targets y [S, T, K] in float64."""
    law, _, lag = flags.room.tasks[flags.task]
    T = flags.washout + flags.fit + flags.test
    return w_in_of(flags, seeds), *law(seeds, T, flags.lag or lag or 2 * flags.n_units)


def w_in_of(flags, seeds):
    """Uniform W_in [S, N] of seeds."""
    draws = [torch.rand(flags.n_units, generator=common.generator(seed, "w_in")) for seed in seeds]
    return (2 * torch.stack(draws) - 1) * size_of_w_in(flags)


def size_of_w_in(flags):
    """Largest |W_in|."""
    return flags.input_scaling or flags.room.tasks[flags.task][1]

# ==== Model ==========================================================================================
def first_genes(flags, count, generator):
    """Random genotypes [count, N, columns] of the space; a column of W_in, the last, is full."""
    N = flags.n_units
    shape = count, N, (1 if flags.genotype == "circulant" else N) + (flags.w_in == "evolved")
    there = torch.rand(shape, generator=generator) < flags.density
    if flags.genotype == "indegree":
        chosen = torch.rand(count, N, N, generator=generator).topk(flags.inputs).indices
        there = torch.zeros(shape).scatter_(2, chosen, 1) > 0
    if flags.w_in == "evolved":
        there[..., -1] = True
    return new_values(flags, shape, generator) * there


def new_values(flags, shape, generator):
    """Random weights of the genotype's alphabet that are not 0."""
    if flags.genotype == "gaussian":
        return torch.randn(shape, generator=generator)
    value = 2 * torch.rand(shape, generator=generator) - 1
    signs = torch.where(value < 0, -1., 1.)
    return {"mask": torch.ones(shape), "continuous": value}.get(flags.genotype, signs)


def spectral_radius(W):
    """Largest |eigenvalue| of W [P, N, N] as |W^m|^(1/m) with m = 2^20, scaled by a power of 2 after
    each squaring; relative error up to 1e-4; exactly 0 without cycles, or where powers underflow."""
    power, log2 = W.double(), torch.zeros(len(W)).double()
    largest = lambda W: torch.linalg.vector_norm(W, math.inf, (-2, -1))
    for k in range(21):
        power = power @ power if k else power
        shift = torch.frexp(largest(power)).exponent.double()
        power, log2 = power * torch.exp2(-shift)[:, None, None], log2 + shift * .5 ** k
    root = torch.exp2(log2 + torch.log2(largest(power)) * .5 ** 20)
    return torch.where(largest(power) == 0, 0., root)


def rescaled(W, radius):
    """W [P, N, N] with another spectral radius; where it is 0, W times `radius`."""
    own = spectral_radius(W)
    return (W * (radius / torch.where(own > 0, own, 1.))[:, None, None]).float()


def networks(genes, flags):
    """W [P, N, N] and W_in [P, N] of genotypes; NaN where each seed draws its own."""
    N, W, w_in = flags.n_units, genes, PER_SEED
    if flags.w_in == "fixed":
        w_in = w_in_of(flags, [flags.seed])
    if flags.w_in == "evolved":
        alike = 1. if flags.genotype == "continuous" else 3 ** -.5  # as strong as uniform numbers
        W, w_in = genes[..., :-1], genes[..., -1] * size_of_w_in(flags) * alike
    if flags.genotype == "circulant":
        W = W[:, (torch.arange(N)[:, None] - torch.arange(N)) % N, 0]  # W[i, j] = gene i - j
    raw = W * flags.radius / math.sqrt(max(1., N * flags.density))
    return raw if flags.raw else rescaled(W, flags.radius), w_in.expand(len(W), N)


def advance(y, A, drive, leak, out):
    """Time steps out [n, c, S, N] of y = (x + 1) / 2 from y [c, S, N], which becomes the last one.
    tanh z = 2 sigmoid(2 z) - 1, and sigmoid is four times faster; so A = 4 W' and drive = 2 W_in u -
    2 W 1 [n, c, S, N] give y[t] = (1 - a) y[t-1] + a sigmoid(y[t-1] A + drive[t])."""
    old = y
    for force, new in zip(drive.unbind(), out.unbind()):
        torch.baddbmm(force, old, A, out=new).sigmoid_()
        old = new if leak == 1 else new.mul_(leak).add_(old, alpha=1 - leak)
    y.copy_(old)


TOGETHER = 2 ** 16  # weights that share a kernel on a CPU: they fit its second-level cache (measured)
PER_SEED = torch.tensor([[nan]])  # a W_in of its own for no network
BLOCK = 200         # time steps at most between two additions to the Gram matrix


@torch.no_grad()
def evaluate(W, w_in, u, y, flags):
    """Networks W [P, N, N] with W_in [S, N] or [P, S, N], inputs u [S, T], targets y [S, T, K]: by
    target the squared correlation (memory) or NRMSE on the last --test steps, [P, S, K] in float64, NaN
    where the ridge regression failed."""
    at, (P, N, _), S = common.device(flags), W.shape, len(u)
    few = TOGETHER // N ** 2 if at.type == "cpu" else 2 ** 28 // (S * BLOCK * (N + y.shape[2]))
    parts = zip(*(x.split(max(1, few)) for x in (W.contiguous(), w_in.expand(P, S, N))))
    u, y = u.to(at), y.to(at)
    return torch.cat([read_out(part.to(at), own.to(at), u, y, flags).cpu() for part, own in parts])


def read_out(W, w_in, u, y, flags):
    """`evaluate` of networks that fit into one kernel. Readout: minimise sum (y - b - w x)^2 +
    ridge |w|^2, b free, on centred Gram matrices in float64, which grow with time block by block."""
    (c, N, _), (S, T, K), at = W.shape, y.shape, W.device
    double, fit, end = dict(dtype=torch.float64, device=at), flags.washout, flags.washout + flags.fit
    block = max(1, min(BLOCK, 2 * TOGETHER // (c * N))) if at.type == "cpu" else BLOCK
    A, shift, drive_of = (4 * W.transpose(1, 2)).contiguous(), -2 * W.sum(2)[:, None], 2 * u.T.float()
    state, x = torch.full((c, S, N), .5, device=at), torch.empty(block, c, N, **double)
    drive, out = torch.empty(2, block, c, S, N, device=at)  # fresh memory costs as much as arithmetic
    targets = torch.cat([torch.ones(S, T, 1, **double), y], 2).transpose(1, 2)  # [S, 1 + K, T]
    gram, crossed = torch.zeros(S, c, N, N, **double), torch.zeros(S, 1 + K, c * N, **double)
    sums, readout = torch.zeros(3, S, c, K, **double), None
    whole = lambda *_: advance(state, A, drive, flags.leak, out)
    if at.type == "cuda" and flags.compile != "off":
        whole = common.captured(whole, whole)
        state.fill_(.5)
    cuts = sorted({*range(0, fit, block), *range(fit, end, block), *range(end, T, block), T})
    for a, b in itertools.pairwise(cuts):
        n = b - a
        torch.mul(drive_of[a:b, None, :, None], w_in, out=drive[:n]).add_(shift)
        whole() if n == block else advance(state, A, drive[:n], flags.leak, out[:n])
        if b > end and readout is None:
            seen = crossed.view(S, 1 + K, c, N).permute(0, 2, 3, 1)
            readout, intercept = ridge(gram, seen, y[:, fit:end], flags)
        for s in range(S if b > fit else 0):  # seed by seed: what is multiplied stays in the cache
            now = x[:n].copy_(out[:n, :, s]).sub_(.5)  # x / 2
            if b <= end:
                gram[s].baddbmm_(now.permute(1, 2, 0), now.transpose(0, 1))
                crossed[s].addmm_(targets[s, :, a:b], now.view(n, c * N))
            else:
                p = torch.baddbmm(intercept[s], now.transpose(0, 1), readout[s])
                sums[:, s] += torch.stack([p.sum(1), (p * p).sum(1), (p * y[s, a:b]).sum(1)])
    return scores_of(sums / flags.test, y[:, end:], flags)


def ridge(gram, crossed, y, flags):
    """Readout [S, c, N, K] and intercept [S, c, 1, K] of x / 2, from its sums of products [S, c, N, N],
    with 1 and y [S, c, N, 1 + K], and targets y [S, n, K]; NaN where there is no Cholesky factor."""
    n, mean, level = y.shape[1], crossed[..., :1] / y.shape[1], y.mean(1)[:, None, None]
    centred = gram - n * mean * mean.transpose(2, 3)
    centred.diagonal(dim1=2, dim2=3).add_(flags.ridge / 4)
    factor, info = torch.linalg.cholesky_ex(centred)
    readout = torch.cholesky_solve(crossed[..., 1:] - n * mean * level, factor)
    readout[info > 0] = nan
    return readout, level - (readout * mean).sum(2, keepdim=True)


def scores_of(moments, y, flags):
    """[c, S, K] from the means over time of the readouts' p, p^2 and p y [3, S, c, K] and targets y
    [S, T, K]: squared correlation, 0 where p is constant (memory), or sqrt(mean (p - y)^2) / std y."""
    p, pp, py = moments.transpose(1, 2)
    level, power = y.mean(1), (y * y).mean(1)
    spread, moving = power - level ** 2, pp - p * p
    if flags.task != "memory":
        return ((pp - 2 * py + power).clamp(min=0) / spread).sqrt()
    r2 = (py - p * level) ** 2 / (moving * spread)
    return torch.where(moving <= 1e-20 * spread, 0., r2).where(pp.isfinite(), nan)


def on_seeds(W, own, flags, which):
    """Values [P, S, K] of networks with W_in of their own [P, N] (NaN: that of each seed) on a set of
    seeds. Their sum over targets K is a network's score."""
    seeds, values = seeds_of(flags, which), []
    for a in range(0, len(seeds), 32):  # a bound of memory
        w_in, *law = data(flags, seeds[a:a + 32])
        values.append(evaluate(W, torch.where(own.isnan()[:, None], w_in, own[:, None]), *law, flags))
    return torch.cat(values, 1)

# ==== Train ==========================================================================================
def choose(mask, generator):
    """A random True entry of each row of mask [M, E], and whether there is one."""
    return (torch.rand(mask.shape, generator=generator) * mask).argmax(1), mask.any(1)


def mutate(genes, flags, generator):
    """Children [M, N, columns] after edits - 1 .. edits + 1 edits each. toggle: a weight vanishes or, as
    often, one appears; flip: a sign; rewire: a weight moves; gauss: noise on a weight, clipped to
    [-1, 1]. W and W_in exchange nothing."""
    M, N, C = genes.shape
    flat, rows, e = genes.flatten(1).clone(), torch.arange(N).repeat_interleave(C), torch.arange(N * C)
    of_w_in, every = (e % C == C - 1) & (flags.w_in == "evolved"), torch.arange(M)
    kinds = KINDS[flags.genotype] if flags.mutation == "mixed" else (flags.mutation,)
    count = torch.randint(max(flags.edits - 1, 0), flags.edits + 2, (M,), generator=generator)
    for edit in range(flags.edits + 1 if flags.edits else 0):
        old, exists = choose(flat != 0, generator)  # a weight and, in the same part, a place for another
        near = of_w_in == of_w_in[old][:, None]
        if flags.genotype == "indegree":
            near &= rows == rows[old][:, None]
        empty, room = choose((flat == 0) & near, generator)
        kind = torch.randint(len(kinds), (M,), generator=generator)
        is_one = lambda name: torch.tensor([k == name for k in kinds])[kind] & (edit < count)
        toggle, rewire = is_one("toggle"), is_one("rewire")
        appears = torch.rand(M, generator=generator) < .5
        change = flags.sigma * torch.randn(M, generator=generator)
        value, new = flat[every, old], new_values(flags, (M,), generator)
        kept = torch.where(is_one("flip"), -value, value)
        kept = torch.where(is_one("gauss"), (value + change).clamp(-1, 1), kept)
        kept[(toggle & ~appears) | (rewire & room)] = 0.
        born = torch.where(toggle & appears, new, torch.where(rewire & exists, value, 0.))
        flat[every, old] = torch.where(exists, kept, value)
        flat[every[room], empty[room]] = born[room]
    return flat.view(M, N, C)


def cross(a, b, flags, generator):
    """Children of parents a, b [M, N, columns]: of rows, columns, genes, or in a block half are b's."""
    M, N, C = a.shape
    if flags.crossover == "block":
        first = lambda n: torch.randint(n, (M, 1), generator=generator)
        inside = lambda n: (torch.arange(n) - first(n)) % n < n * .5 ** .5
        return torch.where(inside(N)[:, :, None] & inside(C)[:, None], b, a)
    if flags.crossover == "none":
        return a
    shape = {"row": (M, N, 1), "column": (M, 1, C), "uniform": (M, N, C)}[flags.crossover]
    return torch.where(torch.rand(shape, generator=generator) < .5, b, a)


def breed(genes, loss, flags, generator):
    """The next generation, elites first, and which networks they were; of equal losses the first."""
    P = len(genes)
    if flags.method == "shuffled":
        loss = loss[torch.randperm(P, generator=generator)]
    order = loss.argsort(stable=True)
    M, elites = P - flags.elites, order[:flags.elites]
    if flags.method == "random":
        children = first_genes(flags, M, generator)
    elif flags.method == "mutation":
        children = mutate(genes[order[:1]].expand(M, -1, -1), flags, generator)
    else:
        several = torch.rand(M, 2, P, generator=generator).topk(flags.tournament).indices
        first, second = several.gather(2, loss[several].argmin(2, keepdim=True))[..., 0].T
        children = mutate(cross(genes[first], genes[second], flags, generator), flags, generator)
    return torch.cat([genes[elites], children]), elites


def start(flags):
    """The first population, before it is scored."""
    genes = first_genes(flags, flags.population, common.generator(flags.seed, "init"))
    return {"genes": genes, "loss": torch.empty(0).double(), "lowest": torch.tensor(nan), "t": 0}


def step(state, flags):
    """One generation: {genes [P, N, columns], loss [P], of the best so far genotype, loss (lowest) and
    held_out score, t} -> the next one and its logs. Elites keep losses; a failure's is infinite."""
    generator, genes = common.generator(flags.seed, f"generation {state['t']}"), state["genes"]
    known = state["loss"]
    if state["t"]:
        genes, elites = breed(genes, known, flags, generator)
        known = known[elites]
    scores = on_seeds(*networks(genes[len(known):], flags), flags, "fitness").sum(2)
    loss = torch.cat([known, -flags.better * scores.mean(1)]).nan_to_num(math.inf, math.inf)
    state = state | {"genes": genes, "loss": loss, "t": state["t"] + 1}
    if not loss.min() >= state["lowest"]:  # NaN at first
        best = genes[loss.argmin()][None]
        held_out = on_seeds(*networks(best, flags), flags, "held_out").sum(2).mean()
        state |= {"best": best, "lowest": loss.min(), "held_out": held_out}
    return state, {"loss": state["lowest"], "held_out": state["held_out"]}


def search(flags, path):
    """The last state of one run and the logs of its generations, from its checkpoint if there is one."""
    state, logs = common.read(path) if path.exists() else (start(flags), [])
    saved_at = perf_counter()
    with common.timed("stepping"):
        for t in tqdm(range(state["t"], flags.steps), path.parent.name, leave=False,
                      disable=common.RANK):
            state, log = step(state, flags)
            logs.append(log)
            common.NOW.seconds["run_steps"] += 1
            if common.NOW.asked or t + 1 == flags.steps or perf_counter() > saved_at + flags.save_every:
                common.write(path, (state, logs))
                saved_at = perf_counter()
            if common.NOW.asked:
                break
    return state, logs

# ==== What several studies share =====================================================================
NOTES, OURS = "research notes on a genetic algorithm for W", "this project"
OWN = [*common.fields_of(Flags)][len(common.fields_of(common.Flags)):] + ["steps", "seed"]
REFERENCES = "ring", "chain", "random sparse, mean", "random dense, mean"  # nothing selected
DRAWS = 8  # networks that a mean over random ones is over
MEMORY = {"memory": (memory, .1, 0)}  # task: law, largest |W_in| and lag, unless flags say others
T95 = [nan, nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t by count


def cycle(N, weight):
    """W [1, N, N] of a ring (simple cycle reservoir); its lower triangle is a chain (delay line)."""
    return torch.roll(torch.eye(N), 1, 0)[None] * weight


def references(flags):
    """Scores by target [4, K] on the final seeds of REFERENCES, with the same spectral radius."""
    ring = cycle(flags.n_units, flags.radius)
    kinds = [ring, ring.tril()]
    for density in flags.density, 1.:
        own = replace(flags, genotype="gaussian", density=density, w_in="redrawn", raw=False)
        kinds.append(networks(first_genes(own, DRAWS, common.generator(0, density)), own)[0])
    return torch.stack([on_seeds(W, PER_SEED, flags, "final").mean((0, 1)) for W in kinds])


def unselected(flags):
    """DRAWS networks as random search draws them from the same space, as `networks` gives them."""
    return networks(first_genes(flags, DRAWS, common.generator(flags.seed, "unselected")), flags)


def champions(flags, folder, more=lambda run, W, own: {}):
    """Arrays of searches, one entry a run: settings; by generation loss of the best, held_out [R, G]; of
    the champion W [R, N, N], W_in [R, N] (NaN: drawn for every seed) and final [R, S], its scores on the
    final seeds; unselected [R], the mean of networks of its space; reference [4, K], see `references`;
    more(run, W, own). A run is a job in its own folder. Where shapes differ NaN is added."""
    runs = sum(common.groups_of_runs(flags), [])
    files = [folder / f"block{i}" / "arrays.npz" for i in range(len(runs))]
    for run, file in [*zip(runs, files)][common.RANK::common.WORLD]:
        if file.exists() or common.NOW.asked:
            continue
        state, logs = search(run, file.with_name("checkpoint.pt"))
        if state["t"] == run.steps:
            W, own = networks(state["best"], run)
            found = {name: getattr(run, name) for name in OWN} | common.stack(logs) | more(run, W, own)
            common.write(file, found | {
                "better": run.better, "W": W[0], "W_in": own[0],
                "final": on_seeds(W, own, run, "final")[0].sum(1),
                "unselected": on_seeds(*unselected(run), run, "final").sum(2).mean()})
    common.meet()
    rows = [common.read(file) if file.exists() else {} for file in files]
    for run, row in zip(runs, rows):
        loss = float(row["loss"][-1]) if row else nan
        common.NOW.rows.append((run, dict(finished=bool(row), diverged=math.isinf(loss), loss=loss)))
    if not any(rows):  # stopped before the first was done
        raise KeyboardInterrupt
    found = stacked([row for row in rows if row])
    common.write(folder / "metrics.npz", {"step": np.arange(found["loss"].shape[1]) + 1,
                                          "loss": found["loss"].T, "held_out": found["held_out"].T})
    common.write(folder / "checkpoint.pt", {"params": {"W": torch.from_numpy(found["W"])}})
    return found | {"reference": references(flags)}


def stacked(rows):
    """Dicts of arrays, one a run, as {name: [R, ...]}; where shapes differ padded with NaN."""
    found = {}
    for k in rows[0]:
        most = np.max([np.shape(row[k]) for row in rows], 0)
        full = lambda x: np.pad(x, [(0, n) for n in most - np.shape(x)], constant_values=np.nan)
        found[k] = np.stack([full(row[k]) if len(most) else row[k] for row in rows])
    return found


def pick(arrays, **settings):
    """Mask [R] of the runs with these settings."""
    return np.logical_and.reduce([arrays[k] == v for k, v in settings.items()])


def interval(x):
    """(mean, low, high): 95 % by Student's t, of one number a repetition; [] below five of them."""
    x = x[np.isfinite(x)]
    n = len(x)
    if n < 5:
        return []
    half = (T95[n] if n < len(T95) else 1.96 + 2.8 / n) * x.std(ddof=1) / math.sqrt(n)
    return x.mean(), x.mean() - half, x.mean() + half


def judge(say, id, statement, source, x):
    """Say that x [n], one number a repetition, is more than 0 on average."""
    say(id, statement, source, interval(x), ">", 0)


def better(arrays, a, b):
    """[n] by repetition: how much better champions with the settings a are than those with b."""
    x = arrays["better"] * arrays["final"].mean(1)
    return x[pick(arrays, **a)] - x[pick(arrays, **b)]


def last(x):
    """[R] the last known number of each row of x [R, G]."""
    return np.array([row[~np.isnan(row)][-1] for row in x])


def rise(arrays, key, **settings):
    """[n] by repetition: rise of the best in all generations, by loss (its fitness) or held_out."""
    x = -arrays["loss"] if key == "loss" else arrays[key] * arrays["better"][:, None]
    return (last(x) - x[:, 0])[pick(arrays, **settings)]


def loss_without(arrays, key, **settings):
    """[n] by repetition: what the champions lose on the final seeds, compared with arrays[key] [R]."""
    return (arrays["better"] * (arrays["final"].mean(1) - arrays[key]))[pick(arrays, **settings)]


class Searched(common.Study):
    """A search, five repetitions of each configuration, on the task memory; arrays: see `champions`."""
    tasks, defaults, compute = MEMORY, dict(runs=5), champions
    smoke = dict(n_units=8, population=4, steps=2, runs=1, washout=30, fit=60, test=40, final_seeds=2,
                 fitness_seeds=2, held_out_seeds=2)

# Figures.
def labels(arrays):
    """Each run's configuration in words [R]: the settings that are not the same in all runs."""
    varied = [k for k in OWN if k != "seed" and len(np.unique(arrays[k])) > 1]
    word = lambda k, value: value if isinstance(value, str) else f"{k} {value}"
    rows = [[word(k, arrays[k][r]) for k in varied] for r in range(len(arrays["seed"]))]
    return np.array([", ".join(row) or "this search" for row in rows])


def colours(names):
    return dict(zip(dict.fromkeys(names), itertools.cycle([*common.COLOURS, "grey"])))


def dots(ax, values, names, xlabel):
    """Each repetition a dot, the mean with its 95 % interval below it; a row for each name."""
    for i, (name, colour) in enumerate(colours(names).items()):
        x = values[names == name]
        ax.plot(x, np.full(len(x), i) - .14, "o", ms=3.5, alpha=.5, color=colour)
        if interval(x):
            mean, low, high = interval(x)
            ax.errorbar(mean, i + .14, xerr=[[mean - low], [high - mean]], fmt="s", ms=4, color=colour)
    ax.set_yticks(range(i + 1), dict.fromkeys(names), fontsize=7)
    ax.set(ylim=(i + .5, -.7), xlabel=xlabel)


def lines_of(ax, scores):
    """What needs no search, as dashed vertical lines."""
    for i, (name, x) in enumerate(zip(REFERENCES, scores)):
        ax.axvline(x, color="grey", ls="--", lw=.8)
        ax.annotate(name, (x, 1 - .45 * (i % 2)), xycoords=("data", "axes fraction"), fontsize=6,
                    color="grey", rotation=90, ha="right", va="top")


def curves(ax, x, names, ylabel):
    """x [R, G] by generation, a band over repetitions for each name."""
    for name, colour in colours(names).items():
        common.band(ax, np.arange(x.shape[1]) + 1, x[names == name].T, name, colour)
    ax.set(xlabel="generation", ylabel=ylabel)
    ax.legend(fontsize=5.5)


def draw_configurations(arrays, flags):
    """Final scores, luck, and the curves of every configuration."""
    names, final = labels(arrays), arrays["final"].mean(1)
    words = {1: "memory capacity (delays)", -1: "NRMSE"}.get(arrays["better"].mean(), "score")
    figure, axes = common.panels(4, "Champions (squares: mean over repetitions, 95 % interval)", flags)
    dots(axes[0], final, names, f"{words}, final seeds, which selected nothing")
    if not flags.sweep:  # else the lines are of another problem
        lines_of(axes[0], arrays["reference"].sum(1))
    dots(axes[1], -last(arrays["loss"]) - arrays["better"] * final, names,
         "luck: the fitness of the champion less its final score")
    curves(axes[2], -arrays["loss"] * arrays["better"][:, None], names, f"best fitness: {words}")
    curves(axes[3], arrays["held_out"], names, "the same network on held-out seeds")
    return figure

# ==== Studies ========================================================================================
class Evolve(Searched):
    """Is evolving the topology better than luck: than as many random networks, and than no search?"""

    def points(flags):
        signs = [dict(method=m, genotype="ternary", density=.1) for m in ("ga", "mutation", "random")]
        return signs + [dict(method="random", genotype="gaussian", density=d) for d in (.1, 1.)]

    def claims(arrays, say):
        topology = NOTES + ': "genetic algorithm to find the topology of W in an ESN"'
        ga = dict(method="ga")
        for id, words, other in (
                ("random", "random search in the same space", dict(method="random", genotype="ternary")),
                ("mutation", "mutation of the best alone (1+lambda)", dict(method="mutation")),
                ("sparse", "as many random sparse networks", dict(genotype="gaussian", density=.1)),
                ("dense", "as many random dense networks", dict(density=1.))):
            judge(say, f"beats-{id}", f"the genetic search finds better networks than {words} (gain on "
                  "final seeds)", topology, better(arrays, ga, other))
        for i, name in enumerate(REFERENCES[:2]):
            gain = arrays["better"] * (arrays["final"].mean(1) - arrays["reference"][i].sum())
            judge(say, f"beats-{name}", f"it finds better networks than a {name}, which needs no search "
                  "(gain)", topology, gain[pick(arrays, **ga)])
        judge(say, "beats-unselected", "it finds better networks than its space has on average (gain)",
              topology, loss_without(arrays, "unselected", **ga))
        held, fitness = rise(arrays, "held_out", **ga), rise(arrays, "loss", **ga)
        judge(say, "gain-is-real", "the search improves what held-out seeds see (rise of the best)",
              topology, held)
        judge(say, "mostly-luck", "more than half of the rise in fitness is luck: held-out seeds do not "
              "see it", OURS, fitness / 2 - held)

    draw_evolution = draw_configurations


class Topology(Searched):
    """What does a champion look like, which delays does it remember, and is it its wiring?

    Also by_target, linear [R, K]: capacity by delay, and without tanh; permuted [R], see there."""

    def points(flags):
        return [dict(method=method) for method in ("ga", "random")]

    def compute(flags, folder):
        def more(run, W, own):
            return {"by_target": on_seeds(W, own, run, "final").mean((0, 1)),
                    "permuted": permuted(W, own, run),
                    "linear": torch.from_numpy(Topology.linear(run, W[0], own))}
        return champions(flags, folder, more)

    def linear(run, W, own):
        """Capacity [K] by delay of W [N, N] without tanh, with its ridge, a mean over final seeds."""
        W = (1 - run.leak) * torch.eye(len(W)) + run.leak * W
        w_in = run.leak * torch.where(own.isnan(), w_in_of(run, seeds_of(run, "final")), own)
        K, noise = run.lag or 2 * run.n_units, run.ridge / run.fit
        return np.mean([linear_capacity(W, w, K, noise) for w in w_in], 0)

    def claims(arrays, say):
        for method in "ga", "random":
            judge(say, f"wiring-{method}", f"{method}: with its weights at random other places, at the "
                  "same radius, the champion is worse (loss)", OURS,
                  loss_without(arrays, "permuted", method=method))
        gain = arrays["linear"].sum(1) - arrays["final"].mean(1)
        say("tanh-costs", "without its tanh a champion would remember at least five delays more, by "
            "linear theory (gain)", OURS, interval(gain[pick(arrays, method="ga")]), ">", 5)

    def phases(W):
        """Order [N] of the neurons by their angle in the eigenvector of the largest complex eigenvalue:
        along a ring it is the ring. Of moduli within 1e-6 the smallest positive angle counts."""
        values, vectors = np.linalg.eig(np.asarray(W, float))
        size = np.where(values.imag > 1e-9, np.abs(values), -1)
        near = size > size.max() - 1e-6
        value = np.where(near, np.angle(values), np.inf).argmin()
        return np.argsort(np.angle(vectors[:, value]) % (2 * np.pi), kind="stable")

    def champion(arrays):
        """The run, a genetic one if there is one, whose champion has the best fitness."""
        genetic = arrays["method"] == "ga"
        return int(np.where(genetic if genetic.any() else True, -last(arrays["loss"]), -np.inf).argmax())

    def draw_champion(arrays, flags):
        r = Topology.champion(arrays)
        N = arrays["n_units"][r]
        W = arrays["W"][r, :N, :N]
        order = Topology.phases(W)
        figure, axes = common.panels(4, f"The champion of highest fitness ({labels(arrays)[r]})", flags)
        common.image(axes[0], W, "W as it evolved", figure, "from neuron", "to neuron")
        common.image(axes[1], W[np.ix_(order, order)], "by the phases of a complex eigenvector", figure)
        values = np.linalg.eigvals(W)
        radius = np.abs(values).max()
        ring = radius * np.exp(2j * np.pi * np.arange(N) / N)
        axes[2].plot(values.real, values.imag, "o", ms=3, label=f"eigenvalues, radius {radius:.3g}")
        axes[2].plot(ring.real, ring.imag, ".", ms=2, label="a ring's")
        axes[2].set(xlabel="real part", ylabel="imaginary part", aspect="equal")
        degrees = [(W != 0).sum(1), (W != 0).sum(0)]
        k, p = np.arange(np.max(degrees) + 2), (W != 0).mean()
        axes[3].hist(degrees, bins=k - .5, label=["inputs", "outputs"], color=common.COLOURS[:2])
        binomial = [N * math.comb(N, i) * p ** i * (1 - p) ** (N - i) for i in k.tolist()]
        axes[3].plot(k, binomial, "k--", lw=.8, label=f"binomial, density {p:.2g}")
        axes[3].set(xlabel="degree", ylabel="neurons")
        for ax in axes[2:]:
            ax.legend(fontsize=6, bbox_to_anchor=(1, 1))
        return figure

    def draw_capacity(arrays, flags):
        figure, (a, b) = common.panels(2, "Which delays are remembered?", flags)
        measured, names, r = arrays["by_target"], labels(arrays), Topology.champion(arrays)
        delay = np.arange(measured.shape[1]) + 1
        for name, colour in colours(names).items():
            common.band(a, delay, measured[names == name].T, name, colour)
        for name, values, style in zip(REFERENCES, arrays["reference"], ("-", "--", "-.", ":")):
            if not flags.sweep:
                a.plot(delay, values, color="grey", ls=style, lw=1, label=f"{name}, no search")
        linear = arrays["linear"][r]
        b.plot(delay, measured[r], label=f"champion, measured: {np.nansum(measured[r]):.1f}")
        b.plot(delay, linear, "k--", label=f"without tanh, linear theory: {np.nansum(linear):.1f}")
        for ax in a, b:
            ax.set(xlabel="delay k", ylabel="squared correlation with u[t-k]", ylim=(0, 1.03))
            common.shelf(ax, 1 / flags.test, "chance, finite samples", "left")
            ax.legend(fontsize=6)
        return figure


def final_score(W, own, flags):
    """[P] mean scores on the final seeds of W [P, N, N]."""
    return on_seeds(W, own, flags, "final").sum(2).mean(1)


def permuted(W, own, flags):
    """Mean final score of four networks with the weights of W [1, N, N] at random other places, at the
    same spectral radius (unless it is 0): only the wiring is lost."""
    g, radius = common.generator(flags.seed, "permuted"), spectral_radius(W)
    places = [torch.randperm(W.numel(), generator=g) for _ in range(4)]
    shuffled = torch.stack([W.flatten()[place].view_as(W[0]) for place in places])
    return final_score(rescaled(shuffled, radius) if radius else shuffled, own, flags).mean()


def linear_capacity(W, w_in, K, noise=0., u_var=.64 / 3):
    """Capacity [K] by delay 1 .. K of the linear network x[t] = W x[t-1] + w_in u[t], exact for endless
    data: x = sum_j W^j w_in u[t-j], so Sigma = var u sum_j c_j c_j' with c_j = W^j w_in, and the readout
    (Sigma + noise)^-1 var u c_k (Jaeger 2001). noise: ridge / --fit. NaN where it diverges."""
    W, c, columns = np.asarray(W, float), np.asarray(w_in, float), []
    large = lambda c: np.abs(c).max()
    while len(columns) <= K or large(c) > 1e-9 * large(columns[0]) and len(columns) < 40 * len(W):
        columns.append(c)
        c = W @ c
    if not np.isfinite(c).all() or large(c) > 1e-3 * max(large(columns[0]), 1e-300):
        return np.full(K, nan)
    U, sizes, V = np.linalg.svd(np.stack(columns, 1) * math.sqrt(u_var), full_matrices=False)
    keep = sizes > 1e-13 * sizes[0]
    sizes, V = sizes[keep], V[keep, 1:K + 1]
    shrunk = sizes ** 2 / (sizes ** 2 + noise)  # readout k: V_k sizes / (sizes^2 + noise) in the basis U
    along, power = (shrunk[:, None] * V * V).sum(0), (shrunk[:, None] ** 2 * V * V).sum(0)
    return np.divide(along ** 2, power, out=np.zeros(K), where=power > 0)

# Other tasks.
def narma10_of(u):
    """y[t+1] = .3 y[t] + .05 y[t] sum_{i=0..9} y[t-i] + 1.5 u[t-9] u[t] + .1, from u [S, T]: y[1] ..
    y[T]. About 1 % of the sequences with u ~ U[0, .5] diverge: NaN from there on."""
    y = torch.zeros(len(u), u.shape[1] + 1).double()
    for t in range(9, u.shape[1]):
        new = .3 * y[:, t] + .05 * y[:, t] * y[:, t - 9:t + 1].sum(1) + 1.5 * u[:, t - 9] * u[:, t] + .1
        y[:, t + 1] = torch.where(new.abs() < 10, new, nan)
    return y[:, 1:]


@lru_cache(16)
def narma10(seeds, T, lag):
    """u ~ U[0, .5], predict y[t+lag] at t; a sequence that diverges is drawn again."""
    u, again = noise(seeds, T + lag - 1, 0, .5).float().double(), 0
    y = narma10_of(u)
    while (lost := y.isnan().any(1)).any():
        again += 1
        other = [f"{seed}/{again}" for seed, gone in zip(seeds, lost) if gone]
        u[lost] = noise(other, T + lag - 1, 0, .5).float().double()
        y = narma10_of(u)
    return u[:, :T], y[:, lag - 1:, None]


def runge_kutta(f, x, h, early=0, middle=0, late=0):
    """x(t + h) from x(t) of x' = f(x, force), of fourth order; forces: at t, t + h/2 and t + h."""
    k1 = f(x, early)
    k2 = f(x + h / 2 * k1, middle)
    k3 = f(x + h / 2 * k2, middle)
    k4 = f(x + h * k3, late)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def mackey_glass_of(begin, T, tau=17., h=.1):
    """x' = .2 x(t-tau) / (1 + x(t-tau)^10) - .1 x from constant histories begin [S]: x [S, T] at times
    1, 2, ..; between two steps x(t-tau) is a cubic through four."""
    every, lag = round(1 / h), round(tau / h)
    x = np.empty((T * every + lag + 2, len(begin)))
    x[:lag + 2] = begin  # one more than the history, for the cubic
    f = lambda x, late: .2 * late / (1 + late ** 10) - .1 * x
    for i in range(lag + 1, len(x) - 1):
        a, b = x[i - lag], x[i - lag + 1]
        middle = (9 * (a + b) - x[i - lag - 1] - x[i - lag + 2]) / 16
        x[i + 1] = runge_kutta(f, x[i], h, a, middle, b)
    return torch.from_numpy(x[lag + 1 + every::every][:T].T.copy())


@lru_cache(16)
def mackey_glass(seeds, T, lag):
    """u = x - 1 sampled once a time unit; predict it `lag` samples ahead. 500 samples are dropped."""
    begin = noise(seeds, 1, .6, 1.4)[:, 0].numpy()
    x = mackey_glass_of(begin, 500 + T + lag)[:, 500:].float().double() - 1
    return x[:, :T], x[:, lag:, None]


def lorenz_of(begin, T):
    """The Lorenz system (10, 28, 8/3) from begin [S, 3]: [S, T, 3] at .05, .1, .., by steps of .01."""
    def f(s, _):
        return np.stack([10 * (s[1] - s[0]), s[0] * (28 - s[2]) - s[1], s[0] * s[1] - 8 / 3 * s[2]])
    s, rows = np.asarray(begin).T, []
    for _ in range(5 * T):
        s = runge_kutta(f, s, .01)
        rows.append(s)
    return torch.from_numpy(np.stack(rows[4::5]).transpose(2, 0, 1).copy())


@lru_cache(16)
def lorenz(seeds, T, lag):
    """u = x / 20 sampled every .05; predict it `lag` samples ahead. 500 samples are dropped."""
    begin = noise(seeds, 3, -8, 8) + torch.tensor([0., 0., 25.])
    x = lorenz_of(begin, 500 + T + lag)[:, 500:, 0].float().double() / 20
    return x[:, :T], x[:, lag:, None]


TASKS = MEMORY | {"narma10": (narma10, .3, 1), "mackey-glass": (mackey_glass, 1., 84),
                          "lorenz": (lorenz, 1., 8)}


class AnyTask(Searched):
    """A search on any task."""
    tasks = TASKS

# Studies of what may change.
class SeedProblem(AnyTask):
    """How many fitness seeds does a search need, with as many evaluations (1, 2, 4 or 8 seeds)?"""
    defaults = dict(runs=5, task="narma10")

    def check(flags):
        if "fitness_seeds" in flags.given:
            raise common.Stop("--study seed-problem takes 1, 2, 4 and 8 --fitness-seeds: leave it out")

    def points(flags):
        return [dict(fitness_seeds=n, steps=max(1, flags.steps * 4 // n)) for n in (1, 2, 4, 8)]

    def claims(arrays, say):
        source, one = f'{NOTES}: "score not stable: seed problem"', dict(fitness_seeds=1)
        spread = arrays["final"].std(1)[pick(arrays, **one)]
        judge(say, "not-stable", "between seeds the score of a network varies more (standard deviation) "
              "than the search with one gains", source, spread - rise(arrays, "held_out", **one))
        for n in 1, 8:
            held, fitness = (rise(arrays, key, fitness_seeds=n) for key in ("held_out", "loss"))
            judge(say, f"luck-{n}", f"{n} fitness seeds: more than half of the rise in fitness is luck",
                  source, fitness / 2 - held)
        luck = -last(arrays["loss"]) - arrays["better"] * arrays["final"].mean(1)
        judge(say, "more-seeds-less-luck", "with 8 seeds fitness promises less that final seeds do not "
              "keep", source, luck[pick(arrays, **one)] - luck[pick(arrays, fitness_seeds=8)])
        for n in 2, 4, 8:
            judge(say, f"seeds-{n}-better", f"{n} fitness seeds find better networks than one (gain)",
                  source, better(arrays, dict(fitness_seeds=n), one))

    draw_seeds = draw_configurations


class Spaces(AnyTask):
    """Does a smaller space help: five inputs a neuron, circulant matrices?"""

    def points(flags):
        spaces = "ternary", "indegree", "circulant"
        return [dict(genotype=g, method=m) for g in spaces for m in ("ga", "random")]

    def claims(arrays, say):
        source = f'{NOTES}: "first experiment: reducing the search space"'
        full = dict(genotype="ternary", method="ga")
        for g in "indegree", "circulant":
            ga, random = full | dict(genotype=g), dict(genotype=g, method="random")
            judge(say, f"{g}-better", f"reducing the space to {g} finds better networks (gain)", source,
                  better(arrays, ga, full))
            judge(say, f"{g}-space-alone", f"random search in {g} is better than evolution in the full "
                  "space (gain)", OURS, better(arrays, random, full))
            judge(say, f"{g}-search", f"in {g} evolution is better than random search (gain)", source,
                  better(arrays, ga, random))

    draw_spaces = draw_configurations


class Operators(AnyTask):
    """Which cross-over and which edits help, and does selection matter (shuffled scores)?"""
    MINE = dict(crossover="row", mutation="mixed", method="ga")
    OTHERS = {"crossover": ("none", "column", "block", "uniform"),
              "mutation": ("toggle", "flip", "rewire")}

    def points(flags):
        mine, others = Operators.MINE, Operators.OTHERS | {"method": ("shuffled",)}
        return [mine] + [mine | {k: v} for k, values in others.items() for v in values]

    def claims(arrays, say):
        source, mine = f'{NOTES}: "choice of the mutation and cross-over functions"', Operators.MINE
        for key, values in Operators.OTHERS.items():
            for v in values:
                judge(say, f"{mine[key]}-beats-{v}", f"{key} {mine[key]} is better than {v} (gain)",
                      source, better(arrays, mine, mine | {key: v}))
        shuffled, own = (rise(arrays, "held_out", **mine | dict(method=m)) for m in ("shuffled", "ga"))
        judge(say, "selection-matters", "on shuffled scores the best rises less on held-out seeds "
              "(difference)", OURS, own - shuffled)
        judge(say, "control-gains", "the control (shuffled scores) gains as well (rise)", OURS, shuffled)

    draw_operators = draw_configurations


class Radius(AnyTask):
    """Topology or spectral radius: what do raw weights gain, and what is left of it at the same radius?

    Also mean final scores [R]: rescaled, of the champion at --radius; radius_only, of
    networks that nothing selected at the champion's radius; permuted, see there."""

    def points(flags):
        return [dict(raw=raw, method=m) for raw in (False, True) for m in ("ga", "random")]

    def compute(flags, folder):
        def more(run, W, own):
            free, w_in = unselected(run)
            alone = rescaled(free, spectral_radius(W))
            return {"radius_only": final_score(alone, w_in, run).mean(),
                    "rescaled": final_score(rescaled(W, run.radius), own, run).mean(),
                    "permuted": permuted(W, own, run)}
        return champions(flags, folder, more)

    def claims(arrays, say):
        raw, fixed = dict(raw=True, method="ga"), dict(raw=False, method="ga")
        source = NOTES + ': "spectral radius depends on the matrix: rescale? for we test the topology"'
        judge(say, "raw-better", "raw weights find better networks than rescaled ones (gain)", source,
              better(arrays, raw, fixed))
        judge(say, "radius-helps", "the champion of a raw search is worse when it is rescaled (loss)",
              source, loss_without(arrays, "rescaled", **raw))
        total, rest = (loss_without(arrays, key, **raw) for key in ("unselected", "radius_only"))
        judge(say, "radius-most", "more than half of a raw search's gain is spectral radius: unselected "
              "networks with the champion's radius have it as well", source,
              np.minimum(total, total / 2 - rest))
        for name, settings in ("fixed", fixed), ("raw", raw):
            judge(say, f"wiring-{name}", f"{name}: with its weights at random other places, at the same "
                  "radius, the champion is worse (loss)", source,
                  loss_without(arrays, "permuted", **settings))

    draw_radius = draw_configurations


class WIn(AnyTask):
    """W_in: redrawn for every seed, fixed, or evolved with W?"""

    def points(flags):
        kinds = "redrawn", "fixed", "evolved"
        return [dict(w_in=w, method=m) for w in kinds for m in ("ga", "random")]

    def claims(arrays, say):
        source = f'{NOTES}: "criticism and possible improvements: W_in?"'
        redrawn, fixed, evolved = (dict(w_in=w, method="ga") for w in ("redrawn", "fixed", "evolved"))
        judge(say, "fixed-better", "a W that evolves for one W_in is better with it than one for every "
              "W_in (gain)", source, better(arrays, fixed, redrawn))
        judge(say, "evolved-better", "evolving W_in as well is better than one fixed W_in (gain)",
              source, better(arrays, evolved, fixed))
        judge(say, "evolved-beats-random", "with W_in in the genotype evolution is better than random "
              "search (gain)", source, better(arrays, evolved, evolved | dict(method="random")))

    draw_w_in = draw_configurations


class Continuous(AnyTask):
    """Real weights in [-1, 1] instead of signs, or positive ones alone?"""

    def points(flags):
        spaces = "ternary", "continuous", "mask"
        return [dict(genotype=g, method=m) for g in spaces for m in ("ga", "random")]

    def claims(arrays, say):
        source = f'{NOTES}: "continuous values [-1, 1]"'
        for m in "ga", "random":
            real, signs, ones = (dict(genotype=g, method=m) for g in ("continuous", "ternary", "mask"))
            judge(say, f"continuous-better-{m}", f"{m}: real weights are better than signs (gain)",
                  source, better(arrays, real, signs))
            judge(say, f"signs-matter-{m}", f"{m}: both signs are better than positive weights alone "
                  "(gain)", OURS, better(arrays, signs, ones))

    draw_continuous = draw_configurations


def scores_at(W, own, run, others):
    """Mean final scores of networks of a run under other settings, with W_in of the size of these."""
    size = size_of_w_in(run)
    scores = [final_score(W, own * size_of_w_in(one) / size, one).mean() for one in others]
    return torch.stack(scores)


class InputScaling(AnyTask):
    """Does the order of champion, ring and chain survive another input scaling (what drowns in tanh)?

    Also mean final scores at SCALES: scaled [R, 4] of the champion, ring, chain [4]."""
    SCALES = .01, .1, .3, 1.

    def points(flags):
        return [dict(input_scaling=s) for s in InputScaling.SCALES]

    def compute(flags, folder):
        at = lambda run: [replace(run, input_scaling=size) for size in InputScaling.SCALES]
        ring = cycle(flags.n_units, flags.radius)
        more = lambda run, W, own: {"scaled": scores_at(W, own, run, at(run))}
        return champions(flags, folder, more) | {
            "ring": scores_at(ring, PER_SEED, flags, at(flags)),
            "chain": scores_at(ring.tril(), PER_SEED, flags, at(flags))}

    def claims(arrays, say):
        for name in "ring", "chain":
            gain = arrays["better"][:, None] * (arrays[name] - arrays["scaled"])
            for i, size in enumerate(InputScaling.SCALES):
                judge(say, f"{name}-{size}", f"input scaling {size}: a {name} is better than the "
                      "champion of a search there (gain)", OURS,
                      gain[pick(arrays, input_scaling=size), i])

    def draw_scaling(arrays, flags):
        x, names = np.array(InputScaling.SCALES), labels(arrays)
        figure, (ax,) = common.panels(1, "What is left at other input scalings?", flags, 1, (6.5, 4.5))
        for name, colour in colours(names).items():
            common.band(ax, x, arrays["scaled"][names == name].T, f"champions of {name}", colour)
        for name, style in ("ring", "k-"), ("chain", "k--"):
            if not flags.sweep:
                ax.plot(x, arrays[name], style, label=f"{name}, no search")
        ax.set(xscale="log", xlabel="input scaling, largest |W_in|", ylabel="score on final seeds")
        ax.legend(fontsize=6)
        return figure


class Tasks(AnyTask):
    """Is a champion of one task good at another?

    Also transfer, plain [R, 4]: mean final scores on every task, of the champion and of
    networks that nothing selected."""

    def points(flags):
        return [dict(task=task) for task in TASKS]

    def compute(flags, folder):
        def more(run, W, own):
            each = [replace(run, task=task) for task in TASKS]
            return {"transfer": scores_at(W, own, run, each),
                    "plain": scores_at(*unselected(run), run, each)}
        return champions(flags, folder, more)

    def relative(arrays, a, j):
        """[n] gain of the champions of task a on task j, as a share of what nothing selected has."""
        mine, way = pick(arrays, task=a), -1 if j else 1  # memory is the first
        plain = arrays["plain"][mine, j]
        return way * (arrays["transfer"][mine, j] - plain) / np.abs(plain)

    def claims(arrays, say):
        for a in TASKS:
            for j, b in enumerate(TASKS):
                judge(say, f"{a}-on-{b}", f"a champion of {a} is better than unselected networks on {b} "
                      "(share)", OURS, Tasks.relative(arrays, a, j))

    def draw_transfer(arrays, flags):
        tasks = [task for task in TASKS if task in arrays["task"]]
        gain = [[100 * Tasks.relative(arrays, a, j).mean() for j in range(len(TASKS))] for a in tasks]
        title = "Gain of a champion over unselected networks"
        figure, (ax,) = common.panels(1, title, flags, 1, (6.5, 4.5))
        common.image(ax, np.array(gain), "in % of their score", figure, "scored on", "evolved on")
        for (i, j), x in np.ndenumerate(gain):
            ax.text(j, i, f"{x:+.1f}", ha="center", va="center", backgroundcolor="white")
        ax.set_xticks(range(len(TASKS)), TASKS)
        ax.set_yticks(range(len(tasks)), tasks)
        return figure


class Score(common.Study):
    """How good are the networks of a file? (--weights FILE.npz with W, and perhaps W_in)

    final [M, S] on the final seeds, spectral_radius [M]; reference [4, K]."""
    tasks = TASKS
    smoke = dict(washout=30, fit=60, test=40, final_seeds=2)

    def check(flags):
        if not flags.plot_only:
            Score.networks_of(flags)

    def networks_of(flags):
        """W [M, N, N] and W_in [M, N] of the file --weights; Stop where they are not."""
        if flags.smoke and not flags.weights:
            return cycle(8, .9), PER_SEED
        try:
            with np.load(flags.weights, allow_pickle=False) as file:
                W = np.asarray(file["W"], np.float32)
                w_in = np.asarray(file["W_in"] if "W_in" in file else nan, np.float32)
            W = W.reshape(-1, *W.shape[-2:])
            w_in = np.broadcast_to(w_in, W.shape[:2]).copy()
            sound = W.shape[1] == W.shape[2] > 1 and np.isfinite(W).all() and len(W)
        except Exception as error:  # whatever the bytes lead numpy and zipfile to
            raise common.Stop(f"--weights {flags.weights}: no npz file with W [M, N, N]: {error!r:.100}")
        if not sound or np.isinf(w_in).any():
            raise common.Stop(f"--weights {flags.weights}: W must be finite numbers [M, N, N], N > 1")
        return torch.from_numpy(W), torch.from_numpy(w_in)

    def compute(flags, folder):
        W, own = Score.networks_of(flags)
        flags = replace(flags, n_units=W.shape[1])
        final, radius = on_seeds(W, own, flags, "final").sum(2), spectral_radius(W)
        for m, x in enumerate(final):
            common.tell(f"network {m}: {x.mean():.4g} +- {x.std():.2g}, spectral radius {radius[m]:.3g}")
        return {"reference": references(flags), "final": final, "spectral_radius": radius}

    def draw_scores(arrays, flags):
        title = f"The networks of {flags.weights} on {flags.final_seeds} seeds"
        figure, (ax,) = common.panels(1, title, flags, 1, (7, 4.5))
        M, S = arrays["final"].shape
        names = np.repeat([f"network {m}" for m in range(M)], S)
        dots(ax, arrays["final"].ravel(), names, f"score on {flags.task}")
        lines_of(ax, arrays["reference"].sum(1))
        return figure


STUDIES = [Evolve, Topology, SeedProblem, Spaces, Operators, Radius, WIn, Continuous, InputScaling,
           Tasks, Score]


if __name__ == "__main__":
    raise SystemExit(common.main(Flags, STUDIES))
