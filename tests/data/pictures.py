"""Files of every kind that people have: what Pillow writes, and what it reads but does not write."""

import struct
import zlib

import numpy as np
from PIL import ExifTags, Image

from tests.data.conftest import encoded, picture

SIDE = 23
PHOTO = picture(5, SIDE, SIDE)
GREY, TRANSPARENT = PHOTO.convert("L"), PHOTO.copy()
PIXELS = np.asarray(PHOTO)
TRANSPARENT.putalpha(picture(6, SIDE, SIDE).convert("L"))
FRAMES = [PHOTO, PHOTO.rotate(90), PHOTO.rotate(180)]
# 16 bits: every other level from black to white.
DEEP = (np.arange(SIDE * SIDE) * 65535 // (SIDE * SIDE - 1)).astype(np.uint16).reshape(SIDE, SIDE)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


# ---- PNG ------------------------------------------------------------------------------------------------------------


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(colour: int, bits: int, rows: bytes, *before: bytes, size=(SIDE, SIDE)) -> bytes:
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


def of_first_scans(jpeg: bytes, count: int) -> bytes:
    """A progressive JPEG that ends after so many of its scans."""
    at = 0
    for _ in range(count + 1):
        at = jpeg.index(b"\xff\xda", at) + 2
    return jpeg[: at - 2] + b"\xff\xd9"


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
    return b"".join((b"\xff\xd8", segment(0xC3, frame), segment(0xC4, table), segment(0xDA, start), scan, b"\xff\xd9"))


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
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return struct.pack("<2sHI", b"II", 42, end) + data + directory + more


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
    extended = bytes((0x08, 0, 0, 0)) + 2 * struct.pack("<I", SIDE - 1)[:3]
    parts = (b"VP8X", extended), (b"VP8L", bitstream), (b"EXIF", exif(6).tobytes()[6:])
    body = b"".join(name + struct.pack("<I", len(part)) + part + bytes(len(part) % 2) for name, part in parts)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def iptc(inside: bytes) -> bytes:
    """An IPTC file that holds another one."""

    def field(record: int, dataset: int, data: bytes) -> bytes:
        return struct.pack(">BBBBBI", 0x1C, record, dataset, 0x84, 0, len(data)) + data

    side = struct.pack(">I", SIDE)
    head = field(3, 60, b"\1\0") + field(3, 20, side) + field(3, 30, side) + field(3, 120, b"\5")
    return head + field(8, 10, inside) + bytes(5)


def pnm(kind: int, samples: np.ndarray, maximum: int | None = None) -> bytes:
    height, width = samples.shape[:2]
    limit = b"" if maximum is None else b"%d\n" % maximum
    head = b"P%d\n# drawn\n%d %d\n" % (kind, width, height) + limit
    if kind < 4:
        return head + b"\n".join(b" ".join(b"%d" % value for value in row.reshape(-1)) for row in samples) + b"\n"
    if maximum is None:
        return head + np.packbits(samples.astype(bool), axis=1).tobytes()
    return head + samples.astype(">u2" if maximum > 255 else np.uint8).tobytes()


def bmp(bits: int, rows: bytes, *, compression: int = 0, masks: bytes = b"", size=(SIDE, SIDE)) -> bytes:
    start = 54 + len(masks)
    info = struct.pack("<IiiHHIIiiII", 40, *size, 1, bits, compression, len(rows), 2835, 2835, 0, 0)
    return struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start) + info + masks + rows


def bmp16(green: int) -> bytes:
    """16 bits a pixel: 5 of red, `green` (5 or 6) of green, 5 of blue."""
    red, middle, blue = (PIXELS[::-1, :, channel].astype(np.uint16) for channel in range(3))
    packed = (red >> 3) << 5 + green | (middle >> 8 - green) << 5 | blue >> 3
    rows = np.zeros((SIDE, SIDE + SIDE % 2), "<u2")
    rows[:, :SIDE] = packed
    if green == 5:
        return bmp(16, rows.tobytes())
    return bmp(16, rows.tobytes(), compression=3, masks=struct.pack("<III", 0xF800, 0x07E0, 0x001F))


# ---- the matrix -----------------------------------------------------------------------------------------------------


def packed_bits(samples: np.ndarray, bits: int) -> bytes:
    """Rows of samples `[H, W]` of `bits` bits each, every row padded to a byte."""
    single = samples[..., None] >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(single.astype(bool).reshape(len(samples), -1), axis=1).tobytes()


