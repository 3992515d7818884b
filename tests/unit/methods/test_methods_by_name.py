"""Training methods by the name that a configuration has for them."""

import pytest

from gelora_plugins.builtin import register_training_methods
from gelora_plugins.methods.base import TrainingMethod
from gelora_plugins.methods.by_name import make_method
from tests.support import methods, steps

TRIED = {**methods.METHODS, **steps.METHODS}  # each list is put through the tests of its kind


@pytest.mark.parametrize("name", register_training_methods())
def test_each_is_registered_by_its_own_name_and_has_defaults(name):
    made = make_method(name)
    assert isinstance(made, TrainingMethod)
    assert made.name == name


@pytest.mark.parametrize("name", TRIED)
def test_each_can_be_written_as_text(name):
    method = TRIED[name]()
    words = " ".join(f"{key}={'null' if v is None else v}" for key, v in method.options().items())
    assert make_method(f"{method.name} {words}").options() == method.options()


def test_every_registered_method_is_put_through_the_tests_of_all():
    assert {make().name for make in TRIED.values()} == register_training_methods().keys()
