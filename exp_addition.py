"""How does a one-layer transformer add numbers, and which digit does it learn when?

Law: a and b have D digits, i.i.d. uniform in 0..base-1, most significant first; a + b = sum_k z_k
base^k. Input `a_{D-1} .. a_0 + b_{D-1} .. b_0 =`, target z_k (`--digit k`: 0 units, 1 tens, .., D the
carry), read at `=`. With n_k = (a_k + b_k) mod base and c_k the carry into column k, z_k = (n_k + c_k)
mod base: a model that knows its own column but no carry has the loss H(c_k) (.688 nats for the tens,
-> log 2), one that knows nothing log base.

    python exp_addition.py                       one minute: when do units and tens leave their shelves?
    python exp_addition.py --study anatomy       two minutes: attention, neurons, frequencies
    python exp_addition.py --study theory        seconds: every exact shelf, for any --base and --digits

Claims are quoted from research notes of 2023-04-18, "128/4" is d_model/n_heads."""
import math
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch.func import grad_and_value

import common
from common import flag

# ==== Flags ==========================================================================================
@dataclass
class Flags(common.Flags):
    steps: int = flag(2000, "training steps", low=1)
    runs: int = flag(4, "seeds per configuration", low=1)
    digits: int = flag(5, "D, digits of each operand", low=1, high=9)
    base: int = flag(10, "base of the digits", low=2, high=16)
    digit: int = flag(0, "digit of the sum: 0 units, 1 tens, .., D leading carry", low=0, number=True)
    answer: Literal["teacher", "parallel"] = flag("teacher", "feed the true earlier digits, or `=`")
    d_model: int = flag(128, "width of the residual stream", low=1, high=4096)
    n_heads: int = flag(4, "attention heads, each d_model / n_heads wide", low=1)
    mlp: bool = flag(True, "have the ReLU MLP of width 4 d_model")
    batch: int = flag(256, "examples a step", low=1)
    lr: float = flag(1e-3, "learning rate of AdamW, reached after --warmup steps", low=0, number=True)
    warmup: float = flag(10., "steps of linear warm-up", low=1, number=True)
    weight_decay: float = flag(.25, "decoupled weight decay", low=0, number=True)
    beta1: float = flag(.9, "AdamW beta1", low=0, high=.999999, number=True)
    beta2: float = flag(.98, "AdamW beta2", low=0, high=.999999, number=True)
    eps: float = flag(1e-8, "AdamW eps", low=0, number=True)
    clip: float = flag(0., "clip the gradient's norm to this (0: do not)", low=0, number=True)
    probe: str = flag("logit", "gradient times input of `logit`, `neuron:I` or `head:I`")
    checkpoint: str = flag("", "a checkpoint.pt to take apart instead of training")

    def check(self):
        if self.digit > self.digits:
            raise common.Stop(f"--digit {self.digit} must be at most --digits {self.digits}")
        if self.d_model % self.n_heads:
            raise common.Stop(f"--d-model {self.d_model} must be divisible by --n-heads {self.n_heads}")

    @property
    def vocab(self):
        return self.base + 2  # the digits, `+` = base, `=` = base + 1


SMOKE = dict(steps=20, runs=2, d_model=8, n_heads=2, batch=32, evals=2)
NOTES = "research notes, 2023-04-18: "
DIGITS = ["units", "tens", "hundreds", "thousands", *(f"10^{k}s" for k in range(4, 9))]

