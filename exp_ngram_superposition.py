"""What does an attention-only transformer store of an n-gram law, how much per head, and how do N tokens share d directions?

Law: two tokens are drawn, x1 ~ pi_1, x2 ~ pi_2(. | x1), and the model answers with a distribution of the third, pi_3(. | x1,
x2). Loss: the exact sum over contexts of pi_1 pi_2 KL(pi_3 || model), in nats; log N - H(pi) for uniform answers. Model:
attention reads h = E[x] + P, residual stream E[x2] + sum of heads, logits = residual U^T. Low-rank: a free vector for each
context, logits = C U^T. With two tokens attention is one sigmoid per head and pair, so a step works on tables of tokens and
never forms a sequence. For each trained U the least possible divergence is computed and certified (`best_vectors`).

    python exp_ngram_superposition.py                           116 s on one core: how fast is a law learned, 5 heads, N = 100?
    python exp_ngram_superposition.py --study freeze             53 s: which parts of the model hold the memory?
    python exp_ngram_superposition.py --study superposition      6 min: how do 10 tokens share 1 to 9 directions?

Studies: `dynamics` (default), `freeze`, `scaling`, `skips`, `attention`, `heads`, `superposition`, `subspace`, `optimum`,
`capacity` (half an hour); one figure or more each. arrays.npz holds, one entry a run: settings, loss (exact divergence),
accuracy, entropy, uniform, ceiling, bound, parameters, and what the docstrings of `compute_*` name. pi1, pi2, pi3 (leading
axis: laws; law_index: which of them a run has) and E, P, W_Q, W_K, W_V, W_O, U (leading axis: runs) lie beside them, or in
group*/arrays.npz where shapes differ. metrics.npz: loss [T, R] every step, eval_loss, eval_accuracy [M, R] at eval_step.

Claims come from research notes (an n-gram notebook), from Dana, Pydi & Chevaleyre, "Memorization in Attention-only
Transformers", whose experiments these are, and from a prototype of this project.
"""
import functools
import itertools
import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch.func import grad_and_value

import common_v1 as common
from common_v1 import by_seed, flag, pick

# ---- Flags ----------------------------------------------------------------------------------------------------------

PARTS = {"E": ["E"], "P": ["P"], "QKV": ["W_Q", "W_K", "W_V"], "O": ["W_O"], "U": ["U"]}  # what --freeze can name, beside
HALVES = {"QK": ["W_Q", "W_K"], "V": ["W_V"]}                                            # the halves of QKV


@dataclass
class Flags(common.Flags):
    study: Literal["dynamics", "freeze", "scaling", "skips", "attention", "heads", "superposition", "subspace", "optimum",
                   "capacity"] = flag("dynamics", "which question to ask")
    steps: int = flag(1500, "training steps", low=1)
    runs: int = flag(3, "seeds per configuration", low=1)
    law: Literal["power_unif", "last_position", "gen_d", "almost_rank_d"] = flag("power_unif", "the data law")
    law_seed: int = flag(-1, "seed of the law (-1: each run draws its own)", low=-1, high=2 ** 31 - 1, number=True)
    n_tokens: int = flag(100, "N, number of tokens", low=2, high=400)
    alpha_1: float = flag(1., "power_unif: decay of the first token's probabilities")
    alpha_2: float = flag(1., "power_unif: of the second's")
    alpha_3: float = flag(1., "power_unif: of the third's", number=True)
    nb_1: int = flag(0, "power_unif: first tokens that occur (0: all)", low=0)
    nb_2: int = flag(0, "power_unif: second tokens that follow each first (0: all)", low=0)
    nb_3: int = flag(1, "power_unif: third tokens that follow each pair (0: all; 1: a look-up table)", low=0, number=True)
    importance: float = flag(0., "last_position: k in the likely token's weights (1 - i/N)^k", low=0, number=True)
    likely: float = flag(.95, "last_position: probability of the likely token", low=0, high=1, number=True)
    dim: int = flag(5, "gen_d, almost_rank_d: dimensions of the log-probabilities", low=1, number=True)
    axis_aligned: bool = flag(False, "gen_d, almost_rank_d: these dimensions are tokens", number=True)
    eig_high: float = flag(10., "almost_rank_d: the first `dim` singular values", low=0, high=300, number=True)
    eig_low: float = flag(1., "almost_rank_d: the others", low=0, high=300, number=True)
    model: Literal["transformer", "low-rank"] = flag("transformer", "low-rank: a free vector for each context")
    d_model: int = flag(10, "d, width of the residual stream", low=1)
    n_heads: int = flag(5, "H, parallel heads of a layer (0: none)", low=0)
    d_head: int = flag(0, "width of a head (0: d_model)", low=0)
    n_layers: int = flag(1, "layers", low=1, high=8)
    d_mlp: int = flag(0, "width of a ReLU MLP after attention; without heads it reads both tokens (0: none)", low=0)
    mlp_depth: int = flag(1, "hidden layers of that MLP", low=1, high=8)
    norm: bool = flag(False, "LayerNorm (no gain) before attention")
    skip_residual: bool = flag(False, "leave E[x2] out of the residual stream", number=True)
    skip_pos_qk: bool = flag(False, "leave positions out of the scores", number=True)
    skip_tok_qk: bool = flag(False, "leave tokens out of the scores", number=True)
    skip_pos_ov: bool = flag(False, "leave positions out of the values", number=True)
    skip_tok_ov: bool = flag(False, "leave tokens out of the values", number=True)
    freeze: str = flag("", "parts that keep their initial values, such as E+P+QKV (of E P QKV O U)", number=True)
    sampled: int = flag(0, "contexts drawn a step (0: the exact expectation over all of them)", low=0)
    target: Literal["divergence", "next-token"] = flag(
        "divergence", "loss of a drawn context: against its law, or against one drawn answer", number=True)
    lr: float = flag(1e-2, "learning rate of Adam", low=0, number=True)
    evals: int = flag(30, "log-spaced exact evaluations over training", low=2)

    per_study: ClassVar[dict] = {
        "dynamics": dict(nb_1=40, nb_2=40, sampled=1024, steps=500),
        "freeze": dict(n_tokens=10, d_model=5, n_heads=20),
        "scaling": dict(n_tokens=30, d_model=8, n_heads=4, alpha_1=.9, alpha_2=.9, alpha_3=.6, nb_3=0, evals=2),
        "skips": dict(n_heads=10, nb_1=40, nb_2=40, law_seed=0, evals=2),
        "attention": dict(n_heads=3, nb_1=10, nb_2=10, skip_residual=True, evals=2),
        "heads": dict(n_tokens=10, d_model=5, n_heads=2, nb_2=5, skip_residual=True, runs=8, evals=2),
        "superposition": dict(law="last_position", n_tokens=10, d_model=5, n_heads=20, steps=3000, evals=2),
        "subspace": dict(law="gen_d", model="low-rank", n_tokens=10, d_model=5, steps=3000, evals=2),
        "optimum": dict(law="almost_rank_d", model="low-rank", n_tokens=10, d_model=5, dim=6, runs=8, steps=3000, evals=2),
        "capacity": dict(n_tokens=50, steps=2000, evals=2),
        "smoke": dict(steps=10, runs=2, n_tokens=8, d_model=3, n_heads=2, evals=2, nb_1=0, nb_2=0, sampled=0)}

    def check(self):
        N = self.n_tokens
        for i in (1, 2, 3) if self.law == "power_unif" else ():
            if getattr(self, f"nb_{i}") > N:
                raise common.Stop(f"--nb-{i} {getattr(self, f'nb_{i}')} must be at most --n-tokens {N}")
            if not 0 < getattr(self, f"alpha_{i}") <= 1:
                raise common.Stop(f"--alpha-{i} {getattr(self, f'alpha_{i}')} must lie in (0, 1]")
        ranked = self.law in ("gen_d", "almost_rank_d")
        if self.study in ("superposition", "subspace", "optimum") and self.d_model >= N:
            raise common.Stop(f"--d-model {self.d_model} must be below --n-tokens {N} in --study {self.study}")
        if ranked and self.study in ("subspace", "optimum") and not self.d_model <= self.dim <= N:
            raise common.Stop(f"--dim {self.dim} must lie in --d-model {self.d_model} .. --n-tokens {N}")
        if ranked and self.dim > N:
            raise common.Stop(f"--dim {self.dim} must be at most --n-tokens {N}")
        zeros = self.law == "power_unif" or self.law == "last_position" and self.likely == 1
        if self.study in ("subspace", "optimum") and zeros:
            raise common.Stop(f"--study {self.study} takes logarithms of the law: no zeros, --law gen_d or almost_rank_d")
        if self.study in ("attention", "heads") and (self.model, self.n_layers) != ("transformer", 1) or \
                self.study in ("attention", "heads") and not self.n_heads or self.study == "heads" and self.d_mlp:
            raise common.Stop(f"--study {self.study} takes a transformer of attention only apart: --n-layers 1 --d-mlp 0")
        if self.study == "freeze" and self.model == "low-rank":
            raise common.Stop("--study freeze takes a transformer: a low-rank model has C and U only")
        unknown = set(self.freeze.split("+")) - {"", *PARTS, *HALVES}
        if unknown:
            raise common.Stop(f"--freeze {self.freeze}: {sorted(unknown)[0]} is not one of {' '.join([*PARTS, *HALVES])}")
        if self.frozen == set(sum(PARTS.values(), [])) and self.model == "transformer" and not self.d_mlp:
            raise common.Stop(f"--freeze {self.freeze} leaves nothing to train")
        if self.target == "next-token" and not self.sampled:
            raise common.Stop("--target next-token draws answers: give --sampled, the number of contexts a step")
        if self.n_heads + self.d_mlp == 0:
            raise common.Stop("--n-heads 0 needs an MLP: give --d-mlp")

    def points(self):
        fields = common.swept(self)
        if "steps" in fields:
            raise common.Stop("--sweep steps: the curves of one study end together; use --name and --steps")
        if self.study in ("attention", "heads") and set(fields) & {"n_tokens", "n_heads", "nb_1", "nb_2"}:
            raise common.Stop(f"--sweep {self.sweep[0]}: --study {self.study} compares maps of one shape")
        return [] if self.sweep else points_of(self)

    @property
    def frozen(self):
        """Names of the parameters that --freeze names."""
        return set(sum(((PARTS | HALVES)[part] for part in self.freeze.split("+") if part), []))

    @property
    def heads(self):
        """(H, d_head)."""
        return self.n_heads, self.d_head or self.d_model


SETTINGS = ("law", "law_seed", "n_tokens", "alpha_1", "alpha_2", "alpha_3", "nb_1", "nb_2", "nb_3", "importance", "likely",
            "dim", "axis_aligned", "eig_high", "eig_low")  # what a law depends on
SKIPS = ("skip_residual", "skip_pos_qk", "skip_tok_qk", "skip_pos_ov", "skip_tok_ov")
COLUMNS = ("seed", *SETTINGS, "model", "d_model", "n_heads", "d_head", "n_layers", "d_mlp", "mlp_depth", "norm", *SKIPS,
           "freeze", "sampled", "target", "lr")  # what a run depends on


