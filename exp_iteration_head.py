"""Does a two-layer transformer with a chain of thought learn one circuit that iterates
s_t = F(s_{t-1}, x_t), and reuse it?

Law: [problem, x_1 .. x_L, EoI, s_1 .. s_L, EoS], s_1 = x_1, L uniform in 1 .. Lmax. copy: s_t = x_t;
parity: s_t = s_{t-1} + x_t mod 2; polynomial: s_t = s_{t-1} x_t + 1 mod p. Loss: cross-entropy (nats) of
s_1 .. s_L and EoS, which are determined: its floor is 0. The iteration head: layer 1 attends from an
answer to EoI and so knows where the answers begin, layer 2 looks up x_t, its MLP applies F. Model:
pre-norm transformer, LayerNorm without bias, exact GELU.

    python exp_iteration_head.py                       3 minutes: is it learned, and how does it look?
    python exp_iteration_head.py --study circuit       does it do what it looks like? Interventions
    python exp_iteration_head.py --study induction     the same model on another law: induction

Claims quote Cabannes et al. 2024, "Iteration Head: A Mechanistic Study of Chain-of-Thought", and its
research notes; the memories of induction are those of Bietti et al. 2023, "Birth of a Transformer"."""
import functools
import math
from dataclasses import dataclass
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from torch.func import grad_and_value
from torch.nn.functional import gelu, layer_norm, rms_norm
from torch.nn.functional import one_hot

import common
from common import flag

# ==== Flags ==========================================================================================
number = functools.partial(flag, number=True)  # runs that differ in these share a program


@dataclass
class Flags(common.Flags):
    steps: int = flag(1500, "training steps", 1)
    runs: int = flag(3, "seeds per configuration", 1)
    task: str = number("polynomial", "polynomial, parity or copy")
    modulus: int = flag(11, "p of the polynomial", 3, 200)
    other: str = flag("", "a second task, told from the first by the problem token")
    share: float = number(.5, "share of the second task", 0, 1)
    other_weight: float = number(1., "weight of its answers in the loss", 0)
    cot: bool = flag(True, "chain of thought (without: the last state at once, then EoS)")
    max_length: int = flag(8, "Lmax, the largest L", 2, 100)
    increasing: bool = number(False, "learn from lengths up to a bound that grows for half of the steps")
    length_power: float = number(0., "weight of a sequence in the loss: (L / Lmax)^this")
    omit_length: int = number(0, "a length left out of training (0: none)", 0)
    train_set: int = number(0, "sequences of a finite training set (0: always new ones)", 2)
    n_layers: int = flag(2, "layers", 1, 8)
    n_heads: int = flag(1, "heads of a layer", 1)
    d_model: int = flag(64, "d, width of the residual stream", 1)
    norm: Literal["layer", "rms", "none"] = flag("layer", "before attention, MLP and unembedding")
    mlp: bool = flag(True, "a GELU MLP of width 4 d in each layer")
    init_scale: float = number(1., "initial parameters times this", 0)
    source: str = number("", "transfer: the task that was learned before (none: from scratch)")
    learns: str = number("all", "transfer: all, last-block (and unembedding) or second-mlp")
    pos_dim: int = number(0, "coordinates that positions have (0: d)", 0)
    freeze_pos: bool = number(False, "positions keep their initial values")
    method: Literal["adam", "sgd"] = flag("adam", "of descent; sgd: with momentum .9")
    lr: float = number(1e-3, "learning rate", 0)
    weight_decay: float = number(0., "decoupled weight decay", 0)
    batch: int = flag(64, "sequences a step, two in a row", 2)
    n_eval: int = flag(64, "evaluation sequences of each length", 2)
    n_tokens: int = flag(8, "induction: V, number of tokens", 3, 8)
    seq_length: int = flag(16, "induction: T, tokens a sequence", 3, 250)
    noise: float = number(.1, "induction: alpha, probability that the next token is uniform", 0, 1)

    def check(self):
        if self.d_model % self.n_heads:
            raise common.Stop(f"--d-model {self.d_model} must be divisible by --n-heads {self.n_heads}")
        if not {*tasks_of(self)} <= TASKS.keys():
            raise common.Stop(f"tasks are {', '.join(TASKS)}, not {', '.join(tasks_of(self))}")

    @property
    def slots(self):
        """S: slots of the prompts, or of the answers, in a row."""
        return self.max_length + 3


OWN = [*common.fields_of(Flags)][len(common.fields_of(common.Flags)):]  # this script's own flags

# ==== Data law =======================================================================================
TASKS = {  # name: (values of x, number of states 0, 1, .., F(s, x)); the first state is s_1 = x_1
    "polynomial": (lambda f: range(1, f.modulus), lambda f: f.modulus,
                   lambda s, x, f: (s * x + 1) % f.modulus),
    "parity": (lambda f: range(2), lambda f: 2, lambda s, x, f: (s + x) % 2),
    "copy": (lambda f: range(2), lambda f: 2, lambda s, x, f: x),
}
EOS, EOI, DIGIT = 0, 1, 2 + len(TASKS)  # tokens: EoS, EoI, a problem token each task, then 0, 1, ..
HELD = 16  # one sequence in so many is kept for evaluation, where there are enough


def tasks_of(flags):
    return [flags.task, flags.other] if flags.other else [flags.task]


def update(flags, problem, s, x):
    """s_t = F(s_{t-1}, x_t); problem: numbers in TASKS, of the shape of s and x."""
    new = x
    for i, (*_, F) in enumerate(TASKS.values()):
        new = torch.where(problem == i, F(s, x, flags), new)
    return new


def kept_apart(x, index):
    """Whether sequences are kept for evaluation, by a hash of x [.., n] where index > 0."""
    code = torch.where(index > 0, common.mix(x + 256 * index), 0)
    return code.sum(-1) % HELD == 0


def places(flags, first):
    """Of S slots in which a sequence of length first [B] stands before one of Lmax + 1 - first: whose it
    is, 0 or 1, and its index there, 0 .. length [B, S]."""
    slot, first = torch.arange(flags.slots, device=first.device), first[:, None]
    segment = (slot > first).long()
    return segment, slot - segment * (first + 1)


def rows_of(flags, law, which, first, x):
    """Two sequences in a row, of lengths L = first [B] and Lmax + 1 - L, so that no slot is empty: the
    prompts [problem x_1 .. x_L] of both, then both answers [EoI s_1 .. s_L]. With S = Lmax + 3 slots:
    which [B, 2] of the run's tasks, x [B, S] (0 in the first slot of a prompt). Returns what stands in
    a slot [B, 2S]: token, position, segment (its sequence); and at answers [B, S]: index (EoI is 0, s_t
    is t), length, problem, s (of that index), ahead (the next x), target, `given`, whether there is one,
    and `next`, whether it is F(s, ahead)."""
    segment, index = places(flags, first)
    length = torch.where(segment == 1, flags.max_length + 1 - first[:, None], first[:, None])
    problem, s = law["problem"][which.gather(1, segment)], [x[:, 0]]
    for j in range(1, flags.slots):
        s.append(torch.where(index[:, j] == 1, x[:, j], update(flags, problem[:, j], s[-1], x[:, j])))
    s, answers = torch.stack(s, 1), length
    if not flags.cot:
        s = s.gather(1, torch.where(segment == 1, flags.slots - 1, first[:, None]))
        answers = torch.ones_like(length)
    prompt = torch.where(index == 0, 2 + problem, DIGIT + x)
    answer = torch.where(index == 0, EOI, DIGIT + s)
    target = torch.where(index < answers, DIGIT + s.roll(-1, 1), EOS)
    return {"token": torch.cat([prompt, answer], 1), "segment": segment.repeat(1, 2),
            "position": torch.cat([index, length + 1 + index], 1), "index": index, "length": length,
            "problem": problem, "s": s, "ahead": x.roll(-1, 1), "next": (index > 0) & (index < answers),
            "target": target, "given": index <= answers}


def rows_at(flags, number, n):
    """Row n [B] of the training data, a function of the run's seed and n alone, and the weights of its
    targets [B, S]: sequences that are kept for evaluation have none."""
    h = common.hashes([word[:, None] for word in common.key(number["seed"], 0, n)], flags.slots + 3)
    first = 1 + (h[:, 0] * flags.max_length >> 32)
    which = (h[:, 1:3] < bool(flags.other) * number["share"] * 2. ** 32).long()
    segment, index = places(flags, first)
    task = which.gather(1, segment)
    x = torch.where(index == 0, 0, number["least"][task] + (h[:, 3:] * number["values"][task] >> 32))
    rows = rows_of(flags, number, which, first, x)
    held = torch.stack([kept_apart(x, torch.where(segment == i, index, 0)) for i in (0, 1)], 1)
    held = held.gather(1, segment) & (rows["length"] >= number["apart"][task])
    return rows, (rows["given"] & ~held) * torch.where(task == 1, number["other_weight"], 1.)


def sample(flags, number, t):
    """The rows of step t, and the weights of their targets."""
    B = flags.batch // 2
    return rows_at(flags, number, t * B + torch.arange(B, device=t.device))

# ==== Model ==========================================================================================
def init(flags, generator, vocab, width):
    """Parameters of one run: E [vocab, d], P [width, d], U [d, vocab]; in layer l: W_Q<l>, W_K<l>,
    W_V<l>, W_O<l> [d, d] (heads side by side in the columns, in the rows of W_O), W_in<l> [d, 4 d],
    W_out<l>, gains g_attention<l>, g_mlp<l>, and g at the end. Scales are torch's defaults: N(0, 1) for
    embeddings, uniform within 1 / sqrt(rows) for the others."""
    d = flags.d_model
    def normal(*shape):
        return flags.init_scale * torch.randn(shape, generator=generator)
    def uniform(*shape):
        return flags.init_scale * (2 * torch.rand(shape, generator=generator) - 1) * shape[0] ** -.5
    params = {"E": normal(vocab, d), "P": normal(width, d)}
    for l in range(flags.n_layers):
        params |= {f"W_{name}{l}": uniform(d, d) for name in "QKVO"} | {f"g_attention{l}": torch.ones(d)}
        if flags.mlp:
            params |= {f"W_in{l}": uniform(d, 4 * d), f"W_out{l}": uniform(4 * d, d)}
            params[f"g_mlp{l}"] = torch.ones(d)
    return params | {"U": uniform(d, vocab), "g": torch.ones(d)}


