"""Headers, and the one error that every rank makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from pymoe.comm.header import Code, Header, Kind, silence, text_of, verdict


def call(**changes):
    values = {"layer": 0, "K": 64, "topk": 2} | changes.pop("values", {})
    names = {"dtype": "float32", "pair": "A with B"} | changes.pop("names", {})
    return Header(Kind.CALL, values=values, names=names, **changes)


def table(*headers):
    return np.stack([header.encode() for header in headers])


def test_agreement():
    assert verdict("call", table(call(tokens=3), call(tokens=5), call()), call()) is None


@pytest.mark.parametrize("odd, field, text", [
    (call(values={"K": 32}), "K", "K must be the same on all ranks; got 64 on ranks 0, 2; 32 on rank 1."),
    (call(values={"topk": 1}), "topk", "2 on ranks 0, 2; 1 on rank 1"),
    (call(names={"dtype": "bfloat16"}), "dtype", "float32 on ranks 0, 2; bfloat16 on rank 1"),
    (call(names={"pair": "A with C"}), "pair", "A with B on ranks 0, 2; A with C on rank 1"),
    (Header(Kind.CLOSE), "call", "a call on ranks 0, 2; close on rank 1"),
    (call(code=Code.RAISED, text="ShapeError: x"), None, "rank 1 must complete the call; got ShapeError: x."),
    (call(code=Code.LEFT), None, "rank 1 must stay until the layer is closed"),
])  # fmt: skip
def test_every_rank_names_the_odd_one(odd, field, text):
    headers = table(call(), odd, call())
    errors = [verdict("MoELayer", headers, own) for own in (call(), call(names={"dtype": "other"}))]
    assert len({str(error) for error in errors}) == 1
    assert (errors[0].rank, errors[0].field) == (1, field) and text in str(errors[0])


def test_errors_come_before_differences_and_the_lowest_rank_first():
    headers = table(call(values={"K": 1}), call(code=Code.SAW_AN_ERROR), call(code=Code.RAISED, text="two"),
                    call(code=Code.RAISED, text="three"))  # fmt: skip
    assert verdict("call", headers, call()).rank == 2


def test_two_ranks_blame_the_second():
    assert verdict("call", table(call(), call(values={"K": 1})), call()).rank == 1


@pytest.mark.parametrize("text", ["", "a", "ü" * 500, "x" * 384])
def test_text_fits(text):
    words = Header(Kind.CALL, Code.RAISED, text=text).encode()
    assert words.shape == (64,) and text.startswith(text_of(words).rstrip("�")) or len(text_of(words)) < len(text)


def test_long_names_stay_apart():
    names = {"dtype": "d" * 900, "pair": "p" * 900}
    other = names | {"pair": "q" * 900}
    error = verdict("call", table(call(names=names), call(names=other)), call(names=names))
    assert error.field == "pair" and "ppp" in str(error) and "qqq" in str(error) and "ddd" not in str(error)


def test_silence():
    error = silence("MoELayer", 3, 5.0, "in the count exchange")
    assert error.rank == 3 and str(error) == (
        "MoELayer: rank 3 must answer within 5 s; got no word from it in the count exchange."
    )
