"""What `set_process_group` takes and sets; `many_processes/` has what the ranks compute."""

import pytest
import torch
from torch import nn

import fastconv
from fastconv import functional, reference


def model(norm="tensor"):
    return nn.Sequential(nn.Conv2d(3, 4, 1), fastconv.ConvNextBlock(4, norm=norm), nn.GELU())


def groups(model):
    return {module.process_group for module in model.modules() if hasattr(module, "process_group")}


def test_it_names_the_modules_whose_norm_spans_ranks():
    classifier = fastconv.Classifier(4, 1, 2)
    assert fastconv.set_process_group(classifier, "ranks") == ["", "conv_block_1.0", "conv_block_2.0"]
    assert groups(classifier) == {"ranks"}
    assert fastconv.set_process_group(classifier, None) == []
    assert groups(classifier) == {None}
    assert fastconv.set_process_group(model(), "ranks") == ["1"]
    for norm in ("sample", "channel"):
        assert fastconv.set_process_group(model(norm), "ranks") == []


def test_modules_take_it_when_they_are_made():
    for made in (
        fastconv.Classifier(4, 1, 2, process_group="ranks"),
        fastconv.ConvNextBlock(4, process_group="ranks"),
        fastconv.DepthwiseConvLayerNorm(4, process_group="ranks"),
    ):
        assert groups(made) == {"ranks"}


def test_what_is_no_group_is_refused():
    with pytest.raises(TypeError, match="process_group is 3; expected a ProcessGroup"):
        fastconv.set_process_group(model(), 3)
    with pytest.raises(TypeError, match="process_group is 3"):
        fastconv.ConvNextBlock(4, process_group=3)
    with pytest.raises(TypeError, match="process_group is 3"):
        functional.layer_norm(torch.ones(1, 2, 3, 3), process_group=3)
    with pytest.raises(TypeError, match=r"model is a str; expected an nn\.Module"):
        fastconv.set_process_group("model", None)


def test_swapped_norms_that_span_the_batch_are_refused():
    for swapped in (reference.Classifier(4, 1, 2), nn.Sequential(reference.ConvNextBlock(4))):
        fastconv.swap(swapped)
        with pytest.raises(ValueError, match=r"whose norm keeps to its own process; build a fastconv\.Classifier"):
            fastconv.set_process_group(swapped, "ranks")
