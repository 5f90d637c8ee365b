"""The order of data: every window once per epoch, in an order that depends on (seed, i) alone."""

import threading
from collections import Counter
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepseek_v3.data.tokens.index import CorpusOptions
from deepseek_v3.data.tokens.loader import Permutation, TokenLoader, draw_windows, prefetch
from deepseek_v3.data.tokens.shards import ShardWriter, TokenShards
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.errors import DataError


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    """Shards of a few hundred tokens in which token i is 4 + i % 200; the hold-out has 21 tokens."""
    directory: Path = tmp_path_factory.mktemp("shards")
    options = CorpusOptions(source="numbers", text_field="text", holdout=0.1, fim_rate=0.0, seed=0)
    with ShardWriter(directory, Tokenizer.train([], 260), shard_tokens=300) as writer:
        position = 0
        for length in (300, 299, 250, 149):
            writer.add("train", [4 + i % 200 for i in range(position, position + length)], length)
            position += length + 1
        writer.add("holdout", list(range(4, 24)), 20)
        writer.finish(options)
    shards = TokenShards.open(directory)
    assert shards.num_tokens("train") == 1002
    return shards


def corpus(shards: TokenShards) -> list[int]:
    return shards.read("train", 0, shards.num_tokens("train")).tolist()


@given(st.integers(1, 5000), st.integers(0, 2**64))
@example(1, 0)
@example(2, 0)
@example(3, 0)
@example(4, 1)
@example(4095, 0)
@example(4096, 0)
@example(4097, 0)
def test_a_permutation_is_one_to_one(n, seed):
    assert sorted(Permutation(n, seed)(np.arange(n)).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**20, 10**6, 2**20 + 1])
def test_a_large_permutation_is_one_to_one(n):
    assert np.array_equal(np.sort(Permutation(n, (1, 2))(np.arange(n))), np.arange(n))


@given(st.integers(1, 2**62), st.integers(0, 9), st.data())
def test_an_image_is_in_range_and_depends_on_its_index_alone(n, seed, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8, unique=True))
    permutation = Permutation(n, seed)
    values = permutation(indices).tolist()
    assert all(0 <= value < n for value in values)
    assert len(set(values)) == len(values)
    assert values == [int(permutation(index)) for index in indices]


def test_a_permutation_keeps_the_shape_of_its_index():
    permutation = Permutation(100, 0)
    indices = np.arange(24).reshape(2, 3, 4)
    assert permutation(indices).shape == (2, 3, 4)
    assert permutation(7).shape == ()
    assert permutation(np.arange(0)).shape == (0,)
    assert permutation(indices)[1, 2, 3] == permutation(23)


@pytest.mark.parametrize("index", [-1, 10, [0, 11]])
def test_a_permutation_has_no_index_outside_its_range(index):
    with pytest.raises(IndexError, match=r"outside range\(10\)"):
        Permutation(10, 0)(index)


@pytest.mark.parametrize("n", [0, -1, 2**62 + 1])
def test_a_permutation_of_impossible_size_is_refused(n):
    with pytest.raises(ValueError, match="expected 1 to 2"):
        Permutation(n, 0)


def test_the_order_never_changes_between_versions():
    """A change of these numbers would change the data order of resumed runs."""
    assert Permutation(10, 0)(np.arange(10)).tolist() == [2, 9, 4, 8, 1, 3, 6, 0, 5, 7]
    assert Permutation(10**12, (3, 1))([0, 1, 2]).tolist() == [288680850121, 30192203246, 556929793686]


def chi_square(observed: np.ndarray) -> float:
    """The excess of chi-squared over its mean, in standard deviations, for counts that should be uniform."""
    expected = observed.mean()
    freedom = observed.size - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("n", [16, 33])
def test_over_many_seeds_every_index_goes_everywhere_alike(n):
    values = np.stack([Permutation(n, seed)(np.arange(n)) for seed in range(1500)])
    assert chi_square(np.stack([np.bincount(column, minlength=n) for column in values.T])) < 5


def test_over_many_seeds_all_orders_of_four_are_alike():
    orders = Counter(tuple(Permutation(4, seed)(np.arange(4)).tolist()) for seed in range(2000))
    assert len(orders) == 24
    assert chi_square(np.array(list(orders.values()))) < 5


def test_neighbours_are_scattered():
    """The images of neighbouring indices are independent: pairs fill a 16 by 16 grid uniformly."""
    n = 100_003
    places = Permutation(n, 5)(np.arange(n)) * 16 // n
    assert chi_square(np.bincount(places[:-1] * 16 + places[1:], minlength=256)) < 5


