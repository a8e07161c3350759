"""What is said where an optional package is missing or broken."""

import pytest

from turnover.errors import InputError, needing


def test_missing_package_is_named_with_all_that_would_bring_it() -> None:
    wanted = (
        "the page needs no_such_package, which is not installed: "
        "pip install 'turnover[text]', or pip install 'turnover[images]'"
    )
    with (
        pytest.raises(InputError) as caught,
        needing("the page", "turnover[text]", "turnover[images]"),
    ):
        import no_such_package  # noqa: F401
    assert str(caught.value) == wanted


def test_package_that_is_there_and_lacks_a_name_is_not_called_missing() -> None:
    wanted = r"json, which cannot be imported .*'no_such_name'"
    with pytest.raises(InputError, match=wanted), needing("the page", "json"):
        from json import no_such_name  # noqa: F401
