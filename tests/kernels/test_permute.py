"""The permutation's kernels: against NumPy in float64, bit for bit against the emulation, and inside their buffers
whatever the indices hold.

In bf16 the interpreter truncates where it should round; there the values are such that nothing is left to round.
"""

import numpy as np
import pytest
import torch

from tests.kernels.backends import arrays
from xmoe.kernels import emulation, pipeline

if pipeline.HAS_TRITON:
    from xmoe.kernels import permute

SIZES = [(5, 1, 48), (9, 2, 1000), (6, 3, 48), (3, 8, 7168), (5, 17, 48), (2, 2, 7), (1, 40, 16)]
"""(T, k, D): some and all of a tile, several tiles a row, more rows than are on their way at once, odd rows."""
TYPES = [torch.bfloat16, torch.float32]
GARBAGE = [0, -1, 5, 2**31 - 1, -(2**31)]
MARGIN = 4096
"""Elements around a tensor that nobody may write, or use."""


class Problem:
    """Tensors of one size, each amid poison: outputs are full of it, too."""

    def __init__(self, backend, T, k, D, dtype=torch.float32, out_dtype=None, order_dtype=torch.int64):
        self.device, self.T, self.k, self.D, self.M = backend.device, T, k, D, T * k
        self.dtype, self.out_dtype = dtype, out_dtype or dtype
        self.generator = torch.Generator().manual_seed(T * k + D)
        self.whole = not backend.hardware and torch.bfloat16 in (self.dtype, self.out_dtype)
        self.memory: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.order = self.inside(torch.randperm(self.M, generator=self.generator), order_dtype)
        self.tokens, self.place = (self.inside(x, torch.int32) for x in emulation.invert(self.order, k))
        self.x, self.rows, self.dout = (self.draw(n, D) for n in (T, self.M, T))
        self.scores = self.draw(T, k, dtype=torch.float32)
        self.per_row, self.per_token = self.poisoned(self.M, D), self.poisoned(T, D, dtype=self.out_dtype)
        self.per_slot = self.poisoned(T, k, dtype=torch.float32)

    def draw(self, *shape, dtype=None):
        """Normal values; powers of two where bf16 must not round them."""
        values = torch.randn(shape, generator=self.generator)
        if self.whole:
            values = torch.exp2(torch.randint(-1, 2, shape, generator=self.generator)) * values.sign()
        return self.inside(values, dtype or self.dtype)

    def poisoned(self, *shape, dtype=None):
        return self.inside(torch.full(shape, torch.nan), dtype or self.dtype)

    def inside(self, values, dtype):
        """The values in the middle of memory that holds nothing but poison."""
        poison = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        memory = torch.full((values.numel() + 2 * MARGIN,), poison, dtype=dtype, device=self.device)
        memory[MARGIN:-MARGIN] = values.flatten().to(self.device, dtype)
        self.memory.append((memory, memory.clone()))
        return memory[MARGIN:-MARGIN].view(values.shape)

    def check_margins(self):
        for memory, before in self.memory:
            for margin in (slice(None, MARGIN), slice(-MARGIN, None)):
                torch.testing.assert_close(memory[margin], before[margin], rtol=0, atol=0, equal_nan=True)

    def run(self):
        """Every kernel, in an order in which none reads what another wrote."""
        tokens, place = (torch.empty_like(self.place) for _ in range(2))
        permute.invert(self.order, self.k, tokens, place)
        permute.gather(self.x, self.tokens, self.per_row)
        permute.scatter(self.x, self.place, self.per_row)
        permute.gather_sum(self.rows, self.place, self.per_token)
        permute.combine(self.rows, self.scores, self.place, self.per_token)
        permute.combine_backward(self.dout, self.rows, self.scores, self.place, self.per_row, self.per_slot)


def same(got, want):
    """Bit for bit, but for which NaN."""
    assert got.dtype == want.dtype, f"{got.dtype}, not {want.dtype}"
    bits = torch.int16 if got.dtype == torch.bfloat16 else torch.int32
    return all(map(torch.equal, *((x.isnan(), x.nan_to_num(0, torch.inf, -torch.inf).view(bits)) for x in (got, want))))


@pytest.fixture(params=SIZES, ids=lambda size: "x".join(map(str, size)))
def size(request):
    return request.param