@pytest.mark.parametrize("sequence_length", [1, 2, 7, 64, 1000, 1001])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_is_seen_once_in_each_epoch(shards, sequence_length, shuffle):
    loader = TokenLoader(shards, sequence_length=sequence_length, seed=1, shuffle=shuffle)
    tokens = corpus(shards)
    windows = [
        tokens[i : i + sequence_length + 1] for i in range(0, len(tokens) - sequence_length, sequence_length)
    ]
    assert loader.num_samples == len(windows)
    for epoch in range(3):
        samples = loader.batch(epoch * len(windows), len(windows)).tolist()
        assert sorted(samples) == sorted(windows)
        assert shuffle or samples == windows


def test_epochs_and_seeds_have_different_orders(shards):
    orders = {
        tuple(loader.batch(epoch * loader.num_samples, loader.num_samples)[:, 0].tolist())
        for loader in (TokenLoader(shards, sequence_length=9, seed=seed) for seed in range(4))
        for epoch in range(4)
    }
    assert len(orders) == 16


@given(first=st.integers(0, 400), size=st.integers(1, 150))
def test_a_batch_is_its_samples_one_by_one(shards, first, size):
    """Batches may cross epochs; a new epoch starts every 143 samples."""
    loader = TokenLoader(shards, sequence_length=7, seed=2)
    batch = loader.batch(first, size)
    assert batch.shape == (size, 8)
    assert batch.dtype == np.int64
    assert all(np.array_equal(batch[k], loader.sample(first + k)) for k in range(0, size, 10))


def test_a_sample_is_a_pure_function_of_seed_and_number(shards):
    one, other = (TokenLoader(shards, sequence_length=7, seed=2) for _ in range(2))
    other.batch(900, 3)
    assert np.array_equal(one.sample(10**12), other.sample(10**12))


def test_a_batch_may_be_changed_by_the_caller(shards):
    loader = TokenLoader(shards, sequence_length=7)
    before = loader.sample(0).copy()
    loader.sample(0)[:] = -100
    assert np.array_equal(loader.sample(0), before)


def test_the_hold_out_is_read_in_order(shards):
    loader = TokenLoader(shards, "holdout", sequence_length=6, shuffle=False)
    assert loader.num_samples == 3
    assert loader.batch(0, 3).tolist() == [list(range(4, 11)), list(range(10, 17)), list(range(16, 23))]


def test_a_split_shorter_than_a_window_is_refused(shards):
    assert TokenLoader(shards, "holdout", sequence_length=20).num_samples == 1
    with pytest.raises(DataError, match=r"'holdout' holds 21 tokens, expected at least 22.*sequence_length"):
        TokenLoader(shards, "holdout", sequence_length=21)


def token_loader_threads() -> int:
    return sum(thread.name.startswith("token-loader") for thread in threading.enumerate())


def read_from(shards):
    loader = TokenLoader(shards, sequence_length=7)
    return lambda pair: loader.batch(*pair)


def test_prefetched_batches_are_the_batches(shards):
    read = read_from(shards)
    for number in range(6):
        wanted = [(10 * k, 3) for k in range(number)]
        batches = list(prefetch(read, wanted))
        assert len(batches) == number
        assert all(np.array_equal(batch, read(pair)) for batch, pair in zip(batches, wanted, strict=True))
    assert token_loader_threads() == 0


def test_an_endless_run_is_read_only_a_little_ahead(shards):
    asked = []
    pairs = ((asked.append(k) or 3 * k, 3) for k in count())
    batches = prefetch(read_from(shards), pairs)
    assert len(list(islice(batches, 5))) == 5
    assert token_loader_threads() == 1
    batches.close()
    assert token_loader_threads() == 0
    assert asked == list(range(6))


def test_an_error_in_the_thread_is_raised_in_place_of_its_result():
    results = prefetch(lambda number: 6 // number, [2, 0, 1])
    assert next(results) == 3
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert token_loader_threads() == 0


@given(st.integers(1, 10**12), st.integers(1, 2000))
def test_one_window_is_drawn_from_each_stratum(num_windows, count):
    count = min(count, num_windows)
    drawn = draw_windows(num_windows, count).tolist()
    borders = [k * num_windows // count for k in range(count + 1)]
    # The borders of the strata may be rounded either way.
    assert all(low <= window <= high for low, window, high in zip(borders, drawn, borders[1:], strict=False))
    assert drawn == sorted(set(drawn))
    assert 0 <= drawn[0] <= drawn[-1] < num_windows


def test_all_windows_are_drawn_where_no_fewer_are_asked_for():
    assert draw_windows(7, 7).tolist() == draw_windows(7, 30).tolist() == list(range(7))


def test_windows_are_drawn_from_anywhere_in_their_strata():
    places = draw_windows(100_000, 1000) - 100 * np.arange(1000)
    assert chi_square(np.bincount(places // 10, minlength=10)) < 5
