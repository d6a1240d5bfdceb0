"""What does an attention-only transformer store of an n-gram law, how much per head, and how do N tokens
share d directions?

Law: tokens x1 ~ pi_1 and x2 ~ pi_2(. | x1) are drawn; the model answers with a distribution of the next,
pi_3(. | x1, x2). Loss: the exact sum over contexts of pi_1 pi_2 KL(pi_3 || model) in nats; log N - H(pi)
for uniform answers. Model: attention reads E[x] + P, residual stream E[x2] + sum of heads, logits =
residual U^T; low-rank: a free vector for each context, logits = C U^T. With two tokens attention is one
sigmoid per head and pair: a step of one layer works on tables of tokens and forms no sequence.

    python exp_ngram_superposition.py                          60 to 90 s: how fast is a law learned?
    python exp_ngram_superposition.py --study freeze           2 minutes: which parts hold the memory?
    python exp_ngram_superposition.py --study superposition    6 minutes: how do tokens share room?

Claims quote research notes, an n-gram notebook, and the paper whose experiments these are: Dana, Pydi &
Chevaleyre, "Memorization in Attention-only Transformers" (2024)."""
import functools
import math
from dataclasses import dataclass
from dataclasses import replace
from itertools import combinations
from itertools import product
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch.func import grad_and_value
from torch.nn.functional import cosine_similarity
from torch.nn.functional import one_hot
from torch.nn.functional import pad

import common
from common import flag

# ==== Flags ==========================================================================================
number = functools.partial(flag, number=True)  # runs that differ in these share a program


@dataclass
class Flags(common.Flags):
    steps: int = flag(1500, "training steps", 1)
    runs: int = flag(3, "seeds per configuration", 1)
    law: Literal["power_unif", "last_position", "gen_d", "almost_rank_d"] = flag(
        "power_unif", "the data law")
    law_seed: int = number(-1, "seed of the law (-1: each run draws its own)", -1, 2 ** 31)
    n_tokens: int = flag(100, "N, number of tokens", 2, 400)
    alpha_1: float = number(1., "power_unif: decay of first tokens' probabilities", .5, 1)
    alpha_2: float = number(1., "power_unif: of second tokens'", .5, 1)
    alpha_3: float = number(1., "power_unif: of answers'", .2, 1)
    nb_1: int = flag(0, "power_unif: first tokens that occur (0: all)", 0)
    nb_2: int = flag(0, "power_unif: second tokens that follow each first (0: all)", 0)
    nb_3: int = number(1, "power_unif: answers of each context (0: all; 1: a table)", 0)
    importance: float = number(0., "last_position: k in likely tokens' weights (1 - i/N)^k", 0)
    likely: float = number(.95, "last_position: probability of the likely token", 0, 1)
    dim: int = number(5, "gen_d, almost_rank_d: dimensions of the log-probabilities", 1)
    axis_aligned: bool = number(False, "gen_d, almost_rank_d: these are tokens")
    eig_high: float = number(10., "almost_rank_d: the first `dim` singular values", 0, 300)
    eig_low: float = number(1., "almost_rank_d: the other singular values", 0, 300)
    model: Literal["transformer", "low-rank"] = flag("transformer", "low-rank: a vector each context")
    d_model: int = flag(10, "d, width of the residual stream", 1)
    n_heads: int = flag(5, "H, parallel heads of a layer (0: none)", 0)
    d_head: int = flag(0, "width of a head (0: d_model)", 0)
    n_layers: int = flag(1, "layers", 1, 8)
    d_mlp: int = flag(0, "width of a ReLU MLP; without heads it reads both tokens (0: none)", 0)
    skip_residual: bool = number(False, "leave E[x2] out of the residual stream")
    skip_pos_qk: bool = number(False, "leave positions out of the scores")
    skip_tok_qk: bool = number(False, "leave tokens out of the scores")
    skip_pos_ov: bool = number(False, "leave positions out of the values")
    skip_tok_ov: bool = number(False, "leave tokens out of the values")
    freeze_e: bool = number(False, "E and P keep their initial values")
    freeze_qkv: bool = number(False, "W_Q, W_K and W_V keep them")
    freeze_o: bool = number(False, "W_O keeps them")
    freeze_u: bool = number(False, "U keeps them")
    sampled: int = flag(0, "contexts drawn a step (0: the exact expectation over all)", 0)
    next_token: bool = number(False, "learn one drawn answer of a context, not its law")
    lr: float = number(1e-2, "learning rate of Adam", 0)

    def check(self):
        for name in "nb_1", "nb_2", "nb_3":
            if getattr(self, name) > self.n_tokens:
                raise common.Stop(f"{common.option(name)} must be at most --n-tokens {self.n_tokens}")
        if self.next_token and not self.sampled:
            raise common.Stop("--next-token draws answers: give --sampled, the contexts a step")

    @property
    def head_width(self):
        return self.d_head or self.d_model


OWN = [*common.fields_of(Flags)][len(common.fields_of(common.Flags)):]  # this script's own flags

# ==== Data law =======================================================================================
# A law is pi_1 [N], pi_2 [N, N], pi_3 [N, N, N], float64, the last axis the next token. In every
# flattened table the context (x1, x2) is number x1 * N + x2.
def power_unif_law(flags, generator):
    """At level i probabilities alpha_i^j / Z, j < nb_i, in an order drawn for each context; other tokens
    never come. alpha_3 = 1 and nb_3 = 1 is a random look-up table."""
    N, pi = flags.n_tokens, []
    levels = (flags.alpha_1, flags.nb_1), (flags.alpha_2, flags.nb_2), (flags.alpha_3, flags.nb_3)
    for i, (alpha, n) in enumerate(levels, 1):
        v = alpha ** torch.arange(N).double() * (torch.arange(N) < (n or N))
        order = torch.rand([N] * i, generator=generator).argsort(dim=-1, stable=True)
        pi.append((v / v.sum())[order])
    return pi


def uniform_pairs(after):
    """The law with independent uniform x1, x2 and pi_3 = after [N^2, N]."""
    N = after.shape[1]
    uniform = torch.ones(N, N).double() / N
    return [uniform[0], uniform, after.view(N, N, N)]


def last_position_law(flags, generator):
    """Each context has one likely token i, drawn with weights (1 - i/N)^k, k the importance."""
    N, p = flags.n_tokens, flags.likely
    weights = (1 - torch.arange(N) / N) ** flags.importance
    likely = torch.multinomial(weights, N * N, replacement=True, generator=generator)
    after = torch.ones(N * N, N).double() * (1 - p) / (N - 1)
    after[torch.arange(N * N), likely] = p
    return uniform_pairs(after)


def gen_d_law(flags, generator):
    """pi_3 = softmax(0.1 W z), z ~ N(0, I_dim) for each context, W [N, dim] the first columns of the
    identity, or of a Gaussian matrix."""
    N = flags.n_tokens
    W = torch.eye(N) if flags.axis_aligned else torch.randn(N, N, generator=generator)
    W = W[:, :flags.dim].double()
    z = torch.randn(N * N, W.shape[1], generator=generator).double()
    return uniform_pairs((.1 * z @ W.T).softmax(-1))


def almost_rank_d_law(flags, generator):
    """pi_3 = softmax of an [N^2, N] matrix with random singular vectors (on the token side the axes, if
    aligned) and singular values eig_high (the first dim) and eig_low (the others)."""
    def orthogonal(*shape):
        return torch.linalg.qr(torch.randn(shape, generator=generator).double())[0]
    N = flags.n_tokens
    right = torch.eye(N).double() if flags.axis_aligned else orthogonal(N, N)
    values = torch.ones(N).double() * flags.eig_low
    values[:flags.dim] = flags.eig_high
    return uniform_pairs((orthogonal(N * N, N) * values @ right.T).softmax(-1))


LAWS = dict(power_unif=power_unif_law, last_position=last_position_law, gen_d=gen_d_law,
            almost_rank_d=almost_rank_d_law)
