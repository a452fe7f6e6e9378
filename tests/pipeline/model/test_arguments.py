import torch

from intaglio.pipeline.model.arguments import flatten, in_order, nest


def test_a_nest_is_named_by_its_paths_and_comes_back():
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    given = {"x": a, "added": {"text": b, "deep": {"ids": c, "flag": True}}, "rotary": (b, c)}
    flat = dict(flatten(given))
    assert list(flat) == ["x", "added.text", "added.deep.ids", "added.deep.flag", "rotary.0", "rotary.1"]
    assert nest(flat) == given


def test_what_holds_no_tensor_stays_whole():
    given = {"img_shapes": [[1, 4, 4]], "kwargs": {"scale": 0.5}, "frames": 3, "mask": None}
    assert dict(flatten(given)) == given


def test_ten_children_keep_their_order():
    given = {"residuals": tuple(torch.full((1,), float(i)) for i in range(11))}
    assert [int(t) for t in nest(dict(flatten(given)))["residuals"]] == list(range(11))


def test_names_are_in_the_order_of_the_arguments():
    assert in_order(["b.0", "timestep", "b.1", "x"], ["x", "timestep", "b"]) == ("x", "timestep", "b.0", "b.1")
