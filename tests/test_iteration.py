"""exp_iteration_head: the law by loops, packed rows against whole sequences, the model against numpy, every measure on a known
circuit, a run that learns, transfers, a folder read from outside, every study, verdicts on made-up numbers, bad input."""
import itertools
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common_v1 as common
import exp_iteration_head as exp
from conftest import stopped

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
NAMES, MIX = ("polynomial", "parity", "copy"), "polynomial:0.5,parity:0.3,copy:0.2"
EOS, EOI, DIGIT = 0, 1, 5
g = lambda seed=0: torch.Generator().manual_seed(seed)
sample = lambda flags, first=0: common.tree(lambda x: x[0], exp.sample(flags, g(3), first, 1))  # the rows of one step
sure = lambda tokens, flags: 20. * F.one_hot(tokens, flags.vocab)  # logits of tokens
eoi_of = lambda tokens: (tokens == EOI).long().argmax(1)  # where EoI stands
even = lambda T: torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]  # uniform attention
same = lambda a, b: a.keys() == b.keys() and all(np.array_equal(a[k], b[k], equal_nan=True) for k in a)
induction = lambda **fields: exp.Flags(**{
    **exp.Flags.per_study["induction"], "study": "induction", "n_tokens": 4, "seq_length": 8, **fields})


def made(scale=1., **fields):
    """(flags, parameters) of one small run, gains moved off one."""
    flags = exp.Flags(**{**dict(max_length=4, d_model=8, batch=6, steps=20, modulus=5), **fields})
    noise = lambda p: .3 * torch.randn(p.shape, generator=g(2)) * (p.ndim == 1)
    return flags, {k: scale * (p + noise(p)).double() for k, p in exp.init(flags, g(1)).items()}


def is_uniform(x, values):
    counts = np.array([(x == v).sum().item() for v in values])
    chi2, freedom = ((counts - counts.mean()) ** 2 / counts.mean()).sum(), len(values) - 1
    return counts.sum() == x.numel() and abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


# ---- law ------------------------------------------------------------------------------------------------------------

def states_of(flags, task, x):
    F = {"polynomial": lambda s, v: (s * v + 1) % flags.modulus, "parity": lambda s, v: (s + v) % 2, "copy": lambda s, v: v}
    return list(itertools.accumulate(x, F[task]))


def sequence(flags, task, x):
    """[problem, x .., EoI, s .., EoS, padding] in words, and which of them are to be predicted."""
    s = states_of(flags, task, x)
    prompt, answer = [task, *map(str, x), "EoI"], [*map(str, s if flags.cot else s[-1:]), "EoS"]
    pad = 2 * flags.max_length + 3 - len(prompt + answer)
    return prompt + answer + ["EoS"] * pad, [False] * len(prompt) + [True] * len(answer) + [False] * pad


def follow_the_law(flags, tokens, mask=None):
    """Asserts that tokens [n, 2 Lmax + 3] are sequences; their (task, x)."""
    vocabulary, found = ["EoS", "EoI", *NAMES, *map(str, range(max(2, flags.modulus)))], []
    assert exp.vocabulary(flags) == vocabulary and flags.vocab == len(vocabulary)
    for i, row in enumerate(tokens.tolist()):
        words = [vocabulary[t] for t in row]
        found.append((words[0], tuple(int(w) for w in words[1:words.index("EoI")])))
        expected, predicted = sequence(flags, *found[-1])
        assert words == expected and (mask is None or mask[i].tolist() == predicted)
    return found


@pytest.mark.parametrize("fields", [{}, dict(cot=False), dict(modulus=2, with_zero=True), dict(max_length=1)], ids=str)
def test_sequences_by_hand(fields):
    flags = exp.Flags(**{"mix": MIX, "max_length": 6, **fields})
    task, x, length, tokens, mask = exp.draw(flags, g(), 300)
    found = follow_the_law(flags, tokens, mask)
    assert found == [(NAMES[t], tuple(v[:L])) for t, v, L in zip(task.tolist(), x.tolist(), length.tolist())]
    assert {t for t, _ in found} == set(NAMES) and {len(x) for _, x in found} == set(range(1, flags.max_length + 1))