@pytest.mark.parametrize("order_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("T", "k"), [(1, 1), (700, 3), (1, 1024), (683, 6)])
def test_invert(backend, T, k, order_dtype):
    p = Problem(backend, T, k, 1, order_dtype=order_dtype)
    tokens, place, alone = (p.inside(torch.full((p.M,), -7), torch.int32) for _ in range(3))
    permute.invert(p.order, k, tokens, place)
    order = p.order.cpu().numpy()
    np.testing.assert_array_equal(tokens.cpu(), order // k)
    np.testing.assert_array_equal(place.cpu(), np.argsort(order))
    assert torch.equal(tokens, p.tokens)
    assert torch.equal(place, p.place)
    permute.invert(p.order, k, None, alone)
    assert torch.equal(alone, place)
    permute.invert(p.order, k, alone, None)
    assert torch.equal(alone, tokens)
    p.check_margins()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gather_and_scatter(backend, size, dtype):
    """Both give the rows of the tokens themselves, poison and signed zeros too."""
    p = Problem(backend, *size, dtype)
    p.x[0, ::3], p.x[-1, 1::3] = torch.nan, -0.0
    expected = p.x[p.tokens.long()]
    permute.gather(p.x, p.tokens, p.per_row)
    assert same(p.per_row, expected)
    permute.scatter(p.x, p.place, other := p.poisoned(p.M, p.D))
    assert same(other, expected)
    for emulated in (emulation.gather(p.x, p.tokens), emulation.scatter(p.x, p.place)):
        assert same(emulated, expected)
    p.check_margins()


def test_gather_of_strided_rows(backend):
    p = Problem(backend, 6, 2, 48)
    for x in (p.draw(6, 64)[:, :48], p.draw(6, 51)[:, 3:], p.x[:1].expand(6, 48)):
        permute.gather(x, p.tokens, p.per_row)
        assert torch.equal(p.per_row, x[p.tokens.long()])


@pytest.mark.parametrize("out_dtype", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sums(backend, size, dtype, out_dtype):
    """The emulation's bits; to float64, k + 1 roundings of the sum of magnitudes and the one to the output."""
    p = Problem(backend, *size, dtype, out_dtype)
    rows = arrays(p.rows).astype(np.float64)[p.place.cpu().numpy()].reshape(p.T, p.k, p.D)
    for scores in (None, p.scores):
        p.per_token.fill_(torch.nan)
        if scores is None:
            permute.gather_sum(p.rows, p.place, p.per_token)
            emulated = emulation.gather_sum(p.rows.float(), p.place, p.k).to(out_dtype)
            terms = rows
        else:
            permute.combine(p.rows, scores, p.place, p.per_token)
            emulated = emulation.combine(p.rows, scores, p.place, out_dtype)
            terms = rows * arrays(scores)[..., None].astype(np.float64)
        assert same(p.per_token, emulated)
        exact = terms.sum(1)
        bound = (p.k + 1) * 2.0**-24 * np.abs(terms).sum(1)
        bound += (2.0**-8 if out_dtype == torch.bfloat16 else 2.0**-24) * (np.abs(exact) + bound)
        assert (np.abs(arrays(p.per_token) - exact) <= bound).all()
    p.check_margins()


def test_sum_of_one_row_is_that_row(backend):
    """Inf, NaN and subnormals too."""
    p = Problem(backend, 9, 1, 48)
    p.rows[0], p.rows[1], p.rows[2], p.rows[3] = 1e-40, 0.0, torch.inf, torch.nan
    permute.gather_sum(p.rows, p.place, p.per_token)
    assert same(p.per_token, p.rows[p.place.long()])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_combine_backward(backend, size, dtype):
    """dx has the emulation's bits. The dots are summed in another order: to float64, a rounding a term at the most."""
    p = Problem(backend, *size, dtype)
    permute.combine_backward(p.dout, p.rows, p.scores, p.place, p.per_row, p.per_slot)
    dx, dscores = emulation.combine_backward(p.dout, p.rows, p.scores, p.place, dtype)
    assert same(p.per_row, dx)
    products = np.repeat(arrays(p.dout), p.k, 0).astype(np.float64) * arrays(p.rows)[p.place.cpu().numpy()]
    bound = (p.D * 2.0**-24 * np.abs(products).sum(1)).reshape(p.T, p.k)
    for got in (p.per_slot, dscores):
        assert (np.abs(arrays(got) - products.sum(1).reshape(p.T, p.k)) <= bound).all()

    alone = p.poisoned(p.M, p.D), p.poisoned(p.T, p.k, dtype=torch.float32)
    permute.combine_backward(p.dout, None, p.scores, p.place, alone[0], None)
    permute.combine_backward(p.dout, p.rows, p.scores, p.place, None, alone[1])
    assert same(alone[0], p.per_row)
    assert same(alone[1], p.per_slot)
    p.check_margins()


def test_gradient_of_another_type(backend):
    """A float32 gradient of a bf16 matrix, as a combination into float32 has it."""
    p = Problem(backend, 4, 2, 48, torch.bfloat16, torch.float32)
    dout = p.draw(4, 48, dtype=torch.float32)
    permute.combine_backward(dout, p.rows, p.scores, p.place, p.per_row, p.per_slot)
    dx, dscores = emulation.combine_backward(dout, p.rows, p.scores, p.place, torch.bfloat16)
    assert same(p.per_row, dx)
    torch.testing.assert_close(p.per_slot, dscores)


@pytest.mark.parametrize("order_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_garbage_stays_inside(backend, dtype, order_dtype):
    """No index reads the poison around an input or writes around an output; every row that is read is one of them."""
    p = Problem(backend, 5, 3, 48, dtype, order_dtype=order_dtype)
    values = torch.tensor(GARBAGE * 3)[torch.randperm(p.M, generator=p.generator)]
    if order_dtype == torch.int64:
        values[::4] = torch.tensor([2**63 - 1, -(2**63), 2**32, -(2**40)])
    p.order.copy_(values)
    tokens, place = (p.inside(torch.full((p.M,), -7), torch.int32) for _ in range(2))
    permute.invert(p.order, p.k, tokens, place)
    assert torch.equal(tokens, emulation.invert(p.order, p.k)[0])
    assert (tokens >= 0).all()
    assert (tokens < p.T).all()
    assert ((place == -7) | (place >= 0) & (place < p.M)).all()
    for index in (p.tokens, p.place):
        index.copy_(values.clamp(-(2**31), 2**31 - 1))
    permute.gather(p.x, p.tokens, p.per_row)
    assert torch.equal(p.per_row, emulation.gather(p.x, p.tokens))
    permute.combine(p.rows, p.scores, p.place, p.per_token)
    assert same(p.per_token, emulation.combine(p.rows, p.scores, p.place))
    assert not p.per_token.isnan().any()
    permute.gather_sum(p.rows, p.place, p.per_token)
    assert not p.per_token.isnan().any()
    permute.scatter(p.x, p.place, p.per_row)
    permute.combine_backward(p.dout, p.rows, p.scores, p.place, p.per_row, p.per_slot)
    assert not p.per_slot.isnan().any()
    p.check_margins()


@pytest.mark.parametrize(("T", "k", "D"), [(0, 1, 48), (0, 4, 48), (3, 2, 0)])
def test_nothing_to_do(backend, T, k, D):
    """No token, or no width: the dots are sums of nothing."""
    p = Problem(backend, T, k, D)
    p.run()
    assert (p.per_slot == 0).all()
    p.check_margins()
    dx, dscores = emulation.combine_backward(p.dout, p.rows, p.scores, p.place, p.dtype)
    assert (dx.shape, dscores.shape) == ((T * k, D), (T, k))
    assert emulation.gather_sum(p.rows, p.place, k).shape == (T, D)
    assert emulation.scatter(p.x, p.place).shape == (T * k, D)


@pytest.mark.gpu
def test_many_elements():
    """Offsets past 2^31 elements: 9 tokens of 2^28 + 16."""
    T, D = 9, 2**28 + 16
    x = torch.zeros(T, D, dtype=torch.bfloat16, device="cuda")
    x[:, -1] = torch.arange(1, T + 1)
    order = torch.arange(T, device="cuda").flip(0)
    tokens, place = (torch.empty(T, dtype=torch.int32, device="cuda") for _ in range(2))
    permute.invert(order, 1, tokens, place)
    out = torch.empty_like(x)
    permute.gather(x, tokens, out)
    assert out[:, -1].tolist() == list(range(T, 0, -1))
    permute.combine(out, torch.full((T, 1), 2.0, device="cuda"), place, x)
    assert x[:, -1].tolist() == list(range(2, 2 * T + 1, 2))
    ones, dscores = torch.ones(T, 1, device="cuda"), torch.empty(T, 1, device="cuda")
    permute.combine_backward(out, None, ones, place, x, None)
    permute.combine_backward(out, x, ones, place, None, dscores)
    assert dscores.flatten().tolist() == [float(t * t) for t in range(T, 0, -1)]
