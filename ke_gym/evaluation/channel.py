"""Framed messages between the parent and one worker, over a Unix stream socket.

A frame is a JSON header and a blob of bytes. The peer may be hostile: nothing it sends is evaluated,
unpickled or trusted with a length, and everything malformed is a ``ProtocolError``.
"""

from __future__ import annotations

import array
import json
import select
import socket
import struct
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ke_gym.redaction import encodable

HEADER_LIMIT = 1 << 20
BLOB_LIMIT = 1 << 30
MAX_FDS = 32

_PREFIX = struct.Struct("<4sIQ")
_MAGIC = b"KEG1"
_CHUNK = 1 << 20


class ProtocolError(Exception):
    """The peer sent something that is no frame, or more than was agreed on."""


def beginning(header: dict[str, Any], blob_size: int = 0) -> bytes:
    """What a frame begins with; the whole of it, if there is no blob."""
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"a header of {len(text)} bytes; the limit is {HEADER_LIMIT}")
    return _PREFIX.pack(_MAGIC, len(text), blob_size) + text


class Channel:
    """One end of the connection. Not thread-safe: each end has one user at a time."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._fds: list[int] = []

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """A channel for this process and the bare other end, to be passed to another one."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), theirs

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(
        self,
        header: dict[str, Any],
        blob: bytes | memoryview = b"",
        fds: Sequence[int] = (),
        timeout: float | None = 30.0,
    ) -> None:
        """Send one frame, and ``fds`` with it.

        Raises ``EOFError`` when the peer is gone and ``TimeoutError`` when it does not read.
        """
        view = memoryview(beginning(header, len(blob)))
        deadline = None if timeout is None else time.monotonic() + timeout
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        for part in (view, memoryview(blob)):
            while part:
                try:
                    part = part[self.sock.sendmsg([part[:_CHUNK]], ancillary, socket.MSG_NOSIGNAL) :]
                    ancillary = []
                except BlockingIOError:
                    self._wait(select.POLLOUT, deadline)
                except (BrokenPipeError, ConnectionResetError) as error:
                    raise EOFError("the peer is gone") from error

    def recv(
        self, timeout: float | None = None, limit: int = BLOB_LIMIT, accept_fds: bool = False
    ) -> tuple[dict[str, Any], bytes]:
        """The next frame; file descriptors that come with it are kept for ``take_fds`` if accepted.

        Raises ``EOFError`` when the peer is gone, ``TimeoutError`` after ``timeout`` seconds and
        ``ProtocolError`` on a malformed frame or a blob of more than ``limit`` bytes. After the last two
        the channel is of no more use.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        magic, header_size, blob_size = _PREFIX.unpack(self._read(_PREFIX.size, deadline, accept_fds))
        if magic != _MAGIC:
            raise ProtocolError("not a frame")
        if header_size > HEADER_LIMIT or blob_size > limit:
            raise ProtocolError(f"a frame of {header_size} + {blob_size} bytes is over the limit")
        text = self._read(header_size, deadline, accept_fds)
        blob = self._read(blob_size, deadline, accept_fds)
        try:
            header = json.loads(text.decode())
            if b"\\ud" in text or b"\\uD" in text:
                header = _encodable(header)
        except (ValueError, RecursionError) as error:
            raise ProtocolError("the header is no JSON") from error
        if not isinstance(header, dict):
            raise ProtocolError("the header is no JSON object")
        return header, bytes(blob)

    def take_fds(self) -> list[int]:
        """The file descriptors received so far; the caller owns them now."""
        fds, self._fds = self._fds, []
        return fds

    def recv_byte(self, timeout: float) -> bytes:
        """One byte, the fast path of a timed call; ``b""`` when the peer is gone."""
        self.wait(timeout)
        try:
            return self.sock.recv(1)
        except ConnectionResetError:
            return b""

    def wait(self, timeout: float) -> None:
        """Return as soon as something has come that nobody has read yet, or the peer is gone; raises ``TimeoutError``."""
        if not self._poll.poll(timeout * 1e3):
            raise TimeoutError(f"no answer within {timeout:g} s")

    def readable(self) -> bool:
        """Whether something has come that nobody has read yet."""
        return bool(self._poll.poll(0))

    def _read(self, size: int, deadline: float | None, accept_fds: bool) -> bytearray:
        data = bytearray()
        while len(data) < size:
            try:
                # What is read is bounded by what arrived, not by what the peer announced.
                want = min(size - len(data), _CHUNK)
                if accept_fds:
                    part, fds, _, _ = socket.recv_fds(self.sock, want, MAX_FDS)
                    self._fds += fds
                else:
                    part = self.sock.recv(want)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except ConnectionResetError:
                part = b""
            if not part:
                raise EOFError("the peer is gone")
            data += part
        return data

    def _wait(self, event: int, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self.sock.fileno(), event)
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1e3
        if not poll.poll(left):
            raise TimeoutError("the peer did not answer in time")

    def close(self) -> None:
        for fd in self.take_fds():
            socket.close(fd)
        self.sock.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _encodable(value: Any) -> Any:
    """The same JSON value with strings that can be written down."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {encodable(key): _encodable(item) for key, item in value.items()}
    return value