def ordinary() -> dict[str, bytes]:
    """What DALI decodes."""
    jpeg, bits = encoded(PHOTO, quality=90), np.asarray(GREY) >> 4
    palette = chunk(b"PLTE", np.random.default_rng(1).integers(0, 256, 48, dtype=np.uint8).tobytes())
    rows, grey = unfiltered(PIXELS), unfiltered(np.asarray(GREY))
    nibbles = unfiltered(np.frombuffer(packed_bits(bits, 4), np.uint8).reshape(SIDE, -1))
    head, *rest = segments(jpeg)
    # (1 << 24) + 3 bytes, in chunks that libpng reads.
    large = 2 * [chunk(b"noPe", bytes(7 << 20))]
    large.append(chunk(b"noPe", bytes((1 << 24) + 3 - 12 - len(png(2, 8, rows, *large)))))
    return {
        "jpeg": jpeg,
        "jpeg grey": encoded(GREY),
        "jpeg progressive": encoded(PHOTO, progressive=True),
        "jpeg 4:4:4": encoded(PHOTO, subsampling=0),
        "jpeg 4:2:2": encoded(PHOTO, subsampling=1),
        "jpeg 4:1:1": encoded(PHOTO, subsampling="4:1:1"),
        "jpeg with restarts": encoded(PHOTO, restart_marker_blocks=1),
        "jpeg in RGB": encoded(PHOTO, keep_rgb=True),
        "jpeg in RGB by its names alone": without(encoded(PHOTO, keep_rgb=True), 0xE0, 0xEE),
        "jpeg turned by EXIF": encoded(PHOTO, exif=exif(6)),
        "jpeg with filled markers": head + rest[0] + b"\xff\xff" + b"".join(rest[1:]),
        "jpeg with a short tail": jpeg + bytes(40),
        "jpeg cut, with an end": jpeg[:-60] + b"\xff\xd9",
        **{f"png {mode}": encoded(PHOTO.convert(mode), "PNG") for mode in ("1", "L", "P", "RGB")},
        "png with alpha": encoded(TRANSPARENT, "PNG"),
        "png grey with alpha": encoded(TRANSPARENT.convert("LA"), "PNG"),
        "png of 4 bits": png(0, 4, nibbles),
        "png of 16 colours": png(3, 4, nibbles, palette, chunk(b"tRNS", b"\0\x80")),
        "png of fewer colours than it uses": png(3, 4, nibbles, chunk(b"PLTE", palette[8:38])),
        "png grey, one transparent": png(0, 8, grey, chunk(b"tRNS", b"\0\x64")),
        "png with gamma": png(2, 8, rows, chunk(b"gAMA", struct.pack(">I", 100_000))),
        "png with few significant bits": png(2, 8, rows, chunk(b"sBIT", b"\5\5\5")),
        "png turned by EXIF": encoded(PHOTO, "PNG", exif=exif(6)),
        "png with a tail": encoded(PHOTO, "PNG") + bytes(40),
        "png of a size that float32 lacks": png(2, 8, rows, *large),
        "webp": encoded(PHOTO, "WEBP"),
        "webp lossless": encoded(PHOTO, "WEBP", lossless=True),
        "webp with alpha": encoded(TRANSPARENT, "WEBP"),
        "webp lossless with alpha": encoded(TRANSPARENT, "WEBP", lossless=True, exact=True),
        "webp with XMP and a profile": encoded(PHOTO, "WEBP", xmp=b"xmp" * 9, icc_profile=b"icc" * 9),
        "webp lossless, even, with EXIF": webp_with(encoded(PHOTO, "WEBP", lossless=True), odd=False),
        "webp with a tail": encoded(PHOTO, "WEBP") + bytes(100),
    }


