"""exp_iteration_head.py: its laws by enumeration, its fast paths against plain ones, its measures on
planted circuits, what is learned, and the rules of its claims."""
import math
from collections import Counter
from dataclasses import replace
from itertools import accumulate, permutations, product

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, gelu, one_hot

import common
import exp_iteration_head as exp
from conftest import judged, run

torch.set_num_threads(1)

LAW = {"polynomial": lambda s, x: (s * x + 1) % 5, "parity": lambda s, x: s ^ x, "copy": lambda s, x: x}


def number_of(flags, constants=exp.constants):
    return common.run_of(common.numbers([flags], constants), 0)


def made(scale=1., **fields):
    """(flags, parameters in float64, numbers) of one run."""
    flags = exp.Flags(**dict(max_length=4, d_model=8, n_eval=4, modulus=5) | fields)
    begun = exp.start(flags)["params"]
    params = {k: p.double() * (scale if k[0] == "W" else 1) for k, p in begun.items()}
    return flags, params, number_of(flags)


def sequences(rows):
    """Every sequence of packed rows: its row, task and x; its slots in the order of positions; and where
    the answers among them are among the answers of the row."""
    S = rows["s"].shape[1]
    for b, k in product(range(len(rows["s"])), (0, 1)):
        slots = (rows["segment"][b] == k).nonzero()[:, 0]
        slots = slots[rows["position"][b, slots].argsort()]
        L = len(slots) // 2 - 1
        assert rows["position"][b, slots].tolist() == [*range(2 * L + 2)]
        problem, *x = rows["token"][b, slots[:L + 1]].tolist()
        yield b, [*exp.TASKS][problem - 2], [token - exp.DIGIT for token in x], slots, slots[L + 1:] - S


@pytest.mark.parametrize("fields", [dict(), dict(max_length=7, cot=False),
                                    dict(max_length=2, task="parity", other="copy")])
def test_rows_are_the_law(fields):
    """Both sequences of a row are [problem x EoI s] with targets s, EoS; lengths 1 .. Lmax, x and tasks
    are uniform."""
    flags, _, number = made(batch=600, **fields)
    rows, weight = exp.sample(flags, number, torch.tensor(3))
    lengths, digits, tasks = [], [], []
    for b, task, x, slots, answers in sequences(rows):
        L, states = len(x), [exp.DIGIT + s for s in accumulate(x, LAW[task])]
        said = states if flags.cot else states[-1:] * L
        target = [*(states if flags.cot else states[-1:]), exp.EOS]
        assert rows["token"][b, slots[L + 1:]].tolist() == [exp.EOI, *said]
        assert rows["target"][b, answers][:len(target)].tolist() == target
        assert rows["given"][b, answers].tolist() == [i < len(target) for i in range(L + 1)]
        lengths.append(L)
        digits += x
        tasks.append(task)
    assert not weight[~rows["given"]].any()
    values = range(2) if flags.other else range(1, 5)
    drawn = (lengths, range(1, flags.max_length + 1)), (digits, values), (tasks, exp.tasks_of(flags))
    for found, kinds in drawn:
        count, expected = Counter(found), len(found) / len(kinds)
        assert count.keys() == {*kinds}
        assert sum((n - expected) ** 2 / expected for n in count.values()) < 5 * len(kinds) + 10


def test_what_is_evaluated_is_not_trained_on():
    """By the hash, where there are enough sequences; shorter ones overlap. Nothing else is left out."""
    flags, _, number = made(batch=2000, modulus=7)
    evaluated = {tuple(x) for _, _, x, *_ in sequences(exp.evaluation_rows(flags, number))}
    assert len(evaluated) > 10
    rows, weight = exp.sample(flags, number, torch.tensor(0))
    held = []
    for b, _, x, _, answers in sequences(rows):
        learned, = weight[b, answers].unique()
        if len(x) < 3:  # there are 6 or 36 of them, fewer than 2 * 16 * n_eval
            assert learned == 1
        else:
            assert not (learned and tuple(x) in evaluated)
            held.append(not learned)
    assert abs(np.mean(held) - 1 / exp.HELD) < 5 * (1 / exp.HELD / len(held)) ** .5


@pytest.mark.parametrize("fields", [dict(), dict(n_heads=4, n_layers=3, norm="rms"),
                                    dict(n_layers=1, mlp=False)])
