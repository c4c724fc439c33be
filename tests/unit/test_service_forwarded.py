"""Who sends a request."""

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
    """A connection's other end."""
    kind = IPv6Address if ":" in host else IPv4Address
    return kind("TCP", host, 40000)


class ClientAddressTests(SynchronousTestCase):
    """`client_address` and `is_trusted`."""

    def test_a_stranger_is_who_it_is(self) -> None:
        """Whatever it says of itself."""
        for host in ("192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"):
            self.assertFalse(is_trusted(peer(host), TRUSTED))
            found = client_address(peer(host), [b"203.0.113.9"], TRUSTED)
            self.assertEqual(found, host)

    def test_a_proxy_tells_who_it_was(self) -> None:
        """The last address that isn't a proxy's; those before it are claims."""
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
        """A link-local peer is told without its interface, and can be trusted."""
        local = peer("fe80::1%eth0")
        networks = (ip_network("fe80::/10"),)
        self.assertFalse(is_trusted(local, TRUSTED))
        self.assertEqual(client_address(local, [b"203.0.113.9"], TRUSTED), "fe80::1")
        self.assertTrue(is_trusted(local, networks))
        found = client_address(local, [b"203.0.113.9"], networks)
        self.assertEqual(found, "203.0.113.9")

    def test_a_unix_socket_is_the_proxys(self) -> None:
        """Whoever else is trusted."""
        unix = UNIXAddress(None)
        self.assertTrue(is_trusted(unix, ()))
        self.assertEqual(client_address(unix, [b"203.0.113.9"], ()), "203.0.113.9")
        self.assertEqual(client_address(unix, [], ()), "unix")


class RequestIdTests(SynchronousTestCase):
    """`choose_request_id`."""

    def test_a_sane_one_is_kept(self) -> None:
        """Letters, digits, dots, dashes and underscores, 64 at most."""
        for sent in ("a", "A-1_b.c", "x" * 64):
            self.assertEqual(choose_request_id(sent.encode()), sent)

    def test_any_other_is_made_anew(self) -> None:
        """Each another one."""
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