def normed(flags, params, name, x):
    """LayerNorm without bias, RMSNorm or nothing."""
    if flags.norm == "none":
        return x
    f = layer_norm if flags.norm == "layer" else rms_norm
    return f(x, x.shape[-1:], params[name], eps=1e-5)


def look_up(table, index):
    """table[index] by one-hot rows: on a card the gradient of a gather adds up in any order."""
    kinds = torch.arange(len(table), device=index.device)
    return (index[..., None] == kinds).to(table.dtype) @ table


def unchanged(name, x):
    return x


def forward(flags, params, rows, answers, patch=unchanged):
    """Logits [B, answers, vocab] of the last slots of rows (token, position, segment [B, W]), and
    attention maps, [B, H, queries, W] a layer. A slot sees those of its segment up to its own position.
    Nothing is computed that these answers do not read. patch(name, x) may replace attention<l>, heads<l>
    [B, W, d] (before W_O), mid<l> (the stream before the MLP), hidden<l>, mlp<l>."""
    H, maps, segment, position = flags.n_heads, [], rows["segment"], rows["position"]
    sees = (segment[:, :, None] == segment[:, None]) & (position[:, :, None] >= position[:, None])
    sees = sees[:, None]
    def heads(x):
        return x.unflatten(-1, (H, -1)).transpose(-2, -3)  # [B, H, W, d / H]
    x = look_up(params["E"], rows["token"]) + look_up(params["P"], position)
    for l in range(flags.n_layers):
        h = normed(flags, params, f"g_attention{l}", x)
        W_Q, W_K, W_V, W_O = (params[f"W_{name}{l}"] for name in "QKVO")
        if H == 1:  # a head is two matrices: W_Q W_K' between streams, W_V W_O on what is read
            W_Q, W_O, k, v = W_Q @ W_K.T, W_V @ W_O, h, h
        else:
            k, v = h @ W_K, h @ W_V
        if l == flags.n_layers - 1:
            x, h, sees = x[:, -answers:], h[:, -answers:], sees[:, :, -answers:]
        score = heads(h @ W_Q) @ heads(k).mT * (flags.d_model // H) ** -.5
        maps.append(patch(f"attention{l}", score.masked_fill(~sees, -1e30).softmax(-1)))
        mixed = patch(f"heads{l}", (maps[-1] @ heads(v)).transpose(-2, -3).flatten(-2))
        x = patch(f"mid{l}", x + mixed @ W_O)
        if flags.mlp:
            hidden = gelu(normed(flags, params, f"g_mlp{l}", x) @ params[f"W_in{l}"])
            x = x + patch(f"mlp{l}", patch(f"hidden{l}", hidden) @ params[f"W_out{l}"])
    return normed(flags, params, "g", x) @ params["U"], maps


def nll(logits, target):
    """-log p(target) in nats."""
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    return logits.logsumexp(-1) - torch.where(target[..., None] == tokens, logits, 0.).sum(-1)

# ==== Train ==========================================================================================
def start(run):
    """Step 0 of one run."""
    vocab, width = DIGIT + max(2, run.modulus), 2 * run.max_length + 2
    params = init(run, common.generator(run.seed, "init"), vocab, width)
    return {"params": params, **common.adam_init(params)}


def constants(run):
    """What the step and the evaluation of one run read. Of its tasks: problem, least and values (of x),
    apart (lengths from this on have evaluation sequences of their own) [tasks]; the rows of evaluation:
    first [B], inputs [tasks, B, S], as `rows_of` takes them."""
    n, Lmax, names = run.n_eval // 2, run.max_length, tasks_of(run)
    inputs, zero = [], torch.zeros(n, 1, dtype=torch.int64)
    ranges = [TASKS[name][0](run) for name in names]
    least, values = (torch.tensor([f(r) for r in ranges]) for f in (min, len))
    apart = math.log(2 * HELD * run.n_eval) / values.log()
    for i, name in enumerate(names):
        g, pool = common.generator(0, f"evaluation {name}"), [None]
        for L in range(1, Lmax + 1):
            x = least[i] + torch.randint(int(values[i]), (max(1024, 64 * n), L), generator=g)
            x = x[kept_apart(x, torch.arange(L) + 1) | (L < apart[i])]
            pool.append(x[torch.arange(2 * n) % len(x)])
        inputs += [torch.cat([zero, pool[L][:n], zero, pool[Lmax + 1 - L][n:]], 1)
                   for L in range(1, Lmax + 1)]
    return {"problem": torch.tensor([[*TASKS].index(name) for name in names]), "least": least,
            "values": values, "apart": apart, "first": (torch.arange(Lmax) + 1).repeat_interleave(n),
            "inputs": torch.cat(inputs).unflatten(0, (len(names), -1))}


def step_of(flags, sample=sample, update=common.adamw):
    """The training step of ONE run; update: the optimiser."""
    def step(state, number):
        rows, weight = sample(flags, number, state["t"])
        def loss_of(params):
            each = nll(forward(flags, params, rows, flags.slots)[0], rows["target"])
            return (weight * each).sum() / weight.sum().clamp(min=1e-9)
        grads, loss = grad_and_value(loss_of)(state["params"])
        params, rest = update(state["params"], grads, state, number["lr"], number["weight_decay"])
        return {"params": params, **rest}, {"loss": loss}
    return step


def evaluation_rows(flags, number, task=0):
    """The rows of evaluation of one of the run's tasks."""
    which = torch.full_like(number["inputs"][task, :, :2], task)
    return rows_of(flags, number, which, number["first"], number["inputs"][task])


def answered(flags, params, number, task=0, patch=unchanged):
    """These rows, teacher-forced: rows, logits [B, S, vocab], maps."""
    rows = evaluation_rows(flags, number, task)
    return rows, *forward(flags, params, rows, flags.slots, patch)


def cell(rows, key):
    """Whether a slot is at position key [B, S] of the sequence of an answer: [B, S, 2 S]."""
    segment, S = rows["segment"], key.shape[1]
    return (rows["position"][:, None] == key[..., None]) & (segment[:, None] == segment[:, -S:, None])


def ideal(rows):
    """Where an iteration head looks, of each part: keys [B, S], and which answers look there. In the
    first layer states look at EoI; in the last EoI and states up to s_{L-1} look at the next x."""
    length, index, given = rows["length"], rows["index"], rows["given"]
    return (length + 1, given & (index > 0)), (index + 1, given & (rows["target"] != EOS))


def attention_to(rows, map, key):
    """Attention [H, B, S] of each answer to position key [B, S] of its own sequence."""
    return (map[:, :, -key.shape[1]:].transpose(0, 1) * cell(rows, key)).sum(-1)


def mean_by(label, count, x):
    """Means [count] of x over the places where label is 0, 1, .. (NaN where there is none)."""
    at = label[..., None] == torch.arange(count, device=x.device)
    axes = [*range(label.ndim)]
    return (x[..., None] * at).sum(axes) / at.sum(axes)


def right_sequences(rows, logits):
    """Whether all states of a sequence are right, and its length: [B, 2] each."""
    segment, length = rows["segment"][:, :logits.shape[1]], rows["length"]
    right = (logits.argmax(-1) == rows["target"]) | (rows["target"] == EOS) | ~rows["given"]
    each = [(right | (segment != i)).all(1) for i in (0, 1)]
    return torch.stack(each, 1).float(), length[:, ::length.shape[1] - 1]


def measured(flags, rows, logits, maps):
    """loss; shares of sequences with all states right: accuracy, by_length [Lmax]; and of the parts of
    an iteration head, at the head of its layer that does it most, mean attention (weight_first, _second)
    and share of answers with more than half of it (peak_..) on where they should look, see `ideal`;
    entropy (nats) of the second's maps."""
    whole, lengths = right_sequences(rows, logits)
    part = lambda x, where: (x * where).sum((-2, -1)) / where.sum()
    found = {"loss": part(nll(logits, rows["target"]), rows["given"]), "accuracy": whole.mean(),
             "by_length": mean_by(lengths - 1, flags.max_length, whole)}
    for name, (key, looks), map in zip(("first", "second"), ideal(rows), (maps[0], maps[-1])):
        x = attention_to(rows, map, key)
        found |= {f"weight_{name}": part(x, looks).amax(), f"peak_{name}": part(x > .5, looks).amax()}
    entropy = -torch.special.xlogy(maps[-1], maps[-1]).sum(-1).transpose(0, 1)
    return found | {"entropy": part(entropy, looks).amin()}


def evaluate_of(flags):
    """What is evaluated of ONE run: means over its tasks, task_accuracy and task_peak [tasks]."""
    def evaluate(params, number):
        each = common.stack([measured(flags, *answered(flags, params, number, i))
                             for i in range(len(tasks_of(flags)))])
        mean = common.tree_map(lambda x: x.mean(0), each)
        return mean | {"task_accuracy": each["accuracy"], "task_peak": each["peak_second"]}
    return evaluate


def stacked(rows):
    """Dicts of arrays, one a run, as {name: [R, ...]}; where shapes differ padded with NaN."""
    found = {}
    for k in rows[0]:
        most = np.max([np.shape(row[k]) for row in rows], 0)
        full = lambda x: np.pad(x, [(0, n) for n in most - np.shape(x)], constant_values=np.nan)
        found[k] = np.stack([full(row[k]) if len(most) else row[k] for row in rows])
    return found


def reach(arrays, y=None, level=.95):
    """The step [R] at which y [R, M] (default: accuracy) first reaches a level, on a line between two
    evaluations; infinite if it never does, NaN for a run without an end."""
    y = arrays["eval_accuracy"] if y is None else y
    step = [np.interp(level, np.maximum.accumulate(x), t) for x, t in zip(y, arrays["eval_step"])]
    return np.where((y >= level).any(1), step, math.inf) + 0 * arrays["accuracy"]


def train(flags, folder, **more):
    """Train a study (more: in place of its `law`); its arrays, see `collected`."""
    more = dict(groups=common.groups_of_runs(flags)) | flags.room.law | more
    return collected(flags, common.train(folder=folder, **more), more["constants"])


def collected(flags, trained, constants_of):
    """Arrays of trained groups, NaN where other runs have more: eval_step [R, M] and eval_* of
    `evaluate_of` [R, M, ...]; and with one entry a run: all settings; eval_* at the end, without the
    prefix (NaN for a run that diverged or was stopped); reach, see `reach`; and what the study's
    `measure` finds of a run, its parameters and its numbers."""
    runs, rows = [], []
    for t in trained:
        for r, run in enumerate(t.runs):
            curves = {k: x[:, r].astype(float) for k, x in t.metrics.items()
                      if k.startswith("eval_") and x.ndim > 1}
            number = common.run_of(common.numbers([run], constants_of), 0)
            params = {k: p[r].nan_to_num() for k, p in t.params.items()}
            ends = {k[5:]: x[-1] for k, x in curves.items()} | flags.room.measure(run, params, number)
            ended = 1 + 0 * t.metrics["loss"][-1, r]
            rows.append({k: np.asarray(x, float) * ended for k, x in ends.items()} | curves
                        | {"eval_step": t.metrics["eval_step"] * 1.})
            runs.append(run)
    settings = {k: np.array([getattr(run, k) for run in runs]) for k in ("seed", *OWN)}
    arrays = stacked(rows) | settings
    return arrays | {"reach": reach(arrays)}

# ==== What several studies share =====================================================================
PAPER, NOTES = "Cabannes et al. 2024", "notes on that paper"
ORIGINAL, PROTOTYPE, OURS = "runs of the paper's code", "prototype, one seed", "this project"
BLUE, RED, GREEN, PINK = common.COLOURS[:4]


def pick(arrays, **fields):
    """Mask [R] over the runs whose settings have these values."""
    return np.logical_and.reduce([arrays[k] == value for k, value in fields.items()])


def labels(arrays):
    """Each run's configuration in words [R]: the settings in which it differs from the first."""
    def differs(r):
        return [f"{k}={str(arrays[k][r])[:10]}" for k in OWN if arrays[k][r] != arrays[k][0]]
    return np.array([" ".join(differs(r)) or "as it is" for r in range(len(arrays["seed"]))])


def share_of(hits):
    """(share, low, high) of true ones: two hits and two misses more, 95 % (Agresti & Coull 1998)."""
    n = len(hits) + 4
    p = (np.sum(hits) + 2) / n
    half = 2 * (p * (1 - p) / n) ** .5
    return np.mean(hits), max(0, p - half), min(1, p + half)


def settled(arrays):
    """1 for each run [R], NaN where the accuracy is below .95 and has risen by more than .02 in the
    second half of training: what such a run can learn is not known."""
    step, now = arrays["eval_step"], arrays["accuracy"]
    before = np.where(step <= step[:, -1:] / 2, arrays["eval_accuracy"], 0).max(1)
    return np.where((now > before + .02) & (now < .95), math.nan, 1.)


def curve(ax, arrays, y, mine, label, colour):
    """Median, quartiles and single runs of y [R, M] of the runs in the mask `mine`, over their steps."""
    common.band(ax, arrays["eval_step"][mine][0], y[mine].T, label, colour)


def strip(ax, place, x, colour, label=""):
    """In a row, a dot for each run of x and their median; what was never reached is an arrow."""
    x = x[x == x]
    ax.plot(x, np.full(len(x), place), "o", color=colour, ms=3, alpha=.6)
    if len(x):
        ax.plot(np.median(x), place, "|", color=colour, ms=11, mew=2, label=label)
    if np.isinf(x).any():
        ax.plot(.98, place, ">", color=colour, transform=ax.get_yaxis_transform())


def finish(ax, xlabel, ylabel, title="", names=()):
    """Name the axes (names: of rows 0, 1, ..), show a legend."""
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(names):
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.invert_yaxis()
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=6.5)


