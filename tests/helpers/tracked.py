"""What trackers have written, read back: TensorBoard's event files by its own reader, and offline runs of W&B."""

import json
import struct
from collections import defaultdict

BLOCK, HEADER = 2**15, 7  # bytes, of LevelDB's log format


def of_tensorboard(folder):
    """Steps and values by tag, and steps of pictures by tag, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}


def of_wandb(folder):
    """Likewise of all offline runs in a folder, in the order in which `wandb sync` sends them; and their ids."""
    from wandb.proto.wandb_internal_pb2 import Record

    scalars, pictures, ids = defaultdict(list), defaultdict(list), set()
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        for payload in _records(file.read_bytes()):
            record = Record.FromString(payload)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            items = record.history.item if record.HasField("history") else ()
            row = {tuple(item.nested_key) or (item.key,): json.loads(item.value_json) for item in items}
            for (name, *parts), value in row.items():
                if parts == ["_type"]:
                    pictures[name].append(row[("_step",)])
                elif not parts and not name.startswith("_"):
                    scalars[name].append((row[("_step",)], value))
    return dict(scalars), dict(pictures), ids


def _records(data):
    """The records of a file, whole or cut at its end; one may lie in several blocks."""
    place, parts = HEADER, []  # the file has a header of the same length
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        parts.append(data[place + HEADER : place + HEADER + length])
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []
