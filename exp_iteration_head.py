"""Does a two-layer transformer with a chain of thought learn one circuit that iterates s_t = F(s_{t-1}, x_t), and reuse it?

Law: [problem, x_1 .. x_L, EoI, s_1 .. s_L, EoS], s_1 = x_1, L uniform in 1 .. Lmax. copy: s_t = x_t; parity: s_t = s_{t-1} +
x_t mod 2; polynomial: s_t = s_{t-1} x_t + 1 mod p. Loss: cross-entropy (nats) on s_1 .. s_L and the first EoS; all of them are
determined, so its floor is 0. The iteration head: the first layer attends from an answer to EoI and so knows where the answers
begin, the second looks up x_t, its MLP applies F. Model: pre-norm transformer, LayerNorm without bias, exact GELU.

    python exp_iteration_head.py                            2 min on one core: is it learned, and does it look as described?
    python exp_iteration_head.py --study circuit            4 min: does it do what it looks like? Interventions
    python exp_iteration_head.py --study induction          14 min: the same model on another law, the induction head

Studies: `base` (default), `circuit`, `baselines`, `transfer`, `mix`, `scaling`, `batch`, `curriculum`, `positions`, `longer`,
`heads`, `induction`, and `data`, which writes sequences for whoever wants to train another model on the same law. arrays.npz
holds, one entry a run (axis R): the settings; at T evaluations step, eval_loss, accuracy (all states right), final (s_L right),
eos [R, T], by_length, final_by_length, eos_by_length [R, T, Lmax], by_task [R, T, tasks] and, for every layer and head,
peak_first, peak_second, weight_first, weight_second, entropy_first, entropy_second [R, T, layers, heads] (see `scores`); at the
end loss, follows_state, follows_input (see `corrupted`) [R]; kept_apart [R, tasks, Lmax]: whether evaluation is kept out of
training; beyond these what the docstrings of `compute_*` name. NaN: not defined, diverged, or beyond a run's own sizes.

Claims come from Cabannes et al. 2024, "Iteration Head: A Mechanistic Study of Chain-of-Thought", from its research notes, and
from a prototype of this project; the memories of the induction head are those of Bietti et al. 2023, "Birth of a Transformer".
"""
import functools
import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import LineCollection
from torch.func import grad_and_value

import common_v1 as common
from common_v1 import by_seed, flag, pick

# ---- Flags ----------------------------------------------------------------------------------------------------------


@dataclass
class Flags(common.Flags):
    study: Literal["base", "circuit", "baselines", "transfer", "mix", "scaling", "batch", "curriculum", "positions", "longer",
                   "heads", "induction", "data"] = flag("base", "which question to ask")
    steps: int = flag(1500, "training steps", low=1)
    runs: int = flag(3, "seeds per configuration", low=1)
    task: str = flag("polynomial", "polynomial, parity or copy", number=True)
    modulus: int = flag(11, "p of the polynomial", low=2, high=200)
    with_zero: bool = flag(False, "polynomial: x may be 0", number=True)
    mix: str = flag("", "shares of several tasks, such as parity:0.5,copy:0.5 (instead of --task)", number=True)
    weights: str = flag("", "weights of their tokens in the loss, such as parity:2,copy:1", number=True)
    cot: bool = flag(True, "chain of thought (without: the last state at once, then EoS)")
    max_length: int = flag(8, "Lmax, the largest L", low=1, high=100)
    lengths: str = flag("", "shares of lengths, such as 2:0.5,8:0.5 (default: 1 .. Lmax alike)")
    omit_length: int = flag(0, "a length left out of training (0: none)", low=0)
    order: Literal["shuffled", "sorted", "increasing"] = flag(
        "shuffled",
        "lengths mixed in a batch; one length a batch, in cycles; or mixed up to a bound that grows for half of the steps")
    n_layers: int = flag(2, "layers", low=1, high=8)
    n_heads: int = flag(1, "heads of a layer", low=1)
    d_model: int = flag(64, "width of the residual stream", low=1)
    norm: Literal["layer", "rms", "none"] = flag("layer", "normalisation before attention, MLP and unembedding")
    mlp: bool = flag(True, "a GELU MLP of width 4 d_model in each layer")
    freeze_pos: bool = flag(False, "positions keep their initial values", number=True)
    pos_dim: int = flag(0, "positions have only this many coordinates (0: d_model)", low=0, number=True)
    init_scale: float = flag(1., "initial matrices times this", low=0, number=True)
    source: str = flag("", "start from this checkpoint.pt of a finished run (its first run)", number=True)
    train: Literal["all", "last-block", "second-mlp"] = flag(
        "all", "what learns: all; the last layer, last norm and unembedding; the last layer's MLP", number=True)
    optimiser: Literal["adam", "sgd"] = flag("adam", "sgd: with momentum")
    lr: float = flag(1e-3, "learning rate", low=0, number=True)
    momentum: float = flag(.9, "sgd: heavy-ball momentum", low=0, high=1, number=True)
    batch: int = flag(64, "sequences a step", low=1)
    n_eval: int = flag(64, "evaluation sequences of each length", low=1)
    evals: int = flag(40, "evaluations over training, equally spaced", low=1)
    n: int = flag(1000, "data: sequences to write", low=1)
    n_tokens: int = flag(8, "induction: V, number of tokens", low=3, high=12)
    seq_length: int = flag(16, "induction: T, tokens a sequence", low=3, high=250)
    alpha: float = flag(.1, "induction: probability that the next token is uniform", low=0, high=1, number=True)

    per_study: ClassVar[dict] = {
        "base": dict(snapshots=30),
        "circuit": dict(steps=3000), "baselines": dict(steps=2500), "transfer": dict(steps=3000), "mix": dict(steps=2500),
        "scaling": dict(steps=2500), "curriculum": dict(steps=2500), "positions": dict(steps=2000),
        "longer": dict(steps=4000), "heads": dict(steps=3000),
        "induction": dict(mlp=False, norm="rms", lr=3e-3, batch=32, snapshots=30, evals=75),
        "smoke": dict(steps=4, runs=1, max_length=3, d_model=8, batch=8, evals=2, n_eval=4, snapshots=3,
                      n_tokens=4, seq_length=8)}

    def check(self):
        shares(self.mix, "--mix", TASKS)
        if self.task not in TASKS:
            raise common.Stop(f"--task {self.task} is not one of {', '.join(TASKS)}")
        weights = shares(self.weights, "--weights", tested(self), total=None)
        if not any(weights.get(task, 1.) for task in tested(self)):
            raise common.Stop(f"--weights {self.weights}: one of them must be above 0")
        shares(self.lengths, "--lengths", [str(L) for L in range(1, self.max_length + 1)])
        if self.omit_length > self.max_length:
            raise common.Stop(f"--omit-length {self.omit_length} must be at most --max-length {self.max_length}")
        if not any(length_shares(self)):
            raise common.Stop(f"--omit-length {self.omit_length} leaves no length to train on")
        if self.lengths and self.order != "shuffled":
            raise common.Stop(f"--lengths {self.lengths} needs --order shuffled")
        if self.d_model % self.n_heads:
            raise common.Stop(f"--d-model {self.d_model} must be divisible by --n-heads {self.n_heads}")
        if self.pos_dim > self.d_model:
            raise common.Stop(f"--pos-dim {self.pos_dim} must be at most --d-model {self.d_model}")
        if self.packed and self.batch % 2:
            raise common.Stop(f"--batch {self.batch} must be even: a length L shares a row with a length Lmax + 1 - L")
        if self.train == "second-mlp" and not self.mlp:
            raise common.Stop("--train second-mlp needs an MLP: drop --no-mlp")
        if self.study == "circuit" and not (self.cot and self.mlp and self.n_layers > 1 and self.max_length > 2):
            raise common.Stop("--study circuit needs --cot, --mlp, --n-layers 2 or more and --max-length 3 or more")
        if self.study == "induction" and self.n_layers < 2:
            raise common.Stop("--study induction needs --n-layers 2 or more")
        if self.source in TASKS and self.study != "transfer":
            raise common.Stop(f"--source {self.source} is no file; a task's own run is a source in --study transfer only")
        if self.source and self.source not in TASKS:
            from_checkpoint(self)

    def points(self):
        given = getattr(self, "given", set())
        for text in self.sweep:
            if text.split("=")[0] in ("steps", "evals"):
                raise common.Stop(f"--sweep {text}: use --name and a second run")
        points = [] if self.sweep or self.study == "mix" and "mix" in given else points_of(self)
        named = {k for p in points for k in p} | {text.split("=")[0] for text in self.sweep}
        if self.mix and "task" in named | given:
            raise common.Stop(f"--mix {self.mix} names the tasks: leave out --task, in --study base or mix")
        if self.study == "transfer" and given & {"task", "source", "train", "with_zero"} | set(self.sweep):
            raise common.Stop("--study transfer sets task, source, train and with_zero itself and has no --sweep; "
                              "--study base --source FILE --train .. goes on with one checkpoint")
        return points

    @property
    def packed(self):
        """Whether two sequences share a row: their lengths then add up to Lmax + 1, and no slot is wasted."""
        return self.study != "induction" and self.order == "shuffled" and not self.lengths and not self.omit_length

    @property
    def vocab(self):
        return self.n_tokens if self.study == "induction" else len(vocabulary(self))

    @property
    def width(self):
        """Positions of the longest input."""
        return self.seq_length if self.study == "induction" else 2 * self.max_length + 2


# ---- Data law -------------------------------------------------------------------------------------------------------

TASKS = {  # name: (values of x, number of states 0, 1, .., F(s, x)), given the flags; the first state is s_1 = x_1
    "polynomial": (lambda f: range(0 if f.with_zero else 1, f.modulus), lambda f: f.modulus,
                   lambda s, x, f: (s * x + 1) % f.modulus),
    "parity": (lambda f: range(2), lambda f: 2, lambda s, x, f: (s + x) % 2),
    "copy": (lambda f: range(2), lambda f: 2, lambda s, x, f: x),
}
EOS, EOI, DIGIT = 0, 1, 2 + len(TASKS)  # tokens: EoS, EoI, the problems in the order of TASKS, then the digits 0, 1, ..
STAY = 8     # --order sorted: batches of one length before the next
HELD = 16    # one sequence in HELD is kept for evaluation, where this leaves twice as many as it needs


def vocabulary(flags):
    """The meaning of every token."""
    return ["EoS", "EoI", *TASKS, *map(str, range(max(2, flags.modulus)))]


def shares(text, name, known, total=1.):
    """{word: number} of text such as 'parity:0.5,copy:0.5', or {text: 1}; Stop unless the words are known and the numbers
    sum."""
    result = {}
    for part in text.split(",") if text else ():
        word, colon, number = part.partition(":")
        if word not in known or word in result:
            raise common.Stop(f"{name} {text}: {word!r} is "
                              + ("given twice" if word in result else f"not one of {', '.join(known)}"))
        try:
            result[word] = common.parse(number, float) if colon else 1.
        except common.Stop as stop:
            raise common.Stop(f"{name} {text}: {stop}") from None
        if result[word] < 0:
            raise common.Stop(f"{name} {text}: {word} must not be negative")
    if total is not None and result and abs(sum(result.values()) - total) > 1e-6:
        raise common.Stop(f"{name} {text}: the shares sum to {sum(result.values()):g}, not to 1")
    return result


def length_shares(flags):
    """Probability of each length 1 .. Lmax in training."""
    given = shares(flags.lengths, "--lengths", [str(L) for L in range(1, flags.max_length + 1)])
    share = [given.get(str(L), 0.) if given else 1. for L in range(1, flags.max_length + 1)]
    share = [0. if L == flags.omit_length else s for L, s in enumerate(share, 1)]
    return [s / sum(share) for s in share] if any(share) else share


def update(flags, task, s, x):
    """s_t = F(s_{t-1}, x_t) for tasks, states and inputs of one shape."""
    return torch.stack([F(s, x, flags) for *_, F in TASKS.values()]).gather(0, task[None])[0]


def states(flags, task, x):
    """s [n, L] of x [n, L] and task [n]."""
    s = [x[:, 0]]
    for t in range(1, x.shape[1]):
        s.append(update(flags, task, s[-1], x[:, t]))
    return torch.stack(s, 1)


def sequences(flags, task, x, length):
    """Tokens [n, 2 Lmax + 3] of problems, inputs x [n, Lmax] and lengths [n], and the mask of those to be predicted. Padding is
    more EoS, which nothing is learned from."""
    i, L = torch.arange(2 * flags.max_length + 3).expand(len(x), -1), length[:, None]
    s = states(flags, task, x)
    at = lambda values, start: values.gather(1, (i - start).clamp(0, flags.max_length - 1)) + DIGIT
    tokens = torch.where(i == 0, 2 + task[:, None], torch.where(i <= L, at(x, 1), EOI))
    last = 2 * L + 1 if flags.cot else L + 2  # the last state
    answer = at(s, L + 2) if flags.cot else at(s, i - L + 1)
    tokens = torch.where(i > L + 1, torch.where(i <= last, answer, EOS), tokens)
    return tokens, (i > L + 1) & (i <= last + 1)


def apart(flags):
    """[tasks, Lmax + 1]: whether a length has enough sequences for its evaluation to be kept out of training; else they
    overlap."""
    counts = [len(values(flags)) for values, *_ in TASKS.values()]
    return torch.tensor([[k ** L >= 2 * HELD * flags.n_eval for L in range(flags.max_length + 1)] for k in counts])


def held_out(flags, task, x, length):
    """Whether x_1 .. x_L is kept for evaluation: by a hash, where `apart` allows it."""
    hashed = torch.zeros_like(length)
    for t in range(x.shape[1]):
        hashed = torch.where(t < length, (hashed * 1_000_003 + x[:, t] + 1) % 2_147_483_647, hashed)
    return (hashed % HELD == 0) & apart(flags)[task, length]


def draw_x(flags, generator, task, length):
    """x [n, Lmax], uniform over the sequences that are not kept for evaluation."""
    ranges = [values(flags) for values, *_ in TASKS.values()]
    low, count = (torch.tensor([f(r) for r in ranges])[task, None] for f in (min, len))
    uniform = lambda n: torch.rand(n, flags.max_length, generator=generator)
    x = low + (uniform(len(task)) * count).long()
    again = held_out(flags, task, x, length)
    while again.any():
        x[again] = low[again] + (uniform(int(again.sum())) * count[again]).long()
        again = held_out(flags, task, x, length)
    return x