WORDS = dict(  # of arrays in figures
    accuracy="accuracy", memorised="accuracy on sequences trained on",
    peak_first="share of states with half of it on EoI", peak_second="share of look-ups, half on x_t",
    weight_second="attention of the look-up on x_t",
    entropy="entropy of the look-up (nats)", reach="steps to 95 % (arrow: never)",
    slower="steps to 95 % of both (arrow: never)", longest="accuracy at L = Lmax",
    ratio="steps to 95 % / from scratch (arrow: never)", kept="share of look-ups / before",
    worse="accuracy of the worse task", parity_peak="parity: share of look-ups",
    worse_flips="token flipped: states of the other task", left_out="accuracy at L = Lmax - 1",
    first_share="layer 1: work of its first head", last_share="last layer: work of its first head",
    A1="A1: layer 1 to the token before", A2="A2: layer 2 to what followed before",
    follows="follows a replaced token", recall_key="tokens whose memory `key` is right",
    recall_position="positions whose memory is right")


def draw_levels(arrays, flags, title, *keys):
    """A panel for each array: over training (eval_..) or at the end, of every configuration."""
    figure, axes = common.panels(len(keys), title, flags, 2 + len(keys) % 2)
    words = labels(arrays)
    names = [*dict.fromkeys(words)]
    for ax, key in zip(axes, keys):
        over = key.startswith("eval_")
        for i, (name, colour) in enumerate(zip(names, common.COLOURS * 9)):
            if over:
                curve(ax, arrays, arrays[key], words == name, name, colour)
            else:
                strip(ax, i, arrays[key][words == name], colour)
        if over:
            finish(ax, "step", WORDS[key[5:]])
            ax.set_xscale("symlog", linthresh=10)
        else:
            finish(ax, WORDS[key], "", "", names)
    return figure


def changed(name, change, part=...):
    """A patch: of what `name` computes, the part x[part] becomes change(x[part])."""
    def patch(seen, x):
        if seen == name:
            x = x.clone()
            x[part] = change(x[part])
        return x
    return patch


def average(x):
    """x [B, slots, d] with its mean over sequences and slots in every place: mean ablation."""
    return x.mean((0, 1)).expand_as(x)


def obeyed(flags, params, rows, token, target):
    """With these tokens in place of those in the slots, the share of answers that are `target`, of next
    states for which that is another than before (an intervention)."""
    logits, _ = forward(flags, params, rows | {"token": token}, flags.slots)
    return (logits.argmax(-1) == target)[rows["next"] & (target != rows["target"])].float().mean()


def follows(flags, params, number):
    """The intervention that makes an iteration head: with every state s_i replaced by another, is each
    next token F(that, x_{i+1})? See `obeyed`; of the first task."""
    rows, S = evaluation_rows(flags, number), flags.slots
    n, g = TASKS[flags.task][1](flags), common.generator(0, "follows")
    s = (rows["s"] + torch.randint(1, n, rows["s"].shape, generator=g)) % n
    answers = torch.where(rows["index"] > 0, DIGIT + s, rows["token"][:, S:])
    target = DIGIT + update(flags, rows["problem"], s, rows["ahead"])
    return obeyed(flags, params, rows, torch.cat([rows["token"][:, :S], answers], 1), target)


def measure_follows(run, params, number):
    return {"follows": follows(run, params, number)}


def one_head(flags):
    if not flags.cot or not flags.mlp or flags.n_layers != 2 or flags.n_heads > 1:
        raise common.Stop(f"--study {flags.study} takes --cot --mlp --n-layers 2 --n-heads 1")


def freezing(free_of, sample=sample):
    """A step and constants with which a parameter moves only where free_of(run, name, p) is above 0."""
    def constants_of(run):
        free = {f"free_{k}": 0 * p + free_of(run, k, p) for k, p in start(run)["params"].items()}
        return constants(run) | free
    def frozen(flags):
        def held(state, number):
            new, logs = step_of(flags, sample)(state, number)
            moved = {k: torch.where(number[f"free_{k}"] > 0, p, state["params"][k])
                     for k, p in new["params"].items()}
            return new | {"params": moved}, logs
        return held
    return dict(step_of=frozen, constants=constants_of)


class Study(common.Study):
    """What they have in common."""
    law = dict(start=start, step_of=step_of, evaluate_of=evaluate_of, constants=constants)
    smoke = dict(steps=4, runs=2, max_length=3, d_model=8, batch=8, evals=2, n_eval=4)
    compute = train

    def measure(run, params, number):
        """More of a run, for `arrays`."""
        return {}