def test_packed_is_plain(fields):
    """Two sequences in a row, answers alone in the last layer, one head folded: logits and gradients of
    the textbook model."""
    flags, params, number = made(scale=2., batch=6, **fields)
    rows, _ = exp.sample(flags, number, torch.tensor(0))
    d = flags.d_model // flags.n_heads

    def norm(params, name, x):
        if flags.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        return x / ((x ** 2).mean(-1, keepdim=True) + 1e-5).sqrt() * params[name]

    def plain(params, tokens):
        T = len(tokens)
        x = params["E"][tokens] + params["P"][:T]
        for l in range(flags.n_layers):
            h = norm(params, f"g_attention{l}", x)
            for i in range(flags.n_heads):
                part = slice(i * d, (i + 1) * d)
                q, k, v = (h @ params[f"W_{w}{l}"][:, part] for w in "QKV")
                future = torch.ones(T, T).triu(1).bool()
                map = (q @ k.T / math.sqrt(d)).masked_fill(future, -math.inf).softmax(-1)
                x = x + map @ v @ params[f"W_O{l}"][part]
            if flags.mlp:
                x = x + gelu(norm(params, f"g_mlp{l}", x) @ params[f"W_in{l}"]) @ params[f"W_out{l}"]
        return norm(params, "g", x) @ params["U"]

    def plain_loss(params):
        total = 0
        for b, _, x, slots, answers in sequences(rows):
            logits = plain(params, rows["token"][b, slots])[len(x) + 1:]
            total = total + cross_entropy(logits, rows["target"][b, answers], reduction="sum")
        return total

    def fast_loss(params):
        return exp.nll(exp.forward(flags, params, rows, flags.slots)[0], rows["target"]).sum()
    (a, loss), (b, expected) = (torch.func.grad_and_value(f)(params) for f in (fast_loss, plain_loss))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for k in params:
        assert torch.allclose(a[k], b[k], atol=1e-9), k


def test_evaluation_is_a_loop_over_sequences():
    """Accuracies, by length, and the attention of the iteration head, from sequences one by one."""
    flags, params, number = made(scale=3., task="parity", n_heads=2)
    rows, _, maps = exp.answered(flags, params, number)
    said = torch.where(torch.rand(rows["s"].shape) < .8, rows["target"], exp.EOI)
    found = exp.measured(flags, rows, one_hot(said).double(), maps)
    right, whole, first, second = said == rows["target"], [[], [], [], []], [], []
    for b, _, x, slots, answers in sequences(rows):
        L = len(x)
        whole[L - 1].append(right[b, answers[:L]].all().item())
        first += maps[0][b][:, slots[L + 2:], slots[L + 1]].T.tolist()
        second += maps[1][b][:, answers[:L], slots[1:L + 1]].T.tolist()
    assert found["accuracy"].item() == pytest.approx(np.mean(sum(whole, [])))
    assert found["by_length"].tolist() == pytest.approx([np.mean(each) for each in whole])
    assert found["weight_first"].item() == pytest.approx(np.mean(first, 0).max(), abs=1e-9)
    assert found["peak_second"].item() == pytest.approx((np.array(second) > .5).mean(0).max(), abs=1e-6)


def test_a_run_draws_by_its_seed_and_row_alone():
    flags, _, number = made()
    def drawn(seed, *n):
        return exp.rows_at(flags, number | {"seed": torch.tensor(seed)}, torch.tensor(n))[0]["token"]
    assert torch.equal(drawn(0, 5, 9), drawn(0, 9, 1, 5)[[2, 0]])
    assert not torch.equal(drawn(0, 5, 9), drawn(1, 5, 9))


# ---- Induction --------------------------------------------------------------------------------------

def test_the_induction_law_by_enumeration():
    """After x comes perm(x), else a uniform token: frequencies of whole sequences against
    the sum over permutations."""
    flags, alpha, V, n = exp.Flags(n_tokens=3, seq_length=3), .3, 3, 60000
    tokens = exp.induction_tokens(flags, alpha, common.key(torch.tensor(5), 0, torch.tensor(1)), n)
    expected = Counter()
    for pi, row in product(permutations(range(V)), product(range(V), repeat=4)):
        steps = [alpha / V + (1 - alpha) * (pi[x] == y) for x, y in zip(row, row[1:])]
        expected[row] += n / V / 6 * math.prod(steps)
    found = Counter(map(tuple, tokens.tolist()))
    chi2 = sum((found[row] - e) ** 2 / e for row, e in expected.items())
    assert abs(chi2 - 80) < 5 * math.sqrt(160)