LAW = OWN[OWN.index("law"):OWN.index("model")]  # what a law depends on, beside its seed


def law_key(flags):
    seed = flags.seed if flags.law_seed < 0 else flags.law_seed
    return seed, *(getattr(flags, name) for name in LAW)


@functools.lru_cache(4)
def law_of(key):
    """[pi_1, pi_2, pi_3] of a `law_key`."""
    flags = SimpleNamespace(**dict(zip(LAW, key[1:])))
    return LAWS[flags.law](flags, common.generator(key[0], "law"))


def entropy(p):
    """Of the distributions p [..., N], in nats."""
    return -torch.special.xlogy(p, p).sum(-1)


def constants(flags, dtype=torch.float32):
    """The law of one run, as its step and evaluation read it. Of the contexts that occur: their tokens
    x1, x2, weight, entropy [C]; after [N, C], what follows them. With --sampled: below [C], how many of
    the 2^32 hashes draw a context up to this one; sums [C, N], running sums of `after`, and
    rows [C, N], its transpose, where fewer are drawn."""
    pi_1, pi_2, pi_3 = law_of(law_key(flags))
    weight = pi_1[:, None] * pi_2
    x1, x2 = weight.nonzero().T
    weight, rows = weight[x1, x2], pi_3[x1, x2]
    found = {"weight": weight, "entropy": entropy(rows), "after": rows.T.contiguous()}
    if flags.sampled:
        sums = rows.cumsum(1)
        found["sums"] = torch.where(sums > 1 - 1e-9, 2., sums)
        if len(rows) > flags.sampled:
            found["rows"] = rows
    found = {k: x.to(dtype) for k, x in found.items()} | {"x1": x1, "x2": x2}
    if flags.sampled:
        found["below"] = (weight.cumsum(0) / weight.sum() * 2 ** 32).round().long()
    return found


def number_of(run, dtype=torch.float64):
    """The flags that are numbers and the law of one run, as the functions below read them."""
    return common.run_of(common.numbers([run], lambda run: constants(run, dtype)), 0)


def drawn(flags, number, t):
    """What a step sees, with the keys of `constants`: --sampled contexts that are drawn with their
    weights, each with its law or, for --next-token, with one answer (which has no entropy). Where no
    more contexts occur than are drawn: each once, weighted by how often it was drawn."""
    hashes = common.hashes(common.key(number["seed"], 0, t), flags.sampled)
    u = common.uniform(common.key(number["seed"], 1, t), flags.sampled)
    at = torch.searchsorted(number["below"], hashes, right=True)
    answer = torch.searchsorted(number["sums"][at], u[:, None], right=True)[:, 0]
    H, (C, N) = number["entropy"] * ~number["next_token"], number["sums"].shape
    if C <= flags.sampled:  # integers: a card may add them in any order
        counts = at.new_zeros(C * N).scatter_add(0, answer * C + at, torch.ones_like(at))
        counts = counts.view(N, C)
        often = counts.sum(0)
        answers = counts / often.clamp(1)
        return number | {"after": torch.where(number["next_token"], answers, number["after"]),
                         "weight": often / flags.sampled, "entropy": H}
    after = torch.where(number["next_token"], one_hot(answer, N), number["rows"][at])
    return number | {"after": after.T.contiguous(), "weight": torch.full_like(u, 1 / flags.sampled),
                     "entropy": H[at], "x1": number["x1"][at], "x2": number["x2"][at]}


def divergence(logits, number):
    """Mean KL(after || softmax of logits [N, C]) in nats, over contexts with their weights."""
    cross_entropy = torch.logsumexp(logits, 0) - (number["after"] * logits).sum(0)
    return (number["weight"] * (cross_entropy - number["entropy"])).sum()

# ==== Model ==========================================================================================
def init(flags, generator):
    """Parameters of one run: E [N, d], P [2, d], U [N, d]; W_Q, W_K, W_V [H, d, d_head], W_O [H, d_head,
    d]; W_in, b_in, W_out of an MLP; of more layers with a leading axis. Low-rank: C [N^2, d], U. Uniform
    within a bound of 1 / sqrt(inputs), as nn.Linear has it."""
    N, d, H, width, m = flags.n_tokens, flags.d_model, flags.n_heads, flags.head_width, flags.d_mlp
    layers, read = [flags.n_layers] * (flags.n_layers > 1), d if H else 2 * d
    shapes, bounds = {"E": (N, d), "P": (2, d), "U": (N, d)}, {}
    if H:
        shapes |= {name: (*layers, H, d, width) for name in ("W_Q", "W_K", "W_V")}
        shapes["W_O"] = *layers, H, width, d
        bounds |= dict.fromkeys(("W_Q", "W_K", "W_V"), (1.5 / d) ** .5)
    if m:
        shapes |= {"W_in": (*layers, read, m), "b_in": (*layers, m), "W_out": (*layers, m, d)}
        bounds |= {"W_in": read ** -.5, "b_in": read ** -.5, "W_out": m ** -.5}
    if flags.model == "low-rank":
        shapes = {"C": (N * N, d), "U": (N, d)}
    return {name: (2 * torch.rand(shape, generator=generator) - 1) * bounds.get(name, d ** -.5)
            for name, shape in shapes.items()}


def reads(x, P, number):
    """What attention reads for scores and for values: tokens plus positions, each unless skipped."""
    return (~number["skip_tok_qk"] * x + ~number["skip_pos_qk"] * P,
            ~number["skip_tok_ov"] * x + ~number["skip_pos_ov"] * P)


def mlp(params, x):
    return torch.relu(x @ params["W_in"] + params["b_in"]) @ params["W_out"]


def stream(flags, params, tokens, number):
    """The textbook model: residual stream [B, T, d] of tokens [B, T]. Without heads the MLP reads the
    first token and its own. P needs a row for each position."""
    T, x = tokens.shape[1], look_up(params["E"].T, tokens.flatten()).T.unflatten(0, tokens.shape)
    future = torch.ones(T, T, dtype=torch.bool, device=tokens.device).triu(1)
    for layer in range(flags.n_layers):
        own = {k: p[layer] for k, p in params.items() if "_" in k} if flags.n_layers > 1 else params
        qk, ov = reads(x, params["P"][:T], number)
        x = ~number["skip_residual"] * x
        if flags.n_heads:
            q, k, v = qk[:, None] @ own["W_Q"], qk[:, None] @ own["W_K"], ov[:, None] @ own["W_V"]
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)  # [B, H, T, T]
            x = x + (scores.softmax(-1) @ v @ own["W_O"]).sum(1)
        if flags.d_mlp:
            x = x + mlp(own, x if flags.n_heads else torch.cat([ov[:, :1].expand_as(ov), ov], -1))
    return x


def forward(flags, params, tokens, number):
    """Logits [B, T, N] of tokens [B, T]; number: what `common.numbers` finds of one run."""
    return stream(flags, params, tokens, number) @ params["U"].T


def times(a, b):
    """a @ b; small ones as sums, which the compiler puts into its loops: a library call takes longer."""
    if a.shape[-2] * a.shape[-1] * b.shape[-1] > 2 ** 13:
        return a @ b
    return (a[..., None] * b[..., None, :, :]).sum(-2)


def look_up(table, *index):
    """Entries of a table [..., N] at one index [C], or of [..., N, N] at two. On a card by products with
    one-hot columns, since the gradient of a gather adds there in any order."""
    if table.device.type == "cpu":
        return table[(..., *index)]
    tokens = torch.arange(table.shape[-1], device=table.device)[:, None]
    *first, last = ((tokens == i).to(table.dtype) for i in index)
    return (table @ last * first[0]).sum(-2) if first else table @ last


