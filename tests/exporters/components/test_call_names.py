"""Names that a pipeline would swallow without a word are no arguments of it."""

import diffusers

from intaglio.exporters.components.export_components import _takes


def test_an_argument_that_vanishes_in_the_rest_is_not_taken():
    def drops(prompt, **kwargs):
        return kwargs.pop("callback", None)

    def hands_on(prompt, **kwargs):
        return drops(prompt, **kwargs)

    taken = {name: (_takes(drops, name), _takes(hands_on, name)) for name in ("prompt", "promt", "callback", "kwargs")}
    assert taken == {
        "prompt": (True, True),
        "promt": (False, True),
        "callback": (True, True),
        "kwargs": (False, True),
    }
    assert not _takes(diffusers.StableDiffusionPipeline.__call__, "promt")
    assert _takes(diffusers.StableDiffusionPipeline.__call__, "callback_steps")