# ---- Data law -------------------------------------------------------------------------------------------------------
# A law is pi = [pi_1 (N), pi_2 (N, N), pi_3 (N, N, N)], float64, the last axis the next token. In every flattened table the
# context (x1, x2) is row x1 * N + x2.

def power_unif_law(alphas, nb, n_tokens, generator):
    """At level i the probabilities alpha_i^j / Z, j < nb_i, in an order drawn for each context; the other tokens never come.
    alpha_3 = 1 and nb_3 = 1 is a random look-up table."""
    pi = []
    for level, (alpha, n) in enumerate(zip(alphas, nb)):
        v = torch.zeros(n_tokens, dtype=torch.float64)
        v[:n] = alpha ** torch.arange(n, dtype=torch.float64)
        order = torch.rand([n_tokens] * (level + 1), generator=generator).argsort(-1)
        pi.append((v / v.sum())[order])
    return pi


def uniform_pairs(after):
    """Law with independent uniform x1, x2 and pi_3 = after [N^2, N]."""
    N = after.shape[1]
    uniform = torch.full((N, N), 1 / N, dtype=torch.float64)
    return [uniform[0], uniform, after.view(N, N, N)]


def last_position_law(n_tokens, k, p, generator):
    """Each context has one likely token g, drawn with weights (1 - i/N)^k: pi_3 is p on g, (1 - p)/(N - 1) elsewhere."""
    N = n_tokens
    g = torch.multinomial((1 - torch.arange(N) / N) ** k, N * N, replacement=True, generator=generator)
    after = torch.full((N * N, N), (1 - p) / (N - 1), dtype=torch.float64)
    after[torch.arange(N * N), g] = p
    return uniform_pairs(after)


def gen_d_law(n_tokens, dim, axis_aligned, generator):
    """pi_3 = softmax(0.1 W z), z ~ N(0, I_dim) for each context, W [N, dim] the first columns of the identity, or of a Gaussian
    matrix. Returns pi and W."""
    W = torch.eye(n_tokens) if axis_aligned else torch.randn(n_tokens, n_tokens, generator=generator)
    W, z = W[:, :dim].double(), torch.randn(n_tokens ** 2, dim, generator=generator).double()
    return uniform_pairs((.1 * z @ W.T).softmax(-1)), W


def almost_rank_d(n_tokens, d, axis_aligned, eig_high, eig_low, generator):
    """pi_3 = softmax of an N^2 x N matrix with random singular vectors (on the token side the axes, if aligned) and singular
    values eig_high (the first d) and eig_low (the others)."""
    orthogonal = lambda *shape: torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0]
    right = torch.eye(n_tokens, dtype=torch.float64) if axis_aligned else orthogonal(n_tokens, n_tokens)
    values = torch.full((n_tokens,), eig_low, dtype=torch.float64)
    values[:d] = eig_high
    return uniform_pairs((orthogonal(n_tokens ** 2, n_tokens) * values @ right.T).softmax(-1))


def law_of(flags):
    """[pi_1, pi_2, pi_3] of one run, checked."""
    N, g = flags.n_tokens, common.generator(flags.seed if flags.law_seed < 0 else flags.law_seed, "law")
    alphas, nb = zip(*((getattr(flags, f"alpha_{i}"), getattr(flags, f"nb_{i}") or N) for i in (1, 2, 3)))
    return checked({"power_unif": lambda: power_unif_law(alphas, nb, N, g),
                    "last_position": lambda: last_position_law(N, flags.importance, flags.likely, g),
                    "gen_d": lambda: gen_d_law(N, flags.dim, flags.axis_aligned, g)[0],
                    "almost_rank_d": lambda: almost_rank_d(N, flags.dim, flags.axis_aligned, flags.eig_high, flags.eig_low, g),
                    }[flags.law]())


def checked(pi):
    """pi if it is a law: every row a probability distribution."""
    for i, p in enumerate(pi, 1):
        if not (p >= 0).all() or (p.sum(-1) - 1).abs().max() > 1e-9:
            raise common.Stop(f"pi_{i} is no law: its rows must be probabilities that sum to 1")
    return pi


def contexts(pi):
    """The contexts that occur: indices x1, x2 [C], their probability weight [C] and what follows, pi_3 [C, N]."""
    weight = (pi[0][:, None] * pi[1]).flatten()
    x1, x2 = torch.where(weight.view_as(pi[1]) > 0)
    keep = x1 * len(pi[0]) + x2
    return {"x1": x1, "x2": x2, "weight": weight[keep], "next": pi[2].flatten(0, 1)[keep]}


