"""Why do LayerNorm and Adam help so small a model, and what do normalised vectors do to its landscape?

Law: a token x ~ p(x) has class y(x) = x mod M (or another one, with --label-noise). Model: an associative memory, one matrix
W between fixed vectors: s(y|x) = u_y . N(W e_x), N nothing or a normalisation. Loss: sum_x p(x) CE(s(.|x), y(x)), in nats. With
N = M = 2 and N(h) = h / |h| it lives on a torus of two angles with one minimum, log(1 + exp(-sqrt 2)) = .2176; without N it
depends on gamma = W'(u_1 - u_2) alone. Floor under N, u orthonormal: log(1 + (M - 1) exp(-sqrt(M / (M - 1)))).

    python exp_layernorm_landscape.py                      26 s on one core: both landscapes, and five ways down
    python exp_layernorm_landscape.py --study norm         60 s: does |W| diverge?
    python exp_layernorm_landscape.py --study clusters    160 s: modular sums in the plane, their clusters and spikes

Studies: `landscape` (default), `ranking` (SGD, LN, Adam), `plane` (are trajectories planar?), `norm`, `convexity` (local
minima), `projections` (on the max-margin direction), `spikes`, `rates` (a thousand runs), `clusters`; one figure or more each.
arrays.npz of all but `clusters` holds, one entry a run, settings; W [R, S, d, d] at the steps W_step [S] (all of them, or
log-spaced ones where that would pass 64 MB), E [R, N, d], U [R, M, d], joint [R, N, M], p [R, N], y [R, N]; loss, accuracy,
grad_norm, weight_norm, min_hidden_norm [R, T+1]; in the papers' convention h = W e_x (column vectors); and what the docstrings
of `compute_*` name. Where shapes differ W, E, U, joint, p, y lie in group*/arrays.npz. metrics.npz: curves [T, R].

Claims come from research notes on normalised associative memories (French), from Cabannes, Simsek & Bietti 2024, "Learning
Associative Memories with Gradient Descent", from Odonnat, Bouaziz & Cabannes 2024, "Clustering Head", and from this project.
"""
import functools
import itertools
import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.func import grad_and_value

import common_v1 as common
from common_v1 import by_seed, flag, pick

# ---- Flags ----------------------------------------------------------------------------------------------------------

@dataclass
class Flags(common.Flags):
    study: Literal["landscape", "ranking", "plane", "norm", "convexity", "projections", "spikes", "rates",
                   "clusters"] = flag("landscape", "which question to ask")
    steps: int = flag(1000, "training steps", low=1)
    runs: int = flag(3, "seeds per configuration", low=1)
    n_tokens: int = flag(2, "N, number of tokens", low=1)
    n_classes: int = flag(2, "M, number of classes; token x has class x mod M", low=1)
    d_model: int = flag(2, "d, width", low=1)
    emb: Literal["canonical", "pair", "fan", "sphere", "gauss"] = flag(
        "pair", "e_x: unit vectors; two at --cos; 60 degrees apart in the plane; random on the sphere; N(0, 1/d)", number=True)
    unemb: Literal["canonical", "pair", "fan", "sphere", "gauss"] = flag("canonical", "u_y, as --emb", number=True)
    cos: float = flag(.5, "pair: cosine of the two tokens", number=True)
    law: Literal["uniform", "p1", "zipf"] = flag("p1", "p(x): uniform; --p1 and the rest alike; (x + 1)^-zipf", number=True)
    p1: float = flag(.75, "probability of the first token", number=True)
    zipf: float = flag(2., "exponent of the tokens' probabilities", low=0, number=True)
    label_noise: float = flag(0., "probability that a label is one of the other classes", number=True)
    norm: Literal["none", "sphere", "rms", "layernorm"] = flag("none", "N, what W e_x goes through", number=True)
    ln: Literal["sphere", "rms", "layernorm"] = flag("sphere", "ranking: the N that is called LN", number=True)
    eps: float = flag(1e-6, "inside the root of N", low=0, number=True)
    init_scale: float = flag(1., "W_0 ~ N(0, init_scale^2 / d); 0: from zero", low=0, number=True)
    optimiser: Literal["gd", "sgd", "momentum", "normalised", "sign", "adam"] = flag(
        "gd", "sgd is gd on a batch, normalised follows g/|g|, sign is Adam with betas and eps 0")
    lr: float = flag(.1, "learning rate", low=0, number=True)
    momentum: float = flag(.9, "heavy ball, of --optimiser momentum", low=0, number=True)
    beta1: float = flag(.9, "Adam's", low=0, number=True)
    beta2: float = flag(.999, "Adam's", low=0, number=True)
    adam_eps: float = flag(1e-8, "Adam's own eps", low=0, number=True)
    batch: int = flag(0, "pairs or sequences drawn a step (0: the exact expectation over the law)", low=0, number=True)
    dtype: Literal["float64", "float32"] = flag("float64", "floating-point type of W")
    modulus: int = flag(2, "clusters: p", low=2, high=100, number=True)
    seq_length: int = flag(12, "clusters: tokens a sequence", low=1, high=30)
    sparsity: int = flag(5, "clusters: the first tokens, which are summed", low=1, number=True)
    n_train: int = flag(2048, "clusters: training sequences, and as many at most for the test", low=1)
    width: int = flag(128, "clusters: hidden units of the MLP", low=1, number=True)
    untied: bool = flag(True, "clusters: the unembedding is not the token embedding", number=True)
    freeze: Literal["none", "attention", "mlp"] = flag("none", "clusters: what keeps its initial values", number=True)
    source: str = flag("", "clusters: start from this checkpoint.pt of a finished run (its first run)", number=True)
    vocab: int = flag(3, "clusters: token embeddings in memory, the largest p of a sweep", low=2)
    max_width: int = flag(128, "clusters: hidden units in memory, the largest width of a sweep", low=1)
    max_batch: int = flag(32, "clusters: sequences in memory, the largest batch of a sweep", low=1)
    evals: int = flag(25, "clusters: evaluations over training, equally spaced", low=1)

    most_in_block: ClassVar[int] = 1024
    per_study: ClassVar[dict] = {
        "ranking": dict(steps=100, runs=10, n_tokens=100, n_classes=5, d_model=10, emb="sphere", unemb="sphere", law="zipf",
                        batch=1024, optimiser="sgd"),
        "plane": dict(steps=150, n_tokens=5, n_classes=3, d_model=4, emb="gauss", unemb="gauss", law="zipf", zipf=1.,
                      eps=0.),
        "norm": dict(steps=3000, runs=16, emb="canonical", eps=0., lr=1.),
        "convexity": dict(steps=3000, runs=64, optimiser="momentum", n_tokens=1, n_classes=3, emb="canonical", unemb="fan",
                          law="uniform", norm="sphere", lr=.1),
        "projections": dict(steps=3000, runs=8, emb="canonical", lr=1.),
        "spikes": dict(steps=300, runs=16, cos=.95, lr=10.),
        "rates": dict(runs=1, init_scale=0.),
        "clusters": dict(steps=8000, runs=8, lr=3e-3, batch=32, optimiser="adam", snapshots=16),
        "smoke": dict(steps=2, runs=1, snapshots=1, n_train=64, evals=2, max_width=8, width=8)}

    def check(self):
        if self.study == "clusters":
            return check_clusters(self)
        N, M, d = self.n_tokens, self.n_classes, self.d_model
        for name, n in (("emb", N), ("unemb", M)):
            kind = getattr(self, name)
            if kind in ("pair", "fan") and d < 2:
                raise common.Stop(f"--{name} {kind} lies in the plane: --d-model {d} must be at least 2")
            if kind == "pair" and n != 2:
                raise common.Stop(f"--{name} pair is two vectors, not {n}")
            if kind == "canonical" and n > d:
                raise common.Stop(f"--{name} canonical: {n} vectors need --d-model {d} to be at least {n}")
        for name, low, high in (("cos", -1, 1), ("p1", 0, 1)):
            if not low < getattr(self, name) < high:
                raise common.Stop(f"--{name} {getattr(self, name)} must lie between {low} and {high}, both excluded")
        for name in ("label_noise", "momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise common.Stop(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 0 and below 1")
        if self.optimiser == "gd" and self.batch:
            raise common.Stop(f"--optimiser gd takes the exact law: with --batch {self.batch} it is called sgd")
        if self.optimiser == "sgd" and not self.batch:
            raise common.Stop("--optimiser sgd draws: give --batch, the number of pairs a step")
        if self.study == "landscape" and (N, M, d) != (2, 2, 2):
            raise common.Stop("--study landscape draws N = M = d = 2: leave --n-tokens, --n-classes and --d-model as they are")
        if self.norm != "none" and self.init_scale == 0:
            raise common.Stop(f"--norm {self.norm}: a zero W_0 has no direction, give --init-scale above 0")
        if self.dtype == "float64" and common.device(self).type == "mps":
            raise common.Stop("--device mps has no float64: add --dtype float32")

    def points(self):
        others = LAYER if self.study == "clusters" else CLUSTERS
        for name in (getattr(self, "given", set()) | set(common.swept(self))) & others:
            raise common.Stop(f"--{name.replace('_', '-')} says nothing in --study {self.study}")
        return [] if self.sweep else points_of(self)


def check_clusters(flags):
    """Raise Stop where the flags of the study `clusters` contradict each other."""
    for small, large in (("modulus", "vocab"), ("width", "max_width"), ("batch", "max_batch"), ("sparsity", "seq_length")):
        if getattr(flags, small) > getattr(flags, large):
            name = large.replace("_", "-")
            raise common.Stop(f"--{small} {getattr(flags, small)} must be at most --{name} {getattr(flags, large)}")
    if flags.batch < 1:
        raise common.Stop("--batch 0: the study clusters draws its sequences, at least one a step")
    if flags.modulus ** flags.seq_length > 2 ** 62:
        raise common.Stop(f"--modulus {flags.modulus}: p ^ --seq-length {flags.seq_length} must be at most 2^62")
    if flags.n_train >= flags.modulus ** flags.seq_length:
        raise common.Stop(f"--n-train {flags.n_train} must be below {flags.modulus}^{flags.seq_length} sequences")
    if flags.source and flags.source not in PARENTS:
        from_checkpoint(flags)


CLUSTERS = {"modulus", "seq_length", "sparsity", "n_train", "width", "untied", "freeze", "source", "vocab",
            "max_width", "max_batch", "evals"}  # flags of that study alone
LAYER = {"ln", "n_tokens", "n_classes", "emb", "unemb", "cos", "law", "p1", "zipf", "label_noise", "norm", "eps", "init_scale",
         "optimiser", "momentum", "beta1", "beta2", "adam_eps", "dtype"}  # and of all the others
LAW = ("n_tokens", "n_classes", "law", "p1", "zipf", "label_noise")  # what p(x, y) depends on
COLUMNS = [f.name for f in fields(Flags) if f.name not in {g.name for g in fields(common.Flags)}] + ["seed", "steps"]


# ---- Data law -------------------------------------------------------------------------------------------------------

def joint_of(flags):
    """p(x, y) [N, M] in float64: token x, class x mod M, or with probability label_noise one of the others."""
    N, M, rank = flags.n_tokens, flags.n_classes, torch.arange(flags.n_tokens, dtype=torch.float64)
    if flags.law == "p1":
        p = torch.full((N,), (1 - flags.p1) / max(N - 1, 1), dtype=torch.float64)
        p[0] = flags.p1 if N > 1 else 1.
    else:
        p = (rank + 1) ** -(flags.zipf if flags.law == "zipf" else 0.)
    right = torch.nn.functional.one_hot(torch.arange(N) % M, M).double()
    q = flags.label_noise if M > 1 else 0.
    return (p / p.sum())[:, None] * ((1 - q) * right + q * (1 - right) / max(M - 1, 1))


def draws(flags, chunk):
    """Empirical p(x, y) [CHUNK, N, M] of batches of drawn pairs: of a batch the loss only sees how often each comes."""
    return counted(flags.seed, chunk, flags.batch, *(getattr(flags, f) for f in LAW))


@functools.lru_cache(64)  # runs that differ in what trains them, not in what they see, share their draws
def counted(seed, chunk, batch, *law):
    """A multinomial by halving: of n draws Binomial(n, share) fall into the first half of the pairs, and so on in each half."""
    joint, g = joint_of(Flags(**dict(zip(LAW, law)))), common.generator(seed, "train", chunk)
    likely = joint.flatten().nonzero()[:, 0]
    p = torch.zeros(2 ** math.ceil(math.log2(len(likely))), dtype=torch.float64)
    p[:len(likely)] = joint.flatten()[likely]
    n = torch.full((common.CHUNK, 1), float(batch), dtype=torch.float64)
    while n.shape[1] < len(p):
        first, second = p.view(n.shape[1], 2, -1).sum(2).unbind(1)
        left = torch.binomial(n, (first / (first + second)).nan_to_num(0).expand_as(n).contiguous(), generator=g)
        n = torch.stack([left, n - left], 2).flatten(1)
    counts = torch.zeros(common.CHUNK, joint.numel(), dtype=torch.float64)
    counts[:, likely] = n[:, :len(likely)]
    return counts.view(-1, *joint.shape) / batch


