"""Writes into an output who made it and from what, as an XMP packet, and reads that again.

With the weights and the photos the record in the packet is enough to make the same picture again.
"""

import html
import io
import json
import re
import struct
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any
from xml.parsers import expat

from PIL import Image

from pipelines.errors import BadInput

CREATOR_TOOL = f"Restage {version('restage')}"
# IPTC's term for a photo that a generative model has edited.
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
# Files that exist name it: it never changes. XMP joins it with a field's name, so it ends in "#".
NAMESPACE = "urn:uuid:c5d5f351-a98e-449a-a728-6157e1365346#"

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMP = "http://ns.adobe.com/xap/1.0/"
_IPTC_EXTENSION = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
# Also fields of their own, for programs that show XMP but read no JSON.
_SHOWN = ("job_id", "model", "model_version")
# XML 1.0 cannot hold these characters, not even as references.
_NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")
_READ_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def write_packet(record: Mapping[str, Any], max_bytes: int | None = None) -> bytes:
    """Write the XMP packet of an output.

    Args:
        record: plain JSON values: `job_id`, `model`, `model_version`, `optimizations`, `prompt`, `negative_prompt`,
            `params` (as run, with `seed`), `loras`, `input_sha256` (one for each photo).
        max_bytes: what the file format holds. Where that is too little, the longest parts of the record are missing,
            and its `left_out` names them.
    """
    kept = dict(record)
    left_out: list[str] = []
    packet = _packet(kept)
    while max_bytes is not None and len(packet) > max_bytes and kept:
        longest = max(kept, key=lambda name: len(_json_text(kept[name]).encode()))
        del kept[longest]
        left_out.append(longest)
        packet = _packet(kept | {"left_out": left_out})
    return packet


def _packet(record: Mapping[str, Any]) -> bytes:
    shown = {f"restage:{name}": record[name] for name in _SHOWN if name in record}
    seed = {"restage:seed": record["params"]["seed"]} if "seed" in record.get("params", {}) else {}
    plain = {"xmp:CreatorTool": CREATOR_TOOL, "Iptc4xmpExt:DigitalSourceType": DIGITAL_SOURCE_TYPE} | shown | seed
    fields = {name: _text(str(value)) for name, value in plain.items()} | {"restage:record": _json_text(record)}
    lines = "\n".join(f"<{name}>{text}</{name}>" for name, text in fields.items())
    # Marked as read-only: nobody can write into it in place, since nothing is left free for that.
    return f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="{_RDF}">
<rdf:Description rdf:about="" xmlns:xmp="{_XMP}" xmlns:Iptc4xmpExt="{_IPTC_EXTENSION}" xmlns:restage="{NAMESPACE}">
{lines}
</rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>""".encode()


def _json_text(value: object) -> str:
    # As JSON such a character can be written with an escape of JSON's own, and is not lost.
    text = _NOT_IN_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
    return html.escape(text, quote=False)


def _text(text: str) -> str:
    return html.escape(_NOT_IN_XML.sub("\ufffd", text), quote=False)


def read_record(data: bytes) -> dict[str, Any] | None:
    """Return the record that an output holds, or None where there is none.

    Args:
        data: a whole JPEG, PNG or WEBP file.

    Raises:
        BadInput: the file is no such image, or what it says of itself is damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            packet: bytes | None = image.info.get("xmp")
    except _READ_ERRORS as error:
        raise BadInput(f"the file is not a JPEG, PNG or WEBP image, or it is damaged: {error}") from error
    try:
        text = None if packet is None else _record_text(packet.rstrip(b"\0"))
        record = None if text is None else json.loads(text)
    except (expat.ExpatError, LookupError, ValueError, RecursionError) as error:
        raise BadInput(f"the file's XMP is damaged: {error}") from error
    if record is not None and not isinstance(record, dict):
        raise BadInput("the file's XMP is damaged: its record is not a JSON object")
    return record


def _record_text(packet: bytes) -> str | None:
    """Find the record, which another program may have turned from an element into an attribute."""
    wanted = f"{NAMESPACE} record"
    parts: list[str] = []
    is_inside = False

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal is_inside
        is_inside = name == wanted
        if wanted in attributes:
            parts.append(attributes[wanted])

    def end(_name: str) -> None:
        nonlocal is_inside
        is_inside = False

    def add(text: str) -> None:
        if is_inside:
            parts.append(text)

    def refuse(*_declaration: object) -> None:
        # Without a document type there are no entities, so a small packet cannot grow into a huge one.
        raise BadInput("the file's XMP has a document type; XMP has none")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = add
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(packet, True)
    return "".join(parts) if parts else None
