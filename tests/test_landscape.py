"""The science of exp_layernorm_landscape.py: laws, the written-out gradient, optimisers, measures on planted paths, claims."""
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, gelu

import common
import exp_layernorm_landscape as exp
from conftest import judged, ledger, run


def flags_of(study=exp.Landscape, **fields):
    """Flags of one run of a study."""
    return exp.Flags(**{**study.defaults, "runs": 1, **fields}, room=study)


def trained(study, path, line=""):
    """Arrays of a study, from a command line."""
    assert run(exp, f"--study {common.study_name(study.__name__)} --compile off {line}", path) == 0
    return common.read(path / "arrays.npz")


# ---- The associative memory -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("N, M, q", [(1, 2, 0.), (2, 2, .25), (5, 3, .1), (3, 7, 0.)])
def test_the_law_by_hand(N, M, q):
    p = np.array([.6] + [.4 / (N - 1)] * (N - 1)) if N > 1 else np.ones(1)
    expected = [[p[x] * (1 - q if y == x % M else q / (M - 1)) for x in range(N)] for y in range(M)]
    joint = exp.joint_of(exp.Flags(n_tokens=N, n_classes=M, label_noise=q, p1=.6))
    np.testing.assert_allclose(joint, expected, atol=1e-15)


@pytest.mark.parametrize("fields", [dict(n_tokens=6, n_classes=3, law="zipf"), dict(label_noise=.2), dict(n_tokens=1, label_noise=.4)])
def test_draws_follow_the_law(fields):
    flags = exp.Flags(batch=1000, **fields)
    number = common.run_of(common.numbers([flags], exp.constants), 0)
    drawn = sum(exp.batch_of(flags, number, torch.tensor(t)) for t in range(200))
    assert ((drawn / 200).sum() - 1).abs() < 1e-12 and (drawn[number["joint"] == 0] == 0).all()
    expected = 200_000 * number["joint"][number["joint"] > 0]
    assert ((1000 * drawn[number["joint"] > 0] - expected) ** 2 / expected).sum() < 40  # chi-squared, at most 5 degrees


@pytest.mark.parametrize("norm", [*exp.NORMS])
@pytest.mark.parametrize("shape", [(2, 2, 2), (7, 3, 5), (9, 8, 11)], ids=str)
def test_loss_and_gradient_are_those_of_the_textbook(norm, shape):
    N, M, d = shape
    n = exp.number_of(exp.Flags(n_tokens=N, n_classes=M, d_model=d, emb="gauss", unemb="gauss", law="zipf", label_noise=.2, norm=norm))
    def textbook(W):
        h = n["E"] @ W.T
        c = h - h.mean(1, keepdim=True) if norm == "layernorm" else h
        square = (c * c).sum(1, keepdim=True) if norm == "sphere" else (c * c).mean(1, keepdim=True)
        v = h if norm == "none" else c / (square + 1e-6).sqrt()
        return -(n["joint"].T * (v @ n["U"].T).log_softmax(1)).sum()
    W = torch.randn(d, d, generator=torch.Generator().manual_seed(0)).double()
    (seen, grad), (expected, loss) = exp.loss_and_gradient(W, n["joint"], n), torch.func.grad_and_value(textbook)(W)
    scale = 1e4 if norm == "layernorm" and d == 2 else 1  # N is all but a step function there
    assert abs(seen["loss"] - loss) < 1e-10 * scale and (grad - expected).abs().max() < 1e-9 * scale
    right = (n["U"] @ exp.normalised(W @ n["E"].T, n)).argmax(0) == torch.arange(M)[:, None]
    assert abs(seen["accuracy"] - (n["joint"] * right).sum()) < 1e-12


