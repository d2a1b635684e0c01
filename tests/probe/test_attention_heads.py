"""Attention heads against slow loops: one case, one lane, no padding, plain sums."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from hilum.encode.table.patches import Patches
from hilum.errors import ContractError, UsageError
from hilum.probe.heads.attention import AttentionHead, CuriaPooling, OneQuery, slice_codes
from hilum.probe.heads.curia import CuriaHead, HeadSettings
from hilum.probe.heads.lanes import Draws
from hilum.probe.heads.tokens import TokenSequence, case_tokens

RNG = np.random.default_rng(2)
D = 8


def sequence(shapes, rng=RNG, width=D, slices=True) -> TokenSequence:
    cases = []
    for grid in shapes:
        tokens = rng.normal(size=(*grid, width)).astype(np.float32)
        numbers = tuple(range(grid[0])) if slices else ()
        cases.append(case_tokens(Patches(tokens, grid, None, None, numbers, {})))
    return TokenSequence(cases)


RAGGED = [(2, 2, 2), (3, 1, 2), (1, 1, 1), (2, 3, 2)]


def drawn(network, lanes=2):
    """Stacked weights of several lanes, biases and scales drawn, too."""
    parts = [network.init(torch.Generator().manual_seed(n)) for n in range(lanes)]
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    generator = torch.Generator().manual_seed(9)
    return {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in stacked.items()}


def softmax(scores):
    found = np.exp(scores - scores.max())
    return found / found.sum()


def norm(x, scale, shift):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale + shift


def slow_block(w, asking, tokens):
    """LayerNorm(x + attention(x)) token by token."""
    wq, wk, wv = np.split(w["in_proj_weight"], 3)
    bq, bk, bv = np.split(w["in_proj_bias"], 3)
    out = []
    for x in asking:
        a = softmax(np.array([(wq @ x + bq) @ (wk @ t + bk) for t in tokens]) / np.sqrt(len(x)))
        seen = sum(weight * (wv @ t + bv) for weight, t in zip(a, tokens))
        out.append(norm(x + w["out_proj.weight"] @ seen + w["out_proj.bias"], w["norm.weight"], w["norm.bias"]))
    return np.array(out)


def slow_curia(w, tokens, blocks, zeros=0):
    """`zeros` padding tokens: kept apart in the self block, taken for tokens after it."""
    for block in blocks:
        front = f"attention_module.{block}_attention."
        part = {
            n.removeprefix(front + "attention.").removeprefix("multihead_attn."): t for n, t in w.items() if front in n
        }
        if block == "self":
            padding = np.zeros((zeros, tokens.shape[1]))
            tokens = np.concatenate(
                [slow_block(part, tokens, tokens), *([slow_block(part, padding, padding)] if zeros else [])]
            )
        else:
            tokens = slow_block(part, w[front + "learned_queries"], tokens)
        zeros = 0
    return w["classifier.weight"] @ tokens.mean(0) + w["classifier.bias"]


def one_lane(weights, lane):
    return {name: tensor[lane].double().numpy() for name, tensor in weights.items()}


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize("blocks", [("self", "cross"), ("cross",), ("self",), ("cross", "self")])
def test_curia_is_the_slow_loop(blocks, upstream):
    X = sequence(RAGGED)
    network = CuriaPooling(D, 3, blocks, 2, True, "leaks" if upstream else "hidden")
    weights = drawn(network)
    found = network.outputs(weights, X.batch(range(4)), None)
    for lane in range(2):
        for n, case in enumerate(X):
            tokens = case.tokens + slice_codes(9, D).numpy()[case.planes]
            zeros = (12 - len(tokens)) if upstream and blocks[0] == "self" else 0
            expected = slow_curia(one_lane(weights, lane), tokens, blocks, zeros)
            np.testing.assert_allclose(found[lane, n].numpy(), expected, atol=2e-5)


def test_curia_is_the_released_head_and_back():
    """A fitted head's tensors in the reader of released heads give the same logits; they load again, too."""
    X = sequence(RAGGED * 3)
    y = np.arange(12) % 3
    for upstream in (False, True):
        head = AttentionHead(seeds=2, epochs=2, learning_rates=(0.01,), match_upstream=upstream, batch_size=4).fit(X, y)
        for seed in range(2):
            tensors = head.tensors(seed)
            released = CuriaHead(None, HeadSettings(num_classes=3, blocks=("self", "cross")), tensors)  # type: ignore
            logits = []
            for start in range(0, 12, 4):
                cases = [X[n] for n in range(start, start + 4)]
                coded = [torch.from_numpy(c.tokens) + slice_codes(9, D)[c.planes] for c in cases]
                logits.append(released._judge(coded, upstream))
            proba = torch.from_numpy(np.concatenate(logits)).softmax(-1).numpy()
            np.testing.assert_allclose(head.outputs(X)[seed], proba, atol=1e-5)
        copy = AttentionHead(match_upstream=upstream, batch_size=4).load_tensors([head.tensors(0), head.tensors(1)])
        np.testing.assert_allclose(copy.outputs(X), head.outputs(X), atol=1e-6)


