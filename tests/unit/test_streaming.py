"""Weights that stay on the host: what is where, when it is copied, and that nobody notices."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from sgm.inference import streaming
from sgm.inference.streaming import (
    InTurn,
    Streamed,
    choose_resident,
    device_bytes,
    weight_bytes,
)

CPU = torch.device("cpu")


class Block(nn.Module):
    """Parameters of several types, a buffer, and a layout; sees itself while it computes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        conv = nn.Conv2d(4, width, 3, padding=1)
        self.wide = conv.to(memory_format=torch.channels_last)
        self.back = nn.Conv2d(width, 4, 1).to(torch.float64)
        self.register_buffer("shift", torch.randn(4, dtype=torch.bfloat16))
        self.watch = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        self.watch()
        out = self.back(self.wide(x).double()).float()
        return out + self.shift.float()[:, None, None]


class Network(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


def make(*widths: int) -> Network:
    torch.manual_seed(0)
    return Network(widths).requires_grad_(False)


X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
SIZES = (8, 3, 20, 5, 8)


def is_in(block: nn.Module, memory: Tensor) -> bool:
    """Whether all tensors of a block lie in a piece of memory."""
    start, stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    return all(start <= t.data_ptr() < stop for t in (*block.parameters(), *block.buffers()))


@pytest.fixture
def copies(monkeypatch) -> list[int]:
    """The blocks that are copied, as it happens."""
    seen: list[int] = []
    fill = streaming._Slot.fill

    def spy(slot, k, host) -> None:
        seen.append(k)
        fill(slot, k, host)

    monkeypatch.setattr(streaming._Slot, "fill", spy)
    return seen


@pytest.mark.parametrize("widths", [SIZES, (8,), (8, 3), ()])
@pytest.mark.parametrize("resident", [0, 2000, 10**9])
def test_results_are_the_same_bit_by_bit(widths, resident):
    """Over several runs, as in sampling. Caught: weights of another block, of another layout, or
    overwritten while they are used."""
    network = make(*widths)
    expected = [network(X), network(2 * X)]
    with Streamed(network.blocks, CPU, resident):
        for _ in range(3):
            assert torch.equal(network(X), expected[0])
        assert torch.equal(network(2 * X), expected[1])
    assert torch.equal(network(X), expected[0])


def test_the_next_block_is_fetched_before_this_one_computes(copies):
    """And the first again after the last. Caught: fetching late, twice, or not around the end."""
    network = make(*SIZES)
    before: list[list[int]] = []
    for block in network.blocks:
        block.watch = lambda: before.append(list(copies))
    with Streamed(network.blocks, CPU):
        network(X)
        network(X)
    order = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    assert before == [order[: k + 2] for k in range(10)]


def test_two_streamed_blocks_stay_where_they_are(copies):
    network = make(*SIZES)
    room = weight_bytes(network.blocks[2]) + weight_bytes(network.blocks[0]) * 2
    with Streamed(network.blocks, CPU, room):
        for _ in range(3):
            network(X)
    assert copies == [0, 1]


def test_where_the_weights_are():
    """The running block's in one of two buffers that stay, all others' on the host.

    Caught: weights left on the device, buffers made anew, resident blocks moved.
    """
    network = make(*SIZES)
    blocks = network.blocks
    room = weight_bytes(blocks[2])
    with Streamed(blocks, CPU, room) as streamed:
        buffers = [slot.memory for slot in streamed._slots]
        largest = max(weight_bytes(block) for i, block in enumerate(blocks) if i != 2)
        assert [buffer.nbytes for buffer in buffers] == [largest, largest]
        stays = blocks[2].wide.weight.data_ptr()
        used: list[list[bool]] = []

        def watch() -> None:
            used.append([any(is_in(block, buffer) for buffer in buffers) for block in blocks])
            assert blocks[2].wide.weight.data_ptr() == stays

        for block in blocks:
            block.watch = watch
        network(X)
        network(X)
        assert used == [[i == k and k != 2 for i in range(5)] for k in range(5)] * 2
        assert not any(is_in(block, buffer) for block in blocks for buffer in buffers)


def test_what_it_takes_on_the_device():
    """The sum told beforehand is the sum of what is there."""
    network = make(*SIZES)
    sizes = [weight_bytes(block) for block in network.blocks]
    for room in (0, 3000, 6000, 10**6):
        with Streamed(network.blocks, CPU, room) as streamed:
            staying = [packed for packed in streamed._all if packed not in streamed._streamed]
            there = sum(slot.memory.nbytes for slot in streamed._slots)
            there += sum(len(packed.host) for packed in staying)
            assert there == device_bytes(sizes, room)
            assert sum(len(packed.host) for packed in staying) <= room
    assert weight_bytes(network) >= sum(t.nbytes for t in network.state_dict().values())


def test_the_largest_blocks_stay():
    assert choose_resident([3, 9, 5, 9], 0) == set()
    assert choose_resident([3, 9, 5, 9], 14) == {1, 2}
    assert choose_resident([3, 9, 5, 9], 8) == {0, 2}
    assert choose_resident([3, 9, 5, 9], 100) == {0, 1, 2, 3}


def test_originals_are_as_before():
    """Keys, values, types, layouts, and the parameters themselves; between runs and after."""
    network, twin = make(*SIZES), make(*SIZES)
    parameters = list(network.parameters())

    def check() -> None:
        assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
        now, then = network.state_dict(), twin.state_dict()
        assert list(now) == list(then)
        for key, value in now.items():
            assert torch.equal(value, then[key])
            assert (value.dtype, value.stride()) == (then[key].dtype, then[key].stride())

    streamed = Streamed(network.blocks, CPU, 2000)
    for _ in range(2):
        check()
        with streamed, torch.inference_mode():
            check()
            network(X)
            check()
        assert not any(b._forward_hooks or b._forward_pre_hooks for b in network.blocks)
    check()


def test_the_device_is_left_empty():
    """Caught: buffers, or copies of what stayed, that something still holds after the end."""
    network = make(*SIZES)
    streamed = Streamed(network.blocks, CPU, 2000)
    for _ in range(2):
        with streamed:
            network(X)
            memory = [weakref.ref(slot.memory.untyped_storage()) for slot in streamed._slots]
            memory += [
                weakref.ref(streamed._all[i].block.shift.untyped_storage())
                for i in streamed._staying
            ]
            assert len(memory) > 2
        assert [each() for each in memory] == [None] * len(memory)


def test_too_little_memory_takes_none(monkeypatch):
    """Caught: blocks left on the device where the buffers do not fit any more."""
    network = make(*SIZES)
    expected = network(X)
    streamed = Streamed(network.blocks, CPU, 2000)
    held = [tensor.data_ptr() for tensor in network.parameters()]

    def refuse(*_) -> None:
        raise MemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(streaming._Slot, "__init__", refuse)
        with pytest.raises(MemoryError, match="full"), streamed:
            pass
    assert [tensor.data_ptr() for tensor in network.parameters()] == held
    with streamed:
        assert torch.equal(network(X), expected)


@pytest.mark.parametrize("failing", range(5))
def test_a_block_that_fails_leaves_all_usable(failing):
    """Caught: weights left on the device, a buffer taken for free while it is read, and the next
    run with the weights that were fetched for what did not come."""
    network = make(*SIZES)
    expected = network(X)

    def fail() -> None:
        raise RuntimeError("stop")

    with Streamed(network.blocks, CPU) as streamed:
        for _ in range(2):
            network.blocks[failing].watch = fail
            with pytest.raises(RuntimeError, match="stop"):
                network(X)
            network.blocks[failing].watch = lambda: None
            assert streamed._running is None
            for slot in streamed._slots:
                assert not any(is_in(block, slot.memory) for block in network.blocks)
            assert torch.equal(network(X), expected)


def test_any_other_order_computes_the_same():
    """Blocks skipped, as where deep features are kept, and called twice."""
    network = make(*SIZES)
    order = [0, 4, 4, 2, 1, 3, 0, 0, 2]
    expected = [network.blocks[k](X) for k in order]
    with Streamed(network.blocks, CPU):
        assert all(
            torch.equal(network.blocks[k](X), y) for k, y in zip(order, expected, strict=True)
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("resident", [0, 40 << 20])
def test_copies_beside_computation(resident):
    """Blocks that compute for long, so that a copy that does not wait destroys them.

    Caught: a computation before its weights are there, a copy into weights that are still read,
    buffers in memory that earlier work still uses.
    """
    device = torch.device("cuda")
    torch.manual_seed(0)
    blocks = [nn.Linear(2048, 2048, bias=k % 2 == 0) for k in range(7)]
    network = nn.Sequential(*blocks).requires_grad_(False)
    x = torch.randn(4096, 2048, device=device)
    expected = nn.Sequential(*(b.to(device) for b in blocks))(x)
    network.cpu()
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        busy = (busy @ busy).clamp(-1, 1)
    del busy
    with Streamed(blocks, device, resident), torch.inference_mode():
        for _ in range(20):
            out = network(x)
            assert blocks[0].weight.device.type == "cpu" or resident
        assert torch.equal(out, expected)


def test_the_hosts_copy_goes_with_its_last_user():
    """Catches a reference cycle, which would keep page-locked memory until garbage is collected."""
    network = make(*SIZES)
    gc.collect()
    gc.disable()
    try:
        streamed = Streamed(list(network.blocks), CPU)
        with streamed:
            network(X)
        packed = [weakref.ref(each) for each in streamed._all]
        del streamed
        assert [each() for each in packed] == [None] * len(SIZES)
    finally:
        gc.enable()


def test_modules_in_turn():
    """Catches: two of them on the device at once, weights left there, hooks that stay."""
    network = make(*SIZES)
    expected = network(X)
    in_turn = InTurn(network.blocks, CPU)
    homes = [block.wide.weight.data_ptr() for block in network.blocks]
    away: list[list[int]] = []

    def watch() -> None:
        places = [block.wide.weight.data_ptr() for block in network.blocks]
        away.append([k for k, home in enumerate(homes) if places[k] != home])

    for block in network.blocks:
        block.watch = watch
    with in_turn:
        assert torch.equal(network(X), expected)
    assert away == [[k] for k in range(len(SIZES))]
    watch()
    assert away.pop() == []
    assert torch.equal(network(X), expected)
    assert away[len(SIZES) :] == [[]] * len(SIZES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be locked here")
def test_memory_that_cannot_be_locked_is_plain(caplog):
    """Catches: a run that ends where the host has memory, but may lock no more of it."""
    memory = streaming.pinned((3, 5), torch.float16)
    assert (memory.shape, memory.dtype, memory.is_pinned()) == ((3, 5), torch.float16, False)
    assert "the host locks no more memory, copies take longer" in caplog.text
