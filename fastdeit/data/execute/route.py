"""Who decodes a file, and how large its picture is: read from the header, in microseconds.

DALI decodes ordinary JPEG, PNG and WebP files, and makes Pillow's pixels of them, bit for bit. Pillow decodes all
others: the formats that DALI does not know, those in which it knows only some kinds of files (BMP, JPEG 2000, PNM,
TIFF), and JPEG, PNG and WebP files that DALI 2.4 refuses or reads in another way. What those have in common stands in
their headers. A file that is damaged where no header tells goes to DALI, and to Pillow where DALI refuses it (`dali`).

Bytes that are no picture are refused here: DALI 2.2 to 2.4 ends in a segmentation fault on some of them.
"""

import io
import re
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastdeit.data.sources.source import BadImage, Source, unreadable

DAMAGED = "the header is cut off or damaged"
MAX_PIXELS = 2 * 89_478_485
"""The largest picture that is decoded: where Pillow's check for decompression bombs raises."""
MAX_MEMORY = 2 << 30
"""The most memory in bytes that decoding one picture may take, besides that of its file."""
# What it takes a pixel, by the format as Pillow calls it: as measured, rounded up (tests/faults/test_bombs.py).
_BYTES = {"AVIF": 18, "FITS": 64, "JPEG": 16, "JPEG2000": 32, "MPO": 16, "PPM": 24, "TIFF": 16, "WEBP": 20}
_BYTES_OF_OTHERS = 12
# Pillow hands an EPS file to Ghostscript, which runs it as a program. An IPTC file holds a file of any format, such as
# EPS. BLP and ICNS files hold pictures of other sizes than their headers say.
_REFUSED = ("BLP", "EPS", "ICNS", "IPTC")
_LARGER = "is refused, because it may hold a picture that is larger than its header says; convert it to PNG"
_ELSEWHERE = "which Pillow does not read; convert it to JPEG or PNG"
_UNREAD = {
    rb"%!PS|\xc5\xd0\xd3\xc6": "EPS is refused, because Pillow would run it as a program; convert it to PNG",
    rb"\x1c[\x01-\x09\xf0]": "IPTC is refused, because it may hold any file, such as an EPS; convert it to PNG",
    rb"icns": f"ICNS {_LARGER}",
    rb"BLP[12]": f"BLP {_LARGER}",
    rb"(?s)....ftyp(hei|hev|mif1|msf1)": f"HEIF, {_ELSEWHERE}",
    rb"\xff\x0a|\0\0\0\x0cJXL ": f"JPEG XL, {_ELSEWHERE}",
    rb"version https://git-lfs": "a pointer of Git LFS instead of the file; get that by `git lfs pull`",
}
"""What files are that are not decoded, by how they start, and the way out."""
_JPEG_TAIL, _PNG_TAIL = 64, 64
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
_PROGRESSIVE = 0xC2
_SMOOTHED = frozenset(range(1, 10))
"""Coefficients of a block that libjpeg-turbo guesses from the blocks around it where no scan gives them exactly."""
_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_START_OF_SCAN, _END, _RESTART = 0xDA, 0xD9, 0xD0
# Frames, Huffman and quantisation tables, the restart interval, applications, comments.
_SEGMENTS = _FRAMES | {0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}
_WEBP_ANIMATED, _WEBP_EXIF = 0x02, 0x08


