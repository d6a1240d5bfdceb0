"""How much faster than a notebook? A benchmark, not a test: `python tests/bench.py [--only addition] [--seconds 2]`.

A workload is trained twice from the same parameters on the same data: by a loop as a notebook has it (nn.Module,
torch.optim, one run after the other, every position computed, loss.item() each step), and by the experiment's own step,
batched over runs and compiled. Both draw their data inside the timed part (only the n-gram
notebook's is drawn beforehand, as notebooks do). First their losses are compared: a ratio of
two different computations would mean nothing. Then they alternate, in one process on one thread, so that a slow spell
of the machine hits both. A ratio is the median over these pairs, in brackets the lowest and the highest. Compile
seconds are those of an empty compiler cache, which is what a first run costs; later runs start from the cache."""
import argparse
import datetime
import itertools
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # numpy's thread, before it is imported

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import exp_addition
import exp_esn_genetic as exp_esn
import exp_gpt2_paths as exp_gpt2
import exp_iteration_head as exp_iteration
import exp_layernorm_landscape as exp_landscape
import exp_ngram_superposition as exp_ngram

# ---- Measuring ------------------------------------------------------------------------------------------------------


def clock(f, *arguments):
    start = time.perf_counter()
    f(*arguments)
    return time.perf_counter() - start


def agree(name, notebook, ours, tolerance=1e-4):
    """Abort unless the first three steps of every run have the same losses in both."""
    a, b = notebook(3), ours(3)
    gap = (a - b).abs().max().item()
    if not gap <= tolerance:
        raise SystemExit(f"{name}: the losses of notebook and ours differ by {gap:.2g}\n{a}\n{b}")


def update(optimiser, loss):
    """What a notebook does with a loss."""
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def in_turns(notebook, ours, chunk, repeats, seconds):
    """Pairs of seconds a step, (notebook(n), ours(chunk) over and over), each measured for about so many seconds."""
    chunks = lambda n: [ours(chunk) for _ in range(n)]
    lasting = lambda f, n: max(n, round(n * seconds / clock(f, n)))
    steps, count = lasting(notebook, 3), lasting(chunks, 1)
    return [(clock(notebook, steps) / steps, clock(chunks, count) / (count * chunk)) for _ in range(repeats)]


def line(name, runs, pairs, compile_seconds=0.):
    """A row from pairs of seconds, (notebook, ours)."""
    theirs, mine = (1e3 * statistics.median(times) / runs for times in zip(*pairs))
    ratios = [a / b for a, b in pairs]
    return (f"| {name} | {runs} | {theirs:.3g} | {mine:.3g} | {statistics.median(ratios):.1f} "
            f"[{min(ratios):.1f}, {max(ratios):.1f}] | {compile_seconds:.0f} |")


# ---- Addition -------------------------------------------------------------------------------------------------------

