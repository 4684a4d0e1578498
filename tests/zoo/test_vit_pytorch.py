"""The catalogue has every model of vit_pytorch, or says why not."""

import pkgutil

import vit_pytorch

from tests.zoo.vit_pytorch import ENTRIES, LEFT_OUT


def test_every_module_of_the_library_is_in_the_catalogue_or_left_out_with_a_reason():
    modules = {module.name for module in pkgutil.iter_modules(vit_pytorch.__path__)}
    assert modules == {name.partition(".")[0] for name in (*(entry.name for entry in ENTRIES), *LEFT_OUT)}
    assert not LEFT_OUT.keys() & {entry.name for entry in ENTRIES}
