"""How does a one-layer transformer add numbers, and which digit does it learn when?

Law: a and b have D digits, i.i.d. uniform in 0..base-1, most significant first; a + b = sum_k z_k base^k.
Input `a_{D-1} .. a_0 + b_{D-1} .. b_0 =`, target z_k (`--digit k`: 0 units, 1 tens, .., D leading carry),
read at `=`. With n_k = (a_k + b_k) mod base and c_k the carry into column k, z_k = (n_k + c_k) mod base: a
model that knows its own column but no carry has the loss H(c_k) (.688 nats for the tens, -> log 2), one
that knows nothing log base.

    python exp_addition.py                       one minute: when do units and tens leave their shelves?
    python exp_addition.py --study anatomy       three minutes: attention, neurons, frequencies, ablations
    python exp_addition.py --study theory        seconds: every exact shelf, for any --base and --digits

Claims are quoted from research notes of 2023-04-18, "128/4" is d_model/n_heads; model and optimiser are theirs.
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
            raise common.Stop(f"--digit {self.digit} must be at most --digits {self.digits} (the leading carry)")
        if self.d_model % self.n_heads:
            raise common.Stop(f"--d-model {self.d_model} must be divisible by --n-heads {self.n_heads}")

    @property
    def vocab(self):
        return self.base + 2  # the digits, `+` = base, `=` = base + 1


SMOKE = dict(steps=20, runs=2, d_model=8, n_heads=2, batch=32, evals=2)
NOTES = "research notes, 2023-04-18: "

# ==== Data law =======================================================================================


def sample(flags, key, batch):
    """Digits of a then b, each most significant first: int64 [2D, batch]. (The batch is the last axis: along
    it the fast path vectorises. A pair of digits takes one random number.)"""
    pair = common.integers(key, flags.base ** 2, flags.digits, batch)
    a = (pair * (2 ** 16 // flags.base + 1)) >> 16  # pair // base, exact below 2^16 / base
    return torch.cat([a, pair - flags.base * a])


def columns(ab, base):
    """Digits ab [2D, B] -> (naive D, carry D+1, total D+1), lists of [B] from the units up: naive_k = (a_k + b_k)
    mod base, carry_k into column k, total_k the digit of the sum; total_D = carry_D."""
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
    """Bayes-optimal loss in nats of digit k of a model that sees its L top columns (its own and the L - 1 below;
    for the leading carry k = D the columns D-1, D-2, ..): floor[k, L] [D+1, D+2], NaN where undefined. The
    carry stays unknown only where every column that is seen below the own one sums to base - 1."""
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
    """The textbook model: logits [B, T - first, vocab] at positions first.. of tokens [B, T]. patch(name, x) -> x
    sees, and may change, `embedding` [B, T, d], `attention` [B, heads, T - first, T], `heads` [B, heads,
    T - first, d_head] (before W_O), `neurons` [B, T - first, 4d] and `skip` [B, T - first, d], the residual
    stream past the MLP."""
    x = patch("embedding", params["W_E"][tokens] + params["W_pos"])
    T, d = x.shape[1:]
    split = lambda y: y.unflatten(-1, (n_heads, d // n_heads)).transpose(1, 2)
    q, k, v = split(x[:, first:] @ params["W_Q"]), split(x @ params["W_K"]), split(x @ params["W_V"])
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)[first:]
    scores = (q @ k.transpose(-1, -2) / math.sqrt(d // n_heads)).masked_fill(future, -math.inf)
    mixed = patch("heads", patch("attention", scores.softmax(-1)) @ v)
    return mlp(params, x[:, first:] + mixed.transpose(1, 2).flatten(2) @ params["W_O"], patch) @ params["W_U"]


def tables(params, n_heads):
    """All that attention of `=` can see. The query is one constant vector, keys and values are sums of a token's
    and a position's part: token scores [heads, vocab], position scores [heads, T], token values [vocab, d],
    position values [T, d]."""
    W_E, W_pos = params["W_E"], params["W_pos"]
    d = W_E.shape[1]
    query = ((W_E[-1] + W_pos[-1]) @ params["W_Q"]).view(n_heads, -1)
    query = torch.einsum("dhe,he->hd", params["W_K"].view(d, n_heads, -1), query) / math.sqrt(d // n_heads)
    return query @ W_E.T, query @ W_pos.T, W_E @ params["W_V"], W_pos @ params["W_V"]


def attend(params, ab, n_heads):
    """Attention of `=` by table look-up: weights of the digits [heads, 2D, B], of `+` and `=` [heads, 2, B], weights
    summed by digit value [heads, base, B]. The maximum is taken per example: a global one underflows where
    the scores of small models grow huge."""
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
    """Logits [B, vocab] at `=`, exactly those of `forward`, from digits ab [2D, B]. Token and position parts of the
    values are mixed apart, so no example's values are ever formed. patch sees `heads` [B, heads, d_head],
    `neurons` [B, 4d] and `skip` [B, d]."""
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
    """-log softmax(logits)[label] over the last axis, as log1p(sum of exp(z_j - z_label) over the others): in float32
    this is exact down to 1e-38, where log_softmax stops at 1e-7."""
    here = torch.arange(logits.shape[-1], device=logits.device) == labels[..., None]
    gap = (logits - (logits * here).sum(-1, keepdim=True)).masked_fill(here, -math.inf)
    top = gap.amax(-1, keepdim=True).detach().clamp(min=0)
    rest = (gap - top).exp().sum(-1)
    top = top[..., 0]
    return top + torch.log1p(rest + torch.expm1(-top))


# ==== Train ==========================================================================================


def start(run):
    """Step 0 of one run."""
    params = init(run, common.generator(run.seed, "init"))
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
    """What is evaluated of ONE run, on fixed digits: loss, accuracy, P(correct); delta [2, base], the mean of
    P((n + delta) mod base) by carry, and other [2], the mass on `+` and `=`; pair = -ln(P_n + P_{n+1}), lost before
    the carry is asked for (loss - pair is what the carry costs); alias [divisors], -ln of the mass on n mod
    m, lost by a model that knows n only mod m, for every m of `divisors`. Means in nats."""
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
        by_carry = lambda x: torch.stack([(x * (c == i)[:, None]).sum(0) / (c == i).sum() for i in (0, 1)])
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
    """Per run: accuracy, and of the loss [T, R] at every step the step of first descent (10-step mean 0.1 below the
    loss that sees nothing) and of reaching 1e-3, infinite where it never comes; the lowest 10-step geometric mean
    and its step; the final one (last 100 steps); the largest regrowth between steps 100 and 600; the number
    of spikes (above 1e-3 after having been below 1e-4) and the step of the first; the vibration (standard
    deviation of log loss around its 100-step mean after step 1000)."""
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
    found = {"descent": when(common.smooth(loss, 10) < blind - .1), "reach": when(curve < 1e-3),
             "lowest": low[-1], "lowest_step": (curve == low[-1]).argmax(0) + 1., "spikes": spikes,
             "final": geometric(loss[-100:], 100)[-1], "bump": bump.max(0, initial=1.), "first_spike": first,
             "vibration": late.std(0) if len(late) else np.full(len(runs), np.nan)}
    lost = np.isnan(loss[-1])  # diverged or stopped: without a value
    return {"accuracy": metrics["eval_accuracy"][-1],
            **{k: np.where(lost, np.nan, v) for k, v in found.items()}}


def train(flags, folder, groups=None, step_of=step_of, evaluate_of=evaluate_of, start=start, final=milestones):
    """Train the runs of these flags (or groups of runs) on fresh digits; see `common.train`."""
    return common.train(groups or common.groups_of_runs(flags), folder, start, step_of, evaluate_of,
                        eval_at=lambda run: common.marks(run.steps, run.evals), final=final)


def digit_name(flags, k):
    names = ["units", "tens", "hundreds", "thousands"]
    return "leading carry" if k == flags.digits else names[k] if k < 4 else f"10^{k}s"


def curves(trained):
    """The arrays of trained groups side by side: step [T], eval_step [M], loss, grad_norm [T, R], eval_* [M, R, ...],
    milestones, digit and config [R], and delta_spectrum [R, 2, base], the last of eval_delta."""
    arrays = common.side_by_side(trained)
    runs = [run for t in trained for run in t.runs]
    arrays |= {k: np.concatenate([t.final[k] for t in trained]) for k in trained[0].final if k != "loss"}
    name = lambda r: f"{digit_name(r, r.digit)} {r.d_model}/{r.n_heads} decay {r.weight_decay:g}"
    return arrays | {"digit": np.array([r.digit for r in runs]), "config": np.array([name(r) for r in runs]),
                     "delta_spectrum": arrays["eval_delta"][-1]}


# ==== Figures that several studies share =============================================================

BLUE, RED, GREEN, PINK, ORANGE = common.COLOURS[:5]
STEPS = dict(xscale="log", xlabel="step (0 is drawn at 0.7)")


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

    arrays: see `curves`; rest_level, rest_step [R], where a run rests on its way from the blind level to .5."""
    defaults = dict(sweep=["digit=0,1"], steps=1200, evals=24)
    smoke = SMOKE

    def compute(flags, folder):
        arrays = curves(train(flags, folder))
        top = floors(flags.base, flags.digits)[arrays["digit"], 0] - .1
        arrays["rest_level"], arrays["rest_step"] = Digit.resting_level(arrays["loss"], top, .5)
        return arrays

    def resting_level(loss, top, bottom):
        """Level and step [2, R] of the 50 steps over which the 30-step mean of loss [T, R] moves least while it is
        between bottom and top [R]; NaN for a run that does not pass there."""
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
        say("tens-shelf", "the tens' first shelf lies at .72 to .86 nats", NOTES + "a consistent 0.8-step",
            arrays["rest_level"][tens], "in", (.72, .86))
        # on the shelf: at the evaluation nearest to it, what the loss consists of
        rest = np.nan_to_num(arrays["rest_step"][tens])
        at = np.abs(np.log(arrays["eval_step"][:, None] + 1) - np.log(rest + 1)).argmin(0)
        value = lambda key: arrays[key][:, tens][at, np.arange(tens.sum())]
        carry = value("eval_loss") - value("eval_pair")
        say("tens-shelf-carry", "on that shelf the carry costs H(c_1) = .688 nats, to .1: it is not known at all",
            NOTES + "log2; p(naive-sum-digit), p(naive-sum-digit+1)", carry, "in", (.588, .788))
        say("tens-shelf-column", "and the column costs less than .15 nats: it is known", NOTES +
            "the theory that it learns to choose between the two possible ones", value("eval_pair"), "<", .15)

    def draw_curves(arrays, flags):
        parts = list(configurations(arrays, 4))
        figure, axes = common.panels(len(parts), "When does each digit's loss leave its shelf?", flags)
        for ax, (name, mine, k) in zip(axes, parts):
            common.band(ax, arrays["step"], geometric(arrays["loss"][:, mine]), "training loss, 10-step mean", BLUE)
            shelves(ax, flags, k)
            descent = arrays["descent"][mine]
            ax.plot(descent, np.full(len(descent), 4.), "v", color=RED, ms=4, label="first descent")
            ax.set(xscale="log", yscale="log", xlabel="step", ylabel="loss (nats)", title=name)
            ax.legend(fontsize=7, loc="lower left")
        return figure

    def draw_delta(arrays, flags):
        parts = list(configurations(arrays, 2))
        figure, axes = common.panels(2 * len(parts), "Where the answer lies: its distance from the naive digit "
                                     "n = (a_k + b_k) mod base", flags)
        for row, (name, mine, k) in enumerate(parts):
            over, end = axes[2 * row:2 * row + 2]
            spectrum = arrays["eval_delta"][:, mine]  # [M, R, carry, delta]
            carries = (0, 1) if k else (0,)  # no carry enters the units
            for c, delta, colour in ((0, 0, BLUE), (0, 1, RED), (1, 0, GREEN), (1, 1, PINK)):
                if c in carries:
                    label = f"P(n{' + 1' * delta} | carry {c})"
                    common.band(over, np.maximum(arrays["eval_step"], .7), spectrum[:, :, c, delta], label, colour)
            for c in carries:
                shift = .4 * c - .2 * (len(carries) - 1)
                common.bars(end, np.arange(flags.base) + shift, spectrum[-1, :, c], f"carry {c}", (BLUE, RED)[c], .4)
            over.set(**STEPS, ylim=(0, 1.02), ylabel="mean probability", title=f"{name}: over training")
            end.set(xlabel="delta = (answer - n) mod base", ylabel="mean probability", ylim=(0, 1.02),
                    xticks=range(flags.base), title=f"{name}: at the end")
            for ax in (over, end):
                common.shelf(ax, 1 / flags.base, "chance, 1/base")
                ax.legend(fontsize=7)
        return figure

    def draw_decomposition(arrays, flags):
        parts = list(configurations(arrays, 4))
        figure, axes = common.panels(len(parts), "What the loss consists of", flags)
        for ax, (name, mine, k) in zip(axes, parts):
            x, loss, pair = np.maximum(arrays["eval_step"], .7), arrays["eval_loss"][:, mine], arrays["eval_pair"][:, mine]
            common.band(ax, x, loss, "loss", BLUE)
            if k:
                common.band(ax, x, pair, "column: -ln(P(n) + P(n + 1))", RED)
                common.band(ax, x, loss - pair, "carry: the rest", GREEN)
            for i, m in enumerate(divisors(flags.base)[1:]):
                if not k:
                    common.band(ax, x, loss - arrays["eval_alias"][:, mine, i + 1], f"of it, for n given n mod {m}", (RED, GREEN)[i % 2])
                    common.shelf(ax, math.log(flags.base / m), f"only n mod {m}: {math.log(flags.base / m):.4g}", side="left")
            shelves(ax, flags, k)
            ax.set(**STEPS, ylabel="nats on the evaluation set", title=name)
            ax.legend(fontsize=7, loc="center left")
        return figure


