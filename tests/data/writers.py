"""TFRecord and Arrow files as TensorFlow and the `datasets` library write them, and damaged ones."""

import json
import struct

import google_crc32c


def varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, data: bytes | int) -> bytes:
    """A field of a message in protocol buffers' wire format: bytes, or a varint."""
    if isinstance(data, int):
        return varint(number << 3) + varint(data)
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(*values: bytes | int | float) -> bytes:
    """A tf.train.Feature: a list of bytes, floats or integers."""
    if not values:
        return b""
    if isinstance(values[0], bytes):
        return field(1, b"".join(field(1, value) for value in values))
    if isinstance(values[0], float):
        return field(2, field(1, struct.pack(f"<{len(values)}f", *values)))
    return field(3, field(1, b"".join(map(varint, values))))


def entry(name: str, data: bytes) -> bytes:
    """An entry of the map of features."""
    return field(1, field(1, name.encode()) + field(2, data))


def example(features: dict[str, object]) -> bytes:
    """A tf.train.Example; values are one of a list, lists of them, or features as they are (bytearray)."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in features.items()}
    made = {name: bytes(v[0]) if isinstance(v[0], bytearray) else feature(*v) for name, v in lists.items() if v}
    return field(1, b"".join(entry(name, data) for name, data in made.items()))


def masked(data: bytes) -> bytes:
    value = google_crc32c.value(bytes(data))
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def length(size: int) -> bytes:
    """The head of a record."""
    head = struct.pack("<q", size)
    return head + masked(head)


def record(data: bytes) -> bytes:
    return length(len(data)) + data + masked(data)


def tfrecord(path, images, labels, image="image/encoded", label="image/class/label"):
    """One TFRecord file; other features stand before and after those that count."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"".join(
            record(example({"image/height": 375, image: data, "image/format": b"JPEG", label: number}))
            for data, number in zip(images, labels, strict=True)
        )
    )
    return path


def arrow(path, images, labels, names=None, rows=3, paths=None):
    """One Arrow file with batches of `rows`; labels may be an Arrow array."""
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    paths = paths or [f"{at}.jpg" for at in range(len(images))]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    column = pyarrow.array([{"bytes": data, "path": name} for data, name in zip(images, paths, strict=True)], kind)
    table = pyarrow.table({"image": column, "label": labels})
    if names:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features(names)}})})
    return arrow_table(path, table, rows)


def arrow_table(path, table, rows=3, **options):
    import pyarrow

    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema, **options) as stream:
        stream.write_table(table, max_chunksize=rows)
    return path


def features(names):
    return {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}


def saved(folder, files, names=None, **state):
    """What save_to_disk puts beside its files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in files], **state}))
    if names:
        (folder / "dataset_info.json").write_text(json.dumps({"features": features(names)}))
