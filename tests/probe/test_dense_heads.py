"""Localisation and segmentation from tokens: geometry against loops, torch's own layers, and phantoms that are plain to see."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from hilum.encode.table.patches import Patches, write_patches
from hilum.errors import ContractError, GeometryError, UsageError
from hilum.metrics import dice
from hilum.probe.heads.decoders import PatchDecoder, ResizeDecoder, token_places
from hilum.probe.heads.dense import SegmentationHead, _overlaps, count_classes, on_scan
from hilum.probe.heads.localisation import AttentionLocaliser, LightLocaliser, LocalisationHead
from hilum.probe.heads.tokens import TokenFile, TokenSequence, case_tokens
from hilum.probe.heads.windows import Truths, draw_window, finer_affine, tent, tiles, truth_on_grid
from hilum.volume import Volume

RNG = np.random.default_rng(4)
OBLIQUE = np.array([[0.3, -0.2, 2.0, 5], [0.1, 3.0, 0.4, -60], [4.0, 0.2, -0.3, 700], [0, 0, 0, 1]])


def case(tokens, affine, planar=False):
    grid = tokens.shape[:3]
    affines = np.repeat(affine[None], grid[0], 0)
    affines[:, :3, 3] += np.arange(grid[0])[:, None] * affine[:3, 0]
    numbers = tuple(range(grid[0])) if planar else ()
    return case_tokens(Patches(tokens.astype(np.float32), grid, affine, affines if planar else None, numbers, {}))


def blobs(num, planar=False, seed=0, patch=4):
    """Scans of 4 × 16 × 20 or so voxels with two balls, tokens that hold the mean of their patch, and where ball 1 is in mm."""
    rng = np.random.default_rng(seed)
    cases, labels, points = [], [], []
    for _ in range(num):
        grid = np.array([int(rng.integers(3, 5)), 4, 5])
        cell = np.array([1, patch, patch]) if planar else np.array([patch, patch, patch])
        affine = OBLIQUE.copy()
        affine[:3, 3] += rng.normal(size=3) * 30
        shape = grid * cell
        centre = rng.uniform(0.25, 0.75, (2, 3)) * shape
        at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        label = np.zeros(shape, np.uint8)
        for n, c in enumerate(centre, 1):
            label[(np.abs((at - c) / cell) ** 2).sum(-1) < 1.3] = n
        maps = np.stack([(label == n) + 0.1 * rng.normal(size=shape) for n in range(3)], -1)
        split = maps.reshape(grid[0], cell[0], grid[1], cell[1], grid[2], cell[2], 3)
        tokens = split.transpose(0, 2, 4, 1, 3, 5, 6).reshape(*grid, -1)
        cases.append(case(tokens, finer_affine(affine, tuple(shape), tuple(grid)), planar))
        labels.append(Volume(voxels=label, affine=affine, modality="MR", kind="label"))
        points.append((affine @ [*ndimage.center_of_mass(label == 1), 1])[:3])
    return TokenSequence(cases), labels, np.array(points)


def test_finer_grid_covers_the_same_field():
    """Cell n of a grid twice as fine lies a quarter of a coarse cell off; a grid of equal size is itself."""
    fine = finer_affine(OBLIQUE, (3, 4, 5), (6, 8, 5))
    np.testing.assert_allclose(fine @ [0, 0, 0, 1], OBLIQUE @ [-0.25, -0.25, 0, 1])
    np.testing.assert_allclose(fine @ [5, 7, 4, 1], OBLIQUE @ [2.25, 3.25, 4, 1])
    np.testing.assert_allclose(finer_affine(OBLIQUE, (3, 4, 5), (3, 4, 5)), OBLIQUE)


def test_truth_is_the_nearest_voxel_of_a_loop():
    label = Volume(voxels=RNG.integers(0, 4, (5, 6, 7)), affine=OBLIQUE, modality="CT", kind="label")
    affine = OBLIQUE @ np.diag([0.8, 1.3, 1.1, 1])
    affine[:3, 3] += [1.0, -2, 0.5]
    found = truth_on_grid(label, affine, (6, 6, 6))
    for index in np.ndindex(6, 6, 6):
        at = np.rint(np.linalg.inv(OBLIQUE) @ affine @ [*index, 1])[:3].astype(int)
        inside = all(0 <= a < n for a, n in zip(at, label.shape))
        assert found[index] == (label.voxels[tuple(at)] if inside else -1)
    assert (found == -1).any()


def test_logits_on_the_scan_are_linear_between_cells(monkeypatch):
    """A map that is linear in millimetres stays so on any grid inside the field; slabs make no difference."""
    scan = Volume(voxels=np.zeros((7, 6, 5)), affine=OBLIQUE @ np.diag([0.5, 0.5, 0.5, 1]), modality="CT")
    shift = np.eye(4)
    shift[:3, 3] = -1
    affine, slope = OBLIQUE @ shift, np.array([0.1, -0.2, 0.05])
    grid = (6, 6, 6)
    at = np.stack(np.meshgrid(*map(np.arange, grid), np.array([1.0]), indexing="ij"), -1)[..., 0, :] @ affine.T
    logits = torch.from_numpy((at[..., :3] @ slope).astype(np.float32))[None, None].expand(2, 3, *grid)
    index = np.stack(np.meshgrid(*map(np.arange, scan.shape), np.array([1.0]), indexing="ij"), -1)[..., 0, :]
    expected = (index @ scan.affine.T)[..., :3] @ slope
    for slab in (10**9, 400):
        monkeypatch.setattr("hilum.probe.heads.dense.SLAB", slab)
        parts = list(on_scan(logits, affine, scan))
        assert [p.start for p, _ in parts] == [0, *[p.stop for p, _ in parts[:-1]]]
        whole = torch.cat([part for _, part in parts], 2)
        np.testing.assert_allclose(whole[1, 2].numpy(), expected, atol=1e-3)


def test_decoder_is_voxelfms():
    model = ResizeDecoder(864, 64, 3, 118, (14, 14, 14), planar=False)
    assert sum(p.numel() for p in model.parameters()) == 727_094
    sizes = []
    small = ResizeDecoder(4, 8, 3, 2, (14, 14, 14), planar=False)
    for block in small.blocks:
        block.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[-1]))
    assert small(torch.zeros(1, 4, 8, 8, 8)).shape == (1, 2, 112, 112, 112)
    assert sizes == [8, 8, 43, 43, 77, 77]


@pytest.mark.parametrize("planar", [False, True])
def test_segmentation_finds_two_balls_on_the_grid_of_the_scan(planar):
    X, y, _ = blobs(20, planar)
    X_new, y_new, _ = blobs(6, planar, seed=1)
    head = SegmentationHead(seeds=2, learning_rates=(1e-2,), epochs=2, min_steps=60, batch_size=2, width=16)
    assert head.fit(X, y, validation=(X_new, y_new)) is head
    out = head.outputs(X_new, y_new)
    assert out.dtype == np.float64  # float32 does not count beyond 2²⁴ voxels
    assert out.shape == (2, 6, 8)
    true = np.array([[(one.voxels == c).sum() for c in (1, 2)] for one in y_new])
    assert min(dice(true, seed.reshape(6, 2, 4)) for seed in out) > 0.8
    maps = list(head.segment(X_new, y_new))
    for found, truth in zip(maps, y_new):
        assert found.kind == "label"
        np.testing.assert_array_equal(found.affine, truth.affine)
        assert np.mean(found.voxels == truth.voxels) > 0.9
    with pytest.raises(UsageError, match="true label maps"):
        head.outputs(X_new)
    with pytest.raises(UsageError, match="segment"):
        head.predict(X_new)
    with pytest.raises(ContractError, match="another width or kind"):
        list(head.segment(blobs(1, not planar)[0], y_new[:1]))


def test_slices_are_decoded_one_by_one():
    """VoxelFM's decoder does not look at the slices beside; GroupNorm alone is over the whole box, so without it."""
    module = ResizeDecoder(5, 8, 1, 2, (1, 4, 4), planar=True)
    x = torch.randn(1, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x[:, :, 1:2])[:, :, 0], module(x)[:, :, 1])


