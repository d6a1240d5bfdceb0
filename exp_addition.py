"""How does a one-layer transformer add numbers, and which digit does it learn when?

Law: a and b have D digits, i.i.d. uniform in 0..base-1, most significant first; a + b = sum_k z_k base^k. Input
`a_{D-1} .. a_0 + b_{D-1} .. b_0 =`, target z_k (`--digit k`: 0 units, 1 tens, .., D leading carry), read at `=`. With
n_k = (a_k + b_k) mod base and c_k the carry into column k, z_k = (n_k + c_k) mod base: a model that knows its own column
but no carry has the loss H(c_k) (.688 nats for the tens, -> log 2), one that knows nothing log base. In `--study all`
every digit is answered at once; `--answer teacher` feeds the true earlier digits, which leaks: where n_k = base - 1 the
digit before tells the carry. `--answer parallel` feeds `=` instead.

    python exp_addition.py                    106 s on one core: when do units and tens, 4 seeds each, leave their shelves?
    python exp_addition.py --study anatomy    200 s: how they are added: attention, neurons, frequencies, ablations, over time
    python exp_addition.py --study theory       7 s: every exact shelf, for any --base and --digits

Studies: `digit` (default), `sweep` (a grid, or without --sweep every row of the notes' tables), `all`, `theory` (exact
floors), `anatomy` (one-layer models taken apart, new ones or those of --checkpoint), `spikes` (what removes the repeated
spike). arrays.npz: the keys are in the docstrings of `curves`, `compute_*`, `anatomy` and `fourier`; metrics.npz: loss,
grad_norm [T, R] every step, eval_* [M, R, ...] at eval_step.

Claims are quoted from research notes of 2023-04-18; "128/4" is d_model/n_heads. Model and optimiser are the notes'.
"""
import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch.func import grad_and_value

import common
from common import flag

# ---- Flags ----------------------------------------------------------------------------------------------------------


@dataclass
class Flags(common.Flags):
    study: Literal["digit", "sweep", "all", "theory", "anatomy", "spikes"] = flag("digit", "which question to ask")
    steps: int = flag(2000, "training steps", low=1)
    runs: int = flag(4, "seeds per configuration", low=1)
    sweep: list[str] = flag(["digit=0,1"], "field=v1,v2 ...: one configuration for each combination")
    digits: int = flag(5, "D, digits of each operand", low=1, high=9)
    base: int = flag(10, "base of the digits", low=2, high=16)
    digit: int = flag(0, "which digit of the sum to learn: 0 units, 1 tens, .., D leading carry", low=0, number=True)
    answer: Literal["teacher", "parallel"] = flag("teacher", "study all: feed the true earlier digits, or `=`")
    d_model: int = flag(128, "width of the residual stream", low=1, high=4096)
    n_heads: int = flag(4, "attention heads, each d_model / n_heads wide", low=1)
    n_layers: int = flag(1, "layers; more than one takes the plain forward", low=1, high=16)
    mlp: bool = flag(True, "have the ReLU MLP of width 4 d_model")
    batch: int = flag(256, "examples a step", low=1)
    lr: float = flag(1e-3, "learning rate of AdamW, reached after --warmup steps", low=0, number=True)
    warmup: float = flag(10., "steps of linear warm-up", low=1, number=True)
    weight_decay: float = flag(.25, "decoupled weight decay", low=0, number=True)
    beta1: float = flag(.9, "AdamW beta1", low=0, high=.999999, number=True)
    beta2: float = flag(.98, "AdamW beta2", low=0, high=.999999, number=True)
    eps: float = flag(1e-8, "AdamW eps", low=0, number=True)
    clip: float = flag(0., "clip the gradient's norm to this (0: do not)", low=0, number=True)
    evals: int = flag(30, "log-spaced evaluations over training", low=2)
    probe: str = flag("logit", "study anatomy: gradient times input of `logit`, `neuron:I` or `head:I`")
    checkpoint: str = flag("", "study anatomy: a checkpoint.pt to take apart instead of training")

    per_study: ClassVar[dict] = {
        "sweep": dict(sweep=[], steps=5000, evals=2),
        "all": dict(sweep=["answer=teacher,parallel"], runs=3, batch=64, steps=2000),
        "theory": dict(sweep=[], runs=1),
        "anatomy": dict(runs=3, steps=2000, evals=2, snapshots=24),
        "spikes": dict(sweep=[], digit=1, weight_decay=.5, steps=5000, evals=2),
        "smoke": dict(steps=20, runs=2, d_model=8, n_heads=2, batch=32, evals=2, snapshots=2)}

    def check(self):
        kind, _, index = self.probe.partition(":")
        if kind not in ("logit", "neuron", "head") or (kind == "logit") == bool(index) or index and not index.isdigit() or \
                index and int(index) >= {"neuron": 4 * self.d_model, "head": self.n_heads}[kind]:
            raise common.Stop(f"--probe {self.probe}: give logit, neuron:I below {4 * self.d_model} or head:I below "
                              f"{self.n_heads}")
        if self.study == "anatomy" and self.n_layers > 1:
            raise common.Stop("--study anatomy takes one-layer models apart: --n-layers 1")
        if self.digit > self.digits:
            raise common.Stop(f"--digit {self.digit} must be at most --digits {self.digits} (the leading carry)")
        if self.d_model % self.n_heads:
            raise common.Stop(f"--d-model {self.d_model} must be divisible by --n-heads {self.n_heads}")

    @property
    def vocab(self):
        return self.base + 2  # the digits, `+` = base, `=` = base + 1

    @property
    def positions(self):
        return 2 * self.digits + 2 + self.digits * (self.study == "all")


# ---- Data law -------------------------------------------------------------------------------------------------------

def sample(flags, generator, *shape):
    """Digits of a then b, each most significant first: uint8 [*shape, 2D, batch] (the batch last: it is the axis along
    which the fast path vectorises)."""
    return torch.randint(flags.base, (*shape[:-1], 2 * flags.digits, shape[-1]), generator=generator, dtype=torch.uint8)


def columns(ab, base):
    """Digits ab [2D, B] -> (naive D, carry D+1, total D+1), lists of [B] from the units up: naive_k = a_k + b_k mod
    base, carry_k into column k, total_k the digit of the sum; total_D = carry_D. (Lists and no `%`: both would cost the
    compiled step more than the rest of a narrow model.)"""
    D = len(ab) // 2
    naive, carry, total = [], [torch.zeros_like(ab[0], dtype=torch.int32)], []
    for k in range(D):
        pair = ab[D - 1 - k].int() + ab[2 * D - 1 - k].int()
        full = pair + carry[k]
        carry.append((full >= base).int())
        naive.append(pair - base * (pair >= base).int())
        total.append(full - base * carry[-1])
    return naive, carry, total + carry[-1:]


def target(ab, digit, base):
    """Digit number `digit` (a tensor: it is data, not a shape) of the sums [B]."""
    return sum(z * (digit == k) for k, z in enumerate(columns(ab, base)[2]))


def tokens_of(flags, ab):
    """Token sequences [B, positions] from digits [2D, B]; in study `all` with the answer's input part."""
    row = lambda token: torch.full_like(ab[:1], token)
    parts = [ab[:flags.digits], row(flags.base), ab[flags.digits:], row(flags.base + 1)]
    if flags.study == "all":
        earlier = torch.stack(columns(ab, flags.base)[2][:0:-1]).to(ab.dtype)
        parts.append(earlier if flags.answer == "teacher" else torch.full_like(earlier, flags.base + 1))
    return torch.cat(parts).T


def entropy(p):
    """Entropy in nats of probabilities p [..., outcomes]."""
    p = np.asarray(p, float)
    return np.sum(np.where(p > 0, -p * np.log(np.where(p > 0, p, 1)), 0), -1)


def carry_entropy(p):
    return float(entropy([p, 1 - p]))


def carry_probability(base, k):
    """P(carry into column k) = (1 - base^-k) / 2."""
    return (1 - float(base) ** -k) / 2


def floors(base, digits):
    """Bayes-optimal loss in nats of digit k of a model that sees its L top columns (its own and the L - 1 below; for
    the leading carry k = D the columns D-1, D-2, ..): floor[k, L] [D+1, D+2], NaN where undefined. The carry stays
    unknown only where every column seen below the own one sums to base - 1."""
    floor = np.full((digits + 1, digits + 2), np.nan)
    for k in range(digits + 1):
        top = k < digits  # the leading carry has no column of its own
        floor[k, 0] = math.log(base) if top else carry_entropy(carry_probability(base, k))
        for seen in range(1, k + 1 + top):
            below = seen - top
            floor[k, seen] = float(base) ** -below * carry_entropy(carry_probability(base, k - below))
    return floor


def half_seen_floor(base, k):
    """Loss of digit k when the model sees its own column and ONE operand's digit of the next lower column."""
    p = carry_probability(base, k - 1)
    return float(np.mean([carry_entropy((u + p) / base) for u in range(base)]))


