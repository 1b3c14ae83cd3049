"""A sweep with W&B (offline) and TensorBoard, run by a Python that has both: LM TEXT OUT KILL_AT.

At step KILL_AT, 0 for never, the process dies as by SIGKILL; the only checkpoint is that of step 10. Afterwards what
the two hold is printed as JSON: {"tensorboard": {run_id: {name: [[step, value], ...]}}, "wandb": [{"id", ...}, ...]}.
"""

import json
import os
import struct
import sys
from pathlib import Path

import torch

import prolu
from prolu.studies.checkpoints import Clock

torch.set_num_threads(1)  # as many as the tests beside which this is compared, see conftest.py

BLOCK, HEADER = 32_768, 7


def main(lm, text, out, kill_at):
    lm = prolu.LanguageModel(lm, "blocks.1.hook_resid_pre")
    blocks = prolu.load_blocks(text, lm.tokenizer, ctx=32)
    stream = prolu.ActivationStream(lm, blocks, batch_size=64, seed=3, window_tokens=2048)
    asked = {"step": 0}
    plain = prolu.ActivationStream.__getitem__

    def read(self, index):
        asked["step"] = index + 1
        if index == kill_at > 0:
            flush(out)
            os._exit(9)
        return plain(self, index)

    prolu.ActivationStream.__getitem__ = read
    Clock.is_due = property(lambda self: asked["step"] == 10)
    runs = prolu.grid(
        prolu.RunConfig(d_sae=32, n_tokens=64 * 30, coeff=0.02, lr=3e-3), nonlinearity=["relu", "prolu_ste"]
    )
    prolu.run_sweep(runs, stream, out, eval_tokens=320, trackers=["wandb", "tensorboard"], progress=False)
    print(json.dumps({"tensorboard": tensorboard(out), "wandb": wandb(out)}))


def flush(out):
    """Waits until TensorBoard's thread has written what it was told, so that the kill leaves something to forget, and
    until W&B's process has begun its files; what it has written in them by then is not ours to say.
    """
    import time

    for _ in range(200):
        told = sum(f.stat().st_size for f in Path(out).glob("tensorboard/*/*"))
        if told > 20_000 and len(list(Path(out).glob("wandb/offline-run-*/*.wandb"))) == 2:
            return
        time.sleep(0.05)


def tensorboard(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in sorted(Path(out).glob("tensorboard/*/")):
        events = EventAccumulator(str(folder)).Reload()
        found[folder.name] = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return found


def wandb(out):
    """Runs by folder, the oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(Path(out, "wandb").glob("offline-run-*/*.wandb")):
        run = {"id": file.stem.removeprefix("run-"), "history": [], "summary": {}, "config": {}}
        for data in records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                assert record.run.run_id == run["id"]
                run |= {"group": record.run.run_group, "name": record.run.display_name}
                run["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                items = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
                run["history"].append({"step": record.history.step.num} | items)
            elif record.HasField("summary"):
                run["summary"] |= {
                    (i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.summary.update
                }
            elif record.HasField("exit"):
                run["exit"] = record.exit.exit_code
        found.append(run)
    return found


def records(data):
    """Of a LevelDB log, behind seven bytes of W&B's own; a torn end is left out."""
    at, parts = 7, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += HEADER
        parts += data[at : at + length]
        at += length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
