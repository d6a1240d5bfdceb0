"""exp_iteration_head.py: its laws by enumeration, its fast paths against the plain ones, its measures on planted circuits, what is
learned, and the rules of its claims."""
import math
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch

import common
import exp_iteration_head as exp
from conftest import interrupted, ledger, run

torch.set_num_threads(1)


def made(scale=1., **fields):
    """(flags, parameters in float64, numbers) of one run."""
    flags = exp.Flags(**dict(max_length=4, d_model=8, n_eval=4, modulus=5) | fields)
    number = common.run_of(common.numbers([flags], exp.constants), 0)
    params = {k: p.double() * (scale if k[0] == "W" else 1) for k, p in exp.start(flags)["params"].items()}
    return flags, params, number


def sequences(flags, rows):
    """Every sequence of packed rows: (task, x, tokens as the law writes them, (token, target, position) of its slots in order)."""
    S = flags.slots
    for b, k in product(range(len(rows["s"])), (0, 1)):
        slots = (rows["segment"][b] == k).nonzero()[:, 0]
        slots = slots[rows["position"][b, slots].argsort()]
        answers = slots[slots >= S] - S
        L = int(rows["length"][b, answers[0]])
        task = [*exp.TASKS][rows["problem"][b, answers[0]]]
        x = (rows["token"][b, slots[1:L + 1]] - exp.DIGIT).tolist()
        assert rows["position"][b, slots].tolist() == [*range(2 * L + 2)]
        yield task, x, rows["token"][b, slots].tolist(), [(rows["target"][b, i].item(), bool(rows["given"][b, i])) for i in answers]


def states(flags, task, x):
    s = [x[0]]
    for value in x[1:]:
        s.append(exp.TASKS[task][2](s[-1], value, flags))
    return s


@pytest.mark.parametrize("cot", [True, False])
@pytest.mark.parametrize("fields", [dict(), dict(task="parity", other="copy", share=.4), dict(max_length=2), dict(max_length=7)])
def test_rows_are_the_law(fields, cot):
    """Both sequences of a row are [problem x EoI s] with targets s, EoS; lengths 1 .. Lmax are uniform, x too."""
    flags, _, number = made(batch=600, cot=cot, **fields)
    rows, weight = exp.sample(flags, number, torch.tensor(3))
    seen = []
    for task, x, tokens, targets in sequences(flags, rows):
        L, problem, digit = len(x), 2 + [*exp.TASKS].index(task), lambda values: [exp.DIGIT + v for v in values]
        s = states(flags, task, x)
        if cot:
            assert tokens == [problem, *digit(x), exp.EOI, *digit(s)]
            assert targets == [*((t, True) for t in digit(s)), (exp.EOS, True)]
        else:
            assert tokens == [problem, *digit(x), exp.EOI, *digit(s[-1:] * L)]
            assert targets[:2] == [(exp.DIGIT + s[-1], True), (exp.EOS, True)] and not any(given for _, given in targets[2:])
        seen.append((task, L, *x))
    lengths = np.bincount([L for _, L, *_ in seen], minlength=flags.max_length + 1)[1:]
    expected = 600 / flags.max_length
    assert ((lengths - expected) ** 2 / expected).sum() < 5 * flags.max_length + 10
    assert {task for task, *_ in seen} == {*exp.tasks_of(flags)}
    assert (weight[~rows["given"]] == 0).all()


def test_what_is_evaluated_is_not_trained_on():
    """By the hash, where there are enough sequences; shorter ones overlap. Nothing else is left out."""
    flags, _, number = made(batch=2000, modulus=11, max_length=5)
    evaluated = {(task, *x) for i in range(1) for task, x, *_ in sequences(flags, exp.answered(flags, exp.start(flags)["params"], number)[0])}
    apart = math.ceil(number["apart"][0])
    assert apart == 3 and len(evaluated) > 10
    held = total = 0
    for t in range(5):
        rows, weight = exp.sample(flags, number, torch.tensor(t))
        learned = weight[:, [0, -1]].flatten().tolist()
        for (task, x, *_), w in zip(sequences(flags, rows), learned):
            if len(x) >= apart:
                assert not w or (task, *x) not in evaluated
                held, total = held + (w == 0), total + 1
            else:
                assert w == 1
    assert abs(held / total - 1 / exp.HELD) < 5 * (1 / exp.HELD / total) ** .5