def sample(law, generator, *shape):
    """Draws of a context (its number among those that occur) and of an answer, by inversion of the joint law."""
    joint, N = (law["weight"][:, None] * law["next"]).flatten().cumsum(0), law["next"].shape[1]
    drawn = torch.searchsorted(joint, torch.rand(shape, generator=generator, dtype=torch.float64) * joint[-1], right=True)
    return {"context": (drawn // N).int(), "answer": (drawn % N).int()}


def entropy(p):
    """Entropy in nats over the last axis."""
    return -torch.special.xlogy(p, p).sum(-1)


def known(law):
    """What is known of the answers before any training: entropy H(pi) = E[H(pi_3)] (nats), the divergence log N - H of a
    model that answers uniformly, and the ceiling E[max pi_3] of the accuracy."""
    H = (law["weight"] * entropy(law["next"])).sum()
    return {"entropy": H, "uniform": math.log(law["next"].shape[1]) - H, "ceiling": (law["weight"] * law["next"].amax(1)).sum()}


# ---- Model ----------------------------------------------------------------------------------------------------------

def named(layer):
    """Names of a layer's parameters: plain in the first, W_Q_1 .. in the second."""
    return lambda name: name + (f"_{layer}" if layer else "")


def init(flags, generator):
    """Parameters of one run: E [N, d], P [2, d], U [N, d]; W_Q, W_K, W_V [H, d, d_head], W_O [H, d_head, d]; an MLP
    W_in, b_in (deeper ones W_in1, b_in1, ..), W_out; low-rank: C [N^2, d] and U."""
    N, d, (H, d_head) = flags.n_tokens, flags.d_model, flags.heads
    uniform = lambda bound, *shape: (2 * torch.rand(shape, generator=generator) - 1) * bound
    if flags.model == "low-rank":
        return {"C": uniform(d ** -.5, N * N, d), "U": uniform(d ** -.5, N, d)}
    params = {"E": uniform(d ** -.5, N, d), "P": uniform(d ** -.5, 2, d), "U": uniform(d ** -.5, N, d)}
    for layer in range(flags.n_layers):
        n = named(layer)
        if H:
            params |= {n(w): uniform((1.5 / d) ** .5, H, d, d_head) for w in ("W_Q", "W_K", "W_V")}
            params[n("W_O")] = uniform(d ** -.5, H, d_head, d)
        if flags.d_mlp:
            widths = [d if H else 2 * d] + [flags.d_mlp] * flags.mlp_depth
            for i, (a, b) in enumerate(zip(widths, widths[1:])):
                params |= {n(f"W_in{i or ''}"): uniform(a ** -.5, a, b), n(f"b_in{i or ''}"): uniform(a ** -.5, b)}
            params[n("W_out")] = uniform(widths[-1] ** -.5, widths[-1], d)
    return params


def reads(x, P, number, part, flags):
    """What attention reads for `part` (qk: scores, ov: values): tokens plus positions, each unless skipped."""
    h = (1 - number[f"skip_tok_{part}"]) * x + (1 - number[f"skip_pos_{part}"]) * P
    return torch.nn.functional.layer_norm(h, h.shape[-1:]) if flags.norm else h


def mlp(params, x, n, flags):
    """ReLU MLP on rows x [..., width], no bias at the end."""
    for i in range(flags.mlp_depth):
        x = torch.relu(x @ params[n(f"W_in{i or ''}")] + params[n(f"b_in{i or ''}")])
    return x @ params[n("W_out")]


def stream(params, tokens, number, flags):
    """The textbook model: residual stream [B, T, d] of tokens [B, T] before U; number: 0 or 1 for each skip_*. Without heads
    the MLP reads the first token and its own. P needs a row for each position."""
    res, keep = params["E"][tokens], 1 - number["skip_residual"]
    T = tokens.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
    for layer in range(flags.n_layers):
        n = named(layer)
        h_qk, h_ov = (reads(res, params["P"][:T], number, part, flags) for part in ("qk", "ov"))
        if flags.n_heads:
            q, k, v = (torch.einsum("btd,hde->bhte", h, params[n(w)])
                       for h, w in ((h_qk, "W_Q"), (h_qk, "W_K"), (h_ov, "W_V")))
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~causal, -math.inf)
            res = keep * res + torch.einsum("bhte,hed->btd", scores.softmax(-1) @ v, params[n("W_O")])
            res = res + mlp(params, res, n, flags) if flags.d_mlp else res
        else:
            res = keep * res + mlp(params, torch.cat([h_ov[:, :1].expand_as(h_ov), h_ov], -1), n, flags)
    return res


def forward(params, tokens, number, flags):
    """Logits [B, T, N] of tokens [B, T]."""
    return stream(params, tokens, number, flags) @ params["U"].T


def heads(params, number, flags, pair=None):
    """One layer at position 1, from tables: attention to the first token [H, ...] and output of each head [H, d, ...], for
    the pairs of tokens x1, x2 [C] in `pair`, or for all [N, N]. With two tokens attention is a sigmoid of the difference
    of two scores; scores and values of a token depend on nothing else, so no sequence is ever formed."""
    at1 = lambda x: x[..., :, None] if pair is None else x[..., pair[0]]
    at2 = lambda x: x[..., None, :] if pair is None else x[..., pair[1]]
    qk, ov = (reads(params["E"], params["P"][:2, None], number, part, flags) for part in ("qk", "ov"))  # [2, N, d]
    k0, k1, q = qk[0] @ params["W_K"], qk[1] @ params["W_K"], qk[1] @ params["W_Q"]  # [H, N, d_head]
    score = (k0 @ q.mT - (k1 * q).sum(-1)[:, None]) / math.sqrt(q.shape[-1])  # [H, x1, x2]
    attention = torch.sigmoid(score if pair is None else score[:, pair[0], pair[1]])
    v0, v1 = ((h @ (params["W_V"] @ params["W_O"])).mT for h in ov)  # [H, d, N]
    return attention, at2(v1) + attention[:, None] * (at1(v0) - at2(v1))


def residual(params, number, flags, pair=None):
    """Residual stream of position 1, before U: [d, C] (contexts last; all N^2 in order without `pair`)."""
    if flags.model == "low-rank":
        return params["C"].T if pair is None else params["C"][pair[0] * flags.n_tokens + pair[1]].T
    if flags.n_layers > 1 or not flags.n_heads:
        i = torch.arange(flags.n_tokens, device=params["E"].device)
        pairs = torch.cartesian_prod(i, i) if pair is None else torch.stack(pair, 1)
        return stream(params, pairs, number, flags)[:, 1].T
    skip = (1 - number["skip_residual"]) * params["E"].T
    out = heads(params, number, flags, pair)[1].sum(0) + (skip[:, None] if pair is None else skip[:, pair[1]])
    out = out.flatten(1)
    return out + mlp(params, out.T, named(0), flags).T if flags.d_mlp else out


def cross_entropy(logits, after):
    """-sum after log softmax(logits) in nats over axis 0: logits and what follows [N, C] -> [C]."""
    return torch.logsumexp(logits, 0) - (after * logits).sum(0)


# ---- Measures -------------------------------------------------------------------------------------------------------

def evaluate(run, params, law):
    """Exact divergence and accuracy of one run over all contexts of its law, in float64."""
    params = {k: p.double() for k, p in params.items()}
    logits = params["U"] @ residual(params, number_of(run), run, pair_of(run, law))
    best = law["next"].gather(1, logits.argmax(0)[:, None])[:, 0]
    loss = (law["weight"] * (cross_entropy(logits, law["next"].T) - entropy(law["next"]))).sum()
    return {"loss": loss, "accuracy": (law["weight"] * best).sum()}


def number_of(run):
    """{field: value} of one run, as `forward` takes it."""
    return common.run_of(common.numbers([run]), 0)


def pair_of(flags, law):
    """(x1, x2) of the contexts, or None where all N^2 occur."""
    return None if len(law["x1"]) == flags.n_tokens ** 2 else (law["x1"], law["x2"])


def context_vectors(run, params, law):
    """(e [C, d], U [N, d]): the residual vectors that U reads."""
    return residual(params, number_of(run), run, pair_of(run, law)).T, params["U"]


def moments(p, U):
    """Mean [C, d] and covariance U^T (diag(p) - p p^T) U [C, d, d] of the rows of U under each row of p [C, N]."""
    mean = p @ U
    second = (p @ (U[:, :, None] * U[:, None]).flatten(1)).view(-1, *[U.shape[1]] * 2)
    return mean, second - mean[:, :, None] * mean[:, None]


def best_vectors(U, after, iterations=40, good=1e-9):
    """The best that any context encoder can do with U [N, d] on rows `after` [C, N]: min over c of KL(after || softmax(U c)),
    convex in each row's c, by damped Newton. Returns (divergence reached [C], certified lower bound [C], c [C, d]).

    The bound is weak duality: whatever c is, its divergence is at least H(q) - H(after) for every distribution q with
    U^T q = U^T after. The Newton step D of row c gives such a q to first order: softmax(U c)_x (1 + (u_x - mean u) D); it
    counts where it is nonnegative, else 0 does. (A look-up table's infimum is often 0, at infinity.)"""
    c, H = torch.zeros(len(after), U.shape[1], dtype=U.dtype), entropy(after)
    value = lambda c: cross_entropy(U @ c.T, after.T) - H

    def newton(c):
        q = (c @ U.T).softmax(1)
        mean, hessian = moments(q, U)
        ridge = (1e-14 * (q @ (U * U).sum(1)) + 1e-30)[:, None, None] * torch.eye(U.shape[1], dtype=U.dtype)
        gradient = (q - after) @ U
        step = torch.linalg.solve(hessian + ridge, -gradient)
        return q, mean, step, -(gradient * step).sum(1)  # the last: Newton decrement squared

    f = value(c)
    for _ in range(iterations):
        _, _, step, decrement = newton(c)
        if not (decrement > good).any():
            break
        size = torch.ones_like(f)
        for _ in range(30):
            new = value(c + size[:, None] * step)
            worse = ~(new <= f - 1e-4 * size * decrement) & (decrement > good * good)
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        accept = new < f
        c, f = torch.where(accept[:, None], c + size[:, None] * step, c), torch.where(accept, new, f)
    q, mean, step, _ = newton(c)
    feasible = q * (1 + step @ U.T - (mean * step).sum(1, keepdim=True))
    sound = (feasible >= 0).all(1) & ((feasible - after) @ U).abs().amax(1).lt(1e-9)
    lower = torch.where(sound, entropy(feasible.clamp(min=0)) - H, torch.zeros_like(f)).clamp(min=0)
    return f, lower, c


def weighted_least_squares(U, after):
    """w* = (U^T S U)^-1 U^T S L of each row of `after` [C, N], S = diag(p) - p p^T, L = log p: the minimum of the second-order
    expansion of the divergence around p. Returns [C, d]."""
    L = after.log()
    mean, S = moments(after, U)
    right = (after * L) @ U - (after * L).sum(1, keepdim=True) * mean
    return (torch.linalg.pinv(S, hermitian=True) @ right[..., None])[..., 0]


def log_mean_exp(f, after):
    """log E_p[exp Z], Z = f - L - E_p[f - L], L = log p, of each row: exactly KL(p || softmax f)."""
    Z = f - after.log()
    return torch.log((after * torch.exp(Z - (after * Z).sum(1, keepdim=True))).sum(1))


def truncation(L, d):
    """Best rank-d approximation of a matrix in least squares (Eckart & Young 1936)."""
    left, values, right = torch.linalg.svd(L, full_matrices=False)
    return left[:, :d] * values[:d] @ right[:d]


def subspace_distance(A, B):
    """Frobenius distance of the projectors onto the columns of A and B [N, d], after the all-ones direction, which softmax
    does not see, is taken out of both. Two random ones: sqrt(2 d (1 - d / (N - 1))) in the mean square."""
    def project(X):
        Q = torch.linalg.qr(X - X.mean(-2, keepdim=True))[0]
        return Q @ Q.mT
    return torch.linalg.matrix_norm(project(A) - project(B))


def cosines(A, B):
    """Cosine of every row of A with every row of B."""
    return torch.nn.functional.normalize(A, dim=-1) @ torch.nn.functional.normalize(B, dim=-1).mT


def bound(params, law):
    """Certified lower bound on the divergence of anything that is read by this run's U; NaN where the run diverged."""
    if not params["U"].isfinite().all():
        return math.nan
    return float((law["weight"] * best_vectors(params["U"].double(), law["next"])[1]).sum())


def infimum(run):
    """0 where theory gives it for the low-rank model, attained or not: d >= N - 1, or a look-up table and d >= 2."""
    table = run.law == "power_unif" and run.nb_3 == 1 or run.law == "last_position" and run.likely == 1
    return 0. if run.d_model >= run.n_tokens - 1 or table and run.d_model >= 2 else math.nan


def first_token_share(attention, x2):
    """Share of the variance of attention [H, C] over contexts that is left among those of equal x2, mean over heads: how much
    of it the first token decides. NaN where attention is constant."""
    groups = torch.nn.functional.one_hot(x2).to(attention.dtype)  # [C, N]
    mean = (attention @ groups / groups.sum(0).clamp(min=1))[:, x2]
    within, total = (attention - mean).square().sum(1), (attention - attention.mean(1, keepdim=True)).square().sum(1)
    return (within / total).mean()


def margin(logits, answer):
    """Correct minus best wrong logit: logits [..., C, N], answer [C] -> [..., C]."""
    correct = np.take_along_axis(logits, np.broadcast_to(answer[:, None], (*logits.shape[:-1], 1)), -1)[..., 0]
    wrong = np.where(np.arange(logits.shape[-1]) == answer[:, None], -np.inf, logits)
    return correct - wrong.max(-1)


def sign_agreement(contribution, answer):
    """For heads 0 and 1: [answer, token] 1 where both raise the token's logit (relative to their mean over tokens, averaged
    over the contexts with this answer), -1 where both lower it, 0 where they disagree; NaN for answers that never come."""
    N, table = contribution.shape[-1], []
    for a in range(N):
        mean = contribution[:2, answer == a].mean(1) if (answer == a).any() else np.full((2, N), np.nan)
        sign = np.sign(mean - mean.mean(1, keepdims=True))
        table.append(np.where(np.isnan(mean[0]), np.nan, np.where(sign[0] == sign[-1], sign[0], 0)))
    return np.array(table)


def theorem(N, stored):
    """Accuracy 1/N + (1 - 1/N) n / N^2 of a model that stores n associations and guesses the rest."""
    return 1 / N + (1 - 1 / N) * np.minimum(stored / N ** 2, 1)


def slopes(arrays, flags, below=.9):
    """Accuracy per head at each width: (d [D], slope [D, seeds]), a line through the runs of a seed by least squares; runs
    with an accuracy of .9 or more are left out (their table is nearly full)."""
    table, widths, rows = pick(arrays, n_tokens=flags.n_tokens, d_mlp=0, d_head=0, model="transformer"), [], []
    for d in np.unique(arrays["d_model"][table]):
        row = []
        for seed in np.unique(arrays["seed"]):
            mine = table & pick(arrays, d_model=d, seed=seed) & (arrays["accuracy"] < below)
            H = arrays["n_heads"][mine]
            row.append(np.polyfit(H, arrays["accuracy"][mine], 1)[0] if len(np.unique(H)) > 1 else np.nan)
        if np.isfinite(row).all():
            widths.append(d), rows.append(row)
    return np.array(widths), np.array(rows).reshape(len(widths), len(np.unique(arrays["seed"])))


def fits(d, slope):
    """slope = a d^k + b, k = 1, 2, 3, by least squares: {k: (curve, unexplained share of the variance)}."""
    result = {}
    for k in (1, 2, 3) if len(d) > 2 else ():
        line = np.polyfit(d.astype(float) ** k, slope, 1)
        curve = lambda x, k=k, line=line: np.polyval(line, np.asarray(x, float) ** k)
        result[k] = curve, np.sum((slope - curve(d)) ** 2) / np.sum((slope - slope.mean()) ** 2)
    return result


# ---- Train ----------------------------------------------------------------------------------------------------------

def start(flags, given=None):
    """Step 0 of one run; `given` replaces initial parameters."""
    params = init(flags, common.generator(flags.seed, "init")) | (given or {})
    return {"params": params, **common.adam_init(params)}


def constants(runs, laws):
    """What differs between runs beside state and batch, [R, ...]: the number fields, the law, and for each part of the model
    whether it is free (1) or frozen (0). laws: the `contexts` of each run."""
    single = lambda x: x.float() if x.is_floating_point() else x
    laws = common.stack(common.tree(single, law) for law in laws)
    laws["entropy"] = entropy(laws["next"])
    laws["answers"] = torch.tensor([run.target == "next-token" for run in runs])
    if not runs[0].sampled:  # contexts last: the axis along which the exact step vectorises
        laws["after"] = laws.pop("next").mT.contiguous()
    free = {name: torch.tensor([float(name not in run.frozen) for run in runs]) for names in PARTS.values() for name in names}
    return common.numbers(runs) | laws | {"free": free}


def step_of(flags):
    """The training step of ONE run: state and batch (drawn contexts and answers [B]; nothing where the loss is exact) ->
    new state, logs."""
    def loss_of(params, batch, law):
        if not flags.sampled:
            logits = params["U"] @ residual(params, law, flags, pair_of(flags, law))
            return (law["weight"] * (cross_entropy(logits, law["after"]) - law["entropy"])).sum()
        at = batch["context"].long()
        logits = params["U"] @ residual(params, law, flags, (law["x1"][at], law["x2"][at]))
        drawn = batch["answer"] == torch.arange(flags.n_tokens, device=logits.device)[:, None]
        after = torch.where(law["answers"], drawn.float(), law["next"][at].T)  # [N, B], of this step's contexts only
        return (cross_entropy(logits, after) - law["entropy"][at] * ~law["answers"]).mean()

    def step(state, batch, law):
        grads, loss = grad_and_value(loss_of)(state["params"], batch, law)
        grads = {k: g * law["free"].get(re.sub(r"_\d+$", "", k), 1.) for k, g in grads.items()}
        params, optimiser = common.adamw(state["params"], grads, state, law["lr"])
        return {"params": params, **optimiser}, {"loss": loss}
    return step


def train(runs, laws, folder, given=lambda run: {}):
    """Train runs of one shape on their laws: `common.train`, with draws [CHUNK, sampled] where the loss is not exact;
    given(run): parameters that take the place of the initial ones."""
    flags = runs[0]
    draws = lambda r, chunk: sample(laws[r], common.generator(runs[r].seed, "train", chunk), common.CHUNK, flags.sampled)
    return common.train(
        runs, folder, common.stack(start(run, given(run)) for run in runs), constants(runs, laws), step_of(flags),
        draw=draws if flags.sampled else lambda r, chunk: torch.zeros(common.CHUNK),
        evaluate=lambda r, params: evaluate(runs[r], params, laws[r]), eval_at=common.marks(flags.steps, flags.evals),
        label=f"{flags.study} N={flags.n_tokens} d={flags.d_model} "
        + (f"H={flags.n_heads}" if flags.model == "transformer" else "low-rank"))


# ---- Figures --------------------------------------------------------------------------------------------------------

BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK = common.COLOURS[:7]


def configurations(arrays):
    """(label, mask over runs) of every configuration, labelled by the settings that vary."""
    vary = [f for f in COLUMNS if f != "seed" and len(np.unique(arrays[f])) > 1]
    rows = list(zip(*(arrays[f].tolist() for f in vary))) or [()] * len(arrays["seed"])
    word = lambda f, v: f if v is True else f"{f}={v:g}" if isinstance(v, float) else f"{f}={v}"
    for row in dict.fromkeys(rows):
        label = ", ".join(word(f, v) for f, v in zip(vary, row) if v is not False)
        yield label, np.array([r == row for r in rows])


def strip(ax, x, y, colour, label, best=min, **style):
    """One dot a run, a line through the medians over runs, and a dotted one through the best; diverged runs left out."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    ax.plot(x, y, "o", color=colour, ms=2.5, alpha=.5)
    at = np.unique(x)
    ax.plot(at, [np.median(y[x == a]) for a in at], color=colour, lw=1.4, label=label, **style)
    ax.plot(at, [best(y[x == a]) for a in at], color=colour, lw=.7, ls=":")


def draw_dynamics(arrays, flags):
    """Exact divergence and accuracy over training, for a look-up table and for a law with some entropy."""
    kinds = [None] if flags.sweep else np.unique(arrays["nb_3"])
    figure, axes = common.panels(2 * len(kinds), "How fast is an n-gram law learned, from its probabilities or from draws?",
                                 flags)
    for row, nb in enumerate(kinds):
        mine = np.ones(len(arrays["seed"]), bool) if nb is None else arrays["nb_3"] == nb
        law = f"{nb} answers a context" if nb != 1 else "look-up table (both drawn targets are the same)"
        law = law if flags.law == "power_unif" and nb else flags.law
        here = {k: v[mine] for k, v in arrays.items() if k in COLUMNS}
        for ax, key in zip(axes[2 * row:], ("loss", "accuracy")):
            for (label, runs), colour in zip(configurations(here), itertools.cycle(common.COLOURS)):
                model, drawn, target = (here[k][runs][0] for k in ("model", "sampled", "target"))
                name = "low-rank, exact" if model == "low-rank" else f"{target}, {drawn} drawn" if drawn else "exact"
                if key == "loss" or model != "low-rank":
                    common.band(ax, np.maximum(arrays["eval_step"], .7), arrays[f"eval_{key}"][:, mine][:, runs],
                                label or name if flags.sweep else name, colour)
            ax.set(xscale="log", xlabel="step (0 is drawn at 0.7)", title=law)
        loss, accuracy = axes[2 * row:2 * row + 2]
        common.shelf(loss, arrays["uniform"][mine].mean(), "answers uniformly: log N - H")
        best = arrays["loss"][mine & (arrays["model"] == "low-rank")]
        if len(best):
            common.shelf(loss, best.min(), f"best low-rank: {best.min():.2g}")
        floor = arrays["bound"][mine & (arrays["model"] == "transformer")]
        if floor.size and floor.min() > 0:
            common.shelf(loss, floor.min(), f"least possible given U: {floor.min():.3g}", side="left")
        common.shelf(accuracy, 1 / flags.n_tokens, "chance 1/N")
        common.shelf(accuracy, arrays["ceiling"][mine].mean(), "ceiling E[max pi_3]")
        loss.set(ylabel="divergence (nats)")
        accuracy.set(ylabel="accuracy")
        if loss.lines[2:]:
            loss.legend(fontsize=6.5)
        if accuracy.lines[2:]:
            accuracy.legend(fontsize=6.5, loc="center left")
    return figure


def trains(freeze, d_mlp):
    """What is left to train."""
    frozen = freeze.split("+")
    halves = [h for h in HALVES if h not in frozen] if set(frozen) & set(HALVES) else []
    return " ".join([p for p in PARTS if p not in frozen and not (p == "QKV" and halves)] + halves + ["MLP"] * int(d_mlp > 0))


def draw_levels(arrays, flags):
    """The final divergence of every configuration, sorted, one dot a run."""
    finite = np.isfinite(arrays["loss"])
    rows = [(label, mine & finite) for label, mine in configurations(arrays) if (mine & finite).any()]
    rows.sort(key=lambda row: np.median(arrays["loss"][row[1]]))
    question = {"freeze": "Which parts hold the memory? Divergence with these parts frozen",
                "skips": "What does each path carry? Divergence without these paths"}.get(flags.study, "Divergence")
    figure, (ax,) = common.panels(1, question, flags, size=(7.5, 1.2 + .19 * len(rows)))
    labels = []
    for y, (label, mine) in enumerate(rows):
        loss = arrays["loss"][mine]
        ax.plot(loss, np.full(len(loss), y), "o", color=BLUE, ms=3, alpha=.6)
        ax.plot(np.median(loss), y, "|", color=RED, ms=10, mew=1.6)
        free = trains(arrays["freeze"][mine][0], arrays["d_mlp"][mine][0])
        label = label.replace("freeze=", "").replace("skip_", "") or "none"
        labels.append(label + f"   (trains {free})" * (flags.study == "freeze"))
    ax.set_yticks(range(len(rows)), labels, fontsize=6.5)
    ax.axvline(arrays["uniform"].mean(), color="grey", ls="--", lw=.8)
    ax.annotate("uniform", (arrays["uniform"].mean(), len(rows) - .4), fontsize=6.5, color="grey", ha="right")
    ax.set(xscale="log", xlabel=f"divergence after {flags.steps} steps (nats); {flags.runs} seeds, red: median")
    return figure


def draw_first_token(arrays, flags):
    """Divergence against the share of the attention's variance that the first token decides."""
    figure, (ax,) = common.panels(1, "Heads that look at positions look less at the first token", flags, size=(6.5, 4.2))
    for skip, colour, name in ((False, RED, "positions in the scores"), (True, BLUE, "no positions in the scores")):
        mine = arrays["skip_pos_qk"] == skip
        ax.plot(arrays["first_share"][mine], arrays["loss"][mine], "o", ms=3, color=colour, label=f"{name} ({mine.sum()} runs)")
    common.shelf(ax, arrays["uniform"].mean(), "answers uniformly: log N - H")
    ax.set(yscale="log", xlabel="share of the attention's variance left at equal second token", ylabel="divergence (nats)")
    ax.legend(fontsize=7)
    return figure


def or_levels(draw):
    """draw, or with --sweep, whose fields it does not know, the plain levels of all configurations."""
    return lambda arrays, flags: draw_levels(arrays, flags) if flags.sweep else draw(arrays, flags)


def draw_scaling(fields, title):
    """A figure of divergence against some of the fields in SCALED, all others at their base value."""
    def draw(arrays, flags):
        figure, axes = common.panels(len(fields), title, flags)
        base = {f: getattr(flags, f) for f in (*SCALED, "mlp_depth")}
        for ax, field in zip(axes, fields):
            rest = {f: v for f, v in base.items() if f != field} | (dict(d_mlp=16) if field == "mlp_depth" else {})
            mine = pick(arrays, **rest)
            value = np.where(arrays[field] == 0, flags.d_model, arrays[field]) if field == "d_head" else arrays[field]
            for model, colour in (("transformer", BLUE), ("low-rank", ORANGE)):
                runs = mine & (arrays["model"] == model)
                if runs.any() and (model == "transformer" or field in LAW_SIZES):
                    strip(ax, value[runs], arrays["loss"][runs], colour, f"{model} (dotted: best of {flags.runs})")
                if runs.any() and model == "transformer":
                    strip(ax, value[runs], arrays["bound"][runs], GREEN, "least possible given its U")
                    strip(ax, value[runs], arrays["uniform"][runs], "grey", "answers uniformly", ls="--")
            ticks = np.unique(value[mine])
            ax.set(xlabel=field, ylabel="divergence (nats)", yscale="log",
                   xscale="log" if len(ticks) and min(ticks) >= 1 else "linear")
            ax.set_xticks(ticks, [f"{v:g}" for v in ticks])
            ax.minorticks_off()
            if mine.any():
                ax.legend(fontsize=6)
        return figure
    return or_levels(draw)


def draw_attention(arrays, flags):
    """Attention of each head of the first seed to the first token, and the singular values of all maps."""
    maps = arrays["map"][0]
    figure, axes = common.panels(min(len(maps), 3) + 1, "Which pairs make a head look at the first token? (first seed)", flags)
    seen = arrays["seen"][0]
    order = np.argsort(~seen.any(1), kind="stable")  # first tokens that occur on top
    for h, ax in enumerate(axes[:-1]):
        common.image(ax, maps[h][order], f"head {h}: probability of the first token", figure, "second token",
              "first token (those that occur first)", (0, 1))
        ax.axhline(seen.any(1).sum() - .5, color="white", lw=.8)
    if not seen.any(1).all():
        axes[0].text(1, seen.any(1).sum() + 6, "below: first tokens that never occur", color="white", fontsize=6.5)
    ax, index = axes[-1], np.arange(1, arrays["singular"].shape[-1] + 1)
    for key, colour, name in (("singular", BLUE, "trained"), ("singular_start", "grey", "untrained")):
        lines = arrays[key].reshape(-1, arrays[key].shape[-1])
        ax.plot(index, lines.T, color=colour, lw=.8)
        ax.plot([], [], color=colour, label=f"{name}: {len(lines)} heads of {len(arrays[key])} seeds")
    ax.set(xscale="log", yscale="log", xlabel="index", ylabel="singular value of the map", ylim=(1e-4, None))
    ax.legend(fontsize=7)
    return figure


def draw_heads(arrays, flags):
    """Correct minus best wrong logit of each head against its attention, the sum of all, and where signs agree (first seed)."""
    x, answer = arrays["contribution"][0], arrays["answer"][0]  # [H, C, N]
    H = len(x)
    solo, group = margin(x, answer), margin(x.sum(0) + arrays["skip_logits"][0], answer)
    figure, axes = common.panels(4, "What does each head contribute? (first seed)", flags)
    for h in range(min(H, 4)):
        axes[0].plot(arrays["attention"][0][h], solo[h], "o", ms=3, color=common.COLOURS[h], label=f"head {h}")
    axes[0].axhline(0, color="grey", lw=.6)
    axes[0].set(xlabel="attention to the first token", ylabel="correct - best wrong logit", title="solo: one head alone")
    axes[0].legend(fontsize=7)
    for h in range(min(H, 4)):
        axes[1].plot(solo[h], group, "o", ms=3, color=common.COLOURS[h], label=f"head {h}")
    axes[1].axhline(0, color="grey", lw=.6), axes[1].axvline(0, color="grey", lw=.6)
    axes[1].set(xlabel="solo margin of the head", ylabel="margin of the sum", title="group: all heads together")
    axes[1].legend(fontsize=7)
    common.image(axes[2], arrays["sign_agreement"][0], "heads 0 and 1, mean over contexts with this answer:\n1 both raise, "
          "-1 both lower, 0 disagree", figure, "token whose logit is moved", "answer", (-1, 1))
    example = min(10, len(answer) - 1)
    width = .8 / (H + 1)
    place, coefficient = np.arange(x.shape[-1]), arrays["coefficient"][0][:, example]
    for h in range(H):
        axes[3].bar(place + h * width, coefficient[h], width, color=common.COLOURS[h % 8], label=f"head {h}")
    axes[3].bar(place + H * width, coefficient.sum(0), width, color=BLACK, label="sum")
    axes[3].axvline(answer[example] + .4, color="grey", ls="--", lw=.8)
    axes[3].set(xlabel=f"token (dashed: the answer {answer[example]})", ylabel="coefficient in the basis of U",
                title=f"context {example}, minimum norm: U (U'U)^-1 v")
    axes[3].legend(fontsize=7)
    return figure


REFERENCE_KL = {"low-rank": {1: 1.29, 2: .494, 3: .124, 5: .0215},  # of a prototype, by width and by heads
                "transformer": {1: .852, 2: .503, 5: .093, 10: .025, 20: .0215}}


def draw_superposition(arrays, flags):
    """Divergence against width and heads, and how far the vectors of contexts point at their token."""
    figure, axes = common.panels(4, "How many tokens share d directions?", flags)
    H = flags.n_heads
    kinds = (("low-rank", "", ORANGE), ("transformer", "", BLUE), ("transformer", "U", GREEN))
    for ax, k in zip(axes, np.unique(arrays["importance"])[:2]):
        for model, freeze, colour in kinds:
            mine = pick(arrays, model=model, freeze=freeze, importance=k, n_heads=H)
            if mine.any():
                strip(ax, arrays["d_model"][mine], arrays["loss"][mine], colour,
                      model if model == "low-rank" else f"transformer H={H}" + ", U of the low-rank" * bool(freeze))
        mine = pick(arrays, importance=k)
        common.shelf(ax, arrays["uniform"][mine].mean(), "answers uniformly: log N - H")
        if k == 0:
            ax.plot(*zip(*REFERENCE_KL["low-rank"].items()), "kx", ms=5, label="low-rank, prototype")
        ax.set(yscale="log", xlabel="d_model", ylabel="divergence (nats)", ylim=(1e-7, None),
               title=f"importance (1 - i/N)^{k:g}")
        ax.legend(fontsize=6)
    mine = pick(arrays, model="transformer", freeze="", d_model=flags.d_model)
    for k, colour in zip(np.unique(arrays["importance"])[:2], (BLUE, RED)):
        runs = mine & (arrays["importance"] == k)
        if runs.any():
            strip(axes[2], arrays["n_heads"][runs], arrays["loss"][runs], colour, f"transformer, k={k:g}")
        low = pick(arrays, model="low-rank", d_model=flags.d_model, importance=k)
        if low.any():
            common.shelf(axes[2], arrays["loss"][low].min(), f"best low-rank, k={k:g}: {arrays['loss'][low].min():.3g}",
                         colour, "left")
    axes[2].plot(*zip(*REFERENCE_KL["transformer"].items()), "kx", ms=5, label="prototype, k=0")
    axes[2].set(xscale="log", yscale="log", xlabel="heads", ylabel="divergence (nats)", title=f"d_model={flags.d_model}")
    axes[2].legend(fontsize=6)
    for key, colour, name in (("alignment", BLUE, "context with its own token's direction"),
                              ("opposite", RED, "direction of a token with its most opposite one")):
        for model, freeze, style in (("low-rank", "", "-"), ("transformer", "", "--")):
            mine = pick(arrays, model=model, freeze=freeze, importance=0., n_heads=H)
            if mine.any():
                at = np.unique(arrays["d_model"][mine])
                axes[3].plot(at, [np.median(arrays[key][mine & (arrays["d_model"] == d)]) for d in at], style, color=colour,
                             label=f"{name}, {model}")
    common.shelf(axes[3], -1 / (flags.n_tokens - 1), "simplex: -1/(N-1)")
    common.shelf(axes[3], -1, "antipodal pairs")
    axes[3].set(xlabel="d_model", ylabel="mean cosine", ylim=(-1.08, 1.05), title="k=0 (U centred)")
    if axes[3].lines[2:]:
        axes[3].legend(fontsize=6)
    return figure


def draw_gram(key, title):
    """A figure of Gram matrices at --d-model: low-rank and transformer, both importances (first seed)."""
    def draw(arrays, flags):
        figure, axes = common.panels(4, title, flags)
        for ax, x, name in zip(axes, arrays.get(f"gram_{key}", ()), arrays["gram_name"]):
            common.image(ax, x, str(name), figure)
        for ax in axes[len(arrays["gram_name"]):]:
            ax.set_axis_off()
        return figure
    return or_levels(draw)


def draw_tokens(arrays, flags):
    """Gram matrix of all token-plus-position vectors of the transformers at --d-model (first seed)."""
    names = [n for n in arrays["gram_name"] if n.startswith("transformer")]
    figure, axes = common.panels(2, "What attention reads: (E + P)(E + P)', first position, then second", flags)
    for ax, x, name in zip(axes, arrays.get("gram_tokens", ()), names):
        common.image(ax, x, str(name), figure)
    return figure


def draw_subspace(arrays, flags):
    """Distance of span(U) to the top directions of the centred log-probabilities, against their number and their gap."""
    figure, axes = common.panels(2, "Does U span the leading directions of the log-probabilities?", flags)
    for aligned, colour in ((True, BLUE), (False, RED)):
        mine = arrays["axis_aligned"] == aligned
        name = "axes aligned" if aligned else "not aligned"
        strip(axes[0], arrays["dim"][mine], arrays["distance"][mine], colour, name)
        mine &= arrays["dim"] > flags.d_model
        axes[1].plot(arrays["gap"][mine], arrays["distance"][mine], "o", ms=3, color=colour, label=name)
    d, N = flags.d_model, flags.n_tokens
    for ax in axes:
        common.shelf(ax, math.sqrt(2 * d * (1 - d / (N - 1))), "two random subspaces: sqrt(2 d (1 - d/(N-1)))")
        ax.set(ylabel="distance of projectors (Frobenius)")
        ax.legend(fontsize=7)
    axes[0].set(xlabel="dimensions of the law", ylim=(0, None))
    axes[1].set(xlabel=f"gap 1 - s_{d + 1} / s_{d} of their singular values", xscale="log", yscale="log",
                title="laws of more than d dimensions")
    return figure


VALUES = {"newton": "Newton given U\n(certified)", "trained": "trained vectors", "w_star": "analytic w*",
          "least_squares": "least-squares\ntruncation", "transposed": "trained, contexts\nx1 + N x2 (a bug)"}


def draw_optimum(arrays, flags):
    """The divergences of one law, computed five ways, one line a seed."""
    figure, (ax,) = common.panels(1, "How good is the analytic context vector?", flags, size=(7, 4.2))
    values = np.stack([arrays[k] for k in VALUES])
    ax.plot(values, "o-", color=BLUE, lw=.6, ms=3, alpha=.6)
    ax.plot(np.median(values, 1), "_", color=RED, ms=22, mew=2, label=f"median of {values.shape[1]} seeds")
    common.shelf(ax, np.median(arrays["uniform"]), "answers uniformly: log N - H", side="left")
    ax.set_xticks(range(len(VALUES)), VALUES.values(), fontsize=7)
    ax.set(yscale="log", ylabel="log E_pi[e^Z] = divergence (nats)")
    ax.legend(fontsize=7)
    return figure


PAPER_SLOPE = {5: .00716, 10: .03404, 13: .05539}
PAPER_ACCURACY = {1: .130, 11: .506, 31: .997}
PROTOTYPE_ACCURACY = {1: .105, 6: .282, 11: .489, 16: .690}


def draw_capacity(arrays, flags):
    """Accuracy against heads, associations per head against width and against d_head, and an MLP of equal size."""
    N = flags.n_tokens
    figure, axes = common.panels(4, "How many associations does a head store?", flags)
    table = pick(arrays, n_tokens=N, d_mlp=0, d_head=0)
    widths = np.unique(arrays["d_model"][table])
    for d, colour in zip([w for w in (5, 8, 10, 13) if w in widths] or widths[:4], (BLUE, GREEN, RED, PINK)):
        mine = table & (arrays["d_model"] == d)
        strip(axes[0], arrays["n_heads"][mine], arrays["accuracy"][mine], colour, f"d={d}", max)
        heads = np.array([1, arrays["n_heads"][mine].max()])
        axes[0].plot(heads, theorem(N, heads * d + d), color=colour, lw=.8, ls="--")
        axes[0].plot(heads, theorem(N, heads * (d - 1) + 1), color=colour, lw=.8, ls=":")
    axes[0].plot(*zip(*PAPER_ACCURACY.items()), "k+", ms=7, label="d=10, paper")
    axes[0].plot(*zip(*PROTOTYPE_ACCURACY.items()), "kx", ms=5, label="d=10, prototype")
    axes[0].set(xlabel="heads", ylabel="accuracy", ylim=(0, 1.05),
                title="dashed: theorem, dotted below it: Mahdavi et al.")
    axes[0].legend(fontsize=6)
    d, slope = slopes(arrays, flags)
    to_count = N * N / (1 - 1 / N)
    if len(d):
        strip(axes[1], np.repeat(d, slope.shape[1]), slope.ravel() * to_count, BLUE, "measured", max)
        for k, (curve, error) in fits(d, np.median(slope, 1)).items():
            x = np.linspace(d[0], d[-1], 50)
            axes[1].plot(x, curve(x) * to_count, lw=.8, ls="--", color=(SKY, GREEN, PINK)[k - 1],
                         label=f"a d^{k} + b, R2 = {1 - error:.4f}")
        axes[1].plot(d, d, color="grey", lw=.8, label="theorem: d_head")
        axes[1].plot(d, d - 1, color="grey", lw=.8, ls=":", label="Mahdavi et al.: d_head - 1")
    axes[1].plot(list(PAPER_SLOPE), np.array(list(PAPER_SLOPE.values())) * to_count, "k+", ms=7, label="paper's table")
    axes[1].set(xlabel="d", ylabel="associations per head", title="slope of accuracy x N^2 / (1 - 1/N)")
    axes[1].legend(fontsize=6)
    mine = pick(arrays, n_tokens=N, d_model=10, n_heads=6)
    if mine.any():
        width = np.where(arrays["d_head"][mine] == 0, 10, arrays["d_head"][mine])
        strip(axes[2], width, arrays["accuracy"][mine], BLUE, "d=10, H=6", max)
        axes[2].plot(np.unique(width), theorem(N, 6 * np.minimum(np.unique(width), 10) + 10), color="grey", ls="--", lw=.8,
                     label="theorem's lower bound (d_head <= d)")
        axes[2].legend(fontsize=6)
    axes[2].set(xlabel="d_head", ylabel="accuracy", ylim=(0, None))
    equal = arrays["n_tokens"] != N
    for d, colour in zip(np.unique(arrays["d_model"][equal]), (BLUE, RED, GREEN)):
        for mlp, style in ((False, "-"), (True, "--")):
            mine = equal & (arrays["d_model"] == d) & ((arrays["d_mlp"] > 0) == mlp)
            if mine.any():
                strip(axes[3], arrays["parameters"][mine], arrays["accuracy"][mine], colour,
                      f"d={d}, {'MLP' if mlp else 'heads'}", max, ls=style)
    axes[3].set(xlabel="parameters", ylabel="accuracy", title="N=70: heads or an MLP of the same size", ylim=(0, None))
    if equal.any():
        axes[3].legend(fontsize=6)
    return figure


# ---- Main -----------------------------------------------------------------------------------------------------------

TOY = "Elhage et al. 2022, Toy Models of Superposition"
PAPER, NOTES = "Dana, Pydi & Chevaleyre, Memorization in Attention-only Transformers", "research notes, n-gram notebook"


SCALED = dict(n_heads=(1, 2, 4, 8, 16), d_model=(2, 4, 8, 16), d_head=(2, 4, 8, 16), n_layers=(1, 2, 3),
              n_tokens=(10, 20, 30, 50), alpha_1=(.6, .9, 1.), alpha_3=(.3, .6, .9), d_mlp=(16, 64))  # varied one at a time
LAW_SIZES = ("d_model", "n_tokens", "alpha_1", "alpha_3")  # of these, what the low-rank model depends on


def points_of(flags):
    """The configurations of a study, as dicts of fields."""
    small = flags.smoke
    if flags.study == "dynamics":
        ways = [("transformer", 0, "divergence"), ("low-rank", 0, "divergence"),
                ("transformer", flags.sampled or 16, "divergence"), ("transformer", flags.sampled or 16, "next-token")]
        kinds = (1, 4) if flags.law == "power_unif" else (flags.nb_3,)
        return [dict(model=m, sampled=b, target=t, nb_3=n) for m, b, t in ways for n in kinds]
    if flags.study == "freeze":
        subsets = [c for n in range(len(PARTS)) for c in itertools.combinations(PARTS, n)]
        halves = [("E", "P", half, "O", "U") for half in HALVES]
        return [dict(freeze="+".join(c)) for c in (subsets[::6] if small else subsets + halves)]
    if flags.study == "scaling":
        base = {f: getattr(flags, f) for f in (*SCALED, "alpha_2", "mlp_depth")} | dict(model="transformer")
        points = [base] + [base | {f: v} for f, values in SCALED.items() for v in values]
        points += [base | dict(d_mlp=16, mlp_depth=k) for k in (1, 2, 3)]
        points = [p | dict(alpha_2=p["alpha_1"]) for p in points]  # as the notes, the first two levels alike
        points += [p | dict(model="low-rank") for p in points if all(p[f] == base[f] for f in SCALED if f not in LAW_SIZES)]
        return points[::9] if small else points
    if flags.study == "skips":
        grid = [dict(zip(SKIPS, v)) for v in itertools.product((False, True), repeat=5)]
        grid = [p for p in grid if not any(p[f"skip_pos_{x}"] and p[f"skip_tok_{x}"] for x in ("qk", "ov"))]
        return grid[:4] if small else grid
    if flags.study == "superposition":
        sizes = [(d, flags.n_heads) for d in range(1, flags.n_tokens)]
        few = [(flags.d_model, H) for H in (1, 2, 5, 10) if H < flags.n_heads]
        point = lambda model, freeze, size: [dict(model=model, freeze=freeze, d_model=size[0], n_heads=size[1], importance=k)
                                             for k in (0., 2.)]
        low = sum((point("low-rank", "", size) for size in sizes), [])  # first: their U is what freeze=U freezes
        full = sum((point("transformer", freeze, size) for size in sizes for freeze in ("", "U")), [])
        return [p for p in low + full if p["d_model"] == flags.d_model] if small else low + full + sum(
            (point("transformer", "", size) for size in few), [])
    if flags.study == "subspace":
        return [dict(dim=d, axis_aligned=a) for d in range(flags.d_model, flags.n_tokens + 1) for a in (True, False)]
    if flags.study == "capacity":
        pairs = [(d, H) for d in range(3, 14) for H in (1, 6, 11)] + [(10, 16), (10, 31)]
        grid = [dict(n_tokens=flags.n_tokens, d_model=d, d_head=0, d_mlp=0, n_heads=H) for d, H in pairs]
        grid += [grid[0] | dict(d_model=10, n_heads=6, d_head=h) for h in (2, 5, 20, 30)]
        for d in (7, 10, 13):  # an MLP with as many numbers as the heads: 3 d m + m = 4 H d^2
            for H in (2, 6):
                pair = dict(n_tokens=70, d_model=d, d_head=0)
                grid += [pair | dict(n_heads=H, d_mlp=0), pair | dict(n_heads=0, d_mlp=round(4 * H * d * d / (3 * d + 1)))]
        return [p | dict(n_tokens=flags.n_tokens) for p in grid[::9]] if small else grid
    return []


def train_groups(flags, folder, given=lambda run, parts: {}):
    """Train every configuration of a study. Returns a list of (runs, params, laws, metrics) and, with one entry a run, their
    settings, exact final loss and accuracy, what is known of their laws, and the certified bound of their U."""
    groups, parts, columns, kept = common.groups_of_runs(flags), [], {}, {}
    for i, runs in enumerate(groups):
        sub = folder.sub(i, len(groups))
        laws = [contexts(law_of(run)) for run in runs]
        state, metrics, snapshots = train(runs, laws, sub, lambda run: given(run, parts))
        params = state["params"]
        final = {"loss": metrics["eval_loss"][-1], "accuracy": metrics["eval_accuracy"][-1],
                 **common.stacked([known(law) for law in laws]),
                 "bound": np.array([bound(common.run_of(params, r), law) for r, law in enumerate(laws)]),
                 "infimum": np.array([infimum(run) for run in runs])}
        sub.result(runs, metrics, final, snapshots)
        kept = kept_arrays(runs, params)
        if len(groups) > 1:
            sub.write_npz("arrays.npz", kept)
        settings = {f: np.array([getattr(run, f) for run in runs]) for f in COLUMNS}
        size = np.full(len(runs), sum(p[0].numel() for p in params.values()))
        for k, v in {**settings, **final, "parameters": size}.items():
            columns.setdefault(k, []).append(v)
        parts.append((runs, params, laws, metrics))
        if folder.interrupted:
            break
    columns = {k: np.concatenate(v) for k, v in columns.items()}
    return parts, columns | (kept if len(groups) == 1 else {})


def kept_arrays(runs, params):
    """Parameters [R, ...] and the laws behind them: pi1 [L, N], pi2 [L, N, N], pi3 [L, N, N, N], and `law_index` [R]."""
    keys = [tuple(getattr(r, f) for f in SETTINGS) + (r.seed * (r.law_seed < 0),) for r in runs]
    distinct = list(dict.fromkeys(keys))
    laws = [law_of(runs[keys.index(k)]) for k in distinct]
    return {**params, **{f"pi{i + 1}": torch.stack([law[i] for law in laws]) for i in range(3)},
            "law_index": np.array([distinct.index(k) for k in keys])}


def each_run(parts):
    """(run, its parameters in float64, its law) of every run, in the order of the columns; a diverged run's are set to 0."""
    for runs, params, laws, _ in parts:
        for r, run in enumerate(runs):
            yield run, {k: p.double().nan_to_num(0, 0, 0) for k, p in common.run_of(params, r).items()}, laws[r]


def compute_levels(flags, folder):
    """Settings, loss, accuracy, entropy, uniform, ceiling, bound, parameters [R] of every run, in nats; with one group also its
    parameters and laws."""
    return train_groups(flags, folder)[1]


def compute_skips(flags, folder):
    """As compute_levels, with first_share [R], the share of the attention's variance that the first token decides (one-layer
    transformers, else NaN)."""
    parts, columns = train_groups(flags, folder)
    share = [first_token_share(heads(params, number_of(run), run, (law["x1"], law["x2"]))[0], law["x2"])
             if run.model == "transformer" and run.n_heads and run.n_layers == 1 else math.nan
             for run, params, law in each_run(parts)]
    return columns | {"first_share": np.array(share, float)}


def compute_dynamics(flags, folder):
    """As compute_levels, with eval_step [M], eval_loss, eval_accuracy [M, R]."""
    parts, columns = train_groups(flags, folder)
    M = min(len(m["eval_step"]) for *_, m in parts)
    curves = {k: np.concatenate([m[k][:M] for *_, m in parts], 1) for k in ("eval_loss", "eval_accuracy")}
    return columns | curves | {"eval_step": parts[0][-1]["eval_step"][:M]}


def compute_scaling(flags, folder):
    """As compute_levels; also writes scaling.csv, one line a configuration as in the notes, medians over runs, with the best
    trained low-rank model of the same law and width."""
    columns = train_groups(flags, folder)[1]
    names = ("alpha_1", "alpha_3", "n_tokens", "d_model", "n_heads", "d_head", "n_layers", "d_mlp", "mlp_depth")
    lines = [",".join((*names, "loss", "unif_loss", "bound", "best_loss"))]
    whole = columns["model"] == "transformer"
    for row in dict.fromkeys(zip(*(columns[f][whole].tolist() for f in names))):
        mine = whole & pick(columns, **dict(zip(names, row)))
        low = columns["loss"][pick(columns, model="low-rank", **{f: columns[f][mine][0] for f in LAW_SIZES})]
        values = [*(np.median(columns[k][mine]) for k in ("loss", "uniform", "bound")), min(low, default=np.nan)]
        lines.append(",".join([f"{v:g}" for v in row] + [f"{v:.6g}" for v in values]))
    folder.write("scaling.csv", ("\n".join(lines) + "\n").encode())
    return columns


def compute_attention(flags, folder):
    """As compute_levels, with map [R, H, N, N], the probability of the first token for the pair (x1, x2), its singular values
    [R, H, N], those before training (singular_start), seen [R, N, N], whether the pair occurs, and rank_one [R, H]: the share
    of the first singular value's square in the map of the first tokens that occur, its mean taken out."""
    parts, columns = train_groups(flags, folder)
    rows = []
    for run, params, law in each_run(parts):
        seen = torch.zeros(run.n_tokens, run.n_tokens, dtype=torch.bool)
        seen[law["x1"], law["x2"]] = True
        before = {k: p.double() for k, p in init(run, common.generator(run.seed, "init")).items()}
        maps, start = (heads(p, number_of(run), run)[0] for p in (params, before))
        occur = maps[:, seen.any(1)]
        centred = torch.linalg.svdvals(occur - occur.mean((1, 2), keepdim=True)).square()
        rows.append({"map": maps, "seen": seen, "singular": torch.linalg.svdvals(maps),
                     "singular_start": torch.linalg.svdvals(start), "rank_one": centred[:, 0] / centred.sum(1)})
    return columns | common.stacked(rows)


def compute_heads(flags, folder):
    """As compute_levels, with attention [R, H, C], contribution [R, H, C, N] of each head to each logit and skip_logits
    [R, C, N] of the residual, which sum to the logits [R, C, N] of the textbook model; coefficient [R, H, C, N], each head's
    vector in the basis of U (minimum norm); answer [R, C], the likeliest; sign_agreement [R, N, N]."""
    parts, columns = train_groups(flags, folder)
    rows = []
    for run, params, law in each_run(parts):
        number, pair, U = number_of(run), (law["x1"], law["x2"]), params["U"]
        attention, out = heads(params, number, run, pair)
        basis = U @ torch.linalg.pinv(U.T @ U)  # [N, d]
        contribution, answer = (out.mT @ U.T).numpy(), law["next"].argmax(1).numpy()
        rows.append({"attention": attention, "contribution": contribution, "answer": answer,
                     "coefficient": out.mT @ basis.T, "sign_agreement": sign_agreement(contribution, answer),
                     "skip_logits": (1 - number["skip_residual"]) * params["E"][law["x2"]] @ U.T,
                     "logits": forward(params, torch.stack(pair, 1), number, run)[:, 1]})
    return columns | common.stacked(rows)


def compute_superposition(flags, folder):
    """As compute_levels, with alignment [R], the mean cosine of a context's vector with its likely token's row of U; opposite
    [R], the most negative cosine of a row of U with another, mean over rows; simplex_error [R], how far all these cosines are
    from -1/(N-1) (root mean square; U centred over tokens in all three); and for four models at --d-model (gram_name) the Gram
    matrices gram_U [4, N, N], gram_contexts [4, N^2, N^2] (sorted by likely token) and gram_tokens (E + P; transformers)."""
    def given(run, parts):
        """The U of the low-rank model of the same law and width, for a transformer with frozen U."""
        if run.freeze != "U" or run.model == "low-rank":
            return {}
        twin = lambda other: other.model == "low-rank" and all(getattr(other, f) == getattr(run, f) for f in (
            "seed", "d_model", *SETTINGS))
        for runs, params, *_ in parts:
            for r, other in enumerate(runs):
                if twin(other):
                    return {"U": params["U"][r]}
        raise common.Stop("freeze=U takes U from a low-rank model: give --sweep model=low-rank,transformer first")

    parts, columns = train_groups(flags, folder, given)
    rows, grams, tokens = [], {}, {}
    for run, params, law in each_run(parts):
        e, U = context_vectors(run, params, law)
        likely = law["next"].argmax(1)
        centred = U - U.mean(0)
        off = cosines(centred, centred)[~torch.eye(len(U), dtype=bool)].view(len(U), -1)
        rows.append({"alignment": cosines(e, centred).gather(1, likely[:, None]).mean(), "opposite": off.amin(1).mean(),
                     "simplex_error": (off + 1 / (len(U) - 1)).square().mean().sqrt()})
        name = f"{run.model}, k={run.importance:g}"
        if (run.d_model, run.n_heads, run.freeze) == (flags.d_model, flags.n_heads, "") and name not in grams:
            e = e[likely.argsort(stable=True)]
            grams[name] = {"gram_U": U @ U.T, "gram_contexts": e @ e.T}
            if run.model == "transformer":
                h = (params["E"] + params["P"][:, None]).flatten(0, 1)
                tokens[name] = {"gram_tokens": h @ h.T}
    names = {"gram_name": np.array(list(grams))}
    return columns | common.stacked(rows) | common.stacked(list(grams.values())) | common.stacked(list(tokens.values())) | names


def compute_subspace(flags, folder):
    """As compute_levels, with distance [R] of the projectors onto span(U) and onto the top d directions of the centred
    log-probabilities, and gap [R] = 1 - s_{d+1} / s_d of their singular values: how well defined these directions are."""
    parts, columns = train_groups(flags, folder)
    rows = []
    for run, params, law in each_run(parts):
        L = law["next"].log()
        _, values, directions = torch.linalg.svd(L - L.mean(1, keepdim=True), full_matrices=False)
        rows.append({"distance": subspace_distance(params["U"], directions[:run.d_model].T),
                     "gap": 1 - values[run.d_model] / values[run.d_model - 1]})
    return columns | common.stacked(rows)


def compute_optimum(flags, folder):
    """As compute_levels, with the mean divergences [R] of: the Newton optimum given U, the trained vectors, the analytic w*,
    the least-squares truncation of the centred log-probabilities at rank d, and (transposed) the trained vectors read with
    the contexts' index mixed up, x1 + N x2."""
    parts, columns = train_groups(flags, folder)
    rows = []
    for run, params, law in each_run(parts):
        e, U = context_vectors(run, params, law)
        after, N, mean = law["next"], run.n_tokens, lambda f: (law["weight"] * log_mean_exp(f, law["next"])).sum()
        L = after.log() - after.log().mean(1, keepdim=True)
        value, lower, c = best_vectors(U, after)
        rows.append({"newton": (law["weight"] * value).sum(), "newton_gap": (law["weight"] * (value - lower)).sum(),
                     "trained": mean(e @ U.T), "w_star": mean(weighted_least_squares(U, after) @ U.T),
                     "least_squares": mean(truncation(L, run.d_model)),
                     "transposed": mean(e.view(N, N, -1).transpose(0, 1).flatten(0, 1) @ U.T)})
    return columns | common.stacked(rows)


def always(arrays, say, flags):
    """The claims that hold for every run."""
    finite = np.isfinite(arrays["loss"])
    sound, under = ((arrays[a] - arrays[b])[finite] for a, b in (("loss", "bound"), ("ceiling", "accuracy")))
    least = lambda x: f"least difference {min(x, default=math.nan):.2g} in {len(x)} runs"
    say("loss-above-bound", "no divergence lies below the certified bound of its own U", "convexity, weak duality", ">= 0",
        f"{least(sound)}, {(arrays['bound'][finite] > 0).sum()} bounds above 0", bool((sound > -1e-6).all()), True)
    say("accuracy-below-ceiling", "no accuracy lies above E[max pi_3]", "Bayes", ">= 0", least(under),
        bool((under > -1e-9).all()), True)


judged = functools.partial(common.judged, always=always, columns=COLUMNS)


@judged
def judge_dynamics(arrays, say, flags):
    B = flags.sampled or 16
    law, answer = (arrays["eval_loss"][:, pick(arrays, sampled=B, target=t, nb_3=1)] for t in ("divergence", "next-token"))
    gap = np.abs(law - answer).max(0)
    say("same-for-a-table", "of a look-up table, full divergence and next-token training are the same (an identity, checked)",
        f"{NOTES}: draws the two as different curves for nb = [40, 40, 1], where a context has one answer", "0 nats apart",
        gap, gap < 1e-6)
    law, answer = (by_seed(arrays, "loss", sampled=B, target=t, nb_3=4) for t in ("divergence", "next-token"))
    say("law-beats-draws", "with 4 answers a context, training on the law ends lower than on drawn answers",
        f"{NOTES}: full divergence against next token", "difference > 0", answer - law, answer > law)
    exact, drawn = (by_seed(arrays, "loss", sampled=b, target="divergence", nb_3=1, model="transformer") for b in (0, B))
    say("exact-beats-drawn", "after as many steps the exact expectation over contexts ends lower than drawn contexts",
        "this project", "difference > 0", drawn - exact, drawn > exact)
    low = by_seed(arrays, "loss", model="low-rank", nb_3=1).min()
    say("above-low-rank", "5 heads end far above the low-rank model of the same d", f'{NOTES}: "Optimal baseline"',
        f"> {10 * low:.2g}, ten times the trained low-rank loss (its infimum is 0)", exact, exact > 10 * low)


@judged
def judge_freeze(arrays, say, flags):
    for id, words, source, freeze, limit in (
            ("only-O-stores", "training W_O (and P) alone", f"{NOTES}: freezer (E, QKV, U)", "E+QKV+U", .1),
            ("O-is-dispensable", "training all but W_O", f"{NOTES}: freezer (O)", "O", .01),
            ("attention-stores", "training W_Q, W_K, W_V alone", "this project", "E+P+O+U", .1),
            ("scores-store", "training W_Q, W_K alone", "this project", "E+P+V+O+U", .5),
            ("values-store", "training W_V alone", "this project", "E+P+QK+O+U", .5),
            ("unembedding-stores", "training U alone", "this project", "E+P+QKV+O", .5)):
        left = by_seed(arrays, "loss", freeze=freeze) / by_seed(arrays, "uniform", freeze=freeze)
        say(id, f"{words} leaves less than {limit:.0%} of the uniform divergence", source, f"< {limit:g}", left, left < limit)


@judged
def judge_scaling(arrays, say, flags):
    base = dict(model="transformer", mlp_depth=1, **{f: getattr(flags, f) for f in SCALED})
    for field, words, low, high, more in (
            ("n_heads", "more heads", 1, 16, {}), ("d_model", "a wider stream", 2, 16, {}),
            ("d_head", "wider heads", 2, 16, {}), ("n_layers", "more layers", 1, 3, {}),
            ("d_mlp", "an MLP of width 64", 0, 64, {}), ("mlp_depth", "a deeper MLP", 1, 3, dict(d_mlp=16)),
            ("n_tokens", "fewer tokens", 50, 10, {}), ("alpha_1", "rarer contexts", 1., .6, {}),
            ("alpha_3", "sharper answers", .9, .3, {})):
        few, many = (by_seed(arrays, "loss", **base | more | {field: v}) for v in (low, high))
        say(f"scaling-{field.replace('_', '-')}", f"{words} ({field} {low} -> {high}) lower the divergence",
            f'{NOTES}, cell "Measuring different scaling laws"; the sentence is ours', "ratio > 1", few / many, few > many)


@judged
def judge_skips(arrays, say, flags):
    level = lambda *on: by_seed(arrays, "loss", **{name: name in on for name in SKIPS})
    for name, words in zip(SKIPS, ("the residual E[x2]", "positions in the scores", "tokens in the scores",
                                   "positions in the values", "tokens in the values")):
        ratio = level(name) / level()
        say(name.replace("_", "-"), f"without {words} the divergence is 10 % higher or more",
            f'{NOTES}, cell "Measuring the effect of different architectural modifications"; the sentence is ours', ">= 1.1",
            ratio, ratio >= 1.1)
    ratio = level("skip_pos_qk") / level()
    say("positions-hurt-scores", "without positions in the scores the divergence is less than half", "this project", "< 0.5",
        ratio, ratio < .5)
    seen = lambda *on: by_seed(arrays, "first_share", **{name: name in on for name in SKIPS})
    more = seen("skip_pos_qk") - seen()
    say("positions-blind", "without positions in the scores attention depends more on the first token", "this project",
        "share of variance: difference > 0", more, more > 0)


@judged
def judge_attention(arrays, say, flags):
    share = arrays["rank_one"].min(1)
    say("near-rank-one", "a head's map has one direction: 90 % of its energy over the first tokens that occur, mean taken out",
        f"{NOTES}: prints the singular values of the map; the threshold is ours", ">= 0.9 in every head", share, share >= .9)


@judged
def judge_heads(arrays, say, flags):
    total = arrays["contribution"].sum(1) + arrays["skip_logits"]
    error = np.abs(total - arrays["logits"]).max((1, 2))
    say("parts-sum", "residual plus all heads are the logits", "U is linear", "< 1e-9", error, bool((error < 1e-9).all()), True)
    signs = arrays["sign_agreement"]
    right = np.diagonal(signs, axis1=1, axis2=2)
    both = np.nanmean(np.where(np.isnan(right), np.nan, right == 1), 1)
    say("heads-raise-the-answer", "both heads raise the right answer, for most answers", f"{NOTES}: A*B > 0 and A > 0",
        "> 0.5 (independent signs: .25)", both, both > .5)
    same = np.nanmean(np.where(np.isnan(signs), np.nan, signs != 0), (1, 2))
    say("heads-agree", "over all answers and tokens two heads move a logit the same way more often than not",
        f"{NOTES}: A*B > 0", "> 0.5 (independent signs: .5)", same, same > .5)
    solo = np.stack([margin(c, a).max(0) for c, a in zip(arrays["contribution"], arrays["answer"])])
    group = np.stack([margin(t, a) for t, a in zip(total, arrays["answer"])])
    team = ((solo <= 0) & (group > 0)).mean(1)
    say("group-answers", "a tenth or more of the contexts are answered by the sum though by no head alone",
        f'{NOTES}: "solo" and "group"', ">= 0.1 of the contexts", team, team >= .1)


@judged
def judge_superposition(arrays, say, flags):
    H, d, N = flags.n_heads, flags.d_model, flags.n_tokens
    get = lambda key="loss", **fields: by_seed(arrays, key, **dict(freeze="", importance=0., n_heads=H, d_model=d) | fields)
    for model, field in (("low-rank", "d_model"), ("transformer", "n_heads")):
        for size, value in REFERENCE_KL[model].items():
            mine = get(model=model, **{field: size})
            say(f"{model}-{size}", f"{model}, {field}={size}: no more than 10 % above the prototype's {value}",
                "prototype, one seed", f"<= {1.1 * value:.3g}", mine, mine <= 1.1 * value)
    low, full, frozen = get(model="low-rank"), get(model="transformer"), get(model="transformer", freeze="U")
    say("reaches-low-rank", f"{H} heads reach the low-rank divergence of the same law within 5 %", "prototype: both .0215",
        "< 1.05", full / low, full < 1.05 * low)
    say("frozen-U", "a U frozen at the low-rank model's costs less than 10 %",
        f"{NOTES}: a line that freezes U at the low-rank W_U; the sentence is ours", "< 1.1",
        frozen / full, frozen < 1.1 * full)
    zero, short = (get(model="low-rank", d_model=width) for width in (N - 1, N - 2))
    say("full-rank-zero", "d = N - 1 reaches zero: softmax sees no more directions", "theory", "< 1e-4", zero, zero < 1e-4)
    say("one-less-is-short", "d = N - 2 does not reach zero", "this project", "> 1e-3", short, short > 1e-3)
    near = get("alignment", model="low-rank")
    say("aligned", "a context's vector points at its token: mean cosine above .7",
        f'{NOTES}: "the cosimilarity between the w_e(z) and the expected right w_u(g(z))"', "> 0.7", near, near > .7)
    off, pairs = get("simplex_error", model="low-rank", d_model=N - 1), get("opposite", model="low-rank", d_model=N // 2)
    say("simplex", "at d = N - 1 the rows of U form a simplex: all cosines near -1/(N-1)", TOY, "rms < 0.1", off, off < .1)
    say("antipodal", "at d = N/2 tokens share directions in antipodal pairs", TOY, "cosine < -0.95", pairs, pairs < -.95)


@judged
def judge_subspace(arrays, say, flags):
    d, N, seeds = flags.d_model, flags.n_tokens, np.unique(arrays["seed"])
    half = math.sqrt(2 * d * (1 - d / (N - 1))) / 2
    most = np.array([arrays["distance"][arrays["seed"] == s].max() for s in seeds])
    say("spans-leading", "U spans nearly the leading directions: every distance below half that of random subspaces",
        f'{NOTES}: "Distance between W_U and low rank log-prob"', f"< {half:.3g}", most, most < half)
    wide = arrays["dim"] > d
    level = lambda aligned, s: np.median(arrays["distance"][wide & pick(arrays, axis_aligned=aligned, seed=s)])
    ratio = np.array([level(True, s) / level(False, s) for s in seeds])
    say("alignment-matters", "laws of more than d dimensions are followed more closely where axis-aligned",
        f"{NOTES}: the two curves; the sentence is ours", "ratio < 1", ratio, ratio < 1)
    rank = lambda x: np.argsort(np.argsort(x))
    ranks = lambda s: [rank(arrays[k][wide & pick(arrays, seed=s)]) for k in ("gap", "distance")]
    order = np.array([np.corrcoef(*ranks(s))[0, 1] for s in seeds])
    say("gap-explains", "U strays where directions are ill defined: the smaller 1 - s_d+1 / s_d, the larger the distance",
        "perturbation theory (Davis & Kahan 1970)", "rank correlation < -0.5", order, order < -.5)


@judged
def judge_optimum(arrays, say, flags):
    newton, trained, star, least, mixed = (arrays[k] for k in VALUES)
    say("newton-certified", "the Newton optimum is certified", "weak duality", "gap < 1e-6", arrays["newton_gap"],
        bool((arrays["newton_gap"] < 1e-6).all()), True)
    say("order", "Newton <= trained <= analytic w* <= least squares", f"{NOTES}: real, th, least-square", "in every seed",
        "; ".join(f"{k} {common.spread(arrays[k])}" for k in list(VALUES)[:4]),
        (newton <= trained + 1e-6) & (trained <= star) & (star <= least))
    say("w-star-close", "the analytic w* is within 10 % of the optimum", f"{NOTES}: w_e", "< 1.1", star / newton,
        star < 1.1 * newton)
    say("index-mistake", "read with contexts x1 + N x2, the trained vectors are worse than uniform answers",
        f"{NOTES}: indexes contexts in both ways", "> 1", mixed / arrays["uniform"], mixed > arrays["uniform"])


@judged
def judge_capacity(arrays, say, flags):
    N = flags.n_tokens
    table = pick(arrays, model="transformer", d_mlp=0)
    d_head = np.minimum(np.where(arrays["d_head"] == 0, arrays["d_model"], arrays["d_head"]), arrays["d_model"])
    spare = (arrays["accuracy"] - theorem(arrays["n_tokens"], arrays["n_heads"] * d_head + arrays["d_model"]))[table]
    say("theorem", "training finds the H d_head + d associations that the theorem constructs (d_head <= d), in every run",
        PAPER, ">= 0 (accuracy)", f"least difference {spare.min():.3f} in {len(spare)} runs, {(spare < 0).sum()} below",
        bool((spare >= 0).all()))
    d, slope = slopes(arrays, flags)
    for width, value in PAPER_SLOPE.items():
        mine = slope[d == width][0]
        say(f"slope-{width}", f"at d={width} a head adds {value} of accuracy, within 10 %", f"{PAPER}, table", f"{value}", mine,
            np.abs(mine / value - 1) < .1)
    for H, value in PAPER_ACCURACY.items():
        mine = by_seed(arrays, "accuracy", n_tokens=N, d_model=10, d_head=0, d_mlp=0, n_heads=H)
        say(f"accuracy-{H}", f"d=10, H={H}: accuracy {value} within .03", f"{PAPER}, table", f"{value}", mine,
            np.abs(mine - value) < .03)
    more = (slope * N * N / (1 - 1 / N) / d[:, None]).min(0)
    say("more-than-d-head", "a head stores more than d_head associations at every d", f"{PAPER}: its bound is not tight",
        "> 1", more, more > 1)
    best = lambda d, slope: min((error, k) for k, (_, error) in fits(d, slope).items())[1]
    powers = np.array([best(d, row) for row in slope.T])
    exponent = np.polyfit(np.log(d), np.log(np.median(slope, 1)), 1)[0]
    theirs = best(np.array(list(PAPER_SLOPE)), np.array(list(PAPER_SLOPE.values())))
    say("cubic", "associations per head grow as d^3 (rather than d or d^2, each with a constant)", PAPER, "3",
        f"{', '.join(map(str, powers))} in {len(powers)} seeds, {theirs} in the paper's table; log-log exponent {exponent:.2f}",
        powers == 3)
    wide, own = (by_seed(arrays, "accuracy", n_tokens=N, d_model=10, n_heads=6, d_head=h) for h in (30, 0))
    say("d-head-saturates", "d=10, H=6: heads 30 wide store no more than 10 % more than heads as wide as the stream",
        "rank of W_Q W_K'", "< 1.1", wide / own, wide < 1.1 * own)
    for width in (7, 10, 13):
        heads_, mlps = (pick(arrays, n_tokens=70, d_model=width) & (arrays["n_heads"] == H) for H in (6, 0))
        mlps &= arrays["d_mlp"] == arrays["d_mlp"][mlps].max()
        ratio = arrays["accuracy"][mlps] / arrays["accuracy"][heads_]
        say(f"mlp-{width}", f"N=70, d={width}: an MLP stores more than six heads of the same size", f"{PAPER}: MLPs",
            "ratio > 1", ratio, ratio > 1)


STUDIES = {
    "dynamics": (compute_dynamics, judge_dynamics, {"dynamics": draw_dynamics}),
    "freeze": (compute_levels, judge_freeze, {"freeze": draw_levels}),
    "scaling": (compute_scaling, judge_scaling, {
        "scaling_model": draw_scaling(("n_heads", "d_model", "d_head", "n_layers"), "Divergence against the size of the model"),
        "scaling_law": draw_scaling(("n_tokens", "alpha_1", "alpha_3"), "Divergence against the law"),
        "scaling_mlp": draw_scaling(("d_mlp", "mlp_depth"), "Divergence with an MLP after attention")}),
    "skips": (compute_skips, judge_skips, {"skips": draw_levels, "first_token": draw_first_token}),
    "attention": (compute_attention, judge_attention, {"attention": draw_attention}),
    "heads": (compute_heads, judge_heads, {"heads": draw_heads}),
    "superposition": (compute_superposition, judge_superposition, {
        "superposition": or_levels(draw_superposition), "unembedding": draw_gram("U", "Directions of tokens: U U'"),
        "contexts": draw_gram("contexts", "Vectors of contexts, sorted by likely token: e e'"),
        "tokens": or_levels(draw_tokens)}),
    "subspace": (compute_subspace, judge_subspace, {"subspace": or_levels(draw_subspace)}),
    "optimum": (compute_optimum, judge_optimum, {"optimum": or_levels(draw_optimum)}),
    "capacity": (compute_levels, judge_capacity, {"capacity": or_levels(draw_capacity)}),
}


def main(argv=None):
    return common.main(Flags, STUDIES, argv)


if __name__ == "__main__":
    raise SystemExit(main())
