"""Signs of failure are seen where they are, and nowhere else."""

from __future__ import annotations

from rankfold.measurement.warning_signs import warning_signs
from rankfold.record import Record


def records(**values: tuple[float, float]) -> list[Record]:
    made = []
    for name, pair in values.items():
        for subject, value in zip(("dense", "small"), pair, strict=True):
            made.append(Record(subject=subject, name=name.replace("__", " "), value=value, unit="1"))
    return made


def names(*args: Record, **settings) -> list[str]:
    return [sign.name for sign in warning_signs(list(args), **settings)]


def test_a_good_compression_shows_no_sign() -> None:
    good = records(
        perplexity=(6.0, 6.5), accuracy=(0.8, 0.75), prefill=(1.0, 0.9), decode=(1.0, 1.02), energy=(2.0, 1.9),
        memory=(100, 60), repeated=(0.1, 0.15),
    )  # fmt: skip
    assert names(*good) == []


def test_every_sign_is_seen() -> None:
    assert names(*records(accuracy=(0.8, 0.69))) == ["accuracy"]
    assert names(*records(arc_easy__acc=(0.6, 0.4))) == ["accuracy"]
    assert names(*records(decode=(1.0, 1.2))) == ["slower"]
    assert names(*records(energy=(1.0, 1.2))) == ["energy"]
    assert names(*records(memory=(100, 100))) == ["memory"]
    assert names(*records(perplexity=(6.0, 6.1), repeated=(0.1, 0.4))) == ["repetitive"]
    assert names(*records(perplexity=(6.0, 60.0), repeated=(0.1, 0.4))) == []
    assert names(*records(perplexity=(6.0, 60.0)), quantized=["small"]) == ["broken quantizer"]


def test_a_contended_machine_and_a_missing_dense_model_say_nothing() -> None:
    pair = [
        Record(subject=s, name="decode", value=v, unit="second", context={"contended": True})
        for s, v in (("dense", 1.0), ("small", 3.0))
    ]
    assert names(*pair) == []
    assert names(Record(subject="model", name="accuracy", value=0.1, unit="1")) == []
    assert names(*records(memory=(100, 60)), Record(subject="small", name="energy", value=None, unit="joule")) == []