@pytest.mark.parametrize("alpha, tokens", [(0., [0, 2, 1, 0, 2, 1, 0]), (.25, [0, 2, 1, 2, 1, 0, 3])])
def test_the_posterior_is_bayes(alpha, tokens):
    """Against the joint probabilities of all continuations under all permutations; of who counts,
    under all maps."""
    V = 4
    bayes, counted = exp.posterior(torch.tensor(tokens[:-1]), alpha, V)
    for found, every in (bayes, permutations(range(V))), (counted, product(range(V), repeat=V)):
        joint = np.zeros_like(found)
        for pi in every:
            like = 1.
            for t, (x, y) in enumerate(zip(tokens, tokens[1:])):
                after = alpha / V + (1 - alpha) * (np.arange(V) == pi[x])
                joint[t] += like * after
                like *= after[y]
        np.testing.assert_allclose(found, joint / joint.sum(1, keepdims=True), atol=1e-9)


def test_measures_of_a_planted_induction_head():
    """By construction: positions in directions of their own, tokens in three copies."""
    V, T = 5, 10
    d = 3 * V + T
    flags = exp.Flags(n_tokens=V, seq_length=T, d_model=d, mlp=False, norm="none", noise=0.)
    number = number_of(flags, exp.induction_constants)
    now, before, out, place = torch.arange(d).split([V, V, V, T])
    p = {k: torch.zeros_like(x) for k, x in exp.induction_start(flags)["params"].items()}
    p["E"][range(V), now] = p["P"][range(T), place] = p["W_K0"][place, place] = 1
    p["W_Q0"][place[1:], place[:-1]] = 300  # t asks for t - 1
    p["W_V0"][now, before] = p["W_O0"][before, before] = p["W_K1"][before, before] = 1
    p["W_Q1"][now, before] = 300
    p["W_V1"][now, out] = p["W_O1"][out, out] = 1
    p["U"][out, range(V)] = 20
    found = exp.induction_evaluate_of(flags)(p, number)
    assert found["A1"] > .99 and found["accuracy"] > .9
    assert found["A2"] > .8  # the first token has itself "before" it
    assert found["recall_position"] == found["recall_key"] == found["recall_output"] == 1
    assert exp.induction_measure(flags, p, number)["follows"] > .8
    p["W_K1"] *= 0
    assert exp.induction_measure(flags, p, number)["follows"] < .5
    assert exp.induction_evaluate_of(flags)(p, number)["recall_key"] < 1


def test_push_is_the_gradient_of_scores():
    """Against finite differences: moving one score by h changes the loss by -h times the push."""
    flags = exp.Flags(n_tokens=4, seq_length=6, d_model=8, mlp=False, norm="rms")
    number = number_of(flags, exp.induction_constants)
    one = number["sequences"][:1]
    params = {k: p.double() * 2 for k, p in exp.induction_start(flags)["params"].items()}
    found = exp.Induction.pushes_of(flags)(params, number)["push_one"]
    for layer, q, k in (0, 3, 1), (1, 4, 0):
        def loss(h):
            def moved(map):
                score = map.log()
                score[0, 0, q, k] += h
                return score.softmax(-1)
            patch = exp.changed(f"attention{layer}", moved)
            logits, _ = exp.induction_logits(flags, params, one[:, :-1], patch)
            return exp.nll(logits, one[:, 1:]).mean().item()
        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert slope == pytest.approx(-found[layer, 0, q, k].item(), abs=1e-7)


# ---- Interventions on planted circuits --------------------------------------------------------------

@pytest.mark.parametrize("iterates", [True, False])
def test_follows_and_flips_tell_an_iterating_model_from_one_that_knows(iterates, monkeypatch):
    def forward(flags, params, rows, answers):
        """What was right before; if it iterates, F of the state and the x that stand there now."""
        said = rows["target"].clone()
        for b, task, x, slots, places in sequences(rows) if iterates else []:
            for t in range(1, len(x)):
                s = rows["token"][b, slots[len(x) + 1 + t]] - exp.DIGIT
                said[b, places[t]] = exp.DIGIT + LAW[task](s, x[t])
        return one_hot(said), None
    monkeypatch.setattr(exp, "forward", forward)
    two_tasks = made(task="parity", other="copy", max_length=6)
    assert exp.follows(*two_tasks) == exp.follows(*made(max_length=6)) == iterates
    assert (exp.Mix.measure(*two_tasks)["flips"] == iterates).all()