def test_the_default_judges_a_case_by_itself_and_upstream_does_not():
    X, y = sequence(RAGGED), np.array([0, 1, 0, 1])
    for upstream in (False, True):
        head = AttentionHead(seeds=1, epochs=1, learning_rates=(0.1,), match_upstream=upstream).fit(X, y)
        alone = np.concatenate([head.outputs(X[[n]]) for n in range(4)], 1)
        assert np.allclose(alone, head.outputs(X), atol=1e-6) != upstream


def slow_one_query(w, tokens, heads):
    """VoxelFM's probe, by torch's own MultiheadAttention."""
    hidden = len(w["query"])
    attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    attention.load_state_dict({name: w[name] for name in names})
    x = nn.functional.linear(tokens, w["project.weight"], w["project.bias"])[None]
    with torch.no_grad():
        seen = attention(w["query"][None, None], x, x)[0][0, 0]
    return nn.functional.linear(seen, w["classifier.weight"], w["classifier.bias"])


@pytest.mark.parametrize("upstream", [False, True])
def test_one_query_is_torchs_attention(upstream):
    X = sequence(RAGGED)
    network = OneQuery(D, 2, 12, 4, upstream)
    weights = drawn(network)
    found = network.outputs(weights, X.batch(range(4)), None)
    for lane in range(2):
        for n, case in enumerate(X):
            w = {name: tensor[lane] for name, tensor in weights.items()}
            torch.testing.assert_close(
                found[lane, n], slow_one_query(w, torch.from_numpy(case.tokens), 4), atol=1e-4, rtol=1e-4
            )


def test_one_query_has_voxelfms_number_of_weights():
    drawn_ = OneQuery(864, 1, 1024, 4, False).init(torch.Generator())
    assert sum(tensor.numel() for tensor in drawn_.values()) == 5_086_209


def test_dropout_by_case_is_the_same_network_with_masked_units():
    """The folded form with a mask of hidden units equals the plain one with that mask on every token."""
    X = sequence([(2, 3, 2)])
    network = OneQuery(D, 2, 12, 4, False)
    weights = drawn(network, 1)
    found = network.outputs(weights, X.batch([0]), Draws([3], 1, [5]))
    draws = Draws([3], 1, [5])
    units, weight = draws.keep((1, 12), 0.5)[0, 0, 0], draws.keep_tokens(4, [12], 12, 0.1)[0, 0]
    last = draws.keep((1, 12), 0.5)[0, 0, 0] * draws.keep((1, 12), 0.5)[0, 0, 0]
    w = {name: tensor[0] for name, tensor in weights.items()}
    x = nn.functional.linear(torch.from_numpy(X[0].tokens), w["project.weight"], w["project.bias"]) * units
    (wq, wk, wv), (bq, bk, bv) = w["in_proj_weight"].chunk(3), w["in_proj_bias"].chunk(3)
    q, k, v = w["query"] @ wq.T + bq, x @ wk.T + bk, x @ wv.T + bv
    seen = []
    for h in range(4):
        part = slice(3 * h, 3 * h + 3)
        a = (k[:, part] @ q[part] / 3**0.5).softmax(0) * weight[h]
        seen.append(a @ v[:, part])
    out = nn.functional.linear(torch.cat(seen), w["out_proj.weight"], w["out_proj.bias"]) * last
    expected = nn.functional.linear(out, w["classifier.weight"], w["classifier.bias"])
    torch.testing.assert_close(found[0, 0], expected, atol=1e-4, rtol=1e-4)


def test_long_cases_are_averaged_by_plane_before_a_self_block(monkeypatch):
    monkeypatch.setattr("hilum.probe.heads.attention.MOST_SELF", 8)
    X, y = sequence(RAGGED * 2), np.arange(8) % 2
    head = AttentionHead(seeds=1, epochs=1, learning_rates=(0.1,)).fit(X, y)
    assert head.pooled_
    means = [case.tokens.reshape(case.grid[0], -1, D).mean(1)[:, None, None] for case in X]
    short = TokenSequence([case_tokens(Patches(m, m.shape[:3], None, None, tuple(range(len(m))), {})) for m in means])
    same = AttentionHead(seeds=1, per_plane=False).load_tensors([head.tensors()])
    np.testing.assert_allclose(same.outputs(short), head.outputs(X), atol=1e-6)
    assert not AttentionHead(seeds=1, epochs=1, learning_rates=(0.1,), blocks=("cross",)).fit(X, y).pooled_


def test_weights_that_do_not_fit_and_wrong_input_are_refused():
    X, y = sequence(RAGGED), np.array([0, 1, 0, 1])
    head = AttentionHead(seeds=1, epochs=1, learning_rates=(0.1,)).fit(X, y)
    with pytest.raises(UsageError, match="learned_queries"):
        AttentionHead(num_queries=2).load_tensors([head.tensors()])
    with pytest.raises(ContractError, match="width 8; found 5"):
        head.predict(sequence(RAGGED, width=5))
    with pytest.raises(UsageError, match="found ndarray"):
        head.predict(np.ones((3, 8)))
    with pytest.raises(UsageError, match="each once at most"):
        clone(head).set_params(blocks=("self", "self")).fit(X, y)