def heads(params, number, pair=None):
    """One layer at position 1: attention to the first token [H, ...] and each head's output [H, d, ...]
    for all pairs of tokens [N, N], or for `pair`, x1 and x2 [C]. With two tokens attention is a sigmoid
    of the difference of two scores; scores and values are tables over tokens, never sequences."""
    qk, ov = reads(params["E"], params["P"][:2, None], number)  # [2, N, d]
    k, q = times(qk[:, None], params["W_K"]), times(qk[1], params["W_Q"])  # [2, H, N, d_head], [H, ..]
    score = (times(k[0], q.mT) - (k[1] * q).sum(-1)[:, None]) / math.sqrt(q.shape[-1])  # [H, x1, x2]
    v0, v1 = times(ov[:, None], times(params["W_V"], params["W_O"])).mT  # [H, d, N]
    if pair:
        score, v0, v1 = look_up(score, *pair), look_up(v0, pair[0]), look_up(v1, pair[1])
    else:
        v0, v1 = v0[..., :, None], v1[..., None, :]
    attention = torch.sigmoid(score)
    return attention, v1 + attention[:, None] * (v0 - v1)


def residual(flags, params, number):
    """Residual stream before U at position 1, for the contexts in `number`: [d, C], that of `stream`."""
    pair = number["x1"], number["x2"]
    everything = len(pair[0]) == flags.n_tokens ** 2  # then they are in order
    if flags.model == "low-rank":
        table = params["C"].T
        return table if everything else look_up(table, pair[0] * flags.n_tokens + pair[1])
    if flags.n_layers > 1 or not flags.n_heads:
        return stream(flags, params, torch.stack(pair, 1), number)[:, 1].T
    pair = None if everything else pair
    own = ~number["skip_residual"] * params["E"].T
    own = look_up(own, pair[1]) if pair else own[:, None]
    x = (heads(params, number, pair)[1].sum(0) + own).flatten(1)
    return x + mlp(params, x.T).T if flags.d_mlp else x


def logits_of(flags, params, number):
    """Logits [N, C] of the contexts in `number`, exactly those of `forward`."""
    return times(params["U"], residual(flags, params, number))

# ==== Train ==========================================================================================
FREEZERS = {"E": "freeze_e", "P": "freeze_e", "W_Q": "freeze_qkv", "W_K": "freeze_qkv",
            "W_V": "freeze_qkv", "W_O": "freeze_o", "U": "freeze_u"}  # by parameter


def start(run):
    params = init(run, common.generator(run.seed, "init"))
    return {"params": params, **common.adam_init(params)}


def step_of(flags):
    """The training step of ONE run."""
    def step(state, number):
        seen = drawn(flags, number, state["t"]) if flags.sampled else number
        loss_at = lambda params: divergence(logits_of(flags, params, seen), seen)
        grads, loss = grad_and_value(loss_at)(state["params"])
        for name in grads.keys() & FREEZERS.keys():
            grads[name] = grads[name] * ~number[FREEZERS[name]]
        params, optimiser = common.adamw(state["params"], grads, state, number["lr"])
        return {"params": params, **optimiser}, {"loss": loss}
    return step


def evaluate_of(flags):
    """What is evaluated of ONE run, exactly, over all contexts of its law: divergence in nats, accuracy;
    what uniform answers would have, log N - H(pi); and the best accuracy, E[max pi_3]."""
    def evaluate(params, number):
        logits, mean = logits_of(flags, params, number), lambda x: (number["weight"] * x).sum()
        right = number["after"].gather(0, logits.argmax(0, keepdim=True))[0]
        return {"loss": divergence(logits, number), "accuracy": mean(right),
                "uniform": mean(math.log(flags.n_tokens) - number["entropy"]),
                "ceiling": mean(number["after"].amax(0))}
    return evaluate


def pace(loss):
    """By which share training twice as long would lower loss [T, R], at the pace of its last fifth;
    a loss below 1e-4 nats is at its end; one that would double or more counts as -1."""
    last = np.arange(4 * len(loss) // 5, len(loss))
    x = np.log(last + 1)
    x -= x.mean()
    slope = x @ np.log(np.maximum(loss[last], 1e-4)) / (x @ x)
    return np.maximum(1 - 2. ** slope, -1)


def train(flags, folder, start=start):
    """Train a study. Returns arrays with one entry a run: all settings, head_width; loss, accuracy,
    uniform, ceiling of `evaluate_of`, in float64; parameters (how many), falling (see `pace`), and what
    the study's `measure` finds of a run, its parameters, its numbers and law. Also eval_step [M],
    eval_loss, eval_accuracy [M, R]. Parameters [R, ...] and laws pi1, pi2, pi3 [L, ...] with law_index
    [R] are here too, or where shapes differ in group*/arrays.npz."""
    trained = common.train(common.groups_of_runs(flags), folder, start, step_of, evaluate_of, constants)
    rows, arrays = [], {"eval_step": trained[0].metrics["eval_step"]}
    for k in "eval_loss", "eval_accuracy":
        arrays[k] = np.concatenate([t.metrics[k] for t in trained], 1)
    for i, t in enumerate(trained):
        keys = [law_key(run) for run in t.runs]
        laws = [*dict.fromkeys(keys)]
        kept = {f"pi{k + 1}": torch.stack([law_of(key)[k] for key in laws]) for k in range(3)}
        kept |= t.params | {"law_index": torch.tensor([laws.index(key) for key in keys])}
        if len(trained) == 1:
            arrays |= kept
        else:
            common.write(folder / f"group{i}" / "arrays.npz", kept)
        for r, (run, falling) in enumerate(zip(t.runs, pace(t.metrics["loss"]))):
            params = {k: p[r].double().nan_to_num() for k, p in t.params.items()}
            number = number_of(run)
            row = evaluate_of(run)(params, number)
            if np.isnan(falling):  # diverged, or stopped before its end
                row |= {"loss": math.nan, "accuracy": math.nan}
            rows.append({name: getattr(run, name) for name in ("seed", "head_width", *OWN)} | row
                        | flags.room.measure(run, params, number)
                        | {"falling": falling, "parameters": sum(p.numel() for p in params.values())})
    return arrays | {k: np.stack([np.asarray(row[k]) for row in rows]) for k in rows[0]}

# ==== What several studies share =====================================================================
BLUE, RED, GREEN, PINK, ORANGE = common.COLOURS[:5]


def pick(arrays, **fields):
    """Mask [R] over the runs whose settings have these values."""
    return np.logical_and.reduce([arrays[k] == value for k, value in fields.items()])


def labels(arrays):
    """Each run's configuration in words [R]: the settings that vary."""
    words = np.full(len(arrays["seed"]), "", object)
    for k in OWN:
        if len({*arrays[k].tolist()}) > 1:
            name = " " if arrays[k].dtype.kind == "U" else f" {k}="
            words += [{"True": f" {k}", "False": ""}.get(f"{x}", f"{name}{x}") for x in arrays[k]]
    words[words == ""] = "none"
    return words


def finish(ax, xlabel, ylabel="divergence (nats)", title="", log="", **axes):
    """Name the axes, make those in `log` logarithmic, show a legend."""
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, **{f"{x}scale": "log" for x in log}, **axes)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=6.5)


def strip(ax, arrays, x, y, name, colour, style="-", **fields):
    """A dot for each run with these fields, hollow where its loss is still falling, and a line through
    the medians over runs."""
    mine = pick(arrays, **fields) & np.isfinite(arrays[y])
    if not mine.any():
        return
    at, value, falling = (arrays[k][mine] for k in (x, y, "falling"))
    ax.scatter(at, value, 9, np.where(falling > .05, "none", colour), edgecolors=colour)
    places = np.unique(at)
    ax.plot(places, [np.median(value[at == x]) for x in places], style, color=colour, label=name)


def in_order(ax, arrays):
    """The place of each run [R] on an axis of configurations, sorted by their least divergence."""
    words = labels(arrays)
    level = {name: np.sort(arrays["loss"][words == name])[0] for name in words}
    names = sorted(level, key=level.get)
    ax.set_xticks(range(len(names)), names, rotation=90)
    return np.array([names.index(name) for name in words])


