"""Token files, samples and batches: what was written is what is read, each token once, labels one ahead."""

import pytest
import torch

from baton.configs.errors import UserError
from baton.launcher.training.data import Loader, Samples
from baton.launcher.training.token_files import TokenStream, prepare, read_tokenizer
from helpers import small_run


def corpus(tmp_path, lines=400):
    text = "".join(f'{{"text": "line {i} says {i * i} \u00fc"}}\n' for i in range(lines))
    (tmp_path / "text.jsonl").write_text(text)
    return tmp_path / "text.jsonl"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokens_decode_to_the_text(tmp_path, kind):
    config = small_run(tmp_path, [f"data.tokenizer.kind={kind}"], corpus(tmp_path))
    prepare(config)
    tokenizer = read_tokenizer(config)
    streams = [TokenStream(config.data.folder, split) for split in ("train", "validation")]
    ids = [i for stream in streams for i in stream.read(0, stream.length).tolist()]
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "".join(f"line {i} says {i * i} \u00fc<|endoftext|>" for i in range(400))
    assert abs(streams[1].length / len(ids) - config.data.validation_fraction) < 1e-3


def test_a_prepared_folder_is_used_again_and_guarded(tmp_path):
    text = corpus(tmp_path)
    config = small_run(tmp_path, [], text)
    prepare(config)
    before = {path.name: path.stat().st_mtime_ns for path in config.data.folder.iterdir()}
    prepare(config)
    assert {path.name: path.stat().st_mtime_ns for path in config.data.folder.iterdir()} == before
    with pytest.raises(UserError, match=r"was made with max_bytes = \d+, now 5000: name another data.folder"):
        prepare(small_run(tmp_path, ["data.max_bytes=5000"], text))


def test_a_corpus_that_is_too_short_leaves_nothing(tmp_path):
    config = small_run(tmp_path, [], corpus(tmp_path, lines=3))
    with pytest.raises(UserError, match=r"the train split has \d+ tokens, fewer than one sample \(64 \+ 1\)|validation split"):
        prepare(config)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_damaged_token_files_are_named(tmp_path):
    config = small_run(tmp_path, [], corpus(tmp_path))
    prepare(config)
    binary = config.data.folder / "train.bin"
    binary.write_bytes(binary.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"train.bin: \d+ bytes, its index says \d+"):
        TokenStream(config.data.folder, "train")
    index = config.data.folder / "validation.idx"
    index.write_bytes(index.read_bytes()[:20])
    with pytest.raises(UserError, match="validation.idx: damaged"):
        TokenStream(config.data.folder, "validation")
    index.write_bytes(b"nonsense" * 9)
    with pytest.raises(UserError, match="validation.idx: no index"):
        TokenStream(config.data.folder, "validation")
    binary.unlink()
    with pytest.raises(UserError, match="train.bin: no such file; `baton data prepare` makes it"):
        TokenStream(config.data.folder, "train")


def test_a_tokenizer_too_large_for_the_model(tmp_path):
    text = corpus(tmp_path)
    config = small_run(tmp_path, ["data.tokenizer.kind=bpe"], text)
    prepare(config)
    with pytest.raises(UserError, match="288 tokens, more than model.vocab_size, 280"):
        read_tokenizer(small_run(tmp_path, ["data.tokenizer.kind=bpe", "model.vocab_size=280"], text))


def test_a_vocabulary_without_all_bytes(tmp_path):
    with pytest.raises(UserError, match="model.vocab_size is 100, allowed: at least 257"):
        prepare(small_run(tmp_path, ["model.vocab_size=100"], corpus(tmp_path)))
    assert not (tmp_path / "data").exists()


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "data").mkdir()
    prepare(small_run(tmp_path, [], corpus(tmp_path)))
    assert (tmp_path / "data" / "train.bin").is_file()


def refuse_token(rank, config):
    from baton.parallel.mesh import build_mesh

    loader = Loader(Samples(Numbers(1000), 64, seed=None), config, build_mesh(config.parallel, "cpu"), torch.device("cpu"))
    list(loader.step(0))
    with pytest.raises(UserError, match="numbers has token 384, model.vocab_size is 288"):
        list(loader.step(4))


def test_tokens_beyond_the_vocabulary_are_refused(pool, tmp_path):
    pool.run(1, refuse_token, small_run(tmp_path, [], None))


class Numbers:
    """A stream whose tokens are their places."""

    name = "numbers"

    def __init__(self, length):
        self.length = length

    def read(self, start, count):
        assert start + count <= self.length
        return torch.arange(start, start + count).numpy()


