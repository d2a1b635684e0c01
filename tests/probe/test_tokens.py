"""Sequences of tokens: what is read, how it is padded, where tokens lie, and that memory does not grow with their number."""

import functools
import operator
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
import torch

from hilum.encode.regions import curia_cells
from hilum.encode.table.patches import Patches, write_patches
from hilum.errors import GeometryError, InputError, UsageError
from hilum.probe.heads.tokens import (
    CaseTokens,
    TokenFile,
    TokenSequence,
    case_tokens,
    plan_batches,
    region_vectors,
)

RNG = np.random.default_rng(0)
AFFINE = np.array([[0, 0, 2.0, 5], [0, 3.0, 0, 6], [4.0, 0, 0, 7], [0, 0, 0, 1]])


def patches(grid=(3, 2, 4), width=5, slices=True, rng=RNG) -> Patches:
    tokens = rng.normal(size=(*grid, width)).astype(np.float16)
    affines = np.repeat(AFFINE[None], grid[0], 0)
    affines[:, :3, 3] += np.arange(grid[0])[:, None] * AFFINE[:3, 0]
    numbers = tuple(range(10, 10 + grid[0]))
    if slices:
        return Patches(tokens, grid, AFFINE, affines, numbers, {})
    return Patches(tokens, grid, AFFINE, None, (), {})


def in_memory(lengths, width=5, rng=RNG) -> TokenSequence:
    return TokenSequence([case_tokens(patches((1, 1, n), width, rng=rng)) for n in lengths])


@pytest.mark.parametrize("slices", [True, False])
def test_a_file_is_what_was_written(tmp_path, slices):
    found = patches(slices=slices)
    write_patches(tmp_path / "a.b2nd", found)
    X = TokenSequence([TokenFile(path=tmp_path / "a.b2nd"), case_tokens(found)])
    assert X.lengths.tolist() == [24, 24]
    assert X.width == 5
    for case in (X[0], X[1]):
        np.testing.assert_array_equal(case.tokens, found.tokens.reshape(24, 5))
        assert case.planar == slices
        assert case.planes.tolist() == [0] * 8 + [1] * 8 + [2] * 8
        for n, (k, j, i) in enumerate(np.ndindex(3, 2, 4)):
            np.testing.assert_allclose(case.positions_mm()[n], (AFFINE @ [k, j, i, 1])[:3])
        np.testing.assert_allclose(case.affine, AFFINE)


def test_slices_of_a_file_and_a_region_in_them(tmp_path):
    found = patches()
    write_patches(tmp_path / "a.b2nd", found)
    inside = np.zeros((2, 2, 4), bool)
    inside[1, 0, 2:] = True
    (X,) = [TokenSequence([TokenFile(path=tmp_path / "a.b2nd", slices=(12, 10), weights=inside)])]
    assert X.lengths.tolist() == [2]
    np.testing.assert_array_equal(X[0].tokens, found.tokens[0, 0, 2:])
    np.testing.assert_allclose(X[0].positions_mm(), [(AFFINE @ [0, 0, i, 1])[:3] for i in (2, 3)])
    assert X[0].planes.tolist() == [0, 0]  # counted among the planes that have a token


def test_batches_are_padded_in_the_asked_order_and_say_so():
    X = in_memory([3, 1, 4])
    first, second = X.batches([[2, 1], [0]])
    assert first.tokens.shape == (2, 4, 5)
    assert first.seen.tolist() == [[True] * 4, [True, False, False, False]]
    np.testing.assert_array_equal(first.tokens[1, 0], X[1].tokens[0].astype(np.float32))
    assert not first.tokens[1, 1:].any()
    assert first.numbers == (2, 1)
    torch.testing.assert_close(first.weights.sum(1), torch.ones(2))
    assert second.tokens.shape == (1, 3, 5)


def test_averages_per_plane_are_those_of_a_loop():
    found = patches()
    inside = RNG.random((3, 2, 4)) > 0.4
    inside[1] = False
    batch = TokenSequence([case_tokens(found, inside)]).batch([0], per_plane=True)
    expected = [found.tokens[k][inside[k]].astype(np.float32).mean(0) for k in (0, 2)]
    np.testing.assert_allclose(batch.tokens[0].numpy(), expected, rtol=1e-5)


