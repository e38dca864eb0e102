"""Which dead man's notices are taken back, where, and for how long that is tried."""

from llmwd.core.outbox import Book, Deadman, State, merged
from llmwd.core.takeback import LATEST_S, SHOWN_FOR_S, at_server, give_up, next_back, taken

MINE = Deadman("s-1", 500.0, "here")
HERE = State(salt="s", server="here", replaces=True, deadman=MINE)


def test_one_that_is_given_up_is_kept_until_its_server_has_confirmed_it():
    state = give_up(HERE, 100.0)
    assert state.deadman is None and next_back(state, frozenset({"here"})) == MINE
    assert next_back(state, frozenset({"elsewhere"})) is None
    assert taken(state, "", 100.0) == state and taken(state, "s-1", 100.0).back == ()
    assert taken(state, "", 501.0 + SHOWN_FOR_S).back == ()


def test_one_that_the_server_may_not_have_is_tried_as_long_as_it_could_be_there():
    state = give_up(State(deadman=Deadman("s-1", None, "here")), 100.0)
    assert state.back[0].fires_at == 100.0 + LATEST_S


def test_another_server_has_shown_nothing_and_was_given_nothing():
    state = at_server(HERE, "there", True, 100.0)
    assert (state.server, state.replaces, state.deadman, state.back) == ("there", False, None, (MINE,))
    assert at_server(HERE, "here", True, 100.0) == HERE
    assert at_server(HERE, "here", False, 100.0).back == (MINE,)
    off = at_server(HERE, "", False, 100.0)
    assert off.replaces and off.server == "here" and off.back == (MINE,)


def test_what_an_older_version_kept_counts_as_of_the_server_that_is_set():
    old = State(replaces=True, deadman=Deadman("s-1", 500.0))
    state = at_server(old, "here", True, 100.0)
    assert state.replaces and state.server == "here" and state.deadman == old.deadman


def test_what_is_read_late_is_not_forgotten():
    book = merged(Book(state=HERE), Book(state=State(salt="x", next_id=9)), True)
    assert (book.state.deadman, book.state.replaces, book.state.salt, book.state.next_id) == (MINE, True, "s", 9)
