import torch

from intaglio.pipeline.model.arguments import flatten, in_order, nest, plain_name


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


def test_lists_tuples_and_dicts_keep_their_types():
    a, b = torch.zeros(1), torch.ones(1)
    many = [torch.full((1,), float(i)) for i in range(11)]
    given = {"list": many, "tuple": (a, [b, None]), "blocks": {0: a, 12: [b]}, "mixed": {"text": [a], "pair": (b,)}}
    flat = dict(flatten(given))
    assert {"list.[10]", "tuple.1.[0]", "tuple.1.[1]", "blocks.{12}.[0]", "mixed.pair.0"} < flat.keys()
    assert nest(flat) == given
    assert nest(flat)["list"] == many


def test_numbered_children_become_lists_where_that_is_asked_for():
    assert nest({"a.b.0": 1, "a.b.1": 2, "c.[0]": 3}, list) == {"a": {"b": [1, 2]}, "c": [3]}
    names = {"a.0", "a.[0]", "a.{0}"}
    assert {plain_name(name) for name in names} == {"a.0"}
