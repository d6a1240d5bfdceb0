"""The science of exp_gpt2_paths.py: states against transformers, ids against GPT-2's tokenizer, measures
against brute force, files from strangers, the folders that people have, a mini that learns, verdicts."""
import functools
import http.server
import json
import math
import os
import random
import re
import threading
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import exp_gpt2_paths as exp
from conftest import ROOT, judged, run

torch.set_num_threads(1)
GOLDEN, VOCAB = ROOT / "tests/gpt2_golden", ROOT.parent / "shared/data/gpt2-vocab"
g = lambda seed=0: torch.Generator().manual_seed(seed)
randn = lambda *shape, seed=1: torch.randn(*shape, generator=g(seed), dtype=torch.float64)
far = lambda a, b: np.abs(np.asarray(a, float) - np.asarray(b, float)).max()
unit = lambda x: F.normalize(x, dim=-1)
degrees = lambda a, b: F.cosine_similarity(a, b, -1).acos().rad2deg()


def a_model(untied=False, n_embd=12, vocab_size=258, scale=.4):
    """A float64 Model of bytes; its parameters are random, also those that start at 0 or 1."""
    config, params = exp.Config(2, 3, n_embd, 16, vocab_size, 1e-3), {}
    for i, (name, shape) in enumerate(exp.shapes(config).items()):
        params[name] = scale * randn(*shape, seed=i) + ("ln" in name and "weight" in name)
    if untied:
        params["lm_head.weight"] = randn(vocab_size, n_embd, seed=77)
    tokens = [*exp.ALPHABET.values(), "ab", "abc"]
    ids = {token: i for i, token in enumerate(tokens[:vocab_size])}
    return exp.Model(params, config, exp.Tokenizer(ids, {("a", "b"): 0, ("ab", "c"): 1}, ""), "m")


MODEL = a_model()


# ---- Model ------------------------------------------------------------------------------------------

def test_states_are_those_of_transformers():
    """Made with transformers' GPT2LMHeadModel in float64, all its parameters random. Two rows at once:
    what one state is does not depend on the other row."""
    tensors, expected = exp.read_weights(GOLDEN), np.load(GOLDEN / "expected.npz")
    config, tied = exp.read_config(GOLDEN)
    assert config == exp.Config(3, 3, 12, 24, 37, 1e-5) and tied
    params = {k: tensors[k].double() for k in exp.shapes(config)}
    assert {k: x.shape for k, x in params.items()} == exp.shapes(config)
    tokens = torch.tensor(expected["tokens1"])
    states = torch.stack(exp.forward(params, torch.stack([tokens.flip(0), tokens]), config))[:, 1]
    final = exp.final_norm(params, states[-1], config)
    found = {"states": states, "final": final, "logits": final @ exp.unembedding(params).T}
    for name, x in found.items():
        assert far(x, expected[f"{name}1"]) < 1e-12, name


def test_initial_values():
    for name, p in exp.init(exp.Config(8, 2, 64, 50, 300), g()).items():
        if p.ndim == 1:
            assert (p == ("ln" in name and "weight" in name)).all(), name
        else:
            assert p.std().item() == pytest.approx(.02 / (4 if "c_proj" in name else 1), rel=.05), name


# ---- Tokenizer --------------------------------------------------------------------------------------

@pytest.mark.skipif(not VOCAB.exists(), reason="needs GPT-2's vocabulary")
def test_ids_are_those_of_gpt2():
    """The list was made with transformers 4 and 5 and tokenizers, slow and fast, which agree on it (no
    recent Unicode)."""
    own = exp.read_tokenizer(VOCAB)
    for text, ids in json.loads((GOLDEN / "tokenizer.json").read_text()):
        assert exp.encode(text, own) == ids, ascii(text)


def test_words_are_cut_as_gpt2_cuts_them():
    for cut in ("I|'m| we|'|LL| it|'s", "a| | b|  | c", "end|  ", "x|\n\n| y", "don|'t|'ve", " ?!'|re",
                "a|\x1c|b|\x1f| c|\x1f?", "a|\x85|?|\u3000|b", "x|²½Ⅷ１２| 3", "你好|,|世界",
                "e|\u0301| n|\u200b|o"):
        assert exp.words_of().findall(cut.replace("|", "")) == cut.split("|")