def draw_levels(arrays, flags, title):
    """The final divergence of every configuration."""
    figure, (ax,) = common.panels(1, title, flags, size=(8, 6))
    arrays = arrays | {"place": in_order(ax, arrays)}
    strip(ax, arrays, "place", "loss", "median of runs (hollow: still falling)", BLUE, "_")
    common.shelf(ax, np.nanmean(arrays["uniform"]), "answers uniformly: log N - H", "left")
    finish(ax, "", f"divergence after {flags.steps} steps (nats)", log="y")
    return figure


def moments(p, U):
    """Mean [C, d] and covariance U^T (diag(p) - p p^T) U [C, d, d] of U's rows under each row of p."""
    mean = p @ U
    second = torch.einsum("cn,ni,nj->cij", p, U, U)
    return mean, second - mean[:, :, None] * mean[:, None]


def best_vectors(U, after, iterations=40):
    """The best that any encoder of contexts can do with U [N, d] on rows `after` [C, N]: min over c of
    KL(after || softmax(U c)), convex in c, by damped Newton. Returns (divergence reached [C], certified
    lower bound [C]).

    The bound is weak duality: a divergence is at least H(q) - H(after) for every distribution q with
    U^T q = U^T after. The Newton step D gives such a q to first order: softmax(U c)_x (1 + (u_x - mean
    u) D); it counts where it is nonnegative, else 0 does. (A table's infimum may be 0, at infinity.)"""
    c, H = torch.zeros(len(after), U.shape[1], dtype=U.dtype), entropy(after)
    def value(c):
        logits = c @ U.T
        return torch.logsumexp(logits, 1) - (after * logits).sum(1) - H
    def newton(c):
        q = (c @ U.T).softmax(1)
        mean, covariance = moments(q, U)
        ridge = (1e-15 * (U * U).sum() + 1e-30) * torch.eye(U.shape[1])
        return q, mean, torch.linalg.solve(covariance + ridge, (after - q) @ U)
    f = value(c)
    for _ in range(iterations):
        q, _, step = newton(c)
        slope, rate = ((after - q) @ U * step).sum(1), torch.ones_like(f)
        moved = lambda: c + rate[:, None] * step
        for _ in range(30):
            worse = ~(value(moved()) <= f - 1e-4 * rate * slope)
            rate = torch.where(worse, rate / 2, rate)
        new = value(moved())
        c = torch.where((new < f)[:, None], moved(), c)
        f = torch.fmin(new, f)
    q, mean, step = newton(c)
    dual = q * (1 + step @ U.T - (mean * step).sum(1, keepdim=True))
    sound = (dual >= 0).all(1) & (((dual - after) @ U).abs().amax(1) < 1e-9)
    lower = torch.where(sound, entropy(dual.clamp(min=0)) - H, 0.).clamp(min=0)
    return f, lower


def centred_log(number):
    """Log-probabilities [C, N] of a law without zeros, their mean over tokens taken out."""
    L = number["after"].T.log()
    return L - L.mean(1, keepdim=True)


def without_zeros(flags):
    """Stop unless the law has logarithms, and d dimensions or more but fewer than tokens."""
    run = common.groups_of_runs(flags)[0][0]
    enough = run.d_model <= run.dim <= run.n_tokens > run.d_model
    if run.law not in ("gen_d", "almost_rank_d") or not enough:
        raise common.Stop(f"--study {flags.study} takes --law gen_d or almost_rank_d, --d-model below "
                          "--n-tokens, and --dim from --d-model to --n-tokens")


def attention_only(flags):
    """Stop unless every run is one layer of attention, of one shape."""
    (run, *_), *others = common.groups_of_runs(flags)
    if (run.model, run.n_layers, run.d_mlp) != ("transformer", 1, 0) or not run.n_heads:
        raise common.Stop(f"--study {flags.study} takes apart attention only: --n-layers 1 --d-mlp 0")
    if others:
        raise common.Stop(f"--study {flags.study} compares runs of one shape: sweep lr, alpha_1, ..")


def settled(arrays, say):
    say("settled", "three quarters of the runs have settled: at the pace of their last fifth, as many "
        "steps again change the loss by under 5 %", "this project", np.abs(arrays["falling"]), "<", .05)

# ==== Studies ========================================================================================
class Study(common.Study):
    """What they have in common."""
    smoke = dict(steps=10, runs=2, n_tokens=8, d_model=3, n_heads=2, evals=2, nb_1=0, nb_2=0)
    compute = train

    def measure(run, params, number):
        """More of a run, for `arrays`."""
        return {}


class Dynamics(Study):
    """How fast is an n-gram law learned, from its probabilities or from draws?

    arrays: as of `train`."""
    defaults = dict(nb_1=40, nb_2=40, sampled=1024, steps=500)
    smoke = Study.smoke | dict(sampled=16)

    def points(flags):
        ways = (("transformer", 0, False), ("low-rank", 0, False), ("transformer", flags.sampled, False),
                ("transformer", flags.sampled, True))
        kinds = (1, 4) if flags.law == "power_unif" else (flags.nb_3,)
        return [dict(model=model, sampled=sampled, next_token=next_token, nb_3=nb_3)
                for model, sampled, next_token in ways for nb_3 in kinds]

    def claims(arrays, say):
        def of(key, nb_3, sampled=1024, next_token=False, model="transformer"):
            return arrays[key][..., pick(arrays, nb_3=nb_3, sampled=sampled, next_token=next_token,
                                         model=model)]
        apart = np.abs(of("eval_loss", 1) - of("eval_loss", 1, next_token=True)).max(0)
        say("same-for-a-table", "on a look-up table, full divergence and next-token training are one "
            "(an identity, checked; largest difference in nats)", "notes: draws them as two curves for "
            "nb = [40, 40, 1], where a context has one answer", apart, "<", 1e-6)
        say("law-beats-draws", "with 4 answers a context, training on the law ends lower than on "
            "drawn answers (ratio after 500 steps)", "notes: full divergence against next token",
            of("loss", 4) / of("loss", 4, next_token=True), "<", 1)
        exact, low = of("loss", 1, 0), of("loss", 1, 0, model="low-rank")
        say("exact-beats-drawn", "the exact expectation over contexts ends lower than drawn contexts "
            "(ratio after 500 steps)", "this project", exact / of("loss", 1), "<", 1)
        say("above-low-rank", "5 heads end above ten times the low-rank model of the same width (ratio "
            "after 500 steps; its infimum is 0)", "notes: optimal baseline", exact / low, ">", 10)

    def draw_dynamics(arrays, flags):
        kinds, words = np.unique(arrays["nb_3"]), labels(arrays | {"nb_3": 0 * arrays["nb_3"]})
        figure, axes = common.panels(2 * len(kinds), "How fast is an n-gram law learned, from its "
                                     "probabilities or from draws?", flags)
        for nb_3, loss, accuracy in zip(kinds, axes[::2], axes[1::2]):
            mine = pick(arrays, nb_3=nb_3)
            common.shelf(loss, arrays["uniform"][mine].mean(), "answers uniformly: log N - H")
            common.shelf(accuracy, 1 / flags.n_tokens, "chance 1/N")
            common.shelf(accuracy, arrays["ceiling"][mine].mean(), "ceiling E[max pi_3]")
            for ax, key, unit in (loss, "loss", "divergence (nats)"), (accuracy, "accuracy", "accuracy"):
                for name, colour in zip(dict.fromkeys(words), common.COLOURS * 2):
                    common.band(ax, arrays["eval_step"],
                                arrays[f"eval_{key}"][:, mine & (words == name)], name, colour)
                finish(ax, "step", unit, f"{flags.law}, answers per context: {nb_3}", xscale="symlog")
        return figure