@pytest.mark.parametrize("fields", [dict(), dict(n_heads=2), dict(n_layers=3), dict(n_layers=1), dict(norm="rms"), dict(norm="none"),
                                    dict(mlp=False), dict(n_heads=4, n_layers=3)])
def test_packed_is_plain(fields):
    """Two sequences in a row, answers alone in the last layer, one head folded: logits and gradients of the textbook model."""
    flags, params, number = made(scale=2., batch=6, **fields)
    rows, _ = exp.sample(flags, number, torch.tensor(0))

    def plain(params, tokens):
        d, H = flags.d_model, flags.n_heads
        norm = lambda name, x: exp.normed(flags, params, name, x)
        x, T = params["E"][tokens] + params["P"][:tokens.shape[1]], tokens.shape[1]
        for l in range(flags.n_layers):
            h, out = norm(f"g_attention{l}", x), 0
            for i in range(H):
                part = slice(i * d // H, (i + 1) * d // H)
                q, k, v = (h @ params[f"W_{w}{l}"][:, part] for w in "QKV")
                score = (q @ k.mT / math.sqrt(d // H)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
                out = out + score.softmax(-1) @ v @ params[f"W_O{l}"][part]
            x = x + out
            if flags.mlp:
                x = x + torch.nn.functional.gelu(norm(f"g_mlp{l}", x) @ params[f"W_in{l}"]) @ params[f"W_out{l}"]
        return norm("g", x) @ params["U"]

    def fast_loss(params):
        return exp.nll(exp.forward(flags, params, rows, flags.slots)[0], rows["target"]).sum()

    def plain_loss(params):
        total = 0
        for _, x, tokens, targets in sequences(flags, rows):
            logits = plain(params, torch.tensor([tokens]))[0, len(x) + 1:]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor([t for t, _ in targets]), reduction="sum")
        return total
    a, b = (torch.func.grad_and_value(f)(params) for f in (fast_loss, plain_loss))
    assert a[1].item() == pytest.approx(b[1].item(), rel=1e-9)
    for k in params:
        assert torch.allclose(a[0][k], b[0][k], atol=1e-9), k


def test_evaluation_is_a_loop_over_sequences():
    """Accuracies, by length, and the attention of the iteration head, from sequences one by one."""
    flags, params, number = made(scale=3., task="parity", n_heads=2)
    rows, logits, maps = exp.answered(flags, params, number)
    found = exp.measured(flags, rows, logits, maps)
    whole, first, second = [], [], []
    S = flags.slots
    for b, k in product(range(len(logits)), (0, 1)):
        answers = [i for i in range(S) if rows["segment"][b, i] == k]
        L = len(answers) - 1
        said, target = logits[b, answers].argmax(-1), rows["target"][b, answers]
        whole.append((L, (said == target)[:L].all().item()))
        slot = {int(rows["position"][b, i]): i for i in range(2 * S) if rows["segment"][b, i] == k}
        first += [maps[0][b, :, slot[L + 1 + t], slot[L + 1]].tolist() for t in range(1, L + 1)]
        second += [maps[1][b, :, answers[t], slot[t + 1]].tolist() for t in range(L)]
    assert found["accuracy"].item() == pytest.approx(np.mean([r for _, r in whole]))
    for L in range(1, 5):
        assert found["by_length"][L - 1].item() == pytest.approx(np.mean([r for n, r in whole if n == L]))
    assert found["weight_first"].item() == pytest.approx(np.mean(first, 0).max(), abs=1e-9)
    assert found["peak_second"].item() == pytest.approx((np.array(second) > .5).mean(0).max(), abs=1e-6)


def test_a_run_draws_by_its_seed_and_row_alone():
    flags, _, number = made(batch=8)
    a, b = (exp.rows_at(flags, number, torch.tensor(n))[0]["token"] for n in ([5, 9], [9, 1, 5]))
    assert torch.equal(a[0], b[2]) and torch.equal(a[1], b[0])
    other = number | {"seed": torch.tensor(1)}
    assert not torch.equal(exp.rows_at(flags, other, torch.tensor([5, 9]))[0]["token"], a)


# ---- Induction -------------------------------------------------------------------------------------------------------

def test_the_induction_law_by_enumeration():
    """After x comes perm(x), else a uniform token: frequencies of whole sequences of three tokens against the sum over permutations."""
    flags, alpha, V, n = exp.Flags(n_tokens=3, seq_length=3), .3, 3, 60000
    tokens = exp.induction_tokens(flags, torch.tensor(alpha), common.key(torch.tensor(5), 0, torch.tensor(1)), n)
    assert tokens.shape == (n, 4)
    expected = {}
    for pi in permutations(range(V)):
        for row in product(range(V), repeat=4):
            p = 1 / V / 6
            for x, y in zip(row, row[1:]):
                p *= alpha / V + (1 - alpha) * (pi[x] == y)
            expected[row] = expected.get(row, 0) + p * n
    found = dict.fromkeys(expected, 0)
    for row in tokens.tolist():
        found[tuple(row)] += 1
    chi2 = sum((found[k] - expected[k]) ** 2 / expected[k] for k in expected)
    assert abs(chi2 - 80) < 5 * math.sqrt(160)


@pytest.mark.parametrize("alpha", [0., .25, 1.])
def test_the_posterior_is_bayes(alpha):
    """Against the joint probabilities of all continuations under all permutations."""
    V, tokens = 4, torch.tensor([0, 2, 1, 2, 1, 0])
    if alpha == 0:
        tokens = torch.tensor([0, 2, 1, 0, 2, 1])
    p, counted = exp.posterior(tokens, alpha, V)
    for t in range(len(tokens)):
        joint = np.zeros(V)
        for pi in permutations(range(V)):
            like = 1.
            for x, y in zip(tokens[:t].tolist(), tokens[1:t + 1].tolist()):
                like *= alpha / V + (1 - alpha) * (pi[x] == y)
            joint += like * np.array([alpha / V + (1 - alpha) * (pi[tokens[t]] == y) for y in range(V)])
        np.testing.assert_allclose(p[t], joint / joint.sum(), atol=1e-9)
    assert torch.allclose(counted.sum(1), torch.ones(6).double()) and torch.allclose(counted[0], torch.full((V,), 1 / V).double())


def circuit_of_hand(flags):
    """Parameters of an induction head by construction: positions in their own directions, tokens in two copies."""
    V, T = flags.n_tokens, flags.seq_length
    d = 3 * V + T
    now, before, out, place = (slice(a, b) for a, b in ((0, V), (V, 2 * V), (2 * V, 3 * V), (3 * V, d)))
    p = {k: torch.zeros_like(x) for k, x in exp.induction_start(replace(flags, d_model=d))["params"].items()}
    p["E"][:, now], p["P"][:, place] = torch.eye(V), torch.eye(T)
    p["W_Q0"][place, place], p["W_K0"][place, place] = torch.eye(T).roll(-1, 1) * 300, torch.eye(T)  # t asks for t - 1
    p["W_V0"][now, before], p["W_O0"][before, before] = torch.eye(V), torch.eye(V)
    p["W_Q1"][now, before], p["W_K1"][before, before] = torch.eye(V) * 300, torch.eye(V)
    p["W_V1"][now, out], p["W_O1"][out, out] = torch.eye(V), torch.eye(V)
    p["U"][out] = torch.eye(V) * 20
    return replace(flags, d_model=d), p


def test_measures_of_a_planted_induction_head():
    flags, params = circuit_of_hand(exp.Flags(n_tokens=5, seq_length=10, mlp=False, norm="none", alpha=0.))
    number = common.run_of(common.numbers([flags], exp.induction_constants), 0)
    found = exp.induction_evaluate_of(flags)(params, number)
    assert found["A1"] > .99 and found["accuracy"] > .9 and found["A2"] > .8  # the first token has itself "before" it
    assert found["recall_position"] == 1 and found["recall_key"] == 1 and found["recall_output"] == 1
    assert exp.induction_measure(flags, params, number)["follows"] > .8
    broken = params | {"W_K1": 0 * params["W_K1"]}
    assert exp.induction_measure(flags, broken, number)["follows"] < .5
    assert exp.induction_evaluate_of(flags)(broken, number)["recall_key"] < 1


def test_push_is_the_gradient_of_scores():
    """Against finite differences: moving one score by h changes the loss by -h times the push."""
    flags = exp.Flags(n_tokens=4, seq_length=6, d_model=8, mlp=False, norm="rms")
    number = common.run_of(common.numbers([flags], exp.induction_constants), 0)
    number["sequences"] = number["sequences"][:3]
    params = {k: p.double() * 2 for k, p in exp.induction_start(flags)["params"].items()}
    found = exp.Induction.evaluate_of(flags)(params, number)
    tokens, target = number["sequences"][:, :-1], number["sequences"][:, 1:]
    for layer, q, k in (0, 3, 1), (1, 5, 5), (1, 4, 0):
        def loss(h):
            def patch(name, x):
                if name != f"attention{layer}":
                    return x
                score = x.log().clamp(min=-1e30).clone()
                score[0, 0, q, k] += h
                return score.softmax(-1)
            return exp.nll(exp.induction_logits(flags, params, tokens, patch)[0], target).mean(1)[0].item()
        assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(-found["push_one"][layer, 0, q, k].item(), abs=1e-7)


# ---- Interventions on planted circuits ------------------------------------------------------------------------------

class Oracle:
    """Stands for `forward`: answers F of the state in the slot and of x as they stand there, if `iterates`."""

    def __init__(self, iterates):
        self.iterates = iterates

    def __call__(self, flags, params, rows, answers, patch=exp.unchanged):
        S = flags.slots
        s, x = (rows["token"][:, part] - exp.DIGIT for part in (slice(-S, None), slice(S)))
        problem = rows["problem"]
        if self.iterates:
            shown = (rows["token"][:, :S] - 2).gather(1, torch.where(rows["segment"][:, :S] == 1, S - 1 - rows["length"], 0))
            new = exp.update(flags, shown, s, x.roll(-1, 1)) + exp.DIGIT
            first, last = x.roll(-1, 1) + exp.DIGIT, rows["index"] == rows["length"]
            said = torch.where(rows["index"] == 0, first, torch.where(last, exp.EOS, new))
        else:
            said = rows["target"]
        return torch.nn.functional.one_hot(said.clamp(0, 20), 21).double(), [torch.zeros(len(s), 1, 2 * S, 2 * S).double()] * 2


def test_follows_and_flips_tell_an_iterating_model_from_one_that_knows(monkeypatch):
    for iterates in True, False:
        monkeypatch.setattr(exp, "forward", Oracle(iterates))
        flags, params, number = made(task="parity", other="copy", max_length=6)
        assert exp.follows(flags, params, number) == float(iterates)
        assert (exp.Mix.measure(flags, params, number)["flips"] == float(iterates)).all()
        flags, params, number = made(max_length=6, modulus=11)
        assert exp.follows(flags, params, number) == float(iterates)