# ==== Studies ========================================================================================
class Base(Study):
    """Is a polynomial learned step by step, and by an iteration head?

    arrays: as of `train`; by L - 1 and index of the answer [R, Lmax, Lmax + 1]: right, the share of
    right answers, and looks, the mean attention of the last layer's best head to the next input (after
    s_L: EoI); maps [R, layers, H, Lmax + 1, 2 Lmax + 2], mean attention of answers at L = Lmax."""
    defaults = dict(runs=8)

    def measure(run, params, number):
        rows, logits, maps = answered(run, params, number)
        size = run.max_length + 1
        label = torch.where(rows["given"], (rows["length"] - 1) * size + rows["index"], -1)
        looks = attention_to(rows, maps[-1], rows["index"] + 1).amax(0)
        right, looks = (mean_by(label, run.max_length * size, x.float()).unflatten(0, (-1, size))
                        for x in (logits.argmax(-1) == rows["target"], looks))
        slot = torch.arange(2 * size)
        longest = [m[-(run.n_eval // 2):, :, -run.slots:].mean(0)[:, :size, slot + 2 * (slot >= size)]
                   for m in maps]
        return {"right": right, "looks": looks, "maps": torch.stack(longest)}

    def claims(arrays, say):
        say("learned", "all states of 95 % of the sequences come out right",
            f"{PROTOTYPE}: 1.00 at step 1050", arrays["accuracy"], ">", .95)
        say("second-finds-x", "a head of the last layer has more than half of its attention on x_t, "
            "from nine answers in ten", f"{PAPER}; {PROTOTYPE}: .98", arrays["peak_second"], ">", .9)
        say("first-finds-EoI", "a head of the first layer has more than half of its attention on EoI, "
            "from nine states in ten", PAPER, arrays["peak_first"], ">", .9)
        last = np.diagonal(arrays["looks"], 1, 1, 2).mean(1)
        say("end-by-the-same-rule", "s_L looks one further than x_L, at EoI, with more than half of its "
            "attention: the rule of the look-up goes on",
            f'{NOTES}: "a different circuit hidden for a special position"', last, ">", .5)
        say("holes", "most runs leave no answer behind: each of every L is right in 95 % of the "
            "sequences (share of such runs)", f'{NOTES}: "a different circuit hidden for a special '
            'position"; the sentence is ours', share_of(np.nanmin(arrays["right"], (1, 2)) >= .95),
            ">", .5)

    def draw_base(arrays, flags):
        text = f"Is {flags.task} learned step by step, by an iteration head?"
        figure = draw_levels(arrays, flags, text, "eval_accuracy", "eval_peak_first", "eval_peak_second")
        common.shelf(figure.axes[0], 1 / flags.max_length, "L = 1 alone: 1 / Lmax", side="left")
        return figure

    def draw_right(arrays, flags):
        figure, (ax,) = common.panels(1, "Which answers are right? (worst run of each place)", flags)
        words = "answer after EoI (0), s_1, .. (after s_L: EoS)"
        common.image(ax, arrays["right"].min(0), "share of sequences", figure, words, "L - 1", (0, 1))
        return figure

    def draw_maps(arrays, flags):
        maps, n = arrays["maps"][0], flags.max_length
        names = ["P", *(f"x{t + 1}" for t in range(n)), "EoI", *(f"s{t + 1}" for t in range(n))]
        title = f"Attention of the answers at L = {n}, first seed (red: where an iteration head looks)"
        figure, axes = common.panels(maps.shape[0] * maps.shape[1], title, flags, size=(6, 4))
        t = np.arange(n)
        for ax, (l, h) in zip(axes, np.ndindex(maps.shape[:2])):
            common.image(ax, maps[l, h], f"layer {l + 1}, head {h + 1}", figure, "key", "query", (0, 1))
            ax.scatter(t + 1 if l else np.full(n, n + 1), t if l else t + 1, 60, "none", edgecolors=RED)
            ax.set_xticks(range(len(names)), names)
            ax.set_yticks(range(n + 1), names[n + 1:])
        return figure


class Circuit(Study):
    """Does the circuit do what it looks like? Attention, MLPs and states replaced in trained models.

    arrays: as of `train`; follows [R], see `follows`; tries [K] and tried [R, K], the accuracy at L > 1
    after each intervention; moved [R], see `moved`."""
    defaults = dict(steps=2000)
    check = one_head
    tries = {"untouched": True, "look-up all on x_t": True, "look-up one late": False,
             "no look-up": False, "first attention all on EoI": True, "no first attention": False,
             "no first MLP at answers": False, "no first MLP at inputs": True,
             "no last MLP": False}  # whether the answers should be kept

    def points(flags):
        return [dict(task=task) for task in TASKS]

    def compute(flags, folder):
        return train(flags, folder) | {"tries": [*Circuit.tries]}

    def measure(run, params, number):
        def accuracy(patch):
            rows, logits, _ = answered(run, params, number, patch=patch)
            whole, lengths = right_sequences(rows, logits)
            return whole[lengths > 1].mean()
        rows = evaluation_rows(run, number)
        return {"follows": follows(run, params, number), "moved": Circuit.moved(run, params, number),
                "tried": [accuracy(patch) for patch in Circuit.patches(run, rows)]}

    def patches(run, rows):
        """What is done, in the order of `tries`; without a part: its mean in its place."""
        S, ((eoi, states), (inputs, asks)) = run.slots, ideal(rows)
        answers, prompts = (slice(None), slice(-S, None)), (slice(None), slice(S))
        def look(layer, where, key):
            row = cell(rows, key)[:, None].float()
            return changed(f"attention{layer}", lambda a: torch.where(where[:, None, :, None], row, a),
                           (..., slice(-S, None), slice(None)))
        return (unchanged, look(1, asks, inputs), look(1, asks, inputs + 1),
                changed("heads1", average, answers), look(0, states, eoi),
                changed("heads0", average, answers), changed("mlp0", average, answers),
                changed("mlp0", average, prompts), changed("mlp1", average, answers))

    def moved(run, params, number):
        """Position subtraction: EoI alone is given the position after its own, as if L were L + 1. Share
        of the states, also states there, that then look one before x_t."""
        rows = evaluation_rows(run, number)
        eoi = torch.cat([0 * rows["index"], (rows["index"] == 0).long()], 1)
        further = rows | {"position": rows["position"] + eoi}
        looked = forward(run, params, further, run.slots)[1][-1][:, 0].argmax(-1)
        use = rows["next"] & (rows["index"] > 1) & (rows["length"] < run.max_length)
        return (rows["position"].gather(1, looked) == rows["index"])[use].float().mean()

    def claims(arrays, say):
        mine = pick(arrays, task="polynomial")
        for task in "polynomial", "parity":
            say(f"iterates-{task}", f"{task}: replaced states go on by F (an intervention; share)",
                f"{PAPER}: the circuit iterates F", arrays["follows"][pick(arrays, task=task)], ">", .95)
        learned = np.where(arrays["tried"][mine, :1] >= .95, arrays["tried"][mine], math.nan)
        for (what, kept), tried in zip(Circuit.tries.items(), learned.T):
            say(what.replace(" ", "-"), f"polynomial: {what}: the answers are "
                f"{'kept' if kept else 'destroyed'} (an intervention; accuracy at L > 1)",
                f"{PAPER}; {NOTES}: subtraction by the first MLP, F by the second", tried, "<>"[kept],
                .95 if kept else .5)
        say("target-moves", "polynomial: with EoI one position further, states look one before x_t (an "
            "intervention; share)", f"{NOTES}: position subtraction", arrays["moved"][mine], ">", .95)

    def draw_circuit(arrays, flags):
        figure, (ax,) = common.panels(1, "Interventions on trained models", flags, size=(9, 4.6))
        names = [*arrays["tries"], "states replaced: F follows", "EoI one further: looks one before"]
        y = np.column_stack([arrays["tried"], arrays["follows"], arrays["moved"]])
        for k, (task, colour) in enumerate(zip(dict.fromkeys(arrays["task"]), (BLUE, RED, GREEN))):
            for i in range(len(names)):
                strip(ax, i + .2 * k - .2, y[pick(arrays, task=task), i], colour, "" if i else task)
        finish(ax, "all states right at L > 1; the last two: share of cases", "", "", names)
        return figure


class Update(Study):
    """How does the last MLP make s xor x, the state update of parity?

    arrays: as of `train`; probe [R, 2], share of s xor x told by the nearer of the answers' means in the
    stream before the MLP, and in its hidden units; flipped [R, 2], share of answers that flip when these
    move by the difference of the means, and as far along that of x alone; plane [R, n, 2], hidden units
    on their principal components, and kind [R, n], 2 s + x of each."""
    defaults = dict(task="parity", steps=2000)

    def check(flags):
        one_head(flags)
        if flags.task != "parity":
            raise common.Stop("--study update takes --task parity")

    def measure(run, params, number):
        kept, probe, flipped = {}, [], []
        rows = answered(run, params, number, patch=kept.setdefault)[0]
        at, s, x = rows["next"], rows["s"], rows["ahead"]
        sign = 1 - 2. * ((s + x) % 2)
        even = (rows["length"] + rows["index"])[at] % 2 == 0
        for name in "mid1", "hidden1":  # means of the answers at some places (L, t), read at the others
            units = kept[name][at]
            zero, one = (units[even & (sign[at] == k)].mean(0) for k in (1, -1))
            nearer = (units - (zero + one) / 2) @ (zero - one)
            probe.append((nearer * sign[at] > 0)[~even].float().mean())
        hidden = kept["hidden1"][at]
        step = hidden[sign[at] < 0].mean(0) - hidden[sign[at] > 0].mean(0)
        other = hidden[x[at] == 1].mean(0) - hidden[x[at] == 0].mean(0)
        for direction in step, other * step.norm() / other.norm():
            patch = changed("hidden1", lambda h: h + sign[..., None] * direction)
            said = answered(run, params, number, patch=patch)[1].argmax(-1)
            flipped.append((said == 2 * DIGIT + 1 - rows["target"])[at].float().mean())
        centred = hidden - hidden.mean(0)
        plane = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
        return {"probe": torch.stack(probe), "flipped": torch.stack(flipped), "plane": plane[::5],
                "kind": (2 * s + x)[at][::5]}

    def claims(arrays, say):
        (before, hidden), (along, by_x) = arrays["probe"].T, arrays["flipped"].T
        source = f'{NOTES}: "how the state updates is performed by the second MLP"; ours'
        say("xor-not-before", "the nearer mean (of other places) tells s xor x before the second MLP in "
            "less than .75", source, before, "<", .75)
        say("xor-in-hidden", "and from its hidden units in more than .95", source, hidden, ">", .95)
        say("xor-flips", "hidden units moved by the difference of the means flip the answer (an "
            "intervention; share)", source, along, ">", .95)
        say("x-alone-does-not", "as long a step along the difference by x does not", OURS, by_x, "<", .5)

    def draw_update(arrays, flags):
        figure, (ax,) = common.panels(1, "How does the last MLP make s xor x?", flags)
        for c, (s, x) in enumerate(np.ndindex(2, 2)):
            mine = arrays["plane"][0][arrays["kind"][0] == c]
            ax.plot(*mine.T, "os"[s], color=(BLUE, RED)[(s + x) % 2], ms=3 + 2 * x, alpha=.5,
                    label=f"s={s}, x={x}: {(s + x) % 2}")
        finish(ax, "first principal component", "second", "hidden units at answers, first seed")
        return figure


class Baselines(Study):
    """What do the chain of thought and the second layer buy?

    arrays: as of `train`; longest [R], the accuracy at L = Lmax."""
    defaults = dict(steps=2000)
    ways = {"chain": (True, 2), "no-chain": (False, 2), "one-layer": (True, 1)}

    def points(flags):
        return [dict(task=task, cot=cot, n_layers=n) for cot, n in Baselines.ways.values()
                for task in TASKS]

    def compute(flags, folder):
        arrays = train(flags, folder)
        return arrays | {"longest": arrays["by_length"][:, -1]}

    def claims(arrays, say):
        for way, (cot, n) in Baselines.ways.items():
            for task in TASKS:
                y = (arrays["longest"] * settled(arrays))[pick(arrays, task=task, cot=cot, n_layers=n)]
                id, words = f"{way}-{task}", f"{way}, {task}: accuracy at L = 8 (no vote while it rises)"
                if n == 1:
                    say(id, words, f"{ORIGINAL}: .39, one layer does not learn the chain", y, "<", .9)
                elif task == "polynomial" and not cot:
                    say(id, words, f"{ORIGINAL}: a guess, which is right in 1/11", y, "<", .15)
                else:
                    say(id, words, f"{PAPER}: the chain is learned; without it, ours", y, ">", .95)

    def draw_baselines(arrays, flags):
        return draw_levels(arrays, flags, "What do the chain of thought and the second layer buy?",
                           "eval_accuracy", "longest")


class Transfer(Study):
    """What of the circuit is reused when another task is learned?

    arrays: as of `train`, of runs that start from a model trained on `source` for five times as many
    steps; follows [R]; ratio [R], their steps to .95 over those from scratch; gain [R], by how much they
    follow more than from scratch; kept [R], their share of peaked look-ups over that of the source."""
    defaults = dict(steps=500)
    smoke = Study.smoke | dict(runs=1)
    pairs = (("polynomial", "parity"), ("copy", "parity"), ("parity", "copy"), ("parity", "polynomial"))
    parts = "all", "last-block", "second-mlp"
    measure = measure_follows

    def check(flags):
        if {*flags.given} & {"task", "source", "learns", "sweep"}:
            raise common.Stop("--study transfer sets --task, --source, --learns itself: no --sweep")

    def points(flags):
        return [dict(max_length=n, source=source, task=task, learns=part) for n in (4, 8)[flags.smoke:]
                for source, task in Transfer.pairs for part in Transfer.parts]

    def learning(run, name, p):
        """Whether a parameter learns; last-block: the last layer, the last norm and the unembedding."""
        if run.learns == "all" or run.learns == "last-block" and name in ("g", "U"):
            return 1.
        mine = ("W_in", "W_out", "g_mlp") if run.learns == "second-mlp" else ("W", "g")
        return float(name.startswith(mine) and name.endswith(str(run.n_layers - 1)))

    def scratch(run):
        """The runs that learn the source, and the task, from scratch."""
        return [replace(run, task=task, source="", learns="all", steps=5 * run.steps)
                for task in (run.source, run.task)]

    def compute(flags, folder):
        groups = common.groups_of_runs(flags)
        before = [[*{str(run): run for child in runs for run in Transfer.scratch(child)}.values()]
                  for runs in groups]
        trained = common.train(before, folder / "scratch", **Transfer.law)
        old, names = collected(flags, trained, constants), [str(run) for t in trained for run in t.runs]
        if common.NOW.asked:
            return old | dict.fromkeys(("ratio", "kept", "gain"), math.nan * old["reach"])
        params = [common.run_of(t.params, r) for t in trained for r in range(len(t.runs))]
        def places(run):
            return [names.index(str(parent)) for parent in Transfer.scratch(run)]
        def begin(run):
            mine = params[places(run)[0]]
            return {"params": mine, **common.adam_init(mine)}
        new = train(flags, folder, start=begin, **freezing(Transfer.learning))
        source, task = np.array([places(run) for runs in groups for run in runs]).T
        return new | {"ratio": new["reach"] / old["reach"][task],
                      "gain": new["follows"] - old["follows"][task],
                      "kept": new["peak_second"] / old["peak_second"][source]}

    def claims(arrays, say):
        def at(key, source="polynomial", task="parity", n=8, part="all"):
            return arrays[key][pick(arrays, source=source, task=task, max_length=n, learns=part)]
        for n in 4, 8:
            for source, task in Transfer.pairs:
                say(f"{source}-to-{task}-{n}", f"Lmax {n}: after {source}, {task} reaches .95 within "
                    "500 steps, and in less than half of those from scratch (ratio)",
                    f"{ORIGINAL}: 20 epochs against 990", at("ratio", source, task, n), "<", .5)
            kept = np.where(at("accuracy", n=n) >= .95, at("kept", n=n), math.nan)
            say(f"head-kept-{n}", f"Lmax {n}: the polynomial's look-up survives learning parity with "
                "all weights (its share of peaks, ratio)",
                f'{NOTES}: "do we loose the iteration head structure?"', kept, ">", .9)
        for part, value in ("last-block", ".97 at step 75"), ("second-mlp", ".58 at 300"):
            say(part, f"polynomial to parity by the {part} alone", f"{PROTOTYPE}: {value}",
                at("accuracy", part=part), ">", .95)
        say("reused", "parity learned after the polynomial (all weights) iterates: replaced states go "
            "on by F more often than in parity from scratch (difference of shares)",
            f"{PAPER}: the circuit is reused", at("gain"), ">", 0)

    def draw_transfer(arrays, flags):
        return draw_levels(arrays, flags, "What of the circuit is reused when another task is learned?",
                           "ratio", "kept")


class Mix(Study):
    """Two tasks at once, told apart by the first token: do they share the circuit, in which mix?

    arrays: as of `train`; flips [R, 2]: the problem token alone of sequences of the first (second) task
    replaced, share of next states that are then the other's, see `obeyed`; worse, worse_flips [R], of
    the worse task; slower [R], the step at which both reach .95; parity_peak [R], its `peak_second`."""
    defaults = dict(steps=2000)

    def points(flags):
        mixes = [(share, 1.) for share in (0., .1, .5, .9)] + [(.9, 1 / 9)]
        return [dict(task="parity", other=other, share=share, other_weight=weight)
                for other in ("copy", "polynomial") for share, weight in mixes]

    def measure(run, params, number):
        flips = []
        for i in range(len(number["problem"])):
            rows = evaluation_rows(run, number, i)
            token, there = rows["token"].clone(), number["problem"][-1 - i]
            token[:, :run.slots][rows["index"] == 0] = 2 + there
            other = DIGIT + update(run, torch.full_like(rows["s"], there), rows["s"], rows["ahead"])
            flips.append(obeyed(run, params, rows, token, other))
        return {"flips": torch.stack(flips), "worse_flips": min(flips)}

    def compute(flags, folder):
        arrays = train(flags, folder)
        steps = [reach(arrays, y) for y in np.moveaxis(arrays["eval_task_accuracy"], -1, 0)]
        return arrays | {"slower": np.max(steps, 0), "worse": arrays["task_accuracy"].min(1),
                         "parity_peak": arrays["task_peak"][:, 0]}

    def claims(arrays, say):
        for other in "copy", "polynomial":
            def at(key, share=.5, weight=1.):
                return arrays[key][pick(arrays, other=other, share=share, other_weight=weight)]
            say(f"both-{other}", f"one model learns parity and {other}, told apart by the first token "
                "(the worse accuracy)", NOTES, at("worse"), ">", .95)
            least = np.minimum(at("slower", .1), at("slower", .9))
            say(f"even-is-best-{other}", f"equal shares learn parity and {other} sooner than 1:9 and "
                "9:1 (ratio of steps)", f'{NOTES}: "optimal data mix"; the sentence is ours',
                at("slower") / least, "<", 1)
            say(f"weights-help-{other}", f"with a tenth of parity, it and {other} are learned sooner if "
                "parity is weighted nine times (ratio of steps)",
                f'{NOTES}: "reweight samples in the training loss"',
                at("slower", .9, 1 / 9) / at("slower", .9), "<", 1)
            say(f"mix-forces-{other}", f"with {other} as often parity has the look-up more than alone "
                "(difference of its share of peaks)",
                f'{NOTES}: "maybe we will force more to have the circuit we want"',
                at("parity_peak") - at("parity_peak", 0.), ">", .1)
            say(f"token-decides-{other}", f"parity and {other}: with the problem token alone flipped, "
                "the next states are the other task's (an intervention; the worse way)", NOTES,
                at("worse_flips"), ">", .95)

    def draw_mix(arrays, flags):
        return draw_levels(arrays, flags, "Two tasks at once, told apart by the first token", "worse",
                           "slower", "parity_peak", "worse_flips")


def power_law(y, **sizes):
    """{size: (exponent, low, high)} of y [n] ~ C size_1^a size_2^b .., with 95 % intervals from the
    residuals of a fit of log y by least squares; runs without a finite y are left out."""
    known = np.isfinite(y)
    X = np.log(np.stack([np.full(len(y), math.e), *sizes.values()], 1))[known]
    inverse, log_y = np.linalg.pinv(X), np.log(y[known])
    fit = inverse @ log_y
    variance = ((log_y - X @ fit) ** 2).sum() / max(1, len(X) - len(fit)) * (inverse ** 2).sum(1)
    return {name: (a, a - 2 * e, a + 2 * e) for name, a, e in zip(sizes, fit[1:], variance[1:] ** .5)}


class Scaling(Study):
    """How do the steps to learn, and how clean the look-up is, scale with length, width and batch?

    arrays: as of `train`."""
    defaults = dict(steps=2000)

    def points(flags):
        points = [dict(d_model=d, max_length=n, batch=64) for d in (8, 16, 32) for n in (4, 8, 12)]
        points += [dict(d_model=d, max_length=8, batch=b) for d, b in ((64, 64), (32, 32), (32, 128))]
        return points[:2] if flags.smoke else points

    def claims(arrays, say):
        n, d, right = arrays["max_length"], arrays["d_model"], arrays["accuracy"] >= .95
        unclean = 1 - arrays["weight_second"]
        source = f'{NOTES}: "empirical scaling law"; "ablation with respect to the batch size"; ours'
        for key, y, words in (("reach", arrays["reach"], "steps to .95"),
                              ("unclean", unclean, "attention of the look-up that is not on x_t")):
            law = power_law(np.where(right, y, math.nan), length=n, width=d, batch=arrays["batch"])
            for (size, exponent), sign in zip(law.items(), "><<"):
                say(f"{key}-{size}", f"{words}: {'grow' if sign == '>' else 'fall'} with {size} "
                    "(exponent, over runs above .95)", source, exponent, sign, 0)
        fits, learned = n * (n + 1) / 2 <= 4 * d, right * settled(arrays)
        for id, words, mine, limit in (("fits", "is learned where", fits, (">", 0)),
                                       ("beyond", "is not learned unless", ~fits, ("<", 1))):
            say(f"capacity-{id}", f"a polynomial {words} the first MLP has a hidden unit for each of "
                "the Lmax (Lmax + 1) / 2 subtractions of positions (no vote while the accuracy rises)",
                "notes on two-layer transformers: the limit of capacity; ours", learned[mine], *limit)

    def draw_scaling(arrays, flags):
        return draw_levels(arrays, flags, "Width, length, batch: what is learned, how soon, how "
                           "cleanly?", "accuracy", "reach", "weight_second")


class Curriculum(Study):
    """Does the order or the mix of lengths change what is learned?

    arrays: as of `train`."""
    defaults = dict(steps=2000)
    ways = {"increasing": (True, 0.), "mostly-short": (False, -2.), "mostly-long": (False, 2.)}

    def points(flags):
        ways = (False, 0.), *Curriculum.ways.values()
        return [dict(task=task, increasing=increasing, length_power=power)
                for task in ("polynomial", "parity") for increasing, power in ways]

    def sample(flags, number, t):
        rows, weight = sample(flags, number, t)
        length = rows["length"] / flags.max_length
        bound = torch.where(number["increasing"], 2 * t / flags.steps + 1 / flags.max_length, 1)
        return rows, weight * length ** number["length_power"] * (length <= bound)

    law = Study.law | dict(step_of=lambda flags: step_of(flags, Curriculum.sample))

    def claims(arrays, say):
        steps = arrays["reach"]
        peak = np.where(arrays["accuracy"] >= .95, arrays["peak_second"], math.nan)
        for task in "polynomial", "parity":
            alike = pick(arrays, task=task, increasing=False, length_power=0.)
            for way, (increasing, power) in Curriculum.ways.items():
                mine = pick(arrays, task=task, increasing=increasing, length_power=power)
                if not increasing:  # those see the longest late, by design
                    say(f"{way}-slower-{task}", f"{task}: {way} lengths reach .95 later than lengths "
                        "mixed alike (ratio of steps)", f"{NOTES}: curriculum, mix of length; ours",
                        steps[mine] / steps[alike], ">", 1)
                say(f"{way}-same-head-{task}", f"{task}: {way} lengths end with the same look-up, where "
                    "both learn (difference of its share of peaks)",
                    f'{NOTES}: "check if curriculum change what is learned"',
                    peak[mine] - peak[alike], "in", (-.1, .1))

    def draw_curriculum(arrays, flags):
        return draw_levels(arrays, flags, "Does the order or the mix of lengths change what is learned?",
                           "eval_accuracy", "eval_peak_second", "reach", "peak_second")


class Positions(Study):
    """Can positions be frozen or narrow, and is their subtraction a rule or a memory?

    arrays: as of `train`; follows [R]; left_out [R], the accuracy at L = Lmax - 1."""
    defaults = dict(steps=2000)
    measure = measure_follows

    def points(flags):
        n = flags.max_length - 1
        kinds = ((0, False, 0), (2, False, 0), (8, False, 0), (0, True, 0), (0, False, n), (8, False, n))
        return [dict(task=task, pos_dim=d, freeze_pos=frozen, omit_length=n)
                for d, frozen, n in kinds for task in ("polynomial", "parity")]

    def coordinates(run, p):
        """1 for the coordinates that positions have, of each row of P."""
        return (torch.arange(p.shape[1]) < (run.pos_dim or p.shape[1])).float()

    def learning(run, name, p):
        return Positions.coordinates(run, p) * (not run.freeze_pos) if name == "P" else 1.

    def compute(flags, folder):
        def begin(run):
            state = start(run)
            state["params"]["P"] *= Positions.coordinates(run, state["params"]["P"])
            return state
        def omitting(flags, number, t):
            rows, weight = sample(flags, number, t)
            return rows, weight * (rows["length"] != number["omit_length"])
        arrays = train(flags, folder, start=begin, **freezing(Positions.learning, omitting))
        return arrays | {"left_out": arrays["by_length"][:, -2]}

    def claims(arrays, say):
        def at(key, task, pos_dim=0, freeze_pos=False, omit_length=0):
            return arrays[key][pick(arrays, task=task, pos_dim=pos_dim, freeze_pos=freeze_pos,
                                    omit_length=omit_length)]
        say("parity-head", "parity alone builds the iteration head too: replaced states go on by F "
            "(share)", f'{NOTES}: "are the iteration heads learned if we only solve the parity problem"',
            at("follows", "parity"), ">", .95)
        for task in "polynomial", "parity":
            say(f"frozen-{task}", f"{task} is learned with frozen positions",
                f'{NOTES}: "can we freeze them if the embedding dimension is big enough"',
                at("accuracy", task, freeze_pos=True), ">", .95)
            say(f"small-cleaner-{task}", f"{task}: positions of 8 coordinates make a cleaner look-up "
                "than of all (difference of its share of peaks)",
                f'{NOTES}: "maybe we will have a cleaner structure"',
                at("peak_second", task, 8) - at("peak_second", task), ">", .02)
            for d, words in (0, "all coordinates"), (8, "8 coordinates"):
                say(f"rule-{task}-{d or 'all'}", f"{task}, {words}: a length left out of training is "
                    "right, so subtraction is a rule",
                    f'{NOTES}: "to find a rule for substraction, rather than memorize"',
                    at("left_out", task, d, omit_length=7), ">", .95)

    def draw_positions(arrays, flags):
        title = "Positions: how many coordinates, learned or not; rule or memory?"
        return draw_levels(arrays, flags, title, "accuracy", "peak_second", "left_out")


class Longer(Study):
    """Do maps get cleaner once the task is learned, and cleaner by SGD than by Adam?

    arrays: as of `train`."""
    defaults = dict(steps=3000)

    def sgd(params, grads, state, lr, _):  # one step with heavy-ball momentum .9
        m = {k: .9 * state["m"][k] + g for k, g in grads.items()}
        return {k: p - lr * m[k] for k, p in params.items()}, {"m": m, "v": m, "t": state["t"] + 1}

    updates = {"adam": common.adamw, "sgd": sgd}

    def points(flags):
        return [dict(task=task, method=name, lr=lr) for name, lr in (("adam", flags.lr), ("sgd", .03))
                for task in ("polynomial", "parity")]

    law = Study.law | dict(step_of=lambda flags: step_of(flags, update=Longer.updates[flags.method]))

    def claims(arrays, say):
        known = arrays["eval_accuracy"] >= .99
        since = arrays["eval_weight_second"][np.arange(len(known)), known.argmax(1)]
        grown = np.where(known.any(1), arrays["weight_second"] - since, math.nan)
        for task in "polynomial", "parity":
            adam, sgd = (pick(arrays, task=task, method=name) for name in ("adam", "sgd"))
            say(f"cleaner-{task}", f"{task}: after .99 is reached attention on x_t grows by more than "
                ".02", f'{NOTES}: "does continuing training make the attention maps cleaner"',
                grown[adam], ">", .02)
            say(f"sgd-{task}", f"{task} is learned by SGD with momentum (no vote while it rises)", OURS,
                (arrays["accuracy"] * settled(arrays))[sgd], ">", .95)
            entropy = np.where(arrays["accuracy"] >= .95, arrays["entropy"], math.nan)
            say(f"sgd-sparser-{task}", f"{task}: SGD ends with sparser maps than Adam, where both learn "
                "(difference of entropies)", f'{NOTES}: "sparsity induced bias with SGD"',
                entropy[sgd] - entropy[adam], "<", 0)

    def draw_longer(arrays, flags):
        return draw_levels(arrays, flags, "Do maps get cleaner once the task is learned?",
                           "eval_accuracy", "eval_weight_second", "eval_entropy")


class Heads(Study):
    """With more heads than needed, who does the work?

    arrays: as of `train`; carried [R, layers, H]: each head's share of what its layer's heads cost in
    loss, outputs at the answers averaged one by one; first_share, last_share [R], the largest."""
    defaults = dict(steps=2000)

    def points(flags):
        return [dict(n_heads=h, task=task) for h in (1, 2, 4) for task in ("polynomial", "parity")]

    def measure(run, params, number):
        size, lost = run.d_model // run.n_heads, torch.zeros(run.n_layers, run.n_heads)
        def loss(patch):
            return measured(run, *answered(run, params, number, patch=patch))["loss"]
        whole = loss(unchanged)
        for l, h in np.ndindex(*lost.shape):
            part = slice(None), slice(-run.slots, None), slice(h * size, (h + 1) * size)
            lost[l, h] = loss(changed(f"heads{l}", average, part)) - whole
        carried = lost.clamp(min=0) / lost.clamp(min=0).sum(1, keepdim=True)
        return {"carried": carried, "first_share": carried[0].max(), "last_share": carried[-1].max()}

    def claims(arrays, say):
        for task in "polynomial", "parity":
            one = pick(arrays, task=task, n_heads=1)
            for h in 2, 4:
                mine = pick(arrays, task=task, n_heads=h)
                for key in "first_share", "last_share":
                    say(f"{key[:-6]}-{task}-{h}", f"{task}, {h} heads: one head of the {key[:-6]} layer "
                        "carries .9 of what its heads cost one by one, in loss",
                        f"{NOTES}: share of the work, circuit known", arrays[key][mine], ">", .9)
                say(f"heads-cleaner-{task}-{h}", f"{task}: the best of {h} heads looks up more cleanly "
                    "than a single one (difference of attention on x_t)", f"{NOTES}: capacity; ours",
                    arrays["weight_second"][mine] - arrays["weight_second"][one], ">", .02)
            say(f"heads-faster-{task}", f"{task}: four heads learn sooner than one (ratio of steps)",
                OURS, arrays["reach"][mine] / arrays["reach"][one], "<", 1)

    def draw_heads(arrays, flags):
        return draw_levels(arrays, flags, "More heads than needed: who does the work?", "first_share",
                           "last_share", "weight_second", "reach")


class Grokking(Study):
    """On a finite training set, does test accuracy rise long after training accuracy?

    arrays: as of `train`; eval_memorised [R, M], the accuracy on sequences of the training set; of the
    lengths up to 3 there are too few for others."""
    defaults = dict(steps=4000, weight_decay=.1)
    sizes = 512, 1024, 2048, 4096

    def points(flags):
        return [dict(train_set=n) for n in Grokking.sizes]

    def sample(flags, number, t):
        key, rows = common.key(number["seed"], 1, t), number["train_set"].clamp(min=2) // 2
        return rows_at(flags, number, common.integers(key, rows, flags.batch // 2))

    def known_of(flags):
        def evaluate(params, number):
            count = number["train_set"].clamp(min=2) // 2
            first = torch.arange(256, device=count.device) % count
            rows, weight = rows_at(flags, number, first)
            learned = weight[:, ::flags.slots - 1]  # by sequence: 0 for those kept for evaluation
            whole, _ = right_sequences(rows, forward(flags, params, rows, flags.slots)[0])
            known = (whole * learned).sum() / learned.sum()
            return evaluate_of(flags)(params, number) | {"memorised": known}
        return evaluate

    law = Study.law | dict(step_of=lambda flags: step_of(flags, Grokking.sample), evaluate_of=known_of)

    def claims(arrays, say):
        ratio = arrays["reach"] / reach(arrays, arrays["eval_memorised"])
        ratio[np.isinf(ratio)] = math.nan
        for n in Grokking.sizes:
            mine = pick(arrays, train_set=n)
            say(f"late-{n}", f"{n} sequences: .95 of new sequences are right more than twice as late as "
                ".95 of those trained on (ratio)", f'{NOTES}: "we can make a link with grokking"',
                ratio[mine], ">", 2)
            say(f"generalises-{n}", f"{n} sequences are enough: .95 of new ones are right (no vote "
                "while it rises)", OURS, (arrays["accuracy"] * settled(arrays))[mine], ">", .95)

    def draw_grokking(arrays, flags):
        return draw_levels(arrays, flags, "Does test accuracy rise long after training accuracy?",
                           "eval_memorised", "eval_accuracy")


# The induction law, for the next two studies
FRENCH, BIRTH = "notes on two-layer transformers", "Bietti et al. 2023"


def induction_tokens(flags, alpha, key, B):
    """[B, T + 1]: after a token x comes perm(x), a permutation of the sequence's own, or with
    probability alpha a uniform token. From the last uniform one on perm is applied again and again: its
    powers of two are tables."""
    V, T = flags.n_tokens, flags.seq_length
    h = common.uniform(key, B, V + 2 * (T + 1))
    power, uniform, wild = h.split([V, T + 1, T + 1], 1)
    power, token, wild = power.argsort(stable=True), (uniform * V).long(), wild < alpha
    place = torch.arange(T + 1, device=h.device)
    began = torch.where(wild | (place == 0), place, 0).cummax(1).values
    token, since = token.gather(1, began), place - began
    for bit in range(T.bit_length()):
        token = torch.where(since >> bit & 1 == 1, power.gather(1, token), token)
        power = power.gather(1, power)
    return token


@functools.cache
def every_permutation(V):
    """[V!, V^2]: whether pi(x) = y."""
    return one_hot(torch.tensor([*permutations(range(V))]), V).double().flatten(1)


def posterior(tokens, alpha, V):
    """Exact probabilities [T, V] of the next token given tokens [T], by enumeration: a permutation has
    the likelihood prod_x r^(times its value was seen to follow x), r = 1 + V (1 - alpha) / alpha; and
    those of who counts only what followed this token, as if two tokens could have one successor."""
    r = 1 + V * (1 - alpha) / max(alpha, 1e-12)
    pair = one_hot(tokens[:-1] * V + tokens[1:], V * V).double()
    seen = torch.cat([torch.zeros(1, V * V).double(), pair.cumsum(0)])  # [T, V^2]
    every = every_permutation(V)
    weight = (math.log(r) * (seen @ every.T)).softmax(-1)
    known, counts = (x.view(-1, V, V)[torch.arange(len(tokens)), tokens] for x in (weight @ every, seen))
    return [alpha / V + (1 - alpha) * p for p in (known, (math.log(r) * counts).softmax(-1))]


def induction_start(run):
    params = init(run, common.generator(run.seed, "init"), run.n_tokens, run.seq_length)
    return {"params": params, **common.adam_init(params)}


def induction_constants(run):
    """Sequences for evaluation, drawn from the law: sequences [2^14 / T, T + 1]."""
    return {"sequences": fixed_sequences(run)}


def fixed_sequences(run):
    key = common.key(torch.tensor(0), 2, torch.tensor(0))
    return induction_tokens(run, run.noise, key, 2 ** 14 // run.seq_length)


def induction_logits(flags, params, tokens, patch=unchanged):
    """Logits [B, T, V] and maps of tokens [B, T]: the textbook transformer."""
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    rows = {"token": tokens, "position": place, "segment": 0 * tokens}
    return forward(flags, params, rows, tokens.shape[1], patch)


def induction_step_of(flags):
    """The training step of ONE run on the induction law."""
    def step(state, number):
        key = common.key(number["seed"], 0, state["t"])
        tokens = induction_tokens(flags, number["noise"], key, flags.batch)
        def loss_of(params):
            return nll(induction_logits(flags, params, tokens[:, :-1])[0], tokens[:, 1:]).mean()
        grads, loss = grad_and_value(loss_of)(state["params"])
        params, rest = common.adamw(state["params"], grads, state, number["lr"])
        return {"params": params, **rest}, {"loss": loss}
    return step


def memories(flags, params):
    """Matrices whose rows should have their largest entry at one place, through the norms (W_K^1, W_K^2,
    W_O^2 of Bietti et al. 2023): position [T, T], from a query t to keys up to t, right at t - 1; key
    [V, V], from a token to the first layer's values of tokens as keys of the second, and output [V, V],
    from a token read by the second layer to the logits, both right on the diagonal. Heads are summed."""
    def at(name, x):
        return normed(flags, params, name, x)
    def product(x, *names):
        return functools.reduce(torch.matmul, [params[name] for name in names], x)
    P, E0 = (at("g_attention0", params[name]) for name in "PE")
    E1 = at("g_attention1", params["E"])
    values = at("g_attention1", product(E0, "W_V0", "W_O0"))
    position = product(P, "W_Q0") @ product(P, "W_K0").T
    future = torch.ones_like(position, dtype=torch.bool).triu(1)
    return {"position": position.masked_fill(future, -math.inf),
            "key": product(E1, "W_Q1") @ product(values, "W_K1").T,
            "output": at("g", product(E1, "W_V1", "W_O1")) @ params["U"]}


def seen_before(tokens):
    """[n, T, T]: whether a key follows an earlier copy of the query's token."""
    copy = tokens[:, :, None] == tokens[:, None].roll(1, -1)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return copy & (place <= place[:, None]) & (place > 0)


def induction_scores(flags, params, number, logits, maps):
    """loss; accuracy where the token was seen before; A1, attention of the first layer to the token
    before, and A2, of the second to what followed the token before, each of the best head; and how many
    rows of a memory are right, see `memories`: recall_<memory>."""
    target, copies = number["sequences"][:, 1:], seen_before(number["sequences"][:, :-1])
    seen, right = copies.any(-1), logits.argmax(-1) == target
    A2 = ((maps[1] * copies[:, None]).sum(-1) * seen[:, None]).sum((0, 2)) / seen.sum()
    A1 = maps[0].diagonal(-1, -2, -1).mean((0, 2))
    found = {"loss": nll(logits, target).mean(), "accuracy": (right * seen).sum() / seen.sum(),
             "A1": A1.amax(), "A2": A2.amax()}
    for name, memory in memories(flags, params).items():
        shift = int(name == "position")
        rows = torch.arange(len(memory) - shift, device=memory.device)
        found[f"recall_{name}"] = (memory.argmax(-1)[shift:] == rows).float().mean()
    return found


def induction_evaluate_of(flags):
    """What is evaluated of ONE run: `induction_scores`."""
    def evaluate(params, number):
        seen = induction_logits(flags, params, number["sequences"][:, :-1])
        return induction_scores(flags, params, number, *seen)
    return evaluate


def exactly(flags):
    """Loss (nats) of the Bayes predictor (floor) and of who counts only what followed this token
    (counting), exact given the tokens of evaluation: mean and standard error over sequences."""
    each = (posterior(x, flags.noise, flags.n_tokens) for x in fixed_sequences(flags)[:, :-1])
    found = np.array([[-torch.xlogy(p, q).sum(-1).mean() for q in (p, counted)] for p, counted in each])
    error = found.std(0, ddof=1) / len(found) ** .5
    return dict(zip(("floor", "counting"), zip(found.mean(0), error)))


def induction_measure(run, params, number):
    """follows, the intervention that makes an induction head: where the token in place V (or the last)
    was seen once before, the one that followed it is replaced; share that predict that one."""
    V, t = run.n_tokens, min(run.n_tokens, run.seq_length - 1)
    tokens = number["sequences"][:, :t + 1]
    copies = tokens[:, :t] == tokens[:, t:]
    key, row = copies.long().argmax(1) + 1, torch.arange(len(tokens))
    edited = tokens.clone()
    edited[row, key] = new = (tokens[row, key] + 1 + row % (V - 1)) % V
    usable = (copies.sum(1) == 1) & (key < t) & (new != tokens[:, t])
    said = induction_logits(run, params, edited)[0][:, t].argmax(-1)
    return {"follows": (said == new)[usable].float().mean()}


def draw_edges(ax, maps, change, names, title):
    """The register graph: an edge from each position and layer to what it reads of the layer below, as
    wide as its attention, maps [layers, T, T]; green: it grows, purple: it shrinks, grey: little."""
    ax.clear()
    ax.set_axis_off()
    for l, query, key in np.argwhere(maps > .01):
        size = change[l, query, key] / (np.abs(change).max() + 1e-12)
        colour = GREEN if size > .1 else PINK if size < -.1 else "#aaaaaa"
        ax.plot((key, query), (l, l + 1), color=colour, lw=4 * maps[l, query, key])
    for i, name in enumerate(names):
        ax.text(i, -.1, name, ha="center", va="top")
    ax.set(title=title, ylim=(-.4, len(maps) + .1))


def animation(flags, steps, graphs):
    """The bytes of a GIF of graphs (maps, changes [M, layers, T, T], names, title) over `steps` [M]."""
    title = "Who reads whom? Width: attention; green: grows, purple: shrinks. Step"
    figure, axes = common.panels(len(graphs), title, flags, 1, (9, 2.4))
    def draw(i):
        figure.suptitle(f"{title} {steps[i]:.0f}")
        for ax, (maps, change, names, words) in zip(axes, graphs):
            draw_edges(ax, maps[i], change[i], names, words)
    with TemporaryDirectory() as folder:
        path = Path(folder, "frames.gif")
        FuncAnimation(figure, draw, len(steps)).save(path, "pillow", 3)
        return path.read_bytes()


class Memory(common.Study):
    """What the studies of the induction law have in common."""
    law = dict(start=induction_start, step_of=induction_step_of, evaluate_of=induction_evaluate_of,
               constants=induction_constants)
    defaults = dict(mlp=False, norm="rms", lr=3e-3, batch=32)
    smoke = dict(steps=4, runs=2, n_tokens=4, seq_length=8, d_model=8, batch=8, evals=2)

    def check(flags):
        if flags.n_layers != 2:
            raise common.Stop(f"--study {flags.study} takes --n-layers 2")

    measure = induction_measure
    compute = train


class Induction(Memory):
    """When and by which memories is an induction head learned, and what does the gradient prune?

    arrays: as of `train`, `induction_scores`, `induction_measure`; eval_maps, eval_maps_one [R, M,
    layers, H, T, T], attention, the mean and in the first sequence, example [T]; eval_push, _one, by how
    much a step against the gradient moves attention, to scale; floor, counting [2], see `exactly`."""
    defaults = Memory.defaults | dict(runs=8)

    def pushes_of(flags):
        def evaluate(params, number):
            tokens, target = number["sequences"][:, :-1], number["sequences"][:, 1:]
            def loss_of(moved):
                def patch(name, x):
                    return x + moved[int(name[-1])] if name.startswith("attention") else x
                logits, maps = induction_logits(flags, params, tokens, patch)
                return nll(logits, target).mean(1).sum(), (logits, torch.stack(maps))
            B, T = tokens.shape
            still = torch.zeros(flags.n_layers, B, flags.n_heads, T, T, device=tokens.device)
            grads, (_, (logits, maps)) = grad_and_value(loss_of, has_aux=True)(still)
            push = maps * ((maps * grads).sum(-1, keepdim=True) - grads)
            return induction_scores(flags, params, number, logits, maps) | {
                "maps": maps.mean(1), "maps_one": maps[:, 0], "push": push.mean(1),
                "push_one": push[:, 0]}
        return evaluate

    law = Memory.law | dict(evaluate_of=pushes_of)

    def compute(flags, folder):
        example = fixed_sequences(flags)[0, :-1]
        return train(flags, folder) | exactly(flags) | {"example": example}

    def edges(arrays, key):
        """[R, M, edges] of both layers, from a query to itself and those before it."""
        x = arrays[f"eval_{key}"].mean(3)
        return x[..., np.tri(x.shape[-1], dtype=bool)].reshape(*x.shape[:2], -1)

    def claims(arrays, say):
        for key, values in ("A1", (.84, .92)), ("A2", (.98, .99)):
            for step, value in zip((200, 1400), values):
                at = [np.interp(step, *x) for x in zip(arrays["eval_step"], arrays[f"eval_{key}"])]
                say(f"{key}-{step}", f"{WORDS[key]}: attention at step {step} is {value}, to .1",
                    PROTOTYPE, at, "in", (value - .1, value + .1))
        say("is-induction-head", "where the token that followed earlier is replaced, that one is "
            "predicted (an intervention; share)", f"{FRENCH}: verify that the circuit is learned",
            arrays["follows"], ">", .9)
        say("counts-only", "its loss is within .03 nats of who counts what followed the current token: "
            "it does not exclude the successors of others (difference)", OURS,
            arrays["loss"] - arrays["counting"][0], "in", (-.03, .03))
        output, key, position = (reach(arrays, arrays[f"eval_recall_{name}"], .9)
                                 for name in ("output", "key", "position"))
        for words, ratio in ("output-before-key", output / key), ("key-before-position", key / position):
            say(words, f"of the memories, {words} is filled to .9 (ratio of steps)",
                f"{BIRTH}: their order", ratio, "<", 1)
        push, maps = (Induction.edges(arrays, key) for key in ("push", "maps"))
        pairs = zip(push[:, :-1], np.diff(maps, axis=1))
        say("pushed-edges-grow", "the edges that the mean gradient pushes up grow until the next "
            "evaluation (correlation over edges and evaluations)",
            f"{FRENCH}: green what grows, red what shrinks",
            [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in pairs], ">", .2)
        pushed, fallen = push[:, 0] > 0, maps[:, -1] < maps[:, 0]
        say("pruned", "of the edges pushed up at the start more than half end with less attention than "
            "they began with (share)", f"{FRENCH}: it pushes all circuits that can help, then prunes",
            (pushed & fallen).sum(-1) / pushed.sum(-1), ">", .5)

    def draw_induction(arrays, flags):
        figure, (ax,) = common.panels(1, "How far is the induction head from what is known?", flags)
        curve(ax, arrays, arrays["eval_loss"], arrays["seed"] >= 0, "loss", BLUE)
        for key, who in ("floor", "Bayes"), ("counting", "counts what followed this token"):
            level, error = arrays[key]
            common.shelf(ax, level, f"{who}: {level:.3f} (s.e. {error:.3f})", side="left")
        finish(ax, "step", "nats a token")
        return figure

    def draw_memories(arrays, flags):
        return draw_levels(arrays, flags, "When, and by which memories?", "eval_A1", "eval_A2",
                           "eval_recall_key", "eval_recall_position")

    def draw_graph(arrays, flags):
        one, push, mean = (arrays[f"eval_{key}"][0].mean(2) for key in ("maps_one", "push_one", "maps"))
        grown = np.diff(mean, axis=0, append=mean[-1:])
        return animation(flags, arrays["eval_step"][0], (
            (one, push, arrays["example"], "one sequence (its tokens below): what its gradient pushes"),
            (mean, grown, range(flags.seq_length), "mean: what grows until the next frame")))


class Conditions(Memory):
    """For which data and parameters is the induction circuit learned, and where does it fail?

    arrays: as of `train`, `induction_scores`, `induction_measure`."""
    changes = (dict(), dict(noise=0.), dict(noise=.3), dict(noise=.6), dict(init_scale=.1),
               dict(init_scale=3.), dict(mlp=True), dict(norm="layer"), dict(norm="none"),
               dict(n_tokens=10), dict(d_model=32), dict(d_model=16), dict(d_model=8), dict(d_model=4),
               dict(seq_length=32), dict(seq_length=128))

    def points(flags):
        own = {k: getattr(flags, k) for change in Conditions.changes for k in change}
        return [own | change for change in Conditions.changes[:2 if flags.smoke else None]]

    def claims(arrays, say):
        points = Conditions.points(Flags(**Memory.defaults))
        circuit = np.minimum(np.minimum(arrays["A1"], arrays["A2"]) / .7, arrays["follows"] / .9)
        def at(y, change):
            return y[pick(arrays, **points[Conditions.changes.index(change)])]
        for change in Conditions.changes[1:]:
            name = ",".join(f"{k}={v}" for k, v in change.items())
            say(f"same-circuit:{name}", f"{name}: the same circuit is learned (A1 and A2 above .7, "
                "replaced tokens followed in .9; the least, against its limit)",
                f"{FRENCH}, experiment 3", at(circuit, change), ">", 1)
        say("layernorm", "LayerNorm instead of RMSNorm changes A1 by more than .1",
            f'{FRENCH}: "LayerNorm probably change the picture a little bit"',
            np.abs(at(arrays["A1"], dict(norm="layer")) - at(arrays["A1"], {})), ">", .1)

    def draw_conditions(arrays, flags):
        return draw_levels(arrays, flags, "Where is the induction circuit learned?", "A1", "A2",
                           "follows", "accuracy")


STUDIES = [Base, Circuit, Update, Baselines, Transfer, Mix, Scaling, Curriculum, Positions, Longer,
    Heads, Grokking, Induction, Conditions]

if __name__ == "__main__":
    raise SystemExit(common.main(Flags, STUDIES))
