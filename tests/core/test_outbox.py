"""What waits to be told: its order, what is folded, what is given up and said."""

import msgspec

from llmwd.core import outbox, untold
from llmwd.core.notices import STOPPED, About, Notice
from llmwd.core.outbox import Book, State, done, due, hurry, loaded, next_at, paced_at, put, tried
from llmwd.core.untold import addressed
from llmwd.vocab import Event

HERE = ("ntfy",)


def notice(event: Event = Event.serving, key: str = "k", about: About = About.server, **fields: object) -> Notice:
    title = fields.pop("title", f"{event.capitalize()} on node7")
    return Notice(about, key, title, "m", "boom", event, **fields)


def tidy(book: Book, dests: tuple[str, ...], now_at: float, *sending: outbox.Entry) -> tuple[Book, int]:
    return untold.tidy(book, dests, frozenset(one.sid for one in sending), "node7", now_at)


def yields(book: Book, number: int, start_at: float, every_s: float = 60.0) -> Book:
    """So many departures and returns, the last of which is a return."""
    for turn in range(number):
        at = start_at + turn * every_s
        book = put(book, notice(Event.yielding, f"yielding:{turn}", hold_s=3.0), HERE, at)
        book = put(book, notice(Event.yielding, f"yielded:{turn}"), HERE, at + 1)
        book = put(book, notice(Event.resumed, f"serving:{turn}"), HERE, at + 30)
    return book


def drained(book: Book, now_at: float) -> list[str]:
    told = []
    while (entry := due(book, "ntfy", now_at)) is not None:
        told.append(entry.title)
        book = done(book, entry)
    return told


def test_the_oldest_goes_first_and_what_is_held_back_blocks_nobody():
    book = put(Book(), notice(Event.tunnel, "down", About.tunnel, hold_s=15.0), HERE, 0.0)
    book = put(book, notice(Event.serving, "a"), HERE, 1.0)
    book = put(book, notice(Event.failed, "b"), HERE, 2.0)
    assert next_at(book, "ntfy") == 1.0
    assert drained(book, 5.0) == ["Serving on node7", "Failed on node7"]
    assert drained(book, 15.0) == ["Tunnel on node7", "Serving on node7", "Failed on node7"]
    assert due(book, "slack", 99.0) is None and next_at(book, "slack") is None


def test_what_is_over_before_anybody_heard_of_it_is_not_told():
    book = put(Book(), notice(Event.tunnel, "up", About.tunnel), HERE, 0.0)
    up = len(book.entries)
    book = put(book, notice(Event.tunnel, "down", About.tunnel, hold_s=15.0), HERE, 100.0)
    book = put(book, notice(Event.tunnel, "up", About.tunnel), HERE, 110.0)
    assert len(book.entries) == up and book.state.told.tunnel == "up"
    quick = put(put(Book(), notice(Event.yielding, "yielding:1", hold_s=3.0), HERE, 0.0), notice(Event.yielding, "yielded:1"), HERE, 1.0)
    assert [entry.about for entry in quick.entries] == [About.server] and quick.state.departures == ((Event.yielding, 0.0),)


def test_a_long_release_is_told_twice_and_counted_once():
    book = put(Book(), notice(Event.yielding, "yielding:1", hold_s=3.0), HERE, 0.0)
    book = put(book, notice(Event.yielding, "yielded:1"), HERE, 10.0)
    assert len(book.entries) == 2 and len(book.state.departures) == 1


def test_what_is_turned_off_is_remembered_and_not_told():
    book = put(Book(), notice(Event.serving, "a"), HERE, 0.0, tell=False)
    assert book.entries == () and book.state.told.server == "a"
    assert put(book, notice(Event.stopped, STOPPED), HERE, 1.0).state.told.server == STOPPED


def test_from_the_third_yield_in_ten_minutes_on_one_notice_counts_them():
    book = yields(Book(), 5, 1000.0)
    assert drained(book, 1031.0 + 60) == ["Yielding on node7", "Resumed on node7"] * 2
    (fold,) = [entry for entry in book.entries if entry.folds]
    assert fold.title == "5 yields in 10 minutes: node7" and fold.message.startswith("The last: Resumed on node7")
    assert fold.due_at == 1270.0 + outbox.FOLD_CALM_S
    assert outbox.FOLD_WITHIN_S == 600  # which the title says in words