def odd() -> dict[str, bytes]:
    """What Pillow decodes, because its header says that DALI would not do so, or otherwise."""
    jpeg, cmyk, plain = encoded(PHOTO, quality=90), encoded(PHOTO.convert("CMYK")), encoded(PHOTO, "PNG")
    head, first, *rest = segments(jpeg)
    scans = encoded(PHOTO, progressive=True)
    last = scans.rindex(b"\xff\xda")
    deep_rows = np.stack((DEEP, DEEP[::-1], DEEP[:, ::-1], DEEP.T), axis=-1).astype(">u2")
    grey, limits = np.asarray(GREY).astype(int), (1, 15, 100, 254)
    return {
        "jpeg CMYK": cmyk,
        "jpeg CMYK without Adobe's marker": without(cmyk, 0xEE),
        "jpeg YCCK": b"".join(part[:-1] + b"\2" if part[1] == 0xEE else part for part in segments(cmyk)),
        "jpeg progressive, of its first scan": of_first_scans(scans, 1),
        "jpeg progressive, without its last scan": of_first_scans(scans, 9),
        "jpeg progressive, with an end before its last scan": of_first_scans(scans, 9)
        + scans[last:],
        "jpeg progressive, with a comment over its last scan's header": scans[:last] + b"\xff\xfe\0\x0c" + scans[last:],
        "jpeg progressive, grey, of two scans": of_first_scans(encoded(GREY, progressive=True), 2),
        "jpeg lossless": lossless_jpeg(PHOTO),
        "jpeg lossless grey": lossless_jpeg(GREY),
        "jpeg with stray bytes": head + first + b"\0\x12\x34" + b"".join(rest),
        "jpeg with stray bytes at its start": head + b"\xff\0" + first + b"".join(rest),
        "jpeg with stray bytes before its scan": head + first + b"".join(rest[:-1]) + b"\0\x12\x34" + rest[-1],
        "jpeg with a long tail": jpeg + bytes(500),
        "png of 16-bit colours": png(2, 16, unfiltered(deep_rows[..., :3])),
        "png of 16-bit colours with alpha": png(6, 16, unfiltered(deep_rows)),
        "png of 16-bit grey with alpha": png(4, 16, unfiltered(deep_rows[..., :2])),
        "png without IEND": plain[:-12],
        "png with an unknown chunk": plain[:33] + chunk(b"ABCD", b"") + plain[33:],
        "png of an animation": encoded(PHOTO, "PNG", save_all=True, append_images=FRAMES[1:]),
        "png beside an animation": encoded(PHOTO, "PNG", save_all=True, append_images=FRAMES[1:], default_image=True),
        "png with Apple's chunk": plain[:8] + chunk(b"CgBI", bytes(4)) + plain[8:],
        "webp lossless, odd, with EXIF": webp_with(encoded(PHOTO, "WEBP", lossless=True), odd=True),
        "webp of an animation": encoded(PHOTO, "WEBP", save_all=True, append_images=FRAMES[1:]),
        "gif": encoded(PHOTO, "GIF"),
        "gif of an animation": encoded(PHOTO, "GIF", save_all=True, append_images=FRAMES[1:]),
        "gif with a transparent colour": encoded(PHOTO.convert("P"), "GIF", transparency=3),
        "avif": encoded(PHOTO, "AVIF"),
        "avif with alpha": encoded(TRANSPARENT, "AVIF"),
        "jpeg 2000": encoded(PHOTO, "JPEG2000"),
        "jpeg 2000 stream": encoded(PHOTO, "JPEG2000", no_jp2=True, irreversible=True),
        "jpeg 2000 grey with alpha": encoded(TRANSPARENT.convert("LA"), "JPEG2000"),
        "jpeg 2000 CMYK": encoded(PHOTO.convert("CMYK"), "JPEG2000"),
        "jpeg 2000 YCbCr": encoded(PHOTO.convert("YCbCr"), "JPEG2000"),
        **{
            f"tiff {kind}": encoded(PHOTO, "TIFF", compression=kind)
            for kind in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd")
        },
        **{
            f"tiff {kind}": encoded(PHOTO.convert("1"), "TIFF", compression=kind)
            for kind in ("group3", "group4", "tiff_ccitt")
        },
        **{f"tiff {mode}": encoded(PHOTO.convert(mode), "TIFF") for mode in ("1", "L", "P", "CMYK", "YCbCr", "I", "F")},
        "tiff with alpha": encoded(TRANSPARENT, "TIFF"),
        "tiff grey with alpha": encoded(TRANSPARENT.convert("LA"), "TIFF"),
        **{f"tiff turned to {turn}": encoded(PHOTO, "TIFF", tiffinfo={274: turn}) for turn in range(1, 9)},
        "tiff of signed bytes": tiff(SIDE, SIDE, GREY.tobytes(), SampleFormat=2),
        "tiff of 4 bits": tiff(SIDE, SIDE, packed_bits(grey >> 4, 4), BitsPerSample=4),
        "tiff of 2 bits": tiff(SIDE, SIDE, packed_bits(grey >> 6, 2), BitsPerSample=2),
        "tiff with 0 for white": tiff(SIDE, SIDE, GREY.tobytes(), PhotometricInterpretation=0),
        "tiff of 16-bit colours": tiff(
            SIDE, SIDE, deep_rows[..., :3].astype("<u2").tobytes(), BitsPerSample=(16, 16, 16), SamplesPerPixel=3,
            PhotometricInterpretation=2,
        ),
        "tiff of signed 16 bits": tiff(SIDE, SIDE, DEEP.tobytes(), BitsPerSample=16, SampleFormat=2),
        **{f"bmp {mode}": encoded(PHOTO.convert(mode), "BMP") for mode in ("1", "L", "P", "RGB")},
        "bmp 555": bmp16(5),
        "bmp 565": bmp16(6),
        "pbm": pnm(4, grey > 127),
        "pbm in ASCII": pnm(1, grey // 128),
        **{f"pgm up to {limit}": pnm(5, grey * limit // 255, limit) for limit in (*limits, 255)},
        **{f"pgm in ASCII up to {limit}": pnm(2, grey * limit // 255, limit) for limit in (*limits, 255)},
        **{f"ppm up to {limit}": pnm(6, PIXELS.astype(int) * limit // 255, limit) for limit in (*limits, 255, 1023)},
        **{f"ppm in ASCII up to {limit}": pnm(3, PIXELS.astype(int) * limit // 255, limit) for limit in (100, 65535)},
        "pfm": encoded(GREY.convert("F"), "PPM"),
        "ico": encoded(PHOTO, "ICO", sizes=[PHOTO.size]),
        **{kind.lower(): encoded(PHOTO, kind) for kind in ("TGA", "PCX", "SGI", "QOI", "DDS", "DIB")},
    }  # fmt: skip


def deep() -> dict[str, tuple[bytes, np.ndarray]]:
    """Greys of more than 8 bits, which Pillow clips, and what they are meant to be: white is the largest level."""
    whole, twelve, ten = (
        np.repeat(np.rint(levels * 255)[..., None], 3, axis=2).astype(np.uint8)
        for levels in (DEEP / 65535, (DEEP >> 4) / 4095, (DEEP >> 6) / 1023)
    )
    file = png(0, 16, unfiltered(DEEP.astype(">u2")))
    return {
        "16-bit png": (file, whole),
        "16-bit png without IEND": (file[:-12], whole),
        "16-bit tiff": (encoded(Image.fromarray(DEEP), "TIFF"), whole),
        "16-bit tiff with 0 for white": (
            tiff(SIDE, SIDE, (65535 - DEEP).tobytes(), BitsPerSample=16, PhotometricInterpretation=0),
            whole,
        ),
        "12-bit tiff": (tiff(SIDE, SIDE, packed_bits(DEEP >> 4, 12), BitsPerSample=12), twelve),
        "16-bit pgm": (pnm(5, DEEP, 65535), whole),
        "16-bit pgm in ASCII": (pnm(2, DEEP, 65535), whole),
        "10-bit pgm": (pnm(5, DEEP >> 6, 1023), ten),
        "16-bit jpeg 2000": (encoded(Image.fromarray(DEEP), "JPEG2000"), whole),
    }  # fmt: skip


def damaged() -> dict[str, bytes]:
    """What a header does not tell: DALI refuses these files, and Pillow reads them."""
    plain = encoded(PHOTO, "PNG")
    data = plain.index(b"IDAT") + 4
    stream = plain[data:-16]
    return {
        "png with a bad CRC": plain[:-16] + bytes(4) + plain[-12:],
        "png without its checksum": plain[: data - 8] + chunk(b"IDAT", stream[:-4]) + plain[-12:],
        "png with rows that are missing": png(2, 8, unfiltered(PIXELS[:-3])),
    }


def forgiven() -> dict[str, bytes]:
    """What DALI reads, and Pillow refuses."""
    head, *rest = segments(encoded(GREY, quality=95))
    scan = rest[-1]
    comment = b"Comment\0\0" + zlib.compress(bytes(3 << 20))
    return {
        "png with a large comment": png(2, 8, unfiltered(PIXELS), chunk(b"zTXt", comment)),
        "png with a comment of another CRC": png(2, 8, unfiltered(PIXELS), chunk(b"tEXt", b"a\0b")[:-4] + bytes(4)),
        "jpeg with a marker in its scan": head + b"".join(rest[:-1]) + scan[:-90] + b"\xff\xc8" + scan[-90:],
    }


def refused() -> dict[str, bytes]:
    """What nobody reads."""
    photo = {kind: encoded(PHOTO, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000")}
    return {
        "nothing": b"",
        "text": b"this is no picture\n" * 3,
        "html": b"<!DOCTYPE html><html>404</html>",
        "zeros": bytes(400),
        "eps": encoded(PHOTO, "EPS"),
        "jpeg in iptc": iptc(photo["JPEG"]),
        "jpeg 2000 in icns": encoded(PHOTO.resize((32, 32)), "ICNS"),
        "blp": encoded(GREY.convert("P"), "BLP"),
        "jpeg without an end": photo["JPEG"][:-2],
        **{f"{kind} cut": data[: len(data) // 2] for kind, data in photo.items() if kind not in ("BMP", "JPEG2000")},
        "bmp cut": photo["BMP"][:-50],
        "jpeg 2000 cut": photo["JPEG2000"][:120],
        "png with bad data": photo["PNG"][:80] + bytes(60) + photo["PNG"][140:],
        "jpeg without tables": without(photo["JPEG"], 0xDB),
        "ppm with a level too high": pnm(3, PIXELS, 20),
        "png of too many pixels": png(2, 8, b"", size=(20_000, 20_000)),
        "gif of too many pixels": photo["GIF"][:6] + struct.pack("<HH", 65_535, 65_535) + photo["GIF"][10:],
        "bmp of too many pixels": bmp(24, b"", size=(20_000, 20_000)),
    }
