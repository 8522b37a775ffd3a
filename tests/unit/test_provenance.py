import io
import json
import random
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.errors import BadInput
from pipelines.photos import MAX_XMP_BYTES, OutputFormat, decode_photo, encode_photo
from pipelines.provenance import CREATOR_TOOL, DIGITAL_SOURCE_TYPE, NAMESPACE, read_record, write_packet

FORMATS: list[OutputFormat] = ["jpeg", "png", "webp"]
JPEG_LIMIT = MAX_XMP_BYTES["jpeg"]
RECORD: dict[str, Any] = {
    "job_id": "0f" * 16,
    "model": "flux-kontext-dev",
    "model_version": "1",
    "prompt": "A <bright> room & a \"soft\" rug,\r\nas in 'Nº 5' — 居間 🛋️",
    "negative_prompt": None,
    "params": {"seed": 7, "height": 880, "width": 1184, "guidance_scale": 2.5, "aspect_ratio": "match_input"},
    "loras": [],
    "input_sha256": ["ab" * 32],
}
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))


def fields(packet):
    """Read a packet as any XML parser does: name -> text."""
    root = ET.fromstring(packet)  # noqa: S314 (written just now)
    (description,) = root.iterfind(".//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    return {one.tag: one.text or "" for one in description}


def xmp_of(data):
    with Image.open(io.BytesIO(data)) as image:
        return image.info["xmp"]


def jpeg_with(packet):
    content = io.BytesIO()
    NOISE.save(content, "JPEG", xmp=packet)
    return content.getvalue()


@pytest.mark.parametrize("image_format", FORMATS)
def test_output_says_who_made_it(image_format):
    """Each format holds the tool, the standard's mark of a generative edit, and job, model and seed in plain sight."""
    packet = xmp_of(encode_photo(NOISE, image_format, record=RECORD))
    found = fields(packet)
    assert json.loads(found.pop(f"{{{NAMESPACE}}}record")) == RECORD
    assert found == {
        "{http://ns.adobe.com/xap/1.0/}CreatorTool": CREATOR_TOOL,
        "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType": DIGITAL_SOURCE_TYPE,
        f"{{{NAMESPACE}}}job_id": RECORD["job_id"],
        f"{{{NAMESPACE}}}model": RECORD["model"],
        f"{{{NAMESPACE}}}model_version": "1",
        f"{{{NAMESPACE}}}seed": "7",
    }
    assert CREATOR_TOOL.startswith("Restage ")
    assert packet.startswith(b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>')
    assert packet.endswith(b'<?xpacket end="r"?>')


@pytest.mark.parametrize("image_format", FORMATS)
def test_record_is_read_from_the_file(image_format):
    """What was written into a file is read from it, whatever the format."""
    assert read_record(encode_photo(NOISE, image_format, record=RECORD)) == RECORD


@pytest.mark.parametrize("image_format", FORMATS)
def test_pixels_are_those_of_a_file_without_a_record(image_format):
    """The record changes no pixel; of a PNG the pixels are also those that went in."""
    plain = decode_photo(encode_photo(NOISE, image_format), max_pixels=10**6)
    with_record = decode_photo(encode_photo(NOISE, image_format, record=RECORD), max_pixels=10**6)
    assert with_record.tobytes() == plain.tobytes()
    if image_format == "png":
        assert with_record.tobytes() == NOISE.tobytes()


@pytest.mark.parametrize("image_format", FORMATS)
def test_prompt_cannot_turn_the_picture(image_format):
    """A prompt that looks like the mark of an orientation, which some programs seek as plain text, is only a prompt."""
    prompt = 'tiff:Orientation="6" tiff:Orientation>6<'
    again = decode_photo(encode_photo(NOISE, image_format, record=RECORD | {"prompt": prompt}), max_pixels=10**6)
    assert again.size == NOISE.size


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=())), st.text(st.characters(exclude_categories=())))
def test_any_text_makes_whole_xml_and_comes_back(prompt, version):
    """Every character comes back from the record, also those that XML cannot hold; the packet is whole XML."""
    record = RECORD | {"prompt": prompt, "model_version": version}
    packet = write_packet(record)
    assert set(fields(packet)) > {f"{{{NAMESPACE}}}record", f"{{{NAMESPACE}}}model_version"}
    assert read_record(jpeg_with(packet)) == json.loads(json.dumps(record))


@pytest.mark.parametrize("character", ["&", "<", '"', "\\", "\t", "\ufffe", "\ud800", "é", "間", "🛋"])
def test_longest_prompts_that_are_allowed_fit_into_every_format(character):
    """Two prompts of 4,000 characters stay whole in a JPEG, whichever characters those are."""
    record = RECORD | {"prompt": character * 4000, "negative_prompt": character * 4000}
    for image_format in FORMATS:
        assert read_record(encode_photo(NOISE, image_format, record=record)) == record


