"""exp_layernorm_landscape: the law and its draws, gradients against autograd, exact invariants, known losses and minima,
theorems with counter-examples, measures of known answer, one run alone and in company, every study, verdicts on made-up
numbers, the transformer in the plane, bad input."""
import inspect
import itertools
import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common_v1 as common
import exp_layernorm_landscape as exp
from conftest import cut

torch.set_num_threads(1)
ROOT, NORMS = Path(__file__).parent.parent, ("none", "sphere", "rms", "layernorm")
SINGLE = [study for study in exp.STUDIES if study != "clusters"]
g = lambda seed=0: torch.Generator().manual_seed(seed)
randn = lambda *shape, seed=1: torch.randn(*shape, generator=g(seed), dtype=torch.float64)
double = lambda x: torch.as_tensor(x, dtype=torch.float64)
far = lambda a, b: (double(a) - double(b)).abs().max().item()
same = lambda a, b: a.keys() == b.keys() and all(np.array_equal(
    a[k], b[k], equal_nan=np.asarray(a[k]).dtype.kind == "f") for k in a)
flags_of = lambda line: common.cli(exp.Flags, line.split())
turn = lambda d, seed=9: torch.linalg.qr(randn(d, d, seed=seed))[0]
law = lambda **fields: exp.joint_of(exp.Flags(**fields))


def made(**fields):
    """(flags, constants) of one run, by default a random law of 3 tokens and 3 classes in 4 dimensions, eps 0."""
    fields = dict(study="rates", n_tokens=3, n_classes=3, d_model=4, emb="gauss", unemb="gauss", eps=0.) | fields
    flags = exp.Flags(**fields)
    flags.check()
    return flags, common.run_of(exp.constants([flags]), 0)


def descend(flags, n, W, steps):
    """W_0 .. W_steps [steps + 1, d, d] by the script's own step, and its logs."""
    state = exp.start(flags) | {"params": {"W": W}}
    path, logs, step = [W], [], exp.step_of(flags, True)
    for _ in range(steps):
        state, seen = step(state, None, n)
        path.append(state["params"]["W"])
        logs.append(seen)
    return torch.stack(path), common.stack(logs)


def plain_loss(W, joint, n, flags):
    """The loss as the docstring has it, from torch's own functions."""
    h = n["E"] @ W.T
    mean = (h * h).sum(1, keepdim=True) / (1 if flags.norm == "sphere" else flags.d_model)
    normed = {"none": lambda: h, "layernorm": lambda: F.layer_norm(h, (flags.d_model,), eps=flags.eps)}.get(
        flags.norm, lambda: h / (mean + flags.eps).sqrt())()
    return -(joint * torch.log_softmax(normed @ n["U"].T, 1)).sum()


def folder(tmp_path, flags, name="f"):
    flags.argv = []
    (tmp_path / name).mkdir(exist_ok=True)
    return common.Folder(tmp_path / name, flags)


def arrays_of(tmp_path, line, name="r"):
    """arrays.npz of a run of the script itself, which draws nothing but its first figure."""
    study = flags_of(line).study
    assert exp.main([*line.split(), "--compile", "off", "--figures", next(iter(exp.STUDIES[study][2])), "--out",
                     str(tmp_path / name)]) == 0
    return dict(np.load(tmp_path / name / "arrays.npz"))


# ---- law ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("q", [0., .3])
@pytest.mark.parametrize("N, M", [(1, 1), (1, 3), (5, 1), (7, 3), (2, 2)])
def test_the_law_by_hand(N, M, q):
    for kind, weights in (("uniform", [1] * N), ("zipf", [1 / (x + 1) ** 1.5 for x in range(N)]),
                          ("p1", [.6] + [.4 / (N - 1) for _ in range(N - 1)] if N > 1 else [1])):
        joint = law(n_tokens=N, n_classes=M, law=kind, p1=.6, zipf=1.5, label_noise=q)
        assert joint.sum().item() == pytest.approx(1) and joint.shape == (N, M)
        for x, y in itertools.product(range(N), range(M)):
            share = 1 if M == 1 else 1 - q if y == x % M else q / (M - 1)
            assert joint[x, y].item() == pytest.approx(weights[x] / sum(weights) * share)


@pytest.mark.parametrize("fields", [dict(n_tokens=6, n_classes=3, law="zipf", zipf=1.), dict(label_noise=.25),
                                    dict(n_tokens=4, law="uniform", label_noise=.1)], ids=str)