class Freeze(Study):
    """Which parts of the model hold the memory: what is lost when they keep their initial values?

    arrays: as of `train`."""
    defaults = dict(n_tokens=10, d_model=5, n_heads=20, steps=20000)

    def frozen(*names):
        return {f"freeze_{part}": part in names for part in ("e", "qkv", "o", "u")}

    def points(flags):
        parts = "e", "qkv", "o", "u"
        return [Freeze.frozen(*c) for n in range(4) for c in combinations(parts, n)]

    def claims(arrays, say):
        for id, source, words, limit, *names in (
                ("only-O-stores", "notes: freezer (E, QKV, U)", "W_O alone", .1, "e", "qkv", "u"),
                ("O-is-dispensable", "notes: freezer (O)", "all but W_O", .01, "o"),
                ("attention-stores", "this project", "W_Q, W_K, W_V alone", .1, "e", "o", "u")):
            mine = pick(arrays, **Freeze.frozen(*names))
            share = arrays["loss"][mine] / arrays["uniform"][mine]
            undecided = (share > limit) & (share * (1 - arrays["falling"][mine]) < limit)
            say(id, f"training {words} leaves under {limit:.0%} of the uniform loss (20,000 steps; "
                "no vote if 40,000 could tell)", source, np.where(undecided, np.nan, share), "<", limit)
        settled(arrays, say)

    def draw_freeze(arrays, flags):
        return draw_levels(arrays, flags, "Which parts hold the memory? Divergence with these frozen")


class Scaling(Study):
    """How does the divergence scale with each size of the model and of the law?

    arrays: as of `train`. summary.csv is the table, baselines included; as in the notes alpha_1 is also
    alpha_2."""
    defaults = dict(n_tokens=30, d_model=8, n_heads=4, alpha_1=.9, alpha_2=.9, alpha_3=.6, nb_3=0)
    # one after the other; numbers of heads and their widths also in `split`
    sizes = dict(n_heads=(16,), d_model=(2, 4, 8, 16), d_head=(16,), n_layers=(1, 2, 3),
                 n_tokens=(10, 20, 30, 50), alpha_1=(.6, .9, 1.), alpha_3=(.3, .6, .9), d_mlp=(16, 64))
    of_law = "d_model", "n_tokens", "alpha_1", "alpha_3"  # what the low-rank model depends on

    def base(flags, **other):
        return {k: getattr(flags, k) for k in Scaling.sizes} | dict(model="transformer") | other

    def split(flags, heads, layers):
        """Attention layers side by side, each with d^2 numbers a matrix, in so many heads."""
        width = flags.d_model // heads if heads > 1 else 0
        return Scaling.base(flags, n_heads=heads * layers, d_head=width)

    def points(flags):
        points = [Scaling.base(flags, **{k: v}) for k, values in Scaling.sizes.items() for v in values]
        points += [Scaling.split(flags, *pair) for pair in product((1, 2, 4), (1, 2, 4, 8))]
        points += [Scaling.base(flags, **{k: v}, model="low-rank") for k in Scaling.of_law
                   for v in Scaling.sizes[k]]
        points = [p | dict(alpha_2=p["alpha_1"]) for p in points]
        return points[::11] if flags.smoke else points

    def claims(arrays, say):
        flags = Flags(**Scaling.defaults)
        def loss(fields):
            return arrays["loss"][pick(arrays, **fields)]
        for field, low, high in (
                ("n_heads", 1, 16), ("d_model", 2, 16), ("d_head", 2, 16), ("n_layers", 1, 3),
                ("d_mlp", 0, 64), ("n_tokens", 50, 10), ("alpha_1", 1., .6), ("alpha_3", .9, .3)):
            few, many = (loss(Scaling.base(flags, **{field: v})) for v in (low, high))
            say(f"scaling-{field}", f"{field} {low} -> {high} lowers the divergence (at 1,500 steps)",
                "notes: measuring different scaling laws; the sentence is ours", many / few, "<", 1)
        one, two = ([loss(Scaling.split(flags, heads, n)) for n in (1, 2, 4, 8)] for heads in (1, 2))
        say("split-heads", "with as many parameters, heads as wide as the stream end lower than twice "
            "as many half as wide (1,500 steps; ratio, geometric mean over 1, 2, 4, 8 parallel layers)",
            "notes: nb_head, parallel_heads; the sentence is ours",
            np.exp(np.log(np.divide(one, two)).mean(0)), "<", 1)
        settled(arrays, say)

    def figure(arrays, flags, fields, title):
        figure, axes = common.panels(4, title + " (hollow: still falling)", flags)
        for ax, field in zip(axes, fields):
            base, x = Scaling.base(flags), field.replace("d_head", "head_width")
            del base[field]
            strip(ax, arrays, x, "loss", "transformer", BLUE, **base)
            strip(ax, arrays, x, "loss", "low-rank", ORANGE, **base | dict(model="low-rank"))
            strip(ax, arrays, x, "uniform", "answers uniformly", "grey", "--", **base)
            finish(ax, x, log="y")
        return figure

    def draw_model(arrays, flags):
        return Scaling.figure(arrays, flags, ("n_heads", "d_model", "d_head", "n_layers"),
                              "Divergence against the model's size")

    def draw_law(arrays, flags):
        return Scaling.figure(arrays, flags, ("n_tokens", "alpha_1", "alpha_3", "d_mlp"),
                              "Divergence against the law's size, and with an MLP")

    def draw_split(arrays, flags):
        figure, (ax,) = common.panels(1, "As many parameters in one, two or four heads a layer\n"
                                      "(hollow: still falling)", flags)
        for heads, colour in zip((1, 2, 4), (BLUE, RED, GREEN)):
            layers, fields = arrays["n_heads"] / heads, Scaling.split(flags, heads, 1)
            del fields["n_heads"]
            strip(ax, arrays | {"layers": layers}, "layers", "loss", f"heads a layer: {heads}", colour,
                  **fields)
        finish(ax, "parallel attention layers", log="xy")
        return figure


class Skips(Study):
    """What does each path carry: the residual, positions and tokens in scores and in values?

    arrays: as of `train`."""
    defaults = dict(n_heads=10, nb_1=40, nb_2=40, law_seed=0)
    paths = dict(skip_residual="the residual E[x2]", skip_pos_qk="positions in the scores",
                 skip_tok_qk="tokens in the scores", skip_pos_ov="positions in the values",
                 skip_tok_ov="tokens in the values")

    def points(flags):
        grid = [dict(zip(Skips.paths, skips)) for skips in product((False, True), repeat=5)]
        return [p for p in grid if not any(p[f"skip_pos_{part}"] and p[f"skip_tok_{part}"]
                                           for part in ("qk", "ov"))]

    def claims(arrays, say):
        def level(skipped):
            return arrays["loss"][pick(arrays, **{name: name == skipped for name in Skips.paths})]
        for name, words in Skips.paths.items():
            say(name.replace("_", "-"), f"without {words} the divergence is 10 % higher (1,500 steps)",
                "notes: effect of architectural modifications; the sentence is ours",
                level(name) / level("none"), ">", 1.1)
        settled(arrays, say)

    def draw_skips(arrays, flags):
        return draw_levels(arrays, flags, "What does each path carry? Divergence without these paths")


