from __future__ import annotations

import os
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_gym.evaluation.channel import Channel, ProtocolError

PATIENCE = 300.0
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def pair() -> tuple[Channel, Channel]:
    ours, theirs = Channel.pair()
    return ours, Channel(theirs)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), JSON), st.binary(max_size=5000))
def test_frames_arrive_as_they_were_sent(header: dict[str, object], blob: bytes) -> None:
    a, b = pair()
    with a, b:
        a.send(header, blob)
        a.send({"next": 1})
        assert b.recv(PATIENCE) == (header, blob)
        assert b.recv(PATIENCE) == ({"next": 1}, b"")


def test_blobs_larger_than_the_socket_buffer_arrive() -> None:
    a, b = pair()
    blob = os.urandom(8 << 20)
    with a, b:
        sender = threading.Thread(target=a.send, args=({}, blob))
        sender.start()
        assert b.recv(PATIENCE) == ({}, blob)
        sender.join()


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=16, max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    ours, theirs = Channel.pair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((ProtocolError, EOFError)):
            ours.recv(PATIENCE)


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("<4sIQ", b"KEG1", 2, 1 << 40) + b"{}",
        struct.pack("<4sIQ", b"KEG1", 1 << 30, 0),
        struct.pack("<4sIQ", b"KEG1", 2, 0) + b"[]",
        struct.pack("<4sIQ", b"KEG1", 3, 0) + b"{'a",
        struct.pack("<4sIQ", b"KEG1", 1 << 19, 0) + b"[" * (1 << 19),
    ],
    ids=["huge blob", "huge header", "no object", "no JSON", "deep nesting"],
)
def test_malformed_frames_are_protocol_errors(frame: bytes) -> None:
    ours, theirs = Channel.pair()
    with ours, theirs:
        theirs.setblocking(True)
        writer = threading.Thread(target=theirs.sendall, args=(frame,))
        writer.start()
        with pytest.raises(ProtocolError):
            ours.recv(PATIENCE, limit=1 << 20)
        writer.join()


def test_a_blob_over_the_agreed_limit_is_refused_before_it_is_read() -> None:
    a, b = pair()
    with a, b:
        a.send({}, bytes(1000))
        with pytest.raises(ProtocolError, match="over the limit"):
            b.recv(PATIENCE, limit=999)


def test_silence_times_out_and_a_closed_peer_is_the_end() -> None:
    a, b = pair()
    with b:
        with a:
            with pytest.raises(TimeoutError):
                b.recv(0.01)
            with pytest.raises(TimeoutError):
                b.recv_byte(0.01)
        assert b.recv_byte(PATIENCE) == b""
        with pytest.raises(EOFError):
            b.recv(PATIENCE)
        with pytest.raises(EOFError):
            b.send({}, bytes(1 << 20))


def test_a_peer_that_does_not_read_does_not_block_for_ever() -> None:
    a, b = pair()
    with a, b, pytest.raises(TimeoutError):
        a.send({}, bytes(64 << 20), timeout=0.05)


def test_descriptors_pass_only_where_they_are_accepted() -> None:
    a, b = pair()
    read, write = os.pipe()
    with a, b:
        a.send({"n": 1}, fds=[write])
        assert b.recv(PATIENCE, accept_fds=True)[0] == {"n": 1}
        (passed,) = b.take_fds()
        os.write(passed, b"through")
        assert os.read(read, 7) == b"through"
        a.send({"n": 2}, fds=[write])
        assert b.recv(PATIENCE)[0] == {"n": 2}
        assert b.take_fds() == []
    for fd in (read, write, passed):
        os.close(fd)


@pytest.mark.parametrize(
    "text", [rb'{"log": ["bad \ud83d"], "\ud83d": 1}', rb'{"log": ["bad \uD83D"], "\uDe00": 1}']
)
def test_text_that_came_can_be_written_down(text: bytes) -> None:
    ours, theirs = Channel.pair()
    with ours, theirs:
        theirs.sendall(struct.pack("<4sIQ", b"KEG1", len(text), 0) + text)
        assert ours.recv(PATIENCE)[0] == {"log": ["bad ?"], "?": 1}


def test_text_that_is_no_utf8_is_no_header() -> None:
    text = b'{"log": "\xed\xa0\xbd"}'  # a surrogate, as no encoder writes it
    ours, theirs = Channel.pair()
    with ours, theirs:
        theirs.sendall(struct.pack("<4sIQ", b"KEG1", len(text), 0) + text)
        with pytest.raises(ProtocolError):
            ours.recv(PATIENCE)