def test_draws_follow_the_law(fields):
    joint, drawn = law(**fields), lambda seed, chunk: exp.draws(exp.Flags(batch=50, seed=seed, **fields), chunk)
    counts = drawn(3, 0) * 50
    assert far(counts.sum((1, 2)), 50.) < 1e-9 and far(counts, counts.round()) < 1e-9 and len(counts) == common.CHUNK
    assert (counts[:, joint == 0] == 0).all()
    total, expected = counts.sum(0)[joint > 0], 50 * common.CHUNK * joint[joint > 0]
    chi2, freedom = ((total - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)
    for other in (drawn(4, 0), drawn(3, 1)):
        assert far(counts / 50, other) > .01
    each = counts[:, joint > 0] - expected / common.CHUNK  # of single steps, too: their spread is the multinomial's
    assert (each ** 2).mean(0).numpy() == pytest.approx((expected * (1 - joint[joint > 0]) / common.CHUNK).numpy(), rel=.6)


def test_draws_depend_on_seed_batch_and_law_alone(tmp_path, monkeypatch):
    seen = {}

    class Done(Exception):
        pass

    def train(runs, folder, state, n, step, draw, **rest):
        seen["draw"] = draw
        raise Done
    monkeypatch.setattr(common, "train", train)

    def drawn(**fields):
        run = exp.Flags(**dict(optimiser="sgd", batch=9, seed=5, compile="off") | fields)
        with pytest.raises(Done):
            exp.train([replace(run, seed=1), run], None)
        return seen["draw"](1, 2)
    first = drawn()
    assert torch.equal(first, exp.draws(exp.Flags(seed=5, batch=9), 2))
    for other in (dict(lr=3.), dict(norm="sphere"), dict(d_model=7), dict(optimiser="adam"), dict(init_scale=2.), dict(steps=7),
                  dict(cos=-.5), dict(runs=9)):
        assert torch.equal(first, drawn(**other)), other
    for other in (dict(seed=6), dict(batch=8), dict(p1=.7), dict(label_noise=.1)):
        assert not torch.equal(first, drawn(**other)), other
    assert torch.equal(drawn(optimiser="momentum", batch=0), torch.zeros(common.CHUNK, 0))  # the law is with the constants


def test_embeddings():
    e = lambda kind, n=3, d=4, cos=.3: exp.embeddings(kind, n, d, cos, g())
    assert torch.equal(e("canonical"), torch.eye(4, dtype=torch.float64)[:3])
    pair = e("pair", 2)
    assert far(pair @ pair.T, [[1, .3], [.3, 1]]) < 1e-12 and (pair[:, 2:] == 0).all()
    fan = e("fan", 4, 5)
    assert np.abs(np.degrees(np.arctan2(*fan.numpy().T[1::-1]))) == pytest.approx([0, 60, 60, 120])  # the first in the middle
    assert fan[1, 1] * fan[2, 1] < 0 and far(fan.norm(dim=1), 1.) < 1e-12 and (fan[:, 2:] == 0).all()
    sphere, gauss = e("sphere", 500, 6), e("gauss", 500, 6)
    assert far(sphere.norm(dim=1), 1.) < 1e-12 and sphere.mean(0).abs().max() < .1
    assert gauss.std().item() == pytest.approx(6 ** -.5, rel=.05) and gauss.norm(dim=1).std() > .1
    _, n = made(emb="sphere", unemb="sphere")
    assert far(n["E"][0], n["U"][0]) > .01  # not the same vectors twice
    other = made(emb="sphere", unemb="sphere", lr=7., norm="sphere", optimiser="adam")[1]
    assert torch.equal(n["E"], other["E"]) and not torch.equal(n["E"], made(emb="sphere", unemb="sphere", seed=1)[1]["E"])


def plain_plane(params, x, number):
    """Logits [n, V] of tokens x [n, L], sequence by sequence and position by position: what the table must agree with."""
    u = exp.rms(params["E"][x] + params["P"])
    a = torch.softmax(u @ params["query"] / math.sqrt(u.shape[-1]), -1)
    return exp.read_plane(params, (a[..., None] * (u @ params["W_V"])).sum(1), number)[0]


def test_the_angles_of_the_fan_are_those_of_its_comment():
    fan = exp.embeddings("fan", 4, 2, 0., g())
    assert np.degrees(np.arctan2(*fan.numpy().T[::-1])) == pytest.approx([0, -60, 60, -120])


# ---- loss and gradient ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [1., 30.])
@pytest.mark.parametrize("norm, eps", [("none", 0.), ("sphere", 0.), ("sphere", .3), ("rms", 0.), ("rms", .3),
                                       ("layernorm", 0.), ("layernorm", .3)])
def test_loss_and_gradient_are_autograds(norm, eps, scale):
    """Under the law and under a batch, with label noise, for both ways of `product`; what else a step sees, too."""
    for M, d, q in itertools.product(range(1, 6), (3, 6), (0., .2)):
        flags, n = made(n_tokens=4, n_classes=M, d_model=d, norm=norm, eps=eps, label_noise=q, law="zipf")
        W, batch = scale * randn(d, d), exp.draws(replace(flags, batch=7), 0)[0]
        for joint in (n["joint"], batch):
            seen, grad = exp.loss_and_gradient(W, joint, n)
            expected = torch.func.grad(plain_loss)(W, joint, n, flags)
            assert far(grad, expected) < 1e-12 * max(1, expected.abs().max()) and (M > 1 or (grad == 0).all())
        h = n["E"] @ W.T
        loss = plain_loss(W, n["joint"], n, flags)
        assert abs(seen["loss"] - loss) < 1e-12 * max(1, loss) and abs(seen["weight_norm"] - W.norm()) < 1e-12 * scale
        right = exp.logits(W, n).argmax(1) == torch.arange(4) % M
        said = n["joint"].gather(1, exp.logits(W, n).argmax(1)[:, None]).sum()
        assert seen["accuracy"].item() == pytest.approx(said.item()) and (q or said == pytest.approx(
            n["joint"].sum(1)[right].sum().item()))
        c = h - h.mean(1, keepdim=True) if norm == "layernorm" else h
        assert seen["min_hidden_norm"].item() == pytest.approx(c.norm(dim=1).min().item())


@pytest.mark.parametrize("dtype, digits", [("float64", 1e-14), ("float32", 1e-5)])
def test_tiny_losses_and_their_gradients_are_exact(dtype, digits):
    """At margin 40 log softmax knows no digit of either."""
    for M in (2, 3, 5):
        _, n = made(n_tokens=1, n_classes=M, d_model=M, emb="canonical", unemb="canonical", dtype=dtype)
        W = torch.zeros(M, M, dtype=getattr(torch, dtype))
        W[0, 0] = 40.
        seen, grad = exp.loss_and_gradient(W, n["joint"], n)
        small = math.exp(-40)
        assert seen["loss"].item() == pytest.approx(math.log1p((M - 1) * small), rel=digits) and seen["accuracy"] == 1
        soft = small / (1 + (M - 1) * small)
        assert grad[:, 0].tolist() == pytest.approx([-(M - 1) * soft] + [soft] * (M - 1), rel=digits, abs=0)
        assert (grad[:, 1:] == 0).all()
    nll, soft, best = exp.losses(torch.tensor([[0., -40.], [3., 3.], [-800., 800.]]).double())
    assert nll[0].tolist() == pytest.approx([math.log1p(math.exp(-40)), 40 + math.log1p(math.exp(-40))], rel=1e-14, abs=0)
    assert nll[2].tolist() == [1600, 0] and far(soft.sum(1), 1.) < 1e-15
    assert best.bool().tolist() == [[True, False], [False, False], [False, True]]  # a tie is an error
    assert exp.loss_and_gradient(0 * W, n["joint"], n)[0]["accuracy"] == 0


# ---- exact invariants -----------------------------------------------------------------------------------------------

def test_the_gradient_is_orthogonal_to_W_under_a_norm():
    def inner(**fields):
        flags, n = made(**fields)
        grad = exp.loss_and_gradient(W := randn(4, 4), n["joint"], n)[1]
        return abs((W * grad).sum() / W.norm() / grad.norm()).item()
    assert max(inner(norm=norm) for norm in NORMS[1:]) < 1e-14
    assert min(inner(norm=norm, eps=.1) for norm in NORMS[1:]) > 1e-4 and inner(norm="none") > 1e-2


@pytest.mark.parametrize("optimiser", ["gd", "normalised"])
def test_steps_add_up_by_pythagoras(optimiser):
    """|W_t+1|^2 = |W_t|^2 + lr^2 |step|^2; normalised gd: |W_0|^2 + lr^2 t; without the norm neither."""
    for norm, holds in (("sphere", True), ("none", False)):
        flags, n = made(norm=norm, lr=.5, optimiser=optimiser)
        path, logs = descend(flags, n, randn(4, 4), 40)
        size = (path ** 2).sum((1, 2))
        length = logs["grad_norm"] ** 2 if optimiser == "gd" else torch.ones(40).double()
        assert (far(size[1:], size[:-1] + .25 * length) < 1e-12) == holds and length.min() > 1e-8
        if optimiser == "normalised":
            assert (far(size, size[0] + .25 * torch.arange(41).double()) < 1e-10) == holds


def test_scale_equivariance():
    """From c W_0 with c^2 lr gd goes through c W_t, to the bit where c is a power of two."""
    flags, n = made(norm="sphere", lr=.5)
    plain = descend(flags, n, W := randn(4, 4), 20)[0]
    at = lambda c, rate, **more: descend(flags, n | {"lr": torch.tensor(rate).double(), **more}, c * W, 20)[0]
    assert torch.equal(at(2, 2.), 2 * plain) and torch.equal(at(4, 8.), 4 * plain)
    assert 0 < far(at(3, 4.5), 3 * plain) < 1e-12
    assert far(at(2, .5), 2 * plain) > .01 and far(at(2, 2., floor=torch.tensor(.1)), 2 * plain) > 1e-3
    none, m = made(norm="none", lr=.5)
    assert far(descend(none, m | {"lr": torch.tensor(2.)}, 2 * W, 20)[0], 2 * descend(none, m, W, 20)[0]) > .01


@pytest.mark.parametrize("norm", NORMS)
def test_rotation_equivariance(norm):
    """Of gd in what W reads (E) and in what it writes (U, but for layernorm, which knows the axes), and not of Adam or sign."""
    for optimiser, holds in (("gd", True), ("momentum", True), ("normalised", True), ("adam", False), ("sign", False)):
        flags, n = made(norm=norm, optimiser=optimiser, lr=.2)
        W, R = randn(4, 4), turn(4)
        plain = descend(flags, n, W, 15)[0]
        read = far(descend(flags, n | {"E": n["E"] @ R.T}, W @ R.T, 15)[0], plain @ R.T)
        write = far(descend(flags, n | {"U": n["U"] @ R.T}, R @ W, 15)[0], R @ plain)
        assert read < 1e-12 if holds else read > 1e-2
        assert write < 1e-12 if holds and norm != "layernorm" else write > 1e-2


@pytest.mark.parametrize("norm", NORMS)
def test_a_vector_added_to_every_u_changes_nothing(norm):
    """It shifts all logits of a token alike, with any norm; added to one u it does not."""
    flags, n = made(norm=norm, lr=.5)
    plain, c = descend(flags, n, W := randn(4, 4), 15)[0], 3 * randn(4, seed=5)
    assert far(descend(flags, n | {"U": n["U"] + c}, W, 15)[0], plain) < 1e-12
    assert far(descend(flags, n | {"U": n["U"] + c * torch.eye(3)[0][:, None]}, W, 15)[0], plain) > .1


@pytest.mark.parametrize("d", [2, 5])
def test_gd_on_W_is_gd_on_gamma_with_twice_the_rate(d):
    flags, n = made(n_tokens=2, n_classes=2, d_model=d, emb="gauss", unemb="canonical", lr=.7, label_noise=.1)
    u, gamma, steps = n["U"][0] - n["U"][1], [], 30
    path, logs = descend(flags, n, randn(d, d), steps)
    at = path[0].T @ u
    for _ in range(steps + 1):
        gamma.append(at)
        at = at - 2 * flags.lr * torch.func.grad(exp.plane_loss)(at, n)
    gamma = torch.stack(gamma)
    assert far(path.mT @ u, gamma) < 1e-12 and far(exp.plane_loss(gamma[:-1], n), logs["loss"]) < 1e-12
    assert far(path[-1] - path[0], torch.outer(u, gamma[-1] - gamma[0]) / 2) < 1e-12  # and nothing else of W moves


def test_the_torus_is_the_model():
    flags, n = made(n_tokens=2, n_classes=2, d_model=2, emb="pair", norm="sphere", cos=.5, label_noise=.1)
    for seed in range(5):
        h = n["E"] @ (W := randn(2, 2, seed=seed)).T
        loss = exp.torus_loss(torch.atan2(h[:, 1], h[:, 0]), n)
        assert abs(loss - exp.loss_and_gradient(W, n["joint"], n)[0]["loss"]) < 1e-12


def test_optimisers_agree_with_each_other():
    W, path = randn(4, 4), lambda optimiser, **fields: descend(*made(optimiser=optimiser, lr=.1, **fields), W, 20)[0]
    assert far(path("sign"), path("adam", beta1=0., beta2=0., adam_eps=0.)) < 1e-15
    assert torch.equal(path("momentum", momentum=0.), path("gd")) and far(path("momentum"), path("gd")) > .01
    assert far(path("normalised").diff(dim=0).norm(dim=(1, 2)), .1) < 1e-12
    assert set(path("sign").diff(dim=0).abs().flatten().mul(1e6).round().tolist()) == {1e5}
    flags, n = made(n_tokens=1, n_classes=2, d_model=2, emb="canonical", unemb="canonical", optimiser="normalised", lr=.1)
    W = torch.tensor([[230., 0], [-230, 0]]).double()  # a gradient whose square is zero
    assert far(descend(flags, n, W, 3)[0].diff(dim=0).norm(dim=(1, 2)), .1) < 1e-12
    flags, n = made(n_classes=1, optimiser="normalised")
    assert far(descend(flags, n, randn(4, 4), 3)[0], randn(4, 4)) == 0  # nothing to follow


@pytest.mark.parametrize("norm", ["none", "sphere"])
@pytest.mark.parametrize("optimiser, theirs", [
    ("gd", lambda p: torch.optim.SGD(p, .3)), ("momentum", lambda p: torch.optim.SGD(p, .3, momentum=.8)),
    ("adam", lambda p: torch.optim.Adam(p, .3, (.7, .95), 1e-4))])
def test_optimisers_are_torchs(optimiser, theirs, norm):
    flags, n = made(optimiser=optimiser, norm=norm, eps=.1, lr=.3, momentum=.8, beta1=.7, beta2=.95, adam_eps=1e-4)
    path, W = descend(flags, n, randn(4, 4), 20)[0], randn(4, 4).requires_grad_()
    optimiser = theirs([W])
    for expected in path[1:]:
        optimiser.zero_grad()
        plain_loss(W, n["joint"], n, flags).backward()
        optimiser.step()
        assert far(W.detach(), expected) < 1e-11


# ---- known losses ---------------------------------------------------------------------------------------------------

def test_the_losses_of_the_prototype(tmp_path):
    line = "--study spikes --sweep lr=10,1 --runs 1 --steps 6 --cos .95 --p1 .75 --init-scale 0"
    a = arrays_of(tmp_path, line)
    assert a["loss"][0] == pytest.approx([.6931, 1.1631, .4976, .7528, .6438, 1.3487, .2896], abs=5e-5)
    assert np.diff(a["loss"][1]).max() < 0 and a["W"][0, 0].any() == 0


def test_critical_points_of_the_torus():
    theta, loss, index = exp.critical_points(exp.law_of(exp.Flags(p1=.75)))
    order = loss.argsort()
    assert loss[order].tolist() == pytest.approx([.21762, .57118, 1.27828, 1.63184], abs=5e-6)
    assert index[order].tolist() == [0, 1, 1, 2]
    corners = [[-.25, .75], [-.25, 1.75], [.75, .75], [.75, 1.75]]  # of pi: N(W e_x) = +-(1, -1) / sqrt 2
    assert sorted((theta / math.pi).tolist()) == [pytest.approx(c, abs=1e-5) for c in sorted(
        [[a % 2, b % 2] for a, b in corners])]


@pytest.mark.parametrize("M", [2, 3, 5])
def test_the_floor_is_reached_and_never_passed(M):
    v = randn(10, M)
    loss = lambda v: torch.logsumexp(x := F.normalize(v, dim=1), 1) - x[:, 0]
    for _ in range(500):
        v = v - 3 * torch.func.grad(lambda v: loss(v).sum())(v)
    assert far(loss(v), exp.floor_of(M)) < 1e-6 and loss(v).min() > exp.floor_of(M) - 1e-12
    assert loss(randn(20000, M)).min() > exp.floor_of(M)
    _, n = made(n_tokens=1, n_classes=M, d_model=M, emb="canonical", unemb="canonical", norm="sphere")
    assert exp.loss_and_gradient(torch.cat([v[:1].T, randn(M, M - 1)], 1), n["joint"], n)[0]["loss"].item() == pytest.approx(
        exp.floor_of(M), abs=1e-6)


@pytest.mark.parametrize("degrees, expected", [(40, .794), (-40, .794), (0, .794), (160, 1.458), (-160, 1.458), (180, 1.458)])
def test_the_spurious_minimum_of_the_fan(degrees, expected):
    flags, n = made(n_tokens=1, n_classes=3, d_model=2, emb="canonical", unemb="fan", norm="sphere", lr=1.)
    W = torch.zeros(2, 2).double()
    W[:, 0] = torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
    W = descend(flags, n, W, 600)[0][-1]
    assert plain_loss(W, n["joint"], n, flags).item() == pytest.approx(expected, abs=5e-4)
    assert exp.hessian(W, n)[-1] > 1e-2 and exp.hessian(W, n)[0] > -1e-6  # flat along W, upwards across


def test_no_spurious_minimum_where_classes_fit():
    flags, n = made(n_tokens=1, n_classes=3, d_model=3, emb="canonical", unemb="canonical", norm="sphere", lr=1.)
    for seed in range(3):
        assert descend(flags, n, randn(3, 3, seed=seed), 1500)[1]["loss"][-1].item() == pytest.approx(exp.floor_of(3), abs=2e-3)


# ---- theorems, each with a counter-example --------------------------------------------------------------------------

def rank(path):
    s = exp.spectrum(path.numpy())
    return int((s > 1e-9 * s[0]).sum())


def test_dimensions_of_the_paths():
    def of(N, M, optimiser, norm):
        return rank(descend(*made(n_tokens=N, n_classes=M, optimiser=optimiser, norm=norm, lr=.3), randn(4, 4), 150)[0])
    for N, M in ((2, 3), (3, 2), (1, 4)):
        for optimiser in exp.FREE:
            assert of(N, M, optimiser, "none") == N * (M - 1)
    assert of(2, 3, "adam", "none") > 2 * (3 - 1) and of(2, 3, "sign", "none") > 2 * (3 - 1)
    for N, M in ((1, 2), (2, 2), (1, 3)):
        assert N * (M - 1) < of(N, M, "gd", "sphere") <= N * min(4, N + M - 1) < 16
        assert of(N, M, "adam", "sphere") > N * min(4, N + M - 1)


def test_the_study_measures_these_dimensions(tmp_path):
    a = arrays_of(tmp_path, "--study plane --sweep optimiser=gd,momentum,normalised,adam norm=none,sphere n_tokens=2 "
                            "--n-classes 3 --steps 60 --runs 2 --lr .3")
    plain, free = a["norm"] == "none", np.isin(a["optimiser"], exp.FREE)
    assert (a["bound"][plain & free] == 4).all() and (a["bound"][~plain & free] == 8).all()
    assert np.isnan(a["bound"][~free]).all()
    assert (a["rank"] <= a["bound"])[free].all() and (a["rank"][plain & ~free] > 4).all()
    for r in range(len(a["seed"])):
        X = (a["W"][r] - a["W"][r, 0]).reshape(61, -1)
        assert a["rank"][r] == np.linalg.matrix_rank(X, 1e-9 * np.linalg.norm(X, 2))
        s = np.linalg.svd(X)[1]
        assert a["outside"][r] == pytest.approx(np.linalg.norm(s[2:]) / np.linalg.norm(s))
        assert a["spectrum"][r] == pytest.approx(s / s[0]) and a["class_dimension"][r] == pytest.approx(
            np.nan if plain[r] else 2 + 4 * 2, nan_ok=True)
    gd = a["optimiser"] == "gd"
    assert (a["class_step"][gd & ~plain] > 1e-3).all() and (a["scale_step"][gd & ~plain] < 1e-6).all()
    assert np.isnan(a["class_step"][plain | ~gd]).all() and (a["class_formula"][~plain] == a["class_dimension"][~plain]).all()


def test_adam_is_planar_in_the_plane():
    """N = M = d = 2, no norm, any u, any betas; not with the norm, nor with three classes."""
    def outside(**fields):
        fields = dict(n_tokens=2, n_classes=2, d_model=2, optimiser="adam", adam_eps=0., lr=.05) | fields
        s = exp.spectrum(descend(*made(**fields), randn(fields["d_model"], fields["d_model"]), 100)[0].numpy())
        return np.linalg.norm(s[2:]) / np.linalg.norm(s)
    for fields in ({}, dict(unemb="canonical", emb="canonical"), dict(beta1=0.), dict(beta2=.9)):
        assert outside(**fields) < 1e-12
    assert outside(norm="sphere") > 1e-4 and outside(n_classes=3, d_model=3) > 1e-4


@pytest.mark.parametrize("M", [2, 4])
def test_the_margin_law(M):
    t = np.arange(0, 500, 7)
    m = exp.margin_law(t, M, .3, .6)
    assert np.exp(m) + (M - 1) * m == pytest.approx(M * .3 * .6 * t + 1, rel=1e-12) and m[0] == 0

    def error(lr, steps):
        flags, n = made(n_tokens=2, n_classes=M, d_model=M, emb="canonical", unemb="canonical", lr=lr)
        path = descend(flags, n, torch.zeros(M, M).double(), steps)[0]
        return np.abs((path[:, 0, 0] - path[:, 1, 0]).numpy() - exp.margin_law(np.arange(steps + 1), M, lr, .75)).max()
    errors = [error(.4 / k, 50 * k) for k in (1, 2, 4)]
    assert errors[0] < .1 and all(1.8 < a / b < 2.2 for a, b in zip(errors, errors[1:]))


@pytest.mark.parametrize("N, d", [(1, 3), (2, 3), (3, 3), (4, 3), (6, 3), (2, 2), (3, 2), (2, 5)])
def test_the_dimension_of_a_class(N, d):
    n = made(n_tokens=N, n_classes=2, d_model=d, norm="sphere")[1]
    assert exp.class_dimension(randn(d, d), n) == (N + d * (d - N) if N <= d else 1)


def test_gradient_steps_map_the_scale_to_the_scale_and_nothing_else():
    n = made(n_tokens=2, norm="sphere")[1]
    at = lambda *factors: exp.class_step(randn(4, 4), n, torch.tensor(factors).double(), .3)
    assert at(1., 1.) < 1e-9 and at(2., 2.) < 1e-9 and at(4., 4.) < 1e-9 and min(at(1., 2.), at(3., 1.)) > 1e-3


def test_max_margin_by_brute_force():
    for seed, cos, y in ((0, .5, [0, 1]), (1, -.3, [0, 1]), (2, .8, [1, 1])):
        E, U = exp.embeddings("pair", 2, 2, cos, g()).numpy(), randn(2, 2, seed=seed).numpy()
        W_inf, widest = exp.max_margin(E, U, y)
        V = np.stack([np.outer(U[c] - U[1 - c], e).ravel() for e, c in zip(E, y)])
        assert np.linalg.norm(W_inf) == pytest.approx(1) and (V @ W_inf.ravel()).min() == pytest.approx(widest, rel=1e-6)
        all_W = F.normalize(randn(300000, 4, seed=seed + 5), dim=1).numpy()
        best = (V @ all_W.T).min(0).max()
        assert .97 * widest < best <= widest * (1 + 1e-9)
    E3, U3 = np.eye(3), np.eye(3)
    assert exp.max_margin(E3, U3, [0, 1, 2])[0] == pytest.approx((np.eye(3) - 1 / 3) / math.sqrt(2), abs=1e-6)
    W, margin = exp.max_margin(np.stack([E[0], E[0]]), U, [0, 1])  # one token of two classes
    assert np.isnan(W).all() and math.isnan(margin)


@pytest.mark.parametrize("norm", ["none", "sphere"])
def test_what_f1_and_f2_guarantee(norm):
    """An upper bound on the loss, everywhere; along W_inf the loss itself."""
    flags, n = made(norm=norm, emb="sphere", law="zipf")
    E, U, p, y = n["E"].numpy(), n["U"].numpy(), n["joint"].sum(1).numpy(), [0, 1, 2]
    W_inf, widest = exp.max_margin(E, U, y)
    loss = lambda W: np.array([plain_loss(torch.tensor(w), n["joint"], n, flags).item() for w in W])

    def bound(W):
        f1 = (W * W_inf).sum((1, 2))
        total, right = exp.guarantee(f1, np.linalg.norm(W - f1[:, None, None] * W_inf, axis=(1, 2)), E, U, p, y, W_inf, norm)
        correct = [(exp.logits(torch.tensor(w), n).argmax(1).numpy() == y).all() for w in W]
        assert not (right & ~np.array(correct)).any()
        return total, right
    size = np.geomspace(.1, 30, 60)[:, None, None]
    along = size * W_inf
    assert widest > 0 and bound(along)[0] == pytest.approx(loss(along), rel=1e-9) and bound(along)[1].all()
    for W in (size * randn(60, 4, 4).numpy(), along + randn(60, 4, 4).numpy(), along + .1 * randn(60, 4, 4).numpy()):
        total, right = bound(W)
        assert (slack := total - loss(W)).min() > -1e-12
    assert slack[-20:].max() < .2 and right[-20:].all()  # far along it says something
    for e, c in zip(E, y):  # the worst W for each token and class
        for j in {0, 1, 2} - {c}:
            off = np.outer(U[c] - U[j], e)
            off = off - (off * W_inf).sum() * W_inf
            bound(W_inf - np.linspace(0, 2, 60)[:, None, None] * off / np.linalg.norm(off))
    flags, n = made(n_tokens=1, n_classes=2, norm=norm)  # nothing of V is across W_inf; W e grows across the gap of u
    E, U, p, y = n["E"].numpy(), n["U"].numpy(), np.ones(1), [0]
    W_inf, _ = exp.max_margin(E, U, y)
    z = np.linalg.svd(U[:1] - U[1:])[2][1]
    W = 3 * W_inf + size * np.outer(z, E[0])
    assert (bound(W)[0] - loss(W)).min() > -1e-12


def test_f2_goes_to_half_the_log_ratio(tmp_path):
    a = arrays_of(tmp_path, "--study projections --sweep p1=.6,.75 --init-scale 0 --steps 600 --lr 5 --runs 1")
    expected = np.log(a["p1"] / (1 - a["p1"])) / 2
    assert a["f2"][:, -1] == pytest.approx(expected, abs=.01) and a["limit"] == pytest.approx(expected)
    assert (a["guarantee"] >= a["loss"] - 1e-12).all() and (np.diff(a["f1"]) > 0).all()


# ---- measures -------------------------------------------------------------------------------------------------------

def test_spectrum_and_gram_schmidt_of_known_paths():
    t = np.linspace(0, 6, 50)
    axes = np.linalg.qr(randn(9, 3).numpy())[0].T.reshape(3, 3, 3)
    circle = np.cos(t)[:, None, None] * axes[0] + np.sin(t)[:, None, None] * axes[1]
    start = randn(3, 3).numpy()
    s = exp.spectrum(start + circle)
    assert s.shape == (9,) and s[1] > .1 and s[2:].max() < 1e-12 and exp.gram_schmidt(start + circle) < 1e-12
    spiral = start + circle + t[:, None, None] * axes[2]
    assert exp.spectrum(spiral)[2] > .1 and exp.gram_schmidt(spiral) > .1
    assert exp.spectrum(np.stack([start, start + axes[0]])).tolist() == pytest.approx([1, 0])


def test_jumps():
    loss = np.array([1., 1.06, 1.2, .1, .14, .16, .3, .2, 5., 5.4])
    assert exp.jumps(loss).tolist() == [False, True, False, False, False, True, False, True, False]


@pytest.mark.parametrize("norm", ["none", "sphere"])
def test_hessian_by_finite_differences(norm):
    flags, n = made(n_tokens=2, d_model=2, norm=norm, eps=.1)
    W, h, eye = randn(2, 2).flatten(), 1e-4, torch.eye(4).double()
    f = lambda w: plain_loss(w.view(2, 2), n["joint"], n, flags).item()
    H = [[(f(W + h * (a + b)) - f(W + h * (a - b)) - f(W - h * (a - b)) + f(W - h * (a + b))) / (4 * h * h)
          for b in eye] for a in eye]
    assert far(exp.hessian(W.view(2, 2), n), torch.linalg.eigvalsh(torch.tensor(H).double())) < 1e-6


def test_convex_in_what():
    share = lambda across, norm: exp.violated(*made(norm=norm), across, g(), segments=200)
    assert share("W", "none") == share("h", "none") == share("vectors", "none") == share("vectors", "sphere") == 0
    assert share("W", "sphere") > .1 and share("h", "sphere") > .1
    flags, n = made(n_tokens=1, n_classes=3, d_model=2, emb="canonical", unemb="fan", norm="sphere")
    assert 0 < exp.violated(flags, n, "W", g(), segments=200) < 1


def test_a_step_is_relieved_by_what_is_short():
    """A token at 1/50 of its usual length takes too large a step; the other one, and its length, have no part in it."""
    flags, n = made(n_tokens=2, n_classes=2, d_model=2, emb="canonical", unemb="canonical", norm="sphere", lr=5., law="uniform")
    h = F.normalize(torch.tensor([[.9, -1.], [-1., .9]]), dim=1).double() * torch.tensor([[.02], [1]])
    loss = lambda h: plain_loss(h.T, n["joint"], n, flags).item()
    rise = lambda h, lr: loss(h - lr * torch.func.grad(lambda W: plain_loss(W, n["joint"], n, flags))(h.T).T) - loss(h)
    expected = [rise(h * torch.tensor([[50.], [1]]), 5.), rise(h * torch.tensor([[1.], [2]]), 5.), rise(h, 2.5)]
    found = exp.relieved(h.T, n, 5., np.ones(2))
    assert found == pytest.approx([x / rise(h, 5.) for x in expected]) and rise(h, 5.) > .1 and found[0] < .5 < found[1]


def test_first_step_from_which_all_is_correct(tmp_path, monkeypatch):
    accuracy = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [.5, 1, .5, 1], [1, 1, 1, .5], [0, 0, 0, 0]], float)
    monkeypatch.setattr(exp, "train_groups", lambda flags, folder: ([], {"accuracy": accuracy}))
    assert exp.compute_rates(None, None)["correct"].tolist() == [0, 1, 3, np.inf, np.inf]


