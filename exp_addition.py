"""How does a one-layer transformer add numbers, and which digit does it learn when?

Law: a and b have D digits, i.i.d. uniform in 0..base-1, most significant first; a + b = sum_k z_k base^k. Input
`a_{D-1} .. a_0 + b_{D-1} .. b_0 =`, target z_k (`--digit k`: 0 units, 1 tens, .., D leading carry), read at `=`; with
`--study all` every digit at once. With n_k = a_k + b_k mod base and c_k the carry into column k, z_k = n_k + c_k mod
base: a model that reads its own column but no carry has the loss H(P(c_k)), -> log 2; one that reads nothing, log base.

Claims are quoted from research notes of April 2023 ("which digits converge for which width, heads, weight decay?").
"""
import itertools
import math
import time
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

    per_study: ClassVar[dict] = {
        "sweep": dict(sweep=[], steps=5000, evals=2),
        "all": dict(sweep=["answer=teacher,parallel"], batch=64, steps=3000),
        "theory": dict(sweep=[], runs=1),
        "anatomy": dict(sweep=[], runs=1, snapshots=30),
        "spikes": dict(sweep=[], digit=1, weight_decay=.5, steps=5000, evals=2),
        "smoke": dict(steps=20, runs=2, d_model=8, n_heads=2, batch=32, evals=3)}

    def check(self):
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
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)


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
    return {n: n + (f"_{layer}" if layer else "") for n in ("W_Q", "W_K", "W_V", "W_O", "W_in", "b_in", "W_out", "b_out")}


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


def mlp(params, x, n=names(0)):
    """x + ReLU(x W_in + b_in) W_out + b_out; x itself where the model has no MLP."""
    if n["W_in"] not in params:
        return x
    return x + torch.relu(x @ params[n["W_in"]] + params[n["b_in"]]) @ params[n["W_out"]] + params[n["b_out"]]


