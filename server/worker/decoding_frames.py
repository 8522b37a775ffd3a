"""How a worker and its decoders talk: frames of a kind, a length and that many bytes, over a pair of sockets.

A pair of sockets rather than shared memory: what crosses is a photo's file and its scaled pictures, a few MB, which
takes some ms; a container's /dev/shm may hold less than one photo; and a peer that has died ends the stream, in either
direction.
"""

import json
import socket
import struct
from dataclasses import asdict, dataclass
from typing import Any, Literal

# To the decoder: decode this file; scale what was decoded last; encode this picture.
# From it: that it is ready, once, before all else; the size of what was decoded; the pixels that were scaled; the file
# that was made; why that is refused; that there was too little memory.
Kind = Literal[b"D", b"S", b"E", b"O", b"H", b"P", b"F", b"R", b"M"]
DECODE: Literal[b"D"] = b"D"
SCALE: Literal[b"S"] = b"S"
ENCODE: Literal[b"E"] = b"E"
HELLO: Literal[b"O"] = b"O"
SIZE: Literal[b"H"] = b"H"
PIXELS: Literal[b"P"] = b"P"
FILE: Literal[b"F"] = b"F"
REFUSED: Literal[b"R"] = b"R"
NO_MEMORY: Literal[b"M"] = b"M"

# Of why something is refused.
MAX_TEXT_BYTES = 64 * 2**10

_HEADER = struct.Struct("!cQ")
_SIZE = struct.Struct("!II")
_LENGTH = struct.Struct("!I")
SIZE_BYTES = _SIZE.size


def send_frame(peer: socket.socket, kind: Kind, content: bytes | memoryview = b"") -> None:
    """Send one frame.

    Raises:
        OSError: the peer has gone, or does not read in time.
    """
    peer.sendall(_HEADER.pack(kind, len(content)))
    peer.sendall(content)


def receive_frame(peer: socket.socket, *, max_bytes: int) -> tuple[bytes, bytearray] | None:
    """Wait for the next frame; returns its kind and content, None where the peer has closed its end.

    Args:
        peer: the other end.
        max_bytes: what a content may have; so that one who lies about a length gets no memory for it.

    Raises:
        OSError: the peer has gone in the middle of a frame, does not send in time, or sends too much.
    """
    header = _receive(peer, _HEADER.size)
    if header is None:
        return None
    kind, length = _HEADER.unpack(header)
    if length > max_bytes:
        raise ConnectionAbortedError(f"the frame has {length} bytes, more than the {max_bytes} that it may have")
    content = _receive(peer, length)
    if content is None:
        raise ConnectionResetError("the frame ends after its header")
    return kind, content


def _receive(peer: socket.socket, length: int) -> bytearray | None:
    content = bytearray(length)
    rest = memoryview(content)
    while rest:
        num_bytes = peer.recv_into(rest)
        if num_bytes == 0 and len(rest) == length:
            return None
        if num_bytes == 0:
            raise ConnectionResetError("the frame is cut off")
        rest = rest[num_bytes:]
    return content


def pack_size(height: int, width: int) -> bytes:
    """Write a size, in pixels, as a frame's content."""
    return _SIZE.pack(height, width)


def unpack_size(content: bytes | bytearray) -> tuple[int, int]:
    """Read (height, width) from a frame's content."""
    height, width = _SIZE.unpack(content)
    return height, width


@dataclass(frozen=True)
class Encoding:
    """How a picture is to be encoded.

    Attributes:
        mode: of its pixels, as Pillow names it.
        height: of the picture as it comes, in pixels.
        width: likewise.
        output_height: of the file that is made; where it is another, the picture is scaled.
        output_width: likewise.
        image_format: a key of `pipelines.photos.CONTENT_TYPES`.
        quality: as `pipelines.photos.encode_photo` has it.
        record: likewise; plain JSON values.
    """

    mode: str
    height: int
    width: int
    output_height: int
    output_width: int
    image_format: Literal["webp", "png", "jpeg"]
    quality: int
    record: dict[str, Any] | None


def pack_picture(encoding: Encoding, pixels: bytes) -> bytes:
    """Write a picture and how it is to be encoded as a frame's content."""
    text = json.dumps(asdict(encoding)).encode()
    return b"".join((_LENGTH.pack(len(text)), text, pixels))


def unpack_picture(content: bytearray) -> tuple[Encoding, memoryview]:
    """Read how a picture is to be encoded, and its pixels, from a frame's content."""
    (length,) = _LENGTH.unpack_from(content)
    start = _LENGTH.size + length
    return Encoding(**json.loads(content[_LENGTH.size : start])), memoryview(content)[start:]