def test_flapping_that_does_not_end_is_told_every_ten_minutes_and_calm_ends_it():
    book = yields(Book(), 20, 1000.0)
    (fold,) = [entry for entry in book.entries if entry.folds]
    assert fold.due_at == fold.created_at + outbox.FOLD_WITHIN_S == 1120 + 600
    calm = put(done(book, fold), notice(Event.yielding, "yielded:x"), HERE, 9000.0)
    assert calm.entries[-1].folds is None


def test_an_alarm_is_not_folded_but_for_crashes():
    book = Book()
    for turn in range(5):
        book = put(book, notice(Event.failed, str(turn), alarm=True), HERE, float(turn))
        book = put(book, notice(Event.crashed, f"crashed {turn}", alarm=True), HERE, float(turn))
    assert sum(entry.event is Event.failed for entry in book.entries) == 5
    assert sum(entry.event is Event.crashed for entry in book.entries) == 3


def test_an_entry_that_changes_while_it_is_sent_is_sent_again_under_its_sequence_id():
    book = yields(Book(), 3, 1000.0)
    (sending,) = [entry for entry in book.entries if entry.folds]
    after = done(yields(book, 1, 1200.0), sending)
    (left,) = [entry for entry in after.entries if entry.folds]
    assert left.sid == sending.sid and left.title == "4 yields in 10 minutes: node7"
    assert tried(after, left).entries[-1].tries == 1


def test_sequence_ids_differ_between_notices_destinations_and_installations():
    ids = [entry.sid for salt in "ab" for entry in yields(Book(state=State(salt=salt)), 2, 0.0).entries]
    both = put(Book(), notice(), ("ntfy", "slack"), 0.0)
    assert len(set(ids)) == len(ids) and len({entry.sid for entry in both.entries}) == 2


def test_what_is_too_old_is_told_in_one_digest_which_grows_until_it_was_told():
    book = yields(Book(), 2, 0.0)
    book = put(book, notice(Event.failed, "f", alarm=True), HERE, 200.0)
    book, lost = tidy(book, HERE, outbox.EXPIRES_AFTER_S + 1000)
    assert lost == 4 and [entry.event for entry in book.entries] == [Event.failed, Event.digest]
    assert book.entries[-1].title == "4 notices of node7 were never told"
    book, _ = tidy(book, HERE, outbox.ALARM_EXPIRES_AFTER_S + 1000)
    (digest,) = book.entries
    assert digest.title.startswith("5 notices") and "1 failed, 2 resumed, 2 yielding" in digest.message
    assert tidy(book, HERE, 1e9) == (book, 0)


def test_a_full_outbox_drops_the_least_important_and_says_so():
    book = put(Book(), notice(Event.failed, "f", alarm=True), HERE, 0.0)
    for turn in range(untold.MOST_ENTRIES):
        book = put(book, notice((Event.quarantined, Event.switched)[turn % 2], str(turn)), HERE, 1.0)
    book = put(book, notice(Event.resumed, "r"), HERE, 2.0)
    book, lost = tidy(book, HERE, 3.0)
    assert lost == 2 and book.entries[0].event is Event.failed and not [it for it in book.entries if it.event is Event.resumed]
    assert "gave way to others" in book.entries[-1].message and len(book.entries) == untold.MOST_ENTRIES + 1


def had(*dests: str) -> Book:
    """With a notice for each, which the settings name so far."""
    return put(addressed(Book(), dests)[0], notice(), dests, 0.0)


def test_notices_for_an_address_that_was_corrected_go_to_the_new_one_of_the_same_service():
    book, left = addressed(had("ntfy", "slack-aaaaaa"), ("ntfy", "json-cccccc", "slack-bbbbbb"))
    assert [entry.dest for entry in book.entries] == ["ntfy", "slack-bbbbbb"] and left == ()
    book, left = addressed(had("slack-aaaaaa"), HERE)
    assert [entry.dest for entry in book.entries] == ["ntfy"] and left == ()


