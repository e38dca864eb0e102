"""Every message crosses its channel unchanged, and nothing else is taken for one."""

import inspect
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmwd import messages as wire
from llmwd import vocab
from llmwd.ctl.arguments import GPUS, LONGEST_S

ON_MSGPACK = {
    "bus": wire.Envelope, "order": wire.Order, "reply": wire.Reply, "to the root": wire.ToRoot, "to a worker": wire.ToWorker,
}  # fmt: skip
ON_JSON = {"spec": wire.HolderSpec, "to a holder": wire.ToHolder, "from a holder": wire.FromHolder}
KINDS = [kind for kind in vars(wire).values() if inspect.isclass(kind) and issubclass(kind, wire.Message | wire.Part)]
MESSAGES = list(dict.fromkeys(KINDS))  # a channel with one message is another name for it
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SMALL = st.integers(-(2**53), 2**53)


def values(kind: object) -> st.SearchStrategy:
    """Values of a field's type; of strings and numbers what both formats can carry."""
    if kind is str:
        return st.text(max_size=20)
    if kind is float:
        return NUMBERS
    if kind is int:
        return SMALL
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return within_bounds(args[0], args[1])
    if origin is tuple:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if args:
        return st.one_of(*map(values, args))
    if inspect.isclass(kind) and issubclass(kind, msgspec.Struct):
        return st.fixed_dictionaries({f.name: values(f.type) for f in msgspec.structs.fields(kind)}).map(lambda told: kind(**told))
    return st.none() if kind in (None, type(None)) else st.from_type(kind)


def within_bounds(kind: object, bounds: msgspec.Meta) -> st.SearchStrategy:
    """Values that an order may have."""
    if kind is float:
        return st.floats(bounds.ge, bounds.le)
    if kind is int:
        return st.integers(bounds.ge, bounds.lt - 1)
    if kind is str and bounds.max_length is None:
        return st.from_regex(bounds.pattern)
    if kind is str:
        return st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20)
    return values(kind)


def members(union: object) -> tuple[type, ...]:
    return typing.get_args(union) or (union,)


@pytest.mark.parametrize("channel", ON_MSGPACK)
@given(st.data())
def test_every_message_comes_back_from_msgpack_as_it_was_sent(channel: str, data: st.DataObject) -> None:
    told = data.draw(values(ON_MSGPACK[channel]))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=ON_MSGPACK[channel]) == told


@pytest.mark.parametrize("channel", ON_JSON)
@given(st.data())
def test_every_message_of_the_holder_comes_back_from_json_as_it_was_sent(channel: str, data: st.DataObject) -> None:
    told = data.draw(values(ON_JSON[channel]))
    assert msgspec.json.decode(msgspec.json.encode(told), type=ON_JSON[channel]) == told


@given(values(wire.Envelope))
def test_a_cut_packet_is_refused(envelope: wire.Envelope) -> None:
    packet = msgspec.msgpack.encode(envelope)
    for length in range(0, len(packet), 7):
        with pytest.raises(msgspec.DecodeError):
            msgspec.msgpack.decode(packet[:length], type=wire.Envelope)


