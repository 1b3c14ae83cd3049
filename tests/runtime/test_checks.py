import pytest

from prolu.runtime.checks import at_least_1, one_of


def test_at_least_1():
    assert at_least_1("threads", 2) == 2
    with pytest.raises(ValueError, match=r"^threads 0: must be at least 1$"):
        at_least_1("threads", 0)


def test_one_of():
    assert one_of("step", "dense", ("auto", "dense")) == "dense"
    with pytest.raises(ValueError, match=r"^step 'fast': choose one of auto, dense$"):
        one_of("step", "fast", ("auto", "dense"))