# ---- training -------------------------------------------------------------------------------------------------------

COMPANY = [{}, dict(lr=3.), dict(norm="sphere"), dict(norm="rms", cos=-.5), dict(emb="canonical", p1=.6),
           dict(norm="sphere", eps=.1, init_scale=3., seed=4)]


def company(**fields):
    """One group of six runs that differ in what is only a number."""
    flags = exp.Flags(**dict(study="rates", steps=25, runs=1, compile="off") | fields)
    runs = [replace(flags, **point) for point in COMPANY]
    for run in runs:
        run.check()
    return runs


def trained(tmp_path, runs, name="f"):
    kept, metrics, _ = exp.train(runs, folder(tmp_path, runs[0], name))
    return kept, {k: v for k, v in metrics.items() if v.ndim > 1}


@pytest.mark.parametrize("fields", [{}, dict(optimiser="adam"), dict(optimiser="momentum", batch=5), dict(d_model=6),
                                    dict(dtype="float32", optimiser="normalised")], ids=str)
def test_a_run_is_alone_in_company(tmp_path, fields):
    runs = company(**fields)
    kept, metrics = trained(tmp_path, runs)
    for r in (0, 3, 5):
        alone, log = trained(tmp_path, runs[r:r + 1], f"alone{r}")
        assert same({k: v if k == "W_step" else v[r:r + 1] for k, v in kept.items()}, alone)
        assert same({k: v[:, r:r + 1] for k, v in metrics.items()}, log)
    assert len({kept["loss"][r, -1].item() for r in range(6)}) == 6 and np.isfinite(kept["loss"]).all()


