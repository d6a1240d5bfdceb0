"""How does a one-layer transformer add numbers, and which digit does it learn when?

Law: a and b have D digits, i.i.d. uniform in 0..base-1, most significant first; a + b = sum_k z_k
base^k. Input `a_{D-1} .. a_0 + b_{D-1} .. b_0 =`, target z_k (`--digit k`: 0 units, 1 tens, .., D the
carry), read at `=`. With n_k = (a_k + b_k) mod base and c_k the carry into column k, z_k = (n_k + c_k)
mod base: a model that knows its own column but no carry has the loss H(c_k) (.688 nats for the tens,
-> log 2), one that knows nothing log base.

    python exp_addition.py                       one minute: when do units and tens leave their shelves?
    python exp_addition.py --study anatomy       three minutes: attention, neurons, frequencies
    python exp_addition.py --study theory        seconds: every exact shelf, for any --base and --digits

Claims are quoted from research notes of 2023-04-18, "128/4" is d_model/n_heads; model and optimiser are
theirs.
"""
import math
from dataclasses import dataclass, replace
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
    evals: int = flag(30, "log-spaced evaluations over training", low=2)
    probe: str = flag("logit", "gradient times input of `logit`, `neuron:I` or `head:I`")
    checkpoint: str = flag("", "a checkpoint.pt to take apart instead of training")

    def check(self):
        if self.digit > self.digits:
            raise common.Stop(f"--digit {self.digit} must be at most --digits {self.digits}")
        if self.d_model % self.n_heads:
            raise common.Stop(f"--d-model {self.d_model} must be divisible by "
                              f"--n-heads {self.n_heads}")

    @property
    def vocab(self):
        return self.base + 2  # the digits, `+` = base, `=` = base + 1


SMOKE = dict(steps=20, runs=2, d_model=8, n_heads=2, batch=32, evals=2)
NOTES = "research notes, 2023-04-18: "
DIGITS = ["units", "tens", "hundreds", "thousands"]

# ==== Data law =======================================================================================


def sample(flags, key, batch):
    """Digits of a then b, each most significant first: int64 [2D, batch]. (The batch is the last axis:
    along it the fast path vectorises. A pair of digits takes one random number.)"""
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
        naive.append(pair - base * (pair >= base).to(ab.dtype))
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
    ab = torch.randint(flags.base, shape, generator=common.generator(0, "eval"))
    return ab.to(common.device(flags))


def carry_probability(base, k):
    """P(carry into column k) = (1 - base^-k) / 2."""
    return (1 - float(base) ** -k) / 2


def carry_entropy(p):
    """Entropy in nats of a carry that has probability p."""
    return sum(-x * math.log(x) for x in (p, 1 - p) if x > 0)


def floors(base, digits):
    """Bayes-optimal loss in nats of digit k of a model that sees its L top columns (its own and the L -
    1 below; for the leading carry k = D the columns D-1, D-2, ..): floor[k, L] [D+1, D+2], NaN where
    undefined. The carry stays unknown only where every column that is seen below the own one sums to
    base - 1."""
    floor = np.full((digits + 1, digits + 2), np.nan)
    for k in range(digits + 1):
        top = k < digits  # the leading carry has no column of its own
        floor[k, 0] = math.log(base) if top else carry_entropy(carry_probability(base, k))
        for seen in range(1, k + 1 + top):
            below = seen - top
            floor[k, seen] = float(base) ** -below * carry_entropy(carry_probability(base, k - below))
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