def test_what_a_jpeg_cannot_hold_is_left_out_and_named():
    """The longest parts go first and only as many as needed; PNG and WEBP hold all of it."""
    record = RECORD | {"prompt": "a" * 100_000, "negative_prompt": "b" * 90_000}
    data = encode_photo(NOISE, "jpeg", record=record)
    short = {name: value for name, value in RECORD.items() if name not in {"prompt", "negative_prompt"}}
    assert read_record(data) == short | {"left_out": ["prompt", "negative_prompt"]}
    assert decode_photo(data, max_pixels=10**6).size == NOISE.size
    one_long = encode_photo(NOISE, "jpeg", record=record | {"prompt": "a room"})
    assert read_record(one_long) == short | {"prompt": "a room", "left_out": ["negative_prompt"]}
    for image_format in ("png", "webp"):
        assert read_record(encode_photo(NOISE, image_format, record=record)) == record


def test_bytes_count_and_not_characters():
    """Which part is longest is measured as it is written."""
    record = RECORD | {"prompt": "間" * 30_000, "negative_prompt": "b" * 60_000}
    assert read_record(encode_photo(NOISE, "jpeg", record=record)) == {
        **{name: value for name, value in record.items() if name != "prompt"},
        "left_out": ["prompt"],
    }


def test_packet_as_long_as_allowed_is_whole():
    """A packet of exactly the allowed length keeps everything; with one byte more something is left out."""
    length = len(write_packet(RECORD | {"prompt": ""}))
    fitting = RECORD | {"prompt": "a" * (JPEG_LIMIT - length)}
    assert len(write_packet(fitting, JPEG_LIMIT)) == JPEG_LIMIT
    assert read_record(encode_photo(NOISE, "jpeg", record=fitting)) == fitting
    longer = RECORD | {"prompt": fitting["prompt"] + "a"}
    assert len(write_packet(longer, JPEG_LIMIT)) < JPEG_LIMIT
    found = read_record(encode_photo(NOISE, "jpeg", record=longer)) or {}
    assert found["left_out"] == ["prompt"]


@pytest.mark.parametrize("name", sorted(RECORD))
def test_no_part_is_too_long_to_be_written(name):
    """Whichever part has grown too long, the file is whole and marked, and says what it lacks."""
    data = encode_photo(NOISE, "jpeg", record=RECORD | {name: {"text": "&" * 100_000}})
    record = read_record(data)
    assert record == {one: value for one, value in RECORD.items() if one != name} | {"left_out": [name]}
    assert DIGITAL_SOURCE_TYPE.encode() in xmp_of(data)
    assert b"&amp;&amp;" not in xmp_of(data)


@pytest.mark.parametrize(
    "packet",
    [None, b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>", write_packet(RECORD).replace(NAMESPACE.encode(), b"urn:other#")],
    ids=["no XMP", "empty XMP", "another's record"],
)
def test_photo_of_another_program_has_no_record(packet):
    """A file that holds no record of ours is no mistake."""
    assert read_record(encode_photo(NOISE, "jpeg") if packet is None else jpeg_with(packet)) is None


def test_record_is_found_where_another_program_wrote_the_xmp_anew():
    """A record that has become an attribute, in a packet padded for changes, is read all the same."""
    packet = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
        <r:Description xmlns:ns1="{NAMESPACE}" ns1:seed="7" ns1:record="{{&quot;seed&quot;: 7}}"/>
        </r:RDF></x:xmpmeta>"""
    assert read_record(jpeg_with(packet.encode() + b" \n\0\0")) == {"seed": 7}


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (b"", None),
        (b"\xff\xfe no XML", "damaged"),
        (write_packet(RECORD)[:-40], "damaged"),
        (write_packet(RECORD).replace(b'"job_id":', b'"job_id"'), "damaged"),
        (b"<?xml version='1.0' encoding='no-such'?><a/>", "damaged"),
        (b"<r:record xmlns:r='%s'>[7]</r:record>" % NAMESPACE.encode(), "not a JSON object"),
        (b"<r:record xmlns:r='%s'>%s</r:record>" % (NAMESPACE.encode(), b"[" * 50_000), "damaged"),
        (b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "document type"),
    ],
    ids=["empty", "no XML", "cut off", "no JSON", "unknown encoding", "a list", "too deep", "entities"],
)
def test_damaged_xmp_is_told(packet, message):
    """XMP that is damaged or hostile is refused with a reason; entities are never expanded."""
    if message is None:
        assert read_record(jpeg_with(packet)) is None
        return
    with pytest.raises(BadInput, match=message):
        read_record(jpeg_with(packet))


@pytest.mark.parametrize("data", [b"", b"no image", encode_photo(NOISE, "png")[:20]], ids=["empty", "text", "cut off"])
def test_file_that_is_no_image_is_refused(data):
    """Only a JPEG, PNG or WEBP is read."""
    with pytest.raises(BadInput, match="not a JPEG, PNG or WEBP"):
        read_record(data)


@settings(max_examples=200, deadline=None)
@given(st.integers(min_value=0, max_value=2**32 - 1))
def test_damaged_bytes_give_a_record_or_bad_input(seed):
    """Whatever a file's bytes have become, reading it gives a record, none, or says that the input is bad."""
    chance = random.Random(seed)
    data = bytearray(encode_photo(NOISE, chance.choice(FORMATS), record=RECORD))
    for _ in range(chance.choice([1, 2, 8])):
        data[chance.randrange(min(len(data), 1600))] = chance.randrange(256)
    try:
        record = read_record(bytes(data))
    except BadInput:
        return
    assert record is None or isinstance(record, dict)
