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
from conftest import judged, ledger, run

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
    rows, *_ = exp.answered(flags, exp.start(flags)["params"], number)
    evaluated = {(task, *x) for task, x, *_ in sequences(flags, rows)}
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
    flags, params = circuit_of_hand(exp.Flags(n_tokens=5, seq_length=10, mlp=False, norm="none", noise=0.))
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
    number["sequences"] = number["sequences"][:3].contiguous()
    params = {k: p.double() * 2 for k, p in exp.induction_start(flags)["params"].items()}
    found = exp.Induction.pushes_of(flags)(params, number)
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


def test_moved_and_patches_on_a_planted_circuit(monkeypatch):
    """A model that looks where the position of EoI says is recognised, one that goes by its own position alone is not."""
    def planted(subtracts):
        def forward(flags, params, rows, answers, patch=exp.unchanged):
            S, segment = flags.slots, rows["segment"]
            at_eoi = torch.cat([torch.zeros_like(rows["index"]), (rows["index"] == 0).long()], 1)
            eoi = torch.stack([(rows["position"] * at_eoi * (segment == k)).sum(1) for k in (0, 1)], 1).gather(1, segment[:, -S:])
            eoi = eoi if subtracts else rows["length"] + 1
            target = (rows["position"][:, -S:] - eoi + 1)[..., None]
            map = ((rows["position"][:, None] == target) & (segment[:, None] == segment[:, -S:, None])).double()
            return torch.zeros(len(segment), S, 9), [map[:, None]] * 2
        return forward
    flags, params, number = made(max_length=6)
    for subtracts in True, False:
        monkeypatch.setattr(exp, "forward", planted(subtracts))
        assert exp.Circuit.moved(flags, params, number) == float(subtracts)


def test_interventions_replace_what_they_say():
    """On a drawn model: rows of attention are where they were put, means are means, and the rest stays."""
    flags, params, number = made(scale=2.)
    rows, _, maps = exp.answered(flags, params, number)
    seen = {}
    for name, patch in zip(exp.Circuit.tries, exp.Circuit.patches(flags, rows)):
        kept = {}

        def both(what, x, patch=patch, kept=kept):
            return kept.setdefault(what, patch(what, x))
        exp.answered(flags, params, number, patch=both)
        seen[name] = kept
    plain, S = seen["untouched"], flags.slots
    (eoi, states), (inputs, asks) = exp.ideal(rows)
    for name, layer, key, where in (("look-up all on x_t", 1, inputs, asks), ("look-up one late", 1, inputs + 1, asks),
                                    ("first attention all on EoI", 0, eoi, states)):
        map = seen[name][f"attention{layer}"]
        assert (exp.attention_to(rows, map, key)[0][where] == 1).all()
        untouched = map[:, 0, -S:][~where]
        assert torch.allclose(untouched, plain[f"attention{layer}"][:, 0, -S:][~where])
    for name, what, slots in (("no look-up", "heads1", slice(-S, None)), ("no first attention", "heads0", slice(-S, None)),
                              ("no first MLP at answers", "mlp0", slice(-S, None)), ("no first MLP at inputs", "mlp0", slice(S)),
                              ("no last MLP", "mlp1", slice(None))):
        x = seen[name][what][:, slots]
        assert x.std((0, 1)).max() < 1e-9 and torch.allclose(x[0, 0], plain[what][:, slots].mean((0, 1)))


def test_the_update_study_reads_and_flips_what_is_there(monkeypatch):
    """Planted hidden units: s xor x on one axis, read by a probe there and not before, flipped along it and not along x's."""
    def forward(flags, params, rows, answers, patch=exp.unchanged):
        s, x = rows["s"], rows["ahead"]
        g = torch.Generator().manual_seed(1)
        noise = torch.randn(*s.shape, 16, generator=g)
        stream = torch.cat([torch.nn.functional.one_hot(v.clamp(0, 1), 2) for v in (s, x)], -1).float()
        patch("mid1", torch.cat([stream, .1 * noise[..., :4]], -1))
        hidden = torch.cat([10. * ((s + x) % 2)[..., None] - 5, 3. * x[..., None], .1 * noise], -1)
        hidden = patch("hidden1", hidden)
        answer = (hidden[..., 0] > 0).long()
        said = torch.where(rows["next"], exp.DIGIT + answer, rows["target"])
        return torch.nn.functional.one_hot(said, 9).float(), [torch.ones(1)] * 2
    monkeypatch.setattr(exp, "forward", forward)
    flags, params, number = made(task="parity", max_length=6, n_eval=32)
    found = exp.Update.measure(flags, params, number)
    assert found["probe"][0] < .75 and found["probe"][1] == 1
    assert found["flipped"][0] == 1 and found["flipped"][1] < .1


