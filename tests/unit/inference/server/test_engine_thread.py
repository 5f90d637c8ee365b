"""The engine's thread under random orders: whatever comes, every group ends and every page comes back."""

import asyncio
import random

import pytest
import torch

from deepseek_v3.inference.engine.generation_request import Request
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.inference.server.engine_thread import EngineThread, RequestGroup
from deepseek_v3.inference.server.server_metrics import ServerMetrics
from deepseek_v3.mla.kv_compression import PagePool
from helpers.servers import PATIENCE, chat_tokenizer, tiny_model


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(tiny_model(), chat_tokenizer(), batch_size=4)


def new_thread(generator: Generator, num_pages: int = 6, reads_late: bool = False) -> tuple[EngineThread, PagePool]:
    """A thread over a small cache; `reads_late`: the engine reads tokens one step late, as on a GPU."""
    pool = generator.kv_cache.new_pool(num_pages)
    engine = generator.new_engine(pool)
    engine._reads_late = reads_late
    return EngineThread(engine, ServerMetrics()), pool


def new_requests(generator: Generator, number: int, tokens: int = 5, prompt: int = 3) -> list[Request]:
    ids = list(range(5, 5 + prompt))
    sampling = SamplingConfig(0, max_new_tokens=tokens)
    return [generator.request(ids, ids, index, sampling) for index in range(number)]


@pytest.mark.parametrize("reads_late", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_random_orders_leave_nothing_behind(generator: Generator, seed: int, reads_late: bool) -> None:
    chance = random.Random(seed)

    async def run() -> tuple[list[RequestGroup], EngineThread, PagePool]:
        thread, pool = new_thread(generator, reads_late=reads_late)
        thread.start(on_failure=lambda: None)
        groups, waiting = [], []
        for _ in range(25):
            made = new_requests(generator, chance.randint(1, 3), chance.randint(1, 40), chance.randint(1, 100))
            groups.append(RequestGroup(made))
            thread.submit(groups[-1])
            waiting.append(asyncio.ensure_future(groups[-1].finish()))
            if chance.random() < 0.5:
                thread.cancel(chance.choice(groups))
            if chance.random() < 0.5:
                await asyncio.sleep(0)
        if seed % 2:
            await asyncio.gather(*waiting)
        await thread.stop()
        await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE)
        return groups, thread, pool

    groups, thread, pool = asyncio.run(run())
    assert pool.num_free == pool.num_pages
    assert not thread._followed
    [whole] = generator.continue_tokens([list(range(5, 8))], SamplingConfig(0, max_new_tokens=40))
    for group in groups:
        for request, progress in zip(group.requests, group.progress, strict=True):
            assert progress.num_tokens == len(request.generated)
            assert progress.num_characters <= len(request.text.shown)
            assert progress.finish_reason == request.finish_reason
            assert progress.finish_reason in ("length", "end_of_text", "cancelled")
            if request.num_prompt == 3:
                assert tuple(request.generated) == whole.tokens[: progress.num_tokens]


def test_what_can_never_fit_fails_alone(generator: Generator) -> None:
    async def run() -> tuple[RequestGroup, RequestGroup]:
        thread, pool = new_thread(generator, num_pages=2)
        thread.start(on_failure=lambda: None)
        groups = RequestGroup(new_requests(generator, 1, tokens=400)), RequestGroup(new_requests(generator, 2))
        for group in groups:
            thread.submit(group)
        await asyncio.gather(*(group.finish() for group in groups))
        await thread.stop()
        assert pool.num_free == 2
        return groups

    failed, other = asyncio.run(run())
    assert failed.progress[0].finish_reason == "failed"
    assert "found room for 128" in str(failed.requests[0].error)
    assert [each.finish_reason for each in other.progress] == ["length"] * 2


def test_after_a_failure_every_request_fails(generator: Generator) -> None:
    async def run() -> None:
        thread, pool = new_thread(generator)
        failed = asyncio.Event()

        def break_down() -> list[Request]:
            raise torch.OutOfMemoryError("CUDA out of memory")

        thread._engine.step = break_down  # type: ignore[method-assign]
        thread.start(on_failure=failed.set)
        groups = [RequestGroup(new_requests(generator, 2)) for _ in range(3)]
        for group in groups[:2]:
            thread.submit(group)
        await asyncio.wait_for(failed.wait(), PATIENCE)
        thread.submit(groups[2])
        await asyncio.gather(*(group.finish() for group in groups))
        await thread.stop()
        assert thread.failure == "CUDA out of memory"
        assert {each.finish_reason for group in groups for each in group.progress} == {"failed"}
        assert pool.num_free == pool.num_pages

    asyncio.run(run())