def test_the_exact_law_in_company_of_batches(tmp_path):
    """A run without --batch keeps its bits beside one with it."""
    runs = [exp.Flags(optimiser="momentum", steps=12, compile="off", batch=b, norm="sphere") for b in (0, 6)]
    (both, _), (exact, _), (drawn, _) = (trained(tmp_path, some, name) for some, name in (
        (runs, "both"), (runs[:1], "exact"), (runs[1:], "drawn")))
    assert np.array_equal(both["W"][:1], exact["W"]) and np.array_equal(both["W"][1:], drawn["W"])
    assert not np.array_equal(exact["W"], drawn["W"])


@pytest.mark.skipif(not shutil.which("c++"), reason="no compiler")
def test_compiled_is_eager(tmp_path, monkeypatch):
    """To 1e-10, on the same data: five steps are two graphs of two and an eager one. And alone is in company, compiled."""
    monkeypatch.setattr(exp, "unroll", lambda flags: 2)
    eager, _ = trained(tmp_path, company(optimiser="momentum", batch=5, steps=5), "eager")
    runs = company(optimiser="momentum", batch=5, steps=5, compile="on")
    compiled, *_ = exp.train(runs, sub := folder(tmp_path, runs[0], "compiled"))
    assert sub.compiled[0]["compiled"], sub.compiled
    for k in eager:
        assert np.allclose(eager[k], compiled[k], rtol=0, atol=1e-10), k
    assert all(np.array_equal(eager[k], compiled[k]) for k in ("E", "U", "p", "y"))
    alone, _ = trained(tmp_path, runs[3:4], "alone")
    assert same({k: v if k == "W_step" else v[3:4] for k, v in compiled.items()}, alone)


def test_small_steps_share_a_graph():
    assert exp.unroll(exp.Flags()) > 1 == exp.unroll(exp.Flags(n_tokens=100, d_model=10))


def fused(runs, unroll, **fields):
    """(logs, state) of 25 steps."""
    runs = [replace(run, **fields) for run in runs]
    state, n = common.stack(exp.start(run) for run in runs), exp.constants(runs)
    data = torch.zeros(25, len(runs), 0)
    f = common.Fused(exp.step_of(runs[0], True), state, n, data[0], runs[0], 25, compiled=False, unroll=unroll)
    return f(data), f.state(), f


@pytest.mark.parametrize("optimiser", ["gd", "adam"])
def test_layouts_and_graphs_of_several_steps_agree(optimiser):
    runs = company(optimiser=optimiser)
    (logs, state, plain), *others = (fused(runs, unroll, block=block) for unroll, block in (
        (1, 1), (10, 1), (1, 4), (1, 1024), (10, 1024), (7, 1024)))
    assert plain.size == 1 and [f.axis for *_, f in others] == [0, 0, -1, -1, -1] and others[-1][2].size == 1024
    for log, end, _ in others:
        assert all(far(log[k], logs[k]) < 1e-12 for k in logs) and logs["W"].shape == log["W"].shape == (25, 6, 2, 2)
        assert all(far(a, b) < 1e-12 for a, b in zip(common.leaves(end), common.leaves(state)))
    assert far(logs["W"][0], common.stack(exp.start(run) for run in runs)["params"]["W"]) == 0  # before the step
    assert far(logs["W"][-1], state["params"]["W"]) > 1e-4


@pytest.mark.parametrize("fields", [{}, dict(optimiser="momentum", batch=5), dict(d_model=6)], ids=str)
def test_what_is_kept_belongs_together(tmp_path, fields):
    """W_0 is the start, and every curve at t is measured on W_t, the last on the end."""
    runs = company(**fields)
    kept, metrics = trained(tmp_path, runs)
    assert kept["W_step"].tolist() == list(range(26)) and kept["W"].shape[:2] == kept["loss"].shape == (6, 26)
    for r, run in enumerate(runs):
        n = common.run_of(exp.constants([run]), 0)
        assert np.array_equal(kept["W"][r, 0], exp.start(run)["params"]["W"])
        for t in (0, 1, 13, 25):
            seen = exp.loss_and_gradient(torch.tensor(kept["W"][r, t]), n["joint"], n)[0]
            for k, v in seen.items():
                assert kept[k][r, t] == pytest.approx(v.item(), abs=1e-12), (k, t)
        joint = n["joint"]
        assert np.allclose(kept["p"][r], joint.sum(1)) and np.array_equal(kept["y"][r], joint.argmax(1))
        if not run.batch:
            grad = exp.loss_and_gradient(torch.tensor(kept["W"][r, 25]), joint, n)[1]
            assert kept["grad_norm"][r, 25] == pytest.approx(grad.norm().item()) and "W" not in metrics