def test_frozen_parts_do_not_move(tmp_path):
    """--learns and --freeze-pos and --pos-dim, in a real run: what is free moves, the rest keeps its bits."""
    names = exp.start(made()[0])["params"]
    last = {"W_Q1", "W_K1", "W_V1", "W_O1", "W_in1", "W_out1", "g_attention1", "g_mlp1"}
    for part, free in ("all", {*names}), ("last-block", last | {"g", "U"}), ("second-mlp", {"W_in1", "W_out1", "g_mlp1"}):
        run_ = replace(made()[0], learns=part)
        assert {k for k, p in names.items() if exp.Transfer.learning(run_, k, p)} == free
    assert run(exp, "--study positions --smoke --compile off --steps 6", tmp_path / "r") == 0
    found = common.load(tmp_path / "r")
    P, arrays = found.params["P"].numpy(), found.arrays
    for r, (seed, d, frozen) in enumerate(zip(arrays["seed"], arrays["pos_dim"], arrays["freeze_pos"])):
        flags = exp.Flags(max_length=3, d_model=8, seed=int(seed))
        begun = exp.start(flags)["params"]["P"].numpy()
        if d:
            begun[:, d:] = 0
            assert (P[r][:, d:] == 0).all()
        assert np.array_equal(P[r], begun) == frozen


def test_children_start_from_their_parents(tmp_path):
    assert run(exp, "--study transfer --smoke --compile off", tmp_path / "r") == 0
    children, parents = (common.read(tmp_path / "r" / p / "checkpoint.pt")["params"] for p in ("", "scratch"))
    arrays = common.read(tmp_path / "r/arrays.npz")
    mlp = (arrays["learns"] == "second-mlp") & (arrays["source"] == "copy")
    child = children["W_Q0"][int(np.flatnonzero(mlp)[0])]
    assert any(torch.equal(child, p) for p in parents["W_Q0"])  # frozen: still the parent's


def test_copying_is_learned(tmp_path):
    """The smallest task reaches .95 in a few hundred small steps; and the test set of another law stays wrong."""
    line = "--task copy --max-length 3 --d-model 32 --steps 400 --runs 1 --lr 3e-3 --n-eval 16 --evals 6 --compile off"
    assert run(exp, line, tmp_path / "r") == 0
    arrays = common.read(tmp_path / "r/arrays.npz")
    assert arrays["eval_accuracy"][0, 0] < .5 and arrays["accuracy"][0] > .95


# ---- Claims ---------------------------------------------------------------------------------------------------------

def settings(study, **more):
    """Arrays of three runs a configuration with a study's own settings, and zeros for what it measures."""
    room = next(s for s in exp.STUDIES if common.study_name(s.__name__) == study)
    flags = exp.Flags(**room.defaults, room=room, given={}, sweep=[])
    runs = [run for group in common.groups_of_runs(replace(flags, runs=3)) for run in group]
    return room, {k: np.array([getattr(run, k) for run in runs]) for k in ("seed", *exp.OWN)} | {
        k: (np.zeros(len(runs)) + value if np.ndim(value) == 0 else value) for k, value in more.items()}


def test_holes_are_a_rate_with_its_interval():
    room, _ = settings("base")
    def hole_of(good, runs):
        right = np.ones((runs, 3, 4))
        right[good:, 2, 1] = .2
        arrays = dict(accuracy=np.ones(runs), peak_second=np.ones(runs), peak_first=np.ones(runs), right=right,
                      looks=np.ones((runs, 3, 4)), eval_step=np.tile([0., 1.], (runs, 1)), eval_peak_second=np.ones((runs, 2)),
                      eval_accuracy=np.ones((runs, 2)))
        return judged(room, arrays)["holes"]
    assert hole_of(8, 8) is True and hole_of(6, 8) is None and hole_of(0, 8) is False
    assert hole_of(30, 40) is True and hole_of(12, 40) is False


def test_what_still_rises_has_no_vote():
    step = np.tile([1., 10., 100., 1000.], (4, 1))
    accuracy = np.array([[0, .2, .5, .5], [0, .2, .5, .7], [0, .5, .9, .96], [0, .1, .4, .41]])
    found = exp.settled(dict(eval_step=step, eval_accuracy=accuracy, accuracy=accuracy[:, -1]))
    assert np.array_equal(found, [1, math.nan, 1, 1], equal_nan=True)
    room, arrays = settings("baselines", longest=.5, accuracy=.5)
    n = len(arrays["seed"])
    flat = arrays | dict(eval_step=np.tile([1., 10., 100., 1000.], (n, 1)), eval_accuracy=np.tile([0, .4, .5, .5], (n, 1)))
    rising = flat | dict(eval_accuracy=np.tile([0, .2, .3, .5], (n, 1)))
    assert judged(room, flat)["one-layer-parity"] is True and judged(room, flat)["no-chain-parity"] is False
    assert set(judged(room, rising).values()) == {None}


