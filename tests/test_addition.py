"""exp_addition: the law by enumeration, the fast paths against the plain one, every measure on
something whose answer is known, a run that learns, and the rules of the claims."""
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import exp_addition as exp
from conftest import ROOT, judged, run

torch.set_num_threads(1)
Anatomy = exp.Anatomy


def params_of(flags, scale=1., dtype=torch.float64, noise=.1, positions=None):
    """Initial parameters with every bias moved off zero and the scores made `scale`^2 times larger."""
    params = exp.init(flags, common.generator(flags.seed, "init"), positions)
    g = common.generator(1, "init")
    params = {k: (p + noise * torch.randn(p.shape, generator=g)).to(dtype) for k, p in params.items()}
    return params | {k: params[k] * scale for k in ("W_Q", "W_K")}


def digits(flags, count):
    return exp.sample(flags, common.key(torch.tensor(0), 0, torch.tensor(0)), count)


# ---- law --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base, count", [(2, 9), (10, 5)])
def test_columns_add_like_integers(base, count):
    ab = digits(exp.Flags(base=base, digits=count), 500)
    assert ab.min() >= 0 and ab.max() < base
    weight = base ** torch.arange(count).flip(0)[:, None]
    a, b = (weight * ab[:count]).sum(0), (weight * ab[count:]).sum(0)
    naive, carry, total = exp.columns(ab, base)
    for k in range(count + 1):
        unit = base ** k
        assert torch.equal(exp.pick(naive, k), (a // unit + b // unit) % base)
        assert torch.equal(exp.pick(carry, k), (a % unit + b % unit) // unit)
        assert torch.equal(exp.pick(total, k), (a + b) // unit % base)


@pytest.mark.parametrize("base", [7, 10])
def test_sampled_digits_are_uniform_and_independent(base):
    ab, expected = digits(exp.Flags(base=base, digits=2), 40000), 40000 / base ** 2
    for one, other in itertools.combinations(ab, 2):
        count = torch.bincount(one * base + other, minlength=base ** 2)
        chi2 = ((count - expected) ** 2 / expected).sum()
        assert abs(chi2 - base ** 2 + 1) < 5 * math.sqrt(2 * base ** 2)


def bayes_loss(base, count, k, view):
    """Loss of digit k of a model that knows exactly view(a digits, b digits, answers), all from the
    units up, by enumeration."""
    views, cases = Counter(), Counter()
    for word in itertools.product(range(base), repeat=2 * count):
        a, b = word[:count], word[count:]
        total = sum((x + y) * base ** i for i, (x, y) in enumerate(zip(a, b)))
        answers = [total // base ** i % base for i in range(count + 1)]
        seen = view(a, b, answers)
        views[seen] += 1
        cases[seen, answers[k]] += 1
    return -sum(n * math.log(n / views[seen]) for (seen, _), n in cases.items()) / base ** (2 * count)


def test_floors_are_the_bayes_losses_of_an_enumeration():
    base, count = 3, 3
    floor = exp.floors(base, count)
    for k in range(count + 1):
        top = min(k + 1, count)
        for seen in range(top + 1):
            columns = slice(top - seen, top)
            expected = bayes_loss(base, count, k, lambda a, b, z: (a[columns], b[columns]))
            assert floor[k, seen] == pytest.approx(expected, abs=1e-12)
        assert np.isnan(floor[k, top + 1:]).all()
    carried = [a + b >= 9 for a in range(9) for b in range(9)]
    assert exp.carry_probability(3, 2) == pytest.approx(np.mean(carried))


def test_the_level_with_earlier_answers_needs_the_column_above():
    """Earlier answers give the carry away only where the column above is seen, too."""
    above = bayes_loss(3, 3, 1, lambda a, b, z: (a[1:], b[1:], tuple(z[2:])))
    own = bayes_loss(3, 3, 1, lambda a, b, z: (a[1], b[1], tuple(z[2:])))
    assert exp.teacher_floor(3, 1) == pytest.approx(above, abs=1e-12)
    assert own > above + .05


# ---- model ------------------------------------------------------------------------------------------

def test_initial_parameters():
    params = exp.init(exp.Flags(), common.generator(0, "init"))
    assert sum(p.numel() for p in params.values()) == 201_856
    for name, p in params.items():
        deviation = 0 if name.startswith("b") else (12 if name == "W_U" else 128) ** -.5
        assert float(p.std()) == pytest.approx(deviation, rel=.1), name


def test_the_plain_model_is_torchs():
    flags = exp.Flags(d_model=12, n_heads=3)
    params, tokens = params_of(flags), exp.tokens_of(flags, digits(flags, 8))
    x = params["W_E"][tokens] + params["W_pos"]
    heads = lambda name: (x @ params[name]).view(8, 12, 3, 4).transpose(1, 2)
    z = F.scaled_dot_product_attention(heads("W_Q"), heads("W_K"), heads("W_V"), is_causal=True)
    x = x + z.transpose(1, 2).flatten(2) @ params["W_O"]
    neurons = torch.relu(x @ params["W_in"] + params["b_in"])
    expected = (x + neurons @ params["W_out"] + params["b_out"]) @ params["W_U"]
    for first in 0, 11:
        found = exp.forward(params, tokens, 3, first)
        torch.testing.assert_close(found, expected[:, first:], rtol=0, atol=1e-10)


def assert_same(fast, plain, params, atol):
    (gf, lf), (gp, lp) = (torch.func.grad_and_value(f)(params) for f in (fast, plain))
    assert abs(lf - lp) < atol * max(1, abs(lp))
    for k in params:
        assert (gf[k] - gp[k]).abs().max() <= atol * (1 + gp[k].abs().max()), k


@pytest.mark.parametrize("heads, scale, dtype, atol", [
    (4, 1, torch.float64, 1e-9), (4, 30, torch.float64, 1e-9), (16, 1, torch.float32, 1e-4)])
def test_fast_path_is_the_plain_one(heads, scale, dtype, atol):
    flags = exp.Flags(d_model=16, n_heads=heads)
    params, ab = params_of(flags, scale, dtype), digits(flags, 64)
    tokens, labels = exp.tokens_of(flags, ab), exp.columns(ab, 10)[2][2]
    fast = lambda p: exp.nll(exp.fast_forward(p, ab, heads), labels).mean()
    plain = lambda p: F.cross_entropy(exp.forward(p, tokens, heads)[:, -1], labels)
    assert_same(fast, plain, params, atol)


@pytest.mark.parametrize("answer", ["teacher", "parallel"])
def test_all_answers_by_tables_are_those_of_the_plain_forward(answer):
    flags = exp.Flags(d_model=16, n_heads=4, answer=answer)
    params, ab = params_of(flags, positions=17), digits(flags, 32)
    total, earlier = exp.All.answers(flags, ab)
    tokens = torch.cat([exp.tokens_of(flags, ab), earlier], 1)
    fast = lambda p: exp.All.loss(flags, p, ab, None)
    plain = lambda p: F.cross_entropy(exp.forward(p, tokens, 4)[:, 11:].flatten(0, 1), total.flatten())
    assert_same(fast, plain, params, 1e-9)


def test_what_is_fed_after_equals():
    flags, ab = exp.Flags(), torch.tensor([[0, 0, 0, 9, 9, 0, 0, 0, 0, 1]]).T
    assert exp.tokens_of(flags, ab).tolist() == [[0, 0, 0, 9, 9, 10, 0, 0, 0, 0, 1, 11]]
    total, earlier = exp.All.answers(flags, ab)
    assert total.tolist() == [[0, 0, 0, 1, 0, 0]]
    assert earlier.tolist() == [[0, 0, 0, 1, 0]]
    assert exp.All.answers(exp.Flags(answer="parallel"), ab)[1].tolist() == [[11] * 5]


def test_huge_scores_do_not_underflow():
    flags = exp.Flags(d_model=2, n_heads=2)
    params = params_of(flags, 300., torch.float32, noise=1.)
    assert torch.isfinite(exp.fast_forward(params, digits(flags, 512), 2)).all()


def test_nll_is_exact_far_below_float32_epsilon():
    logits = torch.tensor([[0., 25., 3.], [0., 60., -5.], [90., 0., 0.]])
    expected = [math.log1p(math.exp(-25) + math.exp(-22)), math.exp(-60) + math.exp(-65), 90.]
    found = exp.nll(logits, torch.tensor([1, 1, 1]))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)


# ---- measures ---------------------------------------------------------------------------------------

def evaluated(monkeypatch, flags, logits):
    """What is evaluated of an oracle with these logits, and the kind of shelf that it rests on."""
    monkeypatch.setattr(exp, "fast_forward", lambda params, ab, heads: logits(ab))
    found = exp.evaluate_of(flags)(None, {"digit": torch.tensor(flags.digit)})
    return found, exp.Sweep.shelf_kind(flags, found["loss"], found["pair"], found["alias"])


def test_an_oracle_that_sees_one_column_rests_on_the_floor(monkeypatch):
    flags, p = exp.Flags(digit=1), exp.carry_probability(10, 1)

    def carry_blind(ab):
        n = exp.columns(ab, 10)[0][1][:, None]
        probs = torch.zeros(len(n), 12).scatter(1, n, 1 - p).scatter(1, (n + 1) % 10, p)
        return (probs + 1e-12).log()
    found, kind = evaluated(monkeypatch, flags, carry_blind)
    error = 4 * math.sqrt(p * (1 - p)) * abs(math.log(p / (1 - p))) / math.sqrt(4096)
    assert found["loss"] == pytest.approx(exp.floors(10, 5)[1, 1], abs=error)
    assert found["pair"] == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(found["delta"][:, :2], torch.tensor([[1 - p, p]] * 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["delta"].sum(1) + found["other"], torch.ones(2))
    assert kind == "carry-blind"
    assert exp.Sweep.shelf_kind(flags, .3, 0., [0., .9, .9]) == "between"  # part of the carry is known


@pytest.mark.parametrize("m, name", [(1, "n mod 1"), (5, "n mod 5"), (10, "solved")])
def test_an_oracle_that_knows_the_units_mod_m_is_named(monkeypatch, m, name):
    flags, token = exp.Flags(), torch.arange(12)

    def aliased(ab):
        n = exp.columns(ab, 10)[0][0][:, None]
        return 30. * (token % m == n % m) * (token < 10)
    found, kind = evaluated(monkeypatch, flags, aliased)
    assert found["loss"] == pytest.approx(math.log(10 / m), abs=1e-5)
    assert kind == name


def test_milestones_of_a_curve_with_known_ones():
    """The first run learns and spikes twice, the second never learns, the third diverges."""
    loss = np.full((3000, 3), 2.3)
    loss[200:, 0] = 1e-5
    loss[1000:1020, 0] = loss[2000:2020, 0] = .1
    loss[100:, 2] = np.nan
    found = exp.milestones([exp.Flags()] * 3, {"loss": loss})
    assert 200 < found["descent"][0] <= 203 and np.isinf(found["descent"][1])
    assert 200 < found["reach"][0] < 211
    assert found["spikes"][:2].tolist() == [2, 0]
    assert 1000 < found["first_spike"][0] < 1012
    assert all(np.isnan(x[2]) for x in found.values())


def test_the_level_where_a_curve_rests():
    parts = [np.full(100, 2.3), np.linspace(2.3, .8, 50), np.full(200, .8), np.linspace(.8, 0, 100)]
    loss = np.concatenate(parts)[:, None]
    (level,), (step,) = exp.Digit.resting_level(loss, np.array([2.2]), .5)
    assert level == pytest.approx(.8, abs=.01) and 200 < step < 360


def test_correlation_ratio():
    classes = torch.arange(4000) % 20
    noise = torch.randn(4000, 200, generator=common.generator(0, "law"))
    found = Anatomy.correlation_ratio(noise, classes)
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(200)  # uncorrected it would be 19/4000
    assert Anatomy.correlation_ratio(classes.double()[:, None], classes)[0] == pytest.approx(1)
    assert Anatomy.correlation_ratio(torch.zeros(4000, 1), classes)[0] == 0


def test_measures_of_a_model_with_a_planted_circuit():
    flags = exp.Flags(d_model=8, n_heads=2)
    params, ab = params_of(flags, dtype=torch.float32, noise=.5), exp.evaluation_set(flags)[:, :512]
    params["W_O"][:4] = 0  # nothing of head 0 is read
    params["W_pos"][6:11] = params["W_pos"][:5]  # a and b are the same to it
    found = Anatomy.measure(flags, params, ab)
    assert found["ablation"][0] == 0 != found["ablation"][1]
    torch.testing.assert_close(found["place_similarity"][:, 0, 0], torch.ones(5))
    assert found["exchange"][1] < 1e-5 < found["exchange"][2]
    params["W_pos"][6:11] += 1
    params["W_out"][:] = 0
    found = Anatomy.measure(flags, params, ab)
    assert found["exchange"][1] > 1e-2
    assert found["ablation"][2] == 0


def test_the_score_table_is_the_attention():
    flags = exp.Flags(d_model=8, n_heads=2)
    params, ab = params_of(flags), digits(flags, 32)
    tokens, (look, seen) = exp.tokens_of(flags, ab), Anatomy.recorder()
    exp.forward(params, tokens, 2, 11, look)
    scores = Anatomy.measure(flags, params, ab)["scores"]
    weights = scores[:, torch.arange(12), tokens].softmax(-1)  # [heads, B, positions]
    torch.testing.assert_close(weights.transpose(0, 1), seen["attention"][:, :, 0], rtol=0, atol=1e-10)


def test_fourier_measures_know_a_pure_frequency(monkeypatch):
    flags, angle = exp.Flags(d_model=8, n_heads=2), 2 * math.pi * 3 / 10

    def planted(flags, params, ab):
        n = exp.columns(ab, 10)[0][0]
        logits = 12 * torch.cos(angle * (n[:, None] - torch.arange(10)))
        logits = F.pad(logits, (0, 2), value=-30.)
        wave = torch.cos(angle * ab[4].float())
        neurons = torch.stack([wave, ab[3].float(), torch.ones_like(wave)], 1)
        return exp.nll(logits, n).mean(), logits, {"neurons": neurons}
    monkeypatch.setattr(Anatomy, "watch", planted)
    found = Anatomy.fourier(flags, params_of(flags, dtype=torch.float32))
    full = pytest.approx(float(found["full_loss"]), rel=1e-3)
    assert found["restricted_loss"] == full
    assert found["excluded_loss"][0] == full
    assert found["excluded_loss"][2] > 2  # without w = 3 nothing is left
    assert found["term_energy"][1, 2, 2] == pytest.approx(1, abs=1e-3)
    assert found["term_energy"][0, 2, 0] == pytest.approx(1, abs=.1)
    assert found["neuron_r2"][0, 2] == pytest.approx(1, abs=1e-4)
    assert found["neuron_active"][2] == 1


def test_gradient_input_finds_the_only_position_that_is_read():
    flags = exp.Flags(d_model=8, n_heads=1, mlp=False, probe="head:0")
    params, others = params_of(flags, dtype=torch.float32), [i for i in range(11) if i != 3]
    params["W_Q"].zero_()  # even attention; only position 3 has a value
    params["W_E"].zero_()
    params["W_pos"][others] = 0
    found = Anatomy.gradient_input(flags, params, digits(flags, 64))
    assert found[3] > 0 and (found[others] == 0).all()


# ---- training and studies ---------------------------------------------------------------------------

def test_it_learns_the_units(tmp_path):
    line = "--base 5 --digits 2 --digit 0 --d-model 32 --lr 1e-2 --batch 64 --steps 120"
    assert run(exp, f"{line} --runs 2 --evals 2 --compile off --figures curves", tmp_path / "r") == 0
    loss = np.load(tmp_path / "r/metrics.npz")["loss"]
    assert loss.shape == (120, 2)
    assert (loss[:5] > 1.5).all() and (loss[-5:] < .05).all()


@pytest.mark.parametrize("line", [
    "--no-mlp --base 2 --digits 3 --digit 3 --sweep d_model=4,8 lr=1e-3,1e-2",
    "--study anatomy --digits 1 --probe head:1 --figures attention dependence",
    "--study anatomy --base 7 --digit 2 --probe neuron:3 --figures fourier"])
def test_variants_run(line, tmp_path):
    assert run(exp, f"--smoke --runs 1 --compile off {line}", tmp_path / "r") == 0


def test_anatomy_of_a_checkpoint_takes_each_run_as_what_it_was(tmp_path, capsys):
    assert run(exp, "--smoke --runs 1 --compile off --figures curves", tmp_path / "r") == 0
    line = f"--smoke --study anatomy --checkpoint {tmp_path / 'r/checkpoint.pt'}"
    assert run(exp, f"{line} --figures development", tmp_path / "a") == 0
    found = np.load(tmp_path / "a/arrays.npz")
    assert found["digit"].tolist() == [0, 1]
    assert found["attention"].shape == (2, 2, 12)
    assert found["neuron_dependence"].shape == (2, 32, 15)
    assert run(exp, f"{line} --d-model 16", tmp_path / "b") == 2
    assert "another shape" in capsys.readouterr().err


@pytest.mark.parametrize("line, says", [
    ("--digit 7", "--digit 7 must be at most --digits 5"), ("--n-heads 3", "divisible by --n-heads 3"),
    ("--sweep digit=0,9", "--digits 5"), ("--study theory --sweep lr=1,2", "does not read"),
    ("--study anatomy --probe head:9", "--probe"), ("--study anatomy --no-mlp", "--no-mlp"),
    ("--study spikes --sweep d_model=2,4 --n-heads 1", "one shape")])
def test_bad_flags_are_one_line(line, says, refused):
    assert says in refused(exp, line)


def test_a_replay_without_intervention_repeats_the_run(tmp_path, monkeypatch):
    """Bit for bit, though it is forked and regrouped; with an intervention it does not."""
    for name, steps in ("before", 30), ("after", 20), ("lead", 10):
        monkeypatch.setattr(exp.Spikes, name, steps)
    monkeypatch.setattr(exp.Spikes, "first_spikes", lambda arrays: np.array([60., np.inf]))
    assert run(exp, "--smoke --study spikes --steps 80 --runs 2", tmp_path / "r") == 0
    found = np.load(tmp_path / "r/arrays.npz")
    same, *changed = found["fork_loss"]
    assert same.shape == (50, 1) and len(changed) == 6
    np.testing.assert_array_equal(same, found["around_loss"])
    assert not any(np.array_equal(loss, same) for loss in changed)
    assert len(common.read(tmp_path / "r/summary.json")["runs"]) == 2


# ---- claims -----------------------------------------------------------------------------------------

def sweep_verdicts(one_head, two_heads):
    """The sweep's verdicts where t1's and t2's runs reach 1e-3 at these steps; all else is random."""
    t1, t2 = "tens 128/1 decay 0.25", "tens 128/2 decay 0.25"
    reach = [*one_head, *two_heads]
    small_eps = ["units 128/4 decay 0.5"] * 9
    others = [setting for _, setting, *_ in exp.Sweep.rows() if setting not in (t1, t2)] * 3
    config = [t1] * len(one_head) + [t2] * len(two_heads) + small_eps + others
    g = np.random.default_rng(1)
    keys = "descent reach lowest lowest_step final bump spikes vibration".split()
    arrays = {key: g.exponential(500, len(config)) + 20 for key in keys}
    arrays["reach"][:len(reach)] = reach
    arrays["eps"] = np.full(len(config), 1e-8)
    arrays["eps"][len(reach):len(reach) + 9] = [1e-9, 1e-7, 1e-6] * 3
    return judged(exp.Sweep, arrays | {"config": np.array(config)})


def test_the_notes_rows_are_judged_by_what_they_say():
    never = math.inf
    stuck = sweep_verdicts([never] * 4, [never] * 4)
    assert stuck["t1"] is True  # one head should not converge, as the notes say
    assert stuck["t2"] is False  # two heads should: a step that never comes is no step
    solved = sweep_verdicts([900] * 4, [900] * 3 + [never])
    assert solved["t1"] is False and solved["t2"] is True
    open = sweep_verdicts([never, never, 900, 900], [never] * 2)
    assert open["t1"] is None  # half of four runs decide nothing
    assert open["t2"] is None  # and neither do two seeds


@pytest.mark.parametrize("shape, lowest, highest", [(1, .8, 1), (3, 0, .6)])
def test_the_rule_for_waiting_times_has_the_error_rates_that_it_says(shape, lowest, highest):
    """The share of samples that are taken for exponential, which those of shape 1 are."""
    g = np.random.default_rng(0)
    verdict = lambda waits: common.judge("", *exp.Sweep.waiting(waits, g))["verdict"]
    share = np.mean([verdict(100 + g.gamma(shape, size=64)) == "holds" for _ in range(20)])
    assert lowest <= share <= highest
    assert verdict(np.array([1., 2, np.inf, 3])) == "open"


def test_the_lines_for_a_notebook_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(exp, "--smoke --digit 0 --n-heads 4 --name look --figures curves") == 0
    text = (ROOT / "README.md").read_text()
    exec("if 1:\n" + text[text.index("    import common"):text.index("## Forking")], {})
    all_heads, three_heads = capsys.readouterr().out.split("\n")[-2].split(") ")
    assert all_heads != three_heads