def test_a_token_answers_for_its_own_cells():
    """The linear part of the patch decoder against a loop over tokens and cells; at first it is all there is."""
    module = PatchDecoder(6, 8, 1, 3, (2, 3, 4))
    x = torch.randn(2, 6, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = module(x)
    assert found.shape == (2, 3, 6, 6, 20)
    weight, bias = module.linear.weight.detach()[..., 0, 0, 0], module.linear.bias.detach()
    for c, z, j, i in np.ndindex(3, 6, 6, 20):
        row = ((c * 2 + z % 2) * 3 + j % 3) * 4 + i % 4
        expected = x[:, :, z // 2, j // 3, i // 4] @ weight[row] + bias[row]
        torch.testing.assert_close(found[:, c, z, j, i], expected)


def test_places_do_not_depend_on_how_the_axes_run():
    """A flipped or permuted grid gives the same place for the same point; boxes are cut from the whole; ends are -1 and 1."""
    X, _, _ = blobs(1)
    whole = token_places(X[0], (0, 0, 0), X[0].grid)
    assert np.abs(whole[:3]).max() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(token_places(X[0], (1, 2, 0), (2, 2, 3)), whole[:, 1:3, 2:4, :3], atol=1e-5)
    flipped = X[0].affines[0].copy()
    flipped[:3, 3] += flipped[:3, 2] * (X[0].grid[2] - 1)
    flipped[:3, 2] *= -1
    tokens = X[0].tokens.reshape(*X[0].grid, -1)[:, :, ::-1]
    np.testing.assert_allclose(token_places(case(tokens, flipped), (0, 0, 0), X[0].grid), whole[..., ::-1], atol=1e-5)


def test_boxes_hold_small_organs_and_tile_the_grid(tmp_path):
    """Class 2 is one voxel in 4,096: with oversampling every box holds it as often as class 1; tiles cover each token."""
    label = np.zeros((16, 16, 16), np.uint8)
    label[2:10, 2:10, 2:10], label[14, 14, 14] = 1, 2
    affine = np.diag([1.0, 1, 1, 1])[[2, 1, 0, 3]]
    truth = Volume(voxels=label, affine=affine, modality="CT", kind="label")
    X = TokenSequence([case(RNG.normal(size=(8, 8, 8, 4)), finer_affine(affine, (16,) * 3, (8,) * 3))])
    truths = Truths(tmp_path, X, [truth], (2, 2, 2), 2)
    np.testing.assert_array_equal(truths.read(0), label)
    rng = np.random.default_rng(0)
    drawn = [draw_window(rng, truths, 0, (3, 3, 3), 1.0, 0.0) for _ in range(300)]
    share = np.mean([(part == 2).any() for _, part in drawn])
    assert 0.4 < share < 0.6
    for window, part in drawn[:20]:
        k, j, i = (2 * n for n in window.start)
        np.testing.assert_array_equal(part, label[k : k + 6, j : j + 6, i : i + 6])
    rare = [draw_window(rng, truths, 0, (3, 3, 3), 0.0, 0.0) for _ in range(300)]
    assert np.mean([(part == 2).any() for _, part in rare]) < 0.1
    kept = [draw_window(rng, truths, 0, (3, 3, 3), 0.0, 0.5)[1] for _ in range(50)]
    assert np.mean([(part > 0).mean() >= 0.5 for part in kept]) > 0.8
    for overlap in (False, True):
        seen = np.zeros((7, 3, 5))
        for window in tiles(0, (7, 3, 5), (3, 3, 2), overlap):
            k, j, i = (slice(a, a + n) for a, n in zip(window.start, window.size))
            seen[k, j, i] += 1
        assert seen.min() >= 1
    assert tent((5, 4, 3)).min() > 0
    assert tent((5, 4, 3)).max() <= 1


def test_overlaps_are_those_of_a_loop():
    logits, truth = torch.randn(2, 3, 4, 2, 5, 6), torch.from_numpy(RNG.integers(-1, 4, (3, 2, 5, 6)))
    found, counts = logits.argmax(2), _overlaps(logits, truth)
    for m, b, c in np.ndindex(2, 3, 3):
        true, here = truth[b] == c + 1, (found[m, b] == c + 1) & (truth[b] >= 0)
        assert counts[m, b, c].tolist() == [true.sum(), here.sum(), (true & here).sum()]


def test_boxes_of_files_are_those_of_memory(tmp_path):
    grid = RNG.normal(size=(5, 4, 3, 7)).astype(np.float32)
    affines = np.repeat(OBLIQUE[None], 5, 0)
    affines[:, :3, 3] += np.arange(5)[:, None] * OBLIQUE[:3, 0]
    found = Patches(grid.astype(np.float16), (5, 4, 3), OBLIQUE, affines, tuple(range(5)), {})
    write_patches(tmp_path / "a.b2nd", found)
    X = TokenSequence([case_tokens(found), TokenFile(path=tmp_path / "a.b2nd")])
    X = TokenSequence([*X.items, TokenFile(path=tmp_path / "a.b2nd", slices=(1, 2, 4))])
    for n in (0, 1):
        np.testing.assert_array_equal(X.box(n, (1, 0, 1), (3, 2, 2)), found.tokens[1:4, :2, 1:])
        assert X.outline(n).grid == (5, 4, 3)
        assert X.outline(n).tokens.shape == (0, 7)
        np.testing.assert_array_equal(X.outline(n).affines, affines)
    np.testing.assert_array_equal(X.box(2, (1, 0, 0), (2, 4, 3)), found.tokens[[2, 4]])
    np.testing.assert_array_equal(X.outline(2).affines, affines[[1, 2, 4]])


def test_counts_are_those_of_a_loop():
    truth = np.zeros((4, 5, 6), int)
    truth[1:3, 1:4, 1:5], truth[3, 0, 0] = 1, 3
    found = np.zeros_like(truth)
    found[1:3, 1:4, 2:6], found[0, 0, 0] = 1, 2
    vol = Volume(
        voxels=truth, affine=np.diag([1.0, 1, 1, 1])[[2, 1, 0, 3]] * [[2], [1], [1], [1]], modality="CT", kind="label"
    )
    counts = np.array(count_classes(vol, found, 3)).reshape(3, 4)
    np.testing.assert_array_equal(counts[:, 0], [24, 1, 0])
    np.testing.assert_array_equal(counts[:, 1], [18, 0, 0])
    assert counts[0, 2] == vol.spacing_mm[2]  # moved by one voxel
    assert np.isnan(counts[1:, 2:]).all()


def test_labels_outside_the_known_classes_and_regions_are_refused():
    X, y, _ = blobs(3)
    with pytest.raises(ContractError, match="holds class 2; the head knows 1 to 1"):
        SegmentationHead(seeds=1, epochs=1, learning_rates=(1e-2,), num_classes=1).fit(X, y)
    with pytest.raises(UsageError, match="for each of 3 cases"):
        SegmentationHead().fit(X, y[:2])
    empty = [Volume(voxels=0 * one.voxels, affine=one.affine, modality="MR", kind="label") for one in y]
    with pytest.raises(ValueError, match="at least one labelled voxel"):
        SegmentationHead().fit(X, empty)
    part = np.zeros(len(X[0].tokens))
    part[:4] = 1
    some = TokenSequence([case_tokens(Patches(np.ones((3, 4, 5, 192)), (3, 4, 5), OBLIQUE, None, (), {}), part[:60])])
    with pytest.raises(UsageError, match="whole scans"):
        SegmentationHead(seeds=1, epochs=1).fit(some, y[:1])


@pytest.mark.parametrize("attention", [False, True])
def test_localisation_finds_a_ball_in_millimetres(attention):
    X, _, points = blobs(32, patch=2)
    X_new, _, wanted = blobs(24, seed=1, patch=2)
    head = LocalisationHead(seeds=2, learning_rates=(1e-2,), epochs=8, batch_size=4, attention=attention).fit(X, points)
    out = head.outputs(X_new)
    assert out.shape == (2, 24, 3)
    np.testing.assert_allclose(head.predict(X_new), out.mean(0), atol=1e-3)
    middle = np.stack([one.positions_mm().mean(0) for one in X_new])
    offset = points - np.stack([one.positions_mm().mean(0) for one in X])
    trivial = np.linalg.norm(middle + offset.mean(0) - wanted, axis=1).mean()
    error = np.linalg.norm(out - wanted, axis=2).mean()
    assert error < 0.6 * trivial


def test_moving_the_patient_moves_the_answer():
    """A rigid shift of the geometry shifts the answer by as much: it is in millimetres of the patient."""
    X, _, points = blobs(8)
    head = LocalisationHead(seeds=1, learning_rates=(1e-2,), epochs=2).fit(X, points)
    moved = OBLIQUE.copy()
    moved[:3, 3] += [10, -20, 30]
    tokens = X[0].tokens.reshape(*X[0].grid, -1)
    both = [head.predict(TokenSequence([case(tokens, affine)])) for affine in (OBLIQUE, moved)]
    np.testing.assert_allclose(both[1] - both[0], [[10, -20, 30]], atol=1e-3)


def test_voxelfms_localiser_is_torchs_attention_and_has_its_size():
    drawn = AttentionLocaliser(864).init(torch.Generator())
    assert sum(tensor.numel() for tensor in drawn.values()) == 3_103_745
    X, _, _ = blobs(3)
    network = AttentionLocaliser(192)
    weights = {n: t[None] for n, t in network.init(torch.Generator().manual_seed(3)).items()}
    found = network.outputs(weights, X.batch(range(3)), None)
    for n in range(3):
        one = X[n]
        w = {name: tensor[0] for name, tensor in weights.items()}
        attention = nn.MultiheadAttention(192, 4, batch_first=True)
        attention.load_state_dict({k: w[k] for k in attention.state_dict()})
        grid = np.stack(np.meshgrid(*[np.linspace(0, 1, g) for g in one.grid], indexing="ij"), -1).reshape(-1, 3)
        x = torch.from_numpy(one.tokens) + torch.from_numpy(grid).float() @ w["place.weight"].T + w["place.bias"]
        with torch.no_grad():
            x = attention(x[None], x[None], x[None])[0][0]
        x = (x @ w["hidden.weight"].T + w["hidden.bias"]).relu() @ w["score.weight"].T + w["score.bias"]
        expected = x[:, 0].softmax(0).numpy() @ one.positions_mm()
        np.testing.assert_allclose(found[0, n].numpy(), expected, atol=1e-3)


def test_the_light_localiser_is_a_loop():
    X, _, _ = blobs(3)
    weights = {n: torch.randn(2, *t.shape) * 0.3 for n, t in LightLocaliser(192).init(torch.Generator()).items()}
    found = LightLocaliser(192).outputs(weights, X.batch(range(3)), None)
    for lane in range(2):
        w = {name: tensor[lane].numpy() for name, tensor in weights.items()}
        for n in range(3):
            one = X[n]
            score = np.exp(one.tokens @ w["score"])
            each = one.positions_mm() + 10 * (one.tokens @ w["offset.weight"].T + w["offset.bias"])
            np.testing.assert_allclose(found[lane, n].numpy(), (score / score.sum()) @ each, atol=1e-2)


def test_points_that_are_none_and_scans_without_geometry_are_refused():
    X, _, points = blobs(3)
    with pytest.raises(ValueError, match=r"\(N, 3\) finite"):
        LocalisationHead().fit(X, points[:, :2])
    bare = TokenSequence([case_tokens(Patches(np.ones((1, 2, 2, 4)), (1, 2, 2), None, None, (0,), {}))] * 2)
    with pytest.raises(GeometryError, match="no geometry"):
        LocalisationHead(seeds=1, epochs=1).fit(bare, points[:2])