class Theory(common.Study):
    """What can be known: every exact shelf, for any --base and --digits?

    arrays: carry_probability [D+1]; floor [D+1, D+2] (digit, columns seen); teacher_floor [D+1], own column, the column above
    and the answers before; one_wide_reached [], a loss of the units that a residual stream of one number can have."""

    def compute(flags, folder):
        base, D = flags.base, flags.digits
        arrays = {"carry_probability": [carry_probability(base, k) for k in range(D + 1)], "floor": floors(base, D),
                  "teacher_floor": [teacher_floor(base, k) for k in range(D)] + [math.nan],
                  "one_wide_reached": Theory.one_wide_reached(base)}
        common.tell(f"base {base}, {D} digits; loss in nats of digit k by columns seen")
        for k, levels in enumerate(arrays["floor"]):
            seen = "  ".join(f"{x:.7f}" for x in levels if np.isfinite(x))
            common.tell(f"  {digit_name(flags, k):14} P(carry in) {carry_probability(base, k):.6f}   {seen}")
        return arrays

    def one_wide_reached(base, scale=1e6):
        """Loss of the units, reached by a construction, for logits x u with one number x per answer. Half of the digits have
        positive u, half negative, with gaps that grow by `scale` from digit to digit; with x between two scales the
        k digits beyond the gap tie and all others are excluded, which costs log k: mean log(m!) / m. Not a bound."""
        sides, losses = (base - base // 2, base // 2), []
        for m in sides:
            gaps = scale ** np.arange(m, dtype=float)  # below the first, second, .. digit of this side
            u = np.append(0, -np.cumsum(gaps))         # the last: everything else
            for k in range(m):
                z = u / gaps[k] * math.sqrt(scale)
                losses.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[k])
        return float(np.mean(losses))

    def claims(arrays, say):
        say("tens-at-log2", "the shelf of tens that know no carry is log 2, to 1e-4", NOTES + "8/1: yep to log2. a little higher "
            "actually", float(arrays["floor"][1, 1]), "in", (math.log(2) - 1e-4, math.log(2) + 1e-4))
        say("one-wide-can", "a 1/1 model's readout can be below log 10 (by construction; nothing says that it is learned)",
            NOTES + "1/1: does not descend from log10 in 50k", float(arrays["one_wide_reached"]), "<", math.log(10))

    def draw_floors(arrays, flags):
        figure, (left, right) = common.panels(2, f"What can be known: base {flags.base}, {flags.digits} digits (exact)", flags)
        for k, levels in enumerate(arrays["floor"]):
            seen = np.flatnonzero(levels > 0)
            shift = .04 * (k - flags.digits / 2)  # else equal lines hide each other
            left.plot(seen + shift, levels[seen], "o-", color=common.COLOURS[k % 8], ms=3, lw=.8, label=digit_name(flags, k))
        left.set(yscale="log", xlabel="columns seen, from the own one down (shifted by digit to be seen)",
                 ylabel="Bayes-optimal loss (nats)", xticks=range(flags.digits + 1))
        right.plot(arrays["carry_probability"], "o-", color=BLUE)
        right.set(xlabel="column k", ylabel="P(carry into k) = (1 - base^-k) / 2", ylim=(0, .55))
        common.shelf(right, .5, "limit")
        left.legend(fontsize=7)
        return figure