def joined(parts, pair):
    """Every place of the pair merged, from the left, as Sennrich et al. wrote it."""
    place = rf"(?<!\S){re.escape(' '.join(pair))}(?!\S)"
    return re.sub(place, "".join(pair), " ".join(parts)).split(" ")


def naive_merged(word, ranks):
    """In every round all places of the pair that was learned first."""
    parts = list(word)
    while pairs := ranks.keys() & zip(parts, parts[1:]):
        parts = joined(parts, min(pairs, key=ranks.get))
    return parts


@pytest.mark.parametrize("letters", ["a", "abé'"])
def test_merges_are_those_of_a_recount(letters):
    r, symbols = random.Random(1), lambda word: [exp.ALPHABET[b] for b in word.encode()]
    text = " ".join("".join(r.choices(letters, k=r.randint(1, 9))) for _ in range(60))
    words, expected = [symbols(word) for word in exp.words_of().findall(text)], []
    for _ in range(40):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs:
            break
        expected.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = [joined(word, expected[-1]) for word in words]
    assert exp.learn_merges(text, 40) == expected
    own = exp.learned_tokenizer(text, expected)
    assert sorted(own.ids.values()) == [*range(len({*text.encode()}) + len(expected))]
    for word in "aaaaaaa", text.replace(" ", ""):
        word = "".join(symbols(word))
        assert exp.merged(word, own.ranks) == naive_merged(word, own.ranks)


def test_any_text_comes_back():
    r, own = random.Random(3), MODEL.tokenizer
    tokens = [*own.ids]
    for n in range(200):
        text = r.randbytes(n).decode(["ascii", "utf-16-le"][n % 2], "ignore")
        found = "".join(tokens[i] for i in exp.encode(text, own))
        assert bytes(exp.BYTES[c] for c in found).decode() == text
    with pytest.raises(common.Stop, match="no token for"):
        exp.encode("a\udfff", own)
    assert exp.spelled(own)[exp.encode("abc é", own)].tolist() == ["abc", " ", "\\xc3", "\\xa9"]


# ---- Files ------------------------------------------------------------------------------------------

