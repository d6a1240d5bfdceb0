"""The science of exp_layernorm_landscape.py: laws, gradients, optimisers, measures, claims."""
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, gelu, layer_norm, rms_norm

import common
import exp_layernorm_landscape as exp
from conftest import judged, ledger, run


def flags_of(study=exp.Landscape, **fields):
    """Flags of one run of a study."""
    return exp.Flags(**{**study.defaults, "runs": 1, **fields}, room=study)


def random_weights(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def trained(line, path):
    """Arrays of a study, from a command line."""
    assert run(exp, f"--compile off --runs 1 {line}", path) == 0
    return common.read(path / "arrays.npz")


# ---- The associative memory -------------------------------------------------------------------------

def test_the_law_by_hand():
    """Four tokens, three classes, a fifth of the labels wrong."""
    right = np.eye(3)[:, [0, 1, 2, 0]]
    by_hand = {"uniform": [.25] * 4, "p1": [.4, .2, .2, .2], "zipf": np.array([144, 36, 16, 9]) / 205}
    for law, p in by_hand.items():
        joint = exp.joint_of(exp.Flags(n_tokens=4, n_classes=3, law=law, p1=.4, label_noise=.2))
        np.testing.assert_allclose(joint, p * np.where(right, .8, .1), atol=1e-15)


@pytest.mark.parametrize("fields", [dict(n_tokens=6, n_classes=3, law="zipf"), dict(label_noise=.2)])
def test_draws_follow_the_law(fields):
    flags = exp.Flags(batch=1000, **fields)
    number = common.run_of(common.numbers([flags], exp.constants), 0)
    possible = number["joint"] > 0
    drawn = sum(exp.batch_of(flags, number, torch.tensor(t)) for t in range(200)) / 200
    assert abs(drawn.sum() - 1) < 1e-12
    seen, expected = (200_000 * share[possible] for share in (drawn, number["joint"]))
    assert ((seen - expected) ** 2 / expected).sum() < 40  # chi-squared, at most 5 degrees


@pytest.mark.parametrize("norm, textbook", [
    ("none", lambda h: h),
    ("sphere", lambda h: h / (h.square().sum(1, keepdim=True) + 1e-6).sqrt()),
    ("rms", lambda h: rms_norm(h, [5], eps=1e-6)),
    ("layernorm", lambda h: layer_norm(h, [5], eps=1e-6))])
def test_loss_and_gradient_are_those_of_the_textbook(norm, textbook):
    n = exp.number_of(exp.Flags(n_tokens=7, n_classes=3, d_model=5, emb="gauss", unemb="gauss",
                                law="zipf", label_noise=.2, norm=norm))
    W = random_weights(5, 5)
    logits_of = lambda W: textbook(n["E"] @ W.T) @ n["U"].T
    loss_of = lambda W: cross_entropy(logits_of(W), n["joint"].T, reduction="sum")
    seen, grad = exp.loss_and_gradient(W, n["joint"], n)
    expected, loss = torch.func.grad_and_value(loss_of)(W)
    assert abs(seen["loss"] - loss) < 1e-10
    assert (grad - expected).abs().max() < 1e-9
    answers = logits_of(W).argmax(1)
    assert abs(seen["accuracy"] - n["joint"][answers, torch.arange(7)].sum()) < 1e-12
    torch.testing.assert_close(n["U"] @ exp.normalised(W @ n["E"].T, n), logits_of(W).T)


def test_tiny_losses_are_exact():
    for gap in 1., 10., 30., 80.:
        nll, _, best = exp.losses(torch.tensor([[gap], [0.], [0.]]).double())
        assert abs(nll[0, 0] / math.log1p(2 * math.exp(-gap)) - 1) < 1e-13
        assert best[:, 0].tolist() == [1, 0, 0]
    assert exp.losses(torch.zeros(2, 1))[2].sum() == 0  # a tie is an error


@pytest.mark.parametrize("kind, theirs", [
    ("gd", torch.optim.SGD), ("momentum", partial(torch.optim.SGD, momentum=.9)),
    ("normalised", torch.optim.SGD), ("adam", torch.optim.Adam),
    ("sign", partial(torch.optim.Adam, betas=(0., 0.), eps=0))])
def test_optimisers_are_torchs(kind, theirs):
    flags = flags_of(optimiser=kind, norm="sphere", d_model=3, n_tokens=3, emb="gauss")
    n, state = exp.number_of(flags), exp.start(flags)
    W = state["params"]["W"].clone().requires_grad_()
    optimiser = theirs([W], lr=.1)
    for _ in range(5):
        W.grad = exp.gradient(W.detach(), n)
        if kind == "normalised":
            W.grad /= W.grad.norm()
        optimiser.step()
        state, _ = exp.step_of(flags)(state, n)
    torch.testing.assert_close(state["params"]["W"], W.detach(), rtol=1e-9, atol=1e-12)


def test_directions_of_no_gradient_and_of_a_tiny_one():
    assert (exp.unit(torch.zeros(2, 2)) == 0).all()
    tiny = torch.full((2, 2), 1e-200, dtype=torch.float64)
    assert abs(exp.unit(tiny).norm() - 1) < 1e-12


def test_a_start_by_angle_and_length_repeats_the_known_spike(tmp_path):
    """Two nearby tokens, cos .95, p .75, lr .5, from h_1 = -.5 c + .02 o and h_2 = -.5 c - .01 o, where
    c = (1, -1) / sqrt 2 tells the classes apart and o = (1, 1) / sqrt 2 does not."""
    angles, lengths = 135 - np.degrees(np.arctan([.04, -.02])), np.hypot(.5, [.02, .01])
    start = "/".join(map("{}:{}".format, angles, lengths))
    arrays = trained("--cos .95 --p1 .75 --lr .5 --norm sphere --eps 0 --optimiser gd --steps 40 "
                     f"--start-at {start}", tmp_path)
    np.testing.assert_allclose(arrays["loss"][0, [32, 33]], [.260, 1.006], atol=2e-3)
    np.testing.assert_allclose(arrays["grad_norm"][0, 32], 2.71, rtol=.02)
    np.testing.assert_allclose(arrays["min_hidden_norm"][0, 32], .035, rtol=.02)
    np.testing.assert_allclose(arrays["theta"][0, 0], angles)
    np.testing.assert_allclose(arrays["loss"][0], -np.log(arrays["right"][0]) @ [.75, .25])


@pytest.mark.parametrize("line, words", [
    ("--emb nonsense", "--emb is one of canonical"), ("--norm nonsense", "--norm is one of none"),
    ("--norm layernorm", "two points"), ("--start-at 1:2", "angle:length"),
    ("--start-at x", "angle:length"), ("--n-tokens 3", "two vectors"),
    ("--norm sphere --init-scale 0", "no direction"),
    ("--study plane --d-model 2 --emb canonical --n-tokens 3", "need a larger"),
    ("--study landscape --d-model 3", "N = M = d = 2"), ("--modulus 3", "does not read --modulus"),
    ("--study clusters --modulus 5", "modulus <= vocab")])
def test_bad_flags(line, words, refused):
    assert words in refused(exp, line)


def test_curvature_is_the_hessian():
    n, W = exp.number_of(flags_of(norm="sphere")), random_weights(2, 2)
    hessian = torch.func.hessian(lambda w: exp.observed(w.view(2, 2), n))(W.flatten())
    expected = torch.linalg.eigvalsh(hessian)
    torch.testing.assert_close(exp.curvature(W, n), expected, rtol=1e-8, atol=1e-10)


def test_extremes_of_the_circle():
    n = exp.number_of(exp.Flags())
    loss = exp.Landscape.circle(n)
    assert abs(loss.amin(0) @ n["joint"].sum(0) - exp.floor_of(2)) < 1e-5
    assert abs(loss.amax() - math.log1p(math.exp(math.sqrt(2)))) < 1e-3


def test_dimensions_of_known_paths():
    flags = flags_of(exp.Plane, n_tokens=5, n_classes=3, d_model=4)
    t = np.linspace(0, 1, 40)[:, None, None]
    A, B, C = np.random.default_rng(0).normal(size=(3, 4, 4))
    paths = np.cumsum([t * A, t ** 2 * B, 1e-3 * t ** 3 * C], 0)
    for rank, W in enumerate(paths, 1):
        found = exp.Plane.measure(flags, exp.number_of(flags), {"W": W})
        assert found["rank"] == rank and found["bound"] == 8
        assert (found["outside"] < 1e-12) == (rank < 3)
        assert (found["gram_schmidt"] < 1e-8) == (rank < 3)


@pytest.mark.parametrize("N, d", [(2, 4), (5, 3)])
def test_classes_of_W(N, d):
    """gd's steps commute with the scale of W, not with that of one W e_x."""
    flags = flags_of(exp.Plane, n_tokens=N, n_classes=2, d_model=d, norm="sphere")
    found = exp.Plane.measure(flags, exp.number_of(flags), {"W": random_weights(3, d, d).numpy()})
    assert found["class_dimension"] == found["class_formula"]
    assert found["meets"] < 1e-12
    if N <= d:
        assert found["scale_step"] < 1e-6 and found["class_step"] > .01


def test_max_margin_and_what_it_guarantees():
    n = exp.number_of(flags_of(exp.Projections, emb="pair", cos=.5))
    E = n["E"].numpy()
    V = np.einsum("x,i,xj->xij", [1, -1], n["U"][0] - n["U"][1], E)
    W_inf = exp.Projections.max_margin(V)
    others = np.random.default_rng(0).normal(size=(20000, 2, 2))
    others /= np.linalg.norm(others, axis=(1, 2), keepdims=True)
    margins = lambda W: np.einsum("...ij,xij->...x", W, V)
    best, along = margins(others).min(1).max(), margins(W_inf)
    assert along.min() >= best > .95 * along.min()
    length = np.linalg.norm(E @ W_inf.T, axis=1)
    for norm, exact in ("none", 2 * along), ("sphere", along / length):  # of W = 2 W_inf
        least = exp.Projections.guarantee(np.full(1, 2.), np.zeros(1), along, V, E, W_inf, norm)
        np.testing.assert_allclose(least[0], exact)


def test_segments_above_their_chord():
    a, b = random_weights(2, 1000, 2, 2)
    assert exp.Convexity.above(lambda W: (W ** 2).sum(), a, b) == 0
    assert exp.Convexity.above(lambda W: -(W ** 2).sum(), a, b) == 1


def test_a_short_vector_relieves_its_step():
    """The second token is a tenth as long as usual; the control doubles the first."""
    n, W = exp.number_of(flags_of(exp.Spikes, norm="sphere")), random_weights(2, 2)
    h = W @ n["E"].T
    def rise(*factors):
        V = h * torch.tensor(factors) @ n["E"].T.inverse()
        return exp.observed(V - 10 * exp.gradient(V, n), n) - exp.observed(V, n)
    usual = h.norm(dim=0) * torch.tensor([1, 10])
    expected = [rise(1, 10) / rise(1, 1), rise(2, 1) / rise(1, 1)]
    np.testing.assert_allclose(exp.Spikes.relieved(W, n, 10., usual.tolist()), expected)


def test_a_planted_spike():
    """The loss rises at step 3, too early to count, and at 12, where W is small and turns."""
    loss = np.repeat([0., .5, 1.], [4, 9, 8])
    W = np.eye(2) * np.repeat([1., .1, -1.], [12, 1, 8])[:, None, None]
    flags = flags_of(exp.Spikes, steps=20, norm="none", lr=1.)
    found = exp.Spikes.measure(flags, exp.number_of(flags), {"W": W, "loss": loss})
    assert found["largest"] == 12 and found["rises"] == 2 and found["height"] == .5
    assert np.flatnonzero(found["small"]) == np.flatnonzero(found["turned"]) == 12


def test_a_cause_is_compared_with_other_seeds():
    """It is there in the run with a spike and in one of five others."""
    arrays = {"norm": np.full(6, "sphere"), "optimiser": np.full(6, "gd"), "lr": np.ones(6),
              "cos": np.ones(6), "seed": np.arange(6), "largest": np.array([12] + [-1] * 5)}
    small = np.zeros((6, 20))
    small[:2, 12] = 1
    there, usual = exp.Spikes.excess(arrays | {"small": small}, "small", "gd")
    assert there.tolist() == [1] and usual.tolist() == [.2]


def test_first_step_from_which_all_is_correct():
    flags = flags_of(exp.Rates, steps=4)
    for accuracy, expected in ([1] * 5, 0), ([0, 1, .75, 1, 1], 3), ([1, 1, 1, 1, .75], math.inf):
        found = exp.Rates.measure(flags, None, {"accuracy": np.array(accuracy)})
        assert found["correct"] == expected


def test_small_studies_reach_what_is_exactly_known(tmp_path):
    arrays = trained("--study projections --steps 60", tmp_path / "projections")
    assert (arrays["slack"] > -1e-12).all()
    assert not arrays["broken"].any()
    arrays = trained("--study norm --steps 200 --optimiser gd --batch 0 --label-noise 0",
                     tmp_path / "norm")
    one = exp.pick(arrays, norm="none", n_tokens=1)
    assert np.abs(arrays["flow"][one] - 1).max() < .02
    assert arrays["inner"][arrays["norm"] == "sphere"].max() < 1e-6


# ---- Rules of claims --------------------------------------------------------------------------------

def settings(study, seeds=10, more=()):
    """Arrays of settings of all points of a study, and of more."""
    flags = flags_of(study)
    points = *study.points(flags), *more
    runs = [replace(flags, seed=seed, **point) for point in points for seed in range(seeds)]
    arrays = {k: np.array([getattr(run, k) for run in runs]) for k in ("seed", *exp.OWN)}
    times = np.where(arrays["optimiser"] == "gd", 1, arrays["d_model"])
    return arrays | {"rate": arrays["lr"] * times}


def test_the_order_of_methods_is_judged_shape_by_shape():
    arrays = settings(exp.Ranking)
    order = [("gd", "none"), ("gd", "sphere"), ("adam", "none"), ("adam", "sphere")]
    ways = zip(arrays["optimiser"], arrays["norm"])
    level = np.array([.4 - .1 * order.index(way) if way in order else .4 for way in ways])
    found = judged(exp.Ranking, arrays | {"error": level})
    orders = [k for k in found if k.startswith("order")]
    assert len(orders) == 14 and all(found[k] for k in orders)
    few = exp.pick(arrays, n_classes=2, norm="sphere", optimiser="gd") & (arrays["seed"] < 5)
    found = judged(exp.Ranking, arrays | {"error": level + .5 * few})
    assert [k for k in orders if found[k] is None] == [k for k in orders if "-M2-" in k]
    found = judged(exp.Ranking, arrays | {"error": 1 - level})
    assert [*found] == [*ledger("exp_layernorm_landscape", exp.Ranking)]
    assert not any(found[k] for k in orders)


def test_gradient_flow_is_where_rate_times_steps_is_one_number():
    arrays = settings(exp.Rates, 1)
    for power, holds in (1, True), (.5, False):
        found = judged(exp.Rates, arrays | {"correct": 300 / arrays["lr"] ** power})
        assert found["flow"] is holds and found["all-learn"] is True
    assert [*found] == [*ledger("exp_layernorm_landscape", exp.Rates)]


@pytest.mark.parametrize("holds, times, above, measured", [
    (True, 1, 0, dict(flow=1., grown=.1, inner=0., exponent=.25)),
    (False, 2, 1, dict(flow=1.5, grown=-.1, inner=1., exponent=.4))])
def test_claims_on_norms_can_hold_and_be_false(holds, times, above, measured):
    """|W| ends at so many times its law, the loss so far above its floor."""
    arrays = settings(exp.Norm)
    R = len(arrays["seed"])
    arrays |= {k: np.full(R, x) for k, x in measured.items()}
    last = times * np.sqrt(9 + 100 * arrays["lr"] ** 2)
    arrays |= {"step": np.array([0, 100]), "weight_norm": np.stack([0 * last + 3, last], 1),
               "loss": np.full((R, 2), exp.floor_of(2) + above)}
    assert {*judged(exp.Norm, arrays).values()} == {holds}


# ---- Modular sums in the plane ----------------------------------------------------------------------

def plane(**fields):
    """A small run, its float64 parameters and its numbers."""
    small = dict(seq_length=6, sparsity=3, n_train=20, max_width=8, width=8, batch=4, snapshots=False)
    one = flags_of(exp.Clusters, **small | fields)
    params = exp.plane_init(one, torch.Generator().manual_seed(1))
    return one, {k: x.double() for k, x in params.items()}, exp.plane_number(one)


def test_sequences_are_distinct_and_summed():
    one, _, number = plane(n_train=48, modulus=3)
    x, y = exp.plane_tokens(one, number["code"], number)
    assert x.shape == x.unique(dim=0).shape == (60, 6)
    assert x.unique().tolist() == [0, 1, 2]
    assert y.tolist() == [sum(row[:3]) % 3 for row in x.tolist()]


def plain(params, x, one):
    """The textbook model: one query over a sequence."""
    normed = lambda x: rms_norm(x, [one.d_model], eps=1e-5)
    u = normed(params["E"][x] + params["P"])
    weight = (u @ params["query"] / math.sqrt(one.d_model)).softmax(1)
    h = (weight[..., None] * (u @ params["W_V"])).sum(1)
    hidden = gelu(normed(h) @ params["W_in"] + params["b_in"])[:, :one.width]
    out = h + hidden @ params["W_out"][:one.width] + params["b_out"]
    return (out @ params["U" if one.untied else "E"].T)[:, :one.modulus]


@pytest.mark.parametrize("fields", [{}, dict(modulus=3, untied=False, d_model=5, width=3)], ids=str)
def test_the_table_is_the_plain_transformer(fields):
    one, params, number = plane(**fields)
    x, y = exp.plane_tokens(one, number["code"], number)
    fast = lambda p: exp.plane_losses(exp.plane_forward(p, x, number)["logits"], y).mean()
    slow = lambda p: cross_entropy(plain(p, x, one), y)
    grads, loss = torch.func.grad_and_value(fast)(params)
    expected, expected_loss = torch.func.grad_and_value(slow)(params)
    assert abs(loss - expected_loss) < 1e-9
    assert all((grads[k] - expected[k]).abs().max() < 1e-9 for k in params)


def test_measures_of_planted_models(monkeypatch):
    """One whose h is the sum of the first k and who answers by it; then one who reads the last token."""
    one, params, _ = plane(n_train=48)
    def measured(part):
        def forward(params, x, number):
            total = x[:, part].sum(1)
            return {"h": total[:, None].repeat(1, 2).float(), "logits": torch.eye(3)[total % 2]}
        monkeypatch.setattr(exp, "plane_forward", forward)
        return exp.Clusters.measure(one, params)
    found = measured(slice(0, 3))
    perfect = "r2_counts", "r2_signed", "keeps_others", "train_accuracy"
    assert all(found[k] > 1 - 1e-6 for k in perfect)
    assert .2 < found["keeps_first"] < .8
    found = measured(slice(5, 6))
    assert found["keeps_first"] == 1 and .2 < found["keeps_others"] < .8
    assert found["r2_counts"] < .4


@pytest.mark.parametrize("freeze, still", [
    ("attention", {"query", "W_V"}), ("mlp", {"W_in", "b_in", "W_out", "b_out"}), ("none", set())])
def test_frozen_parts_stay(freeze, still):
    one, _, number = plane(freeze=freeze)
    old = exp.plane_start(one)
    new, _ = exp.plane_step_of(one)(old, number)
    assert {k for k, x in old["params"].items() if torch.equal(x, new["params"][k])} == still


@pytest.mark.parametrize("true", [True, False])
def test_claims_on_clusters_can_hold_and_be_false(true):
    """Half of the seeds come above .95 from scratch, all or none of those that are fine-tuned."""
    tuned = [dict(child, source=source) for source, (_, child) in exp.TUNED.items()]
    arrays = settings(exp.Clusters, more=tuned)
    half = (arrays["seed"] < 5) * 1.
    accuracy = np.where(arrays["source"] == "", half, true)
    arrays |= {"accuracy": accuracy, "eval_accuracy": accuracy[:, None],
               "train_accuracy": accuracy + (not true)}
    arrays |= dict.fromkeys(("r2_counts", "r2_signed"), half if true else -half)
    arrays |= {"keeps_others": half * true, "keeps_first": half * (not true)}
    found = judged(exp.Clusters, arrays)
    assert {*found.values()} == {true}
