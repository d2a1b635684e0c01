"""From scans to rows: which slices, which regions, which numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hilum.encode.contract import Contract, prepare_slice
from hilum.encode.describe import notes_of
from hilum.encode.encoder import Encoder, pixel_encoder
from hilum.encode.features import encode_scans
from hilum.encode.grids import chosen_slices, largest_slices, region_weights
from hilum.encode.items import How, Scan, make_items
from hilum.encode.regions import check_same_grid
from hilum.encode.table.rows import feature_rows
from hilum.encode.vit import Tokens
from hilum.errors import ContractError
from hilum.volume import Volume


def make_scan(name: str = "s1", shape=(6, 20, 30), seed: int = 0, mask: np.ndarray | None = None) -> Scan:
    rng = np.random.default_rng(seed)
    affine = np.array([[0, 0, 1.0, 5], [0, 2.0, 0, 6], [3.0, 0, 0, 7], [0, 0, 0, 1]])
    vol = Volume(voxels=rng.normal(0, 300, shape).astype(np.int16), affine=affine, modality="CT", unit="HU")
    labels = None if mask is None else Volume(voxels=mask, affine=affine, modality="OT", kind="label")
    return Scan(series=name, patient="p", study="t", volume=vol, mask=labels)


@pytest.fixture
def encoder() -> Encoder:
    return pixel_encoder()


# ---- what is encoded


def test_slices_are_all_or_the_middles_of_equal_parts():
    assert chosen_slices(5, None) == chosen_slices(5, 5) == chosen_slices(5, 9) == [0, 1, 2, 3, 4]
    assert chosen_slices(10, 2) == [2, 7]
    assert chosen_slices(9, 3) == [1, 4, 7]
    assert chosen_slices(7, 1) == [3]
    for num in (17, 100):
        for wanted in range(1, num):
            found = chosen_slices(num, wanted)
            assert len(set(found)) == wanted
            assert found[0] >= 0
            assert found[-1] < num


def test_items_of_a_scan_are_its_prepared_slices(encoder):
    scan = make_scan()
    items = list(make_items(scan, encoder, How(max_slices=2)))
    assert [i.slice for i in items] == chosen_slices(6, 2)
    for item in items:
        pixels = scan.volume.voxels[item.slice].astype(np.float32)
        assert torch.equal(item.image, prepare_slice(pixels, "CT", "HU", encoder.contract))
        assert item.weights is None
        assert item.region is None


def test_largest_slices_equal_a_loop():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 0, 0, 1, 2, 5], (7, 6, 6)).astype(np.uint8)
    labels[:, :, :3] = 0
    wanted = {}
    for label in range(1, 6):
        areas = [int((s == label).sum()) for s in labels]
        if max(areas):
            wanted[label] = areas.index(max(areas))
    assert largest_slices(labels) == wanted
    assert 3 not in wanted
    assert largest_slices(np.zeros((3, 4, 4), np.int16)) == {}


def test_the_first_of_equal_slices_is_taken():
    labels = np.zeros((4, 3, 3), np.uint8)
    labels[1, 0, 0] = labels[2, 1, 1] = 4
    assert largest_slices(labels) == {4: 1}


@pytest.mark.parametrize(
    ("shape", "grid"), [((16, 16), (4, 4)), ((20, 30), (4, 5)), ((18, 25), (4, 4)), ((3, 5), (4, 8))]
)
def test_region_weights_are_shares_of_area(shape, grid):
    """Every pixel counts with the share of it that overlaps a patch, to within whole pixels when sizes do not divide."""
    mask = np.random.default_rng(0).random(shape) < 0.3
    found = region_weights(mask, grid).reshape(grid).numpy()
    for r in range(grid[0]):
        for c in range(grid[1]):
            rows = slice(int(np.floor(r * shape[0] / grid[0])), int(np.ceil((r + 1) * shape[0] / grid[0])))
            columns = slice(int(np.floor(c * shape[1] / grid[1])), int(np.ceil((c + 1) * shape[1] / grid[1])))
            assert found[r, c] == pytest.approx(mask[rows, columns].mean(), abs=1e-6)


def test_a_region_of_one_pixel_still_has_a_patch():
    mask = np.zeros((40, 40), bool)
    mask[39, 0] = True
    weights = region_weights(mask, (4, 4)).reshape(4, 4)
    assert weights[3, 0] == pytest.approx(1 / 100)
    assert int((weights > 0).sum()) == 1


def test_items_of_regions(encoder):
    labels = np.zeros((6, 20, 30), np.uint8)
    labels[1, :4, :4], labels[2, :10, :10], labels[4, 15:, 20:] = 3, 3, 7
    items = list(make_items(make_scan(mask=labels), encoder, How(level="region")))
    assert [(i.region, i.slice) for i in items] == [(3, 2), (7, 4)]
    for item in items:
        assert item.weights is not None
        assert torch.equal(item.weights, region_weights(labels[item.slice] == item.region, encoder.grid))
    with pytest.raises(ContractError, match="needs a mask for every scan"):
        list(make_items(make_scan(), encoder, How(level="region")))


# ---- masks on the grid of their scan


def test_masks_off_the_grid_are_refused():
    scan = make_scan(mask=np.ones((6, 20, 30), np.uint8))
    assert scan.mask is not None
    check_same_grid(scan.volume, scan.mask)
    assert scan.mask.affine is not None
    shifted = scan.mask.affine.copy()
    shifted[0, 3] += 0.4  # within half the smallest spacing
    check_same_grid(scan.volume, replace(scan.mask, affine=shifted))
    shifted[0, 3] += 0.2
    with pytest.raises(ContractError, match=r"mask and scan lie 0\.6 mm apart"):
        check_same_grid(scan.volume, replace(scan.mask, affine=shifted))
    flipped = scan.mask.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 29], [0, 0, 0, 1.0]])
    with pytest.raises(ContractError, match=r"lie 29\.0 mm apart"):
        check_same_grid(scan.volume, replace(scan.mask, affine=flipped))
    with pytest.raises(ContractError, match=r"shape \(6, 20, 29\), its scan \(6, 20, 30\)"):
        check_same_grid(scan.volume, replace(scan.mask, voxels=scan.mask.voxels[..., :29]))
    check_same_grid(scan.volume, replace(scan.mask, affine=None))


# ---- rows


def rows_of(encoder: Encoder, scans: list[Scan], how: How, batch_size: int = 4, **given) -> list[dict]:
    return [row for rows in feature_rows(encoder, scans, how, batch_size, **given) for row in rows]


def test_vectors_come_in_order_whatever_the_batch_and_the_threads(encoder):
    scan = make_scan()
    items = list(make_items(scan, encoder, How()))
    one, four = (rows_of(encoder, [scan], How(), n, num_threads=n) for n in (1, 4))
    assert [r["slice"] for r in one] == [r["slice"] for r in four] == list(range(6))
    for a, b, item in zip(one, four, items):
        np.testing.assert_allclose(a["vector"], b["vector"], atol=1e-6)
        np.testing.assert_allclose(a["vector"], encoder.tokens(item.image[None]).cls[0].numpy(), atol=1e-6)


@pytest.mark.parametrize(("across", "wanted"), [("mean", lambda v: v.mean(0)), ("max", lambda v: v.max(0)),
                                                ("mean+max", lambda v: np.concatenate([v.mean(0), v.max(0)]))])  # fmt: skip
def test_a_volume_is_pooled_over_its_slices(encoder, across, wanted):
    scans = [make_scan("a"), make_scan("b", (1, 9, 9), seed=1), make_scan("c", (4, 10, 12), seed=2)]
    slices = rows_of(encoder, scans, How())
    volumes = rows_of(encoder, scans, How(level="volume", across=across))
    assert [v["item"] for v in volumes] == ["a", "b", "c"]
    for row in volumes:
        own = np.stack([s["vector"] for s in slices if s["series"] == row["series"]])
        np.testing.assert_allclose(row["vector"], wanted(own), atol=1e-6)
        assert row["slice"] is None
        assert row["level"] == "volume"


def test_rows_say_what_they_are(encoder):
    labels = np.zeros((6, 20, 30), np.uint8)
    labels[2, :10, :10] = 3
    scan = make_scan(mask=labels)
    (region,) = rows_of(encoder, [scan], How(level="region"))
    assert region["item"] == "s1/2/3"
    assert (region["slice"], region["region"], region["modality"], region["patient"]) == (2, 3, "CT", "p")
    assert region["contract"] == encoder.contract.hash
    assert (region["layer"], region["reason"]) == ("last", None)
    assert region["notes"] == list(notes_of(scan.image, encoder.contract))
    tokens = encoder.tokens(prepare_slice(scan.image.voxels[2].astype(np.float32), "CT", "HU", encoder.contract)[None])
    weights = region_weights(labels[2] == 3, encoder.grid)
    wanted = (weights[:, None] * tokens.patches[0]).sum(0) / weights.sum()
    np.testing.assert_allclose(region["vector"], wanted.numpy(), atol=1e-5)
    assert [r["item"] for r in rows_of(encoder, [make_scan()], How(max_slices=2))] == ["s1/1", "s1/4"]


class Broken(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> Tokens:
        cls = torch.full((len(images), 3), torch.nan)
        return Tokens(cls, cls[:, None], cls[:, None].expand(-1, 16, -1))


def test_features_that_are_not_numbers_are_a_reason():
    encoder = Encoder(Broken(), Contract(size_px=32, pooling="class"), "broken", patch=(8, 8))
    (row,) = rows_of(encoder, [make_scan()], How())
    assert row["vector"] is None
    assert "NaN or infinite features" in row["reason"]


def test_a_bad_scan_is_one_row_and_spares_its_neighbours(encoder):
    good, other = make_scan("a"), make_scan("c", seed=3)
    voxels = good.image.voxels.astype(np.float32)
    voxels[3, 2, 2] = np.nan
    bad = replace(make_scan("b"), volume=replace(good.image, voxels=voxels))
    gone = replace(make_scan("d"), volume=None, reason="truncated: 3 of 5 bytes")
    unit = replace(make_scan("e"), volume=replace(good.image, unit=""))
    rows = rows_of(encoder, [good, bad, gone, unit, other], How(), 32)
    alone = rows_of(encoder, [good], How(), 32) + rows_of(encoder, [other], How(), 32)
    assert [(r["item"], r["vector"] is None) for r in rows if r["vector"] is None or r["slice"] == 0] == [
        ("a/0", False), ("b", True), ("d", True), ("e", True), ("c/0", False)]  # fmt: skip
    reasons = {r["series"]: r["reason"] for r in rows if r["reason"]}
    assert "NaN" in reasons["b"]
    assert reasons["d"] == "truncated: 3 of 5 bytes"
    assert "CT comes in HU" in reasons["e"]
    for found, wanted in zip([r for r in rows if not r["reason"]], alone):
        assert found["item"] == wanted["item"]
        np.testing.assert_allclose(found["vector"], wanted["vector"], atol=1e-6)


def test_groups_do_not_share_a_batch():
    """The numbers of a shard cannot depend on what was encoded before it in the same run."""
    sizes = []

    class Counting(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> Tokens:
            sizes.append(len(images))
            flat = images.flatten(1)[:, :4]
            return Tokens(flat, flat[:, None], flat[:, None].expand(-1, 16, -1))

    encoder = Encoder(Counting(), Contract(size_px=32, pooling="class"), "counting", patch=(8, 8))
    scans = [replace(make_scan(str(n), (3, 9, 9), n), group=n // 2) for n in range(4)]
    list(encode_scans(encoder, scans, How(), 4))
    assert sizes == [4, 2, 4, 2]


def test_statistics_of_the_whole_scan_reach_each_slice():
    contract = Contract(size_px=32, normalise="volume", normalise_last=True)
    encoder = Encoder(pixel_encoder().network, contract, "pixels", patch=(16, 16))
    scan = make_scan()
    images = torch.stack([item.image for item in make_items(scan, encoder, How())])
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std()) == pytest.approx(1, abs=1e-3)
    assert float(images[0].mean()) != pytest.approx(0, abs=1e-4)


def test_a_label_at_the_edge_that_a_model_cuts_off_costs_no_other(encoder):
    """Natural-image models see the middle of a slice; a mask of many organs always has some outside of it."""
    cropped = replace(encoder.slice_contract, fit="crop", size_px=32, short_px=64)
    encoder = Encoder(encoder.network, cropped, "cropped", patch=encoder.patch)
    mask = np.zeros((6, 20, 30), np.uint8)
    mask[1, 9:12, 14:17], mask[2, 0:2, 0:3] = 1, 2
    (found,) = encode_scans(encoder, [make_scan(mask=mask)], How(level="region"), 4)
    assert [part.region for part in found.parts] == [1]
    assert "labels outside of what the model sees, left out: 2" in found.notes
    outside = make_scan("s2", mask=np.where(mask == 2, mask, 0))
    refused, kept = encode_scans(encoder, [outside, make_scan(mask=mask)], How(level="region"), 4)
    assert "outside of what the model sees" in refused.reason
    assert not kept.reason
