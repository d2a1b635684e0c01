from dataclasses import dataclass, field
from typing import Literal

import pytest

from hilum.errors import UsageError
from hilum.settings import differences, from_dict, override, read_toml, to_dict


@dataclass(frozen=True, kw_only=True)
class Crops:
    size_px: tuple[int, int] = (96, 96)
    scales: tuple[float, ...] = (0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    steps: int = 10
    rate: float = 1e-3
    name: str = "tiny"
    loss: Literal["dino", "lejepa"] = "dino"
    guided: bool = True
    clip: float | None = None
    crops: Crops = field(default_factory=Crops)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, found {self.steps}")


def test_round_trip_through_plain_values_and_toml(tmp_path):
    recipe = Recipe(steps=3, clip=2.0, crops=Crops(scales=(0.1,)))
    assert from_dict(Recipe, to_dict(recipe)) == recipe
    assert from_dict(Recipe, {}) == Recipe()
    path = tmp_path / "r.toml"
    path.write_text('steps = 3\nclip = 2\nname = "é"\n[crops]\nsize_px = [7, 8]\n', encoding="utf-8")
    found = from_dict(Recipe, read_toml(path))
    assert found == Recipe(steps=3, clip=2.0, name="é", crops=Crops(size_px=(7, 8)))
    assert isinstance(found.clip, float)


def test_what_is_missing_is_named():
    @dataclass(frozen=True, kw_only=True)
    class Whole:
        crops: Crops
        title: str

    with pytest.raises(UsageError, match=r"^mine: crops is missing; title is missing$"):
        from_dict(Whole, {}, "mine")


def test_overrides_reach_every_kind_of_value():
    changes = ["steps=5", "rate=1", "name=big", "loss=lejepa", "guided=false", "clip=0.5", "crops.scales=[0.2, 0.3, 1]"]
    found = override(Recipe(), changes)
    assert found == Recipe(
        steps=5, rate=1.0, name="big", loss="lejepa", guided=False, clip=0.5, crops=Crops(scales=(0.2, 0.3, 1.0))
    )
    assert override(found, ["name = with = sign", 'loss="dino"']).name == "with = sign"
    assert override(Recipe(), []) == Recipe()


def test_every_mistake_in_a_file_is_named_at_once():
    values = {
        "step": 3,
        "rate": "fast",
        "guided": 1,
        "steps": 2.5,
        "clip": "no",
        "loss": "cosine",
        "crops": {"size_px": [1], "scales": [1, "x"], "sice": 1},
    }
    with pytest.raises(UsageError) as caught:
        from_dict(Recipe, values, where="r.toml")
    message = str(caught.value)
    assert message.startswith("r.toml: ")
    for part in (
        "unknown setting step (known: clip, crops, guided, loss, name, rate, steps)",
        "rate: expected a number, found 'fast'",
        "guided: expected bool, found 1",
        "steps: expected a whole number, found 2.5",
        "clip: expected float | None, found 'no'",
        "loss: expected dino | lejepa, found 'cosine'",
        "unknown setting crops.sice (known: scales, size_px)",
        "crops.size_px: expected a list like [whole number, whole number], found",
        "crops.scales: expected a number, found 'x'",
    ):
        assert part in message


def test_every_mistake_in_overrides_is_named_at_once():
    with pytest.raises(UsageError) as caught:
        override(Recipe(), ["stepps=3", "crops.size=1", "crops.size_px.x=1", "rate", "guided=maybe", "steps=true"])
    message = str(caught.value)
    for part in (
        "'stepps=3' is no setting (known here: steps, rate, name, loss, guided, clip, crops)",
        "'crops.size=1' is no setting (known here: size_px, scales)",
        "'crops.size_px.x=1' is no setting",
        "'rate' lacks '=' and a value",
        "guided: expected bool, found 'maybe'",
        "steps: expected a whole number, found True",
    ):
        assert part in message


def test_a_table_where_a_value_belongs_and_the_other_way_round():
    with pytest.raises(UsageError, match="crops: expected a table of settings, found 3"):
        from_dict(Recipe, {"crops": 3})
    with pytest.raises(UsageError, match="steps: expected a whole number"):
        from_dict(Recipe, {"steps": {"a": 1}})


def test_a_check_of_the_dataclass_itself_is_a_complaint_too():
    with pytest.raises(UsageError, match="settings: steps must be at least 1, found 0"):
        override(Recipe(), ["steps=0"])


def test_a_file_that_is_no_toml_or_is_absent(tmp_path):
    (tmp_path / "r.toml").write_text("steps = = 3")
    with pytest.raises(UsageError, match=r"r\.toml is no TOML"):
        read_toml(tmp_path / "r.toml")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_toml(tmp_path / "absent.toml")


def test_differences_name_the_place():
    a, b = to_dict(Recipe()), to_dict(Recipe(steps=11, crops=Crops(scales=(1.0,))))
    assert differences(a, b) == ["crops.scales: [0.5, 1.0] ≠ [1.0]", "steps: 10 ≠ 11"]
    assert differences(a, a) == []
    assert differences({"x": 1}, {}) == ["x: 1 ≠ None"]