def test_notices_for_an_address_that_was_taken_out_wait_for_it_and_are_counted_when_their_time_is_over():
    book, left = addressed(had("ntfy", "slack-aaaaaa"), HERE)
    assert left == ("slack-aaaaaa",) and len(book.entries) == 2
    assert addressed(book, ("ntfy", "slack-aaaaaa"))[1] == ()
    book = done(book, book.entries[0])
    (digest,) = tidy(book, HERE, outbox.EXPIRES_AFTER_S + 1)[0].entries
    assert (digest.dest, digest.title) == ("ntfy", "1 notice of node7 was never told")
    off = addressed(had("ntfy"), ())  # for a moment
    assert addressed(off[0], HERE) == (had("ntfy"), ())


def test_a_digest_for_an_address_that_was_taken_out_is_told_elsewhere():
    book, _ = tidy(had("ntfy", "slack-aaaaaa"), ("ntfy", "slack-aaaaaa"), outbox.EXPIRES_AFTER_S + 1)
    assert [entry.dest for entry in addressed(book, HERE)[0].entries] == ["ntfy", "ntfy"]


def test_what_is_being_sent_is_neither_too_old_nor_too_much():
    book = put(Book(), notice(Event.resumed, "r"), HERE, 0.0)
    sending = book.entries[0]
    for turn in range(untold.MOST_ENTRIES):
        book = put(book, notice(Event.switched, str(turn)), HERE, 1.0)
    full, lost = tidy(book, HERE, 3.0, sending)
    assert lost == 1 and sending in full.entries
    old, _ = tidy(full, HERE, 1e9, sending)
    assert sending in old.entries


def test_a_departure_that_is_held_back_is_told_before_whatever_else_follows():
    for tell in (True, False):
        book = put(Book(), notice(Event.yielding, "yielding:7", hold_s=3.0), HERE, 0.0)
        book = put(book, notice(Event.failed, "failed:x", alarm=True), HERE, 1.0, tell)
        assert drained(book, 1.0) == ["Yielding on node7", "Failed on node7"][: 1 + tell]


def test_at_the_end_nothing_is_held_back_but_a_tunnel_that_ends_with_the_rest():
    book = put(Book(), notice(Event.yielding, "yielding:7", hold_s=3.0), HERE, 0.0)
    book = put(book, notice(Event.tunnel, "down", About.tunnel, hold_s=15.0), HERE, 0.0)
    assert drained(hurry(book, 1.0), 1.0) == ["Yielding on node7"]


def test_a_fold_that_cannot_be_told_goes_on_counting_and_is_lost_as_what_it_counts():
    book = yields(Book(), 20, 1000.0, 25.0)
    book = yields(book, 4, 6000.0, 25.0)
    (fold,) = [entry for entry in book.entries if entry.folds]
    assert fold.title == "24 yields in 1h 25m: node7"
    (digest,) = tidy(book, HERE, 1e9)[0].entries
    assert digest.message.startswith("Not told in time: 4 resumed, 24 yielding")


def test_a_clock_that_was_set_back_holds_nothing_up():
    book = put(Book(), notice(hold_s=3.0), HERE, 1e9)
    (entry,) = loaded(book, 1000.0).entries
    assert entry.due_at <= 1000.0 + outbox.LATEST_AHEAD_S and entry.created_at == 1000.0
    assert hurry(book, 1000.0).entries[0].due_at == 1000.0


def test_a_long_queue_is_sent_at_the_servers_pace():
    assert paced_at((), 100.0) == 100.0
    burst = tuple(100.0 + number / 10 for number in range(outbox.BURST))
    assert paced_at(burst[:-1], 103.0) == 103.0
    assert paced_at(burst, 103.0) == burst[-1] + outbox.PACE_S and paced_at(burst, 900.0) == 900.0


def test_a_book_comes_back_from_disk_as_it_was():
    book = yields(Book(), 4, 0.0)
    assert msgspec.json.decode(msgspec.json.encode(book), type=Book) == book