def forward(params, tokens, n_heads, first=0):
    """The textbook model: logits [B, T - first, vocab] at positions first.. of tokens [B, T]. The last layer computes no
    other query."""
    x = params["W_E"][tokens.long()] + params["W_pos"]
    B, T, d = x.shape
    causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    layers = sum(k.startswith("W_Q") for k in params)
    for layer in range(layers):
        n, start = names(layer), first if layer == layers - 1 else 0
        split = lambda y: y.unflatten(-1, (n_heads, d // n_heads)).transpose(1, 2)  # [B, heads, positions, d_head]
        q, k, v = split(x[:, start:] @ params[n["W_Q"]]), split(x @ params[n["W_K"]]), split(x @ params[n["W_V"]])
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d // n_heads)).masked_fill(~causal[start:], -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = mlp(params, x[:, start:] + mixed @ params[n["W_O"]], n)
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


def fast_forward(params, ab, n_heads):
    """Logits [B, vocab] at `=` of the one-layer model, exactly those of `forward`, from digits ab [2D, B]."""
    equals = params["W_E"][-1] + params["W_pos"][-1]
    return mlp(params, equals + head_outputs(params, ab, n_heads).flatten(1) @ params["W_O"]) @ params["W_U"]


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
    """The same digits [2D, 8192] for every run."""
    return sample(flags, common.generator(0, "eval"), EXAMPLES)


def delta_spectrum(flags, probs, ab, digit):
    """D_c(delta) = mean P((n + delta) mod base | carry c) for c = 0, 1: [2, base], and the mass on `+` and `=` [2]. The
    leading carry has no column: there n = 0."""
    naive, carry, _ = columns(ab, flags.base)
    n = naive[digit] if digit < flags.digits else torch.zeros_like(naive[0])
    shifted = torch.stack([probs.gather(1, ((n + delta) % flags.base).long()[:, None])[:, 0] for delta in range(flags.base)], 1)
    by_carry = lambda x: torch.stack([x[carry[digit] == c].mean(0) for c in (0, 1)])
    return by_carry(shifted), by_carry(probs[:, flags.base:].sum(1))


def evaluate(flags, params, ab):
    """Loss, accuracy, P(correct), delta spectrum and its decomposition for one run of the single-digit task."""
    labels = target(ab, torch.tensor(flags.digit), flags.base)
    logits = logits_of(flags, params, ab)
    loss, probs = nll(logits, labels), logits.softmax(-1)
    delta, other = delta_spectrum(flags, probs, ab, flags.digit)
    return {"loss": loss.mean(), "accuracy": (logits.argmax(-1) == labels).float().mean(), "correct": (-loss).exp().mean(),
            "delta": delta, "other": other}


def geometric(loss, width=10):
    """Geometric mean over the last `width` steps of loss [T, R]: the curve in which steps and levels are read."""
    return np.exp(common.smooth(np.log(np.maximum(loss, 1e-38)), width))


def milestones(loss, blind):
    """Per run of loss [T, R] (every step): the step of first descent (10-step mean 0.1 below `blind` [R], the loss that
    sees nothing), of reaching 1e-3, the lowest 10-step geometric mean and its step, the final one (last 100 steps), the
    largest regrowth before step 600, and the number of spikes (above 1e-3 after having been below 1e-4). Steps are NaN
    where they never come."""
    mean, curve = common.smooth(loss, 10), geometric(loss)
    when = lambda hit: np.where(hit.any(0), hit.argmax(0) + 1., np.nan)
    low = np.minimum.accumulate(curve)
    spikes = np.zeros(loss.shape[1])
    armed = np.zeros(loss.shape[1], bool)
    for row in curve:
        armed |= row < 1e-4
        spikes += armed & (row > 1e-3)
        armed &= ~(row > 1e-3)
    last = loss[-100:]
    return {"descent": when(mean < blind - .1), "reach": when(curve < 1e-3), "lowest": low[-1],
            "lowest_step": curve.argmin(0) + 1., "final": np.exp(np.log(np.maximum(last, 1e-38)).mean(0)),
            "bump": (curve / np.concatenate([curve[:1], low[:-1]]))[100:600].max(0, initial=1.), "spikes": spikes}


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
        return {"params": params, **optimiser}, {"loss": loss, "grad_norm": size}
    return step


def train(runs, folder, evaluate=evaluate):
    """Train runs of one shape. Returns params {name: [R, ...]}, metrics {name: [T, R]} and snapshots {step: params}."""
    flags, R = runs[0], len(runs)
    state = common.stack(start(run) for run in runs)
    saved = folder.resume(like=state)
    done, log, snapshots = 0, {}, {}
    if saved:
        state, done, snapshots = {"params": saved["params"], **saved["optimiser"]}, saved["step"], saved["snapshots"]
        log = {k: [v] for k, v in saved["metrics"].items()}
    draw = lambda chunk: torch.stack([sample(run, common.generator(run.seed, "train", chunk), common.CHUNK, run.batch)
                                      for run in runs], 1)  # [CHUNK, R, 2D, batch]
    fused = common.Fused(step_of(flags), state, common.numbers(runs), draw(0)[0], flags, flags.steps - done,
                         compiled=saved and saved["compiled"])
    fixed, eval_at = evaluation_set(flags), common.marks(flags.steps, flags.evals)
    keep_at = common.marks(flags.steps, flags.snapshots)
    progress = common.Progress(R, done, flags.steps, f"{flags.study} d_model={flags.d_model} n_heads={flags.n_heads}, {R} runs")
    seconds, data = 0., None

    def look(step):
        params = fused.state()["params"]
        if step in eval_at:
            seen = common.stack(evaluate(run, common.run_of(params, r), fixed) for r, run in enumerate(runs))
            for k, v in {"step": torch.tensor(step), **seen}.items():
                log.setdefault(f"eval_{k}", []).append(v[None])
        if step in keep_at:
            snapshots[step] = params

    if not done:
        look(0)
    for a, b in common.segments(done, flags.steps, {*eval_at, *keep_at}):
        if data is None or a % common.CHUNK == 0:
            data = draw(a // common.CHUNK)
        clock = -time.perf_counter()
        logs = fused(data[a % common.CHUNK:][:b - a])
        seconds += clock + time.perf_counter()
        for k, v in logs.items():
            log.setdefault(k, []).append(v)
        if b in eval_at or b in keep_at:
            look(b)
        progress(b, logs["loss"][-1].nanmedian().item())
        folder.checkpoint(fused.state, b, log, snapshots, force=b == flags.steps)
        if folder.interrupted:
            break
    folder.trained(runs, fused, seconds, (b if done < flags.steps else done) - done)
    metrics = {k: torch.cat(v).numpy() for k, v in log.items()}
    return fused.state()["params"], {"step": np.arange(1, len(metrics["loss"]) + 1), **metrics}, snapshots


# ---- Figures --------------------------------------------------------------------------------------------------------

DIGITS = ["units", "tens", "hundreds", "thousands"]


def digit_name(flags, k):
    return "leading carry" if k == flags.digits else DIGITS[k] if k < 4 else f"10^{k}s"


def shelves(ax, flags, k):
    """The exact levels that a loss curve of digit k can rest on, dashed and labelled."""
    floor = common_floor = floors(flags.base, flags.digits)[k]
    common.shelf(ax, floor[0], f"sees nothing: {floor[0]:.3f}" if k == flags.digits else f"log {flags.base} = {floor[0]:.3f}")
    for seen, value in enumerate(floor[1:], 1):
        if np.isfinite(value) and value > 0:
            common.shelf(ax, value, f"sees {seen} column{'s' * (seen > 1)}: {value:.4g}")


def draw_curves(arrays, flags):
    """Loss of every configuration over training, with the exact shelves."""
    configs = [c for c in dict.fromkeys(arrays["config"].tolist())][:4]
    figure, axes = common.panels(len(configs), "When does each digit's loss leave its shelf?", flags)
    for ax, name in zip(axes, configs):
        mine = arrays["config"] == name
        k = int(arrays["digit"][mine][0])
        common.band(ax, arrays["step"], geometric(arrays["loss"][:, mine]), "training loss, 10-step mean", common.COLOURS[0])
        shelves(ax, flags, k)
        for x in arrays["descent"][mine]:
            ax.plot(x, arrays["loss"][0, mine].max(), "v", color=common.COLOURS[1], ms=4, clip_on=False)
        ax.set(xscale="log", yscale="log", xlabel="step", ylabel="loss (nats)", title=f"{digit_name(flags, k)}   {name}")
        ax.legend(fontsize=7, loc="lower left")
    return figure


def draw_delta(arrays, flags):
    """Where the probability mass lies relative to the naive digit n = a_k + b_k mod base, over training and at the end."""
    configs = [c for c in dict.fromkeys(arrays["config"].tolist())][:2]
    figure, axes = common.panels(2 * len(configs), "Distance of the answer from the naive sum (a_k + b_k) mod base", flags)
    for row, name in enumerate(configs):
        mine = arrays["config"] == name
        k, x = int(arrays["digit"][mine][0]), np.maximum(arrays["eval_step"], .7)
        spectrum = np.median(arrays["eval_delta"][:, mine], 1)  # [M, 2, base]
        ax = axes[2 * row]
        lines = [(0, 0, "n, no carry"), (0, 1, "n+1, no carry"), (1, 0, "n, carry"), (1, 1, "n+1, carry")]
        for (c, delta, label), colour in zip(lines, common.COLOURS):
            if k or not c:
                common.band(ax, x, arrays["eval_delta"][:, mine, c, delta], f"P({label})", colour)
        common.shelf(ax, 1 / flags.base, "chance 1/base")
        ax.set(xscale="log", ylim=(0, 1.02), xlabel="step (0 drawn at .7)", ylabel="mean probability", title=f"{digit_name(flags, k)}: over training")
        ax.legend(fontsize=6.5)
        ax = axes[2 * row + 1]
        width = .4
        for c in (0, 1) if k else (0,):
            ax.bar(np.arange(flags.base) + width * (c - .5), spectrum[-1, c], width, color=common.COLOURS[c],
                   label=f"carry {c} ({mine.sum()} runs, median)")
        common.shelf(ax, 1 / flags.base, "chance 1/base")
        ax.set(xlabel="delta: answer - n mod base", ylabel="mean probability", ylim=(0, 1.02), xticks=range(flags.base),
               title=f"{digit_name(flags, k)}: at the end")
        ax.legend(fontsize=7)
    return figure


# ---- Studies --------------------------------------------------------------------------------------------------------

NOTES = "research notes, 2023-04-18"


def label(run, flags):
    """Short name of a configuration: what differs from the study's flags, digit aside."""
    return f"{run.d_model}/{run.n_heads} decay {run.weight_decay:g}"


def trained_table(groups, folder):
    """Train every group of runs; the arrays that curves and sweeps are drawn from, runs side by side."""
    parts = []
    for i, runs in enumerate(groups):
        sub = folder.sub(i, len(groups))
        params, metrics, snapshots = train(runs, sub)
        blind = np.array([floors(r.base, r.digits)[r.digit, 0] for r in runs])
        found = milestones(metrics["loss"], blind)
        sub.result(runs, metrics, {"loss": metrics["eval_loss"][-1], "accuracy": metrics["eval_accuracy"][-1], **found})
        parts.append((runs, metrics, found))
        if folder.interrupted or sub.interrupted:
            break
    return parts


def compute_digit(flags, folder):
    """Train the configurations of --sweep. Arrays: step [T], loss [T, R], eval_* [M, R, ...], milestones and digit,
    config [R]."""
    groups = common.groups_of_runs(flags)
    parts = trained_table(groups, folder)
    length = min(len(m["step"]) for _, m, _ in parts)
    looks = min(len(m["eval_step"]) for _, m, _ in parts)
    join = lambda key, n: np.concatenate([m[key][:n] for _, m, _ in parts], 1)
    runs = [r for group, *_ in parts for r in group]
    arrays = {"step": parts[0][1]["step"][:length], "eval_step": parts[0][1]["eval_step"][:looks],
              "loss": join("loss", length), "digit": [r.digit for r in runs],
              "config": [f"{digit_name(flags, r.digit)} {label(r, flags)}" for r in runs]}
    arrays |= {k: join(k, looks) for k in parts[0][1] if k.startswith("eval_") and k != "eval_step"}
    return arrays | {k: np.concatenate([f[k] for *_, f in parts]) for k in parts[0][2]}


def judge_digit(arrays, flags):
    """The notes' sentences about units and tens at 128/4."""
    return []


# The notes' tables: (id, digit, d_model, n_heads, weight_decay, steps, quantity, lowest, highest, sentence). A quoted step
# counts as reproduced within a factor 1.5, a quoted small loss within a factor 3 (the notes read both off a graph).
STEP = lambda s: ("descent", s / 1.5, s * 1.5)
BY = lambda s: ("descent", 1, s)
NOT_BY = lambda s: ("descent", s, math.inf)
LEVEL = lambda x: ("final", x / 3, x * 3)
CONVERGES, STUCK = ("reach", 1, math.inf), ("not_reach", 1, math.inf)
U, T, H, K = 0, 1, 2, 3
ROWS = [
    ("u1", U, 128, 4, 0, 3000, *STEP(120), "decay 0: first descent at 120"),
    ("u2", U, 128, 4, 0, 3000, "lowest", 0, 60e-12 * 3, "decay 0: descends to at least 60e-12"),
    ("u3", U, 128, 4, 1, 3000, *STEP(140), "decay 1: first descent at 140ish"),
    ("u4", U, 128, 4, 1, 3000, "bump", 1.5, math.inf, "decay 1: a bump at 200 to 280"),
    ("u5", U, 128, 4, 1, 3000, "lowest", 20e-9 / 3, 20e-9 * 3, "decay 1: stable at 20e-9"),
    ("u6", U, 128, 4, 1, 3000, "lowest_step", 1600 / 1.5, 1600 * 1.5, "decay 1: lowest at 1600ish"),
    ("u7", U, 128, 4, .5, 3000, "lowest", 8e-9 / 3, 8e-9 * 3, "decay .5: descends to 8e-9"),
    ("u8", U, 128, 4, .25, 3000, "bump", 1.5, math.inf, "decay .25: a mild regrowth at 200 to 300 is still visible"),
    ("u9", U, 128, 4, .2, 3000, "bump", 0, 1.5, "decay .2: the brief step is not visible"),
    ("u10", U, 128, 4, .1, 3000, "bump", 0, 1.5, "decay .1: the brief step is not visible"),
    ("u11", U, 4, 4, 0, 5000, *STEP(2400), "4/4: log 10 until 2400ish"),
    ("u12", U, 4, 4, 0, 5000, *STUCK, "4/4: the descent does not complete by 5k"),
    ("u13", U, 8, 4, 0, 5000, *STEP(1700), "8/4: log 10 until 1700ish"),
    ("u14", U, 8, 4, 0, 5000, "lowest", 0, 400e-12 * 3, "8/4: 400e-12 at 5k"),
    ("u15", U, 16, 4, 0, 5000, *STEP(1200), "16/4: log 10 until 1200"),
    ("u16", U, 16, 1, 0, 5000, *STEP(600), "16/1: descends much sooner, around 600"),
    ("u17", U, 4, 1, 0, 5000, *STEP(2600), "4/1: descends slowly and late, ~2600"),
    ("u18", U, 8, 1, 0, 5000, *STEP(1800), "8/1: descent by 1800ish"),
    ("u19", U, 8, 1, 0, 5000, *LEVEL(.1), "8/1: keeps dropping to 0.1 at 5k"),
    ("u20", U, 128, 128, 0, 3000, *STEP(120), "128/128: nothing new"),
    ("u21", U, 32, 32, 0, 3000, *STEP(640), "32/32: log 10 until 640ish"),
    ("u22", U, 8, 8, 0, 5000, *STEP(1600), "8/8: log 10 until 1600ish"),
    ("u23", U, 8, 8, 0, 5000, "spikes", 1, math.inf, "8/8: a spike at 4250ish"),
    ("u24", U, 3, 3, 0, 10000, *STEP(5400), "3/3: at 5400ish"),
    ("u25", U, 2, 2, 0, 30000, *NOT_BY(10000), "2/2: not by 10k"),
    ("u26", U, 2, 2, 0, 30000, *STEP(26900), "2/2: descends extremely late, around 26900"),
    ("u27", U, 2, 1, 0, 10000, *STEP(5400), "2/1: descends faster than 2/2, at 5400ish"),
    ("u28", U, 2, 1, 0, 10000, "final", 1.8, 2.2, "2/1: gets stuck at a loss of 2"),
    ("u29", U, 1, 1, 0, 50000, *NOT_BY(50000), "1/1: does not descend in 50k"),
    ("t1", T, 128, 1, .25, 5000, *STUCK, "128/1: does not converge"),
    ("t2", T, 128, 2, .25, 5000, *CONVERGES, "128/2: converges"),
    ("t3", T, 128, 4, .25, 5000, *CONVERGES, "128/4: converges"),
    ("t4", T, 64, 2, .25, 5000, *STUCK, "64/2: does not converge"),
    ("t5", T, 64, 4, .25, 5000, *CONVERGES, "64/4: does"),
    ("t6", T, 32, 4, .25, 5000, *STUCK, "32/4: does not"),
    ("t7", T, 32, 8, .25, 5000, *STUCK, "32/8: does not"),
    ("t8", T, 32, 16, .25, 5000, *CONVERGES, "32/16: looks converging"),
    ("t9", T, 16, 16, .25, 5000, *CONVERGES, "16/16: converges"),
    ("t10", T, 8, 8, .25, 15000, "final", math.exp(-2.5) / 1.5, math.exp(-2.5) * 1.5, "8/8: e^-2.5 by 15k"),
    ("t11", T, 8, 1, .25, 5000, "final", .66, .8, "8/1: to log 2, a little higher"),
    ("t12", T, 8, 2, .25, 5000, "final", 1.26, 1.54, "8/2: to 2.1 first and to 1.4 second"),
    ("t13", T, 8, 4, .25, 5000, "final", .66, .8, "8/4: ~0.73 at 5k"),
    ("t14", T, 128, 128, .25, 3000, *CONVERGES, "128/128: converges"),
    ("t15", T, 256, 1, .25, 3000, *STUCK, "256/1: does not converge"),
    ("t16", T, 256, 2, .25, 3000, *CONVERGES, "256/2: does"),
    ("t17", T, 512, 1, .25, 2000, *STUCK, "512/1: does not converge"),
    ("t18", T, 512, 2, .25, 2000, *CONVERGES, "512/2: does"),
    ("t19", T, 128, 4, .5, 5000, "spikes", 3, 3, "128/4 decay .5: peaks thrice in 5k"),
    ("t20", T, 128, 4, 0, 5000, "spikes", 0, 0, "128/4 decay 0: no spike in 5k"),
    ("t21", T, 128, 4, .1, 5000, "spikes", 1, 2, "128/4 decay .1: one or two spikes"),
    ("t22", T, 128, 4, .15, 5000, "spikes", 0, 0, "128/4 decay .15: no spike"),
    ("t23", T, 128, 4, .2, 5000, "spikes", 1, 2, "128/4 decay .2: one and a half spikes"),
    ("t24", T, 128, 4, .225, 5000, "spikes", 2, math.inf, "128/4 decay .225: multiple spikes"),
    ("t25", T, 128, 8, 0, 5000, "spikes", 0, 0, "128/8 decay 0: no spike"),
    ("t26", T, 128, 2, 0, 5000, "spikes", 1, math.inf, "128/2 decay 0: spikes"),
    ("h1", H, 128, 4, .25, 5000, *STUCK, "hundreds 128/4: does not converge"),
    ("h2", H, 128, 128, .25, 5000, *CONVERGES, "hundreds 128/128: converges"),
    ("h3", H, 128, 32, .25, 5000, *CONVERGES, "hundreds 128/32: converges"),
    ("h4", H, 128, 8, .25, 5000, *CONVERGES, "hundreds 128/8: converges"),
    ("k1", K, 128, 128, .25, 5000, *STUCK, "thousands 128/128: does not converge"),
    ("k2", K, 256, 256, .25, 3000, *STUCK, "thousands 256/256: does not converge"),
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
        rows = {r for r in rows if r[1] <= 4}
    points = [dict(digit=k, d_model=d, n_heads=h, weight_decay=w, eps=e, steps=max(1, n * flags.steps // 5000))
              for k, d, h, w, e, n in sorted(rows)]
    return sorted(points, key=lambda p: (p["d_model"] + 4 * p["n_heads"]) ** 2 * p["steps"])


def compute_sweep(flags, folder):
    """Train every configuration. Arrays [R]: the swept fields, seed, milestones; curve [R, 200] at curve_step [R, 200],
    the 10-step geometric mean of the loss at log-spaced steps."""
    small = lambda p: p.get("d_model", flags.d_model) <= 4  # sixteen such runs take as long as four
    groups = [g for points, runs in itertools.groupby(points_of(flags), small)
              for g in common.groups_of_runs(replace(flags, runs=flags.runs * (4 if points else 1)), list(runs))]
    parts = trained_table(groups, folder)
    runs = [r for group, *_ in parts for r in group]
    arrays = {k: np.array([getattr(r, k) for r in runs]) for k in
              ("digit", "d_model", "n_heads", "weight_decay", "eps", "steps", "seed", *common.swept(flags))}
    arrays |= {k: np.concatenate([f[k] for *_, f in parts]) for k in parts[0][2]}
    at = [np.unique(np.geomspace(1, len(m["step"]), 200).round()).astype(int) for _, m, _ in parts]
    pad = lambda x: np.pad(x.astype(float), [(0, 0), (0, 200 - x.shape[1])], constant_values=np.nan)
    arrays["curve"] = np.concatenate([pad(geometric(m["loss"])[i - 1].T) for i, (_, m, _) in zip(at, parts)])
    arrays["curve_step"] = np.concatenate([pad(np.tile(i, (len(g), 1))) for i, (g, *_) in zip(at, parts)])
    return arrays


def judge_sweep(arrays, flags):
    return []


STUDIES = {
    "sweep": (compute_sweep, judge_sweep, {}),
    "digit": (compute_digit, judge_digit, {"curves": draw_curves, "delta": draw_delta}),
}


def main(argv=None):
    return common.main(Flags, STUDIES, argv)


if __name__ == "__main__":
    raise SystemExit(main())
