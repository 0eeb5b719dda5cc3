import pytest

from wina.errors import ConfigError, UnknownNameError, WinaError
from wina.registry import Registry, create, spelled_out, split_spec


class Thing:
    def __init__(self, number: float = 1.0) -> None:
        self.number = number


class Plain:
    pass


@pytest.fixture
def things() -> Registry[type]:
    registry: Registry[type] = Registry("thing")
    registry.register("thing")(Thing)
    registry.register("plain")(Plain)
    return registry


def test_duplicate_raises(things: Registry[type]) -> None:
    with pytest.raises(ConfigError, match="thing 'plain' is registered twice"):
        things.register("plain")(Thing)


def test_unknown_name_lists_and_suggests(things: Registry[type]) -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'thing'\? Known: thing, plain"):
        things["thin"]


def test_create_hands_the_number_over(things: Registry[type]) -> None:
    assert create(things, "thing").number == 1.0
    assert create(things, "thing:0.25").number == 0.25


@pytest.mark.parametrize("spec", ["thing:x", "thing:", "plain:1"])
def test_malformed_spec(things: Registry[type], spec: str) -> None:
    with pytest.raises(ConfigError, match="thing"):
        create(things, spec)


def test_split_spec() -> None:
    assert split_spec("kind", "a:2") == ("a", 2.0)
    assert split_spec("kind", "a") == ("a", None)


def test_create_hands_named_numbers_over(things: Registry[type]) -> None:
    assert create(things, "thing:number=0.25").number == 0.25


@pytest.mark.parametrize(
    "spec", ["thing:size=1", "thing:number=1:number=2", "thing:1:2", "thing:number=x", "thing:1:"]
)
def test_malformed_named_numbers(things: Registry[type], spec: str) -> None:
    with pytest.raises(ConfigError, match="thing"):
        create(things, spec)


def test_split_spec_takes_one_number() -> None:
    with pytest.raises(ConfigError, match="one number"):
        split_spec("kind", "a:b=2")


@pytest.mark.parametrize("spec", ["x" * 100_000, "thing:" + "y" * 100_000])
def test_a_message_repeats_no_more_of_a_name_than_can_be_read(
    things: Registry[type], spec: str
) -> None:
    with pytest.raises(WinaError) as error:
        create(things, spec)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("spec", "whole"),
    [
        ("pair", "pair:a=1:b=0.25"),
        ("pair:3", "pair:a=3:b=0.25"),
        ("pair:b=1e-3", "pair:a=1:b=0.001"),
        ("plain", "plain"),
    ],
)
def test_a_spec_spelled_out_is_the_same_whatever_the_defaults(spec: str, whole: str) -> None:
    registry: Registry[type] = Registry("thing")

    @registry.register("pair")
    class Pair:
        def __init__(self, a: float = 1, b: float = 0.25) -> None: ...

    registry.register("plain")(type("Plain", (), {}))
    assert spelled_out(registry, spec) == whole
    assert spelled_out(registry, whole) == whole
    with pytest.raises(ConfigError, match="unexpected"):
        spelled_out(registry, "pair:c=1")