def draw_lengths(flags, generator, first, steps):
    """Lengths [steps, rows, sequences a row] from step `first` on. Two in a row add up to Lmax + 1, each of them uniform."""
    L, share = flags.max_length, torch.tensor(length_shares(flags))
    if flags.packed:
        one = torch.randint(1, L + 1, (steps, flags.batch // 2, 1), generator=generator)
        return torch.cat([one, L + 1 - one], -1)
    shape, known, step = (steps, flags.batch, 1), share.nonzero()[:, 0] + 1, torch.arange(first, first + steps)[:, None, None]
    if flags.order == "sorted":
        return known[step // STAY % len(known)].expand(shape)
    if flags.order == "increasing":
        bound = (len(known) * (step + 1) / flags.steps * 2).ceil().clamp(1, len(known))
        return known[(torch.rand(shape, generator=generator) * bound).long()]
    return (torch.multinomial(share, math.prod(shape), replacement=True, generator=generator) + 1).view(shape)


def draw(flags, generator, n, lengths=None):
    """n sequences, of uniform length if none is given: task, x, length, tokens, mask."""
    share = shares(flags.mix or flags.task, "--task", TASKS)
    task = torch.multinomial(torch.tensor([share.get(name, 0.) for name in TASKS]), n, replacement=True, generator=generator)
    length = torch.multinomial(torch.tensor(length_shares(flags)), n, True,
                               generator=generator) + 1 if lengths is None else lengths
    x = draw_x(flags, generator, task, length)
    return task, x, length, *sequences(flags, task, x, length)


def sample(flags, generator, first=0, steps=common.CHUNK):
    """Data of `steps` steps: packed rows. In a row stand first the prompts of its sequences, then what follows EoI: [problem x
    .. problem x .. | EoI s .. EoI s ..], so that the answers are a slice. Attention knows no order: `position` and `segment`
    say what sees what. token, position, segment [steps, rows, W]; target and its weight in the loss [steps, rows, A], the last
    A of W."""
    if flags.study == "induction":
        return sample_induction(flags, generator, steps)
    lengths = draw_lengths(flags, generator, first, steps)
    task, _, _, tokens, _ = draw(flags, generator, lengths.numel(), lengths.flatten())
    weight = shares(flags.weights, "--weights", TASKS, total=None)
    weight = torch.tensor([weight.get(name, 1.) for name in TASKS])[task].view(lengths.shape)
    tokens = tokens.view(*lengths.shape, -1).flatten(-2)
    answers = lengths if flags.cot else torch.ones_like(lengths)  # how many states
    extra = lengths.shape[-1] - 1

    def block(last, size):  # sequence, index in it, and whether it is used, of slots in which each sequence takes 0 .. last
        slot = torch.arange(size)
        sequence = (slot > last[..., :1]).long() * extra
        index = slot - sequence * (last[..., :1] + 1)
        return sequence, index, index <= last.gather(-1, sequence)
    size = flags.max_length + 1 + 2 * extra
    (s1, i1, u1), (s2, i2, u2) = block(lengths, size), block(answers, size if flags.cot else 2 + 2 * extra)
    sequence, used = torch.cat([s1, s2], -1), torch.cat([u1, u2], -1)
    position = torch.cat([i1, lengths.gather(-1, s2) + 1 + i2], -1).clamp(max=flags.width - 1)
    place = sequence * (2 * flags.max_length + 3) + position
    byte = lambda x: x.to(torch.uint8)
    return {"token": byte(tokens.gather(-1, place)), "position": byte(position),
            "segment": byte(torch.where(used, sequence, 2)),
            "target": byte(tokens.gather(-1, place[..., -s2.shape[-1]:] + 1)), "weight": weight.gather(-1, s2) * u2}


def evaluation_set(flags, task, length):
    """Tokens of at most n_eval sequences of one task (a name) and length: all there are, or a draw from those kept out of
    training (or, where these are too few, from all)."""
    values, *_ = TASKS[task]
    values, L, t = torch.tensor(list(values(flags))), flags.max_length, list(TASKS).index(task)
    generator, count = common.generator(0, f"eval {task} {length}"), len(values) ** length
    if count <= flags.n_eval:
        x = torch.cartesian_prod(*[values] * length).view(count, length)
    else:
        x, keep = torch.zeros(0, length, dtype=torch.long), bool(apart(flags)[t, length])
        while len(x) < flags.n_eval:
            new = values[torch.randint(len(values), (HELD * flags.n_eval, length), generator=generator)]
            held = held_out(flags, torch.full((len(new),), t), new, torch.full((len(new),), length))
            x = torch.unique(torch.cat([x, new[held] if keep else new]), dim=0)
        x = x[torch.randperm(len(x), generator=generator)[:flags.n_eval]]
    x = torch.cat([x, x[:, :1].expand(-1, L - length)], 1)
    return sequences(flags, torch.full((len(x),), t), x, torch.full((len(x),), length))[0]


def guesses(flags, task, length):
    """How often the last state s_L is guessed right, x uniform, by who has seen nothing; and by who knows s_{L-1} but not x_L
    (at L = 1 there is no s_0, and this one is right)."""
    values, _, F = TASKS[task]
    x = torch.tensor(list(values(flags)))
    p = torch.bincount(x, minlength=flags.modulus).double() / len(x)  # of s_1
    informed = 1.
    for _ in range(length - 1):
        s = torch.arange(len(p))[:, None].expand(-1, len(x))
        after = torch.zeros(len(p), len(p), dtype=torch.float64).scatter_add(
            1, F(s, x.expand_as(s), flags).expand_as(s), torch.full(s.shape, 1 / len(x), dtype=torch.float64))  # [s, next s]
        informed, p = float((p * after.amax(1)).sum()), p @ after
    return float(p.max()), informed


def sample_induction(flags, generator, steps, batch=None):
    """Sequences of the induction law as rows: the next token is perm(x), a permutation drawn for each sequence, or with
    probability alpha uniform."""
    V, T, shape = flags.n_tokens, flags.seq_length, (steps, batch or flags.batch)
    permutation = torch.rand(*shape, V, generator=generator).argsort(-1)
    uniform = torch.randint(V, (*shape, T + 1), generator=generator)
    wild = torch.rand(*shape, T + 1, generator=generator) < flags.alpha
    tokens = [uniform[..., 0]]
    for t in range(1, T + 1):
        tokens.append(torch.where(wild[..., t], uniform[..., t], permutation.gather(-1, tokens[-1][..., None])[..., 0]))
    tokens = torch.stack(tokens, -1)
    byte = lambda x: x.to(torch.uint8)
    return {"token": byte(tokens[..., :-1]), "position": byte(torch.arange(T).expand(*shape, T)),
            "segment": torch.zeros(*shape, T, dtype=torch.uint8), "target": byte(tokens[..., 1:]),
            "weight": torch.ones(*shape, T)}


def posterior(tokens, alpha, n_tokens, alone=False):
    """Exact probabilities [n, T, V] of the next token given tokens [n, T] of the induction law. Each permutation pi has the
    likelihood prod_x r^(times pi(x) was seen to follow x), r = 1 + V (1 - alpha) / alpha; the sum over permutations with
    pi(x) = y is a permanent, added up over sets of used values (2^V of them). alone: of who only counts what followed the
    current token, and does not know that two tokens never have the same successor."""
    n, T, V = *tokens.shape, n_tokens
    r = min(1 + V * (1 - alpha) / alpha, 1e12) if alpha else 1e12
    follows = torch.zeros(n, T, V, V, dtype=torch.float64)  # how often y followed x up to t
    step = torch.zeros(n, V, V, dtype=torch.float64)
    for t in range(1, T):
        step[torch.arange(n), tokens[:, t - 1], tokens[:, t]] += 1
        follows[:, t] = step
    weight = (math.log(r) * (follows - follows.amax(-1, keepdim=True))).exp().flatten(0, 1)  # [n T, x, y], rows scaled
    now = tokens.flatten()
    if alone:
        mine = weight[torch.arange(len(now)), now]
        return (alpha / V + (1 - alpha) * mine / mine.sum(1, keepdim=True)).view(n, T, V)
    order = (torch.arange(V) + now[:, None] + 1) % V  # the current token last
    weight = weight.gather(1, order[..., None].expand(-1, -1, V))
    ways = {0: torch.ones(len(now), dtype=torch.float64)}  # of giving the rows so far the values of a set (as bits)
    for row in range(V - 1):
        more = {}
        for used, count in ways.items():
            for y in range(V):
                if not used >> y & 1:
                    more[used | 1 << y] = more.get(used | 1 << y, 0) + count * weight[:, row, y]
        ways = more
    last = torch.stack([ways[(1 << V) - 1 - (1 << y)] for y in range(V)], 1) * weight[:, -1]
    return (alpha / V + (1 - alpha) * last / last.sum(1, keepdim=True)).view(n, T, V)


# ---- Model ----------------------------------------------------------------------------------------------------------

def init(flags, generator):
    """Parameters of one run: E [vocab, d], P [width, d], U [d, vocab]; in layer l: W_Q<l>, W_K<l>, W_V<l>, W_O<l> [d, d] (heads
    side by side in the columns, W_O: rows), W_in<l> [d, 4 d], W_out<l>, gains g_attention<l>, g_mlp<l>, and g at the end.
    Scales are torch's defaults: N(0, 1) for embeddings, uniform within 1 / sqrt(rows) for the others."""
    d, normal = flags.d_model, lambda *shape: flags.init_scale * torch.randn(shape, generator=generator)
    uniform = lambda *shape: flags.init_scale * (2 * torch.rand(shape, generator=generator) - 1) * shape[0] ** -.5
    gain = lambda *names: {n: torch.ones(d) for n in names if flags.norm != "none"}
    params = {"E": normal(flags.vocab, d), "P": normal(flags.width, d) * pos_mask(flags)}
    for l in range(flags.n_layers):
        params |= {f"W_{w}{l}": uniform(d, d) for w in "QKVO"} | gain(f"g_attention{l}")
        if flags.mlp:
            params |= {f"W_in{l}": uniform(d, 4 * d), f"W_out{l}": uniform(4 * d, d)} | gain(f"g_mlp{l}")
    return params | {"U": uniform(d, flags.vocab)} | gain("g")


def pos_mask(flags):
    """[d]: 1 on the coordinates that positions have."""
    return (torch.arange(flags.d_model) < (flags.pos_dim or flags.d_model)).float()


def normed(params, name, x, flags):
    """LayerNorm without bias, RMSNorm or nothing."""
    if flags.norm == "none":
        return x
    f = torch.nn.functional.layer_norm if flags.norm == "layer" else torch.nn.functional.rms_norm
    return f(x, x.shape[-1:], params[name], eps=1e-5)


def identity(name, x):
    return x


def forward(params, token, position, sees, flags, answers=None, patch=identity):
    """Logits [B, A, vocab] and attention maps, one [B, H, queries, W] a layer, of tokens and their positions [B, W]; sees [B or
    1, W, W]: whether a query (row) sees a key. With `answers` = A only the last A of the W slots are computed where nothing
    else is read from them: in the last layer. patch(name, x) may replace attention<l>, heads<l> [B, A, d] (side by side, before
    W_O), read<l> (after), mid<l> (the stream before the MLP), hidden<l>, mlp<l> and out<l>."""
    d, H, maps = flags.d_model, flags.n_heads, []
    heads = lambda x: x.view(*x.shape[:-1], H, d // H).transpose(-2, -3)  # [B, H, W, d / H]
    x = params["E"][token] + params["P"][position]
    for l in range(flags.n_layers):
        h = normed(params, f"g_attention{l}", x, flags)
        W_Q, W_K, W_V, W_O = (params[f"W_{w}{l}"] for w in "QKVO")
        if answers and H == 1:  # one head is two matrices: W_Q W_K' between streams, W_V W_O on what is read; exact algebra
            W_Q, W_O, k, v = W_Q @ W_K.T, W_V @ W_O, h, h
        else:
            k, v = h @ W_K, h @ W_V
        if answers and l == flags.n_layers - 1:
            x, h, sees = x[:, -answers:], h[:, -answers:], sees[:, -answers:]
        score = heads(h @ W_Q) @ heads(k).mT * (d // H) ** -.5
        maps.append(patch(f"attention{l}", score.masked_fill(~sees[:, None], -1e30).softmax(-1)))
        mixed = patch(f"heads{l}", (maps[-1] @ heads(v)).transpose(-2, -3).flatten(-2))
        x = patch(f"mid{l}", x + patch(f"read{l}", mixed @ W_O))
        if flags.mlp:
            hidden = patch(f"hidden{l}", torch.nn.functional.gelu(normed(params, f"g_mlp{l}", x, flags) @ params[f"W_in{l}"]))
            x = x + patch(f"mlp{l}", hidden @ params[f"W_out{l}"])
        x = patch(f"out{l}", x)
    return normed(params, "g", x, flags) @ params["U"], maps


def read(params, tokens, flags, patch=identity):
    """The textbook model: logits [B, T, vocab] and maps of tokens [B, T] at positions 0 .. T - 1, each seeing those before
    it."""
    T = tokens.shape[1]
    return forward(params, tokens, torch.arange(T), torch.ones(1, T, T, dtype=torch.bool).tril(), flags, patch=patch)


def packed_logits(params, rows, flags):
    """Logits [rows, A, vocab] at the answers of packed rows."""
    position, segment = rows["position"].int(), rows["segment"]
    sees = (segment[:, :, None] == segment[:, None]) & (position[:, None] <= position[:, :, None])
    return forward(params, rows["token"].int(), position, sees, flags, answers=rows["target"].shape[-1])[0]


def nll(logits, target):
    """-log p(target) in nats."""
    return logits.logsumexp(-1) - logits.gather(-1, target.long()[..., None])[..., 0]


# ---- Measures -------------------------------------------------------------------------------------------------------
# e = L + 1 is the position of EoI, e + t that of s_t, t that of x_t. The answer s_t is given at e + t - 1.

def tested(flags):
    """The tasks of a run, by name."""
    share = shares(flags.mix or flags.task, "--task", TASKS)
    return [name for name in TASKS if share.get(name)]


def evaluation_sets(flags):
    """{task: [tokens of length 1, .., of length Lmax]}."""
    return {task: [evaluation_set(flags, task, L) for L in range(1, flags.max_length + 1)] for task in tested(flags)}


def answered(params, tokens, L, flags, patch=identity):
    """Teacher-forced answers to sequences of one length: predicted, target [n, answers] (EoS is the last), loss, maps."""
    inputs = tokens[:, :L + 2 + (L if flags.cot else 1)]
    logits, maps = read(params, inputs, flags, patch)
    logits, target = logits[:, L + 1:], tokens[:, L + 2:inputs.shape[1] + 1]
    return {"said": logits.argmax(-1), "target": target, "loss": nll(logits, target).mean(), "maps": maps}


def accuracy(a):
    """Shares of sequences with all states right, with the last state right, with EoS right."""
    right = a["said"] == a["target"]
    return torch.stack([right[:, :-1].all(1), right[:, -2], right[:, -1]]).float().mean(1)


SCORES = [f"{what}_{which}" for what in ("peak", "weight", "entropy") for which in ("first", "second")]


def ideal(L):
    """Queries and keys of the iteration head, {"first": .., "second": ..}: s_1 .. s_L look at EoI; EoI, s_1 .. s_{L-1} at x_1
    .. x_L."""
    t, e = torch.arange(1, L + 1), L + 1
    return {"first": (e + t, torch.full_like(t, e)), "second": (e + t - 1, t)}


def scores(maps, L):
    """{score: [layers, H]} of maps, one [n, H, T, T] a layer: share of ideal cells with attention above 0.5 (peak), mean
    attention there (weight), entropy of these queries' rows (nats)."""
    maps, result = torch.stack(maps, 1), {}
    for which, (query, key) in ideal(L).items():
        cell, row = maps[..., query, key], maps[..., query, :]
        result |= {f"peak_{which}": (cell > .5).float().mean((0, 3)), f"weight_{which}": cell.mean((0, 3)),
                   f"entropy_{which}": -torch.special.xlogy(row, row).sum(-1).mean((0, 3))}
    return result


def evaluate(run, params, sets):
    """Means over tasks and lengths of loss, accuracy (all states), final, eos and scores [layers, H]; by_length,
    final_by_length, eos_by_length [Lmax] and by_task [tasks] of the accuracy, peak_by_task [tasks] (the best second peak of any
    head)."""
    rows, by_task, peaks = [], torch.full((len(TASKS),), math.nan), torch.full((len(TASKS),), math.nan)
    for task, by_length in sets.items():
        mine = []
        for L, tokens in enumerate(by_length, 1):
            a = answered(params, tokens, L, run)
            s = scores(a["maps"], L) if run.cot else {k: torch.full((run.n_layers, run.n_heads), math.nan) for k in SCORES}
            mine.append({"loss": a["loss"], **dict(zip(("accuracy", "final", "eos"), accuracy(a))), **s})
        mine = common.stack(mine)
        by_task[list(TASKS).index(task)] = mine["accuracy"].mean()
        peaks[list(TASKS).index(task)] = mine["peak_second"].mean(0).max()
        rows.append(mine)
    rows = common.stack(rows)  # [tasks, Lmax, ..]
    return common.tree(lambda x: x.mean((0, 1)), rows) | {
        "by_length": rows["accuracy"].mean(0), "final_by_length": rows["final"].mean(0),
        "eos_by_length": rows["eos"].mean(0), "by_task": by_task, "peak_by_task": peaks}


def generate(params, tokens, L, flags):
    """Greedy answers [n, answers] to prompts [problem, x .., EoI] of length L, fed back."""
    tokens = tokens[:, :L + 2]
    for _ in range((L if flags.cot else 1) + 1):
        tokens = torch.cat([tokens, read(params, tokens, flags)[0][:, -1:].argmax(-1)], 1)
    return tokens[:, L + 2:]


def generated(run, params, sets):
    """Free-running: shares of sequences with the last state right, and of those whose answers are all right teacher-forced
    if and only if they are all right generated (an identity, checked)."""
    final, same = [], []
    for by_length in sets.values():
        for L, tokens in enumerate(by_length, 1):
            forced, free = answered(params, tokens, L, run), generate(params, tokens, L, run)
            final.append((free[:, -2] == forced["target"][:, -2]).float().mean())
            same.append(((free == forced["target"]).all(1) == (forced["said"] == forced["target"]).all(1)).float().mean())
    return {"generated": torch.stack(final).mean(), "generated_agrees": torch.stack(same).mean()}


def corrupted(run, params, task, by_length, what="state"):
    """The intervention that makes an iteration head: with s_{t-1} (what = "state") or x_t ("input") replaced in the sequence by
    another value, is the next token F(that, x_t) or F(s_{t-1}, that)? Of those for which that is another token than before,
    shares [Lmax, Lmax] by L and t, and of each (s, x) [digits, digits] that occurred how often it was answered and how often it
    came."""
    values, n_states = TASKS[task][0](run), TASKS[task][1](run)
    domain = torch.tensor(list(values)) if what == "input" else torch.arange(n_states)
    g, rate = common.generator(0, f"corrupt {task} {what}"), torch.full((run.max_length, run.max_length), math.nan)
    table = torch.zeros(2, n_states, max(2, run.modulus))
    for L, tokens in enumerate(by_length, 1):
        for t in range(2, L + 1):
            e, n = L + 1, len(tokens)
            at = e + t - 1 if what == "state" else t
            new, old = tokens.clone(), tokens[:, at] - DIGIT
            index = (domain[None] == old[:, None]).long().argmax(1)
            shift = torch.randint(1, max(2, len(domain)), (n,), generator=g)
            new[:, at] = domain[(index + shift) % len(domain)] + DIGIT
            s, x = new[:, e + t - 1] - DIGIT, new[:, t] - DIGIT
            tasks = torch.full((n,), list(TASKS).index(task))
            target, was = update(run, tasks, s, x), update(run, tasks, tokens[:, e + t - 1] - DIGIT, tokens[:, t] - DIGIT)
            said = read(params, new[:, :e + t], run)[0][:, -1].argmax(-1) - DIGIT
            rate[L - 1, t - 1] = (said == target)[target != was].float().mean()
            table[0].index_put_((s, x), (said == target).float(), accumulate=True)
            table[1].index_put_((s, x), torch.ones(n), accumulate=True)
    return rate, table


def steps_to(step, value, level=.95):
    """First evaluated step [R] at which value [R, T] reaches the level; infinite if it never does."""
    reached = value >= level
    return np.where(reached.any(1), step[np.arange(len(step)), reached.argmax(1)].astype(float), np.inf)


def best(score):
    """(layer, head) of the largest entry of a score [layers, H]."""
    return divmod(int(np.asarray(score).argmax()), score.shape[1])


def changed(name, place, value):
    """A patch: of what `name` computes, x[place] becomes value(x[place])."""
    def patch(where, x):
        if where == name:
            x = x.clone()
            x[place] = value(x[place])
        return x
    return patch


def average(x):
    """x [n, positions, d] averaged over sequences and positions."""
    return x.mean((0, 1))


def replaced(l, h, queries, rows):
    """A patch: these queries' rows of the attention of head h in layer l become `rows` [queries, T]."""
    return changed(f"attention{l}", (slice(None), h, queries), lambda _: rows)


def averaged(name, positions):
    """A patch: at these positions, what `name` computes becomes its mean over the sequences and these positions."""
    return changed(name, (slice(None), positions), average)


def interventions(run, params, by_length, first, second):
    """{what was done: accuracy (all states) by length [Lmax]}; first, second: (layer, head) of the two parts of the circuit."""
    rows = []
    for L, tokens in enumerate(by_length, 1):
        T, e, cells = 2 * L + 2, L + 1, ideal(L)
        hot = lambda keys: torch.nn.functional.one_hot(keys, T).float()
        uniform = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
        answers, prompt = torch.arange(e, T), torch.arange(e)
        (q1, k1), (q2, k2) = cells["first"], cells["second"]
        tries = {"untouched": identity,
                 "lookup ideal": replaced(*second, q2, hot(k2)), "lookup uniform": replaced(*second, q2, uniform[q2]),
                 "lookup one late": replaced(*second, q2[:-1], hot(k2[:-1] + 1)) if L > 1 else identity,
                 "EoI ideal": replaced(*first, q1, hot(k1)), "EoI uniform": replaced(*first, q1, uniform[q1]),
                 "no first MLP at answers": averaged(f"mlp{first[0]}", answers),
                 "no first MLP at inputs": averaged(f"mlp{first[0]}", prompt),
                 "no last MLP at answers": averaged(f"mlp{second[0]}", answers)}
        rows.append({k: accuracy(answered(params, tokens, L, run, patch))[0] for k, patch in tries.items()})
    return common.stack(rows)


def moved(run, params, by_length, first, second):
    """Position subtraction: at a query q of a sequence of length L, what the first layer read is replaced by what it read at q
    in a sequence of length L'. Shares [2, Lmax, Lmax] (L, L') of queries whose second-layer argmax is then at q - L' (it
    moved), and still at q - L (it stayed); of queries that are states in both (EoI knows by its own token that it is one) with
    q - L' <= L."""
    size = run.max_length
    result = torch.full((2, size, size), math.nan)
    kept = {}
    for L, tokens in enumerate(by_length, 1):
        answered(params, tokens, L, run, lambda name, x, L=L: kept.setdefault(L, x) if name == f"read{first[0]}" else x)
    for L, tokens in enumerate(by_length, 1):
        for other in range(1, size + 1):
            q = torch.tensor([q for q in range(L + 2, 2 * L + 1) if other + 2 <= q <= 2 * other and q - other <= L])
            if other == L or not len(q):
                continue
            n = min(len(tokens), len(kept[other]))
            patch = changed(f"read{first[0]}", (slice(None), q), lambda _: kept[other][:n, q])
            target = answered(params, tokens[:n], L, run, patch)["maps"][second[0]][:, second[1], q].argmax(-1)
            result[:, L - 1, other - 1] = torch.stack([(target == q - other).float().mean(), (target == q - L).float().mean()])
    return result


def explained(vectors, labels):
    """Share of the variance of vectors [n, d] between the classes of labels [n] (correlation ratio)."""
    centred = vectors - vectors.mean(0)
    means = torch.stack([centred[labels == c].mean(0) for c in labels.unique()])
    counts = torch.stack([(labels == c).sum() for c in labels.unique()])
    return float((counts[:, None] * means ** 2).sum() / (centred ** 2).sum())


def probes(run, params, by_length, layer):
    """What decides the stream of the answering queries before (mid) and after (out) the MLP of a layer: shares of its variance
    between targets t, positions q, and lengths L; [2, 3]."""
    found = {"mid": [], "out": []}
    labels = []
    for L, tokens in enumerate(by_length, 1):
        q = ideal(L)["second"][0]

        def keep(name, x, q=q):
            if name[:-1] in found and name[-1] == str(layer):
                found[name[:-1]].append(x[:, q].flatten(0, 1))
            return x
        answered(params, tokens, L, run, keep)
        labels.append(torch.stack([q - L, q, torch.full_like(q, L)], 1).repeat(len(tokens), 1))
    labels = torch.cat(labels)
    return torch.tensor([[explained(torch.cat(x), labels[:, i]) for i in range(3)] for x in found.values()])


def ablated_heads(run, params, sets):
    """Accuracy [layers, H] (all states, mean over tasks and lengths) with one head's output at all positions set to its
    mean."""
    size, rows = run.d_model // run.n_heads, []
    for l in range(run.n_layers):
        for h in range(run.n_heads):
            patch = changed(f"heads{l}", (..., slice(h * size, (h + 1) * size)), average)
            rows.append(torch.stack([accuracy(answered(params, tokens, L, run, patch))[0]
                                     for by_length in sets.values() for L, tokens in enumerate(by_length, 1)]).mean())
    return torch.stack(rows).view(run.n_layers, run.n_heads)


def flipped(run, params, sets):
    """[tasks, tasks]: in sequences of task a the problem token alone is replaced by that of b; the share of next states that
    are then F_b(s_{t-1}, x_t), among those where F_a gives another."""
    result, names = torch.full((len(TASKS), len(TASKS)), math.nan), list(TASKS)
    for a, by_length in sets.items():
        for b in sets:
            right = []
            for L, tokens in enumerate(by_length, 1):
                new = tokens.clone()
                new[:, 0] = 2 + names.index(b)
                said = answered(params, new, L, run)["said"][:, 1:-1] - DIGIT  # s_2 .. s_L
                s, x = tokens[:, L + 2:2 * L + 1] - DIGIT, tokens[:, 2:L + 1] - DIGIT
                other, own = (update(run, torch.full_like(s, names.index(c)), s, x) for c in (b, a))
                right.append((said == other)[(other != own) | (a == b)])
            result[names.index(a), names.index(b)] = torch.cat(right).float().mean()
    return result


# the induction head

def induction_scores(maps, tokens):
    """A1, A2: mean attention of the first layer's head to the token before (queries 1 .. T - 1), and of the second's to the
    tokens that follow earlier copies of the current one (summed, over queries that have one); of heads the best. tokens [n,
    T]."""
    first, second = maps[0], maps[1]
    n, T = tokens.shape
    before = torch.arange(T - 1)
    A1 = first[:, :, before + 1, before].mean((0, 2)).max()
    copy = torch.zeros(n, T, T, dtype=torch.bool)
    copy[:, :, 1:] = tokens[:, :, None] == tokens[:, None, :-1]  # key k follows a copy of the query's token
    copy &= torch.ones(T, T, dtype=torch.bool).tril()  # and is not in the future
    some = copy.any(-1)
    A2 = (second * copy[:, None]).sum(-1).transpose(0, 1)[:, some].mean(1).max()
    return {"A1": A1, "A2": A2}


def memories(run, params):
    """Matrices whose rows should have their argmax at one place, through the norms (W_K^1, W_K^2, W_O^2 of Bietti et al. 2023):
    `position` [T, T]: query t, keys s <= t, right at t - 1; `key` [V, V]: token queried, the first layer's value of a token as
    key of the second, right on the diagonal; `output` [V, V]: token read by the second layer, logits, right on the diagonal.
    With several heads their sum."""
    at = lambda x, name: normed(params, name, x, run)
    scale, T = (run.d_model // run.n_heads) ** -.5, run.seq_length
    p = at(params["P"], "g_attention0")
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    position = (p @ params["W_Q0"] @ (p @ params["W_K0"]).T * scale).masked_fill(future, -math.inf)
    value = at(params["E"], "g_attention0") @ params["W_V0"] @ params["W_O0"]
    query = at(params["E"], "g_attention1")
    key = query @ params["W_Q1"] @ (at(value, "g_attention1") @ params["W_K1"]).T * scale
    output = at(query @ params["W_V1"] @ params["W_O1"], "g") @ params["U"]
    return {"position": position, "key": key, "output": output}


def recalls(memory):
    """Shares of rows with the right argmax."""
    T, V = len(memory["position"]), torch.arange(len(memory["key"]))
    right = [memory["position"][1:].argmax(-1) == torch.arange(T - 1), memory["key"].argmax(-1) == V,
             memory["output"].argmax(-1) == V]
    return dict(zip(("recall_position", "recall_key", "recall_output"), (r.float().mean() for r in right)))


def induction_set(flags):
    """tokens, target [256, T] for evaluation, which positions' token was seen before, and what is known exactly: loss (nats)
    and accuracy there of the Bayes predictor (floor, ceiling), and the loss of one that counts what followed the current
    token."""
    rows = sample_induction(flags, common.generator(0, "eval induction"), 1, 256)
    tokens, target = rows["token"][0].long(), rows["target"][0].long()
    seen = torch.stack([(tokens[:, :t] == tokens[:, t:t + 1]).any(1) for t in range(flags.seq_length)], 1)
    p, counted = (posterior(tokens, flags.alpha, flags.n_tokens, alone) for alone in (False, True))
    loss = lambda p: -p.gather(-1, target[..., None]).log().mean()
    return {"tokens": tokens, "target": target, "seen": seen, "floor": loss(p), "counting": loss(counted),
            "ceiling": (p.argmax(-1) == target)[seen].float().mean()}


def evaluate_induction(run, params, fixed):
    """loss, accuracy where the token was seen, A1, A2 and recalls."""
    logits, maps = read(params, fixed["tokens"], run)
    right = logits.argmax(-1) == fixed["target"]
    return {"loss": nll(logits, fixed["target"]).mean(), "accuracy": right[fixed["seen"]].float().mean(),
            **induction_scores(maps, fixed["tokens"]), **recalls(memories(run, params))}


# ---- Train ----------------------------------------------------------------------------------------------------------

LAST = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "g_attention", "g_mlp")


def free(run, names):
    """What learns: {name: 1, 0, or [d] for positions}, which gradients are multiplied by."""
    last = run.n_layers - 1
    mine = {"all": names, "last-block": [*(f"{w}{last}" for w in LAST), "g", "U"],
            "second-mlp": [f"W_in{last}", f"W_out{last}", f"g_mlp{last}"]}[run.train]
    mask = {n: torch.tensor(float(n in mine)) for n in names}
    return mask | {"P": mask["P"] * pos_mask(run) * float(not run.freeze_pos)}


def start(run, given=None):
    """Step 0 of one run; `given` takes the place of the initial parameters."""
    params = given or init(run, common.generator(run.seed, "init"))
    return {"params": params, **(common.adam_init if run.optimiser == "adam" else common.sgd_init)(params)}


def from_checkpoint(flags):
    """The parameters of the first run of --source, if they are of these flags' shapes."""
    saved = common.load_checkpoint(flags.source)
    like = init(flags, torch.Generator())
    given = {k: p[0].float() for k, p in saved["params"].items() if p.ndim and len(p)}
    for name in sorted(set(like) | set(given)):
        have, want = (tuple(x[name].shape) if name in x else "none" for x in (given, like))
        if have != want:
            raise common.Stop(f"--source {flags.source} is of another shape: {name} is {have}, these flags need {want}")
    return given


def step_of(flags):
    """The training step of ONE run: state and packed rows -> new state, logs."""
    def loss_of(params, rows):
        each = nll(packed_logits(params, rows, flags), rows["target"])
        return (rows["weight"] * each).sum() / rows["weight"].sum().clamp(min=1e-9)

    def step(state, rows, number):
        grads, loss = grad_and_value(loss_of)(state["params"], rows)
        grads = {k: g * number["free"][k] for k, g in grads.items()}
        if flags.optimiser == "adam":
            params, optimiser = common.adamw(state["params"], grads, state, number["lr"])
        else:
            params, optimiser = common.sgd(state["params"], grads, state, number["lr"], number["momentum"])
        return {"params": params, **optimiser}, {"loss": loss}
    return step


def train(runs, folder, given=lambda run: None):
    """Train runs of one shape: `common.train` on fresh sequences every step; given(run): parameters to start from."""
    flags, induction = runs[0], runs[0].study == "induction"
    state = common.stack(start(run, given(run)) for run in runs)
    sets = [induction_set(run) if induction else evaluation_sets(run) for run in runs]
    for task in () if induction else dict.fromkeys(task for run in runs for task in tested(run)):
        few = int((~apart(flags)[list(TASKS).index(task)]).sum()) - 1
        print(f"evaluation of {task}: " + (f"lengths 1 to {few} have few sequences and overlap with training" if few
                                           else "kept out of training"))
    constants = common.numbers(runs) | {"free": common.stack(free(run, list(state["params"])) for run in runs)}
    return common.train(
        runs, folder, state, constants, step_of(flags),
        draw=lambda r, chunk: sample(runs[r], common.generator(runs[r].seed, "train", chunk), chunk * common.CHUNK),
        evaluate=lambda r, params: (evaluate_induction if induction else evaluate)(runs[r], params, sets[r]),
        eval_at=[round(i * flags.steps / flags.evals) for i in range(flags.evals + 1)],
        label=f"{flags.study} d={flags.d_model}, " + (f"T={flags.seq_length}" if induction else f"Lmax={flags.max_length}"))


# ---- Figures --------------------------------------------------------------------------------------------------------

BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK = common.COLOURS[:7]
COLOUR = dict(zip(TASKS, (BLUE, RED, GREEN, *common.COLOURS[3:])))


def largest(x, axis):
    """Maximum over what is not NaN; NaN where nothing is."""
    top = np.where(np.isnan(x), -np.inf, x).max(axis)
    return np.where(top == -np.inf, np.nan, top)


def head_of(arrays, which, layer=None):
    """The curve [R, T] of the best head's peak_first or peak_second: over all layers, or in one (negative: from the last)."""
    x = arrays[f"peak_{which}"]
    if layer is None:
        return largest(x, (2, 3))
    depth = arrays["n_layers"] if layer < 0 else np.zeros(len(x), int)
    return largest(x[np.arange(len(x)), :, (depth + layer).astype(int)], 2)


def or_configurations(draw):
    """draw, or where the study doesn't run its own configurations, accuracy and score of those that it ran."""
    return lambda arrays, flags: draw(arrays, flags) if common.as_designed(flags) else draw_configurations(arrays, flags)


def mean(x, axis):
    """Mean over what is not NaN; NaN where nothing is."""
    with np.errstate(invalid="ignore"):
        return np.nansum(x, axis) / np.isfinite(x).sum(axis)


def curve(ax, arrays, values, mask, label, colour):
    """Median, quartiles and single runs of values [R, T] over the steps of the runs in `mask`; diverged runs left out."""
    values = values[mask]
    if np.isfinite(values).any():
        common.band(ax, arrays["step"][mask][0], values.T, label, colour)


def dots(ax, x, values, colour, label=None, marker="o"):
    """One column of dots, one a run, and their median; what was never reached (infinite) is an arrow on top."""
    values = np.asarray(values, float)
    good, style = values[np.isfinite(values)], dict(color=colour, alpha=.6, mew=0)
    shown = [ax.plot(np.full(len(good), x), good, marker, ms=3.5, **style)] if len(good) else []
    if len(good):
        shown.append(ax.plot([x], [np.median(good)], "_", color=colour, ms=11, mew=2))
    if np.isinf(values).any():
        shown.append(ax.plot([x], [.98], "^", color=colour, ms=5, transform=ax.get_xaxis_transform(), clip_on=False))
    if shown and label:
        shown[0][0].set_label(label)


def legend(ax, size=7):
    """A legend, where there is something to name."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=size)


def log_steps(ax, arrays, label):
    """A logarithmic axis of steps, also where no run got there."""
    ax.set(yscale="log", ylabel=label, ylim=(max(1, np.nanmin(np.where(arrays["step"] > 0, arrays["step"], np.nan))) * .7,
                                             np.nanmax(arrays["step"]) * 1.4))


def names_of(cot, length):
    """What stands at each position of an input of this length."""
    answers = [f"s{t}" for t in range(1, length + 1)] if cot else ["s"]
    return ["P", *(f"x{t}" for t in range(1, length + 1)), "EoI", *answers]


def draw_base(arrays, flags):
    """Accuracies, scores, accuracy by length, and attention on the ideal cells by position."""
    figure, axes = common.panels(4, f"Is {flags.mix or flags.task} learned step by step, and by an iteration head?", flags)
    every = np.ones(len(arrays["seed"]), bool)
    ax = axes[0]
    for key, label, colour in (("accuracy", "all states", BLUE), ("final", "last state", RED), ("eos", "EoS", GREEN)):
        curve(ax, arrays, arrays[key], every, label, colour)
    known = [guesses(flags, task, L) for task in tested(flags) for L in range(1, flags.max_length + 1)]
    shelves = "last state, blind guess", "last state, s known but not x", "all states, L = 1 alone"
    for level, words in zip((*np.mean(known, 0), 1 / flags.max_length), shelves):
        common.shelf(ax, level, f"{words}: {level:.3g}")
    ax.set(xlabel="step", ylabel="accuracy (teacher-forced)", ylim=(-.02, 1.05))
    ax = axes[1]
    layers, heads = arrays["peak_first"].shape[2:]
    ways = [(which, l) for which in ("first", "second") for l in range(layers)]
    for (which, l), colour in zip(ways, (BLUE, SKY, ORANGE, RED, *common.COLOURS)):
        seen = largest(arrays[f"peak_{which}"][:, :, l], 2)
        curve(ax, arrays, seen, every, f"layer {l + 1} on {'EoI' if which == 'first' else 'x_t'}", colour)
    ax.set(xlabel="step", ylabel="share of ideal cells above 0.5" + (", best head" if heads > 1 else ""), ylim=(-.02, 1.05))
    ax = axes[2]
    lengths = arrays["by_length"].shape[2]
    for L in range(1, lengths + 1):
        ax.plot(arrays["step"][0], np.median(arrays["by_length"][:, :, L - 1], 0), color=plt.cm.viridis((L - 1) / lengths),
                lw=1.4,
                label=f"L = {L}" if L in (1, lengths) or L % max(1, lengths // 4) == 0 else None)
    ax.set(xlabel="step", ylabel="accuracy, all states (median of runs)", ylim=(-.02, 1.05))
    ax = axes[3]
    for which, colour, words in (("first", BLUE, "first part: layer attending to EoI"), ("second", RED, "second part: to x_t")):
        x = mean(arrays["cells"][:, ("first", "second").index(which)], 1)  # [R, t]
        common.band(ax, np.arange(x.shape[1]), x.T, words, colour)
    ax.set(xlabel="t (query EoI for t = 0, then s_t)", ylabel="mean attention on the ideal cell", ylim=(-.02, 1.05))
    common.shelf(ax, .5, "counted as peaked above")
    for ax in axes:
        legend(ax)
    return figure


def draw_configurations(arrays, flags):
    """Accuracy and score over training, and accuracy at the end, of every configuration."""
    figure, axes = common.panels(3, f"{flags.study}: what the configurations learn", flags, columns=3, size=(4.6, 4.4))
    every = config_names(arrays, flags)
    score, label = (arrays["A2"], "A2") if "A2" in arrays else (head_of(arrays, "second"), "share of x_t cells above 0.5")
    names = list(dict.fromkeys(every))
    for i, name in enumerate(names):
        colour = common.COLOURS[i % len(common.COLOURS)]
        for ax, values in zip(axes, (arrays["accuracy"], score)):
            curve(ax, arrays, values, every == name, name if len(names) <= 8 else None, colour)
        dots(axes[2], i, arrays["accuracy"][every == name, -1], colour)
    for ax, words in zip(axes, ("accuracy", label)):
        ax.set(xlabel="step", ylabel=words, ylim=(-.02, 1.05))
        legend(ax, 6.5)
    axes[2].set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=6.5)
    axes[2].set(ylabel="accuracy at the end", ylim=(-.03, 1.05))
    return figure


def outline(ax, cells):
    for query, key in cells:
        ax.add_patch(plt.Rectangle((key - .5, query - .5), 1, 1, fill=False, ec=RED, lw=1.1))


def draw_maps(arrays, flags):
    """Mean attention maps of the first run at the largest length, every layer and head, ideal cells outlined."""
    L, H, layers = (int(arrays[k][0]) for k in ("max_length", "n_heads", "n_layers"))
    T = L + 2 + (L if arrays["cot"][0] else 1)
    maps = arrays["maps"][0, :layers, :H, :T, :T]
    figure, axes = common.panels(layers * H, f"Attention at L = {L}, seed {arrays['seed'][0]}, mean over sequences "
                                 "(red: where an iteration head looks)", flags, columns=max(2, H), size=(5.2, 4.8))
    cells, names = ideal(L), names_of(arrays["cot"][0], L)
    for ax, (l, h) in zip(axes, np.ndindex(layers, H)):
        common.image(ax, maps[l, h], f"layer {l + 1}, head {h + 1}", figure, "key", "query", (0, 1))
        if arrays["cot"][0] and l in (0, layers - 1) and layers > 1:
            outline(ax, zip(*(x.tolist() for x in cells["second" if l else "first"])))
        ax.set_xticks(range(len(names)), names, fontsize=6, rotation=90)
        ax.set_yticks(range(len(names)), names, fontsize=6)
    return figure


def graph(ax, maps, before, names, title):
    """The register graph: node (position, layer), an edge for what the upper node reads of the lower, as wide as its attention;
    green where it grew by more than .02 since `before`, red where it shrank, else grey."""
    layers, T, _ = maps.shape
    ax.set_axis_off()
    ax.set_title(title, fontsize=9)
    for l in range(layers):
        query, key = np.nonzero(np.maximum(maps[l], before[l]) > .02)
        change = (maps[l] - before[l])[query, key]
        colours = np.where(change > .02, GREEN, np.where(change < -.02, RED, "#999999"))
        width = np.maximum(maps[l], np.where(maps[l] < before[l], before[l], 0))[query, key]
        lines = [((k, l), (q, l + 1)) for q, k in zip(query, key)]
        ax.add_collection(LineCollection(lines, linewidths=4 * width, colors=colours, alpha=.8))
    x, y = np.meshgrid(range(T), range(layers + 1))
    ax.plot(x.flatten(), y.flatten(), "o", color=BLACK, ms=3)
    for i, name in enumerate(names):
        ax.text(i, -.12, name, ha="center", va="top", fontsize=6.5)
    for l in range(layers + 1):
        ax.text(-.7, l, f"after layer {l}" if l else "embedding", ha="right", va="center", fontsize=6.5)
    ax.set(xlim=(-3.2, T), ylim=(-.35, layers + .1))


def animation(flags, steps, title, draw, rows=1, height=3.2):
    """An animation with one frame for each step: draw(axes, i)."""
    figure, axes = common.panels(rows, title, flags, columns=1, size=(8, height))

    def frame(i):
        for ax in axes:
            ax.clear()
        draw(axes, i)
        figure.suptitle(f"{title}: step {steps[i]}", fontsize=10)
    return figure, len(steps), frame


def draw_graph(arrays, flags):
    """The register graph over training: mean attention of the first run at the largest length, heads averaged."""
    maps = arrays["frames"].mean(2)  # [S, layers, T, T]
    names = names_of(arrays["cot"][0], int(arrays["max_length"][0]))
    return animation(flags, arrays["frame_step"], "Who reads whom (wide: attention; green grew, red shrank)",
                     lambda axes, i: graph(axes[0], maps[i], maps[max(i - 1, 0)], names, ""))


def draw_baselines(arrays, flags):
    """Final accuracy by length with the chain of thought, without, and with one layer."""
    tasks = list(dict.fromkeys(arrays["task"]))
    figure, axes = common.panels(len(tasks),
                                 "What do the chain of thought and the second layer buy? (answer right, medians and runs)",
                                 flags, columns=3, size=(4.2, 3.7))
    for ax, task in zip(axes, tasks):
        f = replace(flags, task=task)
        length = np.arange(1, flags.max_length + 1)
        for cot, layers, colour, label in ((True, 2, BLUE, "chain, two layers: all states"),
                                           (True, 1, ORANGE, "chain, one layer: all states"),
                                           (False, 2, RED, "no chain: the last state")):
            mine = arrays["by_length"][pick(arrays, task=task, cot=cot, n_layers=layers), -1]
            if len(mine):
                ax.plot(length, mine.T, "-", color=colour, lw=.6, alpha=.4)
                ax.plot(length, np.median(mine, 0), "o-", color=colour, ms=4, label=label)
        ax.plot(length, [guesses(f, task, L)[0] for L in length], "--", color="grey", lw=.9,
                label="blind guess of the last state")
        ax.set(xlabel="length L", ylabel="accuracy at the end", ylim=(-.03, 1.05))
        ax.set_title(task, fontsize=9)
        legend(ax, 6.5)
    return figure


WAYS = {"all": (BLUE, "all weights"), "last-block": (RED, "last layer and head"), "second-mlp": (GREEN, "second MLP")}


def draw_transfer(arrays, flags):
    """Steps to 95 % of every transfer against training from scratch, by Lmax; arrows: not reached."""
    pairs = [p for p in dict.fromkeys(zip(arrays["source"], arrays["task"])) if p[0]]
    figure, axes = common.panels(len(pairs), "Steps to 95 % of sequences right after a change of task (arrow: not in its run)",
                                 flags)
    reach = steps_to(arrays["step"], arrays["accuracy"])
    sizes = sorted(set(arrays["max_length"]))
    for ax, (source, task) in zip(axes, pairs):
        for i, L in enumerate(sizes):
            dots(ax, i - .3, reach[pick(arrays, task=task, source="", max_length=L, with_zero=False)], "grey",
                 "from scratch" if not i else None)
            for j, (way, (colour, label)) in enumerate(WAYS.items()):
                mine = pick(arrays, task=task, source=source, max_length=L, train=way)
                dots(ax, i - .1 + .2 * j, reach[mine & ~arrays["with_zero"]], colour, label if not i else None)
                if (mine & arrays["with_zero"]).any():
                    dots(ax, i + .02 + .2 * j, reach[mine & arrays["with_zero"]], colour,
                         "source saw x = 0" if not i and not j else None, "D")
        ax.set_xticks(range(len(sizes)), [f"Lmax {L}" for L in sizes])
        log_steps(ax, arrays, "steps")
        ax.set_title(f"{source} to {task}", fontsize=9)
        legend(ax, 6.5)
    return figure


def draw_transfer_score(arrays, flags):
    """Is the head kept? Share of ideal second-layer cells above 0.5 while all weights learn the second task."""
    pairs = [p for p in dict.fromkeys(zip(arrays["source"], arrays["task"])) if p[0]]
    figure, axes = common.panels(len(pairs), "The look-up of x_t while all weights learn another task", flags)
    for ax, (source, task) in zip(axes, pairs):
        for L, colour in zip(sorted(set(arrays["max_length"])), (SKY, BLUE, BLACK)):
            mine = pick(arrays, task=task, source=source, max_length=L, train="all", with_zero=False)
            curve(ax, arrays, head_of(arrays, "second"), mine, f"Lmax {L}", colour)
        ax.set(xlabel="step of the second training", ylabel="share of ideal cells above 0.5", ylim=(-.02, 1.05))
        ax.set_title(f"{source} to {task}", fontsize=9)
        legend(ax)
    return figure


def share_of(mix, task):
    """The share of a task in the text of a mix."""
    return shares(mix, "--mix", TASKS).get(task, 0.)


def draw_mix(arrays, flags):
    """Accuracy, steps to 95 % and look-up score of each task against its share in training."""
    partners = [p for p in ("copy", "polynomial") if any(f"{p}:" in m for m in arrays["mix"])]
    figure, axes = common.panels(2 * len(partners), "Two tasks at once, told apart by the first token", flags)
    index = {t: i for i, t in enumerate(TASKS)}
    for row, partner in enumerate(partners):
        mine = np.array([f"{partner}:" in m for m in arrays["mix"]])
        for task in ("parity", partner):
            reach = steps_to(arrays["step"], arrays["by_task"][:, :, index[task]])
            score = arrays["peak_by_task"][:, -1, index[task]]
            label = task
            for m, w in dict.fromkeys(zip(arrays["mix"][mine], arrays["weights"][mine])):
                share, these = share_of(m, "parity"), pick(arrays, mix=m, weights=w)
                if share_of(m, task):
                    dots(axes[2 * row], share + (.02 if w else 0), reach[these], COLOUR[task], label, "D" if w else "o")
                    dots(axes[2 * row + 1], share + (.02 if w else 0), score[these], COLOUR[task], label, "D" if w else "o")
                    label = None
        log_steps(axes[2 * row], arrays, "steps to 95 % (arrow: never)")
        axes[2 * row + 1].set(ylabel="share of x_t cells above 0.5, end", ylim=(-.02, 1.05))
        for ax in axes[2 * row:2 * row + 2]:
            ax.set(xlabel="share of parity (diamond: rare task weighted up)")
            ax.set_title(f"parity with {partner}", fontsize=9)
            legend(ax)
    return figure


def draw_scaling(arrays, flags):
    """Medians of accuracy at the largest length, of all lengths, of the look-up score, and steps to 95 %, by width and Lmax."""
    widths, sizes = sorted(set(arrays["d_model"])), sorted(set(arrays["max_length"]))
    rows = [(d, 2) for d in widths] + [(d, 1) for d in widths if pick(arrays, d_model=d, n_layers=1).any()]
    table = {"accuracy, all lengths": arrays["accuracy"][:, -1], "accuracy at L = Lmax": last_length(arrays),
             "share of x_t cells above 0.5": head_of(arrays, "second")[:, -1],
             "steps to 95 % (log10; blank: never)": np.log10(steps_to(arrays["step"], arrays["accuracy"]))}
    figure, axes = common.panels(4, "Width and length: what is learned, and how cleanly?", flags)
    for ax, (title, values) in zip(axes, table.items()):
        grid = np.full((len(rows), len(sizes)), np.nan)
        for i, (d, layers) in enumerate(rows):
            for j, L in enumerate(sizes):
                mine = values[pick(arrays, d_model=d, n_layers=layers, max_length=L)]
                grid[i, j] = np.median(mine) if len(mine) and np.isfinite(np.median(mine)) else np.nan
                if np.isfinite(grid[i, j]):
                    steps = title.startswith("steps")
                    ax.text(j, i, f"{10 ** grid[i, j]:.0f}" if steps else f"{grid[i, j]:.2f}", ha="center", va="center",
                            fontsize=7,
                            color="black" if grid[i, j] > (3 if steps else .6) else "white")
        limits = (2, 4) if title.startswith("steps") else (0, 1)
        common.image(ax, grid, title, figure, "Lmax", "width", limits)
        ax.set_xticks(range(len(sizes)), sizes)
        ax.set_yticks(range(len(rows)), [f"{d}" + (", one layer" if n == 1 else "") for d, n in rows])
    return figure


def last_length(arrays):
    """Final accuracy [R] at each run's largest length."""
    return arrays["by_length"][np.arange(len(arrays["seed"])), -1, arrays["max_length"] - 1]


def draw_batch(arrays, flags):
    """Accuracy and look-up score over steps and over examples."""
    figure, axes = common.panels(4, "Batch size at equal steps and at equal examples", flags)
    for B, colour in zip(sorted(set(arrays["batch"])), (SKY, BLUE, BLACK, RED)):
        mine = pick(arrays, batch=B)
        for i, values in enumerate((arrays["accuracy"], head_of(arrays, "second"))):
            for j, unit in enumerate((1, B)):
                common.band(axes[2 * i + j], arrays["step"][mine][0] * unit, values[mine].T, f"batch {B}", colour)
    for i, ax in enumerate(axes):
        ax.set(xlabel=("step", "examples")[i % 2], xscale="log", ylim=(-.02, 1.05),
               ylabel=("accuracy, all states", "share of x_t cells above 0.5")[i // 2])
        legend(ax)
    return figure


def draw_curriculum(arrays, flags):
    """Accuracy and look-up score over training for each order of lengths."""
    tasks = list(dict.fromkeys(arrays["task"]))
    figure, axes = common.panels(2 * len(tasks), "Does the order of lengths change what is learned?", flags)
    for i, task in enumerate(tasks):
        for order, colour in zip(("shuffled", "sorted", "increasing"), (BLUE, RED, GREEN)):
            for ax, values in zip(axes[2 * i:], (arrays["accuracy"], head_of(arrays, "second"))):
                curve(ax, arrays, values, pick(arrays, task=task, order=order), order, colour)
        for ax, label in zip(axes[2 * i:], ("accuracy, all states", "share of x_t cells above 0.5")):
            ax.set(xlabel="step", ylabel=label, ylim=(-.02, 1.05))
            ax.set_title(task, fontsize=9)
            legend(ax)
    return figure


def draw_positions(arrays, flags):
    """Accuracy and look-up score at the end against the coordinates that positions have, and accuracy by length with one left
    out."""
    tasks = list(dict.fromkeys(arrays["task"]))
    dims = sorted(set(arrays["pos_dim"]) - {0}) + [0]
    out = max(arrays["omit_length"])
    figure, axes = common.panels(4, "Positions: how many coordinates, learned or not; rule or memory?", flags)
    kinds = [(f"{d}" if d else "all", dict(pos_dim=d, freeze_pos=False)) for d in dims]
    kinds.append(("frozen", dict(pos_dim=0, freeze_pos=True)))
    for k, task in enumerate(tasks):
        for i, (_, kind) in enumerate(kinds):
            mine = pick(arrays, task=task, omit_length=0, **kind)
            for ax, values in zip(axes, (arrays["accuracy"][:, -1], head_of(arrays, "second")[:, -1])):
                dots(ax, i + .15 * k, values[mine], COLOUR[task], task if not i else None)
    for ax, label in zip(axes, ("accuracy, all states, end", "share of x_t cells above 0.5, end")):
        ax.set(ylabel=label, ylim=(-.03, 1.05), xlabel="coordinates of positions")
        ax.set_xticks(range(len(kinds)), [name for name, _ in kinds])
        legend(ax)
    for ax, task in zip(axes[2:], tasks):
        for (name, kind), colour in zip(kinds, common.COLOURS):
            mine = pick(arrays, task=task, omit_length=out, **kind)
            if out and mine.any():
                values = arrays["by_length"][mine, -1]
                ax.plot(np.arange(1, values.shape[1] + 1), values.T, color=colour, lw=.6, alpha=.4)
                ax.plot(np.arange(1, values.shape[1] + 1), np.median(values, 0), "o-", color=colour, ms=4,
                        label=f"positions: {name}")
        if out:
            ax.axvline(out, color="grey", ls="--", lw=.8)
            ax.text(out, .02, " left out", fontsize=7, color="grey")
        ax.set(xlabel="length L", ylabel="accuracy, all states", ylim=(-.03, 1.05))
        ax.set_title(task, fontsize=9)
        legend(ax)
    return figure


def draw_longer(arrays, flags):
    """Accuracy, attention on the ideal cells and entropy of their rows, long after the task is learned."""
    figure, axes = common.panels(4, "Do maps get cleaner once the task is learned?", flags)
    kinds = list(dict.fromkeys(zip(arrays["optimiser"], arrays["task"])))
    for (name, task), colour in zip(kinds, (BLUE, RED, SKY, ORANGE)):
        mine = pick(arrays, optimiser=name, task=task)
        seen = (largest(arrays[f"weight_{which}"], (2, 3)) for which in ("second", "first"))
        for ax, values in zip(axes, (1 - arrays["accuracy"], *seen, second_entropy(arrays))):
            curve(ax, arrays, np.maximum(values, 1e-3) if ax is axes[0] else values, mine, f"{task}, {name}", colour)
    for ax, label in zip(axes, ("1 - accuracy (0 is drawn at .001)", "attention on x_t, best head",
                                "attention on EoI, best head",
                                "entropy of the rows that look up x_t, nats")):
        ax.set(xlabel="step", ylabel=label)
        legend(ax)
    axes[0].set(yscale="log")
    return figure


def second_entropy(arrays):
    """entropy_second [R, T] of the head with the most attention on x_t at the end."""
    R, T = arrays["accuracy"].shape
    flat = arrays["weight_second"].reshape(R, T, -1)
    at = np.nan_to_num(flat[:, -1], nan=-1).argmax(-1)
    return arrays["entropy_second"].reshape(R, T, -1)[np.arange(R), :, at]


def draw_circuit(arrays, flags):
    """The interventions: what keeps and what destroys the answers, by task."""
    tasks = list(dict.fromkeys(arrays["task"]))
    figure, axes = common.panels(4, "Interventions on trained models", flags, size=(6, 4))
    names = arrays["done"].tolist()
    ax = axes[0]
    for k, task in enumerate(tasks):
        for i in range(len(names)):
            dots(ax, i + .2 * k, arrays["intervened"][pick(arrays, task=task), i, 1:].mean(-1), COLOUR[task],
                 task if not i else None)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=6.5)
    ax.set(ylabel="all states right, mean over L > 1", ylim=(-.03, 1.05))
    ax = axes[1]
    for k, task in enumerate(tasks):
        mine = pick(arrays, task=task)
        for i, key in enumerate(("follows_state", "follows_input")):
            dots(ax, i + .2 * k, arrays[key][mine], COLOUR[task], task if not i else None)
        for i in (0, 1):
            dots(ax, 2 + i + .2 * k, mean(arrays["moved"][mine, i], (1, 2)), COLOUR[task])
    ax.set_xticks(range(4), ["s_{t-1} replaced:\nF of it follows", "x_t replaced:\nF of it follows",
                             "layer 1 from L':\ntarget moved",
                             "layer 1 from L':\ntarget stayed"], fontsize=6.5)
    common.shelf(ax, .95, ".95: an iteration head")
    ax.set(ylabel="share of cases", ylim=(-.03, 1.05))
    ax = axes[2]
    for k, task in enumerate(tasks):
        mine = pick(arrays, task=task)
        for i in range(2):
            for j in range(3):
                dots(ax, 2 * j + i * .8 + .1 * k, arrays["probes"][mine, i, j], COLOUR[task], task if not (i or j) else None)
    ax.set_xticks([2 * j + i * .8 + .1 for j in range(3) for i in (0, 1)],
                  [f"{a}\n{b}" for a in ("target t", "position", "length") for b in ("before", "after")], fontsize=6.5)
    ax.set(ylabel="share of the query's variance", ylim=(-.03, 1.05))
    ax.set_title("stream of the answering positions, before and after the first MLP", fontsize=8)
    first = arrays["cells"][pick(arrays, task=tasks[0])][:, 1]
    common.image(axes[3], np.median(first, 0), f"{tasks[0]}: attention on x_t by position (t = L + 1: s_L on EoI)", figure,
                 "t", "L", (0, 1), extent=(.5, first.shape[2] + .5, first.shape[1] + .5, .5))
    for ax in axes[:3]:
        legend(ax)
    return figure


def draw_subtraction(arrays, flags):
    """Where the second layer looks from each position, by length, and the state update in the hidden units of the second
    MLP."""
    figure, axes = common.panels(4, "Position subtraction, and the state update", flags, size=(6, 4))
    tasks = list(dict.fromkeys(arrays["task"]))
    for ax, task in zip(axes, tasks[:2]):
        x = arrays["looks"][pick(arrays, task=task)][0]
        common.image(ax, x, f"{task}, seed {arrays['seed'][pick(arrays, task=task)][0]}: key most looked at", figure,
              "position of the query",
              "L (EoI at L + 1)", (0, flags.max_length + 1), extent=(-.5, x.shape[1] - .5, x.shape[0] + .5, .5))
        for L in range(1, len(x) + 1):
            for q in np.flatnonzero(np.isfinite(x[L - 1]))[L + 1:]:  # from EoI on
                key = int(x[L - 1, q])
                ax.text(q, L, key, fontsize=6, ha="center", va="center", color="white" if key == q - L else ORANGE)
    table = arrays["table"][pick(arrays, task=tasks[0])].sum(0)
    with np.errstate(invalid="ignore"):
        common.image(axes[2], table[0] / table[1], f"{tasks[0]}: F right at (s, x), s replaced", figure, "x_t", "s_{t-1}",
                     (0, 1))
    if "parity" in tasks:
        at = np.flatnonzero(pick(arrays, task="parity"))[0]
        points, kind = arrays["pca"][at], arrays["pca_kind"][at]
        for c, (s, x) in enumerate(np.ndindex(2, 2)):
            mine = kind == c
            axes[3].plot(*points[mine].T, "os"[s], color=(BLUE, RED)[x], ms=3, alpha=.5, mew=0,
                         label=f"s={s}, x={x}: {(s + x) % 2}")
        axes[3].set(xlabel="first principal component", ylabel="second")
        axes[3].set_title("parity: hidden units of the second MLP", fontsize=9)
        legend(axes[3])
    return figure


def draw_heads(arrays, flags):
    """Who does the work: peaks of every head, and accuracy with each head's output averaged away."""
    tasks, counts = list(dict.fromkeys(arrays["task"])), sorted(set(arrays["n_heads"]))
    figure, axes = common.panels(2 * len(tasks), "More heads than needed: who does the work?", flags)
    for i, task in enumerate(tasks):
        for j, H in enumerate(counts):
            mine = np.flatnonzero(pick(arrays, task=task, n_heads=H))
            for k, r in enumerate(mine):
                for l, (which, colour) in enumerate((("first", BLUE), ("second", RED))):
                    x = j + .25 * k + .08 * l
                    peaks, left = arrays[f"weight_{which}"][r, -1, l * (arrays["n_layers"][r] - 1), :H], arrays["ablated"][
                        r, l * (arrays["n_layers"][r] - 1), :H]
                    label = f"layer {'1, on EoI' if not l else '2, on x_t'}" if not (j or k) else None
                    axes[2 * i].plot([x] * H, np.sort(peaks), "o-", color=colour, ms=4, lw=.8, label=label)
                    axes[2 * i + 1].plot([x] * H, np.sort(left), "o-", color=colour, ms=4, lw=.8, label=label)
        for ax, label in zip(axes[2 * i:], ("attention on the ideal cell, each head", "accuracy without that head")):
            ax.set_xticks(np.arange(len(counts)) + .25, [f"{H} heads" if H > 1 else "1 head" for H in counts])
            ax.set(ylabel=label, ylim=(-.03, 1.05), xlabel="one column a run")
            ax.set_title(task, fontsize=9)
            legend(ax)
    return figure


def draw_induction(arrays, flags):
    """Loss over its exact floor, the two attention scores, the three memories, and the end of every configuration."""
    figure, axes = common.panels(4, "The induction head: when, and where is another circuit learned?", flags, size=(6, 4.2))
    own = np.array([name == OWN for name in arrays["config"]])
    own = own if own.any() else arrays["config"] == arrays["config"][0]
    curve(axes[0], arrays, arrays["eval_loss"], own, "loss", BLUE)
    for key, words in (("floor", "Bayes"), ("counting", "counting what followed this token")):
        common.shelf(axes[0], arrays[key][own][0], f"{words}: {arrays[key][own][0]:.3f}")
    axes[0].set(xlabel="step", ylabel="loss, nats a token")
    T = flags.seq_length
    base = (sum(1 / t for t in range(1, T + 1)) - 1) / (T - 1)
    for key, label, colour in (("A1", "A1: layer 1 to the token before", BLUE),
                               ("A2", "A2: layer 2 to what followed before", RED)):
        curve(axes[1], arrays, arrays[key], own, label, colour)
    common.shelf(axes[1], base, f"A1 of uniform attention: {base:.2f}")
    for key, label, colour in (("recall_output", "token to its logit", GREEN),
                               ("recall_key", "token to its layer-1 value", RED),
                               ("recall_position", "position to the one before", BLUE)):
        curve(axes[2], arrays, arrays[key], own, label, colour)
    for ax, label in zip(axes[1:3], ("attention", "share of right argmax in the memory")):
        ax.set(xlabel="step (linear up to the first evaluation)", ylabel=label, ylim=(-.03, 1.05))
        ax.set_xscale("symlog", linthresh=arrays["step"][own][0][1])
        ax.set_xlim(0)
    names = list(dict.fromkeys(arrays["config"]))
    for i, name in enumerate(names):
        mine = arrays["config"] == name
        for key, colour, label in (("A1", BLUE, "A1"), ("A2", RED, "A2")):
            dots(axes[3], i, arrays[key][mine, -1], colour, label if not i else None)
        dots(axes[3], i, arrays["follows"][mine], GREEN, "follows a replaced token" if not i else None)
        dots(axes[3], i, (arrays["accuracy"][:, -1] / arrays["ceiling"])[mine], BLACK, "accuracy / Bayes" if not i else None)
    axes[3].set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=6.5)
    axes[3].set(ylabel="at the end", ylim=(-.03, 1.08))
    for ax in axes:
        legend(ax, 6.5)
    return figure


def draw_induction_graph(arrays, flags):
    """The register graph of the induction head over training: one sequence, and the mean over a batch."""
    one, mean = arrays["frames_one"].mean(2), arrays["frames_mean"].mean(2)
    tokens = [str(t) for t in arrays["example"]]

    def draw(axes, i):
        for ax, maps, names, title in ((axes[0], one, tokens, "one sequence (its tokens below)"),
                                       (axes[1], mean, [str(t) for t in range(len(tokens))],
                                        "mean over 256 sequences (positions below)")):
            graph(ax, maps[i], maps[max(i - 1, 0)], names, title)
    return animation(flags, arrays["frame_step"], "Who reads whom (wide: attention; green grew, red shrank)", draw, rows=2,
                     height=2.8)


def draw_memories(arrays, flags):
    """The three memories over training as probabilities (softmax of each row), and their change since the frame before."""
    kinds = [("position", "query position", "key position"), ("key", "token", "key"), ("output", "token", "logit")]
    figure, axes = common.panels(6, "", flags, columns=3, size=(3.4, 3))

    def frame(i):
        for j, (name, rows, columns) in enumerate(kinds):
            now, before = (np.nan_to_num(arrays[f"memory_{name}"][max(i - k, 0)]) for k in (0, 1))
            for ax, x, colours, limits, what in ((axes[j], now, "Greys", (0, 1), ""),
                                                 (axes[3 + j], now - before, "RdYlGn", (-.2, .2), ", change")):
                ax.clear()
                common.image(ax, x, name + what, figure, columns, rows, limits, bar=False, cmap=colours)
        figure.suptitle(f"Three memories as probabilities; below, green grew and red shrank: step {arrays['frame_step'][i]}",
                        fontsize=10)
    return figure, len(arrays["frame_step"]), frame


# ---- Main -----------------------------------------------------------------------------------------------------------

PAPER, NOTES = "Cabannes et al. 2024, Iteration Head", "research notes of that paper"
FRENCH, BIRTH = "research notes on two-layer transformers", "Bietti et al. 2023, Birth of a Transformer"
ORIGINAL, PROTOTYPE, OURS = "original runs of the paper's code", "prototype, one seed", "this project"
OWN = "as it is"  # the name of a study's own configuration


def points_of(flags):
    """The configurations of a study, as dicts of fields."""
    L, few = flags.max_length, flags.smoke
    both = ("polynomial", "parity")
    if flags.study == "circuit":
        return [dict(task=t) for t in TASKS]
    if flags.study == "baselines":
        return [dict(task=t, cot=cot, n_layers=n) for cot, n in ((True, 2), (False, 2), (True, 1)) for t in TASKS]
    if flags.study == "transfer":
        sizes = (L,) if few else (4, 8, 16)
        pairs = (("polynomial", "parity"), ("copy", "parity"), ("parity", "copy"), ("parity", "polynomial"))
        short = max(1, flags.steps // 5)
        scratch = [dict(max_length=n, task=t, with_zero=z, source="", train="all", steps=flags.steps)
                   for n in sizes for t, z in ((both[0], False), (both[1], False), ("copy", False), (both[0], True))]
        child = lambda n, a, b, way, z: dict(max_length=n, task=b, with_zero=z, source=a, train=way, steps=short)
        return scratch + [child(n, a, b, way, False) for n in sizes for a, b in pairs for way in WAYS] + [
            child(n, both[0], both[1], way, True) for n in sizes for way in WAYS]
    if flags.study == "mix":
        mixes = [(f"parity:{a:g},{other}:{1 - a:g}", "") for other in ("copy", "polynomial") for a in (.1, .3, .5, .7, .9)]
        mixes += [(f"parity:{a:g},{other}:{1 - a:g}", w) for other in ("copy", "polynomial")
                  for a, w in ((.1, "parity:9"), (.9, f"{other}:9"))]
        mixes += [("parity:1", ""), ("copy:1", ""), ("polynomial:1", "")]
        return [dict(mix=m, weights=w) for m, w in (mixes[::5] if few else mixes)]
    if flags.study == "scaling":
        if few:
            return [dict(d_model=d, max_length=L, n_layers=2) for d in (4, 8)]
        return [dict(d_model=d, max_length=n, n_layers=2) for n in (4, 8, 12, 16) for d in (8, 16, 24, 64)] + [
            dict(d_model=64, max_length=20, n_layers=2)] + [dict(d_model=64, max_length=n, n_layers=1) for n in (4, 8, 12)]
    if flags.study == "batch":
        sizes = (1, 4 * flags.steps), (4, flags.steps), (16, flags.steps)
        return [dict(batch=b * flags.batch // 4, steps=steps) for b, steps in sizes]
    if flags.study == "curriculum":
        return [dict(task=t, order=order) for order in ("shuffled", "sorted", "increasing") for t in both]
    if flags.study == "positions":
        kinds = [dict(pos_dim=d, freeze_pos=False) for d in (0, 2, 4, 8) if d <= flags.d_model]
        kinds.append(dict(pos_dim=0, freeze_pos=True))
        left = [k for k in kinds if k["pos_dim"] in (0, 8) and not k["freeze_pos"]]
        return [k | dict(task=t, omit_length=0) for k in kinds for t in both] + [
            k | dict(task=t, omit_length=L - 1) for k in left for t in both]
    if flags.study == "longer":
        return [dict(task=t, optimiser=o, lr=lr) for o, lr in (("adam", flags.lr), ("sgd", .03)) for t in both]
    if flags.study == "heads":
        return [dict(n_heads=h, task=t) for h in (1, 2, 4) for t in both]
    if flags.study == "induction":
        own = dict(n_tokens=flags.n_tokens, seq_length=flags.seq_length, d_model=flags.d_model, alpha=flags.alpha,
                   mlp=flags.mlp,
                   norm=flags.norm, optimiser=flags.optimiser, init_scale=flags.init_scale, lr=flags.lr)
        changes = [{}, dict(alpha=0.), dict(alpha=.3), dict(alpha=.6), dict(init_scale=.1), dict(init_scale=3.), dict(mlp=True),
                   dict(norm="layer"), dict(norm="none"), dict(optimiser="sgd", lr=.1), dict(n_tokens=10), dict(d_model=32),
                   dict(d_model=16), dict(d_model=8), dict(seq_length=32), dict(seq_length=64), dict(seq_length=128)]
        return [own | c for c in (changes[:2] if few else changes)]
    return []


SHORT = {"n_tokens": "V", "seq_length": "T", "d_model": "d", "max_length": "Lmax"}  # settings in a figure's names


def config_names(arrays, flags):
    """Every configuration in words, [R] text: the settings in which it differs from the study's own."""
    own = type(flags)(**common.study_defaults(type(flags), flags.study, flags.smoke))
    text = lambda value: str(value) if isinstance(value, (str, bool)) else f"{value:g}"
    return np.array([", ".join(f"{SHORT.get(f, f)}={text(arrays[f][r].item())}" for f in COLUMNS if f not in ("seed", "steps")
                               and arrays[f][r] != getattr(own, f)) or OWN for r in range(len(arrays["seed"]))])


COLUMNS = [f.name for f in fields(Flags) if f.name not in {g.name for g in fields(common.Flags)}] + ["seed", "steps"]


def train_groups(flags, folder, after, given=lambda run, parts: from_checkpoint(run) if run.source else None):
    """Train every configuration of a study. Returns a list of (runs, params, snapshots) and, with one entry a run, settings,
    the curves of what was evaluated (the last value repeated where others were evaluated more often) and after(run, params), a
    dict of numbers that goes into the summary too. given(run, parts): parameters to start from."""
    groups, parts, columns = common.groups_of_runs(flags), [], []
    for i, runs in enumerate(groups):
        sub = folder.sub(i, len(groups))
        state, metrics, snapshots = train(runs, sub, lambda run: given(run, parts))
        curves = {k.removeprefix("eval_"): np.moveaxis(v, 0, 1)
                  for k, v in metrics.items() if k.startswith("eval_") and v.ndim > 1}
        curves["eval_loss"] = curves.pop("loss")
        loss = curves["eval_loss"][:, -1]
        curves = {k: common.blanked(v, loss) for k, v in curves.items()}
        end = {k: common.blanked(v, loss) for k, v in common.stacked(
            [after(run, common.run_of(state["params"], r)) for r, run in enumerate(runs)]).items()}
        sub.result(runs, metrics, {"loss": loss, **end, "accuracy": curves["accuracy"][:, -1]}, snapshots)
        curves["step"] = np.broadcast_to(metrics["eval_step"].astype(float), curves["eval_loss"].shape)
        settings = {f: np.array([getattr(run, f) for run in runs]) for f in COLUMNS}
        known = np.stack([apart(run)[:, 1:] for run in runs]) if flags.study != "induction" else np.zeros((len(runs), 0))
        columns.append((settings | {"loss": loss, **end, "kept_apart": known}, curves))
        parts.append((runs, state["params"], snapshots))
        if folder.interrupted:
            break
    T = max(curves["step"].shape[1] for _, curves in columns)
    longer = lambda x: np.concatenate([x, np.repeat(x[:, -1:], T - x.shape[1], 1)], 1)
    columns = [single | {k: longer(v) for k, v in curves.items()} for single, curves in columns]
    return parts, {k: common.padded([c[k] for c in columns]) for k in columns[0]}


def measured(parts, columns, measure):
    """columns, and the arrays that measure(run, params) returns for every run, stacked."""
    rows = [measure(run, {k: p.nan_to_num(0, 0, 0) for k, p in common.run_of(params, r).items()})
            for runs, params, _ in parts for r, run in enumerate(runs)]
    return columns | {k: common.blanked(v, columns["loss"]) for k, v in common.stacked(rows).items()}


def at_the_end(run, params):
    """The interventions that say whether there is an iteration head, and free-running generation; see `corrupted`,
    `generated`."""
    sets, end = evaluation_sets(run), {"follows_state": math.nan, "follows_input": math.nan}
    if run.cot and run.max_length > 1:
        for what in ("state", "input"):
            rates = [corrupted(run, params, task, by_length, what)[0].nanmean() for task, by_length in sets.items()]
            end[f"follows_{what}"] = float(torch.stack(rates).nanmean())
    return end | {k: float(v) for k, v in generated(run, params, sets).items()}


def compute_levels(flags, folder):
    """The settings and curves of every run, follows_state, follows_input, generated (last state right, free-running), and
    generated_agrees [R]."""
    return train_groups(flags, folder, at_the_end)[1]


def heads_of(run, params, by_length):
    """(layer, head) with the most attention on EoI before the last layer, and on x_t in the last, mean over lengths."""
    total = common.stack(scores(answered(params, tokens, L, run)["maps"], L) for L, tokens in enumerate(by_length, 1))
    first, second = (total[f"weight_{which}"].mean(0) for which in ("first", "second"))
    last = run.n_layers - 1
    return best(first[:last]) if last else best(first), (last, int(second[last].argmax()))


def cells(run, params, by_length):
    """Mean attention on the ideal cells [2, Lmax, Lmax + 1] by length and t = 0 .. L: of the first part from EoI and s_1 .. s_L
    to EoI; of the second part to x_1 .. x_L and, from s_L, one further: to EoI. NaN beyond."""
    first, second = heads_of(run, params, by_length)
    result = torch.full((2, run.max_length, run.max_length + 1), math.nan)
    for L, tokens in enumerate(by_length, 1):
        maps, query = answered(params, tokens, L, run)["maps"], torch.arange(L + 1, 2 * L + 2)
        result[0, L - 1, :L + 1] = maps[first[0]][:, first[1], query, L + 1].mean(0)
        result[1, L - 1, :L + 1] = maps[second[0]][:, second[1], query, query - L].mean(0)
    return result


def right_cells(run, params, by_length):
    """Share [Lmax, Lmax] of sequences of length L whose s_t is right (NaN where t > L)."""
    result = torch.full((run.max_length, run.max_length), math.nan)
    for L, tokens in enumerate(by_length, 1):
        a = answered(params, tokens, L, run)
        right = (a["said"] == a["target"]).float().mean(0)[:-1]
        result[L - 1, :len(right)] = right
    return result


def mean_maps(run, params, tokens):
    """Attention maps [layers, H, T, T] at the largest length, mean over its evaluation sequences."""
    return torch.stack(answered(params, tokens, run.max_length, run)["maps"]).mean(1)


def compute_base(flags, folder):
    """As compute_levels, with cells [R, 2, Lmax, Lmax + 1], right [R, Lmax, Lmax] (see `cells`, `right_cells`), maps [R,
    layers, H, T, T] at L = Lmax and, of the first run, frames [S, layers, H, T, T] at frame_step [S]."""
    parts, columns = train_groups(flags, folder, at_the_end)

    def measure(run, params):
        by_length = next(iter(evaluation_sets(run).values()))
        return {"cells": cells(run, params, by_length) if run.cot else torch.full((2, 1, 2), math.nan),
                "right": right_cells(run, params, by_length), "maps": mean_maps(run, params, by_length[-1])}
    (run, *_), params, snapshots = parts[0]
    steps, tokens = sorted(snapshots, key=int), evaluation_set(run, tested(run)[0], run.max_length)
    frames = [mean_maps(run, common.run_of(p, 0), tokens) for p in ([snapshots[s] for s in steps] or [params])]
    return measured(parts, columns, measure) | {
        "frames": torch.stack(frames), "frame_step": [int(s) for s in steps] or [run.steps], "vocabulary": vocabulary(run)}


def hidden_plane(run, params, by_length, layer):
    """Hidden units of a layer's MLP at answers s_2 .. s_L of parity, on their first two principal components [n, 2], and the
    pair 2 s + x [n] that each combines; 512 of them, evenly picked."""
    units, kinds = [], []
    for L, tokens in enumerate(by_length, 1):
        q = ideal(L)["second"][0][1:]

        def keep(name, x, q=q):
            if name == f"hidden{layer}":
                units.append(x[:, q].flatten(0, 1))
            return x
        answered(params, tokens, L, run, keep)
        kinds.append((2 * (tokens[:, q] - DIGIT) + tokens[:, q - L] - DIGIT).flatten())
    units, kinds = torch.cat(units), torch.cat(kinds)
    few = torch.linspace(0, len(units) - 1, 512).long()
    units = units - units.mean(0)
    return (units @ torch.linalg.svd(units, full_matrices=False)[2][:2].T)[few], kinds[few]


def compute_circuit(flags, folder):
    """As compute_levels, with cells; done [K] and intervened [R, K, Lmax] (see `interventions`), moved [R, 2, Lmax, Lmax],
    probes [R, 2, 3], looks [R, Lmax, positions] (the key that the second part most looks at, by L and query), follows [R, Lmax,
    Lmax] and table [R, 2, s, x] (see `corrupted`), and for parity pca [R, 512, 2], pca_kind [R, 512]."""
    (parts, columns), done = train_groups(flags, folder, at_the_end), []

    def measure(run, params):
        task, by_length = next(iter(evaluation_sets(run).items()))
        first, second = heads_of(run, params, by_length)
        tried = interventions(run, params, by_length, first, second)
        done[:] = tried
        looks = torch.full((run.max_length, run.width), math.nan)
        for L, tokens in enumerate(by_length, 1):
            maps = answered(params, tokens, L, run)["maps"][second[0]][:, second[1]]
            looks[L - 1, :2 * L + 2] = maps.mean(0).argmax(-1).float()
        rate, table = corrupted(run, params, task, by_length)
        plane, kind = hidden_plane(run, params, by_length, second[0])
        return {"cells": cells(run, params, by_length), "intervened": torch.stack(list(tried.values())),
                "moved": moved(run, params, by_length, first, second), "probes": probes(run, params, by_length, first[0]),
                "looks": looks, "follows": rate, "table": table, "pca": plane, "pca_kind": kind}
    return measured(parts, columns, measure) | {"done": done}


def compute_transfer(flags, folder):
    """As compute_levels: first every task from scratch (source is empty), then the transfers, whose `source` names the task
    that their initial parameters were trained on (same Lmax, same seed; with_zero: the polynomial's x could be 0)."""
    def given(run, parts):
        if not run.source:
            return None
        for runs, params, _ in parts:
            for r, old in enumerate(runs):
                if (old.task, old.source, old.max_length, old.with_zero, old.seed) == (
                        run.source, "", run.max_length, run.with_zero, run.seed):
                    return common.run_of(params, r)
    return train_groups(flags, folder, at_the_end, given)[1]


def compute_mix(flags, folder):
    """As compute_levels, with flips [R, tasks, tasks] (see `flipped`)."""
    parts, columns = train_groups(flags, folder, at_the_end)
    none = torch.full((len(TASKS), len(TASKS)), math.nan)
    return measured(parts, columns, lambda run, params: {
        "flips": flipped(run, params, evaluation_sets(run)) if run.cot else none})


def compute_heads(flags, folder):
    """As compute_levels, with ablated [R, layers, H] (see `ablated_heads`)."""
    parts, columns = train_groups(flags, folder, at_the_end)
    return measured(parts, columns, lambda run, params: {"ablated": ablated_heads(run, params, evaluation_sets(run))})


def replaced_token(run, params, fixed):
    """The intervention that makes an induction head: of positions whose token was seen exactly once before, the token that
    followed it is replaced by another; share that then predict that one."""
    tokens = fixed["tokens"]
    g, n, T = common.generator(0, "replace"), *tokens.shape
    t = torch.randint(2, T, (n,), generator=g)
    earlier = (tokens == tokens.gather(1, t[:, None])) & (torch.arange(T) < t[:, None])
    k = earlier.long().argmax(1) + 1
    usable = (earlier.sum(1) == 1) & (k < t)
    rows = usable.nonzero()[:, 0]
    old = torch.stack([tokens[rows, k[rows]], tokens[rows, t[rows]]], 1)
    new = torch.rand(len(rows), run.n_tokens, generator=g).scatter(1, old, -1).argmax(1)
    changed = tokens[rows].clone()
    changed[torch.arange(len(rows)), k[rows]] = new
    said = read(params, changed, run)[0][torch.arange(len(rows)), t[rows]].argmax(-1)
    return {"follows": float((said == new).float().mean())}


def compute_induction(flags, folder):
    """Settings, config (a name), curves step, eval_loss, accuracy (where the token was seen), A1, A2, recall_position,
    recall_key, recall_output [R, T], floor, counting (nats) and ceiling (see `induction_set`), follows (see `replaced_token`)
    [R]; of the first run at frame_step [S]: frames_one and frames_mean [S, layers, H, T, T] (one sequence, `example`; mean over
    256), and memory_position, memory_key, memory_output [S, .., ..] as probabilities."""
    def after(run, params):
        fixed = induction_set(run)
        return {k: float(fixed[k]) for k in ("floor", "counting", "ceiling")} | replaced_token(run, params, fixed)
    parts, columns = train_groups(flags, folder, after)
    run, snapshots, tokens = parts[0][0][0], parts[0][2], induction_set(parts[0][0][0])["tokens"]
    steps = sorted(snapshots, key=int)
    frames = []
    for params in [common.run_of(snapshots[s], 0) for s in steps] or [common.run_of(parts[0][1], 0)]:
        maps = torch.stack(read(params, tokens, run)[1])
        frames.append({"frames_one": maps[:, 0], "frames_mean": maps.mean(1),
                       **{f"memory_{k}": m.softmax(-1) for k, m in memories(run, params).items()}})
    return columns | common.stacked(frames) | {
        "config": config_names(columns, flags), "frame_step": [int(s) for s in steps] or [run.steps], "example": tokens[0]}


def compute_data(flags, folder):
    """Sequences for whoever wants to train another model: tokens [n, 2 Lmax + 3], length [n], mask [n, 2 Lmax + 3] (true where
    the token is to be predicted), and the vocabulary (text [vocab])."""
    _, _, length, tokens, mask = draw(flags, common.generator(flags.seed, "data"), flags.n)
    return {"tokens": tokens, "length": length, "mask": mask, "vocabulary": vocabulary(flags)}


def always(arrays, say, flags):
    """The claim that holds for every run."""
    finite = np.isfinite(arrays["loss"])
    if flags.study == "induction":
        least = np.nanmin((arrays["eval_loss"] - arrays["floor"][:, None])[finite], initial=np.inf)
        say("loss-above-bayes", "no loss lies below that of the Bayes predictor", "Bayes",
            ">= -0.01 nats (256 sequences are a sample)", f"least difference {least:.3g} in {finite.sum()} runs",
            bool(least > -.01) if finite.any() else None, True)
    else:
        agrees = arrays["generated_agrees"][finite]
        say("generated-is-forced", "all answers are right teacher-forced if and only if they are all right generated (an "
            "identity, checked)", "causality", "1 in every run",
            f"{np.min(agrees, initial=1):.4g} at least, in {len(agrees)} runs",
            bool((agrees == 1).all()) if len(agrees) else None, True)


judged = functools.partial(common.judged, always=always, columns=COLUMNS)


def ratio(a, b):
    """a / b of numbers of steps: infinite where only a was never reached, 0 where only b was not, NaN where neither was."""
    with np.errstate(invalid="ignore"):
        return a / b


def votes(agree, *values):
    """agree [R] as numbers, NaN where one of the values is: such a run has no vote."""
    return np.where(np.any(np.isnan(values), 0), np.nan, agree)


def end(arrays, key, **settings):
    """The last entry over training of a curve, or the number, one a seed; a diverged run's is NaN."""
    values = arrays[key] if isinstance(key, str) else key
    values = values[:, -1] if values.ndim > 1 else values
    return by_seed(arrays, np.where(np.isfinite(arrays["loss"]), values, np.nan), **settings)


def reach(arrays, values=None, level=.95):
    """steps_to of the accuracy, NaN for diverged runs."""
    steps = steps_to(arrays["step"], arrays["accuracy"] if values is None else values, level)
    return np.where(np.isfinite(arrays["loss"]), steps, np.nan)


@judged
def judge_base(arrays, say, flags):
    right = end(arrays, "accuracy")
    say("learned", "all states of a polynomial come out right", f"{PROTOTYPE}: 1.00 at step 1050", ">= 0.95 of the sequences",
        right, right >= .95)
    by = by_seed(arrays, reach(arrays, level=.97))
    say("step-750", ".97 of the sequences are right by step 750", PROTOTYPE, "<= 750", by, by <= 750)
    for what, words in (("state", "s_{t-1} replaced: the next token is F(that, x_t)"),
                        ("input", "x_t replaced: the next token is F(s_{t-1}, that)")):
        rate = end(arrays, f"follows_{what}")
        say(f"follows-{what}", f"{words} (an intervention)", f"{PAPER}: the circuit iterates F", ">= 0.95 of cases", rate,
            rate >= .95)
    second, first = end(arrays, head_of(arrays, "second", -1)), end(arrays, head_of(arrays, "first", 0))
    say("second-finds-x", "a head of the last layer puts more than half of its attention on x_t, from nearly every answer",
        f"{PAPER}; {PROTOTYPE}: .98",
        ">= 0.9 of cells", second, second >= .9)
    say("first-finds-EoI", "a head of the first layer puts more than half of its attention on EoI, from nearly every answer",
        PAPER,
        ">= 0.9 of cells", first, first >= .9)
    share = end(arrays, largest(arrays["weight_first"][:, :, 0], 2))
    say("first-mostly-EoI", "in the first layer EoI gets more attention than all other positions together, on average", OURS,
        "> 0.5",
        share, share > .5)
    last = mean(np.diagonal(arrays["cells"][:, 1], 1, 1, 2), 1)
    say("end-by-the-same-rule",
        "s_L looks one further than x_L, at EoI, as the rule of the look-up goes on",
        f'{NOTES}: "a different circuit hidden for a special position"', "mean attention > 0.5", last, last > .5)
    worst = by_seed(arrays, -largest(-arrays["right"], (1, 2)))
    say("no-hole",
        "no answer is left behind: s_t is right for every L and t (each subtraction of positions is an entry of its own)",
        f'{NOTES}: "a different circuit hidden for a special position", "memorize all substractions"; the sentence is ours',
        ">= 0.95 in the worst", worst, worst >= .95)
    head, skill = by_seed(arrays, reach(arrays, head_of(arrays, "second", -1), .5)), by_seed(arrays, reach(arrays, level=.5))
    say("head-first", "half of the look-ups are peaked no later than half of the sequences are right", OURS,
        "ratio of steps <= 1", ratio(head, skill), head <= skill)


@judged
def judge_circuit(arrays, say, flags):
    done = arrays["done"].tolist()
    keep = lambda what, task: end(arrays, arrays["intervened"][:, done.index(what), 1:].mean(-1), task=task)
    no_mlp = dict(first="no first MLP at answers", inputs="no first MLP at inputs", second="no last MLP at answers")
    for task in TASKS:
        what = "input" if task == "copy" else "state"
        rate = end(arrays, f"follows_{what}", task=task)
        say(f"iterates-{task}", f"{task}: the model has an iteration head, replaced "
            + ("x_t are copied" if task == "copy" else "s_{t-1} are continued by F"), PAPER, ">= 0.95 of cases", rate,
            rate >= .95)
    task = "polynomial"
    for id, what, words, source in (
            ("lookup-uniform", "lookup uniform", "uniform attention instead of the look-up of x_t destroys the answers", PAPER),
            ("lookup-late", "lookup one late", "attention on x_{t+1} instead of x_t destroys the answers", OURS),
            ("EoI-uniform", "EoI uniform", "uniform attention in the first layer destroys the answers", PAPER),
            ("subtraction-in-MLP", no_mlp["first"], "without the first MLP at the answers they are destroyed",
             f'{NOTES}: "how the substraction of position embeddings is performed by the first MLP"'),
            ("update-in-MLP", no_mlp["second"], "without the second MLP the answers are destroyed",
             f"{NOTES}: F is performed by the second MLP")):
        left = keep(what, task)
        say(id, f"{task}: {words}", source, "< 0.5 of the sequences right", left, left < .5)
    for id, what, words in (("lookup-ideal", "lookup ideal", "all attention of the look-up put on x_t"),
                            ("EoI-ideal", "EoI ideal", "all attention of the first layer put on EoI")):
        kept = keep(what, task)
        say(id, f"{task}: {words} keeps the answers", PAPER, ">= 0.95 of the sequences right", kept, kept >= .95)
    left = keep(no_mlp["inputs"], task)
    say("inputs-need-no-MLP", f"{task}: the first MLP is not needed at the inputs", OURS, ">= 0.95 of the sequences right",
        left, left >= .95)
    went = end(arrays, mean(arrays["moved"][:, 0], (1, 2)), task=task)
    say("target-moves", f"{task}: what the first layer read, taken from a sequence of length L', moves the look-up by L - L'",
        f"{NOTES}: position subtraction",
        ">= 0.95 of cases", went, went >= .95)
    before, after = (end(arrays, arrays["probes"][:, i, 0], task=task) for i in (0, 1))
    say("target-after-MLP", f"{task}: the target t explains more of the variance of the stream after the first MLP than before",
        f"{NOTES}: subtraction by the first MLP",
        "difference > 0.05", after - before, after - before > .05)


@judged
def judge_baselines(arrays, say, flags):
    for task in TASKS:
        right = end(arrays, "accuracy", task=task, cot=True, n_layers=2)
        say(f"chain-{task}", f"{task} is learned with a chain of thought", PAPER, ">= 0.95", right, right >= .95)
    L = flags.max_length
    last = lambda **s: by_seed(arrays, last_length(arrays), n_layers=2, cot=False, **s)
    blind = guesses(flags, "polynomial", L)[0]
    say("no-chain-polynomial", f"without the chain the polynomial's last state is a blind guess at L = {L}",
        f"{ORIGINAL}: about chance",
        f"< {blind + .05:.3g} (guess {blind:.3g})", last(task="polynomial"), last(task="polynomial") < blind + .05)
    for task in ("parity", "copy"):
        say(f"no-chain-{task}", f"{task} is learned without the chain too",
            "issue of this project" if task == "parity" else OURS, ">= 0.95",
            last(task=task), last(task=task) >= .95)
    for task in TASKS:
        one = by_seed(arrays, last_length(arrays), task=task, cot=True, n_layers=1)
        say(f"one-layer-{task}", f"one layer does not learn {task} with the chain at L = {L}",
            f"{ORIGINAL}: .39 at L = 8 (polynomial)", "< 0.9", one, one < .9)


@judged
def judge_transfer(arrays, say, flags):
    steps, ended = reach(arrays), arrays["steps"][arrays["source"] != ""].max()
    for source, task in (("polynomial", "parity"), ("copy", "parity"), ("parity", "copy"), ("parity", "polynomial")):
        for L in (4, 8, 16):
            new, old = (by_seed(arrays, steps, task=task, source=s, max_length=L, train="all",
                                with_zero=False) for s in (source, ""))
            least = np.where(np.isinf(new), ended, new) / old  # not reached: at least this; never from scratch: 0
            unknown = np.isinf(new) & (least < .5)
            say(f"{source}-to-{task}-{L}", f"Lmax {L}: {task} reaches .95 in less than half of the steps from {source}",
                f"{PAPER}; {ORIGINAL}: 20 epochs against 990", f"ratio < 0.5 (within {ended:.0f} steps; else open)",
                np.where(unknown, np.nan, ratio(new, old)),
                new < .5 * old)
    new = by_seed(arrays, steps, task="parity", source="polynomial", max_length=flags.max_length, train="all", with_zero=False)
    say("prototype-50", "polynomial to parity with all weights reaches .95 within 60 steps", f"{PROTOTYPE}: 1.00 at step 50",
        "<= 60",
        new, new <= 60)
    L = flags.max_length
    for way, words in (("last-block", "last layer and head"), ("second-mlp", "second MLP alone")):
        for zero in (False, True):
            right = end(arrays, "accuracy", task="parity", source="polynomial", max_length=L, train=way, with_zero=zero)
            say(f"{way}{'-zero' * zero}", f"polynomial{' that saw x = 0' * zero} to parity by the {words}",
                f"{PROTOTYPE}: last block .97 at step 75, second MLP .58 at 300", ">= 0.95", right, right >= .95)
    new, old = (end(arrays, "follows_state", task="parity", source=source, max_length=L, train="all", with_zero=False)
                for source in ("polynomial", ""))
    say("reused", "parity learned after the polynomial (all weights) iterates: replaced s_{t-1} are continued by the new F",
        f"{PAPER}: the circuit is reused; from scratch: {common.spread(old)}", ">= 0.95 of cases", new, new >= .95)
    for n in (4, 8, 16):
        before, after = (end(arrays, head_of(arrays, "second"), max_length=n, train="all", with_zero=False, **s)
                         for s in (dict(task="polynomial", source=""), dict(task="parity", source="polynomial")))
        right = end(arrays, "accuracy", max_length=n, train="all", with_zero=False, task="parity", source="polynomial")
        kept = np.where((before >= .5) & (right >= .95), after / before, np.nan)
        say(f"head-kept-{n}", f"Lmax {n}: the look-up of the polynomial survives learning parity with all weights",
            f'{NOTES}: "do we loose the iteration head structure?"', ">= 0.9 of its peaks", kept, kept >= .9)


@judged
def judge_mix(arrays, say, flags):
    index = {t: i for i, t in enumerate(TASKS)}
    for other in ("copy", "polynomial"):
        even = f"parity:0.5,{other}:0.5"
        both = np.minimum(*(end(arrays, arrays["by_task"][:, :, index[t]], mix=even, weights="") for t in ("parity", other)))
        say(f"both-{other}", f"one model learns parity and {other}, told apart by the first token", NOTES, ">= 0.95 of both",
            both, both >= .95)
        steps = np.maximum(*(reach(arrays, arrays["by_task"][:, :, index[t]]) for t in ("parity", other)))
        slower = lambda mix, weights="", steps=steps: by_seed(arrays, steps, mix=mix, weights=weights)
        mixes = [f"parity:{a:g},{other}:{1 - a:g}" for a in (.1, .3, .5, .7, .9)]
        each = np.array([slower(m) for m in mixes])
        which = np.where(np.isfinite(each).any(0), np.nan_to_num(each, nan=np.inf).argmin(0), -1)
        found = np.array([m.split(",")[0][7:] for m in mixes] + ["none"])[which]
        say(f"even-is-best-{other}", f"equal shares learn parity and {other} soonest",
            f'{NOTES}: "optimal data mix"; the sentence is ours', "share of parity 0.5",
            ", ".join(found) + " (share of parity, by seed)", votes(found == "0.5", *each))
        rare, weighted = slower(mixes[0]), slower(mixes[0], "parity:9")
        say(f"weights-help-{other}", f"a tenth of parity with {other} is learned sooner if weighted 9 times",
            f'{NOTES}: "reweight samples in the training loss"',
            "ratio < 1 (never: infinite)", ratio(weighted, rare), weighted < rare)
        peak = arrays["peak_by_task"][:, :, index["parity"]]
        alone, mixed = (end(arrays, peak, mix=m, weights="") for m in ("parity:1", even))
        say(f"mix-forces-{other}", f"with {other} parity gets the look-up more than alone",
            f'{NOTES}: "maybe we will force more to have the circuit we want"',
            "difference > 0.1", mixed - alone, mixed - alone > .1)
    swap = arrays["flips"][:, index["parity"], index["copy"]], arrays["flips"][:, index["copy"], index["parity"]]
    rate = end(arrays, np.minimum(*swap), mix="parity:0.5,copy:0.5", weights="")
    say("token-decides", "with the problem token alone flipped, the next states are the other task's (an intervention)",
        NOTES, ">= 0.95 both ways",
        rate, rate >= .95)


@judged
def judge_scaling(arrays, say, flags):
    at = lambda d, L, layers=2: end(arrays, "accuracy", d_model=d, max_length=L, n_layers=layers)
    for (d, layers), values in GRID.items():
        for L, value in values.items():
            mine, one = at(d, L, layers), layers == 1
            say(f"grid-{d}-{L}" + "-one-layer" * one,
                f"width {d}, Lmax {L}" + ", one layer" * one + f": accuracy {value} within .1",
                ORIGINAL + ", width 62" * (d == 64), f"{value}", mine, np.abs(mine - value) <= .1)
    for L in (4, 8, 12, 16):
        say(f"width-8-fails-{L}", f"width 8 fails at Lmax {L}", ORIGINAL, "< 0.5", at(8, L), at(8, L) < .5)
    clean = end(arrays, head_of(arrays, "second"), d_model=64, max_length=4, n_layers=2), end(
        arrays, head_of(arrays, "second"), d_model=64, max_length=16, n_layers=2)
    say("longer-cleaner", "longer sequences make the look-up cleaner (Lmax 16 against 4)",
        f'{NOTES}: "If the dimension of the sequence are too small"',
        "difference > 0", clean[1] - clean[0], clean[1] > clean[0])


GRID = {(64, 2): {4: .97, 8: .97, 12: .97, 16: .97, 20: .97}, (24, 2): {4: .98, 8: .96, 12: .95, 16: .94},
        (16, 2): {4: .98, 8: .77, 12: .84, 16: .34}, (64, 1): {4: .94, 8: .39, 12: .07}}  # accuracies of the original runs


@judged
def judge_batch(arrays, say, flags):
    small, middle, large = sorted(set(arrays["batch"]))
    at = {b: by_seed(arrays, reach(arrays), batch=b) for b in (small, middle, large)}
    say("large-fewer-steps", f"batch {large} needs fewer steps than batch {small}", OURS, "ratio < 1",
        ratio(at[large], at[small]), at[large] < at[small])
    say("small-fewer-examples", f"batch {small} needs fewer examples than batch {large}", OURS, "ratio < 1",
        ratio(small * at[small], large * at[large]), small * at[small] < large * at[large])
    score = {b: end(arrays, head_of(arrays, "second"), batch=b) for b in (small, large)}
    say("same-head", "the look-up is as clean with small batches as with large ones", OURS, "difference within 0.1",
        score[large] - score[small],
        np.abs(score[large] - score[small]) <= .1)


@judged
def judge_curriculum(arrays, say, flags):
    for task in ("polynomial", "parity"):
        for order in ("sorted", "increasing"):
            new, old = (by_seed(arrays, reach(arrays), task=task, order=o) for o in (order, "shuffled"))
            say(f"{order}-slower-{task}", f"{task}: {order} lengths reach .95 later than shuffled ones",
                f"{NOTES}: curricula; the sentence is ours",
                "ratio > 1 (never: infinite)", ratio(new, old), new > old)
            head = [end(arrays, head_of(arrays, "second"), task=task, order=o) for o in (order, "shuffled")]
            say(f"{order}-same-head-{task}", f"{task}: {order} lengths end with the same look-up as shuffled ones",
                f'{NOTES}: "check if curriculum change what is learned"',
                "difference within 0.1", head[0] - head[1], np.abs(head[0] - head[1]) <= .1)


@judged
def judge_positions(arrays, say, flags):
    base = dict(omit_length=0, freeze_pos=False)
    curves = "accuracy", head_of(arrays, "second", -1), "follows_state"
    right, score, rate = (end(arrays, values, task="parity", pos_dim=0, **base) for values in curves)
    say("parity-learned", "parity alone is learned", f"{ORIGINAL}: .95", ">= 0.95", right, right >= .95)
    say("parity-head", "parity alone also builds the iteration head: replaced states are continued",
        f"{NOTES}; {ORIGINAL}: accuracy .95 with score only .59",
        ">= 0.95 of cases", rate, rate >= .95)
    say("parity-score", "parity alone: the look-up score stays below .8 though the task is learned", f"{ORIGINAL}: .59",
        "< 0.8, accuracy >= 0.95", score, (score < .8) & (right >= .95))
    for task in ("polynomial", "parity"):
        frozen = end(arrays, "accuracy", task=task, omit_length=0, pos_dim=0, freeze_pos=True)
        say(f"frozen-{task}", f"{task} is learned with frozen positions",
            f'{NOTES}: "can we freeze them if the embedding dimension is big enough"', ">= 0.95",
            frozen, frozen >= .95)
        few, many = (end(arrays, head_of(arrays, "second", -1), task=task, pos_dim=d, **base) for d in (8, 0))
        say(f"small-cleaner-{task}", f"{task}: positions of 8 coordinates make a cleaner look-up than of all",
            f'{NOTES}: "maybe we will have a cleaner structure"',
            "difference > 0.02", few - many, few - many > .02)
        out = flags.max_length - 1
        for d, words in ((0, "all coordinates"), (8, "8 coordinates")):
            left = by_seed(arrays, arrays["by_length"][:, -1, out - 1], task=task, pos_dim=d, omit_length=out, freeze_pos=False)
            say(f"rule-{task}-{d or 'all'}",
                f"{task}, {words}: a length left out of training is right, so subtraction is a rule",
                f'{NOTES}: "to find a rule for substraction, rather than memorize"', ">= 0.95 of its sequences", left,
                left >= .95)


@judged
def judge_longer(arrays, say, flags):
    learned = reach(arrays, level=.99)
    at = np.array([np.searchsorted(s, x) if np.isfinite(x) else -1 for s, x in zip(arrays["step"], learned)])
    since = lambda values: np.where(at >= 0, values[:, -1] - values[np.arange(len(at)), at], np.nan)
    for task in ("polynomial", "parity"):
        mine = dict(task=task, optimiser="adam")
        curves = largest(arrays["weight_second"], (2, 3)), second_entropy(arrays)
        more, entropy = (by_seed(arrays, since(values), **mine) for values in curves)
        say(f"cleaner-{task}", f"{task}: after .99 is reached attention on x_t goes on growing",
            f'{NOTES}: "does continuing training make the attention maps cleaner"',
            "difference > 0.02", more, more > .02)
        say(f"sparser-{task}", f"{task}: after .99 is reached the entropy of the look-up's rows goes on falling", NOTES,
            "difference < 0", entropy, entropy < 0)
    for task in ("polynomial", "parity"):
        right = end(arrays, "accuracy", task=task, optimiser="sgd")
        say(f"sgd-{task}", f"{task} is learned by SGD with momentum", OURS, ">= 0.95", right, right >= .95)
    gap = [end(arrays, second_entropy(arrays), task="parity", optimiser=o) for o in ("sgd", "adam")]
    both = (end(arrays, "accuracy", task="parity", optimiser=o) >= .95 for o in ("sgd", "adam"))
    say("sgd-sparser", "parity: SGD ends with sparser maps than Adam, where both learn",
        f'{NOTES}: "sparsity induced bias with SGD"', "difference of entropies < 0",
        *(lambda d: (d, d < 0))(np.where(np.logical_and(*both), gap[0] - gap[1], np.nan)))


@judged
def judge_heads(arrays, say, flags):
    for task in ("polynomial", "parity"):
        for H in (2, 4):
            mine = pick(arrays, task=task, n_heads=H)
            left = np.sort(arrays["ablated"][mine][:, -1, :H], -1)
            say(f"one-looks-up-{task}-{H}",
                f"{task}, {H} heads: only one head of the second layer is needed (the others can be averaged away one by one)",
                f'{NOTES}: "how the work get shared across heads"', "worst < 0.5, others >= 0.95",
                f"accuracy without the worst {common.spread(left[:, 0])}; without the next {common.spread(left[:, 1])}",
                votes((left[:, 0] < .5) & (left[:, 1] >= .95), left[:, 0]))
            one, more = (end(arrays, head_of(arrays, "second", -1), task=task, n_heads=h) for h in (1, H))
            say(f"heads-cleaner-{task}-{H}", f"{task}: with {H} heads the best one looks up more cleanly than a single one",
                f"{NOTES}: too much capacity; the sentence is ours",
                "difference > 0.02", more - one, more - one > .02)
    first, many = (by_seed(arrays, reach(arrays), task="polynomial", n_heads=h) for h in (1, 4))
    say("heads-faster", "polynomial: four heads learn sooner than one", OURS, "ratio < 1", ratio(many, first), many < first)


@judged
def judge_induction(arrays, say, flags):
    get = lambda key, name=OWN: end(arrays, key, config=name)
    at = lambda key, step: by_seed(arrays, arrays[key][:, int(np.searchsorted(arrays["step"][0], step))], config=OWN)
    for key, values, words in (("A1", (.84, .92), "to the token before"), ("A2", (.98, .99), "to what followed before")):
        for step, value in zip((200, 1400), values):
            say(f"{key}-{step}", f"{key} (attention {words}) at step {step} is {value} within .1", PROTOTYPE, f"{value}",
                at(key, step), np.abs(at(key, step) - value) <= .1)
    follows, right = get("follows"), get("accuracy") / get("ceiling")
    say("is-induction-head", "the token that followed earlier replaced: that one is predicted (an intervention)", FRENCH,
        ">= 0.9 of cases", follows, follows >= .9)
    say("near-bayes", "accuracy where the token was seen is within 3 % of the Bayes predictor's", OURS, ">= 0.97 of it", right,
        right >= .97)
    gap = get("eval_loss") - get("counting")
    say("counts-only",
        "its loss is within .03 nats of counting what followed the current token: it does not exclude the successors of others",
        OURS, "difference < 0.03", gap, np.abs(gap) < .03)
    times = [by_seed(arrays, reach(arrays, arrays[f"recall_{k}"], .9), config=OWN) for k in ("output", "key", "position")]
    say("order-of-memories", "memories fill in the order output, key, position (each at .9 no later than the next)", BIRTH,
        "in every seed",
        "; ".join(f"{k} {common.spread(t)}" for k, t in zip(("output", "key", "position"), times)),
        votes((times[0] <= times[1]) & (times[1] <= times[2]) & np.isfinite(times[2]), *times))
    zero, solved = get("A1", "alpha=0"), get("accuracy", "alpha=0")
    say("no-noise-no-A1", "without noise (alpha 0) the task is solved with A1 below .6", f"{PROTOTYPE}: about .35",
        "< 0.6, accuracy >= 0.95", zero, (zero < .6) & (solved >= .95))
    layer = get("A1", "norm=layer") - get("A1")
    say("layernorm-changes", "LayerNorm instead of RMSNorm changes A1 by more than .1",
        f'{FRENCH}: "LayerNorm probably change the picture a little bit"', "> 0.1",
        layer, np.abs(layer) > .1)
    for name in dict.fromkeys(arrays["config"]):
        if name != OWN:
            A1, A2, f = (get(k, name) for k in ("A1", "A2", "follows"))
            say(f"same-circuit:{name.replace(' ', '-')}",
                f"{name}: the same circuit (A1 and A2 at least .7, replaced tokens followed)", f"{FRENCH}, experiment 3",
                "all of A1, A2 >= 0.7, follows >= 0.9",
                f"A1 {common.spread(A1)}; A2 {common.spread(A2)}; follows {common.spread(f)}",
                votes((A1 >= .7) & (A2 >= .7) & (f >= .9), A1))


STUDIES = {
    "base": (compute_base, judge_base, {"base": or_configurations(draw_base), "maps": draw_maps, "graph": draw_graph}),
    "circuit": (compute_circuit, judge_circuit, {"circuit": or_configurations(draw_circuit),
                                                 "subtraction": or_configurations(draw_subtraction)}),
    "baselines": (compute_levels, judge_baselines, {"baselines": or_configurations(draw_baselines)}),
    "transfer": (compute_transfer, judge_transfer, {"transfer": or_configurations(draw_transfer),
                                                    "transfer_score": or_configurations(draw_transfer_score)}),
    "mix": (compute_mix, judge_mix, {"mix": or_configurations(draw_mix)}),
    "scaling": (compute_levels, judge_scaling, {"scaling": or_configurations(draw_scaling)}),
    "batch": (compute_levels, judge_batch, {"batch": or_configurations(draw_batch)}),
    "curriculum": (compute_levels, judge_curriculum, {"curriculum": or_configurations(draw_curriculum)}),
    "positions": (compute_levels, judge_positions, {"positions": or_configurations(draw_positions)}),
    "longer": (compute_levels, judge_longer, {"longer": or_configurations(draw_longer)}),
    "heads": (compute_heads, judge_heads, {"heads": or_configurations(draw_heads)}),
    "induction": (compute_induction, judge_induction, {"induction": or_configurations(draw_induction),
                                                       "induction_graph": draw_induction_graph,
                                                        "memories": draw_memories}),
    "data": (compute_data, lambda arrays, flags: [], {}),
}


def main(argv=None):
    return common.main(Flags, STUDIES, argv)


if __name__ == "__main__":
    raise SystemExit(main())