def embeddings(kind, n, d, cos, generator):
    """n vectors [n, d] in float64."""
    if kind == "canonical":
        return torch.eye(n, d, dtype=torch.float64)
    if kind in ("pair", "fan"):  # in the first two coordinates
        fan = [math.radians(60 * ((k + 1) // 2) * (-1) ** k) for k in range(n)]  # 0, -60, 60, -120, ..: the first in the middle
        angle = torch.tensor([0., math.acos(cos)] if kind == "pair" else fan, dtype=torch.float64)
        return torch.nn.functional.pad(torch.stack([angle.cos(), angle.sin()], 1), (0, d - 2))
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True) if kind == "sphere" else x / math.sqrt(d)


def law_of(flags):
    """What a run is about: E [N, d], U [M, d], joint [N, M]."""
    g = common.generator(flags.seed, "law")
    return {"E": embeddings(flags.emb, flags.n_tokens, flags.d_model, flags.cos, g),
            "U": embeddings(flags.unemb, flags.n_classes, flags.d_model, flags.cos, g), "joint": joint_of(flags)}


# The study `clusters`: modular sums of sequences.

def sequences(flags):
    """Distinct sequences x [n_train + tests, L] and y = sum of the first `sparsity` mod p; the first n_train are for training.
    All others are the tests, up to n_train of them (p = 2, L = 12: 2,048; p = 3: 2,048 of the rest)."""
    p, L, generator = flags.modulus, flags.seq_length, common.generator(flags.seed, "law")
    total, n = p ** L, min(p ** L, 2 * flags.n_train)
    if total <= 2 ** 20:
        code = torch.randperm(total, generator=generator)[:n]
    else:
        code = torch.randint(total, (4 * n,), generator=generator).unique()
        code = code[torch.randperm(len(code), generator=generator)[:n]]
    x = code[:, None] // p ** torch.arange(L) % p
    return x, x[:, :flags.sparsity].sum(1) % p


def sample_sequences(flags, sequences, chunk):
    """CHUNK batches of the training set, x [CHUNK, max_batch, L] and y [CHUNK, max_batch]."""
    i = torch.randint(flags.n_train, (common.CHUNK, flags.max_batch), generator=common.generator(flags.seed, "train", chunk))
    return {"x": sequences[0][i].to(torch.uint8), "y": sequences[1][i].to(torch.uint8)}


def multisets(flags, x):
    """For each sequence of x [n, L] the number of its multiset (counts of each token among the first k), and of its first k
    tokens in order: what the best rule must know, and what it may."""
    first = x[:, :flags.sparsity]
    counts = torch.nn.functional.one_hot(first, flags.vocab).sum(1)
    number = lambda rows: rows.unique(dim=0, return_inverse=True)[1]
    return number(counts), number(first)


# ---- Model ----------------------------------------------------------------------------------------------------------
# Convention of the papers: h = W e_x, W [d, d]; logits s(y|x) = u_y . N(h). N(h) = gain c / rho with c = h - centre mean(h)
# and rho = sqrt(spread |c|^2 + eps): every norm is four numbers, so runs with different norms share one program.

def norm_numbers(flags):
    """N as (gain, centre, spread, eps)."""
    d = flags.d_model
    return dict(zip(("gain", "centre", "spread", "floor"), {
        "none": (1., 0., 0., 1.), "sphere": (1., 0., 1., flags.eps), "rms": (1., 0., 1 / d, flags.eps),
        "layernorm": (1., 1., 1 / d, flags.eps)}[flags.norm]))


def product(a, b):
    """a @ b; of tiny matrices as a sum, which the compiler fuses with its neighbours over all runs."""
    return a @ b if a.shape[-1] > 6 else (a[:, :, None] * b[None]).sum(1)


def centred(h, n, axis=1):
    """c and 1 / rho of hidden vectors h = W e_x that lie along an axis: rows [N, d] or columns [d, N]."""
    c = h - n["centre"] * h.mean(axis, keepdim=True)
    return c, 1 / (n["spread"] * (c * c).sum(axis, keepdim=True) + n["floor"]).sqrt()


def normalised(h, n):
    """N(h) [N, d]."""
    c, scale = centred(h, n)
    return n["gain"] * scale * c


def logits(W, n):
    """s [N, M]."""
    return product(normalised(product(n["E"], W.T), n), n["U"].T)


def losses(s, axis=1):
    """-log softmax(s) over the classes, along an axis, softmax, and 1 where a class is the one best; exact down to the smallest
    loss, as that of the best class is log1p of the others."""
    most = s.amax(axis, keepdim=True)
    e = (s - most).exp()
    top = (e == 1).to(s.dtype)  # in floats: sums of booleans do not vectorise
    ties = top.sum(axis, keepdim=True) - 1
    others = (e * (1 - top)).sum(axis, keepdim=True) + ties
    return most - s + torch.log1p(others), e * (1 / (1 + others)), top * (ties < .5).to(s.dtype)


def loss_and_gradient(W, joint, n):
    """What is seen of W under the law (loss, accuracy, where a tie is an error, smallest |h| of a token) and dL/dW [d, d] under
    `joint`, the law's or a batch's: delta = dL/ds = p(x) softmax - p(x, y), written as a difference of two exact products. All
    in columns, [d, N] and [M, N], so that tokens lie side by side."""
    c, scale = centred(product(W, n["E"].T), n, 0)
    nll, soft, best = losses(product(n["U"], n["gain"] * scale * c), 0)
    apart, joint, law = 1 - torch.eye(len(soft), dtype=W.dtype, device=W.device), joint.T, n["joint"].T
    delta = soft * product(apart, joint) - joint * product(apart, soft)
    back = product(n["U"].T, delta)
    back = n["gain"] * scale * (back - n["spread"] * scale * scale * c * (c * back).sum(0, keepdim=True))
    back = back - n["centre"] * back.mean(0, keepdim=True)
    seen = {"loss": (law * nll).sum(), "accuracy": 1 - (law * (1 - best)).sum(),
            "min_hidden_norm": (c * c).sum(0).amin().sqrt(), "weight_norm": (W * W).sum().sqrt()}
    return seen, product(back, n["E"])


def directions(W, n):
    """W e_x / |W e_x| [N, d], what a class C(W) is about."""
    return torch.nn.functional.normalize(product(n["E"], W.T), dim=-1)


# The study `clusters`: a one-layer transformer all of whose vectors may lie in the plane; matrices act on row vectors here.

PARTS = {"attention": ("query", "W_V"), "mlp": ("W_in", "b_in", "W_out", "b_out")}  # what --freeze keeps
RMS_EPS = 1e-5


def init_plane(flags, generator):
    """Embeddings, unembedding and query N(0, 1), matrices and biases uniform in +-1/sqrt(fan in): what torch's own modules do.
    Hidden units beyond `width` have no way out and, their gradients masked (`free`), never get one."""
    V, L, d, H = flags.vocab, flags.seq_length, flags.d_model, flags.max_width
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    uniform = lambda fan_in, *shape: (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(fan_in)
    params = {"E": normal(V, d), "P": normal(L, d), "query": normal(d), "W_V": uniform(d, d, d), "W_in": uniform(d, d, H),
              "b_in": uniform(d, H), "W_out": uniform(flags.width, H, d), "b_out": uniform(flags.width, d), "U": normal(V, d)}
    return params | {"W_out": params["W_out"] * (torch.arange(H) < flags.width)[:, None]}


def rms(x, floor=None):
    """x / sqrt(mean x^2 + eps) along the last axis, that root bounded below by `floor` where one is given."""
    square = (x * x).mean(-1, keepdim=True) + RMS_EPS
    return x * torch.rsqrt(square if floor is None else torch.maximum(square, floor * floor))


def root(x):
    """sqrt(mean x^2) along the last axis: what `rms` divides by."""
    return (x * x).mean(-1).sqrt()


def table_of(params, floor=None):
    """Embeddings e, their norms' inverse applied u [L, V, d], and scores u q / sqrt(d) [L, V] of every (position, token)."""
    e = params["P"][:, None] + params["E"]
    u = rms(e, floor)
    return e, u, u @ params["query"] / math.sqrt(u.shape[-1])


def forward_plane(params, hot, number, floors=(None, None)):
    """Logits [n, V] of sequences given one-hot, hot [n, L V] (position-major), and the stages e [L, V, d] and h [n, d].

    Keys and values depend on (position, token) alone: with w = exp(score), a sequence's h is the sum of its entries of the
    table w u W_V over the sum of its w, one product with hot. Tokens from p on are never drawn and can't be predicted."""
    e, u, score = table_of(params, floors[0])
    w = torch.exp(score - score.detach().max())[..., None]  # scores lie within +-|q|: no entry of the table underflows
    sums = hot @ torch.cat([w * (u @ params["W_V"]), w], -1).flatten(0, 1)
    h = sums[:, :-1] / sums[:, -1:]
    return read_plane(params, h, number, floors[1])[0], e, h


def read_plane(params, h, number, floor=None):
    """From sequence embeddings h [n, d] to logits [n, V]; then the MLP's hidden layer [n, H] and the output [n, d]."""
    u = rms(h, floor)
    before = sum(u[:, i:i + 1] * params["W_in"][i] for i in range(u.shape[1]))  # u @ W_in, in sums that fuse with GELU
    hidden = torch.nn.functional.gelu(before + params["b_in"])
    out = h + hidden @ params["W_out"] + params["b_out"]
    unembedding = torch.where(number["untied"] > 0, params["U"], params["E"])
    logits = out @ unembedding.T
    return torch.where(torch.arange(logits.shape[-1], device=h.device) < number["modulus"], logits, -1e9), hidden, out


def one_hot(x, vocab):
    """x [n, L] as hot [n, L vocab]."""
    return (x[..., None] == torch.arange(vocab, device=x.device)).float().flatten(-2)


# ---- Measures -------------------------------------------------------------------------------------------------------

def floor_of(M, radius=1.):
    """Least loss with certain labels and orthonormal u of vectors N(h) of this length: as far from the other classes as can
    be."""
    return math.log1p((M - 1) * math.exp(-radius * math.sqrt(M / (M - 1)))) if M > 1 else 0.


def margin_loss(margin, joint):
    """N = M = 2: loss of the margins s(1|x) - s(2|x) [..., x] under p(x, y)."""
    softplus = torch.nn.functional.softplus
    return (joint[:, 0] * softplus(-margin) + joint[:, 1] * softplus(margin)).sum(-1)


def noise_entropy(q, M):
    """H(y | x) of labels that are wrong with probability q, any of M - 1 others, in nats."""
    return -sum(p * math.log(p) * n for p, n in ((1 - q, 1), (q / max(M - 1, 1), M - 1)) if p > 0)


def torus_loss(theta, law):
    """N = M = d = 2, N(W e_x) = (cos theta_x, sin theta_x): loss of the two angles [..., 2], a sum of one function of each."""
    return margin_loss(torch.stack([theta.cos(), theta.sin()], -1) @ (law["U"][0] - law["U"][1]), law["joint"])


def plane_loss(gamma, law):
    """The same without N: loss of gamma = W'(u_1 - u_2) [..., 2], whose inner product with e_x is the margin of class 1."""
    return margin_loss(gamma @ law["E"].T, law["joint"])


def critical_points(law, grid=12):
    """Zeros of the gradient on the torus, by Newton from a grid: angles [C, 2], losses and numbers of descending directions."""
    f = lambda theta: torus_loss(theta, law)
    theta = torch.cartesian_prod(*[torch.arange(grid, dtype=torch.float64) / grid * 2 * math.pi] * 2)
    gradient, hessian = torch.vmap(torch.func.grad(f)), torch.vmap(torch.func.hessian(f))
    for _ in range(50):
        theta = theta - torch.linalg.pinv(hessian(theta), rtol=1e-6).matmul(gradient(theta)[..., None])[..., 0].clamp(-.3, .3)
    theta = theta[gradient(theta).norm(dim=1) < 1e-10] % (2 * math.pi)
    theta = torch.unique((theta * 1e6).round() / 1e6, dim=0)
    return theta, f(theta), (torch.linalg.eigvalsh(hessian(theta)) < 0).sum(1)


def spectrum(W):
    """Singular values of the path W_t - W_0, [T+1, d, d] -> [min(T+1, d^2)]: as many as it has dimensions."""
    return np.linalg.svd((W - W[0]).reshape(len(W), -1), compute_uv=False)


def gram_schmidt(W):
    """The notes' test: the largest part of W_t - W_0 outside the plane of W_1 - W_2 and the last step, over the largest."""
    X = (W - W[0]).reshape(len(W), -1)
    basis, _ = np.linalg.qr(np.stack([X[1] - X[2], X[-2] - X[-1]], 1))
    return np.linalg.norm(X - X @ basis @ basis.T, axis=1).max() / np.linalg.norm(X, axis=1).max()


def class_dimension(W, n):
    """Dimension of the notes' class C(W) = {V: N(V e_x) = N(W e_x) for all x}, N = sphere: what the Jacobian of the vectors
    kills."""
    J = torch.func.jacrev(lambda W: directions(W, n))(W).reshape(-1, W.numel())
    return W.numel() - int(torch.linalg.matrix_rank(J, rtol=1e-9))


def class_step(W, n, factors, lr):
    """Does one gradient step map classes to classes? V in C(W) with V e_x = factor_x W e_x takes a step of every rate; the
    least largest angle (radians) between N(V_1 e_x) and N(W_1 e_x), over the largest angle by which the step of W turned."""
    unit, grad = lambda W: directions(W, n), lambda W: loss_and_gradient(W, n["joint"], n)[1]
    angle = lambda a, b: 2 * ((a - b).norm(dim=-1).amax(-1) / 2).clamp(max=1).asin()
    V = (torch.linalg.pinv(n["E"]) @ (factors[:, None] * product(n["E"], W.T))).T
    after, rates = unit(W - lr * grad(W)), lr * torch.logspace(-10, 10, 2001, 2, dtype=torch.float64)
    others = torch.vmap(unit)(V - rates[:, None, None] * grad(V))
    return float(angle(others, after).min() / angle(unit(W), after))


def margin_law(t, M, lr, p):
    """The margin m of gradient flow from 0 with orthonormal e and u, e^m + (M - 1) m = M lr p t + 1, by Newton."""
    right, m = M * lr * p * np.asarray(t, float) + 1, np.log1p(np.asarray(t, float))
    for _ in range(100):
        m = np.maximum(m - (np.exp(m) + (M - 1) * m - right) / (np.exp(m) + M - 1), 0)
    return m


def max_margin(E, U, y, sweeps=3000):
    """W_inf [d, d] of norm 1 that separates with the largest margin, and the margin: min |W|^2 with (u_y - u_j)'W e_x >= 1 by
    coordinate ascent on the dual (Hsieh et al. 2008); NaN where no W separates."""
    V = np.stack([np.outer(U[c] - U[j], e).ravel() for e, c in zip(E, y) for j in range(len(U)) if j != c])
    K, a = V @ V.T, np.zeros(len(V))
    for _ in range(sweeps):
        for i in range(len(V)):
            a[i] = max(0, a[i] + (1 - K[i] @ a) / K[i, i])
    W = a @ V
    if not (V @ W).min() > .99:
        return np.full((U.shape[1],) * 2, np.nan), math.nan
    return (W / np.linalg.norm(W)).reshape(U.shape[1], -1), 1 / np.linalg.norm(W)


def guarantee(f1, f2, E, U, p, y, W_inf, norm):
    """What f1 = <W, W_inf> and f2 = |W - f1 W_inf| [T] alone guarantee: an upper bound on the loss [T], and whether all is
    correct [T]. The margin of token x against class j is <W, V> without N, V = (u_y - u_j) e_x', at least f1 <W_inf, V> - f2
    |V's part across W_inf|; N = h/|h| divides it by |W e_x|, at most f1 |W_inf e_x| + f2 |e_x|, and leaves it above -|u_y -
    u_j|."""
    total, right = np.zeros_like(f1), np.ones(len(f1), bool)
    for e, c, weight in zip(E, y, p):
        gap = np.stack([U[c] - U[j] for j in range(len(U)) if j != c])
        V = gap[:, :, None] * e
        along = (V * W_inf).sum((1, 2))
        across = np.sqrt(np.maximum((V ** 2).sum((1, 2)) - along ** 2, 0))
        margin = f1[:, None] * along - f2[:, None] * across
        right &= (margin > 0).all(1)
        if norm == "sphere":
            size = np.abs(f1) * np.linalg.norm(W_inf @ e) + f2 * np.linalg.norm(e)
            margin = np.where(margin > 0, margin / size[:, None], -np.linalg.norm(gap, axis=1))
        total = total + weight * np.log1p(np.exp(-margin).sum(1))
    return total, right


def jumps(loss, least=.05):
    """Spikes of a loss [T+1]: steps [T] over which it rises by a tenth or more, and by `least` nats."""
    return (loss[1:] > 1.1 * loss[:-1]) & (loss[1:] > loss[:-1] + least)


def hessian(W, n):
    """Eigenvalues [d^2] of the Hessian of the exact loss at W, ascending."""
    gradient = lambda w: loss_and_gradient(w.view_as(W), n["joint"], n)[1].flatten()
    return torch.linalg.eigvalsh(torch.func.jacfwd(gradient)(W.flatten()))


def violated(flags, n, across, generator, segments=1000, points=21):
    """Share of random segments on which the loss rises above its chord: in W, in h = W e_x, or in the vectors N(W e_x), which
    start and end on the sphere and move along the chord."""
    d, N, nll = flags.d_model, flags.n_tokens, lambda s: (n["joint"] * losses(s)[0]).sum()
    f, shape = {"W": (lambda W: nll(logits(W, n)), (d, d)),
                "h": (lambda h: nll(product(normalised(h, n), n["U"].T)), (N, d)),
                "vectors": (lambda v: nll(product(v, n["U"].T)), (N, d))}[across]
    a, b = torch.randn(2, segments, *shape, generator=generator, dtype=torch.float64)
    if across == "vectors":
        a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (a, b))
    s = torch.linspace(0, 1, points, dtype=torch.float64)
    at = torch.vmap(torch.vmap(f))(a + s[:, None, None, None] * (b - a))  # [points, segments]
    return float(((at - (at[0] + s[:, None] * (at[-1] - at[0]))).amax(0) > 1e-9).double().mean())


# The study `clusters`: what it learned, and its spikes.

def explained_by(h, label):
    """Share of the variance of h [n, d] that lies between the classes `label` [n]: 1 - within / total."""
    sums = torch.zeros(int(label.max()) + 1, h.shape[1]).index_add(0, label, h)
    means = sums / label.bincount()[:, None].clamp(min=1)
    return 1 - ((h - means[label]) ** 2).sum() / ((h - h.mean(0)) ** 2).sum()


def places(h, label):
    """How many groups the means of h [n, d] by label [n] form, if those closer than .1 standard deviations of h belong
    together; NaN for more than 512 labels."""
    n = int(label.max()) + 1
    if n > 512:
        return math.nan
    means = torch.zeros(n, h.shape[1]).index_add(0, label, h) / label.bincount()[:, None]
    near = torch.cdist(means, means) < .1 * h.var(0).sum().sqrt()
    for _ in range(n.bit_length()):  # of paths twice as long
        near = (near.float() @ near.float()) > 0
    return len(near.unique(dim=0))


def shuffled(x, columns, generator):
    """x with the columns from other sequences: every position keeps its law and loses its tie to the rest."""
    return x.index_copy(1, columns, torch.stack([x[torch.randperm(len(x), generator=generator), c] for c in columns], 1)) \
        if len(columns) else x


def numbers_plane(run):
    return {"untied": torch.tensor(int(run.untied)), "modulus": torch.tensor(run.modulus)}


def evaluate_plane(run, params, test):
    """Loss and accuracy on the tests (hot, y)."""
    logits = forward_plane(params, test[0], numbers_plane(run))[0]
    return {"loss": torch.nn.functional.cross_entropy(logits, test[1]),
            "accuracy": (logits.argmax(-1) == test[1]).float().mean()}


def at_the_end(run, params):
    """train_accuracy; attention_first: mean attention on the first k; r2_counts, r2_signed, r2_first: share of h's variance
    between multisets of the first k tokens, between signed sums +-x_1 .. +-x_k (the best of the signs; p = 2), which carry
    the parity as well, and between sequences of the first k (the rest comes from the other tokens); distinct: `places` of
    these sequences; and two interventions, the share of test predictions that stay if the other tokens (keeps_others) or the
    first k (keeps_first) come from other sequences."""
    drawn, number, k = sequences(run), numbers_plane(run), run.sparsity
    hot = one_hot(drawn[0], run.vocab)
    logits, _, h = forward_plane(params, hot, number)
    if not torch.isfinite(logits).all():
        return dict.fromkeys(AT_THE_END, math.nan)
    weight = torch.exp(table_of(params)[2]).unsqueeze(0) * hot.view(-1, run.seq_length, run.vocab)
    counts, first = multisets(run, drawn[0])
    said, test = logits.argmax(-1), drawn[0][run.n_train:]
    generator = common.generator(run.seed, "eval")
    keeps = [(forward_plane(params, one_hot(shuffled(test, torch.arange(a, b), generator), run.vocab), number)[0]
              .argmax(-1) == said[run.n_train:]).float().mean() for a, b in ((k, run.seq_length), (0, k))]
    signs = torch.tensor(list(itertools.product((1, -1), repeat=k - 1))) if run.modulus == 2 and k <= 7 else ()
    signed = [explained_by(h, (drawn[0][:, :k] * torch.cat([torch.ones(1, dtype=int), s])).sum(1) + k) for s in signs]
    values = ((said == drawn[1])[:run.n_train].float().mean(), weight[:, :k].sum((1, 2)).div(weight.sum((1, 2))).mean(),
              explained_by(h, counts), max(signed, default=math.nan), explained_by(h, first), places(h, first), *keeps)
    return {name: float(v) for name, v in zip(AT_THE_END, values)}


AT_THE_END = ("train_accuracy", "attention_first", "r2_counts", "r2_signed", "r2_first", "distinct", "keeps_others",
              "keeps_first")

# A spike: the loss, mean of SMOOTH steps, is RISE times its median of the last CALM steps and LEAST nats above it. Its lead-up
# are the LEAD steps before; what is usual for a norm is its median in the CALM steps before these.
SMOOTH, CALM, LEAD, RISE, LEAST = 20, 200, 40, 1.5, .05
SIGNS = {"norm below 1/3 of its usual": ("fall", lambda x: x < 1 / 3),
          "vectors turned > 90° in a step": ("turned", lambda x: x > 0), "overshoot > 1": ("overshoot", lambda x: x > 1)}
MEASURED = [key for key, _ in SIGNS.values()]


def find_spikes(loss):
    """(step, run, base, peak) of every spike of loss [T, R]: the first step that satisfies the criterion, at least CALM + LEAD
    steps after the one before, the median it rose from, and its highest smoothed loss within CALM steps."""
    found, loss = [], np.asarray(loss, float)
    for r in range(loss.shape[1]):
        s, last = common.smooth(loss[:, r], SMOOTH), -math.inf
        if len(s) <= CALM + SMOOTH + LEAD or not np.isfinite(s[-1]):
            continue
        past = np.lib.stride_tricks.sliding_window_view(s, CALM)[:-SMOOTH]
        base = np.concatenate([np.full(CALM + SMOOTH - 1, np.inf), np.median(past, 1)])  # of the CALM steps up to SMOOTH ago
        for t in np.flatnonzero((s > RISE * base) & (s > base + LEAST)):
            if t >= CALM + LEAD and t - last > CALM + LEAD:
                found.append((t, r, base[t], s[t:t + CALM].max()))
            last = t if t - last <= CALM + LEAD else found[-1][0] if found and found[-1][1] == r else last
    return found


def lead_up(logs, t, r):
    """What happens in the lead-up to step t of run r. fall: the smallest norm entering either RMS layer over its usual value;
    turned: the largest share of vectors entering either that one step turns by more than 90 degrees, across zero; overshoot:
    the largest, of 10 steps together, (second and higher order change of the batch's loss) / (first-order decrease), above 1
    where the steps raise the loss of the very batch they are made from."""
    before, calm = slice(t - LEAD, t), slice(t - LEAD - CALM, t - LEAD)
    fall = min(logs[k][before, r].min() / np.median(logs[k][calm, r]) for k in ("norm_embedding", "norm_sequence"))
    down, bend = (np.convolve(logs[k][before, r], np.ones(10), "valid") for k in ("descent", "bend"))
    over = np.where(down > 0, bend / np.where(down > 0, down, 1), np.where(bend > down, np.inf, 0))
    return {"fall": fall, "turned": max(logs[f"turned_{k}"][before, r].max() for k in ("embedding", "sequence")),
            "overshoot": over.max()}


# ---- Train ----------------------------------------------------------------------------------------------------------

KEPT = 64e6  # bytes of W over training that a group of runs keeps


def constants(runs):
    """What a step needs of each run, [R, ...]."""
    dtype = getattr(torch, runs[0].dtype)
    rows = [{**law_of(run), **{k: torch.tensor(v, dtype=torch.float64) for k, v in norm_numbers(run).items()}} for run in runs]
    return common.tree(lambda x: x.to(dtype), common.stack(rows)) | {
        k: v for k, v in common.numbers(runs, dtype).items() if k in ("lr", "momentum", "beta1", "beta2", "adam_eps")}


def start(flags):
    """Step 0 of one run."""
    d, g = flags.d_model, common.generator(flags.seed, "init")
    W = flags.init_scale / math.sqrt(d) * torch.randn(d, d, generator=g, dtype=torch.float64)
    params = {"W": W.to(getattr(torch, flags.dtype))}
    memory = {"adam": common.adam_init, "momentum": common.sgd_init}.get(flags.optimiser, lambda params: {})
    return {"params": params, **memory(params)}


def direction(optimiser, grad):
    """What a step without moments follows: the gradient, its direction, or its signs."""
    if optimiser == "normalised":
        top = grad.abs().amax()
        grad = grad / torch.where(top > 0, top, 1.)
        return grad / (grad * grad).sum().sqrt().clamp(min=1.)  # the largest entry is 1, or all are 0
    return grad.sign() if optimiser == "sign" else grad


def step_of(flags, keep_W, drawn=False):
    """The training step of ONE run: state and, where it is drawn, the batch's p(x, y) -> new state, logs."""
    def step(state, batch, n):
        W = state["params"]["W"]
        seen, grad = loss_and_gradient(W, batch if drawn else n["joint"], n)
        if flags.optimiser == "adam":
            params, optimiser = common.adamw({"W": W}, {"W": grad}, state, n["lr"], 0., n["beta1"], n["beta2"], n["adam_eps"])
        elif flags.optimiser == "momentum":
            params, optimiser = common.sgd({"W": W}, {"W": grad}, state, n["lr"], n["momentum"])
        else:
            params, optimiser = {"W": W - n["lr"] * direction(flags.optimiser, grad)}, {}
        return {"params": params, **optimiser}, seen | {"grad_norm": (grad * grad).sum().sqrt()} | ({"W": W} if keep_W else {})
    return step


def unroll(flags):
    """Steps that share a compiled graph: ten where a step costs no more than the call."""
    return 10 if flags.n_tokens * flags.d_model <= 16 else 1


def train(runs, folder):
    """Train runs of one shape: `common.train`, of what it returns W [R, S, d, d] at W_step [S], curves [R, T+1] and the law of
    each run; then the metrics and the snapshots to save."""
    flags, R = runs[0], len(runs)
    size = R * flags.d_model ** 2 * 8
    whole = size * (flags.steps + 1) <= KEPT
    if not whole:
        runs = [replace(run, snapshots=max(run.snapshots, 2, int(KEPT / size))) for run in runs]
    if flags.d_model == 2 and any(run.norm == "layernorm" for run in runs):
        print("--norm layernorm at --d-model 2 leaves (1, -1) or (-1, 1) of every vector: nothing to learn by small steps")
    state, n = common.stack(start(run) for run in runs), constants(runs)
    drawn, dtype = any(run.batch for run in runs), getattr(torch, flags.dtype)

    def draw(r, chunk):
        if runs[r].batch:
            return draws(runs[r], chunk).to(dtype)
        return n["joint"][r].expand(common.CHUNK, -1, -1) if drawn else torch.zeros(common.CHUNK, 0)

    state, metrics, snapshots = common.train(
        runs, folder, state, n, step_of(flags, whole, drawn), draw, eval_at=[flags.steps],
        evaluate=lambda r, params: observed(params["W"], common.run_of(n, r)),
        label=f"{flags.study} {flags.optimiser} N={flags.n_tokens} M={flags.n_classes} d={flags.d_model}",
        unroll=unroll(flags))
    if whole:
        steps = np.arange(len(metrics["loss"]) + 1)
        W = np.concatenate([metrics.pop("W"), state["params"]["W"][None]])
    else:
        kept = snapshots | {str(metrics["eval_step"][-1]): state["params"]}
        steps = np.array(sorted(map(int, kept)))
        W = np.stack([kept[str(s)]["W"] for s in steps])
    curves = {k: np.concatenate([metrics[k], metrics[f"eval_{k}"][-1:]]).T for k in CURVES}
    kept = {"W_step": steps, "W": np.moveaxis(W, 1, 0), **curves, **{k: v.numpy() for k, v in laws(n).items()}}
    return kept, metrics, snapshots if flags.snapshots else None


CURVES = ("loss", "accuracy", "grad_norm", "weight_norm", "min_hidden_norm")


def observed(W, n):
    """What a step logs, without making one."""
    seen, grad = loss_and_gradient(W, n["joint"], n)
    return seen | {"grad_norm": (grad * grad).sum().sqrt()}


def laws(n):
    """E, U, joint = p(x, y), p(x) [R, N] and the likeliest class y [R, N] of every run."""
    return {"E": n["E"], "U": n["U"], "joint": n["joint"], "p": n["joint"].sum(2), "y": n["joint"].argmax(2)}


# The study `clusters`: training, and replays of a run from before its spikes.

def free(run, params):
    """Masks that gradients are multiplied by: 0 for what --freeze keeps and for hidden units beyond `width`."""
    mask = {k: torch.full_like(p, float(k not in PARTS.get(run.freeze, ()))) for k, p in params.items()}
    return mask | {"W_out": mask["W_out"] * (torch.arange(run.max_width) < run.width)[:, None]}


def step_of_plane(flags):
    """The training step of ONE run: state and batch -> new state, logs."""
    def loss_of(params, batch, number):
        floors = number["floor"][0], number["floor"][1]
        logits, e, h = forward_plane(params, one_hot(batch["x"], flags.vocab), number, floors)
        tokens = torch.arange(flags.vocab, device=h.device)
        right = torch.where(batch["y"][:, None] == tokens, logits, 0.).sum(-1)
        counts = torch.arange(flags.max_batch, device=h.device) < number["batch"]
        loss = torch.where(counts, torch.logsumexp(logits, -1) - right, 0.).sum() / number["batch"]
        return loss, (e, h, (tokens < number["modulus"]).expand(e.shape[:-1]), counts)  # what gets normalised, where it counts

    def step(state, batch, number):
        old = state["params"]
        grads, (loss, (e, h, tokens, counts)) = grad_and_value(loss_of, has_aux=True)(old, batch, number)
        grads = {k: g * number["free"][k] for k, g in grads.items()}
        params, optimiser = common.adamw(old, grads, state, number["lr"])
        descent = sum((grads[k] * (old[k] - params[k])).sum() for k in old)  # to first order, by how much the loss falls
        after, (e_after, h_after, *_) = loss_of(params, batch, number)
        logs = {"loss": loss, "grad_norm": common.norm(grads), "descent": descent,
                "bend": after - loss + descent}  # all other orders: one more forward instead of a Hessian
        for name, x, x_after, which in (("embedding", e, e_after, tokens), ("sequence", h, h_after, counts)):
            logs[f"norm_{name}"] = torch.where(which, root(x), math.inf).amin()
            logs[f"turned_{name}"] = ((x * x_after).sum(-1).lt(0) & which).sum() / which.sum()  # by more than 90 degrees
        return {"params": params, **optimiser}, logs
    return step


def from_checkpoint(flags):
    """The parameters of the first run of --source that fit these flags, and the names of those that don't and start fresh."""
    saved, like = common.load_checkpoint(flags.source)["params"], init_plane(flags, torch.Generator())
    given = {k: saved[k][0].float() for k in like if k in saved and saved[k].shape[1:] == like[k].shape}
    if not given:
        raise common.Stop(f"--source {flags.source}: none of its parameters fits these flags")
    return given, sorted(set(like) - set(given))


def start_plane(run, given=None):
    """Step 0 of one run; what is `given` takes the place of initial parameters."""
    params = init_plane(run, common.generator(run.seed, "init")) | (given or {})
    return {"params": params, **common.adam_init(params)}


def constants_plane(runs, state, floors=None):
    floors = torch.zeros(len(runs), 2) if floors is None else floors
    return common.numbers(runs) | {"floor": floors, "free": common.stack(
        free(run, common.run_of(state["params"], r)) for r, run in enumerate(runs))}


def train_plane(runs, folder, given=lambda run: None):
    """Train runs of one shape: `common.train` on batches of each run's own training set."""
    flags, state = runs[0], common.stack(start_plane(run, given(run)) for run in runs)
    sets = [sequences(run) for run in runs]
    tests = [(one_hot(x[run.n_train:], run.vocab), y[run.n_train:]) for run, (x, y) in zip(runs, sets)]
    return common.train(
        runs, folder, state, constants_plane(runs, state), step_of_plane(flags),
        draw=lambda r, chunk: sample_sequences(runs[r], sets[r], chunk),
        evaluate=lambda r, params: evaluate_plane(runs[r], params, tests[r]),
        eval_at=[round(i * flags.steps / flags.evals) for i in range(flags.evals + 1)],
        label=f"{flags.study} d={flags.d_model}")


INTERVENTIONS = "none", "sham", "norms bounded", "half rate", "other batches"  # each from a chunk boundary before the spike on
BOUNDED = INTERVENTIONS.index("norms bounded")
FORKED = 32  # spikes at most that are replayed, the largest ones


def replay(runs, state, draw, chunks, compiled, constants):
    """A fused step on a copy of `state`, to be called with chunks; draw(run, chunk) as for `common.train`."""
    data = lambda c: common.tree(lambda *x: torch.stack(x, 1), *(draw(r, c) for r in range(len(runs))))
    return common.Fused(step_of_plane(runs[0]), state, constants, common.tree(lambda x: x[0], data(0)), runs[0],
                        chunks * common.CHUNK, compiled=compiled), data


def fork(runs, logs, spikes, compiled, given):
    """Replay spikes [(step, run, base, peak)] from a chunk boundary at least LEAD steps before, under each intervention.
    Returns the losses [interventions, spikes, steps] from there on, and where that is [spikes]. A run is a function of its
    flags: its state there is had by training it again, to the bit."""
    begin, who = [int(t - LEAD) // common.CHUNK for t, *_ in spikes], [r for _, r, *_ in spikes]
    again, n = list(dict.fromkeys(who)), len(spikes)
    mine, kept = [runs[r] for r in again], {}
    sets = {r: sequences(runs[r]) for r in again}
    state = common.stack(start_plane(run, given(run)) for run in mine)
    fused, data = replay(mine, state, lambda r, c: sample_sequences(mine[r], sets[again[r]], c), max(begin), compiled,
                         constants_plane(mine, state))
    for chunk in range(max(begin) + 1):
        if chunk in begin:
            state = fused.state()
            kept |= {j: common.run_of(state, again.index(who[j])) for j in range(n) if begin[j] == chunk}
        fused(data(chunk))
    usual = [[np.median(logs[f"norm_{k}"][max(0, common.CHUNK * b - CALM):common.CHUNK * b, r])
              for k in ("embedding", "sequence")] for b, r in zip(begin, who)]
    many, floors = [], torch.zeros(len(INTERVENTIONS), n, 2)
    for i, name in enumerate(INTERVENTIONS):
        many += [replace(runs[r], lr=runs[r].lr * {"half rate": .5, "sham": 1.001}.get(name, 1)) for r in who]
        floors[i] = .5 * torch.tensor(usual) * (name == "norms bounded")
    other = lambda j: 2 ** 20 if INTERVENTIONS[j // n] == "other batches" else 0  # chunks that no run reaches
    state, chunks = common.stack([kept[j] for j in range(n)] * len(INTERVENTIONS)), 2 + (CALM + LEAD) // common.CHUNK
    fused, data = replay(many, state, lambda j, c: sample_sequences(many[j], sets[who[j % n]], begin[j % n] + c + other(j)),
                         chunks, compiled, constants_plane(many, state, floors.flatten(0, 1)))
    loss = np.concatenate([fused(data(c))["loss"].numpy() for c in range(chunks)])
    return loss.T.reshape(len(INTERVENTIONS), n, -1), common.CHUNK * np.array(begin)


# ---- Figures --------------------------------------------------------------------------------------------------------

BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK = common.COLOURS[:7]
COLOUR = dict(gd=BLUE, sgd=BLUE, momentum=SKY, normalised=GREEN, sign=ORANGE, adam=RED)
STYLE = dict(normalised="--")  # on the path of gd
METHOD_COLOUR = dict(zip(("SGD", "LN", "sign", "sign+LN", "Adam", "Adam+LN"), (BLUE, SKY, ORANGE, PINK, RED, BLACK)))


def or_curves(draw, free=(), first=True):
    """draw, or where the study was stopped or doesn't run its own configurations (but for the fields `free`), curves of those
    that it ran, in its first figure."""
    def drawn(arrays, flags):
        if getattr(flags, "finished", True) and common.as_designed(flags, free):
            return draw(arrays, flags)
        return draw_curves(arrays, flags) if first else None
    return drawn


def draw_curves(arrays, flags):
    """Loss, accuracy, |W| and the smallest |h| of every configuration, named by the settings in which they differ."""
    vary = [f for f in COLUMNS if f != "seed" and len(np.unique(arrays[f])) > 1]
    names = np.array([", ".join(f"{f}={arrays[f][r]}" for f in vary) or "all runs" for r in range(len(arrays["seed"]))])
    shown = list(dict.fromkeys(names))
    figure, axes = common.panels(4, f"Runs by configuration, {min(len(shown), 8)} of {len(shown)} shown", flags)
    for ax, (key, label) in zip(axes, (("loss", "loss (nats)"), ("accuracy", "accuracy"), ("weight_norm", "|W|"),
                                       ("min_hidden_norm", "smallest |W e_x|"))):
        for name, colour in zip(shown, common.COLOURS):
            common.band(ax, np.arange(arrays[key].shape[1]) + 1, arrays[key][names == name].T, name, colour)
        ax.set(xscale="log", xlabel="step + 1", ylabel=label)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=6)
    return figure


def gamma_of(arrays, mask):
    """The path of gamma = W'(u_1 - u_2), [R, S, 2]."""
    return np.einsum("rsij,ri->rsj", arrays["W"][mask], (arrays["U"][:, 0] - arrays["U"][:, 1])[mask])


def angles_of(arrays, mask):
    """The angles of N(W e_x), continuous in time, [R, S, N]."""
    h = np.einsum("rsij,rxj->rsxi", arrays["W"][mask], arrays["E"][mask])
    return np.unwrap(np.arctan2(h[..., 1], h[..., 0]), axis=1)


def drawn_law(arrays, first):
    """The law of run `first`, for contours."""
    return {"E": torch.tensor(arrays["E"][first]), "U": torch.tensor(arrays["U"][first]),
            "joint": torch.tensor(arrays["joint"][first])}


def plane(ax, law, low, high):
    """Contours of the loss in gamma over the regions of equal accuracy."""
    gamma = torch.tensor(np.stack(np.meshgrid(*[np.linspace(a, b, 200) for a, b in zip(low, high)]), -1))
    right = torch.where(gamma @ law["E"].T > 0, law["joint"][:, 0], law["joint"][:, 1]).sum(-1)
    x, y = gamma.unbind(-1)
    ax.contourf(x, y, right, levels=[-.01, .01, .5, .99, 1.01], cmap="Greys_r", vmin=-1.2, vmax=1.01)
    shown = ax.contour(x, y, plane_loss(gamma, law), levels=[.01, .03, .1, .2, .4, .7, 1, 2, 4, 8], colors="dimgrey",
                       linewidths=.6)
    ax.clabel(shown, fontsize=5.5, fmt="%g")
    ax.set(xlabel="gamma_0", ylabel="gamma_1", xlim=(low[0], high[0]), ylim=(low[1], high[1]))


def torus(ax, law):
    """Contours of the loss in the two angles, and its critical points."""
    theta = torch.tensor(np.stack(np.meshgrid(*[np.linspace(-math.pi, 2 * math.pi, 241)] * 2), -1))
    shown = ax.contour(*theta.unbind(-1), torus_loss(theta, law), levels=12, colors="dimgrey", linewidths=.6)
    ax.clabel(shown, fontsize=5.5, fmt="%.2g")
    ticks = np.arange(-2, 5) * math.pi / 2
    ax.set(xlabel="theta_1", ylabel="theta_2", xticks=ticks, yticks=ticks, xlim=(-math.pi, 2 * math.pi),
           ylim=(-math.pi, 2 * math.pi))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x / math.pi:g}π".replace("1π", "π") if x else "0")


def near_home(angles):
    """Angles [.., S, 2] shifted by whole turns so that the path starts in [-pi/2, 3 pi/2)."""
    return angles - 2 * math.pi * np.floor((angles[..., :1, :] + math.pi / 2) / (2 * math.pi))


def draw_plain(near):
    """A figure of the landscape in gamma without N, near the start or far from it, with a descent of every optimiser."""
    def draw(arrays, flags):
        cosines = np.unique(arrays["cos"])
        title = "Without N the loss depends on gamma alone and is convex: " + ("near the start" if near else "far view")
        figure, axes = common.panels(len(cosines), title + " (the lighter, the more accurate)", flags,
                                     columns=3, size=(4.6, 4.2))
        for ax, c in zip(axes, cosines):
            mine = pick(arrays, cos=c, norm="none")
            first = np.flatnonzero(mine)[0]
            paths, kinds = gamma_of(arrays, mine), arrays["optimiser"][mine]
            reach = (4, 30)[not near]
            plane(ax, drawn_law(arrays, first), (-reach / 3, -reach), (reach, reach / 3))
            for kind in dict.fromkeys(kinds):
                for i, path in enumerate(paths[kinds == kind]):
                    ax.plot(*path.T, STYLE.get(kind, "-"), color=COLOUR[kind], lw=1.3 if i == 0 else .5,
                            alpha=1 if i == 0 else .6, label=kind if i == 0 else None)
            ax.plot(*paths[:, 0].T, "k.", ms=3)
            ax.set_title(f"cos {c:g}", fontsize=9)
        axes[0].legend(fontsize=6.5, loc="lower left")
        return figure
    return or_curves(draw, ("cos", "optimiser"), near)


def draw_torus(arrays, flags):
    """The torus of N, with its critical points and a descent of every optimiser; and what either model can say of its
    tokens."""
    cosines = np.unique(arrays["cos"])
    figure, axes = common.panels(len(cosines) + 1, "With N = h/|h| the loss lives on a torus: one minimum, two saddles, one "
                                 "maximum", flags, size=(5.4, 4.6))
    marks = {0: ("o", "minimum"), 1: ("D", "saddle"), 2: ("^", "maximum")}
    for ax, c in zip(axes, cosines):
        mine = pick(arrays, cos=c, norm="sphere")
        torus(ax, drawn_law(arrays, np.flatnonzero(mine)[0]))
        paths, kinds = near_home(angles_of(arrays, mine)), arrays["optimiser"][mine]
        for kind in dict.fromkeys(kinds):
            for i, path in enumerate(paths[kinds == kind]):
                ax.plot(*path.T, STYLE.get(kind, "-"), color=COLOUR[kind], lw=1.3 if i == 0 else .5, alpha=1 if i == 0 else .7,
                        label=kind if i == 0 else None)
        ax.plot(*paths[:, 0].T, "k.", ms=4)
        for theta, loss, index in zip(*(arrays[f"critical_{k}"] for k in ("theta", "loss", "index"))):
            for turn in itertools.product((-2 * math.pi, 0, 2 * math.pi), repeat=2):
                ax.plot(*(theta + turn), marks[int(index)][0], color="white", mec="black", ms=6)
            ax.annotate(f"{marks[int(index)][1]}\n{loss:.5f}", theta, (5, 4), textcoords="offset points", fontsize=6)
        ax.set_title(f"cos {c:g}", fontsize=9)
    axes[0].legend(fontsize=6, loc="lower right")
    ax, side = axes[-1], 1 / (1 + math.exp(-np.linalg.norm(arrays["U"][0, 0] - arrays["U"][0, 1])))
    for norm, style in (("none", ":"), ("sphere", "-")):
        mine = pick(arrays, norm=norm, cos=cosines[0])
        gamma = np.einsum("rsxi,ri->rsx", reads(arrays, mine, norm), (arrays["U"][:, 0] - arrays["U"][:, 1])[mine])
        said = 1 / (1 + np.exp(-gamma * (1 - 2 * arrays["y"][mine][:, None])))
        for kind in ("gd", "adam"):
            for i, path in enumerate(said[arrays["optimiser"][mine] == kind]):
                ax.plot(*path.T, style, color=COLOUR[kind], lw=1.1, label=f"{kind}, N {norm}" if i == 0 else None)
    ax.add_patch(plt.Rectangle((1 - side, 1 - side), 2 * side - 1, 2 * side - 1, fill=False, ls="--", color="grey"))
    ax.annotate("all that N can say", (1 - side, side), fontsize=6.5, color="grey", va="bottom")
    ax.set(xlabel="p_W(1|1)", ylabel="p_W(2|2)", xlim=(0, 1), ylim=(0, 1.04))
    ax.set_title(f"probabilities of the right classes, cos {cosines[0]:g}", fontsize=9)
    ax.legend(fontsize=6, loc="lower left")
    return figure


def reads(arrays, mask, norm):
    """N(W e_x) over training, [R, S, N, d], of N none or sphere."""
    h = np.einsum("rsij,rxj->rsxi", arrays["W"][mask], arrays["E"][mask])
    return h / np.linalg.norm(h, axis=-1, keepdims=True) if norm == "sphere" else h


def draw_descent(arrays, flags):
    """The descents of seed 0 at the middle cosine, in gamma and on the torus, as an animation."""
    c = np.unique(arrays["cos"])[len(np.unique(arrays["cos"])) // 2]
    figure, axes = common.panels(2, "", flags, size=(4.6, 4.4))
    frames = np.unique(np.geomspace(1, len(arrays["W_step"]), 30).astype(int)) - 1
    sides = []
    for norm, path_of in (("none", gamma_of), ("sphere", lambda *a: near_home(angles_of(*a)))):
        mine = pick(arrays, cos=c, norm=norm, seed=arrays["seed"].min())
        sides.append((arrays["optimiser"][mine], path_of(arrays, mine), np.flatnonzero(mine)[0]))

    def frame(i):
        for ax, (kinds, paths, first), norm in zip(axes, sides, ("none", "sphere")):
            ax.clear()
            if norm == "none":
                plane(ax, drawn_law(arrays, first), (-2, -6), (6, 2))
            else:
                torus(ax, drawn_law(arrays, first))
            for kind, path in zip(kinds, paths):
                ax.plot(*path[:frames[i] + 1].T, color=COLOUR[kind], lw=1, label=kind)
                ax.plot(*path[frames[i]], "o", color=COLOUR[kind], ms=4)
            ax.set_title(f"N {norm}, cos {c:g}", fontsize=9)
        axes[0].legend(fontsize=6, loc="lower left")
        figure.suptitle(f"Five descents, step {arrays['W_step'][frames[i]]}", fontsize=10)
    return figure, len(frames), frame


def draw_ranking(arrays, flags):
    """Error after training against the width, one panel a learning rate."""
    figure, axes = common.panels(4,
                                 f"Adam + LN > Adam > LN > SGD? Error after {flags.steps} steps (rates of sign, Adam: lr / d)",
                                 flags)
    shape = (arrays["n_tokens"] == flags.n_tokens) & (arrays["n_classes"] == flags.n_classes)
    for ax, rate in zip(axes, RATES):
        for method, colour in METHOD_COLOUR.items():
            mine = shape & (arrays["method"] == method) & np.isclose(arrays["rate"], rate)
            spots(ax, arrays["d_model"][mine], error(arrays)[mine], colour, f"{method} ({flags.runs} seeds a width)")
        common.shelf(ax, arrays["guess"][shape][0], "always the likeliest class")
        ax.set(xscale="log", xlabel="width d", ylabel="error", ylim=(-.0005, 1))
        ax.set_yscale("symlog", linthresh=.01)
        ax.set_title(f"lr {rate:g}", fontsize=9)
        ax.set_xticks(np.unique(arrays["d_model"][shape]), [str(d) for d in np.unique(arrays["d_model"][shape])])
        ax.minorticks_off()
    axes[0].legend(fontsize=6)
    return figure


def error(arrays):
    """Probability of a wrong answer at the end, [R]."""
    return np.where(np.isfinite(arrays["loss"][:, -1]), 1 - arrays["accuracy"][:, -1], np.nan)


def spots(ax, x, y, colour, label):
    """One dot a run and a line through the medians; runs without a value left out."""
    x, y = np.asarray(x, float)[np.isfinite(y)], y[np.isfinite(y)]
    ax.plot(x, y, ".", color=colour, ms=3, alpha=.4, mew=0)
    at = np.unique(x)
    ax.plot(at, [np.median(y[x == a]) for a in at], color=colour, lw=1.4, label=label)


def draw_best(arrays, flags):
    """Error of every method at its best learning rate, by shape."""
    shapes = list(dict.fromkeys(zip(*(arrays[k] for k in ("n_tokens", "n_classes", "d_model")))))
    figure, (ax,) = common.panels(1, "Every method at its best rate of four (median over seeds decides), by shape", flags,
                                  size=(9, 4))
    for i, shape in enumerate(shapes):
        for j, (method, colour) in enumerate(METHOD_COLOUR.items()):
            best = best_of(arrays, method, shape)
            x = i + (j - 2.5) / 8
            ax.plot(np.full(len(best), x), best, ".", color=colour, ms=4, alpha=.6, mew=0)
            ax.plot(x, np.median(best), "_", color=colour, ms=9, mew=2, label=method if i == 0 else None)
    ax.set_xticks(range(len(shapes)), [f"N {n}\nM {m}\nd {d}" for n, m, d in shapes], fontsize=7)
    ax.set_yscale("symlog", linthresh=.01)
    ax.set(ylabel="error", ylim=(-.0005, .15))
    ax.set_yticks([0, .002, .005, .01, .02, .05, .1], ["0", ".002", ".005", ".01", ".02", ".05", ".1"])
    ax.legend(fontsize=7, ncol=6)
    return figure


def best_of(arrays, method, shape):
    """Errors by seed of a method at the rate of the least median error."""
    each = [by_seed(arrays, error(arrays), method=method, n_tokens=shape[0], n_classes=shape[1], d_model=shape[2], lr=lr)
            for lr in np.unique(arrays["lr"][pick(arrays, method=method, d_model=shape[2])])]
    return min(each, key=np.median)


def way_of(arrays):
    """Optimiser (and Adam's betas where they vary) of every run, [R] text."""
    return np.array([o if o != "adam" else f"adam {b1:g}, {b2:g}"
                     for o, b1, b2 in zip(arrays["optimiser"], arrays["beta1"], arrays["beta2"])])


def shape_of(arrays):
    """N, M, d and embeddings of every run, [R] text."""
    return np.array([f"N{n} M{m} d{d}" + " canonical" * (e == "canonical") for n, m, d, e in zip(
        *(arrays[k] for k in ("n_tokens", "n_classes", "d_model", "emb")))])


def draw_plane(arrays, flags):
    """Singular values of the paths, what lies outside their best plane, and the dimension against the derived bound."""
    figure, axes = common.panels(4, f"Are trajectories planar? {flags.steps} steps in float64", flags, size=(6, 4.2))
    shapes, ways = shape_of(arrays), way_of(arrays)
    colours = dict(zip(dict.fromkeys(ways), common.COLOURS))
    for ax, norm in zip(axes, ("none", "sphere")):
        for way, colour in colours.items():
            mine = (shapes == shapes[0]) & (arrays["norm"] == norm) & (ways == way)
            s = np.median(arrays["spectrum"][mine], 0)
            ax.plot(np.arange(1, len(s) + 1), np.maximum(s, 1e-17), ".-", color=colour, ms=4, lw=.9, label=way)
        common.shelf(ax, 1e-9, "counted as dimension above")
        bound = np.nanmax(arrays["bound"][(shapes == shapes[0]) & (arrays["norm"] == norm)])
        ax.axvline(bound + .5, color="grey", ls=":", lw=.8)
        ax.annotate(f"bound of gd: {bound:g}", (bound + .5, 1e-15), fontsize=6.5, color="grey", ha="right", rotation=90)
        ax.set(yscale="log", xlabel="singular value of W_t - W_0", ylabel="relative to the first", ylim=(1e-17, 3))
        ax.set_title(f"{shapes[0]}, N {norm} (median of {flags.runs} seeds)", fontsize=9)
        ax.legend(fontsize=6)
    for norm, marker in (("none", "o"), ("sphere", "s")):
        for i, shape in enumerate(dict.fromkeys(shapes)):
            for j, (way, colour) in enumerate(colours.items()):
                mine = (shapes == shape) & (arrays["norm"] == norm) & (ways == way)
                x = i + (j - 3.5) / 10
                axes[2].plot(np.full(mine.sum(), x), np.maximum(arrays["outside"][mine], 1e-17), marker, color=colour, ms=3,
                             mfc=colour if norm == "none" else "none", label=f"N {norm}" if i + j == 0 else None)
    names = list(dict.fromkeys(shapes))
    axes[2].set_xticks(range(len(names)), [n.replace(" ", "\n") for n in names], fontsize=7)
    axes[2].set(yscale="log", ylabel="|W_t - W_0| outside its best plane")
    axes[2].legend(fontsize=6.5, loc="lower left")
    known = np.isfinite(arrays["bound"]) & ((arrays["norm"] == "none") | (arrays["optimiser"] == "gd"))
    jitter = np.random.default_rng(0).uniform(-.25, .25, known.sum())
    axes[3].plot(arrays["bound"][known] + jitter, arrays["rank"][known], "o", ms=3.5, color=BLUE, alpha=.6, mew=0)
    top = arrays["bound"][known].max()
    axes[3].plot([0, top], [0, top], "--", color="grey", lw=.8, label="bound")
    axes[3].set(xlabel="derived bound (spread by chance)", ylabel="measured dimension")
    axes[3].set_title("gd, momentum, normalised without N; gd with N", fontsize=9)
    axes[3].legend(fontsize=7)
    return figure


def draw_norm(arrays, flags):
    """|W| over training: the margin and its law without N; with N what stops, and what grows like sqrt t and t^(1/4)."""
    figure, axes = common.panels(4, "Does |W| diverge with constant steps and certain labels?", flags)
    t = np.arange(flags.steps + 1) + 1
    laws = [("one token", dict(n_tokens=1)), ("two orthogonal", dict(n_tokens=2, emb="canonical")),
            ("cos .5", dict(emb="pair", cos=.5)), ("cos .95", dict(emb="pair", cos=.95))]
    for (name, law), colour in zip(laws, common.COLOURS):
        mine = pick(arrays, norm="none", optimiser="gd", **law)
        axes[0].plot(t, arrays["margin"][mine][0], color=colour, label=name)
        if "cos" not in law:
            axes[0].plot(t, arrays["law"][mine][0], "--", color=colour, lw=2.2, alpha=.5)
        for ax, norm in ((axes[1], "none"), (axes[2], "sphere")):
            common.band(ax, t, arrays["weight_norm"][pick(arrays, norm=norm, optimiser="gd", **law)].T, name, colour)
    axes[0].set(xscale="log", xlabel="step + 1", ylabel="margin of the first token")
    axes[0].set_title("gd without N; dashed: e^m + (M-1) m = M lr p t + 1", fontsize=9)
    axes[1].set(xscale="log", xlabel="step + 1", ylabel="|W|")
    axes[1].set_title("gd without N: grows like log t", fontsize=9)
    axes[2].set(xscale="log", yscale="log", xlabel="step + 1", ylabel="|W|")
    axes[2].set_title("gd with N: stops (jumps: a token passes near zero)", fontsize=9)
    ax, two = axes[3], dict(n_tokens=1)
    for label, style, settings in (("normalised gd", RED, dict(optimiser="normalised", **two)),
                                   ("adam", ORANGE, dict(optimiser="adam", **two)),
                                   ("sgd, a quarter of the labels wrong", BLUE, dict(optimiser="sgd", label_noise=.25)),
                                   ("sgd, a tenth wrong", SKY, dict(optimiser="sgd", label_noise=.1))):
        common.band(ax, t, arrays["weight_norm"][pick(arrays, norm="sphere", **settings)].T, label, style)
    start = np.median(arrays["weight_norm"][pick(arrays, norm="sphere", optimiser="normalised", **two)][:, 0])
    ax.plot(t, np.sqrt(start ** 2 + flags.lr ** 2 * (t - 1)), "--", color="grey", lw=1, label="sqrt(|W_0|^2 + lr^2 t)")
    middle = np.median(arrays["weight_norm"][pick(arrays, norm="sphere", optimiser="sgd", label_noise=.25)][:, -1])
    ax.plot(t, middle * (t / t[-1]) ** .25, ":", color="grey", lw=1.2, label="t^(1/4)")
    ax.set(xscale="log", yscale="log", xlabel="step + 1", ylabel="|W|")
    ax.set_title("one token with N: other steps, noisy labels", fontsize=9)
    for ax in axes:
        ax.legend(fontsize=6.5)
    return figure


def draw_convexity(arrays, flags):
    """The loss on the circle with a spurious minimum and where descents end; end points, curvature and convexity by setting."""
    figure, axes = common.panels(4, "How many local minima, and convex in what?", flags, size=(6, 4))
    phi = np.linspace(-180, 180, 361)
    mine = pick(arrays, n_tokens=1, d_model=2, norm="sphere")
    vectors = torch.tensor(np.stack([np.cos(np.radians(phi)), np.sin(np.radians(phi))], 1))
    curve = losses(vectors @ torch.tensor(arrays["fan"]).T)[0][:, 0]
    axes[0].plot(phi, curve, color=BLACK, lw=1.2, label="loss of N(W e) = (cos, sin)")
    angle = np.degrees(arrays["angle"][mine])
    axes[0].plot(angle, arrays["loss"][mine][:, -1], "o", color=RED, ms=5, alpha=.5, label=f"ends of {mine.sum()} descents")
    for value, count in zip(*np.unique(arrays["loss"][mine][:, -1].round(3), return_counts=True)):
        common.shelf(axes[0], value, f"{value:.3f}: {count} of {mine.sum()}", side="left")
    axes[0].set(xlabel="angle of N(W e) from u_1 (degrees)", ylabel="loss (nats)", xticks=range(-180, 181, 60))
    axes[0].set_title("one token, classes at 0, 60 and -60 degrees, d < M", fontsize=9)
    axes[0].legend(fontsize=6.5, loc="upper center")
    names = setting_of(arrays)
    order = list(dict.fromkeys(names))
    for i, name in enumerate(order):
        for j, (norm, colour) in enumerate((("none", BLUE), ("sphere", RED))):
            runs = (names == name) & (arrays["norm"] == norm)
            x = i + (j - .5) / 3
            there = runs & settled(arrays)
            spread = np.random.default_rng(0).uniform(-.1, .1, len(runs))
            axes[1].plot(x + spread[runs & ~there], arrays["loss"][runs & ~there][:, -1], "x", color=colour, ms=3, alpha=.5)
            axes[1].plot(x + spread[there], arrays["loss"][there][:, -1], "o", color=colour, ms=3, alpha=.6, mew=0,
                         label=f"N {norm}" if i == 0 else None)
            axes[2].plot(x + spread[there], np.maximum(arrays["eigenvalues"][there][:, 0], -1), "o", color=colour, ms=3,
                         alpha=.6, mew=0)
            for key, marker, where in (("W", "s", "W"), ("h", "o", "W e"), ("vectors", "^", "N(W e)")):
                axes[3].plot(x, arrays[f"violated_{key}"][runs][0], marker, color=colour, ms=6, mfc="none",
                             label=f"N {norm}, in {where}" if i == 0 else None)
            if runs.any() and arrays["floor"][runs][0] > 0:
                axes[1].plot([x - .15, x + .15], [arrays["floor"][runs][0]] * 2, "--", color=BLACK, lw=1,
                             label="floor" if i == 1 else None)
    axes[1].set(ylabel="loss at the end (nats)", ylim=(-.03, None))
    axes[1].set_title("ends (crosses: not settled, gradient above 1e-3)", fontsize=9)
    axes[2].set_yscale("symlog", linthresh=1e-6)
    axes[2].set(ylabel="least Hessian eigenvalue")
    axes[2].set_title("curvature in W where it settled", fontsize=9)
    axes[3].set(ylabel="share of segments above their chord", ylim=(-.05, 1.05))
    axes[3].set_title("convexity along 1,000 random segments", fontsize=9)
    for ax in axes[1:]:
        ax.set_xticks(range(len(order)), order, fontsize=6.5)
    axes[1].legend(fontsize=7)
    axes[3].legend(fontsize=6.5)
    return figure


def setting_of(arrays):
    """Names of the settings of `convexity`, [R] text."""
    return np.array([f"N{n} d{d}\n{u} u" for n, d, u in zip(*(arrays[k] for k in ("n_tokens", "d_model", "unemb")))])


def settled(arrays):
    """Whether a descent came to rest, [R]."""
    return arrays["grad_norm"][:, -1] < 1e-3


def draw_projections(arrays, flags):
    """f1 and f2 over training, the path in their plane, and the loss with what the two guarantee."""
    figure, axes = common.panels(4, "Max-margin direction: f1 along W_inf, f2 the rest, and what they guarantee", flags)
    t = np.arange(arrays["f1"].shape[1]) + 1
    colours = dict(zip((0., .1, 1., 10.), common.COLOURS))
    for scale, colour in colours.items():
        for norm, style in (("none", "-"), ("sphere", ":")):
            mine = pick(arrays, emb="canonical", norm=norm, init_scale=scale)
            if not mine.any():
                continue
            i = np.flatnonzero(mine)[0]
            label = f"W_0 scale {scale:g}, N {norm}"
            axes[0].plot(arrays["f1"][i], arrays["f2"][i], style, color=colour, lw=1.2, label=label)
            axes[0].plot(arrays["f1"][i, 0], arrays["f2"][i, 0], "k.", ms=4)
            for r in np.flatnonzero(mine):
                axes[1].plot(t, arrays["f2"][r], style, color=colour, lw=1.2 if r == i else .5)
            ax = axes[2 if norm == "none" else 3]
            ax.plot(t, arrays["loss"][i], color=colour, lw=1.3, label=f"W_0 scale {scale:g}")
            ax.plot(t, arrays["guarantee"][i], "--", color=colour, lw=.9)
    limit = np.nanmax(arrays["limit"])
    common.shelf(axes[1], limit, f"log(p1/p2)/2 = {limit:.3f}: from zero, without N", colour=BLACK)
    axes[0].set(xlabel="f1", ylabel="f2", xscale="symlog", yscale="symlog")
    axes[0].set_title("two orthogonal tokens, seed 0", fontsize=9)
    axes[1].set(xscale="log", yscale="symlog", xlabel="step + 1", ylabel="f2", ylim=(0, None))
    axes[1].set_title(f"f2 over training, {flags.runs} seeds, dotted: with N", fontsize=9)
    axes[2].set(xscale="log", yscale="log", xlabel="step + 1", ylabel="loss (nats)")
    axes[2].set_title("without N, seed 0; dashed: guaranteed by f1 and f2", fontsize=9)
    axes[3].set(xscale="log", xlabel="step + 1", ylabel="loss (nats)")
    axes[3].set_title("with N, seed 0; dashed: guaranteed", fontsize=9)
    common.shelf(axes[3], floor_of(2), f"floor {floor_of(2):.4f}", side="left")
    for ax in (axes[0], axes[2], axes[3]):
        ax.legend(fontsize=6)
    return figure


def draw_spikes(arrays, flags):
    """Without N: losses at large steps and where spikes begin. With N: one spike on one time axis, and the path through it."""
    figure, axes = common.panels(4, "Spikes without N, and the largest of gd with N",
                                 flags, size=(6, 4))
    plain = pick(arrays, norm="none", seed=arrays["seed"].min())
    for rate, colour in ((1., BLUE), (10., RED)):
        i = np.flatnonzero(plain & (arrays["lr"] == rate))[0]
        axes[0].plot(arrays["loss"][i, :41], ".-", ms=3, color=colour, label=f"lr {rate:g}")
    axes[0].set(xlabel="step", ylabel="loss (nats)")
    axes[0].set_title(f"without N, cos {flags.cos:g}, p1 {flags.p1:g}, from zero", fontsize=9)
    axes[0].legend(fontsize=7)
    rises = (np.diff(arrays["loss"][plain], axis=1) > 1e-12).sum(1)
    axes[1].plot(arrays["lr"][plain], rises, "o", ms=4, color=BLUE, label="steps that raise the loss")
    axes[1].plot(arrays["lr"][plain], arrays["jump"][plain].sum(1), "s", ms=4, mfc="none", color=RED,
                 label="spikes (a tenth, .05 nats)")
    edge = 2 / arrays["sharpness"][plain].max()
    axes[1].axvline(edge, color="grey", ls="--", lw=.8)
    axes[1].annotate(f"2 / largest eigenvalue = {edge:.2f}", (edge, axes[1].get_ylim()[1] * .9), (-3, 0),
                     textcoords="offset points", fontsize=6.5, color="grey", ha="right")
    axes[1].set(xscale="log", xlabel="lr", ylabel=f"count in {flags.steps} steps")
    axes[1].set_title("without N: from which rate on?", fontsize=9)
    axes[1].legend(fontsize=7, loc="center left")
    i, s = largest_spike(arrays)
    if i is None:
        return figure
    low, high = max(0, s - 12), min(arrays["loss"].shape[1] - 1, s + 13)
    at, ax = np.arange(low, high), axes[2]
    for key, label, colour in (("loss", "loss (nats)", BLACK), ("grad_norm", "|gradient|", BLUE),
                               ("min_hidden_norm", "smallest |W e_x|", RED)):
        ax.plot(at, arrays[key][i, low:high], ".-", ms=3, color=colour, label=label)
    ax.plot(at, arrays["sharpness"][i, low:high] * arrays["lr"][i] / 2, ":", color=ORANGE, label="lr sharpness / 2")
    ax.axvline(s, color="grey", lw=.6)
    ax.set(yscale="log", xlabel="step")
    ax.set_title(f"with N: gd, cos {arrays['cos'][i]:g}, lr {arrays['lr'][i]:g}, seed {arrays['seed'][i]}", fontsize=9)
    ax.legend(fontsize=6.5)
    h = np.einsum("sij,xj->sxi", arrays["W"][i], arrays["E"][i])[low:high]
    for x, colour in enumerate((BLUE, GREEN)):
        axes[3].plot(*h[:, x].T, ".-", ms=4, lw=.9, color=colour, label=f"W e_{x + 1}")
        axes[3].plot(*h[s - low:s - low + 2, x].T, "-", lw=2.5, color=RED, label="the spike's step" if x == 0 else None)
    axes[3].plot(0, 0, "k+", ms=12)
    axes[3].set(xlabel="first coordinate", ylabel="second")
    axes[3].set_title("the same steps in the plane; +: the origin", fontsize=9)
    axes[3].axis("equal")
    axes[3].legend(fontsize=6.5)
    return figure


def largest_spike(arrays):
    """(run, step) of the largest rise of the loss within one step, of gd with N; (None, None) if there is none."""
    mine = np.flatnonzero(pick(arrays, norm="sphere", optimiser="gd"))
    rise = np.where(arrays["jump"][mine], np.diff(arrays["loss"][mine], axis=1), 0)
    if not rise.size or not rise.max() > 0:
        return None, None
    r, s = np.unravel_index(rise.argmax(), rise.shape)
    return int(mine[r]), int(s)


def draw_causes(arrays, flags):
    """Spikes with N: how many, and how often each cause is there at a spike and at any other step."""
    figure, axes = common.panels(3, "With N: which settings spike, what is there when they do, and what makes spikes go", flags,
                                 columns=3, size=(5.2, 4.2))
    with_N = arrays["norm"] == "sphere"
    cells = [(o, lr, c) for o in ("gd", "momentum", "adam")
             for lr in np.unique(arrays["lr"][with_N & (arrays["optimiser"] == o)]) for c in np.unique(arrays["cos"][with_N])]
    cosines = sorted({c for *_, c in cells})
    rates = list(dict.fromkeys((o, lr) for o, lr, _ in cells))
    for j, c in enumerate(cosines):
        share = [arrays["jump"][pick(arrays, norm="sphere", optimiser=o, lr=lr, cos=c)].any(1).mean() for o, lr in rates]
        axes[0].bar(np.arange(len(rates)) + (j - 1) / 4, share, .22, color=common.COLOURS[j], label=f"cos {c:g}")
    axes[0].set_xticks(range(len(rates)), [f"{o}\n{lr:g}" for o, lr in rates], fontsize=6.5)
    axes[0].set(ylabel=f"share of {flags.runs} seeds with a spike", xlabel="optimiser, learning rate")
    axes[0].legend(fontsize=7)
    for i, o in enumerate(("gd", "momentum", "adam")):
        for j, (k, (there, base)) in enumerate(causes(arrays, o).items()):
            x = i + (j - 1) / 4
            axes[1].bar(x, there.mean() if len(there) else 0, .2, color=common.COLOURS[j], label=CAUSES[k] if i == 0 else None)
            axes[1].annotate(f"{there.sum()} of {len(there)}\n({base:.3f})", (x, there.mean() if len(there) else 0), fontsize=6,
                             ha="center", va="bottom")
    axes[1].set_xticks(range(3), ["gd", "momentum", "adam"])
    axes[1].set(ylabel="share of runs, at their largest spike", ylim=(0, 1.3))
    axes[1].set_title("in brackets: share of all steps", fontsize=9)
    axes[1].legend(fontsize=6.5, ncol=2)
    relief = arrays["relieved"][np.isfinite(arrays["relieved"]).all(1)]
    names = "short vector made\nas long as usual", "other vector made\ntwice as long", "half the rate"
    for i in range(len(names)):
        spread = np.random.default_rng(0).uniform(-.2, .2, len(relief))
        axes[2].plot(i + spread, np.clip(relief[:, i], -1, 3), "o", ms=4, alpha=.6, mew=0, color=common.COLOURS[i])
        if len(relief):
            axes[2].plot(i, np.median(relief[:, i]), "_", color=BLACK, ms=24, mew=2)
    common.shelf(axes[2], 1, "as it was")
    common.shelf(axes[2], .5, "gone below")
    axes[2].set_xticks(range(len(names)), names, fontsize=7)
    axes[2].set(ylabel="rise of the loss / as it was (cut at -1, 3)")
    axes[2].set_title(f"gd: the step of {len(relief)} largest spikes again; lengths leave the loss as it is", fontsize=9)
    return figure


def draw_rates(arrays, flags):
    """Steps until every token has its class, for good, over (p1, cos) at four rates."""
    rates = np.unique(arrays["lr"])
    shown = rates[[0, len(rates) // 3, 2 * len(rates) // 3, -1]]
    figure, axes = common.panels(4, "Steps until all is correct and stays correct (white: not within "
                                 f"{flags.steps} steps)", flags, size=(5, 4))
    ps, cs = np.unique(arrays["p1"]), np.unique(arrays["cos"])
    for ax, rate in zip(axes, shown):
        grid = np.full((len(ps), len(cs)), np.nan)
        for i, j in np.ndindex(*grid.shape):
            value = arrays["correct"][pick(arrays, p1=ps[i], cos=cs[j], lr=rate)]
            grid[i, j] = np.log10(value[0]) if len(value) and np.isfinite(value[0]) and value[0] > 0 else np.nan
        common.image(ax, grid, f"lr {rate:.3g}; numbers: steps", figure, "cos", "p1", (0, 3), bar=False)
        for i, j in np.ndindex(*grid.shape):
            if np.isfinite(grid[i, j]):
                ax.text(j, i, f"{10 ** grid[i, j]:.0f}", fontsize=5.5, ha="center", va="center",
                        color="black" if grid[i, j] > 1.7 else "white")
        ax.set_xticks(range(len(cs)), [f"{c:g}" for c in cs], fontsize=6.5)
        ax.set_yticks(range(len(ps)), [f"{p:g}" for p in ps], fontsize=6.5)
    return figure


def draw_scaling(arrays, flags):
    """Steps times learning rate against the learning rate: where gradient flow ends."""
    figure, axes = common.panels(2, "Steps until all is correct, times the learning rate", flags)
    for ax, field, other, fixed in ((axes[0], "p1", "cos", .75), (axes[1], "cos", "p1", .75)):
        for value, colour in zip(np.unique(arrays[field])[1::3], common.COLOURS):
            mine = np.isclose(arrays[field], value) & np.isclose(arrays[other], fixed) & np.isfinite(arrays["correct"])
            mine &= arrays["correct"] > 0
            order = np.argsort(arrays["lr"][mine])
            ax.plot(arrays["lr"][mine][order], (arrays["lr"] * arrays["correct"])[mine][order], "o-", ms=3, color=colour,
                    label=f"{field} {value:g}, {other} {fixed:g}")
        ax.set(xlabel="learning rate", ylabel="lr x steps")
        if any(len(line.get_xdata()) for line in ax.lines):
            ax.set(xscale="log", yscale="log")
            ax.legend(fontsize=7)
    return figure


# The study `clusters`.

MARKERS = "os^DvP"  # of tokens and of classes: 0, 1, 2 (triangles), ..
THIN, SHOWN = 40, 512  # steps a point of a curve; sequences in a picture
WORDS = {"modulus": "p={}", "sparsity": "k={}", "width": "width {}", "untied": "tied", "freeze": "{} frozen",
         "source": "from {}", "lr": "rate {:g}", "batch": "batch {}", "d_model": "d={}"}


def dots(ax, x, values, colour):
    """One dot a run, side by side from the lowest, and their median."""
    values = np.sort(np.asarray(values, float)[np.isfinite(values)])
    if len(values):
        ax.plot(x + np.linspace(-.18, .18, len(values)), values, "o", color=colour, ms=4, alpha=.7, mew=0)
        ax.plot([x], [np.median(values)], "_", color=colour, ms=16, mew=2)


def cluster_names(arrays, flags):
    """Every configuration in words, [R]: the settings in which it differs from the study's own."""
    own = type(flags)(**common.study_defaults(type(flags), flags.study, flags.smoke))
    return np.array([", ".join(words.format(arrays[f][r].item()) for f, words in WORDS.items()
                               if arrays[f][r] != getattr(own, f)) or "own" for r in range(len(arrays["seed"]))])


def final_accuracy(arrays):
    """The last test accuracy of every run [R]; NaN where it diverged."""
    return np.array([a[np.isfinite(a)][-1] if np.isfinite(a).any() else np.nan for a in arrays["accuracy"]])


def draw_clusters(arrays, flags):
    """Loss and test accuracy of the own configuration, the accuracy of all at the end, and what it goes along with."""
    figure, (a, b, c, d) = common.panels(4, f"Sum of the first {flags.sparsity} of {flags.seq_length} tokens mod p, all in "
                                         f"d = {flags.d_model}", flags, size=(6.4, 4.2))
    names, final = cluster_names(arrays, flags), final_accuracy(arrays)
    mine, p = names == names[0], int(arrays["modulus"][0])
    steps = THIN * np.arange(1, arrays["curve_loss"].shape[1] + 1)
    common.band(a, steps, arrays["curve_loss"][mine].T, f"{names[0]}, mean of {THIN} steps", BLUE)
    common.shelf(a, math.log(p), f"chance: log {p} = {math.log(p):.3g} nats")
    a.set(xlabel="step", ylabel="training loss (nats)", yscale="log")
    common.band(b, arrays["step"][mine][0], arrays["accuracy"][mine].T, names[0], BLUE)
    common.shelf(b, 1 / p, f"chance: {1 / p:.3g}")
    b.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1.03))
    order = list(dict.fromkeys(names))
    for i, name in enumerate(order):
        q = arrays["modulus"][names == name][0]
        dots(c, i, final[names == name], RED if q == 3 else BLUE)
        c.plot([i - .35, i + .35], [1 / q] * 2, "--", color="grey", lw=.8, label=None if i else "chance")
    c.set_xticks(range(len(order)), [f"{n} ({(names == n).sum()})" for n in order], rotation=45, ha="right", fontsize=7)
    c.set(ylabel="test accuracy at the end (runs)", ylim=(0, 1.03))
    for q, key, colour, words in ((2, "r2_counts", BLUE, "p = 2, counts of first k"), (3, "r2_counts", RED, "p = 3, counts"),
                                  (2, "r2_signed", GREEN, "p = 2, best signed sum of first k")):
        which = pick(arrays, modulus=q, freeze="none")
        d.plot(arrays[key][which], final[which], MARKERS[q - 2], color=colour, ms=4, alpha=.7, mew=0,
               label=f"{words} ({which.sum()} runs, nothing frozen)")
        if key == "r2_counts":
            common.shelf(d, 1 / q, f"chance, p = {q}", side="left")
    d.set(xlabel="share of the variance of h that this explains", ylabel="test accuracy at the end", ylim=(0, 1.03),
          xlim=(-.03, 1.03))
    for ax in (a, b, c, d):
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    return figure


def regions(ax, logits_of, points):
    """Where each class wins, in pale colour, and level lines where the winner's probability is .9 and .99. points [n, 2]."""
    low, high = (points.min(0), points.max(0))
    low, high = low - .15 * (high - low) - 1e-3, high + .15 * (high - low) + 1e-3
    x, y = (np.linspace(low[i], high[i], 200) for i in (0, 1))
    grid = torch.tensor(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2), dtype=torch.float32)
    best, winner = (v.reshape(200, 200).numpy() for v in torch.softmax(logits_of(grid), -1).max(-1))
    pale = plt.matplotlib.colors.ListedColormap([plt.matplotlib.colors.to_rgba(c, .2) for c in common.COLOURS])
    ax.imshow(winner, extent=(low[0], high[0], low[1], high[1]), origin="lower", aspect="auto", cmap=pale, vmin=0, vmax=7,
              interpolation="nearest")
    if best.max() > .9:
        ax.contour(x, y, best, levels=[.9, .99], colors="grey", linewidths=(.5, 1))


def flat(x):
    """x [n, d] in a plane: itself in d = 2, else its two principal components (d = 1: beside zeros)."""
    if x.shape[1] > 2:
        x = x - x.mean(0)
        return (x @ torch.linalg.svd(x, full_matrices=False)[2][:2].T).numpy()
    return torch.nn.functional.pad(x, (0, 2 - x.shape[1])).numpy()


def sheet_of(axes, params, run, x, y):
    """All stages of one model in six axes: embeddings, normalised, attention, after attention, and after the MLP's layers."""
    number, p, k, L = numbers_plane(run), run.modulus, run.sparsity, run.seq_length
    _, e, h = forward_plane(params, one_hot(x, run.vocab), number)
    _, hidden, out = read_plane(params, h, number)
    _, u, score = table_of(params)
    for ax, points, title in ((axes[0], e, "embeddings e = E + P"), (axes[1], u, "normalised u; arrow: the query's direction")):
        for token in range(p):
            at, style = flat(points[:, token]), dict(color=common.COLOURS[token % 8], ms=6)
            ax.plot(*at[:k].T, MARKERS[token % 6], label=f"token {token}, position 1 .. {k}", **style)
            ax.plot(*at[k:].T, MARKERS[token % 6], mfc="white", **style)
            for i, place in enumerate(at):
                ax.annotate(str(i + 1), place, xytext=(4, 2), textcoords="offset points", fontsize=6)
        ax.plot(0, 0, "+", color=BLACK)
        ax.set_title(title, fontsize=9)
    axes[0].legend(fontsize=6, title="hollow: later positions", title_fontsize=6)
    if run.d_model == 2:
        axes[1].annotate("", (params["query"] / params["query"].norm()).numpy(), (0, 0), arrowprops=dict(arrowstyle="->"))
        axes[1].set_aspect("equal", adjustable="datalim")
    w = torch.exp(score - score.max())[:, :p]
    w = (w * L / w.mean(1).sum()).T  # [p, L]
    axes[2].imshow(w, aspect="auto", cmap="viridis", vmin=0, vmax=3)
    for (t, i), value in np.ndenumerate(w.numpy()):
        axes[2].text(i, t, f"{value:.1f}", ha="center", va="center", fontsize=6, color="white" if value < 1.5 else "black")
    axes[2].set(xticks=range(L), xticklabels=range(1, L + 1), yticks=range(p), xlabel="position", ylabel="token")
    axes[2].set_title("attention, times what is uniform, in a mean sequence", fontsize=9)
    total, top = x[:, :k].sum(1).numpy(), (p - 1) * k
    unembed = lambda z: torch.where(torch.arange(run.vocab) < p, z @ (params["U"] if run.untied else params["E"]).T, -1e9)
    for ax, points, title, logits_of in (
            (axes[3], h, "after attention: h", lambda z: read_plane(params, z, number)[0]),
            (axes[4], hidden, "after the MLP's first layer (2 principal components)", None),
            (axes[5], out, "after its second layer, residual added: out", unembed)):
        at = flat(points)
        if logits_of and run.d_model == 2:
            regions(ax, logits_of, at)
        for label in range(p):
            which = (y == label).numpy()
            ax.scatter(*at[which].T, c=total[which], vmin=0, vmax=top, cmap="plasma", marker=MARKERS[label % 6], s=14,
                       edgecolors="black", linewidths=.3, label=f"y = {label}")
        ax.set_title(title, fontsize=9)
        ax.tick_params(labelsize=6)
    axes[3].legend(fontsize=6, title=f"fill: sum of the first {k}, 0 .. {top}", title_fontsize=6)


def draw_sheet(arrays, flags, which="frame", still=True):
    """The stages of the best run: at the end, or as an animation over training."""
    if f"{which}_E" not in arrays:
        return common.panels(1, "no parameters were kept: give --snapshots", flags)[0]
    kind = lambda f, value: type(getattr(flags, f))(value)
    run = replace(flags, **{f: kind(f, arrays[f][int(arrays[f"{which}_run"])]) for f in TASK + ("seed",)})
    (x, y), steps = sequences(run), arrays[f"{which}_step"]
    figure, axes = common.panels(6, "", flags, columns=3, size=(4.6, 3.6))
    title = figure.suptitle(" \n ", fontsize=10)
    test = one_hot(x[run.n_train:], run.vocab), y[run.n_train:]

    def frame(i):
        for ax in axes:
            ax.clear()
        params = {k: torch.tensor(arrays[f"{which}_{k}"][i]) for k in init_plane(run, torch.Generator())}
        sheet_of(axes, params, run, x[-SHOWN:], y[-SHOWN:])
        accuracy = evaluate_plane(run, params, test)["accuracy"]
        title.set_text(f"Every stage in d = {run.d_model}: sum of the first {run.sparsity} mod {run.modulus}, seed {run.seed}, "
                       f"step {steps[i]}, test accuracy {accuracy:.2f}\nbackground: the winning class; lines: its probability "
                       "is .9 and .99")
    if still:
        frame(len(steps) - 1)
        return figure
    return figure, len(steps), frame


def draw_replays(arrays, flags):
    """The largest spike that stays and the largest that vanishes with norms bounded; what happens before spikes and in windows
    without one; and the height of replayed spikes under each intervention."""
    height, count = arrays["fork_height"], len(arrays["spike_step"])
    figure, axes = common.panels(4, f"What are the {count} spikes of {arrays['n_searched']} runs?", flags, size=(6.4, 4.2))
    gone = np.flatnonzero(height[BOUNDED] < .5)
    for ax, j in zip(axes, [*np.setdiff1d(range(height.shape[1]), gone)[:1], *gone[:1]]):
        around = lambda key: arrays[f"around_{key}"][:, j]
        t, r = np.arange(len(arrays["around_loss"])) - LEAD - CALM, int(arrays["fork_run"][j])
        for key, colour, words in (("loss", BLUE, "loss (nats)"), ("norm_embedding", GREEN, "smallest norm of embeddings"),
                                   ("norm_sequence", RED, "smallest norm after attention (batch)")):
            ax.plot(t, around(key), color=colour, lw=.8, label=words)
        down, bend = (common.smooth(around(k), 10) for k in ("descent", "bend"))
        ax.plot(t, np.where(down > 0, bend / np.where(down > 0, down, 1), np.nan), color=ORANGE, lw=.8,
                label="overshoot, 10 steps")
        start = int(arrays["fork_start"][j] - arrays["fork_step"][j])
        ax.plot(range(start, CALM), arrays["fork_loss"][BOUNDED, j, :CALM - start], color=BLACK, lw=.7, ls=":",
                label="loss, replayed with norms bounded")
        common.shelf(ax, 1, "overshoot above 1: steps raise their own batch's loss", side="left")
        ax.set(yscale="log", xlabel=f"step relative to {arrays['fork_step'][j]}", ylim=(1e-3, None))
        ax.set_title(f"{cluster_names(arrays, flags)[r]}, seed {arrays['seed'][r]}: the largest spike that "
                     + ("vanishes" if j in gone else "stays") + " with norms bounded", fontsize=9)
        ax.legend(fontsize=6, loc="lower left")
    for offset, which, colour, words in ((-.18, "spike", RED, "before a spike"), (.18, "null", "grey", "same runs, no spike")):
        for i, agree in enumerate(seen_in(arrays, which).values() if count else ()):
            bar = axes[2].bar(i + offset, agree.mean(), .34, color=colour, label=None if i else words)
            axes[2].bar_label(bar, [f"{agree.sum()} of {len(agree)}"], fontsize=7)
    axes[2].set_xticks(range(len(SIGNS)), SIGNS, fontsize=7)
    axes[2].set(ylabel=f"share of windows of {LEAD} steps", ylim=(0, 1.1))
    if count:
        axes[2].legend(fontsize=7)
    for i in range(len(INTERVENTIONS)):
        dots(axes[3], i, np.clip(height[i], -.5, 2), RED if i == BOUNDED else BLUE)
    axes[3].set_xticks(range(len(INTERVENTIONS)), INTERVENTIONS, fontsize=7)
    axes[3].set(ylabel="height, replayed / as it was (cut at -0.5 and 2)", ylim=(-.6, 2.1))
    common.shelf(axes[3], .5, "gone below", side="left")
    axes[3].set_title(f"the {height.shape[1]} largest, replayed from before under an intervention", fontsize=9)
    return figure


def tuned_and_scratch(arrays, source):
    """Masks of the runs from a parent and of those from scratch on the same task, and this task's settings."""
    tuned = pick(arrays, source=source)
    task = {k: arrays[k][tuned][0] for k in TASK if k != "source"}
    return tuned, pick(arrays, source="", **task), task


def draw_finetune(arrays, flags):
    """Test accuracy over training from a checkpoint, against scratch."""
    parents = [s for s in PARENTS if s in arrays["source"]]
    figure, axes = common.panels(max(1, len(parents)), "Does a solved task help with the next?", flags, 3, (4.6, 3.6))
    for ax, source in zip(axes, parents):
        tuned, scratch, task = tuned_and_scratch(arrays, source)
        for mask, words, colour in ((scratch, "from scratch", BLUE), (tuned, f"from the best run with {source}", RED)):
            until = arrays["step"][mask][0] <= np.nanmax(arrays["step"][tuned])
            common.band(ax, arrays["step"][mask][0][until], arrays["accuracy"][mask][:, until].T, words, colour)
        common.shelf(ax, 1 / task["modulus"], "chance")
        ax.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1.03))
        ax.set_title(f"sum of the first {task['sparsity']} mod {task['modulus']}", fontsize=9)
        ax.legend(fontsize=7)
    return figure


