"""Tests of the client's address and of request ids behind trusted proxies."""

from __future__ import annotations

from ipaddress import ip_network

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.service.forwarded import (
    choose_request_id,
    client_address,
    is_trusted,
)

TRUSTED = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


def peer(host: str) -> IAddress:
    """The address of the other end of a connection."""
    kind = IPv6Address if ":" in host else IPv4Address
    return kind("TCP", host, 40000)


class ClientAddressTests(SynchronousTestCase):
    """Tests of `client_address` and `is_trusted`."""

    def test_the_header_of_a_stranger_is_ignored(self) -> None:
        """For an untrusted client, the address is that of the connection, whatever
        X-Forwarded-For claims."""
        for host in ("192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"):
            self.assertFalse(is_trusted(peer(host), TRUSTED))
            found = client_address(peer(host), [b"203.0.113.9"], TRUSTED)
            self.assertEqual(found, host)

    def test_a_trusted_proxy_names_the_client(self) -> None:
        """The client is the last address in X-Forwarded-For that belongs to no trusted
        proxy; the addresses before are unverified claims."""
        for forwarded, client in (
            ([b"203.0.113.9"], "203.0.113.9"),
            ([b"1.2.3.4, 203.0.113.9"], "203.0.113.9"),
            ([b"1.2.3.4", b"203.0.113.9"], "203.0.113.9"),
            ([b"1.2.3.4, 203.0.113.9, 10.0.0.2"], "203.0.113.9"),
            ([b"1.2.3.4, 203.0.113.9", b"10.0.0.2,fd00::1"], "203.0.113.9"),
            ([b"2001:db8::1"], "2001:db8::1"),
            ([b"10.0.0.3, 10.0.0.2"], "10.0.0.3"),
            ([b"203.0.113.9, unknown"], "10.0.0.1"),
            ([b"203.0.113.9, secret, 10.0.0.2"], "10.0.0.2"),
            ([b""], "10.0.0.1"),
            ([b"\xff"], "10.0.0.1"),
            ([b"203.0.113.9, \xff\x1b[31m"], "10.0.0.1"),
            ([b"203.0.113.9, \xb2.0.0.1"], "10.0.0.1"),
            ([b"fe80::1%eth0"], "fe80::1"),
            ([b"203.0.113.9, fd00::1%\xff'x"], "203.0.113.9"),
            ([], "10.0.0.1"),
        ):
            found = client_address(peer("10.0.0.1"), forwarded, TRUSTED)
            self.assertEqual(found, client, forwarded)
        for host in ("fd00::5", "::ffff:10.0.0.1"):
            found = client_address(peer(host), [b"203.0.113.9"], TRUSTED)
            self.assertEqual(found, "203.0.113.9", host)

    def test_a_zone_is_no_part_of_an_address(self) -> None:
        """A link-local address is used without its interface, and can be trusted."""
        local = peer("fe80::1%eth0")
        networks = (ip_network("fe80::/10"),)
        self.assertFalse(is_trusted(local, TRUSTED))
        self.assertEqual(client_address(local, [b"203.0.113.9"], TRUSTED), "fe80::1")
        self.assertTrue(is_trusted(local, networks))
        found = client_address(local, [b"203.0.113.9"], networks)
        self.assertEqual(found, "203.0.113.9")

    def test_a_unix_socket_is_trusted(self) -> None:
        """A peer on a unix socket is trusted as a proxy, whichever networks are
        trusted."""
        unix = UNIXAddress(None)
        self.assertTrue(is_trusted(unix, ()))
        self.assertEqual(client_address(unix, [b"203.0.113.9"], ()), "203.0.113.9")
        self.assertEqual(client_address(unix, [], ()), "unix")


class RequestIdTests(SynchronousTestCase):
    """Tests of `choose_request_id`."""

    def test_a_valid_request_id_is_kept(self) -> None:
        """A request id of at most 64 letters, digits, dots, dashes and underscores is
        kept."""
        for sent in ("a", "A-1_b.c", "x" * 64):
            self.assertEqual(choose_request_id(sent.encode()), sent)

    def test_an_invalid_request_id_is_replaced(self) -> None:
        """An invalid or missing request id is replaced by a new random id."""
        made = {
            choose_request_id(sent)
            for sent in (
                *(None, b"", b"x" * 65, b"a b", b"a\n", "é".encode(), b"\xff"),
                *(b"a;b", b'{"a"}'),
            )
        }
        self.assertEqual(len(made), 9)
        for request_id in made:
            self.assertRegex(request_id, "^[0-9a-f]{16}$")