def test_the_start():
    W = lambda **fields: exp.start(exp.Flags(d_model=60, **fields))["params"]["W"]
    assert W(init_scale=3.).std().item() == pytest.approx(3 / math.sqrt(60), rel=.05) and not W(init_scale=0.).any()
    assert torch.equal(W(), W(lr=3., norm="sphere", n_tokens=9)) and far(W(), W(seed=1)) > .1


def test_thinned_paths_are_the_same_path(tmp_path, monkeypatch):
    whole, _ = trained(tmp_path, runs := company(steps=60), "whole")
    monkeypatch.setattr(exp, "KEPT", 10 * 6 * 4 * 8)
    thin, metrics = trained(tmp_path, runs, "thin")
    steps = thin["W_step"]
    assert steps.tolist() == common.marks(60, 10) and steps[0] == 0 and steps[-1] == 60 and len(steps) < 12
    assert np.array_equal(thin["W"], whole["W"][:, steps]) and np.array_equal(thin["loss"], whole["loss"])
    assert thin["loss"].shape == (6, 61) and "W" not in metrics


@pytest.mark.parametrize("kept", [64e6, 8 * 4 * 4 * 5])
def test_two_halves_are_a_whole(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(exp, "KEPT", kept)
    line = "--study rates --sweep optimiser=sgd,adam lr=.1,1 --runs 2 --batch 8 --init-scale 1 --steps 40 --snapshots 5"
    line += " --figures rates --compile off"
    assert cut(exp.main, line.split(), lambda step: step == 12, tmp_path) == (True, 12)


def test_two_halves_of_clusters_are_a_whole(tmp_path):
    line = "--study clusters --smoke --steps 20 --evals 4 --runs 1 --figures clusters --compile off".split()
    assert cut(exp.main, line, lambda step: step == 10, tmp_path) == (True, 10)


def test_diverged_runs_are_left_blank(tmp_path):
    a = arrays_of(tmp_path, "--study norm --runs 1 --steps 9 --sweep lr=.1,1.7e308")
    rows = json.loads((tmp_path / "r" / "summary.json").read_text())["runs"]
    assert [row["diverged"] for row in rows] == [False, True] and rows[1]["loss"] is rows[1]["accuracy"] is None
    assert np.isnan(a["margin"][1]).all() and np.isfinite(a["margin"][0]).all() and np.isnan(a["inner"][1])


# ---- the script itself ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("study", list(exp.STUDIES))
def test_smoke(tmp_path, study):
    out, figures = tmp_path / "r", exp.STUDIES[study][2]
    assert exp.main(line := ["--smoke", "--study", study, "--compile", "off", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert isinstance(summary["claims"], list) and all(c["holds"] is not False and c["source"] for c in summary["claims"])
    assert summary["runs"] and all(math.isfinite(row["loss"]) for row in summary["runs"])
    drawn = {p.stem: p for p in out.iterdir() if p.suffix in (".png", ".gif")}
    assert set(drawn) == set(figures) and all(p.stat().st_size > 1000 for p in drawn.values())
    first = next(iter(figures))
    drawn[first].unlink()
    assert exp.main([*line, "--plot-only", "--figures", first]) == 0 and drawn[first].exists()
    assert json.loads((out / "summary.json").read_text()) == summary
    if study == "landscape":
        recomputed(dict(np.load(out / "arrays.npz")), flags_of("--smoke").steps)


def recomputed(z, steps):
    """What the docstring promises of arrays.npz, in numpy alone."""
    R, T, d, N, M = len(z["seed"]), steps + 1, 2, 2, 2
    shapes = dict(W=(R, T, d, d), E=(R, N, d), U=(R, M, d), p=(R, N), y=(R, N), W_step=(T,)) | dict.fromkeys(
        ("loss", "accuracy", "grad_norm", "weight_norm", "min_hidden_norm"), (R, T))
    assert {k: z[k].shape for k in shapes} == shapes and z["W_step"].tolist() == list(range(T))
    for r, t in itertools.product(range(R), range(T)):
        def loss(W):
            h = z["E"][r] @ W.T
            size = np.sqrt((h ** 2).sum(1, keepdims=True) + z["eps"][r]) if z["norm"][r] == "sphere" else 1
            s = h / size @ z["U"][r].T
            return (z["p"][r] * (np.log(np.exp(s).sum(1)) - s[range(N), z["y"][r]])).sum(), s, h
        W = z["W"][r, t]
        value, s, h = loss(W)
        nudge = 1e-6 * np.eye(4).reshape(4, 2, 2)
        grad = [(loss(W + e)[0] - loss(W - e)[0]) / 2e-6 for e in nudge]
        assert z["loss"][r, t] == pytest.approx(value) and z["weight_norm"][r, t] == pytest.approx(np.linalg.norm(W))
        assert z["grad_norm"][r, t] == pytest.approx(np.linalg.norm(grad), rel=1e-6)
        assert z["min_hidden_norm"][r, t] == pytest.approx(np.linalg.norm(h, axis=1).min())
        assert z["accuracy"][r, t] == pytest.approx(z["p"][r][s.argmax(1) == z["y"][r]].sum())
        if t and z["optimiser"][r] == "gd":
            step = (z["W"][r, t] - z["W"][r, t - 1]) / -z["lr"][r]
            assert np.linalg.norm(step) == pytest.approx(z["grad_norm"][r, t - 1])


@pytest.mark.parametrize("study", SINGLE)
def test_sweeps_are_drawn(tmp_path, study):
    line = f"--study {study} --sweep lr=1,2 --steps 3 --runs 2 --compile off --out {tmp_path / 'r'}"
    assert exp.main(line.split()) == 0
    drawn = {p.stem for p in (tmp_path / "r").iterdir() if p.suffix in (".png", ".gif")}
    assert next(iter(exp.STUDIES[study][2])) in drawn and drawn <= set(exp.STUDIES[study][2])
    assert set(np.load(tmp_path / "r" / "arrays.npz")["lr"]) == {1., 2.}
    claims = json.loads((tmp_path / "r" / "summary.json").read_text())["claims"]
    assert [c["id"] for c in claims] == ["loss-above-floor"] and claims[0]["holds"]


@pytest.mark.parametrize("line", [
    "--study rates --init-scale 1 --sweep d_model=2,3 norm=none,rms", "--study norm --sweep n_tokens=1,2 --emb canonical",
    "--study plane --emb canonical --d-model 8", "--study convexity --sweep norm=sphere,layernorm d_model=3,4",
    "--study projections --emb pair --sweep cos=-.5,.9", "--study clusters --sweep width=4,8 lr=1e-2,1e-3"])
def test_other_configurations_run(tmp_path, line):
    study = flags_of(line).study
    figures = list(exp.STUDIES[study][2])[:1]
    assert exp.main(["--smoke", "--runs", "1", "--compile", "off", "--figures", *figures, "--out", str(tmp_path / "r"),
                     *line.split()]) == 0
    if "d_model=2,3" in line:  # of other shapes: group by group
        for i, d in enumerate((2, 3)):
            assert np.load(tmp_path / "r" / f"group{i}" / "arrays.npz")["W"].shape[2:] == (d, d)


def test_layernorm_in_two_dimensions_is_warned_of(tmp_path, capsys):
    line = "--study rates --sweep lr=1 --init-scale 1 --steps 3 --figures rates --compile off --out"
    for norm, warned in (("layernorm", True), ("rms", False)):
        assert exp.main([*line.split(), str(tmp_path / norm), "--norm", norm, "--d-model", "2"]) == 0
        assert ("nothing to learn" in capsys.readouterr().out) == warned


def test_a_given_flag_fixes_its_field(tmp_path):
    a = arrays_of(tmp_path, "--smoke --study rates --cos .7 --seed 4")
    assert set(a["cos"]) == {.7} and a["seed"].min() == 4


# ---- claims ---------------------------------------------------------------------------------------------------------

full = lambda a, *shape, value=0.: np.full((len(a["seed"]), *shape), value)
verdicts = lambda study, a, flags: {c["id"]: c["holds"] for c in exp.STUDIES[study][1](a, flags)}
column = lambda x: np.asarray(x, float)[:, None]


def fake(study, runs=3):
    """(flags, settings) of a study as it runs by default."""
    flags = flags_of(f"--study {study} --runs {runs}")
    each = sum(common.groups_of_runs(flags), [])
    a = {f: np.array([getattr(run, f) for run in each]) for f in exp.COLUMNS}
    return flags, a | GOOD[study](a, flags)


def landscape(a, flags):
    low, high = exp.floor_of(2), math.log1p(math.exp(math.sqrt(2)))
    loss = np.where(column(a["norm"] == "sphere"), low + .01, .05) + full(a, 3)
    return {"gamma_alone": 0., "off_gamma": full(a), "loss": loss, "critical_index": np.array([0, 1, 1, 2]),
            "critical_loss": np.array([low, .75 * low + .25 * high, .25 * low + .75 * high, high])}


def norm_study(a, flags):
    t, (sphere, o) = np.arange(flags.steps + 1.), (column(a["norm"] == "sphere"), a["optimiser"])
    way = {"gd": t / t[-1] / 1e4, "normalised": np.sqrt(1 + t * flags.lr ** 2) - 1, "adam": t / 100, "sgd": (1 + t) ** .25 - 1}
    weight = 1 + np.where(sphere, np.stack([way[k] for k in o]), np.log1p(t))
    return {"weight_norm": weight, "margin": full(a, 2, value=1.), "law": full(a, 2, value=1.), "inner": full(a),
            "pythagoras": full(a), "loss": np.where(sphere, exp.floor_of(2), .1) + column(a["label_noise"] > 0) + full(a, 2)}


def plane_study(a, flags):
    two = (a["n_tokens"] == 2) & (a["n_classes"] == 2) & (a["norm"] == "none")
    return {"rank": full(a, value=4.), "bound": full(a, value=4.), "outside": 1. - two, "class_dimension": full(a, value=5.),
            "class_formula": full(a, value=5.), "class_step": full(a, value=1.), "scale_step": full(a), "meets": full(a),
            "loss": full(a, 2, value=.5)}


def spikes_study(a, flags):
    t, plain = np.arange(flags.steps + 1), a["norm"] == "none"
    loss = np.where(column(plain & (a["lr"] >= 4)), 1 + t % 2, 1 / (1. + t)) + exp.floor_of(2) * column(~plain)
    loss[plain & (a["lr"] == 10), :7] = exp.KNOWN
    jump = np.zeros((len(t) - 1, len(plain)), bool).T
    jump[~plain, 9] = True
    lone = (a["cos"] == 0) & (a["optimiser"] == "gd")
    return {"loss": loss, "jump": jump, "small": jump, "sharp": jump, "turned": jump & ~lone[:, None],
            "sharpness": full(a, len(t), value=.5), "largest": np.where(plain, -1, 9), "relieved": np.where(
                column(~plain & (a["optimiser"] == "gd")), .2, np.nan) + np.zeros(3)}


def rates_study(a, flags):
    return {"correct": 300 * a["p1"] / (1 - a["cos"]) / a["lr"], "loss": full(a, 2, value=.1)}


GOOD = {"landscape": landscape, "norm": norm_study, "plane": plane_study, "spikes": spikes_study, "rates": rates_study}
FALSE = {"norm": {"diverges-norm", "diverges-norm-correlated"}, "plane": {"classes-to-classes"}}  # of these, as they are
scaled = lambda key, factor: lambda a: {key: a[key] * factor}
moved = lambda key, by: lambda a: {key: a[key] + by}
grown = lambda a: {"weight_norm": a["weight_norm"] + np.where(
    column((a["norm"] == "sphere") & (a["optimiser"] == "gd")), np.linspace(0, 1, a["weight_norm"].shape[1]), 0)}
CHANGES = [  # (study, change, the claims that turn)
    ("landscape", moved("gamma_alone", 1e-9), "gamma-alone"), ("landscape", moved("off_gamma", 1e-3), "gd-in-two adam-in-two"),
    ("landscape", lambda a: {"critical_index": np.array([0, 1, 2, 2])}, "four-critical-points"),
    ("landscape", moved("critical_loss", 1e-6), "four-critical-points"),
    ("landscape", moved("loss", .5), "all-find-the-minimum box"), ("landscape", moved("loss", -.02), "loss-above-floor"),
    ("norm", grown, "diverges-norm diverges-norm-correlated"),
    ("norm", scaled("margin", 1.02), "margin-law-one margin-law-decoupled"),
    ("norm", lambda a: {"weight_norm": 0 * a["weight_norm"] + 1},
     "diverges-plain diverges-norm-adam normalised-sqrt noise-quarter noise-tenth"),
    ("norm", moved("inner", 1e-5), "inner"), ("norm", moved("pythagoras", 1e-5), "pythagoras"),
    ("norm", moved("loss", 1e-3), "floor-reached"),
    ("plane", moved("rank", 1), "bound-plain bound-norm"), ("plane", moved("class_dimension", 1), "degrees-lost"),
    ("plane", moved("outside", 1), "planar-gd planar-normalised planar-adam-canonical planar-adam-random"),
    ("plane", scaled("outside", 1e-6), "norm-not-planar adam-not-planar normalised-not-planar"),
    ("plane", moved("scale_step", 1), "scale-commutes"), ("plane", moved("meets", 1e-9), "sphere-meets"),
    ("plane", scaled("class_step", 1e-9), "classes-to-classes"),
    ("spikes", lambda a: {"loss": np.where(np.arange(a["loss"].shape[1]) < 7, a["loss"] + .001, a["loss"])}, "known-spikes"),
    ("spikes", scaled("sharpness", .2), "no-spike-below"), ("spikes", scaled("sharpness", 2.), "spike-above"),
    ("spikes", lambda a: {"turned": a["jump"]}, "decoupled-cannot-cross"),
    ("spikes", lambda a: {"small": ~a["jump"]}, "spike-small-gd spike-small-momentum spike-small-adam"),
    ("spikes", moved("relieved", 1), "short-causes other-causes rate-causes"),
    ("spikes", lambda a: {"sharp": a["jump"] >= 0}, "spike-sharp-gd spike-sharp-momentum spike-sharp-adam"),
    ("rates", lambda a: {"correct": a["correct"] * a["lr"] ** .2}, "flow"),
    ("rates", lambda a: {"correct": 300 / a["p1"] * (1 - a["cos"]) / a["lr"]}, "harder-p1 harder-cos"),
    ("rates", lambda a: {"correct": np.where(a["lr"] < .2, np.inf, a["correct"])}, "all-learn")]


@pytest.mark.parametrize("study", list(GOOD))
def test_judges_of_whole_studies(study):
    """Each change turns its claims and no others; with fewer steps what needs them is open; of other runs nothing is said."""
    flags, a = fake(study, 1 if study == "rates" else 3)
    before = verdicts(study, a, flags)
    assert {k for k, v in before.items() if v is not True} == FALSE.get(study, set()) and None not in before.values()
    for mine, change, ids in CHANGES:
        if mine == study:
            after = verdicts(study, a | change(a), flags)
            assert {k for k in before if before[k] is not after[k]} == set(ids.split()), ids
    fewer = verdicts(study, a, replaced(flags, steps=flags.steps - 1))
    universal = {"loss-above-floor", "gamma-alone", "four-critical-points", "degrees-lost", "sphere-meets", "known-spikes"}
    assert fewer.keys() == before.keys() and {k for k, v in fewer.items() if v is not None} == universal & set(before)
    for change in (dict(smoke=True), dict(sweep=["lr=1,2"]), dict(init_scale=2.), dict(runs=flags.runs + 1)):
        assert set(verdicts(study, a, replaced(flags, **change))) == {"loss-above-floor"}
    for unfinished in (True, False):
        flags.finished = not unfinished
        assert len(verdicts(study, a, flags)) == (1 if unfinished else len(before))


def replaced(flags, **fields):
    other = replace(flags, **fields)
    other.given = set()
    return other


@pytest.mark.parametrize("study", ["landscape", "norm", "plane"])
def test_diverged_runs_have_no_vote(study):
    flags, a = fake(study, 5)  # two of five against the others would leave a claim open
    before, gone = verdicts(study, a, flags), a["seed"] < 2
    blank = {k: np.where(gone.reshape(-1, *[1] * (v.ndim - 1)), np.nan, v) for k, v in a.items()
             if k not in exp.COLUMNS and np.ndim(v) and len(v) == len(gone)}
    assert verdicts(study, a | blank, flags) | {"noise-quarter": True} == before | {"noise-quarter": True}


def test_diverged_runs_have_no_part_in_the_exponent():
    flags, a = fake("norm", 5)
    a["weight_norm"] = np.where(column(a["seed"] < 2), np.nan, a["weight_norm"])
    a["loss"] = np.where(column(a["seed"] < 2), np.nan, a["loss"])
    assert verdicts("norm", a, flags)["noise-quarter"] is True


def test_too_few_spikes_leave_their_causes_open():
    flags, a = fake("spikes")
    none = {"largest": 0 * a["largest"] - 1, "relieved": np.nan * a["relieved"]}
    open_ = {k for k, v in verdicts("spikes", a | none, flags).items() if v is None}
    assert open_ == {"short-causes", "other-causes", "rate-causes"} | {
        f"spike-{k}-{o}" for k in exp.CAUSES for o in ("gd", "momentum", "adam")}


# ---- clusters -------------------------------------------------------------------------------------------------------

def plane_run(**fields):
    """(flags, parameters in float64, numbers) of a small transformer in the plane."""
    own = exp.Flags.per_study["clusters"] | exp.Flags.per_study["smoke"]
    flags = exp.Flags(**dict(own, study="clusters", runs=1, seq_length=6, sparsity=3, n_train=20, compile="off",
                             snapshots=0) | fields)
    flags.check()
    return flags, common.tree(torch.Tensor.double, exp.init_plane(flags, g(1))), exp.numbers_plane(flags)


@pytest.mark.parametrize("scale", [1., 10.])
@pytest.mark.parametrize("fields", [{}, dict(modulus=3, untied=False), dict(d_model=5, width=3), dict(d_model=1)], ids=str)
def test_the_table_is_the_plain_transformer(fields, scale):
    flags, params, number = plane_run(**fields)
    params = common.tree(lambda p: scale * p, params)
    x, y = exp.sequences(flags)
    hot = exp.one_hot(x, flags.vocab).double()
    p = flags.modulus
    loss = lambda forward: lambda params: F.cross_entropy(forward(params)[:, :p], y)
    table, plain = lambda params: exp.forward_plane(params, hot, number)[0], lambda params: plain_plane(params, x, number)
    assert far(table(params)[:, :p], plain(params)[:, :p]) < 1e-9 * scale ** 2 and (table(params)[:, p:] == -1e9).all()
    a, b = (torch.func.grad(loss(f))(params) for f in (table, plain))
    for k in a:
        assert far(a[k], b[k]) < 1e-9 * max(1., b[k].abs().max().item()), k
    i = 7  # and position by position, in words
    u = torch.stack([(e := params["E"][t] + params["P"][j]) / ((e * e).mean() + 1e-5).sqrt() for j, t in enumerate(x[i])])
    h = torch.softmax(u @ params["query"] / math.sqrt(flags.d_model), 0) @ (u @ params["W_V"])
    hidden = F.gelu((h / ((h * h).mean() + 1e-5).sqrt()) @ params["W_in"] + params["b_in"])
    out = h + hidden[:flags.width] @ params["W_out"][:flags.width] + params["b_out"]
    assert far(params["U" if flags.untied else "E"][:p] @ out, table(params)[i, :p]) < 1e-9 * scale ** 2


def test_norms_bounded_from_below():
    x = torch.tensor([[3., 4.], [.03, .04]]).double()
    size = math.sqrt(12.5)
    assert far(exp.root(x), torch.tensor([size, size / 100])) < 1e-6 and far(exp.rms(x)[0], x[0] / size) < 1e-5
    bounded = exp.rms(x, torch.tensor(.5))
    assert far(bounded[1], x[1] / .5) < 1e-12 and far(bounded[0], exp.rms(x)[0]) < 1e-12


@pytest.mark.parametrize("fields", [{}, dict(modulus=3), dict(n_train=50), dict(modulus=3, seq_length=14, n_train=30)], ids=str)
def test_sequences_are_distinct_and_labelled(fields):
    flags = plane_run(**fields)[0]
    x, y = exp.sequences(flags)
    total, rows = flags.modulus ** flags.seq_length, list(map(tuple, x.tolist()))
    assert len(set(rows)) == len(rows) == min(total, 2 * flags.n_train)
    assert set(itertools.chain(*rows)) == set(range(flags.modulus))
    assert y.tolist() == [sum(row[:3]) % flags.modulus for row in rows]
    batch = exp.sample_sequences(flags, (x, y), 0)
    drawn = {(tuple(row), label) for row, label in zip(batch["x"].flatten(0, 1).tolist(), batch["y"].flatten().tolist())}
    assert drawn == set(zip(rows[:flags.n_train], y.tolist())) and batch["x"].shape == (common.CHUNK, flags.max_batch,
                                                                                        flags.seq_length)
    other = exp.sample_sequences(flags, (x, y), 1)
    assert not torch.equal(batch["x"], other["x"]) and not torch.equal(x, exp.sequences(replace(flags, seed=3))[0])


def test_widths_and_frozen_parts_are_kept(tmp_path):
    """A unit beyond --width has no way out; what is frozen keeps its values, everything else moves."""
    flags = plane_run(steps=5, max_width=8, width=8)[0]
    runs = [replace(flags, **change) for change in ({}, dict(freeze="attention"), dict(freeze="mlp"), dict(width=3))]
    state, metrics, _ = exp.train_plane(runs, folder(tmp_path, flags))
    for r, run in enumerate(runs):
        before, after = exp.start_plane(run)["params"], common.run_of(state["params"], r)
        frozen = {"attention": {"query", "W_V"}, "mlp": {"W_in", "b_in", "W_out", "b_out"}}.get(run.freeze, set())
        assert {k for k in before if torch.equal(before[k], after[k])} == frozen
        assert ((after["W_out"] != 0).any(1) == (torch.arange(8) < run.width)).all()
        assert torch.equal(before["b_in"][run.width:], after["b_in"][run.width:])
        alone, log, _ = exp.train_plane([run], folder(tmp_path, run, f"alone{r}"))
        assert same(after, common.run_of(alone["params"], 0)) and np.array_equal(metrics["loss"][:, r], log["loss"][:, 0])


def test_a_step_in_the_plane_is_torchs_and_sees_its_batch_alone():
    """Loss, gradient and update; what is logged of the vectors, of tokens and sequences that count."""
    flags, params, number = plane_run(batch=4, max_batch=6, d_model=3, max_width=8, width=5)
    params = common.tree(torch.Tensor.float, params)
    params["E"][2] = -params["P"][0]  # a token that does not exist, at the origin
    state = {"params": params, **common.adam_init(params)}
    constants = common.run_of(exp.constants_plane([flags], common.stack([state])), 0)
    batch = common.tree(lambda x: x[0], exp.sample_sequences(flags, exp.sequences(flags), 0))
    step, hot = exp.step_of_plane(flags), exp.one_hot(batch["x"][:4], flags.vocab)
    for lr in (3e-3, 10.):
        after, logs = step(state, batch, constants | {"lr": torch.tensor(lr)})
        theirs = {k: torch.nn.Parameter(p.clone()) for k, p in params.items()}
        optimiser = torch.optim.Adam(theirs.values(), lr)
        loss_of = lambda: F.cross_entropy(plain_plane(theirs, batch["x"][:4].long(), number)[:, :2], batch["y"][:4].long())
        (loss := loss_of()).backward()
        theirs["W_out"].grad[flags.width:] = 0
        grads = {k: p.grad.clone() for k, p in theirs.items()}
        optimiser.step()
        assert logs["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        assert logs["grad_norm"].item() == pytest.approx(common.norm(grads).item(), rel=1e-4)
        assert all(far(p, theirs[k].detach()) < 1e-2 * lr for k, p in after["params"].items())
        descent = sum((grads[k] * (params[k] - theirs[k])).sum() for k in params).item()
        assert logs["descent"].item() == pytest.approx(descent, rel=1e-2)
        assert logs["bend"].item() == pytest.approx(loss_of().item() - loss.item() + descent, rel=1e-2, abs=1e-4)
        for name, vectors in (("embedding", lambda p: exp.table_of(p)[0][:, :2]),
                              ("sequence", lambda p: exp.forward_plane(p, hot, number)[2])):
            x, new = vectors(params), vectors(after["params"])
            assert logs[f"norm_{name}"].item() == pytest.approx(exp.root(x).min().item(), rel=1e-4)
            turned = ((x * new).sum(-1) < 0).float().mean().item()
            assert logs[f"turned_{name}"].item() == pytest.approx(turned) and (turned > 0 or lr < 1 or name == "sequence")
        bounded = step(state, batch, constants | {"floor": torch.tensor([.7, 3.])})[1]["loss"]
        expected = exp.forward_plane(params, hot, number, (torch.tensor(.7), torch.tensor(3.)))[0]
        assert bounded.item() == pytest.approx(F.cross_entropy(expected, batch["y"][:4].long()).item(), rel=1e-5)
        assert abs(bounded.item() - logs["loss"].item()) > 1e-3
        other = {"x": torch.cat([batch["x"][:4], 1 - batch["x"][4:]]), "y": torch.cat([batch["y"][:4], 1 - batch["y"][4:]])}
        assert same(step(state, other, constants | {"lr": torch.tensor(lr)})[0]["params"], after["params"])


def test_spikes_are_found():
    loss = .1 + .02 * torch.rand(2000, 3, generator=g()).numpy()
    assert exp.find_spikes(loss) == []
    t = np.arange(2000)
    loss[:, 1] += 2. * ((t >= 900) & (t < 960)) + .01 * ((t >= 1500) & (t < 1560))
    loss[1200, 2] = loss[850, 1] = .5  # one step is none
    assert exp.find_spikes(.02 + .02 * (np.abs(t - 900) < 30)[:, None]) == []  # twice, but of little
    (when, run, base, peak), = exp.find_spikes(loss)
    assert run == 1 and 900 <= when < 920 and base == pytest.approx(.11, abs=.001) and peak == pytest.approx(2.11, abs=.02)
    loss[:, 0] += 1. * ((t >= 600) & (t < 650)) + 1. * ((t >= 760) & (t < 800)) + 1. * ((t >= 1400) & (t < 1450))
    assert [(r, s // 100) for s, r, *_ in exp.find_spikes(loss)] == [(0, 6), (0, 14), (1, 9)]  # two close ones are one
    loss[-1, 1] = np.nan
    assert [r for _, r, *_ in exp.find_spikes(loss)] == [0, 0] and exp.find_spikes(loss[:200]) == []


def test_what_precedes_a_spike():
    quiet = {k: np.full((600, 2), v) for k, v in dict(norm_embedding=1., norm_sequence=2., turned_embedding=0.,
                                                      turned_sequence=0., descent=1., bend=.2).items()}
    lead = lambda key, at, value, r=1: exp.lead_up({k: np.where((k == key) & np.isin(
        np.arange(600), at)[:, None], value, v) for k, v in quiet.items()}, 400, r)
    base = dict(fall=1., turned=0., overshoot=pytest.approx(.2))
    assert lead("loss", [], 0) == base
    for key, value, name, expected in (("norm_embedding", .1, "fall", .1), ("norm_sequence", .4, "fall", .2),
                                       ("turned_embedding", .3, "turned", .3), ("turned_sequence", .3, "turned", .3),
                                       ("bend", 12., "overshoot", 1.38)):
        for at in ([360], [399]):
            assert lead(key, at, value) == base | {name: pytest.approx(expected)}
        for at in ([359 - exp.CALM], [400]):
            assert lead(key, at, value) == base
    assert lead("norm_embedding", [*range(160), *range(360, 400)], 9.)["fall"] == 2 / 2  # of the other norm
    assert lead("norm_embedding", [*range(160), *range(360, 400)], .1)["fall"] == pytest.approx(.1)  # to what was just before
    assert lead("descent", range(360, 400), 0.)["overshoot"] == np.inf
    a = {"spike_fall": np.array([.2, .5]), "spike_turned": np.array([0., .1]), "spike_overshoot": np.array([2., 1.])}
    assert [x.tolist() for x in exp.seen_in(a, "spike").values()] == [[True, False], [False, True], [True, False]]


def test_small_measures_of_clusters():
    label = torch.tensor([0, 0, 1, 1])
    share = lambda *values: exp.explained_by(torch.tensor(values)[:, None], label).item()
    assert share(1., 1, 3, 3) == 1 and share(0., 2, 0, 2) == 0 and share(0., 2, 4, 6) == pytest.approx(16 / 20)
    assert abs(exp.explained_by(torch.randn(4000, 2, generator=g()), torch.randint(3, (4000,), generator=g(1)))) < .01
    corners = torch.tensor([[0., 0], [0, .001], [5, 0], [5, 5], [9, 9], [0, 1.5]])
    h = corners[(which := torch.arange(600) % 6)] + 1e-4 * torch.randn(600, 2, generator=g())
    assert exp.places(h, which) == 5 and exp.places(h[::6], torch.zeros(100, dtype=int)) == 1
    chain = torch.linspace(0, 1, 50)[:, None].expand(-1, 2) * torch.tensor([1., 0])  # near neighbours all belong together
    assert exp.places(chain, torch.arange(50)) == 1 and math.isnan(exp.places(torch.randn(600, 2), torch.arange(600)))
    x = torch.randint(9, (300, 4), generator=g())
    mixed = exp.shuffled(x, torch.tensor([1, 3]), g(1))
    assert torch.equal(mixed[:, [0, 2]], x[:, [0, 2]]) and torch.equal(mixed[:, 1].sort()[0], x[:, 1].sort()[0])
    assert (mixed[:, 1] == x[:, 1]).float().mean() < .3 and (mixed[:, [1, 3]] == x[:, [1, 3]]).all(1).float().mean() < .1
    assert torch.equal(exp.shuffled(x, torch.arange(0), g()), x)
    assert exp.flat(torch.randn(9, 5)).shape == exp.flat(torch.randn(9, 1)).shape == (9, 2)
    flags = plane_run(modulus=3)[0]
    rows = [[0, 1, 2, 0, 0, 0], [2, 1, 0, 1, 1, 1], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 0]]
    counts, first = exp.multisets(flags, torch.tensor(rows))
    assert counts[0] == counts[1] == counts[2] != counts[3] and first[0] == first[2] != first[1]


def test_fishers_exact_test():
    table = {((0, 8), (8, 8)): True, ((8, 8), (0, 8)): False, ((4, 8), (4, 8)): None, ((0, 8), (3, 8)): None,
             ((0, 8), (4, 8)): True, ((1, 8), (6, 8)): True, ((6, 8), (1, 8)): False, ((0, 0), (3, 8)): None}
    assert {k: exp.fewer(*k) for k in table} == table  # p: 1/12870, .1, .0385, .0203
    for a, b in itertools.product(range(6), repeat=2):  # by all ways of choosing who hits
        first = [sum(i < 5 for i in hits) for hits in itertools.combinations(range(10), a + b)]
        below, above = np.mean([x <= a for x in first]) < .05, np.mean([x >= a for x in first]) < .05
        assert exp.fewer((a, 5), (b, 5)) is (True if below else False if above else None)


def test_a_model_that_knows_the_sum(monkeypatch):
    """Its h is the counts of the first k; then one whose h is the last token, which it says."""
    flags, params, number = plane_run(modulus=2, n_train=30)
    params = common.tree(torch.Tensor.float, params)

    def knows(k):
        def forward(params, hot, number, floors=None):
            x = hot.view(len(hot), 6, 3).argmax(-1)
            h = x[:, k].sum(1, keepdim=True).float()
            return 9. * F.one_hot(x[:, k].sum(1) % 2, 3), None, torch.cat([h, h], 1)
        return forward
    monkeypatch.setattr(exp, "forward_plane", knows(slice(0, 3)))
    end = exp.at_the_end(flags, params)
    assert tuple(end) == exp.AT_THE_END and end["train_accuracy"] == end["keeps_others"] == 1 and .2 < end["keeps_first"] < .8
    assert end["r2_counts"] == end["r2_first"] == end["r2_signed"] == pytest.approx(1) and end["distinct"] == 4
    assert 0 < end["attention_first"] < 1
    monkeypatch.setattr(exp, "forward_plane", knows(slice(5, 6)))
    end = exp.at_the_end(flags, params)
    assert end["keeps_first"] == 1 and .2 < end["keeps_others"] < .8 and max(end[f"r2_{k}"] for k in ("counts", "signed")) < .4
    monkeypatch.setattr(exp, "forward_plane", lambda *a: (torch.full((60, 3), math.nan), None, None))
    assert all(math.isnan(v) for v in exp.at_the_end(flags, params).values())


scratch = lambda run: None  # no parameters are given


@pytest.fixture
def short(monkeypatch):
    """Chunks of ten steps, and spikes to match."""
    for module, name, value in ((common, "CHUNK", 10), (exp, "CALM", 15), (exp, "LEAD", 5), (exp, "SMOOTH", 3)):
        monkeypatch.setattr(module, name, value)
    return monkeypatch


def test_replays_repeat_a_run_to_the_bit(tmp_path, short):
    """Without intervention; each intervention does something else, from the boundary before the spike on."""
    flags = plane_run(steps=40, lr=1e-2)[0]
    runs = [replace(flags, seed=s) for s in (0, 1, 2)]
    _, logs, _ = exp.train_plane(runs, folder(tmp_path, flags))
    loss, start = exp.fork(runs, logs, [(16, 2, .1, .2), (25, 0, .1, .2)], False, scratch)
    assert start.tolist() == [10, 20] and loss.shape == (5, 2, 40)
    for j, (b, r) in enumerate(zip(start, (2, 0))):
        assert np.array_equal(loss[0, j][:40 - b], logs["loss"][b:, r])
        apart = dict(zip(exp.INTERVENTIONS, np.abs(loss[:, j] - loss[0, j])))
        assert all(apart[name].max() > 0 for name in ("sham", "half rate", "other batches")) and apart["sham"].max() < .01
        assert apart["other batches"][0] > 0 == apart["half rate"][0] == apart["sham"][0] and apart["half rate"][1] > 0


def test_norms_are_bounded_by_half_of_what_is_usual(tmp_path, short):
    flags = plane_run(steps=30, lr=1e-2)[0]
    _, logs, _ = exp.train_plane([flags], folder(tmp_path, flags))
    seen = []
    short.setattr(exp, "constants_plane", lambda *rest, real=exp.constants_plane: (seen.append(rest[2:]), real(*rest))[1])
    exp.fork([flags], logs, [(26, 0, .1, .2)], False, scratch)
    floors = seen[-1][0]  # [interventions x spikes, 2]
    usual = [np.median(logs[f"norm_{k}"][5:20, 0]) for k in ("embedding", "sequence")]
    assert floors[exp.BOUNDED].tolist() == pytest.approx([x / 2 for x in usual]) and (floors[[0, 1, 3, 4]] == 0).all()


def test_spikes_of_a_study_are_replayed(tmp_path, short):
    """Planted ones: what is said of them, of windows without one, and of their replays."""
    flags = plane_run(steps=80, lr=1e-2)[0]
    sub = folder(tmp_path, flags)
    _, logs, _ = exp.train_plane([flags], sub)
    short.setattr(exp, "find_spikes", lambda loss: [(42, 0, .01, .9)])
    a = exp.compute_replays([flags], logs, sub, scratch)
    assert a["fork_exact"].tolist() == [True] and a["fork_start"].tolist() == [30] and a["fork_height"].shape == (5, 1)
    assert len(a["null_fall"]) == 20 and a["spike_step"].tolist() == [42]
    assert np.array_equal(a["around_loss"][:, 0], logs["loss"][42 - 20:42 + 15, 0])
    peaks = np.array([.9, .46, .01, 1.79, .9])[:, None, None]  # what it rises to in the window; later, it does not count
    loss = np.where(np.arange(40) < 27, np.where(np.arange(40) < 9, .01, peaks), 99.)
    short.setattr(exp, "fork", lambda *rest: (loss, np.array([30])))
    a = exp.compute_replays([flags], logs, sub, scratch)
    assert a["fork_height"][:, 0].tolist() == pytest.approx([1, .45 / .89, 0, 2, 1])
    loss[:, 0] = logs["loss"][30:70, 0]
    for change in (0, 1e-6):
        loss[0, 0, 5] += change
        assert exp.compute_replays([flags], logs, sub, scratch)["fork_exact"].tolist() == [change == 0]


def test_training_starts_from_a_checkpoint(tmp_path, capsys):
    """What fits is taken, what does not is named; where nothing fits it is refused."""
    flags = plane_run(steps=2, seed=7)[0]
    state, *_ = exp.train_plane([flags], folder(tmp_path, flags, "parent"))
    saved = tmp_path / "parent" / "checkpoint.pt"
    given, fresh = exp.from_checkpoint(replace(flags, source=str(saved)))
    assert fresh == [] and same(given, common.run_of(state["params"], 0))
    given, fresh = exp.from_checkpoint(replace(flags, source=str(saved), seq_length=9, max_width=12))
    assert fresh == ["P", "W_in", "W_out", "b_in"] and "E" in given
    line = f"--study clusters --smoke --source {saved} --steps 1 --sweep lr=0 --figures clusters --compile off --out"
    assert exp.main([*line.split(), str(tmp_path / "child")]) == 0
    assert "P" in capsys.readouterr().out.split("all but")[1].splitlines()[0]  # of twelve tokens, not six
    child = common.load_checkpoint(tmp_path / "child" / "checkpoint.pt")["params"]
    assert torch.equal(child["U"][0], state["params"]["U"][0]) and child["P"].shape[1:] == (12, 2)
    other = [*line.split(), str(tmp_path / "none"), "--d-model", "3", "--max-width", "9"]
    assert exp.main(other) == 2 and not (tmp_path / "none").exists()
    assert "none of its parameters fits" in capsys.readouterr().err


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, words", [
    ("--emb pair --d-model 1", "--d-model 1 must be at least 2"), ("--cos 1", "--cos 1.0 must lie between"),
    ("--cos -1.5", "--cos -1.5 must lie"), ("--p1 0", "--p1 0.0 must lie"), ("--p1 1", "--p1 1.0 must lie"),
    ("--label-noise 1", "--label-noise 1.0 must be"), ("--label-noise -0.1", "--label-noise -0.1 must be"),
    ("--eps -1", "--eps -1.0 must be at least 0"), ("--n-tokens 0", "--n-tokens 0 must be at least 1"),
    ("--n-classes 0", "--n-classes 0 must be at least 1"), ("--emb canonical --n-tokens 3", "to be at least 3"),
    ("--emb pair --n-tokens 3", "two vectors, not 3"), ("--unemb fan --d-model 1 --emb sphere", "--d-model 1"),
    ("--batch 8", "called sgd"), ("--optimiser gd --batch 8", "called sgd"), ("--optimiser sgd", "give --batch"),
    ("--norm sphere --init-scale 0", "no direction"), ("--sweep norm=none,sphere init_scale=0", "no direction"),
    ("--momentum 1", "--momentum 1.0 must be"), ("--beta2 1", "--beta2 1.0 must be"), ("--norm batch", "not one of none"),
    ("--study clusters --cos .5", "--cos says nothing in --study clusters"), ("--width 8", "--width says nothing in"),
    ("--study landscape --width 8", "--width says nothing"), ("--study norm --sweep modulus=2,3", "--modulus says nothing"),
    ("--study clusters --sweep cos=.1,.2", "--cos says nothing"),
    ("--study clusters --optimiser gd", "--optimiser says nothing"),
    ("--study clusters --modulus 5", "--modulus 5 must be at most --vocab 3"),
    ("--study clusters --width 200", "must be at most --max-width"), ("--study clusters --batch 0", "--batch 0"),
    ("--study clusters --sparsity 13", "must be at most --seq-length"), ("--study clusters --batch 64", "--max-batch 32"),
    ("--study clusters --freeze nothing", "--freeze"), ("--study clusters --source nowhere.pt", "nowhere.pt"),
    ("--study clusters --n-train 4096", "must be below 2^12"), ("--study cluster", "did you mean clusters?"),
    ("--study clusters --modulus 100 --vocab 100 --seq-length 30", "must be at most 2^62"), ("--figures sheet", "draws plain")])
def test_bad_flags_are_one_line(tmp_path, capsys, line, words):
    quick = ["--steps", "1", "--runs", "1", "--compile", "off"]  # where it is not refused
    assert exp.main([*line.split(), *quick, "--out", str(out := tmp_path / "r")]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1 and not out.exists()


def test_every_flag_belongs_to_a_study():
    """Flags of clusters alone, of the others alone, or of both; none in both lists, and all exist."""
    names = set(exp.COLUMNS) - {"seed", "steps"}
    assert not exp.CLUSTERS & exp.LAYER and exp.CLUSTERS | exp.LAYER <= names and names - exp.CLUSTERS - exp.LAYER <= {
        "d_model", "lr", "batch"}


def test_every_documented_command_parses():
    text = (ROOT / "README.md").read_text() + inspect.getdoc(exp)
    commands = re.findall(r"^\s*(?:\.venv/bin/)?python3? (exp_layernorm_landscape\.py.*?)(?:\s{2,}.*|\s*#.*|\s*)$", text, re.M)
    assert len(commands) >= 3 and all(common.cli(exp.Flags, shlex.split(command)[1:]) for command in commands)