@pytest.mark.parametrize("dtype, digits", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_tiny_losses_are_exact(dtype, digits):
    for gap in 1., 10., 30., 80.:
        nll, soft, best = exp.losses(torch.tensor([[gap], [0.], [0.]], dtype=dtype))
        expected = math.log1p(2 * math.exp(-gap))
        assert abs(nll[0, 0] / expected - 1) < digits and best[:, 0].tolist() == [1, 0, 0]
    assert exp.losses(torch.zeros(2, 1))[2].sum() == 0  # a tie is an error


@pytest.mark.parametrize("kind, theirs", [("gd", torch.optim.SGD), ("momentum", lambda p, lr: torch.optim.SGD(p, lr, momentum=.9)),
                                          ("adam", torch.optim.Adam), ("sign", None), ("normalised", None)])
def test_optimisers_are_torchs(kind, theirs):
    flags = flags_of(optimiser=kind, norm="sphere", d_model=3, n_tokens=3, emb="gauss")
    n, state = exp.number_of(flags), exp.start(flags)
    W = state["params"]["W"].clone().requires_grad_()
    optimiser = theirs and theirs([W], lr=.1)
    for _ in range(5):
        W.grad = exp.gradient(W.detach(), n)
        if optimiser:
            optimiser.step()
        else:
            W.data -= .1 * (W.grad.sign() if kind == "sign" else W.grad / W.grad.norm())
        state, _ = exp.step_of(flags)(state, n)
    torch.testing.assert_close(state["params"]["W"], W.detach(), rtol=1e-9, atol=1e-12)
    assert (exp.unit(torch.zeros(2, 2)) == 0).all() and abs(exp.unit(torch.full((2, 2), 1e-200, dtype=torch.float64)).norm() - 1) < 1e-12


def test_a_start_by_angle_and_length_repeats_the_known_spike(tmp_path):
    """Two nearby tokens, cos .95, p .75, lr .5, from h_1 = -.5 c + .02 o and h_2 = -.5 c - .01 o, c the class direction."""
    c, o = torch.tensor([[1., -1.], [1., 1.]], dtype=torch.float64) / 2 ** .5
    words = []
    for h in -.5 * c + .02 * o, -.5 * c - .01 * o:
        words.append(f"{math.degrees(math.atan2(h[1], h[0]))}:{h.norm()}")
    line = f"--cos .95 --p1 .75 --lr .5 --norm sphere --eps 0 --optimiser gd --runs 1 --steps 40 --start-at {'/'.join(words)}"
    arrays = trained(exp.Landscape, tmp_path, line)
    np.testing.assert_allclose(arrays["loss"][0, [32, 33]], [.260, 1.006], atol=2e-3)
    np.testing.assert_allclose([arrays[k][0, 32] for k in ("grad_norm", "min_hidden_norm")], [2.71, .035], rtol=.02)


@pytest.mark.parametrize("line, words", [
    ("--emb nonsense", "--emb is one of canonical"), ("--norm nonsense", "--norm is one of none"), ("--norm layernorm", "two points"),
    ("--start-at 1:2", "angle:length"), ("--start-at x", "angle:length"), ("--n-tokens 3", "two vectors"),
    ("--norm sphere --init-scale 0", "no direction"), ("--study plane --d-model 2 --emb canonical --n-tokens 3", "need a larger"),
    ("--study landscape --d-model 3", "N = M = d = 2"), ("--modulus 3", "does not read --modulus"),
    ("--study clusters --emb pair", "does not read --emb"), ("--study clusters --modulus 5", "modulus <= vocab"),
    ("--study clusters --freeze all", "freeze none")])
def test_bad_flags(line, words, refused):
    assert words in refused(exp, line)


@pytest.mark.parametrize("norm", ["none", "sphere"])
def test_symmetries(norm):
    """Under N only directions count; without N only gamma does; a norm leaves the gradient orthogonal to W."""
    flags = flags_of(norm=norm, eps=0.)
    n, W = exp.number_of(flags), torch.randn(2, 2, generator=torch.Generator().manual_seed(3)).double()
    if norm == "sphere":
        assert abs(exp.observed(3 * W, n) - exp.observed(W, n)) < 1e-12
        assert abs((exp.gradient(W, n) * W).sum()) < 1e-12
    else:
        shift = torch.ones(2, 1).double() @ torch.randn(1, 2).double()  # along u_1 + u_2: gamma stays
        assert abs(exp.observed(W + shift, n) - exp.observed(W, n)) < 1e-12
    flat = lambda w: exp.loss_and_gradient(w.view(2, 2), n["joint"], n)[0]["loss"]
    expected = torch.linalg.eigvalsh(torch.func.hessian(flat)(W.flatten()))
    torch.testing.assert_close(exp.curvature(W, n), expected, rtol=1e-8, atol=1e-10)


def test_the_circle_and_its_claim():
    n = exp.number_of(exp.Flags())
    loss = exp.Landscape.circle(n)
    assert abs((loss.amin(0) @ n["joint"].sum(0)) - exp.floor_of(2)) < 1e-5
    assert abs(loss.amax() - math.log1p(math.exp(math.sqrt(2)))) < 1e-3


def test_dimensions_of_known_paths():
    flags, t = flags_of(exp.Plane, n_tokens=5, n_classes=3, d_model=4), np.linspace(0, 1, 40)[:, None, None]
    g = np.random.default_rng(0)
    A, B, C = g.normal(size=(3, 4, 4))
    curve = t * A + t ** 2 * B
    for W, rank in (t * A, 1), (curve, 2), (curve + 1e-3 * t ** 3 * C, 3):
        found = exp.Plane.measure(flags, exp.number_of(flags), {"W": W})
        assert found["rank"] == rank and (found["outside"] < 1e-12) == (rank < 3) and found["bound"] == 8
        assert (found["gram_schmidt"] < 1e-8) == (rank < 3)


@pytest.mark.parametrize("N, d", [(1, 2), (2, 4), (3, 3), (5, 3)])
def test_classes_of_W(N, d):
    flags = flags_of(exp.Plane, n_tokens=N, n_classes=2, d_model=d, norm="sphere", emb="gauss")
    n, W = exp.number_of(flags), torch.randn(3, d, d, generator=torch.Generator().manual_seed(1)).double()
    found = exp.Plane.measure(flags, n, {"W": W.numpy()})
    assert found["class_dimension"] == found["class_formula"] and found["meets"] < 1e-12
    if N <= d:
        assert exp.Plane.image(W[0], n, torch.full((N,), 2.).double(), .1) < 1e-6  # the scale of W
        if N > 1:
            assert exp.Plane.image(W[0], n, torch.arange(1., N + 1).double(), .1) > 1e-3


def test_max_margin_and_what_it_guarantees():
    flags = flags_of(exp.Projections, emb="pair", cos=.5)
    n = exp.number_of(flags)
    V = np.einsum("x,i,xj->xij", [1, -1], n["U"][0] - n["U"][1], n["E"])
    W_inf = exp.Projections.max_margin(V)
    others = np.random.default_rng(0).normal(size=(20000, 2, 2))
    others /= np.linalg.norm(others, axis=(1, 2), keepdims=True)
    margin = lambda W: np.tensordot(W, V, ([-2, -1], [1, 2])).min(-1)
    assert margin(W_inf) >= margin(others).max() > .95 * margin(W_inf)
    for norm in "none", "sphere":
        f1, along = np.array([2., .5]), (V * W_inf).sum((1, 2))
        least = exp.Projections.guarantee(f1, 0 * f1, along, V, n["E"].numpy(), W_inf, norm)
        h = W_inf @ n["E"].numpy().T  # f2 = 0: the bound is exact
        exact = f1[:, None] * along if norm == "none" else along / np.linalg.norm(h, axis=0) + 0 * f1[:, None]
        np.testing.assert_allclose(least, exact)


def test_segments_above_their_chord():
    a, b = torch.randn(2, 1000, 2, 2).double()
    assert exp.Convexity.above(lambda W: (W ** 2).sum(), a, b) == 0
    assert exp.Convexity.above(lambda W: -(W ** 2).sum(), a, b) == 1


def test_a_short_vector_relieves_its_step():
    n = exp.number_of(flags_of(exp.Spikes, norm="sphere"))
    W = torch.tensor([[-.5, .5], [.5, .52]]).double() @ torch.linalg.inv(n["E"].T)
    W = W * torch.tensor([.05])
    usual = (10 * (W @ n["E"].T).norm(dim=0)).tolist()
    short, other = exp.Spikes.relieved(W, n, 10., usual)
    assert math.isfinite(short) and math.isfinite(other) and short != other


def test_a_planted_spike_and_its_excess():
    T = 20
    loss = np.full(T + 1, .5)
    loss[13:] = 1.
    W = np.tile(np.eye(2), (T + 1, 1, 1))
    W[13:] = -np.eye(2)
    W[12] = .1 * np.eye(2)
    flags = flags_of(exp.Spikes, steps=T, norm="none", lr=1.)
    found = exp.Spikes.measure(flags, exp.number_of(flags), {"W": W, "loss": loss})
    assert found["largest"] == 12 and found["rises"] == 1 and found["height"] == .5
    assert found["small"].tolist() == [s == 12 for s in range(T)] == found["turned"].tolist()
    early = exp.Spikes.measure(flags, exp.number_of(flags), {"W": W, "loss": np.r_[loss[10:], loss[:10]]})
    assert early["largest"] == -1 or early["largest"] >= exp.Spikes.EARLY
    R = 6
    arrays = dict(norm=np.array(["sphere"] * R), optimiser=np.array(["gd"] * R), lr=np.ones(R), cos=np.ones(R), seed=np.arange(R),
                  largest=np.array([12, -1, -1, -1, -1, -1]), small=np.zeros((R, T)))
    arrays["small"][:2, 12] = 1
    there, usual = exp.Spikes.excess(arrays, "small", "gd")
    assert there.tolist() == [1] and usual.tolist() == [.2]


def test_the_prototypes_losses(tmp_path):
    arrays = trained(exp.Spikes, tmp_path, "--steps 6 --runs 1 --sweep lr=10 --norm none --init-scale 0 --optimiser gd")
    np.testing.assert_allclose(arrays["loss"][0], [.6931, 1.1631, .4976, .7528, .6438, 1.3487, .2896], atol=1e-4)


def test_first_step_from_which_all_is_correct():
    flags = flags_of(exp.Rates, steps=4)
    for accuracy, expected in ([1] * 5, 0), ([0, .75, 1, 1, 1], 2), ([0, 1, .75, 1, 1], 3), ([1, 1, 1, 1, .75], math.inf):
        assert exp.Rates.measure(flags, None, {"accuracy": np.array(accuracy)})["correct"] == expected


def test_small_studies_reach_what_is_exactly_known(tmp_path):
    arrays = trained(exp.Projections, tmp_path / "p", "--runs 1 --steps 400")
    assert (arrays["slack"] > -1e-12).all() and (arrays["broken"] == 0).all()
    arrays = trained(exp.Norm, tmp_path / "n", "--runs 2 --steps 200 --block 4")
    gd = exp.pick(arrays, norm="none", optimiser="gd", n_tokens=1)
    assert np.abs(arrays["flow"][gd] - 1).max() < .02
    exact = (arrays["norm"] == "sphere") & (arrays["optimiser"] != "adam")
    assert arrays["inner"][exact].max() < 1e-6


def test_runs_of_a_tiny_model_are_alike_in_every_layout(tmp_path):
    line = "--study rates --smoke --steps 40 --compile off --sweep lr=.1,1,10 --runs 2"
    for block in 1, 6:
        assert run(exp, f"{line} --block {block}", tmp_path / f"{block}") == 0
    a, b = (common.read(tmp_path / f"{block}" / "metrics.npz") for block in (1, 6))
    for k in a:
        np.testing.assert_allclose(a[k], b[k], rtol=1e-12, atol=1e-14)


# ---- Rules of claims --------------------------------------------------------------------------------------------------

def settings(study, seeds=10, **fields):
    """Arrays of settings of all points of a study."""
    flags = flags_of(study)
    runs = [replace(flags, seed=s, **p) for p in study.points(flags) for s in range(seeds)]
    return {k: np.array([getattr(r, k) for r in runs]) for k in ("seed", *exp.OWN)}, runs


def test_the_order_of_methods_is_judged_shape_by_shape():
    arrays, runs = settings(exp.Ranking)
    rank = {way: i for i, way in enumerate([("gd", "none"), ("gd", "sphere"), ("adam", "none"), ("adam", "sphere")])}
    level = np.array([.4 - .1 * rank.get((r.optimiser, r.norm), 0) for r in runs])
    arrays["rate"] = arrays["lr"] * np.where(arrays["optimiser"] == "gd", 1, arrays["d_model"])
    found = judged(exp.Ranking, arrays | {"error": level})
    orders = [k for k in found if k.startswith("order")]
    assert len(orders) == 14 and all(found[k] for k in orders)
    few = (arrays["seed"] < 5) & (arrays["n_classes"] == 2) & (arrays["norm"] == "sphere") & (arrays["optimiser"] == "gd")
    found = judged(exp.Ranking, arrays | {"error": level + .5 * few})
    assert [k for k in orders if found[k] is None] == [k for k in orders if "-M2-" in k]
    assert not any(judged(exp.Ranking, arrays | {"error": 1 - level})[k] for k in orders)


@pytest.mark.parametrize("study", exp.STUDIES[:-1], ids=lambda study: study.__name__)
def test_the_ledger_holds_what_the_code_claims(study):
    """figures/landscape.md has the ids that a study claims now; README's counts are those of the ledger."""
    arrays, _ = settings(study, 2)
    R, rows = len(arrays["seed"]), ("loss", "right", "f2", "weight_norm", "limit", "small", "sharp", "turned", "relieved")
    class Zeros(dict):
        def __missing__(self, k):
            return np.zeros((R, 2, 2) if k == "right" else (R, 2) if k in rows else R)
    arrays = Zeros(arrays, step=np.arange(2), correct=100 / arrays["lr"], rate=arrays["lr"] * np.where(arrays["optimiser"] == "gd",
        1, arrays["d_model"]), rises=np.ones(R), sharpest=np.ones(R))
    name = common.study_name(study.__name__)
    with np.errstate(all="ignore"):
        assert [*ledger("layernorm_landscape", name, name == "landscape")] == [*judged(study, arrays)]


@pytest.mark.parametrize("good", [True, False])
def test_claims_on_norms_can_hold_and_be_false(good):
    arrays, _ = settings(exp.Norm)
    R, sign = len(arrays["seed"]), 1 if good else -1
    arrays |= {"flow": np.full(R, 1 if good else 1.5), "grown": np.full(R, .1 * sign), "inner": np.full(R, 0. if good else 1),
               "exponent": np.full(R, .25 if good else .4), "step": np.array([0, 100])}
    first = np.full((R, 1), 3.)
    last = np.sqrt(9 + 100 * arrays["lr"] ** 2)[:, None] * (1 if good else 2)
    arrays |= {"weight_norm": np.hstack([first, last]), "loss": np.full((R, 2), exp.floor_of(2) + (0 if good else 1))}
    assert {*judged(exp.Norm, arrays).values()} == {good}


# ---- Modular sums in the plane ----------------------------------------------------------------------------------------

def plane(**fields):
    """A small run, its float64 parameters and its numbers."""
    small = dict(seq_length=6, sparsity=3, n_train=20, max_width=8, width=8, batch=4, snapshots=False)
    one = flags_of(exp.Clusters, **small | fields)
    params = {k: x.double() for k, x in exp.plane_init(one, torch.Generator().manual_seed(1)).items()}
    return one, params, exp.plane_number(one)


def test_sequences_by_enumeration():
    one, _, number = plane(n_train=48, modulus=3)
    x, y = exp.plane_tokens(one, number["code"], number)
    rows = [*map(tuple, x.tolist())]
    assert len({*rows}) == len(rows) == 60 and {*rows} <= {*product(range(3), repeat=6)}
    assert y.tolist() == [sum(row[:3]) % 3 for row in rows]


def plain(params, x, one):
    """The textbook model: one query over a sequence."""
    normed = lambda x: x / ((x * x).mean(-1, keepdim=True) + 1e-5).sqrt()
    u = normed(params["E"][x] + params["P"])
    weight = (u @ params["query"] / math.sqrt(one.d_model)).softmax(1)
    h = (weight[..., None] * (u @ params["W_V"])).sum(1)
    hidden = gelu(normed(h) @ params["W_in"] + params["b_in"])[:, :one.width]
    out = h + hidden @ params["W_out"][:one.width] + params["b_out"]
    return (out @ params["U" if one.untied else "E"].T)[:, :one.modulus]


@pytest.mark.parametrize("fields", [{}, dict(modulus=3, untied=False), dict(d_model=5, width=3)], ids=str)
def test_the_table_is_the_plain_transformer(fields):
    one, params, number = plane(**fields)
    x, y = exp.plane_tokens(one, number["code"], number)
    fast = torch.func.grad_and_value(lambda p: exp.plane_losses(exp.plane_forward(p, x, number)["logits"], y).mean())
    slow = torch.func.grad_and_value(lambda p: cross_entropy(plain(p, x, one), y))
    (a, loss), (b, expected) = fast(params), slow(params)
    assert abs(loss - expected) < 1e-9 and all((a[k] - b[k]).abs().max() < 1e-9 for k in a)


def test_measures_of_planted_models(monkeypatch):
    """One whose h is the sum of the first k and who answers by it; then one who reads the last token."""
    one, params, _ = plane(n_train=48)
    def knows(part):
        def forward(params, x, number):
            total = x[:, part].sum(1)
            return {"h": total[:, None].repeat(1, 2).float(), "logits": torch.eye(3)[total % 2]}
        return forward
    monkeypatch.setattr(exp, "plane_forward", knows(slice(0, 3)))
    found = exp.Clusters.measure(one, params)
    assert all(found[k] > 1 - 1e-6 for k in ("r2_counts", "r2_signed", "keeps_others", "train_accuracy"))
    assert .2 < found["keeps_first"] < .8
    monkeypatch.setattr(exp, "plane_forward", knows(slice(5, 6)))
    found = exp.Clusters.measure(one, params)
    assert found["keeps_first"] == 1 and .2 < found["keeps_others"] < .8 and found["r2_counts"] < .4


@pytest.mark.parametrize("freeze, still", [("attention", {"query", "W_V"}), ("mlp", {"W_in", "b_in", "W_out", "b_out"}), ("none", set())])
def test_frozen_parts_stay(freeze, still):
    one, _, _ = plane(freeze=freeze)
    old = exp.plane_start(one)
    new, _ = exp.plane_step_of(one)(old, exp.plane_number(one))
    assert {k for k, x in old["params"].items() if torch.equal(x, new["params"][k])} == still


@pytest.mark.parametrize("true", [1, -1])
def test_claims_on_clusters_can_hold_and_be_false(true):
    points = exp.Clusters.points(flags_of(exp.Clusters)) + [dict(child, source=s) for s, (_, child) in exp.TUNED.items()]
    runs = [flags_of(exp.Clusters, **point) for point in points for _ in range(10)]
    a = {k: np.array([getattr(r, k) for r in runs]) for k in exp.OWN}
    half = np.arange(len(runs)) % 10 < 5
    a["accuracy"] = np.where(a["source"] == "", half, true > 0) * 1.
    a |= dict.fromkeys(("r2_counts", "r2_signed"), half * true * 1.) | {"eval_accuracy": a["accuracy"][:, None]}
    a |= {"train_accuracy": a["accuracy"] + (true < 0), "keeps_others": half * true, "keeps_first": half * (true < 0)}
    found = judged(exp.Clusters, a)
    assert {*found.values()} == {true > 0} and [*found] == [*ledger("layernorm_landscape", "clusters")]