class Attention(Study):
    """Which pairs of tokens make a head look at the first one, and is its map of low rank?

    arrays: as of `train`; map [R, H, N, N], the probability of the first token for (x1, x2); singular,
    singular_start [R, H, N], its singular values and those before training; seen [R, N, N], whether the
    pair occurs; rank_one [R, H], the share of the first singular value's square in the map of the first
    tokens that occur, its mean taken out."""
    defaults = dict(n_heads=3, nb_1=10, nb_2=10, skip_residual=True)
    check = attention_only

    def measure(run, params, number):
        seen = torch.zeros(run.n_tokens, run.n_tokens, dtype=torch.bool)
        seen[number["x1"], number["x2"]] = True
        before = {k: p.double() for k, p in start(run)["params"].items()}
        maps, first = heads(params, number)[0], heads(before, number)[0]
        occur = maps[:, seen.any(1)]
        energy = torch.linalg.svdvals(occur - occur.mean((1, 2), keepdim=True)).square()
        return {"map": maps, "seen": seen, "singular": torch.linalg.svdvals(maps),
                "singular_start": torch.linalg.svdvals(first), "rank_one": energy[:, 0] / energy.sum(1)}

    def claims(arrays, say):
        say("near-rank-one", "every head's map has one direction (1,500 steps), with .9 of the energy "
            "over first tokens that occur and all second ones, its mean taken out (least head)",
            "notes: prints singular values; the threshold is ours", arrays["rank_one"].min(1), ">", .9)

    def draw_attention(arrays, flags):
        maps, occurs = arrays["map"][0][:3], arrays["seen"][0].any(1)
        figure, (*axes, last) = common.panels(len(maps) + 1, "Which pairs make a head look at the first "
                                              "token? (first seed; above the line: occurs)", flags)
        order = np.argsort(~occurs, kind="stable")
        for h, ax in enumerate(axes):
            common.image(ax, maps[h][order], f"head {h}: probability of the first token", figure,
                         "second token", "first token, those that occur first", (0, 1))
            ax.axhline(occurs.sum() - .5, color="white")
        for key, colour, name in ("singular_start", "grey", "untrained"), ("singular", BLUE, "trained"):
            lines = arrays[key].reshape(-1, len(occurs))
            common.band(last, np.arange(len(occurs)) + 1, lines.T, f"{name} heads, all seeds", colour)
        finish(last, "index", "singular value of the map", log="xy", ylim=(1e-4, None))
        return figure


class Heads(Study):
    """What does each head contribute to the answer, alone and in the group?

    arrays: as of `train`; attention [R, H, C] to the first token; contribution [R, H, C, N] of each head
    to each logit; logits [R, C, N], their sum with what the residual adds;
    coefficient [R, H, C, N], each head's vector in the basis of U (minimum norm); answer [R, C], the
    likeliest."""
    defaults = dict(n_tokens=10, d_model=5, n_heads=2, nb_2=5, skip_residual=True, runs=8)
    check = attention_only

    def measure(run, params, number):
        pair, U, answer = (number["x1"], number["x2"]), params["U"], number["after"].argmax(0)
        attention, out = heads(params, number, pair)
        contribution = out.mT @ U.T
        return {"attention": attention, "contribution": contribution, "answer": answer,
                "coefficient": out.mT @ torch.linalg.pinv(U),
                "logits": logits_of(run, params, number).T}

    def margin(logits, answer):
        """Correct minus best wrong logit: logits [..., C, N], answer [C] -> [..., C]."""
        right = np.arange(logits.shape[-1]) == answer[:, None]
        return np.where(right, logits, 0).sum(-1) - np.where(right, -np.inf, logits).max(-1)

    def claims(arrays, say):
        both, team = [], []
        for x, answer, logits in zip(*(arrays[k] for k in ("contribution", "answer", "logits"))):
            right = np.arange(x.shape[-1]) == answer[:, None]
            raised = np.where(right, x - x.mean(-1, keepdims=True), 0).sum(-1) > 0
            both.append(raised.all(0).mean())
            alone, group = Heads.margin(x, answer).max(0), Heads.margin(logits, answer)
            team.append(((alone <= 0) & (group > 0)).mean())
        say("heads-raise-the-answer", "in most contexts both heads raise the right answer over the mean "
            "(share; independent signs: .25)", "notes: A*B > 0 and A > 0", both, ">", .5)
        say("group-answers", "a tenth of the contexts are answered by the sum though by no head alone",
            "notes: solo and group", team, ">", .1)
        settled(arrays, say)

    def draw_heads(arrays, flags):
        x, answer, logits = (arrays[k][0] for k in ("contribution", "answer", "logits"))
        solo, group = Heads.margin(x, answer), Heads.margin(logits, answer)
        figure, (a, b, d) = common.panels(3, "What does each head contribute? (first seed)", flags, 3)
        example, width = min(10, len(answer) - 1), .8 / len(x)
        for h, colour in zip(range(len(x)), common.COLOURS):
            look = dict(color=colour, label=f"head {h}")
            a.plot(arrays["attention"][0][h], solo[h], ".", **look)
            b.plot(solo[h], group, ".", **look)
            y = arrays["coefficient"][0][h, example]
            d.bar(np.arange(len(y)) + (h - len(x) / 2 + .5) * width, y, width, **look)
        b.axvline(0, color="grey")
        for ax in a, b, d:
            ax.axhline(0, color="grey")
        d.axvline(answer[example], ls="--", color="grey")
        finish(a, "attention to the first token", "correct - best wrong logit", "one head alone (solo)")
        finish(b, "margin of the head alone", "margin of the sum", "all heads (group)")
        finish(d, f"token (dashed: the answer {answer[example]})", "coefficient in the basis of U",
               f"context {example}, minimum norm: U (U'U)^-1 v")
        return figure