def test_inputs_lengths_and_tasks_have_their_shares():
    for fields, values in (({}, range(1, 11)), (dict(with_zero=True), range(11)), (dict(task="parity"), range(2))):
        x = exp.draw(exp.Flags(n_eval=10 ** 9, **fields), g(), 2000)[1]  # so many that none is held out
        assert is_uniform(x, values) and is_uniform(x[:, 0], values) and is_uniform(x[:, -1], values)
    rows = exp.sample(exp.Flags(mix="parity:0.2,copy:0.8"), g(), steps=50)
    for problem in rows["token"][rows["position"] == 0].view(-1, 2).T:  # of both sequences of a row
        assert set(problem.tolist()) == {3, 4} and (problem == 3).float().mean().item() == pytest.approx(.2, abs=.03)
    lengths = lambda first=0, **fields: exp.draw_lengths(exp.Flags(**fields), g(first), first, 100)
    shared, omitted, given = lengths(), lengths(omit_length=3), lengths(lengths="2:0.25,8:0.75")
    assert shared.shape == (100, 32, 2) and (shared.sum(-1) == 9).all() and is_uniform(shared[..., 0], range(1, 9))
    assert omitted.shape == (100, 64, 1) and is_uniform(omitted, [1, 2, 4, 5, 6, 7, 8])
    assert set(given.flatten().tolist()) == {2, 8} and (given == 2).float().mean().item() == pytest.approx(.25, abs=.03)
    assert (lengths(lengths="2:1", omit_length=3) == 2).all() and is_uniform(exp.draw(exp.Flags(), g(), 5000)[2], range(1, 9))
    assert (lengths(90, order="sorted", batch=3) == 1 + torch.arange(90, 190)[:, None, None].expand(-1, 3, 1) // 8 % 8).all()
    assert lengths(order="sorted", omit_length=3)[:64:8, 0, 0].tolist() == [1, 2, 4, 5, 6, 7, 8, 1]
    grows = torch.cat([lengths(first, order="increasing", steps=200, batch=400) for first in (0, 100)])[..., 0]
    assert grows.amax(1).tolist() == [min(8, math.ceil(8 * (s + 1) / 100)) for s in range(200)]
    assert is_uniform(grows[100:], range(1, 9)) and is_uniform(grows[40:50], range(1, 5))  # steps 37 .. 49: up to 4


def test_training_never_sees_what_is_evaluated():
    flags = exp.Flags(mix="parity:0.5,polynomial:0.5", max_length=7, n_eval=4, modulus=5)
    trained = set(follow_the_law(flags, exp.draw(flags, g(), 8000)[3]))
    held = lambda task, L, x: exp.held_out(flags, torch.full((len(x),), NAMES.index(task)), x, torch.full((len(x),), L))
    for task, by_length in exp.evaluation_sets(flags).items():
        for L, tokens in enumerate(by_length, 1):
            found, count = follow_the_law(flags, tokens), (4 if task == "polynomial" else 2) ** L
            assert all(t == task and len(x) == L for t, x in found) and len(found) == len(set(found)) == min(count, 4)
            assert torch.equal(tokens, exp.evaluation_set(replace(flags, seed=7, mix="", task="copy"), task, L))
            assert exp.apart(flags)[NAMES.index(task), L] == (count >= 2 * 16 * 4)
            if count >= 2 * 16 * 4:  # what follows x_L does not count
                assert held(task, L, torch.tensor([[*x, *[9] * (7 - L)] for _, x in found])).all() and not trained & set(found)
            else:
                assert set(found) <= trained
    assert abs(held("polynomial", 7, torch.randint(1, 5, (20000, 7), generator=g())).float().mean() - 1 / 16) < .01


# ---- model ----------------------------------------------------------------------------------------------------------

MODELS = [{}, dict(n_heads=2), dict(n_layers=1), dict(n_layers=3), dict(norm="rms"), dict(norm="none"), dict(mlp=False)]
LAWS = [dict(cot=False), dict(cot=False, order="sorted"), dict(order="sorted"), dict(order="increasing"), dict(omit_length=2),
        dict(lengths="1:0.5,4:0.5", n_heads=4), dict(mix=MIX, weights="parity:3,copy:0.5"), dict(max_length=1)]


def by_hand(params, tokens, flags):
    """Logits [T, vocab] and attention maps [layers, H, T, T] of one sequence, in numpy loops."""
    p, T, H = {k: np.asarray(v, float) for k, v in params.items()}, len(tokens), flags.n_heads
    size, gelu = flags.d_model // H, np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)
    scaled = lambda x: x / math.sqrt((x * x).mean() + 1e-5)
    normed = lambda name, x: x if flags.norm == "none" else scaled(x - x.mean() * (flags.norm == "layer")) * p[name]
    stream, maps = [p["E"][token] + p["P"][t] for t, token in enumerate(tokens)], np.zeros((flags.n_layers, H, T, T))
    for l in range(flags.n_layers):
        h = np.array([normed(f"g_attention{l}", x) for x in stream])
        for t, i in itertools.product(range(T), range(H)):
            part = slice(i * size, (i + 1) * size)
            q, k, v = (x @ p[f"W_{name}{l}"][:, part] for name, x in (("Q", h[t]), ("K", h[:t + 1]), ("V", h[:t + 1])))
            e = np.exp(k @ q / math.sqrt(size))
            maps[l, i, t, :t + 1] = e / e.sum()
            stream[t] = stream[t] + maps[l, i, t, :t + 1] @ v @ p[f"W_O{l}"][part]
        if flags.mlp:
            stream = [x + gelu(normed(f"g_mlp{l}", x) @ p[f"W_in{l}"]) @ p[f"W_out{l}"] for x in stream]
    return np.array([normed("g", x) @ p["U"] for x in stream]), maps


@pytest.mark.parametrize("fields", MODELS, ids=str)
def test_the_textbook_model_by_hand(fields):
    flags, params = made(1.5, **fields)
    logits, maps = exp.read(params, tokens := exp.draw(flags, g(), 2)[3][:, :-1], flags)
    for i, row in enumerate(tokens.tolist()):
        for a, b in zip((logits[i], torch.stack(maps)[:, i]), by_hand(params, row, flags)):
            assert np.allclose(a, b, rtol=0, atol=1e-9)
    for t in range(tokens.shape[1]):  # no position sees what it predicts
        other, others = exp.read(params, torch.where(torch.arange(tokens.shape[1]) == t, 9 - tokens, tokens), flags)
        assert torch.equal(logits[:, :t], other[:, :t]) and not torch.equal(logits[:, t], other[:, t])
        assert all(torch.equal(a[:, :, :t], b[:, :, :t]) for a, b in zip(maps, others))
    for name in ("attention0", "heads0", "read0", "mid0", "out0", *(("hidden0", "mlp0") if flags.mlp else ())):
        patch = lambda where, x: x.roll(1, -1) if where == name else x
        assert not torch.allclose(exp.read(params, tokens, flags, patch)[0], logits), name


def unpacked(rows, flags):
    """The sequences behind packed rows [B, W]: tokens, and the weight of each in the loss [n, 2 Lmax + 3]."""
    used, A = rows["segment"] < 2, rows["target"].shape[1]
    tokens, weights = torch.zeros(2, len(used), 2, 2 * flags.max_length + 3).double()
    answers = used & (torch.arange(used.shape[1]) >= used.shape[1] - A)
    at = lambda slots, shift: (slots.nonzero()[:, 0], rows["segment"][slots].long(), rows["position"][slots].long() + shift)
    for x, name, slots, shift in ((tokens, "token", used, 0), (tokens, "target", answers, 1), (weights, "weight", answers, 1)):
        x[at(slots, shift)] = rows[name][slots[:, -rows[name].shape[1]:]].double()
    assert (rows["weight"][~used[:, -A:]] == 0).all()
    return tokens[tokens[..., 0] > 0].long(), weights[tokens[..., 0] > 0]


@pytest.mark.parametrize("fields", MODELS + LAWS, ids=str)
@pytest.mark.parametrize("scale", [1., 5.])
def test_packed_rows_are_whole_sequences(fields, scale):
    """Loss, gradients and momentum of the training step are those of the textbook model on the sequences behind the rows."""
    flags, params = made(scale, optimiser="sgd", **fields)
    tokens, weight = unpacked(rows := sample(flags, 17), flags)
    given = {"parity": 3., "copy": .5} if "weights" in fields else {}
    for (task, x), row in zip(follow_the_law(flags, tokens), weight.tolist()):
        assert row == [given.get(task, 1.) * m for m in sequence(flags, task, x)[1]]
    assert len(tokens) == flags.batch and ((rows["segment"] < 2).all() or not flags.packed or not flags.cot)  # none is wasted
    each = lambda params: F.cross_entropy(exp.read(params, tokens[:, :-1], flags)[0].mT, tokens[:, 1:], reduction="none")
    plain = lambda params: (weight[:, 1:] * each(params)).sum() / weight.sum()
    grads, loss = torch.func.grad_and_value(plain)(params)
    before = {"params": params, **common.sgd_init(params), "m": common.tree(torch.ones_like, params)}
    after, logs = exp.step_of(flags)(before, rows, {"lr": 1., "momentum": .5, "free": dict.fromkeys(params, 1.)})
    assert abs(logs["loss"] - loss) < 1e-9 * (1 + abs(loss))
    for k, p in params.items():
        assert (p - after["params"][k] - .5 - grads[k]).abs().max() < 1e-9 * (1 + grads[k].abs().max()), k
    other = rows | {"token": torch.where((rows["segment"] == 1) & (rows["position"] == 1), 6, rows["token"])}
    a, b = (exp.packed_logits(params, x, flags)[rows["segment"][:, -rows["target"].shape[1]:] == 0] for x in (rows, other))
    assert torch.equal(a, b)  # the first sequence of a row does not see the second


def test_initial_values():
    flags = exp.Flags(d_model=48, init_scale=2., pos_dim=20, max_length=60)
    params, gains = exp.init(flags, g()), dict.fromkeys(("g_attention0", "g_attention1", "g_mlp0", "g_mlp1", "g"), (48,))
    matrices = {f"W_{w}{l}": (48 + 144 * (w == "out"), 48 + 144 * (w == "in")) for w in (*"QKVO", "in", "out") for l in (0, 1)}
    assert {k: tuple(p.shape) for k, p in params.items()} == matrices | gains | {"E": (16, 48), "P": (122, 48), "U": (48, 16)}
    for p in (params[name] for name in (*matrices, "U")):
        assert p.abs().max() <= 2 * len(p) ** -.5 and p.std().item() == pytest.approx(2 * (3 * len(p)) ** -.5, rel=.06)
    assert [x.std().item() for x in (params["E"], params["P"][:, :20])] == pytest.approx([2, 2], rel=.1)
    assert (params["P"][:, 20:] == 0).all() and all((params[k] == 1).all() for k in gains)
    assert not set(exp.init(replace(flags, norm="none"), g())) & set(gains)


# ---- measures -------------------------------------------------------------------------------------------------------

# `read` of a model that says these sequences and looks at no token but EoI
by_heart = lambda by_length: lambda params, tokens, flags, patch=exp.identity: (
    sure(by_length[int(eoi_of(tokens)[0]) - 2][:, 1:tokens.shape[1] + 1], flags), None)


def machine(params, tokens, flags, patch=exp.identity):
    """`read` of an iteration head in plain numbers: layer 1 finds EoI, its MLP subtracts; layer 2 looks up x_t, its MLP: F."""
    (n, T), hot = tokens.shape, lambda key: F.one_hot(key.clamp(0, tokens.shape[1] - 1), tokens.shape[1])[:, None].float()
    at, eoi = torch.arange(T).expand(n, T), eoi_of(tokens)[:, None].expand(n, T)
    first = patch("attention0", hot(eoi))
    found = patch("mid0", patch("read0", first[:, 0] @ torch.arange(T)[:, None].float()))
    target = patch("out0", patch("mlp0", at[..., None] + 1 - found))
    second = patch("attention1", hot(target[..., 0].round().long()))
    seen = (second[:, 0] @ tokens[..., None].float())[..., 0].round().long()
    patch("hidden1", torch.stack([tokens, seen, 0 * seen], -1).float())
    after = exp.update(flags, (tokens[:, :1] - 2).expand(n, T), tokens - DIGIT, seen - DIGIT)
    said = torch.where(seen == EOI, EOS, torch.where(at == eoi, seen - DIGIT, after) + DIGIT)
    said = patch("mlp1", patch("heads1", torch.stack([said, at], -1).float())[..., :1])
    return sure(said[..., 0].round().long().clamp(0, flags.vocab - 1), flags), [first, second]


def test_small_measures():
    a = {"said": torch.tensor([[1, 2, 0], [1, 3, 0], [9, 3, 0], [9, 2, 5]]), "target": torch.tensor([[1, 2, 0]] * 4)}
    assert exp.accuracy(a).tolist() == [.25, .5, .75]  # all states, last state, EoS
    share = lambda *values: exp.explained(torch.tensor(values)[:, None], torch.tensor([0, 0, 1, 1]))
    assert [share(1., 1, 3, 3), share(0., 2, 0, 2)] == [1, 0] and share(0., 2, 4, 6) == pytest.approx(16 / 20)
    assert np.array_equal(exp.mean(np.array([[1, np.nan, 3], [np.nan] * 3]), 1), [2, np.nan], equal_nan=True)
    step, value = np.array([[0, 10, 20, 30]] * 3), np.array([[.1, .96, .5, .97], [0, .94, .9, .95], [0, .1, .2, np.nan]])
    assert exp.steps_to(step, value).tolist() == [10, 30, np.inf] and exp.steps_to(step, value, .1).tolist() == [0, 10, 10]
    x, at, rows = torch.randn(5, 4, 4, 4, generator=g()), torch.tensor([1, 3]), torch.rand(2, 4, generator=g())
    mean, told = x.clone(), x.clone()
    mean[:, at], told[:, 2, at] = x[:, at].flatten(0, 1).mean(0), rows
    for patch, name, other, expected in ((exp.averaged("mlp0", at), "mlp0", "mlp1", mean),
                                         (exp.replaced(1, 2, at, rows), "attention1", "attention0", told)):
        assert torch.allclose(patch(name, x), expected) and patch(other, x) is x
    two = np.array([.1, .2, .7, .4]).reshape(1, 1, 2, 2).repeat(2, 1)  # [R, T, layers, H]
    a = {"n_layers": np.array([1, 2]), "max_length": np.array([2, 3]), "seed": np.array([1, 0]), "accuracy": np.ones((2, 2)),
         "peak_first": common.padded([np.full((1, 2, 1, 2), .3), two]), "by_length": np.arange(12.).reshape(2, 2, 3),
         "weight_second": np.stack([two[0], two[0, :, ::-1]]), "entropy_second": np.arange(16.).reshape(2, 2, 2, 2)}
    assert [exp.head_of(a, "first", l)[:, -1].tolist() for l in (None, 0, -1)] == [[.3, .7], [.3, .2], [.3, .7]]
    assert exp.last_length(a).tolist() == [4, 11] and common.by_seed(a, exp.last_length(a)).tolist() == [11, 4]
    assert exp.second_entropy(a).tolist() == [[2, 6], [8, 12]]  # at the end head (1, 0) looks most, then (0, 0)


def test_scores_and_heads_of_known_maps(monkeypatch):
    assert [x.tolist() for cell in exp.ideal(2).values() for x in cell] == [[4, 5], [3, 3], [3, 4], [1, 2]]  # P x1 x2 EoI s1 s2
    ideal = {which: F.one_hot(torch.zeros(8).long().index_put((q,), k), 8).float() for which, (q, k) in exp.ideal(3).items()}
    maps = [torch.stack([torch.stack(heads) for heads in layer]) for layer in (  # [n = 4, H = 2, T, T]
        [(ideal["first"], even(8))] * 3 + [(even(8), even(8))], [(ideal["second"], .5 * ideal["second"])] * 4)]
    s = {k: v.numpy() for k, v in exp.scores(maps, 3).items()}
    assert np.allclose(s["peak_first"], [[.75, 0], [0, 0]]) and np.allclose(s["peak_second"], [[0, 0], [1, 0]])
    for which, queries, other in (("first", (5, 6, 7), [0, 0]), ("second", (4, 5, 6), [1, .5])):
        weight, entropy = (np.mean([f(q + 1) for q in queries]) for f in (lambda n: 1 / n, math.log))
        share = np.array([.75 * (which == "first") + .25 * weight, weight])
        assert np.allclose(s[f"weight_{which}"], [share, other]) and np.allclose(s[f"entropy_{which}"][0, 1], entropy)
    assert s["entropy_second"][1, 0] == 0 and np.allclose(s["entropy_first"][0, 0], .25 * np.log([6, 7, 8]).mean())
    layers = lambda eoi, x: {"maps": [torch.cat(pair, 1) for pair in ((x, x), (.5 * eoi, eoi), (.5 * x, 2 * eoi))]}
    monkeypatch.setattr(exp, "answered", lambda params, x, L, run: layers(*machine(params, x[:, :2 * L + 2], run)[1]))
    sets = exp.evaluation_sets(flags := exp.Flags(n_layers=3, n_heads=2, max_length=3))
    assert exp.heads_of(flags, None, sets["polynomial"]) == ((1, 1), (2, 0))  # x_t is looked up in the last layer, EoI before


@pytest.mark.parametrize("cot", [True, False])
def test_a_model_that_knows_the_answers(monkeypatch, cot):
    by_length = exp.evaluation_sets(flags := made(cot=cot)[0])["polynomial"]
    monkeypatch.setattr(exp, "read", knows := by_heart(by_length))
    a = exp.answered(None, by_length[2], 3, flags)
    assert a["target"].shape[1] == (4 if cot else 2) and (a["target"][:, -1] == EOS).all() and (a["target"][:, :-1] > 4).all()
    assert exp.accuracy(a).tolist() == [1, 1, 1] and 0 <= a["loss"] < 1e-6
    assert exp.generated(flags, None, {"polynomial": by_length}) == {"generated": 1, "generated_agrees": 1}
    whole = lambda tokens: tokens.shape[1] == (2 * eoi_of(tokens)[0] if cot else eoi_of(tokens)[0] + 2)
    monkeypatch.setattr(exp, "read", lambda params, tokens, flags, *rest: (  # wrong on the way there
        knows(params, tokens, flags) if whole(tokens) else (sure(0 * tokens, flags), None)))
    assert exp.generated(flags, None, {"polynomial": by_length}) == {"generated": 0, "generated_agrees": 0}


def test_evaluation_of_a_model_that_knows_some(monkeypatch):
    """Parity is right up to L = 3, the polynomial never; the heads look as they should at both."""
    sets = exp.evaluation_sets(flags := made(mix="polynomial:0.5,parity:0.5")[0])
    wrong = lambda tokens: 9 * ((tokens[:, :1, None] != 3) | (tokens.shape[1] > 9))
    monkeypatch.setattr(exp, "read", lambda params, tokens, flags, patch: machine(
        params, tokens, flags, lambda name, x: (wrong(tokens) - x).abs() if name == "mlp1" else x))
    cells = [[1.] * L + [np.nan] * (4 - L) for L in (1, 2, 3)] + [[0.] * 4]
    assert np.array_equal(exp.right_cells(flags, None, sets["parity"]), cells, equal_nan=True)
    e = {k: v.tolist() for k, v in exp.evaluate(flags, None, sets).items()}
    assert e["by_length"] == e["final_by_length"] == e["eos_by_length"] == [.5, .5, .5, 0]
    assert e["accuracy"] == e["final"] == e["eos"] == .375 and e["loss"] > 10
    assert np.array_equal([e["by_task"], e["peak_by_task"]], [[0, .75, np.nan], [1, 1, np.nan]], equal_nan=True)
    assert e["peak_first"] == e["weight_first"] == [[1], [pytest.approx(25 / 48)]]  # s_L looks up EoI: a 1 / L of the cells
    assert e["peak_second"] == e["weight_second"] == [[0], [1]] and e["entropy_second"] == [[0], [0]]


@pytest.mark.parametrize("task, what", list(itertools.product(NAMES, ("state", "input"))))
def test_an_iteration_head_goes_on_from_what_is_replaced(monkeypatch, task, what):
    by_length, calls = exp.evaluation_sets(flags := made(task=task)[0])[task], []
    monkeypatch.setattr(exp, "read", lambda params, tokens, *rest: (calls.append(tokens), machine(params, tokens, flags))[1])
    rate, table = exp.corrupted(flags, None, task, by_length, what)
    some = torch.ones(4, 4).tril().bool() & (torch.arange(4) > 0)  # t = 2 .. L
    some &= (task, what) != ("copy", "state")  # there another state changes nothing
    assert torch.equal(~rate.isnan(), some) and (rate[some] == 1).all()
    assert torch.equal(table[0], table[1]) and table[1].sum() == sum(map(len, calls))
    values = range((task, what) == ("polynomial", "input"), 5 if task == "polynomial" else 2)
    for (L, t), new in zip(((n, t) for n in range(2, 5) for t in range(2, n + 1)), calls, strict=True):
        differ = new != by_length[L - 1][:, :L + 1 + t]
        assert differ.nonzero()[:, 1].tolist() == [L + t if what == "state" else t] * len(new)
        assert set((new[differ] - DIGIT).tolist()) <= set(values)
    monkeypatch.setattr(exp, "read", by_heart(by_length))
    assert (exp.corrupted(flags, None, task, by_length, what)[0][some] == 0).all()


def test_the_problem_token_decides(monkeypatch):
    flags, as_parity = made(mix="parity:0.5,copy:0.5")[0], lambda x: torch.cat([torch.full_like(x[:, :1], 3), x[:, 1:]], 1)
    monkeypatch.setattr(exp, "read", machine)
    rates = exp.flipped(flags, None, sets := exp.evaluation_sets(flags))
    assert np.array_equal(rates, [[np.nan] * 3, [np.nan, 1, 1], [np.nan, 1, 1]], equal_nan=True)
    monkeypatch.setattr(exp, "read", lambda params, tokens, *rest: machine(params, as_parity(tokens), *rest))
    (parity, to_copy), (to_parity, copy) = exp.flipped(flags, None, sets)[1:, 1:]
    assert parity == to_parity == 1 and to_copy == 0 and 0 < copy < 1


DONE = {"untouched": 1, "lookup ideal": 1, "lookup uniform": 0, "lookup one late": 0, "EoI ideal": 1, "EoI uniform": 0,
        "no first MLP at answers": 0, "no first MLP at inputs": 1, "no last MLP at answers": 0}  # do answers stay right?


def test_interventions_on_a_known_circuit(monkeypatch):
    by_length = exp.evaluation_sets(flags := exp.Flags(max_length=5, d_model=2, n_heads=2))["polynomial"]
    monkeypatch.setattr(exp, "read", machine)
    rates = {k: v.tolist() for k, v in exp.interventions(flags, None, by_length, (0, 0), (1, 0)).items()}
    assert list(rates) == list(DONE) and rates["lookup one late"][0] == 1  # at L = 1 there is no later one
    for name, right in DONE.items():
        assert rates[name] == [1.] * 5 if right else max(rates[name][2:]) < .2, name
    (heard, early), (loud, late) = exp.ablated_heads(flags, None, {"polynomial": by_length})
    assert heard == early == late == 1 and loud < .1
    seen, known = exp.cells(flags, None, by_length), torch.ones(2, 5, 6).tril(1).bool()
    assert (seen[known] == 1).all() and seen[~known].isnan().all()
    share = exp.probes(flags, None, by_length, 0)  # [before, after the MLP; target, position, length]
    assert share[0, 2] == pytest.approx(1) and share[1, 0] == pytest.approx(1) and (share < .99).sum() == 4
    points, kind = exp.hidden_plane(flags, None, exp.evaluation_sets(replace(flags, task="parity"))["parity"], 1)
    corners, square = torch.stack([points[kind == c].mean(0) for c in range(4)]), torch.cartesian_prod(*[torch.arange(2.)] * 2)
    assert points.shape == (512, 2) and all(points[kind == c].std(0).max() < 1e-5 for c in range(4))
    assert torch.allclose(torch.cdist(corners, corners), torch.cdist(square, square), atol=1e-5)  # of (s, x), turned
    deaf = lambda params, tokens, flags, patch: machine(params, tokens, flags, lambda name, x: (patch(name, x), x)[1])
    possible = [[L != M and any(2 <= q - L <= L and 2 <= q - M <= min(L, M) for q in range(11)) for M in range(1, 6)]
                for L in range(1, 6)]  # a query that is a state in sequences of length L and M, and finds an x for M in L
    for read, rates in ((deaf, [0, 1]), (machine, [1, 0])):
        monkeypatch.setattr(exp, "read", read)
        for moved, rate in zip(exp.moved(flags, None, by_length, (0, 0), (1, 0)), rates):
            assert (~moved.isnan()).tolist() == possible and (moved[~moved.isnan()] == rate).all()


@pytest.mark.parametrize("task, with_zero", list(itertools.product(NAMES, (False, True))))
def test_guesses_by_enumeration(task, with_zero):
    flags, values = exp.Flags(modulus=5, with_zero=with_zero), range(not with_zero, 5) if task == "polynomial" else range(2)
    for L in range(1, 5):
        pairs = [([None] + states_of(flags, task, x))[-2:] for x in itertools.product(values, repeat=L)]
        often = lambda some: max(some.count(s) for s in set(some)) / len(pairs)
        informed = sum(often([s for p, s in pairs if p == before]) for before in {p for p, _ in pairs}) if L > 1 else 1
        assert exp.guesses(flags, task, L) == pytest.approx((often([s for _, s in pairs]), informed))


def test_the_induction_law():
    rows = sample(induction(alpha=0., batch=500))
    assert torch.equal(rows["target"][:, :-1], rows["token"][:, 1:]) and (rows["weight"] == 1).all()
    for row in (tokens := torch.cat([rows["token"], rows["target"][:, -1:]], 1)).tolist():
        follower = dict(zip(row, row[1:]))
        assert all(follower[x] == y for x, y in zip(row, row[1:])) and len(set(follower.values())) == len(follower)
    assert is_uniform(tokens[:, 0], range(4)) and is_uniform(tokens[:, 1], range(4))
    tokens = sample(induction(alpha=.2, batch=60, seq_length=250))["token"].long()
    counts = torch.zeros(60, 4, 4).index_put_((torch.arange(60)[:, None], tokens[:, :-1], tokens[:, 1:]), torch.ones(()), True)
    assert (counts.amax(-1).sum() / counts.sum()).item() == pytest.approx(.8 + .2 / 4, abs=.015)


@pytest.mark.parametrize("alpha", [0., .2, 1.])
def test_posterior_against_all_permutations(alpha):
    V, tokens = 4, sample(induction(alpha=alpha, batch=20))["token"].long()
    law = lambda follower, y: alpha / V + (1 - alpha) * (follower == y)
    for row, *found in zip(tokens.tolist(), *(exp.posterior(tokens, alpha, V, alone) for alone in (False, True))):
        for t, x in enumerate(row):
            weights, guess = dict.fromkeys(itertools.permutations(range(V)), 1.), np.ones(V)  # of any pair; of one
            for a, b in zip(row[:t], row[1:t + 1]):
                weights = {pi: w * law(pi[a], b) for pi, w in weights.items()}
                guess *= [law(y, b) if a == x else 1 for y in range(V)]
            for p, w, follower in ((found[0], weights.values(), [pi[x] for pi in weights]), (found[1], guess, range(V))):
                expected = [sum(v * law(f, y) for v, f in zip(w, follower)) / sum(w) for y in range(V)]
                assert np.allclose(p[t], expected, atol=1e-9) and p[t].sum().item() == pytest.approx(1)


def induct(params, tokens, flags, patch=exp.identity):
    """`read` that says what followed the last earlier copy; its attention is uniform."""
    follower = lambda row, t: next((row[k] for k in range(t, 0, -1) if row[k - 1] == row[t]), row[t])
    said = torch.tensor([[follower(row, t) for t in range(len(row))] for row in tokens.tolist()])
    return sure(said, flags), [even(tokens.shape[1]).expand(len(tokens), 1, -1, -1)] * 2


def test_an_induction_head_is_recognised(monkeypatch):
    fixed, params = exp.induction_set(flags := induction(alpha=0., n_tokens=8, seq_length=12)), exp.init(flags, g())
    assert fixed["seen"].tolist() == [[x in row[:t] for t, x in enumerate(row)] for row in fixed["tokens"].tolist()]
    p = exp.posterior(fixed["tokens"], 0., 8).gather(-1, fixed["target"][..., None])
    assert fixed["floor"].item() == pytest.approx(-p.log().mean().item()) and fixed["counting"] > fixed["floor"] > .1
    monkeypatch.setattr(exp, "read", induct)
    found = exp.evaluate_induction(flags, params, fixed)
    assert found["accuracy"] == fixed["ceiling"] == 1 and found["loss"] > fixed["floor"]
    assert found["A1"].item() == pytest.approx((sum(1 / t for t in range(1, 13)) - 1) / 11)  # uniform
    assert exp.replaced_token(flags, params, fixed) == {"follows": 1}
    monkeypatch.setattr(exp, "read", lambda params, tokens, *rest: (sure(tokens, flags), None))
    assert exp.replaced_token(flags, params, fixed) == {"follows": 0}


def test_attention_scores_and_memories_by_hand():
    tokens = torch.randint(4, (5, 9), generator=g())
    maps = [(torch.randn(5, 2, 9, 9, generator=g(s)) + even(9).log()).softmax(-1) for s in (1, 2)]
    A1 = max(np.mean([maps[0][n, h, t, t - 1] for n in range(5) for t in range(1, 9)]) for h in (0, 1))
    A2 = max(np.mean([sum(maps[1][n, h, t, k] for k in range(1, t + 1) if row[k - 1] == row[t])
                      for n, row in enumerate(tokens.tolist()) for t in range(9) if row[t] in row[:t]]) for h in (0, 1))
    assert [x.item() for x in exp.induction_scores(maps, tokens).values()] == pytest.approx([A1, A2])
    params = exp.init(flags := induction(norm="none", d_model=4, n_layers=3), g())
    E, P, U, *W = (params[k].numpy() for k in ("E", "P", "U", "W_Q0", "W_K0", "W_Q1", "W_V0", "W_O0", "W_K1", "W_V1", "W_O1"))
    found = {k: v.numpy() for k, v in exp.memories(flags, params).items()}
    for name, expected in (("position", P @ W[0] @ (P @ W[1]).T / 2), ("key", E @ W[2] @ (E @ W[3] @ W[4] @ W[5]).T / 2),
                           ("output", E @ W[6] @ W[7] @ U)):
        future = np.triu(np.full(expected.shape, name == "position"), 1)
        assert np.allclose(found[name], np.where(future, -np.inf, expected), atol=1e-5)
    rows = dict(position=[0, 0, 1, 2, 0], key=[0, 1, 2, 0], output=[1, 0, 2, 0])  # their argmax; there is no position -1
    assert [v.item() for v in exp.recalls({k: torch.eye(len(v))[v] for k, v in rows.items()}).values()] == [.75, .75, .25]


# ---- training -------------------------------------------------------------------------------------------------------

def folder(tmp_path, flags, name="f"):
    flags.argv = []
    (tmp_path / name).mkdir(exist_ok=True)
    return common.Folder(tmp_path / name, flags)


def small(**fields):
    """One group of runs that differ in what is only a number."""
    flags = exp.Flags(**{**dict(max_length=3, d_model=8, batch=8, steps=6, n_eval=4, evals=2, runs=1, compile="off"), **fields})
    return common.groups_of_runs(flags, [{}, dict(task="parity", lr=3e-3), dict(freeze_pos=True), dict(pos_dim=3),
                                         dict(train="last-block"), dict(train="second-mlp")])[0]


def test_copying_is_learned(tmp_path):
    flags = exp.Flags(task="copy", d_model=32, max_length=3, steps=250, lr=3e-3, batch=32, evals=2, n_eval=16, compile="off")
    state, metrics, _ = exp.train([flags], folder(tmp_path, flags))
    assert metrics["eval_accuracy"][0, 0] < .5 and metrics["eval_accuracy"][-1, 0] > .95 and metrics["loss"][-20:].max() < .2
    end = exp.at_the_end(flags, common.run_of(state["params"], 0))
    assert end["generated"] > .95 and end["generated_agrees"] == 1 and end["follows_input"] > .9


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_runs_are_alone_in_company_and_frozen_parts_do_not_move(tmp_path, optimiser):
    state, logs, _ = exp.train(runs := small(optimiser=optimiser), folder(tmp_path, runs[0]))
    assert common.block_size(runs[0], state["params"], {}) > 1 and np.isfinite(logs["loss"]).all() and len(runs) == 6
    last = {"W_in1", "W_out1", "g_mlp1"}
    learn = {"last-block": last | {"W_Q1", "W_K1", "W_V1", "W_O1", "g_attention1", "g", "U"}, "second-mlp": last}
    for r, run in enumerate(runs):
        before, after = exp.start(run)["params"], common.run_of(state["params"], r)
        moved = {k for k, p in after.items() if not torch.equal(p, before[k])}
        assert moved == learn.get(run.train, set(before) - ({"P"} if run.freeze_pos else set())), run
        assert ((after["P"] != 0).all(0) == (torch.arange(8) < (run.pos_dim or 8))).all()
        alone, log, _ = exp.train([run], folder(tmp_path, run, f"alone{r}"))
        assert same(after, common.run_of(alone["params"], 0))
        assert same(*({k: v[:, i] for k, v in x.items() if v.ndim > 1} for x, i in ((logs, r), (log, 0))))


def test_two_halves_are_a_whole(tmp_path):
    runs = small(steps=120, evals=6, order="sorted", snapshots=3)[:2]
    whole = exp.train(runs, folder(tmp_path, runs[0], "whole"))
    with stopped(lambda step: step == 60):
        assert len(exp.train(runs, folder(tmp_path, runs[0], "cut"))[1]["step"]) == 60
    again = exp.train(runs, folder(tmp_path, runs[0], "cut"))
    parts = lambda state, metrics, snapshots: (state["params"], metrics, *snapshots.values())
    assert all(map(same, parts(*whole), parts(*again))) and whole[2].keys() == again[2].keys()


def test_children_start_from_their_parent(tmp_path, monkeypatch):
    """Of the same seed, length and inputs, trained from scratch on the source."""
    flags, known, begun = exp.Flags(study="transfer", runs=2, seed=3), [], []

    def train(runs, sub, given):
        begun.extend((run, given(run)) for run in runs)
        known.extend(runs)
        metrics = {k: np.zeros((1, len(runs))) for k in ("eval_loss", "eval_accuracy")} | {"eval_step": np.zeros(1)}
        return {"params": {"E": torch.arange(len(known) - len(runs), len(known))}}, metrics, {}
    monkeypatch.setattr(exp, "train", train)
    monkeypatch.setattr(exp, "at_the_end", lambda run, params: {})
    exp.compute_transfer(flags, folder(tmp_path, flags))
    assert len(begun) == 2 * 3 * (4 + 4 * 3 + 3)
    for run, parent in begun:
        old = run if parent is None else known[int(parent["E"])]
        assert (old is run) == (run.source == old.source == "") and old.task == (run.source or run.task)
        assert (old.seed, old.max_length, old.with_zero) == (run.seed, run.max_length, run.with_zero)


def test_training_starts_from_a_checkpoint(tmp_path, capsys):
    """With learning rate 0 it also ends there; one of another shape is refused by name."""
    parent, saved = small(steps=1, seed=7)[:1], tmp_path / "parent" / "checkpoint.pt"
    state, *_ = exp.train(parent, folder(tmp_path, parent[0], "parent"))
    line = ["--smoke", "--source", str(saved), *"--steps 1 --lr 0 --task parity --figures base --out".split()]
    assert exp.main([*line, str(tmp_path / "child")]) == 0
    assert same(state["params"], common.load_checkpoint(tmp_path / "child" / "checkpoint.pt")["params"])
    assert exp.main([*line, str(tmp_path / "wide"), "--d-model", "16"]) == 2 and not (tmp_path / "wide").exists()
    error = capsys.readouterr().err.strip()
    assert str(saved) in error and "E is (16, 8), these flags need (16, 16)" in error and len(error.splitlines()) == 1


def test_a_stranger_recomputes_a_run_from_its_folder(tmp_path):
    line = "--smoke --seed 5 --task copy --steps 60 --lr 1e-2 --max-length 2 --n-heads 2 --figures base --snapshots 1"
    assert exp.main([*line.split(), "--out", str(tmp_path / "r")]) == 0
    z, (summary, config) = np.load(tmp_path / "r" / "arrays.npz"), (
        json.loads((tmp_path / "r" / f"{name}.json").read_text()) for name in ("summary", "config"))
    saved, flags = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)["params"], exp.Flags(**config["flags"])
    found = {1: [], 2: []}
    for L, x in ((n, x) for n in found for x in itertools.product((0, 1), repeat=n)):  # all there are
        tokens = [z["vocabulary"].tolist().index(w) for w in sequence(flags, "copy", x)[0]][:2 * L + 3]
        logits, maps = by_hand({k: p[0] for k, p in saved.items()}, tokens[:-1], flags)
        logits, target = logits[L + 1:], tokens[L + 2:]
        right, look = logits.argmax(1) == target, maps[:, :, range(L + 1, 2 * L + 1), range(1, L + 1)].mean(-1)
        nll = np.log(np.exp(logits).sum(1)) - logits[range(L + 1), target]
        found[L].append([right[:-1].all(), nll.mean(), right[-2], right[-1], *look.flatten()])
    accuracy, *mean = np.mean([np.mean(rows, 0) for rows in found.values()], 0)
    measured = [(row := summary["runs"][0])["loss"], z["final"][0, -1], z["eos"][0, -1], *z["weight_second"][0, -1].flatten()]
    assert row["seed"] == 5 and row["accuracy"] == accuracy > 0 and measured == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("study", list(exp.STUDIES))