@dataclass(frozen=True, slots=True)
class Route:
    """How a file is decoded.

    format: as Pillow calls it. width, height: of the decoded picture, in pixels. why: empty where DALI decodes the
    file; where Pillow does, the kind of file for which it has to.
    """

    format: str
    width: int
    height: int
    why: str = ""

    @property
    def by_pillow(self) -> bool:
        """Whether Pillow decodes the file, and not DALI."""
        return bool(self.why)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A file and how it is decoded. data: its bytes, uint8 `[n]`."""

    data: NDArray[np.uint8]
    route: Route

    def by_pillow(self, why: str) -> "Encoded":
        """The same file, decoded by Pillow for the reason `why`."""
        return replace(self, route=replace(self.route, why=why))


def routed(data: NDArray[np.uint8]) -> Encoded:
    """The file with these bytes, uint8 `[n]`; BadImage as `route` raises it."""
    return Encoded(data, route(data))


def file_of(source: Source, index: int) -> Encoded | str:
    """The file of a sample, or the reason why it cannot be used. MachineError where no file is at fault."""
    try:
        return routed(source.read(index))
    except BadImage as error:
        return str(error)
    except (OSError, MemoryError) as error:
        return unreadable(error, source.path(index))


def route(data: NDArray[np.uint8]) -> Route:
    """How the file with these bytes, uint8 `[n]`, is decoded.

    BadImage if Pillow knows no such format, if the header is damaged, or if the picture has more than `MAX_PIXELS` or
    takes more than `MAX_MEMORY`: a header of a few bytes may ask for gigabytes. That the rest of the file is sound is
    for the decoder to find out.
    """
    view = memoryview(data)
    if len(view) == 0:
        raise BadImage("the file is empty")
    found = _jpeg(view) or _png(view) or _webp(view) or _other(view, "")
    if found.width < 1 or found.height < 1:
        raise BadImage(f"the header is damaged: it says {found.width} x {found.height} pixels")
    if found.width * found.height > MAX_PIXELS:
        raise BadImage(f"the header says {found.width} x {found.height} pixels; more than {MAX_PIXELS} are not decoded")
    most = MAX_MEMORY // _BYTES.get(found.format, _BYTES_OF_OTHERS)
    if found.width * found.height > most:
        raise BadImage(
            f"the header says {found.width} x {found.height} pixels, which would take more than "
            f"{MAX_MEMORY / (1 << 30):g} GiB to decode; make the picture smaller: of {found.format}, {most} are decoded"
        )
    return found


def _other(view: memoryview, why: str) -> Route:
    """The route of a file that Pillow decodes, which also has to recognise it."""
    try:
        with Image.open(io.BytesIO(view), formats=formats()) as image:
            return Route(image.format, *image.size, why or image.format)
    except UnidentifiedImageError:
        raise BadImage(DAMAGED if why else _unread(bytes(view[:32]))) from None
    except Exception as error:
        # Whatever the parser of a format trips over: besides OSError, ValueError and SyntaxError also struct.error,
        # EOFError, TypeError, KeyError, zlib.error, MemoryError.
        raise BadImage(f"the header cannot be read: {error or type(error).__name__}") from error


def _unread(start: bytes) -> str:
    """What a file is that Pillow may not decode, or does not know."""
    known = next((text for pattern, text in _UNREAD.items() if re.match(pattern, start)), None)
    return known or f"no format that Pillow reads: it starts with {start[:16]!r}"


@cache
def formats() -> tuple[str, ...]:
    """The formats that Pillow may decode: all that it knows, without those that run programs or hide other files."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED)