class Superposition(Study):
    """How do N tokens share d directions?

    arrays: as of `train`; alignment [R], the mean cosine of a context's vector with its likely token's
    row of U; opposite [R], the most negative cosine of a row of U with another, mean over rows;
    simplex_error [R], how far these cosines are from -1/(N-1), root mean square (U centred in all
    three). Vectors with zeros up to width N: vectors_U [R, N, N], vectors_contexts [R, C, N] (by likely
    token), vectors_tokens [R, 2N, N] (E + P, first position first; none in the low-rank model)."""
    defaults = dict(law="last_position", n_tokens=10, d_model=5, n_heads=20, steps=3000)
    kinds = ("low-rank", False), ("transformer", False), ("transformer", True)

    def check(flags):
        if flags.d_model >= flags.n_tokens:
            raise common.Stop(f"--d-model {flags.d_model} must be below --n-tokens {flags.n_tokens}")

    def points(flags):
        sizes = [(d, flags.n_heads) for d in range(1, flags.n_tokens)]
        sizes += [(flags.d_model, H) for H in (1, 2, 5, 10) if H < flags.n_heads]
        points = [dict(model=model, freeze_u=frozen, d_model=d, n_heads=H)
                  for model, frozen in Superposition.kinds for d, H in sizes]
        points = [p | dict(importance=k) for p in points for k in (0., 2.)]
        return [p for p in points if p["d_model"] == flags.d_model or not flags.smoke]

    def compute(flags, folder):
        groups = common.groups_of_runs(flags)
        def begin(run):
            """A transformer with a frozen U has that of the low-rank model, trained before it."""
            state, twin = start(run), replace(run, model="low-rank", freeze_u=False)
            for i, runs in enumerate(groups):
                if run.freeze_u and twin in runs and run not in runs:
                    saved = common.read(folder / f"group{i}" / "checkpoint.pt")
                    state["params"]["U"] = saved["params"]["U"][runs.index(twin)]
            return state
        return train(flags, folder, begin)

    def measure(run, params, number):
        e, U, likely = residual(run, params, number).T, params["U"], number["after"].argmax(0)
        centred = U - U.mean(0)
        off = cosine_similarity(centred[:, None], centred, dim=-1)[~torch.eye(len(U), dtype=bool)]
        tokens = params.get("E", 0 * U) + params.get("P", 0 * U[:2])[:, None]
        vectors = dict(U=U, contexts=e[likely.argsort(stable=True)], tokens=tokens.flatten(0, 1))
        return {"alignment": cosine_similarity(e, centred[likely]).mean(),
                "opposite": off.view(len(U), -1).amin(1).mean(),
                "simplex_error": (off + 1 / (len(U) - 1)).square().mean().sqrt(),
                **{f"vectors_{k}": pad(x, (0, len(U) - x.shape[1])) for k, x in vectors.items()}}

    def claims(arrays, say):
        def of(key, model="low-rank", frozen=False, d_model=5):
            return arrays[key][pick(arrays, model=model, freeze_u=frozen, d_model=d_model, n_heads=20,
                                    importance=0.)]
        low, full, frozen = (of("loss", *kind) for kind in Superposition.kinds)
        say("reaches-low-rank", "20 heads reach the low-rank divergence within 5 % (ratio)",
            "this project", full / low, "<", 1.05)
        say("frozen-U", "a U frozen at the low-rank model's costs less than 10 % (ratio)",
            "notes: a line freezes U at the low-rank W_U; the sentence is ours", frozen / full, "<", 1.1)
        say("full-rank-zero", "low-rank, d = N - 1 is zero: softmax sees no more directions", "theory",
            of("loss", d_model=9), "<", 1e-4)
        say("aligned", "low-rank, a context's vector points at its token: mean cosine above .7",
            "notes: the cosimilarity between the w_e(z) and the expected right w_u(g(z))",
            of("alignment"), ">", .7)
        say("simplex", "low-rank, d = N - 1: the rows of U form a simplex: cosines are -1/(N-1), rms .1",
            "Elhage et al. 2022, Toy Models of Superposition", of("simplex_error", d_model=9), "<", .1)
        say("antipodal", "low-rank, d = N/2: every token has an antipodal one (mean cosine)",
            "Elhage et al. 2022, Toy Models of Superposition", of("opposite"), "<", -.95)
        settled(arrays, say)

    def draw_superposition(arrays, flags):
        figure, axes = common.panels(
            4, "Who shares a direction? (low-rank: a vector a context; hollow: still falling)", flags)
        many, d = dict(n_heads=flags.n_heads), flags.d_model
        looks = (ORANGE, "--"), (BLUE, "-"), (GREEN, ":")
        for (model, frozen), (colour, style) in zip(Superposition.kinds, looks):
            kind, name = dict(model=model, freeze_u=frozen), model + ", U of the low-rank" * frozen
            for ax, k in zip(axes, (0., 2.)):
                strip(ax, arrays, "d_model", "loss", name, colour, importance=k, **many, **kind)
            kind = kind | dict(importance=0.)
            strip(axes[2], arrays, "n_heads", "loss", name, colour, d_model=d, **kind)
            pairs = ("alignment", BLUE, "context, its token"), ("opposite", RED, "token, its opposite")
            for key, shade, words in pairs:
                strip(axes[3], arrays, "d_model", key, f"{words}: {name}", shade, style, **many, **kind)
        for ax, k in zip(axes, (0., 2.)):
            common.shelf(ax, np.nanmean(arrays["uniform"]), "answers uniformly: log N - H")
            finish(ax, "d_model", title=f"token i weighs (1 - i/N)^{k:g}", log="y", ylim=(1e-7, None))
        common.shelf(axes[3], -1 / (flags.n_tokens - 1), "simplex: -1/(N-1)")
        common.shelf(axes[3], -1, "antipodal pairs")
        finish(axes[2], "heads (low-rank: none)", title=f"d_model = {d}", log="xy")
        finish(axes[3], "d_model", "mean cosine", "all tokens weigh 1 (U centred)")
        return figure

    def draw_gram(arrays, flags):
        figure, axes = common.panels(3, "What points where? (transformer, first seed)", flags, 3)
        run = pick(arrays, model="transformer", d_model=flags.d_model, n_heads=flags.n_heads).argmax()
        for ax, (key, title) in zip(axes, dict(
                U="tokens: U U'", contexts="contexts by likely token: e e'",
                tokens="what attention reads: (E + P)(E + P)',\nfirst position, then second").items()):
            x = arrays[f"vectors_{key}"][run]
            common.image(ax, x @ x.T, title, figure)
        return figure


class Subspace(Study):
    """Does U span the leading directions of the log-probabilities?

    arrays: as of `train`; distance [R] (Frobenius) of the projectors onto span(U) and onto the top d
    directions of the centred log-probabilities."""
    defaults = dict(law="gen_d", model="low-rank", n_tokens=10, d_model=5, steps=3000)
    check = without_zeros

    def points(flags):
        dims = range(flags.d_model, flags.n_tokens + 1)
        return [dict(dim=dim, axis_aligned=aligned) for dim in dims for aligned in (True, False)]

    def measure(run, params, number):
        directions = torch.linalg.svd(centred_log(number), False)[2][:run.d_model]
        return {"distance": Subspace.distance(params["U"], directions.T)}

    def distance(A, B):
        """Frobenius distance of the projectors onto columns of A and B [N, d], without the all-ones
        direction, which softmax does not see. Two random ones: sqrt(2 d (1 - d / (N - 1)))."""
        A, B = (torch.linalg.qr(X - X.mean(0))[0] for X in (A, B))
        return torch.linalg.matrix_norm(A @ A.T - B @ B.T)

    def claims(arrays, say):
        distance, seeds, wide = arrays["distance"], np.unique(arrays["seed"]), arrays["dim"] > 5
        most = [distance[pick(arrays, seed=seed)].max() for seed in seeds]
        on, off = ([np.median(distance[wide & pick(arrays, seed=s, axis_aligned=a)]) for s in seeds]
                   for a in (True, False))
        say("spans-leading", "U spans nearly the leading directions: every distance is below half that "
            "of random ones, 2.11 (in the note 2.24: with the all-ones direction)",
            "notes: distance between W_U and low rank log-prob", most, "<", 1.054)
        say("alignment-matters", "aligned laws of over d dimensions are followed more closely (ratio)",
            "notes: the two curves; the sentence is ours", np.divide(on, off), "<", 1)
        settled(arrays, say)

    def draw_subspace(arrays, flags):
        level = math.sqrt(2 * flags.d_model * (1 - flags.d_model / (flags.n_tokens - 1)))
        figure, (ax,) = common.panels(1, "Does U span the law's leading directions?", flags)
        for aligned, colour, name in (True, BLUE, "axes aligned"), (False, RED, "not aligned"):
            strip(ax, arrays, "dim", "distance", name, colour, axis_aligned=aligned)
        common.shelf(ax, level, f"two random subspaces without the all-ones direction: {level:.3g}")
        finish(ax, "dimensions of the law", "distance of projectors (Frobenius)", ylim=(0, None))
        return figure


class Optimum(Study):
    """How good is the analytic context vector w*, law by law?

    arrays: as of `train`; mean divergences [R] of the Newton optimum given U (newton; newton_gap: to its
    certified bound), the trained vectors (trained), the analytic w* (w_star), and the truncation of the
    centred log-probabilities at rank d (least_squares)."""
    defaults = dict(law="almost_rank_d", model="low-rank", n_tokens=10, d_model=5, dim=6, runs=8,
                    steps=3000)
    check = without_zeros
    laws = (3., 1.), (10., 1.), (20., 1.), (20., .01)  # eig_high, eig_low; the notes have 10, 1

    def points(flags):
        return [dict(eig_high=high, eig_low=low) for high, low in Optimum.laws]

    def measure(run, params, number):
        e, U, after = residual(run, params, number).T, params["U"], number["after"].T
        (value, lower), mean = best_vectors(U, after), lambda x: (number["weight"] * x).sum()
        left, values, right = torch.linalg.svd(centred_log(number), False)
        values[run.d_model:] = 0
        logits = dict(trained=e @ U.T, w_star=Optimum.w_star(U, after) @ U.T,
                      least_squares=left * values @ right)
        return {k: divergence(z.T, number) for k, z in logits.items()} | {
            "newton": mean(value), "newton_gap": mean(value - lower)}

    def w_star(U, after):
        """(U^T S U)^-1 U^T S L of each row p of `after` [C, N], S = diag(p) - p p^T, L = log p: the
        minimum of the divergence expanded to second order around p. Returns [C, d]."""
        L, (mean, S) = after.log(), moments(after, U)
        right = (after * L) @ U - (after * L).sum(1, keepdim=True) * mean
        return (torch.linalg.pinv(S, hermitian=True) @ right[..., None])[..., 0]

    def claims(arrays, say):
        newton, star, least = (arrays[k] for k in ("newton", "w_star", "least_squares"))
        say("newton-certified", "the Newton optimum is certified (gap to its bound)", "weak duality",
            arrays["newton_gap"], "<", 1e-6)
        for high, low in Optimum.laws:
            mine, law = pick(arrays, eig_high=high, eig_low=low), f"singular values {high:g}, {low:g}"
            say(f"w-star-{high:g}-{low:g}", f"{law}: w* is within 10 % of the optimum (ratio)",
                "notes: w_e", (star / newton)[mine], "<", 1.1)
            say(f"order-{high:g}-{low:g}", f"{law}: w* beats least squares of log pi_3 (ratio)",
                "notes: th, least-square", (star / least)[mine], "<", 1)
        settled(arrays, say)

    def draw_optimum(arrays, flags):
        figure, (ax,) = common.panels(1, "How good is the analytic context vector?", flags, size=(5, 5))
        place = in_order(ax, arrays)
        for k, colour in ("trained", BLUE), ("w_star", RED), ("least_squares", GREEN):
            ratios = arrays | {"law": place, "ratio": arrays[k] / arrays["newton"]}
            strip(ax, ratios, "law", "ratio", k, colour, "_")
        finish(ax, "", "divergence / optimum given U")
        return figure


