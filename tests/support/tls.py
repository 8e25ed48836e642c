"""TLS on loopback: a certificate authority, a server that ends TLS before another one, and a proxy for CONNECT."""

from __future__ import annotations

import datetime as dt
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_DAY = dt.timedelta(days=1)


def authority(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """Make a certificate authority; return its certificate, and the context of a server at 127.0.0.1 that it signed."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = _name("an authority of the tests")
    ca = _builder(ca_name, ca_name, ca_key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    signed = _builder(_name("127.0.0.1"), ca_name, key).add_extension(
        x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
    )
    bundle, chain = folder / "ca.pem", folder / "server.pem"
    bundle.write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    chain.write_bytes(private + signed.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return bundle, context


@contextmanager
def ending_tls(context: ssl.SSLContext, port: int) -> Iterator[str]:
    """Serve https on loopback in front of the plain server at `port`, and yield the address."""

    def handle(client: socket.socket) -> None:
        with context.wrap_socket(client, server_side=True) as secured, _connected("127.0.0.1", port) as server:
            _pipe(secured, server)

    with _listening(handle) as own:
        yield f"https://127.0.0.1:{own}"


@contextmanager
def connecting(seen: list[str]) -> Iterator[str]:
    """Serve CONNECT on loopback, add each request line to `seen`, and yield the address."""

    def handle(client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(4096)
        seen.append(head.split(b"\r\n")[0].decode())
        host, _, port = seen[-1].split()[1].rpartition(":")
        with client, _connected(host, int(port)) as server:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            _pipe(client, server)

    with _listening(handle) as own:
        yield f"http://127.0.0.1:{own}"


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _builder(name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - _DAY).not_valid_after(now + _DAY)


def _connected(host: str, port: int) -> socket.socket:
    return socket.create_connection((host, port), timeout=20)


@contextmanager
def _listening(handle: Callable[[socket.socket], None]) -> Iterator[int]:
    def serve(client: socket.socket) -> None:
        with suppress(OSError, IndexError):  # a client that trusts nobody, or hangs up
            handle(client)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


def _pipe(one: socket.socket, other: socket.socket) -> None:
    """Send what each of two sockets receives to the other, until one ends."""

    def forward(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError, ValueError):
            while data := source.recv(65536):
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    back = threading.Thread(target=forward, args=(other, one), daemon=True)
    back.start()
    forward(one, other)
    back.join()