# ==== Data law =======================================================================================
def sample(flags, key, batch):
    """Digits of a then b, each most significant first: int64 [2D, batch], the axis that vectorises."""
    pair = common.integers(key, flags.base ** 2, flags.digits, batch)
    a = (pair * (2 ** 16 // flags.base + 1)) >> 16  # pair // base, exact below 2^16 / base
    return torch.cat([a, pair - flags.base * a])


def columns(ab, base):
    """Digits ab [2D, B] -> (naive D, carry D+1, total D+1), lists of [B] from the units up: naive_k =
    (a_k + b_k) mod base, carry_k into column k, total_k the digit of the sum; total_D = carry_D."""
    D = len(ab) // 2
    naive, carry, total = [], [torch.zeros_like(ab[0])], []
    for k in range(D):
        pair = ab[D - 1 - k] + ab[2 * D - 1 - k]
        full = pair + carry[k]
        carry.append((full >= base).to(ab.dtype))
        naive.append(pair % base)
        total.append(full - base * carry[-1])
    return naive, carry, total + carry[-1:]


def pick(columns, digit):
    """Column number `digit` (a tensor: it is data, not a shape) of a list of [B]."""
    return sum(x * (digit == k) for k, x in enumerate(columns))


def tokens_of(flags, ab):
    """Token sequences [B, 2D + 2] from digits [2D, B]."""
    row = lambda token: torch.full_like(ab[:1], token)
    return torch.cat([ab[:flags.digits], row(flags.base), ab[flags.digits:], row(flags.base + 1)]).T


def evaluation_set(flags, examples=4096):
    """The same digits [2D, examples] for every run (a sixteenth of them for --smoke)."""
    shape = 2 * flags.digits, examples // 16 if flags.smoke else examples
    digits = torch.randint(flags.base, shape, generator=common.generator(0, "eval"))
    return digits.to(common.device(flags))


def carry_probability(base, k):
    """P(carry into column k) = (1 - base^-k) / 2."""
    return (1 - float(base) ** -k) / 2


def carry_entropy(p):
    """Entropy in nats of a carry that has probability p."""
    return sum(-x * math.log(x) for x in (p, 1 - p) if x > 0)


def floors(base, digits):
    """Bayes-optimal loss in nats of digit k of a model that sees its L top columns (own first; for the
    leading carry D-1, ..): floor[k, L] [D+1, D+2], or NaN; a carry goes through columns of base - 1."""
    floor = np.full((digits + 1, digits + 2), np.nan)
    for k in range(digits + 1):
        own = k < digits  # the leading carry has no column of its own
        for seen in range(k + 1 + own):
            below = seen - own
            floor[k, seen] = float(base) ** -below * carry_entropy(carry_probability(base, k - below))
        if own:
            floor[k, 0] = math.log(base)
    return floor

# ==== Model ==========================================================================================
def init(flags, generator, positions=None):
    """Parameters of one run. Every matrix N(0, 1/d_model), W_U N(0, 1/vocab), biases zero."""
    d, hidden = flags.d_model, 4 * flags.d_model
    normal = lambda *shape, scale=d ** -.5: torch.randn(shape, generator=generator) * scale
    params = {"W_E": normal(flags.vocab, d), "W_pos": normal(positions or 2 * flags.digits + 2, d)}
    params |= {name: normal(d, d) for name in ("W_Q", "W_K", "W_V", "W_O")}
    if flags.mlp:
        params |= {"W_in": normal(d, hidden), "b_in": torch.zeros(hidden),
                   "W_out": normal(hidden, d), "b_out": torch.zeros(d)}
    return params | {"W_U": normal(d, flags.vocab, scale=flags.vocab ** -.5)}


def unchanged(name, x):
    return x


def mlp(params, x, patch=unchanged):
    """x + ReLU(x W_in + b_in) W_out + b_out; x itself where the model has no MLP."""
    if "W_in" not in params:
        return x
    neurons = patch("neurons", torch.relu(x @ params["W_in"] + params["b_in"]))
    return patch("skip", x) + neurons @ params["W_out"] + params["b_out"]


def attention(q, k, v, patch=unchanged):
    """Causal attention of the last t positions, queries q [B, heads, t, d_head], to all, k and v [B,
    heads, T, d_head]: the heads' outputs side by side [B, t, d]."""
    t, T = q.shape[2], k.shape[2]
    future = torch.ones(t, T, dtype=torch.bool, device=q.device).triu(T - t + 1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
    heads = patch("heads", patch("attention", scores.softmax(-1)) @ v)
    return heads.transpose(1, 2).flatten(2)


def forward(params, tokens, n_heads, first=0, patch=unchanged):
    """The textbook model: logits [B, T - first, vocab] at positions first.. of tokens [B, T].
    patch(name, x) -> x sees, and may change, `embedding` [B, T, d]; with t = T - first `attention` [B,
    heads, t, T], `heads` [B, heads, t, d_head], `neurons` [B, t, 4d], `skip` past the MLP [B, t, d]."""
    x = patch("embedding", params["W_E"][tokens] + params["W_pos"])
    split = lambda y: y.unflatten(-1, (n_heads, -1)).transpose(1, 2)
    q, k, v = split(x[:, first:] @ params["W_Q"]), split(x @ params["W_K"]), split(x @ params["W_V"])
    mixed = attention(q, k, v, patch)
    return mlp(params, x[:, first:] + mixed @ params["W_O"], patch) @ params["W_U"]


def tables(params, n_heads):
    """Attention of `=` has one constant query; keys and values are sums of a token's and a position's
    part: scores [heads, vocab] and [heads, T], values [vocab, d] and [T, d]."""
    W_E, W_pos = params["W_E"], params["W_pos"]
    d = W_E.shape[1]
    query = ((W_E[-1] + W_pos[-1]) @ params["W_Q"]).view(n_heads, -1)
    keys = params["W_K"].view(d, n_heads, -1)
    query = torch.einsum("dhe,he->hd", keys, query) / math.sqrt(d // n_heads)
    return query @ W_E.T, query @ W_pos.T, W_E @ params["W_V"], W_pos @ params["W_V"]


def attend(params, ab, n_heads):
    """Attention of `=` by table look-up: weights of the digits [heads, 2D, B], of `+` and `=` [heads, 2,
    B], summed by digit value [heads, base, B]. (A global maximum of huge scores underflows.)"""
    token_score, place_score, *_ = tables(params, n_heads)
    base, D = token_score.shape[1] - 2, len(ab) // 2
    value = torch.arange(base, device=ab.device)[:, None, None]
    digit = (ab == value).to(token_score.dtype)  # one-hot [base, 2D, B]
    places = torch.cat([place_score[:, :D], place_score[:, D + 1:2 * D + 1]], 1)
    score = (token_score[:, :base] @ digit.flatten(1)).unflatten(1, ab.shape) + places[:, :, None]
    plus = place_score[:, D] + token_score[:, base]
    equals = place_score[:, 2 * D + 1] + token_score[:, base + 1]
    fixed = torch.stack([plus, equals], 1)[:, :, None]
    top = torch.maximum(score.amax(1, keepdim=True), fixed.amax(1, keepdim=True)).detach()
    score, fixed = (score - top).exp(), (fixed - top).exp()
    total = score.sum(1, keepdim=True) + fixed.sum(1, keepdim=True)
    score, fixed = score / total, fixed / total
    return score, fixed, (score[:, None] * digit).sum(2)


def fast_forward(params, ab, n_heads, patch=unchanged):
    """Logits [B, vocab] at `=`, exactly those of `forward`, from digits ab [2D, B], without values of
    examples. patch sees `heads` [B, heads, d_head], `neurons` [B, 4d] and `skip` [B, d]."""
    score, fixed, by_digit = attend(params, ab, n_heads)
    _, _, token_value, place_value = tables(params, n_heads)
    base, D = by_digit.shape[1], len(ab) // 2
    signs = torch.stack([place_value[D], place_value[2 * D + 1]]) + token_value[base:]
    value = torch.cat([token_value[:base], place_value[:D], place_value[D + 1:2 * D + 1], signs])
    weight = torch.cat([by_digit, score, fixed], 1)  # [heads, base + 2D + 2, B]
    heads = patch("heads", torch.einsum("hkb,khe->bhe", weight, value.unflatten(1, (n_heads, -1))))
    equals = params["W_E"][-1] + params["W_pos"][2 * D + 1]
    return mlp(params, equals + heads.flatten(1) @ params["W_O"], patch) @ params["W_U"]


def nll(logits, labels):
    """-log softmax(logits)[label] over the last axis, as log1p(sum of exp(z_j - z_label) over the
    others): in float32 this is exact down to 1e-38, where log_softmax stops at 1e-7."""
    here = torch.arange(logits.shape[-1], device=logits.device) == labels[..., None]
    gap = (logits - (logits * here).sum(-1, keepdim=True)).masked_fill(here, -math.inf)
    top = gap.amax(-1, keepdim=True).detach().clamp(min=0)
    rest = (gap - top).exp().sum(-1)
    return top[..., 0] + torch.log1p(rest + torch.expm1(-top[..., 0]))

# ==== Train ==========================================================================================
def start(run, positions=None):
    params = init(run, common.generator(run.seed, "init"), positions)
    return {"params": params, **common.adam_init(params)}


def digit_loss(flags, params, ab, digit):
    """Mean loss of digit number `digit` at `=`, in nats."""
    return nll(fast_forward(params, ab, flags.n_heads), pick(columns(ab, flags.base)[2], digit)).mean()


def step_of(flags, loss_of=digit_loss):
    """The training step of ONE run."""
    def step(state, number):
        ab = sample(flags, common.key(number["seed"], 0, state["t"]), flags.batch)
        loss_at = lambda params: loss_of(flags, params, ab, number["digit"])
        grads, loss = grad_and_value(loss_at)(state["params"])
        size = norm(grads)
        scale = torch.where((number["clip"] > 0) & (size > number["clip"]), number["clip"] / size, 1.)
        grads = {k: scale * g for k, g in grads.items()}
        lr = number["lr"] * ((state["t"] + 1) / number["warmup"]).clamp(max=1)
        params, optimiser = common.adamw(state["params"], grads, state, lr, number["weight_decay"],
                                         number["beta1"], number["beta2"], number["eps"])
        return {"params": params, **optimiser}, {"loss": loss, "grad_norm": size}
    return step


def evaluate_of(flags):
    """What is evaluated of ONE run, on fixed digits: loss, accuracy, P(correct); delta [2, base], the
    mean of P((n + delta) mod base) by carry, and other [2], the mass on `+` and `=`; pair = -ln(P_n +
    P_{n+1}), lost before the carry is asked for (loss - pair is what the carry costs); alias [divisors],
    -ln of the mass on n mod m, lost by a model that knows n only mod m. Means in nats."""
    ab, base = evaluation_set(flags), flags.base
    naive, carry, total = columns(ab, base)
    def evaluate(params, number):
        n, c, labels = (pick(x, number["digit"]) for x in (naive, carry, total))
        logits = fast_forward(params, ab, flags.n_heads)
        loss, probs = nll(logits, labels), logits.softmax(-1)
        shifted = probs.gather(1, (n[:, None] + torch.arange(base, device=ab.device)) % base)
        cost = lambda deltas: -shifted[:, deltas].sum(1).clamp(min=1e-38).log().mean()
        def by_carry(x):
            return torch.stack([(x * (c == k)[:, None]).sum(0) / (c == k).sum() for k in (0, 1)])
        return {"loss": loss.mean(), "accuracy": (logits.argmax(-1) == labels).float().mean(),
                "correct": (-loss).exp().mean(), "delta": by_carry(shifted),
                "other": by_carry(probs[:, base:]).sum(1), "pair": cost(slice(0, 2)),
                "alias": torch.stack([cost(slice(0, base, m)) for m in divisors(base)])}
    return evaluate


def divisors(base):
    """The moduli m < base that divide the base, 1 apart: what a model may know of n instead of n."""
    return [m for m in range(1, base) if base % m == 0]


def norm(tensors):
    return torch.sqrt(sum((x * x).sum() for x in tensors.values()))


def smooth(y, width):
    """Running mean along axis 0 over the last `width` entries (fewer at the start)."""
    total = np.cumsum(y, 0, dtype=float)
    total[width:] -= total[:-width].copy()
    return (total.T / np.minimum(np.arange(len(y)) + 1, width)).T


def geometric(loss, width=10):
    """Geometric mean over the last `width` steps of loss [T, R]: the curve in which levels are read."""
    return np.exp(smooth(np.log(np.maximum(loss, 1e-38)), width))


def milestones(runs, metrics):
    """Per run, of the loss [T, R]: the step of first descent (10-step mean 0.1 below the loss that sees
    nothing) and of reaching 1e-3, infinite where it never comes; the lowest 10-step geometric mean and
    its step; the final one (100 steps); the largest regrowth between steps 100 and 600; the number of
    spikes (above 1e-3 after below 1e-4), the first; the deviation of log loss from its 100-step mean."""
    loss = np.asarray(metrics["loss"], float)
    blind = np.array([floors(run.base, run.digits)[run.digit, 0] for run in runs])
    curve = geometric(loss)
    low = np.fmin.accumulate(curve)
    armed, spiking = np.zeros(len(runs), bool), np.zeros(loss.shape, bool)
    for t, row in enumerate(curve):
        armed |= row < 1e-4
        spiking[t] = armed & (row > 1e-3)
        armed &= ~spiking[t]
    log = np.log(curve)
    late = (log - smooth(log, 100))[1000:]
    when = lambda hit: np.where(hit.any(0), hit.argmax(0) + 1., np.inf)
    found = {"descent": when(smooth(loss, 10) < blind - .1), "reach": when(curve < 1e-3),
             "lowest": low[-1], "lowest_step": when(curve == low[-1]),
             "final": geometric(loss[-100:], 100)[-1],
             "bump": (curve[1:] / low[:-1])[99:599].max(0, initial=1.),
             "spikes": spiking.sum(0), "first_spike": when(spiking),
             "vibration": late.std(0) if len(late) else np.nan}
    stopped = np.isnan(loss[-1])  # or diverged: without a value
    return {k: np.where(stopped, np.nan, x) for k, x in found.items()}


def train(flags, folder, start=start, step_of=step_of, evaluate_of=evaluate_of):
    return common.train(common.groups_of_runs(flags), folder, start, step_of, evaluate_of)


def digit_name(flags, k):
    return "leading carry" if k == flags.digits else DIGITS[k]


def side_by_side(trained):
    """The metrics of all groups along one axis of runs, {name: [T, R, ...]}; the steps are the same."""
    join = lambda k: np.concatenate([t.metrics[k] for t in trained], 1)
    return {k: x if x.ndim == 1 else join(k) for k, x in trained[0].metrics.items()}


def outcomes(runs, metrics):
    """Milestones, accuracy, digit, config [R], and delta_spectrum [R, 2, base], the last eval_delta."""
    names = [digit_name(run, run.digit) for run in runs]
    return milestones(runs, metrics) | {"digit": [run.digit for run in runs],
        "config": [f"{name} {run.d_model}/{run.n_heads} decay {run.weight_decay:g}"
                   for name, run in zip(names, runs)],
        "accuracy": metrics["eval_accuracy"][-1], "delta_spectrum": metrics["eval_delta"][-1]}


def curves(trained):
    """Groups side by side: step [T], loss, grad_norm [T, R], eval_step [M], eval_* [M, R], outcomes."""
    metrics = side_by_side(trained)
    return metrics | outcomes([run for t in trained for run in t.runs], metrics)

# ==== What several studies share =====================================================================
def teacher_floor(base, k):
    """Loss of digit k of a model that sees its column, the one above and the answers before."""
    return (1 - 1 / base) * carry_entropy(carry_probability(base, k))


def ablated(name, part=slice(None)):
    """The patch that puts the batch mean in place of `part` of axis 1 of `name`: mean ablation."""
    def patch(seen, x):
        if seen == name:
            x = x.clone()
            x[:, part] = x[:, part].mean(0)
        return x
    return patch


def part_ablations(flags):
    """Patches that ablate one part of a model each: the heads in order, then the MLP."""
    return [*(ablated("heads", h) for h in range(flags.n_heads)), ablated("neurons")]


def rise(loss, patches):
    """By how much loss(patch) is above the loss of the whole model, [patches, ...]."""
    return torch.stack([loss(patch) for patch in patches]) - loss(unchanged)


def one_shape(flags):
    if len(common.groups_of_runs(flags)) > 1:
        raise common.Stop(f"--study {flags.study} compares runs of one shape: sweep digit, lr, ..")


def configurations(arrays, limit):
    """(name, mask over runs, digit) of the first configurations."""
    for name in [*dict.fromkeys(arrays["config"].tolist())][:limit]:
        mine = arrays["config"] == name
        yield name, mine, int(arrays["digit"][mine][0])


def panels_by_configuration(arrays, flags, title, wide):
    """Up to four panels, `wide` a configuration: (figure, [(name, mask over runs, digit, panels)])."""
    parts = [*configurations(arrays, 4 // wide)]
    figure, axes = common.panels(wide * len(parts), title, flags)
    return figure, [(*part, axes[wide * i:wide * (i + 1)]) for i, part in enumerate(parts)]


def shelves(ax, flags, k):
    """The exact levels that a loss curve of digit k can rest on, dashed and labelled."""
    levels = floors(flags.base, flags.digits)[k]
    common.shelf(ax, levels[0], f"sees nothing: {levels[0]:.4g}")
    for seen, value in enumerate(levels[1:], 1):
        if value > 0:
            common.shelf(ax, value, f"columns seen: {seen}, no carry: {value:.4g}")


def lines(ax, x, groups, title, ylabel, **axes):
    """Median and quartiles over runs of each group {label: y [T, R]}; the log axis of steps has a 0."""
    for (label, y), colour in zip(groups.items(), common.COLOURS * 2):
        common.band(ax, x, y, label, colour)
    axes = dict(xscale="symlog", xlim=(0, None), xlabel="step") | axes
    ax.set(title=title, ylabel=ylabel, **axes)
    if ax.lines:
        ax.legend(fontsize=7)


def bars(ax, names, groups, title, ylabel, **axes):
    """Bars by name, of each group {label: y [R, names]} the median over runs; single runs as dots."""
    for i, (label, y) in enumerate(groups.items()):
        x = np.arange(len(names)) + .4 * i
        if len(y):
            name = f"{label} ({len(y)} runs)"
            ax.bar(x, np.nanmedian(y, 0), .4, color=common.COLOURS[i], label=name)
            ax.plot(x, y.T, ".", color="black", ms=3)
            ax.legend(fontsize=7)
    ax.set(title=title, ylabel=ylabel, **axes)
    name_ticks(ax, names)


def name_ticks(ax, names):
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)

# ==== Studies ========================================================================================
class Digit(common.Study):
    """When do units and tens leave their shelves?

    arrays: see `curves`; rest_level, rest_step [R], where a run rests between the blind level and .5."""
    defaults = dict(sweep=["digit=0,1"], steps=1200, evals=24)
    smoke = SMOKE

    def compute(flags, folder):
        arrays = curves(train(flags, folder))
        blind = floors(flags.base, flags.digits)[arrays["digit"], 0]
        arrays["rest_level"], arrays["rest_step"] = Digit.resting_level(arrays["loss"], blind - .1, .5)
        return arrays

    def resting_level(loss, top, bottom):
        """Level and step [2, R] of the 50 steps over which the 30-step mean of loss [T, R] moves least
        while it is between bottom and top [R]; NaN for a run that does not pass there."""
        mean = smooth(loss, 30)
        then = np.roll(mean, 50, 0)
        then[:50] = np.inf
        resting = (then < top) & (mean < top) & (mean > bottom)
        at = np.where(resting, np.abs(mean - then), np.inf).argmin(0)
        level = np.take_along_axis(mean, at[None], 0)[0]
        return np.where(resting.any(0), [level, at + 1], np.nan)

    def claims(arrays, say):
        units, tens = arrays["digit"] == 0, arrays["digit"] == 1
        for mine, name in (units, "units"), (tens, "tens"):
            say(f"{name}-descend", f"the {name} at 128/4 leave log 10 at step 100 to 240",
                NOTES + "first descent at 120", arrays["descent"][mine], "in", (100, 240))
        say("units-zero", "the units' loss falls below 1e-7", NOTES + "descent to 8e-9 & stability",
            arrays["lowest"][units], "<", 1e-7)
        say("tens-shelf", "the tens' first shelf lies at .72 to .86 nats",
            NOTES + "a consistent 0.8-step", arrays["rest_level"][tens], "in", (0.72, 0.86))
        # what the loss consists of at the evaluation nearest to the shelf
        rest, steps = np.nan_to_num(arrays["rest_step"][tens]), arrays["eval_step"][:, None]
        at = np.abs(np.log((steps + 1) / (rest + 1))).argmin(0)
        value = lambda key: arrays[key][:, tens][at, np.arange(len(at))]
        say("tens-shelf-carry",
            "there the carry costs H(c_1) = .688 nats, to .1: it is not known at all",
            NOTES + "log2; p(naive-sum-digit), p(naive-sum-digit+1)",
            value("eval_loss") - value("eval_pair"), "in", (0.588, 0.788))
        say("tens-shelf-column", "and the column costs less than .15 nats: it is known",
            NOTES + "the theory that it learns to choose between the two possible ones",
            value("eval_pair"), "<", 0.15)

    def draw_curves(arrays, flags):
        title = "When does each digit's loss leave its shelf?"
        figure, parts = panels_by_configuration(arrays, flags, title, 1)
        for name, mine, k, (ax,) in parts:
            loss = {"training loss, 10-step mean": geometric(arrays["loss"][:, mine])}
            lines(ax, arrays["step"], loss, name, "loss (nats)", yscale="log")
            shelves(ax, flags, k)
        return figure

    def draw_delta(arrays, flags):
        title = "Where the answer lies: its distance from the naive digit n = (a_k + b_k) mod base"
        figure, parts = panels_by_configuration(arrays, flags, title, 1)
        for name, mine, k, (ax,) in parts:
            delta = arrays["eval_delta"][:, mine]  # [M, R, carry, delta]
            terms = {f"P(n + {d} | carry {c})": delta[:, :, c, d]
                     for c in range(2 if k else 1) for d in (0, 1)}  # no carry enters the units
            lines(ax, arrays["eval_step"], terms, name, "mean probability")
            common.shelf(ax, 1 / flags.base, "chance, 1/base")
        return figure

    def draw_decomposition(arrays, flags):
        figure, parts = panels_by_configuration(arrays, flags, "What the loss consists of", 1)
        for name, mine, k, (ax,) in parts:
            loss, pair, alias = (arrays[f"eval_{key}"][:, mine] for key in ("loss", "pair", "alias"))
            if k:
                terms = {"column: -ln(P(n) + P(n + 1))": pair, "carry: the rest": loss - pair}
            else:
                terms = {f"of it, for n given n mod {m}": loss - alias[..., i]
                         for i, m in enumerate(divisors(flags.base)) if i}
            lines(ax, arrays["eval_step"], {"loss": loss} | terms, name, "nats on the evaluation set")
            shelves(ax, flags, k)
        return figure


class Theory(common.Study):
    """What can be known: every exact shelf, for any --base and --digits?

    arrays: carry_probability [D+1]; floor [D+1, D+2] (digit, columns seen); teacher_floor [D+1]."""

    def compute(flags, folder):
        base, D = flags.base, flags.digits
        floor = floors(base, D)
        common.tell(f"loss in nats by digit (from the units up) and columns seen:\n{floor.round(7)}")
        return {"carry_probability": [carry_probability(base, k) for k in range(D + 1)], "floor": floor,
                "teacher_floor": [teacher_floor(base, k) for k in range(D)] + [math.nan]}

    def claims(arrays, say):
        say("tens-at-log2", "the shelf of tens that know no carry is log 2, to 1e-4",
            NOTES + "8/1: yep to log2. a little higher actually", float(arrays["floor"][1, 1]),
            "in", (math.log(2) - 1e-4, math.log(2) + 1e-4))

    def draw_floors(arrays, flags):
        title = f"What can be known: base {flags.base}, {flags.digits} digits (exact)"
        figure, (ax,) = common.panels(1, title, flags, size=(8, 5))
        for k, levels in enumerate(arrays["floor"]):
            seen = np.flatnonzero(levels > 0)
            x = seen + .04 * k  # else equal lines hide each other
            ax.plot(x, levels[seen], "o-", color=common.COLOURS[k % 8], label=digit_name(flags, k))
        ax.set(xlabel="columns seen, from the own one down (lines are set apart)", yscale="log",
               ylabel="Bayes-optimal loss (nats)")
        ax.legend(fontsize=7)
        return figure


class All(common.Study):
    """All digits at once: which is learned when, and does teacher forcing leak?

    arrays: as in `curves`; eval_digit_loss, eval_digit_accuracy [M, R, D+1] from the units up."""
    defaults = dict(sweep=["answer=teacher,parallel"], batch=64)
    smoke = SMOKE

    def compute(flags, folder):
        begin = lambda run: start(run, positions=3 * run.digits + 2)
        trained = train(flags, folder, begin, lambda run: step_of(run, All.loss), All.evaluate_of)
        names = [f"{run.answer} {run.d_model}/{run.n_heads}" for t in trained for run in t.runs]
        return side_by_side(trained) | {"config": names, "digit": [0] * len(names)}

    def answers(flags, ab):
        """Digits of the sum [B, D+1] in reading order, and what is fed after `=` [B, D]: the true ones,
        or `=`."""
        total = torch.stack(columns(ab, flags.base)[2][::-1], 1)
        fed = total[:, :-1]
        return total, fed if flags.answer == "teacher" else torch.full_like(fed, flags.base + 1)

    def logits(flags, params, ab, patch=unchanged):
        """Logits [B, D+1, vocab] at `=` and after it: those of `forward`, but each kind of token and
        each position is multiplied by W_Q, W_K and W_V once."""
        tokens = torch.cat([tokens_of(flags, ab), All.answers(flags, ab)[1]], 1)
        first = 2 * flags.digits + 1
        kind = (tokens[..., None] == torch.arange(flags.vocab, device=ab.device)).to(params["W_E"].dtype)
        def looked_up(W, start=0):
            x = kind[:, start:] @ (params["W_E"] @ params[W]) + params["W_pos"][start:] @ params[W]
            return x.unflatten(-1, (flags.n_heads, -1)).transpose(1, 2)
        mixed = attention(looked_up("W_Q", first), looked_up("W_K"), looked_up("W_V"), patch)
        x = kind[:, first:] @ params["W_E"] + params["W_pos"][first:]
        return mlp(params, x + mixed @ params["W_O"], patch) @ params["W_U"]

    def loss(flags, params, ab, digit):
        return nll(All.logits(flags, params, ab), All.answers(flags, ab)[0]).mean()

    def evaluate_of(flags):
        ab = evaluation_set(flags, 2048)
        total = All.answers(flags, ab)[0]
        def evaluate(params, number):
            logits = All.logits(flags, params, ab)
            loss, right = nll(logits, total), (logits.argmax(-1) == total).float()
            return {"loss": loss.mean(), "accuracy": right.mean(), "digit_loss": loss.mean(0).flip(0),
                    "digit_accuracy": right.mean(0).flip(0)}
        return evaluate

    def claims(arrays, say):
        loss, teacher = arrays["eval_digit_loss"], np.char.startswith(arrays["config"], "teacher")
        steps, below = np.append(arrays["eval_step"], np.inf), loss < .1  # [M, R, D+1]
        when = steps[np.where(below.any(0), below.argmax(0), len(loss))]  # [R, D+1]
        ahead = when[:, 0] / when[:, 1:-1].min(1)
        for mode, mine in ("teacher", teacher), ("parallel", ~teacher):
            say(f"units-first-{mode}",
                f"with {mode} answers the units come first of the digits that have a column "
                "(step at .1 nats over that of the first other)",
                NOTES + "training on all digits simultaneously", ahead[mine], "<", 1)
        early = (arrays["eval_step"] >= 15) & (arrays["eval_step"] <= 100)
        leak = loss[early][..., -2].mean(0)
        say("teacher-leaks",
            "a model that is fed the leading carry knows more of the next digit at once (its loss at "
            "steps 15 to 100, teacher minus parallel, same seed)",
            "H(z_4 | z_5) = 2.113 < log 10: the first digit of the answer tells of the second",
            leak[teacher] - leak[~teacher], "<", -0.05)

    def draw_digits(arrays, flags):
        title = "All digits at once: which is learned when? (dashed: levels of the tens)"
        figure, parts = panels_by_configuration(arrays, flags, title, 1)
        for name, mine, _, (ax,) in parts:
            loss = {digit_name(flags, k): arrays["eval_digit_loss"][:, mine, k]
                    for k in range(flags.digits + 1)}
            lines(ax, arrays["eval_step"], loss, name, "loss (nats)", yscale="log")
            shelves(ax, flags, 1)
        return figure


class Anatomy(common.Study):
    """How are digits added: by which heads, neurons, frequencies, and from when on?

    arrays, [R, ...]: digit, config, all of `measure`; over_step [S], over_* [S, R, ...] of `develop`."""
    defaults = dict(sweep=["digit=0,1"], evals=24, snapshots=True)
    smoke = SMOKE
    free = ("checkpoint", "digit", "sweep")

    def check(flags):
        neurons = [f"neuron:{i}" for i in range(4 * flags.d_model)]
        if flags.probe not in ["logit", *neurons, *(f"head:{i}" for i in range(flags.n_heads))]:
            raise common.Stop(f"--probe {flags.probe}: give logit, neuron:I or head:I, "
                              f"I below {len(neurons)} or {flags.n_heads}")
        if not flags.mlp:
            raise common.Stop("--no-mlp: --study anatomy looks at the neurons of the MLP")
        one_shape(flags)

    def compute(flags, folder):
        trained = Anatomy.checkpoint(flags) if flags.checkpoint else train(flags, folder)[0]
        ab, runs, steps = evaluation_set(flags).cpu(), trained.runs, trained.metrics["eval_step"]
        def each(measure, params, ab):
            return common.stack([measure(r, common.run_of(params, i), ab) for i, r in enumerate(runs)])
        arrays = each(Anatomy.measure, trained.params, ab)
        snapshots = common.tree_map(torch.tensor, trained.snapshots)
        over = [each(Anatomy.develop, common.run_of(snapshots, s), ab[:, :2048])
                for s in range(len(steps))]
        if over:
            arrays |= {f"over_{k}": x for k, x in common.stack(over).items()}
        return arrays | {"digit": [run.digit for run in runs], "over_step": steps,
                         "config": [digit_name(run, run.digit) for run in runs]}

    def checkpoint(flags):
        """What `train` returned when it wrote the file that --checkpoint names, but for its history."""
        saved, wanted = common.read(Path(flags.checkpoint)), start(flags)["params"]
        found = {k: x.shape[1:] for k, x in saved["params"].items()}
        if found != {k: x.shape for k, x in wanted.items()} or "number" not in saved:
            raise common.Stop(f"{flags.checkpoint} is unfinished or of another shape than these flags")
        runs = [replace(flags, digit=int(digit)) for digit in saved["number"]["digit"]]
        history = dict(metrics={"eval_step": []}, snapshots={})
        return SimpleNamespace(runs=runs, params=saved["params"], **history)

    def recorder(patch=unchanged):
        """A patch that keeps what it returns by name: (patch, {name: x})."""
        seen = {}
        def look(name, x):
            seen[name] = patch(name, x)
            return seen[name]
        return look, seen

    def watch(flags, params, ab, patch=unchanged):
        """(loss, logits [B, vocab], activations by name) at `=`."""
        look, seen = Anatomy.recorder(patch)
        logits = fast_forward(params, ab, flags.n_heads, look)
        return nll(logits, columns(ab, flags.base)[2][flags.digit]).mean(), logits, seen

    def measure(flags, params, ab):
        """Of one trained model: attention [heads, positions] of `=`, and scores [heads, positions,
        vocab], which fix it exactly; the rise of the loss without a head or the MLP, ablation [heads +
        1], without the neurons that depend most on column c, ablation_group [D], without attention of
        `=` to itself or the skip past the MLP, shortcuts [2]; gradient_input [positions]; exchange [3],
        root mean square of the neurons, of their change when a and b change places, and between
        unrelated examples; neuron_dependence [neurons, 3D], the correlation ratio on the 2D digits, then
        on columns D-1 .. 0; dependence_mean [3D], weighted by variance; place_similarity; `fourier`."""
        loss = lambda patch: Anatomy.watch(flags, params, ab, patch)[0]
        neurons_of = lambda ab: Anatomy.watch(flags, params, ab)[2]["neurons"]
        D = flags.digits
        look, seen = Anatomy.recorder()
        forward(params, tokens_of(flags, ab), flags.n_heads, 2 * D + 1, look)
        weights = seen["attention"][:, :, 0]  # [B, heads, positions]
        token_score, place_score, *_ = tables(params, flags.n_heads)
        value = ((params["W_E"][-1] + params["W_pos"][-1]) @ params["W_V"]).view(flags.n_heads, -1)
        itself = weights[..., -1]
        excess = (itself.mean(0) - itself)[..., None] * value  # [B, heads, d_head]
        constant = lambda name, x: x + excess if name == "heads" else x
        neurons = neurons_of(ab)
        a, b = ab.split(D)
        inputs = torch.cat([ab, a * flags.base + b])
        depends = torch.stack([Anatomy.correlation_ratio(neurons, x) for x in inputs], -1)
        group = depends[:, -D:].flip(1).argmax(1)  # the column that a neuron depends on most
        changes = [neurons, neurons_of(ab.roll(D, 0)) - neurons, neurons.roll(1, 0) - neurons]
        variance = neurons.var(0).float()
        return {"attention": weights.mean(0), "scores": place_score[:, :, None] + token_score[:, None],
                "ablation": rise(loss, part_ablations(flags)),
                "ablation_group": rise(loss, [ablated("neurons", group == c) for c in range(D)]),
                "shortcuts": rise(loss, [constant, ablated("skip")]),
                "gradient_input": Anatomy.gradient_input(flags, params, ab[:, :1024]),
                "exchange": torch.stack([x.square().mean().sqrt() for x in changes]),
                "place_similarity": Anatomy.place_similarity(flags, params),
                "neuron_dependence": depends, "dependence_mean": variance / variance.sum() @ depends,
                **Anatomy.fourier(flags, params)}

    def develop(flags, params, ab):
        """What is followed over training: full_loss, restricted_loss, excluded_loss, ablation."""
        loss = lambda patch: Anatomy.watch(flags, params, ab, patch)[0]
        found = {k: x for k, x in Anatomy.fourier(flags, params).items() if k.endswith("_loss")}
        return found | {"ablation": rise(loss, part_ablations(flags))}

    def correlation_ratio(m, classes):
        """Share of Var(m) that a class label explains, for m [B, ...], labels [B]: [...], Kelley's
        epsilon squared, which is 0 in expectation where m does not depend on the label."""
        m = (m - m.mean(0)).double()
        groups = [m[classes == c] for c in classes.unique()]
        within = sum((x - x.mean(0)).square().sum(0) for x in groups)
        rest = within / (len(m) - len(groups)) / m.var(0)
        return (1 - rest).nan_to_num(0).float()  # 0 / 0: m is constant

    def gradient_input(flags, params, ab):
        """Mean |gradient times embedding| by position, of --probe (a head: its output's norm)."""
        kind, _, index = flags.probe.partition(":")
        tokens, labels = tokens_of(flags, ab), columns(ab, flags.base)[2][flags.digit]
        def quantity(places):
            look, seen = Anatomy.recorder()
            last = 2 * flags.digits + 1
            logits = forward(params | {"W_pos": places}, tokens, flags.n_heads, last, look)
            if kind == "neuron":
                return seen["neurons"][..., int(index)].sum()
            if kind == "head":
                return seen["heads"][:, int(index)].norm(dim=-1).sum()
            return logits[:, 0].gather(1, labels[:, None]).sum()
        places = params["W_pos"].expand(len(tokens), -1, -1)  # its gradient is that of the embedding
        embedding = params["W_E"][tokens] + places
        return (torch.func.grad(quantity)(places) * embedding).sum(-1).abs().mean(0)

    def fourier(flags, params, contexts=64):
        """The own column in the Fourier basis of Z_base x Z_base (Nanda et al. 2023), frequencies w = 1
        .. base/2, on every (a_k, b_k) in the same random contexts: restricted_loss [] keeps of the
        logits what depends on a_k + b_k (the diagonal frequencies) and on the context alone;
        excluded_loss [w] removes the diagonal frequency w; embedding_spectrum [w] is |W_E|^2,
        normalised; neuron_r2 [neurons, w]: share of a neuron's variance over (a, b) (mean over contexts)
        in the nine terms {1, cos, sin}(a) x {1, cos, sin}(b) of w, the constant apart; neuron_active
        [neurons]: share of m > 0; term_energy [2, w, 4]: `terms` of neurons, and of logits."""
        D, base = flags.digits, flags.base
        k = min(flags.digit, D - 1)
        ab = torch.randint(base, (2 * D, contexts), generator=common.generator(1, "eval"))
        ab = ab.repeat(1, base ** 2)
        cell = torch.arange(base ** 2).repeat_interleave(contexts)
        ab[D - 1 - k], ab[2 * D - 1 - k] = cell // base, cell % base
        full, logits, seen = Anatomy.watch(flags, params, ab)
        grid = lambda x: x.unflatten(0, (base, base, -1))  # [a, b, contexts, ...]
        logits, neurons = grid(logits), grid(seen["neurons"])
        labels = grid(columns(ab, base)[2][flags.digit])
        # masks over frequencies: of one variable [w, base], of both [w, base, base]
        w, f = torch.arange(1, base // 2 + 1), torch.arange(base)
        own = (f == w[:, None]) | (f == base - w[:, None])
        diagonal = torch.diag_embed(own)
        either = own | (f == 0)
        nine = either[:, :, None] & either[:, None]
        power = torch.fft.fft2(logits, dim=(0, 1))
        kept = lambda mask: torch.fft.ifft2(power * mask[..., None, None], dim=(0, 1)).real
        loss = lambda mask: nll(kept(mask), labels).mean()
        sums = diagonal.any(0)
        sums[0, 0] = True
        spectrum = torch.fft.fft(params["W_E"][:base], dim=0).abs().square().sum(1)
        spectrum = (own * spectrum).sum(1)
        energy = lambda x: torch.fft.fft2(x.mean(2), dim=(0, 1)).abs().square()  # [a freq, b freq, ...]
        each, after = energy(neurons), energy(logits).sum(-1)
        each[0, 0] = 0  # a neuron's mean
        inside, total = torch.einsum("wab,abn->wn", nine.to(each.dtype), each), each.sum((0, 1))
        return {"full_loss": full, "restricted_loss": loss(sums),
                "excluded_loss": torch.stack([loss(~mask) for mask in diagonal]),
                "embedding_spectrum": spectrum / spectrum.sum(),
                "neuron_r2": torch.where(total > 1e-12, inside / total, 0.).T,
                "neuron_active": (neurons > 0).float().mean((0, 1, 2)),
                "term_energy": torch.stack([Anatomy.terms(x, w) for x in (each.sum(-1), after)])}

    def terms(energy, w):
        """Power [w, 4] of a spectrum [a freq, b freq] in the terms of a, b, a + b and a - b, normalised
        to sum one. At w = base/2 the last two are the same function: it counts as a + b."""
        other = (2 * w < len(energy)).to(energy.dtype)  # -w is another frequency
        power = torch.stack([energy[w, 0], energy[0, w], energy[w, w], other * energy[w, -w]], -1)
        power = power * (1 + other[:, None])
        return power / power.sum().clamp(min=1e-30)

    def place_similarity(flags, params, draws=1000):
        """Cosine and |x-y|^2 / (|x| |y|) of the position vectors of a_k and b_k from the units up, and
        their 1 %, 50 % and 99 % quantiles when coordinates of y are permuted at random: [D, 2, 4]."""
        D, x, g = flags.digits, params["W_pos"], common.generator(0, "law")
        a, b = x[:D].flip(0), x[D + 1:2 * D + 1].flip(0)
        size = a.norm(dim=1) * b.norm(dim=1)
        both = lambda y: torch.stack([(a * y).sum(1), (a - y).square().sum(1)]) / size  # [2, D]
        null = [both(b[:, torch.randperm(x.shape[1], generator=g)]) for _ in range(draws)]
        levels = torch.stack(null).quantile(torch.tensor([.01, .5, .99]).to(x), 0)
        return torch.cat([both(b)[None], levels]).permute(2, 1, 0)

    def claims(arrays, say):
        nanda = "Nanda et al. 2023, quoted in the " + NOTES
        for name, mine, k in configurations(arrays, 4):
            of = lambda key: arrays[key][mine]
            solved = of("full_loss") < .05  # a circuit is read off a model that has one
            def judge(id, statement, source, values, *rule):
                known = np.where(solved, values, np.nan)
                say(f"{id}-{name}", f"{name}: {statement}", source, known, *rule)
            itself, skip = of("shortcuts").T
            judge("self-attention", "attention of `=` to itself is negligible (mean ablation, nats)",
                  nanda + "Attention from position 2 to itself is negligible", itself, "<", .01)
            judge("skip", "the skip past the MLP acts as a bias (mean ablation, nats)",
                  nanda + "the skip connection just acts as a bias term", skip, "<", .01)
            places = of("place_similarity")[:, :, 0]
            cosine, _, _, null = places[:, min(k, places.shape[1] - 1)].T
            judge("same-places", "the position vectors of a_k and b_k are the same (cosine)",
                  nanda + "Position embeddings in position 0 and 1 are the same", cosine, ">", .9)
            judge("alike-places",
                  "they are more alike than permuted ones (cosine minus the 99 % quantile)",
                  NOTES + "randomly permute dimensions of y & compute", cosine - null, ">", 0)
            top = np.sort(of("embedding_spectrum"), 1)[:, -2:].sum(1)
            judge("sparse-embedding", "W_E is sparse in the Fourier basis (share of two frequencies)",
                  nanda + "the embedding matrix being sparse", top, ">", .8)
            judge("nine-terms", "nine terms of one frequency give most of a neuron (median R^2)",
                  nanda + "well approximated by a linear combination of those 9 terms",
                  np.median(of("neuron_r2").max(-1), 1), ">", .85)
            before, after = of("term_energy").sum(2)[..., 2].T
            judge("cancels",
                  f"W_out W_U leave the terms of a + b (share of power; {np.median(before):.0%} before)",
                  nanda + "cancel out all directions other than cos(w(x+y)), sin(w(x+y))",
                  after, ">", .9)
            size, swapped, unrelated = of("exchange").T
            judge("symmetric-neurons",
                  f"neurons hardly change when a and b change places (over the change of unrelated "
                  f"examples; root mean square {np.median(size):.2g}, change {np.median(swapped):.2g})",
                  NOTES + "isn't quite convincing without absolute values of activations",
                  swapped / unrelated, "<", 0.25)

    def positions(flags):
        """a4 .. a0 and b4 .. b0, as the tokens stand."""
        return [[f"{operand}{k}" for k in reversed(range(flags.digits))] for operand in "ab"]

    def draw_attention(arrays, flags):
        title = "Attention of `=`, first run: mean weight, exact score of every token at every position"
        figure, parts = panels_by_configuration(arrays, flags, title, 2)
        a, b = Anatomy.positions(flags)
        for name, mine, k, (left, right) in parts:
            weights = arrays["attention"][mine][0]
            head = int(weights[:, max(flags.digits - 1 - k, 0)].argmax())
            scores, title = arrays["scores"][mine][0, head].T, f"{name}: scores of head {head}, centred"
            common.image(left, weights, f"{name}: mean attention", figure, ylabel="head", limits=(0, 1))
            left.set_yticks(range(flags.n_heads))
            common.image(right, scores - scores.mean(), title, figure, ylabel="token (last: + and =)")
            for ax in left, right:
                name_ticks(ax, [*a, "+", *b, "="])
        return figure

    def draw_dependence(arrays, flags):
        title = "Which inputs matter to the neurons, and which parts to the answer"
        figure, parts = panels_by_configuration(arrays, flags, title, 2)
        columns = [f"column {k}" for k in range(flags.digits)]
        inputs = sum(Anatomy.positions(flags), []) + columns[::-1]
        model = [f"head {h}" for h in range(flags.n_heads)] + ["MLP", "= to itself", "skip past MLP"]
        model += [f"{c} neurons" for c in columns]
        for name, mine, k, (left, right) in parts:
            depends = {"all neurons": arrays["dependence_mean"][mine]}
            bars(left, inputs, depends, f"{name}: correlation ratio", "share of neurons' variance")
            keys = "ablation", "shortcuts", "ablation_group"
            change = {"mean ablation": np.hstack([arrays[key][mine] for key in keys])}
            right.set_yscale("symlog", linthresh=1e-3)
            bars(right, model, change, f"{name}: what the answer needs", "increase of the loss (nats)")
        return figure

    def draw_fourier(arrays, flags):
        title = "The column in the Fourier basis: which frequencies are needed, what W_out W_U cancel"
        figure, parts = panels_by_configuration(arrays, flags, title, 2)
        for name, mine, k, (left, right) in parts:
            rises = arrays["excluded_loss"] - arrays["full_loss"][:, None]
            excluded = {"one frequency of a+b removed": rises[mine]}
            bars(left, range(1, flags.base // 2 + 1), excluded, name, "increase of the loss (nats)",
                 xlabel="frequency removed from the logits")
            before, after = arrays["term_energy"][mine].sum(2).swapaxes(0, 1)  # [R, term]
            energy = {"neurons": before, "logits, after W_out W_U": after}
            bars(right, ["of a", "of b", "of a+b", "of a-b"], energy, name, "share of power")
        return figure

    def draw_development(arrays, flags):
        steps, title = arrays["over_step"], "When does each part become necessary?"
        if not len(steps):  # a checkpoint has no history
            return None
        figure, parts = panels_by_configuration(arrays, flags, title, 1)
        for name, mine, k, (ax,) in parts:
            loss, rises = arrays["over_full_loss"][:, mine], arrays["over_ablation"][:, mine]
            found = {"loss": loss, "without the MLP": loss + rises[..., -1],
                     "without the most important head": loss + rises[..., :-1].max(-1),
                     "functions of a+b alone": arrays["over_restricted_loss"][:, mine]}
            lines(ax, steps, found, name, "loss (nats)", yscale="log")
        return figure


class Spikes(common.Study):
    """What removes the repeated spike of the tens?

    arrays: see `curves`; second_moment, weight_norm, update_norm [T, R]; around_* [steps, spikes];
    intervention [I]; fork_loss [I, steps, spikes], fork_worst [spikes, I]."""
    defaults = dict(digit=1, weight_decay=.5, steps=5000, evals=2)
    smoke = dict(SMOKE, steps=400, runs=1)
    before, after, lead = 150, 100, 50  # steps around a spike, and from an intervention until these
    watched = ("loss", "grad_norm", "second_moment", "weight_norm", "update_norm")
    check = one_shape

    def step_of(flags):
        plain = step_of(flags)
        def step(state, number):
            new, logs = plain(state, number)
            move = {k: new["params"][k] - p for k, p in state["params"].items()}
            logs |= {"second_moment": sum(v.sum() for v in new["v"].values()).sqrt(),
                     "weight_norm": norm(new["params"]), "update_norm": norm(move)}
            return new, logs
        return step

    def interventions(run, calm):
        """{name: changed flags}; the second is a sham. calm: the gradient's median norm before."""
        return {"none": {}, "rate x 1.001": dict(lr=1.001 * run.lr), "eps 1e-6": dict(eps=1e-6),
                "beta2 .999": dict(beta2=.999), "clip at median": dict(clip=calm),
                "decay off": dict(weight_decay=0.), "rate / 2": dict(lr=run.lr / 2)}

    def first_spikes(arrays):
        return arrays["first_spike"]

    def replay(run, past, steps, folder):
        """Train a run again until after `past`, its gradient norms (same program, same bits), and
        from there on once with each intervention, with the same random numbers: loss [steps, I]."""
        run = replace(run, compile="on" if common.NOW.compiled[0][0] else "off")
        runs = [replace(run, steps=len(past))]
        again, = common.train([runs], folder / "past", start, Spikes.step_of)
        state = common.run_of({"params": again.params, **again.optimiser}, 0)
        changes = Spikes.interventions(run, float(np.median(past[-100:]))).values()
        runs = [replace(run, steps=steps, **change) for change in changes]
        return common.train([runs], folder, lambda run: state, Spikes.step_of)[0].metrics["loss"]

    def compute(flags, folder):
        trained, = train(flags, folder, step_of=Spikes.step_of)
        arrays, names = curves([trained]), [*Spikes.interventions(flags, 0.)]
        shown = Spikes.first_spikes(arrays) - Spikes.before  # from this step on
        window, lead, forks = Spikes.before + Spikes.after, Spikes.lead, []
        spiking = np.flatnonzero((shown > lead) & (shown + window <= flags.steps))
        shown = shown[spiking].astype(int)
        for r, at in zip(spiking, shown):
            past = arrays["grad_norm"][:at - lead, r]
            loss = Spikes.replay(trained.runs[r], past, lead + window, folder / f"spike{r}")
            forks.append(loss[lead:])
        forks = np.reshape(forks, (-1, window, len(names)))
        at = shown + np.arange(window)[:, None]
        arrays |= {f"around_{k}": arrays[k][at, spiking] for k in Spikes.watched}
        return arrays | {"intervention": names, "fork_loss": forks.transpose(2, 1, 0),
                         "fork_worst": geometric(forks.swapaxes(0, 1)).max(0)}

    def claims(arrays, say):
        quote = NOTES + "probably a gradient spike of unclear provenance"
        for i, name in enumerate(arrays["intervention"].tolist()):
            worst, begin = arrays["fork_worst"][:, i], Spikes.lead + Spikes.before
            if i < 2:
                say(["replay", "sham"][i], f"control: with {name}, {begin} steps before the first "
                    "spike, it comes again", quote, worst, ">", 1e-3)
            else:
                say(f"cause-{name.replace(' ', '-')}", f"{name}, {begin} steps before the first spike, "
                    f"removes it (until {Spikes.after} steps after)", quote, worst, "<", 1e-3)

    def draw_spikes(arrays, flags):
        figure, (a, b) = common.panels(2, "What drives the repeated spike?", flags)
        around = {key.replace("_", " "): arrays[f"around_{key}"] for key in Spikes.watched}
        steps = np.arange(-Spikes.before, Spikes.after)
        lines(a, steps, around, "Around the first spikes", "nats, or norm", xscale="linear",
              xlim=None, xlabel="step relative to the spike", yscale="log")
        title, label = "Each spike replayed with one change", "highest loss in the window (nats)"
        worst = {"first spikes": arrays["fork_worst"]}
        bars(b, arrays["intervention"], worst, title, label, yscale="log")
        common.shelf(b, 1e-3, "counts as a spike")
        return figure


class Sweep(common.Study):
    """Every row of the notes' tables, or a grid: when does each descend, where does it end? (hours)

    arrays [R]: swept fields, seed, outcomes, kind; curve [R, 200], 10-step mean loss at curve_step."""
    defaults = dict(steps=5000, evals=2)
    smoke = dict(SMOKE, runs=1)

    def rows():
        """The notes' tables as tuples: id, setting, steps, quantity, lowest, highest, sentence."""
        for line in ROWS.strip().splitlines():
            id, digit, size, decay, steps, key, low, high, sentence = line.split(None, 8)
            yield id, f"{digit} {size} decay {decay}", int(steps), key, float(low), float(high), sentence

    def points(flags):
        """The notes' rows, steps scaled by --steps / 5000; more eps; more seeds where they are cheap."""
        points, settings = [], [(setting, steps, 1e-8) for _, setting, steps, *_ in Sweep.rows()]
        settings += [("units 128/4 decay 0.5", 3000, eps) for eps in (1e-9, 1e-7, 1e-6)]
        for setting, steps, eps in dict.fromkeys(settings):
            digit, size, _, decay = setting.split()
            d, heads = map(int, size.split("/"))
            many = 16 if size == "2/2" else 4 if d <= 4 else 1
            point = dict(digit=DIGITS.index(digit), d_model=d, n_heads=heads, weight_decay=float(decay),
                         eps=eps, steps=max(1, steps * flags.steps // 5000), runs=many * flags.runs)
            if d <= 2 or not flags.smoke:
                points.append(point)
        return points

    def compute(flags, folder):
        fields = ["seed", "d_model", "n_heads", "weight_decay", "eps", "steps", *common.swept(flags)]
        found = []
        for t in train(flags, folder):
            at = np.geomspace(1, t.runs[0].steps, 200).round().astype(int)
            last = (t.metrics[f"eval_{k}"][-1] for k in ("loss", "pair", "alias"))
            found.append({k: [getattr(run, k) for run in t.runs] for k in fields}
                         | outcomes(t.runs, t.metrics)
                         | {"kind": [*map(Sweep.shelf_kind, t.runs, *last)],
                            "curve": geometric(t.metrics["loss"])[at - 1].T,
                            "curve_step": [at] * len(t.runs)})
        return {k: np.concatenate([f[k] for f in found]) for k in found[0]}

    def shelf_kind(flags, loss, pair, alias):
        """What a final loss means, to .15 nats: `solved`; `n mod m`: that much of the column is known
        (`n mod 1`: nothing); `carry-blind`: the column is known, the carry is not; or `between`."""
        if loss < .01:
            return "solved"
        own_column = floors(flags.base, flags.digits)[flags.digit, 1]
        if flags.digit and pair < .15 and abs(loss - pair - own_column) < .15:
            return "carry-blind"
        for m, cost in zip(divisors(flags.base), alias):
            if cost < .15 and abs(loss - cost - math.log(flags.base / m)) < .15:
                return f"n mod {m}"
        return "between"

    def claims(arrays, say):
        g = np.random.default_rng(0)
        def of(key, setting, eps=1e-8):
            return arrays[key][(arrays["config"] == setting) & (arrays["eps"] == eps)]
        def estimate(id, statement, quote, f, groups, *rule):
            """A claim about f(groups of runs), with its 95 % interval over resampled runs."""
            draws = [f(*(g.choice(x, len(x)) for x in groups)) for _ in range(500)]
            say(id, statement, NOTES + quote, (f(*groups), *np.quantile(draws, [.025, .975])), *rule)
        for id, setting, _, key, low, high, sentence in Sweep.rows():
            statement = f"{setting}: {sentence}, {key}"
            say(id, statement, NOTES + sentence, of(key, setting), "in", (low, high))
        log = lambda x: math.log(np.median(x))
        slope = lambda x, y: np.polyfit(x, y, 1)[0]
        ratio = lambda a, b: np.median(a) / np.median(b)
        units = lambda size: of("descent", f"units {size} decay 0")
        estimate("width-delays",
                 "halving the width delays the units' descent by this factor (4 heads, 8 to 128)",
                 "smth like x1.5 time to drop per /2 of d_model",
                 lambda *waits: math.exp(-slope([3, 4, 7], [*map(log, waits)])),
                 [units("8/4"), units("16/4"), units("128/4")], "in", (1.3, 1.75))
        estimate("width-hyper",
                 "the delay per halving grows towards width 2 (log of 2/2 over 4/4 minus 4/4 over 8/8)",
                 "maybe hyperexponentially, when close to 0",
                 lambda a, b, c: log(c) - 2 * log(b) + log(a),
                 [units("8/8"), units("4/4"), units("2/2")], ">", 0)
        say("waiting-exponential", *Sweep.waiting(units("2/2"), g))
        for d, few, many in (16, 1, 4), (8, 1, 4), (8, 4, 8), (4, 1, 4):
            estimate(f"heads-slow-units-{d}-{many}",
                     f"{d} wide, the units descend later with {many} heads than with {few} "
                     "(share of pairs of runs)", "for this task more heads are worse",
                     lambda a, b: np.mean(a[:, None] > b),
                     [units(f"{d}/{many}"), units(f"{d}/{few}")], ">", 0.5)
        weights = [(.25, 1e-8), (.5, 1e-8), (1, 1e-8), (.5, 1e-9), (.5, 1e-7), (.5, 1e-6)]
        estimate("decay-floor",
                 "the units' final loss is proportional to weight_decay x eps (log-log slope)",
                 "WD=1: to 20e-9; WD=0.5: to 8e-9",
                 lambda *losses: slope([math.log(w * e) for w, e in weights], [*map(log, losses)]),
                 [of("final", f"units 128/4 decay {w:g}", e) for w, e in weights], "in", (0.8, 1.2))
        final, lowest = (of(key, "units 128/4 decay 0.5") for key in ("final", "lowest"))
        say("slow-regrowth",
            "at decay .5 the units' loss grows back slowly after its lowest (final over lowest; whether "
            "this is the early bump slowed down no curve decides: remove one, does the other go?)",
            NOTES + "dips to 7-8 & then slowly goes back to 8-9", final / lowest, ">", 1.05)
        estimate("decay-damps",
                 "decay .25 at least halves the tens' vibration (ratio of deviations of log loss)",
                 "WD=0.25 diminishes the loss vibration drastically", ratio,
                 [of("vibration", f"tens 128/4 decay {w}") for w in (.25, 0)], "<", 0.5)
        estimate("heads-speed-tens",
                 "the tens converge sooner with 128 heads than with 2 (ratio of steps)",
                 "more heads makes things happen faster I think", ratio,
                 [of("reach", f"tens 128/{h} decay 0.25") for h in (128, 2)], "<", 1)
        decays = (0, .1, .15, .2, .225, .25, .5)
        estimate("decay-spikes",
                 "the tens spike more often with more decay (spikes a run, slope over decay)",
                 "a repeatable gradient spike, intensified by WD",
                 lambda *spikes: slope(decays, [x.mean() for x in spikes]),
                 [of("spikes", f"tens 128/4 decay {w}") for w in decays], ">", 0)
        alone = np.concatenate([of("reach", f"tens {d}/1 decay 0.25") for d in (128, 256, 512)])
        say("one-head-fails-tens", "one head never brings the tens below 1e-3 (widths 128, 256, 512)",
            NOTES + "1 is too few (even for 512/1)", alone, ">", 1e9)

    def waiting(waits, g):
        """Are waiting times exponential above a dead time? Deviation over mean excess of those above the
        least, against its central 95 % for exponential times (which are rejected once in twenty)."""
        def excess(x):
            rest = np.sort(x)[..., 1:] - x.min(-1, keepdims=True)
            return rest.std(-1, ddof=1) / rest.mean(-1)
        low, high = np.quantile(excess(g.exponential(size=(2000, len(waits)))), [.025, .975])
        statement = (f"waiting times of 2/2 are exponential above a dead time (deviation over mean "
                     f"excess; {len(waits)} seeds; no verdict while a seed has not descended)")
        quote = "chances of extant circuits to be accidentally close enough to the necessary basin"
        measured = float(excess(waits)) if np.isfinite(waits).all() else [math.nan]
        return statement, NOTES + quote, measured, "in", (low, high)

    def draw_rows(arrays, flags):
        settings = zip(arrays["config"], arrays["steps"], arrays["eps"])
        names, y = np.unique([f"{c}, {t} steps, eps {e:g}" for c, t, e in settings], return_inverse=True)
        title = "When does each configuration descend, where does it end? (red: the notes' tolerance)"
        figure, (a, b) = common.panels(2, title, flags, size=(5.4, max(3.7, .16 * len(names))))
        for _, setting, steps, key, low, high, _ in Sweep.rows():
            row = np.flatnonzero(names == f"{setting}, {steps} steps, eps 1e-08")
            if key in ("descent", "final"):
                ax = a if key == "descent" else b
                ax.hlines(row, low, min(high, 1e5), color="red", lw=4, alpha=.35)
        a.plot(arrays["descent"], y, "o", ms=3)
        a.set(xscale="log", xlabel="step of first descent (no dot: never)")
        a.set_yticks(range(len(names)), names, fontsize=5.5)
        b.plot(np.maximum(arrays["final"], 1e-13), y, "o", ms=3)
        b.set(xscale="log", xlabel="final loss (nats); dashed: sees nothing (exact)", yticks=[])
        b.axvline(math.log(flags.base), color="grey", ls="--")
        return figure


# The notes' tables. A quoted step is reproduced within a factor 1.5, a small loss within a factor 3; a
# bump is a regrowth by 10 %; never is inf. Decay, if not named: 0 for the units, .25 for the others.
#   digit     d/heads decay steps quantity   lowest  highest the notes
ROWS = """
u1   units     128/4   0     3000  descent     80      180     decay 0: first descent at 120
u2   units     128/4   0     3000  lowest      0       1.8e-10 decay 0: descent to at least 60e-12
u3   units     128/4   1     3000  descent     93.3    210     decay 1: first descent at 140ish
u4   units     128/4   1     3000  bump        1.1     inf     decay 1: a bump at 200-280ish
u5   units     128/4   1     3000  lowest      6.67e-09 6e-08   decay 1: to 20e-9, then stability
u6   units     128/4   1     3000  lowest_step 1067    2400    decay 1: lowest at 1600ish
u7   units     128/4   0.5   3000  lowest      2.67e-09 2.4e-08 decay .5: descent to 8e-9
u8   units     128/4   0.25  3000  bump        1.1     inf     decay .25: a mild growback is visible
u9   units     128/4   0.2   3000  bump        0       1.1     decay .2: the brief step is not visible
u10  units     128/4   0.1   3000  bump        0       1.1     decay .1: the brief step is not visible
u11  units     4/4     0     5000  descent     1600    3600    4/4: log10 all the way to 2400ish
u12  units     4/4     0     5000  reach       inf     inf     4/4: the descent does not complete by 5k
u13  units     8/4     0     5000  descent     1133    2550    8/4: log10 until 1700ish
u14  units     8/4     0     5000  lowest      0       1.2e-09 8/4: loglinear to 400e-12 at 5k
u15  units     16/4    0     5000  descent     800     1800    16/4: log10 until 1200
u16  units     16/1    0     5000  descent     400     900     16/1: descent much sooner, at around 600
u17  units     4/1     0     5000  descent     1733    3900    4/1: descends slowly and late, ~2600
u18  units     8/1     0     5000  descent     1200    2700    8/1: descent by 1800ish
u19  units     8/1     0     5000  final       0.0667  0.15    8/1: keeps dropping to 0.1 at 5k
u20  units     128/128 0     3000  descent     80      180     128/128: nothing new
u21  units     32/32   0     3000  descent     427     960     32/32: log10 until 640ish
u22  units     8/8     0     5000  descent     1067    2400    8/8: log10 until 1600ish
u23  units     8/8     0     5000  spikes      1       inf     8/8: spike at 4250ish
u24  units     3/3     0     10000 descent     3600    8100    3/3: at 5400ish
u25  units     2/2     0     30000 descent     10000   inf     2/2: not by 10k
u26  units     2/2     0     30000 descent     17933   40350   2/2: extremely eventually, at around 26900
u27  units     2/1     0     10000 descent     3600    8100    2/1: descends faster, at 5400ish
u28  units     2/1     0     10000 final       1.8     2.2     2/1: gets stuck at a loss of 2
u29  units     1/1     0     50000 descent     50000   inf     1/1: does not descend from log10 in 50k
t1   tens      128/1   0.25  5000  reach       inf     inf     128/1: breaks the convergence
t2   tens      128/2   0.25  5000  reach       1       1e+09   128/2: converges
t3   tens      128/4   0.25  5000  reach       1       1e+09   128/4: converges
t4   tens      64/2    0.25  5000  reach       inf     inf     64/2: doesn't
t5   tens      64/4    0.25  5000  reach       1       1e+09   64/4: does
t6   tens      32/4    0.25  5000  reach       inf     inf     32/4: not
t7   tens      32/8    0.25  5000  reach       inf     inf     32/8: nope
t8   tens      32/16   0.25  5000  reach       1       1e+09   32/16: looks converging
t9   tens      16/16   0.25  5000  reach       1       1e+09   16/16: converges
t10  tens      8/8     0.25  15000 final       0.0547  0.123   8/8: descends to e^-2.5 by 15k
t11  tens      8/1     0.25  5000  final       0.66    0.8     8/1: to log2, a little higher
t12  tens      8/2     0.25  5000  final       1.26    1.54    8/2: to 2.1 first and to 1.4 second
t13  tens      8/4     0.25  5000  final       0.66    0.8     8/4: ~0.73 at 5k
t14  tens      128/128 0.25  3000  reach       1       1e+09   128/128: converges
t15  tens      256/1   0.25  3000  reach       inf     inf     256/1: does not converge
t16  tens      256/2   0.25  3000  reach       1       1e+09   256/2: does
t17  tens      512/1   0.25  2000  reach       inf     inf     512/1: doesn't
t18  tens      512/2   0.25  2000  reach       1       1e+09   512/2: does
t19  tens      128/4   0.5   5000  spikes      3       3       decay .5: peaks thrice in 5k
t20  tens      128/4   0     5000  spikes      0       0       128/4 decay 0: no spike in 5k
t21  tens      128/4   0.1   5000  spikes      1       2       decay .1: repeats only once or twice
t22  tens      128/4   0.15  5000  spikes      0       0       decay .15: no (or too small) spike
t23  tens      128/4   0.2   5000  spikes      1       2       decay .2: one and a half spikes
t24  tens      128/4   0.225 5000  spikes      2       inf     decay .225: multiple spikes
t25  tens      128/8   0     5000  spikes      0       0       128/8 decay 0: no spike
t26  tens      128/2   0     5000  spikes      1       inf     128/2 decay 0: spikes
h1   hundreds  128/4   0.25  5000  reach       inf     inf     hundreds 128/4: doesn't do it
h2   hundreds  128/128 0.25  5000  reach       1       1e+09   hundreds 128/128: yep
h3   hundreds  128/32  0.25  5000  reach       1       1e+09   hundreds 128/32: also yep
h4   hundreds  128/8   0.25  5000  reach       1       1e+09   hundreds 128/8: also yep
k1   thousands 128/128 0.25  5000  reach       inf     inf     thousands 128/128: doesn't
k2   thousands 256/256 0.25  3000  reach       inf     inf     thousands 256/256: also doesn't
"""

STUDIES = [Digit, Theory, All, Anatomy, Spikes, Sweep]

if __name__ == "__main__":
    raise SystemExit(common.main(Flags, STUDIES))
