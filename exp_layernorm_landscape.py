"""Why do LayerNorm and Adam help so small a model, and what do normalised vectors do to its landscape?

Law: a token x ~ p(x) has class y(x) = x mod M (another one with --label-noise). Model: an associative
memory, one matrix W between fixed vectors, s(y|x) = u_y . N(W e_x), N nothing or a normalisation. Loss:
sum_x p(x) CE(s(.|x), y(x)) in nats. With N = M = 2 and N(h) = h / |h| it lives on a torus of two angles
with one minimum, log(1 + exp(-sqrt 2)) = .2176; without N it depends on gamma = W'(u_1 - u_2) alone.
Floor under N, u orthonormal: log(1 + (M - 1) exp(-sqrt(M / (M - 1)))).

    python exp_layernorm_landscape.py                      20 s: both landscapes, and five ways down
    python exp_layernorm_landscape.py --study ranking      Adam + LN > Adam > LN > SGD?
    python exp_layernorm_landscape.py --study clusters     another law: modular sums in the plane

Claims quote research notes on normalised associative memories (French) and on clusters in the plane;
Cabannes, Simsek & Bietti 2024, "Learning Associative Memories with Gradient Descent"; Odonnat, Bouaziz &
Cabannes 2024, "Clustering Head"."""
import functools
import math
from dataclasses import dataclass
from dataclasses import replace
from itertools import chain
from itertools import product as grid_of
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from torch.func import grad_and_value
from torch.nn.functional import gelu, normalize, one_hot, pad

import common
from common import flag

# ==== Flags ==========================================================================================
number = functools.partial(flag, number=True)  # runs that differ in these share a program


@dataclass
class Flags(common.Flags):
    steps: int = flag(1000, "training steps", 1)
    runs: int = flag(3, "seeds per configuration", 1)
    n_tokens: int = flag(2, "N, number of tokens", 1)
    n_classes: int = flag(2, "M, number of classes; token x has class x mod M", 2)
    d_model: int = flag(2, "d, width", 1)
    emb: str = number(
        "pair", "e_x: canonical (unit vectors), pair (two at --cos), fan (60 degrees apart in the "
        "plane), sphere (random), gauss (N(0, 1/d))")
    unemb: str = number("canonical", "u_y, as --emb")
    cos: float = number(.5, "pair: cosine of the two tokens", -.9999, .9999)
    law: Literal["uniform", "p1", "zipf"] = flag(
        "p1", "p(x): uniform, --p1 and the rest alike, (x + 1)^-zipf")
    p1: float = number(.75, "probability of the first token", .0001, .9999)
    zipf: float = number(2., "exponent of the tokens' probabilities", 0)
    label_noise: float = flag(0., "probability that a label is one of the other classes", 0, .9999)
    norm: str = number("none", "N, what W e_x goes through: none, sphere, rms or layernorm")
    eps: float = number(1e-6, "inside the root of N", 0)
    init_scale: float = number(1., "W_0 ~ N(0, init_scale^2 / d); 0: from zero", 0)
    start_at: str = number(
        "", "d = 2: W_0 by W e_x, angle:length of each token, as 200:.5/190:.4 (degrees)")
    optimiser: Literal["gd", "momentum", "normalised", "sign", "adam"] = flag(
        "gd", "normalised follows g/|g|; sign is Adam with betas and eps 0")
    lr: float = number(.1, "learning rate", 0)
    momentum: float = number(.9, "heavy ball", 0, .9999)
    beta1: float = number(.9, "Adam's", 0, .9999)
    beta2: float = number(.999, "Adam's", 0, .9999999)
    adam_eps: float = number(1e-8, "Adam's own eps", 0)
    batch: int = flag(0, "pairs drawn a step (0: the exact expectation over the law)", 0)
    dtype: Literal["float64", "float32"] = flag("float64", "floating-point type of W")
    modulus: int = number(2, "clusters: p", 2, 16)
    seq_length: int = flag(12, "clusters: L, tokens of a sequence", 1, 15)
    sparsity: int = number(5, "clusters: k, the first k tokens are summed", 1)
    n_train: int = flag(2048, "clusters: training sequences; a quarter as many are tests", 4)
    width: int = number(128, "clusters: hidden units of the MLP", 1)
    untied: bool = number(True, "clusters: the unembedding is not the token embedding")
    freeze: str = number("none", "clusters: what keeps its initial values: none, attention or mlp")
    source: str = number("", "clusters: from the best run of another task")
    vocab: int = flag(3, "clusters: token embeddings in memory, the largest p of a sweep", 2)
    max_width: int = flag(128, "clusters: hidden units in memory, the largest width of a sweep", 1)


OWN = [*common.fields_of(Flags)][len(common.fields_of(common.Flags)):]  # this script's own flags


def check_memory(run):
    """Raise Stop where the flags of an associative memory contradict each other."""
    N, d = run.n_tokens, run.d_model
    for name, n in ("emb", N), ("unemb", run.n_classes):
        kind = getattr(run, name)
        if kind not in EMBEDDINGS:
            raise common.Stop(f"--{name} is one of {', '.join(EMBEDDINGS)}, not {kind}")
        if kind in ("pair", "fan") and d < 2 or kind == "canonical" and n > d:
            raise common.Stop(f"--{name} {kind}: {n} vectors need a larger --d-model than {d}")
        if kind == "pair" and n != 2:
            raise common.Stop(f"--{name} pair is two vectors, not {n}")
    if run.norm not in NORMS:
        raise common.Stop(f"--norm is one of {', '.join(NORMS)}, not {run.norm}")
    if run.norm != "none" and run.init_scale == 0 and not run.start_at:
        raise common.Stop(f"--norm {run.norm}: a zero W_0 has no direction, give --init-scale above 0")
    if run.norm == "layernorm" and d == 2:
        raise common.Stop("--norm layernorm leaves two points of the plane: give --d-model 3 or more")
    if run.start_at:
        start_from(run)

# ==== Data law =======================================================================================
def joint_of(flags):
    """p(x, y) [M, N] in float64: token x, class x mod M or, with probability label_noise, another."""
    N, M, wrong = flags.n_tokens, flags.n_classes, flags.label_noise
    p = (torch.arange(N).double() + 1) ** -(flags.zipf if flags.law == "zipf" else 0.)
    if flags.law == "p1" and N > 1:
        p[0] = flags.p1 / (1 - flags.p1) * (N - 1)
    right = (torch.arange(M)[:, None] == torch.arange(N) % M).double()
    return p / p.sum() * ((1 - wrong) * right + wrong * (1 - right) / (M - 1))


def in_plane(angles, d):
    """Unit vectors [n, d] in the first two coordinates."""
    return pad(torch.stack([angles.cos(), angles.sin()], 1), (0, d - 2))


def random_vectors(n, d, generator):
    return torch.randn(n, d, generator=generator).double() / math.sqrt(d)