@pytest.mark.parametrize("subtracts", [True, False])
def test_moved_tells_who_subtracts_the_position_of_EoI(subtracts, monkeypatch):
    """From one that goes by its own position alone."""
    def forward(flags, params, rows, answers):
        position, segment, S = rows["position"], rows["segment"], flags.slots
        eoi = (segment[:, -S:, None] == segment[:, None]) & (rows["token"] == exp.EOI)[:, None]
        eoi = (eoi * position[:, None]).sum(-1) if subtracts else rows["length"] + 1
        return None, [exp.cell(rows, position[:, -S:] - eoi + 1)[:, None].long()]
    monkeypatch.setattr(exp, "forward", forward)
    assert exp.Circuit.moved(*made(max_length=6)) == subtracts


def test_interventions_replace_what_they_say():
    """On a drawn model: rows of attention are where they were put, means are means, the rest stays."""
    flags, params, number = made(scale=2.)
    rows, S, seen = exp.evaluation_rows(flags, number), flags.slots, {}
    for name, patch in zip(exp.Circuit.tries, exp.Circuit.patches(flags, rows)):
        kept = seen[name] = {}
        exp.answered(flags, params, number, patch=lambda what, x: kept.setdefault(what, patch(what, x)))
    plain, ((eoi, states), (inputs, asks)) = seen["untouched"], exp.ideal(rows)
    for name, what, key, where in (("look-up all on x_t", "attention1", inputs, asks),
                                   ("look-up one late", "attention1", inputs + 1, asks),
                                   ("first attention all on EoI", "attention0", eoi, states)):
        map = seen[name][what]
        assert (exp.attention_to(rows, map, key)[0][where] == 1).all()
        assert (map == plain[what])[:, 0, -S:][~where].all()
    answers = slice(-S, None)
    for name, what, slots in (("no look-up", "heads1", answers), ("no last MLP", "mlp1", answers),
                              ("no first attention", "heads0", answers),
                              ("no first MLP at answers", "mlp0", answers),
                              ("no first MLP at inputs", "mlp0", slice(S))):
        assert (seen[name][what][:, slots] == plain[what][:, slots].mean((0, 1))).all()


def test_the_update_study_reads_and_flips_what_is_there(monkeypatch):
    """Planted hidden units: s xor x on one axis, read by a probe there and not before, flipped along it
    and not along x's."""
    def forward(flags, params, rows, answers, patch):
        s, x = rows["s"], rows["ahead"]
        patch("mid1", torch.stack([s, x], -1).float())
        hidden = patch("hidden1", torch.stack([10 * ((s + x) % 2) - 5, 3 * x], -1).float())
        answer = (hidden[..., 0] > 0).long()
        return one_hot(torch.where(rows["next"], exp.DIGIT + answer, rows["target"])), None
    monkeypatch.setattr(exp, "forward", forward)
    found = exp.Update.measure(*made(task="parity", max_length=6, n_eval=32))
    assert found["probe"][0] < .75 and found["probe"][1] == 1
    assert found["flipped"][0] == 1 and found["flipped"][1] < .1


# ---- Training ---------------------------------------------------------------------------------------

def test_frozen_parts_do_not_move(tmp_path):
    """--learns and --freeze-pos and --pos-dim, in a run: what is free moves, the rest keeps its bits."""
    flags, names, _ = made()
    second = {"W_in1", "W_out1", "g_mlp1"}
    last = second | {"W_Q1", "W_K1", "W_V1", "W_O1", "g_attention1", "g", "U"}
    for part, free in ("all", {*names}), ("last-block", last), ("second-mlp", second):
        child = replace(flags, learns=part)
        assert {k for k, p in names.items() if exp.Transfer.learning(child, k, p)} == free
    assert run(exp, "--study positions --smoke --compile off --runs 1 --steps 1", tmp_path / "r") == 0
    found = common.load(tmp_path / "r")
    begun = exp.start(exp.Flags(max_length=3, d_model=8))["params"]["P"]
    for P, d, frozen in zip(found.params["P"], found.arrays["pos_dim"], found.arrays["freeze_pos"]):
        narrow = begun * (torch.arange(8) < (d or 8))
        assert torch.equal(P, narrow) == frozen and not P[narrow == 0].any()


def test_children_start_from_their_parents(tmp_path):
    assert run(exp, "--study transfer --smoke --compile off --steps 1", tmp_path / "r") == 0
    found = common.load(tmp_path / "r")
    parents = common.load(tmp_path / "r", "scratch").params["W_Q0"]
    frozen = (found.arrays["learns"] == "second-mlp") & (found.arrays["source"] == "copy")
    child = found.params["W_Q0"][frozen][0]
    assert any(torch.equal(child, parent) for parent in parents)


