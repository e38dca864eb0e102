"""Who listens on a port, by the kernel."""

import os
import socket

import pytest

from llmwd.adapters.listeners import owners


@pytest.mark.parametrize("family, address", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")])
def test_the_owner_of_a_listener_is_known_and_a_bound_port_is_nobodys(family, address):
    with socket.socket(family) as one:
        one.bind((address, 0))
        port = one.getsockname()[1]
        assert owners(port) == set()
        one.listen()
        assert owners(port) == {os.getuid()}