# ---- Main -----------------------------------------------------------------------------------------------------------

NOTES = "research notes on normalised associative memories"
OURS, ORIGINAL = "this project", "stored results of the notes' code"
CLUSTERING, VISUAL = "Odonnat et al. 2024, Clustering Head", "research notes on clusters in the plane"

METHODS = {"SGD": ("sgd", False), "LN": ("sgd", True), "sign": ("sign", False), "sign+LN": ("sign", True),
           "Adam": ("adam", False), "Adam+LN": ("adam", True)}  # of the study `ranking`, with N or not; sign and Adam at lr / d
RATES = (.1, 1., 10., 100.)
ORIGINAL_ERROR = {10: (.203, .133, .094, .059), 100: (.073, .069, .044, .018)}  # d: SGD, LN, sign, sign+LN at lr .1


def points_of(flags):
    """The configurations of a study, as dicts of fields."""
    if flags.study == "clusters":
        return cluster_points(flags)
    few, own = flags.smoke, ("gd", "momentum", "normalised", "sign", "adam")
    if flags.study == "landscape":
        return [dict(cos=c, norm=n, optimiser=o) for o in (own[:2] if few else own) for n in ("none", "sphere")
                for c in ((.5,) if few else (-.5, .5, .95))]
    if flags.study == "ranking":
        N, M, d = flags.n_tokens, flags.n_classes, flags.d_model
        shapes = [(N, M, width) for width in (d, 2 * d, 5 * d, 10 * d)] + [(N // 5, M, 2 * d), (N, 2, 2 * d), (N, 4 * M, 2 * d)]
        return [dict(n_tokens=n, n_classes=m, d_model=w, optimiser=o, norm=norm and flags.ln or "none",
                     lr=lr / (1 if o == "sgd" else w))
                for n, m, w in (shapes[:1] if few else shapes) for o, norm in METHODS.values() for lr in RATES]
    if flags.study == "plane":
        shapes = [(flags.n_tokens, flags.n_classes, flags.d_model), (3, 3, 6), (2, 3, 6), (8, 2, 3), (2, 2, 2)]
        ways = [dict(optimiser=o) for o in own[:4]] + [dict(optimiser="adam", beta1=b1, beta2=b2) for b1, b2 in
                                                       ((.9, .999), (0., .999), (.9, .9), (0., 0.))]
        return [dict(n_tokens=N, n_classes=M, d_model=d, emb=e, unemb=e, norm=norm) | way
                for N, M, d in (shapes[-1:] if few else shapes) for way in (ways[::4] if few else ways)
                for norm in ("none", "sphere") for e in (("gauss", "canonical") if (N, M, d) == (2, 2, 2) else ("gauss",))]
    if flags.study == "norm":
        one, two = dict(n_tokens=1, emb="canonical"), dict(n_tokens=2, emb="canonical")
        laws = [one, two] + [dict(n_tokens=2, emb="pair", cos=c) for c in (.5, .95)]
        grid = [law | dict(norm=n, optimiser=o, init_scale=float(n != "none"), label_noise=0., batch=0)
                for law in laws for n in ("none", "sphere") for o in ("gd", "normalised", "adam")]
        grid = [p | dict(lr=.01 if p["optimiser"] == "adam" else flags.lr) for p in grid]
        noisy = one | dict(norm="sphere", optimiser="sgd", init_scale=1., batch=1, lr=flags.lr)
        return grid + [noisy | dict(label_noise=q) for q in (.1, .25)]
    if flags.study == "convexity":
        flat = dict(n_tokens=1, n_classes=3, d_model=2, emb="canonical", unemb="fan")
        full = dict(n_tokens=3, n_classes=3, d_model=3, emb="sphere", unemb="canonical")
        laws = [flat, full, full | dict(n_tokens=1, emb="canonical"), full | dict(d_model=2, unemb="fan"),
                full | dict(n_tokens=6)]
        return [law | dict(norm=n) for law in (laws[:1] if few else laws) for n in ("sphere", "none")]
    if flags.study == "projections":
        return [dict(emb=e, norm=n, init_scale=s) for e in ("canonical", "pair") for n in ("none", "sphere")
                for s in (0., .1, 1., 10.) if s or n == "none"]
    if flags.study == "spikes":
        rates = [float(f"{x:.3g}") for x in np.geomspace(.5, 32, 2 if few else 40)] + [1., 10.]
        plain = [dict(norm="none", init_scale=0., cos=flags.cos, lr=x, optimiser="gd") for x in rates]
        return plain + [dict(norm="sphere", init_scale=1., cos=c, lr=x, optimiser=o) for o, rates in (
            ("gd", (.3, 1., 10.)), ("momentum", (.1, 1., 10.)), ("adam", (.03, .3, 1.)))
                        for x in (rates[:1] if few else rates) for c in (0., .5, .95)]
    if flags.study == "rates":
        axis, rates = np.linspace(.5, .95, 10).round(3).tolist(), np.geomspace(.1, 10, 10).round(4).tolist()
        grid = [dict(p1=p, cos=c, lr=x) for p in axis for c in axis for x in rates]
        return grid[::99] if few else grid
    return []


def train_groups(flags, folder):
    """Train every configuration of a study. Returns a list of (runs, arrays of `train`) and, with one entry a run, settings and
    curves; where shapes are the same in all groups everything else too, or else it lies in group*/arrays.npz."""
    groups, parts, settings = common.groups_of_runs(flags), [], []
    for i, runs in enumerate(groups):
        sub = folder.sub(i, len(groups))
        kept, metrics, snapshots = train(runs, sub)
        sub.result(runs, metrics, {k: common.blanked(kept[k][:, -1], kept["loss"][:, -1]) for k in CURVES}, snapshots)
        settings.append({f: np.array([getattr(run, f) for run in runs]) for f in COLUMNS})
        parts.append((runs, kept))
        if folder.interrupted:
            break
    alike = all(len({kept[k].shape[1:] for _, kept in parts}) == 1 for k in ("W", "E", "U"))
    for i, (_, kept) in enumerate(() if alike else parts):
        folder.sub(i, len(groups)).write_npz("arrays.npz", kept)
    steps = {"W_step": parts[0][1].pop("W_step")} if alike else {}
    shared = (*CURVES, *(("W", "E", "U", "joint", "p", "y") if alike else ()))
    return parts, steps | {k: common.padded([s[k] for s in settings]) for k in COLUMNS} | {
        k: common.padded([kept[k] for _, kept in parts]) for k in shared}


def measured(parts, columns, measure):
    """columns, and what measure(run, numbers, kept) returns for every run, stacked; a diverged run's are NaN."""
    double = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x
    rows = [measure(run, common.run_of(constants([replace(run, dtype="float64")]), 0),
                    {k: double(v[r]) for k, v in kept.items() if k != "W_step"}) for runs, kept in parts for r,
                    run in enumerate(runs)]
    return columns | {k: common.blanked(v, columns["loss"][:, -1]) for k, v in common.stacked(rows).items()}


def compute_landscape(flags, folder):
    """off_gamma [R]: largest part of W_t - W_0 outside (u_1 - u_2) x R^2, relative; gamma_alone: largest difference of the
    losses of W that share gamma (none); critical points on the torus: theta [C, 2], loss, index [C]."""
    parts, columns = train_groups(flags, folder)

    def measure(run, n, kept):
        X, u = kept["W"] - kept["W"][0], kept["U"][0] - kept["U"][1]
        u = u / np.linalg.norm(u)
        off = X - np.einsum("i,j,tjk->tik", u, u, X)
        return {"off_gamma": np.linalg.norm(off, axis=(1, 2)).max() / max(np.linalg.norm(X, axis=(1, 2)).max(), 1e-300)}
    columns = measured(parts, columns, measure)
    law = law_of(parts[0][0][0])
    gap = law["U"][0] - law["U"][1]
    own = common.run_of(constants([replace(parts[0][0][0], norm="none", dtype="float64")]), 0)
    W, shift = torch.randn(2, 1000, 2, 2, generator=common.generator(flags.seed, "eval"), dtype=torch.float64)
    shift = shift - torch.einsum("i,j,sjk->sik", gap, gap, shift) / (gap @ gap)  # leaves gamma as it is
    loss = torch.vmap(lambda W: loss_and_gradient(W, own["joint"], own)[0]["loss"])
    columns["gamma_alone"] = float((loss(W) - loss(W + shift)).abs().max())
    for name, x in zip(("theta", "loss", "index"), critical_points(law)):
        columns[f"critical_{name}"] = x
    return columns


def compute_ranking(flags, folder):
    """method [R] (text), rate [R]: the learning rate, that of sign and Adam times d; guess [R]: error of the likeliest
    class."""
    parts, columns = train_groups(flags, folder)
    names = {way: name for name, way in METHODS.items()}
    columns["method"] = np.array([names.get(way, "other") for way in zip(columns["optimiser"], columns["norm"] != "none")])
    columns["guess"] = np.array([1 - joint_of(run).sum(0).max() for runs, _ in parts for run in runs])
    return columns | {"rate": columns["lr"] * np.where(columns["optimiser"] == "sgd", 1, columns["d_model"])}


FREE = ["gd", "momentum", "normalised"]  # optimisers whose steps are combinations of gradients


def compute_plane(flags, folder):
    """spectrum [R, d^2] (divided by its largest), rank [R] at 1e-9 of it, outside [R] (share of |W_t - W_0| beyond its best
    plane), gram_schmidt [R], bound [R] (derived, of gd, momentum and normalised gd: min(N, d) times min(d, M - 1) without N,
    times min(d, N + M - 1) with it; else NaN), class_dimension and class_formula [R], meets [R] (difference of the vectors of W
    / |W| and W), class_step and scale_step [R] of gd under the norm."""
    parts, columns = train_groups(flags, folder)

    def measure(run, n, kept):
        s = spectrum(kept["W"])
        N, M, d = run.n_tokens, run.n_classes, run.d_model
        bound = math.nan
        if run.optimiser in FREE:
            bound = min(N, d) * min(d, M - 1 if run.norm == "none" else N + M - 1)
        found = {"spectrum": s / s[0], "rank": (s > 1e-9 * s[0]).sum(), "outside": np.sqrt((s[2:] ** 2).sum() / (s ** 2).sum()),
                 "gram_schmidt": gram_schmidt(kept["W"]), "bound": bound, "class_dimension": math.nan,
                 "class_formula": math.nan, "meets": math.nan, "class_step": math.nan, "scale_step": math.nan}
        if run.norm != "none":
            W = torch.tensor(kept["W"][0])
            found |= {"meets": float((directions(W / W.norm(), n) - directions(W, n)).abs().max()),
                      "class_dimension": class_dimension(W, n), "class_formula": N + d * (d - N) if N <= d else 1}
            if run.optimiser == "gd" and N <= d:
                factors = 1 + torch.rand(N, generator=common.generator(run.seed, "eval"), dtype=torch.float64)
                found |= {"class_step": class_step(W, n, factors, run.lr),
                          "scale_step": class_step(W, n, 0 * factors + 2, run.lr)}
        return found
    return measured(parts, columns, measure)


def compute_norm(flags, folder):
    """margin [R, T+1] of the first token, law [R, T+1] (gradient flow from 0, without N), pythagoras [R]: largest
    | |W_t+1|^2 - |W_t|^2 - |W_t+1 - W_t|^2 | / |W_t|^2, and inner [R]: largest <W, step> / |W| over the longest step; both at
    steps whose gradient is above 1e-9 (below, its direction is rounding)."""
    parts, columns = train_groups(flags, folder)

    def measure(run, n, kept):
        W, T = kept["W"], len(kept["W"])
        step, size, sound = W[1:] - W[:-1], (W ** 2).sum((1, 2)), kept["grad_norm"][:-1] > 1e-9
        u = kept["U"][kept["y"][0]] - kept["U"][kept["y"][0] - 1]
        length = (step ** 2).sum((1, 2))
        largest = lambda x: np.abs(x[sound]).max(initial=0)
        return {"margin": W @ kept["E"][0] @ u, "law": margin_law(np.arange(T), run.n_classes, run.lr, kept["p"][0]),
                "pythagoras": largest((size[1:] - size[:-1] - length) / np.maximum(size[:-1], 1e-300)),
                "inner": largest((W[:-1] * step).sum((1, 2)) / np.sqrt(np.maximum(size[:-1] * length.max(), 1e-300)))}
    return measured(parts, columns, measure)


def compute_convexity(flags, folder):
    """eigenvalues [R, d^2] of the Hessian in W at the end; floor [R]; angle [R] of N(W e_1) at the end; violated_W,
    violated_h and violated_vectors [R]: share of random segments above their chord, in W, in W e_x and in N(W e_x)."""
    parts, columns = train_groups(flags, folder)
    columns["fan"], shares = embeddings("fan", 3, 2, 0., None), {}

    def measure(run, n, kept):
        key = replace(run, seed=flags.seed)
        if str(key) not in shares:
            g, m = common.generator(flags.seed, "eval"), common.run_of(constants([key]), 0)
            shares[str(key)] = {f"violated_{x}": violated(key, m, x, g) for x in ("W", "h", "vectors")}
        W = torch.tensor(kept["W"][-1])
        v = kept["W"][-1] @ kept["E"][0]
        return shares[str(key)] | {"eigenvalues": hessian(W, n), "angle": math.atan2(v[1], v[0]),
                                   "floor": floor_of(run.n_classes) * (run.norm == "sphere" and run.unemb == "canonical")}
    return measured(parts, columns, measure)


def compute_projections(flags, folder):
    """f1, f2, guarantee (of the loss), certain (of all answers) [R, T+1], W_inf [R, d, d], widest [R] (margin of W_inf), limit
    [R]: log(p1/p2)/2 or NaN."""
    parts, columns = train_groups(flags, folder)

    def measure(run, n, kept):
        law = [kept[k] for k in ("E", "U", "p", "y")]
        W_inf, widest = max_margin(law[0], law[1], law[3])
        f1 = (kept["W"] * W_inf).sum((1, 2))
        f2 = np.linalg.norm(kept["W"] - f1[:, None, None] * W_inf, axis=(1, 2))
        bound, certain = guarantee(f1, f2, *law, W_inf, run.norm)
        if run.norm in ("rms", "layernorm"):
            bound, certain = np.full_like(bound, math.nan), certain & (run.norm == "rms")  # LayerNorm moves margins
        orthonormal = run.emb == run.unemb == "canonical" and run.n_tokens == run.n_classes == 2
        return {"f1": f1, "f2": f2, "guarantee": bound, "certain": certain, "W_inf": W_inf, "widest": widest,
                "limit": math.log(kept["p"][0] / kept["p"][1]) / 2 if orthonormal and run.norm == "none" else math.nan}
    return measured(parts, columns, measure)


def compute_spikes(flags, folder):
    """jump [R, T]: where the loss rises by a tenth and .05 nats; what may cause it, [R, T]: small (a token's |W e_x| is below
    half its median over training), sharp (lr sharpness / 2 > 1) and turned (a W e_x turns by more than 90 degrees); sharpness
    [R, T+1]: the largest Hessian eigenvalue; largest [R]: the step of the largest spike, or -1; relieved [R, 3]: see
    `relieved`."""
    parts, columns = train_groups(flags, folder)

    def measure(run, n, kept):
        h = np.einsum("tij,xj->txi", kept["W"], kept["E"])
        size = np.linalg.norm(h, axis=2)
        sharpness = torch.vmap(lambda W: hessian(W, n)[-1])(torch.tensor(kept["W"])).numpy()
        jump = jumps(kept["loss"])
        largest = int(np.where(jump, np.diff(kept["loss"]), 0).argmax()) if jump.any() else -1
        gd = largest >= 0 and run.norm == "sphere" and run.optimiser == "gd" and run.n_tokens <= run.d_model
        return {"jump": jump, "sharpness": sharpness, "sharp": run.lr * sharpness[:-1] > 2, "largest": largest,
                "small": (size < np.median(size, 0) / 2).any(1)[:-1], "turned": ((h[1:] * h[:-1]).sum(2) < 0).any(1),
                "relieved": relieved(torch.tensor(kept["W"][largest]), n, run.lr, np.median(size, 0)) if gd else [math.nan] * 3}
    return measured(parts, columns, measure)


def relieved(W, n, lr, usual):
    """Rise of the loss in the step of gd from W over what it was, if that step starts from another member of the class C(W)
    (the same vectors N(W e_x), the same loss): with the token that is shortest for its usual length made that long; with the
    other tokens made twice as long, a control; and, from W itself, with half the rate."""
    loss = lambda W: loss_and_gradient(W, n["joint"], n)[0]["loss"]
    rise = lambda W, lr: float(loss(W - lr * loss_and_gradient(W, n["joint"], n)[1]) - loss(W))
    h = product(n["E"], W.T)
    share = h.norm(dim=1) / torch.tensor(usual)
    short = torch.arange(len(h)) == share.argmin()
    member = lambda factors: (torch.linalg.pinv(n["E"]) @ (factors[:, None] * h)).T
    own = rise(W, lr)
    return [rise(member(torch.where(short, 1 / share, 1.)), lr) / own, rise(member(torch.where(short, 1., 2.)), lr) / own,
            rise(W, lr / 2) / own]


CAUSES = {"small": "a |W e_x| below half its median", "sharp": "lr sharpness / 2 > 1",
          "turned": "a W e_x turns by > 90 degrees"}


def causes(arrays, optimiser):
    """{cause: (whether it is there at the largest spike of each run with N that has one [runs], share of all steps)}."""
    mine = np.flatnonzero(pick(arrays, norm="sphere", optimiser=optimiser))
    with_spike = mine[arrays["largest"][mine] >= 0]
    at = arrays["largest"][with_spike].astype(int)
    return {k: (arrays[k][with_spike, at] > 0, float(np.nanmean(arrays[k][mine]))) for k in CAUSES}


def compute_rates(flags, folder):
    """correct [R]: first step from which every token has its class, to the end; infinite where none."""
    columns = train_groups(flags, folder)[1]
    wrong = columns["accuracy"] < 1
    last = wrong.shape[1] - 1 - wrong[:, ::-1].argmax(1)
    correct = np.where(wrong.any(1), last + 1., 0.)
    return columns | {"correct": np.where(wrong[:, -1], np.inf, correct)}


def always(arrays, say, flags):
    """The claim that holds for every run."""
    finite = np.isfinite(arrays["loss"][:, -1])
    radius = {"none": math.inf, "sphere": 1.}
    known = zip(*(arrays[k] for k in ("n_classes", "d_model", "norm", "unemb", "label_noise")))
    floor = np.array([floor_of(M, radius.get(norm, math.sqrt(d))) if u == "canonical" and q == 0 else
                      noise_entropy(q, M) for M, d, norm, u, q in known])
    least = np.nanmin((arrays["loss"] - floor[:, None])[finite], initial=np.inf)
    say("loss-above-floor", "no loss lies below the floor: of vectors N(h) of one length and orthonormal u with certain labels "
        "log(1 + (M-1) exp(-|N| sqrt(M/(M-1)))), else the entropy of the labels", OURS,
        ">= 0", f"least difference {least:.2g} in {finite.sum()} runs", bool(least > -1e-12) if finite.any() else None, True)


def sure(values, agree):
    """measured and verdict of runs in which nothing is random, so that seeds are copies: one run decides."""
    if len(np.unique(values)) > 1:
        return values, agree
    return f"{values[0]:.3g} (nothing is random here: one run)", bool(agree[0])


judged = functools.partial(common.judged, always=always, columns=COLUMNS)


def per_seed(arrays, x, mask, extreme=np.max):
    """The worst value of each seed among the runs in `mask`."""
    return np.array([extreme(x[mask & (arrays["seed"] == seed)]) for seed in np.unique(arrays["seed"])])


def end(arrays, key, **settings):
    """The last value of a curve, one a seed; a diverged run's is NaN."""
    return by_seed(arrays, common.blanked(arrays[key][:, -1], arrays["loss"][:, -1]), **settings)


@judged
def judge_landscape(arrays, say, flags):
    alone = float(arrays["gamma_alone"])
    say("gamma-alone", "without N the loss depends on gamma = W'(u_1 - u_2) alone (an identity, checked)",
        f'{NOTES}: "dans le cas SGD, on s\'interesse qu\'a (u_1 - u_2) e_i\'"', "0 nats", f"{alone:.1g}", alone < 1e-12, True)
    for kind, words in (("gd", "gradient descent"), ("adam", "Adam")):
        off = np.max([by_seed(arrays, "off_gamma", norm="none", optimiser=kind, cos=c) for c in np.unique(arrays["cos"])], 0)
        say(f"{kind}-in-two", f"{words} moves W in the two dimensions of gamma alone (u canonical)",
            f'{NOTES}: "Je suis pas sur que ca soit aussi le cas pour Adam"', "share outside < 1e-6", off, off < 1e-6)
    values = np.sort(arrays["critical_loss"])
    low, high = floor_of(2), math.log1p(math.exp(math.sqrt(2)))
    p = flags.p1
    expected = np.sort([low, p * low + (1 - p) * high, p * high + (1 - p) * low, high])
    same = len(values) == 4 and np.abs(values - expected).max() < 1e-9 and sorted(arrays["critical_index"]) == [0, 1, 1, 2]
    say("four-critical-points", "on the torus: one minimum, two saddles, one maximum",
        f"{NOTES}: \"Minimum, hidden convexity\"",
        ", ".join(f"{x:.5f}" for x in expected), ", ".join(f"{x:.5f}" for x in values), bool(same), True)
    lost = np.max([end(arrays, "loss", norm="sphere", optimiser=o, cos=c) for o in np.unique(arrays["optimiser"])
                   for c in np.unique(arrays["cos"])], 0)
    say("all-find-the-minimum", "with N every optimiser gets near the one minimum from every start (.03 nats)", OURS,
        f"< {low + .03:.3f}", lost, lost < low + .03)
    said = np.exp(-np.min([end(arrays, "loss", norm="none", optimiser=o, cos=.5) for o in ("normalised", "sign")], 0))
    box = 1 / (1 + math.exp(-math.sqrt(2)))
    say("box", "with N a right class never gets more than 1 / (1 + exp(-sqrt 2)) = .804; without N it does",
        f'{NOTES}: "ne parametrise [qu\']un sous-ensemble des probabilites"', f"> {box:.3f} without N", said, said > box)


@judged
def judge_ranking(arrays, say, flags):
    wrong, wide = error(arrays), [10, 20, 50, 100]
    own = dict(n_tokens=flags.n_tokens, n_classes=flags.n_classes)
    at = lambda method, rate: np.mean([by_seed(arrays, wrong, method=method, d_model=d, **own,
                                               lr=rate / (1 if method in ("SGD", "LN") else d)) for d in wide], 0)
    orders = {"true Adam": ("SGD", "LN", "Adam", "Adam+LN"),
              "sign descent, the original's Adam": ("SGD", "LN", "sign", "sign+LN")}
    text = lambda each: "; ".join(f"{name} {common.spread(x)}" for name, x in each.items())
    for kind, methods in orders.items():
        short = "sign" if "sign" in kind else "adam"
        for rate in RATES:
            each = {m: at(m, rate) for m in methods}
            x = np.stack(list(each.values()))
            say(f"order-{short}-{rate:g}",
                f"lr {rate:g} ({kind}, at lr / d): errors fall from SGD to LN to Adam to Adam + LN, mean of "
                "four widths", f'{NOTES}: "Adam + LN > Adam > LN > SGD"', "in every seed", text(each),
                (np.diff(x, axis=0) < 0).all(0))
        best = {m: np.mean([best_of(arrays, m, (*own.values(), d)) for d in wide], 0) for m in methods}
        say(f"order-{short}-best", f"every method at its best of four rates ({kind}): the same order",
            f'{NOTES}: "Adam + LN > Adam > LN > SGD"', "in every seed", text(best),
            (np.diff(np.stack(list(best.values())), axis=0) < 0).all(0))
    for d, values in ORIGINAL_ERROR.items():
        mine = [np.median(by_seed(arrays, wrong, method=m, d_model=d, **own, lr=.1 / (1 if m in ("SGD", "LN") else d)))
                for m in ("SGD", "LN", "sign", "sign+LN")]
        say(f"original-{d}", f"d = {d}, lr .1: errors of SGD, LN, sign, sign + LN within a third of the stored ones", ORIGINAL,
            ", ".join(f"{v:g}" for v in values), ", ".join(f"{v:.3f}" for v in mine) + f" (medians of {flags.runs} seeds)",
            bool(np.all(np.abs(np.log(np.array(mine) / values)) < math.log(4 / 3) + 1e-9)))


@judged
def judge_plane(arrays, say, flags):
    shapes = shape_of(arrays)
    general = np.isin(shapes, [s for s in dict.fromkeys(shapes) if not s.startswith("N2 M2")])
    over, free = arrays["rank"] - arrays["bound"], np.isin(arrays["optimiser"], FREE)
    for id, words, bound, mine in (
            ("bound-plain", "without N gd, momentum and normalised gd stay in few dimensions", "min(N, d) min(d, M - 1)",
             (arrays["norm"] == "none") & free),
            ("bound-norm", "with N they do, in more", "min(N, d) min(d, N + M - 1)", (arrays["norm"] != "none") & free)):
        excess = per_seed(arrays, over, mine)
        say(id, words, "the gradient is a sum of (u_i - u_j) e_x', and with N of such and N(W e_x) e_x'",
            f"at most {bound}: <= 0 more", excess, excess <= 0)
    ask, adam = f'{NOTES}: "verifier si les trajectoires .. sont sur un plan ou non"', arrays["optimiser"] == "adam"
    plain = arrays["norm"] == "none"
    for id, words, mine in (
            ("planar-gd", "N = M = 2: gd without N is planar", pick(arrays, optimiser="gd") & plain & ~general),
            ("planar-normalised", "N = M = 2: normalised gd without N is planar",
             pick(arrays, optimiser="normalised") & plain & ~general),
            ("planar-adam-canonical", "N = M = d = 2, canonical embeddings: Adam without N is planar, with all betas",
             adam & plain & (shapes == "N2 M2 d2 canonical")),
            ("planar-adam-random", "N = M = d = 2, random embeddings: Adam without N is planar too, up to its eps (each "
             "coordinate is divided by its own size: sign(u_1 - u_2) c')", adam & plain & (shapes == "N2 M2 d2"))):
        outside = per_seed(arrays, arrays["outside"], mine)
        say(id, words, ask, "share outside its best plane < 1e-4", outside, outside < 1e-4)
    for id, words, mine in (
            ("norm-not-planar", "with N gd is not planar, at any shape", pick(arrays, optimiser="gd") & ~plain),
            ("adam-not-planar", "Adam is not planar where N or M > 2, with any betas", adam & general),
            ("normalised-not-planar", "normalised gd is not planar where N or M > 2",
             pick(arrays, optimiser="normalised") & general)):
        outside = per_seed(arrays, arrays["outside"], mine, np.min)
        say(id, words, f'{NOTES}: "LayerNorm -> Non, Adam with different beta -> Non, NormGD -> Non"', "share outside >= 1e-4",
            outside, outside >= 1e-4)
    same = arrays["class_dimension"] == arrays["class_formula"]
    known = np.isfinite(arrays["class_formula"])
    say("degrees-lost",
        "N loses N degrees of freedom if N <= d, one (the scale) if N > d: a class C(W) has N + d (d - N) dimensions, "
        "or one", f'{NOTES}: "avec layernorm on perd quelques degree de liberte"', "equal", f"{same[known].mean():.3g} of "
        f"{known.sum()} runs", bool(same[known].all()), True)
    far = np.nanmax(arrays["meets"])
    say("sphere-meets",
        "the unit sphere |W| = 1 meets every class: W / |W| is in C(W) (an identity, checked; a sphere is not convex, "
        "its ball is)", f'{NOTES}: "un espace compact convexe (la sphere), qui intersecte tous les C(W0)"', "same vectors",
        f"{far:.1g} apart", bool(far < 1e-12), True)
    step, scale = (by_seed(arrays, k, optimiser="gd", norm="sphere", n_tokens=3, d_model=6)
                   for k in ("class_step", "scale_step"))
    say("classes-to-classes", "gradient steps map classes to classes, if the rate may be chosen anew",
        f'{NOTES}: "elle commute avec les gradient updates? .. pas sur"', "angle between the images < 1e-6 of the step's",
        step, step < 1e-6)
    say("scale-commutes", "the global scale commutes: c W with c^2 lr", OURS, "< 1e-6", scale, scale < 1e-6)


@judged
def judge_norm(arrays, say, flags):
    T, gd, width = flags.steps, dict(norm="none", optimiser="gd"), arrays["weight_norm"]
    one, two, correlated = dict(n_tokens=1), dict(n_tokens=2, emb="canonical"), dict(emb="pair", cos=.95)
    for name, law in (("one", one), ("decoupled", two)):
        off = np.abs(by_seed(arrays, "margin", **gd, **law) / by_seed(arrays, "law", **gd, **law) - 1)[:, -1]
        say(f"margin-law-{name}",
            f"without N ({name}) the margin obeys e^m + (M-1) m = M lr p t + 1, to a hundredth at the end",
            OURS, "< 0.01", *sure(off, off < .01))
    plain = np.min([end(arrays, "weight_norm", **gd, **law) / by_seed(arrays, width[:, T // 10], **gd, **law)
                    for law in (one, two, correlated)], 0)
    say("diverges-plain", "without N |W| still grows: by a tenth or more over the last nine tenths of training",
        f'{NOTES}: "la divergence est tres lente"', ">= 1.1", *sure(plain, plain >= 1.1))
    for id, words, laws, kind in (
            ("diverges-norm", "with N and gd |W| diverges, one token or decoupled ones", (one, two), "gd"),
            ("diverges-norm-correlated", "with N and gd |W| diverges, correlated tokens",
             (dict(emb="pair", cos=.5), correlated), "gd"),
            ("diverges-norm-adam", "with N and Adam |W| diverges", (one, correlated), "adam")):
        half = lambda law: by_seed(arrays, width[:, T // 2], norm="sphere", optimiser=kind, **law)
        growth = np.max([end(arrays, "weight_norm", norm="sphere", optimiser=kind, **law) / half(law) - 1 for law in laws], 0)
        say(id, words, f'{NOTES}: "la norm de W divergence vers l\'infini .. Pas clair, probable"',
            "growth over the second half > 1e-3", growth, growth > 1e-3)
    mine = (arrays["norm"] == "sphere") & (arrays["optimiser"] != "adam")
    for key, words in (("inner", "<W, step> = 0"), ("pythagoras", "|W_t+1|^2 = |W_t|^2 + |step|^2")):
        worst = per_seed(arrays, arrays[key], mine)
        say(key, f"with N (eps 0), gd, sgd and normalised gd: {words} (an identity, checked)",
            "N does not see the length of W e_x",
            "< 1e-6: rounding over the least gradient counted, 1e-9", worst, worst < 1e-6)
    w = by_seed(arrays, "weight_norm", norm="sphere", optimiser="normalised", n_tokens=1)
    off = np.abs(w[:, -1] ** 2 / (w[:, 0] ** 2 + flags.lr ** 2 * T) - 1)
    say("normalised-sqrt",
        "normalised gd with N: |W_t|^2 = |W_0|^2 + lr^2 t (but for steps that start on the minimum to rounding)",
        OURS, "< 1e-3", off, off < 1e-3)
    fourth, still = (by_seed(arrays, width, optimiser="sgd", label_noise=q) for q in (.25, .1))
    fourth = fourth[np.isfinite(fourth[:, -1])]
    fixed = fourth[:, -1] / fourth[:, T // 10] < 1.001
    slope = lambda w: np.log((w[:, -1] ** 4).mean() / (w[:, T // 10] ** 4).mean()) / math.log(1e4)
    fourth, enough = fourth[~fixed], (~fixed).sum() > 2
    drawn = np.random.default_rng(0).integers(0, max(len(fourth), 1), (2000, len(fourth)))
    low, high = np.quantile([slope(fourth[d]) for d in drawn], [.05, .95]) if enough else (0, 1)
    say("noise-quarter", "a quarter of the labels wrong, SGD with N: |W| grows like t^(1/4)", OURS,
        "exponent of the mean |W|^4 over the last decade, 90 % of resamplings within 0.2 .. 0.3, outside: false",
        f"{slope(fourth) if enough else math.nan:.3f} [{low:.3f}, {high:.3f}] of {len(fourth)} seeds; {fixed.sum()} rest where "
        "no label turns W e_x", True if .2 <= low and high <= .3 else False if high < .2 or low > .3 else None)
    growth = still[:, -1] / still[:, T // 10] - 1
    say("noise-tenth", "a tenth of the labels wrong: |W| grows as well", OURS,
        "> 0.01; noise below 1 - 1/(1 + exp(-sqrt 2)) = .196 leaves the best angle where it is, where no label turns W e_x",
        growth, growth > .01)
    gap = np.max([end(arrays, "loss", norm="sphere", optimiser="gd", **law) for law in (one, dict(emb="pair", cos=.5))], 0)
    say("floor-reached", "with N gd ends on the floor log(1 + (M-1) exp(-sqrt(M/(M-1))))", OURS, "< 1e-4 nats above",
        gap - floor_of(2), gap - floor_of(2) < 1e-4)


@judged
def judge_convexity(arrays, say, flags):
    there, ask = settled(arrays), f'{NOTES}: "Est-ce que ca nous permet de dire des choses sur le nombre de minimum locaux"'
    low, high = math.log1p(2 * math.exp(-.5)), math.log1p(2 * math.exp(.5))
    fan = pick(arrays, n_tokens=1, d_model=2, norm="sphere") & there
    loss = arrays["loss"][fan][:, -1]
    near = lambda value: np.abs(loss - value) < 1e-3
    say("spurious-minimum", "one token, d < M, the right class between two others 60 degrees away: N makes a second, spurious "
        "minimum", ask, f"some ends at {high:.3f}, the others at {low:.3f}",
        f"{near(high).sum()} at {high:.3f}, {near(low).sum()} at {low:.3f} of {len(loss)}",
        bool((near(high) | near(low)).all() and near(high).any()))
    across = np.nanmax(arrays["eigenvalues"][fan][near(high)], 1)
    say("spurious-strict", "it is strict: the loss curves upwards along the circle", OURS, "> 1e-4", across,
        bool((across > 1e-4).all()) if len(across) else None)
    for id, words, settings in (("none-wide", "d >= M, one token", dict(n_tokens=1, d_model=3)),
                                ("none-three", "d >= M, three independent tokens", dict(n_tokens=3, d_model=3))):
        runs = pick(arrays, norm="sphere", **settings)
        gap = (arrays["loss"][:, -1] - arrays["floor"])[runs & there]
        say(id, f"{words}: no spurious minimum, every descent ends on the floor", f'{NOTES}: "hidden convexity"',
            "< 1e-3 nats above it, at least 95 % settled", f"{common.spread(gap).replace('seeds', 'settled')} of {runs.sum()}",
            bool((gap < 1e-3).all()) if len(gap) >= .95 * runs.sum() or (gap >= 1e-3).any() else None)
    many = pick(arrays, n_tokens=6, norm="sphere") & there
    ends = np.sort(arrays["loss"][many][:, -1])
    say("dependent-tokens", "six tokens in three dimensions: with N descents settle at several losses, .01 apart or more",
        OURS, "> 1",
        f"{1 + (np.diff(ends) > .01).sum() if len(ends) else 0} losses in {len(ends)} settled descents of {flags.runs}",
        bool((np.diff(ends) > .01).any()) if len(ends) > 2 else None)
    quote = f'{NOTES}: "plus convexe par rapport a W, mais toujours par rapport aux We_x"'
    for norm, key, id, words, source in (
            ("none", "W", "convex-plain", "without N the loss is convex in W (an identity, checked)",
             "a sum of logarithms of sums"),
            ("sphere", "W", "convex-norm", "with N it is convex in W", quote),
            ("sphere", "h", "convex-hidden", "with N it is convex in W e_x", quote),
            ("sphere", "vectors", "convex-vectors", "with N it is convex in the vectors N(W e_x) (an identity, checked)",
             "logits are linear in them; but the sphere is not convex")):
        share = arrays[f"violated_{key}"][arrays["norm"] == norm]
        say(id, words, source, "no segment above its chord", f"{share.min():.3g} to {share.max():.3g} of 1,000 segments, "
            f"{len(np.unique(setting_of(arrays)))} settings", bool((share == 0).all()), True)


@judged
def judge_projections(arrays, say, flags):
    two = dict(emb="canonical", norm="none", init_scale=0.)
    gap = np.abs(by_seed(arrays, "f2", **two)[:, -1] - by_seed(arrays, "limit", **two))
    say("f2-limit", "two orthonormal tokens from zero: f2 goes to log(p1/p2) / 2", OURS, "difference < 0.01",
        *sure(gap, gap < .01))
    grows = end(arrays, "f1", **two) - by_seed(arrays, arrays["f1"][:, flags.steps // 10], **two)
    say("f1-grows", "f1 keeps growing while f2 rests", f'{NOTES}: "la direction de convergence"', "> 1 in the last nine tenths",
        *sure(grows, grows > 1))
    everyone, promise = pick(arrays), f'{NOTES}: "si f_1 est grand et f_2 est petit on a une guarantie"'
    slack = (arrays["guarantee"] - arrays["loss"]).min(1)
    worst = per_seed(arrays, slack, everyone, np.min)
    say("guarantee-loss", "f1 and f2 bound the loss from above, at every step of every run", promise, ">= 0", worst,
        worst > -1e-12)
    certain, right = arrays["certain"] > 0, arrays["accuracy"] == 1
    broken = per_seed(arrays, certain & ~right, everyone, np.sum)
    say("guarantee-accuracy", "where f1 and f2 promise it every answer is right", promise, "0 steps broken",
        f"{broken.sum()} of {certain.sum()} promised steps, {right.sum()} right ones", broken == 0)
    for norm in ("none", "sphere"):
        share = [by_seed(arrays, arrays["f2"][:, t] / arrays["f1"][:, t], emb="canonical", norm=norm, init_scale=1.)
                 for t in (flags.steps // 10, -1)]
        say(f"aligns-{norm}",
            f"{'with' if norm == 'sphere' else 'without'} N W keeps turning to the max-margin direction: f2 / f1 "
            "falls by a tenth or more over the last nine tenths (from N(0, 1/d))", f"{NOTES}: W_inf", "< 0.9",
            share[1] / share[0], share[1] / share[0] < .9)
    level = lambda scale: end(arrays, "loss", emb="canonical", norm="none", init_scale=scale)
    say("init-matters", "from N(0, 100/d) the loss without N ends elsewhere than from zero (by a factor of 2 or more)",
        f'{NOTES}: "Comment initialiser les poids? Est-ce que c\'est important?"', "<= 0.5 or >= 2", level(10.) / level(0.),
        (level(10.) / level(0.) <= .5) | (level(10.) / level(0.) >= 2))
    say("init-forgotten", "from N(0, 1/d) it ends within a tenth of where it ends from zero", OURS, "0.9 .. 1.1",
        level(1.) / level(0.), np.abs(level(1.) / level(0.) - 1) < .1)


@judged
def judge_spikes(arrays, say, flags):
    plain = pick(arrays, norm="none", seed=arrays["seed"].min())  # from zero: seeds are copies
    big, listed = arrays["loss"][plain & (arrays["lr"] == 10.)][0][:7], lambda x: ", ".join(f"{v:.4f}" for v in x)
    say("known-spikes", "cos .95, p1 .75, lr 10 from zero: the losses of the prototype", "prototype", listed(KNOWN),
        listed(big),
        bool(np.abs(big - KNOWN).max() < 1e-4), True)
    edge = 2 / arrays["sharpness"][plain].max()
    rises = (np.diff(arrays["loss"][plain], axis=1) > 1e-12).any(1)
    first = arrays["lr"][plain][rises].min(initial=math.inf)
    say("no-spike-below", "without N no step raises the loss while lr < 2 / (largest Hessian eigenvalue)",
        "descent lemma, checked",
        f"first above {edge:.3f}", f"first at lr {first:.3g}", bool(first >= edge))
    say("spike-above", "the first rate that raises the loss is the first above it", f"{OURS}: the threshold of a parabola",
        f"first below {1.12 * edge:.3f} (one step of the grid)", f"first at lr {first:.3g}", bool(first < 1.12 * edge))
    lone = arrays["turned"][pick(arrays, norm="sphere", optimiser="gd", cos=0.)].any(1)
    say("decoupled-cannot-cross", "with N and gd orthogonal tokens never turn by 90 degrees in a step: |W e_x| cannot shrink",
        OURS, "none", f"{lone.sum()} of {lone.size} runs", bool(not lone.any()))
    quote = f'{NOTES}: "crossing at zero of vectors that get normalized"'
    for optimiser in ("gd", "momentum", "adam"):
        for k, (there, base) in causes(arrays, optimiser).items():
            share = there.mean() if len(there) else 0
            say(f"spike-{k}-{optimiser}",
                f"with N, {optimiser}: at the largest spike of most runs {CAUSES[k]}, five times as often as "
                "at any step", quote if k != "sharp" else OURS, "> 0.5 and > 5 times",
                f"{there.sum()} of {len(there)} runs with a spike, {base:.3f} of all steps",
                bool(share > .5 and share > 5 * base) if len(there) >= 10 else None)
    relief = arrays["relieved"][np.isfinite(arrays["relieved"]).all(1)]
    for i, id, words, source in (
            (0, "short-causes",
             "made in W's class C(W), with the short vector as long as usual, gd's step of the largest spike "
             "raises the loss by less than half as much (an intervention)", quote),
            (1, "other-causes", "with the other vector twice as long it does as well (its control)", OURS),
            (2, "rate-causes", "with half the rate it does (an intervention)", OURS)):
        say(id, words, source, "ratio < 0.5 in three quarters", common.spread(relief[:, i]).replace("seeds", "spikes"),
            relief[:, i] < .5)


KNOWN = np.array([.6931, 1.1631, .4976, .7528, .6438, 1.3487, .2896])


@judged
def judge_rates(arrays, say, flags):
    late = np.isfinite(arrays["correct"]) & (arrays["correct"] >= 20)
    flow = arrays["lr"] * arrays["correct"]
    pairs = [(flow[late & pick(arrays, p1=p, cos=c)]) for p in np.unique(arrays["p1"]) for c in np.unique(arrays["cos"])]
    spans = np.array([x.max() / x.min() for x in pairs if len(x) > 2])
    say("flow", "where it takes 20 steps or more, lr x steps does not depend on lr: gradient flow", OURS,
        "largest over smallest < 1.1",
        f"{np.median(spans):.3f} (median), {spans.max():.3f} (largest) of {len(spans)} pairs (p1, cos)",
        bool(spans.max() < 1.1))
    level = lambda **at: np.nanmedian(np.where(np.isfinite(arrays["correct"]), arrays["correct"], np.nan)[pick(arrays, **at)])
    for field, low, high in (("p1", .55, .95), ("cos", .5, .95)):
        few, many = (level(**{field: v}) for v in (low, high))
        say(f"harder-{field}", f"{field} {low} -> {high} takes more steps (median of the other settings)", OURS, "ratio > 1",
            f"{many / few:.3g}", bool(many > few))
    stuck = np.isinf(arrays["correct"])
    say("all-learn", f"every run is all correct within {flags.steps} steps", OURS, "0 of 1,000 not",
        f"{stuck.sum()} not, at lr <= "
        f"{arrays['lr'][stuck].max() if stuck.any() else 0:.3g}", bool(not stuck.any()))


# The study `clusters`.

TASK = "modulus", "sparsity", "d_model", "width", "untied", "lr", "batch", "freeze", "source"
PARENTS = {"p=2": dict(modulus=2), "k=3": dict(sparsity=3), "k=5": dict(sparsity=5)}  # tuned runs start from the best of these


def cluster_points(flags):
    """The configurations of the study, as dicts of fields: its own, then one change at a time, then fine-tuning."""
    own = {f: getattr(flags, f) for f in TASK if f not in ("d_model", "source")} | {"source": "", "steps": flags.steps}
    changes = [{}, dict(modulus=3), dict(width=8), dict(width=32), dict(untied=False), dict(lr=1e-3), dict(lr=1e-2),
               dict(batch=8), dict(freeze="attention"), dict(freeze="mlp"), dict(sparsity=3), dict(modulus=3, sparsity=2)]
    tuned = [dict(source="p=2", modulus=3), dict(source="k=3"), dict(source="k=5", sparsity=3)]
    if {"modulus", "sparsity"} & getattr(flags, "given", set()):
        tuned = []  # every run has this task: no parent with another
    if flags.smoke:
        changes, tuned = changes[:2], tuned[:1]
    return [own | c for c in changes] + [own | dict(steps=max(1, flags.steps // 2)) | c for c in tuned]


def compute_clusters(flags, folder):
    """Train every configuration; see the docstring of this file for the arrays."""
    parts, columns = [], []

    def best_run(runs, accuracy, **settings):
        mine = [r for r, run in enumerate(runs) if all(getattr(run, k) == v for k, v in settings.items())] or [0]
        return max(mine, key=lambda r: np.nan_to_num(accuracy[r]))

    def given(run):
        if run.source and run.source not in PARENTS:
            params, fresh = from_checkpoint(run)
            print(f"from {run.source}, seed {run.seed}: all" + f" but {', '.join(fresh)} of another shape" * bool(fresh))
            return params
        if not run.source:
            return None
        runs, state, accuracy = parts[0]
        task = {k: getattr(run, k) for k in TASK} | {"source": ""} | PARENTS[run.source]
        return common.run_of(state["params"], best_run(runs, accuracy, **task))

    groups = common.groups_of_runs(flags)
    for i, runs in enumerate(groups):
        sub = folder.sub(i, len(groups))
        if folder.compiled and folder.compiled[0]["compiled"]:
            runs = [replace(run, compile="on") for run in runs]  # the same program: its kernels lie in the cache
        state, metrics, snapshots = train_plane(runs, sub, given)
        if i == 0:
            logs, shots = metrics, snapshots
        last = metrics["eval_loss"][-1] + metrics["loss"][-1]  # finite where both are
        curves = {k: common.blanked(metrics[f"eval_{k}"].T, last) for k in ("loss", "accuracy")}
        end = common.stacked([at_the_end(run, common.run_of(state["params"], r)) for r, run in enumerate(runs)])
        end = {k: common.blanked(v, last) for k, v in end.items()}
        sub.result(runs, metrics, {**{k: v[:, -1] for k, v in curves.items()}, **end}, snapshots)
        settings = {f: np.array([getattr(run, f) for run in runs]) for f in TASK + ("seed",)}
        columns.append(settings | end | thinned(metrics) | {
            "step": np.tile(metrics["eval_step"].astype(float), (len(runs), 1)), "eval_loss": curves["loss"],
            "accuracy": curves["accuracy"]})
        parts.append((runs, state, curves["accuracy"][:, -1]))
        if folder.interrupted:
            break

    arrays = {k: common.padded([c[k] for c in columns]) for k in columns[0]} | {"n_searched": np.array(len(parts[0][0]))}
    runs, _, accuracy = parts[0]
    own = {k: getattr(runs[0], k) for k in TASK}
    for which, change in (("frame", {}), ("frame3", dict(modulus=3, sparsity=2))):  # p = 3 where it is learned
        r, steps = best_run(runs, accuracy, **own | change), sorted(shots, key=int)
        kept = {f"{which}_{k}": v[:, r].numpy() for k, v in common.stack(shots[s] for s in steps).items()} if steps else {}
        arrays |= kept | {f"{which}_step": np.array(steps, int), f"{which}_run": np.array(r)}
    return arrays | compute_replays(runs, logs, folder, given)


def thinned(metrics):
    """What a step logs, curve_* [R, steps / THIN]: means of THIN steps, for norms minima."""
    cut = len(metrics["loss"]) // THIN * THIN
    return {f"curve_{k}": getattr(v[:cut].reshape(-1, THIN, v.shape[1]), "min" if "norm_" in k else "mean")(1).T
            for k, v in metrics.items() if not k.startswith("eval_") and k != "step"}


def compute_replays(runs, logs, folder, given):
    """Of every spike spike_step, spike_run, spike_base, spike_peak (nats) and what `lead_up` measures; null_*: the same in 20
    windows for each, of the same run, without a spike; of the FORKED largest, replayed, fork_step, fork_run, fork_start,
    fork_loss (see `fork`), fork_height [interventions, spikes], its height over that it had, fork_exact: whether without
    intervention the logged losses are repeated to the bit; around_* [CALM + LEAD + CALM, spikes]: what was logged."""
    spikes, T = find_spikes(logs["loss"]), len(logs["loss"])
    null, generator = [], np.random.default_rng(0)
    for t, r, *_ in spikes:
        others = [s for s, q, *_ in spikes if q == r]
        calm = np.arange(max(CALM + LEAD, min(others) - 2000), T)
        calm = calm[(np.abs(calm[:, None] - others) > CALM + LEAD).all(1)]
        null += [lead_up(logs, s, r) for s in (generator.choice(calm, 20) if len(calm) else ())]
    windows = {"spike": [lead_up(logs, t, r) for t, r, *_ in spikes], "null": null}
    arrays = {f"{which}_{k}": np.array([m[k] for m in rows]) for which, rows in windows.items() for k in MEASURED}
    arrays |= {f"spike_{k}": np.array([s[i] for s in spikes]) for i, k in enumerate(("step", "run", "base", "peak"))}
    chosen = [] if folder.interrupted else sorted((s for s in spikes if s[0] + CALM <= T), key=lambda s: s[2] - s[3])[:FORKED]
    for k in ("loss", "norm_embedding", "norm_sequence", "turned_embedding", "turned_sequence", "descent", "bend"):
        rows = [logs[k][t - CALM - LEAD:t + CALM, r] for t, r, *_ in chosen]
        arrays[f"around_{k}"] = np.array(rows).reshape(-1, CALM + LEAD + CALM).T
    loss, start = np.zeros((len(INTERVENTIONS), 0, 1)), []
    if chosen:
        loss, start = fork(runs, logs, chosen, folder.compiled[0]["compiled"], given)
    height, exact = np.zeros(loss.shape[:2]), np.zeros(len(chosen), bool)
    for j, (b, (t, r, base, peak)) in enumerate(zip(start, chosen)):
        height[:, j] = (common.smooth(loss[:, j].T, SMOOTH)[SMOOTH:t - b + CALM].max(0) - base) / (peak - base)
        exact[j] = (loss[0, j][:T - b] == logs["loss"][b:b + loss.shape[2], r]).all()
    return arrays | {"fork_step": np.array([s[0] for s in chosen], int), "fork_run": np.array([s[1] for s in chosen], int),
                     "fork_start": np.array(start, int), "fork_loss": loss, "fork_height": height, "fork_exact": exact}


def seen_in(arrays, which):
    """{cause: whether its sign is there [windows]} for spikes ("spike") or for windows without one ("null")."""
    return {name: test(arrays[f"{which}_{key}"]) for name, (key, test) in SIGNS.items()}


def fewer(a, b):
    """Fisher's exact test at .05, one-sided, of a = (hits, n) against b: True if hits are rarer, False if they are more common,
    None where that can't be told."""
    (x, n), (y, m) = a, b
    tail = lambda hits: sum(math.comb(n, i) * math.comb(m, x + y - i) for i in hits) / math.comb(n + m, x + y)
    lower, upper = tail(range(max(0, x + y - m), x + 1)), tail(range(x, min(n, x + y) + 1))
    return True if lower < .05 else False if upper < .05 else None


@functools.partial(common.judged, always=lambda *_: None, columns=COLUMNS)
def judge_clusters(arrays, say, flags):
    enough = flags.steps >= 8000 and flags.runs >= 8
    say, trial = functools.partial(say, enough=enough), "trial, eight seeds, 8,000 steps"
    names, final, whole = cluster_names(arrays, flags), final_accuracy(arrays), arrays["freeze"] == "none"
    own = np.sort(final[names == "own"])[::-1]
    solved, stuck = (own > .98).sum(), (own < .54).sum()
    listed = " ".join(f"{v:.3f}" for v in own)
    for id, words, count, theirs in (("trial-solved", "fewer seeds come above .98 than in the trial (three of eight)", solved,
                                      3),
                                     ("trial-stuck", "fewer stay at chance than in the trial (four of eight)", stuck, 4)):
        say(id, words, trial, "Fisher's exact test, .05", f"{count} of {len(own)}: {listed}",
            fewer((int(count), len(own)), (theirs, 8)))
    scratch = whole & (arrays["source"] == "")
    for p, k in ((2, flags.sparsity), (3, 2)):
        good = (final > .95) & scratch & (arrays["modulus"] == p) & (arrays["sparsity"] == k)
        those, get = f"p = {p}, k = {k}, the {good.sum()} runs from scratch above .95", lambda key: arrays[key][good]
        say(f"merges-{p}", f"{those}: equal counts of the first k tokens are merged, and nothing else moves h",
            f'{VISUAL}: "Visualize memorization vs. algorithm"', "R^2 >= 0.9", get("r2_counts"), get("r2_counts") >= .9)
        say(f"ignores-{p}", f"{those}: predictions stay if the other tokens come from other sequences (an intervention)",
            CLUSTERING,
            ">= 0.95 stay", get("keeps_others"), get("keeps_others") >= .95)
        say(f"uses-{p}", f"{those}: but not if the first k tokens do (its control)", OURS, "<= 1/p + .1 stay",
            get("keeps_first"), get("keeps_first") <= 1 / p + .1)
    good = (final > .95) & scratch & (arrays["modulus"] == 2) & (arrays["sparsity"] == flags.sparsity)
    say("merges-signed", f"p = 2, the same {good.sum()} runs: sequences of one signed sum of the first k are merged (its "
        "parity is as good)", OURS, "R^2 >= 0.9", arrays["r2_signed"][good], arrays["r2_signed"][good] >= .9)
    some = whole & (arrays["train_accuracy"] > 1 / arrays["modulus"] + .1)
    gap = (arrays["train_accuracy"] - final)[some]
    say("no-memory", f"the {some.sum()} runs that learn anything are as good on the test",
        f'{VISUAL}: "memorization vs. algorithm"', "train - test < 0.05", gap, gap < .05)
    two, rank = scratch & (arrays["modulus"] == 2) & np.isfinite(final), lambda x: np.argsort(np.argsort(x))
    for key, words in (("r2_counts", "counts"), ("r2_signed", "signed sums")):
        together = np.corrcoef(rank(arrays[key][two]), rank(final[two]))[0, 1]
        say(f"accuracy-follows-{key[3:]}", f"p = 2: test accuracy is higher the more of h the {words} of the first k explain",
            VISUAL, "rank correlation > 0.5", f"{together:.2f} over {two.sum()} runs", bool(together > .5))
    hits = lambda mask: (int((final[mask] > .95).sum()), int(mask.sum()))
    for name, words in {"attention frozen": "frozen query and values", "mlp frozen": "a frozen MLP", "width 8": "width 8",
                        "width 32": "width 32", "tied": "a tied unembedding", "p=3": "p = 3", "batch 8": "batch 8",
                        "rate 0.001": "rate 1e-3", "rate 0.01": "rate 1e-2"}.items():
        a, b = hits(names == name), hits(names == "own")
        say(f"fewer-{name.replace(' ', '-')}", f"{words}: learned in fewer seeds than the own configuration",
            f'{VISUAL}: "test acc vs sweep axis"; the sentence is ours', "Fisher's exact test, .05",
            f"above .95: {a[0]} of {a[1]} against {b[0]} of {b[1]}", fewer(a, b))
    for source in PARENTS:
        tuned, fresh, _ = tuned_and_scratch(arrays, source)
        last, both = np.nanmax(arrays["step"][tuned]), np.intersect1d(arrays["step"][tuned][0], arrays["step"][fresh][0])
        top = np.where(np.isin(arrays["step"], both), np.nan_to_num(arrays["accuracy"]), 0).max(1) > .95
        a, b = ((int(top[m].sum()), int(m.sum())) for m in (fresh, tuned))
        say(f"finetune-from-{source}",
            f"from the best run with {source} (one parent), more seeds come above .95 within {last:.0f} steps "
            "than from scratch", f'{VISUAL}: "fine-tuning experiments"; the sentence is ours', "Fisher's exact test, .05",
            f"{b[0]} of {b[1]} against {a[0]} of {a[1]}", fewer(a, b))
    judge_replays(arrays, say)


def judge_replays(arrays, say):
    """Base rates of what precedes spikes, and the interventions. A spike that a rate of 1.001 (sham) removes tells nothing."""
    quote = f'{VISUAL}: "one is due to crossing at zero of vectors that get normalized"'
    for (name, with_spike), without, id in zip(seen_in(arrays, "spike").items(), seen_in(arrays, "null").values(), MEASURED):
        share, usual = (x.mean() if len(x) else math.nan for x in (with_spike, without))
        say(f"spikes-{id}", f"before most spikes: {name}, and twice as often as in other windows of the same runs",
            f"{OURS}: curvature" if id == "overshoot" else quote, "share >= 0.5 and >= 2 base rates",
            f"{with_spike.sum()} of {len(with_spike)} spikes ({share:.2f}) against {usual:.2f} of {len(without)} windows",
            bool(share >= .5 and share >= 2 * usual) if len(with_spike) >= 10 else None)
    height, exact = arrays["fork_height"], arrays["fork_exact"]
    say("replay", "a run replayed from before its spike repeats it to the bit (control)", OURS, "equal losses",
        f"{exact.sum()} of {len(exact)}", bool(exact.all()) if len(exact) else None)
    height = height[:, height[INTERVENTIONS.index("sham")] >= .5]
    gone = height < .5
    sham, bounded = ((int((h < .5).sum()), len(h)) for h in arrays["fork_height"][[INTERVENTIONS.index("sham"), BOUNDED]])
    acted = int((arrays["fork_height"][BOUNDED] != 1).sum())
    say("some-are-crossings",
        "more spikes vanish when norms are kept above half of what is usual than under the sham, a rate 1.001 "
        "times as large (an intervention)", quote, "Fisher's exact test, .05",
        f"{bounded[0]} against {sham[0]} of {sham[1]}; in {acted} "
        "did the bound change anything", fewer(sham, bounded) if sham[1] >= 10 else None)
    for name, words in {"norms bounded": "norms are kept above half of what is usual", "half rate": "the rate is halved",
                        "other batches": "other batches are drawn"}.items():
        i = INTERVENTIONS.index(name)
        say(f"most-{name.replace(' ', '-')}", f"most spikes vanish when {words} (an intervention)", OURS, "height < 0.5",
            f"{gone[i].sum()} of {gone.shape[1]}; height {common.spread(height[i]).replace('seeds', 'spikes')}", gone[i])


STUDIES = {
    "landscape": (compute_landscape, judge_landscape, {"plain": draw_plain(True), "plain_far": draw_plain(False),
                                                       "torus": or_curves(draw_torus), "descent": or_curves(draw_descent)}),
    "ranking": (compute_ranking, judge_ranking, {"ranking": or_curves(draw_ranking), "best": or_curves(draw_best)}),
    "plane": (compute_plane, judge_plane, {"plane": or_curves(draw_plane)}),
    "norm": (compute_norm, judge_norm, {"norm": or_curves(draw_norm)}),
    "convexity": (compute_convexity, judge_convexity, {"convexity": or_curves(draw_convexity)}),
    "projections": (compute_projections, judge_projections, {"projections": or_curves(draw_projections)}),
    "spikes": (compute_spikes, judge_spikes, {"spikes": or_curves(draw_spikes), "causes": or_curves(draw_causes)}),
    "rates": (compute_rates, judge_rates, {"rates": or_curves(draw_rates), "scaling": or_curves(draw_scaling)}),
    "clusters": (compute_clusters, judge_clusters, {
        "clusters": draw_clusters, "sheet": draw_sheet, "sheet3": lambda a, f: draw_sheet(a, f, "frame3"),
        "training": lambda a, f: draw_sheet(a, f, still=False), "replays": draw_replays, "finetune": draw_finetune}),
}


def main(argv=None):
    return common.main(Flags, STUDIES, argv)


if __name__ == "__main__":
    raise SystemExit(main())