@pytest.mark.parametrize("channel", ON_MSGPACK)
@given(st.binary(max_size=200))
def test_garbage_is_refused_as_msgspec_refuses(channel: str, garbage: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.msgpack.decode(garbage, type=ON_MSGPACK[channel])


@pytest.mark.parametrize("channel", ON_JSON)
@given(st.binary(max_size=200))
def test_garbage_on_a_holders_socket_is_refused(channel: str, garbage: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(garbage, type=ON_JSON[channel])


ORDERS = [kind for kind in MESSAGES if kind in members(wire.Order)]
ABSURD = {
    float: (float("nan"), float("inf"), float("-inf"), -1.0, 1e300),
    int: (-1, wire.GPUS_MOST, 1 << 62),
    str: ("x" * 50_000,),
    tuple: ((0,) * (wire.GPUS_MOST + 1),),
}


def parts(kind: object) -> list[object]:
    """A field's type, taken apart: without Annotated, and what a union or a list is of."""
    return [kind] if inspect.isclass(kind) else [kind, *(part for arg in typing.get_args(kind) for part in parts(arg))]


@pytest.mark.parametrize(("order", "field"), [(order, field) for order in ORDERS for field in order.__struct_fields__])
def test_every_field_of_an_order_has_bounds(order: type, field: str) -> None:
    """A worker's loop is not to meet what its arithmetic cannot do with; the decoder refuses it."""
    well = {"by": "me", "for_s": 1.0, "within_s": 1.0, "job": "1", "gpus": [0], "profile": "p", "message": "m"}
    told = {"type": order.__struct_config__.tag, **{name: well[name] for name in order.__struct_fields__}}
    decoder = msgspec.msgpack.Decoder(wire.Order)
    assert isinstance(decoder.decode(msgspec.msgpack.encode(told)), order)
    kind = next(each.type for each in msgspec.structs.fields(order) if each.name == field)
    absurd = [value for basic, values in ABSURD.items() if basic in map(origin_of, parts(kind)) for value in values]
    absurd = [(value,) if isinstance(value, int) else value for value in absurd]
    assert absurd
    for value in absurd:
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(msgspec.msgpack.encode(told | {field: value}))


def origin_of(kind: object) -> object:
    return typing.get_origin(kind) or kind


def test_whatever_llmwd_ctl_takes_for_a_duration_or_for_gpus_is_within_an_orders_bounds() -> None:
    assert LONGEST_S <= wire.LONGEST_S
    assert max(GPUS.convert("0-999", None, None)) < wire.GPUS_MOST


def test_an_order_is_not_taken_for_a_fact_nor_a_fact_for_an_order() -> None:
    order = msgspec.msgpack.encode(wire.ResumeOrder(by="me"))
    for channel in set(ON_MSGPACK) - {"order"}:
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(order, type=ON_MSGPACK[channel])


def test_a_word_that_is_none_of_ours_is_refused() -> None:
    told = msgspec.to_builtins(wire.TunnelFact(phase=vocab.Phase.ready, detail="", since_at=0.0, at_s=0.0))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(told | {"phase": "runnig"}, type=wire.TunnelFact)


def test_every_message_has_its_own_tag_and_a_channel() -> None:
    tagged = [kind for kind in MESSAGES if issubclass(kind, wire.Message) and kind is not wire.Message]
    tags = [kind.__struct_config__.tag for kind in tagged]
    assert len(set(tags)) == len(tags) and all(isinstance(tag, str) and tag.islower() for tag in tags)
    unions = (wire.Fact, wire.Order, wire.Reply, wire.ToRoot, wire.ToWorker, wire.ToHolder, wire.FromHolder)
    assert {kind for union in unions for kind in members(union)} == set(tagged)


def test_every_worker_has_one_fact_of_its_own_and_the_root_another() -> None:
    assert {kind.__struct_config__.tag for kind in members(wire.Fact)} == {
        "jobs", "gpus", "server", "door", "tunnel", "notices", "root",
    }  # fmt: skip
    assert len(vocab.Worker) == len(members(wire.Fact)) - 1


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_messages_are_frozen_explained_and_built_by_name(kind: type) -> None:
    config = kind.__struct_config__
    assert config.frozen and inspect.getdoc(kind)
    fields = msgspec.structs.fields(kind)
    if fields:
        with pytest.raises(TypeError):
            kind(*range(len(fields)))


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_numbers_say_their_unit_and_times_their_clock(kind: type) -> None:
    for field in msgspec.structs.fields(kind):
        if typing.get_args(field.type) and float in typing.get_args(field.type) and field.name != "note" or field.type is float:
            assert field.name.endswith(("_s", "_at", "_percent")), f"{kind.__name__}.{field.name}"
