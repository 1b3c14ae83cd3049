"""Windows that a thread fills ahead are the same windows; what goes wrong there arrives here, and no thread is left."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from prolu import ActivationStore, ActivationStream, RunConfig, harvest
from prolu.activations.harvesting import Harvest
from prolu.activations.held_windows import reads_ahead
from prolu.activations.options import Source
from prolu.activations.source import open_streams, options_read_ahead
from prolu.cli import main
from prolu.studies import study_in_training
from prolu.studies.groups.dealing import memory_of
from prolu.studies.request import StudyRequest
from support.commands import text_flags
from support.sweeps import HOOK, contents, sweep

WINDOW = 1024


@pytest.fixture(scope="module")
def store(many_passes_lm, tiny_blocks, tmp_path_factory):
    hooks = (HOOK, "blocks.2.hook_resid_post")
    out = tmp_path_factory.mktemp("store") / "s"
    return harvest(many_passes_lm, tiny_blocks, out, hooks=hooks, dtype="fp16", shard_tokens=1000, progress=False)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def streams(lm, blocks, source=None, **options):
    """Two streams, of which the second reads ahead."""
    arguments = {"batch_size": 64, "seed": 3, "window_tokens": WINDOW, "source": source, **options}
    return [ActivationStream(lm, blocks, **arguments, read_ahead=way) for way in ("off", "on")]


def same(a, b):
    return torch.equal(a.acts, b.acts) and torch.equal(a.raw_norm, b.raw_norm)


@pytest.mark.parametrize("source", ["store", "model"])
@pytest.mark.parametrize("train_on_bos", [True, False])
def test_batches_are_the_same_to_the_bit(source, train_on_bos, store, many_passes_lm, tiny_blocks):
    chosen = ActivationStore(store.folder) if source == "store" else Harvest(many_passes_lm, tiny_blocks, (), "fp16")
    plain, ahead = streams(many_passes_lm, tiny_blocks, chosen, train_on_bos=train_on_bos)
    n = plain.batches_per_epoch
    # In order over the end of the text and into the next epoch, then back and forth.
    for i in (*range(40), *range(n - 3, n + 20), 5, 6, 300, 2, 17, 33):
        assert same(plain[i], ahead[i]), i
    # Candidates for resampling are read while the thread reads.
    ahead[0], plain[0]
    fresh = [list(stream.fresh(2000, "resample", 7)) for stream in (plain, ahead)]
    assert len(fresh[0]) > 1
    assert all(same(a, b) for a, b in zip(*fresh, strict=True))
    assert same(plain[20], ahead[20])
    ahead.close()


def test_targets_of_transcoders_are_read_ahead_too(store, many_passes_lm):
    source = ActivationStore(store.folder)
    plain, ahead = streams(many_passes_lm, store.blocks(), source, hook_out="blocks.2.hook_resid_post")
    for i in (0, 15, 16, 17, 40, 3):
        mine, theirs = plain[i], ahead[i]
        assert same(mine, theirs)
        assert torch.equal(mine.target, theirs.target)
    ahead.close()


def test_the_next_window_is_read_while_this_one_is_held_and_no_third(store, many_passes_lm, monkeypatch):
    asked = []
    plain = ActivationStore.at

    def noted(self, hook, chosen):
        asked.append((threading.current_thread() is threading.main_thread(), len(chosen)))
        yield from plain(self, hook, chosen)

    monkeypatch.setattr(ActivationStore, "at", noted)
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    stream = ActivationStream(
        many_passes_lm, store.blocks(), 64, 3, WINDOW, source=ActivationStore(store.folder), read_ahead="on"
    )
    per_window = WINDOW // 64
    for i in range(5 * per_window):
        stream[i]
    stream._reader._reading.wait()
    assert asked == [(True, 32)] + [(False, 32)] * 5
    assert sum(sizes[0] == WINDOW and len(sizes) == 2 for sizes in made) == 2 == stream.n_windows
    stream.close()


class Unreliable(Harvest):
    """A harvest that fails at certain blocks, and can be made to wait."""

    def __init__(self, lm, blocks):
        super().__init__(lm, blocks)
        self.problem = None
        self.go_on = threading.Event()
        self.go_on.set()
        self.n_pieces = 0

    def at(self, hook, chosen):
        for piece in super().at(hook, chosen):
            self.go_on.wait()
            if self.problem is not None and threading.current_thread() is not threading.main_thread():
                raise self.problem
            self.n_pieces += 1
            yield piece


@pytest.mark.parametrize("problem", [OSError("shard vanished"), FloatingPointError("not finite"), MemoryError()])
def test_what_the_thread_raises_is_raised_as_itself_when_the_window_is_asked_for(problem, many_passes_lm, tiny_blocks):
    source = Unreliable(many_passes_lm, tiny_blocks)
    plain, ahead = streams(many_passes_lm, tiny_blocks, source)
    per_window = WINDOW // 64
    source.problem = problem
    for i in range(per_window):
        assert same(ahead[i], plain[i])  # of the window that is here, every batch is to be had
    with pytest.raises(type(problem)) as raised:
        ahead[per_window]
    assert raised.value is problem
    assert same(ahead[3], plain[3])  # the window from before is still there, and was not read again
    source.problem = None
    assert same(ahead[per_window], plain[per_window])
    ahead.close()


def test_closing_stops_the_thread_in_the_midst_of_a_window(many_passes_lm, tiny_blocks):
    source = Unreliable(many_passes_lm, tiny_blocks)
    _, ahead = streams(many_passes_lm, tiny_blocks, source)
    n_before = threading.active_count()
    ahead[0]
    source.go_on.clear()  # whichever piece the thread is at, it goes no further
    threading.Timer(0.2, source.go_on.set).start()
    ahead.close()
    assert ahead._reader._reading is None
    while threading.active_count() > n_before:  # the timer
        time.sleep(0.01)
    plain, _ = streams(many_passes_lm, tiny_blocks)
    assert same(ahead[20], plain[20])
    ahead.close()
    ahead.close()


def test_another_window_than_the_next_is_not_waited_for(many_passes_lm, tiny_blocks):
    source = Unreliable(many_passes_lm, tiny_blocks)
    plain, ahead = streams(many_passes_lm, tiny_blocks, source)
    ahead[0]
    assert same(ahead[100], plain[100])
    per_window = -(-WINDOW // (source.blocks_per_pass * 32))
    ahead._reader._reading.wait()
    n = source.n_pieces
    assert same(ahead[112], plain[112])  # of the next window after that: read by then
    assert source.n_pieces <= n + 2 * per_window  # by `plain`, and the thread's next
    ahead.close()


def test_a_pass_of_the_model_is_alone(many_passes_lm, tiny_blocks):
    """Splices in one thread and harvests in another take turns, or one would see the other's hooks."""
    expected = many_passes_lm.activations(tiny_blocks.train[:64])
    above = many_passes_lm.at("blocks.2.hook_resid_post")
    expected_above = above.activations(tiny_blocks.train[:64])
    loss = many_passes_lm.cross_entropy(tiny_blocks.train[:8], torch.zeros(8, 32, many_passes_lm.d_in))
    problems = []

    def harvesting():
        for _ in range(12):
            if not torch.equal(above.activations(tiny_blocks.train[:64]), expected_above):
                problems.append("harvest")

    thread = threading.Thread(target=harvesting)
    thread.start()
    while thread.is_alive():
        zeros = torch.zeros(8, 32, many_passes_lm.d_in)
        assert torch.equal(many_passes_lm.cross_entropy(tiny_blocks.train[:8], zeros), loss)
        assert torch.equal(many_passes_lm.activations(tiny_blocks.train[:64]), expected)
    assert problems == []