def pack(tensors, change=lambda header: None):
    """A safetensors file, written here and not by the script. change: what is done to its header."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
    header, data = {}, b""
    for name, x in tensors.items():
        raw = x.flatten().view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": place}
        data += raw
    change(header)
    text = as_json(header)
    return len(text).to_bytes(8, "little") + text + data


def put(path, files):
    """A folder with these files; None: without this one."""
    path.mkdir(parents=True)
    for name, data in files.items():
        if data is not None:
            (path / name).write_bytes(data)
    return path


as_json = lambda x: json.dumps(x).encode()
PARAMS = {k: x.float() for k, x in MODEL.params.items()}
SAFE, SHARDS = "model.safetensors", "model.safetensors.index.json"
SETTINGS = MODEL.config._asdict() | {"layer_norm_epsilon": MODEL.config.eps}
config = lambda **fields: {"config.json": as_json(SETTINGS | fields)}
vocab = lambda **ids: {"vocab.json": as_json(MODEL.tokenizer.ids | ids)}
weights = lambda more: {SAFE: pack({k: x for k, x in (PARAMS | more).items() if x is not None})}
named = lambda before, more: {SAFE: pack({before + k: x for k, x in PARAMS.items()} | more)}
bias = lambda **fields: {SAFE: pack(PARAMS, lambda header: header["ln_f.bias"].update(fields))}
bpe = lambda merges=(), kind="ByteLevel", spaced=False, **more: {"tokenizer.json": as_json({
    "model": {"vocab": MODEL.tokenizer.ids, "merges": merges},
    "pre_tokenizer": {"type": kind, "add_prefix_space": spaced}, **more})}
shards = lambda places: {SAFE: None, SHARDS: as_json({"weight_map": places})}
FILES = config() | vocab() | weights({}) | {"merges.txt": b"#version: 0.2\na b\nab c\n"}
READ = PARAMS["wte.weight"].flip(0)
HEAD = {"lm_head.weight": READ}
UNREAD = {"h.0.attn.bias": torch.ones(16, 16).bool(), "score.weight": torch.ones(3, 12)}
HALF = {k: x.half() if "ln" in k else x.bfloat16() for k, x in PARAMS.items()}
PADDED = torch.cat([PARAMS["wte.weight"], torch.ones(6, 12)])
SPLIT = {f"{n}.pt": pack({k: x for k, x in PARAMS.items() if k.startswith(n)}) for n in "whl"}


@pytest.mark.parametrize("files, instead, said", [
    ({}, {}, ""),
    (named("transformer.", UNREAD), {}, "score.weight"),
    (weights(HEAD), {}, ""),
    (named("_orig_mod.transformer.", {"_orig_mod.lm_head.weight": READ})
     | config(tie_word_embeddings=False), HEAD, ""),
    (shards({k: k[0] + ".pt" for k in PARAMS}) | SPLIT, {}, ""),
    (weights({"wte.weight": PADDED}) | config(vocab_size=264), {}, "258 of 264 rows"),
    (config(activation_function="gelu_fast", n_positions=None, n_ctx=16), {}, ""),
    ({"merges.txt": b"a b\r\nab c\r\n"}, {}, ""),
    (weights(HALF), {k: x.float() for k, x in HALF.items()}, "")])
def test_folders_that_people_have(files, instead, said, tmp_path, capsys):
    """Prefixes of training programs, masks, a head of its own, one beside the model, shards, a padded
    vocabulary, CRLF, half precision."""
    model = exp.load(put(tmp_path / "m", FILES | files), "m")
    assert model.config == MODEL.config and model.tokenizer == MODEL.tokenizer
    expected = PARAMS | instead
    assert model.params.keys() == expected.keys()
    assert all(torch.equal(x, expected[k]) for k, x in model.params.items())
    assert said in capsys.readouterr().out


def test_a_tokenizer_in_one_file(tmp_path):
    """As tokenizers wrote it, and as it writes it; a space before a text, if there is none."""
    own, pad = MODEL.tokenizer, [{"id": 258, "content": "[PAD]"}]
    for spaced, merges in (False, ["a b", "ab c"]), (True, [["a", "b"], ["ab", "c"]]):
        files = bpe(merges, spaced=spaced, added_tokens=pad)
        found = exp.read_tokenizer(put(tmp_path / str(spaced), files))
        assert found.ids == own.ids | {"[PAD]": 258} and found.ranks == own.ranks
        assert exp.encode("abc", found) == exp.encode(" abc" if spaced else "abc", own)
        assert exp.encode(" abc", found) == exp.encode(" abc", own)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 5\n"
STRANGE = {  # what is said: of which files
    "git lfs pull": [{SAFE: LFS}, {"config.json": LFS}],
    "no JSON object": [{"config.json": b"<!DOCTYPE html>"}, {"config.json": b"[1]"},
                       {SAFE: pack(PARAMS)[:99]}, {"vocab.json": b"[" * 100_000}],
    "outside of the file": [{SAFE: pack(PARAMS)[:-1]}, bias(data_offsets=[-48, 0])],
    "can't be read": [bias(data_offsets=None), bias(shape=[10 ** 30]),
                      {"merges.txt": b"a b c\n"}, {"merges.txt": None}, {"tokenizer.json": b"{}"}],
    "--download fetches": [{SAFE: None}],
    "has no /etc/passwd": [shards({"a": "/etc/passwd"})],
    "finite numbers, it is": [bias(shape=[3, 4]), weights({"ln_f.bias": None}),
                              weights({"ln_f.bias": torch.full((12,), -math.inf)}),
                              config(tie_word_embeddings=False)],
    "tensors named wte.weight": [weights({"wte.weight": None}),
                                 weights({"x.wte.weight": torch.ones(2)})],
    "another architecture than GPT-2": [config(model_type="llama"), config(activation_function="relu"),
                                        config(scale_attn_by_inverse_layer_idx=True)],
    "no GPT-2's": [config(n_head=5), config(n_head=True), config(n_layer=-1),
                   config(n_positions=2 ** 40), config(layer_norm_epsilon=0)],
    "the tokenizer has 259 tokens": [vocab(xx=258)],
    "ids must be": [vocab(a=300), vocab(a=64.)],
    "without one: ['xy']": [{"merges.txt": b"a b\nx y\n"}],
    "no byte-level BPE": [bpe(kind="Whitespace"), bpe(normalizer={"type": "NFC"})]}


@pytest.mark.parametrize("words", STRANGE)
def test_files_from_strangers(words, tmp_path):
    for n, files in enumerate(STRANGE[words]):
        flags = exp.Flags(model=str(put(tmp_path / str(n), FILES | files)))
        with pytest.raises(common.Stop, match=re.escape(words)) as stop:
            exp.reading(flags), exp.get(flags, None)
        assert "\n" not in str(stop.value) and len(str(stop.value)) < 900


def test_mutated_safetensors_are_read_or_refused(tmp_path):
    """Files with missing, flipped or additional bits: tensors, or one line."""
    r, path, accepted = random.Random(0), tmp_path / SAFE, 0
    whole = pack({"a": torch.ones(2, 3), "b": torch.ones(5).bfloat16()})
    for n in range(300):
        at = r.randrange(len(whole)) if n % 2 else r.randrange(8)
        left, right = whole[:at], whole[at + 1:]
        flipped = bytes([whole[at] ^ 1 << r.randrange(8)])
        path.write_bytes([left, left + flipped + right, left + r.randbytes(3) + right][n % 3])
        try:
            accepted += bool(exp.trusted(exp.read_safetensors, path))
        except common.Stop as stop:
            assert "\n" not in str(stop)
    assert 6 < accepted < 270


def test_a_name_is_looked_up_then_fetched(tmp_path, monkeypatch):
    """From a hub on this machine; then it is in our own cache, but for what the hub's has."""
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{web.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    flags, fetch = exp.Flags(model="gpt2"), exp.Flags(model="gpt2", download=True)
    with pytest.raises(common.Stop, match="has no model.safetensors"):
        exp.find(fetch)
    there = put(tmp_path / "openai-community/gpt2/resolve/main", FILES | {SAFE: FILES[SAFE][:-99]})
    with pytest.raises(common.Stop, match="outside of the file"):
        exp.find(fetch)
    with pytest.raises(common.Stop, match="--download fetches"):
        exp.find(flags)
    (there / SAFE).write_bytes(FILES[SAFE])
    exp.find(fetch)
    web.shutdown()
    assert exp.get(flags, None).config == MODEL.config
    hub = tmp_path / "hf/hub/models--openai-community--gpt2"
    put(hub / "refs", {"main": b"new"})
    put(hub / "snapshots/new", FILES)
    assert exp.find(flags).name == "new"


# ---- Measures ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("untied", [False, True])
def test_what_is_seen(monkeypatch, untied):
    """In pieces of 7 tokens and of 4 positions."""
    monkeypatch.setattr(exp, "PIECE", 7)
    monkeypatch.setattr(exp, "STATES", 12)
    model, every = a_model(untied, vocab_size=41), torch.arange(11)
    params, ids = model.params, torch.randint(41, (11,), generator=g(3))
    E, W = params["wte.weight"], params["lm_head.weight" if untied else "wte.weight"]
    windows = [torch.stack(exp.forward(params, part, model.config)) for part in ids.split(4)]
    states = torch.cat(windows, 1)  # [3, 11, 12]
    z = F.layer_norm(states, (12,), params["ln_f.weight"], params["ln_f.bias"], model.config.eps)
    log, near, near_final = (z @ W.T).log_softmax(-1), unit(states) @ unit(E).T, unit(z) @ unit(E).T
    end, chosen = log[-1], log[-1].argmax(-1)
    rank = lambda scores: (scores > scores[:, every, chosen, None]).sum(-1)
    expected = {
        "states": states, "first": every % 4 == 0, "norm": states.norm(dim=-1), "final": z[-1],
        "predicted": chosen, "entropy": -(end.exp() * end).sum(-1), "nearest": near.argmax(-1),
        "lens_token": log.argmax(-1), "lens_kl": (end.exp() * (end - log)).sum(-1),
        "lens_rank": rank(log), "rank_cosine": rank(near), "rank_cosine_final": rank(near_final),
        "cosine_predicted": near[:, every, chosen], "cosine_input_final": near_final[:, every, ids],
        "cosine_shuffled": near[:, every, chosen.roll(-5)]}
    found = exp.look(model, ids, [0, 4, 8], 0)
    for k, x in expected.items():
        assert found[k].shape == x.shape and far(found[k], x) < 1e-9, k


def test_the_lens_in_float32():
    """Logits of a hundred and more, of tokens that have much in common, cost it no more than their
    rounding."""
    model = a_model(n_embd=129, vocab_size=1000, scale=.1)
    model.params["wte.weight"] += .3 * randn(129)
    model.params["ln_f.weight"] *= 4
    states = torch.stack(exp.forward(model.params, torch.arange(16), model.config))
    single = model._replace(params={k: x.float() for k, x in model.params.items()})
    true, found = exp.decode(states, model), exp.decode(states.float(), single)
    for k, v in true.items():
        assert far(found[k], v) < (2 if "rank" in k else 2e-4), k
    assert not found["lens_rank"][-1].any()


@pytest.mark.parametrize("mode", exp.MODES)
def test_bases_by_singular_values(mode):
    E = randn(500, 9) @ randn(9, 9, seed=2) * torch.linspace(.2, 3, 9) + 1.5
    size = {"raw": 1, "on x": E.norm(dim=1, keepdim=True), "on dim": E.std(0, correction=0)}[mode]
    x = (E / size).numpy()
    x = x - x.mean(0)
    _, s, axes = np.linalg.svd(x, full_matrices=False)
    axes = np.array([a * np.sign(a[np.abs(a).argmax()]) for a in axes]).T
    basis, at = exp.basis_of(E, mode), x @ axes
    assert far(basis.variance, s * s / 500) < 1e-9 * s[0] ** 2 and far(basis.axes, axes) < 1e-7
    assert far(exp.coordinates(E, basis), at) < 1e-9
    within = np.cumsum(at ** 2, 1) / (x ** 2).sum(1, keepdims=True)
    assert far(exp.Plane.outside(E, basis)[:, 1:], 1 - within) < 1e-9


def measured(study, untied=False):
    """(model, what is seen of 12 tokens in two windows, and what a study measures there)."""
    model = a_model(untied, n_embd=6, vocab_size=41)
    seen = exp.look(model, torch.randint(41, (12,), generator=g(8)), [0, 6], 0)
    return model, seen | study.measure(model, seen, exp.Flags(token=5))


def test_a_planted_direction_above_the_plane_is_found():
    (model, seen), height = measured(exp.Plane), 40 + randn(12, 1, seed=5)
    basis = exp.basis_of(model.params["wte.weight"], "raw")
    away = 20 * randn(12, 2, seed=4) @ basis.axes[:, :2].T + height * basis.axes[:, 5]
    found = exp.Plane.measure(model, seen | {"states": (basis.mean + away)[None]}, exp.Flags())
    assert far(found["plane_states"][0, :, 2], height[:, 0]) < 1e-9
    assert far(found["above"][0], height[:, 0] ** 2 / away.square().sum(1)) < 1e-9


def test_what_the_last_state_selects():
    model, found = measured(exp.Plane)
    E, z, chosen = model.params["wte.weight"], found["final"], found["predicted"]
    own = unit(E - E.mean(0))[chosen]
    left = z - (z * own).sum(1, keepdim=True) * own.roll(-1, 0)
    assert torch.equal(found["kept_other"], (left @ E.T).argmax(1) == chosen)


def test_angles_on_the_sphere():
    model, found = measured(exp.Sphere)
    E, states = model.params["wte.weight"], found["states"]
    at = lambda x, mode="on dim": exp.coordinates(x, exp.basis_of(E, mode))
    last, red = at(states[-1]), at(E[found["predicted"]])
    assert far(found["angle"], degrees(last[:, :3], red[:, :3])) < 1e-5
    assert far(found["full_angle"], degrees(last, red)) < 1e-5
    assert far(found["path_3"][1], unit(at(states[:, 5], "on x")[:, :3])) < 1e-9
    assert (10 ** found["log_p"]).sum() == pytest.approx(1)


def test_parts_of_blocks():
    """What a part adds, how far it turns the state, and the run without it, from a model whose part is
    zero. In the first window."""
    model, found = measured(exp.Blocks, untied=True)
    W, config = model.params["lm_head.weight"], model.config
    ids, end, chosen = found["tokens"][:6], found["states"][-1, :6], found["predicted"][:6]
    for part, name in enumerate(("attn", "mlp")):
        silent = {k: x * (f"h.1.{name}.c_proj" not in k) for k, x in model.params.items()}
        without = exp.forward(silent, ids, config)[-1]
        logits = exp.final_norm(silent, without, config) @ W.T
        assert torch.equal(found["kept"][1, part, :6], logits.argmax(1) == chosen)
    added = end - without  # by the last part: here the rest is as it was
    assert far(found["turn"][1, 1, :6], degrees(end, without)) < 1e-5
    toward = (W[chosen] - W.mean(0)) * model.params["ln_f.weight"]
    spread = (end.var(1, correction=0) + config.eps).sqrt()
    push = ((added - added.mean(1, keepdim=True)) * toward).sum(1) / spread
    assert far(found["push"][1, 1, :6], push) < 1e-9


def test_rank_correlation():
    y = randn(6, 5).numpy()
    ranks = [[sum(column < v) for v in column] for column in y.T]
    assert far(exp.monotone(y), [np.corrcoef(range(6), rank)[0, 1] for rank in ranks]) < 1e-12


def test_bigrams_of_a_known_law():
    """What counts pairs reaches the entropy of a Markov chain."""
    table, ids = torch.tensor([[.9, .1], [.3, .7]]), [0]
    for u in torch.rand(59_999, generator=g()).tolist():
        ids.append(int(u > table[ids[-1], 0]))
    learn, held = torch.tensor(ids).split(40_000)
    entropy = -(torch.tensor([.75, .25]) @ (table * table.log()).sum(1))
    assert abs(exp.TrainMini.bigram(learn, held.unfold(0, 65, 64), 2) - entropy) < .01


# ---- The mini, texts, figures -----------------------------------------------------------------------

def test_what_is_held_out_is_not_learned(tmp_path):
    """Though every paragraph comes three times."""
    paragraphs = [f"This is sentence {n} about {n * 7919 % 10007}." for n in range(3000)]
    (tmp_path / "long").write_text("\n\n".join(paragraphs * 3), "utf-8-sig")
    learn, held = exp.corpus(str(tmp_path / "long"))
    known = {*re.findall(r"sentence (\d+) ", learn)}
    new = {*re.findall(r"sentence (\d+) about \d+\.", held)}
    assert len(known) > 2500 and len(new) > 150 and not known & new and "\ufeff" not in learn
    (tmp_path / "short").write_text("a few words")
    with pytest.raises(common.Stop, match="too few"):
        exp.lesson(str(tmp_path / "short"), 5, 16)


def test_a_pipe_is_read_once():
    read, write = os.pipe()
    os.write(write, b"abc")
    os.close(write)
    assert exp.read_text(f"/dev/fd/{read}") == exp.read_text(f"/dev/fd/{read}") == "abc"
    os.close(read)


def test_the_step_is_that_of_torch_optim():
    settings = exp.Paths.defaults | exp.Paths.smoke | dict(steps=20, lr=.1)
    flags = exp.Flags(**settings, room=exp.Paths, device="cpu")
    number, step = common.run_of(common.numbers([flags], exp.constants), 0), exp.step_of(flags)
    state, config = exp.start(flags), exp.taught(flags)[3]
    state = common.tree_map(lambda x: x.double() if x.is_floating_point() else x, state)
    params = {k: x.clone().requires_grad_() for k, x in state["params"].items()}
    optimiser = torch.optim.AdamW(params.values(), betas=(.9, .99), weight_decay=.1)
    for t, factor in enumerate([.5, 1, 1, .95]):
        key = common.key(torch.tensor(0), 0, torch.tensor(t))
        first = common.integers(key, len(number["learn"]) - 16, 2)
        rows = number["learn"].unfold(0, 17, 1)[first]
        z = exp.final_norm(params, exp.forward(params, rows[:, :-1], config)[-1], config)
        loss = F.cross_entropy((z @ params["wte.weight"].T).flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.)
        optimiser.param_groups[0]["lr"] = .1 * factor
        optimiser.step()
        state, logs = step(state, number)
        assert abs(logs["loss"] - loss) < 1e-5
        assert all(far(state["params"][k], x.detach()) < 1e-5 for k, x in params.items())


def test_a_mini_learns_and_is_kept(tmp_path):
    """Of a size of its own."""
    sizes = "--smoke --steps 60 --d-model 32 --lr 1e-2 --batch 8"
    look = f"--study lens {sizes} --figures lens"
    assert run(exp, f"--study train-mini --runs 1 {sizes}", tmp_path / "runs") == 0
    arrays = common.read(tmp_path / "runs/arrays.npz")
    assert arrays["loss"][0] > arrays["bigram"][0] > 2
    assert arrays["eval_loss"][-1, 0] < arrays["eval_loss"][0, 0] - 1
    assert run(exp, look, tmp_path / "first") == 0 and run(exp, look, tmp_path / "second") == 0
    losses = [common.read(tmp_path / path / "metrics.npz")["loss"] for path in ("runs", "first/mini")]
    assert np.array_equal(*losses)  # the mini is the run of its seed
    assert not (tmp_path / "second/mini").exists()
    a, b = (common.read(tmp_path / name / "arrays.npz") for name in ("first", "second"))
    assert all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("study", ["lens", "compare"])
def test_a_text_in_any_font(study, tmp_path):
    """No warning of a missing glyph: a model's name, a prompt and tokens that the font lacks."""
    line = ["--model", str(put(tmp_path / "模型$x$", FILES)), "--text", "世界 $a$ \U0001f600 x"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(exp, [*line, "--study", study, "--window", "9", "--token", "3"], tmp_path / "r") == 0
    assert exp.shown("$世\n") == "\\$?\\n" and exp.shown("a b", 12) == "a·b"


@pytest.mark.parametrize("line, words", [
    ("--text x --file y", "not both"), ("--text=", "--text must not be empty"),
    ("--n-heads 5", "divisible by --n-heads"), ("--model nonsense", "--download fetches"),
    ("--window 1", "windows of 1: too few"), ("--runs 2", "--runs has no part"),
    ("--token 128", "--token 128"), ("--window 100", "give a smaller --window"),
    ("--text " + "a" * 200, "give a smaller"), ("--file nonsense", "can't be read"),
    ("--study train-mini --model gpt2", "--model has no part"), ("--text 世", "no token for"),
    ("--study train-mini --sweep n_layers=1,2", "numbers alone")])
def test_bad_flags(line, words, refused):
    assert words in refused(exp, f"--smoke {line}")


# ---- Rules of claims --------------------------------------------------------------------------------

def test_three_quarters_of_positions_decide():
    found = []
    few = [1, 1], []
    for values in *(np.arange(100) < 100 * share for share in (1, .8, .7, .3, .2, 0)), *few:
        found.append(common.judge("", "", "", exp.quartiles(values), ">", .5)["verdict"])
    assert found == "holds holds open open FALSE FALSE open open".split()


@pytest.mark.parametrize("good", [True, False])
def test_claims_can_hold_and_be_false(good):
    """Arrays of 5 states or 4 blocks at 8 positions in which all claims hold, or none; but at the first
    position, which has no vote."""
    def either(yes, no, *shape):
        values = np.full((*shape, 8), yes if good else no)
        values[..., 0] = no if good else yes
        return values
    depth = np.linspace(0, 1, 5)[:, None] * np.ones(8)
    arrays = dict(
        model="m", first=np.arange(8) == 0, names=np.ones(100), entropy=np.ones(8),
        predicted=np.ones(8), tokens=np.zeros(8), nearest=either(5, 1, 5),
        cosine_predicted=depth / 2 if good else np.sign(depth), rank_cosine_final=either(0, 3, 5),
        lens_kl=1 - depth if good else 3 + depth,
        pca_tokens=np.array([[-1, -1], [1, 1]]), pca_states=np.full((5, 8, 2), 3 if good else .5),
        square=1. if good else .5, three=.04 if good else .2,
        beyond=either(.6, .4), limit=.5, above=either(.6, .4, 5),
        kept_random=either(1, 0), kept_other=either(1, 0), kept=either(1, 0, 4, 2),
        angle=either(60, 20), full_angle=either(30, 21),
        reading_kl=either(0, 1, 3), reading_top1=either(1, 0, 3),
        turn=np.stack([either(1, 2, 4), either(2, 1, 4)], 1), push=depth[:4, None] * either(1, -1, 2))
    for study in exp.Paths, exp.Plane, exp.Sphere, exp.Lens, exp.Blocks:
        assert {*judged(study, arrays).values()} == {good}, study
