"""Who listens on a port, by the kernel."""

import os
import socket

import pytest

from llmwd.adapters import listeners

WAYS = [listeners.owners, listeners.asked, listeners.read]


@pytest.mark.parametrize("ask", WAYS)
@pytest.mark.parametrize("family, address", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")])
def test_the_owner_of_a_listener_is_known_and_a_bound_port_is_nobodys(ask, family, address):
    with socket.socket(family) as one:
        one.bind((address, 0))
        port = one.getsockname()[1]
        assert ask(port) == set()
        one.listen()
        assert ask(port) == {os.getuid()}
        with socket.socket(family) as other:  # is not taken for him
            other.bind((address, 0))
            other.listen()
            assert ask(port) == ask(other.getsockname()[1]) == {os.getuid()}
    assert ask(port) == set()


@pytest.mark.parametrize("ask", WAYS)
def test_all_who_share_a_port_are_told(ask):
    other = 54321 if os.getuid() == 0 else os.getuid()  # only root can listen as somebody else
    with socket.socket() as ours, socket.socket(socket.AF_INET6) as theirs:
        theirs.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        theirs.bind(("::1", 0))
        os.fchown(theirs.fileno(), other, -1)
        theirs.listen()
        port = theirs.getsockname()[1]
        assert ask(port) == {other}
        ours.bind(("127.0.0.1", port))
        ours.listen()
        assert ask(port) == {os.getuid(), other}


def test_a_kernel_that_does_not_answer_is_read_instead(monkeypatch):
    def refused(port: int) -> set[int]:
        raise OSError("Protocol not supported")

    monkeypatch.setattr(listeners, "asked", refused)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        assert listeners.owners(one.getsockname()[1]) == {os.getuid()}


def test_a_port_is_free_unless_somebody_listens_on_it():
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
        assert not listeners.is_free(port)
        with socket.create_connection(("127.0.0.1", port)) as client:
            one.accept()[0].close()
            client.recv(1)
    assert listeners.is_free(port)  # also while connections to it are not forgotten yet