def test_an_epoch_has_every_sample_once_and_the_next_another_order():
    samples = Samples(Numbers(101), 10, seed=3)
    starts = [int(samples[i][0]) for i in range(20)]
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(0, 100, 10))
    assert starts[:10] != starts[10:] != list(range(0, 100, 10))
    assert [int(Samples(Numbers(101), 10, seed=3)[i][0]) for i in range(20)] == starts
    assert [int(Samples(Numbers(101), 10, seed=4)[i][0]) for i in range(20)] != starts


def test_a_stream_shorter_than_a_sample():
    with pytest.raises(UserError, match=r"numbers has 10 tokens, fewer than one sample \(10 \+ 1\)"):
        Samples(Numbers(10), 10, seed=0)


def batches(rank, config, tmp_path):
    from baton.parallel.mesh import build_mesh

    mesh = build_mesh(config.parallel, "cpu")
    loader = Loader(Samples(Numbers(1000), config.data.context, seed=0), config, mesh, torch.device("cpu"))
    batches = (*loader.step(4), *loader.first(3))
    assert all(batch.documents is None for batch in batches)
    return [tuple(t.clone() for t in batch[:3]) for batch in batches]


def test_ranks_share_each_micro_step(pool, tmp_path):
    """dp 2 x cp 2, zigzag: sequences over dp, tokens over cp, labels one ahead, also where a segment ends."""
    config = small_run(tmp_path, ["parallel.cp=2", "batch={sequences: 4, micro_steps: 2}", "model.vocab_size=1024"], None, world=4)
    ranks = pool.run(4, batches, config, tmp_path)
    samples = Samples(Numbers(1000), config.data.context, seed=0)
    for ids, labels, _ in (batch for rank in ranks for batch in rank[:2]):
        assert torch.equal(labels, ids + 1)
    for micro_step in range(2):
        for dp in range(2):
            parts = [ranks[2 * dp + cp][micro_step] for cp in range(2)]
            positions = torch.cat([part[2] for part in parts])
            ids = torch.cat([part[0] for part in parts], 1)[:, positions.argsort()]
            assert torch.equal(ids[0], samples[4 + 2 * micro_step + dp][:-1])
    counted = [int((batch[1] >= 0).sum()) for rank in ranks for batch in rank[2:]]
    assert counted == [32, 32] * 2 + [32, 0] * 2


def test_documents_of_a_sample(tmp_path):
    """Boundaries as the token file has them, counted from the sample's start."""
    config = small_run(tmp_path, [], corpus(tmp_path))
    prepare(config)
    stream, tokenizer = TokenStream(config.data.folder, "train"), read_tokenizer(config)
    end = tokenizer.token_to_id("<|endoftext|>")
    ids = stream.read(0, 300)
    expected = [0, *(i + 1 for i in range(299) if ids[i] == end), 300]
    assert stream.cu_seqlens(0, 300) == expected
    middle = expected[2] - 4
    assert stream.cu_seqlens(middle, 40) == [0, *(b - middle for b in expected if middle < b < middle + 40), 40]


def packed_batches(rank, config):
    from baton.parallel.mesh import build_mesh

    mesh = build_mesh(config.parallel, "cpu")
    samples = Samples(TokenStream(config.data.folder, "train"), config.data.context, seed=0)
    (batch,) = Loader(samples, config, mesh, torch.device("cpu")).step(0)
    return [*batch[:3], batch.documents.positions, batch.documents.cu_seqlens]


def test_packed_batches(pool, tmp_path):
    """Positions restart where a document begins, and no label is another document's first token."""
    config = small_run(tmp_path, ["data.documents=packed", "parallel.cp=2"], corpus(tmp_path), world=2)
    prepare(config)
    ranks = pool.run(2, packed_batches, config)
    order = torch.cat([rank[2] for rank in ranks]).argsort()
    ids, labels, positions = (torch.cat([rank[i] for rank in ranks], 1)[:, order] for i in (0, 1, 3))
    end = read_tokenizer(config).token_to_id("<|endoftext|>")
    starts = torch.cat([torch.ones(2, 1, dtype=torch.bool), ids[:, :-1] == end], 1)
    assert starts.sum() > 4
    for row in range(2):
        where = starts[row].nonzero().flatten().tolist()
        assert ranks[0][4][row] == ranks[1][4][row] == (*where, ids.shape[1])
        for begin, stop in zip(where, [*where[1:], ids.shape[1]], strict=True):
            assert positions[row, begin:stop].tolist() == list(range(stop - begin))
    assert torch.equal(labels == -100, ids == end)
    assert torch.equal(labels[:, :-1][ids[:, :-1] != end], ids[:, 1:][ids[:, :-1] != end])
