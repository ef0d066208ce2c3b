"""Messages to a scorer: what crosses a pipe is what was sent, bit for bit."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from implicit_diffusion.scorers.messages import frame, pack, read, unpack


def sent(value):
    """The value as it comes out of a stream with two messages, of which it is the second."""
    arrays = {}
    head = {"value": pack(value, arrays)}
    stream = io.BytesIO(frame({"value": 1}, {}) + frame(head, arrays))
    assert read(stream) == ({"value": 1, "bytes": 0}, {})
    head, arrays = read(stream)
    assert read(stream) is None
    return unpack(head["value"], arrays)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
def test_tensors(dtype, shape):
    x = (10 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    for each in (x, x.transpose(0, -1) if x.ndim else x):  # in memory in another order
        received = sent(each)
        assert received.dtype == dtype and received.shape == each.shape and torch.equal(received, each)
    if x.numel():
        received.zero_()  # a reward may write into what it is given


def test_arrays_and_pictures():
    g = np.random.default_rng(0)
    array = g.standard_normal((4, 3, 2)).T
    assert np.array_equal(sent(array), array) and sent(array).dtype == np.float64
    assert sent(np.float32(0.1)) == np.float32(0.1)
    for shape, mode in (((5, 7, 3), "RGB"), ((5, 7), "L")):
        picture = Image.fromarray(g.integers(0, 256, shape, dtype=np.uint8))
        received = sent([picture])[0]
        assert received.mode == mode and received.tobytes() == picture.tobytes()


NUMBERS = st.floats(allow_nan=False) | st.integers() | st.booleans() | st.none() | st.text()


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        NUMBERS,
        lambda inside: (
            st.lists(inside) | st.tuples(inside, inside) | st.dictionaries(st.text() | st.integers(), inside)
        ),
    )
)
def test_words_numbers_and_what_holds_them(value):
    received = sent(value)
    assert received == value and type(received) is type(value)


class Own:
    pass


@pytest.mark.parametrize("value", [Own(), print, b"bytes", 1j, np.array(["a", "b"]), np.array([Own()], dtype=object)])
def test_anything_else_is_the_name_of_its_type(value):
    received = sent([value])[0]
    if isinstance(value, np.ndarray):
        assert [type(each).__name__ for each in received] == [type(each).__name__ for each in value.tolist()]
    else:
        assert type(received).__name__ == type(value).__name__ and callable(received) == callable(value)


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_message_that_is_cut_off_is_the_end(cut):
    arrays = {}
    message = frame({"value": pack(torch.ones(3), arrays)}, arrays)
    assert read(io.BytesIO(message[:cut])) is None