def test_pieces_hold_no_more_than_is_allowed_and_every_case_once():
    lengths = np.array([3, 50, 2, 2, 9, 9, 1])
    batches = plan_batches(lengths, [6, 5, 4, 3, 2, 1, 0], batch_size=4, max_tokens=18)
    assert [functools.reduce(operator.iadd, pieces, []) for pieces in batches] == [[6, 5, 4, 3], [2, 1, 0]]
    for piece in (p for pieces in batches for p in pieces):
        assert len(piece) == 1 or len(piece) * lengths[piece].max() <= 18
    assert len(batches[0]) == 2


def test_region_vectors_are_weighted_means():
    """With Curia's cells: the mean of the tokens of the cells that a mask touches."""
    found = patches((1, 4, 4), 6)
    mask = np.zeros((32, 32), bool)
    mask[9:15, 17:30] = True
    cells = curia_cells(mask, size_px=32, patch_px=8).numpy()
    weights = RNG.random((1, 4, 4)).astype(np.float32)
    X = TokenSequence([case_tokens(found, cells), case_tokens(found, weights), case_tokens(found)])
    tokens = found.tokens.reshape(16, 6).astype(np.float64)
    expected = [tokens[cells].mean(0), weights.ravel() @ tokens / weights.sum(), tokens.mean(0)]
    np.testing.assert_allclose(region_vectors(X), expected, rtol=1e-5)
    np.testing.assert_allclose(region_vectors(X, max_tokens=1), expected, rtol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match="no token of the scan touches"):
        case_tokens(patches(), np.zeros(24))
    with pytest.raises(InputError, match="25 weights, the scan 24 tokens"):
        case_tokens(patches(), np.ones(25))
    with pytest.raises(UsageError, match="one width"):
        _ = TokenSequence([*in_memory([2]).items, *in_memory([2], width=7).items]).width
    (tmp_path / "x.b2nd").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read as patch tokens"):
        _ = TokenSequence([TokenFile(path=tmp_path / "x.b2nd")]).lengths
    uneven = patches()
    uneven.affines[2, :3, 3] += 1
    with pytest.raises(GeometryError, match="uneven steps"):
        _ = case_tokens(uneven).affine
    bare = CaseTokens(tokens=np.ones((2, 3)), grid=(1, 1, 2), place=np.arange(2))
    with pytest.raises(GeometryError, match="no geometry"):
        bare.positions_mm()


def test_an_error_of_the_reading_thread_arrives_and_the_thread_ends(tmp_path):
    write_patches(tmp_path / "a.b2nd", patches())
    X = TokenSequence([TokenFile(path=tmp_path / "a.b2nd"), TokenFile(path=tmp_path / "gone.b2nd")])
    stream = X.batches([[0], [1]])
    next(stream)
    with pytest.raises(InputError, match="gone"):
        next(stream)
    stream = X.batches([[0]] * 9)
    next(stream)
    stream.close()
    assert not any(thread.name.startswith("tokens") for thread in threading.enumerate())


def test_memory_is_flat_in_the_number_of_volumes(tmp_path):
    """Volumes of 25,000 tokens: 32 of them are held in no more memory than 4. numpy's and Python's memory is traced; of the
    padded batches of torch, which are not, at most two are alive."""
    tokens = np.zeros((25, 40, 25, 16), np.float16)
    write_patches(tmp_path / "a.b2nd", Patches(tokens, (25, 40, 25), AFFINE, None, (), {}))
    peaks = []
    for num in (4, 32):
        X = TokenSequence([TokenFile(path=tmp_path / "a.b2nd")] * num)
        tracemalloc.start()
        total, seen = 0.0, []
        for batch in X.batches([[n] for n in range(num)]):
            total += float(batch.tokens.sum())
            seen.append(weakref.ref(batch))
            assert sum(one() is not None for one in seen) <= 2
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == 0
    assert peaks[1] < 2 * peaks[0]  # which batches overlap is chance; 32 held at once would be eightfold
    assert peaks[1] < 6 * tokens.nbytes