def leading_entropy(base, digits):
    """H(z_{D-1} | z_D) in nats: what the second answer digit costs a model that is fed the first and sees no operand."""
    p = carry_probability(base, digits - 1)
    joint = np.zeros((2, base))
    for a in range(base):
        for b in range(base):
            for carry, weight in ((0, 1 - p), (1, p)):
                joint[(a + b + carry) // base, (a + b + carry) % base] += weight / base ** 2
    return float(entropy(joint.ravel()) - entropy(joint.sum(1)))


def teacher_floor(base, k):
    """Loss of digit k in teacher mode for a model that sees its own column and the answer digits before it: they give
    away the carry where n_k = base - 1, which leaves the share 1 - 1/base of H(p_k)."""
    return (1 - 1 / base) * carry_entropy(carry_probability(base, k))


# ---- Model ----------------------------------------------------------------------------------------------------------

def names(layer):
    """Names of the parameters and activations of a layer: plain in the first, W_Q_1 .. in the second."""
    return {n: n + (f"_{layer}" if layer else "") for n in (
        "W_Q", "W_K", "W_V", "W_O", "W_in", "b_in", "W_out", "b_out", "attention", "heads", "neurons", "skip")}


def init(flags, generator):
    """Parameters of one run. Every matrix N(0, 1/d_model), W_U N(0, 1/vocab), biases zero."""
    d = flags.d_model
    normal = lambda *shape, scale=d ** -.5: torch.randn(shape, generator=generator) * scale
    params = {"W_E": normal(flags.vocab, d), "W_pos": normal(flags.positions, d)}
    for layer in range(flags.n_layers):
        n = names(layer)
        params |= {n[m]: normal(d, d) for m in ("W_Q", "W_K", "W_V", "W_O")}
        if flags.mlp:
            params |= {n["W_in"]: normal(d, 4 * d), n["b_in"]: torch.zeros(4 * d),
                       n["W_out"]: normal(4 * d, d), n["b_out"]: torch.zeros(d)}
    return params | {"W_U": normal(d, flags.vocab, scale=flags.vocab ** -.5)}


def identity(name, x):
    return x


def mlp(params, x, n=names(0), patch=identity):
    """x + ReLU(x W_in + b_in) W_out + b_out; x itself where the model has no MLP."""
    if n["W_in"] not in params:
        return x
    neurons = patch(n["neurons"], torch.relu(x @ params[n["W_in"]] + params[n["b_in"]]))
    return patch(n["skip"], x) + neurons @ params[n["W_out"]] + params[n["b_out"]]


def forward(params, tokens, n_heads, first=0, patch=identity):
    """The textbook model: logits [B, T - first, vocab] at positions first.. of tokens [B, T]. The last layer computes no
    other query. patch(name, activation) -> activation sees, and may change, `embedding` [B, T, d] and in each layer
    `attention` [B, heads, T - first, T], `heads` [B, heads, T - first, d_head] (before W_O), `neurons`
    [B, T - first, 4d] and `skip`, the residual stream past the MLP [B, T - first, d]."""
    x = patch("embedding", params["W_E"][tokens.long()] + params["W_pos"])
    B, T, d = x.shape
    causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    layers = sum(k.startswith("W_Q") for k in params)
    for layer in range(layers):
        n, start = names(layer), first if layer == layers - 1 else 0
        split = lambda y: y.unflatten(-1, (n_heads, d // n_heads)).transpose(1, 2)  # [B, heads, positions, d_head]
        q, k, v = split(x[:, start:] @ params[n["W_Q"]]), split(x @ params[n["W_K"]]), split(x @ params[n["W_V"]])
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d // n_heads)).masked_fill(~causal[start:], -math.inf)
        mixed = patch(n["heads"], patch(n["attention"], scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        x = mlp(params, x[:, start:] + mixed @ params[n["W_O"]], n, patch)
    return x @ params["W_U"]


def tables(params, n_heads):
    """All that attention of `=` can see in one layer. The query is one constant vector, keys and values are sums of a
    token's and a position's part: token scores [heads, vocab], position scores [heads, T], token values [vocab, d],
    position values [T, d], and the residual vector of `=` [d]."""
    W_E, W_pos = params["W_E"], params["W_pos"]
    d = W_E.shape[1]
    equals = W_E[-1] + W_pos[-1]
    query = (equals @ params["W_Q"]).view(n_heads, -1)
    query = torch.einsum("dhe,he->hd", params["W_K"].view(d, n_heads, -1), query) / math.sqrt(d // n_heads)
    return query @ W_E.T, query @ W_pos.T, W_E @ params["W_V"], W_pos @ params["W_V"], equals


def attend(params, ab, n_heads):
    """Attention of `=` by table look-up: weights of the digits [heads, 2D, B], of `+` and `=` [heads, 2, B], weights
    summed by digit value [heads, base, B]. The maximum is taken per example: a global one underflows where the scores
    of small models grow huge."""
    token_score, position_score, *_ = tables(params, n_heads)
    base, D = token_score.shape[1] - 2, len(ab) // 2
    value = torch.arange(base, dtype=token_score.dtype, device=ab.device)[:, None, None]
    digit = (ab.to(value.dtype) == value).to(value.dtype)  # one-hot [base, 2D, B]
    places = torch.cat([position_score[:, :D], position_score[:, D + 1:2 * D + 1]], 1)
    score = (token_score[:, :base] @ digit.flatten(1)).unflatten(1, ab.shape) + places[:, :, None]
    fixed = torch.stack([position_score[:, D] + token_score[:, base],
                         position_score[:, -1] + token_score[:, base + 1]], 1)[:, :, None]
    top = torch.maximum(score.amax(1, keepdim=True), fixed.amax(1, keepdim=True)).detach()
    score, fixed = (score - top).exp(), (fixed - top).exp()
    total = score.sum(1, keepdim=True) + fixed.sum(1, keepdim=True)
    score, fixed = score / total, fixed / total
    return score, fixed, (score[:, None] * digit).sum(2)


def head_outputs(params, ab, n_heads):
    """What each head reads, before W_O: [B, heads, d_head]. Token and position parts of the values are mixed apart, so
    the values of no example are ever formed."""
    score, fixed, by_digit = attend(params, ab, n_heads)
    _, _, token_value, place_value, _ = tables(params, n_heads)
    base, D = by_digit.shape[1], len(ab) // 2
    value = torch.cat([token_value[:base], place_value[:D], place_value[D + 1:2 * D + 1],
                       place_value[D:D + 1] + token_value[base:base + 1],
                       place_value[-1:] + token_value[base + 1:]])
    weight = torch.cat([by_digit, score, fixed], 1)  # [heads, base + 2D + 2, B]
    return torch.einsum("hkb,khe->bhe", weight, value.unflatten(1, (n_heads, -1)))


def fast_forward(params, ab, n_heads, patch=identity):
    """Logits [B, vocab] at `=` of the one-layer model, exactly those of `forward`, from digits ab [2D, B]. patch sees
    `heads` [B, heads, d_head], `neurons` [B, 4d] and `skip` [B, d]."""
    equals = params["W_E"][-1] + params["W_pos"][-1]
    heads = patch("heads", head_outputs(params, ab, n_heads))
    return mlp(params, equals + heads.flatten(1) @ params["W_O"], patch=patch) @ params["W_U"]


def logits_of(flags, params, ab):
    """Logits [B, vocab] at `=`, by the fast path where there is one."""
    if flags.n_layers == 1:
        return fast_forward(params, ab, flags.n_heads)
    return forward(params, tokens_of(flags, ab), flags.n_heads, first=flags.positions - 1)[:, 0]


def nll(logits, labels):
    """-log softmax(logits)[label] over the last axis, as log1p(sum of exp(z_j - z_label) over the others): in float32
    this is exact down to 1e-38, where log_softmax stops at 1e-7."""
    here = torch.arange(logits.shape[-1], device=logits.device) == labels[..., None]
    gap = (logits - (logits * here).sum(-1, keepdim=True)).masked_fill(here, -math.inf)
    top = gap.amax(-1, keepdim=True).detach().clamp(min=0)
    rest = (gap - top).exp().sum(-1)
    top = top[..., 0]
    return top + torch.log1p(rest + torch.expm1(-top))


# ---- Measures -------------------------------------------------------------------------------------------------------

EXAMPLES = 8192


def evaluation_set(flags):
    """The same digits [2D, 8192] for every run (a sixteenth of them for --smoke)."""
    return sample(flags, common.generator(0, "eval"), EXAMPLES // 16 if flags.smoke else EXAMPLES)


def delta_spectrum(flags, probs, ab, digit):
    """D_c(delta) = mean P((n + delta) mod base | carry c) for c = 0, 1: [2, base], and the mass on `+` and `=` [2]. The
    leading carry has no column: there n = 0."""
    naive, carry, _ = columns(ab, flags.base)
    n = naive[digit] if digit < flags.digits else torch.zeros_like(carry[0])
    shifted = torch.stack([probs.gather(1, ((n + delta) % flags.base).long()[:, None])[:, 0] for delta in range(flags.base)], 1)
    by_carry = lambda x: torch.stack([x[carry[digit] == c].mean(0) for c in (0, 1)])
    return by_carry(shifted), by_carry(probs[:, flags.base:].sum(1))


def evaluate(flags, params, ab):
    """One run of the single-digit task on digits ab: loss, accuracy, P(correct), delta spectrum, and its decomposition
    pair = -ln(P_n + P_{n+1}) (what is lost before the carry is asked for; loss - pair is what the carry costs) and
    alias = -ln(P_n + P_{n + base/2}) (what is lost by a model that knows n only mod base/2), means in nats."""
    labels = target(ab, torch.tensor(flags.digit), flags.base)
    logits = logits_of(flags, params, ab)
    loss, logp = nll(logits, labels), logits.log_softmax(-1)
    delta, other = delta_spectrum(flags, logp.exp(), ab, flags.digit)
    n = columns(ab, flags.base)[0][flags.digit] if flags.digit < flags.digits else torch.zeros_like(labels)
    both = lambda shift: -torch.logaddexp(*(logp.gather(1, ((n + s) % flags.base).long()[:, None])[:, 0]
                                            for s in (0, shift))).mean()
    return {"loss": loss.mean(), "accuracy": (logits.argmax(-1) == labels).float().mean(), "correct": (-loss).exp().mean(),
            "delta": delta, "other": other, "pair": both(1), "alias": both(flags.base // 2)}


def shelf_kind(flags, k, loss, pair, alias):
    """What a resting loss of digit k means, from the decomposition: `column-blind` (nothing of the column is known),
    `carry-blind` (the column is, the carry is not: loss - pair is H(p_k)), `alias` (n is known mod base/2 only), `solved`
    or `between`. The tolerance .15 nats is a stated rule."""
    floor = floors(flags.base, flags.digits)[k]
    if loss > floor[0] - .15:
        return "column-blind"
    if loss < .01:
        return "solved"
    if k and abs(loss - pair - floor[1]) < .15:
        return "carry-blind"
    if not k and alias < .15 and abs(loss - alias - math.log(2)) < .15:
        return "alias"
    return "between"


def geometric(loss, width=10):
    """Geometric mean over the last `width` steps of loss [T, R]: the curve in which steps and levels are read."""
    return np.exp(common.smooth(np.log(np.maximum(loss, 1e-38)), width))


def milestones(loss, blind):
    """Per run of loss [T, R] (every step): the step of first descent (10-step mean 0.1 below `blind` [R], the loss that
    sees nothing), of reaching 1e-3, the lowest 10-step geometric mean and its step, the final one (last 100 steps), the
    largest regrowth between steps 100 and 600, the number of spikes (above 1e-3 after having been below 1e-4), the first
    one's step, and the vibration (standard deviation of log loss around its 100-step mean after step 1000). Steps are NaN
    where they never come."""
    mean, curve = common.smooth(loss, 10), geometric(loss)
    when = lambda hit: np.where(hit.any(0), hit.argmax(0) + 1., np.nan)
    low = np.minimum.accumulate(curve)
    spikes, first = np.zeros(loss.shape[1]), np.full(loss.shape[1], np.nan)
    armed = np.zeros(loss.shape[1], bool)
    for i, row in enumerate(curve):
        armed |= row < 1e-4
        new = armed & (row > 1e-3)
        first = np.where(new & np.isnan(first), i + 1, first)
        spikes, armed = spikes + new, armed & ~new
    log = np.log(np.maximum(curve, 1e-38))
    late = (log - common.smooth(log, 100))[1000:]
    return {"descent": when(mean < blind - .1), "reach": when(curve < 1e-3), "lowest": low[-1],
            "lowest_step": curve.argmin(0) + 1., "final": geometric(loss[-100:], 100)[-1],
            "bump": (curve / np.concatenate([curve[:1], low[:-1]]))[100:600].max(0, initial=1.), "spikes": spikes,
            "first_spike": first, "vibration": late.std(0) if len(late) else np.full(loss.shape[1], np.nan)}


def resting_level(loss, top, bottom):
    """Where each run of loss [T, R] rests on its way from `top` to `bottom`: [2, R], level and step of the 50 steps over
    which the 30-step mean moves least; NaN where the run does not pass."""
    if len(loss) <= 50:
        return np.full((2, loss.shape[1]), np.nan)
    mean = common.smooth(loss, 30)
    still = np.abs(mean[50:] - mean[:-50])
    inside = (mean[50:] < top) & (mean[:-50] < top) & (mean[50:] > bottom)
    still = np.where(inside, still, np.inf)
    at = still.argmin(0) + 50
    passes = np.isfinite(still.min(0, initial=np.inf))
    return np.where(passes, [mean[at, np.arange(loss.shape[1])], at + 1.], np.nan)


def watch(flags, params, ab, **change):
    """Logits [B, vocab] at `=` (in study all: [B, D+1, vocab] at every answer position) and activations by name; change:
    {name: f} puts f(x) in the place of an activation x (an intervention)."""
    seen = {}

    def patch(name, x):
        seen[name] = x
        return change[name](x) if name in change else x
    if flags.study == "all":
        return forward(params, tokens_of(flags, ab), flags.n_heads, first=2 * flags.digits + 1, patch=patch), seen
    return fast_forward(params, ab, flags.n_heads, patch), seen


def digit_losses(flags, logits, ab):
    """Loss of each digit [D+1] from the units up; NaN for digits that the model does not answer."""
    total = torch.stack(columns(ab, flags.base)[2], 1)
    if flags.study == "all":
        return nll(logits, total.flip(1)).mean(0).flip(0)
    losses = torch.full((flags.digits + 1,), math.nan, dtype=logits.dtype)
    losses[flags.digit] = nll(logits, total[:, flags.digit]).mean()
    return losses


def evaluate_all(flags, params, ab):
    """One run of study all on a quarter of the evaluation set: loss and accuracy of each digit [D+1], and their means."""
    ab = ab[:, :len(ab[0]) // 4]
    logits = watch(flags, params, ab)[0]
    right = logits.argmax(-1) == torch.stack(columns(ab, flags.base)[2][::-1], 1)
    losses = digit_losses(flags, logits, ab)
    return {"loss": losses.mean(), "accuracy": right.float().mean(), "digit_loss": losses,
            "digit_accuracy": right.float().mean(0).flip(0)}


def flat(x, keep):
    """x with its batch mean in place of the entries where `keep` (broadcast) is False: mean ablation."""
    return torch.where(keep, x, x.mean(0, keepdim=True))


def ablations(flags, params, ab):
    """Change of each digit's loss [parts, D+1] when a part is replaced by its mean over the examples: heads in order,
    then the MLP."""
    logits, seen = watch(flags, params, ab)
    base = digit_losses(flags, logits, ab)
    index = torch.arange(flags.n_heads).view(-1, *[1] * (seen["heads"].ndim - 2))
    changes = [dict(heads=lambda x, h=h: flat(x, index != h)) for h in range(flags.n_heads)]
    changes.append(dict(neurons=lambda x: flat(x, torch.tensor(False))))
    return torch.stack([digit_losses(flags, watch(flags, params, ab, **c)[0], ab) - base for c in changes])


def shortcuts(flags, params, ab):
    """Change of the loss [2] when mean-ablating what the notes quote as negligible: the attention of `=` to itself, and
    the residual stream's skip past the MLP. (The skip past attention is the constant vector of `=`: its mean ablation
    changes nothing, exactly.)"""
    itself = attend(params, ab, flags.n_heads)[1][:, 1]  # [heads, B]
    token_value, place_value = tables(params, flags.n_heads)[2:4]
    value = (token_value[-1] + place_value[-1]).view(flags.n_heads, -1)
    excess = ((itself.mean(1, keepdim=True) - itself).T[:, :, None] * value)
    loss = lambda **c: digit_losses(flags, watch(flags, params, ab, **c)[0], ab)[flags.digit]
    return torch.stack([loss(heads=lambda x: x + excess), loss(skip=lambda x: flat(x, torch.tensor(False)))]) - loss()


def cascade_losses(flags, params, per_class=2048):
    """Loss [D+1] of digit k by r, the number of columns just below k that sum to base - 1, so that the carry comes from
    r columns further down; NaN for r > k. Every class has its own examples: of random ones r = 4 is one in 10,000."""
    D, k, losses = flags.digits, flags.digit, torch.full((flags.digits + 1,), math.nan)
    for r in range(k + 1):
        ab = sample(flags, common.generator(r, "law"), per_class)
        a, b = ab[:D].flip(0), ab[D:].flip(0)  # views by column, units first
        b[k - r:k] = flags.base - 1 - a[k - r:k]
        if k - r - 1 >= 0:  # the next column must not go on with the run
            column = k - r - 1
            b[column] = torch.where(a[column] + b[column] == flags.base - 1, (b[column] + 1) % flags.base, b[column])
        ab = torch.cat([a.flip(0), b.flip(0)])
        losses[r] = nll(logits_of(flags, params, ab), target(ab, torch.tensor(k), flags.base)).mean()
    return losses


def correlation_ratio(m, classes):
    """Share of Var(m) that a class label explains, Var(E[m | class]) / Var(m), for m [B, ...] and labels [B] (int): [...].
    Bias-corrected (Kelley's epsilon squared): 0 in expectation where m does not depend on the label."""
    m = (m - m.mean(0)).double()
    labels, index = classes.unique(return_inverse=True)
    count = torch.bincount(index).view(-1, *[1] * (m.ndim - 1))
    between = (torch.zeros(len(labels), *m.shape[1:], dtype=m.dtype).index_add_(0, index, m) ** 2 / count).sum(0)
    total = (m ** 2).sum(0)
    within = (total - between) / (len(m) - len(labels))
    return torch.where(total > 0, 1 - within / (total / (len(m) - 1)).clamp(min=1e-300), 0.).float()


def neuron_dependence(flags, neurons, ab):
    """Correlation ratio of every neuron [neurons, 3D]: the 2D digits in reading order, then the columns D-1 .. 0 (the
    pair a_k, b_k); and for pairs of columns [neurons, D(D-1)/2] (the two column sums), columns j > k in order."""
    D, base = flags.digits, flags.base
    a, b = ab[:D].long(), ab[D:].long()
    single = [correlation_ratio(neurons, x) for x in (*ab.long(), *(a * base + b))]
    pairs = [correlation_ratio(neurons, (a[i] + b[i]) * 2 * base + a[j] + b[j]) for i in range(D) for j in range(i + 1, D)]
    return torch.stack(single, -1), torch.stack(pairs, -1) if pairs else torch.zeros(neurons.shape[1], 0)


def gradient_input(flags, params, ab, probe):
    """Mean |gradient times embedding| of a chosen quantity at each position [positions]: `logit` (of the right digit),
    `neuron:i`, or `head:i` (norm of its output)."""
    kind, _, index = probe.partition(":")
    tokens, labels = tokens_of(flags, ab[:, :1024]), target(ab[:, :1024], torch.tensor(flags.digit), flags.base)
    seen = {}

    def quantity(x):
        def patch(name, value):
            seen[name] = value if name != "embedding" or x is None else x
            return seen[name]
        logits = forward(params, tokens, flags.n_heads, first=flags.positions - 1, patch=patch)[:, 0]
        if kind == "neuron":
            return seen["neurons"][..., int(index)].sum()
        if kind == "head":
            return seen["heads"][:, int(index)].norm(dim=-1).sum()
        return logits.gather(1, labels.long()[:, None]).sum()
    quantity(None)
    x = seen["embedding"]
    return (torch.func.grad(quantity)(x) * x).sum(-1).abs().mean(0)


def column_grid(flags, contexts=64):
    """Every (a_k, b_k) of the model's own column, each with the same random contexts: digits [2D, base^2 * contexts]."""
    k, D, base = min(flags.digit, flags.digits - 1), flags.digits, flags.base
    ab = sample(flags, common.generator(1, "eval"), contexts).repeat(1, base ** 2)
    cell = torch.arange(base ** 2).repeat_interleave(contexts)
    ab[D - 1 - k], ab[2 * D - 1 - k] = (cell // base).to(ab.dtype), (cell % base).to(ab.dtype)
    return ab


def fourier(flags, params):
    """The model's own column in the Fourier basis of Z_base x Z_base (Nanda et al. 2023; frequencies w = 1 .. base/2):
    restricted_loss [] keeps of the logits only what depends on a_k + b_k (the diagonal frequencies) and on the context;
    excluded_loss [w] removes the diagonal frequency w alone; embedding_spectrum [w] is |W_E|^2 by frequency, normalised;
    neuron_r2 [neurons, w]: share of a neuron's variance over (a, b) (mean over contexts) in the nine terms
    {1, cos, sin}(a) x {1, cos, sin}(b) of w, the constant apart; neuron_active [neurons]: share of inputs with m > 0;
    term_energy [2, w, 4]: power in the terms of a, of b, of a + b, of a - b, for neurons (before) and logits (after
    W_out W_U)."""
    base, ab = flags.base, column_grid(flags)
    logits, seen = watch(flags, params, ab)
    grid = lambda x: x.unflatten(0, (base, base, -1))  # [a, b, contexts, ...]
    logits, labels = grid(logits), grid(target(ab, torch.tensor(flags.digit), base))
    power = torch.fft.fft2(logits, dim=(0, 1))
    w = torch.arange(1, base // 2 + 1)
    diagonal = torch.zeros(len(w), base, base, dtype=torch.bool)
    for i, f in enumerate(w.tolist()):
        diagonal[i, f, f] = diagonal[i, -f % base, -f % base] = True
    keep = diagonal.any(0)
    keep[0, 0] = True
    loss = lambda mask: nll(torch.fft.ifft2(power * mask[..., None, None], dim=(0, 1)).real, labels).mean()
    out = {"restricted_loss": loss(keep), "excluded_loss": torch.stack([loss(~d) for d in diagonal]),
           "full_loss": nll(logits, labels).mean()}
    spectrum = torch.fft.fft(params["W_E"][:base], dim=0).abs().square().sum(1)
    spectrum = torch.stack([spectrum[list({f, -f % base})].sum() for f in w.tolist()])
    out["embedding_spectrum"] = spectrum / spectrum.sum()
    energy = lambda x: torch.fft.fft2(x, dim=(0, 1)).abs().square()  # [a freq, b freq, ...]
    after = energy(logits.mean(2)).sum(-1)
    if "neurons" not in seen:
        return out | {"term_energy": torch.stack([terms(after, w), terms(after, w)])}
    neurons = grid(seen["neurons"])
    before = energy(neurons.mean(2))
    total = before.sum((0, 1)) - before[0, 0]
    nine = torch.stack([sum(before[i, j] for i in {0, f, -f % base} for j in {0, f, -f % base}) - before[0, 0]
                        for f in w.tolist()], -1)
    return out | {"neuron_r2": torch.where(total > 1e-12, nine.T / total, 0.).T,
                  "neuron_active": (neurons > 0).float().mean((0, 1, 2)),
                  "term_energy": torch.stack([terms(before.sum(-1), w), terms(after, w)])}


def terms(energy, w):
    """Power [w, 4] of the 2-D spectrum [a freq, b freq] of a real function in the terms of a, of b, of a + b and of a - b,
    normalised to sum one. At w = base/2 the last two are the same function: it counts as a + b."""
    base = len(energy)
    half = 2 * w == base
    power = torch.stack([energy[w, 0], energy[0, w], energy[w, w], energy[w, -w % base].masked_fill(half, 0)], -1)
    power = power * (2 - half.to(power.dtype))[:, None]  # w and -w
    return power / power.sum().clamp(min=1e-30)


def matrices(flags, params):
    """The effective matrices that fix the one-layer model, exactly: scores [heads, positions, vocab] of `=`; what a head
    writes to the logits when it reads a token, ov_token [heads, vocab, vocab], or a position, ov_place [heads, positions,
    vocab]; neurons to logits [4d, vocab]."""
    token_score, place_score, token_value, place_value, _ = tables(params, flags.n_heads)
    split = lambda v: v.unflatten(1, (flags.n_heads, -1)).transpose(0, 1)
    out = params["W_O"].unflatten(0, (flags.n_heads, -1)) @ params["W_U"]
    found = {"scores": place_score[:, :, None] + token_score[:, None], "ov_token": split(token_value) @ out,
             "ov_place": split(place_value) @ out}
    return found | ({"neuron_logits": params["W_out"] @ params["W_U"]} if "W_out" in params else {})


def place_similarity(flags, params, draws=1000):
    """Are the position vectors of a_k and b_k alike? cosine and relative distance |x-y|^2 / (|x| |y|) per column from the
    units up, and their 1 %, 50 % and 99 % quantiles when the coordinates of y are permuted at random: [D, 2, 4]."""
    D, x = flags.digits, params["W_pos"]
    a, b = x[:D].flip(0), x[D + 1:2 * D + 1].flip(0)
    g = common.generator(0, "law")
    shuffle = torch.stack([torch.randperm(x.shape[1], generator=g) for _ in range(draws)])
    size = a.norm(dim=1) * b.norm(dim=1)
    both = lambda y: torch.stack([(a * y).sum(-1) / size, (a - y).square().sum(-1) / size], -1)  # [..., D, 2]
    null = both(b[:, shuffle].transpose(0, 1)).quantile(torch.tensor([.01, .5, .99], dtype=x.dtype), 0)  # [3, D, 2]
    return torch.cat([both(b)[None], null]).permute(1, 2, 0)


def anatomy(flags, params, ab):
    """Everything that is measured on one trained one-layer model; keys as in arrays.npz."""
    logits, seen = watch(flags, params, ab)
    score, fixed, _ = (x.mean(-1) for x in attend(params, ab, flags.n_heads))
    D = flags.digits
    found = {"attention": torch.cat([score[:, :D], fixed[:, :1], score[:, D:], fixed[:, 1:]], 1),
             "ablation": ablations(flags, params, ab),
             "cascade_loss": cascade_losses(flags, params), "gradient_input": gradient_input(flags, params, ab, flags.probe),
             "shortcuts": shortcuts(flags, params, ab), "place_similarity": place_similarity(flags, params),
             "delta_spectrum": evaluate(flags, params, ab)["delta"], **fourier(flags, params), **matrices(flags, params)}
    if "neurons" in seen:
        single, pairs = neuron_dependence(flags, seen["neurons"], ab)
        weight = seen["neurons"].var(0) / seen["neurons"].var(0).sum()
        found |= {"neuron_dependence": single, "neuron_pairs": pairs, "dependence_mean": weight @ single,
                  "pairs_mean": weight @ pairs}
        group = single[:, -D:].flip(1).argmax(1)  # the column that a neuron depends on most, from the units up
        loss = lambda **change: digit_losses(flags, watch(flags, params, ab, **change)[0], ab)[flags.digit]
        found["ablation_group"] = torch.stack([loss(neurons=lambda x, c=c: flat(x, group != c)) for c in range(D)]) - loss()
    return found


def develop(flags, params, ab):
    """The measures that are followed over training, on one snapshot."""
    found = {k: v for k, v in fourier(flags, params).items() if k in ("full_loss", "restricted_loss", "excluded_loss")}
    found["ablation"] = ablations(flags, params, ab)
    seen = watch(flags, params, ab)[1]
    if "neurons" in seen:
        weight = seen["neurons"].var(0) / seen["neurons"].var(0).sum()
        found["dependence_mean"] = weight @ neuron_dependence(flags, seen["neurons"], ab)[0]
    return found


# ---- Train ----------------------------------------------------------------------------------------------------------

def start(flags):
    """Step 0 of one run."""
    params = init(flags, common.generator(flags.seed, "init"))
    return {"params": params, **common.adam_init(params)}


def step_of(flags):
    """The training step of ONE run: state and digits ab [2D, batch] -> new state, logs."""
    def loss_of(params, ab, digit):
        if flags.study == "all":
            logits = forward(params, tokens_of(flags, ab), flags.n_heads, first=2 * flags.digits + 1)
            return nll(logits, torch.stack(columns(ab, flags.base)[2][::-1], 1)).mean()
        return nll(logits_of(flags, params, ab), target(ab, digit, flags.base)).mean()

    def step(state, ab, number):
        grads, loss = grad_and_value(loss_of)(state["params"], ab, number["digit"])
        size = common.norm(grads)
        scale = torch.where((number["clip"] > 0) & (size > number["clip"]), number["clip"] / size, 1.)
        grads = {k: scale * g for k, g in grads.items()}
        lr = number["lr"] * ((state["t"] + 1) / number["warmup"]).clamp(max=1)
        params, optimiser = common.adamw(state["params"], grads, state, lr, number["weight_decay"],
                                         number["beta1"], number["beta2"], number["eps"])
        logs = {"loss": loss, "grad_norm": size}
        if flags.study == "spikes":
            logs |= {"second_moment": sum(v.sum() for v in optimiser["v"].values()).sqrt(), "weight_norm": common.norm(params),
                     "update_norm": common.norm({k: params[k] - p for k, p in state["params"].items()})}
        return {"params": params, **optimiser}, logs
    return step


def train(runs, folder, evaluate=evaluate):
    """Train runs of one shape: `common.train` on fresh digits every step, evaluated on one fixed set."""
    flags, fixed = runs[0], evaluation_set(runs[0])
    return common.train(
        runs, folder, common.stack(start(run) for run in runs), common.numbers(runs), step_of(flags),
        draw=lambda r, chunk: sample(runs[r], common.generator(runs[r].seed, "train", chunk), common.CHUNK, flags.batch),
        evaluate=lambda r, params: evaluate(runs[r], params, fixed), eval_at=common.marks(flags.steps, flags.evals),
        label=f"{flags.study} d_model={flags.d_model} n_heads={flags.n_heads}")


# ---- Figures --------------------------------------------------------------------------------------------------------

DIGITS = ["units", "tens", "hundreds", "thousands"]
BLUE, RED, GREEN, PINK, ORANGE = common.COLOURS[:5]
STEPS = dict(xscale="log", xlabel="step (0 is drawn at 0.7)")  # axis settings of a development over training


def digit_name(flags, k):
    return "leading carry" if k == flags.digits else DIGITS[k] if k < 4 else f"10^{k}s"


def shelves(ax, flags, k):
    """The exact levels that a loss curve of digit k can rest on, dashed and labelled."""
    levels = floors(flags.base, flags.digits)[k]
    common.shelf(ax, levels[0], f"sees nothing: {levels[0]:.4g}")
    for seen, value in enumerate(levels[1:], 1):
        if np.isfinite(value) and value > 0:
            common.shelf(ax, value, f"sees {seen} column{'s' * (seen > 1)}: {value:.4g}")


def configurations(arrays, limit):
    """(name, mask over runs, digit) of the first `limit` configurations."""
    for name in list(dict.fromkeys(arrays["config"].tolist()))[:limit]:
        mine = arrays["config"] == name
        yield name, mine, int(arrays["digit"][mine][0])


def draw_curves(arrays, flags):
    """Loss of every configuration over training, with the exact shelves and the step of first descent."""
    parts = list(configurations(arrays, 4))
    figure, axes = common.panels(len(parts), "When does each digit's loss leave its shelf?", flags)
    for ax, (name, mine, k) in zip(axes, parts):
        common.band(ax, arrays["step"], geometric(arrays["loss"][:, mine]), "training loss, 10-step mean", BLUE)
        shelves(ax, flags, k)
        steps = arrays["descent"][mine]
        ax.plot(steps, np.full(len(steps), arrays["loss"][0, mine].max() * 1.6), "v", color=RED, ms=4, label="first descent")
        ax.set(xscale="log", yscale="log", xlabel="step", ylabel="loss (nats)", title=name)
        ax.legend(fontsize=7, loc="lower left")
    return figure


def draw_delta(arrays, flags):
    """Where the probability mass lies relative to the naive digit n = (a_k + b_k) mod base, over training and at the end."""
    parts = list(configurations(arrays, 2))
    figure, axes = common.panels(2 * len(parts),
                                 "Where the answer lies: its distance from the naive digit n = (a_k + b_k) mod base", flags)
    for row, (name, mine, k) in enumerate(parts):
        spectrum, x = arrays["eval_delta"][:, mine], np.maximum(arrays["eval_step"], .7)  # [M, R, carry, delta]
        carries = (0, 1) if k else (0,)  # no carry enters the units
        over, end = axes[2 * row:2 * row + 2]
        for c, delta, colour in ((0, 0, BLUE), (0, 1, RED), (1, 0, GREEN), (1, 1, PINK)):
            if c in carries:
                common.band(over, x, spectrum[:, :, c, delta], f"P(n{' + 1' * delta} | carry {c})", colour)
        over.set(**STEPS, ylim=(0, 1.02), ylabel="mean probability", title=f"{name}: over training")
        for c in carries:
            end.bar(np.arange(flags.base) + .4 * (c - .5), np.nanmedian(spectrum[-1, :, c], 0), .4, color=(BLUE, RED)[c],
                    label=f"carry {c}, median of {mine.sum()} runs")
        end.set(xlabel="delta = (answer - n) mod base", ylabel="mean probability", ylim=(0, 1.02), xticks=range(flags.base),
                title=f"{name}: at the end")
        for ax in (over, end):
            common.shelf(ax, 1 / flags.base, "chance, 1/base")
            ax.legend(fontsize=7)
    return figure


def draw_decomposition(arrays, flags):
    """Loss split into what is lost before the carry is asked for (pair) and what the carry costs (the rest)."""
    parts = list(configurations(arrays, 4))
    figure, axes = common.panels(len(parts), "What the loss consists of: pair = -ln(P_n + P_n+1), and the carry's part", flags)
    for ax, (name, mine, k) in zip(axes, parts):
        x, pair = np.maximum(arrays["eval_step"], .7), arrays["eval_pair"][:, mine]
        common.band(ax, x, arrays["eval_loss"][:, mine], "loss", BLUE)
        common.band(ax, x, pair, "pair: the column is not known", RED)
        common.band(ax, x, np.maximum(arrays["eval_loss"][:, mine] - pair, 0), "loss - pair: the carry is not known", GREEN)
        shelves(ax, flags, k)
        ax.set(**STEPS, ylim=(0, None), ylabel="nats on the evaluation set", title=name)
        ax.legend(fontsize=7)
    return figure


def draw_theory(arrays, flags):
    """The exact loss floors by digit and columns seen, and the carry probabilities."""
    figure, (left, right) = common.panels(2, f"What can be known: base {flags.base}, {flags.digits} digits (exact)", flags)
    for k, levels in enumerate(arrays["floor"]):
        good = np.isfinite(levels) & (levels > 0)
        left.plot(np.arange(len(levels))[good], levels[good], "o-", color=common.COLOURS[k % 8], ms=3,
                  label=digit_name(flags, k))
    left.set(yscale="log", xlabel="columns seen, from the own one down", ylabel="Bayes-optimal loss (nats)",
             xticks=range(flags.digits + 1))
    left.legend(fontsize=7)
    right.plot(arrays["carry_probability"], "o-", color=BLUE, label="P(carry into column k) = (1 - base^-k)/2")
    right.plot(range(1, flags.digits + 1), arrays["half_seen"][1:], "s--", color=RED,
               label="floor: own column and one digit of the next (nats)")
    right.plot(range(1, flags.digits), arrays["teacher_floor"][1:-1], "^--", color=GREEN,
               label="floor: own column and earlier answers (nats)")
    right.set(xlabel="column k", ylabel="probability, or nats", ylim=(0, 1))
    right.legend(fontsize=7)
    return figure


def draw_all(arrays, flags):
    """Loss of every answer digit over training, one panel for each answer mode."""
    parts = list(configurations(arrays, 2))
    figure, axes = common.panels(len(parts), "All digits at once: which is learned when?", flags)
    for ax, (name, mine, _) in zip(axes, parts):
        for k in range(flags.digits + 1):
            common.band(ax, np.maximum(arrays["eval_step"], .7), arrays["eval_digit_loss"][:, mine, k], digit_name(flags, k),
                        common.COLOURS[k % 8])
        if "teacher" in name:
            common.shelf(ax, teacher_floor(flags.base, 2), "own column and earlier answers", side="left")
            common.shelf(ax, leading_entropy(flags.base, flags.digits), "next to leading digit, sees only the leading one",
                         side="left")
        common.shelf(ax, carry_entropy(carry_probability(flags.base, 2)), "own column, no carry")
        common.shelf(ax, math.log(flags.base), "log base")
        ax.set(**STEPS, yscale="log", ylim=(1e-5, 5), ylabel="loss (nats)", title=name)
        ax.legend(fontsize=6.5, loc="lower left")
    return figure


def position_names(flags):
    D = flags.digits
    return [f"a{k}" for k in range(D - 1, -1, -1)] + ["+"] + [f"b{k}" for k in range(D - 1, -1, -1)] + ["="]


def token_names(flags):
    return [format(t, "x") for t in range(flags.base)] + ["+", "="]


def draw_attention(arrays, flags):
    """Where `=` looks, and the exact score table behind it, of the first run of each configuration."""
    parts = list(configurations(arrays, 2))
    figure, axes = common.panels(2 * len(parts),
                                 "Attention of `=`: mean weight, and the exact score of every token at every position", flags)
    for row, (name, mine, k) in enumerate(parts):
        left, right = axes[2 * row:2 * row + 2]
        common.image(left, arrays["attention"][mine][0], f"{name}: mean attention, run 0", figure, "position", "head", (0, 1))
        left.set(xticks=range(flags.positions), xticklabels=position_names(flags), yticks=range(min(flags.n_heads, 16)))
        head = int(arrays["attention"][mine][0][:, [flags.digits - 1 - min(k, flags.digits - 1)]].sum(1).argmax())
        scores = arrays["scores"][mine][0, head]
        common.image(right, (scores - scores.mean()).T, f"scores of head {head} (its mean removed)", figure, "position",
                     "token")
        right.set(xticks=range(flags.positions), xticklabels=position_names(flags), yticks=range(flags.vocab),
                  yticklabels=token_names(flags))
        for ax in (left, right):
            ax.tick_params(labelsize=7)
    return figure


def draw_dependence(arrays, flags):
    """Which inputs the neurons depend on, and what breaks when a part is mean-ablated."""
    D, parts = flags.digits, list(configurations(arrays, 2))
    figure, axes = common.panels(2 * len(parts), "Which inputs matter to the neurons, and which parts to the answer", flags)
    inputs = [n for n in position_names(flags) if n not in "+="] + [f"col {k}" for k in range(D - 1, -1, -1)]
    for row, (name, mine, k) in enumerate(parts):
        left, right = axes[2 * row:2 * row + 2]
        for key, x, n, colour in (("dependence_mean", np.arange(3 * D), "digits, columns", BLUE),
                                  ("pairs_mean", 3 * D + np.arange(D * (D - 1) // 2), "pairs of columns", RED)):
            if key in arrays and len(x):
                left.bar(x, np.median(arrays[key][mine], 0), color=colour, label=f"{n}, median of {mine.sum()} runs")
                left.plot(x, arrays[key][mine].T, ".", color="black", ms=2)
        pairs = [f"{i},{j}" for i in range(D - 1, -1, -1) for j in range(i - 1, -1, -1)]
        left.set(xticks=range(3 * D + len(pairs)), ylabel="share of neurons' variance", title=f"{name}: correlation ratio")
        left.set_xticklabels(inputs + pairs, rotation=90, fontsize=6)
        if "dependence_mean" in arrays:
            left.legend(fontsize=7, loc="upper left")
        labels = [f"head {h}" for h in range(flags.n_heads)] + ["MLP", "= to itself", "skip past MLP"]
        change = [arrays["ablation"][mine][:, :, k], arrays["shortcuts"][mine]]
        if "ablation_group" in arrays:
            labels, change = labels + [f"col-{c} neurons" for c in range(D)], [*change, arrays["ablation_group"][mine]]
        change = np.concatenate(change, 1)
        if len(labels) > 24:
            labels, change = labels[flags.n_heads:], change[:, flags.n_heads:]
        right.bar(range(len(labels)), np.median(change, 0), color=GREEN, label=f"median of {mine.sum()} runs")
        right.plot(change.T, ".", color="black", ms=3)
        right.set(xticks=range(len(labels)), ylabel="increase of the loss (nats)", title=f"{name}: mean ablation")
        right.set_xticklabels(labels, rotation=90, fontsize=6)
        right.set_yscale("symlog", linthresh=1e-3)
        common.shelf(right, floors(flags.base, D)[k, 0], "to seeing nothing")
        right.legend(fontsize=7)
    return figure


def draw_fourier(arrays, flags):
    """Is the column added as an angle? Frequencies of embedding, neurons and logits, and what each is needed for."""
    mine = next(configurations(arrays, 1))[1]
    name, w = arrays["config"][mine][0], np.arange(1, flags.base // 2 + 1)
    figure, (a, b, c, d) = common.panels(4, f"{name}: the column in the Fourier basis", flags)
    spectra = ((arrays["embedding_spectrum"][mine], "W_E", BLUE, -.2),
               (arrays["term_energy"][mine][:, 1, :, 2], "logits, terms of a+b", RED, .2))
    for values, label, colour, shift in spectra:
        a.bar(w + shift, np.median(values, 0), .4, color=colour, label=f"{label}, median of {mine.sum()} runs")
        a.plot(w + shift, values.T, ".", color="black", ms=3)
    a.set(xlabel="frequency", ylabel="share of power", xticks=w, title="Which frequencies are used")
    common.shelf(a, 1 / len(w), "evenly spread")
    b.bar(w, np.median(arrays["excluded_loss"][mine], 0), color=BLUE, label=f"excluded loss, median of {mine.sum()} runs")
    b.plot(w, arrays["excluded_loss"][mine].T, ".", color="black", ms=3)
    common.shelf(b, np.median(arrays["full_loss"][mine]), "full loss")
    common.shelf(b, np.median(arrays["restricted_loss"][mine]), "restricted loss (functions of a+b only)", RED)
    b.set(xlabel="frequency of a+b removed from the logits", ylabel="loss (nats)", xticks=w, yscale="log",
          title="Which are needed")
    before, after = (arrays["term_energy"][mine][:, i].sum(1) for i in (0, 1))
    for values, label, colour, shift in ((before, "neurons", BLUE, -.2), (after, "logits, after W_out W_U", RED, .2)):
        c.bar(np.arange(4) + shift, np.median(values, 0), .4, color=colour, label=label)
        c.plot(np.arange(4) + shift, values.T, ".", color="black", ms=3)
    c.set(xticks=range(4), xticklabels=["of a", "of b", "of a+b", "of a-b"], ylabel="share of power",
          title="What W_out W_U cancels")
    if "neuron_r2" in arrays:
        best = arrays["neuron_r2"][mine].max(-1).ravel()
        d.hist(best, np.linspace(0, 1, 41), color=GREEN, label=f"{mine.sum()} runs, all neurons")
        always = (arrays["neuron_active"][mine] > .99).mean()
        d.set(xlabel="R^2 of the nine terms of the best frequency", ylabel="neurons",
              title=f"{always:.0%} of the neurons are always active")
    for ax in (a, b, c, d)[:4 if "neuron_r2" in arrays else 3]:
        ax.legend(fontsize=7)
    return figure


def draw_matrices(arrays, flags):
    """The effective matrices of the first run: exact, no example involved."""
    name, mine, k = next(configurations(arrays, 1))
    figure, (a, b, c, d) = common.panels(4, f"{name}, run 0: the matrices that fix the model", flags)
    D = flags.digits
    head = int(arrays["attention"][mine][0][:, D - 1 - min(k, D - 1)].argmax())
    common.image(a, arrays["ov_token"][mine][0, head], f"head {head}: token read -> logits", figure, "logit", "token read")
    common.image(b, arrays["ov_place"][mine][0, head], f"head {head}: position read -> logits", figure, "logit", "position")
    b.set(yticks=range(flags.positions), yticklabels=position_names(flags))
    if "neuron_logits" in arrays:
        rows = arrays["neuron_logits"][mine][0][np.argsort(arrays["neuron_r2"][mine][0].argmax(-1), kind="stable")]
        common.image(c, rows, "neurons -> logits (ordered by frequency)", figure, "logit", "neuron")
    x = np.arange(D)
    for i, (label, colour) in enumerate((("cosine", BLUE), ("|x-y|^2 / |x||y|", RED))):
        values = arrays["place_similarity"][mine][:, :, i]  # [R, D, observed and null quantiles]
        d.plot(x, values[..., 0].T, "o", color=colour, ms=4)
        d.plot([], [], "o", color=colour, label=f"{label}, {mine.sum()} runs")
        d.fill_between(x, values[..., 1].min(0), values[..., 3].max(0), color=colour, alpha=.2, lw=0,
                       label="98 % of permuted coordinates")
    d.set(xlabel="column k", xticks=x, title="position vectors of a_k and b_k", ylabel="similarity")
    d.legend(fontsize=6.5)
    for ax in (a, b, c):
        ax.tick_params(labelsize=7)
        ax.set(xticks=range(flags.vocab), xticklabels=token_names(flags))
    return figure


def draw_cascade(arrays, flags):
    """Loss by the length of the carry's way, and the second opinion on which positions matter."""
    parts = list(configurations(arrays, 4))
    figure, (left, right) = common.panels(2, "How far does the carry come from, and where does the answer look?", flags)
    for i, (name, mine, k) in enumerate(parts):
        common.band(left, np.arange(k + 1), arrays["cascade_loss"][mine][:, :k + 1].T, name, common.COLOURS[i])
        right.plot(arrays["gradient_input"][mine].T, "-", color=common.COLOURS[i], lw=.8)
        right.plot([], [], color=common.COLOURS[i], label=f"{name} ({mine.sum()} runs)")
        left.plot(range(k + 1), np.median(arrays["cascade_loss"][mine][:, :k + 1], 0), "o", color=common.COLOURS[i], ms=4)
    left.set(yscale="log", xlabel="columns just below k that sum to base - 1", ylabel="loss (nats)",
             xticks=range(max(k for *_, k in parts) + 1))
    right.set(xticks=range(flags.positions), xticklabels=position_names(flags), yscale="log", xlabel="position",
              ylabel=f"mean |gradient x input| of {flags.probe}")
    common.shelf(left, math.log(flags.base), "log base")
    for ax in (left, right):
        ax.legend(fontsize=7)
    return figure


def draw_development(arrays, flags):
    """When each circuit appears: loss with a frequency removed, and with heads or the MLP ablated, over training."""
    parts = list(configurations(arrays, 2)) if "over_step" in arrays else []
    if not parts:  # a checkpoint has no history
        figure, (ax,) = common.panels(1, "No snapshots: train with --snapshots to see when each part appears", flags)
        return figure
    figure, axes = common.panels(2 * len(parts), "When does each part become necessary?", flags)
    for row, (name, mine, k) in enumerate(parts):
        left, right = axes[2 * row:2 * row + 2]
        x = np.maximum(arrays["over_step"], .7)
        common.band(left, x, arrays["over_full_loss"][:, mine], "loss", "black")
        common.band(left, x, arrays["over_restricted_loss"][:, mine], "restricted to a+b", "grey")
        for i in range(arrays["over_excluded_loss"].shape[-1]):
            common.band(left, x, arrays["over_excluded_loss"][:, mine, i], f"frequency {i + 1} excluded", common.COLOURS[i % 6])
        left.set(**STEPS, yscale="log", ylabel="loss (nats)", title=f"{name}: frequencies")
        change = arrays["over_ablation"][:, mine][..., k]
        common.band(right, x, change[..., -1], "MLP ablated", RED)
        common.band(right, x, change[..., :-1].max(-1), "the most important head ablated", BLUE)
        own = 2 * flags.digits + max(flags.digits - 1 - k, 0)
        if "over_dependence_mean" in arrays:
            share = arrays["over_dependence_mean"][:, mine, own]
            common.band(right, x, share, "share of neurons' variance from the own column", GREEN)
        right.set(**STEPS, ylabel="increase of loss (nats); share", title=f"{name}: parts")
        for ax in (left, right):
            ax.legend(fontsize=6)
    return figure


def draw_spikes(arrays, flags):
    """The first spike of each run: the quantities around it, and what each intervention just before does to it."""
    figure, (a, b) = common.panels(2, "What drives the repeated spike?", flags)
    t = np.arange(arrays["around_loss"].shape[0]) - SPIKE_BEFORE
    for key, colour in zip(AROUND, common.COLOURS):
        if arrays[f"around_{key}"].shape[1]:
            common.band(a, t, arrays[f"around_{key}"], key.replace("_", " "), colour)
    a.set(yscale="log", xlabel="step relative to the spike", ylabel="nats, or norm")
    a.axvline(0, color="grey", ls="--", lw=.8)
    for i, name in enumerate(arrays["intervention"].tolist()):
        worst = arrays["fork_worst"][:, i]
        b.plot(np.full(len(worst), i), worst, "o", color=common.COLOURS[i % 8], ms=5)
    b.axhline(1e-3, color="grey", ls="--", lw=.8)
    b.set(yscale="log", xticks=range(len(arrays["intervention"])), ylabel="highest loss in the window (nats)",
          title=f"{arrays['fork_worst'].shape[0]} spikes; dashed: the level that counts as a spike")
    b.set_xticklabels(arrays["intervention"].tolist(), rotation=30, ha="right", fontsize=7)
    if arrays["around_loss"].shape[1]:
        a.legend(fontsize=7)
    return figure


def draw_rows(arrays, flags):
    """Every configuration of the sweep: steps of descent and the final loss of each seed, beside what the notes say."""
    fields = ("digit", "d_model", "n_heads", "weight_decay", "eps", "steps")
    keys = list(zip(*(arrays[f].tolist() for f in fields)))
    configs = sorted(set(keys), key=lambda c: (c[0], c[3], c[4], c[2], c[1]))
    height = max(3.7, .16 * len(configs))
    figure, (a, b) = common.panels(2, "Every configuration: when it descends, where it ends", flags, size=(5.4, height))
    for y, config in enumerate(configs):
        mine = np.array([k == config for k in keys])
        descent, final = arrays["descent"][mine], np.maximum(arrays["final"][mine], 1e-13)
        a.plot(descent, np.full(mine.sum(), y), "o", color=BLUE, ms=3, alpha=.6)
        b.plot(final, np.full(mine.sum(), y), "o", color=BLUE, ms=3, alpha=.6)
        if np.isnan(descent).any():
            a.text(config[-1], y, f" {np.isnan(descent).sum()} never", fontsize=5, va="center")
        for _, *row, steps, quantity, low, high, _ in ROWS if not flags.sweep and config[4] == flags.eps else ():
            ax = {"descent": a, "final": b, "lowest": b}.get(quantity)
            if ax is not None and tuple(row) == config[:4] and math.isfinite(high) and low > 0:
                ax.plot([low, high], [y, y], color=RED, lw=4, alpha=.35, solid_capstyle="butt")
    a.plot([], [], color=RED, lw=4, alpha=.35, label="the notes, with their tolerance")
    a.set(xscale="log", xlabel="step of first descent", yticks=range(len(configs)))
    a.set_yticklabels([f"{digit_name(flags, k)} {d}/{h} decay {decay:g}" + f" eps {eps:g}" * (eps != flags.eps)
                       for k, d, h, decay, eps, _ in configs], fontsize=5.5)
    b.set(xscale="log", xlabel="final loss (nats)", yticks=[], xlim=(1e-13, 5))
    for level, text in zip(floors(flags.base, flags.digits)[1, :2], ("log base", "no carry")):
        b.axvline(level, color="grey", ls="--", lw=.8)
        b.text(level, len(configs), text, fontsize=6, color="grey", ha="right", rotation=90, va="top")
    a.legend(fontsize=6, loc="upper left")
    return figure


def draw_heat(arrays, flags):
    """Share of seeds that converge (10-step mean below 1e-3), by width and heads, one panel for each digit."""
    digits = [k for k in sorted(set(arrays["digit"].tolist()))][:4]
    figure, axes = common.panels(len(digits),
                                 "Share of seeds that reach 1e-3, by width and heads (number of seeds in brackets)", flags)
    for ax, k in zip(axes, digits):
        d, h = (sorted(set(arrays[n][arrays["digit"] == k].tolist())) for n in ("d_model", "n_heads"))
        share = np.full((len(d), len(h)), np.nan)
        for i, j in itertools.product(range(len(d)), range(len(h))):
            mine = (arrays["digit"] == k) & (arrays["d_model"] == d[i]) & (arrays["n_heads"] == h[j])
            if mine.any():
                share[i, j] = np.isfinite(arrays["reach"][mine]).mean()
                ax.text(j, i, f"{share[i, j]:.2f}\n({mine.sum()})", ha="center", va="center", fontsize=6)
        ax.imshow(share, vmin=0, vmax=1.4, cmap="Blues", aspect="auto")
        ax.set(xticks=range(len(h)), yticks=range(len(d)), xlabel="n_heads", ylabel="d_model", title=digit_name(flags, k))
        ax.set_xticklabels(h)
        ax.set_yticklabels(d)
    return figure


# ---- Main -----------------------------------------------------------------------------------------------------------

NOTES = "research notes, 2023-04-18"


def config_name(run):
    """A configuration in words, with the notes' width/heads."""
    if run.study == "all":
        return f"{run.answer} {run.d_model}/{run.n_heads}"
    return f"{digit_name(run, run.digit)} {run.d_model}/{run.n_heads} decay {run.weight_decay:g}"


def train_groups(groups, folder, evaluate=evaluate):
    """Train every group of runs; returns a list of (runs, params, metrics, snapshots, milestones)."""
    parts = []
    for i, runs in enumerate(groups):
        sub = folder.sub(i, len(groups))
        state, metrics, snapshots = train(runs, sub, evaluate)
        blind = np.array([math.log(r.base) if r.study == "all" else floors(r.base, r.digits)[r.digit, 0] for r in runs])
        found = milestones(metrics["loss"], blind)
        sub.result(runs, metrics, {"loss": metrics["eval_loss"][-1], "accuracy": metrics["eval_accuracy"][-1], **found},
                   snapshots)
        parts.append((runs, state["params"], metrics, snapshots, found))
        if folder.interrupted:
            break
    return parts


def curves(parts):
    """The arrays of trained groups side by side: step [T], eval_step [M], loss [T, R], eval_* [M, R, ...], milestones,
    digit and config [R], and delta_spectrum [R, 2, base], the last of eval_delta. Groups of different length are cut to the
    shortest."""
    T, M = (min(len(m[k]) for _, _, m, *_ in parts) for k in ("step", "eval_step"))
    runs = [r for part in parts for r in part[0]]
    arrays = {"step": parts[0][2]["step"][:T], "eval_step": parts[0][2]["eval_step"][:M],
              "digit": np.array([r.digit for r in runs]), "config": np.array([config_name(r) for r in runs]),
              "loss": np.concatenate([p[2]["loss"][:T] for p in parts], 1)}
    arrays |= {k: np.concatenate([p[2][k][:M] for p in parts],
                                 1) for k in parts[0][2] if k.startswith("eval_") and k != "eval_step"}
    if "eval_delta" in arrays:
        arrays["delta_spectrum"] = arrays["eval_delta"][-1]
    return arrays | {k: np.concatenate([p[4][k] for p in parts]) for k in parts[0][4]}


def compute_digit(flags, folder):
    """Train the configurations of --sweep; arrays as in `curves`, and rest_level, rest_step [R] of the first shelf below
    the blind one."""
    arrays = curves(train_groups(common.groups_of_runs(flags), folder))
    level, step = np.concatenate([resting_level(arrays["loss"][:, [i]], floors(flags.base, flags.digits)[k, 0] - .1, .5)
                                  for i, k in enumerate(arrays["digit"])], 1)
    return arrays | {"rest_level": level, "rest_step": step}


def judge_digit(arrays, flags):
    """The notes' sentences about units and tens at 128/4."""
    enough = (flags.d_model, flags.n_heads, flags.base) == (128, 4, 10) and flags.steps >= 1000
    claims = []

    def add(id, statement, quote, expected, measured, agree, enough=enough):
        claims.append(common.claim(id, statement, f'{NOTES}: "{quote}"', expected, measured, agree, enough))
    for k, name in ((0, "units"), (1, "tens")):
        mine = arrays["digit"] == k
        if not mine.any():
            continue
        descent, bump, lowest, level = (arrays[n][mine] for n in ("descent", "bump", "lowest", "rest_level"))
        add(f"{name}-descend", f"the {name} at 128/4 leave log 10 at step 100 to 240", "first descent at 120", "100 .. 240",
            descent, (descent >= 100) & (descent <= 240))
        if k == 0:
            add("units-bump", "after the descent the units' loss grows back by 10 % or more before step 600 (decay .25)",
                "WD=0.25: a brief step / mild growback at 200-300 batches is still visible", ">= 1.1", bump, bump >= 1.1,
                enough and flags.weight_decay == .25)
            add("units-zero", "the units' loss falls below 1e-7", "descent to 8e-9 & stability", "< 1e-7", lowest,
                lowest < 1e-7)
            continue
        at = np.array([np.abs(arrays["eval_step"] - s).argmin() if s == s else 0 for s in arrays["rest_step"][mine]])
        loss, pair = (arrays[f"eval_{n}"][:, mine][at, np.arange(mine.sum())] for n in ("loss", "pair"))
        excess = loss - pair - floors(flags.base, flags.digits)[1, 1]
        kinds = [shelf_kind(flags, 1, a, b, math.inf) for a, b in zip(loss, pair)]
        add("tens-shelf", "the tens' first shelf lies at .72 to .86 nats", "a consistent 0.8-step", ".72 .. .86", level,
            (level >= .72) & (level <= .86))
        add("tens-shelf-parts",
            "that shelf is what the column still costs, plus H(p_1) for the carry: loss - pair - H(p_1) is 0",
            "log2; p(naive-sum-digit), p(naive-sum-digit+1)", "within .1", excess, np.abs(excess) < .1)
        add("tens-carry-blind", "on that shelf the model knows its column and not the carry",
            "the theory that it learns to choose between the two possible ones", "carry-blind", ", ".join(kinds),
            np.array([x == "carry-blind" for x in kinds]))
    return claims


# The notes' tables: (id, digit, d_model, n_heads, weight_decay, steps, quantity, lowest, highest, sentence). A quoted step
# counts as reproduced within a factor 1.5, a small loss within a factor 3, a visible bump is a regrowth by 10 % or more
# (the notes read all of them off graphs). Where the notes name no decay: 0 for the units, .25 for the others.
STEP = lambda s: ("descent", s / 1.5, s * 1.5)
LEVEL = lambda x: ("final", x / 1.5, x * 1.5)
FALLS_TO = lambda x: ("lowest", x / 3, x * 3)
CONVERGES, STUCK = ("reach", 1, 1e9), ("reach", math.inf, math.inf)  # a step that never comes counts as infinite
U, T, H, K = 0, 1, 2, 3
ROWS = [
    ("u1", U, 128, 4, 0, 3000, *STEP(120), "decay 0: first descent at 120"),
    ("u2", U, 128, 4, 0, 3000, "lowest", 0, 60e-12 * 3, "decay 0: descent to at least 60e-12"),
    ("u3", U, 128, 4, 1, 3000, *STEP(140), "decay 1: first descent at 140ish"),
    ("u4", U, 128, 4, 1, 3000, "bump", 1.1, math.inf, "decay 1: a bump at 200-280ish"),
    ("u5", U, 128, 4, 1, 3000, *FALLS_TO(20e-9), "decay 1: log-linear descent to 20e-9, then stability"),
    ("u6", U, 128, 4, 1, 3000, "lowest_step", 1600 / 1.5, 1600 * 1.5, "decay 1: lowest at 1600ish"),
    ("u7", U, 128, 4, .5, 3000, *FALLS_TO(8e-9), "decay .5: descent to 8e-9"),
    ("u8", U, 128, 4, .25, 3000, "bump", 1.1, math.inf, "decay .25: a mild growback at 200-300 is still visible"),
    ("u9", U, 128, 4, .2, 3000, "bump", 0, 1.1, "decay .2: the brief step is not visible"),
    ("u10", U, 128, 4, .1, 3000, "bump", 0, 1.1, "decay .1: the brief step is not visible"),
    ("u11", U, 4, 4, 0, 5000, *STEP(2400), "4/4: log10 all the way to 2400ish"),
    ("u12", U, 4, 4, 0, 5000, *STUCK, "4/4: the descent does not complete by 5k"),
    ("u13", U, 8, 4, 0, 5000, *STEP(1700), "8/4: log10 until 1700ish"),
    ("u14", U, 8, 4, 0, 5000, "lowest", 0, 400e-12 * 3, "8/4: loglinear to 400e-12 at 5k"),
    ("u15", U, 16, 4, 0, 5000, *STEP(1200), "16/4: log10 until 1200"),
    ("u16", U, 16, 1, 0, 5000, *STEP(600), "16/1: descent much sooner, at around 600"),
    ("u17", U, 4, 1, 0, 5000, *STEP(2600), "4/1: descends slowly and late, ~2600"),
    ("u18", U, 8, 1, 0, 5000, *STEP(1800), "8/1: descent by 1800ish"),
    ("u19", U, 8, 1, 0, 5000, *LEVEL(.1), "8/1: keeps dropping to 0.1 at 5k"),
    ("u20", U, 128, 128, 0, 3000, *STEP(120), "128/128: nothing new"),
    ("u21", U, 32, 32, 0, 3000, *STEP(640), "32/32: log10 until 640ish"),
    ("u22", U, 8, 8, 0, 5000, *STEP(1600), "8/8: log10 until 1600ish"),
    ("u23", U, 8, 8, 0, 5000, "spikes", 1, math.inf, "8/8: spike at 4250ish"),
    ("u24", U, 3, 3, 0, 10000, *STEP(5400), "3/3: at 5400ish"),
    ("u25", U, 2, 2, 0, 30000, "descent", 10000, math.inf, "2/2: not by 10k"),
    ("u26", U, 2, 2, 0, 30000, *STEP(26900), "2/2: extremely eventually, at around 26900"),
    ("u27", U, 2, 1, 0, 10000, *STEP(5400), "2/1: descends from log10 faster, at 5400ish"),
    ("u28", U, 2, 1, 0, 10000, "final", 1.8, 2.2, "2/1: gets stuck at a loss of 2"),
    ("u29", U, 1, 1, 0, 50000, "descent", 50000, math.inf, "1/1: does not descend from log10 in 50k"),
    ("t1", T, 128, 1, .25, 5000, *STUCK, "128/1: breaks the convergence"),
    ("t2", T, 128, 2, .25, 5000, *CONVERGES, "128/2: converges"),
    ("t3", T, 128, 4, .25, 5000, *CONVERGES, "128/4: converges"),
    ("t4", T, 64, 2, .25, 5000, *STUCK, "64/2: doesn't"),
    ("t5", T, 64, 4, .25, 5000, *CONVERGES, "64/4: does"),
    ("t6", T, 32, 4, .25, 5000, *STUCK, "32/4: not"),
    ("t7", T, 32, 8, .25, 5000, *STUCK, "32/8: nope"),
    ("t8", T, 32, 16, .25, 5000, *CONVERGES, "32/16: looks converging"),
    ("t9", T, 16, 16, .25, 5000, *CONVERGES, "16/16: converges"),
    ("t10", T, 8, 8, .25, 15000, *LEVEL(math.exp(-2.5)), "8/8: descends to e^-2.5 by 15k"),
    ("t11", T, 8, 1, .25, 5000, "final", .66, .8, "8/1: to log2, a little higher"),
    ("t12", T, 8, 2, .25, 5000, "final", 1.26, 1.54, "8/2: to 2.1 first and to 1.4 second"),
    ("t13", T, 8, 4, .25, 5000, "final", .66, .8, "8/4: ~0.73 at 5k"),
    ("t14", T, 128, 128, .25, 3000, *CONVERGES, "128/128: converges"),
    ("t15", T, 256, 1, .25, 3000, *STUCK, "256/1: does not converge"),
    ("t16", T, 256, 2, .25, 3000, *CONVERGES, "256/2: does"),
    ("t17", T, 512, 1, .25, 2000, *STUCK, "512/1: doesn't"),
    ("t18", T, 512, 2, .25, 2000, *CONVERGES, "512/2: does"),
    ("t19", T, 128, 4, .5, 5000, "spikes", 3, 3, "decay .5: peaks thrice in 5k"),
    ("t20", T, 128, 4, 0, 5000, "spikes", 0, 0, "128/4 decay 0: no spike in 5k"),
    ("t21", T, 128, 4, .1, 5000, "spikes", 1, 2, "decay .1: repeats only once or twice"),
    ("t22", T, 128, 4, .15, 5000, "spikes", 0, 0, "decay .15: no (or too small) spike"),
    ("t23", T, 128, 4, .2, 5000, "spikes", 1, 2, "decay .2: one and a half spikes"),
    ("t24", T, 128, 4, .225, 5000, "spikes", 2, math.inf, "decay .225: multiple spikes"),
    ("t25", T, 128, 8, 0, 5000, "spikes", 0, 0, "128/8 decay 0: no spike"),
    ("t26", T, 128, 2, 0, 5000, "spikes", 1, math.inf, "128/2 decay 0: spikes"),
    ("h1", H, 128, 4, .25, 5000, *STUCK, "hundreds 128/4: doesn't do it"),
    ("h2", H, 128, 128, .25, 5000, *CONVERGES, "hundreds 128/128: yep"),
    ("h3", H, 128, 32, .25, 5000, *CONVERGES, "hundreds 128/32: also yep"),
    ("h4", H, 128, 8, .25, 5000, *CONVERGES, "hundreds 128/8: also yep"),
    ("k1", K, 128, 128, .25, 5000, *STUCK, "thousands 128/128: doesn't"),
    ("k2", K, 256, 256, .25, 3000, *STUCK, "thousands 256/256: also doesn't"),
]


def points_of(flags):
    """Configurations of study `sweep`: the grid of --sweep, or every row of the notes' tables with its own number of
    steps (scaled by --steps / 5000) and three more values of eps for the floor that decay sets."""
    if flags.sweep:
        grid = common.swept(flags)
        return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    rows = {(digit, d, h, decay, flags.eps, steps) for _, digit, d, h, decay, steps, *_ in ROWS}
    rows |= {(U, 128, 4, .5, eps, 3000) for eps in (1e-9, 1e-7, 1e-6)}
    if flags.smoke:
        rows = {r for r in rows if r[1] <= 2}
    points = [dict(digit=k, d_model=d, n_heads=h, weight_decay=w, eps=e, steps=max(1, n * flags.steps // 5000))
              for k, d, h, w, e, n in sorted(rows)]
    return sorted(points, key=lambda p: (p["d_model"] + 4 * p["n_heads"]) ** 2 * p["steps"])


def compute_sweep(flags, folder):
    """Train every configuration; table.md in the folder is the result in words. Arrays [R]: the swept fields, seed,
    milestones, kind (of the level on which a run ends, see shelf_kind), delta_spectrum [R, 2, base]; curve [R, 200] at
    curve_step [R, 200], the 10-step geometric mean of the loss at log-spaced steps."""
    small = lambda p: p.get("d_model", flags.d_model) <= 4  # sixteen such runs take as long as four
    groups = [g for tiny, points in itertools.groupby(points_of(flags), small)
              for g in common.groups_of_runs(replace(flags, runs=flags.runs * (4 if tiny else 1)), list(points))]
    parts = train_groups(groups, folder)
    runs = [r for part in parts for r in part[0]]
    arrays = {k: np.array([getattr(r, k) for r in runs]) for k in
              ("digit", "d_model", "n_heads", "weight_decay", "eps", "steps", "seed", *common.swept(flags))}
    arrays |= {k: np.concatenate([p[4][k] for p in parts]) for k in parts[0][4]}
    ends = [evaluate(run, common.run_of(params, r), evaluation_set(flags)) for group, params, *_ in parts
            for r, run in enumerate(group)]
    arrays["delta_spectrum"] = np.stack([e["delta"].numpy() for e in ends])
    arrays["kind"] = np.array([shelf_kind(run, run.digit, *(float(e[k]) for k in ("loss", "pair", "alias")))
                               for run, e in zip(runs, ends)])
    at = [np.unique(np.geomspace(1, len(p[2]["step"]), 200).round()).astype(int) for p in parts]
    pad = lambda x: np.pad(x.astype(float), [(0, 0), (0, 200 - x.shape[1])], constant_values=np.nan)
    arrays["curve"] = np.concatenate([pad(geometric(p[2]["loss"])[i - 1].T) for i, p in zip(at, parts)])
    arrays["curve_step"] = np.concatenate([pad(np.tile(i, (len(p[0]), 1))) for i, p in zip(at, parts)])
    folder.write("table.md", table(arrays, flags).encode())
    return arrays


def table(arrays, flags):
    """A markdown table, one row for each configuration: how many seeds converge (10-step mean below 1e-3), the median step
    of first descent, the final loss and the kind of level that it rests on, and beside it the notes with their verdict."""
    fields = ("digit", "d_model", "n_heads", "weight_decay", "eps", "steps")
    keys = list(zip(*(arrays[f].tolist() for f in fields)))
    verdict = {c["id"]: {True: "agrees", False: "disagrees", None: "undecided"}[c["holds"]] for c in judge_sweep(arrays, flags)}
    lines = ["| digit | width/heads | decay | steps | converge | descent, median | final loss | ends | the notes say |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for key in sorted(set(keys), key=lambda c: (c[0], c[3], c[4], c[1], c[2])):
        k, d, heads, decay, eps, steps = key
        mine = np.array([x == key for x in keys])
        descent = np.where(np.isnan(arrays["descent"][mine]), np.inf, arrays["descent"][mine])
        kinds = {x: int((arrays["kind"][mine] == x).sum()) for x in sorted(set(arrays["kind"][mine].tolist()))}
        said = [f"{sentence}: **{verdict[id]}**" for id, *row, n, _, _, _, sentence in ROWS
                if id in verdict and row == [k, d, heads, decay] and eps == flags.eps and steps == max(1,
                                                                                                       n * flags.steps // 5000)]
        cells = (digit_name(flags, k), f"{d}/{heads}", f"{decay:g}" + f", eps {eps:g}" * (eps != flags.eps), steps,
                 f"{np.isfinite(arrays['reach'][mine]).sum()} of {mine.sum()}", f"{np.median(descent):.0f}",
                 common.spread(arrays["final"][mine]), ", ".join(f"{x} {n}" for x, n in kinds.items()), "; ".join(said))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def judge_sweep(arrays, flags):
    """One claim for each row of the notes' tables, and the sentences about trends."""
    if flags.sweep:
        return []
    enough, claims = flags.steps >= 5000 and not flags.smoke, []

    def add(id, statement, quote, expected, measured, agree):
        claims.append(common.claim(id, statement, f'{NOTES}: "{quote}"', expected, measured, agree, enough))

    def pick(k, d, h, decay, eps=flags.eps):
        return ((arrays["digit"] == k) & (arrays["d_model"] == d) & (arrays["n_heads"] == h)
                & np.isclose(arrays["weight_decay"], decay) & np.isclose(arrays["eps"], eps, rtol=1e-3, atol=0))

    def median(key, mine):
        """Median over runs, where a step that never comes is infinite; NaN without runs."""
        return np.median(np.where(np.isnan(arrays[key][mine]), np.inf, arrays[key][mine])) if mine.any() else math.nan

    for name, k, d, h, decay, steps, quantity, low, high, sentence in ROWS:
        mine = pick(k, d, h, decay) & (arrays["steps"] == max(1, steps * flags.steps // 5000))
        if mine.any():
            value = np.where(np.isnan(arrays[quantity][mine]), np.inf, arrays[quantity][mine])
            add(name, f"{digit_name(flags, k)}, {sentence}", sentence, f"{quantity} {low:.3g} .. {high:.3g}",
                f"{quantity} {common.spread(arrays[quantity][mine])}", (value >= low) & (value <= high))

    widths = np.array([8, 16, 128])
    steps = np.array([median("descent", pick(U, d, 4, 0)) for d in widths])
    if np.isfinite(steps).all():
        factor = math.exp(-np.polyfit(np.log2(widths), np.log(steps), 1)[0])
        add("width-delays", "halving the width delays the units' descent by about 1.5 (4 heads, widths 8 to 128)",
            "smth like x1.5 time to drop per /2 of d_model", "1.3 .. 1.75", f"x{factor:.2f}", 1.3 <= factor <= 1.75)
    waits = np.array([median("descent", pick(U, d, d, 0)) for d in (8, 4, 3, 2)])
    if not np.isnan(waits).any():
        growth = (waits[1:] / waits[:-1]) ** (1 / np.log2([2, 4 / 3, 3 / 2]))
        add("width-hyper", "near width 2 the delay per halving grows (8/8, 4/4, 3/3, 2/2)",
            "maybe hyperexponentially, when close to 0",
            "increasing",
            f"medians {', '.join(f'{x:.0f}' for x in waits)}; per halving {', '.join(f'x{x:.2f}' for x in growth)}",
            bool(np.all(np.diff(growth) > 0)) if np.isfinite(waits).all() else None)
    mine = pick(U, 2, 2, 0)
    done = arrays["descent"][mine & np.isfinite(arrays["descent"])]
    if len(done) >= 8:  # above a dead time, exponential waits have deviation = mean; waits that scatter around a mean have not
        ratio = done.std(ddof=1) / (done.mean() - done.min())
        add("waiting-exponential", "the waiting times of 2/2 over seeds are exponential above a dead time",
            "chances of extant circuits to be accidentally close enough to the necessary basin of attraction",
            "deviation / mean excess .75 .. 1.33", f"{ratio:.2f}, {len(done)} of {mine.sum()} seeds descended",
            .75 <= ratio <= 1.33 if len(done) >= .8 * mine.sum() else None)
    wait = lambda d, h: np.nan_to_num(arrays["descent"][pick(U, d, h, 0)], nan=1e9)
    pairs = [(16, 1, 4), (8, 1, 4), (8, 4, 8), (4, 1, 4)]
    pairs = [(d, few, many) for d, few, many in pairs if len(wait(d, few)) and len(wait(d, many))]
    if pairs:
        later = np.array([np.mean(wait(d, many)[:, None] > wait(d, few)) for d, few, many in pairs])
        add("heads-slow-units",
            "more heads slow the units by more than seeds differ (a run with more heads descends later than one "
            "with fewer, in 3 of 4 pairs of runs)", "for this task more heads are worse (considerably slow down convergences)",
            "each share > .75", ", ".join(f"{d}/{m} after {d}/{f}: {x:.2f}" for (d, f, m), x in zip(pairs, later)),
            True if (later > .75).all() else None if (later > .75).any() else False)
    floor = [(w * e, y) for w, e in ((.25, 1e-8), (.5, 1e-8), (1, 1e-8), (.5, 1e-9), (.5, 1e-7), (.5, 1e-6))
             for y in arrays["final"][pick(U, 128, 4, w, e)]]
    if floor:
        slope = np.polyfit(*np.log(np.array(floor).T), 1)[0]
        add("decay-floor", "decay sets a floor on the units' loss, proportional to weight_decay x eps",
            "WD=1: to 20e-9; WD=0.5: to 8e-9",
            "log-log slope .8 .. 1.2", f"slope {slope:.2f} over {len(floor)} runs", .8 <= slope <= 1.2)
        slow = (arrays["final"] / arrays["lowest"])[pick(U, 128, 4, .5)]
        add("slow-regrowth",
            "at decay .5 the units' loss slowly grows back by 5 % or more after its lowest (whether it is the early bump "
            "slowed down, this cannot tell)", "dips to 7-8 & then slowly goes back to 8-9", ">= 1.05", slow, slow >= 1.05)
    damp = [median("vibration", pick(T, 128, 4, w)) for w in (0, .25, .5)]
    if not np.isnan(damp).any():
        add("decay-damps", "decay damps the tens' vibration (deviation of log loss after step 1000, decay 0 against .25)",
            "WD=0.25 diminishes the loss vibration drastically", "at most half",
            "{:.3g} at 0, {:.3g} at .25, {:.3g} at .5".format(*damp), damp[1] <= damp[0] / 2)
    speed = np.array([median("reach", pick(T, 128, h, .25)) for h in (1, 2, 4, 128)])
    if not np.isnan(speed).any():
        add("heads-speed-tens", "more heads make the tens converge sooner (128 wide; 1, 2, 4, 128 heads)",
            "more heads makes things happen faster I think", "decreasing", ", ".join(f"{x:.0f}" for x in speed),
            bool(np.all(np.diff(np.minimum(speed, 1e9)) < 0)))
    alone = np.concatenate([arrays["reach"][pick(T, d, 1, .25)] for d in (128, 256, 512)])
    if len(alone):
        add("one-head-fails-tens", "one head fails the tens at widths 128, 256 and 512", "1 is too few (even for 512/1)",
            "never below 1e-3", f"{np.isfinite(alone).sum()} of {len(alone)} runs converge", np.isnan(alone))
    decays = [w for w in (0, .1, .15, .2, .225, .25, .5) if pick(T, 128, 4, w).any()]
    spikes = [(w, arrays["spikes"][pick(T, 128, 4, w)].mean()) for w in decays]
    if len({s for _, s in spikes}) > 1:
        rank = np.corrcoef(*(np.argsort(np.argsort(x)) for x in zip(*spikes)))[0, 1]
        add("decay-spikes", "the repeated spike of the tens grows with weight decay",
            "a repeatable gradient spike, intensified by WD",
            "rank correlation over decays > .7",
            f"{rank:.2f}; spikes a run: " + ", ".join(f"{w:g}: {s:.2g}" for w, s in spikes),
            True if rank > .7 else False if rank < .3 else None)
    return claims


def compute_all(flags, folder):
    """Train every answer mode; arrays as in `curves` with eval_digit_loss [M, R, D+1] (digits from the units up) and
    ablation [R, parts, D+1]: heads in order, then the MLP."""
    parts = train_groups(common.groups_of_runs(flags), folder, evaluate_all)
    fixed = evaluation_set(flags)[:, :EXAMPLES // 4]
    change = [ablations(run, common.run_of(params, r), fixed) for runs, params, *_ in parts for r, run in enumerate(runs)]
    return curves(parts) | {"ablation": torch.stack(change)}


def judge_all(arrays, flags):
    """Are the units first, and does teacher forcing leak?"""
    claims, enough = [], flags.steps >= 2000 and flags.base == 10
    loss, teacher = arrays["eval_digit_loss"], np.char.startswith(arrays["config"], "teacher")
    below = loss < .1  # [M, R, D+1]
    when = np.where(below.any(0), below.argmax(0), len(loss))  # [R, D+1]
    for mode, mine in (("teacher", teacher), ("parallel", ~teacher)):
        if mine.any():
            first = [digit_name(flags, int(w.argmin())) if w.min() < len(loss) else "none" for w in when[mine]]
            claims.append(common.claim(
                f"units-first-{mode}", f"with {mode} answers the units are the first digit below .1 nats",
                f'{NOTES}: "training on all digits simultaneously"', "units", ", ".join(first),
                np.array([f == "units" for f in first]), enough))
    if teacher.any() and (~teacher).any() and flags.digits > 2:
        fed, alone = loss[-1][teacher, 2], loss[-1][~teacher, 2]
        claims.append(common.claim(
            "teacher-leaks", "teacher forcing makes the hundreds easier: each teacher run ends below each parallel one",
            "the earlier answer digits give away the carry where n = base - 1", "teacher < parallel",
            f"teacher {common.spread(fed)}; parallel {common.spread(alone)}",
            True if fed.max() < alone.min() else False if np.median(fed) >= np.median(alone) else None, enough))
    return claims


def compute_theory(flags, folder):
    """Exact: carry_probability [D+1], floor [D+1, D+2] (digit, columns seen), half_seen [D+1], teacher_floor [D+1],
    leading_entropy [] and one_wide_bound [], the least loss of any model whose residual stream is one number."""
    arrays = {"carry_probability": [carry_probability(flags.base, k) for k in range(flags.digits + 1)],
              "floor": floors(flags.base, flags.digits),
              "half_seen": [math.nan] + [half_seen_floor(flags.base, k) for k in range(1, flags.digits + 1)],
              "teacher_floor": [teacher_floor(flags.base, k) for k in range(flags.digits)] + [math.nan],
              "leading_entropy": leading_entropy(flags.base, flags.digits), "one_wide_bound": one_wide_bound(flags)}
    print(f"base {flags.base}, {flags.digits} digits; loss in nats of digit k by columns seen")
    for k in range(flags.digits + 1):
        seen = "  ".join(f"{x:.7f}" for x in arrays["floor"][k] if np.isfinite(x))
        print(f"  {digit_name(flags, k):14} P(carry in) {arrays['carry_probability'][k]:.6f}   {seen}")
    print(f"  tens, own column and one digit below: {arrays['half_seen'][1]:.6f}")
    print(f"  H(z_{flags.digits - 1} | z_{flags.digits}) = {arrays['leading_entropy']:.6f}")
    print(f"  least units' loss found for a residual stream of one number: {arrays['one_wide_bound']:.3f}")
    return arrays


def one_wide_bound(flags, starts=64, steps=2000):
    """Least loss of the units that a model with d_model = 1 can have, whatever comes before W_U: its logits are x u with
    one number x per answer and u in R^vocab. Best of many descents on (x, u): numerical, not proved."""
    g = common.generator(0, "law")
    values = {"x": 3 * torch.randn(starts, flags.base, 1, generator=g), "u": torch.randn(starts, 1, flags.vocab, generator=g)}
    state = common.adam_init(values)
    labels = torch.arange(flags.base).expand(starts, -1)
    loss_of = lambda v: nll(v["x"] * v["u"], labels).mean(1).sum()
    for _ in range(200 if flags.smoke else steps):
        values, state = common.adamw(values, torch.func.grad(loss_of)(values), state, .03)
    return nll(values["x"] * values["u"], labels).mean(1).min().item()


def judge_theory(arrays, flags):
    """The identities that hold at base 10 and five digits, and the shelf that the notes read as log 2."""
    tens = float(arrays["floor"][1, 1])
    bound = float(arrays["one_wide_bound"])
    return [common.claim("tens-at-log2", "the shelf of tens that know no carry is log 2",
                         f'{NOTES}: "8/1: yep to log2. a little higher actually"',
                         f"{math.log(2):.7f}",
                         f"{tens:.7f}, since the carry has probability {arrays['carry_probability'][1]:.2f}",
                         abs(tens - math.log(2)) < 1e-4),
            common.claim("one-wide-can", "a 1/1 model can leave log base at all",
                         f'{NOTES}: "1/1: does not descend from log10 in 50k"',
                         f"< {math.log(flags.base):.3f}", f"the best readout of one number has {bound:.3f} nats",
                         bound < math.log(flags.base) - .1, not flags.smoke)]


def compute_anatomy(flags, folder):
    """Take models apart: those of --checkpoint, or new ones. Arrays: digit, config [R], everything that `anatomy` returns
    [R, ...], and over training, from snapshots, over_step [S] and what `develop` returns as over_* [S, R, ...]."""
    fixed = evaluation_set(flags)
    if flags.checkpoint:
        saved = common.load_checkpoint(flags.checkpoint)["params"]
        common.same_shapes({"params": common.run_of(saved, 0), "optimiser": {}}, {"params": start(flags)["params"]},
                           flags.checkpoint)
        runs, snapshots = [flags] * len(saved["W_E"]), {}
        params = [common.run_of(saved, r) for r in range(len(runs))]
    else:
        groups = common.groups_of_runs(flags)
        if len(groups) > 1:
            raise common.Stop("--study anatomy compares runs of one shape: sweep fields that are numbers, such as digit")
        (runs, saved, _, snapshots, _), = train_groups(groups, folder)
        params = [common.run_of(saved, r) for r in range(len(runs))]
    arrays = {"digit": np.array([r.digit for r in runs]), "config": np.array([config_name(r) for r in runs])}
    arrays |= common.stacked([anatomy(run, p, fixed) for run, p in zip(runs, params)])
    over = []
    for step in sorted(snapshots, key=int):
        found = [develop(run, common.run_of(snapshots[step], r), fixed[:, :2048]) for r, run in enumerate(runs)]
        over.append({"step": torch.tensor(int(step)), **common.stacked(found)})
    return arrays | {f"over_{k}": v for k, v in common.stacked(over).items()}


def judge_anatomy(arrays, flags):
    """The sentences that the notes quote from the analysis of modular addition, on this task. Only runs that have solved it
    (loss below .05) vote: a circuit is read off a model that has one."""
    claims, enough = [], not flags.smoke and bool(flags.steps >= 1000 or flags.checkpoint)
    for name, mine, k in configurations(arrays, 4):
        name, solved = digit_name(flags, k), arrays["full_loss"][mine] < .05

        def add(id, statement, expected, values, agree, name=name, solved=solved):
            claims.append(common.claim(f"{id}-{name}", f"{name}: {statement}", f"Nanda et al. 2023, quoted in the {NOTES}",
                                       expected, values, agree[solved], enough))
        itself, skip = arrays["shortcuts"][mine].T
        add("self-attention", "attention of `=` to itself is negligible (mean ablation costs less than .01 nats)", "< .01",
            itself, itself < .01)
        add("skip", "the skip past the MLP acts as a bias (mean ablation costs less than .01 nats)", "< .01", skip, skip < .01)
        cosine, _, _, null = arrays["place_similarity"][mine][:, min(k, flags.digits - 1), 0].T
        add("same-places",
            f"the position vectors of a_k and b_k are the same (99 % of permuted ones stay below {np.median(null):.2f})",
            "cosine > .9", cosine, cosine > .9)
        top = np.sort(arrays["embedding_spectrum"][mine], 1)[:, -2:].sum(1)
        add("sparse-embedding", f"W_E is sparse in the Fourier basis (two of {flags.base // 2} frequencies hold 80 % of it)",
            "> .8", top, top > .8)
        if "neuron_r2" in arrays:
            best = np.median(arrays["neuron_r2"][mine].max(-1), 1)
            add("nine-terms", "nine terms of one frequency give most of a neuron", "median R^2 > .85", best, best > .85)
            before, after = arrays["term_energy"][mine].sum(2)[..., 2].T
            add("cancels", f"W_out W_U leave only the terms of a+b (90 % of the power; {np.median(before):.0%} before)",
                "> .9", after, after > .9)
    return claims


SPIKE_BEFORE, SPIKE_AFTER = 150, 100  # steps around a spike; forks start at the chunk boundary before
AROUND = ("loss", "grad_norm", "second_moment", "weight_norm", "update_norm")
INTERVENTIONS = {"none": {}, "eps 1e-6": dict(eps=1e-6), "beta2 .999": dict(beta2=.999), "clip at median": dict(clip=None),
                 "decay off": dict(weight_decay=0.), "rate / 2": dict(lr=.5)}


def compute_spikes(flags, folder):
    """Train, find each run's first spike, train it again to just before (a run is a function of its flags), and go on once
    with each intervention. Arrays: curves as in study digit with grad_norm, second_moment, weight_norm, update_norm
    [T, R]; around_* [steps, spikes]; fork_loss [interventions, steps, spikes], fork_worst [spikes, interventions]."""
    groups = common.groups_of_runs(flags)
    if len(groups) > 1:
        raise common.Stop("--study spikes compares runs of one shape: sweep fields that are numbers, such as weight_decay")
    part, = train_groups(groups, folder)
    runs, _, metrics, *_ = part
    arrays = curves([part]) | {k: metrics[k] for k in AROUND}
    window = slice(0, SPIKE_BEFORE + SPIKE_AFTER)
    spiking = np.flatnonzero((arrays["first_spike"] > SPIKE_BEFORE + common.CHUNK)
                             & (arrays["first_spike"] <= len(arrays["step"]) - SPIKE_AFTER)).tolist()
    around, forks = {k: [] for k in AROUND}, []
    for r in spiking:
        spike = int(arrays["first_spike"][r])
        for k in around:
            around[k].append(arrays[k][spike - SPIKE_BEFORE:spike + SPIKE_AFTER, r])
        begin = (spike - SPIKE_BEFORE) // common.CHUNK * common.CHUNK
        again = replace(runs[r], steps=begin, evals=2)
        state, *_ = train([again], folder.scratch(f"fork{r}"))
        calm = float(np.median(arrays["grad_norm"][begin - 100:begin, r]))
        change = lambda c: {k: calm if v is None else again.lr * v if k == "lr" else v for k, v in c.items()}
        forked = [replace(again, **change(c)) for c in INTERVENTIONS.values()]
        steps = -(-(spike + SPIKE_AFTER - begin) // common.CHUNK) * common.CHUNK
        fused = common.Fused(step_of(flags), common.stack([common.run_of(state, 0)] * len(forked)), common.numbers(forked),
                             torch.stack([sample(again, common.generator(again.seed, "train", 0), again.batch)] * len(forked)),
                             flags, steps)
        losses = []
        for chunk in range(begin // common.CHUNK, (begin + steps) // common.CHUNK):
            data = sample(again, common.generator(again.seed, "train", chunk), common.CHUNK, again.batch)
            losses.append(fused(data[:, None].expand(-1, len(forked), -1, -1))["loss"].numpy())
        forks.append(np.concatenate(losses)[spike - SPIKE_BEFORE - begin:][window])
        if folder.interrupted:
            break
    arrays |= {f"around_{k}": np.stack(v, 1) if v else np.zeros((SPIKE_BEFORE + SPIKE_AFTER, 0)) for k, v in around.items()}
    forks = np.stack(forks) if forks else np.zeros((0, SPIKE_BEFORE + SPIKE_AFTER, len(INTERVENTIONS)))
    worst = [geometric(f).max(0) for f in forks]
    return arrays | {"intervention": np.array(list(INTERVENTIONS)), "fork_loss": forks.transpose(2, 1, 0),
                     "fork_worst": np.array(worst).reshape(-1, len(INTERVENTIONS))}


def judge_spikes(arrays, flags):
    """Which intervention just before the first spike removes it?"""
    worst, quote = arrays["fork_worst"], f'{NOTES}: "probably a gradient spike of unclear provenance"'
    claims = [common.claim("replay", "without an intervention the replayed run spikes again", "control", "above 1e-3",
                           worst[:, 0], worst[:, 0] > 1e-3, not flags.smoke)]
    for i, name in list(enumerate(arrays["intervention"].tolist()))[1:]:
        claims.append(common.claim(f"cause-{name.replace(' ', '-')}",
                                   f"{name} just before the first spike removes it (up to {SPIKE_AFTER} steps after)", quote,
                                   "stays below 1e-3", worst[:, i], worst[:, i] < 1e-3, not flags.smoke))
    return claims


STUDIES = {
    "digit": (compute_digit, judge_digit, {"curves": draw_curves, "delta": draw_delta, "decomposition": draw_decomposition}),
    "sweep": (compute_sweep, judge_sweep, {"rows": draw_rows, "heat": draw_heat}),
    "all": (compute_all, judge_all, {"digits": draw_all}),
    "anatomy": (compute_anatomy, judge_anatomy,
                {"attention": draw_attention, "dependence": draw_dependence, "fourier": draw_fourier,
                                                 "matrices": draw_matrices, "cascade": draw_cascade,
                                                 "development": draw_development}),
    "spikes": (compute_spikes, judge_spikes, {"spikes": draw_spikes}),
    "theory": (compute_theory, judge_theory, {"floors": draw_theory}),
}


def main(argv=None):
    return common.main(Flags, STUDIES, argv)


if __name__ == "__main__":
    raise SystemExit(main())