def test_reach_is_on_a_line_between_evaluations():
    arrays = dict(eval_step=np.tile([0., 10., 30.], (3, 1)), eval_accuracy=np.array([[0, .9, 1], [0, .5, .9], [0, 1, .5]]),
                  accuracy=np.array([1, .9, math.nan]))
    assert np.allclose(exp.reach(arrays), [20, math.inf, math.nan], equal_nan=True)
    assert np.allclose(exp.reach(arrays, level=.5)[:2], [10 * .5 / .9, 10])


def test_power_laws_are_found_with_their_intervals():
    g = np.random.default_rng(0)
    L, d = (g.choice(x, 60) for x in ([4, 8, 12, 16], [8, 16, 32]))
    noise = np.exp(.05 * g.standard_normal(60))
    y = np.where(g.random(60) < .2, math.inf, 3 * L ** 1.5 * d ** -.5 * noise)
    found = exp.power_law(y, length=L, width=d)
    for name, value in ("length", 1.5), ("width", -.5):
        middle, low, high = found[name]
        assert low < value < high and high - low < .15 and low < middle < high


def test_scaling_judges_the_exponents_and_the_rule():
    room, arrays = settings("scaling")
    n, d, b = (arrays[k] for k in ("max_length", "d_model", "batch"))
    right = n * (n + 1) / 2 <= 4 * d
    noise = 1 + .01 * np.random.default_rng(0).standard_normal(len(n))
    planted = dict(accuracy=np.where(right, 1., .3), reach=np.where(right, 100 * n * d ** -.5 * b ** -.5 * noise, math.inf),
                   weight_second=1 - .01 * n * noise / d / b ** .1, eval_step=np.tile([1., 10.], (len(n), 1)),
                   eval_accuracy=np.tile(np.where(right, 1., .3)[:, None], (1, 2)))
    assert all(judged(room, arrays | planted).values())
    other = arrays | planted | dict(reach=planted["reach"] / n ** 2 * d, accuracy=np.where(d == 8, 1., .3))
    found = judged(room, other)
    assert found["capacity-fits"] is False and found["capacity-beyond"] is None
    assert judged(room, arrays | planted | dict(accuracy=np.ones(len(n))))["capacity-beyond"] is False


@pytest.mark.parametrize("study", [common.study_name(s.__name__) for s in exp.STUDIES])
def test_the_ledger_holds_what_the_code_claims(study):
    """figures/iteration.md has the ids that a study claims now; README's counts are those of the ledger."""
    found = ledger("iteration_head", study, is_default=study == "base")
    room, arrays = settings(study)
    n, M = len(arrays["seed"]), 4
    steps = np.tile([1., 10., 100., 1000.], (n, 1))
    shapes = dict(right=(n, 8, 9), looks=(n, 8, 9), tried=(n, 9), probe=(n, 2), flipped=(n, 2), task_accuracy=(n, 2))
    class Zeros(dict):
        def __missing__(self, k):
            if k == "eval_step":
                return steps
            if k in ("floor", "counting"):
                return np.zeros(2)
            if k.startswith("eval_maps") or k.startswith("eval_push"):
                return np.random.default_rng(0).random((n, M, 2, 1, 5, 5))
            return np.zeros((n, M)) if k.startswith("eval_") else np.zeros(shapes.get(k, n))
    arrays = Zeros(arrays)
    with np.errstate(all="ignore"):
        assert [*found] == [*judged(room, arrays)]


@pytest.mark.parametrize("line, words", [
    ("--study induction --task parity", "does not read --task"), ("--study base --method sgd", "does not read --method"),
    ("--study conditions --cot", "does not read --cot"), ("--task nonsense", "tasks are"), ("--n-heads 3", "divisible"),
    ("--study transfer --sweep d_model=8,16", "no --sweep"), ("--study circuit --no-mlp", "takes --cot --mlp"),
    ("--study update --task copy", "takes --task parity"), ("--study induction --n-layers 3", "takes --n-layers 2")])
def test_a_study_refuses_what_it_cannot_use(line, words, tmp_path, capsys):
    assert run(exp, line, tmp_path / "r") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "r").exists()