def _jpeg(view: memoryview) -> Route | None:
    """None for a file that is no JPEG. DALI needs segment after segment up to the first scan, and of the kinds of JPEG
    those with Huffman codes, 8 bits, and one or three colours. Without an end marker, Pillow says what is missing."""
    if view[:2] != b"\xff\xd8":
        return None
    at, end, frame, marker = 2, len(view), 0, 0
    while at + 4 <= end and view[at] == 0xFF and marker != _START_OF_SCAN:
        marker = view[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _SEGMENTS:
            frame = at if marker in _FRAMES else frame
            at += 2 + (view[at + 2] << 8 | view[at + 3])
        else:
            break
    if marker != _START_OF_SCAN or not frame or frame + 10 > end:
        return _other(view, "JPEG with bytes between its segments")
    kind, bits, colours = view[frame + 1], view[frame + 4], view[frame + 9]
    if kind not in _HUFFMAN_FRAMES:
        return _other(view, "JPEG with arithmetic codes or without loss")
    if bits != 8 or colours not in (1, 3):
        return _other(view, f"JPEG of {colours} colours with {bits} bits")
    if b"\xff\xd9" not in bytes(view[-_JPEG_TAIL:]):
        return _other(view, "JPEG without an end")
    if kind == _PROGRESSIVE and not _has_all_scans(view[at:], view[frame + 10 : frame + 10 + 3 * colours : 3]):
        return _other(view, "progressive JPEG without all of its scans")
    height, width = view[frame + 5] << 8 | view[frame + 6], view[frame + 7] << 8 | view[frame + 8]
    return Route("JPEG", width, height)


def _has_all_scans(scans: memoryview, colours: memoryview) -> bool:
    """Whether the scans of a progressive JPEG give the `_SMOOTHED` coefficients of all `colours` to the last bit.

    Where they do not, libjpeg-turbo smooths over the blocks around a block, and at the border of a box it knows fewer
    of them: the pixels of a box would differ from those of the picture.
    """
    exact = {colour: set[int]() for colour in colours}
    data = np.frombuffer(scans, np.uint8)
    marks = np.flatnonzero(data[:-1] == 0xFF)  # in a fifth of the time that bytes.find takes
    kinds = data[marks + 1]
    segments = marks[(kinds >= 0xC0) & (kinds < 0xFF) & (kinds & 0xF8 != _RESTART)]
    behind = 0  # the last segment: what in it looks like a marker is none
    for at in segments[segments < len(data) - 4].tolist():
        if at < behind:
            continue
        if scans[at + 1] == _END:
            break  # of the picture, wherever damage has put it
        behind = at + 2 + (scans[at + 2] << 8 | scans[at + 3])
        count = scans[at + 4]
        spectrum = scans[at + 5 + 2 * count : at + 8 + 2 * count]
        if scans[at + 1] == _START_OF_SCAN and len(spectrum) == 3 and spectrum[2] & 15 == 0:
            given = _SMOOTHED.intersection(range(spectrum[0], spectrum[1] + 1))
            for colour in scans[at + 5 : at + 5 + 2 * count : 2]:
                exact.get(colour, set()).update(given)
    return all(known == _SMOOTHED for known in exact.values())


def _png(view: memoryview) -> Route | None:
    """None for a file that is no PNG. DALI reads colours of 16 bits to the nearest of 8, where Pillow takes the upper
    8; of an animation whose first picture is not the file's own it takes that one."""
    if view[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    if view[8:16] != b"\x00\x00\x00\rIHDR" or len(view) < 33:
        return _other(view, "PNG with bytes before its header")
    if b"IEND" not in bytes(view[-_PNG_TAIL:]):
        return _other(view, "PNG without an end")
    if view[24] == 16 and view[25] != 0:
        return _other(view, "PNG with colours of 16 bits")
    at, end, name = 33, len(view), b""
    while at + 8 <= end and (name := bytes(view[at + 4 : at + 8])) != b"IDAT":
        if name == b"acTL":
            return _other(view, "PNG with an animation")
        if name[:1].isupper() and name != b"PLTE":
            return _other(view, "PNG with an unknown chunk")
        at += 12 + int.from_bytes(view[at : at + 4], "big")
    return Route("PNG", int.from_bytes(view[16:20], "big"), int.from_bytes(view[20:24], "big"))


def _webp(view: memoryview) -> Route | None:
    """None for a file that is no WebP. Where DALI looks for EXIF, it forgets the byte that follows a chunk of odd size,
    and refuses the file; animations are not all alike either."""
    if view[:4] != b"RIFF" or view[8:12] != b"WEBP" or len(view) < 30:
        return None
    kind = bytes(view[12:16])
    if int.from_bytes(view[4:8], "little") + 8 > len(view):
        return _other(view, "WebP without an end")
    if kind == b"VP8 " and view[23:26] == b"\x9d\x01\x2a":
        return Route("WEBP", (view[26] | view[27] << 8) & 0x3FFF, (view[28] | view[29] << 8) & 0x3FFF)
    if kind == b"VP8L" and view[20] == 0x2F:
        sides = int.from_bytes(view[21:25], "little")
        return Route("WEBP", (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1)
    if kind != b"VP8X":
        return _other(view, "WebP with another beginning")
    if view[20] & _WEBP_ANIMATED:
        return _other(view, "WebP with an animation")
    at = 12
    while view[20] & _WEBP_EXIF and at + 8 <= len(view) and view[at : at + 4] != b"EXIF":
        size = int.from_bytes(view[at + 4 : at + 8], "little")
        if size % 2:
            return _other(view, "WebP with EXIF behind a chunk of odd size")
        at += 8 + size
    return Route("WEBP", 1 + int.from_bytes(view[24:27], "little"), 1 + int.from_bytes(view[27:30], "little"))