def test_copying_is_learned(tmp_path):
    """The smallest task reaches .95 in sixty small steps."""
    line = "--task copy --max-length 3 --d-model 32 --steps 60 --runs 1 --lr 1e-2 --n-eval 16 --evals 2"
    assert run(exp, f"{line} --compile off --figures right", tmp_path / "r") == 0
    arrays = common.read(tmp_path / "r/arrays.npz")
    assert arrays["eval_accuracy"][0, 0] < .5 and arrays["accuracy"][0] > .95


# ---- Claims -----------------------------------------------------------------------------------------

def settings(study):
    """A study's own settings of three runs a configuration."""
    flags = exp.Flags(**study.defaults | dict(runs=3), room=study, given={}, sweep=[])
    runs = sum(common.groups_of_runs(flags), [])
    return {k: np.array([getattr(run, k) for run in runs]) for k in exp.OWN}


def test_holes_are_a_rate_with_its_interval():
    def hole_of(good, runs):
        right = np.ones((runs, 3, 4))
        right[good:, 2, 1] = .2
        others = dict.fromkeys(("accuracy", "peak_first", "peak_second"), np.ones(runs))
        return judged(exp.Base, dict(right=right, looks=right, **others))["holes"]
    assert hole_of(8, 8) is True and hole_of(6, 8) is None and hole_of(0, 8) is False
    assert hole_of(30, 40) is True and hole_of(12, 40) is False


def test_what_still_rises_has_no_vote():
    step = np.tile([1., 10., 100., 1000.], (4, 1))
    accuracy = np.array([[0, .2, .5, .5], [0, .2, .5, .7], [0, .5, .9, .96], [0, .1, .4, .41]])
    found = exp.settled(dict(eval_step=step, eval_accuracy=accuracy, accuracy=accuracy[:, -1]))
    assert np.array_equal(found, [1, math.nan, 1, 1], equal_nan=True)
    study = exp.Baselines
    arrays = settings(study)
    half = np.full(len(arrays["task"]), .5)
    arrays |= dict(longest=half, accuracy=half, eval_step=step[:1])
    flat = judged(study, arrays | dict(eval_accuracy=np.outer(half, [0, .8, 1, 1])))
    assert flat["one-layer-parity"] is True
    assert flat["no-chain-parity"] is flat["no-chain-polynomial"] is False
    rising = judged(study, arrays | dict(eval_accuracy=np.outer(half, [0, .4, .6, 1])))
    assert {*rising.values()} == {None}


def test_reach_is_on_a_line_between_evaluations():
    accuracy = np.array([[0, .9, 1], [0, .5, .9], [0, 1, .5], [0, 1, math.nan]])
    step = np.tile([0., 10., 30.], (4, 1))
    arrays = dict(eval_step=step, eval_accuracy=accuracy, accuracy=accuracy[:, -1])
    assert np.allclose(exp.reach(arrays), [20, math.inf, 9.5, math.nan], equal_nan=True)


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
    study = exp.Scaling
    arrays = settings(study)
    n, d, b = (arrays[k] for k in ("max_length", "d_model", "batch"))
    accuracy = np.where(n * (n + 1) / 2 <= 4 * d, 1., .3)
    steps = np.where(accuracy == 1, 100 * n / d ** .5 / b ** .5, math.inf)
    arrays |= dict(accuracy=accuracy, reach=steps, weight_second=1 - .01 * n / d / b ** .1,
                   eval_step=np.array([[1., 10.]]), eval_accuracy=np.stack([accuracy, accuracy], 1))
    assert all(judged(study, arrays).values())
    found = judged(study, arrays | dict(accuracy=1.3 - accuracy))
    assert found["capacity-fits"] is found["capacity-beyond"] is False


@pytest.mark.parametrize("line, words", [
    ("--task nonsense", "tasks are"), ("--n-heads 3", "divisible"),
    ("--study transfer --sweep d_model=8,16", "no --sweep"),
    ("--study circuit --no-mlp", "takes --cot --mlp"),
    ("--study update --task copy", "takes --task parity"),
    ("--study induction --n-layers 3", "takes --n-layers 2")])
def test_a_study_refuses_what_it_cannot_use(line, words, refused):
    assert words in refused(exp, f"--smoke {line}")
