"""The oracle's tensorwise operands and e5m2, against rational arithmetic and ml_dtypes."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from xmoe import oracle

LARGEST = {"e4m3": 448, "e5m2": 57344}
DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def exponent_of(amax: float, element: str) -> int:
    """By the text of the rule: the largest multiplier 2^k with 2^k * max(amax, 1e-12) <= the largest element."""
    x, k = max(Fraction(amax), Fraction(float(np.float32(1e-12)))), 200
    while Fraction(2) ** k * x > LARGEST[element]:
        k -= 1
    return -k


@pytest.mark.parametrize("element", LARGEST)
@pytest.mark.parametrize(
    "amax",
    [0.0, 1e-30, 1e-12, 1.1e-12, 1.0, 1.75, np.nextafter(np.float32(1.75), np.float32(2)), 448, 57344, 6e4, 3e38],
)
def test_scale(amax: float, element: str) -> None:
    amax = float(np.float32(amax))
    x = np.array([[0.5 * amax, -amax, 0.0, amax / 3]], np.float32)
    operand = oracle.quantize_tensor(x, element)
    assert operand.scale.shape == ()
    assert operand.scale.dtype == np.float32
    assert Fraction(float(operand.scale)) == Fraction(2) ** exponent_of(amax, element)
    assert operand.data.dtype == DTYPES[element]
    assert np.abs(operand.data.astype(np.float32)).max() <= LARGEST[element]


@pytest.mark.parametrize("element", LARGEST)
def test_cast_is_that_of_ml_dtypes(element: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 64)) * 2.0 ** rng.integers(-30, 0, (64, 64))).astype(np.float32)
    operand = oracle.quantize_tensor(x, element)
    want = (x.astype(np.float64) / np.float64(operand.scale)).astype(DTYPES[element])
    np.testing.assert_array_equal(operand.data.view(np.uint8), want.view(np.uint8))
    np.testing.assert_array_equal(oracle.dequantize(operand), want.astype(np.float64) * np.float64(operand.scale))


@pytest.mark.parametrize("element", LARGEST)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_poison(element: str, bad: float) -> None:
    x = np.ones((4, 8), np.float32)
    x[2, 3] = bad
    operand = oracle.quantize_tensor(x, element)
    assert np.isnan(operand.scale)
    assert (operand.data.view(np.uint8) == 0x7F).all()
    assert np.isnan(operand.data.astype(np.float32)).all()


def test_noise_on_normal_data() -> None:
    """A mantissa bit less is 6 dB; measured 31.5 and 25.5."""
    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    found = {element: oracle.sqnr(x, oracle.dequantize(oracle.quantize_tensor(x, element))) for element in LARGEST}
    assert found["e4m3"] == pytest.approx(31.5, abs=0.3)
    assert found["e5m2"] == pytest.approx(25.5, abs=0.3)