class AdditionModel(nn.Module):
    """One layer, causal attention, ReLU MLP; no norm, no bias in the attention, untied embeddings."""

    def __init__(self, vocab, positions, d, heads):
        super().__init__()
        matrix = lambda *shape, scale=d ** -.5: nn.Parameter(torch.randn(shape) * scale)
        self.heads = heads
        self.W_E, self.W_pos, self.W_U = matrix(vocab, d), matrix(positions, d), matrix(d, vocab, scale=vocab ** -.5)
        self.W_Q, self.W_K, self.W_V, self.W_O = (matrix(d, d) for _ in range(4))
        self.W_in, self.b_in = matrix(d, 4 * d), nn.Parameter(torch.zeros(4 * d))
        self.W_out, self.b_out = matrix(4 * d, d), nn.Parameter(torch.zeros(d))

    def forward(self, tokens):
        x = self.W_E[tokens] + self.W_pos
        B, T, d = x.shape
        split = lambda y: y.view(B, T, self.heads, d // self.heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(split(x @ self.W_Q), split(x @ self.W_K), split(x @ self.W_V), is_causal=True)
        x = x + mixed.transpose(1, 2).reshape(B, T, d) @ self.W_O
        x = x + F.relu(x @ self.W_in + self.b_in) @ self.W_out + self.b_out
        return x @ self.W_U


def addition_loss(flags, model, ab, all_digits):
    """Cross-entropy at `=` (or of the whole answer, fed back) from digits ab [2D, batch]."""
    D, base = flags.digits, flags.base
    a, b = ab.T.split(D, 1)
    place = base ** torch.arange(D - 1, -1, -1, device=ab.device)
    total = ((a + b) * place).sum(1, keepdim=True)
    sign = lambda token: torch.full((len(a), 1), token, device=ab.device)
    tokens = torch.cat([a, sign(base), b, sign(base + 1)], 1)
    if not all_digits:
        return F.cross_entropy(model(tokens)[:, -1], total[:, 0] // base ** flags.digit % base)
    answer = total // base ** torch.arange(D, -1, -1, device=ab.device) % base
    logits = model(torch.cat([tokens, answer[:, :-1]], 1))
    return F.cross_entropy(logits[:, 2 * D + 1:].flatten(0, 1), answer.flatten())


def limit(program):
    """Seconds that a step needs at least at the rates measured here: its matrix products at the rate of [256, 128] by
    [128, 512], and one pass over its state at the rate of a copy."""
    at = program.row.device
    wait = torch.cuda.synchronize if at.type == "cuda" else lambda: None
    with FlopCounterMode(display=False) as counter:
        program.trial(1)

    def rate(f, amount):
        return amount / min(clock(lambda: [f() for _ in range(20)] and wait()) / 20 for _ in range(30))
    a, b = (torch.randn(*shape, device=at) for shape in ((256, 128), (128, 512)))
    state = torch.cat([x.flatten() for x in leaves(program.state) if x.is_floating_point()])
    return counter.get_total_flops() / rate(lambda: a @ b, 2 * 256 * 128 * 512) + 1 / rate(lambda: state.clone(), 1)


def leaves(x):
    return [leaf for v in x.values() for leaf in leaves(v)] if isinstance(x, dict) else [x]


def row(name, repeats, seconds, each, models, loss_of, drawn, begin, step, constants=None, optimisers=None, compared=True,
              compile=True, **optimiser):
    """A row for runs `each`: loss_of(model, run, t) is the notebook's own loss of a step, drawn(run, t)
    -> data for loss_of(.., data=) what our step t draws: the losses of three steps must agree."""
    flags, runs, at = each[0], len(each), common.device(each[0])
    number = lambda runs: common.numbers(runs, constants)
    first = common.run_of(number(each[:1]), 0)
    held, logs = common.first_step(step, begin(flags), first, at)
    size = common.block_size(flags, begin(flags)["params"], first, held)
    blocks = [each[a:a + size] for a in range(0, runs, size)]
    blocks = [b + b[-1:] * (size - len(b)) for b in blocks]
    program = common.Program(step, common.stack([begin(r) for r in blocks[0]]), number(blocks[0]), logs, at)
    bound = limit(program) * len(blocks)
    with fresh_cache():
        common.NOW.asked, start = False, time.perf_counter()
        failed = compile and program.compile()
        compile_seconds = time.perf_counter() - start
    if failed:
        raise SystemExit(f"no ratio without a compiler: {failed}")
    optimisers = optimisers or [torch.optim.AdamW(m.parameters(), lr=flags.lr, **optimiser) for m in models]

    def notebook(steps, drawn=lambda run, t: None):
        losses = torch.zeros(steps, runs)
        for r, (run, model, optimiser) in enumerate(zip(each, models, optimisers)):
            for t in range(steps):
                losses[t, r] = update(optimiser, loss_of(model, run, t, drawn(run, t)))
        return losses

    def ours(steps):
        return [program(steps)["loss"] for _ in blocks]  # every block goes through the same program
    kept, few = common.to(at, program.state), min(size, runs)
    if compared:
        agree(name, lambda n: notebook(n, drawn)[:, :few], lambda n: program(n)["loss"].T[:, :few])
    common.fill(program.state, kept)
    pairs = in_turns(notebook, ours, common.READ, repeats, seconds)
    share = bound / statistics.median(x for _, x in pairs)
    return line(name, runs, pairs, compile_seconds) + f" {share:.0%} |"


def addition_row(name, repeats, seconds, runs=1, device="cpu", study="digit", **fields):
    """warmup=1 is a constant learning rate, which is what a notebook starts with. The notebook draws by torch.randint, ours
    by its own hashes; for the comparison of losses the notebook gets ours."""
    flags = exp_addition.Flags(sweep=[], warmup=1., device=device, **fields)
    at, everything = common.device(flags), study == "all"
    each = [replace(flags, seed=r, runs=1) for r in range(runs)]
    positions = (3 if everything else 2) * flags.digits + 2
    begin = lambda run: exp_addition.start(run, positions)
    step = exp_addition.step_of(flags, exp_addition.All.loss if everything else exp_addition.digit_loss)
    models = [AdditionModel(flags.vocab, positions, flags.d_model, flags.n_heads).to(at) for _ in each]
    for model, run in zip(models, each):
        model.load_state_dict(begin(run)["params"])

    def loss_of(model, run, t, ab=None):
        ab = torch.randint(flags.base, (2 * flags.digits, flags.batch), device=at) if ab is None else ab
        return addition_loss(flags, model, ab, everything)

    def drawn(run, t):
        return exp_addition.sample(flags, common.key(torch.tensor(run.seed), 0, torch.tensor(t)), flags.batch).to(at)
    return row(name, repeats, seconds, each, models, loss_of, drawn, begin, step, betas=(flags.beta1, flags.beta2),
                     eps=flags.eps, weight_decay=flags.weight_decay)


# ---- N-grams --------------------------------------------------------------------------------------------------------

class NgramModel(nn.Module):
    """Heads as separate nn.MultiheadAttention in a ModuleList; positions enter attention only."""

    def __init__(self, params):
        super().__init__()
        (N, d), H = params["E"].shape, len(params["W_Q"])
        self.E, self.P, self.U = nn.Embedding(N, d), nn.Embedding(2, d), nn.Linear(d, N, bias=False)
        self.heads = nn.ModuleList(nn.MultiheadAttention(d, 1, bias=False, batch_first=True) for _ in range(H))
        self.register_buffer("mask", torch.ones(2, 2).triu(1).bool())
        with torch.no_grad():
            for layer, name in ((self.E, "E"), (self.P, "P"), (self.U, "U")):
                layer.weight.copy_(params[name])
            for h, head in enumerate(self.heads):
                head.in_proj_weight.copy_(torch.cat([params[w][h].T for w in ("W_Q", "W_K", "W_V")]))
                head.out_proj.weight.copy_(params["W_O"][h].T)

    def forward(self, tokens):
        x = self.E(tokens)
        h = x + self.P.weight
        for head in self.heads:
            x = x + head(h, h, h, attn_mask=self.mask, need_weights=False)[0]
        return self.U(x)


def ngram_row(name, repeats, seconds, runs=1, **fields):
    """A look-up table. The notebook's contexts: all, or from a DataLoader over data drawn beforehand, not in the measured
    time; it also takes the accuracy, from a second forward."""
    flags = exp_ngram.Flags(lr=1e-3, device="cpu", next_token="sampled" in fields, **fields)
    each = [replace(flags, seed=r, runs=1) for r in range(runs)]
    models = [NgramModel(exp_ngram.start(run)["params"]) for run in each]
    table, batches = {}, {}
    for run in each:
        number = exp_ngram.number_of(run, torch.float32)
        pairs = torch.stack((number["x1"], number["x2"]), 1)
        answer = number["after"].argmax(0)
        table[run.seed] = number
        if not flags.sampled:
            batches[run.seed] = itertools.repeat((pairs, answer))
            continue
        drawn = torch.multinomial(number["weight"], 200 * flags.sampled, replacement=True)
        data = TensorDataset(pairs[drawn], answer[drawn])
        batches[run.seed] = itertools.chain.from_iterable(itertools.repeat(DataLoader(data, batch_size=flags.sampled)))

    def loss_of(model, run, t, data=None):
        tokens, answer = data or next(batches[run.seed])
        with torch.no_grad():
            (model(tokens)[:, -1].argmax(-1) == answer).float().mean().item()
        return F.cross_entropy(model(tokens)[:, -1], answer)

    def ours(run, t):
        number = table[run.seed]
        seen = exp_ngram.drawn(run, number, torch.tensor(t)) if run.sampled else number
        pairs = torch.stack((seen["x1"], seen["x2"]), 1)
        # how often each answer comes in each context (without drawing: the table's, once)
        count = ((run.sampled or len(pairs)) * seen["weight"] * seen["after"]).round().long()
        answer, at = count.nonzero().T
        times = count[answer, at]
        return pairs[at].repeat_interleave(times, 0), answer.repeat_interleave(times)
    return row(name, repeats, seconds, each, models, loss_of, ours, exp_ngram.start, exp_ngram.step_of(flags),
                     exp_ngram.constants, weight_decay=0.)


# ---- The iteration head ---------------------------------------------------------------------------------------------

class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        h = self.norm1(x)
        mixed = F.scaled_dot_product_attention(*(f(h).unsqueeze(1) for f in (self.q, self.k, self.v)), is_causal=True)
        x = x + self.o(mixed.squeeze(1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class IterationModel(nn.Module):
    """Pre-norm transformer with one head, no biases, learned positions, untied head."""

    def __init__(self, params, layers):
        super().__init__()
        (vocab, d), width = params["E"].shape, len(params["P"])
        self.tokens, self.positions = nn.Embedding(vocab, d), nn.Embedding(width, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d, bias=False), nn.Linear(d, vocab, bias=False)
        with torch.no_grad():
            self.tokens.weight.copy_(params["E"])
            self.positions.weight.copy_(params["P"])
            self.head.weight.copy_(params["U"].T)
            for l, block in enumerate(self.blocks):
                for name in ("q", "k", "v", "o"):
                    getattr(block, name).weight.copy_(params[f"W_{name.upper()}{l}"].T)
                block.up.weight.copy_(params[f"W_in{l}"].T)
                block.down.weight.copy_(params[f"W_out{l}"].T)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def iteration_row(name, repeats, seconds, **fields):
    """The notebook has one sequence in a row, [problem x EoI s] and padding; held-out ones have no loss in either."""
    flags = exp_iteration.Flags(device="cpu", runs=1, sweep=[], **fields)
    model = IterationModel(exp_iteration.start(flags)["params"], flags.n_layers)
    number = common.run_of(common.numbers([flags], exp_iteration.constants), 0)

    def ours(run, t):
        """The sequences of a step of ours, one in a row: inputs, targets of all places, and which of them count."""
        rows, weight = exp_iteration.sample(flags, number, torch.tensor(t))
        S = flags.slots
        inputs, targets, counted = [], [], []
        for k in (0, 1):
            place = torch.where(rows["segment"] == k, rows["position"], 99)
            order = place.argsort(stable=True)[:, :2 * flags.max_length + 2]
            there = place.gather(1, order) < 99
            answer = (order - S).clamp(min=0)
            inputs.append(torch.where(there, rows["token"].gather(1, order), 0))
            targets.append(rows["target"].gather(1, answer))
            counted.append(there & (order >= S) & (weight.gather(1, answer) > 0))
        return [torch.cat(x) for x in (inputs, targets, counted)]

    def drawn():
        """As many, by torch.randint, in the textbook's order."""
        B, n = flags.batch, flags.max_length
        length, x = torch.randint(1, n + 1, (B, 1)), torch.randint(1, flags.modulus, (B, n))
        s = [x[:, 0]]
        for j in range(1, n):
            s.append((s[-1] * x[:, j] + 1) % flags.modulus)
        place = torch.arange(2 * n + 3).expand(B, -1)
        at = lambda values, start: values.gather(1, (place - start).clamp(0, n - 1)) + exp_iteration.DIGIT
        tokens = torch.where(place == 0, 2, torch.where(place <= length, at(x, 1), exp_iteration.EOI))
        answer = torch.where(place <= 2 * length + 1, at(torch.stack(s, 1), length + 2), exp_iteration.EOS)
        tokens = torch.where(place > length + 1, answer, tokens)
        counted = (place > length + 1) & (place <= 2 * length + 2)
        return tokens[:, :-1], tokens[:, 1:], counted[:, 1:]

    def loss_of(model, run, t, data=None):
        tokens, target, counted = data or drawn()
        return F.cross_entropy(model(tokens)[counted], target[counted])
    return row(name, repeats, seconds, [flags], [model], loss_of, ours, exp_iteration.start,
                     exp_iteration.step_of(flags), exp_iteration.constants, weight_decay=0.)


# ---- Landscape ------------------------------------------------------------------------------------------------------

class AssociativeMemory(nn.Module):
    """Logits u_y . N(W e_x), N none or onto the sphere."""

    def __init__(self, W, law, norm, eps):
        super().__init__()
        self.W, self.norm, self.eps = nn.Parameter(W.clone()), norm, eps
        self.register_buffer("E", law["E"].to(W.dtype))
        self.register_buffer("U", law["U"].to(W.dtype))

    def forward(self, x):
        h = self.E[x] @ self.W.T
        if self.norm == "sphere":
            h = h / (h.pow(2).sum(1, keepdim=True) + self.eps).sqrt()
        return h @ self.U.T


def landscape_row(name, repeats, seconds, each):
    """Runs that share a program. A batch's loss is not logged by ours, which logs the exact one: then nothing is compared."""
    params = [exp_landscape.start(run)["params"]["W"] for run in each]
    number = [exp_landscape.constants(run) for run in each]
    models = [AssociativeMemory(W, law, run.norm, run.eps) for run, W, law in zip(each, params, number)]
    law = {run: n["joint"] for run, n in zip(map(str, each), number)}
    x = torch.arange(each[0].n_tokens)
    tables = {run: joint.T.flatten().double() for run, joint in law.items()}

    def loss_of(model, run, t, data=None):
        if not run.batch:
            each = F.cross_entropy(model(x), x % run.n_classes, reduction="none")
            return (law[str(run)].sum(0) * each).sum()
        pair = torch.multinomial(tables[str(run)], run.batch, replacement=True)
        return F.cross_entropy(model(pair // run.n_classes), pair % run.n_classes)
    kinds = {"gd": torch.optim.SGD, "adam": torch.optim.Adam}
    optimisers = [kinds[run.optimiser](model.parameters(), lr=run.lr) for run, model in zip(each, models)]
    return row(name, repeats, seconds, each, models, loss_of, lambda run, t: None, exp_landscape.start,
                     exp_landscape.step_of(each[0]), exp_landscape.constants, optimisers, not each[0].batch)


def rates_row(name, *a, **fields):
    study = exp_landscape.Rates
    base = exp_landscape.Flags(**{**study.defaults, "block": 1000, **fields}, device="cpu", room=study)
    return landscape_row(name, *a, [replace(base, **point) for point in study.points(base)])


def ranking_row(name, *a, d, block, methods):
    study = exp_landscape.Ranking
    base = exp_landscape.Flags(**study.defaults | dict(d_model=d, block=block), device="cpu", room=study)
    ways = map(study.METHODS.get, methods)
    each = [replace(base, optimiser=kind, norm=norm, lr=.1 / (1 if kind == "gd" else d), seed=seed)
            for kind, norm in ways for seed in range(base.runs)]
    return landscape_row(name, *a, each)


class PlaneModel(nn.Module):
    """Learned query over twelve positions, RMS norms without gain, GELU MLP, untied unembedding."""

    def __init__(self, params):
        super().__init__()
        (vocab, d), hidden = params["E"].shape, params["W_in"].shape[1]
        self.tokens, self.positions = nn.Embedding(vocab, d), nn.Embedding(len(params["P"]), d)
        self.query, self.value = nn.Parameter(params["query"].clone()), nn.Linear(d, d, bias=False)
        self.norm = nn.RMSNorm(d, eps=1e-5, elementwise_affine=False)
        self.inner, self.outer, self.head = nn.Linear(d, hidden), nn.Linear(hidden, d), nn.Linear(d, vocab, bias=False)
        with torch.no_grad():
            for parameter, value in ((self.tokens.weight, params["E"]), (self.positions.weight, params["P"]),
                                     (self.value.weight, params["W_V"].T), (self.inner.weight, params["W_in"].T),
                                     (self.inner.bias, params["b_in"]), (self.outer.weight, params["W_out"].T),
                                     (self.outer.bias, params["b_out"]), (self.head.weight, params["U"])):
                parameter.copy_(value)

    def forward(self, x):
        u = self.norm(self.tokens(x) + self.positions.weight)
        attention = (u @ self.query / u.shape[-1] ** .5).softmax(-1)
        h = (attention[..., None] * self.value(u)).sum(1)
        return self.head(h + self.outer(F.gelu(self.inner(self.norm(h)))))


def clusters_row(name, repeats, seconds, count):
    study = exp_landscape.Clusters
    base = exp_landscape.Flags(**study.defaults | dict(sweep=[]), device="cpu", room=study)
    each = [replace(base, seed=seed, runs=1) for seed in range(count)]
    models = [PlaneModel(exp_landscape.plane_start(run)["params"]) for run in each]
    sets = {run.seed: exp_landscape.plane_number(run) for run in each}

    def at(run, index):
        number = sets[run.seed]
        return exp_landscape.plane_tokens(run, number["code"][index], number)
    known = {run.seed: at(run, torch.arange(run.n_train)) for run in each}

    def drawn(run, t):
        key = common.key(sets[run.seed]["seed"], 0, torch.tensor(t))
        return at(run, common.integers(key, run.n_train, run.batch))

    def loss_of(model, run, t, data=None):
        x, y = known[run.seed]
        index = torch.randint(run.n_train, (run.batch,))
        x, y = data or (x[index], y[index])
        return F.cross_entropy(model(x)[:, :run.modulus], y)
    return row(name, repeats, seconds, each, models, loss_of, drawn, exp_landscape.plane_start,
                     exp_landscape.plane_step_of(base), exp_landscape.plane_constants, weight_decay=0.)


# ---- GPT-2 ----------------------------------------------------------------------------------------------------------

class GPT2Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.ln_1, self.ln_2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.c_attn, self.attn_out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.c_fc, self.mlp_out = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        B, T, d = x.shape
        q, k, v = (y.view(B, T, self.heads, d // self.heads).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(d, 2))
        scores = q @ k.transpose(2, 3) / (d // self.heads) ** .5
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        x = x + self.attn_out((scores.softmax(3) @ v).transpose(1, 2).reshape(B, T, d))
        return x + self.mlp_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2Model(nn.Module):
    """GPT-2 from the parameters of exp_gpt2_paths."""

    def __init__(self, params, config):
        super().__init__()
        d = config.n_embd
        self.wte, self.wpe = nn.Embedding(config.vocab_size, d), nn.Embedding(config.n_positions, d)
        self.blocks = nn.ModuleList(GPT2Block(d, config.n_head) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(d)
        names = {"attn.c_attn": "c_attn", "attn.c_proj": "attn_out", "mlp.c_fc": "c_fc", "mlp.c_proj": "mlp_out",
                 "ln_1": "ln_1", "ln_2": "ln_2"}
        own = dict(self.named_parameters())
        with torch.no_grad():
            for key, value in params.items():
                if key.startswith("h."):
                    _, layer, rest = key.split(".", 2)
                    module, kind = rest.rsplit(".", 1)
                    key = f"blocks.{layer}.{names[module]}.{kind}"
                own[key].copy_(value.T if value.dim() == 2 and "blocks" in key else value)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def logits(self, h):
        return self.ln_f(h) @ self.wte.weight.T


def mini_row(name, repeats, seconds, compile):
    study = exp_gpt2.TrainMini
    flags = exp_gpt2.Flags(**study.defaults | dict(runs=1), room=study, device="cpu")
    _, learn, _, config = exp_gpt2.taught(flags)
    model = GPT2Model(exp_gpt2.start(flags)["params"], config)
    rows_at = lambda first: learn[first[:, None] + torch.arange(flags.context + 1)]
    most = len(learn) - flags.context

    def loss_of(model, run, t, rows=None):
        rows = rows_at(torch.randint(most, (flags.batch,))) if rows is None else rows
        logits = model.logits(model(rows[:, :-1])[-1])
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    def drawn(run, t):
        return rows_at(common.integers(common.key(torch.tensor(0), 0, torch.tensor(t)), most, flags.batch))
    optimiser = torch.optim.AdamW(model.parameters(), lr=flags.lr, weight_decay=flags.weight_decay, betas=(.9, .99))
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: float(exp_gpt2.schedule(torch.tensor(t), flags.steps)))
    def clip(*_):
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
    optimiser.register_step_pre_hook(clip)
    optimiser.register_step_post_hook(lambda *_: rate.step())
    return row(name, repeats, seconds, [flags], [model], loss_of, drawn, exp_gpt2.start, exp_gpt2.step_of(flags),
                     exp_gpt2.constants, [optimiser], compile=compile)


def reading_row(name, repeats, positions):
    """One text through random weights of gpt2's shape: states, lens and ranks. The notebook sorts to rank, layer by layer."""
    config = exp_gpt2.Config(12, 12, 768, 1024, 50257)
    params = exp_gpt2.init(config, common.generator(0, "init"))
    model, tokens = GPT2Model(params, config), torch.randint(50257, (positions,), generator=common.generator(0, "eval"))
    own = exp_gpt2.Model(params, config, None, "gpt2")

    @torch.no_grad()
    def notebook():
        states = [h[0] for h in model(tokens[None])]
        final = model.logits(states[-1]).log_softmax(-1)
        chosen, unit = final.argmax(-1), F.normalize(model.wte.weight, dim=-1)
        rank = lambda scores: (scores.argsort(-1, descending=True) == chosen[:, None]).float().argmax(-1)
        rows = []
        for h in states:
            log = model.logits(h).log_softmax(-1)
            kl = F.kl_div(log, final, log_target=True, reduction="none").sum(-1)
            rows.append([kl, rank(log), rank(F.normalize(h, dim=-1) @ unit.T)])
        return rows

    @torch.no_grad()
    def ours():
        return exp_gpt2.decode(torch.stack(exp_gpt2.forward(params, tokens, config)), own)
    kl, rank, cosine = (torch.stack(x) for x in zip(*notebook()))
    found = ours()
    apart = (kl - found["lens_kl"]).abs().max(), (rank != found["lens_rank"]).float().mean(), (
        cosine != found["rank_cosine"]).float().mean()  # by rounding, among 50,257
    if apart[0] > 1e-3 or max(apart[1:]) > .05:
        raise SystemExit(f"{name}: notebook and ours differ by {apart}")
    return line(name, 1, [(clock(notebook), clock(ours)) for _ in range(repeats)])


# ---- Echo state networks --------------------------------------------------------------------------------------------

def esn_row(name, repeats, population, **fields):
    """Score a population on its fitness seeds. The notebook's loop: one network and seed after the other, in float64; W
    is rescaled once for its seeds. The share of the limit: products of matrices of the shapes that are multiplied and
    one sigmoid, each as fast as large ones are."""
    flags = exp_esn.Flags(device="cpu", population=population, room=exp_esn.AnyTask, **fields)
    genes = exp_esn.first_genes(flags, population, common.generator(0, "init"))
    w_in, u, y = (x.double().numpy() for x in exp_esn.data(flags, exp_esn.seeds_of(flags, "fitness")))
    fit, end, N = flags.washout, flags.washout + flags.fit, flags.n_units

    def one(W, w_in, u, y):
        x, X = np.zeros(N), np.empty((len(u), N))
        for t in range(len(u)):
            x = np.tanh(W @ x + w_in * u[t])
            X[t] = x
        mean, level = X[fit:end].mean(0), y[fit:end].mean(0)
        Z = X[fit:end] - mean
        readout = np.linalg.solve(Z.T @ Z + flags.ridge * np.eye(N), Z.T @ (y[fit:end] - level))
        p, target = (X[end:] - mean) @ readout + level, y[end:]
        if flags.task == "memory":
            return sum(np.corrcoef(p[:, k], target[:, k])[0, 1] ** 2 for k in range(p.shape[1]))
        return np.sqrt(((p - target) ** 2).mean()) / target.std()

    def notebook(p=0):
        W = genes[p].double().numpy()
        W = W * (flags.radius / abs(np.linalg.eigvals(W)).max())
        return [one(W, *arguments) for arguments in zip(w_in, u, y)]
    ours = lambda: exp_esn.on_seeds(*exp_esn.networks(genes, flags), flags, "fitness").sum(2)
    apart = np.abs(np.array(notebook()) - ours()[0].numpy()).max()
    if apart > 1e-3:
        raise SystemExit(f"{name}: the scores of notebook and ours differ by {apart:.2g}")
    pairs = [(clock(notebook, i % population) * population, clock(ours)) for i in range(repeats)]
    count = population * len(u)
    a, b, x = torch.randn(512, 512), torch.randn(512, 512).double(), torch.rand(100_000)
    rate = lambda f, work: work / min(clock(f) for _ in range(20))
    single, double = rate(lambda: a @ a, 2 * 512 ** 3), rate(lambda: b @ b, 2 * 512 ** 3)
    sigmoid = rate(lambda: x.sigmoid_(), len(x))
    least = u.shape[1] * (2 * N * N / single + N / sigmoid) + 2 * flags.fit * N * (N + y.shape[2]) / double
    least += 2 * flags.test * N * y.shape[2] / double
    return line(name, count, pairs) + f" {least * count / statistics.median(own for _, own in pairs):.0%} |"


# ---- The table: experiment -> workloads, each a function (repeats, seconds) -> a line ------------------------------------

ROWS = {
    "addition": [
        lambda *a: addition_row("addition 128/4, batch 256", *a, d_model=128, n_heads=4),
        lambda *a: addition_row("addition 16/4, batch 256", *a, d_model=16, n_heads=4),
        lambda *a: addition_row("addition 16/4, batch 256, --block 1", *a, d_model=16, n_heads=4, block=1),
        lambda *a: addition_row("addition 16/4, batch 256", *a, d_model=16, n_heads=4, runs=4),
        lambda *a: addition_row("addition 2/2, batch 256", *a, d_model=2, n_heads=2, runs=64),
        lambda *a: addition_row("addition 128/4, all digits, batch 64", *a, study="all", d_model=128, n_heads=4, batch=64),
    ],
    "ngram": [
        lambda *a: ngram_row("ngram N=10, d=5, H=5, exact", *a, n_tokens=10, d_model=5, runs=16),
        lambda *a: ngram_row("ngram N=10, d=5, H=5, exact, --block 1", *a, n_tokens=10, d_model=5, block=1),
        lambda *a: ngram_row("ngram N=10, d=5, H=5, 512 drawn", *a, n_tokens=10, d_model=5, sampled=512, runs=16),
        lambda *a: ngram_row("ngram N=10, d=5, H=5, 512 drawn, --block 1", *a, n_tokens=10, d_model=5, sampled=512, block=1),
        lambda *a: ngram_row("ngram N=100, d=10, H=5, exact", *a),
        lambda *a: ngram_row("ngram N=100, d=10, H=5, 1024 drawn", *a, sampled=1024),
    ],
    "iteration": [
        lambda *a: iteration_row("iteration d=64, Lmax 8, batch 64", *a),
        lambda *a: iteration_row("iteration d=64, Lmax 16, batch 256", *a, max_length=16, batch=256),
        lambda *a: iteration_row("iteration d=128, Lmax 16, batch 256", *a, d_model=128, max_length=16, batch=256),
    ],
    "landscape": [
        lambda *a: rates_row("landscape, rates, 1,000 settings", *a),
        lambda *a: rates_row("landscape, rates, 1,000 settings, float32", *a, dtype="float32"),
        lambda *a: ranking_row("landscape, ranking d=10, SGD and LN, --block 20", *a, d=10, block=20,
                               methods=("SGD", "LN")),
        lambda *a: ranking_row("landscape, ranking d=10, Adam and Adam+LN, --block 20", *a, d=10, block=20,
                               methods=("Adam", "Adam+LN")),
        lambda *a: ranking_row("landscape, ranking d=100, SGD and LN, --block 4", *a, d=100, block=4,
                               methods=("SGD", "LN")),
        lambda *a: ranking_row("landscape, ranking d=100, Adam and Adam+LN, --block 4", *a, d=100, block=4,
                               methods=("Adam", "Adam+LN")),
        lambda *a: clusters_row("clusters, width 128, batch 32", *a, 16),
    ],
    "gpt2": [
        lambda *a: mini_row("gpt2 mini, batch 16 x 64, eager as by default", *a, compile=False),
        lambda *a: mini_row("gpt2 mini, batch 16 x 64, --compile on", *a, compile=True),
        lambda repeats, seconds: reading_row("gpt2 124M, 64 tokens: states, lens, ranks (a text, not a step)", repeats, 64),
    ],
    "esn": [
        lambda repeats, seconds: esn_row("esn, NARMA10, N=100, 3,000 time steps (a network on a seed, not a step)", repeats, 64,
                                         task="narma10", n_units=100, fit=1800, fitness_seeds=8),
        lambda repeats, seconds: esn_row("esn, memory, N=50, 2,200 time steps, as by default", repeats, 20),
    ],
}

def processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(ROWS), help="one experiment")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: addition with 1 to 10,000 runs")
    parser.add_argument("--seconds", type=float, default=2., help="seconds per measurement [2]")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of measurements [7]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| workload | runs | notebook, ms per run-step | ours, ms per run-step | ratio | compile, s | share of the limit |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    if arguments.device == "cuda":
        for runs in 1, 64, 1000, 10000:
            torch.cuda.reset_peak_memory_stats()
            text = addition_row("addition 16/4, batch 256", arguments.repeats, arguments.seconds, runs, "cuda", d_model=16,
                                n_heads=4)
            print(text, f"peak {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB", flush=True)
        print(torch.cuda.get_device_name())
        return
    for experiment in [arguments.only] if arguments.only else ROWS:
        for measure in ROWS[experiment]:
            print(measure(arguments.repeats, arguments.seconds), flush=True)
    print(f"\n{processor()}, one thread; {datetime.date.today()}; torch {torch.__version__}")


if __name__ == "__main__":
    main()
