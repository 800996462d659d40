"""Files of every kind that people have: what Pillow writes, and what it reads but does not write."""

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image

from tests.data.conftest import encoded, picture

WIDTH, HEIGHT = 27, 22
PHOTO = picture(5, WIDTH, HEIGHT)
GREY = PHOTO.convert("L")
PIXELS = np.asarray(PHOTO)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


# ---- PNG ------------------------------------------------------------------------------------------------------------


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(colour: int, bits: int, rows: bytes, *before: bytes, size=(WIDTH, HEIGHT)) -> bytes:
    """rows: filtered scanlines. before: chunks between IHDR and IDAT."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    return b"".join((b"\x89PNG\r\n\x1a\n", head, *before, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")))


def unfiltered(samples: np.ndarray) -> bytes:
    """Scanlines without a filter of samples `[H, ...]`, big-endian."""
    return b"".join(b"\0" + row.tobytes() for row in samples)


# ---- JPEG -----------------------------------------------------------------------------------------------------------


def segments(jpeg: bytes) -> list[bytes]:
    """SOI, each segment up to SOS, and the rest."""
    parts, at = [jpeg[:2]], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        parts.append(jpeg[at:end])
        at = end
    return [*parts, jpeg[at:]]


def segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def without(jpeg: bytes, *markers: int) -> bytes:
    return b"".join(part for part in segments(jpeg) if part[1] not in markers or part[:2] == b"\xff\xd8")


def lossless_jpeg(image: Image.Image) -> bytes:
    """SOF3, predictor 1, of a grey or an RGB picture; one Huffman code of 4 bits for each of the 9 categories."""
    samples = np.atleast_3d(np.asarray(image)).astype(int)
    height, width, count = samples.shape
    left = np.empty_like(samples)
    left[:, 1:] = samples[:, :-1]
    left[1:, 0] = samples[:-1, 0]
    left[0, 0] = 128
    bits = []
    for value in (samples - left).reshape(-1).tolist():
        category = abs(value).bit_length()
        bits.append(f"{category:04b}")
        if category:
            bits.append(f"{value if value > 0 else value + (1 << category) - 1:0{category}b}")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    names = [1] if count == 1 else list(b"RGB")
    frame = struct.pack(">BHHB", 8, height, width, count) + b"".join(bytes((name, 0x11, 0)) for name in names)
    table = bytes((0, 0, 0, 0, 9, *(0,) * 12, *range(9)))
    start = bytes((count,)) + b"".join(bytes((name, 0)) for name in names) + bytes((1, 0, 0))
    return b"".join(
        (b"\xff\xd8", segment(0xC3, frame), segment(0xC4, table), segment(0xDA, start), scan, b"\xff\xd9")
    )


# ---- TIFF, WebP and the others --------------------------------------------------------------------------------------


def tiff(width: int, height: int, data: bytes, **tags: int | tuple[int, ...]) -> bytes:
    """Little-endian, one strip, uncompressed; tags by Pillow's names, beside those of every picture."""
    found = {
        "ImageWidth": width, "ImageLength": height, "BitsPerSample": 8, "Compression": 1,
        "PhotometricInterpretation": 1, "StripOffsets": 8, "SamplesPerPixel": 1, "RowsPerStrip": height,
        "StripByteCounts": len(data),
    } | tags  # fmt: skip
    entries, more, end = [], b"", 8 + len(data)
    after = end + 2 + 12 * len(found) + 4
    for name, value in sorted(found.items(), key=lambda item: ExifTags.Base[item[0]]):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            packed, more = struct.pack("<I", after + len(more)), more + packed
        entries.append(struct.pack("<HHI", ExifTags.Base[name], 4, len(values)) + packed)
    return struct.pack("<2sHI", b"II", 42, end) + data + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4) + more


def webp_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        found.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return found


def webp_with(data: bytes, *, odd: bool) -> bytes:
    """A lossless WebP whose VP8L chunk has an odd size, or an even one, with EXIF behind it."""
    (_, bitstream), *_ = webp_chunks(data)
    if len(bitstream) % 2 != odd:
        bitstream += b"\0"
    extended = bytes((0x08, 0, 0, 0)) + struct.pack("<I", WIDTH - 1)[:3] + struct.pack("<I", HEIGHT - 1)[:3]
    parts = (b"VP8X", extended), (b"VP8L", bitstream), (b"EXIF", exif(6).tobytes()[6:])
    body = b"".join(name + struct.pack("<I", len(part)) + part + bytes(len(part) % 2) for name, part in parts)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def pnm(kind: int, samples: np.ndarray, maximum: int | None = None) -> bytes:
    height, width = samples.shape[:2]
    limit = b"" if maximum is None else b"%d\n" % maximum
    head = b"P%d\n# drawn\n%d %d\n" % (kind, width, height) + limit
    if kind < 4:
        return head + b"\n".join(b" ".join(b"%d" % value for value in row.reshape(-1)) for row in samples) + b"\n"
    if maximum is None:
        return head + np.packbits(samples.astype(bool), axis=1).tobytes()
    return head + samples.astype(">u2" if maximum > 255 else np.uint8).tobytes()


def bmp(bits: int, rows: bytes, *, compression: int = 0, masks: bytes = b"", size=(WIDTH, HEIGHT)) -> bytes:
    start = 54 + len(masks)
    info = struct.pack("<IiiHHIIiiII", 40, *size, 1, bits, compression, len(rows), 2835, 2835, 0, 0)
    return struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start) + info + masks + rows


def bmp16(green: int) -> bytes:
    """16 bits a pixel: 5 of red, `green` (5 or 6) of green, 5 of blue."""
    red, middle, blue = (PIXELS[::-1, :, channel].astype(np.uint16) for channel in range(3))
    packed = (red >> 3) << 5 + green | (middle >> 8 - green) << 5 | blue >> 3
    rows = np.zeros((HEIGHT, WIDTH + WIDTH % 2), "<u2")
    rows[:, :WIDTH] = packed
    if green == 5:
        return bmp(16, rows.tobytes())
    return bmp(16, rows.tobytes(), compression=3, masks=struct.pack("<III", 0xF800, 0x07E0, 0x001F))