class All(common.Study):
    """All digits at once: which is learned when, and does teacher forcing leak?

    arrays: step, loss, grad_norm, eval_step, eval_* as in `curves`; eval_digit_loss, eval_digit_accuracy [M, R, D+1] from the
    units up; ablation [R, parts, D+1], the rise of each digit's loss without a head (in order), then the MLP."""
    defaults = dict(sweep=["answer=teacher,parallel"], runs=4, batch=64)
    smoke = SMOKE

    def compute(flags, folder):
        begin = lambda run: init(run, common.generator(run.seed, "init"), positions=3 * run.digits + 2)
        trained = train(flags, folder, step_of=lambda run: step_of(run, All.loss), evaluate_of=All.evaluate_of,
                        start=lambda run: {"params": (params := begin(run)), **common.adam_init(params)},
                        final=lambda runs, metrics: {"accuracy": metrics["eval_accuracy"][-1]})
        runs = [run for t in trained for run in t.runs]
        arrays = common.side_by_side(trained) | {"config": np.array([f"{r.answer} {r.d_model}/{r.n_heads}" for r in runs])}
        change = [All.ablation(run, common.run_of(t.state["params"], i)) for t in trained for i, run in enumerate(t.runs)]
        return arrays | {"digit": np.zeros(len(runs), int), "ablation": torch.stack(change)}

    def answers(flags, ab):
        """Digits of the sum [B, D+1] in reading order, and what is fed after `=` [B, D]: the true ones, or `=`."""
        total = torch.stack(columns(ab, flags.base)[2][::-1], 1)
        return total, total[:, :-1] if flags.answer == "teacher" else torch.full_like(total[:, 1:], flags.base + 1)

    def logits(flags, params, ab, patch=unchanged):
        """Logits [B, D+1, vocab] at `=` and the digits after it: those of `forward`, which multiplies every token by W_Q, W_K
        and W_V where here each kind of token and each position is multiplied once."""
        tokens = torch.cat([tokens_of(flags, ab), All.answers(flags, ab)[1]], 1)
        first, heads, d = 2 * flags.digits + 1, flags.n_heads, flags.d_model
        kind = (tokens[..., None] == torch.arange(flags.vocab, device=ab.device)).to(params["W_E"].dtype)
        looked_up = lambda W, kind, place: kind @ (params["W_E"] @ W) + place @ W
        split = lambda y: y.unflatten(-1, (heads, d // heads)).transpose(1, 2)
        q = split(looked_up(params["W_Q"], kind[:, first:], params["W_pos"][first:]))
        k, v = (split(looked_up(params[W], kind, params["W_pos"])) for W in ("W_K", "W_V"))
        T = tokens.shape[1]
        future = torch.ones(T, T, dtype=torch.bool, device=ab.device).triu(1)[first:]
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d // heads)).masked_fill(future, -math.inf)
        mixed = patch("heads", scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
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
        D, steps = loss.shape[2] - 1, np.append(arrays["eval_step"], np.inf)
        below = loss < .1  # [M, R, D+1]
        when = steps[np.where(below.any(0), below.argmax(0), len(loss))]  # [R, D+1]
        first_other = when[:, 1:D].min(1)
        for mode, mine in ("teacher", teacher), ("parallel", ~teacher):
            say(f"units-first-{mode}", f"with {mode} answers the units come first of the digits that have a column (step at .1 "
                "nats, over that of the first other; the leading carry has two values and no column)",
                NOTES + "training on all digits simultaneously", when[mine, 0] / first_other[mine], "<", 1)
        early = (arrays["eval_step"] >= 15) & (arrays["eval_step"] <= 100)
        leak = loss[early][..., D - 1].mean(0)
        say("teacher-leaks", "a model that is fed the leading carry knows more of the next digit, at once: its loss at steps 15 to 100 "
            "lies lower by .05 nats or more (teacher minus parallel, same seed)", "H(z_4 | z_5) = 2.113 < log 10: the answer's "
            "first digit tells of its second", leak[teacher] - leak[~teacher], "<", -.05)

    def draw_digits(arrays, flags):
        parts = list(configurations(arrays, 2))
        figure, axes = common.panels(len(parts), "All digits at once: which is learned when?", flags)
        for ax, (name, mine, _) in zip(axes, parts):
            for k in range(flags.digits + 1):
                x, y = np.maximum(arrays["eval_step"], .7), arrays["eval_digit_loss"][:, mine, k]
                common.band(ax, x, y, digit_name(flags, k), common.COLOURS[k % 8])
            common.shelf(ax, math.log(flags.base), "sees nothing", side="left")
            common.shelf(ax, floors(flags.base, flags.digits)[1, 1], "tens: own column, no carry", side="left")
            if "teacher" in name and flags.digits > 2:
                common.shelf(ax, teacher_floor(flags.base, 1), "tens: own column, the column above, earlier answers")
            ax.set(**STEPS, yscale="log", ylim=(1e-5, 8), ylabel="loss (nats)", title=name)
            ax.legend(fontsize=6.5, loc="lower left")
        return figure


def teacher_floor(base, k):
    """Loss of digit k of a model that sees its own column, the column above and the answers before: z_{k+1} and the column
    above tell the carry out of column k, which gives the carry into it away where n_k = base - 1."""
    return (1 - 1 / base) * carry_entropy(carry_probability(base, k))


def averaged(x, keep):
    """x with its batch mean in place of the entries where `keep` (broadcast) is False: mean ablation."""
    return torch.where(keep, x, x.mean(0, keepdim=True))


def part_ablations(n_heads, after):
    """Patches that mean-ablate one part of a model each: the heads in order, then the MLP. after: axes of `heads` from the
    heads on."""
    index = torch.arange(n_heads).view(-1, *[1] * (after - 1))
    heads = [lambda name, x, h=h: averaged(x, index != h) if name == "heads" else x for h in range(n_heads)]
    return [*heads, lambda name, x: averaged(x, torch.tensor(False)) if name == "neurons" else x]


class Anatomy(common.Study):
    """How are digits added: by which heads, neurons, frequencies, and from when on?

    arrays, [R, ...]: digit, config, everything that `measure` returns, over_step [S] and over_* [S, R, ...] of `develop`."""
    defaults = dict(sweep=["digit=0,1"], evals=2, snapshots=24)
    smoke = dict(SMOKE, snapshots=2)
    free = ("checkpoint", "digit", "sweep")

    def check(flags):
        kind, _, index = flags.probe.partition(":")
        most = {"neuron": 4 * flags.d_model, "head": flags.n_heads, "logit": 0}.get(kind)
        if most is None or bool(most) != index.isdigit() or index.isdigit() and int(index) >= most:
            raise common.Stop(f"--probe {flags.probe}: give logit, neuron:I below {4 * flags.d_model} or head:I below "
                              f"{flags.n_heads}")
        if len(common.groups_of_runs(flags)) > 1:
            raise common.Stop("--study anatomy compares runs of one shape: sweep fields that are numbers, such as digit")

    def compute(flags, folder):
        if flags.checkpoint:
            saved = common.checkpoint_of(flags.checkpoint, common.stack([start(flags)]))
            params, snapshots = saved["params"], {}
            known = [{k: v for k, v in run.items() if hasattr(flags, k)} for run in saved.get("runs", [])]
            runs = [replace(flags, **run) for run in known] or [flags] * len(params["W_E"])
        else:
            trained, = train(flags, folder)
            params, runs, snapshots = trained.state["params"], trained.runs, trained.snapshots
        ab = evaluation_set(flags).cpu()
        arrays = curves_of(Anatomy.measure(run, common.run_of(params, i), ab) for i, run in enumerate(runs))
        arrays |= {"digit": np.array([r.digit for r in runs]), "config": np.array([digit_name(r, r.digit) for r in runs])}
        steps = snapshots.pop("step", [])
        over = [curves_of(Anatomy.develop(run, {k: x[s, i] for k, x in snapshots.items()}, ab[:, :2048])
                          for i, run in enumerate(runs)) for s in range(len(steps))]
        return arrays | {f"over_{k}": v for k, v in curves_of(over).items()} | {"over_step": np.array(steps)}

    def watch(flags, params, ab, patch=unchanged):
        """(loss, logits [B, vocab], activations by name) at `=`."""
        seen = {}

        def look(name, x):
            seen[name] = x
            return patch(name, x)
        logits = fast_forward(params, ab, flags.n_heads, look)
        return nll(logits, columns(ab, flags.base)[2][flags.digit]).mean(), logits, seen

    def measure(flags, params, ab):
        """Of one trained model: attention [heads, positions] of `=`; ablation [heads + 1] and ablation_group [D], the rise of the
        loss without a head, the MLP, or the neurons that depend most on column c; shortcuts [2], without attention of `=` to
        itself, or the skip past the MLP; gradient_input [positions] of --probe; exchange [3], root mean square of the
        neurons, of their change when a and b change places, and between unrelated examples; what `place_similarity`,
        `neuron_dependence`, `fourier` and `matrices` return."""
        full, _, seen = Anatomy.watch(flags, params, ab)
        loss = lambda patch: Anatomy.watch(flags, params, ab, patch)[0]
        score, fixed, _ = attend(params, ab, flags.n_heads)
        itself, D = fixed[:, 1], flags.digits
        _, _, token_value, place_value = tables(params, flags.n_heads)
        value = (token_value[-1] + place_value[-1]).view(flags.n_heads, -1)
        excess = (itself.mean(1, keepdim=True) - itself).T[:, :, None] * value
        shortcuts = [lambda name, x: x + excess if name == "heads" else x,
                     lambda name, x: averaged(x, torch.tensor(False)) if name == "skip" else x]
        found = {"attention": torch.cat([score[:, :D], fixed[:, :1], score[:, D:], fixed[:, 1:]], 1).mean(-1),
                 "ablation": torch.stack([loss(p) for p in part_ablations(flags.n_heads, 2)]) - full,
                 "shortcuts": torch.stack([loss(p) for p in shortcuts]) - full,
                 "gradient_input": Anatomy.gradient_input(flags, params, ab[:, :1024]),
                 "place_similarity": Anatomy.place_similarity(flags, params),
                 **Anatomy.fourier(flags, params), **Anatomy.matrices(flags, params)}
        if "neurons" not in seen:
            return found
        neurons = seen["neurons"]
        single, pairs = Anatomy.neuron_dependence(flags, neurons, ab)
        weight = neurons.var(0) / neurons.var(0).sum()
        group = single[:, -D:].flip(1).argmax(1)  # the column that a neuron depends on most, from the units up
        without = [loss(lambda name, x, c=c: averaged(x, group != c) if name == "neurons" else x) for c in range(D)]
        exchanged = Anatomy.watch(flags, params, ab.roll(D, 0))[2]["neurons"]
        size = lambda x: x.square().mean().sqrt()
        return found | {"neuron_dependence": single, "neuron_pairs": pairs, "dependence_mean": weight @ single,
                        "pairs_mean": weight @ pairs, "ablation_group": torch.stack(without) - full,
                        "exchange": torch.stack([size(neurons), size(exchanged - neurons), size(neurons.roll(1, 0) - neurons)])}

    def develop(flags, params, ab):
        """What is followed over training: full_loss, restricted_loss, excluded_loss, ablation, dependence_mean."""
        full, _, seen = Anatomy.watch(flags, params, ab)
        found = {k: v for k, v in Anatomy.fourier(flags, params).items() if k.endswith("_loss")}
        parts = [Anatomy.watch(flags, params, ab, patch)[0] for patch in part_ablations(flags.n_heads, 2)]
        found["ablation"] = torch.stack(parts) - full
        if "neurons" in seen:
            weight = seen["neurons"].var(0) / seen["neurons"].var(0).sum()
            found["dependence_mean"] = weight @ Anatomy.neuron_dependence(flags, seen["neurons"], ab)[0]
        return found

    def correlation_ratio(m, classes):
        """Share of Var(m) that a class label explains, Var(E[m | class]) / Var(m), for m [B, ...] and labels [B]: [...]. Bias-
        corrected (Kelley's epsilon squared): 0 in expectation where m does not depend on the label."""
        m = (m - m.mean(0)).double()
        labels, index = classes.unique(return_inverse=True)
        count = torch.bincount(index).view(-1, *[1] * (m.ndim - 1))
        sums = torch.zeros(len(labels), *m.shape[1:], dtype=m.dtype).index_add_(0, index, m)
        total = (m ** 2).sum(0)
        within = (total - (sums ** 2 / count).sum(0)) / (len(m) - len(labels))
        share = 1 - within / (total / (len(m) - 1)).clamp(min=1e-300)
        return torch.where(total > 0, share, 0.).float()

    def neuron_dependence(flags, neurons, ab):
        """Correlation ratio of every neuron [neurons, 3D] on the 2D digits in reading order, then on the columns D-1 .. 0 (the pair
        a_k, b_k); and on pairs of columns [neurons, D(D-1)/2] (their two sums), columns j > k in order."""
        D, base = flags.digits, flags.base
        a, b = ab[:D], ab[D:]
        ratio = lambda labels: Anatomy.correlation_ratio(neurons, labels)
        single = [ratio(x) for x in (*ab, *(a * base + b))]
        pairs = [ratio((a[i] + b[i]) * 2 * base + a[j] + b[j]) for i in range(D) for j in range(i + 1, D)]
        return torch.stack(single, -1), torch.stack(pairs, -1) if pairs else torch.zeros(neurons.shape[1], 0)

    def gradient_input(flags, params, ab):
        """Mean |gradient times embedding| of --probe at each position: `logit` (of the right digit), `neuron:i`, or `head:i` (the
        norm of its output)."""
        kind, _, index = flags.probe.partition(":")
        tokens, labels = tokens_of(flags, ab), columns(ab, flags.base)[2][flags.digit]
        embedding, seen = params["W_E"][tokens] + params["W_pos"], {}

        def quantity(x):
            def patch(name, value):
                seen[name] = x if name == "embedding" else value
                return seen[name]
            logits = forward(params, tokens, flags.n_heads, first=2 * flags.digits + 1, patch=patch)[:, 0]
            if kind == "neuron":
                return seen["neurons"][..., int(index)].sum()
            if kind == "head":
                return seen["heads"][:, int(index)].norm(dim=-1).sum()
            return logits.gather(1, labels[:, None]).sum()
        return (torch.func.grad(quantity)(embedding) * embedding).sum(-1).abs().mean(0)

    def column_grid(flags, contexts=64):
        """Every (a_k, b_k) of the model's own column with the same random contexts: digits [2D, base^2 * contexts]."""
        k, D, base = min(flags.digit, flags.digits - 1), flags.digits, flags.base
        ab = torch.randint(base, (2 * D, contexts), generator=common.generator(1, "eval")).repeat(1, base ** 2)
        cell = torch.arange(base ** 2).repeat_interleave(contexts)
        ab[D - 1 - k], ab[2 * D - 1 - k] = cell // base, cell % base
        return ab

    def fourier(flags, params):
        """The model's own column in the Fourier basis of Z_base x Z_base (Nanda et al. 2023), frequencies w = 1 .. base/2:
        restricted_loss [] keeps of the logits what depends on a_k + b_k (the diagonal frequencies) and on the context alone;
        excluded_loss [w] removes the diagonal frequency w; embedding_spectrum [w] is |W_E|^2 by frequency, normalised;
        neuron_r2 [neurons, w]: share of a neuron's variance over (a, b) (mean over contexts) in the nine terms {1, cos, sin}(a)
        x {1, cos, sin}(b) of w, the constant apart; neuron_active [neurons]: share of inputs with m > 0; term_energy [2, w, 4]:
        power in the terms of a, b, a + b, a - b, for neurons (before) and logits (after W_out W_U)."""
        base, ab = flags.base, Anatomy.column_grid(flags)
        full, logits, seen = Anatomy.watch(flags, params, ab)
        grid = lambda x: x.unflatten(0, (base, base, -1))  # [a, b, contexts, ...]
        logits, labels = grid(logits), grid(columns(ab, base)[2][flags.digit])
        power, w = torch.fft.fft2(logits, dim=(0, 1)), torch.arange(1, base // 2 + 1)
        diagonal = torch.zeros(len(w), base, base, dtype=torch.bool)
        diagonal[w - 1, w, w] = diagonal[w - 1, -w % base, -w % base] = True
        keep = diagonal.any(0)
        keep[0, 0] = True
        loss = lambda mask: nll(torch.fft.ifft2(power * mask[..., None, None], dim=(0, 1)).real, labels).mean()
        spectrum = torch.fft.fft(params["W_E"][:base], dim=0).abs().square().sum(1)
        spectrum = torch.where(2 * w == base, spectrum[w], spectrum[w] + spectrum[-w % base])
        energy = lambda x: torch.fft.fft2(x, dim=(0, 1)).abs().square()  # [a freq, b freq, ...]
        after = before = energy(logits.mean(2)).sum(-1)
        out = {"restricted_loss": loss(keep), "excluded_loss": torch.stack([loss(~d) for d in diagonal]), "full_loss": full,
               "embedding_spectrum": spectrum / spectrum.sum()}
        if "neurons" in seen:
            neurons = grid(seen["neurons"])
            each = energy(neurons.mean(2))
            total, before = each.sum((0, 1)) - each[0, 0], each.sum(-1)
            nine = [each[[[i] for i in {0, f, base - f}], [*{0, f, base - f}]].sum((0, 1)) - each[0, 0] for f in w.tolist()]
            out["neuron_r2"] = torch.where(total > 1e-12, torch.stack(nine) / total, 0.).T
            out["neuron_active"] = (neurons > 0).float().mean((0, 1, 2))
        return out | {"term_energy": torch.stack([Anatomy.terms(before, w), Anatomy.terms(after, w)])}

    def terms(energy, w):
        """Power [w, 4] of the 2-D spectrum [a freq, b freq] of a real function in the terms of a, b, a + b and a - b, normalised to
        sum one. At w = base/2 the last two are the same function: it counts as a + b."""
        half = 2 * w == len(energy)
        last = energy[w, -w % len(energy)].masked_fill(half, 0)
        power = torch.stack([energy[w, 0], energy[0, w], energy[w, w], last], -1) * (2 - half.to(energy.dtype))[:, None]
        return power / power.sum().clamp(min=1e-30)

    def matrices(flags, params):
        """The effective matrices that fix the model, exactly: scores [heads, positions, vocab] of `=`; what a head writes to the
        logits when it reads a token, ov_token [heads, vocab, vocab], or a position, ov_place [heads, positions, vocab]; neurons
        to logits, neuron_logits [4d, vocab]."""
        token_score, place_score, token_value, place_value = tables(params, flags.n_heads)
        split = lambda v: v.unflatten(1, (flags.n_heads, -1)).transpose(0, 1)
        out = params["W_O"].unflatten(0, (flags.n_heads, -1)) @ params["W_U"]
        found = {"scores": place_score[:, :, None] + token_score[:, None], "ov_token": split(token_value) @ out,
                 "ov_place": split(place_value) @ out}
        return found | ({"neuron_logits": params["W_out"] @ params["W_U"]} if "W_out" in params else {})

    def place_similarity(flags, params, draws=1000):
        """Are the position vectors of a_k and b_k alike? cosine and |x-y|^2 / (|x| |y|) per column from the units up, and their 1 %,
        50 % and 99 % quantiles when the coordinates of y are permuted at random: [D, 2, 4]."""
        D, x, g = flags.digits, params["W_pos"], common.generator(0, "law")
        a, b = x[:D].flip(0), x[D + 1:2 * D + 1].flip(0)
        shuffle = torch.stack([torch.randperm(x.shape[1], generator=g) for _ in range(draws)])
        size = a.norm(dim=1) * b.norm(dim=1)
        both = lambda y: torch.stack([(a * y).sum(-1) / size, (a - y).square().sum(-1) / size], -1)  # [..., D, 2]
        null = both(b[:, shuffle].transpose(0, 1)).quantile(torch.tensor([.01, .5, .99], dtype=x.dtype), 0)
        return torch.cat([both(b)[None], null]).permute(1, 2, 0)

    def claims(arrays, say):
        nanda = "Nanda et al. 2023, quoted in the " + NOTES
        for name, mine, k in configurations(arrays, 4):
            solved = arrays["full_loss"][mine] < .05  # a circuit is read off a model that has one

            def judge(id, statement, source, values, *rule):
                say(f"{id}-{name}", f"{name}: {statement}", source, np.where(solved, values, np.nan), *rule)
            itself, skip = arrays["shortcuts"][mine].T
            judge("self-attention", "attention of `=` to itself is negligible (mean ablation costs less than .01 nats)",
                  nanda + "Attention from position 2 to itself is negligible", itself, "<", .01)
            judge("skip", "the skip past the MLP acts as a bias (mean ablation costs less than .01 nats)",
                  nanda + "the skip connection just acts as a bias term", skip, "<", .01)
            place = arrays["place_similarity"][mine][:, min(k, arrays["place_similarity"].shape[1] - 1), 0]
            judge("same-places", f"the position vectors of a_k and b_k are the same, to a cosine of .9 (99 % of permuted ones stay "
                  f"below {np.median(place[:, 3]):.2f})", nanda + "Position embeddings in position 0 and 1 are the same",
                  place[:, 0], ">", .9)
            judge("unlike-places", "and yet they are more alike than permuted vectors (cosine minus the 99 % quantile)",
                  NOTES + "randomly permute dimensions of y & compute", place[:, 0] - place[:, 3], ">", 0)
            top = np.sort(arrays["embedding_spectrum"][mine], 1)[:, -2:].sum(1)
            judge("sparse-embedding", "W_E is sparse in the Fourier basis (two frequencies hold 80 % of it)",
                  nanda + "the embedding matrix being sparse", top, ">", .8)
            if "neuron_r2" not in arrays:
                continue
            best = np.median(arrays["neuron_r2"][mine].max(-1), 1)
            judge("nine-terms", "nine terms of one frequency give most of a neuron (median R^2)",
                  nanda + "well approximated by a linear combination of those 9 terms", best, ">", .85)
            before, after = arrays["term_energy"][mine].sum(2)[..., 2].T
            judge("cancels", f"W_out W_U leave only the terms of a + b (90 % of the power; {np.median(before):.0%} before)",
                  nanda + "cancel out all directions other than cos(w(x+y)), sin(w(x+y))", after, ">", .9)
            size, swapped, unrelated = arrays["exchange"][mine].T
            judge("symmetric-neurons", f"neurons hardly change when a and b change places (less than a quarter of the difference of "
                  f"unrelated examples; activations {np.median(size):.2g}, exchanged {np.median(swapped):.2g}, unrelated "
                  f"{np.median(unrelated):.2g}, root mean square)", NOTES + "isn't quite convincing without absolute values of "
                  "activations", swapped / unrelated, "<", .25)

    def position_names(flags):
        D = flags.digits
        return [f"a{k}" for k in range(D - 1, -1, -1)] + ["+"] + [f"b{k}" for k in range(D - 1, -1, -1)] + ["="]

    def draw_attention(arrays, flags):
        parts, names = list(configurations(arrays, 2)), Anatomy.position_names(flags)
        figure, axes = common.panels(2 * len(parts), "Attention of `=`: mean weight, and the exact score of every token at "
                                     "every position", flags)
        for row, (name, mine, k) in enumerate(parts):
            left, right = axes[2 * row:2 * row + 2]
            weights = arrays["attention"][mine][0]
            head = int(weights[:, flags.digits - 1 - min(k, flags.digits - 1)].argmax())
            scores = arrays["scores"][mine][0, head]
            common.image(left, weights, f"{name}: mean attention, first run", figure, "position", "head", (0, 1))
            common.image(right, (scores - scores.mean()).T, f"{name}: scores of head {head}, their mean removed", figure,
                         "position", "token")
            left.set(yticks=range(min(len(weights), 16)))
            right.set(yticks=range(flags.vocab), yticklabels=[format(t, "x") for t in range(flags.base)] + ["+", "="])
            for ax in (left, right):
                ax.set(xticks=range(len(names)), xticklabels=names)
                ax.tick_params(labelsize=7)
        return figure

    def draw_dependence(arrays, flags):
        D, parts, names = flags.digits, list(configurations(arrays, 2)), Anatomy.position_names(flags)
        figure, axes = common.panels(2 * len(parts), "Which inputs matter to the neurons, and which parts to the answer", flags)
        inputs = [n for n in names if n not in "+="] + [f"col {k}" for k in range(D - 1, -1, -1)]
        pairs = [f"{i},{j}" for i in range(D - 1, -1, -1) for j in range(i - 1, -1, -1)]
        for row, (name, mine, k) in enumerate(parts):
            left, right = axes[2 * row:2 * row + 2]
            parts_of_model = [f"head {h}" for h in range(flags.n_heads)] + ["MLP", "= to itself", "skip past MLP"]
            change = [arrays["ablation"][mine], arrays["shortcuts"][mine]]
            if "dependence_mean" in arrays:
                common.bars(left, np.arange(3 * D), arrays["dependence_mean"][mine], "digits, columns", BLUE)
                common.bars(left, 3 * D + np.arange(len(pairs)), arrays["pairs_mean"][mine], "pairs of columns", RED)
                parts_of_model += [f"col-{c} neurons" for c in range(D)]
                change.append(arrays["ablation_group"][mine])
                left.legend(fontsize=7, loc="upper left")
            common.bars(right, np.arange(len(parts_of_model)), np.concatenate(change, 1), "mean ablation", GREEN)
            left.set(xticks=range(3 * D + len(pairs)), ylabel="share of neurons' variance", title=f"{name}: correlation ratio")
            left.set_xticklabels(inputs + pairs, rotation=90, fontsize=6)
            right.set(xticks=range(len(parts_of_model)), ylabel="increase of the loss (nats)", title=f"{name}: mean ablation")
            right.set_xticklabels(parts_of_model, rotation=90, fontsize=6)
            right.set_yscale("symlog", linthresh=1e-3)
            common.shelf(right, floors(flags.base, D)[k, 0], "loss that sees nothing", side="left")
            right.legend(fontsize=7)
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
        common.shelf(b, np.median(of("restricted_loss")), "functions of a+b alone (median)", RED)
        b.set(xlabel="frequency removed from the logits", ylabel="loss (nats)", xticks=w, yscale="log", title="Which are needed")
        for i, (label, colour) in enumerate((("neurons", BLUE), ("logits, after W_out W_U", RED))):
            common.bars(c, np.arange(4) + .4 * i - .2, of("term_energy")[:, i].sum(1), label, colour, .4)
        c.set(xticks=range(4), xticklabels=["of a", "of b", "of a+b", "of a-b"], ylabel="share of power",
              title="What W_out W_U cancel")
        if "neuron_r2" in arrays:
            d.hist(of("neuron_r2").max(-1).ravel(), np.linspace(0, 1, 41), color=GREEN, label=f"{mine.sum()} runs, all neurons")
            d.set(xlabel="R^2 of the nine terms of the best frequency", ylabel="neurons",
                  title=f"{(of('neuron_active') > .99).mean():.0%} of the neurons are always active")
        for ax in (a, b, c, d):
            ax.legend(fontsize=7)
        return figure

    def draw_development(arrays, flags):
        if not len(arrays["over_step"]):  # a checkpoint has no history
            return None
        parts = list(configurations(arrays, 2))
        figure, axes = common.panels(2 * len(parts), "When does each part become necessary?", flags)
        x = np.maximum(arrays["over_step"], .7)
        for row, (name, mine, k) in enumerate(parts):
            left, right = axes[2 * row:2 * row + 2]
            common.band(left, x, arrays["over_full_loss"][:, mine], "loss", "black")
            common.band(left, x, arrays["over_restricted_loss"][:, mine], "functions of a+b alone", "grey")
            for i in range(arrays["over_excluded_loss"].shape[-1]):
                y = arrays["over_excluded_loss"][:, mine, i]
                common.band(left, x, y, f"frequency {i + 1} removed", common.COLOURS[i % 6])
            change = arrays["over_ablation"][:, mine]
            common.band(right, x, change[..., -1], "MLP ablated", RED)
            common.band(right, x, change[..., :-1].max(-1), "the most important head ablated", BLUE)
            if "over_dependence_mean" in arrays:
                own = arrays["over_dependence_mean"][:, mine, 2 * flags.digits + max(flags.digits - 1 - k, 0)]
                common.band(right, x, own, "share of neurons' variance from the own column", GREEN)
            left.set(**STEPS, yscale="log", ylabel="loss (nats)", title=f"{name}: frequencies")
            right.set(**STEPS, ylabel="increase of loss (nats); share", title=f"{name}: parts")
            for ax in (left, right):
                ax.legend(fontsize=6)
        return figure


def curves_of(rows):
    """Dicts of arrays, one a run (or a step), to one with a leading axis."""
    rows = list(rows)
    return {k: np.stack([np.asarray(row[k]) for row in rows]) for k in rows[0]} if rows else {}


class Spikes(common.Study):
    """What removes the repeated spike of the tens?

    arrays: see `curves`; second_moment, weight_norm, update_norm [T, R]; around_* [steps, spikes]; intervention [I];
    fork_loss [I, steps, spikes], fork_worst [spikes, I]."""
    defaults = dict(digit=1, weight_decay=.5, steps=5000, evals=2)
    smoke = dict(SMOKE, steps=400, runs=1)
    before, after, lead = 150, 100, 50  # steps around a spike, and before that until an intervention begins
    interventions = {"none": {}, "eps 1e-6": dict(eps=1e-6), "beta2 .999": dict(beta2=.999), "clip at median": dict(clip=None),
                     "decay off": dict(weight_decay=0.), "rate / 2": dict(lr=None)}
    watched = ("loss", "grad_norm", "second_moment", "weight_norm", "update_norm")

    def check(flags):
        if len(common.groups_of_runs(flags)) > 1:
            raise common.Stop("--study spikes compares runs of one shape: sweep fields that are numbers, such as weight_decay")

    def step_of(flags):
        plain = step_of(flags)

        def step(state, number):
            new, logs = plain(state, number)
            move = {k: new["params"][k] - p for k, p in state["params"].items()}
            return new, logs | {"second_moment": sum(v.sum() for v in new["v"].values()).sqrt(),
                                "weight_norm": common.norm(new["params"]), "update_norm": common.norm(move)}
        return step

    def compute(flags, folder):
        """Train; find each run's first spike; train it again to just before (a run is a function of its flags); go on from there
        once with each intervention, with the same random numbers."""
        trained, = train(flags, folder, step_of=Spikes.step_of)
        arrays = curves([trained])
        window = Spikes.before + Spikes.after
        first, last = Spikes.first_spikes(arrays), flags.steps - Spikes.after
        around, forks = {k: [] for k in Spikes.watched}, []
        for r in np.flatnonzero((first > Spikes.before + Spikes.lead) & (first <= last)):
            spike, run = int(first[r]), trained.runs[r]
            begin = spike - Spikes.before - Spikes.lead
            same = dict(step_of=Spikes.step_of, evaluate_of=None, final=None)  # the same program has the same bits
            run = replace(run, compile="on" if folder.compiled[0]["compiled"] else "off")
            again, = train(flags, folder.aside(f"again{r}"), [[replace(run, steps=begin)]], **same)
            calm = float(np.median(arrays["grad_norm"][max(begin - 100, 0):begin, r]))
            special = dict(clip=calm, lr=run.lr / 2)
            forked = [replace(run, steps=Spikes.lead + window, **{k: special[k] if v is None else v for k, v in c.items()})
                      for c in Spikes.interventions.values()]
            state = common.run_of(again.state, 0)
            fork, = train(flags, folder.aside(f"fork{r}"), [forked], start=lambda run: state, **same)
            forks.append(fork.metrics["loss"][Spikes.lead:])
            for k in around:
                around[k].append(arrays[k][spike - Spikes.before:spike + Spikes.after, r])
        shape = (0, window, len(Spikes.interventions))
        forks = np.stack(forks) if forks else np.zeros(shape)
        arrays |= {f"around_{k}": np.array(v).reshape(-1, window).T for k, v in around.items()}
        worst = np.array([geometric(f).max(0) for f in forks]).reshape(-1, shape[2])
        return arrays | {"intervention": np.array([*Spikes.interventions]), "fork_loss": forks.transpose(2, 1, 0),
                         "fork_worst": worst}

    def first_spikes(arrays):
        return arrays["first_spike"]

    def claims(arrays, say):
        quote = NOTES + "probably a gradient spike of unclear provenance"
        say("replay", "without an intervention the replayed run spikes again (control)", quote, arrays["fork_worst"][:, 0],
            ">", 1e-3)
        for i, name in enumerate(arrays["intervention"].tolist()):
            if i:
                say(f"cause-{name.replace(' ', '-')}", f"{name}, {Spikes.lead + Spikes.before} steps before the first spike, removes it "
                    f"(until {Spikes.after} steps after)", quote, arrays["fork_worst"][:, i], "<", 1e-3)

    def draw_spikes(arrays, flags):
        figure, (a, b) = common.panels(2, "What drives the repeated spike?", flags)
        t = np.arange(len(arrays["around_loss"])) - Spikes.before
        for key, colour in zip(Spikes.watched, common.COLOURS):
            common.band(a, t, arrays[f"around_{key}"], key.replace("_", " "), colour)
        a.legend(fontsize=7) if arrays["around_loss"].size else None
        a.set(yscale="log", ylim=(1e-9, 100), xlabel="step relative to the spike", ylabel="nats, or norm")
        a.axvline(0, color="grey", ls="--", lw=.8)
        for i in range(len(arrays["intervention"])):
            worst = arrays["fork_worst"][:, i]
            b.plot(np.full(len(worst), i), worst, "o", color=common.COLOURS[i % 8], ms=5)
        b.set(yscale="log", ylim=(1e-9, 5), xticks=range(len(arrays["intervention"])), ylabel="highest loss in the window (nats)",
              title=f"{len(arrays['fork_worst'])} spikes, each replayed with one change")
        common.shelf(b, 1e-3, "counts as a spike")
        b.set_xticklabels(arrays["intervention"].tolist(), rotation=30, ha="right", fontsize=7)
        return figure


class Sweep(common.Study):
    """Every row of the notes' tables (hours), or the grid of --sweep: when does each configuration descend, where does it end?

    arrays, [R]: the swept fields, seed, milestones; kind (see `shelf_kind`) of the level on which a run ends; delta_spectrum
    [R, 2, base]; curve [R, 200] at curve_step [R, 200], the 10-step geometric mean of the loss at log-spaced steps."""
    defaults = dict(steps=5000, evals=2)
    smoke = dict(SMOKE, runs=1)

    def points(flags):
        """The rows of the notes, with their own numbers of steps scaled by --steps / 5000, and more values of eps for the floor that
        decay sets; more seeds where they are cheap, most for the waiting times of 2/2."""
        rows = {(row[1:5], row[5]) for row in ROWS}
        points = [dict(digit=k, d_model=d, n_heads=h, weight_decay=w, steps=max(1, n * flags.steps // 5000),
                       runs=flags.runs * (16 if d == h == 2 else 4 if d <= 4 else 1))
                  for (k, d, h, w), n in sorted(rows) if d <= 2 or not flags.smoke]
        more = dict(digit=U, d_model=128, n_heads=4, weight_decay=.5, steps=max(1, 3000 * flags.steps // 5000), runs=flags.runs)
        points += [dict(more, eps=eps) for eps in (1e-9, 1e-7, 1e-6) if not flags.smoke]
        return sorted(points, key=lambda p: (p["d_model"] + 4 * p["n_heads"]) ** 2 * p["steps"])

    def compute(flags, folder):
        trained = train(flags, folder)
        runs = [run for t in trained for run in t.runs]
        fields = {"digit", "d_model", "n_heads", "weight_decay", "eps", "steps", "seed", *common.swept(flags)}
        arrays = {k: np.array([getattr(r, k) for r in runs]) for k in sorted(fields)}
        ends = {k: np.concatenate([t.metrics[f"eval_{k}"][-1] for t in trained]) for k in ("loss", "pair", "alias", "delta")}
        arrays |= {k: np.concatenate([t.final[k] for t in trained]) for k in trained[0].final if k != "loss"}
        kinds = [Sweep.shelf_kind(run, *(ends[k][i] for k in ("loss", "pair", "alias"))) for i, run in enumerate(runs)]
        at = [np.geomspace(1, t.runs[0].steps, 200).round().astype(int) for t in trained]
        return arrays | {"delta_spectrum": ends["delta"], "kind": np.array(kinds),
                         "curve": np.concatenate([geometric(t.metrics["loss"])[i - 1].T for i, t in zip(at, trained)]),
                         "curve_step": np.concatenate([np.tile(i, (len(t.runs), 1)) for i, t in zip(at, trained)])}

    def shelf_kind(flags, loss, pair, alias):
        """What a final loss means: `solved`; `n mod m`: that much of the column is known and no more (`n mod 1`: nothing);
        `carry-blind`: the column is known, the carry is not; or `between`. The tolerance .15 nats is a stated rule."""
        if loss < .01:
            return "solved"
        if flags.digit and abs(loss - pair - floors(flags.base, flags.digits)[flags.digit, 1]) < .15 and pair < .15:
            return "carry-blind"
        for m, cost in zip(divisors(flags.base), alias):
            if cost < .15 and abs(loss - cost - math.log(flags.base / m)) < .15:
                return f"n mod {m}"
        return "between"

    def claims(arrays, say):
        def of(key, k, d, h, decay, eps=1e-8, steps=None):
            same = (arrays["digit"] == k) & (arrays["d_model"] == d) & (arrays["n_heads"] == h) & np.isclose(arrays["eps"], eps)
            same &= np.isclose(arrays["weight_decay"], decay)
            return arrays[key][same & (arrays["steps"] == (steps or arrays["steps"]))]

        for name, k, d, h, decay, steps, key, low, high, sentence in ROWS:
            say(name, f"{('units', 'tens', 'hundreds', 'thousands')[k]}, {sentence}: {key}", NOTES + sentence,
                of(key, k, d, h, decay, steps=steps), "in", (low, high))
        g = np.random.default_rng(0)

        def interval(f, *groups):
            """f of the groups, with its 95 % interval over resampled runs."""
            draws = [f(*(g.choice(x, len(x)) for x in groups)) for _ in range(500)]
            return f(*groups), *np.quantile(draws, [.025, .975])

        middle = lambda key, *where: of(key, *where)
        widths = [of("descent", U, d, 4, 0) for d in (8, 16, 128)]
        slope = lambda *waits: math.exp(-np.polyfit([3, 4, 7], np.log([np.median(x) for x in waits]), 1)[0])
        say("width-delays", "halving the width delays the units' descent by x1.3 to x1.75 (4 heads, widths 8 to 128)",
            NOTES + "smth like x1.5 time to drop per /2 of d_model", interval(slope, *widths), "in", (1.3, 1.75))
        growth = lambda a, b, c: math.log(np.median(c) / np.median(b)) / math.log(3 / 2) - math.log(np.median(b) / np.median(a))
        waits = [of("descent", U, d, d, 0) for d in (8, 4)] + [of("descent", U, 2, 2, 0)]
        bend = lambda a, b, c: math.log(np.median(c) / np.median(b)) - math.log(np.median(b) / np.median(a))
        say("width-hyper", "the delay per halving grows towards width 2 (log of 2/2 over 4/4, minus 4/4 over 8/8)",
            NOTES + "maybe hyperexponentially, when close to 0", interval(bend, *waits), ">", 0)
        say("waiting-exponential", *Sweep.waiting(of("descent", U, 2, 2, 0), g))
        later = lambda many, few: np.mean(many[:, None] > few)
        for d, few, many in (16, 1, 4), (8, 1, 4), (8, 4, 8), (4, 1, 4):
            say(f"heads-slow-units-{d}", f"{d} wide, the units descend later with {many} heads than with {few} (share of pairs of runs)",
                NOTES + "for this task more heads are worse (considerably slow down convergences)",
                interval(later, of("descent", U, d, many, 0), of("descent", U, d, few, 0)), ">", .5)
        setting = [(.25, 1e-8), (.5, 1e-8), (1, 1e-8), (.5, 1e-9), (.5, 1e-7), (.5, 1e-6)]
        floor = lambda *levels: np.polyfit(np.log([w * e for w, e in setting]), [np.log(x).mean() for x in levels], 1)[0]
        say("decay-floor", "decay sets a floor on the units' loss, proportional to weight_decay x eps (log-log slope)",
            NOTES + "WD=1: to 20e-9; WD=0.5: to 8e-9", interval(floor, *(of("final", U, 128, 4, w, e) for w, e in setting)),
            "in", (.8, 1.2))
        slow = of("final", U, 128, 4, .5) / of("lowest", U, 128, 4, .5)
        say("slow-regrowth", "at decay .5 the units' loss grows back slowly by 5 % or more after its lowest (that this is the early bump "
            "slowed down thirty times, no curve decides: an intervention that removes one would have to remove the other)",
            NOTES + "dips to 7-8 & then slowly goes back to 8-9", slow, ">", 1.05)
        ratio = lambda a, b: np.median(a) / np.median(b)
        say("decay-damps", "decay .25 at least halves the tens' vibration (deviation of log loss after step 1000, over that at decay 0)",
            NOTES + "WD=0.25 diminishes the loss vibration drastically",
            interval(ratio, of("vibration", T, 128, 4, .25), of("vibration", T, 128, 4, 0)), "<", .5)
        say("heads-speed-tens", "the tens converge sooner with 128 heads than with 2 (128 wide; ratio of steps)", NOTES +
            "more heads makes things happen faster I think", interval(ratio, of("reach", T, 128, 128, .25), of("reach", T, 128, 2, .25)),
            "<", 1)
        alone = np.concatenate([of("reach", T, d, 1, .25) for d in (128, 256, 512)])
        say("one-head-fails-tens", "one head never brings the tens below 1e-3 (widths 128, 256, 512)", NOTES + "1 is too few (even for "
            "512/1)", alone, ">", 1e9)
        decays = (0, .1, .15, .2, .225, .25, .5)
        trend = lambda *counts: np.polyfit(decays, [x.mean() for x in counts], 1)[0]
        say("decay-spikes", "the tens spike more often with more decay (spikes a run, slope over decay)", NOTES + "a repeatable gradient "
            "spike, intensified by WD", interval(trend, *(of("spikes", T, 128, 4, w, steps=5000) for w in decays)), ">", 0)

    def waiting(waits, g):
        """Are waiting times exponential above a dead time? Deviation over mean excess of those above the least, against its central
        95 % for exponential times (which this rule rejects once in twenty); how often gamma(2) times would pass is said with it."""
        def excess(x):
            rest = np.sort(x)[1:] - x.min()
            return rest.std(ddof=1) / rest.mean()
        n = len(waits)
        null = np.quantile([excess(g.exponential(size=n)) for _ in range(2000)], [.025, .975])
        passing = np.mean([null[0] <= excess(g.gamma(2, size=n)) <= null[1] for _ in range(2000)])
        value = excess(waits) if np.isfinite(waits).all() else math.nan
        statement = (f"waiting times of 2/2 over {n} seeds are exponential above a dead time (deviation over mean excess; gamma(2) times "
                     f"would pass in {passing:.0%}; no verdict while a seed has not descended)")
        measured = float(value) if np.isfinite(value) else [value]
        return (statement, NOTES + "chances of extant circuits to be accidentally close enough to the necessary basin of attraction",
                measured, "in", tuple(null))

    def draw_rows(arrays, flags):
        fields = ("digit", "weight_decay", "eps", "n_heads", "d_model", "steps")
        keys = list(zip(*(arrays[f].tolist() for f in fields)))
        configs = sorted(set(keys))
        figure, (a, b) = common.panels(2, "Every configuration: when it descends, where it ends", flags,
                                       size=(5.4, max(3.7, .16 * len(configs))))
        wanted = {} if flags.sweep else {(row[1], row[4], 1e-8, row[3], row[2], row[5], row[6]): row[7:9] for row in ROWS}
        for y, config in enumerate(configs):
            mine = np.array([k == config for k in keys])
            descent = arrays["descent"][mine]
            a.plot(descent, np.full(mine.sum(), y), "o", color=BLUE, ms=3, alpha=.6)
            b.plot(np.maximum(arrays["final"][mine], 1e-13), np.full(mine.sum(), y), "o", color=BLUE, ms=3, alpha=.6)
            never, stuck = np.isinf(descent).sum(), wanted.get((*config, "reach"))
            a.text(config[-1], y, f" {never} never" * bool(never), fontsize=5, va="center")
            for ax, key in (a, "descent"), (b, "final"), (b, "lowest"):
                low, high = wanted.get((*config, key), (0, math.inf))
                if low > 0 and math.isfinite(high):
                    ax.plot([low, high], [y, y], color=RED, lw=4, alpha=.35, solid_capstyle="butt")
            if stuck:
                b.text(5, y, "  notes: converges" if stuck[0] == 1 else "  notes: does not", fontsize=5, va="center", color=RED)
            if config[0]:
                level = floors(flags.base, flags.digits)[config[0], 1]
                b.plot([level, level], [y - .5, y + .5], color="grey", lw=1)
        a.plot([], [], color=RED, lw=4, alpha=.35, label="the notes, with their tolerance")
        b.plot([], [], color="grey", lw=1, label="own column, no carry (exact)")
        b.axvline(math.log(flags.base), color="grey", ls="--", lw=.8, label="sees nothing (exact)")
        names = [f"{digit_name(flags, k)} {d}/{h} decay {w:g}" + f" eps {e:g}" * (e != 1e-8) for k, w, e, h, d, _ in configs]
        a.set(xscale="log", xlabel="step of first descent", yticks=range(len(configs)))
        a.set_yticklabels(names, fontsize=5.5)
        b.set(xscale="log", xlabel="final loss (nats)", yticks=[], xlim=(1e-13, 5))
        for ax in (a, b):
            ax.legend(fontsize=6, loc="upper left")
        return figure


# The notes' tables: (id, digit, d_model, n_heads, weight_decay, steps, quantity, lowest, highest, sentence). A quoted step
# counts as reproduced within a factor 1.5, a small loss within a factor 3, a visible bump is a regrowth by 10 % or more
# (the notes read all of them off graphs). Where the notes name no decay: 0 for the units, .25 for the others.
STEP = lambda s: ("descent", s / 1.5, s * 1.5)
LEVEL = lambda x: ("final", x / 1.5, x * 1.5)
FALLS_TO = lambda x: ("lowest", x / 3, x * 3)
CONVERGES, STUCK = ("reach", 1, 1e9), ("reach", math.inf, math.inf)  # a step that never comes is infinite
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


STUDIES = [Digit, Theory, All, Anatomy, Spikes, Sweep]

if __name__ == "__main__":
    raise SystemExit(common.main(Flags, STUDIES))