EMBEDDINGS = {  # name: (n, d, cosine, generator) -> n vectors [n, d] in float64
    "canonical": lambda n, d, cos, g: torch.eye(n, d).double(),
    "pair": lambda n, d, cos, g: in_plane(torch.tensor([0., math.acos(cos)]).double(), d),
    # 0, -60, 60, -120, .. degrees: the first vector lies in the middle
    "fan": lambda n, d, cos, g: in_plane(
        torch.tensor([math.pi / 3 * ((k + 1) // 2) * (-1) ** k for k in range(n)]).double(), d),
    "sphere": lambda n, d, cos, g: normalize(random_vectors(n, d, g)),
    "gauss": lambda n, d, cos, g: random_vectors(n, d, g),
}
# N(h) = gain c / sqrt(spread |c|^2 + floor) with c = h - centre mean(h): every norm is four numbers, so
# that runs with different norms share a program.
NORMS = {
    "none": lambda d, eps: (1., 0., 0., 1.),
    "sphere": lambda d, eps: (1., 0., 1., eps),
    "rms": lambda d, eps: (1., 0., 1 / d, eps),
    "layernorm": lambda d, eps: (1., 1., 1 / d, eps),
}


def constants(run):
    """What the step of one run reads: E [N, d], U [M, d], joint [M, N]; N as gain, centre, spread,
    floor; the optimiser's numbers; with --batch `below`, how many of the 2^32 hashes draw a pair
    up to this."""
    g, joint = common.generator(run.seed, "law"), joint_of(run)
    found = {"E": EMBEDDINGS[run.emb](run.n_tokens, run.d_model, run.cos, g),
             "U": EMBEDDINGS[run.unemb](run.n_classes, run.d_model, run.cos, g), "joint": joint}
    found |= dict(zip(("gain", "centre", "spread", "floor"), NORMS[run.norm](run.d_model, run.eps)))
    found |= {k: getattr(run, k) for k in ("lr", "momentum", "beta1", "beta2", "adam_eps")}
    found = {k: torch.as_tensor(x, dtype=getattr(torch, run.dtype)) for k, x in found.items()}
    if run.batch:
        pairs = joint.flatten() if run.label_noise else joint.sum(0)
        found["below"] = (pairs.cumsum(0) / pairs.sum() * 2 ** 32).round().long()
    return found


def number_of(run):
    """The constants of one run in float64, as the functions below read them."""
    return {k: x.double() for k, x in constants(run).items() if k != "below"}


def batch_of(flags, number, t):
    """Shares p(x, y) [M, N] of the pairs drawn at step t: a loss sees only how often each comes. They
    are counted as integers, which a card may add in any order."""
    hashes = common.hashes(common.key(number["seed"], 0, t), flags.batch)
    below, at = number["below"], torch.zeros_like(hashes)
    for k in reversed(range(len(below).bit_length())):  # bisection
        last = (at + 2 ** k - 1).clamp(max=len(below) - 1)
        at = at + 2 ** k * (below[last] <= hashes)
    counts = torch.zeros_like(below).scatter_add(0, at, torch.ones_like(at))
    return number["joint"].sign() * counts.view(-1, flags.n_tokens) / flags.batch

# ==== Model ==========================================================================================
# Convention of the papers: h = W e_x with W [d, d]. Tokens are columns, h [d, N] and logits [M, N], so
# that they lie side by side.
def product(a, b):
    """a @ b; of tiny matrices as a sum, which the compiler fuses with its neighbours over all runs."""
    return a @ b if a.shape[-1] > 6 else (a[:, :, None] * b[None]).sum(1)


def centred(h, n):
    """c and 1 / rho of hidden vectors h [d, N], N(h) = gain c / rho."""
    c = h - n["centre"] * h.mean(0, keepdim=True)
    return c, 1 / (n["spread"] * (c * c).sum(0, keepdim=True) + n["floor"]).sqrt()


def normalised(h, n):
    """N(h) [d, N]."""
    c, scale = centred(h, n)
    return n["gain"] * scale * c


def losses(s):
    """-log softmax of s [M, N] over the classes, softmax, and 1 where a class is the one best; exact
    down to the smallest loss, since that of the best class is log1p of the others."""
    most = s.amax(0, keepdim=True)
    e = (s - most).exp()
    top = (e == 1).to(s.dtype)  # in floats: sums of booleans do not vectorise
    ties = top.sum(0, keepdim=True) - 1
    others = (e * (1 - top)).sum(0, keepdim=True) + ties
    return most - s + torch.log1p(others), e * (1 / (1 + others)), top * (ties < .5).to(s.dtype)


def loss_and_gradient(W, joint, n):
    """What is seen of W under the law (loss, accuracy, where a tie is an error, smallest |c| of a token,
    norms of W and of the gradient) and dL/dW [d, d] under `joint`, the law's or a batch's. The gradient
    of the logits, p(x) softmax - p(x, y), is written as a difference of two exact products."""
    c, scale = centred(product(W, n["E"].T), n)
    nll, soft, best = losses(product(n["U"], n["gain"] * scale * c))
    apart = 1 - torch.eye(len(soft), dtype=W.dtype, device=W.device)
    law = n["joint"]
    delta = soft * product(apart, joint) - joint * product(apart, soft)
    back = product(n["U"].T, delta)
    back = n["gain"] * scale * (back - n["spread"] * scale ** 2 * c * (c * back).sum(0, keepdim=True))
    back = back - n["centre"] * back.mean(0, keepdim=True)
    grad = product(back, n["E"])
    return {"loss": (law * nll).sum(), "accuracy": 1 - (law * (1 - best)).sum(),
            "min_hidden_norm": (c * c).sum(0).amin().sqrt(), "weight_norm": (W * W).sum().sqrt(),
            "grad_norm": (grad * grad).sum().sqrt()}, grad

# ==== Train ==========================================================================================
def start_from(run):
    """W_0 [2, 2] from --start-at: W_0 e_x has this angle (degrees) and length, for each
    of two tokens."""
    try:
        angle, length = torch.tensor([[*map(float, word.split(":"))]
                                      for word in run.start_at.split("/")]).double().T
        h = length * in_plane(angle.deg2rad(), run.d_model).T
        return h @ torch.linalg.inv(number_of(run)["E"].T)
    except (ValueError, RuntimeError):
        raise common.Stop(f"--start-at {run.start_at}: give angle:length of two independent tokens in "
                          "d = 2, as 200:.5/190:.4")


def start(run):
    """Step 0 of one run."""
    d, g = run.d_model, common.generator(run.seed, "init")
    W = run.init_scale / math.sqrt(d) * torch.randn(d, d, generator=g).double()
    W = (start_from(run) if run.start_at else W).to(getattr(torch, run.dtype))
    memory = common.adam_init({"W": W}) if run.optimiser == "adam" else {"t": torch.tensor(0)}
    if run.optimiser == "momentum":
        memory["m"] = torch.zeros_like(W)
    return {"params": {"W": W}, **memory}


def unit(grad):
    """grad / |grad|, or zero: the largest entry is made 1 first, so that no square underflows."""
    top = grad.abs().amax()
    grad = grad / torch.where(top > 0, top, 1.)
    return grad / (grad * grad).sum().sqrt().clamp(min=1.)


DIRECTIONS = {"gd": lambda grad: grad, "momentum": lambda grad: grad, "normalised": unit,
              "sign": torch.sign}


def step_of(flags):
    """The training step of ONE run."""
    def step(state, number):
        W = state["params"]["W"]
        joint = batch_of(flags, number, state["t"]) if flags.batch else number["joint"]
        logs, grad = loss_and_gradient(W, joint, number)
        if flags.room.path:
            logs["W"] = W
        if flags.optimiser == "adam":
            params, memory = common.adamw({"W": W}, {"W": grad}, state, number["lr"], 0.,
                                          number["beta1"], number["beta2"], number["adam_eps"])
            return {"params": params, **memory}, logs
        move, memory = DIRECTIONS[flags.optimiser](grad), {"t": state["t"] + 1}
        if flags.optimiser == "momentum":
            move = memory["m"] = number["momentum"] * state["m"] + grad
        return {"params": {"W": W - number["lr"] * move}, **memory}, logs
    return step


def evaluate_of(flags):
    """What a step logs, of the W at an evaluation."""
    def evaluate(params, number):
        return loss_and_gradient(params["W"], number["joint"], number)[0] | {"W": params["W"]}
    return evaluate


def kept_steps(steps):
    """Steps whose curves are kept in arrays.npz: all of 400, else log-spaced ones and 1/10, 1/2."""
    return np.array(sorted({*common.marks(steps, 400), steps // 10, steps // 2}
                           if steps > 400 else range(steps + 1)))


def stacked(rows):
    """Dicts of arrays, one a run, as {name: [R, ...]}; where shapes differ padded with NaN."""
    found = {}
    for k in rows[0]:
        most = np.max([np.shape(row[k]) for row in rows], 0)
        full = lambda x: np.pad(x, [(0, n) for n in most - np.shape(x)], constant_values=np.nan)
        found[k] = np.stack([full(row[k]) if len(most) else row[k] for row in rows])
    return found


def train(flags, folder):
    """Train a study. Returns arrays with one entry a run: all settings; loss (nats), accuracy,
    grad_norm, weight_norm (|W|) and min_hidden_norm (smallest |W e_x|, centred under layernorm) [R, S]
    at the steps `step` [S]; and what the study's measure(run, number, seen) finds in the curves of all
    steps [T+1] and, in studies that keep the path, W [T+1, d, d]; NaN for a run that diverged or was
    stopped."""
    groups, rows = common.groups_of_runs(flags), []
    at = kept_steps(flags.steps)
    for group in common.train(groups, folder, start, step_of, evaluate_of, constants):
        last = {k[5:]: x[-1:] for k, x in group.metrics.items() if k != "eval_step" and k[:5] == "eval_"}
        whole = {k: np.concatenate([group.metrics.get(k, x[:0]), x]) for k, x in last.items()}
        for r, run in enumerate(group.runs):
            seen = {k: x[:, r].astype(float) for k, x in whole.items()}
            blank = 0. if np.isfinite(seen["loss"][-1]) else np.nan
            known = {k: np.nan_to_num(x, nan=1.) for k, x in seen.items()}
            found = flags.room.measure(run, number_of(run), known)
            seen.pop("W")
            rows.append({k: getattr(run, k) for k in ("seed", *OWN)}
                        | {k: x[at] for k, x in seen.items()}
                        | {k: np.asarray(x, float) + blank for k, x in found.items()})
    return stacked(rows) | {"step": at}

# ==== What several studies share =====================================================================
NOTES, OURS = "research notes on normalised associative memories", "this project"
BLUE, RED, GREEN, _, ORANGE, SKY, BLACK = common.COLOURS[:7]
BOX = 1 / (1 + math.exp(-math.sqrt(2)))  # the most that unit vectors give to one of two classes
OPTIMISERS = dict(gd=BLUE, momentum=SKY, normalised=GREEN, sign=ORANGE, adam=RED)


def pick(arrays, **fields):
    """Mask [R] over the runs whose settings have these values."""
    return np.logical_and.reduce([arrays[k] == value for k, value in fields.items()])


def of(arrays, key, **fields):
    """Values [..] of the runs with these settings, in the order of their seeds."""
    return arrays[key][pick(arrays, **fields)]


def at_end(arrays, key, **fields):
    return of(arrays, key, **fields)[:, -1]


def by_seed(arrays, x, mask, extreme=np.max):
    """The extreme value of x [R] among the masked runs of each seed."""
    return np.array([extreme(x[mask & (arrays["seed"] == seed)]) for seed in np.unique(arrays["seed"])])


def floor_of(M):
    """Least loss of unit vectors N(h) with certain labels, u orthonormal: as far from the
    other classes as can be."""
    return math.log1p((M - 1) * math.exp(-math.sqrt(M / (M - 1))))


def observed(W, n):
    return loss_and_gradient(W, n["joint"], n)[0]["loss"]


def gradient(W, n):
    return loss_and_gradient(W, n["joint"], n)[1]


def curvature(W, n):
    """Eigenvalues [d^2] of the Hessian of the loss at W, ascending."""
    flat = lambda w: gradient(w.view_as(W), n).flatten()
    return torch.linalg.eigvalsh(torch.func.jacfwd(flat)(W.flatten()))


def hidden(W, E):
    """W e_x of a path W [T, d, d]: [T, N, d]."""
    return np.einsum("tij,xj->txi", W, np.asarray(E))


def labels(arrays):
    """Each run's configuration in words [R]: the settings in which it differs from the first."""
    def differs(r):
        return [f"{k} {arrays[k][r]}" for k in OWN if arrays[k][r] != arrays[k][0]]
    return np.array([", ".join(differs(r)) or "as it is" for r in range(len(arrays["seed"]))])


def finish(ax, xlabel, ylabel, title="", log="", **axes):
    """Name the axes, make those in `log` logarithmic, show a legend."""
    ax.set(xlabel=xlabel, ylabel=ylabel, **{f"{x}scale": "log" for x in log}, **axes)
    ax.set_title(title, fontsize=9)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=6.5)


def draw_curves(arrays, flags):
    """Loss of up to eight configurations."""
    figure, (ax,) = common.panels(1, "Loss by configuration", flags)
    names = labels(arrays)
    for name, colour in zip(dict.fromkeys(names), common.COLOURS):
        common.band(ax, arrays["step"] + 1, arrays["loss"][names == name].T, name, colour)
    finish(ax, "step + 1", "loss (nats)", log="xy")
    return figure


def of_own_points(draw):
    """draw, or curves where other configurations than the study's own ran, or not all of them."""
    def drawn(arrays, flags):
        fields = {k for point in flags.room.points(flags) for k in point}
        own = not flags.sweep and not fields & {*flags.given} and not common.NOW.asked
        return (draw if own else draw_curves)(arrays, flags)
    return drawn


class Study(common.Study):
    """One associative memory. path: whether W of every step is logged."""
    path = False

    def check(flags):
        for run in chain.from_iterable(common.groups_of_runs(flags)):
            check_memory(run)

    def compute(flags, folder):
        return train(flags, folder)

    def measure(run, number, seen):
        return {}


def check_two(flags):
    Study.check(flags)
    if (flags.n_tokens, flags.n_classes, flags.d_model) != (2, 2, 2):
        raise common.Stop(f"--study {flags.study} is about N = M = d = 2: leave these flags as they are")

# ==== Studies ========================================================================================
class Landscape(Study):
    """What does N make of the loss of two tokens and two classes, and where do five optimisers go?

    gamma [R, S, 2]: W'(u_1 - u_2); theta [R, S, 2]: angles of N(W e_x), continuous in time; right
    [R, S, 2]: probability of each token's class; off_gamma [R]: the largest entry of the part of
    W_t - W_0 outside the plane of gamma, relative; turns [R, 2]: how often the slope of a token's loss
    changes its sign around the circle of N(W e_x)."""
    path = True
    defaults = dict(runs=8)
    smoke = dict(steps=20, runs=1, evals=2)

    check = check_two

    def points(flags):
        return [dict(cos=c, norm=norm, optimiser=kind) for kind in OPTIMISERS
                for norm in ("none", "sphere") for c in (-.5, .5, .95)]

    def circle(n):
        """Loss of each token [360, 2], given itself, at angles of N(W e_x)."""
        angles = torch.arange(360).double().deg2rad()
        nll = losses(n["U"] @ in_plane(angles, 2).T)[0]
        return nll.T @ (n["joint"] / n["joint"].sum(0))

    def measure(run, n, seen):
        at, gap = kept_steps(run.steps), np.asarray(n["U"][0] - n["U"][1])
        gamma, h = gap @ seen["W"], hidden(seen["W"], n["E"])
        theta = np.degrees(np.unwrap(np.arctan2(h[..., 1], h[..., 0]), axis=0))
        theta -= 360 * np.floor((theta[:1] + 90) / 360)  # from near (0, 90)
        margin = (h if run.norm == "none" else h / np.linalg.norm(h, axis=-1, keepdims=True)) @ gap
        moved = seen["W"] - seen["W"][0]
        off = moved - np.einsum("i,j,tjk->tik", gap, gap, moved) / (gap @ gap)
        slopes = np.sign(np.diff(Landscape.circle(n), axis=0, append=Landscape.circle(n)[:1]))
        return {"gamma": gamma[at], "theta": theta[at], "right": 1 / (1 + np.exp(-margin * [1, -1]))[at],
                "off_gamma": np.abs(off).max() / (np.abs(moved).max() or 1),
                "turns": (slopes != np.roll(slopes, 1, 0)).sum(0)}

    def claims(arrays, say):
        end, N = arrays["loss"][:, -1], arrays["norm"] == "sphere"
        for kind in "gd", "adam":
            off = by_seed(arrays, arrays["off_gamma"], pick(arrays, norm="none", optimiser=kind))
            say(f"{kind}-in-two", f"{kind} moves W in the two dimensions of gamma alone "
                "(u canonical; share outside)",
                f'''{NOTES}: "dans le cas SGD on s'interesse qu'a (u_1 - u_2) e_i' .. pas sur que ca '''
                'soit aussi le cas pour Adam"', off, "<", 1e-6)
        say("one-minimum", "around the circle of N(W e_x) the slope of a token's loss changes its sign "
            "twice: on the torus one minimum, two saddles, one maximum",
            f'{NOTES}: "Minimum, hidden convexity"', int(arrays["turns"][N].max()), "is", 2)
        say("all-find-the-minimum", "with N every optimiser gets near the one minimum from every start "
            "(largest loss, nats)", OURS, float(end[N].max()), "<", floor_of(2) + .03)
        say("loss-above-floor", "with N no loss lies below the floor (kept steps; difference)", OURS,
            float(arrays["loss"][N].min() - floor_of(2)), ">", -1e-12)
        fast = pick(arrays, norm="none", cos=.5) & np.isin(arrays["optimiser"], ["normalised", "sign"])
        say("box", "without N normalised gd and sign descent give a right class more than with N any "
            "can, 1 / (1 + exp(-sqrt 2))",
            f'''{NOTES}: "ne parametrise qu'un sous-ensemble des probabilites"''',
            by_seed(arrays, arrays["right"][:, -1].min(1), fast, np.min), ">", BOX)

    def cosines(arrays, norm):
        return np.unique(arrays["cos"][pick(arrays, norm=norm) & np.isfinite(arrays["loss"][:, -1])])

    def paths(ax, arrays, key, **fields):
        """The paths of all runs with these settings, by optimiser; seed 0 in thick lines."""
        for kind, colour in OPTIMISERS.items():
            for i, path in enumerate(of(arrays, key, optimiser=kind, **fields)):
                # it follows the path of gd
                style = dict(ls="--", zorder=3) if kind == "normalised" else {}
                ax.plot(*path.T, color=colour, lw=.5 if i else 1.6, label=None if i else kind, **style)
        ax.plot(*of(arrays, key, **fields)[:, 0].T, "k.", zorder=4)

    def plane(ax, arrays, cos, n):
        """Contours of the loss in gamma, in the frame of gd's paths."""
        gamma = of(arrays, "gamma", norm="none", cos=cos)
        gd = gamma[np.isfinite(gamma).all((1, 2))][:len({*arrays["seed"]})]
        low, high = gd.min((0, 1)) - 1, gd.max((0, 1)) + 1
        x, y = np.meshgrid(*[np.linspace(a, b, 200) for a, b in zip(low, high)])
        margin = np.stack([x, y], -1) @ n["E"].numpy().T * [1, -1]
        p = n["joint"].sum(0).numpy()
        lines = ax.contour(x, y, np.logaddexp(0, -margin) @ p, [.01, .1, .4, 1, 2, 4, 8], colors="grey",
                           linewidths=.6)
        ax.clabel(lines, fontsize=5.5, fmt="%g")
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))

    def torus(ax, n):
        """Contours of the loss in the angles of N(W e_1) and N(W e_2), its minimum, saddles, maximum."""
        loss, p = Landscape.circle(n).numpy(), n["joint"].sum(0).numpy()
        angle = np.arange(-270, 361)
        levels = p[0] * loss[angle % 360, 0] + p[1] * loss[angle % 360, 1][:, None]
        ax.contour(angle, angle, levels, 12, colors="grey", linewidths=.5)
        extremes = (loss.argmin(0) + 90) % 360 - 90, (loss.argmax(0) + 90) % 360 - 90
        for high in grid_of((0, 1), repeat=2):
            at = np.array([extremes[high[0]][0], extremes[high[1]][1]])
            name, marker = [("minimum", "o"), ("saddle", "D"), ("maximum", "^")][sum(high)]
            ax.plot(*at, marker, color="white", mec="black", zorder=4)
            ax.annotate(f"{name} {p @ loss[at, [0, 1]]:.4f}", at, (0, 8), fontsize=7,
                        ha="center", textcoords="offset points", zorder=5,
                        bbox=dict(facecolor="white", edgecolor="none", pad=1))
        ax.set(xlim=(-270, 360), ylim=(-270, 360),
               xticks=range(-270, 361, 90), yticks=range(-270, 361, 90))

    def draw_plain(arrays, flags):
        cosines = Landscape.cosines(arrays, "none")
        if not len(cosines):
            return
        figure, axes = common.panels(len(cosines), "Without N the loss depends on gamma = W'(u_1 - u_2) "
            "alone and is convex (other paths go on, out of the frame of gd)", flags, 3, (4.6, 4.2))
        for ax, cos in zip(axes, cosines):
            Landscape.plane(ax, arrays, cos, number_of(replace(flags, cos=float(cos))))
            Landscape.paths(ax, arrays, "gamma", norm="none", cos=cos)
            finish(ax, "gamma_1", "gamma_2", f"contours: loss (nats), cos {cos:g}, {flags.runs} seeds")
        return figure

    def draw_torus(arrays, flags):
        cosines = Landscape.cosines(arrays, "sphere")
        if not len(cosines):
            return
        figure, (*axes, last) = common.panels(len(cosines) + 1, "With N = h/|h| the loss lives on a "
            "torus: one minimum, two saddles, one maximum", flags, 2, (5.4, 4.6))
        for ax, cos in zip(axes, cosines):
            Landscape.torus(ax, number_of(replace(flags, cos=float(cos))))
            Landscape.paths(ax, arrays, "theta", norm="sphere", cos=cos)
            finish(ax, "angle of N(W e_1) (degrees)", "angle of N(W e_2)",
                   f"cos {cos:g}, {flags.runs} seeds (dots: starts); contours: loss")
        for (norm, style), kind in grid_of((("none", ":"), ("sphere", "-")), ("gd", "adam")):
            for i, path in enumerate(of(arrays, "right", norm=norm, optimiser=kind, cos=cosines[0])):
                last.plot(*path.T, style, color=OPTIMISERS[kind],
                          label=None if i else f"{kind}, N {norm}")
        x = np.linspace(.02, 1, 99)
        last.contour(x, x, -flags.p1 * np.log(x) - (1 - flags.p1) * np.log(x[:, None]), 9, colors="grey",
                     linewidths=.5)
        last.add_patch(plt.Rectangle((1 - BOX, 1 - BOX), 2 * BOX - 1, 2 * BOX - 1, fill=False, ls="--"))
        last.annotate(f"all that N can say: up to {BOX:.3f}", (1 - BOX, BOX), va="bottom", fontsize=7)
        finish(last, "probability of the right class, token 1", "that of token 2",
               f"the same paths and those without N, cos {cosines[0]:g}")
        return figure


class Ranking(Study):
    """Is it Adam + LN > Adam > LN > SGD, for different N, M and d?

    rate [R]: the learning rate, that of sign and Adam times d; error [R]: probability
    of a wrong answer."""
    defaults = dict(steps=100, runs=10, n_tokens=100, n_classes=5, d_model=10, emb="sphere",
                    unemb="sphere", law="zipf", batch=1024)
    smoke = dict(steps=2, runs=1, n_tokens=10, d_model=4)
    METHODS = {"SGD": ("gd", "none"), "LN": ("gd", "sphere"), "sign": ("sign", "none"),
               "sign+LN": ("sign", "sphere"), "Adam": ("adam", "none"), "Adam+LN": ("adam", "sphere")}
    RATES = .1, 1., 10., 100.
    ORDER = "SGD", "LN", "Adam", "Adam+LN"
    # errors of SGD, LN, sign and sign + LN at lr .1, by width
    ORIGINAL = {10: (.203, .133, .094, .059), 100: (.073, .069, .044, .018)}

    def shapes(flags):
        N, M, d = flags.n_tokens, flags.n_classes, flags.d_model
        others = [(N // 5, M, 2 * d), (N, 2, 2 * d), (N, 4 * M, 2 * d)]
        return [(N, M, d * times) for times in (1, 2, 5, 10)] + others

    def points(flags):
        return [dict(n_tokens=N, n_classes=M, d_model=d, optimiser=kind, norm=norm,
                     lr=rate / (1 if kind == "gd" else d))
                for N, M, d in Ranking.shapes(flags)
                for kind, norm in Ranking.METHODS.values() for rate in Ranking.RATES]

    def measure(run, n, seen):
        return {"rate": run.lr * (1 if run.optimiser == "gd" else run.d_model),
                "error": 1 - seen["accuracy"][-1]}

    def errors(arrays, method, shape, rate):
        """Error by seed [runs] of a method at this rate, or (None) at the one of the least median."""
        N, M, d = shape
        kind, norm = Ranking.METHODS[method]
        mine = pick(arrays, n_tokens=N, n_classes=M, d_model=d, optimiser=kind, norm=norm)
        each = [arrays["error"][mine & np.isclose(arrays["rate"], r)]
                for r in ([rate] if rate else Ranking.RATES)]
        return min(each, key=np.median)

    def gains(arrays, shape, rate):
        """By how much the error falls from each method to the next, [3, runs]."""
        errors = [Ranking.errors(arrays, method, shape, rate) for method in Ranking.ORDER]
        return -np.diff(errors, axis=0)

    def found_shapes(arrays):
        return [*dict.fromkeys(zip(arrays["n_tokens"], arrays["n_classes"], arrays["d_model"]))]

    def claims(arrays, say):
        for N, M, d in Ranking.found_shapes(arrays):
            for rate, words in (.1, "lr .1 (Adam: lr / d)"), (None, "each at its best of four rates"):
                say(f"order-N{N}-M{M}-d{d}-{rate or 'best'}", f"N {N}, M {M}, d {d}, {words}: errors "
                    "fall from SGD to LN to Adam to Adam + LN (least of the three gains)",
                    f'{NOTES}: "Adam + LN > Adam > LN > SGD pour differente valeure de N, M, d"',
                    Ranking.gains(arrays, (N, M, d), rate).min(0), ">", 0)
        for d, stored in Ranking.ORIGINAL.items():
            mine = [np.median(Ranking.errors(arrays, method, (100, 5, d), .1))
                    for method in ("SGD", "LN", "sign", "sign+LN")]
            say(f"original-{d}", f"d {d}, lr .1: median errors of SGD, LN, sign, sign + LN are within a "
                f"third of the stored {stored} (largest ratio)", "stored results of the notes' code",
                float(np.exp(np.abs(np.log(np.divide(mine, stored))).max())), "<", 4 / 3)

    @of_own_points
    def draw_wins(arrays, flags):
        shapes = Ranking.found_shapes(arrays)
        steps = [f"{b} < {a}" for a, b in zip(Ranking.ORDER, Ranking.ORDER[1:])] + ["all three"]
        figure, axes = common.panels(2, f"In how many of {flags.runs} seeds does the error fall from "
            f"SGD to LN to Adam to Adam + LN? ({flags.steps} steps)", flags, 2, (6, 4.2))
        for ax, rate, title in zip(axes, (.1, None),
                                   ("lr .1 (Adam: .1 / d)", "each at its best of four")):
            wins = np.array([[*(gain > 0).sum(1), (gain > 0).all(0).sum()]
                             for gain in (Ranking.gains(arrays, shape, rate) for shape in shapes)])
            common.image(ax, wins, title, figure, limits=(0, flags.runs))
            for (i, j), count in np.ndenumerate(wins):
                ax.text(j, i, count, ha="center", va="center", backgroundcolor="white")
            ax.set_xticks(range(4), steps, fontsize=7)
            ax.set_yticks(range(len(shapes)), ["N {}, M {}, d {}".format(*shape) for shape in shapes])
        return figure


class Plane(Study):
    """Do trajectories lie in a plane; what classes of W are alike, and do steps map classes to classes?

    spectrum [R, d^2]: singular values of W_t - W_0, the first is 1; rank [R]: how many lie above the
    widest gap of the spectrum (its end is rounding, 1e-16); outside [R]: share of the path beyond its
    best plane; gram_schmidt [R]: beyond the plane of the first and the last step; bound [R] on the rank
    of gd, momentum and normalised gd. Under N: class_dimension [R] of C(W) = {V: N(V e_x) = N(W e_x)},
    class_formula; meets [R]: how far the vectors of W / |W| are from those of W; class_step, scale_step
    [R]: see `image`."""
    path = True
    defaults = dict(steps=150, n_tokens=5, n_classes=3, d_model=4, emb="gauss", unemb="gauss",
                    law="zipf", zipf=1., eps=0.)
    smoke = dict(steps=10, runs=1, evals=2)

    def points(flags):
        shapes = [(flags.n_tokens, flags.n_classes, flags.d_model, "gauss"), (3, 3, 6, "gauss"),
                  (2, 3, 6, "gauss"), (8, 2, 3, "gauss"), (2, 2, 2, "gauss"), (2, 2, 2, "canonical")]
        ways = [dict(optimiser=kind) for kind in ("gd", "momentum", "normalised")]
        ways += [dict(optimiser="adam", beta1=b1, beta2=b2)
                 for b1, b2 in ((.9, .999), (0., .999), (.9, .9), (0., 0.))]
        return [dict(n_tokens=N, n_classes=M, d_model=d, emb=e, unemb=e, norm=norm) | way
                for N, M, d, e in shapes for way in ways for norm in ("none", "sphere")]

    def vectors(W, n):
        """W e_x / |W e_x| [N, d]."""
        return normalize(product(n["E"], W.T), dim=-1)

    def image(W, n, factors, lr):
        """Does one gradient step map classes to classes? V in C(W) with V e_x = factor_x W e_x takes a
        step of any rate: the least of the largest angles between the vectors of V_1 and W_1, over the
        largest angle by which W's own step turned one."""
        angle = lambda a, b: 2 * ((a - b).norm(dim=-1).amax(-1) / 2).clamp(max=1).asin()
        V = (torch.linalg.pinv(n["E"]) @ (factors[:, None] * product(n["E"], W.T))).T
        before, after = Plane.vectors(W, n), Plane.vectors(W - lr * gradient(W, n), n)
        rates = lr * torch.logspace(-10, 10, 2001, 2).double()
        others = V - rates[:, None, None] * gradient(V, n)
        others = torch.vmap(lambda V: Plane.vectors(V, n))(others)
        return angle(others, after).min() / angle(before, after)

    def measure(run, n, seen):
        N, M, d, N_on = run.n_tokens, run.n_classes, run.d_model, run.norm != "none"
        moved = (seen["W"] - seen["W"][0]).reshape(len(seen["W"]), -1)
        s = np.linalg.svd(moved, compute_uv=False)
        s = s / max(s[0], 1e-300)
        basis = np.linalg.qr(np.stack([moved[1] - moved[2], moved[-2] - moved[-1]], 1))[0]
        beyond = np.linalg.norm(moved - moved @ basis @ basis.T, axis=1).max()
        found = dict.fromkeys(("bound", "class_dimension", "class_formula", "meets", "class_step",
                               "scale_step"), math.nan)
        found |= {"spectrum": s, "outside": math.sqrt((s[2:] ** 2).sum() / (s ** 2).sum()),
                  "rank": 1 + np.argmax(-np.diff(np.log(np.append(np.maximum(s, 1e-16), 1e-16)))),
                  "gram_schmidt": beyond / np.linalg.norm(moved, axis=1).max()}
        if run.optimiser != "adam":
            found["bound"] = min(N, d) * min(d, N + M - 1 if N_on else M - 1)
        if N_on:
            W = torch.tensor(seen["W"][0])
            change = torch.func.jacrev(lambda W: Plane.vectors(W, n))(W).reshape(-1, d * d)
            far = (Plane.vectors(W / W.norm(), n) - Plane.vectors(W, n)).abs().max()
            found |= {"class_dimension": d * d - torch.linalg.matrix_rank(change, rtol=1e-9),
                      "meets": far, "class_formula": N + d * (d - N) if N <= d else 1}
            if run.optimiser == "gd" and N <= d:
                factors = 1 + torch.rand(N, generator=common.generator(run.seed, "eval")).double()
                found |= {"class_step": Plane.image(W, n, factors, run.lr),
                          "scale_step": Plane.image(W, n, 0 * factors + 2, run.lr)}
        return found

    def claims(arrays, say):
        N_on, small = arrays["norm"] != "none", (arrays["n_tokens"] == 2) & (arrays["n_classes"] == 2)
        ask = f'{NOTES}: "LayerNorm -> Non, Adam with different beta -> Non, NormGD -> Non"'
        for words, mine in (("without", ~N_on), ("with", N_on)):
            mine = mine & np.isfinite(arrays["bound"])
            say(f"bound-{words}-N", f"{words} N gd, momentum and normalised gd stay within min(N, d) "
                f"min(d, {'M - 1' if words == 'without' else 'N + M - 1'}) dimensions (more)",
                "their steps are sums of (u_i - u_j) e_x' and, with N, of N(W e_x) e_x'",
                float((arrays["rank"] - arrays["bound"])[mine].max()), "<", .5)
        gd, adam, unit_steps = (arrays["optimiser"] == kind for kind in ("gd", "adam", "normalised"))
        for id, words, mine, relation in (
                ("planar-gd", "N = M = 2: gd without N is planar", gd & ~N_on & small, "<"),
                ("planar-normalised", "so is normalised gd without N", unit_steps & ~N_on & small, "<"),
                ("planar-adam", "so is Adam without N, with any betas", adam & ~N_on & small, "<"),
                ("norm-not-planar", "with N gd is not planar, at any shape", gd & N_on, ">"),
                ("adam-not-planar", "Adam is not where N or M > 2, with any betas", adam & ~small, ">"),
                ("normalised-not-planar", "nor is normalised gd there", unit_steps & ~small, ">")):
            extreme = by_seed(arrays, arrays["outside"], mine, np.max if relation == "<" else np.min)
            say(id, f"{words} (share of the path outside)", ask, extreme, relation, 1e-4)
        off = arrays["class_dimension"] - arrays["class_formula"]
        say("degrees-lost", "a class C(W) has N + d (d - N) dimensions, one if N > d: N takes N degrees "
            "of freedom, or d^2 - 1 (difference)",
            f'{NOTES}: "avec layernorm on perd quelques degree de liberte"',
            float(np.abs(off[N_on]).max()), "<", .5)
        say("sphere-meets", "the sphere |W| = 1 meets every class: W / |W| has the "
            "vectors of W (difference)",
            f'{NOTES}: "un espace compact convexe (la sphere), qui intersecte tous les C(W0)"',
            float(arrays["meets"][N_on].max()), "<", 1e-12)
        for key, words in (
                ("class_step", "steps map classes to classes, if the rate may be chosen anew"),
                ("scale_step", "steps commute with the scale of W: 2 W at another rate")):
            say(key.replace("_", "-"), f"{words} (angle between the images, over the step's)",
                f'{NOTES}: "elle commute avec les gradient updates? .. pas sur"',
                of(arrays, key, optimiser="gd", norm="sphere", n_tokens=3), "<", 1e-6)

    @of_own_points
    def draw_plane(arrays, flags):
        figure, axes = common.panels(2, f"Are trajectories planar? {flags.steps} steps in float64",
                                     flags, 2, (6, 4.4))
        betas = [f" {b1:g}, {b2:g}" for b1, b2 in zip(arrays["beta1"], arrays["beta2"])]
        ways = np.array([kind + beta * (kind == "adam")
                         for kind, beta in zip(arrays["optimiser"], betas)])
        shapes = np.array([
            f"N{N} M{M}\nd{d}\n{emb}"
            for N, M, d, emb in zip(*(arrays[k] for k in ("n_tokens", "n_classes", "d_model", "emb")))])
        names, kinds = [*dict.fromkeys(shapes)], [*dict.fromkeys(ways)]
        for way, colour in zip(kinds, (*common.COLOURS, "grey")):
            first = (shapes == names[0]) & (arrays["norm"] == "none") & (ways == way)
            s = np.median(arrays["spectrum"][first], 0)
            axes[0].plot(np.arange(len(s)) + 1, np.maximum(s, 1e-17), ".-", color=colour, lw=.9,
                         label=way)
        finish(axes[0], f"singular value of W_t - W_0 (bound of gd: {arrays['bound'][0]:g})",
               "relative to the first",
               f"without N, {names[0]}, median of {flags.runs} seeds".replace("\n", " "), "y")
        for norm, marker in ("none", "o"), ("sphere", "x"):
            for way, colour in zip(kinds, (*common.COLOURS, "grey")):
                mine = (arrays["norm"] == norm) & (ways == way)
                x = [names.index(name) + kinds.index(way) / 12 - .33 for name in shapes[mine]]
                axes[1].plot(x, np.maximum(arrays["outside"][mine], 1e-17), marker, color=colour, ms=4)
        axes[1].set_xticks(range(len(names)), names, fontsize=7)
        common.shelf(axes[1], 1e-4, "counted as planar below")
        finish(axes[1], "", "share of the path outside its best plane",
               "every run, same colours; o without N, x with N", "y")
        return figure


class Norm(Study):
    """Does |W| diverge under constant steps and certain labels, with N and without?

    flow [R]: e^m + (M - 1) m of the first token's margin at the end over M lr p T + 1, 1 for gradient
    flow from 0 without N, orthonormal u and e; inner [R]: largest <W, step> / |W| over the longest step;
    grown [R]: growth of |W| over the second half of training; exponent [R]: of |W| ~ t^exponent over the
    last nine tenths."""
    path = True
    defaults = dict(steps=3000, runs=16, emb="canonical", eps=0., lr=1., block=32)
    smoke = dict(steps=20, runs=2, evals=2)
    LAWS = {"one token": dict(n_tokens=1, emb="canonical", batch=0),
            "two orthogonal": dict(n_tokens=2, emb="canonical", batch=0),
            "cos .5": dict(n_tokens=2, emb="pair", cos=.5, batch=0),
            "cos .95": dict(n_tokens=2, emb="pair", cos=.95, batch=0)}

    def points(flags):
        found = [law | dict(norm=norm, optimiser=kind, init_scale=scale,
                            lr=.01 if kind == "adam" else flags.lr)
                 for law in Norm.LAWS.values() for norm, scale in (("none", 0.), ("sphere", 1.))
                 for kind in ("gd", "normalised", "adam")]
        noisy = Norm.LAWS["one token"] | dict(norm="sphere", batch=1, lr=flags.lr)
        return found + [noisy | dict(label_noise=share) for share in (.1, .25)]

    def measure(run, n, seen):
        W, size, T = seen["W"], seen["weight_norm"], run.steps
        step, tenth = np.diff(W, axis=0), np.maximum(size[T // 10], 1e-300)
        length = np.sqrt((step ** 2).sum((1, 2)))
        inner = (W[:-1] * step).sum((1, 2)) / np.maximum(size[:-1] * length.max(), 1e-300)
        sound = seen["grad_norm"][:-1] > 1e-9  # below, its direction is rounding
        margin, M = n["E"][0] @ torch.tensor(W[-1]).T @ (n["U"][0] - n["U"][1]), run.n_classes
        flow = (margin.exp() + (M - 1) * margin) / (M * run.lr * n["joint"][0, 0] * T + 1)
        return {"flow": flow, "grown": size[-1] / max(size[T // 2], 1e-300) - 1,
                "inner": np.abs(inner[sound]).max(initial=0), "exponent": np.log10(size[-1] / tenth)}

    def claims(arrays, say):
        plain, N = dict(norm="none", optimiser="gd"), dict(norm="sphere")
        for id, law in ("one", "one token"), ("two", "two orthogonal"):
            off = np.abs(of(arrays, "flow", **plain, **Norm.LAWS[law]) - 1).max()
            say(f"margin-law-{id}", f"without N ({law}) the margin m ends on gradient flow's "
                "e^m + (M - 1) m = M lr p t + 1 (off by a share; nothing is random here)",
                OURS, float(off), "<", .01)
        ask = f'''{NOTES}: "la norm de W divergence vers l'infini .. Pas clair, probable"'''
        for id, kind, laws in (("gd", "gd", ["one token", "two orthogonal"]),
                               ("gd-correlated", "gd", ["cos .5", "cos .95"]),
                               ("adam", "adam", ["one token", "cos .95"])):
            grown = np.max([of(arrays, "grown", **N, optimiser=kind, **Norm.LAWS[law])
                            for law in laws], 0)
            say(f"diverges-{id}", f"with N and {kind} |W| diverges: it grows by a thousandth or more "
                f"over the second half ({' or '.join(laws)}; "
                f"{(grown > 1e-3).sum()} of {len(grown)} seeds do)", ask, grown, ">", 1e-3)
        exact = (arrays["norm"] == "sphere") & (arrays["optimiser"] != "adam")
        say("orthogonal-steps", "with N (eps 0) steps of gd, sgd and normalised gd are orthogonal to W, "
            "so that |W| never falls (largest <W, step>, relative)",
            "N does not see the length of W e_x", float(arrays["inner"][exact].max()), "<", 1e-6)
        last = at_end(arrays, "weight_norm", **N, optimiser="normalised", n_tokens=1) ** 2
        first = of(arrays, "weight_norm", **N, optimiser="normalised", n_tokens=1)[:, 0] ** 2
        t = of(arrays, "lr", **N, optimiser="normalised", n_tokens=1) ** 2 * arrays["step"][-1]
        say("normalised-sqrt", "normalised gd with N: |W|^2 = |W_0|^2 + lr^2 t (off by)", OURS,
            np.abs(last / (first + t) - 1), "<", 1e-3)
        for share, words in (.25, "a quarter"), (.1, "a tenth"):
            say(f"noise-{share}", f"{words} of the labels wrong, SGD with N: |W| grows like t^(1/4) "
                "(exponent; noise below 1 - 1 / (1 + exp(-sqrt 2)) = .196 leaves the best angle where "
                "it was)", OURS, of(arrays, "exponent", **N, batch=1, label_noise=share), "in", (.2, .3))
        gap = np.max([at_end(arrays, "loss", **N, optimiser="gd", **Norm.LAWS[law])
                      for law in ("one token", "cos .5")], 0) - floor_of(2)
        say("floor-reached", "with N gd ends on the floor log(1 + exp(-sqrt 2)) (nats above)",
            OURS, gap, "<", 1e-4)

    @of_own_points
    def draw_norm(arrays, flags):
        figure, (b, c, d) = common.panels(
            3, "Does |W| diverge with constant steps and certain labels?", flags, 3)
        t = arrays["step"] + 1
        for (name, law), colour in zip(Norm.LAWS.items(), common.COLOURS):
            plain = pick(arrays, norm="none", optimiser="gd", **law)
            common.band(b, t, arrays["weight_norm"][plain].T, name, colour)
            N = pick(arrays, norm="sphere", optimiser="gd", **law)
            common.band(c, t, arrays["weight_norm"][N].T, name, colour)
        for name, colour, fields in (
                ("normalised gd", RED, dict(optimiser="normalised", n_tokens=1)),
                ("adam", ORANGE, dict(optimiser="adam", n_tokens=1)),
                ("sgd, a quarter of the labels wrong", BLUE, dict(batch=1, label_noise=.25)),
                ("sgd, a tenth wrong", SKY, dict(batch=1, label_noise=.1))):
            N = pick(arrays, norm="sphere", **fields)
            common.band(d, t, arrays["weight_norm"][N].T, name, colour)
        d.plot(t, flags.lr * t ** .5, "--", color="grey", label="lr t^(1/2)")
        d.plot(t, t ** .25, ":", color="grey", label="t^(1/4)")
        finish(b, "step + 1", "|W|", "gd without N: grows like log t", "x")
        finish(c, "step + 1", "|W|", "gd with N: stops (jumps: a token passes near zero)", "xy")
        finish(d, "step + 1", "|W|", "one token with N: other steps, noisy labels", "xy")
        return figure


class Convexity(Study):
    """How many local minima does N leave, and is the loss convex in W, in W e_x or in N(W e_x)?

    largest [R]: largest eigenvalue of the Hessian in W at the end; angle [R] of N(W e_1) at the end
    (degrees); rest [R]: the gradient is below 1e-3; above_W, above_hidden, above_vectors [R]: share of
    random segments on which the loss rises above its chord, in W, in W e_x and in N(W e_x)."""
    defaults = dict(steps=3000, runs=64, optimiser="momentum", emb="canonical", law="uniform", block=64)
    smoke = dict(steps=20, runs=2, evals=2)
    SETTINGS = {
        "one token, d < M": dict(n_tokens=1, n_classes=3, d_model=2, emb="canonical", unemb="fan"),
        "one token": dict(n_tokens=1, n_classes=3, d_model=3, emb="canonical", unemb="canonical"),
        "three tokens": dict(n_tokens=3, n_classes=3, d_model=3, emb="sphere", unemb="canonical")}

    def points(flags):
        return [fields | dict(norm=norm) for fields in Convexity.SETTINGS.values()
                for norm in ("none", "sphere")]

    def above(loss, a, b):
        """Share of the segments from a to b [1000, ...] on which loss rises above its chord."""
        share = torch.linspace(0, 1, 21).double()
        at = torch.vmap(torch.vmap(loss))(a + share[:, None, None, None] * (b - a))
        chord = at[0] + share[:, None] * (at[-1] - at[0])
        return ((at - chord).amax(0) > 1e-9).double().mean()

    def measure(run, n, seen):
        W, E, law = torch.tensor(seen["W"][-1]), n["E"].T, n["joint"]
        a, b = torch.randn(2, 1000, *W.shape, generator=common.generator(run.seed, "eval")).double()
        nll = lambda vectors: (law * losses(n["U"] @ vectors)[0]).sum()
        with_N = lambda h: nll(normalised(h, n))
        h = W @ E[:, 0]
        return {"largest": curvature(W, n)[-1], "angle": math.degrees(math.atan2(h[1], h[0])),
                "rest": seen["grad_norm"][-1] < 1e-3,
                "above_W": Convexity.above(lambda W: with_N(W @ E), a, b),
                "above_hidden": Convexity.above(with_N, a @ E, b @ E),
                "above_vectors": Convexity.above(nll, normalize(a @ E, dim=1), normalize(b @ E, dim=1))}

    def claims(arrays, say):
        rest, end = arrays["rest"] > 0, arrays["loss"][:, -1]
        low, high = (math.log1p(2 * math.exp(sign * .5)) for sign in (-1, 1))
        fan = pick(arrays, d_model=2, norm="sphere") & rest
        spurious = fan & (np.abs(end - high) < 1e-3)
        ask = f'{NOTES}: "des choses sur le nombre de minimum locaux"'
        say("spurious-minimum", "one token, d < M, its class between two others 60 degrees away: with N "
            f"some descents come to rest at {high:.3f}, a spurious minimum (share)", ask,
            float(spurious.sum() / fan.sum()), "in", (.05, .95))
        say("two-minima", f"the others at {low:.3f} (distance of a loss from the nearer of the two)",
            ask, np.minimum(np.abs(end - low), np.abs(end - high))[fan], "<", 1e-3)
        say("spurious-strict", "it is strict: the loss curves upwards along the circle "
            "(largest eigenvalue)", OURS, arrays["largest"][spurious], ">", 1e-4)
        for id, name, N in ("none-wide", "one token", 1), ("none-three", "three tokens", 3):
            mine = pick(arrays, d_model=3, n_tokens=N, norm="sphere") & rest
            say(id, f"d >= M, {name}: no spurious minimum, descents that came to rest ({mine.sum()}) "
                "are on the floor (nats above)", f'{NOTES}: "hidden convexity"',
                end[mine] - floor_of(3), "<", 1e-3)
        quote = f'{NOTES}: "plus convexe par rapport a W, mais toujours par rapport aux We_x"'
        for id, norm, key, words in (
                ("convex-plain", "none", "W", "without N the loss is convex in W"),
                ("convex-norm", "sphere", "W", "with N it is convex in W"),
                ("convex-hidden", "sphere", "hidden", "with N it is convex in W e_x"),
                ("convex-vectors", "sphere", "vectors",
                 "with N it is convex in N(W e_x), off the sphere")):
            share = of(arrays, f"above_{key}", norm=norm)
            say(id, f"{words} (share of random segments above their chord)", quote,
                float(share.max()), "<", 1e-9)

    @of_own_points
    def draw_convexity(arrays, flags):
        figure, (a,) = common.panels(1, "How many local minima does N leave?", flags, size=(6.4, 4))
        mine = pick(arrays, d_model=2, norm="sphere")
        phi = torch.arange(-180, 181).double()
        fan = EMBEDDINGS["fan"](3, 2, 0, None)
        a.plot(phi, losses(fan @ in_plane(phi.deg2rad(), 2).T)[0][0], color=BLACK,
               label="loss of N(W e)")
        a.plot(arrays["angle"][mine], arrays["loss"][mine, -1], "o", color=RED, alpha=.4,
               label=f"ends of {mine.sum()} descents")
        finish(a, "angle of N(W e) from u_1 (degrees)", "loss (nats)",
               "one token, classes at 0, 60, -60 degrees")
        return figure


class Projections(Study):
    """What do f1, W's part along the max-margin direction, and f2, the rest, guarantee?

    f1, f2 [R, S]; guarantee [R, S]: bound on the loss; slack [R]: the least of guarantee - loss; broken
    [R]: steps at which a promise that all is correct was broken; turns [R]: how often the slope of f2
    changes its sign; aligned [R]: f2 / f1 at the end over that at a tenth; limit [R]:
    log(p1 / p2) / 2."""
    path = True
    defaults = dict(steps=3000, runs=8, emb="canonical", lr=1.)
    smoke = dict(steps=20, runs=1, evals=2)

    def points(flags):
        return [dict(emb=emb, norm=norm, init_scale=scale) for emb in ("canonical", "pair")
                for norm in ("none", "sphere") for scale in (0., .1, 1., 10.) if scale or norm == "none"]

    check = check_two

    def max_margin(V):
        """W [d, d] of norm 1 with the largest margin, min |W|^2 with <V_x, W> >= 1, of two independent
        tokens, V [2, d, d]: both constraints are tight."""
        a = np.linalg.solve(np.einsum("xij,yij->xy", V, V), np.ones(2))
        W = np.tensordot(a, V, 1)
        return W / np.linalg.norm(W)

    def guarantee(f1, f2, margins, V, E, W_inf, N):
        """Least margins [T, n] of W = f1 W_inf + (f2 across it): <V, W> >= f1 <V, W_inf> - f2 |V's part
        across W_inf|; N = h/|h| divides it by |W e_x| <= f1 |W_inf e_x| + f2 |e_x|. E [n, d]:
        token of V."""
        across = np.sqrt(np.maximum((V ** 2).sum((1, 2)) - margins ** 2, 0))
        least = f1[:, None] * margins - f2[:, None] * across
        if N == "none":
            return least
        length, along = np.linalg.norm(E, axis=1), np.linalg.norm(E @ W_inf.T, axis=1)
        size = np.abs(f1)[:, None] * along + f2[:, None] * length
        return np.where(least > 0, least / size, -np.linalg.norm(V, axis=(1, 2)) / length)

    def measure(run, n, seen):
        (E, U, p), at = (n[k].numpy() for k in ("E", "U", "joint")), kept_steps(run.steps)
        V = np.einsum("x,i,xj->xij", [1, -1], U[0] - U[1], E)
        W_inf = Projections.max_margin(V)
        margins = (V * W_inf).sum((1, 2))
        f1 = (seen["W"] * W_inf).sum((1, 2))
        f2 = np.linalg.norm(seen["W"] - f1[:, None, None] * W_inf, axis=(1, 2))
        least = Projections.guarantee(f1, f2, margins, V, E, W_inf, run.norm)
        bound = np.log1p(np.exp(-least)) @ p.max(0)
        certain, slope = (least > 0).all(1), np.diff(f2)
        slope = slope[np.abs(slope) > 1e-12 * f2.max()]
        ratio = f2[[run.steps // 10, -1]] / f1[[run.steps // 10, -1]]
        return {"f1": f1[at], "f2": f2[at], "guarantee": bound[at],
                "slack": (bound - seen["loss"]).min(),
                "broken": (certain & (seen["accuracy"] < 1)).sum(),
                "turns": (np.diff(np.sign(slope)) != 0).sum(), "aligned": ratio[1] / ratio[0],
                "limit": math.log(p[:, 0].max() / p[:, 1].max()) / 2}

    def claims(arrays, say):
        zero = dict(emb="canonical", norm="none", init_scale=0.)
        say("f2-limit", "two orthonormal tokens from zero, without N: f2 goes to log(p1/p2) / 2 "
            "(off by; nothing is random here)", OURS,
            float(np.abs(at_end(arrays, "f2", **zero) - of(arrays, "limit", **zero)).max()), "<", .01)
        for norm in "none", "sphere":
            turns = by_seed(arrays, arrays["turns"], pick(arrays, norm=norm))
            say(f"oscillates-{norm}", f"f2 oscillates, N {norm}: its slope changes sign more than twice "
                "(most of all starts)",
                f'{NOTES}: "mecanismes transitoires (peut etre oscillatoires)"', turns, ">", 2)
        promise = f'{NOTES}: "si f_1 est grand et f_2 est petit on a une guarantie"'
        say("guarantee-loss", "f1 and f2 bound the loss from above at every step (least slack, nats)",
            promise, float(arrays["slack"].min()), ">", -1e-12)
        say("guarantee-accuracy", "where they promise it every answer is right (steps broken)", promise,
            int(arrays["broken"].sum()), "is", 0)
        for norm in "none", "sphere":
            mine = pick(arrays, emb="canonical", norm=norm, init_scale=1.)
            say(f"aligns-{norm}", f"N {norm}: W keeps turning to the max-margin direction, f2 / f1 "
                "falls by a tenth or more over the last nine tenths (ratio)", f"{NOTES}: W_inf",
                arrays["aligned"][mine], "<", .9)
        level = [at_end(arrays, "loss", emb="canonical", norm="none", init_scale=s) for s in (0., 10.)]
        say("init-matters", "without N the start matters: from N(0, 100/d) the loss ends at half of "
            "that from zero or less, or at twice or more (larger ratio)",
            f'''{NOTES}: "Comment initialiser les poids? Est-ce que c'est important?"''',
            np.maximum(level[1] / level[0], level[0] / level[1]), ">", 2)

    @of_own_points
    def draw_projections(arrays, flags):
        figure, (b, c, d) = common.panels(3, "Max-margin direction W_inf: f1 along it, f2 the rest, and "
            "what they guarantee (two orthogonal tokens)", flags, 3)
        t = arrays["step"] + 1
        for scale, colour in zip((0., .1, 1., 10.), common.COLOURS):
            for norm, style, loss in ("none", "-", c), ("sphere", ":", d):
                mine = np.flatnonzero(pick(arrays, emb="canonical", norm=norm, init_scale=scale))
                for i, r in enumerate(mine):
                    b.plot(t, arrays["f2"][r], style, color=colour, lw=.5 if i else 1.4)
                for r in mine[:1]:
                    loss.plot(t, arrays["loss"][r], color=colour, label=f"W_0 scale {scale:g}")
                    loss.plot(t, arrays["guarantee"][r], "--", color=colour, lw=.9)
        limit = np.nanmax(arrays["limit"])
        common.shelf(b, limit, f"log(p1/p2)/2 = {limit:.3f}: from zero, without N")
        common.shelf(d, floor_of(2), f"floor {floor_of(2):.4f}", "left")
        finish(b, "step + 1", "f2", f"{flags.runs} seeds; dotted: with N", "x", yscale="symlog",
               ylim=(0, None))
        finish(c, "step + 1", "loss (nats)",
               "without N, one seed; dashed: guaranteed by f1 and f2", "xy")
        finish(d, "step + 1", "loss (nats)", "with N, one seed; dashed: guaranteed", "x")
        return figure


class Spikes(Study):
    """Which steps raise the loss, is a vector near zero when they do, and does its length cause it?

    A spike: a step, from EARLY on, over which the loss rises by a tenth and .05 nats; largest [R]: the
    step of a run's largest, or -1; rises [R]: steps that raise the loss. There may be, [R, T]: small, a
    token's |W e_x| below half its median over training; sharp, lr times the largest Hessian eigenvalue
    above 2; turned, a W e_x turns by more than 90 degrees. sharpest [R]: the largest eigenvalue of all
    steps; loss_at [R, 12], hidden_at [R, 12, N, d], around the largest spike; relieved [R, 2]:
    see `relieved`."""
    path = True
    defaults = dict(steps=300, runs=16, cos=.95, lr=10., block=64)
    smoke = dict(steps=20, runs=2, evals=2)
    EARLY = 10
    CAUSES = {"small": "a |W e_x| is below half its median", "sharp": "lr sharpness / 2 > 1",
              "turned": "a W e_x turns by > 90 degrees"}

    def points(flags):
        rates = [float(f"{rate:.3g}") for rate in np.geomspace(.5, 32, 40)] + [1., 10.]
        plain = [dict(norm="none", init_scale=0., cos=flags.cos, lr=rate, optimiser="gd")
                 for rate in rates]
        grid = (("gd", (.3, 1., 10.)), ("momentum", (.1, 1., 10.)), ("adam", (.03, .3, 1.)))
        return plain + [dict(norm="sphere", cos=cos, lr=rate, optimiser=kind)
                        for kind, rates in grid for rate in rates for cos in (0., .5, .95)]

    def relieved(W, n, lr, usual):
        """Rise of the loss in gd's step from W, over what it was, if the step starts from another member
        of the class C(W), which has the same vectors N(W e_x) and the same loss: with the token that is
        shortest for its usual length made that long; and (control) with the others made
        twice as long."""
        h = W @ n["E"].T
        share = h.norm(dim=0) / torch.tensor(usual)
        short = torch.arange(len(share)) == share.argmin()
        def rise(factors):
            V = factors * h @ torch.linalg.pinv(n["E"].T)
            return observed(V - lr * gradient(V, n), n) - observed(V, n)
        own = rise(torch.ones_like(share))
        return [rise(torch.where(short, 1 / share, 1.)) / own, rise(torch.where(short, 1., 2.)) / own]

    def measure(run, n, seen):
        W, loss, T = seen["W"], seen["loss"], run.steps
        h = hidden(W, n["E"])
        size, rise = np.linalg.norm(h, axis=2), np.diff(loss)
        spike = np.where((rise > .1 * loss[:-1]) & (rise > .05) & (np.arange(T) >= Spikes.EARLY),
                         rise, 0)
        s = int(spike.argmax()) if spike.any() else -1
        sharpness = torch.vmap(lambda W: curvature(W, n)[-1])(torch.tensor(W)).numpy()
        window = np.arange(s - 5, s + 7).clip(0, T)
        relief = [math.nan] * 2
        if s >= 0 and run.norm == "sphere" and run.optimiser == "gd" and run.n_tokens <= run.d_model:
            relief = Spikes.relieved(torch.tensor(W[s]), n, run.lr, np.median(size, 0))
        return {"largest": s, "rises": (rise > 1e-12).sum(), "relieved": relief,
                "small": (size < np.median(size, 0) / 2).any(1)[:-1],
                "sharp": run.lr * sharpness[:-1] > 2,
                "turned": ((h[1:] * h[:-1]).sum(2) < 0).any(1), "sharpest": sharpness.max(),
                "height": spike.max(), "loss_at": loss[window], "hidden_at": h[window]}

    def excess(arrays, cause, kind):
        """At the largest spike of each run with N: whether the cause is there [n], and in which share of
        the other seeds of the same configuration at the same step [n]."""
        there, usual = [], []
        for r in np.flatnonzero(pick(arrays, norm="sphere", optimiser=kind) & (arrays["largest"] >= 0)):
            s = int(arrays["largest"][r])
            others = pick(arrays, norm="sphere", **{k: arrays[k][r] for k in ("optimiser", "lr", "cos")})
            others &= (arrays["seed"] != arrays["seed"][r]) & (arrays["largest"] != s)
            if others.any():
                there.append(arrays[cause][r, s])
                usual.append(arrays[cause][others, s].mean())
        return np.array(there), np.array(usual)

    def claims(arrays, say):
        plain = pick(arrays, norm="none", seed=arrays["seed"].min())  # from zero: seeds are copies
        edge = 2 / arrays["sharpest"][plain].max()
        first = float(arrays["lr"][plain & (arrays["rises"] > 0)].min())
        say("edge", "without N no step raises the loss below lr = 2 / (largest Hessian eigenvalue) = "
            f"{edge:.3f} (first rate that does)", "descent lemma", first, ">", edge)
        lone = pick(arrays, norm="sphere", optimiser="gd", cos=0.)
        say("decoupled-cannot-cross", "with N and gd orthogonal tokens never turn by 90 degrees "
            "in a step (steps)", OURS, int(arrays["turned"][lone].sum()), "is", 0)
        quote = f'{NOTES}: "crossing at zero of vectors that get normalized"'
        for kind in "gd", "momentum", "adam":
            for cause, words in Spikes.CAUSES.items():
                there, usual = Spikes.excess(arrays, cause, kind)
                n, more = len(there), there - usual
                gap = more.sum() / max(n, 1)
                half = 2 * math.sqrt(((more - gap) ** 2).sum()) / max(n, 1)  # two standard errors
                say(f"spike-{cause}-{kind}", f"with N, {kind}, at the largest spike of a run: {words} "
                    f"in {there.sum():g} of {n}, and by a quarter more often than at the same step of "
                    "other seeds", quote, (gap, gap - half, gap + half) if n > 9 else [], ">", .25)
        relief = arrays["relieved"][np.isfinite(arrays["relieved"]).all(1)].T
        for i, id, words in ((0, "short", "the short vector as long as usual"),
                             (1, "other", "(control) the other vector twice as long")):
            say(f"{id}-causes", f"made in W's class C(W) with {words}, gd's step of the largest spike "
                "raises the loss by less than half as much (ratio, spikes)", quote, relief[i], "<", .5)

    @of_own_points
    def draw_spikes(arrays, flags):
        figure, (c, d, e) = common.panels(
            3, "With N: the largest spike of gd, and what makes spikes go", flags, 3)
        gd = pick(arrays, norm="sphere", optimiser="gd")
        r = int(np.where(gd, arrays["height"], 0).argmax())
        s, h = int(arrays["largest"][r]), arrays["hidden_at"][r]
        at = np.arange(s - 5, s + 7)
        c.plot(at, arrays["loss_at"][r], ".-", color=BLACK, label="loss (nats)")
        for x, colour in (0, BLUE), (1, GREEN):
            c.plot(at, np.linalg.norm(h[:, x], axis=1), ".-", color=colour, label=f"|W e_{x + 1}|")
            d.plot(*h[:, x].T, ".-", color=colour, label=f"W e_{x + 1}")
            d.plot(*h[5:7, x].T, "-", lw=2.5, color=RED, label="the spike's step" if x else None)
        c.axvline(s, color="grey", lw=.6)
        d.plot(0, 0, "k+", ms=12)
        finish(c, "step", "", f"with N: gd, cos {arrays['cos'][r]:g}, lr {arrays['lr'][r]:g}, "
               f"seed {arrays['seed'][r]}", "y")
        finish(d, "first coordinate", "second", "the same steps in the plane; +: the origin",
               aspect="equal")
        relief = arrays["relieved"][np.isfinite(arrays["relieved"]).all(1)]
        names = "short vector made\nas long as usual", "control: the other\nvector twice as long"
        e.plot(names, relief.T.clip(-1, 3), ".-", color=BLUE, lw=.3)
        common.shelf(e, .5, "gone below")
        finish(e, "", "rise of the loss / as it was (cut at -1, 3)",
               f"gd: the step of {len(relief)} largest spikes again", xlim=(-.5, 1.5))
        return figure


class Rates(Study):
    """How many steps until all is correct, over a thousand settings of (p1, cos, learning rate)?

    correct [R]: the first step from which every token has its class, to the end; infinite where none."""
    defaults = dict(runs=1, init_scale=0., block=1000)
    smoke = dict(steps=4, evals=2, block=0)

    def points(flags):
        axis = np.linspace(.5, .95, 10).round(3).tolist()
        rates = np.geomspace(.1, 10, 10).round(4).tolist()
        return [dict(p1=p1, cos=cos, lr=rate) for p1 in axis for cos in axis for rate in rates]

    def measure(run, n, seen):
        wrong = np.flatnonzero(seen["accuracy"] < 1)
        last = wrong[-1] if len(wrong) else -1
        return {"correct": last + 1. if last < run.steps else math.inf}

    def claims(arrays, say):
        correct, late = arrays["correct"], np.isfinite(arrays["correct"]) & (arrays["correct"] >= 20)
        pairs = [(arrays["lr"] * correct)[late & pick(arrays, p1=p, cos=c)]
                 for p in np.unique(arrays["p1"]) for c in np.unique(arrays["cos"])]
        spans = [flow.max() / flow.min() for flow in pairs if len(flow) > 2]
        say("flow", "where it takes 20 steps or more lr x steps does not depend on lr: gradient flow "
            f"({len(spans)} pairs of p1, cos; largest over smallest)", OURS, float(max(spans)), "<", 1.1)
        say("all-learn", "every run is all correct in the end (runs that are not)", OURS,
            float(np.isinf(correct).sum()), "is", 0.)

    @of_own_points
    def draw_rates(arrays, flags):
        figure, axes = common.panels(4, "log10 of the steps until all is correct and stays so "
            f"(white: not in {flags.steps})", flags, 2, (5, 4))
        ps, cs, rates = (np.unique(arrays[k]) for k in ("p1", "cos", "lr"))
        for ax, rate in zip(axes, rates[::3]):
            grid = arrays["correct"][arrays["lr"] == rate].reshape(len(ps), len(cs))
            grid = np.where(np.isinf(grid), np.nan, np.log10(np.maximum(grid, 1)))
            common.image(ax, grid, f"lr {rate:.3g}", figure, "cos of the two tokens", "p1", (0, 3))
            ax.set(xticks=[0, 9], xticklabels=cs[[0, -1]], yticks=[0, 9], yticklabels=ps[[0, -1]])
        return figure

# Modular sums in the plane: law, model, step.
BITS = 4  # of a token
PARTS = {"attention": ("query", "W_V"), "mlp": ("W_in", "b_in", "W_out", "b_out")}  # for --freeze


def plane_codes(run):
    """Distinct sequences [n_train + n_train / 4], the last for tests; a token is BITS of a number."""
    place, seed = np.arange(run.seq_length), common.generator(run.seed, "law").initial_seed()
    total, count = run.modulus ** run.seq_length, run.n_train + run.n_train // 4
    drawn = np.random.default_rng(seed).choice(total, count, replace=False)
    return torch.tensor((drawn[:, None] // run.modulus ** place % run.modulus << BITS * place).sum(1))


def plane_tokens(flags, code, number):
    """Sequences x [n, L] of codes [n], and their classes y [n], the sum of the first k tokens mod p."""
    place = torch.arange(flags.seq_length, device=code.device)
    x = (code[:, None] >> BITS * place) & (2 ** BITS - 1)
    return x, (x * (place < number["sparsity"])).sum(1) % number["modulus"]


def plane_init(flags, generator):
    """Parameters of one run: E [V, d], P [L, d], query [d], W_V [d, d], W_in [d, H], b_in [H], W_out [H,
    d], b_out [d], U [V, d]; embeddings, U and query N(0, 1), others uniform within 1 / sqrt(inputs)."""
    V, L, d, H = flags.vocab, flags.seq_length, flags.d_model, flags.max_width
    def normal(*shape):
        return torch.randn(shape, generator=generator)
    def uniform(inputs, *shape):
        return (2 * torch.rand(shape, generator=generator) - 1) * inputs ** -.5
    return {"E": normal(V, d), "P": normal(L, d), "query": normal(d), "W_V": uniform(d, d, d),
            "W_in": uniform(d, d, H), "b_in": uniform(d, H), "W_out": uniform(flags.width, H, d),
            "b_out": uniform(flags.width, d), "U": normal(V, d)}


def rms(x):
    """x / sqrt(mean x^2 + 1e-5) along the last axis."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)


def plane_forward(params, x, number):
    """All stages of sequences x [n, L]: e, u [L, V, d], score [L, V] of each token at each position; h
    [n, d], hidden [n, H] (of which `width` units are there), out [n, d], logits [n, V] (not of tokens
    from p on). Keys and values depend on position and token alone: with w = exp(score), h is the sum of
    a sequence's entries of the table w u W_V over that of its w, one product with one-hot rows."""
    e = params["P"][:, None] + params["E"]
    u = rms(e)
    score = u @ params["query"] * u.shape[-1] ** -.5
    w = torch.exp(score - score.detach().amax())[..., None]  # scores lie within +-|q|: none underflows
    table = torch.cat([w * (u @ params["W_V"]), w], -1)
    tokens, units = (torch.arange(params[k].shape[0], device=x.device) for k in ("E", "b_in"))
    sums = (x[..., None] == tokens).to(e.dtype).flatten(-2) @ table.flatten(0, 1)
    h = sums[:, :-1] / sums[:, -1:]
    v = rms(h)
    before = sum(v[:, i:i + 1] * params["W_in"][i] for i in range(v.shape[1]))  # fuses with GELU
    hidden = gelu(before + params["b_in"]) * (units < number["width"])
    out = h + hidden @ params["W_out"] + params["b_out"]
    logits = out @ torch.where(number["untied"], params["U"], params["E"]).T
    logits = torch.where(tokens < number["modulus"], logits, -1e9)
    return {"e": e, "u": u, "score": score, "h": h, "hidden": hidden, "out": out, "logits": logits}


def plane_losses(logits, y):
    """-log p(y) in nats [n]."""
    right = y[:, None] == torch.arange(logits.shape[-1], device=y.device)
    return -(logits.log_softmax(-1) * right).sum(-1)


def plane_start(run):
    """Step 0 of one run."""
    params = plane_init(run, common.generator(run.seed, "init"))
    return {"params": params, **common.adam_init(params)}


def plane_constants(run):
    """The sequences of one run, and which parts of it learn."""
    learns = {f"{part}_learns": torch.tensor(part != run.freeze) for part in PARTS}
    return {"code": plane_codes(run), **learns}


def plane_step_of(flags):
    """The training step of ONE run."""
    def step(state, number):
        drawn = common.integers(common.key(number["seed"], 0, state["t"]), flags.n_train, flags.batch)
        x, y = plane_tokens(flags, number["code"][drawn], number)
        loss_of = lambda params: plane_losses(plane_forward(params, x, number)["logits"], y).mean()
        grads, loss = grad_and_value(loss_of)(state["params"])
        for part, names in PARTS.items():
            grads |= {k: grads[k] * number[f"{part}_learns"] for k in names}
        params, optimiser = common.adamw(state["params"], grads, state, number["lr"])
        return {"params": params, **optimiser}, {"loss": loss}
    return step


def plane_evaluate_of(flags):
    """What is evaluated of ONE run on the tests: loss and accuracy (NaN where the loss is)."""
    def evaluate(params, number):
        x, y = plane_tokens(flags, number["code"][flags.n_train:], number)
        logits = plane_forward(params, x, number)["logits"]
        loss, right = plane_losses(logits, y).mean(), logits.argmax(-1) == y
        return {"loss": loss, "accuracy": right.float().mean() + 0 * loss}
    return evaluate


def share_above(*groups):
    """(difference, low, high) of the shares of true ones in two groups, each with one hit and one miss
    more, 95 % (Agresti & Caffo 2000)."""
    n = np.array([len(hits) + 2 for hits in groups])
    p = np.array([np.sum(hits) + 1 for hits in groups]) / n
    gap, half = p[0] - p[1], 2 * (p * (1 - p) / n).sum() ** .5
    return gap, gap - half, gap + half


def explained_by(h, rows):
    """Share of the variance of h [n, d] between classes of equal rows [n, m]: 1 - within / total."""
    member = one_hot(rows.unique(dim=0, return_inverse=True)[1]).to(h.dtype)
    means = member.T @ h / member.sum(0)[:, None]
    return 1 - ((h - member @ means) ** 2).sum() / ((h - h.mean(0)) ** 2).sum()


MARKERS = "os^DvP*"  # of tokens and of classes: 0, 1, 2 (triangles), ..
TUNED = {"p=2 to p=3": (dict(modulus=2), dict(modulus=3)),  # settings of the parent, and of the child
         "k=3 to k=5": (dict(sparsity=3), {}), "k=5 to k=3": ({}, dict(sparsity=3))}
CLUSTERING, VISUAL = "Odonnat et al. 2024, Clustering Head", "research notes on clusters in the plane"


def like_first(arrays, change):
    """Mask [R] of the runs with the settings of the first, but for those in `change`."""
    return pick(arrays, **{k: arrays[k][0] for k in OWN} | change)


def best(arrays, change):
    """The number of the most accurate of these runs."""
    return np.where(like_first(arrays, change), np.nan_to_num(arrays["accuracy"]), -1).argmax()


def plane_number(run):
    """What the functions of the core call `number`, of one run."""
    return common.run_of(common.numbers([run], plane_constants), 0)


def draw_points(ax, x, label, fill, title):
    """x [n, d] (d > 2: two principal components), markers by label [n], colours by fill [n]."""
    ax.clear()
    if x.shape[1] > 2:
        x = (x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2].T
    for y in label.unique():
        mine = label == y
        ax.scatter(*x[mine].T, 14, fill[mine], marker=MARKERS[y % 7], vmin=0, vmax=fill.max(),
                   edgecolors="black", linewidths=.3, label=int(y))
    finish(ax, "", "", title, xticks=[], yticks=[])


class Clusters(common.Study):
    """Are modular sums memorised or computed, how does it look in the plane, does fine-tuning help?

    arrays: one entry a run [R], all settings; accuracy, at the end (NaN: diverged or stopped), and
    train_accuracy; share of the variance of h between counts of the first k tokens (r2_counts), between
    signed sums +-x_1 .. +-x_k with the best signs (r2_signed; with p = 2 of the same parity); share of
    answers that stay with the other tokens (keeps_others) or the first k (keeps_first) of another
    sequence. eval_step [M], eval_accuracy [R, M]; frame_* [M, runs from scratch, ...],
    their parameters."""
    defaults = dict(steps=8000, runs=12, lr=3e-3, batch=32, snapshots=True)
    smoke = dict(steps=4, runs=1, n_train=64, evals=2)

    def check(flags):
        for f in sum(common.groups_of_runs(flags), []):
            fits = (f.modulus <= f.vocab and f.width <= f.max_width and f.sparsity <= f.seq_length
                    and 5 / 4 * f.n_train <= f.modulus ** f.seq_length and f.freeze in ("none", *PARTS))
            if not fits or f.d_model < 2 or not f.batch or f.source:
                raise common.Stop("clusters need modulus <= vocab, width <= max-width, sparsity <= "
                                  "seq-length, n-train <= .8 modulus ^ seq-length, freeze none, "
                                  "attention or mlp, d-model >= 2, a batch and no source")

    def points(flags):
        changes = [{}, dict(modulus=3), dict(sparsity=3), dict(modulus=3, sparsity=2), dict(width=8),
                   dict(width=32), dict(untied=False), dict(lr=1e-3), dict(lr=1e-2),
                   dict(freeze="attention"), dict(freeze="mlp")]
        return changes[:3] if flags.smoke else changes

    def measure(run, params):
        number, n = plane_number(run), run.n_train
        x, y = plane_tokens(run, number["code"], number)
        first, others = torch.arange(run.seq_length) < run.sparsity, x.roll(1, 0)  # they have no order
        mixed = torch.cat([x, torch.where(first, x, others), torch.where(first, others, x)])
        seen, summed = plane_forward(params, mixed, number), x[:, :run.sparsity]
        answers, h = seen["logits"].argmax(-1).view(3, -1), seen["h"][:len(x)]
        signed = summed @ torch.tensor([*grid_of((1, -1), repeat=run.sparsity)]).T
        keeps = (answers == answers[0]).float().mean(1)
        return {"r2_counts": explained_by(h, summed.sort(1)[0]),
                "r2_signed": max(explained_by(h, column) for column in signed.split(1, 1)),
                "keeps_others": keeps[1], "keeps_first": keeps[2],
                "train_accuracy": (answers[0] == y)[:n].float().mean()}

    def collect(trained):
        """The arrays with an entry for each run."""
        rows = []
        for t in trained:
            for r, run in enumerate(t.runs):
                params, accuracy = common.run_of(t.params, r), t.metrics["eval_accuracy"][:, r]
                rows.append({k: getattr(run, k) for k in ("seed", *OWN)}
                            | Clusters.measure(run, {k: p.nan_to_num() for k, p in params.items()})
                            | {"eval_accuracy": accuracy, "accuracy": accuracy[-1]})
        return {k: np.array([row[k] for row in rows]) for k in rows[0]}

    def compute(flags, folder):
        law = plane_step_of, plane_evaluate_of, plane_constants
        trained = common.train(common.groups_of_runs(flags), folder, plane_start, *law)
        arrays, whole = Clusters.collect(trained), trained[0]
        if common.NOW.asked:
            return arrays
        def begin(run):
            params = common.run_of(whole.params, best(arrays, TUNED[run.source][0]))
            return {"params": params, **common.adam_init(params)}
        if {*flags.given}.isdisjoint(("modulus", "sparsity", "sweep")):
            tuned = [replace(run, source=source, **child) for source, (_, child) in TUNED.items()
                     for run in whole.runs[:flags.runs]]
            more = Clusters.collect(common.train([tuned], folder / "finetune", begin, *law))
            arrays = {k: np.concatenate([x, more[k]]) for k, x in arrays.items()}
        arrays |= {f"frame_{k}": x for k, x in whole.snapshots.items()}
        return arrays | {"eval_step": whole.metrics["eval_step"]}

    def claims(arrays, say):
        final, whole = arrays["accuracy"], pick(arrays, freeze="none", source="")
        memory = f'{VISUAL}: "Visualize memorization vs. algorithm"'
        for p, k in (3, 2), (2, 5):
            good = (final > .95) & whole & pick(arrays, modulus=p, sparsity=k)
            those = f"p = {p}, k = {k}, the runs from scratch above .95"
            say(f"merges-{p}", f"{those}: equal counts of the first k are merged, nothing else "
                "moves h (R^2)", memory, arrays["r2_counts"][good], ">", .9)
            say(f"ignores-{p}", f"{those}: answers stay with the other tokens of another sequence "
                "(an intervention)", CLUSTERING, arrays["keeps_others"][good], ">", .95)
            say(f"uses-{p}", f"{those}: but not with its first k (control)", OURS,
                arrays["keeps_first"][good], "<", 1 / p + .1)
            if p == 2:
                say("merges-signed", f"{those}: sequences of one signed sum of the first k are merged "
                    "(R^2)", OURS, arrays["r2_signed"][good], ">", .9)
        some = (arrays["train_accuracy"] > 1 / arrays["modulus"] + .1) & pick(arrays, freeze="none")
        say("no-memory", "runs that learn anything are as good on the tests (difference of accuracies)",
            memory, (arrays["train_accuracy"] - final)[some], "<", .05)
        solved, two = arrays["eval_accuracy"].max(1) > .95, whole & pick(arrays, modulus=2)
        for key in "counts", "signed":
            more = arrays[f"r2_{key}"] > np.median(arrays[f"r2_{key}"][two])
            say(f"accuracy-follows-{key}", f"p = 2: of the half of the runs in which the {key} (sums) "
                "of the first k explain more of h, more come above .95 (difference of shares)", VISUAL,
                share_above(solved[two & more], solved[two & ~more]), ">", 0)
        for source, (_, child) in TUNED.items():
            tuned, scratch = pick(arrays, source=source), like_first(arrays, child)
            say(f"finetune-from-{source[:3]}", f"{source}, from the best run: more seeds come above .95 "
                "than from scratch in as many steps (difference of shares)",
                f'{VISUAL}: "fine-tuning experiments"; ours',
                share_above(solved[tuned], solved[scratch]), ">", 0)

    def draw_clusters(arrays, flags):
        title = f"Sum of the first tokens mod p, of {flags.seq_length}, all in d = {flags.d_model}"
        figure, (a,) = common.panels(1, title, flags, size=(6, 4.4))
        names, final = labels(arrays), arrays["accuracy"]
        a.plot(final, names, "o", color=BLUE, ms=4, alpha=.5)
        a.plot(1 / arrays["modulus"], names, "|", color="grey", ms=9, label="chance")
        a.invert_yaxis()
        finish(a, "test accuracy at the end, a dot a seed", "")
        return figure

    def stages(arrays, flags, change):
        """(figure, draw(i)) of the best run of a configuration: its stages at evaluation i."""
        r = best(arrays, change)
        run = replace(flags, **{k: arrays[k][r].item() for k in ("seed", *OWN)})
        number, p, k = plane_number(run), run.modulus, run.sparsity
        x, y = plane_tokens(run, number["code"][-512:], number)
        place, token = torch.cartesian_prod(torch.arange(run.seq_length), torch.arange(p)).T
        figure, axes = common.panels(6, " ", flags, 3, (4.6, 3.6))
        def draw(i):
            params = {k[6:]: torch.tensor(v[i, r]) for k, v in arrays.items() if "frame_" in k}
            seen = plane_forward(params, x, number)
            e, u, score = (seen[stage][:, :p].flatten(0, 1) for stage in ("e", "u", "score"))
            draw_points(axes[0], e, token, place, "embeddings (marker: token, colour: position)")
            draw_points(axes[1], u, token, place, "normalised")
            attention = torch.stack([place, score.exp()], 1)
            draw_points(axes[2], attention, token, place, "attention weight by position")
            titles = ("after attention (marker: y, colour: sum)", "hidden units (2 components)",
                      "after the MLP")
            for ax, stage, title in zip(axes[3:], ("h", "hidden", "out"), titles):
                draw_points(ax, seen[stage], y, x[:, :k].sum(1), title)
            figure.suptitle(f"Sum of the first {k} tokens mod {p}: step {arrays['eval_step'][i]}, "
                            f"test accuracy {arrays['eval_accuracy'][r, i]:.2f}")
        return figure, draw

    def draw_sheet(arrays, flags, change={}):
        if "frame_E" in arrays:
            figure, draw = Clusters.stages(arrays, flags, change)
            draw(-1)
            return figure

    def draw_sheet3(arrays, flags):
        return Clusters.draw_sheet(arrays, flags, dict(modulus=3, sparsity=2))

    def draw_training(arrays, flags):
        """An animation over training."""
        if "frame_E" in arrays:
            figure, draw = Clusters.stages(arrays, flags, {})
            with TemporaryDirectory() as folder:
                path = Path(folder, "frames.gif")
                FuncAnimation(figure, draw, len(arrays["eval_step"])).save(path, "pillow", 3)
                return path.read_bytes()


STUDIES = [Landscape, Ranking, Plane, Norm, Convexity, Projections, Spikes, Rates, Clusters]


if __name__ == "__main__":
    raise SystemExit(common.main(Flags, STUDIES))
