"""Where an endpoint may listen: refusals are one sentence, and no other machine gets in without a key by accident."""

import socket

import pytest

from hrs.errors import HRSError
from serve.address import host_and_port, require_address


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_this_machine_needs_no_key(host: str, port: int) -> None:
    assert require_address(host, port, keys=False, allow_anonymous=False) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_a_key_or_a_word_of_the_user(host: str, port: int) -> None:
    with pytest.raises(HRSError, match=r"could use the endpoint on .* without a key: give --api-key-file") as refused:
        require_address(host, port, keys=False, allow_anonymous=False)
    assert "\n" not in str(refused.value)
    assert require_address(host, port, keys=True, allow_anonymous=False) is None
    warning = require_address(host, port, keys=False, allow_anonymous=True)
    assert warning is not None and warning.startswith(f"everybody who reaches {host_and_port(host, port)} can use")


@pytest.mark.parametrize("port", [-1, 0, 65536, 99999])
def test_a_port_that_does_not_exist(port: int) -> None:
    with pytest.raises(HRSError, match=f"port {port} does not exist: give a --port from 1 to 65535"):
        require_address("127.0.0.1", port, keys=False, allow_anonymous=False)


@pytest.mark.parametrize("host", ["no such host", "256.0.0.1", "", "a" * 300, "fe80::1%none"])
def test_a_host_that_is_none(host: str, port: int) -> None:
    with pytest.raises(HRSError, match=r"is no address of this machine|cannot be listened on") as refused:
        require_address(host, port, keys=True, allow_anonymous=False)
    assert "\n" not in str(refused.value)


def test_an_address_that_is_taken_or_not_ours(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(HRSError, match=r"cannot be listened on \(Address already in use\)"):
            require_address("127.0.0.1", port, keys=False, allow_anonymous=False)
    with pytest.raises(HRSError, match=r"203\.0\.113\.1:\d+ cannot be listened on"):
        require_address("203.0.113.1", port, keys=True, allow_anonymous=False)


def test_addresses_in_urls() -> None:
    assert host_and_port("127.0.0.1", 8000) == "127.0.0.1:8000"
    assert host_and_port("::1", 8000) == "[::1]:8000"