def forward(params, tokens, n_heads, first=0, patch=unchanged):
    """The textbook model: logits [B, T - first, vocab] at positions first.. of tokens [B, T].
    patch(name, x) -> x sees, and may change, `embedding` [B, T, d], `attention` [B, heads, T - first,
    T], `heads` [B, heads, T - first, d_head] (before W_O), `neurons` [B, T - first, 4d] and `skip` [B, T
    - first, d], the residual stream past the MLP."""
    x = patch("embedding", params["W_E"][tokens] + params["W_pos"])
    T, d = x.shape[1:]
    split = lambda y: y.unflatten(-1, (n_heads, d // n_heads)).transpose(1, 2)
    q, k, v = split(x[:, first:] @ params["W_Q"]), split(x @ params["W_K"]), split(x @ params["W_V"])
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)[first:]
    scores = (q @ k.transpose(-1, -2) / math.sqrt(d // n_heads)).masked_fill(future, -math.inf)
    mixed = patch("heads", patch("attention", scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
    return mlp(params, x[:, first:] + mixed @ params["W_O"], patch) @ params["W_U"]


def tables(params, n_heads):
    """All that attention of `=` can see. The query is one constant vector, keys and values are sums of a
    token's and a position's part: token scores [heads, vocab], position scores [heads, T], token values
    [vocab, d], position values [T, d]."""
    W_E, W_pos = params["W_E"], params["W_pos"]
    d = W_E.shape[1]
    query = ((W_E[-1] + W_pos[-1]) @ params["W_Q"]).view(n_heads, -1)
    keys = params["W_K"].view(d, n_heads, -1)
    query = torch.einsum("dhe,he->hd", keys, query) / math.sqrt(d // n_heads)
    return query @ W_E.T, query @ W_pos.T, W_E @ params["W_V"], W_pos @ params["W_V"]


def attend(params, ab, n_heads):
    """Attention of `=` by table look-up: weights of the digits [heads, 2D, B], of `+` and `=` [heads, 2,
    B], weights summed by digit value [heads, base, B]. The maximum is taken per example: a global one
    underflows where the scores of small models grow huge."""
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
    """Logits [B, vocab] at `=`, exactly those of `forward`, from digits ab [2D, B]. Token and position
    parts of the values are mixed apart, so no example's values are ever formed. patch sees `heads` [B,
    heads, d_head], `neurons` [B, 4d] and `skip` [B, d]."""
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
    top = top[..., 0]
    return top + torch.log1p(rest + torch.expm1(-top))


# ==== Train ==========================================================================================


def start(run, positions=None):
    """Step 0 of one run."""
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
        size = common.norm(grads)
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
    -ln of the mass on n mod m, lost by a model that knows n only mod m, for every m of `divisors`. Means
    in nats."""
    ab, base = evaluation_set(flags), flags.base
    naive, carry, total = columns(ab, base)
    naive.append(torch.zeros_like(carry[0]))  # the leading carry has no column

    def evaluate(params, number):
        n, c, labels = (pick(x, number["digit"]) for x in (naive, carry, total))
        logits = fast_forward(params, ab, flags.n_heads)
        loss, probs = nll(logits, labels), logits.softmax(-1)
        near = (n[:, None] + torch.arange(base, device=ab.device)) % base
        shifted = probs.gather(1, near)  # [B, delta]
        cost = lambda deltas: -shifted[:, deltas].sum(1).clamp(min=1e-38).log().mean()
        mean_if = lambda x, keep: (x * keep[:, None]).sum(0) / keep.sum()
        by_carry = lambda x: torch.stack([mean_if(x, c == 0), mean_if(x, c == 1)])
        return {"loss": loss.mean(), "accuracy": (logits.argmax(-1) == labels).float().mean(),
                "correct": (-loss).exp().mean(), "delta": by_carry(shifted),
                "other": by_carry(probs[:, base:]).sum(1), "pair": cost(slice(0, 2)),
                "alias": torch.stack([cost(slice(0, base, m)) for m in divisors(base)])}
    return evaluate


def divisors(base):
    """The moduli m < base that divide the base, 1 apart: what a model may know of n instead of n."""
    return [m for m in range(1, base) if base % m == 0]


def geometric(loss, width=10):
    """Geometric mean over the last `width` steps of loss [T, R]: the curve in which levels are read."""
    return np.exp(common.smooth(np.log(np.maximum(loss, 1e-38)), width))


def milestones(runs, metrics):
    """Per run: accuracy, and of the loss [T, R] at every step the step of first descent (10-step mean
    0.1 below the loss that sees nothing) and of reaching 1e-3, infinite where it never comes; the lowest
    10-step geometric mean and its step; the final one (last 100 steps); the largest regrowth between
    steps 100 and 600; the number of spikes (above 1e-3 after having been below 1e-4) and the step of the
    first; the vibration (standard deviation of log loss around its 100-step mean after step 1000)."""
    loss = np.asarray(metrics["loss"], float)
    blind = np.array([floors(r.base, r.digits)[r.digit, 0] for r in runs])
    curve = geometric(loss)
    low = np.fmin.accumulate(curve)
    when = lambda hit: np.where(hit.any(0), hit.argmax(0) + 1., np.inf)
    spikes, first = np.zeros(len(runs)), np.full(len(runs), np.inf)
    armed = np.zeros(len(runs), bool)
    for i, row in enumerate(curve):
        armed |= row < 1e-4
        new = armed & (row > 1e-3)
        first = np.where(new & np.isinf(first), i + 1, first)
        spikes, armed = spikes + new, armed & ~new
    log = np.log(np.maximum(curve, 1e-38))
    late = (log - common.smooth(log, 100))[1000:]
    bump = (curve / np.concatenate([curve[:1], low[:-1]]))[100:600]
    found = {"descent": when(common.smooth(loss, 10) < blind - 0.1), "reach": when(curve < 1e-3),
             "lowest": low[-1], "lowest_step": (curve == low[-1]).argmax(0) + 1.0, "spikes": spikes,
             "final": geometric(loss[-100:], 100)[-1], "bump": bump.max(0, initial=1.0),
             "first_spike": first, "vibration": late.std(0) if len(late) else np.full(len(runs), np.nan)}
    lost = np.isnan(loss[-1])  # diverged or stopped: without a value
    return {"accuracy": metrics["eval_accuracy"][-1],
            **{k: np.where(lost, np.nan, v) for k, v in found.items()}}


def train(flags, folder, groups=None, start=start, step_of=step_of, evaluate_of=evaluate_of,
          final=milestones):
    """Train the runs of these flags (or groups of runs) on fresh digits; see `common.train`."""
    groups = groups or common.groups_of_runs(flags)
    return common.train(groups, folder, start, step_of, evaluate_of, final=final,
                        eval_at=lambda run: common.marks(run.steps, run.evals))


def digit_name(flags, k):
    return "leading carry" if k == flags.digits else DIGITS[k] if k < 4 else f"10^{k}s"


def setting_of(run):
    """A configuration in words, with the notes' width/heads."""
    return f"{digit_name(run, run.digit)} {run.d_model}/{run.n_heads} decay {run.weight_decay:g}"


def curves(trained):
    """The arrays of trained groups side by side: step [T], eval_step [M], loss, grad_norm [T, R], eval_*
    [M, R, ...], milestones, digit and config [R], and delta_spectrum [R, 2, base], the last of
    eval_delta."""
    arrays = common.side_by_side(trained)
    runs = [run for t in trained for run in t.runs]
    arrays |= {k: np.concatenate([t.final[k] for t in trained]) for k in trained[0].final if k != "loss"}
    return arrays | {"digit": np.array([r.digit for r in runs]),
                     "config": np.array([setting_of(r) for r in runs]),
                     "delta_spectrum": arrays["eval_delta"][-1]}


# ==== What several studies share =====================================================================

BLUE, RED, GREEN, PINK = common.COLOURS[:4]
STEPS = dict(xscale="log", xlabel="step (0 is drawn at 0.7)")


def teacher_floor(base, k):
    """Loss of digit k of a model that sees its own column, the column above and the answers before:
    z_{k+1} and the column above tell the carry out of column k, which gives the carry into it away where
    n_k = base - 1."""
    return (1 - 1 / base) * carry_entropy(carry_probability(base, k))


def averaged(x, keep):
    """x with its batch mean in place of the entries where `keep` (broadcast) is False: mean ablation."""
    return torch.where(keep, x, x.mean(0, keepdim=True))


def part_ablations(n_heads, after):
    """Patches that mean-ablate one part of a model each: the heads in order, then the MLP. after: how
    many axes `heads` has from the heads on."""
    index = torch.arange(n_heads).view(-1, *[1] * (after - 1))
    heads = [lambda name, x, h=h: averaged(x, index != h) if name == "heads" else x
             for h in range(n_heads)]
    return [*heads, lambda name, x: averaged(x, torch.tensor(False)) if name == "neurons" else x]


def configurations(arrays, limit):
    """(name, mask over runs, digit) of the first `limit` configurations."""
    for name in list(dict.fromkeys(arrays["config"].tolist()))[:limit]:
        mine = arrays["config"] == name
        yield name, mine, int(arrays["digit"][mine][0])


def shelves(ax, flags, k):
    """The exact levels that a loss curve of digit k can rest on, dashed and labelled."""
    levels = floors(flags.base, flags.digits)[k]
    common.shelf(ax, levels[0], f"sees nothing: {levels[0]:.4g}")
    for seen, value in enumerate(levels[1:], 1):
        if value > 0:
            common.shelf(ax, value, f"sees {seen} column{'s' * (seen > 1)}, no carry: {value:.4g}")


# ==== Studies ========================================================================================


class Digit(common.Study):
    """When do units and tens leave their shelves?

    arrays: see `curves`; rest_level, rest_step [R], where a run rests between the blind level and .5."""
    defaults = dict(sweep=["digit=0,1"], steps=1200, evals=24)
    smoke = SMOKE

    def compute(flags, folder):
        arrays = curves(train(flags, folder))
        top = floors(flags.base, flags.digits)[arrays["digit"], 0] - .1
        arrays["rest_level"], arrays["rest_step"] = Digit.resting_level(arrays["loss"], top, .5)
        return arrays

    def resting_level(loss, top, bottom):
        """Level and step [2, R] of the 50 steps over which the 30-step mean of loss [T, R] moves least
        while it is between bottom and top [R]; NaN for a run that does not pass there."""
        mean = common.smooth(loss, 30)
        then, now = mean[:-50], mean[50:]
        still = np.where((now < top) & (then < top) & (now > bottom), np.abs(now - then), np.inf)
        if not len(still):
            return np.full((2, loss.shape[1]), np.nan)
        at, run = still.argmin(0), np.arange(loss.shape[1])
        return np.where(np.isfinite(still[at, run]), [now[at, run], at + 51.], np.nan)

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
        at = np.abs(np.log(steps + 1) - np.log(rest + 1)).argmin(0)
        value = lambda key: arrays[key][:, tens][at, np.arange(tens.sum())]
        say("tens-shelf-carry",
            "there the carry costs H(c_1) = .688 nats, to .1: it is not known at all",
            NOTES + "log2; p(naive-sum-digit), p(naive-sum-digit+1)",
            value("eval_loss") - value("eval_pair"), "in", (0.588, 0.788))
        say("tens-shelf-column", "and the column costs less than .15 nats: it is known",
            NOTES + "the theory that it learns to choose between the two possible ones",
            value("eval_pair"), "<", 0.15)

    def draw_curves(arrays, flags):
        parts = list(configurations(arrays, 4))
        figure, axes = common.panels(len(parts), "When does each digit's loss leave its shelf?", flags)
        for ax, (name, mine, k) in zip(axes, parts):
            loss, descent = geometric(arrays["loss"][:, mine]), arrays["descent"][mine]
            common.band(ax, arrays["step"], loss, "training loss, 10-step mean", BLUE)
            shelves(ax, flags, k)
            ax.plot(descent, np.full(len(descent), 4.), "v", color=RED, ms=4, label="first descent")
            ax.set(xscale="log", yscale="log", xlabel="step", ylabel="loss (nats)", title=name)
            ax.legend(fontsize=7, loc="lower left")
        return figure

    def draw_delta(arrays, flags):
        parts, x = list(configurations(arrays, 2)), np.maximum(arrays["eval_step"], .7)
        figure, axes = common.panels(
            2 * len(parts),
            "Where the answer lies: its distance from the naive digit n = (a_k + b_k) mod base",
            flags,
        )
        lines = (0, 0, BLUE), (0, 1, RED), (1, 0, GREEN), (1, 1, PINK)
        for (over, end), (name, mine, k) in zip(zip(axes[::2], axes[1::2]), parts):
            spectrum = arrays["eval_delta"][:, mine]  # [M, R, carry, delta]
            for c, delta, colour in lines[:4 if k else 2]:  # no carry enters the units
                label = f"P(n{' + 1' * delta} | carry {c})"
                common.band(over, x, spectrum[:, :, c, delta], label, colour)
            for c in range(2 if k else 1):
                place = np.arange(flags.base) + .4 * c - .2 * bool(k)
                common.bars(end, place, spectrum[-1, :, c], f"carry {c}", (BLUE, RED)[c], .4)
            over.set(**STEPS, title=f"{name}: over training")
            end.set(xlabel="delta = (answer - n) mod base", xticks=range(flags.base),
                    title=f"{name}: at the end")
            for ax in (over, end):
                ax.set(ylim=(0, 1.02), ylabel="mean probability")
                common.shelf(ax, 1 / flags.base, "chance, 1/base")
                ax.legend(fontsize=7)
        return figure

    def draw_decomposition(arrays, flags):
        parts, x = list(configurations(arrays, 4)), np.maximum(arrays["eval_step"], .7)
        figure, axes = common.panels(len(parts), "What the loss consists of", flags)
        for ax, (name, mine, k) in zip(axes, parts):
            loss, pair, alias = (arrays[f"eval_{key}"][:, mine] for key in ("loss", "pair", "alias"))
            common.band(ax, x, loss, "loss", BLUE)
            if k:
                common.band(ax, x, pair, "column: -ln(P(n) + P(n + 1))", RED)
                common.band(ax, x, loss - pair, "carry: the rest", GREEN)
            for i, m in enumerate(divisors(flags.base)[1:4] if k == 0 else []):
                level = math.log(flags.base / m)
                label, colour = f"of it, for n given n mod {m}", (RED, GREEN, PINK)[i]
                common.band(ax, x, loss - alias[..., i + 1], label, colour)
                common.shelf(ax, level, f"only n mod {m}: {level:.4g}", side="left")
            shelves(ax, flags, k)
            ax.set(**STEPS, ylabel="nats on the evaluation set", title=name)
            ax.legend(fontsize=7, loc="center left")
        return figure


class Theory(common.Study):
    """What can be known: every exact shelf, for any --base and --digits?

    arrays: carry_probability [D+1]; floor [D+1, D+2] (digit, columns seen); teacher_floor [D+1], own
    column, the column above and the answers before; one_wide_reached [], a loss that a residual stream
    of one number can have on the units."""

    def compute(flags, folder):
        base, D = flags.base, flags.digits
        chance, floor = [carry_probability(base, k) for k in range(D + 1)], floors(base, D)
        common.tell(f"base {base}, {D} digits; loss in nats of digit k by columns seen")
        for k, levels in enumerate(floor):
            seen = "  ".join(f"{x:.7f}" for x in levels if np.isfinite(x))
            common.tell(f"  {digit_name(flags, k):14} P(carry in) {chance[k]:.6f}   {seen}")
        return {"carry_probability": chance, "floor": floor,
                "one_wide_reached": Theory.one_wide_reached(base),
                "teacher_floor": [teacher_floor(base, k) for k in range(D)] + [math.nan]}

    def one_wide_reached(base, scale=1e6):
        """Loss of the units that a construction reaches with logits x u, one number x per answer. Half
        of the digits have positive u, half negative, with gaps that grow by `scale` from digit to digit;
        with x between two scales the k digits beyond the gap tie and all others are excluded: log k
        nats. Not a bound."""
        losses = []
        for m in (base - base // 2, base // 2):
            gaps = scale ** np.arange(m, dtype=float)  # below the first, second, .. digit of this side
            u = np.append(0, -np.cumsum(gaps))  # the last: everything else
            for k in range(m):
                z = u / gaps[k] * math.sqrt(scale)
                losses.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[k])
        return float(np.mean(losses))

    def claims(arrays, say):
        say("tens-at-log2", "the shelf of tens that know no carry is log 2, to 1e-4",
            NOTES + "8/1: yep to log2. a little higher actually", float(arrays["floor"][1, 1]),
            "in", (math.log(2) - 1e-4, math.log(2) + 1e-4))
        say("one-wide-can",
            "a 1/1 model's logits can be better than log 10 (by construction, not by learning)",
            NOTES + "1/1: does not descend from log10 in 50k", float(arrays["one_wide_reached"]), "<",
            math.log(10))

    def draw_floors(arrays, flags):
        title = f"What can be known: base {flags.base}, {flags.digits} digits (exact)"
        figure, (left, right) = common.panels(2, title, flags)
        for k, levels in enumerate(arrays["floor"]):
            seen = np.flatnonzero(levels > 0)
            x = seen + .04 * (k - flags.digits / 2)  # else equal lines hide each other
            left.plot(x, levels[seen], "o-", color=common.COLOURS[k % 8], ms=3, lw=.8,
                      label=digit_name(flags, k))
        left.set(yscale="log", xlabel="columns seen, from the own one down (lines are set apart)",
                 ylabel="Bayes-optimal loss (nats)", xticks=range(flags.digits + 1))
        right.plot(arrays["carry_probability"], "o-", color=BLUE)
        right.set(xlabel="column k", ylabel="P(carry into k) = (1 - base^-k) / 2", ylim=(0, .55))
        common.shelf(right, .5, "limit")
        left.legend(fontsize=7)
        return figure


class All(common.Study):
    """All digits at once: which is learned when, and does teacher forcing leak?

    arrays: step, loss, grad_norm, eval_step, eval_* as in `curves`; eval_digit_loss, eval_digit_accuracy
    [M, R, D+1] from the units up; ablation [R, parts, D+1], the rise of each digit's loss without a
    head, or the MLP."""
    defaults = dict(sweep=["answer=teacher,parallel"], batch=64)
    smoke = SMOKE

    def compute(flags, folder):
        trained = train(flags, folder, step_of=lambda run: step_of(run, All.loss),
                        evaluate_of=All.evaluate_of,
                        start=lambda run: start(run, positions=3 * run.digits + 2),
                        final=lambda runs, metrics: {"accuracy": metrics["eval_accuracy"][-1]})
        runs = [(run, common.run_of(t.state["params"], i))
                for t in trained for i, run in enumerate(t.runs)]
        names = np.array([f"{run.answer} {run.d_model}/{run.n_heads}" for run, _ in runs])
        return common.side_by_side(trained) | {
            "config": names,
            "digit": np.zeros(len(runs), int),
            "ablation": np.stack([All.ablation(*run) for run in runs]),
        }

    def answers(flags, ab):
        """Digits of the sum [B, D+1] in reading order, and what is fed after `=` [B, D]: the true ones,
        or `=`."""
        total = torch.stack(columns(ab, flags.base)[2][::-1], 1)
        fed = total[:, :-1]
        return total, fed if flags.answer == "teacher" else torch.full_like(fed, flags.base + 1)

    def logits(flags, params, ab, patch=unchanged):
        """Logits [B, D+1, vocab] at `=` and the digits after it: those of `forward`, which multiplies
        every token by W_Q, W_K and W_V where here each kind of token and each position is multiplied
        once."""
        tokens = torch.cat([tokens_of(flags, ab), All.answers(flags, ab)[1]], 1)
        first, T, d_head = 2 * flags.digits + 1, tokens.shape[1], flags.d_model // flags.n_heads
        kind = (tokens[..., None] == torch.arange(flags.vocab, device=ab.device)).to(params["W_E"].dtype)

        def looked_up(W, start=0):
            x = kind[:, start:] @ (params["W_E"] @ params[W]) + params["W_pos"][start:] @ params[W]
            return x.unflatten(-1, (flags.n_heads, d_head)).transpose(1, 2)
        future = torch.ones(T, T, dtype=torch.bool, device=ab.device).triu(1)[first:]
        scores = looked_up("W_Q", first) @ looked_up("W_K").transpose(-1, -2) / math.sqrt(d_head)
        attention = scores.masked_fill(future, -math.inf).softmax(-1)
        mixed = patch("heads", attention @ looked_up("W_V")).transpose(1, 2).flatten(2)
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

    def ablation(flags, params):
        ab = evaluation_set(flags, 2048).cpu()
        total = All.answers(flags, ab)[0]
        loss = lambda patch: nll(All.logits(flags, params, ab, patch), total).mean(0).flip(0)
        return torch.stack([loss(patch) for patch in part_ablations(flags.n_heads, 3)]) - loss(unchanged)

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
        parts, x = list(configurations(arrays, 2)), np.maximum(arrays["eval_step"], .7)
        figure, axes = common.panels(len(parts), "All digits at once: which is learned when?", flags)
        for ax, (name, mine, _) in zip(axes, parts):
            for k in range(flags.digits + 1):
                y = arrays["eval_digit_loss"][:, mine, k]
                common.band(ax, x, y, digit_name(flags, k), common.COLOURS[k % 8])
            common.shelf(ax, math.log(flags.base), "sees nothing", side="left")
            own_column = floors(flags.base, flags.digits)[1, 1]
            common.shelf(ax, own_column, "tens: own column, no carry", side="left")
            if "teacher" in name:
                level = teacher_floor(flags.base, 1)
                common.shelf(ax, level, "tens: own column, column above, earlier answers")
            ax.set(**STEPS, yscale="log", ylim=(1e-5, 8), ylabel="loss (nats)", title=name)
            ax.legend(fontsize=6.5, loc="lower left")
        return figure


class Anatomy(common.Study):
    """How are digits added: by which heads, neurons, frequencies, and from when on?

    arrays, [R, ...]: digit, config, what `measure` returns, over_step [S] and over_* [S, R, ...] of
    `develop`."""
    defaults = dict(sweep=["digit=0,1"], evals=2, snapshots=24)
    smoke = dict(SMOKE, snapshots=2)
    free = ("checkpoint", "digit", "sweep")

    def check(flags):
        kind, _, index = flags.probe.partition(":")
        most = {"neuron": 4 * flags.d_model, "head": flags.n_heads}.get(kind, 0)
        if flags.probe != "logit" and not (index.isdigit() and int(index) < most):
            raise common.Stop(
                f"--probe {flags.probe}: give logit, neuron:I below {4 * flags.d_model} or "
                f"head:I below {flags.n_heads}"
            )
        if len(common.groups_of_runs(flags)) > 1:
            raise common.Stop("--study anatomy compares runs of one shape: sweep numbers, such as digit")

    def stacked(rows):
        """Dicts of arrays, one a run or a step, to one with a leading axis."""
        rows = list(rows)
        return {k: np.stack([np.asarray(row[k]) for row in rows]) for k in rows[0]} if rows else {}

    def position_names(flags):
        """a4 .. a0 + b4 .. b0 =, as the tokens stand."""
        D = range(flags.digits - 1, -1, -1)
        return [f"a{k}" for k in D] + ["+"] + [f"b{k}" for k in D] + ["="]

    def compute(flags, folder):
        if flags.checkpoint:
            saved = common.checkpoint_of(flags.checkpoint, common.stack([start(flags)]))
            params, snapshots = saved["params"], {}
            known = saved.get("runs") or [{}] * len(params["W_E"])
            runs = [replace(flags, **{k: v for k, v in run.items() if hasattr(flags, k)})
                    for run in known]
        else:
            trained, = train(flags, folder)
            params, runs, snapshots = trained.state["params"], trained.runs, trained.snapshots
        ab, steps = evaluation_set(flags).cpu(), snapshots.pop("step", [])
        arrays = Anatomy.stacked(Anatomy.measure(run, common.run_of(params, i), ab)
                                 for i, run in enumerate(runs))
        over = [
            Anatomy.stacked(
                Anatomy.develop(run, {k: x[s, i] for k, x in snapshots.items()}, ab[:, :2048])
                for i, run in enumerate(runs)
            )
            for s in range(len(steps))
        ]
        arrays |= {f"over_{k}": v for k, v in Anatomy.stacked(over).items()}
        names = [digit_name(run, run.digit) for run in runs]
        return arrays | {"digit": [r.digit for r in runs], "config": names, "over_step": steps}

    def watch(flags, params, ab, patch=unchanged):
        """(loss, logits [B, vocab], activations by name) at `=`."""
        seen = {}

        def look(name, x):
            seen[name] = x
            return patch(name, x)
        logits = fast_forward(params, ab, flags.n_heads, look)
        return nll(logits, columns(ab, flags.base)[2][flags.digit]).mean(), logits, seen

    def measure(flags, params, ab):
        """Of one trained model: attention [heads, positions] of `=`, and scores [heads, positions,
        vocab], which fix it exactly; the rise of the loss without a head or the MLP, ablation [heads +
        1], without the neurons that depend most on column c, ablation_group [D], without attention of
        `=` to itself or the skip past the MLP, shortcuts [2]; gradient_input [positions]; exchange [3],
        root mean square of the neurons, of their change when a and b change places, and between
        unrelated examples; place_similarity; dependence_mean [3D], neuron_dependence weighted by
        variance; what `fourier` returns."""
        full, _, seen = Anatomy.watch(flags, params, ab)
        loss = lambda patch: Anatomy.watch(flags, params, ab, patch)[0]
        score, fixed, _ = attend(params, ab, flags.n_heads)
        token_score, place_score, token_value, place_value = tables(params, flags.n_heads)
        value, D = (token_value[-1] + place_value[-1]).view(flags.n_heads, -1), flags.digits
        excess = (fixed[:, 1].mean(1, keepdim=True) - fixed[:, 1]).T[:, :, None] * value
        shortcuts = [lambda name, x: x + excess if name == "heads" else x,
                     lambda name, x: averaged(x, torch.tensor(False)) if name == "skip" else x]
        weights = torch.cat([score[:, :D], fixed[:, :1], score[:, D:], fixed[:, 1:]], 1)
        found = {"attention": weights.mean(-1), "scores": place_score[:, :, None] + token_score[:, None],
                 "ablation": torch.stack([loss(p) for p in part_ablations(flags.n_heads, 2)]) - full,
                 "shortcuts": torch.stack([loss(p) for p in shortcuts]) - full,
                 "gradient_input": Anatomy.gradient_input(flags, params, ab[:, :1024]),
                 "place_similarity": Anatomy.place_similarity(flags, params),
                 **Anatomy.fourier(flags, params)}
        if "neurons" not in seen:
            return found
        neurons = seen["neurons"]
        depends = Anatomy.neuron_dependence(flags, neurons, ab)
        group = depends[:, -D:].flip(1).argmax(1)  # the column that a neuron depends on most
        without = [loss(lambda name, x, c=c: averaged(x, group != c) if name == "neurons" else x)
                   for c in range(D)]
        exchanged = Anatomy.watch(flags, params, ab.roll(D, 0))[2]["neurons"]
        size = lambda x: x.square().mean().sqrt()
        sizes = [size(neurons), size(exchanged - neurons), size(neurons.roll(1, 0) - neurons)]
        weight = neurons.var(0) / neurons.var(0).sum()
        return found | {"neuron_dependence": depends, "dependence_mean": weight @ depends,
                        "ablation_group": torch.stack(without) - full, "exchange": torch.stack(sizes)}

    def develop(flags, params, ab):
        """What is followed over training: full_loss, restricted_loss, excluded_loss, ablation."""
        parts = [Anatomy.watch(flags, params, ab, patch)[0]
                 for patch in part_ablations(flags.n_heads, 2)]
        found = {k: v for k, v in Anatomy.fourier(flags, params).items() if k.endswith("_loss")}
        return found | {"ablation": torch.stack(parts) - Anatomy.watch(flags, params, ab)[0]}

    def correlation_ratio(m, classes):
        """Share of Var(m) that a class label explains, Var(E[m | class]) / Var(m), for m [B, ...],
        labels [B]: [...]. Bias-corrected (Kelley's epsilon squared): 0 in expectation where m does not
        depend on the label."""
        m = (m - m.mean(0)).double()
        labels, index = classes.unique(return_inverse=True)
        count = torch.bincount(index).view(-1, *[1] * (m.ndim - 1))
        sums = torch.zeros(len(labels), *m.shape[1:], dtype=m.dtype).index_add_(0, index, m)
        total = (m ** 2).sum(0)
        within = (total - (sums ** 2 / count).sum(0)) / (len(m) - len(labels))
        share = 1 - within / (total / (len(m) - 1)).clamp(min=1e-300)
        return torch.where(total > 0, share, 0.).float()

    def neuron_dependence(flags, neurons, ab):
        """Correlation ratio of every neuron [neurons, 3D] on the 2D digits in reading order, then on the
        columns D-1 .. 0 (the pair a_k, b_k)."""
        a, b = ab.split(flags.digits)
        inputs = (*ab, *(a * flags.base + b))
        return torch.stack([Anatomy.correlation_ratio(neurons, x) for x in inputs], -1)

    def gradient_input(flags, params, ab):
        """Mean |gradient times embedding| of --probe at each position: `logit` (of the right digit),
        `neuron:i`, or `head:i` (the norm of its output)."""
        kind, _, index = flags.probe.partition(":")
        tokens, labels = tokens_of(flags, ab), columns(ab, flags.base)[2][flags.digit]
        embedding, seen = params["W_E"][tokens] + params["W_pos"], {}

        def quantity(x):
            def patch(name, value):
                seen[name] = x if name == "embedding" else value
                return seen[name]
            logits = forward(params, tokens, flags.n_heads, 2 * flags.digits + 1, patch)[:, 0]
            if kind == "logit":
                return logits.gather(1, labels[:, None]).sum()
            i = int(index)
            if kind == "neuron":
                return seen["neurons"][..., i].sum()
            return seen["heads"][:, i].norm(dim=-1).sum()
        return (torch.func.grad(quantity)(embedding) * embedding).sum(-1).abs().mean(0)

    def fourier(flags, params, contexts=64):
        """The own column in the Fourier basis of Z_base x Z_base (Nanda et al. 2023), frequencies w = 1
        .. base/2, on every (a_k, b_k) in the same random contexts: restricted_loss [] keeps of the
        logits what depends on a_k + b_k (the diagonal frequencies) and on the context alone;
        excluded_loss [w] removes the diagonal frequency w; embedding_spectrum [w] is |W_E|^2,
        normalised; neuron_r2 [neurons, w]: share of a neuron's variance over (a, b) (mean over contexts)
        in the nine terms {1, cos, sin}(a) x {1, cos, sin}(b) of w, the constant apart; neuron_active
        [neurons]: share of inputs with m > 0; term_energy [2, w, 4]: power in the terms of a, b, a + b,
        a - b, for neurons (before) and logits (after W_out W_U)."""
        k, D, base = min(flags.digit, flags.digits - 1), flags.digits, flags.base
        ab = torch.randint(base, (2 * D, contexts), generator=common.generator(1, "eval"))
        ab = ab.repeat(1, base ** 2)
        cell = torch.arange(base ** 2).repeat_interleave(contexts)
        ab[D - 1 - k], ab[2 * D - 1 - k] = cell // base, cell % base
        full, logits, seen = Anatomy.watch(flags, params, ab)
        grid = lambda x: x.unflatten(0, (base, base, -1))  # [a, b, contexts, ...]
        logits, labels = grid(logits), grid(columns(ab, base)[2][flags.digit])
        power, w = torch.fft.fft2(logits, dim=(0, 1)), torch.arange(1, base // 2 + 1)
        diagonal = torch.zeros(len(w), base, base, dtype=torch.bool)
        diagonal[w - 1, w, w] = diagonal[w - 1, -w % base, -w % base] = True
        keep = diagonal.any(0)
        keep[0, 0] = True
        back = lambda x: torch.fft.ifft2(x, dim=(0, 1)).real
        loss = lambda mask: nll(back(power * mask[..., None, None]), labels).mean()
        spectrum = torch.fft.fft(params["W_E"][:base], dim=0).abs().square().sum(1)
        spectrum = torch.where(2 * w == base, spectrum[w], spectrum[w] + spectrum[-w % base])
        energy = lambda x: torch.fft.fft2(x, dim=(0, 1)).abs().square()  # [a freq, b freq, ...]
        after = before = energy(logits.mean(2)).sum(-1)
        found = {"restricted_loss": loss(keep),
                 "excluded_loss": torch.stack([loss(~d) for d in diagonal]), "full_loss": full,
                 "embedding_spectrum": spectrum / spectrum.sum()}
        if "neurons" in seen:
            neurons = grid(seen["neurons"])
            each = energy(neurons.mean(2))
            total, before, nine = each.sum((0, 1)) - each[0, 0], each.sum(-1), []
            for f in w.tolist():
                terms = torch.tensor(sorted({0, f, base - f}))
                nine.append(each[terms][:, terms].sum((0, 1)) - each[0, 0])
            found["neuron_r2"] = torch.where(total > 1e-12, torch.stack(nine) / total, 0.).T
            found["neuron_active"] = (neurons > 0).float().mean((0, 1, 2))
        return found | {"term_energy": torch.stack([Anatomy.terms(before, w), Anatomy.terms(after, w)])}

    def terms(energy, w):
        """Power [w, 4] of the 2-D spectrum [a freq, b freq] of a real function in the terms of a, b, a +
        b and a - b, normalised to sum one. At w = base/2 the last two are the same function: it counts
        as a + b."""
        half = 2 * w == len(energy)
        minus = energy[w, -w % len(energy)].masked_fill(half, 0)
        power = torch.stack([energy[w, 0], energy[0, w], energy[w, w], minus], -1)
        power = power * (2 - half.to(energy.dtype))[:, None]  # w and -w
        return power / power.sum().clamp(min=1e-30)

    def place_similarity(flags, params, draws=1000):
        """Are the position vectors of a_k and b_k alike? cosine and |x-y|^2 / (|x| |y|) per column from
        the units up, and their 1 %, 50 % and 99 % quantiles when the coordinates of y are permuted at
        random: [D, 2, 4]."""
        D, x, g = flags.digits, params["W_pos"], common.generator(0, "law")
        a, b = x[:D].flip(0), x[D + 1:2 * D + 1].flip(0)
        shuffle = torch.stack([torch.randperm(x.shape[1], generator=g) for _ in range(draws)])
        size = a.norm(dim=1) * b.norm(dim=1)
        both = lambda y: torch.stack([(a * y).sum(-1) / size, (a - y).square().sum(-1) / size], -1)
        levels = torch.tensor([.01, .5, .99], dtype=x.dtype)
        null = both(b[:, shuffle].transpose(0, 1)).quantile(levels, 0)  # [3, D, 2]
        return torch.cat([both(b)[None], null]).permute(1, 2, 0)

    def claims(arrays, say):
        nanda = "Nanda et al. 2023, quoted in the " + NOTES
        for name, mine, k in configurations(arrays, 4):
            of = lambda key: arrays[key][mine]
            solved = of("full_loss") < .05  # a circuit is read off a model that has one

            def judge(id, statement, source, values, *rule):
                values = np.where(solved, values, np.nan)
                say(f"{id}-{name}", f"{name}: {statement}", source, values, *rule)
            itself, skip = of("shortcuts").T
            judge("self-attention", "attention of `=` to itself is negligible (mean ablation, nats)",
                  nanda + "Attention from position 2 to itself is negligible", itself, "<", .01)
            judge("skip", "the skip past the MLP acts as a bias (mean ablation, nats)",
                  nanda + "the skip connection just acts as a bias term", skip, "<", .01)
            column = min(k, arrays["place_similarity"].shape[1] - 1)
            cosine, _, _, null = of("place_similarity")[:, column, 0].T
            judge("same-places", "the position vectors of a_k and b_k are the same (cosine)",
                  nanda + "Position embeddings in position 0 and 1 are the same", cosine, ">", .9)
            judge("alike-places",
                  "they are more alike than permuted ones (cosine minus the 99 % quantile)",
                  NOTES + "randomly permute dimensions of y & compute", cosine - null, ">", 0)
            top = np.sort(of("embedding_spectrum"), 1)[:, -2:].sum(1)
            judge("sparse-embedding", "W_E is sparse in the Fourier basis (share of two frequencies)",
                  nanda + "the embedding matrix being sparse", top, ">", .8)
            if "neuron_r2" not in arrays:
                continue
            judge("nine-terms", "nine terms of one frequency give most of a neuron (median R^2)",
                  nanda + "well approximated by a linear combination of those 9 terms",
                  np.median(of("neuron_r2").max(-1), 1), ">", .85)
            before, after = of("term_energy").sum(2)[..., 2].T
            judge("cancels",
                  f"W_out W_U leave the terms of a + b (share of power; {np.median(before):.0%} before)",
                  nanda + "cancel out all directions other than cos(w(x+y)), sin(w(x+y))", after, ">",
                  0.9)
            size, swapped, unrelated = of("exchange").T
            judge("symmetric-neurons",
                  f"neurons hardly change when a and b change places (over the change of unrelated "
                  f"examples; root mean square {np.median(size):.2g}, change {np.median(swapped):.2g})",
                  NOTES + "isn't quite convincing without absolute values of activations",
                  swapped / unrelated, "<", 0.25)

    def draw_attention(arrays, flags):
        parts, names = list(configurations(arrays, 2)), Anatomy.position_names(flags)
        figure, axes = common.panels(
            2 * len(parts),
            "Attention of `=`: mean weight, and the exact score of every token at every position",
            flags,
        )
        tokens = [format(t, "x") for t in range(flags.base)] + ["+", "="]
        for (left, right), (name, mine, k) in zip(zip(axes[::2], axes[1::2]), parts):
            weights = arrays["attention"][mine][0]
            head = int(weights[:, flags.digits - 1 - min(k, flags.digits - 1)].argmax())
            scores = arrays["scores"][mine][0, head]
            common.image(left, weights, f"{name}: mean attention, first run", figure, "position", "head",
                         (0, 1))
            left.set(yticks=range(min(len(weights), 16)))
            common.image(right, (scores - scores.mean()).T,
                         f"{name}: scores of head {head}, their mean removed", figure, "position",
                         "token")
            right.set(yticks=range(flags.vocab), yticklabels=tokens)
            for ax in (left, right):
                ax.set(xticks=range(len(names)), xticklabels=names)
                ax.tick_params(labelsize=7)
        return figure

    def draw_dependence(arrays, flags):
        D, parts = flags.digits, list(configurations(arrays, 2))
        figure, axes = common.panels(
            2 * len(parts), "Which inputs matter to the neurons, and which parts to the answer", flags
        )
        places = [n for n in Anatomy.position_names(flags) if n not in "+="]
        inputs = places + [f"column {k}" for k in range(D - 1, -1, -1)]
        model = [f"head {h}" for h in range(flags.n_heads)] + ["MLP", "= to itself", "skip past MLP"]
        keys = ["ablation", "shortcuts"] + ["ablation_group"] * ("ablation_group" in arrays)
        model += [f"column-{c} neurons" for c in range(D)] * ("ablation_group" in arrays)
        for (left, right), (name, mine, k) in zip(zip(axes[::2], axes[1::2]), parts):
            if "dependence_mean" in arrays:
                common.bars(left, np.arange(3 * D), arrays["dependence_mean"][mine], "all neurons", BLUE)
            change = np.concatenate([arrays[key][mine] for key in keys], 1)
            common.bars(right, np.arange(len(model)), change, "mean ablation", GREEN)
            left.set(ylabel="share of neurons' variance", title=f"{name}: correlation ratio")
            right.set(ylabel="increase of the loss (nats)", title=f"{name}: what the answer needs")
            right.set_yscale("symlog", linthresh=1e-3)
            common.shelf(right, floors(flags.base, D)[k, 0], "loss that sees nothing", side="left")
            for ax, labels in (left, inputs), (right, model):
                ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
                ax.legend(fontsize=7)
        return figure

    def draw_fourier(arrays, flags):
        name, mine, _ = next(configurations(arrays, 1))
        w, of = np.arange(1, flags.base // 2 + 1), lambda key: arrays[key][mine]
        figure, (a, b, c, d) = common.panels(4, f"{name}: the column in the Fourier basis", flags)
        common.bars(a, w - .2, of("embedding_spectrum"), "W_E", BLUE, .4)
        common.bars(a, w + .2, of("term_energy")[:, 1, :, 2], "logits, terms of a+b", RED, .4)
        a.set(xlabel="frequency", ylabel="share of power", xticks=w, title="Which frequencies are used")
        common.bars(b, w, of("excluded_loss"), "one frequency of a+b removed", BLUE)
        common.shelf(b, np.median(of("full_loss")), "full loss (median)")
        common.shelf(b, np.median(of("restricted_loss")), "functions of a+b alone (median)", RED, "left")
        b.set(xlabel="frequency removed from the logits", ylabel="loss (nats)", xticks=w, yscale="log",
              title="Which are needed")
        for i, label, colour in (0, "neurons", BLUE), (1, "logits, after W_out W_U", RED):
            common.bars(c, np.arange(4) + .4 * i - .2, of("term_energy")[:, i].sum(1), label, colour, .4)
        c.set(ylabel="share of power", title="What W_out W_U cancel")
        c.set_xticks(range(4), ["of a", "of b", "of a+b", "of a-b"])
        if "neuron_r2" in arrays:
            active = (of("neuron_active") > .99).mean()
            d.hist(of("neuron_r2").max(-1).ravel(), np.linspace(0, 1, 41), color=GREEN)
            d.set(xlabel="R^2 of the nine terms of the best frequency", ylabel="neurons of all runs",
                  title=f"{active:.0%} of the neurons are always active")
        for ax in (a, b, c):
            ax.legend(fontsize=7)
        return figure

    def draw_development(arrays, flags):
        if not len(arrays["over_step"]):  # a checkpoint has no history
            return None
        parts, x = list(configurations(arrays, 2)), np.maximum(arrays["over_step"], .7)
        figure, axes = common.panels(2 * len(parts), "When does each part become necessary?", flags)
        for (left, right), (name, mine, k) in zip(zip(axes[::2], axes[1::2]), parts):
            of = lambda key: arrays[f"over_{key}"][:, mine]
            common.band(left, x, of("full_loss"), "loss", "black")
            common.band(left, x, of("restricted_loss"), "functions of a+b alone", "grey")
            for i in range(of("excluded_loss").shape[-1]):
                label, colour = f"frequency {i + 1} removed", common.COLOURS[i % 6]
                common.band(left, x, of("excluded_loss")[..., i], label, colour)
            common.band(right, x, of("ablation")[..., -1], "MLP ablated", RED)
            most = of("ablation")[..., :-1].max(-1)
            common.band(right, x, most, "the most important head ablated", BLUE)
            left.set(**STEPS, yscale="log", ylabel="loss (nats)", title=f"{name}: frequencies")
            right.set(**STEPS, ylabel="increase of the loss (nats)", title=f"{name}: parts")
            for ax in (left, right):
                ax.legend(fontsize=6)
        return figure


class Spikes(common.Study):
    """What removes the repeated spike of the tens?

    arrays: see `curves`; second_moment, weight_norm, update_norm [T, R]; around_* [steps, spikes];
    intervention [I]; fork_loss [I, steps, spikes], fork_worst [spikes, I]."""
    defaults = dict(digit=1, weight_decay=.5, steps=5000, evals=2)
    smoke = dict(SMOKE, steps=400, runs=1)
    before, after, lead = 150, 100, 50  # steps around a spike, and from an intervention until these
    watched = ("loss", "grad_norm", "second_moment", "weight_norm", "update_norm")

    def check(flags):
        if len(common.groups_of_runs(flags)) > 1:
            raise common.Stop("--study spikes compares runs of one shape: sweep numbers, such as lr")

    def step_of(flags):
        plain = step_of(flags)

        def step(state, number):
            new, logs = plain(state, number)
            move = {k: new["params"][k] - p for k, p in state["params"].items()}
            logs |= {"second_moment": sum(v.sum() for v in new["v"].values()).sqrt(),
                     "weight_norm": common.norm(new["params"]), "update_norm": common.norm(move)}
            return new, logs
        return step

    def interventions(run, calm):
        """{name: changed flags}; the second is a sham. calm: the gradient's median norm before."""
        return {"none": {}, "rate x 1.001": dict(lr=1.001 * run.lr), "eps 1e-6": dict(eps=1e-6),
                "beta2 .999": dict(beta2=.999), "clip at median": dict(clip=calm),
                "decay off": dict(weight_decay=0.), "rate / 2": dict(lr=run.lr / 2)}

    def first_spikes(arrays):
        """The step of each run's first spike."""
        return arrays["first_spike"]

    def compute(flags, folder):
        """Train; find each run's first spike; train it again to just before (a run is a function of its
        flags); go on from there once with each intervention, with the same random numbers."""
        trained, = train(flags, folder, step_of=Spikes.step_of)
        arrays, window = curves([trained]), Spikes.before + Spikes.after
        first, forks, around = Spikes.first_spikes(arrays), [], {k: [] for k in Spikes.watched}
        # the same program, so that a replay has the same bits
        same = dict(step_of=Spikes.step_of, evaluate_of=None, final=None)
        begins = first - Spikes.before - Spikes.lead
        for r in np.flatnonzero((begins > 0) & (first <= flags.steps - Spikes.after)):
            spike, begin = int(first[r]), int(begins[r])
            run = replace(trained.runs[r], compile="on" if folder.compiled[0]["compiled"] else "off")
            again, = train(flags, folder.aside(f"again{r}"), [[replace(run, steps=begin)]], **same)
            state = common.run_of(again.state, 0)
            calm = float(np.median(arrays["grad_norm"][max(begin - 100, 0):begin, r]))
            changes = Spikes.interventions(run, calm)
            forked = [replace(run, steps=Spikes.lead + window, **change) for change in changes.values()]
            fork, = train(flags, folder.aside(f"fork{r}"), [forked], start=lambda run: state, **same)
            forks.append(fork.metrics["loss"][Spikes.lead:])
            for k in around:
                around[k].append(arrays[k][spike - Spikes.before:spike + Spikes.after, r])
        names = [*Spikes.interventions(flags, 0.)]
        count = len(names)
        forks = np.reshape(forks, (-1, window, count))
        arrays |= {f"around_{k}": np.reshape(v, (-1, window)).T for k, v in around.items()}
        worst = np.reshape([geometric(f).max(0) for f in forks], (-1, count))
        return arrays | {"intervention": names, "fork_loss": forks.transpose(2, 1, 0),
                         "fork_worst": worst}

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
        t, names = np.arange(len(arrays["around_loss"])) - Spikes.before, arrays["intervention"].tolist()
        for key, colour in zip(Spikes.watched, common.COLOURS):
            common.band(a, t, arrays[f"around_{key}"], key.replace("_", " "), colour)
        a.set(yscale="log", ylim=(1e-9, 100), xlabel="step relative to the spike",
              ylabel="nats, or norm")
        a.axvline(0, color="grey", ls="--", lw=.8)
        if arrays["around_loss"].size:
            a.legend(fontsize=7, loc="upper left")
        for i, worst in enumerate(arrays["fork_worst"].T):
            b.plot(np.full(len(worst), i), worst, "o", color=common.COLOURS[i], ms=5)
        b.set(yscale="log", ylim=(1e-9, 5), ylabel="highest loss in the window (nats)",
              title=f"{len(arrays['fork_worst'])} spikes, each replayed with one change")
        b.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
        common.shelf(b, 1e-3, "counts as a spike")
        return figure


class Sweep(common.Study):
    """Every row of the notes' tables, or the grid of --sweep: when does each descend, where does it end?
    (hours)

    arrays, [R]: the swept fields, seed, config, milestones; kind (see `shelf_kind`) of the level on
    which a run ends; delta_spectrum [R, 2, base]; curve [R, 200] at curve_step [R, 200], the 10-step
    geometric mean of the loss at log-spaced steps."""
    defaults = dict(steps=5000, evals=2)
    smoke = dict(SMOKE, runs=1)

    def rows():
        """The notes' tables as tuples: id, setting, steps, quantity, lowest, highest, sentence."""
        for line in ROWS.strip().splitlines():
            id, digit, size, decay, steps, key, low, high, sentence = line.split(None, 8)
            yield id, f"{digit} {size} decay {decay}", int(steps), key, float(low), float(high), sentence

    def points(flags):
        """The rows of the notes, with their own numbers of steps scaled by --steps / 5000, and more
        values of eps for the floor that decay sets; more seeds where they are cheap, most for the
        waiting times of 2/2."""
        points = []
        for setting, steps in dict.fromkeys((row[1], row[2]) for row in Sweep.rows()):
            digit, size, _, decay = setting.split()
            d, heads = map(int, size.split("/"))
            many = 16 if size == "2/2" else 4 if d <= 4 else 1
            points.append(
                dict(digit=DIGITS.index(digit), d_model=d, n_heads=heads, weight_decay=float(decay),
                     steps=max(1, steps * flags.steps // 5000), runs=many * flags.runs)
            )
        floor = dict(digit=0, d_model=128, n_heads=4, weight_decay=.5,
                     steps=max(1, 3000 * flags.steps // 5000))
        points += [dict(floor, runs=flags.runs, eps=eps) for eps in (1e-9, 1e-7, 1e-6)]
        points = [p for p in points if p["d_model"] <= 2 or not flags.smoke]
        return sorted(points, key=lambda p: (p["d_model"] + 4 * p["n_heads"]) ** 2 * p["steps"])

    def compute(flags, folder):
        trained = train(flags, folder)
        runs = [run for t in trained for run in t.runs]
        join = lambda values: np.concatenate([*values])
        fields = {"digit", "d_model", "n_heads", "weight_decay", "eps", "steps", "seed"}
        fields |= {*common.swept(flags)}
        arrays = {k: np.array([getattr(r, k) for r in runs]) for k in sorted(fields)}
        arrays |= {k: join(t.final[k] for t in trained) for k in trained[0].final if k != "loss"}
        loss, pair, alias, delta = (join(t.metrics[f"eval_{k}"][-1] for t in trained)
                                    for k in ("loss", "pair", "alias", "delta"))
        at = [np.geomspace(1, t.runs[0].steps, 200).round().astype(int) for t in trained]
        curve = join(geometric(t.metrics["loss"])[i - 1].T for i, t in zip(at, trained))
        kinds = [Sweep.shelf_kind(*row) for row in zip(runs, loss, pair, alias)]
        return arrays | {"config": [setting_of(r) for r in runs], "kind": kinds, "delta_spectrum": delta,
                         "curve": curve,
                         "curve_step": join(np.tile(i, (len(t.runs), 1)) for i, t in zip(at, trained))}

    def shelf_kind(flags, loss, pair, alias):
        """What a final loss means: `solved`; `n mod m`: that much of the column is known and no more (`n
        mod 1`: nothing); `carry-blind`: the column is known, the carry is not; or `between`. The
        tolerance is .15 nats."""
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

        def of(key, setting, steps=None, eps=1e-8):
            mine = (arrays["config"] == setting) & np.isclose(arrays["eps"], eps)
            return arrays[key][mine & (arrays["steps"] == (steps or arrays["steps"]))]

        def estimate(id, statement, quote, f, key, settings, *rule):
            """A claim about f of some settings' runs, with its 95 % interval over resampled runs."""
            groups = [of(key, *(s if isinstance(s, tuple) else (s,))) for s in settings]
            draws = [f(*(g.choice(x, len(x)) for x in groups)) for _ in range(500)]
            say(id, statement, NOTES + quote, (f(*groups), *np.quantile(draws, [.025, .975])), *rule)

        for id, setting, steps, key, low, high, sentence in Sweep.rows():
            measured = of(key, setting, steps)
            say(id, f"{setting}: {sentence}, {key}", NOTES + sentence, measured, "in", (low, high))
        log = lambda x: math.log(np.median(x))
        estimate("width-delays",
                 "halving the width delays the units' descent by this factor (4 heads, 8 to 128)",
                 "smth like x1.5 time to drop per /2 of d_model",
                 lambda *waits: math.exp(-np.polyfit([3, 4, 7], [log(x) for x in waits], 1)[0]),
                 "descent", [f"units {d}/4 decay 0" for d in (8, 16, 128)], "in", (1.3, 1.75))
        estimate("width-hyper",
                 "the delay per halving grows towards width 2 (log of 2/2 over 4/4 minus 4/4 over 8/8)",
                 "maybe hyperexponentially, when close to 0",
                 lambda a, b, c: log(c) - 2 * log(b) + log(a), "descent",
                 [f"units {d}/{d} decay 0" for d in (8, 4, 2)], ">", 0)
        say("waiting-exponential", *Sweep.waiting(of("descent", "units 2/2 decay 0"), g))
        for d, few, many in (16, 1, 4), (8, 1, 4), (8, 4, 8), (4, 1, 4):
            estimate(f"heads-slow-units-{d}-{many}",
                     f"{d} wide, the units descend later with {many} heads than with {few} "
                     "(share of pairs of runs)", "for this task more heads are worse",
                     lambda a, b: np.mean(a[:, None] > b), "descent",
                     [f"units {d}/{h} decay 0" for h in (many, few)], ">", 0.5)
        weights = [(.25, 1e-8), (.5, 1e-8), (1, 1e-8), (.5, 1e-9), (.5, 1e-7), (.5, 1e-6)]
        estimate("decay-floor",
                 "the units' final loss is proportional to weight_decay x eps (log-log slope)",
                 "WD=1: to 20e-9; WD=0.5: to 8e-9",
                 lambda *x: np.polyfit([math.log(w * e) for w, e in weights], [log(y) for y in x], 1)[0],
                 "final", [(f"units 128/4 decay {w:g}", None, e) for w, e in weights], "in", (0.8, 1.2))
        slow = of("final", "units 128/4 decay 0.5") / of("lowest", "units 128/4 decay 0.5")
        say("slow-regrowth",
            "at decay .5 the units' loss grows back slowly after its lowest (final over lowest; whether "
            "this is the early bump slowed down no curve decides: remove one, does the other go?)",
            NOTES + "dips to 7-8 & then slowly goes back to 8-9", slow, ">", 1.05)
        ratio = lambda a, b: np.median(a) / np.median(b)
        estimate("decay-damps",
                 "decay .25 at least halves the tens' vibration (ratio of deviations of log loss)",
                 "WD=0.25 diminishes the loss vibration drastically", ratio, "vibration",
                 ["tens 128/4 decay 0.25", "tens 128/4 decay 0"], "<", 0.5)
        estimate("heads-speed-tens",
                 "the tens converge sooner with 128 heads than with 2 (ratio of steps)",
                 "more heads makes things happen faster I think", ratio, "reach",
                 ["tens 128/128 decay 0.25", "tens 128/2 decay 0.25"], "<", 1)
        decays = (0, .1, .15, .2, .225, .25, .5)
        estimate("decay-spikes",
                 "the tens spike more often with more decay (spikes a run, slope over decay)",
                 "a repeatable gradient spike, intensified by WD",
                 lambda *x: np.polyfit(decays, [y.mean() for y in x], 1)[0], "spikes",
                 [(f"tens 128/4 decay {w:g}", 5000) for w in decays], ">", 0)
        alone = np.concatenate([of("reach", f"tens {d}/1 decay 0.25") for d in (128, 256, 512)])
        say("one-head-fails-tens", "one head never brings the tens below 1e-3 (widths 128, 256, 512)",
            NOTES + "1 is too few (even for 512/1)", alone, ">", 1e9)

    def waiting(waits, g):
        """Are waiting times exponential above a dead time? Deviation over mean excess of those above the
        least, against its central 95 % for exponential times (which are rejected once in twenty); how
        often gamma(2) times would pass is said with it."""
        def excess(x):
            rest = np.sort(x)[1:] - x.min()
            return float(rest.std(ddof=1) / rest.mean())
        n = len(waits)
        null = np.quantile([excess(g.exponential(size=n)) for _ in range(2000)], [.025, .975])
        others = np.array([excess(g.gamma(2, size=n)) for _ in range(2000)])
        passing = np.mean((others > null[0]) & (others < null[1]))
        statement = (
            f"waiting times of 2/2 are exponential above a dead time (deviation over mean excess; {n} "
            "seeds; "
            f"gamma(2) times would pass in {passing:.0%}; no verdict while a seed has not descended)"
        )
        measured = excess(waits) if np.isfinite(waits).all() else [math.nan]
        return (statement,
                NOTES + "chances of extant circuits to be accidentally close enough to the necessary "
                "basin of attraction", measured, "in", tuple(null))

    def draw_rows(arrays, flags):
        fields = ("digit", "weight_decay", "eps", "n_heads", "d_model", "steps")
        keys = [*zip(*(arrays[f].tolist() for f in fields))]
        wanted = {} if flags.sweep else {(row[1], row[2], row[3]): row[4:6] for row in Sweep.rows()}
        configs, names = sorted({*keys}), []
        figure, (a, b) = common.panels(2, "Every configuration: when it descends, where it ends", flags,
                                       size=(5.4, max(3.7, .16 * len(configs))))
        for y, config in enumerate(configs):
            mine = np.array([k == config for k in keys])
            name, descent = arrays["config"][mine][0], arrays["descent"][mine]
            names.append(name + f" eps {config[2]:g}" * (config[2] != 1e-8))
            a.plot(descent, np.full(mine.sum(), y), "o", color=BLUE, ms=3, alpha=.6)
            final = np.maximum(arrays["final"][mine], 1e-13)
            b.plot(final, np.full(mine.sum(), y), "o", color=BLUE, ms=3, alpha=.6)
            if np.isinf(descent).any():
                a.text(config[-1], y, f" {np.isinf(descent).sum()} never", fontsize=5, va="center")
            for ax, key in (a, "descent"), (b, "final"), (b, "lowest"):
                low, high = wanted.get((name, config[-1], key), (0, 0))
                if 0 < low < high < math.inf:
                    ax.plot([low, high], [y, y], color=RED, lw=4, alpha=.35, solid_capstyle="butt")
            if (name, config[-1], "reach") in wanted:
                says = "converges" if wanted[name, config[-1], "reach"][0] == 1 else "does not"
                b.text(6, y, f"notes: {says}", fontsize=5, va="center", color=RED)
            if config[0]:
                level = floors(flags.base, flags.digits)[config[0], 1]
                b.plot([level, level], [y - .5, y + .5], color="grey", lw=1)
        a.plot([], [], color=RED, lw=4, alpha=.35, label="the notes, with their tolerance")
        b.plot([], [], color="grey", lw=1, label="own column, no carry (exact)")
        b.axvline(math.log(flags.base), color="grey", ls="--", lw=.8, label="sees nothing (exact)")
        a.set(xscale="log", xlabel="step of first descent")
        a.set_yticks(range(len(configs)), names, fontsize=5.5)
        b.set(xscale="log", xlabel="final loss (nats)", yticks=[], xlim=(1e-13, 100))
        for ax in (a, b):
            ax.legend(fontsize=6, loc="upper left")
        return figure


# The notes' tables. A quoted step counts as reproduced within a factor 1.5, a small loss within a factor
# 3, a visible bump is a regrowth by 10 % or more (the notes read all of them off graphs); a step that
# never comes is infinite. Where the notes name no decay: 0 for the units, .25 for the others.
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
