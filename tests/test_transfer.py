"""Batches come to a device while the one before is computed: their order, their streams, and what goes wrong."""

from __future__ import annotations

import threading

import pytest
import torch
from fake_cuda import DEVICE, CudaTensor, FakeCuda

from skillfast.models.batches import fed_batches
from skillfast.transfer import AHEAD, AT_ONCE, fed, moved

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: tests/ops/test_gpu.py")
LARGE = AT_ONCE // 4 + 1  # float32 values


def batches(n, drawn):
    for i in range(n):
        drawn.append(i)
        yield torch.full((LARGE,), float(i)), torch.tensor([i])


@pytest.fixture
def fake():
    with FakeCuda() as mode:
        yield mode


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("skillfast-fed")]


def test_batches_are_copied_ahead_and_waited_for_by_their_stream_alone(fake):
    drawn, seen = [], []
    for batch in fed_batches(batches(5, drawn), DEVICE):
        assert isinstance(batch.inputs, CudaTensor)
        assert not isinstance(batch.labels, CudaTensor)
        seen.append((batch.inputs + 0, int(batch.labels)))
        assert len(drawn) <= min(5, len(seen) + AHEAD)
    assert [label for _, label in seen] == drawn == list(range(5))
    assert not fake.waits
    assert [float(x.cpu().mean()) for x, _ in seen] == drawn
    assert not readers()


def test_a_copy_that_no_stream_waits_for_is_noticed(fake):
    """The control of the test above."""
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        x = moved(torch.ones(3), DEVICE)
    with pytest.raises(RuntimeError, match="before it was there"):
        x + 1
    torch.cuda.current_stream().wait_event(other.record_event())
    with pytest.raises(RuntimeError, match="memory does not wait"):
        x + 1
    x.record_stream(torch.cuda.current_stream())
    torch.testing.assert_close((x + 1).cpu(), torch.full((3,), 2.0))
    assert fake.waits == {"copy to the host": 1}
    torch.ones(LARGE).to(DEVICE, non_blocking=True)
    assert fake.waits["copy of pageable memory"] == 1


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_what_reading_raises_is_raised_where_batches_are_used(fake, device):
    def broken():
        yield torch.ones(2), torch.tensor([0, 1])
        raise OSError("a file that is gone")

    seen = fed_batches(broken(), torch.device(device))
    next(seen)
    with pytest.raises(OSError, match="a file that is gone"):
        next(seen)
    assert not readers()


def test_the_reading_thread_ends_with_the_loop(fake):
    drawn = []
    for _ in (loop := fed_batches(batches(50, drawn), DEVICE)):
        assert len(readers()) == 1
        break
    loop.close()
    assert not readers()
    assert len(drawn) <= 1 + AHEAD


def test_what_a_loader_makes_on_the_device_stays_on_its_stream(fake):
    """And memory that is expanded has a pinned copy."""
    made = [torch.ones(2).to(DEVICE), torch.ones(1).expand(LARGE)]
    found = list(fed(made, DEVICE, lambda x: x * 2, lambda x, change: change(x)))
    assert [float(x.sum().cpu()) for x in found] == [4, 2 * LARGE]
    assert moved(made[1], DEVICE).shape == (LARGE,)
    assert not fake.waits["copy of pageable memory"]


def test_masks_stay_on_the_host_too(fake):
    """A tracer plans by them."""
    given = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    (batch,) = fed_batches([{**given, "labels": torch.tensor([0, 1])}], DEVICE)
    assert isinstance(batch.inputs["attention_mask"], CudaTensor)
    torch.testing.assert_close(batch.mask, given["attention_mask"])
    torch.testing.assert_close(batch.taken(slice(1)).mask, given["attention_mask"][:1])
    assert isinstance(batch.to(DEVICE).mask, CudaTensor)