def test_smoke(tmp_path, study):
    out, figures = tmp_path / "r", exp.STUDIES[study][2]
    assert exp.main(line := ["--smoke", "--study", study, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["claims"]) == (study != "data") and all(c["holds"] and c["source"] for c in summary["claims"])
    drawn = {p.stem: p for p in out.iterdir() if p.suffix in (".png", ".gif")}
    assert set(drawn) == set(figures) and all(p.stat().st_size > 1000 for p in drawn.values())
    for first in list(figures)[:1]:
        drawn[first].unlink()
        assert exp.main([*line, "--plot-only", "--figures", first]) == 0 and drawn[first].exists()
        assert json.loads((out / "summary.json").read_text()) == summary


@pytest.mark.parametrize("study", ["base", "circuit", "induction"])
def test_diverged_runs_are_left_blank(tmp_path, study):
    assert exp.main(["--smoke", "--study", study, "--lr", "1e38", "--out", str(tmp_path / "r")]) == 0
    z, summary = np.load(tmp_path / "r" / "arrays.npz"), json.loads((tmp_path / "r" / "summary.json").read_text())
    assert all(run["diverged"] and run["accuracy"] is None for run in summary["runs"])
    assert np.isnan(z["accuracy"]).all() and [c["holds"] for c in summary["claims"]] == [None]


def test_data_for_another_model(tmp_path):
    assert exp.main(f"--study data --n 200 --mix {MIX} --no-cot --lengths 3:0.5,5:0.5 --out {tmp_path / 'r'}".split()) == 0
    z, flags = np.load(tmp_path / "r" / "arrays.npz"), exp.Flags(mix=MIX, cot=False)
    assert z["vocabulary"].tolist() == exp.vocabulary(flags) and z["tokens"].shape == (200, 19) and set(z["length"]) == {3, 5}
    assert [len(x) for _, x in follow_the_law(flags, z["tokens"], z["mask"])] == z["length"].tolist()


# ---- claims ---------------------------------------------------------------------------------------------------------

but = lambda mask, value, arrays: {  # arrays with this value at the runs of the mask
    k: v if k == "done" else np.where(mask.reshape(-1, *[1] * (v.ndim - 1)), value, v) for k, v in arrays.items()}
full = lambda a, shape, value: np.full((len(a["seed"]), *shape), float(value))
verdicts = lambda study, arrays, flags: {c["id"]: c["holds"] for c in exp.STUDIES[study][1](arrays, flags)}
at_batch = lambda a, small, large, look: curves(
    a, 1, np.select([a["batch"] == 16, a["batch"] == 64], [small, 600], large), np.where(a["batch"] == 16, look, 1))


def fake(study, runs=3):
    """(flags, settings and steps) of a study as it runs by default."""
    flags = exp.Flags(study=study, **{**exp.Flags.per_study.get(study, {}), "runs": runs})
    each = sum(common.groups_of_runs(flags), [])
    a = {f: np.array([getattr(run, f) for run in each]) for f in exp.COLUMNS}
    return flags, a | {"step": np.outer(a["steps"], np.arange(16) / 15), "config": exp.config_names(a, flags),
                       "loss": full(a, (), 0), "eval_loss": full(a, (16,), 1), "generated_agrees": full(a, (), 1)}


def curves(a, score=1., when=100, look=1., **more):
    """Runs that have this share right from step `when` on, and heads with this share of peaks and of attention."""
    column = lambda x: np.broadcast_to(np.asarray(x, float), len(a["seed"]))[:, None]
    score, look = np.where(a["step"] >= column(when), column(score), 0)[..., None], (column(look) + 0 * a["step"])[..., None]
    heads = dict.fromkeys(("peak_first", "peak_second", "weight_first", "weight_second"), look[..., None] + np.zeros((2, 1)))
    return heads | {"accuracy": score[..., 0], "by_length": score + np.zeros(20), "by_task": score + np.zeros(3),
                    "peak_by_task": look + np.zeros(3), "follows_state": score[:, -1, 0]} | more


def one_circuit(a, good):
    v, kept = 1 if good else .2, np.abs(np.array(list(DONE.values())) - (not good))
    shapes = dict(follows_state=(), follows_input=(), cells=(2, 8, 9), right=(8, 8), moved=(2, 8, 8))
    return curves(a, 1 if good else .6, look=v, done=np.array(list(DONE)), intervened=full(a, (9, 8), 0) + kept[:, None],
                  probes=full(a, (2, 3), .5) + [[0], [good - .5]], **{k: full(a, shape, v) for k, shape in shapes.items()})


def mixes(a, good):
    equal, weighted = (np.array([exp.share_of(m, "parity") for m in a["mix"]]) == .5), a["weights"] != ""
    when = np.where(equal & good, 200, np.where(weighted, 400, 1000 if good else 200))
    return curves(a, np.where(equal, good, 1), when, np.where(equal & good, .9, .5), flips=full(a, (3, 3), good))


def long_runs(a, good):
    sgd, time = a["optimiser"] == "sgd", (a["step"] / a["steps"][:, None])[..., None, None] + np.zeros((2, 1))
    return curves(a, np.where(sgd & (not good), .5, 1), weight_second=.5 + .4 * time * good,
                  entropy_second=1 + time * (.5 - good) - .4 * sgd[:, None, None, None])


def inductions(a, good):
    late = np.select([a["config"] == "alpha=0", a["config"] == "norm=layer"], [.72, .75], .92)[:, None] if good else .65
    A1, v = np.where((a["step"] < 1000) & (a["config"] == exp.OWN)[:, None] & good, .84, late), 1. if good else .5
    times = zip(("output", "key", "position"), (200, 400, 600) if good else (600, 400, 200))
    return {"A1": A1, "A2": v + 0 * A1, "accuracy": v + 0 * A1, "follows": full(a, (), v), "ceiling": full(a, (), 1),
            "floor": full(a, (), 0), "counting": full(a, (), v), **{f"recall_{k}": 1. * (a["step"] >= t) for k, t in times}}


FAKES = {  # study -> what makes every claim of its own true (True) or false (False)
    "base": one_circuit, "circuit": one_circuit, "mix": mixes, "longer": long_runs, "induction": inductions,
    "scaling": lambda a, good: curves(
        a, np.array([exp.GRID.get((d, n), {}).get(L, .1) + .5 * (not good)
                     for d, n, L in zip(a["d_model"], a["n_layers"], a["max_length"])]) % 1,
        look=np.abs((not good) - a["max_length"] / 20)),
    "baselines": lambda a, good: curves(a, np.where(
        np.where(a["cot"], a["n_layers"] == 2, a["task"] != "polynomial") == good, 1, .1)),
    "transfer": lambda a, good: curves(
        a, np.where((a["source"] != "") & (a["train"] != "all"), good, 1),
        np.where(a["source"] != "", 40 if good else 400, 2000 if good else 200), np.where(a["source"] != "", good, 1),
        follows_state=full(a, (), good)),
    "batch": lambda a, good: at_batch(a, 2000, 300, 1) if good else at_batch(a, 400, 900, .2),
    "curriculum": lambda a, good: curves(
        a, 1, np.where((a["order"] == "shuffled") == good, 200, 1000), np.where(a["order"] == "shuffled", 1, good)),
    "positions": lambda a, good: curves(a, good, look=np.where((a["pos_dim"] == 8) == good, .95, .5)),
    "heads": lambda a, good: curves(
        a, 1, np.where((a["n_heads"] > 1) == good, 200, 1000), np.where((a["n_heads"] > 1) & good, .9, .5),
        ablated=np.where(np.arange(4) < a["n_heads"][:, None], [not good, 1, 1, 1], np.nan)[:, None].repeat(2, 1))}
SPLIT = {  # study -> the claim that can't be so together with the others, and what makes it true or false
    "batch": ("small-fewer-examples", lambda a, yes: at_batch(a, 400 if yes else 6000, 100, 1)),
    "longer": ("sgd-sparser", lambda a, yes: {
        "entropy_second": full(a, (16, 2, 1), 0) + ((a["optimiser"] == "sgd") != yes)[:, None, None, None]}),
    "induction": ("no-noise-no-A1", lambda a, yes: {"A1": full(a, (16,), .3 if yes else .7)})}


@pytest.mark.parametrize("study", [study for study in exp.STUDIES if study != "data"])
def test_judges_say_true_and_false_of_whole_studies(study):
    """Of no other configuration than their own; with fewer steps their claims are open; one claim is there for every run."""
    (flags, a), (split, change) = fake(study), SPLIT.get(study, (None, None))
    for good in (False, True):
        a |= FAKES[study](a, good)
        (first, universal), *own = verdicts(study, a, flags).items()
        assert universal is True and own and not {k: v for k, v in own if v is not good and k != split}
    assert all(verdicts(study, a | change(a, yes), flags)[split] is yes for yes in (True, False) if split)
    assert list(verdicts(study, a, replace(flags, steps=flags.steps - 1)).values()) == [True] + [None] * len(own)
    for change in (dict(smoke=True), dict(sweep=["lr=1,2"]), dict(init_scale=2.), dict(runs=4)):
        assert verdicts(study, a, replace(flags, **change)) == {first: True}
    key, bad = ("eval_loss", -.02) if study == "induction" else ("generated_agrees", .99)
    a |= but(one := a["seed"] == 1, bad, {key: a[key]})
    assert verdicts(study, a, flags)[first] is False
    assert verdicts(study, a | {"loss": np.where(one, np.nan, 0)}, flags)[first] is True


@pytest.mark.parametrize("study", list(FAKES))
def test_diverged_runs_have_no_vote(study):
    flags, a = fake(study, runs=5)  # two of five against the others would leave a claim undecided
    a |= but(a["seed"] < 2, np.nan, FAKES[study](a, True) | {"loss": a["loss"]})
    assert not {k: v for k, v in verdicts(study, a, flags).items() if v is not True and k not in SPLIT.get(study, ())}


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, words", [
    ("--task sum", "--task sum is not one of polynomial, parity, copy"), ("--mix parity:0.5,sum:0.5", "'sum' is not one of"),
    ("--mix parity:0.5,copy:0.4", "the shares sum to 0.9, not to 1"), ("--mix parity:1.5,copy:-0.5", "must not be negative"),
    ("--mix parity:x,copy:1", "--mix parity:x,copy:1: 'x' is not"), ("--mix parity:1 --task copy", "leave out --task"),
    ("--weights parity:2", "'parity' is not one of polynomial"), ("--task parity --weights parity:0", "must be above 0"),
    ("--d-model 30 --n-heads 4", "--d-model 30 must be divisible by --n-heads 4"), ("--batch 63", "--batch 63 must be even"),
    ("--pos-dim 65", "--pos-dim 65 must be at most --d-model 64"), ("--lengths 2:1 --order sorted", "needs --order shuffled"),
    ("--omit-length 9", "--omit-length 9 must be at most --max-length 8"), ("--train second-mlp --no-mlp", "needs an MLP"),
    ("--omit-length 1 --max-length 1", "leaves no length"), ("--max-length 0", "--max-length 0 must be at least 1"),
    ("--modulus 1", "--modulus 1 must be at least 2"), ("--study circuit --n-layers 1", "--study circuit needs"),
    ("--lengths 9:1", "'9' is not one of 1, 2,"), ("--sweep steps=1,2", "use --name and a second run"),
    ("--source nowhere.pt", "cannot read nowhere.pt"), ("--source parity", "--source parity is no file"),
    ("--study transfer --task parity", "--study transfer sets task, source, train")])
def test_bad_flags_are_one_line(tmp_path, capsys, line, words):
    assert exp.main([*line.split(), "--out", str(out := tmp_path / "r")]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1 and not out.exists()


def test_every_documented_command_parses(monkeypatch):
    monkeypatch.setattr(exp, "from_checkpoint", lambda run: None)  # of a run that a command before would have made
    text = (Path(__file__).parent.parent / "README.md").read_text() + exp.__doc__
    commands = re.findall(r"^\s*(?:\.venv/bin/)?python3? (exp_iteration_head\.py.*?)(?:\s{2,}.*|\s*#.*|\s*)$", text, re.M)
    assert len(commands) >= 3 and all(common.cli(exp.Flags, shlex.split(command)[1:]) for command in commands)