class Capacity(Study):
    """How many associations does a head store, and is an MLP of the same size better?

    arrays: as of `train`."""
    defaults = dict(n_tokens=50, steps=2000)
    # the paper's tables: slope of the accuracy over heads at N = 50 by d; accuracies by (N, d, heads)
    paper_slope = dict(zip(range(3, 14), (.00134, .00349, .00716, .01114, .01634, .02216, .02749, .03404,
                                          .04149, .04361, .05539)))
    paper_accuracy = {(50, 10, 1): .130, (50, 10, 11): .506, (50, 10, 31): .997, (10, 2, 13): .734}

    def point(N, d, H, d_head=0, d_mlp=0):
        return dict(n_tokens=N, d_model=d, n_heads=H, d_head=d_head, d_mlp=d_mlp)

    def mlp(d, H):
        """Width of an MLP of as many numbers as H heads: 3 d m + m = 4 H d^2."""
        return round(4 * H * d * d / (3 * d + 1))

    def points(flags):
        N, point = flags.n_tokens, Capacity.point
        grid = [point(N, d, H) for d, H in [*product(range(3, 14), (1, 6, 11)), (10, 16), (10, 31)]]
        grid += [point(N, 10, 6, width) for width in (2, 5, 20, 30)] + [point(10, 2, 13)]
        for d, H in product((7, 10, 13), (2, 6, 11)):
            grid += [point(70, d, H), point(70, d, 0, 0, Capacity.mlp(d, H))]
        return [p | dict(n_tokens=N) for p in grid[::9]] if flags.smoke else grid

    def theorem(N, stored):
        """Accuracy 1/N + (1 - 1/N) n / N^2 of a model that stores n associations, guesses the rest."""
        return 1 / N + (1 - 1 / N) * np.minimum(stored / N ** 2, 1)

    def slopes(arrays, N):
        """{d: accuracy per head [seeds]}, a line through a seed's runs by least squares, without those
        above .9: their table is nearly full."""
        found = {}
        mine = pick(arrays, n_tokens=N, d_head=0, d_mlp=0) & (arrays["accuracy"] < .9)
        for d, seed in product(Capacity.paper_slope, np.unique(arrays["seed"])):
            here = mine & pick(arrays, d_model=d, seed=seed)
            heads, accuracy = arrays["n_heads"][here], arrays["accuracy"][here]
            if len({*heads}) > 1:
                found.setdefault(d, []).append(np.polyfit(heads, accuracy, 1)[0])
        return {d: np.array(slopes) for d, slopes in found.items()}

    def power(d, slope):
        """Of a d^k + b, k = 1, 2, 3, the k that fits best in least squares."""
        errors = [np.polyfit(np.power(d, float(k)), slope, 1, full=True)[1] for k in (1, 2, 3)]
        return 1 + int(np.argmin(errors))

    def claims(arrays, say):
        def of(*size):
            return arrays["accuracy"][pick(arrays, **Capacity.point(*size))]
        width = np.minimum(arrays["head_width"], arrays["d_model"])
        stored = Capacity.theorem(arrays["n_tokens"], arrays["n_heads"] * width + arrays["d_model"])
        spare = (arrays["accuracy"] - stored)[arrays["d_mlp"] == 0]
        say("theorem", "training finds the H d_head + d associations that the theorem constructs "
            "(d_head at most d; 2,000 steps; accuracy, difference)", "paper: theorem", spare, ">", 0)
        slope = Capacity.slopes(arrays, 50)
        for d, value in Capacity.paper_slope.items():
            say(f"slope-{d}", f"d={d}: a head adds the accuracy {value}, within 10 % (ratio)",
                "paper: table of slopes", slope[d] / value, "in", (.9, 1.1))
        for (N, d, H), value in Capacity.paper_accuracy.items():
            say(f"accuracy-{N}-{d}-{H}", f"N={N}, d={d}, {H} heads: accuracy {value}, to .03", "paper",
                of(N, d, H), "in", (value - .03, value + .03))
        powers = [Capacity.power([*slope], y) for y in zip(*slope.values())]
        say("cubic", "associations per head grow as d^3, rather than d or d^2, each with a "
            "constant (power that fits best)", "paper: scaling in d", powers, ">", 2)
        say("cubic-paper", "the same of the paper's own eleven slopes", "paper: scaling in d",
            Capacity.power(*zip(*Capacity.paper_slope.items())), ">", 2)
        for d, H in product((7, 10, 13), (6, 11)):
            ratio = of(70, d, 0, 0, Capacity.mlp(d, H)) / of(70, d, H)
            say(f"mlp-{d}-{H}", f"N=70, d={d}: an MLP as large stores more than {H} heads (ratio)",
                "paper: both scalings are the same", ratio, ">", 1)
        settled(arrays, say)

    def draw_capacity(arrays, flags):
        N = flags.n_tokens
        figure, (a, b, c, e) = common.panels(4, "How many associations does a head store? (hollow: loss "
                                             "still falling)", flags)
        for d, colour in zip((5, 8, 10, 13), (BLUE, GREEN, RED, PINK)):
            same = dict(n_tokens=N, d_head=0, d_mlp=0)
            strip(a, arrays, "n_heads", "accuracy", f"d={d}", colour, d_model=d, **same)
        same = dict(n_tokens=N, d_model=10, n_heads=6)
        strip(c, arrays, "head_width", "accuracy", "d=10, 6 heads", BLUE, **same)
        for d, colour in zip((7, 10, 13), (BLUE, RED, GREEN)):
            size = dict(n_tokens=70, d_model=d)
            strip(e, arrays, "parameters", "accuracy", f"d={d}, heads", colour, d_mlp=0, **size)
            strip(e, arrays, "parameters", "accuracy", f"d={d}, MLP", colour, "--", n_heads=0, **size)
        full, slope = N * N / (1 - 1 / N), Capacity.slopes(arrays, N)
        for found, look, name in (slope, "o", "measured"), (Capacity.paper_slope, "k+", "paper"):
            b.plot(found.keys(), [np.median(y) * full for y in found.values()], look, label=name)
        b.plot((3, 13), (3, 13), "--", color="grey", label="theorem: d_head")
        finish(a, "heads", "accuracy", "heads as wide as the stream")
        finish(b, "d", "associations per head", "slope of accuracy x N^2 / (1 - 1/N)", "xy")
        finish(c, "d_head", "accuracy", "wider heads")
        finish(e, "parameters", "accuracy", "N=70: heads, or an MLP as large")
        return figure


STUDIES = [Dynamics, Freeze, Scaling, Skips, Attention, Heads, Superposition, Subspace, Optimum,
           Capacity]

if __name__ == "__main__":
    raise SystemExit(common.main(Flags, STUDIES))