def test_a_sweep_that_reads_ahead_and_is_interrupted_ends_with_the_same_bits(
    store, many_passes_lm, tmp_path, monkeypatch
):
    runs = [RunConfig(d_sae=40, n_tokens=6400, coeff=0.02), RunConfig(d_sae=40, n_tokens=6400, nonlinearity="topk(3)")]

    def stream(way):
        return streams(many_passes_lm, store.blocks(), ActivationStore(store.folder))[way]

    sweep(runs, stream(0), tmp_path / "plain")
    plain_step = study_in_training.RunInTraining.record_step
    n = 0

    def interrupted(self, *arguments):
        nonlocal n
        n += 1
        if n == 75:
            raise KeyboardInterrupt
        return plain_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(study_in_training.RunInTraining, "record_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(runs, stream(1), tmp_path / "ahead", checkpoint_seconds=0.0)
    assert not any("reading" in thread.name for thread in threading.enumerate())
    sweep(runs, stream(1), tmp_path / "ahead")
    assert not any("reading" in thread.name for thread in threading.enumerate())
    assert contents(tmp_path / "ahead") == contents(tmp_path / "plain")


def test_when_windows_are_read_ahead():
    for pays in (True, False):
        assert reads_ahead("auto", pays=pays, n_hooks=1, n_ranks=1) is pays
        assert reads_ahead("on", pays=pays, n_hooks=1, n_ranks=1)
        for n_hooks, n_ranks, words in ((2, 1, "several hooks in one pass"), (1, 2, "not on a mesh")):
            assert not reads_ahead("auto", pays=pays, n_hooks=n_hooks, n_ranks=n_ranks)
            assert not reads_ahead("off", pays=pays, n_hooks=n_hooks, n_ranks=n_ranks)
            with pytest.raises(ValueError, match=f"read_ahead 'on': not .*{words.removeprefix('not ')}"):
                reads_ahead("on", pays=pays, n_hooks=n_hooks, n_ranks=n_ranks)
    with pytest.raises(ValueError, match="read_ahead 'yes': choose one of auto, on, off"):
        reads_ahead("yes", pays=True, n_hooks=1, n_ranks=1)


def test_a_stream_says_whether_it_reads_ahead(store, many_passes_lm, tiny_blocks, tiny_lm_folder, stories_file):
    assert not ActivationStream(many_passes_lm, tiny_blocks, 64).reads_ahead
    assert not ActivationStream(many_passes_lm, store.blocks(), 64, source=store).reads_ahead
    # `meta` stands for a GPU: its tensors have a shape, and no memory.
    assert ActivationStream(many_passes_lm, store.blocks(), 64, source=store, device="meta").reads_ahead
    assert not ActivationStream(many_passes_lm, tiny_blocks, 64, device="meta").reads_ahead
    shared = Harvest(many_passes_lm, tiny_blocks, (HOOK, "blocks.2.hook_resid_post"))
    with pytest.raises(ValueError, match="read_ahead 'on': not for a language model that is read at several hooks"):
        ActivationStream(many_passes_lm, tiny_blocks, 64, source=shared, read_ahead="on")
    options = {"lm": str(tiny_lm_folder), "data": (str(stories_file),), "hook": (HOOK,), "ctx": 32}
    for own, expected in (({}, False), ({"read_ahead": "on"}, True), ({"lm_device": "cpu"}, False)):
        (stream,) = open_streams(Source(**options, **own), 2560, 2560, 64)
        assert stream.reads_ahead is expected
    on_gpu = Source(**options, device="cuda")
    elsewhere = replace(on_gpu, lm_device="cuda:1")
    from_store = replace(on_gpu, store=store.folder, hook=(HOOK, "blocks.2.hook_resid_post"))
    assert [options_read_ahead(some) for some in (on_gpu, elsewhere, from_store)] == [False, True, True]
    assert not options_read_ahead(elsewhere, n_ranks=2)
    assert not options_read_ahead(replace(elsewhere, hook=from_store.hook))
    assert not options_read_ahead(replace(elsewhere, hook_out=from_store.hook[1:]))
    assert not options_read_ahead(Source(store=store.folder))


def test_the_command_line(store, tiny_lm_folder, stories_file, tmp_path, capsys):
    size = {"d_sae": 40, "n_tokens": 1280, "batch_size": 64, "eval_tokens": 320, "latent_pages": "none", "threads": 2}
    two = {"hook": [HOOK, "blocks.2.hook_resid_post"], "read_ahead": "on"}
    assert main(["train", *text_flags(tiny_lm_folder, stories_file, **(size | two), out=tmp_path / "a")]) == 2
    assert "read_ahead 'on': not for a language model that is read at several hooks" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    for way in ("on", "off"):
        flags = text_flags(tiny_lm_folder, stories_file, **size, read_ahead=way, out=tmp_path / way)
        assert main(["train", *flags]) == 0
    on, off = (
        {file: data for file, data in contents(tmp_path / way).items() if not file.startswith("report")}
        for way in ("on", "off")
    )
    assert on == off


def test_memory_counts_the_second_window(store, many_passes_lm, tiny_blocks, capsys):
    """One window more: its rows of d_in numbers, and their norms."""
    found = {}
    for way in ("on", "off"):
        assert main(["sweep", "demo", "--dry-run", "--json", "--read-ahead", way]) == 0
        found[way] = json.loads(capsys.readouterr().out)["estimate"]["memory"]
    assert found["on"] - found["off"] == Source().window_tokens * (128 + 1) * 4
    runs = [RunConfig(d_sae=40, n_tokens=640)]
    sizes = [
        memory_of(StudyRequest(runs, stream, store.folder.parent / "none"), runs)
        for stream in streams(many_passes_lm, tiny_blocks)
    ]
    assert sizes[1] - sizes[0] == WINDOW * (many_passes_lm.d_in + 1) * 4


END_OF_PROCESS = """
import sys, threading, time, prolu
store = prolu.ActivationStore(sys.argv[1])
plain = prolu.ActivationStore.at
def slow(self, hook, chosen):
    for piece in plain(self, hook, chosen):
        time.sleep(0 if threading.current_thread() is threading.main_thread() else 3)
        yield piece
prolu.ActivationStore.at = slow
lm = prolu.LanguageModel(sys.argv[2], {hook!r}, batch_tokens=256)
stream = prolu.ActivationStream(lm, store.blocks(), 64, window_tokens=16_384, source=store, read_ahead="on")
stream[0]
print("done", flush=True)
"""


@pytest.mark.slow  # starts Python anew
def test_a_process_that_ends_does_not_wait_for_the_window(store, tiny_lm_folder):
    command = [sys.executable, "-c", END_OF_PROCESS.format(hook=HOOK), str(store.folder), str(tiny_lm_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "done\n"
        start = time.monotonic()
        assert process.wait(timeout=60) == 0
        assert time.monotonic() - start < 15  # the piece that is being read takes 3 seconds, all 8 take 24
